//! One shard: its requests in flight, and the connection that is made again whenever it breaks.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    pin::pin,
    rc::Rc,
    time::Duration,
};

use driver::{Closer, Event, oneshot};
use futures_util::future::{Either, select};
use pgtypes::Instant;
use wire::page::{PageErrorCode, PageFailed, PageMessage, PageProgress, PageWelcome};

use crate::{
    client::Shared,
    config::ShardAddress,
    conversation::converse,
    error::Cause,
    request::{Answer, Gather, Gathered, Request},
};

/// Requests in flight to one shard; at it, further ones wait for room. Two MiB of frames, and at most 2 GiB of answers if
/// each asks for 64 pages, which the server sends as fast as they are taken.
const REQUESTS_MAX: usize = 4096;
/// Pause before the second attempt to connect; doubles up to the longest one.
const BACKOFF_MIN: Duration = Duration::from_millis(10);
/// Longest pause between attempts: what a server that comes back is at most late by.
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// Why an attempt gave no answer.
#[derive(Debug)]
pub enum Setback {
    /// It may succeed later.
    Again(Cause),
    /// Another link has the shard now.
    Moved,
    /// It will not succeed.
    Final(Cause),
}

/// A request that waits for its answer.
struct Pending {
    frame: Vec<u8>,
    gather: Gather,
    reply: oneshot::Sender<Result<Answer, Setback>>,
}

/// One shard.
pub struct Link {
    address: ShardAddress,
    pending: RefCell<BTreeMap<u64, Pending>>,
    next_id: Cell<u64>,
    outbox: RefCell<Vec<u8>>,
    /// Rings when the outbox fills, a connection opens or shuts, or the link is closed.
    changed: Event,
    /// The limit was reached, and no request may enter before half of them have left: were one let in for each that leaves,
    /// all that wait would wake each time.
    crowded: Cell<bool>,
    /// Rings when there is room again.
    room: Event,
    /// Number of the connection that is open, 0 for none.
    connection: Cell<u64>,
    connections: Cell<u64>,
    closer: RefCell<Option<Closer>>,
    started: Cell<bool>,
    closed: Cell<bool>,
    /// When the server was last heard, or began to owe an answer.
    heard: Cell<Instant>,
    progress: Cell<Option<PageProgress>>,
    last_error: RefCell<Option<String>>,
    shared: Rc<Shared>,
}

/// Gives a request up when its future is dropped.
struct Guard<'a>(&'a Link, u64);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.0.take(self.1);
    }
}

impl Link {
    pub fn new(address: ShardAddress, shared: Rc<Shared>) -> Rc<Link> {
        Rc::new(Link {
            address,
            pending: RefCell::default(),
            next_id: Cell::new(1),
            outbox: RefCell::default(),
            changed: Event::new(),
            crowded: Cell::new(false),
            room: Event::new(),
            connection: Cell::new(0),
            connections: Cell::new(0),
            closer: RefCell::default(),
            started: Cell::new(false),
            closed: Cell::new(false),
            heard: Cell::new(Instant(0)),
            progress: Cell::new(None),
            last_error: RefCell::default(),
            shared,
        })
    }

    pub fn address(&self) -> &ShardAddress {
        &self.address
    }

    pub fn progress(&self) -> Option<PageProgress> {
        self.progress.get()
    }

    /// What went wrong with the connection since it was last open.
    pub fn last_error(&self) -> Option<String> {
        self.last_error.borrow().clone()
    }

    /// Begins to connect, unless it has.
    pub fn start(self: &Rc<Self>) {
        if !self.started.replace(true) {
            driver::spawn(run(self.clone()));
        }
    }

    /// Sends a request, again over every new connection, until there is an answer.
    pub async fn call(self: &Rc<Self>, request: &Request<'_>) -> Result<Answer, Setback> {
        self.start();
        let place = || (self.closed.get() || !self.crowded.get()).then_some(());
        self.room.until(place).await;
        if self.closed.get() {
            return Err(Setback::Moved);
        }
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        let frame = request.encode(id).map_err(|error| Setback::Final(error.into()))?;
        let (reply, answer) = oneshot::channel();
        if self.pending.borrow().is_empty() {
            self.heard.set(driver::now());
        }
        if self.connection.get() != 0 {
            self.outbox.borrow_mut().extend_from_slice(&frame);
            self.changed.set();
        }
        self.pending.borrow_mut().insert(id, Pending { frame, gather: request.gather(), reply });
        self.crowded.set(self.pending.borrow().len() >= REQUESTS_MAX);
        let _guard = Guard(self, id);
        answer.await.unwrap_or(Err(Setback::Moved))
    }

    fn take(&self, id: u64) -> Option<Pending> {
        let mut all = self.pending.borrow_mut();
        let pending = all.remove(&id);
        let has_room = all.len() <= REQUESTS_MAX / 2;
        drop(all);
        if has_room && self.crowded.replace(false) {
            self.room.set();
        }
        pending
    }

    fn finish(&self, id: u64, result: Result<Answer, Setback>) {
        // A request that was given up is not there any more; its answer goes nowhere. So does one whose future is dropped
        // in this moment.
        if let Some(pending) = self.take(id) {
            let _ = pending.reply.send(result);
        }
    }

    /// Takes a part of an answer.
    pub fn answer(&self, id: u64, message: &PageMessage<'_>) {
        let gathered = match self.pending.borrow_mut().get_mut(&id) {
            Some(pending) => pending.gather.add(message),
            None => return,
        };
        match gathered {
            Gathered::Partly => {}
            Gathered::Whole(answer) => self.finish(id, Ok(answer)),
            Gathered::Unfit(text) => self.finish(id, Err(Setback::Final(Cause::Unfit(text)))),
            Gathered::Damaged => {
                tracing::warn!(shard = self.address.shard.0, address = %self.address.address, "pages arrived damaged");
                self.finish(id, Err(Setback::Again(Cause::Unfit("pages arrived damaged".to_owned()))));
            }
        }
    }

    /// Takes the failure of a request.
    pub fn fail(&self, failed: PageFailed) {
        let PageFailed { id, code, text } = failed;
        if code == PageErrorCode::StaleTerm {
            self.shared.end_term(text);
            return;
        }
        self.finish(id, Err(setback(code, text)));
    }

    /// Fails everything that waits.
    pub fn fail_all(&self, setback: impl Fn() -> Setback) {
        for (_, pending) in self.pending.take() {
            // The receiver may be gone already.
            let _ = pending.reply.send(Err(setback()));
        }
        self.crowded.set(false);
        self.room.set();
    }

    /// A connection is open: everything that waits is sent. False when the link was closed meanwhile.
    pub fn open(&self, closer: Closer, welcome: &PageWelcome) -> bool {
        if self.closed.get() {
            return false;
        }
        self.connections.set(self.connections.get() + 1);
        self.connection.set(self.connections.get());
        *self.closer.borrow_mut() = Some(closer);
        *self.last_error.borrow_mut() = None;
        self.heard.set(driver::now());
        let mut outbox = self.outbox.borrow_mut();
        outbox.clear();
        for pending in self.pending.borrow_mut().values_mut() {
            pending.gather.reset();
            outbox.extend_from_slice(&pending.frame);
        }
        drop(outbox);
        let PageWelcome { ingested_lsn, durable_lsn, horizon_lsn, .. } = *welcome;
        self.set_progress(PageProgress { ingested_lsn, durable_lsn, horizon_lsn });
        self.changed.set();
        true
    }

    /// The connection ended.
    pub fn shut(&self) {
        self.connection.set(0);
        *self.closer.borrow_mut() = None;
        self.changed.set();
    }

    /// Ends the connection, to make another.
    pub fn hang_up(&self) {
        if let Some(closer) = self.closer.borrow().as_ref() {
            closer.close();
        }
    }

    /// Ends connection and link: what waits goes to whoever has the shard now.
    pub fn close(&self) {
        self.closed.set(true);
        self.hang_up();
        self.fail_all(|| Setback::Moved);
        self.changed.set();
    }

    pub fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// Number of the open connection, 0 for none.
    pub fn connection(&self) -> u64 {
        self.connection.get()
    }

    /// How many connections were opened.
    pub fn connections(&self) -> u64 {
        self.connections.get()
    }

    pub fn set_progress(&self, progress: PageProgress) {
        self.progress.set(Some(progress));
        self.shared.progressed.set();
    }

    pub fn heard(&self) {
        self.heard.set(driver::now());
    }

    /// Whether the server owes an answer and has said nothing for `limit`.
    pub fn is_silent(&self, limit: Duration) -> bool {
        !self.pending.borrow().is_empty() && driver::now().since(self.heard.get()) >= limit
    }

    /// Waits for something to send; false when this connection is not the link's any more.
    pub async fn filled(&self, connection: u64) -> bool {
        let look = || match self.connection.get() == connection && !self.closed.get() {
            true => (!self.outbox.borrow().is_empty()).then_some(true),
            false => Some(false),
        };
        self.changed.until(look).await
    }

    /// Takes what is to be sent, and leaves an empty buffer.
    pub fn swap_outbox(&self, empty: Vec<u8>) -> Vec<u8> {
        self.outbox.replace(empty)
    }
}

/// What a failure means for the request.
fn setback(code: PageErrorCode, text: String) -> Setback {
    let cause = Cause::Server { code, text };
    match code {
        PageErrorCode::NotYetThere | PageErrorCode::Busy | PageErrorCode::Stopping | PageErrorCode::WrongShardOwner => {
            Setback::Again(cause)
        }
        _ => Setback::Final(cause),
    }
}

/// Keeps a connection until the link is closed.
async fn run(link: Rc<Link>) {
    let mut backoff = BACKOFF_MIN;
    while !link.closed.get() {
        let connections = link.connections.get();
        let ended = converse(&link, &link.shared.config).await;
        let Some(error) = ended.err().filter(|_| !link.closed.get()) else { return };
        let text = error.to_string();
        match error.code() {
            Some(PageErrorCode::StaleTerm) => {
                link.shared.end_term(text);
                return;
            }
            // Neither time nor another map helps.
            Some(
                code @ (PageErrorCode::NotAllowed
                | PageErrorCode::UnknownLog
                | PageErrorCode::WrongVersion
                | PageErrorCode::BadRequest),
            ) => link.fail_all(|| Setback::Final(Cause::Server { code, text: text.clone() })),
            _ => {}
        }
        if connections != link.connections.get() {
            backoff = BACKOFF_MIN;
        }
        // Each cause once, not at every attempt.
        if link.last_error.replace(Some(text.clone())).as_ref() != Some(&text) {
            let (shard, address) = (link.address.shard.0, &link.address.address);
            tracing::warn!(shard, %address, error = %text, "no connection to the page server");
        }
        let closed = link.changed.until(|| link.closed.get().then_some(()));
        if let Either::Left(_) = select(pin!(closed), pin!(driver::sleep(backoff))).await {
            return;
        }
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}
