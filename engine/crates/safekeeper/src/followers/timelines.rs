//! Which timelines followers may know of, and where each ends.

use consensus::message::TimelineEntry;
use pgtypes::{Lsn, PgTimeline};

/// The timelines that are decided at `readable`: the first, and those of which something is committed. A later one could
/// still be lost with the writer that began it, and another begin in its place.
pub(super) fn decided(timelines: &[TimelineEntry], readable: Lsn) -> &[TimelineEntry] {
    let first = usize::from(!timelines.is_empty());
    let later = timelines.iter().skip(1).take_while(|entry| entry.start_lsn < readable).count();
    &timelines[..first + later]
}

/// The current timeline.
pub(super) fn current(timelines: &[TimelineEntry], readable: Lsn) -> PgTimeline {
    decided(timelines, readable).last().map_or(PgTimeline(1), |entry| entry.timeline)
}

/// Where a timeline ended and which follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Switch {
    /// End of the timeline: first byte of the next.
    pub(super) end_lsn: Lsn,
    /// The next.
    pub(super) next: PgTimeline,
}

/// A timeline of the history.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Found {
    /// It is the current one.
    Current,
    /// It has ended.
    Historic(Switch),
    /// It is not in the history.
    Unknown,
}

/// What is known of `timeline`.
pub(super) fn find(timelines: &[TimelineEntry], readable: Lsn, timeline: PgTimeline) -> Found {
    let decided = decided(timelines, readable);
    match decided.iter().position(|entry| entry.timeline == timeline) {
        None => Found::Unknown,
        Some(at) => match decided.get(at + 1) {
            None => Found::Current,
            Some(next) => Found::Historic(Switch { end_lsn: next.start_lsn, next: next.timeline }),
        },
    }
}

/// The timeline that the byte before `lsn` belongs to.
pub(super) fn timeline_at(timelines: &[TimelineEntry], readable: Lsn, lsn: Lsn) -> PgTimeline {
    let decided = decided(timelines, readable);
    let last = decided.iter().rev().find(|entry| entry.start_lsn < lsn).or(decided.first());
    last.map_or(PgTimeline(1), |entry| entry.timeline)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history() -> Vec<TimelineEntry> {
        [(1, 0x100), (2, 0x200), (4, 0x300)]
            .map(|(timeline, start)| TimelineEntry {
                timeline: PgTimeline(timeline),
                start_lsn: Lsn(start),
                history_file: Vec::new(),
            })
            .to_vec()
    }

    /// A promotion that is not committed yet may be taken back: followers stay on the old timeline, at its end.
    #[test]
    fn timeline_is_known_once_something_of_it_is_committed() {
        for (readable, expected) in [(0x100, 1), (0x200, 1), (0x208, 2), (0x300, 2), (0x308, 4)] {
            assert_eq!(PgTimeline(expected), current(&history(), Lsn(readable)), "{readable:x}");
        }
    }

    #[test]
    fn ended_timelines_name_their_successor() {
        let switch = |end, next| Found::Historic(Switch { end_lsn: Lsn(end), next: PgTimeline(next) });
        for (timeline, expected) in [
            (1, switch(0x200, 2)),
            (2, switch(0x300, 4)),
            (4, Found::Current),
            (3, Found::Unknown),
            (5, Found::Unknown),
        ] {
            assert_eq!(expected, find(&history(), Lsn(0x400), PgTimeline(timeline)), "{timeline}");
        }
        assert_eq!(Found::Current, find(&history(), Lsn(0x200), PgTimeline(1)));
        assert_eq!(Found::Unknown, find(&history(), Lsn(0x200), PgTimeline(2)));
    }

    #[test]
    fn position_belongs_to_the_timeline_of_the_byte_before() {
        for (lsn, expected) in [(0x100, 1), (0x200, 1), (0x208, 2), (0x300, 2), (0x400, 4)] {
            assert_eq!(PgTimeline(expected), timeline_at(&history(), Lsn(0x400), Lsn(lsn)), "{lsn:x}");
        }
    }
}
