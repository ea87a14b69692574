//! `lazyvm bench sim`.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use clap::builder::PossibleValuesParser;
use lazyvm_benches::sim::{Link, Outcome, Policy, Replay};
use lazyvm_server::trace::Trace;

use super::write;
use crate::exit::Exit;
use crate::units;

/// Flags of `bench sim`.
#[derive(Args)]
pub struct SimArgs {
    /// A recorded trace
    #[arg(long, value_name = "FILE")]
    trace: PathBuf,
    /// What is pushed first; may be repeated [default: all]
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(Policy::ALL.map(|policy| policy.name)))]
    policy: Vec<String>,
    /// Round-trip time
    #[arg(long, value_name = "TIME", default_value = "100ms", value_parser = units::duration)]
    rtt: Duration,
    /// Rate
    #[arg(long, value_name = "RATE", default_value = "1gbit", value_parser = units::rate)]
    rate: u64,
    /// Write the figures as JSON to FILE; - is standard output
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Replays a trace.
pub fn sim(args: &SimArgs) -> anyhow::Result<Exit> {
    let shown = args.trace.display();
    let bytes = std::fs::read(&args.trace).with_context(|| format!("can't read {shown}"))?;
    let trace = Trace::decode(&bytes).with_context(|| format!("can't read {shown}"))?;
    let replay = Replay::new(trace).with_context(|| format!("can't replay {shown}"))?;
    let link = Link {
        rtt_ns: u64::try_from(args.rtt.as_nanos()).unwrap_or(u64::MAX / 4),
        rate_bit_s: args.rate.max(1),
    };
    let wanted = |policy: &Policy| {
        args.policy.is_empty() || args.policy.iter().any(|name| name == policy.name)
    };
    let policies = Policy::ALL.into_iter().filter(wanted);
    let outcomes: Vec<_> = policies.map(|policy| replay.run(policy, link)).collect();
    let json = format!("{:#}\n", serde_json::to_value(&outcomes)?);
    match &args.json {
        Some(path) if path.as_os_str() == "-" => {
            std::io::stdout().write_all(json.as_bytes())?;
            return Ok(Exit::Done);
        }
        Some(path) => write(path, &json)?,
        None => {}
    }
    let cost = format!(
        "When it was recorded, a fault cost {} µs.\n",
        replay.fault_cost_us()
    );
    std::io::stdout().write_all((table(&outcomes) + &cost).as_bytes())?;
    Ok(Exit::Done)
}

fn table(outcomes: &[Outcome]) -> String {
    let mut text = format!(
        "{:19} {:>9} {:>9} {:>9} {:>9} {:>7} {:>9} {:>8} {:>9}\n",
        "policy", "freeze", "first", "recovered", "total", "stalls", "full RTT", "share", "limit"
    );
    for outcome in outcomes {
        text += &format!(
            "{:19} {:6.0} ms {:6.0} ms {:6.0} ms {:6.0} ms {:>7} {:>9} {:7.2}% {:6.0} ms\n",
            outcome.policy,
            outcome.freeze_ms,
            outcome.first_sign_ms,
            outcome.recovered_ms,
            outcome.total_ms,
            outcome.stalls,
            outcome.full_stalls,
            outcome.full_share() * 100.0,
            outcome.limit_ms,
        );
    }
    text
}
