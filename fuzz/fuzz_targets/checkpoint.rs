//! A checkpoint folder: config.json, tokenizer.json and model.safetensors, each up to a NUL but the last, converted or refused.
#![no_main]
use clsa_convert::{Mix, Model, Options, Plan, Recipe, checkpoint::Checkpoint, gguf::File};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else { return };
    let mut parts = bytes.splitn(3, |&b| b == 0);
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        let Some(part) = parts.next() else { return };
        if std::fs::write(dir.path().join(name), part).is_err() {
            return;
        }
    }
    let Ok(checkpoint) = Checkpoint::open(dir.path()) else { return };
    let Ok(model) = Model::from_checkpoint(&checkpoint) else { return };
    let Ok(plan) = Plan::new(model, &Recipe::new(Mix::Q8_0), None) else { return };
    let out = dir.path().join("out.gguf");
    if plan.write(&out, &Options { threads: 1, abort: None, progress: &|_| () }).is_ok() {
        File::open(&out).expect("what we write we read").verify(|_| ()).expect("and it is whole");
    }
});
