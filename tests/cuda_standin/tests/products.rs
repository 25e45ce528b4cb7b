//! `CUDA_STANDIN_LT=varied,states`: products that another kernel may compute differ in bits, and
//! not every returned algorithm is usable.

mod common;
#[path = "common/multiply.rs"]
mod multiply;

use common::{allocate, streams};
use cuda_standin::{driver::*, error::*, lt::*};
use multiply::multiply;
use std::{collections::HashSet, ffi::c_int, sync::Once};

fn vary() {
    static ONCE: Once = Once::new();
    // SAFETY: every test calls this first, and no other thread reads the environment before it has.
    ONCE.call_once(|| unsafe { std::env::set_var("CUDA_STANDIN_LT", "varied,states") });
}

const K: usize = 257;

/// The states and algorithms that are found for a row of K numbers times a column of K numbers.
fn found(leading: i64, alignment: u32, wanted: c_int) -> (Vec<Heuristic>, [usize; 4]) {
    let (mut handle, mut desc, mut preference, mut layouts) = (0, 0, 0, [0; 3]);
    let (mut results, mut count) = (Vec::<Heuristic>::with_capacity(8), 0);
    unsafe {
        assert_eq!(cublasLtCreate(&mut handle), 0);
        assert_eq!(cublasLtMatmulDescCreate(&mut desc, 68, 0), 0);
        assert_eq!(cublasLtMatmulPreferenceCreate(&mut preference), 0);
        let bytes = (&raw const alignment).cast();
        assert_eq!(cublasLtMatmulPreferenceSetAttribute(preference, 5, bytes, 4), 0);
        let sizes = [(1, K as u64, leading), (K as u64, 1, K as i64), (1, 1, 1)];
        for (layout, (rows, cols, leading)) in layouts.iter_mut().zip(sizes) {
            assert_eq!(cublasLtMatrixLayoutCreate(layout, 0, rows, cols, leading), 0);
        }
        let [a, b, c] = layouts;
        let to = results.as_mut_ptr();
        assert_eq!(
            cublasLtMatmulAlgoGetHeuristic(handle, desc, a, b, c, c, preference, wanted, to, &mut count),
            0
        );
        assert!((1..=wanted).contains(&count));
        results.set_len(count as usize);
        (results, [handle, desc, a, b])
    }
}

/// The product of numbers of very different sizes, by the first usable algorithm.
fn product(stream: usize, leading: i64, alignment: u32, shift: usize) -> Result<u32, c_int> {
    let (results, [handle, desc, a_layout, b_layout]) = found(leading, alignment, 8);
    let valid = results.iter().find(|result| result.state == 0).expect("one is valid");
    let (mut c_layout, mut got) = (0, 0_f32);
    let numbers: Vec<f32> = (0..K).map(|i| (i as f32 - 100.3) * 3_f32.powi(i as i32 % 13)).collect();
    let [a, b, c] = [4 * K * leading as usize + 256, 4 * K, 4].map(|bytes| allocate(bytes, stream));
    let a = a + shift;
    unsafe {
        assert_eq!(cublasLtMatrixLayoutCreate(&mut c_layout, 0, 1, 1, 1), 0);
        for (i, number) in numbers.iter().enumerate() {
            let at = a + 4 * i * leading as usize;
            assert_eq!(cuMemcpyHtoDAsync_v2(at, (&raw const *number).cast(), 4, stream), SUCCESS);
        }
        assert_eq!(cuMemcpyHtoDAsync_v2(b, numbers.as_ptr().cast(), 4 * K, stream), SUCCESS);
        // The gaps between a's columns are not part of it, but memory.
        let layouts = [a_layout, b_layout, c_layout];
        let code = multiply([handle, desc], [a, b, c], layouts, &raw const valid.algorithm, (0, 0), stream);
        if code != 0 {
            return Err(code);
        }
        assert_eq!(cuMemcpyDtoHAsync_v2((&raw mut got).cast(), c, 4, stream), SUCCESS);
    }
    Ok(got.to_bits())
}

#[test]
fn the_order_of_a_sum_depends_on_leading_dimensions_and_alignment() {
    vary();
    let (stream, _) = streams(0);
    let first = product(stream, 1, 256, 0).unwrap();
    assert_eq!(product(stream, 1, 256, 0), Ok(first), "the same call has the same bits");
    let leading: HashSet<_> = (1..9).map(|leading| product(stream, leading, 256, 0).unwrap()).collect();
    let aligned: HashSet<_> = (2..9).map(|bit| product(stream, 1, 1 << bit, 0).unwrap()).collect();
    assert!(leading.len() > 1 && aligned.len() > 1, "{leading:?} {aligned:?}");
    assert_eq!(product(stream, 1, 256, 16), Err(7), "not aligned as the algorithm was asked for");
    assert!(product(stream, 1, 16, 16).is_ok());
}

#[test]
fn not_every_algorithm_is_valid_and_no_more_come_than_are_wanted() {
    vary();
    streams(1);
    let states: Vec<Vec<c_int>> =
        (1..20).map(|leading| found(leading, 256, 2).0.iter().map(|result| result.state).collect()).collect();
    assert!(states.contains(&vec![0, 0]) && states.contains(&vec![15, 0]), "{states:?}");
    assert_eq!(found(1, 256, 1).0.len(), 1);
}
