//! Brings the blocks that PostgreSQL asks for: from the ring of requests to the page service and into the local file.
//!
//! Neighbouring blocks travel together as far as they were asked for together; nothing waits for company.

use std::{io, os::unix::fs::FileExt, pin::pin, rc::Rc};

use futures_util::future::select;
use pageclient::{BlockRead, Cause, PageError};
use pgtypes::{Instant, Lsn};
use vfs_abi::blocks::{BLOCK_BYTES, FILE_BLOCKS_MAX, FillRequest, Purpose};
use wal::{Fork, RelFileLocator};
use wire::page::{NEWEST, PAGES_MAX, PageErrorCode};

use super::{Cache, eviction, map::Futex};

/// Blocks whose pages may be on their way: 8 MiB. At the bound requests stay in the ring, where prefetches are dropped and
/// reads wait.
const FILLING_MAX: u32 = 1024;
/// How often a write that found the disk full is tried again after an eviction.
const FULL_DISK_ATTEMPTS: u32 = 3;

/// Consecutive blocks of one file, in order.
struct Group(Vec<FillRequest>);

impl Group {
    fn takes(&self, request: &FillRequest) -> bool {
        let Some(last) = self.0.last() else { return true };
        last.file == request.file
            && last.block + 1 == request.block
            && last.prefetch == request.prefetch
            && self.0.len() < usize::from(PAGES_MAX)
    }

    /// What to ask for. The position is chosen here, behind the claims: the newest that holds every change made here.
    ///
    /// A horizon is that of 16 blocks, and one of the others may have been written since: by a transaction that does not
    /// commit before it has read these, so that page servers would wait for WAL that waits for them. Blocks that are not
    /// here left when their horizon was committed, so that what is committed now holds every change of them.
    fn read(requests: &[FillRequest], commit_lsn: u64) -> BlockRead {
        let first = &requests[0];
        let key = &first.key;
        let horizon = requests.iter().map(|request| request.horizon).max().unwrap_or_default().min(commit_lsn);
        BlockRead {
            relation: RelFileLocator { tablespace: key.tablespace, database: key.database, relation: key.relation },
            fork: match key.fork {
                0 => Fork::Main,
                1 => Fork::FreeSpaceMap,
                2 => Fork::VisibilityMap,
                _ => Fork::Init,
            },
            first_block: key.segment * FILE_BLOCKS_MAX + first.block,
            // At most the limit of a request.
            count: requests.len() as u32,
            request_lsn: NEWEST,
            not_modified_since: Lsn(horizon),
        }
    }
}

/// Takes requests from the ring until the end.
pub(super) async fn serve(cache: Rc<Cache>) {
    let doorbell = cache.setup.blocks.doorbell().clone();
    let waiter = match doorbell.waiter() {
        Ok(waiter) => waiter,
        // Without it no read would ever return: better no agent than a silent one.
        Err(error) => panic!("the doorbell of the block map cannot be waited for: {error}"),
    };
    while !cache.ended.get() {
        take_requests(&cache);
        if cache.filling.get() >= FILLING_MAX {
            let room = || (cache.filling.get() < FILLING_MAX || cache.ended.get()).then_some(());
            cache.filled.until(room).await;
        } else if cache.setup.blocks.map().prepare_sleep() {
            let ended = cache.ending.until(|| cache.ended.get().then_some(()));
            drop(select(pin!(waiter.wait()), pin!(ended)).await);
        }
    }
}

/// Everything that waits in the ring, as far as there is room.
fn take_requests(cache: &Rc<Cache>) {
    let map = cache.setup.blocks.map();
    let mut group = Group(Vec::new());
    while cache.filling.get() < FILLING_MAX {
        let Some(request) = map.poll_request(&Futex) else {
            if group.0.is_empty() {
                break;
            }
            // What is asked for ahead of it comes out of the ring next.
            send(cache, std::mem::replace(&mut group, Group(Vec::new())));
            continue;
        };
        if !group.takes(&request) {
            send(cache, std::mem::replace(&mut group, Group(Vec::new())));
        }
        group.0.push(request);
        cache.filling.set(cache.filling.get() + 1);
    }
    if !group.0.is_empty() {
        send(cache, group);
    }
}

/// Begins to fill the blocks of a group that is not empty, and asks for what its reader will want next.
fn send(cache: &Rc<Cache>, group: Group) {
    let (first, last) = (&group.0[0], &group.0[group.0.len() - 1]);
    if !first.prefetch
        && let Some(next) = cache.ahead.borrow_mut().note(first.file, first.block..last.block + 1)
        && let Err(error) =
            cache.setup.blocks.map().request(first.file, next.start, next.end, Purpose::Prefetch, &Futex)
    {
        // Whoever reads there will get this as an error.
        tracing::debug!(%error, "nothing is read ahead");
    }
    driver::spawn(fill(cache.clone(), group));
}

async fn fill(cache: Rc<Cache>, Group(requests): Group) {
    let began = driver::now();
    let deadline = began.after(cache.setup.config.fill_timeout);
    if let Err(error) = fetch(&cache, &requests, deadline).await {
        if is_of_one_page(&error) && requests.len() > 1 {
            // The others need not suffer for it.
            for request in &requests {
                if let Err(error) = fetch(&cache, std::slice::from_ref(request), deadline).await {
                    fail(&cache, std::slice::from_ref(request), &error, began);
                }
            }
        } else {
            fail(&cache, &requests, &error, began);
        }
    }
    cache.filling.set(cache.filling.get() - requests.len() as u32);
    cache.filled.set();
}

/// Asks for the pages and writes them.
async fn fetch(cache: &Cache, requests: &[FillRequest], deadline: Instant) -> Result<(), PageError> {
    let read = Group::read(requests, cache.setup.blocks.map().commit_lsn());
    let pages = cache.client.get_pages(&read, deadline).await?;
    cache.outages.borrow_mut().note_answer(&read, driver::now());
    if !cache.ended.get() {
        write(cache, requests, &pages.bytes);
        eviction::look(cache);
    }
    Ok(())
}

/// Writes pages into the file, but for blocks that are not wanted any more.
fn write(cache: &Cache, requests: &[FillRequest], pages: &[u8]) {
    let map = cache.setup.blocks.map();
    let mut next = 0;
    while next < requests.len() {
        // A run of claimed blocks is written by one call.
        let begin = next;
        while next < requests.len() && map.begin_fill_write(&requests[next]) {
            next += 1;
        }
        let run = &requests[begin..next];
        // The one that was not claimed is passed over.
        next += 1;
        if run.is_empty() {
            continue;
        }
        let bytes = &pages[begin * BLOCK_BYTES as usize..(begin + run.len()) * BLOCK_BYTES as usize];
        match write_run(cache, run, bytes) {
            Ok(()) => run.iter().for_each(|request| map.finish_fill(request, &Futex)),
            Err(error) => {
                let path = super::relation_path(&run[0].key);
                tracing::error!(
                    %error,
                    path = %path.display(),
                    first_block = run[0].block,
                    blocks = run.len(),
                    "a read of PostgreSQL fails: its blocks cannot be written to the local disk"
                );
                run.iter().for_each(|request| map.fail_fill(request, &Futex));
            }
        }
    }
}

fn write_run(cache: &Cache, run: &[FillRequest], bytes: &[u8]) -> io::Result<()> {
    let first = &run[0];
    let file = cache.files.borrow_mut().get(first.file, &first.key)?;
    let mut attempts = 0;
    loop {
        match file.write_all_at(bytes, u64::from(first.block) * BLOCK_BYTES) {
            Err(error) if is_full(&error) && attempts < FULL_DISK_ATTEMPTS => {
                attempts += 1;
                eviction::make_room_at_once(cache);
            }
            result => return result,
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Whether the cause lies in one page, so that others of the same request may be had.
fn is_of_one_page(error: &PageError) -> bool {
    use PageErrorCode::{BelowHorizon, Internal, LayerLost, NoSuchBlock, Poisoned};
    matches!(error.cause, Cause::Server { code: Poisoned | LayerLost | NoSuchBlock | BelowHorizon | Internal, .. })
}

fn fail(cache: &Cache, requests: &[FillRequest], error: &PageError, began: Instant) {
    if cache.ended.get() {
        return;
    }
    let map = cache.setup.blocks.map();
    match &error.cause {
        Cause::StaleTerm(text) => {
            // Nobody is to see an error of a server that is being killed: its reads wait for that.
            cache.note_stale_term(text);
            return;
        }
        _ if is_of_one_page(error) => {
            let read = Group::read(requests, map.commit_lsn());
            cache.outages.borrow_mut().note_lost(&read, error);
        }
        _ => cache.outages.borrow_mut().note_silence(error, requests.len() as u32, began),
    }
    requests.iter().for_each(|request| map.fail_fill(request, &Futex));
}
