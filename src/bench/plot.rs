//! Bench rows as a drawing: tokens per second over depth, one line per series, and the speed-up over the baseline beside it.
use std::collections::BTreeSet;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::report::Row;
use crate::error::{Error, Result};

/// What one drawing shows: rows of one kind of test.
#[derive(Clone, Debug, PartialEq)]
pub struct Panel {
    /// `Decode`, `Prefill of 512 tokens`, ...
    pub title: String,
    /// What the horizontal axis counts.
    pub x_label: &'static str,
    /// One for each series, in the order of the rows.
    pub lines: Vec<Line>,
}

/// One series of a panel.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// Its name.
    pub name: String,
    /// (positions, tokens per second), by increasing position.
    pub rates: Vec<(usize, f64)>,
    /// (positions, speed over the baseline's), where the rows have it.
    pub speedups: Vec<(usize, f64)>,
}

/// The panels that rows make: prefill, decode and prompt-with-answer apart. The horizontal axis is the depth where several were
/// measured, and otherwise the length of the prompt or answer.
#[must_use]
pub fn panels(rows: &[Row]) -> Vec<Panel> {
    let kinds = [
        ("Prefill", rows_of(rows, |r| r.test.generate == 0)),
        ("Decode", rows_of(rows, |r| r.test.prompt == 0 && r.test.generate > 0)),
        ("Prompt and answer", rows_of(rows, |r| r.test.prompt > 0 && r.test.generate > 0)),
    ];
    let mut panels = vec![];
    for (kind, rows) in kinds.into_iter().filter(|(_, rows)| !rows.is_empty()) {
        let depths: BTreeSet<usize> = rows.iter().map(|r| r.test.depth).collect();
        if depths.len() == 1 {
            let at =
                depths.first().filter(|d| **d > 0).map_or_else(String::new, |d| format!(" at {}", short(*d)));
            let x = |r: &Row| r.test.prompt + r.test.generate;
            panels.push(Panel {
                title: format!("{kind}{at}"),
                x_label: "tokens of the test",
                lines: lines(&rows, x),
            });
            continue;
        }
        // How many tokens are generated does not change what one of them costs.
        let shape = |r: &Row| (r.test.prompt, if r.test.prompt == 0 { 0 } else { r.test.generate });
        for (prompt, generate) in rows.iter().map(|r| shape(r)).collect::<BTreeSet<_>>() {
            let title = match (prompt, generate) {
                (0, _) => kind.to_owned(),
                (p, 0) => format!("{kind} of {} tokens", short(p)),
                (p, n) => format!("{kind}, {} and {} tokens", short(p), short(n)),
            };
            let same = rows.iter().copied().filter(|r| shape(r) == (prompt, generate)).collect::<Vec<_>>();
            let lines = lines(&same, |r| r.test.depth);
            panels.push(Panel { title, x_label: "positions in the cache", lines });
        }
    }
    panels
}

fn rows_of(rows: &[Row], wanted: impl Fn(&Row) -> bool) -> Vec<&Row> {
    rows.iter().filter(|r| wanted(r)).collect()
}

fn lines(rows: &[&Row], x: impl Fn(&Row) -> usize) -> Vec<Line> {
    let mut lines: Vec<Line> = vec![];
    let sequences: BTreeSet<usize> = rows.iter().map(|r| r.test.sequences).collect();
    for row in rows {
        let batch = if sequences.len() > 1 { format!(" x{}", row.test.sequences) } else { String::new() };
        let name = format!("{}{batch}", row.series);
        let at = lines.iter().position(|l| l.name == name).unwrap_or_else(|| {
            lines.push(Line { name, rates: vec![], speedups: vec![] });
            lines.len() - 1
        });
        lines[at].rates.push((x(row), row.avg_ts));
        lines[at].speedups.extend(row.speedup.map(|s| (x(row), s)));
    }
    for line in &mut lines {
        line.rates.sort_by_key(|p| p.0);
        line.speedups.sort_by_key(|p| p.0);
    }
    lines
}

/// `512`, `8K`, `1.5K`.
#[must_use]
pub fn short(n: usize) -> String {
    match n {
        0..1024 => n.to_string(),
        _ if n.is_multiple_of(1024) => format!("{}K", n / 1024),
        _ => format!("{:.1}K", n as f64 / 1024.0),
    }
}

const WIDTH: u32 = 1120;
const HEADER: u32 = 60;
const PANEL: u32 = 380;
/// Room for the names at the ends of the lines.
const NAMES: u32 = 146;

const PAPER: RGBColor = RGBColor(255, 255, 255);
const INK: RGBColor = RGBColor(31, 35, 40);
const FAINT: RGBColor = RGBColor(89, 99, 110);
const GRID: RGBColor = RGBColor(216, 222, 228);

/// Colours of lines, the first for a baseline: they stand out from white paper and from a dark page alike, and differ in brightness too.
pub(crate) const COLOURS: [RGBColor; 8] = [
    RGBColor(130, 138, 147),
    RGBColor(214, 118, 22),
    RGBColor(47, 124, 238),
    RGBColor(36, 160, 90),
    RGBColor(176, 98, 232),
    RGBColor(20, 158, 170),
    RGBColor(222, 76, 84),
    RGBColor(150, 120, 20),
];

/// For a reader with a dark page: the same drawing on dark paper.
const STYLE: &str = "<style>
text { font-family: system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif }
@media (prefers-color-scheme: dark) {
  [fill='#FFFFFF'] { fill: #0D1117 } [stroke='#FFFFFF'] { stroke: #0D1117 }
  [fill='#1F2328'] { fill: #E6EDF3 } [stroke='#1F2328'] { stroke: #8B949E }
  [fill='#59636E'] { fill: #9198A1 } [stroke='#D8DEE4'] { stroke: #2B313A }
}
</style>
";

/// Rows as an SVG document: a line of panels for each kind of test.
///
/// # Errors
/// [`Error::Input`] when there is nothing to draw.
pub fn svg(rows: &[Row]) -> Result<String> {
    let panels = panels(rows);
    if panels.is_empty() {
        return Err(Error::Input("there are no rows to plot".into()));
    }
    let mut svg = String::new();
    let size = (WIDTH, HEADER + PANEL * panels.len() as u32);
    draw(&mut svg, size, rows, &panels)
        .map_err(|e| Error::Runtime(format!("the plot could not be drawn: {e}")))?;
    let end_of_tag = svg.find('>').map_or(0, |i| i + 1);
    svg.insert_str(end_of_tag, &format!("\n{STYLE}"));
    Ok(svg)
}

type Drawing<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Outcome = std::result::Result<(), Box<dyn std::error::Error>>;

fn draw(svg: &mut String, size: (u32, u32), rows: &[Row], panels: &[Panel]) -> Outcome {
    let root = SVGBackend::with_string(svg, size).into_drawing_area();
    root.fill(&PAPER)?;
    let mut backends: Vec<&str> = vec![];
    rows.iter().for_each(|r| {
        if !backends.contains(&r.backend.as_str()) {
            backends.push(&r.backend)
        }
    });
    let random = if rows.iter().any(Row::is_filled_at_random) { "  ·  depth filled at random" } else { "" };
    let build = rows.first().map_or("", |r| r.build.as_str());
    text(&root, &format!("{}{random}", backends.join("  ·  ")), (24, 24), 19, INK, HPos::Left)?;
    text(&root, &format!("clsa {build}"), (24, 46), 15, FAINT, HPos::Left)?;
    let (_, below) = root.split_vertically(HEADER);
    let colours: Vec<&str> = series(panels);
    for (panel, area) in panels.iter().zip(below.split_evenly((panels.len(), 1))) {
        let both = panel.lines.iter().any(|l| !l.speedups.is_empty());
        let parts = area.split_evenly((1, if both { 2 } else { 1 }));
        let of = |points: fn(&Line) -> &Vec<(usize, f64)>| -> Vec<Curve<'_>> {
            let lines = panel.lines.iter().filter(|l| !points(l).is_empty());
            lines
                .map(|l| Curve { name: &l.name, points: points(l), colour: colour(&colours, &l.name) })
                .collect()
        };
        let title = format!("{}: tokens/s", panel.title);
        chart(&root, &parts[0], &title, panel.x_label, "tokens/s", &of(|l| &l.rates))?;
        if let Some(right) = parts.get(1) {
            let title = format!("{}: speed-up", panel.title);
            chart(
                &root,
                right,
                &title,
                panel.x_label,
                "times as fast as the baseline",
                &of(|l| &l.speedups),
            )?;
        }
    }
    root.present()?;
    Ok(())
}

/// Names of all lines, each once: they decide the colours, so that a series has one colour in every panel.
fn series(panels: &[Panel]) -> Vec<&str> {
    let mut names = vec![];
    for line in panels.iter().flat_map(|p| &p.lines) {
        if !names.contains(&line.name.as_str()) {
            names.push(&line.name);
        }
    }
    names
}

fn colour(names: &[&str], name: &str) -> RGBColor {
    let at = names.iter().position(|n| *n == name).unwrap_or(0);
    COLOURS[at % COLOURS.len()]
}

struct Curve<'a> {
    name: &'a str,
    points: &'a [(usize, f64)],
    colour: RGBColor,
}

fn text(root: &Drawing<'_>, what: &str, at: (i32, i32), size: i32, colour: RGBColor, side: HPos) -> Outcome {
    let style = ("sans-serif", size).into_font().color(&colour).pos(Pos::new(side, VPos::Center));
    root.draw(&Text::new(what.to_owned(), at, style))?;
    Ok(())
}

/// Where a position stands on the axis: an empty cache, which has no place on a logarithmic one, half-way before the first.
fn place(x: usize, first: usize) -> f64 {
    if x == 0 { first as f64 / 2.0 } else { x as f64 }
}

fn chart(
    root: &Drawing<'_>,
    area: &Drawing<'_>,
    title: &str,
    x_label: &str,
    y_label: &str,
    curves: &[Curve<'_>],
) -> Outcome {
    let positions: BTreeSet<usize> = curves.iter().flat_map(|c| c.points.iter().map(|p| p.0)).collect();
    let first = positions.iter().copied().find(|x| *x > 0).unwrap_or(1);
    let xs: Vec<f64> = positions.iter().map(|&x| place(x, first)).collect();
    let values = || curves.iter().flat_map(|c| c.points.iter().map(|p| p.1)).filter(|v| *v > 0.0);
    let (low, high) = (values().fold(f64::INFINITY, f64::min), values().fold(0.0, f64::max));
    let ticks = ticks(low, high);
    let (Some(&left), Some(&right)) = (xs.first(), xs.last()) else { return Ok(()) };
    let (Some(&bottom), Some(&top)) = (ticks.first(), ticks.last()) else { return Ok(()) };
    let mut chart = ChartBuilder::on(area)
        .margin_left(20)
        .margin_right(NAMES)
        .margin_top(40)
        .margin_bottom(14)
        .x_label_area_size(48)
        .y_label_area_size(64)
        .build_cartesian_2d(
            (left / 1.1..right * 1.1).log_scale().base(2.0).with_key_points(xs.clone()),
            (bottom..top).log_scale().with_key_points(ticks),
        )?;
    let label = ("sans-serif", 15).into_font().color(&FAINT);
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(GRID)
        .x_desc(x_label)
        .y_desc(y_label)
        .axis_desc_style(label.clone())
        .label_style(label)
        .x_label_formatter(&|x| {
            positions.iter().find(|p| place(**p, first) == *x).map_or_else(String::new, |p| short(*p))
        })
        .y_label_formatter(&|y| tick_name(*y))
        .draw()?;
    let mut ends = vec![];
    for curve in curves {
        let points: Vec<(f64, f64)> =
            curve.points.iter().filter(|p| p.1 > 0.0).map(|&(x, y)| (place(x, first), y)).collect();
        let Some(&last) = points.last() else { continue };
        chart.draw_series(LineSeries::new(points.iter().copied(), curve.colour.stroke_width(2)))?;
        chart.draw_series(points.iter().map(|&p| Circle::new(p, 3, curve.colour.filled())))?;
        let (x, y) = chart.backend_coord(&last);
        let value = match last.1 {
            v if v >= 100.0 => format!("{v:.0}"),
            v if v >= 10.0 => format!("{v:.1}"),
            v => format!("{v:.2}"),
        };
        ends.push((y, x, format!("{} {value}", curve.name), curve.colour));
    }
    let (x0, y0) = area.get_base_pixel();
    text(root, title, (x0 + 24, y0 + 22), 18, INK, HPos::Left)?;
    // Names stand at the ends of their lines, pushed apart where these meet.
    ends.sort_by_key(|e| e.0);
    let spread = spread(&ends.iter().map(|e| e.0).collect::<Vec<_>>(), 16, y0 + PANEL as i32 - 58);
    for ((_, x, name, colour), y) in ends.into_iter().zip(spread) {
        text(root, &name, (x + 9, y), 15, colour, HPos::Left)?;
    }
    Ok(())
}

/// 1, 2, 5, 10, ... from below the smallest value to above the largest.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    if !(low.is_finite() && low > 0.0) {
        return vec![];
    }
    let step = |i: i32| [1.0, 2.0, 5.0][i.rem_euclid(3) as usize] * 10f64.powi(i.div_euclid(3));
    let start = 3 * low.log10().floor() as i32 - 1;
    let first = (start..).take_while(|i| step(*i) <= low * 0.98).last().unwrap_or(start);
    let last = (first + 1..).find(|i| step(*i) >= high * 1.02).unwrap_or(first + 1);
    (first..=last).map(step).collect()
}

fn tick_name(y: f64) -> String {
    if y >= 1.0 { format!("{y:.0}") } else { format!("{y}") }
}

/// Moves increasing heights at least `gap` apart, none below `floor`, each as little as simply possible.
fn spread(heights: &[i32], gap: i32, floor: i32) -> Vec<i32> {
    let mut out: Vec<i32> = vec![];
    for &y in heights {
        out.push(out.last().map_or(y, |above| y.max(above + gap)));
    }
    let mut below = floor + gap;
    for y in out.iter_mut().rev() {
        *y = (*y).min(below - gap);
        below = *y;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{Test, report};

    fn row(series: &str, prompt: usize, generate: usize, depth: usize, rate: f64) -> Row {
        let test = Test { prompt, generate, depth, sequences: 1 };
        Row { series: series.into(), test, avg_ts: rate, ..report::tests::row() }
    }

    #[test]
    fn prefill_and_decode_are_apart_and_each_series_has_a_line() {
        let rows = [
            row("CLSA", 512, 0, 1024, 90.0),
            row("Transformer", 0, 32, 8192, 4.0),
            row("Transformer", 0, 16, 0, 9.0),
            row("CLSA", 0, 32, 0, 8.0),
        ];
        let panels = panels(&rows);
        assert_eq!(panels.iter().map(|p| p.title.as_str()).collect::<Vec<_>>(), ["Prefill at 1K", "Decode"]);
        assert_eq!(panels[1].x_label, "positions in the cache");
        assert_eq!(panels[1].lines[0].rates, [(0, 9.0), (8192, 4.0)]);
        assert_eq!(panels[1].lines[1].name, "CLSA");
    }

    #[test]
    fn batches_have_lines_of_their_own() {
        let mut rows = [row("CLSA", 0, 8, 1024, 5.0), row("CLSA", 0, 8, 1024, 30.0)];
        rows[1].test.sequences = 8;
        let panels = panels(&rows);
        let names: Vec<&str> = panels[0].lines.iter().map(|l| l.name.as_str()).collect();
        assert_eq!(names, ["CLSA x1", "CLSA x8"]);
    }

    #[test]
    fn ticks_enclose_the_values() {
        assert_eq!(ticks(3.0, 45.0), [2.0, 5.0, 10.0, 20.0, 50.0]);
        assert_eq!(ticks(1.0, 1.0), [0.5, 1.0, 2.0]);
        assert_eq!(ticks(f64::INFINITY, 0.0), Vec::<f64>::new());
    }

    #[test]
    fn names_are_pushed_apart() {
        assert_eq!(spread(&[10, 12, 60], 15, 100), [10, 25, 60]);
        assert_eq!(spread(&[90, 95, 98], 15, 100), [70, 85, 100]);
    }

    #[test]
    fn a_drawing_names_its_series_and_escapes_them() {
        let mut rows = vec![row("a<b>", 0, 8, 1024, 3.0), row("a<b>", 0, 8, 2048, 2.0)];
        rows[0].speedup = Some(1.5);
        let svg = svg(&rows).expect("a drawing");
        assert!(svg.contains("a&lt;b&gt;") && svg.contains("speed-up") && svg.contains("2K"), "{svg}");
        assert!(svg.contains("prefers-color-scheme: dark"));
        assert!(super::svg(&[]).is_err());
    }
}
