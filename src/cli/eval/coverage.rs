//! `clsa eval coverage`.
use std::fmt::Write as _;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use serde_json::{Value, json};
use xxhash_rust::xxh3::xxh3_64;

use super::perplexity::read_tokens;
use super::results::{ResultArgs, percent};
use crate::backend::Routing;
use crate::cli::model::ModelArgs;
use crate::cli::token_bar;
use crate::error::{Error, Result};
use crate::eval::Mean;
use crate::eval::coverage::{Coverage, DEPTHS, OfMode, Plan, measure};
use crate::eval::perplexity::Windows;
use crate::eval::plot::{Curves, HeatMap};
use crate::interrupt;
use crate::model::Model;

/// Arguments of `clsa eval coverage`.
#[derive(Debug, Args)]
pub struct CoverageArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The text; -c tokens of it (the model's context without -c) are a window
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// How cross layers choose positions in the forward pass whose queries are used
    #[arg(long, value_name = "MODE", default_value = "dense")]
    queries: Routing,
    /// Numbers of selected positions to measure; an eighth to four times the model's own without it
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    k: Vec<usize>,
    /// Rows to measure in a window, evenly spread
    #[arg(long, value_name = "N", default_value_t = 64)]
    rows: usize,
    /// Windows at most, for a quick look
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    #[command(flatten)]
    results: ResultArgs,
}

/// Runs `clsa eval coverage`: the selections of each mode of `--routing`.
///
/// # Errors
/// Those of the model, the text and the engine; [`Error::Interrupted`].
pub fn run(args: &CoverageArgs) -> Result<()> {
    let model = args.model.open()?;
    let plan = args.plan(&model)?;
    let tokens = read_tokens(&model, &args.file)?;
    let windows = Windows { len: plan.len, limit: args.limit, last: None }.cut(&tokens)?;
    let settings = json!({
        "text": format!("{:016x}", xxh3_64(&tokens.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<_>>())),
        "window": plan.len,
        "rows": plan.rows,
        "k": plan.ks,
        "routing": plan.modes.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "queries": args.queries.to_string(),
        "caches": format!("{:?} {:?}", args.model.cache_type_k, args.model.cache_type_v),
    });
    let mut state = args.results.state(&model, "coverage", settings.clone())?;
    let on = args.model.with_routing(Some(args.queries));
    let mut options = on.options(&model, 1);
    options.context = plan.len;
    options.max_outputs = Some((2 * plan.rows).min(options.max_rows));
    let stop = interrupt::requested()?;
    let mut engine = None;
    let c = &model.config;
    let mut all = Coverage::new(&plan, c.n_layer - c.n_self, c.cross_heads.n_head);
    let bar = token_bar("coverage");
    bar.set_length((windows.len() * plan.len) as u64);
    for (i, window) in windows.iter().enumerate() {
        let item = format!("window {i}");
        let done = (i * plan.len) as u64;
        if let Some(found) = state.get::<Coverage>(&item)? {
            all.merge(&found)?;
            bar.set_position(done + plan.len as u64);
            bar.reset_eta();
            continue;
        }
        let engine = match &mut engine {
            Some(engine) => engine,
            none => none.insert(on.engine(&model, &options, Arc::clone(&stop))?),
        };
        let found = measure(engine, window, &plan, |at| {
            bar.set_position(done + at as u64);
            ControlFlow::Continue(())
        })?;
        all.merge(&state.push(&item, &found)?)?;
    }
    bar.finish_and_clear();
    let result = args.json(&plan, &all, windows.len(), &settings);
    args.results.report(&result, |out| table(out, &plan, &all, windows.len(), args.queries))?;
    match args.results.plots()? {
        Some(folder) => plot(folder, &plan, &all),
        None => Ok(()),
    }
}

impl CoverageArgs {
    fn plan(&self, model: &Model) -> Result<Plan> {
        let indexer = model.config.indexer.ok_or_else(|| {
            Error::Input("coverage needs a model with an indexer, which this one has not".into())
        })?;
        let own = self.model.top_k_tokens.unwrap_or(indexer.top_k);
        let mut ks = self.k.clone();
        if ks.is_empty() {
            ks = [8, 4, 2, 1].iter().map(|part| own / part).chain([2 * own, 4 * own]).collect();
            ks.retain(|k| *k > 0);
            ks.dedup();
        }
        ks.sort_unstable();
        let modes = self.model.routings().into_iter().map(|mode| mode.unwrap_or(Routing::Clsa)).collect();
        // The model's own k, or the largest below it.
        let main = ks.iter().rposition(|k| *k <= own).unwrap_or(0);
        let len = if self.model.ctx_size == 0 { model.config.context_length } else { self.model.ctx_size };
        let plan = Plan { modes, ks, main, len, rows: self.rows };
        plan.check()?;
        Ok(plan)
    }

    fn json(&self, plan: &Plan, all: &Coverage, windows: usize, settings: &Value) -> Value {
        let value = |m: &Mean| json!(m.get());
        let values = |of: &[Mean]| of.iter().map(value).collect::<Vec<_>>();
        let with_error =
            |m: &Mean| json!({ "mean": m.get(), "error": m.get().map(|_| m.error()), "rows": m.count() });
        let of_mode = |(mode, m): (&Routing, &OfMode)| {
            let of_k = |(i, k): (usize, &usize)| {
                json!({
                    "k": k,
                    "coverage": with_error(&m.all[i]),
                    "coverage_beyond_k": with_error(&m.beyond[i]),
                    "by_depth": values(&m.by_depth[i]),
                    "by_layer_and_head": m.by_head[i].iter().map(|l| values(l)).collect::<Vec<_>>(),
                    "recall_by_layer": values(&m.recall[i]),
                    "overlap_with_previous_token": with_error(&m.neighbours[i]),
                })
            };
            json!({ "mode": mode.to_string(), "k": plan.ks.iter().enumerate().map(of_k).collect::<Vec<_>>() })
        };
        let best = |(i, k): (usize, &usize)| json!({ "k": k, "shared": value(&all.best_shared[i]), "per_layer": value(&all.best_own[i]) });
        json!({
            "evaluation": "coverage",
            "settings": settings,
            "windows": windows,
            "selections": plan.modes.iter().zip(&all.modes).map(of_mode).collect::<Vec<_>>(),
            "best_possible": plan.ks.iter().enumerate().map(best).collect::<Vec<_>>(),
            "overlap_of_layers": {
                "k": plan.ks[plan.main],
                "of_own_top_k": all.layers.iter().map(|l| values(l)).collect::<Vec<_>>(),
            },
        })
    }
}

/// Mean of the means of some cells that have one.
fn mean_of<'a>(cells: impl Iterator<Item = &'a Mean>) -> Option<f64> {
    let mut all = Mean::default();
    cells.filter_map(Mean::get).for_each(|m| all.push(m));
    all.get()
}

fn table(
    out: &mut dyn Write,
    plan: &Plan,
    all: &Coverage,
    windows: usize,
    queries: Routing,
) -> io::Result<()> {
    writeln!(
        out,
        "share of dense attention mass in % ({windows} windows of {} tokens, {} rows each, queries of routing {queries})",
        plan.len, plan.rows
    )?;
    writeln!(out)?;
    let mut line = String::new();
    for (mode, m) in plan.modes.iter().zip(&all.modes) {
        writeln!(
            out,
            "| {:<9} | all rows      | rows beyond k | best shared | best per layer | recall | same as before |",
            mode.to_string()
        )?;
        writeln!(
            out,
            "|----------:|--------------:|--------------:|------------:|---------------:|-------:|---------------:|"
        )?;
        for (i, k) in plan.ks.iter().enumerate() {
            let with_error = |m: &Mean| match m.get() {
                Some(_) => format!("{} ± {:.2}", percent(m.get()), 100.0 * m.error()),
                None => "-".into(),
            };
            writeln!(
                out,
                "| {:>9} | {:>13} | {:>13} | {:>11} | {:>14} | {:>6} | {:>14} |",
                k,
                with_error(&m.all[i]),
                with_error(&m.beyond[i]),
                percent(all.best_shared[i].get()),
                percent(all.best_own[i].get()),
                percent(mean_of(m.recall[i].iter())),
                percent(m.neighbours[i].get()),
            )?;
        }
        writeln!(out)?;
        let main = plan.main;
        line.clear();
        m.by_depth[main].iter().for_each(|d| {
            let _ = write!(line, " {:>5}", percent(d.get()));
        });
        writeln!(out, "{mode}, k = {}, by eighth of the window:{line}", plan.ks[main])?;
        writeln!(out, "  layer   mean   least head   most head   recall")?;
        for (l, (heads, recall)) in m.by_head[main].iter().zip(&m.recall[main]).enumerate() {
            let values = || heads.iter().filter_map(Mean::get);
            writeln!(
                out,
                "  {l:>5}  {:>5}  {:>11}  {:>10}  {:>7}",
                percent(mean_of(heads.iter())),
                percent(values().reduce(f64::min)),
                percent(values().reduce(f64::max)),
                percent(recall.get()),
            )?;
        }
        writeln!(out)?;
    }
    let n = all.layers.len();
    let pairs = (0..n).flat_map(|a| (0..n).filter(move |b| *b != a).map(move |b| (a, b)));
    let next = mean_of((1..n).map(|l| &all.layers[l - 1][l]));
    let any = mean_of(pairs.map(|(a, b)| &all.layers[a][b]));
    writeln!(
        out,
        "overlap of the layers' own top {}: {} % of neighbouring layers, {} % of any two",
        plan.ks[plan.main],
        percent(next),
        percent(any)
    )
}

fn plot(folder: &Path, plan: &Plan, all: &Coverage) -> Result<()> {
    let values = |cells: &[Mean]| cells.iter().map(Mean::get).collect::<Vec<_>>();
    let numbers = |n: usize| (0..n).map(|i| i.to_string()).collect::<Vec<_>>();
    let points = |cells: &[Mean]| {
        let point = |(k, m): (&usize, &Mean)| Some((*k as f64, m.get()?));
        plan.ks.iter().zip(cells).filter_map(point).collect::<Vec<_>>()
    };
    let mut lines = vec![
        ("best, each layer its own".to_owned(), points(&all.best_own)),
        ("best, shared by all layers".to_owned(), points(&all.best_shared)),
    ];
    lines.extend(plan.modes.iter().zip(&all.modes).map(|(mode, m)| (mode.to_string(), points(&m.all))));
    let title = format!("Dense attention mass held by k of {} positions", plan.len);
    Curves { title, x: "k".into(), y: "share of mass".into(), lines }.save(&folder.join("coverage-k.svg"))?;
    let k = plan.ks[plan.main];
    for (mode, m) in plan.modes.iter().zip(&all.modes) {
        let heads = &m.by_head[plan.main];
        HeatMap {
            title: format!("{mode}, k = {k}: mass held, by layer and head"),
            x: "head".into(),
            y: "cross layer".into(),
            columns: numbers(heads.first().map_or(0, Vec::len)),
            rows: numbers(heads.len()),
            cells: heads.iter().map(|l| values(l)).collect(),
        }
        .save(&folder.join(format!("coverage-heads-{mode}.svg")))?;
        let depth = |d: usize| (plan.len * (d + 1) / DEPTHS).to_string();
        HeatMap {
            title: format!("{mode}: mass held, by k and depth"),
            x: "up to position".into(),
            y: "k".into(),
            columns: (0..DEPTHS).map(depth).collect(),
            rows: plan.ks.iter().map(ToString::to_string).collect(),
            cells: m.by_depth.iter().map(|d| values(d)).collect(),
        }
        .save(&folder.join(format!("coverage-depth-{mode}.svg")))?;
    }
    HeatMap {
        title: format!("Overlap of the layers' own top {k}"),
        x: "cross layer".into(),
        y: "cross layer".into(),
        columns: numbers(all.layers.len()),
        rows: numbers(all.layers.len()),
        cells: all.layers.iter().map(|l| values(l)).collect(),
    }
    .save(&folder.join("coverage-layers.svg"))
}
