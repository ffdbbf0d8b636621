//! See `lakebase_fuzz::fuzz_postgres_session`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| lakebase_fuzz::fuzz_postgres_session(data));
