//! The output of ranks, line by line, each line after its rank's number.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    thread::{self, JoinHandle},
};

/// Longer lines are split.
const LONGEST: u64 = 1 << 16;

/// Copies a rank's output to `to`, each line after `[rank] `, until it is closed.
pub(crate) fn copy(
    rank: usize,
    from: impl Read + Send + 'static,
    to: impl Write + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(format!("output of rank {rank}")).spawn(move || {
        let (mut from, mut to) = (BufReader::new(from), to);
        let prefix = format!("[{rank}] ").into_bytes();
        let mut line = prefix.clone();
        while matches!((&mut from).take(LONGEST).read_until(b'\n', &mut line), Ok(1..)) {
            if line.last() != Some(&b'\n') {
                line.push(b'\n');
            }
            // One write per line, so that ranks' lines do not mix. Without a reader the ranks run
            // on.
            let _ = to.write_all(&line).and_then(|()| to.flush());
            line.truncate(prefix.len());
        }
    })
}
