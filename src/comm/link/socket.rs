//! Helpers for sockets and for the threads that share them.

use crate::error::Refusal;
use std::{
    io::{self, ErrorKind, Read},
    net::{Shutdown, TcpStream},
    sync::{Mutex, MutexGuard},
    time::{Duration, Instant},
};

/// How long [`linger`] reads what the other end still sends.
const LINGER: Duration = Duration::from_millis(200);

/// Why two processes did not connect.
#[derive(Debug)]
pub(crate) enum ConnectError {
    Io(io::Error),
    Refused(Refusal),
}

impl From<io::Error> for ConnectError {
    fn from(error: io::Error) -> Self {
        // TLS reports an alert of the other end when the next bytes are read.
        #[cfg(feature = "tls")]
        if let Some(error) = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) {
            return error.clone().into();
        }
        Self::Io(error)
    }
}

impl From<ErrorKind> for ConnectError {
    fn from(kind: ErrorKind) -> Self {
        Self::Io(kind.into())
    }
}

impl From<Refusal> for ConnectError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Ignores poison, because no critical section leaves its data half changed.
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The time until `until`, which is not 0.
pub(crate) fn remaining(until: Instant) -> io::Result<Duration> {
    let left = until.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// Ends this direction of a connection, and reads the other one until its end, but only briefly.
/// Closing a connection with unread bytes would discard what this end has sent last, such as the
/// reason of a refusal.
pub(crate) fn linger(mut tcp: &TcpStream) {
    let until = Instant::now() + LINGER;
    let _ = tcp.shutdown(Shutdown::Write);
    let mut rest = [0; 1024];
    while let Ok(left) = remaining(until)
        && tcp.set_read_timeout(Some(left)).is_ok()
        && matches!(tcp.read(&mut rest), Ok(1..))
    {}
}
