//! Tests `shardwise measure`: the printed machine, and wrong arguments.

use crate::launch::{run, text};
use shardwise::plan::{Machine, Transport};
use std::process::{Command, Output};

fn measure(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shardwise"));
    command.arg("measure").args(arguments);
    run(command)
}

#[test]
fn a_measured_machine_is_printed_as_json() {
    let output = measure(&["--seconds", "0.2", "--ranks", "2", "--name", "two ranks"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let machine = Machine::parse(&text(&output.stdout)).unwrap();
    assert_eq!((&*machine.name, machine.transport), ("two ranks", Some(Transport::Threads)));
    assert_eq!((machine.ranks, machine.ranks_per_node), (2, 2));
    assert!(machine.shares_memory && machine.memory >= 1 << 28, "{}", machine.memory);
    assert!(output.stderr.is_empty());
}

#[test]
fn wrong_arguments_are_errors() {
    for seconds in ["0", "-1", "30.5", "inf", "nan"] {
        let output = measure(&[&*format!("--seconds={seconds}"), "--ranks", "2"]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let error = text(&output.stderr);
        assert!(
            error.contains("has to be more than 0 and at most 30") && output.stdout.is_empty(),
            "{error}"
        );
    }
    for arguments in [["--ranks", "0"], ["--seconds", "long"]] {
        assert_eq!(measure(&arguments).status.code(), Some(2));
    }
}
