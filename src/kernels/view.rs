//! Matrix views, the arguments of kernels.

use crate::{
    device::{Cpu, Device, Element, Meta},
    error::{Error, Result},
};
use std::ops::Range;

/// A read-only matrix in device memory: element `(i, j)` is at `i · row_stride + j · col_stride`.
///
/// ```
/// use shardwise::{kernels::Gemm, prelude::*};
///
/// let cpu = Cpu::new();
/// let a = Tensor::<f32>::from_slice(&cpu, [2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])?;
/// let mut c = Tensor::<f32>::zeros(&cpu, [2, 2])?;
/// let right = a.mat().columns(1..3); // [[2, 3], [5, 6]]
/// cpu.gemm(1.0, right, right.t(), 0.0, c.mat_mut()?)?;
/// assert_eq!(c.to_vec()?, [13.0, 28.0, 28.0, 61.0]);
/// # Ok::<(), Error>(())
/// ```
pub struct MatRef<'a, T: Element, B: Device> {
    data: B::Slice<'a, T>,
    dims: Dims,
}

/// A mutable matrix in device memory.
pub struct MatMut<'a, T: Element, B: Device> {
    data: B::SliceMut<'a, T>,
    dims: Dims,
}

/// The dimensions and strides of a view. [`Dims::check`] ensures that the extent fits the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dims {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) row_stride: usize,
    pub(crate) col_stride: usize,
}

impl Dims {
    /// One past the index of the last element, or 0 for an empty matrix. An overflow gives
    /// `usize::MAX`, which exceeds the length of every memory.
    pub(crate) fn extent(&self) -> usize {
        if self.rows == 0 || self.cols == 0 {
            return 0;
        }
        let last_row = (self.rows - 1).saturating_mul(self.row_stride);
        let last_col = (self.cols - 1).saturating_mul(self.col_stride);
        last_row.saturating_add(last_col).saturating_add(1)
    }

    /// The number of elements. It may exceed the memory, because strides may be 0.
    pub(crate) fn elements(&self) -> u128 {
        self.rows as u128 * self.cols as u128
    }

    /// The index of a row's first element. Returns 0 for a view without columns, because such a
    /// view may have no memory.
    #[inline(always)]
    fn row_start(&self, row: usize) -> usize {
        if self.cols == 0 { 0 } else { row * self.row_stride }
    }

    fn check(self, len: usize) -> Result<Self> {
        if self.extent() > len {
            return Err(Error::sizes(
                "matrix view",
                format!(
                    "the extent of a {} x {} matrix with strides {}, {}",
                    self.rows, self.cols, self.row_stride, self.col_stride
                ),
                self.extent(),
                "the memory behind it",
                len,
            ));
        }
        Ok(self)
    }

    fn block(self, rows: Range<usize>, cols: Range<usize>) -> (usize, Self) {
        assert!(
            rows.start <= rows.end
                && rows.end <= self.rows
                && cols.start <= cols.end
                && cols.end <= self.cols,
            "block {rows:?} x {cols:?} of a {} x {} matrix is out of bounds",
            self.rows,
            self.cols
        );
        // An empty block may begin beyond the end of the memory, so its offset saturates.
        let row = rows.start.saturating_mul(self.row_stride);
        let start = row.saturating_add(cols.start.saturating_mul(self.col_stride));
        (start, Self { rows: rows.len(), cols: cols.len(), ..self })
    }
}

impl<T: Element, B: Device> Clone for MatRef<'_, T, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Element, B: Device> Copy for MatRef<'_, T, B> {}

impl<'a, T: Element, B: Device> MatRef<'a, T, B> {
    /// A contiguous row-major matrix.
    ///
    /// # Errors
    /// When the memory is too short.
    pub fn new(data: B::Slice<'a, T>, rows: usize, cols: usize) -> Result<Self> {
        Self::strided(data, rows, cols, cols, 1)
    }

    /// A matrix with any strides.
    ///
    /// # Errors
    /// When the memory is too short.
    pub fn strided(
        data: B::Slice<'a, T>,
        rows: usize,
        cols: usize,
        row_stride: usize,
        col_stride: usize,
    ) -> Result<Self> {
        let dims = Dims { rows, cols, row_stride, col_stride }.check(B::len(data))?;
        Ok(Self { data, dims })
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.dims.rows
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        self.dims.cols
    }

    /// The transpose: the same memory with rows and columns exchanged.
    pub fn t(self) -> Self {
        let Dims { rows, cols, row_stride, col_stride } = self.dims;
        Self {
            data: self.data,
            dims: Dims { rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride },
        }
    }

    /// The block of these rows and columns.
    ///
    /// # Panics
    /// When the range is out of bounds.
    pub fn block(self, rows: Range<usize>, cols: Range<usize>) -> Self {
        let (start, dims) = self.dims.block(rows, cols);
        let end = if dims.extent() == 0 { start.min(B::len(self.data)) } else { B::len(self.data) };
        Self { data: B::narrow(self.data, start.min(end)..end), dims }
    }

    /// The block of these columns.
    ///
    /// # Panics
    /// When the range is out of bounds.
    pub fn columns(self, cols: Range<usize>) -> Self {
        let rows = self.rows();
        self.block(0..rows, cols)
    }

    pub(crate) fn dims(&self) -> Dims {
        self.dims
    }

    pub(crate) fn data(&self) -> B::Slice<'a, T> {
        self.data
    }
}

impl<'a, T: Element, B: Device> MatMut<'a, T, B> {
    /// A contiguous row-major matrix.
    ///
    /// # Errors
    /// When the memory is too short.
    pub fn new(data: B::SliceMut<'a, T>, rows: usize, cols: usize) -> Result<Self> {
        Self::strided(data, rows, cols, cols, 1)
    }

    /// A matrix with any strides, as long as no two elements share memory.
    ///
    /// # Errors
    /// When the memory is too short, or elements overlap.
    pub fn strided(
        data: B::SliceMut<'a, T>,
        rows: usize,
        cols: usize,
        row_stride: usize,
        col_stride: usize,
    ) -> Result<Self> {
        let dims = Dims { rows, cols, row_stride, col_stride }.check(B::len_mut(&data))?;
        // No elements overlap if each row ends before the next row begins, or each column ends
        // before the next column begins.
        let apart = |count: usize, stride: usize, inner: usize, inner_stride: usize| {
            (count <= 1 || stride > (inner - 1) * inner_stride) && (inner <= 1 || inner_stride > 0)
        };
        let empty = dims.extent() == 0;
        if !(empty || apart(rows, row_stride, cols, col_stride) || apart(cols, col_stride, rows, row_stride))
        {
            return Err(Error::invalid(
                "matrix view",
                format!(
                    "elements of a {rows} x {cols} matrix with strides {row_stride}, {col_stride} overlap"
                ),
            ));
        }
        Ok(Self { data, dims })
    }

    /// The number of rows.
    pub fn rows(&self) -> usize {
        self.dims.rows
    }

    /// The number of columns.
    pub fn cols(&self) -> usize {
        self.dims.cols
    }

    /// The block of these rows and columns.
    ///
    /// # Panics
    /// When the range is out of bounds.
    pub fn block(self, rows: Range<usize>, cols: Range<usize>) -> Self {
        let (start, dims) = self.dims.block(rows, cols);
        let len = B::len_mut(&self.data);
        let end = if dims.extent() == 0 { start.min(len) } else { len };
        Self { data: B::narrow_mut(self.data, start.min(end)..end), dims }
    }

    /// The block of these columns.
    ///
    /// # Panics
    /// When the range is out of bounds.
    pub fn columns(self, cols: Range<usize>) -> Self {
        let rows = self.rows();
        self.block(0..rows, cols)
    }

    /// Reborrows the view.
    pub(crate) fn reborrow(&mut self) -> MatMut<'_, T, B> {
        MatMut { data: B::reborrow(&mut self.data), dims: self.dims }
    }

    /// A read-only view of the same matrix.
    pub(crate) fn read(&self) -> MatRef<'_, T, B> {
        MatRef { data: B::shared(&self.data), dims: self.dims }
    }

    pub(crate) fn dims(&self) -> Dims {
        self.dims
    }

    /// A read-only view of the memory from the matrix's first element on.
    #[cfg(feature = "cuda")]
    pub(crate) fn shared(&self) -> B::Slice<'_, T> {
        B::shared(&self.data)
    }

    /// The number of elements from the matrix's first element to the end of the memory.
    pub(crate) fn memory(&self) -> usize {
        B::len_mut(&self.data)
    }

    pub(crate) fn into_data(self) -> B::SliceMut<'a, T> {
        self.data
    }
}

/// The bytes of the elements of a view, for the log of a device without memory.
impl<T: Element> MatRef<'_, T, Meta> {
    pub(crate) fn bytes(&self) -> u128 {
        self.dims.elements() * size_of::<T>() as u128
    }
}

impl<T: Element> MatMut<'_, T, Meta> {
    pub(crate) fn bytes(&self) -> u128 {
        self.dims.elements() * size_of::<T>() as u128
    }
}

/// A row-major matrix at the start of a slice in host memory.
pub(crate) fn mat<T: Element>(data: &[T], rows: usize, cols: usize) -> Result<MatRef<'_, T, Cpu>> {
    MatRef::new(data, rows, cols)
}

/// A mutable row-major matrix at the start of a slice in host memory.
pub(crate) fn mat_mut<T: Element>(data: &mut [T], rows: usize, cols: usize) -> Result<MatMut<'_, T, Cpu>> {
    MatMut::new(data, rows, cols)
}

/// Row access for CPU kernels. The column stride must be 1, because a row is returned as a slice.
impl<'a, T: Element> MatRef<'a, T, Cpu> {
    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> &'a [T] {
        let at = self.dims.row_start(row);
        &self.data[at..at + self.dims.cols]
    }
}

impl<T: Element> MatMut<'_, T, Cpu> {
    #[inline(always)]
    pub(crate) fn row(&mut self, row: usize) -> &mut [T] {
        let at = self.dims.row_start(row);
        &mut self.data[at..at + self.dims.cols]
    }
}

/// Returns an error unless two operands have the same dimensions.
pub(crate) fn same_dims(
    op: &'static str,
    left: &str,
    left_dims: Dims,
    right: &str,
    right_dims: Dims,
) -> Result<()> {
    crate::error::same_shape(
        op,
        left,
        &[left_dims.rows, left_dims.cols],
        right,
        &[right_dims.rows, right_dims.cols],
    )
}

/// Returns an error unless the elements of each row are contiguous.
pub(crate) fn unit_columns(op: &'static str, dims: Dims) -> Result<()> {
    if dims.col_stride == 1 || dims.cols <= 1 {
        return Ok(());
    }
    Err(Error::invalid(op, format!("needs matrices with column stride 1, not {}", dims.col_stride)))
}
