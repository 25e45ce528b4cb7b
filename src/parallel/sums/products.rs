//! The products of linear layers, of which a dimension is cut into leaves.

use super::{Leaves, Sums};
use crate::{
    device::Element,
    error::{Result, same_size},
    kernels::{Activation, Backend, GemmTerm, MatMut, MatRef},
    ops,
    parallel::DTensor,
    shard::{Node, Partial, Placement, TreeSum},
    tensor::{Param, Tensor},
    trace,
};
use std::ops::Range;

/// The activation in front of a layer and its input, to go on through f′ with the gradient of the
/// layer's input.
pub(in super::super) type Through<'a, T, B> = Option<(Activation, &'a Tensor<T, B>)>;

/// A weight, and a bias to be added.
pub(in super::super) type Affine<'a, T, B> = (&'a Param<T, B>, Option<&'a Param<T, B>>);

/// The factors a b of a term, whose inner dimension is cut into leaves.
pub(in super::super) struct Factors<'a, T: Element, B: Backend> {
    pub(in super::super) a: MatRef<'a, T, B>,
    pub(in super::super) b: MatRef<'a, T, B>,
    pub(in super::super) leaves: &'a Leaves,
}

impl<B: Backend> Sums<B> {
    /// Σ a b over all ranks, with the rows of `x` and `features` columns.
    pub(in super::super) fn product<P: Placement, T: Element>(
        &self,
        x: &DTensor<P, T, B>,
        features: usize,
        factors: &[Factors<'_, T, B>],
    ) -> Result<DTensor<Partial, T, B>> {
        let (device, rows, own) = (self.group.device(), x.local().shape().rows(), self.own());
        let depth = factors.iter().map(|factors| factors.a.cols()).sum();
        let products = |leaf: usize| {
            let mut products = Vec::new();
            for Factors { a, b, leaves } in factors {
                for run in leaves.own[leaf].iter().filter(|run| !run.is_empty()) {
                    products.push((a.columns(run.clone()), b.block(run.clone(), 0..features)));
                }
            }
            products
        };
        if self.tree.is_none() {
            let terms = products(0);
            if let [(a, b)] = terms[..] {
                let mut y = Tensor::empty(device, [rows, features])?;
                trace::compute::<B, _>("gemm", T::DTYPE, &[rows, depth, features], || {
                    device.gemm(1.0, a, b, 0.0, y.mat_mut()?)
                })?;
                return Ok(x.derive(y, features, None));
            }
            let mut terms = ops::products::<T, T::Acc, B>(device, terms)?.into_iter();
            let mut sum = terms.next().map_or_else(|| Tensor::zeros(device, [rows, features]), Ok)?;
            terms.try_for_each(|term| sum.accumulate(&term))?;
            return x.derive_sum(vec![sum], features, false);
        }
        let mut sums = TreeSum::new(self.count());
        for leaf in own.clone() {
            let term = GemmTerm { products: products(leaf - own.start), merges: 0 };
            sums.push(Node::leaf(leaf), vec![term], |left, right| {
                left.extend(right);
                left.last_mut().expect("there are two").merges += 1;
                Ok(())
            })?;
        }
        let sum = |terms: Vec<GemmTerm<'_, T, B>>| {
            let mut sum = Tensor::empty(device, [rows, features])?;
            device.gemm_tree(&terms, sum.mat_mut()?)?;
            Ok(sum)
        };
        let nodes = || sums.values().into_iter().map(sum).collect::<Result<_>>();
        let nodes = trace::compute::<B, _>("gemm", T::DTYPE, &[rows, depth, features], nodes)?;
        x.derive_sum(nodes, features, true)
    }

    /// f(pre) and pre = x wᵀ + b, whose outputs are cut into leaves; without f, pre twice.
    pub(in super::super) fn outputs<T: Element>(
        &self,
        x: &Tensor<T, B>,
        (w, bias): Affine<'_, T, B>,
        f: Option<Activation>,
        leaves: &Leaves,
    ) -> Result<(Tensor<T, B>, Tensor<T, B>)> {
        let (w, bias, device) = (w.value()?, bias.map(Param::value).transpose()?, x.device());
        if !self.is_by_leaves(x.mat(), false) {
            let (y, pre) = ops::linear(x, &w, bias.as_ref(), f)?;
            return Ok((y.clone(), pre.unwrap_or(y)));
        }
        same_size("linear", "columns of x", x.shape().cols(), "columns of w", w.shape().cols())?;
        let mut pre = Tensor::empty(device, x.shape().with(x.shape().rank() - 1, w.shape().rows()))?;
        self.by_runs((1, leaves), (x.mat(), w.mat().t()), 0.0, pre.mat_mut()?)?;
        if let Some(bias) = bias {
            device.add_bias::<T>(bias.slice(), pre.mat_mut()?)?;
        }
        Ok((f.map_or_else(|| Ok(pre.clone()), |f| ops::activate(f, &pre))?, pre))
    }

    /// dx = dy w, and on through f′; the columns of w are cut into leaves.
    pub(in super::super) fn inputs<T: Element>(
        &self,
        dy: &Tensor<T, B>,
        w: &Param<T, B>,
        through: Through<'_, T, B>,
        leaves: &Leaves,
    ) -> Result<Tensor<T, B>> {
        let w = w.value()?;
        if !self.is_by_leaves(dy.mat(), false) {
            return ops::linear_dx(dy, &w, through);
        }
        let shape = dy.shape();
        let mut dx = Tensor::empty(dy.device(), shape.with(shape.rank() - 1, w.shape().cols()))?;
        self.by_runs((1, leaves), (dy.mat(), w.mat()), 0.0, dx.mat_mut()?)?;
        match through {
            Some((f, pre)) => ops::activate_backward(f, pre, &dx),
            None => Ok(dx),
        }
    }

    /// [`Sums::outputs`] of several layers with one input, at the same time where the device can.
    pub(in super::super) fn all_outputs<T: Element>(
        &self,
        x: &Tensor<T, B>,
        all: Vec<(Affine<'_, T, B>, &Leaves)>,
    ) -> Result<Vec<Tensor<T, B>>> {
        if self.tree.is_some() {
            let output = |(params, leaves)| Ok(self.outputs(x, params, None, leaves)?.0);
            return all.into_iter().map(output).collect();
        }
        let weights = all.iter().map(|((w, _), _)| w.value()).collect::<Result<Vec<_>>>()?;
        let pairs = weights.iter().map(|w| (x.mat(), w.mat().t())).collect();
        let mut parts = ops::products::<T, T, B>(x.device(), pairs)?;
        for (((_, bias), _), part) in all.iter().zip(&mut parts) {
            if let Some(bias) = bias {
                x.device().add_bias::<T>(bias.value()?.slice(), part.mat_mut()?)?;
            }
        }
        Ok(parts)
    }

    /// dw += dyᵀ x and db += Σ over the rows of dy for each of some layers with one input, at the
    /// same time where the device can; the rows of dw are cut into leaves.
    pub(in super::super) fn row_grads<'a, T: Element>(
        &self,
        layers: Vec<((Affine<'a, T, B>, &'a Leaves), MatRef<'a, T, B>)>,
        x: &'a Tensor<T, B>,
    ) -> Result<()> {
        let by_leaves = self.tree.is_some() || layers.iter().any(|((_, leaves), _)| leaves.shared);
        if by_leaves || layers.len() == 1 {
            return layers.into_iter().try_for_each(|(params, dy)| self.row_grad(params, dy, x));
        }
        let pairs = layers.iter().map(|(_, dy)| (dy.t(), x.mat())).collect();
        let products = ops::products::<T, T::Acc, B>(x.device(), pairs)?;
        for ((((w, bias), _), dy), dw) in layers.into_iter().zip(products) {
            let mut whole = Some(dw);
            w.add_grad_over(dy.rows(), |tokens| match whole.take() {
                Some(dw) if tokens == (0..dy.rows()) => Ok(dw),
                _ => {
                    let mut dw = Tensor::empty(x.device(), w.shape())?;
                    let of = (some(dy, tokens.clone()), some(x.mat(), tokens));
                    ops::linear_dw(x.device(), of, 0.0, dw.mat_mut()?, None)?;
                    Ok(dw)
                }
            })?;
            bias.map_or(Ok(()), |bias| self.bias_grad(bias, dy))?;
        }
        Ok(())
    }

    /// [`Sums::row_grads`] of one layer.
    fn row_grad<T: Element>(
        &self,
        ((w, bias), leaves): (Affine<'_, T, B>, &Leaves),
        dy: MatRef<'_, T, B>,
        x: &Tensor<T, B>,
    ) -> Result<()> {
        let device = self.group.device();
        let Some(bias) = bias.filter(|_| self.tree.is_none() && !leaves.shared) else {
            self.grads(w, (dy, x.mat()), (0, leaves))?;
            return bias.map_or(Ok(()), |bias| self.bias_grad(bias, dy));
        };
        // Both gradients come of one product, if the weight's sink wants that over all tokens.
        let mut sums = None;
        w.add_product_over(dy.rows(), |tokens, beta, dw| {
            let (dy, x) = (some(dy, tokens.clone()), some(x.mat(), tokens.clone()));
            let mut db = Tensor::empty(device, [dy.cols()])?;
            ops::linear_dw(device, (dy, x), beta, dw, Some(&mut db))?;
            sums = Some((tokens, db));
            Ok(())
        })?;
        bias.add_grad_over(dy.rows(), |tokens| match sums.take() {
            Some((of, db)) if of == tokens => Ok(db),
            _ => ops::bias_grad(device, some(dy, tokens)),
        })
    }

    /// db += Σ over the rows of dy.
    fn bias_grad<T: Element>(&self, bias: &Param<T, B>, dy: MatRef<'_, T, B>) -> Result<()> {
        bias.add_grad_over(dy.rows(), |tokens| ops::bias_grad(self.group.device(), some(dy, tokens)))
    }

    /// dw += dyᵀ x, of which dimension `dim` is cut into leaves.
    pub(in super::super) fn grads<T: Element>(
        &self,
        w: &Param<T, B>,
        (dy, x): (MatRef<'_, T, B>, MatRef<'_, T, B>),
        (dim, leaves): (usize, &Leaves),
    ) -> Result<()> {
        w.add_product_over(dy.rows(), |tokens, beta, dw| {
            let (dy, x) = (some(dy, tokens.clone()), some(x, tokens));
            if !self.is_by_leaves(dy.t(), leaves.shared) {
                return ops::linear_dw(self.group.device(), (dy, x), beta, dw, None);
            }
            self.by_runs((dim, leaves), (dy.t(), x), beta, dw)
        })
    }

    /// Whether elements of a product with `a` are computed run by run: in a fixed order, and where
    /// several ranks hold the same rows of a weight, whose gradients have to have the same bits on
    /// each.
    fn is_by_leaves<T: Element>(&self, a: MatRef<'_, T, B>, shared: bool) -> bool {
        // A depth of 1 leaves room for another sign of a zero.
        (self.tree.is_some() || shared) && !(self.group.device().splits_exactly() && a.cols() > 1)
    }

    /// c ← a b + β c by runs of dimension `dim` of c: of a's rows, or of b's columns.
    fn by_runs<T: Element, C: Element<Acc = T::Acc>>(
        &self,
        (dim, leaves): (usize, &Leaves),
        (a, b): (MatRef<'_, T, B>, MatRef<'_, T, B>),
        beta: f64,
        mut c: MatMut<'_, C, B>,
    ) -> Result<()> {
        let (device, [rows, depth, cols]) = (self.group.device(), [a.rows(), a.cols(), b.cols()]);
        trace::compute::<B, _>("gemm", T::DTYPE, &[rows, depth, cols], || {
            leaves.held.iter().cloned().try_for_each(|run| {
                let (a, b, part) = match dim {
                    0 => (a.block(run.clone(), 0..depth), b, c.reborrow().block(run, 0..cols)),
                    _ => (a, b.columns(run.clone()), c.reborrow().block(0..rows, run)),
                };
                device.gemm_block(a, b, beta, part)
            })
        })
    }
}

/// Some rows.
fn some<T: Element, B: Backend>(matrix: MatRef<'_, T, B>, rows: Range<usize>) -> MatRef<'_, T, B> {
    matrix.block(rows, 0..matrix.cols())
}
