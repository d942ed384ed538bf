//! The whole chain against a naive one that sorts everything in f64, and draws against their probabilities.
use super::*;
use crate::tokenizer::GgmlVocab;
use proptest::prelude::*;
use std::{collections::BTreeMap, sync::LazyLock, time::Instant};

/// Token 0 is unknown, 1 to 26 are the letters a to z, the rest are `<27>`, `<28>`, ...
fn vocabulary(size: usize) -> Arc<Tokenizer> {
    let mut tokens: Vec<String> = vec!["<unk>".into()];
    tokens.extend(('a'..='z').map(String::from));
    tokens.extend((tokens.len()..size).map(|i| format!("<{i}>")));
    let vocab = GgmlVocab {
        model: "llama",
        scores: Some(vec![0.0; tokens.len()]),
        tokens: tokens.iter().map(String::as_str).collect(),
        add_space_prefix: Some(false),
        unk: Some(0),
        ..GgmlVocab::default()
    };
    Arc::new(Tokenizer::from_vocab(&vocab).unwrap())
}

/// Token 0 is unknown, 1 is `</s>`, which ends an answer; `texts` follow.
pub(super) fn vocabulary_of(texts: impl Iterator<Item = String>) -> Arc<Tokenizer> {
    let mut tokens: Vec<String> = vec!["<unk>".into(), "</s>".into()];
    tokens.extend(texts.map(|t| t.replace(' ', "▁")));
    let mut types = vec![1; tokens.len()];
    types[..2].copy_from_slice(&[2, 3]);
    let vocab = GgmlVocab {
        model: "llama",
        scores: Some(vec![0.0; tokens.len()]),
        types: Some(types),
        tokens: tokens.iter().map(String::as_str).collect(),
        add_space_prefix: Some(false),
        unk: Some(0),
        ..GgmlVocab::default()
    };
    Arc::new(Tokenizer::from_vocab(&vocab).unwrap())
}

pub(super) fn tokenizer() -> Arc<Tokenizer> {
    static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| vocabulary(300));
    TOKENIZER.clone()
}

fn sampler(params: SamplerParams) -> Sampler {
    Sampler::new(SamplerParams { seed: params.seed.or(Some(1)), ..params }, tokenizer()).unwrap()
}

/// Everything off, so that a test switches on what it tests.
fn plain() -> SamplerParams {
    SamplerParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, ..SamplerParams::default() }
}

type Naive = Vec<(u32, f64, f64)>;

fn normalize(list: &mut Naive, temperature: f64) {
    let top = list.iter().map(|c| c.1).fold(f64::NEG_INFINITY, f64::max);
    list.iter_mut().for_each(|c| c.2 = ((c.1 - top) / temperature).exp());
    let sum: f64 = list.iter().map(|c| c.2).sum();
    list.iter_mut().for_each(|c| c.2 /= sum);
}

/// The probability of each token that is left: sort, cut, sort, cut.
fn naive(p: &SamplerParams, logits: &[f32], xtc: bool) -> Naive {
    let mut all: Naive = (0..).zip(logits).map(|(id, x)| (id, f64::from(*x), 0.0)).collect();
    all.retain(|c| c.1 > f64::NEG_INFINITY);
    let best = |a: &(u32, f64, f64), b: &(u32, f64, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    all.sort_by(best);
    if p.top_n_sigma > 0.0 {
        let mean = all.iter().map(|c| c.1).sum::<f64>() / all.len() as f64;
        let var = all.iter().map(|c| (c.1 - mean).powi(2)).sum::<f64>() / all.len() as f64;
        let floor = all[0].1 - f64::from(p.top_n_sigma) * var.sqrt();
        all.retain(|c| c.1 >= floor);
    }
    if p.top_k > 0 {
        all.truncate(p.top_k as usize);
    }
    let cut = |list: &mut Naive, enough: &dyn Fn(f64) -> bool| {
        let mut sum = 0.0;
        let n = list.iter().position(|c| {
            sum += c.2;
            enough(sum)
        });
        list.truncate(n.map_or(usize::MAX, |n| n + 1));
    };
    if p.typical_p < 1.0 {
        normalize(&mut all, 1.0);
        let entropy: f64 = all.iter().map(|c| -c.2 * c.2.ln()).sum();
        all.sort_by(|a, b| (a.2.ln() + entropy).abs().total_cmp(&(b.2.ln() + entropy).abs()));
        cut(&mut all, &|sum| sum > f64::from(p.typical_p));
        all.sort_by(best);
    }
    if p.top_p < 1.0 {
        normalize(&mut all, 1.0);
        cut(&mut all, &|sum| sum >= f64::from(p.top_p));
    }
    normalize(&mut all, 1.0);
    let top = all[0].2;
    all.retain(|c| c.2 >= top * f64::from(p.min_p));
    normalize(&mut all, 1.0);
    let above = all.iter().filter(|c| c.2 >= f64::from(p.xtc_threshold)).count();
    if xtc && above > 1 {
        all.drain(..above - 1);
    }
    normalize(&mut all, f64::from(p.temperature));
    all
}

/// Logits that fall off irregularly, no two of them close to each other.
fn uneven(n: u32) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919) % n) as f32 * -0.137 + ((i * 31) % 11) as f32 * 0.01).collect()
}

fn combinations() -> Vec<SamplerParams> {
    vec![
        plain(),
        SamplerParams::default(),
        SamplerParams { top_p: 0.7, ..plain() },
        SamplerParams { min_p: 0.1, temperature: 2.0, ..plain() },
        SamplerParams { typical_p: 0.5, ..plain() },
        SamplerParams { top_n_sigma: 1.2, temperature: 1.5, ..plain() },
        SamplerParams { top_k: 7, temperature: 3.0, ..plain() },
        SamplerParams {
            top_k: 20,
            typical_p: 0.9,
            top_p: 0.9,
            min_p: 0.02,
            top_n_sigma: 2.0,
            temperature: 0.7,
            ..plain()
        },
    ]
}

#[test]
fn draws_follow_the_naive_probabilities() {
    let logits = uneven(61);
    for params in combinations() {
        let expected = naive(&params, &logits, false);
        let mut s = sampler(params.clone());
        let n = 40_000;
        let mut counts: BTreeMap<u32, u32> = BTreeMap::new();
        for _ in 0..n {
            *counts.entry(s.sample(&mut logits.clone()).unwrap()).or_default() += 1;
        }
        assert!(counts.keys().all(|id| expected.iter().any(|c| c.0 == *id)), "{params:?}");
        for (id, _, p) in expected {
            let count = f64::from(counts.get(&id).copied().unwrap_or(0));
            let deviation = (f64::from(n) * p * (1.0 - p)).sqrt();
            assert!((count - f64::from(n) * p).abs() < 5.0 * deviation + 1.0, "{params:?}: {id} {count} {p}");
        }
    }
}

#[test]
fn xtc_drops_the_best_as_often_as_it_should() {
    let logits = [2.0, 1.8, 1.7, -5.0];
    let params = SamplerParams { xtc_probability: 0.25, xtc_threshold: 0.2, ..plain() };
    let (kept, dropped) = (naive(&params, &logits, false), naive(&params, &logits, true));
    assert_eq!((kept.len(), dropped.len(), dropped[0].0), (4, 2, 2));
    let mut s = sampler(params);
    let n = 40_000;
    let first = (0..n).filter(|_| s.sample(&mut logits.clone()).unwrap() == 0).count() as f64;
    let p = 0.75 * kept[0].2;
    assert!((first - f64::from(n) * p).abs() < 5.0 * (f64::from(n) * p * (1.0 - p)).sqrt(), "{first} {p}");
}

#[test]
fn temperature_zero_takes_the_best_and_the_first_of_equals() {
    let greedy = SamplerParams {
        temperature: 0.0,
        xtc_probability: 1.0,
        xtc_threshold: 0.0,
        ..SamplerParams::default()
    };
    let mut s = sampler(greedy.clone());
    assert_eq!(s.sample(&mut [1.0, 3.0, 2.0, 3.0]).unwrap(), 1);
    assert_eq!(s.sample(&mut [f32::NEG_INFINITY, -1e30]).unwrap(), 1);
    assert_eq!(s.sample(&mut [-0.0, 0.0]).unwrap(), 0);
    let biased = SamplerParams { logit_bias: BTreeMap::from([(1, -1000.0), (2, 1.5)]), ..greedy.clone() };
    assert_eq!(sampler(biased).sample(&mut [1.0, 3.0, 2.0, 3.0]).unwrap(), 2);
    let mut s = sampler(SamplerParams { repeat_penalty: 2.0, ..greedy.clone() });
    s.accept_prompt(1);
    s.accept(3).unwrap();
    assert_eq!(s.sample(&mut [1.0, 3.0, 2.0, 3.0]).unwrap(), 2);
    s.set_history(&[2]);
    assert_eq!(s.sample(&mut [1.0, 3.0, 2.5, 2.0]).unwrap(), 1);
    let mut s = sampler(SamplerParams { dry_multiplier: 1.0, ..greedy });
    [1, 2, 3, 1, 2].into_iter().for_each(|id| s.accept(id).unwrap());
    assert_eq!(s.sample(&mut [0.0, 0.0, 0.0, 0.5, 0.4]).unwrap(), 4);
}

#[test]
fn broken_logits_are_errors_not_panics() {
    let all = combinations().into_iter().chain([
        SamplerParams { temperature: 0.0, ..plain() },
        SamplerParams { mirostat: 1, ..plain() },
        SamplerParams { mirostat: 2, ..plain() },
        SamplerParams { logprobs: 3, ..plain() },
    ]);
    for params in all {
        let mut s = sampler(params);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut logits = uneven(61);
            logits[33] = bad;
            let e = s.sample(&mut logits).unwrap_err();
            assert!(matches!(e, Error::NotFinite { id: 33, .. }), "{e}");
        }
        assert!(matches!(s.sample(&mut [f32::NEG_INFINITY; 61]), Err(Error::NothingLeft)));
        assert!(matches!(s.sample(&mut []), Err(Error::NothingLeft)));
        assert_eq!(s.sample(&mut [f32::NEG_INFINITY, 0.0]).unwrap(), 1);
    }
}

#[test]
fn bad_parameters_make_no_sampler() {
    let e = Sampler::new(SamplerParams { top_p: 2.0, ..plain() }, tokenizer()).unwrap_err();
    assert!(matches!(e, Error::Parameter { name: "top-p", .. }), "{e}");
    let e = Sampler::new(SamplerParams { logit_bias: BTreeMap::from([(300, 1.0)]), ..plain() }, tokenizer())
        .unwrap_err();
    assert_eq!(e.to_string(), "logit-bias: token 300 is outside the vocabulary of 300");
}

#[test]
fn a_seed_gives_these_tokens_on_every_platform() {
    let logits = uneven(61);
    let mut s = sampler(SamplerParams { seed: Some(42), temperature: 1.0, ..SamplerParams::default() });
    let ids: Vec<u32> = (0..16).map(|_| s.sample(&mut logits.clone()).unwrap()).collect();
    assert_eq!(ids, GOLDEN);
    let again = Sampler::new(SamplerParams { seed: None, ..plain() }, tokenizer()).unwrap();
    let mut other = Sampler::new(SamplerParams { seed: Some(again.seed()), ..plain() }, tokenizer()).unwrap();
    let mut again = again;
    for _ in 0..50 {
        assert_eq!(again.sample(&mut logits.clone()).unwrap(), other.sample(&mut logits.clone()).unwrap());
    }
}
const GOLDEN: [u32; 16] = [49, 22, 37, 27, 49, 5, 0, 5, 11, 54, 55, 10, 16, 0, 33, 55];

#[test]
fn a_restored_sampler_goes_on() {
    let logits = uneven(61);
    for mirostat in 0..=2 {
        let mut s =
            sampler(SamplerParams { mirostat, frequency_penalty: 0.3, dry_multiplier: 0.5, ..plain() });
        let mut tokens = Vec::new();
        let step = |s: &mut Sampler, tokens: &mut Vec<u32>| {
            let id = s.sample(&mut logits.clone()).unwrap();
            s.accept(id).unwrap();
            tokens.push(id);
        };
        (0..50).for_each(|_| step(&mut s, &mut tokens));
        let saved = serde_json::to_string(&s.state()).unwrap();
        let mut restored = Sampler::restore(serde_json::from_str(&saved).unwrap(), tokenizer()).unwrap();
        restored.set_history(&tokens);
        let mut other = tokens.clone();
        (0..50).for_each(|_| step(&mut s, &mut tokens));
        (0..50).for_each(|_| step(&mut restored, &mut other));
        assert_eq!(tokens, other);
    }
}

#[test]
fn mirostat_holds_its_surprise() {
    // Zipf's law, as mirostat's first version assumes.
    let logits: Vec<f32> = (0..300u16).map(|i| -1.1 * f32::from(i + 1).ln()).collect();
    let all = naive(&plain(), &logits, false);
    for (mirostat, tau, tolerance) in [(1, 3.0, 0.4), (2, 3.0, 0.1), (2, 4.0, 0.1)] {
        let mut s = sampler(SamplerParams { mirostat, mirostat_tau: tau, ..plain() });
        let mut surprise = 0.0;
        let n = 4000;
        for _ in 0..n {
            let before = s.mu;
            let id = s.sample(&mut logits.clone()).unwrap();
            // The surprise that it observed, from how it corrected itself.
            surprise += f64::from((before - s.mu) / s.params.mirostat_eta + tau);
            assert!(all.iter().any(|c| c.0 == id));
        }
        let mean = surprise / f64::from(n);
        assert!((mean - f64::from(tau)).abs() < tolerance, "version {mirostat}: {mean} for {tau}");
    }
}

#[test]
fn logprobs_are_those_of_the_model() {
    let logits = uneven(61);
    let all = naive(&plain(), &logits, false);
    let bias = BTreeMap::from([(3, 50.0)]);
    let mut s = sampler(SamplerParams {
        logprobs: 5,
        temperature: 0.0,
        logit_bias: bias,
        ..SamplerParams::default()
    });
    assert_eq!(s.logprobs(), None);
    assert_eq!(s.sample(&mut logits.clone()).unwrap(), 3);
    let l = s.logprobs().unwrap();
    let expected = all.iter().find(|c| c.0 == 3).unwrap().2.ln();
    assert!((f64::from(l.chosen) - expected).abs() < 1e-5);
    assert_eq!(l.top.len(), 5);
    for ((id, logprob), (best, _, p)) in l.top.iter().zip(&all) {
        assert_eq!(id, best);
        assert!((f64::from(*logprob) - p.ln()).abs() < 1e-5);
    }
    let mut s = sampler(SamplerParams { logprobs: 0, ..plain() });
    s.sample(&mut logits.clone()).unwrap();
    assert!(s.logprobs().is_some_and(|l| l.top.is_empty() && l.chosen < 0.0));
}

/// Allows the letters in turn: a, b, c, ...
struct Alphabet(TokenSet, u32);

impl Constraint for Alphabet {
    fn mask(&mut self) -> Result<&TokenSet> {
        self.0 = [self.1 + 1].into_iter().collect();
        Ok(&self.0)
    }
    fn accept(&mut self, id: u32) -> Result<()> {
        if id != self.1 + 1 {
            return Err(Error::Constraint(format!("{id} is not the next letter")));
        }
        self.1 += 1;
        Ok(())
    }
    fn is_finished(&self) -> bool {
        self.1 == 26
    }
}

#[test]
fn a_constraint_decides_what_may_come() {
    for temperature in [0.0, 1.0] {
        let mut s = sampler(SamplerParams { temperature, ..SamplerParams::default() });
        s.accept_prompt(200);
        s.set_constraint(Some(Box::new(Alphabet(TokenSet::default(), 0))));
        for letter in 1..=26 {
            assert!(!s.constraint().unwrap().is_finished());
            let id = s.sample(&mut uneven(300)).unwrap();
            assert_eq!(id, letter);
            s.accept(id).unwrap();
        }
        assert!(s.constraint().unwrap().is_finished());
        assert!(matches!(s.accept(5), Err(Error::Constraint(_))));
        s.set_constraint(None);
        assert!(s.constraint().is_none());
    }
}

#[test]
#[ignore = "slow: times a vocabulary of 100,352 tokens, best alone on the machine"]
fn timing() {
    let size = 100_352;
    let t = vocabulary(size);
    let mut rng = super::Rng::new(3);
    // Sums of uniform numbers: about normal, standard deviation 2.
    let logits: Vec<f32> =
        (0..size).map(|_| ((0..12).map(|_| rng.next_f64()).sum::<f64>() - 6.0) as f32 * 2.0).collect();
    let off = plain();
    let all = [
        ("greedy", SamplerParams { temperature: 0.0, ..SamplerParams::default() }),
        ("defaults (top-k 40, top-p, min-p)", SamplerParams::default()),
        (
            "defaults, penalties, DRY over 8K",
            SamplerParams { repeat_penalty: 1.1, dry_multiplier: 0.8, ..SamplerParams::default() },
        ),
        ("defaults, 20 logprobs", SamplerParams { logprobs: 20, ..SamplerParams::default() }),
        ("top-n-sigma", SamplerParams { top_n_sigma: 1.0, ..SamplerParams::default() }),
        ("min-p alone", SamplerParams { min_p: 0.05, ..off.clone() }),
        ("top-p alone", SamplerParams { top_p: 0.95, ..off.clone() }),
        ("typical alone", SamplerParams { typical_p: 0.9, ..off.clone() }),
        ("mirostat 2", SamplerParams { mirostat: 2, ..off.clone() }),
        ("nothing but temperature", off),
    ];
    for (name, params) in all {
        let mut s = Sampler::new(SamplerParams { seed: Some(1), ..params.clone() }, t.clone()).unwrap();
        (0..8192u32).for_each(|i| s.accept_prompt(i * 7919 % 5000));
        let mut work = logits.clone();
        let mut times = Vec::new();
        for _ in 0..200 {
            work.copy_from_slice(&logits);
            let start = Instant::now();
            let id = s.sample(&mut work).unwrap();
            times.push(start.elapsed());
            assert!((id as usize) < size);
        }
        times.sort();
        let bytes = size * 4;
        println!(
            "{name}: {:?} median, {:.1} GB/s of logits",
            times[100],
            bytes as f64 / times[100].as_secs_f64() / 1e9
        );
    }
}

proptest! {
    #[test]
    fn samples_are_in_the_naive_set(
        logits in proptest::collection::vec(prop_oneof![9 => -9f32..9.0, 1 => Just(f32::NEG_INFINITY)], 2..300),
        seed: u64, which in 0usize..8,
    ) {
        prop_assume!(logits.iter().any(|x| *x > f32::NEG_INFINITY));
        let params = SamplerParams { seed: Some(seed), ..combinations()[which].clone() };
        let id = sampler(params.clone()).sample(&mut logits.clone()).unwrap();
        // Half a thousandth more on every cut, for the rounding of f32.
        let wider = SamplerParams {
            top_p: params.top_p + 5e-4,
            typical_p: params.typical_p + 5e-4,
            min_p: params.min_p * 0.9995,
            top_n_sigma: params.top_n_sigma * 1.0005,
            ..params
        };
        prop_assert!(naive(&wider, &logits, false).iter().any(|c| c.0 == id));
    }
}
