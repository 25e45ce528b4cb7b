//! Ranks as processes that an MPI library connects: [`crate::launch::Mpi`].
//!
//! MPI only moves bytes between two processes. The calls that send and receive these bytes never
//! block inside MPI (`engine.rs`). This module compares calls before it writes results, sums in
//! rank order, reports ranks that leave, and keeps deadlines.

mod engine;
mod flight;
mod members;
mod message;
mod raw;

use super::{
    Call, Collective, Communicator, InFlight, Incoming, Outgoing, ReduceOp, Shards, cause::Cause, each_pair,
    host::to_bytes,
};
use crate::{
    device::{AnyBuffer, AnyMut, AnyRef, Cpu, each_dtype},
    error::{Error, LostReason, Mismatch, Result},
    security::{Channel, Policy, Reach, Roles},
};
use ::mpi::{Threading, environment};
use engine::{Engine, MESSAGE};
use flight::{Flight, Task};
use members::Members;
use message::{Message, pack};
use std::{rc::Rc, time::Duration};

/// One process's communicator of a group over MPI. [`crate::launch::Mpi`] creates it.
///
/// The communicator carries tensors of any size and gives the same bits as thread ranks. Every rank
/// sends to every other rank, so groups should have at most a few dozen ranks.
///
/// * If ranks disagree, every rank gets [`Error::Mismatch`], and no rank gets a result.
/// * If a rank returns, fails or panics, every rank that still needs it gets [`Error::PeerLost`].
/// * If a process is killed or exits, the MPI launcher ends the job.
/// * If a process is stopped or does not arrive, the other ranks get [`Error::Deadline`], which
///   names the rank of that process. If data is in transit at that time, the job ends
///   (`MPI_Abort`), and stderr shows the text of the error.
/// * A started collective makes progress during any call of this process on any group, like MPI's
///   nonblocking collectives.
pub struct MpiComm {
    engine: Rc<Engine>,
    members: Rc<Members>,
}

/// MPI in this process, from its initialization to its finalization.
pub(crate) struct Universe {
    // Rust drops the fields in this order, so communication ends before MPI.
    world: MpiComm,
    _mpi: Option<environment::Universe>,
}

impl Universe {
    /// Initializes MPI, unless the program has done so. Every process passes the same
    /// `message_limit`, in bytes. `one_machine` decides whether a job of several ranks, of
    /// that number, is on one machine.
    pub(crate) fn start(
        deadline: Duration,
        message_limit: usize,
        policy: Policy,
        one_machine: impl FnOnce(usize) -> bool,
    ) -> Result<Self> {
        const OP: &str = "launch";
        if environment::is_finalized() {
            return Err(Error::invalid(OP, "MPI was finalized in this process, and cannot start again"));
        }
        let mpi = environment::initialize_with_threading(Threading::Funneled).map(|(universe, _)| universe);
        let mut engine = Engine::new(deadline, message_limit.div_ceil(8));
        if engine.size() == 1 || one_machine(engine.size()) {
            engine.channel = Channel::plaintext(Reach::Machine);
        }
        engine.policy = policy;
        let engine = Rc::new(engine);
        let (rank, ranks) = (engine.rank(), (0..engine.size()).collect());
        let members = Members::new(&engine, "world".into(), ranks, rank, 0);
        Ok(Self { world: MpiComm { engine, members }, _mpi: mpi })
    }

    /// Returns a communicator of all processes.
    pub(crate) fn world(&self) -> MpiComm {
        MpiComm { engine: Rc::clone(&self.world.engine), members: Rc::clone(&self.world.members) }
    }

    /// Leaves all groups. Finalizes MPI after all ranks have left. If some ranks do not leave, ends
    /// the job and prints `error`, or, without an `error`, one that names these ranks. Returns the
    /// error of a message that this rank never received, if there is one.
    pub(crate) fn end(self, loss: LostReason, error: Option<&Error>) -> Option<Error> {
        // After a deadline this rank has already waited for the missing ranks. It waits only a
        // moment more, so that the other ranks can report.
        let known = matches!(error, Some(Error::Deadline { .. }));
        let patience = known.then_some(Duration::from_millis(50));
        let MpiComm { engine, members } = &self.world;
        let staying = || (0..engine.size()).filter(|&rank| !members.has_left(engine, rank)).collect();
        let Err(staying) = engine.leave(staying, loss, patience) else { return engine.unread() };
        let missing =
            Error::invalid("leave", format!("ranks {staying:?} did not leave within {:?}", engine.deadline));
        engine.abort(error.unwrap_or(&missing));
    }
}

impl MpiComm {
    fn run<T: crate::device::Element + bytemuck::Pod>(
        &self,
        call: &Call,
        task: Task,
        own: Vec<T>,
        to: &mut [T],
    ) -> Result<()> {
        Flight::start(&self.engine, &self.members, call, task, own.into(), to.len())?.wait(&self.engine, to)
    }

    fn send(&self, call: &Call, send: &Outgoing<'_, Cpu>) -> Result<()> {
        if let Some(cause) = self.members.obstacle(&self.engine, &[send.to]) {
            return Err(self.members.fail(&self.engine, call, cause));
        }
        let what = format!("{} {}", send.data.dtype(), send.shape);
        let site = call.site.to_string();
        let message = pack(&[what.as_bytes(), site.as_bytes(), &to_bytes(send.data)]);
        self.members.send(&self.engine, send.to, MESSAGE, &message);
        Ok(())
    }

    fn receive(&self, call: &Call, recv: Incoming<'_, Cpu>) -> Result<()> {
        let (engine, members) = (&self.engine, &self.members);
        let message = engine.wait(
            || None,
            || {
                let message = members.take(engine, recv.from, MESSAGE).map(Ok);
                message.or_else(|| members.obstacle(engine, &[recv.from]).map(Err))
            },
        );
        let message: Message = match message {
            Some(Ok(message)) => message,
            Some(Err(cause)) => return Err(members.fail(engine, call, cause)),
            None => {
                let cause = Cause::Deadline { missing: vec![recv.from], after: engine.deadline };
                return Err(members.fail(engine, call, cause));
            }
        };
        let (sent, expected) =
            (message.text(0).unwrap_or_default(), format!("{} {}", recv.data.dtype(), recv.shape));
        if sent != expected {
            let mismatch = Mismatch {
                left_rank: recv.from,
                left: format!("exchange, sending {sent} at {}", message.text(1).unwrap_or_default()),
                right_rank: members.rank,
                right: format!("exchange, expecting {expected} at {}", call.site),
            };
            members.send_disagreement(engine, &mismatch);
            return Err(members.fail(engine, call, Cause::Disagreement(Box::new(mismatch))));
        }
        each_dtype!(AnyMut, recv.data, to => match message.data(2) {
            Some(data) if data.len() == to.len() => {
                to.copy_from_slice(data);
                Ok(())
            }
            _ => Err(Error::invalid("exchange", "a message of another rank is damaged: do all run the same program?")),
        })
    }
}

impl Communicator<Cpu> for MpiComm {
    fn rank(&self) -> usize {
        self.members.rank
    }

    fn size(&self) -> usize {
        self.members.size()
    }

    fn channel(&self) -> Channel {
        self.engine.channel
    }

    fn policy(&self) -> Policy {
        self.engine.policy
    }

    /// MPI authenticates no rank.
    fn roles(&self) -> Roles {
        Roles::UNRESTRICTED
    }

    fn all_reduce(&self, call: &Call, op: ReduceOp, x: AnyMut<'_, Cpu>) -> Result<()> {
        each_dtype!(AnyMut, x, x => self.run(call, Task::AllReduce(op), x.to_vec(), x))
    }

    fn all_gather(
        &self,
        call: &Call,
        shards: &Shards,
        send: AnyRef<'_, Cpu>,
        recv: AnyMut<'_, Cpu>,
    ) -> Result<()> {
        each_pair!(send, recv, (send, recv) => self.run(call, Task::AllGather(shards.clone()), send.to_vec(), recv))
    }

    fn reduce_scatter(
        &self,
        call: &Call,
        op: ReduceOp,
        shards: &Shards,
        send: AnyRef<'_, Cpu>,
        recv: AnyMut<'_, Cpu>,
    ) -> Result<()> {
        each_pair!(send, recv, (send, recv) => {
            self.run(call, Task::ReduceScatter(op, shards.clone()), send.to_vec(), recv)
        })
    }

    fn broadcast(&self, call: &Call, root: usize, x: AnyMut<'_, Cpu>) -> Result<()> {
        each_dtype!(AnyMut, x, x => {
            let own = if self.rank() == root { x.to_vec() } else { Vec::new() };
            self.run(call, Task::Broadcast(root), own, x)
        })
    }

    fn exchange(
        &self,
        call: &Call,
        send: Option<Outgoing<'_, Cpu>>,
        recv: Option<Incoming<'_, Cpu>>,
    ) -> Result<()> {
        if let Some(send) = &send {
            self.send(call, send)?;
        }
        recv.map_or(Ok(()), |recv| self.receive(call, recv))
    }

    fn barrier(&self, call: &Call) -> Result<()> {
        self.run::<f32>(call, Task::Barrier, Vec::new(), &mut [])
    }

    fn obstacle(&self, call: &Call) -> Option<Error> {
        let cause = self.members.obstacle(&self.engine, &[])?;
        Some(self.members.fail(&self.engine, call, cause))
    }

    fn split(
        &self,
        call: &Call,
        color: Option<u64>,
        key: u64,
        name: &str,
    ) -> Result<Option<Box<dyn Communicator<Cpu>>>> {
        let (used, all) = self.engine.blocks();
        let request = [color.is_some() as u64, color.unwrap_or(0), key, used];
        // The requests travel as bits of f64 values, because an all-gather copies bits unchanged.
        let partition = crate::shard::Partition::even(4 * self.size(), self.size());
        let mut requests = vec![0.0_f64; 4 * self.size()];
        let task = Task::AllGather(Shards { rows: 1, partition });
        self.run(call, task, request.map(f64::from_bits).to_vec(), &mut requests)?;
        let requests: Vec<[u64; 4]> =
            requests.as_chunks().0.iter().map(|request: &[f64; 4]| request.map(f64::to_bits)).collect();
        // The first tag block that is new to every rank. Groups of one split share no rank, so they
        // can share the block.
        let block = requests.iter().map(|request| request[3]).max().unwrap_or(used);
        if block >= all {
            let limit = format!("this MPI library has tags for {all} groups, and all have been used");
            return Err(Error::invalid("split", limit));
        }
        let Some(color) = color else { return Ok(None) };
        let mut ranks: Vec<usize> =
            (0..self.size()).filter(|&rank| requests[rank][..2] == [1, color]).collect();
        ranks.sort_by_key(|&rank| (requests[rank][2], rank));
        let rank = ranks.iter().position(|&rank| rank == self.rank()).unwrap_or_default();
        let ranks = ranks.into_iter().map(|rank| self.members.ranks[rank]).collect();
        let members = Members::new(&self.engine, name.into(), ranks, rank, block);
        Ok(Some(Box::new(Self { engine: Rc::clone(&self.engine), members })))
    }

    fn start(
        &self,
        call: &Call,
        collective: Collective,
        send: AnyBuffer<Cpu>,
        recv: AnyBuffer<Cpu>,
    ) -> Result<Box<dyn InFlight<Cpu>>> {
        let task = match collective {
            Collective::AllReduce(op) => Task::AllReduce(op),
            Collective::AllGather(shards) => Task::AllGather(shards),
            Collective::ReduceScatter(op, shards) => Task::ReduceScatter(op, shards),
        };
        let len = recv.as_ref().len();
        let engine = Rc::clone(&self.engine);
        each_dtype!(AnyBuffer, send, send => {
            let flight = Flight::start(&engine, &self.members, call, task, send.lend(), len)?;
            Ok(Box::new(Started { flight, engine, recv }))
        })
    }
}

/// A started collective.
struct Started<T> {
    flight: Rc<Flight<T>>,
    engine: Rc<Engine>,
    recv: AnyBuffer<Cpu>,
}

impl<T: crate::device::Element + bytemuck::Pod> InFlight<Cpu> for Started<T> {
    fn wait(mut self: Box<Self>) -> Result<AnyBuffer<Cpu>> {
        match self.recv.as_mut().of::<T>() {
            Some(to) => self.flight.wait(&self.engine, to)?,
            None => return Err(Error::invalid("wait", "send and receive have different elements")),
        }
        Ok(self.recv)
    }
}
