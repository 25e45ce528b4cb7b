//! The gradient of a parameter.

use super::{
    BlockRegion, Param,
    sink::{self, Accumulate, GradSink, GradSum, GradTerm},
};
use crate::{
    device::{Device, Element},
    error::{Error, Result, same_shape},
    kernels::{Backend, MatMut},
    tensor::Tensor,
};
use std::{ops::Range, rc::Rc};

/// The gradient of a parameter and the state of the current step.
pub(super) struct Gradient<A: Element, B: Device> {
    sum: GradSum<A, B>,
    sink: Box<dyn GradSink<A, B>>,
    microbatches: usize,
    /// The number of terms added in this step: one for each use and microbatch.
    added: usize,
    /// How often the sum was added to, replaced or cleared.
    changes: u64,
    /// Whether nothing may use the gradient yet ([`Param::hold_grad`]).
    held: bool,
}

impl<A: Element, B: Backend> Gradient<A, B> {
    /// Makes a state without a gradient, with one microbatch a step. Terms are summed in the order
    /// of the calls.
    pub(super) fn new() -> Self {
        Self {
            sum: GradSum::of(None),
            sink: Box::new(Accumulate),
            microbatches: 1,
            added: 0,
            changes: 0,
            held: false,
        }
    }
}

impl<T: Element, B: Backend> Param<T, B> {
    /// Sums the gradient along a tree from now on. `blocks` has one list for each of this rank's
    /// canonical blocks: the regions of the parameter in that block. `None` means that every rank
    /// holds the whole parameter.
    pub(crate) fn sum_in_tree(&self, blocks: Option<Vec<Vec<BlockRegion>>>) {
        self.0.0.grad.borrow_mut().sink = Box::new(sink::Tree::new(self.name(), 0, 1));
        self.0.0.blocks.get_or_init(|| blocks);
    }

    /// Returns the argument of the first call of [`Param::sum_in_tree`], or `None` without a call.
    pub(crate) fn blocks(&self) -> Option<Option<&[Vec<BlockRegion>]>> {
        self.0.0.blocks.get().map(Option::as_deref)
    }

    /// Ends a step in progress ([`Param::settle`]), replaces the sink and returns the old sink. To
    /// wrap the old sink, call this again with a sink that contains it.
    ///
    /// # Errors
    /// As [`Param::settle`]. After an error the old sink stays.
    pub fn set_sink(&self, sink: Box<dyn GradSink<T::Acc, B>>) -> Result<Box<dyn GradSink<T::Acc, B>>> {
        self.settle()?;
        Ok(std::mem::replace(&mut self.0.0.grad.borrow_mut().sink, sink))
    }

    /// Calls the sink's [`GradSink::replicated`].
    pub(crate) fn replicated_sink(
        &self,
        replica: usize,
        replicas: usize,
    ) -> Result<Box<dyn GradSink<T::Acc, B>>> {
        self.0.0.grad.borrow().sink.replicated(self.name(), replica, replicas)
    }

    /// Sets the number of microbatches of a step. Each microbatch has its own backward, which adds
    /// to the gradient. A `count` of 0 means 1. With [`crate::shard::Reduction::Invariant`] the
    /// gradients of a step are summed along one tree. [`DataParallel`](crate::train::DataParallel)
    /// reduces the gradient after the last microbatch. Make the `DataParallel` after this call,
    /// because its constructor reads `count`.
    pub fn set_microbatches(&self, count: usize) {
        self.0.0.grad.borrow_mut().microbatches = count;
    }

    /// Returns the number of terms that a step adds to the gradient: uses · microbatches.
    pub(crate) fn uses(&self) -> usize {
        self.ties().saturating_mul(self.0.0.grad.borrow().microbatches.max(1))
    }

    /// Returns the number of layers that use the parameter ([`Param::tie`]).
    pub(crate) fn ties(&self) -> usize {
        Rc::strong_count(&self.0.0)
    }

    /// Returns the sum of the gradients since the last [`Param::zero_grad`], or `None` before the
    /// first backward. If the returned tensor still exists at the next backward, the backward
    /// copies the sum. With [`crate::shard::Reduction::Invariant`] the gradients of a step join the
    /// sum after the step's last microbatch ([`Param::set_microbatches`]) or in [`Param::settle`].
    pub fn grad(&self) -> Option<Tensor<T::Acc, B>> {
        self.0.0.grad.borrow().sum.total.clone()
    }

    /// Moves the gradient out. The caller can change it without a copy and pass it to
    /// [`Param::set_grad`].
    pub(crate) fn take_grad(&self) -> Option<Tensor<T::Acc, B>> {
        let grad = &mut *self.0.0.grad.borrow_mut();
        grad.changes += 1;
        grad.sum.total.take()
    }

    /// Returns how often the gradient was added to, replaced or cleared.
    #[cfg(feature = "privacy")]
    pub(crate) fn grad_changes(&self) -> u64 {
        self.0.0.grad.borrow().changes
    }

    /// Whether norms and optimizers refuse the gradient.
    #[cfg(feature = "privacy")]
    pub(crate) fn holds_grad(&self) -> bool {
        self.0.0.grad.borrow().held
    }

    /// Lets norms and optimizers refuse the gradient from now on, because private training has not
    /// added its noise yet; or lets them use it again.
    #[cfg(feature = "privacy")]
    pub(crate) fn hold_grad(&self, hold: bool) {
        self.0.0.grad.borrow_mut().held = hold;
    }

    /// Replaces the gradient.
    ///
    /// # Errors
    /// When the gradient's shape is not the parameter's.
    pub fn set_grad(&self, grad: Tensor<T::Acc, B>) -> Result<()> {
        self.check_grad(&grad)?;
        let state = &mut *self.0.0.grad.borrow_mut();
        state.sum = GradSum::of(Some(grad));
        state.changes += 1;
        Ok(())
    }

    /// Clears the gradient.
    pub fn zero_grad(&self) {
        let mut grad = self.0.0.grad.borrow_mut();
        (grad.sum, grad.added) = (GradSum::of(None), 0);
        grad.changes += 1;
        grad.sink.clear();
    }

    /// Adds one term to the gradient.
    ///
    /// # Errors
    /// When the shape is not the parameter's, or the sink fails. In private training, because the
    /// gradients of samples cannot be computed from their sum.
    pub fn add_grad(&self, grad: Tensor<T::Acc, B>) -> Result<()> {
        self.check_grad(&grad)?;
        self.check_not_kept()?;
        let mut grad = Some(grad);
        self.add(None, &mut |_, sum| grad.take().map_or(Ok(()), |grad| sink::add_term(sum, grad)))
    }

    /// Adds one term, a sum over `tokens` tokens. `grad` computes the sum over a range of tokens.
    ///
    /// # Errors
    /// When `grad` or the sink fails.
    pub(crate) fn add_grad_over(
        &self,
        tokens: usize,
        mut grad: impl FnMut(Range<usize>) -> Result<Tensor<T::Acc, B>>,
    ) -> Result<()> {
        self.check_not_kept()?;
        self.add(Some(tokens), &mut |tokens, sum| {
            let grad = grad(tokens)?;
            self.check_grad(&grad)?;
            sink::add_term(sum, grad)
        })
    }

    /// Adds one term, a matrix product over `tokens` tokens. `write` computes `sum = β sum + …` in
    /// place over a range of tokens. β is 0 for a new sum and 1 otherwise.
    ///
    /// # Errors
    /// When `write` or the sink fails.
    pub(crate) fn add_product_over(
        &self,
        tokens: usize,
        mut write: impl FnMut(Range<usize>, f64, MatMut<'_, T::Acc, B>) -> Result<()>,
    ) -> Result<()> {
        let of = (&self.0.0.device, self.0.0.shape);
        self.check_not_kept()?;
        self.add(Some(tokens), &mut |tokens, sum| {
            sink::add_product(sum, of, |beta, dw| write(tokens, beta, dw))
        })
    }

    /// Checks that the gradient does not need a term of each sample.
    fn check_not_kept(&self) -> Result<()> {
        if !self.keeps_terms() {
            return Ok(());
        }
        let reason = format!(
            "a layer adds to {} without the gradient of each sample, which private training needs: pass the \
             terms to `Param::keep_term`",
            self.name()
        );
        Err(Error::Unsupported { op: "gradient", reason })
    }

    fn check_grad(&self, grad: &Tensor<T::Acc, B>) -> Result<()> {
        same_shape("gradient", self.name(), self.0.0.shape.dims(), "its gradient", grad.shape().dims())
    }

    /// Adds one term, unless the parameter is frozen.
    pub(super) fn add(&self, tokens: Option<usize>, add: sink::AddTokens<'_, T::Acc, B>) -> Result<()> {
        if self.is_quantized() {
            return Ok(());
        }
        let uses = self.uses();
        let grad = &mut *self.0.0.grad.borrow_mut();
        let term = GradTerm { name: self.name(), index: grad.added, uses, tokens, add };
        grad.changes += 1;
        grad.sink.add(term, &mut grad.sum)?;
        self.check_sum(&mut grad.sum)?;
        grad.added += 1;
        if grad.added < uses { Ok(()) } else { self.end_step(grad) }
    }

    /// Calls [`GradSink::finish`] after the last term of a step.
    fn end_step(&self, grad: &mut Gradient<T::Acc, B>) -> Result<()> {
        grad.sink.finish(&mut grad.sum)?;
        grad.added = 0;
        self.check_sum(&mut grad.sum)
    }

    /// Checks that the sum that a sink has computed has the parameter's shape. Otherwise clears the
    /// sum.
    fn check_sum(&self, sum: &mut GradSum<T::Acc, B>) -> Result<()> {
        let checked = sum.total.as_ref().map_or(Ok(()), |sum| self.check_grad(sum));
        if checked.is_err() {
            sum.total = None;
        }
        checked
    }

    /// Ends a step that had fewer backwards than [`Param::set_microbatches`] set. Does nothing if
    /// no step is in progress. Optimizers and norms call this.
    ///
    /// # Errors
    /// When the gradient is summed along a tree over several replicas, because the sum would lack
    /// terms. Also as [`GradSink::finish`].
    pub fn settle(&self) -> Result<()> {
        let grad = &mut *self.0.0.grad.borrow_mut();
        if grad.added == 0 { Ok(()) } else { self.end_step(grad) }
    }

    /// Ends the step ([`Param::settle`]) and checks that the gradient needs no reduction over
    /// replicas.
    ///
    /// # Errors
    /// As [`Param::settle`], when partial sums are not reduced over the replicas yet, and when the
    /// gradient still lacks the noise of private training.
    pub(crate) fn check_complete(&self, op: &'static str) -> Result<()> {
        self.settle()?;
        if self.0.0.grad.borrow().held {
            let reason = format!(
                "the gradient of {} has no noise yet: a step of private training was not released",
                self.name()
            );
            return Err(Error::invalid(op, reason));
        }
        if !self.0.0.grad.borrow().sum.partials.is_empty() {
            let reason = format!("terms of {} are not summed over its replicas yet", self.name());
            return Err(Error::invalid(op, reason));
        }
        Ok(())
    }

    /// Moves out this replica's partial sums of the gradient, one for each sub-tree that the
    /// replica has in the tree over all replicas. Returns an empty list before the first backward.
    pub(crate) fn take_terms(&self) -> Vec<Tensor<T::Acc, B>> {
        let grad = &mut *self.0.0.grad.borrow_mut();
        grad.changes += 1;
        let sum = &mut grad.sum;
        let partials = std::mem::take(&mut sum.partials);
        if partials.is_empty() { sum.total.take().into_iter().collect() } else { partials }
    }
}
