//! NCCL between processes: the world lives in the process that made its id, and ranks of other processes reach it by a socket.
//!
//! For every rank that connects a thread of that process stands in, with memory of its own: it takes in what the rank sends, does
//! the rank's calls as a thread of the process would, and returns what was received.

use crate::{
    nccl::{Kind, Op, World, do_ops, join, width, wish},
    stream::lock,
};
use std::{
    collections::HashMap,
    io::{self, Read, Write},
    net::Shutdown,
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

const JOIN: u64 = 1;
const OPS: u64 = 2;
const SPLIT: u64 = 3;
const END: u64 = 4;

/// What a rank is told when its calls are done: what was received follows.
const DONE: u64 = 5;

/// What a rank is told when all have come.
const JOINED: u64 = 1;
const REFUSED: u64 = 2;

/// Where a process listens: a name that goes with it, not a file.
fn address(process: u32) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("cuda-standin-{process}"))
}

/// The worlds of this process by their numbers.
fn worlds() -> &'static Mutex<HashMap<u64, Arc<World>>> {
    static WORLDS: OnceLock<Mutex<HashMap<u64, Arc<World>>>> = OnceLock::new();
    WORLDS.get_or_init(Mutex::default)
}

/// Listens for ranks of other processes, from the first id on that this process makes.
pub fn listen() {
    static LISTENING: OnceLock<()> = OnceLock::new();
    LISTENING.get_or_init(|| {
        let listener = address(std::process::id()).and_then(|address| UnixListener::bind_addr(&address));
        if let Ok(listener) = listener {
            std::thread::spawn(move || {
                for line in listener.incoming().flatten() {
                    std::thread::spawn(move || {
                        // A line that breaks is a rank that is gone: the others wait for it, as with the real one.
                        let _ = serve(line);
                    });
                }
            });
        }
    });
}

/// The world of a number: that of the ranks of other processes, if they were here first.
pub fn world(number: u64, size: usize) -> Arc<World> {
    Arc::clone(lock(worlds()).entry(number).or_insert_with(|| World::new(size)))
}

/// Makes a world known to other processes.
pub fn publish(number: u64, world: &Arc<World>) {
    lock(worlds()).insert(number, Arc::clone(world));
}

fn put(line: &mut UnixStream, words: &[u64]) -> io::Result<()> {
    line.write_all(&words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>())
}

fn get<const N: usize>(line: &mut UnixStream) -> io::Result<[u64; N]> {
    let mut words = [0; N];
    for word in &mut words {
        let mut bytes = [0; 8];
        line.read_exact(&mut bytes)?;
        *word = u64::from_le_bytes(bytes);
    }
    Ok(words)
}

/// The bytes that a rank sends and receives by a call.
fn sizes(op: &Op, rank: usize, ranks: usize) -> (usize, usize) {
    let size = op.len * width(op.dtype).unwrap_or(0);
    let root = op.root as usize == rank;
    match op.kind {
        Kind::AllReduce => (size, size),
        Kind::AllGather => (size, size * ranks),
        Kind::ReduceScatter => (size * ranks, size),
        Kind::Reduce => (size, if root { size } else { 0 }),
        Kind::Broadcast => (if root { size } else { 0 }, size),
        Kind::Send => (size, 0),
        Kind::Recv => (0, size),
    }
}

/// Whether ranks of other processes have come.
static SERVES: AtomicBool = AtomicBool::new(false);

/// Whether ranks of other processes have come here: what they and this one's exchange goes through memory of NCCL's own.
pub fn serves() -> bool {
    SERVES.load(SeqCst)
}

/// Stands in for a rank of another process.
fn serve(mut line: UnixStream) -> io::Result<()> {
    let [tag, number, rank, device, size] = get(&mut line)?;
    let (rank, size) = (rank as usize, size as usize);
    let world = match tag {
        JOIN => {
            let world = world(number, size);
            SERVES.store(true, SeqCst);
            world.is_met_from_afar();
            join(&world, rank, device as i32);
            world
        }
        _ => return Ok(()),
    };
    let outcome = obey(&mut line, &world, rank);
    world.end();
    if matches!(outcome, Ok(END)) {
        world.wait_until_ended();
        put(&mut line, &[END])?;
    }
    Ok(())
}

/// Does a rank's calls until it ends its communicator, by a word or by cutting the line.
fn obey(line: &mut UnixStream, world: &Arc<World>, rank: usize) -> io::Result<u64> {
    let gone = AtomicBool::new(false);
    world.wait_until_joined(&gone);
    put(line, &[if world.duplicate().is_none() { JOINED } else { REFUSED }])?;
    let mut rounds = 0;
    loop {
        let [tag, count] = get(line)?;
        if tag == END {
            return Ok(END);
        }
        if tag == SPLIT {
            let [color, key] = get(line)?;
            let wanted = (count as i64, color as i64 as i32, key as i64 as i32);
            let part = unless_gone(line, &gone, || wish(world, rank, wanted, &gone))?;
            let part = part.map(|(part, place)| (part.number(), part.size() as u64, place as u64, part));
            let reply = part.as_ref().map_or([0; 3], |(number, size, place, _)| [*number, *size, *place]);
            if let Some((number, _, _, part)) = &part {
                publish(*number, part);
            }
            put(line, &reply)?;
            continue;
        }
        let (mut ops, mut memory) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let [kind, len, dtype, root] = get(line)?;
            let op = Op {
                kind: Kind::of(kind),
                send: 0,
                recv: 0,
                len: len as usize,
                dtype: dtype as i32,
                root: root as i64 as i32,
            };
            let (sent, received) = sizes(&op, rank, world.size());
            let (mut send, mut recv) = (vec![0_u64; sent.div_ceil(8)], vec![0_u64; received.div_ceil(8)]);
            let mut bytes = vec![0; sent];
            line.read_exact(&mut bytes)?;
            // SAFETY: as many bytes as the words have room for.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), send.as_mut_ptr().cast::<u8>(), sent) };
            ops.push(Op { send: send.as_mut_ptr() as usize, recv: recv.as_mut_ptr() as usize, ..op });
            memory.push((send, recv, received));
        }
        rounds = unless_gone(line, &gone, || do_ops(world, rank, rounds, &ops, &gone))?;
        put(line, &[DONE])?;
        for (_, recv, received) in &memory {
            // SAFETY: the words have at least as many bytes.
            line.write_all(unsafe { std::slice::from_raw_parts(recv.as_ptr().cast::<u8>(), *received) })?;
        }
    }
}

/// Waits for others on behalf of a rank, which sends nothing meanwhile: where its line ends, the
/// wait does.
fn unless_gone<R: Send>(
    line: &mut UnixStream,
    gone: &AtomicBool,
    wait: impl FnOnce() -> R + Send,
) -> io::Result<R> {
    line.set_nonblocking(true)?;
    let result = std::thread::scope(|scope| {
        let waiting = scope.spawn(wait);
        while !waiting.is_finished() {
            let ended = match line.read(&mut [0]) {
                Ok(read) => read == 0,
                Err(error) => error.kind() != io::ErrorKind::WouldBlock,
            };
            gone.fetch_or(ended, SeqCst);
            std::thread::sleep(Duration::from_micros(100));
        }
        waiting.join().map_err(|_| io::Error::other("a call has panicked"))
    });
    line.set_nonblocking(false)?;
    result
}

/// A rank's line to a world in another process.
pub struct Line {
    stream: Mutex<UnixStream>,
    breaker: UnixStream,
    process: u32,
    /// The answer to its joining, once there is one.
    joined: AtomicU64,
    device: i32,
    /// Divisions that the rank has asked for.
    divisions: AtomicU64,
}

impl Line {
    /// Connects, and waits in the background until all ranks have come.
    pub fn join(
        process: u32,
        number: u64,
        (rank, device): (usize, i32),
        size: usize,
    ) -> io::Result<Arc<Self>> {
        let mut stream = UnixStream::connect_addr(&address(process)?)?;
        put(&mut stream, &[JOIN, number, rank as u64, device as u64, size as u64])?;
        let breaker = stream.try_clone()?;
        let line = Arc::new(Self {
            stream: Mutex::new(stream),
            breaker,
            process,
            joined: AtomicU64::new(0),
            device,
            divisions: AtomicU64::new(0),
        });
        let waiting = Arc::clone(&line);
        let stream = lock(&line.stream).try_clone()?;
        std::thread::spawn(move || {
            let mut stream = stream;
            if let Ok([answer]) = get(&mut stream) {
                waiting.joined.store(answer, SeqCst);
            }
        });
        Ok(line)
    }

    /// Whether all ranks have come, and then whether they may be ranks of one communicator.
    pub fn joined(&self) -> Option<bool> {
        match self.joined.load(SeqCst) {
            0 => None,
            answer => Some(answer == JOINED),
        }
    }

    /// Ends what the rank is waiting for.
    pub fn cut(&self) {
        let _ = self.breaker.shutdown(Shutdown::Both);
    }

    /// Ends the rank's communicator, and waits until all have ended theirs, or are gone.
    pub fn end(&self) {
        let mut line = lock(&self.stream);
        let _ = put(&mut line, &[END, 0]).and_then(|()| get::<1>(&mut line));
    }

    /// Does a rank's calls; an error is a line that was cut.
    pub fn run(&self, rank: usize, ranks: usize, ops: &[Op]) -> io::Result<()> {
        let mut line = lock(&self.stream);
        put(&mut line, &[OPS, ops.len() as u64])?;
        for op in ops {
            put(&mut line, &[op.kind as u64, op.len as u64, op.dtype as u64, op.root as i64 as u64])?;
            let (sent, _) = sizes(op, rank, ranks);
            if sent > 0 {
                // SAFETY: the call's memory was judged, and is lent until it is done.
                line.write_all(unsafe { std::slice::from_raw_parts(op.send as *const u8, sent) })?;
            }
        }
        let [_done] = get(&mut line)?;
        for op in ops {
            let (_, received) = sizes(op, rank, ranks);
            let mut bytes = vec![0; received];
            line.read_exact(&mut bytes)?;
            // SAFETY: as above.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), op.recv as *mut u8, received) };
        }
        Ok(())
    }

    /// This rank's part of a division: a line to it, its size and the rank's place.
    pub fn split(&self, color: i32, key: i32) -> io::Result<Option<(Arc<Self>, usize, usize)>> {
        let division = self.divisions.fetch_add(1, SeqCst);
        let reply: [u64; 3] = {
            let mut line = lock(&self.stream);
            put(&mut line, &[SPLIT, division, color as i64 as u64, key as i64 as u64])?;
            get(&mut line)?
        };
        match reply {
            [0, ..] => Ok(None),
            [number, size, place] => {
                let line = Self::join(self.process, number, (place as usize, self.device), size as usize)?;
                Ok(Some((line, size as usize, place as usize)))
            }
        }
    }
}
