//! Tests of the program `shardwise`.
#![cfg(target_os = "linux")]

mod launch;
mod measure;
mod plan;
mod records;
mod security;
mod users;
