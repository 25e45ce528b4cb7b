//! Programs with placement mistakes do not compile, and the compiler's messages explain the
//! mistakes.

use crate::support::say;
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// The programs, and the beginning of the first error that every compiler prints for them.
const MISTAKES: [(&str, &str); 14] = [
    ("chain_does_not_fit", "error[E0277]: a tensor held as `Shard<1>` is given where one held as `"),
    ("group_leaves_its_rank", "error[E0277]: `Rc<"),
    (
        "loss_of_whole_logits",
        "error[E0277]: a tensor held as `Replicated` is given where one held as `Shard<1>` is taken\n",
    ),
    (
        "method_of_a_wrong_chain",
        "error[E0277]: a tensor held as `Shard<1>` is given where one held as `Replicated` is taken\n",
    ),
    (
        "norm_after_column",
        "error[E0277]: a tensor held as `Shard<1>` is given where one held as `Replicated` is taken\n",
    ),
    ("parameters_left_out", "error[E0283]: type annotations needed"),
    (
        "partial_into_activation",
        "error[E0277]: a non-linear operator cannot act on a `Partial` tensor: it would see one rank's term, not the sum\n",
    ),
    ("partial_residual_stream", "error[E0277]: a residual stream cannot be held as `Partial`\n"),
    (
        "placement_of_ones_own",
        "error[E0277]: `Half` cannot be a placement: the only placements are those of `shardwise::shard`\n",
    ),
    ("replicated_for_copied", "error[E0308]: mismatched types\n"),
    ("shard_for_whole", "error[E0308]: mismatched types\n"),
    ("stream_cut_by_features", "error[E0277]: a residual stream cannot be held as `Shard<1>`\n"),
    (
        "sum_with_a_term",
        "error[E0277]: a tensor held as `Partial` is given where one held as `Replicated` is taken\n",
    ),
    ("tensor_leaves_its_rank", "error[E0277]: "),
];

/// The compiler whose messages the `.stderr` files hold. Other compilers word them differently.
const COMPILER: &str = "rustc 1.95.";

#[test]
fn mistakes_do_not_compile() {
    let programs = shardwise_tests::root().join("tests/compile_fail");
    let files = fs::read_dir(&programs).unwrap().map(|file| file.unwrap().path());
    let found = files.filter(|file| file.extension().is_some_and(|end| end == "rs"));
    let mistakes: Vec<_> = MISTAKES.map(|(name, _)| (name, programs.join(format!("{name}.rs")))).into();
    assert_eq!(found.collect::<BTreeSet<_>>(), mistakes.iter().map(|(_, file)| file.clone()).collect());

    let version = Command::new("rustc").arg("--version").output().unwrap();
    let version = String::from_utf8_lossy(&version.stdout).into_owned();
    if version.starts_with(COMPILER) {
        return trybuild::TestCases::new().compile_fail("compile_fail/*.rs");
    }
    say(&format!(
        "the compiler's whole messages are NOT RUN: the files are from {COMPILER}x, but this is {version}"
    ));
    let (errors, why) = errors(mistakes);
    assert_eq!(errors.get("right"), Some(&Vec::new()), "the correct program does not compile: {why}");
    for (name, words) in MISTAKES {
        let of = errors.get(name).unwrap_or_else(|| panic!("{name} was not compiled: {why}"));
        assert!(of.first().is_some_and(|error| error.starts_with(words)), "{name}: {of:?}");
    }
}

/// Returns the compiler's errors for each program and for a correct program, and cargo's output.
/// The correct program shows that the others do not fail for a reason that has nothing to do with
/// their mistake.
fn errors(mut programs: Vec<(&str, PathBuf)>) -> (BTreeMap<String, Vec<String>>, String) {
    let root = shardwise_tests::root();
    programs.push(("right", root.join("examples/mlp.rs")));
    let mut manifest = format!(
        "[package]\nname = 'mistakes'\nedition = '2024'\n[workspace]\n[dependencies]\nshardwise.path = {root:?}\n"
    );
    for (name, file) in programs {
        manifest += &format!("[[bin]]\nname = {name:?}\npath = {file:?}\n");
    }
    let package = Path::new(env!("CARGO_TARGET_TMPDIR")).join("compile_fail");
    fs::create_dir_all(&package).unwrap();
    fs::copy(root.join("Cargo.lock"), package.join("Cargo.lock")).unwrap();
    fs::write(package.join("Cargo.toml"), manifest).unwrap();
    let checked = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()))
        .args(["check", "--offline", "--quiet", "--keep-going", "--message-format=json"])
        .current_dir(&package)
        .env("CARGO_TARGET_DIR", package.join("target"))
        .env_remove("RUSTFLAGS")
        .output()
        .unwrap();
    let mut errors = BTreeMap::<_, Vec<_>>::new();
    for line in String::from_utf8(checked.stdout).unwrap().lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_string();
        let compiled = line["reason"] == "compiler-artifact";
        let error = line["message"]["level"] == "error";
        if compiled || error {
            let of = errors.entry(text(&line["target"]["name"])).or_default();
            of.extend(error.then(|| text(&line["message"]["rendered"])));
        }
    }
    (errors, String::from_utf8_lossy(&checked.stderr).into_owned())
}
