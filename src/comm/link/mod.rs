//! Ranks as processes, which communicate over the TCP connections of their rendezvous: see
//! [`crate::launch::Env`].

mod connections;
mod failure;
mod frame;
mod hub;
mod inbox;
mod messages;
#[cfg(feature = "tls")]
mod session;
mod socket;
mod wire;

pub(crate) use {
    connections::{Connections, LinkTerms},
    frame::Keyed,
    socket::{ConnectError, linger, lock, remaining},
    wire::Wire,
};

use super::{
    Call, Communicator, ExternalStep, Incoming, Liveness, Outgoing, ReduceOp, Shards,
    call::hash,
    cause::Cause,
    combine,
    host::{HostVec, to_bytes},
};
use crate::{
    device::{AnyMut, AnyRef, Cpu, each_dtype},
    error::{Error, LostReason, Mismatch, Result},
    security::{Channel, Policy, Roles},
};
use connections::Transport;
use frame::{Frame, Kind, Numbers, Strings, from_numbers};
use hub::WORLD;
use inbox::Inbox;
use std::{
    cell::{Cell, RefCell},
    sync::Arc,
    time::Duration,
};

/// The maximum number of tensor bytes in one frame of the link. Longer tensors take several frames.
const MAX_PAYLOAD: usize = if cfg!(test) { 1 << 10 } else { 1 << 27 };

/// How long a rank waits for a message before it reports its wait to rank 0. Rank 0 then searches
/// for wait cycles.
const REPORT_AFTER: Duration = Duration::from_millis(10);

/// One process's communicator of a group. All data passes through rank 0 of the world.
///
/// With an [`Identity`](crate::security::Identity) the connections use TLS 1.3.
///
/// It carries control data (descriptions of calls, NCCL's unique id, requests to split) and small
/// tensors. In a collective, each rank sends its input to rank 0, and rank 0 sends all inputs to
/// every rank; long inputs take several rounds. Use NCCL or MPI for bulk data. Each rank adds the
/// inputs in rank order, as thread ranks do. A started collective completes before its start
/// returns.
#[derive(Debug)]
pub struct Link {
    transport: Arc<Transport>,
    group: u64,
    name: String,
    /// The world ranks of the group.
    members: Vec<usize>,
    rank: usize,
    rounds: Cell<u64>,
    /// The group's failure; none while the group works.
    failed: RefCell<Option<Cause>>,
}

impl Link {
    /// Returns the communicator of all processes.
    pub(crate) fn world(connections: &Connections) -> Self {
        let transport = connections.transport();
        let (members, rank) = ((0..transport.world).collect(), transport.rank);
        Self::new(transport, WORLD, "world".into(), members, rank)
    }

    fn new(transport: Arc<Transport>, group: u64, name: String, members: Vec<usize>, rank: usize) -> Self {
        Self { transport, group, name, members, rank, rounds: Cell::new(0), failed: RefCell::new(None) }
    }

    /// Returns the group rank of a world rank.
    fn group_rank(&self, rank: usize) -> Option<usize> {
        self.members.iter().position(|member| *member == rank)
    }

    /// The frame that informs rank 0 that this rank no longer waits for a round.
    fn give_up_frame(&self, round: u64) -> Frame {
        let members = self.members.iter().map(|&rank| rank as u64);
        let body = from_numbers([nanoseconds(self.transport.deadline)].into_iter().chain(members));
        Frame::new(Kind::GiveUp, self.group, round, (0, 0), body)
    }

    /// Compares the ranks' calls and returns all ranks' bytes. No rank has more than `longest`
    /// bytes.
    fn gather(&self, call: &Call, bytes: &[u8], longest: usize) -> Result<Vec<Vec<u8>>> {
        let mut whole = vec![Vec::new(); self.members.len()];
        // Rank 0 sends the chunks of all ranks in one frame, so all chunks together have to fit
        // into [`MAX_PAYLOAD`].
        let chunk = (MAX_PAYLOAD / whole.len()).max(1);
        for begin in (0..longest.max(1)).step_by(chunk) {
            let end = bytes.len().min(begin + chunk);
            let received = self.round(call, bytes.get(begin..end).unwrap_or_default())?;
            for (whole, chunk) in whole.iter_mut().zip(received) {
                if whole.is_empty() {
                    *whole = chunk;
                } else {
                    whole.extend(chunk);
                }
            }
        }
        Ok(whole)
    }

    /// Sends one chunk of this rank's bytes and returns the chunks of all ranks.
    fn round(&self, call: &Call, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        if let Some(cause) = &*self.failed.borrow() {
            return Err(self.error(call, cause));
        }
        if self.members.len() == 1 {
            return Ok(vec![bytes.to_vec()]);
        }
        let round = self.rounds.get();
        self.rounds.set(round + 1);
        let mut input = Strings::default();
        let [sent, received] = call.messages;
        input.push(&call.fingerprint().to_le_bytes());
        input.push(&from_numbers([sent, received]));
        input.push(call.to_string().as_bytes());
        input.push(bytes);
        let group_rank = (self.rank, self.members.len());
        self.transport.send(Frame::new(Kind::Input, self.group, round, group_rank, input.0));
        let mut found = |inbox: &mut Inbox| {
            let complete = inbox.rounds.remove(&(self.group, round)).map(Ok);
            // A round does not fail if a rank is lost after it sent its input to that round.
            complete.or_else(|| self.cause(inbox, |_, _, rounds| rounds(self.group) <= round).map(Err))
        };
        let received = self.transport.wait(self.transport.deadline, &mut found).or_else(|| {
            self.transport.send(self.give_up_frame(round));
            self.transport.wait(self.transport.decision_timeout(), found)
        });
        let inputs = match received {
            Some(Ok(inputs)) => inputs,
            Some(Err(cause)) => return Err(self.fail(call, cause)),
            // Rank 0 has not answered the give-up frame either.
            None => {
                let after = self.transport.deadline;
                self.transport.accept(self.late_frame(&[0], after));
                let missing = self.group_rank(0).map(|rank| Cause::Deadline { missing: vec![rank], after });
                return Err(
                    self.fail(call, missing.unwrap_or(Cause::Relay { reason: LostReason::Disconnected }))
                );
            }
        };
        let inputs = Strings::all(&inputs).unwrap_or_default();
        let inputs: Option<Vec<_>> = inputs.into_iter().map(Strings::all).collect();
        let inputs = inputs.filter(|inputs| {
            inputs.len() == self.members.len() && inputs.iter().all(|input| input.len() == 4)
        });
        let inputs = inputs.ok_or_else(|| damaged(call))?;
        if let Some(right_rank) = inputs.iter().position(|input| input[0] != inputs[0][0]) {
            let text = |rank: usize| String::from_utf8_lossy(inputs[rank][2]).into_owned();
            let mismatch = Mismatch { left_rank: 0, left: text(0), right_rank, right: text(right_rank) };
            return Err(self.fail(call, Cause::Disagreement(Box::new(mismatch))));
        }
        let counts: Option<Vec<[u64; 2]>> =
            inputs.iter().map(|input| Numbers(input[1]).collect::<Vec<_>>().try_into().ok()).collect();
        let counts = counts.ok_or_else(|| damaged(call))?;
        if let Some(mismatch) = call.unreceived(counts.into_iter()) {
            return Err(self.fail(call, Cause::Disagreement(Box::new(mismatch))));
        }
        Ok(inputs.into_iter().map(|input| input[3].to_vec()).collect())
    }

    /// Returns all ranks' tensors. Rank `r`'s tensor has to have `len(r)` elements.
    fn collect(
        &self,
        call: &Call,
        data: AnyRef<'_, Cpu>,
        len: impl Fn(usize) -> usize,
    ) -> Result<Vec<HostVec>> {
        let longest =
            (0..self.members.len()).map(&len).max().unwrap_or(0).saturating_mul(data.dtype().size());
        let inputs = self.gather(call, &to_bytes(data), longest)?;
        let tensor = |(rank, bytes): (usize, Vec<u8>)| {
            let tensor = HostVec::from_bytes(data.dtype(), &bytes);
            tensor.filter(|tensor| tensor.as_ref().len() == len(rank)).ok_or_else(|| damaged(call))
        };
        inputs.into_iter().enumerate().map(tensor).collect()
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn damaged(call: &Call) -> Error {
    Error::invalid(call.op.name(), "a message of another rank is damaged: do all run the same program?")
}

/// to ← the elements of a message.
fn copy_to(call: &Call, from: &HostVec, to: AnyMut<'_, Cpu>) -> Result<()> {
    each_dtype!(AnyRef, from.as_ref(), from => match to.of() {
        Some(to) if to.len() == from.len() => {
            to.copy_from_slice(from);
            Ok(())
        }
        _ => Err(damaged(call)),
    })
}

/// Runs code on all ranks' tensors and on a result buffer of the same element type.
macro_rules! each_rank {
    ($call:expr, $inputs:expr, $recv:expr, ($input:ident, $to:ident) => $body:expr) => {{
        let inputs = $inputs;
        each_dtype!(AnyRef, inputs[0].as_ref(), first => match $recv.of() {
            Some($to) => {
                // The ranks' calls agree, so all tensors have the same element type.
                let $input = |rank: usize| inputs[rank].as_ref().of().unwrap_or(first);
                $body;
                Ok(())
            }
            None => Err(damaged($call)),
        })
    }};
}

/// A monitoring thread gets a second `Link` of the same rank and group.
impl Liveness for Link {
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

    fn channel(&self) -> Channel {
        self.transport.terms.channel
    }

    fn policy(&self) -> Policy {
        self.transport.terms.policy
    }

    fn roles(&self) -> Roles {
        let world = &self.transport.terms.roles;
        let members = world.of_members(&self.members);
        world.role(0).map_or(Roles::UNRESTRICTED, |relay| members.relayed(relay, self.members.contains(&0)))
    }

    fn all_reduce(&self, call: &Call, op: ReduceOp, x: AnyMut<'_, Cpu>) -> Result<()> {
        let len = x.len();
        let inputs = self.collect(call, x.shared(), |_| len)?;
        each_rank!(call, inputs, x, (input, x) => combine::reduce(op, self.size(), input, x))
    }

    fn all_gather(
        &self,
        call: &Call,
        shards: &Shards,
        send: AnyRef<'_, Cpu>,
        recv: AnyMut<'_, Cpu>,
    ) -> Result<()> {
        let inputs = self.collect(call, send, |rank| shards.len(rank))?;
        each_rank!(call, inputs, recv, (input, recv) => combine::gather(shards, input, recv))
    }

    fn reduce_scatter(
        &self,
        call: &Call,
        op: ReduceOp,
        shards: &Shards,
        send: AnyRef<'_, Cpu>,
        recv: AnyMut<'_, Cpu>,
    ) -> Result<()> {
        let inputs = self.collect(call, send, |_| shards.total())?;
        each_rank!(call, inputs, recv, (input, recv) => {
            combine::reduce_shard(op, shards, self.rank, input, recv)
        })
    }

    fn broadcast(&self, call: &Call, root: usize, x: AnyMut<'_, Cpu>) -> Result<()> {
        let own = if self.rank == root { to_bytes(x.shared()) } else { Vec::new() };
        let inputs = self.gather(call, &own, x.len().saturating_mul(x.dtype().size()))?;
        let data = HostVec::from_bytes(x.dtype(), &inputs[root]).ok_or_else(|| damaged(call))?;
        copy_to(call, &data, x)
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
        self.transport.record_steps(step.work, step.number + 1);
    }

    fn lost_at_step(&self, call: &Call, step: ExternalStep) -> Option<Error> {
        self.obstacle_if(call, |rank, came| step.needs(rank) && came(step.work) <= step.number)
    }

    fn give_up(&self, call: &Call, steps: &[ExternalStep], after: Duration) -> Error {
        let absent = steps.iter().flat_map(|step| self.behind(*step)).collect();
        // If another failure has arrived while this rank waited, returns that failure's error,
        // because it is the cause.
        if let Some(error) = steps.iter().find_map(|step| Communicator::lost_at_step(self, call, *step)) {
            return error;
        }
        let missing = ExternalStep::missing(steps, absent, self.rank, self.size());
        self.deadline_error(call, missing, after)
    }

    fn liveness(&self) -> Option<Box<dyn Liveness>> {
        let (transport, members) = (Arc::clone(&self.transport), self.members.clone());
        Some(Box::new(Self::new(transport, self.group, self.name.clone(), members, self.rank)))
    }

    fn split(
        &self,
        call: &Call,
        color: Option<u64>,
        key: u64,
        name: &str,
    ) -> Result<Option<Box<dyn Communicator<Cpu>>>> {
        let round = self.rounds.get();
        let request = [color.is_some() as u64, color.unwrap_or(0), key];
        let request = from_numbers(request);
        let requests = self.gather(call, &request, request.len())?;
        let requests: Vec<Vec<u64>> = requests.iter().map(|bytes| Numbers(bytes).collect()).collect();
        let Some(color) = color else { return Ok(None) };
        let mut ranks: Vec<usize> =
            (0..requests.len()).filter(|&rank| requests[rank].get(..2) == Some(&[1, color])).collect();
        ranks.sort_by_key(|&rank| (requests[rank].get(2).copied(), rank));
        let rank = ranks.iter().position(|&rank| rank == self.rank).ok_or_else(|| damaged(call))?;
        let members = ranks.into_iter().map(|rank| self.members[rank]).collect();
        let group = hash((self.group, round, color));
        let subgroup = Self::new(Arc::clone(&self.transport), group, name.into(), members, rank);
        Ok(Some(Box::new(subgroup)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{comm::Group, device::Cpu, launch::Env, shard::Partition, tensor::Tensor};

    /// Runs ranks as threads that connect over TCP like processes.
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

    /// In tests a frame carries at most 1024 bytes of a tensor.
    #[test]
    fn tensors_that_are_longer_than_a_message_go_in_several() {
        let len = 3 * MAX_PAYLOAD;
        let values = |rank: usize, len: usize| (0..len).map(|at| (at * 7 + rank) as f64).collect::<Vec<_>>();
        let sum = |at: usize| (0..3).map(|rank| (at * 7 + rank) as f64).sum::<f64>();
        processes(3, |group| {
            let (rank, device) = (group.rank(), group.device().clone());
            let mut x = Tensor::from_slice(&device, [len], &values(rank, len))?;
            group.all_reduce(ReduceOp::Sum, &mut x)?;
            assert_eq!(x.to_vec()?, (0..len).map(sum).collect::<Vec<_>>());

            // The shards need different numbers of chunks.
            let partition = Partition::from_sizes([1, MAX_PAYLOAD, 200]);
            let shard =
                Tensor::from_slice(&device, [partition.size(rank)], &values(rank, partition.size(rank)))?;
            let whole = group.all_gather(&shard, 0, &partition)?.to_vec()?;
            assert_eq!(whole, (0..3).flat_map(|rank| values(rank, partition.size(rank))).collect::<Vec<_>>());

            let x = Tensor::from_slice(&device, [partition.total()], &values(rank, partition.total()))?;
            let shard = group.reduce_scatter(ReduceOp::Sum, &x, 0, &partition)?.to_vec()?;
            assert_eq!(shard, partition.range(rank).map(sum).collect::<Vec<_>>());

            let mut x = Tensor::from_slice(&device, [len], &values(rank, len))?;
            group.broadcast(1, &mut x)?;
            assert_eq!(x.to_vec()?, values(1, len));

            let (to, from) = ((rank + 1) % 3, (rank + 2) % 3);
            for len in [0, 1, MAX_PAYLOAD / 8, MAX_PAYLOAD / 8 + 1, len] {
                let x = Tensor::from_slice(&device, [len], &values(rank, len))?;
                let y = group.exchange(Some((to, &x)), Some((from, x.shape())))?.unwrap();
                assert_eq!(y.to_vec()?, values(from, len));
            }
            Ok(())
        });
    }
}
