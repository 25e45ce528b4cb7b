//! Mean pooling over sequences.

use crate::{
    device::Element,
    error::{Error, Result},
    kernels::Backend,
    ops,
    parallel::{DTensor, DropoutState, Layer},
    shard::{Replicated, Sequences},
};

/// yₛ = (1 / nₛ) Σ xᵢ over the nₛ tokens i of sequence s: Replicated → Replicated. No collectives.
///
/// x: `[tokens, features]`. y: `[sequences, features]`, each row of which is a sequence. Padding
/// does not count. For a later dropout layer, the first row of y is row [`DropoutState::sequence`].
///
/// Backward: dxᵢ = dyₛ / nₛ for each token i of sequence s.
///
/// ```
/// use shardwise::prelude::*;
///
/// let group = Group::solo(&Cpu::new());
/// let x = Tensor::<f32, _>::from_slice(group.device(), [3, 1], &[1.0, 2.0, 6.0])?;
/// let x = DTensor::replicated(&group, x)?.with_sequences(Sequences::packed([1, 2]))?;
/// let (y, saved) = MeanPool.forward(x)?;
/// assert_eq!(y.local().to_vec()?, [1.0, 4.0]);
/// assert_eq!(MeanPool.backward(saved, y)?.local().to_vec()?, [1.0, 2.0, 2.0]);
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct MeanPool;

impl<T: Element, B: Backend> Layer<T, B> for MeanPool {
    type In = Replicated;
    type Out = Replicated;
    type Saved = Sequences;

    fn forward(&self, x: DTensor<Replicated, T, B>) -> Result<(DTensor<Replicated, T, B>, Sequences)> {
        const OP: &str = "mean pool";
        x.check_rows(OP)?;
        if x.sequences().are_cached() {
            let reason = "the mean over a sequence in a cached step";
            return Err(Error::Unsupported { op: OP, reason: reason.into() });
        }
        let means = DTensor::replicated(x.group(), ops::mean_sequences(x.local(), x.sequences())?)?
            .with_sequences(Sequences::packed(x.sequences().iter().map(|_| 1)))?;
        let y = match x.dropout_state() {
            Some(dropout) => means.with_dropout_state(DropoutState { row: dropout.sequence, ..dropout }),
            None => means,
        };
        Ok((y, x.sequences().clone()))
    }

    fn backward(
        &self,
        sequences: Sequences,
        dy: DTensor<Replicated, T, B>,
    ) -> Result<DTensor<Replicated, T, B>> {
        dy.check_rows("mean pool backward")?;
        let dx = ops::mean_sequences_backward(&sequences, dy.local())?;
        DTensor::replicated(dy.group(), dx)?.with_sequences(sequences)
    }
}
