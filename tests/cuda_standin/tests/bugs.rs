//! Planted bugs in kernels, products and collectives are found; the same code without the bug
//! passes.

#[path = "common/kernels.rs"]
mod kernels;
#[path = "common/multiply.rs"]
mod multiply;

use cuda_standin::{driver::*, error::*, lt::*, nccl::*};
use multiply::multiply;
use std::{
    ffi::{CStr, c_int, c_uint, c_void},
    ptr::null_mut,
    time::{Duration, Instant},
};

const KERNELS: &str = r#"
extern "C" __global__ void fill(float* to, long long count, double value) {
  const long long at = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (at < count) to[at] = (float)value;
}
// Reverses each block's numbers through shared memory. Without the barrier other threads have not
// written yet.
template <bool BARRIER> __device__ void turn(const float* from, float* to) {
  __shared__ float kept[64];
  kept[threadIdx.x] = from[blockIdx.x * 64 + threadIdx.x];
  if (BARRIER) __syncthreads();
  to[blockIdx.x * 64 + threadIdx.x] = kept[63 - threadIdx.x];
}
extern "C" __global__ void reverse(const float* from, float* to) { turn<true>(from, to); }
extern "C" __global__ void reverse_without_barrier(const float* from, float* to) { turn<false>(from, to); }
// The sum over a warp by shuffles, and over a block through dynamic shared memory.
extern "C" __global__ void sums(const float* from, float* to) {
  float* part = (float*)__standin_dynamic_shared();
  float sum = from[blockIdx.x * blockDim.x + threadIdx.x];
  for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0;
    for (int warp = 0; warp < blockDim.x / 32; warp++) sum += part[warp];
    to[blockIdx.x] = sum;
  }
}
// Copies asynchronously through shared memory.
template <bool AWAIT> __device__ void pass(const float* from, float* to) {
  alignas(16) __shared__ float kept[128];
  __standin_copy_async(kept + 4 * threadIdx.x, from + 4 * threadIdx.x);
  if (AWAIT) __standin_await_copies();
  __syncthreads();
  for (int k = 0; k < 4; k++) to[32 * k + threadIdx.x] = kept[32 * k + threadIdx.x];
}
extern "C" __global__ void copy(const float* from, float* to) { pass<true>(from, to); }
extern "C" __global__ void copy_without_waiting(const float* from, float* to) { pass<false>(from, to); }
// d = a b, of 16 x 16 and 16 x 8 small integers of 16 bits: b as it is, and transposed.
extern "C" __global__ void products(const unsigned short* a, const unsigned short* b, const unsigned short* b_transposed, float* d) {
  const unsigned lane = threadIdx.x;
  unsigned rows[4], columns[4], same[4];
  __standin_load_matrices(rows, a + lane % 16 * 16 + lane / 16 * 8, false);
  __standin_load_matrices(columns, b_transposed + lane % 8 * 16 + lane / 8 % 2 * 8, false);
  __standin_load_matrices(same, b + lane % 16 * 8, true);
  float product[4] = {0, 0, 0, 0};
  const auto widen = [](unsigned bits) { return (float)bits; };
  __standin_mma(product, rows, columns[0], columns[1], widen);
  __standin_mma(product, rows, same[0], same[1], widen);
  for (int k = 0; k < 4; k++) d[(lane / 4 + k / 2 * 8) * 8 + lane % 4 * 2 + k % 2] = product[k];
}
extern "C" __global__ void votes(const float* from, float* to) {
  const int any = __syncthreads_or(from[threadIdx.x] > 0), none = __syncthreads_or(0);
  to[threadIdx.x] = (float)(2 * any + none);
}
"#;

/// A stream of a device that only this test uses, because errors are sticky.
fn stream(device: c_int) -> usize {
    let (mut context, mut stream) = (0, 0);
    unsafe {
        assert_eq!(cuDevicePrimaryCtxRetain(&mut context, device), SUCCESS);
        assert_eq!(cuCtxSetCurrent(context), SUCCESS);
        assert_eq!(cuStreamCreate(&mut stream, 1), SUCCESS);
    }
    stream
}

fn upload(stream: usize, values: &[f32]) -> usize {
    let mut start = 0;
    unsafe {
        assert_eq!(cuMemAllocAsync(&mut start, size_of_val(values), stream), SUCCESS);
        assert_eq!(cuMemcpyHtoDAsync_v2(start, values.as_ptr().cast(), size_of_val(values), stream), SUCCESS);
    }
    start
}

fn download(stream: usize, start: usize, len: usize) -> Vec<f32> {
    let mut values = vec![0.0; len];
    assert_eq!(unsafe { cuMemcpyDtoHAsync_v2(values.as_mut_ptr().cast(), start, 4 * len, stream) }, SUCCESS);
    values
}

fn compile(source: &str) -> Result<usize, String> {
    kernels::image(source).map(|image| kernels::load(&image))
}

fn launch(
    module: usize,
    name: &CStr,
    stream: usize,
    grid: c_uint,
    block: c_uint,
    arguments: &mut [u64],
) -> Code {
    kernels::launch(kernels::function(module, name), stream, [grid, block, 256], arguments)
}

#[test]
fn kernels_run_with_barriers_and_shuffles() {
    let stream = stream(0);
    let module = compile(KERNELS).unwrap();
    let values: Vec<f32> = (0..256).map(|at| at as f32).collect();
    let (from, to) = (upload(stream, &values), upload(stream, &[0.0; 256]));
    assert_eq!(launch(module, c"reverse", stream, 4, 64, &mut [from as u64, to as u64]), SUCCESS);
    let reversed: Vec<f32> = values.chunks(64).flat_map(|block| block.iter().rev().copied()).collect();
    assert_eq!(download(stream, to, 256), reversed);
    assert_eq!(launch(module, c"sums", stream, 2, 128, &mut [from as u64, to as u64]), SUCCESS);
    assert_eq!(download(stream, to, 2), [8128.0, 24512.0]);
    // Without the barrier, unwritten memory is read.
    assert_eq!(
        launch(module, c"reverse_without_barrier", stream, 4, 64, &mut [from as u64, to as u64]),
        SUCCESS
    );
    assert!(download(stream, to, 256).iter().any(|value| value.is_nan()));
    assert_eq!(
        launch(module, c"fill", stream, 1, 2048, &mut [to as u64, 1, 0]),
        INVALID_VALUE,
        "too many threads"
    );
    let log = compile("extern \"C\" __global__ void wrong(float* x) { y[0] = 1; }").unwrap_err();
    assert!(log.contains("was not declared"), "{log}");
}

#[test]
fn matrices_are_multiplied_and_copies_are_late() {
    let stream = stream(0);
    let module = compile(KERNELS).unwrap();
    let values: Vec<f32> = (0..128).map(|at| at as f32).collect();
    let (from, to) = (upload(stream, &values), upload(stream, &[0.0; 128]));
    assert_eq!(launch(module, c"copy", stream, 1, 32, &mut [from as u64, to as u64]), SUCCESS);
    assert_eq!(download(stream, to, 128), values);
    // Without the wait, unwritten memory is read.
    assert_eq!(
        launch(module, c"copy_without_waiting", stream, 1, 32, &mut [from as u64, to as u64]),
        SUCCESS
    );
    assert!(download(stream, to, 128).iter().all(|value| value.is_nan()));

    let (a, b) = (|i: usize, k: usize| (3 * i + k) % 11, |k: usize, j: usize| (k + 5 * j) % 7);
    // Two 16-bit numbers are packed into one f32.
    let packed = |rows: usize, cols: usize, at: &dyn Fn(usize, usize) -> usize| -> Vec<f32> {
        let pack = |at: &dyn Fn(usize) -> usize, i| f32::from_bits((at(2 * i) | at(2 * i + 1) << 16) as u32);
        (0..rows * cols / 2).map(|i| pack(&|i| at(i / cols, i % cols), i)).collect()
    };
    let places = [packed(16, 16, &a), packed(16, 8, &b), packed(8, 16, &|j, k| b(k, j))];
    let [left, right, transposed] = places.map(|packed| upload(stream, &packed) as u64);
    assert_eq!(
        launch(module, c"products", stream, 1, 32, &mut [left, right, transposed, to as u64]),
        SUCCESS
    );
    let dot = |i, j| 2.0 * (0..16).map(|k| (a(i, k) * b(k, j)) as f32).sum::<f32>();
    let want: Vec<f32> = (0..128).map(|at| dot(at / 8, at % 8)).collect();
    assert_eq!(download(stream, to, 128), want);

    let one = upload(stream, &(0..64).map(|at| f32::from(u8::from(at == 37))).collect::<Vec<_>>());
    assert_eq!(launch(module, c"votes", stream, 1, 64, &mut [one as u64, to as u64]), SUCCESS);
    assert_eq!(download(stream, to, 64), [2.0; 64]);
}

#[test]
fn a_kernel_that_writes_behind_its_memory_is_found() {
    let stream = stream(1);
    let module = compile(KERNELS).unwrap();
    let memory = upload(stream, &[0.0; 100]);
    let one = 1.0_f64.to_bits();
    assert_eq!(launch(module, c"fill", stream, 1, 128, &mut [memory as u64, 100, one]), SUCCESS);
    assert_eq!(download(stream, memory, 100), [1.0; 100]);
    // One element too many.
    launch(module, c"fill", stream, 1, 128, &mut [memory as u64, 101, one]);
    unsafe { cuStreamSynchronize(stream) };
    assert_eq!(unsafe { cuCtxSynchronize() }, ILLEGAL_ADDRESS);
    assert!(reports().iter().any(|report| report.starts_with("kernel fill has written next to the memory")));
}

#[test]
fn kernels_of_two_streams_have_to_be_ordered() {
    let (first, mut second, mut event) = (stream(2), 0, 0);
    assert_eq!(unsafe { cuStreamCreate(&mut second, 1) }, SUCCESS);
    let module = compile(KERNELS).unwrap();
    let (from, to) = (upload(first, &[1.0; 64]), upload(first, &[0.0; 64]));
    unsafe {
        assert_eq!((cuEventCreate(&mut event, 2), cuEventRecord(event, first)), (SUCCESS, SUCCESS));
        assert_eq!(cuStreamWaitEvent(second, event, 0), SUCCESS);
    }
    assert_eq!(launch(module, c"reverse", second, 1, 64, &mut [from as u64, to as u64]), SUCCESS);
    // Both streams only read `from`.
    let other = upload(first, &[0.0; 64]);
    assert_eq!(launch(module, c"reverse", first, 1, 64, &mut [from as u64, other as u64]), SUCCESS);
    // Uses the result of the second stream on the first without a wait.
    assert_eq!(launch(module, c"reverse", first, 1, 64, &mut [to as u64, other as u64]), ILLEGAL_ADDRESS);
    assert!(reports().iter().any(|report| report.starts_with("race: kernel reverse")));
}

#[test]
fn a_product_beyond_its_memory_is_found() {
    let stream = stream(3);
    let (a, b, c) = (upload(stream, &[1.0; 6]), upload(stream, &[1.0; 6]), upload(stream, &[0.0; 4]));
    let workspace = upload(stream, &[0.0; 512]);
    let (mut handle, mut desc, mut preference, mut layouts) = (0, 0, 0, [0; 3]);
    // `cublasLtMatmulHeuristicResult_t`.
    let (mut result, mut count) = ([0_u64; 13], 0);
    let multiply = |rows: [u64; 3],
                    layouts: &mut [usize; 3],
                    result: &mut [u64; 13],
                    count: &mut c_int,
                    parts: (usize, usize, usize)| unsafe {
        // Column-major: A is rows x 3, B 3 x 2, C rows x 2.
        for (layout, (rows, cols)) in layouts.iter_mut().zip([(rows[0], 3), (rows[1], 2), (rows[2], 2)]) {
            assert_eq!(cublasLtMatrixLayoutCreate(layout, 0, rows, cols, rows as i64), 0);
        }
        let (handle, desc, preference) = parts;
        let [a_layout, b_layout, c_layout] = *layouts;
        let found = cublasLtMatmulAlgoGetHeuristic(
            handle,
            desc,
            a_layout,
            b_layout,
            c_layout,
            c_layout,
            preference,
            1,
            result.as_mut_ptr().cast(),
            count,
        );
        if found != 0 {
            return found;
        }
        let algorithm = result.as_ptr().cast();
        multiply([handle, desc], [a, b, c], *layouts, algorithm, (workspace, 2048), stream)
    };
    unsafe {
        assert_eq!(cublasLtCreate(&mut handle), 0);
        assert_eq!(cublasLtMatmulDescCreate(&mut desc, 68, 0), 0);
        assert_eq!(cublasLtMatmulPreferenceCreate(&mut preference), 0);
        let workspace = 2048_u64;
        assert_eq!(cublasLtMatmulPreferenceSetAttribute(preference, 1, (&raw const workspace).cast(), 8), 0);
    }
    let parts = (handle, desc, preference);
    assert_eq!(multiply([2, 3, 2], &mut layouts, &mut result, &mut count, parts), 0);
    assert_eq!(download(stream, c, 4), [3.0; 4]);
    assert_eq!(multiply([2, 3, 3], &mut layouts, &mut result, &mut count, parts), 7, "rows that disagree");
    assert_eq!(multiply([3, 3, 3], &mut layouts, &mut result, &mut count, parts), 13, "A of nine numbers");
    assert!(reports().iter().any(|report| report.starts_with("matmul: A: out of bounds")));
}

/// Opens this device's memory to the other devices.
fn open(device: c_int) {
    let mut pool = 0;
    unsafe {
        assert_eq!(cuDeviceGetDefaultMemPool(&mut pool, device), SUCCESS);
        for other in (0..8).filter(|&other| other != device) {
            assert_eq!(cuMemPoolSetAccess(pool, &[1, other, 3], 1), SUCCESS);
        }
    }
}

fn unique_id() -> UniqueId {
    let mut id = std::mem::MaybeUninit::uninit();
    unsafe {
        assert_eq!(ncclGetUniqueId(id.as_mut_ptr()), 0);
        id.assume_init()
    }
}

/// Joins as one of two ranks; returns the communicator once both have joined.
fn join(id: UniqueId, rank: c_int) -> usize {
    let mut comm = 0;
    assert_eq!(unsafe { ncclCommInitRankConfig(&mut comm, 2, id, rank, null_mut()) }, 0);
    comm
}

/// Ranks of one process access each other's memory directly, which a pool does not allow by
/// default.
#[test]
fn memory_that_is_not_open_to_the_other_rank_is_found() {
    let id = unique_id();
    std::thread::scope(|scope| {
        for rank in 0..2 {
            scope.spawn(move || {
                let stream = stream(6 + rank);
                let comm = join(id, rank);
                let x = upload(stream, &[1.0; 5]);
                let reduced =
                    unsafe { ncclAllReduce(x as *const c_void, x as *mut c_void, 5, 7, 0, comm, stream) };
                assert_eq!(reduced, 1);
            });
        }
    });
    let closed =
        |report: &String| report.starts_with("NCCL: the memory of device") && report.contains("open");
    assert_eq!(reports().iter().filter(|report| closed(report)).count(), 2);
}

/// Two ranks, of which the second skips a collective: the first waits until it aborts.
#[test]
fn a_skipped_collective_waits_until_it_is_aborted() {
    let id = unique_id();
    std::thread::scope(|scope| {
        for rank in 0..2 {
            scope.spawn(move || unsafe {
                let stream = stream(4 + rank);
                open(4 + rank);
                let comm = join(id, rank);
                let x = upload(stream, &[1.0 + rank as f32; 5]);
                let reduce = || ncclAllReduce(x as *const c_void, x as *mut c_void, 5, 7, 0, comm, stream);
                assert_eq!(reduce(), 0);
                assert_eq!(download(stream, x, 5), [3.0; 5]);
                if rank == 1 {
                    return;
                }
                assert_eq!(reduce(), 0);
                let begin = Instant::now();
                while begin.elapsed() < Duration::from_millis(30) {
                    assert_eq!(cuStreamQuery(stream), NOT_READY, "it ended without the other rank");
                }
                assert_eq!(ncclCommAbort(comm), 0);
                assert_eq!(cuStreamSynchronize(stream), SUCCESS);
            });
        }
    });
}
