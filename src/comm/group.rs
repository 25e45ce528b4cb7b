//! The typed front of a communicator.

use super::{
    Call, Collective, Communicator, HostStaged, InFlight, Incoming, Op, Outgoing, Overlap, Planned, Recorded,
    ReduceOp, Shards, Solo, TransferLog,
};
use crate::{
    device::{Cpu, DType, Device, Element, Meta},
    error::{Error, Result, Site, same_shape, same_size},
    kernels::Pointwise,
    shard::{Partition, Reduction, Shape},
    tensor::Tensor,
    trace,
};
use std::{
    cell::Cell,
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    marker::PhantomData,
    rc::Rc,
};

/// The ranks that share an operator, as one of them sees them.
///
/// Every method but the getters is a collective: all ranks of the group call it, in the same order, with the same
/// arguments, or all get an error. A group belongs to its rank's thread; it is not `Send`:
///
/// ```compile_fail
/// # use shardwise::comm::Group;
/// fn leaves_its_rank(group: Group) {
///     std::thread::spawn(move || group.barrier()); // error: `Rc<…>` cannot be sent between threads safely
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

/// What all handles of the same ranks have in common, whatever carries their data.
struct Identity {
    name: String,
    id: u64,
    calls: Cell<u64>,
    /// How many messages this rank has sent to others, and received from them.
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
    /// The group over a communicator; tensors that it makes are on `device`.
    pub fn new(communicator: Rc<dyn Communicator<B>>, device: &B) -> Self {
        Self::of(communicator, device, Identity::new("world".into(), 0))
    }

    fn of(communicator: Rc<dyn Communicator<B>>, device: &B, identity: Rc<Identity>) -> Self {
        trace::join(identity.id, &identity.name, communicator.rank(), communicator.size());
        let shared = Shared { communicator, device: device.clone(), identity };
        Self { shared: Rc::new(shared), reduction: Reduction::Fast, overlap: Overlap::Off }
    }

    /// This group, whose layers go about sums and collectives as those of another.
    fn like<C: Device>(self, other: &Group<C>) -> Self {
        Self { reduction: other.reduction, overlap: other.overlap, ..self }
    }

    /// A group of one rank.
    pub fn solo(device: &B) -> Self {
        Self::new(Rc::new(Solo::new(device)), device)
    }

    /// This group with a record of what it moves from now on. Every rank calls it.
    pub fn recorded(&self) -> (Self, TransferLog) {
        let (communicator, record) = Recorded::new(Rc::clone(&self.shared.communicator));
        let group = Self::of(Rc::new(communicator), self.device(), Rc::clone(&self.shared.identity));
        (group.like(self), record)
    }

    /// What carries the group's data, such as to wrap it: see [`Group::new`].
    pub fn communicator(&self) -> Rc<dyn Communicator<B>> {
        Rc::clone(&self.shared.communicator)
    }

    /// This rank's number in the group.
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

    /// The group's name: `world`, or where it was split from.
    pub fn name(&self) -> &str {
        &self.shared.identity.name
    }

    /// Whether two handles are of the same ranks: of one group, however it reduces, overlaps or is
    /// recorded. All groups that consist of this rank alone are the same.
    pub fn is_same(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.shared.identity, &other.shared.identity) || (self.size() == 1 && other.size() == 1)
    }

    /// The group's next call.
    #[track_caller]
    fn call(&self, op: Op) -> Call {
        let calls = &self.shared.identity.calls;
        self.describe(op, calls.replace(calls.get() + 1))
    }

    #[track_caller]
    fn describe(&self, op: Op, seq: u64) -> Call {
        Call {
            seq,
            op,
            started: false,
            reduce: None,
            root: None,
            dtype: None,
            shape: Shape::new(&[]),
            parts: 0,
            history: 0,
            group: self.shared.identity.id,
            messages: self.shared.identity.messages.get(),
            site: Site::here(),
        }
    }

    #[track_caller]
    fn data_call(&self, op: Op, dtype: DType, shape: Shape) -> Call {
        Call { dtype: Some(dtype), shape, ..self.call(op) }
    }

    /// Makes a call, which is noted: see [`trace`].
    fn noted<R>(&self, call: &Call, act: impl FnOnce(&dyn Communicator<B>) -> Result<R>) -> Result<R> {
        let ticket = trace::enter(call.operation());
        let span = tracing::debug_span!(
            target: "shardwise", "collective",
            group = self.name(), rank = self.rank(), %call
        );
        let result = span.in_scope(|| act(&*self.shared.communicator));
        trace::leave(ticket, result.as_ref().err());
        result
    }

    /// The parts of a tensor cut along `dim`, after a look at whether the cut is one of this group and dimension.
    fn parts(&self, op: &'static str, shape: Shape, dim: usize, cut: &Partition) -> Result<Shards> {
        if dim >= shape.rank() {
            return Err(Error::invalid(op, format!("dimension {dim} of a tensor of shape {shape}")));
        }
        same_size(op, "the number of shards", cut.shards(), "the number of ranks", self.size())?;
        same_size(op, "the size that is cut", cut.total(), "that of the dimension", shape.dims()[dim])?;
        // What the parts' sizes are made of: no product of them is cut off.
        shape.checked_len(op)?;
        Ok(Shards::along(shape, dim, cut))
    }

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// When a rank calls something else, or is lost.
    #[track_caller]
    pub fn barrier(&self) -> Result<()> {
        let call = self.call(Op::Barrier);
        self.noted(&call, |communicator| communicator.barrier(&call))
    }

    /// Divides the group: ranks of one `color` form a new group, in order of `key` and then of rank. Ranks without a color
    /// get none.
    ///
    /// # Errors
    /// When a rank calls something else, or is lost.
    #[track_caller]
    pub fn split(&self, color: Option<u64>, key: u64) -> Result<Option<Self>> {
        self.split_named(color, key, &color.unwrap_or_default().to_string())
    }

    /// [`Group::split`], where the new group's name is this one's and `part`.
    #[track_caller]
    pub(super) fn split_named(&self, color: Option<u64>, key: u64, part: &str) -> Result<Option<Self>> {
        let (call, name) = (self.call(Op::Split), format!("{}/{part}", self.name()));
        let part = self.noted(&call, |communicator| communicator.split(&call, color, key, &name))?;
        Ok(part.map(|communicator| {
            let mut id = DefaultHasher::new();
            (self.shared.identity.id, call.seq, color.unwrap_or_default()).hash(&mut id);
            let identity = Identity::new(name, id.finish());
            Self::of(communicator.into(), self.device(), identity).like(self)
        }))
    }

    /// Divides the group so that every rank is in a part.
    ///
    /// # Errors
    /// When a rank calls something else, or is lost.
    #[track_caller]
    pub fn split_all(&self, color: u64) -> Result<Self> {
        self.split_all_named(color, &color.to_string())
    }

    #[track_caller]
    pub(super) fn split_all_named(&self, color: u64, part: &str) -> Result<Self> {
        let part = self.split_named(Some(color), 0, part)?;
        part.ok_or_else(|| Error::invalid("split", "the communicator returned no group for a color"))
    }
}

impl Group<Cpu> {
    /// This group for tensors on `device`, carried by this one through the host: see [`HostStaged`]. Every rank calls it.
    ///
    /// ```
    /// use shardwise::{Tensor, comm::ReduceOp, device::Cpu, launch};
    /// // Any device does for one here: thread ranks that share a GPU would each make a handle of it.
    /// launch::threads(2, |world| {
    ///     let device = Cpu::new();
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

    /// A call that makes other groups of this one.
    #[cfg(feature = "nccl")]
    #[track_caller]
    pub(super) fn split_call(&self) -> Call {
        self.call(Op::Split)
    }

    /// The same group and call numbers over another communicator of the same ranks.
    pub(super) fn carried<B: Device>(&self, by: Rc<dyn Communicator<B>>, device: &B) -> Group<B> {
        Group::of(by, device, Rc::clone(&self.shared.identity)).like(self)
    }
}

impl Group<Meta> {
    /// Rank `rank` of a group of `size` without the other ranks, and the record of what this rank
    /// would move: every call checks its arguments, is written down, and returns at once.
    ///
    /// Layers, norms and optimizers on it have the shapes and take the memory of that rank. Reduced
    /// tensors are 0, as all values of [`Meta`]; of numbers that the ranks reduce on the host
    /// ([`Group::all_reduce_host`]), this rank's own stand for all.
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
    /// What compares or stores values is not planned: `check_replicas` and saves are refused, and
    /// the step counts of optimizer states that are loaded are 0. A planned group cannot be split.
    /// For a mesh, plan one group for each axis, with this rank's number along it; a
    /// [`Pipeline`](crate::train::Pipeline), which splits its group, cannot be planned. Nothing of a
    /// plan is in the flight record ([`trace`]).
    ///
    /// # Errors
    /// When there is no such rank.
    pub fn planned(device: &Meta, rank: usize, size: usize) -> Result<(Self, TransferLog)> {
        let (communicator, record) = Recorded::new(Rc::new(Planned::new(rank, size)?));
        let identity = Identity::new("planned".into(), trace::UNNOTED);
        Ok((Self::of(Rc::new(communicator), device, identity), record))
    }
}

impl<B: Pointwise> Group<B> {
    /// x ← Σ, max or min over the ranks of x, the same bits on every rank.
    ///
    /// # Errors
    /// When a rank calls something else, or is lost; x is then unchanged by disagreement.
    #[track_caller]
    pub fn all_reduce<T: Element>(&self, op: ReduceOp, x: &mut Tensor<T, B>) -> Result<()> {
        let call = Call { reduce: Some(op), ..self.data_call(Op::AllReduce, T::DTYPE, x.shape()) };
        let x = T::any_mut(x.slice_mut()?);
        self.noted(&call, |communicator| communicator.all_reduce(&call, op, x))
    }

    /// All ranks' parts along dimension `dim`, side by side. `x` is this rank's part; `cut` says how large each is.
    ///
    /// # Errors
    /// When `x` is not this rank's part of the cut, a rank calls something else, or is lost.
    #[track_caller]
    pub fn all_gather<T: Element>(
        &self,
        x: &Tensor<T, B>,
        dim: usize,
        cut: &Partition,
    ) -> Result<Tensor<T, B>> {
        let (call, parts, shape) = self.gather_call(x, dim, cut)?;
        let mut whole = Tensor::empty(self.device(), shape)?;
        let (send, recv) = (T::any_ref(x.slice()), T::any_mut(whole.slice_mut()?));
        self.noted(&call, |communicator| communicator.all_gather(&call, &parts, send, recv))?;
        Ok(whole)
    }

    /// This rank's part along dimension `dim` of the reduction over the ranks of x.
    ///
    /// # Errors
    /// When the cut is not one of x's dimension, a rank calls something else, or is lost.
    #[track_caller]
    pub fn reduce_scatter<T: Element>(
        &self,
        op: ReduceOp,
        x: &Tensor<T, B>,
        dim: usize,
        cut: &Partition,
    ) -> Result<Tensor<T, B>> {
        let (call, parts, shape) = self.scatter_call(op, x, dim, cut)?;
        let mut part = Tensor::empty(self.device(), shape)?;
        let (send, recv) = (T::any_ref(x.slice()), T::any_mut(part.slice_mut()?));
        self.noted(&call, |communicator| communicator.reduce_scatter(&call, op, &parts, send, recv))?;
        Ok(part)
    }

    /// x ← the root's x.
    ///
    /// # Errors
    /// When there is no such root, a rank calls something else, or is lost.
    #[track_caller]
    pub fn broadcast<T: Element>(&self, root: usize, x: &mut Tensor<T, B>) -> Result<()> {
        self.check_rank("broadcast", root)?;
        let call = Call { root: Some(root), ..self.data_call(Op::Broadcast, T::DTYPE, x.shape()) };
        let x = T::any_mut(x.slice_mut()?);
        self.noted(&call, |communicator| communicator.broadcast(&call, root, x))
    }

    /// Sends a tensor to one rank and receives one of a given shape from another, as one step.
    ///
    /// Only the ranks that are named take part. Messages between two ranks arrive in order. Over NCCL a message may wait on the
    /// device until it is received, and what is asked of the group later waits behind it: ranks that send by one call and
    /// receive by a later one must not do so in a circle.
    ///
    /// Every message has to be received before the group's next call of all ranks, but for those
    /// that are started: there the ranks compare how many they have sent and received, and disagree
    /// if one is missing (over NCCL where they compare their calls: `nccl::Options::check_every`).
    /// A message that is left at the end is an error of its receiver.
    ///
    /// # Errors
    /// When there is no such rank, what arrives is of another element or shape, or a rank is lost.
    #[track_caller]
    pub fn exchange<T: Element>(
        &self,
        send: Option<(usize, &Tensor<T, B>)>,
        recv: Option<(usize, Shape)>,
    ) -> Result<Option<Tensor<T, B>>> {
        for peer in send.iter().map(|(peer, _)| *peer).chain(recv.iter().map(|(peer, _)| *peer)) {
            self.check_rank("exchange", peer)?;
        }
        // Pairs of ranks exchange, not the group: it is no call of the group's that all would have to make. What a
        // receiver expects is compared with the message when that arrives.
        let call =
            Call { dtype: Some(T::DTYPE), ..self.describe(Op::Exchange, self.shared.identity.calls.get()) };
        let mut arrived = match recv {
            Some((_, shape)) => Some(Tensor::empty(self.device(), shape)?),
            None => None,
        };
        let outgoing = send.map(|(to, x)| Outgoing { to, shape: x.shape(), data: T::any_ref(x.slice()) });
        let incoming = match (&mut arrived, recv) {
            (Some(x), Some((from, shape))) => {
                Some(Incoming { from, shape, data: T::any_mut(x.slice_mut()?) })
            }
            _ => None,
        };
        let counts = [outgoing.is_some(), incoming.is_some()].map(u64::from);
        self.noted(&call, |communicator| communicator.exchange(&call, outgoing, incoming))?;
        let messages = &self.shared.identity.messages;
        messages.set([0, 1].map(|at| messages.get()[at] + counts[at]));
        Ok(arrived)
    }

    /// Starts an all-reduce of x, which comes back from [`Pending::wait`].
    ///
    /// # Errors
    /// When the group has failed already; what goes wrong later is reported by `wait`.
    #[track_caller]
    pub fn start_all_reduce<T: Element>(&self, op: ReduceOp, x: Tensor<T, B>) -> Result<Pending<T, B>> {
        let call = Call { reduce: Some(op), ..self.data_call(Op::AllReduce, T::DTYPE, x.shape()) };
        let shape = x.shape();
        self.start(call, Collective::AllReduce(op), x, shape)
    }

    /// Starts an all-gather of this rank's part x. See [`Group::all_gather`].
    ///
    /// # Errors
    /// As there; what goes wrong later is reported by `wait`.
    #[track_caller]
    pub fn start_all_gather<T: Element>(
        &self,
        x: Tensor<T, B>,
        dim: usize,
        cut: &Partition,
    ) -> Result<Pending<T, B>> {
        let (call, parts, shape) = self.gather_call(&x, dim, cut)?;
        self.start(call, Collective::AllGather(parts), x, shape)
    }

    /// Starts a reduce-scatter of x. See [`Group::reduce_scatter`].
    ///
    /// # Errors
    /// As there; what goes wrong later is reported by `wait`.
    #[track_caller]
    pub fn start_reduce_scatter<T: Element>(
        &self,
        op: ReduceOp,
        x: Tensor<T, B>,
        dim: usize,
        cut: &Partition,
    ) -> Result<Pending<T, B>> {
        let (call, parts, shape) = self.scatter_call(op, &x, dim, cut)?;
        self.start(call, Collective::ReduceScatter(op, parts), x, shape)
    }

    fn start<T: Element>(
        &self,
        call: Call,
        collective: Collective,
        x: Tensor<T, B>,
        result: Shape,
    ) -> Result<Pending<T, B>> {
        let call = Call { started: true, ..call };
        let recv = T::any_buffer(self.device().empty::<T>(result.len())?);
        let send = T::any_buffer(x.into_buffer()?);
        let ticket = trace::enter(call.operation());
        tracing::debug!(target: "shardwise", group = self.name(), rank = self.rank(), %call);
        let flight = self.shared.communicator.start(&call, collective, send, recv);
        let flight = flight.inspect_err(|error| trace::leave(ticket, Some(error)))?;
        Ok(Pending {
            flight,
            ticket,
            call,
            shape: result,
            device: self.device().clone(),
            element: PhantomData,
        })
    }

    #[track_caller]
    fn gather_call<T: Element>(
        &self,
        x: &Tensor<T, B>,
        dim: usize,
        cut: &Partition,
    ) -> Result<(Call, Shards, Shape)> {
        const OP: &str = "all_gather";
        if dim >= x.shape().rank() {
            return Err(Error::invalid(OP, format!("dimension {dim} of a tensor of shape {}", x.shape())));
        }
        let whole = x.shape().with(dim, cut.total());
        let parts = self.parts(OP, whole, dim, cut)?;
        let part = whole.with(dim, cut.size(self.rank()));
        same_shape(OP, "this rank's part", x.shape().dims(), "its place in the cut", part.dims())?;
        let call = self.data_call(Op::AllGather, T::DTYPE, whole);
        Ok((Call { parts: parts.fingerprint(), ..call }, parts, whole))
    }

    #[track_caller]
    fn scatter_call<T: Element>(
        &self,
        op: ReduceOp,
        x: &Tensor<T, B>,
        dim: usize,
        cut: &Partition,
    ) -> Result<(Call, Shards, Shape)> {
        let parts = self.parts("reduce_scatter", x.shape(), dim, cut)?;
        let call = self.data_call(Op::ReduceScatter, T::DTYPE, x.shape());
        let call = Call { reduce: Some(op), parts: parts.fingerprint(), ..call };
        Ok((call, parts, x.shape().with(dim, cut.size(self.rank()))))
    }

    pub(super) fn check_rank(&self, op: &'static str, rank: usize) -> Result<()> {
        if rank < self.size() {
            return Ok(());
        }
        Err(Error::invalid(op, format!("rank {rank} of a group of {}", self.size())))
    }
}

/// A collective that was started: owns its tensor until [`Pending::wait`] gives the result.
#[must_use = "a collective that is started has to be waited for"]
pub struct Pending<T: Element, B: Device> {
    flight: Box<dyn InFlight<B>>,
    ticket: trace::Ticket,
    call: Call,
    shape: Shape,
    device: B,
    element: PhantomData<T>,
}

impl<T: Element, B: Device> Pending<T, B> {
    /// The result.
    ///
    /// # Errors
    /// When the ranks called different things, or a rank was lost.
    pub fn wait(self) -> Result<Tensor<T, B>> {
        let span = tracing::debug_span!(target: "shardwise", "wait", call = %self.call);
        let waiting = trace::wait(self.call.operation());
        let result = span.in_scope(|| self.flight.wait());
        trace::leave(waiting, None);
        trace::leave(self.ticket, result.as_ref().err());
        let result = result?.of::<T>();
        let result = result
            .ok_or_else(|| Error::invalid("wait", "the communicator changed the element of its tensor"))?;
        Tensor::from_buffer(&self.device, self.shape, result)
    }
}
