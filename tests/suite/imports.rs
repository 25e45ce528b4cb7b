//! Checks DESIGN.md's table of the modules that each module may import, and its list of the files
//! that may contain `unsafe`.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// The modules of the crate that a module may import in addition to itself, `error` and `shard`. A
/// file or folder that may import more than its module has its own entry.
const ALLOWED: [(&str, &[&str]); 21] = [
    ("error", &[]),
    ("shard", &[]),
    ("rng", &[]),
    ("security", &[]),
    ("device", &[]),
    ("trace", &["device"]),
    ("kernels", &["device", "rng"]),
    ("tensor", &["device", "kernels", "rng"]),
    ("ops", &["device", "kernels", "tensor", "trace"]),
    ("comm", &["device", "kernels", "security", "tensor", "trace"]),
    ("launch", &["comm", "device", "security", "trace"]),
    ("parallel", &["comm", "device", "kernels", "ops", "rng", "tensor", "trace"]),
    ("optim", &["comm", "device", "kernels", "tensor"]),
    ("train", &["comm", "device", "kernels", "parallel", "rng", "tensor"]),
    ("weights", &["device", "kernels", "security", "tensor"]),
    ("weights/save", &["comm", "device", "kernels", "security", "tensor"]),
    ("models", &["comm", "device", "kernels", "ops", "parallel", "tensor", "train", "weights"]),
    ("plan", &["comm", "device", "kernels", "models", "optim", "parallel", "rng", "tensor", "train"]),
    (
        "privacy",
        &["comm", "device", "kernels", "optim", "parallel", "security", "tensor", "train", "weights"],
    ),
    ("reference", &["nothing: not even error and shard"]),
    ("lib", &["everything"]),
];

/// The files that may contain `unsafe`.
const UNSAFE: [&str; 34] = [
    "src/comm/mpi/raw.rs",
    "src/comm/nccl/api.rs",
    "src/comm/nccl/cuda.rs",
    "src/comm/nccl/device.rs",
    "src/comm/nccl/raw/collectives.rs",
    "src/comm/nccl/raw/mod.rs",
    "src/comm/nccl/raw/shared.rs",
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
    "src/device/cuda/version.rs",
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
    "src/kernels/quantized/cuda.rs",
    "src/kernels/quantized/x86.rs",
    "src/kernels/rope/cuda.rs",
    "src/kernels/update/cuda.rs",
];

/// Adds all source files in a folder and below it to `found`.
pub(crate) fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|end| end == "rs") {
            found.push(path);
        }
    }
}

/// Returns code without its comments and without the contents of its literals.
fn bare(text: &str) -> String {
    let mut code = String::new();
    let mut rest = text;
    while let Some(letter) = rest.chars().next() {
        let raw = rest.strip_prefix('r').map(|after| after.len() - after.trim_start_matches('#').len());
        let before = code.rsplit(|letter: char| !letter.is_alphanumeric() && letter != '_').next();
        let begins = matches!(before, None | Some("" | "b" | "c"));
        let end =
            |from: usize, mark: &str| rest[from..].find(mark).map_or(rest.len(), |at| from + at + mark.len());
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            end(2, "*/")
        } else if let Some(marks) = raw.filter(|marks| begins && rest[1 + marks..].starts_with('"')) {
            end(2 + marks, &format!("\"{}", "#".repeat(marks)))
        } else if letter == '"' {
            quoted(rest, '"')
        } else if letter == '\'' && (rest[1..].starts_with('\\') || rest.chars().nth(2) == Some('\'')) {
            // Otherwise the quote begins a lifetime.
            quoted(rest, '\'')
        } else {
            code.push(letter);
            letter.len_utf8()
        };
        rest = &rest[skipped..];
    }
    code
}

/// Returns the length of a literal with its quotes.
fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = true;
    let end = text.char_indices().find(|(_, letter)| {
        let ends = *letter == quote && !escaped;
        escaped = *letter == '\\' && !escaped;
        ends
    });
    end.map_or(text.len(), |(at, _)| at + 1)
}

/// Returns bare code without the items that only tests have.
fn without_tests(code: &str) -> String {
    match ["#[cfg(test)]", "#[cfg(all(test,"].iter().filter_map(|cfg| code.find(cfg)).min() {
        Some(at) => format!("{}{}", &code[..at], without_tests(&code[at + item(&code[at..])..])),
        None => code.to_string(),
    }
}

/// Returns the length of the item, statement or field at the beginning of bare code. It ends at its
/// `;`, its `,` or its last brace.
fn item(code: &str) -> usize {
    let mut depth = 0;
    for (at, letter) in code.char_indices() {
        match letter {
            '(' | '[' | '{' => depth += 1,
            // This bracket ends the enclosing item, and so the item itself.
            ')' | ']' | '}' if depth == 0 => return at,
            ')' | ']' | '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 && matches!(letter, ';' | ',' | '}') {
            return at + 1;
        }
    }
    code.len()
}

/// Returns bare code in which each path that climbs from the file's module to the root begins with
/// `crate`.
fn from_the_root(file: &str, code: &str) -> String {
    let module = file.strip_suffix("/mod").unwrap_or(file);
    let climb = "super::".repeat(module.split('/').count());
    let nested = code.match_indices("super::{").any(|(at, _)| {
        let list = &code[at..];
        list[..list.find(';').unwrap_or(list.len())][1..].contains("super")
    });
    assert!(!nested, "{file}: `super` in a list of `super` cannot be followed");
    code.replace(&climb, "crate::")
}

/// Returns every file of the library: its path from the root, its module, and its code without
/// comments and tests.
pub(crate) fn files() -> Vec<(String, String, String)> {
    let root = shardwise_tests::root();
    let mut found = Vec::new();
    sources(&root.join("src"), &mut found);
    assert!(found.len() > 30, "the sources were not found");
    let describe = |path: PathBuf| {
        let name = path.strip_prefix(root).unwrap().to_string_lossy().replace('\\', "/");
        let module = name["src/".len()..].split(['/', '.']).next().unwrap().to_string();
        let code = without_tests(&bare(&fs::read_to_string(path).unwrap()));
        let file = &name["src/".len()..name.len() - ".rs".len()];
        // The program's `crate` is not the library, and the root has no parent. So the paths in
        // their files are left unchanged.
        let code = if module == "bin" || module == "lib" { code } else { from_the_root(file, &code) };
        (name, module, code)
    };
    found.into_iter().map(describe).collect()
}

/// Returns the modules that follow `crate::` in code, also in lists (`crate::{a, b::c}`).
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
    let tested = r##"
        #[cfg(test)] use crate::a; #[cfg(test)] mod b; /* " */ const C: [&str; 2] = [br#"{""#, "\"{ crate::d"];
        struct E<'e> { #[cfg(test)] f: crate::g::H, #[cfg(all(test, i))] j: &'e crate::k::L }
        fn m() { #[cfg(test)] n({ '{' }); super::o(super::super::p()) } // crate::q
        #[cfg(test)] #[cfg(r)] mod s { use crate::t; } use crate::u;"##;
    assert_eq!(imported(&from_the_root("v/w", &without_tests(&bare(tested)))), ["p", "u"]);
    assert_eq!(imported(&from_the_root("v/mod", &without_tests(&bare(tested)))), ["o", "crate", "p", "u"]);
    let allowed: BTreeMap<_, _> = ALLOWED.into_iter().collect();
    // The root re-exports these names from their modules.
    let home = |name: &str| match name {
        "Error" | "LostReason" | "Mismatch" | "Result" | "Site" | "SiteGuard" => "error".to_string(),
        "Tensor" => "tensor".to_string(),
        "each_dtype" => "device".to_string(),
        module => module.to_string(),
    };
    let mut seen = 0;
    // The program is skipped because its `crate` is not the library, and the prelude because it
    // names everything.
    for (name, module, code) in
        files().into_iter().filter(|(_, module, _)| !["bin", "prelude"].contains(&module.as_str()))
    {
        let file = &name["src/".len()..name.len() - ".rs".len()];
        let may = Path::new(file).ancestors().find_map(|at| allowed.get(at.to_str()?));
        let may = may.unwrap_or_else(|| panic!("{name}: `{module}` is not in the table"));
        for import in imported(&code).iter().map(|import| home(import)) {
            let common = (import == "error" || import == "shard") && module != "reference";
            let fine = import == module || common || module == "lib" || may.contains(&import.as_str());
            assert!(fine, "{name} imports `{import}`, which `{module}` may not");
            seen += 1;
        }
    }
    assert!(seen > 100, "only {seen} imports were found");
    // The check above lets `error` import `shard`, but `error` may import no module.
    let error = files().into_iter().find(|(_, module, _)| module == "error").unwrap();
    assert!(imported(&error.2).is_empty(), "error imports {:?}", imported(&error.2));
}

#[test]
fn unsafe_stands_only_where_the_design_allows_it() {
    for (name, _, code) in files() {
        let has = code
            .split(|letter: char| !letter.is_alphanumeric() && letter != '_')
            .any(|word| word == "unsafe");
        assert!(!has || UNSAFE.contains(&name.as_str()), "{name} may not contain `unsafe`");
    }
}
