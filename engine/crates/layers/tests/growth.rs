//! What a read costs does not grow with history.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "each test uses a part of it")]
mod support;

use layers::{LayerDescription, LayerKind, Limits, ValueKind};
use pgtypes::Lsn;
use support::{ORIGIN, Shard, key};

const KEYS: u32 = 300;

/// Means over all pages at the end of the history, and what was done to get there.
#[derive(Debug, Default)]
struct Cost {
    layers_visited: f64,
    blocks_read: f64,
    values: f64,
    /// The same as of the end of the compacted layers, without those of level 0.
    compacted_blocks_read: f64,
    tasks: [usize; 3],
    layers: usize,
    collected: usize,
    file_bytes: usize,
    written_bytes: u64,
}

/// A shard with `records` records, a tenth of them on one hot page, each page made by an image at first.
fn cost_of(records: u64, limits: &Limits) -> Cost {
    let mut shard = Shard::new();
    shard.layer_bytes_target = 30_000;
    let mut cost = Cost::default();
    let mut random = 0x2545_F491_4F6C_DD1Du64;
    for number in 0..records {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let page = if random.is_multiple_of(10) { 7 } else { (random >> 8) as u32 % KEYS };
        let lsn = Lsn(ORIGIN.0 + 1 + number);
        let (kind, bytes) = if number < u64::from(KEYS) { (ValueKind::Image, 1024) } else { (ValueKind::Record, 40) };
        let page = if number < u64::from(KEYS) { number as u32 } else { page };
        let value = (0..bytes).map(|at| (random.wrapping_mul(at as u64 | 1) >> 32) as u8).collect();
        shard.open.put(key(page), lsn, kind, value).unwrap();
        if number % 200 == 199 {
            shard.freeze();
            while shard.compact(limits) {}
            cost.collected += shard.collect(Lsn(lsn.0.saturating_sub(1000)));
        }
    }
    let end = shard.open.lsns().after;
    for page in 0..KEYS {
        let plan = shard.map.plan_read(key(page), end, Lsn::INVALID, &shard.indexes).unwrap();
        assert!(plan.starts_page);
        cost.layers_visited += f64::from(plan.layers_visited) / f64::from(KEYS);
        cost.blocks_read += plan.reads.len() as f64 / f64::from(KEYS);
        cost.values += plan.value_count() as f64 / f64::from(KEYS);
    }
    let is_compacted = |layer: &&LayerDescription| layer.level > 0;
    let compacted = shard.map.layers().filter(is_compacted).map(|layer| layer.lsns.through).max().unwrap();
    for page in 0..KEYS {
        let plan = shard.map.plan_read(key(page), compacted, Lsn::INVALID, &shard.indexes).unwrap();
        assert!(plan.value_count() <= limits.chain_max as usize, "{plan:?}");
        cost.compacted_blocks_read += plan.reads.len() as f64 / f64::from(KEYS);
    }
    cost.tasks = shard.tasks;
    cost.layers = shard.map.layers().count();
    cost.file_bytes = shard.files.values().map(Vec::len).sum();
    cost.written_bytes = shard.written_bytes;
    let images = shard.map.layers().filter(|layer| layer.kind == LayerKind::Image).count();
    let all_done = cost.tasks.iter().all(|count| *count > 0) && cost.collected > 0;
    assert!(images > 1 && all_done, "the history is too short to tell: {cost:?}");
    cost
}

#[test]
fn ten_times_the_history_costs_a_read_no_more() {
    let limits = Limits { level0_max: 3, bands_max: 3, chain_max: 8, merge_layers_max: 8 };
    let (once, ten_times) = (cost_of(15_000, &limits), cost_of(150_000, &limits));
    println!("1x: {once:?}\n10x: {ten_times:?}");
    let bound = f64::from(limits.level0_max + limits.bands_max + 1);
    assert!(ten_times.layers_visited <= bound, "{ten_times:?}");
    assert!(ten_times.layers_visited <= once.layers_visited * 1.5 + 0.5, "{once:?} {ten_times:?}");
    assert!(ten_times.values <= f64::from(limits.chain_max) + 3.0, "{ten_times:?}");
    assert!(ten_times.layers <= once.layers * 3 / 2, "{once:?} {ten_times:?}");
    assert!(ten_times.file_bytes <= once.file_bytes * 3 / 2, "{once:?} {ten_times:?}");
}
