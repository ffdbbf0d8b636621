//! Safekeepers that do not feed this shard are told what it has in object storage, or they would keep its WAL for ever.

use std::{convert::Infallible, rc::Rc, time::Duration};

use pgtypes::{FrameSummary, Lsn};
use wire::append::{FeedProgress, FrameReader, Hello, Message, Purpose, decode, encode_to_vec};

use crate::{
    feed::{FeedError, STEP_LIMIT, open},
    owner::Owner,
};

/// How often they are told, while something moves. WAL that they keep for that long is a fraction of what a freeze holds.
const INTERVAL: Duration = Duration::from_secs(5);

/// Tells all safekeepers but the one that feeds the shard, until the process ends.
pub async fn tell_others(owner: Rc<Owner>) {
    const TROUBLE: &str = "a safekeeper was not told what is in object storage";
    let mut told: Vec<Option<Lsn>> = vec![None; owner.process.config.safekeepers.len()];
    while owner.pause(INTERVAL).await {
        let durable = owner.durable();
        let mut failed = None;
        for (safekeeper, told) in owner.process.config.safekeepers.iter().zip(&mut told) {
            let feeds = owner.source.borrow().name == safekeeper.append;
            if feeds || *told == Some(durable) {
                continue;
            }
            match driver::timeout(STEP_LIMIT, tell(&owner, &safekeeper.append, durable)).await {
                Some(Ok(())) => *told = Some(durable),
                Some(Err(error)) => failed = Some(format!("{}: {error}", safekeeper.append)),
                None => failed = Some(format!("{}: no answer within {STEP_LIMIT:?}", safekeeper.append)),
            }
        }
        // One that is down is told when it is back.
        match failed {
            Some(text) => owner.report(TROUBLE, &text),
            None => owner.solved(TROUBLE),
        }
    }
}

/// Registers again, which changes nothing, and says behind it how far the shard is.
async fn tell(owner: &Owner, address: &str, durable: Lsn) -> Result<(), FeedError> {
    let hello = Hello {
        log: owner.log(),
        system_id: owner.system_id,
        purpose: Purpose::Feed {
            shard: owner.shard(),
            generation: owner.generation(),
            range: owner.range(),
            stripe_blocks: owner.striping.stripe_blocks,
            from: FrameSummary::default(),
        },
    };
    let progress = FeedProgress { received: owner.ingested().max(durable), durable };
    let mut connection = open(hello, address, owner.process.tls.as_ref()).await?;
    connection.write_all(encode_to_vec(&Message::FeedProgress(progress))?).await.0?;
    match read_to_the_end(&mut connection).await {
        Err(FeedError::Closed) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Reads the answer and the end behind it: a connection that is closed with unread bytes could take the progress with it.
async fn read_to_the_end(connection: &mut driver::Connection) -> Result<Infallible, FeedError> {
    let mut frames = FrameReader::new();
    loop {
        while let Some(frame) = frames.next()? {
            match decode(frame)? {
                Message::FeedBatch(_) => {}
                Message::Error(error) => return Err(FeedError::Refused(error.code, error.text)),
                _ => return Err(FeedError::Unexpected),
            }
        }
        let (result, buffer) = connection.read(frames.take_buffer(true)).await;
        frames.return_buffer(buffer);
        if result? == 0 {
            return Err(FeedError::Closed);
        }
    }
}
