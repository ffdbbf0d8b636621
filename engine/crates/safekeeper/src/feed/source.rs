//! Where a subscriber's records come from: the shared window, or a decoder of its own.

use std::rc::Rc;

use driver::AlignedBuffer;
use filter::{Cutter, Router};
use logstore::Reader;
use pgtypes::Lsn;
use wal::WalError;

use super::{
    Subscription,
    feeds::{Wanted, Way},
};
use crate::{files::ReadError, log::LogDriver};

/// WAL that is read at once. More than a batch brings no speed and holds memory.
const READ_BYTES: usize = 512 << 10;

/// Why a feed cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum SourceError {
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Committed WAL that is none, or a position that is none of this log.
    #[error("the log cannot be decoded from the position that was asked for: {0}")]
    Decode(#[from] WalError),
}

/// What came of an attempt to get more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Progress {
    /// Look at the cutter.
    Made,
    /// Nothing before this is there.
    Wait(Wanted),
}

/// A decoder of its own, and the bytes that it has not taken yet.
struct Own {
    router: Router,
    read: Option<(AlignedBuffer, usize)>,
}

pub(super) struct Source {
    log: Rc<LogDriver>,
    subscription: Subscription,
    segment_bytes: u64,
    own: Option<Own>,
}

impl Source {
    pub(super) fn new(log: Rc<LogDriver>, subscription: Subscription) -> Source {
        let segment_bytes = log.with(|log| log.acceptor().identity().segment_bytes);
        Source { log, subscription, segment_bytes, own: None }
    }

    /// Brings records into `cutter` until it is full or all that is committed is in it.
    ///
    /// May be dropped at any await: the window and the cutter are as before.
    pub(super) async fn advance(&mut self, cutter: &mut Cutter) -> Result<Progress, SourceError> {
        let readable = self.log.with(|log| log.acceptor().readable_until());
        let before = cutter.through();
        let striping = self.subscription.striping;
        let way = self.log.feeds().fill(cutter, striping, self.segment_bytes, readable);
        if cutter.through() > before {
            self.own = None;
            return Ok(Progress::Made);
        }
        match way {
            Way::Window { position, first } => {
                self.own = None;
                if !first || nothing_at(&self.log, position) {
                    return Ok(Progress::Wait(Wanted::Window(before)));
                }
                let feeds = self.log.feeds().clone();
                let reading = feeds.begin_read();
                let bytes = self.log.read_wal(position, READ_BYTES).await?;
                self.log.process().metrics.count_decoded("shared", bytes.len() as u64);
                reading.done(&bytes)?;
                self.log.wake();
                Ok(Progress::Made)
            }
            Way::Own => self.decode(cutter).await,
        }
    }

    async fn decode(&mut self, cutter: &mut Cutter) -> Result<Progress, SourceError> {
        let (summary, segment_bytes, striping) = (cutter.summary(), self.segment_bytes, self.subscription.striping);
        let own =
            self.own.get_or_insert_with(|| Own { router: Router::new(summary, segment_bytes, striping), read: None });
        if own.read.is_none() {
            let position = own.router.position();
            let log = &self.log;
            if nothing_at(log, position) {
                return Ok(Progress::Wait(Wanted::Own(position)));
            }
            let bytes = log.read_wal(position, READ_BYTES).await?;
            log.process().metrics.count_decoded("own", bytes.len() as u64);
            own.read = Some((bytes, 0));
        }
        if let Some((bytes, taken)) = &mut own.read {
            while *taken < bytes.len() && !cutter.is_full() {
                *taken += own.router.feed(&bytes[*taken..])?;
                if let Some(routed) = own.router.poll() {
                    cutter.push(&routed);
                }
            }
            cutter.advance(own.router.summary());
            if *taken == bytes.len() {
                own.read = None;
            }
        }
        Ok(Progress::Made)
    }
}

/// Whether the log has nothing from `position` on. A position that it has no more is an error that a read explains.
fn nothing_at(log: &LogDriver, position: Lsn) -> bool {
    log.with(|log| log.readable(position, Reader::Anyone).is_ok_and(|end| end <= position))
}
