//! The pictures of moves over time as a file of their own, for documents: small, readable on light and on dark ground, with
//! nothing in it that is loaded or run.

use super::chart::{self, BIN_US, COLORS, HEIGHT, LEFT, Line, MARGIN_US, WIDTH};
use super::page::escaped;
use super::trial::Record;

/// The most bins that a line has; more take more bytes than they show.
const BINS_MAX: i64 = 300;

/// Room for names and a title.
const HEAD: f64 = 58.0;
const TITLE: f64 = 26.0;

/// [`COLORS`] for dark ground.
const COLORS_ON_DARK: [&str; COLORS.len()] = ["#56b4e9", "#f0883e", "#2fc99e", "#e3a0c5"];

const STYLE: &str = "text{font:11px sans-serif;fill:#444}.name{font-size:13px}.title{font-size:13px;font-weight:bold}\
path{fill:none;stroke-width:1.5}.ground{fill:#fff}.grid{stroke:#ddd}.zero{stroke:#888;stroke-dasharray:4 3}";

const STYLE_ON_DARK: &str =
    "text{fill:#c9d1d9}.ground{fill:#0d1117}.grid{stroke:#30363d}.zero{stroke:#8b949e}";

/// CSS for the lines of a picture.
pub fn line_colors(colors: [&str; COLORS.len()]) -> String {
    (0..)
        .zip(colors)
        .map(|(number, color): (u32, &str)| format!(".line{number}{{stroke:{color}}}"))
        .collect()
}

/// The guest's speed and what arrived, of all these moves.
pub fn timeline(description: &str, series: &[(String, &Record)]) -> String {
    let ends = series.iter().map(|(_, record)| record.end_us);
    let to_us = ends.max().unwrap_or(0);
    let bin_us = bin_us(to_us);
    let lines = |of: fn(&Record, i64) -> Line| -> Vec<Line> {
        series
            .iter()
            .map(|(_, record)| of(record, bin_us))
            .collect()
    };
    let panels = [
        (chart::SPEED, chart::plot(&lines(chart::speed), to_us)),
        (chart::RATE, chart::plot(&lines(chart::rate), to_us)),
    ];
    let height = HEAD + panels.len() as f64 * (TITLE + HEIGHT);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" role=\"img\">\n\
         <title>A move over a long path</title>\n<desc>{}</desc>\n<style>{STYLE}{}@media(prefers-color-scheme:dark){{\
         {STYLE_ON_DARK}{}}}</style>\n<rect class=\"ground\" width=\"{WIDTH}\" height=\"{height}\"/>\n",
        escaped(description),
        line_colors(COLORS),
        line_colors(COLORS_ON_DARK),
    );
    svg += &names(series);
    let mut at = HEAD;
    for (title, plot) in panels {
        svg += &format!(
            "<text class=\"title\" x=\"{LEFT}\" y=\"{}\">{}</text>\n<g transform=\"translate(0 {})\">\n{plot}</g>\n",
            at + 14.0,
            escaped(title),
            at + TITLE
        );
        at += TITLE + HEIGHT;
    }
    svg + "</svg>\n"
}

/// Who has which line, two in a row.
fn names(series: &[(String, &Record)]) -> String {
    let mut svg = String::new();
    for (number, (name, _)) in series.iter().enumerate() {
        let x = LEFT + 420.0 * (number % 2) as f64;
        let y = 20.0 + 20.0 * (number / 2) as f64;
        svg += &format!(
            "<path class=\"line{}\" d=\"M{x} {}h24\"/>\n<text class=\"name\" x=\"{}\" y=\"{y}\">{}</text>\n",
            number % COLORS.len(),
            y - 4.0,
            x + 32.0,
            escaped(name)
        );
    }
    svg
}

/// A whole number of the page's bins, so that no line has more than [`BINS_MAX`].
fn bin_us(to_us: i64) -> i64 {
    let bins = (to_us + MARGIN_US) / BIN_US + 1;
    BIN_US * (bins / BINS_MAX + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_moves_have_as_many_bins_as_short_ones() {
        assert_eq!(bin_us(0), BIN_US);
        for seconds in [1, 13, 14, 15, 60, 3600] {
            let to_us = seconds * 1_000_000;
            assert!((to_us + MARGIN_US) / bin_us(to_us) <= BINS_MAX, "{seconds}");
        }
    }
}
