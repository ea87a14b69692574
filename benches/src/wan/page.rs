//! The page for a browser: the table, the pictures, all figures. It loads nothing.

use serde_json::Value;

use super::Setup;
use super::chart::{COLORS, Chart};
use super::timeline::line_colors;

const STYLE: &str = "path{fill:none;stroke-width:1.5}.grid{stroke:#ddd}.zero{stroke:#888;stroke-dasharray:4 3}\
body{font:15px/1.4 sans-serif;margin:2em auto;max-width:980px;color:#222}\
table{border-collapse:collapse}td,th{padding:.15em 1em .15em 0;text-align:right;font-variant-numeric:tabular-nums}\
td:first-child{text-align:left}tr:first-child th{border-bottom:2px solid #ccc}svg{max-width:100%;height:auto}\
svg text{font:11px sans-serif;fill:#444}h2{font-size:1em;margin:1.5em 0 .3em}pre{font-size:12px;overflow:auto}";

/// Puts the page together. All text in it is this program's own.
pub fn page(
    setup: &Setup,
    congestion_control: &str,
    rows: &[Vec<String>],
    charts: &[Chart],
    json: &Value,
) -> String {
    let pictures: String = charts
        .iter()
        .map(|chart| format!("<h2>{}</h2>\n{}", chart.title, chart.svg))
        .collect();
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<title>lazyvm bench wan</title>\n\
         <style>{STYLE}{}</style>\n<h1>A move over a long path</h1>\n<p>{}</p>\n{}<p>Medians of {} runs. Time 0 is the \
         order to move; the pictures show each one's run with the median freeze.</p>\n{pictures}<details><summary>All \
         figures</summary><pre>{}</pre></details>\n</html>\n",
        line_colors(COLORS),
        escaped(&description(setup, congestion_control)),
        table(rows),
        setup.runs,
        escaped(&format!("{json:#}")),
    )
}

/// What moves over which path.
pub fn description(setup: &Setup, congestion_control: &str) -> String {
    let path = &setup.path;
    let mib = |bytes: u64| bytes >> 20;
    let mut text = format!(
        "Guest: {:?}, {} MiB, fills {} MiB, {} MiB of it hot. Path: round trip {:?}, {} Mbit/s each way, queue {:?}, loss {}%",
        setup.guest,
        mib(setup.memory_bytes),
        mib(setup.workload.fill_bytes),
        mib(setup.workload.hot_bytes),
        path.rtt,
        path.rate_bit_s as f64 / 1e6,
        path.queue,
        path.loss * 100.0,
    );
    if !path.jitter.is_zero() {
        text += &format!(", jitter {:?}", path.jitter);
    }
    if path.reorder > 0.0 {
        text += &format!(", {}% reordered", path.reorder * 100.0);
    }
    if let Some((at, time)) = setup.blackout {
        text += &format!(", nothing goes through for {time:?} after {at:?}");
    }
    text + &format!(". TCP, which QEMU uses, has the machine's {congestion_control}.")
}

/// Columns have the colors of their lines.
fn table(rows: &[Vec<String>]) -> String {
    let mut out = "<table>\n".to_owned();
    for (number, row) in rows.iter().enumerate() {
        out += "<tr>";
        for (column, cell) in row.iter().enumerate() {
            let cell = escaped(cell);
            out += &match (number, column) {
                (0, 0) => "<th></th>".to_owned(),
                (0, _) => {
                    let color = COLORS[(column - 1) % COLORS.len()];
                    format!("<th style=\"color:{color}\">{cell}</th>")
                }
                _ => format!("<td>{cell}</td>"),
            };
        }
        out += "</tr>\n";
    }
    out + "</table>\n"
}

pub(super) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}
