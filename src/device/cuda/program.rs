//! Kernels from source to device. NVRTC compiles them for the GPU, and a cache on disk keeps the
//! compiled images.

use super::{
    families::{FAMILIES, Family},
    libraries::{self, Nvrtc},
    lock,
    status::{compiler, driver},
};
use crate::error::{Error, Result};
use cudarc::{
    driver::sys::{CUfunction, CUmodule, CUresult, cuDriverGetVersion, cuModuleLoadData},
    nvrtc::sys::{nvrtcProgram, nvrtcResult},
};
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    ffi::{CString, c_char, c_int},
    fs,
    panic::resume_unwind,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
};

/// The headers of the `.cu` files. A `.cu` file includes one of these headers, and `mma.cuh`
/// includes `element.cuh`.
const HEADERS: [(&str, &str); 2] = [
    ("#include \"mma.cuh\"", include_str!("../../../cuda/mma.cuh")),
    ("#include \"element.cuh\"", include_str!("../../../cuda/element.cuh")),
];

/// The compiled kernels of a family.
pub(super) struct Image {
    bytes: Vec<u8>,
    /// Whether the image was read from the cache.
    stored: bool,
}

/// Returns the images of all families, in the order of [`FAMILIES`]. The first caller compiles the
/// images that the cache does not have, and other callers wait. Makes no call to the driver.
pub(super) fn images(capability: (i32, i32)) -> Result<Arc<Vec<Image>>> {
    static IMAGES: Mutex<BTreeMap<(i32, i32), Arc<Vec<Image>>>> = Mutex::new(BTreeMap::new());
    let mut known = lock(&IMAGES);
    if let Some(images) = known.get(&capability) {
        return Ok(Arc::clone(images));
    }
    let images = Arc::new(in_parallel(|family| Image::new(family, capability, true))?);
    known.insert(capability, Arc::clone(&images));
    Ok(images)
}

/// Compiles all kernels for GPUs of a compute capability, such as `(9, 0)` for Hopper, and writes
/// them to the cache on disk (see [`crate::device::cuda`]). Returns the cache's folder.
///
/// No GPU and no driver is needed, so a build machine can fill the folder that `SHARDWISE_CACHE`
/// names. Another machine uses the kernels in that folder if its NVRTC has the same version and its
/// program was built from the same source.
///
/// # Errors
/// When NVRTC is missing or does not support the capability, or the cache's folder is unknown or
/// cannot be written.
pub fn precompile((major, minor): (u32, u32)) -> Result<PathBuf> {
    let capability = (major as i32, minor as i32);
    let folder = cache_folder();
    let folder =
        folder.ok_or_else(|| Error::invalid("the kernel cache", "no folder: set SHARDWISE_CACHE"))?;
    let images = images(capability)?;
    for (family, image) in FAMILIES.iter().zip(images.iter()) {
        let file = folder.join(Job::new(family, capability)?.file_name());
        if read(&file).is_none() {
            write(&file, &image.bytes).map_err(|error| {
                Error::invalid("the kernel cache", format!("{}: {error}", file.display()))
            })?;
        }
    }
    Ok(folder)
}

/// Calls a function for every family, on at most as many threads as there are processors.
fn in_parallel<R: Send>(work: impl Fn(&'static Family) -> Result<R> + Sync) -> Result<Vec<R>> {
    let next = AtomicUsize::new(0);
    let worker = || {
        let turns = std::iter::from_fn(|| FAMILIES.get(next.fetch_add(1, Relaxed)));
        turns.map(|family| (family.name, work(family))).collect::<Vec<_>>()
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).min(FAMILIES.len());
    let mut made: BTreeMap<_, _> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers
            .into_iter()
            .flat_map(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic)))
            .collect()
    });
    FAMILIES.iter().filter_map(|family| made.remove(family.name)).collect()
}

/// Loads a family's kernels into the current context.
pub(super) fn load(family: &Family, image: &Image, capability: (i32, i32)) -> Result<CUmodule> {
    match image.module().map_err(too_new) {
        // The cache may hold an image that only another driver accepts, so this compiles the family
        // again.
        Err(Error::Library { .. }) if image.stored => {
            Image::new(family, capability, false)?.module().map_err(too_new)
        }
        outcome => outcome,
    }
}

impl Image {
    /// Reads the image from the cache, if that is `allowed` and the cache has the image. Otherwise
    /// compiles the family and writes the image to the cache.
    fn new(family: &Family, capability: (i32, i32), allowed: bool) -> Result<Self> {
        let job = Job::new(family, capability)?;
        let file = cache_folder().map(|folder| folder.join(job.file_name()));
        if let Some(bytes) = file.as_deref().filter(|_| allowed).and_then(read) {
            return Ok(Self { bytes, stored: true });
        }
        let bytes = job.compile()?;
        if let Some(file) = &file {
            // If the cache cannot be written, the program works without it.
            let _ = write(file, &bytes);
        }
        Ok(Self { bytes, stored: false })
    }

    fn module(&self) -> Result<CUmodule> {
        // The driver reads PTX up to a zero byte, which is appended here. A cubin states its own
        // length.
        let bytes = [&self.bytes[..], &[0]].concat();
        let mut module = std::ptr::null_mut();
        // SAFETY: NVRTC made the image. It is complete, because `read` compared its hash, and a
        // zero follows it. The driver copies it. A context is current.
        #[allow(unsafe_code)]
        driver("cuModuleLoadData", unsafe { cuModuleLoadData(&mut module, bytes.as_ptr().cast()) })?;
        Ok(module)
    }
}

/// Loads a function, because a driver that loads lazily has only looked it up. Drivers before CUDA
/// 12.4 do not have `cuFuncLoad`, and load the function at the look-up.
pub(super) fn load_function(function: CUfunction) -> Result<()> {
    type Load = unsafe extern "C" fn(CUfunction) -> CUresult;
    static LOAD: OnceLock<Option<Load>> = OnceLock::new();
    let library = libraries::cuda()?;
    // SAFETY: `cuda.h` declares this type for `cuFuncLoad`, and the driver is never unloaded.
    #[allow(unsafe_code)]
    let load = *LOAD.get_or_init(|| unsafe { library.get::<Load>(b"cuFuncLoad").ok().map(|load| *load) });
    match load {
        // SAFETY: the function belongs to a loaded module, and a context is current.
        #[allow(unsafe_code)]
        Some(load) => driver("cuFuncLoad", unsafe { load(function) }),
        None => Ok(()),
    }
}

/// Explains a driver's error, if NVRTC is newer than the driver: a driver does not load the output
/// of a newer NVRTC. Otherwise returns `error` unchanged.
fn too_new(error: Error) -> Error {
    let (mut supported, mut major, mut minor) = (0, 0, 0);
    let Ok(nvrtc) = libraries::nvrtc() else { return error };
    // SAFETY: all three pointers are valid for writing an int.
    #[allow(unsafe_code)]
    let known = unsafe {
        cuDriverGetVersion(&mut supported) == CUresult::CUDA_SUCCESS
            && (nvrtc.version)(&mut major, &mut minor) == nvrtcResult::NVRTC_SUCCESS
    };
    if !known || supported >= 1000 * major + 10 * minor {
        return error;
    }
    let (first, second) = (supported / 1000, supported % 1000 / 10);
    let reason = format!(
        "version {major}.{minor} compiled kernels that the driver, which supports CUDA {first}.{second}, does not load ({error}): \
         a newer driver or an older NVRTC is needed"
    );
    Error::Unsupported { op: "NVRTC", reason }
}

/// Reads an image from a cache file. Returns none unless the hash at the file's start matches the
/// image.
fn read(file: &Path) -> Option<Vec<u8>> {
    let bytes = fs::read(file).ok()?;
    let (hash, image) = bytes.split_at_checked(32)?;
    (Sha256::digest(image)[..] == *hash).then(|| image.to_vec())
}

fn write(file: &Path, image: &[u8]) -> std::io::Result<()> {
    let folder = file.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    // The rename is atomic, so another process never reads a partial file.
    let partial = file.with_extension(format!("{}.part", std::process::id()));
    fs::write(&partial, [&Sha256::digest(image)[..], image].concat())?;
    fs::rename(&partial, file)
}

/// Returns `SHARDWISE_CACHE`, or else `shardwise` in the user's cache folder. Returns none if the
/// variable is empty, or if the user's cache folder is unknown.
fn cache_folder() -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if std::env::var_os("SHARDWISE_CACHE").is_some() {
        return folder("SHARDWISE_CACHE");
    }
    let user = folder("XDG_CACHE_HOME").or_else(|| folder("HOME").map(|home| home.join(".cache")));
    user.map(|cache| cache.join("shardwise"))
}

/// One compilation of a family.
struct Job<'a> {
    nvrtc: &'static Nvrtc,
    family: &'a Family,
    source: String,
    options: Vec<String>,
    /// Whether to compile to machine code. Otherwise the result is PTX.
    binary: bool,
    key: String,
}

impl<'a> Job<'a> {
    fn new(family: &'a Family, (major, minor): (i32, i32)) -> Result<Self> {
        let wanted = 10 * major + minor;
        let nvrtc = libraries::nvrtc()?;
        let known = architectures(nvrtc)?;
        // An NVRTC older than the GPU emits PTX for the newest architecture that it supports, and
        // the driver translates the PTX.
        let binary = known.contains(&wanted);
        let newest = known.iter().copied().filter(|&arch| arch <= wanted).max();
        let Some(newest) = newest else {
            let reason =
                format!("it compiles only for {known:?}, not for compute capability {major}.{minor}");
            return Err(Error::Unsupported { op: "NVRTC", reason });
        };
        let kind = if binary { "sm" } else { "compute" };
        let options = vec![
            format!("--gpu-architecture={kind}_{newest}"),
            "--std=c++17".to_string(),
            format!("--fmad={}", family.contracts),
        ];
        let source = HEADERS
            .iter()
            .fold(family.source.to_string(), |source, (include, header)| source.replacen(include, header, 1));
        let (mut first, mut second) = (0, 0);
        // SAFETY: both are valid for writing an int.
        #[allow(unsafe_code)]
        compiler("nvrtcVersion", unsafe { (nvrtc.version)(&mut first, &mut second) })?;
        let mut hash = Sha256::new();
        hash.update(format!("{first}.{second} {options:?} {source}"));
        let key = hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { nvrtc, family, source, options, binary, key })
    }

    /// Returns the name of the image's file in the cache.
    fn file_name(&self) -> String {
        format!("{}-{}.bin", self.family.name, self.key)
    }

    fn compile(&self) -> Result<Vec<u8>> {
        let text = |text: &str| {
            CString::new(text).map_err(|_| Error::invalid("NVRTC", "a text contains a zero byte"))
        };
        let (source, name) = (text(&self.source)?, text(&format!("{}.cu", self.family.name))?);
        let options = self.options.iter().map(|option| text(option)).collect::<Result<Vec<_>>>()?;
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let nvrtc = self.nvrtc;
        let mut program = Program { nvrtc, handle: std::ptr::null_mut() };
        // SAFETY: source and name are C strings that outlive the program, and no headers are
        // passed.
        #[allow(unsafe_code)]
        let code = unsafe {
            (nvrtc.create)(
                &mut program.handle,
                source.as_ptr(),
                name.as_ptr(),
                0,
                std::ptr::null(),
                std::ptr::null(),
            )
        };
        compiler("nvrtcCreateProgram", code)?;
        // SAFETY: `pointers` has the stated number of options, and each is a C string.
        #[allow(unsafe_code)]
        let code = unsafe { (nvrtc.compile)(program.handle, pointers.len() as c_int, pointers.as_ptr()) };
        if let Err(error) = compiler("nvrtcCompileProgram", code) {
            let log = program.bytes("nvrtcGetProgramLog", nvrtc.log_size, nvrtc.log)?;
            let log = String::from_utf8_lossy(&log);
            return Err(Error::invalid(
                "NVRTC",
                format!("{}.cu: {error}\n{}", self.family.name, log.trim_end_matches('\0')),
            ));
        }
        if self.binary {
            program.bytes("nvrtcGetCUBIN", nvrtc.cubin_size, nvrtc.cubin)
        } else {
            program.bytes("nvrtcGetPTX", nvrtc.ptx_size, nvrtc.ptx)
        }
    }
}

/// Returns the architectures that NVRTC supports, as 10 · major + minor.
fn architectures(nvrtc: &Nvrtc) -> Result<Vec<i32>> {
    let mut count = 0;
    // SAFETY: `count` is valid for writing an int.
    #[allow(unsafe_code)]
    compiler("nvrtcGetNumSupportedArchs", unsafe { (nvrtc.count_architectures)(&mut count) })?;
    let mut known = vec![0; usize::try_from(count).unwrap_or(0)];
    // SAFETY: `known` has room for the number of architectures that NVRTC returned.
    #[allow(unsafe_code)]
    compiler("nvrtcGetSupportedArchs", unsafe { (nvrtc.architectures)(known.as_mut_ptr()) })?;
    Ok(known)
}

struct Program {
    nvrtc: &'static Nvrtc,
    handle: nvrtcProgram,
}

impl Program {
    /// Returns a result of the program. The functions `size` and `get` return its size and its
    /// bytes.
    #[allow(unsafe_code)]
    fn bytes(
        &self,
        call: &'static str,
        size: unsafe extern "C" fn(nvrtcProgram, *mut usize) -> nvrtcResult,
        get: unsafe extern "C" fn(nvrtcProgram, *mut c_char) -> nvrtcResult,
    ) -> Result<Vec<u8>> {
        let mut len = 0;
        // SAFETY: `size` and `get` are a pair of NVRTC's functions, the program is live, and `len`
        // is valid for writing a size.
        compiler(call, unsafe { size(self.handle, &mut len) })?;
        let mut bytes = vec![0; len];
        // SAFETY: as above, and `bytes` has the size that NVRTC returned.
        compiler(call, unsafe { get(self.handle, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program was created, or its handle is null, which NVRTC rejects.
        #[allow(unsafe_code)]
        let _ = unsafe { (self.nvrtc.destroy)(&mut self.handle) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs only with the real NVRTC, which needs neither headers nor a GPU.
    #[test]
    fn nvrtc_compiles_every_family() {
        if let Err(error) = libraries::nvrtc() {
            println!("not run: {error}");
            return;
        }
        let images = in_parallel(|family| {
            let job = Job::new(family, (9, 0))?;
            assert!(job.binary);
            job.compile()
        });
        for (family, image) in FAMILIES.iter().zip(images.unwrap_or_else(|error| panic!("{error}"))) {
            for &(_, stem, elements) in family.kernels {
                for (first, second) in elements.all() {
                    let name = second
                        .map_or(format!("{stem}_{first}\0"), |second| format!("{stem}_{first}_{second}\0"));
                    let known = image.windows(name.len()).any(|window| window == name.as_bytes());
                    assert!(known, "{}: there is no {name}", family.name);
                }
            }
        }
        // The compiler does not know this GPU, so it emits PTX.
        let job = Job::new(&FAMILIES[8], (99, 9)).unwrap();
        assert!(!job.binary);
        assert!(job.compile().unwrap().starts_with(b"//"));
    }

    #[test]
    fn a_damaged_cache_is_no_cache() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("below").join("norm-0.bin");
        write(&file, b"image").unwrap();
        assert_eq!(read(&file).as_deref(), Some(&b"image"[..]));
        let mut bytes = fs::read(&file).unwrap();
        bytes.truncate(bytes.len() - 1);
        fs::write(&file, bytes).unwrap();
        assert_eq!(read(&file), None);
        fs::write(&file, b"short").unwrap();
        assert_eq!(read(&file), None);
        assert_eq!(fs::read_dir(file.parent().unwrap()).unwrap().count(), 1, "no partial file is left");
    }
}
