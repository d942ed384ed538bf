//! Bench rows as bars, for a terminal.
use std::fmt::Write as _;

use super::plot::{panels, short};
use super::report::Row;

/// Characters of the longest bar.
const LENGTH: usize = 40;

/// Bars of tokens per second: a block for each kind of test, a group for each depth, a bar for each series.
#[must_use]
pub fn chart(rows: &[Row]) -> String {
    let mut out = String::new();
    for panel in panels(rows) {
        let _ = writeln!(out, "{}, tokens/s", panel.title);
        let width = panel.lines.iter().map(|l| l.name.chars().count()).max().unwrap_or(0);
        let most = panel.lines.iter().flat_map(|l| l.rates.iter().map(|p| p.1)).fold(0.0, f64::max);
        let mut positions: Vec<usize> =
            panel.lines.iter().flat_map(|l| l.rates.iter().map(|p| p.0)).collect();
        positions.sort_unstable();
        positions.dedup();
        for at in positions {
            let _ = writeln!(out, "  {} {}", short(at), panel.x_label);
            for line in &panel.lines {
                let Some(&(_, rate)) = line.rates.iter().find(|p| p.0 == at) else { continue };
                let speedup = line.speedups.iter().find(|p| p.0 == at);
                let speedup = speedup.map_or_else(String::new, |(_, s)| format!("  {s:.2}x"));
                let bar = bar(rate / most, LENGTH);
                let _ = writeln!(out, "    {:width$}  {bar:LENGTH$} {rate:>9.1}{speedup}", line.name);
            }
        }
    }
    out
}

/// A bar of eighths of a character.
fn bar(share: f64, length: usize) -> String {
    let eighths = (share.clamp(0.0, 1.0) * length as f64 * 8.0).round() as usize;
    let mut bar = "█".repeat(eighths / 8);
    if let Some(part) = (eighths % 8).checked_sub(1) {
        bar.push(['▏', '▎', '▍', '▌', '▋', '▊', '▉'][part]);
    }
    if bar.is_empty() { "▏".into() } else { bar }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{Test, report};

    #[test]
    fn bars_are_in_proportion() {
        assert_eq!(bar(1.0, 4), "████");
        assert_eq!(bar(0.5, 4), "██");
        assert_eq!(bar(0.28125, 4), "█▏");
        assert_eq!(bar(0.0, 4), "▏");
    }

    #[test]
    fn every_row_has_a_bar() {
        let row = |series: &str, depth, rate, speedup| {
            let test = Test { prompt: 0, generate: 8, depth, sequences: 1 };
            Row { series: series.into(), test, avg_ts: rate, speedup, ..report::tests::row() }
        };
        let rows = [
            row("Transformer", 8192, 2.0, Some(1.0)),
            row("CLSA", 8192, 4.0, Some(2.0)),
            row("CLSA", 1024, 4.0, None),
        ];
        let chart = chart(&rows);
        assert_eq!(chart.lines().count(), 1 + 2 + 3, "{chart}");
        assert!(chart.contains("2.00x") && chart.contains("8K positions"), "{chart}");
    }
}
