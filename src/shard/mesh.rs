//! Device meshes: ranks as points of a grid.

use crate::error::{Error, Result};
use std::fmt;

/// An axis of a [`Mesh`], named after the kind of parallelism between the ranks along the axis.
/// Later versions may add axes, such as expert or context parallelism.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Axis {
    /// Data parallel: the ranks hold the same parameters and process different samples.
    Data,
    /// Pipeline parallel: the ranks hold consecutive layers.
    Pipeline,
    /// Tensor parallel: the ranks hold shards of the operators' weights.
    Tensor,
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Data => "dp",
            Self::Pipeline => "pp",
            Self::Tensor => "tp",
        })
    }
}

/// A `dp × pp × tp` grid of ranks: `rank = (d · pp + p) · tp + t`. Tensor-parallel ranks, which
/// communicate most, are adjacent.
///
/// ```
/// use shardwise::prelude::*;
/// let mesh = Mesh::new(2, 3, 4)?;
/// let at = |axis| mesh.coordinate(22, axis);
/// assert_eq!((at(Axis::Data), at(Axis::Pipeline), at(Axis::Tensor)), (1, 2, 2));
/// assert_eq!(mesh.len(), 24); // and 22 = (1 · 3 + 2) · 4 + 2
/// assert_eq!(mesh.line(22, Axis::Data), mesh.line(10, Axis::Data)); // same stage and tensor index
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mesh {
    sizes: [usize; 3],
}

impl Mesh {
    /// A grid of `dp × pp × tp` ranks.
    ///
    /// # Errors
    /// When a size is 0, or the number of ranks overflows.
    pub fn new(dp: usize, pp: usize, tp: usize) -> Result<Self> {
        if [dp, pp, tp].contains(&0) {
            return Err(Error::invalid("mesh", format!("an axis of a {dp} x {pp} x {tp} mesh has no ranks")));
        }
        if dp.checked_mul(pp).and_then(|ranks| ranks.checked_mul(tp)).is_none() {
            let reason = format!("a {dp} x {pp} x {tp} mesh has more ranks than can be counted");
            return Err(Error::invalid("mesh", reason));
        }
        Ok(Self { sizes: [dp, pp, tp] })
    }

    /// The number of ranks.
    pub fn len(&self) -> usize {
        self.sizes.iter().product()
    }

    /// Always false: a mesh has at least one rank.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The number of ranks along an axis.
    pub fn size(&self, axis: Axis) -> usize {
        self.sizes[axis as usize]
    }

    /// The coordinate of a rank along an axis.
    pub fn coordinate(&self, rank: usize, axis: Axis) -> usize {
        let [_, pp, tp] = self.sizes;
        match axis {
            Axis::Data => rank / tp / pp,
            Axis::Pipeline => rank / tp % pp,
            Axis::Tensor => rank % tp,
        }
    }

    /// The index of the line that contains a rank. A line has the ranks that differ only in their
    /// coordinate along `axis`. Use the index as the `color` to split a group into lines.
    pub fn line(&self, rank: usize, axis: Axis) -> usize {
        let [_, pp, tp] = self.sizes;
        match axis {
            Axis::Data => rank % (pp * tp),
            Axis::Pipeline => self.coordinate(rank, Axis::Data) * tp + rank % tp,
            Axis::Tensor => rank / tp,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn lines_meet_every_rank_once_and_in_order() {
        let mesh = Mesh::new(3, 2, 4).unwrap();
        for axis in [Axis::Data, Axis::Pipeline, Axis::Tensor] {
            let mut lines: HashMap<usize, Vec<usize>> = HashMap::new();
            for rank in 0..mesh.len() {
                lines.entry(mesh.line(rank, axis)).or_default().push(mesh.coordinate(rank, axis));
            }
            assert_eq!(lines.len() * mesh.size(axis), mesh.len());
            for line in lines.values() {
                assert_eq!(*line, (0..mesh.size(axis)).collect::<Vec<_>>());
            }
        }
        assert!(Mesh::new(2, 0, 1).is_err());
        let error = Mesh::new(1 << 32, 1 << 32, 1).unwrap_err().to_string();
        assert!(error.ends_with("has more ranks than can be counted"), "{error}");
    }
}
