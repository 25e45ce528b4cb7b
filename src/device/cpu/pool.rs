//! A pool of host memory, which keeps freed buffers in free lists and reuses them.

use super::free_list::FreeLists;
use crate::{
    device::Element,
    error::{Error, Result},
};
use half::{bf16, f16};
use std::{
    cell::Cell,
    fmt,
    hint::black_box,
    ops::{Deref, DerefMut},
    rc::Rc,
    sync::Arc,
};

/// Bytes in use by the tensors of one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Bytes that tensors hold now, and bytes that other ranks still read in a started collective.
    pub live: usize,
    /// The largest `live` so far. With started collectives, the peak depends on the progress of
    /// other ranks.
    pub peak: usize,
}

/// The pool of one rank.
#[derive(Default)]
pub(super) struct Pool {
    free: FreeLists,
    poison: bool,
    live: Cell<usize>,
    peak: Cell<usize>,
    /// The floating-point operations of products and attention.
    pub(super) flops: Cell<u64>,
    /// The number of allocations from the system.
    #[cfg(test)]
    pub(super) made: Cell<usize>,
}

impl Pool {
    pub(super) fn new(poison: bool) -> Self {
        Self { poison, ..Self::default() }
    }

    pub(super) fn take<T: Element>(self: &Rc<Self>, len: usize) -> Result<CpuBuffer<T>> {
        let class = size_class(len);
        self.take_all_back();
        let idle = T::free_list(&self.free).borrow_mut().idle.get_mut(&class).and_then(Vec::pop);
        let mut data = match idle {
            Some(mut data) => {
                data.resize(len, T::default());
                data
            }
            None => {
                let none = |_| Error::Memory { len, size: size_of::<T>() };
                let mut data = zeroed(class).map_err(none)?;
                data.truncate(len);
                #[cfg(test)]
                self.made.set(self.made.get() + usize::from(class > 0));
                data
            }
        };
        if self.poison {
            data.fill(T::NAN);
        }
        Ok(self.adopt(data))
    }

    /// Turns a vector into a buffer, and counts its bytes as live.
    pub(super) fn adopt<T: Element>(self: &Rc<Self>, data: Vec<T>) -> CpuBuffer<T> {
        self.live.set(self.live.get() + data.len() * size_of::<T>());
        self.peak.set(self.peak.get().max(self.live.get()));
        CpuBuffer { data, pool: Rc::clone(self) }
    }

    fn give_back<T: Element>(&self, data: Vec<T>) {
        self.live.set(self.live.get() - data.len() * size_of::<T>());
        // An adopted vector may have a capacity that is not a size class. The pool would never
        // reuse such a vector, so this frees it.
        if data.capacity() > 0 && data.capacity() == size_class(data.capacity()) {
            T::free_list(&self.free).borrow_mut().idle.entry(data.capacity()).or_default().push(data);
        }
    }

    /// Takes back lent vectors that no other rank reads any more.
    fn take_back<T: Element>(&self) {
        let mut list = T::free_list(&self.free).borrow_mut();
        let read: Vec<_> = list.lent.extract_if(.., |data| Arc::get_mut(data).is_some()).collect();
        drop(list);
        read.into_iter().filter_map(Arc::into_inner).for_each(|data| self.give_back(data));
    }

    fn take_all_back(&self) {
        self.take_back::<f64>();
        self.take_back::<f32>();
        self.take_back::<bf16>();
        self.take_back::<f16>();
    }

    pub(super) fn trim(&self) {
        self.take_all_back();
        self.free.f64.borrow_mut().idle.clear();
        self.free.f32.borrow_mut().idle.clear();
        self.free.bf16.borrow_mut().idle.clear();
        self.free.f16.borrow_mut().idle.clear();
    }

    pub(super) fn memory(&self) -> MemoryUse {
        self.take_all_back();
        MemoryUse { live: self.live.get(), peak: self.peak.get() }
    }
}

/// The capacity of a buffer of `len` elements. The capacity exceeds `len` by at most 15 elements or
/// an eighth of `len`, whichever is more. So buffers of similar lengths can reuse each other's
/// memory.
fn size_class(len: usize) -> usize {
    let step = (len.checked_next_power_of_two().unwrap_or(usize::MAX) / 16).max(16);
    len.checked_next_multiple_of(step).unwrap_or(len)
}

/// Returns a vector of `len` default values.
///
/// # Errors
/// When there is no memory for the vector.
pub(crate) fn zeroed<T: Clone + Default>(len: usize) -> Result<Vec<T>> {
    // `vec!` gets zeroed memory from the system, which creates the pages at their first write. But
    // `vec!` aborts the process if there is no memory. So this first allocates the same size
    // without touching a page, and returns an error if that fails. Another thread may still take
    // the memory in between. `black_box` prevents the compiler from removing the first allocation.
    let mut trial = Vec::<T>::new();
    trial.try_reserve_exact(len).map_err(|_| Error::Memory { len, size: size_of::<T>() })?;
    drop(black_box(trial));
    Ok(vec![T::default(); len])
}

/// Bytes outside the pool that count as live until this value is dropped.
pub(crate) struct HeldBytes {
    pool: Rc<Pool>,
    bytes: usize,
}

impl HeldBytes {
    pub(super) fn new(pool: &Rc<Pool>, bytes: usize) -> Self {
        pool.live.set(pool.live.get() + bytes);
        pool.peak.set(pool.peak.get().max(pool.live.get()));
        Self { pool: Rc::clone(pool), bytes }
    }
}

impl Drop for HeldBytes {
    fn drop(&mut self) {
        self.pool.live.set(self.pool.live.get() - self.bytes);
    }
}

/// Host memory that returns to its rank's pool when dropped.
pub struct CpuBuffer<T: Element> {
    data: Vec<T>,
    pool: Rc<Pool>,
}

impl<T: Element> CpuBuffer<T> {
    /// Returns the buffer's memory without a copy, so that other threads can read it. The memory
    /// counts as live until all readers have dropped it.
    pub(crate) fn lend(mut self) -> Arc<Vec<T>> {
        let data = Arc::new(std::mem::take(&mut self.data));
        T::free_list(&self.pool.free).borrow_mut().lent.push(Arc::clone(&data));
        data
    }
}

impl<T: Element> Drop for CpuBuffer<T> {
    fn drop(&mut self) {
        self.pool.give_back(std::mem::take(&mut self.data));
    }
}

impl<T: Element> Deref for CpuBuffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.data
    }
}

impl<T: Element> DerefMut for CpuBuffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.data
    }
}

impl<T: Element> fmt::Debug for CpuBuffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CpuBuffer<{}>({})", T::DTYPE, self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_memory_is_used_again_and_counted() {
        let pool = Rc::new(Pool::new(false));
        let first = pool.take::<f32>(1000).unwrap();
        let at = first.as_ptr();
        assert_eq!(pool.memory(), MemoryUse { live: 4000, peak: 4000 });
        drop(first);
        let second = pool.take::<f32>(990).unwrap();
        assert_eq!((second.as_ptr(), second.len()), (at, 990), "a similar size reuses the memory");
        assert_eq!(pool.memory(), MemoryUse { live: 3960, peak: 4000 });
        assert_eq!(pool.take::<f32>(0).unwrap().len(), 0);
    }

    #[test]
    fn adopted_memory_is_counted_and_kept_if_it_can_be_used_again() {
        let pool = Rc::new(Pool::new(false));
        let odd = Vec::<f32>::with_capacity(1001);
        assert_ne!(size_class(odd.capacity()), odd.capacity());
        drop(pool.adopt(odd));
        assert!(pool.free.f32.borrow().idle.is_empty());
        let kept = pool.adopt(vec![1.0_f32; 1024]);
        let at = kept.as_ptr();
        assert_eq!(pool.memory(), MemoryUse { live: 4096, peak: 4096 });
        drop(kept);
        assert_eq!((pool.take::<f32>(1000).unwrap().as_ptr(), pool.made.get()), (at, 0));
    }

    #[test]
    fn lent_memory_is_live_until_nobody_reads_it() {
        let pool = Rc::new(Pool::new(false));
        let buffer = pool.take::<f32>(1000).unwrap();
        let at = buffer.as_ptr();
        let lent = buffer.lend();
        assert_eq!(pool.memory().live, 4000);
        assert_ne!(pool.take::<f32>(1000).unwrap().as_ptr(), at);
        std::thread::spawn(move || drop(lent)).join().unwrap();
        assert_eq!(pool.memory().live, 0);
        assert_eq!((pool.take::<f32>(1000).unwrap().as_ptr(), pool.made.get()), (at, 2));
    }

    #[test]
    fn memory_that_was_read_does_not_count_with_that_of_another_element() {
        let pool = Rc::new(Pool::new(false));
        drop(pool.take::<bf16>(1000).unwrap().lend());
        let _next = pool.take::<f32>(1000).unwrap();
        assert_eq!(pool.memory(), MemoryUse { live: 4000, peak: 4000 });
    }

    #[test]
    fn a_poisoned_pool_hands_out_nan() {
        let pool = Rc::new(Pool::new(true));
        drop(pool.take::<f64>(8).unwrap());
        assert!(pool.take::<f64>(8).unwrap().iter().all(|value| value.is_nan()));
    }

    #[test]
    fn size_classes_waste_at_most_an_eighth() {
        for len in [1, 16, 17, 100, 4096, 4097, 1 << 20, (1 << 20) + 1] {
            let class = size_class(len);
            assert!(class >= len && class <= len.max(16) + len / 8 + 16, "{len} -> {class}");
        }
        assert_eq!(size_class(usize::MAX), usize::MAX);
    }
}
