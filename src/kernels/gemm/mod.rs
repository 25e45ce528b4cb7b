//! General matrix multiplication.

mod blocked;
pub(super) mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
pub(super) mod few;
mod meta;

use super::{Activation, MatMut, MatRef, Pointwise, view::Dims};
use crate::{
    device::{Device, Element},
    error::{Error, Result, same_size},
};

/// How many products to compute, and how far apart their operands are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The number of products.
    pub count: usize,
    /// Elements from one A to the next; 0 uses the same A for all.
    pub a: usize,
    /// Elements from one B to the next; 0 uses the same B for all.
    pub b: usize,
    /// Elements from one C to the next.
    pub c: usize,
}

impl Batch {
    /// A single product.
    pub const ONE: Self = Self { count: 1, a: 0, b: 0, c: 0 };
}

/// One of several products C ← A B + β C that do not depend on one another.
pub struct Product<'a, 'c, T: Element, C: Element, B: Device> {
    /// A.
    pub a: MatRef<'a, T, B>,
    /// B.
    pub b: MatRef<'a, T, B>,
    /// β.
    pub beta: f64,
    /// C.
    pub c: MatMut<'c, C, B>,
}

/// A term of a sum of products along a tree ([`Gemm::gemm_tree`]).
pub struct GemmTerm<'a, T: Element, B: Device> {
    /// The products A B of which the term is the sum, from left to right.
    pub products: Vec<(MatRef<'a, T, B>, MatRef<'a, T, B>)>,
    /// How many sums before it are complete with this term.
    pub merges: usize,
}

/// What follows the product of a linear operator.
pub struct Epilogue<'b, 'p, T: Element, B: Device> {
    /// Added to each row of the product.
    pub bias: Option<B::Slice<'b, T>>,
    /// A function of the sum, and where the sum is stored, which the backward needs.
    pub activation: Option<(Activation, MatMut<'p, T, B>)>,
}

/// C ← α A B + β C, and the products of linear operators.
pub trait Gemm: Device {
    /// C ← α A B + β C for one product: [`Gemm::gemm_batched`] with [`Batch::ONE`].
    ///
    /// # Errors
    /// As there.
    fn gemm<T: Element, C: Element<Acc = T::Acc>>(
        &self,
        alpha: f64,
        a: MatRef<'_, T, Self>,
        b: MatRef<'_, T, Self>,
        beta: f64,
        c: MatMut<'_, C, Self>,
    ) -> Result<()> {
        self.gemm_batched(Batch::ONE, alpha, a, b, beta, c)
    }

    /// Cᵢ ← α Aᵢ Bᵢ + β Cᵢ for i = 0 .. `batch.count`.
    ///
    /// * `a`: `[m, k]`, `b`: `[k, n]`, `c`: `[m, n]`, the first of each batch, with any strides: a transposed operand is
    ///   a view with its strides exchanged.
    /// * Products are summed in the accumulator of `T`. `C` is `T`, or its accumulator (gradients of bf16 weights are
    ///   summed in f32).
    /// * The results of a batch must not share elements.
    /// * With β = 0, C is only written: what it held, NaN included, does not matter.
    ///
    /// # Errors
    /// When dimensions disagree, or a batch reaches beyond an operand's memory.
    fn gemm_batched<T: Element, C: Element<Acc = T::Acc>>(
        &self,
        batch: Batch,
        alpha: f64,
        a: MatRef<'_, T, Self>,
        b: MatRef<'_, T, Self>,
        beta: f64,
        c: MatMut<'_, C, Self>,
    ) -> Result<()>;

    /// y ← x wᵀ, and then the epilogue: the forward of a linear operator. Where the device can, the
    /// epilogue is computed before y is rounded.
    ///
    /// `x`: `[tokens, in]`, `w`: `[out, in]`, `y`: `[tokens, out]`.
    ///
    /// # Errors
    /// As [`Gemm::gemm`], and when the bias or pre does not fit y.
    fn linear<T: Element>(
        &self,
        x: MatRef<'_, T, Self>,
        w: MatRef<'_, T, Self>,
        epilogue: Epilogue<'_, '_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()>
    where
        Self: Pointwise;

    /// dx ← dy w. With `through` = (f, pre), where x = f(pre): the gradient of pre, (dy w) f′(pre).
    ///
    /// # Errors
    /// As [`Gemm::gemm`], and when pre has not the dimensions of dx.
    fn linear_dx<T: Element>(
        &self,
        dy: MatRef<'_, T, Self>,
        w: MatRef<'_, T, Self>,
        through: Option<(Activation, MatRef<'_, T, Self>)>,
        dx: MatMut<'_, T, Self>,
    ) -> Result<()>
    where
        Self: Pointwise;

    /// dw ← dyᵀ x + β dw, and db ← the sums of dy's columns, in the accumulator. Where the device
    /// can, dy is read once.
    ///
    /// # Errors
    /// As [`Gemm::gemm`], and when db has not an element a column of dy.
    fn linear_dw<T: Element>(
        &self,
        dy: MatRef<'_, T, Self>,
        x: MatRef<'_, T, Self>,
        beta: f64,
        dw: MatMut<'_, T::Acc, Self>,
        db: Option<Self::SliceMut<'_, T::Acc>>,
    ) -> Result<()>
    where
        Self: Pointwise,
    {
        self.gemm(1.0, dy.t(), x, beta, dw)?;
        db.map_or(Ok(()), |db| self.sum_rows::<T>(dy, db))
    }

    /// [`Gemm::gemm`], with α = 1, of a block of a product: the bits follow from the elements, the
    /// dimensions and which operands are transposed, not from where the operands lie or how far
    /// apart their rows are.
    ///
    /// # Errors
    /// As there.
    fn gemm_block<T: Element, C: Element<Acc = T::Acc>>(
        &self,
        a: MatRef<'_, T, Self>,
        b: MatRef<'_, T, Self>,
        beta: f64,
        c: MatMut<'_, C, Self>,
    ) -> Result<()> {
        self.gemm(1.0, a, b, beta, c)
    }

    /// Whether every element of a product of depth 2 or more has the bits that it has in a product of any other rows of A
    /// and columns of B with its own, wherever the operands lie. Then a product by blocks of rows or columns is the product.
    fn splits_exactly(&self) -> bool {
        false
    }

    /// C ← the sum of some terms along a tree, in the accumulator.
    ///
    /// Sums wait on a stack. A term comes on top of it; then, `merges` times, the two on top are replaced by their sum, the lower
    /// one first. So ((t₀ + t₁) + t₂) has terms with 0, 1 and 1 merges. One sum is left.
    ///
    /// A term without products, or whose products have no depth, is 0. The bits are those of
    /// [`Gemm::gemm_block`] for every product and an addition for every merge.
    ///
    /// # Errors
    /// As [`Gemm::gemm`], and when not one sum is left.
    fn gemm_tree<T: Element>(
        &self,
        terms: &[GemmTerm<'_, T, Self>],
        c: MatMut<'_, T::Acc, Self>,
    ) -> Result<()>
    where
        Self: Pointwise,
    {
        check_terms(terms, &c)?;
        sum_terms(self, terms, c)
    }

    /// Several products, at the same time where the device can: the CPU shares its threads among them. The bits are those
    /// of one after the other.
    ///
    /// # Errors
    /// As [`Gemm::gemm`].
    fn gemm_all<T: Element, C: Element<Acc = T::Acc>>(
        &self,
        products: Vec<Product<'_, '_, T, C, Self>>,
    ) -> Result<()> {
        products.into_iter().try_for_each(|Product { a, b, beta, c }| self.gemm(1.0, a, b, beta, c))
    }
}

/// The operands of a product agree, and each batch lies inside its memory.
fn check<B: Device, T: Element, C: Element>(
    batch: Batch,
    a: &MatRef<'_, T, B>,
    b: &MatRef<'_, T, B>,
    c: &MatMut<'_, C, B>,
) -> Result<()> {
    const OP: &str = "gemm";
    same_size(OP, "columns of A", a.cols(), "rows of B", b.rows())?;
    same_size(OP, "rows of A", a.rows(), "rows of C", c.rows())?;
    same_size(OP, "columns of B", b.cols(), "columns of C", c.cols())?;
    let inside = |name: &str, dims: Dims, stride: usize, len: usize| {
        let extent = batch.count.saturating_sub(1).saturating_mul(stride).saturating_add(dims.extent());
        if dims.extent() > 0 && extent > len {
            let left = format!("the extent of {} matrices {name}", batch.count);
            return Err(Error::sizes(OP, left, extent, "the memory behind them", len));
        }
        Ok(())
    };
    inside("A", a.dims(), batch.a, B::len(a.data()))?;
    inside("B", b.dims(), batch.b, B::len(b.data()))?;
    inside("C", c.dims(), batch.c, c.memory())
}

/// The terms leave one sum, of C's dimensions.
fn check_terms<T: Element, B: Device>(terms: &[GemmTerm<'_, T, B>], c: &MatMut<'_, T::Acc, B>) -> Result<()> {
    const OP: &str = "gemm tree";
    let mut waiting = 0_usize;
    for GemmTerm { products, merges } in terms {
        products.iter().try_for_each(|(a, b)| check(Batch::ONE, a, b, c))?;
        waiting = (waiting + 1).checked_sub(*merges).filter(|&waiting| waiting > 0).ok_or_else(|| {
            Error::sizes(OP, "the sums that a term completes", *merges, "those before it", waiting)
        })?;
    }
    same_size(OP, "the sums that are left", waiting, "the results", 1)
}

/// [`Gemm::gemm_tree`], a product and an addition at a time.
fn sum_terms<T: Element, B: Gemm + Pointwise>(
    device: &B,
    terms: &[GemmTerm<'_, T, B>],
    mut c: MatMut<'_, T::Acc, B>,
) -> Result<()> {
    let (rows, cols) = (c.rows(), c.cols());
    let write = |products: &[(MatRef<'_, T, B>, MatRef<'_, T, B>)], mut to: MatMut<'_, T::Acc, B>| {
        let mut beta = 0.0;
        for (a, b) in products.iter().filter(|(a, _)| a.cols() > 0) {
            device.gemm_block(*a, *b, beta, to.reborrow())?;
            beta = 1.0;
        }
        if beta == 0.0 { device.fill(0.0, to) } else { Ok(()) }
    };
    // C is the lowest of them.
    let mut waiting: Vec<B::Buffer<T::Acc>> = Vec::new();
    for (at, GemmTerm { products, merges }) in terms.iter().enumerate() {
        if at == 0 {
            write(products, c.reborrow())?;
        } else {
            let mut sum = device.empty::<T::Acc>(rows * cols)?;
            write(products, MatMut::<T::Acc, B>::new(B::slice_mut(&mut sum), rows, cols)?)?;
            waiting.push(sum);
        }
        for _ in 0..*merges {
            let Some(top) = waiting.pop() else { break };
            let below = match waiting.last_mut() {
                None => c.reborrow(),
                Some(below) => MatMut::<T::Acc, B>::new(B::slice_mut(below), rows, cols)?,
            };
            device.accumulate(MatRef::<T::Acc, B>::new(B::slice(&top), rows, cols)?, below)?;
        }
    }
    Ok(())
}
