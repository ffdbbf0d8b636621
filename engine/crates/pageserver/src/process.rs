//! What the core and the HTTP threads share.

use std::{
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use admin::Notices;
use driver::{DriverKind, mpsc, oneshot};
use identity::{Caller, NotAllowed, Tls};
use pgtypes::LogId;

use crate::{config::Config, metrics::Metrics, owner::Owner};

/// Requests from other threads that wait for the core. At the bound the caller is told to try again.
pub const JOBS_MAX: usize = 1024;

/// Something to be done on the core.
pub type Job = Box<dyn FnOnce(&Rc<Owner>) + Send>;

/// The core does not take requests: it has too many, or the process is stopping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this page server is overloaded or stopping; try again")]
pub struct Unavailable;

/// What the core and the HTTP threads share.
pub struct Process {
    /// As read at the start.
    pub config: Config,
    /// Certificates; `None` when TLS is switched off.
    pub tls: Option<Tls>,
    /// How I/O reaches the kernel.
    pub driver: DriverKind,
    /// Port of the page protocol, as bound.
    pub pages_port: u16,
    /// Figures.
    pub metrics: Metrics,
    /// Problems that were logged.
    pub notices: Arc<Notices>,
    /// The process is ending.
    pub stopping: AtomicBool,
    /// To the core.
    pub jobs: mpsc::Sender<Job>,
}

impl Process {
    /// The log whose shard this is.
    pub fn log(&self) -> LogId {
        self.config.log()
    }

    /// Runs `ask` on the core; it answers through the sender it gets.
    ///
    /// # Errors
    /// [`Unavailable`], also when the core drops the question because it ends.
    pub async fn ask<T, F>(&self, ask: F) -> Result<T, Unavailable>
    where
        T: Send + 'static,
        F: FnOnce(&Rc<Owner>, oneshot::Sender<T>) + Send + 'static,
    {
        let (sender, receiver) = oneshot::channel();
        let job: Job = Box::new(move |owner| ask(owner, sender));
        self.jobs.clone().try_send(job).map_err(|_| Unavailable)?;
        receiver.await.map_err(|_| Unavailable)
    }

    /// Whether the process is ending.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Who opened the connection.
    ///
    /// # Errors
    /// TLS is required and the certificate names nobody.
    pub fn caller(&self, certificate: Option<&[u8]>) -> Result<Caller, NotAllowed> {
        match &self.tls {
            None => Ok(Caller::Unchecked),
            Some(_) => Caller::of_certificate(certificate),
        }
    }
}
