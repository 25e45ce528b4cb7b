//! A TCP connection between two processes, with TLS if the job has identities.

use super::socket::remaining;
#[cfg(feature = "tls")]
use super::{session::Session, socket::ConnectError};
use std::{
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, TcpStream},
    sync::Arc,
    time::Instant,
};

/// One end of a connection. One thread may read while another writes.
#[derive(Debug)]
pub(crate) struct Wire {
    tcp: Arc<TcpStream>,
    #[cfg(feature = "tls")]
    session: Option<Session>,
}

impl Wire {
    /// A connection without TLS.
    pub(crate) fn plain(tcp: Arc<TcpStream>) -> Self {
        Self {
            tcp,
            #[cfg(feature = "tls")]
            session: None,
        }
    }

    /// A connection over which the TLS handshake is made, by `until` at the latest.
    #[cfg(feature = "tls")]
    pub(crate) fn secure(
        tcp: Arc<TcpStream>,
        connection: rustls::Connection,
        until: Instant,
    ) -> Result<Self, ConnectError> {
        let session = Session::handshake(&tcp, connection, until)?;
        Ok(Self { tcp, session: Some(session) })
    }

    /// The TLS session, if there is one.
    #[cfg(feature = "tls")]
    pub(crate) fn session(&self) -> Option<&Session> {
        self.session.as_ref()
    }

    pub(crate) fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    /// Ends the connection. Ignores errors, because it may have ended.
    pub(crate) fn shutdown(&self) {
        let _ = self.tcp.shutdown(Shutdown::Both);
    }

    /// Fills `buffer`. `until` limits the time of the whole call, not of each read.
    pub(crate) fn read_until(&self, mut buffer: &mut [u8], until: Instant) -> io::Result<()> {
        while !buffer.is_empty() {
            self.tcp.set_read_timeout(Some(remaining(until)?))?;
            match (&mut &*self).read(buffer) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => buffer = &mut buffer[count..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes the parts at once. They fit into the buffers of a new connection, so the limit of
    /// each system call is the limit of the whole call.
    pub(crate) fn write_until(&self, parts: &[&[u8]], until: Instant) -> io::Result<()> {
        self.tcp.set_write_timeout(Some(remaining(until)?))?;
        (&mut &*self).write_all(&parts.concat())
    }

    /// Whether the connection is still open. The result is false if the peer has sent bytes that
    /// are unread.
    pub(crate) fn is_open(&self) -> bool {
        let peeked = self.tcp.set_nonblocking(true).and_then(|()| self.tcp.peek(&mut [0]));
        let _ = self.tcp.set_nonblocking(false);
        matches!(peeked, Err(error) if error.kind() == ErrorKind::WouldBlock)
    }
}

impl Read for &Wire {
    /// Like any `Read`, it may return [`ErrorKind::Interrupted`], and then has to be called again.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        #[cfg(feature = "tls")]
        if let Some(session) = &self.session {
            return session.read(&self.tcp, buffer);
        }
        (&*self.tcp).read(buffer)
    }
}

impl Write for &Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        #[cfg(feature = "tls")]
        if let Some(session) = &self.session {
            return session.write(&self.tcp, bytes);
        }
        (&*self.tcp).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
