//! The setting that makes layers overlap collectives with computation.

/// How layers overlap their collectives with computation: by chunks of tokens, where one chunk is
/// communicated while the rank computes another.
///
/// Every setting gives the same bits: only tokens are divided, and no sum runs over them. (NCCL's
/// `Order::Any` does not promise rank order, with or without chunks.)
///
/// Later versions may add other ways to choose the chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Overlap {
    /// No chunks: one collective after the computation.
    #[default]
    Off,
    /// This many chunks, or as many as there are tokens.
    Chunks(usize),
    /// At most four chunks of at least this many bytes each; no chunks for few tokens. The size at
    /// which chunks pay depends on transport and machine; [`crate::parallel::MeasuredOverlap`]
    /// measures it.
    From(usize),
}
