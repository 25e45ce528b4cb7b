//! Why two processes of a job refuse to connect.

/// Why a process refuses a connection with another one at the rendezvous.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The proof of the shared token failed.
    #[error("the other process has another token (SHARDWISE_TOKEN)")]
    OtherToken,
    /// The jobs' names differ.
    #[error("the other process belongs to another job")]
    OtherJob,
    /// The epochs differ. One process may be left over from an earlier start.
    #[error("the other process belongs to another start of the job")]
    OtherEpoch,
    /// The numbers of ranks differ.
    #[error("the other process has another number of ranks")]
    OtherWorld,
    /// The membership files, or the authorities of certificates and their names, differ.
    #[error("the other process has another membership file, or other authorities of certificates")]
    OtherMembership,
    /// Rank 0 does not connect to itself, and there are no ranks from the number of ranks on.
    #[error("no process can connect as this rank")]
    NoSuchRank,
    /// The rank has connected already.
    #[error("this rank has connected already")]
    Taken,
    /// The membership file does not have the key.
    #[error("the membership file does not have the key")]
    UnknownKey,
    /// The key, or the name of the certificate, is that of another rank or another job.
    #[error("the key or the certificate is not that of the rank")]
    OtherRank,
    /// The membership file has the key, but its role is not that of a rank.
    #[error("the role of the key does not join a job as a rank")]
    Role,
    /// The key, the certificate or the membership file has expired.
    #[error("the key, the certificate or the membership file has expired")]
    Expired,
    /// One of the processes keeps an audit log, and the other does not.
    #[error("only one of the two processes keeps an audit log (SHARDWISE_AUDIT_DIR)")]
    OtherAudit,
    /// One of the processes uses TLS, and the other does not.
    #[error("only one of the two processes uses TLS")]
    Plaintext,
    /// Without a token and without TLS, both processes have to belong to one user.
    #[error("the process at the other end belongs to another user, and there is no token")]
    OtherUser,
    /// The TLS handshake failed for another reason, such as a certificate of an unknown authority
    /// or an earlier version of TLS.
    #[error("the TLS handshake failed: {0}")]
    Handshake(String),
}
