//! Where the gradient of a parameter goes.

use crate::{
    device::{Device, Element},
    error::{Error, Result, same_shape},
    kernels::{Backend, MatMut},
    shard::{Node, Shape, TreeSum},
    tensor::Tensor,
};
use std::ops::Range;

const OP: &str = "gradient";

/// A sum of gradients; none before the first.
type Sum<A, B> = Option<Tensor<A, B>>;

/// What a sink has made of a parameter's gradients.
pub struct GradSum<A: Element, B: Device> {
    /// What [`Param::grad`](super::Param::grad) gives; none before there is anything.
    pub total: Option<Tensor<A, B>>,
    /// With an invariant reduction over replicas, this replica's partial sums, not reduced yet.
    pub(super) open: Vec<Tensor<A, B>>,
}

impl<A: Element, B: Device> GradSum<A, B> {
    /// A sum that awaits nothing.
    pub(super) fn of(total: Option<Tensor<A, B>>) -> Self {
        Self { total, open: Vec::new() }
    }
}

/// Adds to a sum the gradient over some of the tokens.
pub(super) type AddTokens<'a, A, B> = &'a mut dyn FnMut(Range<usize>, &mut Sum<A, B>) -> Result<()>;

/// What becomes of a parameter's gradient: by default [`Accumulate`], and for layers of a group
/// with an invariant reduction a sum along a tree.
///
/// Layers give it the gradient of each use; [`Param::set_sink`](super::Param::set_sink) sets it.
/// `A` is the accumulator of the parameter's element.
///
/// A sink that wraps another one passes every call on to it. It must not use the gradient of its
/// parameter (`grad`, `add_grad`, `zero_grad`, …): that panics.
pub trait GradSink<A: Element, B: Device> {
    /// Adds the gradient of one use of the parameter.
    ///
    /// # Errors
    /// When the sink takes no further gradient, or the device fails.
    fn add(&mut self, grad: GradTerm<'_, A, B>, sum: &mut GradSum<A, B>) -> Result<()>;

    /// All uses of all microbatches of a step have been added, or
    /// [`Param::settle`](super::Param::settle) says that there are no more. Data parallelism starts
    /// its collectives here.
    ///
    /// # Errors
    /// When some are missing that the sink needs, or a collective fails.
    fn finish(&mut self, sum: &mut GradSum<A, B>) -> Result<()> {
        let _ = sum;
        Ok(())
    }

    /// Forgets what it keeps beside the sum.
    fn clear(&mut self) {}

    /// The sink of one of several replicas of the model, whose gradients are summed along one tree:
    /// asked for by [`DataParallel`](crate::train::DataParallel) with an invariant reduction.
    ///
    /// # Errors
    /// When there is none: so it is with a sink that does not say otherwise.
    fn replicated(&self, param: &str, replica: usize, replicas: usize) -> Result<Box<dyn GradSink<A, B>>> {
        let _ = (replica, replicas);
        let reason =
            format!("{param} has a sink that does not sum along a tree, as an invariant reduction does");
        Err(Error::Unsupported { op: OP, reason })
    }
}

/// The gradient of one use of a parameter: Σ over tokens.
pub struct GradTerm<'a, A: Element, B: Device> {
    pub(super) name: &'a str,
    /// Which use of the step this is, and of how many.
    pub(super) index: usize,
    pub(super) uses: usize,
    /// Over how many tokens it can be split.
    pub(super) tokens: Option<usize>,
    pub(super) add: AddTokens<'a, A, B>,
}

impl<A: Element, B: Device> GradTerm<'_, A, B> {
    /// The parameter's name.
    pub fn name(&self) -> &str {
        self.name
    }

    /// The number of tokens over which the gradient is a sum; none where it comes as a whole: from
    /// [`Param::add_grad`](super::Param::add_grad), from normalizations, and for parameters that
    /// every rank holds (row biases, positions) where tokens are cut over the ranks or the
    /// reduction is invariant.
    pub fn tokens(&self) -> Option<usize> {
        self.tokens
    }

    /// Adds the gradient over all tokens to a sum, in place.
    ///
    /// # Errors
    /// When the device fails.
    pub fn add_to(self, sum: &mut Option<Tensor<A, B>>) -> Result<()> {
        (self.add)(0..self.tokens.unwrap_or(0), sum)
    }

    /// Adds the gradient over some of the tokens to a sum, in place.
    ///
    /// # Errors
    /// When there are no such tokens, or the device fails.
    pub fn add_tokens(&mut self, tokens: Range<usize>, sum: &mut Option<Tensor<A, B>>) -> Result<()> {
        match self.tokens {
            Some(count) if tokens.start <= tokens.end && tokens.end <= count => (self.add)(tokens, sum),
            Some(count) => {
                let reason = format!("tokens {tokens:?} of {count} of the gradient of {}", self.name);
                Err(Error::invalid(OP, reason))
            }
            None => {
                let reason = format!("the gradient of {} cannot be split by tokens", self.name);
                Err(Error::Unsupported { op: OP, reason })
            }
        }
    }
}

/// Adds a gradient to a sum of them.
pub(super) fn add_term<A: Element, B: Backend>(sum: &mut Sum<A, B>, grad: Tensor<A, B>) -> Result<()> {
    match sum {
        Some(sum) => sum.accumulate(&grad),
        none => {
            *none = Some(grad);
            Ok(())
        }
    }
}

/// Lets `write` add to a sum of this shape in place: β is 0 where there is nothing yet.
pub(super) fn add_product<A: Element, B: Backend>(
    sum: &mut Sum<A, B>,
    (device, shape): (&B, Shape),
    write: impl FnOnce(f64, MatMut<'_, A, B>) -> Result<()>,
) -> Result<()> {
    match sum {
        Some(sum) => {
            same_shape(OP, "the sum", sum.shape().dims(), "the gradient", shape.dims())?;
            write(1.0, sum.mat_mut()?)
        }
        none => {
            let mut first = Tensor::empty(device, shape)?;
            write(0.0, first.mat_mut()?)?;
            *none = Some(first);
            Ok(())
        }
    }
}

/// Adds gradients up in the order in which they come.
#[derive(Clone, Copy, Debug, Default)]
pub struct Accumulate;

impl<A: Element, B: Backend> GradSink<A, B> for Accumulate {
    fn add(&mut self, grad: GradTerm<'_, A, B>, sum: &mut GradSum<A, B>) -> Result<()> {
        grad.add_to(&mut sum.total)
    }

    fn replicated(&self, param: &str, replica: usize, replicas: usize) -> Result<Box<dyn GradSink<A, B>>> {
        Ok(Box::new(Tree::new(param, replica, replicas)))
    }
}

/// Adds the gradients of a step, one a use, along the tree over all uses of all replicas.
pub(super) struct Tree<A: Element, B: Device> {
    name: String,
    /// Of how many replicas of the model this is which: the leaves of all of them are in one tree.
    replica: usize,
    replicas: usize,
    sum: Option<TreeSum<Tensor<A, B>>>,
    /// How many uses of a step have been added, and how many there are.
    added: [usize; 2],
}

impl<A: Element, B: Backend> Tree<A, B> {
    pub(super) fn new(name: &str, replica: usize, replicas: usize) -> Self {
        Self { name: name.into(), replica, replicas, sum: None, added: [0; 2] }
    }
}

impl<A: Element, B: Backend> GradSink<A, B> for Tree<A, B> {
    fn add(&mut self, grad: GradTerm<'_, A, B>, sum: &mut GradSum<A, B>) -> Result<()> {
        let (index, uses) = (grad.index, grad.uses);
        if index == 0 && self.replicas > 1 && (sum.total.is_some() || !sum.open.is_empty()) {
            let reason = format!(
                "an invariant reduction adds {uses} terms to {} a step, as `set_microbatches` says, and a replica has \
                 added more",
                self.name
            );
            return Err(Error::Unsupported { op: OP, reason });
        }
        let mut leaf = None;
        grad.add_to(&mut leaf)?;
        let leaf = leaf.ok_or_else(|| Error::internal(OP, format!("{} got no term", self.name)))?;
        let tree = self.sum.get_or_insert_with(|| TreeSum::new(self.replicas * uses));
        let node = Node::leaf(self.replica * uses + index);
        self.added = [index + 1, uses];
        tree.push(node, leaf, |left, right| left.accumulate(&right))
    }

    fn finish(&mut self, sum: &mut GradSum<A, B>) -> Result<()> {
        let [added, uses] = self.added;
        if added < uses && self.replicas > 1 {
            let reason = format!("{} has got {added} of {uses} terms of an invariant reduction", self.name);
            return Err(Error::Unsupported { op: OP, reason });
        }
        let Some(tree) = self.sum.take() else { return Ok(()) };
        let mut terms = tree.values();
        if self.replicas > 1 && terms.len() > 1 {
            sum.open = terms;
            return Ok(());
        }
        let Some(mut step) = terms.pop() else { return Ok(()) };
        // More than one where a step ends early: as if the tree had no further leaves.
        while let Some(mut left) = terms.pop() {
            left.accumulate(&step)?;
            step = left;
        }
        add_term(&mut sum.total, step)
    }

    fn clear(&mut self) {
        (self.sum, self.added) = (None, [0; 2]);
    }

    fn replicated(&self, param: &str, replica: usize, replicas: usize) -> Result<Box<dyn GradSink<A, B>>> {
        Ok(Box::new(Self::new(param, replica, replicas)))
    }
}
