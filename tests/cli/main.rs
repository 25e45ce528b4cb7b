//! Tests of the program `shardwise`.
#![cfg(target_os = "linux")]

mod audit;
mod launch;
mod measure;
mod plan;
mod privacy;
mod records;
mod security;
mod users;
