//! A GPU: its primary context, its properties and the kernels loaded into it.
use std::collections::HashMap;
use std::ffi::CString;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::sys as cu;

use super::{Error, FATBINS, MISSING, Result, driver, gate};

/// Whether a GPU can be used: the number of devices (at least one), or what is missing.
pub fn availability() -> Result<usize> {
    if FATBINS.is_empty() {
        return Err(Error::Unavailable(format!("this build holds no GPU kernels ({MISSING})")));
    }
    // SAFETY: only tries to open the driver's library.
    if !unsafe { cu::is_culib_present() } {
        return Err(Error::Unavailable(
            "the NVIDIA driver (libcuda.so.1) was not found: install it, or use --device cpu".into(),
        ));
    }
    let mut count = 0;
    // SAFETY: plain calls; `count` outlives them.
    unsafe {
        driver!(cuInit(0)).map_err(|e| Error::Unavailable(e.to_string()))?;
        driver!(cuDeviceGetCount(&mut count))?;
    }
    match usize::try_from(count) {
        Ok(n) if n > 0 => Ok(n),
        _ => Err(Error::Unavailable("the driver sees no GPU (is CUDA_VISIBLE_DEVICES empty?)".into())),
    }
}

/// A GPU. Cheap to clone: all clones share the primary context.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    ordinal: usize,
    device: cu::CUdevice,
    context: cu::CUcontext,
    name: String,
    capability: (i32, i32),
    multiprocessors: usize,
    l2_bytes: usize,
    shared_bytes: usize,
    modules: Mutex<Modules>,
}

#[derive(Default)]
struct Modules {
    /// Loaded fat binaries, in the order of [`FATBINS`].
    loaded: Vec<cu::CUmodule>,
    functions: HashMap<String, cu::CUfunction>,
}

// SAFETY: the handles are plain identifiers of the driver, which is thread-safe; `modules` is behind a mutex.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        let _work = gate::work();
        let modules = self.modules.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the handles are this object's own and are used by nobody after it; a failure at the end of a process is harmless.
        unsafe {
            let _ = cu::cuCtxSetCurrent(self.context);
            for module in modules.loaded.drain(..) {
                let _ = cu::cuModuleUnload(module);
            }
            let _ = cu::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

/// A kernel of one device.
#[derive(Clone)]
pub struct Function {
    pub(super) device: Device,
    pub(super) handle: cu::CUfunction,
    name: Arc<str>,
}

// SAFETY: a kernel handle is an identifier of the thread-safe driver and lives as long as `device`.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Device {
    /// Opens GPU `ordinal` (after CUDA_VISIBLE_DEVICES).
    pub fn open(ordinal: usize) -> Result<Self> {
        let count = availability()?;
        if ordinal >= count {
            return Err(Error::Unavailable(format!("there is no GPU {ordinal}; the driver sees {count}")));
        }
        let _work = gate::work();
        let mut device = 0;
        let mut context = std::ptr::null_mut();
        let mut name = [0 as std::ffi::c_char; 256];
        // SAFETY: `ordinal` is in range, and every out-pointer outlives its call.
        unsafe {
            driver!(cuDeviceGet(&mut device, ordinal as i32))?;
            driver!(cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, device))?;
            driver!(cuDevicePrimaryCtxRetain(&mut context, device))?;
        }
        let attribute = |a| -> Result<i32> {
            let mut value = 0;
            // SAFETY: `value` outlives the call.
            unsafe { driver!(cuDeviceGetAttribute(&mut value, a, device)) }?;
            Ok(value)
        };
        use cu::CUdevice_attribute_enum as A;
        let inner = Inner {
            ordinal,
            device,
            context,
            // SAFETY: the driver wrote a NUL-terminated name.
            name: unsafe { std::ffi::CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned(),
            capability: (
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            multiprocessors: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
            l2_bytes: attribute(A::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
            shared_bytes: attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
            modules: Mutex::default(),
        };
        let device = Self(Arc::new(inner));
        device.bind()?;
        Ok(device)
    }

    /// Makes this device's context current in the calling thread.
    pub fn bind(&self) -> Result<()> {
        // SAFETY: the context is retained while `self` lives.
        unsafe { driver!(cuCtxSetCurrent(self.0.context)) }
    }
    /// The vendor's name of it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }
    /// Its number among the visible devices.
    #[must_use]
    pub fn ordinal(&self) -> usize {
        self.0.ordinal
    }
    /// Compute capability, major and minor.
    #[must_use]
    pub fn capability(&self) -> (i32, i32) {
        self.0.capability
    }
    /// Number of streaming multiprocessors.
    #[must_use]
    pub fn multiprocessors(&self) -> usize {
        self.0.multiprocessors
    }
    /// Bytes of level-2 cache.
    #[must_use]
    pub fn l2_bytes(&self) -> usize {
        self.0.l2_bytes
    }
    /// Bytes of shared memory that a block may ask for.
    #[must_use]
    pub fn shared_bytes(&self) -> usize {
        self.0.shared_bytes
    }
    /// Bytes of device memory, free and in all.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the out-pointers outlive the call.
        unsafe { driver!(cuMemGetInfo_v2(&mut free, &mut total)) }?;
        Ok((free, total))
    }
    /// Waits for all work on the device.
    pub fn synchronize(&self) -> Result<()> {
        self.bind()?;
        // SAFETY: no arguments.
        unsafe { driver!(cuCtxSynchronize()) }
    }

    /// The `extern "C"` kernel of that name in any of the embedded files.
    pub fn function(&self, name: &str) -> Result<Function> {
        self.bind()?;
        let lock = || self.0.modules.lock().unwrap_or_else(PoisonError::into_inner);
        // Before the lock, which a recording may want too.
        let loaded = lock().loaded.len() == FATBINS.len();
        let _work = (!loaded).then(gate::work);
        let mut modules = lock();
        let found = |handle| Function { device: self.clone(), handle, name: name.into() };
        if let Some(&handle) = modules.functions.get(name) {
            return Ok(found(handle));
        }
        // All at once: a recording must not meet a file that is not loaded.
        while modules.loaded.len() < FATBINS.len() {
            let (_, image) = FATBINS[modules.loaded.len()];
            let mut module = std::ptr::null_mut();
            // SAFETY: the image is a whole fat binary made by nvcc at build time.
            unsafe { driver!(cuModuleLoadData(&mut module, image.as_ptr().cast())) }?;
            modules.loaded.push(module);
        }
        let symbol = CString::new(name).map_err(|_| Error::NoKernel(name.into()))?;
        for &module in &modules.loaded {
            let mut handle = std::ptr::null_mut();
            // SAFETY: module and symbol are valid; the handle is used only on success.
            if unsafe { cu::cuModuleGetFunction(&mut handle, module, symbol.as_ptr()) }
                == cu::CUresult::CUDA_SUCCESS
            {
                modules.functions.insert(name.to_owned(), handle);
                return Ok(found(handle));
            }
        }
        Err(Error::NoKernel(name.into()))
    }
}

impl Function {
    /// Its symbol.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
    /// Lets a block ask for `bytes` of dynamic shared memory (beyond 48 KiB this must be said once).
    pub fn allow_shared(&self, bytes: usize) -> Result<()> {
        self.device.bind()?;
        use cu::CUfunction_attribute_enum as A;
        let bytes =
            i32::try_from(bytes).map_err(|_| Error::Range(format!("{bytes} bytes of shared memory")))?;
        // SAFETY: the handle is valid while `device` lives.
        unsafe {
            driver!(cuFuncSetAttribute(
                self.handle,
                A::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                bytes
            ))
        }
    }
    /// Blocks of `threads` threads and `shared` bytes of dynamic shared memory that one multiprocessor holds at a time.
    pub fn blocks_per_multiprocessor(&self, threads: usize, shared: usize) -> Result<usize> {
        self.device.bind()?;
        let mut blocks = 0;
        // SAFETY: the out-pointer outlives the call.
        unsafe {
            driver!(cuOccupancyMaxActiveBlocksPerMultiprocessor(
                &mut blocks,
                self.handle,
                threads as i32,
                shared
            ))
        }?;
        Ok(blocks as usize)
    }
}
