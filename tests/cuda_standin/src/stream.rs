//! Streams: ordered queues of work, with seeded delays (`CUDA_STANDIN_SEED`).
//!
//! Without a seed an operation that waits for nobody is done at once, on the calling thread; what waits goes to the stream's
//! worker, and everything behind it. With a seed everything goes there, and is delayed at random. What is judged (bounds, races)
//! does not depend on it.

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

type Operation = Box<dyn FnOnce() + Send>;

/// Locks, whatever happened to another thread.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A counter that is waited for: operations done.
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

    /// Waits, but not for ever: whether it came.
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
    /// What was handed to the worker and may not be done yet.
    names: VecDeque<(u64, String)>,
}

/// A point in a stream's work, for others to wait for.
#[derive(Clone)]
pub struct Mark {
    progress: Arc<Progress>,
    clock: Clock,
}

impl Mark {
    pub fn is_reached(&self) -> bool {
        self.progress.is_at(1)
    }

    /// The host waits.
    pub fn wait(&self) {
        self.progress.wait(1);
        clock::host_waited(&self.clock);
    }

    /// When it was reached.
    pub fn time(&self) -> Option<Instant> {
        self.progress.time()
    }
}

/// One stream. Dropping it lets its worker finish what is queued.
pub struct Stream {
    pub device: usize,
    /// Whether its work and the legacy stream's come after each other.
    pub is_tied: bool,
    pub priority: c_int,
    /// What it captures, and which of the capture's lanes it is.
    pub capture: Mutex<Option<(Arc<Capture>, usize)>>,
    pub number: usize,
    queue: Mutex<Queue>,
    pub done: Arc<Progress>,
}

/// Numbers of streams that are gone and whose work the host has waited for, and how far each had come; the next new number.
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

    /// Enqueues `work` that nobody judges; returns the stream's clock after it.
    fn pass(&self, waits: bool, work: impl FnOnce() + Send + 'static) -> Clock {
        self.push(waits, |_| Ok(()), work)
            .expect("nothing is judged, and a worker lives as long as its stream")
    }

    /// A mark behind what was asked of the stream so far.
    pub fn mark(&self) -> Mark {
        let progress = Arc::<Progress>::default();
        let reached = Arc::clone(&progress);
        Mark { clock: self.pass(false, move || reached.reach(1)), progress }
    }

    /// What is asked of the stream from now on waits for a mark.
    pub fn after(&self, mark: &Mark) {
        lock(&self.queue).clock.join(&mark.clock);
        let progress = Arc::clone(&mark.progress);
        self.pass(!mark.is_reached(), move || progress.wait(1));
    }

    /// What the stream knows to come before what it is asked for now.
    pub fn clock(&self) -> Clock {
        let mut queue = lock(&self.queue);
        clock::join_host(&mut queue.clock);
        queue.clock.clone()
    }

    /// What is asked of the stream from now on waits for memory that another stream gives back. The program has ordered nothing.
    pub fn wait_for_memory(&self, done: Arc<Progress>) {
        let name = |who: &Accessor| {
            who.name.replace(Some("a wait for memory that another stream has freed".into()));
            Ok(())
        };
        self.push(true, name, move || done.wait(1)).expect("as in `pass`");
    }

    /// Enqueues `work` once `judge` has found nothing wrong with what it accesses; returns the stream's clock after it. `waits`:
    /// the work may wait for others.
    pub fn push(
        &self,
        waits: bool,
        judge: impl FnOnce(&Accessor) -> Result<(), String>,
        work: impl FnOnce() + Send + 'static,
    ) -> Result<Clock, String> {
        let mut queue = lock(&self.queue);
        clock::join_host(&mut queue.clock);
        let tick = queue.clock.tick(self.number);
        let name = RefCell::new(None);
        let who =
            Accessor { device: self.device, stream: self.number, tick, clock: &queue.clock, name: &name };
        judge(&who)?;
        queue.enqueued += 1;
        let count = queue.enqueued;
        if seed() == 0 && !waits && self.done.is_at(count - 1) {
            work();
            self.done.reach(count);
            return Ok(queue.clock.clone());
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
        Ok(queue.clock.clone())
    }

    pub fn synchronize(&self) {
        let (count, clock) = {
            let queue = lock(&self.queue);
            (queue.enqueued, queue.clock.clone())
        };
        self.done.wait(count);
        clock::host_waited(&clock);
    }

    /// How many operations were asked of it.
    pub fn enqueued(&self) -> u64 {
        lock(&self.queue).enqueued
    }

    /// The operation that it is at, if it is not idle.
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
        // Where the host has waited for all of it, its number may be another's.
        let queue = lock(&self.queue);
        let mut host = Clock::default();
        clock::join_host(&mut host);
        let tick = queue.clock.at(self.number);
        if host.covers(self.number, tick) {
            lock(&NUMBERS).0.push((self.number, tick));
        }
    }
}

/// A thread that does operations in order.
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
