//! The sequences in the rows of a `[tokens, features]` tensor.

use crate::error::{Error, Result, same_size};
use std::{ops::Range, sync::Arc};

/// The sequences in the rows of a `[tokens, features]` tensor, and the rows that are padding.
///
/// A sequence is a contiguous range of rows. A token attends only within its sequence. Sequences
/// may differ in length, so a batch needs no padding ([`Sequences::packed`]). The padding rows of a
/// padded batch are computed like other rows, but no token attends to them ([`Sequences::padded`],
/// [`Sequences::masked`]). Positions count tokens, not padding ([`Sequences::positions`]), so a
/// text padded on the left or right gives the same result as without padding. A sequence may
/// continue tokens that were computed earlier ([`Sequences::starting_at`]). Clones share the data.
///
/// ```
/// use shardwise::prelude::*;
/// let packed = Sequences::packed([2, 3]);
/// assert!(packed.positions().eq([0, 1, 0, 1, 2]));
/// let left_padded = Sequences::one(4).masked(&[false, true, true, true])?;
/// assert!(left_padded.positions().eq([0, 0, 1, 2]));
/// let decoding = Sequences::packed([1, 1]).starting_at(&[7, 3])?; // after 7 and 3 cached tokens
/// assert!(decoding.positions().eq([7, 3]));
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequences {
    bounds: Arc<[usize]>,
    valid: Option<Arc<[bool]>>,
    starts: Option<Arc<[usize]>>,
    /// Whether a cache holds the earlier tokens.
    cached: bool,
}

impl Sequences {
    /// One sequence of `rows` rows.
    pub fn one(rows: usize) -> Self {
        Self::packed([rows])
    }

    /// Sequences of the given lengths, one after another, without padding.
    pub fn packed(lengths: impl IntoIterator<Item = usize>) -> Self {
        let mut bounds = vec![0];
        bounds.extend(lengths.into_iter().scan(0_usize, |end, length| {
            *end = end.saturating_add(length);
            Some(*end)
        }));
        Self { bounds: bounds.into(), valid: None, starts: None, cached: false }
    }

    /// A batch `[lengths.len(), width]` that is padded on the right. Each sequence has `width`
    /// rows, of which the first `length` are tokens.
    ///
    /// # Errors
    /// When a length exceeds the width, or there is no memory for one flag per row.
    pub fn padded(lengths: &[usize], width: usize) -> Result<Self> {
        if let Some(length) = lengths.iter().find(|&&length| length > width) {
            return Err(Error::invalid(
                "padding",
                format!("a sequence of {length} tokens does not fit a batch padded to {width}"),
            ));
        }
        let rows = lengths.len().saturating_mul(width);
        let mut valid: Vec<bool> = Vec::new();
        valid.try_reserve_exact(rows).map_err(|_| Error::Memory { len: rows, size: size_of::<bool>() })?;
        valid.extend(lengths.iter().flat_map(|&length| (0..width).map(move |at| at < length)));
        Ok(Self { valid: Some(valid.into()), ..Self::packed(lengths.iter().map(|_| width)) })
    }

    /// The same sequences with an attention mask, which has one flag per row. No token attends to
    /// the rows whose flag is false.
    ///
    /// # Errors
    /// When the mask's length is not the number of rows.
    pub fn masked(self, valid: &[bool]) -> Result<Self> {
        same_size("attention mask", "the mask", valid.len(), "the number of rows", self.rows())?;
        Ok(Self { valid: Some(valid.into()), ..self })
    }

    /// The same sequences, starting at the given positions instead of 0. The start of a sequence is
    /// the number of its earlier tokens.
    ///
    /// # Errors
    /// When there is not one start per sequence, or a sequence's start plus its number of rows
    /// exceeds 2³² − 1.
    pub fn starting_at(self, starts: &[usize]) -> Result<Self> {
        const OP: &str = "sequences";
        same_size(OP, "the number of starts", starts.len(), "the number of sequences", self.len())?;
        let end = |(start, rows): (&usize, Range<usize>)| start.checked_add(rows.len());
        let fits = |end: Option<usize>| end.is_some_and(|end| u32::try_from(end).is_ok());
        if let Some(at) = starts.iter().zip(self.iter()).map(end).position(|end| !fits(end)) {
            let reason =
                format!("sequence {at} starts at position {}, and ends beyond position 2³² − 1", starts[at]);
            return Err(Error::invalid(OP, reason));
        }
        Ok(Self { starts: Some(starts.into()), ..self })
    }

    /// The same sequences, with their earlier tokens in a cache.
    pub(crate) fn in_cache(self) -> Self {
        Self { cached: true, ..self }
    }

    /// Whether a cache holds the earlier tokens, so that attention must read the cache.
    pub(crate) fn are_cached(&self) -> bool {
        self.cached
    }

    /// The position of a sequence's first row.
    pub fn start(&self, sequence: usize) -> usize {
        self.starts.as_ref().map_or(0, |starts| starts[sequence])
    }

    /// The position of every row in its sequence: the start of the sequence plus the number of
    /// tokens before the row.
    ///
    /// The position of padding is that of the next token. Padding after the last token is counted
    /// as if it were tokens.
    pub fn positions(&self) -> impl Iterator<Item = u32> + '_ {
        let positions = |(sequence, rows): (usize, Range<usize>)| {
            let mut next = self.start(sequence);
            self.counted(rows).map(move |counts| {
                let position = next;
                next += usize::from(counts);
                position as u32
            })
        };
        self.iter().enumerate().flat_map(positions)
    }

    /// The position after the last row of a sequence. A table of positions must be at least this
    /// long.
    pub fn end(&self, sequence: usize) -> usize {
        let rows = self.bounds[sequence]..self.bounds[sequence + 1];
        match self.valid {
            None => self.start(sequence) + rows.len(),
            Some(_) => self.start(sequence) + self.counted(rows).filter(|&counts| counts).count(),
        }
    }

    /// For each row of a sequence, whether it adds 1 to the positions of later rows. Tokens do, and
    /// so does padding after the last token. Padding before the last token does not. In a sequence
    /// without tokens, all rows do.
    fn counted(&self, rows: Range<usize>) -> impl Iterator<Item = bool> + '_ {
        let valid = self.valid.as_ref().map(|valid| &valid[rows.clone()]);
        let last = valid.and_then(|valid| valid.iter().rposition(|&valid| valid));
        (0..rows.len()).map(move |at| match (valid, last) {
            (Some(valid), Some(last)) => at > last || valid[at],
            _ => true,
        })
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

    /// The attention mask, if there is one. It has one flag per row, which says whether tokens may
    /// attend to the row.
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

    #[test]
    fn positions_count_from_the_start_of_each_sequence() {
        let rows = Sequences::packed([2, 0, 3]);
        assert_eq!(rows.positions().collect::<Vec<_>>(), [0, 1, 0, 1, 2]);
        let later = rows.clone().starting_at(&[7, 5, 0]).unwrap();
        assert_eq!(later.positions().collect::<Vec<_>>(), [7, 8, 0, 1, 2]);
        assert_eq!([0, 1, 2].map(|sequence| later.end(sequence)), [9, 5, 3]);
        assert!(rows.clone().starting_at(&[1]).is_err());
        assert!(rows.starting_at(&[usize::MAX, 0, 0]).is_err());
    }

    #[test]
    fn positions_do_not_count_the_padding_before_a_token() {
        let of = |rows: Sequences, valid: &[u8]| {
            let valid: Vec<bool> = valid.iter().map(|&valid| valid == 1).collect();
            let rows = rows.masked(&valid).unwrap();
            let ends: Vec<usize> = (0..rows.len()).map(|sequence| rows.end(sequence)).collect();
            (rows.positions().collect::<Vec<_>>(), ends)
        };
        assert_eq!(of(Sequences::packed([4, 2]), &[0, 0, 1, 1, 0, 1]), (vec![0, 0, 0, 1, 0, 0], vec![2, 1]));
        assert_eq!(of(Sequences::one(5), &[1, 0, 1, 0, 1]), (vec![0, 1, 1, 2, 2], vec![3]));
        // Padding on the right, or only padding, counts like text.
        assert_eq!(of(Sequences::one(4), &[1, 1, 0, 0]), (vec![0, 1, 2, 3], vec![4]));
        assert_eq!(of(Sequences::one(4), &[0, 1, 0, 0]), (vec![0, 0, 1, 2], vec![3]));
        assert_eq!(of(Sequences::one(3), &[0, 0, 0]), (vec![0, 1, 2], vec![3]));
        let later = Sequences::one(3).starting_at(&[5]).unwrap();
        assert_eq!(of(later, &[0, 1, 1]), (vec![5, 5, 6], vec![7]));
    }
}
