//! The operator: decides who writes and who is a member, and never needs to be right about who is alive.

use consensus::{Configuration, Grant, Member};
use pgtypes::{Generation, MemberId, Term, WriterId};

use crate::{
    checker::Broken,
    event::{Event, MILLISECOND, Node},
    world::{LOG_START, Phase, World},
};

/// A fence that is on its way to a majority.
struct Fencing {
    term: Term,
    writer: WriterId,
    /// Where the writer will run.
    host: Node,
    answered: Vec<MemberId>,
}

/// A change of the membership that is on its way.
struct Change {
    /// What is asked for at present: joint, then final.
    next: Configuration,
    /// Who has it.
    accepted: Vec<MemberId>,
}

/// See the module.
pub struct Operator {
    /// As far as it knows.
    pub configuration: Configuration,
    term: Term,
    grant: Option<Grant>,
    fencing: Option<Fencing>,
    change: Option<Change>,
    writers: u32,
    /// Looks that the writer was found dead.
    dead_for: u32,
}

impl Operator {
    /// Of a log that was just created.
    pub fn new(configuration: Configuration) -> Operator {
        Operator { configuration, term: Term(0), grant: None, fencing: None, change: None, writers: 0, dead_for: 0 }
    }

    /// A change of writer or membership is under way.
    pub fn is_busy(&self) -> bool {
        self.fencing.is_some() || self.change.is_some()
    }

    /// For a report.
    pub fn describe(&self) -> String {
        let change = self.change.as_ref().map(|change| (change.next.generation.0, &change.accepted));
        let fencing = self.fencing.as_ref().map(|fencing| (fencing.term.0, &fencing.answered));
        format!("term {} fencing {fencing:?} change {change:?}", self.term.0)
    }
}

impl World {
    /// The operator wants another writer. Whoever writes now is not asked.
    pub(crate) fn change_writer(&mut self) {
        let operator = &mut self.operator;
        operator.term = Term(operator.term.0 + 1);
        operator.writers += 1;
        let host = World::writer_host(operator.writers);
        let writer = WriterId(self.random.id());
        self.trace.note("operator wants another writer in term", operator.term.0);
        operator.fencing = Some(Fencing { term: operator.term, writer, host, answered: Vec::new() });
        operator.grant = None;
    }

    pub(crate) fn operate(&mut self) -> Broken {
        let wait = self.random.range(60 * MILLISECOND, 200 * MILLISECOND);
        self.schedule.at(self.now + wait, Event::Operate);
        self.network.sweep(self.now);
        for index in 0..self.safekeepers.len() {
            // Somebody notices that a disk failed.
            if self.safekeepers[index].is_failed() && self.random.chance(30) {
                self.kill_safekeeper(index);
                self.schedule.at(self.now + 5 * MILLISECOND, Event::Start { safekeeper: index });
            }
        }
        if self.operator.grant.is_none() && self.operator.fencing.is_none() {
            self.change_writer();
        }
        if let Some(change) = &self.operator.change {
            let (generation, accepted) = (change.next.generation.0, change.accepted.clone());
            let members: Vec<Member> = change.next.all_members().cloned().collect();
            for member in members.iter().filter(|member| !accepted.contains(&member.member)) {
                if let Some(index) = self.at_address(&member.address)
                    && !self.is_cut(World::OPERATOR, index as Node)
                {
                    let wait = self.latency(World::OPERATOR, index as Node);
                    let event = Event::MembershipArrives { safekeeper: index, generation };
                    self.schedule.at(self.now + wait, event);
                }
            }
        }
        let fence = match (&self.operator.fencing, self.operator.grant) {
            (Some(fencing), _) => Some((fencing.term, fencing.writer, fencing.answered.clone())),
            // What is wanted is said again from time to time, whoever has heard it.
            (None, Some(grant)) if self.random.chance(15) => Some((grant.term, grant.writer, Vec::new())),
            _ => None,
        };
        if let Some((term, writer, answered)) = fence {
            let members: Vec<Member> = self.operator.configuration.all_members().cloned().collect();
            for member in members.iter().filter(|member| !answered.contains(&member.member)) {
                if let Some(index) = self.at_address(&member.address)
                    && !self.is_cut(World::OPERATOR, index as Node)
                {
                    let wait = self.latency(World::OPERATOR, index as Node);
                    self.schedule.at(self.now + wait, Event::FenceArrives { safekeeper: index, term, writer });
                }
            }
        }
        self.look_after_writer()
    }

    /// Starts the writer of the term again when it is dead, or, at times, another one.
    fn look_after_writer(&mut self) -> Broken {
        let Some(grant) = self.operator.grant else { return Ok(()) };
        let alive = self.writers.iter().position(|writer| writer.grant == grant && writer.is_running());
        if let Some(running) = alive {
            self.end_outvoted_run(running, grant);
            self.operator.dead_for = 0;
            return Ok(());
        }
        self.operator.dead_for += 1;
        if self.operator.dead_for < 2 && !matches!(self.phase, Phase::Healing { .. }) {
            return Ok(());
        }
        self.operator.dead_for = 0;
        let lost = self.writers.iter().any(|writer| writer.grant == grant && writer.fenced);
        if lost || self.random.chance(40) {
            self.change_writer();
            return Ok(());
        }
        let host = self.writers.iter().rev().find(|writer| writer.grant == grant).map_or(World::OPERATOR, |w| w.host);
        let configuration = self.operator.configuration.clone();
        self.start_writer(host, grant, configuration)
    }

    /// A run that died may have raised the attempt at a minority that the present run did not hear before it chose its
    /// own; those safekeepers cannot follow it. When all else is well, the writer is started again to get them back.
    fn end_outvoted_run(&mut self, running: usize, grant: Grant) {
        let Some(ballot) = self.writers[running].ballot() else { return };
        let outvoted = self.safekeepers.iter().filter_map(|safekeeper| safekeeper.process.as_ref()).any(|process| {
            let theirs = process.log.acceptor().state().ballot;
            theirs.term == grant.term && theirs > ballot
        });
        if outvoted && matches!(self.phase, Phase::Healing { .. }) && self.random.chance(10) {
            self.trace.note("operator ends a run that was outvoted at a minority: writer", running);
            self.kill_writer(running);
        }
    }

    pub(crate) fn fence_arrives(&mut self, index: usize, term: Term, writer: WriterId) -> Broken {
        let now = self.clock(index as Node);
        let Some(process) = &mut self.safekeepers[index].process else { return Ok(()) };
        process.log.handle_fence(term.0, term, writer, now);
        self.drive(index)
    }

    pub(crate) fn fence_answered(&mut self, index: usize, term: Term) -> Broken {
        let received = self.safekeepers.iter().filter_map(|safekeeper| safekeeper.process.as_ref());
        let received = received.map(|process| process.log.acceptor().receive_lsn()).max().unwrap_or(LOG_START);
        let member = self.safekeepers[index].member;
        let operator = &mut self.operator;
        let Some(fencing) = operator.fencing.as_mut().filter(|fencing| fencing.term == term) else { return Ok(()) };
        if !fencing.answered.contains(&member) {
            fencing.answered.push(member);
        }
        let answered = &fencing.answered;
        if !operator.configuration.is_quorum(|member| answered.contains(&member.member)) {
            return Ok(());
        }
        let grant = Grant { term, writer: fencing.writer };
        let host = fencing.host;
        operator.fencing = None;
        operator.grant = Some(grant);
        operator.dead_for = 0;
        let configuration = operator.configuration.clone();
        // Safekeepers that are down may come back with more than is known here, so only what was reported by then counts.
        let all_up = self.safekeepers.iter().all(|safekeeper| safekeeper.process.is_some());
        if all_up && !self.plan.replaced {
            self.checker.fenced(term, received.max(self.checker.committed()));
        }
        self.start_writer(host, grant, configuration)
    }

    // ---- membership ----

    /// Begins to put the disk that is now in safekeeper `index` in the place of the one that was.
    pub(crate) fn change_membership(&mut self, index: usize, old: MemberId) {
        let safekeeper = &self.safekeepers[index];
        let new = Member { member: safekeeper.member, disk: safekeeper.disk_id, address: format!("sk-{index}") };
        let configuration = &self.operator.configuration;
        let mut members: Vec<Member> = configuration.members.iter().filter(|m| m.member != old).cloned().collect();
        members.push(new);
        let next = Configuration {
            generation: Generation(configuration.generation.0 + 1),
            members: configuration.members.clone(),
            new_members: Some(members),
        };
        self.trace.note("operator changes the membership to generation", next.generation.0);
        self.operator.change = Some(Change { next, accepted: Vec::new() });
    }

    pub(crate) fn membership_arrives(&mut self, index: usize, generation: u32) -> Broken {
        let now = self.clock(index as Node);
        let Some(change) = self.operator.change.as_ref().filter(|change| change.next.generation.0 == generation) else {
            return Ok(());
        };
        let next = change.next.clone();
        let Some(process) = &mut self.safekeepers[index].process else { return Ok(()) };
        process.log.handle_configuration(u64::from(generation), next, now);
        self.drive(index)
    }

    pub(crate) fn membership_answered(&mut self, index: usize, generation: u32, accepted: bool) -> Broken {
        let member = self.safekeepers[index].member;
        let operator = &mut self.operator;
        let Some(change) = operator.change.as_mut().filter(|change| change.next.generation.0 == generation) else {
            return Ok(());
        };
        if !accepted || change.accepted.contains(&member) {
            return Ok(());
        }
        change.accepted.push(member);
        let accepted = &change.accepted;
        // A quorum of both sets (the replaced disk is gone: of the old set, the others must do), and who joins: a log that
        // does not know that its disk is a member takes part in nothing, and skips no generation.
        let joins = |member: &Member| !change.next.members.iter().any(|old| old.member == member.member);
        let joined = change.next.all_members().all(|member| !joins(member) || accepted.contains(&member.member));
        if !joined || !change.next.is_quorum(|member| accepted.contains(&member.member)) {
            return Ok(());
        }
        operator.configuration = change.next.clone();
        match change.next.new_members.clone() {
            Some(members) => {
                let generation = Generation(generation + 1);
                let next = Configuration { generation, members, new_members: None };
                operator.change = Some(Change { next, accepted: Vec::new() });
            }
            None => {
                operator.change = None;
                self.counts.memberships += 1;
                self.trace.note("membership changed to generation", generation);
            }
        }
        self.check_progress();
        Ok(())
    }
}
