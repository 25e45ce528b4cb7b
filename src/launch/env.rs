//! The environment variables that a launcher sets for each process.

use super::{MAX_RANKS, rank::AUDIT_DIR};
use crate::{
    error::{Error, Result},
    security::{Identity, Policy, Secret},
};
use std::{cell::RefCell, env::VarError, path::PathBuf};

const OP: &str = "launch";

/// This process's rank, and the address of rank 0, as the launcher has set them.
///
/// | launcher | rank, world | on this machine |
/// |---|---|---|
/// | torchrun | `RANK`, `WORLD_SIZE` | `LOCAL_RANK`, `LOCAL_WORLD_SIZE` |
/// | Open MPI | `OMPI_COMM_WORLD_RANK`, `…_SIZE` | `OMPI_COMM_WORLD_LOCAL_RANK`, `…_SIZE` |
/// | MPICH, Intel MPI | `PMI_RANK`, `PMI_SIZE` | `MPI_LOCALRANKID`, `MPI_LOCALNRANKS` |
/// | Slurm | `SLURM_PROCID`, `SLURM_NTASKS` | `SLURM_LOCALID`, `SLURM_NTASKS_PER_NODE` |
///
/// | launcher | job and epoch |
/// |---|---|
/// | torchrun | `TORCHELASTIC_RUN_ID`, `TORCHELASTIC_RESTART_COUNT` |
/// | Open MPI | `PMIX_NAMESPACE` |
/// | MPICH, Intel MPI | `PMI_JOBID` |
/// | Slurm | `SLURM_JOB_ID` and `SLURM_STEP_ID`, `SLURM_RESTART_COUNT` |
///
/// The process uses the variables of the first launcher in the table whose rank is set. With Open
/// MPI, MPICH and Intel MPI, the epoch is `SHARDWISE_EPOCH`, or 0 if that is not set.
///
/// `SHARDWISE_JOB`, if it is set, is the job's name in place of the launcher's.
///
/// * Address: if all ranks are on this machine, they use 127.0.0.1. Otherwise `MASTER_ADDR` is the
///   host of rank 0: a name, an IPv4 address, or an IPv6 address with or without brackets.
/// * Port: rank 0 listens on `SHARDWISE_PORT`. If that is not set, rank 0 listens on the port after
///   `MASTER_PORT`, because torchrun's agent listens on `MASTER_PORT`. If neither is set, the port
///   is derived from the job's name.
/// * `SHARDWISE_TOKEN` is the shared secret with which ranks authenticate each other and all their
///   frames. It is required unless the ranks communicate over loopback. With a token, rank 0
///   listens on all its addresses if it cannot bind `MASTER_ADDR`, which may therefore be the
///   address of a service. A token encrypts nothing.
/// * With an [`Identity`] (`SHARDWISE_KEY` and others) the connections use TLS 1.3, and each rank
///   proves that it is that rank of that job. A token is then not required.
/// * `SHARDWISE_POLICY` is the [`Policy`].
/// * `SHARDWISE_AUDIT_DIR` is the folder for the [audit log](crate::security::audit) of each rank.
///   Set it for every rank or for none.
///
/// ```
/// use shardwise::prelude::*;
/// // The variables that Slurm sets for the second of two processes on one machine.
/// let env = launch::Env::of(|name| match name {
///     "SLURM_PROCID" | "SLURM_LOCALID" => Some("1".into()),
///     "SLURM_NTASKS" | "SLURM_NTASKS_PER_NODE" => Some("2".into()),
///     _ => None,
/// })?;
/// assert_eq!((env.rank, env.world, env.local_world, &*env.host), (1, 2, 2, "127.0.0.1"));
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Env {
    /// This process's rank in the world.
    pub rank: usize,
    /// The number of ranks.
    pub world: usize,
    /// The index of this rank among the ranks on this machine, which is also its GPU's index.
    pub local_rank: usize,
    /// The number of ranks on this machine.
    pub local_world: usize,
    /// The host of rank 0.
    pub host: String,
    /// The port on which rank 0 listens.
    pub port: u16,
    /// The job's name.
    pub job: String,
    /// How many times the launcher has started the job before.
    pub epoch: u64,
    /// The secret that only the ranks know; empty if there is none.
    pub token: Secret,
    /// The files with which this rank proves which rank it is, for TLS.
    pub identity: Option<Identity>,
    /// Which transports the job may use.
    pub policy: Policy,
    /// The folder for this rank's audit log; none if the job keeps none.
    pub audit: Option<PathBuf>,
}

/// The variables of one launcher.
struct Launcher {
    rank: &'static str,
    world: &'static str,
    local_rank: &'static str,
    local_world: &'static str,
    job: &'static [&'static str],
    epoch: &'static str,
    /// The variables for the number of machines; empty if `local_world` is always the actual number
    /// of ranks on this machine, and not only the number that was requested per machine.
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
    /// Reads this process's environment.
    ///
    /// # Errors
    /// When no launcher has set a rank, when a further variable that is needed is missing, when a
    /// variable is not a number, no policy or not UTF-8, or when variables contradict each other.
    /// The error names the variables.
    pub fn read() -> Result<Self> {
        let wrong = RefCell::new(None);
        let env = Self::of(|name| match std::env::var(name) {
            Ok(value) => Some(value),
            Err(VarError::NotPresent) => None,
            // Without the variable a policy would allow everything, so it is not ignored.
            Err(VarError::NotUnicode(_)) => {
                *wrong.borrow_mut() = Some(name.to_string());
                None
            }
        });
        match wrong.take() {
            Some(name) => Err(Error::invalid(OP, format!("{name} is not valid UTF-8"))),
            None => env,
        }
    }

    /// Like [`Env::read`], but asks `variable` for the value of each environment variable.
    ///
    /// # Errors
    /// See [`Env::read`].
    pub fn of(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let text = |name: &str| variable(name).filter(|value| !value.is_empty());
        let launcher = LAUNCHERS.iter().find(|launcher| text(launcher.rank).is_some()).ok_or_else(|| {
            let ranks: Vec<_> = LAUNCHERS.iter().map(|launcher| launcher.rank).collect();
            Error::invalid(OP, format!("no launcher has set this process's rank: none of {ranks:?} is set"))
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
        // A single rank has local rank 0 by default.
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
        // The requested number of ranks per machine may be as large as the world, although the job
        // runs on several machines. Then it is not the actual number, and is ignored.
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
                        "MASTER_ADDR is not set, but of {world} ranks ({}) only {} are on this machine ({}): \
                         set MASTER_ADDR to the host of rank 0",
                        launcher.world,
                        local_world.unwrap_or(1),
                        launcher.local_world
                    ),
                ));
            }
        };
        let job: Vec<_> = launcher.job.iter().filter_map(|name| text(name)).collect();
        let job = if job.is_empty() { "job".to_string() } else { job.join(".") };
        let job = text("SHARDWISE_JOB").unwrap_or(job);
        let port = match (number("SHARDWISE_PORT")?, number("MASTER_PORT")?) {
            (Some(port), _) => port,
            (None, Some(65535)) => 65534,
            (None, Some(port)) => port + 1,
            // Ports 20,000 to 29,999, which are below the ports that systems assign automatically.
            (None, None) => {
                20_000 + job.bytes().fold(0, |sum: usize, byte| (sum * 31 + byte as usize) % 10_000)
            }
        };
        let port = u16::try_from(port)
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| Error::invalid(OP, format!("there is no port {port}")))?;
        let epoch = number(launcher.epoch)?.unwrap_or(0) as u64;
        let token = text("SHARDWISE_TOKEN").unwrap_or_default().into();
        let identity = Identity::of(text)?;
        let policy = text(Policy::VARIABLE).map_or(Ok(Policy::Any), |text| text.parse())?;
        let audit = text(AUDIT_DIR).map(PathBuf::from);
        let local_world = local_world.unwrap_or(if alone { world } else { 1 });
        Ok(Self {
            rank,
            world,
            local_rank,
            local_world,
            host,
            port,
            job,
            epoch,
            token,
            identity,
            policy,
            audit,
        })
    }
}
