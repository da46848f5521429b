//! Any bytes as a configuration document. What is accepted can be written, and reads back as the same.
//!
//! `fuzz/seeds/config_document` holds a document of each version; the fuzzer does not find the form by itself.
#![no_main]
#![forbid(unsafe_code)]

use libfuzzer_sys::fuzz_target;
use vm_lifecycle::config;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(read) = config::read(bytes) {
        let written = config::write(&read);
        let again = config::read(&written).expect("it was written here");
        assert_eq!(again, read);
        assert_eq!(config::write(&again), written);
    }
});
