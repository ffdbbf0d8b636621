//! Receiving: messages out of a connection.

use std::io;

use driver::Reader;
use wire::postgres::MessageReader;

use super::SessionError;

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
