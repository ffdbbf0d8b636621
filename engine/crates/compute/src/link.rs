//! One connection to one safekeeper: connect, greet, one task that reads and one that writes.
//!
//! Knows frames and messages, not what they mean.

use std::{
    cell::{Cell, RefCell},
    io,
    rc::Rc,
    time::Duration,
};

use consensus::message::{AcceptorMessage, AcceptorStatus};
use driver::{Closer, Connection, Event, Writer};
use identity::{Call, Caller, NotAllowed, Role, Tls};
use pgtypes::{LogId, SystemId};
use wire::append::{FrameReader, Hello, Message, Purpose, WireError, decode, encode, encode_to_vec};

/// Connecting, the TLS handshake, and the wait for the status each end after this: a frozen safekeeper accepts
/// connections (its kernel does) and answers nothing.
pub const STEP_LIMIT: Duration = Duration::from_secs(2);

/// An outbox that has grown beyond this while the peer was slow gives its memory back when it is empty.
const OUTBOX_KEPT_BYTES: usize = 1 << 20;

/// How to reach and to know safekeepers.
#[derive(Clone)]
pub struct Greeting {
    /// Which log.
    pub log: LogId,
    /// Of the PostgreSQL cluster; 0 when nobody has told it yet, which safekeepers do not compare.
    pub system_id: SystemId,
    /// Certificates; `None` by the development flag.
    pub tls: Option<Tls>,
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The socket failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The peer sent something else than the protocol.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The peer is no safekeeper of this cluster.
    #[error(transparent)]
    Identity(#[from] NotAllowed),
    /// The peer says why it does not go on.
    #[error("safekeeper refuses the connection: {0}")]
    Refused(String),
    /// A message that does not belong here.
    #[error("unexpected message")]
    Unexpected,
    /// The peer closed the connection.
    #[error("closed by the safekeeper")]
    Closed,
}

/// Both halves of a connection, shared by its tasks and by whoever sends.
#[derive(Default)]
pub struct Link {
    outbox: RefCell<Vec<u8>>,
    filled: Event,
    closed: Cell<bool>,
    closer: RefCell<Option<Closer>>,
}

impl Link {
    /// Adds bytes to what is sent next. What a closed link is given goes nowhere.
    pub fn send(&self, append: impl FnOnce(&mut Vec<u8>)) {
        if self.closed.get() {
            return;
        }
        append(&mut self.outbox.borrow_mut());
        self.filled.set();
    }

    /// Ends the connection, whatever its tasks are doing.
    pub fn close(&self) {
        self.closed.set(true);
        if let Some(closer) = self.closer.borrow_mut().take() {
            closer.close();
        }
        self.filled.set();
    }

    /// Whether it was closed from this side.
    pub fn is_closed(&self) -> bool {
        self.closed.get()
    }
}

/// Holds the conversation until it ends; returns why. `on_status` is called once, then `on_message` for each message.
///
/// # Errors
/// Always, when not closed from this side: see [`LinkError`].
pub async fn converse(
    link: &Rc<Link>,
    address: &str,
    greeting: &Greeting,
    on_status: impl FnOnce(AcceptorStatus),
    mut on_message: impl FnMut(AcceptorMessage),
) -> Result<(), LinkError> {
    let connection = open(address, greeting, Purpose::Propose, Call::Propose).await?;
    if link.is_closed() {
        return Ok(());
    }
    *link.closer.borrow_mut() = Some(connection.closer());
    let (mut reader, writer) = connection.into_split();

    let mut frames = FrameReader::new();
    let mut on_status = Some(on_status);
    let mut writer = Some(writer);
    loop {
        while let Some(frame) = frames.next()? {
            match (decode(frame)?, on_status.take()) {
                (Message::Acceptor(AcceptorMessage::Status(status)), Some(on_status)) => {
                    // What was meant for an earlier connection.
                    link.outbox.borrow_mut().clear();
                    if let Some(writer) = writer.take() {
                        driver::spawn(write(link.clone(), writer));
                    }
                    on_status(status);
                }
                (Message::Acceptor(message), None) => on_message(message),
                (Message::Error(error), _) => return Err(LinkError::Refused(error.text)),
                _ => return Err(LinkError::Unexpected),
            }
        }
        let receive = reader.read(frames.take_buffer(false));
        let (read, buffer) = match on_status.is_some() {
            // Dropping the read loses nothing: the connection is given up with it.
            true => driver::timeout(STEP_LIMIT, receive).await.ok_or_else(late)?,
            false => receive.await,
        };
        frames.return_buffer(buffer);
        match read {
            _ if link.is_closed() => return Ok(()),
            Ok(0) => return Err(LinkError::Closed),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Connects to the safekeeper at `address` and greets it.
///
/// # Errors
/// It cannot be reached within [`STEP_LIMIT`], or is none of this cluster.
pub async fn open(address: &str, greeting: &Greeting, purpose: Purpose, call: Call) -> Result<Connection, LinkError> {
    let mut connection = driver::connect(address, STEP_LIMIT).await?;
    if let Some(tls) = &greeting.tls {
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host).trim_matches(['[', ']']);
        let handshake = connection.upgrade_client(tls.client_config(), host);
        connection = driver::timeout(STEP_LIMIT, handshake).await.ok_or_else(late)??;
        Caller::of_certificate(connection.peer_certificate().as_deref())?.expect_server(
            Role::Safekeeper,
            greeting.log.cluster,
            call,
        )?;
    }
    let hello = Hello { log: greeting.log, system_id: greeting.system_id, purpose };
    let (written, _) = connection.write_all(encode_to_vec(&Message::Hello(hello))?).await;
    written?;
    Ok(connection)
}

fn late() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {STEP_LIMIT:?}"))
}

/// Sends what is in the outbox, all of it in one call; two buffers take turns.
async fn write(link: Rc<Link>, mut writer: Writer) {
    let mut spare = Vec::new();
    loop {
        let ready = link.filled.until(|| {
            let filled = !link.outbox.borrow().is_empty();
            (filled || link.is_closed()).then_some(())
        });
        ready.await;
        if link.is_closed() {
            return;
        }
        let buffer = link.outbox.replace(spare);
        let (result, mut sent) = writer.write_all(buffer).await;
        if result.is_err() {
            // The reader tells why.
            if let Some(closer) = link.closer.borrow().as_ref() {
                closer.close();
            }
            return;
        }
        sent.clear();
        if sent.capacity() > OUTBOX_KEPT_BYTES {
            sent = Vec::new();
        }
        spare = sent;
    }
}

/// Appends the frame of a proposer's message, with its WAL, to an outbox.
///
/// # Errors
/// See [`encode`].
pub fn encode_message(message: &Message<'_>, out: &mut Vec<u8>) -> Result<(), WireError> {
    encode(message, out)?;
    if let Message::Proposer(_, wal) = message {
        out.extend_from_slice(wal);
    }
    Ok(())
}
