//! Dense products by cuBLASLt.
//!
//! The library is column-major: a row-major c = a·b is its cᵀ = bᵀ·aᵀ, so that b comes first. f32 inputs are
//! multiplied as they are, never rounded to TF32; bf16 inputs are summed in f32.

use crate::{Error, Gemm, Result, Transposition};
use cudarc::cublaslt::{result as lt, sys};
use rankfold_backend::DType;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

/// What the library may use beside inputs and outputs: what NVIDIA recommends for Hopper.
pub(super) const WORKSPACE: usize = 32 << 20;

/// A handle of the library, the algorithms it has chosen, and its working memory.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: u64,
    chosen: Mutex<HashMap<Shape, Option<sys::cublasLtMatmulAlgo_t>>>,
}

// SAFETY: a handle may be used by several threads at once, says its manual; the rest is data.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

/// What an algorithm is chosen by.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    dims: [usize; 3],
    transposition: Transposition,
    bf16: bool,
    accumulate: bool,
    /// Powers of two that the addresses of a, b and c are multiples of, at most 256.
    alignment: [u32; 3],
}

impl Shape {
    fn of(gemm: &Gemm) -> Self {
        let alignment = [gemm.a, gemm.b, gemm.c].map(|address| 1 << address.trailing_zeros().min(8));
        let Gemm { m, n, k, transposition, accumulate, .. } = *gemm;
        Self { dims: [m, n, k], transposition, bf16: gemm.dtype == DType::Bf16, accumulate, alignment }
    }
}

fn failed(call: &'static str) -> impl Fn(lt::CublasError) -> Error {
    move |error| Error::Device { call, what: error.to_string() }
}

impl Blas {
    /// Finds the library, which may use the memory at `workspace`; or why it is of no use. Products are then by the
    /// project's own kernels.
    pub(super) fn load(workspace: u64) -> Result<Self, String> {
        // SAFETY: looking for a library runs its initialisers, which NVIDIA's allow at any time.
        if !unsafe { sys::is_culib_present() } {
            return Err("not found".into());
        }
        let handle = lt::create_handle().map_err(|error| error.to_string())?;
        Ok(Self { handle, workspace, chosen: Mutex::default() })
    }

    /// The memory that it was given.
    pub(super) fn workspace(&self) -> u64 {
        self.workspace
    }

    /// Launches a product; false where the library has no algorithm for it.
    pub(super) fn gemm(&self, gemm: &Gemm, stream: cudarc::driver::sys::CUstream) -> Result<bool> {
        let shape = Shape::of(gemm);
        let call = Call::new(&shape)?;
        let known = self.chosen.lock().unwrap_or_else(PoisonError::into_inner).get(&shape).copied();
        let algorithm = match known {
            Some(algorithm) => algorithm,
            None => {
                let algorithm = call.choose(self.handle, &shape)?;
                self.chosen.lock().unwrap_or_else(PoisonError::into_inner).insert(shape, algorithm);
                algorithm
            }
        };
        let Some(algorithm) = algorithm else { return Ok(false) };
        let (alpha, beta) = (gemm.alpha, if gemm.accumulate { 1.0f32 } else { 0.0 });
        let (alpha, beta) = ((&raw const alpha).cast::<c_void>(), (&raw const beta).cast::<c_void>());
        let [a, b, c] = [gemm.a, gemm.b, gemm.c].map(|address| address as *mut c_void);
        let workspace = self.workspace as *mut c_void;
        // SAFETY: descriptors that live until the call returns; addresses of the device with room for the shapes that
        // the contract has checked; the factors are read before the call returns.
        let status = unsafe {
            let [first, second, out] = [call.b, call.a, call.c].map(|layout| layout.0);
            sys::cublasLtMatmul(
                self.handle,
                call.product.0,
                alpha,
                b,
                first,
                a,
                second,
                beta,
                c,
                out,
                c,
                out,
                &algorithm,
                workspace,
                WORKSPACE,
                stream.cast(),
            )
        };
        status.result().map_err(failed("cublasLtMatmul"))?;
        Ok(true)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: a handle that was created, destroyed once.
        let _ = unsafe { lt::destroy_handle(self.handle) };
    }
}

#[derive(Clone, Copy)]
struct Layout(sys::cublasLtMatrixLayout_t);
#[derive(Clone, Copy)]
struct Description(sys::cublasLtMatmulDesc_t);

/// The library's descriptors of one product, destroyed with it.
struct Call {
    product: Description,
    a: Layout,
    b: Layout,
    c: Layout,
}

fn layout(dtype: sys::cudaDataType, rows: usize, columns: usize) -> Result<Layout> {
    // A row-major [rows, columns] is a column-major [columns, rows].
    let (rows, columns) = (columns as u64, rows as u64);
    lt::create_matrix_layout(dtype, rows, columns, rows as i64)
        .map(Layout)
        .map_err(failed("cublasLtMatrixLayoutCreate"))
}

impl Call {
    fn new(shape: &Shape) -> Result<Self> {
        let ([m, n, k], f32) = (shape.dims, sys::cudaDataType_t::CUDA_R_32F);
        let input = if shape.bf16 { sys::cudaDataType_t::CUDA_R_16BF } else { f32 };
        let (a_shape, b_shape) = match shape.transposition {
            Transposition::Nn => ([m, k], [k, n]),
            Transposition::Nt => ([m, k], [n, k]),
            Transposition::Tn => ([k, m], [k, n]),
        };
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let product = lt::create_matmul_desc(compute, f32).map_err(failed("cublasLtMatmulDescCreate"))?;
        let call = Self {
            product: Description(product),
            a: layout(input, a_shape[0], a_shape[1])?,
            b: layout(input, b_shape[0], b_shape[1])?,
            c: layout(f32, m, n)?,
        };
        // The library's first factor is bᵀ as it lies; where b lies as [n, k] it is transposed once more. So is aᵀ.
        let first = shape.transposition == Transposition::Nt;
        let second = shape.transposition == Transposition::Tn;
        for (attribute, transposed) in [
            (sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA, first),
            (sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB, second),
        ] {
            // CUBLAS_OP_T is 1, CUBLAS_OP_N is 0.
            let value = i32::from(transposed);
            // SAFETY: a live description, and an attribute of 32 bits.
            unsafe {
                lt::set_matmul_desc_attribute(product, attribute, (&raw const value).cast(), size_of_val(&value))
            }
            .map_err(failed("cublasLtMatmulDescSetAttribute"))?;
        }
        Ok(call)
    }

    /// The library's choice; none where it has none.
    fn choose(&self, handle: sys::cublasLtHandle_t, shape: &Shape) -> Result<Option<sys::cublasLtMatmulAlgo_t>> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = lt::create_matmul_pref().map_err(failed("cublasLtMatmulPreferenceCreate"))?;
        let [a, b, c] = shape.alignment;
        let workspace = WORKSPACE as u64;
        // SAFETY: a live preference, with attributes of 64 and of 32 bits.
        let outcome = unsafe {
            let number = |attribute, value: u32| {
                lt::set_matmul_pref_attribute(preference, attribute, (&raw const value).cast(), size_of_val(&value))
            };
            lt::set_matmul_pref_attribute(
                preference,
                Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace).cast(),
                size_of_val(&workspace),
            )
            .and_then(|()| number(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, b))
            .and_then(|()| number(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, a))
            .and_then(|()| number(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, c))
            .and_then(|()| number(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, c))
            .and_then(|()| {
                let [first, second, out] = [self.b, self.a, self.c].map(|layout| layout.0);
                lt::get_matmul_algo_heuristic(handle, self.product.0, first, second, out, out, preference)
            })
        };
        // SAFETY: a live preference, destroyed once.
        let _ = unsafe { lt::destroy_matmul_pref(preference) };
        match outcome {
            Ok(found) if found.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(Some(found.algo)),
            Ok(_) => Ok(None),
            Err(lt::CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)) => Ok(None),
            Err(error) => Err(failed("cublasLtMatmulAlgoGetHeuristic")(error)),
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        // SAFETY: descriptors that were created, destroyed once.
        unsafe {
            let _ = lt::destroy_matmul_desc(self.product.0);
            for layout in [self.a, self.b, self.c] {
                let _ = lt::destroy_matrix_layout(layout.0);
            }
        }
    }
}
