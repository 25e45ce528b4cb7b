//! Tests of the audit log.

mod job;
mod log;
#[cfg(feature = "tls")]
mod signed;
mod tamper;
mod verify;
