//! Messages inside the copy stream of physical replication.

use alloc::vec::Vec;

use pgtypes::Lsn;

use super::ProtocolError;

/// What a follower sends inside the stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CopyMessage {
    /// How far it is.
    Status(StandbyStatus),
    /// Which rows its queries still need.
    Feedback(HotStandbyFeedback),
}

/// How far a follower is: positions behind the last byte of each kind, invalid when it does not say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StandbyStatus {
    /// Received and written.
    pub write_lsn: Lsn,
    /// Durable: WAL below is needed no more.
    pub flush_lsn: Lsn,
    /// Replayed.
    pub apply_lsn: Lsn,
    /// It wants a keep-alive at once.
    pub reply_requested: bool,
}

/// Oldest transactions that a hot standby's queries need; 0 when none. Kept for monitoring: there is no vacuum here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HotStandbyFeedback {
    /// Oldest transaction and its epoch.
    pub xmin: (u32, u32),
    /// The same for catalogs, by its slots.
    pub catalog_xmin: (u32, u32),
}

/// What the body of a `CopyData` message from a follower says.
///
/// # Errors
/// The client's fault: [`ProtocolError::Malformed`].
pub fn decode_copy(data: &[u8]) -> Result<CopyMessage, ProtocolError> {
    let (kind, body) = data.split_first().ok_or(ProtocolError::Malformed("copy data"))?;
    match kind {
        b'r' => {
            let fields: &[u8; 33] = body.try_into().map_err(|_| ProtocolError::Malformed("standby status"))?;
            Ok(CopyMessage::Status(StandbyStatus {
                write_lsn: Lsn(u64_at(fields, 0)),
                flush_lsn: Lsn(u64_at(fields, 8)),
                apply_lsn: Lsn(u64_at(fields, 16)),
                // Behind the client's time.
                reply_requested: fields[32] != 0,
            }))
        }
        b'h' => {
            let fields: &[u8; 24] = body.try_into().map_err(|_| ProtocolError::Malformed("hot standby feedback"))?;
            let pair = |at: usize| {
                let both = u64_at(fields, at);
                ((both >> 32) as u32, both as u32)
            };
            Ok(CopyMessage::Feedback(HotStandbyFeedback { xmin: pair(8), catalog_xmin: pair(16) }))
        }
        _ => Err(ProtocolError::Malformed("copy data")),
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Head of a `CopyData` message with `payload_bytes` of WAL from `start_lsn` on, which are sent right behind it.
/// `wal_end` is how far the server's WAL reaches; `now` in microseconds since 2000-01-01 UTC.
///
/// # Panics
/// `payload_bytes` above 1 GiB: callers send at most some 100 KiB.
pub fn wal_data_header(start_lsn: Lsn, wal_end: Lsn, now: i64, payload_bytes: usize) -> Vec<u8> {
    assert!(payload_bytes <= 1 << 30, "a message of {payload_bytes} bytes");
    let mut header = Vec::with_capacity(30);
    header.push(b'd');
    header.extend_from_slice(&(4 + 25 + payload_bytes as u32).to_be_bytes());
    header.push(b'w');
    header.extend_from_slice(&start_lsn.0.to_be_bytes());
    header.extend_from_slice(&wal_end.0.to_be_bytes());
    header.extend_from_slice(&now.to_be_bytes());
    header
}

/// A keep-alive: how far the server's WAL was sent, its time (microseconds since 2000-01-01 UTC), and whether the follower
/// shall answer at once.
pub fn keepalive(wal_end: Lsn, now: i64, reply_requested: bool) -> [u8; 23] {
    let mut message = [0; 23];
    message[..6].copy_from_slice(b"d\0\0\0\x16k");
    message[6..14].copy_from_slice(&wal_end.0.to_be_bytes());
    message[14..22].copy_from_slice(&now.to_be_bytes());
    message[22] = reply_requested.into();
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    #[test]
    fn status_and_feedback_are_read() {
        let mut status = vec![b'r'];
        for value in [0x1_0000_0010u64, 0x1_0000_0008, 0x1_0000_0000, 77] {
            status.extend_from_slice(&value.to_be_bytes());
        }
        status.push(1);
        let expected = StandbyStatus {
            write_lsn: Lsn(0x1_0000_0010),
            flush_lsn: Lsn(0x1_0000_0008),
            apply_lsn: Lsn(0x1_0000_0000),
            reply_requested: true,
        };
        assert_eq!(Ok(CopyMessage::Status(expected)), decode_copy(&status));

        let mut feedback = vec![b'h'];
        feedback.extend_from_slice(&77u64.to_be_bytes());
        for value in [700u32, 1, 800, 2] {
            feedback.extend_from_slice(&value.to_be_bytes());
        }
        let expected = HotStandbyFeedback { xmin: (700, 1), catalog_xmin: (800, 2) };
        assert_eq!(Ok(CopyMessage::Feedback(expected)), decode_copy(&feedback));

        for malformed in [&[][..], b"x", &status[..33], &feedback[..24], &[&status[..], b"x"].concat()] {
            assert!(decode_copy(malformed).is_err(), "{malformed:?}");
        }
    }

    #[test]
    fn wal_and_keepalives_have_their_length() {
        let header = wal_data_header(Lsn(1), Lsn(2), 3, 100);
        assert_eq!((30, b"d\0\0\0\x81w\0\0\0\0\0\0\0\x01"), (header.len(), header.first_chunk().unwrap()));
        let message = keepalive(Lsn(0x0102), 3, true);
        assert_eq!(b"d\0\0\0\x16k\0\0\0\0\0\0\x01\x02\0\0\0\0\0\0\0\x03\x01", &message);
    }
}
