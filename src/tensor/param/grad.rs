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
    /// The number of uses of this step that have been added.
    added: usize,
}

impl<A: Element, B: Backend> Gradient<A, B> {
    /// No gradient, one microbatch a step, summed in the order of the calls.
    pub(super) fn new() -> Self {
        Self { sum: GradSum::of(None), sink: Box::new(Accumulate), microbatches: 1, added: 0 }
    }
}

impl<T: Element, B: Backend> Param<T, B> {
    /// Sums the gradient along a tree from now on. `blocks` are the regions of the parameter in
    /// each of this rank's canonical blocks, or none if every rank holds the whole parameter.
    pub(crate) fn sum_in_tree(&self, blocks: Option<Vec<Vec<BlockRegion>>>) {
        self.0.0.grad.borrow_mut().sink = Box::new(sink::Tree::new(self.name(), 0, 1));
        self.0.0.blocks.get_or_init(|| blocks);
    }

    /// Returns the argument of [`Param::sum_in_tree`], or none if that was not called.
    pub(crate) fn blocks(&self) -> Option<Option<&[Vec<BlockRegion>]>> {
        self.0.0.blocks.get().map(Option::as_deref)
    }

    /// Replaces the sink and returns the old one, which a wrapping sink may forward to. Ends a step
    /// in progress ([`Param::settle`]).
    ///
    /// # Errors
    /// As [`Param::settle`]; the old sink stays then.
    pub fn set_sink(&self, sink: Box<dyn GradSink<T::Acc, B>>) -> Result<Box<dyn GradSink<T::Acc, B>>> {
        self.settle()?;
        Ok(std::mem::replace(&mut self.0.0.grad.borrow_mut().sink, sink))
    }

    /// Calls [`GradSink::replicated`] of the sink.
    pub(crate) fn replicated_sink(
        &self,
        replica: usize,
        replicas: usize,
    ) -> Result<Box<dyn GradSink<T::Acc, B>>> {
        self.0.0.grad.borrow().sink.replicated(self.name(), replica, replicas)
    }

    /// Sets the number of microbatches, each with its own backward, that add to the gradient in a
    /// step; at least 1. With [`crate::shard::Reduction::Invariant`] their gradients are summed
    /// along one tree. [`DataParallel`](crate::train::DataParallel) reduces the gradient after the
    /// last one, and has to be made after this call.
    pub fn set_microbatches(&self, count: usize) {
        self.0.0.grad.borrow_mut().microbatches = count;
    }

    /// Returns the number of terms that are added to the gradient in a step.
    pub(crate) fn uses(&self) -> usize {
        let ties = Rc::strong_count(&self.0.0);
        ties.saturating_mul(self.0.0.grad.borrow().microbatches.max(1))
    }

    /// Returns the sum of the gradients since the last [`Param::zero_grad`], or none before the
    /// first backward. The next backward copies the sum if this tensor still exists. With
    /// [`crate::shard::Reduction::Invariant`] it is none until the last microbatch of a step
    /// ([`Param::set_microbatches`]), or until [`Param::settle`].
    pub fn grad(&self) -> Option<Tensor<T::Acc, B>> {
        self.0.0.grad.borrow().sum.total.clone()
    }

    /// Takes the gradient, to change it without a copy and set it again.
    pub(crate) fn take_grad(&self) -> Option<Tensor<T::Acc, B>> {
        self.0.0.grad.borrow_mut().sum.total.take()
    }

    /// Replaces the gradient.
    ///
    /// # Errors
    /// When its shape is not the parameter's.
    pub fn set_grad(&self, grad: Tensor<T::Acc, B>) -> Result<()> {
        self.check_grad(&grad)?;
        self.0.0.grad.borrow_mut().sum = GradSum::of(Some(grad));
        Ok(())
    }

    /// Clears the gradient.
    pub fn zero_grad(&self) {
        let mut grad = self.0.0.grad.borrow_mut();
        (grad.sum, grad.added) = (GradSum::of(None), 0);
        grad.sink.clear();
    }

    /// Adds to the gradient.
    ///
    /// # Errors
    /// When the shape is not the parameter's, or the sink fails.
    pub fn add_grad(&self, grad: Tensor<T::Acc, B>) -> Result<()> {
        self.check_grad(&grad)?;
        let mut grad = Some(grad);
        self.add(None, &mut |_, sum| grad.take().map_or(Ok(()), |grad| sink::add_term(sum, grad)))
    }

    /// Adds a gradient that is a sum over `tokens` tokens. `grad` computes it over a range of them.
    ///
    /// # Errors
    /// Those of `grad` and of the sink.
    pub(crate) fn add_grad_over(
        &self,
        tokens: usize,
        mut grad: impl FnMut(Range<usize>) -> Result<Tensor<T::Acc, B>>,
    ) -> Result<()> {
        self.add(Some(tokens), &mut |tokens, sum| {
            let grad = grad(tokens)?;
            self.check_grad(&grad)?;
            sink::add_term(sum, grad)
        })
    }

    /// Adds a gradient that is a product over `tokens` tokens. `write` computes `sum = β sum + …`
    /// over a range of them in place; β is 0 for a new sum and 1 otherwise.
    ///
    /// # Errors
    /// Those of `write` and of the sink.
    pub(crate) fn add_product_over(
        &self,
        tokens: usize,
        mut write: impl FnMut(Range<usize>, f64, MatMut<'_, T::Acc, B>) -> Result<()>,
    ) -> Result<()> {
        let of = (&self.0.0.device, self.0.0.shape);
        self.add(Some(tokens), &mut |tokens, sum| {
            sink::add_product(sum, of, |beta, dw| write(tokens, beta, dw))
        })
    }

    fn check_grad(&self, grad: &Tensor<T::Acc, B>) -> Result<()> {
        same_shape("gradient", self.name(), self.0.0.shape.dims(), "its gradient", grad.shape().dims())
    }

    fn add(&self, tokens: Option<usize>, add: sink::AddTokens<'_, T::Acc, B>) -> Result<()> {
        let uses = self.uses();
        let grad = &mut *self.0.0.grad.borrow_mut();
        let term = GradTerm { name: self.name(), index: grad.added, uses, tokens, add };
        grad.sink.add(term, &mut grad.sum)?;
        self.check_sum(&mut grad.sum)?;
        grad.added += 1;
        if grad.added < uses { Ok(()) } else { self.end_step(grad) }
    }

    /// Finishes the sink after the last term of a step.
    fn end_step(&self, grad: &mut Gradient<T::Acc, B>) -> Result<()> {
        grad.sink.finish(&mut grad.sum)?;
        grad.added = 0;
        self.check_sum(&mut grad.sum)
    }

    /// Checks the shape of the sum that a sink has made, and clears a wrong one.
    fn check_sum(&self, sum: &mut GradSum<T::Acc, B>) -> Result<()> {
        let checked = sum.total.as_ref().map_or(Ok(()), |sum| self.check_grad(sum));
        if checked.is_err() {
            sum.total = None;
        }
        checked
    }

    /// Ends a step that has had fewer backwards than [`Param::set_microbatches`] sets. Optimizers
    /// and norms call it.
    ///
    /// # Errors
    /// When terms of other replicas would be missing, and as [`GradSink::finish`].
    pub fn settle(&self) -> Result<()> {
        let grad = &mut *self.0.0.grad.borrow_mut();
        if grad.added == 0 { Ok(()) } else { self.end_step(grad) }
    }

    /// Ends the step ([`Param::settle`]) and checks that no reduction over replicas is missing.
    ///
    /// # Errors
    /// As [`Param::settle`], and when sums of sub-trees are not reduced over the replicas yet.
    pub(crate) fn check_complete(&self, op: &'static str) -> Result<()> {
        self.settle()?;
        if !self.0.0.grad.borrow().sum.partials.is_empty() {
            let reason = format!("terms of {} are not summed over its replicas yet", self.name());
            return Err(Error::invalid(op, reason));
        }
        Ok(())
    }

    /// Takes the sums of this replica's sub-trees of the gradient; empty before the first backward.
    pub(crate) fn take_terms(&self) -> Vec<Tensor<T::Acc, B>> {
        let sum = &mut self.0.0.grad.borrow_mut().sum;
        let partials = std::mem::take(&mut sum.partials);
        if partials.is_empty() { sum.total.take().into_iter().collect() } else { partials }
    }
}
