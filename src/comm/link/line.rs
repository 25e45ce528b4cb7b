//! One process's end of the connections, which all go to rank 0.
//!
//! A round of a group is complete when rank 0 has the parts of all its ranks; then each of them gets all parts. What a lost
//! rank had given still counts: rank 0 says how many rounds of each group it took part in, and only who waits for a later
//! one gives up.

use super::frame::{Frame, Kind, Strings, Words, from_loss, to_loss, to_mismatch};
use crate::{
    comm::call::never_received,
    error::{Error, Loss, Mismatch},
};
use std::{
    collections::{HashMap, HashSet, VecDeque},
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
    /// How many steps of what this rank has come to beside its groups, by work.
    came: Mutex<HashMap<u64, u64>>,
    /// Held while others are asked what they have come to: an answer is that to the last question.
    asks: Mutex<()>,
    /// The first loss that this rank was told of. It is why this rank may leave, too: who needs this rank then is told of that loss.
    told: Mutex<Option<(usize, Loss)>>,
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
    /// What has gone wrong, in the order in which rank 0 tells it: the first that concerns a call is its cause.
    pub(super) news: Vec<News>,
    absent: HashMap<(u64, u64), Vec<usize>>,
    /// By work and rank.
    answers: HashMap<(u64, usize), u64>,
    /// The connections have ended: nothing arrives any more.
    gone: bool,
    closed: bool,
}

/// What has gone wrong.
#[derive(Debug)]
pub(super) enum News {
    /// A rank was lost, after it had been told of the loss of `root`; in how many rounds of a group it took part, and to how many
    /// steps of what it came beside them.
    Lost { rank: usize, reason: Loss, root: Option<(usize, Loss)>, taken: HashMap<u64, u64> },
    /// The ranks of a group disagree.
    Broken { group: u64, mismatch: Mismatch },
    /// Ranks were waited for for too long in a group. Nobody waits for them when it leaves.
    Late { group: u64, missing: Vec<usize>, after: Duration },
}

impl Inbox {
    /// How rank 0 was lost, if its connection is closed.
    pub(super) fn way_lost(&self) -> Option<Loss> {
        self.lost(0).map(|(reason, _)| reason).filter(|_| self.gone)
    }

    /// How a rank was lost, and to what it had come, if it is lost.
    fn lost(&self, lost: usize) -> Option<(Loss, &HashMap<u64, u64>)> {
        self.news.iter().find_map(|news| match news {
            News::Lost { rank, reason, taken, .. } if *rank == lost => Some((*reason, taken)),
            _ => None,
        })
    }

    /// Whether a rank was waited for in vain.
    fn is_late(&self, late: usize) -> bool {
        self.news.iter().any(|news| matches!(news, News::Late { missing, .. } if missing.contains(&late)))
    }

    /// To how many steps of a work a rank has come, as far as it has said: in an answer, or when it
    /// left.
    fn steps(&self, work: u64, rank: usize) -> Option<u64> {
        let last_words = || Some(self.lost(rank)?.1.get(&work).copied().unwrap_or(0));
        self.answers.get(&(work, rank)).copied().or_else(last_words)
    }

    /// Whether a rank is lost.
    fn has_lost(&self, lost: usize) -> bool {
        self.lost(lost).is_some()
    }
}

/// What rank 0 knows of all.
#[derive(Debug, Default)]
struct Hub {
    /// The parts of rounds that are not complete: by place, with the rank that gave it.
    parts: HashMap<(u64, u64), Vec<Option<(usize, Vec<u8>)>>>,
    /// In how many rounds a rank took part, by group.
    taken: HashMap<usize, HashMap<u64, u64>>,
    lost: HashSet<usize>,
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
            Kind::Letter | Kind::Ask | Kind::Answer => vec![(frame.to, Frame { from, ..frame })],
            Kind::Who => {
                let parts = self.parts.get(&(group, round));
                let absent = parts.into_iter().flatten().enumerate().filter(|(_, part)| part.is_none());
                let body = absent.flat_map(|(place, _)| (place as u64).to_le_bytes()).collect();
                vec![(from, Frame::new(Kind::Absent, group, round, (0, 0), body))]
            }
            _ => Vec::new(),
        }
    }

    /// The news of a lost rank, whose last words are given, once.
    fn lose(&mut self, rank: usize, mut last: Frame) -> Option<Frame> {
        if !self.lost.insert(rank) {
            return None;
        }
        let taken = self.taken.get(&rank).into_iter().flatten();
        last.body.extend(pairs(taken));
        Some(Frame { from: rank, ..last })
    }
}

fn pairs<'a>(counts: impl Iterator<Item = (&'a u64, &'a u64)>) -> Vec<u8> {
    counts.flat_map(|(of, count)| [*of, *count]).flat_map(u64::to_le_bytes).collect()
}

/// A rank's last words, which others say for it if it cannot.
fn last_words(loss: Loss) -> Frame {
    Frame::new(Kind::Lost, 0, 0, (0, from_loss(loss)), Vec::new())
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
        if matches!(frame.kind, Kind::Broken | Kind::Late) {
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
    fn lose(&self, rank: usize, last: Frame) {
        let Some(news) = lock(&self.hub).lose(rank, last) else { return };
        (0..self.world).filter(|&other| other != rank).for_each(|other| self.deliver(other, news.clone()));
    }

    /// Takes in what was sent to this rank.
    pub(super) fn put(&self, frame: Frame) {
        if frame.kind == Kind::Ask {
            let steps = lock(&self.came).get(&frame.group).copied().unwrap_or(0);
            return self.send(Frame::new(
                Kind::Answer,
                frame.group,
                steps,
                (self.rank, frame.from),
                Vec::new(),
            ));
        }
        let mut inbox = lock(&self.inbox);
        let key = (frame.group, frame.round);
        match frame.kind {
            Kind::Parts => drop(inbox.rounds.insert(key, frame.body)),
            Kind::Letter => {
                inbox.letters.entry((frame.group, frame.from)).or_default().push_back(frame.body);
            }
            Kind::Lost => {
                if !inbox.has_lost(frame.from) {
                    let words: Vec<_> = Words(&frame.body).collect();
                    let taken = words.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
                    let root = frame.round.checked_sub(1);
                    let root = root.map(|rank| (rank as usize, to_loss(frame.group as usize)));
                    let (rank, reason) = (frame.from, to_loss(frame.to));
                    inbox.news.push(News::Lost { rank, reason, root, taken });
                }
            }
            Kind::Broken => {
                let mismatch = to_mismatch(&frame.body);
                let news = mismatch.map(|mismatch| News::Broken { group: frame.group, mismatch });
                inbox.news.extend(news);
            }
            Kind::Late => {
                let missing = Words(&frame.body).map(|rank| rank as usize).collect();
                let after = Duration::from_nanos(frame.round);
                inbox.news.push(News::Late { group: frame.group, missing, after });
            }
            Kind::Answer => drop(inbox.answers.insert((frame.group, frame.from), frame.round)),
            Kind::Absent => {
                drop(inbox.absent.insert(key, Words(&frame.body).map(|rank| rank as usize).collect()))
            }
            Kind::Bye => inbox.gone = true,
            Kind::Part | Kind::Who | Kind::Ask => {}
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

    /// Notes that this rank has come to a number of steps.
    pub(super) fn came(&self, work: u64, steps: u64) {
        lock(&self.came).insert(work, steps);
    }

    /// Notes that this rank is told of a loss.
    pub(super) fn tell(&self, rank: usize, loss: Loss) {
        lock(&self.told).get_or_insert((rank, loss));
    }

    /// Those of some ranks that have not come to a number of steps, or do not answer. A rank answers while its program computes,
    /// but not if it is stopped.
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

    /// Reads what a peer sends until the connection ends.
    fn listen(&self, peer: usize, from: TcpStream) {
        let mut from = BufReader::new(from);
        while let Ok(frame) = Frame::read(&mut from) {
            if self.rank != 0 {
                self.put(frame);
            } else if frame.kind == Kind::Lost {
                self.lose(peer, frame);
                self.write(peer, &Frame::new(Kind::Bye, 0, 0, (0, 0), Vec::new()));
            } else {
                self.hand_on(peer, frame);
            }
        }
        if self.rank == 0 {
            // Where this rank has ended the connection, its own loss is what the others are to know.
            if !self.look(|inbox| inbox.gone) {
                self.lose(peer, last_words(Loss::Disconnected));
            }
        } else {
            self.put(last_words(Loss::Disconnected));
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
        let (inbox, news, came, asks, told, hub) = Default::default();
        let wires = Arc::new(Wires { rank, world, deadline, inbox, news, came, asks, told, peers, hub });
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
        let mut last = last_words(loss);
        last.body = pairs(lock(&wires.came).iter());
        if let Some((root, how)) = *lock(&wires.told) {
            (last.round, last.group) = (root as u64 + 1, from_loss(how) as u64);
        }
        if wires.rank == 0 {
            wires.lose(0, last);
            let patience = if loss == Loss::Left { wires.deadline } else { wires.moment() };
            let over = |inbox: &mut Inbox| {
                (1..wires.world).all(|rank| inbox.is_late(rank) || inbox.has_lost(rank)).then_some(())
            };
            wires.wait(patience, over);
        } else {
            wires.write(0, &last);
            wires.wait(wires.moment(), |inbox| (inbox.gone || inbox.is_late(0)).then_some(()));
        }
        wires.look(|inbox| inbox.gone = true);
        for peer in wires.peers.iter().flatten() {
            let _ = lock(peer).shutdown(Shutdown::Both);
        }
    }
}

impl Line {
    /// After [`Line::close`] of a rank that has left: the error of a message which it has never received.
    pub(crate) fn unread(&self) -> Option<Error> {
        self.wires.look(|inbox| {
            let ended_well = inbox
                .news
                .iter()
                .all(|news| matches!(news, News::Lost { reason: Loss::Left, root: None, .. }));
            let ((_, from), letters) =
                inbox.letters.iter().filter(|_| ended_well).find(|(_, letters)| !letters.is_empty())?;
            let letter = Strings::all(letters.front()?)?;
            let [what, site] =
                [0, 1].map(|at| letter.get(at).map_or("?".into(), |text| String::from_utf8_lossy(text)));
            Some(never_received(*from, self.wires.rank, &format!("{what}, sent at {site}")))
        })
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.close(if thread::panicking() { Loss::Panicked } else { Loss::Left });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// The rank's thread and the one that watches over it.
    #[test]
    fn two_threads_of_a_rank_may_ask_at_once() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let there = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (here, _) = listener.accept().unwrap();
        let line = |rank, peers| Line::new(rank, Duration::from_secs(60), peers).unwrap();
        let (first, second) = (line(0, vec![None, Some(here)]), line(1, vec![Some(there), None]));
        second.wires().came(7, 3);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| (0..500).for_each(|_| assert!(first.wires().behind(7, 3, &[1]).is_empty())));
            }
        });
        assert_eq!(first.wires().behind(7, 4, &[1]), [1]);
        // What it had come to when it left still counts.
        second.close(Loss::Left);
        first.wires().wait(Duration::from_secs(60), |inbox| inbox.has_lost(1).then_some(()));
        assert!(first.wires().behind(7, 3, &[1]).is_empty());
        assert_eq!(first.wires().behind(7, 4, &[1]), [1]);
    }
}
