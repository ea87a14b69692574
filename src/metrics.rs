//! `--status-addr`: metrics in Prometheus' text format, on loopback only.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::Context;
use lazyvm_pager::{Progress, Report};
use metrics::{counter, gauge};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

use crate::exit::{Exit, Problem};

/// Longest request that is read, in bytes.
const REQUEST_MAX: u64 = 8 * 1024;

/// Time for a client to ask and to take the answer. One is answered after another.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(2);

/// The metrics of one move.
pub struct StatusPage {
    recorder: PrometheusRecorder,
}

impl StatusPage {
    /// Serves `/metrics` at `address` for as long as the process lives.
    pub fn serve(address: SocketAddr) -> anyhow::Result<Self> {
        if !address.ip().is_loopback() {
            let text = format!(
                "--status-addr {address} is not a loopback address; use 127.0.0.1:PORT, since anybody may read it"
            );
            return Err(Problem::new(Exit::Usage, text).into());
        }
        let listener = TcpListener::bind(address).map_err(|error| {
            Problem::new(
                Exit::Environment,
                format!("can't serve metrics at {address}: {error}; choose another port"),
            )
        })?;
        let bound = listener.local_addr().context("can't serve metrics")?;
        tracing::info!(url = %format!("http://{bound}/metrics"), "metrics");
        let recorder = PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        std::thread::Builder::new()
            .name("metrics".to_owned())
            .spawn(move || answer_all(&listener, &handle))
            .context("can't serve metrics")?;
        Ok(Self { recorder })
    }

    /// Shows these figures from now on.
    pub fn show(&self, progress: &Progress, report: &Report) {
        metrics::with_local_recorder(&self.recorder, || {
            gauge!("lazyvm_memory_bytes").set(report.memory_bytes as f64);
            gauge!("lazyvm_pages").set(progress.pages_total as f64);
            gauge!("lazyvm_pages_here").set(progress.pages_here as f64);
            gauge!("lazyvm_pages_unreadable").set(progress.pages_unreadable as f64);
            gauge!("lazyvm_complete").set(if progress.done { 1.0 } else { 0.0 });
            gauge!("lazyvm_downtime_seconds").set(report.downtime_us as f64 / 1e6);
            counter!("lazyvm_pages_demand_total").absolute(progress.pages_demand);
            counter!("lazyvm_pages_pushed_total").absolute(progress.pages_pushed);
            counter!("lazyvm_faults_total").absolute(progress.faults);
            counter!("lazyvm_reconnects_total").absolute(report.reconnects);
            counter!("lazyvm_wire_bytes_total").absolute(report.bytes_wire);
            gauge!("lazyvm_blocktime_seconds").set(report.blocktime_us_total as f64 / 1e6);
            let quantiles = [
                ("0.5", report.fault_us.p50),
                ("0.9", report.fault_us.p90),
                ("0.99", report.fault_us.p99),
                ("1", report.fault_us.max),
            ];
            for (quantile, us) in quantiles {
                gauge!("lazyvm_fault_seconds", "quantile" => quantile).set(us as f64 / 1e6);
            }
        });
    }
}

fn answer_all(listener: &TcpListener, handle: &PrometheusHandle) {
    for client in listener.incoming() {
        if let Err(error) = client.and_then(|client| answer(client, handle)) {
            tracing::debug!(%error, "metrics");
        }
    }
}

fn answer(mut client: TcpStream, handle: &PrometheusHandle) -> io::Result<()> {
    client.set_read_timeout(Some(CLIENT_TIMEOUT))?;
    client.set_write_timeout(Some(CLIENT_TIMEOUT))?;
    let mut request = BufReader::new(client.try_clone()?).take(REQUEST_MAX);
    let mut first = String::new();
    request.read_line(&mut first)?;
    // The rest up to the empty line, so that closing does not cut the answer off.
    for line in request.lines() {
        if line?.is_empty() {
            break;
        }
    }
    let (status, body) = if first.starts_with("GET /metrics ") {
        ("200 OK", handle.render())
    } else {
        ("404 Not Found", "see /metrics\n".to_owned())
    };
    write!(
        client,
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}
