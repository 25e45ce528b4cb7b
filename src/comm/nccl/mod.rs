//! Groups of ranks with a GPU each, over NCCL. Feature `nccl`.
//!
//! Every NCCL communicator has a *control group* on the host, of thread ranks or of processes. On
//! it the ranks exchange NCCL's unique id, compare call signatures before data moves, and learn of
//! lost ranks. NCCL does none of this: ranks that disagree hang there, or receive each other's
//! bytes.
//!
//! * The ranks compare a call on the control group if its kind is new to the group, and every
//!   `check_every`-th call together with a hash of the calls since the last comparison. Ranks of
//!   one process compare every call.
//! * Data moves on a communication stream of the communicator. It waits for earlier work of the
//!   compute stream, and later work of the compute stream waits for it. The host thread waits only
//!   in a comparison.
//! * Each rank records on the control group which collective it has reached. So if a rank leaves
//!   before a collective that others are inside, they know that they need it, and errors name a
//!   rank that does not arrive.
//! * While a rank waits for its device, it polls the communicator. If a rank is lost, NCCL reports
//!   an error, or a collective has run for longer than the deadline, it aborts the communicator.
//!   The waiting call and every later one return that error. For a rank that is inside a call of
//!   NCCL or of the driver, a watchdog thread of the process does so (`watchdog.rs`).
//! * The collectives of all communicators of a rank run one after another, in the order of its
//!   calls. If the kernels of two collectives started in another order on another rank, and did not
//!   fit on a device together, each would wait for one that the other keeps from starting.
//!   Point-to-point messages, which only two ranks make, wait only for earlier work of their own
//!   communicator.

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

/// Returns the version of NCCL in use, and loads NCCL first if it is not loaded yet.
/// [`crate::device::cuda::versions`] returns those of the other libraries.
///
/// # Errors
/// When there is no NCCL of version 2.18 or later.
pub fn version() -> Result<Version> {
    Ok(Api::get()?.describe())
}

impl Group<Cpu> {
    /// Creates a group of the same ranks for tensors on each rank's `device`, over NCCL. This group
    /// remains usable and is the new one's control group. Every rank calls it.
    ///
    /// After an aborted collective, every call that waits for `device` fails as long as the new
    /// group exists, since tensors may hold incomplete results. If the group is dropped before any
    /// call has returned that error, such calls keep failing: continue with a new device.
    ///
    /// # Errors
    /// When there is no NCCL of version 2.18 or later (`SHARDWISE_NCCL` may name its file), NCCL
    /// refuses, or a rank calls something else or is lost.
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
    /// Devices call this while the rank waits for them, as long as this reference exists.
    poll: Rc<dyn Fn() -> Result<()>>,
    control: Rc<dyn Communicator<Cpu>>,
    device: B,
    /// The kinds of calls that all ranks have made.
    known: RefCell<HashSet<u64>>,
    /// How many calls were made since the last comparison, and the hash of their signatures.
    unchecked: Cell<usize>,
    history: Cell<u64>,
    /// This group's id on the control group ([`ExternalStep::work`]).
    id: u64,
    /// The number of collectives so far, the creation of the group included.
    steps: Cell<u64>,
    /// The number of messages so far, by sender and receiver.
    messages: RefCell<HashMap<(usize, usize), u64>>,
    options: Options,
}

impl<B: NcclDevice> Nccl<B> {
    /// Creates the NCCL communicator of the control group's ranks.
    fn join(control: Rc<dyn Communicator<Cpu>>, call: &Call, device: &B, options: Options) -> Result<Self> {
        // As f16, whose bits a broadcast copies unchanged.
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

    /// `id` is the group's id on the control group, where its creation was the first step.
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

    /// The handle on whose stream collectives run.
    fn stream(&self) -> &B {
        self.state.stream()
    }
}

impl<B: NcclDevice> Drop for Nccl<B> {
    /// Waits for pending collectives first: other ranks may need this rank's contribution.
    fn drop(&mut self) {
        let is_reported = self.state.has_failed();
        self.state.finish();
        if self.state.is_incomplete() && !is_reported {
            // No call has returned the error, and what the device holds stays wrong without the
            // group.
            std::mem::forget(Rc::clone(&self.poll));
        }
        self.state.close();
    }
}
