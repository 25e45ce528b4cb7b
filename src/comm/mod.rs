//! Groups of ranks and their collectives. The module moves tensors and knows their partitions. Its
//! only arithmetic is sum, max and min.
//!
//! Operators use [`Group`], which is typed and adds shapes, partitions and sequence numbers. A
//! group moves its data through a [`Communicator`], an object-safe trait:
//!
//! | communicator | ranks |
//! |---|---|
//! | [`Solo`] | one rank, on any device |
//! | [`threads::ThreadComm`] | threads of one process, which read one another's memory |
//! | [`Link`] | processes over TCP, with rank 0 as relay; for control and small tensors |
#![cfg_attr(feature = "mpi", doc = "| [`MpiComm`] | processes, over an MPI library |")]
//! | [`HostStaged`] | the ranks of the host communicator that it wraps; for tensors of any device |
//! | [`Recorded`] | the ranks of the communicator that it wraps; logs every transfer |
//! | [`Planned`] | one simulated rank of a group of any size, on the `Meta` device |
//!
//! Every call is described by a [`Call`]: operation, element type, shape and sequence number. The
//! ranks compare their calls before any data moves. If the calls differ, every rank gets
//! [`crate::Error::Mismatch`] and no buffer changes. If a rank panics or leaves, the others get
//! [`crate::Error::PeerLost`] instead of waiting for it.

mod call;
mod cause;
mod collectives;
mod combine;
mod communicator;
mod control;
mod group;
mod host;
mod link;
mod mesh;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
pub mod nccl;
mod overlap;
mod planned;
mod recorded;
mod settings;
mod shards;
mod solo;
mod staged;
mod started;
pub mod threads;
mod tree;

pub(crate) use call::hash;
pub use call::{Call, Op, ReduceOp};
pub use communicator::{Collective, Communicator, ExternalStep, InFlight, Incoming, Liveness, Outgoing};
pub use group::Group;
pub use link::Link;
pub(crate) use link::{ConnectError, Connections, Keyed, LinkTerms, Wire, linger, lock, remaining};
pub use mesh::DeviceMesh;
#[cfg(feature = "mpi")]
pub use mpi::MpiComm;
#[cfg(feature = "mpi")]
pub(crate) use mpi::Universe;
pub use overlap::Overlap;
pub use planned::Planned;
pub use recorded::{Recorded, Transfer, TransferLog};
pub use shards::Shards;
pub use solo::Solo;
pub use staged::HostStaged;
pub use started::Pending;

/// Runs generic code on two dynamically typed views that have the same element type.
macro_rules! each_pair {
    ($send:expr, $recv:expr, ($a:ident, $b:ident) => $body:expr) => {
        $crate::device::each_dtype!(AnyRef, $send, $a => match $recv.of() {
            Some($b) => $body,
            None => {
                Err($crate::Error::invalid("collective", "send and receive have different elements"))
            }
        })
    };
}
use each_pair;

/// Waits until NCCL has closed the communicators that this thread has left, at most two seconds.
pub(crate) fn settle() {
    #[cfg(feature = "nccl")]
    nccl::settle();
}
