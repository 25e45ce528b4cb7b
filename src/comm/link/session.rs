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
        // The client's last message of the handshake is followed by its hello: without this option
        // the hello would wait for the acknowledgement, which Linux delays by 40 ms.
        tcp.set_nodelay(true)?;
        let mut buffer = vec![0; CHUNK];
        let made = shake_hands(tcp, &mut connection, &mut buffer, until);
        let received = match made {
            Ok((begin, end)) => Received { buffer, begin, end },
            Err(error) => {
                // Sends the alert that goes with a refusal. A plaintext peer cannot read it.
                if matches!(&error, ConnectError::Refused(refusal) if *refusal != Refusal::Plaintext) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::security::{Identity, Member, Membership, PrivateKey, Role};
    use std::{
        net::{Shutdown, TcpListener},
        sync::atomic::{AtomicBool, Ordering},
        thread,
        time::Duration,
    };

    /// A test does not wait longer for a byte.
    const PATIENCE: Duration = Duration::from_secs(20);
    /// What encryption adds to a record: its head, the type of its content, and its tag.
    const OVERHEAD: usize = 5 + 1 + 16;

    /// One end of a connection.
    struct End {
        tcp: TcpStream,
        session: Session,
    }

    impl Read for &End {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.session.read(&self.tcp, buffer)
        }
    }

    impl Write for &End {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.session.write(&self.tcp, bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl End {
        fn new(tcp: TcpStream, connection: Connection) -> Self {
            let session = Session::handshake(&tcp, connection, Instant::now() + PATIENCE).unwrap();
            tcp.set_read_timeout(Some(PATIENCE)).unwrap();
            tcp.set_write_timeout(Some(PATIENCE)).unwrap();
            Self { tcp, session }
        }
    }

    /// Returns what the two ranks of a job need for TLS.
    fn credentials() -> [Credentials; 2] {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let (owner, keys) = (PrivateKey::generate().unwrap(), ["0.pem", "1.pem"].map(path));
        let members = [0, 1].map(|rank| {
            let key = PrivateKey::generate().unwrap();
            key.write(&keys[rank]).unwrap();
            Member::rank(rank, Role::Trainer, key.public().clone())
        });
        let (membership, public) = (path("membership.json"), path("owner.pub"));
        std::fs::write(&public, owner.public().to_pem()).unwrap();
        Membership::new("job", 0..=0, None, members).unwrap().write(&membership, &owner).unwrap();
        [0, 1].map(|rank: usize| {
            let (key, membership, owner) = (keys[rank].clone(), membership.clone(), public.clone());
            Credentials::load(&Identity::Key { key, membership, owner }, "job", 0, rank).unwrap()
        })
    }

    fn sockets() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let there = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (listener.accept().unwrap().0, there)
    }

    /// Makes the handshake between two sockets.
    fn ends(here: TcpStream, there: TcpStream) -> (End, End) {
        let [rank0, rank1] = credentials();
        thread::scope(|scope| {
            let there = scope.spawn(|| End::new(there, rank1.connect().unwrap()));
            let here = End::new(here, rank0.accept().unwrap());
            (here, there.join().unwrap())
        })
    }

    /// Forwards what arrives until `over`.
    fn forward(mut from: &TcpStream, mut to: &TcpStream, over: &AtomicBool) {
        from.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        let mut buffer = [0; 4096];
        while !over.load(Ordering::SeqCst) {
            if let Ok(count) = from.read(&mut buffer) {
                to.write_all(&buffer[..count]).unwrap();
            }
        }
        from.set_read_timeout(Some(PATIENCE)).unwrap();
    }

    /// Two ends, and the sockets of somebody between them. What an end writes after the handshake
    /// arrives only if the test forwards it.
    fn relayed() -> ((End, TcpStream), (TcpStream, End)) {
        let ((here, near), (far, there)) = (sockets(), sockets());
        let over = AtomicBool::new(false);
        let (here, there) = thread::scope(|scope| {
            scope.spawn(|| forward(&near, &far, &over));
            scope.spawn(|| forward(&far, &near, &over));
            let ends = ends(here, there);
            over.store(true, Ordering::SeqCst);
            ends
        });
        ((here, near), (far, there))
    }

    /// Returns the record in which an end sends 1000 times the byte `byte`.
    fn record(mut from: &End, mut relay: &TcpStream, byte: u8) -> Vec<u8> {
        from.write_all(&[byte; 1000]).unwrap();
        let mut record = vec![0; 1000 + OVERHEAD];
        relay.read_exact(&mut record).unwrap();
        record
    }

    /// Random numbers below `limit`, by the generator of Knuth's MMIX.
    fn random(mut seed: u64, limit: usize) -> impl FnMut() -> usize {
        move || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as usize % limit
        }
    }

    /// The bytes that an end sends from `begin` on.
    fn stream(end: usize, begin: usize, len: usize) -> Vec<u8> {
        (begin..begin + len).map(|at| (at ^ at >> 7 ^ at >> 15 ^ end) as u8).collect()
    }

    #[test]
    fn both_directions_are_used_at_once() {
        const LIMIT: usize = 200_000;
        let (here, there) = sockets();
        let (here, there) = ends(here, there);
        let sizes = |end: usize| {
            let mut size = random(end as u64, LIMIT);
            // An end writes nothing once, and more than it can encrypt at once.
            (0..300).map(move |_| size()).chain([0, 1, CHUNK, CHUNK + 1])
        };
        let total = |end| sizes(end).sum::<usize>();
        assert!(total(0).min(total(1)) > 1 << 24 && total(0) + total(1) > 1 << 25);
        let write = |end: usize, mut to: &End| {
            let mut sent = 0;
            for size in sizes(end) {
                to.write_all(&stream(end, sent, size)).unwrap();
                sent += size;
            }
        };
        let read = |other: usize, mut from: &End| {
            let (mut size, mut came) = (random(other as u64 + 7, LIMIT), 0);
            while came < total(other) {
                let mut bytes = vec![0; size().min(total(other) - came)];
                from.read_exact(&mut bytes).unwrap();
                assert!(bytes == stream(other, came, bytes.len()), "after {came} bytes of end {other}");
                came += bytes.len();
            }
        };
        thread::scope(|scope| {
            for (end, own) in [&here, &there].into_iter().enumerate() {
                scope.spawn(move || write(end, own));
                scope.spawn(move || read(1 - end, own));
            }
        });
    }

    #[test]
    fn an_end_that_is_gone_is_an_error() {
        let (here, there) = sockets();
        let (here, there) = ends(here, there);
        (&there).write_all(&[7; 100_000]).unwrap();
        there.tcp.shutdown(Shutdown::Both).unwrap();
        let mut came = vec![0; 100_000];
        (&here).read_exact(&mut came).unwrap();
        assert!(came == [7; 100_000]);
        assert_eq!((&here).read(&mut came).unwrap_err().kind(), ErrorKind::UnexpectedEof);

        let (here, there) = sockets();
        let (here, there) = ends(here, there);
        let gone = |kind| matches!(kind, ErrorKind::BrokenPipe | ErrorKind::ConnectionReset);
        thread::scope(|scope| {
            let waits = scope.spawn(|| (&here).read_exact(&mut [0]).unwrap_err().kind());
            let writes = scope.spawn(|| {
                loop {
                    if let Err(error) = (&here).write_all(&[7; 50_000]) {
                        return error.kind();
                    }
                }
            });
            (&there).read_exact(&mut vec![0; 1 << 20]).unwrap();
            drop(there);
            let (read, written) = (waits.join().unwrap(), writes.join().unwrap());
            assert!(gone(written), "{written:?}");
            assert!(gone(read) || read == ErrorKind::UnexpectedEof, "{read:?}");
        });
    }

    #[test]
    fn a_read_waits_once() {
        let ((here, near), (mut far, there)) = relayed();
        let (record, mut came) = (record(&here, &near, 7), [0; 2000]);
        for part in [&record[..3], &record[3..700]] {
            far.write_all(part).unwrap();
            assert_eq!((&there).read(&mut came).unwrap_err().kind(), ErrorKind::Interrupted);
        }
        far.write_all(&record[700..]).unwrap();
        assert_eq!((&there).read(&mut came).unwrap(), 1000);
        assert_eq!(came[..1000], [7; 1000]);
    }

    #[test]
    fn records_that_were_changed_repeated_or_left_out_are_refused() {
        // After a record is refused, so is a later one that was not changed. Only `before` may be
        // read.
        let refused = |ends: ((End, TcpStream), (TcpStream, End)), before: &[u8], why: &str| {
            let (((here, near), (mut far, there)), mut came) = (ends, Vec::new());
            for _ in 0..2 {
                let error = (&there).read_to_end(&mut came).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::InvalidData, "{why}: {error}");
                far.write_all(&record(&here, &near, 9)).unwrap();
            }
            assert!(came.is_empty() || came == before, "{why}: {came:?}");
        };
        // The type, the version, the length, and the first and last encrypted byte and byte of the
        // tag.
        for at in [0, 1, 4, 5, 1005, 1006, 1021] {
            let ((here, near), (mut far, there)) = relayed();
            let mut changed = record(&here, &near, 7);
            changed[at] ^= 16;
            far.write_all(&changed).unwrap();
            refused(((here, near), (far, there)), &[], &format!("byte {at} was changed"));
        }
        let ((here, near), (mut far, there)) = relayed();
        far.write_all(&record(&here, &near, 7).repeat(2)).unwrap();
        refused(((here, near), (far, there)), &[7; 1000], "a record was repeated");

        let ((here, near), (mut far, there)) = relayed();
        let _left_out = record(&here, &near, 7);
        far.write_all(&record(&here, &near, 8)).unwrap();
        refused(((here, near), (far, there)), &[], "a record was left out");
    }

    #[test]
    fn a_slow_handshake_ends_in_time() {
        let [rank0, _] = credentials();
        let (here, mut there) = sockets();
        let (begin, patience) = (Instant::now(), Duration::from_millis(350));
        thread::scope(|scope| {
            // The beginning of a hello, which is a record of 4096 bytes.
            let hello = [0x16, 3, 1, 0x10, 0, 1, 0, 0x0f, 0xfc, 3, 3];
            scope.spawn(move || {
                let mut bytes = hello.into_iter().chain(std::iter::repeat(0));
                while bytes.next().is_some_and(|byte| there.write_all(&[byte]).is_ok()) {
                    thread::sleep(Duration::from_millis(100));
                }
            });
            let error = Session::handshake(&here, rank0.accept().unwrap(), begin + patience).unwrap_err();
            let ConnectError::Io(error) = error else { panic!("{error:?}") };
            assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
            let took = begin.elapsed();
            assert!(took >= patience && took < patience + Duration::from_secs(1), "{took:?}");
            drop(here);
        });
    }
}
