//! The integration tests, in one binary: a module an area.

mod comm;
mod weights;
