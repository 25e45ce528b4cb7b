//! What a process needs to open TLS connections: its key, and how it recognizes the other ranks.
//!
//! TLS proves that the other process has the private key of the public key or certificate that it
//! presents, and that an authority has signed the certificate. [`Credentials::admit`] then decides
//! whether this is the key of the rank that the process claims to be.

use super::{
    Identity, Membership, PrivateKey, PublicKey, Roles,
    audit::Signer,
    keys::{not_pem, read_file, unusable},
};
use crate::error::{Error, Refusal, Result};
use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig,
    ServerConnection, SignatureScheme,
    client::{
        AlwaysResolvesClientRawPublicKeys, Resumption, WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_name,
    },
    crypto::{CryptoProvider, ring::default_provider, verify_tls13_signature_with_raw_key},
    pki_types::{
        CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime,
        pem::{self, PemObject},
    },
    server::{
        AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
    version::TLS13,
};
use sha2::{Digest, Sha256};
use std::{path::Path, sync::Arc, time::SystemTime};

const MAX_BYTES: u64 = 1 << 20;
/// The application protocol, so that no other protocol's TLS connection is taken for one of these.
const PROTOCOL: &[u8] = b"shardwise";
/// A label of a DNS name that no certificate of a rank has.
const NO_RANK: &str = "not-the-name-of-a-rank";

/// A process's key, as TLS configurations, and the keys or names of the other ranks.
#[derive(Clone, Debug)]
pub(crate) struct Credentials {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    ranks: Ranks,
    signer: Option<Signer>,
    /// A hash of what all ranks must have in common.
    digest: [u8; 32],
}

/// How a rank is recognized.
#[derive(Clone, Debug)]
enum Ranks {
    Keys(Arc<Membership>),
    /// The name of a rank's certificate, with `{rank}` in it.
    Names(String),
}

/// The configurations of rank 0 and of the other ranks.
type Configurations = (ServerConfig, ClientConfig);

impl Credentials {
    /// Reads the files of an identity, and checks that they are those of rank `rank` of this start
    /// of the job.
    ///
    /// # Errors
    /// When a file cannot be used, or is another rank's, another job's or another start's, or has
    /// expired.
    pub(crate) fn load(identity: &Identity, job: &str, epoch: u64, rank: usize) -> Result<Self> {
        match identity {
            Identity::Key { key, membership, owner } => {
                let (private, owner) = (PrivateKey::read(key)?, PublicKey::read(owner)?);
                let list = Membership::read(membership, &owner)?;
                let bad = |reason: String| Err(unusable(membership, reason));
                if list.job() != job {
                    let listed = list.job();
                    let named = "SHARDWISE_JOB names it, or else the launcher";
                    return bad(format!(
                        "the list is for the job `{listed}`, but this job is `{job}`: {named}"
                    ));
                }
                if !list.epochs().contains(&epoch) {
                    let (first, last) = list.epochs().into_inner();
                    return bad(format!(
                        "the list is for epochs {first} to {last}, but this is epoch {epoch}"
                    ));
                }
                if let Err(refusal) = list.admit(rank, private.public().der(), SystemTime::now()) {
                    return bad(format!("{} cannot be used for rank {rank}: {refusal}", key.display()));
                }
                let configurations = raw_keys(&private).map_err(|error| unusable(key, error.to_string()))?;
                let digest = list.digest();
                Ok(Self::new(configurations, Ranks::Keys(Arc::new(list)), Signer::of(&private), digest))
            }
            Identity::Certificate { key, certificate, authority, name } => {
                if !name.contains("{rank}") || !name.contains("{job}") {
                    let reason = format!(
                        "the name `{name}` needs {{rank}} and {{job}}, so that no certificate is valid for another rank or job"
                    );
                    return Err(Error::invalid("identity", reason));
                }
                if !separates_rank(name) {
                    let reason = format!(
                        "in the name `{name}`, {{rank}} must not be next to {{job}} or a digit: rank 2 of the job `a1` \
                         could have the name of rank 12 of `a`"
                    );
                    return Err(Error::invalid("identity", reason));
                }
                let ranks = Ranks::Names(name.replace("{job}", job));
                let private = PrivateKey::read(key)?;
                let (chain, roots) = (certificates(certificate)?, certificates(authority)?);
                ranks.admit(rank, &chain).map_err(|refusal| {
                    let reason = format!("not the certificate of `{}`: {refusal}", ranks.name(rank));
                    unusable(certificate, reason)
                })?;
                let mut hash = Sha256::new_with_prefix(name);
                let mut store = RootCertStore::empty();
                for root in roots {
                    hash.update(&root);
                    store.add(root).map_err(|error| unusable(authority, error.to_string()))?;
                }
                let configurations = x509(&private, chain, Arc::new(store));
                let configurations = configurations.map_err(|reason| unusable(certificate, reason))?;
                Ok(Self::new(configurations, ranks, Signer::of(&private), hash.finalize().into()))
            }
        }
    }

    fn new(
        (mut server, mut client): Configurations,
        ranks: Ranks,
        signer: Option<Signer>,
        digest: [u8; 32],
    ) -> Self {
        server.alpn_protocols = vec![PROTOCOL.into()];
        client.alpn_protocols = vec![PROTOCOL.into()];
        // Every connection does the whole handshake, so no ticket has to be kept secret.
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        client.resumption = Resumption::disabled();
        client.enable_sni = false;
        Self { server: Arc::new(server), client: Arc::new(client), ranks, signer, digest }
    }

    /// The key with which this rank signs its audit log; none if it is not Ed25519.
    pub(crate) fn signer(&self) -> Option<Signer> {
        self.signer.clone()
    }

    /// The roles of the ranks; unrestricted with certificates, which have none.
    pub(crate) fn roles(&self, world: usize) -> Roles {
        match &self.ranks {
            Ranks::Keys(list) => list.roles(world),
            Ranks::Names(_) => Roles::UNRESTRICTED,
        }
    }

    /// A hash of the membership file, or of the authorities and names of certificates.
    pub(crate) fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// Rank 0's end of a new connection.
    pub(crate) fn accept(&self) -> Result<rustls::Connection, rustls::Error> {
        Ok(ServerConnection::new(Arc::clone(&self.server))?.into())
    }

    /// The other end of a new connection to rank 0.
    pub(crate) fn connect(&self) -> Result<rustls::Connection, rustls::Error> {
        let name = ServerName::try_from(self.ranks.name(0))
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        Ok(ClientConnection::new(Arc::clone(&self.client), name)?.into())
    }

    /// Checks that the other end of a connection is rank `rank`. Its handshake has to be complete.
    pub(crate) fn admit(&self, rank: usize, connection: &rustls::Connection) -> Result<(), Refusal> {
        self.ranks.admit(rank, connection.peer_certificates().unwrap_or_default())
    }
}

impl Ranks {
    /// The DNS name of a rank's certificate. With keys, a name that nothing reads.
    fn name(&self, rank: usize) -> String {
        match self {
            Self::Keys(_) => format!("rank-{rank}"),
            Self::Names(name) => name.replace("{rank}", &rank.to_string()),
        }
    }

    /// Checks the key or certificate of a rank.
    fn admit(&self, rank: usize, presented: &[CertificateDer<'_>]) -> Result<(), Refusal> {
        let first = presented.first().ok_or(Refusal::UnknownKey)?;
        match self {
            Self::Keys(list) => list.admit(rank, first, SystemTime::now()),
            Self::Names(_) => {
                let name = ServerName::try_from(self.name(rank)).map_err(|_| Refusal::OtherRank)?;
                let parsed = ParsedCertificate::try_from(first).map_err(|_| Refusal::UnknownKey)?;
                verify_server_name(&parsed, &name).map_err(|_| Refusal::OtherRank)?;
                // A wildcard stands for the first label of a name, so it would be every rank's.
                let others = name.to_str();
                let others = others.split_once('.').map(|(_, rest)| format!("{NO_RANK}.{rest}"));
                let others = others.and_then(|others| ServerName::try_from(others).ok());
                let is_wild = others.is_some_and(|others| verify_server_name(&parsed, &others).is_ok());
                if is_wild { Err(Refusal::OtherRank) } else { Ok(()) }
            }
        }
    }
}

/// Whether no other part of a name can be read as a digit of the rank.
fn separates_rank(name: &str) -> bool {
    let joins = |near: Option<char>| near.is_some_and(|near| near.is_ascii_digit() || "{}".contains(near));
    let parts: Vec<_> = name.split("{rank}").collect();
    parts.windows(2).all(|pair| !joins(pair[0].chars().next_back()) && !joins(pair[1].chars().next()))
}

/// Reads the certificates of a PEM file.
fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let text = read_file(path, MAX_BYTES)?;
    let all = CertificateDer::pem_slice_iter(&text).collect::<Result<Vec<_>, _>>();
    let all = all.and_then(|all| if all.is_empty() { Err(pem::Error::NoItemsFound) } else { Ok(all) });
    all.map_err(|error| not_pem(path, "CERTIFICATE", error))
}

/// The configurations of TLS with X.509 certificates.
fn x509(
    key: &PrivateKey,
    chain: Vec<CertificateDer<'static>>,
    roots: Arc<RootCertStore>,
) -> Result<Configurations, String> {
    let provider = Arc::new(default_provider());
    let text = |error: rustls::Error| error.to_string();
    let clients = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider));
    let clients = clients.build().map_err(|error| error.to_string())?;
    let servers = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider));
    let servers = servers.build().map_err(|error| error.to_string())?;
    let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13])
        .map_err(text)?
        .with_client_cert_verifier(clients)
        .with_single_cert(chain.clone(), key.der()?)
        .map_err(text)?;
    let client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(text)?
        .with_webpki_verifier(servers)
        .with_client_auth_cert(chain, key.der()?)
        .map_err(text)?;
    Ok((server, client))
}

/// The configurations of TLS with raw public keys.
fn raw_keys(key: &PrivateKey) -> Result<Configurations, rustls::Error> {
    let provider = Arc::new(default_provider());
    let verifier = Arc::new(RawKeys(Arc::clone(&provider)));
    let public = CertificateDer::from(key.public().der().to_vec());
    let certified = Arc::new(CertifiedKey::new(vec![public], key.signing()));
    let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::clone(&verifier) as Arc<dyn ClientCertVerifier>)
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(Arc::clone(&certified))));
    let client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(certified)));
    Ok((server, client))
}

/// Verifies that the other end has the private key of its public key. Whose key it is,
/// [`Credentials::admit`] checks after the handshake: a refusal then has a reason that both sides
/// report, which an alert of TLS has not.
#[derive(Debug)]
struct RawKeys(Arc<CryptoProvider>);

/// The methods that the verifiers of servers and of clients have in common.
macro_rules! signatures_of_raw_keys {
    () => {
        /// The configurations allow TLS 1.3 only.
        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            Err(rustls::Error::General("TLS 1.2 has no raw public keys".into()))
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            key: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            let key = SubjectPublicKeyInfoDer::from(key.as_ref());
            let algorithms = &self.0.signature_verification_algorithms;
            verify_tls13_signature_with_raw_key(message, &key, signature, algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.0.signature_verification_algorithms.supported_schemes()
        }

        fn requires_raw_public_keys(&self) -> bool {
            true
        }
    };
}

impl ServerCertVerifier for RawKeys {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    signatures_of_raw_keys!();
}

impl ClientCertVerifier for RawKeys {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    signatures_of_raw_keys!();
}
