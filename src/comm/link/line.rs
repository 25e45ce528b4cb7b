//! One process's end of the connections, which all go to rank 0.
//!
//! A thread reads from each connection. Rank 0 has a thread more for each that writes, so that a
//! rank that does not read keeps nobody else from what is sent to it.

use super::{
    frame::{Frame, Keyed, Kind, Seal, Strings, from_loss},
    hub::{Hub, pairs},
    inbox::Inbox,
};
use crate::{
    comm::call::never_received,
    error::{Error, LostReason},
};
use std::{
    collections::HashMap,
    io::{self, BufReader, ErrorKind},
    net::{Shutdown, TcpStream},
    sync::{Arc, Condvar, Mutex, MutexGuard, mpsc},
    thread,
    time::{Duration, Instant},
};

/// How long a rank that others have given up has to read why.
const LATE: Duration = Duration::from_millis(50);

/// A process's connections. Closed by [`Line::close`], at the latest when dropped.
#[derive(Debug)]
pub(crate) struct Line {
    wires: Arc<Wires>,
}

/// What the threads that read and write share with the rank.
#[derive(Debug)]
pub(super) struct Wires {
    pub(super) rank: usize,
    pub(super) world: usize,
    pub(super) deadline: Duration,
    inbox: Mutex<Inbox>,
    news: Condvar,
    /// How many steps of what this rank has come to beside its groups, by work.
    came: Mutex<HashMap<u64, u64>>,
    /// Held while others are asked what they have come to: an answer is that to the last question.
    asks: Mutex<()>,
    /// The first loss that this rank was told of. It is why this rank may leave, too: who needs
    /// this rank then is told of that loss.
    told: Mutex<Option<(usize, LostReason)>>,
    /// By rank: of rank 0 to all others, of another to rank 0.
    peers: Vec<Option<Peer>>,
    /// Only rank 0's is used.
    hub: Mutex<Hub>,
}

/// A connection to another rank.
#[derive(Debug)]
struct Peer {
    stream: TcpStream,
    /// Held while a frame is written.
    seal: Mutex<Seal>,
    /// What rank 0 has still to write; none once the connection is being closed, and at other
    /// ranks.
    queue: Mutex<Option<Queue>>,
}

/// Frames that wait for the thread that writes them.
#[derive(Debug)]
struct Queue {
    frames: mpsc::Sender<Frame>,
    /// PipelineEnds when that thread does, after it has written what there was.
    written: mpsc::Receiver<()>,
}

impl Peer {
    fn write(&self, frame: &Frame) -> io::Result<()> {
        let written = frame.write(&mut &self.stream, &mut lock(&self.seal));
        if written.is_err() {
            // The thread that reads from there finds the end and says so to everybody.
            let _ = self.stream.shutdown(Shutdown::Both);
        }
        written
    }
}

/// A rank's last words, which others say for it if it cannot.
fn last_words(loss: LostReason) -> Frame {
    Frame::new(Kind::Lost, 0, 0, (0, from_loss(loss)), Vec::new())
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No critical section leaves its data half changed.
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Wires {
    /// Sends a frame on its way: rank 0 hands it on itself.
    pub(super) fn send(&self, frame: Frame) {
        if self.rank == 0 {
            self.hand_on(0, frame);
        } else {
            self.write(0, frame);
        }
    }

    /// Rank 0 does what a frame from a rank asks for; false if no rank sends such a frame.
    fn hand_on(&self, from: usize, frame: Frame) -> bool {
        if frame.kind == Kind::Ask && frame.to == 0 {
            self.write(from, self.answer(from, &frame));
            return true;
        }
        let mut hub = lock(&self.hub);
        let post = hub.take(from, frame);
        let known = post.is_some();
        // Still under the lock: all ranks get what concerns several of them in one order.
        post.into_iter().flatten().for_each(|(rank, frame)| self.deliver(rank, frame));
        known
    }

    fn deliver(&self, rank: usize, frame: Frame) {
        if rank == 0 { self.put(frame) } else { self.write(rank, frame) }
    }

    fn write(&self, rank: usize, frame: Frame) {
        let Some(Some(peer)) = self.peers.get(rank) else { return };
        if self.rank != 0 {
            // Who cannot be reached is heard of by the thread that reads.
            let _ = peer.write(&frame);
        } else if let Some(queue) = &*lock(&peer.queue) {
            let _ = queue.frames.send(frame);
        }
    }

    /// Rank 0 says to everybody else that a rank was lost.
    fn lose(&self, rank: usize, last: Frame) {
        let mut hub = lock(&self.hub);
        hub.lose(rank, last).into_iter().for_each(|(other, news)| self.deliver(other, news));
    }

    /// How many steps of a work this rank has come to.
    fn answer(&self, to: usize, ask: &Frame) -> Frame {
        let steps = lock(&self.came).get(&ask.group).copied().unwrap_or(0);
        Frame::new(Kind::Answer, ask.group, steps, (self.rank, to), Vec::new())
    }

    /// Takes in what was sent to this rank.
    pub(super) fn put(&self, frame: Frame) {
        if frame.kind == Kind::Ask {
            return self.send(self.answer(frame.from, &frame));
        }
        lock(&self.inbox).take(frame);
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

    /// How long rank 0 is waited for, which decides what a group is broken for: it answers at once,
    /// unless it is stopped. A machine that has much to do may take its time.
    pub(super) fn verdict(&self) -> Duration {
        self.moment().max(Duration::from_millis(500))
    }

    /// How long an answer is waited for that may never come.
    fn moment(&self) -> Duration {
        (self.deadline / 10).clamp(Duration::from_millis(50), Duration::from_secs(1))
    }

    /// Notes that this rank has come to a number of steps.
    pub(super) fn came(&self, work: u64, steps: u64) {
        lock(&self.came).insert(work, steps);
    }

    /// Notes that this rank is told of a loss.
    pub(super) fn tell(&self, rank: usize, loss: LostReason) {
        lock(&self.told).get_or_insert((rank, loss));
    }

    /// Those of some ranks that have not come to a number of steps, or do not answer. A rank
    /// answers while its program computes, but not if it is stopped.
    pub(super) fn behind(&self, work: u64, steps: u64, ranks: &[usize]) -> Vec<usize> {
        let _asks = lock(&self.asks);
        self.look(|inbox| inbox.answers.retain(|(of, _), _| *of != work));
        for &rank in ranks {
            self.send(Frame::new(Kind::Ask, work, 0, (self.rank, rank), Vec::new()));
        }
        let all =
            |inbox: &mut Inbox| ranks.iter().all(|&rank| inbox.steps(work, rank).is_some()).then_some(());
        self.wait(self.moment(), all);
        self.look(|inbox| {
            // Where rank 0 does not answer, nobody else's answer comes either.
            if self.rank != 0 && ranks.contains(&0) && inbox.steps(work, 0).is_none() {
                return vec![0];
            }
            let behind = |rank: &usize| inbox.steps(work, *rank).is_none_or(|count| count < steps);
            ranks.iter().copied().filter(behind).collect()
        })
    }

    /// PipelineEnds the threads of rank 0 that write, when they have written what there is: waits a moment
    /// for those who read it, and a shorter one for those who do not.
    fn flush(&self) {
        let take = |rank: usize| Some((rank, lock(&self.peers[rank].as_ref()?.queue).take()?.written));
        let (late, reading): (Vec<_>, Vec<_>) =
            (1..self.world).filter_map(take).partition(|(rank, _)| self.look(|inbox| inbox.is_late(*rank)));
        for (peers, patience) in [(reading, self.moment()), (late, LATE)] {
            let end = Instant::now() + patience;
            for (_, written) in peers {
                // Nothing comes: the thread ends.
                let _ = written.recv_timeout(end.saturating_duration_since(Instant::now()));
            }
        }
    }

    /// Reads what a peer sends until the connection ends.
    fn listen(&self, peer: usize, from: &TcpStream, mut seal: Seal) {
        let mut from = BufReader::new(from);
        let ended = loop {
            match Frame::read(&mut from, &mut seal) {
                Err(error) => break error,
                Ok(frame) if self.rank != 0 => self.put(frame),
                Ok(frame) if frame.kind == Kind::Lost => {
                    self.lose(peer, frame);
                    self.write(peer, Frame::new(Kind::Bye, 0, 0, (0, 0), Vec::new()));
                }
                Ok(frame) => {
                    let kind = frame.kind;
                    if !self.hand_on(peer, frame) {
                        let what = format!("a frame that no rank of {} sends: {kind:?}", self.world);
                        break io::Error::new(ErrorKind::InvalidData, what);
                    }
                }
            }
        };
        if ended.kind() == ErrorKind::InvalidData {
            tracing::error!(target: "shardwise", rank = self.rank, peer, error = %ended, "a connection is ended");
            let _ = from.get_ref().shutdown(Shutdown::Both);
        }
        if self.rank == 0 {
            // Where this rank has ended the connection, its own loss is what the others are to
            // know.
            if !self.look(|inbox| inbox.gone) {
                self.lose(peer, last_words(LostReason::Disconnected));
            }
        } else {
            self.put(last_words(LostReason::Disconnected));
            self.look(|inbox| inbox.gone = true);
            self.news.notify_all();
        }
    }
}

impl Line {
    /// The line of rank `rank` over its connections: rank 0's to all others, by rank; another's to
    /// rank 0. Each comes with what its frames are authenticated by.
    ///
    /// # Errors
    /// When a connection cannot be used, or a thread not be started.
    pub(crate) fn new(
        rank: usize,
        deadline: Duration,
        peers: Vec<Option<(TcpStream, Keyed)>>,
    ) -> io::Result<Self> {
        let (mut readers, mut writers) = (Vec::new(), Vec::new());
        let world = peers.len();
        let connection = |(number, peer): (usize, Option<(TcpStream, Keyed)>)| {
            let Some((stream, nonces)) = peer else { return Ok(None) };
            stream.set_nodelay(true)?;
            stream.set_nonblocking(false)?;
            stream.set_read_timeout(None)?;
            // A thread of rank 0 that writes may wait for as long as there is a connection.
            stream.set_write_timeout((rank != 0).then_some(deadline.max(Duration::from_millis(1))))?;
            readers.push((number, Seal::new(&nonces, number)));
            let queue = (rank == 0).then(|| {
                let ((frames, queued), (writing, written)) = (mpsc::channel(), mpsc::channel());
                writers.push((number, queued, writing));
                Queue { frames, written }
            });
            let seal = Mutex::new(Seal::new(&nonces, rank));
            Ok(Some(Peer { stream, seal, queue: Mutex::new(queue) }))
        };
        let peers = peers.into_iter().enumerate().map(connection).collect::<io::Result<_>>()?;
        let (inbox, news, came, asks, told) = Default::default();
        let hub = Mutex::new(Hub::new(world));
        let line = Self {
            wires: Arc::new(Wires { rank, world, deadline, inbox, news, came, asks, told, peers, hub }),
        };
        let start = |name: String, act: Box<dyn FnOnce(&Wires) + Send>| {
            let wires = line.wires();
            let started = thread::Builder::new().name(name).spawn(move || act(&wires));
            // Nobody is there yet who could be waited for.
            started.map(drop).inspect_err(|_| line.close(LostReason::Failed))
        };
        for (peer, queued, writing) in writers {
            let write = move |wires: &Wires| {
                let _writing: mpsc::Sender<()> = writing;
                let Some(to) = &wires.peers[peer] else { return };
                let _ = queued.into_iter().try_for_each(|frame| to.write(&frame));
            };
            start(format!("link, writing to rank {peer}"), Box::new(write))?;
        }
        for (peer, seal) in readers {
            let read = move |wires: &Wires| {
                let Some(from) = &wires.peers[peer] else { return };
                wires.listen(peer, &from.stream, seal);
            };
            start(format!("link to rank {peer}"), Box::new(read))?;
        }
        Ok(line)
    }

    pub(super) fn wires(&self) -> Arc<Wires> {
        Arc::clone(&self.wires)
    }

    /// Tells the other ranks that this one leaves, and how.
    ///
    /// Every message goes by way of rank 0: unless it failed it stays until all have left, or for
    /// the deadline.
    pub(crate) fn close(&self, loss: LostReason) {
        let wires = &self.wires;
        if std::mem::replace(&mut lock(&wires.inbox).closed, true) {
            return;
        }
        let mut last = last_words(loss);
        last.body = pairs(lock(&wires.came).iter()).into();
        if let Some((root, how)) = *lock(&wires.told) {
            (last.round, last.group) = (root as u64 + 1, from_loss(how) as u64);
        }
        if wires.rank == 0 {
            wires.lose(0, last);
            let patience = if loss == LostReason::Left { wires.deadline } else { wires.moment() };
            let over = |inbox: &mut Inbox| {
                (1..wires.world).all(|rank| inbox.is_late(rank) || inbox.has_lost(rank)).then_some(())
            };
            wires.wait(patience, over);
            wires.flush();
        } else {
            wires.write(0, last);
            wires.wait(wires.moment(), |inbox| (inbox.gone || inbox.is_late(0)).then_some(()));
        }
        wires.look(|inbox| inbox.gone = true);
        for peer in wires.peers.iter().flatten() {
            let _ = peer.stream.shutdown(Shutdown::Both);
        }
    }

    /// After [`Line::close`] of a rank that has left: the error of a message which it has never
    /// received.
    pub(crate) fn unread(&self) -> Option<Error> {
        self.wires.look(|inbox| {
            let (from, letter) = inbox.unread()?;
            let letter = Strings::all(letter)?;
            let [what, site] =
                [0, 1].map(|at| letter.get(at).map_or("?".into(), |text| String::from_utf8_lossy(text)));
            Some(never_received(from, self.wires.rank, &format!("{what}, sent at {site}")))
        })
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.close(if thread::panicking() { LostReason::Panicked } else { LostReason::Left });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hmac::KeyInit;
    use std::net::TcpListener;

    /// The rank's thread and the one that watches over it.
    #[test]
    fn two_threads_of_a_rank_may_ask_at_once() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let there = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (here, _) = listener.accept().unwrap();
        let nonces = Keyed::new_from_slice(b"token and nonces").unwrap();
        let line = |rank, peers| Line::new(rank, Duration::from_secs(60), peers).unwrap();
        let first = line(0, vec![None, Some((here, nonces.clone()))]);
        let second = line(1, vec![Some((there, nonces)), None]);
        second.wires().came(7, 3);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| (0..500).for_each(|_| assert!(first.wires().behind(7, 3, &[1]).is_empty())));
            }
        });
        assert_eq!(first.wires().behind(7, 4, &[1]), [1]);
        // What it had come to when it left still counts.
        second.close(LostReason::Left);
        first.wires().wait(Duration::from_secs(60), |inbox| inbox.has_lost(1).then_some(()));
        assert!(first.wires().behind(7, 3, &[1]).is_empty());
        assert_eq!(first.wires().behind(7, 4, &[1]), [1]);
    }
}
