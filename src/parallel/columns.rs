//! Which output features of a column-sharded linear layer a rank computes, and where their weights are in a checkpoint.

use super::sums::{Holders, Leaves, Sums};
use crate::{
    comm::Group,
    device::{Device, Element},
    error::{Error, Result, same_size},
    kernels::{Backend, MatMut, MatRef},
    shard::{Heads, Partition, Reduction},
    tensor::{ParamRegion, Region, Tensor, Weights},
};
use std::ops::Range;

/// What a linear layer does with a bias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bias {
    /// It has none.
    #[default]
    None,
    /// It adds it.
    Add,
    /// It has one but leaves it to its caller to add, together with something else (Megatron-LM's `skip_bias_add`).
    Skip,
}

/// How the weights of q, k and v lie in a checkpoint. Declared, never guessed from shapes or names: the layouts have the
/// same shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QkvLayout {
    /// Three tensors (Llama, Mistral, Qwen2, BERT), by their names.
    Separate {
        /// The name of q, relative to the layer.
        q: String,
        /// The name of k.
        k: String,
        /// The name of v.
        v: String,
    },
    /// One tensor, `[all q | all k | all v]` (GLM, MPT, Baichuan, Phi-3), by its name.
    Concatenated(String),
    /// One tensor, `[q, k, v]` for each head in turn (BLOOM, GPT-NeoX), by its name. Only without shared key/value heads.
    PerHead(String),
    /// One tensor, `[the group's q …, k, v]` for each key/value head in turn (Megatron-LM, Falcon), by its name.
    PerKvGroup(String),
}

impl QkvLayout {
    /// Three tensors of these names.
    pub fn separate(q: &str, k: &str, v: &str) -> Self {
        Self::Separate { q: q.into(), k: k.into(), v: v.into() }
    }

    /// The tensor that holds head `head` of `part`, its number of heads, and the head's place in it.
    fn head(&self, heads: &Heads, part: Part, head: usize) -> (&str, usize, usize) {
        let (query, kv, group) = (heads.query_heads(), heads.kv_heads(), heads.group());
        match (self, part) {
            (Self::Separate { q, .. }, Part::Q) => (q, query, head),
            (Self::Separate { k, .. }, Part::K) => (k, kv, head),
            (Self::Separate { v, .. }, Part::V) => (v, kv, head),
            (Self::Concatenated(name), Part::Q) => (name, query + 2 * kv, head),
            (Self::Concatenated(name), Part::K) => (name, query + 2 * kv, query + head),
            (Self::Concatenated(name), Part::V) => (name, query + 2 * kv, query + kv + head),
            (Self::PerHead(name) | Self::PerKvGroup(name), part) => {
                let (owner, offset) = match part {
                    Part::Q => (head / group, head % group),
                    Part::K => (head, group),
                    Part::V => (head, group + 1),
                };
                (name, query + 2 * kv, owner * (group + 2) + offset)
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Part {
    Q,
    K,
    V,
}

/// The output features of a column-sharded linear layer: how they are cut over the ranks, and for this rank from which rows
/// of which tensors its weights come.
#[derive(Clone, Debug)]
pub struct Columns {
    cut: Partition,
    rows: Vec<Rows>,
    reduction: Reduction,
    /// Where the leaves of the group's sums are among the rows of the weight.
    leaves: Leaves,
    /// Key/value heads that several leaves hold, if there are any.
    holders: Option<Holders>,
}

/// Rows of one tensor of the checkpoint.
#[derive(Clone, Debug)]
struct Rows {
    /// The tensor's name relative to the layer; empty for the layer itself.
    tensor: String,
    /// The number of rows of the whole tensor.
    of: usize,
    range: Range<usize>,
    /// Whether this rank counts them.
    owned: bool,
}

impl Columns {
    /// `outputs` features over the ranks of a group, as evenly as whole features allow; of few
    /// features, such as the classes of a small head, some ranks hold none.
    ///
    /// # Errors
    /// When an invariant reduction has fewer blocks than ranks.
    pub fn even<B: Device>(group: &Group<B>, outputs: usize) -> Result<Self> {
        Self::from_partition(group, group.even_partition(outputs)?)
    }

    /// Features cut as given.
    ///
    /// # Errors
    /// When the cut has not one part a rank, or with [`crate::shard::Reduction::Invariant`] is not one by canonical blocks
    /// ([`Group::cut`]).
    pub fn from_partition<B: Device>(group: &Group<B>, cut: Partition) -> Result<Self> {
        same_size(
            "column linear",
            "the number of shards",
            cut.shards(),
            "the number of ranks",
            group.size(),
        )?;
        let range = cut.range(group.rank());
        let rows = Rows { tensor: String::new(), of: cut.total(), range, owned: true };
        let leaves = Sums::of(group)?.leaves("column linear", &cut)?;
        Ok(Self { cut, rows: vec![rows], reduction: group.reduction(), leaves, holders: None })
    }

    /// Several layers of the same input and `outputs` features each, computed as one: rank r holds `[part r of the first |
    /// part r of the second | …]`. Each tensor is named relative to the layer.
    ///
    /// # Errors
    /// As [`Columns::even`].
    pub fn merged<B: Device>(group: &Group<B>, tensors: &[&str], outputs: usize) -> Result<Self> {
        let cut = group.even_partition(outputs)?;
        let range = cut.range(group.rank());
        let sums = Sums::of(group)?;
        let one = sums.leaves("merged linear", &cut)?;
        let leaves = Leaves::beside((0..tensors.len()).map(|at| one.shifted(at * range.len())));
        let rows = |tensor: &&str| Rows {
            tensor: tensor.to_string(),
            of: outputs,
            range: range.clone(),
            owned: true,
        };
        let rows = tensors.iter().map(rows).collect();
        let leaves = sums.joined(leaves);
        Ok(Self { rows, cut: cut.scaled(tensors.len()), reduction: group.reduction(), leaves, holders: None })
    }

    /// The projection to q, k and v: rank r holds `[q of its query heads | k | v of the key/value heads they use]`.
    ///
    /// # Errors
    /// When the heads were assigned to another number of ranks, or the layout cannot hold shared key/value heads.
    pub fn qkv<B: Device>(group: &Group<B>, heads: &Heads, layout: &QkvLayout) -> Result<Self> {
        let sums = Self::check_heads(group, heads, layout)?;
        let rank = group.rank();
        let (query, held) = (heads.query_range(rank).len(), heads.kv_range(rank).len());
        let parts = [(Part::Q, 0), (Part::K, query), (Part::V, query + held)];
        let rows = parts.iter().flat_map(|(part, _)| Self::heads_of(heads, layout, *part, rank)).collect();
        let leaves =
            parts.map(|(part, base)| Self::leaves_of(heads, part, rank).shifted(base * heads.head_dim()));
        let leaves = sums.joined(Leaves::beside(leaves));
        let holders = Holders::of(heads, rank, true, 2);
        Ok(Self {
            cut: heads.qkv_features(),
            rows: join(rows),
            reduction: group.reduction(),
            leaves,
            holders,
        })
    }

    /// The projection to q, k and v as three layers: for [`crate::parallel::ColumnParallelLinear`].
    ///
    /// # Errors
    /// As [`Columns::qkv`].
    pub fn separate_qkv<B: Device>(group: &Group<B>, heads: &Heads, layout: &QkvLayout) -> Result<[Self; 3]> {
        let (rank, sums) = (group.rank(), Self::check_heads(group, heads, layout)?);
        let kv = Partition::from_sizes((0..heads.ranks()).map(|rank| heads.local_kv_heads(rank).len()));
        let kv = kv.scaled(heads.head_dim());
        let of = |part, cut, holders| {
            let leaves = sums.joined(Self::leaves_of(heads, part, rank));
            Self {
                cut,
                rows: join(Self::heads_of(heads, layout, part, rank)),
                reduction: group.reduction(),
                leaves,
                holders,
            }
        };
        let shared = Holders::of(heads, rank, false, 1);
        Ok([
            of(Part::Q, heads.query_features(), None),
            of(Part::K, kv.clone(), shared.clone()),
            of(Part::V, kv, shared),
        ])
    }

    /// How the group adds, if it can have these heads in this layout.
    fn check_heads<B: Device>(group: &Group<B>, heads: &Heads, layout: &QkvLayout) -> Result<Sums<B>> {
        const OP: &str = "qkv linear";
        same_size(OP, "the ranks of the heads", heads.ranks(), "the ranks of the group", group.size())?;
        if matches!(layout, QkvLayout::PerHead(_)) && heads.group() != 1 {
            let reason = format!(
                "the per-head layout has one key/value head a query head, not {} for {}",
                heads.kv_heads(),
                heads.query_heads()
            );
            return Err(Error::invalid(OP, reason));
        }
        let sums = Sums::of(group)?;
        sums.check_heads(OP, heads)?;
        Ok(sums)
    }

    /// The rows of one part of a rank's heads.
    fn heads_of(heads: &Heads, layout: &QkvLayout, part: Part, rank: usize) -> Vec<Rows> {
        let dim = heads.head_dim();
        let rows = |head, owned| {
            let (tensor, count, place) = layout.head(heads, part, head);
            Rows { tensor: tensor.to_string(), of: count * dim, range: place * dim..(place + 1) * dim, owned }
        };
        match part {
            Part::Q => heads.query_range(rank).map(|head| rows(head, true)).collect(),
            Part::K | Part::V => {
                heads.kv_range(rank).map(|head| rows(head, heads.owner(head) == rank)).collect()
            }
        }
    }

    /// The rows of one part of a rank's heads that belong to each of its leaves. Key/value heads
    /// belong to the leaf that owns them; one with several holders makes a run of its own, as each
    /// rank that holds it multiplies it, with whatever neighbours.
    fn leaves_of(heads: &Heads, part: Part, rank: usize) -> Leaves {
        let (first, runs, others): (_, Vec<Vec<Range<usize>>>, _) = match part {
            Part::Q => {
                let runs = heads.query_ranges(rank).into_iter().map(|held| vec![held]);
                (heads.query_range(rank).start, runs.collect(), Vec::new())
            }
            Part::K | Part::V => {
                let (held, shared) = (heads.kv_range(rank), heads.shared());
                let shares = |head: usize| shared.binary_search(&head).is_ok();
                let owned = |(leaf, held): (usize, Range<usize>)| {
                    let mut runs: Vec<Range<usize>> = Vec::new();
                    for head in held.filter(|head| heads.owns(rank, leaf, *head)) {
                        match runs.last_mut() {
                            Some(last) if !shares(head) && !shares(last.start) => last.end = head + 1,
                            _ => runs.push(head..head + 1),
                        }
                    }
                    runs
                };
                let runs = heads.kv_ranges(rank).into_iter().enumerate().map(owned).collect();
                let others =
                    held.clone().filter(|head| heads.owner(*head) != rank).map(|head| head..head + 1);
                (held.start, runs, others.collect())
            }
        };
        let row = |head: usize| (head - first) * heads.head_dim();
        let rows = |runs: &Vec<Range<usize>>| runs.iter().map(|run| row(run.start)..row(run.end)).collect();
        let shared = !matches!(part, Part::Q) && !heads.shared().is_empty();
        Leaves::new(runs.iter().map(rows).collect(), rows(&others), shared)
    }

    /// Where the leaves of the group's sums are among the rows of the weight.
    pub(super) fn leaves(&self) -> &Leaves {
        &self.leaves
    }

    /// Whether several leaves of the group hold the same rows.
    pub(super) fn are_shared(&self) -> bool {
        self.holders.is_some()
    }

    /// How the weight's rows are cut over the ranks.
    pub(super) fn row_cut(&self) -> &Partition {
        self.holders.as_ref().map_or(&self.cut, Holders::rows)
    }

    /// That a layer of this group can have these columns, and use a bias so.
    ///
    /// # Errors
    /// When they were made for another group, or the bias is to be skipped and has fewer elements
    /// than the output has columns.
    pub(super) fn check<B: Device>(&self, op: &'static str, bias: Bias, group: &Group<B>) -> Result<()> {
        same_size(op, "the ranks of the columns", self.cut.shards(), "the ranks of the group", group.size())?;
        if self.reduction != group.reduction() {
            let (columns, group) = (self.reduction, group.reduction());
            let reason = format!(
                "the columns were made for reduction {columns:?}, but the layer's group has {group:?}"
            );
            return Err(Error::invalid(op, reason));
        }
        if bias == Bias::Skip && self.holders.is_some() && self.reduction != Reduction::Fast {
            let reason = "a bias that is skipped, of key/value heads that several canonical blocks hold: it has fewer \
                          elements than the output has columns";
            return Err(Error::Unsupported { op, reason: reason.into() });
        }
        Ok(())
    }

    /// The output, given the product with the weight's rows.
    pub(super) fn spread<T: Element, B: Backend>(&self, y: Tensor<T, B>) -> Result<Tensor<T, B>> {
        match &self.holders {
            Some(holders) => holders.spread(y),
            None => Ok(y),
        }
    }

    /// The gradient of the product, given that of the output. Collective: an all-reduce, if several
    /// ranks hold a head.
    ///
    /// # Errors
    /// When sizes disagree, or the collective fails.
    #[track_caller]
    pub(super) fn merge<T: Element, B: Backend>(
        &self,
        sums: &Sums<B>,
        dy: MatRef<'_, T, B>,
        merged: MatMut<'_, T, B>,
    ) -> Result<()> {
        match &self.holders {
            Some(holders) => holders.merge(sums, dy, merged),
            None => sums.group().device().copy(dy, merged),
        }
    }

    /// How the features are cut over the ranks. Features that several ranks, or blocks, hold count for each.
    pub fn partition(&self) -> &Partition {
        &self.cut
    }

    /// The number of rows of this rank's weight.
    pub(super) fn rows(&self) -> usize {
        self.rows.iter().map(|rows| rows.range.len()).sum()
    }

    /// The regions of the layer's `.weight` or `.bias` (`suffix`), whose rows have `width` elements; none for vectors.
    pub(super) fn regions(
        &self,
        weights: &Weights<'_>,
        suffix: &str,
        width: Option<usize>,
    ) -> Vec<ParamRegion> {
        let mut row = 0;
        let part = |rows: &Rows| {
            let whole = match width {
                Some(width) => Region::whole([rows.of, width]),
                None => Region::whole([rows.of]),
            };
            let tensor = match rows.tensor.as_str() {
                "" => weights.name(suffix),
                tensor => weights.at(tensor).name(suffix),
            };
            let part =
                ParamRegion { tensor, region: whole.narrow(0, rows.range.clone()), row, owned: rows.owned };
            row += rows.range.len();
            part
        };
        self.rows.iter().map(part).collect()
    }
}

/// Neighbouring heads of one tensor are read as one run.
fn join(rows: Vec<Rows>) -> Vec<Rows> {
    let mut joined: Vec<Rows> = Vec::new();
    for next in rows {
        match joined.last_mut() {
            Some(last)
                if last.tensor == next.tensor
                    && last.range.end == next.range.start
                    && last.owned == next.owned =>
            {
                last.range.end = next.range.end;
            }
            _ => joined.push(next),
        }
    }
    joined
}
