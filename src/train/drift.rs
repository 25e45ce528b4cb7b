//! A check that replicated parameters are equal.

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

/// Compares the bits of parameters across the ranks of a group, by hashes. The check covers every
/// element that several ranks hold. In a data-parallel group these are all elements. In a
/// tensor-parallel group these are norms, positions, row biases and shared key/value heads. In a
/// pipeline group this is a tied table, which the first and the last rank hold.
///
/// The parameters' regions ([`crate::tensor::ParamRegion`]) determine which ranks hold the same
/// elements. Without this check, drift does not stop training but makes the results wrong.
///
/// Collectives: four all-gathers of a few numbers for each parameter, and two more on drift. The
/// check is cheap enough for every few steps.
///
/// ```
/// use shardwise::{prelude::*, train::check_replicas};
/// let source = Random::normal(1, 0.02);
/// launch::threads(2, |world| {
///     let (cpu, weights, whole) = (world.device(), Weights::new(&source), Region::whole([2, 3]));
///     let w = Param::<f32, _>::load_region(cpu, &weights, "w", Role::Weight, whole, true)?;
///     check_replicas(&[w.clone()], &world)?;
///     w.set(Tensor::full(cpu, [2, 3], world.rank() as f64)?)?;
///     assert!(matches!(check_replicas(&[w], &world), Err(Error::Drift { rank: 1, .. })));
///     Ok(())
/// })?;
/// # Ok::<(), Error>(())
/// ```
///
/// # Errors
/// [`Error::Drift`] on every rank, with the first tensor and rank that differ.
/// [`Error::Unsupported`] on a device without values. The error of a collective that fails.
#[track_caller]
pub fn check_replicas<T: Element, B: Backend>(params: &[Param<T, B>], group: &Group<B>) -> Result<()> {
    let _site = Site::here().enter();
    if !B::HAS_VALUES {
        let reason = "the device stores no values to compare";
        return Err(Error::Unsupported { op: "check replicas", reason: reason.into() });
    }
    let mut own = Vec::new();
    for param in params {
        own.extend(param.regions().iter().map(|own| SliceRows::new(&own.tensor, &own.region)));
    }
    let flat: Vec<f64> = own.iter().flat_map(SliceRows::numbers).collect();
    let all: Vec<Vec<SliceRows>> = gather(group, &flat)?
        .iter()
        .map(|flat| flat.as_chunks().0.iter().map(SliceRows::of).collect())
        .collect();

    // The rows of different ranks may overlap partially. Split all rows at the bounds of all ranks,
    // so that any two ranges are equal or disjoint.
    let mut bounds: HashMap<u64, BTreeSet<usize>> = HashMap::new();
    for SliceRows { slice, rows, .. } in all.iter().flatten() {
        bounds.entry(*slice).or_default().extend([rows.start, rows.end]);
    }
    let ranges = |SliceRows { slice, rows, .. }: &SliceRows| -> Vec<Range<usize>> {
        let bounds: Vec<usize> = bounds[slice].range(rows.clone()).copied().collect();
        let ends = bounds.iter().skip(1).copied().chain([rows.end]);
        bounds.iter().copied().zip(ends).map(|(start, end)| start..end).collect()
    };
    let (mut hashes, mut next) = (Vec::new(), own.iter());
    for param in params {
        let (values, width) = (param.value()?.to_vec()?, param.shape().split_at(0).1);
        for (own, slice) in param.regions().iter().zip(&mut next) {
            let (first, inner) = (own.row * width, own.region.extent().split_at(0).1);
            for range in ranges(slice) {
                let mut hash = DefaultHasher::new();
                let [start, end] =
                    [range.start, range.end].map(|row| first + (row - slice.rows.start) * inner);
                values[start..end].iter().for_each(|value| hash.write_u64(value.to_f64().to_bits()));
                hashes.push(truncated(hash.finish()));
            }
        }
    }
    let hashes = gather(group, &hashes)?;

    // The key is a range: its slice and its first row. The value is the first rank that holds the
    // range, and that rank's hash.
    let mut first: HashMap<(u64, usize), (usize, f64)> = HashMap::new();
    for (rank, (slices, hashes)) in all.iter().zip(&hashes).enumerate() {
        let starts =
            slices.iter().flat_map(|slice| ranges(slice).into_iter().map(|range| (slice.slice, range.start)));
        for (start, &hash) in starts.zip(hashes) {
            let (other, known) = *first.entry(start).or_insert((rank, hash));
            if known != hash {
                let tensor = name(group, rank, own.iter().find(|own| own.slice == start.0))?;
                return Err(Error::Drift { tensor, rank, other, group: group.name().to_string() });
            }
        }
    }
    Ok(())
}

/// A region of a tensor as rows of a slice. The slice is the tensor restricted to the region's
/// ranges in all dimensions but the first.
struct SliceRows {
    tensor: String,
    /// A hash of the tensor and of the region's ranges in all dimensions but the first.
    slice: u64,
    rows: Range<usize>,
}

impl SliceRows {
    fn new(tensor: &str, region: &Region) -> Self {
        let (rows, others) =
            region.ranges().split_first().map_or((0..1, &[][..]), |(rows, others)| (rows.clone(), others));
        let slice = truncated(hash((tensor, region.shape(), others))) as u64;
        Self { tensor: tensor.into(), slice, rows }
    }

    fn numbers(&self) -> [f64; 3] {
        [self.slice as f64, self.rows.start as f64, self.rows.end as f64]
    }

    /// Decodes the rows of another rank. The tensor's name stays empty, because ranks exchange only
    /// numbers.
    fn of(numbers: &[f64; 3]) -> Self {
        let [slice, start, end] = *numbers;
        Self { tensor: String::new(), slice: slice as u64, rows: start as usize..end as usize }
    }
}

/// Truncates a hash to the 53 bits that an f64 holds exactly.
pub(super) fn truncated(hash: u64) -> f64 {
    (hash >> 11) as f64
}

/// Gathers the numbers of every rank. Ranks may have different counts of numbers.
fn gather<B: Backend>(group: &Group<B>, own: &[f64]) -> Result<Vec<Vec<f64>>> {
    let count = Tensor::from_slice(group.device(), [1], &[own.len() as f64])?;
    let counts = group.all_gather(&count, 0, &Partition::even(group.size(), group.size()))?.to_vec()?;
    let counts = Partition::from_sizes(counts.into_iter().map(|count: f64| count as usize));
    let own = Tensor::from_slice(group.device(), [own.len()], own)?;
    let all = group.all_gather(&own, 0, &counts)?.to_vec()?;
    Ok((0..group.size()).map(|rank| all[counts.range(rank)].to_vec()).collect())
}

/// Every rank returns the tensor name that rank `rank` has in `own`. Collective: two all-gathers.
fn name<B: Backend>(group: &Group<B>, rank: usize, own: Option<&SliceRows>) -> Result<String> {
    let name = own.map_or("", |own| &own.tensor);
    let bytes: Vec<f64> = name.bytes().map(f64::from).collect();
    let bytes: Vec<u8> = gather(group, &bytes)?[rank].iter().map(|&byte| byte as u8).collect();
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
