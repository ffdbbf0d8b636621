//! What is fuzzed: one function per decoder, which takes any bytes and panics when a rule is broken.
//!
//! Two ways to run them: `cargo fuzz run <target> --features libfuzzer` (nightly, guided by coverage), and
//! `cargo run --bin short_run` (stable, mutations of the corpus under a seed). To add a target: a function in a module
//! here, a line in [`TARGETS`], a file in `fuzz_targets/`, a `[[bin]]` in `Cargo.toml`, and inputs in `corpus/<name>/`.

mod layers_targets;
mod pgformat_targets;
mod wal_targets;
mod wire_targets;

pub use layers_targets::fuzz_manifest;
pub use pgformat_targets::{fuzz_history_file, fuzz_pg_control};
pub use wal_targets::{fuzz_stored_record, fuzz_wal_decoder, fuzz_wal_scanner};
pub use wire_targets::{
    fuzz_append_message, fuzz_append_stream, fuzz_feed, fuzz_page_message, fuzz_postgres_session, fuzz_scram,
};

/// A decoder under test.
#[derive(Clone, Copy)]
pub struct Target {
    /// Name of the cargo-fuzz target and of the corpus directory.
    pub name: &'static str,
    /// Panics when the decoder breaks a rule on these bytes.
    pub run: fn(&[u8]),
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target { name: "wal_scanner", run: fuzz_wal_scanner },
    Target { name: "wal_decoder", run: fuzz_wal_decoder },
    Target { name: "stored_record", run: fuzz_stored_record },
    Target { name: "pg_control", run: fuzz_pg_control },
    Target { name: "history_file", run: fuzz_history_file },
    Target { name: "manifest", run: fuzz_manifest },
    Target { name: "append_message", run: fuzz_append_message },
    Target { name: "append_stream", run: fuzz_append_stream },
    Target { name: "feed", run: fuzz_feed },
    Target { name: "page_message", run: fuzz_page_message },
    Target { name: "postgres_session", run: fuzz_postgres_session },
    Target { name: "scram", run: fuzz_scram },
];
