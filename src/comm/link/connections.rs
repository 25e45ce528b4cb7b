//! One process's connections: on rank 0 to all other ranks, on another rank only to rank 0.
//!
//! One thread reads from each connection. On rank 0, a second thread writes to each connection, so
//! that a rank that does not read delays only the frames sent to that rank.

use super::{
    frame::{Frame, Keyed, Kind, Seal, Strings, from_loss},
    hub::{Hub, from_counts},
    inbox::Inbox,
    socket::lock,
    wire::Wire,
};
use crate::{
    comm::call::never_received,
    error::{Error, LostReason},
    security::{Channel, Policy, Roles},
};
use std::{
    collections::HashMap,
    io::{self, BufReader, ErrorKind},
    sync::{Arc, Condvar, Mutex, mpsc},
    thread,
    time::{Duration, Instant},
};

/// When rank 0 closes, it waits this long for the ranks that missed a deadline, so that they can
/// read their last frames.
const LATE_TIMEOUT: Duration = Duration::from_millis(50);

/// What all groups over the connections of a process have in common.
#[derive(Clone, Debug)]
pub(crate) struct LinkTerms {
    pub(crate) channel: Channel,
    pub(crate) policy: Policy,
    /// The roles of the world's ranks.
    pub(crate) roles: Roles,
}

/// A process's connections. [`Connections::close`] closes them, and so does a drop.
#[derive(Debug)]
pub(crate) struct Connections {
    transport: Arc<Transport>,
}

/// The state that a rank shares with its reading and writing threads.
#[derive(Debug)]
pub(super) struct Transport {
    pub(super) rank: usize,
    pub(super) world: usize,
    pub(super) deadline: Duration,
    pub(super) terms: LinkTerms,
    inbox: Mutex<Inbox>,
    news: Condvar,
    /// The number of external steps that this rank has reached, by the id of their work.
    steps: Mutex<HashMap<u64, u64>>,
    /// Locked during a query for steps, because an answer does not say to which query it belongs.
    asks: Mutex<()>,
    /// The first lost rank that made a call of this rank fail, and the reason of that loss. If this
    /// rank leaves as a result, the ranks that still need this rank report that first lost rank
    /// instead.
    first_loss: Mutex<Option<(usize, LostReason)>>,
    /// The connections, by rank: on rank 0 to all others, on the other ranks to rank 0.
    peers: Vec<Option<Peer>>,
    /// Used on rank 0 only.
    hub: Mutex<Hub>,
}

/// A connection to another rank.
#[derive(Debug)]
struct Peer {
    wire: Wire,
    /// Numbers and authenticates the sent frames. Locked while a frame is written.
    seal: Mutex<Seal>,
    /// The frames that rank 0 has yet to write. None after the connection has closed, and on all
    /// ranks other than rank 0.
    queue: Mutex<Option<Queue>>,
}

/// Frames that wait for the writing thread.
#[derive(Debug)]
struct Queue {
    frames: mpsc::Sender<Frame>,
    /// Disconnects when the writing thread ends, either because it has written all frames or
    /// because a write failed.
    written: mpsc::Receiver<()>,
}

impl Peer {
    fn write(&self, frame: &Frame) -> io::Result<()> {
        let written = frame.write(&mut &self.wire, &mut lock(&self.seal));
        if written.is_err() {
            // The shutdown ends the reading thread's stream, and that thread reports the loss.
            self.wire.shutdown();
        }
        written
    }
}

/// The frame by which a rank announces its loss. If a rank's connection ended without such a frame,
/// rank 0 creates it.
fn last_frame(loss: LostReason) -> Frame {
    Frame::new(Kind::Lost, 0, 0, (0, from_loss(loss)), Vec::new())
}

impl Transport {
    /// Sends a frame to rank 0. On rank 0, handles the frame directly.
    pub(super) fn send(&self, frame: Frame) {
        if self.rank == 0 {
            self.route(0, frame);
        } else {
            self.write(0, frame);
        }
    }

    /// Rank 0: handles a frame from a rank. Returns false if the frame is invalid, because no rank
    /// sends such a frame.
    fn route(&self, from: usize, frame: Frame) -> bool {
        if frame.kind == Kind::Ask && frame.to == 0 {
            self.write(from, self.answer(from, &frame));
            return true;
        }
        let mut hub = lock(&self.hub);
        let deliveries = hub.take(from, frame);
        let known = deliveries.is_some();
        // Delivers under the lock, so that all ranks get the frames in the same order.
        deliveries.into_iter().flatten().for_each(|(rank, frame)| self.deliver(rank, frame));
        known
    }

    fn deliver(&self, rank: usize, frame: Frame) {
        if rank == 0 { self.accept(frame) } else { self.write(rank, frame) }
    }

    fn write(&self, rank: usize, frame: Frame) {
        let Some(Some(peer)) = self.peers.get(rank) else { return };
        if self.rank != 0 {
            // Ignores the error, because the reading thread notices a failed connection.
            let _ = peer.write(&frame);
        } else if let Some(queue) = &*lock(&peer.queue) {
            let _ = queue.frames.send(frame);
        }
    }

    /// Rank 0: reports the loss of a rank to all other ranks.
    fn report_loss(&self, rank: usize, last: Frame) {
        let mut hub = lock(&self.hub);
        hub.report_loss(rank, last).into_iter().for_each(|(other, news)| self.deliver(other, news));
    }

    /// The answer to another rank's query, with the number of steps that this rank has reached.
    fn answer(&self, to: usize, ask: &Frame) -> Frame {
        let reached = lock(&self.steps).get(&ask.group).copied().unwrap_or(0);
        Frame::new(Kind::Answer, ask.group, reached, (self.rank, to), Vec::new())
    }

    /// Handles a frame that was sent to this rank.
    pub(super) fn accept(&self, frame: Frame) {
        if frame.kind == Kind::Ask {
            return self.send(self.answer(frame.from, &frame));
        }
        lock(&self.inbox).accept(frame);
        self.news.notify_all();
    }

    /// Runs `read` on the inbox.
    pub(super) fn with_inbox<R>(&self, read: impl FnOnce(&mut Inbox) -> R) -> R {
        read(&mut lock(&self.inbox))
    }

    /// Waits until `find` returns a value, for at most `patience`.
    pub(super) fn wait<R>(
        &self,
        patience: Duration,
        mut find: impl FnMut(&mut Inbox) -> Option<R>,
    ) -> Option<R> {
        let begin = Instant::now();
        let mut inbox = lock(&self.inbox);
        loop {
            if let Some(found) = find(&mut inbox) {
                return Some(found);
            }
            let left = patience.checked_sub(begin.elapsed())?;
            inbox = match self.news.wait_timeout(inbox, left.min(Duration::from_secs(3600))) {
                Ok((inbox, _)) => inbox,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// How long to wait for rank 0's decision on why a group broke. Rank 0 answers at once, unless
    /// its process is stopped or its machine is busy.
    pub(super) fn decision_timeout(&self) -> Duration {
        self.answer_timeout().max(Duration::from_millis(500))
    }

    /// How long to wait for an answer of a rank that may be stopped.
    fn answer_timeout(&self) -> Duration {
        (self.deadline / 10).clamp(Duration::from_millis(50), Duration::from_secs(1))
    }

    /// Records the number of steps that this rank has reached.
    pub(super) fn record_steps(&self, work: u64, steps: u64) {
        lock(&self.steps).insert(work, steps);
    }

    /// Records that a call of this rank failed because rank `rank` was lost. Only the first such
    /// rank is kept.
    pub(super) fn record_loss(&self, rank: usize, loss: LostReason) {
        lock(&self.first_loss).get_or_insert((rank, loss));
    }

    /// Asks `ranks` for their steps of `work`. Returns the ranks that have not reached `steps`
    /// steps or do not answer. A rank answers while its program computes, but not while its process
    /// is stopped.
    pub(super) fn behind(&self, work: u64, steps: u64, ranks: &[usize]) -> Vec<usize> {
        let _asks = lock(&self.asks);
        self.with_inbox(|inbox| inbox.answers.retain(|(of, _), _| *of != work));
        for &rank in ranks {
            self.send(Frame::new(Kind::Ask, work, 0, (self.rank, rank), Vec::new()));
        }
        let all =
            |inbox: &mut Inbox| ranks.iter().all(|&rank| inbox.steps(work, rank).is_some()).then_some(());
        self.wait(self.answer_timeout(), all);
        self.with_inbox(|inbox| {
            // If rank 0 does not answer, it may not relay other answers either, so blame only rank
            // 0.
            if self.rank != 0 && ranks.contains(&0) && inbox.steps(work, 0).is_none() {
                return vec![0];
            }
            let behind = |rank: &usize| inbox.steps(work, *rank).is_none_or(|count| count < steps);
            ranks.iter().copied().filter(behind).collect()
        })
    }

    /// Rank 0: lets the writing threads write their remaining frames and end. Waits at
    /// most `answer_timeout`, or `LATE_TIMEOUT` for ranks that missed a deadline.
    fn flush(&self) {
        let take = |rank: usize| Some((rank, lock(&self.peers[rank].as_ref()?.queue).take()?.written));
        let (late, reading): (Vec<_>, Vec<_>) = (1..self.world)
            .filter_map(take)
            .partition(|(rank, _)| self.with_inbox(|inbox| inbox.is_late(*rank)));
        for (peers, patience) in [(reading, self.answer_timeout()), (late, LATE_TIMEOUT)] {
            let end = Instant::now() + patience;
            for (_, written) in peers {
                // No value is ever sent on this channel. The call returns when the writing thread
                // ends.
                let _ = written.recv_timeout(end.saturating_duration_since(Instant::now()));
            }
        }
    }

    /// Reads frames from a peer until the connection ends.
    fn listen(&self, peer: usize, from: &Wire, mut seal: Seal) {
        let mut from = BufReader::new(from);
        let ended = loop {
            match Frame::read(&mut from, &mut seal) {
                Err(error) => break error,
                Ok(frame) if self.rank != 0 => self.accept(frame),
                Ok(frame) if frame.kind == Kind::Lost => {
                    self.report_loss(peer, frame);
                    self.write(peer, Frame::new(Kind::Bye, 0, 0, (0, 0), Vec::new()));
                }
                Ok(frame) => {
                    let kind = frame.kind;
                    if !self.route(peer, frame) {
                        let what =
                            format!("no rank of a world of {} sends such a frame: {kind:?}", self.world);
                        break io::Error::new(ErrorKind::InvalidData, what);
                    }
                }
            }
        };
        if ended.kind() == ErrorKind::InvalidData {
            tracing::error!(target: "shardwise", rank = self.rank, peer, error = %ended, "an invalid frame arrived, so the connection is closed");
            from.get_ref().shutdown();
        }
        if self.rank == 0 {
            // After rank 0 has closed its connections, it reports no loss of another rank, because
            // it has already reported its own.
            if !self.with_inbox(|inbox| inbox.gone) {
                self.report_loss(peer, last_frame(LostReason::Disconnected));
            }
        } else {
            self.accept(last_frame(LostReason::Disconnected));
            self.with_inbox(|inbox| inbox.gone = true);
            self.news.notify_all();
        }
    }
}

impl Connections {
    /// Starts the threads of rank `rank` for its connections. `peers` has an entry for each rank:
    /// on rank 0, the connections to all other ranks; on another rank, only the connection to rank
    /// 0. Each connection comes with the HMAC that authenticates its frames, unless it uses TLS.
    ///
    /// # Errors
    /// When a connection cannot be used or a thread cannot be started.
    pub(crate) fn new(
        rank: usize,
        deadline: Duration,
        terms: LinkTerms,
        peers: Vec<Option<(Wire, Option<Keyed>)>>,
    ) -> io::Result<Self> {
        let (mut readers, mut writers) = (Vec::new(), Vec::new());
        let world = peers.len();
        let open = |(number, peer): (usize, Option<(Wire, Option<Keyed>)>)| {
            let Some((wire, nonces)) = peer else { return Ok(None) };
            let tcp = wire.tcp();
            tcp.set_nodelay(true)?;
            tcp.set_nonblocking(false)?;
            tcp.set_read_timeout(None)?;
            // Only a writing thread of rank 0 may block for as long as the connection exists.
            tcp.set_write_timeout((rank != 0).then_some(deadline.max(Duration::from_millis(1))))?;
            readers.push((number, Seal::new(nonces.as_ref(), number)));
            let queue = (rank == 0).then(|| {
                let ((frames, queued), (writing, written)) = (mpsc::channel(), mpsc::channel());
                writers.push((number, queued, writing));
                Queue { frames, written }
            });
            let seal = Mutex::new(Seal::new(nonces.as_ref(), rank));
            Ok(Some(Peer { wire, seal, queue: Mutex::new(queue) }))
        };
        let peers = peers.into_iter().enumerate().map(open).collect::<io::Result<_>>()?;
        let (inbox, news, steps, asks, first_loss) = Default::default();
        let hub = Mutex::new(Hub::new(world));
        let connections = Self {
            transport: Arc::new(Transport {
                rank,
                world,
                deadline,
                terms,
                inbox,
                news,
                steps,
                asks,
                first_loss,
                peers,
                hub,
            }),
        };
        let start = |name: String, act: Box<dyn FnOnce(&Transport) + Send>| {
            let transport = connections.transport();
            let started = thread::Builder::new().name(name).spawn(move || act(&transport));
            // Informs the peers that this rank failed.
            started.map(drop).inspect_err(|_| connections.close(LostReason::Failed))
        };
        for (peer, queued, writing) in writers {
            let write = move |transport: &Transport| {
                let _writing: mpsc::Sender<()> = writing;
                let Some(to) = &transport.peers[peer] else { return };
                let _ = queued.into_iter().try_for_each(|frame| to.write(&frame));
            };
            start(format!("link, writing to rank {peer}"), Box::new(write))?;
        }
        for (peer, seal) in readers {
            let read = move |transport: &Transport| {
                let Some(from) = &transport.peers[peer] else { return };
                transport.listen(peer, &from.wire, seal);
            };
            start(format!("link to rank {peer}"), Box::new(read))?;
        }
        Ok(connections)
    }

    pub(super) fn transport(&self) -> Arc<Transport> {
        Arc::clone(&self.transport)
    }

    /// Announces that this rank leaves, with the reason, and closes the connections.
    ///
    /// Every message passes through rank 0. So rank 0 waits until all other ranks have left, but at
    /// most until the deadline, and only briefly if rank 0 itself failed.
    pub(crate) fn close(&self, loss: LostReason) {
        let transport = &self.transport;
        if std::mem::replace(&mut lock(&transport.inbox).closed, true) {
            return;
        }
        let mut last = last_frame(loss);
        last.body = from_counts(lock(&transport.steps).iter()).into();
        if let Some((root, how)) = *lock(&transport.first_loss) {
            (last.round, last.group) = (root as u64 + 1, from_loss(how) as u64);
        }
        if transport.rank == 0 {
            transport.report_loss(0, last);
            let patience =
                if loss == LostReason::Left { transport.deadline } else { transport.answer_timeout() };
            let over = |inbox: &mut Inbox| {
                (1..transport.world).all(|rank| inbox.is_late(rank) || inbox.has_lost(rank)).then_some(())
            };
            transport.wait(patience, over);
            transport.flush();
        } else {
            transport.write(0, last);
            transport
                .wait(transport.answer_timeout(), |inbox| (inbox.gone || inbox.is_late(0)).then_some(()));
        }
        transport.with_inbox(|inbox| inbox.gone = true);
        for peer in transport.peers.iter().flatten() {
            peer.wire.shutdown();
        }
    }

    /// Returns the error of a message that this rank never received. Call it after
    /// [`Connections::close`].
    pub(crate) fn unread(&self) -> Option<Error> {
        self.transport.with_inbox(|inbox| {
            let (from, message) = inbox.unread()?;
            let message = Strings::all(message)?;
            let [what, site] =
                [0, 1].map(|at| message.get(at).map_or("?".into(), |text| String::from_utf8_lossy(text)));
            Some(never_received(from, self.transport.rank, &format!("{what}, sent at {site}")))
        })
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        self.close(if thread::panicking() { LostReason::Panicked } else { LostReason::Left });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::security::Reach;
    use hmac::KeyInit;
    use std::net::{TcpListener, TcpStream};

    /// Two threads of a rank ask for steps: its own thread and its watchdog.
    #[test]
    fn two_threads_of_a_rank_may_ask_at_once() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let there = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (here, _) = listener.accept().unwrap();
        let nonces = Keyed::new_from_slice(b"token and nonces").unwrap();
        let wire = |tcp: TcpStream| Some((Wire::plain(tcp.into()), Some(nonces.clone())));
        let channel = Channel::plaintext(Reach::Machine);
        let terms = LinkTerms { channel, policy: Policy::Any, roles: Roles::UNRESTRICTED };
        let connections =
            |rank, peers| Connections::new(rank, Duration::from_secs(60), terms.clone(), peers).unwrap();
        let first = connections(0, vec![None, wire(here)]);
        let second = connections(1, vec![wire(there), None]);
        second.transport().record_steps(7, 3);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    (0..500).for_each(|_| assert!(first.transport().behind(7, 3, &[1]).is_empty()))
                });
            }
        });
        assert_eq!(first.transport().behind(7, 4, &[1]), [1]);
        // The steps that rank 1 had reached when it left still count.
        second.close(LostReason::Left);
        first.transport().wait(Duration::from_secs(60), |inbox| inbox.has_lost(1).then_some(()));
        assert!(first.transport().behind(7, 3, &[1]).is_empty());
        assert_eq!(first.transport().behind(7, 4, &[1]), [1]);
    }
}
