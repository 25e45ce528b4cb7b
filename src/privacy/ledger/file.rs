//! The file of a ledger:
//!
//! ```text
//! {"version":1,"save":"<16 hex digits>","events":[{"sigma":"1.5","rate":"0.04","steps":2250}],
//!  "mac":"<64 hex digits>"}
//! ```
//!
//! in one line. σ and rate are decimals that give the same f64 again. `mac` is the HMAC-SHA256 of
//! [`DOMAIN`] and the bytes before `,"mac"`.

use super::super::accountant::Event;
use crate::security::{
    Secret,
    audit::{hex, parse_hex},
};
use hmac::{Hmac, KeyInit, Mac};
use serde_json::Value;
use sha2::Sha256;
use std::fmt::Write;

/// The most bytes of a file.
pub(super) const MOST: usize = 16 << 20;

const VERSION: u64 = 1;
const DOMAIN: &[u8] = b"shardwise privacy ledger\0";
const BEFORE_MAC: &str = r#","mac":""#;
const AFTER_MAC: &str = "\"}\n";

fn mac(body: &[u8], key: &Secret) -> Hmac<Sha256> {
    let key = key.reveal().as_bytes();
    let mut mac = Hmac::<Sha256>::new_from_slice(key).unwrap_or_else(|_| Hmac::new(&Default::default()));
    mac.update(DOMAIN);
    mac.update(body);
    mac
}

/// Returns the content of the file for a save.
pub(super) fn content(save: &str, events: impl Iterator<Item = Event>, key: &Secret) -> String {
    let mut text = format!(r#"{{"version":{VERSION},"save":"{save}","events":["#);
    for (at, Event { sigma, rate, steps }) in events.enumerate() {
        let comma = if at == 0 { "" } else { "," };
        // Writing to a text does not fail.
        let _ = write!(text, r#"{comma}{{"sigma":"{sigma:?}","rate":"{rate:?}","steps":{steps}}}"#);
    }
    text.push(']');
    let digest = mac(text.as_bytes(), key).finalize().into_bytes().into();
    text + BEFORE_MAC + &hex(&digest) + AFTER_MAC
}

/// Parses the content of the file, which has to belong to a save.
///
/// # Errors
/// What is wrong with it.
pub(super) fn parse(content: &[u8], save: &str, key: &Secret) -> Result<Vec<Event>, String> {
    let value: Value =
        serde_json::from_slice(content).map_err(|error| format!("the privacy ledger is no JSON: {error}"))?;
    match value["version"].as_u64() {
        Some(VERSION) => {}
        Some(other) => {
            return Err(format!("the privacy ledger has version {other}, but only {VERSION} is known"));
        }
        None => return Err("the privacy ledger has no version".into()),
    }
    check_mac(content, key)?;
    match value["save"].as_str() {
        Some(own) if own == save => {}
        own => {
            let own = own.unwrap_or("none");
            return Err(format!(
                "the privacy ledger belongs to save {own}, but the checkpoint is of save {save}"
            ));
        }
    }
    let events = value["events"].as_array().ok_or("the privacy ledger has no list `events`")?;
    events.iter().map(event).collect()
}

/// # Errors
/// When the file does not end with the HMAC of what is before it.
fn check_mac(content: &[u8], key: &Secret) -> Result<(), String> {
    let split = || {
        let rest = content.strip_suffix(AFTER_MAC.as_bytes())?;
        let (body, digits) = rest.split_at_checked(rest.len().checked_sub(64)?)?;
        Some((body.strip_suffix(BEFORE_MAC.as_bytes())?, parse_hex(str::from_utf8(digits).ok()?)?))
    };
    let (body, wanted) =
        split().ok_or("the privacy ledger does not end with an HMAC of 64 hexadecimal digits")?;
    // The comparison takes constant time, so that it leaks no prefix of the right one.
    mac(body, key).verify_slice(&wanted).map_err(|_| {
        "the HMAC of the privacy ledger is wrong: the file was changed, or the key is another one".into()
    })
}

fn event(value: &Value) -> Result<Event, String> {
    let number = |name: &str| {
        let text = value[name].as_str().ok_or_else(|| format!("an event has no text `{name}`"))?;
        let number = text.parse::<f64>().ok().filter(|number| number.is_finite());
        number.ok_or_else(|| format!("`{name}` of an event is {text:?}, which is no finite number"))
    };
    let steps = value["steps"].as_u64().ok_or("an event has no number `steps`")?;
    Ok(Event { sigma: number("sigma")?, rate: number("rate")?, steps })
}
