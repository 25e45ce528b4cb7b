//! Groups that are made, broken and dropped repeatedly must not leak.

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
/// In one of every ten groups the ranks communicate over sockets. In all other groups they use
/// shared memory. With the feature `tls`, every second group over sockets uses TLS.
const OVER_SOCKETS: u64 = 10;
/// How many more descriptors, and how many more threads, the process may have at the end than after
/// a tenth of the cycles. The limit is not 0, because some connections are still being closed.
const SLACK: u64 = 4;
/// How many more bytes of memory the process may use at the end than after a tenth of the cycles. A
/// leak of 1 kB per cycle exceeds this limit in 10,000 cycles.
const GROWTH: u64 = 8 << 20;

/// The resources of this process: open descriptors, threads, and bytes of memory.
#[derive(Clone, Copy, Debug)]
struct Usage {
    descriptors: u64,
    threads: u64,
    memory: u64,
}

impl Usage {
    fn now() -> std::io::Result<Self> {
        let count = |folder: &str| fs::read_dir(folder).map(|all| all.count() as u64);
        let status = fs::read_to_string("/proc/self/status")?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next());
        let memory = resident.and_then(|kilobytes| kilobytes.parse::<u64>().ok()).unwrap_or(0) << 10;
        Ok(Self { descriptors: count("/proc/self/fd")?, threads: count("/proc/self/task")?, memory })
    }
}

/// Returns the environment variables by which a rank proves which rank it is.
type Identity<'a> = &'a (dyn Fn(usize, &str) -> Option<String> + Sync);

/// The program of a rank. The number of the cycle selects the fault that breaks the group.
fn rank(world: &Group<Cpu>, cycle: u64) -> Result<()> {
    let (rank, device) = (world.rank(), world.device());
    let half = world.split_all(rank as u64 % 2)?;
    half.all_reduce(ReduceOp::Sum, &mut Tensor::<f32>::full(device, [8], 1.0)?)?;
    // This all-reduce still runs when the group breaks, and no rank waits for it.
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

/// Runs [`rank`] over sockets, with threads in place of processes. Returns the number of ranks that
/// received an error.
fn over_sockets(cycle: u64, identity: Identity) -> std::io::Result<usize> {
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port().to_string();
    let informed = thread::scope(|scope| {
        let start = |number: usize| {
            let port = &port;
            let variable = move |name: &str| match name {
                "RANK" | "LOCAL_RANK" => Some(number.to_string()),
                "WORLD_SIZE" | "LOCAL_WORLD_SIZE" => Some(RANKS.to_string()),
                "SHARDWISE_PORT" => Some(port.clone()),
                name => identity(number, name),
            };
            scope.spawn(move || Env::of(variable)?.run(Duration::from_secs(20), |world| rank(&world, cycle)))
        };
        let ranks: Vec<_> = (0..RANKS).map(start).collect();
        ranks.into_iter().map(|rank| !matches!(rank.join(), Ok(Ok(())))).filter(|informed| *informed).count()
    });
    Ok(informed)
}

/// Makes and breaks groups. Returns an error if a group did not break, or if descriptors, threads
/// or memory leak.
pub(crate) fn campaign(cycles: u64) -> std::result::Result<(), Box<dyn std::error::Error>> {
    #[cfg(feature = "tls")]
    let keys = crate::keys::Keys::new(RANKS)?;
    let identities: &[Identity] = &[
        &|_, _| None,
        #[cfg(feature = "tls")]
        &|rank, name| keys.variable(rank, name),
    ];
    let (start, mut after_some) = (Instant::now(), Usage::now()?);
    let kinds = identities.len() as u64;
    for cycle in 0..cycles {
        let informed = if cycle % OVER_SOCKETS == 0 {
            let number = cycle / OVER_SOCKETS;
            over_sockets(number / kinds, identities[(number % kinds) as usize])?
        } else {
            let ranks = Threads::new(RANKS).deadline(Duration::from_secs(20));
            ranks.run_each(|world| rank(&world, cycle))?.iter().filter(|outcome| outcome.is_err()).count()
        };
        if informed < RANKS - 1 {
            return Err(format!("cycle {cycle}: only {informed} of {RANKS} ranks received an error").into());
        }
        if cycle == cycles / 10 {
            after_some = Usage::now()?;
        }
    }
    // The threads that read connections end slightly later than the ranks.
    thread::sleep(Duration::from_millis(100));
    let usage = Usage::now()?;
    let over_sockets = cycles.div_ceil(OVER_SOCKETS);
    println!(
        "cycles: {cycles} groups of {RANKS} ranks made, broken and dropped in {:.1?}, {over_sockets} of them over sockets, {} of these with TLS",
        start.elapsed(),
        over_sockets - over_sockets.div_ceil(kinds)
    );
    for (what, usage) in [("a tenth", after_some), ("all", usage)] {
        println!(
            "    after {what} of them: {} descriptors, {} threads, {:.1} MiB",
            usage.descriptors,
            usage.threads,
            usage.memory as f64 / (1 << 20) as f64
        );
    }
    let flat = usage.descriptors <= after_some.descriptors + SLACK
        && usage.threads <= after_some.threads + SLACK
        && usage.memory <= after_some.memory + GROWTH;
    if flat { Ok(()) } else { Err("dropped groups have leaked descriptors, threads or memory".into()) }
}
