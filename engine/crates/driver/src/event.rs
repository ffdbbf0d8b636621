//! A local event: tasks of one thread wait for a condition.

use std::{
    cell::RefCell,
    task::{Poll, Waker},
};

/// Wakes the tasks of this thread that wait for a condition over state they share.
///
/// Keeps no state itself: [`Event::set`] makes every waiter evaluate its condition again, so a `set` before anyone
/// waits is not lost as long as the condition holds.
#[derive(Default)]
pub struct Event {
    waiters: RefCell<Vec<Waker>>,
}

impl Event {
    /// An event that nobody waits for.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes every waiter look at its condition again.
    pub fn set(&self) {
        // Taken out first: a waker may run code that waits again.
        let waiters = self.waiters.take();
        for waiter in waiters {
            waiter.wake();
        }
    }

    /// Waits until `condition` gives a value; it is evaluated at once and after each [`Event::set`].
    ///
    /// Dropping the future loses nothing, so it may be used in a select.
    pub async fn until<T>(&self, mut condition: impl FnMut() -> Option<T>) -> T {
        std::future::poll_fn(move |context| match condition() {
            Some(value) => Poll::Ready(value),
            None => {
                let mut waiters = self.waiters.borrow_mut();
                // One entry per task: a select that polls often must not grow the list.
                if !waiters.iter().any(|waiter| waiter.will_wake(context.waker())) {
                    waiters.push(context.waker().clone());
                }
                Poll::Pending
            }
        })
        .await
    }
}
