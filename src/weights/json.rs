//! A visitor of the entries of a JSON object, including entries with the same key.
//!
//! `serde_json` parses the keys and the values, and this module parses the object. `serde_json`
//! would silently keep the last of several entries with the same key, and its tree of values takes
//! many times the memory of the text.

/// The maximal length in bytes of a key, and the default limit for a value.
pub(super) const LIMIT: usize = 4096;

/// Parses the JSON value of at most `limit` bytes at the start of the text. Returns the value and
/// its length in the text.
macro_rules! value {
    ($type:ty, $text:expr, $limit:expr) => {{
        let (text, limit): (&[u8], usize) = ($text, $limit);
        let head = &text[..text.len().min(limit)];
        let mut values = serde_json::Deserializer::from_slice(head).into_iter::<$type>();
        match values.next() {
            Some(Ok(value)) => Ok((value, values.byte_offset())),
            Some(Err(error)) if error.is_eof() && head.len() < text.len() => {
                Err(format!("longer than {limit} bytes"))
            }
            Some(Err(error)) => Err(error.to_string()),
            None => Err("expected a value, found the end".to_string()),
        }
    }};
}
pub(super) use value;

/// Visits the entries of the object at the start of the text, and returns the length of the object.
///
/// `entry` receives a key and the rest of the text, which starts with the key's value. It returns
/// the length of the value.
pub(super) fn object(
    text: &[u8],
    mut entry: impl FnMut(String, &[u8]) -> Result<usize, String>,
) -> Result<usize, String> {
    let mut rest = text;
    expect(&mut rest, b'{')?;
    if !eat(&mut rest, b'}') {
        loop {
            let (key, len) = value!(String, rest, LIMIT).map_err(|reason| format!("a key: {reason}"))?;
            rest = &rest[len..];
            expect(&mut rest, b':')?;
            rest = rest.trim_ascii_start();
            rest = &rest[entry(key, rest)?..];
            if !eat(&mut rest, b',') {
                break;
            }
        }
        expect(&mut rest, b'}')?;
    }
    Ok(text.len() - rest.len())
}

/// Visits the entries of the object in the text. Fails if the text has more than the object and
/// white space.
pub(super) fn whole_object(
    text: &[u8],
    entry: impl FnMut(String, &[u8]) -> Result<usize, String>,
) -> Result<(), String> {
    let len = object(text, entry)?;
    if text[len..].trim_ascii().is_empty() {
        return Ok(());
    }
    Err(format!("there is more text after the closing brace, at byte {len}"))
}

/// Returns the error text for two entries with the same key.
pub(super) fn duplicate(key: &str) -> String {
    format!("the key `{}` occurs twice", key.escape_debug())
}

fn eat(rest: &mut &[u8], byte: u8) -> bool {
    *rest = rest.trim_ascii_start();
    let found = rest.first() == Some(&byte);
    if found {
        *rest = &rest[1..];
    }
    found
}

fn expect(rest: &mut &[u8], byte: u8) -> Result<(), String> {
    if eat(rest, byte) {
        return Ok(());
    }
    let found = rest.first().map_or("the end".into(), |&found| format!("`{}`", found.escape_ascii()));
    Err(format!("expected `{}`, found {found}", char::from(byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(text: &str) -> Result<Vec<String>, String> {
        let mut keys = Vec::new();
        whole_object(text.as_bytes(), |key, text| {
            keys.push(key);
            Ok(value!(serde_json::Value, text, LIMIT)?.1)
        })?;
        Ok(keys)
    }

    #[test]
    fn shows_every_entry_in_order() {
        assert_eq!(keys("{}").unwrap(), [""; 0]);
        assert_eq!(
            keys(r#" { "b" : [1, {"x": "}"}] ,"a":2,"b":null, "\u00e9\"":-1.5e3}  "#).unwrap().join(" "),
            "b a b é\""
        );
    }

    #[test]
    fn refuses_what_is_not_an_object() {
        for (text, reason) in [
            ("", "expected `{`, found the end"),
            ("[]", "expected `{`, found `[`"),
            ("{", "a key: expected a value, found the end"),
            ("{1:2}", "a key: invalid type: integer `1`, expected a string at line 1 column 1"),
            (r#"{"a" 1}"#, "expected `:`, found `1`"),
            (r#"{"a":}"#, "expected value at line 1 column 1"),
            (r#"{"a":1,}"#, "a key: expected value at line 1 column 1"),
            (r#"{"a":1 "b":2}"#, "expected `}`, found `\\\"`"),
            (r#"{"a":1}x"#, "there is more text after the closing brace, at byte 7"),
            (r#"{"a":1"#, "expected `}`, found the end"),
            (&format!(r#"{{"{}":1}}"#, "k".repeat(LIMIT)), "a key: longer than 4096 bytes"),
            (&format!(r#"{{"a":{}}}"#, "[".repeat(300)), "recursion limit exceeded at line 1 column 128"),
        ] {
            assert_eq!(keys(text).unwrap_err(), reason, "{text}");
        }
    }
}
