//! Device memory and page-locked host memory, both typed.
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use cudarc::driver::sys as cu;

use super::{Device, Error, Result, Stream, driver, gate};

/// Types that may cross to the device byte by byte.
///
/// # Safety
/// Every bit pattern is a valid value, and there is no padding.
pub unsafe trait Pod: Copy + Send + Sync + 'static {}
macro_rules! pod {
    ($($t:ty),*) => { $(
        // SAFETY: a plain number.
        unsafe impl Pod for $t {}
    )* };
}
pod!(u8, i8, u16, i16, u32, i32, u64, i64, usize, f32, f64, half::f16, half::bf16);

/// `len` values of device memory, freed on drop.
pub struct Buffer<T: Pod> {
    device: Device,
    address: cu::CUdeviceptr,
    len: usize,
    kind: PhantomData<T>,
}

impl<T: Pod> Buffer<T> {
    /// Values it holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }
    /// Whether it holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
    /// Bytes it holds.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }
    /// Its address on the device, for a kernel's parameter struct. Null when empty.
    #[must_use]
    pub fn ptr(&self) -> *mut T {
        self.address as *mut T
    }
    /// The address of value `offset`.
    ///
    /// # Panics
    /// When `offset` lies past the end.
    #[must_use]
    pub fn at(&self, offset: usize) -> *mut T {
        assert!(offset <= self.len, "offset {offset} of a buffer of {}", self.len);
        (self.address + (offset * size_of::<T>()) as u64) as *mut T
    }

    fn check(&self, start: usize, len: usize) -> Result<cu::CUdeviceptr> {
        match start.checked_add(len) {
            Some(end) if end <= self.len => Ok(self.address + (start * size_of::<T>()) as u64),
            _ => Err(Error::Range(format!("values {start}..+{len} of a device buffer of {}", self.len))),
        }
    }

    /// Copies `values` to `start..`, and waits.
    pub fn write(&mut self, start: usize, values: &[T]) -> Result<()> {
        let to = self.check(start, values.len())?;
        let _work = gate::work();
        self.device.bind()?;
        // SAFETY: the range was checked, and the first call returns after the source was read; the second waits until it has arrived.
        unsafe {
            driver!(cuMemcpyHtoD_v2(to, values.as_ptr().cast(), size_of_val(values)))?;
            driver!(cuStreamSynchronize(std::ptr::null_mut()))
        }
    }
    /// Copies from `start..` into `values`, and waits.
    pub fn read(&self, start: usize, values: &mut [T]) -> Result<()> {
        let from = self.check(start, values.len())?;
        let _work = gate::work();
        self.device.bind()?;
        // SAFETY: the range was checked, `values` outlives the synchronous call, and any bit pattern is a T.
        unsafe { driver!(cuMemcpyDtoH_v2(values.as_mut_ptr().cast(), from, size_of_val(values))) }
    }
    /// All values, after a wait.
    pub fn to_vec(&self) -> Result<Vec<T>>
    where
        T: Default,
    {
        let mut values = vec![T::default(); self.len];
        self.read(0, &mut values)?;
        Ok(values)
    }
    /// Queues a copy of the first `len` values of `from` to `start..`.
    pub fn write_async(&mut self, start: usize, from: &Pinned<T>, len: usize, stream: &Stream) -> Result<()> {
        let to = self.check(start, len)?;
        let source = &from[..len];
        self.device.bind()?;
        // SAFETY: both ranges were checked; page-locked memory stays until the caller's next wait on the stream (Pinned's drop waits).
        unsafe {
            driver!(cuMemcpyHtoDAsync_v2(to, source.as_ptr().cast(), size_of_val(source), stream.handle()))
        }
    }
    /// Queues a copy of `start..start + len` to the front of `to`.
    pub fn read_async(&self, start: usize, to: &mut Pinned<T>, len: usize, stream: &Stream) -> Result<()> {
        let from = self.check(start, len)?;
        let target = &mut to[..len];
        self.device.bind()?;
        // SAFETY: as in `write_async`.
        unsafe {
            driver!(cuMemcpyDtoHAsync_v2(
                target.as_mut_ptr().cast(),
                from,
                size_of_val(target),
                stream.handle()
            ))
        }
    }
    /// Queues a copy of `len` values from another buffer of the same device.
    pub fn copy_async(
        &mut self,
        start: usize,
        from: &Self,
        from_start: usize,
        len: usize,
        stream: &Stream,
    ) -> Result<()> {
        let to = self.check(start, len)?;
        let from = from.check(from_start, len)?;
        self.device.bind()?;
        // SAFETY: both ranges were checked.
        unsafe { driver!(cuMemcpyDtoDAsync_v2(to, from, len * size_of::<T>(), stream.handle())) }
    }
    /// Copies `len` values within this buffer, and waits; the ranges must not overlap.
    pub fn copy_within(&mut self, from: usize, to: usize, len: usize) -> Result<()> {
        let (source, target) = (self.check(from, len)?, self.check(to, len)?);
        if from.abs_diff(to) < len {
            return Err(Error::Range(format!("overlapping device copy {from} -> {to} of {len}")));
        }
        let _work = gate::work();
        self.device.bind()?;
        // SAFETY: both ranges were checked and do not overlap.
        unsafe {
            driver!(cuMemcpyDtoD_v2(target, source, len * size_of::<T>()))?;
            driver!(cuStreamSynchronize(std::ptr::null_mut()))
        }
    }
    /// Queues setting every byte to `byte`.
    pub fn fill_async(&mut self, byte: u8, stream: &Stream) -> Result<()> {
        if self.len == 0 {
            return Ok(());
        }
        self.device.bind()?;
        // SAFETY: the range is the whole buffer.
        unsafe { driver!(cuMemsetD8Async(self.address, byte, self.bytes(), stream.handle())) }
    }
}

impl<T: Pod> Drop for Buffer<T> {
    fn drop(&mut self) {
        if self.address != 0 {
            let _work = gate::work();
            // SAFETY: allocated by `Device::alloc`; cuMemFree waits for work that uses it.
            unsafe {
                let _ = self.device.bind();
                let _ = cu::cuMemFree_v2(self.address);
            }
        }
    }
}

/// Page-locked host memory, which the device copies to and from without the processor.
pub struct Pinned<T: Pod> {
    device: Device,
    values: *mut T,
    len: usize,
}

// SAFETY: owns plain host memory.
unsafe impl<T: Pod> Send for Pinned<T> {}
// SAFETY: shared access is read-only.
unsafe impl<T: Pod> Sync for Pinned<T> {}

impl<T: Pod> Deref for Pinned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `values` points to `len` initialised values (zeroed at allocation).
        unsafe { std::slice::from_raw_parts(self.values, self.len) }
    }
}
impl<T: Pod> DerefMut for Pinned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.values, self.len) }
    }
}
impl<T: Pod> Drop for Pinned<T> {
    fn drop(&mut self) {
        let _work = gate::work();
        // SAFETY: allocated by `Device::pinned`; the driver lets copies in flight end before the memory goes.
        unsafe {
            let _ = self.device.bind();
            let _ = cu::cuMemFreeHost(self.values.cast());
        }
    }
}

impl Device {
    /// Allocates `len` values; their contents are undefined.
    pub fn alloc<T: Pod>(&self, len: usize) -> Result<Buffer<T>> {
        let _work = gate::work();
        self.bind()?;
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| Error::Range(format!("{len} values")))?;
        let mut address = 0;
        if bytes > 0 {
            // SAFETY: the out-pointer outlives the call.
            let status = unsafe { cu::cuMemAlloc_v2(&mut address, bytes) };
            if status == cu::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                let (free, total) = self.memory()?;
                return Err(Error::OutOfMemory { device: self.ordinal(), needed: bytes, free, total });
            }
            super::check("cuMemAlloc", status)?;
        }
        Ok(Buffer { device: self.clone(), address, len, kind: PhantomData })
    }
    /// Allocates and fills with `values`.
    pub fn upload<T: Pod>(&self, values: &[T]) -> Result<Buffer<T>> {
        let mut buffer = self.alloc(values.len())?;
        if !values.is_empty() {
            buffer.write(0, values)?;
        }
        Ok(buffer)
    }
    /// Allocates `len` values, all bytes zero.
    pub fn zeros<T: Pod>(&self, len: usize) -> Result<Buffer<T>> {
        let buffer = self.alloc(len)?;
        if len > 0 {
            let _work = gate::work();
            // SAFETY: the range is the whole buffer.
            unsafe {
                driver!(cuMemsetD8_v2(buffer.address, 0, buffer.bytes()))?;
                driver!(cuStreamSynchronize(std::ptr::null_mut()))?;
            }
        }
        Ok(buffer)
    }
    /// Page-locked host memory of `len` values, zeroed.
    pub fn pinned<T: Pod>(&self, len: usize) -> Result<Pinned<T>> {
        let _work = gate::work();
        self.bind()?;
        let bytes =
            len.max(1).checked_mul(size_of::<T>()).ok_or_else(|| Error::Range(format!("{len} values")))?;
        let mut values = std::ptr::null_mut();
        // SAFETY: the driver hands out `bytes` of suitably aligned host memory, zeroed before anyone sees it.
        unsafe {
            driver!(cuMemHostAlloc(&mut values, bytes, 0))?;
            values.cast::<u8>().write_bytes(0, bytes);
        }
        Ok(Pinned { device: self.clone(), values: values.cast(), len })
    }
}
