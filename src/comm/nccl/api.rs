//! The table of NCCL's functions, filled at first use.

use crate::{
    device::cuda::{
        Version,
        libraries::{FOLDER, python_folders, sites},
        version::file_at,
    },
    error::{Error, Result},
};
use libloading::Library;
use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    path::PathBuf,
    sync::OnceLock,
};

/// `ncclComm_t`.
pub(super) type Handle = *mut c_void;

pub(super) const SUCCESS: c_int = 0;
pub(super) const IN_PROGRESS: c_int = 7;
pub(super) const SUM: c_int = 0;
pub(super) const NO_COLOR: c_int = -1;

/// `ncclUniqueId`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct UniqueId(pub(super) [u8; 128]);

/// `ncclConfig_t` of NCCL 2.18. Later versions accept it, because it states its size and version.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl Config {
    /// If `blocking`, NCCL's calls wait for other ranks. Otherwise they continue in the background.
    pub(super) fn new(blocking: bool) -> Self {
        const UNSET: c_int = c_int::MIN;
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            version: OLDEST as c_uint,
            blocking: blocking.into(),
            cga_cluster_size: UNSET,
            min_ctas: UNSET,
            max_ctas: UNSET,
            net_name: std::ptr::null(),
            split_share: UNSET,
        }
    }
}

/// The oldest supported version, 2.18: the first version that can split a communicator.
const OLDEST: c_int = 21_800;

/// Declares the table of functions. `nccl.h` has their names and types.
macro_rules! table {
    ($($field:ident: $name:literal ($($argument:ty),*);)*) => {
        /// The NCCL functions in use. All return a result code, except the two that return text.
        pub(super) struct Api {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> c_int,)*
            /// The version that `ncclGetVersion` returned: 22809 is version 2.28.9.
            number: c_int,
            pub(super) error_string: unsafe extern "C" fn(c_int) -> *const c_char,
            pub(super) last_error: unsafe extern "C" fn(Handle) -> *const c_char,
        }

        impl Api {
            fn from(library: &Library, place: &str) -> Result<Self> {
                let missing = |name: &str, error: libloading::Error| Error::Unsupported {
                    op: "NCCL",
                    reason: format!("{place} has no {name} ({error}): version 2.18 or later is needed"),
                };
                // SAFETY: `nccl.h` declares these types for these names, unchanged from version
                // 2.18 to 2.31.
                #[allow(unsafe_code)]
                unsafe {
                    Ok(Self {
                        $($field: *library
                            .get(concat!($name, "\0").as_bytes())
                            .map_err(|error| missing($name, error))?,)*
                        number: 0,
                        error_string: *library
                            .get(b"ncclGetErrorString\0")
                            .map_err(|error| missing("ncclGetErrorString", error))?,
                        last_error: *library
                            .get(b"ncclGetLastError\0")
                            .map_err(|error| missing("ncclGetLastError", error))?,
                    })
                }
            }
        }
    };
}

type Const = *const c_void;
type Mut = *mut c_void;

table! {
    version: "ncclGetVersion" (*mut c_int);
    unique_id: "ncclGetUniqueId" (*mut UniqueId);
    init: "ncclCommInitRankConfig" (*mut Handle, c_int, UniqueId, c_int, *mut Config);
    split: "ncclCommSplit" (Handle, c_int, c_int, *mut Handle, *mut Config);
    destroy: "ncclCommDestroy" (Handle);
    abort: "ncclCommAbort" (Handle);
    async_error: "ncclCommGetAsyncError" (Handle, *mut c_int);
    group_start: "ncclGroupStart" ();
    group_end: "ncclGroupEnd" ();
    all_reduce: "ncclAllReduce" (Const, Mut, usize, c_int, c_int, Handle, Mut);
    all_gather: "ncclAllGather" (Const, Mut, usize, c_int, Handle, Mut);
    reduce_scatter: "ncclReduceScatter" (Const, Mut, usize, c_int, c_int, Handle, Mut);
    reduce: "ncclReduce" (Const, Mut, usize, c_int, c_int, c_int, Handle, Mut);
    broadcast: "ncclBroadcast" (Const, Mut, usize, c_int, c_int, Handle, Mut);
    send: "ncclSend" (Const, usize, c_int, c_int, Handle, Mut);
    recv: "ncclRecv" (Mut, usize, c_int, c_int, Handle, Mut);
}

impl Api {
    /// Returns NCCL's functions. The first call loads the library. The library is never unloaded,
    /// because its own threads keep running.
    pub(super) fn get() -> Result<&'static Self> {
        static API: OnceLock<Result<Api>> = OnceLock::new();
        API.get_or_init(Self::load).as_ref().map_err(Error::clone)
    }

    fn load() -> Result<Self> {
        let mut tried = Vec::new();
        for place in places() {
            // SAFETY: NCCL's initializers have no preconditions, and the user's search paths name
            // this file as NCCL.
            #[allow(unsafe_code)]
            let library = match unsafe { Library::new(&place) } {
                Ok(library) => library,
                Err(error) => {
                    tried.push(format!("{} ({error})", place.display()));
                    continue;
                }
            };
            let mut api = Self::from(&library, &place.display().to_string())?;
            std::mem::forget(library);
            // SAFETY: `number` is valid for writing an int.
            #[allow(unsafe_code)]
            let code = unsafe { (api.version)(&mut api.number) };
            if code != SUCCESS || api.number < OLDEST {
                let reason = format!(
                    "{} has version number {}; version 2.18 or later is needed",
                    place.display(),
                    api.number
                );
                return Err(Error::Unsupported { op: "NCCL", reason });
            }
            return Ok(api);
        }
        let reason = format!(
            "the library was not found; SHARDWISE_NCCL can name its file; tried {}",
            tried.join(", ")
        );
        Err(Error::Unsupported { op: "NCCL", reason })
    }

    /// Returns NCCL's version and the file that the loader selected.
    pub(super) fn describe(&self) -> Version {
        let number = self.number;
        let version = format!("{}.{}.{}", number / 10_000, number / 100 % 100, number % 100);
        Version { library: "NCCL", version, path: file_at(self.version as usize).unwrap_or_default() }
    }

    /// Returns the error for a call that returned `code`.
    pub(super) fn error(&self, call: &'static str, code: c_int, handle: Handle) -> Error {
        // SAFETY: both functions return strings that stay valid until the next call on this thread,
        // and `copy` copies them at once. `last_error` accepts a null communicator.
        #[allow(unsafe_code)]
        let (text, last) = unsafe { (copy((self.error_string)(code)), copy((self.last_error)(handle))) };
        let message = if last.is_empty() { text } else { format!("{text}: {last}") };
        Error::Library { library: "NCCL", call, code, message }
    }
}

/// Copies a C string. Returns an empty string for a null pointer.
///
/// # Safety
/// `text` is null, or points to a string that ends with a zero byte.
#[allow(unsafe_code)]
unsafe fn copy(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: `text` is not null, and the caller guarantees that it is a C string.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_string()
}

/// Returns the files that may be NCCL. If `SHARDWISE_NCCL` is set, returns only the file that it
/// names. Otherwise returns files in the folder of NVIDIA's libraries (`SHARDWISE_CUDA_LIBRARIES`),
/// on the loader's path, and where pip and conda install NCCL.
fn places() -> Vec<PathBuf> {
    if let Some(named) = std::env::var_os("SHARDWISE_NCCL") {
        return vec![named.into()];
    }
    let folder = std::env::var_os(FOLDER).map(|folder| PathBuf::from(folder).join("libnccl.so.2"));
    let mut places: Vec<PathBuf> = folder.into_iter().filter(|path| path.exists()).collect();
    places.extend(["libnccl.so.2".into(), "libnccl.so".into()]);
    for lib in python_folders() {
        let pip = sites(&lib).map(|site| site.join("nvidia/nccl/lib/libnccl.so.2"));
        places.extend([lib.join("libnccl.so.2")].into_iter().chain(pip).filter(|path| path.exists()));
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    /// If NCCL is installed, it loads with all functions. Otherwise the error names
    /// `SHARDWISE_NCCL`.
    #[test]
    fn the_library_is_found_or_its_places_are_named() {
        match Api::load() {
            Ok(api) => {
                assert!(api.number >= OLDEST);
                let version = api.describe().to_string();
                assert!(version.starts_with("NCCL 2.") && version.contains('/'), "{version}");
                let error = api.error("ncclAllReduce", 4, std::ptr::null_mut()).to_string();
                assert!(error.starts_with("ncclAllReduce: NCCL error 4: invalid argument"), "{error}");
            }
            Err(error) => {
                let error = error.to_string();
                println!("not run with a real NCCL: {error}");
                assert!(error.contains("SHARDWISE_NCCL"), "{error}");
            }
        }
    }
}
