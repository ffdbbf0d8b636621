//! The handle: operations on a store, from any executor or thread, with attempts, budgets and counts.

use std::{
    fmt,
    future::Future,
    ops::Range,
    path::Path,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::{
    backend::Backend,
    error::{AttemptError, StorageError},
    local::Mode,
    metrics::{Metrics, Operation},
    open::{self, OpenError},
    retry::{Attempts, RetryPolicies, RetryPolicy},
};

/// Operations that run at once; what comes beyond waits in the channel.
const OPERATIONS_MAX: usize = 64;
/// Operations that wait in the channel; beyond, the callers wait.
const WAITING_MAX: usize = 256;
/// Transfers of files that run at once: each holds up to two parts in memory.
const TRANSFERS_MAX: usize = 4;
/// An object above this has the time of a transfer to be written.
const LARGE_BYTES: usize = 1 << 20;
/// Keys that one request of a deletion names; S3 takes no more.
const DELETED_MAX: usize = 1000;
/// The most objects that a list gives.
pub const LISTED_MAX: usize = 1 << 20;

/// What a list says about an object.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ObjectInfo {
    /// Its key.
    pub key: String,
    /// Its length.
    pub bytes: u64,
}

/// What became of a write that never overwrites.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PutNew {
    /// It is ours: made now, or by an attempt of this call that seemed to have failed.
    Created,
    /// Another was first.
    AlreadyThere {
        /// Whether its bytes are the same.
        same: bool,
    },
}

type Job = Box<dyn FnOnce(Arc<Context>) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

/// A store. Clones are the same one; its thread ends with the last of them, after what runs.
///
/// Futures may be polled by any executor, or by [`crate::block_on`]. One that is dropped does not stop what it asked
/// for: a write may still be done.
#[derive(Clone)]
pub struct RemoteStorage {
    jobs: mpsc::Sender<Job>,
    /// Whoever waits for a transfer waits before the channel: not in the way of small operations.
    transfers: Arc<Semaphore>,
    metrics: Arc<Metrics>,
    url: Arc<str>,
}

impl fmt::Debug for RemoteStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RemoteStorage({})", self.url)
    }
}

impl RemoteStorage {
    /// Opens `file:///directory`, `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`. Credentials,
    /// region and endpoint come from the environment (`AWS_*`, `GOOGLE_*`, `AZURE_*`). Does not talk to a service yet.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(url: &str) -> Result<RemoteStorage, OpenError> {
        RemoteStorage::open_with(url, RetryPolicies::default())
    }

    /// Opens a store with budgets of the caller's.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open_with(url: &str, policies: RetryPolicies) -> Result<RemoteStorage, OpenError> {
        RemoteStorage::start(url, open::open(url)?, policies)
    }

    /// Opens a store that does wrong what `faults` says, whatever the URL says of faults.
    ///
    /// # Errors
    /// See [`OpenError`].
    #[cfg(feature = "faults")]
    pub fn open_faulty(
        url: &str,
        policies: RetryPolicies,
        faults: crate::faults::Faults,
    ) -> Result<RemoteStorage, OpenError> {
        let backend = Backend { faults, ..open::open(url)? };
        RemoteStorage::start(url, backend, policies)
    }

    fn start(url: &str, backend: Backend, policies: RetryPolicies) -> Result<RemoteStorage, OpenError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(OpenError::Thread)?;
        let metrics = Arc::new(Metrics::default());
        let (jobs, waiting) = mpsc::channel(WAITING_MAX);
        let context = Arc::new(Context { backend, policies, metrics: metrics.clone() });
        std::thread::Builder::new()
            .name("object-store".to_owned())
            .spawn(move || runtime.block_on(serve(waiting, context)))
            .map_err(OpenError::Thread)?;
        Ok(RemoteStorage { jobs, transfers: Arc::new(Semaphore::new(TRANSFERS_MAX)), metrics, url: url.into() })
    }

    /// As it was opened. Holds no secret.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Counts since it was opened.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Runs a job on the store's thread.
    pub(crate) async fn run<T, F>(&self, job: impl FnOnce(Arc<Context>) -> F + Send + 'static) -> T
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |context| {
            Box::pin(async move {
                // A caller that is gone wants no answer.
                let _ = reply.send(job(context).await);
            })
        });
        self.jobs.send(job).await.unwrap_or_else(|_| panic!("the store's thread ends after its last handle"));
        answer.await.expect("the store's thread answers every job, unless a job panics")
    }

    /// The whole object.
    ///
    /// # Errors
    /// It is not there, or see [`StorageError`].
    pub async fn get(&self, key: &str) -> Result<Bytes, StorageError> {
        let key = key.to_owned();
        self.run(|context| async move { context.get(&key, context.policies.read).await }).await
    }

    /// The whole object, with the time of a transfer: for what may be many megabytes.
    pub(crate) async fn get_large(&self, key: &str) -> Result<Bytes, StorageError> {
        let key = key.to_owned();
        self.run(|context| async move { context.get(&key, context.policies.transfer).await }).await
    }

    /// Bytes of an object, half-open. All of them have to be there.
    ///
    /// # Errors
    /// It is not there or is shorter, or see [`StorageError`].
    pub async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StorageError> {
        let key = key.to_owned();
        self.run(|context| async move { context.get_range(&key, range).await }).await
    }

    /// Writes an object over whatever is there. After an error, or when the future was dropped, it may still be written
    /// later: only keys whose every write has the same bytes are safe.
    ///
    /// # Errors
    /// See [`StorageError`].
    pub async fn put(&self, key: &str, bytes: impl Into<Bytes>) -> Result<(), StorageError> {
        let (key, bytes) = (key.to_owned(), bytes.into());
        self.run(|context| async move { context.put(&key, bytes).await }).await
    }

    /// Writes an object that is not there yet. Of many who do that at once, one is told [`PutNew::Created`], or each
    /// whose bytes are those that were created, if an attempt of it failed in between: where just one may win, the bytes
    /// have to differ.
    ///
    /// # Errors
    /// See [`StorageError`]; it may be there nevertheless.
    pub async fn put_new(&self, key: &str, bytes: impl Into<Bytes>) -> Result<PutNew, StorageError> {
        let (key, bytes) = (key.to_owned(), bytes.into());
        self.run(|context| async move { context.put_new(&key, bytes).await }).await
    }

    /// All objects whose keys begin with `directory/`, in the order of their keys; the empty directory has all.
    ///
    /// # Errors
    /// See [`StorageError`].
    pub async fn list(&self, directory: &str) -> Result<Vec<ObjectInfo>, StorageError> {
        let directory = directory.to_owned();
        self.run(|context| async move { context.list(&directory).await }).await
    }

    /// Names of the directories directly in `directory`, in order.
    ///
    /// # Errors
    /// See [`StorageError`].
    pub async fn list_directories(&self, directory: &str) -> Result<Vec<String>, StorageError> {
        let directory = directory.to_owned();
        self.run(|context| async move { context.list_directories(&directory).await }).await
    }

    /// Removes objects. One that is not there is fine.
    ///
    /// # Errors
    /// See [`StorageError`]; some may be removed.
    pub async fn delete(&self, keys: Vec<String>) -> Result<(), StorageError> {
        self.run(|context| async move { context.delete(&keys).await }).await
    }

    /// Writes a local file to an object that is not there yet; see [`RemoteStorage::put_new`]. The file must not change
    /// meanwhile. A file above [`crate::PARTS_ABOVE_BYTES`] goes to a service in parts, which no service joins
    /// exclusively: of two who do that at once, the later one overwrites.
    ///
    /// # Errors
    /// The file cannot be read, or see [`StorageError`].
    pub async fn upload_new(&self, key: &str, file: &Path) -> Result<PutNew, StorageError> {
        let (key, file) = (key.to_owned(), file.to_owned());
        let _transfer = self.transfers.acquire().await;
        self.run(|context| async move { context.upload_new(&key, &file).await }).await
    }

    /// Writes an object to a local file, which appears whole (synced, but its directory is not); returns its length.
    ///
    /// # Errors
    /// It is not there, the file cannot be written, or see [`StorageError`].
    pub async fn download(&self, key: &str, file: &Path) -> Result<u64, StorageError> {
        let (key, file) = (key.to_owned(), file.to_owned());
        let _transfer = self.transfers.acquire().await;
        self.run(|context| async move { context.download(&key, &file).await }).await
    }
}

/// Takes jobs until the last handle is gone, then ends with the last job.
async fn serve(mut waiting: mpsc::Receiver<Job>, context: Arc<Context>) {
    let running = Arc::new(Semaphore::new(OPERATIONS_MAX));
    loop {
        let permit = running.clone().acquire_owned().await.expect("nobody closes the semaphore");
        let Some(job) = waiting.recv().await else { break };
        let job = job(context.clone());
        tokio::spawn(async move {
            job.await;
            drop(permit);
        });
    }
    let _all_ended = running.acquire_many(OPERATIONS_MAX as u32).await;
}

/// What jobs work with, on the store's thread.
pub(crate) struct Context {
    pub(crate) backend: Backend,
    pub(crate) policies: RetryPolicies,
    pub(crate) metrics: Arc<Metrics>,
}

impl Context {
    /// Tries until it works, cannot work, or the budget is spent. `attempt` is told how many were made before.
    pub(crate) async fn try_for<T, F>(
        &self,
        operation: Operation,
        key: &str,
        policy: RetryPolicy,
        mut attempt: impl FnMut(u32) -> F,
    ) -> Result<T, StorageError>
    where
        F: Future<Output = Result<T, AttemptError>>,
    {
        let mut attempts = Attempts::begin(policy, Instant::now());
        loop {
            let result = match tokio::time::timeout(policy.attempt_timeout, attempt(attempts.made)).await {
                Ok(result) => result,
                Err(_) => Err(AttemptError::temporary(format_args!("no answer in {:?}", policy.attempt_timeout))),
            };
            attempts.made += 1;
            let key = || key.to_owned();
            let cause = match result {
                Ok(value) => return Ok(value),
                Err(AttemptError::NotFound) => return Err(StorageError::NotFound { key: key() }),
                Err(AttemptError::Denied(cause)) => return Err(StorageError::Denied { operation, key: key(), cause }),
                Err(AttemptError::Rejected(cause)) => {
                    return Err(StorageError::Rejected { operation, key: key(), cause });
                }
                Err(AttemptError::File(path, source)) => return Err(StorageError::File { path, source }),
                Err(AttemptError::AlreadyThere) => "something else is written there at the same time".to_owned(),
                Err(AttemptError::Temporary(cause)) => cause,
            };
            let Some(pause) = attempts.next_pause(Instant::now(), jitter()) else {
                return Err(StorageError::Unavailable { operation, key: key(), attempts: attempts.made, cause });
            };
            tracing::debug!(%operation, key = key(), attempt = attempts.made, ?pause, cause, "object store: again");
            self.metrics.retried(operation);
            tokio::time::sleep(pause).await;
        }
    }

    /// Counts a call.
    pub(crate) async fn counted<T>(
        &self,
        operation: Operation,
        call: impl Future<Output = Result<T, StorageError>>,
    ) -> Result<T, StorageError> {
        let began = Instant::now();
        let result = call.await;
        let failed = result.as_ref().is_err_and(|error| !error.is_not_found());
        let took: Duration = began.elapsed();
        self.metrics.ended(operation, took, failed);
        result
    }

    async fn get(&self, key: &str, policy: RetryPolicy) -> Result<Bytes, StorageError> {
        let attempts = self.try_for(Operation::Get, key, policy, |_| self.backend.get(key));
        let bytes = self.counted(Operation::Get, attempts).await?;
        self.metrics.transferred(Operation::Get, bytes.len() as u64);
        Ok(bytes)
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StorageError> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let attempts =
            self.try_for(Operation::Get, key, self.policies.read, |_| self.backend.get_range(key, range.clone()));
        let bytes = self.counted(Operation::Get, attempts).await?;
        self.metrics.transferred(Operation::Get, bytes.len() as u64);
        Ok(bytes)
    }

    async fn put(&self, key: &str, bytes: Bytes) -> Result<(), StorageError> {
        let length = bytes.len() as u64;
        let attempts = self.try_for(Operation::Put, key, self.policies.write, |_| {
            self.backend.put(key, bytes.clone(), Mode::Overwrite)
        });
        self.counted(Operation::Put, attempts).await?;
        self.metrics.transferred(Operation::Put, length);
        Ok(())
    }

    async fn put_new(&self, key: &str, bytes: Bytes) -> Result<PutNew, StorageError> {
        let large = bytes.len() > LARGE_BYTES;
        let policy = if large { self.policies.transfer } else { self.policies.write };
        self.counted(Operation::PutNew, self.create(key, bytes, policy)).await
    }

    /// [`RemoteStorage::put_new`] within a budget.
    pub(crate) async fn create(&self, key: &str, bytes: Bytes, policy: RetryPolicy) -> Result<PutNew, StorageError> {
        let result = self
            .try_for(Operation::PutNew, key, policy, async |made| {
                // A service that refuses a large object on its first bytes breaks the connection that brings the rest,
                // and its answer is lost. Then a look before saves the bytes, too.
                let put = if bytes.len() > LARGE_BYTES && self.backend.length(key).await.is_ok() {
                    Err(AttemptError::AlreadyThere)
                } else {
                    self.backend.put(key, bytes.clone(), Mode::Create).await
                };
                match put {
                    Ok(()) => Ok(PutNew::Created),
                    // S3 says so, too, when another writes it and may yet fail; then it is not there, and we try again.
                    Err(AttemptError::AlreadyThere) => match self.backend.get(key).await {
                        Ok(found) if found == bytes && made > 0 => Ok(PutNew::Created),
                        Ok(found) => Ok(PutNew::AlreadyThere { same: found == bytes }),
                        Err(AttemptError::NotFound) => Err(AttemptError::AlreadyThere),
                        Err(error) => Err(error),
                    },
                    Err(error) => Err(error),
                }
            })
            .await?;
        if result == PutNew::Created {
            self.metrics.transferred(Operation::PutNew, bytes.len() as u64);
        }
        Ok(result)
    }

    async fn list(&self, directory: &str) -> Result<Vec<ObjectInfo>, StorageError> {
        let attempts = self.try_for(Operation::List, directory, self.policies.read, |_| self.backend.list(directory));
        let listed = self.counted(Operation::List, attempts).await?;
        let mut objects = listed.map_err(|_| StorageError::TooManyObjects { directory: directory.to_owned() })?;
        objects.sort_unstable();
        Ok(objects)
    }

    async fn list_directories(&self, directory: &str) -> Result<Vec<String>, StorageError> {
        let attempts =
            self.try_for(Operation::List, directory, self.policies.read, |_| self.backend.list_directories(directory));
        let mut names = self.counted(Operation::List, attempts).await?;
        names.sort_unstable();
        Ok(names)
    }

    async fn delete(&self, keys: &[String]) -> Result<(), StorageError> {
        for keys in keys.chunks(DELETED_MAX) {
            let attempts =
                self.try_for(Operation::Delete, &keys[0], self.policies.write, |_| self.backend.delete(keys));
            self.counted(Operation::Delete, attempts).await?;
        }
        Ok(())
    }
}

/// Randomness for pauses. Without it all pauses are the longest, which harms nobody.
fn jitter() -> u32 {
    getrandom::u32().unwrap_or(u32::MAX)
}
