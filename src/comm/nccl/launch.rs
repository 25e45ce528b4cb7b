//! Launches collectives on the communication stream. A launch compares the call, orders the
//! streams, and records events before and after the work.

use super::{Nccl, NcclDevice, arrival::Arrival, state::Work};
use crate::{
    comm::{Call, ExternalStep, call::hash},
    device::{AnyRef, each_dtype},
    error::Result,
};
use std::{any::Any, cell::RefCell, ffi::c_void, rc::Rc};

/// A collective of any communicator of this rank, and the stream on which it runs.
type LastCollective = Option<(*mut c_void, Rc<dyn Any>)>;

thread_local! {
    /// This rank's last collective. The entry stays after the collective has finished, and the next
    /// collective on another communication stream still waits for it.
    static LAST: RefCell<LastCollective> = const { RefCell::new(None) };
}

impl<B: NcclDevice> Nccl<B> {
    /// Compares the call. Then makes the communication stream wait for earlier work of the compute
    /// stream and the `foreign` streams, and for the rank's last collective on another
    /// communication stream. Returns the event after these waits.
    fn enter(&self, call: &Call, foreign: &[Option<B>]) -> Result<B::Event> {
        self.state.check()?;
        self.compare(call)?;
        let stream = self.stream().stream();
        let last = LAST.with_borrow(|last| last.clone()).filter(|(other, _)| *other != stream);
        self.wait_for(foreign, last.and_then(|(_, last)| last.downcast().ok()))
    }

    /// Makes the communication stream wait for earlier work of the compute stream and the `foreign`
    /// streams, and for the collective `last`. Returns the event after these waits.
    pub(super) fn wait_for(&self, foreign: &[Option<B>], last: Option<Rc<Work<B>>>) -> Result<B::Event> {
        self.device.make_current()?;
        let (stream, computed) = (self.stream(), self.device.record_event()?);
        stream.wait_event(&computed)?;
        if last.is_none() && foreign.iter().flatten().next().is_none() {
            // The event is read only while this collective is the oldest pending one. Earlier work
            // of the communication stream has then finished.
            return Ok(computed);
        }
        last.map_or(Ok(()), |last| last.make_wait(stream))?;
        foreign.iter().flatten().try_for_each(|foreign| stream.wait_event(&foreign.record_event()?))?;
        stream.record_event()
    }

    /// Returns the handle that allocated a view's memory, if the stream of that handle needs a
    /// separate wait.
    pub(super) fn foreign_stream(&self, view: AnyRef<'_, B>) -> Result<Option<B>> {
        each_dtype!(AnyRef, view, view => self.device.foreign_stream(view))
    }

    /// Compares the call's signature across ranks on the control group, if a comparison is due.
    /// Otherwise adds the signature to the hash for the next comparison.
    fn compare(&self, call: &Call) -> Result<()> {
        let every = if self.control.is_near() { 1 } else { self.options.check_every.max(1) };
        let kind = call.kind();
        let (new, unchecked) = (!self.known.borrow().contains(&kind), self.unchecked.get() + 1);
        if !new && unchecked < every {
            self.unchecked.set(unchecked);
            self.history.set(hash((self.history.get(), call.fingerprint())) | 1);
            return Ok(());
        }
        let call = Call { history: self.history.replace(0), ..*call };
        self.unchecked.set(0);
        self.control.barrier(&call).map_err(|error| self.state.fail(error))?;
        self.known.borrow_mut().insert(kind);
        Ok(())
    }

    /// Launches a collective on the communication stream.
    pub(super) fn run(
        &self,
        call: &Call,
        foreign: &[Option<B>],
        collective: impl FnOnce(&Arrival) -> Result<()>,
    ) -> Result<Rc<Work<B>>> {
        let begin = self.enter(call, foreign)?;
        let work = self.launch(self.arrival(call), begin, foreign, collective)?;
        LAST.set(Some((self.stream().stream(), Rc::clone(&work) as Rc<dyn Any>)));
        Ok(work)
    }

    /// Returns the group's next step, at which all ranks arrive.
    pub(super) fn arrival(&self, call: &Call) -> Arrival {
        let number = self.steps.replace(self.steps.get() + 1);
        Arrival { call: *call, step: ExternalStep { work: self.id, number, with: None }, other: None }
    }

    /// Returns the step of the next message between two ranks. This rank is one of them.
    pub(super) fn message_step(&self, from: usize, to: usize) -> ExternalStep {
        let mut messages = self.messages.borrow_mut();
        let count = messages.entry((from, to)).or_default();
        *count += 1;
        let with = if from == self.own_rank() { to } else { from };
        ExternalStep { work: hash((self.id, from, to)), number: *count - 1, with: Some(with) }
    }

    /// Calls `act`, which launches this rank's work for the call of `at`. The event `begin`
    /// precedes the work.
    pub(super) fn launch(
        &self,
        at: Arrival,
        begin: B::Event,
        foreign: &[Option<B>],
        act: impl FnOnce(&Arrival) -> Result<()>,
    ) -> Result<Rc<Work<B>>> {
        at.arrive(&*self.control);
        let work = Rc::new(Work::new(at, begin));
        // From here on the rank and the watchdog check this work, because the launch itself may
        // wait for the device.
        self.state.add(&work);
        self.state.watchdog.started(at);
        foreign.iter().flatten().for_each(|foreign| foreign.poll_while_waiting(&self.poll));
        let acted = self.state.watchdog.inside(at, || act(&at));
        let acted = acted.map_err(|error| self.state.abort(at.explain(&*self.control, error)));
        // Even after a failure, the device may already run some of the work. The wait for `end`
        // delays the freeing of the tensors until that work has finished.
        let end = self.stream().record_event()?;
        foreign.iter().flatten().try_for_each(|foreign| foreign.wait_event(&end))?;
        if acted.is_err() {
            self.device.wait_event(&end)?;
        }
        work.set_end(end);
        acted.map(|()| work)
    }

    /// Launches a collective and makes later compute work wait for it.
    pub(super) fn run_now(
        &self,
        call: &Call,
        foreign: &[Option<B>],
        collective: impl FnOnce(&Arrival) -> Result<()>,
    ) -> Result<()> {
        let done = self.run(call, foreign, collective)?;
        done.make_wait(&self.device)
    }

    /// Makes one NCCL call.
    pub(super) fn single(&self, at: &Arrival, call: impl FnOnce() -> Result<()>) -> Result<()> {
        let poll = at.poll(&*self.control, self.options.deadline);
        self.state.raw.single(&poll, call)
    }

    /// Makes several NCCL calls as one NCCL group.
    pub(super) fn grouped(&self, at: &Arrival, calls: impl FnOnce() -> Result<()>) -> Result<()> {
        let poll = at.poll(&*self.control, self.options.deadline);
        self.state.raw.grouped(&poll, calls)
    }
}
