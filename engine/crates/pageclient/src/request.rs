//! Requests as they are sent, and what is gathered of their answers.

use std::mem;

use layers::Key;
use pgtypes::Lsn;
use wal::{Fork, RelFileLocator};
use wire::{
    append::WireError,
    page::{
        FindLsn, GetMetadata, GetPages, GetSizes, MetadataJoin, PAGE_BYTES, PageMessage, PutAdvisory, StripeLength,
        TakeLease, encode_to_vec,
    },
};

/// Lengths that one shard may name: 2^26 stripes are a PiB.
const LENGTHS_MAX: usize = 1 << 26;

/// A request to one shard.
#[derive(Clone, Copy)]
pub enum Request<'a> {
    Pages {
        relation: RelFileLocator,
        fork: Fork,
        first_block: u32,
        count: u16,
        request_lsn: Lsn,
        not_modified_since: Lsn,
    },
    Sizes(Lsn),
    Metadata(Lsn),
    Lease {
        lsn: Lsn,
        seconds: u32,
    },
    Advisory {
        name: &'a str,
        contents: &'a [u8],
    },
    FindLsn(i64),
}

impl Request<'_> {
    /// Its frame.
    pub fn encode(&self, id: u64) -> Result<Vec<u8>, WireError> {
        encode_to_vec(&match *self {
            Request::Pages { relation, fork, first_block, count, request_lsn, not_modified_since } => {
                let get = GetPages { id, relation, fork, first_block, count, request_lsn, not_modified_since };
                PageMessage::GetPages(get)
            }
            Request::Sizes(at) => PageMessage::GetSizes(GetSizes { id, at }),
            Request::Metadata(at) => PageMessage::GetMetadata(GetMetadata { id, at }),
            Request::Lease { lsn, seconds } => PageMessage::TakeLease(TakeLease { id, lsn, seconds }),
            Request::Advisory { name, contents } => PageMessage::PutAdvisory(PutAdvisory { id, name, contents }),
            Request::FindLsn(timestamp) => PageMessage::FindLsn(FindLsn { id, timestamp }),
        })
    }

    /// What is gathered of its answer.
    pub fn gather(&self) -> Gather {
        match *self {
            Request::Pages { count, .. } => Gather::Pages { count },
            Request::Sizes(_) => Gather::Sizes(None, Vec::new()),
            Request::Metadata(_) => Gather::Metadata(MetadataJoin::default()),
            Request::Lease { .. } => Gather::Lease,
            Request::Advisory { .. } => Gather::Advisory,
            Request::FindLsn(_) => Gather::FindLsn,
        }
    }
}

/// An answer as far as it has arrived.
pub enum Gather {
    Pages { count: u16 },
    Sizes(Option<Lsn>, Vec<StripeLength>),
    Metadata(MetadataJoin),
    Lease,
    Advisory,
    FindLsn,
}

/// A whole answer.
#[derive(Debug)]
pub enum Answer {
    Pages { lsn: Lsn, bytes: Vec<u8> },
    Sizes { lsn: Lsn, entries: Vec<StripeLength> },
    Metadata { lsn: Lsn, values: Vec<(Key, Vec<u8>)> },
    Lease { lsn: Lsn, seconds: u32 },
    Advisory { lsn: Lsn },
    FindLsn { lsn: Lsn, commit_timestamp: i64 },
}

/// What an answer's part is good for.
pub enum Gathered {
    /// More follows.
    Partly,
    Whole(Answer),
    /// Bytes were changed on their way, or where they came from: ask again.
    Damaged,
    /// It is no answer to this request.
    Unfit(String),
}

impl Gather {
    /// Begins anew: the connection broke.
    pub fn reset(&mut self) {
        match self {
            Gather::Sizes(lsn, entries) => (*lsn, *entries) = (None, Vec::new()),
            Gather::Metadata(join) => *join = MetadataJoin::default(),
            Gather::Pages { .. } | Gather::Lease | Gather::Advisory | Gather::FindLsn => {}
        }
    }

    /// Takes the next part.
    pub fn add(&mut self, message: &PageMessage<'_>) -> Gathered {
        match (self, message) {
            (Gather::Pages { count }, PageMessage::Pages(pages)) => {
                if pages.bytes.len() != usize::from(*count) * PAGE_BYTES {
                    return Gathered::Unfit(format!("{} bytes for {count} pages", pages.bytes.len()));
                }
                if !pages.is_intact() {
                    return Gathered::Damaged;
                }
                Gathered::Whole(Answer::Pages { lsn: pages.lsn, bytes: pages.bytes.to_vec() })
            }
            (Gather::Sizes(lsn, entries), PageMessage::Sizes(sizes)) => {
                if *lsn.get_or_insert(sizes.lsn) != sizes.lsn {
                    return Gathered::Unfit("lengths as of different positions".to_owned());
                }
                if entries.len() + sizes.entries.len() > LENGTHS_MAX {
                    return Gathered::Unfit(format!("more than {LENGTHS_MAX} lengths"));
                }
                entries.extend_from_slice(&sizes.entries);
                match sizes.last {
                    true => Gathered::Whole(Answer::Sizes { lsn: sizes.lsn, entries: mem::take(entries) }),
                    false => Gathered::Partly,
                }
            }
            (Gather::Metadata(join), PageMessage::MetadataPart(part)) => match join.add(part) {
                Ok(None) => Gathered::Partly,
                Ok(Some((lsn, values))) => Gathered::Whole(Answer::Metadata { lsn, values }),
                Err(error) => Gathered::Unfit(error.to_string()),
            },
            (Gather::Lease, PageMessage::LeaseGranted(lease)) => {
                Gathered::Whole(Answer::Lease { lsn: lease.lsn, seconds: lease.seconds })
            }
            (Gather::Advisory, PageMessage::AdvisoryTaken(taken)) => {
                Gathered::Whole(Answer::Advisory { lsn: taken.lsn })
            }
            (Gather::FindLsn, PageMessage::LsnFound(found)) => {
                Gathered::Whole(Answer::FindLsn { lsn: found.lsn, commit_timestamp: found.commit_timestamp })
            }
            (_, message) => Gathered::Unfit(format!("unexpected {:?}", message.message_type())),
        }
    }
}
