//! One connection to one page server: connect, greet, one task that reads and one that writes.

use std::{io, rc::Rc, time::Duration};

use driver::{Reader, Writer};
use identity::{Call, Caller, NotAllowed, Role};
use wire::{
    append::WireError,
    page::{PageErrorCode, PageFailed, PageFrameReader, PageHello, PageMessage, PageWelcome, decode, encode_to_vec},
};

use crate::{config::ClientConfig, link::Link};

/// Connecting, the TLS handshake, and the wait for the welcome each end after this: a frozen server accepts connections
/// (its kernel does) and answers nothing.
const STEP_LIMIT: Duration = Duration::from_secs(2);
/// A connection that owes answers and has been silent for so long is given up: the server is frozen, or its machine is
/// gone. A server that waits for WAL on our behalf looks the same, and is asked again.
const SILENCE_LIMIT: Duration = Duration::from_secs(10);
/// How often silence is looked for.
const SILENCE_CHECK: Duration = Duration::from_secs(1);
/// An outbox that has grown beyond this while the server was slow gives its memory back when it is empty.
const OUTBOX_KEPT_BYTES: usize = 1 << 20;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum ConversationError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Identity(#[from] NotAllowed),
    /// The server ends the connection, and says why.
    #[error("page server ends the connection: {}", .0.text)]
    Refused(PageFailed),
    /// The server is another one than the map says.
    #[error("page server is not the one of the shard map: {0}")]
    Mismatch(String),
    #[error("unexpected message of the page server")]
    Unexpected,
    #[error("closed by the page server")]
    Closed,
    #[error("page server is silent for {SILENCE_LIMIT:?}")]
    Silent,
}

impl ConversationError {
    /// The code of the server's last word.
    pub fn code(&self) -> Option<PageErrorCode> {
        match self {
            ConversationError::Refused(failed) => Some(failed.code),
            ConversationError::Mismatch(_) => Some(PageErrorCode::WrongShardOwner),
            _ => None,
        }
    }
}

/// Holds the conversation until it ends.
///
/// # Errors
/// Always, when the link was not closed from this side: see [`ConversationError`].
pub async fn converse(link: &Rc<Link>, config: &ClientConfig) -> Result<(), ConversationError> {
    let address = link.address();
    let mut connection = driver::connect(&address.address, STEP_LIMIT).await?;
    if let Some(tls) = &config.tls {
        let host = address.address.rsplit_once(':').map_or(&*address.address, |(host, _)| host);
        let handshake = connection.upgrade_client(tls.client_config(), host.trim_matches(['[', ']']));
        connection = driver::timeout(STEP_LIMIT, handshake).await.ok_or_else(late)??;
        Caller::of_certificate(connection.peer_certificate().as_deref())?.expect_server(
            Role::PageServer,
            config.log.cluster,
            Call::ReadPages,
        )?;
    }
    let hello = PageHello {
        log: config.log,
        system_id: config.system_id,
        shard: address.shard,
        generation: address.generation,
        role: config.role,
    };
    let (written, _) = connection.write_all(encode_to_vec(&PageMessage::PageHello(hello))?).await;
    written?;
    let closer = connection.closer();
    let (mut reader, writer) = connection.into_split();
    let mut frames = PageFrameReader::default();
    // Dropping the read loses nothing: the connection is given up with it.
    let welcome = driver::timeout(STEP_LIMIT, receive_welcome(&mut reader, &mut frames)).await.ok_or_else(late)??;
    check_welcome(&welcome, link, config)?;

    if !link.open(closer, &welcome) {
        return Ok(());
    }
    driver::spawn(write(link.clone(), link.connection(), writer));
    driver::spawn(watch(link.clone(), link.connection()));
    let result = receive(link, &mut reader, &mut frames).await;
    let silent = link.is_silent(SILENCE_LIMIT);
    link.shut();
    match result {
        _ if link.is_closed() => Ok(()),
        Err(_) if silent => Err(ConversationError::Silent),
        result => result,
    }
}

async fn receive_welcome(reader: &mut Reader, frames: &mut PageFrameReader) -> Result<PageWelcome, ConversationError> {
    loop {
        if let Some(frame) = frames.next()? {
            return match decode(frame)? {
                PageMessage::PageWelcome(welcome) => Ok(welcome),
                PageMessage::PageFailed(failed) => Err(ConversationError::Refused(failed)),
                _ => Err(ConversationError::Unexpected),
            };
        }
        read(reader, frames).await?;
    }
}

async fn read(reader: &mut Reader, frames: &mut PageFrameReader) -> Result<(), ConversationError> {
    let (read, buffer) = reader.read(frames.take_buffer(false)).await;
    frames.return_buffer(buffer);
    if read? == 0 { Err(ConversationError::Closed) } else { Ok(()) }
}

fn check_welcome(welcome: &PageWelcome, link: &Link, config: &ClientConfig) -> Result<(), ConversationError> {
    let expected = link.address();
    if welcome.shard != expected.shard || welcome.range != expected.range {
        let text = format!(
            "shard {} of {:?}, expected shard {} of {:?}",
            welcome.shard.0, welcome.range, expected.shard.0, expected.range
        );
        return Err(ConversationError::Mismatch(text));
    }
    if expected.generation.0 != 0 && welcome.generation != expected.generation {
        let text = format!("generation {}, expected {}", welcome.generation.0, expected.generation.0);
        return Err(ConversationError::Mismatch(text));
    }
    if welcome.stripe_blocks != config.striping.stripe_blocks {
        let text = format!("{} blocks a stripe, not {}", welcome.stripe_blocks, config.striping.stripe_blocks);
        return Err(ConversationError::Mismatch(text));
    }
    Ok(())
}

async fn receive(link: &Rc<Link>, reader: &mut Reader, frames: &mut PageFrameReader) -> Result<(), ConversationError> {
    loop {
        while let Some(frame) = frames.next()? {
            match decode(frame)? {
                PageMessage::PageProgress(progress) => link.set_progress(progress),
                PageMessage::PageFailed(failed) if failed.id == 0 => return Err(ConversationError::Refused(failed)),
                PageMessage::PageFailed(failed) => link.fail(failed),
                PageMessage::Pages(pages) => link.answer(pages.id, &PageMessage::Pages(pages)),
                PageMessage::Sizes(sizes) => link.answer(sizes.id, &PageMessage::Sizes(sizes)),
                PageMessage::MetadataPart(part) => link.answer(part.id, &PageMessage::MetadataPart(part)),
                PageMessage::LeaseGranted(lease) => link.answer(lease.id, &PageMessage::LeaseGranted(lease)),
                PageMessage::AdvisoryTaken(taken) => link.answer(taken.id, &PageMessage::AdvisoryTaken(taken)),
                PageMessage::LsnFound(found) => link.answer(found.id, &PageMessage::LsnFound(found)),
                _ => return Err(ConversationError::Unexpected),
            }
        }
        read(reader, frames).await?;
        link.heard();
    }
}

/// Sends what is in the outbox, all of it in one call; two buffers take turns.
async fn write(link: Rc<Link>, connection: u64, mut writer: Writer) {
    let mut spare = Vec::new();
    while link.filled(connection).await {
        let buffer = link.swap_outbox(spare);
        let (result, mut sent) = writer.write_all(buffer).await;
        if result.is_err() {
            // The reader tells why.
            writer.closer().close();
            return;
        }
        sent.clear();
        if sent.capacity() > OUTBOX_KEPT_BYTES {
            sent = Vec::new();
        }
        spare = sent;
    }
}

/// Ends a connection that is silent.
async fn watch(link: Rc<Link>, connection: u64) {
    while link.connection() == connection {
        if link.is_silent(SILENCE_LIMIT) {
            link.hang_up();
        }
        driver::sleep(SILENCE_CHECK).await;
    }
}

fn late() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {STEP_LIMIT:?}"))
}
