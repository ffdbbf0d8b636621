//! See `lakebase_fuzz::fuzz_history_file`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| lakebase_fuzz::fuzz_history_file(data));
