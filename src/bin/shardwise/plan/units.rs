//! Numbers as the table and the page have them.

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
}
