//! `append-load`: a proposer without PostgreSQL, for the benchmark of one safekeeper's append path (P1).
//!
//! Elects itself on one safekeeper, keeps a fixed number of appends of a fixed size outstanding until a fixed amount of
//! made-up but valid WAL is acknowledged, and prints one line of JSON. The WAL is laid out before the clock starts. It
//! knows nothing about quorums: the log under test has one member.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    error::Error,
    path::PathBuf,
    rc::Rc,
    time::Duration,
};

use clap::Parser;
use consensus::{
    TermEntry, TermHistory,
    message::{AcceptorMessage, AcceptorStatus, Append, Elected, ProposerMessage, Vote, Voted},
};
use driver::{Connection, Event, Reader, Writer};
use identity::{Tls, TlsFiles};
use pgtypes::{Attempt, Ballot, Incarnation, LogId, Lsn, PgTimeline, SystemId, Term, WriterId};
use wal::{RecordSpec, WalWriter, main_data};
use wire::append::{FrameReader, Hello, Message, Purpose, decode, encode_to_vec};

/// Nobody answers for so long: the run has failed.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// This part of the run is not counted, so that first segments and caches are not measured.
const WARM_UP_PERCENT: u64 = 10;

/// Measures durable appends to one safekeeper whose log has this safekeeper as its only member.
#[derive(Parser)]
struct Arguments {
    /// `host:port` of the append protocol.
    #[arg(long)]
    address: String,
    /// `cluster/branch`.
    #[arg(long)]
    log: LogId,
    /// `system_identifier` of the log.
    #[arg(long)]
    system_id: u64,
    /// PostgreSQL's WAL segment size of the log, bytes.
    #[arg(long, default_value_t = 64 << 20)]
    segment_bytes: u64,
    /// The term, which was granted to `writer` by a fence before.
    #[arg(long)]
    term: u64,
    /// The writer of that term.
    #[arg(long)]
    writer: WriterId,
    /// Bytes of WAL in one append.
    #[arg(long, default_value_t = 65536)]
    append_bytes: usize,
    /// Appends sent and not yet acknowledged.
    #[arg(long, default_value_t = 32)]
    outstanding: usize,
    /// MiB of WAL in all.
    #[arg(long, default_value_t = 1024)]
    total_mib: u64,
    /// Bytes of data in one WAL record.
    #[arg(long, default_value_t = 250)]
    record_bytes: usize,
    /// Directory of `ca.pem`, `NAME.pem` and `NAME.key`; without it the connection is plain TCP.
    #[arg(long, requires = "tls_name")]
    tls_dir: Option<PathBuf>,
    /// NAME in `--tls-dir`.
    #[arg(long)]
    tls_name: Option<String>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    driver::run_core(run(arguments))?
}

async fn run(arguments: Arguments) -> Result<(), Box<dyn Error>> {
    let mut connection = driver::connect(&arguments.address, ANSWER_LIMIT).await?;
    if let (Some(dir), Some(name)) = (&arguments.tls_dir, &arguments.tls_name) {
        let tls = Tls::load(TlsFiles {
            ca: dir.join("ca.pem"),
            certificate: dir.join(format!("{name}.pem")),
            key: dir.join(format!("{name}.key")),
        })?;
        let host = arguments.address.rsplit_once(':').map_or(arguments.address.as_str(), |(host, _)| host);
        connection = connection.upgrade_client(tls.client_config(), host).await?;
    }
    let mut proposer = Session::open(connection, &arguments).await?;
    let (ballot, begin) = proposer.elect(&arguments).await?;
    let appends = lay_out(&arguments, begin);
    let measured = proposer.append_all(appends, ballot, arguments.outstanding).await?;
    println!("{}", measured.to_json(&arguments));
    Ok(())
}

/// Makes the WAL from `begin` on, cut into appends.
fn lay_out(arguments: &Arguments, begin: Begin) -> VecDeque<(Append, Vec<u8>)> {
    let mut writer = WalWriter::new(
        begin.lsn,
        begin.last_record,
        arguments.segment_bytes,
        SystemId(arguments.system_id),
        begin.timeline,
    );
    let payload = main_data(&vec![0xA5; arguments.record_bytes]);
    // A logical message: no page, no transaction, any length (`RM_LOGICALMSG_ID`).
    let record = RecordSpec { rmgr: 21, info: 0, xid: 0, payload: &payload };
    let mut appends = VecDeque::new();
    let mut rest: Vec<u8> = Vec::new();
    let mut lsn = begin.lsn;
    let end = begin.lsn.advance(arguments.total_mib << 20);
    while lsn < end {
        while rest.len() < arguments.append_bytes {
            writer.append(record);
            rest.append(&mut writer.take_bytes());
        }
        let later = rest.split_off(arguments.append_bytes);
        let bytes = std::mem::replace(&mut rest, later);
        let header = Append {
            ballot: Ballot::default(),
            generation: begin.generation,
            sequence: appends.len() as u64 + 1,
            begin_lsn: lsn,
            end_lsn: lsn.advance(bytes.len() as u64),
            commit_lsn: Lsn::INVALID,
            timeline: None,
        };
        lsn = header.end_lsn;
        appends.push_back((header, bytes));
    }
    appends
}

/// Where the log ends, and what a continuation needs to know.
struct Begin {
    lsn: Lsn,
    last_record: Lsn,
    timeline: PgTimeline,
    generation: pgtypes::Generation,
}

/// A proposer's connection.
struct Session {
    reader: Reader,
    writer: Writer,
    frames: FrameReader,
    status: AcceptorStatus,
}

/// What went wrong, in words.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Unexpected(String);

impl Session {
    async fn open(connection: Connection, arguments: &Arguments) -> Result<Session, Box<dyn Error>> {
        let (reader, writer) = connection.into_split();
        let mut frames = FrameReader::new();
        let (mut reader, mut writer) = (reader, writer);
        let hello = Hello { log: arguments.log, system_id: SystemId(arguments.system_id), purpose: Purpose::Propose };
        writer.write_all(encode_to_vec(&Message::Hello(hello))?).await.0?;
        let AcceptorMessage::Status(status) = receive(&mut reader, &mut frames).await? else {
            return Err(Unexpected("the first answer is no status".into()).into());
        };
        Ok(Session { reader, writer, frames, status })
    }

    async fn ask(&mut self, message: ProposerMessage) -> Result<AcceptorMessage, Box<dyn Error>> {
        self.writer.write_all(encode_to_vec(&Message::Proposer(message, &[]))?).await.0?;
        receive(&mut self.reader, &mut self.frames).await
    }

    /// Vote and election on this one acceptor.
    async fn elect(&mut self, arguments: &Arguments) -> Result<(Ballot, Begin), Box<dyn Error>> {
        let term = Term(arguments.term);
        let seen = if self.status.ballot.term == term { self.status.ballot.attempt.0 } else { 0 };
        let ballot = Ballot { term, attempt: Attempt(seen + 1) };
        let incarnation = Incarnation(*uuid::Uuid::new_v4().as_bytes());
        let configuration = self.status.configuration.clone();
        let generation = configuration.generation;
        let vote = Vote { ballot, writer: arguments.writer, incarnation, configuration };
        let Voted { flush, history, timelines, commit_lsn, .. } = match self.ask(ProposerMessage::Vote(vote)).await? {
            AcceptorMessage::Voted(voted) => voted,
            other => return Err(Unexpected(format!("no vote: {other:?}")).into()),
        };
        let mut entries = history.0;
        entries.push(TermEntry { ballot, start_lsn: flush.record_end });
        let elected = Elected {
            ballot,
            incarnation,
            generation,
            start: flush,
            history: TermHistory(entries),
            timelines,
            commit_lsn,
        };
        match self.ask(ProposerMessage::Elected(elected)).await? {
            AcceptorMessage::ElectedAccepted(accepted) if accepted.flush_lsn == flush.record_end => {}
            other => return Err(Unexpected(format!("election not accepted: {other:?}")).into()),
        }
        let begin =
            Begin { lsn: flush.record_end, last_record: flush.record_start, timeline: flush.timeline, generation };
        Ok((ballot, begin))
    }

    async fn append_all(
        self,
        mut appends: VecDeque<(Append, Vec<u8>)>,
        ballot: Ballot,
        outstanding: usize,
    ) -> Result<Measured, Box<dyn Error>> {
        let Session { mut reader, mut writer, mut frames, .. } = self;
        let total = appends.len() as u64;
        let append_bytes = appends.front().map_or(0, |(_, bytes)| bytes.len()) as u64;
        let warm_up = total * WARM_UP_PERCENT / 100;
        let in_flight: Rc<RefCell<VecDeque<(Lsn, pgtypes::Instant)>>> = Rc::default();
        let (room, durable) = (Rc::new(Event::new()), Rc::new(Cell::new(Lsn::INVALID)));

        let sender = driver::spawn({
            let (in_flight, room, durable) = (in_flight.clone(), room.clone(), durable.clone());
            async move {
                while !appends.is_empty() {
                    let free = room
                        .until(|| {
                            Some(outstanding - in_flight.borrow().len().min(outstanding)).filter(|free| *free > 0)
                        })
                        .await;
                    let mut buffers = Vec::with_capacity(2 * free);
                    for (mut header, bytes) in appends.drain(..free.min(appends.len())) {
                        header.ballot = ballot;
                        header.commit_lsn = durable.get();
                        in_flight.borrow_mut().push_back((header.end_lsn, driver::now()));
                        let mut frame = encode_to_vec(&Message::Proposer(ProposerMessage::Append(header), &bytes))
                            .map_err(|error| std::io::Error::other(error.to_string()))?;
                        // The frame's WAL is the last part: send the bytes that exist already.
                        frame.truncate(frame.len() - bytes.len());
                        buffers.push(frame);
                        buffers.push(bytes);
                    }
                    writer.write_vectored(buffers).await.0?;
                }
                Ok::<(), std::io::Error>(())
            }
        });

        let mut done = 0;
        let mut latencies = Vec::with_capacity(total as usize);
        let mut started = driver::now();
        // The last append may end inside a record, which is never durable by itself.
        while done < total {
            let AcceptorMessage::Appended(appended) = receive(&mut reader, &mut frames).await? else {
                return Err(Unexpected("append refused".into()).into());
            };
            let now = driver::now();
            durable.set(appended.flush_lsn);
            let mut in_flight = in_flight.borrow_mut();
            while in_flight.front().is_some_and(|(end, _)| *end <= appended.durable_lsn) {
                if let Some((_, sent)) = in_flight.pop_front() {
                    done += 1;
                    if done == warm_up {
                        started = now;
                    }
                    if done > warm_up {
                        latencies.push(now.since(sent).as_nanos() as u64);
                    }
                }
            }
            drop(in_flight);
            room.set();
        }
        let elapsed = driver::now().since(started);
        sender.await?;
        latencies.sort_unstable();
        Ok(Measured { bytes: (total - warm_up) * append_bytes, elapsed, latencies })
    }
}

async fn receive(reader: &mut Reader, frames: &mut FrameReader) -> Result<AcceptorMessage, Box<dyn Error>> {
    loop {
        if let Some(frame) = frames.next()? {
            match decode(frame)? {
                Message::Acceptor(message) => return Ok(message),
                other => return Err(Unexpected(format!("unexpected answer: {other:?}")).into()),
            }
        }
        let (result, buffer) = reader.read(frames.take_buffer(false)).await;
        frames.return_buffer(buffer);
        if result? == 0 {
            return Err(Unexpected("the safekeeper closed the connection".into()).into());
        }
    }
}

/// The figures of a run.
struct Measured {
    bytes: u64,
    elapsed: Duration,
    latencies: Vec<u64>,
}

impl Measured {
    fn to_json(&self, arguments: &Arguments) -> serde_json::Value {
        let quantile = |part: f64| {
            let index = ((self.latencies.len() as f64 * part) as usize).min(self.latencies.len().saturating_sub(1));
            self.latencies.get(index).map_or(0.0, |nanoseconds| *nanoseconds as f64 / 1e3)
        };
        serde_json::json!({
            "bytes": self.bytes,
            "seconds": self.elapsed.as_secs_f64(),
            "mb_per_second": self.bytes as f64 / 1e6 / self.elapsed.as_secs_f64(),
            "appends_per_second": self.latencies.len() as f64 / self.elapsed.as_secs_f64(),
            "p50_us": quantile(0.5),
            "p99_us": quantile(0.99),
            "append_bytes": arguments.append_bytes,
            "outstanding": arguments.outstanding,
            "record_bytes": arguments.record_bytes,
        })
    }
}
