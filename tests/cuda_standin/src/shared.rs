//! The size of a kernel's shared memory, read from the assembly that g++ produced.
//!
//! A `__shared__` variable is compiled as a thread-local one of its module. A kernel has the
//! variables that it and its callees refer to.

use std::{
    collections::{HashMap, HashSet},
    fmt::Write as _,
};

/// The references of a function: every name in its code, and the thread-local variables among them.
#[derive(Default)]
struct Code<'a> {
    names: Vec<&'a str>,
    variables: HashSet<&'a str>,
}

/// The relocations of thread-local variables.
const KINDS: [&str; 5] = ["@tlsgd", "@tlsld", "@dtpoff", "@gottpoff", "@tpoff"];

/// Definitions of a number `<kernel>__shared` for each kernel, to be appended to the assembly.
pub fn sizes(assembly: &str, kernels: &[String]) -> String {
    let is_part = |c: char| c.is_alphanumeric() || "_.$@".contains(c);
    let (mut functions, mut sizes) = (HashMap::<&str, Code>::new(), HashMap::<&str, u32>::new());
    let (mut known, mut current) = (HashSet::new(), None);
    for line in assembly.lines() {
        if let Some((name, "@function")) = directive(line, ".type") {
            known.insert(name);
        } else if let Some((name, size)) = directive(line, ".size") {
            match size.parse() {
                Ok(size) => drop(sizes.insert(name, size)),
                // A function's size is a difference of addresses, and follows its code.
                Err(_) => current = None,
            }
        } else if let Some(label) = line.strip_suffix(':') {
            current = if known.contains(label) { Some(label) } else { current };
        } else if let Some(current) = current {
            let code = functions.entry(current).or_default();
            for word in line.split(|c| !is_part(c)) {
                let (name, kind) = word.split_at(word.find('@').unwrap_or(word.len()));
                code.names.push(name);
                // The stand-in's own variables are not shared memory.
                if KINDS.contains(&kind) && !name.contains("7standin") {
                    code.variables.insert(name);
                }
            }
        }
    }
    let mut text = String::from("\t.section .rodata\n");
    for kernel in kernels {
        let (mut reached, mut next) = (HashSet::new(), vec![kernel.as_str()]);
        let mut variables = HashSet::<&str>::new();
        while let Some(name) = next.pop() {
            if let Some(code) = functions.get(name).filter(|_| reached.insert(name)) {
                next.extend(&code.names);
                variables.extend(&code.variables);
            }
        }
        let bytes: u32 = variables.iter().filter_map(|name| sizes.get(name)).sum();
        let _ = writeln!(text, "\t.globl {kernel}__shared\n\t.balign 4\n{kernel}__shared:\n\t.long {bytes}");
    }
    text
}

/// The two operands of a directive.
fn directive<'a>(line: &'a str, which: &str) -> Option<(&'a str, &'a str)> {
    let (name, value) = line.trim_start().strip_prefix(which)?.trim_start().split_once(',')?;
    Some((name, value.trim()))
}
