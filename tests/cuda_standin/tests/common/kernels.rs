//! Compiles, loads and launches kernels.

use cuda_standin::{driver::*, error::*, nvrtc::*};
use std::{
    ffi::{CStr, CString, c_char, c_uint, c_void},
    ptr::null_mut,
};

/// Compiles a source to an image; `Err` is the compiler's log.
pub fn image(source: &str) -> Result<CString, String> {
    let source = CString::new(source).unwrap();
    let (mut program, mut size) = (0, 0);
    unsafe {
        assert_eq!(
            nvrtcCreateProgram(&mut program, source.as_ptr(), null_mut(), 0, null_mut(), null_mut()),
            0
        );
        let failed = nvrtcCompileProgram(program, 0, null_mut()) != 0;
        if failed {
            nvrtcGetProgramLogSize(program, &mut size)
        } else {
            nvrtcGetCUBINSize(program, &mut size)
        };
        let mut text = vec![0_u8; size];
        if failed {
            nvrtcGetProgramLog(program, text.as_mut_ptr().cast::<c_char>())
        } else {
            nvrtcGetCUBIN(program, text.as_mut_ptr().cast())
        };
        assert_eq!(nvrtcDestroyProgram(&mut program), 0);
        let text = CStr::from_bytes_until_nul(&text).unwrap().to_owned();
        if failed { Err(text.to_string_lossy().into_owned()) } else { Ok(text) }
    }
}

/// Loads a module into the current context.
pub fn load(image: &CStr) -> usize {
    let mut module = 0;
    assert_eq!(unsafe { cuModuleLoadData(&mut module, image.as_ptr()) }, SUCCESS);
    module
}

/// Finds a kernel without loading it.
pub fn find(module: usize, name: &CStr) -> usize {
    let mut function = 0;
    assert_eq!(unsafe { cuModuleGetFunction(&mut function, module, name.as_ptr()) }, SUCCESS);
    function
}

pub fn function(module: usize, name: &CStr) -> usize {
    let function = find(module, name);
    assert_eq!(unsafe { cuFuncLoad(function) }, SUCCESS);
    function
}

/// Launches blocks and threads in one dimension; every argument is a `u64`.
pub fn launch(
    function: usize,
    stream: usize,
    [grid, block, shared]: [c_uint; 3],
    arguments: &mut [u64],
) -> Code {
    let mut arguments: Vec<*mut c_void> =
        arguments.iter_mut().map(|word| (word as *mut u64).cast()).collect();
    unsafe {
        cuLaunchKernel(function, grid, 1, 1, block, 1, 1, shared, stream, arguments.as_mut_ptr(), null_mut())
    }
}
