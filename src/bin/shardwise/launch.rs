//! `shardwise launch`: the process that the user starts.
//!
//! The ranks are children of another process, the keeper (`keep.rs`), so that one of the two
//! remains to end them whatever happens to the other. The keeper reads from a pipe that only this
//! process holds open. When this process dies, even by SIGKILL, the keeper sees the end of the pipe
//! and ends the ranks. When the keeper dies, the kernel kills the ranks (`PR_SET_PDEATHSIG`). The
//! processes that they started become children of this one (`PR_SET_CHILD_SUBREAPER`), which kills
//! them.
//!
//! When both are killed at once, the kernel kills the ranks, but not the processes that they
//! started. Another process for each rank could detect that, but could be killed as well.

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
    io::{self, Write},
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
};

pub(crate) fn launch(job: &Job) -> io::Result<u8> {
    // The records show which rank failed first. The keeper removes them; if it is killed, this
    // process does.
    let private = if job.records().is_none() {
        let folder = tempfile::Builder::new().prefix("shardwise-").tempdir();
        folder.inspect_err(|error| eprintln!("shardwise: no folder for the ranks' records: {error}")).ok()
    } else {
        None
    };
    set_child_subreaper(Some(getpid()))?;
    let mut signals = Signals::new(FORWARDED)?;
    // In a process group of its own: the ranks then get a terminal's signals once, forwarded by
    // this process.
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
            // It may have ended.
            let _ = kill_process(pid, signal);
        }
    });
    let status = keeper.wait()?;
    drop(lifeline);
    if let Some(signal) = status.signal() {
        tree::kill_descendants();
        let words = format!("shardwise: the process that keeps the ranks was killed by {}\n", name(signal));
        // The reader may be gone.
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
