//! A group of ranks: its construction, identity and sub-groups.

use super::{Call, Communicator, HostStaged, Op, Overlap, Planned, Recorded, Shards, Solo, TransferLog};
use crate::{
    device::{Cpu, DType, Device, Element, Meta},
    error::{Error, Result, Site, same_size},
    security::audit::{self, Event},
    shard::{Partition, Reduction, Shape},
    tensor::Tensor,
    trace,
};
use std::{
    cell::Cell,
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    rc::Rc,
};

/// A group of ranks, as seen by one of them.
///
/// All ranks of the group call its collectives in the same order with the same arguments. Otherwise
/// every rank gets an error. ([`Group::exchange`] needs only the sender and the receiver; getters
/// and settings need no other rank.) A group belongs to the thread of its rank and is not `Send`:
///
/// ```compile_fail
/// # use shardwise::comm::Group;
/// fn leaves_its_rank(group: Group) {
///     // error: `Rc<…>` cannot be sent between threads safely
///     std::thread::spawn(move || group.barrier());
/// }
/// ```
pub struct Group<B: Device> {
    shared: Rc<Shared<B>>,
    pub(super) reduction: Reduction,
    pub(super) overlap: Overlap,
}

struct Shared<B: Device> {
    communicator: Rc<dyn Communicator<B>>,
    device: B,
    identity: Rc<Identity>,
}

/// The state that all handles of one group share, even if they use different communicators.
struct Identity {
    name: String,
    id: u64,
    /// The sequence number of the next call.
    calls: Cell<u64>,
    /// The numbers of messages that this rank has sent and received.
    messages: Cell<[u64; 2]>,
}

impl Identity {
    fn new(name: String, id: u64) -> Rc<Self> {
        Rc::new(Self { name, id, calls: Cell::new(0), messages: Cell::new([0; 2]) })
    }
}

impl<B: Device> Clone for Group<B> {
    fn clone(&self) -> Self {
        Self { shared: Rc::clone(&self.shared), ..*self }
    }
}

impl<B: Device> fmt::Debug for Group<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Group(`{}`, rank {} of {})", self.name(), self.rank(), self.size())
    }
}

impl<B: Device> Group<B> {
    /// Returns the group `world` over a communicator. The group allocates its results on `device`.
    pub fn new(communicator: Rc<dyn Communicator<B>>, device: &B) -> Self {
        Self::of(communicator, device, Identity::new("world".into(), 0))
    }

    fn of(communicator: Rc<dyn Communicator<B>>, device: &B, identity: Rc<Identity>) -> Self {
        let (rank, size) = (communicator.rank(), communicator.size());
        trace::join(identity.id, &identity.name, rank, size, communicator.channel().to_string());
        let shared = Shared { communicator, device: device.clone(), identity };
        Self { shared: Rc::new(shared), reduction: Reduction::Fast, overlap: Overlap::Off }
    }

    /// Copies `other`'s reduction and overlap settings.
    fn with_settings_of<C: Device>(self, other: &Group<C>) -> Self {
        Self { reduction: other.reduction, overlap: other.overlap, ..self }
    }

    /// A group of one rank.
    ///
    /// ```
    /// use shardwise::prelude::*;
    /// let world = Group::solo(&Cpu::new());
    /// let mut x = Tensor::<f32>::full(world.device(), [2], 3.0)?;
    /// world.all_reduce(ReduceOp::Sum, &mut x)?;
    /// assert_eq!((world.size(), x.to_vec()?), (1, vec![3.0; 2]));
    /// # Ok::<(), shardwise::Error>(())
    /// ```
    pub fn solo(device: &B) -> Self {
        Self::new(Rc::new(Solo::new(device)), device)
    }

    /// Returns another handle of this group, and a log of the transfers that this rank makes
    /// through that handle. Call it on every rank.
    pub fn recorded(&self) -> (Self, TransferLog) {
        let (communicator, record) = Recorded::new(Rc::clone(&self.shared.communicator));
        let group = Self::of(Rc::new(communicator), self.device(), Rc::clone(&self.shared.identity));
        (group.with_settings_of(self), record)
    }

    /// The transport of this group. To wrap it in another communicator, pass the wrapper to
    /// [`Group::new`].
    pub fn communicator(&self) -> Rc<dyn Communicator<B>> {
        Rc::clone(&self.shared.communicator)
    }

    /// The index of this rank in the group.
    pub fn rank(&self) -> usize {
        self.shared.communicator.rank()
    }

    /// The number of ranks.
    pub fn size(&self) -> usize {
        self.shared.communicator.size()
    }

    /// The device of this rank's tensors.
    pub fn device(&self) -> &B {
        &self.shared.device
    }

    /// The name of the group: `world`, or the path of splits from it, such as `world/dp0`.
    pub fn name(&self) -> &str {
        &self.shared.identity.name
    }

    /// Whether two handles denote the same group. Their reduction, overlap and recording may
    /// differ. All one-rank groups of a rank count as the same group.
    pub fn is_same(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.shared.identity, &other.shared.identity) || (self.size() == 1 && other.size() == 1)
    }

    /// Returns a call with the group's next sequence number, and advances that number.
    #[track_caller]
    pub(super) fn next_call(&self, op: Op) -> Call {
        let calls = &self.shared.identity.calls;
        self.call_at(op, calls.replace(calls.get() + 1))
    }

    /// Returns a call with the group's next sequence number, without advancing that number.
    #[track_caller]
    pub(super) fn call_between(&self, op: Op) -> Call {
        self.call_at(op, self.shared.identity.calls.get())
    }

    #[track_caller]
    fn call_at(&self, op: Op, seq: u64) -> Call {
        Call {
            seq,
            op,
            started: false,
            reduce: None,
            root: None,
            dtype: None,
            shape: Shape::new(&[]),
            partition: 0,
            history: 0,
            group: self.shared.identity.id,
            messages: self.shared.identity.messages.get(),
            site: Site::here(),
        }
    }

    #[track_caller]
    pub(super) fn data_call(&self, op: Op, dtype: DType, shape: Shape) -> Call {
        Call { dtype: Some(dtype), shape, ..self.next_call(op) }
    }

    /// The transport, borrowed.
    pub(super) fn transport(&self) -> &dyn Communicator<B> {
        &*self.shared.communicator
    }

    /// Returns [`Error::NotPermitted`] if x is a weight, and a receiver may not see the weights of
    /// other ranks.
    pub(super) fn admit<T: Element>(
        &self,
        op: Op,
        x: &Tensor<T, B>,
        receivers: impl IntoIterator<Item = usize>,
    ) -> Result<()> {
        if !x.is_weight() || self.size() == 1 {
            return Ok(());
        }
        let admitted = self.transport().roles().admit(op.name(), self.name(), receivers);
        self.log_gather(op.name(), &admitted, |event, ()| event.text("shape", x.shape()))?;
        admitted
    }

    /// Returns [`Error::NotPermitted`] if a weight that every rank of the group holds would pass
    /// through a rank that holds another one.
    pub(super) fn admit_replica(&self, op: Op) -> Result<()> {
        if self.size() == 1 {
            return Ok(());
        }
        let admitted = self.transport().roles().admit_replicas(op.name());
        // Replicas may be sent in every step, and no rank sees another weight than its own.
        if admitted.is_err() {
            self.log_gather(op.name(), &admitted, |event, ()| event)?;
        }
        admitted
    }

    /// Returns the first rank that may see the weights of the others, to which they can send
    /// theirs. It is the same on every rank.
    pub(crate) fn receiver_of_weights(&self, op: &'static str) -> Result<usize> {
        let receiver = self.transport().roles().receiver(op, self.name(), self.size());
        self.log_gather(op, &receiver, |event, &rank| event.number("receiver", rank as u64).durable())?;
        receiver
    }

    /// Writes to the audit log whether weights may be sent, before they are.
    fn log_gather<R>(
        &self,
        op: &'static str,
        outcome: &Result<R>,
        describe: impl FnOnce(Event, &R) -> Event,
    ) -> Result<()> {
        let Some(log) = audit::current() else { return Ok(()) };
        let event = |name: &str| Event::new(name).text("op", op).text("group", self.name());
        log.write(&match outcome {
            Ok(value) => describe(event("gather"), value),
            Err(error) => event("deny").text("error", error).durable(),
        })
    }

    /// As [`Group::admit`], for a collective whose results every rank receives.
    pub(super) fn admit_all<T: Element>(&self, op: Op, x: &Tensor<T, B>) -> Result<()> {
        self.admit(op, x, 0..self.size())
    }

    /// Adds to the numbers of messages that this rank has sent and received.
    pub(super) fn count_messages(&self, [sent, received]: [u64; 2]) {
        let messages = &self.shared.identity.messages;
        let [sent_before, received_before] = messages.get();
        messages.set([sent_before + sent, received_before + received]);
    }

    /// Runs a call and records it: see [`trace`].
    pub(super) fn run<R>(
        &self,
        call: &Call,
        act: impl FnOnce(&dyn Communicator<B>) -> Result<R>,
    ) -> Result<R> {
        let ticket = trace::enter(call.operation());
        let span = tracing::debug_span!(
            target: "shardwise", "collective",
            group = self.name(), rank = self.rank(), %call
        );
        let result = span.in_scope(|| act(self.transport()));
        trace::leave(ticket, result.as_ref().err());
        result
    }

    /// Checks that `partition` fits the group and the dimension. Returns the tensor's shards along
    /// `dim`.
    pub(super) fn shards(
        &self,
        op: &'static str,
        shape: Shape,
        dim: usize,
        partition: &Partition,
    ) -> Result<Shards> {
        if dim >= shape.rank() {
            return Err(Error::invalid(op, format!("dimension {dim} of a tensor of shape {shape}")));
        }
        same_size(op, "the number of shards", partition.shards(), "the number of ranks", self.size())?;
        same_size(
            op,
            "the size of the partition",
            partition.total(),
            "that of the dimension",
            shape.dims()[dim],
        )?;
        // After this check, no product of the shards' sizes saturates.
        shape.checked_len(op)?;
        Ok(Shards::along(shape, dim, partition))
    }

    /// Waits until every rank has called `barrier`.
    ///
    /// # Errors
    /// When a rank calls something else, or is lost.
    #[track_caller]
    pub fn barrier(&self) -> Result<()> {
        let call = self.next_call(Op::Barrier);
        self.run(&call, |communicator| communicator.barrier(&call))
    }

    /// Splits the group: the ranks of one `color` form a new group, ordered by `key` and then by
    /// rank. Returns none on ranks without a color.
    ///
    /// # Errors
    /// When a rank calls something else, or is lost.
    #[track_caller]
    pub fn split(&self, color: Option<u64>, key: u64) -> Result<Option<Self>> {
        self.split_named(color, key, &color.unwrap_or_default().to_string())
    }

    /// Like [`Group::split`]. The new group is named `<this group's name>/<suffix>`.
    #[track_caller]
    pub(super) fn split_named(&self, color: Option<u64>, key: u64, suffix: &str) -> Result<Option<Self>> {
        let (call, name) = (self.next_call(Op::Split), format!("{}/{suffix}", self.name()));
        let split = self.run(&call, |communicator| communicator.split(&call, color, key, &name))?;
        Ok(split.map(|communicator| {
            let mut id = DefaultHasher::new();
            (self.shared.identity.id, call.seq, color.unwrap_or_default()).hash(&mut id);
            let identity = Identity::new(name, id.finish());
            Self::of(communicator.into(), self.device(), identity).with_settings_of(self)
        }))
    }

    /// Splits the group into one sub-group per color. Every rank has a color, and ranks keep their
    /// order.
    ///
    /// # Errors
    /// When a rank calls something else, or is lost.
    #[track_caller]
    pub fn split_all(&self, color: u64) -> Result<Self> {
        self.split_all_named(color, &color.to_string())
    }

    #[track_caller]
    pub(super) fn split_all_named(&self, color: u64, suffix: &str) -> Result<Self> {
        let group = self.split_named(Some(color), 0, suffix)?;
        group.ok_or_else(|| Error::invalid("split", "the communicator returned no group for a color"))
    }

    /// Returns an error when the group has no rank `rank`.
    pub(super) fn check_rank(&self, op: &'static str, rank: usize) -> Result<()> {
        if rank < self.size() {
            return Ok(());
        }
        Err(Error::invalid(op, format!("rank {rank} of a group of {}", self.size())))
    }
}

impl Group<Cpu> {
    /// Returns this group for tensors on `device`. Its collectives copy tensors through the host:
    /// see [`HostStaged`]. Call it on every rank.
    ///
    /// ```
    /// use shardwise::{Tensor, comm::ReduceOp, device::Cpu, launch};
    /// launch::threads(2, |world| {
    ///     let device = Cpu::new(); // or a handle of a GPU that all thread ranks share
    ///     let world = world.staged(&device);
    ///     let mut x = Tensor::<f32>::full(&device, [3], 1.0)?;
    ///     world.all_reduce(ReduceOp::Sum, &mut x)?;
    ///     assert_eq!(x.to_vec()?, [2.0; 3]);
    ///     Ok(())
    /// })?;
    /// # Ok::<(), shardwise::Error>(())
    /// ```
    pub fn staged<B: Device>(&self, device: &B) -> Group<B> {
        let communicator = HostStaged::new(self.communicator(), device);
        self.carried(Rc::new(communicator), device)
    }

    /// Returns a call for a split that the caller performs with another communicator (NCCL), and
    /// advances the group's sequence number.
    #[cfg(feature = "nccl")]
    #[track_caller]
    pub(super) fn split_call(&self) -> Call {
        self.next_call(Op::Split)
    }

    /// Returns a handle of this group over another communicator of the same ranks. Both handles
    /// share the sequence numbers.
    pub(super) fn carried<B: Device>(&self, communicator: Rc<dyn Communicator<B>>, device: &B) -> Group<B> {
        Group::of(communicator, device, Rc::clone(&self.shared.identity)).with_settings_of(self)
    }
}

impl Group<Meta> {
    /// Returns a simulated group of `size` ranks, as seen by rank `rank`, and the log of the
    /// transfers that this rank would make. Every call checks its arguments, is logged, and returns
    /// at once.
    ///
    /// Layers, norms and optimizers on this group have the shapes and the memory use of that rank.
    /// Reduced tensors are 0, as all values of [`Meta`] are. [`Group::all_reduce_host`] returns
    /// this rank's own numbers.
    ///
    /// ```
    /// use shardwise::{Tensor, comm::{Group, Op, ReduceOp}, device::{Device, Meta}};
    /// let device = Meta::new();
    /// let (group, record) = Group::planned(&device, 5, 64)?;
    /// let mut x = Tensor::<f32, _>::empty(&device, [1 << 20, 1 << 14])?;
    /// group.all_reduce(ReduceOp::Sum, &mut x)?;
    /// let moved = record.take();
    /// assert_eq!((moved[0].op, moved[0].bytes()), (Op::AllReduce, 1 << 36));
    /// assert_eq!(moved[0].wire_bytes(64), 2 * (1 << 36) / 64 * 63);
    /// assert_eq!(device.memory().live, 1 << 36); // counted, not allocated
    /// # Ok::<(), shardwise::Error>(())
    /// ```
    ///
    /// `check_replicas` and saves fail, because they compare or store values. Step counts of loaded
    /// optimizer states are 0. A planned group cannot be split. For a mesh, plan one group for each
    /// axis, with this rank's coordinate along the axis. A [`Pipeline`](crate::train::Pipeline)
    /// splits its group and cannot be planned. The flight record ([`trace`]) contains no planned
    /// call.
    ///
    /// # Errors
    /// When there is no such rank.
    pub fn planned(device: &Meta, rank: usize, size: usize) -> Result<(Self, TransferLog)> {
        let (communicator, record) = Recorded::new(Rc::new(Planned::new(rank, size)?));
        let identity = Identity::new("planned".into(), trace::UNRECORDED);
        Ok((Self::of(Rc::new(communicator), device, identity), record))
    }
}
