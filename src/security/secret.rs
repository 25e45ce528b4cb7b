//! A text that must not be printed.

use std::fmt;

/// A secret text, such as a token. `Debug` does not show it, and it has no `Display`.
///
/// ```
/// use shardwise::security::Secret;
/// let token = Secret::from("f3a9");
/// assert_eq!(format!("{token:?}"), "Secret(set)");
/// assert_eq!(token.reveal(), "f3a9");
/// ```
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The secret itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Whether there is no secret.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<S: Into<String>> From<S> for Secret {
    fn from(text: S) -> Self {
        Self(text.into())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_empty() { "Secret(none)" } else { "Secret(set)" })
    }
}
