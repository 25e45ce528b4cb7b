//! Values that were computed from data without noise.

use crate::{
    error::{Error, Result},
    security::audit::{self, Event},
};
use std::fmt;

/// A value that was computed from training data and has no noise: a loss, a norm, the size of a
/// batch. Showing it costs privacy that no accountant counts.
///
/// It has no `Display` and no `Deref`, and `Debug` does not show the value. The only access is
/// [`NonPrivate::disclose`], which the audit log records.
///
/// ```
/// use shardwise::privacy::NonPrivate;
/// let loss = NonPrivate::new(2.5_f32).map(|loss| loss / 2.0);
/// assert_eq!(format!("{loss:?}"), "NonPrivate");
/// assert_eq!(loss.disclose("the data set is public")?, 1.25);
/// # Ok::<(), shardwise::Error>(())
/// ```
///
/// ```compile_fail,E0277
/// # use shardwise::privacy::NonPrivate;
/// println!("{}", NonPrivate::new(2.5_f32));
/// ```
#[derive(Clone, Copy)]
pub struct NonPrivate<T>(T);

impl<T> fmt::Debug for NonPrivate<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NonPrivate")
    }
}

impl<T> NonPrivate<T> {
    /// Marks a value as computed from data without noise.
    pub const fn new(value: T) -> Self {
        Self(value)
    }

    /// Computes another value from this one.
    pub fn map<U>(self, f: impl FnOnce(T) -> U) -> NonPrivate<U> {
        NonPrivate(f(self.0))
    }

    /// Returns the value, after an event `disclose` with the reason is in the audit log of the rank
    /// whose thread calls this. Without a log, nothing is recorded.
    ///
    /// # Errors
    /// When the reason is empty, or the log cannot be written; then the value is lost.
    pub fn disclose(self, reason: &str) -> Result<T> {
        if reason.trim().is_empty() {
            let why = "the reason is empty: say why a value without privacy may be shown";
            return Err(Error::invalid("disclose", why));
        }
        audit::record(
            &Event::new("disclose").text("reason", reason).text("type", std::any::type_name::<T>()),
        )?;
        Ok(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::security::audit::AuditLog;
    use std::fs;

    #[test]
    fn a_disclosure_is_in_the_log_before_the_value_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let log = AuditLog::open(folder.path(), "job", 0, 0, None).unwrap();
        log.write(&Event::new("start").number("world", 1)).unwrap();
        let path = AuditLog::path(folder.path(), "job", 0);
        audit::begin(Some(log));
        let loss = NonPrivate::new(0.123_456_f32);
        for empty in ["", " \n"] {
            assert!(loss.disclose(empty).unwrap_err().to_string().contains("the reason is empty"));
        }
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 1);
        assert_eq!(loss.disclose("the \"validation\" set is public"), Ok(0.123_456));
        let lines = fs::read_to_string(&path).unwrap();
        let line = lines.lines().nth(1).unwrap();
        assert!(line.contains(r#""event":"disclose""#), "{line}");
        assert!(line.contains(r#""reason":"the \"validation\" set is public""#), "{line}");
        assert!(line.contains(r#""type":"f32""#) && !line.contains("0.1234"), "{line}");
        // What cannot be recorded is not disclosed.
        let long = "x".repeat(2 << 20);
        assert!(matches!(loss.disclose(&long), Err(Error::Invalid { op: "audit", .. })));
        audit::end();
        assert_eq!(fs::read_to_string(&path).unwrap(), lines);
    }

    #[test]
    fn debug_does_not_show_the_value() {
        let value = NonPrivate::new(vec![1.5]).map(|values| (values, "secret"));
        assert_eq!(format!("{value:?} {:#?}", Some(value.clone())), "NonPrivate Some(\n    NonPrivate,\n)");
    }
}
