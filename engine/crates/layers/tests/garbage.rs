//! Damaged and invented bytes: refused with a typed error, never read as something else.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(dead_code, reason = "each test uses a part of it")]
mod support;

use layers::{
    Entry, HEADER_BYTES, Key, LayerError, LayerFile, LayerWriter, LsnRange, PutError, TRAILER_BYTES, ValueKind,
};
use pgtypes::Lsn;
use proptest::prelude::*;
use support::{identity, key, open_file};

/// A delta layer of 3 keys with 5 values each, in several blocks, some of them compressed.
fn delta(number: u64) -> Vec<u8> {
    let mut writer = LayerWriter::delta(identity(number), 1, Key::MIN, LsnRange { after: Lsn(100), through: Lsn(200) });
    let mut keys = [1, 2, 3].map(key);
    keys.sort();
    for (at, key) in keys.into_iter().enumerate() {
        for lsn in 101..106 {
            let value: Vec<u8> = (0..2000u32).map(|byte| (byte.wrapping_mul(byte * at as u32) >> 3) as u8).collect();
            writer.push(key, Lsn(lsn), ValueKind::Record, &value).unwrap();
        }
    }
    let mut bytes = writer.take_output();
    bytes.extend(writer.finish(Key::MAX).unwrap().output);
    bytes
}

/// Everything that a file says, as a reader takes it.
fn read_all(bytes: &[u8]) -> Result<Vec<Entry>, LayerError> {
    let (_, index) = open_file(bytes)?;
    let mut all = Vec::new();
    for number in 0..index.block_count() {
        let place = index.block_place(number).unwrap();
        let block = index.decode_block(number, &bytes[place.offset as usize..][..place.bytes as usize])?;
        for (key, entry) in index.entries_of_block(number) {
            let value = index.value(entry, &block).unwrap().to_vec();
            all.push(Entry { key, lsn: entry.lsn, kind: entry.kind, value });
        }
    }
    Ok(all)
}

/// Every byte of a file is under a checksum, those that mean nothing included.
#[test]
fn a_flipped_bit_anywhere_is_found() {
    let good = delta(1);
    assert_eq!(15, read_all(&good).unwrap().len());
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        assert!(read_all(&bad).is_err(), "bit {} of byte {at}", at % 8);
    }
}

#[test]
fn a_file_that_was_cut_off_or_grew_is_refused() {
    let good = delta(1);
    for length in (0..good.len()).step_by(97) {
        assert!(read_all(&good[..length]).is_err(), "{length} bytes");
    }
    let mut longer = good[..good.len() - TRAILER_BYTES].to_vec();
    longer.extend([0; 8]);
    longer.extend(&good[good.len() - TRAILER_BYTES..]);
    assert!(matches!(read_all(&longer), Err(LayerError::Length { what: "layer file", .. })));
}

/// An object that was written over, or a cache that mixed up two files, is damage like any other.
#[test]
fn parts_of_another_layer_do_not_pass() {
    let (one, other) = (delta(1), delta(2));
    assert_eq!(one.len(), other.len());
    let (file, index) = open_file(&one).unwrap();
    let end = one.len() - TRAILER_BYTES;
    let trailer = LayerFile::decode(&one[..HEADER_BYTES], &other[end..], one.len() as u64);
    assert_eq!(Err(LayerError::Checksum { what: "layer trailer" }), trailer);
    let at = file.index.offset as usize;
    assert_eq!(Err(LayerError::Checksum { what: "layer index" }), layers::Index::decode(&file, &other[at..end]));
    let place = |number| index.block_place(number).unwrap();
    let bytes = |file: &[u8], number| file[place(number).offset as usize..][..place(number).bytes as usize].to_vec();
    assert!(index.block_count() > 1);
    assert_eq!(Err(LayerError::Checksum { what: "layer block" }), index.decode_block(0, &bytes(&other, 0)));
    assert!(index.decode_block(0, &bytes(&one, 0)).is_ok());
    assert!(index.decode_block(0, &bytes(&one, 1)).is_err());
}

#[test]
fn a_later_version_is_refused_by_its_number() {
    let mut bytes = delta(1);
    bytes[8] = 2;
    let error = open_file(&bytes).unwrap_err();
    assert_eq!(LayerError::UnknownVersion { found: 2 }, error);
    assert!(error.to_string().contains("layer format 2 is not known: this engine reads 1"), "{error}");
    bytes[0] = b'X';
    assert_eq!(Err(LayerError::NotALayer), open_file(&bytes).map(drop));
}

#[test]
fn a_writer_takes_values_in_order_and_within_its_bounds() {
    let lsns = LsnRange { after: Lsn(100), through: Lsn(200) };
    let mut writer = LayerWriter::delta(identity(1), 1, Key::first_of_hash(5), lsns);
    let mut push = |hash, lsn| writer.push(Key::first_of_hash(hash), Lsn(lsn), ValueKind::Record, b"x");
    assert_eq!(Err(PutError::OutOfRange), push(4, 150));
    assert_eq!(Err(PutError::OutOfRange), push(6, 100));
    assert_eq!(Err(PutError::OutOfRange), push(6, 201));
    assert_eq!(Ok(()), push(6, 150));
    assert_eq!(Err(PutError::OutOfOrder), push(6, 150));
    assert_eq!(Err(PutError::OutOfOrder), push(5, 151));
    assert_eq!(Ok(()), push(6, 151));
    assert_eq!(Err(PutError::OutOfRange), writer.finish(Key::first_of_hash(6)).map(drop));
}

/// The checksums of these bytes match: what a faulty program might write.
fn sealed(mut body: Vec<u8>, mut trailer: Vec<u8>) -> Vec<u8> {
    let mut file = delta(1)[..HEADER_BYTES].to_vec();
    let seed = u32::from_le_bytes(file[HEADER_BYTES - 4..].try_into().unwrap());
    let placed = wal::crc32c(wal::crc32c(0, &seed.to_le_bytes()), &(HEADER_BYTES as u64).to_le_bytes());
    body.extend(wal::crc32c(placed, &body).to_le_bytes());
    trailer.resize(TRAILER_BYTES - 4, 0);
    trailer[16..24].copy_from_slice(&((HEADER_BYTES + body.len() + TRAILER_BYTES) as u64).to_le_bytes());
    trailer[24..32].copy_from_slice(&(HEADER_BYTES as u64).to_le_bytes());
    trailer[32..36].copy_from_slice(&(body.len() as u32).to_le_bytes());
    trailer.extend(wal::crc32c(seed, &trailer).to_le_bytes());
    file.extend(body);
    file.extend(trailer);
    file
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn invented_bytes_are_refused(header in prop::collection::vec(any::<u8>(), 0..200), body in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(LayerFile::decode(&header, &body, body.len() as u64).is_err());
        let mut file = delta(1)[..HEADER_BYTES].to_vec();
        file.extend(body);
        prop_assert!(open_file(&file).is_err());
    }

    /// An index is believed whole or not at all, whatever its counts say; and nothing large is allocated for it.
    #[test]
    fn an_index_that_makes_no_sense_is_refused_though_its_checksum_matches(
        codec in 0..3u8,
        counts in prop::array::uniform3(prop_oneof![0..4u32, any::<u32>()]),
        raw_bytes in prop_oneof![3 => Just(None), 1 => any::<u32>().prop_map(Some)],
        rest in prop::collection::vec(prop_oneof![Just(0u8), Just(1u8), any::<u8>()], 0..150),
        values in 0..4u64,
    ) {
        let mut raw: Vec<u8> = counts.iter().flat_map(|count| count.to_le_bytes()).collect();
        raw.extend(rest);
        let length = raw_bytes.unwrap_or(raw.len() as u32);
        let mut body = vec![codec, 0, 0, 0];
        body.extend(length.to_le_bytes());
        body.extend(&raw);
        let good = delta(1);
        let mut trailer = good[good.len() - TRAILER_BYTES..][..TRAILER_BYTES - 4].to_vec();
        trailer[12..16].copy_from_slice(&0u32.to_le_bytes());
        trailer[36..40].copy_from_slice(&counts[1].to_le_bytes());
        trailer[40..48].copy_from_slice(&values.to_le_bytes());
        // The only one that makes sense is the empty index.
        let is_empty = codec == 0 && counts == [0; 3] && raw.len() == 12 && raw_bytes.is_none() && values == 0;
        prop_assert_eq!(is_empty, read_all(&sealed(body, trailer)).is_ok());
    }
}
