//! Output of ranks, line by line, behind their numbers.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    thread::{self, JoinHandle},
};

/// A longer line is written in pieces.
const LONGEST: u64 = 1 << 16;

/// Copies what a rank writes to `to`, each line behind `[rank] `, until it is closed.
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
            // One write a line, so that ranks' lines do not mix. If nobody reads them any more, ranks go on all the same.
            let _ = to.write_all(&line).and_then(|()| to.flush());
            line.truncate(prefix.len());
        }
    })
}
