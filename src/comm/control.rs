//! What ranks tell one another on the host: numbers, bytes, and that something has come. For
//! decisions, not for data: every call waits for the device.

use super::{Group, ReduceOp};
use crate::{device::Element, error::Result, kernels::Pointwise, shard::Partition, tensor::Tensor};
use half::f16;

impl<B: Pointwise> Group<B> {
    /// Σ, max or min over the ranks of numbers that each has on the host. On a device without
    /// values, as [`Meta`](crate::device::Meta), the other ranks' numbers are unknown: the result is
    /// this rank's own.
    ///
    /// # Errors
    /// When a rank calls something else, or is lost.
    #[track_caller]
    pub fn all_reduce_host<T: Element>(&self, op: ReduceOp, own: &[T]) -> Result<Vec<T>> {
        let mut x = Tensor::from_slice(self.device(), [own.len()], own)?;
        self.all_reduce(op, &mut x)?;
        if B::HAS_VALUES { x.to_vec() } else { Ok(own.to_vec()) }
    }

    /// The root's bytes, on every rank, such as a request or the decisions of a scheduler; what the
    /// others give is not looked at. Collectives: two broadcasts, of the number of bytes and of two
    /// bytes for each. On a device without values it gives this rank's own.
    ///
    /// ```
    /// use shardwise::launch;
    /// let heard = launch::threads(3, |world| {
    ///     let request = if world.rank() == 0 { b"next" } else { &b""[..] };
    ///     world.broadcast_bytes(0, request)
    /// })?;
    /// assert_eq!(heard, [b"next"; 3]);
    /// # Ok::<(), shardwise::Error>(())
    /// ```
    ///
    /// # Errors
    /// When there is no such root, a rank calls something else, or is lost.
    #[track_caller]
    pub fn broadcast_bytes(&self, root: usize, bytes: &[u8]) -> Result<Vec<u8>> {
        let mut len = Tensor::from_slice(self.device(), [1], &[bytes.len() as f64])?;
        self.broadcast(root, &mut len)?;
        let len = if B::HAS_VALUES { len.to_vec()?[0] as usize } else { bytes.len() };
        let mut all = match self.rank() == root {
            true => self.tensor_of(bytes)?,
            false => Tensor::empty(self.device(), [len])?,
        };
        self.broadcast(root, &mut all)?;
        if B::HAS_VALUES { bytes_of(&all) } else { Ok(bytes.to_vec()) }
    }

    /// The bytes of every rank, in rank order, on every rank; each may have another number of them.
    /// Collectives: two all-gathers, of the numbers and of two bytes for each. On a device without
    /// values the other ranks' bytes are missing.
    ///
    /// # Errors
    /// When a rank calls something else, or is lost.
    #[track_caller]
    pub fn all_gather_bytes(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        let len = Tensor::from_slice(self.device(), [1], &[own.len() as f64])?;
        let lens = self.all_gather(&len, 0, &Partition::even(self.size(), self.size()))?.to_vec()?;
        let mut lens: Vec<usize> = lens.into_iter().map(|len| len as usize).collect();
        lens[self.rank()] = own.len();
        let cut = Partition::from_sizes(lens);
        let all = bytes_of(&self.all_gather(&self.tensor_of(own)?, 0, &cut)?)?;
        let mut all: Vec<_> = (0..self.size()).map(|rank| all[cut.range(rank)].to_vec()).collect();
        all[self.rank()] = own.to_vec();
        Ok(all)
    }

    /// What `poll` finds on rank `root`, such as a request; nothing on the other ranks. Returns when
    /// it has found something, however long that takes: no deadline passes meanwhile.
    ///
    /// `root` calls `poll` again and again, and the ranks meet after each call; so a call should
    /// wait for a while, such as a tenth of a second, and for less than the group's deadline: what a
    /// later one finds is lost with the error. The other ranks' `poll` is not called. Collective: a
    /// broadcast of a number for each call. On a device without values it returns after the first.
    ///
    /// # Errors
    /// When `poll` fails, which the other ranks learn when `root` leaves or calls something else;
    /// when there is no such root, a rank calls something else, or is lost.
    #[track_caller]
    pub fn wait_for<R>(&self, root: usize, mut poll: impl FnMut() -> Result<Option<R>>) -> Result<Option<R>> {
        self.check_rank("wait for", root)?;
        loop {
            let found = if self.rank() == root { poll()? } else { None };
            let mut come = Tensor::from_slice(self.device(), [1], &[f32::from(u8::from(found.is_some()))])?;
            self.broadcast(root, &mut come)?;
            if !B::HAS_VALUES || come.to_vec()?[0] > 0.0 {
                return Ok(found);
            }
        }
    }

    /// Bytes as numbers: f16 has all of them, and no element is an integer.
    fn tensor_of(&self, bytes: &[u8]) -> Result<Tensor<f16, B>> {
        let numbers = bytes.iter().map(|&byte| f16::from_f32(byte.into())).collect();
        Tensor::from_vec(self.device(), [bytes.len()], numbers)
    }
}

fn bytes_of<B: Pointwise>(numbers: &Tensor<f16, B>) -> Result<Vec<u8>> {
    Ok(numbers.to_vec()?.into_iter().map(|number| number.to_f32() as u8).collect())
}
