//! A product by cuBLASLt.

use cuda_standin::lt::{Algorithm, cublasLtMatmul};
use std::ffi::c_int;

/// C ← A B of f32. `layouts` are those of A, B and C; `workspace` has an address and a size.
///
/// # Safety
/// The handles and the algorithm are cuBLASLt's.
pub unsafe fn multiply(
    [handle, desc]: [usize; 2],
    [a, b, c]: [usize; 3],
    layouts: [usize; 3],
    algorithm: *const Algorithm,
    (workspace, size): (usize, usize),
    stream: usize,
) -> c_int {
    let (one, zero) = (1.0_f32, 0.0_f32);
    let (one, zero) = ((&raw const one).cast(), (&raw const zero).cast());
    let [of_a, of_b, of_c] = layouts;
    unsafe {
        cublasLtMatmul(
            handle, desc, one, a, of_a, b, of_b, zero, c, of_c, c, of_c, algorithm, workspace, size, stream,
        )
    }
}
