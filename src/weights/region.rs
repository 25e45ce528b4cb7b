//! Reads runs of items of a tensor: elements, or blocks of quantized weights.

use super::file::DataFile;
use crate::{
    error::{Result, same_size},
    tensor::Region,
};
use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

/// If the gap in the file between two runs has fewer bytes than this, one call reads both runs and
/// the gap. The limit is a page: a disk reads a gap within a page anyway, and copying the gap from
/// memory costs less than a second call. Reads of 512-byte runs are six times as fast as with one
/// call for each run. A larger limit would gain little, and would read the shards of other ranks.
const GAP: usize = 4096;

/// The maximal length of one read in bytes, and of the buffer between file and tensor.
const CHUNK: usize = 1 << 20;

/// Consecutive items of a tensor in a file.
pub(super) struct Run {
    /// The items, counted from the start of the tensor.
    pub(super) items: Range<usize>,
    /// The position of the first item in the region that is read.
    pub(super) to: usize,
}

/// Returns the runs of a region of items.
pub(super) fn runs(region: &Region) -> impl Iterator<Item = Run> {
    let mut to = 0;
    region.runs().into_iter().map(move |items| {
        let run = Run { to, items };
        to += run.items.len();
        run
    })
}

/// The items of one tensor in a file.
pub(super) struct Items<'a> {
    pub(super) file: &'a DataFile,
    /// The offset of the tensor in the file.
    pub(super) start: u64,
    /// The size of an item in bytes.
    pub(super) size: usize,
    /// Is increased by the number of bytes that are read.
    pub(super) bytes_read: &'a AtomicU64,
}

impl Items<'_> {
    /// Reads runs, which are in ascending order. Passes their items to `visit` in chunks of
    /// consecutive items, each with the position of its first item in the region.
    pub(super) fn read(
        &self,
        runs: impl Iterator<Item = Run>,
        mut visit: impl FnMut(usize, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let size = self.size;
        let most = CHUNK / size;
        let mut chunks = runs
            .flat_map(|Run { items, to }| {
                items.clone().step_by(most).map(move |start| Run {
                    items: start..items.end.min(start + most),
                    to: to + (start - items.start),
                })
            })
            .peekable();
        let (mut buffer, mut batch) = (Vec::new(), Vec::new());
        while let Some(first) = chunks.next() {
            let begin = first.items.start;
            let mut end = first.items.end;
            batch.push(first);
            while let Some(next) = chunks
                .next_if(|Run { items, .. }| (items.start - end) * size < GAP && items.end - begin <= most)
            {
                end = next.items.end;
                batch.push(next);
            }
            buffer.resize((end - begin) * size, 0);
            self.file.read_at(&mut buffer, self.start + (begin * size) as u64)?;
            self.bytes_read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
            for Run { items, to } in batch.drain(..) {
                visit(to, &buffer[(items.start - begin) * size..(items.end - begin) * size])?;
            }
        }
        Ok(())
    }
}

/// Checks that there is room for the elements of a region.
pub(super) fn check_elements(needed: usize, given: usize) -> Result<()> {
    same_size("weights", "the elements of the region", needed, "the elements to fill", given)
}

/// Checks that there is room for the blocks of a region.
pub(super) fn check_bytes(needed: usize, given: usize) -> Result<()> {
    same_size("weights", "the bytes of the region's blocks", needed, "the bytes to fill", given)
}
