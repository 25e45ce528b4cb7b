//! A device without memory, like PyTorch's meta device. A buffer has only a length.

use super::{DType, Device, Element, MemoryUse, Work, WorkKind};
use crate::error::{Error, Result};
use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    fmt,
    marker::PhantomData,
    ops::Range,
    rc::Rc,
};

/// A device that holds no values and computes none. The device counts the bytes that tensors would
/// take, and the floating-point operations of matrix products and attention.
///
/// Layers and optimizers run on this device unchanged. So it gives the shapes, memory and FLOPs of
/// a model of any size without allocating or computing. With a [planned
/// group](crate::comm::Group::planned), it gives them for any rank of a group of any size, and the
/// group records the rank's collectives. A log of the kernels ([`Meta::take_work`]) has their
/// operations and bytes, from which a time can be predicted.
///
/// * Kernels check their operands and fail with the same errors as on other devices.
/// * Every download gives 0, whatever was uploaded or computed. Parameters are not read from their
///   source.
/// * [`Device::memory`] counts tensors as [`Cpu`](super::Cpu) does. It also counts the temporaries
///   of CPU kernels, if they are as large as a result. It does not count the packed blocks of
///   products and the tiles of attention's scores.
///
/// ```
/// use shardwise::{Tensor, device::{Device, Meta}, kernels::Gemm};
/// let device = Meta::new();
/// let (m, k, n) = (1 << 14, 1 << 16, 1 << 15);
/// let a = Tensor::<f32, _>::empty(&device, [m, k])?;
/// let b = Tensor::<f32, _>::empty(&device, [k, n])?;
/// let mut c = Tensor::<f32, _>::empty(&device, [m, n])?;
/// device.gemm(1.0, a.mat(), b.mat(), 0.0, c.mat_mut()?)?;
/// assert_eq!(device.memory().live, 4 * (m * k + k * n + m * n)); // 14 GiB
/// assert_eq!(device.flops(), 2 * (m * n * k) as u64);
/// let (work, runs) = device.take_work()[0];
/// assert_eq!((work.flops, work.bytes, runs), (device.flops(), device.memory().live as u64, 1));
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Clone, Default)]
pub struct Meta(Rc<Counts>);

/// The counts that all handles of a device share.
#[derive(Default)]
struct Counts {
    live: Cell<usize>,
    peak: Cell<usize>,
    flops: Cell<u64>,
    work: RefCell<HashMap<Work, u64>>,
}

impl Meta {
    /// Returns a device whose counts are 0.
    pub fn new() -> Self {
        Self::default()
    }

    /// The floating-point operations of matrix products and attention since the device was created,
    /// or `u64::MAX` if there are more.
    ///
    /// The counts follow PyTorch's `FlopCounterMode`:
    ///
    /// * 2 m n k for `[m, k]` times `[k, n]`;
    /// * for each query head of d features and each (query, key) pair, 4 d in attention's forward
    ///   (two products) and 10 d in its backward (five);
    /// * none for element-wise kernels, normalizations and losses.
    ///
    /// Unlike PyTorch, this does not count the pairs that masks hide.
    pub fn flops(&self) -> u64 {
        self.0.flops.get()
    }

    /// Removes and returns the log: the kernels since the last call, each with the number of its
    /// runs, in ascending order.
    ///
    /// Kernels over 0 elements are not in the log. A batch of products is one kernel. A linear
    /// operator is a product, the addition of its bias, and its activation.
    pub fn take_work(&self) -> Vec<(Work, u64)> {
        let mut all: Vec<_> = self.0.work.take().into_iter().collect();
        all.sort_unstable();
        all
    }

    /// Sets the peak of [`Device::memory`] to the bytes that are live now.
    pub fn reset_peak(&self) {
        self.0.peak.set(self.0.live.get());
    }

    /// Adds a kernel to the log, and its operations to [`Meta::flops`].
    pub(crate) fn record(&self, kind: WorkKind, dtype: DType, flops: u128, bytes: u128) {
        let [flops, bytes] = [flops, bytes].map(|count| u64::try_from(count).unwrap_or(u64::MAX));
        self.0.flops.set(self.flops().saturating_add(flops));
        *self.0.work.borrow_mut().entry(Work { kind, dtype, flops, bytes }).or_default() += 1;
    }

    /// Adds an element-wise kernel over a matrix of `matrix` bytes to the log. `others` are the
    /// bytes of the other operands. Adds nothing if the matrix has no elements.
    pub(crate) fn record_elementwise<T: Element>(&self, kind: WorkKind, matrix: u128, others: &[u128]) {
        if matrix > 0 {
            let bytes = others.iter().fold(matrix, |sum, bytes| sum.saturating_add(*bytes));
            self.record(kind, T::DTYPE, 0, bytes);
        }
    }
}

impl fmt::Debug for Meta {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Meta")
    }
}

/// A buffer, which has only a length. Its bytes count as live until it is dropped.
pub struct MetaBuffer<T: Element> {
    len: usize,
    counts: Rc<Counts>,
    element: PhantomData<T>,
}

impl<T: Element> Drop for MetaBuffer<T> {
    fn drop(&mut self) {
        self.counts.live.set(self.counts.live.get() - self.len * size_of::<T>());
    }
}

impl<T: Element> fmt::Debug for MetaBuffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MetaBuffer<{}>({})", T::DTYPE, self.len)
    }
}

/// A shared view of a [`MetaBuffer`], which has only a length.
#[derive(Clone, Copy, Debug)]
pub struct MetaSlice<'a, T: Element> {
    len: usize,
    of: PhantomData<&'a [T]>,
}

/// An exclusive view of a [`MetaBuffer`], which has only a length.
#[derive(Debug)]
pub struct MetaSliceMut<'a, T: Element> {
    len: usize,
    of: PhantomData<&'a mut [T]>,
}

impl<T: Element> MetaSlice<'_, T> {
    /// The bytes of the elements.
    pub(crate) fn bytes(&self) -> u128 {
        self.len as u128 * size_of::<T>() as u128
    }
}

impl<T: Element> MetaSliceMut<'_, T> {
    /// The bytes of the elements.
    pub(crate) fn bytes(&self) -> u128 {
        self.len as u128 * size_of::<T>() as u128
    }
}

/// The length of a range of a view. Panics if the range is out of bounds.
fn range_len(len: usize, range: Range<usize>) -> usize {
    assert!(
        range.start <= range.end && range.end <= len,
        "elements {range:?} of a view of {len} elements are out of bounds"
    );
    range.len()
}

impl Device for Meta {
    type Buffer<T: Element> = MetaBuffer<T>;
    type Slice<'a, T: Element> = MetaSlice<'a, T>;
    type SliceMut<'a, T: Element> = MetaSliceMut<'a, T>;

    const HAS_VALUES: bool = false;

    /// # Errors
    /// When more than `isize::MAX` bytes would be live, because no address space has so many.
    fn empty<T: Element>(&self, len: usize) -> Result<MetaBuffer<T>> {
        let Counts { live, peak, .. } = &*self.0;
        let after = len.checked_mul(size_of::<T>()).and_then(|bytes| live.get().checked_add(bytes));
        let after = after.filter(|&bytes| bytes <= isize::MAX as usize);
        live.set(after.ok_or(Error::Memory { len, size: size_of::<T>() })?);
        peak.set(peak.get().max(live.get()));
        Ok(MetaBuffer { len, counts: Rc::clone(&self.0), element: PhantomData })
    }

    fn slice<T: Element>(buffer: &MetaBuffer<T>) -> MetaSlice<'_, T> {
        MetaSlice { len: buffer.len, of: PhantomData }
    }

    fn slice_mut<T: Element>(buffer: &mut MetaBuffer<T>) -> MetaSliceMut<'_, T> {
        MetaSliceMut { len: buffer.len, of: PhantomData }
    }

    fn shared<'a, T: Element>(slice: &'a MetaSliceMut<'_, T>) -> MetaSlice<'a, T> {
        MetaSlice { len: slice.len, of: PhantomData }
    }

    fn reborrow<'a, T: Element>(slice: &'a mut MetaSliceMut<'_, T>) -> MetaSliceMut<'a, T> {
        MetaSliceMut { len: slice.len, of: PhantomData }
    }

    fn len<T: Element>(slice: MetaSlice<'_, T>) -> usize {
        slice.len
    }

    fn len_mut<T: Element>(slice: &MetaSliceMut<'_, T>) -> usize {
        slice.len
    }

    fn narrow<'a, T: Element>(slice: Self::Slice<'a, T>, range: Range<usize>) -> Self::Slice<'a, T> {
        MetaSlice { len: range_len(slice.len, range), ..slice }
    }

    fn narrow_mut<'a, T: Element>(
        slice: Self::SliceMut<'a, T>,
        range: Range<usize>,
    ) -> Self::SliceMut<'a, T> {
        MetaSliceMut { len: range_len(slice.len, range), ..slice }
    }

    fn upload<T: Element>(&self, _: &[T], _: MetaSliceMut<'_, T>) -> Result<()> {
        Ok(())
    }

    /// Writes zeros.
    fn download<T: Element>(&self, _: MetaSlice<'_, T>, to: &mut [T]) -> Result<()> {
        to.fill(T::default());
        Ok(())
    }

    fn memory(&self) -> MemoryUse {
        MemoryUse { live: self.0.live.get(), peak: self.0.peak.get() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::Cpu,
        tensor::{Param, ParamRegion, Random, Region, Role, Tensor, WeightSource, Weights},
    };
    use half::bf16;

    #[test]
    fn tensors_take_the_bytes_that_they_take_on_a_cpu() {
        fn steps<B: crate::kernels::Backend>(device: &B) -> Result<Vec<MemoryUse>> {
            let mut seen = Vec::new();
            let mut note = || seen.push(device.memory());
            let first = Tensor::<f32, B>::empty(device, [10, 100])?;
            note();
            let mut copy = first.clone();
            note();
            copy.slice_mut()?;
            note();
            drop(first);
            note();
            let half = copy.convert::<bf16>()?;
            drop(copy);
            note();
            let empty = Tensor::<f64, B>::zeros(device, [7, 0])?;
            note();
            drop((half, empty));
            note();
            Ok(seen)
        }
        let device = Meta::new();
        let seen = steps(&device.clone()).unwrap();
        assert_eq!(seen, steps(&Cpu::new()).unwrap());
        assert_eq!(seen[2], MemoryUse { live: 8000, peak: 8000 });
        assert_eq!(device.memory(), MemoryUse { live: 0, peak: 8000 }, "clones count together");
    }

    #[test]
    fn memory_ends_where_pointers_do() {
        let (device, most) = (Meta::new(), isize::MAX as usize);
        let whole = device.empty::<f64>(most / 8).unwrap();
        assert_eq!(device.memory().live, most / 8 * 8);
        let none = |result: Result<MetaBuffer<f64>>, len| {
            assert_eq!(result.unwrap_err(), Error::Memory { len, size: 8 });
        };
        none(device.empty(1), 1);
        none(device.empty(usize::MAX), usize::MAX);
        none(device.empty(usize::MAX / 8), usize::MAX / 8);
        drop(whole);
        assert_eq!(device.memory(), MemoryUse { live: 0, peak: most / 8 * 8 });
    }

    #[test]
    fn operations_beyond_u64_are_its_largest_number() {
        let device = Meta::new();
        let record = |flops| device.record(WorkKind::Product, DType::F32, flops, u128::MAX);
        record(u128::from(u64::MAX) - 1);
        assert_eq!(device.flops(), u64::MAX - 1);
        record(5);
        record(u128::MAX);
        assert_eq!(device.flops(), u64::MAX);
        let numbers: Vec<_> = device.take_work().iter().map(|(work, _)| (work.flops, work.bytes)).collect();
        assert_eq!(numbers, [5, u64::MAX - 1, u64::MAX].map(|flops| (flops, u64::MAX)));
    }

    #[test]
    fn equal_kernels_are_one_entry_of_the_log() {
        let device = Meta::new();
        let x = Tensor::<f32, _>::zeros(&device, [10, 100]).unwrap();
        assert_eq!(device.take_work().len(), 1, "zeros are written by a kernel");
        for _ in 0..3 {
            x.convert::<bf16>().unwrap();
        }
        x.convert::<f64>().unwrap();
        Tensor::<f32, _>::zeros(&device, [7, 0]).unwrap();
        x.to_vec().unwrap();
        let copy = |bytes| Work { kind: WorkKind::Other, dtype: DType::F32, flops: 0, bytes };
        assert_eq!(device.take_work(), [(copy(6000), 3), (copy(12_000), 1)]);
        assert_eq!(device.take_work(), []);
    }

    #[test]
    fn values_that_are_read_are_0() {
        let device = Meta::new();
        let x = Tensor::<f32, _>::from_slice(&device, [2], &[1.0, f32::NAN]).unwrap();
        assert_eq!(x.to_vec().unwrap(), [0.0; 2]);
    }

    /// A source whose only tensor is `w`. The elements of `w` cannot be read.
    struct Unreadable;

    impl WeightSource for Unreadable {
        fn read(&self, _: &str, _: Role, _: &Region, _: crate::device::AnyMut<'_, Cpu>) -> Result<()> {
            Err(Error::invalid("test", "was read"))
        }

        fn contains(&self, _: &str) -> bool {
            true
        }

        fn check(&self, name: &str, _: &Region) -> Result<()> {
            if name == "w" { Ok(()) } else { Err(Error::invalid("test", format!("no `{name}`"))) }
        }
    }

    #[test]
    fn parameters_are_checked_and_not_read() {
        let device = Meta::new();
        let load = |tensor: &str, row, width, shape: [usize; 2]| {
            let region = Region::whole([1 << 40, width]);
            let region = ParamRegion { tensor: tensor.into(), region, row, owned: true };
            let weights = Weights::new(&Unreadable);
            Param::<f32, Meta>::load(&device, &weights, "w", Role::Weight, shape, vec![region])
        };
        let param = load("w", 0, 8, [1 << 40, 8]).unwrap();
        assert_eq!((param.shape().dims(), device.memory().live), (&[1 << 40, 8][..], 1 << 45));
        drop(param);
        // The errors are those of a device that reads values.
        let cpu = |tensor: &str, row, width, shape: [usize; 2]| {
            let region =
                ParamRegion { tensor: tensor.into(), region: Region::whole([4, width]), row, owned: true };
            let source = Random::normal(1, 1.0);
            Param::<f32, Cpu>::load(
                &Cpu::new(),
                &Weights::new(&source),
                "w",
                Role::Weight,
                shape,
                vec![region],
            )
        };
        let text = |result: Result<()>| result.unwrap_err().to_string();
        assert_eq!(text(load("v", 0, 8, [1 << 40, 8]).map(drop)), "test: no `v`");
        let width = "parameter: the width of the region of `w` is 7, but that of the parameter is 8";
        assert_eq!(text(load("w", 0, 7, [1 << 40, 8]).map(drop)), width);
        assert_eq!(text(cpu("w", 0, 7, [4, 8]).map(drop)), width);
        let beyond = |elements: usize, end: usize| {
            format!(
                "parameter: the end of the region of `w` is {end}, but the number of elements of the parameter is {elements}"
            )
        };
        assert_eq!(text(load("w", 1, 8, [1 << 40, 8]).map(drop)), beyond(1 << 43, (1 << 43) + 8));
        assert_eq!(text(cpu("w", 1, 8, [4, 8]).map(drop)), beyond(32, 40));
        assert_eq!(device.memory().live, 0);
    }
}
