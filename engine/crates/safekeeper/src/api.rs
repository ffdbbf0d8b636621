//! JSON of the admin port, for the server and for the commands that call it. Described in `docs/admin-api.md`.
//!
//! Identities and positions are texts; so are 64-bit numbers that a JSON reader might round.

use std::{fmt, str::FromStr};

use consensus::{AcceptorIdentity, Configuration, Member, TimelineHistory};
use pgtypes::{Attempt, Ballot, BranchId, ClusterId, DiskId, Generation, Lsn, MemberId, Term, WriterId};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::feed::Subscriber;

mod text {
    use super::{Deserialize, Deserializer, FromStr, Serializer, de, fmt};

    pub fn serialize<T: fmt::Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: fmt::Display>,
        D: Deserializer<'de>,
    {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|error| de::Error::custom(format!("{text:?}: {error}")))
    }
}

/// `GET /v1/status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Its number in membership configurations.
    pub member: u32,
    /// The identity of its disk.
    #[serde(with = "text")]
    pub disk: DiskId,
    /// Of the program.
    pub version: String,
    /// `io_uring` or `polling`.
    pub driver: String,
    /// Whether segments are written past the page cache.
    pub direct_io: bool,
    /// Port of the append protocol.
    pub append_port: u16,
    /// Port of PostgreSQL's replication protocol.
    pub replication_port: u16,
    /// Whether appends that need a new segment are refused.
    pub disk_full: bool,
    /// All logs that could be opened, in order.
    pub logs: Vec<LogStatus>,
    /// Logs that could not: they take part in nothing.
    pub damaged: Vec<DamagedLog>,
}

/// A log that could not be opened.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DamagedLog {
    /// The lakebase.
    #[serde(with = "text")]
    pub cluster: ClusterId,
    /// Its branch.
    #[serde(with = "text")]
    pub branch: BranchId,
    /// Why.
    pub message: String,
}

/// `GET /v1/logs/{cluster}/{branch}`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LogStatus {
    /// The lakebase.
    #[serde(with = "text")]
    pub cluster: ClusterId,
    /// Its branch.
    #[serde(with = "text")]
    pub branch: BranchId,
    /// Whether it takes part.
    pub state: LogState,
    /// PostgreSQL's `system_identifier`.
    #[serde(with = "text")]
    pub system_id: u64,
    /// Size of PostgreSQL's WAL segments.
    pub segment_bytes: u64,
    /// Where the log began on this safekeeper.
    #[serde(with = "text")]
    pub start_lsn: Lsn,
    /// The highest term it was fenced to.
    pub term: u64,
    /// The last attempt of that term that it voted for; 0 after a fence.
    pub attempt: u32,
    /// To whom that term was granted.
    #[serde(with = "text")]
    pub writer: WriterId,
    /// Members.
    pub configuration: ConfigurationJson,
    /// Durable end, a record end.
    #[serde(with = "text")]
    pub flush_lsn: Lsn,
    /// Committed, as far as it knows.
    #[serde(with = "text")]
    pub commit_lsn: Lsn,
    /// First position that it still holds.
    #[serde(with = "text")]
    pub oldest_lsn: Lsn,
    /// PostgreSQL timeline at `flush_lsn`.
    pub timeline: u32,
    /// Largest transaction id up to `flush_lsn`, with its epoch.
    #[serde(with = "text")]
    pub max_full_xid: u64,
    /// Sections of the log, in order.
    pub timelines: Vec<TimelineJson>,
    /// For whom WAL is kept.
    pub consumers: Vec<ConsumerJson>,
    /// For which shards WAL is kept, in order of their numbers.
    #[serde(default)]
    pub shards: Vec<ShardJson>,
    /// Segment files.
    pub segments: usize,
    /// Starts of segments that failed their checksum.
    pub damaged_segments: Vec<String>,
    /// Appends are refused until space returns.
    pub disk_full: bool,
}

/// A PostgreSQL timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineJson {
    /// Its number.
    pub timeline: u32,
    /// Where it begins.
    #[serde(with = "text")]
    pub start_lsn: Lsn,
}

/// Someone for whom WAL is kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsumerJson {
    /// Of its slot.
    pub name: String,
    /// It needs nothing below.
    #[serde(with = "text")]
    pub confirmed_lsn: Lsn,
}

/// A shard of the page service, as the log knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardJson {
    /// Its number.
    pub shard: u32,
    /// The highest generation that registered.
    pub generation: u64,
    /// It has everything below on object storage.
    #[serde(with = "text")]
    pub durable_lsn: Lsn,
    /// Committed WAL that it has not on object storage.
    pub durable_lag_bytes: u64,
    /// The page server that is connected, if one is.
    pub feed: Option<FeedJson>,
}

/// A page server that is fed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FeedJson {
    /// Sent up to here.
    #[serde(with = "text")]
    pub sent_lsn: Lsn,
    /// Taken in up to here, as it last said.
    #[serde(with = "text")]
    pub received_lsn: Lsn,
    /// Committed WAL that it has not taken in.
    pub received_lag_bytes: u64,
}

impl ShardJson {
    fn new(shard: &logstore::Shard, commit_lsn: Lsn, subscribers: &[Subscriber]) -> Self {
        let behind = |lsn: Lsn| commit_lsn.0.saturating_sub(lsn.0);
        // The one that came last: an earlier connection of the same owner may not have noticed its end yet.
        let found = subscribers
            .iter()
            .rev()
            .find(|subscriber| (subscriber.shard, subscriber.generation) == (shard.shard, shard.generation));
        Self {
            shard: shard.shard.0,
            generation: shard.generation.0,
            durable_lsn: shard.durable_lsn,
            durable_lag_bytes: behind(shard.durable_lsn),
            feed: found.map(|subscriber| FeedJson {
                sent_lsn: subscriber.sent_lsn,
                received_lsn: subscriber.received_lsn,
                received_lag_bytes: behind(subscriber.received_lsn),
            }),
        }
    }
}

/// Body of `PUT /v1/logs/{cluster}/{branch}/consumers/{name}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetConsumer {
    /// It needs nothing below.
    #[serde(with = "text")]
    pub confirmed_lsn: Lsn,
}

/// Whether a log takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogState {
    /// It does.
    Serving,
    /// A disk operation failed; read-only until the process is restarted.
    Failed,
}

/// A membership configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigurationJson {
    /// Raised by 1 at each change.
    pub generation: u32,
    /// The members.
    pub members: Vec<MemberJson>,
    /// In a joint configuration, the members to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_members: Option<Vec<MemberJson>>,
}

/// One member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberJson {
    /// Its number.
    pub member: u32,
    /// The identity of its disk.
    #[serde(with = "text")]
    pub disk: DiskId,
    /// `host:port` of its append protocol.
    pub address: String,
}

/// Body of `PUT /v1/logs/{cluster}/{branch}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateLog {
    /// PostgreSQL's `system_identifier`.
    #[serde(with = "text")]
    pub system_id: u64,
    /// Size of PostgreSQL's WAL segments.
    pub segment_bytes: u64,
    /// Start of the segment in which the base backup ends.
    #[serde(with = "text")]
    pub start_lsn: Lsn,
    /// PostgreSQL timeline there.
    pub timeline: u32,
    /// Largest transaction id there, with its epoch.
    #[serde(with = "text")]
    pub max_full_xid: u64,
    /// The members; the safekeeper's own disk is among them.
    pub configuration: ConfigurationJson,
    /// The shards whose pages as of `start_lsn` are on object storage: WAL is kept for each until it has it there, too. Without
    /// any, writers start from a base backup, and all WAL behind that is kept.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shards: Vec<u32>,
}

/// Body of `POST /v1/logs/{cluster}/{branch}/fence`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fence {
    /// The term granted.
    pub term: u64,
    /// To whom.
    #[serde(with = "text")]
    pub writer: WriterId,
}

/// Its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fenced {
    /// As asked.
    pub term: u64,
    /// As asked.
    #[serde(with = "text")]
    pub writer: WriterId,
    /// End of the log.
    #[serde(with = "text")]
    pub flush_lsn: Lsn,
    /// Who wrote it.
    pub last_ballot: BallotJson,
    /// Of the configuration: the fence counts for majorities of this generation.
    pub generation: u32,
    /// How long the lease promised to earlier writers still runs.
    pub promise_remaining_ms: u64,
}

/// Term and attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BallotJson {
    /// Granted.
    pub term: u64,
    /// Of its writer.
    pub attempt: u32,
}

/// Answer of `PUT /v1/logs/{cluster}/{branch}/membership`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MembershipChanged {
    /// That is durable.
    pub generation: u32,
}

/// Body of every answer that is not a success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// For programs: a fixed word.
    pub error: String,
    /// For people.
    pub message: String,
}

impl From<&Member> for MemberJson {
    fn from(member: &Member) -> Self {
        Self { member: member.member.0, disk: member.disk, address: member.address.clone() }
    }
}

impl From<MemberJson> for Member {
    fn from(member: MemberJson) -> Self {
        Self { member: MemberId(member.member), disk: member.disk, address: member.address }
    }
}

impl From<&Configuration> for ConfigurationJson {
    fn from(configuration: &Configuration) -> Self {
        let members = |members: &Vec<Member>| members.iter().map(MemberJson::from).collect();
        Self {
            generation: configuration.generation.0,
            members: members(&configuration.members),
            new_members: configuration.new_members.as_ref().map(members),
        }
    }
}

impl From<ConfigurationJson> for Configuration {
    fn from(configuration: ConfigurationJson) -> Self {
        let members = |members: Vec<MemberJson>| members.into_iter().map(Member::from).collect();
        Self {
            generation: Generation(configuration.generation),
            members: members(configuration.members),
            new_members: configuration.new_members.map(members),
        }
    }
}

impl From<Ballot> for BallotJson {
    fn from(ballot: Ballot) -> Self {
        Self { term: ballot.term.0, attempt: ballot.attempt.0 }
    }
}

impl From<BallotJson> for Ballot {
    fn from(ballot: BallotJson) -> Self {
        Self { term: Term(ballot.term), attempt: Attempt(ballot.attempt) }
    }
}

impl fmt::Display for BallotJson {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Ballot::from(*self).fmt(f)
    }
}

impl LogStatus {
    /// The status of an open log.
    pub fn new(
        identity: &AcceptorIdentity,
        timelines: &TimelineHistory,
        status: &logstore::LogStatus,
        subscribers: &[Subscriber],
    ) -> Self {
        let acceptor = &status.acceptor;
        Self {
            cluster: identity.log.cluster,
            branch: identity.log.branch,
            state: if status.disk_failed { LogState::Failed } else { LogState::Serving },
            system_id: identity.system.0,
            segment_bytes: identity.segment_bytes,
            start_lsn: identity.start.record_end,
            term: acceptor.ballot.term.0,
            attempt: acceptor.ballot.attempt.0,
            writer: acceptor.writer,
            configuration: ConfigurationJson::from(&acceptor.configuration),
            flush_lsn: acceptor.flush.record_end,
            commit_lsn: acceptor.commit_lsn,
            oldest_lsn: acceptor.oldest_lsn,
            timeline: acceptor.flush.timeline.0,
            max_full_xid: acceptor.flush.max_full_xid,
            timelines: timelines
                .0
                .iter()
                .map(|entry| TimelineJson { timeline: entry.timeline.0, start_lsn: entry.start_lsn })
                .collect(),
            consumers: status
                .consumers
                .iter()
                .map(|consumer| ConsumerJson { name: consumer.name.clone(), confirmed_lsn: consumer.confirmed_lsn })
                .collect(),
            shards: status.shards.iter().map(|shard| ShardJson::new(shard, acceptor.commit_lsn, subscribers)).collect(),
            segments: status.segments,
            damaged_segments: status.damaged.iter().map(|start| logstore::segment_file_name(*start)).collect(),
            disk_full: status.disk_full,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The form that `docs/admin-api.md` shows and that other programs send.
    #[test]
    fn bodies_are_as_documented_and_unknown_keys_are_refused() {
        let text = r#"{"system_id":"7300000000000000001","segment_bytes":16777216,"start_lsn":"0/1000000","timeline":1,
            "max_full_xid":"750","configuration":{"generation":1,"members":[
            {"member":1,"disk":"00010203-0405-0607-0809-0a0b0c0d0e0f","address":"sk-1:7001"}]}}"#;
        let create: CreateLog = serde_json::from_str(text).unwrap();
        assert_eq!((Lsn(0x100_0000), 7_300_000_000_000_000_001), (create.start_lsn, create.system_id));
        assert_eq!(text.replace([' ', '\n'], ""), serde_json::to_string(&create).unwrap());
        let configuration = Configuration::from(create.configuration.clone());
        assert_eq!(create.configuration, ConfigurationJson::from(&configuration));

        let with_shards = text.replacen("\"timeline\"", "\"shards\":[0,7],\"timeline\"", 1);
        assert_eq!(vec![0, 7], serde_json::from_str::<CreateLog>(&with_shards).unwrap().shards);
        let unknown = text.replacen("\"timeline\"", "\"time_line\":1,\"timeline\"", 1);
        assert!(serde_json::from_str::<CreateLog>(&unknown).is_err());
        let bad = serde_json::from_str::<Fence>(r#"{"term":1,"writer":"nobody"}"#).unwrap_err();
        assert!(bad.to_string().contains("not a UUID"), "{bad}");
    }
}
