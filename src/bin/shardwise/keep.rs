//! `shardwise keep`: the process whose children the ranks are. See `launch.rs`.

use crate::{
    launch::{FORWARDED, Job, name},
    output, tree,
};
use clap::Args;
use rustix::process::{
    Pid, Signal, WaitOptions, WaitStatus, getpid, getppid, kill_process_group, set_child_subreaper,
    set_parent_process_death_signal, wait,
};
use shardwise::trace::{Record, blame};
use signal_hook::{
    consts::signal::{SIGCHLD, SIGUSR1, SIGUSR2},
    iterator::Signals,
};
use std::{
    env,
    ffi::OsString,
    fmt, io,
    io::Read,
    net::TcpListener,
    os::unix::process::CommandExt,
    process::{Command, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// What the other ranks have, when one has failed, to say what they know of it.
const LAST_WORDS: Duration = Duration::from_millis(300);
/// What ranks have to end when the launcher was killed.
const ORPHANED: Duration = Duration::from_millis(500);

enum Event {
    Signal(i32),
    /// The launcher has died.
    Alone,
}

/// How a process ended.
#[derive(Clone, Copy, PartialEq)]
enum End {
    Code(u8),
    Signal(i32),
}

impl End {
    fn of(status: WaitStatus) -> Self {
        match status.terminating_signal() {
            Some(signal) => Self::Signal(signal),
            None => Self::Code(status.exit_status().unwrap_or(1) as u8),
        }
    }

    /// As shells count.
    fn code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal as u8,
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "killed by {}", name(*signal)),
        }
    }
}

struct Rank {
    pid: Pid,
    end: Option<End>,
}

/// The ranks, and how far their end has come.
struct Ranks {
    ranks: Vec<Rank>,
    grace: Duration,
    /// The first that failed.
    failed: Option<usize>,
    /// Those that had ended well before, and those that were stopped then.
    left: Vec<usize>,
    stopped: Vec<usize>,
    /// The signal by which the user ended the job.
    asked: Option<i32>,
    next: Option<(Instant, Signal)>,
}

impl Ranks {
    fn living(&self) -> impl Iterator<Item = &Rank> {
        self.ranks.iter().filter(|rank| rank.end.is_none())
    }

    fn is_over(&self) -> bool {
        self.living().next().is_none()
    }

    /// Signals all living ranks, and what they have started, as far as it is in their groups.
    fn send(&self, signal: Signal) {
        for rank in self.living() {
            // It may have ended.
            let _ = kill_process_group(rank.pid, signal);
        }
    }

    /// Takes notice of the ended children.
    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            // Who is no rank was started by one, and lost its parent.
            let Some(at) = self.ranks.iter().position(|rank| rank.pid == pid) else { continue };
            let end = End::of(status);
            self.ranks[at].end = Some(end);
            if end != End::Code(0) && self.failed.is_none() && self.asked.is_none() {
                self.failed = Some(at);
                let all = || self.ranks.iter().enumerate();
                self.left =
                    all().filter(|(_, rank)| rank.end == Some(End::Code(0))).map(|(at, _)| at).collect();
                let stopped = all().filter(|(_, rank)| rank.end.is_none() && tree::is_stopped(rank.pid));
                self.stopped = stopped.map(|(at, _)| at).collect();
                self.schedule(LAST_WORDS, Signal::TERM);
            }
        }
        // Who is stopped has no last words.
        let silent = || self.living().all(|rank| tree::is_stopped(rank.pid));
        if matches!(self.next, Some((_, Signal::TERM))) && silent() {
            self.schedule(Duration::ZERO, Signal::TERM);
        }
    }

    fn schedule(&mut self, after: Duration, signal: Signal) {
        // What is too far away never comes.
        let Some(at) = Instant::now().checked_add(after) else { return };
        if self.next.is_none_or(|(next, _)| at < next) {
            self.next = Some((at, signal));
        }
    }

    /// Hands a signal on.
    fn forward(&mut self, signal: i32) {
        let Some(known) = Signal::from_named_raw(signal) else { return };
        self.send(known);
        if ![SIGUSR1, SIGUSR2].contains(&signal) {
            self.asked = self.asked.or(Some(signal));
            self.schedule(self.grace, Signal::KILL);
        }
    }

    /// Does what is due.
    fn escalate(&mut self) {
        let Some((_, signal)) = self.next.take_if(|(at, _)| *at <= Instant::now()) else { return };
        self.send(signal);
        if signal == Signal::TERM {
            // Who is stopped cannot end by itself.
            for rank in self.living().filter(|rank| tree::is_stopped(rank.pid)) {
                let _ = kill_process_group(rank.pid, Signal::KILL);
            }
            self.schedule(self.grace, Signal::KILL);
        }
    }

    /// Says what became of the job, and returns its exit code.
    fn report(&self) -> u8 {
        if let Some(end) = self.failed.and_then(|at| self.ranks[at].end) {
            eprintln!("shardwise: rank {} failed first: {end}", self.failed.unwrap_or_default());
            if !self.left.is_empty() {
                eprintln!("shardwise: ranks {:?} had ended before, with exit code 0", self.left);
            }
            if !self.stopped.is_empty() {
                eprintln!("shardwise: ranks {:?} were stopped by a signal", self.stopped);
            }
            return end.code();
        }
        let Some(signal) = self.asked else { return 0 };
        eprintln!("shardwise: ended by {}", name(signal));
        // Ranks that took the signal for a request, and ended well, have done what was asked.
        if self.ranks.iter().all(|rank| rank.end == Some(End::Code(0))) {
            0
        } else {
            End::Signal(signal).code()
        }
    }
}

pub(crate) fn keep(job: &Job) -> io::Result<u8> {
    set_child_subreaper(Some(getpid()))?;
    let (events, news) = mpsc::channel();
    let mut signals = Signals::new(FORWARDED.iter().chain(&[SIGCHLD]))?;
    let sender = events.clone();
    thread::spawn(move || signals.forever().try_for_each(|signal| sender.send(Event::Signal(signal))));
    thread::spawn(move || {
        // Nobody writes: this ends when the launcher does.
        let _ = io::stdin().lock().read_to_end(&mut Vec::new());
        let _ = events.send(Event::Alone);
    });

    let mut ranks = Ranks {
        ranks: Vec::new(),
        grace: job.grace,
        failed: None,
        left: Vec::new(),
        stopped: Vec::new(),
        asked: None,
        next: None,
    };
    let mut outputs = Vec::new();
    let started = start(job, &mut ranks.ranks, &mut outputs);
    if started.is_ok() {
        while !ranks.is_over() {
            let patience = ranks.next.map_or(Duration::from_secs(3600), |(at, _)| at - Instant::now());
            match news.recv_timeout(patience) {
                Ok(Event::Signal(SIGCHLD)) => ranks.reap(),
                Ok(Event::Signal(signal)) => ranks.forward(signal),
                Ok(Event::Alone) => {
                    ranks.send(Signal::TERM);
                    ranks.schedule(ORPHANED, Signal::KILL);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(io::Error::other("no more events")),
            }
            ranks.escalate();
        }
    }
    // What the ranks have left behind, if anything, keeps their output open, too.
    tree::kill_descendants();
    outputs.into_iter().for_each(|output| drop(output.join()));
    started?;
    let code = ranks.report();
    if let (Some(_), Some(folder)) = (ranks.failed, &job.flight)
        && let Ok(records) = Record::read_all([folder])
        && records[0].job.starts_with(&format!("{}.", getpid().as_raw_nonzero()))
    {
        eprintln!("shardwise: by the ranks' records, {}", blame(&records));
    }
    Ok(code)
}

fn start(job: &Job, ranks: &mut Vec<Rank>, outputs: &mut Vec<JoinHandle<()>>) -> io::Result<()> {
    let (port, master) = free_ports()?;
    let mut secret = [0; 32];
    getrandom::fill(&mut secret).map_err(|error| io::Error::other(error.to_string()))?;
    let token: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
    let keeper = getpid().as_raw_nonzero().to_string();
    for rank in 0..job.ranks as usize {
        let mut command = Command::new(env::current_exe()?);
        command.args(["become", &keeper, "--"]).args(&job.program);
        let (number, world) = (rank.to_string(), job.ranks.to_string());
        command.envs([("RANK", &number), ("LOCAL_RANK", &number)]);
        command.envs([("WORLD_SIZE", &world), ("LOCAL_WORLD_SIZE", &world)]);
        command.envs([("MASTER_ADDR", "127.0.0.1"), ("TORCHELASTIC_RESTART_COUNT", "0")]);
        command.envs([("MASTER_PORT", master.to_string()), ("SHARDWISE_PORT", port.to_string())]);
        command.envs([("SHARDWISE_TOKEN", &token), ("TORCHELASTIC_RUN_ID", &keeper)]);
        command.envs(job.flight.iter().map(|folder| ("SHARDWISE_FLIGHT_DIR", folder)));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.process_group(0).spawn()?;
        ranks.push(Rank { pid: Pid::from_child(&child), end: None });
        outputs.extend(child.stdout.take().map(|from| output::copy(rank, from, io::stdout())).transpose()?);
        outputs.extend(child.stderr.take().map(|from| output::copy(rank, from, io::stderr())).transpose()?);
    }
    Ok(())
}

/// Two ports that were free a moment ago.
fn free_ports() -> io::Result<(u16, u16)> {
    let listeners = (TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?);
    Ok((listeners.0.local_addr()?.port(), listeners.1.local_addr()?.port()))
}

/// A rank's program, not yet running.
#[derive(Args)]
pub(crate) struct Become {
    keeper: i32,
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    program: Vec<OsString>,
}

impl Become {
    /// Sees to it that the kernel kills this process when the keeper dies, and becomes the program.
    pub(crate) fn run(&self) -> io::Result<u8> {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The keeper may have died before.
        if getppid() != Pid::from_raw(self.keeper) {
            return Ok(1);
        }
        let error = Command::new(&self.program[0]).args(&self.program[1..]).exec();
        eprintln!("cannot start {}: {error}", self.program[0].display());
        Ok(127)
    }
}
