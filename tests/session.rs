//! Session files: what is saved comes back, what does not fit is refused and changes nothing.
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clsa::backend::Routing;
use clsa::backend::ggml::Ggml;
use clsa::cache::CacheType;
use clsa::engine::{Engine, Options};
use clsa::error::Error;
use clsa::model::Model;
use clsa::session::{Identity, Session, SessionFile};
use clsa_convert::{Mix, Plan, Recipe, synth};
use serde_json::json;

fn model(dir: &Path, preset: &str, seed: u64) -> Model {
    let path = dir.join(format!("{preset}-{seed}.gguf"));
    let mix = if preset.ends_with("-4b") { "Q4_K_M".parse().unwrap() } else { Mix::F32 };
    let plan = Plan::new(synth::model(preset, seed).unwrap(), &Recipe::new(mix), None).unwrap();
    let options = clsa_convert::Options { threads: 2, abort: None, progress: &|_| () };
    plan.write(&path, &options).unwrap();
    Model::open(&path).unwrap()
}

fn options() -> Options {
    Options { context: 1024, max_rows: 32, ..Options::default() }
}

fn session(model: &Model, options: &Options) -> Session {
    let backend = Ggml::new(model.clone(), options.cache_spec(), 1, Arc::default()).unwrap();
    Session::new(Engine::new(model.clone(), Box::new(backend), options).unwrap()).unwrap()
}

fn identity(s: &Session) -> Identity {
    Identity::new(s.engine(), "template")
}

/// Brings the session to `text`; how many tokens were run.
fn sync(s: &mut Session, text: &[u32]) -> usize {
    s.sync(text, |_, _| ControlFlow::Continue(())).unwrap().processed
}

fn text(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| (i * 37 + i * i) % 500 + 3).collect()
}

/// `n` greedy tokens.
fn greedy(s: &mut Session, n: usize) -> Vec<u32> {
    (0..n)
        .map(|_| {
            let best = s.logits().iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as u32;
            s.push(best).unwrap();
            best
        })
        .collect()
}

/// A conversation of two prompts with answers, saved.
fn saved(dir: &Path, model: &Model) -> (Session, PathBuf, Vec<u32>) {
    let mut s = session(model, &options());
    let mut all = text(300);
    sync(&mut s, &all);
    all.extend(greedy(&mut s, 60));
    all.extend(text(50));
    sync(&mut s, &all);
    all.extend(greedy(&mut s, 60));
    let path = dir.join("s.session");
    let identity = identity(&s);
    let size = s.save(&path, &identity, json!({"messages": ["a"]})).unwrap();
    assert_eq!(size, std::fs::metadata(&path).unwrap().len());
    (s, path, all)
}

#[test]
fn a_loaded_session_goes_on_exactly() {
    let dir = tempfile::tempdir().unwrap();
    for preset in ["clsa-tiny", "yoco-tiny", "transformer-tiny"] {
        let model = model(dir.path(), preset, 1);
        let (mut live, path, all) = saved(dir.path(), &model);
        let file = SessionFile::open(&path).unwrap();
        assert_eq!(file.contents().state, json!({"messages": ["a"]}));
        let mut loaded = session(&model, &options());
        let id = identity(&loaded);
        loaded.load(&file, &id).unwrap();
        assert_eq!(loaded.tokens(), all, "{preset}");
        let next = [all.clone(), text(40)].concat();
        assert_eq!(sync(&mut live, &next), 40);
        assert_eq!(sync(&mut loaded, &next), 40, "{preset}: the whole past is reused");
        assert_eq!(live.logits(), loaded.logits(), "{preset}");
        assert_eq!(greedy(&mut live, 20), greedy(&mut loaded, 20), "{preset}");
    }
}

#[test]
fn a_loaded_session_can_be_edited_at_its_end_without_a_new_prefill() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path(), "clsa-tiny", 1);
    let (_, path, all) = saved(dir.path(), &model);
    let load = || {
        let mut s = session(&model, &options());
        let id = identity(&s);
        s.load(&SessionFile::open(&path).unwrap(), &id).unwrap();
        s
    };
    // Another answer to the last prompt: its logits were saved.
    let mut again = load();
    assert_eq!(sync(&mut again, &all[..410]), 0);
    assert_eq!(greedy(&mut again, 60), &all[410..]);
    // Another last message: only that is run, and with the same result as in a session that was never saved.
    let edited = [&all[..360], &text(95)[5..]].concat();
    let mut loaded = load();
    assert_eq!(sync(&mut loaded, &edited), 90);
    let mut fresh = session(&model, &options());
    sync(&mut fresh, &edited[..300]);
    edited[300..360].iter().for_each(|&t| fresh.push(t).unwrap());
    sync(&mut fresh, &edited);
    assert_eq!(loaded.logits(), fresh.logits());
    // Back to where the imported windows do not reach: the rows that are missing are run again, not taken as they are.
    let mut back = load();
    let processed = sync(&mut back, &[&all[..350], &[7][..]].concat());
    assert_eq!(processed, 51, "from the checkpoint at the first prompt's end");
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let model_1 = model(dir.path(), "clsa-tiny", 1);
    let (_, path, _) = saved(dir.path(), &model_1);
    let file = SessionFile::open(&path).unwrap();
    let refused = |s: &mut Session, id: &Identity, expected: &str| {
        sync(s, &text(50));
        let (tokens, logits) = (s.tokens().to_vec(), s.logits().to_vec());
        let error = s.load(&file, id).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(error.exit_code(), 2);
        assert_eq!((s.tokens(), s.engine().len(s.seq())), (&tokens[..], 50));
        assert_eq!(s.logits(), logits);
        // And it still works.
        sync(s, &text(60));
    };
    let mut same = session(&model_1, &options());
    let id = Identity::new(same.engine(), "other template");
    refused(&mut same, &id, "another chat template");
    let mut other = session(&model(dir.path(), "clsa-tiny", 2), &options());
    let id = identity(&other);
    refused(&mut other, &id, "another model");
    let mut larger = session(&model_1, &Options { k: CacheType::F32, ..options() });
    let id = identity(&larger);
    refused(&mut larger, &id, "use the same -ctk");
    let mut short = session(&model_1, &Options { context: 256, ..options() });
    let id = identity(&short);
    refused(&mut short, &id, "start with -c 470 or more");
}

#[test]
fn another_routing_mode_may_go_on_but_not_with_the_old_logits() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path(), "clsa-tiny", 1);
    let (_, path, all) = saved(dir.path(), &model);
    let mut dense = session(&model, &Options { routing: Some(Routing::Dense), ..options() });
    let id = identity(&dense);
    dense.load(&SessionFile::open(&path).unwrap(), &id).unwrap();
    assert_eq!(sync(&mut dense, &all[..410]), 50, "the last message is run again for its logits");
}

#[test]
fn every_damaged_byte_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path(), "clsa-tiny", 1);
    let (_, path, _) = saved(dir.path(), &model);
    let good = std::fs::read(&path).unwrap();
    let bad = dir.path().join("bad.session");
    let open = |bytes: &[u8]| {
        std::fs::write(&bad, bytes).unwrap();
        match SessionFile::open(&bad) {
            Err(Error::Session(e)) => Some(e.to_string()),
            Err(e) => panic!("{e}"),
            Ok(_) => None,
        }
    };
    assert_eq!(open(&good), None);
    for len in (0..64).chain([64, 65, good.len() / 2, good.len() - 1]) {
        assert!(open(&good[..len]).is_some(), "cut to {len} bytes");
    }
    // Padding between sections is the only part that nothing depends on.
    let mut noticed = 0;
    let places: Vec<usize> = (0..good.len()).step_by(good.len() / 200).chain(0..64).collect();
    for &at in &places {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        noticed += usize::from(open(&bytes).is_some());
    }
    assert!(noticed + 3 >= places.len(), "{noticed} of {}", places.len());
    let mut version = good.clone();
    version[8] = 9;
    assert!(open(&version).unwrap().contains("its version is 9, this program reads 1"));
    assert!(open(b"GGUF and more").unwrap().contains("no session file"));
}

#[test]
fn saving_is_atomic() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path(), "clsa-tiny", 1);
    let (mut s, path, _) = saved(dir.path(), &model);
    let before = std::fs::read(&path).unwrap();
    let id = identity(&s);
    s.save(&path, &id, json!(null)).unwrap();
    assert_ne!(std::fs::read(&path).unwrap(), before);
    assert!(matches!(s.save(&dir.path().join("no/such/folder"), &id, json!(null)), Err(Error::Io { .. })));
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "the model and the session: {left:?}");
}

/// Sizes and times at a depth, printed; the fast sibling of the slow test below.
fn save_and_load(model: &Model, dir: &Path, len: usize) -> std::time::Duration {
    use std::time::Instant;
    let options = Options { context: len + 64, ..Options::default() };
    let mut s = session(model, &options);
    s.fill_random(len, 1).unwrap();
    let (path, id) = (dir.join("depth.session"), identity(&s));
    let started = Instant::now();
    let size = s.save(&path, &id, json!(null)).unwrap();
    let saved = started.elapsed();
    drop(s);
    let mut s = session(model, &options);
    let started = Instant::now();
    let file = SessionFile::open(&path).unwrap();
    let checked = started.elapsed();
    s.load(&file, &id).unwrap();
    let loaded = started.elapsed();
    assert_eq!(s.engine().len(s.seq()), len);
    println!(
        "{len} positions (random rows): {size} bytes, saved in {saved:.2?}, loaded in {loaded:.2?} (checksums {checked:.2?})"
    );
    loaded
}

#[test]
fn a_session_filled_for_timing_is_saved_and_loaded() {
    let dir = tempfile::tempdir().unwrap();
    save_and_load(&model(dir.path(), "clsa-tiny", 1), dir.path(), 5000);
}

#[test]
#[ignore = "slow: needs the 4B shape (CLSA_4B_MODEL, or made here: 1.7 GB)"]
fn a_128k_session_of_the_4b_shape_is_ready_within_a_second() {
    let dir = tempfile::tempdir().unwrap();
    let model = match std::env::var_os("CLSA_4B_MODEL") {
        Some(path) => Model::open(Path::new(&path)).unwrap(),
        None => model(dir.path(), "clsa-4b", 1),
    };
    for len in [32_768, 131_072] {
        let loaded = save_and_load(&model, dir.path(), len);
        assert!(loaded.as_secs_f64() < 1.0, "{loaded:?}");
    }
}
