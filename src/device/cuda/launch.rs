//! Kernel launches.

use super::{Cuda, CudaSlice, CudaSliceMut, Handle, families::Kernel, status::driver};
use crate::{
    device::{DType, Element},
    error::{Error, Result},
};
use cudarc::driver::sys;
use std::{ffi::c_void, rc::Rc};

/// The largest number of arguments that a kernel can have.
const MAX_ARGUMENTS: usize = 32;

/// A kernel launch in preparation.
pub(crate) struct Launch<'a> {
    cuda: &'a Cuda,
    kernel: Kernel,
    elements: (DType, Option<DType>),
    /// The arguments. Each has 8 bytes.
    arguments: Vec<u64>,
    /// Other handles whose memory the kernel uses.
    others: Vec<Rc<Handle>>,
}

/// The numbers of blocks and threads of a launch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    pub(crate) blocks: [usize; 2],
    pub(crate) threads: [u32; 2],
    /// The bytes of dynamic shared memory.
    pub(crate) shared: usize,
}

impl Grid {
    /// A grid for a grid-stride loop over `count` elements, or over `count` packs of elements.
    pub(crate) fn over(count: usize) -> Self {
        Self { blocks: [count.div_ceil(256).min(1 << 16), 1], threads: [256, 1], shared: 0 }
    }

    /// One warp for each row if rows have at most 1024 columns, otherwise one block for each row.
    pub(crate) fn rows(rows: usize, cols: usize) -> Self {
        if cols <= 1024 {
            Self { blocks: [rows.div_ceil(8), 1], threads: [32, 8], shared: 0 }
        } else {
            Self { blocks: [rows, 1], threads: [256, 1], shared: 0 }
        }
    }
}

impl Cuda {
    /// Prepares a launch of a kernel for one element type.
    pub(crate) fn kernel(&self, kernel: Kernel, of: DType) -> Launch<'_> {
        self.launch(kernel, (of, None))
    }

    /// Prepares a launch of a kernel that reads one element type and writes another.
    pub(crate) fn kernel_between(&self, kernel: Kernel, from: DType, to: DType) -> Launch<'_> {
        self.launch(kernel, (from, Some(to)))
    }

    fn launch(&self, kernel: Kernel, elements: (DType, Option<DType>)) -> Launch<'_> {
        Launch {
            cuda: self,
            kernel,
            elements,
            arguments: Vec::with_capacity(MAX_ARGUMENTS),
            others: Vec::new(),
        }
    }
}

impl Launch<'_> {
    /// Adds an integer.
    pub(crate) fn int(mut self, value: usize) -> Self {
        self.arguments.push(value as u64);
        self
    }

    /// Adds integers.
    pub(crate) fn ints<const N: usize>(mut self, values: [usize; N]) -> Self {
        self.arguments.extend(values.map(|value| value as u64));
        self
    }

    /// Adds floating-point numbers.
    pub(crate) fn floats<const N: usize>(mut self, values: [f64; N]) -> Self {
        self.arguments.extend(values.map(f64::to_bits));
        self
    }

    /// Adds a null pointer.
    pub(crate) fn null(self) -> Self {
        self.int(0)
    }

    /// Adds memory that the kernel reads.
    pub(crate) fn read<T: Element>(mut self, from: CudaSlice<'_, T>) -> Self {
        self.add_owner(from.owner);
        self.arguments.push(from.address);
        self
    }

    /// Adds memory that the kernel reads, or a null pointer.
    pub(crate) fn read_if<T: Element>(self, from: Option<CudaSlice<'_, T>>) -> Self {
        match from {
            Some(from) => self.read(from),
            None => self.null(),
        }
    }

    /// Adds memory that the kernel writes.
    pub(crate) fn write<T: Element>(mut self, to: &CudaSliceMut<'_, T>) -> Self {
        self.add_owner(to.owner);
        self.arguments.push(to.address);
        self
    }

    /// Adds memory that the kernel writes, or a null pointer.
    pub(crate) fn write_if<T: Element>(self, to: Option<&CudaSliceMut<'_, T>>) -> Self {
        match to {
            Some(to) => self.write(to),
            None => self.null(),
        }
    }

    /// Adds a small table that the kernel reads: see [`Cuda::table`].
    pub(crate) fn table(mut self, table: &super::Table) -> Self {
        self.arguments.push(table.address());
        self
    }

    /// Adds a small table that the kernel reads, or a null pointer.
    pub(crate) fn table_if(self, table: Option<&super::Table>) -> Self {
        match table {
            Some(table) => self.table(table),
            None => self.null(),
        }
    }

    fn add_owner(&mut self, owner: &Rc<Handle>) {
        let known = self.others.iter().any(|other| Rc::ptr_eq(other, owner));
        if !Rc::ptr_eq(owner, &self.cuda.0) && !known {
            self.others.push(Rc::clone(owner));
        }
    }

    /// Launches the kernel on the handle's stream.
    ///
    /// # Safety
    /// The arguments match the kernel's parameters in number, order and type. The kernel stays
    /// inside the given views. The views that it writes are borrowed exclusively.
    ///
    /// # Errors
    /// When the kernel is not compiled for the element types, an argument is memory of another GPU,
    /// the grid is too large, or the driver returns an error.
    #[allow(unsafe_code)]
    pub(crate) unsafe fn run(mut self, grid: Grid) -> Result<()> {
        if grid.blocks.contains(&0) {
            return Ok(());
        }
        let handle = &self.cuda.0;
        if grid.shared > handle.context.shared_memory.saturating_sub(1024) {
            let reason = format!(
                "the kernel needs {} bytes of dynamic shared memory, but {} has {} in all",
                grid.shared, handle.context.name, handle.context.shared_memory
            );
            return Err(Error::Unsupported { op: self.kernel.family(), reason });
        }
        let number = |what: &str, value: usize| {
            u32::try_from(value)
                .map_err(|_| Error::invalid(self.kernel.family(), format!("{value} {what} are too many")))
        };
        let blocks = [number("blocks", grid.blocks[0])?, number("blocks", grid.blocks[1])?];
        let shared = number("bytes of shared memory", grid.shared)?;
        handle.context.make_current()?;
        let function = handle.context.function(self.kernel, self.elements.0, self.elements.1)?;
        if self.arguments.len() > MAX_ARGUMENTS {
            let reason =
                format!("{} arguments, but at most {MAX_ARGUMENTS} are supported", self.arguments.len());
            return Err(Error::internal(self.kernel.family(), reason));
        }
        let mut pointers = [std::ptr::null_mut::<c_void>(); MAX_ARGUMENTS];
        pointers.iter_mut().zip(&mut self.arguments).for_each(|(to, value)| *to = (value as *mut u64).cast());
        self.cuda.joins(&self.others, || {
            // SAFETY: every pointer points to an argument that lives until the call returns, and
            // the driver has copied it by then. Function and stream belong to the current context.
            // The caller guarantees the rest.
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
