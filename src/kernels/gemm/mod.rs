//! General matrix multiplication.

mod blocked;
pub(super) mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod meta;
pub(super) mod skinny;

pub(super) use blocked::prefetch;

use super::{Activation, MatMut, MatRef, Pointwise, view::Dims};
use crate::{
    device::{Device, Element},
    error::{Error, Result, same_size},
};

/// The number of products in a batch and the strides between their operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    /// The number of products.
    pub count: usize,
    /// The number of elements from one A to the next. 0 uses the same A for all products.
    pub a: usize,
    /// The number of elements from one B to the next. 0 uses the same B for all products.
    pub b: usize,
    /// The number of elements from one C to the next.
    pub c: usize,
}

impl Batch {
    /// A single product.
    pub const ONE: Self = Self { count: 1, a: 0, b: 0, c: 0 };
}

/// One of several independent products C ← A B + β C.
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

/// A term of a sum of products along a reduction tree ([`Gemm::gemm_tree`]).
pub struct GemmTerm<'a, T: Element, B: Device> {
    /// The products A B that make up the term, added from left to right.
    pub products: Vec<(MatRef<'a, T, B>, MatRef<'a, T, B>)>,
    /// How often the two topmost sums are added after this term: see [`Gemm::gemm_tree`].
    pub merges: usize,
}

/// Operations fused into the product of a linear operator: pre = x wᵀ + bias, y = f(pre).
///
/// ```
/// use shardwise::{kernels::{Epilogue, Gemm}, prelude::*};
///
/// let cpu = Cpu::new();
/// let x = Tensor::<f32>::from_slice(&cpu, [1, 2], &[1.0, -3.0])?;
/// let w = Tensor::from_slice(&cpu, [2, 2], &[2.0, 1.0, 0.0, 1.0])?;
/// let (mut pre, mut y) = (Tensor::zeros(&cpu, [1, 2])?, Tensor::zeros(&cpu, [1, 2])?);
/// let activation = Some((Activation::Relu, pre.mat_mut()?));
/// cpu.linear(x.mat(), w.mat(), Epilogue { bias: Some(&[0.5, 7.0]), activation }, y.mat_mut()?)?;
/// assert_eq!((pre.to_vec()?, y.to_vec()?), (vec![-0.5, 4.0], vec![0.0, 4.0]));
/// # Ok::<(), Error>(())
/// ```
pub struct Epilogue<'b, 'p, T: Element, B: Device> {
    /// bias, added to each row of the product: `[out]`.
    pub bias: Option<B::Slice<'b, T>>,
    /// f, and the matrix in which to store pre for the backward.
    pub activation: Option<(Activation, MatMut<'p, T, B>)>,
}

/// GEMM, C ← α A B + β C, and the products of linear operators.
pub trait Gemm: Device {
    /// C ← α A B + β C for one product: [`Gemm::gemm_batched`] with [`Batch::ONE`].
    ///
    /// # Errors
    /// As [`Gemm::gemm_batched`].
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
    /// * `a`: `[m, k]`, `b`: `[k, n]`, `c`: `[m, n]`: the first matrices of the batch, with any
    ///   strides. A transposed operand is a view with exchanged strides.
    /// * Sums are kept in the accumulator type of `T`. `C` is `T` or another element type with the
    ///   same accumulator type. For example, gradients of bf16 weights are summed in f32.
    /// * The results of a batch must not share elements.
    /// * If β = 0, C is not read, so its previous values, NaN included, have no effect.
    ///
    /// # Errors
    /// When dimensions disagree, or a batch exceeds the memory of an operand.
    fn gemm_batched<T: Element, C: Element<Acc = T::Acc>>(
        &self,
        batch: Batch,
        alpha: f64,
        a: MatRef<'_, T, Self>,
        b: MatRef<'_, T, Self>,
        beta: f64,
        c: MatMut<'_, C, Self>,
    ) -> Result<()>;

    /// y ← epilogue(x wᵀ): the forward of a linear operator. Devices that can apply the epilogue
    /// before they round y do so.
    ///
    /// `x`: `[tokens, in]`, `w`: `[out, in]`, `y`: `[tokens, out]`.
    ///
    /// # Errors
    /// As [`Gemm::gemm`]. Also when the bias does not have one element per column of y, or the
    /// dimensions of pre and y differ.
    fn linear<T: Element>(
        &self,
        x: MatRef<'_, T, Self>,
        w: MatRef<'_, T, Self>,
        epilogue: Epilogue<'_, '_, T, Self>,
        y: MatMut<'_, T, Self>,
    ) -> Result<()>
    where
        Self: Pointwise;

    /// dx ← dy w. With `through` = (f, pre), where x = f(pre): dx ← (dy w) f′(pre), the gradient of
    /// pre.
    ///
    /// # Errors
    /// As [`Gemm::gemm`], and when the dimensions of pre and dx differ.
    fn linear_dx<T: Element>(
        &self,
        dy: MatRef<'_, T, Self>,
        w: MatRef<'_, T, Self>,
        through: Option<(Activation, MatRef<'_, T, Self>)>,
        dx: MatMut<'_, T, Self>,
    ) -> Result<()>
    where
        Self: Pointwise;

    /// dw ← dyᵀ x + β dw and db ← the column sums of dy, both of the accumulator type. A device
    /// that can compute both in one pass over dy does so.
    ///
    /// # Errors
    /// As [`Gemm::gemm`], and when db does not have one element per column of dy.
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

    /// [`Gemm::gemm`] with α = 1 for a block of a product. The bits depend on the elements, on the
    /// dimensions and on which operands are transposed, but not on the addresses or the row
    /// strides.
    ///
    /// # Errors
    /// As [`Gemm::gemm`].
    fn gemm_block<T: Element, C: Element<Acc = T::Acc>>(
        &self,
        a: MatRef<'_, T, Self>,
        b: MatRef<'_, T, Self>,
        beta: f64,
        c: MatMut<'_, C, Self>,
    ) -> Result<()> {
        self.gemm(1.0, a, b, beta, c)
    }

    /// Whether a product of depth 2 or more can be split by rows of A or columns of B without a
    /// change to the bits of any element, wherever the operands lie in memory. The CPU sums
    /// products with at most 8 rows of a row-major A in another order than products with more rows,
    /// so there a split must not cross that limit.
    fn splits_exactly(&self) -> bool {
        false
    }

    /// C ← a sum of terms along a reduction tree, in the accumulator type.
    ///
    /// The partial sums form a stack. Each term is pushed onto the stack. Then, `merges` times, the
    /// two topmost sums are replaced by their sum, where the lower sum is the left operand. For
    /// example, ((t₀ + t₁) + t₂) has terms with 0, 1 and 1 merges. One sum must remain at the end.
    ///
    /// A term without products, or whose products have depth 0, is 0. The bits are those of
    /// [`Gemm::gemm_block`] for every product and one addition per merge.
    ///
    /// # Errors
    /// As [`Gemm::gemm`], and when the number of remaining sums is not one.
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

    /// Computes several products, concurrently if the device can. The CPU divides its threads among
    /// the products. The bits are those of computing the products one after another.
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

/// The floating-point operations of `count` products of `[m, k]` times `[k, n]`: 2 m n k each.
fn flops(count: usize, [m, k, n]: [usize; 3]) -> u128 {
    [count, m, k, n].iter().fold(2, |all: u128, factor| all.saturating_mul(*factor as u128))
}

/// Checks that the operands agree and that each batch fits its memory.
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

/// Checks that one sum remains after the terms, and that the terms have C's dimensions.
fn check_terms<T: Element, B: Device>(terms: &[GemmTerm<'_, T, B>], c: &MatMut<'_, T::Acc, B>) -> Result<()> {
    const OP: &str = "gemm tree";
    let mut height = 0_usize;
    for GemmTerm { products, merges } in terms {
        products.iter().try_for_each(|(a, b)| check(Batch::ONE, a, b, c))?;
        height = (height + 1).checked_sub(*merges).filter(|&height| height > 0).ok_or_else(|| {
            Error::sizes(OP, "the merges of a term", *merges, "the number of sums before it", height)
        })?;
    }
    same_size(OP, "the number of sums that remain", height, "the number of results", 1)
}

/// [`Gemm::gemm_tree`] by separate products and additions.
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
    // C holds the bottom sum of the stack. `stack` holds the other sums.
    let mut stack: Vec<B::Buffer<T::Acc>> = Vec::new();
    for (at, GemmTerm { products, merges }) in terms.iter().enumerate() {
        if at == 0 {
            write(products, c.reborrow())?;
        } else {
            let mut sum = device.empty::<T::Acc>(rows * cols)?;
            write(products, MatMut::<T::Acc, B>::new(B::slice_mut(&mut sum), rows, cols)?)?;
            stack.push(sum);
        }
        for _ in 0..*merges {
            let Some(top) = stack.pop() else { break };
            let below = match stack.last_mut() {
                None => c.reborrow(),
                Some(below) => MatMut::<T::Acc, B>::new(B::slice_mut(below), rows, cols)?,
            };
            device.accumulate(MatRef::<T::Acc, B>::new(B::slice(&top), rows, cols)?, below)?;
        }
    }
    Ok(())
}
