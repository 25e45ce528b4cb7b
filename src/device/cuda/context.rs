//! One GPU as a process sees it: its primary context, what it can do, and all kernels, loaded.
//!
//! A context is made once a process and GPU, and stays. Loading a module, allocating pinned memory
//! and their counterparts may wait until the GPU is idle, and it is not while a collective waits
//! there for another rank. So all of it is done before there are collectives, and nothing is given
//! back.

use super::{
    families::{FAMILIES, Family, Kernel, PLACES},
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

/// The oldest driver: CUDA 12.0.
const OLDEST: c_int = 12_000;

/// The primary context of a GPU, and what is loaded into it.
pub(super) struct Context {
    pub(super) ordinal: usize,
    device: CUdevice,
    handle: CUcontext,
    /// Major and minor compute capability.
    capability: (i32, i32),
    pub(super) name: String,
    /// The bytes of memory.
    pub(super) total_memory: usize,
    /// The bytes of shared memory that a block may ask for.
    pub(super) shared_memory: usize,
    /// By [`Kernel::place`]. Null where a kernel is not compiled for an element.
    functions: Vec<CUfunction>,
    /// Events that no mark uses.
    pub(super) spare_events: Mutex<Vec<CUevent>>,
    /// Blocks of pinned memory that no handle uses.
    pub(super) spare_pinned: Mutex<Vec<*mut u8>>,
    /// cuBLASLt's handles that no handle uses.
    pub(super) spare_lt: Mutex<Vec<cublasLtHandle_t>>,
}

// SAFETY: every pointer is a handle of the driver or cuBLASLt, which any thread may use, or memory
// that belongs to who takes it.
#[allow(unsafe_code)]
unsafe impl Send for Context {}
// SAFETY: as above; what changes is behind a mutex.
#[allow(unsafe_code)]
unsafe impl Sync for Context {}

impl Context {
    /// The number of GPUs.
    pub(super) fn count() -> Result<usize> {
        libraries::cuda()?;
        let mut count = 0;
        // SAFETY: the driver was found, and has the functions; `count` is a place for an int.
        #[allow(unsafe_code)]
        unsafe {
            driver("cuInit", sys::cuInit(0))?;
            driver("cuDeviceGetCount", sys::cuDeviceGetCount(&mut count))?;
        }
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// The context of a GPU. Who asks first makes it; the others wait, unless it is another GPU's.
    pub(super) fn of(ordinal: usize) -> Result<&'static Self> {
        type Place = Mutex<Option<&'static Context>>;
        static ALL: Mutex<BTreeMap<usize, &'static Place>> = Mutex::new(BTreeMap::new());
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
        let place = *lock(&ALL).entry(ordinal).or_insert_with(|| Box::leak(Box::default()));
        let mut place = lock(place);
        match *place {
            Some(context) => Ok(context),
            None => Ok(*place.insert(Box::leak(Box::new(Self::new(ordinal)?)))),
        }
    }

    fn new(ordinal: usize) -> Result<Self> {
        let (mut version, mut device, mut handle, mut total_memory) = (0, 0, std::ptr::null_mut(), 0);
        let mut name = [0_u8; 256];
        // SAFETY: every pointer is a place of the type that the driver writes; `name` has the
        // length that is stated.
        #[allow(unsafe_code)]
        unsafe {
            driver("cuDriverGetVersion", sys::cuDriverGetVersion(&mut version))?;
            if version < OLDEST {
                let reason = format!(
                    "it is for CUDA {}.{}; 12.0 or later is needed",
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
            functions: vec![std::ptr::null_mut(); PLACES],
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

    /// Loads every kernel.
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
                    self.functions[kernel.place(first, second)] = self.find(family, module, &name)?;
                }
            }
        }
        Ok(())
    }

    fn attribute(&self, attribute: CUdevice_attribute) -> Result<i32> {
        let mut value = 0;
        // SAFETY: `value` is a place for an int.
        #[allow(unsafe_code)]
        let code = unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, self.device) };
        driver("cuDeviceGetAttribute", code)?;
        Ok(value)
    }

    /// The pool from which this device's memory comes.
    fn pool(&self) -> Result<CUmemoryPool> {
        self.make_current()?;
        let mut pool = std::ptr::null_mut();
        // SAFETY: `pool` is a place for one.
        #[allow(unsafe_code)]
        let code = unsafe { sys::cuDeviceGetDefaultMemPool(&mut pool, self.device) };
        driver("cuDeviceGetDefaultMemPool", code)?;
        Ok(pool)
    }

    /// Lets the device's pool keep what is freed: by default it goes back to the system at every
    /// synchronization. And lets no allocation wait for another stream: memory that was freed
    /// behind a collective would make the work that takes it wait for other ranks.
    fn set_pool(&self) -> Result<()> {
        use CUmemPool_attribute as Is;
        let pool = self.pool()?;
        let set = |attribute, value: *mut c_void| {
            // SAFETY: both callers point to a value of the type that the attribute is set from.
            #[allow(unsafe_code)]
            let code = unsafe { sys::cuMemPoolSetAttribute(pool, attribute, value) };
            driver("cuMemPoolSetAttribute", code)
        };
        let (mut threshold, mut off) = (u64::MAX, 0 as c_int);
        set(Is::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, (&raw mut threshold).cast())?;
        set(Is::CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES, (&raw mut off).cast())
    }

    /// Lets the other GPUs reach this one's memory, as far as they are connected. A pool's memory is its own device's alone,
    /// also where contexts have opened theirs to each other.
    #[cfg(feature = "nccl")]
    pub(super) fn open_memory(&self) -> Result<()> {
        let pool = self.pool()?;
        for other in (0..Self::count()?).filter(|&other| other != self.ordinal) {
            let (mut device, mut reaches) = (0, 0);
            // SAFETY: both are places for an int.
            #[allow(unsafe_code)]
            unsafe {
                driver("cuDeviceGet", sys::cuDeviceGet(&mut device, other as c_int))?;
                let code = sys::cuDeviceCanAccessPeer(&mut reaches, device, self.device);
                driver("cuDeviceCanAccessPeer", code)?;
            }
            if reaches == 0 {
                continue;
            }
            // `CUmemAccessDesc` has other fields in later bindings and one layout in all: the kind of place (a device), its
            // number, and what is allowed (reading and writing).
            let access: [c_int; 3] = [1, device, 3];
            const { assert!(size_of::<sys::CUmemAccessDesc>() == size_of::<[c_int; 3]>()) };
            // SAFETY: `access` is one description of access, as was just said, and is copied.
            #[allow(unsafe_code)]
            let code = unsafe { sys::cuMemPoolSetAccess(pool, access.as_ptr().cast(), 1) };
            driver("cuMemPoolSetAccess", code)?;
        }
        Ok(())
    }

    /// Makes this the calling thread's current context. Cheap, and other libraries may have changed it: before every use.
    pub(super) fn make_current(&self) -> Result<()> {
        // SAFETY: the handle is that of a context that stays retained.
        #[allow(unsafe_code)]
        driver("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.handle) })
    }

    /// A kernel for one or two elements.
    pub(super) fn function(&self, kernel: Kernel, first: DType, second: Option<DType>) -> Result<CUfunction> {
        let function = self.functions[kernel.place(first, second)];
        match function.is_null() {
            false => Ok(function),
            true => Err(Error::Unsupported {
                op: kernel.family(),
                reason: format!("{kernel:?} is not compiled for {first} and {second:?}"),
            }),
        }
    }

    /// A kernel of a module, by its name, and ready: a driver that loads lazily loads it now. The
    /// context is current.
    fn find(&self, family: &Family, module: CUmodule, name: &str) -> Result<CUfunction> {
        let symbol = CString::new(name).map_err(|_| Error::invalid("kernel", "its name has a zero"))?;
        let mut function = std::ptr::null_mut();
        // SAFETY: the module stays loaded; `function` is a place for a function.
        #[allow(unsafe_code)]
        driver("cuModuleGetFunction", unsafe {
            sys::cuModuleGetFunction(&mut function, module, symbol.as_ptr())
        })?;
        libraries::load_function(function)?;
        // More shared memory than by default is there for those who ask.
        const SHARED: sys::CUfunction_attribute =
            sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        if family.large_shared_memory {
            // SAFETY: the function was just found. What its static shared memory takes is left to it.
            #[allow(unsafe_code)]
            let code = unsafe {
                sys::cuFuncSetAttribute(function, SHARED, self.shared_memory.saturating_sub(1024) as c_int)
            };
            driver("cuFuncSetAttribute", code)?;
        }
        Ok(function)
    }
}
