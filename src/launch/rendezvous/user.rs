//! Whether both ends of a loopback connection belong to the same user.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr, TcpStream},
};

/// Whether this system reports the users of connections.
pub(super) const CAN_CHECK: bool = cfg!(target_os = "linux");

/// The user as whom the kernel shows all users that this process's user namespace does not have. In
/// the first namespace it is the user `nobody`.
const UNMAPPED: u32 = 65534;

/// Whether both ends of a connection within this machine belong to the same user. The other end has
/// to have accepted the connection: before that, it belongs to no user.
///
/// The kernel lists each end of a connection with its user (`/proc/net/tcp`, see proc_net_tcp(5)).
pub(super) fn same_user(tcp: &TcpStream) -> io::Result<bool> {
    let (here, there) = (tcp.local_addr()?, tcp.peer_addr()?);
    let path = if here.is_ipv4() { "/proc/net/tcp" } else { "/proc/net/tcp6" };
    let table = fs::read_to_string(path).map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("{path} has the users of connections: {error}: set SHARDWISE_TOKEN"),
        )
    })?;
    let (own, other) = (user(&table, here, there), user(&table, there, here));
    if own == Some(UNMAPPED) && !has_all_users(&fs::read_to_string("/proc/self/uid_map")?) {
        return Ok(false);
    }
    Ok(own.is_some() && own == other)
}

/// Whether a user namespace has all users (user_namespaces(7)), so that none is shown as another.
fn has_all_users(map: &str) -> bool {
    map.lines().any(|line| line.split_ascii_whitespace().nth(2) == Some("4294967295"))
}

/// The user of the end at `local` of a connection with `remote`; none if it is not in the table.
fn user(table: &str, local: SocketAddr, remote: SocketAddr) -> Option<u32> {
    let (local, remote) = (hexadecimal(local), hexadecimal(remote));
    table.lines().skip(1).find_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        // The fields: local and remote address, state, queues, timer, retransmissions, user.
        let ends = (fields.next()?, fields.next()?);
        if ends == (&*local, &*remote) { fields.nth(4)?.parse().ok() } else { None }
    })
}

/// An address as the kernel prints it: words in the machine's byte order, and the port.
fn hexadecimal(address: SocketAddr) -> String {
    let octets = match address.ip() {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let words = octets.as_chunks().0.iter().map(|word| format!("{:08X}", u32::from_ne_bytes(*word)));
    format!("{}:{:04X}", words.collect::<String>(), address.port())
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn both_ends_of_a_connection_of_this_process_have_its_user() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            // A machine may have no IPv6.
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let visitor = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (host, _) = listener.accept().unwrap();
            assert!(same_user(&visitor).unwrap() && same_user(&host).unwrap(), "{address}");
        }
    }

    #[test]
    fn namespaces_without_all_users_are_known() {
        assert!(has_all_users("         0          0 4294967295\n"));
        for map in ["", "0 1000 1\n", "0 1000 1\n1 100000 65536\n"] {
            assert!(!has_all_users(map), "{map}");
        }
    }

    #[test]
    fn users_are_read_from_the_kernels_table() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
            0: 0100007F:1F90 0100007F:D431 01 00000000:00000000 00:00000000 00000000  1000        0 1 1 0 20 4 30 10 -1\n   \
            1: 0100007F:D431 0100007F:1F90 01 00000000:00000000 00:00000000 00000000  1001        0 2 1 0 20 4 30 10 -1\n";
        let (here, there) = ("127.0.0.1:8080".parse().unwrap(), "127.0.0.1:54321".parse().unwrap());
        if cfg!(target_endian = "little") {
            assert_eq!(user(table, here, there), Some(1000));
            assert_eq!(user(table, there, here), Some(1001));
            assert_eq!(user(table, here, "127.0.0.1:1".parse().unwrap()), None);
        }
    }
}
