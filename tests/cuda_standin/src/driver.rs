//! The exported entry points of `libcuda`.

use crate::{
    counts::{self, Count},
    error::{self, *},
    graph::{self, Executable, Graph, Point, Work},
    kernel, memory,
    stream::{Position, Progress, Stream, lock},
};
use std::{
    cell::Cell,
    collections::HashMap,
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

pub type Handle = usize;

struct Context {
    device: usize,
    null: Arc<Stream>,
    streams: Mutex<HashMap<Handle, Arc<Stream>>>,
    // Sticky, as on a GPU: every later call of the context returns it.
    failed: AtomicI32,
    /// The other devices that may access the memory of this one's pool, one bit each.
    open: AtomicU64,
    /// The number of retains that were not released.
    retained: AtomicUsize,
    /// The attributes of the pool, by number.
    pool: [AtomicU64; 5],
}

/// The range of a CUDA GPU; a smaller number has priority.
const HIGHEST_PRIORITY: c_int = -5;
const LOWEST_PRIORITY: c_int = 0;
/// `CU_EVENT_DISABLE_TIMING`.
const DISABLE_TIMING: c_uint = 2;

/// An event belongs to a context, and may be recorded any number of times.
#[derive(Clone)]
struct Event {
    device: usize,
    /// Whether it stores the time at which it is reached.
    timed: bool,
    at: At,
}

/// The position at which an event was last recorded.
#[derive(Clone)]
enum At {
    Never,
    Stream(Position),
    /// In a stream that captures.
    Capture(Point),
}

/// The objects behind the handles. No handle is reused.
struct Handles<T>(Mutex<(Handle, Option<HashMap<Handle, T>>)>);

impl<T: Clone> Handles<T> {
    const fn new() -> Self {
        Self(Mutex::new((0, None)))
    }

    fn add(&self, value: T) -> Handle {
        let mut all = lock(&self.0);
        all.0 += 1;
        let handle = all.0;
        all.1.get_or_insert_default().insert(handle, value);
        handle
    }

    fn get(&self, handle: Handle) -> Result<T, Code> {
        lock(&self.0).1.as_ref().and_then(|all| all.get(&handle)).cloned().ok_or(INVALID_HANDLE)
    }

    fn set(&self, handle: Handle, value: T) -> Result<(), Code> {
        let mut all = lock(&self.0);
        let place = all.1.as_mut().and_then(|all| all.get_mut(&handle)).ok_or(INVALID_HANDLE)?;
        *place = value;
        Ok(())
    }

    fn remove(&self, handle: Handle) -> Result<(), Code> {
        lock(&self.0).1.as_mut().and_then(|all| all.remove(&handle)).map(drop).ok_or(INVALID_HANDLE)
    }
}

static EVENTS: Handles<Event> = Handles::new();
static GRAPHS: Handles<Arc<Graph>> = Handles::new();
static EXECUTABLES: Handles<Arc<Executable>> = Handles::new();
thread_local!(static CURRENT: Cell<Option<usize>> = const { Cell::new(None) });

fn contexts() -> &'static [Context] {
    static ALL: OnceLock<Vec<Context>> = OnceLock::new();
    ALL.get_or_init(|| {
        eprintln!("cuda stand-in: NO GPU IS USED: device memory is host memory, kernels run on the CPU");
        let count = std::env::var("CUDA_STANDIN_DEVICES").ok().and_then(|v| v.parse().ok()).unwrap_or(8);
        let context = |device| Context {
            device,
            null: Stream::new(device, true, LOWEST_PRIORITY),
            streams: Mutex::default(),
            failed: AtomicI32::new(0),
            open: AtomicU64::new(0),
            retained: AtomicUsize::new(0),
            pool: [0, 1, 1, 1, 0].map(AtomicU64::new),
        };
        (0..count).map(context).collect()
    })
}

fn current() -> Result<&'static Context, Code> {
    let context = CURRENT.get().and_then(|device| contexts().get(device)).ok_or(INVALID_CONTEXT)?;
    if context.retained.load(SeqCst) == 0 {
        return Err(CONTEXT_IS_DESTROYED);
    }
    match context.failed.load(SeqCst) {
        SUCCESS => Ok(context),
        code => Err(code),
    }
}

impl Context {
    fn policy(&self) -> memory::Policy {
        let is_on = |attribute: usize| self.pool[attribute].load(SeqCst) != 0;
        memory::Policy { follow_events: is_on(1), opportunistic: is_on(2), internal: is_on(3) }
    }

    fn all_streams(&self) -> Vec<Arc<Stream>> {
        lock(&self.streams).values().chain([&self.null]).cloned().collect()
    }

    /// Waits for all work enqueued on the device, as some driver calls may: loading a module moves
    /// memory, and pinning memory changes the device's page tables. This does not order anything
    /// for the host, as not every driver waits.
    ///
    /// If the work waits for a peer that cannot proceed before this call returns, the real driver
    /// hangs. Here it is reported once the device has made no progress for `CUDA_STANDIN_WAIT`
    /// seconds.
    fn drain(&self, call: &str) -> Result<(), Code> {
        let pending: Vec<_> =
            self.all_streams().into_iter().map(|stream| (stream.enqueued(), stream)).collect();
        let done = || pending.iter().map(|(_, stream)| stream.done.count()).sum::<u64>();
        let (mut seen, mut since) = (done(), Instant::now());
        while let Some((count, stream)) = pending.iter().find(|(count, stream)| !stream.done.is_at(*count)) {
            if stream.done.wait_for(*count, Duration::from_millis(20)) {
                continue;
            }
            let now = done();
            if now != seen {
                (seen, since) = (now, Instant::now());
            }
            if since.elapsed() >= patience() {
                let what = pending.iter().filter_map(|(_, stream)| {
                    stream.unfinished().map(|what| format!("{what} (stream {})", stream.number))
                });
                error::report(format!(
                    "deadlock: {call} waits for the work of device {}, which does not end: {}",
                    self.device,
                    what.collect::<Vec<_>>().join(", ")
                ));
                self.failed.store(TIMEOUT, SeqCst);
                return Err(TIMEOUT);
            }
        }
        Ok(())
    }
}

/// The time for which a device may make no progress while a call waits for it: `CUDA_STANDIN_WAIT`
/// seconds, 10 by default.
fn patience() -> Duration {
    static PATIENCE: OnceLock<Duration> = OnceLock::new();
    *PATIENCE.get_or_init(|| {
        let seconds = std::env::var("CUDA_STANDIN_WAIT").ok().and_then(|v| v.parse().ok());
        Duration::try_from_secs_f64(seconds.unwrap_or(10.0)).unwrap_or(Duration::from_secs(10))
    })
}

/// A call that may wait for all work of the current context.
pub fn drain(call: &str) -> Result<(), Code> {
    current()?.drain(call)
}

/// Looks up the stream of a handle in the current context.
pub fn stream(handle: Handle) -> Result<Arc<Stream>, Code> {
    let context = current()?;
    if handle == 0 {
        return if graph::legacy(context.device) { Ok(context.null.clone()) } else { Err(CAPTURE_IMPLICIT) };
    }
    lock(&context.streams).get(&handle).cloned().ok_or(INVALID_HANDLE)
}

/// The same, for calls that cannot be captured.
pub fn stream_now(handle: Handle) -> Result<Arc<Stream>, Code> {
    let stream = stream(handle)?;
    graph::forbidden(&stream)?;
    Ok(stream)
}

/// Enqueues work on a stream, or adds it to the graph that the stream captures.
pub fn submit(
    stream: &Stream,
    judge: impl Fn(&memory::Accessor) -> Result<(), String> + Send + Sync + 'static,
    run: impl Fn() + Send + Sync + 'static,
) -> Result<(), Code> {
    submit_work(stream, &Work::new(judge, run))
}

fn submit_work(stream: &Stream, work: &Arc<Work>) -> Result<(), Code> {
    match graph::work(stream, work)? {
        Some(()) => Ok(()),
        None => illegal(stream.device, work.push(stream)),
    }
}

/// Turns a finding into the context's sticky error.
pub fn illegal<T>(device: usize, outcome: Result<T, String>) -> Result<T, Code> {
    outcome.map_err(|message| {
        error::report(message);
        contexts()[device].failed.store(ILLEGAL_ADDRESS, SeqCst);
        ILLEGAL_ADDRESS
    })
}

/// Whether every other device may access the memory of this device's pool.
pub fn is_open(device: usize) -> bool {
    let others = (0..contexts().len()).filter(|&other| other != device);
    let open = contexts()[device].open.load(SeqCst);
    others.into_iter().all(|other| open >> other & 1 == 1)
}

/// Writes a result to the caller's pointer.
pub unsafe fn put<T>(to: *mut T, value: T) -> Result<(), Code> {
    if to.is_null() {
        return Err(INVALID_VALUE);
    }
    unsafe { to.write(value) };
    Ok(())
}

fn device(ordinal: c_int) -> Result<&'static Context, Code> {
    usize::try_from(ordinal).ok().and_then(|i| contexts().get(i)).ok_or(INVALID_DEVICE)
}

/// The milliseconds between two events, measured on the CPU.
fn elapsed(from: Handle, to: Handle) -> Result<f32, Code> {
    let time = |event| match EVENTS.get(event)? {
        Event { timed: false, .. } => Err(INVALID_HANDLE),
        Event { at: At::Stream(position), .. } => position.time().ok_or(NOT_READY),
        Event { at: At::Capture(_), .. } => Err(CAPTURED_EVENT),
        Event { at: At::Never, .. } => Err(INVALID_HANDLE),
    };
    let (from, to) = (time(from)?, time(to)?);
    Ok(to.saturating_duration_since(from).as_secs_f32() * 1e3)
}

/// Loads a kernel that was not loaded eagerly, in `cuFuncLoad` or its first launch.
fn loads(function: &kernel::Function, call: &str) -> Result<(), Code> {
    if function.is_first_use() && !is_eager() { drain(call) } else { Ok(()) }
}

fn is_eager() -> bool {
    std::env::var("CUDA_MODULE_LOADING").is_ok_and(|mode| mode == "EAGER")
}

/// Creates a stream of the current context.
fn create_stream(flags: c_uint, priority: c_int) -> Result<Handle, Code> {
    let context = current()?;
    let new = Stream::new(context.device, flags & 1 == 0, priority.clamp(HIGHEST_PRIORITY, LOWEST_PRIORITY));
    let handle = Arc::as_ptr(&new) as usize;
    lock(&context.streams).insert(handle, new);
    Ok(handle)
}

macro_rules! exports {
    ($(fn $name:ident($($a:ident: $t:ty),*) $body:block)*) => {$(
        /// As the driver's.
        ///
        /// # Safety
        /// As the driver's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($a: $t),*) -> Code {
            let run = || -> Result<(), Code> { $body };
            run().err().unwrap_or(SUCCESS)
        }
    )*};
}

exports! {
    fn cuInit(flags: c_uint) { contexts(); if flags == 0 { Ok(()) } else { Err(INVALID_VALUE) } }
    fn cuDriverGetVersion(version: *mut c_int) { unsafe { put(version, 13000) } }
    fn cuGetExportTable(table: *mut *const c_void, _id: *const c_void) { unsafe { put(table, std::ptr::null())? }; Err(NOT_FOUND) }
    fn cuGetErrorName(code: Code, text: *mut *const c_char) { unsafe { put(text, error::name(code).ok_or(INVALID_VALUE)?.as_ptr()) } }
    fn cuGetErrorString(code: Code, text: *mut *const c_char) { unsafe { put(text, error::name(code).ok_or(INVALID_VALUE)?.as_ptr()) } }
    fn cuDeviceGetCount(count: *mut c_int) { unsafe { put(count, contexts().len() as c_int) } }
    fn cuDeviceGet(out: *mut c_int, ordinal: c_int) { device(ordinal)?; unsafe { put(out, ordinal) } }
    fn cuDeviceTotalMem_v2(bytes: *mut usize, ordinal: c_int) { device(ordinal)?; unsafe { put(bytes, memory::limit()) } }
    fn cuDeviceGetName(out: *mut c_char, size: c_int, ordinal: c_int) {
        device(ordinal)?;
        let text = format!("CUDA stand-in {ordinal}");
        let room = usize::try_from(size).ok().filter(|n| *n > 0 && !out.is_null()).ok_or(INVALID_VALUE)? - 1;
        let count = text.len().min(room);
        unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), out.cast(), count); out.add(count).write(0) };
        Ok(())
    }
    fn cuDeviceGetUuid_v2(out: *mut [u8; 16], ordinal: c_int) { unsafe { put(out, [device(ordinal)?.device as u8; 16]) } }
    // A context's handle is its device's number plus one; null is no context.
    fn cuDevicePrimaryCtxRetain(out: *mut Handle, ordinal: c_int) {
        let context = device(ordinal)?;
        unsafe { put(out, context.device + 1)? };
        context.retained.fetch_add(1, SeqCst);
        Ok(())
    }
    // The last release ends the context, its work, its streams and its modules.
    fn cuDevicePrimaryCtxRelease_v2(ordinal: c_int) {
        let context = device(ordinal)?;
        let less = |count: usize| count.checked_sub(1);
        if context.retained.fetch_update(SeqCst, SeqCst, less).map_err(|_| INVALID_CONTEXT)? > 1 { return Ok(()); }
        let drained = context.drain("cuDevicePrimaryCtxRelease");
        lock(&context.streams).clear();
        kernel::unload_all(context.device);
        drained
    }
    fn cuCtxGetCurrent(out: *mut Handle) { unsafe { put(out, CURRENT.get().map_or(0, |d| d + 1)) } }
    fn cuCtxSetCurrent(context: Handle) {
        if context > contexts().len() { return Err(INVALID_CONTEXT); }
        counts::own(Count::SetCurrent);
        CURRENT.set(context.checked_sub(1));
        Ok(())
    }
    fn cuCtxGetDevice(out: *mut c_int) { unsafe { put(out, current()?.device as c_int) } }
    fn cuCtxSynchronize() {
        let context = current()?;
        graph::waits_for(context.device).and(graph::may_wait())?;
        counts::add(context.device, Count::HostWait);
        context.all_streams().iter().for_each(|stream| stream.synchronize());
        current().map(drop)
    }

    fn cuStreamCreate(out: *mut Handle, flags: c_uint) { unsafe { put(out, create_stream(flags, 0)?) } }
    // The driver clamps a priority that is out of range.
    fn cuStreamCreateWithPriority(out: *mut Handle, flags: c_uint, priority: c_int) {
        unsafe { put(out, create_stream(flags, priority)?) }
    }
    fn cuStreamGetPriority(handle: Handle, out: *mut c_int) { unsafe { put(out, stream(handle)?.priority) } }
    fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) {
        current()?;
        // Either may be null.
        unsafe {
            if !least.is_null() { least.write(LOWEST_PRIORITY); }
            if !greatest.is_null() { greatest.write(HIGHEST_PRIORITY); }
        }
        Ok(())
    }
    fn cuStreamDestroy_v2(handle: Handle) {
        let gone = lock(&current()?.streams).remove(&handle).ok_or(INVALID_HANDLE)?;
        // Destroying a stream that captures invalidates the capture.
        let _ = graph::forbidden(&gone);
        Ok(())
    }
    fn cuStreamSynchronize(handle: Handle) {
        let stream = stream_now(handle)?;
        counts::add(stream.device, Count::HostWait);
        stream.synchronize();
        current().map(drop)
    }
    fn cuStreamQuery(handle: Handle) { if stream_now(handle)?.is_idle() { Ok(()) } else { Err(NOT_READY) } }
    fn cuStreamWaitEvent(handle: Handle, event: Handle, _flags: c_uint) {
        let stream = stream(handle)?;
        match EVENTS.get(event)?.at {
            At::Never => {}
            At::Stream(position) => { graph::outside(&stream)?; stream.after(&position); }
            At::Capture(point) => graph::wait(&stream, &point)?,
        }
        counts::add(stream.device, Count::StreamWait);
        Ok(())
    }

    fn cuStreamBeginCapture_v2(handle: Handle, mode: c_uint) {
        if handle == 0 { return Err(CAPTURE_UNSUPPORTED); }
        graph::begin(&stream(handle)?, mode)
    }
    fn cuStreamEndCapture(handle: Handle, out: *mut Handle) {
        unsafe { put(out, 0)? };
        let graph = graph::end(&*stream(handle)?)?;
        unsafe { put(out, GRAPHS.add(Arc::new(graph))) }
    }
    fn cuStreamIsCapturing(handle: Handle, status: *mut c_int) { let stream = stream(handle)?; unsafe { put(status, graph::status(&stream)) } }
    fn cuGraphInstantiateWithFlags(out: *mut Handle, graph: Handle, flags: u64) {
        if flags != 0 { return Err(NOT_SUPPORTED); }
        let executable = Executable::new(GRAPHS.get(graph)?);
        unsafe { put(out, EXECUTABLES.add(Arc::new(executable))) }
    }
    fn cuGraphLaunch(executable: Handle, handle: Handle) {
        let stream = stream(handle)?;
        // A real driver adds it as a node of the other graph.
        if graph::status(&stream) != 0 { return graph::forbidden(&stream).and(Err(NOT_SUPPORTED)); }
        EXECUTABLES.get(executable)?.launch(&stream, illegal)?;
        counts::add(stream.device, Count::Graph);
        Ok(())
    }
    fn cuGraphExecDestroy(executable: Handle) { EXECUTABLES.remove(executable) }
    fn cuGraphDestroy(graph: Handle) { GRAPHS.remove(graph) }

    fn cuEventCreate(out: *mut Handle, flags: c_uint) {
        let device = current()?.device;
        counts::add(device, Count::Event);
        unsafe { put(out, EVENTS.add(Event { device, timed: flags & DISABLE_TIMING == 0, at: At::Never })) }
    }
    fn cuEventDestroy_v2(event: Handle) { EVENTS.remove(event) }
    fn cuEventRecord(handle_of_event: Handle, handle: Handle) {
        let stream = stream(handle)?;
        let event = EVENTS.get(handle_of_event)?;
        if event.device != stream.device { return Err(INVALID_HANDLE); }
        // Streams that already wait keep waiting for the previous record.
        let at = graph::record(&stream)?.map_or_else(|| At::Stream(stream.position()), At::Capture);
        counts::add(stream.device, Count::Record);
        EVENTS.set(handle_of_event, Event { at, ..event })
    }
    fn cuEventQuery(event: Handle) {
        graph::may_wait()?;
        match EVENTS.get(event)?.at {
            At::Stream(position) if !position.is_reached() => Err(NOT_READY),
            At::Capture(point) => point.forbidden(),
            _ => Ok(()),
        }
    }
    fn cuEventSynchronize(event: Handle) {
        graph::may_wait()?;
        let event = EVENTS.get(event)?;
        counts::add(event.device, Count::HostWait);
        match event.at {
            At::Stream(position) => position.wait(),
            At::Capture(point) => return point.forbidden(),
            At::Never => {}
        }
        Ok(())
    }
    fn cuEventElapsedTime(ms: *mut f32, from: Handle, to: Handle) { unsafe { put(ms, elapsed(from, to)?) } }
    fn cuEventElapsedTime_v2(ms: *mut f32, from: Handle, to: Handle) { unsafe { put(ms, elapsed(from, to)?) } }

    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        let used = memory::used(current()?.device);
        unsafe { put(free, memory::limit() - used)?; put(total, memory::limit()) }
    }
    fn cuMemAlloc_v2(out: *mut usize, size: usize) {
        graph::may_wait()?;
        let device = current()?.device;
        let bounds = memory::allocate(device, size, None)?.bounds;
        bounds.open();
        unsafe { put(out, bounds.start)? };
        counts::add(device, Count::Allocation);
        Ok(())
    }
    fn cuMemAllocAsync(out: *mut usize, size: usize, handle: Handle) {
        // The NaN pattern counts as the stream's first write, so another stream must be ordered
        // after the allocation.
        let stream = stream(handle)?;
        counts::add(stream.device, Count::Allocation);
        if let Some(start) = graph::allocate(&stream, size)? { return unsafe { put(out, start) }; }
        let (clock, policy) = (stream.clock(), contexts()[stream.device].policy());
        let by = memory::AllocatingStream { stream: stream.number, clock: &clock, policy };
        let memory::NewMemory { bounds, after } = memory::allocate(stream.device, size, Some(&by))?;
        if let Some(done) = after { stream.wait_for_memory(done); }
        let start = bounds.start;
        submit(&stream, move |who| memory::access(who, start, size, true, "allocation"), move || bounds.open())?;
        unsafe { put(out, start) }
    }
    fn cuMemFree_v2(start: usize) {
        match unsafe { cuCtxSynchronize() } { SUCCESS => {} code => return Err(code) }
        unsafe { cuMemFreeAsync(start, 0) };
        current().map(drop)
    }
    fn cuMemFreeAsync(start: usize, handle: Handle) {
        let stream = stream(handle)?;
        graph::frees(&stream, start)?;
        let (bounds, done) = (memory::bounds(start), Arc::<Progress>::default());
        let reached = Arc::clone(&done);
        submit(&stream, move |who| memory::free(who, start, &done), move || {
            if let Some(bounds) = &bounds { bounds.close(); }
            reached.reach(1);
        })?;
        counts::add(stream.device, Count::Free);
        Ok(())
    }
    fn cuMemcpyHtoDAsync_v2(to: usize, from: *const u8, size: usize, handle: Handle) {
        let stream = stream(handle)?;
        if from.is_null() { return Err(INVALID_VALUE); }
        counts::add(stream.device, Count::Upload);
        let judge = move |who: &memory::Accessor| memory::access(who, to, size, true, "copy to device");
        if memory::is_pinned(from as usize, size) || graph::status(&stream) != 0 {
            let from = from as usize;
            return submit(&stream, judge, move || unsafe { std::ptr::copy(from as *const u8, to as *mut u8, size) });
        }
        // Pageable memory may be reused as soon as the call returns.
        let bytes = unsafe { std::slice::from_raw_parts(from, size) }.to_vec();
        submit(&stream, judge, move || unsafe { std::ptr::copy(bytes.as_ptr(), to as *mut u8, size) })
    }
    fn cuMemcpyDtoHAsync_v2(to: *mut u8, from: usize, size: usize, handle: Handle) {
        let stream = stream(handle)?;
        if to.is_null() { return Err(INVALID_VALUE); }
        counts::add(stream.device, Count::Download);
        let to = to as usize;
        let judge = move |who: &memory::Accessor| memory::access(who, from, size, false, "copy to host");
        submit(&stream, judge, move || unsafe { std::ptr::copy(from as *const u8, to as *mut u8, size) })?;
        if !memory::is_pinned(to, size) && graph::status(&stream) == 0 {
            counts::add(stream.device, Count::HostWait);
            stream.synchronize();
        }
        Ok(())
    }
    fn cuMemcpyHtoD_v2(to: usize, from: *const u8, size: usize) {
        graph::may_wait()?;
        match unsafe { cuMemcpyHtoDAsync_v2(to, from, size, 0) } { SUCCESS => { stream(0)?.synchronize(); Ok(()) } code => Err(code) }
    }
    fn cuMemcpyDtoH_v2(to: *mut u8, from: usize, size: usize) {
        graph::may_wait()?;
        match unsafe { cuMemcpyDtoHAsync_v2(to, from, size, 0) } { SUCCESS => Ok(()), code => Err(code) }
    }
    fn cuMemcpyDtoDAsync_v2(to: usize, from: usize, size: usize, handle: Handle) {
        let stream = stream(handle)?;
        let judge = move |who: &memory::Accessor| {
            memory::access(who, from, size, false, "copy (source)")?;
            memory::access(who, to, size, true, "copy (destination)")
        };
        counts::add(stream.device, Count::Copy);
        submit(&stream, judge, move || unsafe { std::ptr::copy(from as *const u8, to as *mut u8, size) })
    }
    fn cuMemsetD8Async(to: usize, value: u8, size: usize, handle: Handle) {
        let stream = stream(handle)?;
        counts::add(stream.device, Count::Memset);
        let judge = move |who: &memory::Accessor| memory::access(who, to, size, true, "memset");
        submit(&stream, judge, move || unsafe { std::ptr::write_bytes(to as *mut u8, value, size) })
    }
    fn cuMemsetD32Async(to: usize, value: c_uint, count: usize, handle: Handle) {
        let stream = stream(handle)?;
        let size = count.checked_mul(4).filter(|_| to.is_multiple_of(4)).ok_or(INVALID_VALUE)?;
        counts::add(stream.device, Count::Memset);
        let judge = move |who: &memory::Accessor| memory::access(who, to, size, true, "memset");
        submit(&stream, judge, move || unsafe { std::slice::from_raw_parts_mut(to as *mut u32, count) }.fill(value))
    }

    fn cuMemAllocHost_v2(out: *mut usize, size: usize) {
        let device = current()?.device;
        graph::may_wait()?;
        counts::add(device, Count::Pinned);
        drain("cuMemAllocHost")?;
        unsafe { put(out, memory::pin(size)) }
    }
    fn cuMemFreeHost(start: usize) {
        graph::may_wait()?;
        drain("cuMemFreeHost")?;
        memory::unpin(start).ok_or(INVALID_VALUE)
    }
    // A pool's handle is its device's number plus one.
    fn cuDeviceGetDefaultMemPool(out: *mut Handle, ordinal: c_int) { unsafe { put(out, device(ordinal)?.device + 1) } }
    fn cuDeviceCanAccessPeer(out: *mut c_int, ordinal: c_int, peer: c_int) {
        device(ordinal)?;
        device(peer)?;
        unsafe { put(out, c_int::from(ordinal != peer)) }
    }
    // Each description: the kind of location (1 is a device), its number, the access (3 is read and
    // write).
    fn cuMemPoolSetAccess(pool: Handle, access: *const [c_int; 3], count: usize) {
        let own = pool.checked_sub(1).and_then(|at| contexts().get(at)).ok_or(INVALID_VALUE)?;
        if access.is_null() { return Err(INVALID_VALUE); }
        for [kind, other, flags] in unsafe { std::slice::from_raw_parts(access, count) } {
            let other = device(*other)?.device;
            if *kind != 1 || *flags != 3 || other == own.device { return Err(INVALID_VALUE); }
            own.open.fetch_or(1 << other, SeqCst);
        }
        Ok(())
    }
    // 1 to 3 select what may be reused. 4 is the memory that is kept when a stream is synchronized,
    // which has no effect here.
    fn cuMemPoolSetAttribute(pool: Handle, attribute: c_int, value: *mut c_void) {
        let own = pool.checked_sub(1).and_then(|at| contexts().get(at)).ok_or(INVALID_VALUE)?;
        if value.is_null() { return Err(INVALID_VALUE); }
        let value = unsafe {
            match attribute {
                1..=3 => u64::from(value.cast::<c_uint>().read()),
                4 => value.cast::<u64>().read(),
                _ => return Err(INVALID_VALUE),
            }
        };
        own.pool[attribute as usize].store(value, SeqCst);
        Ok(())
    }
    fn cuMemPoolGetAttribute(pool: Handle, attribute: c_int, out: *mut c_void) {
        let own = pool.checked_sub(1).and_then(|at| contexts().get(at)).ok_or(INVALID_VALUE)?;
        unsafe {
            match attribute {
                1..=3 => put(out.cast::<c_uint>(), own.pool[attribute as usize].load(SeqCst) as c_uint),
                4 => put(out.cast::<u64>(), own.pool[4].load(SeqCst)),
                // The reserved bytes and the used bytes.
                5 | 7 => put(out.cast::<u64>(), memory::used(own.device) as u64),
                _ => Err(INVALID_VALUE),
            }
        }
    }
    fn cuDeviceGetAttribute(out: *mut c_int, attribute: c_int, ordinal: c_int) {
        device(ordinal)?;
        let value = match attribute {
            1 => 1024, // threads per block
            8 => 49_152, // shared memory per block by default
            10 => 32, // threads per warp
            12 | 82 => 65_536, // registers per block, and per multiprocessor
            16 => 2, // multiprocessors
            38 => 50 << 20, // L2 cache
            39 => 2048, // threads per multiprocessor
            75 => 9, // compute capability, major
            76 => 0, // and minor
            81 => 233_472, // shared memory per multiprocessor
            97 => 232_448, // shared memory per block that can be requested
            111 => 1024, // shared memory per block that the system reserves
            _ => 1,
        };
        unsafe { put(out, value) }
    }

    fn cuModuleLoadData(out: *mut Handle, image: *const c_char) {
        let device = current()?.device;
        counts::add(device, Count::Module);
        if image.is_null() { return Err(INVALID_VALUE); }
        drain("cuModuleLoadData")?;
        let image = unsafe { CStr::from_ptr(image) };
        unsafe { put(out, kernel::load(image, device).ok_or(INVALID_IMAGE)?) }
    }
    // Set by `CUDA_MODULE_LOADING`: 1 is eager, 2 lazy.
    fn cuModuleGetLoadingMode(out: *mut c_int) { unsafe { put(out, if is_eager() { 1 } else { 2 }) } }
    fn cuModuleUnload(module: Handle) {
        drain("cuModuleUnload")?;
        kernel::unload(module).ok_or(INVALID_HANDLE)
    }
    fn cuModuleGetFunction(out: *mut Handle, module: Handle, name: *const c_char) {
        if name.is_null() { return Err(INVALID_VALUE); }
        let name = unsafe { CStr::from_ptr(name) };
        unsafe { put(out, kernel::find(module, name)?) }
    }
    fn cuFuncLoad(function: Handle) { loads(kernel::function(function)?, "cuFuncLoad") }
    fn cuFuncIsLoaded(out: *mut c_int, function: Handle) { kernel::function(function)?; unsafe { put(out, 1) } }
    fn cuFuncSetAttribute(function: Handle, attribute: c_int, value: c_int) { kernel::function(function)?.set(attribute, value) }
    fn cuFuncGetAttribute(out: *mut c_int, attribute: c_int, function: Handle) {
        unsafe { put(out, kernel::function(function)?.get(attribute)?) }
    }
    fn cuLaunchKernel(
        function: Handle, gx: c_uint, gy: c_uint, gz: c_uint, bx: c_uint, by: c_uint, bz: c_uint, shared: c_uint,
        handle: Handle, arguments: *mut *mut c_void, _extra: *mut *mut c_void
    ) {
        let stream = stream(handle)?;
        let function = kernel::function(function)?;
        if function.device() != stream.device { return Err(INVALID_HANDLE); }
        loads(function, "cuLaunchKernel")?;
        function.fits([gx, gy, gz], [bx, by, bz], shared)?;
        counts::add(stream.device, Count::Launch);
        let launch = unsafe { kernel::Launch::new(function, [gx, gy, gz], [bx, by, bz], shared, arguments) };
        let launch = illegal(stream.device, launch)?;
        let device = stream.device;
        submit_work(&stream, &Work::prepared(move |who| {
            let run = launch.prepare(who)?;
            Ok(Box::new(move || {
                let _ = illegal(device, run());
            }))
        }))?;
        // The sticky error, if the work has already finished.
        current().map(drop)
    }
}
