//! Runs plans on this machine, and adds the times to the machine's file.

use super::Report;
use crate::host::Host;
use serde::Serialize;
use shardwise::{
    Error, Result,
    launch::Threads,
    plan::{
        Job, Machine, Plan, Run, Strategy, Transport, parts,
        text::{bytes, time},
        time_steps,
    },
};
use std::{
    fs,
    io::{self, Write},
    num::NonZeroUsize,
    path::{Path, PathBuf},
    time::Duration,
};
use tempfile::NamedTempFile;

const OP: &str = "plan --try";

/// The steps of which the median is measured.
const STEPS: usize = 5;

/// The runs that a machine's file keeps.
const KEPT: usize = 64;

/// How long a rank on the CPU waits in a collective. A rank that fails is noticed at once, but a
/// pass of a large model may take minutes.
const DEADLINE: Duration = Duration::from_secs(3600);

/// A plan that was run. Times are seconds of a step.
#[derive(Serialize)]
pub(super) struct Trial {
    strategy: Strategy,
    predicted: f64,
    /// The median of the steps.
    measured: f64,
    /// `predicted / measured` − 1.
    error: f64,
    /// Whether it took the least time.
    pub(super) won: bool,
}

/// Checks that plans for the machine can be run here, and that runs can be added to its file.
pub(super) fn check(name: &str, machine: &Machine) -> Result<()> {
    let unsupported = |reason: &str| Err(Error::Unsupported { op: OP, reason: reason.into() });
    match machine.transport {
        None => {
            let reason = format!(
                "`--try` runs thread ranks on this CPU, and {name} has published rates: write a machine file with \
                 `shardwise measure`"
            );
            return Err(Error::invalid(OP, reason));
        }
        Some(Transport::Threads) => {}
        Some(Transport::Nccl) if cfg!(feature = "nccl") => {}
        Some(Transport::Nccl) => {
            return unsupported("ranks on GPUs: build this program with `--features cli,nccl`");
        }
        Some(transport) => {
            return unsupported(&format!(
                "ranks over {transport:?}: measure thread ranks with `shardwise measure`"
            ));
        }
    }
    folder(Path::new(name)).and_then(NamedTempFile::new_in).map_err(|error| {
        let reason = format!("runs are added to {name}, but its folder cannot be written: {error}");
        Error::invalid(OP, reason)
    })?;
    let Machine { ranks, ranks_per_node, .. } = *machine;
    if ranks > ranks_per_node {
        let reason = format!(
            "all ranks run on this machine, but there are {ranks} and a node has {ranks_per_node}: use `--ranks \
             {ranks_per_node}`"
        );
        return Err(Error::invalid(OP, reason));
    }
    Ok(())
}

/// Runs the best `count` plans. After each, adds the run to the machine's file and passes a line
/// about it to `show`.
pub(super) fn run(
    job: &Job,
    report: &Report,
    file: &Path,
    count: usize,
    mut show: impl FnMut(&str) -> io::Result<()>,
) -> io::Result<Vec<Trial>> {
    if report.best.is_empty() {
        return Ok(Vec::new());
    }
    show("\nTried with random weights:")?;
    let mut trials: Vec<Trial> = Vec::new();
    for (at, plan) in report.best.iter().take(count).enumerate() {
        let Plan { strategy, seconds: predicted, .. } = *plan;
        let failed = |error| io::Error::other(format!("plan {} ({strategy}): {error}", at + 1));
        if report.machine.transport == Some(Transport::Threads) {
            has_memory(plan).map_err(failed)?;
        }
        let measured = measure(job, &report.machine, plan).map_err(failed)?;
        let parts = parts(job, &report.machine, &strategy).map_err(failed)?;
        let error = predicted / measured - 1.0;
        show(&format!(
            "{:>3}  predicted {:>8}  measured {:>8}  error {:>+6.1}%",
            at + 1,
            time(predicted),
            time(measured),
            100.0 * error
        ))?;
        add(file, &report.machine, Run::new(report.what(&strategy), &job.goal, parts, measured))?;
        trials.push(Trial { strategy, predicted, measured, error, won: false });
    }
    let fastest =
        (0..trials.len()).min_by(|&one, &other| trials[one].measured.total_cmp(&trials[other].measured));
    if let Some(fastest) = fastest {
        trials[fastest].won = true;
        show(&format!(
            "Plan {} won. {} has the runs, which calibrate later predictions.",
            fastest + 1,
            file.display()
        ))?;
    }
    Ok(trials)
}

/// Checks that the memory of all ranks of a plan is available on this machine. Without it, the
/// operating system may end other programs.
fn has_memory(plan: &Plan) -> Result<()> {
    let replicas = (plan.strategy.data * plan.strategy.tensor) as u64;
    let of_ranks = plan.ranks.iter().map(|rank| rank.memory.total().saturating_mul(replicas));
    let needed = of_ranks.fold(0, u64::saturating_add);
    let available = Host::new().available();
    // 0 if unknown.
    if available > 0 && needed > available {
        let (needed, available) = (bytes(needed), bytes(available));
        let reason =
            format!("its ranks hold {needed} together, but only {available} of this machine are available");
        return Err(Error::invalid(OP, reason));
    }
    Ok(())
}

/// Runs steps of a plan and returns the median of their seconds.
fn measure(job: &Job, machine: &Machine, plan: &Plan) -> Result<f64> {
    let ranks = plan.strategy.ranks();
    let of_ranks = match machine.transport {
        #[cfg(feature = "nccl")]
        Some(Transport::Nccl) => {
            crate::gpus::run(ranks, |world| time_steps(world, job, &plan.strategy, STEPS))
        }
        _ => Threads::new(ranks)
            .deadline(DEADLINE)
            .gemm_threads(NonZeroUsize::new(plan.threads).unwrap_or(NonZeroUsize::MIN))
            .run(|world| time_steps(&world, job, &plan.strategy, STEPS)),
    };
    // Equal on all ranks.
    let mut seconds = of_ranks?.swap_remove(0);
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}

/// Adds a run to the file of the machine that was planned, and removes its oldest run if there are
/// too many. The file is replaced as a whole.
fn add(file: &Path, planned: &Machine, run: Run) -> io::Result<()> {
    let mut machine = Machine::read(file).map_err(io::Error::other)?;
    let runs = std::mem::replace(&mut machine.runs, planned.runs.clone());
    // Fewer ranks may be planned than the machine has.
    if machine.clone().with_ranks(planned.ranks) != *planned {
        let reason = format!("{}: the file has another machine than that of the plans", file.display());
        return Err(io::Error::other(reason));
    }
    machine.runs = runs;
    machine.runs.push(run);
    let old = machine.runs.len().saturating_sub(KEPT);
    machine.runs.drain(..old);
    let text = machine.to_json().map_err(io::Error::other)?;
    replace(file, &text).map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", file.display())))
}

/// The folder of a file, or of the file to which a link refers.
fn folder(path: &Path) -> io::Result<PathBuf> {
    let path = path.canonicalize()?;
    Ok(path.parent().unwrap_or(Path::new(".")).into())
}

/// Writes a file in the folder of `path`, and gives it the name of `path`.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let mut file = NamedTempFile::new_in(folder(path)?)?;
    // A link stays a link.
    let path = path.canonicalize()?;
    file.write_all(text.as_bytes())?;
    file.as_file().set_permissions(fs::metadata(&path)?.permissions())?;
    file.as_file().sync_all()?;
    file.persist(&path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{super::tests::report, *};
    use shardwise::{
        device::DType,
        models::DecoderConfig,
        plan::Goal,
        prelude::{Activation, AttentionConfig, BlockConfig, NormKind},
    };

    #[test]
    #[cfg(unix)]
    fn a_file_keeps_the_last_runs() {
        let folder = tempfile::tempdir().unwrap();
        let [file, link] = ["machine.json", "link.json"].map(|name| folder.path().join(name));
        let mut machine = Machine::preset("h200").unwrap();
        let text = r#"{"operations": 1.0, "memory": 0.1, "transfers": 0.0}"#;
        let run = |at: usize| {
            Run::new(
                at.to_string(),
                &Goal::Train { batch: 1, tokens: 1 },
                serde_json::from_str(text).unwrap(),
                1.5,
            )
        };
        machine.runs = (0..KEPT).map(run).collect();
        fs::write(&file, machine.to_json().unwrap()).unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        add(&link, &machine, run(KEPT)).unwrap();
        machine.runs = (1..=KEPT).map(run).collect();
        assert_eq!(Machine::read(&file).unwrap(), machine);
        assert!(link.is_symlink() && fs::read_dir(folder.path()).unwrap().count() == 2);
        let error = add(&folder.path().join("absent.json"), &machine, run(0)).unwrap_err().to_string();
        assert!(error.contains("absent.json"), "{error}");
        machine.error = 0.5;
        let error = add(&file, &machine, run(0)).unwrap_err().to_string();
        assert!(error.contains("another machine than that of the plans"), "{error}");
    }

    #[test]
    fn plans_that_need_more_memory_than_there_is_are_not_run() {
        let mut plan = report("model").best.swap_remove(0);
        plan.ranks[0].memory.weights = 1 << 50;
        let error = has_memory(&plan).unwrap_err().to_string();
        assert!(error.contains("its ranks hold") && error.contains("are available"), "{error}");
    }

    #[test]
    fn the_plan_that_failed_is_named() {
        let block = BlockConfig::new(
            AttentionConfig::new(8, 2),
            8,
            Activation::Silu,
            NormKind::RmsNorm { eps: 1e-5 },
        );
        let job = Job::train(DecoderConfig::new(16, block, 1), DType::F32, 8, 4);
        let mut lines = 0;
        let show = |_: &str| {
            lines += 1;
            Ok(())
        };
        let trials = run(&job, &report("model"), Path::new("absent.json"), 1, show);
        let error = trials.err().unwrap().to_string();
        assert!(
            error.starts_with("plan 1 (dp 2, tp 4, pp 2 x 2 stages, 4 microbatches of 1, sp): "),
            "{error}"
        );
        assert!(error.contains("number of blocks is 1"), "{error}");
        assert_eq!(lines, 1);
    }
}
