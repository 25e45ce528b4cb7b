//! Ranks that are processes, over the connections by which they found each other:
//! [`crate::launch::Env`].

mod frame;
mod hub;
mod inbox;
mod line;

pub(crate) use {
    frame::Keyed,
    line::{Line, lock},
};

use super::{
    Call, Communicator, ExternalStep, Incoming, Outgoing, ReduceOp, Shards, Watchdog,
    call::hash,
    cause::Cause,
    combine,
    host::{HostVec, to_bytes},
};
use crate::{
    device::{AnyMut, AnyRef, Cpu, each_dtype},
    error::{Error, LostReason, Mismatch, Result},
};
use frame::{Body, Frame, Kind, Strings, Words, from_mismatch, from_words};
use inbox::{Inbox, News};
use line::Wires;
use std::{
    cell::{Cell, RefCell},
    sync::Arc,
    time::Duration,
};

/// The most bytes of tensors in one message of the link. Longer tensors go in several.
const MOST: usize = if cfg!(test) { 1 << 10 } else { 1 << 27 };

/// How long a rank waits for a message before it says so to rank 0, which compares that with what
/// the others wait for.
const STANDS: Duration = Duration::from_millis(10);

/// One process's end of a group whose messages all go by way of the world's first rank.
///
/// It carries what ranks have to agree on (their calls, NCCL's unique id, how a group is divided)
/// and small tensors: a collective takes a message to rank 0 and one back, of all ranks' inputs, or
/// several where they are long. Bulk data are NCCL's, or MPI's. Sums are made in rank order, as
/// thread ranks make them. A collective that is started is done at once.
#[derive(Debug)]
pub struct Link {
    wires: Arc<Wires>,
    group: u64,
    name: String,
    /// The group's ranks, counted in the world.
    members: Vec<usize>,
    rank: usize,
    rounds: Cell<u64>,
    /// What broke the group.
    failed: RefCell<Option<Cause>>,
}

impl Link {
    /// The group of all processes.
    pub(crate) fn world(line: &Line) -> Self {
        let wires = line.wires();
        let (members, rank) = ((0..wires.world).collect(), wires.rank);
        Self::new(wires, 0, "world".into(), members, rank)
    }

    fn new(wires: Arc<Wires>, group: u64, name: String, members: Vec<usize>, rank: usize) -> Self {
        Self { wires, group, name, members, rank, rounds: Cell::new(0), failed: RefCell::new(None) }
    }

    /// The place in the group of a rank of the world.
    fn place(&self, rank: usize) -> Option<usize> {
        self.members.iter().position(|member| *member == rank)
    }

    fn fail(&self, call: &Call, cause: Cause) -> Error {
        let error = self.error(call, &cause);
        self.failed.borrow_mut().get_or_insert(cause);
        error
    }

    /// What rank 0 is to decide when this rank has waited for a round for too long.
    fn giving_up(&self, round: u64) -> Frame {
        let members = self.members.iter().map(|&rank| rank as u64);
        let body = from_words([nanoseconds(self.wires.deadline)].into_iter().chain(members));
        Frame::new(Kind::GiveUp, self.group, round, (0, 0), body)
    }

    /// This rank has waited for the missing ones for too long, and all are told so.
    fn late(&self, call: &Call, missing: Vec<usize>, after: Duration) -> Error {
        let ranks: Vec<_> = missing.iter().map(|&rank| self.members[rank]).collect();
        self.break_for(call, self.late_news(&ranks, after), Cause::Deadline { missing, after })
    }

    /// The news that ranks of the world were waited for too long.
    fn late_news(&self, ranks: &[usize], after: Duration) -> Frame {
        let body = from_words(ranks.iter().map(|&rank| rank as u64));
        Frame::new(Kind::Late, self.group, nanoseconds(after), (0, 0), body)
    }

    /// Breaks the group: for what rank 0 was told first, as for all its ranks, or for `cause` if it
    /// says nothing.
    fn break_for(&self, call: &Call, news: Frame, cause: Cause) -> Error {
        self.wires.send(news.clone());
        let first = self.wires.wait(self.wires.verdict(), |inbox| self.cause(inbox, |_, _, _| false));
        let cause = first.unwrap_or_else(|| {
            self.wires.put(news);
            cause
        });
        self.fail(call, cause)
    }

    /// The ranks that have not come to a step, or do not answer.
    fn behind(&self, step: ExternalStep) -> Vec<usize> {
        let needed = (0..self.members.len()).filter(|&rank| rank != self.rank && step.needs(rank));
        let needed: Vec<usize> = needed.map(|rank| self.members[rank]).collect();
        let behind = self.wires.behind(step.work, step.number + 1, &needed);
        (0..self.members.len()).filter(|&rank| behind.contains(&self.members[rank])).collect()
    }

    fn error(&self, call: &Call, cause: &Cause) -> Error {
        match cause {
            Cause::Lost { rank, reason } => self.wires.tell(self.members[*rank], *reason),
            Cause::Relay { reason } => self.wires.tell(0, *reason),
            Cause::Disagreement(_) | Cause::Deadline { .. } => {}
        }
        cause.error(call, &self.name)
    }

    /// What broke the group, of what is in the inbox: the first of it; a lost rank if `stops` says
    /// so of it.
    fn cause(
        &self,
        inbox: &Inbox,
        stops: impl Fn(usize, LostReason, &dyn Fn(u64) -> u64) -> bool,
    ) -> Option<Cause> {
        let place = |rank| self.place(rank);
        let first = inbox.news.iter().find_map(|news| match news {
            News::Broken { group, mismatch } if *group == self.group => {
                Some(Cause::Disagreement(Box::new(mismatch.clone())))
            }
            News::Late { group, missing, after } if *group == self.group => {
                let missing = missing.iter().filter_map(|&rank| place(rank)).collect();
                Some(Cause::Deadline { missing, after: *after })
            }
            News::Broken { .. } | News::Late { .. } => None,
            News::Lost { rank, reason, root, taken } => {
                let rank = place(*rank)?;
                let count = |of| taken.get(&of).copied().unwrap_or(0);
                // Who was told of a loss before it left is not the first.
                let first = root.and_then(|(root, reason)| Some((place(root)?, reason)));
                let (root, how) = first.unwrap_or((rank, *reason));
                stops(rank, *reason, &count).then_some(Cause::Lost { rank: root, reason: how })
            }
        });
        // Where the first process is gone, nothing arrives any more, whoever sends it.
        first.or_else(|| {
            let reason = inbox.way_lost()?;
            Some(place(0).map_or(Cause::Relay { reason }, |rank| Cause::Lost { rank, reason }))
        })
    }

    /// What broke the group for a call that needs ranks of whom `needs` says, of those that have
    /// left, so.
    fn obstacle_if(&self, call: &Call, needs: impl Fn(usize, &dyn Fn(u64) -> u64) -> bool) -> Option<Error> {
        if let Some(cause) = &*self.failed.borrow() {
            return Some(self.error(call, cause));
        }
        let stops =
            |rank, reason, count: &dyn Fn(u64) -> u64| reason != LostReason::Left || needs(rank, count);
        let cause = self.wires.look(|inbox| self.cause(inbox, stops));
        cause.map(|cause| self.error(call, &cause))
    }

    /// All ranks' words, of which none has more than `longest` bytes, after a comparison of their
    /// calls.
    fn gather(&self, call: &Call, words: &[u8], longest: usize) -> Result<Vec<Vec<u8>>> {
        let mut whole = vec![Vec::new(); self.members.len()];
        // Rank 0 sends the pieces of all ranks at once.
        let piece = (MOST / whole.len()).max(1);
        for begin in (0..longest.max(1)).step_by(piece) {
            let end = words.len().min(begin + piece);
            let parts = self.round(call, words.get(begin..end).unwrap_or_default())?;
            for (whole, part) in whole.iter_mut().zip(parts) {
                match whole.is_empty() {
                    true => *whole = part,
                    false => whole.extend(part),
                }
            }
        }
        Ok(whole)
    }

    /// A part of each rank.
    fn round(&self, call: &Call, words: &[u8]) -> Result<Vec<Vec<u8>>> {
        if let Some(cause) = &*self.failed.borrow() {
            return Err(self.error(call, cause));
        }
        if self.members.len() == 1 {
            return Ok(vec![words.to_vec()]);
        }
        let round = self.rounds.get();
        self.rounds.set(round + 1);
        let mut part = Strings::default();
        let [sent, received] = call.messages;
        part.push(&call.fingerprint().to_le_bytes());
        part.push(&from_words([sent, received]));
        part.push(call.to_string().as_bytes());
        part.push(words);
        let place = (self.rank, self.members.len());
        self.wires.send(Frame::new(Kind::Part, self.group, round, place, part.0));
        let mut found = |inbox: &mut Inbox| {
            let complete = inbox.rounds.remove(&(self.group, round)).map(Ok);
            // What a lost rank had given counts.
            complete.or_else(|| self.cause(inbox, |_, _, rounds| rounds(self.group) <= round).map(Err))
        };
        let parts = self.wires.wait(self.wires.deadline, &mut found).or_else(|| {
            self.wires.send(self.giving_up(round));
            self.wires.wait(self.wires.verdict(), found)
        });
        let parts = match parts {
            Some(Ok(parts)) => parts,
            Some(Err(cause)) => return Err(self.fail(call, cause)),
            // Rank 0 itself does not answer.
            None => {
                let after = self.wires.deadline;
                self.wires.put(self.late_news(&[0], after));
                let missing = self.place(0).map(|rank| Cause::Deadline { missing: vec![rank], after });
                return Err(
                    self.fail(call, missing.unwrap_or(Cause::Relay { reason: LostReason::Disconnected }))
                );
            }
        };
        let parts = Strings::all(&parts).unwrap_or_default();
        let parts: Option<Vec<_>> = parts.into_iter().map(Strings::all).collect();
        let parts = parts
            .filter(|parts| parts.len() == self.members.len() && parts.iter().all(|part| part.len() == 4));
        let parts = parts.ok_or_else(|| damaged(call))?;
        if let Some(right_rank) = parts.iter().position(|part| part[0] != parts[0][0]) {
            let words = |rank: usize| String::from_utf8_lossy(parts[rank][2]).into_owned();
            let mismatch = Mismatch { left_rank: 0, left: words(0), right_rank, right: words(right_rank) };
            return Err(self.fail(call, Cause::Disagreement(Box::new(mismatch))));
        }
        let counts: Option<Vec<[u64; 2]>> =
            parts.iter().map(|part| Words(part[1]).collect::<Vec<_>>().try_into().ok()).collect();
        let counts = counts.ok_or_else(|| damaged(call))?;
        if let Some(mismatch) = call.unreceived(counts.into_iter()) {
            return Err(self.fail(call, Cause::Disagreement(Box::new(mismatch))));
        }
        Ok(parts.into_iter().map(|part| part[3].to_vec()).collect())
    }

    /// All ranks' tensors, of lengths that `len` gives.
    fn collect(
        &self,
        call: &Call,
        data: AnyRef<'_, Cpu>,
        len: impl Fn(usize) -> usize,
    ) -> Result<Vec<HostVec>> {
        let longest =
            (0..self.members.len()).map(&len).max().unwrap_or(0).saturating_mul(data.dtype().size());
        let parts = self.gather(call, &to_bytes(data), longest)?;
        let tensor = |(rank, bytes): (usize, Vec<u8>)| {
            let tensor = HostVec::from_bytes(data.dtype(), &bytes);
            tensor.filter(|tensor| tensor.as_ref().len() == len(rank)).ok_or_else(|| damaged(call))
        };
        parts.into_iter().enumerate().map(tensor).collect()
    }

    fn send(&self, call: &Call, send: Outgoing<'_, Cpu>) -> Result<()> {
        let obstacle = self.wires.look(|inbox| self.cause(inbox, |rank, _, _| rank == send.to));
        if let Some(cause) = obstacle {
            return Err(self.error(call, &cause));
        }
        let (what, site) = (format!("{} {}", send.data.dtype(), send.shape), call.site.to_string());
        let route = (self.members[self.rank], self.members[send.to]);
        let bytes = to_bytes(send.data);
        for begin in (0..bytes.len().max(1)).step_by(MOST) {
            let mut letter = Strings::default();
            letter.push(what.as_bytes());
            letter.push(site.as_bytes());
            letter.push(&bytes[begin..bytes.len().min(begin + MOST)]);
            self.wires.send(Frame::new(Kind::Letter, self.group, 0, route, letter.0));
        }
        Ok(())
    }

    fn receive(&self, call: &Call, recv: Incoming<'_, Cpu>) -> Result<()> {
        let expected = format!("{} {}", recv.data.dtype(), recv.shape);
        let len = recv.data.len().saturating_mul(recv.data.dtype().size());
        let mut bytes = Vec::new();
        for _ in (0..len.max(1)).step_by(MOST) {
            let letter = self.letter(call, recv.from)?;
            let letter =
                Strings::all(&letter).filter(|letter| letter.len() == 3).ok_or_else(|| damaged(call))?;
            if letter[0] != expected.as_bytes() {
                let words = |bytes| String::from_utf8_lossy(bytes);
                let mismatch = Mismatch {
                    left_rank: recv.from,
                    left: format!("exchange, sending {} at {}", words(letter[0]), words(letter[1])),
                    right_rank: self.rank,
                    right: format!("exchange, expecting {expected} at {}", call.site),
                };
                let news = Frame::new(Kind::Broken, self.group, 0, (0, 0), from_mismatch(&mismatch));
                return Err(self.break_for(call, news, Cause::Disagreement(Box::new(mismatch))));
            }
            bytes.extend(letter[2]);
        }
        let data = HostVec::from_bytes(recv.data.dtype(), &bytes).ok_or_else(|| damaged(call))?;
        put(call, &data, recv.data)
    }

    /// The next letter of a rank of the group.
    fn letter(&self, call: &Call, from: usize) -> Result<Body> {
        let sender = self.members[from];
        let mut found = |inbox: &mut Inbox| {
            inbox.letter(self.group, sender).map(Ok).or_else(|| {
                let stops = |rank, reason, _: &dyn Fn(u64) -> u64| rank == from || reason != LostReason::Left;
                self.cause(inbox, stops).map(Err)
            })
        };
        let deadline = self.wires.deadline;
        let letter = self.wires.wait(deadline.min(STANDS), &mut found).or_else(|| {
            self.wires.send(self.standing(call, from));
            self.wires.wait(deadline.saturating_sub(STANDS), found)
        });
        match letter {
            Some(Ok(letter)) => Ok(letter),
            Some(Err(cause)) => Err(self.error(call, &cause)),
            None => Err(self.late(call, vec![from], deadline)),
        }
    }

    /// What rank 0 is to know of a rank that waits for a message.
    fn standing(&self, call: &Call, from: usize) -> Frame {
        let sender = self.members[from];
        let received = self.wires.look(|inbox| inbox.received(self.group, sender));
        let mut body = from_words([self.rank, from].map(|place| place as u64));
        body.extend(call.to_string().as_bytes());
        Frame::new(Kind::Stand, self.group, received, (self.wires.rank, sender), body)
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn damaged(call: &Call) -> Error {
    Error::invalid(call.op.name(), "a message of another rank is damaged: do all run the same program?")
}

/// to ← the elements of a message.
fn put(call: &Call, from: &HostVec, to: AnyMut<'_, Cpu>) -> Result<()> {
    each_dtype!(AnyRef, from.as_ref(), from => match to.of() {
        Some(to) if to.len() == from.len() => {
            to.copy_from_slice(from);
            Ok(())
        }
        _ => Err(damaged(call)),
    })
}

/// Runs code on all ranks' tensors and a result of their element.
macro_rules! each_rank {
    ($call:expr, $inputs:expr, $recv:expr, ($input:ident, $to:ident) => $body:expr) => {{
        let inputs = $inputs;
        each_dtype!(AnyRef, inputs[0].as_ref(), first => match $recv.of() {
            Some($to) => {
                // All are of one element: their lengths and the calls were compared.
                let $input = |rank: usize| inputs[rank].as_ref().of().unwrap_or(first);
                $body;
                Ok(())
            }
            None => Err(damaged($call)),
        })
    }};
}

/// Another end of the same group, which no rank's thread uses.
impl Watchdog for Link {
    fn lost_at_step(&self, call: &Call, step: ExternalStep) -> Option<Error> {
        Communicator::lost_at_step(self, call, step)
    }

    fn absent(&self, step: ExternalStep) -> Vec<usize> {
        self.behind(step)
    }

    fn give_up(&self, call: &Call, steps: &[ExternalStep], after: Duration) -> Error {
        Communicator::give_up(self, call, steps, after)
    }
}

impl Communicator<Cpu> for Link {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.members.len()
    }

    fn all_reduce(&self, call: &Call, op: ReduceOp, x: AnyMut<'_, Cpu>) -> Result<()> {
        let len = x.len();
        let inputs = self.collect(call, x.shared(), |_| len)?;
        each_rank!(call, inputs, x, (input, x) => combine::reduce(op, self.size(), input, x))
    }

    fn all_gather(
        &self,
        call: &Call,
        parts: &Shards,
        send: AnyRef<'_, Cpu>,
        recv: AnyMut<'_, Cpu>,
    ) -> Result<()> {
        let inputs = self.collect(call, send, |rank| parts.len(rank))?;
        each_rank!(call, inputs, recv, (input, recv) => combine::gather(parts, input, recv))
    }

    fn reduce_scatter(
        &self,
        call: &Call,
        op: ReduceOp,
        parts: &Shards,
        send: AnyRef<'_, Cpu>,
        recv: AnyMut<'_, Cpu>,
    ) -> Result<()> {
        let inputs = self.collect(call, send, |_| parts.total())?;
        each_rank!(call, inputs, recv, (input, recv) => {
            combine::reduce_part(op, parts, self.rank, input, recv)
        })
    }

    fn broadcast(&self, call: &Call, root: usize, x: AnyMut<'_, Cpu>) -> Result<()> {
        let own = if self.rank == root { to_bytes(x.shared()) } else { Vec::new() };
        let words = self.gather(call, &own, x.len().saturating_mul(x.dtype().size()))?;
        let data = HostVec::from_bytes(x.dtype(), &words[root]).ok_or_else(|| damaged(call))?;
        put(call, &data, x)
    }

    fn exchange(
        &self,
        call: &Call,
        send: Option<Outgoing<'_, Cpu>>,
        recv: Option<Incoming<'_, Cpu>>,
    ) -> Result<()> {
        if let Some(cause) = &*self.failed.borrow() {
            return Err(self.error(call, cause));
        }
        if let Some(send) = send {
            self.send(call, send)?;
        }
        recv.map_or(Ok(()), |recv| self.receive(call, recv))
    }

    fn barrier(&self, call: &Call) -> Result<()> {
        self.gather(call, &[], 0).map(drop)
    }

    fn obstacle(&self, call: &Call) -> Option<Error> {
        self.obstacle_if(call, |_, _| false)
    }

    fn reached_step(&self, step: ExternalStep) {
        self.wires.came(step.work, step.number + 1);
    }

    fn lost_at_step(&self, call: &Call, step: ExternalStep) -> Option<Error> {
        self.obstacle_if(call, |rank, came| step.needs(rank) && came(step.work) <= step.number)
    }

    fn give_up(&self, call: &Call, steps: &[ExternalStep], after: Duration) -> Error {
        let absent = steps.iter().flat_map(|step| self.behind(*step)).collect();
        // What was heard meanwhile says more.
        if let Some(error) = steps.iter().find_map(|step| Communicator::lost_at_step(self, call, *step)) {
            return error;
        }
        let missing = ExternalStep::missing(steps, absent, self.rank, self.size());
        self.late(call, missing, after)
    }

    fn watchdog(&self) -> Option<Box<dyn Watchdog>> {
        let (wires, members) = (Arc::clone(&self.wires), self.members.clone());
        Some(Box::new(Self::new(wires, self.group, self.name.clone(), members, self.rank)))
    }

    fn split(
        &self,
        call: &Call,
        color: Option<u64>,
        key: u64,
        name: &str,
    ) -> Result<Option<Box<dyn Communicator<Cpu>>>> {
        let round = self.rounds.get();
        let wish = [color.is_some() as u64, color.unwrap_or(0), key];
        let wish = from_words(wish);
        let wishes = self.gather(call, &wish, wish.len())?;
        let wishes: Vec<Vec<u64>> = wishes.iter().map(|words| Words(words).collect()).collect();
        let Some(color) = color else { return Ok(None) };
        let mut places: Vec<usize> =
            (0..wishes.len()).filter(|&rank| wishes[rank].get(..2) == Some(&[1, color])).collect();
        places.sort_by_key(|&rank| (wishes[rank].get(2).copied(), rank));
        let rank = places.iter().position(|&rank| rank == self.rank).ok_or_else(|| damaged(call))?;
        let members = places.into_iter().map(|rank| self.members[rank]).collect();
        let group = hash((self.group, round, color));
        let part = Self::new(Arc::clone(&self.wires), group, name.into(), members, rank);
        Ok(Some(Box::new(part)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{comm::Group, device::Cpu, launch::Env, shard::Partition, tensor::Tensor};

    /// Runs ranks that are processes, as far as they know.
    fn processes<R: Send>(world: usize, rank: impl Fn(Group<Cpu>) -> Result<R> + Sync) -> Vec<R> {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let run = |number: usize| {
            let numbers = [number, world, number, world, port as usize].map(|number| number.to_string());
            let names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SHARDWISE_PORT"];
            let value = |name: &str| Some(numbers[names.iter().position(|known| *known == name)?].clone());
            Env::of(value).unwrap().run(Duration::from_secs(60), &rank).unwrap()
        };
        std::thread::scope(|scope| {
            let started: Vec<_> = (0..world).map(|number| scope.spawn(move || run(number))).collect();
            started.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    /// In tests a message takes 1024 bytes.
    #[test]
    fn tensors_that_are_longer_than_a_message_go_in_several() {
        let len = 3 * MOST;
        let values = |rank: usize, len: usize| (0..len).map(|at| (at * 7 + rank) as f64).collect::<Vec<_>>();
        let sum = |at: usize| (0..3).map(|rank| (at * 7 + rank) as f64).sum::<f64>();
        processes(3, |group| {
            let (rank, device) = (group.rank(), group.device().clone());
            let mut x = Tensor::from_slice(&device, [len], &values(rank, len))?;
            group.all_reduce(ReduceOp::Sum, &mut x)?;
            assert_eq!(x.to_vec()?, (0..len).map(sum).collect::<Vec<_>>());

            // Some ranks have a piece less.
            let cut = Partition::from_sizes([1, MOST, 200]);
            let part = Tensor::from_slice(&device, [cut.size(rank)], &values(rank, cut.size(rank)))?;
            let whole = group.all_gather(&part, 0, &cut)?.to_vec()?;
            assert_eq!(whole, (0..3).flat_map(|rank| values(rank, cut.size(rank))).collect::<Vec<_>>());

            let x = Tensor::from_slice(&device, [cut.total()], &values(rank, cut.total()))?;
            let part = group.reduce_scatter(ReduceOp::Sum, &x, 0, &cut)?.to_vec()?;
            assert_eq!(part, cut.range(rank).map(sum).collect::<Vec<_>>());

            let mut x = Tensor::from_slice(&device, [len], &values(rank, len))?;
            group.broadcast(1, &mut x)?;
            assert_eq!(x.to_vec()?, values(1, len));

            let (to, from) = ((rank + 1) % 3, (rank + 2) % 3);
            for len in [0, 1, MOST / 8, MOST / 8 + 1, len] {
                let x = Tensor::from_slice(&device, [len], &values(rank, len))?;
                let y = group.exchange(Some((to, &x)), Some((from, x.shape())))?.unwrap();
                assert_eq!(y.to_vec()?, values(from, len));
            }
            Ok(())
        });
    }
}
