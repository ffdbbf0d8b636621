//! The cache of relation blocks of one PostgreSQL: fills what it asks for, gives back what is too much, and slows the writer
//! while the page service lags.
//!
//! Lives on the core of `pages`. The states of a block and the order of their changes are `vfs_abi::blocks`'; this is what
//! happens between two of them. Read next: `fills.rs`, `eviction.rs`.

mod eviction;
mod files;
mod fills;
mod map;
mod outage;
mod read_ahead;
#[cfg(test)]
mod tests;

use std::{
    cell::{Cell, RefCell},
    path::PathBuf,
    pin::pin,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use driver::Event;
use futures_util::future::select;
use pageclient::PageClient;

use self::{files::OpenFiles, outage::Outages, read_ahead::ReadAhead};
pub use self::{
    files::relation_path,
    map::{Futex, SharedBlocks},
};
use crate::{
    area::SharedArea,
    backpressure::Lag,
    metrics::CoreView,
    page_service_config::{BackpressureConfig, PageServiceConfig},
    shard_map::ShardConfig,
};

/// How often lag is looked at: page servers report every 100 ms.
const WATCH_INTERVAL: Duration = Duration::from_millis(50);

/// What a cache is started with.
pub struct CacheSetup {
    /// The block map that PostgreSQL inherits.
    pub blocks: SharedBlocks,
    /// Its shared area.
    pub area: SharedArea,
    /// Its directory.
    pub pgdata: PathBuf,
    /// Limits, and where shards are.
    pub config: PageServiceConfig,
    /// When the writer is slowed.
    pub backpressure: BackpressureConfig,
    /// The committed position, and what other threads see.
    pub view: Arc<CoreView>,
    /// Called when a page server says that this writer's term is over, with its words. Must not block.
    pub on_stale_term: Arc<dyn Fn(String) + Send + Sync>,
}

/// The cache of one PostgreSQL.
pub struct Cache {
    setup: CacheSetup,
    client: Rc<PageClient>,
    files: RefCell<OpenFiles>,
    outages: RefCell<Outages>,
    ahead: RefCell<ReadAhead>,
    /// Blocks whose pages are on their way.
    filling: Cell<u32>,
    /// A fill ended.
    filled: Event,
    /// More blocks are here than should be.
    pressed: Event,
    ended: Cell<bool>,
    ending: Event,
    stale: Cell<bool>,
}

impl Cache {
    /// Serves until [`Cache::end`].
    pub fn start(client: Rc<PageClient>, setup: CacheSetup) -> Rc<Self> {
        let cache = Rc::new(Self {
            files: RefCell::new(OpenFiles::new(&setup.pgdata)),
            outages: RefCell::new(Outages::new(&setup.config)),
            ahead: RefCell::new(ReadAhead::new(setup.config.cache_bytes)),
            setup,
            client,
            filling: Cell::new(0),
            filled: Event::new(),
            pressed: Event::new(),
            ended: Cell::new(false),
            ending: Event::new(),
            stale: Cell::new(false),
        });
        driver::spawn(fills::serve(cache.clone()));
        driver::spawn(eviction::keep_room(cache.clone()));
        driver::spawn(watch(cache.clone()));
        cache
    }

    /// Shards have other owners from now on.
    pub fn replace_shards(&self, shards: &[ShardConfig]) {
        self.outages.borrow_mut().replace_shards(shards.to_vec());
    }

    /// PostgreSQL is gone: nothing is filled or evicted any more.
    pub fn end(&self) {
        self.ended.set(true);
        self.ending.set();
        self.filled.set();
        self.pressed.set();
    }

    /// Sleeps, or until the end; true at the end.
    async fn rest(&self, duration: Duration) -> bool {
        let ended = self.ending.until(|| self.ended.get().then_some(()));
        select(pin!(driver::sleep(duration)), pin!(ended)).await;
        self.ended.get()
    }

    /// The writer's term is over. Said once.
    fn note_stale_term(&self, text: &str) {
        if !self.stale.replace(true) {
            (self.setup.on_stale_term)(text.to_owned());
        }
    }
}

/// What has to be looked at now and then: the lag of the page service, which slows PostgreSQL's flushes; whether the term is
/// over, which a page server may say while nothing is read; files that PostgreSQL has removed.
async fn watch(cache: Rc<Cache>) {
    let CacheSetup { blocks, area, view, backpressure, .. } = &cache.setup;
    loop {
        // Before all shards were reached nothing is known, and nothing is slowed: a start must not depend on it.
        if let Some(progress) = cache.client.progress() {
            let lag = Lag::behind(view.commit_lsn(), progress.ingested_lsn, progress.durable_lsn);
            let delay = lag.flush_delay(backpressure);
            area.delay_flushes(delay);
            view.set_lag(lag, delay);
        }
        if let Some(text) = cache.client.term_over() {
            cache.note_stale_term(&text);
        }
        cache.files.borrow_mut().close_gone(|file| blocks.map().is_current(file));
        if cache.rest(WATCH_INTERVAL).await {
            return;
        }
    }
}
