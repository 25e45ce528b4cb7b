//! GEMM on the CPU: `matrixmultiply` for f32 and f64; bf16 and f16 are widened block by block and multiplied in f32.
//! Products of few rows are streamed (`few`).

use super::{
    Batch, Gemm, Product, check,
    few::{self, Scale},
};
use crate::{
    device::{Accumulator, AnyMut, AnyRef, Cpu, Device, Element, vectorized},
    error::{Error, Result},
    kernels::{
        MatMut, MatRef,
        view::{Dims, mat, mat_mut},
    },
};
use std::num::NonZeroUsize;

/// A product with fewer multiplications than this is not worth more than one thread.
const PARALLEL: usize = 1 << 22;

/// The columns of B and the depth that the widening path takes at a time: 1 MiB of f32.
const WIDE: usize = 512;

impl Gemm for Cpu {
    fn gemm_batched<T: Element, C: Element<Acc = T::Acc>>(
        &self,
        batch: Batch,
        alpha: f64,
        a: MatRef<'_, T, Self>,
        b: MatRef<'_, T, Self>,
        beta: f64,
        c: MatMut<'_, C, Self>,
    ) -> Result<()> {
        check(batch, &a, &b, &c)?;
        let dims = Extents { a: a.dims(), b: b.dims(), c: c.dims() };
        if dims.c.extent() == 0 {
            return Ok(());
        }
        let memory = c.into_data();
        for at in 0..batch.count {
            // A product of depth 0 has no elements in A and B to point at.
            let a = a.data().get(at * batch.a..).unwrap_or(&[]);
            let b = b.data().get(at * batch.b..).unwrap_or(&[]);
            let c = &mut memory[at * batch.c..];
            if few::fits(dims.a, dims.b) {
                let mut sums = self.empty::<T::Acc>(few::room(dims.b, dims.c))?;
                let scale = Scale { alpha: T::Acc::from_f64(alpha), beta: T::Acc::from_f64(beta) };
                few::multiply((dims.a, a), (dims.b, b), (dims.c, c), scale, &mut sums);
                continue;
            }
            blocked(self, dims, alpha, a, b, beta, c)?;
        }
        Ok(())
    }

    fn splits_exactly(&self) -> bool {
        true
    }

    fn gemm_all<T: Element, C: Element<Acc = T::Acc>>(
        &self,
        products: Vec<Product<'_, '_, T, C, Self>>,
    ) -> Result<()> {
        let work =
            |product: &Product<'_, '_, T, C, Self>| product.a.rows() * product.a.cols() * product.b.cols();
        let workers = match products.iter().map(work).sum::<usize>() >= PARALLEL {
            true => self.threads().min(products.len()).max(1),
            false => 1,
        };
        // A handle belongs to one thread, so that each makes its own.
        let threads = NonZeroUsize::new(self.threads() / workers).unwrap_or(NonZeroUsize::MIN);
        let run = |cpu: &Self, products: Vec<Product<'_, '_, T, C, Self>>| {
            products.into_iter().try_for_each(|Product { a, b, beta, c }| cpu.gemm(1.0, a, b, beta, c))
        };
        if workers == 1 {
            return run(self, products);
        }
        let mut shares: Vec<Vec<_>> = (0..workers).map(|_| Vec::new()).collect();
        for (at, product) in products.into_iter().enumerate() {
            shares[at % workers].push(product);
        }
        std::thread::scope(|scope| {
            let mut shares = shares.into_iter();
            let own = shares.next().unwrap_or_default();
            let others: Vec<_> = shares
                .map(|share| scope.spawn(move || run(&Cpu::new().with_threads(threads), share)))
                .collect();
            let first = run(&self.clone().with_threads(threads), own);
            let lost = |_| Error::invalid("gemm", "a thread panicked: please report this");
            others.into_iter().fold(first, |all, one| all.and(one.join().map_err(lost).and_then(|one| one)))
        })
    }
}

/// C ← α A B + β C by blocks, however few rows there are. Attention, which cuts its queries into tiles, multiplies them so:
/// a tile's results do not depend on the number of its rows.
pub(in crate::kernels) fn by_blocks<A: Accumulator>(
    cpu: &Cpu,
    alpha: f64,
    a: MatRef<'_, A, Cpu>,
    b: MatRef<'_, A, Cpu>,
    beta: f64,
    c: MatMut<'_, A, Cpu>,
) -> Result<()> {
    check(Batch::ONE, &a, &b, &c)?;
    let dims = Extents { a: a.dims(), b: b.dims(), c: c.dims() };
    if dims.c.extent() == 0 {
        return Ok(());
    }
    blocked(cpu, dims, alpha, a.data(), b.data(), beta, c.into_data())
}

fn blocked<T: Element, C: Element<Acc = T::Acc>>(
    cpu: &Cpu,
    dims: Extents,
    alpha: f64,
    a: &[T],
    b: &[T],
    beta: f64,
    c: &mut [C],
) -> Result<()> {
    match (T::any_ref::<Cpu>(a), T::any_ref::<Cpu>(b), C::any_mut::<Cpu>(c)) {
        (AnyRef::F32(a), AnyRef::F32(b), AnyMut::F32(c)) => {
            native(cpu.threads(), matrixmultiply::sgemm, dims, alpha as f32, a, b, beta as f32, c);
            Ok(())
        }
        (AnyRef::F64(a), AnyRef::F64(b), AnyMut::F64(c)) => {
            native(cpu.threads(), matrixmultiply::dgemm, dims, alpha, a, b, beta, c);
            Ok(())
        }
        _ => widened(cpu, dims, alpha, a, b, beta, c),
    }
}

/// The dimensions of one product; they agree, and lie inside the memory that comes with them.
#[derive(Clone, Copy)]
struct Extents {
    a: Dims,
    b: Dims,
    c: Dims,
}

/// `matrixmultiply`'s signature: m, k, n, α, A with strides, B with strides, β, C with strides.
type Kernel<T> = unsafe fn(
    usize,
    usize,
    usize,
    T,
    *const T,
    isize,
    isize,
    *const T,
    isize,
    isize,
    T,
    *mut T,
    isize,
    isize,
);

/// C ← α A B + β C, the rows of C shared among threads. Each element is summed in the same order on any number of them.
#[allow(clippy::too_many_arguments)]
fn native<T: Element>(
    threads: usize,
    kernel: Kernel<T>,
    dims: Extents,
    alpha: T,
    a: &[T],
    b: &[T],
    beta: T,
    c: &mut [T],
) {
    let Extents { a: ad, b: bd, c: cd } = dims;
    let by_rows = cd.col_stride == 1 && cd.row_stride >= cd.cols;
    let threads = if by_rows && cd.rows * cd.cols * ad.cols >= PARALLEL { threads.min(cd.rows) } else { 1 };
    if threads <= 1 {
        return call(kernel, dims, alpha, a, b, beta, c);
    }
    // Whole multiples of 16 rows: the micro-kernels then meet no more ragged edges than on one thread.
    let each = cd.rows.div_ceil(threads).next_multiple_of(16);
    std::thread::scope(|scope| {
        for (part, c) in c.chunks_mut(each * cd.row_stride).enumerate() {
            let start = part * each;
            if start >= cd.rows {
                break;
            }
            let rows = each.min(cd.rows - start);
            let dims = Extents { a: Dims { rows, ..ad }, b: bd, c: Dims { rows, ..cd } };
            let a = &a[start * ad.row_stride..];
            scope.spawn(move || call(kernel, dims, alpha, a, b, beta, c));
        }
    });
}

#[allow(clippy::too_many_arguments)]
fn call<T: Element>(kernel: Kernel<T>, dims: Extents, alpha: T, a: &[T], b: &[T], beta: T, c: &mut [T]) {
    let Extents { a: ad, b: bd, c: cd } = dims;
    assert!(ad.extent() <= a.len() && bd.extent() <= b.len() && cd.extent() <= c.len());
    assert!(ad.rows == cd.rows && ad.cols == bd.rows && bd.cols == cd.cols);
    // SAFETY: the kernel reads `ad.extent()` elements of A and `bd.extent()` of B and writes at most `cd.extent()` of
    // C, by the dimensions and strides given; the assertions above hold the three slices to at least those lengths.
    // C is exclusively borrowed and its elements are apart, as `MatMut::strided` has checked.
    #[allow(unsafe_code)]
    unsafe {
        kernel(
            cd.rows,
            ad.cols,
            cd.cols,
            alpha,
            a.as_ptr(),
            ad.row_stride as isize,
            ad.col_stride as isize,
            b.as_ptr(),
            bd.row_stride as isize,
            bd.col_stride as isize,
            beta,
            c.as_mut_ptr(),
            cd.row_stride as isize,
            cd.col_stride as isize,
        );
    }
}

/// C ← α A B + β C where an operand is narrower than the accumulator: blocks of A and B are widened, their products
/// summed in the accumulator, and each element of C is rounded once.
#[allow(clippy::too_many_arguments)]
fn widened<T: Element, C: Element<Acc = T::Acc>>(
    cpu: &Cpu,
    dims: Extents,
    alpha: f64,
    a: &[T],
    b: &[T],
    beta: f64,
    c: &mut [C],
) -> Result<()> {
    let Extents { a: ad, b: bd, c: cd } = dims;
    let (m, k, n) = (cd.rows, ad.cols, cd.cols);
    let (wide_n, wide_k) = (n.min(WIDE), k.min(WIDE));
    let mut wide_a = cpu.empty::<T::Acc>(m * wide_k)?;
    let mut wide_b = cpu.empty::<T::Acc>(wide_k * wide_n)?;
    let mut sums = cpu.empty::<T::Acc>(m * wide_n)?;
    let (alpha, keep) = (T::Acc::from_f64(alpha), T::Acc::from_f64(beta));
    for first_n in (0..n).step_by(WIDE) {
        let cols = WIDE.min(n - first_n);
        sums[..m * cols].fill(T::Acc::ZERO);
        for first_k in (0..k).step_by(WIDE) {
            let depth = WIDE.min(k - first_k);
            widen(ad, a, (0, first_k), (m, depth), &mut wide_a);
            widen(bd, b, (first_k, first_n), (depth, cols), &mut wide_b);
            let (a, b) = (mat(&wide_a, m, depth)?, mat(&wide_b, depth, cols)?);
            by_blocks(cpu, 1.0, a, b, 1.0, mat_mut(&mut sums, m, cols)?)?;
        }
        vectorized(|| {
            for i in 0..m {
                for j in 0..cols {
                    let to = &mut c[i * cd.row_stride + (first_n + j) * cd.col_stride];
                    let sum = alpha * sums[i * cols + j];
                    *to = C::narrow(if beta == 0.0 { sum } else { sum + keep * to.widen() });
                }
            }
        });
    }
    Ok(())
}

/// A block of a strided matrix, row-major in the accumulator.
fn widen<T: Element>(
    dims: Dims,
    from: &[T],
    (row, col): (usize, usize),
    (rows, cols): (usize, usize),
    to: &mut [T::Acc],
) {
    vectorized(|| {
        for i in 0..rows {
            let to = &mut to[i * cols..(i + 1) * cols];
            let start = (row + i) * dims.row_stride + col * dims.col_stride;
            if dims.col_stride == 1 {
                for (to, from) in to.iter_mut().zip(&from[start..start + cols]) {
                    *to = from.widen();
                }
            } else {
                for (j, to) in to.iter_mut().enumerate() {
                    *to = from[start + j * dims.col_stride].widen();
                }
            }
        }
    });
}
