//! The tensors of a model, and the ranks that own their elements.

use super::writer::broadcast_text;
use crate::{
    comm::Group,
    device::Element,
    error::{Error, Result, same_shape, same_size},
    kernels::Backend,
    shard::Shape,
    tensor::{Param, ParamRegion, Region},
};
use std::{collections::BTreeMap, ops::Range};

/// A tensor of the model.
pub(super) struct Whole {
    pub(super) name: String,
    pub(super) shape: Shape,
    /// The owned regions, in rank order. They cover each element of the tensor once.
    pub(super) owned: Vec<Owned>,
}

/// A region of a tensor and the rank that owns it.
pub(super) struct Owned {
    pub(super) rank: usize,
    pub(super) region: Region,
}

/// Whether this rank owns elements of the region.
pub(super) fn is_own(of: &ParamRegion) -> bool {
    of.owned && !of.region.extent().is_empty()
}

/// Returns the tensors of the model: the tensors of the first rank in its order, then the tensors
/// that only later ranks have. Checks that each element has exactly one owner. A rank's regions of
/// a tensor have the order of `params`.
pub(super) fn all_tensors<T: Element, B: Backend>(
    group: &Group<B>,
    params: &[Param<T, B>],
) -> Result<Vec<Whole>> {
    /// The name of a tensor, its shape, and the regions that a rank owns.
    type Own = (String, Vec<usize>, Vec<Vec<Range<usize>>>);
    let mut own: Vec<Own> = Vec::new();
    let mut places = BTreeMap::new();
    for param in params {
        for of in param.regions().iter() {
            let place = *places.entry(of.tensor.clone()).or_insert_with(|| {
                own.push((of.tensor.clone(), of.region.shape().dims().to_vec(), Vec::new()));
                own.len() - 1
            });
            if is_own(of) {
                own[place].2.push(of.region.ranges().to_vec());
            }
        }
    }
    let bad = |error: serde_json::Error| Error::invalid("save", format!("the names of tensors: {error}"));
    let text = serde_json::to_string(&own).map_err(bad)?;
    let mut all: Vec<Whole> = Vec::new();
    let mut places = BTreeMap::new();
    for rank in 0..group.size() {
        for (name, dims, owned) in
            serde_json::from_str::<Vec<Own>>(&broadcast_text(group, rank, &text)?).map_err(bad)?
        {
            let own = format!("`{name}` of rank {rank}");
            if dims.len() > Shape::MAX_RANK {
                let reason = format!("{own} has {} dimensions, more than {}", dims.len(), Shape::MAX_RANK);
                return Err(Error::invalid("save", reason));
            }
            let place = *places.entry(name.clone()).or_insert_with(|| {
                all.push(Whole { name, shape: Shape::new(&dims), owned: Vec::new() });
                all.len() - 1
            });
            let whole = &mut all[place];
            same_shape("save", &own, &dims, "that of an earlier rank", whole.shape.dims())?;
            let new = owned
                .into_iter()
                .map(|ranges| region(&own, whole.shape, &ranges))
                .collect::<Result<Vec<_>>>()?;
            let is_duplicate = |new: &&Region| whole.owned.iter().any(|old| old.region.overlaps(new));
            if let Some(new) = new.iter().find(is_duplicate) {
                let (ranges, name) = (new.ranges(), &whole.name);
                let reason = format!("{ranges:?} of `{name}` is owned by rank {rank} and by another rank");
                return Err(Error::invalid("save", reason));
            }
            whole.owned.extend(new.into_iter().map(|region| Owned { rank, region }));
        }
    }
    for Whole { name, shape, owned } in &all {
        same_size(
            "save",
            &format!("the elements of `{name}` that the ranks of the group own"),
            owned.iter().map(|own| own.region.extent().len()).sum(),
            "those of its shape",
            shape.len(),
        )?;
    }
    Ok(all)
}

/// Returns the region of a tensor of this shape. The ranges come from another rank, so they may be
/// invalid.
fn region(own: &str, shape: Shape, ranges: &[Range<usize>]) -> Result<Region> {
    let fits = |(range, dim): (&Range<usize>, &usize)| range.start <= range.end && range.end <= *dim;
    if ranges.len() != shape.rank() || !ranges.iter().zip(shape.dims()).all(fits) {
        let reason = format!("the region {ranges:?} of {own} exceeds its shape {shape}");
        return Err(Error::invalid("save", reason));
    }
    let narrow = |region: Region, (dim, range): (usize, &Range<usize>)| region.narrow(dim, range.clone());
    Ok(ranges.iter().enumerate().fold(Region::whole(shape), narrow))
}
