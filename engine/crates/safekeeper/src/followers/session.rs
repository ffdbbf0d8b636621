//! A session: commands, one after the other.

use std::{rc::Rc, time::Duration};

use driver::Writer;
use pgtypes::{LogId, Lsn, PgTimeline};
use wire::postgres::{
    Column, ColumnType, Command, CommandError, ErrorReply, FrontendMessage, Reply, SlotKind, parse_command, sqlstate,
};

use super::{Admitted, FollowedLog, Followers, SessionError, inbound::Inbound, stream, timelines, timelines::Found};

/// What a follower is told to talk to. The WAL is PostgreSQL 17's; of which minor release its writer is, no log says.
const SERVER_VERSION: &str = concat!("17.0 (Lakebase ", env!("CARGO_PKG_VERSION"), ")");
const SERVER_VERSION_NUM: &str = "170000";

/// How long a slot may take to become durable.
const SLOT_LIMIT: Duration = Duration::from_secs(10);

/// A follower that talks.
pub(super) struct Session<L> {
    pub(super) followers: Rc<Followers>,
    /// Number in the list of the core.
    pub(super) number: u64,
    pub(super) log: Rc<L>,
    pub(super) inbound: Inbound,
    pub(super) writer: Writer,
    pub(super) name: String,
    pub(super) application: String,
    /// Slots that go with the session.
    temporary_slots: Vec<String>,
}

/// What a copy stream needs to know.
pub(super) struct Start {
    pub(super) slot: Option<String>,
    pub(super) begin_lsn: Lsn,
    pub(super) timeline: PgTimeline,
}

/// How a command ended.
enum Outcome {
    /// Send this, and go on.
    Answer(Reply),
    /// Send this once the slot is durable.
    SlotMade { slot: String, reply: Reply },
    /// Stream first.
    Stream(Start),
}

/// Serves an admitted follower until it leaves.
pub(super) async fn run<L: FollowedLog>(
    followers: &Rc<Followers>,
    number: u64,
    admitted: Admitted,
    log: Option<Rc<L>>,
) -> Result<(), SessionError> {
    let Admitted { connection, messages, log: log_id, name, application } = admitted;
    let (reader, mut writer) = connection.into_split();
    let mut inbound = Inbound::new(reader, messages);
    let Some(log) = log.filter(|log| !log.is_closed()) else {
        let message = format!("log \"{log_id}\" does not exist here");
        let error = ErrorReply::fatal(sqlstate::INVALID_CATALOG_NAME, message);
        return inbound.refuse(&mut writer, &error).await;
    };
    let mut session = Session {
        followers: followers.clone(),
        number,
        log,
        inbound,
        writer,
        name,
        application,
        temporary_slots: Vec::new(),
    };
    let result = session.run().await;
    session.drop_temporary_slots();
    result
}

impl<L: FollowedLog> Session<L> {
    async fn run(&mut self) -> Result<(), SessionError> {
        let mut greeting = Reply::new();
        greeting.authentication_ok();
        for (name, value) in [
            ("server_version", SERVER_VERSION),
            ("server_encoding", "UTF8"),
            ("client_encoding", "UTF8"),
            ("application_name", &self.application),
            ("session_authorization", &self.name),
            ("is_superuser", "off"),
            // For `target_session_attrs`.
            ("in_hot_standby", "off"),
            ("default_transaction_read_only", "off"),
            ("DateStyle", "ISO, MDY"),
            ("IntervalStyle", "postgres"),
            ("TimeZone", "GMT"),
            // `pg_receivewal` insists on it.
            ("integer_datetimes", "on"),
            ("standard_conforming_strings", "on"),
            ("scram_iterations", "4096"),
        ] {
            greeting.parameter_status(name, value);
        }
        greeting.backend_key(self.number as i32, 0).ready_for_query();
        self.send(greeting).await?;

        let mut skipping = false;
        while self.inbound.wait().await? {
            let message = match self.inbound.messages.next() {
                Ok(Some(message)) => message,
                Ok(None) => continue,
                Err(error) => {
                    let reply = ErrorReply::fatal(sqlstate::PROTOCOL_VIOLATION, error.to_string());
                    return self.inbound.refuse(&mut self.writer, &reply).await;
                }
            };
            let outcome = match message {
                FrontendMessage::Query(query) => {
                    let command = parse_command(query);
                    self.execute(command)
                }
                FrontendMessage::Terminate => return Ok(()),
                FrontendMessage::Extended(_) if skipping => continue,
                FrontendMessage::Extended(_) => {
                    skipping = true;
                    let mut reply = Reply::new();
                    reply.error(&ErrorReply::error(
                        sqlstate::PROTOCOL_VIOLATION,
                        "extended query protocol not supported in a replication connection",
                    ));
                    Outcome::Answer(reply)
                }
                FrontendMessage::Sync => {
                    skipping = false;
                    let mut reply = Reply::new();
                    reply.ready_for_query();
                    Outcome::Answer(reply)
                }
                // Left over from a copy stream that the server ended (`PostgresMain` accepts but ignores them).
                FrontendMessage::CopyData(_) | FrontendMessage::CopyDone | FrontendMessage::CopyFail => continue,
                FrontendMessage::Authentication(_) => {
                    let reply = ErrorReply::fatal(sqlstate::PROTOCOL_VIOLATION, "unexpected authentication message");
                    return self.inbound.refuse(&mut self.writer, &reply).await;
                }
            };
            match outcome {
                Outcome::Answer(reply) => self.send(reply).await?,
                Outcome::SlotMade { slot, reply } => {
                    let reply = self.slot_made(&slot, reply).await;
                    self.send(reply).await?;
                }
                Outcome::Stream(start) => {
                    if !stream::run(self, start).await? {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    async fn send(&mut self, reply: Reply) -> Result<(), SessionError> {
        let (result, _) = self.writer.write_all(reply.into_bytes()).await;
        Ok(result?)
    }

    fn execute(&mut self, command: Result<Option<Command>, CommandError>) -> Outcome {
        let result = match command {
            Ok(Some(command)) => self.carry_out(command),
            Ok(None) => {
                let mut reply = Reply::new();
                reply.empty_query();
                Ok(Outcome::Answer(reply))
            }
            Err(error) => {
                let code = match &error {
                    CommandError::Syntax { .. } => sqlstate::SYNTAX_ERROR,
                    CommandError::Unsupported { .. } => sqlstate::FEATURE_NOT_SUPPORTED,
                    CommandError::SlotName(_) => sqlstate::INVALID_NAME,
                };
                Err(ErrorReply::error(code, error.to_string()))
            }
        };
        match result {
            Ok(Outcome::Answer(mut reply)) => {
                reply.ready_for_query();
                Outcome::Answer(reply)
            }
            Ok(Outcome::SlotMade { slot, mut reply }) => {
                reply.ready_for_query();
                Outcome::SlotMade { slot, reply }
            }
            Ok(Outcome::Stream(start)) => Outcome::Stream(start),
            Err(error) => {
                let mut reply = Reply::new();
                reply.error(&error).ready_for_query();
                Outcome::Answer(reply)
            }
        }
    }

    fn carry_out(&mut self, command: Command) -> Result<Outcome, ErrorReply> {
        let mut reply = Reply::new();
        match command {
            Command::IdentifySystem => {
                let readable = self.log.readable_lsn();
                let timeline = self.log.with_timelines(|all| timelines::current(all, readable));
                let row = [self.log.system().0.to_string(), timeline.0.to_string(), readable.to_string()];
                let [system, timeline, position] = row.each_ref().map(|text| Some(text.as_bytes()));
                reply
                    .row_description(&[
                        text("systemid"),
                        Column { name: "timeline", column_type: ColumnType::Int8 },
                        text("xlogpos"),
                        text("dbname"),
                    ])
                    .data_row(&[system, timeline, position, None])
                    .command_complete("IDENTIFY_SYSTEM");
            }
            Command::Show { name } => {
                let (name, value) = self.setting(&name).ok_or_else(|| {
                    let message = format!("unrecognized configuration parameter \"{name}\"");
                    ErrorReply::error(sqlstate::UNDEFINED_OBJECT, message)
                })?;
                reply.row_description(&[text(name)]).data_row(&[Some(value.as_bytes())]).command_complete("SHOW");
            }
            Command::TimelineHistory { timeline } => {
                let file_name = format!("{:08X}.history", timeline.0);
                let readable = self.log.readable_lsn();
                let contents = self.log.with_timelines(|all| {
                    let decided = timelines::decided(all, readable);
                    decided
                        .iter()
                        .find(|entry| entry.timeline == timeline && !entry.history_file.is_empty())
                        .map(|entry| entry.history_file.clone())
                });
                let contents = contents.ok_or_else(|| {
                    let message = format!("could not open file \"pg_wal/{file_name}\": No such file or directory");
                    ErrorReply::error(sqlstate::UNDEFINED_FILE, message)
                })?;
                reply
                    .row_description(&[text("filename"), Column { name: "content", column_type: ColumnType::Bytea }])
                    .data_row(&[Some(file_name.as_bytes()), Some(&contents)])
                    .command_complete("TIMELINE_HISTORY");
            }
            // WAL is reserved in any case: a slot that holds none would be a name only.
            Command::CreateSlot { slot, kind, reserve_wal: _ } => {
                self.create_slot(&slot, kind)?;
                reply
                    .row_description(&[
                        text("slot_name"),
                        text("consistent_point"),
                        text("snapshot_name"),
                        text("output_plugin"),
                    ])
                    .data_row(&[Some(slot.as_bytes()), Some(b"0/0"), None, None])
                    .command_complete("CREATE_REPLICATION_SLOT");
                return Ok(Outcome::SlotMade { slot, reply });
            }
            Command::ReadSlot { slot } => {
                let found = self.log.slot(&slot);
                let readable = self.log.readable_lsn();
                let position = found.map(|lsn| lsn.to_string());
                let timeline = found
                    .map(|lsn| self.log.with_timelines(|all| timelines::timeline_at(all, readable, lsn)).0.to_string());
                reply
                    .row_description(&[
                        text("slot_type"),
                        text("restart_lsn"),
                        Column { name: "restart_tli", column_type: ColumnType::Int8 },
                    ])
                    .data_row(&[
                        found.map(|_| &b"physical"[..]),
                        position.as_ref().map(String::as_bytes),
                        timeline.as_ref().map(String::as_bytes),
                    ])
                    .command_complete("READ_REPLICATION_SLOT");
            }
            Command::DropSlot { slot, wait: _ } => {
                let log = self.log.id();
                // A slot in use is not waited for: the one who uses it may stay for months.
                if self.followers.slots.borrow().is_in_use(log, &slot) {
                    return Err(slot_in_use(&slot));
                }
                if !self.log.remove_slot(&slot) {
                    return Err(no_slot(&slot));
                }
                self.followers.slots.borrow_mut().drop_slot(log, &slot);
                self.temporary_slots.retain(|name| *name != slot);
                reply.command_complete("DROP_REPLICATION_SLOT");
            }
            Command::StartReplication { slot, start_lsn, timeline } => {
                return self.start(slot, start_lsn, timeline).map(Outcome::Stream);
            }
        }
        Ok(Outcome::Answer(reply))
    }

    /// Settings that clients ask for: `pg_receivewal` and `pg_basebackup` (`streamutil.c`), drivers and people.
    fn setting(&self, name: &str) -> Option<(&'static str, String)> {
        let fixed = [
            ("server_version", SERVER_VERSION),
            ("server_version_num", SERVER_VERSION_NUM),
            ("server_encoding", "UTF8"),
            ("client_encoding", "UTF8"),
            ("data_directory_mode", "0700"),
            ("block_size", "8192"),
            ("wal_block_size", "8192"),
            ("integer_datetimes", "on"),
            ("in_hot_standby", "off"),
            ("transaction_read_only", "off"),
            ("default_transaction_read_only", "off"),
            ("wal_level", "replica"),
        ];
        if name == "wal_segment_size" {
            return Some(("wal_segment_size", size(self.log.segment_bytes())));
        }
        fixed.into_iter().find(|(known, _)| *known == name).map(|(known, value)| (known, value.to_owned()))
    }

    fn create_slot(&mut self, slot: &str, kind: SlotKind) -> Result<(), ErrorReply> {
        if self.log.slot(slot).is_some() {
            let message = format!("replication slot \"{slot}\" already exists");
            return Err(ErrorReply::error(sqlstate::DUPLICATE_OBJECT, message));
        }
        // Clients round down to the start of a segment.
        let segment_start = self.log.readable_lsn().floor(self.log.segment_bytes());
        let confirmed_lsn = segment_start.max(self.log.oldest_lsn());
        set_slot(&*self.log, slot, confirmed_lsn)?;
        self.followers.slots.borrow_mut().used(self.log.id(), slot, driver::now());
        if kind == SlotKind::Temporary {
            self.temporary_slots.push(slot.to_owned());
        }
        Ok(())
    }

    /// The reply to a new slot: it says so once a crash cannot take the slot back.
    async fn slot_made(&mut self, slot: &str, reply: Reply) -> Reply {
        let durable = driver::timeout(SLOT_LIMIT, self.log.slots_durable()).await;
        if durable == Some(true) {
            return reply;
        }
        self.log.remove_slot(slot);
        self.followers.slots.borrow_mut().drop_slot(self.log.id(), slot);
        self.temporary_slots.retain(|name| name != slot);
        let mut reply = Reply::new();
        let message = format!("could not write replication slot \"{slot}\": the disk failed or is full");
        reply.error(&ErrorReply::error(sqlstate::IO_ERROR, message)).ready_for_query();
        reply
    }

    fn drop_temporary_slots(&mut self) {
        for slot in self.temporary_slots.drain(..) {
            self.log.remove_slot(&slot);
            self.followers.slots.borrow_mut().drop_slot(self.log.id(), &slot);
        }
    }

    /// Checks that the stream can begin (`StartReplication` in `walsender.c`, whose words these are).
    fn start(
        &mut self,
        slot: Option<String>,
        begin_lsn: Lsn,
        timeline: Option<PgTimeline>,
    ) -> Result<Start, ErrorReply> {
        let (readable, oldest) = (self.log.readable_lsn(), self.log.oldest_lsn());
        let not_ready = |message: String| ErrorReply::error(sqlstate::OBJECT_NOT_IN_PREREQUISITE_STATE, message);
        let (timeline, found) = self.log.with_timelines(|all| {
            let timeline = timeline.unwrap_or_else(|| timelines::current(all, readable));
            (timeline, timelines::find(all, readable, timeline))
        });
        match found {
            Found::Unknown => {
                return Err(not_ready(format!("requested timeline {} is not in this server's history", timeline.0)));
            }
            Found::Historic(switch) if switch.end_lsn < begin_lsn => {
                let message = format!(
                    "requested starting point {begin_lsn} on timeline {} is not in this server's history",
                    timeline.0
                );
                let detail =
                    format!("This server's history forked from timeline {} at {}.", timeline.0, switch.end_lsn);
                return Err(not_ready(message).with_detail(detail));
            }
            Found::Historic(_) => {}
            Found::Current if begin_lsn > readable => {
                return Err(not_ready(format!(
                    "requested starting point {begin_lsn} is ahead of the WAL flush position of this server {readable}"
                )));
            }
            Found::Current => {}
        }
        if begin_lsn < oldest {
            let message = format!("requested WAL from {begin_lsn} has already been removed");
            let detail = format!("This safekeeper holds it from {oldest} on.");
            return Err(ErrorReply::error(sqlstate::UNDEFINED_FILE, message).with_detail(detail));
        }
        if let Some(slot) = &slot {
            self.acquire_slot(slot, begin_lsn)?;
        }
        Ok(Start { slot, begin_lsn, timeline })
    }

    /// Takes a slot for the stream. One that is not there is created: a follower that moves to another safekeeper of the
    /// log brings its slot's name with it.
    fn acquire_slot(&mut self, slot: &str, begin_lsn: Lsn) -> Result<(), ErrorReply> {
        let log = self.log.id();
        let acquired = self.followers.slots.borrow_mut().acquire(log, slot, self.number, driver::now());
        acquired.map_err(|_| slot_in_use(slot))?;
        let held = self.log.slot(slot).unwrap_or(begin_lsn);
        // Also back: what the follower is about to read must stay.
        set_slot(&*self.log, slot, held.min(begin_lsn)).inspect_err(|_| self.release_slot(slot))
    }

    pub(super) fn release_slot(&self, slot: &str) {
        self.followers.slots.borrow_mut().release(self.log.id(), slot, self.number, driver::now());
    }
}

fn text(name: &'static str) -> Column {
    Column { name, column_type: ColumnType::Text }
}

fn set_slot<L: FollowedLog>(log: &L, slot: &str, confirmed_lsn: Lsn) -> Result<(), ErrorReply> {
    if log.set_slot(slot, confirmed_lsn) {
        return Ok(());
    }
    Err(too_many_slots(log.id()))
}

fn too_many_slots(log: LogId) -> ErrorReply {
    let message = format!("log {log} has as many replication slots as it can have");
    ErrorReply::error(sqlstate::CONFIGURATION_LIMIT_EXCEEDED, message)
}

fn slot_in_use(slot: &str) -> ErrorReply {
    ErrorReply::error(sqlstate::OBJECT_IN_USE, format!("replication slot \"{slot}\" is active for another connection"))
}

fn no_slot(slot: &str) -> ErrorReply {
    ErrorReply::error(sqlstate::UNDEFINED_OBJECT, format!("replication slot \"{slot}\" does not exist"))
}

/// Bytes as PostgreSQL shows settings with a unit: `16MB`, `1GB`.
fn size(bytes: u64) -> String {
    if bytes.is_multiple_of(1 << 30) { format!("{}GB", bytes >> 30) } else { format!("{}MB", bytes >> 20) }
}
