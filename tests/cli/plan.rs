//! Tests `shardwise plan`: exit codes, the printed JSON, the files, and trials.

use crate::launch::{run, text};
use serde_json::Value;
use shardwise::plan::{Machine, Plan, Transport};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
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

/// Writes the machine with a change.
fn changed_machine(path: PathBuf, change: impl FnOnce(&mut Machine)) -> PathBuf {
    let mut machine = Machine::read(machine()).unwrap();
    change(&mut machine);
    fs::write(&path, serde_json::to_string(&machine).unwrap()).unwrap();
    path
}

/// Writes the machine with less memory.
fn small_machine(folder: &Path, bytes: u64) -> PathBuf {
    changed_machine(folder.join("small.json"), |machine| machine.memory = bytes)
}

/// Writes the machine as if its four ranks had been measured over this transport.
fn measured_machine(folder: &Path, transport: Transport) -> PathBuf {
    changed_machine(folder.join("measured.json"), |machine| {
        (machine.transport, machine.ranks_per_node, machine.rates[0].ranks) = (Some(transport), 4, 4);
    })
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
    let wrong: [&[&str]; 8] = [
        &["--batch", "8", "--tokens", "16"],
        &["--train", "--serve", "--batch", "8", "--tokens", "16"],
        &["--train", "--batch", "0", "--tokens", "16"],
        &["--train", "--batch", "8"],
        &["--train", "--batch", "8", "--tokens", "16", "--dtype", "f64"],
        &["--train", "--batch", "8", "--tokens", "16", "--top", "11"],
        &["--train", "--batch", "8", "--tokens", "16", "--try", "0"],
        &["--train", "--batch", "8", "--tokens", "16", "--try", "11"],
    ];
    for arguments in wrong {
        let output = plan("llama", &machine(), arguments);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
    }
}

#[test]
fn tried_plans_are_runs_of_the_machine_s_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = measured_machine(folder.path(), Transport::Threads);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
    let before = Machine::read(&file).unwrap();

    let output = plan("llama", &file, &[&TRAIN[..], &["--try", "2", "--dtype", "f32"]].concat());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let out = text(&output.stdout);
    let (_, trials) = out.split_once("Tried with random weights:\n").unwrap();
    let lines: Vec<_> = trials.lines().collect();
    let [first, second, won] = &lines[..] else { panic!("{out}") };
    for (line, number) in [(first, "1"), (second, "2")] {
        let words: Vec<_> = line.split_whitespace().collect();
        assert!(
            matches!(words[..], [at, "predicted", _, "measured", _, "error", _] if at == number),
            "{line}"
        );
        assert!(words[6].ends_with('%'), "{line}");
    }
    assert!(won.starts_with("Plan 1 won. ") || won.starts_with("Plan 2 won. "), "{won}");

    let mut machine = Machine::read(&file).unwrap();
    let start = "llama, f32, training, 8 x 16 tokens a step, dp ";
    assert!(machine.runs.len() == 2 && machine.runs.iter().all(|run| run.what.starts_with(start)));
    machine.runs.clear();
    assert_eq!(machine, before);
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o640);

    // The second time the machine is calibrated to the first runs.
    let saved = folder.path().join("plan.json");
    let options = ["--try", "2", "--dtype", "f32", "--json", "--save", saved.to_str().unwrap()];
    let output = plan("llama", &file, &[&TRAIN[..], &options].concat());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let trials = json["trials"].as_array().unwrap();
    assert_eq!(trials.len(), 2);
    for (trial, plan) in trials.iter().zip(json["best"].as_array().unwrap()) {
        assert_eq!((&trial["strategy"], &trial["predicted"]), (&plan["strategy"], &plan["seconds"]));
    }
    let number = |trial: &Value, name: &str| trial[name].as_f64().unwrap();
    for trial in trials {
        let error = number(trial, "predicted") / number(trial, "measured") - 1.0;
        assert!((number(trial, "error") - error).abs() < 1e-9, "{trial}");
    }
    let [first, second] = [0, 1].map(|at| number(&trials[at], "measured"));
    let [won, lost] = if first <= second { [0, 1] } else { [1, 0] };
    assert_eq!((&trials[won]["won"], &trials[lost]["won"]), (&true.into(), &false.into()));
    let plan = Plan::read(&saved).unwrap();
    assert_eq!(serde_json::to_value(plan.strategy).unwrap(), trials[won]["strategy"]);
    assert_eq!(Machine::read(&file).unwrap().runs.len(), 4);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
}

#[test]
fn generation_is_tried() {
    let folder = tempfile::tempdir().unwrap();
    let file = measured_machine(folder.path(), Transport::Threads);
    let output = plan("llama", &file, &["--serve", "--batch", "4", "--tokens", "16", "--try", "1"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(text(&output.stdout).contains("\nPlan 1 won. "), "{output:?}");
    let runs = Machine::read(&file).unwrap().runs;
    assert!(runs.len() == 1 && runs[0].what.contains("serving, 4 sequences of at most 16 tokens, dp "));
}

#[test]
fn trials_need_thread_ranks_or_gpus() {
    let [folder, gpus] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let cases = [
        ("h200".into(), "h200 has published rates: write a machine file with `shardwise measure`"),
        (machine(), "machine.json has published rates"),
        (measured_machine(folder.path(), Transport::Mpi), "ranks over Mpi: measure thread ranks"),
        (
            changed_machine(folder.path().join("nodes.json"), |machine| {
                machine.transport = Some(Transport::Threads);
            }),
            "there are 4 and a node has 2: use `--ranks 2`",
        ),
    ];
    let gpus = (measured_machine(gpus.path(), Transport::Nccl), "with `--features cli,nccl`");
    // A program with NCCL fails only if there is no GPU.
    for (machine, words) in cases.into_iter().chain((!cfg!(feature = "nccl")).then_some(gpus)) {
        let output = plan("llama", &machine, &[&TRAIN[..], &["--try", "1"]].concat());
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(text(&output.stderr).contains(words), "{words}: {output:?}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn the_machine_s_file_is_unchanged_if_nothing_is_tried() {
    let folder = tempfile::tempdir().unwrap();
    let file = measured_machine(folder.path(), Transport::Threads);
    let small = changed_machine(folder.path().join("small.json"), |machine| {
        *machine = Machine::read(&file).unwrap();
        machine.memory = 1 << 10;
    });
    for (file, model, limit, code) in
        [(small, "llama", "1", 3), (file.clone(), "absent", "1", 1), (file, "llama", "9", 1)]
    {
        let before = fs::read(&file).unwrap();
        let output = plan(model, &file, &[&TRAIN[..], &["--try", "2", "--tp", limit]].concat());
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        assert!(!text(&output.stdout).contains("won"), "{output:?}");
        assert_eq!(fs::read(&file).unwrap(), before);
    }
}
