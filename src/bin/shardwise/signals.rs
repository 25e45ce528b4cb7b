//! The signals that ranks receive from the launcher, and their names.

use signal_hook::consts::signal;

/// The signals that the launcher forwards to the ranks.
pub(crate) const FORWARDED: [i32; 6] =
    [signal::SIGINT, signal::SIGTERM, signal::SIGHUP, signal::SIGQUIT, signal::SIGUSR1, signal::SIGUSR2];

/// Returns a signal's name.
pub(crate) fn name(signal: i32) -> String {
    signal_hook::low_level::signal_name(signal).map_or_else(|| format!("signal {signal}"), str::to_string)
}
