//! A relay between a rank and rank 0, which records what it forwards.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

/// The bytes of one connection: from the rank to rank 0, and back.
pub(crate) type Recorded = Arc<Mutex<[Vec<u8>; 2]>>;

/// Forwards the connections to a new port to `port`, until it is dropped. `change` may change the
/// bytes: in direction 0 those from the rank to rank 0, in direction 1 those back.
pub(crate) struct Relay {
    pub(crate) port: u16,
    recorded: Arc<Mutex<Vec<Recorded>>>,
    over: Arc<AtomicBool>,
}

impl Relay {
    pub(crate) fn to(port: u16, change: impl Fn(usize, &mut [u8]) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let relay = Self {
            port: listener.local_addr().unwrap().port(),
            recorded: Arc::default(),
            over: Arc::default(),
        };
        let (recorded, over, change) =
            (Arc::clone(&relay.recorded), Arc::clone(&relay.over), Arc::new(change));
        thread::spawn(move || {
            for near in listener.incoming().map(Result::unwrap) {
                if over.load(Ordering::SeqCst) {
                    return;
                }
                // Rank 0 does not listen yet, so the rank connects again.
                let Ok(far) = TcpStream::connect(("127.0.0.1", port)) else { continue };
                let record = Recorded::default();
                recorded.lock().unwrap().push(Arc::clone(&record));
                let ends = (near.try_clone().unwrap(), far.try_clone().unwrap());
                for (direction, mut from, mut to) in [(0, near, far), (1, ends.1, ends.0)] {
                    let (record, change) = (Arc::clone(&record), Arc::clone(&change));
                    thread::spawn(move || {
                        let mut buffer = vec![0; 1 << 16];
                        while let Ok(len @ 1..) = from.read(&mut buffer) {
                            change(direction, &mut buffer[..len]);
                            record.lock().unwrap()[direction].extend(&buffer[..len]);
                            if to.write_all(&buffer[..len]).is_err() {
                                break;
                            }
                        }
                        let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
                    });
                }
            }
        });
        relay
    }

    /// What was forwarded so far, by connection and direction.
    pub(crate) fn recorded(&self) -> Vec<[Vec<u8>; 2]> {
        self.recorded.lock().unwrap().iter().map(|record| record.lock().unwrap().clone()).collect()
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        drop(TcpStream::connect(("127.0.0.1", self.port)));
    }
}
