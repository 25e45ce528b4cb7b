//! Tests of the program `shardwise`.
#![cfg(target_os = "linux")]

mod launch;
mod plan;
mod records;
