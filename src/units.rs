//! Sizes, rates, durations and shares as the command line takes them: with units.

use std::time::Duration;

/// A value that can't be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Not a size.
    #[error("not a size; write bytes with K, M, G or T for powers of 1024, such as 512M")]
    Size,
    /// Not a rate.
    #[error(
        "not a rate; write bits a second with bit, kbit, mbit or gbit, such as 100mbit, or 0 for no limit"
    )]
    Rate,
    /// Not a duration.
    #[error("not a duration; write a number with ms, s, m or h, such as 100ms or 10m")]
    Duration,
    /// Not a share.
    #[error("not a share; write a number from 0 to 100 with a percent sign, such as 0.5%")]
    Share,
}

/// Bytes: `512M`, `4GiB`, `4096`.
pub fn size(text: &str) -> Result<u64, UnitError> {
    let (number, unit) = split(text);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err(UnitError::Size),
    };
    let number: u64 = number.parse().map_err(|_| UnitError::Size)?;
    number.checked_mul(1 << shift).ok_or(UnitError::Size)
}

/// Bits a second: `1gbit`, `2.5gbit`; `0` is no limit.
pub fn rate(text: &str) -> Result<u64, UnitError> {
    let (number, unit) = split(text);
    let factor: f64 = match unit.to_ascii_lowercase().as_str() {
        "bit" => 1.0,
        "kbit" => 1e3,
        "mbit" => 1e6,
        "gbit" => 1e9,
        "" if number == "0" => 0.0,
        _ => return Err(UnitError::Rate),
    };
    let number: f64 = number.parse().map_err(|_| UnitError::Rate)?;
    let bits = number * factor;
    // All below is exact in a float, and no network is faster.
    if (0.0..1e15).contains(&bits) {
        Ok(bits.round() as u64)
    } else {
        Err(UnitError::Rate)
    }
}

/// A time: `100ms`, `10m`, `1h 30m`.
pub fn duration(text: &str) -> Result<Duration, UnitError> {
    humantime::parse_duration(text).map_err(|_| UnitError::Duration)
}

/// A part of the whole, from 0 to 1: `0%`, `0.5%`.
pub fn share(text: &str) -> Result<f64, UnitError> {
    let number = text.strip_suffix('%').ok_or(UnitError::Share)?;
    let percent: f64 = number.parse().map_err(|_| UnitError::Share)?;
    if (0.0..=100.0).contains(&percent) {
        Ok(percent / 100.0)
    } else {
        Err(UnitError::Share)
    }
}

/// A number and what stands behind it.
fn split(text: &str) -> (&str, &str) {
    let end = text
        .find(|c: char| c.is_ascii_alphabetic())
        .unwrap_or(text.len());
    text.split_at(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("1k", 1024),
            ("512M", 512 << 20),
            ("512MiB", 512 << 20),
            ("4G", 4 << 30),
            ("1T", 1 << 40),
            ("16777215T", 16_777_215 << 40),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "M",
            "-1M",
            "+",
            "1.5G",
            "1 G",
            "1X",
            "1MB",
            "16777216T",
            "99999999999999999999",
            "0x10",
        ] {
            assert_eq!(size(text), Err(UnitError::Size), "{text}");
        }
    }

    #[test]
    fn rates_are_bits_and_powers_of_1000() {
        for (text, bits) in [
            ("0", 0),
            ("0gbit", 0),
            ("800bit", 800),
            ("5kbit", 5_000),
            ("100mbit", 100_000_000),
            ("1gbit", 1_000_000_000),
            ("2.5Gbit", 2_500_000_000),
        ] {
            assert_eq!(rate(text), Ok(bits), "{text}");
        }
        for text in [
            "", "1", "1000", "1g", "1gb", "-1mbit", "mbit", "1e99gbit", "infbit", "NaNbit",
            "1 mbit",
        ] {
            assert_eq!(rate(text), Err(UnitError::Rate), "{text}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(duration("100ms"), Ok(Duration::from_millis(100)));
        assert_eq!(duration("10m"), Ok(Duration::from_secs(600)));
        assert_eq!(duration("0ms"), Ok(Duration::ZERO));
        for text in ["", "10", "ten minutes", "-1s", "99999999999999999999h"] {
            assert_eq!(duration(text), Err(UnitError::Duration), "{text}");
        }
    }

    #[test]
    fn shares_are_percentages() {
        assert_eq!(share("0%"), Ok(0.0));
        assert_eq!(share("0.5%"), Ok(0.005));
        assert_eq!(share("100%"), Ok(1.0));
        for text in ["", "%", "5", "0.5", "101%", "-1%", "NaN%"] {
            assert_eq!(share(text), Err(UnitError::Share), "{text}");
        }
    }
}
