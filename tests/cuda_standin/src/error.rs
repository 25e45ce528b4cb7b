//! The driver's result codes, and the record of what was found wrong.

use crate::stream::lock;
use std::{
    ffi::{CStr, c_int},
    sync::Mutex,
};

/// A `CUresult`.
pub type Code = c_int;
pub const SUCCESS: Code = 0;
pub const INVALID_VALUE: Code = 1;
pub const OUT_OF_MEMORY: Code = 2;
pub const INVALID_DEVICE: Code = 101;
pub const INVALID_IMAGE: Code = 200;
pub const INVALID_CONTEXT: Code = 201;
pub const INVALID_HANDLE: Code = 400;
pub const NOT_FOUND: Code = 500;
pub const NOT_READY: Code = 600;
pub const ILLEGAL_ADDRESS: Code = 700;

static REPORTS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Prints a finding and keeps it for [`reports`].
pub fn report(message: String) {
    eprintln!("cuda stand-in: {message}");
    lock(&REPORTS).push(message);
}

/// Everything that was found so far in this process.
pub fn reports() -> Vec<String> {
    lock(&REPORTS).clone()
}

/// How many findings there were in this process, for tests that load this library as the driver.
#[unsafe(no_mangle)]
pub extern "C" fn cuda_standin_reports() -> usize {
    lock(&REPORTS).len()
}

/// The name of a code, as `cuGetErrorName` says it.
pub fn name(code: Code) -> Option<&'static CStr> {
    Some(match code {
        SUCCESS => c"CUDA_SUCCESS",
        INVALID_VALUE => c"CUDA_ERROR_INVALID_VALUE",
        OUT_OF_MEMORY => c"CUDA_ERROR_OUT_OF_MEMORY",
        INVALID_DEVICE => c"CUDA_ERROR_INVALID_DEVICE",
        INVALID_IMAGE => c"CUDA_ERROR_INVALID_IMAGE",
        INVALID_CONTEXT => c"CUDA_ERROR_INVALID_CONTEXT",
        INVALID_HANDLE => c"CUDA_ERROR_INVALID_HANDLE",
        NOT_FOUND => c"CUDA_ERROR_NOT_FOUND",
        NOT_READY => c"CUDA_ERROR_NOT_READY",
        ILLEGAL_ADDRESS => c"CUDA_ERROR_ILLEGAL_ADDRESS",
        _ => return None,
    })
}
