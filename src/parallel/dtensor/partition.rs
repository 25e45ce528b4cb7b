//! Checks of partitions against groups and shapes, and their errors.

use crate::{
    comm::Group,
    device::Device,
    error::{Error, Result, same_size},
    shard::{Partition, Shape},
};

/// Returns `partition`. If `dim` is 0 (tokens) and the reduction is invariant, the returned
/// partition also contains the canonical blocks of each rank.
///
/// # Errors
/// When a shard does not have the size of the rank's canonical blocks.
pub(super) fn canonical<B: Device>(
    op: &'static str,
    group: &Group<B>,
    dim: usize,
    partition: &Partition,
) -> Result<Partition> {
    if dim != 0 || group.tree()?.is_none() {
        return Ok(partition.clone());
    }
    let canonical = group.even_partition(partition.total())?;
    if !canonical.sizes().eq(partition.sizes()) {
        let sizes = |partition: &Partition| partition.sizes().collect::<Vec<_>>();
        let reason = format!(
            "an invariant reduction partitions tokens by canonical blocks as {:?}, not as {:?}",
            sizes(&canonical),
            sizes(partition)
        );
        return Err(Error::Unsupported { op, reason });
    }
    Ok(canonical)
}

/// Checks that a partition divides dimension `dim` of a tensor of this shape over `ranks` ranks.
pub(super) fn check(
    op: &'static str,
    shape: Shape,
    dim: usize,
    partition: &Partition,
    ranks: usize,
) -> Result<()> {
    if dim >= shape.rank() {
        return Err(Error::invalid(op, format!("there is no dimension {dim} in a tensor of shape {shape}")));
    }
    same_size(op, "the number of shards", partition.shards(), "the number of ranks", ranks)?;
    let (have, want) = (partition.total(), shape.dims()[dim]);
    same_size(op, "the size of the partition", have, "that of the dimension", want)
}

/// Makes the error that two partitions differ. Each argument is a partition together with the name
/// of the dimension that the partition divides.
pub(in crate::parallel) fn partition_mismatch(
    op: &'static str,
    (what, partition): (&str, Option<&Partition>),
    (than, expected): (&str, &Partition),
) -> Error {
    let have: Vec<usize> = partition.into_iter().flat_map(Partition::sizes).collect();
    let want: Vec<usize> = expected.sizes().collect();
    Error::invalid(op, format!("the {what} are partitioned as {have:?}, but the {than} as {want:?}"))
}
