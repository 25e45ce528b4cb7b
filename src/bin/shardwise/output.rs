//! Copies the output of the ranks line by line, and prefixes each line with its rank.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    thread::{self, JoinHandle},
};

/// The maximum number of bytes in a line. Longer lines are split.
const LONGEST: u64 = 1 << 16;

/// Copies a rank's output to `to` until the rank closes it. Each line gets the prefix `[rank] `.
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
            // One write per line, so that the lines of ranks do not mix. Write errors are ignored,
            // so that the ranks continue if nobody reads `to`.
            let _ = to.write_all(&line).and_then(|()| to.flush());
            line.truncate(prefix.len());
        }
    })
}
