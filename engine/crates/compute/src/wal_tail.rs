//! Committed WAL from a safekeeper, a page of it: what stands before X in the WAL page that a cold start goes on with.
//!
//! Knows nothing about records.

use std::{pin::pin, time::Duration};

use futures_util::future::{Either, select};
use identity::Call;
use pgtypes::Lsn;
use wire::append::{FrameReader, Message, Purpose, decode};

use crate::link::{self, Greeting, LinkError};

/// How long one safekeeper may take to send a page that it has; then the next one is asked, too.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// No safekeeper gave the bytes.
#[derive(Debug, thiserror::Error)]
#[error("the WAL from {begin} to {end} cannot be had from a safekeeper: {reason}")]
pub struct TailError {
    begin: Lsn,
    end: Lsn,
    /// The last safekeeper's reason, with its address.
    reason: String,
}

/// The bytes `[begin, end)` of committed WAL, from the first of `addresses` that gives them.
///
/// # Errors
/// None does: the last one's reason.
pub async fn fetch_tail(addresses: &[String], greeting: &Greeting, begin: Lsn, end: Lsn) -> Result<Vec<u8>, TailError> {
    let mut reason = "no safekeepers are known".to_owned();
    for address in addresses {
        let answer = pin!(read(address, greeting, begin, end));
        // Dropping the read loses nothing: the connection is given up with it.
        match select(answer, pin!(driver::sleep(ANSWER_LIMIT))).await {
            Either::Left((Ok(bytes), _)) => return Ok(bytes),
            Either::Left((Err(error), _)) => reason = format!("{address}: {error}"),
            Either::Right(_) => reason = format!("{address}: no answer within {ANSWER_LIMIT:?}"),
        }
        tracing::debug!(%reason, "the next safekeeper is asked for WAL");
    }
    Err(TailError { begin, end, reason })
}

async fn read(address: &str, greeting: &Greeting, begin: Lsn, end: Lsn) -> Result<Vec<u8>, LinkError> {
    let connection = link::open(address, greeting, Purpose::Read { begin_lsn: begin }, Call::ReadWal).await?;
    let (mut reader, _writer) = connection.into_split();
    let wanted = end.bytes_since(begin) as usize;
    let mut bytes = Vec::with_capacity(wanted);
    let mut frames = FrameReader::new();
    loop {
        while let Some(frame) = frames.next()? {
            match decode(frame)? {
                Message::WalData(data) => {
                    if data.begin_lsn != begin.advance(bytes.len() as u64) {
                        return Err(LinkError::Unexpected);
                    }
                    let missing = wanted - bytes.len();
                    bytes.extend_from_slice(&data.bytes[..data.bytes.len().min(missing)]);
                    if bytes.len() == wanted {
                        return Ok(bytes);
                    }
                }
                Message::Error(error) => return Err(LinkError::Refused(error.text)),
                _ => return Err(LinkError::Unexpected),
            }
        }
        let (read, buffer) = reader.read(frames.take_buffer(true)).await;
        frames.return_buffer(buffer);
        if read? == 0 {
            return Err(LinkError::Closed);
        }
    }
}
