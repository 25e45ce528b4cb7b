//! Faults of processes: ranks of `shardwise launch` over sockets, with or without TLS, or with one
//! GPU each over NCCL; and ranks of `mpirun`.
//!
//! This program starts itself as the ranks. The lost rank writes the time of its fault to a file.
//! The bench measures the time from the fault to the end of the job.

use crate::trial::{MOMENTS, OPS, Trial};
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

const FAULTS: [&str; 6] = ["panic", "return", "error", "exit", "-KILL", "-STOP"];
const ABRUPT: [&str; 3] = ["exit", "-KILL", "-STOP"];
/// The time that ranks wait for each other.
const DEADLINE: Duration = Duration::from_secs(1);
/// The limit of the time from the fault to the end of the job. After SIGSTOP, the deadline and a
/// tenth of the deadline are added.
const LIMIT: Duration = Duration::from_secs(1);

/// The program that starts the ranks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Launcher {
    Shardwise,
    /// As `Shardwise`, with TLS.
    Tls,
    /// As `Shardwise`, with a group over NCCL.
    Nccl,
    Mpirun,
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Injects `fault` into this process, after writing the time to `time_file`. Returns true if the
/// program should return.
fn inject(fault: &str, time_file: &Path) -> Result<bool> {
    let time = now().as_nanos().to_string();
    fs::write(time_file, time).map_err(|error| Error::io(time_file, &error))?;
    match fault {
        "panic" => panic!("injected"),
        "return" => Ok(true),
        "error" => Err(Error::Invalid { op: "campaign", reason: "injected".into() }),
        "exit" => std::process::exit(3),
        signal => {
            let _ = Command::new("kill").args([signal, &std::process::id().to_string()]).status();
            // Wait, because the signal takes effect asynchronously.
            std::thread::sleep(Duration::from_secs(5));
            Err(Error::Invalid { op: "campaign", reason: "the signal did nothing".into() })
        }
    }
}

/// A random trial of at most four processes, or of at most eight processes with one GPU each.
fn random_trial(seed: u64, number: u64, over_nccl: bool) -> Trial {
    Trial::random(seed, number, if over_nccl { 8 } else { 4 })
}

/// Runs a rank of a trial.
fn run_rank<B: Pointwise>(trial: &Trial, world: &Group<B>, time_file: &Path) -> Result<()> {
    let fault = FAULTS[trial.fault % FAULTS.len()];
    // Inject abrupt faults at any moment, because they come from outside the program.
    if MOMENTS[trial.moment] == "within" && ABRUPT.contains(&fault) {
        let time_file = time_file.to_path_buf();
        return trial.run_until_fault(world, move || drop(inject(fault, &time_file)));
    }
    trial.run(world, || inject(fault, time_file))
}

/// Runs this process as a rank of a trial.
pub(crate) fn rank(seed: u64, number: u64, time_file: &Path, over_nccl: bool) -> Result<()> {
    let trial = random_trial(seed, number, over_nccl);
    if over_nccl {
        return nccl(&trial, time_file);
    }
    let program = |world: Group<Cpu>| run_rank(&trial, &world, time_file);
    #[cfg(feature = "mpi")]
    if std::env::var_os("SHARDWISE_PORT").is_none() {
        return shardwise::launch::Mpi::new().deadline(DEADLINE).run(program);
    }
    Env::read()?.run(DEADLINE, program)
}

#[cfg(feature = "nccl")]
fn nccl(trial: &Trial, time_file: &Path) -> Result<()> {
    use shardwise::{comm::nccl::Options, device::Cuda};
    let env = Env::read()?;
    let gpu = Cuda::new(env.local_rank)?;
    env.run(DEADLINE, |world| {
        let options = Options { deadline: DEADLINE, ..Options::default() };
        run_rank(trial, &world.over_nccl(&gpu, options)?, time_file)
    })
}

#[cfg(not(feature = "nccl"))]
fn nccl(_: &Trial, _: &Path) -> Result<()> {
    Err(Error::Invalid { op: "campaign", reason: "built without feature `nccl`".into() })
}

fn job(launcher: Launcher, ranks: usize, folder: &Path) -> Command {
    let ranks = ranks.to_string();
    let mut command = match launcher {
        Launcher::Shardwise | Launcher::Tls | Launcher::Nccl => {
            let mut command = Command::new(option_env!("CARGO_BIN_EXE_shardwise").unwrap_or("shardwise"));
            command.arg("launch").args((launcher == Launcher::Tls).then_some("--tls"));
            command.args(["-n", &ranks, "--flight"]).arg(folder).arg("--");
            command
        }
        Launcher::Mpirun => {
            let mut command = Command::new("mpirun");
            command.args(["-n", &ranks]).env("SHARDWISE_FLIGHT_DIR", folder);
            // Open MPI requires these in containers.
            command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
            command.env("OMPI_MCA_rmaps_base_oversubscribe", "1");
            // Do not wait between SIGTERM and SIGKILL after a process has failed. The default wait
            // is a second.
            command.env("OMPI_MCA_odls_base_sigkill_timeout", "0");
            command
        }
    };
    command.env("RUST_BACKTRACE", "0");
    command
}

/// Injects faults. Returns an error if a job did not end in time or named the wrong rank.
pub(crate) fn campaign(launcher: Launcher, trials: u64, seed: u64) -> Result<(), Box<dyn std::error::Error>> {
    let mut times: BTreeMap<&str, Vec<Duration>> = BTreeMap::new();
    let mut wrong = Vec::new();
    for number in 0..trials {
        let trial = random_trial(seed, number, launcher == Launcher::Nccl);
        let fault = FAULTS[trial.fault % FAULTS.len()];
        let folder = tempfile::tempdir()?;
        let time_file = folder.path().join("time_of_fault");
        let mut command = job(launcher, trial.ranks, folder.path());
        command.arg(std::env::current_exe()?);
        command
            .args(["--rank-of", &number.to_string(), "--seed", &seed.to_string(), "--time-file"])
            .arg(&time_file)
            .args((launcher == Launcher::Nccl).then_some("--over-nccl"));
        let output = command.output()?;
        let over = now();
        let text = format!(
            "trial {number}: rank {} of {} was lost {} {} by {fault}",
            trial.culprit, trial.ranks, MOMENTS[trial.moment], OPS[trial.op]
        );
        let said =
            String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        let Ok(time) = fs::read_to_string(&time_file) else {
            wrong.push(format!("{text}, but no fault was injected: {said}"));
            continue;
        };
        let after = over.saturating_sub(Duration::from_nanos(time.parse()?));
        let limit = if fault == "-STOP" { LIMIT + DEADLINE + DEADLINE / 10 } else { LIMIT };
        // mpirun names a rank that was killed or has exited, and ends the other ranks before they
        // can report.
        let by_mpirun = [format!("process rank {} ", trial.culprit), format!(",1],{}]", trial.culprit)];
        let named =
            Record::read_all([folder.path()]).is_ok_and(|records| blame(&records).ranks == [trial.culprit]);
        let named = named || launcher == Launcher::Mpirun && by_mpirun.iter().any(|text| said.contains(text));
        if !named || output.status.success() || after > limit {
            wrong.push(format!("{text}, job over after {after:.2?}: {said}"));
        }
        times.entry(fault).or_default().push(after);
    }
    println!(
        "{launcher:?}: {trials} faults, ranks give up after {DEADLINE:?}; from the fault to the end of the job:"
    );
    for (fault, mut times) in times {
        times.sort_unstable();
        let (median, largest) = (times[times.len() / 2], times[times.len() - 1]);
        println!("    {fault:<7} {:>4} times, median {median:.2?}, largest {largest:.2?}", times.len());
    }
    println!("    late, or the wrong rank named: {}", wrong.len());
    wrong.iter().take(5).for_each(|line| println!("{line}"));
    if wrong.is_empty() {
        Ok(())
    } else {
        Err("a job did not end in time, or the wrong rank was named".into())
    }
}
