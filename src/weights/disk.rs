//! The file operations of a save. All of them are methods of [`Disk`], so that tests can inject
//! faults.

use crate::error::{Error, Result};
use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::Path,
};

/// The size of the write buffer in bytes.
const BUFFER: usize = 1 << 20;

/// The file operations. An error names the file of the operation.
#[derive(Default)]
pub(super) struct Disk {
    #[cfg(test)]
    pub(super) fault: fault::Fault,
}

impl Disk {
    /// Fails if a test has injected a fault into the next operation.
    fn check_fault(&self) -> io::Result<()> {
        #[cfg(test)]
        self.fault.inject()?;
        Ok(())
    }

    fn step<R>(&self, path: &Path, act: impl FnOnce() -> io::Result<R>) -> Result<R> {
        self.check_fault().and_then(|()| act()).map_err(|error| Error::io(path, &error))
    }

    pub(super) fn make_folder(&self, path: &Path) -> Result<()> {
        self.step(path, || fs::create_dir_all(path))
    }

    /// Makes a new file with the default mode of the umask. Returns when the content is on the
    /// disk. Fails if the file exists.
    pub(super) fn write(
        &self,
        path: &Path,
        content: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<()> {
        let file = self.step(path, || File::create_new(path))?;
        let mut out = BufWriter::with_capacity(BUFFER, FaultWriter { disk: self, file: &file });
        content(&mut out).and_then(|()| out.flush()).map_err(|error| Error::io(path, &error))?;
        self.step(path, || file.sync_all())
    }

    /// Renames a file. Replaces `to` if it exists.
    pub(super) fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.step(to, || fs::rename(from, to))
    }

    pub(super) fn remove(&self, path: &Path) -> Result<()> {
        self.step(path, || fs::remove_file(path))
    }

    /// Syncs a folder, and returns when the names of its files are on the disk. Does nothing on
    /// systems that cannot sync folders.
    pub(super) fn sync_folder(&self, path: &Path) -> Result<()> {
        self.step(path, || {
            if !cfg!(unix) {
                return Ok(());
            }
            match File::open(path)?.sync_all() {
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) =>
                {
                    Ok(())
                }
                result => result,
            }
        })
    }
}

/// A writer to a file. A test can inject a fault into each write.
struct FaultWriter<'a> {
    disk: &'a Disk,
    file: &'a File,
}

impl Write for FaultWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.disk.check_fault()?;
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod fault {
    use std::{
        io,
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
        thread,
        time::Duration,
    };

    /// The fault of one operation.
    #[derive(Clone, Copy, Debug, Default, PartialEq)]
    pub(in super::super) enum Kind {
        #[default]
        None,
        /// The operation fails.
        Fails,
        /// The operation and all later operations fail, as if the process had been killed before
        /// the operation.
        Killed,
        /// The operation is delayed.
        #[cfg_attr(any(loom, shuttle), allow(dead_code))]
        Slow(Duration),
    }

    #[derive(Clone, Default)]
    pub(in super::super) struct Fault {
        pub(in super::super) kind: Kind,
        pub(in super::super) at: usize,
        /// The number of operations so far.
        pub(in super::super) steps: Arc<AtomicUsize>,
    }

    impl Fault {
        pub(in super::super) fn new(kind: Kind, at: usize) -> Self {
            Self { kind, at, ..Self::default() }
        }

        pub(super) fn inject(&self) -> io::Result<()> {
            let step = self.steps.fetch_add(1, Ordering::Relaxed);
            match self.kind {
                Kind::Fails if step == self.at => Err(io::ErrorKind::StorageFull.into()),
                Kind::Killed if step >= self.at => Err(io::Error::other("killed")),
                Kind::Slow(pause) if step == self.at => {
                    thread::sleep(pause);
                    Ok(())
                }
                _ => Ok(()),
            }
        }
    }
}
