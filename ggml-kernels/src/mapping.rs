//! Read-only memory maps of files.
use std::{fs::File, io, ops::Deref, ops::Range, path::Path};

use memmap2::{Advice, Mmap, UncheckedAdvice};

/// A whole file mapped for reading.
///
/// As with every map of a file, another process that truncates it while it is in use ends this one with a signal; the files here
/// are replaced by renaming, which leaves a map intact.
#[derive(Debug)]
pub struct Mapping(Mmap);

impl Mapping {
    /// Maps the file at `path`.
    ///
    /// # Errors
    /// When it cannot be opened or is not a regular file.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        // SAFETY: the map is read-only and shared; nothing in this process writes to a file it has mapped (outputs are new files
        // that are renamed into place).
        unsafe { Mmap::map(&file) }.map(Self)
    }

    /// Tells the system that `range` will be read soon.
    pub fn will_need(&self, range: Range<usize>) {
        let _ = self.0.advise_range(Advice::WillNeed, range.start, range.len());
    }

    /// Tells the system to read far ahead and to forget early.
    pub fn sequential(&self) {
        let _ = self.0.advise(Advice::Sequential);
    }

    /// Drops the pages that begin in `range` from this process's memory; reading them again maps them again.
    pub fn release(&self, range: Range<usize>) {
        const PAGE: usize = 4096;
        let (start, end) = (range.start / PAGE * PAGE, range.end.min(self.0.len()) / PAGE * PAGE);
        if start < end {
            // SAFETY: pages of a read-only shared map of a file come back with the same content when touched.
            let _ = unsafe { self.0.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start) };
        }
    }
}

impl Deref for Mapping {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// Bytes of a huge page of x86-64.
#[cfg(target_os = "linux")]
const HUGE_PAGE: usize = 2 << 20;

/// Asks for huge pages under `bytes` bytes at `start` where the system has them: through 4 KiB pages, reading gigabytes costs a third
/// of the bandwidth on virtual machines, and the first touch of each costs a fault. Advice: where it is refused, pages are small.
pub fn advise_huge_pages(start: *const u8, bytes: usize) {
    #[cfg(target_os = "linux")]
    {
        let skip = start.align_offset(HUGE_PAGE);
        let bytes = bytes.saturating_sub(skip) / HUGE_PAGE * HUGE_PAGE;
        if bytes > 0 {
            // SAFETY: advice changes no content, wherever it points.
            unsafe { libc::madvise(start.wrapping_add(skip).cast_mut().cast(), bytes, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (start, bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn released_pages_read_the_same() {
        let path = std::env::temp_dir().join(format!("clsa-mapping-{}", std::process::id()));
        let content: Vec<u8> = (0..20_000u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let mapping = Mapping::open(&path).unwrap();
        mapping.sequential();
        mapping.will_need(0..content.len());
        assert_eq!(&*mapping, content);
        mapping.release(100..19_999);
        mapping.release(0..usize::MAX);
        assert_eq!(&*mapping, content);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(&*mapping, content);
    }

    #[test]
    fn folders_and_missing_files_are_errors() {
        assert!(Mapping::open(Path::new("/")).is_err());
        assert!(Mapping::open(Path::new("/nonexistent/file")).is_err());
    }
}
