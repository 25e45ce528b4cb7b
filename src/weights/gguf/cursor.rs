//! Reads the header of a GGUF file value by value.

use super::super::file::DataFile;
use crate::{device::zeroed, error::Result};

/// The length of one read in bytes.
const BUFFER: u64 = 1 << 16;

/// A position in a file, with a buffer of the bytes after it. Each method advances the position.
pub(super) struct Cursor<'a> {
    file: &'a DataFile,
    at: u64,
    buffer: Vec<u8>,
    /// The offset of the buffer in the file.
    start: u64,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(file: &'a DataFile, at: u64) -> Self {
        Self { file, at, buffer: Vec::new(), start: at }
    }

    pub(super) fn file(&self) -> &'a DataFile {
        self.file
    }

    /// The offset in the file.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// The number of bytes from here to the end of the file.
    pub(super) fn left(&self) -> u64 {
        self.file.len() - self.at
    }

    pub(super) fn skip(&mut self, len: u64, what: &str) -> Result<()> {
        self.has(len, what)?;
        self.at += len;
        Ok(())
    }

    /// Checks that the file has `len` more bytes.
    fn has(&self, len: u64, what: &str) -> Result<()> {
        if len <= self.left() {
            return Ok(());
        }
        let (at, left) = (self.at, self.left());
        Err(self.file.bad(format!("{what} at byte {at} has {len} bytes, but {left} bytes follow")))
    }

    pub(super) fn bytes<const LEN: usize>(&mut self, what: &str) -> Result<[u8; LEN]> {
        self.has(LEN as u64, what)?;
        let mut bytes = [0; LEN];
        let end = self.at + LEN as u64;
        if self.at < self.start || end > self.start + self.buffer.len() as u64 {
            self.buffer.resize(BUFFER.min(self.left()) as usize, 0);
            self.file.read_at(&mut self.buffer, self.at)?;
            self.start = self.at;
        }
        let from = (self.at - self.start) as usize;
        bytes.copy_from_slice(&self.buffer[from..from + LEN]);
        self.at = end;
        Ok(bytes)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32> {
        self.bytes(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64> {
        self.bytes(what).map(u64::from_le_bytes)
    }

    /// Reads a number of things, each of at least `size` bytes.
    pub(super) fn count(&mut self, size: u64, what: &str) -> Result<u64> {
        let count = self.u64(what)?;
        if count.checked_mul(size).is_some_and(|bytes| bytes <= self.left()) {
            return Ok(count);
        }
        let reason =
            format!("{what} is {count}, which takes {size} bytes each, but {} bytes follow", self.left());
        Err(self.file.bad(reason))
    }

    /// Reads a text of at most `most` bytes.
    pub(super) fn text(&mut self, most: u64, what: &str) -> Result<String> {
        let (from, len) = (self.at, self.u64(what)?);
        if len > most {
            let reason = format!("{what} at byte {from} has {len} bytes, but at most {most} are allowed");
            return Err(self.file.bad(reason));
        }
        self.has(len, what)?;
        let mut text = zeroed::<u8>(len as usize)?;
        let buffered = self.start..self.start + self.buffer.len() as u64;
        if buffered.contains(&self.at) && self.at + len <= buffered.end {
            let at = (self.at - self.start) as usize;
            text.copy_from_slice(&self.buffer[at..at + len as usize]);
        } else {
            self.file.read_at(&mut text, self.at)?;
        }
        self.at += len;
        String::from_utf8(text).map_err(|_| self.file.bad(format!("{what} at byte {from} is not UTF-8 text")))
    }
}
