//! Finds and kills the descendants of this process.

use rustix::process::{Pid, Signal, WaitOptions, getpid, kill_process, wait};
use std::{
    collections::HashMap,
    fs,
    time::{Duration, Instant},
};

/// Returns the state and the parent of a process; none if there is no such process.
fn state_and_parent(pid: i32) -> Option<(char, i32)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The program's name is in parentheses and may contain any character, so split after the last
    // parenthesis.
    let mut words = stat.rsplit_once(") ")?.1.split(' ');
    Some((words.next()?.chars().next()?, words.next()?.parse().ok()?))
}

/// Whether a process has been stopped by a signal.
pub(crate) fn is_stopped(pid: Pid) -> bool {
    state_and_parent(pid.as_raw_nonzero().get()).is_some_and(|(state, _)| state == 'T')
}

/// Returns the descendants of this process, and whether each is alive.
fn descendants() -> Vec<(Pid, bool)> {
    let numbers = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = numbers.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let mut children: HashMap<i32, Vec<(i32, bool)>> = HashMap::new();
    for pid in pids {
        if let Some((state, parent)) = state_and_parent(pid) {
            children.entry(parent).or_default().push((pid, state != 'Z'));
        }
    }
    let mut found = Vec::new();
    let mut open = vec![getpid().as_raw_nonzero().get()];
    while let Some(parent) = open.pop() {
        for (child, lives) in children.remove(&parent).unwrap_or_default() {
            // A dead process may still have living children for a moment.
            open.push(child);
            found.extend(Pid::from_raw(child).map(|pid| (pid, lives)));
        }
    }
    found
}

/// Kills the descendants of this process, new ones included, until none is left. This process has
/// to be a subreaper, so that all of them stay its descendants when their parents die.
pub(crate) fn kill_descendants() {
    let begin = Instant::now();
    // Gives up after five seconds, because a process that waits for a disk in the kernel may take
    // long to die.
    while begin.elapsed() < Duration::from_secs(5) {
        let found = descendants();
        for (pid, _) in &found {
            // Ignores errors, because the process may have ended.
            let _ = kill_process(*pid, Signal::KILL);
        }
        while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
        if found.iter().all(|(_, lives)| !lives) {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}
