//! See `lakebase_fuzz::fuzz_wal_scanner`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| lakebase_fuzz::fuzz_wal_scanner(data));
