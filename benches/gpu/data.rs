//! Random operands. One block of random numbers is generated once, and operands repeat the block.

use half::{bf16, f16};
use shardwise::{
    Result, Tensor,
    device::{AnyMut, Cpu, Cuda, Device, Element},
    kernels::{MatMut, MatRef, Pointwise},
    shard::Shape,
    tensor::{Region, Role, WeightSource},
};
use std::cell::Cell;

/// A block of random numbers of mean 0 and variance 1, on the host and on the device.
pub(crate) struct Data {
    host: Vec<bf16>,
    device: Tensor<bf16, Cuda>,
    /// The offset in the block at which the next tensor starts.
    next: Cell<usize>,
}

impl Data {
    pub(crate) fn new(cuda: &Cuda, quick: bool) -> Result<Self> {
        // The length is 8 times a prime, so that rows of common lengths do not repeat and copies
        // stay aligned.
        let host: Vec<bf16> = normal(if quick { 8 * 8191 } else { 8 * 1_048_573 });
        let device = Tensor::from_slice(cuda, [host.len()], &host)?;
        Ok(Self { host, device, next: Cell::new(0) })
    }

    /// Returns a random tensor with this standard deviation.
    pub(crate) fn fill<T: Element>(
        &self,
        shape: impl Into<Shape>,
        deviation: f64,
    ) -> Result<Tensor<T, Cuda>> {
        let cuda = self.device.device();
        let mut tensor = Tensor::<T, Cuda>::empty(cuda, shape)?;
        let (len, mut done) = (tensor.len(), 0);
        while done < len {
            let at = self.next.get();
            let count = (len - done).min(self.host.len() - at);
            let from = Cuda::narrow(self.device.slice(), at..at + count);
            let to = Cuda::narrow_mut(tensor.slice_mut()?, done..done + count);
            cuda.copy(MatRef::<bf16, Cuda>::new(from, 1, count)?, MatMut::<T, Cuda>::new(to, 1, count)?)?;
            let next = (at + count).next_multiple_of(8);
            self.next.set(if next < self.host.len() { next } else { 0 });
            done += count;
        }
        if deviation != 1.0 {
            cuda.scale(deviation, tensor.mat_mut()?)?;
        }
        Ok(tensor)
    }

    /// Returns random weights with this standard deviation, for layers.
    pub(crate) fn weights(&self, deviation: f64) -> Repeated {
        let scaled = self.host.iter().map(|value| bf16::from_f32(value.to_f32() * deviation as f32));
        Repeated { block: scaled.collect() }
    }
}

/// Returns sums of four uniform numbers, which are close to normal and fast to compute.
fn normal(count: usize) -> Vec<bf16> {
    let mut state = 1_u64;
    let one = move || {
        // Splitmix64 (Steele, Lea and Flood, 2014).
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = state;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^= word >> 31;
        let sum: u64 = (0..4).map(|part| (word >> (16 * part)) & 0xffff).sum();
        // The sum of four variances of 1/12 is 1/3, so √3 scales the variance to 1.
        bf16::from_f32((sum as f32 / 65536.0 - 2.0) * 3.0_f32.sqrt())
    };
    std::iter::repeat_with(one).take(count).collect()
}

/// Random matrices, biases of 0 and scales of 1, for one rank. A hash of a tensor's name gives the
/// tensor's offset in the block.
pub(crate) struct Repeated {
    block: Vec<bf16>,
}

impl WeightSource for Repeated {
    fn read(&self, name: &str, role: Role, _: &Region, out: AnyMut<'_, Cpu>) -> Result<()> {
        let hash = name.bytes().fold(0_usize, |hash, byte| hash.wrapping_mul(8191).wrapping_add(byte.into()));
        let begin = hash % self.block.len();
        match out {
            AnyMut::F64(out) => self.write(begin, role, out, bf16::to_f64),
            AnyMut::F32(out) => self.write(begin, role, out, bf16::to_f32),
            AnyMut::BF16(out) => self.write(begin, role, out, |value| value),
            AnyMut::F16(out) => self.write(begin, role, out, |value| f16::from_f32(value.to_f32())),
        }
        Ok(())
    }

    fn contains(&self, _: &str) -> bool {
        true
    }
}

impl Repeated {
    fn write<T: Element>(&self, mut at: usize, role: Role, mut out: &mut [T], convert: impl Fn(bf16) -> T) {
        match role {
            Role::Weight => {
                while !out.is_empty() {
                    let count = out.len().min(self.block.len() - at);
                    let (now, rest) = out.split_at_mut(count);
                    now.iter_mut().zip(&self.block[at..]).for_each(|(to, value)| *to = convert(*value));
                    (at, out) = (0, rest);
                }
            }
            Role::Bias => out.fill(convert(bf16::ZERO)),
            Role::Scale => out.fill(convert(bf16::ONE)),
            _ => unreachable!("no benchmark has a parameter of this role"),
        }
    }
}

/// Copies a matrix to the host, as f64.
pub(crate) fn to_host<T: Element>(x: MatRef<'_, T, Cuda>, cuda: &Cuda) -> Result<Vec<f64>> {
    let mut dense = Tensor::<T, Cuda>::empty(cuda, [x.rows(), x.cols()])?;
    cuda.copy(x, dense.mat_mut()?)?;
    Ok(dense.to_vec()?.into_iter().map(Element::to_f64).collect())
}
