//! The core: one thread that runs sessions and hears signals.

use std::{io, rc::Rc, sync::Arc, task::Poll, thread::JoinHandle};

use driver::{Signals, mpsc, start_core};
use futures_util::StreamExt;

use crate::session::{CoreCommand, Session, Surroundings};

/// Commands that may wait. The agent waits for the outcome of each, so there is never more than one or two.
const COMMANDS_MAX: usize = 16;

/// The core's handle.
pub struct Core {
    commands: mpsc::Sender<CoreCommand>,
    _thread: JoinHandle<io::Result<()>>,
}

/// The core has ended, which it does only by a panic.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the proposer's thread has ended")]
pub struct CoreEnded;

impl Core {
    /// Starts the core. `on_signal` is called for SIGTERM and SIGINT, and must not block.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(surroundings: Surroundings, on_signal: Arc<dyn Fn() + Send + Sync>) -> io::Result<Self> {
        let (commands, received) = mpsc::channel(COMMANDS_MAX);
        let thread = start_core("proposer", move || run(received, surroundings, on_signal))?;
        Ok(Self { commands, _thread: thread })
    }

    /// Asks for something.
    ///
    /// # Errors
    /// The core has ended.
    pub fn send(&mut self, command: CoreCommand) -> Result<(), CoreEnded> {
        self.commands.try_send(command).map_err(|_| CoreEnded)
    }
}

async fn run(
    mut commands: mpsc::Receiver<CoreCommand>,
    surroundings: Surroundings,
    on_signal: Arc<dyn Fn() + Send + Sync>,
) {
    match Signals::catch(&[libc::SIGTERM, libc::SIGINT]) {
        Ok(mut signals) => drop(driver::spawn(async move {
            while let Ok(numbers) = signals.wait().await {
                numbers.into_iter().for_each(|_| on_signal());
            }
        })),
        Err(error) => {
            tracing::error!(%error, "signals cannot be caught: the agent will end without stopping PostgreSQL")
        }
    }
    let mut current: Option<Rc<Session>> = None;
    while let Some(command) = commands.next().await {
        match command {
            CoreCommand::Elect { session, grant, incarnation, configuration } => {
                if let Some(earlier) = current.take() {
                    earlier.end();
                }
                current = Some(Session::start(session, surroundings.clone(), grant, incarnation, configuration));
            }
            CoreCommand::Attach(attachment) => {
                if let Some(session) = &current {
                    session.attach(attachment);
                }
            }
            CoreCommand::Finish { limit, reply } => {
                let session = current.clone();
                driver::spawn(async move {
                    let end = match session {
                        Some(session) => session.finish(limit).await,
                        None => None,
                    };
                    // The agent has given up waiting: then it needs no answer.
                    let _unheard = reply.try_send(end);
                });
            }
            CoreCommand::End => {
                if let Some(session) = current.take() {
                    session.end();
                }
            }
        }
    }
}

/// Lets the core's other tasks run once.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|context| {
        if yielded {
            return Poll::Ready(());
        }
        yielded = true;
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
