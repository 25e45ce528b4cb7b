//! Conversion of the return codes of NVIDIA's libraries to errors.

use super::libraries;
use crate::error::{Error, Result};
use cudarc::{
    cublaslt::sys::cublasStatus_t,
    driver::sys::{CUresult, cuGetErrorString},
    nvrtc::sys::nvrtcResult,
};
use std::ffi::{CStr, c_char};

/// Returns an error unless a call of the driver succeeded.
pub(crate) fn driver(call: &'static str, code: CUresult) -> Result<()> {
    if code == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = std::ptr::null();
    // SAFETY: `text` is valid for writing a pointer, and the driver's strings are static.
    #[allow(unsafe_code)]
    let message = unsafe {
        let known = cuGetErrorString(code, &mut text) == CUresult::CUDA_SUCCESS;
        copy(if known { text } else { std::ptr::null() })
    };
    Err(Error::Library { library: "CUDA driver", call, code: code as i32, message })
}

/// Returns an error unless a call of cuBLASLt succeeded.
pub(crate) fn cublas_lt(call: &'static str, code: cublasStatus_t) -> Result<()> {
    if code == cublasStatus_t::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    let text = libraries::cublas_lt()?.status_string;
    // SAFETY: cuBLASLt's strings are static.
    #[allow(unsafe_code)]
    let message = unsafe { copy(text(code)) };
    Err(Error::Library { library: "cuBLASLt", call, code: code as i32, message })
}

/// Returns an error unless a call of NVRTC succeeded.
pub(crate) fn compiler(call: &'static str, code: nvrtcResult) -> Result<()> {
    if code == nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    let text = libraries::nvrtc()?.error_string;
    // SAFETY: NVRTC's strings are static.
    #[allow(unsafe_code)]
    let message = unsafe { copy(text(code)) };
    Err(Error::Library { library: "NVRTC", call, code: code as i32, message })
}

/// Copies a C string, or returns "unknown" for a null pointer.
///
/// # Safety
/// `text` is null, or points to a string that ends with a zero byte.
#[allow(unsafe_code)]
unsafe fn copy(text: *const c_char) -> String {
    if text.is_null() {
        return "unknown".to_string();
    }
    // SAFETY: `text` is not null, and the caller guarantees that it is a C string.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
