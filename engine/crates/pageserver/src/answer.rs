//! What a reader asks, and the answer.

mod from_memory;

use std::time::Duration;

use futures_util::future::Either;
use identity::Call;
use layers::{Key, KeyKind, ValueKind};
use pgtypes::Lsn;
use redo::{PAGE_BYTES, Page};
use shard::{Advisory, Presence, StripeOf};
use wal::{Fork, RelFileLocator};
use wire::page::{
    AdvisoryTaken, FindLsn, GetMetadata, GetPages, GetSizes, LeaseGranted, LsnFound, NEWEST, PageErrorCode, PageFailed,
    PageMessage, Pages, SIZES_MAX, Sizes, StripeLength, TakeLease, metadata_parts,
};

use crate::{
    layer_files::LayerFault,
    metrics::ReasonLabels,
    owner::Owner,
    read::{ReadFault, yield_now},
    server::{Session, check_term},
    state::Wanted,
};

pub use from_memory::FromMemory;

/// How long a request waits for WAL.
const WAIT_LIMIT: Duration = Duration::from_secs(30);

/// Pages of one request that are read at a time.
const PAGES_AT_A_TIME: usize = 16;

/// Sizes that are put together before other tasks get their turn.
const SIZES_PER_TURN: usize = 4096;

/// A request of a reader.
pub enum Request {
    /// Pages.
    Pages(GetPages),
    /// Lengths.
    Sizes(GetSizes),
    /// Metadata.
    Metadata(GetMetadata),
    /// A lease.
    Lease(TakeLease),
    /// A file outside WAL.
    Advisory {
        /// Of the request.
        id: u64,
        /// Of the file.
        file: Advisory,
    },
    /// The position of a time.
    Find(FindLsn),
}

impl Request {
    /// The request, if the message is one.
    pub fn of(message: PageMessage<'_>) -> Option<Request> {
        Some(match message {
            PageMessage::GetPages(request) => Request::Pages(request),
            PageMessage::GetSizes(request) => Request::Sizes(request),
            PageMessage::GetMetadata(request) => Request::Metadata(request),
            PageMessage::TakeLease(request) => Request::Lease(request),
            PageMessage::PutAdvisory(put) => Request::Advisory {
                id: put.id,
                file: Advisory { name: put.name.to_owned(), contents: put.contents.to_vec() },
            },
            PageMessage::FindLsn(request) => Request::Find(request),
            _ => return None,
        })
    }

    fn id(&self) -> u64 {
        match self {
            Request::Pages(request) => request.id,
            Request::Sizes(request) => request.id,
            Request::Metadata(request) => request.id,
            Request::Lease(request) => request.id,
            Request::Advisory { id, .. } => *id,
            Request::Find(request) => request.id,
        }
    }
}

/// Code and text of a request that failed.
type Failure = (PageErrorCode, String);

/// The label of a code in the metrics.
pub fn label_of(code: PageErrorCode) -> ReasonLabels {
    let reason = match code {
        PageErrorCode::NotYetThere => "not_yet_there",
        PageErrorCode::BelowHorizon => "below_horizon",
        PageErrorCode::WrongShardOwner => "wrong_shard_owner",
        PageErrorCode::StaleTerm => "stale_term",
        PageErrorCode::Poisoned => "poisoned",
        PageErrorCode::LayerLost => "layer_lost",
        PageErrorCode::Busy => "busy",
        PageErrorCode::BadRequest => "bad_request",
        PageErrorCode::Stopping => "stopping",
        PageErrorCode::NoSuchBlock => "no_such_block",
        PageErrorCode::WrongVersion => "wrong_version",
        PageErrorCode::UnknownLog => "unknown_log",
        PageErrorCode::NotAllowed => "not_allowed",
        PageErrorCode::Internal | PageErrorCode::Other(_) => "internal",
    };
    ReasonLabels { reason }
}

fn failure_of(fault: &ReadFault) -> Failure {
    let code = match fault {
        ReadFault::BelowHorizon { .. } | ReadFault::Before { .. } => PageErrorCode::BelowHorizon,
        ReadFault::OtherShard { .. } => PageErrorCode::WrongShardOwner,
        ReadFault::NoSuchBlock { .. } => PageErrorCode::NoSuchBlock,
        ReadFault::Layer(LayerFault::Lost { .. }) => PageErrorCode::LayerLost,
        // It may answer again: the reader's deadline decides how long that is waited for.
        ReadFault::Layer(LayerFault::Unavailable { .. }) => PageErrorCode::Busy,
        ReadFault::Poisoned(_) => PageErrorCode::Poisoned,
        ReadFault::Layer(LayerFault::Gone(_)) | ReadFault::Internal(_) => PageErrorCode::Internal,
    };
    (code, fault.to_string())
}

/// Answers a request.
pub async fn answer(owner: &Owner, session: &Session, request: Request) {
    let id = request.id();
    let result = match check_term(owner, session.role) {
        Err(failure) => Err(failure),
        Ok(()) => match request {
            Request::Pages(request) => pages(owner, session, request).await,
            Request::Sizes(request) => sizes(owner, session, request).await,
            Request::Metadata(request) => metadata(owner, session, request).await,
            Request::Lease(request) => lease(owner, session, request),
            Request::Advisory { id, file } => advisory(owner, session, id, &file),
            Request::Find(request) => find(owner, session, request).await,
        },
    };
    if let Err((code, text)) = result {
        owner.process.metrics.failures.get_or_create(&label_of(code)).inc();
        // A layer that is lost was named when it was found: a line for each of its pages would bury that one.
        let is_ours = matches!(code, PageErrorCode::Poisoned | PageErrorCode::Internal);
        if is_ours && owner.process.notices.is_new(&text, driver::now()) {
            tracing::error!("a read failed: {text}");
        }
        session.outbox.push(&PageMessage::PageFailed(PageFailed { id, code, text }));
    }
}

/// Waits until `lsn` is ingested.
async fn until_ingested(owner: &Owner, lsn: Lsn) -> Result<(), Failure> {
    if owner.ingested() >= lsn {
        return Ok(());
    }
    if owner.wanted.get().is_none_or(|(wanted, _)| wanted <= owner.ingested()) {
        owner.wanted.set(Some((lsn, driver::now())));
    }
    let arrived = owner.moved.until(|| (owner.ingested() >= lsn || owner.is_stopping()).then_some(()));
    let (arrived, limit) = (std::pin::pin!(arrived), std::pin::pin!(driver::sleep(WAIT_LIMIT)));
    if let Either::Right(_) = futures_util::future::select(arrived, limit).await {
        // Nobody waits for it any more, as far as is known: another safekeeper need not be asked for it.
        if owner.wanted.get().is_some_and(|(wanted, _)| wanted == lsn) {
            owner.wanted.set(None);
        }
        let text = format!(
            "{lsn} was not ingested within {WAIT_LIMIT:?}: the shard is at {}, {} is committed as far as it knows",
            owner.ingested(),
            owner.commit_lsn()
        );
        return Err((PageErrorCode::NotYetThere, text));
    }
    match owner.ingested() >= lsn {
        true => Ok(()),
        false => Err((PageErrorCode::Stopping, "this page server is stopping".to_owned())),
    }
}

/// The position that `at` asks for, once it is there.
async fn position(owner: &Owner, at: Lsn) -> Result<Lsn, Failure> {
    if at == NEWEST {
        return Ok(owner.ingested());
    }
    until_ingested(owner, at).await?;
    let horizon = owner.horizon();
    match at < horizon {
        true => Err(failure_of(&ReadFault::BelowHorizon { lsn: at, horizon })),
        false => Ok(at),
    }
}

async fn pages(owner: &Owner, session: &Session, request: GetPages) -> Result<(), Failure> {
    let begun = driver::now();
    let GetPages { id, relation, fork, first_block, count, .. } = request;
    let last = first_block.checked_add(u32::from(count) - 1);
    let stripe = owner.striping.stripe_of(first_block);
    if last.is_none_or(|last| owner.striping.stripe_of(last) != stripe) {
        let text = format!("{count} blocks from {first_block} on are not of one stripe");
        return Err((PageErrorCode::BadRequest, text));
    }
    until_ingested(owner, request.not_modified_since).await?;
    // While it waited, WAL of a later term may have come, which is no past of this writer.
    check_term(owner, session.role)?;
    let lsn = request.request_lsn.min(owner.ingested());
    let keys: Vec<Key> =
        (0..u32::from(count)).map(|number| owner.striping.block(relation, fork, first_block + number)).collect();
    let size =
        owner.stripe_at(keys[0], lsn).await.map_err(|fault| describe(&fault, relation, fork, first_block, lsn))?;
    let mut bytes = vec![0; keys.len() * PAGE_BYTES];
    for (some, keys) in bytes.chunks_mut(PAGES_AT_A_TIME * PAGE_BYTES).zip(keys.chunks(PAGES_AT_A_TIME)) {
        let reads = some.chunks_mut(PAGE_BYTES).zip(keys).map(|(to, key)| async move {
            let mut page = Page::ZERO;
            let presence = owner.page(*key, lsn, size, &mut page).await?;
            to.copy_from_slice(&page.0);
            Ok::<Presence, ReadFault>(presence)
        });
        let done = futures_util::future::join_all(reads).await;
        for (number, result) in done.into_iter().enumerate() {
            let Some(Ok(wal_block)) = keys.get(number).map(|key| key.kind()) else { continue };
            let KeyKind::Block { block, .. } = wal_block else { continue };
            let presence = result.map_err(|fault| describe(&fault, relation, fork, block, lsn))?;
            if presence == Presence::Present && owner.checksums {
                let page = some.chunks_exact_mut(PAGE_BYTES).nth(number).and_then(|page| page.try_into().ok());
                if let Some(page) = page {
                    pgformat::set_page_checksum(page, block);
                }
            }
        }
    }
    let metrics = &owner.process.metrics;
    metrics.pages.inc_by(keys.len() as u64);
    let message = PageMessage::Pages(Pages::new(id, lsn, &bytes));
    let mut head = Vec::new();
    if let Err(error) = wire::page::encode(&message, &mut head) {
        return Err((PageErrorCode::Internal, error.to_string()));
    }
    session.outbox.push_encoded(head, bytes);
    metrics.read_seconds.observe(driver::now().since(begun).as_secs_f64());
    Ok(())
}

/// The failure of a page, with the relation in the words of PostgreSQL.
fn describe(fault: &ReadFault, relation: RelFileLocator, fork: Fork, block: u32, lsn: Lsn) -> Failure {
    let (code, text) = failure_of(fault);
    let RelFileLocator { tablespace, database, relation } = relation;
    (code, format!("relation {tablespace}/{database}/{relation}, fork {fork:?}, block {block} at {lsn}: {text}"))
}

async fn sizes(owner: &Owner, session: &Session, request: GetSizes) -> Result<(), Failure> {
    let lsn = position(owner, request.at).await?;
    let mut entries: Vec<StripeLength> = Vec::new();
    let entry =
        |of: StripeOf, length: u32| StripeLength { relation: of.relation, fork: of.fork, stripe: of.stripe, length };
    if owner.files.has_lost() {
        // What ingest could not load is missing from it, or longer than it was: the layers say whether there is any.
        owner.keys_at(lsn, Wanted::StripeSizes, false).await.map_err(|fault| failure_of(&fault))?;
        let unreadable: Vec<Key> = owner.unreadable.borrow().iter().copied().collect();
        owner.values_of(&unreadable, lsn).await.map_err(|fault| failure_of(&fault))?;
    }
    if owner.applied() <= lsn {
        let ingest = owner.ingest.borrow();
        entries.extend(ingest.sizes().map(|(of, size)| entry(of, size.length)));
    } else {
        let keys = owner.keys_at(lsn, Wanted::StripeSizes, false).await.map_err(|fault| failure_of(&fault))?;
        for (key, value) in owner.values_of(&keys, lsn).await.map_err(|fault| failure_of(&fault))? {
            let size = shard::StripeSize::from_bytes(&value);
            let size = size.map_err(|error| (PageErrorCode::Internal, format!("{key:?}: {error}")))?;
            if let Ok(KeyKind::StripeSize { relation, fork, stripe }) = key.kind() {
                entries.push(entry(StripeOf { relation, fork, stripe }, size.length));
            }
        }
    }
    let mut parts = entries.chunks(SIZES_MAX.min(SIZES_PER_TURN)).peekable();
    let part = |entries: &[StripeLength], last| {
        PageMessage::Sizes(Sizes { id: request.id, lsn, entries: entries.to_vec(), last })
    };
    if parts.peek().is_none() {
        session.outbox.push(&part(&[], true));
    }
    while let Some(entries) = parts.next() {
        session.outbox.push(&part(entries, parts.peek().is_none()));
        yield_now().await;
    }
    Ok(())
}

async fn metadata(owner: &Owner, session: &Session, request: GetMetadata) -> Result<(), Failure> {
    if owner.range().begin != 0 {
        let text = "the metadata is on the shard that begins with hash 0".to_owned();
        return Err((PageErrorCode::WrongShardOwner, text));
    }
    let lsn = position(owner, request.at).await?;
    let keys = owner.keys_at(lsn, Wanted::Metadata, false).await.map_err(|fault| failure_of(&fault))?;
    let mut values = owner.values_of(&keys, lsn).await.map_err(|fault| failure_of(&fault))?;
    if lsn >= owner.ingested() {
        // Files that wait for a position are newer than any.
        for (key, value) in &*owner.advisories.borrow() {
            values.retain(|(known, _)| known != key);
            if !value.is_empty() {
                values.push((*key, value.clone()));
            }
        }
        values.sort_by_key(|(key, _)| *key);
    }
    let borrowed: Vec<(Key, &[u8])> = values.iter().map(|(key, value)| (*key, &value[..])).collect();
    for part in metadata_parts(request.id, lsn, &borrowed) {
        session.outbox.push(&PageMessage::MetadataPart(part));
        yield_now().await;
    }
    Ok(())
}

fn lease(owner: &Owner, session: &Session, request: TakeLease) -> Result<(), Failure> {
    let period = owner.process.config.retention.lease_period;
    let lsn = if request.lsn == NEWEST { owner.ingested() } else { request.lsn };
    let horizon = owner.horizon();
    let granted = owner.leases.borrow_mut().handle_lease(session.number, lsn, horizon, driver::now());
    granted.map_err(|refused| {
        let code = match refused {
            layers::LeaseRefused::BelowHorizon { .. } => PageErrorCode::BelowHorizon,
            layers::LeaseRefused::TooMany => PageErrorCode::Busy,
        };
        (code, refused.to_string())
    })?;
    let seconds = request.seconds.min(u32::try_from(period.as_secs()).unwrap_or(u32::MAX));
    session.outbox.push(&PageMessage::LeaseGranted(LeaseGranted { id: request.id, lsn, seconds }));
    Ok(())
}

fn advisory(owner: &Owner, session: &Session, id: u64, file: &Advisory) -> Result<(), Failure> {
    session
        .caller
        .authorize(Call::PutAdvisory, owner.log().cluster)
        .map_err(|error| (PageErrorCode::NotAllowed, error.to_string()))?;
    if owner.range().begin != 0 {
        let text = "files outside WAL are on the shard that begins with hash 0".to_owned();
        return Err((PageErrorCode::WrongShardOwner, text));
    }
    let value = match file.contents.is_empty() {
        true => Vec::new(),
        false => file.to_bytes().map_err(|error| (PageErrorCode::BadRequest, error.to_string()))?,
    };
    let (key, lsn) = (file.key(), owner.ingested());
    let kind = if value.is_empty() { ValueKind::Absent } else { ValueKind::Image };
    let is_put = owner.is_between_batches() && owner.state.borrow_mut().put(key, lsn, kind, value.clone()).is_ok();
    if is_put {
        // Older than what is put now.
        owner.advisories.borrow_mut().remove(&key);
        // Without an age, a layer with nothing else in it would stay in memory until WAL comes.
        owner.open_since.set(owner.open_since.get().or_else(|| Some(driver::now())));
    } else {
        // The position is in a layer that is frozen, or has one of that name: it gets the one at which the next batch ends.
        owner.advisories.borrow_mut().insert(key, value);
    }
    session.outbox.push(&PageMessage::AdvisoryTaken(AdvisoryTaken { id, lsn }));
    Ok(())
}

async fn find(owner: &Owner, session: &Session, request: FindLsn) -> Result<(), Failure> {
    if owner.range().begin != 0 {
        let text = "the times of commits are on the shard that begins with hash 0".to_owned();
        return Err((PageErrorCode::WrongShardOwner, text));
    }
    let (lsn, commit_timestamp) = owner.find_lsn(request.timestamp).await.map_err(|fault| failure_of(&fault))?;
    session.outbox.push(&PageMessage::LsnFound(LsnFound { id: request.id, lsn, commit_timestamp }));
    Ok(())
}
