//! No two files of the library import each other, directly or through others.
//!
//! A file imports another file if it names an item that the other file defines, also through
//! re-exports. A file may name items of its own `mod.rs` and of all modules above it, because these
//! hold a folder's common definitions. A re-export alone is no import.

use crate::imports::files;
use std::collections::{BTreeMap, BTreeSet};

/// A module's path from the root of its crate. The paths of the program's modules begin with `bin`.
type Path = Vec<String>;

/// A name that a `use` imports: its path, its name in the file, and whether the file re-exports it.
struct Use {
    path: Path,
    name: String,
    public: bool,
}

#[derive(Default)]
struct Module {
    uses: Vec<Use>,
    defines: BTreeSet<String>,
    /// The paths outside of `use` that consist of two or more names.
    paths: Vec<Path>,
    /// All names outside of `use`.
    names: BTreeSet<String>,
}

/// Splits code into identifiers, `::` and other characters.
fn tokens(code: &str) -> Vec<&str> {
    let mut tokens = Vec::new();
    let mut rest = code.trim_start();
    while let Some(first) = rest.chars().next() {
        let is_name = |letter: char| letter.is_alphanumeric() || letter == '_';
        let len = if is_name(first) {
            rest.find(|letter| !is_name(letter)).unwrap_or(rest.len())
        } else if rest.starts_with("::") {
            2
        } else {
            first.len_utf8()
        };
        tokens.push(&rest[..len]);
        rest = rest[len..].trim_start();
    }
    tokens
}

/// Reads the tree of a `use` after `prefix` into `uses`. Returns the number of tokens that it has
/// read.
fn tree(tokens: &[&str], prefix: &[&str], public: bool, uses: &mut Vec<Use>) -> usize {
    let mut path = prefix.to_vec();
    let mut at = 0;
    let mut name = None;
    while at < tokens.len() {
        match tokens[at] {
            "{" => {
                at += 1;
                while tokens[at] != "}" {
                    at += tree(&tokens[at..], &path, public, uses);
                    at += usize::from(tokens[at] == ",");
                }
                return at + 1;
            }
            "," | "}" | ";" => break,
            "::" => {}
            "as" => {
                at += 1;
                name = Some(tokens[at]);
            }
            part => path.push(part),
        }
        at += 1;
    }
    let owned = |part: &&str| part.to_string();
    let name = name.or(path.last().copied()).unwrap_or_default().to_string();
    uses.push(Use { path: path.iter().map(owned).collect(), name, public });
    at
}

impl Module {
    fn read(code: &str) -> Self {
        const ITEMS: [&str; 8] = ["struct", "enum", "trait", "type", "fn", "const", "static", "union"];
        let tokens = tokens(code);
        let mut module = Self::default();
        let mut at = 0;
        while at < tokens.len() {
            match tokens[at] {
                // Skips `use<'a>`, which lists the lifetimes that a type captures.
                "use" if tokens.get(at + 1) != Some(&"<") => {
                    let public = at > 0 && matches!(tokens[at - 1], "pub" | ")");
                    at += tree(&tokens[at + 1..], &[], public, &mut module.uses) + 2;
                    continue;
                }
                // The declaration of a module names no item of that module.
                "mod" => {
                    at += 2;
                    continue;
                }
                item if ITEMS.contains(&item) => {
                    module.defines.extend(tokens.get(at + 1).map(|name| name.to_string()));
                }
                _ => {}
            }
            module.names.insert(tokens[at].to_string());
            let mut end = at + 1;
            while tokens.get(end) == Some(&"::") && tokens.get(end + 1).is_some_and(|name| *name != "<") {
                end += 2;
            }
            if end > at + 1 && (at == 0 || !matches!(tokens[at - 1], "::" | ".")) {
                module.paths.push(tokens[at..end].iter().step_by(2).map(|name| name.to_string()).collect());
            }
            at += 1;
        }
        module
    }
}

struct Modules(BTreeMap<Path, Module>);

impl Modules {
    fn new(files: impl IntoIterator<Item = (String, String)>) -> Self {
        let path = |file: String| -> Path {
            let file = file.strip_prefix("src/").unwrap().strip_suffix(".rs").unwrap();
            let file = if file == "lib" { "" } else { file };
            let file = file.strip_suffix("/mod").or_else(|| file.strip_suffix("/main")).unwrap_or(file);
            file.split('/').filter(|part| !part.is_empty()).map(str::to_string).collect()
        };
        Self(files.into_iter().map(|(file, code)| (path(file), Module::read(&code))).collect())
    }

    /// Returns the module where a path in module `here` begins, and the rest of the path. Returns
    /// `None` for paths to other crates and to names in scope.
    fn begin<'a>(&self, here: &[String], path: &'a [String]) -> Option<(Path, &'a [String])> {
        let mut base = here.to_vec();
        let mut rest = path;
        match path.first()?.as_str() {
            "crate" => {
                base.truncate(if here.first().is_some_and(|first| first == "bin") { 2 } else { 0 });
                rest = &path[1..];
            }
            "self" => rest = &path[1..],
            "super" => {
                while rest.first().is_some_and(|part| part == "super") {
                    base.pop();
                    rest = &rest[1..];
                }
            }
            child => {
                base.push(child.to_string());
                self.0.contains_key(&base).then(|| base.pop())?;
            }
        }
        Some((base, rest))
    }

    /// Follows a path through re-exports and returns the module that defines its item. `seen` has
    /// the names that were looked up already.
    fn home(&self, base: &[String], path: &[String], seen: &mut BTreeSet<Path>) -> Option<Path> {
        let mut base = base.to_vec();
        let mut rest = path;
        while let Some(part) = rest.first() {
            base.push(part.clone());
            if !self.0.contains_key(&base) {
                base.pop();
                break;
            }
            rest = &rest[1..];
        }
        let Some(name) = rest.first() else { return Some(base) };
        let module = self.0.get(&base)?;
        if module.defines.contains(name) {
            return Some(base);
        }
        if !seen.insert(base.iter().chain([name]).cloned().collect()) {
            return None;
        }
        let found =
            module.uses.iter().filter(|used| used.name == *name || used.name == "*").find_map(|used| {
                let (from, rest) = self.begin(&base, &used.path)?;
                let mut rest = rest.to_vec();
                if used.name == "*" {
                    *rest.last_mut()? = name.clone();
                }
                let home = self.home(&from, &rest, seen)?;
                let defines = |module: &Module| module.defines.contains(name);
                (used.name != "*" || self.0.get(&home).is_some_and(defines)).then_some(home)
            });
        Some(found.unwrap_or(base))
    }

    /// Returns for each module the modules that it names, except those above it.
    fn imports(&self) -> BTreeMap<&Path, BTreeSet<Path>> {
        let of = |(here, module): (&'_ Path, &Module)| -> BTreeSet<Path> {
            let used = module.uses.iter().filter(|used| !used.public || module.names.contains(&used.name));
            let paths = used.map(|used| &used.path).chain(&module.paths);
            let homes = paths.filter_map(|path| {
                let (base, rest) = self.begin(here, path)?;
                self.home(&base, rest, &mut BTreeSet::new())
            });
            homes.filter(|home| !here.starts_with(home)).collect()
        };
        // The prelude and the crates' roots name every module, and no module names them.
        let is_file = |here: &&Path| !here.is_empty() && here[0] != "prelude";
        self.0
            .iter()
            .filter(|(here, _)| is_file(here))
            .map(|(here, module)| (here, of((here, module))))
            .collect()
    }

    /// Returns the imports that are part of a circle.
    fn circles(&self) -> Vec<String> {
        let imports = self.imports();
        let leads = |from: &Path, to: &Path| {
            let (mut seen, mut next) = (BTreeSet::new(), vec![from]);
            while let Some(here) = next.pop() {
                if here == to {
                    return true;
                }
                let new = imports.get(here).into_iter().flatten().filter(|home| seen.insert(*home));
                next.extend(new.collect::<Vec<_>>());
            }
            false
        };
        let edges = imports.iter().flat_map(|(here, homes)| homes.iter().map(move |home| (*here, home)));
        let circular = edges.filter(|(here, home)| leads(home, here));
        circular.map(|(here, home)| format!("{} -> {}", here.join("/"), home.join("/"))).collect()
    }
}

/// Returns the circles of some modules.
fn circles(files: &[(&str, &str)]) -> Vec<String> {
    Modules::new(files.iter().map(|(file, code)| (format!("src/{file}.rs"), code.to_string()))).circles()
}

#[test]
fn circles_are_found() {
    let found = circles(&[
        ("lib", "pub mod a; pub mod b;"),
        ("a/mod", "mod one; mod two; pub use one::One; pub(crate) use two::*; pub struct Common;"),
        // `one` names a common definition of its folder, and `Two` through a re-export.
        ("a/one", "use super::{Common, Two as Other}; pub struct One(Common, Other);"),
        ("a/two", "pub struct Two; impl Two { fn new() { crate::b::made() } }"),
        ("b", "use crate::a::One; pub fn made() -> One { One::new() } use std::a::Two;"),
    ]);
    assert_eq!(found, ["a/one -> a/two", "a/two -> b", "b -> a/one"]);
    // A re-export, and a name that a module uses from the module above it, form no circle.
    let found = circles(&[
        ("lib", "pub mod a;"),
        ("a/mod", "mod one; pub use one::One; pub struct Common;"),
        ("a/one", "use super::Common; use crate::a::Common as Same; pub struct One(Common);"),
    ]);
    assert_eq!(found, [""; 0]);
}

#[test]
fn no_files_import_each_other() {
    let modules = Modules::new(files().into_iter().map(|(name, _, code)| (name, code)));
    let count: usize = modules.imports().values().map(BTreeSet::len).sum();
    assert!(count > 500, "only {count} imports were found");
    let circles = modules.circles();
    assert!(circles.is_empty(), "files that import each other:\n{}", circles.join("\n"));
}
