//! Holds DESIGN.md's table of who may import whom, and its list of where `unsafe` and feature gates may stand.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// For each module, and for each file that may import more than its module, the modules of the crate
/// that it may import besides its own, `error` and `shard`.
const ALLOWED: [(&str, &[&str]); 18] = [
    ("error", &[]),
    ("shard", &[]),
    ("rng", &[]),
    ("device", &[]),
    ("trace", &["device"]),
    ("kernels", &["device", "rng"]),
    ("tensor", &["device", "kernels", "rng"]),
    ("ops", &["device", "kernels", "tensor", "trace"]),
    ("comm", &["device", "kernels", "tensor", "trace"]),
    ("launch", &["comm", "device", "trace"]),
    ("parallel", &["comm", "device", "kernels", "ops", "rng", "tensor", "trace"]),
    ("optim", &["comm", "device", "kernels", "tensor"]),
    ("train", &["comm", "device", "kernels", "parallel", "rng", "tensor"]),
    ("weights", &["device", "tensor"]),
    ("weights/save", &["comm", "device", "kernels", "tensor"]),
    ("models", &["comm", "device", "kernels", "ops", "parallel", "tensor", "weights"]),
    ("reference", &["nothing: not even error and shard"]),
    ("lib", &["everything"]),
];

/// Where `unsafe` may stand.
const UNSAFE: [&str; 29] = [
    "src/comm/mpi/raw.rs",
    "src/comm/nccl/api.rs",
    "src/comm/nccl/cuda.rs",
    "src/comm/nccl/device.rs",
    "src/comm/nccl/raw.rs",
    "src/comm/threads/mod.rs",
    "src/comm/threads/shared.rs",
    "src/comm/threads/slot.rs",
    "src/device/cpu/simd.rs",
    "src/device/cuda/context.rs",
    "src/device/cuda/launch.rs",
    "src/device/cuda/libraries.rs",
    "src/device/cuda/matmul.rs",
    "src/device/cuda/memory.rs",
    "src/device/cuda/program.rs",
    "src/device/cuda/status.rs",
    "src/device/cuda/stream.rs",
    "src/kernels/attention/cuda.rs",
    "src/kernels/attention/decode.rs",
    "src/kernels/dropout/cuda.rs",
    "src/kernels/gather/cuda.rs",
    "src/kernels/gemm/blocked/mod.rs",
    "src/kernels/gemm/blocked/vector.rs",
    "src/kernels/gemm/cuda.rs",
    "src/kernels/loss/cuda.rs",
    "src/kernels/norm/cuda.rs",
    "src/kernels/pointwise/cuda.rs",
    "src/kernels/rope/cuda.rs",
    "src/kernels/update/cuda.rs",
];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|end| end == "rs") {
            found.push(path);
        }
    }
}

/// Every file of the library: its path from the root, its module, and its code without comments and tests.
fn files() -> Vec<(String, String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    sources(&root.join("src"), &mut found);
    assert!(found.len() > 30, "the sources were not found");
    let describe = |path: PathBuf| {
        let name = path.strip_prefix(root).unwrap().to_string_lossy().replace('\\', "/");
        let module = name["src/".len()..].split(['/', '.']).next().unwrap().to_string();
        let text = fs::read_to_string(path).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap().split("#[cfg(all(test").next().unwrap();
        let lines = code.lines().map(|line| line.split("//").next().unwrap_or(""));
        (name, module, lines.collect::<Vec<_>>().join("\n"))
    };
    found.into_iter().map(describe).collect()
}

/// The modules that follow `crate::` in some code, in lists (`crate::{a, b::c}`) too.
fn imported(code: &str) -> Vec<String> {
    let mut modules = Vec::new();
    for at in code.match_indices("crate::").map(|(at, _)| at + "crate::".len()) {
        let rest = &code[at..];
        if !rest.starts_with('{') {
            modules.push(word(rest));
            continue;
        }
        let mut depth = 0;
        let mut start = None;
        for (index, letter) in rest.char_indices() {
            match letter {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 1 => start = None,
                letter if depth == 1 && start.is_none() && !letter.is_whitespace() => {
                    start = Some(index);
                    modules.push(word(&rest[index..]));
                }
                _ => {}
            }
            if depth == 0 {
                break;
            }
            if letter == '{' && depth == 1 {
                start = None;
            }
        }
    }
    modules
}

fn word(text: &str) -> String {
    text.chars().take_while(|letter| letter.is_alphanumeric() || *letter == '_').collect()
}

#[test]
fn modules_import_only_what_the_table_allows() {
    assert_eq!(imported("use crate::{a::{b, c}, d, e::f}; crate::g::h()"), ["a", "d", "e", "g"]);
    let allowed: BTreeMap<_, _> = ALLOWED.into_iter().collect();
    // What the root re-exports belongs to these modules.
    let home = |name: &str| match name {
        "Error" | "Loss" | "Mismatch" | "Result" | "Site" | "SiteGuard" => "error".to_string(),
        "Tensor" => "tensor".to_string(),
        module => module.to_string(),
    };
    let mut seen = 0;
    // The program's `crate` is not the library.
    for (name, module, code) in files().into_iter().filter(|(_, module, _)| module != "bin") {
        let file = &name["src/".len()..name.len() - ".rs".len()];
        let may = allowed.get(file).or_else(|| allowed.get(module.as_str()));
        let may = may.unwrap_or_else(|| panic!("{name}: `{module}` is not in the table"));
        for import in imported(&code).iter().map(|import| home(import)) {
            let common = (import == "error" || import == "shard") && module != "reference";
            let fine = import == module || common || module == "lib" || may.contains(&import.as_str());
            assert!(fine, "{name} imports `{import}`, which `{module}` may not");
            seen += 1;
        }
    }
    assert!(seen > 100, "only {seen} imports were found");
    // Shard and error stand at the bottom: not even each other's, but shard reports errors.
    let error = files().into_iter().find(|(_, module, _)| module == "error").unwrap();
    assert!(imported(&error.2).is_empty(), "error imports {:?}", imported(&error.2));
}

#[test]
fn unsafe_stands_only_where_the_design_allows_it() {
    for (name, _, code) in files() {
        let has = code
            .split(|letter: char| !letter.is_alphanumeric() && letter != '_')
            .any(|word| word == "unsafe");
        assert!(!has || UNSAFE.contains(&name.as_str()), "{name} is not a place for `unsafe`");
    }
}
