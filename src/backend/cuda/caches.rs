//! Memory for cached rows: the GPU's own, or the host's, which kernels read across the bus.
use ggml_kernels::cuda::{Buffer, Device, Pinned};

use crate::backend::caches::Store;
use crate::cache::PoolKind;
use crate::error::Result;

/// Where the shared memory's K and V (or a Transformer's) lie. Windows and index keys, which every token reads whole, stay on the GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvDevice {
    /// In device memory.
    #[default]
    Gpu,
    /// In page-locked host memory: a token reads only its selected rows across the bus.
    Cpu,
}

/// Memory that this GPU's kernels can read and write.
pub enum Memory {
    /// On the device.
    Device(Buffer<u8>),
    /// Page-locked on the host, at the same address for both (unified addressing).
    Host(Pinned<u8>),
}

impl Memory {
    /// `bytes` zeros for a pool, or for windows: rows never written are masked, but kernels may load them beside others.
    pub fn new(device: &Device, kv: KvDevice, pool: Option<PoolKind>, bytes: usize) -> Result<Self> {
        Ok(match (kv, pool) {
            (KvDevice::Cpu, Some(PoolKind::K | PoolKind::V)) => Self::Host(device.pinned(bytes)?),
            _ => Self::Device(device.zeros(bytes)?),
        })
    }
}

impl Store for Memory {
    fn base(&self) -> *mut u8 {
        match self {
            Self::Device(buffer) => buffer.ptr(),
            Self::Host(pinned) => pinned.as_ptr().cast_mut(),
        }
    }
    fn bytes(&self) -> usize {
        match self {
            Self::Device(buffer) => buffer.bytes(),
            Self::Host(pinned) => pinned.len(),
        }
    }
    fn read(&self, at: usize, out: &mut [u8]) -> Result<()> {
        match self {
            Self::Device(buffer) => Ok(buffer.read(at, out)?),
            Self::Host(pinned) => {
                out.copy_from_slice(&pinned[at..at + out.len()]);
                Ok(())
            }
        }
    }
    fn write(&mut self, at: usize, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Device(buffer) => Ok(buffer.write(at, bytes)?),
            Self::Host(pinned) => {
                pinned[at..at + bytes.len()].copy_from_slice(bytes);
                Ok(())
            }
        }
    }
    fn copy_within(&mut self, from: usize, to: usize, len: usize) -> Result<()> {
        match self {
            Self::Device(buffer) => Ok(buffer.copy_within(from, to, len)?),
            Self::Host(pinned) => {
                pinned.copy_within(from..from + len, to);
                Ok(())
            }
        }
    }
}
