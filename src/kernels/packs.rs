//! How the CUDA kernels access matrices: in packs if all operands are aligned to their packs, else
//! one element at a time. A pack has as many elements as fit in 16 bytes. Among operands of several
//! element types, the largest type determines this number.

use super::view::Dims;

/// One operand of an element-wise kernel.
#[derive(Clone, Copy)]
pub(super) struct Operand {
    pub(super) dims: Dims,
    /// The address of the operand's first element.
    pub(super) address: u64,
    /// The number of bytes per element.
    pub(super) size: usize,
}

/// The loop bounds of a kernel, and whether it accesses packs of elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AccessPlan {
    pub(super) packed: bool,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// The number of packs or elements.
    pub(super) steps: usize,
}

impl AccessPlan {
    /// The plan for matrices of the same dimensions. Flattens the matrices to one row if all are
    /// contiguous.
    pub(super) fn flat(operands: &[Operand]) -> Self {
        let Some(first) = operands.first() else { return Self { packed: false, rows: 0, cols: 0, steps: 0 } };
        let Dims { rows, cols, .. } = first.dims;
        let gapless = operands.iter().all(|operand| operand.dims.row_stride == cols || rows <= 1);
        let (rows, cols) = if gapless { (1, rows * cols) } else { (rows, cols) };
        Self::by_rows(operands, rows, cols)
    }

    /// The plan for matrices that a kernel accesses row by row.
    pub(super) fn by_rows(operands: &[Operand], rows: usize, cols: usize) -> Self {
        let width = 16 / operands.iter().map(|operand| operand.size).max().unwrap_or(16).max(1);
        let aligned = |operand: &Operand| {
            operand.address.is_multiple_of((width * operand.size) as u64)
                && (rows <= 1 || operand.dims.row_stride.is_multiple_of(width))
        };
        let packed = width > 1 && cols.is_multiple_of(width) && operands.iter().all(aligned);
        let steps = rows * if packed { cols / width } else { cols };
        Self { packed, rows, cols, steps }
    }

    /// The arguments that pass a plan to a kernel. They come before the kernel's other arguments.
    pub(super) fn arguments(&self) -> [usize; 3] {
        [usize::from(self.packed), self.rows, self.cols]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operand(rows: usize, cols: usize, row_stride: usize, address: u64, size: usize) -> Operand {
        Operand { dims: Dims { rows, cols, row_stride, col_stride: 1 }, address, size }
    }

    #[test]
    fn packs_are_taken_where_all_operands_are_aligned() {
        let access = |operands: &[Operand]| AccessPlan::flat(operands).arguments();
        assert_eq!(access(&[operand(4, 8, 8, 256, 4)]), [1, 1, 32]);
        assert_eq!(access(&[operand(4, 8, 8, 260, 4)]), [0, 1, 32]);
        assert_eq!(access(&[operand(4, 8, 8, 256, 4), operand(4, 8, 12, 512, 4)]), [1, 4, 8]);
        assert_eq!(access(&[operand(4, 8, 10, 256, 4)]), [0, 4, 8]);
        assert_eq!(access(&[operand(3, 5, 5, 256, 4)]), [0, 1, 15]);
        // A pack of four: 8 bytes of bf16 and 16 bytes of f32.
        assert_eq!(access(&[operand(2, 4, 6, 8, 2), operand(2, 4, 4, 16, 4)]), [0, 2, 4]);
        assert_eq!(access(&[operand(2, 4, 8, 8, 2), operand(2, 4, 4, 16, 4)]), [1, 2, 4]);
        assert_eq!(access(&[operand(0, 5, 5, 0, 4)]), [1, 1, 0]);
    }
}
