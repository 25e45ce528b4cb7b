//! Times calls that all ranks of a group make at the same moments.

use super::samples::Sample;
use crate::{
    comm::{Group, ReduceOp},
    device::Element,
    error::Result,
    kernels::Backend,
};
use std::time::Instant;

/// Times calls on all ranks of a group at once.
pub(super) struct Timer<'a, B: Backend> {
    pub(super) group: &'a Group<B>,
    /// Makes the device with which this rank computes.
    device: &'a dyn Fn() -> B,
    /// The seconds of a measurement.
    budget: f64,
}

/// The batches of a measurement, of which the second fastest counts: what else runs on the machine
/// makes batches slower, and never faster.
const BATCHES: usize = 5;

impl<'a, B: Backend> Timer<'a, B> {
    pub(super) fn new(group: &'a Group<B>, device: &'a dyn Fn() -> B, budget: f64) -> Self {
        Self { group, device, budget }
    }

    /// Whether a call takes so long that larger sizes are skipped.
    pub(super) fn is_long(&self, seconds: f64) -> bool {
        seconds > self.budget
    }

    /// The seconds of a sample's kernels. Each sample has a device of its own, because a device
    /// keeps the memory that it has allocated.
    pub(super) fn sample<T: Element>(&self, sample: &Sample) -> Result<f64> {
        let device = self.device();
        sample.run::<T, B>(&device, &mut |run| self.seconds(&device, run))
    }

    pub(super) fn device(&self) -> B {
        (self.device)()
    }

    /// The seconds of a call on a device: the second fastest of five batches of calls. All ranks
    /// make as many calls, so a call may be a collective.
    ///
    /// A batch ends when it has ended on all ranks. If there are more ranks than cores, a single
    /// rank may not notice: it runs its batch without interruption while others wait for a core.
    pub(super) fn seconds(&self, device: &B, run: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        // The first call allocates, and on GPUs compiles kernels.
        run()?;
        let once = self.batch(device, 1, run)?;
        let once = self.group.all_reduce_host(ReduceOp::Max, &[once])?[0];
        let repeats = (self.budget / BATCHES as f64 / once.max(1e-8)).clamp(1.0, 1e5) as usize;
        let mut batches = [once; BATCHES];
        if once < self.budget {
            for seconds in &mut batches {
                self.group.barrier()?;
                *seconds = self.batch(device, repeats, run)?;
            }
        }
        batches.sort_by(f64::total_cmp);
        Ok(self.group.all_reduce_host(ReduceOp::Max, &[batches[1]])?[0])
    }

    fn batch(&self, device: &B, repeats: usize, run: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        device.synchronize()?;
        let start = Instant::now();
        (0..repeats).try_for_each(|_| run())?;
        device.synchronize()?;
        self.group.barrier()?;
        Ok(start.elapsed().as_secs_f64() / repeats as f64)
    }
}
