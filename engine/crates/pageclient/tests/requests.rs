//! Requests of a client to shards that answer.

mod support;

use std::{cell::RefCell, rc::Rc, time::Duration};

use futures_util::future::join_all;
use layers::{HashRange, Key, Metadata, ShardGeneration, ShardId};
use pageclient::{Cause, ForkLength, Lease, PageClient, ShardAddress, ShardMapError};
use pgtypes::Lsn;
use support::{
    After, FakeServer, INGESTED, STRIPING, Shard, TABLE, blocks, check, client, config, long_value, only_shard, put,
    run, shards, soon,
};
use wal::{Fork, RelFileLocator};
use wire::{
    append::WireError,
    page::{ADVISORY_BYTES_MAX, NEWEST, PageMessage},
};

#[test]
fn a_read_is_cut_at_stripes_and_put_together_again() {
    run(async {
        let servers: Vec<_> = shards(4).into_iter().map(FakeServer::start).collect();
        let client = client(&servers.iter().collect::<Vec<_>>());
        for (first, count) in [(0, 1), (7, 1), (7, 2), (8, 8), (3, 200), (1000, 1), (0, 64), (u32::MAX - 20, 20)] {
            let pages = client.get_pages(&blocks(first, count), soon()).await.expect("pages");
            assert_eq!(Lsn(0x800), pages.lsn);
            let of_shard = check(&pages.bytes, first, count);
            assert!(count < 200 || of_shard[1..=4].iter().all(|count| *count > 0), "{of_shard:?}");
        }
        // The newest is only as new as the shard that is behind the others.
        let read = pageclient::BlockRead { request_lsn: NEWEST, ..blocks(0, 200) };
        assert_eq!(INGESTED.advance(8), client.get_pages(&read, soon()).await.expect("pages").lsn);
        assert!(servers.iter().all(|server| server.connections() == 1), "one connection to each");
    });
}

#[test]
fn reads_of_nothing_and_beyond_the_last_block_are_the_callers_fault() {
    run(async {
        let server = FakeServer::start(only_shard());
        let client = client(&[&server]);
        for (first, count) in [(0, 0), (u32::MAX, 1), (10, u32::MAX)] {
            let error = client.get_pages(&blocks(first, count), soon()).await.expect_err("refused");
            assert_eq!(Cause::Request(WireError::BadValue { field: "count" }), error.cause);
        }
        assert_eq!(0, server.connections());
    });
}

/// The server answers nothing before it has 32 requests, and then the last one first.
#[test]
fn many_requests_are_in_flight_and_answers_come_in_any_order() {
    const TOGETHER: usize = 32;
    run(async {
        let shard = only_shard();
        let waiting = Rc::new(RefCell::new(Vec::new()));
        let server = FakeServer::with(shard, move |_, message, out| {
            let mut answer = Vec::new();
            shard.answer(message, &mut answer);
            let mut waiting = waiting.borrow_mut();
            match message {
                PageMessage::GetPages(_) => waiting.push(answer),
                _ => out.append(&mut answer),
            }
            if waiting.len() == TOGETHER {
                waiting.drain(..).rev().for_each(|answer| out.extend(answer));
            }
            After::GoOn
        });
        let client = client(&[&server]);
        for _ in 0..3 {
            let reads = (0..TOGETHER as u32).map(|i| {
                let client = &client;
                async move {
                    let pages = client.get_pages(&blocks(8 * i, 1 + i % 8), soon()).await.expect("pages");
                    check(&pages.bytes, 8 * i, 1 + i % 8);
                }
            });
            join_all(reads).await;
        }
        assert_eq!(1, server.connections());
    });
}

/// Far more than one link takes at once: the rest waits for room, and nothing is lost.
#[test]
fn requests_above_the_limit_wait_for_room() {
    run(async {
        let server = FakeServer::start(only_shard());
        let client = client(&[&server]);
        let reads = (0..10_000u32).map(|i| {
            let client = &client;
            async move { check(&client.get_pages(&blocks(i, 1), soon()).await.expect("a page").bytes, i, 1) }
        });
        assert_eq!(10_000, join_all(reads).await.len());
    });
}

#[test]
fn lengths_of_all_shards_are_put_together() {
    run(async {
        let servers: Vec<_> = shards(3).into_iter().map(FakeServer::start).collect();
        let client = client(&servers.iter().collect::<Vec<_>>());
        let sizes = client.sizes(Lsn(0x880), soon()).await.expect("lengths");
        let empty = RelFileLocator { relation: 20_000, ..TABLE };
        let expected = [
            ForkLength { relation: TABLE, fork: Fork::Main, blocks: 19 * STRIPING.stripe_blocks + 3 },
            ForkLength { relation: empty, fork: Fork::VisibilityMap, blocks: 0 },
        ];
        assert_eq!((Lsn(0x880), &expected[..]), (sizes.lsn, &sizes.forks[..]));
    });
}

#[test]
fn metadata_leases_files_and_times_go_where_they_belong() {
    run(async {
        let servers: Vec<_> = shards(3).into_iter().map(FakeServer::start).collect();
        let client = client(&servers.iter().collect::<Vec<_>>());
        let metadata = client.metadata(NEWEST, soon()).await.expect("metadata");
        let expected = vec![
            (Key::metadata(Metadata::Checkpoint), b"checkpoint".to_vec()),
            (Key::metadata(Metadata::TwoPhase(700)), long_value()),
            (Key::metadata(Metadata::TwoPhase(701)), vec![]),
        ];
        assert_eq!(INGESTED.advance(8), metadata.lsn);
        assert!(expected == metadata.values, "values differ");

        let lease = client.take_lease(Lsn(0x800), 60, soon()).await;
        assert_eq!(Ok(Lease { lsn: Lsn(0x800), seconds: 57 }), lease, "the shortest of three");
        let newest = client.take_lease(NEWEST, 60, soon()).await.expect("a lease");
        assert_eq!(INGESTED.advance(24), newest.lsn, "what every shard keeps");
        assert_eq!(Ok(Lsn(1000)), client.put_advisory("pg_stat/pgstat.stat", &[7; 1000], soon()).await);
        assert_eq!(Ok((Lsn(0x900), 4999)), client.find_lsn(5000, soon()).await);

        let long = vec![0; ADVISORY_BYTES_MAX + 1];
        let error = client.put_advisory("x", &long, soon()).await.expect_err("too long");
        assert_eq!(Cause::Request(WireError::BadValue { field: "contents" }), error.cause);
    });
}

#[test]
fn progress_is_that_of_the_shard_that_is_behind() {
    run(async {
        let [first, second] = shards(2)[..] else { unreachable!() };
        let one = FakeServer::start(first);
        // Tells of progress with every answer.
        let two = FakeServer::with(second, move |_, message, out| {
            second.answer(message, out);
            if let PageMessage::TakeLease(_) = message {
                put(&second.progress(Lsn(0x900)), out);
            }
            After::GoOn
        });
        let client = client(&[&one, &two]);
        assert_eq!(None, client.progress());
        client.connect();
        let progress = client.progressed().until(|| client.progress()).await;
        assert_eq!((INGESTED.advance(8), Lsn(0x808)), (progress.ingested_lsn, progress.durable_lsn));
        assert_eq!(Lsn(0x110), progress.horizon_lsn, "the highest");
        client.take_lease(Lsn(8), 60, soon()).await.expect("a lease");
        let behind = client.progressed().until(|| client.progress().filter(|all| all.ingested_lsn == Lsn(0x900)));
        behind.await;
    });
}

#[test]
fn a_request_whose_future_is_dropped_is_given_up() {
    run(async {
        let shard = only_shard();
        let late = Rc::new(RefCell::new(Vec::new()));
        let server = FakeServer::with(shard, move |_, message, out| {
            match message {
                PageMessage::GetPages(get) if get.first_block == 1 => shard.answer(message, &mut late.borrow_mut()),
                _ => {
                    out.append(&mut late.borrow_mut());
                    shard.answer(message, out);
                }
            }
            After::GoOn
        });
        let client = client(&[&server]);
        client.get_pages(&blocks(0, 1), soon()).await.expect("a page");
        let (wanted, forgotten) = (blocks(1, 1), Duration::from_millis(50));
        assert!(driver::timeout(forgotten, client.get_pages(&wanted, soon())).await.is_none());
        // Its answer comes first, to nobody.
        check(&client.get_pages(&blocks(2, 1), soon()).await.expect("a page").bytes, 2, 1);
        assert_eq!(1, server.connections());
    });
}

#[test]
fn maps_that_do_not_divide_the_hash_space_are_refused() {
    run(async {
        let server = FakeServer::start(only_shard());
        let place = |begin, end| ShardAddress { range: HashRange { begin, end }, ..server.place() };
        let with = |shards: &[(u64, u64)]| {
            let shards = shards.iter().map(|(begin, end)| place(*begin, *end)).collect();
            PageClient::new(pageclient::ClientConfig { shards, ..config(&[&server]) }).err()
        };
        const END: u64 = 1 << 32;
        assert_eq!(None, with(&[(700, END), (0, 700)]));
        assert_eq!(Some(ShardMapError::Gap(0)), with(&[]));
        assert_eq!(Some(ShardMapError::Gap(0)), with(&[(1, END)]));
        assert_eq!(Some(ShardMapError::Gap(END - 1)), with(&[(0, END - 1)]));
        assert_eq!(Some(ShardMapError::Gap(700)), with(&[(0, 700), (701, END)]));
        assert_eq!(Some(ShardMapError::Overlap(699)), with(&[(0, 700), (699, END)]));
        assert_eq!(Some(ShardMapError::Overlap(0)), with(&[(0, END), (0, END)]));
    });
}

/// Shards that stay keep their connections; requests go to the new owners of the others.
#[test]
fn a_map_is_replaced_under_way() {
    run(async {
        let [left, right] = shards(2)[..] else { unreachable!() };
        let kept = FakeServer::start(left);
        // Never answers a read: what is in flight there moves on.
        let silent = FakeServer::with(right, move |_, message, out| {
            if let PageMessage::PageHello(_) = message {
                right.answer(message, out);
            }
            After::GoOn
        });
        let middle = (right.range.begin + right.range.end) / 2;
        let split = [(3, right.range.begin, middle), (4, middle, right.range.end)];
        let split = split.map(|(id, begin, end)| FakeServer::start(Shard { id, range: HashRange { begin, end } }));
        let client = client(&[&kept, &silent]);
        let read = async {
            let pages = client.get_pages(&blocks(0, 400), soon()).await.expect("pages");
            check(&pages.bytes, 0, 400)
        };
        let sizes = async { client.sizes(Lsn(0x800), soon()).await.expect("lengths").forks.len() };
        let replace = async {
            // The read is in flight.
            client.progressed().until(|| client.progress()).await;
            let [three, four] = &split;
            client.replace_shards(vec![kept.place(), three.place(), four.place()]).expect("a sound map");
        };
        let (of_shard, forks, ()) = futures_util::future::join3(read, sizes, replace).await;
        assert_eq!(2, forks);
        assert!(of_shard[1] > 0 && of_shard[2] == 0 && of_shard[3] > 0 && of_shard[4] > 0, "{of_shard:?}");
        assert_eq!([1, 1, 1, 1], [&kept, &silent, &split[0], &split[1]].map(FakeServer::connections));

        let unsound = vec![ShardAddress { generation: ShardGeneration(9), shard: ShardId(1), ..kept.place() }];
        assert!(client.replace_shards(unsound).is_err());
        check(&client.get_pages(&blocks(0, 100), soon()).await.expect("the old map stays").bytes, 0, 100);
    });
}
