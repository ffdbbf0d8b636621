//! What waits to be sent on one connection of a reader.
//!
//! Everything that is ready leaves with one vectored write: under load many answers share a system call, and a single one waits
//! for nothing.

use std::cell::{Cell, RefCell};

use driver::{Closer, Event, Writer};
use wire::page::{PageMessage, encode};

/// Bytes that may wait. A reader has its requests bounded (`server.rs`), so one that is above has stopped reading for good.
const WAITING_BYTES_MAX: usize = 256 << 20;

/// Buffers of one vectored write: the kernel takes at most 1,024.
const BUFFERS_MAX: usize = 512;

/// Answers for one connection.
pub struct Outbox {
    waiting: RefCell<Vec<Vec<u8>>>,
    bytes: Cell<usize>,
    changed: Event,
    closed: Cell<bool>,
    closer: Closer,
}

impl Outbox {
    /// An empty one for the connection of `closer`.
    pub fn new(closer: Closer) -> Outbox {
        Outbox {
            waiting: RefCell::default(),
            bytes: Cell::new(0),
            changed: Event::new(),
            closed: Cell::new(false),
            closer,
        }
    }

    /// Queues a message other than pages. On a closed connection nothing happens.
    pub fn push(&self, message: &PageMessage<'_>) {
        if self.closed.get() {
            return;
        }
        let mut head = Vec::new();
        if let Err(error) = encode(message, &mut head) {
            // Nothing smaller would be true.
            tracing::error!(%error, "an answer cannot be encoded; closing the connection");
            return self.abort();
        }
        self.push_encoded(head, Vec::new());
    }

    /// Queues the frame of an answer and the pages that belong to it. On a closed connection nothing happens.
    pub fn push_encoded(&self, head: Vec<u8>, pages: Vec<u8>) {
        if self.closed.get() {
            return;
        }
        self.bytes.set(self.bytes.get() + head.len() + pages.len());
        let mut waiting = self.waiting.borrow_mut();
        waiting.push(head);
        if !pages.is_empty() {
            waiting.push(pages);
        }
        drop(waiting);
        if self.bytes.get() > WAITING_BYTES_MAX {
            tracing::warn!(bytes = WAITING_BYTES_MAX, "a reader does not take its answers; closing the connection");
            return self.abort();
        }
        self.changed.set();
    }

    /// Waits until fewer than `bytes` wait, or the connection is closed.
    pub async fn until_below(&self, bytes: usize) {
        self.changed.until(|| (self.bytes.get() < bytes || self.closed.get()).then_some(())).await;
    }

    /// Sends what is queued, then lets [`Outbox::send_all`] end.
    pub fn close(&self) {
        self.closed.set(true);
        self.changed.set();
    }

    /// Whether it was closed.
    pub fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// Waits until it is closed.
    pub async fn until_closed(&self) {
        self.changed.until(|| self.closed.get().then_some(())).await;
    }

    /// Ends the connection at once.
    pub fn abort(&self) {
        self.closed.set(true);
        self.closer.close();
        self.changed.set();
    }

    /// Sends messages until [`Outbox::close`], or until the connection fails.
    pub async fn send_all(&self, writer: &mut Writer) {
        loop {
            let ready = self
                .changed
                .until(|| {
                    let mut waiting = self.waiting.borrow_mut();
                    match waiting.is_empty() {
                        false => {
                            let count = waiting.len().min(BUFFERS_MAX);
                            let rest = waiting.split_off(count);
                            Some(Some(std::mem::replace(&mut *waiting, rest)))
                        }
                        true => self.closed.get().then_some(None),
                    }
                })
                .await;
            let Some(ready) = ready else { return };
            let bytes: usize = ready.iter().map(Vec::len).sum();
            let result = writer.write_vectored(ready).await.0;
            self.bytes.set(self.bytes.get() - bytes);
            if result.is_err() {
                // The reading side notices, too.
                return self.abort();
            }
            self.changed.set();
        }
    }
}
