//! Starting kernels.

use super::{Cuda, CudaSlice, CudaSliceMut, Handle, families::Kernel, status::driver};
use crate::{
    device::{DType, Element},
    error::{Error, Result},
};
use cudarc::driver::sys;
use std::{ffi::c_void, rc::Rc};

/// A kernel has at most so many arguments.
const ARGUMENTS: usize = 32;

/// A kernel's launch in preparation: its arguments, each a word of 8 bytes.
pub(crate) struct Launch<'a> {
    cuda: &'a Cuda,
    kernel: Kernel,
    elements: (DType, Option<DType>),
    words: Vec<u64>,
    /// Handles of another stream whose memory the kernel uses.
    others: Vec<Rc<Handle>>,
}

/// How many threads run a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    pub(crate) blocks: [usize; 2],
    pub(crate) threads: [u32; 2],
    /// Bytes of shared memory, beside what the kernel declares.
    pub(crate) shared: usize,
}

impl Grid {
    /// Threads that share `count` elements or packs of them, however many there are.
    pub(crate) fn over(count: usize) -> Self {
        Self { blocks: [count.div_ceil(256).min(1 << 16), 1], threads: [256, 1], shared: 0 }
    }

    /// A warp a row of `cols` elements where rows are short, else a block a row.
    pub(crate) fn rows(rows: usize, cols: usize) -> Self {
        match cols <= 1024 {
            true => Self { blocks: [rows.div_ceil(8), 1], threads: [32, 8], shared: 0 },
            false => Self { blocks: [rows, 1], threads: [256, 1], shared: 0 },
        }
    }
}

impl Cuda {
    /// A launch of a kernel for an element.
    pub(crate) fn kernel(&self, kernel: Kernel, of: DType) -> Launch<'_> {
        self.launch(kernel, (of, None))
    }

    /// A launch of a kernel from one element to another.
    pub(crate) fn kernel_between(&self, kernel: Kernel, from: DType, to: DType) -> Launch<'_> {
        self.launch(kernel, (from, Some(to)))
    }

    fn launch(&self, kernel: Kernel, elements: (DType, Option<DType>)) -> Launch<'_> {
        Launch { cuda: self, kernel, elements, words: Vec::with_capacity(ARGUMENTS), others: Vec::new() }
    }
}

impl Launch<'_> {
    /// A number.
    pub(crate) fn int(mut self, value: usize) -> Self {
        self.words.push(value as u64);
        self
    }

    /// Numbers.
    pub(crate) fn ints<const N: usize>(mut self, values: [usize; N]) -> Self {
        self.words.extend(values.map(|value| value as u64));
        self
    }

    /// Floating-point numbers.
    pub(crate) fn floats<const N: usize>(mut self, values: [f64; N]) -> Self {
        self.words.extend(values.map(f64::to_bits));
        self
    }

    /// A null pointer.
    pub(crate) fn null(self) -> Self {
        self.int(0)
    }

    /// Memory that the kernel reads.
    pub(crate) fn read<T: Element>(mut self, from: CudaSlice<'_, T>) -> Self {
        self.uses(from.owner);
        self.words.push(from.address);
        self
    }

    /// Memory that the kernel reads, or a null pointer.
    pub(crate) fn read_if<T: Element>(self, from: Option<CudaSlice<'_, T>>) -> Self {
        match from {
            Some(from) => self.read(from),
            None => self.null(),
        }
    }

    /// Memory that the kernel writes.
    pub(crate) fn write<T: Element>(mut self, to: &CudaSliceMut<'_, T>) -> Self {
        self.uses(to.owner);
        self.words.push(to.address);
        self
    }

    /// Memory that the kernel writes, or a null pointer.
    pub(crate) fn write_if<T: Element>(self, to: Option<&CudaSliceMut<'_, T>>) -> Self {
        match to {
            Some(to) => self.write(to),
            None => self.null(),
        }
    }

    /// Small tables that the kernel reads: see [`Cuda::table`].
    pub(crate) fn table(mut self, table: &super::Table) -> Self {
        self.words.push(table.address());
        self
    }

    /// Such a table, or a null pointer.
    pub(crate) fn table_if(self, table: Option<&super::Table>) -> Self {
        match table {
            Some(table) => self.table(table),
            None => self.null(),
        }
    }

    fn uses(&mut self, owner: &Rc<Handle>) {
        let known = self.others.iter().any(|other| Rc::ptr_eq(other, owner));
        if !Rc::ptr_eq(owner, &self.cuda.0) && !known {
            self.others.push(Rc::clone(owner));
        }
    }

    /// Puts the kernel behind what was asked of the device before.
    ///
    /// # Safety
    /// The arguments are those of the kernel, in number, order and kind, and it stays inside the views that were given. Those
    /// that it writes are borrowed exclusively.
    ///
    /// # Errors
    /// When the kernel is not there for the elements, memory of another GPU is used, or the driver
    /// refuses.
    #[allow(unsafe_code)]
    pub(crate) unsafe fn run(mut self, grid: Grid) -> Result<()> {
        if grid.blocks.contains(&0) {
            return Ok(());
        }
        let handle = &self.cuda.0;
        if grid.shared > handle.context.shared_memory.saturating_sub(1024) {
            let reason = format!(
                "it needs {} bytes of shared memory, of which {} has {}",
                grid.shared, handle.context.name, handle.context.shared_memory
            );
            return Err(Error::Unsupported { op: self.kernel.family(), reason });
        }
        let number = |what: &str, value: usize| {
            u32::try_from(value).map_err(|_| Error::invalid(self.kernel.family(), format!("{value} {what}")))
        };
        let blocks = [number("blocks", grid.blocks[0])?, number("blocks", grid.blocks[1])?];
        let shared = number("bytes of shared memory", grid.shared)?;
        handle.context.make_current()?;
        let function = handle.context.function(self.kernel, self.elements.0, self.elements.1)?;
        if self.words.len() > ARGUMENTS {
            let reason = format!("{} arguments, of {ARGUMENTS} at most", self.words.len());
            return Err(Error::internal(self.kernel.family(), reason));
        }
        let mut pointers = [std::ptr::null_mut::<c_void>(); ARGUMENTS];
        pointers.iter_mut().zip(&mut self.words).for_each(|(to, word)| *to = (word as *mut u64).cast());
        self.cuda.joins(&self.others, || {
            // SAFETY: every pointer is that of a word that lives until the call returns, by when the driver has copied it; the
            // rest is the caller's promise. Function and stream are of the current context.
            let code = unsafe {
                sys::cuLaunchKernel(
                    function,
                    blocks[0],
                    blocks[1],
                    1,
                    grid.threads[0],
                    grid.threads[1],
                    1,
                    shared,
                    handle.stream.handle,
                    pointers.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            };
            driver("cuLaunchKernel", code)
        })
    }
}
