//! Receiving: messages out of a connection, and its end.

use std::{io, time::Duration};

use driver::{Reader, Writer};
use wire::postgres::{ErrorReply, MessageReader, Reply};

use super::SessionError;

/// How long a refused client may take to read why.
const FAREWELL_LIMIT: Duration = Duration::from_secs(2);

/// The receiving half of a follower's connection.
pub(super) struct Inbound {
    reader: Reader,
    /// Take messages out with `next`.
    pub(super) messages: MessageReader,
}

impl Inbound {
    pub(super) fn new(reader: Reader, messages: MessageReader) -> Self {
        Self { reader, messages }
    }

    /// Waits until a message (or an error) can be taken; false at the end of the stream.
    pub(super) async fn wait(&mut self) -> Result<bool, SessionError> {
        while !self.messages.is_message_ready() {
            let (result, buffer) = self.reader.read(self.messages.take_buffer()).await;
            self.messages.return_buffer(buffer);
            match result {
                Ok(0) => return Ok(false),
                Ok(_) => {}
                // libpq closes TLS without the farewell when its process is killed.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }
}

/// Tells the client why the connection ends, and reads until it closes: closing with unread bytes would reset the
/// connection, and the client could lose the error.
pub(super) async fn refuse(reader: &mut Reader, writer: &mut Writer, error: &ErrorReply) {
    let mut reply = Reply::new();
    reply.error(error);
    let farewell = async {
        writer.write_all(reply.into_bytes()).await.0?;
        writer.shutdown().await?;
        let mut buffer = Vec::with_capacity(4096);
        loop {
            buffer.clear();
            let (result, returned) = reader.read(buffer).await;
            buffer = returned;
            if result? == 0 {
                return Ok(());
            }
        }
    };
    // Whether it read the text or was gone before: the connection is closed.
    let _told: Option<io::Result<()>> = driver::timeout(FAREWELL_LIMIT, farewell).await;
}

impl Inbound {
    /// As [`refuse`].
    pub(super) async fn refuse(&mut self, writer: &mut Writer, error: &ErrorReply) -> Result<(), SessionError> {
        refuse(&mut self.reader, writer, error).await;
        Err(SessionError::Refused(error.message.clone()))
    }
}
