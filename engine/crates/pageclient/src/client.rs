//! The client: requests to all shards as if they were one server.

use std::{
    cell::{Ref, RefCell},
    pin::pin,
    rc::Rc,
    time::Duration,
};

use driver::Event;
use futures_util::future::{select, try_join_all};
use layers::{Key, stripe_hash};
use pgtypes::{Instant, Lsn};
use wire::{
    append::WireError,
    page::{PAGE_BYTES, PAGES_MAX, PageErrorCode, PageProgress},
};

use crate::{
    config::{ClientConfig, ShardAddress},
    error::{BlockRead, Cause, PageError, RequestName},
    link::{Link, Setback},
    request::{Answer, Request},
    shard_map::{ShardMap, ShardMapError},
    sizes::{self, ForkLengths},
};

/// Pause before a request is made again that the server could not answer yet; doubles up to the longest one.
const PAUSE_MIN: Duration = Duration::from_millis(5);
/// Longest pause between two attempts of a request.
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// Blocks of a relation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pages {
    /// They are as of this position; the lowest of the shards' when the newest was asked for.
    pub lsn: Lsn,
    /// The pages, one behind the other.
    pub bytes: Vec<u8>,
}

/// Everything that is not blocks of relations.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Metadata {
    /// As of this position.
    pub lsn: Lsn,
    /// In the order of keys.
    pub values: Vec<(Key, Vec<u8>)>,
}

/// A position that all shards keep.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lease {
    /// The position; the highest of the shards' when the newest was asked for, which the others have to reach.
    pub lsn: Lsn,
    /// From the request on; the lowest of the shards'.
    pub seconds: u32,
}

/// What links need of their client.
pub struct Shared {
    pub config: ClientConfig,
    /// Rings when a shard moved on.
    pub progressed: Event,
    map: RefCell<Option<Rc<ShardMap>>>,
    /// Rings when there is another map.
    moved: Event,
    /// Why this writer's term is over.
    term_over: RefCell<Option<String>>,
}

impl Shared {
    fn map(&self) -> Rc<ShardMap> {
        Rc::clone(self.map.borrow().as_ref().expect("set by new, for the client's life"))
    }

    /// The term is over: nothing is answered any more.
    pub fn end_term(&self, text: String) {
        let cause = Cause::StaleTerm(self.term_over.borrow_mut().get_or_insert(text).clone());
        // None while the client is dropped.
        let Some(map) = self.map.borrow().clone() else { return };
        for link in map.links() {
            link.fail_all(|| Setback::Final(cause.clone()));
        }
    }

    fn stale_term(&self) -> Option<Cause> {
        self.term_over.borrow().as_ref().map(|text| Cause::StaleTerm(text.clone()))
    }
}

/// Reads from the page servers of one lakebase. Stays on its core; share it by `Rc`.
///
/// Dropping it ends the connections. Dropping the future of a request gives the request up.
pub struct PageClient {
    shared: Rc<Shared>,
}

impl PageClient {
    /// A client without connections: they are opened by the first request, or by [`PageClient::connect`].
    ///
    /// # Errors
    /// The shards do not divide the hash space among them.
    pub fn new(config: ClientConfig) -> Result<PageClient, ShardMapError> {
        let shards = config.shards.clone();
        let shared = Rc::new(Shared {
            config,
            progressed: Event::new(),
            map: RefCell::new(None),
            moved: Event::new(),
            term_over: RefCell::new(None),
        });
        let map = ShardMap::new(shards, |shard| Link::new(shard, Rc::clone(&shared)))?;
        *shared.map.borrow_mut() = Some(Rc::new(map));
        Ok(PageClient { shared })
    }

    /// Begins to connect to all shards, so that [`PageClient::progress`] is known.
    pub fn connect(&self) {
        self.shared.map().links().iter().for_each(Link::start);
    }

    /// Takes another map. Shards that are the same keep their connections; requests to others go to the new owners.
    ///
    /// # Errors
    /// As [`PageClient::new`]; the old map stays.
    pub fn replace_shards(&self, shards: Vec<ShardAddress>) -> Result<(), ShardMapError> {
        let old = self.shared.map();
        let map = ShardMap::new(shards, |shard| match old.links().iter().find(|link| *link.address() == shard) {
            Some(link) => Rc::clone(link),
            None => Link::new(shard, Rc::clone(&self.shared)),
        })?;
        let map = Rc::new(map);
        *self.shared.map.borrow_mut() = Some(Rc::clone(&map));
        for link in old.links() {
            if !map.links().iter().any(|kept| Rc::ptr_eq(kept, link)) {
                link.close();
            }
        }
        self.shared.moved.set();
        Ok(())
    }

    /// Reads blocks. Any number of them above 0: they are cut at stripes and at the limit of a request, and the pieces are
    /// read at once.
    ///
    /// # Errors
    /// Of the first piece that failed, or none answered before `deadline`. [`Cause::StaleTerm`] is for ever.
    pub async fn get_pages(&self, read: &BlockRead, deadline: Instant) -> Result<Pages, PageError> {
        let BlockRead { relation, fork, request_lsn, not_modified_since, .. } = *read;
        let name = || RequestName::Pages(*read);
        let piece = |first_block: u32, count: u16| async move {
            let stripe = self.shared.config.striping.stripe_of(first_block);
            let request = Request::Pages { relation, fork, first_block, count, request_lsn, not_modified_since };
            match self.call(stripe_hash(relation.relation, stripe), &request, &name, deadline).await? {
                Answer::Pages { lsn, bytes } => Ok(Pages { lsn, bytes }),
                answer => unreachable!("{answer:?} was not gathered for pages"),
            }
        };
        if read.count == 0 || read.first_block.checked_add(read.count).is_none() {
            let cause = Cause::Request(WireError::BadValue { field: "count" });
            return Err(self.error(self.shared.map().link(0), &name, cause));
        }
        let mut pieces = cut(read.first_block, read.count, self.shared.config.striping.stripe_blocks);
        match (pieces.next(), pieces.next()) {
            (Some((first_block, count)), None) => piece(first_block, count).await,
            (first, second) => {
                let pieces = first.into_iter().chain(second).chain(pieces);
                let parts = try_join_all(pieces.map(|(first_block, count)| piece(first_block, count))).await?;
                let mut pages = Pages { lsn: Lsn::MAX, bytes: Vec::with_capacity(read.count as usize * PAGE_BYTES) };
                for part in parts {
                    pages.lsn = pages.lsn.min(part.lsn);
                    pages.bytes.extend_from_slice(&part.bytes);
                }
                Ok(pages)
            }
        }
    }

    /// Lengths of all forks as of `at`, from all shards.
    ///
    /// # Errors
    /// One shard did not answer before `deadline`, or its lengths make no sense.
    pub async fn sizes(&self, at: Lsn, deadline: Instant) -> Result<ForkLengths, PageError> {
        let name = || RequestName::Sizes(at);
        let answers = self.call_all(&Request::Sizes(at), &name, deadline).await?;
        let mut lowest = Lsn::MAX;
        let mut stripes = Vec::new();
        for answer in answers {
            let Answer::Sizes { lsn, entries } = answer else { unreachable!("{answer:?} was not gathered for sizes") };
            lowest = lowest.min(lsn);
            stripes.extend(entries);
        }
        match sizes::merge(stripes, self.shared.config.striping) {
            Ok(forks) => Ok(ForkLengths { lsn: lowest, forks }),
            Err(text) => Err(self.error(self.shared.map().link(0), &name, Cause::Unfit(text))),
        }
    }

    /// All metadata as of `at`, from the shard that has it.
    ///
    /// # Errors
    /// No answer before `deadline`, or one that makes no sense.
    pub async fn metadata(&self, at: Lsn, deadline: Instant) -> Result<Metadata, PageError> {
        match self.call(0, &Request::Metadata(at), &|| RequestName::Metadata(at), deadline).await? {
            Answer::Metadata { lsn, values } => Ok(Metadata { lsn, values }),
            answer => unreachable!("{answer:?} was not gathered for metadata"),
        }
    }

    /// Makes all shards keep everything at and after `lsn` (or [`wire::page::NEWEST`]) for `seconds`, of which they may grant
    /// less. Made again, it replaces the one before.
    ///
    /// # Errors
    /// One shard did not grant it; others may have, until it ends.
    pub async fn take_lease(&self, lsn: Lsn, seconds: u32, deadline: Instant) -> Result<Lease, PageError> {
        let answers = self.call_all(&Request::Lease { lsn, seconds }, &|| RequestName::Lease(lsn), deadline).await?;
        let mut lease = Lease { lsn: Lsn::INVALID, seconds: u32::MAX };
        for answer in answers {
            let Answer::Lease { lsn, seconds } = answer else {
                unreachable!("{answer:?} was not gathered for a lease")
            };
            lease = Lease { lsn: lease.lsn.max(lsn), seconds: lease.seconds.min(seconds) };
        }
        Ok(lease)
    }

    /// Hands in a file of PGDATA outside WAL; returns from which position on base backups have it. The writer's only.
    ///
    /// # Errors
    /// No answer before `deadline`; [`Cause::Request`] for a file above [`wire::page::ADVISORY_BYTES_MAX`].
    pub async fn put_advisory(&self, name: &str, contents: &[u8], deadline: Instant) -> Result<Lsn, PageError> {
        let request = Request::Advisory { name, contents };
        match self.call(0, &request, &|| RequestName::Advisory(name.to_owned()), deadline).await? {
            Answer::Advisory { lsn } => Ok(lsn),
            answer => unreachable!("{answer:?} was not gathered for a file"),
        }
    }

    /// The last position at which nothing was committed after `timestamp` (microseconds since 2000-01-01 UTC), and the time
    /// of the last commit before it.
    ///
    /// # Errors
    /// No answer before `deadline`, or the time is before the horizon.
    pub async fn find_lsn(&self, timestamp: i64, deadline: Instant) -> Result<(Lsn, i64), PageError> {
        match self.call(0, &Request::FindLsn(timestamp), &|| RequestName::FindLsn(timestamp), deadline).await? {
            Answer::FindLsn { lsn, commit_timestamp } => Ok((lsn, commit_timestamp)),
            answer => unreachable!("{answer:?} was not gathered for a time"),
        }
    }

    /// How far all shards are: the lowest ingested and durable position, and the highest horizon. `None` until every one
    /// was connected once ([`PageClient::connect`]).
    pub fn progress(&self) -> Option<PageProgress> {
        let map = self.shared.map();
        let mut progresses = map.links().iter().map(|link| link.progress());
        let first = progresses.next()??;
        progresses.try_fold(first, |all, one| {
            let one = one?;
            Some(PageProgress {
                ingested_lsn: all.ingested_lsn.min(one.ingested_lsn),
                durable_lsn: all.durable_lsn.min(one.durable_lsn),
                horizon_lsn: all.horizon_lsn.max(one.horizon_lsn),
            })
        })
    }

    /// How many times the shard that keeps files outside WAL was connected to. It forgets what it was given since its last
    /// layer when it dies, and only a new connection shows that. A change rings [`PageClient::progressed`].
    pub fn metadata_connections(&self) -> u64 {
        self.shared.map().link(0).connections()
    }

    /// Rings when [`PageClient::progress`] may have changed.
    pub fn progressed(&self) -> &Event {
        &self.shared.progressed
    }

    /// Why this writer's term is over, if it is: every request fails with [`Cause::StaleTerm`].
    pub fn term_over(&self) -> Option<Ref<'_, str>> {
        Ref::filter_map(self.shared.term_over.borrow(), |text| text.as_deref()).ok()
    }

    /// The same request to all shards at once; begun anew when the map changes meanwhile.
    async fn call_all(
        &self,
        request: &Request<'_>,
        name: &dyn Fn() -> RequestName,
        deadline: Instant,
    ) -> Result<Vec<Answer>, PageError> {
        loop {
            let map = self.shared.map();
            let calls = map.links().iter().map(|link| {
                let hash =
                    u32::try_from(link.address().range.begin).expect("a shard that holds something begins below 2^32");
                self.call(hash, request, name, deadline)
            });
            let answers = try_join_all(calls).await?;
            if Rc::ptr_eq(&map, &self.shared.map()) {
                return Ok(answers);
            }
        }
    }

    /// A request to whoever has `hash`, again and again until the deadline.
    async fn call(
        &self,
        hash: u32,
        request: &Request<'_>,
        name: &dyn Fn() -> RequestName,
        deadline: Instant,
    ) -> Result<Answer, PageError> {
        let mut last = None;
        let mut pause = PAUSE_MIN;
        loop {
            let map = self.shared.map();
            let link = map.link(hash);
            if let Some(cause) = self.shared.stale_term() {
                return Err(self.error(link, name, cause));
            }
            let left = deadline.since(driver::now());
            let late = |last: Option<Cause>| {
                let cause = last.unwrap_or_else(|| Cause::Deadline { last: link.last_error() });
                self.error(link, name, cause)
            };
            if left.is_zero() {
                return Err(late(last));
            }
            let cause = match driver::timeout(left, link.call(request)).await {
                Some(Ok(answer)) => return Ok(answer),
                Some(Err(Setback::Final(cause))) => return Err(self.error(link, name, cause)),
                Some(Err(Setback::Moved)) => continue,
                Some(Err(Setback::Again(cause))) => cause,
                None => return Err(late(last)),
            };
            let pause_over = driver::sleep(pause.min(deadline.since(driver::now())));
            match cause {
                // Another map is what helps.
                Cause::Server { code: PageErrorCode::WrongShardOwner, .. } => {
                    let moved = self.shared.moved.until(|| (!Rc::ptr_eq(&map, &self.shared.map())).then_some(()));
                    select(pin!(moved), pin!(pause_over)).await;
                }
                _ => pause_over.await,
            }
            pause = (pause * 2).min(PAUSE_MAX);
            last = Some(cause);
        }
    }

    #[cold]
    fn error(&self, link: &Link, name: &dyn Fn() -> RequestName, cause: Cause) -> PageError {
        let address = link.address();
        PageError { request: name(), shard: address.shard, address: address.address.clone(), cause }
    }
}

impl Drop for PageClient {
    fn drop(&mut self) {
        // Links and what they share refer to each other.
        if let Some(map) = self.shared.map.borrow_mut().take() {
            map.links().iter().for_each(|link| link.close());
        }
    }
}

/// Pieces of a read: first block and number, none across stripes or above the limit of a request.
fn cut(first_block: u32, count: u32, stripe_blocks: u32) -> impl Iterator<Item = (u32, u16)> {
    let end = u64::from(first_block) + u64::from(count);
    let mut next = u64::from(first_block);
    std::iter::from_fn(move || {
        let first = u32::try_from(next).ok().filter(|_| next < end)?;
        let stripe_end = (next / u64::from(stripe_blocks) + 1) * u64::from(stripe_blocks);
        let piece_end = end.min(stripe_end).min(next + u64::from(PAGES_MAX));
        let blocks = u16::try_from(piece_end - next).expect("at most the limit of a request");
        next = piece_end;
        Some((first, blocks))
    })
}
