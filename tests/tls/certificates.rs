//! Ranks with X.509 certificates.

use crate::job::{DEADLINE, env, free_port, run};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
use shardwise::{Error, Refusal, Tensor, comm::ReduceOp, launch::Env, security::Identity};
use std::{fs, path::Path, thread, time::Duration};
use tempfile::TempDir;

const NAME: &str = "rank-{rank}.{job}.example";

/// An authority, and a folder for certificates.
struct Authority {
    folder: TempDir,
    issuer: Issuer<'static, KeyPair>,
    port: u16,
}

impl Authority {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        fs::write(folder.path().join("authority.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Self { folder, issuer: Issuer::new(params, key), port: free_port() }
    }

    /// Writes a certificate for DNS names and its key.
    fn certificate(&self, file: &str, names: &[&str], change: impl FnOnce(&mut CertificateParams)) {
        let mut params =
            CertificateParams::new(names.iter().map(|name| name.to_string()).collect::<Vec<_>>()).unwrap();
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let path = |end: &str| self.folder.path().join(format!("{file}.{end}"));
        fs::write(path("pem"), certificate.pem()).unwrap();
        private(&path("key"), &key.serialize_pem());
    }

    fn env(&self, rank: usize, world: usize, file: &str) -> Env {
        let path = |name: String| self.folder.path().join(name);
        let identity = Identity::Certificate {
            key: path(format!("{file}.key")),
            certificate: path(format!("{file}.pem")),
            authority: path("authority.pem".into()),
            name: NAME.into(),
        };
        with!(env(rank, world, self.port), identity = Some(identity), job = "job".into())
    }
}

fn private(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    #[cfg(unix)]
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
}

/// Returns the reasons that rank 0 and a visitor report.
fn refused(host: Env, visitor: Env) -> [Option<Refusal>; 2] {
    let patience = Duration::from_millis(400);
    thread::scope(|scope| {
        let host = scope.spawn(move || host.run(2 * patience, |_| Ok(())));
        let visitor = match visitor.run(patience, |_| Ok(())) {
            Err(Error::Refused { refusal, .. }) => refusal,
            other => panic!("{other:?}"),
        };
        match host.join().unwrap() {
            Err(Error::NotConnected { last, refused: 1.., .. }) => [last, Some(visitor)],
            other => panic!("{other:?}"),
        }
    })
}

#[test]
fn ranks_with_certificates_form_a_group() {
    let authority = Authority::new();
    for rank in 0..3 {
        authority.certificate(&format!("rank{rank}"), &[&format!("rank-{rank}.job.example")], |_| ());
    }
    let envs = (0..3).map(|rank| authority.env(rank, 3, &format!("rank{rank}"))).collect();
    let sums = run(DEADLINE, envs, |group| {
        assert!(group.communicator().channel().encrypted);
        let mut x = Tensor::<f64>::full(group.device(), [2], group.rank() as f64)?;
        group.all_reduce(ReduceOp::Sum, &mut x)?;
        x.to_vec()
    });
    assert_eq!(sums, vec![Ok(vec![3.0; 2]); 3]);
}

#[test]
fn certificates_of_others_are_refused() {
    let (authority, other) = (Authority::new(), Authority::new());
    let ranks = |authority: &Authority| {
        for rank in 0..2 {
            authority.certificate(&format!("rank{rank}"), &[&format!("rank-{rank}.job.example")], |_| ());
        }
    };
    ranks(&authority);
    ranks(&other);
    let host = || authority.env(0, 2, "rank0");
    // Another authority has signed the visitor's certificate.
    let visitor = with!(other.env(1, 2, "rank1"), port = authority.port);
    let [here, there] = refused(host(), visitor);
    assert!(
        matches!((&here, &there), (Some(Refusal::Handshake(_)), Some(Refusal::Handshake(_)))),
        "{here:?} {there:?}"
    );
    let expired = |params: &mut CertificateParams| params.not_after = date_time_ymd(2020, 1, 1);
    authority.certificate("expired", &["rank-1.job.example"], expired);
    let expired = refused(host(), authority.env(1, 2, "expired"));
    assert_eq!(expired, [Some(Refusal::Expired), Some(Refusal::Expired)]);
    // A certificate of rank 2, for a visitor that reads names differently.
    authority.certificate("two", &["rank-2.job.example", "x1.job.example"], |_| ());
    let mut visitor = authority.env(1, 2, "two");
    if let Some(Identity::Certificate { name, .. }) = &mut visitor.identity {
        *name = "x{rank}.{job}.example".into();
    }
    authority.certificate("zero", &["rank-0.job.example", "x0.job.example"], |_| ());
    let outcome = refused(authority.env(0, 2, "zero"), visitor);
    assert_eq!(outcome, [Some(Refusal::OtherRank), Some(Refusal::OtherRank)]);
    // Rank 0's certificate is that of another job, which the visitor finds out.
    authority.certificate("job", &["rank-0.job.example"], |_| ());
    authority.certificate("other", &["rank-1.other.example"], |_| ());
    let visitor = with!(authority.env(1, 2, "other"), job = "other".into());
    let [here, there] = refused(authority.env(0, 2, "job"), visitor);
    assert!(
        matches!((&here, &there), (Some(Refusal::Handshake(_)), Some(Refusal::Handshake(_)))),
        "{here:?} {there:?}"
    );
}

/// A certificate with a wildcard would be that of every rank.
#[test]
fn certificates_with_wildcards_are_refused() {
    let authority = Authority::new();
    authority.certificate("any", &["*.job.example"], |_| ());
    authority.certificate("both", &["rank-1.job.example", "*.job.example"], |_| ());
    for (rank, file) in [(0, "any"), (1, "any"), (1, "both")] {
        let error = authority.env(rank, 2, file).run(Duration::from_millis(300), |_| Ok(())).unwrap_err();
        assert!(
            matches!(&error, Error::Credential { reason, .. } if reason.contains("not that of the rank")),
            "{error}"
        );
    }
}

/// With such a name, the certificate of rank 2 of the job `a1` would be that of rank 12 of `a`.
#[test]
fn names_that_mix_rank_and_job_are_refused() {
    let authority = Authority::new();
    authority.certificate("rank0", &["job0.example", "0job.example", "job00.example"], |_| ());
    for template in ["{job}{rank}.example", "{rank}{job}.example", "{job}0{rank}.example"] {
        let mut env = authority.env(0, 2, "rank0");
        if let Some(Identity::Certificate { name, .. }) = &mut env.identity {
            *name = template.into();
        }
        let error = env.run(Duration::from_millis(300), |_| Ok(())).unwrap_err();
        assert!(matches!(&error, Error::Invalid { .. }) && error.to_string().contains(template), "{error}");
    }
}

#[test]
fn a_certificate_that_is_not_the_ranks_is_refused_before_anything_is_sent() {
    let authority = Authority::new();
    authority.certificate("rank0", &["rank-0.job.example"], |_| ());
    let error = authority.env(1, 2, "rank0").run(DEADLINE, |_| Ok(())).unwrap_err();
    assert!(
        matches!(&error, Error::Credential { reason, .. } if reason.contains("rank-1.job.example")),
        "{error}"
    );
    let mut env = authority.env(0, 2, "rank0");
    if let Some(Identity::Certificate { name, .. }) = &mut env.identity {
        *name = "rank-{rank}.example".into();
    }
    let error = env.run(DEADLINE, |_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("{job}"), "{error}");
    // The key is another certificate's.
    authority.certificate("rank1", &["rank-1.job.example"], |_| ());
    fs::copy(authority.folder.path().join("rank0.key"), authority.folder.path().join("rank1.key")).unwrap();
    let error = authority.env(1, 2, "rank1").run(DEADLINE, |_| Ok(())).unwrap_err();
    assert!(matches!(error, Error::Credential { .. }), "{error}");
}
