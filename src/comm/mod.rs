//! Groups of ranks and the collectives between them. Knows tensors and cuts, but no mathematics
//! beyond sum, max and min.
//!
//! [`Group`] is what operators hold: typed, with shapes, partitions and sequence numbers. Behind it
//! stands a [`Communicator`], the object-safe transport:
//!
//! | communicator | ranks |
//! |---|---|
//! | [`Solo`] | one, on any device |
//! | [`threads::ThreadComm`] | threads of one process, which read one another's memory |
//! | [`Link`] | processes, by way of the first: for control and small tensors |
#![cfg_attr(feature = "mpi", doc = "| [`MpiComm`] | processes, over an MPI library |")]
//! | [`HostStaged`] | those of the host's communicator that it wraps, on any device |
//! | [`Recorded`] | those of the communicator it wraps, with every transfer written down |
//! | [`Planned`] | one of any number, without the others, on a device without values |
//!
//! Every call carries a [`Call`]: the operation, element and shape, and its number in the group.
//! The ranks compare their calls before any data moves: where they disagree, all of them get
//! [`crate::Error::Mismatch`] and no buffer changes. A rank that panics or leaves breaks the group
//! for the others, who get [`crate::Error::PeerLost`] instead of waiting for it.

mod call;
mod cause;
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
mod shards;
mod solo;
mod staged;
pub mod threads;
mod tree;

pub(crate) use call::hash;
pub use call::{Call, Op, ReduceOp};
pub use communicator::{Collective, Communicator, InFlight, Incoming, Lookout, Outgoing, Step};
pub use group::{Group, Pending};
pub use link::Link;
pub(crate) use link::{Connections, Keyed, lock};
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

/// Runs generic code on a pair of run-time views, which the callers have made of one element.
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

/// Waits until the communicators that this thread's rank has left are ended, or two seconds.
pub(crate) fn settle() {
    #[cfg(feature = "nccl")]
    nccl::settle();
}
