//! The owner of one shard: everything that the tasks of its core share.
//!
//! Positions, from the oldest: `horizon` (nothing before it can be read) ≤ `durable` (the manifest's end) ≤ `ingested` (what
//! readers get as the newest; always between two batches) ≤ `applied` (the last record taken in; ahead of `ingested` within a batch).
//! Read next: `ingest.rs` (WAL in), `flush.rs` (layers out), `read.rs` (pages), `compaction.rs`.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet, VecDeque},
    rc::Rc,
    sync::{Arc, atomic::Ordering},
};

use driver::Event;
use layers::{
    HashRange, Key, KeyRange, LayerDescription, LayerId, LayerIdentity, LayerMap, Leases, Manifest, ShardGeneration,
    ShardId, Striping,
};
use pgtypes::{FrameSummary, Instant, LogId, Lsn, SystemId, Term};
use remote_storage::ShardOwner;
use shard::Ingest;

use crate::{layer_files::LayerFiles, process::Process, start::StartError, state::State};

/// Numbers that a compaction takes ahead for its layers, of which it uses a few: more than a manifest can name.
pub const NUMBERS_RESERVED: u64 = 1 << 20;

/// Faults of ingest that the status shows.
const FAULTS_SHOWN: usize = 32;

/// A layer file that object storage does not have yet.
#[derive(Clone, Copy, Debug)]
pub struct Waiting {
    /// The layer.
    pub layer: LayerDescription,
    /// What the log adds up to at its end.
    pub summary: FrameSummary,
}

/// Where WAL comes from at present.
#[derive(Clone, Debug, Default)]
pub struct Source {
    /// Address of the safekeeper, or "archive"; empty while there is none.
    pub name: String,
    /// Why the one before was left.
    pub last_error: String,
}

/// The owner of one shard.
pub struct Owner {
    /// What the HTTP threads share, too.
    pub process: Arc<Process>,
    /// Objects of the shard.
    pub store: Rc<ShardOwner>,
    /// Layer files.
    pub files: Rc<LayerFiles>,
    /// How relations are cut.
    pub striping: Striping,
    /// Whether pages carry checksums.
    pub checksums: bool,
    /// Of PostgreSQL's WAL.
    pub segment_bytes: u64,
    /// Of the PostgreSQL cluster.
    pub system_id: SystemId,
    /// What can be read.
    pub state: RefCell<State>,
    /// What records build on.
    pub ingest: RefCell<Ingest>,
    /// Readers that need history.
    pub leases: RefCell<Leases>,
    /// The newest durable manifest.
    manifest: RefCell<Manifest>,
    /// A manifest is being written.
    committing: Cell<bool>,
    /// A compaction is going on.
    tending: Cell<bool>,
    /// Written layers on their way to object storage, oldest first.
    pub waiting: RefCell<VecDeque<Waiting>>,
    /// Files outside WAL that wait for a position that they can be put at.
    pub advisories: RefCell<BTreeMap<Key, Vec<u8>>>,
    /// Where the map ended when ingest was loaded: lengths that a lost layer hides were not loaded.
    pub attached_at: Lsn,
    /// Stripes whose length is in a lost layer.
    pub unreadable: RefCell<BTreeSet<Key>>,
    /// Not even which lengths a lost layer had is known: what ingest makes of such stripes must not become durable.
    pub hold_uploads: Cell<bool>,
    position: Cell<FrameSummary>,
    applied: Cell<Lsn>,
    commit_lsn: Cell<Lsn>,
    term: Cell<Term>,
    next_number: Cell<u64>,
    /// When the open layer got its first value.
    pub open_since: Cell<Option<Instant>>,
    /// The highest position that a reader waits for, and since when.
    pub wanted: Cell<Option<(Lsn, Instant)>>,
    /// Records that ingest could not follow: how many, and the first ones.
    faults: RefCell<(u64, Vec<String>)>,
    /// Where WAL comes from.
    pub source: RefCell<Source>,
    /// What the background has to say to the status.
    pub troubles: RefCell<BTreeMap<&'static str, String>>,
    /// Positions, layers or work changed.
    pub moved: Event,
    /// Why the process has to end.
    failure: RefCell<Option<StartError>>,
}

/// What [`Owner::new`] is made of.
pub struct Parts {
    /// See [`Owner`].
    pub process: Arc<Process>,
    /// See [`Owner`].
    pub store: Rc<ShardOwner>,
    /// See [`Owner`].
    pub files: Rc<LayerFiles>,
    /// The newest.
    pub manifest: Manifest,
    /// Its layers.
    pub state: State,
    /// The first free number of a layer.
    pub next_number: u64,
}

impl Owner {
    /// An owner whose ingest is not loaded yet.
    pub fn new(parts: Parts) -> Owner {
        let Parts { process, store, files, manifest, state, next_number } = parts;
        let striping = Striping { stripe_blocks: manifest.stripe_blocks };
        let retention = process.config.retention;
        Owner {
            files,
            store,
            striping,
            checksums: manifest.checksums,
            segment_bytes: manifest.segment_bytes.into(),
            system_id: manifest.system_id,
            state: RefCell::new(state),
            ingest: RefCell::new(Ingest::new(striping, process.config.range())),
            leases: RefCell::new(Leases::new(driver::now(), retention.lease_period)),
            attached_at: manifest.through.record_end,
            unreadable: RefCell::default(),
            hold_uploads: Cell::new(false),
            position: Cell::new(manifest.through),
            applied: Cell::new(manifest.through.record_end),
            commit_lsn: Cell::new(manifest.through.record_end),
            manifest: RefCell::new(manifest),
            committing: Cell::new(false),
            tending: Cell::new(false),
            waiting: RefCell::default(),
            advisories: RefCell::default(),
            term: Cell::default(),
            next_number: Cell::new(next_number),
            open_since: Cell::default(),
            wanted: Cell::default(),
            faults: RefCell::default(),
            source: RefCell::default(),
            troubles: RefCell::default(),
            moved: Event::new(),
            failure: RefCell::default(),
            process,
        }
    }

    /// Which log.
    pub fn log(&self) -> LogId {
        self.process.config.log()
    }

    /// Which shard.
    pub fn shard(&self) -> ShardId {
        self.process.config.shard()
    }

    /// Which ownership.
    pub fn generation(&self) -> ShardGeneration {
        self.process.config.generation()
    }

    /// Its part of the hash space.
    pub fn range(&self) -> HashRange {
        self.process.config.range()
    }

    /// Its keys.
    pub fn keys(&self) -> KeyRange {
        self.range().keys()
    }

    /// Identity of a layer of this owner.
    pub fn identity(&self, number: u64) -> LayerIdentity {
        let id = LayerId { shard: self.shard(), generation: self.generation(), number };
        LayerIdentity { log: self.log(), id, stripe_blocks: self.striping.stripe_blocks }
    }

    /// Takes numbers for `count` layers; returns the first.
    pub fn take_numbers(&self, count: u64) -> u64 {
        let first = self.next_number.get();
        self.next_number.set(first + count);
        first
    }

    /// The first number that no layer has.
    pub fn next_number(&self) -> u64 {
        self.next_number.get()
    }

    /// What the log adds up to at the newest position that can be read.
    pub fn position(&self) -> FrameSummary {
        self.position.get()
    }

    /// The newest position that can be read.
    pub fn ingested(&self) -> Lsn {
        self.position.get().record_end
    }

    /// End of the last record that was taken in.
    pub fn applied(&self) -> Lsn {
        self.applied.get()
    }

    /// A record was taken in.
    pub fn set_applied(&self, lsn: Lsn) {
        self.applied.set(self.applied.get().max(lsn));
    }

    /// Whether no batch is being taken in.
    pub fn is_between_batches(&self) -> bool {
        self.applied.get() <= self.ingested()
    }

    /// A batch was taken in.
    pub fn set_position(&self, summary: FrameSummary) {
        let metrics = &self.process.metrics;
        metrics.ingested_bytes.inc_by(summary.record_end.bytes_since(self.ingested()));
        metrics.ingested_lsn.set(summary.record_end.0 as i64);
        self.position.set(summary);
        self.set_applied(summary.record_end);
        self.moved.set();
    }

    /// Everything up to here is in object storage.
    pub fn durable(&self) -> Lsn {
        self.manifest.borrow().through.record_end
    }

    /// Nothing before this can be read.
    pub fn horizon(&self) -> Lsn {
        self.state.borrow().map().horizon()
    }

    /// Committed, as far as known.
    pub fn commit_lsn(&self) -> Lsn {
        self.commit_lsn.get()
    }

    /// The highest term that safekeepers speak of.
    pub fn term(&self) -> Term {
        self.term.get()
    }

    /// What a batch says about the log.
    pub fn hear(&self, term: Term, commit_lsn: Lsn) {
        self.term.set(self.term.get().max(term));
        self.commit_lsn.set(self.commit_lsn.get().max(commit_lsn));
        self.process.metrics.commit_lsn.set(self.commit_lsn.get().0 as i64);
    }

    /// The newest durable manifest.
    pub fn manifest(&self) -> std::cell::Ref<'_, Manifest> {
        self.manifest.borrow()
    }

    /// The layers of the manifest, without those that are not uploaded.
    pub fn durable_map(&self) -> LayerMap {
        let manifest = self.manifest.borrow();
        let mut map = LayerMap::new(self.keys(), manifest.horizon);
        let edit = layers::Edit { remove: Vec::new(), add: manifest.layers.clone() };
        map.apply(&edit).expect("the map at the start, and every edit of it since, was of the same layers");
        map
    }

    /// Waits until nobody writes a manifest, and begins to.
    pub async fn begin_commit(&self) {
        self.moved.until(|| (!self.committing.get()).then(|| self.committing.set(true))).await;
    }

    /// The manifest was written, or will not be.
    pub fn end_commit(&self, written: Option<Manifest>) {
        self.committing.set(false);
        if let Some(manifest) = written {
            self.process.metrics.durable_lsn.set(manifest.through.record_end.0 as i64);
            self.process.metrics.layers.set(manifest.layers.len() as i64);
            self.manifest.replace(manifest);
        }
        self.moved.set();
    }

    /// Waits until no compaction goes on, and begins one that ends when the turn is dropped.
    pub async fn begin_tending(self: &Rc<Self>) -> Turn {
        self.moved.until(|| (!self.tending.get()).then(|| self.tending.set(true))).await;
        Turn(self.clone())
    }

    /// Bytes of layers that object storage does not have: files that wait, and frozen layers.
    pub fn backlog_bytes(&self) -> u64 {
        let files: u64 = self.waiting.borrow().iter().map(|waiting| waiting.layer.file_bytes).sum();
        let frozen: u64 = self.state.borrow().frozen().iter().map(|frozen| frozen.layer.bytes()).sum();
        files + frozen
    }

    /// Keeps the indexes in memory within their bound.
    pub fn trim_indexes(&self) {
        self.state.borrow_mut().trim_indexes(self.process.config.index_cache_bytes);
    }

    /// Brings the gauges up to date.
    pub fn show(&self) {
        let metrics = &self.process.metrics;
        metrics.backlog_bytes.set(self.backlog_bytes());
        metrics.memory_bytes.set(self.state.borrow().memory_bytes());
        metrics.index_bytes.set(self.state.borrow().indexes().bytes());
        metrics.horizon_lsn.set(self.horizon().0 as i64);
        metrics.show_storage(self.store.storage().metrics());
    }

    /// Counts a record that ingest could not follow, and logs it.
    pub fn count_fault(&self, fault: &impl std::fmt::Display) {
        self.process.metrics.poisoned.inc();
        let mut faults = self.faults.borrow_mut();
        faults.0 += 1;
        if faults.1.len() < FAULTS_SHOWN {
            faults.1.push(fault.to_string());
        }
        if self.process.notices.is_new(&format!("fault {}", faults.0.min(FAULTS_SHOWN as u64)), driver::now()) {
            tracing::error!(%fault, "a record could not be followed: what it touches is poisoned; ingest goes on");
        }
    }

    /// How many records ingest could not follow, and the first of them.
    pub fn faults(&self) -> (u64, Vec<String>) {
        self.faults.borrow().clone()
    }

    /// Shows a trouble of the background, and logs it once.
    pub fn report(&self, what: &'static str, trouble: &impl std::fmt::Display) {
        let text = trouble.to_string();
        if self.process.notices.is_new(what, driver::now()) {
            tracing::warn!(trouble = %text, "{what}");
        }
        self.troubles.borrow_mut().insert(what, text);
    }

    /// The trouble is over.
    pub fn solved(&self, what: &'static str) {
        if self.troubles.borrow_mut().remove(what).is_some() && self.process.notices.solved(what) {
            tracing::info!("solved: {what}");
        }
    }

    /// Ends the process: somebody else owns the shard, or this program is wrong.
    pub fn fail(&self, failure: StartError) {
        self.failure.borrow_mut().get_or_insert(failure);
        self.process.stopping.store(true, Ordering::Release);
        self.moved.set();
    }

    /// Ends the tasks in order.
    pub fn stop(&self) {
        self.process.stopping.store(true, Ordering::Release);
        self.moved.set();
    }

    /// Whether the process is ending.
    pub fn is_stopping(&self) -> bool {
        self.process.is_stopping()
    }

    /// Waits until the process is ending.
    pub async fn until_stopping(&self) {
        self.moved.until(|| self.is_stopping().then_some(())).await;
    }

    /// Waits for `duration`, or until the process is ending; `false` then.
    pub async fn pause(&self, duration: std::time::Duration) -> bool {
        let stopping = std::pin::pin!(self.until_stopping());
        let slept = std::pin::pin!(driver::sleep(duration));
        matches!(futures_util::future::select(slept, stopping).await, futures_util::future::Either::Left(_))
    }

    /// Why the process ended, if not because it was told to.
    pub fn take_failure(&self) -> Option<StartError> {
        self.failure.borrow_mut().take()
    }
}

/// The only compaction at a time.
pub struct Turn(Rc<Owner>);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.tending.set(false);
        self.0.moved.set();
    }
}
