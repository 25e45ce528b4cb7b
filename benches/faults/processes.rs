//! Faults on processes: ranks of `shardwise launch` that meet over sockets, or each have a GPU, over NCCL; and ranks of `mpirun`.
//!
//! This program starts itself as the ranks. The rank that is lost writes down when; the time from then to the end of the job
//! counts.

use crate::trial::{OPS, Trial, WHENS};
use shardwise::{
    Error, Result,
    comm::Group,
    device::Cpu,
    kernels::Pointwise,
    launch::Env,
    trace::{Record, blame},
};
use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::Command,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

const HOWS: [&str; 6] = ["panic", "return", "error", "exit", "-KILL", "-STOP"];
const ABRUPT: [&str; 3] = ["exit", "-KILL", "-STOP"];
/// How long ranks wait for each other.
const DEADLINE: Duration = Duration::from_secs(1);
/// What the job has to be over within, from the fault on; after SIGSTOP, from the deadline and a tenth of it on.
const LIMIT: Duration = Duration::from_secs(1);

/// What starts the ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Launcher {
    Shardwise,
    /// As that, and the group is one of NCCL's.
    Nccl,
    Mpirun,
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Loses this process in the way `how`. Returns true if its program is to return.
fn strike(how: &str, struck: &Path) -> Result<bool> {
    let time = now().as_nanos().to_string();
    fs::write(struck, time).map_err(|error| Error::io(struck, &error))?;
    match how {
        "panic" => panic!("injected"),
        "return" => Ok(true),
        "error" => Err(Error::Invalid { op: "campaign", reason: "injected".into() }),
        "exit" => std::process::exit(3),
        signal => {
            let _ = Command::new("kill").args([signal, &std::process::id().to_string()]).status();
            // It takes effect when it does.
            std::thread::sleep(Duration::from_secs(5));
            Err(Error::Invalid { op: "campaign", reason: "the signal did nothing".into() })
        }
    }
}

/// A trial of at most four processes, or eight with a GPU each.
fn draw(seed: u64, number: u64, over_nccl: bool) -> Trial {
    Trial::draw(seed, number, if over_nccl { 8 } else { 4 })
}

/// A rank's part of a trial.
fn play<B: Pointwise>(trial: &Trial, world: &Group<B>, struck: &Path) -> Result<()> {
    let how = HOWS[trial.how % HOWS.len()];
    // What comes from outside comes at any moment.
    if WHENS[trial.when] == "within" && ABRUPT.contains(&how) {
        let struck = struck.to_path_buf();
        return trial.storm(world, move || drop(strike(how, &struck)));
    }
    trial.run(world, || strike(how, struck))
}

/// This process is a rank of a trial, `over_nccl` if so.
pub(crate) fn rank(seed: u64, number: u64, struck: &Path, over_nccl: bool) -> Result<()> {
    let trial = draw(seed, number, over_nccl);
    if over_nccl {
        return nccl(&trial, struck);
    }
    let program = |world: Group<Cpu>| play(&trial, &world, struck);
    #[cfg(feature = "mpi")]
    if std::env::var_os("SHARDWISE_PORT").is_none() {
        return shardwise::launch::Mpi::new().deadline(DEADLINE).run(program);
    }
    Env::read()?.run(DEADLINE, program)
}

#[cfg(feature = "nccl")]
fn nccl(trial: &Trial, struck: &Path) -> Result<()> {
    use shardwise::{comm::nccl::Options, device::Cuda};
    let env = Env::read()?;
    let gpu = Cuda::new(env.local_rank)?;
    env.run(DEADLINE, |world| {
        let options = Options { deadline: DEADLINE, ..Options::default() };
        play(trial, &world.over_nccl(&gpu, options)?, struck)
    })
}

#[cfg(not(feature = "nccl"))]
fn nccl(_: &Trial, _: &Path) -> Result<()> {
    Err(Error::Invalid { op: "campaign", reason: "built without feature `nccl`".into() })
}

fn job(launcher: Launcher, ranks: usize, folder: &Path) -> Command {
    let ranks = ranks.to_string();
    let mut command = match launcher {
        Launcher::Shardwise | Launcher::Nccl => {
            let mut command = Command::new(option_env!("CARGO_BIN_EXE_shardwise").unwrap_or("shardwise"));
            command.args(["launch", "-n", &ranks, "--flight"]).arg(folder).arg("--");
            command
        }
        Launcher::Mpirun => {
            let mut command = Command::new("mpirun");
            command.args(["-n", &ranks]).env("SHARDWISE_FLIGHT_DIR", folder);
            // What Open MPI asks for in containers.
            command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
            command.env("OMPI_MCA_rmaps_base_oversubscribe", "1");
            // Not the second that it waits by default between SIGTERM and SIGKILL when a process has failed.
            command.env("OMPI_MCA_odls_base_sigkill_timeout", "0");
            command
        }
    };
    command.env("RUST_BACKTRACE", "0");
    command
}

/// Injects faults; `Err` if a job went on for too long or the wrong rank was named.
pub(crate) fn campaign(launcher: Launcher, trials: u64, seed: u64) -> Result<(), Box<dyn std::error::Error>> {
    let mut times: BTreeMap<&str, Vec<Duration>> = BTreeMap::new();
    let mut wrong = Vec::new();
    for number in 0..trials {
        let trial = draw(seed, number, launcher == Launcher::Nccl);
        let how = HOWS[trial.how % HOWS.len()];
        let folder = tempfile::tempdir()?;
        let struck = folder.path().join("struck");
        let mut command = job(launcher, trial.ranks, folder.path());
        command.arg(std::env::current_exe()?);
        command
            .args(["--rank-of", &number.to_string(), "--seed", &seed.to_string(), "--struck"])
            .arg(&struck)
            .args((launcher == Launcher::Nccl).then_some("--over-nccl"));
        let output = command.output()?;
        let over = now();
        let words = format!(
            "trial {number}: rank {} of {} was lost {} {} by {how}",
            trial.culprit, trial.ranks, WHENS[trial.when], OPS[trial.op]
        );
        let said =
            String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        let Ok(time) = fs::read_to_string(&struck) else {
            wrong.push(format!("{words}, but nobody struck: {said}"));
            continue;
        };
        let after = over.saturating_sub(Duration::from_nanos(time.parse()?));
        let limit = if how == "-STOP" { LIMIT + DEADLINE + DEADLINE / 10 } else { LIMIT };
        // mpirun ends the other ranks of one that was killed or has exited before they can say anything, and names it.
        let by_mpirun = [format!("process rank {} ", trial.culprit), format!(",1],{}]", trial.culprit)];
        let named =
            Record::read_all([folder.path()]).is_ok_and(|records| blame(&records).ranks == [trial.culprit]);
        let named =
            named || launcher == Launcher::Mpirun && by_mpirun.iter().any(|words| said.contains(words));
        if !named || output.status.success() || after > limit {
            wrong.push(format!("{words}, job over after {after:.2?}: {said}"));
        }
        times.entry(how).or_default().push(after);
    }
    println!(
        "{launcher:?}: {trials} faults, ranks give up after {DEADLINE:?}; from the fault to the end of the job:"
    );
    for (how, mut times) in times {
        times.sort_unstable();
        let (median, largest) = (times[times.len() / 2], times[times.len() - 1]);
        println!("    {how:<7} {:>4} times, median {median:.2?}, largest {largest:.2?}", times.len());
    }
    println!("    late, or the wrong rank named: {}", wrong.len());
    wrong.iter().take(5).for_each(|line| println!("{line}"));
    if wrong.is_empty() { Ok(()) } else { Err("a job went on, or the wrong rank was named".into()) }
}
