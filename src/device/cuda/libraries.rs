//! Finding NVIDIA's libraries before the first call into them.
//!
//! Each library is looked for here, also where pip and conda put it, and every function that is
//! used is asked for once: what is missing becomes an [`Error`] that says what was tried. The
//! driver's functions are called by way of bindings, which look on the loader's path alone and
//! panic where something is missing; NVRTC's and cuBLASLt's by way of tables, from the file found
//! here.

use super::status::{compiler, driver};
use crate::error::{Error, Result};
use cudarc::{
    cublaslt::sys::{self as lt, cublasStatus_t},
    driver::sys::{CUfunction, CUresult, cuDriverGetVersion},
    nvrtc::sys::{nvrtcProgram, nvrtcResult},
};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use std::{
    ffi::{c_char, c_int, c_void},
    fmt,
    path::{Path, PathBuf},
    sync::OnceLock,
};

/// A library, and what is needed of it.
struct Needed {
    /// Its name in messages.
    name: &'static str,
    /// File names, the best first.
    files: &'static [&'static str],
    /// How the names of files begin that it opens by itself, and does not find where it is if the loader does not.
    parts: Option<&'static str>,
    /// Where pip's packages have it, below `site-packages`.
    pip: &'static [&'static str],
    /// The functions that are called.
    functions: &'static [&'static str],
    /// What a user can do about it.
    advice: &'static str,
}

/// The driver, which comes with the GPU's kernel module and never from pip.
const DRIVER: Needed = Needed {
    name: "the CUDA driver",
    files: &["libcuda.so", "libcuda.so.1"],
    parts: None,
    pip: &[],
    functions: &[
        "cuInit",
        "cuDriverGetVersion",
        "cuDeviceGet",
        "cuDeviceGetCount",
        "cuDeviceGetName",
        "cuDeviceGetAttribute",
        "cuDeviceTotalMem_v2",
        "cuDevicePrimaryCtxRetain",
        "cuCtxSetCurrent",
        "cuCtxGetStreamPriorityRange",
        "cuStreamCreateWithPriority",
        "cuStreamDestroy_v2",
        "cuStreamSynchronize",
        "cuStreamWaitEvent",
        "cuEventCreate",
        "cuEventRecord",
        "cuEventQuery",
        "cuMemAllocAsync",
        "cuMemFreeAsync",
        "cuMemAllocHost_v2",
        "cuMemcpyHtoDAsync_v2",
        "cuMemcpyDtoHAsync_v2",
        "cuMemsetD8Async",
        "cuDeviceGetDefaultMemPool",
        "cuDeviceCanAccessPeer",
        "cuMemPoolSetAccess",
        "cuMemPoolSetAttribute",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuLaunchKernel",
        "cuFuncSetAttribute",
        "cuGetErrorString",
    ],
    advice: "a driver for CUDA 12 or later is needed",
};

/// Declares a table of functions: their names here, there, and their types.
macro_rules! table {
    ($(#[$doc:meta])* $table:ident { $($field:ident: $name:literal ($($argument:ty),*) $(-> $result:ty)?;)* }) => {
        $(#[$doc])*
        pub(super) struct $table {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
        }

        impl $table {
            const NAMES: &[&str] = &[$($name),*];

            /// The functions of a library, which stays loaded. It has them all.
            fn of(library: Library) -> Result<Self> {
                let missing = |error: libloading::Error| Error::invalid(stringify!($table), error.to_string());
                // SAFETY: the types are those that NVIDIA's headers declare for these names,
                // unchanged from CUDA 12.0 on.
                #[allow(unsafe_code)]
                let table = unsafe {
                    Self { $($field: *library.get($name.as_bytes()).map_err(missing)?,)* }
                };
                std::mem::forget(library);
                Ok(table)
            }
        }
    };
}

table! {
    /// The compiler of the kernels.
    Nvrtc {
        version: "nvrtcVersion" (*mut c_int, *mut c_int) -> nvrtcResult;
        count_architectures: "nvrtcGetNumSupportedArchs" (*mut c_int) -> nvrtcResult;
        architectures: "nvrtcGetSupportedArchs" (*mut c_int) -> nvrtcResult;
        create: "nvrtcCreateProgram" (
            *mut nvrtcProgram, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char
        ) -> nvrtcResult;
        compile: "nvrtcCompileProgram" (nvrtcProgram, c_int, *const *const c_char) -> nvrtcResult;
        destroy: "nvrtcDestroyProgram" (*mut nvrtcProgram) -> nvrtcResult;
        cubin_size: "nvrtcGetCUBINSize" (nvrtcProgram, *mut usize) -> nvrtcResult;
        cubin: "nvrtcGetCUBIN" (nvrtcProgram, *mut c_char) -> nvrtcResult;
        ptx_size: "nvrtcGetPTXSize" (nvrtcProgram, *mut usize) -> nvrtcResult;
        ptx: "nvrtcGetPTX" (nvrtcProgram, *mut c_char) -> nvrtcResult;
        log_size: "nvrtcGetProgramLogSize" (nvrtcProgram, *mut usize) -> nvrtcResult;
        log: "nvrtcGetProgramLog" (nvrtcProgram, *mut c_char) -> nvrtcResult;
        error_string: "nvrtcGetErrorString" (nvrtcResult) -> *const c_char;
    }
}

table! {
    /// Matrix products.
    CublasLt {
        version: "cublasLtGetVersion" () -> usize;
        status_string: "cublasLtGetStatusString" (cublasStatus_t) -> *const c_char;
        create: "cublasLtCreate" (*mut lt::cublasLtHandle_t) -> cublasStatus_t;
        matmul: "cublasLtMatmul" (
            lt::cublasLtHandle_t, lt::cublasLtMatmulDesc_t, *const c_void, *const c_void, lt::cublasLtMatrixLayout_t,
            *const c_void, lt::cublasLtMatrixLayout_t, *const c_void, *const c_void, lt::cublasLtMatrixLayout_t,
            *mut c_void, lt::cublasLtMatrixLayout_t, *const lt::cublasLtMatmulAlgo_t, *mut c_void, usize, lt::cudaStream_t
        ) -> cublasStatus_t;
        heuristic: "cublasLtMatmulAlgoGetHeuristic" (
            lt::cublasLtHandle_t, lt::cublasLtMatmulDesc_t, lt::cublasLtMatrixLayout_t, lt::cublasLtMatrixLayout_t,
            lt::cublasLtMatrixLayout_t, lt::cublasLtMatrixLayout_t, lt::cublasLtMatmulPreference_t, c_int,
            *mut lt::cublasLtMatmulHeuristicResult_t, *mut c_int
        ) -> cublasStatus_t;
        desc_create: "cublasLtMatmulDescCreate" (
            *mut lt::cublasLtMatmulDesc_t, lt::cublasComputeType_t, lt::cudaDataType_t
        ) -> cublasStatus_t;
        desc_destroy: "cublasLtMatmulDescDestroy" (lt::cublasLtMatmulDesc_t) -> cublasStatus_t;
        desc_set: "cublasLtMatmulDescSetAttribute" (
            lt::cublasLtMatmulDesc_t, lt::cublasLtMatmulDescAttributes_t, *const c_void, usize
        ) -> cublasStatus_t;
        preference_create: "cublasLtMatmulPreferenceCreate" (*mut lt::cublasLtMatmulPreference_t) -> cublasStatus_t;
        preference_destroy: "cublasLtMatmulPreferenceDestroy" (lt::cublasLtMatmulPreference_t) -> cublasStatus_t;
        preference_set: "cublasLtMatmulPreferenceSetAttribute" (
            lt::cublasLtMatmulPreference_t, lt::cublasLtMatmulPreferenceAttributes_t, *const c_void, usize
        ) -> cublasStatus_t;
        layout_create: "cublasLtMatrixLayoutCreate" (
            *mut lt::cublasLtMatrixLayout_t, lt::cudaDataType, u64, u64, i64
        ) -> cublasStatus_t;
        layout_destroy: "cublasLtMatrixLayoutDestroy" (lt::cublasLtMatrixLayout_t) -> cublasStatus_t;
        layout_set: "cublasLtMatrixLayoutSetAttribute" (
            lt::cublasLtMatrixLayout_t, lt::cublasLtMatrixLayoutAttribute_t, *const c_void, usize
        ) -> cublasStatus_t;
    }
}

const NVRTC: Needed = Needed {
    name: "NVRTC",
    files: &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"],
    parts: Some("libnvrtc-builtins.so"),
    pip: &["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"],
    functions: Nvrtc::NAMES,
    advice: "install CUDA 12 or later, or pip's nvidia-cuda-nvrtc",
};

const CUBLAS_LT: Needed = Needed {
    name: "cuBLASLt",
    files: &["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"],
    parts: None,
    pip: &["nvidia/cu13/lib", "nvidia/cublas/lib"],
    functions: CublasLt::NAMES,
    advice: "install CUDA 12 or later, or pip's nvidia-cublas",
};

/// The variable that names a folder in which all libraries are looked for first.
pub(crate) const FOLDER: &str = "SHARDWISE_CUDA_LIBRARIES";

/// The driver's library, which the bindings to it will find too.
pub(super) fn cuda() -> Result<&'static Library> {
    static FOUND: OnceLock<Result<Library>> = OnceLock::new();
    FOUND
        .get_or_init(|| DRIVER.open().and_then(|found| DRIVER.is_bound(found)))
        .as_ref()
        .map_err(Error::clone)
}

/// NVRTC's functions.
pub(super) fn nvrtc() -> Result<&'static Nvrtc> {
    static FOUND: OnceLock<Result<Nvrtc>> = OnceLock::new();
    FOUND
        .get_or_init(|| NVRTC.open().and_then(|(library, _)| Nvrtc::of(library)))
        .as_ref()
        .map_err(Error::clone)
}

/// cuBLASLt's functions.
pub(super) fn cublas_lt() -> Result<&'static CublasLt> {
    static FOUND: OnceLock<Result<CublasLt>> = OnceLock::new();
    FOUND
        .get_or_init(|| CUBLAS_LT.open().and_then(|(library, _)| CublasLt::of(library)))
        .as_ref()
        .map_err(Error::clone)
}

/// A library that this process has loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// What it is.
    pub library: &'static str,
    /// Its version, by its own account. The driver's is that of the CUDA it is for.
    pub version: String,
    /// Its file.
    pub path: PathBuf,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} ({})", self.library, self.version, self.path.display())
    }
}

/// The driver, NVRTC and cuBLASLt, loaded if they were not. NCCL's is [`crate::comm::nccl`]'s to
/// say.
pub fn versions() -> [Result<Version>; 3] {
    let of = |library, version, address: *const c_void| {
        let path = file_at(address as usize).unwrap_or_default();
        Version { library, version, path }
    };
    let driver = || {
        let mut version = 0;
        let library = cuda()?;
        // SAFETY: the function is there, and `version` is a place for an int; the symbol is only
        // looked up.
        #[allow(unsafe_code)]
        let address = unsafe {
            driver("cuDriverGetVersion", cuDriverGetVersion(&mut version))?;
            library.get::<*const c_void>(b"cuDriverGetVersion").map(|symbol| symbol.as_raw_ptr().cast_const())
        };
        let version = format!("{}.{}", version / 1000, version % 1000 / 10);
        Ok(of(DRIVER.name, version, address.unwrap_or(std::ptr::null())))
    };
    let compiler = || {
        let (nvrtc, mut major, mut minor) = (nvrtc()?, 0, 0);
        // SAFETY: both are places for an int.
        #[allow(unsafe_code)]
        compiler("nvrtcVersion", unsafe { (nvrtc.version)(&mut major, &mut minor) })?;
        Ok(of(NVRTC.name, format!("{major}.{minor}"), nvrtc.version as *const c_void))
    };
    let products = || {
        let lt = cublas_lt()?;
        // SAFETY: it takes nothing.
        #[allow(unsafe_code)]
        let version = unsafe { (lt.version)() };
        let version = format!("{}.{}.{}", version / 10_000, version % 10_000 / 100, version % 100);
        Ok(of(CUBLAS_LT.name, version, lt.version as *const c_void))
    };
    [driver(), compiler(), products()]
}

/// The file that is mapped at an address of this process.
pub(crate) fn file_at(address: usize) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    maps.lines().find_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let [start, end] = [start, end].map(|number| usize::from_str_radix(number, 16).ok());
        let inside = (start?..end?).contains(&address);
        inside.then(|| rest.find('/').map(|at| PathBuf::from(&rest[at..])))?
    })
}

/// Loads a function that a driver which loads lazily has only found. Drivers before CUDA 12.4 load
/// it when they find it, and have no call for this.
pub(super) fn load_function(function: CUfunction) -> Result<()> {
    type Load = unsafe extern "C" fn(CUfunction) -> CUresult;
    static LOAD: OnceLock<Option<Load>> = OnceLock::new();
    let library = cuda()?;
    // SAFETY: the type is that of `cuFuncLoad` in `cuda.h`; the driver is never unloaded.
    #[allow(unsafe_code)]
    let load = *LOAD.get_or_init(|| unsafe { library.get::<Load>(b"cuFuncLoad").ok().map(|load| *load) });
    match load {
        // SAFETY: the function was found in a loaded module; a context is current.
        #[allow(unsafe_code)]
        Some(load) => driver("cuFuncLoad", unsafe { load(function) }),
        None => Ok(()),
    }
}

impl Needed {
    /// The library, which has all functions, and where it was found.
    fn open(&self) -> Result<(Library, PathBuf)> {
        let mut tried = Vec::new();
        for place in self.places() {
            // SAFETY: NVIDIA's libraries have initializers without preconditions; what is loaded is what the user's paths
            // name as such a library.
            #[allow(unsafe_code)]
            let library = match unsafe { Library::open(Some(&place), RTLD_NOW | RTLD_LOCAL) } {
                Ok(library) => library,
                Err(error) => {
                    tried.push(format!("{} ({error})", place.display()));
                    continue;
                }
            };
            for function in self.functions {
                // SAFETY: the symbol is only looked up, not called.
                #[allow(unsafe_code)]
                let known = unsafe { library.get::<*const ()>(function.as_bytes()) }.is_ok();
                if !known {
                    let reason = format!("{} has no {function}: {}", place.display(), self.advice);
                    return Err(Error::Unsupported { op: self.name, reason });
                }
            }
            self.load_parts(&place);
            return Ok((library, place));
        }
        let reason = format!(
            "it was not found: {}; {FOLDER} may name its folder; not in the Pythons and toolkits at hand; tried {}",
            self.advice,
            tried.join(", ")
        );
        Err(Error::Unsupported { op: self.name, reason })
    }

    /// The library, if the bindings get the same: they ask the loader, which knows a library by the
    /// name in it once it is loaded.
    fn is_bound(&self, (library, place): (Library, PathBuf)) -> Result<Library> {
        let function = self.functions.first().copied().unwrap_or_default();
        // SAFETY: the symbol is only looked up.
        #[allow(unsafe_code)]
        let address = |library: &Library| unsafe {
            library.get::<*const ()>(function.as_bytes()).map(|symbol| symbol.as_raw_ptr()).ok()
        };
        // SAFETY: as in `open`.
        #[allow(unsafe_code)]
        let first = self.files.iter().find_map(|file| unsafe { Library::open(Some(*file), RTLD_NOW).ok() });
        if first.is_some_and(|first| address(&first) == address(&library)) {
            return Ok(library);
        }
        let reason = format!(
            "{} is there, but the loader has another for {}: put the folder first in LD_LIBRARY_PATH",
            place.display(),
            self.files.join(" or "),
        );
        Err(Error::Unsupported { op: self.name, reason })
    }

    /// Loads the parts that lie beside the library: once they are loaded, the loader knows them by their names.
    fn load_parts(&self, place: &Path) {
        let Some(parts) = self.parts else { return };
        let folder = place.parent().filter(|folder| !folder.as_os_str().is_empty());
        let files = folder.and_then(|folder| folder.read_dir().ok()).into_iter().flatten().flatten();
        for file in files.filter(|file| file.file_name().to_string_lossy().starts_with(parts)) {
            // SAFETY: as in `open`. What fails here, the library itself will say.
            #[allow(unsafe_code)]
            if let Ok(part) = unsafe { Library::open(Some(file.path()), RTLD_NOW | RTLD_LOCAL) } {
                std::mem::forget(part);
            }
        }
    }

    /// Where the library may be: in the folder that the user names; on the loader's path; where pip and conda put it; in a toolkit.
    ///
    /// The folders of `LD_LIBRARY_PATH` are looked into one by one: pip's packages have versioned
    /// names alone, and a toolkit that the loader knows besides would have the name without a
    /// version.
    fn places(&self) -> Vec<PathBuf> {
        let in_folder = |folder: &Path| {
            self.files.iter().map(|file| folder.join(file)).filter(|path| path.exists()).collect::<Vec<_>>()
        };
        let mut places =
            std::env::var_os(FOLDER).map_or_else(Vec::new, |folder| in_folder(Path::new(&folder)));
        let named = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
        let folders = std::env::split_paths(&named).filter(|folder| !folder.as_os_str().is_empty());
        places.extend(folders.flat_map(|folder| in_folder(&folder)));
        places.extend(self.files.iter().map(PathBuf::from));
        for lib in python_folders() {
            places.extend(in_folder(&lib));
            for site in sites(&lib) {
                places.extend(self.pip.iter().flat_map(|folder| in_folder(&site.join(folder))));
            }
        }
        let toolkits = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
        for toolkit in toolkits.chain(["/usr/local/cuda".into()]) {
            places.extend(in_folder(&toolkit.join("lib64")));
        }
        places
    }
}

/// The `lib` folders of the Python environments at hand: the active one, the user's, the system's.
pub(crate) fn python_folders() -> impl Iterator<Item = PathBuf> {
    let active = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let user = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local"));
    let system = ["/usr/local", "/usr"].map(PathBuf::from);
    active.chain(user).chain(system).map(|prefix| prefix.join("lib"))
}

/// Where the packages of the Pythons of such a folder are.
pub(crate) fn sites(lib: &Path) -> impl Iterator<Item = PathBuf> {
    let named =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python"));
    let pythons = lib.read_dir().into_iter().flatten().flatten().map(|entry| entry.path()).filter(named);
    pythons.flat_map(|python| ["site-packages", "dist-packages"].map(|packages| python.join(packages)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_an_error_that_says_where_it_was_looked_for() {
        const NOTHING: Needed = Needed {
            name: "nothing",
            files: &["libshardwise-nothing.so"],
            parts: None,
            pip: &["nvidia/nothing/lib"],
            functions: &[],
            advice: "install nothing",
        };
        let error = NOTHING.open().unwrap_err().to_string();
        assert!(error.starts_with("nothing: not supported: it was not found: install nothing"), "{error}");
        assert!(error.contains(FOLDER) && error.contains("libshardwise-nothing.so ("), "{error}");
    }

    #[test]
    fn packages_of_every_python_of_a_folder_are_looked_into() {
        let lib = tempfile::tempdir().unwrap();
        let site = lib.path().join("python3.11/site-packages");
        std::fs::create_dir_all(site.join("nvidia/cu13/lib")).unwrap();
        std::fs::create_dir_all(lib.path().join("perl5/site-packages")).unwrap();
        let all: Vec<_> = sites(lib.path()).collect();
        assert_eq!(all, [site, lib.path().join("python3.11/dist-packages")]);
        assert_eq!(sites(&lib.path().join("none")).count(), 0);
    }

    #[test]
    fn a_library_without_a_function_is_named_with_it() {
        const OLD: Needed = Needed {
            name: "an old library",
            files: &["libc.so.6"],
            parts: None,
            pip: &[],
            functions: &["malloc", "no_such_function"],
            advice: "a newer one is needed",
        };
        let error = OLD.open().unwrap_err().to_string();
        assert!(error.contains("libc.so.6 has no no_such_function: a newer one is needed"), "{error}");
    }
}
