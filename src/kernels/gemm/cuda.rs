//! Matrix products on NVIDIA GPUs, by cuBLASLt.
//!
//! cuBLASLt's matrices are column-major. A row-major C is computed as the column-major Cᵀ = Bᵀ Aᵀ.
//! An operand with unit stride in one dimension is passed as it is or transposed. An operand
//! without unit stride is copied first.

use super::{Batch, Epilogue, Gemm, check};
use crate::{
    device::{
        DType, Device, Element,
        cuda::{self, Cuda, CudaBuffer, CudaSlice, CudaSliceMut, Layout, Matmul, Operands},
    },
    error::{Result, same_size},
    kernels::{
        Activation, MatMut, MatRef, Pointwise,
        view::{Dims, same_dims},
    },
};

/// A matrix as cuBLASLt accepts it: column-major, optionally transposed.
#[derive(Clone, Copy)]
struct ColumnMajor {
    transposed: bool,
    rows: usize,
    cols: usize,
    leading: usize,
}

/// Returns the column-major form of a matrix, or `None` if the matrix must be copied first. A
/// single row becomes one transposed column, because a row would have columns of one element, which
/// prevents wide loads.
fn column_major(dims: Dims) -> Option<ColumnMajor> {
    let Dims { rows, cols, row_stride, col_stride } = dims;
    let form = |transposed, rows: usize, cols: usize, inner, outer| {
        let fits = (rows <= 1 || inner == 1) && (cols <= 1 || outer >= rows);
        let leading = if cols <= 1 { rows.max(1) } else { outer };
        fits.then_some(ColumnMajor { transposed, rows, cols, leading })
    };
    let as_it_is = form(false, rows, cols, row_stride, col_stride);
    let transposed = form(true, cols, rows, col_stride, row_stride);
    if rows == 1 && cols > 1 { transposed.or(as_it_is) } else { as_it_is.or(transposed) }
}

impl Gemm for Cuda {
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
        let (m, n, k) = (a.rows(), b.cols(), a.cols());
        if m == 0 || n == 0 || batch.count == 0 {
            return Ok(());
        }
        let direct = |dims| column_major(dims).is_some();
        let stored = direct(c.dims()) && [T::DTYPE, <T::Acc as Element>::DTYPE].contains(&C::DTYPE);
        if batch.count > 1 && !(stored && direct(a.dims()) && direct(b.dims()) && k > 0) {
            return self.gemm_each(batch, alpha, a, b, beta, c);
        }
        if k == 0 {
            // cuBLASLt rejects products of depth 0, so this multiplies zeros of depth 1.
            let mut zeros = self.empty::<T>(m.max(n))?;
            self.fill::<T>(0.0, MatMut::new(Self::slice_mut(&mut zeros), 1, m.max(n))?)?;
            let (a, b) = (MatRef::new(Self::slice(&zeros), m, 1)?, MatRef::new(Self::slice(&zeros), 1, n)?);
            return self.gemm(alpha, a, b, beta, c);
        }
        if !stored {
            return self.gemm_via_accumulator(alpha, a, b, beta, c);
        }
        if !direct(a.dims()) {
            let copy = self.dense(a)?;
            return self.gemm(alpha, MatRef::new(Self::slice(&copy), m, k)?, b, beta, c);
        }
        if !direct(b.dims()) {
            let copy = self.dense(b)?;
            return self.gemm(alpha, a, MatRef::new(Self::slice(&copy), k, n)?, beta, c);
        }
        self.multiply(batch, (alpha, beta), a, b, c, FusedEpilogue::Nothing).map(drop)
    }

    /// cuBLASLt selects an algorithm by the alignment and the leading dimensions of the operands,
    /// and the algorithm determines the bits. So operands whose layout is not `canonical` are
    /// copied to that layout first, and the result is copied back.
    fn gemm_block<T: Element, C: Element<Acc = T::Acc>>(
        &self,
        a: MatRef<'_, T, Self>,
        b: MatRef<'_, T, Self>,
        beta: f64,
        c: MatMut<'_, C, Self>,
    ) -> Result<()> {
        check(Batch::ONE, &a, &b, &c)?;
        if let Some(copy) = self.canonical_copy(a)? {
            return self.gemm_block(copy.view()?, b, beta, c);
        }
        if let Some(copy) = self.canonical_copy(b)? {
            return self.gemm_block(a, copy.view()?, beta, c);
        }
        if is_canonical(&c.read()) {
            return self.gemm(1.0, a, b, beta, c);
        }
        let mut result = Canonical::empty(self, c.dims())?;
        if beta != 0.0 {
            self.copy_block(c.read(), result.view_mut()?)?;
        }
        self.gemm(1.0, a, b, beta, result.view_mut()?)?;
        self.copy_block(result.view()?, c)
    }

    fn linear<T: Element>(
        &self,
        x: MatRef<'_, T, Self>,
        w: MatRef<'_, T, Self>,
        Epilogue { bias, activation }: Epilogue<'_, '_, T, Self>,
        mut y: MatMut<'_, T, Self>,
    ) -> Result<()> {
        check(Batch::ONE, &x, &w.t(), &y)?;
        if let Some(bias) = bias {
            same_size("linear", "the bias", Self::len(bias), "columns of y", y.cols())?;
        }
        let fuses = fuses::<T>(&[x.dims(), w.dims()], y.dims());
        let Some((f, mut pre)) = activation else {
            if let Some(bias) = bias.filter(|_| fuses)
                && self.multiply(Batch::ONE, PLAIN, x, w.t(), y.reborrow(), FusedEpilogue::Bias(bias))?
            {
                return Ok(());
            }
            self.gemm(1.0, x, w.t(), 0.0, y.reborrow())?;
            return bias.map_or(Ok(()), |bias| self.add_bias(bias, y));
        };
        same_dims("linear", "pre", pre.dims(), "y", y.dims())?;
        if let Some(bias) = bias.filter(|_| fuses && gelu_fuses(f, &pre.read())) {
            let fused = FusedEpilogue::BiasGelu(bias, pre.reborrow());
            if self.multiply(Batch::ONE, PLAIN, x, w.t(), y.reborrow(), fused)? {
                return Ok(());
            }
        }
        self.linear(x, w, Epilogue { bias, activation: None }, pre.reborrow())?;
        self.activate(f, pre.read(), y)
    }

    fn linear_dx<T: Element>(
        &self,
        dy: MatRef<'_, T, Self>,
        w: MatRef<'_, T, Self>,
        through: Option<(Activation, MatRef<'_, T, Self>)>,
        mut dx: MatMut<'_, T, Self>,
    ) -> Result<()> {
        let Some((f, pre)) = through else { return self.gemm(1.0, dy, w, 0.0, dx) };
        check(Batch::ONE, &dy, &w, &dx)?;
        same_dims("linear backward", "pre", pre.dims(), "dx", dx.dims())?;
        if gelu_fuses(f, &pre)
            && fuses::<T>(&[dy.dims(), w.dims()], dx.dims())
            && self.multiply(Batch::ONE, PLAIN, dy, w, dx.reborrow(), FusedEpilogue::GeluSlope(pre))?
        {
            return Ok(());
        }
        let (rows, cols) = (dx.rows(), dx.cols());
        let mut product = self.empty::<T>(rows * cols)?;
        self.gemm(1.0, dy, w, 0.0, MatMut::<T, Self>::new(Self::slice_mut(&mut product), rows, cols)?)?;
        self.activate_backward(f, pre, MatRef::new(Self::slice(&product), rows, cols)?, dx)
    }

    fn linear_dw<T: Element>(
        &self,
        dy: MatRef<'_, T, Self>,
        x: MatRef<'_, T, Self>,
        beta: f64,
        mut dw: MatMut<'_, T::Acc, Self>,
        db: Option<CudaSliceMut<'_, T::Acc>>,
    ) -> Result<()> {
        let Some(mut db) = db else { return self.gemm(1.0, dy.t(), x, beta, dw) };
        check(Batch::ONE, &dy.t(), &x, &dw)?;
        same_size("linear backward", "the elements of db", Self::len_mut(&db), "columns of dy", dy.cols())?;
        let fused = FusedEpilogue::ColumnSums(Self::reborrow(&mut db));
        if fuses::<T>(&[dy.dims(), x.dims()], dw.dims())
            && self.multiply(Batch::ONE, (1.0, beta), dy.t(), x, dw.reborrow(), fused)?
        {
            return Ok(());
        }
        self.gemm(1.0, dy.t(), x, beta, dw)?;
        self.sum_rows(dy, db)
    }
}

/// The canonical layout of a matrix: contiguous columns if `dims` has them, else contiguous rows.
/// Each column or row begins at a multiple of 16 bytes. A single row or column is always
/// contiguous.
fn canonical<T: Element>(dims: Dims) -> Dims {
    let Dims { rows, cols, .. } = dims;
    let whole = |len: usize| len.next_multiple_of(16 / size_of::<T>());
    let by_columns = cols == 1 || (rows > 1 && dims.row_stride == 1);
    let (row_stride, col_stride) = if by_columns { (1, whole(rows)) } else { (whole(cols), 1) };
    Dims { rows, cols, row_stride, col_stride }
}

/// Whether a matrix has the layout [`canonical`] and is aligned to 256 bytes, as an allocation is.
fn is_canonical<T: Element>(matrix: &MatRef<'_, T, Cuda>) -> bool {
    matrix.dims() == canonical::<T>(matrix.dims()) && matrix.data().address().is_multiple_of(256)
}

/// A matrix in its own memory with the layout [`canonical`].
struct Canonical<T: Element> {
    memory: CudaBuffer<T>,
    dims: Dims,
}

impl<T: Element> Canonical<T> {
    fn empty(cuda: &Cuda, dims: Dims) -> Result<Self> {
        let dims = canonical::<T>(dims);
        Ok(Self { memory: cuda.empty(dims.extent())?, dims })
    }

    fn view(&self) -> Result<MatRef<'_, T, Cuda>> {
        let Dims { rows, cols, row_stride, col_stride } = self.dims;
        MatRef::strided(Cuda::slice(&self.memory), rows, cols, row_stride, col_stride)
    }

    fn view_mut(&mut self) -> Result<MatMut<'_, T, Cuda>> {
        let Dims { rows, cols, row_stride, col_stride } = self.dims;
        MatMut::strided(Cuda::slice_mut(&mut self.memory), rows, cols, row_stride, col_stride)
    }
}

/// α and β of a plain product A B.
const PLAIN: (f64, f64) = (1.0, 0.0);

/// A fused epilogue and its operands: see [`cuda::Epilogue`]. Column sums have the element type of
/// C.
enum FusedEpilogue<'a, T: Element, C: Element> {
    Nothing,
    Bias(CudaSlice<'a, T>),
    BiasGelu(CudaSlice<'a, T>, MatMut<'a, T, Cuda>),
    GeluSlope(MatRef<'a, T, Cuda>),
    ColumnSums(CudaSliceMut<'a, C>),
}

/// Whether cuBLASLt may fuse an epilogue for these operands and this result. cuBLASLt has no
/// epilogue for f64. Its epilogues work on the rows of a column-major result. These are the columns
/// of a row-major result, so the result must be passed transposed.
fn fuses<T: Element>(operands: &[Dims], result: Dims) -> bool {
    let there = |dims: &Dims| dims.rows > 0 && dims.cols > 0 && column_major(*dims).is_some();
    T::DTYPE != DType::F64
        && operands.iter().all(there)
        && column_major(result).is_some_and(|form| form.transposed)
}

/// Whether cuBLASLt can fuse this activation. It fuses only the tanh approximation of GELU. The
/// fused GELU is accurate enough for 16-bit elements only, and needs an aligned `pre`.
fn gelu_fuses<T: Element>(f: Activation, pre: &MatRef<'_, T, Cuda>) -> bool {
    let aligned = pre.data().address().is_multiple_of(16);
    let rows = column_major(pre.dims()).is_some_and(|form| form.transposed && form.leading.is_multiple_of(8));
    f == Activation::GeluTanh && size_of::<T>() == 2 && aligned && rows
}

impl Cuda {
    /// Runs the product of operands that cuBLASLt accepts without copies. Returns false if cuBLASLt
    /// has no algorithm for it.
    fn multiply<T: Element, C: Element>(
        &self,
        batch: Batch,
        (alpha, beta): (f64, f64),
        a: MatRef<'_, T, Self>,
        b: MatRef<'_, T, Self>,
        c: MatMut<'_, C, Self>,
        fused: FusedEpilogue<'_, T, C>,
    ) -> Result<bool> {
        let mut owners = vec![a.data().owner(), b.data().owner(), c.shared().owner()];
        let saved = |pre: &MatRef<'_, T, Self>| column_major(pre.dims()).map_or(0, |form| form.leading);
        let (epilogue, vector, matrix) = match &fused {
            FusedEpilogue::Nothing => (cuda::Epilogue::None, 0, 0),
            FusedEpilogue::Bias(bias) => {
                owners.push(bias.owner());
                (cuda::Epilogue::Bias, bias.address(), 0)
            }
            FusedEpilogue::BiasGelu(bias, pre) => {
                owners.extend([bias.owner(), pre.shared().owner()]);
                (cuda::Epilogue::BiasGelu(saved(&pre.read())), bias.address(), pre.shared().address())
            }
            FusedEpilogue::GeluSlope(pre) => {
                owners.push(pre.data().owner());
                (cuda::Epilogue::GeluSlope(saved(pre)), 0, pre.data().address())
            }
            FusedEpilogue::ColumnSums(sums) => {
                owners.push(Self::shared(sums).owner());
                (cuda::Epilogue::ColumnSums, sums.address(), 0)
            }
        };
        let a = DirectOperand { dims: a.dims(), address: a.data().address(), stride: batch.a };
        let b = DirectOperand { dims: b.dims(), address: b.data().address(), stride: batch.b };
        let c_operand = DirectOperand { dims: c.dims(), address: c.shared().address(), stride: batch.c };
        // A row-major C is computed as its transpose.
        let flip = c_operand.column_major().transposed;
        let (left, right) = if flip { (b.t(), a.t()) } else { (a, b) };
        let product = Matmul {
            inputs: T::DTYPE,
            output: C::DTYPE,
            transpose_a: left.column_major().transposed,
            transpose_b: right.column_major().transposed,
            a: left.layout(),
            b: right.layout(),
            d: c_operand.layout(),
            batch: batch.count,
            epilogue,
        };
        let at = Operands { a: left.address, b: right.address, d: c_operand.address, vector, saved: matrix };
        let mut done = false;
        self.joins(&owners, || {
            // SAFETY: `check` has verified that every matrix of the batch lies in its memory and
            // that the dimensions agree. The layouts are those of the views. The callers have
            // verified the epilogue's operands: a bias has one element per row of the column-major
            // result, the sums have one element per row of A, and a saved matrix has the result's
            // dimensions. All memory that is written is borrowed exclusively.
            #[allow(unsafe_code)]
            unsafe {
                done = self.lt()?.run(self, &product, at, alpha, beta)?;
            }
            Ok(())
        })?;
        Ok(done)
    }
}

/// An operand that cuBLASLt accepts without a copy.
#[derive(Clone, Copy)]
struct DirectOperand {
    dims: Dims,
    address: u64,
    stride: usize,
}

impl DirectOperand {
    fn t(self) -> Self {
        let Dims { rows, cols, row_stride, col_stride } = self.dims;
        let dims = Dims { rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride };
        Self { dims, ..self }
    }

    /// The column-major form. The caller has checked that the operand has one.
    fn column_major(&self) -> ColumnMajor {
        column_major(self.dims).unwrap_or(ColumnMajor { transposed: false, rows: 0, cols: 0, leading: 0 })
    }

    fn layout(&self) -> Layout {
        let ColumnMajor { rows, cols, leading, .. } = self.column_major();
        Layout { rows, cols, leading, stride: self.stride }
    }
}

impl Cuda {
    /// A copy with the layout [`canonical`], or `None` if the matrix has that layout.
    fn canonical_copy<T: Element>(&self, matrix: MatRef<'_, T, Self>) -> Result<Option<Canonical<T>>> {
        if is_canonical(&matrix) {
            return Ok(None);
        }
        let mut copy = Canonical::empty(self, matrix.dims())?;
        self.copy_block(matrix, copy.view_mut()?)?;
        Ok(Some(copy))
    }

    /// to ← from. Copies in packs if the rows of both matrices are contiguous, or the columns of
    /// both.
    fn copy_block<T: Element>(&self, from: MatRef<'_, T, Self>, to: MatMut<'_, T, Self>) -> Result<()> {
        let Dims { rows, cols, row_stride, col_stride } = to.dims();
        if from.dims().col_stride == 1 && col_stride == 1 {
            return self.copy(from, to);
        }
        if from.dims().row_stride == 1 && row_stride == 1 {
            let to = MatMut::strided(to.into_data(), cols, rows, col_stride, row_stride)?;
            return self.copy(from.t(), to);
        }
        self.copy_strided(from, to)
    }

    /// A contiguous copy of a matrix.
    fn dense<T: Element>(&self, matrix: MatRef<'_, T, Self>) -> Result<CudaBuffer<T>> {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let mut copy = self.empty::<T>(rows * cols)?;
        self.copy_strided(matrix, MatMut::new(Self::slice_mut(&mut copy), rows, cols)?)?;
        Ok(copy)
    }

    /// Computes the products of a batch one after another.
    fn gemm_each<T: Element, C: Element<Acc = T::Acc>>(
        &self,
        batch: Batch,
        alpha: f64,
        a: MatRef<'_, T, Self>,
        b: MatRef<'_, T, Self>,
        beta: f64,
        c: MatMut<'_, C, Self>,
    ) -> Result<()> {
        let (a_dims, b_dims, c_dims) = (a.dims(), b.dims(), c.dims());
        let mut c = c.into_data();
        for at in 0..batch.count {
            let view = |data, dims: Dims, stride: usize| {
                let start = if dims.extent() == 0 { 0 } else { at * stride };
                let data = Self::narrow::<T>(data, start..Self::len::<T>(data));
                MatRef::strided(data, dims.rows, dims.cols, dims.row_stride, dims.col_stride)
            };
            let (a, b) = (view(a.data(), a_dims, batch.a)?, view(b.data(), b_dims, batch.b)?);
            let whole = Self::reborrow(&mut c);
            let len = Self::len_mut(&whole);
            let part = Self::narrow_mut(whole, at * batch.c..len);
            let c = MatMut::strided(part, c_dims.rows, c_dims.cols, c_dims.row_stride, c_dims.col_stride)?;
            self.gemm(alpha, a, b, beta, c)?;
        }
        Ok(())
    }

    /// Computes the product into a contiguous result of the accumulator type, then converts the
    /// result.
    fn gemm_via_accumulator<T: Element, C: Element<Acc = T::Acc>>(
        &self,
        alpha: f64,
        a: MatRef<'_, T, Self>,
        b: MatRef<'_, T, Self>,
        beta: f64,
        c: MatMut<'_, C, Self>,
    ) -> Result<()> {
        let (dims, mut c) = (c.dims(), c.into_data());
        let (rows, cols) = (dims.rows, dims.cols);
        let mut wide = self.empty::<T::Acc>(rows * cols)?;
        let mut dense = self.empty::<C>(rows * cols)?;
        if beta != 0.0 {
            let old = MatRef::strided(Self::shared(&c), rows, cols, dims.row_stride, dims.col_stride)?;
            self.copy_strided::<C>(old, MatMut::new(Self::slice_mut(&mut dense), rows, cols)?)?;
            let old = MatRef::<C, Self>::new(Self::slice(&dense), rows, cols)?;
            self.copy::<C, T::Acc>(old, MatMut::new(Self::slice_mut(&mut wide), rows, cols)?)?;
        }
        self.gemm::<T, T::Acc>(alpha, a, b, beta, MatMut::new(Self::slice_mut(&mut wide), rows, cols)?)?;
        let wide = MatRef::<T::Acc, Self>::new(Self::slice(&wide), rows, cols)?;
        self.copy::<T::Acc, C>(wide, MatMut::new(Self::slice_mut(&mut dense), rows, cols)?)?;
        let c = MatMut::strided(Self::reborrow(&mut c), rows, cols, dims.row_stride, dims.col_stride)?;
        self.copy_strided::<C>(MatRef::new(Self::slice(&dense), rows, cols)?, c)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form(
        rows: usize,
        cols: usize,
        row_stride: usize,
        col_stride: usize,
    ) -> Option<(bool, usize, usize, usize)> {
        let form = column_major(Dims { rows, cols, row_stride, col_stride })?;
        Some((form.transposed, form.rows, form.cols, form.leading))
    }

    #[test]
    fn a_matrix_is_seen_with_its_long_side_in_memory() {
        assert_eq!(form(3, 5, 5, 1), Some((true, 5, 3, 5)));
        assert_eq!(form(3, 5, 1, 4), Some((false, 3, 5, 4)));
        assert_eq!(form(3, 5, 10, 2), None);
        // A single row or column is a vector in both forms.
        assert_eq!(form(1, 5, 5, 1), Some((true, 5, 1, 5)));
        assert_eq!(form(5, 1, 1, 1), Some((false, 5, 1, 5)));
        assert_eq!(form(5, 1, 7, 1), Some((true, 1, 5, 7)));
        assert_eq!(form(1, 5, 1, 7), Some((false, 1, 5, 7)));
        assert_eq!(form(1, 1, 1, 1), Some((false, 1, 1, 1)));
    }
}
