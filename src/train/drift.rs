//! Replicas that should be equal, and whether they are.

use crate::{
    comm::{Group, hash},
    device::Element,
    error::{Error, Result, Site},
    kernels::Backend,
    shard::Partition,
    tensor::{Param, Region, Tensor},
};
use std::{
    collections::{BTreeSet, HashMap},
    hash::{DefaultHasher, Hasher},
    ops::Range,
};

/// Compares the bits of every element of the parameters that several ranks of a group hold: over a
/// data-parallel group all of them; over a tensor-parallel one norms, positions, row biases and the
/// key/value heads that ranks share; over a pipeline's a table that both ends hold.
///
/// Which ranks hold the same elements follows from the parameters' regions ([`crate::tensor::ParamRegion`]).
///
/// Collectives: four all-gathers, of a few numbers a parameter. Cheap enough for every so many
/// steps; silent drift of replicas is a bug that training survives and results do not.
///
/// # Errors
/// [`Error::Drift`], with the first tensor and rank that differ, on every rank.
#[track_caller]
pub fn check_replicas<T: Element, B: Backend>(params: &[Param<T, B>], group: &Group<B>) -> Result<()> {
    let _site = Site::here().enter();
    if !B::HAS_VALUES {
        let reason = "a device without values has none to compare";
        return Err(Error::Unsupported { op: "check replicas", reason: reason.into() });
    }
    let mut own = Vec::new();
    for param in params {
        own.extend(param.regions().iter().map(|part| Held::new(&part.tensor, &part.region)));
    }
    let flat: Vec<f64> = own.iter().flat_map(Held::numbers).collect();
    let all: Vec<Vec<Held>> =
        gather(group, &flat)?.iter().map(|flat| flat.as_chunks().0.iter().map(Held::of).collect()).collect();

    // Pieces of different ranks may overlap in part: the bounds of all of them cut each into runs
    // that are equal or disjoint.
    let mut bounds: HashMap<u64, BTreeSet<usize>> = HashMap::new();
    for held in all.iter().flatten() {
        bounds.entry(held.part).or_default().extend([held.rows.start, held.rows.end]);
    }
    let runs = |held: &Held| -> Vec<Range<usize>> {
        let bounds: Vec<usize> = bounds[&held.part].range(held.rows.clone()).copied().collect();
        let ends = bounds.iter().skip(1).copied().chain([held.rows.end]);
        bounds.iter().copied().zip(ends).map(|(start, end)| start..end).collect()
    };
    let (mut hashes, mut next) = (Vec::new(), own.iter());
    for param in params {
        let (values, width) = (param.value()?.to_vec()?, param.shape().split_at(0).1);
        for (part, held) in param.regions().iter().zip(&mut next) {
            let (first, inner) = (part.row * width, part.region.extent().split_at(0).1);
            for run in runs(held) {
                let mut hash = DefaultHasher::new();
                let [start, end] = [run.start, run.end].map(|row| first + (row - held.rows.start) * inner);
                values[start..end].iter().for_each(|value| hash.write_u64(value.to_f64().to_bits()));
                hashes.push(exact(hash.finish()));
            }
        }
    }
    let hashes = gather(group, &hashes)?;

    let mut first: HashMap<(u64, usize), (usize, f64)> = HashMap::new();
    for (rank, (held, hashes)) in all.iter().zip(&hashes).enumerate() {
        let runs = held.iter().flat_map(|held| runs(held).into_iter().map(|run| (held.part, run.start)));
        for (run, &hash) in runs.zip(hashes) {
            let (other, known) = *first.entry(run).or_insert((rank, hash));
            if known != hash {
                let tensor = name(group, rank, own.iter().find(|held| held.part == run.0))?;
                return Err(Error::Drift { tensor, rank, other, group: group.name().to_string() });
            }
        }
    }
    Ok(())
}

/// The rows of a tensor that a part of a parameter holds.
struct Held {
    tensor: String,
    /// The tensor and the indices of the other dimensions: as many bits as an f64 holds exactly.
    part: u64,
    rows: Range<usize>,
}

impl Held {
    fn new(tensor: &str, region: &Region) -> Self {
        let (rows, others) =
            region.ranges().split_first().map_or((0..1, &[][..]), |(rows, others)| (rows.clone(), others));
        let part = exact(hash((tensor, region.shape(), others))) as u64;
        Self { tensor: tensor.into(), part, rows }
    }

    fn numbers(&self) -> [f64; 3] {
        [self.part as f64, self.rows.start as f64, self.rows.end as f64]
    }

    /// What another rank holds, of a tensor whose name it knows.
    fn of(numbers: &[f64; 3]) -> Self {
        let [part, start, end] = *numbers;
        Self { tensor: String::new(), part: part as u64, rows: start as usize..end as usize }
    }
}

/// As many bits of a hash as an f64 holds exactly.
pub(super) fn exact(hash: u64) -> f64 {
    (hash >> 11) as f64
}

/// Every rank's numbers, of which each may have another count.
fn gather<B: Backend>(group: &Group<B>, own: &[f64]) -> Result<Vec<Vec<f64>>> {
    let count = Tensor::from_slice(group.device(), [1], &[own.len() as f64])?;
    let counts = group.all_gather(&count, 0, &Partition::even(group.size(), group.size()))?.to_vec()?;
    let cut = Partition::from_sizes(counts.into_iter().map(|count: f64| count as usize));
    let all = group.all_gather(&Tensor::from_slice(group.device(), [own.len()], own)?, 0, &cut)?.to_vec()?;
    Ok((0..group.size()).map(|rank| all[cut.range(rank)].to_vec()).collect())
}

/// The name of a tensor that rank `rank` holds, on every rank.
fn name<B: Backend>(group: &Group<B>, rank: usize, held: Option<&Held>) -> Result<String> {
    let name = held.map_or("", |held| &held.tensor);
    let bytes: Vec<f64> = name.bytes().map(f64::from).collect();
    let bytes: Vec<u8> = gather(group, &bytes)?[rank].iter().map(|&byte| byte as u8).collect();
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
