//! Checkpoints on disk in the safetensors format. A rank reads only its shard of each tensor. Uses
//! tensors, shapes, devices and errors; only `save` uses groups.
//!
//! * [`Checkpoint`]: a file, or a folder of files with an index, as a [`WeightSource`].
//! * [`Transposed`]: a source with some matrices stored as `[in, out]`.
//! * [`write()`]: writes one file.
//! * [`save()`], [`Save`]: write a sharded model as one checkpoint, which replaces an older one
//!   atomically.
//!
//! Files are not trusted: everything in a header is checked against the length of the file before
//! it is used ([`Checkpoint::open`] lists the checks). Reading needs memory for a small multiple of
//! the headers and the index, and 1 MiB for each read. The lengths of the index and of all headers
//! of a folder together are limited. Tensors that the index does not name are ignored. Names are
//! compared, never interpreted.
//!
//! [`WeightSource`]: crate::tensor::WeightSource

mod checkpoint;
mod disk;
mod file;
mod folder;
mod header;
mod index;
mod json;
mod layout;
mod save;
mod save_id;
mod stored;
mod transposed;
mod write;

pub use checkpoint::Checkpoint;
pub(crate) use layout::config;
pub use save::{Save, save};
pub use transposed::Transposed;
pub use write::write;
