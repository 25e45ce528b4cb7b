//! Data parallelism: replicas of a model that see different samples.

use super::{
    buckets::{Bucket, Buckets, Target},
    drift::exact,
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

/// How the ranks' gradients become one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum GradReduce {
    /// Their sum: right where every rank has divided its loss by the size of the whole batch.
    Sum,
    /// Σ wᵣ gᵣ / Σ wᵣ, with this rank's weight: 1 for the plain average, the number of samples where each rank has the mean
    /// over its own.
    Mean {
        /// This rank's weight.
        weight: f64,
    },
}

/// Replicas of a model over a group: equal parameters, gradients reduced to equal ones after each backward.
///
/// Gradients are copied to flat buckets in the order in which a backward finishes them; each bucket is reduced as soon as
/// it is full, while the backward goes on. Buckets start in the same order on all ranks. Gradients stay in the
/// accumulator.
///
/// ```text
/// replicas.begin(GradReduce::Sum)?;       // the backward between `begin` and `finish` is the one that is reduced;
/// model.backward(…)?;                     // earlier ones only accumulate (PyTorch's `no_sync`)
/// replicas.finish()?;
/// optimizer.step(&model.params(), lr, 1.0)?;
/// ```
///
/// With a *central aggregator* ([`DataParallel::central`]) gradients are reduced to one rank; that one steps, and
/// [`DataParallel::publish`] sends its parameters to the others. The results are the same, bit for bit.
///
/// With [`Reduction::Invariant`] on the group, the terms of a gradient, one a microbatch and use
/// ([`crate::tensor::Param::set_microbatches`], set before the model is wrapped), of all replicas
/// are summed along one tree: 2 replicas of 2 microbatches give the bits of one with 4. Buckets are
/// as above where two replicas have one sub-tree each; else each parameter is reduced in
/// [`DataParallel::finish`].
///
/// A parameter that has a gradient on some replicas counts as 0 on the others. One that has none on
/// any replica has none afterwards, so that optimizers leave it alone, as on one device.
///
/// Collectives: at the start an all-gather of one number a parameter and a broadcast of each; an
/// all-reduce a bucket, with a number for each of its parameters (reduce-scatter with one receiver,
/// and a broadcast a parameter, with the aggregator); with [`GradReduce::Mean`] one of a number.
/// Where parameters are reduced one by one, an all-reduce of a number for each comes first.
///
/// Source: Li et al., 2020: PyTorch Distributed, section 3.2.
pub struct DataParallel<T: Element, B: Backend> {
    group: Group<B>,
    params: Vec<Param<T, B>>,
    buckets: Rc<Buckets<T, B>>,
    aggregator: Option<usize>,
}

/// PyTorch's 25 MiB.
const BUCKET: usize = 25 << 20;

impl<T: Element, B: Backend> DataParallel<T, B> {
    /// Gives every rank of the group rank 0's values of these parameters, whose gradients go into
    /// buckets from now on. When it is dropped, gradients stay on their ranks; with an invariant
    /// reduction their sinks await the other replicas until they are replicated anew.
    ///
    /// # Errors
    /// When the ranks hold different parameters, or different parts of one, as over a
    /// tensor-parallel group; when one is not kept as a dense tensor (list the others), or has a
    /// sink that does not sum along a tree; or a collective fails.
    #[track_caller]
    pub fn new(group: &Group<B>, params: &[Param<T, B>]) -> Result<Self> {
        Self::with(group, params, None, BUCKET)
    }

    /// As [`DataParallel::new`], with buckets of at most so many bytes.
    ///
    /// # Errors
    /// As there.
    #[track_caller]
    pub fn with_buckets(group: &Group<B>, params: &[Param<T, B>], bytes: usize) -> Result<Self> {
        Self::with(group, params, None, bytes)
    }

    /// With gradients reduced to the rank `aggregator`, which alone has them after [`DataParallel::finish`].
    ///
    /// # Errors
    /// When there is no such rank, and as [`DataParallel::new`].
    #[track_caller]
    pub fn central(group: &Group<B>, params: &[Param<T, B>], aggregator: usize) -> Result<Self> {
        if aggregator >= group.size() {
            let reason = format!("aggregator {aggregator} of a group of {}", group.size());
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
        // What a parameter refuses, it refuses before any of them is changed.
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
        check_parts(group, params)?;
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

    /// The gradients of the backward that follows, with what has accumulated before, are reduced.
    ///
    /// # Errors
    /// When the weights' sum is not positive, terms of an earlier step are missing, or a collective
    /// fails.
    #[track_caller]
    pub fn begin(&self, reduce: GradReduce) -> Result<()> {
        let weight = match reduce {
            GradReduce::Sum => 1.0,
            GradReduce::Mean { .. } if self.group.size() > 1 && self.group.reduction() != Reduction::Fast => {
                let reason = "a mean over replicas under an invariant reduction: divide the loss by the size of the whole batch";
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

    /// Waits for the reductions. The parameters have the reduced gradients then; with an
    /// aggregator, only its own. Those without a gradient on any rank have none.
    ///
    /// A rank that had no sample for this step calls `begin` and `finish` without a backward.
    ///
    /// # Errors
    /// When `begin` was not called, or a collective fails.
    #[track_caller]
    pub fn finish(&self) -> Result<()> {
        let _site = Site::here().enter();
        self.buckets.finish(&self.params)
    }

    /// The sum over all replicas of a number for each of their microbatches, such as its loss, on every rank. With an
    /// invariant reduction it is made along the tree over all microbatches; every replica has as many of them then.
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
        let cut = Partition::from_sizes(vec![count; group.size()]);
        let all: Vec<f64> = group.all_gather(&own, 0, &cut)?.to_vec()?;
        let mut sum = TreeSum::new(all.len());
        for (leaf, value) in all.into_iter().enumerate() {
            sum.push(Node::leaf(leaf), value, |left, right| {
                *left += right;
                Ok(())
            })?;
        }
        Ok(sum.values().into_iter().sum())
    }

    /// Whether this rank makes the optimizer's steps: every one does, or the aggregator.
    pub fn steps(&self) -> bool {
        self.aggregator.is_none_or(|rank| rank == self.group.rank())
    }

    /// Gives every rank the aggregator's parameters. Without an aggregator, they are equal already.
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

/// Refuses ranks whose parameters are not the same parts of the same tensors. Collective: an all-gather.
#[track_caller]
fn check_parts<T: Element, B: Backend>(group: &Group<B>, params: &[Param<T, B>]) -> Result<()> {
    let (mut parts, mut names) = (Vec::new(), Vec::new());
    for param in params {
        let regions = param.regions();
        let regions = regions.iter().map(|part| (&part.tensor, &part.region, part.row));
        let is_dense = param.value_mut().is_ok();
        parts.push(exact(hash((param.shape(), regions.collect::<Vec<_>>(), is_dense))));
        names.push(param.name());
    }
    let own = Tensor::from_slice(group.device(), [1, parts.len()], &parts)?;
    let all = group.all_gather(&own, 0, &Partition::even(group.size(), group.size()))?.to_vec()?;
    for (rank, theirs) in all.chunks_exact(parts.len().max(1)).enumerate() {
        if let Some(at) = (0..parts.len()).find(|&at| theirs[at] != all[at]) {
            let reason = format!(
                "ranks 0 and {rank} of {group:?} hold different parts of `{}`, or one holds it in a store that is not dense: is it \
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
        // The sender's value is not a new one: its master weights are more than the value's.
        if group.rank() != root {
            param.renew();
        }
        group.broadcast(root, &mut *param.value_mut()?)
    })
}
