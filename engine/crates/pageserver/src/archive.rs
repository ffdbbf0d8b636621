//! WAL from object storage, when all safekeepers have removed what the shard needs next.

use std::rc::Rc;

use filter::WalFilter;
use pgtypes::Lsn;
use remote_storage::{ARCHIVE_SEGMENT_BYTES, ArchiveError, WalArchive};
use wire::append::{FrameReader, Hello, Message, Purpose, decode};

use crate::{
    feed::{FeedError, SILENCE_LIMIT, open},
    owner::Owner,
};

/// Takes in archived segments from the shard's position on, as far as there are any.
///
/// Segments end within records. The last of them is finished with plain WAL of a safekeeper: it no longer has where that record
/// begins, and so cannot feed the shard, while the archive gets the rest only with the next whole segment.
///
/// # Errors
/// For the log: nothing was there, or it cannot be had or taken in.
pub async fn from_archive(owner: &Rc<Owner>) -> Result<(), String> {
    owner.source.borrow_mut().name = "archive".to_owned();
    let position = owner.position();
    let mut filter = WalFilter::new(position, owner.segment_bytes, owner.range(), owner.striping);
    let archive = WalArchive::new(owner.store.storage().clone(), owner.log());
    tracing::info!(from = %position.record_end, "reading WAL from the archive");
    while !owner.is_stopping() {
        let at = filter.position();
        let begin = at.floor(ARCHIVE_SEGMENT_BYTES);
        let segment = match archive.get_segment(begin).await {
            Ok(segment) => segment,
            Err(ArchiveError::Storage(error)) if error.is_not_found() && at > position.record_end => {
                let is_within_record = filter.summary().record_end < at;
                return if is_within_record { finish_record(owner, &mut filter).await } else { Ok(()) };
            }
            Err(error) => return Err(error.to_string()),
        };
        owner.process.metrics.received_bytes.inc_by(segment.len() as u64);
        let rest = segment.get(at.offset_in(ARCHIVE_SEGMENT_BYTES) as usize..).unwrap_or_default();
        if rest.is_empty() {
            return Err(format!("archived segment {begin} ends before {at}"));
        }
        take(owner, &mut filter, rest, Lsn::INVALID)
            .await
            .map_err(|error| format!("archived segment {begin}: {error}"))?;
    }
    Ok(())
}

/// Feeds the filter, and takes in what comes out.
async fn take(owner: &Owner, filter: &mut WalFilter, mut wal: &[u8], commit_lsn: Lsn) -> Result<(), FeedError> {
    while !wal.is_empty() {
        let fed = filter.feed(wal)?;
        wal = &wal[fed..];
        let commit_lsn = commit_lsn.max(owner.commit_lsn()).max(filter.summary().record_end);
        if let Some(batch) = filter.take_batch(commit_lsn, owner.term()) {
            owner.take_in(batch).await?;
        }
    }
    Ok(())
}

async fn finish_record(owner: &Owner, filter: &mut WalFilter) -> Result<(), String> {
    let mut failed = String::new();
    for safekeeper in &owner.process.config.safekeepers {
        match read_on(owner, filter, &safekeeper.append).await {
            Ok(()) => return Ok(()),
            Err(error) => failed = format!("{}: {error}", safekeeper.append),
        }
    }
    Err(format!("the archive ends within a record at {}, and its rest cannot be had: {failed}", filter.position()))
}

/// Takes plain WAL of a safekeeper in until a record has ended.
async fn read_on(owner: &Owner, filter: &mut WalFilter, address: &str) -> Result<(), FeedError> {
    let purpose = Purpose::Read { begin_lsn: filter.position() };
    let hello = Hello { log: owner.log(), system_id: owner.system_id, purpose };
    let before = filter.summary().record_end;
    let mut connection = open(hello, address, owner.process.tls.as_ref()).await?;
    let mut frames = FrameReader::new();
    loop {
        while let Some(frame) = frames.next()? {
            match decode(frame)? {
                Message::WalData(data) if data.begin_lsn == filter.position() => {
                    owner.process.metrics.received_bytes.inc_by(data.bytes.len() as u64);
                    take(owner, filter, data.bytes, data.commit_lsn).await?;
                    if filter.summary().record_end > before {
                        return Ok(());
                    }
                }
                Message::Error(error) => return Err(FeedError::Refused(error.code, error.text)),
                _ => return Err(FeedError::Unexpected),
            }
        }
        // Dropping the read loses nothing: the connection is given up with it.
        let read = driver::timeout(SILENCE_LIMIT, connection.read(frames.take_buffer(false))).await;
        let (read, buffer) = read.ok_or(FeedError::Silent)?;
        frames.return_buffer(buffer);
        if read? == 0 {
            return Err(FeedError::Closed);
        }
    }
}
