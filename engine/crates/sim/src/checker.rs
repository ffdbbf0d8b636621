//! What must never happen: the properties of the architecture, checked against everything that the world did.
//!
//! Knows everything at once, which no part of the real system does: each byte that any ballot proposed, each commit that
//! was reported to a client, each read that was answered.

use std::collections::BTreeMap;

use consensus::TermHistory;
use pgtypes::{Ballot, FrameSummary, Lsn, Term, WriterId};

/// What one ballot appended to the log.
#[derive(Default)]
pub struct Proposal {
    /// Where it began.
    pub start: FrameSummary,
    /// Everything from there on.
    pub bytes: Vec<u8>,
    /// Ends of its records, rising.
    pub ends: Vec<Lsn>,
}

/// An election that was decided.
#[derive(Clone, Debug)]
struct Decided {
    writer: usize,
    start: Lsn,
    commit_lsn: Lsn,
}

/// A rule that was broken: the run ends with it.
pub type Broken = Result<(), String>;

/// See the module.
pub struct Checker {
    log_start: Lsn,
    /// By the ballot that wrote.
    pub proposals: BTreeMap<Ballot, Proposal>,
    decided: BTreeMap<Ballot, Decided>,
    /// The committed log from `log_start` on.
    ledger: Vec<u8>,
    /// Ends of its records, rising, with the start first.
    ledger_ends: Vec<Lsn>,
    /// Who reported commits in a term.
    writers: BTreeMap<Term, WriterId>,
    /// A majority was fenced to the term when no safekeeper had received more.
    fences: Vec<(Term, Lsn)>,
    /// The highest ballot that acknowledged a commit of its own to a client.
    acknowledged_by: Ballot,
    /// Commits acknowledged to clients.
    pub acknowledged: u64,
    /// Reads answered under a lease.
    pub reads: u64,
    /// Elections decided.
    pub elections: u64,
    /// Bytes that followers read and compared.
    pub followed_bytes: u64,
}

impl Checker {
    /// For a log that begins at `log_start`.
    pub fn new(log_start: Lsn) -> Checker {
        Checker {
            log_start,
            proposals: BTreeMap::new(),
            decided: BTreeMap::new(),
            ledger: Vec::new(),
            ledger_ends: vec![log_start],
            writers: BTreeMap::new(),
            fences: Vec::new(),
            acknowledged_by: Ballot::default(),
            acknowledged: 0,
            reads: 0,
            elections: 0,
            followed_bytes: 0,
        }
    }

    /// End of what was ever reported as committed.
    pub fn committed(&self) -> Lsn {
        self.log_start.advance(self.ledger.len() as u64)
    }

    fn ledger(&self, begin: Lsn, end: Lsn) -> &[u8] {
        &self.ledger[begin.bytes_since(self.log_start) as usize..end.bytes_since(self.log_start) as usize]
    }

    /// The bytes `[begin, end)` of the log of `history`, ballot by ballot.
    pub fn content(&self, history: &TermHistory, begin: Lsn, end: Lsn) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::with_capacity(end.bytes_since(begin) as usize);
        for (i, entry) in history.0.iter().enumerate() {
            let until = history.0.get(i + 1).map_or(end, |next| next.start_lsn).min(end);
            let from = entry.start_lsn.max(begin);
            if from >= until {
                continue;
            }
            let proposal = self.proposals.get(&entry.ballot);
            let part = proposal.and_then(|proposal| {
                let at = |lsn: Lsn| lsn.bytes_since(proposal.start.record_end) as usize;
                proposal.bytes.get(at(from)..at(until)).filter(|_| from >= proposal.start.record_end)
            });
            let part = part.ok_or_else(|| format!("ballot {} never proposed [{from}, {until})", entry.ballot))?;
            bytes.extend_from_slice(part);
        }
        match bytes.len() as u64 == end.bytes_since(begin) {
            true => Ok(bytes),
            false => Err(format!("the history {history:?} does not cover [{begin}, {end})")),
        }
    }

    fn is_record_end(&self, history: &TermHistory, lsn: Lsn) -> bool {
        lsn == self.log_start
            || history.0.iter().any(|entry| {
                let proposal = self.proposals.get(&entry.ballot);
                proposal.is_some_and(|p| p.start.record_end == lsn || p.ends.binary_search(&lsn).is_ok())
            })
    }

    /// Everything up to `end` of the log of `history` is committed for good.
    fn extend(&mut self, history: &TermHistory, end: Lsn) -> Broken {
        let old = self.committed();
        if end <= old {
            return Ok(());
        }
        let bytes = self.content(history, old, end)?;
        self.ledger.extend_from_slice(&bytes);
        for entry in &history.0 {
            if let Some(proposal) = self.proposals.get(&entry.ballot) {
                let last = *self.ledger_ends.last().unwrap_or(&self.log_start);
                let first = proposal.ends.partition_point(|e| *e <= last);
                let next = history.0.iter().find(|other| other.start_lsn > entry.start_lsn);
                let limit = next.map_or(end, |next| next.start_lsn.min(end));
                let ends = proposal.ends[first..].iter().take_while(|e| **e <= limit);
                self.ledger_ends.extend(ends.copied());
            }
        }
        Ok(())
    }

    /// `writer` reports that its election was decided: the log up to `start` is committed.
    pub fn elected(&mut self, writer: usize, ballot: Ballot, start: FrameSummary, history: &TermHistory) -> Broken {
        let start_lsn = start.record_end;
        self.elections += 1;
        if let Some(other) = self.decided.get(&ballot) {
            return Err(format!("ballot {ballot} was won twice, by writer {} and writer {writer}", other.writer));
        }
        if !self.is_record_end(history, start_lsn) {
            return Err(format!("the log of ballot {ballot} begins at {start_lsn}, which is no end of a record"));
        }
        for (other, decided) in &self.decided {
            if *other < ballot && start_lsn < decided.commit_lsn {
                return Err(format!(
                    "lost commit: ballot {other} committed up to {}, ballot {ballot} begins at {start_lsn}",
                    decided.commit_lsn
                ));
            }
            if *other > ballot && start_lsn > decided.start {
                return Err(format!(
                    "ballot {ballot} commits {start_lsn} after ballot {other} began at {}",
                    decided.start
                ));
            }
        }
        let both = start_lsn.min(self.committed());
        if self.content(history, self.log_start, both)? != self.ledger(self.log_start, both) {
            return Err(format!("the log of ballot {ballot} differs from the committed one below {both}"));
        }
        self.extend(history, start_lsn)?;
        self.decided.insert(ballot, Decided { writer, start: start_lsn, commit_lsn: start_lsn });
        Ok(())
    }

    /// The writer of `ballot` reports a commit.
    pub fn committed_by(&mut self, ballot: Ballot, writer: WriterId, history: &TermHistory, lsn: Lsn) -> Broken {
        if *self.writers.entry(ballot.term).or_insert(writer) != writer {
            return Err(format!("two writers report commits in term {}", ballot.term.0));
        }
        if !self.is_record_end(history, lsn) {
            return Err(format!("ballot {ballot} commits {lsn}, which is no end of a record"));
        }
        for (other, decided) in self.decided.range(ballot..) {
            if *other > ballot && lsn > decided.start {
                return Err(format!("ballot {ballot} commits {lsn} after ballot {other} began at {}", decided.start));
            }
        }
        for &(term, bound) in &self.fences {
            if ballot.term < term && lsn > bound {
                return Err(format!("fenced: ballot {ballot} commits {lsn}, term {} was fenced at {bound}", term.0));
            }
        }
        if let Some(decided) = self.decided.get_mut(&ballot) {
            decided.commit_lsn = decided.commit_lsn.max(lsn);
        }
        self.extend(history, lsn)
    }

    /// A client of the writer of `ballot` is told that its commit is durable.
    pub fn acknowledge(&mut self, ballot: Ballot) {
        self.acknowledged += 1;
        self.acknowledged_by = self.acknowledged_by.max(ballot);
    }

    /// A client of the writer of `ballot` is answered a read, under the lease.
    pub fn read(&mut self, ballot: Ballot) -> Broken {
        self.reads += 1;
        match self.acknowledged_by > ballot {
            true => Err(format!(
                "stale read: ballot {ballot} answers although ballot {} acknowledged a commit",
                self.acknowledged_by
            )),
            false => Ok(()),
        }
    }

    /// A majority is fenced to `term`, and no safekeeper has received WAL beyond `received`.
    pub fn fenced(&mut self, term: Term, received: Lsn) {
        self.fences.push((term, received));
    }

    /// A follower was given `bytes` at `begin` as committed. `end_is_position`: the safekeeper offered no more.
    pub fn followed(&mut self, begin: Lsn, bytes: &[u8], end_is_position: bool) -> Broken {
        let end = begin.advance(bytes.len() as u64);
        self.followed_bytes += bytes.len() as u64;
        if end > self.committed() {
            return Err(format!("served [{begin}, {end}), but only {} is committed", self.committed()));
        }
        if end_is_position && self.ledger_ends.binary_search(&end).is_err() {
            return Err(format!("served up to {end}, which is no end of a record"));
        }
        match bytes == self.ledger(begin, end) {
            true => Ok(()),
            false => {
                let differs = bytes.iter().zip(self.ledger(begin, end)).position(|(a, b)| a != b).unwrap_or(0);
                Err(format!("logs differ at {}", begin.advance(differs as u64)))
            }
        }
    }
}
