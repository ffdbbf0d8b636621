//! Servers that break, refuse, lag, lie, or are not there.

mod support;

use std::{cell::Cell, path::PathBuf, rc::Rc, time::Duration};

use identity::{Role, Tls, ca};
use layers::{HashRange, ShardGeneration};
use pageclient::{BlockRead, Cause, ClientConfig, PageClient, ShardAddress};
use pgtypes::Lsn;
use support::{
    After, FakeServer, INGESTED, LOG, Shard, TABLE, blocks, check, client, config, only_shard, page, put, put_failure,
    run, soon, within,
};
use wire::page::{PageErrorCode, PageMessage, PageWelcome, Pages};

const SHORT: Duration = Duration::from_millis(300);

/// Answers as the shard does, but what `interfere` says otherwise: `None` for nothing.
fn server(interfere: impl Fn(usize, &PageMessage<'_>, &mut Vec<u8>) -> Option<After> + 'static) -> FakeServer {
    let shard = only_shard();
    FakeServer::with(shard, move |connection, message, out| {
        interfere(connection, message, out).unwrap_or_else(|| {
            shard.answer(message, out);
            After::GoOn
        })
    })
}

async fn read_one(client: &PageClient, block: u32) {
    check(&client.get_pages(&blocks(block, 1), soon()).await.expect("a page").bytes, block, 1);
}

#[test]
fn what_was_in_flight_on_a_broken_connection_is_sent_again() {
    run(async {
        // The first three connections end at the first request, the third in the middle of an answer in parts.
        let server = server(|connection, message, out| match (connection, message) {
            (_, PageMessage::PageHello(_)) | (4.., _) => None,
            (3, PageMessage::GetMetadata(_)) => {
                only_shard().answer(message, out);
                out.truncate(2_000_000);
                Some(After::GoOn)
            }
            (3, _) => Some(After::GoOn),
            _ => Some(After::Close),
        });
        let client = client(&[&server]);
        let break_third = async {
            server.opened(3).await;
            // Time for the first parts of the answer, which are worth nothing afterwards.
            driver::sleep(SHORT).await;
            server.break_connections();
        };
        let read = async { check(&client.get_pages(&blocks(0, 40), soon()).await.expect("pages").bytes, 0, 40) };
        let metadata = async { client.metadata(Lsn(0x800), soon()).await.expect("metadata") };
        let (_, metadata, ()) = futures_util::future::join3(read, metadata, break_third).await;
        assert!(metadata.values[1].1 == support::long_value(), "begun anew");
        assert_eq!(4, server.connections());

        server.break_connections();
        read_one(&client, 5).await;
        assert_eq!(5, server.connections());
    });
}

#[test]
fn a_server_that_is_not_there_is_named_at_the_deadline_and_found_when_it_comes() {
    run(async {
        let address = driver::Listener::listen("127.0.0.1:0").expect("a port").local_address().expect("an address");
        let place = ShardAddress { address: address.to_string(), ..FakeServer::start(only_shard()).place() };
        let configuration = ClientConfig { shards: vec![place], ..config(&[]) };
        let client = PageClient::new(configuration).expect("a sound map");
        let begun = driver::now();
        let error = client.get_pages(&blocks(7, 1), within(SHORT)).await.expect_err("nobody is there");
        assert!(driver::now().since(begun) >= SHORT);
        assert!(matches!(&error.cause, Cause::Deadline { last: Some(_) }), "{error:?}");
        let text = error.to_string();
        let start = format!(
            "read relation 1663/5/16384 block 7 as of 0/800 (unchanged since 0/400) from shard 1 at {address}: no answer \
             in time ("
        );
        assert!(text.starts_with(&start) && text.contains("refused"), "{text}");

        let shard = only_shard();
        let wanted = blocks(3, 2);
        let waiting = client.get_pages(&wanted, soon());
        let start = async {
            driver::sleep(SHORT).await;
            FakeServer::at(&address.to_string(), shard, None, move |_, message, out| {
                shard.answer(message, out);
                After::GoOn
            })
        };
        let (pages, _server) = futures_util::future::join(waiting, start).await;
        check(&pages.expect("pages").bytes, 3, 2);
    });
}

/// What the server may be able to do later is asked again; its last words stand at the deadline.
#[test]
fn a_server_that_lags_is_asked_again_until_the_deadline() {
    run(async {
        let refusals = Rc::new(Cell::new(0));
        let left = Rc::clone(&refusals);
        let server = server(move |_, message, out| match message {
            PageMessage::GetPages(get) if left.get() > 0 => {
                left.set(left.get() - 1);
                let codes = [PageErrorCode::NotYetThere, PageErrorCode::Busy, PageErrorCode::Stopping];
                put_failure(get.id, codes[left.get() % 3], "at 0/300", out);
                Some(After::GoOn)
            }
            _ => None,
        });
        let client = client(&[&server]);
        refusals.set(6);
        read_one(&client, 1).await;
        assert_eq!(0, refusals.get());

        refusals.set(usize::MAX);
        let error = client.get_pages(&blocks(1, 1), within(SHORT)).await.expect_err("too late");
        assert!(matches!(&error.cause, Cause::Server { text, .. } if text == "at 0/300"), "{error:?}");
        let asked = usize::MAX - refusals.get();
        assert!((2..50).contains(&asked), "asked {asked} times in {SHORT:?}");
        refusals.set(0);
        read_one(&client, 1).await;
        assert_eq!(1, server.connections());
    });
}

#[test]
fn failures_that_time_does_not_mend_are_the_answer() {
    run(async {
        for code in [
            PageErrorCode::BelowHorizon,
            PageErrorCode::Poisoned,
            PageErrorCode::LayerLost,
            PageErrorCode::BadRequest,
            PageErrorCode::Internal,
            PageErrorCode::NoSuchBlock,
            PageErrorCode::Other(999),
        ] {
            let server = server(move |_, message, out| match message {
                PageMessage::GetPages(get) if get.first_block == 8 => {
                    put_failure(get.id, code, "layer 7 is gone", out);
                    Some(After::GoOn)
                }
                _ => None,
            });
            let client = client(&[&server]);
            let error = client.get_pages(&blocks(0, 24), soon()).await.expect_err("one piece fails");
            assert_eq!(Cause::Server { code, text: "layer 7 is gone".to_owned() }, error.cause);
            assert!(error.to_string().contains("blocks 0..24"), "{error}");
            read_one(&client, 16).await;
        }
    });
}

#[test]
fn a_stale_term_ends_everything_for_ever() {
    run(async {
        for at_the_greeting in [true, false] {
            let server = server(move |_, message, out| match message {
                PageMessage::PageHello(_) if at_the_greeting => {
                    put_failure(0, PageErrorCode::StaleTerm, "term 5 began", out);
                    Some(After::GoOn)
                }
                PageMessage::GetPages(get) if get.first_block == 8 => {
                    put_failure(get.id, PageErrorCode::StaleTerm, "term 5 began", out);
                    Some(After::GoOn)
                }
                PageMessage::GetPages(_) => Some(After::GoOn),
                _ => None,
            });
            let client = client(&[&server]);
            assert!(client.term_over().is_none());
            // One is refused, the other would wait for long.
            let (wanted, other) = (blocks(8, 1), blocks(0, 1));
            let both = futures_util::future::join(client.get_pages(&wanted, soon()), client.get_pages(&other, soon()));
            let (refused, waiting) = both.await;
            let later = client.metadata(Lsn(8), soon()).await;
            let causes = [
                refused.expect_err("refused").cause,
                waiting.expect_err("with it").cause,
                later.expect_err("for ever").cause,
            ];
            for cause in causes {
                assert!(matches!(&cause, Cause::StaleTerm(text) if text.contains("term 5 began")), "{cause:?}");
            }
            assert!(client.term_over().is_some_and(|text| text.contains("term 5 began")));
            assert_eq!(1, server.connections());
        }
    });
}

#[test]
fn refusals_at_the_greeting_that_time_does_not_mend_are_the_answer() {
    run(async {
        for code in [PageErrorCode::NotAllowed, PageErrorCode::UnknownLog, PageErrorCode::WrongVersion] {
            let server = server(move |_, message, out| match message {
                PageMessage::PageHello(_) => {
                    put_failure(0, code, "not you", out);
                    Some(After::GoOn)
                }
                _ => None,
            });
            let client = client(&[&server]);
            let error = client.get_pages(&blocks(0, 1), soon()).await.expect_err("refused");
            assert!(
                matches!(&error.cause, Cause::Server { code: theirs, text } if *theirs == code && text.contains("not you")),
                "{error}"
            );
        }
    });
}

/// The owner of a shard says that it is none, by an answer or at the greeting; another map helps.
#[test]
fn a_wrong_owner_is_left_for_the_one_of_the_next_map() {
    run(async {
        for at_the_greeting in [true, false] {
            let old = server(move |_, message, out| match message {
                PageMessage::PageHello(_) if at_the_greeting => {
                    put_failure(0, PageErrorCode::WrongShardOwner, "generation 9 owns it", out);
                    Some(After::GoOn)
                }
                PageMessage::GetPages(get) => {
                    put_failure(get.id, PageErrorCode::WrongShardOwner, "generation 9 owns it", out);
                    Some(After::GoOn)
                }
                _ => None,
            });
            let new = FakeServer::start(Shard { id: 2, ..only_shard() });
            let client = client(&[&old]);
            let error = client.get_pages(&blocks(0, 1), within(SHORT)).await.expect_err("no owner");
            assert!(error.to_string().contains("generation 9 owns it"), "{error}");
            let replace = async {
                driver::sleep(SHORT).await;
                client.replace_shards(vec![new.place()]).expect("a sound map");
            };
            let wanted = blocks(0, 3);
            let (pages, ()) = futures_util::future::join(client.get_pages(&wanted, soon()), replace).await;
            assert_eq!(3, check(&pages.expect("pages").bytes, 0, 3)[2]);
        }
    });
}

#[test]
fn a_server_that_is_not_the_one_of_the_map_is_asked_nothing() {
    run(async {
        let half = HashRange::even_part(0, 2);
        let welcomes: [fn(PageWelcome) -> PageWelcome; 3] = [
            |welcome| PageWelcome { range: HashRange::even_part(0, 2), ..welcome },
            |welcome| PageWelcome { stripe_blocks: 16, ..welcome },
            |welcome| PageWelcome { generation: ShardGeneration(8), ..welcome },
        ];
        for welcome in welcomes {
            let server = server(move |_, message, out| match message {
                PageMessage::PageHello(_) => {
                    put(&PageMessage::PageWelcome(welcome(only_shard().welcome())), out);
                    Some(After::GoOn)
                }
                other => panic!("asked {other:?}"),
            });
            let place = ShardAddress { generation: ShardGeneration(3), ..server.place() };
            let client = PageClient::new(ClientConfig { shards: vec![place], ..config(&[]) }).expect("a sound map");
            let error = client.get_pages(&blocks(0, 1), within(SHORT)).await.expect_err("another server");
            assert!(error.to_string().contains("not the one of the shard map"), "{error} {half:?}");
        }
    });
}

/// A flipped bit on the way, or in the server's memory behind the checksum, is never handed out.
#[test]
fn pages_that_arrive_damaged_are_asked_again() {
    run(async {
        let damaged = Rc::new(Cell::new(2));
        let left = Rc::clone(&damaged);
        let server = server(move |_, message, out| match message {
            PageMessage::GetPages(get) if left.get() > 0 => {
                left.set(left.get() - 1);
                let mut bytes = page(TABLE, get.first_block, 1);
                let checksum = Pages::new(get.id, get.request_lsn, &bytes).checksum;
                bytes[4711] ^= 1;
                put(&PageMessage::Pages(Pages { id: get.id, lsn: get.request_lsn, checksum, bytes: &bytes }), out);
                Some(After::GoOn)
            }
            _ => None,
        });
        let client = client(&[&server]);
        read_one(&client, 9).await;
        assert_eq!(0, damaged.get());
        damaged.set(usize::MAX);
        let error = client.get_pages(&blocks(9, 1), within(SHORT)).await.expect_err("always damaged");
        assert!(error.to_string().contains("damaged"), "{error}");
    });
}

#[test]
fn an_answer_to_something_else_is_an_error() {
    run(async {
        let server = server(|_, message, out| match message {
            PageMessage::GetPages(get) => {
                let bytes = page(TABLE, get.first_block, 1);
                put(&PageMessage::Pages(Pages::new(get.id, get.request_lsn, &bytes)), out);
                Some(After::GoOn)
            }
            PageMessage::GetSizes(get) => {
                put(&PageMessage::Pages(Pages::new(get.id, Lsn(8), &page(TABLE, 0, 1))), out);
                Some(After::GoOn)
            }
            _ => None,
        });
        let client = client(&[&server]);
        let error = client.get_pages(&blocks(0, 2), soon()).await.expect_err("one page for two");
        assert!(matches!(&error.cause, Cause::Unfit(text) if text.contains("8192 bytes for 2 pages")), "{error}");
        let error = client.sizes(Lsn(8), soon()).await.expect_err("pages for lengths");
        assert!(matches!(error.cause, Cause::Unfit(_)), "{error}");
        read_one(&client, 0).await;
    });
}

#[test]
fn bytes_that_are_not_the_protocol_end_the_connection_only() {
    run(async {
        let server = server(|connection, message, out| match (connection, message) {
            (1, PageMessage::PageHello(_)) => {
                out.extend_from_slice(b"HTTP/1.1 400 Bad Request\r\n\r\n");
                Some(After::GoOn)
            }
            (2, PageMessage::GetPages(_)) => {
                put(&PageMessage::PageWelcome(only_shard().welcome()), out);
                Some(After::GoOn)
            }
            _ => None,
        });
        let client = client(&[&server]);
        read_one(&client, 0).await;
        assert_eq!(3, server.connections());
    });
}

/// A frozen server's kernel goes on to take connections and bytes.
#[test]
fn a_server_that_is_silent_is_left_and_tried_again() {
    run(async {
        let server = server(|connection, message, _| match (connection, message) {
            // Not even a welcome; then no answer.
            (1, _) => Some(After::GoOn),
            (2, PageMessage::GetPages(_)) => Some(After::GoOn),
            _ => None,
        });
        let client = client(&[&server]);
        read_one(&client, 0).await;
        assert_eq!(3, server.connections());
    });
}

#[test]
fn dropping_the_client_ends_its_connections() {
    run(async {
        let server = FakeServer::start(only_shard());
        let client = client(&[&server]);
        read_one(&client, 0).await;
        drop(client);
        server.ended(1).await;
        // A new one is not disturbed by the end of the old.
        let client = support::client(&[&server]);
        let read = BlockRead { request_lsn: INGESTED, ..blocks(1, 1) };
        check(&client.get_pages(&read, soon()).await.expect("a page").bytes, 1, 1);
        assert_eq!(2, server.connections());
    });
}

struct Certificates(PathBuf);

impl Certificates {
    fn new() -> Certificates {
        let directory = std::env::temp_dir().join(format!("pageclient-{}", uuid::Uuid::new_v4()));
        ca::init(&directory, LOG.cluster).expect("an authority");
        Certificates(directory)
    }

    fn issue(&self, role: Role, name: &str) -> Tls {
        let files = ca::issue(&self.0, role, name, &["127.0.0.1".to_owned()]).expect("a certificate");
        Tls::load(files).expect("sound files")
    }
}

impl Drop for Certificates {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).expect("own directory");
    }
}

#[test]
fn only_page_servers_of_the_cluster_are_believed() {
    let certificates = Certificates::new();
    run(async {
        let shard = only_shard();
        for (role, believed) in [(Role::PageServer, true), (Role::Compute, false)] {
            let tls = certificates.issue(role, &format!("server-{believed}"));
            let server = FakeServer::at("127.0.0.1:0", shard, Some(tls), move |_, message, out| {
                assert!(believed, "asked {message:?}");
                shard.answer(message, out);
                After::GoOn
            });
            let tls = Some(certificates.issue(Role::Compute, "reader"));
            let client = PageClient::new(ClientConfig { tls, ..config(&[&server]) }).expect("a sound map");
            if believed {
                let pages = client.get_pages(&blocks(0, 500), soon()).await.expect("pages");
                check(&pages.bytes, 0, 500);
                continue;
            }
            let error = client.get_pages(&blocks(0, 1), within(SHORT)).await.expect_err("not believed");
            assert!(error.to_string().contains("role compute"), "{error}");
        }
    });
}
