//! Tests of the audit log.

mod log;
