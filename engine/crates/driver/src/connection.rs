//! TCP connections, plain or with TLS.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use compio::{
    BufResult,
    buf::{IntoInner, IoBuf},
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use rustls::pki_types::ServerName;

use crate::{clock::timeout, tls::Tls};

/// Seconds without traffic before the kernel asks whether the peer is there, between questions, and their number: a peer
/// whose machine is gone is noticed after a minute.
const KEEPALIVE: [(i32, i32); 3] = [(libc::TCP_KEEPIDLE, 30), (libc::TCP_KEEPINTVL, 10), (libc::TCP_KEEPCNT, 3)];

/// How long a port that is taken is tried again: the kernel takes the io_uring of a killed process apart, and with it the
/// sockets that were waited for, some milliseconds after the process is reaped. Its successor may be that quick.
const TAKEN_LIMIT: Duration = Duration::from_secs(2);

/// Opens a listening socket on `address` (`host:port`; port 0 takes a free one). Needs no core. Blocks: used at start.
///
/// # Errors
/// The address is not one of this machine, or taken.
pub fn bind(address: &str) -> io::Result<std::net::TcpListener> {
    let begun = std::time::Instant::now();
    loop {
        match std::net::TcpListener::bind(address) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && begun.elapsed() < TAKEN_LIMIT => {
                std::thread::sleep(Duration::from_millis(10));
            }
            result => {
                return result
                    .map_err(|error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}")));
            }
        }
    }
}

/// A listening socket of this core.
pub struct Listener(TcpListener);

impl Listener {
    /// Listens on `address` (`host:port`).
    ///
    /// # Errors
    /// As [`bind`].
    pub fn listen(address: &str) -> io::Result<Self> {
        Self::attach(bind(address)?)
    }

    /// Listens on a socket that was opened by [`bind`].
    ///
    /// # Errors
    /// The driver refuses it.
    pub fn attach(socket: std::net::TcpListener) -> io::Result<Self> {
        socket.set_nonblocking(false)?;
        Ok(Self(TcpListener::from_std(socket)?))
    }

    /// Where it listens.
    ///
    /// # Errors
    /// Those of `getsockname(2)`.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    /// The next connection. Dropping the future may close a connection that has just arrived.
    ///
    /// # Errors
    /// Those of `accept(2)`: the listener stays usable, but when the process is out of descriptors the caller must pause.
    pub async fn accept(&self) -> io::Result<Connection> {
        let (stream, _) = self.0.accept().await?;
        Connection::new(stream)
    }
}

/// Connects to `address` (`host:port`; the name is resolved) within `limit`.
///
/// # Errors
/// The name is unknown, the peer refuses, or `TimedOut`.
pub async fn connect(address: &str, limit: Duration) -> io::Result<Connection> {
    match timeout(limit, TcpStream::connect(address)).await {
        Some(result) => Connection::new(result?),
        None => Err(io::Error::new(io::ErrorKind::TimedOut, format!("no connection to {address} within {limit:?}"))),
    }
}

/// Receives into the spare capacity of `buffer`, behind what it holds.
pub(crate) async fn receive(stream: &TcpStream, buffer: Vec<u8>) -> (io::Result<usize>, Vec<u8>) {
    let start = buffer.len();
    if start == buffer.capacity() {
        return (Err(io::Error::new(io::ErrorKind::InvalidInput, "no room in the buffer")), buffer);
    }
    let BufResult(result, slice) = (&mut &*stream).read(buffer.slice(start..)).await;
    (result, slice.into_inner())
}

/// A connection, before it is split.
pub struct Connection {
    reader: Reader,
    writer: Writer,
}

/// The receiving half.
pub struct Reader {
    stream: TcpStream,
    tls: Option<Rc<Tls>>,
}

/// The sending half.
pub struct Writer {
    stream: TcpStream,
    tls: Option<Rc<Tls>>,
}

/// Ends a connection from outside: a waiting read returns.
#[derive(Clone)]
pub struct Closer(TcpStream);

impl Closer {
    /// Ends both directions at once.
    pub fn close(&self) {
        // SAFETY: no pointers; the descriptor is open while `self` lives.
        let result = unsafe { libc::shutdown(self.0.as_raw_fd(), libc::SHUT_RDWR) };
        // ENOTCONN: the peer was faster.
        debug_assert!(result == 0 || io::Error::last_os_error().raw_os_error() == Some(libc::ENOTCONN));
    }
}

/// A connection between two cores: it can be sent to another thread.
pub struct Detached {
    socket: OwnedFd,
    tls: Option<(rustls::Connection, Vec<u8>)>,
}

impl Detached {
    /// The connection, on the core that calls this.
    ///
    /// # Errors
    /// The driver refuses it.
    pub fn attach(self) -> io::Result<Connection> {
        let socket = std::net::TcpStream::from(self.socket);
        // io_uring would return EAGAIN for a non-blocking socket; the polling driver sets it again by itself.
        socket.set_nonblocking(false)?;
        let tls = self.tls.map(|(session, received)| Rc::new(Tls::new(session, received)));
        Ok(Connection::with(TcpStream::from_std(socket)?, tls))
    }
}

impl Connection {
    fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let set = |level, option, value: i32| {
            // SAFETY: four readable bytes, the size that these options have.
            let result = unsafe {
                libc::setsockopt(stream.as_raw_fd(), level, option, (&raw const value).cast(), size_of::<i32>() as u32)
            };
            if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
        };
        set(libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
        for (option, value) in KEEPALIVE {
            set(libc::IPPROTO_TCP, option, value)?;
        }
        Ok(Self::with(stream, None))
    }

    fn with(stream: TcpStream, tls: Option<Rc<Tls>>) -> Self {
        Self { reader: Reader { stream: stream.clone(), tls: tls.clone() }, writer: Writer { stream, tls } }
    }

    /// Takes over a connected socket of the standard library.
    ///
    /// # Errors
    /// The driver refuses it.
    pub fn from_socket(socket: std::net::TcpStream) -> io::Result<Self> {
        socket.set_nonblocking(false)?;
        Self::new(TcpStream::from_std(socket)?)
    }

    /// The address of the other side.
    ///
    /// # Errors
    /// The other side has left already.
    pub fn peer_address(&self) -> io::Result<SocketAddr> {
        self.reader.stream.peer_addr()
    }

    /// The halves, for two tasks.
    pub fn into_split(self) -> (Reader, Writer) {
        (self.reader, self.writer)
    }

    /// As [`Reader::read`].
    ///
    /// # Errors
    /// As there.
    pub async fn read(&mut self, buffer: Vec<u8>) -> (io::Result<usize>, Vec<u8>) {
        self.reader.read(buffer).await
    }

    /// As [`Writer::write_all`].
    ///
    /// # Errors
    /// As there.
    pub async fn write_all(&mut self, buffer: Vec<u8>) -> (io::Result<()>, Vec<u8>) {
        self.writer.write_all(buffer).await
    }

    /// Ends the connection from outside.
    pub fn closer(&self) -> Closer {
        Closer(self.reader.stream.clone())
    }

    /// The peer's own certificate (DER), when the connection has TLS and the peer showed one.
    pub fn peer_certificate(&self) -> Option<Vec<u8>> {
        self.reader.tls.as_ref()?.peer_certificate()
    }

    /// Whether the connection is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.reader.tls.is_some()
    }

    /// Accepts a TLS handshake on a plain connection. The caller sets the time limit by dropping the future.
    ///
    /// # Errors
    /// The peer does not speak TLS, its certificate is refused, or it went away.
    ///
    /// # Panics
    /// The connection is encrypted already.
    pub async fn upgrade_server(self, config: Arc<rustls::ServerConfig>) -> io::Result<Self> {
        let session = rustls::ServerConnection::new(config).map_err(io::Error::other)?;
        self.upgrade(session.into()).await
    }

    /// Begins a TLS handshake on a plain connection; the server's certificate must be valid for `server_name` (a DNS name
    /// or an IP address). The caller sets the time limit by dropping the future.
    ///
    /// # Errors
    /// As [`Connection::upgrade_server`]; `InvalidInput` when `server_name` is neither.
    ///
    /// # Panics
    /// The connection is encrypted already.
    pub async fn upgrade_client(self, config: Arc<rustls::ClientConfig>, server_name: &str) -> io::Result<Self> {
        let name = ServerName::try_from(server_name.to_owned())
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let session = rustls::ClientConnection::new(config, name).map_err(io::Error::other)?;
        self.upgrade(session.into()).await
    }

    async fn upgrade(self, session: rustls::Connection) -> io::Result<Self> {
        assert!(!self.is_encrypted(), "TLS inside TLS");
        let tls = Tls::new(session, Vec::new());
        tls.handshake(&self.reader.stream).await?;
        Ok(Self::with(self.writer.stream, Some(Rc::new(tls))))
    }

    /// Takes the connection off this core.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn detach(self) -> io::Result<Detached> {
        let Self { reader, writer } = self;
        // Another descriptor of the same socket: the driver of this core closes its own.
        let socket = reader.stream.as_fd().try_clone_to_owned()?;
        drop(reader);
        let tls = writer.tls.map(|tls| match Rc::try_unwrap(tls) {
            Ok(tls) => tls.into_parts(),
            Err(_) => unreachable!("only the two halves share it, and both are here"),
        });
        Ok(Detached { socket, tls })
    }
}

impl Reader {
    /// Appends received bytes to the spare capacity of `buffer` (which must have some); 0 is the end of the stream.
    ///
    /// The future must not be dropped while the connection is to be read again.
    ///
    /// # Errors
    /// Those of `recv(2)`; with TLS also bad records (`InvalidData`) and an end without notice (`UnexpectedEof`).
    pub async fn read(&mut self, mut buffer: Vec<u8>) -> (io::Result<usize>, Vec<u8>) {
        match &self.tls {
            None => receive(&self.stream, buffer).await,
            Some(_) if buffer.len() == buffer.capacity() => {
                (Err(io::Error::new(io::ErrorKind::InvalidInput, "no room in the buffer")), buffer)
            }
            Some(tls) => (tls.read(&self.stream, &mut buffer).await, buffer),
        }
    }

    /// Ends the connection from outside.
    pub fn closer(&self) -> Closer {
        Closer(self.stream.clone())
    }
}

impl Writer {
    /// Sends all of `buffer`.
    ///
    /// # Errors
    /// Those of `send(2)`; the connection is of no use then.
    pub async fn write_all(&mut self, buffer: Vec<u8>) -> (io::Result<()>, Vec<u8>) {
        match &self.tls {
            None => {
                let BufResult(result, buffer) = self.stream.write_all(buffer).await;
                (result, buffer)
            }
            Some(tls) => {
                let buffers = [buffer];
                let result = tls.write(&self.stream, &buffers).await;
                let [buffer] = buffers;
                (result, buffer)
            }
        }
    }

    /// Sends all of `buffers`, in order, with as few system calls as possible.
    ///
    /// # Errors
    /// As [`Writer::write_all`].
    pub async fn write_vectored(&mut self, buffers: Vec<Vec<u8>>) -> (io::Result<()>, Vec<Vec<u8>>) {
        match &self.tls {
            None => {
                let BufResult(result, buffers) = self.stream.write_vectored_all(buffers).await;
                (result, buffers)
            }
            Some(tls) => (tls.write(&self.stream, &buffers).await, buffers),
        }
    }

    /// Tells the peer that nothing more follows; reading goes on.
    ///
    /// # Errors
    /// As [`Writer::write_all`].
    pub async fn shutdown(&mut self) -> io::Result<()> {
        if let Some(tls) = &self.tls {
            tls.close(&self.stream).await?;
        }
        self.stream.shutdown().await
    }

    /// Ends the connection from outside.
    pub fn closer(&self) -> Closer {
        Closer(self.stream.clone())
    }
}
