//! The cost of TLS between processes: connections over TLS 1.3, with a token, and plain TCP. Also
//! the cost of an event in the audit log.
//!
//! `cargo bench --features tls --bench tls [-- --quick] [--rounds 15] [--json FILE]`. Two ranks,
//! which are threads here, connect over loopback as processes do:
//!
//! * `TLS`: a job whose ranks have keys and a signed membership file.
//! * `token`: a job with a token. Each frame has an HMAC-SHA-256, and nothing is encrypted.
//! * `TCP`: a connection that moves the same bytes without the library: no frames, no
//!   authentication, no check of calls.
//!
//! A round trip is two `exchange`s: rank 0 sends a payload, and rank 1 sends it back. In an
//! all-reduce rank 1 sends its payload to rank 0, which sends both payloads to rank 1. A round
//! repeats an operation over one connection after the other, each time in another order. The bench
//! reports the median over the rounds of a round's median, and of the ratios within a round, with
//! the least and the largest. Every result is compared with the expected bits.
//!
//! An event of the audit log is compared with a `write_all` of as many bytes to a file. A round
//! writes 1000 of one and then of the other, each time in another order; none are synced. Then the
//! log is verified, with 100,000 lines or more.

mod keys;

use clap::Parser;
use keys::Keys;
use shardwise::{
    Result, Tensor,
    comm::{Group, ReduceOp},
    device::Cpu,
    launch::Env,
    security::audit::{self, Event, Verdict},
};
use std::{
    error::Error,
    fs::{self, File},
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

const DEADLINE: Duration = Duration::from_secs(60);
const PAYLOADS: [usize; 6] = [1 << 10, 4 << 10, 64 << 10, 1 << 20, 16 << 20, 64 << 20];
const VARIANTS: [&str; 3] = ["TCP", "token", "TLS"];
const OPERATIONS: [&str; 2] = ["round trip", "all-reduce"];
/// The goal: over TLS, an operation on 1 MiB takes at most twice the time that it takes with a
/// token.
const GOAL: f64 = 2.0;
/// The goal: an event of the audit log that is not synced takes at most 20 us.
const EVENT_GOAL: f64 = 20e-6;

/// Measures the cost of TLS.
#[derive(Parser)]
struct Options {
    /// The number of rounds.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// The numbers of bytes of the payloads.
    #[arg(long, value_delimiter = ',', default_values_t = PAYLOADS)]
    payloads: Vec<usize>,
    /// Runs one round of the payloads up to 1 MiB, to check the results and not the speed.
    #[arg(long)]
    quick: bool,
    /// Also writes the rows to this file, as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Passed by `cargo bench`; ignored.
    #[arg(long, hide = true)]
    bench: bool,
}

/// The seconds of an operation over each connection of [`VARIANTS`], by round.
struct Row {
    what: String,
    bytes: usize,
    rounds: Vec<[f64; 3]>,
}

/// The least, the median and the largest of some numbers.
fn spread(mut numbers: Vec<f64>) -> [f64; 3] {
    numbers.sort_by(f64::total_cmp);
    [numbers[0], numbers[numbers.len() / 2], numbers[numbers.len() - 1]]
}

impl Row {
    fn seconds(&self, variant: usize) -> f64 {
        spread(self.rounds.iter().map(|round| round[variant]).collect())[1]
    }

    /// The spread of the ratio of the times over TLS and over another connection.
    fn ratio(&self, variant: usize) -> [f64; 3] {
        spread(self.rounds.iter().map(|round| round[2] / round[variant]).collect())
    }

    fn print(&self) {
        let time = |variant| {
            let us = self.seconds(variant) * 1e6;
            // No connection is made without the library.
            if us == 0.0 { String::new() } else { format!("{us:.1}") }
        };
        let ratio = |variant| {
            let [least, median, largest] = self.ratio(variant);
            if median.is_finite() {
                format!("{median:.2} ({least:.2} to {largest:.2})")
            } else {
                String::new()
            }
        };
        let [tcp, token, tls] = [0, 1, 2].map(time);
        println!(
            "| {} | {} | {tcp} | {token} | {tls} | {} | {} |",
            self.what,
            self.bytes,
            ratio(1),
            ratio(0)
        );
    }

    fn json(&self) -> serde_json::Value {
        serde_json::json!({ "what": self.what, "bytes": self.bytes, "variants": VARIANTS, "rounds_s": self.rounds })
    }
}

/// The element of rank `rank` at index `at`.
fn value(rank: usize, at: usize) -> f32 {
    ((at * 7 + rank * 3) % 1009) as f32 / 7.0 - 60.0
}

fn payload(rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|at| value(rank, at)).collect()
}

fn bits_differ(got: &[f32], want: &[f32]) -> bool {
    got.len() != want.len() || got.iter().zip(want).any(|(got, want)| got.to_bits() != want.to_bits())
}

/// One rank's connections to the other one.
struct Rank<'a> {
    rank: usize,
    /// With a token, and over TLS.
    groups: [&'a Group<Cpu>; 2],
    tcp: TcpStream,
    own: Vec<f32>,
    /// The payload of rank 0, and the sum of both.
    wanted: [Vec<f32>; 2],
}

impl<'a> Rank<'a> {
    fn new(groups: [&'a Group<Cpu>; 2], tcp: TcpStream, len: usize) -> Self {
        let rank = groups[0].rank();
        let [first, second] = [0, 1].map(|rank| payload(rank, len));
        let sum = first.iter().zip(&second).map(|(first, second)| first + second).collect();
        let own = if rank == 0 { first.clone() } else { second };
        Self { rank, groups, tcp, own, wanted: [first, sum] }
    }

    /// Runs an operation once over a connection. Returns the time and whether the result is wrong.
    fn once(
        &mut self,
        operation: usize,
        variant: usize,
    ) -> Result<(Duration, bool), Box<dyn Error + Send + Sync>> {
        // Both ranks begin at about the same time.
        self.groups[0].barrier()?;
        let (time, got) = match (variant.checked_sub(1), operation) {
            (Some(group), 0) => self.round_trip(self.groups[group])?,
            (Some(group), _) => self.all_reduce(self.groups[group])?,
            (None, 0) => self.tcp_round_trip()?,
            (None, _) => self.tcp_all_reduce()?,
        };
        Ok((time, bits_differ(&got, &self.wanted[operation])))
    }

    fn round_trip(&self, group: &Group<Cpu>) -> Result<(Duration, Vec<f32>)> {
        let x = Tensor::from_slice(group.device(), [self.own.len()], &self.own)?;
        let other = 1 - self.rank;
        let begin = Instant::now();
        if self.rank == 0 {
            group.exchange(Some((other, &x)), None)?;
        }
        let came = group.exchange::<f32>(None, Some((other, x.shape())))?;
        if let (1, Some(came)) = (self.rank, &came) {
            group.exchange(Some((other, came)), None)?;
        }
        let time = begin.elapsed();
        Ok((time, came.map_or(Ok(Vec::new()), |came| came.to_vec())?))
    }

    fn all_reduce(&self, group: &Group<Cpu>) -> Result<(Duration, Vec<f32>)> {
        let mut x = Tensor::from_slice(group.device(), [self.own.len()], &self.own)?;
        let begin = Instant::now();
        group.all_reduce(ReduceOp::Sum, &mut x)?;
        Ok((begin.elapsed(), x.to_vec()?))
    }

    fn tcp_round_trip(&mut self) -> io::Result<(Duration, Vec<f32>)> {
        let own = to_bytes(&self.own);
        let mut came = vec![0; own.len()];
        let begin = Instant::now();
        if self.rank == 0 {
            self.tcp.write_all(&own)?;
        }
        self.tcp.read_exact(&mut came)?;
        if self.rank == 1 {
            self.tcp.write_all(&came)?;
        }
        Ok((begin.elapsed(), from_bytes(&came)))
    }

    fn tcp_all_reduce(&mut self) -> io::Result<(Duration, Vec<f32>)> {
        let own = to_bytes(&self.own);
        let mut came = vec![0; own.len() * if self.rank == 0 { 1 } else { 2 }];
        let begin = Instant::now();
        if self.rank == 1 {
            self.tcp.write_all(&own)?;
        }
        self.tcp.read_exact(&mut came)?;
        if self.rank == 0 {
            self.tcp.write_all(&own)?;
            self.tcp.write_all(&came)?;
        }
        let mut sum = from_bytes(&came[..own.len()]);
        let other = if self.rank == 0 { &own[..] } else { &came[own.len()..] };
        sum.iter_mut().zip(from_bytes(other)).for_each(|(sum, other)| *sum += other);
        Ok((begin.elapsed(), sum))
    }
}

fn to_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn from_bytes(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// Measures all operations on all payloads. Returns the rows, and the number of wrong results on
/// this rank.
fn measure(
    groups: [&Group<Cpu>; 2],
    tcp: &TcpStream,
    options: &Options,
) -> Result<(Vec<Row>, usize), Box<dyn Error + Send + Sync>> {
    let (mut rows, mut wrong) = (Vec::new(), 0);
    for &bytes in &options.payloads {
        if options.quick && bytes > 1 << 20 {
            continue;
        }
        let mut rank = Rank::new(groups, tcp.try_clone()?, bytes / size_of::<f32>());
        let (rounds, repeats) =
            if options.quick { (1, 3) } else { (options.rounds, ((4 << 20) / bytes).clamp(1, 100)) };
        for (operation, what) in OPERATIONS.into_iter().enumerate() {
            let mut row = Row { what: what.into(), bytes, rounds: Vec::new() };
            // The first round warms up.
            for round in 0..=rounds {
                let mut seconds = [0.0; 3];
                for turn in 0..3 {
                    let variant = (round + turn) % 3;
                    let mut times = Vec::new();
                    for _ in 0..repeats {
                        let (time, differs) = rank.once(operation, variant)?;
                        times.push(time.as_secs_f64());
                        wrong += usize::from(differs);
                    }
                    seconds[variant] = spread(times)[1];
                }
                if round > 0 {
                    row.rounds.push(seconds);
                }
            }
            rows.push(row);
        }
    }
    Ok((rows, wrong))
}

/// The environment of one of two ranks, with keys or with a token.
fn env(rank: usize, port: u16, keys: Option<&Keys>) -> Result<Env> {
    Env::of(|name| match name {
        "RANK" | "LOCAL_RANK" => Some(rank.to_string()),
        "WORLD_SIZE" | "LOCAL_WORLD_SIZE" => Some("2".into()),
        "SHARDWISE_PORT" => Some(port.to_string()),
        "SHARDWISE_TOKEN" => keys.is_none().then(|| "a token of the bench".into()),
        name => keys?.variable(rank, name),
    })
}

/// Returns a port that was free a moment ago.
fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Runs both ranks.
fn ranks<R: Send>(rank: impl Fn(usize) -> R + Sync) -> Vec<R> {
    thread::scope(|scope| {
        let rank = &rank;
        let started: Vec<_> = (0..2).map(|number| scope.spawn(move || rank(number))).collect();
        started
            .into_iter()
            .map(|rank| rank.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

/// Times jobs of two ranks that do nothing: connecting, and leaving.
fn connect(keys: &Keys, rounds: usize) -> Result<Row, Box<dyn Error>> {
    let mut row = Row { what: "empty job".into(), bytes: 0, rounds: Vec::new() };
    for round in 0..=rounds {
        let mut seconds = [0.0; 3];
        for turn in 0..2 {
            let variant = 1 + (round + turn) % 2;
            let (port, keys) = (free_port()?, (variant == 2).then_some(keys));
            let begin = Instant::now();
            for outcome in ranks(|rank| env(rank, port, keys)?.run(DEADLINE, |_| Ok(()))) {
                outcome?;
            }
            seconds[variant] = begin.elapsed().as_secs_f64();
        }
        if round > 0 {
            row.rounds.push(seconds);
        }
    }
    Ok(row)
}

/// The cost of the audit log.
struct Events {
    /// The mean number of bytes of an event.
    bytes: usize,
    /// The seconds of a `write_all` of as many bytes, and of an event, by round.
    rounds: Vec<[f64; 2]>,
    /// The number of lines that were verified, and the seconds of it.
    verified: (u64, f64),
}

impl Events {
    fn measure(options: &Options) -> Result<Self, Box<dyn Error>> {
        let folder = tempfile::tempdir()?;
        let env = Env::of(|name| match name {
            "RANK" | "LOCAL_RANK" => Some("0".into()),
            "WORLD_SIZE" | "LOCAL_WORLD_SIZE" => Some("1".into()),
            "SHARDWISE_AUDIT_DIR" => Some(folder.path().to_string_lossy().into_owned()),
            _ => None,
        })?;
        let (rounds, lines) = if options.quick { (1, 2000) } else { (options.rounds, 100_000) };
        let mut events = Err("nothing was measured".into());
        env.run(DEADLINE, |_| {
            events = Self::rounds(folder.path(), rounds, lines);
            Ok(())
        })?;
        let mut events = events?;
        let begin = Instant::now();
        let report = audit::verify([folder.path()])?;
        let time = begin.elapsed().as_secs_f64();
        match report.logs() {
            [log] if report.verdict() == Verdict::Intact && log.lines > lines => {
                events.verified = (log.lines, time);
                Ok(events)
            }
            _ => Err(format!("the audit log is not as it was written:\n{report}").into()),
        }
    }

    /// Runs the rounds, and then fills the log up to `lines` lines.
    fn rounds(folder: &Path, rounds: usize, lines: u64) -> Result<Self, Box<dyn Error>> {
        const REPEATS: u64 = 1000;
        let sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";
        let event = |rows| audit::record(&Event::new("data_set").text("sha256", sha256).number("rows", rows));
        let log = fs::read_dir(folder)?.next().ok_or("there is no audit log")??.path();
        let begin = fs::metadata(&log)?.len();
        (0..REPEATS).try_for_each(event)?;
        let line = vec![b'x'; ((fs::metadata(&log)?.len() - begin) / REPEATS) as usize];
        let mut plain = File::options().append(true).create(true).open(folder.join("plain"))?;
        let mut measured = Vec::new();
        for round in 0..rounds {
            let mut seconds = [0.0; 2];
            for turn in 0..2 {
                let variant = (round + turn) % 2;
                let begin = Instant::now();
                match variant {
                    0 => (0..REPEATS).try_for_each(|_| plain.write_all(&line))?,
                    _ => (0..REPEATS).try_for_each(event)?,
                }
                seconds[variant] = begin.elapsed().as_secs_f64() / REPEATS as f64;
            }
            measured.push(seconds);
        }
        let written = REPEATS * (1 + rounds as u64);
        (written..lines).try_for_each(event)?;
        Ok(Self { bytes: line.len(), rounds: measured, verified: (0, 0.0) })
    }

    /// The spread of the seconds of a `write_all`, or of an event.
    fn seconds(&self, variant: usize) -> [f64; 3] {
        spread(self.rounds.iter().map(|round| round[variant]).collect())
    }

    fn print(&self) {
        let [plain, event] = [0, 1].map(|variant| {
            let [least, median, largest] = self.seconds(variant).map(|seconds| seconds * 1e6);
            format!("{median:.2} ({least:.2} to {largest:.2})")
        });
        println!("\n| bytes | `write_all`, us | event of the audit log, us |");
        println!("|---:|---:|---:|");
        println!("| {} | {plain} | {event} |", self.bytes);
        let (lines, seconds) = self.verified;
        println!("verification of {lines} lines: {seconds:.2} s");
        let event = self.seconds(1)[1];
        let met = if event <= EVENT_GOAL { "met" } else { "not met" };
        println!("goal, an event takes at most {} us: {:.2}, {met}", EVENT_GOAL * 1e6, event * 1e6);
    }

    fn json(&self) -> serde_json::Value {
        let (lines, seconds) = self.verified;
        serde_json::json!({
            "what": "audit event", "bytes": self.bytes, "variants": ["write_all", "audit log"], "rounds_s": self.rounds,
            "verified_lines": lines, "verification_s": seconds,
        })
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::parse();
    let keys = Keys::new(2)?;
    let (listener, ports) = (TcpListener::bind("127.0.0.1:0")?, [free_port()?, free_port()?]);
    let address = listener.local_addr()?;
    let measured = ranks(|rank| -> Result<_, Box<dyn Error + Send + Sync>> {
        let tcp = if rank == 0 { listener.accept()?.0 } else { TcpStream::connect(address)? };
        tcp.set_nodelay(true)?;
        tcp.set_read_timeout(Some(DEADLINE))?;
        let mut measured = None;
        env(rank, ports[0], None)?.run(DEADLINE, |token| {
            env(rank, ports[1], Some(&keys))?.run(DEADLINE, |tls| {
                measured = Some(measure([&token, &tls], &tcp, &options));
                Ok(())
            })
        })?;
        measured.ok_or("nothing was measured")?
    });
    let (mut rows, mut wrong) = (Vec::new(), 0);
    for rank in measured {
        let (of_rank, wrong_on_rank) = rank.map_err(|error| error.to_string())?;
        // Rank 0's times.
        if rows.is_empty() {
            rows = of_rank;
        }
        wrong += wrong_on_rank;
    }
    rows.push(connect(&keys, if options.quick { 1 } else { 3 * options.rounds })?);
    println!("| operation | bytes | TCP, us | token, us | TLS, us | TLS / token | TLS / TCP |");
    println!("|---|---:|---:|---:|---:|---:|---:|");
    rows.iter().for_each(Row::print);
    for row in rows.iter().filter(|row| row.bytes == 1 << 20) {
        let ratio = row.ratio(1)[1];
        let met = if ratio <= GOAL { "met" } else { "not met" };
        println!(
            "goal, {} of 1 MiB: TLS takes at most {GOAL} times as long as with a token: {ratio:.2}, {met}",
            row.what
        );
    }
    let events = Events::measure(&options)?;
    events.print();
    if let Some(path) = options.json {
        let rows: Vec<_> = rows.iter().map(Row::json).chain([events.json()]).collect();
        std::fs::write(path, serde_json::to_string_pretty(&rows)?)?;
    }
    if wrong > 0 {
        return Err(format!("{wrong} results have other bits than expected").into());
    }
    Ok(())
}
