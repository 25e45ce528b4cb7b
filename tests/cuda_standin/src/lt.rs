//! The exported entry points of `libcublasLt`, as far as column-major products with the common
//! epilogues need them.

use crate::{
    counts::{self, Count},
    driver::{drain, put, stream, submit},
    error::{Code, SUCCESS},
    memory::{self, Accessor},
};
use half::{bf16, f16};
use std::{
    ffi::{c_char, c_int, c_void},
    hash::{DefaultHasher, Hash, Hasher},
    ops::Add,
    sync::OnceLock,
};

const INVALID_VALUE: Code = 7;
const NOT_SUPPORTED: Code = 15;
const EXECUTION_FAILED: Code = 13;

/// `cudaDataType`.
const F32: c_int = 0;
const F64: c_int = 1;
const F16: c_int = 2;
const BF16: c_int = 14;

/// `cublasComputeType_t`.
const COMPUTE_32F: c_int = 68;
const COMPUTE_32F_FAST_TF32: c_int = 77;
const COMPUTE_64F: c_int = 70;

/// `cublasLtEpilogue_t`.
const DEFAULT: c_int = 1;
const BIAS: c_int = 4;
const GELU_AUX_BIAS: c_int = 164;
const DGELU: c_int = 192;
const DGELU_BGRAD: c_int = 208;
const BGRADB: c_int = 512;

#[derive(Clone, Copy, Debug)]
struct Desc {
    compute: c_int,
    scale: c_int,
    transposed: [c_int; 2],
    epilogue: c_int,
    bias: usize,
    aux: usize,
    aux_leading: i64,
}

#[derive(Clone, Copy, Debug)]
struct Layout {
    dtype: c_int,
    rows: u64,
    cols: u64,
    leading: i64,
    count: i32,
    stride: i64,
}

fn width(dtype: c_int) -> usize {
    match dtype {
        F64 => 8,
        F32 => 4,
        _ => 2,
    }
}

unsafe fn load(at: usize, index: usize, dtype: c_int) -> f64 {
    // SAFETY: `judge` has checked that the element is memory of the device.
    unsafe {
        match dtype {
            F64 => *(at as *const f64).add(index),
            F32 => f64::from(*(at as *const f32).add(index)),
            F16 => f64::from((*(at as *const f16).add(index)).to_f32()),
            _ => f64::from((*(at as *const bf16).add(index)).to_f32()),
        }
    }
}

unsafe fn store(at: usize, index: usize, dtype: c_int, value: f64) {
    // SAFETY: as in `load`.
    unsafe {
        match dtype {
            F64 => *(at as *mut f64).add(index) = value,
            F32 => *(at as *mut f32).add(index) = value as f32,
            F16 => *(at as *mut f16).add(index) = f16::from_f32(value as f32),
            _ => *(at as *mut bf16).add(index) = bf16::from_f32(value as f32),
        }
    }
}

impl Layout {
    fn fits(&self) -> bool {
        self.leading >= self.rows as i64 && self.rows > 0 && self.cols > 0 && self.count > 0
    }

    /// The bytes from the first element to the last of a batch.
    fn bytes(&self) -> usize {
        let one = (self.cols as usize - 1) * self.leading as usize + self.rows as usize;
        ((self.count as usize - 1) * self.stride as usize + one) * width(self.dtype)
    }
}

/// `cublasLtMatmulPreference_t`, as far as it is implemented.
#[derive(Clone, Copy)]
struct Preference {
    workspace: u64,
    /// The alignment of the addresses of A, B, C and D in bytes.
    alignment: [u32; 4],
}

/// How a kernel adds up a sum. Real kernels differ in it, and each is deterministic.
#[derive(Clone, Copy, Debug)]
enum Order {
    Serial,
    Backwards,
    /// Two halves, as with split-K.
    Halves,
    /// Four interleaved sums, as with the steps of a tile.
    Strided,
}

const ORDERS: [Order; 4] = [Order::Serial, Order::Backwards, Order::Halves, Order::Strided];

impl Order {
    fn sum<T: Copy + Default + Add<Output = T>>(self, count: usize, term: impl Fn(usize) -> T) -> T {
        let add = |range: &mut dyn Iterator<Item = usize>| range.fold(T::default(), |sum, at| sum + term(at));
        match self {
            Self::Serial => add(&mut (0..count)),
            Self::Backwards => add(&mut (0..count).rev()),
            Self::Halves => add(&mut (0..count / 2)) + add(&mut (count / 2..count)),
            Self::Strided => {
                let [a, b, c, d] = [0, 1, 2, 3].map(|first| add(&mut (first..count).step_by(4)));
                (a + b) + (c + d)
            }
        }
    }
}

/// `cublasLtMatmulAlgo_t`: 64 bytes that only this library reads.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Algorithm {
    magic: u64,
    order: u64,
    alignment: [u32; 4],
    workspace: u64,
    is_valid: u64,
    unused: [u64; 2],
}

/// Whether `CUDA_STANDIN_LT` has this option. Options are separated by commas.
///
/// * `varied`: the order of summation depends on everything that a real library may choose its
///   kernel by: sizes, types, leading dimensions and alignments. Equal bits require an equal call.
/// * `states`: the first algorithm found for every other product is unusable, as its state says.
fn option(name: &str) -> bool {
    static OPTIONS: OnceLock<String> = OnceLock::new();
    let options = OPTIONS.get_or_init(|| std::env::var("CUDA_STANDIN_LT").unwrap_or_default());
    options.split(',').any(|option| option == name)
}

/// The `count` best algorithms for a product, the best first.
fn algorithms(desc: &Desc, layouts: [&Layout; 4], preference: &Preference, count: usize) -> Vec<Algorithm> {
    let kind = (desc.compute, desc.scale, desc.transposed, desc.epilogue, preference.alignment);
    let layout = |layout: &Layout| (layout.dtype, layout.rows, layout.cols, layout.leading, layout.count);
    let mut hasher = DefaultHasher::new();
    (kind, layouts.map(layout)).hash(&mut hasher);
    let hash = hasher.finish();
    let first_is_invalid = option("states") && hash / 4 % 2 == 1;
    let algorithm = |at: u64| Algorithm {
        magic: MAGIC,
        order: if option("varied") { (hash + at) % ORDERS.len() as u64 } else { 0 },
        alignment: preference.alignment,
        // A workspace is requested, so that callers pass one and it is checked.
        workspace: preference.workspace.min(1024),
        is_valid: u64::from(at > 0 || !first_is_invalid),
        unused: [0; 2],
    };
    (0..ORDERS.len().min(count) as u64).map(algorithm).collect()
}

/// One product with all its parameters.
#[derive(Clone, Copy, Debug)]
struct Product {
    desc: Desc,
    a: Layout,
    b: Layout,
    c: Layout,
    d: Layout,
    at: [usize; 4],
    alpha: f64,
    beta: f64,
    order: Order,
}

/// m, n and k, if all shapes match.
fn shape(desc: &Desc, a: &Layout, b: &Layout, c: &Layout, d: &Layout) -> Result<(usize, usize, usize), Code> {
    let turned = |layout: &Layout, transposed| match transposed {
        0 => Ok((layout.rows, layout.cols)),
        1 => Ok((layout.cols, layout.rows)),
        _ => Err(INVALID_VALUE),
    };
    let ((m, k), (k2, n)) = (turned(a, desc.transposed[0])?, turned(b, desc.transposed[1])?);
    let whole = [a, b, c, d].iter().all(|layout| layout.fits());
    let counts = [b, c, d].iter().all(|layout| layout.count == a.count);
    if !whole || !counts || k != k2 || (d.rows, d.cols) != (m, n) || (c.rows, c.cols) != (m, n) {
        return Err(INVALID_VALUE);
    }
    let scale = match desc.compute {
        COMPUTE_32F | COMPUTE_32F_FAST_TF32 => F32,
        COMPUTE_64F => F64,
        _ => return Err(NOT_SUPPORTED),
    };
    // The table of types in the documentation of cublasLtMatmul, as far as it is used.
    let types = match (scale, a.dtype) {
        (F64, F64) => d.dtype == F64 && desc.epilogue == DEFAULT,
        (F32, F32) => d.dtype == F32,
        (F32, BF16 | F16) => d.dtype == a.dtype || d.dtype == F32,
        _ => false,
    };
    let known = [DEFAULT, BIAS, GELU_AUX_BIAS, DGELU, DGELU_BGRAD, BGRADB].contains(&desc.epilogue);
    let saved = [GELU_AUX_BIAS, DGELU, DGELU_BGRAD].contains(&desc.epilogue);
    if saved && (desc.aux_leading % 8 != 0 || desc.aux_leading < m as i64 || !desc.aux.is_multiple_of(16)) {
        return Err(NOT_SUPPORTED);
    }
    if desc.scale != scale || b.dtype != a.dtype || c.dtype != d.dtype || !types || !known {
        return Err(NOT_SUPPORTED);
    }
    // Bias and GELU of a batch are not implemented.
    if desc.epilogue != DEFAULT && a.count > 1 {
        return Err(NOT_SUPPORTED);
    }
    Ok((m as usize, n as usize, k as usize))
}

/// GELU by tanh, and its derivative.
fn gelu(x: f64) -> (f64, f64) {
    let root = (2.0 / std::f64::consts::PI).sqrt();
    let t = (root * (x + 0.044715 * x * x * x)).tanh();
    let slope = root * (1.0 + 3.0 * 0.044715 * x * x) * (1.0 - t * t);
    (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + if t.abs() == 1.0 { 0.0 } else { 0.5 * x * slope })
}

impl Product {
    fn judge(&self, who: &Accessor) -> Result<(), String> {
        memory::access(who, self.at[0], self.a.bytes(), false, "matmul: A")?;
        memory::access(who, self.at[1], self.b.bytes(), false, "matmul: B")?;
        if self.beta != 0.0 {
            memory::access(who, self.at[2], self.c.bytes(), false, "matmul: C")?;
        }
        memory::access(who, self.at[3], self.d.bytes(), true, "matmul: D")?;
        let (rows, cols) = (self.d.rows as usize, self.d.cols as usize);
        let element = width(self.d.dtype);
        if [BIAS, GELU_AUX_BIAS, DGELU_BGRAD].contains(&self.desc.epilogue) {
            let write = self.desc.epilogue == DGELU_BGRAD;
            memory::access(who, self.desc.bias, rows * element, write, "matmul: bias")?;
        }
        if self.desc.epilogue == BGRADB {
            memory::access(who, self.desc.bias, cols * element, true, "matmul: bias gradient")?;
        }
        if [GELU_AUX_BIAS, DGELU, DGELU_BGRAD].contains(&self.desc.epilogue) {
            let leading = self.desc.aux_leading as usize;
            let bytes = ((cols - 1) * leading + rows) * element;
            memory::access(
                who,
                self.desc.aux,
                bytes,
                self.desc.epilogue == GELU_AUX_BIAS,
                "matmul: auxiliary",
            )?;
        }
        Ok(())
    }

    fn run(&self) {
        let [a, b, c, d] = self.at;
        let (m, n) = (self.d.rows as usize, self.d.cols as usize);
        let transposed = self.desc.transposed.map(|flag| flag == 1);
        let k = if transposed[0] { self.a.rows } else { self.a.cols } as usize;
        for batch in 0..self.a.count as usize {
            let start = |layout: &Layout| batch * layout.stride as usize;
            // Both operands widened, with the summed dimension innermost.
            let mut left = vec![0.0; m * k];
            let mut right = vec![0.0; n * k];
            // SAFETY: `judge` has checked that all operands lie in the device's memory.
            unsafe {
                for i in 0..m {
                    for p in 0..k {
                        let (row, col) = if transposed[0] { (p, i) } else { (i, p) };
                        left[i * k + p] =
                            load(a, start(&self.a) + col * self.a.leading as usize + row, self.a.dtype);
                    }
                }
                for j in 0..n {
                    for p in 0..k {
                        let (row, col) = if transposed[1] { (j, p) } else { (p, j) };
                        right[j * k + p] =
                            load(b, start(&self.b) + col * self.b.leading as usize + row, self.b.dtype);
                    }
                }
                if self.desc.epilogue == BGRADB {
                    for j in 0..n {
                        store(self.desc.bias, j, self.d.dtype, self.order.sum(k, |p| right[j * k + p]));
                    }
                }
                let mut sums = vec![0.0; m];
                for j in 0..n {
                    for i in 0..m {
                        let (x, y) = (&left[i * k..(i + 1) * k], &right[j * k..(j + 1) * k]);
                        let product: f64 = match self.desc.compute {
                            COMPUTE_64F => self.order.sum(k, |p| x[p] * y[p]),
                            _ => self.order.sum(k, |p| x[p] as f32 * y[p] as f32).into(),
                        };
                        let mut value = self.alpha * product;
                        if self.beta != 0.0 {
                            let old = load(c, start(&self.c) + j * self.c.leading as usize + i, self.c.dtype);
                            value += self.beta * old;
                        }
                        let value = self.finish(value, i, j, &mut sums[i]);
                        store(d, start(&self.d) + j * self.d.leading as usize + i, self.d.dtype, value);
                    }
                }
                if self.desc.epilogue == DGELU_BGRAD {
                    for (i, sum) in sums.into_iter().enumerate() {
                        store(self.desc.bias, i, self.d.dtype, sum);
                    }
                }
            }
        }
    }

    /// # Safety
    /// `judge` has checked the epilogue's operands.
    unsafe fn finish(&self, value: f64, i: usize, j: usize, sum: &mut f64) -> f64 {
        let kept = j * self.desc.aux_leading as usize + i;
        // SAFETY: the caller's promise.
        unsafe {
            match self.desc.epilogue {
                BIAS => value + load(self.desc.bias, i, self.d.dtype),
                GELU_AUX_BIAS => {
                    let before = value + load(self.desc.bias, i, self.d.dtype);
                    store(self.desc.aux, kept, self.d.dtype, before);
                    gelu(before).0
                }
                DGELU | DGELU_BGRAD => {
                    let value = value * gelu(load(self.desc.aux, kept, self.d.dtype)).1;
                    *sum += value;
                    value
                }
                _ => value,
            }
        }
    }
}

type Handle = usize;

macro_rules! exports {
    ($(fn $name:ident($($a:ident: $t:ty),* $(,)?) $body:block)*) => {$(
        /// # Safety
        /// As cuBLASLt's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($a: $t),*) -> Code {
            let run = || -> Result<(), Code> { $body };
            run().err().unwrap_or(SUCCESS)
        }
    )*};
}

/// The object behind the handle of a descriptor.
unsafe fn known<'a, T>(handle: Handle) -> Result<&'a mut T, Code> {
    if handle == 0 {
        return Err(INVALID_VALUE);
    }
    // SAFETY: handles are boxes that a create function made and its destroy function takes back.
    Ok(unsafe { &mut *(handle as *mut T) })
}

fn made<T>(value: T) -> Handle {
    Box::into_raw(Box::new(value)) as Handle
}

unsafe fn gone<T>(handle: Handle) -> Result<(), Code> {
    // SAFETY: as in `known`; the caller does not use it again.
    unsafe { drop(Box::from_raw(known::<T>(handle)?)) };
    Ok(())
}

/// The value of an attribute, of the given size.
unsafe fn value<T: Copy>(from: *const c_void, size: usize) -> Result<T, Code> {
    if from.is_null() || size != size_of::<T>() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: the caller's memory has the size that it says.
    Ok(unsafe { from.cast::<T>().read_unaligned() })
}

/// `cublasLtMatmulHeuristicResult_t`.
#[repr(C)]
pub struct Heuristic {
    pub algorithm: Algorithm,
    workspace: usize,
    pub state: Code,
    waves: f32,
    reserved: [c_int; 4],
}

const MAGIC: u64 = 0x51a2_d11e;

exports! {
    fn cublasLtCreate(out: *mut Handle) {
        drain("cublasLtCreate").map_err(|_| EXECUTION_FAILED)?;
        unsafe { put(out, made(0_u8)) }
    }
    fn cublasLtDestroy(handle: Handle) { unsafe { gone::<u8>(handle) } }

    fn cublasLtMatmulDescCreate(out: *mut Handle, compute: c_int, scale: c_int) {
        let desc = Desc { compute, scale, transposed: [0; 2], epilogue: DEFAULT, bias: 0, aux: 0, aux_leading: 0 };
        unsafe { put(out, made(desc)) }
    }
    fn cublasLtMatmulDescDestroy(desc: Handle) { unsafe { gone::<Desc>(desc) } }
    fn cublasLtMatmulDescSetAttribute(desc: Handle, attribute: c_int, from: *const c_void, size: usize) {
        unsafe {
            let desc = known::<Desc>(desc)?;
            match attribute {
                3 => desc.transposed[0] = value(from, size)?,
                4 => desc.transposed[1] = value(from, size)?,
                7 => desc.epilogue = value(from, size)?,
                8 => desc.bias = value(from, size)?,
                11 => desc.aux = value(from, size)?,
                12 => desc.aux_leading = value(from, size)?,
                _ => return Err(NOT_SUPPORTED),
            }
        }
        Ok(())
    }

    fn cublasLtMatrixLayoutCreate(out: *mut Handle, dtype: c_int, rows: u64, cols: u64, leading: i64) {
        if ![F64, F32, BF16, F16].contains(&dtype) { return Err(NOT_SUPPORTED); }
        unsafe { put(out, made(Layout { dtype, rows, cols, leading, count: 1, stride: 0 })) }
    }
    fn cublasLtMatrixLayoutDestroy(layout: Handle) { unsafe { gone::<Layout>(layout) } }
    fn cublasLtMatrixLayoutSetAttribute(layout: Handle, attribute: c_int, from: *const c_void, size: usize) {
        unsafe {
            let layout = known::<Layout>(layout)?;
            match attribute {
                5 => layout.count = value(from, size)?,
                6 => layout.stride = value(from, size)?,
                _ => return Err(NOT_SUPPORTED),
            }
        }
        Ok(())
    }

    fn cublasLtMatmulPreferenceCreate(out: *mut Handle) { unsafe { put(out, made(Preference { workspace: 0, alignment: [256; 4] })) } }
    fn cublasLtMatmulPreferenceDestroy(preference: Handle) { unsafe { gone::<Preference>(preference) } }
    fn cublasLtMatmulPreferenceSetAttribute(preference: Handle, attribute: c_int, from: *const c_void, size: usize) {
        if from.is_null() || size == 0 { return Err(INVALID_VALUE); }
        unsafe {
            let preference = known::<Preference>(preference)?;
            match attribute {
                1 => preference.workspace = value(from, size)?,
                5..=8 => preference.alignment[attribute as usize - 5] = value(from, size)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn cublasLtMatmulAlgoGetHeuristic(
        handle: Handle, desc: Handle, a: Handle, b: Handle, c: Handle, d: Handle, preference: Handle, wanted: c_int,
        results: *mut Heuristic, count: *mut c_int,
    ) {
        unsafe {
            known::<u8>(handle)?;
            let wanted = usize::try_from(wanted).ok().filter(|wanted| *wanted > 0 && !results.is_null());
            let (desc, preference) = (known::<Desc>(desc)?, known::<Preference>(preference)?);
            let [a, b, c, d] = [&*known::<Layout>(a)?, &*known(b)?, &*known(c)?, &*known(d)?];
            shape(desc, a, b, c, d)?;
            let found = algorithms(desc, [a, b, c, d], preference, wanted.ok_or(INVALID_VALUE)?);
            for (at, &algorithm) in found.iter().enumerate() {
                let state = if algorithm.is_valid == 1 { SUCCESS } else { NOT_SUPPORTED };
                let workspace = algorithm.workspace as usize;
                results.add(at).write(Heuristic { algorithm, workspace, state, waves: 1.0, reserved: [0; 4] });
            }
            put(count, found.len() as c_int)
        }
    }

    fn cublasLtMatmul(
        handle: Handle, desc: Handle, alpha: *const c_void, a: usize, a_layout: Handle, b: usize, b_layout: Handle,
        beta: *const c_void, c: usize, c_layout: Handle, d: usize, d_layout: Handle, algorithm: *const Algorithm,
        workspace: usize, workspace_size: usize, on: Handle,
    ) {
        unsafe {
            known::<u8>(handle)?;
            let desc = *known::<Desc>(desc)?;
            let [a_layout, b_layout, c_layout, d_layout] =
                [*known::<Layout>(a_layout)?, *known(b_layout)?, *known(c_layout)?, *known(d_layout)?];
            shape(&desc, &a_layout, &b_layout, &c_layout, &d_layout)?;
            if alpha.is_null() || beta.is_null() || algorithm.is_null() || (*algorithm).magic != MAGIC {
                return Err(INVALID_VALUE);
            }
            let algorithm = *algorithm;
            if algorithm.is_valid == 0 { return Err(NOT_SUPPORTED); }
            let is_aligned = |(at, bytes): (usize, u32)| at.is_multiple_of(bytes as usize);
            if workspace_size < algorithm.workspace as usize || ![a, b, c, d].into_iter().zip(algorithm.alignment).all(is_aligned) {
                return Err(INVALID_VALUE);
            }
            let number = |from: *const c_void| match desc.scale {
                F64 => *from.cast::<f64>(),
                _ => f64::from(*from.cast::<f32>()),
            };
            let product = Product {
                desc, a: a_layout, b: b_layout, c: c_layout, d: d_layout, at: [a, b, c, d],
                alpha: number(alpha), beta: number(beta), order: ORDERS[algorithm.order as usize % ORDERS.len()],
            };
            let stream = stream(on).map_err(|_| EXECUTION_FAILED)?;
            let judged = product;
            let judge = move |who: &Accessor| {
                memory::access(who, workspace, workspace_size, true, "matmul: workspace")?;
                judged.judge(who)
            };
            submit(&stream, judge, move || product.run()).map_err(|_| EXECUTION_FAILED)?;
            counts::add(stream.device, Count::Matmul);
            Ok(())
        }
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtGetVersion() -> usize {
    130_000
}

#[unsafe(no_mangle)]
pub extern "C" fn cublasLtGetStatusString(code: Code) -> *const c_char {
    let text = match code {
        0 => c"CUBLAS_STATUS_SUCCESS",
        7 => c"CUBLAS_STATUS_INVALID_VALUE",
        13 => c"CUBLAS_STATUS_EXECUTION_FAILED",
        15 => c"CUBLAS_STATUS_NOT_SUPPORTED",
        _ => c"CUBLAS_STATUS_UNKNOWN",
    };
    text.as_ptr()
}
