//! Whatever a shard does with its layers, it answers as a map of (key, LSN) does.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeMap;

use layers::{Key, LayerDescription, LayerKind, Limits, ValueKind};
use pgtypes::Lsn;
use proptest::prelude::*;
use support::{ORIGIN, Page, Shard, key, redo};

const KEYS: u32 = 24;

const LIMITS: Limits = Limits { level0_max: 2, bands_max: 2, chain_max: 4, merge_layers_max: 5 };

#[derive(Clone, Debug)]
enum Step {
    Put { key: u32, kind: ValueKind, value: Vec<u8>, lsn_step: u64 },
    Idle(u64),
    Freeze,
    Compact,
    Collect { behind: u64 },
}

fn any_step() -> impl Strategy<Value = Step> {
    let kind = prop_oneof![
        8 => Just(ValueKind::Record),
        1 => Just(ValueKind::InitRecord),
        1 => Just(ValueKind::Image),
        1 => Just(ValueKind::Absent),
    ];
    // Half of the records change a hot page. Long values cross blocks.
    let length = prop_oneof![20 => 0..20usize, 1 => 3000..12_000usize];
    let put = (0..KEYS * 2, kind, length, any::<u8>(), 0..3u64).prop_map(|(key, kind, length, byte, lsn_step)| {
        let length = if kind == ValueKind::Absent { 0 } else { length };
        let value = (0..length).map(|at| byte.wrapping_mul(at as u8 | 1)).collect();
        Step::Put { key: if key < KEYS { key } else { 0 }, kind, value, lsn_step }
    });
    prop_oneof![30 => put, 1 => (1..50u64).prop_map(Step::Idle), 6 => Just(Step::Freeze), 4 => Just(Step::Compact), 1 => (0..60u64).prop_map(|behind| Step::Collect { behind })]
}

#[derive(Default)]
struct Model(BTreeMap<(Key, Lsn), (ValueKind, Vec<u8>)>);

impl Model {
    fn read(&self, key: Key, lsn: Lsn) -> Page {
        self.0.range((key, Lsn(0))..=(key, lsn)).fold(None, |page, (_, (kind, value))| redo(page, *kind, value))
    }

    fn check(&self, shard: &Shard) {
        let end = shard.open.lsns().through.0 + 1;
        for key in (0..KEYS).map(key) {
            for lsn in (shard.map.horizon().0..=end).map(Lsn) {
                assert_eq!(Ok(self.read(key, lsn)), shard.read(key, lsn), "{key:?} at {lsn}");
            }
        }
    }
}

fn compact_all(shard: &mut Shard) {
    let rounds = (0..1000).take_while(|_| shard.compact(&LIMITS)).count();
    assert!(rounds < 1000, "compaction does not come to an end");
}

/// What [`Limits`] promise of any read.
fn check_bounds(shard: &Shard) {
    let is_level0 = |layer: &&LayerDescription| layer.kind == LayerKind::Delta && layer.level == 0;
    let frozen = shard.open.lsns().after;
    let compacted = shard.map.layers().filter(is_level0).map(|layer| layer.lsns.after).min().unwrap_or(frozen);
    for key in (0..KEYS).map(key) {
        for lsn in (shard.map.horizon().0..=frozen.0).map(Lsn) {
            let plan = shard.map.plan_read(key, lsn, Lsn::INVALID, &shard.indexes).unwrap();
            assert!(plan.layers_visited <= LIMITS.level0_max + LIMITS.bands_max + 1, "{plan:?}");
            if lsn <= compacted {
                assert!(plan.value_count() <= LIMITS.chain_max as usize, "{plan:?}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_read_at_every_kept_position_is_answered_as_by_a_map(steps in prop::collection::vec(any_step(), 1..400)) {
        let (mut shard, mut model) = (Shard::new(), Model::default());
        let mut lsn = ORIGIN;
        for step in steps {
            match step {
                Step::Put { key: number, kind, value, lsn_step } => {
                    let key = key(number);
                    lsn = Lsn(lsn.0 + lsn_step);
                    // A record has one value for a key, and a frozen position is over.
                    if lsn <= shard.open.lsns().after || model.0.contains_key(&(key, lsn)) {
                        lsn = Lsn(lsn.0 + 1);
                    }
                    shard.open.put(key, lsn, kind, value.clone()).unwrap();
                    model.0.insert((key, lsn), (kind, value));
                }
                Step::Idle(bytes) => {
                    lsn = Lsn(lsn.0 + bytes);
                    shard.open.advance(lsn);
                }
                Step::Freeze => shard.freeze(),
                Step::Compact => drop(shard.compact(&LIMITS)),
                Step::Collect { behind } => drop(shard.collect(Lsn(lsn.0.saturating_sub(behind)))),
            }
        }
        model.check(&shard);
        compact_all(&mut shard);
        shard.collect(ORIGIN);
        model.check(&shard);
        check_bounds(&shard);
    }
}
