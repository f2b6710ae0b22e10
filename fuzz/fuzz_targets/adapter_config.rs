#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ferrotune_fuzz::adapter_config(bytes));
