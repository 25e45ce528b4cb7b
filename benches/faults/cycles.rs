//! Groups that are made, broken and dropped, again and again: nothing of them is left.

use shardwise::{
    Error, Result, Tensor,
    comm::{Group, ReduceOp},
    device::Cpu,
    launch::{Env, Threads},
};
use std::{
    fs,
    net::TcpListener,
    thread,
    time::{Duration, Instant},
};

const RANKS: usize = 4;
/// Of so many one has ranks that talk over sockets. The others' read one another's memory.
const OVER_SOCKETS: u64 = 10;
/// Descriptors and threads that this process may have more of than before: those of a connection that is just being closed.
const SLACK: u64 = 4;
/// How much more memory may be in use after all cycles than after a tenth of them: a leak of a kilobyte a cycle would be more.
const GROWTH: u64 = 8 << 20;

/// What this process has: open descriptors, threads, and bytes of memory.
#[derive(Clone, Copy, Debug)]
struct Held {
    descriptors: u64,
    threads: u64,
    memory: u64,
}

impl Held {
    fn now() -> std::io::Result<Self> {
        let count = |folder: &str| fs::read_dir(folder).map(|all| all.count() as u64);
        let status = fs::read_to_string("/proc/self/status")?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next());
        let memory = resident.and_then(|kilobytes| kilobytes.parse::<u64>().ok()).unwrap_or(0) << 10;
        Ok(Self { descriptors: count("/proc/self/fd")?, threads: count("/proc/self/task")?, memory })
    }
}

/// What a rank does until its group breaks, in a way that the cycle's number chooses.
fn rank(world: &Group<Cpu>, cycle: u64) -> Result<()> {
    let (rank, device) = (world.rank(), world.device());
    let half = world.split_all(rank as u64 % 2)?;
    half.all_reduce(ReduceOp::Sum, &mut Tensor::<f32>::full(device, [8], 1.0)?)?;
    // One that is under way when the group breaks, and is not waited for.
    drop(world.start_all_reduce(ReduceOp::Max, Tensor::<f32>::full(device, [5000], 1.0)?)?);
    if rank == cycle as usize / 4 % RANKS {
        match cycle % 4 {
            0 => std::panic::resume_unwind(Box::new("injected")),
            1 => return Ok(()),
            2 => return Err(Error::Invalid { op: "campaign", reason: "injected".into() }),
            _ => return world.all_reduce(ReduceOp::Min, &mut Tensor::<f32>::full(device, [9], 1.0)?),
        }
    }
    world.barrier()
}

/// The same over sockets. Threads play the processes.
fn over_sockets(cycle: u64) -> std::io::Result<usize> {
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port().to_string();
    let told = thread::scope(|scope| {
        let start = |number: usize| {
            let port = &port;
            let variable = move |name: &str| match name {
                "RANK" | "LOCAL_RANK" => Some(number.to_string()),
                "WORLD_SIZE" | "LOCAL_WORLD_SIZE" => Some(RANKS.to_string()),
                "SHARDWISE_PORT" => Some(port.clone()),
                _ => None,
            };
            scope.spawn(move || Env::of(variable)?.run(Duration::from_secs(20), |world| rank(&world, cycle)))
        };
        let ranks: Vec<_> = (0..RANKS).map(start).collect();
        ranks.into_iter().map(|rank| !matches!(rank.join(), Ok(Ok(())))).filter(|told| *told).count()
    });
    Ok(told)
}

/// Makes and breaks groups; `Err` if one did not break, or descriptors, threads or memory are left.
pub(crate) fn campaign(cycles: u64) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let (start, mut after_some) = (Instant::now(), Held::now()?);
    for cycle in 0..cycles {
        let told = if cycle % OVER_SOCKETS == 0 {
            over_sockets(cycle / OVER_SOCKETS)?
        } else {
            let ranks = Threads::new(RANKS).deadline(Duration::from_secs(20));
            ranks.run_each(|world| rank(&world, cycle))?.iter().filter(|outcome| outcome.is_err()).count()
        };
        if told < RANKS - 1 {
            return Err(format!(
                "cycle {cycle}: only {told} of {RANKS} ranks were told that the group broke"
            )
            .into());
        }
        if cycle == cycles / 10 {
            after_some = Held::now()?;
        }
    }
    // Threads that read connections end a moment after these.
    thread::sleep(Duration::from_millis(100));
    let held = Held::now()?;
    println!(
        "cycles: {cycles} groups of {RANKS} ranks made, broken and dropped in {:.1?}, {} of them over sockets",
        start.elapsed(),
        cycles.div_ceil(OVER_SOCKETS)
    );
    for (what, held) in [("a tenth", after_some), ("all", held)] {
        println!(
            "    after {what} of them: {} descriptors, {} threads, {:.1} MiB",
            held.descriptors,
            held.threads,
            held.memory as f64 / (1 << 20) as f64
        );
    }
    let flat = held.descriptors <= after_some.descriptors + SLACK
        && held.threads <= after_some.threads + SLACK
        && held.memory <= after_some.memory + GROWTH;
    if flat { Ok(()) } else { Err("groups that were dropped have left something".into()) }
}
