//! Terms of a gradient that are kept until each sample's factor is known, for private training.

use super::{Param, sink};
use crate::{
    device::{Device, Element},
    error::{Error, Result, same_size},
    kernels::{Backend, MatMut, MatRef, NO_ROW},
    shard::Sequences,
    tensor::Tensor,
};
use std::ops::Range;

const OP: &str = "gradients of samples";

/// Computes dw = β dw + dyᵀ x, given (dy, x), β and dw.
pub type WriteProduct<A, B> =
    Box<dyn Fn((MatRef<'_, A, B>, MatRef<'_, A, B>), f64, MatMut<'_, A, B>) -> Result<()>>;

/// One term of a parameter's gradient, from which the gradient gᵢ of each sample i can be computed.
///
/// A sample is a sequence ([`Sequences`]) of the tensors that the term is computed from. A layer of
/// your own passes it to [`Param::keep_term`], if [`Param::keeps_terms`], in place of
/// [`Param::add_grad`].
pub enum SampleTerm<T: Element, B: Device> {
    /// gᵢ = dyᵢᵀ xᵢ, where dyᵢ and xᵢ are the rows of sample i.
    Product {
        /// The gradient of the output, and its columns that belong to the parameter.
        dy: (Tensor<T, B>, Range<usize>),
        /// The input.
        x: Tensor<T, B>,
        /// The samples, whose rows are those of dy and x.
        samples: Sequences,
        /// Computes the product in the order in which the layer adds.
        write: WriteProduct<T::Acc, B>,
    },
    /// Row r of gᵢ is Σ dyₜ over the rows t of sample i with `ids[t]` = r.
    Lookup {
        /// The row of the parameter for each row of dy, or [`NO_ROW`].
        ids: Vec<u32>,
        /// The gradient of the rows.
        dy: Tensor<T, B>,
        /// The samples, whose rows are those of dy.
        samples: Sequences,
    },
    /// gᵢ is row i: `[samples, elements of the parameter]`.
    Each(Tensor<T::Acc, B>),
}

impl<T: Element, B: Backend> SampleTerm<T, B> {
    /// Returns the number of samples.
    pub fn samples(&self) -> usize {
        match self {
            Self::Product { samples, .. } | Self::Lookup { samples, .. } => samples.len(),
            Self::Each(grads) => grads.shape().dims()[0],
        }
    }

    /// Adds Σ cᵢ gᵢ to a sum. A sample with the factor 0 adds nothing, even if its gradient is not
    /// finite.
    fn add_scaled(
        self,
        factors: &[f64],
        param: &Param<T, B>,
        sum: &mut Option<Tensor<T::Acc, B>>,
    ) -> Result<()> {
        let (device, shape) = (param.device(), param.shape());
        match self {
            Self::Product { dy: (dy, columns), x, samples, write } => {
                let dy = dy.into_element::<T::Acc>()?;
                let dy = scaled(device, dy.mat().columns(columns), &samples, factors)?;
                // 0 · ∞ is NaN, so x must not have the rows of samples without a factor either.
                let x = without_zeros(x.into_element::<T::Acc>()?, &samples, factors)?;
                sink::add_product(sum, (device, shape), |beta, dw| write((dy.mat(), x.mat()), beta, dw))
            }
            Self::Lookup { mut ids, dy, samples } => {
                for rows in zero_samples(&samples, factors) {
                    ids[rows].fill(NO_ROW);
                }
                let dy = dy.into_element::<T::Acc>()?;
                let dy = scaled(device, dy.mat(), &samples, factors)?;
                let mut grad = Tensor::zeros(device, shape)?;
                device.scatter_add(&ids, dy.mat(), grad.mat_mut()?)?;
                sink::add_term(sum, grad)
            }
            Self::Each(grads) => {
                let len = grads.shape().cols();
                let grads = without_zeros(grads, &Sequences::packed(factors.iter().map(|_| 1)), factors)?;
                let factors: Vec<T::Acc> = factors.iter().map(|&factor| rounded_down(factor)).collect();
                let factors = Tensor::<T::Acc, B>::from_slice(device, [1, factors.len()], &factors)?;
                let mut grad = Tensor::<T::Acc, B>::empty(device, [1, len])?;
                device.gemm(1.0, factors.mat(), grads.mat(), 0.0, grad.mat_mut()?)?;
                sink::add_term(sum, grad.reshape(shape)?)
            }
        }
    }
}

/// The rows of the samples whose factor is 0.
fn zero_samples<'a>(samples: &'a Sequences, factors: &'a [f64]) -> impl Iterator<Item = Range<usize>> + 'a {
    samples.iter().zip(factors).filter(|(_, factor)| **factor == 0.0).map(|(rows, _)| rows)
}

/// Rounds a factor such that the norm of a scaled gradient does not exceed its bound by the
/// rounding of the factor.
fn rounded_down<A: Element>(factor: f64) -> A {
    let near = A::from_f64(factor);
    if near.to_f64() <= factor { near } else { A::from_f64(factor * (1.0 - 2.0 * A::EPSILON)) }
}

/// Returns cᵢ dyₜ for each row t, where i is the sample of the row. Rows of samples with the factor
/// 0 are 0.
fn scaled<A: Element, B: Backend>(
    device: &B,
    dy: MatRef<'_, A, B>,
    samples: &Sequences,
    factors: &[f64],
) -> Result<Tensor<A, B>> {
    let mut of_rows = vec![A::from_f64(0.0); dy.rows()];
    for (rows, factor) in samples.iter().zip(factors) {
        of_rows[rows].fill(rounded_down(*factor));
    }
    let of_rows = Tensor::<A, B>::from_vec(device, [dy.rows()], of_rows)?;
    let mut scaled = Tensor::empty(device, [dy.rows(), dy.cols()])?;
    device.scale_rows::<A>(of_rows.slice(), dy, scaled.mat_mut()?)?;
    without_zeros(scaled, samples, factors)
}

/// Fills the rows of samples with the factor 0 with 0.
fn without_zeros<A: Element, B: Backend>(
    mut x: Tensor<A, B>,
    samples: &Sequences,
    factors: &[f64],
) -> Result<Tensor<A, B>> {
    let (device, cols) = (x.device().clone(), x.shape().cols());
    for rows in zero_samples(samples, factors).filter(|rows| !rows.is_empty()) {
        device.fill(0.0, x.mat_mut()?.block(rows, 0..cols))?;
    }
    Ok(x)
}

impl<T: Element, B: Backend> Param<T, B> {
    /// Lets layers keep the terms of the gradient from now on ([`Param::keep_term`]), in place of
    /// adding them; or drops the kept terms, and lets layers add later ones as usual.
    ///
    /// [`crate::optim::sample_norms`] computes the norms of the gradients of samples from the
    /// terms, and [`Param::add_kept`] adds them to the gradient.
    pub fn keep_terms(&self, keep: bool) {
        *self.0.0.terms.borrow_mut() = keep.then(Vec::new);
    }

    /// Whether a layer has to keep the terms of the gradient. A quantized parameter has no
    /// gradient.
    pub fn keeps_terms(&self) -> bool {
        self.0.0.terms.borrow().is_some() && !self.is_quantized()
    }

    /// Keeps a term until [`Param::add_kept`], if [`Param::keeps_terms`].
    pub fn keep_term(&self, term: SampleTerm<T, B>) {
        if self.is_quantized() {
            return;
        }
        if let Some(terms) = &mut *self.0.0.terms.borrow_mut() {
            terms.push(term);
        }
    }

    /// Returns the number of kept terms.
    pub fn kept(&self) -> usize {
        self.with_terms(<[_]>::len)
    }

    /// Calls `f` with the kept terms.
    pub(crate) fn with_terms<R>(&self, f: impl FnOnce(&[SampleTerm<T, B>]) -> R) -> R {
        f(self.0.0.terms.borrow().as_deref().unwrap_or_default())
    }

    /// Adds Σ cᵢ gᵢ of each kept term to the gradient, where cᵢ is the factor of sample i, and
    /// keeps none of them. A sample with the factor 0 adds nothing, even if its gradient is not
    /// finite.
    ///
    /// # Errors
    /// When a factor is negative or not finite, a term has another number of samples than there are
    /// factors, or the sink fails. The terms are lost then.
    pub fn add_kept(&self, factors: &[f64]) -> Result<()> {
        let terms = self.0.0.terms.borrow_mut().as_mut().map(std::mem::take).unwrap_or_default();
        if let Some(factor) = factors.iter().find(|factor| !(0.0..f64::INFINITY).contains(*factor)) {
            let reason = format!("a factor is {factor}, but it has to be at least 0 and finite");
            return Err(Error::invalid(OP, reason));
        }
        for term in terms {
            let of = format!("the number of sequences in the input of the layer of {}", self.name());
            same_size(OP, &of, term.samples(), "the number of factors", factors.len())?;
            let mut term = Some(term);
            self.add(None, &mut |_, sum| match term.take() {
                Some(term) => term.add_scaled(factors, self, sum),
                None => Err(Error::internal(OP, "a sink has added a term twice")),
            })?;
        }
        Ok(())
    }
}
