//! See `lakebase_fuzz::fuzz_manifest`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| lakebase_fuzz::fuzz_manifest(data));
