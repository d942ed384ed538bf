//! cuBLASLt, opened at run time: f16 products with f32 sums, for batches of many rows.
use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublaslt::{result as lt, sys};

use super::{Buffer, Device, Error, Result, Stream, gate};

/// What a product is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Output {
    /// f32, stored.
    F32,
    /// f32, added to what is there.
    AddF32,
    /// f16, stored.
    F16,
}

/// `out[n][rows] = alpha * x[n][cols] W[rows][cols]^T`, all row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Rows of `x` and `out`.
    pub n: usize,
    /// Rows of W.
    pub rows: usize,
    /// Columns of W and `x`.
    pub cols: usize,
    /// Values between rows of `out`.
    pub stride: usize,
    /// What is written.
    pub output: Output,
}

/// Descriptors of one shape and the algorithm chosen for it.
struct Plan {
    description: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made by `Blas::plan`, used by nobody else.
        unsafe {
            let _ = lt::destroy_matmul_desc(self.description);
            for layout in [self.w, self.x, self.out] {
                let _ = lt::destroy_matrix_layout(layout);
            }
        }
    }
}

/// A handle to the library, its workspace and the plans made so far.
pub struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: Buffer<u8>,
    plans: HashMap<Shape, Plan>,
}

// SAFETY: the handle is used from one thread at a time, through `&mut self`.
unsafe impl Send for Blas {}

impl Drop for Blas {
    fn drop(&mut self) {
        let _work = gate::work();
        self.plans.clear();
        // SAFETY: made by `Blas::open`.
        unsafe {
            let _ = lt::destroy_handle(self.handle);
        }
    }
}

fn fail(call: &'static str) -> impl Fn(lt::CublasError) -> Error {
    move |e| Error::Driver { call, message: e.to_string() }
}

impl Blas {
    /// Bytes of workspace that NVIDIA recommends for Hopper.
    pub const WORKSPACE: usize = 32 << 20;

    /// Opens the library; `None` when it is not installed.
    ///
    /// # Errors
    /// It is there but does not start.
    pub fn open(device: &Device) -> Result<Option<Self>> {
        device.bind()?;
        // SAFETY: only tries to open the library.
        if !unsafe { sys::is_culib_present() } {
            return Ok(None);
        }
        let _work = gate::work();
        let handle = lt::create_handle().map_err(fail("cublasLtCreate"))?;
        Ok(Some(Self { handle, workspace: device.alloc(Self::WORKSPACE)?, plans: HashMap::new() }))
    }

    fn plan(&mut self, shape: Shape) -> Result<&Plan> {
        if !self.plans.contains_key(&shape) {
            let plan = self.make(shape)?;
            self.plans.insert(shape, plan);
        }
        Ok(&self.plans[&shape])
    }

    fn make(&self, shape: Shape) -> Result<Plan> {
        use sys::cudaDataType::{CUDA_R_16F, CUDA_R_32F};
        let Shape { n, rows, cols, stride, output } = shape;
        // Column-major, as the library sees it: out^T [rows][n] = (W^T [cols][rows])^T x^T [cols][n].
        let layout = |ty, rows: usize, cols: usize, stride: usize| {
            lt::create_matrix_layout(ty, rows as u64, cols as u64, stride as i64)
                .map_err(fail("cublasLtMatrixLayoutCreate"))
        };
        let out_type = if output == Output::F16 { CUDA_R_16F } else { CUDA_R_32F };
        // CUBLAS_OP_T of cublasOperation_t.
        let transposed: i32 = 1;
        let description = lt::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, CUDA_R_32F)
            .map_err(fail("cublasLtMatmulDescCreate"))?;
        let mut plan = Plan {
            description,
            w: layout(CUDA_R_16F, cols, rows, cols)?,
            x: layout(CUDA_R_16F, cols, n, cols)?,
            out: layout(out_type, rows, n, stride)?,
            // SAFETY: plain words, filled in below.
            algorithm: unsafe { std::mem::zeroed() },
        };
        let preference = lt::create_matmul_pref().map_err(fail("cublasLtMatmulPreferenceCreate"))?;
        let workspace = Self::WORKSPACE;
        // SAFETY: all handles were just made; the attribute values outlive the calls that copy them.
        let found = unsafe {
            lt::set_matmul_desc_attribute(
                plan.description,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                std::ptr::from_ref(&transposed).cast::<c_void>(),
                size_of_val(&transposed),
            )
            .and_then(|()| {
                lt::set_matmul_pref_attribute(
                    preference,
                    sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                    std::ptr::from_ref(&workspace).cast::<c_void>(),
                    size_of_val(&workspace),
                )
            })
            .and_then(|()| {
                lt::get_matmul_algo_heuristic(
                    self.handle,
                    plan.description,
                    plan.w,
                    plan.x,
                    plan.out,
                    plan.out,
                    preference,
                )
            })
        };
        // SAFETY: made above.
        let _ = unsafe { lt::destroy_matmul_pref(preference) };
        plan.algorithm = found.map_err(fail("cublasLtMatmulAlgoGetHeuristic"))?.algo;
        Ok(plan)
    }

    /// Queues a product of `w` `[rows][cols]` and `x` `[n][cols]`, both f16, times `alpha`.
    ///
    /// # Errors
    /// What the library reports.
    ///
    /// # Safety
    /// The addresses are valid for the shape on the stream's device until the work is done; nothing else uses this handle's workspace
    /// on another stream meanwhile.
    pub unsafe fn matmul(
        &mut self,
        stream: &Stream,
        shape: Shape,
        alpha: f32,
        w: *const half::f16,
        x: *const half::f16,
        out: *mut c_void,
    ) -> Result<()> {
        let _work = gate::work();
        stream.device().bind()?;
        let (handle, workspace) = (self.handle, self.workspace.ptr());
        let plan = self.plan(shape)?;
        let beta: f32 = if shape.output == Output::AddF32 { 1.0 } else { 0.0 };
        // SAFETY: the plan's descriptors are of this shape; the rest is the caller's promise.
        unsafe {
            lt::matmul(
                handle,
                plan.description,
                std::ptr::from_ref(&alpha).cast(),
                std::ptr::from_ref(&beta).cast(),
                w.cast(),
                plan.w,
                x.cast(),
                plan.x,
                out,
                plan.out,
                out,
                plan.out,
                &plan.algorithm,
                workspace.cast(),
                Self::WORKSPACE,
                stream.raw().cast(),
            )
        }
        .map_err(fail("cublasLtMatmul"))
    }
}
