//! See `lakebase_fuzz::fuzz_append_stream`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| lakebase_fuzz::fuzz_append_stream(data));
