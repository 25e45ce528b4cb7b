//! Numbers with units, as the sentences of plans have them.

use std::time::Duration;

/// Writes a number of bytes.
pub(super) fn bytes(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB"];
    let unit = (bytes.max(1).ilog2() as usize / 10).min(units.len() - 1);
    match unit {
        0 => format!("{bytes} B"),
        _ => format!("{:.1} {}", bytes as f64 / 1024_f64.powi(unit as i32), units[unit]),
    }
}

/// Writes a number of seconds.
pub(super) fn time(seconds: f64) -> String {
    match Duration::try_from_secs_f64(seconds) {
        Ok(Duration::ZERO) => "0s".into(),
        Ok(time) => format!("{time:.2?}"),
        Err(_) => format!("{seconds} s"),
    }
}

/// Writes a number of floating-point operations a second.
pub(super) fn rate(flops: f64) -> String {
    if flops < 1e12 { format!("{:.1} GFLOP/s", flops / 1e9) } else { format!("{:.1} TFLOP/s", flops / 1e12) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_largest_unit() {
        assert_eq!([0, 1023, 1 << 20, 3 << 40].map(bytes), ["0 B", "1023 B", "1.0 MiB", "3072.0 GiB"]);
        assert_eq!([0.0, 0.0312, 1.84, 75.0].map(time), ["0s", "31.20ms", "1.84s", "75.00s"]);
        assert_eq!([2.5e10, 2.5e14].map(rate), ["25.0 GFLOP/s", "250.0 TFLOP/s"]);
    }
}
