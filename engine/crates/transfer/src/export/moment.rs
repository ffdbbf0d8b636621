//! As of when an export is: a position of the log, or a time.

use std::str::FromStr;

use pgtypes::Lsn;

/// Seconds from 1970-01-01 to 2000-01-01, where PostgreSQL's time begins.
const POSTGRES_EPOCH_SECONDS: i64 = 946_684_800;
const DAY_SECONDS: i64 = 86_400;

/// As of when.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Moment {
    /// Everything that ends at or before this position.
    Position(Lsn),
    /// Everything that was committed at or before this time, microseconds since 2000-01-01 UTC (`TimestampTz`).
    Time(i64),
}

/// The text is neither a position nor a time.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "{0:?}: expected a position, as in 1/5A28D0, or a time with its zone, as in 2026-11-27T18:30:00Z or \"2026-11-27 18:30:00.5+01\""
)]
pub struct ParseMomentError(String);

impl FromStr for Moment {
    type Err = ParseMomentError;

    fn from_str(text: &str) -> Result<Moment, ParseMomentError> {
        let error = || ParseMomentError(text.to_owned());
        match text.parse() {
            Ok(lsn) => Ok(Moment::Position(lsn)),
            Err(_) => parse_time(text).map(Moment::Time).ok_or_else(error),
        }
    }
}

/// `YYYY-MM-DD HH:MM:SS[.FRACTION]ZONE`, with a space or `T` in the middle; ZONE is `Z`, `±HH` or `±HH:MM`.
fn parse_time(text: &str) -> Option<i64> {
    let (date, rest) = text.split_once([' ', 'T'])?;
    let zone_at = rest.find(['Z', '+', '-'])?;
    let (time, zone) = rest.split_at(zone_at);
    let [year, month, day] = numbers(date, '-', [4, 2, 2])?;
    let (clock, fraction) = time.split_once('.').unwrap_or((time, "0"));
    let [hour, minute, second] = numbers(clock, ':', [2, 2, 2])?;
    let is_valid = (1..=12).contains(&month)
        && (1..=days_of_month(year, month)).contains(&day)
        && hour < 24
        && minute < 60
        && second < 60;
    if !is_valid || fraction.is_empty() || fraction.len() > 9 || !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let microseconds: i64 = format!("{fraction:0<6}").get(..6)?.parse().ok()?;
    let seconds = days_since_1970(year, month, day) * DAY_SECONDS + hour * 3600 + minute * 60 + second;
    let seconds = seconds - zone_seconds(zone)? - POSTGRES_EPOCH_SECONDS;
    Some(seconds * 1_000_000 + microseconds)
}

/// East of Greenwich.
fn zone_seconds(zone: &str) -> Option<i64> {
    if zone == "Z" {
        return Some(0);
    }
    let (sign, rest) = match zone.split_at_checked(1)? {
        ("+", rest) => (1, rest),
        ("-", rest) => (-1, rest),
        _ => return None,
    };
    let [hours, minutes] = match rest.len() {
        2 => numbers(rest, ':', [2]).map(|[hours]| [hours, 0])?,
        _ => numbers(rest, ':', [2, 2])?,
    };
    (hours < 16 && minutes < 60).then_some(sign * (hours * 3600 + minutes * 60))
}

/// Numbers of these many digits.
fn numbers<const N: usize>(text: &str, separator: char, digits: [usize; N]) -> Option<[i64; N]> {
    let mut parts = text.split(separator);
    let mut numbers = [0; N];
    for (number, digits) in numbers.iter_mut().zip(digits) {
        let part = parts.next().filter(|part| part.len() == digits && part.bytes().all(|b| b.is_ascii_digit()))?;
        *number = part.parse().ok()?;
    }
    parts.next().is_none().then_some(numbers)
}

fn days_of_month(year: i64, month: i64) -> i64 {
    let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    match month {
        2 => 28 + i64::from(is_leap),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    // Leap days up to the end of a year, counted from year 0 on.
    let leap_days = |year: i64| year / 4 - year / 100 + year / 400;
    let before_year = 365 * (year - 1970) + leap_days(year - 1) - leap_days(1969);
    let before_month: i64 = (1..month).map(|month| days_of_month(year, month)).sum();
    before_year + before_month + day - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_and_times() {
        let second = 1_000_000;
        for (text, expected) in [
            ("1/5A28D0", Moment::Position(Lsn(0x1_005A_28D0))),
            ("2000-01-01T00:00:00Z", Moment::Time(0)),
            ("2000-01-01 00:00:01.5+00", Moment::Time(1_500_000)),
            ("2000-01-01 00:00:00.000001Z", Moment::Time(1)),
            ("2000-01-01 01:00:00+01", Moment::Time(0)),
            ("1999-12-31 20:00:00-04:00", Moment::Time(0)),
            ("2000-01-01 05:30:00+05:30", Moment::Time(0)),
            ("1999-12-31 23:59:59Z", Moment::Time(-second)),
            // date -u -d '2026-11-27 18:30:00' +%s: 1795804200.
            ("2026-11-27 18:30:00Z", Moment::Time((1_795_804_200 - POSTGRES_EPOCH_SECONDS) * second)),
            // date -u -d '2024-02-29 12:00:00' +%s: 1709208000.
            ("2024-02-29T12:00:00Z", Moment::Time((1_709_208_000 - POSTGRES_EPOCH_SECONDS) * second)),
        ] {
            assert_eq!(Ok(expected), text.parse(), "{text}");
        }
    }

    /// A time without a zone would mean another moment on another machine.
    #[test]
    fn everything_else_is_refused() {
        for text in [
            "",
            "now",
            "1",
            "2026-11-27",
            "2026-11-27 18:30:00",
            "2026-11-27 18:30Z",
            "2026-13-27 18:30:00Z",
            "2026-02-29 18:30:00Z",
            "2026-11-27 24:00:00Z",
            "2026-11-27 18:30:00.Z",
            "2026-11-27 18:30:00.1234567890Z",
            "2026-11-27 18:30:00+1",
            "2026-11-27 18:30:00+17",
            "2026-11-27 18:30:00+01:0",
            "2026-11-27 18:30:00ZZ",
            "26-11-27 18:30:00Z",
            "2026-11-27 18:30:00Ä",
        ] {
            assert!(text.parse::<Moment>().is_err(), "{text}");
        }
    }
}
