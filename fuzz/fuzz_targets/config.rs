//! Any JSON as a configuration of any family.
#![no_main]
use clsa_convert::family::Layout;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(value) = serde_json::from_slice(bytes)
        && let Ok(layout) = Layout::from_config(value)
    {
        assert!(layout.tensors.iter().all(|t| !t.shape.contains(&0)));
    }
});
