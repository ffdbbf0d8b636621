//! Free-space maps of PGDATA that the page service should have: which of them changed since it got them.
//!
//! No WAL describes them. PostgreSQL writes them at its checkpoints, which is when they are looked at; they are handed in a few
//! at a time. What is kept of a file says `backup::compact_free_space`. Knows nothing about how it gets there.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs, io,
    path::{Path, PathBuf},
};

use backup::{compact_free_space, free_space_map_of};
use wal::crc32c;
use wire::page::ADVISORY_BYTES_MAX;

use crate::advisory::{Stamp, stamp};

/// Longest file that is kept, 8 MiB: the map of a relation of 32 GiB. Nothing of a longer one is.
const FILE_BYTES_MAX: u64 = 8 << 20;
/// Bytes of files that are read in a round, but for the last of them: the agent also has to hear of a fence.
const ROUND_BYTES: u64 = 4 << 20;
/// Maps of a round.
const ROUND_FILES: usize = 256;

/// A map that the page service should have.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ChangedMap {
    /// Path in PGDATA.
    pub name: String,
    /// What is kept of it; empty: nothing any more.
    pub contents: Vec<u8>,
    stamp: Option<Stamp>,
}

/// What the page service is known to have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Known {
    /// Of the file that it was made of; none when it must be handed in whatever the file's stamp says.
    stamp: Option<Stamp>,
    /// Of its contents; none when nobody computed it.
    checksum: Option<u32>,
}

/// The free-space maps of one PGDATA.
pub struct FreeSpaceMaps {
    pgdata: PathBuf,
    /// Of `pg_control` at the last scan: every checkpoint writes it, after the maps.
    control: Option<Stamp>,
    known: BTreeMap<String, Known>,
    /// To be looked at, each once.
    waiting: VecDeque<String>,
    left_out: BTreeSet<String>,
}

impl FreeSpaceMaps {
    /// Of a PGDATA that was just made from what the page service has; `useless` are maps that it keeps for nothing.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub fn of_cold_start(pgdata: &Path, useless: &[String]) -> io::Result<Self> {
        let mut maps = Self {
            pgdata: pgdata.to_owned(),
            control: stamp(&pgdata.join(CONTROL))?,
            known: BTreeMap::new(),
            waiting: useless.iter().cloned().collect(),
            left_out: BTreeSet::new(),
        };
        let unknown = Known { stamp: None, checksum: None };
        maps.known.extend(useless.iter().map(|name| (name.clone(), unknown)));
        for name in maps.names()? {
            let stamp = stamp(&maps.pgdata.join(&name))?;
            maps.known.insert(name, Known { stamp, checksum: None });
        }
        Ok(maps)
    }

    /// The page service may have forgotten what it got: everything is handed in again.
    pub fn forget(&mut self) {
        for known in self.known.values_mut() {
            *known = Known { stamp: None, checksum: None };
        }
        self.control = None;
    }

    /// Looks for maps that changed, if there was a checkpoint since the last time. Costs one `stat` where there was none.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub fn look_after_checkpoint(&mut self) -> io::Result<()> {
        let control = stamp(&self.pgdata.join(CONTROL))?;
        if control == self.control {
            return Ok(());
        }
        self.look()?;
        // Not before: a look that failed is made again.
        self.control = control;
        Ok(())
    }

    /// Looks for maps that changed or are gone.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub fn look(&mut self) -> io::Result<()> {
        let present: BTreeSet<String> = self.names()?.into_iter().collect();
        self.left_out.retain(|name| present.contains(name));
        let mut waiting: BTreeSet<String> =
            self.known.keys().filter(|name| !present.contains(*name)).cloned().collect();
        for name in present {
            let current = stamp(&self.pgdata.join(&name))?;
            let known = self.known.get(&name).and_then(|known| known.stamp);
            if current.is_none() || current != known {
                waiting.insert(name);
            }
        }
        self.waiting = waiting.into_iter().collect();
        Ok(())
    }

    /// The next maps to be handed in; empty when there are none left. They are not named again before the next look.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn next_round(&mut self) -> io::Result<Vec<ChangedMap>> {
        let mut round = Vec::new();
        let mut bytes = 0;
        while bytes < ROUND_BYTES && round.len() < ROUND_FILES {
            let Some(name) = self.waiting.pop_front() else { break };
            let (map, read) = self.changed(name)?;
            bytes += read;
            round.extend(map);
        }
        Ok(round)
    }

    /// The page service has this map.
    pub fn keep(&mut self, map: &ChangedMap) {
        if map.contents.is_empty() && map.stamp.is_none() {
            self.known.remove(&map.name);
        } else {
            let checksum = Some(crc32c(0, &map.contents));
            self.known.insert(map.name.clone(), Known { stamp: map.stamp, checksum });
        }
    }

    /// The page service did not take these maps: they come in a later round.
    pub fn put_back(&mut self, maps: impl IntoIterator<Item = String>) {
        self.waiting.extend(maps);
    }

    /// How many maps are too long to be kept.
    pub fn left_out(&self) -> usize {
        self.left_out.len()
    }

    /// What the page service should get of a file, and how much of it was read.
    fn changed(&mut self, name: String) -> io::Result<(Option<ChangedMap>, u64)> {
        let path = self.pgdata.join(&name);
        // Before the file is read: what is written meanwhile is found by the next look.
        let stamp = stamp(&path)?;
        let contents = match stamp {
            Some(stamp) if stamp.bytes > FILE_BYTES_MAX => None,
            Some(_) => match fs::read(&path) {
                Ok(contents) => Some(contents),
                // Dropped at this moment.
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(error),
            },
            None => None,
        };
        let read = contents.as_ref().map_or(0, |contents| contents.len() as u64);
        let compact = contents.map_or_else(Vec::new, |contents| compact_free_space(&contents));
        let is_too_long = stamp.is_some_and(|stamp| stamp.bytes > FILE_BYTES_MAX) || compact.len() > ADVISORY_BYTES_MAX;
        let contents = if is_too_long { Vec::new() } else { compact };
        if !is_too_long {
            self.left_out.remove(&name);
        } else if self.left_out.insert(name.clone()) {
            tracing::info!(name, "a free-space map is too long for the page service: the next start is without it");
        }
        let checksum = crc32c(0, &contents);
        match self.known.get_mut(&name) {
            // Written anew, and says the same.
            Some(known) if known.checksum == Some(checksum) && stamp.is_some() => {
                known.stamp = stamp;
                Ok((None, read))
            }
            // Never handed in, and nothing to say.
            None if contents.is_empty() => {
                if stamp.is_some() {
                    self.known.insert(name, Known { stamp, checksum: Some(checksum) });
                }
                Ok((None, read))
            }
            _ => Ok((Some(ChangedMap { name, contents, stamp }), read)),
        }
    }

    /// Paths of all maps but those of unlogged relations, which begin empty whenever they are not there.
    fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        let mut directories = vec!["global".to_owned()];
        for entry in entries(&self.pgdata.join("base"))? {
            directories.push(format!("base/{entry}"));
        }
        for directory in directories {
            let entries = entries(&self.pgdata.join(&directory))?;
            let unlogged: BTreeSet<&str> = entries.iter().filter_map(|entry| entry.strip_suffix("_init")).collect();
            for entry in &entries {
                let path = format!("{directory}/{entry}");
                let is_kept = entry.strip_suffix("_fsm").is_some_and(|relation| !unlogged.contains(relation));
                if is_kept && free_space_map_of(&path).is_some() {
                    names.push(path);
                }
            }
        }
        Ok(names)
    }
}

/// What every checkpoint writes.
const CONTROL: &str = "global/pg_control";

/// Names in a directory; none when it is gone (a dropped database), or is none.
fn entries(directory: &Path) -> io::Result<Vec<String>> {
    let found = match fs::read_dir(directory) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        found => found?,
    };
    let mut names = Vec::new();
    for entry in found {
        // PostgreSQL's names are ASCII; another name is nobody's.
        names.extend(entry?.file_name().into_string());
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A map in which block 5 has free space; `category` is its measure.
    fn map(category: u8) -> Vec<u8> {
        backup::expand_free_space(&[1, 11, 0, 2, category], 10).expect("valid")
    }

    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("lakebase-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            for directory in ["global", "base/1", "base/5"] {
                fs::create_dir_all(path.join(directory)).expect("created");
            }
            fs::write(path.join(CONTROL), "0").expect("written");
            Self(path)
        }

        fn write(&self, name: &str, contents: &[u8]) {
            fs::write(self.0.join(name), contents).expect("written");
        }

        /// A checkpoint: `pg_control` changes. Longer each time, for clocks of file systems are coarse.
        fn checkpoint(&self) {
            let mut control = fs::read(self.0.join(CONTROL)).expect("read");
            control.push(b'0');
            self.write(CONTROL, &control);
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// All rounds that are left, handed in.
    fn hand_in(maps: &mut FreeSpaceMaps) -> Vec<(String, bool)> {
        let mut handed_in = Vec::new();
        loop {
            let round = maps.next_round().expect("read");
            if round.is_empty() {
                return handed_in;
            }
            for map in round {
                maps.keep(&map);
                handed_in.push((map.name, !map.contents.is_empty()));
            }
        }
    }

    #[test]
    fn maps_are_handed_in_after_a_checkpoint_and_removed_with_their_relation() {
        let pgdata = Directory::new("free-space-maps");
        pgdata.write("base/5/1_fsm", &map(7));
        let mut maps = FreeSpaceMaps::of_cold_start(&pgdata.0, &[]).expect("read");
        pgdata.write("base/5/2_fsm", &map(8));
        pgdata.write("global/3_fsm", &map(9));
        pgdata.write("base/5/4_fsm", &map(0));
        pgdata.write("base/5/5_fsm", &map(9));
        pgdata.write("base/5/5_init", b"");
        pgdata.write("base/5/t2_6_fsm", &map(9));
        pgdata.write("base/5/7", &map(9));
        maps.look_after_checkpoint().expect("read");
        assert_eq!(Vec::<(String, bool)>::new(), hand_in(&mut maps), "no checkpoint yet");

        pgdata.checkpoint();
        maps.look_after_checkpoint().expect("read");
        let names =
            |names: &[(&str, bool)]| names.iter().map(|(name, is)| ((*name).to_owned(), *is)).collect::<Vec<_>>();
        assert_eq!(names(&[("base/5/2_fsm", true), ("global/3_fsm", true)]), hand_in(&mut maps));
        assert_eq!(names(&[]), hand_in(&mut maps));

        fs::remove_file(pgdata.0.join("base/5/1_fsm")).expect("removed");
        fs::remove_dir_all(pgdata.0.join("base/1")).expect("removed");
        pgdata.write("base/5/2_fsm", &map(88));
        pgdata.checkpoint();
        maps.look_after_checkpoint().expect("read");
        assert_eq!(names(&[("base/5/1_fsm", false), ("base/5/2_fsm", true)]), hand_in(&mut maps));
        maps.look().expect("read");
        assert_eq!(names(&[]), hand_in(&mut maps));

        maps.forget();
        maps.look_after_checkpoint().expect("read");
        assert_eq!(
            names(&[("base/5/2_fsm", true), ("base/5/4_fsm", false), ("global/3_fsm", true)]),
            hand_in(&mut maps)
        );
    }

    #[test]
    fn what_the_page_service_keeps_for_nothing_is_removed_at_once() {
        let pgdata = Directory::new("free-space-useless");
        let mut maps = FreeSpaceMaps::of_cold_start(&pgdata.0, &["base/5/9_fsm".to_owned()]).expect("read");
        assert_eq!(vec![("base/5/9_fsm".to_owned(), false)], hand_in(&mut maps));
    }

    #[test]
    fn a_map_that_became_too_long_is_counted_and_its_old_version_goes() {
        let pgdata = Directory::new("free-space-long");
        let mut maps = FreeSpaceMaps::of_cold_start(&pgdata.0, &[]).expect("read");
        pgdata.write("base/5/2_fsm", &map(8));
        maps.look().expect("read");
        assert_eq!(1, hand_in(&mut maps).len());
        let file = fs::OpenOptions::new().write(true).open(pgdata.0.join("base/5/2_fsm")).expect("opened");
        file.set_len(FILE_BYTES_MAX + 8192).expect("longer");
        maps.look().expect("read");
        assert_eq!(vec![("base/5/2_fsm".to_owned(), false)], hand_in(&mut maps));
        assert_eq!(1, maps.left_out());
        fs::remove_file(pgdata.0.join("base/5/2_fsm")).expect("removed");
        maps.look().expect("read");
        assert_eq!(0, maps.left_out());
    }

    #[test]
    fn a_round_is_bounded() {
        let pgdata = Directory::new("free-space-rounds");
        let mut maps = FreeSpaceMaps::of_cold_start(&pgdata.0, &[]).expect("read");
        for relation in 1..=ROUND_FILES + 10 {
            pgdata.write(&format!("base/5/{relation}_fsm"), &map(8));
        }
        maps.look().expect("read");
        let (first, second) = (maps.next_round().expect("read"), maps.next_round().expect("read"));
        assert!(first.len() <= ROUND_FILES && first.len() > 100);
        assert_eq!(ROUND_FILES + 10, first.len() + second.len() + hand_in(&mut maps).len());
    }
}
