//! Tests of the audit log.

mod hostile;
mod job;
mod log;
#[cfg(feature = "tls")]
mod signed;
mod tamper;
mod verify;
