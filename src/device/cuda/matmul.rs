//! Matrix products by cuBLASLt. Each kind of product has one cached plan, which cuBLASLt's
//! heuristics select.
//!
//! Matrices are column-major here, as in cuBLASLt. `kernels/gemm/cuda.rs` converts row-major
//! matrices.

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

/// The layout of a column-major matrix, or of a batch of such matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Layout {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// The number of elements from one column to the next.
    pub(crate) leading: usize,
    /// The number of elements from one matrix of the batch to the next.
    pub(crate) stride: usize,
}

/// An operation that is fused with a product. D is the product's result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Epilogue {
    /// No operation.
    None,
    /// Adds a bias, one number for each row.
    Bias,
    /// Adds a bias, one number for each row. Stores the sum in an auxiliary matrix, and the sum's
    /// GELU (tanh) in D.
    BiasGelu(Saved),
    /// Multiplies D by the derivative of GELU at the auxiliary matrix that `BiasGelu` stored.
    GeluSlope(Saved),
    /// Also stores the sum of each column of op(B), which is the bias gradient.
    ColumnSums,
}

/// The leading dimension of the column-major auxiliary matrix.
pub(crate) type Saved = usize;

/// D ← epilogue(α op(A) op(B) + β D), for every matrix of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Matmul {
    /// The element type of A and B.
    pub(crate) inputs: DType,
    /// The element type of D.
    pub(crate) output: DType,
    /// Whether op(A) is the transpose of A.
    pub(crate) transpose_a: bool,
    /// Whether op(B) is the transpose of B.
    pub(crate) transpose_b: bool,
    pub(crate) a: Layout,
    pub(crate) b: Layout,
    pub(crate) d: Layout,
    pub(crate) batch: usize,
    pub(crate) epilogue: Epilogue,
}

/// The addresses of the operands on the GPU.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Operands {
    pub(crate) a: u64,
    pub(crate) b: u64,
    pub(crate) d: u64,
    /// The epilogue's bias or column sums; 0 if there are none.
    pub(crate) vector: u64,
    /// The epilogue's auxiliary matrix; 0 if there is none.
    pub(crate) saved: u64,
}

/// cuBLASLt for one stream: a cuBLASLt handle, a workspace and plans. The cuBLASLt handle is never
/// destroyed, because cuBLASLt would then wait for the device. The next stream reuses the handle.
pub(crate) struct Lt {
    api: &'static CublasLt,
    handle: cublasLtHandle_t,
    context: &'static Context,
    /// The cached plans. None if cuBLASLt does not support the product with its epilogue.
    plans: RefCell<HashMap<Key, Option<Rc<Plan>>>>,
    workspace: RefCell<Option<StreamMemory>>,
}

/// The key of a plan: the product, whether f32 keeps all its bits (no TF32), and the alignments of
/// A, B and D in bytes.
type Key = (Matmul, bool, [u32; 3]);

/// The largest number of cached plans. The cache is cleared beyond it, because a server that keeps
/// receiving new lengths would keep adding plans.
const MAX_PLANS: usize = 1024;

/// The largest workspace in bytes. NVIDIA recommends it for Hopper, and other GPUs need no more.
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
                // SAFETY: `handle` is valid for writing a handle.
                #[allow(unsafe_code)]
                cublas_lt("cublasLtCreate", unsafe { (api.create)(&mut handle) })?;
                handle
            }
        };
        Ok(Self { api, handle, context, plans: RefCell::default(), workspace: RefCell::default() })
    }

    /// Launches a product. Returns false, without a launch, if cuBLASLt does not support the
    /// product with its epilogue. For a product without an epilogue, missing support is an error.
    ///
    /// # Safety
    /// The operands are complete at their addresses, and the caller has ordered their memory with
    /// the stream. The operands that the product writes are borrowed exclusively.
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
        // D and the epilogue's operands share one alignment.
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
        plan.set_pointers(&at)?;
        // SAFETY: the plan was made for these layouts, and its descriptors are live. α and β have
        // the scale type and live until the call returns. The workspace has the stated bytes. The
        // caller guarantees the operands.
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
            // The heuristics had returned this algorithm as supported.
            self.plans.borrow_mut().insert(key, None);
            return Ok(false);
        }
        cublas_lt("cublasLtMatmul", code).map(|()| true)
    }

    /// Returns the plan of a key, or none if cuBLASLt does not support the product with its
    /// epilogue.
    fn plan(&self, key: &Key, at: &Operands) -> Result<Option<Rc<Plan>>> {
        let mut plans = self.plans.borrow_mut();
        if let Some(plan) = plans.get(key) {
            return Ok(plan.clone());
        }
        let plan = match Plan::new(self.api, self.handle, key, at) {
            Ok(plan) => Some(Rc::new(plan)),
            // Which epilogues cuBLASLt supports depends on its version, the element types and the
            // layouts.
            Err(Error::Unsupported { .. } | Error::Library { .. }) if key.0.epilogue != Epilogue::None => {
                None
            }
            Err(error) => return Err(error),
        };
        if plans.len() >= MAX_PLANS {
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

/// The descriptors of a product, and the algorithm selected for them.
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
        // SAFETY: `desc` is valid for writing a descriptor.
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
        plan.set_pointers(at)?;
        plan.a = layout(api, product.inputs, &product.a, product.batch)?;
        plan.b = layout(api, product.inputs, &product.b, product.batch)?;
        plan.d = layout(api, product.output, &product.d, product.batch)?;
        plan.select_algorithm(handle, product, *aligned)?;
        Ok(plan)
    }

    fn select_algorithm(
        &mut self,
        handle: cublasLtHandle_t,
        product: &Matmul,
        aligned: [u32; 3],
    ) -> Result<()> {
        let preference = Preference::new(self.api)?;
        preference.set(PreferenceIs::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, WORKSPACE)?;
        // CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE keeps partial sums as values of the accumulator
        // type, and adds them in a fixed order.
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
        // SAFETY: the descriptors are live, and `found` has room for the requested number of
        // results.
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
        // The results are sorted by estimated time. Each has a state that shows whether it is
        // usable.
        let found = found.iter().take(usize::try_from(count).unwrap_or(0));
        let best = found.into_iter().find(|found| found.state == cublasStatus_t::CUBLAS_STATUS_SUCCESS);
        let Some(best) = best else {
            let reason = format!("cuBLASLt has no algorithm for {product:?}");
            return Err(Error::Unsupported { op: "gemm", reason });
        };
        (self.algorithm, self.workspace) = (best.algo, best.workspaceSize);
        Ok(())
    }

    /// Sets the addresses of the epilogue's operands.
    fn set_pointers(&self, at: &Operands) -> Result<()> {
        if at.vector != 0 {
            self.set(DescIs::CUBLASLT_MATMUL_DESC_BIAS_POINTER, at.vector)?;
        }
        if at.saved != 0 {
            self.set(DescIs::CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, at.saved)?;
        }
        Ok(())
    }

    fn set<V: Copy>(&self, attribute: DescIs, value: V) -> Result<()> {
        // SAFETY: the descriptor is live, and the value has the stated size; cuBLASLt copies it.
        #[allow(unsafe_code)]
        let code =
            unsafe { (self.api.desc_set)(self.desc, attribute, (&raw const value).cast(), size_of::<V>()) };
        cublas_lt("cublasLtMatmulDescSetAttribute", code)
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: a descriptor that is not null was created before and is not used again. Launches
        // have copied it.
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
    let count =
        i32::try_from(batch).map_err(|_| Error::invalid("gemm", format!("{batch} matrices are too many")))?;
    let mut handle = std::ptr::null_mut();
    // SAFETY: `handle` is valid for writing a layout.
    #[allow(unsafe_code)]
    let code = unsafe {
        (api.layout_create)(&mut handle, dtype, layout.rows as u64, layout.cols as u64, layout.leading as i64)
    };
    cublas_lt("cublasLtMatrixLayoutCreate", code)?;
    if batch > 1 {
        let stride = layout.stride as i64;
        // SAFETY: the layout is live, and the values have the stated sizes; cuBLASLt copies them.
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
        // SAFETY: `handle` is valid for writing a preference.
        #[allow(unsafe_code)]
        cublas_lt("cublasLtMatmulPreferenceCreate", unsafe { (api.preference_create)(&mut handle) })?;
        Ok(Self { api, handle })
    }

    fn set<V: Copy>(&self, attribute: PreferenceIs, value: V) -> Result<()> {
        // SAFETY: the preference is live, and the value has the stated size; cuBLASLt copies it.
        #[allow(unsafe_code)]
        let code = unsafe {
            (self.api.preference_set)(self.handle, attribute, (&raw const value).cast(), size_of::<V>())
        };
        cublas_lt("cublasLtMatmulPreferenceSetAttribute", code)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: the preference was created before and is not used again.
        #[allow(unsafe_code)]
        let _ = unsafe { (self.api.preference_destroy)(self.handle) };
    }
}
