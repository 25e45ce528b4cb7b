//! The collectives of a group on device tensors, and messages between its ranks.

use super::{Call, Group, Incoming, Op, Outgoing, ReduceOp, Shards};
use crate::{
    device::Element,
    error::{Error, Result, same_shape},
    kernels::Pointwise,
    shard::{Partition, Shape},
    tensor::Tensor,
};

impl<B: Pointwise> Group<B> {
    /// x ← Σᵣ xᵣ, or the maximum or minimum over the ranks. Every rank gets the same bits.
    ///
    /// ```
    /// use shardwise::prelude::*;
    /// let sums = launch::threads(3, |world| {
    ///     let mut x = Tensor::<f32>::full(world.device(), [2], world.rank() as f64)?;
    ///     world.all_reduce(ReduceOp::Sum, &mut x)?;
    ///     x.to_vec()
    /// })?;
    /// assert_eq!(sums, vec![[3.0; 2]; 3]); // 0 + 1 + 2 on every rank
    /// # Ok::<(), shardwise::Error>(())
    /// ```
    ///
    /// # Errors
    /// When a rank calls something else, or is lost. If calls differ, x is unchanged.
    /// [`Error::NotPermitted`] when x is a weight ([`Tensor::is_weight`]) and not every rank may
    /// see the weights of the others. The same holds for the other collectives.
    #[track_caller]
    pub fn all_reduce<T: Element>(&self, op: ReduceOp, x: &mut Tensor<T, B>) -> Result<()> {
        self.admit_all(Op::AllReduce, x)?;
        let call = Call { reduce: Some(op), ..self.data_call(Op::AllReduce, T::DTYPE, x.shape()) };
        let x = T::any_mut(x.slice_mut()?);
        self.run(&call, |communicator| communicator.all_reduce(&call, op, x))
    }

    /// Concatenates the shards of all ranks along dimension `dim`, in rank order. `x` is this
    /// rank's shard; `partition` has the sizes of all shards.
    ///
    /// ```
    /// use shardwise::prelude::*;
    /// let partition = Partition::from_sizes([1, 2]);
    /// let gathered = launch::threads(2, |world| {
    ///     let len = partition.size(world.rank());
    ///     let x = Tensor::<f32>::full(world.device(), [2, len], world.rank() as f64)?;
    ///     world.all_gather(&x, 1, &partition)?.to_vec()
    /// })?;
    /// assert_eq!(gathered[0], [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]); // 2 rows of 1 + 2 columns
    /// # Ok::<(), shardwise::Error>(())
    /// ```
    ///
    /// # Errors
    /// When `x` does not have this rank's size in the partition, or when a rank calls something
    /// else or is lost.
    #[track_caller]
    pub fn all_gather<T: Element>(
        &self,
        x: &Tensor<T, B>,
        dim: usize,
        partition: &Partition,
    ) -> Result<Tensor<T, B>> {
        self.admit_all(Op::AllGather, x)?;
        let (call, shards, shape) = self.gather_call(x, dim, partition)?;
        let mut whole = Tensor::empty(self.device(), shape)?;
        let (send, recv) = (T::any_ref(x.slice()), T::any_mut(whole.slice_mut()?));
        self.run(&call, |communicator| communicator.all_gather(&call, &shards, send, recv))?;
        Ok(whole.marked(x.is_weight()))
    }

    /// Returns this rank's shard, along dimension `dim`, of the reduction of x over the ranks.
    ///
    /// ```
    /// use shardwise::prelude::*;
    /// let shards = launch::threads(2, |world| {
    ///     let x = Tensor::from_slice(world.device(), [3], &[1.0_f32, 2.0, 3.0])?;
    ///     world.reduce_scatter(ReduceOp::Sum, &x, 0, &Partition::even(3, 2))?.to_vec()
    /// })?;
    /// assert_eq!(shards, [vec![2.0, 4.0], vec![6.0]]);
    /// # Ok::<(), shardwise::Error>(())
    /// ```
    ///
    /// # Errors
    /// When the partition does not fit x's dimension, or when a rank calls something else or is
    /// lost.
    #[track_caller]
    pub fn reduce_scatter<T: Element>(
        &self,
        op: ReduceOp,
        x: &Tensor<T, B>,
        dim: usize,
        partition: &Partition,
    ) -> Result<Tensor<T, B>> {
        self.admit_all(Op::ReduceScatter, x)?;
        let (call, shards, shape) = self.scatter_call(op, x, dim, partition)?;
        let mut shard = Tensor::empty(self.device(), shape)?;
        let (send, recv) = (T::any_ref(x.slice()), T::any_mut(shard.slice_mut()?));
        self.run(&call, |communicator| communicator.reduce_scatter(&call, op, &shards, send, recv))?;
        Ok(shard.marked(x.is_weight()))
    }

    /// x ← the x of rank `root`.
    ///
    /// # Errors
    /// When there is no such root, or when a rank calls something else or is lost.
    #[track_caller]
    pub fn broadcast<T: Element>(&self, root: usize, x: &mut Tensor<T, B>) -> Result<()> {
        self.check_rank("broadcast", root)?;
        self.admit(Op::Broadcast, x, (0..self.size()).filter(|rank| *rank != root))?;
        self.broadcast_admitted(root, x)
    }

    /// Like [`Group::broadcast`], for a weight that every rank of the group holds.
    #[track_caller]
    pub(crate) fn broadcast_replica<T: Element>(&self, root: usize, x: &mut Tensor<T, B>) -> Result<()> {
        self.admit_replica(Op::Broadcast)?;
        self.broadcast_admitted(root, x)
    }

    #[track_caller]
    fn broadcast_admitted<T: Element>(&self, root: usize, x: &mut Tensor<T, B>) -> Result<()> {
        let call = Call { root: Some(root), ..self.data_call(Op::Broadcast, T::DTYPE, x.shape()) };
        let x = T::any_mut(x.slice_mut()?);
        self.run(&call, |communicator| communicator.broadcast(&call, root, x))
    }

    /// Sends a tensor to one rank and receives a tensor of the given shape from another, as one
    /// step.
    ///
    /// Only the sender and the receiver take part. Messages between two ranks arrive in order. Over
    /// NCCL, a send may occupy the device until the peer receives the message, and later work of
    /// the group waits for that send. So ranks that send in one call and receive in a later call
    /// must not form a cycle.
    ///
    /// Every message has to be received before the next blocking call of the whole group. In that
    /// call the ranks compare the numbers of messages sent and received, and a missing receive is a
    /// mismatch. (Over NCCL, the ranks compare only some calls: `nccl::Options::check_every`.) A
    /// rank that ends without receiving a message gets an error.
    ///
    /// # Errors
    /// When there is no such rank, when the message has an unexpected element type or shape, or
    /// when a rank is lost.
    #[track_caller]
    pub fn exchange<T: Element>(
        &self,
        send: Option<(usize, &Tensor<T, B>)>,
        recv: Option<(usize, Shape)>,
    ) -> Result<Option<Tensor<T, B>>> {
        for peer in send.iter().map(|(peer, _)| *peer).chain(recv.iter().map(|(peer, _)| *peer)) {
            self.check_rank("exchange", peer)?;
        }
        if let Some((to, x)) = send {
            self.admit(Op::Exchange, x, [to])?;
        }
        // An exchange takes no sequence number, because not every rank of the group calls it. When
        // the message arrives, the receiver compares its element type and shape with the expected
        // ones.
        let call = Call { dtype: Some(T::DTYPE), ..self.call_between(Op::Exchange) };
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
        self.run(&call, |communicator| communicator.exchange(&call, outgoing, incoming))?;
        self.count_messages(counts);
        Ok(arrived)
    }

    #[track_caller]
    pub(super) fn gather_call<T: Element>(
        &self,
        x: &Tensor<T, B>,
        dim: usize,
        partition: &Partition,
    ) -> Result<(Call, Shards, Shape)> {
        const OP: &str = "all_gather";
        if dim >= x.shape().rank() {
            return Err(Error::invalid(OP, format!("dimension {dim} of a tensor of shape {}", x.shape())));
        }
        let whole = x.shape().with(dim, partition.total());
        let shards = self.shards(OP, whole, dim, partition)?;
        let shard = whole.with(dim, partition.size(self.rank()));
        same_shape(OP, "this rank's shard", x.shape().dims(), "the partition's shard", shard.dims())?;
        let call = self.data_call(Op::AllGather, T::DTYPE, whole);
        Ok((Call { partition: shards.fingerprint(), ..call }, shards, whole))
    }

    #[track_caller]
    pub(super) fn scatter_call<T: Element>(
        &self,
        op: ReduceOp,
        x: &Tensor<T, B>,
        dim: usize,
        partition: &Partition,
    ) -> Result<(Call, Shards, Shape)> {
        let shards = self.shards("reduce_scatter", x.shape(), dim, partition)?;
        let call = self.data_call(Op::ReduceScatter, T::DTYPE, x.shape());
        let call = Call { reduce: Some(op), partition: shards.fingerprint(), ..call };
        Ok((call, shards, x.shape().with(dim, partition.size(self.rank()))))
    }
}
