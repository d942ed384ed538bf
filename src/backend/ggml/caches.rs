//! Anonymous memory for cached rows, which the system hands out as it is first written.
use memmap2::MmapMut;

use crate::backend::caches::Store;
use crate::error::{Error, Result};

/// Memory of this process.
pub struct Anonymous(MmapMut);

impl Anonymous {
    /// `bytes` zeros.
    pub fn new(bytes: usize) -> Result<Self> {
        let memory = MmapMut::map_anon(bytes.max(1)).map_err(|e| Error::Memory {
            what: "a cache".into(),
            needed: bytes as u64,
            free: 0,
            remedy: format!("lower -c or use -ctk q8_0 -ctv q8_0 ({e})"),
        })?;
        // Reads of large pages are half as fast again; where the system has none, nothing changes.
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        Ok(Self(memory))
    }
}

impl Store for Anonymous {
    fn base(&self) -> *mut u8 {
        self.0.as_ptr().cast_mut()
    }
    fn bytes(&self) -> usize {
        self.0.len()
    }
    fn read(&self, at: usize, out: &mut [u8]) -> Result<()> {
        out.copy_from_slice(&self.0[at..at + out.len()]);
        Ok(())
    }
    fn write(&mut self, at: usize, bytes: &[u8]) -> Result<()> {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
    fn copy_within(&mut self, from: usize, to: usize, len: usize) -> Result<()> {
        self.0.copy_within(from..from + len, to);
        Ok(())
    }
}
