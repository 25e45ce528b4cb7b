//! One GPU of a process: its primary context, its properties, and its loaded kernels.
//!
//! A process creates one context for each GPU and keeps it. The driver may wait until the GPU is
//! idle when it loads or unloads a module, or allocates or frees pinned memory. While a collective
//! on the GPU waits for another rank, the GPU is not idle. So `Cuda::new` loads modules and
//! allocates pinned memory before there are collectives, and both stay until the process ends.

use super::{
    families::{FAMILIES, Family, KERNELS, Kernel},
    libraries, lock, program,
    status::driver,
};
use crate::{
    device::DType,
    error::{Error, Result},
};
use cudarc::{
    cublaslt::sys::cublasLtHandle_t,
    driver::sys::{
        self, CUcontext, CUdevice, CUdevice_attribute, CUevent, CUfunction, CUmemPool_attribute,
        CUmemoryPool, CUmodule,
    },
};
use std::{
    collections::BTreeMap,
    ffi::{CString, c_int, c_void},
    sync::Mutex,
};

/// The oldest supported driver: CUDA 12.0.
const OLDEST: c_int = 12_000;

/// The primary context of a GPU, and everything that is loaded into it.
pub(super) struct Context {
    pub(super) ordinal: usize,
    device: CUdevice,
    handle: CUcontext,
    /// Major and minor compute capability.
    capability: (i32, i32),
    pub(super) name: String,
    /// The size of the GPU's memory in bytes.
    pub(super) total_memory: usize,
    /// The largest shared memory of a block, in bytes.
    pub(super) shared_memory: usize,
    /// The kernels, by [`Kernel::index`]. Null if a kernel is not compiled for an element type.
    functions: Vec<CUfunction>,
    /// Driver events for reuse. No `Event` uses them.
    pub(super) spare_events: Mutex<Vec<CUevent>>,
    /// Blocks of pinned memory for reuse. No handle uses them.
    pub(super) spare_pinned: Mutex<Vec<*mut u8>>,
    /// cuBLASLt handles for reuse. No `Lt` uses them.
    pub(super) spare_lt: Mutex<Vec<cublasLtHandle_t>>,
}

// SAFETY: a pointer is either a handle of the driver or cuBLASLt, which any thread may use, or
// memory that belongs to the thread that takes it from its list.
#[allow(unsafe_code)]
unsafe impl Send for Context {}
// SAFETY: as above, and every field that changes is a mutex.
#[allow(unsafe_code)]
unsafe impl Sync for Context {}

impl Context {
    /// Returns the number of GPUs.
    pub(super) fn count() -> Result<usize> {
        libraries::cuda()?;
        let mut count = 0;
        // SAFETY: `libraries::cuda` checked that the driver has the functions; `count` is valid
        // for writing an int.
        #[allow(unsafe_code)]
        unsafe {
            driver("cuInit", sys::cuInit(0))?;
            driver("cuDeviceGetCount", sys::cuDeviceGetCount(&mut count))?;
        }
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// Returns the context of a GPU. The first caller creates it, and other callers for the same
    /// GPU wait.
    pub(super) fn of(ordinal: usize) -> Result<&'static Self> {
        type Entry = Mutex<Option<&'static Context>>;
        static ALL: Mutex<BTreeMap<usize, &'static Entry>> = Mutex::new(BTreeMap::new());
        let count = Self::count()?;
        if ordinal >= count {
            return Err(Error::sizes(
                "CUDA device",
                "the number of the GPU",
                ordinal,
                "the number of GPUs",
                count,
            ));
        }
        let entry = *lock(&ALL).entry(ordinal).or_insert_with(|| Box::leak(Box::default()));
        let mut entry = lock(entry);
        match *entry {
            Some(context) => Ok(context),
            None => Ok(*entry.insert(Box::leak(Box::new(Self::new(ordinal)?)))),
        }
    }

    fn new(ordinal: usize) -> Result<Self> {
        let (mut version, mut device, mut handle, mut total_memory) = (0, 0, std::ptr::null_mut(), 0);
        let mut name = [0_u8; 256];
        // SAFETY: every pointer is valid for writing the driver's type, and `name` has 256 bytes,
        // more than the stated 255.
        #[allow(unsafe_code)]
        unsafe {
            driver("cuDriverGetVersion", sys::cuDriverGetVersion(&mut version))?;
            if version < OLDEST {
                let reason = format!(
                    "it supports CUDA {}.{}; 12.0 or later is needed",
                    version / 1000,
                    version % 1000 / 10
                );
                return Err(Error::Unsupported { op: "the CUDA driver", reason });
            }
            driver("cuDeviceGet", sys::cuDeviceGet(&mut device, ordinal as c_int))?;
            driver("cuDeviceGetName", sys::cuDeviceGetName(name.as_mut_ptr().cast(), 255, device))?;
            driver("cuDeviceTotalMem", sys::cuDeviceTotalMem_v2(&mut total_memory, device))?;
            driver("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut handle, device))?;
        }
        let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
        let mut this = Self {
            ordinal,
            device,
            handle,
            capability: (0, 0),
            name: String::from_utf8_lossy(&name[..end]).into_owned(),
            total_memory,
            shared_memory: 0,
            functions: vec![std::ptr::null_mut(); KERNELS],
            spare_events: Mutex::default(),
            spare_pinned: Mutex::default(),
            spare_lt: Mutex::default(),
        };
        use CUdevice_attribute as Is;
        this.capability = (
            this.attribute(Is::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            this.attribute(Is::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if this.capability.0 < 8 {
            let (major, minor) = this.capability;
            let reason =
                format!("{} has compute capability {major}.{minor}; 8.0 or later is needed", this.name);
            return Err(Error::Unsupported { op: "CUDA device", reason });
        }
        this.shared_memory =
            this.attribute(Is::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize;
        this.set_pool()?;
        this.load()?;
        Ok(this)
    }

    /// Loads every kernel of every family.
    fn load(&mut self) -> Result<()> {
        let images = program::images(self.capability)?;
        self.make_current()?;
        for (family, image) in FAMILIES.iter().zip(images.iter()) {
            let module = program::load(family, image, self.capability)?;
            for &(kernel, stem, elements) in family.kernels {
                for (first, second) in elements.all() {
                    let name = match second {
                        Some(second) => format!("{stem}_{first}_{second}"),
                        None => format!("{stem}_{first}"),
                    };
                    self.functions[kernel.index(first, second)] = self.find(family, module, &name)?;
                }
            }
        }
        Ok(())
    }

    fn attribute(&self, attribute: CUdevice_attribute) -> Result<i32> {
        let mut value = 0;
        // SAFETY: `value` is valid for writing an int.
        #[allow(unsafe_code)]
        let code = unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, self.device) };
        driver("cuDeviceGetAttribute", code)?;
        Ok(value)
    }

    /// Returns the pool from which the driver allocates this GPU's memory.
    fn pool(&self) -> Result<CUmemoryPool> {
        self.make_current()?;
        let mut pool = std::ptr::null_mut();
        // SAFETY: `pool` is valid for writing a pool.
        #[allow(unsafe_code)]
        let code = unsafe { sys::cuDeviceGetDefaultMemPool(&mut pool, self.device) };
        driver("cuDeviceGetDefaultMemPool", code)?;
        Ok(pool)
    }

    /// Makes the GPU's pool keep freed memory. By default the memory returns to the system at every
    /// synchronization. Also keeps allocations from waiting for another stream. Otherwise work that
    /// reuses memory freed after a collective would wait for other ranks.
    fn set_pool(&self) -> Result<()> {
        use CUmemPool_attribute as Is;
        let pool = self.pool()?;
        let set = |attribute, value: *mut c_void| {
            // SAFETY: both calls below point to a value of the attribute's type.
            #[allow(unsafe_code)]
            let code = unsafe { sys::cuMemPoolSetAttribute(pool, attribute, value) };
            driver("cuMemPoolSetAttribute", code)
        };
        let (mut threshold, mut off) = (u64::MAX, 0 as c_int);
        set(Is::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, (&raw mut threshold).cast())?;
        set(Is::CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES, (&raw mut off).cast())
    }

    /// Lets the other GPUs access this GPU's memory, if they are connected. By default only this
    /// GPU can access its pool, even if contexts have enabled peer access.
    #[cfg(feature = "nccl")]
    pub(super) fn open_memory(&self) -> Result<()> {
        let pool = self.pool()?;
        for other in (0..Self::count()?).filter(|&other| other != self.ordinal) {
            let (mut device, mut reaches) = (0, 0);
            // SAFETY: both are valid for writing an int.
            #[allow(unsafe_code)]
            unsafe {
                driver("cuDeviceGet", sys::cuDeviceGet(&mut device, other as c_int))?;
                let code = sys::cuDeviceCanAccessPeer(&mut reaches, device, self.device);
                driver("cuDeviceCanAccessPeer", code)?;
            }
            if reaches == 0 {
                continue;
            }
            // `CUmemAccessDesc` has other fields in later bindings, but always this layout: the
            // kind of location (1 is a device), the location's number, and the access (3 is read
            // and write).
            let access: [c_int; 3] = [1, device, 3];
            const { assert!(size_of::<sys::CUmemAccessDesc>() == size_of::<[c_int; 3]>()) };
            // SAFETY: `access` has the layout of one `CUmemAccessDesc` (its size is asserted
            // above), and the driver copies it.
            #[allow(unsafe_code)]
            let code = unsafe { sys::cuMemPoolSetAccess(pool, access.as_ptr().cast(), 1) };
            driver("cuMemPoolSetAccess", code)?;
        }
        Ok(())
    }

    /// Makes this context the calling thread's current one. Callers do so before every use of the
    /// driver, because other libraries may have changed the current context. The call is cheap.
    pub(super) fn make_current(&self) -> Result<()> {
        // SAFETY: the context of this handle is never released.
        #[allow(unsafe_code)]
        driver("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.handle) })
    }

    /// Returns a kernel for one or two element types.
    pub(super) fn function(&self, kernel: Kernel, first: DType, second: Option<DType>) -> Result<CUfunction> {
        let function = self.functions[kernel.index(first, second)];
        if function.is_null() {
            let reason = format!("{kernel:?} is not compiled for {first} and {second:?}");
            return Err(Error::Unsupported { op: kernel.family(), reason });
        }
        Ok(function)
    }

    /// Finds a kernel of a module by its name and loads it, even if the driver loads lazily. The
    /// caller has made the context current.
    fn find(&self, family: &Family, module: CUmodule, name: &str) -> Result<CUfunction> {
        let symbol =
            CString::new(name).map_err(|_| Error::invalid("kernel", "its name contains a zero byte"))?;
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is never unloaded; `function` is valid for writing a function.
        #[allow(unsafe_code)]
        driver("cuModuleGetFunction", unsafe {
            sys::cuModuleGetFunction(&mut function, module, symbol.as_ptr())
        })?;
        program::load_function(function)?;
        // A block can use more shared memory than the default only after this attribute is set.
        const SHARED: sys::CUfunction_attribute =
            sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        if family.large_shared_memory {
            // SAFETY: the function was just found. 1024 bytes stay free for its static shared
            // memory.
            #[allow(unsafe_code)]
            let code = unsafe {
                sys::cuFuncSetAttribute(function, SHARED, self.shared_memory.saturating_sub(1024) as c_int)
            };
            driver("cuFuncSetAttribute", code)?;
        }
        Ok(function)
    }
}
