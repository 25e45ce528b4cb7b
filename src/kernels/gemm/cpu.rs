//! GEMM on the CPU: products of few rows by `skinny`, all others by `blocked`.

use super::{
    Batch, Epilogue, Gemm, GemmTerm, Product,
    blocked::{self, BlockEpilogue, Job, NC, Real, Step, Steps},
    check, check_terms, flops,
    skinny::{self, Scale},
    sum_terms,
};
use crate::{
    device::{Accumulator, AnyMut, Cpu, DType, Device, Element, vectorized},
    error::{Error, Result, same_size},
    kernels::{Activation, MatMut, MatRef, Pointwise, pointwise::check_row, view::Dims},
};
use half::{bf16, f16};
use std::{num::NonZeroUsize, ops::Range};

/// A product with fewer multiplications than this runs on one thread.
const PARALLEL: usize = 1 << 22;

impl Gemm for Cpu {
    #[inline(never)]
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
        let (ad, bd, cd) = (a.dims(), b.dims(), c.dims());
        self.count(flops(batch.count, [ad.rows, ad.cols, bd.cols]));
        if cd.extent() == 0 {
            return Ok(());
        }
        let memory = c.into_data();
        for at in 0..batch.count {
            // In a product of depth 0, A and B may have no elements, so the offset may be out of
            // bounds.
            let a = a.data().get(at * batch.a..).unwrap_or(&[]);
            let b = b.data().get(at * batch.b..).unwrap_or(&[]);
            let c = &mut memory[at * batch.c..];
            if skinny::fits(ad, bd) {
                let mut sums = self.empty::<T::Acc>(skinny::workspace(bd, cd))?;
                let scale = Scale { alpha: T::Acc::from_f64(alpha), beta: T::Acc::from_f64(beta) };
                skinny::multiply((ad, a), (bd, b), (cd, c), scale, &mut sums);
                continue;
            }
            blocked(self, &Steps::product((a, ad), (b, bd)), (alpha, beta), (c, cd))?;
        }
        Ok(())
    }

    fn splits_exactly(&self) -> bool {
        true
    }

    /// Each partial sum is a block as large as a block of C, and stays in the L2 cache. If a term
    /// has no products, or has a product that is not blocked, the products and sums are computed
    /// one after another.
    #[inline(never)]
    fn gemm_tree<T: Element>(
        &self,
        terms: &[GemmTerm<'_, T, Self>],
        c: MatMut<'_, T::Acc, Self>,
    ) -> Result<()> {
        check_terms(terms, &c)?;
        let blocked = |(a, b): &(MatRef<'_, T, Self>, MatRef<'_, T, Self>)| {
            a.cols() > 0 && !skinny::fits(a.dims(), b.dims())
        };
        if c.dims().extent() == 0 {
            return Ok(());
        }
        if !terms.iter().all(|term| !term.products.is_empty() && term.products.iter().all(blocked)) {
            return sum_terms(self, terms, c);
        }
        let mut steps = Steps::new();
        for GemmTerm { products, merges } in terms {
            products.iter().for_each(|(a, b)| self.count(flops(1, [a.rows(), a.cols(), b.cols()])));
            steps.push(products.iter().map(|(a, b)| ((a.data(), a.dims()), (b.data(), b.dims()))), *merges);
        }
        let dims = c.dims();
        wide(self, &steps.list(), (1.0, 0.0), (c.into_data(), dims), None)
    }

    #[inline(never)]
    fn linear<T: Element>(
        &self,
        x: MatRef<'_, T, Self>,
        w: MatRef<'_, T, Self>,
        Epilogue { bias, activation }: Epilogue<'_, '_, T, Self>,
        mut y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        const OP: &str = "activation";
        if let Some(bias) = bias {
            check_row("bias", "the bias", bias.len(), y.cols())?;
        }
        let add = |cols: Range<usize>, to: MatMut<'_, T, Self>| {
            bias.map_or(Ok(()), |bias| self.add_bias::<T>(&bias[cols], to))
        };
        let Some((f, pre)) = activation else {
            return match bias {
                Some(_) => with_epilogue(self, (x, w.t()), y, &mut |_, cols, y| add(cols, y)),
                None => self.gemm(1.0, x, w.t(), 0.0, y),
            };
        };
        same_size(OP, "rows of pre", pre.rows(), "rows of y", y.rows())?;
        same_size(OP, "columns of pre", pre.cols(), "columns of y", y.cols())?;
        with_epilogue(self, (x, w.t()), pre, &mut |rows, cols, mut pre| {
            add(cols.clone(), pre.reborrow())?;
            self.activate(f, pre.read(), y.reborrow().block(rows, cols))
        })
    }

    #[inline(never)]
    fn linear_dx<T: Element>(
        &self,
        dy: MatRef<'_, T, Self>,
        w: MatRef<'_, T, Self>,
        through: Option<(Activation, MatRef<'_, T, Self>)>,
        mut dx: MatMut<'_, T, Self>,
    ) -> Result<()> {
        const OP: &str = "activation backward";
        let Some((f, pre)) = through else { return self.gemm(1.0, dy, w, 0.0, dx) };
        same_size(OP, "rows of pre", pre.rows(), "rows of dx", dx.rows())?;
        same_size(OP, "columns of pre", pre.cols(), "columns of dx", dx.cols())?;
        let mut gradient = self.empty::<T>(dx.rows() * dx.cols())?;
        let gradient = MatMut::<T, Self>::new(&mut gradient, dx.rows(), dx.cols())?;
        with_epilogue(self, (dy, w), gradient, &mut |rows, cols, gradient| {
            let (pre, dx) = (pre.block(rows.clone(), cols.clone()), dx.reborrow().block(rows, cols));
            self.activate_backward(f, pre, gradient.read(), dx)
        })
    }

    #[inline(never)]
    fn gemm_all<T: Element, C: Element<Acc = T::Acc>>(
        &self,
        products: Vec<Product<'_, '_, T, C, Self>>,
    ) -> Result<()> {
        let work =
            |product: &Product<'_, '_, T, C, Self>| product.a.rows() * product.a.cols() * product.b.cols();
        let workers = if products.iter().map(work).sum::<usize>() >= PARALLEL {
            self.threads().min(products.len()).max(1)
        } else {
            1
        };
        // A device handle belongs to one thread, so each thread creates its own.
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
                .map(|share| {
                    scope.spawn(move || {
                        let cpu = Cpu::new().with_threads(threads);
                        run(&cpu, share).map(|()| cpu.flops())
                    })
                })
                .collect();
            let first = run(&self.clone().with_threads(threads), own);
            let lost = |_| Error::internal("gemm", "a thread panicked");
            others.into_iter().fold(first, |all, one| {
                let flops = one.join().map_err(lost).and_then(|one| one);
                all.and(flops.map(|flops| self.count(flops.into())))
            })
        })
    }
}

/// C ← A B, then applies `epilogue`. If C has the accumulator type and the product is blocked on
/// one thread, this applies `epilogue` to each block of C while the block is in the cache.
/// Otherwise it applies `epilogue` a single time, to all of C. What `epilogue` computes for a block
/// must not depend on other blocks.
fn with_epilogue<T: Element>(
    cpu: &Cpu,
    (a, b): (MatRef<'_, T, Cpu>, MatRef<'_, T, Cpu>),
    mut c: MatMut<'_, T, Cpu>,
    epilogue: &mut dyn FnMut(Range<usize>, Range<usize>, MatMut<'_, T, Cpu>) -> Result<()>,
) -> Result<()> {
    check(Batch::ONE, &a, &b, &c)?;
    let dims = c.dims();
    let blocks = T::DTYPE == T::Acc::DTYPE && a.cols() > 0 && dims.extent() > 0;
    if !blocks || skinny::fits(a.dims(), b.dims()) {
        cpu.gemm(1.0, a, b, 0.0, c.reborrow())?;
        return epilogue(0..dims.rows, 0..dims.cols, c);
    }
    cpu.count(flops(1, [a.rows(), a.cols(), b.cols()]));
    let steps = Steps::product((a.data(), a.dims()), (b.data(), b.dims()));
    let mut block = |rows: Range<usize>, cols: Range<usize>, memory: AnyMut<'_, Cpu>| {
        let memory = T::of_mut::<Cpu>(memory).unwrap_or_default();
        let (row, col) = (dims.row_stride, dims.col_stride);
        let block = MatMut::<T, Cpu>::strided(memory, rows.len(), cols.len(), row, col)?;
        epilogue(rows, cols, block)
    };
    let memory = T::Acc::of_mut::<Cpu>(T::any_mut::<Cpu>(c.into_data())).unwrap_or_default();
    wide(cpu, &steps, (1.0, 0.0), (memory, dims), Some(&mut block))
}

/// C ← α A B + β C by blocks, for any number of rows. Attention uses this function for its tiles of
/// queries, because the results do not depend on the number of rows in a tile. Does not count
/// operations, because attention counts only those of visible pairs.
pub(in crate::kernels) fn by_blocks<A: Accumulator>(
    cpu: &Cpu,
    alpha: f64,
    a: MatRef<'_, A, Cpu>,
    b: MatRef<'_, A, Cpu>,
    beta: f64,
    c: MatMut<'_, A, Cpu>,
) -> Result<()> {
    check(Batch::ONE, &a, &b, &c)?;
    let dims = c.dims();
    if dims.extent() == 0 {
        return Ok(());
    }
    let steps = Steps::product((a.data(), a.dims()), (b.data(), b.dims()));
    blocked(cpu, &steps, (alpha, beta), (c.into_data(), dims))
}

fn blocked<T: Element, C: Element<Acc = T::Acc>>(
    cpu: &Cpu,
    steps: &[Step<'_, T>],
    (alpha, beta): (f64, f64),
    (c, cd): (&mut [C], Dims),
) -> Result<()> {
    if C::DTYPE == T::Acc::DTYPE {
        let c = T::Acc::of_mut::<Cpu>(C::any_mut::<Cpu>(c));
        return wide(cpu, steps, (alpha, beta), (c.unwrap_or_default(), cd), None);
    }
    // The element type of C is narrower than the accumulator type. So this sums in the accumulator
    // type and rounds each element at the end.
    let mut sums = cpu.empty::<T::Acc>(cd.rows * cd.cols.min(NC))?;
    let (alpha, keep) = (T::Acc::from_f64(alpha), T::Acc::from_f64(beta));
    for first in (0..cd.cols).step_by(NC) {
        let cols = NC.min(cd.cols - first);
        let to = Dims { rows: cd.rows, cols, row_stride: cols, col_stride: 1 };
        let steps: Vec<_> = steps.iter().map(|step| step.offset(0, first)).collect();
        wide(cpu, &steps, (1.0, 0.0), (&mut sums, to), None)?;
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

/// C ← α A B + β C for a C of the accumulator type. Then applies the epilogue.
fn wide<T: Element>(
    cpu: &Cpu,
    steps: &[Step<'_, T>],
    scale: (f64, f64),
    (c, cd): (&mut [T::Acc], Dims),
    epilogue: Option<&mut BlockEpilogue<'_>>,
) -> Result<()> {
    /// Casts steps from `T` to `U`, which the caller knows to be the same element type.
    fn of<'a, T: Element, U: Element>(steps: &[Step<'a, T>]) -> Vec<Step<'a, U>> {
        let same = |memory: &'a [T]| U::of_ref::<Cpu>(T::any_ref::<Cpu>(memory)).expect("the same element");
        steps.iter().map(|step| step.map(same)).collect()
    }
    match (T::DTYPE, T::Acc::any_mut::<Cpu>(c)) {
        (DType::F64, AnyMut::F64(c)) => shared::<f64>(cpu, &of(steps), scale, (c, cd), epilogue),
        (DType::F32, AnyMut::F32(c)) => shared::<f32>(cpu, &of(steps), scale, (c, cd), epilogue),
        (DType::BF16, AnyMut::F32(c)) => shared::<bf16>(cpu, &of(steps), scale, (c, cd), epilogue),
        (DType::F16, AnyMut::F32(c)) => shared::<f16>(cpu, &of(steps), scale, (c, cd), epilogue),
        (a, c) => {
            let c = c.dtype();
            Err(Error::internal("gemm", format!("{c} is not the accumulator of {a}")))
        }
    }
}

/// C ← α A B + β C, with the rows of C divided among threads. The order of summation does not
/// depend on the number of threads.
fn shared<T: Element<Acc: Real>>(
    cpu: &Cpu,
    steps: &[Step<'_, T>],
    scale: (f64, f64),
    (c, cd): (&mut [T::Acc], Dims),
    epilogue: Option<&mut BlockEpilogue<'_>>,
) -> Result<()> {
    let by_rows = cd.col_stride == 1 && cd.row_stride >= cd.cols;
    let work = cd.rows * cd.cols * steps.iter().map(Step::depth).sum::<usize>();
    let threads = if by_rows && work >= PARALLEL { cpu.threads().min(cd.rows) } else { 1 };
    if threads <= 1 {
        return product(cpu, steps, scale, (c, cd), epilogue);
    }
    // Each thread gets a multiple of 24 rows, because MR is 4, 6 or 8. So several threads have no
    // more incomplete tiles than one thread.
    let each = cd.rows.div_ceil(threads).next_multiple_of(24);
    let mut parts = c.chunks_mut(each * cd.row_stride).enumerate().filter_map(|(part, c)| {
        let start = part * each;
        let rows = each.min(cd.rows.checked_sub(start)?);
        let steps = || steps.iter().map(|step| step.offset(start, 0)).collect::<Vec<_>>();
        (rows > 0).then(|| (steps(), (c, Dims { rows, ..cd })))
    });
    std::thread::scope(|scope| {
        let own = parts.next();
        // A device handle belongs to one thread, so each thread creates its own.
        let others: Vec<_> = parts
            .map(|(steps, c)| scope.spawn(move || product(&Cpu::new(), &steps, scale, c, None)))
            .collect();
        let first = own.map_or(Ok(()), |(steps, c)| product(cpu, &steps, scale, c, None));
        let lost = |_| Error::internal("gemm", "a thread panicked");
        others.into_iter().fold(first, |all, one| all.and(one.join().map_err(lost).and_then(|one| one)))
    })?;
    // The epilogue is not `Send`, so it runs on this thread when all rows are computed.
    epilogue.map_or(Ok(()), |epilogue| epilogue(0..cd.rows, 0..cd.cols, T::Acc::any_mut::<Cpu>(c)))
}

/// C ← α A B + β C on the current thread.
fn product<T: Element<Acc: Real>>(
    cpu: &Cpu,
    steps: &[Step<'_, T>],
    (alpha, beta): (f64, f64),
    (c, cd): (&mut [T::Acc], Dims),
    epilogue: Option<&mut BlockEpilogue<'_>>,
) -> Result<()> {
    let (alpha, beta) = (T::Acc::from_f64(alpha), T::Acc::from_f64(beta));
    if steps.is_empty() {
        scaled(cd, beta, c);
        return Ok(());
    }
    let [a, b, partials] = blocked::workspace(steps, cd);
    let (mut a, mut b, mut partials) = (cpu.empty(a)?, cpu.empty(b)?, cpu.empty(partials)?);
    let workspace: [&mut [_]; 3] = [&mut a, &mut b, &mut partials];
    blocked::multiply(Job { steps, alpha, beta, c: (c, cd), epilogue, workspace })
}

/// C ← β C: a product of depth 0.
fn scaled<A: Accumulator>(dims: Dims, beta: A, c: &mut [A]) {
    for row in 0..dims.rows {
        for col in 0..dims.cols {
            let c = &mut c[row * dims.row_stride + col * dims.col_stride];
            *c = if beta == A::ZERO { beta } else { beta * *c };
        }
    }
}
