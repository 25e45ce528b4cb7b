//! Numbers with units, as tables and sentences of plans have them.

use std::time::Duration;

/// A unit of bytes in which a list of numbers is written.
#[derive(Clone, Copy, Debug)]
pub struct Unit {
    /// The name: B, KiB, MiB or GiB.
    pub name: &'static str,
    size: u64,
}

impl Unit {
    /// Returns the largest unit of which the number of bytes is at least 1.
    pub fn of(bytes: u64) -> Self {
        let names = ["B", "KiB", "MiB", "GiB"];
        let power = (bytes.max(1).ilog2() as usize / 10).min(names.len() - 1);
        Self { name: names[power], size: 1 << (10 * power) }
    }

    /// Writes the number of bytes in this unit, without its name.
    pub fn count(self, bytes: u64) -> String {
        match self.size {
            1 => bytes.to_string(),
            size => format!("{:.1}", bytes as f64 / size as f64),
        }
    }
}

/// Writes a number of bytes with its unit.
pub fn bytes(bytes: u64) -> String {
    let unit = Unit::of(bytes);
    format!("{} {}", unit.count(bytes), unit.name)
}

/// Writes a number of seconds.
pub fn time(seconds: f64) -> String {
    match Duration::try_from_secs_f64(seconds) {
        Ok(Duration::ZERO) => "0s".into(),
        Ok(time) => format!("{time:.2?}"),
        Err(_) => format!("{seconds} s"),
    }
}

/// Writes a number of floating-point operations a second.
pub fn rate(flops: f64) -> String {
    if flops < 1e12 { format!("{:.1} GFLOP/s", flops / 1e9) } else { format!("{:.1} TFLOP/s", flops / 1e12) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_largest_unit() {
        assert_eq!([0, 1023, 1024, 80 << 30].map(bytes), ["0 B", "1023 B", "1.0 KiB", "80.0 GiB"]);
        assert_eq!([0, 1023, 1 << 20, 3 << 40].map(bytes), ["0 B", "1023 B", "1.0 MiB", "3072.0 GiB"]);
        assert_eq!(Unit::of(5 << 30).count(1 << 29), "0.5");
        assert_eq!([0.0, 0.0312, 1.84, 75.0].map(time), ["0s", "31.20ms", "1.84s", "75.00s"]);
        assert_eq!([2.5e10, 2.5e14].map(rate), ["25.0 GFLOP/s", "250.0 TFLOP/s"]);
    }
}
