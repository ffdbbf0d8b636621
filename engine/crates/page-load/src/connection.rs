//! One blocking connection to a page server, with mutual TLS or without.

use std::{
    error::Error,
    io::{self, Read, Write},
    net::TcpStream,
    path::Path,
    time::Duration,
};

use identity::{Tls, TlsFiles};
use rustls::{ClientConnection, StreamOwned, pki_types::ServerName};
use wire::page::{PageFrameReader, PageMessage, decode};

use crate::Unexpected;

/// Nobody answers for so long: the run has failed.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// Bytes of one read: as the yardstick's client.
const READ_BYTES: usize = 512 << 10;

trait Stream: Read + Write {}
impl Stream for TcpStream {}
impl Stream for StreamOwned<ClientConnection, TcpStream> {}

/// A connection and what was read of it.
pub struct Connection {
    stream: Box<dyn Stream>,
    frames: PageFrameReader,
    buffer: Vec<u8>,
}

impl Connection {
    /// Connects to `host:port`; `tls` names a directory and the certificate in it.
    ///
    /// # Errors
    /// The network's, or the certificates'.
    pub fn open(address: &str, tls: Option<(&Path, &str)>) -> Result<Connection, Box<dyn Error>> {
        let socket = TcpStream::connect(address)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(ANSWER_LIMIT))?;
        let stream: Box<dyn Stream> = match tls {
            None => Box::new(socket),
            Some((dir, name)) => {
                let tls = Tls::load(TlsFiles {
                    ca: dir.join("ca.pem"),
                    certificate: dir.join(format!("{name}.pem")),
                    key: dir.join(format!("{name}.key")),
                })?;
                let host = address.rsplit_once(':').map_or(address, |(host, _)| host).to_owned();
                let session = ClientConnection::new(tls.client_config(), ServerName::try_from(host)?)?;
                Box::new(StreamOwned::new(session, socket))
            }
        };
        Ok(Connection { stream, frames: PageFrameReader::default(), buffer: vec![0; READ_BYTES] })
    }

    /// Sends all of `bytes`.
    ///
    /// # Errors
    /// The network's.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)?;
        self.stream.flush()
    }

    /// Waits for bytes, and hands every whole message in them to `take`.
    ///
    /// # Errors
    /// The network's, the protocol's, or those of `take`.
    pub fn receive(
        &mut self,
        mut take: impl FnMut(PageMessage<'_>) -> Result<(), Unexpected>,
    ) -> Result<(), Box<dyn Error>> {
        let count = self.stream.read(&mut self.buffer)?;
        if count == 0 {
            return Err(Unexpected("the page server closed the connection".to_owned()).into());
        }
        self.frames.feed(&self.buffer[..count]);
        while let Some(frame) = self.frames.next()? {
            take(decode(frame)?)?;
        }
        Ok(())
    }
}
