//! Finds and loads NVIDIA's libraries before the first call into them.
//!
//! This module searches for each library, also in the folders of pip and conda. It checks that the
//! library has every function in use. If something is missing, the [`Error`] lists the searched
//! places. Calls of the driver go through the `cudarc` bindings, which search only the loader's
//! path and panic if something is missing. Calls of NVRTC and cuBLASLt go through tables of
//! functions of the files that this module has found.

use crate::error::{Error, Result};
use cudarc::{
    cublaslt::sys::{self as lt, cublasStatus_t},
    nvrtc::sys::{nvrtcProgram, nvrtcResult},
};
use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use std::{
    ffi::{c_char, c_int, c_void},
    path::{Path, PathBuf},
    sync::OnceLock,
};

/// A library, with its file names and the functions that it has to have.
pub(super) struct Needed {
    /// The library's name in messages.
    pub(super) name: &'static str,
    /// The library's file names, the preferred one first.
    files: &'static [&'static str],
    /// The prefix of the file names of the library's dependencies. The library opens these files
    /// itself, but searches only the loader's path for them.
    dependencies: Option<&'static str>,
    /// The folders of pip's packages, below `site-packages`.
    pip: &'static [&'static str],
    /// The functions in use.
    functions: &'static [&'static str],
    /// The advice for a user who does not have the library.
    advice: &'static str,
}

/// The driver. It comes with the GPU's kernel module, never from pip.
pub(super) const DRIVER: Needed = Needed {
    name: "the CUDA driver",
    files: &["libcuda.so", "libcuda.so.1"],
    dependencies: None,
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

/// Declares a table of functions. Each entry has a field name, a symbol and a type.
macro_rules! table {
    ($(#[$doc:meta])* $table:ident { $($field:ident: $name:literal ($($argument:ty),*) $(-> $result:ty)?;)* }) => {
        $(#[$doc])*
        pub(super) struct $table {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
        }

        impl $table {
            const NAMES: &[&str] = &[$($name),*];

            /// Looks up the functions of a library, which stays loaded. `Needed::open` has checked
            /// that the library has all of them.
            fn of(library: Library) -> Result<Self> {
                let missing = |error: libloading::Error| Error::invalid(stringify!($table), error.to_string());
                // SAFETY: NVIDIA's headers declare these types for these names, unchanged since
                // CUDA 12.0.
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
    /// NVRTC, the compiler of the kernels.
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
    /// cuBLASLt, which computes matrix products.
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

pub(super) const NVRTC: Needed = Needed {
    name: "NVRTC",
    files: &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"],
    dependencies: Some("libnvrtc-builtins.so"),
    pip: &["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"],
    functions: Nvrtc::NAMES,
    advice: "install CUDA 12 or later, or pip's nvidia-cuda-nvrtc",
};

pub(super) const CUBLAS_LT: Needed = Needed {
    name: "cuBLASLt",
    files: &["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"],
    dependencies: None,
    pip: &["nvidia/cu13/lib", "nvidia/cublas/lib"],
    functions: CublasLt::NAMES,
    advice: "install CUDA 12 or later, or pip's nvidia-cublas",
};

/// The environment variable that names a folder. All libraries are searched there first.
pub(crate) const FOLDER: &str = "SHARDWISE_CUDA_LIBRARIES";

/// Returns the driver's library. The bindings use the same library.
pub(super) fn cuda() -> Result<&'static Library> {
    static FOUND: OnceLock<Result<Library>> = OnceLock::new();
    FOUND
        .get_or_init(|| DRIVER.open().and_then(|found| DRIVER.check_bound(found)))
        .as_ref()
        .map_err(Error::clone)
}

/// Returns NVRTC's functions.
pub(super) fn nvrtc() -> Result<&'static Nvrtc> {
    static FOUND: OnceLock<Result<Nvrtc>> = OnceLock::new();
    FOUND
        .get_or_init(|| NVRTC.open().and_then(|(library, _)| Nvrtc::of(library)))
        .as_ref()
        .map_err(Error::clone)
}

/// Returns cuBLASLt's functions.
pub(super) fn cublas_lt() -> Result<&'static CublasLt> {
    static FOUND: OnceLock<Result<CublasLt>> = OnceLock::new();
    FOUND
        .get_or_init(|| CUBLAS_LT.open().and_then(|(library, _)| CublasLt::of(library)))
        .as_ref()
        .map_err(Error::clone)
}

impl Needed {
    /// Finds the library, checks that it has all functions, and returns it with its file.
    fn open(&self) -> Result<(Library, PathBuf)> {
        let mut tried = Vec::new();
        for place in self.places() {
            // SAFETY: the initializers of NVIDIA's libraries have no preconditions, and the user's
            // search paths name this file as such a library.
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
            self.load_dependencies(&place);
            return Ok((library, place));
        }
        let reason = format!(
            "it was not found: {}; {FOLDER} can name its folder; this machine's Pythons and toolkits do not have it; tried {}",
            self.advice,
            tried.join(", ")
        );
        Err(Error::Unsupported { op: self.name, reason })
    }

    /// Returns the library if the bindings load the same one. The bindings ask the loader, which
    /// finds a loaded library by its soname.
    fn check_bound(&self, (library, place): (Library, PathBuf)) -> Result<Library> {
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
            "{} was found, but the loader uses another file for {}: put the folder first in LD_LIBRARY_PATH",
            place.display(),
            self.files.join(" or "),
        );
        Err(Error::Unsupported { op: self.name, reason })
    }

    /// Loads the dependencies from the library's folder. From then on the loader finds them by
    /// name.
    fn load_dependencies(&self, place: &Path) {
        let Some(prefix) = self.dependencies else { return };
        let folder = place.parent().filter(|folder| !folder.as_os_str().is_empty());
        let files = folder.and_then(|folder| folder.read_dir().ok()).into_iter().flatten().flatten();
        for file in files.filter(|file| file.file_name().to_string_lossy().starts_with(prefix)) {
            // SAFETY: as in `open`. If this fails, the library reports the missing dependency
            // later.
            #[allow(unsafe_code)]
            if let Ok(dependency) = unsafe { Library::open(Some(file.path()), RTLD_NOW | RTLD_LOCAL) } {
                std::mem::forget(dependency);
            }
        }
    }

    /// Returns the files that may be the library: in the folder that the user names, on the
    /// loader's path, in the folders of pip and conda, and in a toolkit.
    ///
    /// The folders of `LD_LIBRARY_PATH` come before the rest of the loader's path, one by one. The
    /// loader alone would search its whole path for the first file name, and could find it in
    /// another toolkit before it tries the file name that an earlier folder has.
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

/// Returns the `lib` folders of Python environments: the active one, the user's and the system's.
pub(crate) fn python_folders() -> impl Iterator<Item = PathBuf> {
    let active = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let user = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local"));
    let system = ["/usr/local", "/usr"].map(PathBuf::from);
    active.chain(user).chain(system).map(|prefix| prefix.join("lib"))
}

/// Returns the package folders of the Pythons in a `lib` folder.
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
    fn a_missing_library_is_an_error_that_lists_the_searched_places() {
        const NOTHING: Needed = Needed {
            name: "nothing",
            files: &["libshardwise-nothing.so"],
            dependencies: None,
            pip: &["nvidia/nothing/lib"],
            functions: &[],
            advice: "install nothing",
        };
        let error = NOTHING.open().unwrap_err().to_string();
        assert!(error.starts_with("nothing: not supported: it was not found: install nothing"), "{error}");
        assert!(error.contains(FOLDER) && error.contains("libshardwise-nothing.so ("), "{error}");
    }

    #[test]
    fn packages_of_every_python_of_a_folder_are_searched() {
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
            dependencies: None,
            pip: &[],
            functions: &["malloc", "no_such_function"],
            advice: "a newer one is needed",
        };
        let error = OLD.open().unwrap_err().to_string();
        assert!(error.contains("libc.so.6 has no no_such_function: a newer one is needed"), "{error}");
    }
}
