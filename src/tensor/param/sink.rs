//! Gradient sinks, which sum the gradients of a parameter's uses.

use crate::{
    device::{Device, Element},
    error::{Error, Result, same_shape},
    kernels::{Backend, MatMut},
    shard::{Node, Shape, TreeSum},
    tensor::Tensor,
};
use std::ops::Range;

const OP: &str = "gradient";

/// A sum of gradients, or `None` before the first gradient.
type Sum<A, B> = Option<Tensor<A, B>>;

/// The gradient that a sink has summed for a parameter.
pub struct GradSum<A: Element, B: Device> {
    /// The value of [`Param::grad`](super::Param::grad), or `None` before the first gradient.
    pub total: Option<Tensor<A, B>>,
    /// This replica's partial sums before an invariant reduction over replicas; otherwise empty.
    pub(super) partials: Vec<Tensor<A, B>>,
}

impl<A: Element, B: Device> GradSum<A, B> {
    /// Makes a sum without partial sums.
    pub(super) fn of(total: Option<Tensor<A, B>>) -> Self {
        Self { total, partials: Vec::new() }
    }
}

/// A function that adds the gradient over a range of tokens to a sum.
pub(super) type AddTokens<'a, A, B> = &'a mut dyn FnMut(Range<usize>, &mut Sum<A, B>) -> Result<()>;

/// Sums the gradients of a parameter. The default is [`Accumulate`]. In a group with an invariant
/// reduction, layers set a sink that sums along a tree.
///
/// A parameter passes the gradient of each use to its sink.
/// [`Param::set_sink`](super::Param::set_sink) sets the sink. `A` is the accumulator type of the
/// parameter's element type.
///
/// A sink that wraps another sink forwards every call to it. A sink must not call its parameter's
/// `grad`, `add_grad`, `zero_grad`, …, because these methods panic while the parameter runs the
/// sink.
pub trait GradSink<A: Element, B: Device> {
    /// Adds the gradient of one use of the parameter.
    ///
    /// # Errors
    /// When the sink accepts no further gradient, or the device fails.
    fn add(&mut self, grad: GradTerm<'_, A, B>, sum: &mut GradSum<A, B>) -> Result<()>;

    /// Ends a step. The parameter calls it after the last use of the last microbatch, or in
    /// [`Param::settle`](super::Param::settle). Data parallelism starts its collectives here.
    ///
    /// # Errors
    /// When terms that the sink needs are missing, or a collective fails.
    fn finish(&mut self, sum: &mut GradSum<A, B>) -> Result<()> {
        let _ = sum;
        Ok(())
    }

    /// Clears the sink's own state. The parameter clears the sum.
    fn clear(&mut self) {}

    /// Returns the sink for replica `replica` of `replicas` replicas of the model. The gradients of
    /// all replicas are summed along one tree. [`DataParallel`](crate::train::DataParallel) calls
    /// this if its group has an invariant reduction.
    ///
    /// # Errors
    /// When the sink cannot sum along a tree. The default implementation always fails.
    fn replicated(&self, param: &str, replica: usize, replicas: usize) -> Result<Box<dyn GradSink<A, B>>> {
        let _ = (replica, replicas);
        let reason =
            format!("the sink of {param} cannot sum along a tree, which an invariant reduction needs");
        Err(Error::Unsupported { op: OP, reason })
    }
}

/// The gradient of one use of a parameter: Σ over tokens.
pub struct GradTerm<'a, A: Element, B: Device> {
    pub(super) name: &'a str,
    /// The index of this term within the step.
    pub(super) index: usize,
    /// The number of terms in a step.
    pub(super) uses: usize,
    /// The number of tokens, if the gradient can be split by tokens.
    pub(super) tokens: Option<usize>,
    pub(super) add: AddTokens<'a, A, B>,
}

impl<A: Element, B: Device> GradTerm<'_, A, B> {
    /// Returns the name of the parameter.
    pub fn name(&self) -> &str {
        self.name
    }

    /// Returns the number of tokens that the gradient sums over, or `None` if the gradient cannot
    /// be split by tokens. A gradient from [`Param::add_grad`](super::Param::add_grad) or from a
    /// normalization cannot be split. The gradient of a replicated parameter (row bias, positions)
    /// cannot be split if tokens are sharded or the reduction is invariant.
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

    /// Adds the gradient over a range of tokens to a sum, in place.
    ///
    /// # Errors
    /// When the range exceeds the tokens, the gradient cannot be split, or the device fails.
    pub fn add_tokens(&mut self, tokens: Range<usize>, sum: &mut Option<Tensor<A, B>>) -> Result<()> {
        match self.tokens {
            Some(count) if tokens.start <= tokens.end && tokens.end <= count => (self.add)(tokens, sum),
            Some(count) => {
                let reason = format!(
                    "tokens {tokens:?} are not a range of the {count} tokens of the gradient of {}",
                    self.name
                );
                Err(Error::invalid(OP, reason))
            }
            None => {
                let reason = format!("the gradient of {} cannot be split by tokens", self.name);
                Err(Error::Unsupported { op: OP, reason })
            }
        }
    }
}

/// Adds a gradient to a sum.
pub(super) fn add_term<A: Element, B: Backend>(sum: &mut Sum<A, B>, grad: Tensor<A, B>) -> Result<()> {
    match sum {
        Some(sum) => sum.accumulate(&grad),
        none => {
            *none = Some(grad);
            Ok(())
        }
    }
}

/// Lets `write` compute `sum = β sum + …` in place. For the first term, the sum is a new tensor and
/// β is 0. For later terms β is 1.
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

/// Sums gradients in the order of the calls.
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

/// Sums the gradients of a step along the tree over all terms of all replicas. Each term is a leaf.
pub(super) struct Tree<A: Element, B: Device> {
    name: String,
    /// The index of this replica of the model.
    replica: usize,
    /// The number of replicas. One tree has the leaves of all replicas.
    replicas: usize,
    sum: Option<TreeSum<Tensor<A, B>>>,
    /// The number of terms added in this step, and the number of all terms of a step.
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
        if index == 0 && self.replicas > 1 && (sum.total.is_some() || !sum.partials.is_empty()) {
            let reason = format!(
                "a replica has added more than {uses} terms to {} in a step: `set_microbatches` sets the number of \
                 microbatches of an invariant reduction",
                self.name
            );
            return Err(Error::Unsupported { op: OP, reason });
        }
        let mut leaf = None;
        grad.add_to(&mut leaf)?;
        let leaf = leaf.ok_or_else(|| Error::internal(OP, format!("{} has received no term", self.name)))?;
        let tree = self.sum.get_or_insert_with(|| TreeSum::new(self.replicas * uses));
        let node = Node::leaf(self.replica * uses + index);
        self.added = [index + 1, uses];
        tree.push(node, leaf, |left, right| left.accumulate(&right))
    }

    fn finish(&mut self, sum: &mut GradSum<A, B>) -> Result<()> {
        let [added, uses] = self.added;
        if added < uses && self.replicas > 1 {
            let reason =
                format!("{} has received {added} of the {uses} terms of an invariant reduction", self.name);
            return Err(Error::Unsupported { op: OP, reason });
        }
        let Some(tree) = self.sum.take() else { return Ok(()) };
        let mut terms = tree.values();
        if self.replicas > 1 && terms.len() > 1 {
            sum.partials = terms;
            return Ok(());
        }
        let Some(mut step) = terms.pop() else { return Ok(()) };
        // A step that ends early leaves several partial sums. Add them in the order of a tree
        // without the missing leaves.
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
