//! Asynchronous collectives: a rank starts a collective, computes, and waits for the result later.

use super::{Call, Collective, Group, InFlight, Op, ReduceOp};
use crate::{
    device::{Device, Element},
    error::{Error, Result},
    kernels::Pointwise,
    shard::{Partition, Shape},
    tensor::Tensor,
    trace,
};
use std::marker::PhantomData;

impl<B: Pointwise> Group<B> {
    /// Starts an all-reduce of x, see [`Group::all_reduce`]. [`Pending::wait`] returns the result.
    ///
    /// ```
    /// use shardwise::prelude::*;
    /// let sums = launch::threads(2, |world| {
    ///     let x = Tensor::<f32>::full(world.device(), [2], 1.0 + world.rank() as f64)?;
    ///     let pending = world.start_all_reduce(ReduceOp::Sum, x)?;
    ///     // Compute here while the ranks communicate.
    ///     pending.wait()?.to_vec()
    /// })?;
    /// assert_eq!(sums, [[3.0; 2]; 2]);
    /// # Ok::<(), shardwise::Error>(())
    /// ```
    ///
    /// # Errors
    /// When the group has already failed. `wait` reports later errors.
    #[track_caller]
    pub fn start_all_reduce<T: Element>(&self, op: ReduceOp, x: Tensor<T, B>) -> Result<Pending<T, B>> {
        self.admit_all(Op::AllReduce, &x)?;
        let call = Call { reduce: Some(op), ..self.data_call(Op::AllReduce, T::DTYPE, x.shape()) };
        let shape = x.shape();
        self.start(call, Collective::AllReduce(op), x, shape)
    }

    /// Starts an all-gather of this rank's shard x. See [`Group::all_gather`].
    ///
    /// # Errors
    /// The errors of [`Group::all_gather`]. `wait` reports later errors.
    #[track_caller]
    pub fn start_all_gather<T: Element>(
        &self,
        x: Tensor<T, B>,
        dim: usize,
        partition: &Partition,
    ) -> Result<Pending<T, B>> {
        self.admit_all(Op::AllGather, &x)?;
        let (call, shards, shape) = self.gather_call(&x, dim, partition)?;
        self.start(call, Collective::AllGather(shards), x, shape)
    }

    /// Starts a reduce-scatter of x. See [`Group::reduce_scatter`].
    ///
    /// # Errors
    /// The errors of [`Group::reduce_scatter`]. `wait` reports later errors.
    #[track_caller]
    pub fn start_reduce_scatter<T: Element>(
        &self,
        op: ReduceOp,
        x: Tensor<T, B>,
        dim: usize,
        partition: &Partition,
    ) -> Result<Pending<T, B>> {
        self.admit_all(Op::ReduceScatter, &x)?;
        let (call, shards, shape) = self.scatter_call(op, &x, dim, partition)?;
        self.start(call, Collective::ReduceScatter(op, shards), x, shape)
    }

    fn start<T: Element>(
        &self,
        call: Call,
        collective: Collective,
        x: Tensor<T, B>,
        result: Shape,
    ) -> Result<Pending<T, B>> {
        let (call, is_weight) = (Call { started: true, ..call }, x.is_weight());
        let recv = T::any_buffer(self.device().empty::<T>(result.len())?);
        let send = T::any_buffer(x.into_buffer()?);
        let ticket = trace::enter(call.operation());
        tracing::debug!(target: "shardwise", group = self.name(), rank = self.rank(), %call);
        let flight = self.transport().start(&call, collective, send, recv);
        let flight = flight.inspect_err(|error| trace::leave(ticket, Some(error)))?;
        Ok(Pending {
            flight,
            ticket,
            call,
            shape: result,
            is_weight,
            device: self.device().clone(),
            element: PhantomData,
        })
    }
}

/// A started collective. It owns its tensors until [`Pending::wait`] returns the result.
#[must_use = "a collective that is started has to be waited for"]
pub struct Pending<T: Element, B: Device> {
    flight: Box<dyn InFlight<B>>,
    ticket: trace::Ticket,
    call: Call,
    shape: Shape,
    is_weight: bool,
    device: B,
    element: PhantomData<T>,
}

impl<T: Element, B: Device> Pending<T, B> {
    /// Waits for the collective and returns its result.
    ///
    /// # Errors
    /// When the ranks called different operations, or a rank was lost.
    pub fn wait(self) -> Result<Tensor<T, B>> {
        let span = tracing::debug_span!(target: "shardwise", "wait", call = %self.call);
        let waiting = trace::wait(self.call.operation());
        let result = span.in_scope(|| self.flight.wait());
        trace::leave(waiting, None);
        trace::leave(self.ticket, result.as_ref().err());
        let result = result?.of::<T>();
        let result = result
            .ok_or_else(|| Error::invalid("wait", "the communicator changed the element of its tensor"))?;
        Ok(Tensor::from_buffer(&self.device, self.shape, result)?.marked(self.is_weight))
    }
}
