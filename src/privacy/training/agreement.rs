//! Checks that the ranks train the same model by the same mechanism.

use super::{DpSgd, OP};
use crate::{
    comm::{DeviceMesh, Group, ReduceOp, hash},
    device::Element,
    error::{Error, Result},
    kernels::Backend,
    privacy::{accountant::Budget, key::RunKey, ledger::Ledger},
    shard::Axis,
    tensor::{Param, ParamRegion, Region},
};
use std::collections::{HashMap, HashSet};

/// Checks that all ranks have the same mechanism, budget, past steps and key.
#[track_caller]
pub(super) fn check_equal<B: Backend>(
    world: &Group<B>,
    mechanism: &DpSgd,
    key: &RunKey,
    ledger: &Ledger,
) -> Result<()> {
    let (steps, spent, Budget { epsilon, delta }) = (ledger.steps(), ledger.spent().epsilon, ledger.budget());
    let own = format!(
        "{mechanism:?}, ε = {spent} of {epsilon} at δ = {delta:e} after {steps} steps, and key {}",
        key.tag()
    );
    let all = world.all_gather_bytes(own.as_bytes())?;
    match all.iter().position(|other| *other != all[0]) {
        None => Ok(()),
        Some(rank) => {
            let [first, other] = [0, rank].map(|rank| String::from_utf8_lossy(&all[rank]));
            let reason = format!("rank 0 trains with {first}, but rank {rank} with {other}");
            Err(Error::invalid(OP, reason))
        }
    }
}

/// Checks that every element of the model has one owner and noise of its own. The noise is a
/// function of the tensor's name and the element's index, so two tensors of one name would have the
/// same noise, and the difference of their gradients would have none.
#[track_caller]
pub(super) fn check_tensors<T: Element, B: Backend>(
    mesh: &DeviceMesh<B>,
    params: &[Param<T, B>],
) -> Result<()> {
    let regions: Vec<_> = params.iter().flat_map(|param| param.regions().to_vec()).collect();
    let regions: Vec<_> = regions.into_iter().filter(|own| !own.region.extent().is_empty()).collect();
    let mut by_name = HashMap::<&str, Vec<&Region>>::new();
    for ParamRegion { tensor, region, .. } in &regions {
        let others = by_name.entry(tensor).or_default();
        if others.iter().any(|other| other.shape() != region.shape() || other.overlaps(region)) {
            return Err(same_noise(tensor, "two parameters of a rank"));
        }
        others.push(region);
    }
    check_owners(mesh.group(Axis::Tensor), &regions)?;

    let pipeline = mesh.group(Axis::Pipeline);
    let names: Vec<u8> = by_name.keys().flat_map(|tensor| hash(tensor).to_le_bytes()).collect();
    let all = pipeline.all_gather_bytes(&names)?;
    for (stage, names) in all.iter().enumerate().filter(|(stage, _)| *stage != pipeline.rank()) {
        let names: HashSet<&[u8]> = names.chunks(8).collect();
        if let Some(tensor) = by_name.keys().find(|tensor| names.contains(&hash(tensor).to_le_bytes()[..])) {
            return Err(same_noise(tensor, &format!("pipeline stages {stage} and {}", pipeline.rank())));
        }
    }
    Ok(())
}

/// Checks that every tensor of which this rank holds elements has one owner in the group. Without
/// one, its gradient would be missing in the norms: another pipeline stage owns a tied table. The
/// norms detect a region that is missing.
#[track_caller]
fn check_owners<B: Backend>(group: &Group<B>, regions: &[ParamRegion]) -> Result<()> {
    // The name, the shape, and whether the region has the first element, for each owned region.
    let of = |own: &ParamRegion| [hash(&own.tensor), hash(own.region.shape()), own.region.has_first().into()];
    let owned = regions.iter().filter(|own| own.owned);
    let bytes: Vec<u8> = owned.flat_map(|own| of(own).map(u64::to_le_bytes).concat()).collect();
    let mut owners = HashMap::<[u8; 8], (HashSet<[u8; 8]>, usize)>::new();
    for [name, shape, first] in group.all_gather_bytes(&bytes)?.iter().flat_map(|all| words(all)) {
        let (shapes, firsts) = owners.entry(name).or_default();
        shapes.insert(shape);
        *firsts += usize::from(first != [0; 8]);
    }
    for own in regions {
        match owners.get(&hash(&own.tensor).to_le_bytes()) {
            None => {
                let reason = format!(
                    "`{}` belongs to another pipeline stage: a table that is tied across stages cannot be clipped by \
                     parts",
                    own.tensor
                );
                return Err(Error::Unsupported { op: OP, reason });
            }
            Some((shapes, firsts)) if shapes.len() > 1 || *firsts > 1 => {
                return Err(same_noise(&own.tensor, "parameters of several tensor-parallel ranks"));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Splits bytes into triples of words.
fn words(bytes: &[u8]) -> impl Iterator<Item = [[u8; 8]; 3]> + '_ {
    let word = |three: &[u8], at: usize| std::array::from_fn(|byte| three[8 * at + byte]);
    bytes.chunks_exact(24).map(move |three| std::array::from_fn(|at| word(three, at)))
}

fn same_noise(tensor: &str, whose: &str) -> Error {
    let reason = format!(
        "{whose} have the same elements of `{tensor}`, and would have the same noise: give each tensor a name of its \
         own (`Weights::at`), and tie a tensor that several layers share (`Param::tie`)"
    );
    Error::invalid(OP, reason)
}

/// Returns the number of parts on all pipeline stages.
#[track_caller]
pub(super) fn count<B: Backend>(pipeline: &Group<B>, own: usize) -> Result<usize> {
    match pipeline.all_reduce_host(ReduceOp::Sum, &[own as f64])?[0] as usize {
        0 => Err(Error::invalid(OP, "there is no part to train")),
        count => Ok(count),
    }
}
