//! The integration tests in one binary, with one module per area.

mod access;
mod block;
mod circles;
mod collectives;
mod comm;
mod compile_fail;
mod concat;
mod configs;
mod decoding;
mod dev;
mod disagree;
mod errors;
mod exact;
mod gguf;
mod groups;
mod imports;
mod invariant;
mod kernels;
mod launch;
mod layers;
mod models;
mod optim;
mod oracle;
mod overlap;
mod own_layers;
mod packed;
mod params;
mod plan;
mod quantized;
// The tests of TLS share this module and use all its items.
#[allow(dead_code)]
mod relay;
mod rows;
mod safety;
mod saving;
mod sites;
mod stages;
mod states;
mod style;
mod support;
mod trace;
mod training;
mod transports;
mod tree;
mod vocabulary;
mod weights;
