//! Heat maps and curves as SVG files.
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::bench::plot::COLOURS;
use crate::error::{Error, Result};

const FONT: &str = "sans-serif";

/// A table of numbers by column and row.
#[derive(Clone, Debug, Default)]
pub struct HeatMap {
    /// What it shows.
    pub title: String,
    /// What the columns are.
    pub x: String,
    /// What the rows are.
    pub y: String,
    /// Names of the columns.
    pub columns: Vec<String>,
    /// Names of the rows, from the top.
    pub rows: Vec<String>,
    /// `[row][column]`, 0 to 1; `None` where nothing was measured.
    pub cells: Vec<Vec<Option<f64>>>,
}

/// Lines over one axis.
#[derive(Clone, Debug, Default)]
pub struct Curves {
    /// What they show.
    pub title: String,
    /// What the x axis is, logarithmic.
    pub x: String,
    /// What the y axis is, 0 to 1.
    pub y: String,
    /// Name and points of each line.
    pub lines: Vec<(String, Vec<(f64, f64)>)>,
}

impl HeatMap {
    /// Writes the file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, path: &Path) -> Result<()> {
        let cell = (54i32, 26i32);
        let widest = self.rows.iter().map(|r| r.len()).max().unwrap_or(0) as i32;
        let (left, top, bottom) = (50 + 8 * widest, 50, 56);
        let size = (
            (left + cell.0 * self.columns.len().max(4) as i32 + 20) as u32,
            (top + cell.1 * self.rows.len() as i32 + bottom) as u32,
        );
        save(path, size, |root| {
            let (width, height) = (size.0 as i32, size.1 as i32);
            text(root, &self.title, (width / 2, 24), 16, HPos::Center)?;
            text(
                root,
                &self.x,
                (left + cell.0 * self.columns.len() as i32 / 2, height - 14),
                13,
                HPos::Center,
            )?;
            text(root, &self.y, (10, top - 12), 13, HPos::Left)?;
            for (r, (name, cells)) in self.rows.iter().zip(&self.cells).enumerate() {
                let y = top + r as i32 * cell.1;
                text(root, name, (left - 8, y + cell.1 / 2), 12, HPos::Right)?;
                for (c, value) in cells.iter().enumerate() {
                    let x = left + c as i32 * cell.0;
                    let Some(value) = value else { continue };
                    let area = [(x, y), (x + cell.0 - 1, y + cell.1 - 1)];
                    root.draw(&Rectangle::new(area, colour(*value).filled()))?;
                    let label = format!("{:.1}", 100.0 * value);
                    text(root, &label, (x + cell.0 / 2, y + cell.1 / 2), 12, HPos::Center)?;
                }
            }
            for (c, name) in self.columns.iter().enumerate() {
                let at = (left + c as i32 * cell.0 + cell.0 / 2, height - bottom + 14);
                text(root, name, at, 12, HPos::Center)?;
            }
            Ok(())
        })
    }
}

impl Curves {
    /// Writes the file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, path: &Path) -> Result<()> {
        let points = || self.lines.iter().flat_map(|(_, points)| points);
        let fold = |of: fn(&(f64, f64)) -> f64, by: fn(f64, f64) -> f64| points().map(of).reduce(by);
        let (Some(first), Some(last)) = (fold(|p| p.0, f64::min), fold(|p| p.0, f64::max)) else {
            return Err(Error::Input(format!("{}: there is nothing to draw", path.display())));
        };
        let least = fold(|p| p.1, f64::min).unwrap_or(0.0);
        let floor = ((least * 10.0).floor() / 10.0).clamp(0.0, 0.9);
        save(path, (720, 440), |root| {
            let mut chart = ChartBuilder::on(root)
                .caption(&self.title, (FONT, 16))
                .margin(14)
                .x_label_area_size(40)
                .y_label_area_size(54)
                .build_cartesian_2d((first..last.max(first * 1.01)).log_scale().base(2.0), floor..1.0)?;
            chart
                .configure_mesh()
                .light_line_style(TRANSPARENT)
                .x_desc(&self.x)
                .y_desc(&self.y)
                .x_label_formatter(&|x| format!("{x:.0}"))
                .y_label_formatter(&|y| format!("{:.0} %", 100.0 * y))
                .draw()?;
            for (i, (name, points)) in self.lines.iter().enumerate() {
                // No line here is a baseline.
                let colour = COLOURS[1 + i % (COLOURS.len() - 1)];
                let style = colour.stroke_width(2);
                chart
                    .draw_series(LineSeries::new(points.iter().copied(), style))?
                    .label(name)
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
                chart.draw_series(points.iter().map(|p| Circle::new(*p, 3, colour.filled())))?;
            }
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::LowerRight)
                .background_style(WHITE.mix(0.9))
                .border_style(BLACK.mix(0.3))
                .label_font((FONT, 12))
                .draw()?;
            Ok(())
        })
    }
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

fn save(path: &Path, size: (u32, u32), draw: impl FnOnce(&Area<'_>) -> Drawn) -> Result<()> {
    let mut svg = String::new();
    let drawn = (|| {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE)?;
        draw(&root)?;
        root.present()?;
        Ok(())
    })();
    drawn.map_err(|e: Box<dyn std::error::Error>| Error::Runtime(format!("{}: {e}", path.display())))?;
    std::fs::write(path, svg).map_err(|source| Error::Io { path: path.to_owned(), source })
}

fn text(root: &Area<'_>, what: &str, at: (i32, i32), size: u32, anchor: HPos) -> Drawn {
    let style = TextStyle::from((FONT, size)).pos(Pos::new(anchor, VPos::Center));
    root.draw(&Text::new(what.to_owned(), at, style))?;
    Ok(())
}

/// Red at 0, yellow at a half, green at 1; light enough for black text.
fn colour(value: f64) -> RGBColor {
    const STOPS: [[f64; 3]; 3] = [[236.0, 112.0, 99.0], [247.0, 220.0, 111.0], [125.0, 206.0, 130.0]];
    let at = if value.is_finite() { value.clamp(0.0, 1.0) * 2.0 } else { 0.0 };
    let (i, share) = ((at as usize).min(1), at - (at as usize).min(1) as f64);
    let mix = |c: usize| (STOPS[i][c] + (STOPS[i + 1][c] - STOPS[i][c]) * share) as u8;
    RGBColor(mix(0), mix(1), mix(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heat_map_has_a_rectangle_for_each_cell() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("map.svg");
        let map = HeatMap {
            title: "coverage <k>".into(),
            columns: vec!["a".into(), "b".into()],
            rows: vec!["0".into(), "1".into()],
            cells: vec![vec![Some(0.0), None], vec![Some(0.5), Some(1.0)]],
            ..HeatMap::default()
        };
        map.save(&path).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        assert_eq!(svg.matches("<rect").count(), 1 + 3, "a background and three cells");
        assert!(svg.contains("coverage &lt;k&gt;") && svg.contains("50.0") && svg.contains("100.0"), "{svg}");
        assert!(svg.contains("#EC7063") && svg.contains("#7DCE82"), "the colours of 0 and 1: {svg}");
    }

    #[test]
    fn curves_have_a_line_each() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("curves.svg");
        let line = |name: &str| (name.to_owned(), vec![(64.0, 0.4), (512.0, 0.8)]);
        Curves { lines: vec![line("clsa"), line("best")], ..Curves::default() }.save(&path).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        assert_eq!(svg.matches("<circle").count(), 4);
        assert!(svg.contains("clsa") && svg.contains("best"));
        assert!(Curves::default().save(&path).is_err());
        // One point only is still a picture.
        Curves { lines: vec![("k".into(), vec![(64.0, 1.0)])], ..Curves::default() }.save(&path).unwrap();
    }
}
