//! Jobs whose processes are threads, each with its own environment, key and membership file.

use shardwise::{
    Result,
    comm::Group,
    device::Cpu,
    launch::Env,
    security::{Identity, Member, Membership, PrivateKey, Role},
};
use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    sync::Mutex,
    thread,
    time::Duration,
};
use tempfile::TempDir;

pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// Held by tests that have as many connections as rank 0 examines, so that their threads can be
/// counted.
pub(crate) static CROWD: Mutex<()> = Mutex::new(());

/// The keys of a job named `job`, and its signed membership file.
pub(crate) struct Job {
    folder: TempDir,
    pub(crate) owner: PrivateKey,
    pub(crate) keys: Vec<PrivateKey>,
    pub(crate) port: u16,
}

/// Returns a port that was free a moment ago.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Returns the environment of a rank on this machine, without a token and without an identity.
pub(crate) fn env(rank: usize, world: usize, port: u16) -> Env {
    let numbers = [rank, world, rank, world, port as usize].map(|number| number.to_string());
    let names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SHARDWISE_PORT"];
    let value = |name: &str| Some(numbers[names.iter().position(|known| *known == name)?].clone());
    Env::of(value).unwrap()
}

/// Runs ranks with the given environments.
pub(crate) fn run<R: Send>(
    deadline: Duration,
    envs: Vec<Env>,
    rank: impl Fn(Group<Cpu>) -> Result<R> + Sync,
) -> Vec<Result<R>> {
    thread::scope(|scope| {
        let start = |env: Env| {
            let rank = &rank;
            scope.spawn(move || env.run(deadline, rank))
        };
        let started: Vec<_> = envs.into_iter().map(start).collect();
        started.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

impl Job {
    pub(crate) fn new(world: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let key = |_| PrivateKey::generate().unwrap();
        let (owner, keys) = (key(0), (0..world).map(key).collect());
        let job = Self { folder, owner, keys, port: free_port() };
        for (rank, key) in job.keys.iter().enumerate() {
            key.write(job.path(&format!("rank{rank}.pem"))).unwrap();
        }
        fs::write(job.path("owner.pub"), job.owner.public().to_pem()).unwrap();
        job.list("membership.json", |_| ());
        job
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The members, with each rank's own key.
    pub(crate) fn members(&self) -> Vec<Member> {
        let member =
            |(rank, key): (usize, &PrivateKey)| Member::rank(rank, Role::Checkpointer, key.public().clone());
        self.keys.iter().enumerate().map(member).collect()
    }

    /// Writes another membership file of the job, signed by its owner.
    pub(crate) fn list(&self, name: &str, change: impl FnOnce(&mut Vec<Member>)) -> PathBuf {
        let mut members = self.members();
        change(&mut members);
        let path = self.path(name);
        Membership::new("job", 0..=1, None, members).unwrap().write(&path, &self.owner).unwrap();
        path
    }

    /// An identity with a key file and a membership file of this job.
    pub(crate) fn identity(&self, key: &str, membership: &Path) -> Option<Identity> {
        let (key, membership, owner) = (self.path(key), membership.into(), self.path("owner.pub"));
        Some(Identity::Key { key, membership, owner })
    }

    /// The environment of a rank.
    pub(crate) fn env(&self, rank: usize) -> Env {
        let mut env = env(rank, self.keys.len(), self.port);
        env.identity = self.identity(&format!("rank{rank}.pem"), &self.path("membership.json"));
        env.job = "job".into();
        env
    }
}
