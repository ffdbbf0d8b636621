//! What the subscribers of one log share.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    rc::Rc,
};

use filter::{Cutter, Window};
use layers::{ShardGeneration, ShardId, Striping};
use pgtypes::{FrameSummary, Lsn};
use wal::WalError;

/// A subscriber this close to the end of the log may make the window begin at its position: 16 MiB. One that is further
/// behind would drag it away from those that follow closely.
const NEAR_BYTES: u64 = 16 << 20;

/// Subscribers of one log at a time. A lakebase has a shard per 100 GB or so; each subscriber may hold 3 MiB.
pub(super) const FEEDS_MAX: usize = 512;

/// A page server that is connected.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Subscriber {
    /// Its shard.
    pub shard: ShardId,
    /// Of its ownership.
    pub generation: ShardGeneration,
    /// Sent up to here.
    pub sent_lsn: Lsn,
    /// Taken in up to here, as it last said.
    pub received_lsn: Lsn,
}

/// The subscribers of one log, and the window that they share.
#[derive(Default)]
pub struct Feeds {
    subscribers: RefCell<BTreeMap<u64, Subscriber>>,
    /// Owners whose registration this process has seen become durable. As many as shards at most, which the log bounds.
    registered: RefCell<BTreeMap<ShardId, ShardGeneration>>,
    next: Cell<u64>,
    window: RefCell<Option<Window>>,
    /// Number of the window: raised when it is replaced.
    version: Cell<u64>,
    /// The window whose next bytes somebody reads from the disk.
    reading: Cell<Option<u64>>,
}

/// How a subscriber gets its next records.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Way {
    /// From the window, which it was given all of, and which wants these bytes. `first`: nobody reads them yet.
    Window { position: Lsn, first: bool },
    /// By decoding itself.
    Own,
}

/// What a subscriber waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Wanted {
    /// The window to get records behind this one.
    Window(Lsn),
    /// The log to get bytes from this position on.
    Own(Lsn),
}

impl Feeds {
    /// All subscribers, in the order in which they came.
    pub fn subscribers(&self) -> Vec<Subscriber> {
        self.subscribers.borrow().values().copied().collect()
    }

    /// Bytes of decoded records that are kept.
    pub fn kept_bytes(&self) -> usize {
        self.window.borrow().as_ref().map_or(0, Window::kept_bytes)
    }

    /// Whether the owner was found durable before. It may have been replaced since: ask the log.
    pub(super) fn is_registered(&self, shard: ShardId, generation: ShardGeneration) -> bool {
        self.registered.borrow().get(&shard) == Some(&generation)
    }

    /// The owner that is durable, or that none is known to be.
    pub(super) fn set_registered(&self, shard: ShardId, generation: Option<ShardGeneration>) {
        match generation {
            Some(generation) => self.registered.borrow_mut().insert(shard, generation),
            None => self.registered.borrow_mut().remove(&shard),
        };
    }

    pub(super) fn is_crowded(&self) -> bool {
        self.subscribers.borrow().len() >= FEEDS_MAX
    }

    pub(super) fn enter(self: &Rc<Self>, subscriber: Subscriber) -> Membership {
        let number = self.next.replace(self.next.get() + 1);
        self.subscribers.borrow_mut().insert(number, subscriber);
        Membership { feeds: self.clone(), number }
    }

    /// Gives a subscriber what the window has for it, and says how it gets more. `readable` is the end of the log.
    pub(super) fn fill(&self, cutter: &mut Cutter, striping: Striping, segment_bytes: u64, readable: Lsn) -> Way {
        let mut slot = self.window.borrow_mut();
        let through = cutter.through();
        let usable = slot.as_ref().is_none_or(|window| window.striping() == striping);
        let near = readable.0.saturating_sub(through.0) <= NEAR_BYTES;
        let behind_all = |window: &Window| window.summary().record_end < through;
        if usable && near && slot.as_ref().is_none_or(behind_all) {
            // Nobody is ahead of this one: those behind reach the new window by decoding for themselves.
            *slot = Some(Window::new(cutter.summary(), segment_bytes, striping));
            self.version.set(self.version.get() + 1);
        }
        let Some(window) = slot.as_ref().filter(|window| usable && window.covers(through)) else { return Way::Own };
        // Two that are at one position must agree on what came before, or one of them follows another log.
        if window.summary().record_end == through && window.summary() != cutter.summary() {
            return Way::Own;
        }
        window.fill(cutter);
        Way::Window { position: window.position(), first: self.reading.get() != Some(self.version.get()) }
    }

    /// Whether what a subscriber waits for is there. `readable` is the end of the log.
    pub(super) fn has_work(&self, wanted: Wanted, readable: Lsn) -> bool {
        match (wanted, &*self.window.borrow()) {
            (Wanted::Own(position), _) => readable > position,
            (Wanted::Window(through), Some(window)) if window.covers(through) => {
                let unread = readable > window.position() && self.reading.get() != Some(self.version.get());
                window.summary().record_end > through || unread
            }
            // The window was replaced by a later one.
            (Wanted::Window(_), _) => true,
        }
    }

    /// The caller reads the window's next bytes until the guard is dropped.
    pub(super) fn begin_read(&self) -> Reading<'_> {
        let version = self.version.get();
        self.reading.set(Some(version));
        Reading { feeds: self, version }
    }

    /// Nothing that all subscribers have is kept.
    fn forget(&self) {
        let lowest = self.subscribers.borrow().values().map(|subscriber| subscriber.sent_lsn).min();
        let mut window = self.window.borrow_mut();
        match lowest {
            None => *window = None,
            Some(lowest) => {
                if let Some(window) = &mut *window {
                    window.forget(lowest);
                }
            }
        }
    }
}

/// The window's next bytes are being read.
pub(super) struct Reading<'a> {
    feeds: &'a Feeds,
    version: u64,
}

impl Reading<'_> {
    /// Takes the bytes, unless the window was replaced meanwhile.
    pub(super) fn done(self, bytes: &[u8]) -> Result<(), WalError> {
        let mut slot = self.feeds.window.borrow_mut();
        let Some(window) = slot.as_mut().filter(|_| self.feeds.version.get() == self.version) else { return Ok(()) };
        let result = window.feed(bytes);
        if result.is_err() {
            *slot = None;
        }
        result
    }
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        if self.feeds.reading.get() == Some(self.version) {
            self.feeds.reading.set(None);
        }
    }
}

/// Keeps a subscriber in the list of its log.
pub(super) struct Membership {
    feeds: Rc<Feeds>,
    number: u64,
}

impl Membership {
    pub(super) fn update(&self, change: impl FnOnce(&mut Subscriber)) {
        if let Some(subscriber) = self.feeds.subscribers.borrow_mut().get_mut(&self.number) {
            change(subscriber);
        }
    }

    /// The subscriber was sent everything up to `summary`'s position.
    pub(super) fn sent(&self, summary: &FrameSummary) {
        self.update(|subscriber| subscriber.sent_lsn = summary.record_end);
        self.feeds.forget();
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.feeds.subscribers.borrow_mut().remove(&self.number);
        self.feeds.forget();
    }
}
