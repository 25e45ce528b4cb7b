//! The state of one rank's communicator: pending collectives, failures, abort and end.

use super::{NcclDevice, Options, arrival::Arrival, raw::RawComm, watchdog::Watchdog};
use crate::{
    comm::Communicator,
    device::Cpu,
    error::{Error, LostReason, Result},
    trace,
};
use std::{
    cell::{Cell, OnceCell, RefCell},
    collections::VecDeque,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

/// A collective or message on the communication stream, like PyTorch's `Work`.
pub(super) struct Work<B: NcclDevice> {
    at: Arrival,
    /// The collective can start after this event and after the earlier work of the communication
    /// stream.
    begin: B::Event,
    /// The event after the collective. It is set after the whole collective was launched.
    end: OnceCell<B::Event>,
    /// When a poll first saw that the collective can run.
    since: Cell<Option<Instant>>,
}

impl<B: NcclDevice> Work<B> {
    pub(super) fn new(at: Arrival, begin: B::Event) -> Self {
        Self { at, begin, end: OnceCell::new(), since: Cell::new(None) }
    }

    /// Records that the whole collective is launched. The event `end` follows it on the stream.
    pub(super) fn set_end(&self, end: B::Event) {
        self.end.get_or_init(|| end);
    }

    /// Makes later work of a handle wait for this collective.
    pub(super) fn make_wait(&self, device: &B) -> Result<()> {
        self.end.get().map_or(Ok(()), |end| device.wait_event(end))
    }
}

/// The state that a rank polls while it waits.
pub(super) struct State<B: NcclDevice> {
    pub(super) raw: RawComm,
    pub(super) watchdog: Arc<Watchdog>,
    control: Rc<dyn Communicator<Cpu>>,
    /// The device handle on whose stream collectives run.
    stream: B,
    deadline: Duration,
    failed: RefCell<Option<Error>>,
    /// Whether pending collectives were aborted, so that tensors may hold incomplete results.
    incomplete: Cell<bool>,
    /// The collectives that are not known to be finished, oldest first.
    pending: RefCell<VecDeque<Rc<Work<B>>>>,
}

impl<B: NcclDevice> State<B> {
    pub(super) fn new(
        raw: RawComm,
        control: Rc<dyn Communicator<Cpu>>,
        device: &B,
        options: &Options,
    ) -> Result<Self> {
        Ok(Self {
            watchdog: Watchdog::watch(raw.shared(), &*control, options)?,
            raw,
            control,
            stream: device.comm_stream()?,
            deadline: options.deadline,
            failed: RefCell::new(None),
            incomplete: Cell::new(false),
            pending: RefCell::default(),
        })
    }

    pub(super) fn stream(&self) -> &B {
        &self.stream
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.borrow().is_some()
    }

    pub(super) fn is_incomplete(&self) -> bool {
        self.incomplete.get()
    }

    pub(super) fn add(&self, work: &Rc<Work<B>>) {
        self.pending.borrow_mut().push_back(Rc::clone(work));
    }

    /// Returns an error if the group cannot be used any more.
    pub(super) fn check(&self) -> Result<()> {
        let first = self.failed.borrow().clone();
        first.map_or_else(|| self.poll(), Err)
    }

    /// Checks whether pending collectives can still finish. If they cannot, aborts the communicator
    /// and returns the error. Later polls return the group's first error if tensors are incomplete.
    pub(super) fn poll(&self) -> Result<()> {
        if let (true, Some(error)) = (self.incomplete.get(), &*self.failed.borrow()) {
            return Err(error.clone());
        }
        if self.failed.borrow().is_some() && self.pending.borrow().is_empty() {
            return Ok(());
        }
        self.check_pending().map_err(|error| self.abort(error))
    }

    /// Removes finished collectives and checks the oldest pending one. Traces a failure as an error
    /// of the oldest collective, because the waiting call may not be a call of the group.
    fn check_pending(&self) -> Result<()> {
        loop {
            let oldest = self.pending.borrow().front().cloned();
            self.watchdog.polled(oldest.as_ref().map(|oldest| &oldest.at));
            let Some(oldest) = oldest else { return self.raw.check() };
            let reached = oldest.end.get().map_or(Ok(false), |end| self.stream.is_complete(end));
            // After the watchdog's abort, the device reports the events of aborted work as
            // complete.
            let live = self.raw.check_live().map_err(|error| self.find_loss(&oldest.at, error));
            if let (Ok(true), Ok(())) = (&reached, &live) {
                self.pending.borrow_mut().pop_front();
                continue;
            }
            return reached.and(live).and_then(|()| self.check_work(&oldest)).inspect_err(|error| {
                trace::leave(trace::enter(oldest.at.call.operation()), Some(error));
            });
        }
    }

    /// Returns the loss of the rank because of which the watchdog aborted the communicator. Checks
    /// all pending collectives, because one after `oldest` may need the lost rank.
    fn find_loss(&self, oldest: &Arrival, error: Error) -> Error {
        let pending = self.pending.borrow();
        let loss = pending.iter().find_map(|work| work.at.obstacle(&*self.control));
        loss.unwrap_or_else(|| oldest.explain(&*self.control, error))
    }

    /// Returns an error if an unfinished collective cannot finish.
    fn check_work(&self, oldest: &Work<B>) -> Result<()> {
        if let Some(error) = oldest.at.obstacle(&*self.control) {
            return Err(error);
        }
        self.raw.check().map_err(|error| oldest.at.explain(&*self.control, error))?;
        // The deadline counts from the time when the collective can run, so earlier work does not
        // count.
        if oldest.since.get().is_none() && self.stream.is_complete(&oldest.begin)? {
            oldest.since.set(Some(Instant::now()));
        }
        if oldest.since.get().is_some_and(|since| since.elapsed() > self.deadline) {
            return Err(oldest.at.give_up(&*self.control, self.deadline));
        }
        Ok(())
    }

    /// Ends the group. If a rank was lost for the reason `LostReason::Left`, pending collectives
    /// may still finish, so they are not aborted.
    pub(super) fn fail(&self, error: Error) -> Error {
        if matches!(error, Error::PeerLost { reason: LostReason::Left, .. }) {
            return self.failed.borrow_mut().get_or_insert(error).clone();
        }
        self.abort(error)
    }

    /// Ends the group and aborts pending collectives. Returns the group's first error.
    pub(super) fn abort(&self, error: Error) -> Error {
        self.incomplete.set(self.incomplete.get() || !self.pending.borrow().is_empty());
        self.raw.abort();
        self.failed.borrow_mut().get_or_insert(error).clone()
    }

    /// Waits until all pending collectives have finished, or one of them cannot finish. Then ends
    /// the communicator.
    pub(super) fn finish(&self) {
        let goes_on =
            || !std::thread::panicking() && self.poll().is_ok() && !self.pending.borrow().is_empty();
        while goes_on() {
            std::thread::yield_now();
        }
        let finished = self.pending.borrow().is_empty();
        if finished {
            // Destroys instead of aborting, because another rank may still read data from this
            // rank.
            self.raw.destroy();
        } else {
            self.raw.abort();
            self.incomplete.set(!finished);
        }
    }

    /// Makes later calls fail.
    pub(super) fn close(&self) {
        let over = Error::invalid("NCCL", "the group has ended");
        self.failed.borrow_mut().get_or_insert(over);
    }
}
