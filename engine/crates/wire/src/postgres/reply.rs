//! What a client is sent.

use alloc::{string::String, vec::Vec};

use pgtypes::{Lsn, PgTimeline};

/// Codes of `errcodes.txt` that this server uses.
pub mod sqlstate {
    /// The client sent what the protocol does not allow.
    pub const PROTOCOL_VIOLATION: &str = "08P01";
    /// Not offered here.
    pub const FEATURE_NOT_SUPPORTED: &str = "0A000";
    /// User unknown, or not allowed.
    pub const INVALID_AUTHORIZATION: &str = "28000";
    /// Wrong password.
    pub const INVALID_PASSWORD: &str = "28P01";
    /// No such log.
    pub const INVALID_CATALOG_NAME: &str = "3D000";
    /// A command that cannot be parsed.
    pub const SYNTAX_ERROR: &str = "42601";
    /// A name that slots may not have.
    pub const INVALID_NAME: &str = "42602";
    /// No such slot or setting.
    pub const UNDEFINED_OBJECT: &str = "42704";
    /// The slot is there already.
    pub const DUPLICATE_OBJECT: &str = "42710";
    /// Too many slots or connections of this kind.
    pub const CONFIGURATION_LIMIT_EXCEEDED: &str = "53400";
    /// Too many connections.
    pub const TOO_MANY_CONNECTIONS: &str = "53300";
    /// The disk is full.
    pub const DISK_FULL: &str = "53100";
    /// The slot is in use.
    pub const OBJECT_IN_USE: &str = "55006";
    /// Not possible in this state.
    pub const OBJECT_NOT_IN_PREREQUISITE_STATE: &str = "55000";
    /// The server stops.
    pub const ADMIN_SHUTDOWN: &str = "57P01";
    /// The disk failed.
    pub const IO_ERROR: &str = "58030";
    /// The WAL asked for is not here any more.
    pub const UNDEFINED_FILE: &str = "58P01";
    /// The WAL is damaged.
    pub const DATA_CORRUPTED: &str = "XX001";
    /// A fault of ours.
    pub const INTERNAL_ERROR: &str = "XX000";
}

/// How bad an error is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Severity {
    /// The command failed, the session goes on.
    Error,
    /// The connection is closed after it.
    Fatal,
}

/// An error for the client, as PostgreSQL words it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ErrorReply {
    /// How bad.
    pub severity: Severity,
    /// Five characters: see [`sqlstate`].
    pub code: &'static str,
    /// One sentence, lower case, no full stop.
    pub message: String,
    /// More, in whole sentences; may be empty.
    pub detail: String,
}

impl ErrorReply {
    /// A failed command.
    pub fn error(code: &'static str, message: impl Into<String>) -> Self {
        Self { severity: Severity::Error, code, message: message.into(), detail: String::new() }
    }

    /// The end of the connection.
    pub fn fatal(code: &'static str, message: impl Into<String>) -> Self {
        Self { severity: Severity::Fatal, code, message: message.into(), detail: String::new() }
    }

    /// Adds whole sentences.
    #[must_use]
    pub fn with_detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = detail.into();
        self
    }
}

/// Type of a result's column.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ColumnType {
    /// `text`.
    Text,
    /// `int8`.
    Int8,
    /// `bytea`; sent as the bytes themselves, as PostgreSQL's `TIMELINE_HISTORY` does.
    Bytea,
}

/// A column of a result.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Column {
    /// Its name.
    pub name: &'static str,
    /// Its type.
    pub column_type: ColumnType,
}

/// Messages to the client, one behind the other.
#[derive(Debug, Default)]
pub struct Reply {
    bytes: Vec<u8>,
}

impl Reply {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The bytes to send.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    fn message(&mut self, kind: u8, body: impl FnOnce(&mut Vec<u8>)) -> &mut Self {
        self.bytes.push(kind);
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        body(&mut self.bytes);
        // A reply is built here from parts that are bounded far below 4 GiB.
        let length = (self.bytes.len() - start) as u32;
        self.bytes[start..start + 4].copy_from_slice(&length.to_be_bytes());
        self
    }

    /// `NegotiateProtocolVersion`: this is version 3.0, and none of `unknown` is known.
    pub fn negotiate_version<'a>(&mut self, unknown: impl Iterator<Item = &'a str>) -> &mut Self {
        self.message(b'v', |body| {
            // The newest version, major and minor (`SendNegotiateProtocolVersion`).
            put_i32(body, 3 << 16);
            let count_at = body.len();
            put_i32(body, 0);
            let mut count = 0;
            for name in unknown {
                put_text(body, name);
                count += 1;
            }
            body[count_at..count_at + 4].copy_from_slice(&i32::to_be_bytes(count));
        })
    }

    /// The client is who it says.
    pub fn authentication_ok(&mut self) -> &mut Self {
        self.message(b'R', |body| put_i32(body, 0))
    }

    /// Begins SASL with these mechanisms, best first.
    pub fn authentication_sasl(&mut self, mechanisms: &[&str]) -> &mut Self {
        self.message(b'R', |body| {
            put_i32(body, 10);
            for mechanism in mechanisms {
                put_text(body, mechanism);
            }
            body.push(0);
        })
    }

    /// The server's challenge.
    pub fn authentication_sasl_continue(&mut self, data: &str) -> &mut Self {
        self.message(b'R', |body| {
            put_i32(body, 11);
            body.extend_from_slice(data.as_bytes());
        })
    }

    /// The server's own proof.
    pub fn authentication_sasl_final(&mut self, data: &str) -> &mut Self {
        self.message(b'R', |body| {
            put_i32(body, 12);
            body.extend_from_slice(data.as_bytes());
        })
    }

    /// A setting that clients want to know.
    pub fn parameter_status(&mut self, name: &str, value: &str) -> &mut Self {
        self.message(b'S', |body| {
            put_text(body, name);
            put_text(body, value);
        })
    }

    /// Key for cancelling, which does nothing here.
    pub fn backend_key(&mut self, process: i32, secret: i32) -> &mut Self {
        self.message(b'K', |body| {
            put_i32(body, process);
            put_i32(body, secret);
        })
    }

    /// The next command may come.
    pub fn ready_for_query(&mut self) -> &mut Self {
        self.message(b'Z', |body| body.push(b'I'))
    }

    /// The query had nothing in it.
    pub fn empty_query(&mut self) -> &mut Self {
        self.message(b'I', |_| {})
    }

    /// Columns of the rows that follow.
    pub fn row_description(&mut self, columns: &[Column]) -> &mut Self {
        self.message(b'T', |body| {
            put_count(body, columns.len());
            for column in columns {
                put_text(body, column.name);
                // No table, no attribute number.
                put_i32(body, 0);
                body.extend_from_slice(&0i16.to_be_bytes());
                let (oid, size): (i32, i16) = match column.column_type {
                    ColumnType::Text => (25, -1),
                    ColumnType::Int8 => (20, 8),
                    ColumnType::Bytea => (17, -1),
                };
                put_i32(body, oid);
                body.extend_from_slice(&size.to_be_bytes());
                // No type modifier; text format.
                put_i32(body, -1);
                body.extend_from_slice(&0i16.to_be_bytes());
            }
        })
    }

    /// A row; `None` is NULL.
    pub fn data_row(&mut self, values: &[Option<&[u8]>]) -> &mut Self {
        self.message(b'D', |body| {
            put_count(body, values.len());
            for value in values {
                match value {
                    None => put_i32(body, -1),
                    Some(bytes) => {
                        body.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
                        body.extend_from_slice(bytes);
                    }
                }
            }
        })
    }

    /// The command is done.
    pub fn command_complete(&mut self, tag: &str) -> &mut Self {
        self.message(b'C', |body| put_text(body, tag))
    }

    /// The copy stream begins, in both directions.
    pub fn copy_both(&mut self) -> &mut Self {
        // Text format, no columns: what `StartReplication` sends.
        self.message(b'W', |body| body.extend_from_slice(&[0, 0, 0]))
    }

    /// A message inside the copy stream.
    pub fn copy_data(&mut self, data: &[u8]) -> &mut Self {
        self.message(b'd', |body| body.extend_from_slice(data))
    }

    /// The server's end of the copy stream.
    pub fn copy_done(&mut self) -> &mut Self {
        self.message(b'c', |_| {})
    }

    /// Where the stream goes on when a timeline has ended: one row (`StartReplication`).
    pub fn next_timeline(&mut self, timeline: PgTimeline, start_lsn: Lsn) -> &mut Self {
        let columns = [
            Column { name: "next_tli", column_type: ColumnType::Int8 },
            Column { name: "next_tli_startpos", column_type: ColumnType::Text },
        ];
        let (timeline, start) = (alloc::format!("{}", timeline.0), alloc::format!("{start_lsn}"));
        self.row_description(&columns).data_row(&[Some(timeline.as_bytes()), Some(start.as_bytes())])
    }

    /// An error.
    pub fn error(&mut self, error: &ErrorReply) -> &mut Self {
        self.message(b'E', |body| {
            let severity = match error.severity {
                Severity::Error => "ERROR",
                Severity::Fatal => "FATAL",
            };
            // `V` is the severity that is never translated.
            for (field, text) in
                [(b'S', severity), (b'V', severity), (b'C', error.code), (b'M', &error.message), (b'D', &error.detail)]
            {
                if !text.is_empty() {
                    body.push(field);
                    put_text(body, text);
                }
            }
            body.push(0);
        })
    }
}

fn put_i32(body: &mut Vec<u8>, value: i32) {
    body.extend_from_slice(&value.to_be_bytes());
}

/// Columns of a row: a handful, written here by us.
fn put_count(body: &mut Vec<u8>, count: usize) {
    body.extend_from_slice(&(count as i16).to_be_bytes());
}

/// A zero-terminated text. A zero inside (a name from a client) would end it early, so it is left out.
fn put_text(body: &mut Vec<u8>, text: &str) {
    body.extend(text.bytes().filter(|byte| *byte != 0));
    body.push(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_has_the_fields_that_clients_read() {
        let mut reply = Reply::new();
        reply.error(&ErrorReply::fatal(sqlstate::INVALID_PASSWORD, "no\0pe").with_detail("Why."));
        assert_eq!(b"E\0\0\0\x26SFATAL\0VFATAL\0C28P01\0Mnope\0DWhy.\0\0".to_vec(), reply.into_bytes());
    }

    #[test]
    fn rows_are_as_in_the_manual() {
        let mut reply = Reply::new();
        reply
            .row_description(&[Column { name: "a", column_type: ColumnType::Int8 }])
            .data_row(&[Some(b"7"), None])
            .command_complete("X")
            .ready_for_query();
        let expected = [
            &b"T\0\0\0\x1A\0\x01a\0\0\0\0\0\0\0\0\0\0\x14\0\x08\xFF\xFF\xFF\xFF\0\0"[..],
            b"D\0\0\0\x0F\0\x02\0\0\0\x017\xFF\xFF\xFF\xFF",
            b"C\0\0\0\x06X\0",
            b"Z\0\0\0\x05I",
        ]
        .concat();
        assert_eq!(expected, reply.into_bytes());
    }

    #[test]
    fn unknown_extensions_are_counted() {
        let mut reply = Reply::new();
        reply.negotiate_version(["_pq_.a", "_pq_.b"].into_iter());
        assert_eq!(b"v\0\0\0\x1A\0\x03\0\0\0\0\0\x02_pq_.a\0_pq_.b\0".to_vec(), reply.into_bytes());
    }
}
