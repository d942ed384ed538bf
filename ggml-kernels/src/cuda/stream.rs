//! Queues of work: streams, events, launches and recorded graphs.
use std::ffi::{c_uint, c_void};
use std::sync::{Mutex, PoisonError};

use cudarc::driver::sys as cu;

use super::{Device, Error, Function, Result, driver, gate};

/// A queue of work on a device.
pub struct Stream {
    device: Device,
    handle: cu::CUstream,
    recording: Mutex<Option<gate::Recording>>,
}

// SAFETY: a stream handle may be used from any thread; the driver locks.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

/// A point in a stream, with a time.
pub struct Event {
    device: Device,
    handle: cu::CUevent,
}

// SAFETY: an event handle may be used from any thread.
unsafe impl Send for Event {}

/// Recorded work that one call launches again.
pub struct Graph {
    device: Device,
    handle: cu::CUgraphExec,
}

// SAFETY: a graph handle may be used from any one thread at a time, which `&self` methods on a non-Sync type guarantee.
unsafe impl Send for Graph {}

impl Device {
    /// Makes a stream that does not wait for the default one.
    pub fn stream(&self) -> Result<Stream> {
        let _work = gate::work();
        self.bind()?;
        let mut handle = std::ptr::null_mut();
        let flags = cu::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as c_uint;
        // SAFETY: the out-pointer outlives the call.
        unsafe { driver!(cuStreamCreate(&mut handle, flags)) }?;
        Ok(Stream { device: self.clone(), handle, recording: Mutex::new(None) })
    }
    /// Makes an event that keeps the time.
    pub fn event(&self) -> Result<Event> {
        let _work = gate::work();
        self.bind()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the out-pointer outlives the call.
        unsafe { driver!(cuEventCreate(&mut handle, 0)) }?;
        Ok(Event { device: self.clone(), handle })
    }
}

impl Stream {
    pub(super) fn handle(&self) -> cu::CUstream {
        self.handle
    }
    /// The driver's handle, for libraries that take one.
    #[must_use]
    pub fn raw(&self) -> *mut c_void {
        self.handle.cast()
    }
    /// The device it belongs to.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }
    /// Waits until everything queued is done.
    pub fn synchronize(&self) -> Result<()> {
        self.device.bind()?;
        // SAFETY: the handle lives.
        unsafe { driver!(cuStreamSynchronize(self.handle)) }
    }
    /// Queues the recording of `event`.
    pub fn record(&self, event: &Event) -> Result<()> {
        self.device.bind()?;
        // SAFETY: both handles live.
        unsafe { driver!(cuEventRecord(event.handle, self.handle)) }
    }
    /// Queues the recording of `event`, whose time can then be asked for. `into_graph`: work is being recorded, and every launch of the
    /// graph records the event anew.
    pub fn record_timed(&self, event: &Event, into_graph: bool) -> Result<()> {
        self.device.bind()?;
        let flags =
            if into_graph { cu::CUevent_record_flags_enum::CU_EVENT_RECORD_EXTERNAL as c_uint } else { 0 };
        // SAFETY: both handles live.
        unsafe { driver!(cuEventRecordWithFlags(event.handle, self.handle, flags)) }
    }
    /// Lets later work of this stream wait for `event`.
    pub fn wait(&self, event: &Event) -> Result<()> {
        self.device.bind()?;
        // SAFETY: both handles live.
        unsafe { driver!(cuStreamWaitEvent(self.handle, event.handle, 0)) }
    }
    fn set_recording(&self, recording: Option<gate::Recording>) {
        *self.recording.lock().unwrap_or_else(PoisonError::into_inner) = recording;
    }
    /// Starts recording: work queued from now on goes into a graph and does not run. Other threads' allocations wait until it ends.
    pub fn begin_capture(&self) -> Result<()> {
        self.device.bind()?;
        let recording = gate::record();
        let mode = cu::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the handle lives.
        unsafe { driver!(cuStreamBeginCapture_v2(self.handle, mode)) }?;
        self.set_recording(Some(recording));
        Ok(())
    }
    /// Ends recording and prepares the graph.
    pub fn end_capture(&self) -> Result<Graph> {
        self.device.bind()?;
        let mut graph = std::ptr::null_mut();
        let mut handle = std::ptr::null_mut();
        // SAFETY: the template graph is destroyed whatever instantiation says; the executable one is owned by the result.
        unsafe {
            let ended = driver!(cuStreamEndCapture(self.handle, &mut graph));
            self.set_recording(None);
            ended?;
            let _work = gate::work();
            let made = driver!(cuGraphInstantiateWithFlags(&mut handle, graph, 0));
            let _ = cu::cuGraphDestroy(graph);
            made?;
        }
        Ok(Graph { device: self.device.clone(), handle })
    }
    /// Ends recording after a failure; what was recorded is dropped.
    pub fn abandon_capture(&self) {
        let mut graph = std::ptr::null_mut();
        // SAFETY: the handle lives; the graph, if any, is destroyed at once.
        unsafe {
            let _ = self.device.bind();
            let _ = cu::cuStreamEndCapture(self.handle, &mut graph);
            if !graph.is_null() {
                let _ = cu::cuGraphDestroy(graph);
            }
        }
        self.set_recording(None);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // A recording that was left open; whoever waits for it may be this thread.
        self.set_recording(None);
        let _work = gate::work();
        // SAFETY: the handle is this object's own; the driver frees it once its work is done.
        unsafe {
            let _ = self.device.bind();
            let _ = cu::cuStreamDestroy_v2(self.handle);
        }
    }
}

impl Event {
    /// Waits until it has happened.
    pub fn synchronize(&self) -> Result<()> {
        self.device.bind()?;
        // SAFETY: the handle lives.
        unsafe { driver!(cuEventSynchronize(self.handle)) }
    }
    /// Milliseconds from `earlier` to this one; both must have happened.
    pub fn milliseconds_since(&self, earlier: &Self) -> Result<f32> {
        self.device.bind()?;
        let mut time = 0.0;
        // SAFETY: the out-pointer outlives the call.
        unsafe { driver!(cuEventElapsedTime_v2(&mut time, earlier.handle, self.handle)) }?;
        Ok(time)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _work = gate::work();
        // SAFETY: the handle is this object's own.
        unsafe {
            let _ = self.device.bind();
            let _ = cu::cuEventDestroy_v2(self.handle);
        }
    }
}

impl Graph {
    /// Queues the whole graph.
    ///
    /// # Safety
    /// Every buffer that the recorded kernels use must be alive until the work is done.
    pub unsafe fn launch(&self, stream: &Stream) -> Result<()> {
        // The first launch uploads the graph.
        let _work = gate::work();
        self.device.bind()?;
        // SAFETY: both handles live; the buffers are the caller's promise.
        unsafe { driver!(cuGraphLaunch(self.handle, stream.handle)) }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let _work = gate::work();
        // SAFETY: the handle is this object's own.
        unsafe {
            let _ = self.device.bind();
            let _ = cu::cuGraphExecDestroy(self.handle);
        }
    }
}

/// A kernel's parameters, in order: a tuple of plain structs and numbers that the kernel takes by value.
pub trait Arguments {
    /// Addresses of the parameters.
    fn addresses(&self, out: &mut [*mut c_void; 8]) -> usize;
}
macro_rules! arguments {
    ($($t:ident $i:tt),+) => {
        impl<$($t: Copy),+> Arguments for ($($t,)+) {
            fn addresses(&self, out: &mut [*mut c_void; 8]) -> usize {
                let mut n = 0;
                $( out[n] = std::ptr::from_ref(&self.$i).cast_mut().cast(); n += 1; )+
                n
            }
        }
    };
}
arguments!(A 0);
arguments!(A 0, B 1);
arguments!(A 0, B 1, C 2);
arguments!(A 0, B 1, C 2, D 3);
arguments!(A 0, B 1, C 2, D 3, E 4);
arguments!(A 0, B 1, C 2, D 3, E 4, F 5);
arguments!(A 0, B 1, C 2, D 3, E 4, F 5, G 6);
arguments!(A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7);

/// Dynamic shared memory that a block gets without asking.
const SHARED_BY_DEFAULT: usize = 48 * 1024;

/// How a kernel is launched.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Blocks in x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block in x, y, z.
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub shared: usize,
    /// The kernel may start while its predecessor in the stream still runs: it must execute `griddepcontrol.wait`
    /// (`cudaGridDependencySynchronize`) in every thread before it touches anything that an earlier kernel writes or reads.
    pub overlap: bool,
}

impl Launch {
    /// `grid` blocks of `block` threads.
    #[must_use]
    pub fn new(grid: usize, block: usize) -> Self {
        Self { grid: [grid as u32, 1, 1], block: [block as u32, 1, 1], shared: 0, overlap: false }
    }
    /// A grid of up to three dimensions.
    #[must_use]
    pub fn grid(mut self, x: usize, y: usize, z: usize) -> Self {
        self.grid = [x as u32, y as u32, z as u32];
        self
    }
    /// Asks for dynamic shared memory, beyond what a block gets by default too.
    #[must_use]
    pub fn shared(mut self, bytes: usize) -> Self {
        self.shared = bytes;
        self
    }
    /// See [`Launch::overlap`]; ignored before compute capability 9.0.
    #[must_use]
    pub fn overlap(mut self) -> Self {
        self.overlap = true;
        self
    }

    /// Queues `function` with `arguments`.
    ///
    /// # Safety
    /// `arguments` must be the kernel's own parameter list, and every address in it must point to device memory that is large
    /// enough and alive until the work is done.
    pub unsafe fn run<A: Arguments>(
        &self,
        stream: &Stream,
        function: &Function,
        arguments: &A,
    ) -> Result<()> {
        if self.grid.contains(&0) {
            return Ok(());
        }
        // A kernel's code is loaded when it is first launched.
        let _work = gate::work();
        stream.device.bind()?;
        if self.shared > SHARED_BY_DEFAULT {
            function.allow_shared(self.shared)?;
        }
        let mut parameters = [std::ptr::null_mut(); 8];
        arguments.addresses(&mut parameters);
        // SAFETY: an all-zero attribute is valid: CU_LAUNCH_ATTRIBUTE_IGNORE.
        let mut attribute: cu::CUlaunchAttribute = unsafe { std::mem::zeroed() };
        let overlap = self.overlap && stream.device.capability().0 >= 9;
        if overlap {
            attribute.id =
                cu::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attribute.value.programmaticStreamSerializationAllowed = 1;
        }
        let shared = c_uint::try_from(self.shared)
            .map_err(|_| Error::Range(format!("{} bytes of shared memory", self.shared)))?;
        let config = cu::CUlaunchConfig {
            gridDimX: self.grid[0],
            gridDimY: self.grid[1],
            gridDimZ: self.grid[2],
            blockDimX: self.block[0],
            blockDimY: self.block[1],
            blockDimZ: self.block[2],
            sharedMemBytes: shared,
            hStream: stream.handle,
            attrs: &raw mut attribute,
            numAttrs: c_uint::from(overlap),
        };
        // SAFETY: the configuration and parameters outlive the call, which copies them; the rest is the caller's promise.
        unsafe {
            driver!(cuLaunchKernelEx(&config, function.handle, parameters.as_mut_ptr(), std::ptr::null_mut()))
        }
        .map_err(|e| match e {
            Error::Driver { call, message } => {
                Error::Driver { call, message: format!("{message} (kernel {})", function.name()) }
            }
            other => other,
        })
    }
}
