//! Machines as JSON.

use super::{Machine, OP};
use crate::{
    error::{Error, Result},
    models,
};
use std::path::Path;

impl Machine {
    /// Reads a machine from a JSON file of at most 1 MiB: see [`Machine::parse`].
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read. [`Error::Config`] when it is longer than 1 MiB,
    /// or does not describe a machine.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::parse(&models::config_text(path, "a machine")?).map_err(|error| match error {
            Error::Invalid { reason, .. } => Error::Config { path: path.into(), reason },
            other => other,
        })
    }

    /// Parses a machine from JSON with the names of its fields, and checks it.
    ///
    /// # Errors
    /// When the text is not JSON, when a field is missing, unknown or of another type, and as
    /// [`Machine::check`]. The error names the field.
    pub fn parse(text: &str) -> Result<Self> {
        let machine: Self =
            serde_json::from_str(text).map_err(|error| Error::invalid(OP, describe(text, &error)))?;
        machine.check()?;
        Ok(machine)
    }

    /// The machine as JSON, which [`Machine::parse`] reads.
    ///
    /// # Errors
    /// As [`Machine::check`].
    pub fn to_json(&self) -> Result<String> {
        self.check()?;
        let text = serde_json::to_string_pretty(self);
        text.map(|text| text + "\n").map_err(|error| Error::internal(OP, error.to_string()))
    }
}

/// Describes what is wrong with the text, and at which field if serde does not name it.
fn describe(text: &str, error: &serde_json::Error) -> String {
    // The text is not trusted, and its names are part of serde's description.
    let reason = error.to_string().replace(char::is_control, "?");
    if reason.contains(" field `") {
        return reason;
    }
    let lines = text.split_inclusive('\n').take(error.line().saturating_sub(1));
    let end = lines.map(str::len).sum::<usize>() + error.column();
    // The last name before the error.
    let before = text.get(..end).unwrap_or(text).rsplit_once(':').map_or("", |(before, _)| before.trim_end());
    match before.strip_suffix('"').and_then(|name| name.rsplit_once('"')) {
        Some((_, name)) => format!("`{}`: {reason}", name.escape_debug()),
        None => reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// The error of a preset's JSON in which the first `from` is replaced.
    fn error(from: &str, to: &str) -> String {
        let text = Machine::preset("h200").unwrap().to_json().unwrap();
        assert!(text.contains(from), "{from} in {text}");
        let error = Machine::parse(&text.replacen(from, to, 1)).unwrap_err();
        assert!(matches!(error, Error::Invalid { op: OP, .. }), "{error}");
        error.to_string()
    }

    #[test]
    fn machines_are_what_was_written() {
        for name in Machine::PRESETS {
            let machine = Machine::preset(name).unwrap().with_ranks(3);
            assert_eq!(Machine::parse(&machine.to_json().unwrap()).unwrap(), machine);
        }
    }

    #[test]
    fn numbers_that_no_machine_has_are_named() {
        let cases = [
            ("\"ranks\": 8", "\"ranks\": 0", "machine: `ranks` is 0, but has to be positive"),
            (
                "\"launch\": 4.6e-6",
                "\"launch\": -4.0",
                "machine: `rates.launch` is -4, but has to be at least 0",
            ),
            ("4800000000000.0", "-1.5", "machine: `bf16.copies.peak` is -1.5, but has to be positive"),
            (
                "\"fits\": 0.82",
                "\"fits\": 0.93",
                "machine: `fits` is 0.93 and `tight` is 0.92, but fits ≤ tight ≤ 1 has to hold",
            ),
            ("336000000000.0", "0", "machine: `node.bandwidth` is 0, but has to be positive"),
        ];
        for (from, to, want) in cases {
            assert_eq!(error(from, to), want);
        }
        // The lists of efficiencies of `copies` are the only ones with this size.
        let got = error("10000000.0", "1000000");
        assert_eq!(
            got,
            "machine: `bf16.copies.efficiency` has size 1000000 before 1000000, but has to ascend"
        );
    }

    #[test]
    fn fields_that_are_no_machine_s_are_named() {
        assert!(
            error("\"launch\"", "\"lunch\"").starts_with("machine: unknown field `lunch`, expected one of")
        );
        let got = error("\"launch\": 4.6e-6,", "");
        assert!(got.starts_with("machine: missing field `launch` at line "), "{got}");
        let got = error("\"launch\": 4.6e-6", "\"launch\": NaN");
        assert!(got.starts_with("machine: `launch`: expected value at line "), "{got}");
        let got = error("\"ranks\": 8", "\"ranks\": -1");
        assert!(
            got.starts_with("machine: `ranks`: invalid value: integer `-1`, expected usize at line "),
            "{got}"
        );
        let got = error("\"launch\": 4.6e-6", "\"launch\": \"fast\"");
        assert!(
            got.starts_with("machine: `launch`: invalid type: string \"fast\", expected f64 at line "),
            "{got}"
        );
        for text in ["", "[]", "{", "{}", "null", "\"", ":", "\":\u{1b}", "{\"é\":NaN", "{\"\u{1b}\": 1}"] {
            let error = Machine::parse(text).unwrap_err().to_string();
            assert!(!error.contains('\u{1b}'), "{error:?}");
        }
    }

    #[test]
    fn numbers_that_json_does_not_have_are_not_written() {
        let mut machine = Machine::preset("h200").unwrap();
        machine.overlap = f64::NAN;
        let error = machine.to_json().unwrap_err().to_string();
        assert_eq!(error, "machine: `overlap` is NaN, but has to be between 1 and 2");
    }

    #[test]
    fn files_are_regular_and_short() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("machine.json");
        let machine = Machine::preset("cpu-1gbe").unwrap();
        fs::write(&path, machine.to_json().unwrap()).unwrap();
        assert_eq!(Machine::read(&path).unwrap(), machine);

        let reason = || match Machine::read(&path).unwrap_err() {
            Error::Config { path: at, reason } if at == path => reason,
            error => panic!("{error}"),
        };
        fs::write(&path, machine.to_json().unwrap().replace("\"ranks\": 4", "\"ranks\": 0")).unwrap();
        assert_eq!(reason(), "`ranks` is 0, but has to be positive");
        fs::write(&path, " ".repeat((1 << 20) + 1)).unwrap();
        assert_eq!(reason(), "this is a file of more than 1048576 bytes, not a machine");
        fs::write(&path, [0xff, 0xfe]).unwrap();
        assert_eq!(reason(), "this is a binary file, not a machine");
        assert!(matches!(Machine::read(folder.path()), Err(Error::Io { .. })));
        assert!(matches!(Machine::read(folder.path().join("none")), Err(Error::Io { .. })));
    }
}
