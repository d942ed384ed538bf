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
    let rows: Vec<serde_json::Value> =
        said.stdout.lines().map(|l| serde_json::from_str(l).expect("one JSON object a line")).collect();
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
