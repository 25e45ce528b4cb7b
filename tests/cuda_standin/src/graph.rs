//! Graphs: streams capture work instead of running it, and each launch of the graph runs it.
//!
//! A graph holds the captured calls in their order, each with the captured stream that it belongs
//! to. A launch repeats the calls on the graph's own streams. These come after the launching
//! stream's earlier work and before its later work. So every launch checks a graph's work like the
//! work of streams.

use crate::{
    clock::Clock,
    error::{
        CAPTURE_INVALIDATED, CAPTURE_ISOLATION, CAPTURE_MERGE, CAPTURE_UNJOINED, CAPTURE_UNMATCHED,
        CAPTURE_UNSUPPORTED, CAPTURE_WRONG_THREAD, CAPTURED_EVENT, Code, ILLEGAL_STATE, INVALID_VALUE,
    },
    memory::{self, Accessor},
    stream::{Operation, Position, Stream, lock},
};
use std::{
    ffi::{c_int, c_uint},
    sync::{Arc, Mutex},
    thread::{self, ThreadId},
};

/// The capture modes: while a stream captures, all threads, the capturing thread, or no thread may
/// not make calls that could wait for the device.
const GLOBAL: c_uint = 0;
const RELAXED: c_uint = 2;

type Prepare = dyn Fn(&Accessor) -> Result<Operation, String> + Send + Sync;

/// Work of a stream, which is checked and run at each launch.
pub struct Work(Box<Prepare>);

impl Work {
    pub fn new(
        judge: impl Fn(&Accessor) -> Result<(), String> + Send + Sync + 'static,
        run: impl Fn() + Send + Sync + 'static,
    ) -> Arc<Self> {
        let run = Arc::new(run);
        Self::prepared(move |who| {
            judge(who)?;
            let run = Arc::clone(&run);
            Ok(Box::new(move || run()))
        })
    }

    /// Creates work that depends on the check of its accesses.
    pub fn prepared(
        prepare: impl Fn(&Accessor) -> Result<Operation, String> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self(Box::new(prepare)))
    }

    pub fn push(&self, stream: &Stream) -> Result<(), String> {
        stream.prepare(false, |who| (self.0)(who)).map(drop)
    }
}

enum Step {
    Work(Arc<Work>),
    /// Records an event; the number of the point.
    Record(usize),
    /// Waits for the point.
    Wait(usize),
}

struct CapturedStream {
    stream: Arc<Stream>,
    /// For each captured stream, the number of its steps that are ordered before this stream's
    /// next.
    clock: Clock,
}

#[derive(PartialEq)]
enum State {
    Active,
    Invalidated,
    Over,
}

/// A capture by one or more streams.
pub struct Capture {
    mode: c_uint,
    thread: ThreadId,
    captured: Mutex<Captured>,
}

struct Captured {
    state: State,
    streams: Vec<CapturedStream>,
    steps: Vec<(usize, Step)>,
    points: usize,
    allocated: Vec<usize>,
}

impl Captured {
    fn invalidate(&mut self) {
        if self.state == State::Active {
            self.state = State::Invalidated;
        }
    }
}

/// An event that was recorded while its stream captured.
#[derive(Clone)]
pub struct Point {
    capture: Arc<Capture>,
    number: usize,
    clock: Clock,
}

impl Point {
    /// Rejects a query of the event, or a host wait for it: neither can be part of a graph.
    pub fn forbidden<T>(&self) -> Result<T, Code> {
        lock(&self.capture.captured).invalidate();
        Err(CAPTURED_EVENT)
    }
}

static ACTIVE: Mutex<Vec<Arc<Capture>>> = Mutex::new(Vec::new());

/// The capture that a stream takes part in, and the stream's index in it.
fn of(stream: &Stream) -> Option<(Arc<Capture>, usize)> {
    lock(&stream.capture).clone()
}

/// Adds to a stream's capture; `None` if the stream does not capture.
fn add<R>(
    stream: &Stream,
    add: impl FnOnce(&mut Captured, usize) -> Result<R, Code>,
) -> Result<Option<R>, Code> {
    let Some((capture, index)) = of(stream) else { return Ok(None) };
    let mut captured = lock(&capture.captured);
    match captured.state {
        State::Active => {
            let added = add(&mut captured, index);
            if added.is_err() {
                captured.invalidate();
            }
            added.map(Some)
        }
        _ => Err(CAPTURE_INVALIDATED),
    }
}

pub fn begin(stream: &Arc<Stream>, mode: c_uint) -> Result<(), Code> {
    if mode > RELAXED {
        return Err(INVALID_VALUE);
    }
    let mut own = lock(&stream.capture);
    if own.is_some() {
        return Err(ILLEGAL_STATE);
    }
    let captured = Captured {
        state: State::Active,
        streams: vec![CapturedStream { stream: Arc::clone(stream), clock: Clock::default() }],
        steps: Vec::new(),
        points: 0,
        allocated: Vec::new(),
    };
    let capture = Arc::new(Capture { mode, thread: thread::current().id(), captured: Mutex::new(captured) });
    lock(&ACTIVE).push(Arc::clone(&capture));
    *own = Some((capture, 0));
    Ok(())
}

/// Ends what `begin` began. Returns the graph, or why there is none. Either way all its streams
/// stop capturing, unless the call came from the wrong thread.
pub fn end(stream: &Stream) -> Result<Graph, Code> {
    let (capture, index) = of(stream).ok_or(ILLEGAL_STATE)?;
    if index != 0 {
        lock(&capture.captured).invalidate();
        return Err(CAPTURE_UNMATCHED);
    }
    if capture.mode != RELAXED && capture.thread != thread::current().id() {
        return Err(CAPTURE_WRONG_THREAD);
    }
    let (state, streams, graph) = {
        let mut captured = lock(&capture.captured);
        let state = std::mem::replace(&mut captured.state, State::Over);
        let streams = std::mem::take(&mut captured.streams);
        let graph = Graph {
            devices: streams.iter().map(|captured| captured.stream.device).collect(),
            steps: std::mem::take(&mut captured.steps),
            points: captured.points,
            allocated: std::mem::take(&mut captured.allocated),
        };
        (state, streams, graph)
    };
    lock(&ACTIVE).retain(|active| !Arc::ptr_eq(active, &capture));
    for captured in &streams {
        *lock(&captured.stream.capture) = None;
    }
    if state == State::Invalidated {
        return Err(CAPTURE_INVALIDATED);
    }
    let origin = &streams[0].clock;
    match streams.iter().enumerate().all(|(number, captured)| origin.at(number) >= captured.clock.at(number))
    {
        true => Ok(graph),
        false => Err(CAPTURE_UNJOINED),
    }
}

/// A `CUstreamCaptureStatus`.
pub fn status(stream: &Stream) -> c_int {
    of(stream).map_or(0, |(capture, _)| if lock(&capture.captured).state == State::Active { 1 } else { 2 })
}

/// Captures work if the stream captures; else `None`.
pub fn work(stream: &Stream, work: &Arc<Work>) -> Result<Option<()>, Code> {
    add(stream, |captured, index| {
        captured.streams[index].clock.tick(index);
        captured.steps.push((index, Step::Work(Arc::clone(work))));
        Ok(())
    })
}

/// Captures an allocation, which has the same address at each launch; `None` if the stream does not
/// capture.
pub fn allocate(stream: &Stream, size: usize) -> Result<Option<usize>, Code> {
    let bounds = add(stream, |captured, _| {
        let bounds = memory::reserve(stream.device, size)?;
        captured.allocated.push(bounds.start);
        Ok(bounds)
    })?;
    let Some(bounds) = bounds else { return Ok(None) };
    let start = bounds.start;
    let judge = move |who: &Accessor| memory::access(who, start, size, true, "allocation");
    work(stream, &Work::new(judge, move || bounds.open()))?;
    Ok(Some(start))
}

/// Captures a free; an error if the stream captures and the memory is not the graph's.
pub fn frees(stream: &Stream, start: usize) -> Result<(), Code> {
    add(stream, |captured, _| if captured.allocated.contains(&start) { Ok(()) } else { Err(INVALID_VALUE) })
        .map(drop)
}

/// Captures the record of an event; `None` if the stream does not capture.
pub fn record(stream: &Stream) -> Result<Option<Point>, Code> {
    let point = add(stream, |captured, index| {
        let number = captured.points;
        captured.points += 1;
        captured.steps.push((index, Step::Record(number)));
        Ok((number, captured.streams[index].clock.clone()))
    })?;
    Ok(point.zip(of(stream)).map(|((number, clock), (capture, _))| Point { capture, number, clock }))
}

/// A wait for an event recorded outside of captures, which a capturing stream may not make.
pub fn outside(stream: &Stream) -> Result<(), Code> {
    add::<()>(stream, |_, _| Err(CAPTURE_ISOLATION)).map(drop)
}

/// A wait for a captured event, which makes the stream join the capture.
pub fn wait(stream: &Arc<Stream>, point: &Point) -> Result<(), Code> {
    let mut own = lock(&stream.capture);
    if let Some((capture, _)) = own.as_ref().filter(|(capture, _)| !Arc::ptr_eq(capture, &point.capture)) {
        lock(&capture.captured).invalidate();
        lock(&point.capture.captured).invalidate();
        return Err(CAPTURE_MERGE);
    }
    let mut captured = lock(&point.capture.captured);
    match captured.state {
        State::Active => {}
        State::Invalidated => return Err(CAPTURE_INVALIDATED),
        State::Over => return Err(CAPTURED_EVENT),
    }
    let index = own.as_ref().map_or(captured.streams.len(), |(_, index)| *index);
    if own.is_none() {
        captured.streams.push(CapturedStream { stream: Arc::clone(stream), clock: Clock::default() });
        *own = Some((Arc::clone(&point.capture), index));
    }
    captured.streams[index].clock.join(&point.clock);
    captured.steps.push((index, Step::Wait(point.number)));
    Ok(())
}

/// A call that no stream can capture.
pub fn forbidden(stream: &Stream) -> Result<(), Code> {
    match of(stream) {
        Some((capture, _)) => refuse(&capture),
        None => Ok(()),
    }
}

fn refuse(capture: &Capture) -> Result<(), Code> {
    lock(&capture.captured).invalidate();
    Err(CAPTURE_UNSUPPORTED)
}

fn refuse_all(which: impl Fn(&Capture) -> bool) -> Result<(), Code> {
    let active = lock(&ACTIVE).clone();
    active.iter().filter(|capture| which(capture)).map(|capture| refuse(capture)).fold(Ok(()), Result::and)
}

/// A call of this thread that may wait for the device.
pub fn may_wait() -> Result<(), Code> {
    let here = thread::current().id();
    refuse_all(|capture| capture.mode == GLOBAL || (capture.mode != RELAXED && capture.thread == here))
}

/// A call that waits for all work of a device.
pub fn waits_for(device: usize) -> Result<(), Code> {
    refuse_all(|capture| {
        lock(&capture.captured).streams.iter().any(|captured| captured.stream.device == device)
    })
}

/// Work of the legacy stream, which is ordered after that of every blocking stream. Returns whether
/// the call is allowed.
pub fn legacy(device: usize) -> bool {
    let is_tied = |captured: &CapturedStream| captured.stream.is_tied && captured.stream.device == device;
    refuse_all(|capture| lock(&capture.captured).streams.iter().any(is_tied)).is_ok()
}

/// The result of a capture.
pub struct Graph {
    /// The device of each captured stream.
    devices: Vec<usize>,
    steps: Vec<(usize, Step)>,
    points: usize,
    allocated: Vec<usize>,
}

/// A graph that can be launched.
pub struct Executable {
    graph: Arc<Graph>,
    streams: Vec<Arc<Stream>>,
    /// The end of the last launch; launches run one after the other.
    last: Mutex<Option<Position>>,
}

impl Executable {
    pub fn new(graph: Arc<Graph>) -> Self {
        let streams = graph.devices.iter().map(|&device| Stream::new(device, false, 0)).collect();
        Self { graph, streams, last: Mutex::default() }
    }

    /// Runs the captured work after the stream's earlier work. `finding` receives what is wrong,
    /// and on which device.
    pub fn launch(
        &self,
        stream: &Stream,
        finding: impl Fn(usize, Result<(), String>) -> Result<(), Code>,
    ) -> Result<(), Code> {
        let mut last = lock(&self.last);
        memory::revive(&self.graph.allocated)?;
        let begin = stream.position();
        for own in &self.streams {
            own.after(&begin);
            if let Some(last) = &*last {
                own.after(last);
            }
        }
        let mut points = vec![None; self.graph.points];
        for (index, step) in &self.graph.steps {
            let own = &self.streams[*index];
            match step {
                Step::Work(work) => finding(own.device, work.push(own))?,
                Step::Record(point) => points[*point] = Some(own.position()),
                Step::Wait(point) => {
                    own.after(points[*point].as_ref().expect("recorded before it was waited for"))
                }
            }
        }
        let end = self.streams[0].position();
        stream.after(&end);
        *last = Some(end);
        Ok(())
    }
}
