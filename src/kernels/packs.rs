//! How the CUDA kernels walk through matrices: 16 bytes at a time where all operands allow it.

use super::view::Dims;

/// One operand of an element-wise kernel.
#[derive(Clone, Copy)]
pub(super) struct Operand {
    pub(super) dims: Dims,
    /// Where its first element is.
    pub(super) address: u64,
    /// The bytes of one element.
    pub(super) size: usize,
}

/// The rows and columns that a kernel walks through, and whether it takes packs of elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Walk {
    pub(super) packed: bool,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// How many packs or elements there are.
    pub(super) steps: usize,
}

impl Walk {
    /// Matrices of the same dimensions, as one row where none has gaps.
    pub(super) fn through(operands: &[Operand]) -> Self {
        let Some(first) = operands.first() else { return Self { packed: false, rows: 0, cols: 0, steps: 0 } };
        let Dims { rows, cols, .. } = first.dims;
        let gapless = operands.iter().all(|operand| operand.dims.row_stride == cols || rows <= 1);
        let (rows, cols) = if gapless { (1, rows * cols) } else { (rows, cols) };
        Self::by_rows(operands, rows, cols)
    }

    /// Matrices whose rows stay apart.
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

    /// What every such kernel takes first.
    pub(super) fn words(&self) -> [usize; 3] {
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
        let walk = |operands: &[Operand]| Walk::through(operands).words();
        assert_eq!(walk(&[operand(4, 8, 8, 256, 4)]), [1, 1, 32]);
        assert_eq!(walk(&[operand(4, 8, 8, 260, 4)]), [0, 1, 32]);
        assert_eq!(walk(&[operand(4, 8, 8, 256, 4), operand(4, 8, 12, 512, 4)]), [1, 4, 8]);
        assert_eq!(walk(&[operand(4, 8, 10, 256, 4)]), [0, 4, 8]);
        assert_eq!(walk(&[operand(3, 5, 5, 256, 4)]), [0, 1, 15]);
        // Four bf16 are 8 bytes beside four f32.
        assert_eq!(walk(&[operand(2, 4, 6, 8, 2), operand(2, 4, 4, 16, 4)]), [0, 2, 4]);
        assert_eq!(walk(&[operand(2, 4, 8, 8, 2), operand(2, 4, 4, 16, 4)]), [1, 2, 4]);
        assert_eq!(walk(&[operand(0, 5, 5, 0, 4)]), [1, 1, 0]);
    }
}
