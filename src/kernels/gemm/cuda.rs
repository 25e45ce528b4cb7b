//! Matrix products on NVIDIA GPUs, by cuBLASLt.
//!
//! cuBLASLt's matrices are column-major. A row-major C is the column-major Cᵀ = Bᵀ Aᵀ; an operand with unit stride in one
//! dimension is itself or its transpose. What has unit stride in none is copied first.

use super::{Batch, Gemm, check};
use crate::{
    device::{
        Device, Element,
        cuda::{Cuda, CudaBuffer, Epilogue, Layout, Matmul, Operands},
    },
    error::Result,
    kernels::{MatMut, MatRef, Pointwise, view::Dims},
};

/// A matrix as cuBLASLt sees it: column-major, perhaps transposed.
#[derive(Clone, Copy)]
struct Seen {
    transposed: bool,
    rows: usize,
    cols: usize,
    leading: usize,
}

/// The column-major form of a matrix, if it has one without being copied.
fn column_major(dims: Dims) -> Option<Seen> {
    let Dims { rows, cols, row_stride, col_stride } = dims;
    let fits = |rows, cols, inner, outer| (rows <= 1 || inner == 1) && (cols <= 1 || outer >= rows);
    let leading = |rows: usize, cols, outer| if cols <= 1 { rows.max(1) } else { outer };
    if fits(rows, cols, row_stride, col_stride) {
        return Some(Seen { transposed: false, rows, cols, leading: leading(rows, cols, col_stride) });
    }
    let transpose = fits(cols, rows, col_stride, row_stride);
    transpose.then(|| Seen {
        transposed: true,
        rows: cols,
        cols: rows,
        leading: leading(cols, rows, row_stride),
    })
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
            return self.one_by_one(batch, alpha, a, b, beta, c);
        }
        if k == 0 {
            // cuBLASLt refuses empty sums: those of one 0.
            let mut zeros = self.empty::<T>(m.max(n))?;
            self.fill::<T>(0.0, MatMut::new(Self::slice_mut(&mut zeros), 1, m.max(n))?)?;
            let (a, b) = (MatRef::new(Self::slice(&zeros), m, 1)?, MatRef::new(Self::slice(&zeros), 1, n)?);
            return self.gemm(alpha, a, b, beta, c);
        }
        if !stored {
            return self.by_way_of(alpha, a, b, beta, c);
        }
        if !direct(a.dims()) {
            let copy = self.dense(a)?;
            return self.gemm(alpha, MatRef::new(Self::slice(&copy), m, k)?, b, beta, c);
        }
        if !direct(b.dims()) {
            let copy = self.dense(b)?;
            return self.gemm(alpha, a, MatRef::new(Self::slice(&copy), k, n)?, beta, c);
        }
        let owners = [a.data().owner(), b.data().owner(), c.shared().owner()];
        let a = Side { dims: a.dims(), address: a.data().address(), stride: batch.a };
        let b = Side { dims: b.dims(), address: b.data().address(), stride: batch.b };
        let c_side = Side { dims: c.dims(), address: c.shared().address(), stride: batch.c };
        // A row-major C is computed as its transpose.
        let flip = c_side.seen().transposed;
        let (left, right) = if flip { (b.t(), a.t()) } else { (a, b) };
        let product = Matmul {
            inputs: T::DTYPE,
            output: C::DTYPE,
            transpose_a: left.seen().transposed,
            transpose_b: right.seen().transposed,
            a: left.layout(),
            b: right.layout(),
            d: c_side.layout(),
            batch: batch.count,
            epilogue: Epilogue::None,
            kept_leading: 0,
        };
        let at = Operands { a: left.address, b: right.address, d: c_side.address, ..Operands::default() };
        self.joins(&owners, || {
            // SAFETY: `check` has seen that every matrix of the batch lies in its memory and that the dimensions agree; the
            // layouts are those of the views. C is borrowed exclusively.
            #[allow(unsafe_code)]
            unsafe {
                self.lt()?.run(self, &product, at, alpha, beta)
            }
        })
    }
}

/// An operand that needs no copy.
#[derive(Clone, Copy)]
struct Side {
    dims: Dims,
    address: u64,
    stride: usize,
}

impl Side {
    fn t(self) -> Self {
        let Dims { rows, cols, row_stride, col_stride } = self.dims;
        let dims = Dims { rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride };
        Self { dims, ..self }
    }

    /// Column-major, as the caller has seen that it is.
    fn seen(&self) -> Seen {
        column_major(self.dims).unwrap_or(Seen { transposed: false, rows: 0, cols: 0, leading: 0 })
    }

    fn layout(&self) -> Layout {
        let Seen { rows, cols, leading, .. } = self.seen();
        Layout { rows, cols, leading, stride: self.stride }
    }
}

impl Cuda {
    /// A copy of a matrix without gaps.
    fn dense<T: Element>(&self, matrix: MatRef<'_, T, Self>) -> Result<CudaBuffer<T>> {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let mut copy = self.empty::<T>(rows * cols)?;
        self.copy_strided(matrix, MatMut::new(Self::slice_mut(&mut copy), rows, cols)?)?;
        Ok(copy)
    }

    /// The products of a batch after one another.
    fn one_by_one<T: Element, C: Element<Acc = T::Acc>>(
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

    /// By way of a result in the accumulator, without gaps.
    fn by_way_of<T: Element, C: Element<Acc = T::Acc>>(
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
