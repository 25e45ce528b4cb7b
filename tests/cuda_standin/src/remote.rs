//! NCCL between processes: the world lives in the process that created its id, and ranks of other
//! processes reach it through a socket.
//!
//! For each connected rank, a thread of that process acts as its proxy, with its own memory: it
//! receives what the rank sends, runs the rank's calls like a thread of the process, and returns
//! the results.

use crate::{
    nccl::{Kind, Op, World, do_ops, join, request, width},
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

/// Sent to a rank when its calls are done; the received data follow.
const DONE: u64 = 5;

/// Sent to a rank when all ranks have joined.
const JOINED: u64 = 1;
const REFUSED: u64 = 2;

/// The address at which a process listens: an abstract name, which needs no file.
fn address(process: u32) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("cuda-standin-{process}"))
}

/// The worlds of this process by number.
fn worlds() -> &'static Mutex<HashMap<u64, Arc<World>>> {
    static WORLDS: OnceLock<Mutex<HashMap<u64, Arc<World>>>> = OnceLock::new();
    WORLDS.get_or_init(Mutex::default)
}

/// Listens for ranks of other processes, once this process creates its first id.
pub fn listen() {
    static LISTENING: OnceLock<()> = OnceLock::new();
    LISTENING.get_or_init(|| {
        let listener = address(std::process::id()).and_then(|address| UnixListener::bind_addr(&address));
        if let Ok(listener) = listener {
            std::thread::spawn(move || {
                for connection in listener.incoming().flatten() {
                    std::thread::spawn(move || {
                        // A broken connection means that the rank is gone: the others wait for it,
                        // as with the real library.
                        let _ = serve(connection);
                    });
                }
            });
        }
    });
}

/// Returns the world of a number, which ranks of other processes may already have created.
pub fn world(number: u64, size: usize) -> Arc<World> {
    Arc::clone(lock(worlds()).entry(number).or_insert_with(|| World::new(size)))
}

/// Makes a world available to other processes.
pub fn publish(number: u64, world: &Arc<World>) {
    lock(worlds()).insert(number, Arc::clone(world));
}

fn put(connection: &mut UnixStream, values: &[u64]) -> io::Result<()> {
    connection.write_all(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
}

fn get<const N: usize>(connection: &mut UnixStream) -> io::Result<[u64; N]> {
    let mut values = [0; N];
    for value in &mut values {
        let mut bytes = [0; 8];
        connection.read_exact(&mut bytes)?;
        *value = u64::from_le_bytes(bytes);
    }
    Ok(values)
}

/// The bytes that a rank sends and receives in a call.
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

/// Whether ranks of other processes have connected.
static SERVES: AtomicBool = AtomicBool::new(false);

/// Whether ranks of other processes have connected here. Transfers between them and this process
/// use NCCL's own memory.
pub fn serves() -> bool {
    SERVES.load(SeqCst)
}

/// Serves a rank of another process.
fn serve(mut connection: UnixStream) -> io::Result<()> {
    let [tag, number, rank, device, size] = get(&mut connection)?;
    let (rank, size) = (rank as usize, size as usize);
    let world = match tag {
        JOIN => {
            let world = world(number, size);
            SERVES.store(true, SeqCst);
            world.set_remote();
            join(&world, rank, device as i32);
            world
        }
        _ => return Ok(()),
    };
    let outcome = run_calls(&mut connection, &world, rank);
    world.end();
    if matches!(outcome, Ok(END)) {
        world.wait_until_ended();
        put(&mut connection, &[END])?;
    }
    Ok(())
}

/// Runs a rank's calls until it ends its communicator or its connection breaks.
fn run_calls(connection: &mut UnixStream, world: &Arc<World>, rank: usize) -> io::Result<u64> {
    let gone = AtomicBool::new(false);
    world.wait_until_joined(&gone);
    put(connection, &[if world.duplicate().is_none() { JOINED } else { REFUSED }])?;
    let mut rounds = 0;
    loop {
        let [tag, count] = get(connection)?;
        if tag == END {
            return Ok(END);
        }
        if tag == SPLIT {
            let [color, key] = get(connection)?;
            let wanted = (count as i64, color as i64 as i32, key as i64 as i32);
            let part = unless_gone(connection, &gone, || request(world, rank, wanted, &gone))?;
            let part = part.map(|(part, place)| (part.number(), part.size() as u64, place as u64, part));
            let reply = part.as_ref().map_or([0; 3], |(number, size, place, _)| [*number, *size, *place]);
            if let Some((number, _, _, part)) = &part {
                publish(*number, part);
            }
            put(connection, &reply)?;
            continue;
        }
        let (mut ops, mut memory) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let [kind, len, dtype, root] = get(connection)?;
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
            connection.read_exact(&mut bytes)?;
            // SAFETY: as many bytes as the `u64` values have room for.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), send.as_mut_ptr().cast::<u8>(), sent) };
            ops.push(Op { send: send.as_mut_ptr() as usize, recv: recv.as_mut_ptr() as usize, ..op });
            memory.push((send, recv, received));
        }
        rounds = unless_gone(connection, &gone, || do_ops(world, rank, rounds, &ops, &gone))?;
        put(connection, &[DONE])?;
        for (_, recv, received) in &memory {
            // SAFETY: the `u64` values have at least as many bytes.
            connection
                .write_all(unsafe { std::slice::from_raw_parts(recv.as_ptr().cast::<u8>(), *received) })?;
        }
    }
}

/// Waits for others on behalf of a rank, which sends nothing meanwhile. The wait ends if the
/// connection does.
fn unless_gone<R: Send>(
    connection: &mut UnixStream,
    gone: &AtomicBool,
    wait: impl FnOnce() -> R + Send,
) -> io::Result<R> {
    connection.set_nonblocking(true)?;
    let result = std::thread::scope(|scope| {
        let waiting = scope.spawn(wait);
        while !waiting.is_finished() {
            let ended = match connection.read(&mut [0]) {
                Ok(read) => read == 0,
                Err(error) => error.kind() != io::ErrorKind::WouldBlock,
            };
            gone.fetch_or(ended, SeqCst);
            std::thread::sleep(Duration::from_micros(100));
        }
        waiting.join().map_err(|_| io::Error::other("a call has panicked"))
    });
    connection.set_nonblocking(false)?;
    result
}

/// A rank's connection to a world in another process.
pub struct Connection {
    stream: Mutex<UnixStream>,
    breaker: UnixStream,
    process: u32,
    /// The reply to the join, once there is one.
    joined: AtomicU64,
    device: i32,
    /// The number of splits that the rank has requested.
    splits: AtomicU64,
}

impl Connection {
    /// Connects, and waits in the background until all ranks have joined.
    pub fn join(
        process: u32,
        number: u64,
        (rank, device): (usize, i32),
        size: usize,
    ) -> io::Result<Arc<Self>> {
        let mut stream = UnixStream::connect_addr(&address(process)?)?;
        put(&mut stream, &[JOIN, number, rank as u64, device as u64, size as u64])?;
        let breaker = stream.try_clone()?;
        let connection = Arc::new(Self {
            stream: Mutex::new(stream),
            breaker,
            process,
            joined: AtomicU64::new(0),
            device,
            splits: AtomicU64::new(0),
        });
        let waiting = Arc::clone(&connection);
        let stream = lock(&connection.stream).try_clone()?;
        std::thread::spawn(move || {
            let mut stream = stream;
            if let Ok([answer]) = get(&mut stream) {
                waiting.joined.store(answer, SeqCst);
            }
        });
        Ok(connection)
    }

    /// Whether all ranks have joined, and whether they may form a communicator.
    pub fn joined(&self) -> Option<bool> {
        match self.joined.load(SeqCst) {
            0 => None,
            answer => Some(answer == JOINED),
        }
    }

    /// Ends the rank's current wait.
    pub fn shut_down(&self) {
        let _ = self.breaker.shutdown(Shutdown::Both);
    }

    /// Ends the rank's communicator, and waits until all ranks have ended theirs or are gone.
    pub fn end(&self) {
        let mut connection = lock(&self.stream);
        let _ = put(&mut connection, &[END, 0]).and_then(|()| get::<1>(&mut connection));
    }

    /// Runs a rank's calls; an error means that the connection was shut down.
    pub fn run(&self, rank: usize, ranks: usize, ops: &[Op]) -> io::Result<()> {
        let mut connection = lock(&self.stream);
        put(&mut connection, &[OPS, ops.len() as u64])?;
        for op in ops {
            put(&mut connection, &[op.kind as u64, op.len as u64, op.dtype as u64, op.root as i64 as u64])?;
            let (sent, _) = sizes(op, rank, ranks);
            if sent > 0 {
                // SAFETY: the call's memory was judged, and is lent until it is done.
                connection.write_all(unsafe { std::slice::from_raw_parts(op.send as *const u8, sent) })?;
            }
        }
        let [_done] = get(&mut connection)?;
        for op in ops {
            let (_, received) = sizes(op, rank, ranks);
            let mut bytes = vec![0; received];
            connection.read_exact(&mut bytes)?;
            // SAFETY: as above.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), op.recv as *mut u8, received) };
        }
        Ok(())
    }

    /// Requests a split. Returns a connection to the new world, its size and the rank there.
    pub fn split(&self, color: i32, key: i32) -> io::Result<Option<(Arc<Self>, usize, usize)>> {
        let split = self.splits.fetch_add(1, SeqCst);
        let reply: [u64; 3] = {
            let mut connection = lock(&self.stream);
            put(&mut connection, &[SPLIT, split, color as i64 as u64, key as i64 as u64])?;
            get(&mut connection)?
        };
        match reply {
            [0, ..] => Ok(None),
            [number, size, place] => {
                let connection =
                    Self::join(self.process, number, (place as usize, self.device), size as usize)?;
                Ok(Some((connection, size as usize, place as usize)))
            }
        }
    }
}
