//! Checkpoints on disk in the safetensors format, and GGUF files. A rank reads only its shard of
//! each tensor. This module uses tensors, shapes, devices, formats of quantized weights and errors.
//! Only `save` uses groups.
//!
//! * [`Checkpoint`]: a file, or a folder of files with an index, as a [`WeightSource`].
//! * [`Gguf`]: a GGUF file, or the files of a split model, under Hugging Face's names.
//! * [`Packed`]: a checkpoint quantized by GPTQ, AWQ or compressed-tensors, or in FP8.
//! * [`Transposed`]: a source with some matrices stored as `[in, out]`.
//! * [`Quantization`]: a source that quantizes the matrices of another source at load.
//! * [`write()`]: writes one file.
//! * [`save()`], [`Save`]: write a sharded model as one checkpoint, which atomically replaces an
//!   older checkpoint.
//!
//! This module does not trust files. It checks every value of a header against the length of the
//! file before it uses the value ([`Checkpoint::open`] and [`Gguf::open`] list the checks). Reading
//! safetensors needs memory for a small multiple of the headers and the index, and reading GGUF for
//! a small multiple of the names of tensors and keys. Both need 1 MiB for each read. The length of
//! the index and the total length of all headers of a folder are limited. A reader ignores tensors
//! that the index does not name. It compares names, and never interprets them, except that [`Gguf`]
//! translates the names of known architectures.
//!
//! [`WeightSource`]: crate::tensor::WeightSource

#[cfg(feature = "privacy")]
pub(crate) mod attached;
mod checkpoint;
mod disk;
mod file;
mod folder;
mod gguf;
mod header;
mod index;
mod json;
mod layout;
mod logged;
mod packed;
mod quantization;
mod region;
mod save;
mod save_id;
mod stored;
mod transposed;
mod write;

pub use checkpoint::Checkpoint;
pub(crate) use gguf::ROPE_DIVISORS;
pub use gguf::{Gguf, GgufValue};
pub(crate) use layout::config;
pub use packed::{Packed, Packing, PackingMethod, Tile};
pub use quantization::Quantization;
pub use save::{Save, save};
pub use transposed::Transposed;
pub use write::write;
