//! The trace of a run, as a hash and, if asked for, as text.

use std::{
    fmt::Debug,
    hash::{Hash, Hasher},
};

use crate::event::{Event, Time};

/// A small, fast hash (multiply and rotate) that is the same on every machine and in every process.
pub struct TraceHasher(u64);

impl Hasher for TraceHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x517C_C1B7_2722_0A95);
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(u64::from(word));
    }

    fn write_u8(&mut self, word: u8) {
        self.write_u64(u64::from(word));
    }

    fn write_usize(&mut self, word: usize) {
        self.write_u64(word as u64);
    }
}

/// What has happened so far.
pub struct Trace {
    hasher: TraceHasher,
    print: bool,
}

impl Trace {
    /// `print`: tell every event on standard output.
    pub fn new(print: bool) -> Trace {
        Trace { hasher: TraceHasher(0xCBF2_9CE4_8422_2325), print }
    }

    /// An event that is about to be handled.
    pub fn event(&mut self, at: Time, event: &Event) {
        self.hasher.write_u64(at);
        let (kind, number) = match *event {
            Event::Deliver { connection, to_server } => (1, connection as u64 * 2 + u64::from(to_server)),
            Event::ConnectArrives { connection } => (2, connection as u64),
            Event::Closed { connection, at_server } => (3, connection as u64 * 2 + u64::from(at_server)),
            Event::DiskDone { safekeeper, op, .. } => (4, op << 8 | safekeeper as u64),
            Event::LogTimer { safekeeper, .. } => (5, safekeeper as u64),
            Event::Start { safekeeper } => (6, safekeeper as u64),
            Event::ProposerTimer { writer } => (7, writer as u64),
            Event::Work { writer } => (8, writer as u64),
            Event::Operate => (9, 0),
            Event::FenceArrives { safekeeper, term, .. } => (10, term.0 << 8 | safekeeper as u64),
            Event::FenceAnswered { safekeeper, term } => (11, term.0 << 8 | safekeeper as u64),
            Event::MembershipArrives { safekeeper, generation } => (12, u64::from(generation) << 8 | safekeeper as u64),
            Event::MembershipAnswered { safekeeper, generation, .. } => {
                (13, u64::from(generation) << 8 | safekeeper as u64)
            }
            Event::AskArrives { from, to, .. } => (14, (from as u64) << 8 | to as u64),
            Event::AskAnswered { safekeeper, .. } => (15, safekeeper as u64),
            Event::FetchArrives { safekeeper, task, .. } => (16, task << 8 | safekeeper as u64),
            Event::FetchAnswered { safekeeper, task, .. } => (17, task << 8 | safekeeper as u64),
            Event::Follow { follower } => (18, follower as u64),
            Event::Fault => (19, 0),
            Event::Heal => (20, 0),
            Event::Deadline => (21, 0),
        };
        self.hasher.write_u64(kind << 56 | number);
        if self.print {
            println!("{:>14.6} {event:?}", at as f64 / 1e6);
        }
    }

    /// Something worth knowing; part of the hash as its text is.
    pub fn note(&mut self, what: &str, value: impl Hash + Debug) {
        value.hash(&mut self.hasher);
        if self.print {
            println!("{:>16} {what} {value:?}", "");
        }
    }

    /// Whether text is wanted.
    pub fn prints(&self) -> bool {
        self.print
    }

    /// To add to the hash.
    pub fn hasher(&mut self) -> &mut TraceHasher {
        &mut self.hasher
    }

    /// The hash so far.
    pub fn hash(&self) -> u64 {
        self.hasher.finish()
    }
}
