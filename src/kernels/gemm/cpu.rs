//! GEMM on the CPU: by blocks (`blocked`), and streamed where there are few rows (`few`).

use super::{
    Batch, Gemm, Product,
    blocked::{self, Extents, Job, NC, Real},
    check,
    few::{self, Scale},
};
use crate::{
    device::{Accumulator, AnyMut, AnyRef, Cpu, Device, Element, vectorized},
    error::{Error, Result},
    kernels::{MatMut, MatRef, view::Dims},
};
use std::num::NonZeroUsize;

/// A product with fewer multiplications than this is not worth more than one thread.
const PARALLEL: usize = 1 << 22;

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
    if C::DTYPE == T::Acc::DTYPE {
        let c = T::Acc::of_mut::<Cpu>(C::any_mut::<Cpu>(c));
        return wide(cpu, dims, (alpha, beta), a, b, c.unwrap_or_default());
    }
    // C is narrower than the accumulator: each element is rounded once.
    let Extents { a: ad, b: bd, c: cd } = dims;
    let mut sums = cpu.empty::<T::Acc>(cd.rows * cd.cols.min(NC))?;
    let (alpha, keep) = (T::Acc::from_f64(alpha), T::Acc::from_f64(beta));
    for first in (0..cd.cols).step_by(NC) {
        let cols = NC.min(cd.cols - first);
        let to = Dims { rows: cd.rows, cols, row_stride: cols, col_stride: 1 };
        let dims = Extents { a: ad, b: Dims { cols, ..bd }, c: to };
        wide(cpu, dims, (1.0, 0.0), a, b.get(first * bd.col_stride..).unwrap_or(&[]), &mut sums)?;
        let c = &mut c[first * cd.col_stride..];
        vectorized(|| {
            for (row, sums) in sums.chunks_exact(cols).enumerate().take(cd.rows) {
                for (col, sum) in sums.iter().enumerate() {
                    let to = &mut c[row * cd.row_stride + col * cd.col_stride];
                    let sum = alpha * *sum;
                    *to = C::narrow(if beta == 0.0 { sum } else { keep * to.widen() + sum });
                }
            }
        });
    }
    Ok(())
}

/// C ← α A B + β C in the accumulator.
fn wide<T: Element>(
    cpu: &Cpu,
    dims: Extents,
    scale: (f64, f64),
    a: &[T],
    b: &[T],
    c: &mut [T::Acc],
) -> Result<()> {
    match (T::any_ref::<Cpu>(a), T::any_ref::<Cpu>(b), T::Acc::any_mut::<Cpu>(c)) {
        (AnyRef::F64(a), AnyRef::F64(b), AnyMut::F64(c)) => shared(cpu, dims, scale, a, b, c),
        (AnyRef::F32(a), AnyRef::F32(b), AnyMut::F32(c)) => shared(cpu, dims, scale, a, b, c),
        (AnyRef::BF16(a), AnyRef::BF16(b), AnyMut::F32(c)) => shared(cpu, dims, scale, a, b, c),
        (AnyRef::F16(a), AnyRef::F16(b), AnyMut::F32(c)) => shared(cpu, dims, scale, a, b, c),
        (a, _, c) => {
            let (a, c) = (a.dtype(), c.dtype());
            Err(Error::invalid("gemm", format!("{c} is not the accumulator of {a}: please report this")))
        }
    }
}

/// C ← α A B + β C, the rows of C shared among threads. Each element is summed in the same order on any number of them.
fn shared<T: Element<Acc: Real>>(
    cpu: &Cpu,
    dims: Extents,
    scale: (f64, f64),
    a: &[T],
    b: &[T],
    c: &mut [T::Acc],
) -> Result<()> {
    let Extents { a: ad, b: bd, c: cd } = dims;
    let by_rows = cd.col_stride == 1 && cd.row_stride >= cd.cols;
    let threads =
        if by_rows && cd.rows * cd.cols * ad.cols >= PARALLEL { cpu.threads().min(cd.rows) } else { 1 };
    if threads <= 1 {
        return product(cpu, dims, scale, a, b, c);
    }
    // Whole multiples of 24 rows: the tiles then meet no more ragged edges than on one thread.
    let each = cd.rows.div_ceil(threads).next_multiple_of(24);
    let mut parts = c.chunks_mut(each * cd.row_stride).enumerate().filter_map(|(part, c)| {
        let start = part * each;
        let rows = each.min(cd.rows.checked_sub(start)?);
        let dims = Extents { a: Dims { rows, ..ad }, b: bd, c: Dims { rows, ..cd } };
        (rows > 0).then(|| (dims, a.get(start * ad.row_stride..).unwrap_or(&[]), c))
    });
    std::thread::scope(|scope| {
        let own = parts.next();
        // A handle belongs to one thread, so that each makes its own.
        let others: Vec<_> = parts
            .map(|(dims, a, c)| scope.spawn(move || product(&Cpu::new(), dims, scale, a, b, c)))
            .collect();
        let first = own.map_or(Ok(()), |(dims, a, c)| product(cpu, dims, scale, a, b, c));
        let lost = |_| Error::invalid("gemm", "a thread panicked: please report this");
        others.into_iter().fold(first, |all, one| all.and(one.join().map_err(lost).and_then(|one| one)))
    })
}

/// C ← α A B + β C on this thread.
fn product<T: Element<Acc: Real>>(
    cpu: &Cpu,
    dims: Extents,
    (alpha, beta): (f64, f64),
    a: &[T],
    b: &[T],
    c: &mut [T::Acc],
) -> Result<()> {
    let (alpha, beta) = (T::Acc::from_f64(alpha), T::Acc::from_f64(beta));
    if dims.a.cols == 0 {
        scaled(dims.c, beta, c);
        return Ok(());
    }
    let (len_a, len_b) = dims.room();
    let (mut room_a, mut room_b) = (cpu.empty(len_a)?, cpu.empty(len_b)?);
    blocked::multiply(Job { dims, alpha, a, b, beta, c, room: (&mut room_a, &mut room_b) });
    Ok(())
}

/// C ← β C: a product without depth.
fn scaled<A: Accumulator>(dims: Dims, beta: A, c: &mut [A]) {
    for row in 0..dims.rows {
        for col in 0..dims.cols {
            let c = &mut c[row * dims.row_stride + col * dims.col_stride];
            *c = if beta == A::ZERO { beta } else { beta * *c };
        }
    }
}
