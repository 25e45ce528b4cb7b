//! Measures the rates of this machine.

use crate::host::Host;
use clap::Args;
use shardwise::{
    Error, Result,
    comm::Group,
    device::Cpu,
    launch,
    plan::{Machine, Measure, Transport},
};
use std::{
    io::{self, Write},
    num::NonZeroUsize,
    thread::available_parallelism,
};

/// The most seconds that a measurement may take.
const MOST: f64 = 30.0;

/// The most ranks on a CPU with fewer cores. Collectives of more ranks take too long.
const MOST_RANKS: usize = 32;

/// What to measure.
#[derive(Args)]
pub(crate) struct Request {
    /// The number of ranks, which are threads. Default: the number of CPU cores, but between 2 and
    /// 8.
    #[arg(long, value_name = "N")]
    ranks: Option<NonZeroUsize>,
    /// About how many seconds to measure, at most 30.
    #[arg(long, value_name = "S", default_value_t = 20.0)]
    seconds: f64,
    /// The name of the machine. Default: that of the CPU or GPU.
    #[arg(long, value_name = "TEXT")]
    name: Option<String>,
    /// Measure the processes that mpirun has started, of which this is one. The first one prints.
    #[cfg(feature = "mpi")]
    #[arg(long, conflicts_with = "ranks")]
    mpi: bool,
    /// Measure the GPUs 0 to N − 1.
    #[cfg(feature = "nccl")]
    #[cfg_attr(feature = "mpi", arg(conflicts_with = "mpi"))]
    #[arg(long, value_name = "N", conflicts_with = "ranks")]
    gpus: Option<NonZeroUsize>,
}

impl Request {
    /// Measures the machine and prints it as JSON. Returns the exit code.
    pub(crate) fn run(&self) -> io::Result<u8> {
        let json = self.measure().and_then(|machine| machine.map(|machine| machine.to_json()).transpose());
        if let Some(json) = json.map_err(io::Error::other)? {
            io::stdout().write_all(json.as_bytes())?;
        }
        Ok(0)
    }

    /// Returns the machine, or nothing if another process prints it.
    fn measure(&self) -> Result<Option<Machine>> {
        if !(self.seconds > 0.0 && self.seconds <= MOST) {
            let reason =
                format!("`--seconds` is {}, but has to be more than 0 and at most {MOST}", self.seconds);
            return Err(Error::invalid("measure", reason));
        }
        #[cfg(feature = "nccl")]
        if let Some(gpus) = self.gpus {
            return self.gpus(gpus.get()).map(Some);
        }
        let host = Host::new();
        let measure = |transport| self.options(transport, host.memory(), host.brand());
        #[cfg(feature = "mpi")]
        if self.mpi {
            return launch::mpi(|world| {
                let machine = on_cpus(&measure(Transport::Mpi), &world)?;
                Ok((world.rank() == 0).then_some(machine))
            });
        }
        let cores = available_parallelism().map_or(1, NonZeroUsize::get);
        let ranks = self.ranks.map_or(cores.clamp(2, 8), NonZeroUsize::get);
        let most = cores.max(MOST_RANKS);
        if ranks > most {
            let reason = format!("`--ranks` is {ranks}, but on {cores} cores at most {most} are measured");
            return Err(Error::invalid("measure", reason));
        }
        let measure = measure(Transport::Threads);
        Ok(launch::threads(ranks, |world| on_cpus(&measure, &world))?.into_iter().next())
    }

    #[cfg(feature = "nccl")]
    fn gpus(&self, gpus: usize) -> Result<Machine> {
        let machines = crate::gpus::run(gpus, |world| {
            let gpu = world.device();
            let measure = self.options(Transport::Nccl, gpu.total_memory() as u64, gpu.name().into());
            measure.run(world, |_| gpu.clone())
        });
        Ok(machines?.swap_remove(0))
    }

    fn options(&self, transport: Transport, memory: u64, name: String) -> Measure {
        Measure::new(transport, memory)
            .with_seconds(self.seconds)
            .with_name(self.name.clone().unwrap_or(name))
    }
}

fn on_cpus(measure: &Measure, world: &Group<Cpu>) -> Result<Machine> {
    measure.run(world, |threads| Cpu::new().with_threads(threads))
}
