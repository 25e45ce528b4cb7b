//! A line of an audit log as text.

use super::event::{Event, is_event_name, is_value};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::{
    fmt::Write,
    time::{Duration, SystemTime},
};

/// The SHA-256 of a line, or of what is in its place.
pub(super) type Hash = [u8; 32];

/// The longest line, in bytes, with its newline. A `witness` of 65,536 ranks has 7 MB.
pub(super) const MAX: usize = 1 << 24;
/// The longest line of a program's event.
pub(super) const MAX_OF_PROGRAM: usize = 1 << 20;
/// The number of characters of a time.
const TIME: usize = "2026-11-30T12:00:00.123456Z".len();
/// The last second that has a four-digit year, since 1970.
const LAST_SECOND: u64 = 253_402_300_799;

pub(super) fn sha256(bytes: &[u8]) -> Hash {
    Sha256::digest(bytes).into()
}

/// What stands for the hash of a torn line: SHA-256(`last` ‖ `torn`), where `last` is the hash of
/// the last whole line, or zeros. So the lines before a torn one stay in the chain.
pub(super) fn torn_hash(last: &Hash, torn: &[u8]) -> Hash {
    Sha256::new_with_prefix(last).chain_update(torn).finalize().into()
}

/// Appends the hexadecimal digits of a hash.
fn push_hex(text: &mut String, hash: &Hash) {
    const DIGITS: [char; 16] =
        ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'];
    text.extend(
        hash.iter().flat_map(|byte| [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]),
    );
}

pub(crate) fn hex(hash: &Hash) -> String {
    let mut text = String::with_capacity(64);
    push_hex(&mut text, hash);
    text
}

/// Parses 64 lower-case hexadecimal digits.
pub(crate) fn parse_hex(text: &str) -> Option<Hash> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut hash = [0; 32];
    if text.len() != 2 * hash.len() {
        return None;
    }
    for (byte, digits) in hash.iter_mut().zip(text.as_bytes().as_chunks::<2>().0) {
        *byte = digit(digits[0])? << 4 | digit(digits[1])?;
    }
    Some(hash)
}

/// What a line has besides its event.
pub(super) struct Place<'a> {
    pub(super) seq: u64,
    pub(super) time: SystemTime,
    pub(super) rank: usize,
    /// The job's name in JSON, with quotes.
    pub(super) job: &'a str,
    pub(super) epoch: u64,
    pub(super) prev: Hash,
    /// The number of bytes of the torn line before this line.
    pub(super) torn: Option<usize>,
}

/// Appends a line up to and including its hash, without what follows. Returns the hash.
pub(super) fn push(text: &mut String, place: &Place<'_>, event: &Event) -> Hash {
    let begin = text.len();
    let time =
        place.time.clamp(SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH + Duration::from_secs(LAST_SECOND));
    let Place { seq, rank, job, epoch, prev, torn, .. } = place;
    // Writing to a `String` does not fail.
    let _ = write!(
        text,
        r#"{{"seq":{seq},"utc":"{}","rank":{rank},"job":{job},"epoch":{epoch},"event":"{}","fields":{{"#,
        humantime::format_rfc3339_micros(time),
        event.name
    );
    let mut separator = "";
    for (name, value) in &event.fields {
        let _ = write!(text, r#"{separator}"{name}":{value}"#);
        separator = ",";
    }
    if let Some(bytes) = torn {
        let _ = write!(text, r#"{separator}"torn":{bytes}"#);
    }
    text.push_str(r#"},"prev":""#);
    push_hex(text, prev);
    text.push('"');
    let hash = sha256(&text.as_bytes()[begin..]);
    text.push_str(r#","hash":""#);
    push_hex(text, &hash);
    text.push('"');
    hash
}

/// A parsed line. Whether its hashes fit is not checked.
#[derive(Debug)]
pub(super) struct Line<'a> {
    pub(super) seq: u64,
    pub(super) time: SystemTime,
    pub(super) rank: usize,
    pub(super) job: String,
    pub(super) epoch: u64,
    pub(super) event: &'a str,
    pub(super) fields: Value,
    pub(super) prev: Hash,
    pub(super) hash: Hash,
    /// In base64.
    pub(super) signature: Option<&'a str>,
    /// The bytes of which `hash` is the SHA-256.
    pub(super) hashed: &'a [u8],
}

impl<'a> Line<'a> {
    /// Parses a line without its newline. The error says what does not have the form of a line.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(bytes).map_err(|error| format!("is not UTF-8: {error}"))?;
        let mut rest = text;
        let seq = number(&mut rest, r#"{"seq":"#)?;
        skip(&mut rest, r#","utc":""#)?;
        let time = take(&mut rest, TIME).and_then(parse_time).ok_or("has no time in `utc`")?;
        let rank = number(&mut rest, r#"","rank":"#)?;
        skip(&mut rest, r#","job":"#)?;
        let job = take_string(&mut rest).ok_or("has no text in `job`")?;
        let epoch = number(&mut rest, r#","epoch":"#)?;
        skip(&mut rest, r#","event":""#)?;
        let event = rest.find('"').and_then(|end| take(&mut rest, end)).filter(|name| is_event_name(name));
        let event = event.ok_or("has no name of an event in `event`")?;
        skip(&mut rest, r#"","fields":"#)?;
        // Behind the fields every part has a fixed length.
        let (marks, base64) = ([r#","prev":""#, r#"","hash":""#, r#"","signature":""#, r#""}"#], 88);
        let end = marks[0].len() + marks[1].len() + marks[3].len() + 2 * 64;
        let ends = [(end, false), (end + marks[2].len() + base64, true)];
        let split = ends.into_iter().find_map(|(end, signed)| {
            let at = rest.len().checked_sub(end)?;
            let (fields, tail) = (rest.get(..at)?, rest.get(at..)?);
            (tail.starts_with(marks[0]) && fields.ends_with('}')).then_some((fields, tail, signed))
        });
        let (fields, mut tail, signed) =
            split.ok_or("does not end in `fields`, `prev`, `hash` and possibly `signature`")?;
        let fields: Value =
            serde_json::from_str(fields).map_err(|error| format!("has no JSON in `fields`: {error}"))?;
        if !fields.is_object() || !is_value(&fields) {
            return Err("has a float or null in `fields`".into());
        }
        let mut hash = |mark: &str, name: &str| -> Result<(Hash, usize), String> {
            skip(&mut tail, mark)?;
            let at = text.len() - tail.len() - mark.len();
            let digits = take(&mut tail, 64).and_then(parse_hex);
            Ok((digits.ok_or_else(|| format!("has no 64 hexadecimal digits in `{name}`"))?, at))
        };
        let (prev, _) = hash(marks[0], "prev")?;
        // The quote that ends `prev` is hashed.
        let (hash, at) = hash(marks[1], "hash").map(|(hash, at)| (hash, at + 1))?;
        let signature = if signed {
            skip(&mut tail, marks[2])?;
            Some(take(&mut tail, base64).ok_or("has no base64 in `signature`")?)
        } else {
            None
        };
        if tail != marks[3] {
            return Err("has something after `hash` and `signature`".into());
        }
        let rank = usize::try_from(rank).map_err(|_| format!("has rank {rank}"))?;
        let hashed = &bytes[..at];
        Ok(Self { seq, time, rank, job, epoch, event, fields, prev, hash, signature, hashed })
    }

    /// Whether the hash is the one of the line.
    pub(super) fn is_whole(&self) -> bool {
        sha256(self.hashed) == self.hash
    }

    /// A field with an integer that is not negative.
    pub(super) fn number(&self, field: &str) -> Option<u64> {
        self.fields.get(field)?.as_u64()
    }

    /// A field with a text.
    pub(super) fn text(&self, field: &str) -> Option<&str> {
        self.fields.get(field)?.as_str()
    }
}

/// Removes the first `len` bytes from `rest` and returns them.
fn take<'a>(rest: &mut &'a str, len: usize) -> Option<&'a str> {
    let (taken, after) = rest.split_at_checked(len)?;
    *rest = after;
    Some(taken)
}

/// Removes `mark` from the beginning of `rest`.
fn skip(rest: &mut &str, mark: &str) -> Result<(), String> {
    *rest = rest.strip_prefix(mark).ok_or_else(|| format!("has no `{mark}` at its place"))?;
    Ok(())
}

/// Removes `mark` and a decimal number, in the one form that this crate writes.
fn number(rest: &mut &str, mark: &str) -> Result<u64, String> {
    skip(rest, mark)?;
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    let number = take(rest, digits).filter(|digits| !digits.starts_with('0') || digits.len() == 1);
    number.and_then(|digits| digits.parse().ok()).ok_or_else(|| format!("has no number after `{mark}`"))
}

/// Removes a text in JSON, in the one form that this crate writes.
fn take_string(rest: &mut &str) -> Option<String> {
    let mut escaped = true;
    let end = rest.bytes().position(|byte| {
        let ends = byte == b'"' && !escaped;
        // The first quote begins the text.
        escaped = byte == b'\\' && !escaped;
        ends
    })?;
    let json = take(rest, end + 1)?;
    let text = serde_json::from_str::<String>(json).ok()?;
    let canonical = Value::from(&*text).to_string();
    (canonical == json).then_some(text)
}

fn parse_time(text: &str) -> Option<SystemTime> {
    let time = humantime::parse_rfc3339(text).ok()?;
    (humantime::format_rfc3339_micros(time).to_string() == text).then_some(time)
}
