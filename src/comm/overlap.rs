//! The setting that makes layers overlap collectives with computation.

/// How layers overlap their collectives with computation. A layer divides its tokens into chunks,
/// and communicates one chunk while it computes the next.
///
/// Every setting gives the same bits, because chunks divide only tokens, and the communicated sums
/// do not run over tokens. (With NCCL's `Order::Any`, the order of additions is unspecified, with
/// or without chunks.)
///
/// Later versions may add other rules for the chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Overlap {
    /// No chunks: one collective after the computation.
    #[default]
    Off,
    /// This many chunks, but at most one chunk per token.
    Chunks(usize),
    /// At most four chunks of at least this many bytes each; no chunks if there is not enough data
    /// for two. The size from which chunks save time depends on the transport and the machine.
    /// [`crate::parallel::MeasuredOverlap`] measures it.
    From(usize),
}
