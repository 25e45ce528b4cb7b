//! Tests of the audit log.

mod job;
mod log;
mod tamper;
mod verify;
