//! The integration tests, in one binary: a module an area.

mod block;
mod comm;
mod compile_fail;
mod decoding;
mod dev;
mod disagree;
mod errors;
mod exact;
mod fork;
mod imports;
mod invariant;
mod kernels;
mod launch;
mod layers;
mod models;
mod optim;
mod oracle;
mod overlap;
mod saving;
mod support;
mod trace;
mod training;
mod transports;
mod tree;
mod vocabulary;
mod weights;
