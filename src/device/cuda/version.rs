//! The versions of the loaded libraries.

use super::{
    libraries::{CUBLAS_LT, DRIVER, NVRTC, cublas_lt, cuda, nvrtc},
    status::{compiler, driver},
};
use crate::error::Result;
use cudarc::driver::sys::cuDriverGetVersion;
use std::{ffi::c_void, fmt, path::PathBuf};

/// A library that this process has loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// The library's name.
    pub library: &'static str,
    /// The version that the library reports. The driver reports the version of CUDA that it
    /// supports.
    pub version: String,
    /// The library's file.
    pub path: PathBuf,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} ({})", self.library, self.version, self.path.display())
    }
}

/// Returns the versions of the driver, NVRTC and cuBLASLt. Loads these libraries first, if they are
/// not loaded yet. `comm::nccl::version` returns the version of NCCL.
pub fn versions() -> [Result<Version>; 3] {
    let of = |library, version, address: *const c_void| {
        let path = file_at(address as usize).unwrap_or_default();
        Version { library, version, path }
    };
    let driver = || {
        let mut version = 0;
        let library = cuda()?;
        // SAFETY: `cuda()` checked that the function exists, and `version` is valid for writing an
        // int. The symbol is only looked up.
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
        // SAFETY: both pointers are valid for writing an int.
        #[allow(unsafe_code)]
        compiler("nvrtcVersion", unsafe { (nvrtc.version)(&mut major, &mut minor) })?;
        Ok(of(NVRTC.name, format!("{major}.{minor}"), nvrtc.version as *const c_void))
    };
    let products = || {
        let lt = cublas_lt()?;
        // SAFETY: the function takes no arguments.
        #[allow(unsafe_code)]
        let version = unsafe { (lt.version)() };
        let version = format!("{}.{}.{}", version / 10_000, version % 10_000 / 100, version % 100);
        Ok(of(CUBLAS_LT.name, version, lt.version as *const c_void))
    };
    [driver(), compiler(), products()]
}

/// Returns the file that is mapped at an address of this process.
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
