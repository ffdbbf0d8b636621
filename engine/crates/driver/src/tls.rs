//! TLS over a TCP stream: rustls is one more machine without I/O, shared by the two halves of a connection.

use std::{
    cell::{Cell, RefCell},
    io::{self, BufRead, IoSlice, Write},
};

use compio::{BufResult, io::AsyncWriteExt, net::TcpStream};

use crate::{Event, connection::receive};

/// Ciphertext taken in by one receive: a heartbeat on an idle connection, or sixteen records of the largest size. Follows
/// the traffic, so that a thousand idle connections cost little memory.
const RECEIVE_BYTES: (usize, usize) = (4 << 10, 256 << 10);

/// Plaintext that is encrypted before its ciphertext is sent: bounds what rustls keeps.
const ENCRYPT_BYTES: usize = 256 << 10;

/// What the halves share.
pub(crate) struct Tls {
    session: RefCell<rustls::Connection>,
    /// Ciphertext that was received and not yet given to rustls is `received[consumed..]`.
    received: RefCell<Vec<u8>>,
    consumed: Cell<usize>,
    /// Capacity for the next receive.
    receive_bytes: Cell<usize>,
    /// Plaintext bytes given to rustls since ciphertext was last taken out.
    unsent: Cell<usize>,
    /// Whether a task sends ciphertext. Records must leave in the order in which rustls made them.
    sending: Cell<bool>,
    /// A sender was dropped in the middle: the stream is cut inside a record.
    cut: Cell<bool>,
    idle: Event,
}

/// Marks the end of sending, also when the sending future is dropped.
struct Sending<'a> {
    tls: &'a Tls,
    finished: bool,
}

impl Drop for Sending<'_> {
    fn drop(&mut self) {
        self.tls.sending.set(false);
        if !self.finished {
            self.tls.cut.set(true);
        }
        self.tls.idle.set();
    }
}

fn invalid(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl Tls {
    pub(crate) fn new(mut session: rustls::Connection, received: Vec<u8>) -> Self {
        // The bound is ours: `ENCRYPT_BYTES` at a time.
        session.set_buffer_limit(None);
        Self {
            session: RefCell::new(session),
            received: RefCell::new(received),
            consumed: Cell::new(0),
            receive_bytes: Cell::new(RECEIVE_BYTES.0),
            unsent: Cell::new(0),
            sending: Cell::new(false),
            cut: Cell::new(false),
            idle: Event::new(),
        }
    }

    /// The session, and ciphertext that was received and not yet used.
    pub(crate) fn into_parts(self) -> (rustls::Connection, Vec<u8>) {
        let mut received = self.received.into_inner();
        received.drain(..self.consumed.get());
        (self.session.into_inner(), received)
    }

    pub(crate) fn peer_certificate(&self) -> Option<Vec<u8>> {
        Some(self.session.borrow().peer_certificates()?.first()?.to_vec())
    }

    /// Runs the handshake to its end.
    pub(crate) async fn handshake(&self, stream: &TcpStream) -> io::Result<()> {
        loop {
            self.flush(stream).await?;
            if !self.session.borrow().is_handshaking() {
                return Ok(());
            }
            if !self.process(stream).await? && self.fill(stream).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Appends plaintext to the spare capacity of `buffer`; 0 when the peer has closed in order.
    pub(crate) async fn read(&self, stream: &TcpStream, buffer: &mut Vec<u8>) -> io::Result<usize> {
        let before = buffer.len();
        loop {
            let closed = self.take_plaintext(buffer)?;
            let room = buffer.len() < buffer.capacity();
            if room && !closed && self.process(stream).await? {
                continue;
            }
            if self.session.borrow().wants_write() {
                self.flush(stream).await?;
            }
            if buffer.len() > before || closed {
                return Ok(buffer.len() - before);
            }
            if self.fill(stream).await? == 0 {
                // Without close_notify the stream may have been cut by anyone.
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Encrypts and sends `buffers`, in order.
    pub(crate) async fn write(&self, stream: &TcpStream, buffers: &[Vec<u8>]) -> io::Result<()> {
        for buffer in buffers {
            for chunk in buffer.chunks(ENCRYPT_BYTES) {
                let pending = {
                    let mut session = self.session.borrow_mut();
                    let count = session.writer().write_vectored(&[IoSlice::new(chunk)])?;
                    assert_eq!(count, chunk.len(), "rustls takes all without a buffer limit");
                    self.unsent.set(self.unsent.get() + count);
                    self.unsent.get()
                };
                if pending >= ENCRYPT_BYTES {
                    self.flush(stream).await?;
                }
            }
        }
        self.flush(stream).await
    }

    /// Tells the peer that nothing more follows.
    pub(crate) async fn close(&self, stream: &TcpStream) -> io::Result<()> {
        self.session.borrow_mut().send_close_notify();
        self.flush(stream).await
    }

    /// Moves decrypted bytes to the spare capacity of `buffer`; true when the peer has closed in order.
    fn take_plaintext(&self, buffer: &mut Vec<u8>) -> io::Result<bool> {
        let mut session = self.session.borrow_mut();
        let mut reader = session.reader();
        while buffer.len() < buffer.capacity() {
            let count = match reader.fill_buf() {
                Ok([]) => return Ok(true),
                Ok(chunk) => {
                    let count = chunk.len().min(buffer.capacity() - buffer.len());
                    buffer.extend_from_slice(&chunk[..count]);
                    count
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            };
            reader.consume(count);
        }
        Ok(false)
    }

    /// Gives rustls some received ciphertext; false when there is none.
    async fn process(&self, stream: &TcpStream) -> io::Result<bool> {
        let result = {
            let received = self.received.borrow();
            let mut rest = &received[self.consumed.get()..];
            if rest.is_empty() {
                return Ok(false);
            }
            let mut session = self.session.borrow_mut();
            session.read_tls(&mut rest)?;
            self.consumed.set(received.len() - rest.len());
            session.process_new_packets()
        };
        if let Err(error) = result {
            // The alert is a courtesy to the peer; the error that matters is the first one.
            let _ = self.flush(stream).await;
            return Err(invalid(error));
        }
        Ok(true)
    }

    /// Receives ciphertext; 0 at the end of the stream.
    async fn fill(&self, stream: &TcpStream) -> io::Result<usize> {
        let mut buffer = self.received.take();
        debug_assert_eq!(buffer.len(), self.consumed.get(), "ciphertext is received only when none is left");
        buffer.clear();
        self.consumed.set(0);
        let wanted = self.receive_bytes.get();
        if buffer.capacity() > 2 * wanted {
            buffer = Vec::new();
        }
        buffer.reserve_exact(wanted);
        let (result, buffer) = receive(stream, buffer).await;
        if buffer.len() == buffer.capacity() {
            self.receive_bytes.set((wanted * 4).min(RECEIVE_BYTES.1));
        } else if buffer.len() < wanted / 16 {
            self.receive_bytes.set((wanted / 2).max(RECEIVE_BYTES.0));
        }
        self.received.replace(buffer);
        result
    }

    /// Sends the ciphertext that rustls has made so far, after what another task is sending.
    async fn flush(&self, stream: &TcpStream) -> io::Result<()> {
        self.idle.until(|| (!self.sending.get()).then_some(())).await;
        if self.cut.get() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.sending.set(true);
        let mut sending = Sending { tls: self, finished: false };
        loop {
            let mut output = Vec::new();
            {
                let mut session = self.session.borrow_mut();
                while session.wants_write() {
                    session.write_tls(&mut output)?;
                }
                self.unsent.set(0);
            }
            if output.is_empty() {
                sending.finished = true;
                return Ok(());
            }
            let BufResult(result, _) = (&mut &*stream).write_all(output).await;
            result?;
        }
    }
}
