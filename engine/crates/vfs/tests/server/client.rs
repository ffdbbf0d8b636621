//! A client that sees every byte: just enough of PostgreSQL's protocol 3.0 for simple queries over a local socket.

use std::{
    io::{self, ErrorKind, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

pub struct Client {
    stream: UnixStream,
    pub pid: u32,
}

/// Rows as text.
pub type Rows = Vec<Vec<String>>;

fn failure(text: impl Into<String>) -> io::Error {
    io::Error::other(text.into())
}

impl Client {
    pub fn try_connect(socket: &Path) -> io::Result<Client> {
        Self::connect(socket, b"user\0postgres\0database\0postgres\0\0")
    }

    /// A connection to another database.
    pub fn try_connect_to(socket: &Path, database: &str) -> io::Result<Client> {
        Self::connect(socket, format!("user\0postgres\0database\0{database}\0\0").as_bytes())
    }

    /// A connection that takes replication commands.
    pub fn try_connect_replication(socket: &Path) -> io::Result<Client> {
        Self::connect(socket, b"user\0postgres\0replication\0true\0\0")
    }

    fn connect(socket: &Path, parameters: &[u8]) -> io::Result<Client> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(crate::PATIENCE))?;
        let mut client = Client { stream, pid: 0 };
        let mut packet = (8 + parameters.len() as u32).to_be_bytes().to_vec();
        packet.extend(196_608u32.to_be_bytes());
        packet.extend(parameters);
        client.stream.write_all(&packet)?;
        client.read_until_ready()?;
        Ok(client)
    }

    /// Sends a query without waiting for its answer.
    pub fn send(&mut self, sql: &str) {
        let mut packet = vec![b'Q'];
        packet.extend((5 + sql.len() as u32).to_be_bytes());
        packet.extend(sql.as_bytes());
        packet.push(0);
        self.stream.write_all(&packet).unwrap();
    }

    /// Reads the answer to a query that was sent.
    pub fn answer(&mut self) -> io::Result<Rows> {
        self.read_until_ready()
    }

    pub fn try_query(&mut self, sql: &str) -> io::Result<Rows> {
        self.send(sql);
        self.answer()
    }

    pub fn query(&mut self, sql: &str) -> Rows {
        self.try_query(sql).unwrap_or_else(|error| panic!("{sql}: {error}"))
    }

    /// The only column of the only row.
    pub fn value(&mut self, sql: &str) -> String {
        let rows = self.query(sql);
        assert_eq!((1, 1), (rows.len(), rows[0].len()), "{sql}");
        rows[0][0].clone()
    }

    /// Bytes that arrive within `time`, at most one buffer: `None` when none does, empty at the end of the connection.
    pub fn bytes_within(&mut self, time: Duration) -> Option<Vec<u8>> {
        self.stream.set_read_timeout(Some(time)).unwrap();
        let mut buffer = vec![0; 65536];
        let result = self.stream.read(&mut buffer);
        self.stream.set_read_timeout(Some(crate::PATIENCE)).unwrap();
        match result {
            Ok(count) => Some(buffer[..count].to_vec()),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => None,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => Some(vec![]),
            Err(error) => panic!("{error}"),
        }
    }

    fn message(&mut self) -> io::Result<(u8, Vec<u8>)> {
        let mut head = [0; 5];
        self.stream.read_exact(&mut head)?;
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        let mut body = vec![0; length - 4];
        self.stream.read_exact(&mut body)?;
        Ok((head[0], body))
    }

    fn read_until_ready(&mut self) -> io::Result<Rows> {
        let mut rows = vec![];
        let mut error = None;
        loop {
            let (kind, body) = self.message()?;
            match kind {
                b'Z' => return error.map_or(Ok(rows), Err),
                b'D' => rows.push(columns(&body)),
                b'K' => self.pid = u32::from_be_bytes([body[0], body[1], body[2], body[3]]),
                b'E' => {
                    let text = |code| field(&body, code).unwrap_or_default();
                    if text(b'S') == "FATAL" {
                        return Err(failure(text(b'M')));
                    }
                    error = Some(failure(text(b'M')));
                }
                _ => {}
            }
        }
    }
}

fn columns(body: &[u8]) -> Vec<String> {
    let mut rest = &body[2..];
    let mut columns = vec![];
    while !rest.is_empty() {
        let length = i32::from_be_bytes([rest[0], rest[1], rest[2], rest[3]]);
        let length = usize::try_from(length).unwrap_or(0);
        columns.push(String::from_utf8(rest[4..4 + length].to_vec()).unwrap());
        rest = &rest[4 + length..];
    }
    columns
}

fn field(body: &[u8], code: u8) -> Option<String> {
    let found = body.split(|byte| *byte == 0).find(|field| field.first() == Some(&code))?;
    Some(String::from_utf8_lossy(&found[1..]).into_owned())
}
