//! Graphs: work that streams capture instead of doing it, and that is done each time the graph is launched.
//!
//! A graph is the calls that were captured, in their order, on lanes: one for each stream that took part. A launch makes the calls
//! again, on streams of the graph's own that come after the launching stream's work and before what it is asked for later. So
//! whatever is judged of work in streams is judged of a graph's, at every launch.

use crate::{
    clock::Clock,
    error::{
        CAPTURE_INVALIDATED, CAPTURE_ISOLATION, CAPTURE_MERGE, CAPTURE_UNJOINED, CAPTURE_UNMATCHED,
        CAPTURE_UNSUPPORTED, CAPTURE_WRONG_THREAD, CAPTURED_EVENT, Code, ILLEGAL_STATE, INVALID_VALUE,
    },
    memory::{self, Accessor},
    stream::{Mark, Stream, lock},
};
use std::{
    ffi::{c_int, c_uint},
    sync::{Arc, Mutex},
    thread::{self, ThreadId},
};

/// Who may not make calls that could wait for the device while a stream captures: nobody, the capturing thread, or no matter.
const GLOBAL: c_uint = 0;
const RELAXED: c_uint = 2;

type Judge = dyn Fn(&Accessor) -> Result<(), String> + Send + Sync;

/// Something that a stream does: how it is judged, and how it is done; both as often as it is launched.
pub struct Work {
    judge: Box<Judge>,
    run: Box<dyn Fn() + Send + Sync>,
}

impl Work {
    pub fn new(
        judge: impl Fn(&Accessor) -> Result<(), String> + Send + Sync + 'static,
        run: impl Fn() + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self { judge: Box::new(judge), run: Box::new(run) })
    }

    pub fn push(self: &Arc<Self>, stream: &Stream) -> Result<(), String> {
        let work = Arc::clone(self);
        stream.push(false, |who| (self.judge)(who), move || (work.run)()).map(drop)
    }
}

enum Step {
    Work(Arc<Work>),
    /// An event is recorded: the number of the point.
    Record(usize),
    /// And waited for.
    Wait(usize),
}

struct Lane {
    stream: Arc<Stream>,
    /// For each lane, how many of its steps come before this one's next.
    clock: Clock,
}

#[derive(PartialEq)]
enum State {
    Active,
    Invalidated,
    Over,
}

/// What streams are capturing.
pub struct Capture {
    mode: c_uint,
    thread: ThreadId,
    captured: Mutex<Captured>,
}

struct Captured {
    state: State,
    lanes: Vec<Lane>,
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
    /// The event was asked about, or waited for on the host: that is no part of a graph.
    pub fn forbidden<T>(&self) -> Result<T, Code> {
        lock(&self.capture.captured).invalidate();
        Err(CAPTURED_EVENT)
    }
}

static ACTIVE: Mutex<Vec<Arc<Capture>>> = Mutex::new(Vec::new());

/// The capture that a stream takes part in, and its lane.
fn of(stream: &Stream) -> Option<(Arc<Capture>, usize)> {
    lock(&stream.capture).clone()
}

/// Adds to what a stream captures; `None` if it does not capture.
fn add<R>(
    stream: &Stream,
    add: impl FnOnce(&mut Captured, usize) -> Result<R, Code>,
) -> Result<Option<R>, Code> {
    let Some((capture, lane)) = of(stream) else { return Ok(None) };
    let mut captured = lock(&capture.captured);
    match captured.state {
        State::Active => {
            let added = add(&mut captured, lane);
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
        lanes: vec![Lane { stream: Arc::clone(stream), clock: Clock::default() }],
        steps: Vec::new(),
        points: 0,
        allocated: Vec::new(),
    };
    let capture = Arc::new(Capture { mode, thread: thread::current().id(), captured: Mutex::new(captured) });
    lock(&ACTIVE).push(Arc::clone(&capture));
    *own = Some((capture, 0));
    Ok(())
}

/// Ends what `begin` began: the graph, or why there is none. Either way no stream captures any more, but where the call was
/// another thread's.
pub fn end(stream: &Stream) -> Result<Graph, Code> {
    let (capture, lane) = of(stream).ok_or(ILLEGAL_STATE)?;
    if lane != 0 {
        lock(&capture.captured).invalidate();
        return Err(CAPTURE_UNMATCHED);
    }
    if capture.mode != RELAXED && capture.thread != thread::current().id() {
        return Err(CAPTURE_WRONG_THREAD);
    }
    let (state, lanes, graph) = {
        let mut captured = lock(&capture.captured);
        let state = std::mem::replace(&mut captured.state, State::Over);
        let lanes = std::mem::take(&mut captured.lanes);
        let graph = Graph {
            devices: lanes.iter().map(|lane| lane.stream.device).collect(),
            steps: std::mem::take(&mut captured.steps),
            points: captured.points,
            allocated: std::mem::take(&mut captured.allocated),
        };
        (state, lanes, graph)
    };
    lock(&ACTIVE).retain(|active| !Arc::ptr_eq(active, &capture));
    for lane in &lanes {
        *lock(&lane.stream.capture) = None;
    }
    if state == State::Invalidated {
        return Err(CAPTURE_INVALIDATED);
    }
    let origin = &lanes[0].clock;
    match lanes.iter().enumerate().all(|(number, lane)| origin.at(number) >= lane.clock.at(number)) {
        true => Ok(graph),
        false => Err(CAPTURE_UNJOINED),
    }
}

/// A `CUstreamCaptureStatus`.
pub fn status(stream: &Stream) -> c_int {
    of(stream).map_or(0, |(capture, _)| if lock(&capture.captured).state == State::Active { 1 } else { 2 })
}

/// Work for a stream that may capture; `None` if it does not.
pub fn work(stream: &Stream, work: &Arc<Work>) -> Result<Option<()>, Code> {
    add(stream, |captured, lane| {
        captured.lanes[lane].clock.tick(lane);
        captured.steps.push((lane, Step::Work(Arc::clone(work))));
        Ok(())
    })
}

/// Memory that each launch allocates, at the same address; `None` if the stream does not capture.
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

/// Whether a stream captures the end of memory; an error if it does, and the memory is not the graph's.
pub fn frees(stream: &Stream, start: usize) -> Result<(), Code> {
    add(stream, |captured, _| if captured.allocated.contains(&start) { Ok(()) } else { Err(INVALID_VALUE) })
        .map(drop)
}

/// An event is recorded; `None` if the stream does not capture.
pub fn record(stream: &Stream) -> Result<Option<Point>, Code> {
    let point = add(stream, |captured, lane| {
        let number = captured.points;
        captured.points += 1;
        captured.steps.push((lane, Step::Record(number)));
        Ok((number, captured.lanes[lane].clock.clone()))
    })?;
    Ok(point.zip(of(stream)).map(|((number, clock), (capture, _))| Point { capture, number, clock }))
}

/// A stream waits for an event that was recorded outside of captures: not one that captures.
pub fn outside(stream: &Stream) -> Result<(), Code> {
    add::<()>(stream, |_, _| Err(CAPTURE_ISOLATION)).map(drop)
}

/// A stream waits for a captured event: it captures too from then on.
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
    let lane = own.as_ref().map_or(captured.lanes.len(), |(_, lane)| *lane);
    if own.is_none() {
        captured.lanes.push(Lane { stream: Arc::clone(stream), clock: Clock::default() });
        *own = Some((Arc::clone(&point.capture), lane));
    }
    captured.lanes[lane].clock.join(&point.clock);
    captured.steps.push((lane, Step::Wait(point.number)));
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

/// A call that waits for all of a device.
pub fn waits_for(device: usize) -> Result<(), Code> {
    refuse_all(|capture| lock(&capture.captured).lanes.iter().any(|lane| lane.stream.device == device))
}

/// Work of the legacy stream, which comes after that of every stream that was not created to stand apart from it.
pub fn legacy(device: usize) -> bool {
    let is_tied = |lane: &Lane| lane.stream.is_tied && lane.stream.device == device;
    refuse_all(|capture| lock(&capture.captured).lanes.iter().any(is_tied)).is_ok()
}

/// What was captured.
pub struct Graph {
    /// The device of each lane.
    devices: Vec<usize>,
    steps: Vec<(usize, Step)>,
    points: usize,
    allocated: Vec<usize>,
}

/// A graph that can be launched.
pub struct Executable {
    graph: Arc<Graph>,
    lanes: Vec<Arc<Stream>>,
    /// The end of the last launch: one comes after the other.
    last: Mutex<Option<Mark>>,
}

impl Executable {
    pub fn new(graph: Arc<Graph>) -> Self {
        let lanes = graph.devices.iter().map(|&device| Stream::new(device, false, 0)).collect();
        Self { graph, lanes, last: Mutex::default() }
    }

    /// Does what was captured, behind what the stream was asked for before. `finding` is told what is wrong, and where.
    pub fn launch(
        &self,
        stream: &Stream,
        finding: impl Fn(usize, Result<(), String>) -> Result<(), Code>,
    ) -> Result<(), Code> {
        let mut last = lock(&self.last);
        memory::revive(&self.graph.allocated)?;
        let begin = stream.mark();
        for lane in &self.lanes {
            lane.after(&begin);
            if let Some(last) = &*last {
                lane.after(last);
            }
        }
        let mut points = vec![None; self.graph.points];
        for (lane, step) in &self.graph.steps {
            let lane = &self.lanes[*lane];
            match step {
                Step::Work(work) => finding(lane.device, work.push(lane))?,
                Step::Record(point) => points[*point] = Some(lane.mark()),
                Step::Wait(point) => {
                    lane.after(points[*point].as_ref().expect("recorded before it was waited for"))
                }
            }
        }
        let end = self.lanes[0].mark();
        stream.after(&end);
        *last = Some(end);
        Ok(())
    }
}
