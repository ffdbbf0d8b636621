//! What a client sends: startup packets without a type byte, then messages with one.

use alloc::{string::String, vec::Vec};

use super::ProtocolError;

/// Longest message that a client may send: passwords, queries and status updates are all far shorter.
pub const MAX_MESSAGE_BYTES: usize = 16 << 10;
/// Longest startup packet (PostgreSQL's `MAX_STARTUP_PACKET_LENGTH`).
const MAX_STARTUP_BYTES: u32 = 10_000;
/// Spare capacity of the buffer that is handed out for a read.
const READ_BYTES: usize = 4 << 10;

/// Codes in place of a version (`libpq/pqcomm.h`).
const CANCEL_REQUEST: u32 = 1234 << 16 | 5678;
const SSL_REQUEST: u32 = 1234 << 16 | 5679;
const GSS_ENCRYPTION_REQUEST: u32 = 1234 << 16 | 5680;

/// The first packets of a connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StartupMessage {
    /// Asks for TLS: answered by one byte, `S` or `N`. The reader must hold no more bytes then
    /// ([`MessageReader::is_empty`]): a stranger could have put them in front of the encrypted ones.
    SslRequest,
    /// Asks for encryption by GSSAPI: answered by `N`.
    GssEncryptionRequest,
    /// Asks to cancel a query of another connection: nothing to cancel here, the connection is closed.
    CancelRequest,
    /// The session begins.
    Startup(Startup),
}

/// The startup packet proper.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Startup {
    /// Minor version asked for; 0 is what is spoken.
    pub minor: u16,
    /// Names and values as sent, in order.
    pub parameters: Vec<(String, String)>,
}

impl Startup {
    /// The value of a parameter.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().rev().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Whether the client asks for physical replication. `replication=database` (logical) and an ordinary session are
    /// none. Values as in PostgreSQL's `ProcessStartupPacket`, which takes any boolean.
    pub fn is_physical_replication(&self) -> bool {
        self.parameter("replication")
            .is_some_and(|value| ["true", "on", "yes", "1", "t", "y"].iter().any(|yes| value.eq_ignore_ascii_case(yes)))
    }

    /// Protocol extensions asked for, none of which is supported.
    pub fn unknown_extensions(&self) -> impl Iterator<Item = &str> {
        self.parameters.iter().map(|(name, _)| name.as_str()).filter(|name| name.starts_with("_pq_."))
    }
}

/// The value of setting `name` in the startup parameter `options`, which is a command line: `-c name=value`,
/// `-cname=value` or `--name=value`; a backslash takes the next character literally (`pg_split_opts`). The last one counts.
pub fn options_setting(options: &str, name: &str) -> Option<String> {
    let mut words: Vec<String> = Vec::new();
    let mut word: Option<String> = None;
    let mut characters = options.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => word.get_or_insert_default().extend(characters.next()),
            space if space.is_ascii_whitespace() => words.extend(word.take()),
            other => word.get_or_insert_default().push(other),
        }
    }
    words.extend(word);

    let mut found = None;
    let mut rest = words.iter();
    while let Some(word) = rest.next() {
        let setting = match (word.as_str(), word.strip_prefix("--").or_else(|| word.strip_prefix("-c"))) {
            ("-c", _) => rest.next().map(String::as_str),
            (_, stripped) => stripped,
        };
        if let Some((known, value)) = setting.and_then(|setting| setting.split_once('='))
            && known == name
        {
            found = Some(String::from(value));
        }
    }
    found
}

/// A message of the session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrontendMessage<'a> {
    /// An answer in the authentication: password, or a message of SASL.
    Authentication(&'a [u8]),
    /// A simple query: here, a replication command.
    Query(&'a str),
    /// A message inside the copy stream: see [`super::decode_copy`].
    CopyData(&'a [u8]),
    /// The client's end of the copy stream.
    CopyDone,
    /// The client gives the copy stream up.
    CopyFail,
    /// The extended query protocol, which replication connections do not have; skip until [`FrontendMessage::Sync`].
    Extended(u8),
    /// End of a group of extended messages.
    Sync,
    /// The client leaves.
    Terminate,
}

impl<'a> FrontendMessage<'a> {
    fn decode(kind: u8, body: &'a [u8]) -> Result<Self, ProtocolError> {
        Ok(match kind {
            b'p' => FrontendMessage::Authentication(body),
            b'Q' => FrontendMessage::Query(match body.split_last() {
                Some((0, text)) if !text.contains(&0) => {
                    core::str::from_utf8(text).map_err(|_| ProtocolError::Malformed("query"))?
                }
                _ => return Err(ProtocolError::Malformed("query")),
            }),
            b'd' => FrontendMessage::CopyData(body),
            b'c' => FrontendMessage::CopyDone,
            b'f' => FrontendMessage::CopyFail,
            b'S' => FrontendMessage::Sync,
            b'X' => FrontendMessage::Terminate,
            b'P' | b'B' | b'E' | b'D' | b'C' | b'F' | b'H' => FrontendMessage::Extended(kind),
            other => return Err(ProtocolError::UnknownMessage(other)),
        })
    }
}

/// Cuts what a client sends into messages.
///
/// The buffer never holds more than the longest message and one read: a length is checked before it is believed.
#[derive(Debug, Default)]
pub struct MessageReader {
    buffer: Vec<u8>,
    consumed: usize,
}

impl MessageReader {
    /// A reader of a fresh connection.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether no byte waits to be taken.
    pub fn is_empty(&self) -> bool {
        self.buffer.len() == self.consumed
    }

    /// Adds received bytes. Take all messages out before the next call.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.compact();
        self.buffer.extend_from_slice(bytes);
    }

    /// Hands the buffer out for a read *behind* the bytes in it, with at least 4 KiB of room; give it back with
    /// [`MessageReader::return_buffer`].
    pub fn take_buffer(&mut self) -> Vec<u8> {
        self.compact();
        self.buffer.reserve(READ_BYTES);
        core::mem::take(&mut self.buffer)
    }

    /// Takes back the buffer of [`MessageReader::take_buffer`].
    pub fn return_buffer(&mut self, buffer: Vec<u8>) {
        debug_assert!(self.buffer.is_empty(), "the buffer was not taken");
        self.buffer = buffer;
    }

    /// The next packet of the startup; `None` when more bytes are needed.
    ///
    /// # Errors
    /// The client's fault: see [`ProtocolError`].
    pub fn next_startup(&mut self) -> Result<Option<StartupMessage>, ProtocolError> {
        let rest = &self.buffer[self.consumed..];
        let Some(length) = rest.first_chunk().map(|bytes| u32::from_be_bytes(*bytes)) else { return Ok(None) };
        // The length and a version or code.
        if !(8..=MAX_STARTUP_BYTES).contains(&length) {
            return Err(ProtocolError::BadLength { message: 0, length });
        }
        let Some(packet) = rest.get(4..length as usize) else { return Ok(None) };
        let (code, body) = packet.split_at(4);
        let mut number = [0; 4];
        number.copy_from_slice(code);
        let code = u32::from_be_bytes(number);
        let message = match code {
            SSL_REQUEST => StartupMessage::SslRequest,
            GSS_ENCRYPTION_REQUEST => StartupMessage::GssEncryptionRequest,
            CANCEL_REQUEST => StartupMessage::CancelRequest,
            version => {
                let (major, minor) = ((version >> 16) as u16, version as u16);
                if major != 3 {
                    return Err(ProtocolError::Version { major, minor });
                }
                StartupMessage::Startup(Startup { minor, parameters: parameters(body)? })
            }
        };
        self.consumed += length as usize;
        Ok(Some(message))
    }

    /// Whether [`MessageReader::next`] would give a message or an error now.
    pub fn is_message_ready(&self) -> bool {
        let rest = &self.buffer[self.consumed..];
        let Some(&[_, l0, l1, l2, l3]) = rest.first_chunk::<5>() else { return false };
        let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
        length > MAX_MESSAGE_BYTES || rest.len() > length
    }

    /// The next message of the session; `None` when more bytes are needed.
    ///
    /// # Errors
    /// The client's fault: see [`ProtocolError`].
    #[expect(clippy::should_implement_trait, reason = "the message borrows from the reader, which Iterator cannot say")]
    pub fn next(&mut self) -> Result<Option<FrontendMessage<'_>>, ProtocolError> {
        let rest = &self.buffer[self.consumed..];
        let Some(&[kind, l0, l1, l2, l3]) = rest.first_chunk::<5>() else { return Ok(None) };
        let length = u32::from_be_bytes([l0, l1, l2, l3]);
        if length < 4 || length as usize > MAX_MESSAGE_BYTES {
            return Err(ProtocolError::BadLength { message: kind, length });
        }
        let Some(body) = rest.get(5..1 + length as usize) else { return Ok(None) };
        self.consumed += 1 + length as usize;
        FrontendMessage::decode(kind, body).map(Some)
    }

    fn compact(&mut self) {
        if self.consumed > 0 {
            self.buffer.drain(..self.consumed);
            self.consumed = 0;
        }
    }
}

/// Pairs of zero-terminated texts, ended by an empty name.
fn parameters(body: &[u8]) -> Result<Vec<(String, String)>, ProtocolError> {
    const MALFORMED: ProtocolError = ProtocolError::Malformed("startup");
    let Some((0, pairs)) = body.split_last() else { return Err(MALFORMED) };
    if pairs.is_empty() {
        return Ok(Vec::new());
    }
    let Some((0, pairs)) = pairs.split_last() else { return Err(MALFORMED) };
    let mut texts = pairs.split(|byte| *byte == 0).map(|text| {
        let text = core::str::from_utf8(text).map_err(|_| MALFORMED)?;
        Ok(String::from(text))
    });
    let mut parameters = Vec::new();
    while let Some(name) = texts.next() {
        let name = name?;
        if name.is_empty() {
            return Err(MALFORMED);
        }
        parameters.push((name, texts.next().ok_or(MALFORMED)??));
    }
    Ok(parameters)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::{borrow::ToOwned, vec};

    fn startup_packet(code: u32, body: &[u8]) -> Vec<u8> {
        let mut packet = (8 + body.len() as u32).to_be_bytes().to_vec();
        packet.extend_from_slice(&code.to_be_bytes());
        packet.extend_from_slice(body);
        packet
    }

    fn read_startup(packet: &[u8]) -> Result<Option<StartupMessage>, ProtocolError> {
        let mut reader = MessageReader::new();
        reader.feed(packet);
        reader.next_startup()
    }

    #[test]
    fn startup_packet_of_a_walreceiver_is_understood_however_it_is_cut() {
        let packet =
            startup_packet(3 << 16, b"user\0rep\0database\0replication\0replication\0true\0application_name\0s1\0\0");
        let mut reader = MessageReader::new();
        let (last, first) = packet.split_last().unwrap();
        for byte in first {
            reader.feed(&[*byte]);
            assert_eq!(Ok(None), reader.next_startup());
        }
        reader.feed(&[*last]);
        let Ok(Some(StartupMessage::Startup(startup))) = reader.next_startup() else { panic!("no startup") };
        assert!(startup.is_physical_replication());
        assert_eq!(Some("rep"), startup.parameter("user"));
        assert_eq!(None, startup.parameter("options"));
        assert!(reader.is_empty());
    }

    #[test]
    fn requests_before_the_startup_are_told_apart() {
        for (code, expected) in [
            (80_877_103, StartupMessage::SslRequest),
            (80_877_104, StartupMessage::GssEncryptionRequest),
            (80_877_102, StartupMessage::CancelRequest),
        ] {
            assert_eq!(Ok(Some(expected)), read_startup(&startup_packet(code, b"")));
        }
    }

    #[test]
    fn malformed_startup_packets_are_refused() {
        for body in [&b""[..], b"user", b"user\0", b"user\0x", b"user\0x\0", b"user\0\0", b"\0x\0\0", b"a\0\xFF\0\0"] {
            assert_eq!(
                Err(ProtocolError::Malformed("startup")),
                read_startup(&startup_packet(3 << 16, body)),
                "{body:?}"
            );
        }
        assert_eq!(
            Ok(Some(StartupMessage::Startup(Startup::default()))),
            read_startup(&startup_packet(3 << 16, b"\0"))
        );
        for length in [0u32, 7, 10_001, u32::MAX] {
            assert_eq!(Err(ProtocolError::BadLength { message: 0, length }), read_startup(&length.to_be_bytes()));
        }
        assert_eq!(Err(ProtocolError::Version { major: 2, minor: 0 }), read_startup(&startup_packet(2 << 16, b"\0")));
        // A TLS handshake without SSLRequest, and a browser.
        assert!(read_startup(b"\x16\x03\x01\x02\x00\x01\x00\x01").is_err());
        assert!(read_startup(b"GET / HTTP/1.1\r\n").is_err());
    }

    #[test]
    fn replication_must_be_physical() {
        for (value, expected) in [("true", true), ("ON", true), ("1", true), ("database", false), ("false", false)] {
            let startup = Startup { minor: 0, parameters: vec![("replication".to_owned(), value.to_owned())] };
            assert_eq!(expected, startup.is_physical_replication(), "{value}");
        }
        assert!(!Startup::default().is_physical_replication());
    }

    #[test]
    fn settings_are_found_in_the_option_line() {
        for (options, expected) in [
            ("-c lakebase.log=a/b", Some("a/b")),
            ("-clakebase.log=a/b", Some("a/b")),
            ("--lakebase.log=a/b", Some("a/b")),
            ("-c x=y  -c lakebase.log=a\\ b", Some("a b")),
            ("-c lakebase.log=a -c lakebase.log=b", Some("b")),
            ("-c lakebase.logs=a", None),
            ("-c", None),
            ("lakebase.log=a", None),
            ("", None),
        ] {
            assert_eq!(expected.map(ToOwned::to_owned), options_setting(options, "lakebase.log"), "{options}");
        }
    }

    fn message(kind: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![kind];
        bytes.extend_from_slice(&(4 + body.len() as u32).to_be_bytes());
        bytes.extend_from_slice(body);
        bytes
    }

    #[test]
    fn messages_are_told_apart() {
        let mut reader = MessageReader::new();
        let messages: [(u8, &[u8], FrontendMessage<'_>); 7] = [
            (b'p', b"proof", FrontendMessage::Authentication(b"proof")),
            (b'Q', b"IDENTIFY_SYSTEM\0", FrontendMessage::Query("IDENTIFY_SYSTEM")),
            (b'd', b"r", FrontendMessage::CopyData(b"r")),
            (b'c', b"", FrontendMessage::CopyDone),
            (b'P', b"whatever", FrontendMessage::Extended(b'P')),
            (b'S', b"", FrontendMessage::Sync),
            (b'X', b"", FrontendMessage::Terminate),
        ];
        for (kind, body, _) in &messages {
            reader.feed(&message(*kind, body));
        }
        for (_, _, expected) in messages {
            assert!(reader.is_message_ready());
            assert_eq!(Ok(Some(expected)), reader.next());
        }
        assert!(!reader.is_message_ready());
        assert_eq!(Ok(None), reader.next());
    }

    #[test]
    fn garbage_between_messages_is_refused() {
        for (bytes, expected) in [
            (message(b'!', b""), ProtocolError::UnknownMessage(b'!')),
            (message(b'Q', b"no end"), ProtocolError::Malformed("query")),
            (message(b'Q', b"two\0ends\0"), ProtocolError::Malformed("query")),
            (message(b'Q', b"\xFF\0"), ProtocolError::Malformed("query")),
            (b"Q\0\0\0\x03".to_vec(), ProtocolError::BadLength { message: b'Q', length: 3 }),
            (b"d\0\x01\0\0".to_vec(), ProtocolError::BadLength { message: b'd', length: 65_536 }),
        ] {
            let mut reader = MessageReader::new();
            reader.feed(&bytes);
            assert!(reader.is_message_ready());
            assert_eq!(Err(expected), reader.next());
        }
    }
}
