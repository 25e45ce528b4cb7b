//! Collectives on host values: numbers, bytes, and waiting for an event on one rank. Use them for
//! control decisions, not for activations, because every call synchronizes the device.

use super::{Group, ReduceOp};
use crate::{
    device::Element,
    error::{Error, Result},
    kernels::Pointwise,
    security::audit::{self, Head},
    shard::Partition,
    tensor::Tensor,
};
use half::f16;
use std::collections::HashMap;

impl<B: Pointwise> Group<B> {
    /// Reduces numbers in host memory over the ranks: sum, max or min. Collective: all-reduce.
    ///
    /// On a device without values, such as [`Meta`](crate::device::Meta), it returns `own`.
    ///
    /// # Errors
    /// When a rank calls something else, or is lost.
    #[track_caller]
    pub fn all_reduce_host<T: Element>(&self, op: ReduceOp, own: &[T]) -> Result<Vec<T>> {
        let mut x = Tensor::from_slice(self.device(), [own.len()], own)?;
        self.all_reduce(op, &mut x)?;
        if B::HAS_VALUES { x.to_vec() } else { Ok(own.to_vec()) }
    }

    /// Broadcasts the root's bytes, such as a request or a scheduler's decisions. The other ranks'
    /// `bytes` are ignored. Collectives: a broadcast of the length, and a broadcast of one f16 per
    /// byte.
    ///
    /// On a device without values, it returns `bytes`.
    ///
    /// ```
    /// use shardwise::launch;
    /// let received = launch::threads(3, |world| {
    ///     let request = if world.rank() == 0 { b"next" } else { &b""[..] };
    ///     world.broadcast_bytes(0, request)
    /// })?;
    /// assert_eq!(received, [b"next"; 3]);
    /// # Ok::<(), shardwise::Error>(())
    /// ```
    ///
    /// # Errors
    /// When there is no such root, or when a rank calls something else or is lost.
    #[track_caller]
    pub fn broadcast_bytes(&self, root: usize, bytes: &[u8]) -> Result<Vec<u8>> {
        let mut len = Tensor::from_slice(self.device(), [1], &[bytes.len() as f64])?;
        self.broadcast(root, &mut len)?;
        let len = if B::HAS_VALUES { len.to_vec()?[0] as usize } else { bytes.len() };
        let mut all =
            if self.rank() == root { self.tensor_of(bytes)? } else { Tensor::empty(self.device(), [len])? };
        self.broadcast(root, &mut all)?;
        if B::HAS_VALUES { bytes_of(&all) } else { Ok(bytes.to_vec()) }
    }

    /// Gathers the bytes of every rank, in rank order. Lengths may differ. Collectives: an
    /// all-gather of the lengths, and an all-gather of one f16 per byte.
    ///
    /// On a device without values, the other ranks' entries are empty.
    ///
    /// # Errors
    /// When a rank calls something else, or is lost.
    #[track_caller]
    pub fn all_gather_bytes(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        let len = Tensor::from_slice(self.device(), [1], &[own.len() as f64])?;
        let lens = self.all_gather(&len, 0, &Partition::even(self.size(), self.size()))?.to_vec()?;
        let mut lens: Vec<usize> = lens.into_iter().map(|len| len as usize).collect();
        lens[self.rank()] = own.len();
        let partition = Partition::from_sizes(lens);
        let all = bytes_of(&self.all_gather(&self.tensor_of(own)?, 0, &partition)?)?;
        let mut all: Vec<_> = (0..self.size()).map(|rank| all[partition.range(rank)].to_vec()).collect();
        all[self.rank()] = own.to_vec();
        Ok(all)
    }

    /// Writes where the audit logs of all ranks end into the log of each. So nobody can change or
    /// remove a line of one log without changing all of them: see [`audit`]. Call it now and then
    /// in a long job; it is called at the start, at the end, and after a save.
    ///
    /// Collectives: those of [`Group::all_gather_bytes`], with 48 bytes from each rank; none if the
    /// job keeps no audit log.
    ///
    /// # Errors
    /// When a rank calls something else or is lost, or when the log cannot be written.
    #[track_caller]
    pub fn witness(&self) -> Result<()> {
        const OP: &str = "witness";
        let Some(log) = audit::current() else { return Ok(()) };
        // What the other ranks have seen must not be lost when this machine fails.
        log.sync()?;
        let heads = self.all_gather_bytes(&log.head().to_bytes())?;
        let head = |bytes: &Vec<u8>| Head::from_bytes(bytes.as_slice().try_into().ok()?);
        let heads: Option<Vec<_>> = heads.iter().map(head).collect();
        let heads = heads.ok_or_else(|| Error::invalid(OP, "a rank has sent no head of a log"))?;
        let mut ranks = HashMap::new();
        for (at, head) in heads.iter().enumerate() {
            if let Some(earlier) = ranks.insert(head.rank, at) {
                let reason = format!("ranks {earlier} and {at} both say that they are rank {}", head.rank);
                return Err(Error::invalid(OP, reason));
            }
        }
        log.witness(&heads)
    }

    /// Waits until `poll` returns a value on rank `root`, such as a request. Returns the value on
    /// `root`, and none on the other ranks. The group's deadline does not limit the wait.
    ///
    /// Only `root` calls `poll`, repeatedly, and the ranks synchronize after each call. A call of
    /// `poll` should block for a while, such as 100 ms. If it blocks for longer than the group's
    /// deadline, the value that it returns is lost and the group fails. Collective: a broadcast of
    /// one number per call.
    ///
    /// On a device without values, it returns after the first call.
    ///
    /// # Errors
    /// When there is no such root, when a rank calls something else or is lost, or when `poll`
    /// fails on `root`. If `poll` fails, the other ranks fail when `root` leaves the group or calls
    /// something else.
    #[track_caller]
    pub fn wait_for<R>(&self, root: usize, mut poll: impl FnMut() -> Result<Option<R>>) -> Result<Option<R>> {
        self.check_rank("wait for", root)?;
        loop {
            let found = if self.rank() == root { poll()? } else { None };
            let mut ready = Tensor::from_slice(self.device(), [1], &[f32::from(u8::from(found.is_some()))])?;
            self.broadcast(root, &mut ready)?;
            if !B::HAS_VALUES || ready.to_vec()?[0] > 0.0 {
                return Ok(found);
            }
        }
    }

    /// Converts bytes to f16 numbers, which represent 0 to 255 exactly. Tensors have no integer
    /// elements.
    fn tensor_of(&self, bytes: &[u8]) -> Result<Tensor<f16, B>> {
        let numbers = bytes.iter().map(|&byte| f16::from_f32(byte.into())).collect();
        Tensor::from_vec(self.device(), [bytes.len()], numbers)
    }
}

fn bytes_of<B: Pointwise>(numbers: &Tensor<f16, B>) -> Result<Vec<u8>> {
    Ok(numbers.to_vec()?.into_iter().map(|number| number.to_f32() as u8).collect())
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use crate::{
        error::Error,
        launch::Threads,
        security::audit::{self, AuditLog, Event},
    };

    /// Otherwise the file of the other rank would seem to be the one that was changed.
    #[test]
    fn no_rank_can_send_the_head_of_another_ones_log() {
        let folder = tempfile::tempdir().unwrap();
        let outcomes = Threads::new(3).run_each(|group| {
            let (own, says) = (group.rank(), group.rank().min(1));
            let log = AuditLog::open(&folder.path().join(own.to_string()), "job", 0, says, None)?;
            log.write(&Event::new("start").number("world", 3))?;
            audit::begin(Some(log));
            let outcome = group.witness();
            audit::end();
            outcome
        });
        let outcomes = outcomes.unwrap();
        assert_eq!(outcomes.len(), 3);
        for outcome in outcomes {
            let wanted = Error::invalid("witness", "ranks 1 and 2 both say that they are rank 1");
            assert_eq!(outcome, Err(wanted));
        }
    }
}
