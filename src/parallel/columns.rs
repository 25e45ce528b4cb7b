//! Which output features of a column-sharded linear layer a rank computes, and where their weights are in a checkpoint.

use super::{
    copies::Copies,
    invariant::{self, Blocks},
};
use crate::{
    comm::Group,
    device::Device,
    error::{Error, Result, same_size},
    shard::{Heads, Partition},
    tensor::{Piece, Region, Weights},
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
    blocks: Option<Blocks>,
    shared: Option<SharedRows>,
    copies: Option<Copies>,
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

/// Rows that several ranks hold, with [`crate::shard::Reduction::Fast`]: their gradient is the sum over the holders.
#[derive(Clone, Debug)]
pub(super) struct SharedRows {
    /// The number of such rows in the whole layer.
    pub(super) total: usize,
    /// This rank's rows, and where they stand among all shared ones.
    pub(super) mine: Vec<(Range<usize>, usize)>,
}

impl Columns {
    /// `outputs` features over the ranks of a group, as evenly as whole features allow.
    ///
    /// # Errors
    /// [`Error::TooManyRanks`] when there are fewer features than ranks.
    pub fn even<B: Device>(group: &Group<B>, outputs: usize) -> Result<Self> {
        Self::cut(group, group.cut("column linear", "features", outputs, 1)?)
    }

    /// Features cut as given.
    ///
    /// # Errors
    /// When the cut has not one part a rank, or with [`crate::shard::Reduction::Invariant`] is not one by canonical blocks
    /// ([`Group::cut`]).
    pub fn cut<B: Device>(group: &Group<B>, cut: Partition) -> Result<Self> {
        same_size(
            "column linear",
            "the parts of the cut",
            cut.parts(),
            "the ranks of the group",
            group.size(),
        )?;
        let range = cut.range(group.rank());
        let rows = Rows { tensor: String::new(), of: cut.total(), range, owned: true };
        let blocks = invariant::blocks("column linear", group, &cut)?;
        Ok(Self { cut, rows: vec![rows], blocks, shared: None, copies: None })
    }

    /// Several layers of the same input and `outputs` features each, computed as one: rank r holds `[part r of the first |
    /// part r of the second | …]`. Each tensor is named relative to the layer.
    ///
    /// # Errors
    /// [`Error::TooManyRanks`] when there are fewer features than ranks.
    pub fn merged<B: Device>(group: &Group<B>, tensors: &[&str], outputs: usize) -> Result<Self> {
        let cut = group.cut("merged linear", "features", outputs, 1)?;
        let range = cut.range(group.rank());
        let mut blocks = invariant::blocks("merged linear", group, &cut)?;
        for block in blocks.iter_mut().flatten() {
            let own = block[0].clone();
            let of = |at: usize| own.start + at * range.len()..own.end + at * range.len();
            *block = (0..tensors.len()).map(of).collect();
        }
        let rows = |tensor: &&str| Rows {
            tensor: tensor.to_string(),
            of: outputs,
            range: range.clone(),
            owned: true,
        };
        let rows = tensors.iter().map(rows).collect();
        Ok(Self { rows, cut: cut.scaled(tensors.len()), blocks, shared: None, copies: None })
    }

    /// As [`Columns::merged`], from one tensor of `[all of the first | all of the second | …]` (Phi-3's `gate_up_proj`).
    ///
    /// # Errors
    /// [`Error::TooManyRanks`] when there are fewer features than ranks.
    pub fn merged_from_one<B: Device>(
        group: &Group<B>,
        tensor: &str,
        count: usize,
        outputs: usize,
    ) -> Result<Self> {
        let mut merged = Self::merged(group, &vec![tensor; count], outputs)?;
        for (at, rows) in merged.rows.iter_mut().enumerate() {
            rows.of = count * outputs;
            rows.range = rows.range.start + at * outputs..rows.range.end + at * outputs;
        }
        Ok(merged)
    }

    /// The projection to q, k and v: rank r holds `[q of its query heads | k | v of the key/value heads they use]`.
    ///
    /// # Errors
    /// When the heads were assigned to another number of ranks, or the layout cannot hold shared key/value heads.
    pub fn qkv<B: Device>(group: &Group<B>, heads: &Heads, layout: &QkvLayout) -> Result<Self> {
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
        let rank = group.rank();
        let (query, held) = (heads.query_range(rank).len(), heads.kv_range(rank).len());
        let all = [Part::Q, Part::K, Part::V].map(|part| Self::heads_of(heads, layout, part, rank)).concat();
        let blocks = [Part::Q, Part::K, Part::V].into_iter().zip([0, query, query + held]);
        let blocks = blocks.map(|(part, base)| Self::blocks_of(heads, part, rank, base));
        let blocks = group.tree()?.map(|_| {
            blocks.reduce(|mut all: Blocks, part| {
                all.iter_mut().zip(part).for_each(|(block, part)| block.extend(part));
                all
            })
        });
        let (shared, copies) = Self::sharing(group, heads, true, 2)?;
        Ok(Self { cut: heads.qkv_features(), rows: join(all), blocks: blocks.flatten(), shared, copies })
    }

    /// The projection to q, k and v as three layers: for [`crate::parallel::ForkedColumnLinear`].
    ///
    /// # Errors
    /// As [`Columns::qkv`].
    pub fn separate_qkv<B: Device>(group: &Group<B>, heads: &Heads, layout: &QkvLayout) -> Result<[Self; 3]> {
        Self::qkv(group, heads, layout)?;
        let rank = group.rank();
        let kv = Partition::from_sizes((0..heads.ranks()).map(|rank| heads.kv_held(rank).len()));
        let kv = kv.scaled(heads.head_dim());
        let tree = group.tree()?;
        let of = |part, cut, (shared, copies)| {
            let blocks = tree.as_ref().map(|_| Self::blocks_of(heads, part, rank, 0));
            Self { cut, rows: join(Self::heads_of(heads, layout, part, rank)), blocks, shared, copies }
        };
        Ok([
            of(Part::Q, heads.query_features(), (None, None)),
            of(Part::K, kv.clone(), Self::sharing(group, heads, false, 1)?),
            of(Part::V, kv, Self::sharing(group, heads, false, 1)?),
        ])
    }

    /// What is to be done about key/value heads that several ranks, or blocks, hold: in a layer with the query heads, if
    /// `query`, and `kv` times the key/value heads.
    fn sharing<B: Device>(
        group: &Group<B>,
        heads: &Heads,
        query: bool,
        kv: usize,
    ) -> Result<(Option<SharedRows>, Option<Copies>)> {
        Ok(match group.tree()? {
            None => (SharedRows::of(heads, group.rank(), query, kv), None),
            Some(_) => (None, Copies::of(heads, group.rank(), query, kv)),
        })
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

    /// The rows of one part of a rank's heads that belong to each of its canonical blocks, the first of them `base` heads behind
    /// the rank's first row. Key/value heads belong to the block that owns them; one with several holders makes a run of its
    /// own, as it is multiplied by each rank that holds it, with whatever neighbours.
    fn blocks_of(heads: &Heads, part: Part, rank: usize, base: usize) -> Blocks {
        let (first, runs): (_, Blocks) = match part {
            Part::Q => {
                let runs = heads.holding(rank).into_iter().map(|held| vec![held]);
                (heads.query_range(rank).start, runs.collect())
            }
            Part::K | Part::V => {
                let shared = heads.shared();
                let shares = |head: usize| shared.binary_search(&head).is_ok();
                let owned = |(block, held): (usize, Range<usize>)| {
                    let mut runs: Vec<Range<usize>> = Vec::new();
                    for head in held.filter(|head| heads.owns(rank, block, *head)) {
                        match runs.last_mut() {
                            Some(last) if !shares(head) && !shares(last.start) => last.end = head + 1,
                            _ => runs.push(head..head + 1),
                        }
                    }
                    runs
                };
                let runs = heads.kv_ranges(rank).into_iter().enumerate().map(owned);
                (heads.kv_range(rank).start, runs.collect())
            }
        };
        let row = |head: usize| (base + head - first) * heads.head_dim();
        let rows = |run: &Range<usize>| row(run.start)..row(run.end);
        runs.iter().map(|runs| runs.iter().map(rows).collect()).collect()
    }

    /// Where this rank's canonical blocks are among the rows of its weight, if there are any.
    pub(super) fn blocks(&self) -> Option<&Blocks> {
        self.blocks.as_ref()
    }

    /// How the features are cut over the ranks. Features that several ranks, or blocks, hold count for each.
    pub fn partition(&self) -> &Partition {
        &self.cut
    }

    /// The number of rows of this rank's weight.
    pub(super) fn rows(&self) -> usize {
        self.rows.iter().map(|rows| rows.range.len()).sum()
    }

    pub(super) fn shared(&self) -> Option<&SharedRows> {
        self.shared.as_ref()
    }

    pub(super) fn copies(&self) -> Option<&Copies> {
        self.copies.as_ref()
    }

    /// The pieces of the layer's `.weight` or `.bias` (`suffix`), whose rows have `width` elements; none for vectors.
    pub(super) fn pieces(&self, weights: &Weights<'_>, suffix: &str, width: Option<usize>) -> Vec<Piece> {
        let mut row = 0;
        let piece = |rows: &Rows| {
            let whole = match width {
                Some(width) => Region::whole([rows.of, width]),
                None => Region::whole([rows.of]),
            };
            let tensor = match rows.tensor.as_str() {
                "" => weights.name(suffix),
                tensor => weights.at(tensor).name(suffix),
            };
            let piece = Piece { tensor, region: whole.cut(0, rows.range.clone()), row, owned: rows.owned };
            row += rows.range.len();
            piece
        };
        self.rows.iter().map(piece).collect()
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

impl SharedRows {
    /// The rows of the key/value heads that more than one rank holds, `kv` times; before them the rank has the rows of its query
    /// heads, if `query`.
    fn of(heads: &Heads, rank: usize, query: bool, kv: usize) -> Option<Self> {
        let (shared, dim) = (heads.shared(), heads.head_dim());
        if shared.is_empty() {
            return None;
        }
        let (base, held) = (if query { heads.query_range(rank).len() } else { 0 }, heads.kv_range(rank));
        let mut mine = Vec::new();
        for part in 0..kv {
            for (at, head) in shared.iter().enumerate().filter(|(_, head)| held.contains(head)) {
                let local = base + part * held.len() + head - held.start;
                mine.push((local * dim..(local + 1) * dim, (part * shared.len() + at) * dim));
            }
        }
        Some(Self { total: kv * shared.len() * dim, mine })
    }
}
