//! Finding NVIDIA's libraries before the first call into them.
//!
//! The bindings look on the loader's path alone and panic where a library or a function is missing. So each library is looked
//! for here first, also where pip and conda put it, and every function that is used is asked for once: what is missing becomes
//! an [`Error`] that says what was tried.

use crate::error::{Error, Result};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

/// A library, and what is needed of it.
pub(crate) struct Needed {
    /// Its name in messages.
    name: &'static str,
    /// File names, the best first. The bindings ask the loader for these names too.
    files: &'static [&'static str],
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
    pip: &[],
    functions: &[
        "cuInit",
        "cuDriverGetVersion",
        "cuDeviceGet",
        "cuDeviceGetCount",
        "cuDeviceGetName",
        "cuDeviceGetAttribute",
        "cuDevicePrimaryCtxRetain",
        "cuDevicePrimaryCtxRelease_v2",
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
        "cuMemFreeHost",
        "cuMemcpyHtoDAsync_v2",
        "cuMemcpyDtoHAsync_v2",
        "cuMemsetD8Async",
        "cuDeviceGetDefaultMemPool",
        "cuDeviceCanAccessPeer",
        "cuMemPoolSetAccess",
        "cuMemPoolSetAttribute",
        "cuModuleLoadData",
        "cuModuleUnload",
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
    pip: &["nvidia/cu13/lib", "nvidia/cublas/lib"],
    functions: &[
        "cublasLtCreate",
        "cublasLtDestroy",
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
            // It stays: the bindings open it by one of its names, and get this one.
            std::mem::forget(library);
            return Ok(());
        }
        let reason = format!(
            "it was not found: {}; {FOLDER} may name its folder; tried {}",
            self.advice,
            tried.join(", ")
        );
        Err(Error::Unsupported { op: self.name, reason })
    }

    /// Where the library may be: in the folder that the user names; on the loader's path; where pip and conda put it.
    fn places(&self) -> Vec<PathBuf> {
        let in_folder = |folder: &Path| {
            self.files.iter().map(|file| folder.join(file)).filter(|path| path.exists()).collect::<Vec<_>>()
        };
        let mut places =
            std::env::var_os(FOLDER).map_or_else(Vec::new, |folder| in_folder(Path::new(&folder)));
        places.extend(self.files.iter().map(PathBuf::from));
        for lib in python_folders() {
            places.extend(in_folder(&lib));
            let pythons = lib.read_dir().into_iter().flatten().flatten();
            for site in pythons.map(|python| python.path().join("site-packages")) {
                places.extend(self.pip.iter().flat_map(|folder| in_folder(&site.join(folder))));
            }
        }
        places
    }
}

/// The `lib` folders of the Python environments at hand.
pub(crate) fn python_folders() -> impl Iterator<Item = PathBuf> {
    let prefixes = ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(std::env::var_os);
    prefixes.map(|prefix| PathBuf::from(prefix).join("lib"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_an_error_that_says_where_it_was_looked_for() {
        const NOTHING: Needed = Needed {
            name: "nothing",
            files: &["libshardwise-nothing.so"],
            pip: &["nvidia/nothing/lib"],
            functions: &[],
            advice: "install nothing",
        };
        let error = need(&NOTHING).unwrap_err().to_string();
        assert!(error.starts_with("nothing: not supported: it was not found: install nothing"), "{error}");
        assert!(error.contains(FOLDER) && error.contains("libshardwise-nothing.so ("), "{error}");
    }

    #[test]
    fn a_library_without_a_function_is_named_with_it() {
        const OLD: Needed = Needed {
            name: "an old library",
            files: &["libc.so.6"],
            pip: &[],
            functions: &["malloc", "no_such_function"],
            advice: "a newer one is needed",
        };
        let error = need(&OLD).unwrap_err().to_string();
        assert!(error.contains("libc.so.6 has no no_such_function: a newer one is needed"), "{error}");
    }
}
