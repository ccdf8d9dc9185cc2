//! Lists of CPU numbers in the kernel's form: `0-3,8`, with `a-b:used/group` steps understood.

use std::collections::BTreeSet;

/// Largest CPU number understood; the kernel's own limit is 8192 CPUs.
pub const CPU_MAX: u32 = 8191;

/// Why a CPU list is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuListError {
    /// Something in it is no number.
    #[error("`{0}` is no CPU number or range such as `0-3`")]
    NotANumber(String),
    /// A number beyond [`CPU_MAX`].
    #[error("CPU `{0}` is beyond {CPU_MAX}, the last one the kernel can have")]
    TooLarge(String),
    /// A range that ends before it starts.
    #[error("range `{0}` ends before it starts")]
    Backwards(String),
    /// The same CPU twice.
    #[error("CPU {0} is in it twice")]
    Twice(u32),
}

/// Reads `text`; the result is ascending and without duplicates. Empty text is an empty list.
///
/// # Errors
/// If something in `text` is not a number or range, or a CPU is in it twice.
pub fn parse(text: &str) -> Result<Vec<u32>, CpuListError> {
    let mut cpus = BTreeSet::new();
    for part in text.split(',').map(str::trim) {
        if part.is_empty() && text.trim().is_empty() {
            continue;
        }
        let (range, step) = match part.split_once(':') {
            Some((range, step)) => (range, Some(step)),
            None => (part, None),
        };
        let (first, last) = match range.split_once('-') {
            Some((first, last)) => (number(first, part)?, number(last, part)?),
            None => (number(range, part)?, number(range, part)?),
        };
        if last < first {
            return Err(CpuListError::Backwards(part.to_owned()));
        }
        let (used, group) = match step.map(|step| step.split_once('/').ok_or(step)) {
            None => (1, 1),
            Some(Ok((used, group))) => (number(used, part)?, number(group, part)?),
            Some(Err(_)) => return Err(CpuListError::NotANumber(part.to_owned())),
        };
        if group == 0 {
            return Err(CpuListError::NotANumber(part.to_owned()));
        }
        for cpu in (first..=last).filter(|cpu| (cpu - first) % group < used) {
            if !cpus.insert(cpu) {
                return Err(CpuListError::Twice(cpu));
            }
        }
    }
    Ok(cpus.into_iter().collect())
}

fn number(digits: &str, part: &str) -> Result<u32, CpuListError> {
    let digits = digits.trim();
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(CpuListError::NotANumber(part.to_owned()));
    }
    digits.parse().ok().filter(|&cpu| cpu <= CPU_MAX).ok_or_else(|| CpuListError::TooLarge(digits.to_owned()))
}

/// Writes CPUs in the kernel's form; order and duplicates in `cpus` do not matter.
#[must_use]
pub fn format(cpus: &[u32]) -> String {
    let mut sorted: Vec<u32> = cpus.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for cpu in sorted {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == cpu => *last = cpu,
            _ => ranges.push((cpu, cpu)),
        }
    }
    let parts: Vec<String> = ranges
        .into_iter()
        .map(|(first, last)| if first == last { first.to_string() } else { format!("{first}-{last}") })
        .collect();
    parts.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_numbers_ranges_and_steps() {
        assert_eq!(parse("").unwrap(), Vec::<u32>::new());
        assert_eq!(parse(" \n").unwrap(), Vec::<u32>::new());
        assert_eq!(parse("0-3,8").unwrap(), [0, 1, 2, 3, 8]);
        assert_eq!(parse("8, 0-1\n").unwrap(), [0, 1, 8]);
        assert_eq!(parse("0-7:2/4").unwrap(), [0, 1, 4, 5]);
        assert_eq!(parse("8191").unwrap(), [8191]);
    }

    #[test]
    fn refuses_what_is_no_list() {
        for (text, error) in [
            ("a", CpuListError::NotANumber("a".into())),
            ("1,", CpuListError::NotANumber(String::new())),
            ("-3", CpuListError::NotANumber("-3".into())),
            ("+3", CpuListError::NotANumber("+3".into())),
            ("0-7:2", CpuListError::NotANumber("0-7:2".into())),
            ("0-7:1/0", CpuListError::NotANumber("0-7:1/0".into())),
            ("8192", CpuListError::TooLarge("8192".into())),
            ("0-99999999999", CpuListError::TooLarge("99999999999".into())),
            ("3-1", CpuListError::Backwards("3-1".into())),
            ("0-3,2", CpuListError::Twice(2)),
        ] {
            assert_eq!(parse(text), Err(error), "{text}");
        }
    }

    #[test]
    fn writes_ranges() {
        assert_eq!(format(&[]), "");
        assert_eq!(format(&[8, 2, 1, 0, 3, 3]), "0-3,8");
    }
}
