//! Kernels: shared objects compiled by NVRTC's stand-in, and their launches.

use crate::{
    error::{self, Code, INVALID_HANDLE, INVALID_VALUE, NOT_FOUND},
    memory::{self, Accessor, Bounds, Loan},
    stream::lock,
};
use std::{
    collections::{BTreeMap, HashMap},
    ffi::{CStr, CString, c_char, c_int, c_uint, c_void},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering::SeqCst},
    },
};

/// The start of an image; the path of a shared object follows.
pub const MAGIC: &str = "cuda-standin image ";

/// The shared memory that a block may have by default, and on request.
const SHARED: u32 = 48 << 10;
const SHARED_OPT_IN: u32 = 232_448;

/// Runs a kernel: arguments, grid, block, bytes of dynamic shared memory, and where to record its
/// accesses.
type Body = unsafe extern "C" fn(*mut *mut c_void, *const c_uint, *const c_uint, c_uint, Spans);

/// An allocation with the space around it, and the ranges read and written there, from the first
/// byte to the end of the last.
#[repr(C)]
struct Span {
    place: [usize; 2],
    seen: [[usize; 2]; 2],
}

#[repr(C)]
struct Spans {
    first: *mut Span,
    count: usize,
}

/// The number of arguments, then for each its size, with 1 in the upper half for a pointer to const
/// and 2 for another pointer.
type Signature = unsafe extern "C" fn() -> *const c_uint;

/// A module of one device's context.
struct Module {
    object: *mut c_void,
    device: usize,
    is_loaded: AtomicBool,
    functions: Mutex<HashMap<CString, usize>>,
}

// SAFETY: the object's handle is only handed to `dlsym`, which any thread may call.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

struct Modules {
    /// The last handle that was given out; handles are not reused.
    last: usize,
    loaded: BTreeMap<usize, Arc<Module>>,
}

static MODULES: Mutex<Modules> = Mutex::new(Modules { last: 0, loaded: BTreeMap::new() });

/// Loads an image for a device and returns its handle.
pub fn load(image: &CStr, device: usize) -> Option<usize> {
    let path = image.to_str().ok()?.strip_prefix(MAGIC)?;
    let path = CString::new(path).ok()?;
    // SAFETY: the object was compiled here; it has no initializers.
    let object = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if object.is_null() {
        return None;
    }
    let module = Module { object, device, is_loaded: AtomicBool::new(true), functions: Mutex::default() };
    let mut modules = lock(&MODULES);
    modules.last += 1;
    let handle = modules.last;
    modules.loaded.insert(handle, Arc::new(module));
    Some(handle)
}

/// Unloads a module, whose functions may no longer be used.
pub fn unload(handle: usize) -> Option<()> {
    let module = lock(&MODULES).loaded.remove(&handle)?;
    module.is_loaded.store(false, SeqCst);
    Some(())
}

/// Unloads all modules of a device.
pub fn unload_all(device: usize) {
    lock(&MODULES).loaded.retain(|_, module| {
        module.is_loaded.store(module.device != device, SeqCst);
        module.device != device
    });
}

/// A kernel of a module. It is never freed, so that a use after an unload is found.
pub struct Function {
    name: String,
    body: Body,
    arguments: Vec<u32>,
    module: Arc<Module>,
    /// The bytes of shared memory that it declares.
    declared: u32,
    /// The bytes that a launch may request in addition.
    dynamic: AtomicU32,
    /// The number of threads per block that it was compiled for.
    threads: u32,
    is_loaded: AtomicBool,
}

/// A kernel of a module.
pub fn find(handle: usize, name: &CStr) -> Result<usize, Code> {
    let module = lock(&MODULES).loaded.get(&handle).cloned().ok_or(INVALID_HANDLE)?;
    let mut functions = lock(&module.functions);
    if let Some(function) = functions.get(name) {
        return Ok(*function);
    }
    let function = Function::new(Arc::clone(&module), name).ok_or(NOT_FOUND)?;
    let function = Box::into_raw(Box::new(function)) as usize;
    functions.insert(name.to_owned(), function);
    Ok(function)
}

/// The function of a handle, if its module is still loaded.
pub fn function(handle: usize) -> Result<&'static Function, Code> {
    if handle == 0 {
        return Err(INVALID_HANDLE);
    }
    // SAFETY: handles are boxes of `find`, which are never freed.
    let function = unsafe { &*(handle as *const Function) };
    if !function.module.is_loaded.load(SeqCst) {
        error::report(format!("kernel {} is used, but its module was unloaded", function.name));
        return Err(INVALID_HANDLE);
    }
    Ok(function)
}

impl Function {
    /// Whether this is the first use, which loads the kernel unless it was loaded with its module.
    pub fn is_first_use(&self) -> bool {
        !self.is_loaded.swap(true, SeqCst)
    }

    fn new(module: Arc<Module>, name: &CStr) -> Option<Self> {
        let symbol = |suffix: &str| {
            let name = CString::new([name.to_bytes(), suffix.as_bytes()].concat()).ok()?;
            // SAFETY: the object was opened by `load`, and is never closed.
            let found = unsafe { libc::dlsym(module.object, name.as_ptr()) };
            (!found.is_null()).then_some(found)
        };
        // SAFETY: NVRTC's stand-in defines these for every kernel, with these types; the signature
        // begins with its length.
        let (body, arguments, declared, threads) = unsafe {
            let body = std::mem::transmute::<*mut c_void, Body>(symbol("__standin")?);
            let signature = std::mem::transmute::<*mut c_void, Signature>(symbol("__signature")?)();
            let arguments = std::slice::from_raw_parts(signature.add(1), *signature as usize).to_vec();
            (body, arguments, *symbol("__shared")?.cast::<u32>(), *symbol("__threads")?.cast::<u32>())
        };
        let name = name.to_string_lossy().into_owned();
        let dynamic = AtomicU32::new(SHARED.saturating_sub(declared));
        Some(Self {
            name,
            body,
            arguments,
            module,
            declared,
            dynamic,
            threads,
            is_loaded: AtomicBool::new(false),
        })
    }

    pub fn device(&self) -> usize {
        self.module.device
    }

    /// `cuFuncSetAttribute`.
    pub fn set(&self, attribute: c_int, value: c_int) -> Result<(), Code> {
        match attribute {
            8 => {
                let value = u32::try_from(value).map_err(|_| INVALID_VALUE)?;
                if value.saturating_add(self.declared) > SHARED_OPT_IN {
                    return Err(INVALID_VALUE);
                }
                self.dynamic.store(value, SeqCst);
                Ok(())
            }
            // A preference in percent, or -1 for the driver's choice.
            9 if (-1..=100).contains(&value) => Ok(()),
            _ => Err(INVALID_VALUE),
        }
    }

    /// `cuFuncGetAttribute`, for the known attributes (registers are not known).
    pub fn get(&self, attribute: c_int) -> Result<c_int, Code> {
        match attribute {
            0 => Ok(self.threads as c_int),
            1 => Ok(self.declared as c_int),
            8 => Ok(self.dynamic.load(SeqCst) as c_int),
            9 => Ok(-1),
            _ => Err(INVALID_VALUE),
        }
    }

    /// Whether a device can run this launch.
    pub fn fits(&self, grid: [c_uint; 3], block: [c_uint; 3], shared: c_uint) -> Result<(), Code> {
        let threads: u64 = block.iter().map(|&side| u64::from(side)).product();
        let is_grid = grid[0] != 0
            && grid[0] <= i32::MAX as u32
            && grid[1..].iter().all(|side| (1..=65_535).contains(side));
        let is_block = threads != 0 && threads <= u64::from(self.threads) && block[2] <= 64;
        if is_grid && is_block && shared <= self.dynamic.load(SeqCst) { Ok(()) } else { Err(INVALID_VALUE) }
    }
}

/// A kernel with a copy of its arguments.
#[derive(Clone)]
pub struct Launch {
    function: &'static Function,
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared: c_uint,
    arguments: Arc<Vec<u64>>,
    /// The allocations that its pointers point into, without duplicates.
    memory: Arc<Vec<Bounds>>,
}

impl Launch {
    /// `Err` is an address outside the device's memory.
    ///
    /// # Safety
    /// There are as many pointers to arguments as the function has.
    pub unsafe fn new(
        function: &'static Function,
        grid: [c_uint; 3],
        block: [c_uint; 3],
        shared: c_uint,
        arguments: *mut *mut c_void,
    ) -> Result<Self, String> {
        let argument = |(at, kind): (usize, &u32)| {
            let mut value = [0_u8; 8];
            let size = (*kind & 0xffff) as usize;
            // SAFETY: the caller's promise. Arguments of these kernels have 8 bytes at most.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    (*arguments.add(at)).cast::<u8>(),
                    value.as_mut_ptr(),
                    size.min(8),
                );
            }
            u64::from_ne_bytes(value)
        };
        let arguments: Vec<u64> = function.arguments.iter().enumerate().map(argument).collect();
        let pointers = function
            .arguments
            .iter()
            .zip(&arguments)
            .filter(|(kind, value)| *kind >> 16 != 0 && **value != 0);
        let mut memory: Vec<Bounds> = Vec::new();
        for (_, &address) in pointers {
            // A view without elements may begin at the end.
            let bounds = memory::bounds(address as usize)
                .ok_or_else(|| format!("kernel {}: {address:#x} is not device memory", function.name))?;
            if memory.iter().all(|known| known.start != bounds.start) {
                memory.push(bounds);
            }
        }
        let (arguments, memory) = (Arc::new(arguments), Arc::new(memory));
        Ok(Self { function, grid, block, shared, arguments, memory })
    }

    /// Checks that its memory exists. Its accesses are checked once they are known: the result runs
    /// the kernel and returns what is wrong.
    pub fn prepare(
        &self,
        who: &Accessor,
    ) -> Result<impl FnOnce() -> Result<(), String> + Send + 'static, String> {
        let what = format!("kernel {}", self.function.name);
        let lend = |bounds: &Bounds| memory::lend(who, bounds.clone(), &what);
        let loans = self.memory.iter().map(lend).collect::<Result<Vec<_>, _>>()?;
        let launch = self.clone();
        Ok(move || launch.run(loans))
    }

    /// Runs all threads.
    fn run(&self, loans: Vec<Loan>) -> Result<(), String> {
        let mut values = self.arguments.to_vec();
        let mut pointers: Vec<*mut c_void> =
            values.iter_mut().map(|value| (value as *mut u64).cast()).collect();
        let span = |loan: &Loan| Span { place: loan.bounds.place(), seen: [[usize::MAX, 0]; 2] };
        let mut seen: Vec<Span> = loans.iter().map(span).collect();
        crash::announce(&self.function.name);
        let spans = Spans { first: seen.as_mut_ptr(), count: seen.len() };
        // SAFETY: the arguments are as many and as large as the kernel's, and the spans live; what
        // it does with its memory is what is tested.
        unsafe {
            let (grid, block) = (self.grid.as_ptr(), self.block.as_ptr());
            (self.function.body)(pointers.as_mut_ptr(), grid, block, self.shared, spans);
        }
        crash::over();
        let mut outcome = Ok(());
        for (loan, span) in loans.into_iter().zip(seen) {
            let [read, written] = span.seen.map(|[from, to]| from..to);
            let intact = loan.bounds.is_intact();
            let overwrite = format!(
                "kernel {} has written next to the memory at {:#x}",
                self.function.name, loan.bounds.start
            );
            let settled = memory::settle(loan, read, written);
            outcome = outcome.and(if intact { settled } else { Err(overwrite) });
        }
        outcome
    }
}

/// An access outside of all allocations ends the process; this names the kernel first.
mod crash {
    use super::c_char;
    use std::{cell::Cell, sync::Once};

    thread_local!(static NAME: Cell<(*const c_char, usize)> = const { Cell::new((std::ptr::null(), 0)) });

    extern "C" fn handler(_signal: libc::c_int) {
        let (name, len) = NAME.get();
        let write = |text: *const c_char, len: usize| {
            // SAFETY: write(2) may be called in a handler; the text lives as long as the kernel
            // runs.
            let _ = unsafe { libc::write(2, text.cast(), len) };
        };
        let said = c"cuda stand-in: memory that is not there was touched, in kernel ";
        write(said.as_ptr(), said.count_bytes());
        if !name.is_null() {
            write(name, len);
        }
        write(c"\n".as_ptr(), 1);
        // SAFETY: ends the process as the signal would have.
        unsafe {
            libc::signal(libc::SIGSEGV, libc::SIG_DFL);
            libc::raise(libc::SIGSEGV);
        }
    }

    pub(super) fn announce(name: &str) {
        static ONCE: Once = Once::new();
        // SAFETY: the handler calls nothing but write, signal and raise.
        ONCE.call_once(|| unsafe {
            libc::signal(libc::SIGSEGV, handler as *const () as libc::sighandler_t);
        });
        NAME.set((name.as_ptr().cast(), name.len()));
    }

    pub(super) fn over() {
        NAME.set((std::ptr::null(), 0));
    }
}
