//! Pictures of moves over time, all on one axis, as SVG.

use super::trial::Record;

pub(super) const WIDTH: f64 = 960.0;
pub(super) const HEIGHT: f64 = 260.0;
pub(super) const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 36.0;

/// Bins of speed and of bytes, in microseconds.
pub(super) const BIN_US: i64 = 50_000;

/// What is shown of the time before the order.
pub(super) const MARGIN_US: i64 = 1_000_000;

/// Colors that people who don't see all colors can tell apart (Okabe and Ito), on white.
pub const COLORS: [&str; 4] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"];

/// Bounds of the histogram of gaps, in milliseconds.
const GAPS_MS: [f64; 12] = [
    12.0, 15.0, 20.0, 30.0, 50.0, 100.0, 150.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0,
];

/// A picture and what it shows.
pub struct Chart {
    /// What it shows.
    pub title: &'static str,
    /// The picture.
    pub svg: String,
}

/// A line, with its points in seconds and a number.
pub(super) struct Line {
    points: Vec<(f64, f64)>,
    /// Whether a number holds until the next.
    steps: bool,
}

/// All pictures of these moves.
pub fn all(series: &[(String, &Record)]) -> Vec<Chart> {
    let to_us = series
        .iter()
        .map(|(_, record)| record.end_us)
        .max()
        .unwrap_or(0);
    let lines = |of: &dyn Fn(&Record) -> Line| -> Vec<Line> {
        series.iter().map(|(_, record)| of(record)).collect()
    };
    let over_time = |lines: &[Line]| open() + &plot(lines, to_us) + "</svg>\n";
    vec![
        Chart {
            title: SPEED,
            svg: over_time(&lines(&|record| speed(record, BIN_US))),
        },
        Chart {
            title: RATE,
            svg: over_time(&lines(&|record| rate(record, BIN_US))),
        },
        Chart {
            title: "Pages waited for so far",
            svg: over_time(&lines(&faults)),
        },
        Chart {
            title: "How long the guest was silent: the number of gaps between ticks by their length, from the order on",
            svg: histogram(series),
        },
    ]
}

/// What [`speed`] shows.
pub(super) const SPEED: &str = "The guest's speed, % of its speed before the move";

pub(super) fn speed(record: &Record, bin_us: i64) -> Line {
    let per_bin = record.figures.speed_before_hz * bin_us as f64 / 1e6;
    let signs = record.signs.iter().map(|sign| (sign.at_us, 1.0));
    binned(signs, record.end_us, bin_us, 100.0 / per_bin.max(1e-9))
}

/// What [`rate`] shows.
pub(super) const RATE: &str = "Arrived from the source, Mbit/s";

pub(super) fn rate(record: &Record, bin_us: i64) -> Line {
    let bytes = record.bytes.iter().map(|(at, bytes)| (*at, *bytes as f64));
    binned(bytes, record.end_us, bin_us, 8.0 / bin_us as f64)
}

/// Sums by `bin_us`, times `factor`.
fn binned(events: impl Iterator<Item = (i64, f64)>, to_us: i64, bin_us: i64, factor: f64) -> Line {
    let count = ((to_us + MARGIN_US) / bin_us).max(0) as usize;
    let mut bins = vec![0.0; count];
    for (at, number) in events {
        let bin = (at + MARGIN_US).div_euclid(bin_us);
        if let Some(sum) = usize::try_from(bin).ok().and_then(|bin| bins.get_mut(bin)) {
            *sum += number;
        }
    }
    let at = |bin: i64| (bin * bin_us - MARGIN_US) as f64 / 1e6;
    Line {
        points: (0..)
            .zip(bins)
            .map(|(bin, sum)| (at(bin), sum * factor))
            .collect(),
        steps: true,
    }
}

fn faults(record: &Record) -> Line {
    let seen = record.faults.iter().filter(|(at, _)| *at >= 0);
    let mut points = vec![(0.0, 0.0)];
    points.extend(seen.map(|(at, count)| (*at as f64 / 1e6, *count as f64)));
    points.push((
        record.complete_us as f64 / 1e6,
        record.figures.faults as f64,
    ));
    points.push((record.end_us as f64 / 1e6, record.figures.faults as f64));
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    Line {
        points,
        steps: false,
    }
}

/// The inside of a picture of [`WIDTH`] by [`HEIGHT`]; `grid`, `zero` and `line0` to `line3` are its classes.
pub(super) fn plot(lines: &[Line], to_us: i64) -> String {
    let from_s = -MARGIN_US as f64 / 1e6;
    let to_s = to_us as f64 / 1e6;
    let most = lines
        .iter()
        .flat_map(|line| &line.points)
        .fold(0.0, |most: f64, (_, y)| most.max(*y));
    let top = ceiling(most);
    let x = |s: f64| LEFT + (s - from_s) / (to_s - from_s) * (WIDTH - LEFT - RIGHT);
    let y = |number: f64| HEIGHT - BOTTOM - number / top * (HEIGHT - BOTTOM - TOP);
    let mut svg = grid(top, y);
    let step = ceiling((to_s - from_s) / 12.0);
    let mut at = 0.0;
    while at <= to_s {
        svg += &label(
            x(at),
            HEIGHT - BOTTOM + 18.0,
            "middle",
            &format!("{} s", short(at)),
        );
        at += step;
    }
    let zero = x(0.0);
    let (high, low) = (TOP, HEIGHT - BOTTOM);
    svg += &format!(
        "<line class=\"zero\" x1=\"{zero:.1}\" y1=\"{high}\" x2=\"{zero:.1}\" y2=\"{low}\"/>\n"
    );
    for (line, number) in lines.iter().zip((0..COLORS.len()).cycle()) {
        let path = line.path(x, y);
        svg += &format!("<path class=\"line{number}\" d=\"{path}\"/>\n");
    }
    svg
}

impl Line {
    /// The commands of an SVG path. A number that stays the same is not repeated.
    fn path(&self, x: impl Fn(f64) -> f64, y: impl Fn(f64) -> f64) -> String {
        let mut path = String::new();
        let mut before = String::new();
        let last = self.points.len().saturating_sub(1);
        for (index, (s, number)) in self.points.iter().enumerate() {
            let (x, y) = (format!("{:.1}", x(*s)), format!("{:.1}", y(*number)));
            if index == 0 {
                path += &format!("M{x} {y}");
            } else if !self.steps {
                path += &format!("L{x} {y}");
            } else if y != before {
                path += &format!("H{x}V{y}");
            } else if index == last {
                path += &format!("H{x}");
            }
            before = y;
        }
        path
    }
}

fn histogram(series: &[(String, &Record)]) -> String {
    let counts: Vec<Vec<f64>> = series
        .iter()
        .map(|(_, record)| {
            let mut bins = vec![0.0; GAPS_MS.len() + 1];
            for pair in record.signs.windows(2).filter(|pair| pair[1].at_us >= 0) {
                let gap_ms = (pair[1].at_us - pair[0].at_us) as f64 / 1000.0;
                bins[GAPS_MS.partition_point(|bound| *bound <= gap_ms)] += 1.0;
            }
            bins
        })
        .collect();
    // Most gaps are as short as before; a logarithm shows the few others.
    let height = |count: f64| (1.0 + count).log10();
    let top = counts
        .iter()
        .flatten()
        .fold(1.0, |most: f64, count| most.max(height(*count)));
    let width = (WIDTH - LEFT - RIGHT) / (GAPS_MS.len() + 1) as f64;
    let bar = width * 0.8 / series.len().max(1) as f64;
    let floor = HEIGHT - BOTTOM;
    let mut svg = open();
    for bin in 0..=GAPS_MS.len() {
        let left = LEFT + width * bin as f64;
        for ((counts, color), number) in counts.iter().zip(COLORS.iter().cycle()).zip(0..) {
            let count = counts[bin];
            let high = height(count) / top * (floor - TOP - 12.0);
            let x = left + width * 0.1 + bar * f64::from(number);
            svg += &format!(
                "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"{bar:.1}\" height=\"{high:.1}\" fill=\"{color}\"/>\n",
                floor - high
            );
            if count > 0.0 {
                svg += &label(x + bar / 2.0, floor - high - 3.0, "middle", &short(count));
            }
        }
        let text = match (bin.checked_sub(1).map(|bin| GAPS_MS[bin]), GAPS_MS.get(bin)) {
            (None, Some(to)) => format!("&lt;{to} ms"),
            (Some(from), Some(to)) => format!("{from}-{to}"),
            (from, None) => format!("≥{}", from.unwrap_or(0.0)),
        };
        svg += &label(left + width / 2.0, floor + 18.0, "middle", &text);
    }
    svg + "</svg>\n"
}

fn open() -> String {
    format!("<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" role=\"img\">\n")
}

fn grid(top: f64, y: impl Fn(f64) -> f64) -> String {
    let right = WIDTH - RIGHT;
    (0..=4)
        .map(|quarter| {
            let number = top * f64::from(quarter) / 4.0;
            let at = y(number);
            format!("<line class=\"grid\" x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{right}\" y2=\"{at:.1}\"/>\n")
                + &label(LEFT - 6.0, at + 4.0, "end", &short(number))
        })
        .collect()
}

pub(super) fn label(x: f64, y: f64, anchor: &str, text: &str) -> String {
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>\n")
}

/// The next of 1, 2, 5, 10, 20, 50, … that is no less.
fn ceiling(number: f64) -> f64 {
    if number <= 0.0 {
        return 1.0;
    }
    let power = 10_f64.powf(number.log10().floor());
    let found = [1.0, 1.2, 1.5, 2.0, 2.5, 5.0, 10.0]
        .into_iter()
        .map(|factor| factor * power)
        .find(|round| *round >= number * 0.999_999);
    found.unwrap_or(number)
}

pub(super) fn short(number: f64) -> String {
    let text = format!("{number:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_end_at_round_numbers() {
        for (number, round) in [
            (0.0, 1.0),
            (99.0, 100.0),
            (100.0, 100.0),
            (101.0, 120.0),
            (0.3, 0.5),
        ] {
            assert!((ceiling(number) - round).abs() < 1e-9, "{number}");
        }
        assert_eq!(
            (short(2.50), short(100.0)),
            ("2.5".to_owned(), "100".to_owned())
        );
    }

    #[test]
    fn a_path_has_no_point_twice_and_goes_on_to_its_end() {
        let of = |steps: bool| Line {
            points: vec![(0.0, 1.0), (1.0, 1.0), (2.0, 5.0), (3.0, 5.0)],
            steps,
        };
        let path = |line: Line| line.path(|x| x * 10.0, |y| y);
        assert_eq!(path(of(true)), "M0.0 1.0H20.0V5.0H30.0");
        assert_eq!(path(of(false)), "M0.0 1.0L10.0 1.0L20.0 5.0L30.0 5.0");
    }

    #[test]
    fn events_are_counted_in_their_bin() {
        let line = binned(
            [
                (-1_000_000, 1.0),
                (0, 2.0),
                (49_999, 3.0),
                (900_000_000, 9.0),
            ]
            .into_iter(),
            1_000_000,
            BIN_US,
            2.0,
        );
        assert_eq!(line.points.len(), 40);
        assert_eq!(line.points[0], (-1.0, 2.0));
        assert_eq!(line.points[20], (0.0, 10.0));
        assert_eq!(line.points[21].1, 0.0);
    }
}
