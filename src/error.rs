//! The error type of the crate. Every module may use this module, which uses no other module.
//!
//! An error's message names the operator and the two values that disagree, so that users can
//! correct the mistake without a debugger. Errors are `Clone` because every later call on a failed
//! group returns the group's first error, and `Send` because a rank's error goes to the thread that
//! launched it.

mod refusal;
mod site;

pub use refusal::Refusal;
pub(crate) use site::layer_of;
pub use site::{Site, SiteGuard};

use std::{fmt, io, net::SocketAddr, path::PathBuf, time::Duration};

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The error type of every operation of the crate. Later versions may add variants.
///
/// `Debug` prints the same text as `Display`, because `unwrap` and a `main` that returns an error
/// print with `Debug`.
#[derive(Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Two sizes contradict each other. In most cases they have to be equal.
    #[error("{op}: {left} is {left_size}, but {right} is {right_size}")]
    Sizes {
        /// The operator that failed.
        op: &'static str,
        /// The name of the first size.
        left: String,
        /// The first size.
        left_size: usize,
        /// The name of the second size.
        right: String,
        /// The second size.
        right_size: usize,
    },
    /// Two shapes that have to be equal are not.
    #[error("{op}: {left} has shape {left_shape:?}, but {right} has shape {right_shape:?}")]
    Shapes {
        /// The operator that failed.
        op: &'static str,
        /// The name of the first operand.
        left: String,
        /// The shape of the first operand.
        left_shape: Vec<usize>,
        /// The name of the second operand.
        right: String,
        /// The shape of the second operand.
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
    /// An invariant of the library is violated. This is a bug in the library, not in the caller.
    #[error("{op}: {reason}: this is a bug in shardwise, please report it")]
    Internal {
        /// The operator that failed.
        op: &'static str,
        /// The violated invariant.
        reason: String,
    },
    /// The host cannot allocate a tensor, or the tensor's size in bytes overflows.
    #[error("memory: no room for {len} elements of {size} bytes")]
    Memory {
        /// The number of elements.
        len: usize,
        /// The size of an element in bytes.
        size: usize,
    },
    /// A library that was loaded at run time returned an error.
    #[error("{call}: {library} error {code}: {message}")]
    Library {
        /// The library.
        library: &'static str,
        /// The function that failed.
        call: &'static str,
        /// The library's error code.
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
    /// arguments, or a message was not received. The failed call moved no data.
    #[error("ranks disagree: rank {} called {}; rank {} called {}", .0.left_rank, .0.left, .0.right_rank, .0.right)]
    Mismatch(Box<Mismatch>),
    /// A rank of the group panicked, returned, dropped the group or lost its connection while this
    /// rank still needed it.
    #[error(
        "rank {rank} was lost ({reason}) before it joined {op} (call {seq} of group `{group}`, at {site})"
    )]
    PeerLost {
        /// The lost rank, as a rank of `group`.
        rank: usize,
        /// How the rank was lost.
        reason: LostReason,
        /// The operation in which this rank waited, or which this rank was about to start.
        op: &'static str,
        /// The sequence number of this rank's call.
        seq: u64,
        /// The name of the group.
        group: String,
        /// The site of this rank's call.
        site: Site,
    },
    /// Ranks did not join a call within the group's deadline.
    #[error(
        "ranks {missing:?} did not join {op} (call {seq} of group `{group}`, at {site}) within {after:?}"
    )]
    Deadline {
        /// The ranks that had not joined.
        missing: Vec<usize>,
        /// The operation in which a rank waited.
        op: &'static str,
        /// The sequence number of the waiting rank's call.
        seq: u64,
        /// The name of the group.
        group: String,
        /// The site of the waiting rank's call.
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
        /// The error that the rank returned.
        source: Box<Error>,
    },
    /// Several ranks of a group hold the same elements of a tensor, but with different bits.
    #[error("rank {rank} of group `{group}` has drifted: its `{tensor}` differs from rank {other}'s")]
    Drift {
        /// The tensor's name.
        tensor: String,
        /// The lowest rank whose elements differ from rank `other`'s.
        rank: usize,
        /// The lowest rank that holds these elements.
        other: usize,
        /// The name of the group.
        group: String,
    },
    /// The processes of a job refused to connect: this rank and the process at `address`.
    #[error("rendezvous: rank {rank} of {world}, at {address}: refused: {refusal}")]
    Refused {
        /// This rank.
        rank: usize,
        /// The number of ranks.
        world: usize,
        /// The address of rank 0.
        address: SocketAddr,
        /// The reason.
        refusal: Refusal,
    },
    /// Ranks did not connect to rank 0 within the deadline.
    #[error(
        "rendezvous: ranks {missing:?} did not connect to rank 0 at {address} within {after:?}{}",
        refused_text(*refused, last.as_ref())
    )]
    NotConnected {
        /// The ranks that did not connect.
        missing: Vec<usize>,
        /// The address of rank 0.
        address: SocketAddr,
        /// The deadline.
        after: Duration,
        /// The number of connections that rank 0 refused.
        refused: u64,
        /// Why rank 0 refused one of them: the last reason that it knows.
        last: Option<Refusal>,
    },
    /// A transport would send plaintext between machines, which the job's policy forbids:
    /// [`crate::security::Policy`].
    #[error("{transport} sends plaintext between machines, but the policy is `{policy}`: {hint}")]
    NotEncrypted {
        /// The transport.
        transport: &'static str,
        /// The policy.
        policy: String,
        /// What is allowed instead, or why the network is not the trusted one.
        hint: String,
    },
    /// Weights would reach a rank whose role may not see those of other ranks:
    /// [`crate::security::Role`].
    #[error(
        "{op}: {who} has the role `{role}`, which may not see the weights of other ranks: that needs the role \
         `checkpointer`"
    )]
    NotPermitted {
        /// The operator.
        op: &'static str,
        /// The rank.
        who: String,
        /// Its role.
        role: &'static str,
    },
    /// One more step of private training would exceed the budget of its ledger. The step was not
    /// charged, and must not be made.
    #[error(
        "privacy budget: ε is {spent} at δ = {delta:e}, and one more step would make it {next}: the budget is {budget}"
    )]
    PrivacyBudget {
        /// The ε of all steps so far.
        spent: f64,
        /// The ε with the refused step.
        next: f64,
        /// The largest ε.
        budget: f64,
        /// The δ of all three.
        delta: f64,
    },
    /// A key, a certificate or a membership file cannot be used.
    #[error("{}: {reason}", .path.display())]
    Credential {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file could not be opened, read or written.
    #[error("{}: {reason}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The kind of the failure.
        kind: io::ErrorKind,
        /// The operating system's message.
        reason: String,
    },
    /// A checkpoint file is damaged or inconsistent.
    #[error("{}: bad checkpoint: {reason}", .path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What is wrong with the file.
        reason: String,
    },
    /// The description of a model, a machine or a plan cannot be read, or has a value that the
    /// library does not know.
    #[error("{}: {reason}", .path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with the file, or which value is unknown.
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
        /// The source that has the tensor.
        place: String,
        /// The tensor's shape in the source.
        found: Vec<usize>,
        /// The shape that the layer needs.
        needed: Vec<usize>,
    },
    /// A tensor of a checkpoint has an element type that cannot be read into a floating-point
    /// tensor.
    #[error(
        "tensor `{name}` has elements {found} in {place}; f64, f32, bf16 or f16 can be read, and from GGUF also \
         Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K"
    )]
    TensorElement {
        /// The tensor.
        name: String,
        /// The source that has the tensor.
        place: String,
        /// The tensor's element type in the source.
        found: String,
    },
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Error {
    /// Two sizes contradict each other. In most cases they have to be equal.
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

    /// Returns [`Error::Io`] for a path that is not a regular file.
    pub(crate) fn no_file(path: impl Into<PathBuf>) -> Self {
        Self::io(path, &io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"))
    }

    /// An invariant of the library is violated.
    pub(crate) fn internal(op: &'static str, reason: impl Into<String>) -> Self {
        Self::Internal { op, reason: reason.into() }
    }

    /// Whether this error only reports another rank's failure, and is not the first cause.
    ///
    /// When several ranks fail, the launcher returns an error that is no consequence, if there is
    /// one.
    pub fn is_consequence(&self) -> bool {
        matches!(self, Self::PeerLost { .. } | Self::Deadline { .. })
    }
}

/// What rank 0 says about the connections that it refused.
fn refused_text(refused: u64, last: Option<&Refusal>) -> String {
    let last = last.map_or(String::new(), |last| format!(", the last because {last}"));
    if refused == 0 { String::new() } else { format!("; connections that rank 0 refused: {refused}{last}") }
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

/// The two sides of [`Error::Mismatch`], the same on every rank of the group. Usually `left_rank`
/// is rank 0 of the group, and `right_rank` the lowest rank whose call differs from rank 0's. If a
/// message is wrong or missing, or ranks wait for each other, these are the two ranks concerned.
#[derive(Clone, Debug, PartialEq)]
pub struct Mismatch {
    /// The first of the two ranks, as a rank of the group.
    pub left_rank: usize,
    /// The call of `left_rank` as text: operation, arguments, sequence number, call site.
    pub left: String,
    /// The second of the two ranks.
    pub right_rank: usize,
    /// The call of `right_rank`.
    pub right: String,
}

impl Mismatch {
    /// Returns the mismatch between the calls of two ranks. The lower rank becomes `left_rank`.
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
    /// The rank panicked.
    Panicked,
    /// The rank returned an error.
    Failed,
    /// The rank returned, or dropped the group.
    Left,
    /// The rank's process ended, or its connection broke.
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
