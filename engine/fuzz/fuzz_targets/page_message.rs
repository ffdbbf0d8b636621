//! See `lakebase_fuzz::fuzz_page_message`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| lakebase_fuzz::fuzz_page_message(data));
