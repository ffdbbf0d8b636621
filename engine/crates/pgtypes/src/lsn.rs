//! Log sequence numbers.

use core::{fmt, str::FromStr};

/// A byte position in the write-ahead log, counted from the birth of the PostgreSQL cluster.
///
/// Displayed and parsed as PostgreSQL does: `high/low` in hexadecimal (`pg_lsn`, `LSN_FORMAT_ARGS`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(pub u64);

impl Lsn {
    /// PostgreSQL's `InvalidXLogRecPtr`: no position.
    pub const INVALID: Lsn = Lsn(0);
    /// The largest position.
    pub const MAX: Lsn = Lsn(u64::MAX);

    /// Whether this is a position at all.
    pub const fn is_valid(self) -> bool {
        self.0 != 0
    }

    /// The next position aligned to 8 bytes, at or after this one (`MAXALIGN`).
    pub const fn align8(self) -> Lsn {
        Lsn((self.0 + 7) & !7)
    }

    /// Start of the unit of `size_bytes` (a power of two: page, segment) that holds this position.
    pub const fn floor(self, size_bytes: u64) -> Lsn {
        Lsn(self.0 & !(size_bytes - 1))
    }

    /// Offset of this position in its unit of `size_bytes` (a power of two).
    pub const fn offset_in(self, size_bytes: u64) -> u64 {
        self.0 & (size_bytes - 1)
    }

    /// The position `bytes` further on.
    ///
    /// # Panics
    /// On overflow: positions near 2^64 do not occur in a real log, parse them out at the edge.
    #[must_use]
    pub const fn advance(self, bytes: u64) -> Lsn {
        match self.0.checked_add(bytes) {
            Some(value) => Lsn(value),
            None => panic!("log position overflow"),
        }
    }

    /// Bytes from `earlier` to this position, zero if `earlier` is later.
    pub const fn bytes_since(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not `hexadecimal/hexadecimal`, each part at most 8 digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParseLsnError;

impl fmt::Display for ParseLsnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a log position: expected HIGH/LOW in hexadecimal, as in 0/16B3748")
    }
}

impl core::error::Error for ParseLsnError {}

impl FromStr for Lsn {
    type Err = ParseLsnError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let part = |digits: &str| {
            let plain = !digits.is_empty() && digits.len() <= 8 && digits.bytes().all(|b| b.is_ascii_hexdigit());
            if !plain {
                return Err(ParseLsnError);
            }
            u64::from_str_radix(digits, 16).map_err(|_| ParseLsnError)
        };
        let (high, low) = text.split_once('/').ok_or(ParseLsnError)?;
        Ok(Lsn(part(high)? << 32 | part(low)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;

    #[test]
    fn text_form_round_trips() {
        for lsn in [Lsn(0), Lsn(0x16B_3748), Lsn(0x1_0000_0000), Lsn::MAX] {
            assert_eq!(Ok(lsn), lsn.to_string().parse());
        }
    }

    #[test]
    fn malformed_text_is_refused() {
        for text in ["", "/", "0", "0/", "/0", "0/0/0", "g/0", "0/123456789", "+1/0", " 0/0"] {
            assert_eq!(Err(ParseLsnError), text.parse::<Lsn>(), "{text:?}");
        }
    }
}
