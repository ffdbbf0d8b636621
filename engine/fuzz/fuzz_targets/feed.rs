//! See `lakebase_fuzz::fuzz_feed`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| lakebase_fuzz::fuzz_feed(data));
