//! Checkpoints on disk in the safetensors format. A rank reads only its shard of each tensor. This
//! module uses tensors, shapes, devices and errors. Only `save` uses groups.
//!
//! * [`Checkpoint`]: a file, or a folder of files with an index, as a [`WeightSource`].
//! * [`Transposed`]: a source with some matrices stored as `[in, out]`.
//! * [`write()`]: writes one file.
//! * [`save()`], [`Save`]: write a sharded model as one checkpoint, which atomically replaces an
//!   older checkpoint.
//!
//! This module does not trust files. It checks every value of a header against the length of the
//! file before it uses the value ([`Checkpoint::open`] lists the checks). A reader needs memory for
//! a small multiple of the headers and the index, and 1 MiB for each read. The length of the index
//! and the total length of all headers of a folder are limited. A reader ignores tensors that the
//! index does not name. It compares names, and never interprets them.
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
