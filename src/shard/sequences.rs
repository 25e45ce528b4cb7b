//! Which rows of a `[tokens, features]` tensor belong together.

use crate::error::{Error, Result, same_size};
use std::{ops::Range, sync::Arc};

/// The sequences in the rows of a `[tokens, features]` tensor, and which rows are padding.
///
/// Each sequence is a contiguous run of rows; a token attends only within its own. Sequences may differ in length, so
/// that a batch needs no padding ([`Sequences::packed`]); where a batch comes padded, the padding rows are computed like
/// any other but no token attends to them ([`Sequences::padded`], [`Sequences::masked`]). Cloning shares the data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequences {
    bounds: Arc<[usize]>,
    valid: Option<Arc<[bool]>>,
}

impl Sequences {
    /// All `rows` are one sequence.
    pub fn one(rows: usize) -> Self {
        Self::packed([rows])
    }

    /// Sequences of these lengths, one after the other, nothing between them.
    pub fn packed(lengths: impl IntoIterator<Item = usize>) -> Self {
        let mut bounds = vec![0];
        bounds.extend(lengths.into_iter().scan(0, |end, length| {
            *end += length;
            Some(*end)
        }));
        Self { bounds: bounds.into(), valid: None }
    }

    /// A `[lengths.len(), width]` batch: each sequence is `width` rows, of which the first `length` are tokens.
    ///
    /// # Errors
    /// When a length exceeds the width.
    pub fn padded(lengths: &[usize], width: usize) -> Result<Self> {
        if let Some(length) = lengths.iter().find(|&&length| length > width) {
            return Err(Error::invalid(
                "padding",
                format!("a sequence of {length} tokens does not fit a batch padded to {width}"),
            ));
        }
        let valid = lengths.iter().flat_map(|&length| (0..width).map(move |at| at < length)).collect();
        Ok(Self { valid: Some(valid), ..Self::packed(lengths.iter().map(|_| width)) })
    }

    /// The same sequences, with an attention mask of one flag a row: `false` rows are attended to by nobody.
    ///
    /// # Errors
    /// When the mask's length is not the number of rows.
    pub fn masked(self, valid: &[bool]) -> Result<Self> {
        same_size("attention mask", "the mask", valid.len(), "the number of rows", self.rows())?;
        Ok(Self { valid: Some(valid.into()), ..self })
    }

    /// The number of rows of all sequences.
    pub fn rows(&self) -> usize {
        self.bounds[self.len()]
    }

    /// The number of sequences.
    pub fn len(&self) -> usize {
        self.bounds.len() - 1
    }

    /// Whether there is no sequence.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The rows of each sequence, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Range<usize>> + '_ {
        self.bounds.windows(2).map(|pair| pair[0]..pair[1])
    }

    /// One flag a row, if any row is masked out: whether the row may be attended to.
    pub fn valid(&self) -> Option<&[bool]> {
        self.valid.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padded_batches_mask_the_tail_of_each_sequence() {
        let rows = Sequences::padded(&[2, 0, 3], 3).unwrap();
        assert_eq!(rows.iter().collect::<Vec<_>>(), [0..3, 3..6, 6..9]);
        assert_eq!(rows.valid().unwrap(), [true, true, false, false, false, false, true, true, true]);
        assert!(Sequences::padded(&[4], 3).is_err());
        assert!(Sequences::one(3).masked(&[true]).is_err());
        assert_eq!(Sequences::packed([4, 0, 1]).rows(), 5);
    }
}
