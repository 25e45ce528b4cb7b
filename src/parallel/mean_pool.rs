//! Mean pooling over sequences.

use super::{DTensor, DropoutState, Layer};
use crate::{
    device::Element,
    error::{Error, Result},
    kernels::Backend,
    ops,
    shard::{Replicated, Sequences},
};

/// yₛ = the mean over the tokens of sequence s of their rows: Replicated → Replicated. No
/// collectives.
///
/// `x`: `[tokens, features]`; `y`: `[sequences, features]`, a sequence of its own. Padding does not
/// count. Behind it, dropout draws by the number of the sequence ([`DropoutState::sequence`]).
///
/// Backward: the gradient of a mean, divided by the number of tokens, for each of them.
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
            let reason = "the mean over a sequence of which a cache has some tokens";
            return Err(Error::Unsupported { op: OP, reason: reason.into() });
        }
        let means = DTensor::replicated(x.group(), ops::mean_sequences(x.local(), x.sequences())?)?;
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
