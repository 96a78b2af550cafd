//! A GPU as a device: the driver API through cudarc, which loads NVIDIA's libraries when they are first called.
//!
//! [`nvrtc`] compiles a source of `kernels/` when one of its kernels is first launched, for the device's own
//! architecture, and `cache` keeps what came out; `blas` has the dense products. Everything runs on one stream, in
//! the order of the calls, but for the copies of `pages`.

mod blas;
mod cache;
pub mod nvrtc;
mod pages;

use crate::{Argument, Driver, Error, Event, Gemm, Launch, Result, SOURCES, Source, gemm};
use blas::{Blas, WORKSPACE};
use cudarc::driver::sys::{
    self, CUcontext, CUdevice, CUdevice_attribute_enum as Attribute, CUevent, CUfunction, CUmodule, CUresult, CUstream,
};
use nvrtc::Nvrtc;
use pages::Way;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::fmt;
use std::ptr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// The oldest driver that has every function called here: of CUDA 12.8.
const OLDEST_DRIVER: i32 = 12_080;

fn check(call: &'static str, result: CUresult) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = ptr::null();
    // SAFETY: a place for the address of a constant string of the library.
    let found = unsafe { sys::cuGetErrorString(result, &mut text) };
    let what = match found {
        // SAFETY: the library has just set it.
        CUresult::CUDA_SUCCESS if !text.is_null() => unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned(),
        _ => format!("{result:?}"),
    };
    Err(Error::Device { call, what })
}

/// The first GPU of the system.
pub struct GpuDriver {
    name: String,
    architecture: String,
    shared_memory: usize,
    device: CUdevice,
    context: CUcontext,
    stream: CUstream,
    nvrtc: Nvrtc,
    blas: Option<Blas>,
    page_in: Way,
    page_out: Way,
    functions: Mutex<HashMap<&'static str, Function>>,
}

// SAFETY: handles of the driver API, which any thread may use once the context is its current one; every call of this
// driver sees to that first.
unsafe impl Send for GpuDriver {}
// SAFETY: as above.
unsafe impl Sync for GpuDriver {}

/// A kernel of a loaded module. Modules stay loaded as long as the program runs.
#[derive(Clone, Copy)]
struct Function {
    handle: CUfunction,
    /// Dynamic shared memory that it was given leave for: without, it has 48 KiB together with its static arrays.
    shared: u32,
}

impl GpuDriver {
    /// Opens the first device. Errors say what is missing, or too old.
    pub fn open() -> Result<Self> {
        // SAFETY: looking for a library runs its initialisers, which NVIDIA's allow at any time.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::Missing("this machine has no NVIDIA driver (libcuda is not there)".into()));
        }
        // SAFETY: the first call of the driver API.
        check("cuInit", unsafe { sys::cuInit(0) })
            .map_err(|error| Error::Missing(format!("the NVIDIA driver finds no GPU that it can use: {error}")))?;
        let mut version = 0;
        // SAFETY: an integer to write to.
        check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut version) })?;
        let spelled = |version: i32| format!("{}.{}", version / 1000, version % 1000 / 10);
        if version < OLDEST_DRIVER {
            let (found, least) = (spelled(version), spelled(OLDEST_DRIVER));
            return Err(Error::Missing(format!("the NVIDIA driver is for CUDA {found}: expected {least} or later")));
        }
        let nvrtc = Nvrtc::load()?;
        let (major, minor) = nvrtc.version;
        if major > version / 1000 {
            let why = format!(
                "NVRTC is of CUDA {major}.{minor} and the driver of CUDA {}: update the driver, or install NVRTC of \
                 CUDA {}",
                spelled(version),
                version / 1000
            );
            return Err(Error::Missing(why));
        }
        let (device, name, architecture) = Self::device(nvrtc)?;
        let (mut context, mut stream) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: a device, and places for handles.
        unsafe {
            check("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut context, device))?;
            check("cuCtxSetCurrent", sys::cuCtxSetCurrent(context))?;
            check("cuStreamCreate", sys::cuStreamCreate(&mut stream, 1))?;
            // Freed memory is kept for the next allocation, rather than given back at every synchronisation.
            let (mut pool, mut all) = (ptr::null_mut(), u64::MAX);
            check("cuDeviceGetDefaultMemPool", sys::cuDeviceGetDefaultMemPool(&mut pool, device))?;
            let attribute = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            let all = (&raw mut all).cast();
            check("cuMemPoolSetAttribute", sys::cuMemPoolSetAttribute(pool, attribute, all))?;
        }
        let most_shared = Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let shared_memory = Self::attribute(device, most_shared)?.unsigned_abs() as usize;
        let mut driver = Self {
            name,
            architecture,
            shared_memory,
            device,
            context,
            stream,
            nvrtc,
            blas: None,
            page_in: Way::default(),
            page_out: Way::default(),
            functions: Mutex::default(),
        };
        let workspace = driver.alloc(WORKSPACE)?;
        match Blas::load(workspace) {
            Ok(blas) => driver.blas = Some(blas),
            Err(why) => {
                driver.free(workspace);
                driver.name = format!("{}, without cuBLASLt ({why})", driver.name);
            }
        }
        Ok(driver)
    }

    /// The same, with the project's own kernel for dense products.
    pub fn without_cublaslt(mut self) -> Self {
        self.drop_blas();
        self
    }

    fn drop_blas(&mut self) {
        if let Some(blas) = self.blas.take() {
            self.free(blas.workspace());
        }
    }

    /// The first device, its name, and the architecture to compile for.
    fn device(nvrtc: Nvrtc) -> Result<(CUdevice, String, String)> {
        let (mut count, mut device, mut name) = (0, 0, [0; 256]);
        // SAFETY: places for what is asked for, of the sizes given.
        unsafe {
            check("cuDeviceGetCount", sys::cuDeviceGetCount(&mut count))?;
            if count == 0 {
                return Err(Error::Missing("the NVIDIA driver finds no GPU".into()));
            }
            check("cuDeviceGet", sys::cuDeviceGet(&mut device, 0))?;
            check("cuDeviceGetName", sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32 - 1, device))?;
        }
        // SAFETY: the last byte is still 0.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        let major = Self::attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = Self::attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if major < 8 {
            let why = format!("{name} has compute capability {major}.{minor}: expected 8.0 or higher");
            return Err(Error::Missing(why));
        }
        let number = 10 * major + minor;
        if !nvrtc.architectures()?.contains(&number) {
            let (major, minor) = nvrtc.version;
            let why = format!("NVRTC of CUDA {major}.{minor} does not compile for sm_{number}, which {name} is");
            return Err(Error::Missing(why));
        }
        // Hopper's own instructions are not in the set of later devices, nor in sm_90's: the registers that
        // `kernels/registers.txt` tells are those of sm_90a.
        let architecture = if number == 90 { "sm_90a".into() } else { format!("sm_{number}") };
        Ok((device, name, architecture))
    }

    /// Makes the context this thread's.
    fn enter(&self) -> Result<()> {
        // SAFETY: the context of this driver, which it keeps.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    /// A kernel by name; its source is compiled and loaded where it has not been.
    fn function(&self, name: &'static str, shared: u32) -> Result<CUfunction> {
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if !functions.contains_key(name) {
            let source = SOURCES.iter().find(|source| source.kernels.contains(&name));
            let source = source.ok_or_else(|| Error::UnknownKernel { name: name.into() })?;
            self.load(source, &mut functions)?;
        }
        let function = functions.get_mut(name).ok_or_else(|| Error::UnknownKernel { name: name.into() })?;
        if shared > function.shared {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of a loaded module.
            let outcome = unsafe { sys::cuFuncSetAttribute(function.handle, attribute, shared as i32) };
            check("cuFuncSetAttribute", outcome).map_err(|error| Error::Geometry {
                kernel: name,
                why: format!("{shared} bytes of shared memory: {error}"),
            })?;
            function.shared = shared;
        }
        Ok(function.handle)
    }

    fn load(&self, source: &Source, functions: &mut HashMap<&'static str, Function>) -> Result<()> {
        let cubin = cache::cubin(self.nvrtc, source, &self.architecture)?;
        let mut module: CUmodule = ptr::null_mut();
        // SAFETY: a whole cubin, which the driver copies.
        check("cuModuleLoadData", unsafe { sys::cuModuleLoadData(&mut module, cubin.as_ptr().cast()) })?;
        for name in source.kernels {
            let (mut handle, symbol) = (ptr::null_mut(), CString::new(*name).expect("a C identifier"));
            // SAFETY: a loaded module and a string.
            let outcome = unsafe { sys::cuModuleGetFunction(&mut handle, module, symbol.as_ptr()) };
            check("cuModuleGetFunction", outcome)?;
            functions.insert(name, Function { handle, shared: 0 });
        }
        Ok(())
    }

    /// One of the device's properties.
    fn attribute(device: CUdevice, attribute: Attribute) -> Result<i32> {
        let mut value = 0;
        // SAFETY: an integer to write to.
        check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) })?;
        Ok(value)
    }
}

impl Driver for GpuDriver {
    fn name(&self) -> String {
        format!("{}, {}", self.name, self.architecture)
    }

    fn alloc(&self, bytes: usize) -> Result<u64> {
        self.enter()?;
        let mut address = 0;
        // SAFETY: a place for an address; the stream is this driver's.
        let mut ask = || unsafe { sys::cuMemAllocAsync(&mut address, bytes.max(1), self.stream) };
        let mut outcome = ask();
        if outcome == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            self.trim()?;
            outcome = ask();
        }
        if outcome == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(Error::OutOfMemory { asked: bytes, free: self.free_memory() });
        }
        check("cuMemAllocAsync", outcome)?;
        Ok(address)
    }

    fn free(&self, address: u64) {
        if self.enter().is_ok() {
            // SAFETY: an address that `alloc` gave, freed after everything launched so far. An error here is one of an
            // earlier call, which the next call reports.
            let _ = unsafe { sys::cuMemFreeAsync(address, self.stream) };
        }
    }

    fn free_memory(&self) -> usize {
        let (mut free, mut total) = (0, 0);
        if self.enter().is_ok() {
            // SAFETY: two integers to write to. Where the call fails, 0 it is.
            let _ = unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) };
        }
        free
    }

    fn trim(&self) -> Result<()> {
        self.synchronize()?;
        let mut pool = ptr::null_mut();
        // SAFETY: a place for a handle, and the device's own pool.
        unsafe {
            check("cuDeviceGetDefaultMemPool", sys::cuDeviceGetDefaultMemPool(&mut pool, self.device))?;
            check("cuMemPoolTrimTo", sys::cuMemPoolTrimTo(pool, 0))
        }
    }

    fn upload(&self, bytes: &[u8], to: u64) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: host memory that is borrowed until the stream has been waited for; room at `to` is the caller's.
        let outcome = unsafe { sys::cuMemcpyHtoDAsync_v2(to, bytes.as_ptr().cast(), bytes.len(), self.stream) };
        check("cuMemcpyHtoDAsync", outcome).and(self.synchronize())
    }

    fn download(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        if bytes.is_empty() {
            return self.synchronize();
        }
        self.enter()?;
        // SAFETY: host memory to write to, borrowed until the stream has been waited for.
        let outcome = unsafe { sys::cuMemcpyDtoHAsync_v2(bytes.as_mut_ptr().cast(), from, bytes.len(), self.stream) };
        check("cuMemcpyDtoHAsync", outcome).and(self.synchronize())
    }

    fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.enter()?;
        // SAFETY: two ranges of the device, which the caller has checked.
        check("cuMemcpyDtoDAsync", unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, self.stream) })
    }

    fn shared_memory(&self) -> usize {
        self.shared_memory
    }

    fn launch(&self, launch: &Launch) -> Result<()> {
        self.enter()?;
        let function = self.function(launch.kernel, launch.shared)?;
        // An argument's bytes come first in its 64 bits: the machine is little-endian, as every host of these GPUs.
        let mut values: Vec<u64> = launch.arguments.iter().map(Argument::value).collect();
        let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|value| ptr::from_mut(value).cast()).collect();
        let ([gx, gy, gz], [bx, by, bz]) = (launch.grid, launch.block);
        // SAFETY: as many arguments as the kernel has, of its types: the host driver checks every launch of the same
        // code against the sources. They are copied before the call returns.
        let outcome = unsafe {
            let (arguments, extra) = (pointers.as_mut_ptr(), ptr::null_mut());
            sys::cuLaunchKernel(function, gx, gy, gz, bx, by, bz, launch.shared, self.stream, arguments, extra)
        };
        check(launch.kernel, outcome)
    }

    fn gemm(&self, product: &Gemm) -> Result<()> {
        self.enter()?;
        let some = product.m > 0 && product.n > 0 && product.k > 0;
        match &self.blas {
            Some(blas) if some && blas.gemm(product, self.stream)? => Ok(()),
            _ => gemm::tiled(self, product),
        }
    }

    fn synchronize(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: this driver's stream.
        check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.stream) })
    }

    fn record(&self) -> Result<Event> {
        self.enter()?;
        let mut event = ptr::null_mut();
        // SAFETY: a place for a handle, and this driver's stream.
        unsafe {
            check("cuEventCreate", sys::cuEventCreate(&mut event, 0))?;
            let point = Point { event, context: self.context };
            check("cuEventRecord", sys::cuEventRecord(event, self.stream))?;
            Ok(Box::new(point))
        }
    }

    fn elapsed(&self, from: &Event, to: &Event) -> Result<Duration> {
        self.enter()?;
        let (Some(from), Some(to)) = (from.downcast_ref::<Point>(), to.downcast_ref::<Point>()) else {
            return Err(Error::Device { call: "elapsed", what: "an event of another driver".into() });
        };
        let mut milliseconds = 0f32;
        // SAFETY: recorded events, and a number to write to.
        unsafe {
            check("cuEventSynchronize", sys::cuEventSynchronize(to.event))?;
            check("cuEventElapsedTime", sys::cuEventElapsedTime_v2(&mut milliseconds, from.event, to.event))?;
        }
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }
}

/// A point on the stream. It is given back before its driver is.
struct Point {
    event: CUevent,
    context: CUcontext,
}

// SAFETY: a handle of the driver API, which any thread may use.
unsafe impl Send for Point {}
// SAFETY: as above.
unsafe impl Sync for Point {}

impl Drop for Point {
    fn drop(&mut self) {
        // SAFETY: an event that was created in this context, destroyed once.
        unsafe {
            let _ = sys::cuCtxSetCurrent(self.context);
            let _ = sys::cuEventDestroy_v2(self.event);
        }
    }
}

impl Drop for GpuDriver {
    fn drop(&mut self) {
        // The library's handle and memory, and the ways of pages, go before their context.
        self.drop_blas();
        let _ = self.synchronize();
        for way in [&mut self.page_in, &mut self.page_out] {
            way.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        }
        // SAFETY: handles of this driver, each given back once.
        unsafe {
            let _ = sys::cuStreamDestroy_v2(self.stream);
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

impl fmt::Debug for GpuDriver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GpuDriver").field("name", &self.name()).finish_non_exhaustive()
    }
}
