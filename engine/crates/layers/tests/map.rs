//! The layer map: what it refuses, and that it never answers "nothing there" for what it does not know.

#[expect(dead_code, reason = "each test uses a part of it")]
mod support;

use layers::{
    Edit, HashRange, Key, KeyRange, LayerDescription, LayerId, LayerKind, LayerMap, LayerWriter, LsnRange, MapError,
    OpenLayer, PlanError, PutError, ValueKind, collect,
};
use pgtypes::Lsn;
use support::{IndexMap, ORIGIN, Shard, identity, key};

fn layer(number: u64, kind: LayerKind, hashes: HashRange, after: u64, through: u64) -> LayerDescription {
    let lsns = LsnRange { after: Lsn(after), through: Lsn(through) };
    let id = identity(number).id;
    LayerDescription { id, kind, level: 1, keys: hashes.keys(), lsns, file_bytes: 1, values: 1, chain_max: 1 }
}

fn add(layers: &[LayerDescription]) -> Edit {
    Edit { remove: vec![], add: layers.to_vec() }
}

fn id(number: u64) -> LayerId {
    identity(number).id
}

#[test]
fn layers_that_answer_for_the_same_are_refused_and_nothing_is_changed() {
    use LayerKind::{Delta, Image};
    let (low, high) = (HashRange::even_part(0, 2), HashRange::even_part(1, 2));
    let all = HashRange::ALL;
    let mut map = LayerMap::new(KeyRange::ALL, Lsn(100));
    map.apply(&add(&[layer(1, Image, all, 100, 100), layer(2, Delta, low, 100, 200), layer(3, Delta, high, 100, 150)]))
        .unwrap();
    let table = [
        (layer(4, Delta, all, 150, 250), Err(MapError::Overlap(id(2), id(4)))),
        (layer(4, Delta, low, 120, 130), Err(MapError::Overlap(id(2), id(4)))),
        (layer(4, Delta, low, 50, 101), Err(MapError::Overlap(id(2), id(4)))),
        (layer(4, Delta, low, 50, 300), Err(MapError::Overlap(id(2), id(4)))),
        (layer(4, Delta, low, 100, 200), Err(MapError::Overlap(id(2), id(4)))),
        (layer(4, Image, low, 100, 100), Err(MapError::Overlap(id(1), id(4)))),
        (layer(2, Delta, low, 200, 300), Err(MapError::Duplicate(id(2)))),
        (layer(4, Delta, low, 200, 200), Err(MapError::Empty(id(4)))),
        (layer(4, Delta, high, 150, 200), Ok(())),
        (layer(5, Image, low, 150, 150), Ok(())),
    ];
    for (layer, expected) in table {
        let before: Vec<_> = map.layers().copied().collect();
        assert_eq!(expected, map.apply(&add(&[layer])), "{layer:?}");
        if expected.is_err() {
            assert_eq!(before, map.layers().copied().collect::<Vec<_>>());
        }
    }
    let unknown = Edit { remove: vec![id(9)], add: vec![] };
    assert_eq!(Err(MapError::Unknown(id(9))), map.apply(&unknown));
}

/// A page without its layer would otherwise be read as zeros: lost rows.
#[test]
fn a_missing_layer_is_an_error() {
    let mut shard = Shard::new();
    for lsn in [110, 120, 130] {
        shard.open.put(key(1), Lsn(lsn), ValueKind::Record, vec![lsn as u8]).unwrap();
        shard.freeze();
    }
    let plan =
        |map: &LayerMap, lsn| map.plan_read(key(1), Lsn(lsn), Lsn::INVALID, &shard.indexes).map(|p| p.value_count());
    assert_eq!(Ok(3), plan(&shard.map, 130));
    let mut map = shard.map.clone();
    map.apply(&Edit { remove: vec![id(3)], add: vec![] }).unwrap();
    assert_eq!(Err(PlanError::MissingLayer(Lsn(120))), plan(&map, 130));
    assert_eq!(Ok(1), plan(&map, 110));
    assert_eq!(Err(PlanError::MissingLayer(Lsn(131))), plan(&shard.map, 131));
    let mut map = shard.map.clone();
    map.apply(&Edit { remove: vec![id(1)], add: vec![] }).unwrap();
    assert_eq!(Err(PlanError::MissingLayer(ORIGIN)), plan(&map, 130));
}

#[test]
fn an_index_that_is_not_in_memory_is_asked_for() {
    let mut shard = Shard::new();
    shard.open.put(key(1), Lsn(110), ValueKind::Record, vec![1]).unwrap();
    shard.freeze();
    let plan = |indexes: &IndexMap| shard.map.plan_read(key(1), Lsn(110), Lsn::INVALID, indexes).map(drop);
    assert_eq!(Err(PlanError::IndexNeeded(id(2))), plan(&IndexMap::default()));
    assert_eq!(Ok(()), plan(&shard.indexes));
}

/// A file number that is used again, or a table that was cut and grew: the old rows must not come back.
#[test]
fn a_read_stops_at_the_floor() {
    let mut shard = Shard::new();
    for lsn in [110, 120, 130, 140] {
        shard.open.put(key(1), Lsn(lsn), ValueKind::Record, vec![lsn as u8]).unwrap();
        if lsn == 130 {
            shard.freeze();
        }
    }
    shard.freeze();
    let plan = |lsn, floor| shard.map.plan_read(key(1), Lsn(lsn), Lsn(floor), &shard.indexes).unwrap();
    let lsns = |lsn, floor| -> Vec<u64> {
        plan(lsn, floor).reads.iter().flat_map(|read| read.values.iter().map(|value| value.lsn.0)).collect()
    };
    assert_eq!(vec![140, 130, 120, 110], lsns(140, 0));
    assert_eq!(vec![140, 130], lsns(140, 120));
    assert_eq!(vec![130], lsns(135, 125));
    assert!(lsns(140, 140).is_empty());
}

/// A new shard begins with references to the layers that overlap its range, and copies nothing.
#[test]
fn the_parts_of_a_split_shard_read_as_the_whole_did() {
    let mut shard = Shard::new();
    for number in 0..200 {
        let (key, lsn) = (key(number % 20), Lsn(101 + u64::from(number)));
        shard.open.put(key, lsn, ValueKind::Record, vec![number as u8]).unwrap();
        if number % 50 == 49 {
            shard.freeze();
        }
    }
    let parts = [0, 1, 2].map(|index| {
        let range = HashRange::even_part(index, 3);
        let mut map = LayerMap::new(range.keys(), shard.map.horizon());
        map.apply(&Edit { remove: vec![], add: shard.map.layers().copied().collect() }).unwrap();
        (range, map)
    });
    for key in (0..20).map(key) {
        let whole = shard.map.plan_read(key, Lsn(300), Lsn::INVALID, &shard.indexes);
        for (range, map) in &parts {
            let part = map.plan_read(key, Lsn(300), Lsn::INVALID, &shard.indexes);
            let expected = if range.contains(key) { whole.clone() } else { Err(PlanError::OtherShard) };
            assert_eq!(expected, part);
        }
    }
}

#[test]
fn an_open_layer_takes_records_in_order_and_of_its_shard() {
    let keys = KeyRange { begin: Key::MIN, end: Key::first_of_hash(10) };
    let mut open = OpenLayer::new(keys, Lsn(100));
    let mut put = |hash, lsn| open.put(Key::first_of_hash(hash), Lsn(lsn), ValueKind::Record, vec![0; 100]);
    assert_eq!(Err(PutError::OutOfRange), put(10, 110));
    assert_eq!(Err(PutError::OutOfOrder), put(1, 100));
    assert_eq!(Ok(()), put(2, 110));
    assert_eq!(Ok(()), put(1, 110));
    assert_eq!(Err(PutError::OutOfOrder), put(2, 110));
    assert_eq!(Err(PutError::OutOfOrder), put(3, 109));
    assert_eq!(2 * (100 + 64), open.bytes());
    assert_eq!(LsnRange { after: Lsn(100), through: Lsn(110) }, open.lsns());
}

/// An image layer may lie within the positions of a delta layer: what is older is not read.
#[test]
fn a_read_ends_at_an_image_within_a_delta_layer() {
    let mut shard = Shard::new();
    for lsn in [110, 120, 130] {
        shard.open.put(key(1), Lsn(lsn), ValueKind::Record, vec![lsn as u8]).unwrap();
    }
    shard.freeze();
    let mut writer = LayerWriter::image(shard.new_identity(), Key::MIN, Lsn(125));
    writer.push(key(1), Lsn(125), ValueKind::Image, &[110, 120]).unwrap();
    let bytes = writer.take_output();
    let layer = shard.keep(bytes, writer.finish(Key::MAX).unwrap());
    shard.map.apply(&add(&[layer])).unwrap();
    let values = |lsn| -> Vec<_> {
        let plan = shard.map.plan_read(key(1), Lsn(lsn), Lsn::INVALID, &shard.indexes).unwrap();
        plan.reads.iter().flat_map(|read| read.values.iter().map(|value| (value.lsn.0, value.kind))).collect()
    };
    assert_eq!(vec![(130, ValueKind::Record), (125, ValueKind::Image)], values(130));
    assert_eq!(vec![(125, ValueKind::Image)], values(129));
    assert_eq!(vec![(120, ValueKind::Record), (110, ValueKind::Record)], values(124));
}

/// Half of a layer's keys may still need it.
#[test]
fn a_layer_is_garbage_only_when_images_at_the_horizon_hide_all_of_it() {
    use LayerKind::{Delta, Image};
    let (low, high) = (HashRange::even_part(0, 2), HashRange::even_part(1, 2));
    let mut map = LayerMap::new(KeyRange::ALL, Lsn(100));
    let deltas = [layer(2, Delta, HashRange::ALL, 100, 200), layer(3, Delta, HashRange::ALL, 200, 300)];
    map.apply(&add(&[layer(1, Image, HashRange::ALL, 100, 100)])).unwrap();
    map.apply(&add(&deltas)).unwrap();
    map.raise_horizon(Lsn(250));
    assert!(collect(&map).remove.is_empty());
    map.apply(&add(&[layer(4, Image, low, 200, 200)])).unwrap();
    assert!(collect(&map).remove.is_empty());
    map.apply(&add(&[layer(5, Image, high, 251, 251)])).unwrap();
    assert!(collect(&map).remove.is_empty());
    map.apply(&add(&[layer(6, Image, high, 250, 250)])).unwrap();
    assert_eq!(vec![id(1), id(2)], collect(&map).remove);
    map.raise_horizon(Lsn(1000));
    assert_eq!(Lsn(300), map.horizon());
    map.raise_horizon(Lsn(260));
    assert_eq!(Lsn(300), map.horizon());
}

#[test]
fn a_position_that_was_given_up_is_refused() {
    let mut shard = Shard::new();
    shard.open.put(key(1), Lsn(110), ValueKind::Record, vec![1]).unwrap();
    shard.freeze();
    shard.collect(Lsn(110));
    let refused = PlanError::BelowHorizon { lsn: Lsn(109), horizon: Lsn(110) };
    assert_eq!(Err(refused), shard.map.plan_read(key(1), Lsn(109), Lsn::INVALID, &shard.indexes).map(drop));
}
