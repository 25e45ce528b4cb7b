//! Checkpoints on disk, in the safetensors format: a rank reads its part of each tensor, and
//! nothing else of the file. Used by whoever makes layers; uses tensors, shapes, devices and
//! errors. Only `save` knows of ranks.
//!
//! * [`Checkpoint`]: a file, or a folder of shards with an index, as a [`WeightSource`].
//! * [`Transposed`]: another source, some of whose matrices are stored as `[in, out]`.
//! * [`write()`]: makes such a file.
//! * [`save()`], [`Save`]: writes a sharded model as one checkpoint, which replaces an older one
//!   whole or not at all.
//!
//! A file comes from elsewhere, so its header is not believed: everything it says is checked against
//! the file's length before it is used ([`Checkpoint::open`] lists what). Memory stays within a small
//! multiple of the headers and the index, and 1 MiB a read. Headers and index are limited in length;
//! the headers of one folder share one limit. Entries that the index does not name are dropped. Names
//! are compared, never interpreted.
//!
//! [`WeightSource`]: crate::tensor::WeightSource

mod checkpoint;
mod disk;
mod file;
mod folder;
mod header;
mod index;
mod json;
mod save;
mod stored;
mod transposed;
mod write;

pub use checkpoint::Checkpoint;
pub(crate) use folder::config;
pub use save::{Save, save};
pub use transposed::Transposed;
pub use write::write;
