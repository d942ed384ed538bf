//! `clsa bench` on a tiny model: every asked-for row is there, whole and plausible; how fast does not matter.
use super::*;

fn bench(folder: &Folder, more: &[&str]) -> Said {
    let model = folder.model();
    let said = output(["bench", "-m", &model, "-r", "2"].iter().chain(more));
    said.assert_succeeds();
    said
}

#[test]
fn lists_give_their_cross_product() {
    let folder = Folder::with_model();
    let args = [
        "-p",
        "16,40",
        "-n",
        "4",
        "-d",
        "0,300",
        "--routing",
        "clsa,dense,block-16",
        "-ub",
        "32",
        "-o",
        "jsonl",
    ];
    let said = bench(&folder, &args);
    let rows = rows(&said.stdout);
    // Two prompts and one generation, at two depths, in three modes.
    assert_eq!(rows.len(), 3 * 2 * 3, "{}", said.stdout);
    for row in &rows {
        let rate = row["avg_ts"].as_f64().expect("a mean rate");
        assert!(rate.is_finite() && rate > 0.0, "{row}");
        assert_eq!(row["samples_s"].as_array().map(Vec::len), Some(2), "{row}");
    }
    let modes: std::collections::BTreeSet<_> = rows.iter().map(|r| r["routing"].to_string()).collect();
    assert_eq!(modes.len(), 3, "{modes:?}");
}

#[test]
fn every_format_holds_the_same_rows() {
    let folder = Folder::with_model();
    let of = |format: &str| bench(&folder, &["-p", "8", "-n", "2", "-o", format]).stdout;
    assert_eq!(of("csv").lines().count(), 1 + 2);
    assert_eq!(serde_json::from_str::<Vec<serde_json::Value>>(&of("json")).expect("a JSON array").len(), 2);
    let table: Vec<String> = of("md").lines().filter(|l| l.starts_with('|')).map(str::to_owned).collect();
    assert_eq!(table.len(), 2 + 2, "{table:?}");
    assert!(table[2].contains("pp8") && table[3].contains("tg2"), "{table:?}");
}

/// Files of the three tiny architectures, which have one shape.
fn three(folder: &Folder) -> Vec<String> {
    let shapes = ["transformer-tiny", "yoco-tiny", "clsa-tiny"];
    let make = |shape: &&str| {
        let path = path_str(&folder.file(&format!("{shape}.gguf")));
        output(["synth", shape, "--type", "Q8_0", "--seed", "1", "-o", &path]).assert_succeeds();
        path
    };
    shapes.iter().map(make).collect()
}

fn rows(jsonl: &str) -> Vec<serde_json::Value> {
    jsonl.lines().map(|l| serde_json::from_str(l).expect("one JSON object a line")).collect()
}

/// An SVG document that an XML parser takes, with the texts in it.
fn texts_of(svg: &str) -> Vec<String> {
    let document = roxmltree::Document::parse(svg).expect("well-formed XML");
    let root = document.root_element();
    assert_eq!(root.tag_name().name(), "svg");
    let texts = root.descendants().filter(|n| n.tag_name().name() == "text");
    texts.filter_map(|n| n.text()).map(|t| t.trim().to_owned()).collect()
}

#[test]
fn a_comparison_has_every_mode_and_ratios_of_pairs() {
    let folder = Folder::empty();
    let files = three(&folder);
    let plot = path_str(&folder.file("plot.svg"));
    let mut args =
        vec!["bench", "--compare", "--with-llama-cpp", "--fill", "random", "-o", "jsonl", "-r", "3"];
    args.extend(["-p", "8", "-n", "4", "-d", "64,256", "--plot", &plot]);
    files.iter().for_each(|f| args.extend(["-m", f]));
    let said = output(&args);
    said.assert_succeeds();
    let rows = rows(&said.stdout);
    let names = ["Transformer", "YOCO (dense)", "CLSA", "per-layer", "every-4", "block-64", "llama.cpp"];
    assert_eq!(rows.len(), names.len() * 2 * 2, "{}", said.stdout);
    for (row, name) in rows.iter().zip(names.iter().cycle()) {
        assert_eq!(row["series"], *name, "{row}");
    }
    let samples = |row: &serde_json::Value| -> Vec<f64> {
        let all = row["samples_s"].as_array().expect("samples");
        all.iter().map(|s| s.as_f64().expect("seconds")).collect()
    };
    for test in rows.chunks(names.len()) {
        for row in test {
            let mut ratios: Vec<f64> =
                samples(&test[0]).iter().zip(samples(row)).map(|(base, own)| base / own).collect();
            ratios.sort_by(f64::total_cmp);
            let speedup = row["speedup"].as_f64().expect("a ratio");
            assert!((speedup / ratios[1] - 1.0).abs() < 1e-12, "{row}");
        }
        assert!(test[0]["ratio_to_llama_cpp"].as_f64().is_some_and(|r| r > 0.0), "{}", test[0]);
    }
    let texts = texts_of(&std::fs::read_to_string(&plot).expect("the plot"));
    for name in names {
        assert!(texts.iter().any(|t| t.starts_with(name)), "{name}: {texts:?}");
    }
    assert!(said.stderr.contains("Decode, tokens/s") && said.stderr.contains('█'), "{}", said.stderr);
}

#[test]
fn models_of_several_shapes_are_not_compared() {
    let folder = Folder::with_model();
    let other = path_str(&folder.file("other.gguf"));
    let bundled = concat!(env!("CARGO_MANIFEST_DIR"), "/models/smol-clsa-135m.gguf");
    std::fs::copy(bundled, &other).expect("the bundled model");
    output(["bench", "--compare", "-m", &folder.model(), "-m", &other])
        .assert_fails(2, &["one shape", "layers"]);
    output(["bench", "--compare", "-m", &folder.model(), "--with-llama-cpp"])
        .assert_fails(2, &["--with-llama-cpp needs a Transformer file"]);
}

#[test]
fn earlier_rows_are_drawn_and_written_again() {
    let folder = Folder::with_model();
    let said = bench(&folder, &["-p", "8", "-n", "4", "-d", "0,64", "-o", "jsonl"]);
    let data = folder.write("rows.jsonl", said.stdout.as_bytes());
    let plot = path_str(&folder.file("plot.svg"));
    let again = output(["bench", "--read", &data, "--plot", &plot, "-o", "jsonl"]);
    let rates =
        |out: &str| -> Vec<f64> { rows(out).iter().map(|r| r["avg_ts"].as_f64().expect("a rate")).collect() };
    for (again, first) in rates(&again.assert_succeeds().stdout).iter().zip(rates(&said.stdout)) {
        assert!((again / first - 1.0).abs() < 1e-12, "{again} {first}");
    }
    assert_eq!(rows(&again.stdout).len(), 4);
    let texts = texts_of(&std::fs::read_to_string(&plot).expect("the plot"));
    assert!(texts.iter().any(|t| t == "Prefill of 8 tokens: tokens/s"), "{texts:?}");
    let broken = folder.write("broken.jsonl", b"{}\n");
    output(["bench", "--read", &broken]).assert_fails(2, &["line 1", "json"]);
    output(["bench", "--read", "/nowhere.json"]).assert_fails(2, &["/nowhere.json"]);
}

#[test]
fn batches_and_micro_batches_make_rows_of_their_own() {
    let folder = Folder::with_model();
    let rows =
        rows(&bench(&folder, &["-p", "40", "-n", "0", "-b", "0,16", "-ub", "8,32", "-o", "jsonl"]).stdout);
    let of = |name: &str| -> Vec<u64> { rows.iter().map(|r| r[name].as_u64().expect("a number")).collect() };
    assert_eq!((of("n_batch"), of("n_ubatch")), (vec![0, 0, 16, 16], vec![8, 32, 8, 32]));
    let series: std::collections::BTreeSet<_> = rows.iter().map(|r| r["series"].to_string()).collect();
    assert_eq!(series.len(), 4, "{series:?}");
}

#[test]
fn threads_sequences_caches_and_answers_to_prompts_make_rows_of_their_own() {
    let folder = Folder::with_model();
    let lists =
        ["-t", "1-2", "-np", "1,3", "-ctk", "f16,q8_0", "-ctv", "f16,q8_0", "-pg", "16,4", "-pg", "8,2"];
    let more = ["-p", "0", "-n", "3", "--device", "cpu", "-o", "jsonl"];
    let rows = rows(&bench(&folder, &[&lists[..], &more].concat()).stdout);
    // Two counts of threads, two types of keys and two of values; in each, three tests of one and of three sequences.
    assert_eq!(rows.len(), 2 * 2 * 2 * 3 * 2);
    let different =
        |name: &str| rows.iter().map(|r| r[name].to_string()).collect::<std::collections::BTreeSet<_>>();
    for (name, values) in [("n_threads", 2), ("n_sequences", 2), ("type_k", 2), ("type_v", 2), ("series", 8)]
    {
        assert_eq!(different(name).len(), values, "{name}: {:?}", different(name));
    }
    for (row, shape) in rows.iter().zip([(0, 3), (16, 4), (8, 2)].into_iter().cycle()) {
        assert_eq!(
            (row["n_prompt"].as_u64(), row["n_gen"].as_u64()),
            (Some(shape.0), Some(shape.1)),
            "{row}"
        );
        // Tokens of all sequences over the time of all of them.
        let tokens = ((shape.0 + shape.1) * row["n_sequences"].as_u64().expect("a number")) as f64;
        let samples =
            row["samples_s"].as_array().expect("samples").iter().map(|s| s.as_f64().expect("seconds"));
        let rate = samples.map(|s| tokens / s).sum::<f64>() / 2.0;
        assert!((row["avg_ts"].as_f64().expect("a rate") / rate - 1.0).abs() < 1e-9, "{row}");
    }
    let model = folder.model();
    output(["bench", "-m", &model, "-pg", "16"]).assert_fails(2, &["-pg 16", "two numbers"]);
}

#[test]
fn counts_of_gpu_layers_make_rows_of_their_own() {
    let folder = Folder::with_model();
    let args = ["-p", "0", "-n", "2", "--device", "cpu", "-ngl", "auto,0-4+2,all"];
    let data = bench(&folder, &[&args[..], &["-o", "jsonl"]].concat()).stdout;
    let of = |name: &str| rows(&data).iter().map(|r| r[name].to_string()).collect::<Vec<_>>();
    assert_eq!(of("n_gpu_layers"), ["auto", "0", "2", "4", "all"].map(|n| format!("\"{n}\"")));
    assert_eq!(of("series").into_iter().collect::<std::collections::BTreeSet<_>>().len(), 5);
    let table = bench(&folder, &args).stdout;
    assert!(table.contains("| threads | ngl |") && table.contains("| all |"), "{table}");
    let model = folder.model();
    output(["bench", "-m", &model, "-ngl", "0,some"]).assert_fails(2, &["some", "a number"]);
}

#[test]
fn tests_that_take_turns_have_the_same_rows() {
    let folder = Folder::with_model();
    let args = ["-p", "40", "-n", "3", "-d", "0,64", "-np", "1,2", "-o", "jsonl"];
    for fill in ["prefill", "random"] {
        let args = [&args[..], &["--fill", fill]].concat();
        let tests = |said: &Said| -> Vec<String> {
            let test = |r: &serde_json::Value| {
                assert_eq!(r["samples_s"].as_array().map(Vec::len), Some(2), "{r}");
                ["n_prompt", "n_gen", "n_depth", "n_sequences"].map(|n| r[n].to_string()).join(" ")
            };
            rows(&said.stdout).iter().map(test).collect()
        };
        let turns = tests(&bench(&folder, &[&args[..], &["--interleave"]].concat()));
        assert_eq!((turns.len(), turns), (8, tests(&bench(&folder, &args))));
    }
}

#[test]
fn limits_and_breakdowns_stand_beside_the_rates() {
    let folder = Folder::with_model();
    let said = bench(
        &folder,
        &[
            "-p",
            "96",
            "-n",
            "4",
            "-d",
            "300",
            "--limits",
            "--breakdown",
            "--check",
            "-o",
            "jsonl",
            "--device",
            "cpu",
        ],
    );
    assert!(
        said.stderr.contains("limits: read") && said.stderr.contains("differ from the reference"),
        "{}",
        said.stderr
    );
    let parts = |row: &serde_json::Value| -> Vec<(String, f64)> {
        let all = row["breakdown"].as_array().expect("parts");
        all.iter().map(|t| (t["stage"].to_string(), t["seconds"].as_f64().expect("seconds"))).collect()
    };
    for row in rows(&said.stdout) {
        let share = row["share_of_limit"].as_f64().expect("a share");
        assert!(share > 0.0 && share < 1.0, "{row}");
        assert!(row["read_bandwidth"].as_f64().is_some_and(|b| b > 1e8), "{row}");
        let parts = parts(&row);
        for part in
            ["embedding", "self_attention", "feed_forward", "shared_memory", "scoring", "top_k", "logits"]
        {
            assert!(parts.iter().any(|(name, _)| name.trim_matches('"') == part), "{part}: {row}");
        }
        assert!(parts.iter().all(|(_, seconds)| seconds.is_finite() && *seconds >= 0.0), "{row}");
    }
    let reference =
        ["bench", "-m", &folder.model(), "-p", "0", "-n", "2", "-r", "1", "--device", "reference"];
    let types = ["-ctk", "f32", "-ctv", "f32"];
    output(reference.iter().chain(&types)).assert_succeeds();
    output(reference.iter().chain(&types).chain(&["--breakdown"])).assert_fails(2, &["no clock"]);
}
