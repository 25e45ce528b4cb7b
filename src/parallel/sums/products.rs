//! The products of linear layers, in which one dimension is partitioned into leaves.

use super::{Leaves, Sums};
use crate::{
    device::Element,
    error::{Result, same_size},
    kernels::{Activation, Backend, GemmTerm, MatMut, MatRef},
    ops,
    parallel::DTensor,
    shard::{Node, Partial, Placement, TreeSum},
    tensor::{Param, QuantizedRows, SampleTerm, Tensor},
    trace,
};
use std::ops::Range;

/// The activation f preceding a layer, and the input of f. The backward multiplies the gradient of
/// the layer's input by f′.
pub(in crate::parallel) type PrecedingActivation<'a, T, B> = Option<(Activation, &'a Tensor<T, B>)>;

/// A weight, and the bias if the layer adds one.
pub(in crate::parallel) type Affine<'a, T, B> = (&'a Param<T, B>, Option<&'a Param<T, B>>);

/// The factors of a product a b. Its inner dimension is partitioned into leaves.
pub(in crate::parallel) struct Factors<'a, T: Element, B: Backend> {
    pub(in crate::parallel) a: MatRef<'a, T, B>,
    pub(in crate::parallel) b: MatRef<'a, T, B>,
    pub(in crate::parallel) leaves: &'a Leaves,
}

impl<B: Backend> Sums<B> {
    /// Computes this rank's terms of the sum of the products a b over all factors and all ranks.
    /// Does not reduce the terms. The result has the rows of `x` and `features` columns.
    pub(in crate::parallel) fn product<P: Placement, T: Element>(
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
                for range in leaves.own[leaf].iter().filter(|range| !range.is_empty()) {
                    products.push((a.columns(range.clone()), b.block(range.clone(), 0..features)));
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
                return Ok(x.with_features(y, features, None));
            }
            let mut terms = ops::products::<T, T::Acc, B>(device, terms)?.into_iter();
            let mut sum = terms.next().map_or_else(|| Tensor::zeros(device, [rows, features]), Ok)?;
            terms.try_for_each(|term| sum.accumulate(&term))?;
            return x.partial_sum(vec![sum], features, false);
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
        x.partial_sum(nodes, features, true)
    }

    /// Computes this rank's terms of x wᵀ with quantized weights. The columns of w are partitioned
    /// into leaves. Does not reduce the terms.
    pub(in crate::parallel) fn quantized_product<P: Placement, T: Element>(
        &self,
        x: &DTensor<P, T, B>,
        (w, features): (&QuantizedRows<T, B>, usize),
        leaves: &Leaves,
    ) -> Result<DTensor<Partial, T, B>> {
        let (device, local, own) = (self.group.device(), x.local(), self.own());
        let (rows, depth) = (local.shape().rows(), local.shape().cols());
        trace::compute::<B, _>("quantized gemm", T::DTYPE, &[rows, depth, features], || {
            if self.tree.is_none() {
                let mut y = Tensor::empty(device, [rows, features])?;
                w.product(local.mat(), 0..depth, y.mat_mut()?)?;
                return Ok(x.with_features(y, features, None));
            }
            let mut sums = TreeSum::new(self.count());
            for leaf in own.clone() {
                let columns = leaves.range(leaf - own.start);
                let mut term = Tensor::empty(device, [rows, features])?;
                w.product(local.mat().columns(columns.clone()), columns, term.mat_mut()?)?;
                sums.push(Node::leaf(leaf), term, |left, right| left.accumulate(&right))?;
            }
            x.partial_sum(sums.values(), features, true)
        })
    }

    /// Computes pre = x wᵀ + b, and returns f(pre) and pre. The columns of pre are partitioned into
    /// leaves. Without f, returns pre twice.
    pub(in crate::parallel) fn outputs<T: Element>(
        &self,
        x: &Tensor<T, B>,
        (w, bias): Affine<'_, T, B>,
        f: Option<Activation>,
        leaves: &Leaves,
    ) -> Result<(Tensor<T, B>, Tensor<T, B>)> {
        let (bias, device, shape) = (bias.map(Param::value).transpose()?, x.device(), x.shape());
        // Dense products may have other bits where they are divided.
        let divides = self.is_by_leaves(x.mat(), false);
        let quantized = w.quantized().filter(|w| !(divides && w.has_dense_products()));
        let Some(quantized) = quantized else {
            return self.dense_outputs(x, (&w.value()?, bias.as_ref()), f, leaves);
        };
        // The bits of a column of y depend on one row of w, so no leaf is computed by itself.
        let (rows, depth, features) = (shape.rows(), shape.cols(), w.shape().rows());
        let mut pre = Tensor::empty(device, shape.with(shape.rank() - 1, features))?;
        trace::compute::<B, _>("quantized gemm", T::DTYPE, &[rows, depth, features], || {
            quantized.product(x.mat(), 0..depth, pre.mat_mut()?)
        })?;
        if let Some(bias) = bias {
            device.add_bias::<T>(bias.slice(), pre.mat_mut()?)?;
        }
        Ok((f.map_or_else(|| Ok(pre.clone()), |f| ops::activate(f, &pre))?, pre))
    }

    fn dense_outputs<T: Element>(
        &self,
        x: &Tensor<T, B>,
        (w, bias): (&Tensor<T, B>, Option<&Tensor<T, B>>),
        f: Option<Activation>,
        leaves: &Leaves,
    ) -> Result<(Tensor<T, B>, Tensor<T, B>)> {
        let device = x.device();
        if !self.is_by_leaves(x.mat(), false) {
            let (y, pre) = ops::linear(x, w, bias, f)?;
            return Ok((y.clone(), pre.unwrap_or(y)));
        }
        same_size("linear", "columns of x", x.shape().cols(), "columns of w", w.shape().cols())?;
        let mut pre = Tensor::empty(device, x.shape().with(x.shape().rank() - 1, w.shape().rows()))?;
        self.by_ranges((1, leaves), (x.mat(), w.mat().t()), 0.0, pre.mat_mut()?)?;
        if let Some(bias) = bias {
            device.add_bias::<T>(bias.slice(), pre.mat_mut()?)?;
        }
        Ok((f.map_or_else(|| Ok(pre.clone()), |f| ops::activate(f, &pre))?, pre))
    }

    /// Computes dx = dy w, multiplied by f′ if there is a preceding activation. The columns of w
    /// are partitioned into leaves.
    pub(in crate::parallel) fn inputs<T: Element>(
        &self,
        dy: &Tensor<T, B>,
        w: &Param<T, B>,
        preceding: PrecedingActivation<'_, T, B>,
        leaves: &Leaves,
    ) -> Result<Tensor<T, B>> {
        let w = w.value()?;
        if !self.is_by_leaves(dy.mat(), false) {
            return ops::linear_dx(dy, &w, preceding);
        }
        let shape = dy.shape();
        let mut dx = Tensor::empty(dy.device(), shape.with(shape.rank() - 1, w.shape().cols()))?;
        self.by_ranges((1, leaves), (dy.mat(), w.mat()), 0.0, dx.mat_mut()?)?;
        match preceding {
            Some((f, pre)) => ops::activate_backward(f, pre, &dx),
            None => Ok(dx),
        }
    }

    /// Computes [`Sums::outputs`] of several layers with the same input, without f. If the order is
    /// free, computes the products concurrently where the device can.
    pub(in crate::parallel) fn all_outputs<T: Element>(
        &self,
        x: &Tensor<T, B>,
        all: Vec<(Affine<'_, T, B>, &Leaves)>,
    ) -> Result<Vec<Tensor<T, B>>> {
        if self.tree.is_some() || all.iter().any(|((w, _), _)| w.is_quantized()) {
            let output = |(params, leaves)| Ok(self.outputs(x, params, None, leaves)?.0);
            return all.into_iter().map(output).collect();
        }
        let weights = all.iter().map(|((w, _), _)| w.value()).collect::<Result<Vec<_>>>()?;
        let pairs = weights.iter().map(|w| (x.mat(), w.mat().t())).collect();
        let mut outputs = ops::products::<T, T, B>(x.device(), pairs)?;
        for (((_, bias), _), y) in all.iter().zip(&mut outputs) {
            if let Some(bias) = bias {
                x.device().add_bias::<T>(bias.value()?.slice(), y.mat_mut()?)?;
            }
        }
        Ok(outputs)
    }

    /// For several layers with the same input, adds dyᵀ x to dw, and the sum of the rows of dy to
    /// db. Each layer has its columns of `dy`. The rows of dw are partitioned into leaves. If the
    /// order is free and no leaves share rows, computes the products concurrently where the device
    /// can.
    pub(in crate::parallel) fn row_grads<'a, P: Placement, T: Element>(
        &self,
        layers: Vec<((Affine<'a, T, B>, &'a Leaves), Range<usize>)>,
        dy: &'a DTensor<P, T, B>,
        x: &'a Tensor<T, B>,
    ) -> Result<()> {
        let of = |columns: &Range<usize>| dy.local().mat().columns(columns.clone());
        let keeps = |w: &Param<T, B>, bias: Option<&Param<T, B>>| {
            w.keeps_terms() || bias.is_some_and(Param::keeps_terms)
        };
        if layers.iter().any(|(((w, bias), _), _)| keeps(w, *bias)) {
            return layers.into_iter().try_for_each(|(((w, bias), leaves), columns)| {
                if w.keeps_terms() {
                    self.keep_product(w, (dy, columns.clone()), x, (0, leaves));
                } else {
                    self.grad(w, (of(&columns), x.mat()), (0, leaves))?;
                }
                match bias {
                    Some(bias) if bias.keeps_terms() => self.keep_sum(bias, (dy, columns)),
                    Some(bias) => self.bias_grad(bias, of(&columns)),
                    None => Ok(()),
                }
            });
        }
        let layers: Vec<_> = layers.into_iter().map(|(params, columns)| (params, of(&columns))).collect();
        let by_leaves = self.tree.is_some() || layers.iter().any(|((_, leaves), _)| leaves.shared);
        let is_frozen = layers.iter().any(|(((w, _), _), _)| w.is_quantized());
        if by_leaves || is_frozen || layers.len() == 1 {
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
                    let of = (rows_of(dy, tokens.clone()), rows_of(x.mat(), tokens));
                    ops::linear_dw(x.device(), of, 0.0, dw.mat_mut()?, None)?;
                    Ok(dw)
                }
            })?;
            bias.map_or(Ok(()), |bias| self.bias_grad(bias, dy))?;
        }
        Ok(())
    }

    /// Computes [`Sums::row_grads`] of one layer.
    fn row_grad<T: Element>(
        &self,
        ((w, bias), leaves): (Affine<'_, T, B>, &Leaves),
        dy: MatRef<'_, T, B>,
        x: &Tensor<T, B>,
    ) -> Result<()> {
        let device = self.group.device();
        let Some(bias) = bias.filter(|_| self.tree.is_none() && !leaves.shared) else {
            self.grad(w, (dy, x.mat()), (0, leaves))?;
            return bias.map_or(Ok(()), |bias| self.bias_grad(bias, dy));
        };
        // One product gives both gradients if the sinks of weight and bias request the same tokens.
        let mut sums = None;
        w.add_product_over(dy.rows(), |tokens, beta, dw| {
            let (dy, x) = (rows_of(dy, tokens.clone()), rows_of(x.mat(), tokens.clone()));
            let mut db = Tensor::empty(device, [dy.cols()])?;
            ops::linear_dw(device, (dy, x), beta, dw, Some(&mut db))?;
            sums = Some((tokens, db));
            Ok(())
        })?;
        bias.add_grad_over(dy.rows(), |tokens| match sums.take() {
            Some((of, db)) if of == tokens => Ok(db),
            _ => ops::bias_grad(device, rows_of(dy, tokens)),
        })
    }

    /// Adds the sum of the rows of dy to db.
    fn bias_grad<T: Element>(&self, bias: &Param<T, B>, dy: MatRef<'_, T, B>) -> Result<()> {
        bias.add_grad_over(dy.rows(), |tokens| ops::bias_grad(self.group.device(), rows_of(dy, tokens)))
    }

    /// Adds dyᵀ x to dw. Dimension `dim` of dw is partitioned into leaves.
    pub(in crate::parallel) fn grads<P: Placement, T: Element>(
        &self,
        w: &Param<T, B>,
        dy: &DTensor<P, T, B>,
        x: &Tensor<T, B>,
        (dim, leaves): (usize, &Leaves),
    ) -> Result<()> {
        if w.keeps_terms() {
            self.keep_product(w, (dy, 0..dy.local().shape().cols()), x, (dim, leaves));
            return Ok(());
        }
        self.grad(w, (dy.local().mat(), x.mat()), (dim, leaves))
    }

    fn grad<T: Element>(
        &self,
        w: &Param<T, B>,
        (dy, x): (MatRef<'_, T, B>, MatRef<'_, T, B>),
        of: (usize, &Leaves),
    ) -> Result<()> {
        w.add_product_over(dy.rows(), |tokens, beta, dw| {
            self.write_grad((rows_of(dy, tokens.clone()), rows_of(x, tokens)), of, beta, dw)
        })
    }

    /// Computes dw = β dw + dyᵀ x. Dimension `dim` of dw is partitioned into leaves.
    fn write_grad<T: Element>(
        &self,
        (dy, x): (MatRef<'_, T, B>, MatRef<'_, T, B>),
        (dim, leaves): (usize, &Leaves),
        beta: f64,
        dw: MatMut<'_, T::Acc, B>,
    ) -> Result<()> {
        if !self.is_by_leaves(dy.t(), leaves.shared) {
            return ops::linear_dw(self.group.device(), (dy, x), beta, dw, None);
        }
        self.by_ranges((dim, leaves), (dy.t(), x), beta, dw)
    }

    /// Keeps the operands of dyᵀ x for [`Param::add_kept`].
    pub(in crate::parallel) fn keep_product<P: Placement, T: Element>(
        &self,
        w: &Param<T, B>,
        (dy, columns): (&DTensor<P, T, B>, Range<usize>),
        x: &Tensor<T, B>,
        (dim, leaves): (usize, &Leaves),
    ) {
        let (sums, leaves) = (self.clone(), leaves.clone());
        w.keep_term(SampleTerm::Product {
            dy: (dy.local().clone(), columns),
            x: x.clone(),
            samples: dy.sequences().clone(),
            write: Box::new(move |factors, beta, dw| {
                sums.write_grad::<T::Acc>(factors, (dim, &leaves), beta, dw)
            }),
        });
    }

    /// Keeps the sum of the rows of dy of each sequence for [`Param::add_kept`].
    fn keep_sum<P: Placement, T: Element>(
        &self,
        bias: &Param<T, B>,
        (dy, columns): (&DTensor<P, T, B>, Range<usize>),
    ) -> Result<()> {
        let mut sequences = vec![0; dy.sequences().rows()];
        for (at, rows) in dy.sequences().iter().enumerate() {
            sequences[rows].fill(at as u32);
        }
        let (device, count) = (self.group.device(), dy.sequences().len());
        let sums = ops::scatter_rows(device, &sequences, count, dy.local().mat().columns(columns))?;
        bias.keep_term(SampleTerm::Each(sums));
        Ok(())
    }

    /// Whether a product with `a` is computed range by range. This is needed if the order is fixed,
    /// or if several ranks hold the same rows of a weight, because the gradients of these rows must
    /// have the same bits on each rank. It is not needed on a device that splits products exactly.
    fn is_by_leaves<T: Element>(&self, a: MatRef<'_, T, B>, shared: bool) -> bool {
        // When a product of depth 1 is split, a zero may get another sign than in the whole
        // product.
        (self.tree.is_some() || shared) && !(self.group.device().splits_exactly() && a.cols() > 1)
    }

    /// Computes c ← a b + β c, one range of dimension `dim` of c after another. A range of
    /// dimension 0 is a range of a's rows, a range of dimension 1 a range of b's columns.
    fn by_ranges<T: Element, C: Element<Acc = T::Acc>>(
        &self,
        (dim, leaves): (usize, &Leaves),
        (a, b): (MatRef<'_, T, B>, MatRef<'_, T, B>),
        beta: f64,
        mut c: MatMut<'_, C, B>,
    ) -> Result<()> {
        let (device, [rows, depth, cols]) = (self.group.device(), [a.rows(), a.cols(), b.cols()]);
        trace::compute::<B, _>("gemm", T::DTYPE, &[rows, depth, cols], || {
            leaves.all.iter().cloned().try_for_each(|range| {
                let (a, b, c) = match dim {
                    0 => (a.block(range.clone(), 0..depth), b, c.reborrow().block(range, 0..cols)),
                    _ => (a, b.columns(range.clone()), c.reborrow().block(0..rows, range)),
                };
                device.gemm_block(a, b, beta, c)
            })
        })
    }
}

/// Returns a range of rows of a matrix.
fn rows_of<T: Element, B: Backend>(matrix: MatRef<'_, T, B>, rows: Range<usize>) -> MatRef<'_, T, B> {
    matrix.block(rows, 0..matrix.cols())
}
