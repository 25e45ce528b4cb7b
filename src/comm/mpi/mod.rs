//! Ranks that are processes which an MPI library connects: [`crate::launch::Mpi`].
//!
//! MPI moves bytes between two processes; everything else is made here of messages that nobody waits for inside of MPI
//! (`post.rs`): the comparison of calls before data moves, sums in rank order, the news of a rank that leaves, and deadlines.

mod flight;
mod members;
mod message;
mod post;
mod raw;

use super::{
    Call, Collective, Communicator, InFlight, Incoming, Outgoing, ReduceOp, Shards, cause::Cause, each_pair,
    host::to_bytes,
};
use crate::{
    device::{AnyBuffer, AnyMut, AnyRef, Cpu, each_dtype},
    error::{Error, LostReason, Mismatch, Result},
};
use ::mpi::{Threading, environment};
use flight::{Flight, Task};
use members::Members;
use message::{Message, pack};
use post::{LETTER, Post};
use std::{rc::Rc, time::Duration};

/// One process's end of a group that MPI connects. Made by [`crate::launch::Mpi`].
///
/// It carries tensors of any size, and gives the bits that thread ranks give. Every rank sends to every other: it is made for
/// groups of up to some dozens of ranks.
///
/// * A *disagreement* is [`Error::Mismatch`] on every rank, before data moves.
/// * A rank that returns, fails or panics is [`Error::PeerLost`] on every rank that still needs it.
/// * A process that is killed or exits has its job ended by the MPI launcher.
/// * A process that is stopped, or does not come: [`Error::Deadline`] names it, if data is not yet under way; otherwise the
///   deadline ends the job (`MPI_Abort`) with the same words on stderr.
/// * A collective that is started goes on whenever this process makes any call of any group, as MPI's own.
pub struct MpiComm {
    post: Rc<Post>,
    members: Rc<Members>,
}

/// MPI, from its start to its end.
pub(crate) struct Universe {
    // Dropped in this order: what is sent over MPI ends before it.
    world: MpiComm,
    _mpi: Option<environment::Universe>,
}

impl Universe {
    /// Starts MPI, if this program has not. Every process calls it, with the same `piece`.
    pub(crate) fn start(deadline: Duration, piece: usize) -> Result<Self> {
        const OP: &str = "launch";
        if environment::is_finalized() {
            return Err(Error::invalid(OP, "MPI has ended already in this process, and starts only once"));
        }
        let mpi = environment::initialize_with_threading(Threading::Funneled).map(|(universe, _)| universe);
        let post = Rc::new(Post::new(deadline, piece.div_ceil(8)));
        let (rank, ranks) = (post.rank(), (0..post.size()).collect());
        let members = Members::new(&post, "world".into(), ranks, rank, 0);
        Ok(Self { world: MpiComm { post, members }, _mpi: mpi })
    }

    /// An end of the group of all processes.
    pub(crate) fn world(&self) -> MpiComm {
        MpiComm { post: Rc::clone(&self.world.post), members: Rc::clone(&self.world.members) }
    }

    /// Leaves all groups, and ends MPI when all ranks have. If they do not, ends the job: `error` is why, if that is known.
    /// Returns the error of a message that this rank has never received.
    pub(crate) fn end(self, loss: LostReason, error: Option<&Error>) -> Option<Error> {
        // Who is known to be missing is not waited for once more; the others have a moment to say what they know.
        let known = matches!(error, Some(Error::Deadline { .. }));
        let patience = known.then_some(Duration::from_millis(50));
        let MpiComm { post, members } = &self.world;
        let Err(staying) = post.leave(members, loss, patience) else { return post.unread() };
        let missing =
            Error::invalid("leave", format!("ranks {staying:?} did not leave within {:?}", post.deadline));
        post.abort(error.unwrap_or(&missing));
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
        Flight::start(&self.post, &self.members, call, task, own.into(), to.len())?.wait(&self.post, to)
    }

    fn send(&self, call: &Call, send: &Outgoing<'_, Cpu>) -> Result<()> {
        if let Some(cause) = self.members.obstacle(&self.post, &[send.to]) {
            return Err(self.members.fail(&self.post, call, cause));
        }
        let what = format!("{} {}", send.data.dtype(), send.shape);
        let site = call.site.to_string();
        let words = pack(&[what.as_bytes(), site.as_bytes(), &to_bytes(send.data)]);
        self.members.send(&self.post, send.to, LETTER, &words);
        Ok(())
    }

    fn receive(&self, call: &Call, recv: Incoming<'_, Cpu>) -> Result<()> {
        let (post, members) = (&self.post, &self.members);
        let letter = post.wait(
            || None,
            || {
                let letter = members.take(post, recv.from, LETTER).map(Ok);
                letter.or_else(|| members.obstacle(post, &[recv.from]).map(Err))
            },
        );
        let letter: Message = match letter {
            Some(Ok(letter)) => letter,
            Some(Err(cause)) => return Err(members.fail(post, call, cause)),
            None => {
                let cause = Cause::Deadline { missing: vec![recv.from], after: post.deadline };
                return Err(members.fail(post, call, cause));
            }
        };
        let (sent, expected) =
            (letter.text(0).unwrap_or_default(), format!("{} {}", recv.data.dtype(), recv.shape));
        if sent != expected {
            let mismatch = Mismatch {
                left_rank: recv.from,
                left: format!("exchange, sending {sent} at {}", letter.text(1).unwrap_or_default()),
                right_rank: members.rank,
                right: format!("exchange, expecting {expected} at {}", call.site),
            };
            members.breach(post, &mismatch);
            return Err(members.fail(post, call, Cause::Disagreement(Box::new(mismatch))));
        }
        each_dtype!(AnyMut, recv.data, to => match letter.data(2) {
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

    fn all_reduce(&self, call: &Call, op: ReduceOp, x: AnyMut<'_, Cpu>) -> Result<()> {
        each_dtype!(AnyMut, x, x => self.run(call, Task::AllReduce(op), x.to_vec(), x))
    }

    fn all_gather(
        &self,
        call: &Call,
        parts: &Shards,
        send: AnyRef<'_, Cpu>,
        recv: AnyMut<'_, Cpu>,
    ) -> Result<()> {
        each_pair!(send, recv, (send, recv) => self.run(call, Task::AllGather(parts.clone()), send.to_vec(), recv))
    }

    fn reduce_scatter(
        &self,
        call: &Call,
        op: ReduceOp,
        parts: &Shards,
        send: AnyRef<'_, Cpu>,
        recv: AnyMut<'_, Cpu>,
    ) -> Result<()> {
        each_pair!(send, recv, (send, recv) => {
            self.run(call, Task::ReduceScatter(op, parts.clone()), send.to_vec(), recv)
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
        let cause = self.members.obstacle(&self.post, &[])?;
        Some(self.members.fail(&self.post, call, cause))
    }

    fn split(
        &self,
        call: &Call,
        color: Option<u64>,
        key: u64,
        name: &str,
    ) -> Result<Option<Box<dyn Communicator<Cpu>>>> {
        let (used, all) = self.post.blocks();
        let wish = [color.is_some() as u64, color.unwrap_or(0), key, used];
        // The numbers travel as bits of f64, which nobody computes with.
        let cut = crate::shard::Partition::even(4 * self.size(), self.size());
        let mut wishes = vec![0.0_f64; 4 * self.size()];
        let task = Task::AllGather(Shards { rows: 1, partition: cut });
        self.run(call, task, wish.map(f64::from_bits).to_vec(), &mut wishes)?;
        let wishes: Vec<[u64; 4]> =
            wishes.as_chunks().0.iter().map(|wish: &[f64; 4]| wish.map(f64::to_bits)).collect();
        // A block that is new to every rank: parts of one split have no rank in common, and may share it.
        let block = wishes.iter().map(|wish| wish[3]).max().unwrap_or(used);
        if block >= all {
            let limit = format!("this MPI library has tags for {all} groups, and all are in use");
            return Err(Error::invalid("split", limit));
        }
        let Some(color) = color else { return Ok(None) };
        let mut places: Vec<usize> =
            (0..self.size()).filter(|&rank| wishes[rank][..2] == [1, color]).collect();
        places.sort_by_key(|&rank| (wishes[rank][2], rank));
        let rank = places.iter().position(|&rank| rank == self.rank()).unwrap_or_default();
        let ranks = places.into_iter().map(|rank| self.members.ranks[rank]).collect();
        let members = Members::new(&self.post, name.into(), ranks, rank, block);
        Ok(Some(Box::new(Self { post: Rc::clone(&self.post), members })))
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
            Collective::AllGather(parts) => Task::AllGather(parts),
            Collective::ReduceScatter(op, parts) => Task::ReduceScatter(op, parts),
        };
        let len = recv.as_ref().len();
        let post = Rc::clone(&self.post);
        each_dtype!(AnyBuffer, send, send => {
            let flight = Flight::start(&post, &self.members, call, task, send.lend(), len)?;
            Ok(Box::new(Started { flight, post, recv }))
        })
    }
}

/// A collective under way.
struct Started<T> {
    flight: Rc<Flight<T>>,
    post: Rc<Post>,
    recv: AnyBuffer<Cpu>,
}

impl<T: crate::device::Element + bytemuck::Pod> InFlight<Cpu> for Started<T> {
    fn wait(mut self: Box<Self>) -> Result<AnyBuffer<Cpu>> {
        match self.recv.as_mut().of::<T>() {
            Some(to) => self.flight.wait(&self.post, to)?,
            None => return Err(Error::invalid("wait", "send and receive have different elements")),
        }
        Ok(self.recv)
    }
}
