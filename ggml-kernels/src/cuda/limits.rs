//! What a GPU can do at most: bytes moved and operations per second. Benchmarks print it beside their rates.
use half::f16;

use super::blas::{Blas, Output, Shape};
use super::{Device, Error, Result, Stream};

/// Rates of one GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Bytes per second of a copy in its memory, read and written together.
    pub copy: f64,
    /// f16 operations per second of cuBLASLt, with f32 sums (a multiply-add is two).
    pub f16: f64,
}

/// Bytes of the copy; side of the square matrices.
const BYTES: usize = 1 << 30;
const SIDE: usize = 8192;

/// Median seconds that `work` takes on the device, of 21 rounds after four that warm up.
///
/// # Errors
/// What `work` and the driver report.
pub fn seconds(stream: &Stream, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let device = stream.device();
    let mut times = vec![];
    for round in 0..25 {
        let (start, end) = (device.event()?, device.event()?);
        stream.record(&start)?;
        work()?;
        stream.record(&end)?;
        end.synchronize()?;
        if round >= 4 {
            times.push(f64::from(end.milliseconds_since(&start)?) * 1e-3);
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// [`seconds`] of a replay of what `record` queues, as one graph.
///
/// # Errors
/// As [`seconds`].
///
/// # Safety
/// Every buffer that the recorded work uses is alive until this returns.
pub unsafe fn graph_seconds(stream: &Stream, record: impl FnOnce() -> Result<()>) -> Result<f64> {
    stream.begin_capture()?;
    record().inspect_err(|_| stream.abandon_capture())?;
    let graph = stream.end_capture()?;
    // SAFETY: the caller's.
    seconds(stream, || unsafe { graph.launch(stream) })
}

/// Bytes per second of a copy in the device's memory, read and written together; takes 2 GiB of it.
///
/// # Errors
/// As [`seconds`].
pub fn copy_rate(stream: &Stream) -> Result<f64> {
    let from = stream.device().zeros::<u8>(BYTES)?;
    let mut to = stream.device().alloc::<u8>(BYTES)?;
    Ok(2.0 * BYTES as f64 / seconds(stream, || to.copy_async(0, &from, 0, BYTES, stream))?)
}

/// Measures GPU `ordinal` with 2 GiB of its memory: medians of some rounds.
///
/// # Errors
/// [`Error::Unavailable`] without a GPU or cuBLASLt; what the driver reports.
pub fn measure(ordinal: usize) -> Result<Limits> {
    let device = Device::open(ordinal)?;
    let stream = device.stream()?;
    let copy = copy_rate(&stream)?;
    // Products of zeros take less power and run faster than those of real values.
    let noise = |i: usize| f16::from_f32(((i.wrapping_mul(2_654_435_761) >> 7) & 255) as f32 / 128.0 - 1.0);
    let values: Vec<f16> = (0..SIDE * SIDE).map(noise).collect();
    let (w, x) = (device.upload(&values)?, device.upload(&values)?);
    let out = device.alloc::<f16>(SIDE * SIDE)?;
    let mut blas =
        Blas::open(&device)?.ok_or_else(|| Error::Unavailable("cuBLASLt is not installed".into()))?;
    let shape = Shape { n: SIDE, rows: SIDE, cols: SIDE, stride: SIDE, output: Output::F16 };
    // SAFETY: all three buffers hold SIDE * SIDE values and outlive the wait in `seconds`; the handle is used on this stream only.
    let product =
        seconds(&stream, || unsafe { blas.matmul(&stream, shape, 1.0, w.ptr(), x.ptr(), out.ptr().cast()) })?;
    Ok(Limits { copy, f16: 2.0 * (SIDE as f64).powi(3) / product })
}
