//! Replicas that should be equal, and whether they are.

use crate::{
    comm::Group,
    device::Element,
    error::{Error, Result},
    kernels::Backend,
    shard::Partition,
    tensor::{Param, Tensor, Visit},
};
use std::hash::{DefaultHasher, Hasher};

/// Compares the bits of parameters that all ranks of a group should hold alike: all of them over a data-parallel group,
/// those that are not cut (norms, positions) over a tensor-parallel one.
///
/// Collectives: an all-gather of one number a parameter. Cheap enough for every so many steps; silent drift of replicas is
/// a bug that training survives and results do not.
///
/// # Errors
/// [`Error::Drift`], with the first tensor and rank that differ, on every rank.
#[track_caller]
pub fn check_replicas<T: Element, B: Backend>(
    mut visit: impl Visit<T, B>,
    group: &Group<B>,
    is_replica: impl Fn(&Param<T, B>) -> bool,
) -> Result<()> {
    let (mut names, mut hashes) = (Vec::new(), Vec::<f64>::new());
    visit(&mut |param| {
        if is_replica(param) {
            let mut hash = DefaultHasher::new();
            for value in param.value().to_vec()? {
                hash.write_u64(value.to_f64().to_bits());
            }
            names.push(param.name().to_string());
            // As many bits as an f64 holds exactly.
            hashes.push((hash.finish() >> 11) as f64);
        }
        Ok(())
    })?;
    let own = Tensor::from_slice(group.device(), [1, hashes.len()], &hashes)?;
    let cut = Partition::even(group.size(), group.size());
    let all = group.all_gather(&own, 0, &cut)?.to_vec()?;
    for (at, tensor) in names.into_iter().enumerate() {
        for rank in 1..group.size() {
            if all[rank * hashes.len() + at] != all[at] {
                return Err(Error::Drift { tensor, rank, group: group.name().to_string() });
            }
        }
    }
    Ok(())
}
