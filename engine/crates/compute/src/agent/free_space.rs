//! Brings free-space maps to the page service: a round of them every second after a checkpoint, the rest at a clean stop.

use std::{
    collections::BTreeSet,
    sync::mpsc::{Receiver, TryRecvError, sync_channel},
    time::{Duration, Instant},
};

use super::{Agent, cold_start::AdvisoryKeeper};
use crate::{
    free_space::FreeSpaceMaps,
    pages::{HandedInMaps, PagesCommand},
};

/// How often a checkpoint is looked for, and the pause between rounds.
const MAPS_INTERVAL: Duration = Duration::from_secs(1);
/// Pause after maps were not taken.
const MAPS_AGAIN: Duration = Duration::from_secs(10);
/// How long a clean stop may wait for maps: they only save space.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// The maps of a running PostgreSQL.
pub(super) struct MapKeeper {
    maps: FreeSpaceMaps,
    next_look: Instant,
    under_way: Option<(BTreeSet<String>, Receiver<HandedInMaps>)>,
    /// How often the shard that has them had been connected to.
    connections: Option<u64>,
    said: Option<String>,
}

impl MapKeeper {
    pub(super) fn new(maps: FreeSpaceMaps) -> Self {
        Self { maps, next_look: Instant::now(), under_way: None, connections: None, said: None }
    }

    /// Says what is wrong whenever it changes.
    fn say(&mut self, trouble: Option<String>) {
        if trouble.is_some() && trouble != self.said {
            tracing::warn!("free-space maps are not with the page service: {}", trouble.as_deref().unwrap_or_default());
        }
        self.said = trouble;
    }
}

impl Agent {
    /// Hands in the next maps, if it is time.
    pub(super) fn keep_maps(&mut self, keeper: &mut AdvisoryKeeper) {
        let keeper = &mut keeper.maps;
        if let Some((names, answer)) = &mut keeper.under_way {
            let (taken, trouble) = match answer.try_recv() {
                Ok(answer) => answer,
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => (Vec::new(), Some("the pages' core gave no answer".to_owned())),
            };
            for map in &taken {
                names.remove(&map.name);
                keeper.maps.keep(map);
            }
            keeper.maps.put_back(std::mem::take(names));
            keeper.under_way = None;
            self.metrics.maps_handed_in.inc_by(taken.len() as u64);
            if trouble.is_some() {
                keeper.next_look = Instant::now() + MAPS_AGAIN;
            }
            keeper.say(trouble);
        }
        if keeper.next_look > Instant::now() {
            return;
        }
        keeper.next_look = Instant::now() + MAPS_INTERVAL;
        let connections = self.pages.as_ref().map(|pages| pages.metadata_connections());
        if keeper.connections.is_some() && keeper.connections != connections {
            keeper.maps.forget();
        }
        keeper.connections = connections;
        let round = keeper.maps.look_after_checkpoint().and_then(|()| keeper.maps.next_round());
        self.metrics.maps_left_out.set(keeper.maps.left_out() as i64);
        let maps = match round {
            Ok(maps) if maps.is_empty() => return,
            Ok(maps) => maps,
            Err(error) => return keeper.say(Some(error.to_string())),
        };
        let names = maps.iter().map(|map| map.name.clone()).collect();
        let (reply, answer) = sync_channel(1);
        match self.pages_send(PagesCommand::HandInMaps { maps, reply }) {
            Ok(()) => keeper.under_way = Some((names, answer)),
            Err(error) => keeper.say(Some(error.to_string())),
        }
    }

    /// After a clean stop: hands in what is not yet there.
    pub(super) fn finish_maps(&mut self, keeper: &mut AdvisoryKeeper) {
        let keeper = &mut keeper.maps;
        let until = Instant::now() + STOP_LIMIT;
        let mut handed_in = 0;
        let mut result = keeper.maps.look().map_err(|error| error.to_string());
        while result.is_ok() && Instant::now() < until {
            let maps = match keeper.maps.next_round() {
                Ok(maps) if maps.is_empty() => break,
                Ok(maps) => maps,
                Err(error) => {
                    result = Err(error.to_string());
                    break;
                }
            };
            let (reply, answer) = sync_channel(1);
            let sent = self.pages_send(PagesCommand::HandInMaps { maps, reply });
            let wait = until.saturating_duration_since(Instant::now());
            result = match sent.ok().and_then(|()| answer.recv_timeout(wait).ok()) {
                Some((taken, trouble)) => {
                    handed_in += taken.len();
                    trouble.map_or(Ok(()), Err)
                }
                None => Err("no answer in time".to_owned()),
            };
        }
        self.metrics.maps_handed_in.inc_by(handed_in as u64);
        tracing::info!(handed_in, "free-space maps");
        keeper.say(result.err());
    }
}
