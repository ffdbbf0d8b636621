//! What goes wrong, and how often.

use pgtypes::{DiskId, Lsn, MemberId};

use crate::{
    checker::Broken,
    event::{Event, MILLISECOND, Node, SECOND, Time},
    random::Random,
    world::{GEOMETRY, Phase, World},
};

/// A kind of fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    KillSafekeeper,
    PowerOff,
    PowerOffAll,
    FreezeSafekeeper,
    Isolate,
    CutPair,
    CutOneWay,
    DropConnections,
    SlowNode,
    SlowDisk,
    FullDisk,
    FailingDisk,
    KillWriter,
    FreezeWriter,
    ChangeWriter,
    SecondRun,
    RotControl,
    RotSegment,
    ReplaceDisk,
    Horizon,
}

/// Kinds with their weights.
const KINDS: [(Kind, u64); 20] = [
    (Kind::KillSafekeeper, 10),
    (Kind::PowerOff, 10),
    (Kind::PowerOffAll, 6),
    (Kind::FreezeSafekeeper, 8),
    (Kind::Isolate, 8),
    (Kind::CutPair, 8),
    (Kind::CutOneWay, 6),
    (Kind::DropConnections, 8),
    (Kind::SlowNode, 5),
    (Kind::SlowDisk, 5),
    (Kind::FullDisk, 4),
    (Kind::FailingDisk, 4),
    (Kind::KillWriter, 8),
    (Kind::FreezeWriter, 10),
    (Kind::ChangeWriter, 12),
    (Kind::SecondRun, 4),
    (Kind::RotControl, 3),
    (Kind::RotSegment, 3),
    (Kind::ReplaceDisk, 3),
    (Kind::Horizon, 4),
];

/// What may go wrong in a run; each run leaves some kinds out, so that the others show what they can do.
pub struct Plan {
    /// Safekeepers.
    pub members: usize,
    /// How long things go wrong.
    pub fault_time: Time,
    /// PostgreSQL has much to do.
    pub busy: bool,
    /// Faults so far.
    pub done: u64,
    /// A segment was spoiled, so that a log may refuse to start.
    pub rotted: bool,
    /// The only safekeeper whose disk may be spoiled or replaced: what cannot be repaired hits a minority.
    victim: usize,
    /// Two processes of one writer ran at the same time.
    pub second_runs: bool,
    /// The victim's disk was replaced.
    pub replaced: bool,
    pause_max: Time,
    kinds: Vec<(Kind, u64)>,
}

impl Plan {
    /// What goes wrong in this run.
    pub fn choose(random: &mut Random) -> Plan {
        let members = if random.chance(15) { 5 } else { 3 };
        // A member that begins with nothing cannot be filled any more when WAL was removed.
        let removes = random.chance(30);
        let kept_per_cent = *random.pick(&[30, 60, 100]);
        let allowed = |kind: Kind| match kind {
            Kind::Horizon => removes,
            Kind::ReplaceDisk => !removes,
            _ => true,
        };
        let mut kinds: Vec<(Kind, u64)> = Vec::new();
        for (kind, weight) in KINDS {
            if allowed(kind) && random.chance(kept_per_cent) {
                kinds.push((kind, weight));
            }
        }
        if kinds.is_empty() {
            kinds.push((Kind::ChangeWriter, 1));
        }
        Plan {
            members,
            fault_time: random.range(SECOND, 5 * SECOND),
            busy: random.chance(25),
            done: 0,
            rotted: false,
            victim: random.below(members as u64) as usize,
            second_runs: false,
            replaced: false,
            pause_max: *random.pick(&[60, 250, 800]) * MILLISECOND,
            kinds,
        }
    }
}

impl World {
    pub(crate) fn fault(&mut self) -> Broken {
        if self.phase != Phase::Faults {
            return Ok(());
        }
        let pause = self.random.range(MILLISECOND, self.plan.pause_max);
        self.schedule.at(self.now + pause, Event::Fault);
        self.plan.done += 1;
        let total = self.plan.kinds.iter().map(|(_, weight)| weight).sum();
        let mut at = self.random.below(total);
        let mut chosen = self.plan.kinds[0].0;
        for &(kind, weight) in &self.plan.kinds {
            if at < weight {
                chosen = kind;
                break;
            }
            at -= weight;
        }
        self.trace.note("fault", chosen as u8);
        if self.trace.prints() {
            println!("{:>16} FAULT {chosen:?}", "");
        }
        self.strike(chosen)
    }

    fn any_safekeeper(&mut self) -> usize {
        self.random.below(self.safekeepers.len() as u64) as usize
    }

    /// A writer process that runs; mostly the newest.
    fn any_writer(&mut self) -> Option<usize> {
        let running: Vec<usize> = (0..self.writers.len()).filter(|&index| self.writers[index].is_running()).collect();
        match self.random.chance(60) {
            true => running.last().copied(),
            false => running.get(self.random.below(running.len() as u64) as usize).copied(),
        }
    }

    fn any_node(&mut self) -> Node {
        let safekeepers = self.safekeepers.len() as u64;
        match self.random.below(safekeepers + 3) {
            n if n < safekeepers => n as Node,
            n if n == safekeepers => World::OPERATOR,
            _ => self.any_writer().map_or(0, |writer| self.writers[writer].host),
        }
    }

    fn restart_later(&mut self, safekeeper: usize, most: Time) {
        let wait = self.random.range(MILLISECOND, most);
        self.schedule.at(self.now + wait, Event::Start { safekeeper });
    }

    fn strike(&mut self, kind: Kind) -> Broken {
        match kind {
            Kind::KillSafekeeper => {
                let index = self.any_safekeeper();
                self.kill_safekeeper(index);
                self.restart_later(index, 600 * MILLISECOND);
            }
            Kind::PowerOff => {
                let index = self.any_safekeeper();
                self.power_off(index);
                self.restart_later(index, 1500 * MILLISECOND);
            }
            Kind::PowerOffAll => {
                for index in 0..self.safekeepers.len() {
                    self.power_off(index);
                    self.restart_later(index, 400 * MILLISECOND);
                }
            }
            Kind::FreezeSafekeeper => {
                let node = self.any_safekeeper() as Node;
                let until = self.now + self.random.range(5 * MILLISECOND, 3 * SECOND);
                self.freeze(node, until);
            }
            Kind::Isolate => {
                let node = self.any_node();
                let until = self.now + self.random.range(20 * MILLISECOND, 4 * SECOND);
                let others: Vec<Node> = self.all_nodes().into_iter().filter(|other| *other != node).collect();
                for other in others {
                    self.network.cut(node, other, until);
                    self.network.cut(other, node, until);
                }
            }
            Kind::CutPair | Kind::CutOneWay => {
                let (a, b) = (self.any_node(), self.any_node());
                let until = self.now + self.random.range(20 * MILLISECOND, 3 * SECOND);
                self.network.cut(a, b, until);
                if kind == Kind::CutPair {
                    self.network.cut(b, a, until);
                }
            }
            Kind::DropConnections => {
                for connection in self.connections.len().saturating_sub(12)..self.connections.len() {
                    if self.random.chance(40) {
                        let at_server = self.random.chance(30);
                        self.schedule.at(self.now, Event::Closed { connection, at_server });
                        if self.random.chance(70) {
                            // The other side learns of it later; until then it takes what arrives.
                            let wait = self.random.range(0, 300 * MILLISECOND);
                            self.schedule.at(self.now + wait, Event::Closed { connection, at_server: !at_server });
                        }
                    }
                }
            }
            Kind::SlowNode => {
                let node = self.any_node();
                let delay = self.random.range(MILLISECOND, 400 * MILLISECOND);
                let until = self.now + self.random.range(100 * MILLISECOND, 2 * SECOND);
                self.network.slow(node, delay, until);
            }
            Kind::SlowDisk => {
                let until = self.now + self.random.range(100 * MILLISECOND, 2 * SECOND);
                let index = self.any_safekeeper();
                self.safekeepers[index].slow_down(until);
            }
            Kind::FullDisk => {
                let until = self.now + self.random.range(100 * MILLISECOND, 2 * SECOND);
                let index = self.any_safekeeper();
                self.safekeepers[index].fill(until);
            }
            Kind::FailingDisk => {
                let index = self.any_safekeeper();
                self.safekeepers[index].fail_next();
            }
            Kind::KillWriter => {
                if let Some(writer) = self.any_writer() {
                    self.kill_writer(writer);
                }
            }
            Kind::FreezeWriter => {
                if let Some(writer) = self.any_writer() {
                    let until = self.now + self.random.range(10 * MILLISECOND, 3 * SECOND);
                    let host = self.writers[writer].host;
                    self.freeze(host, until);
                    // The operator may take it for dead.
                    if self.random.chance(40) && !self.operator.is_busy() {
                        self.change_writer();
                    }
                }
            }
            Kind::ChangeWriter => {
                if !self.operator.is_busy() || self.random.chance(20) {
                    self.change_writer();
                }
            }
            Kind::SecondRun => {
                // The operator believes that the writer is dead, on a machine that only stands still.
                self.plan.second_runs = true;
                if let Some(writer) = self.any_writer() {
                    let grant = self.writers[writer].grant;
                    let host = self.writers[writer].host;
                    let configuration = self.operator.configuration.clone();
                    self.start_writer(host, grant, configuration)?;
                }
            }
            Kind::RotControl => {
                let index = self.any_safekeeper();
                // At rest, and one copy only: two are for that.
                if self.safekeepers[index].process.is_some() {
                    self.power_off(index);
                    self.restart_later(index, 300 * MILLISECOND);
                    let copy = self.random.below(2) as usize;
                    let both = self.safekeepers[index].disk.controls.clone();
                    let usable = |bytes: &Option<Vec<u8>>| {
                        bytes.as_deref().and_then(|bytes| logstore::ControlFile::decode(bytes).ok())
                    };
                    // A copy that a crash tore just before is the one fault that can be borne.
                    if let [Some(first), Some(second)] = [usable(&both[0]), usable(&both[1])]
                        && first == second
                        && let Some(bytes) = &mut self.safekeepers[index].disk.controls[copy]
                    {
                        let at = self.random.below(200.min(bytes.len() as u64)) as usize;
                        bytes[at] ^= 1 << self.random.below(8);
                    }
                }
            }
            Kind::RotSegment => self.rot_segment(),
            Kind::ReplaceDisk => self.replace_disk(),
            Kind::Horizon => {
                // Whoever lacks WAL fetches it from a peer, so it stays until all members hold it.
                let flush = |safekeeper: &crate::safekeeper::Safekeeper| {
                    safekeeper.process.as_ref().map_or(Lsn::INVALID, |process| process.log.acceptor().commit_lsn())
                };
                let horizon = self.safekeepers.iter().map(flush).min().unwrap_or(Lsn::INVALID);
                let index = self.any_safekeeper();
                let now = self.clock(index as Node);
                let back = self.random.below(3 * GEOMETRY.segment_bytes);
                if let Some(process) = &mut self.safekeepers[index].process {
                    process.log.handle_horizon(Lsn(horizon.0.saturating_sub(back)), now);
                    return self.drive(index);
                }
            }
        }
        Ok(())
    }

    fn all_nodes(&self) -> Vec<Node> {
        let safekeepers = 0..self.safekeepers.len() as Node;
        let mut hosts: Vec<Node> = self.writers.iter().map(|writer| writer.host).collect();
        hosts.sort_unstable();
        hosts.dedup();
        safekeepers.chain(core::iter::once(World::OPERATOR)).chain(hosts).collect()
    }

    /// A bit of a sealed segment of the victim flips.
    fn rot_segment(&mut self) {
        let victim = self.plan.victim;
        if self.plan.replaced {
            return;
        }
        let Some(process) = &self.safekeepers[victim].process else { return };
        let (oldest, sealed) = (process.log.oldest_lsn(), process.log.status().sealed_lsn);
        let first = oldest.floor(GEOMETRY.segment_bytes);
        let count = sealed.bytes_since(first) / GEOMETRY.segment_bytes;
        if count == 0 {
            return;
        }
        let start = first.advance(self.random.below(count) * GEOMETRY.segment_bytes);
        let World { safekeepers, random, plan, .. } = self;
        plan.rotted |= safekeepers[victim].disk.rot(start, random);
    }

    /// The victim's disk is replaced by an empty one. The operator may make it a member, or has not noticed yet.
    fn replace_disk(&mut self) {
        let victim = self.plan.victim;
        if self.plan.replaced || self.plan.rotted || self.operator.is_busy() {
            return;
        }
        self.plan.replaced = true;
        self.power_off(victim);
        let disk = DiskId(self.random.id());
        let old = self.safekeepers[victim].member;
        let configuration = self.operator.configuration.clone();
        let becomes_member = self.random.chance(50);
        let member = if becomes_member { MemberId(100 + old.0) } else { old };
        self.safekeepers[victim].replace_disk(member, disk, configuration);
        self.restart_later(victim, 200 * MILLISECOND);
        if becomes_member {
            self.change_membership(victim, old);
        }
    }
}
