//! Connections that have not said who they are: few at a time, and the oldest makes room.
//!
//! Anybody who reaches the port can open them, and each costs a descriptor and a TLS session for as long as the time limit
//! allows. Refusing the newest at a bound would let a flood keep everybody out; closing the oldest lets a real peer through,
//! which needs milliseconds, and makes the flood push out itself.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    rc::Rc,
};

use driver::Closer;

/// Connections of a core that are being greeted. A thousand logs that come back at once are greeted within this many at a time in
/// well under a second; one that was pushed out connects again.
pub const GREETINGS_MAX: usize = 256;

/// The connections of one core that are being greeted, the oldest first.
pub struct Greetings<C = Closer> {
    waiting: RefCell<VecDeque<(u64, C)>>,
    next: Cell<u64>,
    max: usize,
}

impl<C> Greetings<C> {
    /// Room for `max` at a time.
    pub fn new(max: usize) -> Rc<Self> {
        Rc::new(Self { waiting: RefCell::default(), next: Cell::default(), max })
    }

    /// Counts a connection until the guest is dropped; returns what ends the one that has to make room for it.
    pub fn enter(self: &Rc<Self>, closer: C) -> (Guest<C>, Option<C>) {
        let mut waiting = self.waiting.borrow_mut();
        let oldest = if waiting.len() >= self.max { waiting.pop_front() } else { None };
        let number = self.next.replace(self.next.get() + 1);
        waiting.push_back((number, closer));
        (Guest { greetings: self.clone(), number }, oldest.map(|(_, closer)| closer))
    }
}

/// A connection that is being greeted.
pub struct Guest<C = Closer> {
    greetings: Rc<Greetings<C>>,
    number: u64,
}

impl<C> Drop for Guest<C> {
    fn drop(&mut self) {
        // Absent when it had to make room.
        self.greetings.waiting.borrow_mut().retain(|(number, _)| *number != self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_makes_room_and_those_that_were_greeted_are_not_counted() {
        let greetings = Greetings::new(2);
        let (first, none) = greetings.enter("first");
        assert_eq!(None, none);
        let (second, none) = greetings.enter("second");
        assert_eq!(None, none);
        let (_third, oldest) = greetings.enter("third");
        assert_eq!(Some("first"), oldest);
        // The one that was pushed out ends a moment later; its place is the third's already.
        drop(first);
        drop(second);
        let (_fourth, none) = greetings.enter("fourth");
        assert_eq!(None, none);
        let (_fifth, oldest) = greetings.enter("fifth");
        assert_eq!(Some("third"), oldest);
    }
}
