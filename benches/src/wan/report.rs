//! What all runs gave, as JSON and as a table.

use serde_json::{Value, json};

use super::Setup;
use super::clones::Clones;
use super::figures::median;
use super::peer::{Fate, Loss, Variant};
use super::snapshot::Resumes;
use super::timeline::timeline;
use super::trial::Record;
use super::{chart, page};

/// All moves of a run.
pub struct Outcome {
    setup: Setup,
    own: Vec<Record>,
    /// Resumes from snapshots that had a profile, and what the snapshots' pauses took in microseconds.
    profiled: Vec<Record>,
    pauses_us: Vec<u64>,
    clones: Vec<Clones>,
    peers: Vec<Peer>,
    peer_version: String,
    tcp_congestion_control: String,
}

/// All moves of one of QEMU's ways.
struct Peer {
    variant: Variant,
    arrived: Vec<Record>,
    lost: Vec<Loss>,
}

/// What a move is called that went well.
const ARRIVED: &str = "arrived";

/// A row of the table: its name, and where its figure is.
struct Row {
    name: &'static str,
    path: &'static [&'static str],
    /// Divides the figure.
    unit: f64,
    decimals: usize,
}

const fn row(name: &'static str, path: &'static [&'static str], unit: f64, decimals: usize) -> Row {
    Row {
        name,
        path,
        unit,
        decimals,
    }
}

const ROWS: [Row; 23] = [
    row("how it ended", &["outcome"], 1.0, 0),
    row("first sign of life, ms", &["first_sign_ms"], 1.0, 0),
    row("freeze, ms", &["freeze_ms"], 1.0, 0),
    row("back to 80% of its speed, ms", &["recovered_ms"], 1.0, 0),
    row("total, ms", &["total_ms"], 1.0, 0),
    row("total, copies of its data", &["copies"], 1.0, 2),
    row("from pause to complete, ms", &["after_pause_ms"], 1.0, 0),
    row("downtime as told, ms", &["downtime_us"], 1e3, 1),
    row("bytes on the wire, MB", &["bytes_wire"], 1e6, 1),
    row("share of the path's rate, %", &["path_share"], 0.01, 1),
    row(
        "dirtied by path's rate before, %",
        &["dirty_share"],
        0.01,
        0,
    ),
    row("faults", &["faults"], 1.0, 0),
    row("pages touched until complete", &["touched_pages"], 1.0, 0),
    row("faults of those, %", &["fault_share"], 0.01, 2),
    row("fault p50, ms", &["fault_us", "p50"], 1e3, 1),
    row("fault p90, ms", &["fault_us", "p90"], 1e3, 1),
    row("fault p99, ms", &["fault_us", "p99"], 1e3, 1),
    row("fault max, ms", &["fault_us", "max"], 1e3, 1),
    row("ticks a second before", &["speed_before_hz"], 1.0, 1),
    row("ticks a second after", &["speed_after_hz"], 1.0, 1),
    row("packets lost by chance", &["path", "lost"], 1.0, 0),
    row(
        "packets dropped by the queue",
        &["path", "queue_full"],
        1.0,
        0,
    ),
    row(
        "the emulator's share of a CPU, %",
        &["emulator_cpu_share"],
        0.01,
        1,
    ),
];

impl Outcome {
    pub(super) fn new(setup: Setup, tcp_congestion_control: String) -> Self {
        Self {
            setup,
            own: Vec::new(),
            profiled: Vec::new(),
            pauses_us: Vec::new(),
            clones: Vec::new(),
            peers: Vec::new(),
            peer_version: String::new(),
            tcp_congestion_control,
        }
    }

    pub(super) fn add_own(&mut self, record: Record) {
        self.own.push(record);
    }

    pub(super) fn add_resumes(&mut self, resumes: Resumes) {
        self.pauses_us.push(resumes.pause_us);
        self.own.push(resumes.first);
        self.clones.extend(resumes.clones);
        self.profiled.push(resumes.profiled);
    }

    pub(super) fn add_peer(&mut self, variant: Variant, fate: Fate, version: String) {
        self.peer_version = version;
        let known = self.peers.iter().position(|peer| peer.variant == variant);
        let at = known.unwrap_or_else(|| {
            self.peers.push(Peer {
                variant,
                arrived: Vec::new(),
                lost: Vec::new(),
            });
            self.peers.len() - 1
        });
        match fate {
            Fate::Arrived(record) => self.peers[at].arrived.push(*record),
            Fate::Lost(loss) => self.peers[at].lost.push(loss),
        }
    }

    /// Everything, as one object: lazyvm's medians at the top, those of QEMU's best way under `peer`.
    pub fn json(&self) -> Value {
        let path = &self.setup.path;
        let workload = &self.setup.workload;
        let mut out = json!({
            "mode": self.setup.mode.name(),
            "guest": self.setup.guest,
            "memory_bytes": self.setup.memory_bytes,
            "fill_bytes": workload.fill_bytes,
            "hot_bytes": workload.hot_bytes,
            "cold_per_million": workload.cold_per_million,
            "rtt_ms": path.rtt.as_secs_f64() * 1e3,
            "rate_bit_s": path.rate_bit_s,
            "queue_ms": path.queue.as_secs_f64() * 1e3,
            "loss": path.loss,
            "jitter_ms": path.jitter.as_secs_f64() * 1e3,
            "reorder": path.reorder,
            "seed": path.seed,
            "blackout_at_ms": self.setup.blackout.map(|(at, _)| at.as_secs_f64() * 1e3),
            "blackout_for_ms": self.setup.blackout.map(|(_, time)| time.as_secs_f64() * 1e3),
            "runs": self.own.len(),
            "tcp_congestion_control": self.tcp_congestion_control,
        });
        merge(&mut out, medians(&self.own));
        out["single_runs"] = singles(&self.own);
        out["snapshot"] = json!(self.setup.snapshot);
        if self.setup.snapshot {
            let pauses: Vec<Value> = self.pauses_us.iter().map(|&us| json!(us)).collect();
            out["snapshot_pause_us"] = median(&pauses);
            let mut profiled = medians(&self.profiled);
            profiled["single_runs"] = singles(&self.profiled);
            out["profiled"] = profiled;
            out["clones"] = json!(self.clones);
        }
        out["peer"] = Value::Null;
        let mut peers = serde_json::Map::new();
        for peer in &self.peers {
            let mut of = peer.figures();
            of["single_runs"] = singles(&peer.arrived);
            peers.insert(peer.variant.name().to_owned(), of);
        }
        if let Some(best) = self.best_peer() {
            let mut peer = json!({
                "name": "qemu",
                "version": self.peer_version,
                "variant": best.variant.name(),
            });
            let of = best.figures();
            let own = out["freeze_ms"].as_f64();
            out["freeze_ratio"] = json!(of["freeze_ms"].as_f64().zip(own).map(|(a, b)| a / b));
            merge(&mut peer, of);
            out["peer"] = peer;
        }
        out["peers"] = peers.into();
        out
    }

    /// The one that froze the guest for the shortest time; those that lost one are behind all others.
    fn best_peer(&self) -> Option<&Peer> {
        let freeze = |peer: &Peer| peer.figures()["freeze_ms"].as_f64().unwrap_or(f64::MAX);
        self.peers.iter().min_by(|a, b| {
            let lost = a.lost.len().cmp(&b.lost.len());
            lost.then(freeze(a).total_cmp(&freeze(b)))
        })
    }

    /// Names and medians of all that were measured.
    fn columns(&self) -> Vec<(String, Value)> {
        let arrived = |name: &str, records: &[Record]| {
            let mut figures = medians(records);
            merge(&mut figures, json!({ "outcome": ARRIVED }));
            (name.to_owned(), figures)
        };
        let own = arrived("lazyvm", &self.own);
        let peers = self.peers.iter().map(|peer| {
            let mut figures = peer.figures();
            figures["outcome"] = json!(peer.in_words());
            (peer.name(), figures)
        });
        let profiled = arrived("with a profile", &self.profiled);
        let profiled = self.setup.snapshot.then_some(profiled);
        [own].into_iter().chain(profiled).chain(peers).collect()
    }

    /// The medians side by side: the first row names the columns.
    pub fn rows(&self) -> Vec<Vec<String>> {
        let columns = self.columns();
        let head = [String::new()]
            .into_iter()
            .chain(columns.iter().map(|(name, _)| name.clone()))
            .collect();
        let body = ROWS.iter().map(|row| {
            let figures = columns.iter().map(|(_, figures)| row.text(figures));
            [row.name.to_owned()].into_iter().chain(figures).collect()
        });
        [head].into_iter().chain(body).collect()
    }

    /// The medians as a table for a terminal.
    pub fn table(&self) -> String {
        let mut out = String::new();
        for row in self.rows() {
            let mut cells = row.iter();
            out += &format!("{:34}", cells.next().map_or("", String::as_str));
            for cell in cells {
                out += &format!("{cell:>24}");
            }
            out.truncate(out.trim_end().len());
            out.push('\n');
        }
        for clones in &self.clones {
            out += &format!(
                "{} clones at once: first signs {:.0} ms (median), {:.0} ms (worst); all there after {:.0} ms, {:.1} MB, {} faults\n",
                clones.first_sign_ms.len(),
                clones.median_ms(),
                clones.worst_ms(),
                clones.all_complete_ms,
                clones.bytes_wire as f64 / 1e6,
                clones.faults,
            );
        }
        if !self.peers.is_empty() {
            let name = &self.tcp_congestion_control;
            out += &format!("QEMU's TCP has the machine's congestion control: {name}\n");
        }
        for peer in &self.peers {
            for loss in &peer.lost {
                out += &format!("{}: {}: {}\n", peer.name(), loss.outcome, loss.why);
            }
        }
        out
    }

    /// A page for a browser, which needs nothing else.
    pub fn page(&self) -> String {
        let charts = chart::all(&self.series());
        let tcp = &self.tcp_congestion_control;
        page::page(&self.setup, tcp, &self.rows(), &charts, &self.json())
    }

    /// Its pictures over time alone, for a document.
    pub fn svg(&self) -> String {
        let text = page::description(&self.setup, &self.tcp_congestion_control);
        timeline(&text, &self.series())
    }

    /// Of each mover the move that is shown.
    fn series(&self) -> Vec<(String, &Record)> {
        let mut series = Vec::new();
        series.extend(typical(&self.own).map(|record| ("lazyvm".to_owned(), record)));
        series.extend(typical(&self.profiled).map(|record| ("with a profile".to_owned(), record)));
        series.extend(
            self.peers
                .iter()
                .filter_map(|peer| Some((peer.name(), typical(&peer.arrived)?))),
        );
        series
    }
}

impl Peer {
    fn name(&self) -> String {
        format!("QEMU {}", self.variant.name())
    }

    /// How its moves ended, for a table.
    fn in_words(&self) -> String {
        let runs = self.lost.len() + self.arrived.len();
        match (&self.lost[..], runs) {
            ([], _) => ARRIVED.to_owned(),
            ([loss, ..], 1) => loss.outcome.to_owned(),
            ([loss, ..], _) => format!("{}, {} of {runs}", loss.outcome, self.lost.len()),
        }
    }

    /// Medians of the moves that went well, and what became of the others.
    fn figures(&self) -> Value {
        let outcome = self.lost.first().map_or(ARRIVED, |loss| loss.outcome);
        let mut figures = json!({ "outcome": outcome, "lost": self.lost });
        merge(&mut figures, medians(&self.arrived));
        figures
    }
}

impl Row {
    fn text(&self, figures: &Value) -> String {
        let value = self.path.iter().fold(figures, |value, key| &value[*key]);
        match (value.as_f64(), value.as_str()) {
            (Some(number), _) => format!("{:.*}", self.decimals, number / self.unit),
            (None, Some(text)) => text.to_owned(),
            (None, None) => "-".to_owned(),
        }
    }
}

/// The record whose freeze is the median.
fn typical(records: &[Record]) -> Option<&Record> {
    let mut sorted: Vec<&Record> = records.iter().collect();
    sorted.sort_by(|a, b| a.figures.freeze_ms.total_cmp(&b.figures.freeze_ms));
    sorted.get(sorted.len() / 2).copied()
}

fn figures(records: &[Record]) -> Vec<Value> {
    // Plain numbers and text, which always serialize.
    records
        .iter()
        .filter_map(|record| serde_json::to_value(&record.figures).ok())
        .collect()
}

fn medians(records: &[Record]) -> Value {
    median(&figures(records))
}

fn singles(records: &[Record]) -> Value {
    Value::Array(figures(records))
}

fn merge(into: &mut Value, from: Value) {
    if let (Value::Object(into), Value::Object(from)) = (into, from) {
        into.extend(from);
    }
}
