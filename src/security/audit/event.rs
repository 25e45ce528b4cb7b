//! An event before it is written.

use crate::error::{Error, Result};
use serde_json::Value;
use std::fmt::Display;

const OP: &str = "audit";
/// The longest name of an event or a field.
const MAX_NAME: usize = 64;
/// The events that only the library writes.
const RESERVED: [&str; 9] = ["start", "join", "refuse", "save", "load", "gather", "deny", "witness", "end"];

/// An event of the audit log: a name, and fields in the order in which they are added.
#[derive(Clone, Debug)]
pub struct Event {
    pub(super) name: String,
    /// Names, and values in JSON.
    pub(super) fields: Vec<(String, String)>,
    pub(super) durable: bool,
    /// The name of a field that has a float or null.
    invalid: Option<String>,
}

impl Event {
    /// Returns an event without fields.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), fields: Vec::new(), durable: false, invalid: None }
    }

    /// Adds a field with a text.
    pub fn text(self, name: impl Into<String>, text: impl Display) -> Self {
        self.value(name, Value::from(text.to_string()).to_string())
    }

    /// Adds a field with an integer.
    pub fn number(self, name: impl Into<String>, number: u64) -> Self {
        self.value(name, number.to_string())
    }

    /// Adds a field that is true or false.
    pub fn flag(self, name: impl Into<String>, flag: bool) -> Self {
        self.value(name, flag.to_string())
    }

    /// Adds a field with a list of texts.
    pub fn list<D: Display>(self, name: impl Into<String>, texts: impl IntoIterator<Item = D>) -> Self {
        let texts: Value = texts.into_iter().map(|text| text.to_string()).collect();
        self.value(name, texts.to_string())
    }

    /// Adds a field with any JSON that has no floats and no null.
    pub(crate) fn json(mut self, name: impl Into<String>, value: Value) -> Self {
        let name = name.into();
        if !is_value(&value) {
            self.invalid = Some(name.clone());
        }
        self.value(name, value.to_string())
    }

    /// Has the event on the disk before the call that writes it returns (`fdatasync`).
    pub fn durable(mut self) -> Self {
        self.durable = true;
        self
    }

    /// Adds a field with a value in JSON.
    pub(super) fn value(mut self, name: impl Into<String>, json: String) -> Self {
        self.fields.push((name.into(), json));
        self
    }

    /// Checks that a program may write an event of this name.
    pub(super) fn check_name(&self) -> Result<()> {
        let name = &self.name;
        if !is_event_name(name) {
            let reason =
                format!("the name of an event is 1 to {MAX_NAME} of `a` to `z` and `_`, not {name:?}");
            return Err(Error::invalid(OP, reason));
        }
        if RESERVED.contains(&&**name) {
            return Err(Error::invalid(OP, format!("only the library writes events `{name}`")));
        }
        Ok(())
    }

    /// Checks names and values of the fields.
    pub(super) fn check_fields(&self) -> Result<()> {
        for (at, (name, _)) in self.fields.iter().enumerate() {
            let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
            if !(1..=MAX_NAME).contains(&name.len()) || !name.bytes().all(fits) {
                let reason = format!(
                    "the name of a field is 1 to {MAX_NAME} of `a` to `z`, `0` to `9` and `_`, not {name:?}"
                );
                return Err(Error::invalid(OP, reason));
            }
            if self.fields[..at].iter().any(|(earlier, _)| earlier == name) {
                return Err(Error::invalid(OP, format!("event `{}` has two fields `{name}`", self.name)));
            }
        }
        match &self.invalid {
            Some(name) => {
                let reason = format!("field `{name}` of event `{}` has a float or null", self.name);
                Err(Error::invalid(OP, reason))
            }
            None => Ok(()),
        }
    }
}

/// The error of an event whose line is too long.
pub(super) fn too_long(event: &Event, len: usize, most: usize) -> Error {
    let reason = format!("event `{}` has a line of {len} bytes, but the most is {most}", event.name);
    Error::invalid(OP, reason)
}

/// The error of an event that comes too late.
pub(super) fn after_end(event: &Event) -> Error {
    Error::invalid(OP, format!("event `{}` follows `end`, and only `witness` may", event.name))
}

pub(super) fn is_event_name(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
}

/// Whether a value consists of texts, integers, booleans, lists and objects.
pub(super) fn is_value(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(_) | Value::String(_) => true,
        Value::Number(number) => number.is_u64() || number.is_i64(),
        Value::Array(values) => values.iter().all(is_value),
        Value::Object(fields) => fields.values().all(is_value),
    }
}
