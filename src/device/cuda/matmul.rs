//! Matrix products by cuBLASLt: one plan a shape, found once by its heuristics and kept.
//!
//! Matrices are column-major here, as cuBLASLt's are; `kernels/gemm/cuda.rs` brings row-major ones into that form.

use super::{
    Cuda,
    context::Context,
    libraries::{self, CublasLt},
    lock,
    memory::StreamMemory,
    status::cublas_lt,
};
use crate::{
    device::DType,
    error::{Error, Result},
};
use cudarc::cublaslt::sys::{
    cublasComputeType_t as Compute, cublasLtEpilogue_t, cublasLtHandle_t, cublasLtMatmulAlgo_t,
    cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t as DescIs, cublasLtMatmulHeuristicResult_t,
    cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t as PreferenceIs, cublasLtMatrixLayout_t,
    cublasLtMatrixLayoutAttribute_t as LayoutIs, cublasStatus_t, cudaDataType as CudaType,
};
use std::{cell::RefCell, collections::HashMap, ffi::c_void, rc::Rc};

/// A column-major matrix of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Layout {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// Elements from one column to the next.
    pub(crate) leading: usize,
    /// Elements from one matrix to the next.
    pub(crate) stride: usize,
}

/// What becomes of a product, a column-major matrix, beside being stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Epilogue {
    /// Nothing.
    None,
    /// A number a row is added.
    Bias,
    /// A number a row is added; the sum is stored elsewhere, and its gelu (by tanh) here.
    BiasGelu(Saved),
    /// It is multiplied with the slope of gelu at what was stored then.
    GeluSlope(Saved),
    /// The sums of B's columns, as it is multiplied, are stored elsewhere.
    ColumnSums,
}

/// A column-major matrix beside D: elements from one column to the next.
pub(crate) type Saved = usize;

/// D ← α op(A) op(B) + β D, for every member of a batch; what an epilogue makes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Matmul {
    /// The element of A and B.
    pub(crate) inputs: DType,
    /// The element of D.
    pub(crate) output: DType,
    /// Whether A is transposed first.
    pub(crate) transpose_a: bool,
    /// Whether B is.
    pub(crate) transpose_b: bool,
    pub(crate) a: Layout,
    pub(crate) b: Layout,
    pub(crate) d: Layout,
    pub(crate) batch: usize,
    pub(crate) epilogue: Epilogue,
}

/// Where the operands are.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Operands {
    pub(crate) a: u64,
    pub(crate) b: u64,
    pub(crate) d: u64,
    /// The epilogue's numbers a row or sums, if it has some.
    pub(crate) vector: u64,
    /// The epilogue's matrix, if it has one.
    pub(crate) saved: u64,
}

/// cuBLASLt for one stream: its handle, workspace and plans. Handles are not destroyed, for which
/// cuBLASLt would wait for the device, but kept for the next stream.
pub(crate) struct Lt {
    api: &'static CublasLt,
    handle: cublasLtHandle_t,
    context: &'static Context,
    /// None where cuBLASLt has no way.
    plans: RefCell<HashMap<Key, Option<Rc<Plan>>>>,
    workspace: RefCell<Option<StreamMemory>>,
}

/// What a plan depends on: the product, whether f32 keeps all its bits, and how A, B and D are
/// aligned, in bytes.
type Key = (Matmul, bool, [u32; 3]);

/// How many plans are kept. A server that sees ever new lengths makes ever new plans; they are all
/// forgotten then.
const PLANS: usize = 1024;

/// What an algorithm may ask for: NVIDIA's advice for Hopper, and enough for others.
const WORKSPACE: usize = 32 << 20;

impl Lt {
    pub(super) fn new(cuda: &Cuda) -> Result<Self> {
        let api = libraries::cublas_lt()?;
        let context = cuda.0.context;
        let spare = lock(&context.spare_lt).pop();
        let handle = match spare {
            Some(handle) => handle,
            None => {
                context.make_current()?;
                let mut handle = std::ptr::null_mut();
                // SAFETY: `handle` is a place for one.
                #[allow(unsafe_code)]
                cublas_lt("cublasLtCreate", unsafe { (api.create)(&mut handle) })?;
                handle
            }
        };
        Ok(Self { api, handle, context, plans: RefCell::default(), workspace: RefCell::default() })
    }

    /// Asks the stream for a product. Returns whether cuBLASLt has a way to compute it with its epilogue: if not, nothing was
    /// done. Without an epilogue that is an error.
    ///
    /// # Safety
    /// The operands lie where they are said to, in full, in memory that the caller has ordered the stream with; what is written
    /// is borrowed exclusively.
    #[allow(unsafe_code)]
    pub(crate) unsafe fn run(
        &self,
        cuda: &Cuda,
        product: &Matmul,
        at: Operands,
        alpha: f64,
        beta: f64,
    ) -> Result<bool> {
        cuda.0.context.make_current()?;
        let alignment = |address: u64| 1 << address.trailing_zeros().min(8);
        // What the epilogue loads and stores with D has to be aligned as D is.
        let aligned = [at.a, at.b, at.d | at.vector | at.saved].map(alignment);
        let key = (*product, cuda.is_exact(), aligned);
        let Some(plan) = self.plan(&key, &at)? else { return Ok(false) };
        let mut workspace = self.workspace.borrow_mut();
        let have = workspace.as_ref().map_or(0, StreamMemory::bytes);
        if plan.workspace > have {
            *workspace = None;
            *workspace = Some(StreamMemory::new(&cuda.0, plan.workspace.next_power_of_two())?);
        }
        let (space, bytes) = workspace.as_ref().map_or((0, 0), |memory| (memory.address(), memory.bytes()));
        let narrow = [alpha as f32, beta as f32];
        let wide = [alpha, beta];
        let scales: [*const c_void; 2] = match product.inputs {
            DType::F64 => [(&raw const wide[0]).cast(), (&raw const wide[1]).cast()],
            _ => [(&raw const narrow[0]).cast(), (&raw const narrow[1]).cast()],
        };
        plan.point(&at)?;
        // SAFETY: the plan was made for these layouts, its descriptors live, α and β are of the scale type and live until the
        // call returns, the workspace has as many bytes as are stated; the operands are the caller's promise.
        let code = unsafe {
            (self.api.matmul)(
                self.handle,
                plan.desc,
                scales[0],
                at.a as *const c_void,
                plan.a,
                at.b as *const c_void,
                plan.b,
                scales[1],
                at.d as *const c_void,
                plan.d,
                at.d as *mut c_void,
                plan.d,
                &raw const plan.algorithm,
                space as *mut c_void,
                bytes,
                cuda.0.stream.handle.cast(),
            )
        };
        if code == cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED && product.epilogue != Epilogue::None {
            // The heuristics have promised too much.
            self.plans.borrow_mut().insert(key, None);
            return Ok(false);
        }
        cublas_lt("cublasLtMatmul", code).map(|()| true)
    }

    /// The plan for a product, whose operands are aligned as these are; none if there is no way.
    fn plan(&self, key: &Key, at: &Operands) -> Result<Option<Rc<Plan>>> {
        let mut plans = self.plans.borrow_mut();
        if let Some(plan) = plans.get(key) {
            return Ok(plan.clone());
        }
        let plan = match Plan::new(self.api, self.handle, key, at) {
            Ok(plan) => Some(Rc::new(plan)),
            // Which epilogues there are for which elements and layouts differs from version to version.
            Err(Error::Unsupported { .. } | Error::Library { .. }) if key.0.epilogue != Epilogue::None => {
                None
            }
            Err(error) => return Err(error),
        };
        if plans.len() >= PLANS {
            plans.clear();
        }
        plans.insert(*key, plan.clone());
        Ok(plan)
    }
}

impl Drop for Lt {
    fn drop(&mut self) {
        lock(&self.context.spare_lt).push(self.handle);
    }
}

/// Descriptors, and the algorithm for them.
struct Plan {
    api: &'static CublasLt,
    desc: cublasLtMatmulDesc_t,
    a: cublasLtMatrixLayout_t,
    b: cublasLtMatrixLayout_t,
    d: cublasLtMatrixLayout_t,
    algorithm: cublasLtMatmulAlgo_t,
    workspace: usize,
}

impl Plan {
    fn new(
        api: &'static CublasLt,
        handle: cublasLtHandle_t,
        (product, exact, aligned): &Key,
        at: &Operands,
    ) -> Result<Self> {
        let (compute, scale) = match product.inputs {
            DType::F64 => (Compute::CUBLAS_COMPUTE_64F, CudaType::CUDA_R_64F),
            DType::F32 if !*exact => (Compute::CUBLAS_COMPUTE_32F_FAST_TF32, CudaType::CUDA_R_32F),
            _ => (Compute::CUBLAS_COMPUTE_32F, CudaType::CUDA_R_32F),
        };
        use std::ptr::null_mut;
        let none = cublasLtMatmulAlgo_t { data: [0; 8] };
        let mut plan = Self {
            api,
            desc: null_mut(),
            a: null_mut(),
            b: null_mut(),
            d: null_mut(),
            algorithm: none,
            workspace: 0,
        };
        // SAFETY: `desc` is a place for a descriptor.
        #[allow(unsafe_code)]
        let code = unsafe { (api.desc_create)(&mut plan.desc, compute, scale) };
        cublas_lt("cublasLtMatmulDescCreate", code)?;
        // CUBLAS_OP_N is 0, CUBLAS_OP_T is 1.
        plan.set(DescIs::CUBLASLT_MATMUL_DESC_TRANSA, i32::from(product.transpose_a))?;
        plan.set(DescIs::CUBLASLT_MATMUL_DESC_TRANSB, i32::from(product.transpose_b))?;
        use cublasLtEpilogue_t as Is;
        let (epilogue, saved) = match product.epilogue {
            Epilogue::None => (Is::CUBLASLT_EPILOGUE_DEFAULT, None),
            Epilogue::Bias => (Is::CUBLASLT_EPILOGUE_BIAS, None),
            Epilogue::BiasGelu(saved) => (Is::CUBLASLT_EPILOGUE_GELU_AUX_BIAS, Some(saved)),
            Epilogue::GeluSlope(saved) => (Is::CUBLASLT_EPILOGUE_DGELU, Some(saved)),
            Epilogue::ColumnSums => (Is::CUBLASLT_EPILOGUE_BGRADB, None),
        };
        plan.set(DescIs::CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue as u32)?;
        if let Some(leading) = saved {
            plan.set(DescIs::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, leading as i64)?;
        }
        plan.point(at)?;
        plan.a = layout(api, product.inputs, &product.a, product.batch)?;
        plan.b = layout(api, product.inputs, &product.b, product.batch)?;
        plan.d = layout(api, product.output, &product.d, product.batch)?;
        plan.choose(handle, product, *aligned)?;
        Ok(plan)
    }

    fn choose(&mut self, handle: cublasLtHandle_t, product: &Matmul, aligned: [u32; 3]) -> Result<()> {
        let preference = Preference::new(self.api)?;
        preference.set(PreferenceIs::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, WORKSPACE)?;
        // Partial sums are kept in the accumulator, and added in a fixed order.
        preference.set(PreferenceIs::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, 2_u32)?;
        preference.set(PreferenceIs::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, aligned[0])?;
        preference.set(PreferenceIs::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, aligned[1])?;
        preference.set(PreferenceIs::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, aligned[2])?;
        preference.set(PreferenceIs::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, aligned[2])?;
        let none = cublasLtMatmulHeuristicResult_t {
            algo: self.algorithm,
            workspaceSize: 0,
            state: cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED,
            wavesCount: 0.0,
            reserved: [0; 4],
        };
        let (mut found, mut count) = ([none; 8], 0);
        // SAFETY: the descriptors live, and there is room for as many results as are asked for.
        #[allow(unsafe_code)]
        let code = unsafe {
            (self.api.heuristic)(
                handle,
                self.desc,
                self.a,
                self.b,
                self.d,
                self.d,
                preference.handle,
                found.len() as i32,
                found.as_mut_ptr(),
                &mut count,
            )
        };
        cublas_lt("cublasLtMatmulAlgoGetHeuristic", code)?;
        // The best comes first, and each says whether it is of use at all.
        let found = found.iter().take(usize::try_from(count).unwrap_or(0));
        let best = found.into_iter().find(|found| found.state == cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        let Some(best) = best else {
            let reason = format!("cuBLASLt knows no way to compute {product:?}");
            return Err(Error::Unsupported { op: "gemm", reason });
        };
        (self.algorithm, self.workspace) = (best.algo, best.workspaceSize);
        Ok(())
    }

    /// Tells where the epilogue's operands are.
    fn point(&self, at: &Operands) -> Result<()> {
        if at.vector != 0 {
            self.set(DescIs::CUBLASLT_MATMUL_DESC_BIAS_POINTER, at.vector)?;
        }
        if at.saved != 0 {
            self.set(DescIs::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, at.saved)?;
        }
        Ok(())
    }

    fn set<V: Copy>(&self, attribute: DescIs, value: V) -> Result<()> {
        // SAFETY: the descriptor lives, and the value has the size that is stated; it is copied.
        #[allow(unsafe_code)]
        let code =
            unsafe { (self.api.desc_set)(self.desc, attribute, (&raw const value).cast(), size_of::<V>()) };
        cublas_lt("cublasLtMatmulDescSetAttribute", code)
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: what is not null was created, and is not used again; cuBLASLt has copied what launches need.
        #[allow(unsafe_code)]
        unsafe {
            for layout in [self.a, self.b, self.d].into_iter().filter(|layout| !layout.is_null()) {
                let _ = (self.api.layout_destroy)(layout);
            }
            if !self.desc.is_null() {
                let _ = (self.api.desc_destroy)(self.desc);
            }
        }
    }
}

fn layout(api: &CublasLt, dtype: DType, layout: &Layout, batch: usize) -> Result<cublasLtMatrixLayout_t> {
    let dtype = match dtype {
        DType::F64 => CudaType::CUDA_R_64F,
        DType::F32 => CudaType::CUDA_R_32F,
        DType::BF16 => CudaType::CUDA_R_16BF,
        DType::F16 => CudaType::CUDA_R_16F,
    };
    let count = i32::try_from(batch).map_err(|_| Error::invalid("gemm", format!("a batch of {batch}")))?;
    let mut handle = std::ptr::null_mut();
    // SAFETY: `handle` is a place for a layout.
    #[allow(unsafe_code)]
    let code = unsafe {
        (api.layout_create)(&mut handle, dtype, layout.rows as u64, layout.cols as u64, layout.leading as i64)
    };
    cublas_lt("cublasLtMatrixLayoutCreate", code)?;
    if batch > 1 {
        let stride = layout.stride as i64;
        // SAFETY: the layout lives, and the values have the sizes that are stated; they are copied.
        #[allow(unsafe_code)]
        unsafe {
            let set = |attribute, value, size| {
                let code = (api.layout_set)(handle, attribute, value, size);
                cublas_lt("cublasLtMatrixLayoutSetAttribute", code)
            };
            set(LayoutIs::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, (&raw const count).cast(), 4)?;
            set(LayoutIs::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, (&raw const stride).cast(), 8)?;
        }
    }
    Ok(handle)
}

struct Preference {
    api: &'static CublasLt,
    handle: cublasLtMatmulPreference_t,
}

impl Preference {
    fn new(api: &'static CublasLt) -> Result<Self> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: `handle` is a place for a preference.
        #[allow(unsafe_code)]
        cublas_lt("cublasLtMatmulPreferenceCreate", unsafe { (api.preference_create)(&mut handle) })?;
        Ok(Self { api, handle })
    }

    fn set<V: Copy>(&self, attribute: PreferenceIs, value: V) -> Result<()> {
        // SAFETY: the preference lives, and the value has the size that is stated; it is copied.
        #[allow(unsafe_code)]
        let code = unsafe {
            (self.api.preference_set)(self.handle, attribute, (&raw const value).cast(), size_of::<V>())
        };
        cublas_lt("cublasLtMatmulPreferenceSetAttribute", code)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: the preference was created, and is not used again.
        #[allow(unsafe_code)]
        let _ = unsafe { (self.api.preference_destroy)(self.handle) };
    }
}
