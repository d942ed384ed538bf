//! Bench rows as a table or as data.
use std::io::{self, Write};

use serde::Serialize;

use super::{Fill, Test};

/// One measured test.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
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
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share_of_limit: Option<f64>,
    /// Our speed over llama.cpp's, median of the pairs, where `--with-llama-cpp` was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio_to_llama_cpp: Option<f64>,
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
}

/// Columns that a table has only when they were asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Columns {
    /// Share of the measured limit.
    pub limits: bool,
    /// Ratio to llama.cpp.
    pub llama_cpp: bool,
}

impl<W: Write> Report<W> {
    /// A report in `format`.
    pub fn new(out: W, format: Format, columns: Columns) -> Self {
        Self { out, format, rows: 0, columns }
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
        if self.format == Format::Json {
            writeln!(self.out, "{}", if self.rows == 0 { "[]" } else { "\n]" })?;
        }
        self.out.flush()
    }

    fn md(&mut self, row: &Row, first: bool) -> io::Result<()> {
        if first {
            let mut extra = String::new();
            let mut line = String::new();
            for (on, name) in [(self.columns.limits, "of limit"), (self.columns.llama_cpp, "x llama.cpp")] {
                if on {
                    extra += &format!(" {name} |");
                    line += " ---: |";
                }
            }
            writeln!(
                self.out,
                "| model | size | params | backend | threads | ub | K/V | routing | test | t/s |{extra}"
            )?;
            writeln!(self.out, "| --- | ---: | ---: | --- | ---: | ---: | --- | --- | ---: | ---: |{line}")?;
        }
        let mark = if row.fill == Fill::Random && row.test.depth > 0 { " (random fill)" } else { "" };
        write!(
            self.out,
            "| {} | {} | {:.2} M | {} | {} | {} | {}/{} | {} | {}{mark} | {:.2} ± {:.2} |",
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
        if self.columns.limits {
            let share = row.share_of_limit.map_or_else(String::new, |s| format!("{:.1} %", s * 100.0));
            write!(self.out, " {share} |")?;
        }
        if self.columns.llama_cpp {
            let ratio = row.ratio_to_llama_cpp.map_or_else(String::new, |r| format!("{r:.2}"));
            write!(self.out, " {ratio} |")?;
        }
        writeln!(self.out)
    }

    fn csv(&mut self, row: &Row, first: bool) -> io::Result<()> {
        if first {
            writeln!(
                self.out,
                "build,backend,model,model_size,model_n_params,n_threads,n_ubatch,type_k,type_v,routing,n_prompt,n_gen,\
                 n_depth,n_sequences,fill,avg_ts,stddev_ts"
            )?;
        }
        let quoted = |s: &str| format!("\"{}\"", s.replace('"', "\"\""));
        writeln!(
            self.out,
            "{},{},{},{},{},{},{},{},{},{},{},{},{},{},{:?},{},{}",
            quoted(&row.build),
            quoted(&row.backend),
            quoted(&row.model),
            row.model_size,
            row.model_n_params,
            row.n_threads,
            row.n_ubatch,
            row.type_k,
            row.type_v,
            row.routing,
            row.test.prompt,
            row.test.generate,
            row.test.depth,
            row.test.sequences,
            row.fill,
            row.avg_ts,
            row.stddev_ts
        )
    }
}

fn json(row: &Row) -> String {
    // Plain data of numbers and strings: serialisation cannot fail.
    serde_json::to_string(row).unwrap_or_default()
}
