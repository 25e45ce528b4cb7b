//! Checks of numbers that are read from files or computed from them.

use crate::error::{Error, Result};

/// Checks that a number is finite and more than 0.
pub(super) fn positive(op: &'static str, what: &str, value: f64) -> Result<()> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(Error::invalid(op, format!("`{what}` is {value}, but has to be positive")))
}

/// Checks that a number is finite and not negative.
pub(super) fn at_least_0(op: &'static str, what: &str, value: f64) -> Result<()> {
    if value.is_finite() && value >= 0.0 {
        return Ok(());
    }
    Err(Error::invalid(op, format!("`{what}` is {value}, but has to be at least 0")))
}

/// Checks that predicted seconds are finite and not negative.
pub(super) fn seconds(op: &'static str, what: &str, seconds: f64) -> Result<()> {
    if seconds.is_finite() && seconds >= 0.0 {
        return Ok(());
    }
    let reason =
        format!("{what} takes {seconds} seconds, but they have to be finite and at least 0: check the rates");
    Err(Error::invalid(op, reason))
}
