//! The norms of the gradients of samples, whose terms the parameters keep.

use super::{
    OP,
    blocks::{ModelSum, Piece},
    terms::Terms,
};
use crate::{
    comm::Group,
    device::Element,
    error::{Error, Result, same_size},
    kernels::{Backend, MatRef, NO_ROW},
    shard::Sequences,
    tensor::{Param, SampleTerm, Tensor},
};
use std::ops::Range;

/// ‖gᵢ‖, for each sample i, of the gradient gᵢ of all given parameters, whose terms are kept
/// ([`Param::keep_terms`]). The norms are equal on every rank of the groups, and with an invariant
/// reduction at every number of ranks.
///
/// The norm of a product gᵢ = dyᵀ x over T tokens is computed without gᵢ, from the Gram matrices dy
/// dyᵀ and x xᵀ, where this takes fewer operations: ‖gᵢ‖² = Σ (dy dyᵀ) ∘ (x xᵀ). A bound of the
/// rounding error, 16 ε ‖dy‖² ‖x‖², is then added to the square, where ε is that of the accumulator
/// type: where tokens cancel, a norm that is too small would not bound the clipped gradient.
///
/// Collectives: as [`grad_norm`](super::grad_norm), with as many numbers for each sample.
///
/// Source: Li et al., 2022: Large Language Models Can Be Strong Differentially Private Learners,
/// section 4; Bu et al., 2022: Scalable and Efficient Training of Large Convolutional Neural
/// Networks with Differential Privacy.
///
/// # Errors
/// As [`grad_norm`](super::grad_norm); when a term has another number of samples, or a parameter
/// keeps terms of several backwards.
#[track_caller]
pub fn sample_norms<T: Element, B: Backend>(
    params: &[Param<T, B>],
    groups: &[&Group<B>],
    samples: usize,
) -> Result<Vec<f64>> {
    let (sum, mut terms) = (ModelSum::new(params, groups)?, Terms::default());
    for param in params {
        param.with_terms(|kept| {
            if kept.len() > param.ties() {
                let (terms, layers) = (kept.len(), param.ties());
                let reason = format!(
                    "{} keeps {terms} terms of {layers} layers, from several backwards whose samples differ: \
                     clip after each backward",
                    param.name()
                );
                return Err(Error::invalid(OP, reason));
            }
            for term in kept {
                let of = format!("the number of sequences in the input of the layer of {}", param.name());
                same_size(OP, &of, term.samples(), "the number of samples", samples)?;
            }
            for piece in if kept.is_empty() { Vec::new() } else { sum.pieces(param)? } {
                let width = sum.terms();
                let to = |sample: usize| sample * width + piece.leaf;
                match kept {
                    [term] => add_term(&mut terms, param, term, &piece, &to)?,
                    _ => (0..samples).try_for_each(|sample| {
                        let grad = whole(param, kept, &piece, sample)?;
                        terms.squares(param.device(), grad.mat(), to(sample))
                    })?,
                }
            }
            Ok(())
        })?;
    }
    // Even then, the square of tokens that cancel may be below 0 by rounding. NaN stays NaN.
    let norm = |square: f64| if square < 0.0 { 0.0 } else { square.sqrt() };
    Ok(sum.total(samples, terms)?.into_iter().map(norm).collect())
}

/// Adds the squares of a part of the gradients of all samples, if the parameter has one term.
fn add_term<T: Element, B: Backend>(
    terms: &mut Terms<B>,
    param: &Param<T, B>,
    term: &SampleTerm<T, B>,
    piece: &Piece,
    to: &dyn Fn(usize) -> usize,
) -> Result<()> {
    let device = param.device();
    match term {
        SampleTerm::Each(grads) => {
            check_each(param, grads)?;
            let sums: Vec<_> = (0..grads.shape().rows()).map(to).collect();
            piece.rows.clone().try_for_each(|row| {
                let elements = grads.mat().columns(elements(param, piece, row));
                terms.squares_of_rows(device, elements, sums.clone())
            })
        }
        SampleTerm::Lookup { ids, dy, samples } => {
            samples.iter().enumerate().try_for_each(|(sample, rows)| {
                let (ids, found) = renumbered(&ids[rows.clone()], &piece.rows);
                let mut grad = Tensor::<T::Acc, B>::zeros(device, [found, piece.cols.len()])?;
                device.scatter_add(&ids, dy.mat().block(rows, piece.cols.clone()), grad.mat_mut()?)?;
                terms.squares(device, grad.mat(), to(sample))
            })
        }
        SampleTerm::Product { dy: (dy, columns), x, samples, .. } => {
            let dy = dy.mat().columns(columns.start + piece.rows.start..columns.start + piece.rows.end);
            let x = x.mat().columns(piece.cols.clone());
            let each: Vec<_> = samples.iter().enumerate().collect();
            // Samples of one token are computed together.
            for run in each.chunk_by(|(_, a), (_, b)| a.len() == 1 && b.len() == 1) {
                let (start, end) = (run[0].1.start, run[run.len() - 1].1.end);
                let (dy, x) = (dy.block(start..end, 0..dy.cols()), x.block(start..end, 0..x.cols()));
                match run {
                    [(sample, rows)] if rows.len() != 1 => {
                        add_product(terms, device, (dy, x), to(*sample))?;
                    }
                    _ => {
                        let sums = run.iter().map(|(sample, _)| to(*sample)).collect();
                        terms.products_of_rows(device, (dy, x), sums)?;
                    }
                }
            }
            Ok(())
        }
    }
}

/// Bounds the rounding error of a sum over Gram matrices: at most this number times ε ‖dy‖² ‖x‖²,
/// where ε is that of the accumulator. Tests find errors of up to 2.4.
const ROUNDING: f64 = 16.0;

/// Adds ‖dyᵀ x‖² to a sum. From Gram matrices, it also adds a bound of their rounding error: where
/// the tokens of a sample cancel, the sum over the matrices could otherwise be too small, and the
/// clipped gradient too large. Without cancellation the bound is about 16 ε T times the sum, over T
/// tokens. Which way is taken depends on the sample and the part alone, so the bits
/// do not depend on the other samples of the microbatch.
fn add_product<T: Element, B: Backend>(
    terms: &mut Terms<B>,
    device: &B,
    (dy, x): (MatRef<'_, T, B>, MatRef<'_, T, B>),
    sum: usize,
) -> Result<()> {
    let [tokens, rows, cols] = [dy.rows(), dy.cols(), x.cols()];
    if tokens.saturating_mul(rows + cols) <= rows.saturating_mul(cols) {
        let gram = |a: MatRef<'_, T, B>| -> Result<Tensor<T::Acc, B>> {
            let mut gram = Tensor::empty(device, [tokens, tokens])?;
            device.gemm_block::<T, T::Acc>(a, a.t(), 0.0, gram.mat_mut()?)?;
            Ok(gram)
        };
        let (left, right) = (gram(dy)?, gram(x)?);
        let mut dots = Tensor::<T::Acc, B>::empty(device, [tokens])?;
        device.dot_rows::<T::Acc>(left.mat(), right.mat(), dots.slice_mut()?)?;
        terms.elements(&dots, sum)?;
        // The traces are ‖dy‖² and ‖x‖².
        return terms.product_of_traces((&left, &right), (ROUNDING * T::Acc::EPSILON, sum));
    }
    let mut grad = Tensor::<T::Acc, B>::empty(device, [rows, cols])?;
    device.gemm_block::<T, T::Acc>(dy.t(), x, 0.0, grad.mat_mut()?)?;
    terms.squares(device, grad.mat(), sum)
}

/// Computes a part of the gradient of a sample: the sum of all terms.
fn whole<T: Element, B: Backend>(
    param: &Param<T, B>,
    terms: &[SampleTerm<T, B>],
    piece: &Piece,
    sample: usize,
) -> Result<Tensor<T::Acc, B>> {
    let (device, [rows, cols]) = (param.device(), [&piece.rows, &piece.cols]);
    let mut sum = Tensor::<T::Acc, B>::zeros(device, [rows.len(), cols.len()])?;
    for term in terms {
        match term {
            SampleTerm::Each(grads) => {
                check_each(param, grads)?;
                for row in rows.clone() {
                    let grad = grads.mat().block(sample..sample + 1, elements(param, piece, row));
                    let to = row - rows.start..row - rows.start + 1;
                    device.accumulate::<T::Acc, T::Acc>(grad, sum.mat_mut()?.block(to, 0..cols.len()))?;
                }
            }
            SampleTerm::Lookup { ids, dy, samples } => {
                let of = rows_of(samples, sample);
                let own =
                    |id: &u32| if rows.contains(&(*id as usize)) { id - rows.start as u32 } else { NO_ROW };
                let ids: Vec<u32> = ids[of.clone()].iter().map(own).collect();
                device.scatter_add(&ids, dy.mat().block(of, cols.clone()), sum.mat_mut()?)?;
            }
            SampleTerm::Product { dy: (dy, columns), x, samples, .. } => {
                let of = rows_of(samples, sample);
                let dy = dy.mat().block(of.clone(), columns.start + rows.start..columns.start + rows.end);
                device.gemm_block::<T, T::Acc>(
                    dy.t(),
                    x.mat().block(of, cols.clone()),
                    1.0,
                    sum.mat_mut()?,
                )?;
            }
        }
    }
    Ok(sum)
}

/// Checks that a term has the gradients of all elements.
fn check_each<T: Element, B: Backend>(param: &Param<T, B>, grads: &Tensor<T::Acc, B>) -> Result<()> {
    let what = format!("the columns of a term of {}", param.name());
    same_size(OP, &what, grads.shape().cols(), "the elements of the parameter", param.shape().len())
}

/// The elements of a row of a part, as a range of the elements of the parameter.
fn elements<T: Element, B: Backend>(param: &Param<T, B>, piece: &Piece, row: usize) -> Range<usize> {
    let start = row * param.shape().split_at(0).1;
    match param.shape().rank() {
        1 => piece.cols.clone(),
        _ => start + piece.cols.start..start + piece.cols.end,
    }
}

fn rows_of(samples: &Sequences, sample: usize) -> Range<usize> {
    samples.iter().nth(sample).unwrap_or(0..0)
}

/// Numbers the distinct ids in a range, in their order. Returns the number of each id, or
/// [`NO_ROW`] outside the range, and how many distinct ids there are.
fn renumbered(ids: &[u32], range: &Range<usize>) -> (Vec<u32>, usize) {
    let mut found: Vec<u32> = ids.iter().copied().filter(|&id| range.contains(&(id as usize))).collect();
    found.sort_unstable();
    found.dedup();
    let number = |id: &u32| found.binary_search(id).map_or(NO_ROW, |at| at as u32);
    (ids.iter().map(number).collect(), found.len())
}
