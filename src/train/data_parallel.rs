//! Data parallelism: replicas of a model on different samples.

use super::{
    buckets::{Bucket, Buckets, Target},
    drift::truncated,
};
use crate::{
    comm::{Group, ReduceOp, hash},
    device::Element,
    error::{Error, Result, Site},
    kernels::Backend,
    shard::{Node, Partition, Reduction, Tree, TreeSum},
    tensor::{Accumulate, Param, Tensor},
};
use std::rc::Rc;

/// The reduction of the ranks' gradients gᵣ.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum GradReduce {
    /// Σ gᵣ. Correct if every rank has divided its loss by the size of the whole batch.
    Sum,
    /// Σ wᵣ gᵣ / Σ wᵣ. Use weight 1 for the plain average, or the number of samples if each rank
    /// has the mean over its own samples.
    Mean {
        /// The weight wᵣ of this rank.
        weight: f64,
    },
}

/// Data parallelism over a group: each rank has a replica of the model with equal parameters. The
/// gradients of the replicas are reduced during each backward.
///
/// Each gradient is copied to a flat bucket when the backward finishes it. Buckets take the
/// parameters in reverse order, because a backward usually finishes the last parameters first. The
/// reduction of a bucket starts when the bucket is full, and runs while the backward continues. All
/// ranks start the reductions in the order of the buckets. Gradients keep the accumulator type.
///
/// Gradients of backwards before [`DataParallel::begin`] only accumulate (PyTorch's `no_sync`). The
/// backward between `begin` and [`DataParallel::finish`] adds to them, and their sum is reduced:
///
/// ```
/// use shardwise::{prelude::*, train::{DataParallel, GradReduce}};
/// launch::threads(2, |world| {
///     let (cpu, rank, source) = (world.device(), world.rank(), Random::normal(1, 0.02));
///     let (w, whole) = (Weights::new(&source), Region::whole([1]));
///     let w = Param::<f32, _>::load_region(cpu, &w, "w", Role::Bias, whole, true)?;
///     let replicas = DataParallel::new(&world, &[w.clone()])?;
///     replicas.begin(GradReduce::Mean { weight: [1.0, 3.0][rank] })?;
///     w.add_grad(Tensor::full(cpu, [1], [4.0, 8.0][rank])?)?; // in place of a backward
///     replicas.finish()?;
///     Ok(assert_eq!(w.grad().unwrap().to_vec()?, [7.0])) // (1 · 4 + 3 · 8) / (1 + 3)
/// })?;
/// # Ok::<(), Error>(())
/// ```
///
/// With a *central aggregator* ([`DataParallel::central`]) gradients are reduced to one rank. That
/// rank, the aggregator, steps the optimizer, and [`DataParallel::publish`] broadcasts the
/// aggregator's parameters. The parameters have the same bits as without an aggregator.
///
/// With [`Reduction::Invariant`] on the group, a gradient has one term for each microbatch and use.
/// Call [`crate::tensor::Param::set_microbatches`] before [`DataParallel::new`]. The terms of all
/// replicas are summed along one tree. So 2 replicas of 2 microbatches give the same bits as one
/// replica of 4 microbatches. Buckets work as above if there are two replicas with one sub-tree
/// each. Otherwise [`DataParallel::finish`] reduces the parameters one by one.
///
/// If only some replicas have a gradient of a parameter, the others contribute 0. If no replica has
/// a gradient, the parameter has none after the reduction, and optimizers skip the parameter, as on
/// one device.
///
/// Collectives: `new` makes an all-gather of one number for each parameter and a broadcast of each
/// parameter. Each bucket has an all-reduce, which includes one number for each of its parameters.
/// With an aggregator, each bucket has a reduce-scatter to one rank instead, and `publish` makes a
/// broadcast of each parameter. [`GradReduce::Mean`] adds an all-reduce of one number. If `finish`
/// reduces parameters one by one, it first makes an all-reduce of one number for each parameter.
///
/// Source: Li et al., 2020: PyTorch Distributed, section 3.2.
pub struct DataParallel<T: Element, B: Backend> {
    group: Group<B>,
    params: Vec<Param<T, B>>,
    buckets: Rc<Buckets<T, B>>,
    aggregator: Option<usize>,
}

/// The default size of buckets in bytes, as in PyTorch.
pub(crate) const BUCKET: usize = 25 << 20;

impl<T: Element, B: Backend> DataParallel<T, B> {
    /// Broadcasts rank 0's values of these parameters, and collects their gradients in buckets from
    /// now on. After the drop of the `DataParallel`, gradients are no longer reduced. With an
    /// invariant reduction the parameters' sinks then still expect the terms of other replicas, so
    /// make a new [`DataParallel`] before training continues. Skips quantized parameters, which are
    /// frozen.
    ///
    /// # Errors
    /// When the ranks hold different parameters or different regions of a parameter, as in a
    /// tensor-parallel group; when a parameter has no dense store (do not pass such parameters);
    /// when the group has an invariant reduction and a parameter's sink cannot sum along a tree;
    /// when a collective fails.
    #[track_caller]
    pub fn new(group: &Group<B>, params: &[Param<T, B>]) -> Result<Self> {
        Self::with(group, params, None, BUCKET)
    }

    /// As [`DataParallel::new`], with buckets of at most `bytes` bytes.
    ///
    /// # Errors
    /// As [`DataParallel::new`].
    #[track_caller]
    pub fn with_buckets(group: &Group<B>, params: &[Param<T, B>], bytes: usize) -> Result<Self> {
        Self::with(group, params, None, bytes)
    }

    /// As [`DataParallel::new`], with gradients reduced only to rank `aggregator`.
    ///
    /// # Errors
    /// When the group has no rank `aggregator`, and as [`DataParallel::new`].
    #[track_caller]
    pub fn central(group: &Group<B>, params: &[Param<T, B>], aggregator: usize) -> Result<Self> {
        if aggregator >= group.size() {
            let reason =
                format!("the aggregator is rank {aggregator}, but the group has {} ranks", group.size());
            return Err(Error::invalid("data parallel", reason));
        }
        Self::with(group, params, Some(aggregator), BUCKET)
    }

    #[track_caller]
    fn with(
        group: &Group<B>,
        params: &[Param<T, B>],
        aggregator: Option<usize>,
        bytes: usize,
    ) -> Result<Self> {
        // Settle all parameters first, so that an error is returned before any parameter is
        // changed.
        let trained = params.iter().filter(|param| !param.is_quantized()).cloned();
        let params = &trained.collect::<Vec<_>>()[..];
        params.iter().try_for_each(Param::settle)?;
        let (replica, replicas) = (group.rank(), group.size());
        let in_tree = |param: &Param<T, B>| {
            let tree = Tree::new("data parallel", "terms", replicas * param.uses(), replicas)?;
            Ok((tree, param.replicated_sink(replica, replicas)?))
        };
        let (trees, sinks) = match group.reduction() {
            Reduction::Fast => (None, Vec::new()),
            Reduction::Invariant { .. } => {
                let (trees, sinks) =
                    params.iter().map(in_tree).collect::<Result<Vec<_>>>()?.into_iter().unzip();
                (Some(trees), sinks)
            }
        };
        check_regions(group, params)?;
        broadcast(group, params, 0)?;
        let target = aggregator.map_or(Target::All, Target::Root);
        let lengths: Vec<usize> = params.iter().map(|param| param.shape().len()).collect();
        let buckets = Rc::new(Buckets::new(group, target, &lengths, trees, bytes));
        let mut sinks = sinks.into_iter();
        for (number, param) in params.iter().enumerate() {
            let own = param.set_sink(Box::new(Accumulate))?;
            let sum = sinks.next().unwrap_or(own);
            drop(param.set_sink(Box::new(Bucket::new(sum, &buckets, number)))?);
        }
        Ok(Self { group: group.clone(), params: params.to_vec(), buckets, aggregator })
    }

    /// Starts a round: the gradients accumulated so far and those of the next backward are reduced.
    ///
    /// # Errors
    /// When the sum of the weights is not positive, terms of an earlier step are missing, or a
    /// collective fails. [`crate::Error::Unsupported`] for [`GradReduce::Mean`] with an invariant
    /// reduction over several ranks.
    #[track_caller]
    pub fn begin(&self, reduce: GradReduce) -> Result<()> {
        let weight = match reduce {
            GradReduce::Sum => 1.0,
            GradReduce::Mean { .. } if self.group.size() > 1 && self.group.reduction() != Reduction::Fast => {
                let reason = "a mean over replicas with an invariant reduction: use `GradReduce::Sum` and divide the loss by the size of the whole batch";
                return Err(Error::Unsupported { op: "data parallel", reason: reason.into() });
            }
            GradReduce::Mean { weight } => {
                let sum = self.group.all_reduce_host(ReduceOp::Sum, &[weight])?[0];
                if sum.is_nan() || sum <= 0.0 {
                    return Err(Error::invalid("data parallel", format!("the ranks' weights sum to {sum}")));
                }
                weight / sum
            }
        };
        self.params.iter().try_for_each(Param::settle)?;
        self.buckets.begin(weight, Site::here());
        Ok(())
    }

    /// Whether a reduction is in progress: `begin` without `finish`. One replica alone has none.
    #[cfg(feature = "privacy")]
    pub(crate) fn has_begun(&self) -> bool {
        self.buckets.has_begun()
    }

    /// Waits for the reductions and sets the parameters' gradients to the results. With an
    /// aggregator, only that rank has gradients afterwards.
    ///
    /// A rank without samples in this step calls `begin` and `finish` without a backward.
    ///
    /// # Errors
    /// When `begin` was not called, or a collective fails.
    #[track_caller]
    pub fn finish(&self) -> Result<()> {
        let _site = Site::here().enter();
        self.buckets.finish(&self.params)
    }

    /// Sums one number for each microbatch, such as its loss, over all replicas. Returns the sum on
    /// every rank. With an invariant reduction, sums along the tree over all microbatches, and
    /// every replica has to pass the same number of microbatches.
    ///
    /// Collective: an all-reduce of one number; with an invariant reduction an all-gather.
    ///
    /// # Errors
    /// When a collective fails.
    #[track_caller]
    pub fn sum(&self, microbatches: &[f64]) -> Result<f64> {
        let group = &self.group;
        if group.reduction() == Reduction::Fast {
            return Ok(group.all_reduce_host(ReduceOp::Sum, &[microbatches.iter().sum::<f64>()])?[0]);
        }
        let count = microbatches.len();
        let own = Tensor::from_slice(group.device(), [count], microbatches)?;
        let counts = Partition::from_sizes(vec![count; group.size()]);
        let all: Vec<f64> = group.all_gather(&own, 0, &counts)?.to_vec()?;
        let mut sum = TreeSum::new(all.len());
        for (leaf, value) in all.into_iter().enumerate() {
            sum.push(Node::leaf(leaf), value, |left, right| {
                *left += right;
                Ok(())
            })?;
        }
        Ok(sum.values().into_iter().sum())
    }

    /// Returns the group of the replicas.
    pub fn group(&self) -> &Group<B> {
        &self.group
    }

    /// Returns the parameters whose gradients are reduced.
    pub fn params(&self) -> &[Param<T, B>] {
        &self.params
    }

    /// Whether this rank steps the optimizer. Every rank does, or only the aggregator if there is
    /// one.
    pub fn steps(&self) -> bool {
        self.aggregator.is_none_or(|rank| rank == self.group.rank())
    }

    /// Broadcasts the aggregator's parameters. Does nothing without an aggregator.
    ///
    /// # Errors
    /// When a collective fails.
    #[track_caller]
    pub fn publish(&self) -> Result<()> {
        match self.aggregator {
            Some(root) => broadcast(&self.group, &self.params, root),
            None => Ok(()),
        }
    }
}

/// Checks that all ranks hold the same regions of the same tensors. Collective: an all-gather.
#[track_caller]
fn check_regions<T: Element, B: Backend>(group: &Group<B>, params: &[Param<T, B>]) -> Result<()> {
    let (mut hashes, mut names) = (Vec::new(), Vec::new());
    for param in params {
        let regions = param.regions();
        let regions = regions.iter().map(|own| (&own.tensor, &own.region, own.row));
        let is_dense = param.value_mut().is_ok();
        hashes.push(truncated(hash((param.shape(), regions.collect::<Vec<_>>(), is_dense))));
        names.push(param.name());
    }
    let own = Tensor::from_slice(group.device(), [1, hashes.len()], &hashes)?;
    let all = group.all_gather(&own, 0, &Partition::even(group.size(), group.size()))?.to_vec()?;
    for (rank, theirs) in all.chunks_exact(hashes.len().max(1)).enumerate() {
        if let Some(at) = (0..hashes.len()).find(|&at| theirs[at] != all[at]) {
            let reason = format!(
                "ranks 0 and {rank} of {group:?} hold different regions of `{}`, or one of them has no dense store: is this \
                 the tensor-parallel group?",
                names[at]
            );
            return Err(Error::invalid("data parallel", reason));
        }
    }
    Ok(())
}

#[track_caller]
fn broadcast<T: Element, B: Backend>(group: &Group<B>, params: &[Param<T, B>], root: usize) -> Result<()> {
    let _site = Site::here().enter();
    params.iter().try_for_each(|param| {
        // The root does not change the revision of its value. So the root's optimizer keeps its
        // master weights, which are more precise than the value.
        if group.rank() != root {
            param.renew();
        }
        // `check_regions` has found that every rank holds these regions.
        group.broadcast_replica(root, &mut *param.value_mut()?)
    })
}
