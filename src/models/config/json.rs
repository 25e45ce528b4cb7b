//! A JSON object whose values are read by key and type, and which reports keys that were not read.

use serde_json::{Map, Value};
use std::{cell::RefCell, collections::BTreeSet};

/// The largest number of characters of a key or value in an error.
const SHOWN: usize = 60;

/// An object whose values are read by key and type. `null` counts as absent, unless a method says
/// otherwise.
pub(super) struct Json<'a> {
    /// The type of the model.
    pub(super) kind: &'a str,
    /// The key of this object in its parent, or empty. Errors prefix it to this object's keys.
    pub(super) path: &'static str,
    map: &'a Map<String, Value>,
    asked: RefCell<BTreeSet<String>>,
}

impl<'a> Json<'a> {
    /// Makes the configuration of a model of type `kind`.
    pub(super) fn new(kind: &'a str, map: &'a Map<String, Value>) -> Self {
        Self { kind, path: "", map, asked: RefCell::default() }
    }

    /// Returns the value, which may be `null`; `None` only if the key is absent.
    pub(super) fn raw(&self, key: &str) -> Option<&'a Value> {
        let (key, value) = self.map.get_key_value(key)?;
        self.asked.borrow_mut().insert(key.clone());
        Some(value)
    }

    /// Whether the key is present with the value `null`.
    pub(super) fn is_null(&self, key: &str) -> bool {
        self.raw(key).is_some_and(Value::is_null)
    }

    fn get<R>(
        &self,
        key: &str,
        what: &str,
        read: impl Fn(&'a Value) -> Option<R>,
    ) -> Result<Option<R>, String> {
        match self.raw(key).filter(|value| !value.is_null()) {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| format!("`{key}` is not {what}")),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, String> {
        self.get(key, "a string", Value::as_str)
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, String> {
        self.get(key, "true or false", Value::as_bool)
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, String> {
        self.get(key, "a number", |value| value.as_f64().filter(|value| value.is_finite()))
    }

    pub(super) fn list(&self, key: &str) -> Result<Option<&'a [Value]>, String> {
        self.get(key, "a list", |value| value.as_array().map(Vec::as_slice))
    }

    /// Reads an object inside this one. An empty object counts as absent.
    pub(super) fn object(&self, key: &'static str) -> Result<Option<Self>, String> {
        let inner = |map| Self { path: key, ..Self::new(self.kind, map) };
        let object = self.get(key, "an object", |value| value.as_object().map(inner))?;
        Ok(object.filter(|object| !object.map.is_empty()))
    }

    /// Returns the values, which are objects.
    pub(super) fn objects(&self) -> Result<Vec<Self>, String> {
        let keys = self.map.keys();
        let read = |key: &String| {
            let inner = |map| Self { path: self.path, ..Self::new(self.kind, map) };
            let object = self.get(key, "an object", |value| value.as_object().map(inner))?;
            object.ok_or_else(|| format!("`{key}` is null"))
        };
        keys.map(read).collect()
    }

    /// Returns the first key whose value is an object.
    pub(super) fn nested(&self) -> Option<&'a str> {
        self.map.iter().find(|(_, value)| value.is_object()).map(|(key, _)| key.as_str())
    }

    /// Reads a non-negative integer.
    pub(super) fn optional_number_of(&self, key: &str) -> Result<Option<usize>, String> {
        self.get(key, "a whole number", |value| value.as_u64().and_then(|value| usize::try_from(value).ok()))
    }

    /// Reads a size from 1 to `limit`.
    pub(super) fn optional_size(&self, key: &str, limit: usize) -> Result<Option<usize>, String> {
        match self.optional_number_of(key)? {
            Some(size) if size == 0 || size > limit => {
                Err(format!("`{key}` is {size}; it may be from 1 to {limit}"))
            }
            size => Ok(size),
        }
    }

    pub(super) fn size(&self, key: &str, limit: usize) -> Result<usize, String> {
        self.optional_size(key, limit)?.ok_or_else(|| format!("`{key}` is missing"))
    }

    /// Reads a token or a list of tokens. `null` gives an empty list; an absent key gives `None`.
    pub(super) fn tokens(&self, key: &str) -> Result<Option<Vec<u32>>, String> {
        let one = |value: &Value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| format!("`{key}` is not a token"))
        };
        match self.raw(key) {
            None => Ok(None),
            Some(Value::Null) => Ok(Some(Vec::new())),
            Some(Value::Array(all)) => all.iter().map(one).collect::<Result<_, _>>().map(Some),
            Some(value) => Ok(Some(vec![one(value)?])),
        }
    }

    /// Returns an error if the key has a value other than `known`. Equal numbers match (1 and 1.0).
    pub(super) fn only(&self, key: &str, known: impl Into<Value>) -> Result<(), String> {
        let known = known.into();
        self.each(key, |value| *value == known || value.as_f64().is_some_and(|x| known.as_f64() == Some(x)))
    }

    /// Returns an error if the key has a value other than `null` for which `fine` is false.
    pub(super) fn each(&self, key: &str, fine: impl Fn(&Value) -> bool) -> Result<(), String> {
        match self.raw(key) {
            Some(value) if !value.is_null() && !fine(value) => Err(self.not_known(key, value)),
            _ => Ok(()),
        }
    }

    /// Rejects the first key that was not read, is not in `ignored`, and has a value other than
    /// `null`.
    pub(super) fn finish(&self, ignored: &[&[&str]]) -> Result<(), String> {
        let asked = self.asked.borrow();
        let known = |key: &str| asked.contains(key) || ignored.iter().any(|keys| keys.contains(&key));
        match self.map.iter().find(|(key, value)| !value.is_null() && !known(key)) {
            Some((key, value)) => Err(self.not_known(key, value)),
            None => Ok(()),
        }
    }

    fn not_known(&self, key: &str, value: &Value) -> String {
        let shown = |text: &str| {
            let mut shown: String = text.chars().take(SHOWN).collect();
            if shown.len() < text.len() {
                shown.push('…');
            }
            shown.escape_debug().to_string().replace("\\\"", "\"")
        };
        let dot = if self.path.is_empty() { "" } else { "." };
        let (path, key, value) = (self.path, shown(key), shown(&value.to_string()));
        format!(
            "`{path}{dot}{key}`: {value} is not known for a model of type {}: it may change the result",
            self.kind
        )
    }
}
