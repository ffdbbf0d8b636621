//! Payloads of records with every form of a block reference, for property tests of crates that take records apart.

use proptest::{collection::vec, option, prelude::*};

/// A page image.
#[derive(Clone, Debug)]
struct Image {
    /// Flag of its compression; 0 for none.
    method: u8,
    /// Start and length.
    hole: Option<(u16, u16)>,
    bytes: Vec<u8>,
    apply: bool,
}

/// A block reference and what belongs to it.
#[derive(Clone, Debug)]
struct Reference {
    fork: u8,
    will_init: bool,
    same_relation: bool,
    relation: [u32; 3],
    block: u32,
    data: Vec<u8>,
    image: Option<Image>,
}

fn image() -> impl Strategy<Value = Image> {
    let plain = (1..8000u16, 1..8192u16).prop_flat_map(|(start, length)| {
        let length = length.min(8192 - start);
        (Just(0u8), Just(Some((start, length))), vec(any::<u8>(), usize::from(8192 - length)), any::<bool>())
    });
    let methods = prop_oneof![Just(4u8), Just(8), Just(16)];
    let compressed = (methods, option::of((1..4000u16, 1..4000u16)), vec(any::<u8>(), 1..300), any::<bool>());
    prop_oneof![plain, compressed].prop_map(|(method, hole, bytes, apply)| Image { method, hole, bytes, apply })
}

fn reference() -> impl Strategy<Value = Reference> {
    (
        (0..4u8, any::<bool>(), any::<bool>(), [0..3u32, 0..3, 0..9], 0..10_000u32),
        prop_oneof![Just(vec![]), vec(any::<u8>(), 1..200)],
        option::weighted(0.3, image()),
    )
        .prop_map(|((fork, will_init, same_relation, relation, block), data, image)| Reference {
            fork,
            will_init,
            same_relation,
            relation,
            block,
            data,
            image,
        })
}

/// A payload with up to 6 blocks.
pub fn payload() -> impl Strategy<Value = Vec<u8>> {
    let gaps = vec(0..5u8, 6);
    let main = prop_oneof![Just(vec![]), vec(any::<u8>(), 1..400)];
    (vec(reference(), 0..6), gaps, option::of(any::<u16>()), option::of(any::<u32>()), main).prop_map(
        |(blocks, gaps, origin, toplevel_xid, main)| put_together(&blocks, &gaps, origin, toplevel_xid, &main),
    )
}

fn put_together(
    blocks: &[Reference],
    gaps: &[u8],
    origin: Option<u16>,
    toplevel_xid: Option<u32>,
    main: &[u8],
) -> Vec<u8> {
    let (mut headers, mut parts) = (Vec::new(), Vec::new());
    let (mut id, mut before) = (0, None);
    for (block, gap) in blocks.iter().zip(gaps) {
        id += gap;
        // As PostgreSQL writes it: the flag is set exactly where the relation is the same.
        let relation = match before {
            Some(before) if block.same_relation => before,
            _ => block.relation,
        };
        let same = before == Some(relation);
        let mut flags = block.fork;
        for (set, flag) in
            [(block.image.is_some(), 0x10), (!block.data.is_empty(), 0x20), (block.will_init, 0x40), (same, 0x80)]
        {
            flags |= if set { flag } else { 0 };
        }
        headers.extend([id, flags]);
        headers.extend((block.data.len() as u16).to_le_bytes());
        if let Some(Image { method, hole, bytes, apply }) = &block.image {
            headers.extend((bytes.len() as u16).to_le_bytes());
            headers.extend(hole.map_or(0, |(start, _)| start).to_le_bytes());
            headers.push(method | u8::from(hole.is_some()) | if *apply { 2 } else { 0 });
            if let (Some((_, length)), 1..) = (hole, *method) {
                headers.extend(length.to_le_bytes());
            }
            parts.extend_from_slice(bytes);
        }
        if !same {
            headers.extend(relation.iter().flat_map(|number| number.to_le_bytes()));
        }
        headers.extend(block.block.to_le_bytes());
        parts.extend_from_slice(&block.data);
        before = Some(relation);
        id += 1;
    }
    if let Some(origin) = origin {
        headers.push(253);
        headers.extend(origin.to_le_bytes());
    }
    if let Some(xid) = toplevel_xid {
        headers.push(252);
        headers.extend(xid.to_le_bytes());
    }
    match main.len() {
        0 => {}
        length @ 1..=255 => headers.extend([255, length as u8]),
        length => {
            headers.push(254);
            headers.extend((length as u32).to_le_bytes());
        }
    }
    [headers, parts, main.to_vec()].concat()
}
