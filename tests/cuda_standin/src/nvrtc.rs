//! The exported entry points of `libnvrtc`: g++ compiles the source as C++ through a header
//! (`shim/`).

use crate::{kernel::MAGIC, shared, stream::lock};
use std::{
    collections::HashMap,
    ffi::{CStr, CString, c_char, c_int},
    fmt::Write as _,
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    io,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

const SHIM: &str = include_str!("../shim/cuda.h");
const SUCCESS: c_int = 0;
const INVALID_INPUT: c_int = 3;
const INVALID_PROGRAM: c_int = 4;
const COMPILATION: c_int = 6;

#[derive(Default)]
struct Program {
    source: String,
    image: Option<CString>,
    log: CString,
}

static PROGRAMS: Mutex<(usize, Option<HashMap<usize, Program>>)> = Mutex::new((0, None));

fn with<R>(program: usize, f: impl FnOnce(&mut Program) -> R) -> Option<R> {
    lock(&PROGRAMS).1.as_mut().and_then(|all| all.get_mut(&program)).map(f)
}

/// The folder of compiled kernels: `CUDA_STANDIN_CACHE`, or a temporary folder.
fn folder() -> PathBuf {
    std::env::var_os("CUDA_STANDIN_CACHE")
        .map_or_else(|| std::env::temp_dir().join("cuda-standin"), PathBuf::from)
}

fn gcc(arguments: &[&str], input: &Path, output: &Path) -> io::Result<Result<(), String>> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
    let out = Command::new(compiler).args(arguments).arg("-o").arg(output).arg(input).output()?;
    Ok(if out.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&out.stderr).into_owned()) })
}

/// The kernels in a preprocessed source: their names and launch bounds.
fn kernels(source: &str) -> Vec<(&str, Option<&str>)> {
    source
        .split("STANDIN_KERNEL void ")
        .skip(1)
        .filter_map(|rest| match rest.trim_start().strip_prefix("STANDIN_BOUNDS(") {
            Some(rest) => {
                let mut depth = 1;
                let end = rest.find(|c| {
                    depth += i32::from(c == '(') - i32::from(c == ')');
                    depth == 0
                })?;
                Some((rest[end + 1..].split('(').next()?.trim(), Some(&rest[..end])))
            }
            None => Some((rest.split('(').next()?.trim(), None)),
        })
        .collect()
}

/// The shared object of a source; `Err` is the compiler's log.
fn compile(source: &str) -> io::Result<Result<PathBuf, String>> {
    let mut hasher = DefaultHasher::new();
    (source, SHIM).hash(&mut hasher);
    let (folder, key) = (folder(), hasher.finish());
    let object = folder.join(format!("{key:016x}.so"));
    if object.exists() {
        return Ok(Ok(object));
    }
    fs::create_dir_all(&folder)?;
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let work =
        folder.join(format!("{key:016x}.{}.{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
    fs::create_dir_all(&work)?;
    let (shim, raw, plain) = (work.join("cuda.h"), work.join("kernels.cpp"), work.join("plain.cpp"));
    fs::write(&shim, SHIM)?;
    fs::write(&raw, format!("#include \"cuda.h\"\n#line 1 \"kernels.cu\"\n{source}"))?;
    let outcome = (|| {
        if let Err(log) = gcc(&["-E", "-P", "-std=c++17"], &raw, &plain)? {
            return Ok(Err(log));
        }
        let mut text = fs::read_to_string(&plain)?;
        let mut launchers = String::new();
        for (kernel, bounds) in kernels(&text) {
            let threads = bounds.map_or("1024".into(), |bounds| format!("standin::first({bounds})"));
            let _ = writeln!(
                launchers,
                "extern \"C\" const unsigned {kernel}__threads = {threads};\n\
                 extern \"C\" void {kernel}__standin(void** a, const unsigned* g, const unsigned* b, unsigned s, standin::Spans t) {{ standin::launch(&standin::Thunk<&{kernel}>::body, a, g, b, s, t); }}\n\
                 extern \"C\" const unsigned* {kernel}__signature() {{ return standin::Thunk<&{kernel}>::signature; }}"
            );
        }
        let names: Vec<_> = kernels(&text).into_iter().map(|(name, _)| name.to_string()).collect();
        text.push_str(&launchers);
        fs::write(&plain, format!("#define STANDIN_KERNEL\n#define STANDIN_BOUNDS(...)\n{text}"))?;
        let (assembly, built) = (work.join("kernels.s"), work.join("kernels.so"));
        // The shim implements the sanitizer's calls, which record what a kernel reads and writes.
        let options = [
            "-S",
            "-O2",
            "-std=c++17",
            "-fPIC",
            "-w",
            "-fno-gnu-unique",
            "-fno-strict-aliasing",
            "-fsanitize=thread",
            "--param=tsan-instrument-func-entry-exit=0",
        ];
        if let Err(log) = gcc(&options, &plain, &assembly)? {
            return Ok(Err(log));
        }
        let code = fs::read_to_string(&assembly)?;
        fs::write(&assembly, format!("{code}{}", shared::sizes(&code, &names)))?;
        if let Err(log) = gcc(&["-shared", "-ldl"], &assembly, &built)? {
            return Ok(Err(log));
        }
        // Another process may have compiled the same object first.
        fs::rename(&built, &object)?;
        Ok(Ok(object))
    })();
    let _ = fs::remove_dir_all(&work);
    outcome
}

/// # Safety
/// As NVRTC's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcVersion(major: *mut c_int, minor: *mut c_int) -> c_int {
    // SAFETY: the caller's places.
    unsafe { (*major, *minor) = (13, 0) };
    SUCCESS
}

/// # Safety
/// As NVRTC's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetNumSupportedArchs(count: *mut c_int) -> c_int {
    // SAFETY: the caller's place.
    unsafe { *count = 3 };
    SUCCESS
}

/// # Safety
/// As NVRTC's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcGetSupportedArchs(archs: *mut c_int) -> c_int {
    // SAFETY: the caller has room for as many as were counted.
    unsafe { std::slice::from_raw_parts_mut(archs, 3) }.copy_from_slice(&[80, 90, 100]);
    SUCCESS
}

/// # Safety
/// As NVRTC's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcCreateProgram(
    out: *mut usize,
    source: *const c_char,
    _name: *const c_char,
    headers: c_int,
    _sources: *const *const c_char,
    _names: *const *const c_char,
) -> c_int {
    if out.is_null() || source.is_null() || headers != 0 {
        return INVALID_INPUT;
    }
    // SAFETY: the caller's string ends with a zero.
    let source = unsafe { CStr::from_ptr(source) }.to_string_lossy().into_owned();
    let mut programs = lock(&PROGRAMS);
    programs.0 += 1;
    let handle = programs.0;
    programs.1.get_or_insert_default().insert(handle, Program { source, ..Program::default() });
    // SAFETY: the caller's place.
    unsafe { *out = handle };
    SUCCESS
}

/// # Safety
/// As NVRTC's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcDestroyProgram(program: *mut usize) -> c_int {
    // SAFETY: the caller's handle.
    let known = lock(&PROGRAMS).1.as_mut().and_then(|all| all.remove(unsafe { &*program }));
    if known.is_some() { SUCCESS } else { INVALID_PROGRAM }
}

/// # Safety
/// As NVRTC's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvrtcCompileProgram(
    program: usize,
    _count: c_int,
    _options: *const *const c_char,
) -> c_int {
    let Some(source) = with(program, |program| program.source.clone()) else { return INVALID_PROGRAM };
    let (code, image, log) = match compile(&source) {
        Ok(Ok(object)) => (SUCCESS, CString::new(format!("{MAGIC}{}", object.display())).ok(), String::new()),
        Ok(Err(log)) => (COMPILATION, None, log),
        Err(error) => (COMPILATION, None, format!("g++ is needed to run kernels without a GPU: {error}")),
    };
    with(program, |program| {
        program.image = image;
        program.log = CString::new(log).unwrap_or_default();
    });
    code
}

/// Writes a text's length including the zero, or the text itself.
unsafe fn give(text: Option<CString>, size: *mut usize, to: *mut c_char) -> c_int {
    let Some(text) = text else { return INVALID_PROGRAM };
    let bytes = text.as_bytes_with_nul();
    // SAFETY: one of the two is the caller's place, the text's as long as was said.
    unsafe {
        if !size.is_null() {
            *size = bytes.len();
        }
        if !to.is_null() {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.cast(), bytes.len());
        }
    }
    SUCCESS
}

macro_rules! results {
    ($($size:ident, $get:ident, $field:expr;)*) => {$(
        /// # Safety
        /// As NVRTC's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $size(program: usize, size: *mut usize) -> c_int {
            // SAFETY: the caller's place.
            unsafe { give(with(program, $field).flatten(), size, std::ptr::null_mut()) }
        }
        /// # Safety
        /// As NVRTC's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $get(program: usize, to: *mut c_char) -> c_int {
            // SAFETY: the caller's place, as long as was said.
            unsafe { give(with(program, $field).flatten(), std::ptr::null_mut(), to) }
        }
    )*};
}

results! {
    nvrtcGetCUBINSize, nvrtcGetCUBIN, |program| program.image.clone();
    nvrtcGetPTXSize, nvrtcGetPTX, |program| program.image.clone();
    nvrtcGetProgramLogSize, nvrtcGetProgramLog, |program| Some(program.log.clone());
}

#[unsafe(no_mangle)]
pub extern "C" fn nvrtcGetErrorString(code: c_int) -> *const c_char {
    let text = match code {
        SUCCESS => c"NVRTC_SUCCESS",
        INVALID_INPUT => c"NVRTC_ERROR_INVALID_INPUT",
        INVALID_PROGRAM => c"NVRTC_ERROR_INVALID_PROGRAM",
        COMPILATION => c"NVRTC_ERROR_COMPILATION",
        _ => c"NVRTC_ERROR_UNKNOWN",
    };
    text.as_ptr()
}
