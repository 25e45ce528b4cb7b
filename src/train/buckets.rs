//! Buckets: flat buffers of gradients. The reduction of a bucket starts as soon as the bucket is
//! full and the reductions of all buckets before it have started.

use crate::{
    comm::{Group, Pending, ReduceOp},
    device::{Accumulator, Device, Element},
    error::{Error, Result, Site},
    kernels::{Backend, MatMut, MatRef},
    shard::{Partition, Tree},
    tensor::{GradSink, GradSum, GradTerm, Param, Tensor},
};
use std::{
    cell::RefCell,
    rc::{Rc, Weak},
};

/// The ranks that receive the reduced gradients.
#[derive(Clone, Copy, Debug)]
pub(super) enum Target {
    /// Every rank.
    All,
    /// One rank.
    Root(usize),
}

/// The buckets of a model's gradients.
///
/// A bucket holds the gradients of some parameters contiguously. The first bucket has the gradients
/// of the last parameters, which the backward finishes first. After the gradients, a bucket has a
/// flag for each of its parameters: 1 if the rank has a gradient, else 0. The sum of a flag over
/// the ranks is the number of ranks that have that gradient. The ranks may fill the buckets in
/// different orders. But every rank starts the reductions in the order of the buckets, because all
/// ranks have to make their collectives in the same order.
pub(super) struct Buckets<T: Element, B: Device> {
    group: Group<B>,
    target: Target,
    /// For each parameter, its bucket, its offset in the bucket, and its number of elements.
    places: Vec<(usize, usize, usize)>,
    lengths: Vec<usize>,
    /// For each parameter, the tree over the terms of all replicas. `None` without an invariant
    /// reduction, and also if every tree has two replicas with one sub-tree each.
    trees: Option<Vec<Tree>>,
    round: RefCell<Option<Round<T, B>>>,
}

/// A reduction in progress.
struct Round<T: Element, B: Device> {
    /// The factor that multiplies this rank's gradients.
    weight: f64,
    /// The call site of `begin`. Errors of the collectives name it, because the backward of any
    /// layer may start them.
    site: Site,
    /// Whether each parameter has a gradient on this rank.
    present: Vec<bool>,
    /// Whether the backward of each parameter is complete.
    ready: Vec<bool>,
    filling: Vec<Filling<T, B>>,
    started: Vec<Pending<T::Acc, B>>,
}

/// Assigns parameters of these numbers of elements to buckets of at most `capacity` elements, in
/// the reverse order of `lengths`. Returns each parameter's bucket, offset and length, and the
/// lengths of the buckets.
pub(crate) fn assign(lengths: &[usize], capacity: usize) -> (Vec<(usize, usize, usize)>, Vec<usize>) {
    let (mut places, mut filled) = (vec![(0, 0, 0); lengths.len()], Vec::<usize>::new());
    for (number, &len) in lengths.iter().enumerate().rev() {
        match filled.last_mut() {
            Some(last) if *last + len <= capacity.max(1) => {
                *last += len;
                places[number] = (filled.len() - 1, filled[filled.len() - 1] - len, len);
            }
            _ => {
                places[number] = (filled.len(), 0, len);
                filled.push(len);
            }
        }
    }
    (places, filled)
}

/// A bucket whose reduction has not started.
struct Filling<T: Element, B: Device> {
    flat: Option<Tensor<T::Acc, B>>,
    /// The number of the bucket's parameters whose gradients are not ready.
    missing: usize,
}

impl<T: Element, B: Backend> Buckets<T, B> {
    /// Assigns parameters to buckets of at most `bytes` bytes, in the reverse order of `lengths`. A
    /// larger parameter has a bucket of its own. With an invariant reduction, `trees` has the tree
    /// of each parameter.
    pub(super) fn new(
        group: &Group<B>,
        target: Target,
        lengths: &[usize],
        trees: Option<Vec<Tree>>,
        bytes: usize,
    ) -> Self {
        let (places, filled) = assign(lengths, bytes / T::Acc::DTYPE.size());
        // Two replicas with one sub-tree each need no tree, because a sum of two numbers has only
        // one order.
        let pair = |tree: &Tree| tree.ranks() == 2 && (0..2).all(|rank| tree.nodes(rank).len() == 1);
        let trees = trees.filter(|trees| !trees.iter().all(pair));
        Self { group: group.clone(), target, places, lengths: filled, trees, round: RefCell::new(None) }
    }

    /// Begins a round, in which gradients that become ready are multiplied by `weight` and reduced.
    pub(super) fn begin(&self, weight: f64, site: Site) {
        // The gradients of a single rank are already the sum.
        if self.group.size() == 1 {
            return;
        }
        let filling = (0..self.lengths.len())
            .map(|bucket| Filling { flat: None, missing: self.members(bucket).count() })
            .collect();
        let (present, ready) = (vec![false; self.places.len()], vec![false; self.places.len()]);
        let round = Round { weight, site, present, ready, filling, started: Vec::new() };
        *self.round.borrow_mut() = Some(round);
    }

    /// Whether a round is in progress.
    #[cfg(feature = "privacy")]
    pub(super) fn has_begun(&self) -> bool {
        self.round.borrow().is_some()
    }

    /// Returns the indices of a bucket's parameters, in the order of their offsets.
    fn members(&self, bucket: usize) -> impl Iterator<Item = usize> {
        (0..self.places.len()).rev().filter(move |&number| self.places[number].0 == bucket)
    }

    /// Makes a bucket of zeros.
    fn empty(&self, bucket: usize) -> Result<Tensor<T::Acc, B>> {
        Tensor::zeros(self.group.device(), [1, self.lengths[bucket] + self.members(bucket).count()])
    }

    /// Sets each parameter's gradient to the sum along its tree over the terms of all replicas.
    fn finish_trees(&self, trees: &[Tree], params: &[Param<T, B>]) -> Result<()> {
        let (group, mut own) = (&self.group, Vec::new());
        for param in params {
            own.push(param.take_terms());
        }
        let present: Vec<_> = own.iter().map(|terms| flag::<T>(!terms.is_empty())).collect();
        let present = group.all_reduce_host(ReduceOp::Max, &present)?;
        // Each of these lists has one item for each parameter.
        for ((param, tree), (mut terms, present)) in
            params.iter().zip(trees).zip(own.into_iter().zip(present))
        {
            if present == flag::<T>(false) {
                continue;
            }
            if terms.is_empty() {
                // A replica without samples contributes zeros.
                let zeros = |_| Tensor::zeros(group.device(), param.shape());
                terms = tree.nodes(group.rank()).into_iter().map(zeros).collect::<Result<_>>()?;
            }
            let sum = group.tree_all_reduce(tree, terms)?;
            match self.target {
                Target::Root(root) if root != group.rank() => param.zero_grad(),
                _ => param.set_grad(sum)?,
            }
        }
        Ok(())
    }

    /// Records that the backward of parameter `number` is complete. Copies the gradient, if any, to
    /// its bucket, and starts the reductions of full buckets.
    fn ready(&self, number: usize, grad: Option<&Tensor<T::Acc, B>>) -> Result<()> {
        let current = &mut *self.round.borrow_mut();
        // Outside a round gradients only accumulate. With trees, `finish` reduces them.
        let Some(mut round) = current.take_if(|_| self.trees.is_none()) else { return Ok(()) };
        let bucket = self.places[number].0;
        if round.started.len() > bucket {
            return Err(Error::invalid(
                "data parallel",
                "a backward added to a gradient after its reduction had started: run one backward between `begin` and `finish`, with one `add_grad` for each use",
            ));
        }
        self.fill(&mut round, number, grad)?;
        self.start(&mut round, false)?;
        // An error above drops the round, and `finish` then returns an error.
        *current = Some(round);
        Ok(())
    }

    /// Starts the reductions of full buckets in order, and stops at the first bucket that is not
    /// full. With `all`, starts the reductions of all buckets.
    fn start(&self, round: &mut Round<T, B>, all: bool) -> Result<()> {
        let _site = round.site.enter();
        while let Some(next) = round.filling.get_mut(round.started.len()) {
            if next.missing > 0 && !all {
                break;
            }
            let (device, bucket) = (self.group.device(), round.started.len());
            let mut flat = next.flat.take().map_or_else(|| self.empty(bucket), Ok)?;
            let (len, end) = (self.lengths[bucket], flat.len());
            if round.weight != 1.0 {
                device.scale(round.weight, flat.mat_mut()?.columns(0..len))?;
            }
            let present: Vec<_> =
                self.members(bucket).map(|number| flag::<T>(round.present[number])).collect();
            let present = Tensor::<T::Acc, B>::from_slice(device, [present.len()], &present)?;
            device.copy(present.mat(), flat.mat_mut()?.columns(len..end))?;
            round.started.push(match self.target {
                Target::All => self.group.start_all_reduce(ReduceOp::Sum, flat)?,
                Target::Root(root) => {
                    let len = flat.len();
                    let sizes = (0..self.group.size()).map(|rank| if rank == root { len } else { 0 });
                    let partition = Partition::from_sizes(sizes);
                    self.group.start_reduce_scatter(ReduceOp::Sum, flat, 1, &partition)?
                }
            });
        }
        Ok(())
    }

    /// Returns the number of ranks that have a gradient of each parameter. The counts are
    /// downloaded together, because each download synchronizes with the device.
    fn counts(&self, reduced: &[Tensor<T::Acc, B>], own: &[bool]) -> Result<Vec<T::Acc>> {
        if !B::HAS_VALUES {
            // Without values, assume that all ranks have the same gradients as this rank.
            return Ok(own.iter().map(|&present| flag::<T>(present)).collect());
        }
        let (device, count) = (self.group.device(), self.places.len());
        let (mut all, mut at) = (Tensor::<T::Acc, B>::empty(device, [count])?, 0);
        for (flat, &len) in reduced.iter().zip(&self.lengths) {
            let own = flat.mat().columns(len..flat.len());
            let next = at + own.cols();
            device.copy(own, all.mat_mut()?.columns(at..next))?;
            at = next;
        }
        // Buckets hold the parameters in reverse order.
        Ok(all.to_vec()?.into_iter().rev().collect())
    }

    /// Waits for all reductions and sets the parameters' gradients to the results. If the target is
    /// one rank, clears the gradients on all ranks but that one. If no rank had a gradient of a
    /// parameter, the parameter has none afterwards.
    ///
    /// If no backward has finished a gradient since `begin`, the gradient that was accumulated
    /// before `begin` is reduced. A rank without a gradient, for example without samples,
    /// contributes zeros.
    pub(super) fn finish(&self, params: &[Param<T, B>]) -> Result<()> {
        const OP: &str = "data parallel";
        // `settle` ends a step with fewer microbatches than set, so that its gradients become
        // ready.
        let settled = params.iter().try_for_each(Param::settle);
        let round = self.round.borrow_mut().take();
        settled?;
        if self.group.size() == 1 {
            return Ok(());
        }
        let mut round =
            round.ok_or_else(|| Error::invalid(OP, "`finish` without `begin`, or after an error"))?;
        if let Some(trees) = &self.trees {
            return self.finish_trees(trees, params);
        }
        for (number, (param, &(bucket, ..))) in params.iter().zip(&self.places).enumerate() {
            let late = bucket >= round.started.len() && round.filling[bucket].missing > 0;
            if late {
                self.fill(&mut round, number, param.grad().as_ref())?;
            }
        }
        self.start(&mut round, true)?;
        let reduced = round.started.into_iter().map(Pending::wait).collect::<Result<Vec<_>>>()?;
        let here = match self.target {
            Target::All => true,
            Target::Root(root) => self.group.rank() == root,
        };
        let counts = if here { self.counts(&reduced, &round.present)? } else { Vec::new() };
        for (number, (param, &(bucket, start, len))) in params.iter().zip(&self.places).enumerate() {
            if !here {
                param.zero_grad();
                continue;
            }
            if counts[number] == flag::<T>(false) {
                continue;
            }
            let device = self.group.device();
            let mut grad = Tensor::<T::Acc, B>::empty(device, param.shape())?;
            let own = MatRef::new(B::narrow(reduced[bucket].slice(), start..start + len), 1, len)?;
            device.copy(own, MatMut::<T::Acc, B>::new(grad.slice_mut()?, 1, len)?)?;
            param.set_grad(grad)?;
        }
        Ok(())
    }

    /// Copies a gradient to its bucket. A second call overwrites the first copy, because each call
    /// passes the whole accumulated gradient.
    fn fill(&self, round: &mut Round<T, B>, number: usize, grad: Option<&Tensor<T::Acc, B>>) -> Result<()> {
        let (bucket, start, len) = self.places[number];
        let device = self.group.device();
        let filling = &mut round.filling[bucket];
        if !std::mem::replace(&mut round.ready[number], true) {
            filling.missing -= 1;
        }
        let Some(grad) = grad else { return Ok(()) };
        round.present[number] = true;
        let flat = match &mut filling.flat {
            Some(flat) => flat,
            none => none.insert(self.empty(bucket)?),
        };
        device.copy(
            MatRef::<T::Acc, B>::new(grad.slice(), 1, len)?,
            flat.mat_mut()?.block(0..1, start..start + len),
        )
    }
}

/// Returns the flag of a parameter: 1 if this rank has its gradient, else 0.
fn flag<T: Element>(present: bool) -> T::Acc {
    if present { T::Acc::ONE } else { T::Acc::ZERO }
}

/// A sink that forwards to another sink and copies a complete gradient to its bucket.
pub(super) struct Bucket<T: Element, B: Backend> {
    sum: Box<dyn GradSink<T::Acc, B>>,
    /// The buckets, which the [`super::DataParallel`] owns. After the `DataParallel` is dropped,
    /// this sink only forwards to the other sink.
    buckets: Weak<Buckets<T, B>>,
    /// The index of the parameter.
    number: usize,
}

impl<T: Element, B: Backend> Bucket<T, B> {
    pub(super) fn new(sum: Box<dyn GradSink<T::Acc, B>>, buckets: &Rc<Buckets<T, B>>, number: usize) -> Self {
        Self { sum, buckets: Rc::downgrade(buckets), number }
    }
}

impl<T: Element, B: Backend> GradSink<T::Acc, B> for Bucket<T, B> {
    fn add(&mut self, grad: GradTerm<'_, T::Acc, B>, sum: &mut GradSum<T::Acc, B>) -> Result<()> {
        self.sum.add(grad, sum)
    }

    fn finish(&mut self, sum: &mut GradSum<T::Acc, B>) -> Result<()> {
        self.sum.finish(sum)?;
        self.buckets.upgrade().map_or(Ok(()), |buckets| buckets.ready(self.number, sum.total.as_ref()))
    }

    fn clear(&mut self) {
        self.sum.clear();
    }

    fn replicated(
        &self,
        param: &str,
        replica: usize,
        replicas: usize,
    ) -> Result<Box<dyn GradSink<T::Acc, B>>> {
        self.sum.replicated(param, replica, replicas)
    }
}
