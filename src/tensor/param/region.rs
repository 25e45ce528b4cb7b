//! The regions of the model's tensors that a parameter holds.

use crate::tensor::Region;
use std::ops::Range;

/// Rows of a parameter that come from one region of one tensor of the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamRegion {
    /// The name of the tensor, as in a checkpoint.
    pub tensor: String,
    /// The region of the tensor.
    pub region: Region,
    /// The first row of the parameter that the region fills.
    pub row: usize,
    /// Whether this rank owns the region. Exactly one rank owns each element of the model, even if
    /// several ranks hold a copy.
    pub owned: bool,
}

/// Rows and columns of a parameter that belong to one canonical block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BlockRegion {
    pub(crate) rows: Range<usize>,
    pub(crate) cols: Range<usize>,
}

/// Returns the name of a parameter that merges these tensors. The name has the common segments, and
/// `|` between the segments that differ, as in `attention.q|k|v.weight`. Returns `None` without
/// tensors.
pub(super) fn merged_name<'a>(tensors: impl Iterator<Item = &'a str>) -> Option<String> {
    let mut names: Vec<Vec<&str>> = Vec::new();
    for tensor in tensors {
        let name: Vec<&str> = tensor.split('.').collect();
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let shortest = names.iter().map(Vec::len).min()?;
    if names.len() == 1 {
        return Some(names[0].join("."));
    }
    let first = names[0].clone();
    let prefix = (0..shortest).take_while(|&at| names.iter().all(|name| name[at] == first[at])).count();
    let last = |name: &[&'a str], at: usize| name[name.len() - 1 - at];
    let alike = |&at: &usize| names.iter().all(|name| last(name, at) == last(&first, at));
    let suffix = (0..shortest - prefix).take_while(alike).count();
    let between: Vec<String> = names.iter().map(|name| name[prefix..name.len() - suffix].join(".")).collect();
    let between = between.join("|");
    let segments = [&first[..prefix], &[&between], &first[first.len() - suffix..]];
    Some(segments.concat().join("."))
}

#[cfg(test)]
mod tests {
    use super::merged_name;

    #[test]
    fn merged_parameters_have_the_names_of_all_their_tensors() {
        let of = |tensors: &[&str]| merged_name(tensors.iter().copied());
        assert_eq!(of(&[]), None);
        assert_eq!(of(&["h.0.attn.c_attn.weight"; 3]).unwrap(), "h.0.attn.c_attn.weight");
        assert_eq!(of(&["a.0.q.weight", "a.0.k.weight", "a.0.k.weight"]).unwrap(), "a.0.q|k.weight");
        assert_eq!(of(&["gate", "up"]).unwrap(), "gate|up");
        assert_eq!(of(&["x.weight", "x.y.weight"]).unwrap(), "x.|y.weight");
    }
}
