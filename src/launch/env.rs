//! What a launcher tells a process by environment variables.

use super::{MAX_RANKS, rendezvous::Rendezvous};
use crate::{
    comm::{self, Group, Link},
    device::Cpu,
    error::{Error, LostReason, Result},
    trace,
};
use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    rc::Rc,
    time::Duration,
};

const OP: &str = "launch";

/// Longer than any job lasts, and short enough to be added to a point in time.
const FOREVER: Duration = Duration::from_secs(1 << 32);

/// This process's place among the ranks, as its launcher gave it.
///
/// | launcher | rank, world | on this machine | job and epoch | address |
/// |---|---|---|---|---|
/// | torchrun | `RANK`, `WORLD_SIZE` | `LOCAL_RANK`, `LOCAL_WORLD_SIZE` | `TORCHELASTIC_RUN_ID`, `TORCHELASTIC_RESTART_COUNT` | `MASTER_ADDR`, `MASTER_PORT` + 1 |
/// | Open MPI | `OMPI_COMM_WORLD_RANK`, `…_SIZE` | `OMPI_COMM_WORLD_LOCAL_RANK`, `…_LOCAL_SIZE` | `PMIX_NAMESPACE` | |
/// | MPICH, Intel MPI | `PMI_RANK`, `PMI_SIZE` | `MPI_LOCALRANKID`, `MPI_LOCALNRANKS` | `PMI_JOBID` | |
/// | Slurm | `SLURM_PROCID`, `SLURM_NTASKS` | `SLURM_LOCALID`, `SLURM_NTASKS_PER_NODE` | `SLURM_JOB_ID` and `_STEP_ID`, `SLURM_RESTART_COUNT` | |
///
/// The first launcher of the table whose rank is set counts. Ranks that are all on this machine
/// meet at 127.0.0.1; otherwise `MASTER_ADDR` says where rank 0 is: a name, an IPv4 or an IPv6
/// address, in brackets or not. `SHARDWISE_PORT` sets the port at which rank 0 listens; otherwise
/// it is the one after `MASTER_PORT`, because torchrun's agent listens on that itself, or follows
/// from the job's name. `SHARDWISE_TOKEN` is what ranks prove to each other that they know, and
/// what authenticates all that they send; it has to be set where they do not talk over loopback.
/// Then rank 0 may have another address than `MASTER_ADDR`, such as behind a service: it listens at
/// all of its addresses. Nothing is encrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Env {
    /// This process's rank in the world.
    pub rank: usize,
    /// The number of ranks.
    pub world: usize,
    /// Its number among the ranks on this machine: the number of its GPU.
    pub local_rank: usize,
    /// The number of ranks on this machine.
    pub local_world: usize,
    /// The host of rank 0.
    pub host: String,
    /// The port at which rank 0 listens.
    pub port: u16,
    /// The job's name.
    pub job: String,
    /// How many times the job was started before.
    pub epoch: u64,
    /// What all ranks know and nobody else.
    pub token: String,
}

/// The variables of one launcher.
struct Launcher {
    rank: &'static str,
    world: &'static str,
    local_rank: &'static str,
    local_world: &'static str,
    job: &'static [&'static str],
    epoch: &'static str,
    /// The number of machines, where the launcher says it beside the ranks that it wanted on each.
    nodes: &'static [&'static str],
}

const LAUNCHERS: [Launcher; 4] = [
    Launcher {
        rank: "RANK",
        world: "WORLD_SIZE",
        local_rank: "LOCAL_RANK",
        local_world: "LOCAL_WORLD_SIZE",
        job: &["TORCHELASTIC_RUN_ID"],
        epoch: "TORCHELASTIC_RESTART_COUNT",
        nodes: &[],
    },
    Launcher {
        rank: "OMPI_COMM_WORLD_RANK",
        world: "OMPI_COMM_WORLD_SIZE",
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
        local_world: "OMPI_COMM_WORLD_LOCAL_SIZE",
        job: &["PMIX_NAMESPACE"],
        epoch: "SHARDWISE_EPOCH",
        nodes: &[],
    },
    Launcher {
        rank: "PMI_RANK",
        world: "PMI_SIZE",
        local_rank: "MPI_LOCALRANKID",
        local_world: "MPI_LOCALNRANKS",
        job: &["PMI_JOBID"],
        epoch: "SHARDWISE_EPOCH",
        nodes: &[],
    },
    Launcher {
        rank: "SLURM_PROCID",
        world: "SLURM_NTASKS",
        local_rank: "SLURM_LOCALID",
        local_world: "SLURM_NTASKS_PER_NODE",
        job: &["SLURM_JOB_ID", "SLURM_STEP_ID"],
        epoch: "SLURM_RESTART_COUNT",
        nodes: &["SLURM_STEP_NUM_NODES", "SLURM_NNODES"],
    },
];

impl Env {
    /// What this process's environment says.
    ///
    /// # Errors
    /// When no launcher's variables are set, one of them is missing or is no number, or they
    /// contradict each other: the variables are named.
    pub fn read() -> Result<Self> {
        Self::of(|name| std::env::var(name).ok())
    }

    /// What other variables say.
    ///
    /// # Errors
    /// See [`Env::read`].
    pub fn of(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let text = |name: &str| variable(name).filter(|value| !value.is_empty());
        let launcher = LAUNCHERS.iter().find(|launcher| text(launcher.rank).is_some()).ok_or_else(|| {
            let ranks: Vec<_> = LAUNCHERS.iter().map(|launcher| launcher.rank).collect();
            Error::invalid(OP, format!("no launcher has set this process's rank: none of {ranks:?}"))
        })?;
        let number = |name: &str| match text(name).map(|value| (value.trim().parse::<usize>(), value)) {
            None => Ok(None),
            Some((Ok(number), _)) => Ok(Some(number)),
            Some((Err(_), value)) => Err(Error::invalid(OP, format!("{name} is `{value}`, not a number"))),
        };
        let needed = |name: &str| {
            number(name)?
                .ok_or_else(|| Error::invalid(OP, format!("{} is set, but {name} is not", launcher.rank)))
        };
        let (rank, world) = (needed(launcher.rank)?, needed(launcher.world)?);
        // A lone rank is the first of its machine.
        let local_rank =
            if world == 1 { number(launcher.local_rank)?.unwrap_or(0) } else { needed(launcher.local_rank)? };
        let local_world = number(launcher.local_world)?;
        let below = |left: &str, left_value, right: &str, right_value| {
            if left_value < right_value {
                return Ok(());
            }
            Err(Error::invalid(OP, format!("{left} is {left_value}, but {right} is only {right_value}")))
        };
        if world > MAX_RANKS {
            let reason = format!("{} is {world}, but there can be at most {MAX_RANKS} ranks", launcher.world);
            return Err(Error::invalid(OP, reason));
        }
        below(launcher.rank, rank, launcher.world, world)?;
        below(launcher.local_rank, local_rank, launcher.world, world)?;
        if let Some(local_world) = local_world {
            below(launcher.local_rank, local_rank, launcher.local_world, local_world)?;
            below(launcher.local_world, local_world, launcher.world, world + 1)?;
        }
        // So many ranks may have been wanted on each of several machines that all would have room
        // on one.
        let nodes = launcher.nodes.iter().find_map(|name| number(name).transpose()).transpose()?;
        let local_world = local_world.filter(|local| *local < world || nodes.is_none_or(|nodes| nodes < 2));
        let alone = local_world.unwrap_or(0) == world || world == 1;
        let host = match text("MASTER_ADDR") {
            Some(host) => host,
            None if alone => "127.0.0.1".into(),
            None => {
                return Err(Error::invalid(
                    OP,
                    format!(
                        "MASTER_ADDR is not set, and of {world} ranks ({}) only {} are on this machine ({}): \
                         where is rank 0?",
                        launcher.world,
                        local_world.unwrap_or(1),
                        launcher.local_world
                    ),
                ));
            }
        };
        let job: Vec<_> = launcher.job.iter().filter_map(|name| text(name)).collect();
        let job = if job.is_empty() { "job".to_string() } else { job.join(".") };
        let port = match (number("SHARDWISE_PORT")?, number("MASTER_PORT")?) {
            (Some(port), _) => port,
            (None, Some(65535)) => 65534,
            (None, Some(port)) => port + 1,
            // Below the ports that systems give out by themselves.
            (None, None) => {
                20_000 + job.bytes().fold(0, |sum: usize, byte| (sum * 31 + byte as usize) % 10_000)
            }
        };
        let port = u16::try_from(port)
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| Error::invalid(OP, format!("there is no port {port}")))?;
        let epoch = number(launcher.epoch)?.unwrap_or(0) as u64;
        let token = text("SHARDWISE_TOKEN").unwrap_or_default();
        let local_world = local_world.unwrap_or(if alone { world } else { 1 });
        Ok(Self { rank, world, local_rank, local_world, host, port, job, epoch, token })
    }

    /// Finds the other processes and runs `rank` with this process's end of a group of all:
    /// [`crate::launch::threads`] for processes that something else has started. The group is a
    /// [`Link`].
    ///
    /// Returns when all ranks have left the group. A rank that waits for others gives up after
    /// `deadline`.
    ///
    /// # Errors
    /// When not all ranks come within the deadline, what `rank` returns, and when another rank has
    /// sent a message to this one that it did not receive.
    pub fn run<R>(&self, deadline: Duration, rank: impl FnOnce(Group<Cpu>) -> Result<R>) -> Result<R> {
        let line = Rendezvous::new(self)?.join(deadline.min(FOREVER))?;
        trace::begin(format!("{}.{}", self.job, self.epoch), self.rank, self.world, trace::folder());
        let world = Group::new(Rc::new(Link::world(&line)), &Cpu::new());
        let result = catch_unwind(AssertUnwindSafe(|| rank(world)));
        trace::end(&result);
        line.close(match &result {
            Ok(Ok(_)) => LostReason::Left,
            Ok(Err(_)) => LostReason::Failed,
            Err(_) => LostReason::Panicked,
        });
        comm::settle();
        match result {
            Ok(Ok(result)) => line.unread().map_or(Ok(result), Err),
            Ok(Err(error)) => Err(error),
            Err(panic) => resume_unwind(panic),
        }
    }
}
