//! A TLS session whose two directions are used by two threads.
//!
//! rustls keeps both directions in one `Connection`. It is locked while bytes are encrypted or
//! decrypted, and never during a system call, so a thread that waits for the socket does not stop
//! the other one.

use super::socket::{ConnectError, linger, lock, remaining};
use crate::{error::Refusal, security::Credentials};
use rustls::{AlertDescription, CertificateError, Connection, InvalidMessage};
use std::{
    io::{self, ErrorKind, Read, Write},
    net::TcpStream,
    sync::Mutex,
    time::Instant,
};

/// The maximum number of bytes that are read from the socket, or encrypted, at once: four records
/// of TLS.
const CHUNK: usize = 1 << 16;
/// The label of what both ends derive from a session: see [`Session::binding`].
const LABEL: &[u8] = b"EXPORTER-shardwise";

#[derive(Debug)]
pub(crate) struct Session {
    connection: Mutex<Connection>,
    /// Bytes of the socket that are not decrypted yet. Only the reading thread locks it.
    received: Mutex<Received>,
    /// Encrypted bytes. Locked until they are written, which keeps their order.
    encrypted: Mutex<Vec<u8>>,
}

#[derive(Debug)]
struct Received {
    buffer: Vec<u8>,
    begin: usize,
    end: usize,
}

impl From<rustls::Error> for ConnectError {
    fn from(error: rustls::Error) -> Self {
        use AlertDescription::CertificateExpired;
        use CertificateError::{Expired, ExpiredContext};
        use rustls::Error::{AlertReceived, InvalidCertificate};
        Self::Refused(match error {
            rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => Refusal::Plaintext,
            InvalidCertificate(Expired | ExpiredContext { .. }) | AlertReceived(CertificateExpired) => {
                Refusal::Expired
            }
            error => Refusal::Handshake(error.to_string()),
        })
    }
}

impl Session {
    /// Makes the handshake, by `until` at the latest.
    pub(super) fn handshake(
        tcp: &TcpStream,
        mut connection: Connection,
        until: Instant,
    ) -> Result<Self, ConnectError> {
        let mut buffer = vec![0; CHUNK];
        let made = shake_hands(tcp, &mut connection, &mut buffer, until);
        let received = match made {
            Ok((begin, end)) => Received { buffer, begin, end },
            Err(error) => {
                // A plaintext peer cannot read an alert.
                if !matches!(error, ConnectError::Refused(Refusal::Plaintext)) {
                    let _ = flush(tcp, &mut connection, until);
                    linger(tcp);
                }
                return Err(error);
            }
        };
        let (received, encrypted) = (Mutex::new(received), Mutex::new(Vec::new()));
        Ok(Self { connection: Mutex::new(connection), received, encrypted })
    }

    /// Checks that the other end is rank `rank`.
    pub(crate) fn admit(&self, credentials: &Credentials, rank: usize) -> Result<(), Refusal> {
        credentials.admit(rank, &lock(&self.connection))
    }

    /// Returns 32 bytes that only the two ends of this session know (RFC 8446, section 7.5). A
    /// proof over them is valid for this session only.
    pub(crate) fn binding(&self) -> io::Result<[u8; 32]> {
        let exported = lock(&self.connection).export_keying_material([0; 32], LABEL, None);
        exported.map_err(io::Error::other)
    }

    /// Reads decrypted bytes. Makes at most one system call that may wait, and returns
    /// [`ErrorKind::Interrupted`] if no byte can be decrypted after it.
    pub(super) fn read(&self, mut tcp: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
        let mut received = lock(&self.received);
        let Received { buffer: bytes, begin, end } = &mut *received;
        let mut waited = false;
        loop {
            {
                let mut connection = lock(&self.connection);
                match connection.reader().read(buffer) {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    read => return read,
                }
                if begin < end {
                    *begin += connection.read_tls(&mut &bytes[*begin..*end])?;
                    connection.process_new_packets().map_err(invalid)?;
                    continue;
                }
            }
            if std::mem::replace(&mut waited, true) {
                return Err(ErrorKind::Interrupted.into());
            }
            let count = tcp.read(bytes)?;
            (*begin, *end) = (0, count);
            if count == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Encrypts and sends some of `bytes`. Returns how many.
    pub(super) fn write(&self, mut tcp: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
        let mut encrypted = lock(&self.encrypted);
        encrypted.clear();
        let count = {
            let mut connection = lock(&self.connection);
            let count = connection.writer().write(&bytes[..bytes.len().min(CHUNK)])?;
            while connection.wants_write() {
                connection.write_tls(&mut *encrypted)?;
            }
            count
        };
        tcp.write_all(&encrypted)?;
        Ok(count)
    }
}

/// Makes the handshake. Returns the range of `buffer` that is not used yet.
fn shake_hands(
    mut tcp: &TcpStream,
    connection: &mut Connection,
    buffer: &mut [u8],
    until: Instant,
) -> Result<(usize, usize), ConnectError> {
    let (mut begin, mut end) = (0, 0);
    loop {
        flush(tcp, connection, until)?;
        if !connection.is_handshaking() {
            return Ok((begin, end));
        }
        if begin == end {
            tcp.set_read_timeout(Some(remaining(until)?))?;
            match tcp.read(buffer) {
                Ok(0) => return Err(io::Error::from(ErrorKind::UnexpectedEof).into()),
                Ok(count) => (begin, end) = (0, count),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            }
        }
        begin += connection.read_tls(&mut &buffer[begin..end])?;
        connection.process_new_packets()?;
    }
}

/// Sends what the connection has to send.
fn flush(mut tcp: &TcpStream, connection: &mut Connection, until: Instant) -> io::Result<()> {
    let mut bytes = Vec::new();
    while connection.wants_write() {
        connection.write_tls(&mut bytes)?;
    }
    tcp.set_write_timeout(Some(remaining(until)?))?;
    tcp.write_all(&bytes)
}

fn invalid(error: rustls::Error) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, error)
}
