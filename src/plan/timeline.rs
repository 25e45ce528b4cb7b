//! The timeline of a pipeline: a [`Schedule`] with the times of its passes.

use crate::{
    error::{Error, Result, same_size},
    plan::bounds,
    train::{Action, Compute, Message, Pass, Schedule},
};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// The seconds that a stage takes for one microbatch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Passes {
    /// A forward.
    pub forward: f64,
    /// A backward.
    pub backward: f64,
}

/// What each rank of a pipeline does in a step, and when.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Timeline {
    /// The seconds of the step's passes and exchanges.
    pub seconds: f64,
    /// The spans of each rank, by ascending start. Between them the rank waits.
    pub ranks: Vec<Vec<Span>>,
}

/// What a rank does between two times.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Span {
    /// The start, in seconds.
    pub start: f64,
    /// The end, in seconds.
    pub end: f64,
    /// The activity.
    pub work: SpanWork,
}

/// What a rank does in a [`Span`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SpanWork {
    /// A pass of a microbatch through a chunk.
    Compute {
        /// The direction.
        pass: Pass,
        /// The rank's chunk.
        chunk: usize,
        /// The microbatch.
        microbatch: usize,
    },
    /// A transfer to or from another stage, without the wait for the other rank.
    Exchange,
}

impl Timeline {
    /// The seconds in which a rank computes or transfers.
    ///
    /// # Panics
    /// When there is no such rank.
    pub fn busy(&self, rank: usize) -> f64 {
        self.ranks[rank].iter().map(|span| span.end - span.start).sum()
    }

    /// The seconds in which a rank neither computes nor transfers.
    ///
    /// # Panics
    /// When there is no such rank.
    pub fn idle(&self, rank: usize) -> f64 {
        // The rounding errors of a rank that never waits may be negative.
        (self.seconds - self.busy(rank)).max(0.0)
    }
}

const OP: &str = "timeline";

/// Simulates a step of a pipeline as [`Pipeline::run`](crate::train::Pipeline::run) makes it: each
/// rank executes its [`Schedule::actions`] in order.
///
/// A message starts when both of its ranks have reached the action that exchanges it, and takes
/// `exchange` seconds. The send and the receive of an action run concurrently. If messages are
/// `buffered`, the sender copies the message in half of these seconds and continues, and the
/// receiver copies it in the other half. `passes` has the seconds of the chunks of each rank.
///
/// # Errors
/// When the schedule cannot be run, `passes` has other numbers of ranks or chunks than the
/// schedule, or a time is negative or not finite.
pub(super) fn simulate(
    schedule: &Schedule,
    passes: &[Vec<Passes>],
    exchange: f64,
    buffered: bool,
) -> Result<Timeline> {
    same_size(OP, "the ranks of the passes", passes.len(), "those of the schedule", schedule.ranks())?;
    for (rank, chunks) in passes.iter().enumerate() {
        let left = format!("the chunks of the passes of rank {rank}");
        same_size(OP, &left, chunks.len(), "those of the schedule", schedule.chunks())?;
        for (chunk, Passes { forward, backward }) in chunks.iter().enumerate() {
            let of = |pass: &str| format!("the {pass} of chunk {chunk} of rank {rank}");
            bounds::seconds(OP, &of("forward"), *forward)?;
            bounds::seconds(OP, &of("backward"), *backward)?;
        }
    }
    bounds::seconds(OP, "an exchange", exchange)?;

    let actions = schedule.actions()?;
    let mut ranks: Vec<_> = actions.iter().map(|actions| Progress::new(actions)).collect();
    // The ranks that may be able to proceed. A rank that waits for another is added again when that
    // rank joins its message.
    let mut ready: Vec<usize> = (0..ranks.len()).collect();
    // The times at which messages are in the receiver's buffer.
    let mut arrived = HashMap::new();
    while let Some(rank) = ready.pop() {
        while let Some(&action) = ranks[rank].left.first() {
            match action {
                Action::Compute(compute) => {
                    let Passes { forward, backward } = passes[rank][compute.chunk];
                    ranks[rank]
                        .compute(compute, if compute.pass == Pass::Forward { forward } else { backward });
                }
                Action::Exchange { send, receive } if buffered => {
                    let half = exchange / 2.0;
                    let this = &mut ranks[rank];
                    if let Some(to) = send.filter(|_| this.sent.is_none()) {
                        this.sent = Some(this.free);
                        this.push(this.free, this.free + half, SpanWork::Exchange);
                        arrived.insert((to.pass, to.stage, to.microbatch), this.free);
                        ready.push(to.peer);
                    }
                    if let Some(from) = receive {
                        let key = (from.pass, from.stage, from.microbatch);
                        let Some(arrival) = arrived.remove(&key) else { break };
                        let start = this.free.max(arrival);
                        this.push(start, start + half, SpanWork::Exchange);
                    }
                    this.sent = None;
                    this.left = &this.left[1..];
                }
                Action::Exchange { send, receive } => {
                    if let Some(to) = send.filter(|_| ranks[rank].sent.is_none())
                        && ranks[to.peer].receives(Message { peer: rank, ..to })
                    {
                        start(&mut ranks, rank, to.peer);
                        ready.push(to.peer);
                    }
                    if let Some(from) = receive.filter(|_| ranks[rank].received.is_none())
                        && ranks[from.peer].sends(Message { peer: rank, ..from })
                    {
                        start(&mut ranks, from.peer, rank);
                        ready.push(from.peer);
                    }
                    let this = &mut ranks[rank];
                    if this.sent.is_some() != send.is_some() || this.received.is_some() != receive.is_some() {
                        break;
                    }
                    this.exchange(exchange);
                }
            }
        }
    }
    for (rank, progress) in ranks.iter().enumerate() {
        if let Some(action) = progress.left.first() {
            return Err(Error::internal(OP, format!("rank {rank} waits forever in {action:?}")));
        }
    }
    let seconds = ranks.iter().map(|progress| progress.free).fold(0.0, f64::max);
    Ok(Timeline { seconds, ranks: ranks.into_iter().map(|progress| progress.spans).collect() })
}

/// A rank in the middle of its actions.
struct Progress<'a> {
    /// The actions that have not ended.
    left: &'a [Action],
    /// When the rank reached the first of them.
    free: f64,
    /// The starts of the messages of the first action that both of their ranks have reached.
    sent: Option<f64>,
    received: Option<f64>,
    spans: Vec<Span>,
}

/// Starts a message that both of its ranks have reached.
fn start(ranks: &mut [Progress<'_>], from: usize, to: usize) {
    let start = ranks[from].free.max(ranks[to].free);
    ranks[from].sent = Some(start);
    ranks[to].received = Some(start);
}

impl<'a> Progress<'a> {
    fn new(left: &'a [Action]) -> Self {
        Self { left, free: 0.0, sent: None, received: None, spans: Vec::with_capacity(left.len()) }
    }

    /// Whether the rank has reached the action that sends this message.
    fn sends(&self, message: Message) -> bool {
        matches!(self.left.first(), Some(Action::Exchange { send, .. }) if *send == Some(message))
    }

    /// Whether the rank has reached the action that receives this message.
    fn receives(&self, message: Message) -> bool {
        matches!(self.left.first(), Some(Action::Exchange { receive, .. }) if *receive == Some(message))
    }

    /// Runs the first action, a pass of this many seconds.
    fn compute(&mut self, Compute { pass, chunk, microbatch }: Compute, seconds: f64) {
        let work = SpanWork::Compute { pass, chunk, microbatch };
        self.left = &self.left[1..];
        self.push(self.free, self.free + seconds, work);
    }

    /// Ends the first action, an exchange whose messages have started and take this many seconds.
    /// Messages that overlap are one span.
    fn exchange(&mut self, seconds: f64) {
        self.left = &self.left[1..];
        match (self.sent.take(), self.received.take()) {
            (Some(sent), Some(received)) => {
                let (first, last) = (sent.min(received), sent.max(received));
                if first + seconds < last {
                    self.push(first, first + seconds, SpanWork::Exchange);
                    self.push(last, last + seconds, SpanWork::Exchange);
                } else {
                    self.push(first, last + seconds, SpanWork::Exchange);
                }
            }
            (Some(start), None) | (None, Some(start)) => {
                self.push(start, start + seconds, SpanWork::Exchange);
            }
            (None, None) => {}
        }
    }

    fn push(&mut self, start: f64, end: f64, work: SpanWork) {
        self.spans.push(Span { start, end, work });
        self.free = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Philox;

    fn equal_stages(schedule: &Schedule, forward: f64, backward: f64) -> Timeline {
        let chunks = vec![Passes { forward, backward }; schedule.chunks()];
        simulate(schedule, &vec![chunks; schedule.ranks()], 0.0, false).unwrap()
    }

    fn near(got: f64, want: f64) -> bool {
        (got - want).abs() <= 1e-9 * want.abs().max(1.0)
    }

    #[test]
    fn equal_stages_take_the_time_of_the_formulas() {
        for (ranks, microbatches) in [(1, 1), (1, 5), (2, 2), (4, 4), (4, 8), (4, 16), (8, 24), (3, 2)] {
            let (p, m) = (ranks as f64, microbatches as f64);
            for (forward, backward) in [(1.0, 2.0), (1.0, 1.0), (0.3, 0.95)] {
                let want = (m + p - 1.0) * (forward + backward);
                for schedule in [
                    Schedule::one_forward_one_backward(ranks, microbatches),
                    Schedule::gpipe(ranks, microbatches),
                ] {
                    let timeline = equal_stages(&schedule, forward, backward);
                    let what = format!("{ranks} ranks, {microbatches} microbatches, {forward}, {backward}");
                    assert!(near(timeline.seconds, want), "{what}: {} and {want}", timeline.seconds);
                    for rank in 0..ranks {
                        let bubble = timeline.idle(rank) / timeline.busy(rank);
                        assert!(near(bubble, (p - 1.0) / m), "{what}: rank {rank} has bubble {bubble}");
                    }
                }
            }
        }
    }

    #[test]
    fn chunks_divide_the_bubble_at_best() {
        for (ranks, chunks, microbatches) in [(2, 2, 4), (4, 2, 4), (4, 2, 32), (4, 4, 16), (8, 3, 16)] {
            let schedule = Schedule::interleaved(ranks, chunks, microbatches).unwrap();
            let (p, v, m) = (ranks as f64, chunks as f64, microbatches as f64);
            let timeline = equal_stages(&schedule, 1.0 / v, 2.0 / v);
            let best = (p - 1.0) / (v * m);
            for rank in 0..ranks {
                let bubble = timeline.idle(rank) / timeline.busy(rank);
                // With other numbers of ranks, senders wait for receivers that compute.
                let is_best = if ranks == 4 { near(bubble, best) } else { bubble > best };
                assert!(is_best, "{ranks} ranks, {chunks} chunks: rank {rank} has {bubble}, not {best}");
            }
        }
    }

    /// Random numbers in [0, 1).
    struct Draws(Philox, u64);

    impl Draws {
        fn next(&mut self) -> f64 {
            self.1 += 1;
            self.0.uniform(self.1)
        }

        fn passes(&mut self, schedule: &Schedule) -> Vec<Vec<Passes>> {
            let mut chunk = || Passes { forward: self.next(), backward: self.next() };
            let mut rank = || (0..schedule.chunks()).map(|_| chunk()).collect();
            (0..schedule.ranks()).map(|_| rank()).collect()
        }
    }

    fn schedules() -> Vec<Schedule> {
        let mut all = Vec::new();
        for ranks in 1..5 {
            for microbatches in 1..7 {
                all.push(Schedule::gpipe(ranks, microbatches));
                all.push(Schedule::one_forward_one_backward(ranks, microbatches));
                for chunks in 1..4 {
                    all.extend(Schedule::interleaved(ranks, chunks, microbatches));
                }
            }
        }
        all
    }

    /// The ends of all actions by relaxation: starts with 0 and raises each end to what the ends
    /// before it demand, until none changes.
    fn relaxed(schedule: &Schedule, passes: &[Vec<Passes>], exchange: f64, buffered: bool) -> Vec<Vec<f64>> {
        let actions = schedule.actions().unwrap();
        let mut sends = HashMap::new();
        let mut receives = HashMap::new();
        for (rank, actions) in actions.iter().enumerate() {
            for (at, action) in actions.iter().enumerate() {
                let Action::Exchange { send, receive } = action else { continue };
                if let Some(message) = send {
                    sends.insert((message.pass, message.stage, message.microbatch), (rank, at));
                }
                if let Some(message) = receive {
                    receives.insert((message.pass, message.stage, message.microbatch), (rank, at));
                }
            }
        }
        let mut ends: Vec<Vec<f64>> = actions.iter().map(|actions| vec![0.0; actions.len()]).collect();
        loop {
            let before = ends.clone();
            let arrival = |(rank, at): (usize, usize)| if at == 0 { 0.0 } else { before[rank][at - 1] };
            for (rank, actions) in actions.iter().enumerate() {
                for (at, action) in actions.iter().enumerate() {
                    let own = arrival((rank, at));
                    ends[rank][at] = match action {
                        Action::Compute(compute) => {
                            let times = passes[rank][compute.chunk];
                            own + if compute.pass == Pass::Forward { times.forward } else { times.backward }
                        }
                        Action::Exchange { send, receive } if buffered => {
                            let half = exchange / 2.0;
                            let sent = own + send.map_or(0.0, |_| half);
                            receive.map_or(sent, |from| {
                                let sender = sends[&(from.pass, from.stage, from.microbatch)];
                                sent.max(arrival(sender) + half) + half
                            })
                        }
                        Action::Exchange { send, receive } => {
                            let key = |message: &Message| (message.pass, message.stage, message.microbatch);
                            let peers = [
                                send.map(|message| receives[&key(&message)]),
                                receive.map(|message| sends[&key(&message)]),
                            ];
                            peers.into_iter().flatten().map(&arrival).fold(own, f64::max) + exchange
                        }
                    };
                }
            }
            if ends == before {
                return ends;
            }
        }
    }

    #[test]
    fn times_are_those_of_a_relaxation() {
        let mut draws = Draws(Philox::stream(11, 0), 0);
        for schedule in schedules() {
            let (passes, exchange) = (draws.passes(&schedule), draws.next());
            let buffered = draws.next() < 0.5;
            let timeline = simulate(&schedule, &passes, exchange, buffered).unwrap();
            let ends = relaxed(&schedule, &passes, exchange, buffered);
            let actions = schedule.actions().unwrap();
            for (rank, spans) in timeline.ranks.iter().enumerate() {
                let mut spans = spans.iter().peekable();
                for (action, end) in actions[rank].iter().zip(&ends[rank]) {
                    // Two messages of an action that do not overlap have a span each.
                    let mut last = spans.next().unwrap();
                    if let Action::Exchange { .. } = action {
                        assert_eq!(last.work, SpanWork::Exchange);
                        last =
                            spans.next_if(|next| last.end < *end && next.work == last.work).unwrap_or(last);
                    }
                    assert_eq!(last.end, *end, "{schedule:?}, rank {rank}");
                }
                assert_eq!(spans.next(), None);
            }
            let last = ends.iter().flatten().copied().fold(0.0, f64::max);
            assert_eq!(timeline.seconds, last);
        }
    }

    #[test]
    fn ranks_do_one_thing_at_a_time_and_wait_for_their_inputs() {
        let mut draws = Draws(Philox::stream(12, 0), 0);
        for schedule in schedules() {
            let (passes, exchange) = (draws.passes(&schedule), draws.next());
            let timeline = simulate(&schedule, &passes, exchange, draws.next() < 0.5).unwrap();
            let mut computed = HashMap::new();
            for (rank, spans) in timeline.ranks.iter().enumerate() {
                assert!(
                    spans.windows(2).all(|pair| pair[0].end <= pair[1].start),
                    "{schedule:?}, rank {rank}"
                );
                assert!(spans.iter().all(|span| 0.0 <= span.start && span.start <= span.end));
                assert!(near(timeline.busy(rank) + timeline.idle(rank), timeline.seconds));
                for span in spans {
                    if let SpanWork::Compute { pass, chunk, microbatch } = span.work {
                        computed.insert((pass, schedule.stage(rank, chunk), microbatch), span);
                    }
                }
            }
            assert_eq!(computed.len(), 2 * schedule.stages() * schedule.microbatches());
            let transfer = if schedule.ranks() > 1 { exchange } else { 0.0 };
            for (&(pass, stage, microbatch), span) in &computed {
                let input = match pass {
                    Pass::Forward => stage.checked_sub(1),
                    Pass::Backward => Some(stage + 1).filter(|&next| next < schedule.stages()),
                };
                let sent = input.map_or(0.0, |from| computed[&(pass, from, microbatch)].end + transfer);
                assert!(span.start >= sent, "{schedule:?}: {pass:?}, stage {stage}, microbatch {microbatch}");
            }
        }
    }

    #[test]
    fn what_cannot_be_simulated_is_an_error() {
        let schedule = Schedule::one_forward_one_backward(2, 3);
        let pass = Passes { forward: 1.0, backward: 2.0 };
        let error = |passes: &[Vec<Passes>], exchange| {
            simulate(&schedule, passes, exchange, false).unwrap_err().to_string()
        };
        let ranks = "timeline: the ranks of the passes is 1, but those of the schedule is 2";
        assert_eq!(error(&[vec![pass]], 0.0), ranks);
        let chunks = "timeline: the chunks of the passes of rank 1 is 2, but those of the schedule is 1";
        assert_eq!(error(&[vec![pass], vec![pass; 2]], 0.0), chunks);
        let seconds = |what: &str, seconds| {
            format!(
                "timeline: {what} takes {seconds} seconds, but they have to be finite and at least 0: check the rates"
            )
        };
        let nan = Passes { backward: f64::NAN, ..pass };
        let backward = "the backward of chunk 0 of rank 1";
        assert_eq!(error(&[vec![pass], vec![nan]], 0.0), seconds(backward, "NaN"));
        assert_eq!(error(&[vec![pass], vec![pass]], -1.0), seconds("an exchange", "-1"));
        assert_eq!(error(&[vec![pass], vec![pass]], f64::INFINITY), seconds("an exchange", "inf"));
        let twice =
            Schedule::custom(1, 1, vec![vec![Compute { pass: Pass::Forward, chunk: 0, microbatch: 0 }; 2]]);
        assert!(simulate(&twice, &[vec![pass]], 0.0, true).unwrap_err().to_string().contains("twice"));
    }
}
