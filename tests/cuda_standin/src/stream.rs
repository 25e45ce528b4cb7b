//! Streams: ordered queues of work, with seeded delays (`CUDA_STANDIN_SEED`).
//!
//! Without a seed an operation that need not wait runs at once on the calling thread. An operation
//! that waits, and everything after it, goes to the stream's worker. With a seed everything goes
//! there and is delayed at random. The checks (bounds, races) do not depend on it.

use crate::{
    clock::{self, Clock},
    graph::Capture,
    memory::Accessor,
};
use std::{
    cell::RefCell,
    collections::VecDeque,
    ffi::c_int,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        mpsc::{Sender, channel},
    },
    time::{Duration, Instant},
};

/// An operation that a stream runs in its turn.
pub type Operation = Box<dyn FnOnce() + Send>;

/// Locks a mutex, even if another thread panicked while holding it.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A counter of finished operations that can be waited for.
#[derive(Default)]
pub struct Progress {
    reached: Mutex<(u64, Option<Instant>)>,
    changed: Condvar,
}

impl Progress {
    pub fn reach(&self, count: u64) {
        let mut reached = lock(&self.reached);
        *reached = (reached.0.max(count), Some(Instant::now()));
        self.changed.notify_all();
    }

    pub fn wait(&self, count: u64) {
        let reached = lock(&self.reached);
        drop(self.changed.wait_while(reached, |reached| reached.0 < count));
    }

    /// Waits at most for `limit`; returns whether the count was reached.
    pub fn wait_for(&self, count: u64, limit: Duration) -> bool {
        let reached = lock(&self.reached);
        let waited = self.changed.wait_timeout_while(reached, limit, |reached| reached.0 < count);
        let (reached, _) = waited.unwrap_or_else(PoisonError::into_inner);
        reached.0 >= count
    }

    pub fn count(&self) -> u64 {
        lock(&self.reached).0
    }

    pub fn is_at(&self, count: u64) -> bool {
        lock(&self.reached).0 >= count
    }

    pub fn time(&self) -> Option<Instant> {
        lock(&self.reached).1
    }
}

struct Queue {
    worker: Option<Sender<Operation>>,
    clock: Clock,
    enqueued: u64,
    /// The operations of the worker that may not be done yet.
    names: VecDeque<(u64, String)>,
}

/// A position in a stream's work that others can wait for.
#[derive(Clone)]
pub struct Position {
    progress: Arc<Progress>,
    clock: Arc<Clock>,
}

impl Position {
    pub fn is_reached(&self) -> bool {
        self.progress.is_at(1)
    }

    /// Makes the host wait.
    pub fn wait(&self) {
        self.progress.wait(1);
        clock::host_waited(&self.clock);
    }

    /// The time when it was reached.
    pub fn time(&self) -> Option<Instant> {
        self.progress.time()
    }
}

/// One stream. Dropping it lets its worker finish what is queued.
pub struct Stream {
    pub device: usize,
    /// Whether its work is ordered with the legacy stream's.
    pub is_tied: bool,
    pub priority: c_int,
    /// Its capture, and its index among the captured streams.
    pub capture: Mutex<Option<(Arc<Capture>, usize)>>,
    pub number: usize,
    queue: Mutex<Queue>,
    pub done: Arc<Progress>,
}

/// Numbers of dropped streams whose work the host has waited for, with their last tick; and the
/// next new number.
static NUMBERS: Mutex<(Vec<(usize, u64)>, usize)> = Mutex::new((Vec::new(), 0));

fn seed() -> u64 {
    static SEED: OnceLock<u64> = OnceLock::new();
    *SEED.get_or_init(|| std::env::var("CUDA_STANDIN_SEED").ok().and_then(|v| v.parse().ok()).unwrap_or(0))
}

impl Stream {
    pub fn new(device: usize, is_tied: bool, priority: c_int) -> Arc<Self> {
        let mut numbers = lock(&NUMBERS);
        let (number, tick) = numbers.0.pop().unwrap_or_else(|| {
            numbers.1 += 1;
            (numbers.1 - 1, 0)
        });
        let mut clock = Clock::default();
        clock.set(number, tick);
        let queue = Mutex::new(Queue { worker: None, clock, enqueued: 0, names: VecDeque::new() });
        Arc::new(Self {
            device,
            is_tied,
            priority,
            capture: Mutex::default(),
            number,
            queue,
            done: Arc::default(),
        })
    }

    /// Enqueues `work` without a check; returns the stream's clock after it.
    fn pass(&self, waits: bool, work: impl FnOnce() + Send + 'static) -> Arc<Clock> {
        self.push(waits, |_| Ok(()), work)
            .expect("nothing is judged, and a worker lives as long as its stream")
    }

    /// Records a position after the work enqueued so far.
    pub fn position(&self) -> Position {
        let progress = Arc::<Progress>::default();
        let reached = Arc::clone(&progress);
        Position { clock: self.pass(false, move || reached.reach(1)), progress }
    }

    /// Makes later work of the stream wait for a position.
    pub fn after(&self, position: &Position) {
        lock(&self.queue).clock.join(&position.clock);
        let progress = Arc::clone(&position.progress);
        self.pass(!position.is_reached(), move || progress.wait(1));
    }

    /// The clock of the next operation: what is ordered before it.
    pub fn clock(&self) -> Clock {
        let mut queue = lock(&self.queue);
        clock::join_host(&mut queue.clock);
        queue.clock.clone()
    }

    /// Makes later work of the stream wait for memory that another stream frees. This orders
    /// nothing for the program.
    pub fn wait_for_memory(&self, done: Arc<Progress>) {
        let name = |who: &Accessor| {
            who.name.replace(Some("a wait for memory that another stream has freed".into()));
            Ok(())
        };
        self.push(true, name, move || done.wait(1)).expect("as in `pass`");
    }

    /// Enqueues `work` if `judge` finds nothing wrong with its accesses; returns the stream's clock
    /// after it. `waits`: the work may wait for others.
    pub fn push(
        &self,
        waits: bool,
        judge: impl FnOnce(&Accessor) -> Result<(), String>,
        work: impl FnOnce() + Send + 'static,
    ) -> Result<Arc<Clock>, String> {
        self.prepare(waits, |who| judge(who).map(|()| Box::new(work) as Operation))
    }

    /// The same for work that depends on the check of its accesses.
    pub fn prepare(
        &self,
        waits: bool,
        prepare: impl FnOnce(&Accessor) -> Result<Operation, String>,
    ) -> Result<Arc<Clock>, String> {
        let mut queue = lock(&self.queue);
        clock::join_host(&mut queue.clock);
        let tick = queue.clock.tick(self.number);
        let (name, clock) = (RefCell::new(None), Arc::new(queue.clock.clone()));
        let who = Accessor { device: self.device, stream: self.number, tick, clock: &clock, name: &name };
        let work = prepare(&who)?;
        queue.enqueued += 1;
        let count = queue.enqueued;
        if seed() == 0 && !waits && self.done.is_at(count - 1) {
            work();
            self.done.reach(count);
            return Ok(clock);
        }
        while queue.names.front().is_some_and(|(count, _)| self.done.is_at(*count)) {
            queue.names.pop_front();
        }
        let waits_for_event = || if waits { "a wait for an event" } else { "an event" }.to_string();
        let name = name.into_inner().unwrap_or_else(waits_for_event);
        queue.names.push_back((count, name));
        let done = Arc::clone(&self.done);
        let operation: Operation = Box::new(move || {
            work();
            done.reach(count);
        });
        let number = self.number;
        let worker = queue.worker.get_or_insert_with(|| worker(number));
        worker.send(operation).map_err(|_| "the stream's worker is gone".to_string())?;
        Ok(clock)
    }

    pub fn synchronize(&self) {
        let (count, clock) = {
            let queue = lock(&self.queue);
            (queue.enqueued, queue.clock.clone())
        };
        self.done.wait(count);
        clock::host_waited(&clock);
    }

    /// The number of operations that were enqueued.
    pub fn enqueued(&self) -> u64 {
        lock(&self.queue).enqueued
    }

    /// The current operation, if the stream is not idle.
    pub fn unfinished(&self) -> Option<String> {
        let queue = lock(&self.queue);
        queue.names.iter().find(|(count, _)| !self.done.is_at(*count)).map(|(_, name)| name.clone())
    }

    pub fn is_idle(&self) -> bool {
        let count = lock(&self.queue).enqueued;
        self.done.is_at(count)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // If the host has waited for all of its work, its number can be reused.
        let queue = lock(&self.queue);
        let mut host = Clock::default();
        clock::join_host(&mut host);
        let tick = queue.clock.at(self.number);
        if host.covers(self.number, tick) {
            lock(&NUMBERS).0.push((self.number, tick));
        }
    }
}

/// Starts a thread that runs operations in order.
fn worker(number: usize) -> Sender<Operation> {
    let (sender, operations) = channel::<Operation>();
    let mut state = seed().wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ (number as u64 + 1).wrapping_mul(0xd1b5_4a32_d192_ed03)
        | 1;
    std::thread::spawn(move || {
        for operation in operations {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            if seed() != 0 && state.is_multiple_of(4) {
                std::thread::sleep(Duration::from_micros(state % 300));
            }
            operation();
        }
    });
    sender
}
