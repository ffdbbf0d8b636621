//! Replication commands: the language of PostgreSQL's `repl_scanner.l` and `repl_gram.y`, the physical part.

use alloc::{string::String, vec::Vec};

use pgtypes::{Lsn, PgTimeline};

/// Longest name of a slot (`NAMEDATALEN` - 1).
pub const MAX_NAME_BYTES: usize = 63;

/// A command that this server knows.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Command {
    /// Who is there: system identifier, timeline, position.
    IdentifySystem,
    /// A setting.
    Show {
        /// Its name, in lower case.
        name: String,
    },
    /// The history file of a timeline.
    TimelineHistory {
        /// Which.
        timeline: PgTimeline,
    },
    /// A slot that holds WAL.
    CreateSlot {
        /// Its name.
        slot: String,
        /// How long it lives.
        kind: SlotKind,
        /// Holds WAL at once, not only from the first confirmation on.
        reserve_wal: bool,
    },
    /// Where a slot is.
    ReadSlot {
        /// Its name.
        slot: String,
    },
    /// Removes a slot.
    DropSlot {
        /// Its name.
        slot: String,
        /// Waits until nobody uses it.
        wait: bool,
    },
    /// Streams WAL.
    StartReplication {
        /// Whose confirmations hold WAL.
        slot: Option<String>,
        /// First byte.
        start_lsn: Lsn,
        /// Of which timeline; the current one when not given.
        timeline: Option<PgTimeline>,
    },
}

/// How long a slot lives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SlotKind {
    /// Until it is dropped or expires.
    Permanent,
    /// Until its connection ends.
    Temporary,
}

/// Why a command is not carried out. The client's fault.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CommandError {
    /// No command of the language, or malformed.
    #[error("syntax error at or near \"{near}\"")]
    Syntax {
        /// Where.
        near: String,
    },
    /// PostgreSQL knows it, this server does not.
    #[error("{what} is not supported by a safekeeper")]
    Unsupported {
        /// What.
        what: String,
    },
    /// A name that no slot can have (`ReplicationSlotValidateName`).
    #[error("replication slot name \"{0}\" must be 1 to 63 lower case letters, digits and underscores")]
    SlotName(String),
}

/// The command of a query; `None` for an empty one.
///
/// # Errors
/// See [`CommandError`].
pub fn parse_command(query: &str) -> Result<Option<Command>, CommandError> {
    let mut tokens = Tokens { tokens: tokenize(query)?, position: 0 };
    if tokens.peek().is_none() {
        return Ok(None);
    }
    let command = tokens.command()?;
    let _optional = tokens.take_symbol(';');
    match tokens.peek() {
        None => Ok(Some(command)),
        Some(_) => Err(tokens.unexpected()),
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Token {
    /// An unquoted word, in lower case; also numbers' relatives such as `wal_segment_size`.
    Word(String),
    /// A name in double quotes.
    Quoted(String),
    /// A text in single quotes.
    Text(String),
    Number(u32),
    Lsn(Lsn),
    Symbol(char),
}

impl Token {
    fn text(&self) -> String {
        match self {
            Token::Word(text) | Token::Quoted(text) | Token::Text(text) => text.clone(),
            Token::Number(number) => alloc::format!("{number}"),
            Token::Lsn(lsn) => alloc::format!("{lsn}"),
            Token::Symbol(symbol) => String::from(*symbol),
        }
    }
}

fn tokenize(query: &str) -> Result<Vec<Token>, CommandError> {
    let syntax = |near: &str| CommandError::Syntax { near: near.chars().take(40).collect() };
    let is_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '$' | '.') || !c.is_ascii();
    let mut tokens = Vec::new();
    let mut rest = query.trim_start();
    while let Some(first) = rest.chars().next() {
        let length = match first {
            quote @ ('"' | '\'') => {
                let (text, length) = quoted(rest, quote).ok_or_else(|| syntax(rest))?;
                tokens.push(if quote == '"' { Token::Quoted(text) } else { Token::Text(text) });
                length
            }
            '(' | ')' | ',' | ';' => {
                tokens.push(Token::Symbol(first));
                1
            }
            // A position may begin with a letter, so it is tried first: `A/0`.
            c if is_word(c) => {
                let length = rest.find(|c| !is_word(c) && c != '/').unwrap_or(rest.len());
                let word = &rest[..length];
                tokens.push(if word.contains('/') {
                    Token::Lsn(word.parse().map_err(|_| syntax(word))?)
                } else if word.bytes().all(|c| c.is_ascii_digit()) {
                    Token::Number(word.parse().map_err(|_| syntax(word))?)
                } else if c.is_ascii_digit() || c == '$' || c == '.' {
                    return Err(syntax(word));
                } else {
                    Token::Word(word.to_ascii_lowercase())
                });
                length
            }
            _ => return Err(syntax(rest)),
        };
        rest = rest[length..].trim_start();
    }
    Ok(tokens)
}

/// The contents of a quoted text at the front of `rest`, its quotes doubled inside, and its length with quotes.
fn quoted(rest: &str, quote: char) -> Option<(String, usize)> {
    let mut text = String::new();
    let mut characters = rest.char_indices().skip(1).peekable();
    while let Some((at, character)) = characters.next() {
        if character != quote {
            text.push(character);
        } else if characters.next_if(|(_, next)| *next == quote).is_some() {
            text.push(quote);
        } else {
            return Some((text, at + 1));
        }
    }
    None
}

struct Tokens {
    tokens: Vec<Token>,
    position: usize,
}

impl Tokens {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.position)
    }

    fn next(&mut self) -> Option<Token> {
        let token = self.tokens.get(self.position).cloned();
        self.position += 1;
        token
    }

    fn unexpected(&self) -> CommandError {
        CommandError::Syntax { near: self.peek().map_or_else(|| String::from("end of input"), Token::text) }
    }

    fn take_word(&mut self, word: &str) -> bool {
        let found = matches!(self.peek(), Some(Token::Word(found)) if found == word);
        self.position += usize::from(found);
        found
    }

    fn take_symbol(&mut self, symbol: char) -> bool {
        let found = self.peek() == Some(&Token::Symbol(symbol));
        self.position += usize::from(found);
        found
    }

    fn command(&mut self) -> Result<Command, CommandError> {
        let Some(Token::Word(word)) = self.peek().cloned() else { return Err(self.unexpected()) };
        self.position += 1;
        match word.as_str() {
            "identify_system" => Ok(Command::IdentifySystem),
            "show" => match self.next() {
                Some(Token::Word(name)) => Ok(Command::Show { name }),
                Some(Token::Quoted(name)) => Ok(Command::Show { name: name.to_ascii_lowercase() }),
                _ => Err(self.before()),
            },
            "timeline_history" => Ok(Command::TimelineHistory { timeline: self.timeline()? }),
            "create_replication_slot" => self.create_slot(),
            "read_replication_slot" => Ok(Command::ReadSlot { slot: self.slot()? }),
            "drop_replication_slot" => {
                let slot = self.slot()?;
                Ok(Command::DropSlot { slot, wait: self.take_word("wait") })
            }
            "start_replication" => self.start_replication(),
            "base_backup" | "upload_manifest" | "alter_replication_slot" | "select" => {
                self.position = self.tokens.len();
                Err(CommandError::Unsupported { what: word.to_ascii_uppercase() })
            }
            _ => {
                self.position -= 1;
                Err(self.unexpected())
            }
        }
    }

    /// The error at the token that was taken last.
    fn before(&mut self) -> CommandError {
        self.position -= 1;
        self.unexpected()
    }

    fn timeline(&mut self) -> Result<PgTimeline, CommandError> {
        match self.next() {
            Some(Token::Number(number)) if number > 0 => Ok(PgTimeline(number)),
            _ => Err(self.before()),
        }
    }

    fn slot(&mut self) -> Result<String, CommandError> {
        let name = match self.next() {
            Some(Token::Word(name) | Token::Quoted(name)) => name,
            // The language has only identifiers here, but a name of digits is an identifier in quotes.
            _ => return Err(self.before()),
        };
        let valid = (1..=MAX_NAME_BYTES).contains(&name.len())
            && name.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'_');
        if valid { Ok(name) } else { Err(CommandError::SlotName(name)) }
    }

    fn create_slot(&mut self) -> Result<Command, CommandError> {
        let slot = self.slot()?;
        let kind = if self.take_word("temporary") { SlotKind::Temporary } else { SlotKind::Permanent };
        if self.take_word("logical") {
            return Err(CommandError::Unsupported { what: String::from("logical replication") });
        }
        if !self.take_word("physical") {
            return Err(self.unexpected());
        }
        // Before PostgreSQL 15 a bare word, since then a list of options.
        let mut reserve_wal = self.take_word("reserve_wal");
        if self.take_symbol('(') {
            loop {
                if !self.take_word("reserve_wal") {
                    return Err(self.unexpected());
                }
                reserve_wal = self.boolean()?;
                if self.take_symbol(')') {
                    break;
                }
                if !self.take_symbol(',') {
                    return Err(self.unexpected());
                }
            }
        }
        Ok(Command::CreateSlot { slot, kind, reserve_wal })
    }

    /// The value of an option; an option without one is true.
    fn boolean(&mut self) -> Result<bool, CommandError> {
        let value = match self.peek() {
            Some(Token::Word(text) | Token::Text(text) | Token::Quoted(text)) => match text.as_str() {
                "true" | "on" => true,
                "false" | "off" => false,
                _ => return Err(self.unexpected()),
            },
            Some(Token::Number(0)) => false,
            Some(Token::Number(1)) => true,
            _ => return Ok(true),
        };
        self.position += 1;
        Ok(value)
    }

    fn start_replication(&mut self) -> Result<Command, CommandError> {
        let slot = if self.take_word("slot") { Some(self.slot()?) } else { None };
        if self.take_word("logical") {
            return Err(CommandError::Unsupported { what: String::from("logical replication") });
        }
        let _optional = self.take_word("physical");
        let start_lsn = match self.next() {
            Some(Token::Lsn(lsn)) => lsn,
            _ => return Err(self.before()),
        };
        let timeline = if self.take_word("timeline") { Some(self.timeline()?) } else { None };
        Ok(Command::StartReplication { slot, start_lsn, timeline })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::borrow::ToOwned;

    /// What the clients of PostgreSQL 13 to 17 send, word for word (`libpqwalreceiver.c`, `receivelog.c`, `streamutil.c`).
    #[test]
    fn commands_of_stock_clients() {
        let start = |slot: Option<&str>, timeline| Command::StartReplication {
            slot: slot.map(ToOwned::to_owned),
            start_lsn: Lsn(0x2_0300_0000),
            timeline,
        };
        let create = |kind, reserve_wal| Command::CreateSlot { slot: "s_1".to_owned(), kind, reserve_wal };
        for (query, expected) in [
            ("IDENTIFY_SYSTEM", Command::IdentifySystem),
            ("SHOW wal_segment_size", Command::Show { name: "wal_segment_size".to_owned() }),
            ("SHOW data_directory_mode;", Command::Show { name: "data_directory_mode".to_owned() }),
            ("TIMELINE_HISTORY 3", Command::TimelineHistory { timeline: PgTimeline(3) }),
            ("START_REPLICATION 2/3000000 TIMELINE 1", start(None, Some(PgTimeline(1)))),
            ("START_REPLICATION SLOT \"s_1\" 2/3000000 TIMELINE 1", start(Some("s_1"), Some(PgTimeline(1)))),
            ("start_replication physical 2/3000000", start(None, None)),
            ("CREATE_REPLICATION_SLOT \"s_1\" PHYSICAL (RESERVE_WAL)", create(SlotKind::Permanent, true)),
            ("CREATE_REPLICATION_SLOT \"s_1\" TEMPORARY PHYSICAL RESERVE_WAL", create(SlotKind::Temporary, true)),
            ("CREATE_REPLICATION_SLOT s_1 PHYSICAL", create(SlotKind::Permanent, false)),
            ("CREATE_REPLICATION_SLOT s_1 PHYSICAL (RESERVE_WAL false)", create(SlotKind::Permanent, false)),
            ("READ_REPLICATION_SLOT s_1", Command::ReadSlot { slot: "s_1".to_owned() }),
            ("DROP_REPLICATION_SLOT \"s_1\" WAIT", Command::DropSlot { slot: "s_1".to_owned(), wait: true }),
        ] {
            assert_eq!(Ok(Some(expected)), parse_command(query), "{query}");
        }
        assert_eq!(Ok(None), parse_command("  "));
    }

    #[test]
    fn what_is_not_served_is_named() {
        for (query, what) in [
            ("START_REPLICATION SLOT \"s\" LOGICAL 0/0 (proto_version '4')", "logical replication"),
            ("CREATE_REPLICATION_SLOT s LOGICAL pgoutput", "logical replication"),
            ("BASE_BACKUP ( LABEL 'x',  CHECKPOINT 'fast')", "BASE_BACKUP"),
            ("SELECT pg_catalog.set_config('search_path', '', false);", "SELECT"),
        ] {
            let unsupported = CommandError::Unsupported { what: what.to_owned() };
            assert_eq!(Err(unsupported), parse_command(query), "{query}");
        }
    }

    #[test]
    fn malformed_commands_are_refused() {
        for (query, near) in [
            ("DANCE", "dance"),
            ("IDENTIFY_SYSTEM now", "now"),
            ("SHOW", "end of input"),
            ("START_REPLICATION", "end of input"),
            ("START_REPLICATION 0-0", "-0"),
            ("START_REPLICATION 0/0 TIMELINE", "end of input"),
            ("START_REPLICATION 0/0 TIMELINE 0", "0"),
            ("START_REPLICATION 0/0 TIMELINE 4294967296", "4294967296"),
            ("START_REPLICATION 0/123456789", "0/123456789"),
            ("START_REPLICATION SLOT \"s 0/0", "\"s 0/0"),
            ("CREATE_REPLICATION_SLOT s PHYSICAL (RESERVE_WAL", "end of input"),
            ("CREATE_REPLICATION_SLOT s PHYSICAL (TWO_PHASE)", "two_phase"),
            ("\u{1}", "\u{1}"),
        ] {
            let error = parse_command(query).unwrap_err();
            let CommandError::Syntax { near: found } = &error else { panic!("{query}: {error}") };
            assert!(found.starts_with(near), "{query}: {error}");
        }
        for name in ["\"S\"", "\"a-b\"", "\"\"", "\"../x\"", &alloc::format!("\"{}\"", "x".repeat(64))] {
            let query = alloc::format!("READ_REPLICATION_SLOT {name}");
            assert!(matches!(parse_command(&query), Err(CommandError::SlotName(_))), "{query}");
        }
    }
}
