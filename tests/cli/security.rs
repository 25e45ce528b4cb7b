//! Tests `shardwise key`, `membership` and `info`, and `shardwise launch --tls`.

use crate::launch::{
    fresh_tag, gone_after, keeper_of, kill, long_job, ranks_of_this_program, run, script, text,
};
use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::json;
use shardwise::{Result, Tensor, comm::ReduceOp, launch::Env};
use std::{
    fs,
    io::{BufRead, BufReader, Read},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// A folder of keys and lists.
pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().into()
    }

    /// Makes a key pair, `NAME.pem` and `NAME.pub`. Returns the text of the public key.
    pub(crate) fn key(&self, name: &str) -> String {
        let private = self.path(&format!("{name}.pem"));
        let public = works(&["key", "new", &private]);
        fs::write(self.path(&format!("{name}.pub")), works(&["key", "public", &private])).unwrap();
        public.trim_end().into()
    }

    /// Writes a list of two ranks and an auditor. The key of rank 1 has expired.
    fn list(&self) -> (String, [String; 3]) {
        let (list, keys) = (self.path("list.json"), ["rank0", "rank1", "ann"].map(|name| self.key(name)));
        let json = json!({
            "version": 1, "job": "train-7", "epochs": [0, 9], "not_after": "2999-01-31T00:00:00Z",
            "members": [
                { "name": "ann", "role": "auditor", "key": keys[2] },
                { "rank": 0, "role": "checkpointer", "key": keys[0] },
                { "rank": 1, "role": "trainer", "key": keys[1], "not_after": "2001-01-01T00:00:00Z" },
            ],
        });
        fs::write(&list, json.to_string()).unwrap();
        (list, keys)
    }
}

pub(crate) fn shardwise(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shardwise"));
    command.args(arguments).env_remove("SHARDWISE_POLICY").output().unwrap()
}

pub(crate) fn works(arguments: &[&str]) -> String {
    let output = shardwise(arguments);
    assert!(output.status.success(), "{output:?}");
    text(&output.stdout)
}

/// Checks that a command ends with exit code 1 and prints nothing but an error with these words.
pub(crate) fn fails(arguments: &[&str], words: &str) {
    let output = shardwise(arguments);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stdout.is_empty() && text(&output.stderr).contains(words), "{output:?}");
}

fn mode(path: impl AsRef<Path>) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn keys_are_private_and_not_replaced() {
    let folder = Folder::new();
    let (public, path) = (folder.key("rank0"), folder.path("rank0.pem"));
    assert_eq!(mode(&path), 0o600);
    let pem = fs::read_to_string(folder.path("rank0.pub")).unwrap();
    assert_eq!(pem, format!("-----BEGIN PUBLIC KEY-----\n{public}\n-----END PUBLIC KEY-----\n"));
    assert_ne!(folder.key("rank1"), public);
    let private = fs::read(&path).unwrap();
    fails(&["key", "new", &path], "rank0.pem: File exists");
    assert_eq!(fs::read(&path).unwrap(), private);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o604)).unwrap();
    fails(&["key", "public", &path], "every user can access this private key: mode 604");
    fs::set_permissions(folder.path("rank0.pub"), fs::Permissions::from_mode(0o600)).unwrap();
    fails(&["key", "public", &folder.path("rank0.pub")], "no private key in PEM");
}

#[test]
fn lists_are_signed_and_checked() {
    let (folder, other) = (Folder::new(), Folder::new());
    let (owner, stamp) = (folder.path("owner.pub"), folder.path("list.json.sig"));
    folder.key("owner");
    other.key("owner");
    let (list, keys) = folder.list();
    fails(&["membership", "check", &list, "--owner", &owner], "list.json.sig: No such file");
    assert_eq!(works(&["membership", "sign", &list, "--key", &folder.path("owner.pem")]), "");
    let check = ["membership", "check", &*list, "--owner", &*owner];
    let lines = [
        "job train-7, epochs 0 to 9, expires at 2999-01-31T00:00:00Z".to_string(),
        format!("rank 0: checkpointer, {}, expires at 2999-01-31T00:00:00Z", keys[0]),
        format!("rank 1: trainer, {}, expired at 2001-01-01T00:00:00Z", keys[1]),
        format!("auditor ann: {}, expires at 2999-01-31T00:00:00Z", keys[2]),
    ];
    assert_eq!(works(&check), lines.map(|line| line + "\n").concat());

    let unsigned = "the owner has not signed this file";
    fails(&["membership", "check", &list, "--owner", &other.path("owner.pub")], unsigned);
    let text = fs::read_to_string(&list).unwrap();
    fs::write(&list, text.replace("[0,9]", "[0,10]")).unwrap();
    assert_ne!(fs::read_to_string(&list).unwrap(), text);
    fails(&check, unsigned);
    fs::write(&list, &text).unwrap();
    works(&check);
    works(&["membership", "sign", &list, "--key", &other.path("owner.pem")]);
    fails(&check, unsigned);

    // What is no list is not signed.
    fs::remove_file(&stamp).unwrap();
    fs::write(&list, text.replace("\"rank\":1", "\"rank\":0")).unwrap();
    fails(&["membership", "sign", &list, "--key", &folder.path("owner.pem")], "rank 0 is listed twice");
    assert!(!fs::exists(&stamp).unwrap());
}

/// Whether the program `openssl` can sign with Ed25519: version 3 or later.
fn has_openssl() -> bool {
    let version = Command::new("openssl").arg("version").output();
    let version = version.map_or(String::new(), |output| text(&output.stdout));
    let major = version.strip_prefix("OpenSSL ").and_then(|rest| rest.split('.').next()?.parse::<u32>().ok());
    if major.is_none_or(|major| major < 3) {
        println!("NOT RUN: there is no openssl of version 3: `{}`", version.trim());
        return false;
    }
    true
}

fn openssl(arguments: &[&str]) -> String {
    let output = Command::new("openssl").args(arguments).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    text(&output.stdout)
}

#[test]
fn openssl_reads_these_files_and_its_files_are_read() {
    if !has_openssl() {
        return;
    }
    let folder = Folder::new();
    let (private, public) = (folder.path("openssl.pem"), folder.path("openssl.pub"));
    openssl(&["genpkey", "-algorithm", "ed25519", "-out", &private]);
    openssl(&["pkey", "-in", &private, "-pubout", "-out", &public]);
    assert_eq!(works(&["key", "public", &private]), fs::read_to_string(&public).unwrap());
    folder.key("owner");
    let (own, own_public) = (folder.path("owner.pem"), folder.path("owner.pub"));
    assert_eq!(openssl(&["pkey", "-in", &own, "-pubout"]), fs::read_to_string(&own_public).unwrap());

    let (list, _) = folder.list();
    let signature = format!("{list}.sig");
    let sign = ["pkeyutl", "-sign", "-rawin", "-inkey", &*private, "-in", &*list, "-out", &*signature];
    openssl(&sign);
    works(&["membership", "check", &list, "--owner", &public]);
    works(&["membership", "sign", &list, "--key", &own]);
    let verify = ["pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", &*own_public];
    openssl(&[&verify[..], &["-in", &list, "-sigfile", &signature]].concat());
}

#[test]
fn info_describes_the_build_and_the_policy() {
    let info = |policy: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shardwise"));
        command.arg("info").env("SHARDWISE_POLICY", policy).output().unwrap()
    };
    for (policy, shown) in [("", "any"), ("trusted-network=10.1.0.0/16", "trusted-network=10.1.0.0/16")] {
        let output = info(policy);
        assert!(output.status.success(), "{output:?}");
        let text = text(&output.stdout);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], concat!("shardwise ", env!("CARGO_PKG_VERSION")));
        assert!(lines[1].starts_with("features: ") && lines[1].ends_with("tls (ring, TLS 1.3)"), "{text}");
        assert_eq!(lines[1].contains("mpi"), cfg!(feature = "mpi"));
        assert_eq!(lines[2], format!("system: linux {}", std::env::consts::ARCH));
        assert_eq!(lines[3..], [format!("policy: {shown}")]);
    }
    let output = info("encrypted");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("`encrypted` is no policy"), "{output:?}");
}

/// The program of the ranks. It is no test by itself.
#[test]
#[ignore = "the program of ranks"]
fn rank_with_a_channel() {
    let rank = || -> Result<()> {
        Env::read()?.run(Duration::from_secs(20), |world| {
            let mut x = Tensor::<f64>::full(world.device(), [1], world.rank() as f64)?;
            world.all_reduce(ReduceOp::Sum, &mut x)?;
            let half = world.split_all(world.rank() as u64 % 2)?;
            half.barrier()?;
            let encrypted = [&world, &half].map(|group| group.communicator().channel().encrypted);
            println!("sum {}, encrypted {encrypted:?}", x.to_vec()?[0]);
            // The test examines the job until it writes this file.
            let (go, begin) = (std::env::var_os("GO").map(PathBuf::from), Instant::now());
            while go.as_ref().is_some_and(|go| !go.exists()) && begin.elapsed() < Duration::from_secs(15) {
                thread::sleep(Duration::from_millis(5));
            }
            Ok(())
        })
    };
    rank().unwrap();
}

/// The forms in which the private keys below a folder might be written.
fn secrets(keys: &Path) -> Vec<Vec<u8>> {
    let files = fs::read_dir(keys).unwrap().map(|entry| entry.unwrap().path());
    let private = files.filter(|path| path.extension().is_some_and(|end| end == "pem"));
    let forms = private.flat_map(|path| {
        assert_eq!(mode(&path), 0o600);
        let text = fs::read_to_string(path).unwrap();
        let line = text.lines().nth(1).unwrap();
        let seed = BASE64_STANDARD.decode(line).unwrap().split_off(16);
        assert_eq!(seed.len(), 32);
        let hexadecimal: String = seed.iter().map(|byte| format!("{byte:02x}")).collect();
        [line.into(), BASE64_STANDARD.encode(&seed).into(), hexadecimal.into(), seed]
    });
    forms.collect()
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

/// Returns a file of every process, such as its command line, if this user can read it.
fn of_all_processes(file: &str) -> Vec<u8> {
    let processes = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    processes.filter_map(|process| fs::read(process.join(file)).ok()).flatten().collect()
}

fn all_files(folder: &Path) -> Vec<u8> {
    fs::read_dir(folder).unwrap().flat_map(|entry| fs::read(entry.unwrap().path()).unwrap()).collect()
}

#[test]
fn ranks_with_new_keys_use_tls_and_leave_no_key() {
    let (temporary, folder) = (tempfile::tempdir().unwrap(), Folder::new());
    let (go, records) = (folder.path("go"), folder.path("records"));
    let mut job = ranks_of_this_program(4, &["--tls", "--flight", &records], "security::rank_with_a_channel");
    job.env("TMPDIR", temporary.path()).env("GO", &go).stdout(Stdio::piped()).stderr(Stdio::piped());
    // `--tls` replaces an identity of the environment.
    job.env("SHARDWISE_KEY", "/no/key").env("SHARDWISE_NAME", "/no/name");
    let mut job = job.spawn().unwrap();
    let (mut output, mut lines) = (BufReader::new(job.stdout.take().unwrap()), String::new());
    while lines.matches("sum ").count() < 4 {
        if output.read_line(&mut lines).unwrap() == 0 {
            panic!("{:?}", job.wait_with_output());
        }
    }
    assert_eq!(lines.matches("sum 6, encrypted [true, true]").count(), 4, "{lines}");

    let private: Vec<_> =
        fs::read_dir(temporary.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    let [private] = &private[..] else { panic!("{private:?}") };
    assert_eq!(mode(private), 0o700);
    let secrets = secrets(&private.join("keys"));
    assert_eq!(secrets.len(), 4 * 4);
    let clean = |what: &str, text: &[u8], has: &str| {
        assert!(contains(text, has.as_bytes()), "{what} should have {has}");
        assert!(!secrets.iter().any(|secret| contains(text, secret)), "{what} has a private key");
    };
    clean("a command line", &of_all_processes("cmdline"), &records);
    clean("an environment", &of_all_processes("environ"), "keys/rank3.pem");
    fs::write(&go, "").unwrap();
    output.read_to_string(&mut lines).unwrap();
    let end = job.wait_with_output().unwrap();
    assert!(end.status.success(), "{end:?}");
    clean("the output", &[lines.as_bytes(), &end.stderr].concat(), "sum 6");
    assert_eq!(fs::read_dir(temporary.path()).unwrap().count(), 0);
    clean("a record", &all_files(records.as_ref()), "one machine, TLS 1.3");

    let info = works(&["info", &records]);
    clean("the report", info.as_bytes(), "TLS 1.3");
    let (first, groups) = info.split_once('\n').unwrap();
    assert!(first.starts_with("job ") && first.ends_with(".0: records of 4 of 4 ranks"), "{info}");
    let group = |name: &str, size: usize| format!("group {name}, {size} ranks: one machine, TLS 1.3\n");
    assert_eq!(groups, [group("world", 4), group("world/0", 2), group("world/1", 2)].concat());

    // Rank 2 now contradicts the others.
    let all = fs::read_dir(&records).unwrap().map(|entry| entry.unwrap().path());
    let path = all.into_iter().find(|path| path.to_str().unwrap().ends_with("rank2.jsonl")).unwrap();
    let record = fs::read_to_string(&path).unwrap();
    fs::write(&path, record.replace("one machine, TLS 1.3", "network, plaintext")).unwrap();
    let info = works(&["info", &records]);
    let words = "the ranks disagree: network, plaintext (ranks [2]); one machine, TLS 1.3 (ranks [0, 1, 3])";
    assert!(info.contains(&format!("group world, 4 ranks: {words}\n")), "{info}");
    assert!(info.contains("group world/1, 2 ranks: one machine, TLS 1.3\n"), "{info}");
}

#[test]
fn ranks_without_keys_use_plaintext() {
    let (temporary, folder) = (tempfile::tempdir().unwrap(), Folder::new());
    let records = folder.path("records");
    let mut job = ranks_of_this_program(2, &["--flight", &records], "security::rank_with_a_channel");
    job.env("TMPDIR", temporary.path());
    let output = run(job);
    assert_eq!(text(&output.stdout).matches("sum 1, encrypted [false, false]").count(), 2, "{output:?}");
    let info = works(&["info", &records]);
    assert!(info.contains("group world, 2 ranks: one machine, plaintext\n"), "{info}");
    assert!(info.contains("group world/0, 1 rank: "), "{info}");
}

/// The launcher names each job anew, so no list that was signed before is for this job.
#[test]
fn an_identity_of_the_environment_is_refused_by_name() {
    let folder = Folder::new();
    folder.key("owner");
    let (list, _) = folder.list();
    works(&["membership", "sign", &list, "--key", &folder.path("owner.pem")]);
    let mut job = ranks_of_this_program(2, &[], "security::rank_with_a_channel");
    job.env("SHARDWISE_KEY", folder.path("rank0.pem")).env("SHARDWISE_MEMBERSHIP", &list);
    job.env("SHARDWISE_OWNER", folder.path("owner.pub"));
    let output = run(job);
    assert!(!output.status.success());
    let words = text(&output.stderr);
    assert!(words.contains("list.json: the list is for the job `train-7`, but this job is `"), "{words}");
}

/// A policy that cannot be read is not taken for one that allows everything.
#[test]
fn variables_that_are_not_utf_8_are_refused() {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt};
    let wrong = OsStr::from_bytes(b"require-encrypted\xff");
    let mut info = Command::new(env!("CARGO_BIN_EXE_shardwise"));
    let output = info.arg("info").env("SHARDWISE_POLICY", wrong).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    for variable in ["SHARDWISE_POLICY", "SHARDWISE_KEY"] {
        let mut job = ranks_of_this_program(2, &[], "security::rank_with_a_channel");
        let output = run({
            job.env(variable, wrong);
            job
        });
        let words = format!("{variable} is not valid UTF-8");
        assert!(!output.status.success() && text(&output.stderr).contains(&words), "{output:?}");
    }
}

#[test]
fn a_job_leaves_no_keys_however_it_ends() {
    let temporary = tempfile::tempdir().unwrap();
    let count = || fs::read_dir(temporary.path()).unwrap().count();
    let mut job = script(2, &["--tls"], "[ -s $SHARDWISE_KEY ] && exit 3");
    assert_eq!(job.env("TMPDIR", temporary.path()).output().unwrap().status.code(), Some(3));
    assert_eq!(count(), 0);
    for (signal, is_keeper) in [("-TERM", false), ("-KILL", false), ("-KILL", true), ("-TERM", true)] {
        let tag = fresh_tag();
        let body = "[ -s $SHARDWISE_KEY ] || exit 9; echo ready; exec sleep 1000";
        let mut job = long_job(&tag, &["--tls"], body, temporary.path());
        assert_eq!(count(), 1);
        kill(if is_keeper { keeper_of(&job) } else { job.id() }, signal);
        assert!(!job.wait().unwrap().success());
        gone_after(&tag, Duration::from_secs(2));
        assert_eq!(count(), 0, "{signal}, keeper: {is_keeper}");
    }
    // Without a place for the keys, the ranks do not start.
    let mut job = script(2, &["--tls"], "echo started");
    let output = job.env("TMPDIR", "/no/folder").output().unwrap();
    assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
    assert!(text(&output.stderr).contains("cannot store the ranks' keys: "), "{output:?}");
}
