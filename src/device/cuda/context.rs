//! One GPU as a rank sees it: its primary context, what it can do, and the kernels that were loaded into it.

use super::{libraries, program, status::driver};
use crate::error::{Error, Result};
use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUdevice_attribute, CUfunction, CUmemoryPool, CUmodule,
};
use std::{
    cell::RefCell,
    collections::HashMap,
    ffi::{CString, c_int},
    rc::Rc,
};

/// The oldest driver: CUDA 12.0.
const OLDEST: c_int = 12_000;

/// The primary context of a GPU, and the modules that this rank has loaded into it.
pub(super) struct Context {
    pub(super) ordinal: usize,
    device: CUdevice,
    handle: CUcontext,
    /// Major and minor compute capability.
    pub(super) capability: (i32, i32),
    pub(super) name: String,
    /// The bytes of shared memory that a block may ask for.
    pub(super) shared_memory: usize,
    modules: RefCell<HashMap<&'static str, CUmodule>>,
    functions: RefCell<HashMap<String, CUfunction>>,
}

impl Context {
    /// The number of GPUs.
    pub(super) fn count() -> Result<usize> {
        libraries::need(&libraries::DRIVER)?;
        let mut count = 0;
        // SAFETY: `need` has seen that the driver has the functions; `count` is a place for an int.
        #[allow(unsafe_code)]
        unsafe {
            driver("cuInit", sys::cuInit(0))?;
            driver("cuDeviceGetCount", sys::cuDeviceGetCount(&mut count))?;
        }
        Ok(usize::try_from(count).unwrap_or(0))
    }

    pub(super) fn new(ordinal: usize) -> Result<Rc<Self>> {
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
        let (mut version, mut device, mut handle) = (0, 0, std::ptr::null_mut());
        let mut name = [0_u8; 256];
        // SAFETY: every pointer is a place of the type that the driver writes; `name` has the length that is stated. The
        // context is given back in `drop`.
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
            driver("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut handle, device))?;
        }
        let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
        let mut this = Self {
            ordinal,
            device,
            handle,
            capability: (0, 0),
            name: String::from_utf8_lossy(&name[..end]).into_owned(),
            shared_memory: 0,
            modules: RefCell::default(),
            functions: RefCell::default(),
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
        this.keep_memory()?;
        Ok(Rc::new(this))
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

    /// Lets the device's pool keep what is freed: by default it goes back to the system at every synchronization.
    fn keep_memory(&self) -> Result<()> {
        let (pool, mut threshold) = (self.pool()?, u64::MAX);
        const ATTRIBUTE: sys::CUmemPool_attribute =
            sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: `threshold` is the 64 bits that this attribute is set from.
        #[allow(unsafe_code)]
        let code = unsafe { sys::cuMemPoolSetAttribute(pool, ATTRIBUTE, (&raw mut threshold).cast()) };
        driver("cuMemPoolSetAttribute", code)
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
        // SAFETY: the handle is that of a context that is retained until `drop`.
        #[allow(unsafe_code)]
        driver("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.handle) })
    }

    /// As `make_current`, for a thread that has no handle of its own.
    #[cfg(feature = "nccl")]
    pub(super) fn elsewhere(&self) -> impl FnOnce() -> Result<()> + Send + 'static {
        let handle = std::sync::atomic::AtomicPtr::new(self.handle);
        // SAFETY: as in `make_current`; of a context that has ended the driver says so.
        #[allow(unsafe_code)]
        move || driver("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(handle.into_inner()) })
    }

    /// A kernel of a family, compiled and loaded when it is first asked for. The context is current.
    pub(super) fn function(&self, family: &'static program::Family, name: &str) -> Result<CUfunction> {
        if let Some(&function) = self.functions.borrow().get(name) {
            return Ok(function);
        }
        let known = self.modules.borrow().get(family.name).copied();
        let module = match known {
            Some(module) => module,
            None => {
                let module = program::load(family, self.capability)?;
                self.modules.borrow_mut().insert(family.name, module);
                module
            }
        };
        let symbol = CString::new(name).map_err(|_| Error::invalid("kernel", "its name has a zero"))?;
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is loaded until `drop`; `function` is a place for a function.
        #[allow(unsafe_code)]
        driver("cuModuleGetFunction", unsafe {
            sys::cuModuleGetFunction(&mut function, module, symbol.as_ptr())
        })?;
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
        self.functions.borrow_mut().insert(name.to_string(), function);
        Ok(function)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: nothing that a stream still has to do uses the modules: every stream holds the context, and waits for its
        // work when it is dropped. Errors leave nothing to be done.
        #[allow(unsafe_code)]
        unsafe {
            let _ = sys::cuCtxSetCurrent(self.handle);
            for module in self.modules.get_mut().values() {
                let _ = sys::cuModuleUnload(*module);
            }
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}
