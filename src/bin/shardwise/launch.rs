//! `shardwise launch`: the process that the user starts.
//!
//! The ranks are children of a second process, the keeper (`keep.rs`), so that the ranks end even
//! if one of the two processes is killed. The keeper reads from a pipe that only this process holds
//! open. When this process dies, even by SIGKILL, the keeper sees the end of the pipe and ends the
//! ranks. When the keeper dies, the kernel kills the ranks (`PR_SET_PDEATHSIG`). The processes that
//! the ranks started then become children of this process (`PR_SET_CHILD_SUBREAPER`), which kills
//! them.
//!
//! When both processes are killed at once, the kernel kills the ranks, but not the processes that
//! the ranks started. A third process could kill those, but it could be killed as well.

use crate::{
    job::{Job, LAST_WORDS},
    signals::{FORWARDED, name},
    tree,
};
use rustix::process::{Pid, Signal, getpid, kill_process, set_child_subreaper};
use signal_hook::iterator::Signals;
use std::{
    env,
    ffi::OsStr,
    fs::Permissions,
    io::{self, Write},
    os::unix::{
        fs::PermissionsExt,
        process::{CommandExt, ExitStatusExt},
    },
    process::{Command, Stdio},
    sync::mpsc,
    thread,
};
use tempfile::TempDir;

/// Makes a temporary folder that only the user can read, for the ranks' keys and for their records,
/// unless the job needs none. The keeper removes it. If the keeper is killed, this process removes
/// it.
fn private(job: &Job) -> io::Result<Option<TempDir>> {
    // The records show which rank failed first, so the ranks always write them.
    let records = job.records().is_none();
    if !job.tls && !records {
        return Ok(None);
    }
    let mode = Permissions::from_mode(0o700);
    match tempfile::Builder::new().prefix("shardwise-").permissions(mode).tempdir() {
        Ok(folder) => Ok(Some(folder)),
        Err(error) if job.tls => {
            Err(io::Error::new(error.kind(), format!("cannot store the ranks' keys: {error}")))
        }
        Err(error) => {
            eprintln!("shardwise: cannot record the ranks' calls: {error}");
            Ok(None)
        }
    }
}

pub(crate) fn launch(job: &Job) -> io::Result<u8> {
    let private = private(job)?;
    set_child_subreaper(Some(getpid()))?;
    let mut signals = Signals::new(FORWARDED)?;
    // The keeper gets a separate process group, so that a signal from the terminal reaches the
    // ranks only once: this process forwards it.
    let mut keeper = Command::new(env::current_exe()?)
        .arg("keep")
        .args(private.iter().flat_map(|folder| [OsStr::new("--private"), folder.path().as_os_str()]))
        .args(env::args_os().skip(2))
        .stdin(Stdio::piped())
        .process_group(0)
        .spawn()?;
    let lifeline = keeper.stdin.take();
    let pid = Pid::from_child(&keeper);
    thread::spawn(move || {
        for signal in signals.forever().filter_map(Signal::from_named_raw) {
            // Ignores errors, because the keeper may have ended.
            let _ = kill_process(pid, signal);
        }
    });
    let status = keeper.wait()?;
    drop(lifeline);
    if let Some(signal) = status.signal() {
        tree::kill_descendants();
        let words = format!("shardwise: the parent process of the ranks was killed by {}\n", name(signal));
        // Writes on another thread and waits only briefly, because nobody may read stderr.
        let (said, over) = mpsc::channel();
        thread::spawn(move || {
            let _ = io::stderr().write_all(words.as_bytes());
            said.send(())
        });
        let _ = over.recv_timeout(LAST_WORDS);
        return Ok(128 + signal as u8);
    }
    Ok(status.code().unwrap_or(1) as u8)
}
