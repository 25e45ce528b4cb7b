//! The error type of the crate. Every module may use it; it uses none of them.
//!
//! A message names the operator and the two things that disagree, which should be enough to act on
//! it without a debugger. Errors are `Clone` because every later call on a failed group returns the
//! group's first error, and `Send` because a rank's error goes to the thread that launched it.

mod site;

pub(crate) use site::layer_of;
pub use site::{Site, SiteGuard};

use std::{fmt, io, path::PathBuf, time::Duration};

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The error of every operation of the crate. Later versions may add variants.
///
/// `Debug` prints the same as `Display`, for a `main` that returns an error and for `unwrap`.
#[derive(Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Two sizes that have to be equal are not.
    #[error("{op}: {left} is {left_size}, but {right} is {right_size}")]
    Sizes {
        /// The operator that failed.
        op: &'static str,
        /// What the first number measures.
        left: String,
        /// The first number.
        left_size: usize,
        /// What the second number measures.
        right: String,
        /// The second number.
        right_size: usize,
    },
    /// Two shapes that have to be equal are not.
    #[error("{op}: {left} has shape {left_shape:?}, but {right} has shape {right_shape:?}")]
    Shapes {
        /// The operator that failed.
        op: &'static str,
        /// The first operand.
        left: String,
        /// Its shape.
        left_shape: Vec<usize>,
        /// The second operand.
        right: String,
        /// Its shape.
        right_shape: Vec<usize>,
    },
    /// A dimension has fewer indivisible units than there are ranks to share them.
    #[error("{op}: {ranks} ranks cannot share {units} {unit}: each rank needs at least one")]
    TooManyRanks {
        /// The operator that failed.
        op: &'static str,
        /// The number of ranks.
        ranks: usize,
        /// The number of units.
        units: usize,
        /// The name of the unit: `heads`, `features`, …
        unit: &'static str,
    },
    /// An argument is invalid by itself.
    #[error("{op}: {reason}")]
    Invalid {
        /// The operator that failed.
        op: &'static str,
        /// What is wrong with the argument, with its value.
        reason: String,
    },
    /// An invariant of the library is violated, which is not the caller's fault.
    #[error("{op}: {reason}: this is a bug in shardwise, please report it")]
    Internal {
        /// The operator that failed.
        op: &'static str,
        /// The violated invariant.
        reason: String,
    },
    /// The host has no memory for a tensor, or its size in bytes overflows.
    #[error("memory: no room for {len} elements of {size} bytes")]
    Memory {
        /// The number of elements.
        len: usize,
        /// The bytes of one.
        size: usize,
    },
    /// A library that was loaded at run time returned an error.
    #[error("{call}: {library} error {code}: {message}")]
    Library {
        /// The library.
        library: &'static str,
        /// The function that failed.
        call: &'static str,
        /// Its error code.
        code: i32,
        /// The library's message.
        message: String,
    },
    /// The device, transport or setting does not support the operation.
    #[error("{op}: not supported: {reason}")]
    Unsupported {
        /// The operator that failed.
        op: &'static str,
        /// What is not supported.
        reason: String,
    },
    /// The ranks of a group called different operations, or the same operation with different
    /// arguments. No data moved.
    #[error("ranks disagree: rank {} called {}; rank {} called {}", .0.left_rank, .0.left, .0.right_rank, .0.right)]
    Mismatch(Box<Mismatch>),
    /// A rank of the group panicked, returned or was dropped while this rank still needed it.
    #[error(
        "rank {rank} was lost ({reason}) before it joined {op} (call {seq} of group `{group}`, at {site})"
    )]
    PeerLost {
        /// The lost rank, as a rank of the group of the failed call.
        rank: usize,
        /// How it was lost.
        reason: LostReason,
        /// The operation in which this rank waited, or which it was about to start.
        op: &'static str,
        /// The sequence number of that call.
        seq: u64,
        /// The name of the group.
        group: String,
        /// Where this rank made the call.
        site: Site,
    },
    /// Ranks did not join a call within the group's deadline.
    #[error(
        "ranks {missing:?} did not join {op} (call {seq} of group `{group}`, at {site}) within {after:?}"
    )]
    Deadline {
        /// The ranks that had not joined.
        missing: Vec<usize>,
        /// The operation that was waiting.
        op: &'static str,
        /// The sequence number of that call.
        seq: u64,
        /// The name of the group.
        group: String,
        /// Where the waiting rank made the call.
        site: Site,
        /// The deadline.
        after: Duration,
    },
    /// The function that a rank was running panicked.
    #[error("rank {rank} panicked: {message}")]
    RankPanicked {
        /// The rank in the world.
        rank: usize,
        /// The panic's message.
        message: String,
    },
    /// The function that a rank was running returned an error.
    #[error("rank {rank}: {source}")]
    RankFailed {
        /// The rank in the world.
        rank: usize,
        /// The error it returned.
        source: Box<Error>,
    },
    /// Elements of a tensor that several ranks of a group hold have different bits on one of them.
    #[error("rank {rank} of group `{group}` has drifted: its `{tensor}` differs from rank {other}'s")]
    Drift {
        /// The tensor's name.
        tensor: String,
        /// The first rank that differs from one before it.
        rank: usize,
        /// The first rank that holds the same elements.
        other: usize,
        /// The name of the group.
        group: String,
    },
    /// A file could not be opened, read or written.
    #[error("{}: {reason}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What kind of failure it was.
        kind: io::ErrorKind,
        /// The operating system's message.
        reason: String,
    },
    /// A checkpoint file is damaged or inconsistent.
    #[error("{}: bad checkpoint: {reason}", .path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A model's configuration cannot be read, or has an unknown value.
    #[error("{}: {reason}", .path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, or unknown.
        reason: String,
    },
    /// A source of weights does not have a tensor.
    #[error("tensor `{name}` is not in {place}{hint}")]
    MissingTensor {
        /// The tensor.
        name: String,
        /// The source that was searched.
        place: String,
        /// A similar existing name, as `; did you mean …?`, or an empty text.
        hint: String,
    },
    /// A tensor of a checkpoint does not have the shape that the layer needs.
    #[error("tensor `{name}` has shape {found:?} in {place}, but the layer needs {needed:?}")]
    TensorShape {
        /// The tensor.
        name: String,
        /// The source that has it.
        place: String,
        /// The shape it has.
        found: Vec<usize>,
        /// The shape that the layer needs.
        needed: Vec<usize>,
    },
    /// A tensor of a checkpoint has an element type that cannot be read into a floating-point
    /// tensor.
    #[error("tensor `{name}` has elements {found} in {place}; f64, f32, bf16 or f16 can be read")]
    TensorElement {
        /// The tensor.
        name: String,
        /// The source that has it.
        place: String,
        /// The element type it has.
        found: String,
    },
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Error {
    /// Two sizes that have to be equal are not.
    pub fn sizes(
        op: &'static str,
        left: impl Into<String>,
        left_size: usize,
        right: impl Into<String>,
        right_size: usize,
    ) -> Self {
        Self::Sizes { op, left: left.into(), left_size, right: right.into(), right_size }
    }

    /// An argument is invalid by itself.
    pub fn invalid(op: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { op, reason: reason.into() }
    }

    /// A file could not be opened, read or written.
    pub fn io(path: impl Into<PathBuf>, error: &io::Error) -> Self {
        Self::Io { path: path.into(), kind: error.kind(), reason: error.to_string() }
    }

    /// [`Error::Io`] of a path that is not a regular file.
    pub(crate) fn no_file(path: impl Into<PathBuf>) -> Self {
        Self::io(path, &io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"))
    }

    /// An invariant of the library is violated.
    pub(crate) fn internal(op: &'static str, reason: impl Into<String>) -> Self {
        Self::Internal { op, reason: reason.into() }
    }

    /// Whether this error only reports that another rank failed, and is not the first cause.
    ///
    /// When several ranks fail, the launcher returns an error for which this is false, if there is
    /// one.
    pub fn is_consequence(&self) -> bool {
        matches!(self, Self::PeerLost { .. } | Self::Deadline { .. })
    }
}

/// Returns [`Error::Sizes`] unless the two sizes are equal.
pub(crate) fn same_size(
    op: &'static str,
    left: &str,
    left_size: usize,
    right: &str,
    right_size: usize,
) -> Result<()> {
    if left_size == right_size {
        return Ok(());
    }
    Err(Error::sizes(op, left, left_size, right, right_size))
}

/// Returns [`Error::Shapes`] unless the two shapes are equal.
pub(crate) fn same_shape(
    op: &'static str,
    left: &str,
    left_shape: &[usize],
    right: &str,
    right_shape: &[usize],
) -> Result<()> {
    if left_shape == right_shape {
        return Ok(());
    }
    let (left_shape, right_shape) = (left_shape.to_vec(), right_shape.to_vec());
    Err(Error::Shapes { op, left: left.into(), left_shape, right: right.into(), right_shape })
}

/// The two sides of [`Error::Mismatch`]: the same on every rank of the group.
#[derive(Clone, Debug, PartialEq)]
pub struct Mismatch {
    /// The first rank of the group.
    pub left_rank: usize,
    /// Its call as text: operation, arguments, sequence number, call site.
    pub left: String,
    /// The lowest rank whose call differs from the first rank's.
    pub right_rank: usize,
    /// Its call.
    pub right: String,
}

impl Mismatch {
    /// The mismatch between the calls of two ranks, ordered by rank.
    pub(crate) fn between(one: (usize, String), other: (usize, String)) -> Self {
        let ((left_rank, left), (right_rank, right)) =
            if one.0 < other.0 { (one, other) } else { (other, one) };
        Self { left_rank, left, right_rank, right }
    }
}

/// How a rank was lost. Later versions may add reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LostReason {
    /// Its thread panicked.
    Panicked,
    /// It returned an error.
    Failed,
    /// It returned, or dropped the group.
    Left,
    /// Its process ended, or its connection broke.
    Disconnected,
}

impl fmt::Display for LostReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Panicked => "it panicked",
            Self::Failed => "it returned an error",
            Self::Left => "it left the group",
            Self::Disconnected => "its process ended or its connection broke",
        })
    }
}
