//! Page images in WAL: what they are made of, and the page that they stand for.

use core::ops::Range;

use thiserror::Error;

use crate::pglz;

const PAGE_BYTES: usize = 8192;

/// How an image is compressed (`wal_compression`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Compression {
    /// PostgreSQL's own method.
    Pglz,
    /// An LZ4 block.
    Lz4,
    /// A Zstandard frame.
    Zstd,
}

/// The image of a page in a record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlockImage<'a> {
    /// Bytes of the page that are zero and were left out; empty at 0 when there are none.
    pub hole: Range<u16>,
    /// How `bytes` are compressed.
    pub compression: Option<Compression>,
    /// Redo puts the image in place of the page. An image without it is there to check redo's result
    /// (`wal_consistency_checking`).
    pub apply: bool,
    /// The page without its hole, compressed or not.
    pub bytes: &'a [u8],
}

/// The bytes of an image do not make a page: the record's checksum matched, so whoever wrote it wrote it wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error("image compressed by {0:?} does not yield the page's bytes")]
pub struct ImageError(pub Option<Compression>);

/// The page that `image` stands for (`RestoreBlockImage`).
///
/// # Errors
/// When decompression fails or yields another length than the page without its hole.
pub fn restore_image(image: &BlockImage<'_>) -> Result<[u8; PAGE_BYTES], ImageError> {
    let error = ImageError(image.compression);
    let (hole_start, hole_end) = (usize::from(image.hole.start), usize::from(image.hole.end));
    if hole_start > hole_end || hole_end > PAGE_BYTES {
        return Err(error);
    }
    let mut page = [0; PAGE_BYTES];
    let length = PAGE_BYTES - (hole_end - hole_start);
    let packed = &mut page[..length];
    match image.compression {
        None if image.bytes.len() == length => packed.copy_from_slice(image.bytes),
        None => return Err(error),
        Some(Compression::Pglz) => pglz::decompress(image.bytes, packed).ok_or(error)?,
        Some(Compression::Lz4) => {
            let written = lz4_flex::block::decompress_into(image.bytes, packed).map_err(|_| error)?;
            if written != length {
                return Err(error);
            }
        }
        Some(Compression::Zstd) => unpack_zstd(image.bytes, packed).ok_or(error)?,
    }
    page.copy_within(hole_start..length, hole_end);
    page[hole_start..hole_end].fill(0);
    Ok(page)
}

/// Fills `page` with exactly one frame.
fn unpack_zstd(frame: &[u8], page: &mut [u8]) -> Option<()> {
    // A frame of a page needs no larger window than the page; a made-up one must not make us allocate.
    const WINDOW_BYTES_MAX: u64 = 128 * 1024;
    let mut decoder = ruzstd::decoding::FrameDecoder::new();
    decoder.set_max_window_size(WINDOW_BYTES_MAX);
    let written = decoder.decode_all(frame, page).ok()?;
    (written == page.len()).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hole_is_filled_with_zeros() {
        let bytes = [7; 8000];
        let image = BlockImage { hole: 100..292, compression: None, apply: true, bytes: &bytes };
        let page = restore_image(&image).expect("a page");
        assert!(page[..100].iter().chain(&page[292..]).all(|byte| *byte == 7));
        assert_eq!([0; 192], page[100..292]);
    }

    #[test]
    fn image_of_another_length_is_refused() {
        let bytes = [7; 8000];
        for hole in [0..0, 100..291, 100..293] {
            let image = BlockImage { hole, compression: None, apply: true, bytes: &bytes };
            assert_eq!(Err(ImageError(None)), restore_image(&image));
        }
        for method in [Compression::Pglz, Compression::Lz4, Compression::Zstd] {
            for bytes in [&bytes[..], &[], &[0x28, 0xB5, 0x2F, 0xFD]] {
                let image = BlockImage { hole: 0..0, compression: Some(method), apply: true, bytes };
                assert_eq!(Err(ImageError(Some(method))), restore_image(&image));
            }
        }
    }

    #[test]
    fn lz4_block_is_unpacked() {
        let page: alloc::vec::Vec<u8> = (0..8192_u32).map(|i| (i / 100) as u8).collect();
        let bytes = lz4_flex::block::compress(&page);
        let image = BlockImage { hole: 0..0, compression: Some(Compression::Lz4), apply: true, bytes: &bytes };
        assert_eq!(page, restore_image(&image).expect("a page"));
    }
}
