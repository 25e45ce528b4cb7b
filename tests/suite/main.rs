//! The integration tests, in one binary: a module an area.

mod block;
mod comm;
mod errors;
mod imports;
mod layers;
mod support;
mod weights;
