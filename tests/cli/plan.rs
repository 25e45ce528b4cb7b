//! Tests `shardwise plan`: exit codes, the printed JSON, and the files.

use crate::launch::{run, text};
use serde_json::Value;
use shardwise::plan::Plan;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

/// Runs `shardwise plan` with a model and a machine of `tests/data`, and more arguments.
fn plan(model: &str, machine: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shardwise"));
    command.arg("plan").arg("--model").arg(data(model)).arg("--machine").arg(machine).args(arguments);
    run(command)
}

fn machine() -> PathBuf {
    data("plan/machine.json")
}

const TRAIN: [&str; 5] = ["--train", "--batch", "8", "--tokens", "16"];

/// Writes the machine with less memory.
fn small_machine(folder: &Path, bytes: u64) -> PathBuf {
    let text = fs::read_to_string(machine()).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    json["memory"] = bytes.into();
    let path = folder.join("small.json");
    fs::write(&path, json.to_string()).unwrap();
    path
}

#[test]
fn the_best_plans_are_printed_as_json_and_the_best_is_saved() {
    let folder = tempfile::tempdir().unwrap();
    let [saved, page] = ["plan.json", "plan.html"].map(|name| folder.path().join(name));
    let files = ["--save", saved.to_str().unwrap(), "--html", page.to_str().unwrap()];
    let output = plan("llama", &machine(), &[&TRAIN[..], &["--json", "--top", "2"], &files].concat());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let keys: Vec<_> = json.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["best", "considered", "machine", "model", "refused"]);
    assert_eq!(json["machine"], "four ranks for tests");
    let model = &json["model"];
    // 2 tables of 591 x 36, 2 blocks with 9 query and 3 key/value heads of 8 features and 41
    // features in the MLP, and 5 norms.
    let parameters = 2 * 591 * 36 + 2 * (2 * 36 * 72 + 2 * 36 * 24 + 3 * 36 * 41) + 5 * 36;
    assert_eq!((&model["name"], &model["parameters"]), (&"llama".into(), &parameters.into()));
    let best: Vec<Plan> = serde_json::from_value(json["best"].clone()).unwrap();
    assert_eq!(best.len(), 2);
    for plan in &best {
        plan.check().unwrap();
        assert!(plan.strategy.ranks() <= 4);
    }
    let refused = json["refused"].as_array().unwrap();
    let refused: u64 = refused.iter().map(|refusal| refusal["count"].as_u64().unwrap()).sum();
    assert!(json["considered"].as_u64().unwrap() >= refused + 2);
    assert_eq!(Plan::read(&saved).unwrap(), best[0]);
    let page = fs::read_to_string(&page).unwrap();
    assert!(page.contains("<svg") && page.contains("Plan of llama"));
}

#[test]
fn the_table_has_a_row_for_each_plan() {
    for goal in ["--train", "--serve"] {
        let output = plan(
            "llama",
            &machine(),
            &[goal, "--batch", "8", "--tokens", "16", "--ranks", "2", "--dtype", "f32"],
        );
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let text = text(&output.stdout);
        assert!(text.starts_with("2 ranks · llama, "), "{text}");
        assert!(
            text.contains(" parameters, f32 · ") && text.contains(" strategies were considered"),
            "{text}"
        );
        let rows = text.lines().filter(|line| {
            line.split_whitespace().next().is_some_and(|first| first.parse::<usize>().is_ok())
                && line.contains(" fits ")
        });
        assert!((1..=10).contains(&rows.count()), "{text}");
    }
}

#[test]
fn the_exit_code_is_3_if_nothing_fits() {
    let folder = tempfile::tempdir().unwrap();
    let (small, saved) = (small_machine(folder.path(), 1 << 10), folder.path().join("plan.json"));
    let output =
        plan("llama", &small, &[&TRAIN[..], &["--json", "--save", saved.to_str().unwrap()]].concat());
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["best"], Value::Array(Vec::new()));
    assert!(json["refused"][0]["reason"].as_str().unwrap().contains("memory"), "{json}");
    assert!(!saved.exists());
    let output = plan("llama", &small, &TRAIN);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert!(text(&output.stdout).contains("No plan fits"));
}

#[test]
fn bad_input_is_exit_code_1() {
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("broken.json");
    fs::write(&broken, "{").unwrap();
    let cases = [
        ("bert", machine(), "only decoders can be planned"),
        ("absent", machine(), "absent: "),
        ("llama", "no-such-machine".into(), "no-such-machine"),
        ("llama", "absent.json".into(), "absent.json: "),
        ("llama", broken, "broken.json: EOF"),
        ("llama", small_machine(folder.path(), 0), "`memory` is 0"),
    ];
    for (model, machine, words) in cases {
        let output = plan(model, &machine, &TRAIN);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(text(&output.stderr).contains(words), "{words}: {output:?}");
        assert!(output.stdout.is_empty());
    }
    let output = plan("llama", &machine(), &[&TRAIN[..], &["--html", "/no/such/folder/plan.html"]].concat());
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(text(&output.stderr).contains("/no/such/folder/plan.html"), "{output:?}");
}

#[test]
fn wrong_arguments_are_exit_code_2() {
    let wrong: [&[&str]; 6] = [
        &["--batch", "8", "--tokens", "16"],
        &["--train", "--serve", "--batch", "8", "--tokens", "16"],
        &["--train", "--batch", "0", "--tokens", "16"],
        &["--train", "--batch", "8"],
        &["--train", "--batch", "8", "--tokens", "16", "--dtype", "f64"],
        &["--train", "--batch", "8", "--tokens", "16", "--top", "11"],
    ];
    for arguments in wrong {
        let output = plan("llama", &machine(), arguments);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
    }
}
