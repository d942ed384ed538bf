//! Any bytes as a GGUF file: opened, listed, verified and planned, or refused.
#![no_main]
use clsa_convert::{Mix, Model, Plan, Recipe, gguf::File};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(path) = tempfile::NamedTempFile::new_in("/dev/shm").map(tempfile::NamedTempFile::into_temp_path)
    else {
        return;
    };
    if std::fs::write(&path, bytes).is_err() {
        return;
    }
    let Ok(file) = File::open(&path) else { return };
    for (key, value) in file.metadata() {
        assert!(file.get(key).is_some() && !value.describe().is_empty());
    }
    for tensor in file.tensors() {
        assert_eq!(file.data(tensor).len(), tensor.bytes);
    }
    let _ = file.verify(|_| ());
    if let Ok(model) = Model::from_gguf(&file) {
        let _ = Plan::new(model, &Recipe::new(Mix::Q4_K_M), None).and_then(|plan| plan.file_size());
    }
});
