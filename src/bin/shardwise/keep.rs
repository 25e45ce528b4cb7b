//! `shardwise keep`: the parent process of the ranks. See `launch.rs`.

use crate::{
    identity::Identities,
    job::{Job, LAST_WORDS},
    output,
    signals::{FORWARDED, name},
    tree,
};
use clap::Args;
use rustix::process::{
    Pid, Signal, WaitOptions, WaitStatus, getpid, getppid, kill_process_group, set_child_subreaper,
    set_parent_process_death_signal, wait,
};
use shardwise::trace::{Blame, Ended, Record, blame};
use signal_hook::{
    consts::signal::{SIGCHLD, SIGUSR1, SIGUSR2},
    iterator::Signals,
};
use std::{
    env,
    ffi::OsString,
    fmt, fs, io,
    io::{Read, Write},
    net::TcpListener,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc::{self, Receiver},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// How long a rank that broke the job, and has left its groups, may take to end before it gets
/// SIGTERM.
const LEAVING: Duration = Duration::from_secs(2);
/// The time between SIGTERM and SIGKILL for the ranks after the launcher has died.
const ORPHANED: Duration = Duration::from_millis(500);
/// The variables of a certificate, which a rank with a listed key cannot have.
const CERTIFICATE: [&str; 3] = ["SHARDWISE_CERTIFICATE", "SHARDWISE_AUTHORITY", "SHARDWISE_NAME"];

enum Event {
    Signal(i32),
    /// The launcher has died.
    LauncherDied,
    /// A step of the output is written.
    Written(Step),
}

/// The steps of the output after the ranks have ended.
#[derive(Clone, Copy, PartialEq)]
enum Step {
    /// The rest of the ranks' output.
    Ranks,
    /// The report on how the ranks ended.
    Report,
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

    /// The exit code, as shells compute it: 128 plus the number of a signal.
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
    /// The signals that the keeper has sent to the rank, except SIGUSR1 and SIGUSR2.
    sent: Vec<Signal>,
}

impl Rank {
    /// Whether a signal from the keeper ended the rank.
    fn was_ended(&self) -> bool {
        self.sent.iter().any(|signal| self.end == Some(End::Signal(signal.as_raw())))
    }

    /// Whether the rank ended before the keeper sent it a signal.
    fn had_gone(&self) -> bool {
        self.end.is_some() && self.sent.is_empty()
    }
}

/// The arguments that the launcher passes to its keeper.
#[derive(Args)]
pub(crate) struct Keep {
    /// A folder for the ranks' keys, and for their records if the job names no folder for them. The
    /// keeper removes it when the ranks have ended.
    #[arg(long)]
    private: Option<PathBuf>,
    #[command(flatten)]
    job: Job,
}

/// The ranks and the state of their shutdown.
struct Ranks {
    ranks: Vec<Rank>,
    /// The job's name in its records, and the folder of the records.
    job: String,
    folder: Option<PathBuf>,
    grace: Duration,
    /// The first rank whose failure the keeper noticed.
    failed: Option<usize>,
    /// When `failed` was set: the ranks that had ended with exit code 0, and the ranks that were
    /// stopped by a signal.
    left: Vec<usize>,
    stopped: Vec<usize>,
    /// The first signal by which the user asked the job to end.
    asked: Option<i32>,
    /// The launcher has died.
    orphaned: bool,
    /// Whether the keeper now waits for the ranks that broke the job to end by themselves.
    waits: bool,
    next: Option<(Instant, Signal)>,
}

impl Ranks {
    fn living(&self) -> impl Iterator<Item = &Rank> {
        self.ranks.iter().filter(|rank| rank.end.is_none())
    }

    /// Whether a signal to the launcher, or the launcher's death, has ended the job.
    fn is_to_end(&self) -> bool {
        self.asked.is_some() || self.orphaned
    }

    fn is_over(&self) -> bool {
        self.living().next().is_none()
    }

    /// Sends a signal to the process groups of the living ranks, except `spared`. A rank's child
    /// processes are in its process group, unless they have left it.
    fn send(&mut self, signal: Signal, spared: &[usize]) {
        for (at, rank) in self.ranks.iter_mut().enumerate() {
            if rank.end.is_none() && !spared.contains(&at) {
                // Ignores errors, because the rank may have ended.
                let _ = kill_process_group(rank.pid, signal);
                if ![Signal::USR1, Signal::USR2].contains(&signal) {
                    rank.sent.push(signal);
                }
            }
        }
    }

    /// Collects ended child processes, and notices the first rank that fails.
    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            // A process that is no rank was started by a rank and lost its parent.
            let Some(at) = self.ranks.iter().position(|rank| rank.pid == pid) else { continue };
            let end = End::of(status);
            self.ranks[at].end = Some(end);
            if end != End::Code(0) && self.failed.is_none() && !self.is_to_end() {
                self.failed = Some(at);
                let all = || self.ranks.iter().enumerate();
                self.left =
                    all().filter(|(_, rank)| rank.end == Some(End::Code(0))).map(|(at, _)| at).collect();
                let stopped = all().filter(|(_, rank)| rank.end.is_none() && tree::is_stopped(rank.pid));
                self.stopped = stopped.map(|(at, _)| at).collect();
                self.schedule(LAST_WORDS, Signal::TERM);
            }
        }
        // If all living ranks are stopped, none can report, so send SIGTERM now.
        let silent = || self.living().all(|rank| tree::is_stopped(rank.pid));
        if matches!(self.next, Some((_, Signal::TERM))) && silent() {
            self.schedule(Duration::ZERO, Signal::TERM);
        }
    }

    fn schedule(&mut self, after: Duration, signal: Signal) {
        // A time too late for an `Instant` never comes, so schedule nothing.
        let Some(at) = Instant::now().checked_add(after) else { return };
        if self.next.is_none_or(|(next, _)| at < next) {
            self.next = Some((at, signal));
        }
    }

    /// Forwards a signal to the ranks. Every signal except SIGUSR1 and SIGUSR2 ends the job.
    fn forward(&mut self, signal: i32) {
        let Some(known) = Signal::from_named_raw(signal) else { return };
        self.send(known, &[]);
        if ![SIGUSR1, SIGUSR2].contains(&signal) {
            self.asked = self.asked.or(Some(signal));
            self.schedule(self.grace, Signal::KILL);
        }
    }

    /// Sends the scheduled signal if it is due.
    fn escalate(&mut self) {
        let Some((_, signal)) = self.next.take_if(|(at, _)| *at <= Instant::now()) else { return };
        if signal != Signal::TERM {
            return self.send(signal, &[]);
        }
        let mut spared: Vec<_> =
            (0..self.ranks.len()).filter(|&rank| self.ranks[rank].sent.contains(&signal)).collect();
        // Ranks that broke the job and are leaving get more time, but not a second time.
        let leaving = if self.failed.is_some() && !self.waits { self.leaving() } else { Vec::new() };
        self.waits = !leaving.is_empty();
        spared.extend(leaving);
        self.send(signal, &spared);
        // A stopped rank does not handle SIGTERM, so it gets SIGKILL at once.
        for rank in self.ranks.iter_mut().filter(|rank| rank.end.is_none() && tree::is_stopped(rank.pid)) {
            let _ = kill_process_group(rank.pid, Signal::KILL);
            rank.sent.push(Signal::KILL);
        }
        if self.waits {
            self.schedule(LEAVING, Signal::TERM);
        } else {
            self.schedule(if self.orphaned { ORPHANED } else { self.grace }, Signal::KILL);
        }
    }

    /// Reads the ranks' records. Skips records that are missing or damaged.
    fn records(&self) -> Vec<Record> {
        let all = || 0..self.ranks.len();
        let paths =
            self.folder.iter().flat_map(|folder| all().map(|rank| Record::path(folder, &self.job, rank)));
        paths.filter_map(|path| Record::read(path).ok()).collect()
    }

    /// Returns the ranks that broke the job and have written their final record. They will end by
    /// themselves, perhaps after all other ranks, and their exit code becomes the job's.
    fn leaving(&self) -> Vec<usize> {
        let records = self.records();
        let culprits = self.blame(&records).map_or(Vec::new(), |blame| blame.ranks);
        let left = records.iter().filter(|record| record.ended != Ended::NotYet);
        left.map(|record| record.rank).filter(|rank| culprits.contains(rank)).collect()
    }

    /// Returns the ranks that broke the job according to the records; none if the records blame no
    /// rank.
    fn blame(&self, records: &[Record]) -> Option<Blame> {
        let mut blame = blame(records);
        blame.ranks.retain(|rank| *rank < self.ranks.len());
        // If ranks without a record are blamed, keeps only the ranks that ended before the keeper
        // signalled them, because a rank that the keeper killed has no record either.
        let gone =
            |rank: &usize| self.ranks[*rank].had_gone() && records.iter().all(|record| record.rank != *rank);
        if blame.ranks.iter().any(gone) {
            blame.ranks.retain(gone);
        }
        (!blame.ranks.is_empty()).then_some(blame)
    }

    /// Returns the report on the job, and the job's exit code.
    fn report(&self) -> (String, u8) {
        let Some(first) = self.failed else { return self.report_without_failure() };
        // The records decide which rank failed first, because the other ranks often end before that
        // rank. Without records, the order of exits decides: ranks that fail before they connect,
        // or that do not use this crate, have no record.
        let blame = self.blame(&self.records());
        let culprits = blame.as_ref().map_or(vec![first], |blame| blame.ranks.clone());
        let who = blame.as_ref().map_or(format!("rank {first}"), Blame::who);
        let end = |rank: usize| self.ranks[rank].end.unwrap_or(End::Code(1));
        let failed = |rank: &usize| end(*rank) != End::Code(0) && !self.ranks[*rank].was_ended();
        // The job ends like the first culprit that failed by itself. If all culprits ended with
        // code 0 or by a signal of the keeper, the job ends like the first rank that failed.
        let decisive = culprits.iter().copied().find(failed).unwrap_or(first);

        let mut lines = Vec::new();
        lines.push(match culprits[..] {
            [rank] if self.ranks[rank].was_ended() => {
                format!("{who} failed first: {}, sent by the launcher", end(rank))
            }
            [rank] => format!("{who} failed first: {}", end(rank)),
            _ => format!("{who} failed first"),
        });
        if culprits != [decisive] {
            lines.push(format!("the job ends like rank {decisive}: {}", end(decisive)));
        }
        if let Some(blame) = blame {
            lines.push(format!("by the ranks' records: {}", blame.reason));
            lines.extend(blame.waited);
        }
        if !self.left.is_empty() {
            lines.push(format!("ranks {:?} had ended before, with exit code 0", self.left));
        }
        if !self.stopped.is_empty() {
            lines.push(format!("ranks {:?} were stopped by a signal", self.stopped));
        }
        (lines.iter().map(|line| format!("shardwise: {line}\n")).collect(), end(decisive).code())
    }

    fn report_without_failure(&self) -> (String, u8) {
        let Some(signal) = self.asked else { return (String::new(), 0) };
        // If all ranks handled the signal and ended with code 0, the job's exit code is 0 too.
        let well = self.ranks.iter().all(|rank| rank.end == Some(End::Code(0)));
        let code = if well { 0 } else { End::Signal(signal).code() };
        (format!("shardwise: ended by {}\n", name(signal)), code)
    }
}

pub(crate) fn keep(Keep { private, job }: &Keep) -> io::Result<u8> {
    set_child_subreaper(Some(getpid()))?;
    let (events, news) = mpsc::channel();
    let mut signals = Signals::new(FORWARDED.iter().chain(&[SIGCHLD]))?;
    let sender = events.clone();
    thread::spawn(move || signals.forever().try_for_each(|signal| sender.send(Event::Signal(signal))));
    let sender = events.clone();
    thread::spawn(move || {
        // The launcher never writes to this pipe, so the read returns when the launcher ends.
        let _ = io::stdin().lock().read_to_end(&mut Vec::new());
        let _ = sender.send(Event::LauncherDied);
    });

    // A random id, so that no earlier job with records in the same folder has the same name.
    let id = random::<8>()?;
    let mut ranks = Ranks {
        ranks: Vec::new(),
        // The id and the epoch, as the ranks name their job.
        job: format!("{id}.0"),
        folder: job.records().or_else(|| private.as_ref().map(|folder| folder.join("records"))),
        grace: job.grace,
        failed: None,
        left: Vec::new(),
        stopped: Vec::new(),
        asked: None,
        orphaned: false,
        waits: false,
        next: None,
    };
    let mut outputs = Vec::new();
    let started = identities(job, &id, private.as_deref())
        .and_then(|identities| start(job, &id, identities.as_ref(), &mut ranks, &mut outputs));
    if started.is_ok() {
        while !ranks.is_over() {
            match next(&news, ranks.next.map(|(at, _)| at)) {
                Some(Event::Signal(SIGCHLD)) => ranks.reap(),
                Some(Event::Signal(signal)) => ranks.forward(signal),
                Some(Event::LauncherDied) => {
                    ranks.orphaned = true;
                    ranks.send(Signal::TERM, &[]);
                    ranks.schedule(ORPHANED, Signal::KILL);
                }
                Some(Event::Written(_)) | None => {}
            }
            ranks.escalate();
        }
    }
    // Processes that the ranks left behind would keep the ranks' output open.
    tree::kill_descendants();
    let (words, code) = match started {
        Ok(()) => ranks.report(),
        Err(error) => (format!("shardwise: {error}\n"), 1),
    };
    let over = Instant::now().checked_add(job.grace);
    let mut limit = over.filter(|_| ranks.is_to_end());
    // The launcher removes the folder as well, in case this process is killed.
    private.iter().for_each(|folder| drop(fs::remove_dir_all(folder)));
    let (copied, said) = (events.clone(), events);
    thread::spawn(move || {
        outputs.into_iter().for_each(|output| drop(output.join()));
        copied.send(Event::Written(Step::Ranks))
    });
    wait_for_reader(&news, Step::Ranks, &mut limit, job.grace);
    thread::spawn(move || {
        // Ignores errors, because the reader may be gone.
        let _ = io::stderr().write_all(words.as_bytes());
        said.send(Event::Written(Step::Report))
    });
    wait_for_reader(&news, Step::Report, &mut limit, job.grace);
    Ok(code)
}

/// Returns the next event; none if it does not come before `limit`, or within an hour.
fn next(news: &Receiver<Event>, limit: Option<Instant>) -> Option<Event> {
    let patience = limit.map_or(Duration::from_secs(3600), |limit| limit - Instant::now());
    news.recv_timeout(patience).ok()
}

/// Waits until a step of the output is written, for as long as the reader of the output takes.
/// After a signal to the launcher, or the launcher's death, has ended the job, it waits at most
/// until `limit`.
fn wait_for_reader(news: &Receiver<Event>, step: Step, limit: &mut Option<Instant>, grace: Duration) {
    *limit = limit.map(|limit| limit.max(Instant::now() + LAST_WORDS));
    while limit.is_none_or(|limit| limit > Instant::now()) {
        match next(news, *limit) {
            Some(Event::Written(done)) if done == step => return,
            Some(Event::Signal(SIGCHLD | SIGUSR1 | SIGUSR2) | Event::Written(_)) | None => {}
            Some(Event::Signal(_) | Event::LauncherDied) => {
                *limit = limit.or_else(|| Instant::now().checked_add(grace));
            }
        }
    }
}

/// Makes the ranks' keys in the private folder, if the job uses TLS.
fn identities(job: &Job, id: &str, private: Option<&Path>) -> io::Result<Option<Identities>> {
    if !job.tls {
        return Ok(None);
    }
    let folder = private.ok_or_else(|| io::Error::other("the launcher has named no folder for keys"))?;
    let identities = Identities::write(folder.join("keys"), id, job.ranks as usize);
    identities.map(Some).map_err(io::Error::other)
}

fn start(
    job: &Job,
    id: &str,
    identities: Option<&Identities>,
    ranks: &mut Ranks,
    outputs: &mut Vec<JoinHandle<()>>,
) -> io::Result<()> {
    let (port, master) = free_ports()?;
    let token = random::<32>()?;
    let keeper = getpid().as_raw_nonzero().to_string();
    for rank in 0..job.ranks as usize {
        let mut command = Command::new(env::current_exe()?);
        command.args(["become", &keeper, "--"]).args(&job.program);
        let (number, world) = (rank.to_string(), job.ranks.to_string());
        command.envs([("RANK", &number), ("LOCAL_RANK", &number)]);
        command.envs([("WORLD_SIZE", &world), ("LOCAL_WORLD_SIZE", &world)]);
        command.envs([("MASTER_ADDR", "127.0.0.1"), ("TORCHELASTIC_RESTART_COUNT", "0")]);
        command.envs([("MASTER_PORT", master.to_string()), ("SHARDWISE_PORT", port.to_string())]);
        command.envs([("SHARDWISE_TOKEN", token.as_str()), ("TORCHELASTIC_RUN_ID", id)]);
        // The keeper finds the ranks' records by the job's name.
        command.env_remove("SHARDWISE_JOB");
        command.envs(ranks.folder.iter().map(|folder| ("SHARDWISE_FLIGHT_DIR", folder)));
        if let Some(identities) = identities {
            command.envs(identities.variables(rank));
            for variable in CERTIFICATE {
                command.env_remove(variable);
            }
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.process_group(0).spawn()?;
        ranks.ranks.push(Rank { pid: Pid::from_child(&child), end: None, sent: Vec::new() });
        outputs.extend(child.stdout.take().map(|from| output::copy(rank, from, io::stdout())).transpose()?);
        outputs.extend(child.stderr.take().map(|from| output::copy(rank, from, io::stderr())).transpose()?);
    }
    Ok(())
}

/// Returns random bytes as hexadecimal digits.
fn random<const BYTES: usize>() -> io::Result<String> {
    let mut bytes = [0; BYTES];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Returns two ports that are free now. Another process may take them before a rank does.
fn free_ports() -> io::Result<(u16, u16)> {
    let listeners = (TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?);
    Ok((listeners.0.local_addr()?.port(), listeners.1.local_addr()?.port()))
}

/// The arguments of `become`: the keeper's process id and a rank's program.
#[derive(Args)]
pub(crate) struct Become {
    keeper: i32,
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    program: Vec<OsString>,
}

impl Become {
    /// Asks the kernel to kill this process when the keeper dies, then replaces the process with
    /// the program.
    pub(crate) fn run(&self) -> io::Result<u8> {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // If the keeper died before this process asked, the kernel will not kill this process. So
        // this process ends now.
        if getppid() != Pid::from_raw(self.keeper) {
            return Ok(1);
        }
        let error = Command::new(&self.program[0]).args(&self.program[1..]).exec();
        eprintln!("cannot start {}: {error}", self.program[0].display());
        Ok(127)
    }
}
