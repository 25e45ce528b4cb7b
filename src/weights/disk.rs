//! The operations by which a save changes a folder. Each goes through [`Disk`], so that tests can
//! make it fail.

use crate::error::{Error, Result};
use std::{
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::Path,
};

/// The bytes that are written at once.
const BUFFER: usize = 1 << 20;

/// Changes files. Errors name the file.
#[derive(Default)]
pub(super) struct Disk {
    #[cfg(test)]
    pub(super) fault: fault::Fault,
}

impl Disk {
    /// Whether the next operation may be tried.
    fn admit(&self) -> io::Result<()> {
        #[cfg(test)]
        self.fault.strike()?;
        Ok(())
    }

    fn step<R>(&self, path: &Path, act: impl FnOnce() -> io::Result<R>) -> Result<R> {
        self.admit().and_then(|()| act()).map_err(|error| Error::io(path, &error))
    }

    pub(super) fn make_folder(&self, path: &Path) -> Result<()> {
        self.step(path, || fs::create_dir_all(path))
    }

    /// Makes a file that is not there yet, and returns when its content is on the disk. Its mode is
    /// what the umask leaves.
    pub(super) fn write(
        &self,
        path: &Path,
        content: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<()> {
        let file = self.step(path, || File::create_new(path))?;
        let mut out = BufWriter::with_capacity(BUFFER, Admitted { disk: self, file: &file });
        content(&mut out).and_then(|()| out.flush()).map_err(|error| Error::io(path, &error))?;
        self.step(path, || file.sync_all())
    }

    /// Replaces `to`, where that is there.
    pub(super) fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.step(to, || fs::rename(from, to))
    }

    pub(super) fn remove(&self, path: &Path) -> Result<()> {
        self.step(path, || fs::remove_file(path))
    }

    /// Returns when the names in a folder are on the disk. Where folders cannot be synced, it does
    /// nothing.
    pub(super) fn sync_folder(&self, path: &Path) -> Result<()> {
        self.step(path, || match cfg!(unix) {
            true => match File::open(path)?.sync_all() {
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) =>
                {
                    Ok(())
                }
                result => result,
            },
            false => Ok(()),
        })
    }
}

struct Admitted<'a> {
    disk: &'a Disk,
    file: &'a File,
}

impl Write for Admitted<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.disk.admit()?;
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

    /// What becomes of the operation of a certain number.
    #[derive(Clone, Copy, Debug, Default, PartialEq)]
    pub(in super::super) enum Kind {
        #[default]
        None,
        /// It fails.
        Fails,
        /// It is not done, nor is any later one, as if the process had been killed.
        Killed,
        /// It takes that long.
        #[cfg_attr(any(loom, shuttle), allow(dead_code))]
        Slow(Duration),
    }

    #[derive(Clone, Default)]
    pub(in super::super) struct Fault {
        pub(in super::super) kind: Kind,
        pub(in super::super) at: usize,
        /// The operations so far.
        pub(in super::super) steps: Arc<AtomicUsize>,
    }

    impl Fault {
        pub(in super::super) fn new(kind: Kind, at: usize) -> Self {
            Self { kind, at, ..Self::default() }
        }

        pub(super) fn strike(&self) -> io::Result<()> {
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
