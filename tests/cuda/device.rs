//! Tests of the GPU other than kernels: memory, several handles and GPUs, ranks that share a GPU.

use crate::{
    dev,
    exact::{DTYPES, all_exact, all_in_flight, nan_wins, sums_in_rank_order, with_element},
};
use shardwise::{
    Error, Tensor,
    device::{
        Cuda, Device,
        cuda::{precompile, versions},
    },
    kernels::Pointwise,
    launch::Threads,
};
use std::path::Path;

#[test]
fn values_come_back_as_they_went() {
    let cuda = dev::poisoned();
    // The lengths are around the size of the upload buffer, and several times this size.
    for len in [0, 1, 3, (1 << 18) - 1, 1 << 18, (1 << 18) + 1, 700_000] {
        let values: Vec<f32> = (0..len).map(|at| at as f32).collect();
        let first = Tensor::from_slice(&cuda, [len], &values).unwrap();
        let second = Tensor::from_slice(&cuda, [len], &values[..len]).unwrap();
        assert_eq!(first.to_vec().unwrap(), values);
        assert_eq!(second.to_vec().unwrap(), values);
    }
    assert_eq!(cuda.memory().live, 0);
    assert!(cuda.memory().peak >= 5_600_000);
}

/// Uploads many tensors in quick succession. No upload may overwrite memory that the device still
/// reads.
#[test]
fn many_small_uploads_are_not_mixed_up() {
    let cuda = dev::fresh();
    let nothing = Tensor::<f64, _>::empty(&cuda, [0]).unwrap();
    let tensors = (0..3000).map(|at| {
        // This tensor has no elements, so reading it does not wait for the device.
        assert!(nothing.to_vec().unwrap().is_empty());
        Tensor::from_slice(&cuda, [300], &vec![at as f64; 300]).unwrap()
    });
    let tensors: Vec<_> = tensors.collect();
    for (at, tensor) in tensors.iter().enumerate() {
        assert!(tensor.to_vec().unwrap().iter().all(|value| *value == at as f64));
    }
}

#[test]
fn handles_of_one_gpu_share_tensors() {
    let (one, other) = (dev::fresh(), dev::fresh());
    let mut sum = Tensor::<f32, _>::zeros(&one, [1000]).unwrap();
    for _ in 0..20 {
        let term = Tensor::<f32, _>::full(&other, [1000], 2.0).unwrap();
        // Each handle adds to the sum, while the other handle's work continues.
        one.accumulate(term.mat(), sum.mat_mut().unwrap()).unwrap();
        other.accumulate(term.mat(), sum.mat_mut().unwrap()).unwrap();
    }
    assert_eq!(sum.to_vec().unwrap(), vec![80.0; 1000]);
}

#[test]
fn a_tensor_of_another_gpu_is_an_error() {
    if dev::needed() < 2 {
        println!("not run: there is one GPU only");
        return;
    }
    let (first, second) = (Cuda::new(0).unwrap(), Cuda::new(1).unwrap());
    let (a, b) =
        (Tensor::<f32, _>::zeros(&first, [3]).unwrap(), Tensor::<f32, _>::zeros(&second, [3]).unwrap());
    let mut y = Tensor::<f32, _>::zeros(&first, [3]).unwrap();
    let error = first.add(a.mat(), b.mat(), y.mat_mut().unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "CUDA: a tensor of GPU 1 is used on GPU 0");
    assert_eq!(y.to_vec().unwrap(), vec![0.0; 3], "the rejected call wrote its result");
}

#[test]
fn what_is_not_there_is_an_error() {
    let count = dev::needed();
    let error = Cuda::new(count).unwrap_err().to_string();
    let said = format!("the number of the GPU is {count}, but the number of GPUs is {count}");
    assert!(error.contains(&said), "{error}");
    let cuda = dev::fresh();
    // The tensor is several times as large as the GPU's memory. For a slightly too large tensor, a
    // driver would first take all the memory, which other processes need.
    let error = Tensor::<f64, _>::empty(&cuda, [cuda.total_memory() / 2]).unwrap_err();
    assert!(matches!(error, Error::Library { library: "CUDA driver", code: 2, .. }), "{error}");
    // These tensors have more bytes than `usize` can count. A wrapped size would give a buffer that
    // is shorter than its view.
    for len in [usize::MAX, usize::MAX / 8 + 2] {
        let error = Tensor::<f64, _>::empty(&cuda, [len]).unwrap_err();
        assert_eq!(error, Error::Memory { len, size: 8 });
    }
    // The device still works.
    assert_eq!(Tensor::<f64, _>::full(&cuda, [3], 1.5).unwrap().to_vec().unwrap(), [1.5; 3]);
}

#[test]
fn libraries_and_kernels_are_reported() {
    dev::needed();
    for version in versions() {
        let version = version.unwrap();
        assert!(version.path.exists(), "{version:?}");
        assert!(version.version.starts_with(|first: char| first.is_ascii_digit()), "{version:?}");
    }
    // The device need not have this capability. Every `.cu` file has its own image for it.
    let images = |folder: &Path| {
        let files = std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().file_name());
        files.filter(|name| name.to_string_lossy().ends_with(".bin")).count()
    };
    let folder = precompile((8, 0)).unwrap();
    let sources = std::fs::read_dir(shardwise_tests::root().join("cuda")).unwrap();
    let sources =
        sources.filter(|file| file.as_ref().unwrap().path().extension().is_some_and(|end| end == "cu"));
    assert!(images(&folder) >= sources.count());
    let error = precompile((1, 0)).unwrap_err().to_string();
    assert!(error.contains("not for compute capability 1.0"), "{error}");
}

/// Thread ranks share GPU 0 and communicate through the host.
#[test]
fn ranks_share_a_gpu() {
    dev::needed();
    for world in [1, 2, 3, 5] {
        Threads::new(world)
            .run(|host| {
                let group = host.staged(&Cuda::poisoned(0)?);
                all_exact(&group, false)?;
                all_in_flight(&group)?;
                for dtype in DTYPES {
                    with_element!(dtype, sums_in_rank_order(&group))?;
                    with_element!(dtype, nan_wins(&group))?;
                }
                group.barrier()
            })
            .unwrap();
    }
}
