//! Reads values of the keys `tokenizer.ggml.*`.

use shardwise::weights::{Gguf, GgufValue};

pub(super) struct Keys<'a>(pub(super) &'a Gguf);

pub(super) fn absent(key: &str) -> String {
    format!("the key `tokenizer.ggml.{key}` is absent")
}

impl Keys<'_> {
    fn get(&self, key: &str) -> Result<Option<GgufValue>, String> {
        self.0.get(&format!("tokenizer.ggml.{key}")).map_err(|error| error.to_string())
    }

    /// Returns a value as another type, or `None` if the key is absent.
    fn value<T>(
        &self,
        key: &str,
        what: &str,
        convert: impl FnOnce(GgufValue) -> Option<T>,
    ) -> Result<Option<T>, String> {
        let Some(value) = self.get(key)? else { return Ok(None) };
        convert(value).map(Some).ok_or_else(|| format!("tokenizer.ggml.{key} is not {what}"))
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<String>, String> {
        self.value(key, "a string", text)
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, String> {
        self.value(key, "true or false", |value| match value {
            GgufValue::Bool(flag) => Some(flag),
            _ => None,
        })
    }

    /// Returns the entries of a list that must be there.
    pub(super) fn list<T>(
        &self,
        key: &str,
        convert: impl Fn(GgufValue) -> Option<T>,
    ) -> Result<Vec<T>, String> {
        let list = self.value(key, "an array", |value| match value {
            GgufValue::Array(list) => Some(list),
            _ => None,
        })?;
        let entries = list.ok_or_else(|| absent(key))?.into_iter().enumerate();
        entries
            .map(|(at, value)| {
                let wrong = format!("tokenizer.ggml.{key}: the entry {at}, {value:?}, is not understood");
                convert(value).ok_or(wrong)
            })
            .collect()
    }

    pub(super) fn texts(&self, key: &str) -> Result<Vec<String>, String> {
        self.list(key, text)
    }

    /// Returns the token in front of or behind a text if the flag, or else `default`, asks for it.
    pub(super) fn outer(&self, flag: &str, default: bool, key: &str) -> Result<Option<u32>, String> {
        if !self.flag(flag)?.unwrap_or(default) {
            return Ok(None);
        }
        let id = self.value(key, "the number of a token", |value| match value {
            GgufValue::Integer(id) => u32::try_from(id).ok(),
            _ => None,
        })?;
        id.map(Some).ok_or_else(|| absent(key))
    }
}

fn text(value: GgufValue) -> Option<String> {
    match value {
        GgufValue::String(text) => Some(text),
        _ => None,
    }
}
