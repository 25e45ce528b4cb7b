//! What the members of a job may do.

use crate::error::{Error, Result};
use std::{fmt, str::FromStr, sync::Arc};

/// The role of a key in a job's membership file. What the table does not allow is refused.
///
/// | role | joins the job as a rank | sees the weights of other ranks |
/// |---|---|---|
/// | `Trainer` | yes | no |
/// | `Checkpointer`, `Aggregator` | yes | yes |
/// | `Operator`, `Auditor`, `Owner` | no | no |
///
/// A connection with the key of a role that does not join is refused. Operators, auditors and
/// owners act outside the job, and need no key there: the operating system decides what they may
/// do. They are listed so that nobody can join with their keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Role {
    /// A rank that computes.
    Trainer,
    /// A rank that also writes checkpoints.
    Checkpointer,
    /// A rank that collects sums, and knows the model.
    Aggregator,
    /// Starts and stops the job.
    Operator,
    /// Verifies the audit logs.
    Auditor,
    /// Signs the membership file.
    Owner,
}

impl Role {
    const ALL: [Self; 6] =
        [Self::Trainer, Self::Checkpointer, Self::Aggregator, Self::Operator, Self::Auditor, Self::Owner];

    /// The name in membership files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Trainer => "trainer",
            Self::Checkpointer => "checkpointer",
            Self::Aggregator => "aggregator",
            Self::Operator => "operator",
            Self::Auditor => "auditor",
            Self::Owner => "owner",
        }
    }

    /// Whether it joins the job as a rank.
    pub fn joins(self) -> bool {
        matches!(self, Self::Trainer | Self::Checkpointer | Self::Aggregator)
    }

    /// Whether it may see the weights of other ranks.
    pub fn sees_weights(self) -> bool {
        matches!(self, Self::Checkpointer | Self::Aggregator)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Role {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|role| role.name() == text).ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            Error::invalid("role", format!("`{text}` is no role: there are {known}"))
        })
    }
}

/// The roles of the ranks of a group: [`crate::comm::Communicator::roles`].
///
/// Every rank applies them to what it sends. So a rank whose role may not see the weights of other
/// ranks gets none, whatever program it runs. Ranks agree on the roles, because they are in the
/// signed list that all of them have.
#[derive(Clone, Debug)]
pub struct Roles(Option<Ranks>);

#[derive(Clone, Debug)]
struct Ranks {
    /// In the order of the group's ranks.
    roles: Arc<[Role]>,
    relay: Option<Relay>,
}

/// The rank through which the transport sends every message.
#[derive(Clone, Copy, Debug)]
struct Relay {
    role: Role,
    /// Whether it is a rank of the group.
    is_member: bool,
}

impl Roles {
    /// Every rank may see everything. For transports without a membership file.
    pub const UNRESTRICTED: Self = Self(None);

    /// The roles of ranks that send each other messages without a relay.
    pub fn new(roles: impl Into<Arc<[Role]>>) -> Self {
        Self(Some(Ranks { roles: roles.into(), relay: None }))
    }

    /// The roles of some ranks of this group, in the order of `members`.
    #[must_use]
    pub fn of_members(&self, members: &[usize]) -> Self {
        let of = |ranks: &Ranks| {
            // A rank that is not in the group has no role, and no role may do less than a trainer.
            let role = |&rank: &usize| ranks.roles.get(rank).copied().unwrap_or(Role::Trainer);
            Ranks { roles: members.iter().map(role).collect(), relay: ranks.relay }
        };
        Self(self.0.as_ref().map(of))
    }

    /// These roles on a transport that sends every message through the rank with this role.
    pub(crate) fn relayed(self, role: Role, is_member: bool) -> Self {
        Self(self.0.map(|ranks| Ranks { relay: Some(Relay { role, is_member }), ..ranks }))
    }

    /// These roles on a transport without a relay.
    #[cfg(feature = "nccl")]
    pub(crate) fn direct(self) -> Self {
        Self(self.0.map(|ranks| Ranks { relay: None, ..ranks }))
    }

    /// The role of a rank; none if ranks have no roles.
    pub fn role(&self, rank: usize) -> Option<Role> {
        self.0.as_ref().and_then(|ranks| ranks.roles.get(rank).copied())
    }

    /// Returns [`Error::NotPermitted`] unless all `receivers`, and the relay, may see the weights
    /// of other ranks.
    pub(crate) fn admit(
        &self,
        op: &'static str,
        group: &str,
        receivers: impl IntoIterator<Item = usize>,
    ) -> Result<()> {
        let Some(Ranks { roles, relay }) = &self.0 else { return Ok(()) };
        for rank in receivers {
            let role = roles.get(rank).copied().unwrap_or(Role::Trainer);
            if !role.sees_weights() {
                return Err(not_permitted(op, &format!("rank {rank} of group `{group}`"), role));
            }
        }
        match relay {
            Some(Relay { role, .. }) if !role.sees_weights() => Err(relay_not_permitted(op, *role)),
            _ => Ok(()),
        }
    }

    /// Returns [`Error::NotPermitted`] unless the ranks of the group may send each other the
    /// weights that all of them hold.
    pub(crate) fn admit_replicas(&self, op: &'static str) -> Result<()> {
        match self.0.as_ref().and_then(|ranks| ranks.relay) {
            Some(Relay { role, is_member: false }) if !role.sees_weights() => {
                Err(relay_not_permitted(op, role))
            }
            _ => Ok(()),
        }
    }

    /// The first rank of a group of `size` ranks that may see the weights of the others.
    pub(crate) fn receiver(&self, op: &'static str, group: &str, size: usize) -> Result<usize> {
        let Some(Ranks { roles, .. }) = &self.0 else { return Ok(0) };
        if size == 1 {
            return Ok(0);
        }
        let receiver = roles.iter().position(|role| role.sees_weights());
        let Some(receiver) = receiver else {
            let role = roles.first().copied().unwrap_or(Role::Trainer);
            return Err(not_permitted(op, &format!("every rank of group `{group}`"), role));
        };
        self.admit(op, group, [receiver])?;
        Ok(receiver)
    }
}

fn not_permitted(op: &'static str, who: &str, role: Role) -> Error {
    Error::NotPermitted { op, who: who.into(), role: role.name() }
}

fn relay_not_permitted(op: &'static str, role: Role) -> Error {
    not_permitted(op, "rank 0 of the job, which relays every message,", role)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Role::{Aggregator, Checkpointer, Trainer};

    #[test]
    fn names_are_roles() {
        for role in Role::ALL {
            assert_eq!(role.name().parse::<Role>().unwrap(), role);
        }
        for text in ["", "Trainer", "trainers", "admin"] {
            let error = text.parse::<Role>().unwrap_err().to_string();
            assert!(error.contains("trainer, checkpointer"), "{error}");
        }
    }

    #[test]
    fn a_role_that_is_not_named_sees_nothing() {
        let roles = Roles::new([Checkpointer, Trainer]);
        assert!(roles.admit("save", "world", [0]).is_ok());
        assert!(roles.admit("save", "world", [0, 1]).is_err());
        assert!(roles.admit("save", "world", [2]).is_err());
        assert!(roles.of_members(&[0, 7]).admit("save", "world", [1]).is_err());
        assert!(Roles::new([Trainer; 2]).receiver("save", "world", 2).is_err());
        assert_eq!(roles.of_members(&[1, 0]).receiver("save", "world", 2), Ok(1));
        assert_eq!(Roles::new([Trainer]).receiver("save", "world", 1), Ok(0));
        assert_eq!(Roles::UNRESTRICTED.receiver("save", "world", 3), Ok(0));
    }

    #[test]
    fn a_relay_sees_what_it_relays() {
        let roles = Roles::new([Trainer, Checkpointer, Aggregator]);
        assert!(roles.admit("gather", "world", [1, 2]).is_ok());
        let relayed = roles.clone().relayed(Trainer, true);
        let error = relayed.receiver("save", "world", 3).unwrap_err().to_string();
        assert_eq!(
            error,
            "save: rank 0 of the job, which relays every message, has the role `trainer`, which may not see \
             the weights of other ranks: that needs the role `checkpointer`"
        );
        // The relay holds what the ranks of its own group hold.
        assert!(relayed.admit_replicas("data parallel").is_ok());
        assert!(roles.clone().relayed(Trainer, false).admit_replicas("data parallel").is_err());
        assert!(roles.relayed(Checkpointer, false).admit_replicas("data parallel").is_ok());
    }
}
