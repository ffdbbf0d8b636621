//! The header of an index's entry.
//!
//! Source: `access/itup.h`.

/// Bytes of the header (`IndexTupleData`).
pub(crate) const INDEX_TUPLE_BYTES: usize = 8;
/// Bytes of a row's address (`ItemPointerData`).
pub(crate) const TID_BYTES: usize = 6;
/// The address field is not a row's address (`INDEX_ALT_TID_MASK`).
pub(crate) const ALT_TID: u16 = 0x2000;
const SIZE_MASK: u16 = 0x1FFF;

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

/// Flags and length (`t_info`).
pub(crate) fn info(tuple: &[u8]) -> Option<u16> {
    u16_at(tuple, 6)
}

/// Length of the entry that `tuple` begins with (`IndexTupleSize`); at least a header.
pub(crate) fn size(tuple: &[u8]) -> Option<usize> {
    Some(usize::from(info(tuple)? & SIZE_MASK)).filter(|size| *size >= INDEX_TUPLE_BYTES)
}

/// Block number in the address field.
pub(crate) fn block(tuple: &[u8]) -> Option<u32> {
    Some(u32::from(u16_at(tuple, 0)?) << 16 | u32::from(u16_at(tuple, 2)?))
}

/// Offset number in the address field.
pub(crate) fn offset(tuple: &[u8]) -> Option<u16> {
    u16_at(tuple, 4)
}

/// Sets the block number in the address field of an entry, which has a header.
pub(crate) fn set_block(tuple: &mut [u8], block: u32) {
    tuple[..2].copy_from_slice(&((block >> 16) as u16).to_le_bytes());
    tuple[2..4].copy_from_slice(&(block as u16).to_le_bytes());
}

/// Sets the offset number in the address field of an entry, which has a header.
pub(crate) fn set_offset(tuple: &mut [u8], offset: u16) {
    tuple[4..6].copy_from_slice(&offset.to_le_bytes());
}

/// Sets flags and length of an entry, which has a header.
pub(crate) fn set_info(tuple: &mut [u8], info: u16) {
    tuple[6..8].copy_from_slice(&info.to_le_bytes());
}

/// `info` with another length.
pub(crate) const fn info_with_size(info: u16, size: usize) -> u16 {
    info & !SIZE_MASK | size as u16 & SIZE_MASK
}
