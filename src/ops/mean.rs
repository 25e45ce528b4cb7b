//! The mean over each sequence.

use crate::{
    device::Element,
    error::{Result, same_size},
    kernels::{Backend, NO_ROW},
    ops,
    shard::Sequences,
    tensor::Tensor,
};

/// Returns the sequence of each row, or [`NO_ROW`] for padding. Also returns 1 / n for each
/// sequence of n tokens, or 0 if n = 0.
fn members<A: Element, B: Backend>(device: &B, sequences: &Sequences) -> Result<(Vec<u32>, Tensor<A, B>)> {
    let (mut ids, mut shares) = (vec![NO_ROW; sequences.rows()], Vec::with_capacity(sequences.len()));
    for (sequence, rows) in sequences.iter().enumerate() {
        let tokens = rows.filter(|&row| sequences.valid().is_none_or(|valid| valid[row]));
        let count = tokens.map(|row| ids[row] = sequence as u32).count();
        shares.push(A::from_f64(if count == 0 { 0.0 } else { 1.0 / count as f64 }));
    }
    Ok((ids, Tensor::from_vec(device, [sequences.len()], shares)?))
}

/// yₛ = the mean of the rows of sequence s, without padding: `[sequences, features]`. The mean of a
/// sequence without tokens is 0.
///
/// # Errors
/// When the sequences and x have different numbers of rows.
pub fn mean_sequences<T: Element, B: Backend>(
    x: &Tensor<T, B>,
    sequences: &Sequences,
) -> Result<Tensor<T, B>> {
    const OP: &str = "mean of sequences";
    same_size(OP, "rows of the sequences", sequences.rows(), "rows of x", x.shape().rows())?;
    let (ids, shares) = members::<T::Acc, B>(x.device(), sequences)?;
    let sums = ops::scatter_rows(x.device(), &ids, sequences.len(), x.mat())?;
    ops::scale_rows(&shares, &sums)?.into_element()
}

/// dxᵢ = dyₛ / n, where row i belongs to sequence s, which has n tokens. The dx of padding is 0.
///
/// # Errors
/// When dy does not have one row per sequence.
pub fn mean_sequences_backward<T: Element, B: Backend>(
    sequences: &Sequences,
    dy: &Tensor<T, B>,
) -> Result<Tensor<T, B>> {
    const OP: &str = "mean of sequences backward";
    same_size(OP, "rows of dy", dy.shape().rows(), "the number of sequences", sequences.len())?;
    let (ids, shares) = members::<T::Acc, B>(dy.device(), sequences)?;
    ops::scale_rows(&shares, &dy.convert::<T::Acc>()?)?.rows(&ids)?.into_element()
}
