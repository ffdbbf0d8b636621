//! The membership configuration: who counts for a majority, and which change of it may follow.

use alloc::{string::String, vec::Vec};

use pgtypes::{DiskId, Generation, MemberId};

/// Most members of one set: a majority of five survives two losses; more only slows commits down.
pub const MEMBERS_MAX: usize = 5;

/// One safekeeper of a configuration.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Member {
    /// Its number; unique in the configuration. A replaced disk needs a new number.
    pub member: MemberId,
    /// The disk that may vote under this number.
    pub disk: DiskId,
    /// `host:port` of its append protocol, for proposers and for peers that fetch WAL.
    pub address: String,
}

/// The safekeepers of a log. Changed by one member at a time through a joint configuration.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Configuration {
    /// Raised by 1 at each change.
    pub generation: Generation,
    /// 1, 3 or 5 members; 2 and 4 only on the way from one to the other.
    pub members: Vec<Member>,
    /// In a joint configuration, the members to be: a quorum then needs a majority of both sets.
    pub new_members: Option<Vec<Member>>,
}

/// Why a configuration was refused. The operator's mistake, except [`ConfigurationError::NotCommitted`]: try again.
#[derive(Clone, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum ConfigurationError {
    /// A set is empty or too large.
    #[error("a set of members must have 1 to {MEMBERS_MAX} members")]
    Size,
    /// Two members have one number or one disk, or a number stands for two disks in a joint configuration.
    #[error("member number or disk is used twice")]
    Duplicate,
    /// The generation is not the one after the acceptor's.
    #[error("generation {offered} does not follow generation {known}", offered = .offered.0, known = .known.0)]
    Generation {
        /// Of the acceptor.
        known: Generation,
        /// Of the request.
        offered: Generation,
    },
    /// The same generation with other contents.
    #[error("generation {} exists with other contents", .0.0)]
    Conflict(Generation),
    /// More than one member changes, or the old set of the joint configuration is not the present one.
    #[error("a change must go through a joint configuration of the present members and a set that differs by one")]
    Step,
    /// The members of the final configuration are neither set of the joint one.
    #[error("a joint configuration can only be followed by one of its two sets")]
    OtherMembers,
    /// This acceptor has not heard of a commit counted with the joint configuration yet, or leases of an earlier writer
    /// may still run.
    #[error("no commit was counted with the joint configuration for long enough: wait for the writer, try again")]
    NotCommitted,
    /// The acceptor's disk is not in its own configuration, nor in the offered one.
    #[error("this disk is not a member of the log")]
    NotAMember,
    /// The acceptor's disk failed.
    #[error("a disk operation failed; the log is read-only until the process is restarted")]
    DiskFailed,
}

impl Configuration {
    /// Whether `disk` may vote as `member`.
    pub fn contains(&self, member: MemberId, disk: DiskId) -> bool {
        // Planted for the tests: the number alone admits, so a replaced disk votes with an empty log.
        if cfg!(feature = "bug-replaced-disk-votes") {
            return self.all_members().any(|known| known.member == member);
        }
        self.all_members().any(|known| known.member == member && known.disk == disk)
    }

    /// Every member of either set once, those of the present set first.
    pub fn all_members(&self) -> impl Iterator<Item = &Member> {
        let only_new = self.new_members.iter().flatten();
        self.members.iter().chain(only_new.filter(|new| !self.members.iter().any(|old| old.member == new.member)))
    }

    /// Whether those for whom `has` holds are a majority of each set.
    pub fn is_quorum(&self, has: impl Fn(&Member) -> bool) -> bool {
        self.sets().all(|set| set.iter().filter(|member| has(member)).count() > set.len() / 2)
    }

    /// The largest value that a majority of each set has reached; `None` when some set's majority has no value.
    pub fn quorum_value<T: Ord + Copy>(&self, value: impl Fn(&Member) -> Option<T>) -> Option<T> {
        let mut least: Option<T> = None;
        for set in self.sets() {
            let mut values: Vec<T> = set.iter().filter_map(&value).collect();
            values.sort_unstable_by(|a, b| b.cmp(a));
            let reached = *values.get(set.len() / 2)?;
            least = Some(least.map_or(reached, |least| least.min(reached)));
        }
        least
    }

    /// Whether the configuration is well-formed by itself.
    ///
    /// # Errors
    /// [`ConfigurationError::Size`], [`ConfigurationError::Duplicate`].
    pub fn check(&self) -> Result<(), ConfigurationError> {
        for set in self.sets() {
            if set.is_empty() || set.len() > MEMBERS_MAX {
                return Err(ConfigurationError::Size);
            }
            for (i, a) in set.iter().enumerate() {
                if set[..i].iter().any(|b| a.member == b.member || a.disk == b.disk) {
                    return Err(ConfigurationError::Duplicate);
                }
            }
        }
        // Peers are told apart by number: one number with two disks in one configuration would confuse two of them.
        for new in self.new_members.iter().flatten() {
            if self.members.iter().any(|old| (old.member == new.member) != (old.disk == new.disk)) {
                return Err(ConfigurationError::Duplicate);
            }
        }
        Ok(())
    }

    /// Whether `next` may follow this configuration on an acceptor that heard a commit counted with
    /// `commit_generation`.
    ///
    /// Plain to joint: the present members, and a set that differs by one (added, removed or replaced). Joint to
    /// plain: the new set once a commit was counted with the joint configuration, for then a majority of each set holds
    /// everything committed and has the joint generation, so nobody can count with the generation before it any
    /// more; or back to the old set at any time, since a joint quorum contains a majority of it. Plain to plain:
    /// addresses only.
    ///
    /// # Errors
    /// What is wrong; see [`ConfigurationError`].
    pub fn check_next(&self, next: &Configuration, commit_generation: Generation) -> Result<(), ConfigurationError> {
        next.check()?;
        if Some(next.generation.0) != self.generation.0.checked_add(1) {
            return Err(ConfigurationError::Generation { known: self.generation, offered: next.generation });
        }
        match (&self.new_members, &next.new_members) {
            (None, None) if same_members(&self.members, &next.members) => Ok(()),
            (None, Some(new)) => {
                let added = new.iter().filter(|new| !holds(&self.members, new)).count();
                let removed = self.members.iter().filter(|old| !holds(new, old)).count();
                let one_changes = added <= 1 && removed <= 1 && added + removed > 0;
                match same_members(&self.members, &next.members) && one_changes {
                    true => Ok(()),
                    false => Err(ConfigurationError::Step),
                }
            }
            (Some(_), None) if same_members(&self.members, &next.members) => Ok(()),
            (Some(new), None) if same_members(new, &next.members) => match commit_generation == self.generation {
                true => Ok(()),
                false => Err(ConfigurationError::NotCommitted),
            },
            (Some(_), None) => Err(ConfigurationError::OtherMembers),
            (None, None) | (Some(_), Some(_)) => Err(ConfigurationError::Step),
        }
    }

    fn sets(&self) -> impl Iterator<Item = &Vec<Member>> {
        core::iter::once(&self.members).chain(self.new_members.iter())
    }
}

/// Whether `set` has this member with this disk; addresses do not matter.
fn holds(set: &[Member], member: &Member) -> bool {
    set.iter().any(|other| other.member == member.member && other.disk == member.disk)
}

fn same_members(a: &[Member], b: &[Member]) -> bool {
    a.len() == b.len() && a.iter().all(|member| holds(b, member))
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;

    fn set(numbers: &[u32]) -> Vec<Member> {
        let member =
            |n: &u32| Member { member: MemberId(*n), disk: DiskId([*n as u8; 16]), address: format!("m{n}:1") };
        numbers.iter().map(member).collect()
    }

    fn plain(generation: u32, members: &[u32]) -> Configuration {
        Configuration { generation: Generation(generation), members: set(members), new_members: None }
    }

    fn joint(generation: u32, old: &[u32], new: &[u32]) -> Configuration {
        Configuration { generation: Generation(generation), members: set(old), new_members: Some(set(new)) }
    }

    #[test]
    fn quorum_is_a_majority_of_each_set() {
        let cases: [(Configuration, &[u32], bool); 8] = [
            (plain(1, &[1]), &[1], true),
            (plain(1, &[1, 2, 3]), &[1], false),
            (plain(1, &[1, 2, 3]), &[1, 3], true),
            (plain(1, &[1, 2, 3, 4]), &[1, 2], false),
            (plain(1, &[1, 2, 3, 4, 5]), &[1, 2, 5], true),
            (joint(2, &[1, 2, 3], &[1, 2, 4]), &[1, 2], true),
            (joint(2, &[1, 2, 3], &[1, 2, 4]), &[1, 3], false),
            (joint(2, &[1, 2, 3], &[1, 2, 4]), &[1, 3, 4], true),
        ];
        for (configuration, has, expected) in cases {
            assert_eq!(expected, configuration.is_quorum(|m| has.contains(&m.member.0)), "{configuration:?} {has:?}");
        }
    }

    #[test]
    fn quorum_value_is_the_least_of_the_sets_majorities() {
        let configuration = joint(2, &[1, 2, 3], &[1, 2, 4]);

        let value = |m: &Member| [None, Some(10), Some(20), Some(30), Some(5)][m.member.0 as usize];

        assert_eq!(Some(10), configuration.quorum_value(value));
        assert_eq!(None, configuration.quorum_value(|m| (m.member.0 == 1).then_some(1)));
    }

    #[test]
    fn one_number_stands_for_one_disk() {
        let mut twice = joint(2, &[1, 2, 3], &[1, 2, 3]);
        twice.new_members.as_mut().unwrap()[2].disk = DiskId([9; 16]);

        assert_eq!(Err(ConfigurationError::Duplicate), twice.check());
        assert_eq!(Err(ConfigurationError::Duplicate), plain(1, &[1, 2, 2]).check());
        assert_eq!(Err(ConfigurationError::Size), plain(1, &[]).check());
        assert_eq!(Err(ConfigurationError::Size), plain(1, &[1, 2, 3, 4, 5, 6]).check());
    }

    #[test]
    fn changes_go_one_member_at_a_time_through_a_joint_configuration() {
        use ConfigurationError::*;
        let moved = {
            let mut moved = plain(2, &[1, 2, 3]);
            moved.members[0].address = "elsewhere:1".into();
            moved
        };
        let cases = [
            (plain(1, &[1, 2, 3]), joint(2, &[1, 2, 3], &[1, 2, 4]), 1, Ok(())),
            (plain(1, &[1, 2, 3]), joint(2, &[1, 2, 3], &[1, 2, 3, 4]), 1, Ok(())),
            (plain(1, &[1, 2, 3]), joint(2, &[1, 2, 3], &[1, 2]), 1, Ok(())),
            (plain(1, &[1, 2, 3]), joint(2, &[1, 2, 3], &[1, 4, 5]), 1, Err(Step)),
            (plain(1, &[1, 2, 3]), joint(2, &[1, 2, 4], &[1, 2, 3]), 1, Err(Step)),
            (plain(1, &[1, 2, 3]), plain(2, &[1, 2, 4]), 1, Err(Step)),
            (plain(1, &[1, 2, 3]), moved, 1, Ok(())),
            (
                plain(1, &[1, 2, 3]),
                joint(3, &[1, 2, 3], &[1, 2, 4]),
                1,
                Err(Generation { known: pgtypes::Generation(1), offered: pgtypes::Generation(3) }),
            ),
            (joint(2, &[1, 2, 3], &[1, 2, 4]), plain(3, &[1, 2, 4]), 2, Ok(())),
            (joint(2, &[1, 2, 3], &[1, 2, 4]), plain(3, &[1, 2, 4]), 1, Err(NotCommitted)),
            (joint(2, &[1, 2, 3], &[1, 2, 4]), plain(3, &[1, 2, 3]), 1, Ok(())),
            (joint(2, &[1, 2, 3], &[1, 2, 4]), plain(3, &[1, 2, 5]), 2, Err(OtherMembers)),
            (joint(2, &[1, 2, 3], &[1, 2, 4]), joint(3, &[1, 2, 4], &[1, 2, 5]), 2, Err(Step)),
        ];
        for (from, to, commit_generation, expected) in cases {
            let got = from.check_next(&to, pgtypes::Generation(commit_generation));
            assert_eq!(expected, got, "{from:?} -> {to:?}");
        }
    }
}
