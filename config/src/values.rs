//! Values with a form of their own: durations (`50ms`, `30s`, `2m`) and permission bits (`0660`).

use std::time::Duration;

/// Units of a duration with their length in milliseconds, longest first.
const UNITS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// Reads a whole number with a unit: `50ms`, `30s`, `2m`, `1h`. `None` if it is anything else.
#[must_use]
pub fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    let (_, unit_ms) = UNITS.iter().find(|(name, _)| *name == unit.trim_start())?;
    Some(Duration::from_millis(number.checked_mul(*unit_ms)?))
}

/// Writes a duration in the longest unit in which it is a whole number; parts below a millisecond are dropped.
#[must_use]
pub fn format_duration(duration: Duration) -> String {
    let ms = duration.as_millis();
    let (unit, unit_ms) = UNITS
        .into_iter()
        .find(|(_, unit_ms)| ms != 0 && ms.is_multiple_of(u128::from(*unit_ms)))
        .unwrap_or(("s", 1_000));
    format!("{}{unit}", ms / u128::from(unit_ms))
}

/// Reads permission bits in octal, `0660` or `660`. `None` if it is anything else or more than `0777`.
#[must_use]
pub fn parse_mode(text: &str) -> Option<u32> {
    let octal = (3..=4).contains(&text.len()) && text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
    octal.then(|| u32::from_str_radix(text, 8).ok()).flatten().filter(|&mode| mode <= 0o777)
}

/// Writes permission bits as `0660`.
#[must_use]
pub fn format_mode(mode: u32) -> String {
    format!("{mode:04o}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, ms) in [("0s", 0), ("50ms", 50), ("30s", 30_000), ("2m", 120_000), ("1h", 3_600_000)] {
            let duration = Duration::from_millis(ms);
            assert_eq!(parse_duration(text), Some(duration), "{text}");
            assert_eq!(format_duration(duration), text);
        }
        assert_eq!(parse_duration("1500 ms"), Some(Duration::from_millis(1500)));
        assert_eq!(format_duration(Duration::from_millis(1500)), "1500ms");
        for text in
            ["", "s", "5", "-5s", "5.5s", "5 sec", "1m30s", "99999999999999999999s", "18446744073709551615h"]
        {
            assert_eq!(parse_duration(text), None, "{text}");
        }
    }

    #[test]
    fn modes() {
        assert_eq!(parse_mode("0660"), Some(0o660));
        assert_eq!(parse_mode("600"), Some(0o600));
        assert_eq!(parse_mode("0777"), Some(0o777));
        for text in ["", "66", "0680", "1777", "00660", "-660", "rw-"] {
            assert_eq!(parse_mode(text), None, "{text}");
        }
        assert_eq!(format_mode(0o660), "0660");
    }
}
