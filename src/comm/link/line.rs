//! One process's end of the connections, which all go to rank 0.
//!
//! A round of a group is complete when rank 0 has the parts of all its ranks; then each of them gets all parts. What a lost
//! rank had given still counts: rank 0 says how many rounds of each group it took part in, and only who waits for a later
//! one gives up.

use super::frame::{Frame, Kind, Words, from_loss, to_loss, to_mismatch};
use crate::error::{Loss, Mismatch};
use std::{
    collections::{HashMap, VecDeque},
    io::BufReader,
    net::{Shutdown, TcpStream},
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread,
    time::{Duration, Instant},
};

/// A process's connections. Closed by [`Line::close`], at the latest when dropped.
#[derive(Debug)]
pub(crate) struct Line {
    wires: Arc<Wires>,
}

/// What the threads that read share with the rank.
#[derive(Debug)]
pub(super) struct Wires {
    pub(super) rank: usize,
    pub(super) world: usize,
    pub(super) deadline: Duration,
    inbox: Mutex<Inbox>,
    news: Condvar,
    /// By rank: of rank 0 to all others, of another to rank 0.
    peers: Vec<Option<Mutex<TcpStream>>>,
    /// Only rank 0's is used.
    hub: Mutex<Hub>,
}

/// What has arrived.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    /// Complete rounds, by group and number.
    pub(super) rounds: HashMap<(u64, u64), Vec<u8>>,
    /// Letters, by group and sender.
    pub(super) letters: HashMap<(u64, usize), VecDeque<Vec<u8>>>,
    /// The lost ranks: how, and in how many rounds of a group each took part.
    pub(super) lost: HashMap<usize, (Loss, HashMap<u64, u64>)>,
    pub(super) broken: HashMap<u64, Mismatch>,
    absent: HashMap<(u64, u64), Vec<usize>>,
    gone: bool,
    closed: bool,
}

/// What rank 0 knows of all.
#[derive(Debug, Default)]
struct Hub {
    /// The parts of rounds that are not complete: by place, with the rank that gave it.
    parts: HashMap<(u64, u64), Vec<Option<(usize, Vec<u8>)>>>,
    /// In how many rounds a rank took part, by group.
    taken: HashMap<usize, HashMap<u64, u64>>,
    lost: HashMap<usize, Loss>,
}

impl Hub {
    /// What has to be sent to whom because of a frame from rank `from`.
    fn take(&mut self, from: usize, frame: Frame) -> Vec<(usize, Frame)> {
        let (group, round) = (frame.group, frame.round);
        match frame.kind {
            Kind::Part => {
                let size = frame.to;
                let parts = self.parts.entry((group, round)).or_insert_with(|| vec![None; size]);
                let Some(place) = parts.get_mut(frame.from) else { return Vec::new() };
                *place = Some((from, frame.body));
                self.taken.entry(from).or_default().insert(group, round + 1);
                if parts.iter().any(Option::is_none) {
                    return Vec::new();
                }
                let mut all = super::frame::Strings::default();
                let parts: Vec<_> =
                    self.parts.remove(&(group, round)).unwrap_or_default().into_iter().flatten().collect();
                parts.iter().for_each(|(_, part)| all.push(part));
                let reply = Frame::new(Kind::Parts, group, round, (0, 0), all.0);
                parts.iter().map(|(rank, _)| (*rank, reply.clone())).collect()
            }
            Kind::Letter => vec![(frame.to, Frame { from, ..frame })],
            Kind::Who => {
                let parts = self.parts.get(&(group, round));
                let absent = parts.into_iter().flatten().enumerate().filter(|(_, part)| part.is_none());
                let body = absent.flat_map(|(place, _)| (place as u64).to_le_bytes()).collect();
                vec![(from, Frame::new(Kind::Absent, group, round, (0, 0), body))]
            }
            _ => Vec::new(),
        }
    }

    /// The news of a lost rank, once.
    fn lose(&mut self, rank: usize, loss: Loss) -> Option<Frame> {
        if self.lost.contains_key(&rank) {
            return None;
        }
        self.lost.insert(rank, loss);
        let taken = self.taken.get(&rank).into_iter().flatten();
        let body = taken.flat_map(|(group, rounds)| [*group, *rounds]).flat_map(u64::to_le_bytes).collect();
        Some(Frame::new(Kind::Lost, 0, 0, (rank, from_loss(loss)), body))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No critical section leaves its data half changed.
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Wires {
    /// Sends a frame on its way: rank 0 hands it on itself.
    pub(super) fn send(&self, frame: Frame) {
        if self.rank == 0 { self.hand_on(0, frame) } else { self.write(0, &frame) }
    }

    fn hand_on(&self, from: usize, frame: Frame) {
        if frame.kind == Kind::Broken {
            (0..self.world).filter(|&rank| rank != from).for_each(|rank| self.deliver(rank, frame.clone()));
            return;
        }
        let replies = lock(&self.hub).take(from, frame);
        replies.into_iter().for_each(|(rank, reply)| self.deliver(rank, reply));
    }

    fn deliver(&self, rank: usize, frame: Frame) {
        if rank == 0 { self.put(frame) } else { self.write(rank, &frame) }
    }

    fn write(&self, rank: usize, frame: &Frame) {
        let Some(Some(peer)) = self.peers.get(rank) else { return };
        let written = frame.write(&mut *lock(peer));
        if written.is_err() {
            // The thread that reads from there finds the end and says so to everybody.
            let _ = lock(peer).shutdown(Shutdown::Both);
        }
    }

    /// Rank 0 tells everybody else that a rank was lost.
    fn lose(&self, rank: usize, loss: Loss) {
        let Some(news) = lock(&self.hub).lose(rank, loss) else { return };
        (0..self.world).filter(|&other| other != rank).for_each(|other| self.deliver(other, news.clone()));
    }

    /// Takes in what was sent to this rank.
    fn put(&self, frame: Frame) {
        let mut inbox = lock(&self.inbox);
        let key = (frame.group, frame.round);
        match frame.kind {
            Kind::Parts => drop(inbox.rounds.insert(key, frame.body)),
            Kind::Letter => {
                inbox.letters.entry((frame.group, frame.from)).or_default().push_back(frame.body);
            }
            Kind::Lost => {
                let words: Vec<_> = Words(&frame.body).collect();
                let taken = words.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
                inbox.lost.entry(frame.from).or_insert((to_loss(frame.to), taken));
            }
            Kind::Broken => {
                if let Some(mismatch) = to_mismatch(&frame.body) {
                    inbox.broken.entry(frame.group).or_insert(mismatch);
                }
            }
            Kind::Absent => {
                drop(inbox.absent.insert(key, Words(&frame.body).map(|rank| rank as usize).collect()))
            }
            Kind::Bye => inbox.gone = true,
            Kind::Part | Kind::Who => {}
        }
        drop(inbox);
        self.news.notify_all();
    }

    /// What is to be found in the inbox now.
    pub(super) fn look<R>(&self, look: impl FnOnce(&mut Inbox) -> R) -> R {
        look(&mut lock(&self.inbox))
    }

    /// Waits until there is something to be found, for at most `patience`.
    pub(super) fn wait<R>(
        &self,
        patience: Duration,
        mut look: impl FnMut(&mut Inbox) -> Option<R>,
    ) -> Option<R> {
        let begin = Instant::now();
        let mut inbox = lock(&self.inbox);
        loop {
            if let Some(found) = look(&mut inbox) {
                return Some(found);
            }
            let left = patience.checked_sub(begin.elapsed())?;
            inbox = match self.news.wait_timeout(inbox, left.min(Duration::from_secs(3600))) {
                Ok((inbox, _)) => inbox,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// How long an answer is waited for that may never come.
    fn moment(&self) -> Duration {
        (self.deadline / 10).clamp(Duration::from_millis(50), Duration::from_secs(1))
    }

    /// The ranks of a group that have not come to a round, as far as rank 0 says.
    pub(super) fn absent(&self, group: u64, round: u64) -> Vec<usize> {
        self.send(Frame::new(Kind::Who, group, round, (0, 0), Vec::new()));
        let reply = self.wait(self.moment(), |inbox| inbox.absent.remove(&(group, round)));
        // Rank 0 itself does not answer.
        reply.unwrap_or_else(|| vec![0])
    }

    /// Reads what a peer sends until the connection ends.
    fn listen(&self, peer: usize, from: TcpStream) {
        let mut from = BufReader::new(from);
        while let Ok(frame) = Frame::read(&mut from) {
            if self.rank != 0 {
                self.put(frame);
            } else if frame.kind == Kind::Lost {
                self.lose(peer, to_loss(frame.to));
                self.write(peer, &Frame::new(Kind::Bye, 0, 0, (0, 0), Vec::new()));
            } else {
                self.hand_on(peer, frame);
            }
        }
        if self.rank == 0 {
            self.lose(peer, Loss::Disconnected);
        } else {
            let lost = Frame::new(Kind::Lost, 0, 0, (0, from_loss(Loss::Disconnected)), Vec::new());
            self.put(lost);
            self.look(|inbox| inbox.gone = true);
            self.news.notify_all();
        }
    }
}

impl Line {
    /// The line of rank `rank` over its connections: rank 0's to all others, by rank; another's to rank 0.
    ///
    /// # Errors
    /// When a connection cannot be used, or a thread not be started.
    pub(crate) fn new(
        rank: usize,
        deadline: Duration,
        peers: Vec<Option<TcpStream>>,
    ) -> std::io::Result<Self> {
        let mut readers = Vec::new();
        for (peer, stream) in peers.iter().enumerate() {
            let Some(stream) = stream else { continue };
            stream.set_nodelay(true)?;
            stream.set_nonblocking(false)?;
            stream.set_read_timeout(None)?;
            stream.set_write_timeout(Some(deadline.max(Duration::from_millis(1))))?;
            readers.push((peer, stream.try_clone()?));
        }
        let world = peers.len();
        let peers = peers.into_iter().map(|stream| stream.map(Mutex::new)).collect();
        let (inbox, news, hub) = Default::default();
        let wires = Arc::new(Wires { rank, world, deadline, inbox, news, peers, hub });
        for (peer, stream) in readers {
            let wires = Arc::clone(&wires);
            thread::Builder::new()
                .name(format!("link to rank {peer}"))
                .spawn(move || wires.listen(peer, stream))?;
        }
        Ok(Self { wires })
    }

    pub(super) fn wires(&self) -> Arc<Wires> {
        Arc::clone(&self.wires)
    }

    /// Tells the other ranks that this one leaves, and how.
    ///
    /// Every message goes by way of rank 0: unless it failed it stays until all have left, or for the deadline.
    pub(crate) fn close(&self, loss: Loss) {
        let wires = &self.wires;
        if std::mem::replace(&mut lock(&wires.inbox).closed, true) {
            return;
        }
        if wires.rank == 0 {
            wires.lose(0, loss);
            let patience = if loss == Loss::Left { wires.deadline } else { wires.moment() };
            wires.wait(patience, |inbox| (inbox.lost.len() + 1 >= wires.world).then_some(()));
        } else {
            wires.write(0, &Frame::new(Kind::Lost, 0, 0, (wires.rank, from_loss(loss)), Vec::new()));
            wires.wait(wires.moment(), |inbox| inbox.gone.then_some(()));
        }
        for peer in wires.peers.iter().flatten() {
            let _ = lock(peer).shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.close(if thread::panicking() { Loss::Panicked } else { Loss::Left });
    }
}
