//! The output features of column-parallel linear layers, and the tensors that hold their weights.

use super::qkv_layout::{Projection, QkvLayout};
use crate::{
    comm::Group,
    device::{Device, Element},
    error::{Error, Result, same_size},
    kernels::{Backend, MatMut, MatRef},
    parallel::sums::{Holders, Leaves, Sums},
    shard::{Heads, Partition, Reduction},
    tensor::{ParamRegion, Region, Tensor, Weights},
};
use std::ops::Range;

/// Whether a linear layer has a bias, and whether the layer or the caller adds the bias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Bias {
    /// The layer has no bias.
    #[default]
    None,
    /// The layer adds its bias.
    Add,
    /// The layer has a bias, but the caller adds it (Megatron-LM's `skip_bias_add`).
    Skip,
}

/// The output features of a column-parallel linear layer: their partition over the ranks, and the
/// rows of the checkpoint's tensors that hold this rank's weights.
#[derive(Clone, Debug)]
pub struct Columns {
    partition: Partition,
    rows: Vec<TensorRows>,
    reduction: Reduction,
    /// The rows of the weight that belong to each leaf of the group's sums.
    leaves: Leaves,
    /// Key/value heads that several leaves hold, if there are any.
    holders: Option<Holders>,
}

/// A range of rows of one tensor of the checkpoint.
#[derive(Clone, Debug)]
struct TensorRows {
    /// The tensor's name relative to the layer; empty if the tensor has the layer's name.
    tensor: String,
    /// The number of rows of the whole tensor.
    of: usize,
    range: Range<usize>,
    /// Whether this rank owns the rows.
    owned: bool,
}

impl Columns {
    /// Partitions `outputs` features over the ranks of a group by [`Group::even_partition`]. With
    /// fewer features than ranks, some ranks hold none.
    ///
    /// # Errors
    /// When an invariant reduction has fewer blocks than ranks.
    pub fn even<B: Device>(group: &Group<B>, outputs: usize) -> Result<Self> {
        Self::from_partition(group, group.even_partition(outputs)?)
    }

    /// Partitions the features by this partition.
    ///
    /// # Errors
    /// When the partition does not have one shard per rank. With
    /// [`Reduction::Invariant`](crate::shard::Reduction::Invariant), also when the partition does
    /// not consist of canonical blocks ([`Group::partition`]).
    pub fn from_partition<B: Device>(group: &Group<B>, partition: Partition) -> Result<Self> {
        same_size(
            "column linear",
            "the number of shards",
            partition.shards(),
            "the number of ranks",
            group.size(),
        )?;
        let range = partition.range(group.rank());
        let rows = TensorRows { tensor: String::new(), of: partition.total(), range, owned: true };
        let leaves = Sums::of(group)?.leaves("column linear", &partition)?;
        Ok(Self { partition, rows: vec![rows], reduction: group.reduction(), leaves, holders: None })
    }

    /// Merges several layers into one product. The layers have the same input, and each has
    /// `outputs` output features. Rank r holds
    /// `[shard r of the first | shard r of the second | …]`. `tensors` are the names of the layers,
    /// relative to the merged layer.
    ///
    /// ```
    /// use ndarray::arr2;
    /// use shardwise::prelude::*;
    ///
    /// let (gate, up) = (arr2(&[[1.0], [2.0], [3.0]]), arr2(&[[4.0], [5.0], [6.0]]));
    /// let source = [("gate.weight", gate), ("up.weight", up)];
    /// let source = Arrays(source.map(|(name, w)| (name.into(), w.into_dyn())).into());
    /// launch::threads(2, |world| {
    ///     let columns = Columns::merged(&world, &["gate", "up"], 3)?;
    ///     let weights = Weights::new(&source);
    ///     let layer = ColumnLinear::<f64, _>::load(&world, &weights, 1, &columns, Bias::None)?;
    ///     let x = DTensor::copied(&world, Tensor::full(world.device(), [1, 1], 1.0)?)?;
    ///     let y = layer.forward(x)?.0.into_local().to_vec()?;
    ///     assert_eq!(y, [vec![1.0, 2.0, 4.0, 5.0], vec![3.0, 6.0]][world.rank()]);
    ///     Ok(())
    /// })?;
    /// # Ok::<(), shardwise::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Columns::even`].
    pub fn merged<B: Device>(group: &Group<B>, tensors: &[&str], outputs: usize) -> Result<Self> {
        let partition = group.even_partition(outputs)?;
        let range = partition.range(group.rank());
        let sums = Sums::of(group)?;
        let one = sums.leaves("merged linear", &partition)?;
        let leaves = Leaves::concat((0..tensors.len()).map(|at| one.shifted(at * range.len())));
        let rows = |tensor: &&str| TensorRows {
            tensor: tensor.to_string(),
            of: outputs,
            range: range.clone(),
            owned: true,
        };
        Ok(Self {
            rows: tensors.iter().map(rows).collect(),
            partition: partition.scaled(tensors.len()),
            reduction: group.reduction(),
            leaves: sums.joined(leaves),
            holders: None,
        })
    }

    /// Makes the columns of the projection to q, k and v. Rank r holds `[q | k | v]`: q of its
    /// query heads, and k and v of the key/value heads that its query heads use.
    ///
    /// ```
    /// use shardwise::{prelude::*, shard::Heads};
    ///
    /// launch::threads(2, |world| {
    ///     let heads = Heads::new(3, 1, 64, world.size())?; // three query heads share k and v
    ///     let columns = Columns::qkv(&world, &heads, &QkvLayout::separate("q", "k", "v"))?;
    ///     // Rank 0 has two query heads, rank 1 has one. Both hold the key/value head.
    ///     assert_eq!(columns.partition().sizes().collect::<Vec<_>>(), [4 * 64, 3 * 64]);
    ///     Ok(())
    /// })?;
    /// # Ok::<(), shardwise::Error>(())
    /// ```
    ///
    /// # Errors
    /// When the heads were partitioned for another number of ranks or another reduction, or query
    /// heads share a key/value head but the layout has one for each query head.
    pub fn qkv<B: Device>(group: &Group<B>, heads: &Heads, layout: &QkvLayout) -> Result<Self> {
        let sums = Self::check_heads(group, heads, layout)?;
        let rank = group.rank();
        let (query, kv) = (heads.query_range(rank).len(), heads.kv_range(rank).len());
        let projections = [(Projection::Q, 0), (Projection::K, query), (Projection::V, query + kv)];
        let rows = projections.iter();
        let rows = rows.flat_map(|(projection, _)| Self::heads_of(heads, layout, *projection, rank));
        let leaves = projections.map(|(projection, base)| {
            Self::leaves_of(heads, projection, rank).shifted(base * heads.head_dim())
        });
        Ok(Self {
            rows: join(rows.collect()),
            partition: heads.qkv_features(),
            reduction: group.reduction(),
            leaves: sums.joined(Leaves::concat(leaves)),
            holders: Holders::of(heads, rank, true, 2),
        })
    }

    /// Makes the columns of three layers: the projections to q, to k and to v.
    /// [`ColumnParallelLinear::concat`](crate::parallel::ColumnParallelLinear::concat) can
    /// concatenate these layers.
    ///
    /// # Errors
    /// As [`Columns::qkv`].
    pub fn separate_qkv<B: Device>(group: &Group<B>, heads: &Heads, layout: &QkvLayout) -> Result<[Self; 3]> {
        let (rank, sums) = (group.rank(), Self::check_heads(group, heads, layout)?);
        let kv = Partition::from_sizes((0..heads.ranks()).map(|rank| heads.local_kv_heads(rank).len()));
        let kv = kv.scaled(heads.head_dim());
        let of = |projection, partition, holders| {
            let leaves = sums.joined(Self::leaves_of(heads, projection, rank));
            Self {
                partition,
                rows: join(Self::heads_of(heads, layout, projection, rank)),
                reduction: group.reduction(),
                leaves,
                holders,
            }
        };
        let shared = Holders::of(heads, rank, false, 1);
        Ok([
            of(Projection::Q, heads.query_features(), None),
            of(Projection::K, kv.clone(), shared.clone()),
            of(Projection::V, kv, shared),
        ])
    }

    /// Checks that a layer of the group can have these heads in this layout. Returns the group's
    /// sums.
    fn check_heads<B: Device>(group: &Group<B>, heads: &Heads, layout: &QkvLayout) -> Result<Sums<B>> {
        const OP: &str = "qkv linear";
        same_size(OP, "the ranks of the heads", heads.ranks(), "the ranks of the group", group.size())?;
        if matches!(layout, QkvLayout::PerHead(_)) && heads.group() != 1 {
            let reason = format!(
                "the per-head layout has one key/value head per query head, not {} for {}",
                heads.kv_heads(),
                heads.query_heads()
            );
            return Err(Error::invalid(OP, reason));
        }
        let sums = Sums::of(group)?;
        sums.check_heads(OP, heads)?;
        Ok(sums)
    }

    /// Returns the checkpoint's rows of a rank's heads in one projection.
    fn heads_of(heads: &Heads, layout: &QkvLayout, projection: Projection, rank: usize) -> Vec<TensorRows> {
        let dim = heads.head_dim();
        let rows = |head, owned| {
            let (tensor, count, index) = layout.head(heads, projection, head);
            let (tensor, range) = (tensor.to_string(), index * dim..(index + 1) * dim);
            TensorRows { tensor, of: count * dim, range, owned }
        };
        match projection {
            Projection::Q => heads.query_range(rank).map(|head| rows(head, true)).collect(),
            Projection::K | Projection::V => {
                heads.kv_range(rank).map(|head| rows(head, heads.owner(head) == rank)).collect()
            }
        }
    }

    /// Returns the leaves of a rank's heads in one projection.
    ///
    /// A key/value head belongs to the leaf that owns it. A head with several holders is in a range
    /// of its own. All ranks that hold the head therefore compute the same bits, although the
    /// neighbouring heads of that head differ between ranks.
    fn leaves_of(heads: &Heads, projection: Projection, rank: usize) -> Leaves {
        let (first, ranges, others): (_, Vec<Vec<Range<usize>>>, _) = match projection {
            Projection::Q => {
                let ranges = heads.query_ranges(rank).into_iter().map(|heads| vec![heads]);
                (heads.query_range(rank).start, ranges.collect(), Vec::new())
            }
            Projection::K | Projection::V => {
                let (all, shared) = (heads.kv_range(rank), heads.shared());
                let is_shared = |head: usize| shared.binary_search(&head).is_ok();
                let owned = |(leaf, of_leaf): (usize, Range<usize>)| {
                    let mut ranges: Vec<Range<usize>> = Vec::new();
                    for head in of_leaf.filter(|head| heads.owns(rank, leaf, *head)) {
                        match ranges.last_mut() {
                            Some(last) if !is_shared(head) && !is_shared(last.start) => last.end = head + 1,
                            _ => ranges.push(head..head + 1),
                        }
                    }
                    ranges
                };
                let ranges = heads.kv_ranges(rank).into_iter().enumerate().map(owned).collect();
                let others = all.clone().filter(|head| heads.owner(*head) != rank).map(|head| head..head + 1);
                (all.start, ranges, others.collect())
            }
        };
        let row = |head: usize| (head - first) * heads.head_dim();
        let rows = |ranges: &Vec<Range<usize>>| {
            ranges.iter().map(|range| row(range.start)..row(range.end)).collect()
        };
        let shared = !matches!(projection, Projection::Q) && !heads.shared().is_empty();
        Leaves::new(ranges.iter().map(rows).collect(), rows(&others), shared)
    }

    /// The rows of the weight that belong to each leaf of the group's sums.
    pub(super) fn leaves(&self) -> &Leaves {
        &self.leaves
    }

    /// Whether several leaves of the group hold the same rows.
    pub(super) fn are_shared(&self) -> bool {
        self.holders.is_some()
    }

    /// The partition of the weight's rows over the ranks.
    pub(super) fn row_partition(&self) -> &Partition {
        self.holders.as_ref().map_or(&self.partition, Holders::rows)
    }

    /// Checks that a layer of this group can have these columns with this use of a bias.
    ///
    /// # Errors
    /// When the columns were made for another group, or the layer skips a bias that has fewer
    /// elements than the output has columns.
    pub(super) fn check<B: Device>(&self, op: &'static str, bias: Bias, group: &Group<B>) -> Result<()> {
        let ranks = self.partition.shards();
        same_size(op, "the ranks of the columns", ranks, "the ranks of the group", group.size())?;
        if self.reduction != group.reduction() {
            let (columns, group) = (self.reduction, group.reduction());
            let reason = format!(
                "the columns were made for reduction {columns:?}, but the layer's group has {group:?}"
            );
            return Err(Error::invalid(op, reason));
        }
        if bias == Bias::Skip && self.holders.is_some() && self.reduction != Reduction::Fast {
            let reason = "`Bias::Skip` of key/value heads that several canonical blocks hold: the bias has fewer \
                          elements than the output has columns";
            return Err(Error::Unsupported { op, reason: reason.into() });
        }
        Ok(())
    }

    /// Computes the output from `y`, the product with the weight's rows.
    pub(super) fn spread<T: Element, B: Backend>(&self, y: Tensor<T, B>) -> Result<Tensor<T, B>> {
        match &self.holders {
            Some(holders) => holders.spread(y),
            None => Ok(y),
        }
    }

    /// Computes the gradient of the product from `dy`, the gradient of the output. Collective: an
    /// all-reduce if several ranks hold a head.
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

    /// Returns the partition of the features over the ranks. A feature that several ranks or blocks
    /// hold counts once for each.
    pub fn partition(&self) -> &Partition {
        &self.partition
    }

    /// Returns the number of rows of this rank's weight.
    pub(super) fn rows(&self) -> usize {
        self.rows.iter().map(|rows| rows.range.len()).sum()
    }

    /// Returns this rank's regions of the layer's weights or biases (`suffix`). A row has `width`
    /// elements; `None` for a bias.
    pub(super) fn regions(
        &self,
        weights: &Weights<'_>,
        suffix: &str,
        width: Option<usize>,
    ) -> Vec<ParamRegion> {
        let mut row = 0;
        let region = |rows: &TensorRows| {
            let whole = match width {
                Some(width) => Region::whole([rows.of, width]),
                None => Region::whole([rows.of]),
            };
            let tensor = match rows.tensor.as_str() {
                "" => weights.name(suffix),
                tensor => weights.at(tensor).name(suffix),
            };
            let region = whole.narrow(0, rows.range.clone());
            let region = ParamRegion { tensor, region, row, owned: rows.owned };
            row += rows.range.len();
            region
        };
        self.rows.iter().map(region).collect()
    }
}

/// Joins neighbouring heads of one tensor, so that one read covers them.
fn join(rows: Vec<TensorRows>) -> Vec<TensorRows> {
    let mut joined: Vec<TensorRows> = Vec::new();
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
