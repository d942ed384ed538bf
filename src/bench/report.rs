//! Bench rows as a table or as data, and read back from data.
use std::io::{self, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Fill, Test, breakdown};
use crate::backend::Timing;
use crate::error::{Error, Result};

/// One measured test.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What is compared with what: the line of a plot that the row belongs to.
    pub series: String,
    /// Version and commit of this program.
    pub build: String,
    /// Device, threads and instruction set.
    pub backend: String,
    /// File name of the model.
    pub model: String,
    /// Bytes of its weights.
    pub model_size: u64,
    /// Its parameters.
    pub model_n_params: u64,
    /// Threads.
    pub n_threads: usize,
    /// Layers on GPUs, as they were asked for: `auto`, `all` or a number.
    #[serde(default = "auto")]
    pub n_gpu_layers: String,
    /// Prompt tokens handed over at a time; 0: all at once.
    pub n_batch: usize,
    /// Rows of a micro-batch.
    pub n_ubatch: usize,
    /// Type of cached keys.
    pub type_k: String,
    /// Type of cached values.
    pub type_v: String,
    /// Routing mode.
    pub routing: String,
    /// What was timed.
    #[serde(flatten)]
    pub test: Test,
    /// How the depth was filled.
    pub fill: Fill,
    /// Seconds of each repetition: prompt processing and generation together.
    pub samples_s: Vec<f64>,
    /// Seconds of prompt processing of each repetition.
    pub samples_prompt_s: Vec<f64>,
    /// Tokens per second, mean over repetitions.
    pub avg_ts: f64,
    /// Standard deviation of the same.
    pub stddev_ts: f64,
    /// Share of what the machine's measured limits allow, where `--limits` was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share_of_limit: Option<f64>,
    /// Bytes per second that a CPU read between the repetitions (median), where `--limits` was given: what the share goes by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_bandwidth: Option<f64>,
    /// Speed over the baseline's (the Transformer), median of the pairs, where `--compare` was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speedup: Option<f64>,
    /// Speed over llama.cpp's, median of the pairs, where `--with-llama-cpp` was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ratio_to_llama_cpp: Option<f64>,
    /// Seconds of each stage of a step, or of the prompt, where `--breakdown` was given.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub breakdown: Vec<Timing>,
}

/// Rows of earlier builds do not say.
fn auto() -> String {
    "auto".into()
}

/// The rows of an earlier run, in the format `json` or `jsonl`.
///
/// # Errors
/// [`Error::Io`]; [`Error::Input`] when the file holds anything else.
pub fn read(path: &Path) -> Result<Vec<Row>> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| Error::Input(format!("{}: cannot be read: {e}", path.display())))?;
    let input = |line: usize, e: serde_json::Error| {
        Error::Input(format!("{}: line {line} is no row of clsa bench -o json or jsonl: {e}", path.display()))
    };
    if text.trim_start().starts_with('[') {
        return serde_json::from_str(&text).map_err(|e| input(e.line(), e));
    }
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines.map(|(i, line)| serde_json::from_str(line).map_err(|e| input(i + 1, e))).collect()
}

/// Output formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// A Markdown table
    Md,
    /// Comma-separated values
    Csv,
    /// One JSON array
    Json,
    /// One JSON object a line
    Jsonl,
}

/// Writes rows as they come.
pub struct Report<W> {
    out: W,
    format: Format,
    rows: usize,
    columns: Columns,
    build: String,
    /// Breakdowns, which follow the rows of a Markdown table.
    tables: Vec<String>,
}

/// Columns that a table has only when they were asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Columns {
    /// Layers on GPUs.
    pub gpu_layers: bool,
    /// Share of the measured limit.
    pub limits: bool,
    /// Speed-up over the baseline.
    pub compare: bool,
    /// Ratio to llama.cpp.
    pub llama_cpp: bool,
}

impl<W: Write> Report<W> {
    /// A report in `format`.
    pub fn new(out: W, format: Format, columns: Columns) -> Self {
        Self { out, format, rows: 0, columns, build: String::new(), tables: vec![] }
    }

    /// Writes one row.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn row(&mut self, row: &Row) -> io::Result<()> {
        let first = self.rows == 0;
        self.rows += 1;
        match self.format {
            Format::Md => self.md(row, first)?,
            Format::Csv => self.csv(row, first)?,
            Format::Json => write!(self.out, "{}{}", if first { "[\n  " } else { ",\n  " }, json(row))?,
            Format::Jsonl => writeln!(self.out, "{}", json(row))?,
        }
        self.out.flush()
    }

    /// Ends the report.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn finish(mut self) -> io::Result<()> {
        match self.format {
            Format::Json => writeln!(self.out, "{}", if self.rows == 0 { "[]" } else { "\n]" })?,
            Format::Md if self.rows > 0 => {
                writeln!(self.out, "\nbuild: {}", self.build)?;
                for table in &self.tables {
                    write!(self.out, "\n{table}")?;
                }
            }
            _ => {}
        }
        self.out.flush()
    }

    fn md(&mut self, row: &Row, first: bool) -> io::Result<()> {
        let Columns { gpu_layers, limits, compare, llama_cpp } = self.columns;
        if first {
            self.build.clone_from(&row.build);
            let mut extra = String::new();
            let mut line = String::new();
            for (on, name) in [(limits, "of limit"), (compare, "x base"), (llama_cpp, "x llama.cpp")] {
                if on {
                    extra += &format!(" {name} |");
                    line += " ---: |";
                }
            }
            let (ngl, ngl_line) = if gpu_layers { (" ngl |", " ---: |") } else { ("", "") };
            writeln!(
                self.out,
                "| model | size | params | backend | threads |{ngl} ub | K/V | routing | test | t/s |{extra}"
            )?;
            writeln!(
                self.out,
                "| --- | ---: | ---: | --- | ---: |{ngl_line} ---: | --- | --- | ---: | ---: |{line}"
            )?;
        }
        let mark = if row.is_filled_at_random() { " (random fill)" } else { "" };
        let ngl = if gpu_layers { format!(" {} |", row.n_gpu_layers) } else { String::new() };
        write!(
            self.out,
            "| {} | {} | {:.2} M | {} | {} |{ngl} {} | {}/{} | {} | {}{mark} | {:.2} ± {:.2} |",
            row.model,
            indicatif::BinaryBytes(row.model_size),
            row.model_n_params as f64 / 1e6,
            row.backend,
            row.n_threads,
            row.n_ubatch,
            row.type_k,
            row.type_v,
            row.routing,
            row.test.name(),
            row.avg_ts,
            row.stddev_ts,
        )?;
        let percent = row.share_of_limit.map(|s| format!("{:.1} %", s * 100.0));
        let ratio = |r: Option<f64>| r.map(|r| format!("{r:.2}"));
        let cells =
            [(limits, percent), (compare, ratio(row.speedup)), (llama_cpp, ratio(row.ratio_to_llama_cpp))];
        for (_, cell) in cells.into_iter().filter(|(on, _)| *on) {
            write!(self.out, " {} |", cell.unwrap_or_default())?;
        }
        writeln!(self.out)?;
        if !row.breakdown.is_empty() {
            self.tables.push(breakdown::table(
                &format!("{}, {}{mark}", row.series, row.test.name()),
                &row.breakdown,
            ));
        }
        Ok(())
    }

    fn csv(&mut self, row: &Row, first: bool) -> io::Result<()> {
        let quoted = |s: &str| format!("\"{}\"", s.replace('"', "\"\""));
        let optional = |v: Option<f64>| v.map_or_else(String::new, |v| v.to_string());
        let cells = [
            ("series", quoted(&row.series)),
            ("build", quoted(&row.build)),
            ("backend", quoted(&row.backend)),
            ("model", quoted(&row.model)),
            ("model_size", row.model_size.to_string()),
            ("model_n_params", row.model_n_params.to_string()),
            ("n_threads", row.n_threads.to_string()),
            ("n_gpu_layers", row.n_gpu_layers.clone()),
            ("n_batch", row.n_batch.to_string()),
            ("n_ubatch", row.n_ubatch.to_string()),
            ("type_k", row.type_k.clone()),
            ("type_v", row.type_v.clone()),
            ("routing", row.routing.clone()),
            ("n_prompt", row.test.prompt.to_string()),
            ("n_gen", row.test.generate.to_string()),
            ("n_depth", row.test.depth.to_string()),
            ("n_sequences", row.test.sequences.to_string()),
            ("fill", format!("{:?}", row.fill).to_lowercase()),
            ("avg_ts", row.avg_ts.to_string()),
            ("stddev_ts", row.stddev_ts.to_string()),
            ("share_of_limit", optional(row.share_of_limit)),
            ("read_bandwidth", optional(row.read_bandwidth)),
            ("speedup", optional(row.speedup)),
            ("ratio_to_llama_cpp", optional(row.ratio_to_llama_cpp)),
        ];
        if first {
            writeln!(self.out, "{}", cells.each_ref().map(|(name, _)| *name).join(","))?;
        }
        writeln!(self.out, "{}", cells.map(|(_, cell)| cell).join(","))
    }
}

impl Row {
    /// Whether the depth stands on random rows.
    #[must_use]
    pub fn is_filled_at_random(&self) -> bool {
        self.fill == Fill::Random && self.test.depth > 0
    }
}

fn json(row: &Row) -> String {
    // Plain data of numbers and strings: serialisation cannot fail.
    serde_json::to_string(row).unwrap_or_default()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::backend::Stage;

    /// A row to change in tests.
    pub fn row() -> Row {
        Row {
            series: "CLSA".into(),
            build: "0.1.0 (test)".into(),
            backend: "CPU".into(),
            model: "m, \"x\".gguf".into(),
            model_size: 1 << 20,
            model_n_params: 1_000_000,
            n_threads: 2,
            n_gpu_layers: "auto".into(),
            n_batch: 0,
            n_ubatch: 512,
            type_k: "f16".into(),
            type_v: "f16".into(),
            routing: "clsa".into(),
            test: Test { prompt: 0, generate: 8, depth: 1024, sequences: 1 },
            fill: Fill::Random,
            samples_s: vec![0.5, 0.25],
            samples_prompt_s: vec![0.0, 0.0],
            avg_ts: 24.0,
            stddev_ts: 8.0,
            share_of_limit: None,
            read_bandwidth: None,
            speedup: Some(2.5),
            ratio_to_llama_cpp: None,
            breakdown: vec![Timing { stage: Stage::Scoring, layer: None, seconds: 0.25 }],
        }
    }

    fn written(format: Format, columns: Columns) -> String {
        let mut out = vec![];
        let mut report = Report::new(&mut out, format, columns);
        report.row(&row()).expect("a row");
        report.row(&Row { speedup: None, ..row() }).expect("a row");
        report.finish().expect("the end");
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn data_reads_back() {
        for format in [Format::Json, Format::Jsonl] {
            let file = tempfile::NamedTempFile::new().expect("a file");
            std::fs::write(file.path(), written(format, Columns::default())).expect("written");
            assert_eq!(read(file.path()).expect("rows"), [row(), Row { speedup: None, ..row() }]);
        }
    }

    #[test]
    fn what_is_no_row_is_named_with_its_line() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let bad = written(Format::Jsonl, Columns::default()) + "{\"n_gen\": 4}\n";
        std::fs::write(file.path(), bad).expect("written");
        let error = read(file.path()).expect_err("no row").to_string();
        assert!(error.contains("line 3"), "{error}");
        assert!(read(Path::new("/nowhere/rows.json")).is_err());
    }

    #[test]
    fn tables_have_the_columns_that_were_asked_for() {
        let table = written(Format::Md, Columns { compare: true, ..Columns::default() });
        assert!(
            table.contains("| x base |") && table.contains("| 2.50 |") && table.contains("(random fill)"),
            "{table}"
        );
        assert!(
            !table.contains("ngl") && !table.contains("of limit") && table.contains("build: 0.1.0 (test)"),
            "{table}"
        );
        assert!(table.contains("| scoring | 250.000 | 100.0 % |"), "{table}");
        let table = written(Format::Md, Columns { gpu_layers: true, ..Columns::default() });
        assert!(table.contains("| threads | ngl | ub |") && table.contains("| 2 | auto | 512 |"), "{table}");
        let csv = written(Format::Csv, Columns::default());
        assert!(csv.contains("\"m, \"\"x\"\".gguf\""), "{csv}");
    }
}
