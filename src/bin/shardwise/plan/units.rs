//! Numbers with units.

use std::time::Duration;

/// A unit of bytes in which a list of numbers is written.
#[derive(Clone, Copy)]
pub(super) struct Unit {
    pub(super) name: &'static str,
    size: u64,
}

impl Unit {
    /// The largest unit of which the number of bytes is at least 1.
    pub(super) fn of(bytes: u64) -> Self {
        let names = ["B", "KiB", "MiB", "GiB"];
        let power = (bytes.max(1).ilog2() as usize / 10).min(names.len() - 1);
        Self { name: names[power], size: 1 << (10 * power) }
    }

    /// Writes the number of bytes in this unit, without its name.
    pub(super) fn count(self, bytes: u64) -> String {
        match self.size {
            1 => bytes.to_string(),
            size => format!("{:.1}", bytes as f64 / size as f64),
        }
    }
}

/// Writes a number of bytes with its unit.
pub(super) fn bytes(bytes: u64) -> String {
    let unit = Unit::of(bytes);
    format!("{} {}", unit.count(bytes), unit.name)
}

/// Writes a number of seconds with a unit.
pub(super) fn time(seconds: f64) -> String {
    match Duration::try_from_secs_f64(seconds) {
        Ok(Duration::ZERO) => "0s".into(),
        Ok(time) => format!("{time:.2?}"),
        Err(_) => format!("{seconds} s"),
    }
}

/// Writes a share in percent, with a decimal below 10%.
pub(super) fn percent(share: f64) -> String {
    let digits = usize::from(share < 0.0995);
    format!("{:.digits$}%", 100.0 * share)
}

/// Writes a number with three digits and a suffix: k, M, B or T.
pub(super) fn short(number: f64) -> String {
    let scale = |(size, suffix): (f64, &str)| {
        let scaled = number / size;
        let digits = if scaled < 9.995 { 2 } else { usize::from(scaled < 99.95) };
        format!("{scaled:.digits$}{suffix}")
    };
    let suffixes = [(1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")];
    scale(suffixes.into_iter().find(|(size, _)| number >= *size).unwrap_or((1.0, "")))
}

/// Writes a number of things.
pub(super) fn counted(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!([0.0, 12.34, 999.0].map(short), ["0.00", "12.3", "999"]);
        assert_eq!([1000.0, 71_234.0, 68.98e9, 2e12].map(short), ["1.00k", "71.2k", "69.0B", "2.00T"]);
    }

    #[test]
    fn shares_have_two_digits() {
        assert_eq!([0.0, 0.0994, 0.0996, 1.0].map(percent), ["0.0%", "9.9%", "10%", "100%"]);
    }

    #[test]
    fn bytes_have_the_largest_unit() {
        assert_eq!([0, 1023, 1024, 80 << 30].map(bytes), ["0 B", "1023 B", "1.0 KiB", "80.0 GiB"]);
        assert_eq!(Unit::of(5 << 30).count(1 << 29), "0.5");
        assert_eq!([0.0, 1.84, 0.0312].map(time), ["0s", "1.84s", "31.20ms"]);
    }
}
