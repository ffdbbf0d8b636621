//! Files of SLRUs from their pages.

use alloc::{collections::BTreeMap, format, string::String, vec::Vec};

use layers::Slru;
use metadata::SLRU_PAGE_BYTES;

use crate::plan::SmallFile;

/// A page cannot be part of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("page {page} of {} has {bytes} bytes, expected {SLRU_PAGE_BYTES}", metadata_slru(*.slru).directory())]
pub struct SlruError {
    /// Of which.
    pub slru: Slru,
    /// Which page.
    pub page: u32,
    /// What it has.
    pub bytes: usize,
}

/// The same SLRU in `metadata`'s words.
pub(crate) fn metadata_slru(slru: Slru) -> metadata::Slru {
    match slru {
        Slru::TransactionStatus => metadata::Slru::TransactionStatus,
        Slru::MultixactOffsets => metadata::Slru::MultixactOffsets,
        Slru::MultixactMembers => metadata::Slru::MultixactMembers,
        Slru::CommitTimestamps => metadata::Slru::CommitTimestamps,
    }
}

/// Every file with a page, up to its last page; pages between that never were are zero, as in PostgreSQL's own sparse files.
pub(crate) fn slru_files(pages: BTreeMap<(Slru, u32), Vec<u8>>) -> Result<Vec<SmallFile>, SlruError> {
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    for ((slru, page), value) in pages {
        if value.len() != SLRU_PAGE_BYTES {
            return Err(SlruError { slru, page, bytes: value.len() });
        }
        let (name, in_file) = metadata_slru(slru).file(page);
        let file = files.entry(format!("{}/{name}", metadata_slru(slru).directory())).or_default();
        // Pages come in their order.
        file.resize(in_file as usize * SLRU_PAGE_BYTES, 0);
        file.extend_from_slice(&value);
    }
    Ok(files.into_iter().map(|(path, contents)| SmallFile { path, contents }).collect())
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    fn page(byte: u8) -> Vec<u8> {
        vec![byte; SLRU_PAGE_BYTES]
    }

    #[test]
    fn pages_become_files_of_32_with_zeros_between() {
        let pages = BTreeMap::from([
            ((Slru::TransactionStatus, 0), page(1)),
            ((Slru::TransactionStatus, 2), page(2)),
            ((Slru::TransactionStatus, 31), page(3)),
            ((Slru::TransactionStatus, 32), page(4)),
            ((Slru::MultixactMembers, 82_040 * 32 + 1), page(5)),
        ]);
        let files = slru_files(pages).expect("files");
        let lengths: Vec<_> = files.iter().map(|file| (&*file.path, file.contents.len() / SLRU_PAGE_BYTES)).collect();
        assert_eq!(vec![("pg_multixact/members/14078", 2), ("pg_xact/0000", 32), ("pg_xact/0001", 1)], lengths);
        let xact = &files[1].contents;
        for number in 0..32 {
            let expected =
                [(0, 1), (2, 2), (31, 3)].iter().find(|(page, _)| *page == number).map_or(0, |(_, byte)| *byte);
            let bytes = &xact[number * SLRU_PAGE_BYTES..][..SLRU_PAGE_BYTES];
            assert!(bytes.iter().all(|byte| *byte == expected), "page {number}");
        }
    }

    #[test]
    fn a_page_of_another_length_is_refused() {
        let pages = BTreeMap::from([((Slru::MultixactOffsets, 7), vec![0; 100])]);
        let refused = SlruError { slru: Slru::MultixactOffsets, page: 7, bytes: 100 };
        assert_eq!(Err(refused), slru_files(pages));
    }
}
