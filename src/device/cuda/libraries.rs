//! Finding NVIDIA's libraries before the first call into them.
//!
//! The bindings look on the loader's path alone and panic where a library or a function is missing. So each library is looked
//! for here first, also where pip and conda put it, and every function that is used is asked for once: what is missing becomes
//! an [`Error`] that says what was tried.

use super::status::{compiler, driver};
use crate::error::{Error, Result};
use cudarc::{
    cublaslt::sys::cublasLtGetVersion,
    driver::sys::{CUfunction, CUresult, cuDriverGetVersion},
    nvrtc::sys::nvrtcVersion,
};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Mutex, OnceLock, PoisonError},
};

/// A library, and what is needed of it.
pub(crate) struct Needed {
    /// Its name in messages.
    name: &'static str,
    /// File names, the best first. The bindings ask the loader for these names too.
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
pub(crate) const DRIVER: Needed = Needed {
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
        "cuStreamCreate",
        "cuStreamDestroy_v2",
        "cuStreamSynchronize",
        "cuStreamWaitEvent",
        "cuEventCreate",
        "cuEventDestroy_v2",
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

/// The compiler of the kernels.
pub(crate) const NVRTC: Needed = Needed {
    name: "NVRTC",
    files: &["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"],
    parts: Some("libnvrtc-builtins.so"),
    pip: &["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"],
    functions: &[
        "nvrtcVersion",
        "nvrtcCreateProgram",
        "nvrtcCompileProgram",
        "nvrtcDestroyProgram",
        "nvrtcGetCUBINSize",
        "nvrtcGetCUBIN",
        "nvrtcGetPTXSize",
        "nvrtcGetPTX",
        "nvrtcGetProgramLogSize",
        "nvrtcGetProgramLog",
        "nvrtcGetErrorString",
        "nvrtcGetNumSupportedArchs",
        "nvrtcGetSupportedArchs",
    ],
    advice: "install CUDA 12 or later, or pip's nvidia-cuda-nvrtc",
};

/// Matrix products.
pub(crate) const CUBLAS_LT: Needed = Needed {
    name: "cuBLASLt",
    files: &["libcublasLt.so", "libcublasLt.so.13", "libcublasLt.so.12"],
    parts: None,
    pip: &["nvidia/cu13/lib", "nvidia/cublas/lib"],
    functions: &[
        "cublasLtCreate",
        "cublasLtGetVersion",
        "cublasLtGetStatusString",
        "cublasLtMatmul",
        "cublasLtMatmulAlgoGetHeuristic",
        "cublasLtMatmulDescCreate",
        "cublasLtMatmulDescDestroy",
        "cublasLtMatmulDescSetAttribute",
        "cublasLtMatmulPreferenceCreate",
        "cublasLtMatmulPreferenceDestroy",
        "cublasLtMatmulPreferenceSetAttribute",
        "cublasLtMatrixLayoutCreate",
        "cublasLtMatrixLayoutDestroy",
        "cublasLtMatrixLayoutSetAttribute",
    ],
    advice: "install CUDA 12 or later, or pip's nvidia-cublas",
};

/// The variable that names a folder in which all libraries are looked for first.
pub(crate) const FOLDER: &str = "SHARDWISE_CUDA_LIBRARIES";

/// Sees to it that the bindings will find the library and its functions.
pub(crate) fn need(library: &'static Needed) -> Result<()> {
    static FOUND: Mutex<Option<HashMap<&'static str, Result<()>>>> = Mutex::new(None);
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    let outcomes = found.get_or_insert_with(HashMap::new);
    outcomes.entry(library.name).or_insert_with(|| library.load()).clone()
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

/// The driver, NVRTC and cuBLASLt, loaded if they were not. NCCL's is [`crate::comm::nccl`]'s to say.
pub fn versions() -> [Result<Version>; 3] {
    let get = |library: &'static Needed, version: fn() -> Result<String>| {
        need(library)?;
        let path = library.functions.first().and_then(|function| path_of(function));
        Ok(Version { library: library.name, version: version()?, path: path.unwrap_or_default() })
    };
    // SAFETY: in all three, `need` has seen that the library has the function; the places are of the types that are written.
    #[allow(unsafe_code)]
    [
        get(&DRIVER, || {
            let mut version = 0;
            driver("cuDriverGetVersion", unsafe { cuDriverGetVersion(&mut version) })?;
            Ok(format!("{}.{}", version / 1000, version % 1000 / 10))
        }),
        get(&NVRTC, || {
            let (mut major, mut minor) = (0, 0);
            compiler("nvrtcVersion", unsafe { nvrtcVersion(&mut major, &mut minor) })?;
            Ok(format!("{major}.{minor}"))
        }),
        get(&CUBLAS_LT, || {
            // 12.x: 12xxyy, 13.x: 13xxyy.
            let version = unsafe { cublasLtGetVersion() };
            Ok(format!("{}.{}.{}", version / 10_000, version % 10_000 / 100, version % 100))
        }),
    ]
}

/// The file of the library that the process has loaded and that has this function.
fn path_of(function: &str) -> Option<PathBuf> {
    // SAFETY: the symbol is only looked up, not called.
    #[allow(unsafe_code)]
    let address =
        unsafe { Library::this().get::<*const ()>(function.as_bytes()).ok()?.as_raw_ptr() } as usize;
    file_at(address)
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

/// Loads a function that a driver which loads lazily has only found. Drivers before CUDA 12.4 load it when they find it, and have
/// no call for this.
pub(super) fn load_function(function: CUfunction) -> Result<()> {
    type Load = unsafe extern "C" fn(CUfunction) -> CUresult;
    static LOAD: OnceLock<Option<Load>> = OnceLock::new();
    // SAFETY: the type is that of `cuFuncLoad` in `cuda.h`. The driver, which `need` has opened for all, stays.
    #[allow(unsafe_code)]
    let load =
        *LOAD.get_or_init(|| unsafe { Library::this().get::<Load>(b"cuFuncLoad").ok().map(|load| *load) });
    match load {
        // SAFETY: the function was found in a loaded module; a context is current.
        #[allow(unsafe_code)]
        Some(load) => driver("cuFuncLoad", unsafe { load(function) }),
        None => Ok(()),
    }
}

impl Needed {
    fn load(&self) -> Result<()> {
        let mut tried = Vec::new();
        for place in self.places() {
            // SAFETY: NVIDIA's libraries have initializers without preconditions; what is loaded is what the user's paths
            // name as such a library.
            #[allow(unsafe_code)]
            let library = match unsafe { Library::open(Some(&place), RTLD_NOW | RTLD_GLOBAL) } {
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
            if !self.is_the_loaders(&library) {
                let reason = format!(
                    "{} is there, but the loader has another for {}: put the folder first in LD_LIBRARY_PATH",
                    place.display(),
                    self.files.join(" or "),
                );
                return Err(Error::Unsupported { op: self.name, reason });
            }
            self.load_parts(&place);
            // It stays: the bindings open it by one of its names, and get this one.
            std::mem::forget(library);
            return Ok(());
        }
        let reason = format!(
            "it was not found: {}; {FOLDER} may name its folder; not in the Pythons and toolkits at hand; tried {}",
            self.advice,
            tried.join(", ")
        );
        Err(Error::Unsupported { op: self.name, reason })
    }

    /// Loads the parts that lie beside the library: once they are loaded, the loader knows them by their names.
    fn load_parts(&self, place: &Path) {
        let Some(parts) = self.parts else { return };
        let folder = place.parent().filter(|folder| !folder.as_os_str().is_empty());
        let files = folder.and_then(|folder| folder.read_dir().ok()).into_iter().flatten().flatten();
        for file in files.filter(|file| file.file_name().to_string_lossy().starts_with(parts)) {
            // SAFETY: as in `load`. What fails here, the library itself will say.
            #[allow(unsafe_code)]
            if let Ok(part) = unsafe { Library::open(Some(file.path()), RTLD_NOW | RTLD_GLOBAL) } {
                std::mem::forget(part);
            }
        }
    }

    /// Whether the bindings get this library. They ask the loader, which knows a library by the name in it once it is loaded.
    fn is_the_loaders(&self, library: &Library) -> bool {
        let Some(function) = self.functions.first() else { return true };
        // SAFETY: as in `load`: the same kind of library, and the symbols are only looked up.
        #[allow(unsafe_code)]
        let address = |library: &Library| unsafe {
            library.get::<*const ()>(function.as_bytes()).map(|symbol| symbol.as_raw_ptr()).ok()
        };
        // SAFETY: as in `load`.
        #[allow(unsafe_code)]
        let first = self.files.iter().find_map(|file| unsafe { Library::open(Some(*file), RTLD_NOW).ok() });
        first.is_some_and(|first| address(&first) == address(library))
    }

    /// Where the library may be: in the folder that the user names; on the loader's path; where pip and conda put it; in a toolkit.
    fn places(&self) -> Vec<PathBuf> {
        let in_folder = |folder: &Path| {
            self.files.iter().map(|file| folder.join(file)).filter(|path| path.exists()).collect::<Vec<_>>()
        };
        let mut places =
            std::env::var_os(FOLDER).map_or_else(Vec::new, |folder| in_folder(Path::new(&folder)));
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
        let error = need(&NOTHING).unwrap_err().to_string();
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
        let error = need(&OLD).unwrap_err().to_string();
        assert!(error.contains("libc.so.6 has no no_such_function: a newer one is needed"), "{error}");
    }
}
