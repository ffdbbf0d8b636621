//! Connections between writers and safekeepers: in order while they last, cut, slow, half open.
//!
//! A message that is under way when a connection breaks on one side may still arrive on the other, after the sender has
//! connected anew: that is how requests are duplicated and reordered over TCP.

use std::{collections::VecDeque, rc::Rc};

use consensus::message::{AcceptorMessage, Append, ProposerMessage};

use crate::event::{Node, Time};

/// A message on a connection.
pub enum Message {
    /// To a safekeeper.
    Request(ProposerMessage),
    /// To a safekeeper, with its bytes.
    Append(Append, Rc<[u8]>),
    /// To a writer.
    Answer(AcceptorMessage),
}

/// One direction.
#[derive(Default)]
pub struct Pipe {
    /// When each message arrives at the earliest.
    pub queue: VecDeque<(Time, Message)>,
    /// When the last one arrives: order is kept.
    pub last_at: Time,
    /// An event is scheduled for the first.
    pub scheduled: bool,
}

/// One TCP connection of a proposer to a safekeeper.
pub struct Connection {
    /// Which writer process.
    pub writer: usize,
    /// Its machine.
    pub host: Node,
    /// Which safekeeper.
    pub safekeeper: usize,
    /// Number of the member that the writer thinks it talks to.
    pub member: pgtypes::MemberId,
    /// The safekeeper's process, once it accepted.
    pub epoch: Option<u32>,
    /// The writer still holds its end.
    pub client_open: bool,
    /// The safekeeper still holds its end.
    pub server_open: bool,
    /// The writer has read the status.
    pub greeted: bool,
    /// To the safekeeper.
    pub requests: Pipe,
    /// To the writer.
    pub answers: Pipe,
}

/// What is wrong with the wires.
#[derive(Default)]
pub struct Network {
    /// Nothing gets from the first to the second.
    cut: Vec<(Node, Node, Time)>,
    /// Everything between these takes that much longer.
    slow: Vec<(Node, Time, Time)>,
}

impl Network {
    /// Cuts one direction until `until`.
    pub fn cut(&mut self, from: Node, to: Node, until: Time) {
        self.cut.push((from, to, until));
    }

    /// Adds `delay` to what `node` sends and gets until `until`.
    pub fn slow(&mut self, node: Node, delay: Time, until: Time) {
        self.slow.push((node, delay, until));
    }

    /// Whether nothing gets through at `now`.
    pub fn is_cut(&self, from: Node, to: Node, now: Time) -> bool {
        self.cut.iter().any(|&(a, b, until)| (a, b) == (from, to) && now < until)
    }

    /// What a message takes longer at `now`.
    pub fn delay(&self, from: Node, to: Node, now: Time) -> Time {
        self.slow.iter().filter(|&&(node, _, until)| (node == from || node == to) && now < until).map(|s| s.1).sum()
    }

    /// Forgets what is over.
    pub fn sweep(&mut self, now: Time) {
        self.cut.retain(|&(_, _, until)| now < until);
        self.slow.retain(|&(_, _, until)| now < until);
    }

    /// Everything works again.
    pub fn heal(&mut self) {
        self.cut.clear();
        self.slow.clear();
    }
}
