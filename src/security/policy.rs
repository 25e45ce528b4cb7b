//! Which transports a job may use.

use crate::error::{Error, Result};
use ipnet::IpNet;
use std::{
    env::{self, VarError},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    str::FromStr,
};

/// Between whom a transport carries data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reach {
    /// Threads of one process.
    Process,
    /// Processes of one machine.
    Machine,
    /// Processes that may be on several machines.
    Network,
}

/// How a transport carries the data of a group: [`crate::comm::Communicator::channel`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Channel {
    /// Between whom.
    pub reach: Reach,
    /// Whether the data is encrypted, by TLS 1.3.
    pub encrypted: bool,
}

impl Channel {
    /// The memory of one process.
    pub const MEMORY: Self = Self::plaintext(Reach::Process);

    /// A transport that encrypts nothing.
    pub const fn plaintext(reach: Reach) -> Self {
        Self { reach, encrypted: false }
    }
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.reach, self.encrypted) {
            (Reach::Process, _) => "memory of one process",
            (Reach::Machine, true) => "one machine, TLS 1.3",
            (Reach::Machine, false) => "one machine, plaintext",
            (Reach::Network, true) => "network, TLS 1.3",
            (Reach::Network, false) => "network, plaintext",
        })
    }
}

/// Which transports a job may use between machines. Memory of one process and transports within one
/// machine are always allowed.
///
/// The environment variable `SHARDWISE_POLICY` sets it for processes, as the text in the table.
///
/// | policy | text | transports between machines |
/// |---|---|---|
/// | `Any` | `any` (the default) | all |
/// | `RequireEncrypted` | `require-encrypted` | a `Link` over TLS, and what is staged over it |
/// | `TrustedNetwork` | `trusted-network=10.1.0.0/16` | also plaintext, in that network |
///
/// A trusted network is refused if this machine has no address in it. NCCL and MPI encrypt nothing.
/// In a trusted network, configure them to use its interface (`NCCL_SOCKET_IFNAME`,
/// `btl_tcp_if_include`): this crate cannot check that.
///
/// ```
/// use shardwise::security::Policy;
/// let policy: Policy = "trusted-network=10.1.0.0/16".parse()?;
/// assert_eq!(policy.to_string(), "trusted-network=10.1.0.0/16");
/// # Ok::<(), shardwise::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Policy {
    /// Allows every transport.
    #[default]
    Any,
    /// Refuses plaintext between machines.
    RequireEncrypted,
    /// Refuses plaintext between machines, except in this network.
    TrustedNetwork(IpNet),
}

impl Policy {
    /// The name of the environment variable.
    pub(crate) const VARIABLE: &'static str = "SHARDWISE_POLICY";

    /// Reads the policy of this process's environment; [`Policy::Any`] if it has none.
    ///
    /// # Errors
    /// When the variable is no policy.
    pub fn read() -> Result<Self> {
        match env::var(Self::VARIABLE) {
            Ok(text) if !text.is_empty() => text.parse(),
            Ok(_) | Err(VarError::NotPresent) => Ok(Self::Any),
            Err(VarError::NotUnicode(text)) => text.to_string_lossy().parse(),
        }
    }

    /// Returns [`Error::NotEncrypted`] if the policy forbids a transport. `address` is an
    /// address on the transport, if it is known.
    pub(crate) fn admit(
        &self,
        transport: &'static str,
        channel: Channel,
        address: Option<IpAddr>,
    ) -> Result<()> {
        let network = match self {
            _ if channel.encrypted || channel.reach != Reach::Network => return Ok(()),
            Self::Any => return Ok(()),
            Self::RequireEncrypted => None,
            Self::TrustedNetwork(network) => Some(network),
        };
        let address = address.or_else(|| network.and_then(local_address));
        if network.is_some_and(|network| address.is_some_and(|address| network.contains(&address))) {
            return Ok(());
        }
        let hint = match (network, address) {
            (None, _) => "use a `Link` over TLS (SHARDWISE_KEY), or encrypt below it (WireGuard, IPsec) and \
                          name that network (trusted-network=ADDRESS/BITS)"
                .into(),
            (Some(_), None) => "this machine has no address in that network".into(),
            (Some(_), Some(address)) => format!("the address {address} is not in that network"),
        };
        Err(Error::NotEncrypted { transport, policy: self.to_string(), hint })
    }
}

/// The address that this machine has in a network. Connecting a UDP socket sends nothing: it only
/// selects the address from which a packet would be sent.
fn local_address(network: &IpNet) -> Option<IpAddr> {
    let (any, host) = match network {
        IpNet::V4(network) => (IpAddr::from(Ipv4Addr::UNSPECIFIED), network.hosts().next().map(IpAddr::from)),
        IpNet::V6(network) => (Ipv6Addr::UNSPECIFIED.into(), network.hosts().next().map(IpAddr::from)),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect((host?, 9)).ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|address| network.contains(address))
}

impl FromStr for Policy {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "any" => return Ok(Self::Any),
            "require-encrypted" => return Ok(Self::RequireEncrypted),
            _ => {}
        }
        let network = text.strip_prefix("trusted-network=").and_then(|network| network.parse::<IpNet>().ok());
        network.map(Self::TrustedNetwork).ok_or_else(|| {
            let known = "`any`, `require-encrypted` and `trusted-network=ADDRESS/BITS`";
            Error::invalid("policy", format!("`{text}` is no policy: there are {known}"))
        })
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("any"),
            Self::RequireEncrypted => f.write_str("require-encrypted"),
            Self::TrustedNetwork(network) => write!(f, "trusted-network={network}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_policies() {
        for text in ["any", "require-encrypted", "trusted-network=10.1.0.0/16", "trusted-network=fd00::/8"] {
            assert_eq!(text.parse::<Policy>().unwrap().to_string(), text);
        }
        for text in ["", "Any", "encrypted", "trusted-network=", "trusted-network=10.1.0.0", "10.1.0.0/16"] {
            let error = text.parse::<Policy>().unwrap_err().to_string();
            assert!(error.contains("require-encrypted"), "{error}");
        }
    }

    #[test]
    fn plaintext_between_machines_is_refused() {
        let network = Channel::plaintext(Reach::Network);
        let encrypted = Channel { encrypted: true, ..network };
        let trusted = |text: &str| Policy::TrustedNetwork(text.parse().unwrap());
        for channel in [Channel::MEMORY, Channel::plaintext(Reach::Machine), encrypted] {
            assert_eq!(Policy::RequireEncrypted.admit("NCCL", channel, None), Ok(()));
        }
        assert_eq!(Policy::Any.admit("NCCL", network, None), Ok(()));
        let refused = |policy: Policy, address: Option<&str>| {
            let address = address.map(|address| address.parse().unwrap());
            matches!(
                policy.admit("NCCL", network, address),
                Err(Error::NotEncrypted { transport: "NCCL", .. })
            )
        };
        assert!(refused(Policy::RequireEncrypted, None));
        assert!(refused(Policy::RequireEncrypted, Some("10.1.2.3")));
        assert!(!refused(trusted("10.1.0.0/16"), Some("10.1.2.3")));
        assert!(refused(trusted("10.1.0.0/16"), Some("10.2.2.3")));
        // Every machine has the loopback network. The other one is reserved for documentation.
        assert!(!refused(trusted("127.0.0.0/8"), None));
        assert!(refused(trusted("203.0.113.0/24"), None));
    }
}
