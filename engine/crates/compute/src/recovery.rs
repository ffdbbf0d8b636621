//! How a writer comes to a PGDATA that ends at X: the plan, without acting on it.
//!
//! Pure. `restore.rs` acts. PGDATA is never trusted unless its clean stop is marked and ended exactly at X (rule V7):
//! PostgreSQL's own crash recovery would replay WAL that the log does not have.

use pgtypes::{FrameSummary, LogId, Lsn, PgTimeline};

use crate::data_dir::CleanMark;

/// What the plan is made from.
#[derive(Clone, Copy, Debug)]
pub struct Situation<'a> {
    /// The log that this agent writes.
    pub log: LogId,
    /// X: the end of the log, as elected and committed.
    pub end_of_log: FrameSummary,
    /// The log's timelines with their starts, ascending.
    pub timelines: &'a [(PgTimeline, Lsn)],
    /// The base backup: its end S, where its segment starts, its timeline.
    pub base: BasePosition,
    /// The mark of a clean stop in the agent's directory.
    pub mark: Option<CleanMark>,
    /// Where the agent's PGDATA ends, when it is cleanly shut down.
    pub local_end: Option<Lsn>,
}

/// Where a base backup lies in the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BasePosition {
    /// S.
    pub end: Lsn,
    /// Start of the segment that holds S.
    pub segment_start: Lsn,
    /// Timeline at S.
    pub timeline: PgTimeline,
}

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Plan {
    /// PGDATA ends at X after a clean stop: start it as it is.
    Reuse,
    /// The base backup reaches to X or beyond: restore it, start it, and propose its WAL from X on.
    StartFromBase,
    /// Restore the base backup, replay the log, promote behind its last record.
    Replay {
        /// Start of the last record of the log (`recovery_target_lsn`, inclusive).
        last_record: Lsn,
    },
}

/// The base backup does not belong to this log.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PlanError {
    /// It ends in a later segment than the log.
    #[error("the base backup ends at {base_end}, beyond the log, which ends at {end_of_log}: it is of another history")]
    BeyondLog {
        /// S.
        base_end: Lsn,
        /// X.
        end_of_log: Lsn,
    },
    /// The log has another timeline at its end.
    #[error("the base backup ends at {base_end} on timeline {}, where the log is on timeline {}", .base_timeline.0, .log_timeline.0)]
    OtherTimeline {
        /// S.
        base_end: Lsn,
        /// The backup's timeline.
        base_timeline: PgTimeline,
        /// The log's there.
        log_timeline: PgTimeline,
    },
    /// The log begins behind it and nothing is known of the records between.
    #[error(
        "the base backup ends at {base_end}, but the log, which ends at {end_of_log}, holds no record to replay to"
    )]
    NoRecord {
        /// S.
        base_end: Lsn,
        /// X.
        end_of_log: Lsn,
    },
}

/// Chooses how to start.
///
/// # Errors
/// The base backup does not fit the log; the user must name another.
pub fn plan(situation: &Situation<'_>) -> Result<Plan, PlanError> {
    let end = situation.end_of_log.record_end;
    let base = situation.base;
    if let Some(mark) = situation.mark
        && mark.log == situation.log
        && mark.end == end
        && situation.local_end == Some(end)
    {
        return Ok(Plan::Reuse);
    }
    if base.segment_start > end {
        return Err(PlanError::BeyondLog { base_end: base.end, end_of_log: end });
    }
    if let Some(log_timeline) = timeline_before(situation.timelines, base.end.min(end))
        && log_timeline != base.timeline
        && base.end <= end
    {
        return Err(PlanError::OtherTimeline { base_end: base.end, base_timeline: base.timeline, log_timeline });
    }
    if base.end >= end {
        return Ok(Plan::StartFromBase);
    }
    match situation.end_of_log.record_start {
        start if start.is_valid() => Ok(Plan::Replay { last_record: start }),
        _ => Err(PlanError::NoRecord { base_end: base.end, end_of_log: end }),
    }
}

/// Timeline of the byte before `lsn`; `None` when the log begins there or later.
fn timeline_before(timelines: &[(PgTimeline, Lsn)], lsn: Lsn) -> Option<PgTimeline> {
    timelines.iter().rev().find(|(_, start)| *start < lsn).map(|(timeline, _)| *timeline)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pgtypes::{Attempt, Ballot, BranchId, ClusterId, Term};

    const SEGMENT: u64 = 16 << 20;
    const LOG: LogId = LogId { cluster: ClusterId([1; 16]), branch: BranchId([2; 16]) };
    const TIMELINES: [(PgTimeline, Lsn); 2] = [(PgTimeline(1), Lsn(SEGMENT)), (PgTimeline(2), Lsn(SEGMENT + 5000))];

    fn situation(end_of_log: u64, base_end: u64) -> Situation<'static> {
        let record_start = if end_of_log > SEGMENT { Lsn(end_of_log - 100) } else { Lsn::INVALID };
        Situation {
            log: LOG,
            end_of_log: FrameSummary { record_end: Lsn(end_of_log), record_start, ..FrameSummary::default() },
            timelines: &TIMELINES,
            base: BasePosition {
                end: Lsn(base_end),
                segment_start: Lsn(base_end).floor(SEGMENT),
                timeline: PgTimeline(1),
            },
            mark: None,
            local_end: None,
        }
    }

    fn mark(end: u64) -> Option<CleanMark> {
        let ballot = Ballot { term: Term(1), attempt: Attempt(1) };
        Some(CleanMark { log: LOG, ballot, end: Lsn(end) })
    }

    #[test]
    fn an_empty_log_begins_with_the_base_backup() {
        assert_eq!(Ok(Plan::StartFromBase), plan(&situation(SEGMENT, SEGMENT + 2000)));
    }

    /// A writer that died while it proposed the base backup's own WAL.
    #[test]
    fn a_log_that_ends_inside_the_base_backups_wal_goes_on_with_it() {
        assert_eq!(Ok(Plan::StartFromBase), plan(&situation(SEGMENT + 1000, SEGMENT + 2000)));
        assert_eq!(Ok(Plan::StartFromBase), plan(&situation(SEGMENT + 2000, SEGMENT + 2000)));
    }

    #[test]
    fn a_longer_log_is_replayed_to_its_last_record() {
        let expected = Plan::Replay { last_record: Lsn(SEGMENT + 9000 - 100) };
        assert_eq!(Ok(expected), plan(&situation(SEGMENT + 9000, SEGMENT + 2000)));
    }

    #[test]
    fn pgdata_is_reused_only_after_a_marked_clean_stop_that_ends_at_x() {
        let end = SEGMENT + 9000;
        let clean = Situation { mark: mark(end), local_end: Some(Lsn(end)), ..situation(end, SEGMENT + 2000) };
        assert_eq!(Ok(Plan::Reuse), plan(&clean));
        let other_log = LogId { branch: BranchId([9; 16]), ..LOG };
        let unfit = [
            Situation { mark: None, ..clean },
            Situation { mark: mark(end - 8), ..clean },
            Situation { local_end: None, ..clean },
            Situation { local_end: Some(Lsn(end + 8)), ..clean },
            Situation { log: other_log, ..clean },
        ];
        for situation in unfit {
            assert!(matches!(plan(&situation), Ok(Plan::Replay { .. })), "{situation:?}");
        }
    }

    #[test]
    fn a_base_backup_of_another_history_is_refused() {
        let beyond = plan(&situation(SEGMENT, 2 * SEGMENT + 2000));
        assert_eq!(Err(PlanError::BeyondLog { base_end: Lsn(2 * SEGMENT + 2000), end_of_log: Lsn(SEGMENT) }), beyond);
        // The log went on with timeline 2 before this backup ended on timeline 1.
        let other = plan(&situation(SEGMENT + 9000, SEGMENT + 6000));
        let base_end = Lsn(SEGMENT + 6000);
        let (base_timeline, log_timeline) = (PgTimeline(1), PgTimeline(2));
        assert_eq!(Err(PlanError::OtherTimeline { base_end, base_timeline, log_timeline }), other);
    }
}
