//! The integration tests, in one binary: a module an area.

mod comm;
mod layers;
mod support;
mod weights;
