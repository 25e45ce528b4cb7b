//! Kernels: shared objects that NVRTC's stand-in has compiled, and their launches.

use crate::memory::{self, Accessor};
use std::{
    ffi::{CStr, CString, c_char, c_uint, c_void},
    sync::Arc,
};

/// How an image begins; the path of a shared object follows.
pub const MAGIC: &str = "cuda-standin image ";

/// Runs a kernel: arguments, grid, block, bytes of dynamic shared memory.
type Body = unsafe extern "C" fn(*mut *mut c_void, *const c_uint, *const c_uint, c_uint);
/// The number of arguments, then for each its size, and in the upper half 1 for a pointer to const, 2 for another pointer.
type Signature = unsafe extern "C" fn() -> *const c_uint;

struct Function {
    name: String,
    body: Body,
    arguments: Vec<u32>,
}

/// Loads an image; 0 is no module.
pub fn load(image: &CStr) -> Option<usize> {
    let path = image.to_str().ok()?.strip_prefix(MAGIC)?;
    let path = CString::new(path).ok()?;
    // SAFETY: the object was compiled here; it has no initializers.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) } as usize;
    (handle != 0).then_some(handle)
}

/// A kernel of a module. It is never freed: handles stay valid, as a driver's do while the module is loaded.
pub fn find(module: usize, name: &CStr) -> Option<usize> {
    let symbol = |suffix: &str| {
        let name = CString::new([name.to_bytes(), suffix.as_bytes()].concat()).ok()?;
        // SAFETY: the module was loaded by `load`, and is never closed.
        let found = unsafe { libc::dlsym(module as *mut c_void, name.as_ptr()) };
        (!found.is_null()).then_some(found)
    };
    let (body, signature) = (symbol("__standin")?, symbol("__signature")?);
    // SAFETY: the shim defines these two for every kernel, with these types; the signature begins with its length.
    let (body, arguments) = unsafe {
        let signature = std::mem::transmute::<*mut c_void, Signature>(signature)();
        let count = *signature as usize;
        let arguments = std::slice::from_raw_parts(signature.add(1), count).to_vec();
        (std::mem::transmute::<*mut c_void, Body>(body), arguments)
    };
    let name = name.to_string_lossy().into_owned();
    Some(Box::into_raw(Box::new(Function { name, body, arguments })) as usize)
}

/// A kernel with its arguments, which are copied.
#[derive(Clone)]
pub struct Launch {
    function: &'static Function,
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared: c_uint,
    arguments: Arc<Vec<u64>>,
}

impl Launch {
    /// # Safety
    /// The function is one of `find`; there are as many pointers to arguments as it has.
    pub unsafe fn new(
        function: usize,
        grid: [c_uint; 3],
        block: [c_uint; 3],
        shared: c_uint,
        arguments: *mut *mut c_void,
    ) -> Self {
        // SAFETY: the caller's promise; functions are never freed.
        let function = unsafe { &*(function as *const Function) };
        let argument = |(at, kind): (usize, &u32)| {
            let mut word = [0_u8; 8];
            let size = (*kind & 0xffff) as usize;
            // SAFETY: the caller's promise. Arguments of these kernels are words of 8 bytes at most.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    (*arguments.add(at)).cast::<u8>(),
                    word.as_mut_ptr(),
                    size.min(8),
                );
            }
            u64::from_ne_bytes(word)
        };
        let arguments = function.arguments.iter().enumerate().map(argument).collect();
        Self { function, grid, block, shared, arguments: Arc::new(arguments) }
    }

    fn pointers(&self) -> impl Iterator<Item = (usize, bool)> + '_ {
        let pointers = self.function.arguments.iter().zip(self.arguments.iter());
        pointers
            .filter(|(kind, word)| *kind >> 16 != 0 && **word != 0)
            .map(|(kind, word)| (*word as usize, kind >> 16 == 2))
    }

    /// Memory that is read, and memory that is written, from the pointers on to the end of their allocations.
    pub fn judge(&self, who: &Accessor) -> Result<(), String> {
        self.pointers().try_for_each(|(address, write)| {
            let what = format!("kernel {}", self.function.name);
            match memory::to_end(address) {
                // A view of no elements may begin at the end.
                Some(size) => memory::access(who, address, size, write, &what),
                None => Err(format!("{what}: {address:#x} is not device memory")),
            }
        })
    }

    /// Runs all threads.
    pub fn run(&self) -> Result<(), String> {
        let mut words = self.arguments.to_vec();
        let mut pointers: Vec<*mut c_void> = words.iter_mut().map(|word| (word as *mut u64).cast()).collect();
        crash::announce(&self.function.name);
        // SAFETY: the arguments are as many and as large as the kernel's; what it does with them is what is tested.
        unsafe {
            (self.function.body)(pointers.as_mut_ptr(), self.grid.as_ptr(), self.block.as_ptr(), self.shared)
        };
        crash::over();
        match self.pointers().find(|(address, write)| *write && !memory::is_intact(*address)) {
            Some((address, _)) => Err(format!(
                "kernel {} has written behind the end of the memory at {address:#x}",
                self.function.name
            )),
            None => Ok(()),
        }
    }
}

/// A kernel that touches what is no memory of its own ends the process; here it is at least named.
mod crash {
    use super::c_char;
    use std::{cell::Cell, sync::Once};

    thread_local!(static NAME: Cell<(*const c_char, usize)> = const { Cell::new((std::ptr::null(), 0)) });

    extern "C" fn handler(_signal: libc::c_int) {
        let (name, len) = NAME.get();
        let write = |text: *const c_char, len: usize| {
            // SAFETY: write(2) may be called in a handler; the text lives as long as the kernel runs.
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
