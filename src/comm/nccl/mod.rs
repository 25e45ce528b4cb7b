//! Groups of ranks with one GPU each, connected by NCCL. Feature `nccl`.
//!
//! Every NCCL communicator has a *control group* on the host, whose ranks are threads or processes.
//! On the control group the ranks exchange NCCL's unique id, compare call signatures before data
//! moves, and learn of lost ranks. NCCL does not compare calls: ranks that disagree hang inside
//! NCCL, or receive each other's bytes.
//!
//! * The ranks compare the first call of each kind on the control group, and at least every
//!   `check_every`-th call. A comparison includes a hash of the calls since the last comparison.
//!   Ranks of one process compare every call.
//! * Collectives run on the communicator's own stream. This communication stream waits for earlier
//!   work of the compute stream, and later work of the compute stream waits for the collective. The
//!   host thread waits only for the control group, and for NCCL while NCCL connects the ranks.
//! * Each rank records on the control group which collective it has reached. So the other ranks
//!   know whether a rank left before a collective that needs it, and errors name the ranks that
//!   have not arrived.
//! * A rank polls its communicator while it waits for its device. The polling rank aborts the
//!   communicator in three cases: a rank is lost, NCCL reports an error, or a collective runs
//!   longer than the deadline. The waiting call and every later call then return the error of that
//!   case. A rank inside a call of NCCL or of the driver cannot poll, so a watchdog thread polls
//!   for it (`watchdog.rs`).
//! * A rank's collectives run one after another in call order, across all of its communicators.
//!   Otherwise two ranks could start the kernels of two collectives in opposite orders. If the
//!   devices cannot run both kernels at once, the ranks would deadlock: on each rank, the running
//!   kernel waits for its counterpart on the other rank, which cannot start there. Point-to-point
//!   messages involve only two ranks, so they do not wait for the collectives of other
//!   communicators.

mod api;
mod arrival;
mod collectives;
mod communicator;
mod cuda;
mod device;
mod exchange;
mod launch;
mod options;
mod raw;
mod state;
mod watchdog;

pub use device::{MakeCurrent, NcclDevice};
pub use options::{Options, Order};
pub(super) use raw::settle;

use super::{Call, Communicator, ExternalStep, Group, call::hash};
use crate::{
    device::{AnyMut, Cpu, cuda::Version},
    error::Result,
    security::Channel,
    trace,
};
use api::Api;
use arrival::Arrival;
use half::f16;
use raw::{RankId, RawComm};
use state::State;
use std::{
    cell::{Cell, RefCell},
    collections::{HashMap, HashSet},
    rc::Rc,
};

/// Returns the version of NCCL, and loads NCCL first if it is not loaded yet.
/// [`crate::device::cuda::versions`] returns the versions of the other libraries.
///
/// # Errors
/// When there is no NCCL of version 2.18 or later.
pub fn version() -> Result<Version> {
    Ok(Api::get()?.describe())
}

impl Group<Cpu> {
    /// Creates a group of the same ranks over NCCL, for tensors on each rank's `device`. Every rank
    /// calls this function. The existing group remains usable and becomes the control group of the
    /// new group.
    ///
    /// After an aborted collective, tensors may hold incomplete results. So every call that waits
    /// for `device` returns the error of the abort as long as the new group exists. If the group is
    /// dropped before any call has returned this error, calls that wait for `device` return it
    /// forever. Then continue with a new device handle.
    ///
    /// # Errors
    /// When there is no NCCL of version 2.18 or later (`SHARDWISE_NCCL` may name its file), NCCL
    /// returns an error, a rank makes a different call or is lost, or a rank does not arrive by the
    /// deadline. [`Error::NotEncrypted`](crate::Error::NotEncrypted) when the job's policy forbids
    /// plaintext and the ranks may be on several machines.
    #[track_caller]
    pub fn over_nccl<B: NcclDevice>(&self, device: &B, options: Options) -> Result<Group<B>> {
        let call = self.split_call();
        let ticket = trace::enter(call.operation());
        let nccl = Nccl::join(self.communicator(), &call, device, options);
        trace::leave(ticket, nccl.as_ref().err());
        Ok(self.carried(Rc::new(nccl?), device))
    }
}

/// One rank's communicator of a group over NCCL.
pub struct Nccl<B: NcclDevice> {
    state: Rc<State<B>>,
    /// The function that device handles call while the rank waits. The handles hold only weak
    /// references to it.
    poll: Rc<dyn Fn() -> Result<()>>,
    control: Rc<dyn Communicator<Cpu>>,
    device: B,
    /// The kinds of calls that the ranks have compared.
    known: RefCell<HashSet<u64>>,
    /// The number of calls since the last comparison.
    unchecked: Cell<usize>,
    /// The hash of the calls since the last comparison; 0 if there are none.
    history: Cell<u64>,
    /// This group's id on the control group ([`ExternalStep::work`]).
    id: u64,
    /// The number of the group's external steps so far: its creation, collectives and splits.
    steps: Cell<u64>,
    /// The number of this rank's messages so far, by sender and receiver.
    messages: RefCell<HashMap<(usize, usize), u64>>,
    options: Options,
}

impl<B: NcclDevice> Nccl<B> {
    /// Creates the NCCL communicator of the control group's ranks.
    fn join(control: Rc<dyn Communicator<Cpu>>, call: &Call, device: &B, options: Options) -> Result<Self> {
        let channel = Channel::plaintext(control.channel().reach);
        control.policy().admit("NCCL", channel, None)?;
        // The id travels as f16 values, because a broadcast copies their bits unchanged.
        let mut id = [f16::ZERO; 64];
        if control.rank() == 0 {
            let bytes = RawComm::unique_id()?;
            let (pairs, _) = bytes.as_chunks();
            id.iter_mut().zip(pairs).for_each(|(value, pair)| *value = f16::from_le_bytes(*pair));
        }
        control.broadcast(call, 0, AnyMut::F16(id.as_mut_slice()))?;
        let mut bytes = [0; 128];
        bytes.as_chunks_mut().0.iter_mut().zip(id).for_each(|(pair, value)| *pair = value.to_le_bytes());
        if control.is_near() {
            device.open_memory()?;
        }
        device.make_current()?;
        let group_id = hash((call.group, call.seq));
        let step = ExternalStep { work: group_id, number: 0, with: None };
        let at = Arrival { call: *call, step, other: None };
        at.arrive(&*control);
        let raw = {
            let rank_id = RankId { id: bytes, rank: control.rank(), size: control.size() };
            let poll = at.poll(&*control, options.deadline);
            let join = if options.blocking { RawComm::join_blocking } else { RawComm::join };
            let raw = join(rank_id, device.make_current_fn(), &poll);
            raw.map_err(|error| at.explain(&*control, error))?
        };
        Self::new(raw, control, device, group_id, options)
    }

    /// `id` is the group's id on the control group. The group's creation was step 0.
    fn new(
        raw: RawComm,
        control: Rc<dyn Communicator<Cpu>>,
        device: &B,
        id: u64,
        options: Options,
    ) -> Result<Self> {
        let state = Rc::new(State::new(raw, Rc::clone(&control), device, &options)?);
        let polled = Rc::clone(&state);
        let poll: Rc<dyn Fn() -> Result<()>> = Rc::new(move || polled.poll());
        device.poll_while_waiting(&poll);
        state.stream().poll_while_waiting(&poll);
        Ok(Self {
            state,
            poll,
            control,
            device: device.clone(),
            known: RefCell::default(),
            unchecked: Cell::new(0),
            history: Cell::new(0),
            id,
            steps: Cell::new(1),
            messages: RefCell::default(),
            options,
        })
    }

    fn own_rank(&self) -> usize {
        self.control.rank()
    }

    /// The device handle on whose stream collectives run.
    fn stream(&self) -> &B {
        self.state.stream()
    }
}

impl<B: NcclDevice> Drop for Nccl<B> {
    /// Waits for pending collectives first, because other ranks may need this rank's contribution.
    fn drop(&mut self) {
        let is_reported = self.state.has_failed();
        self.state.finish();
        if self.state.is_incomplete() && !is_reported {
            // No call has returned the error, and the tensors stay incomplete. The leaked reference
            // keeps `poll` alive, so that later waits still return the error.
            std::mem::forget(Rc::clone(&self.poll));
        }
        self.state.close();
    }
}
