//! The core that talks to the page service: a thread of its own, so that no commit waits for a page.
//!
//! Takes commands from the agent and answers each; what it is asked for takes as long as page servers do, so the agent may
//! stop waiting. Blocks for a running PostgreSQL are `cache`'s.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    io,
    pin::pin,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::SyncSender,
    },
    thread::JoinHandle,
    time::Duration,
};

use driver::{Event, mpsc, now, start_core};
use futures_util::{
    StreamExt, TryFutureExt,
    future::{select, try_join_all, try_join3},
    stream,
};
use pageclient::{BlockRead, ClientConfig, ForkLengths, Metadata, PageClient, PageError};
use pgtypes::Lsn;
use wal::PAGE_BYTES;

use crate::{
    advisory::ChangedFile,
    cache::{Cache, CacheSetup},
    core::CoreEnded,
    free_space::ChangedMap,
    link::Greeting,
    shard_map::ShardConfig,
    wal_tail::{TailError, fetch_tail},
};

/// Commands that may wait. The agent waits for the outcome of most, so there is never more than a handful.
const COMMANDS_MAX: usize = 16;
/// How long one question for a base backup may take before it is said that it takes long; the agent asks again.
const BASE_BACKUP_LIMIT: Duration = Duration::from_secs(10);
/// Reads under way for one [`PagesCommand::Read`].
const READS_AT_ONCE: usize = 64;
/// Free-space maps on their way at once.
const MAPS_AT_ONCE: usize = 16;
/// How long handing in files may take.
const HAND_IN_LIMIT: Duration = Duration::from_secs(5);

/// What the core is asked for.
pub enum PagesCommand {
    /// An attempt begins: what was asked before is given up.
    Begin(Box<ClientConfig>),
    /// What a PGDATA as of the end of the log is made from.
    BaseBackup {
        /// X.
        at: Lsn,
        /// Where the bytes before X in its WAL page are to be had: append addresses of safekeepers.
        safekeepers: Vec<String>,
        /// How to greet them.
        greeting: Box<Greeting>,
        /// The answer.
        reply: SyncSender<Result<BaseBackup, BaseBackupError>>,
    },
    /// Pages are wanted, each read's in one piece.
    Read {
        /// Which.
        reads: Vec<BlockRead>,
        /// The answer, in the same order.
        reply: SyncSender<Result<Vec<Vec<u8>>, BaseBackupError>>,
    },
    /// Shards have other owners, now and in later attempts' maps.
    ReplaceShards(Vec<ShardConfig>),
    /// PostgreSQL is about to start: serve the blocks that it asks for.
    Serve(Box<CacheSetup>),
    /// PostgreSQL is gone.
    Rest,
    /// The page service is to keep these files.
    HandIn {
        /// Which.
        files: Vec<ChangedFile>,
        /// The answer.
        reply: SyncSender<HandedIn>,
    },
    /// The page service is to keep these free-space maps.
    HandInMaps {
        /// Which.
        maps: Vec<ChangedMap>,
        /// The answer.
        reply: SyncSender<HandedInMaps>,
    },
    /// Nothing more is wanted until the next attempt.
    End,
}

/// The files that were taken, and why the rest were not.
pub type HandedIn = (Vec<ChangedFile>, Option<String>);

/// The maps that were taken, and why the rest were not.
pub type HandedInMaps = (Vec<ChangedMap>, Option<String>);

/// What a PGDATA as of X is made from.
#[derive(Debug)]
pub struct BaseBackup {
    /// Every fork of every relation.
    pub lengths: ForkLengths,
    /// Everything else.
    pub metadata: Metadata,
    /// The bytes of X's WAL page before X.
    pub tail: Vec<u8>,
}

/// Why a base backup is not to be had (yet).
#[derive(Debug, thiserror::Error)]
pub enum BaseBackupError {
    /// From a page server.
    #[error(transparent)]
    Pages(#[from] PageError),
    /// From a safekeeper.
    #[error(transparent)]
    Tail(#[from] TailError),
    /// The attempt is over.
    #[error("the attempt is over")]
    Over,
}

/// The core's handle.
pub struct Pages {
    commands: mpsc::Sender<PagesCommand>,
    metadata_connections: Arc<AtomicU64>,
    _thread: JoinHandle<io::Result<()>>,
}

impl Pages {
    /// Starts the core.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start() -> io::Result<Self> {
        let (commands, received) = mpsc::channel(COMMANDS_MAX);
        let metadata_connections = Arc::new(AtomicU64::new(0));
        let connections = metadata_connections.clone();
        let thread = start_core("pages", move || run(received, connections))?;
        Ok(Self { commands, metadata_connections, _thread: thread })
    }

    /// How many times the shard that keeps files outside WAL was connected to in this attempt: a new connection may be to one
    /// that has lost what it got.
    pub fn metadata_connections(&self) -> u64 {
        self.metadata_connections.load(Relaxed)
    }

    /// Asks for something.
    ///
    /// # Errors
    /// The core has ended.
    pub fn send(&mut self, command: PagesCommand) -> Result<(), CoreEnded> {
        self.commands.try_send(command).map_err(|_| CoreEnded)
    }
}

async fn run(mut commands: mpsc::Receiver<PagesCommand>, metadata_connections: Arc<AtomicU64>) {
    let mut client: Option<Rc<PageClient>> = None;
    let mut cache: Option<Rc<Cache>> = None;
    let mut advisory = Rc::new(Advisory::default());
    while let Some(command) = commands.next().await {
        match command {
            PagesCommand::Begin(config) => {
                end(&mut cache);
                client = match PageClient::new(*config) {
                    Ok(client) => Some(Rc::new(client)),
                    Err(error) => unreachable!("the shard map was checked when the configuration was read: {error}"),
                };
                client.iter().for_each(|client| client.connect());
                advisory = advisory.replaced();
                if let Some(client) = &client {
                    driver::spawn(hand_in_again(client.clone(), advisory.clone(), metadata_connections.clone()));
                }
            }
            PagesCommand::BaseBackup { at, safekeepers, greeting, reply } => {
                let client = client.clone();
                driver::spawn(async move {
                    let result = match client {
                        Some(client) => base_backup(&client, at, &safekeepers, &greeting).await,
                        None => Err(BaseBackupError::Over),
                    };
                    // The agent has stopped waiting: fenced, or told to stop.
                    let _unheard = reply.try_send(result);
                });
            }
            PagesCommand::Read { reads, reply } => {
                let client = client.clone();
                driver::spawn(async move {
                    let result = match client {
                        Some(client) => read(&client, &reads).await,
                        None => Err(BaseBackupError::Over),
                    };
                    let _unheard = reply.try_send(result);
                });
            }
            PagesCommand::Serve(setup) => {
                end(&mut cache);
                cache = client.clone().map(|client| Cache::start(client, *setup));
            }
            PagesCommand::ReplaceShards(shards) => {
                if let Some(client) = &client {
                    if let Err(error) = client.replace_shards(shards.iter().map(ShardConfig::address).collect()) {
                        unreachable!("the shard map was checked when it came: {error}");
                    }
                    client.connect();
                }
                cache.iter().for_each(|cache| cache.replace_shards(&shards));
            }
            PagesCommand::Rest => end(&mut cache),
            PagesCommand::HandInMaps { maps, reply } => {
                let client = client.clone();
                driver::spawn(async move {
                    let answer = match client {
                        Some(client) => hand_in_maps(&client, maps).await,
                        None => (Vec::new(), Some("the attempt is over".to_owned())),
                    };
                    let _unheard = reply.try_send(answer);
                });
            }
            PagesCommand::HandIn { files, reply } => {
                let (client, advisory) = (client.clone(), advisory.clone());
                driver::spawn(async move {
                    let answer = match client {
                        Some(client) => hand_in(&client, &advisory, files).await,
                        None => (Vec::new(), Some("the attempt is over".to_owned())),
                    };
                    let _unheard = reply.try_send(answer);
                });
            }
            PagesCommand::End => {
                end(&mut cache);
                advisory = advisory.replaced();
                client = None;
            }
        }
    }
}

fn end(cache: &mut Option<Rc<Cache>>) {
    if let Some(cache) = cache.take() {
        cache.end();
    }
}

async fn base_backup(
    client: &PageClient,
    at: Lsn,
    safekeepers: &[String],
    greeting: &Greeting,
) -> Result<BaseBackup, BaseBackupError> {
    let deadline = now().after(BASE_BACKUP_LIMIT);
    let page = at.floor(PAGE_BYTES);
    let tail = async {
        match page == at {
            true => Ok(Vec::new()),
            false => fetch_tail(safekeepers, greeting, page, at).await.map_err(BaseBackupError::from),
        }
    };
    let lengths = client.sizes(at, deadline).map_err(BaseBackupError::from);
    let metadata = client.metadata(at, deadline).map_err(BaseBackupError::from);
    let (lengths, metadata, tail) = try_join3(lengths, metadata, tail).await?;
    Ok(BaseBackup { lengths, metadata, tail })
}

async fn read(client: &PageClient, reads: &[BlockRead]) -> Result<Vec<Vec<u8>>, BaseBackupError> {
    let deadline = now().after(BASE_BACKUP_LIMIT);
    let mut pages = Vec::with_capacity(reads.len());
    for portion in reads.chunks(READS_AT_ONCE) {
        let answers = portion.iter().map(async |read| match read.count {
            // A heap's init fork is empty, and nothing cannot be asked for.
            0 => Ok(Vec::new()),
            _ => client.get_pages(read, deadline).await.map(|answer| answer.bytes),
        });
        pages.extend(try_join_all(answers).await?);
    }
    Ok(pages)
}

/// The files that an attempt has handed in, in their newest version: the page server keeps them in memory until its next layer,
/// and no WAL has them.
#[derive(Default)]
struct Advisory {
    files: RefCell<BTreeMap<&'static str, Vec<u8>>>,
    ended: Event,
    over: Cell<bool>,
}

impl Advisory {
    /// Those of the next attempt; nothing of this one is handed in any more.
    fn replaced(&self) -> Rc<Advisory> {
        self.over.set(true);
        self.ended.set();
        Rc::default()
    }
}

/// Hands everything in again whenever the shard was connected to anew: it may have died, with its memory.
async fn hand_in_again(client: Rc<PageClient>, advisory: Rc<Advisory>, shown: Arc<AtomicU64>) {
    let mut known = client.metadata_connections();
    shown.store(known, Relaxed);
    loop {
        {
            let look = || Some(client.metadata_connections()).filter(|connections| *connections != known);
            let connected = pin!(client.progressed().until(look));
            let ended = pin!(advisory.ended.until(|| advisory.over.get().then_some(())));
            select(connected, ended).await;
        }
        if advisory.over.get() {
            return;
        }
        known = client.metadata_connections();
        shown.store(known, Relaxed);
        let names: Vec<&'static str> = advisory.files.borrow().keys().copied().collect();
        for name in names {
            match newest_handed_in(&client, &advisory, name).await {
                Ok(()) => tracing::info!(name, "the page service was given a file again, after a new connection"),
                Err(error) => {
                    tracing::warn!(name, %error, "a file could not be handed in again: the next connection gets it")
                }
            }
        }
    }
}

/// Hands a file in until its newest version was taken last: one that was handed in beside this must not end up beneath it.
async fn newest_handed_in(client: &PageClient, advisory: &Advisory, name: &'static str) -> Result<(), PageError> {
    let newest = || advisory.files.borrow().get(name).cloned().unwrap_or_default();
    let mut contents = newest();
    loop {
        client.put_advisory(name, &contents, now().after(HAND_IN_LIMIT)).await?;
        let handed_in_beside = newest();
        if handed_in_beside == contents {
            return Ok(());
        }
        contents = handed_in_beside;
    }
}

async fn hand_in(client: &PageClient, advisory: &Advisory, files: Vec<ChangedFile>) -> HandedIn {
    let deadline = now().after(HAND_IN_LIMIT);
    let mut taken = Vec::new();
    for file in files {
        advisory.files.borrow_mut().insert(file.name, file.contents.clone());
        match client.put_advisory(file.name, &file.contents, deadline).await {
            Ok(_) => taken.push(file),
            Err(error) => return (taken, Some(error.to_string())),
        }
    }
    (taken, None)
}

async fn hand_in_maps(client: &PageClient, maps: Vec<ChangedMap>) -> HandedInMaps {
    let deadline = now().after(HAND_IN_LIMIT);
    let put = async |map: ChangedMap| match client.put_advisory(&map.name, &map.contents, deadline).await {
        Ok(_) => Ok(map),
        Err(error) => Err(error.to_string()),
    };
    let mut answers = stream::iter(maps).map(put).buffer_unordered(MAPS_AT_ONCE);
    let mut taken = Vec::new();
    let mut trouble = None;
    while let Some(answer) = answers.next().await {
        match answer {
            Ok(map) => taken.push(map),
            Err(error) => trouble = trouble.or(Some(error)),
        }
    }
    (taken, trouble)
}
