//! Oracle: checksums of the pages of a new cluster, which `initdb` wrote and `pg_checksums` agrees with.

#[path = "../../wal/tests/postgres/mod.rs"]
mod postgres;

use std::{fs, path::PathBuf};

use pgformat::{is_new_page, is_page_sound, page_checksum, set_page_checksum};
use postgres::{Postgres, output};

const PAGE_BYTES: usize = 8192;

/// Files of relations, without those that have no pages.
fn relations(directory: PathBuf) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).expect("a directory") {
        let entry = entry.expect("an entry");
        let name = entry.file_name().into_string().expect("a plain name");
        if entry.path().is_dir() {
            found.extend(relations(entry.path()));
        } else if name.starts_with(|first: char| first.is_ascii_digit()) {
            found.push(entry.path());
        }
    }
    found
}

/// `pg_checksums` writes what we refuse to believe otherwise: a wrong one of ours is a bad block of its.
#[test]
fn checksums_are_those_of_a_cluster() {
    let postgres = Postgres::find();
    let directory = postgres.directory();
    let server = postgres.initdb(&directory, "data", &["--data-checksums"]);
    let (mut sound, mut changed) = (0, 0);
    for path in relations(server.data.join("base")) {
        let mut file = fs::read(&path).expect("a readable file");
        let (pages, rest) = file.as_chunks_mut::<PAGE_BYTES>();
        assert!(rest.is_empty(), "{path:?}");
        let is_changed = path.ends_with("1/1259");
        for (page, block) in pages.iter_mut().zip(0..) {
            assert!(is_page_sound(page, block), "{path:?} block {block}");
            sound += u32::from(!is_new_page(page));
            if is_changed {
                // Free space, so that the page stays readable.
                page[5000] ^= 1;
                assert_ne!(page_checksum(page, block), u16::from_le_bytes([page[8], page[9]]));
                set_page_checksum(page, block);
                changed += 1;
            }
        }
        if is_changed {
            fs::write(&path, &file).expect("a written file");
        }
    }
    assert!(sound > 1000 && changed > 3, "{sound} pages, {changed} of them changed");
    output(postgres.command("pg_checksums").arg("--check").arg("-D").arg(&server.data));
}
