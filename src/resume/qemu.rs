//! `lazyvm resume --qemu`: the VM goes to a QEMU that is started for it, and stays there when this command ends.

use std::time::Duration;

use lazyvm_pager::Options;
use lazyvm_vmm_glue::qemu::{Command, Destination, Running};
use lazyvm_wire::Ticket;

use super::machine::{Cancel, Cancellable};
use super::{ResumeArgs, conclude, fill, take_over, wait_for_start};
use crate::events::{Event, Events};
use crate::exit::{Exit, Problem};
use crate::metrics::StatusPage;
use crate::signals::Signals;

/// How often a QEMU is looked after that this command stays for.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Starts QEMU, takes the VM over and lets it run there.
pub fn resume(
    args: &ResumeArgs,
    command: Command,
    ticket: Ticket,
    signals: Signals,
    page: Option<&StatusPage>,
) -> anyhow::Result<Exit> {
    let destination = Destination::new(command, args.install.into());
    let running = destination.running();
    // What is wrong with its command comes to light again when it is needed, and is told to the source then.
    let _ahead = destination
        .start_ahead()
        .inspect_err(|error| tracing::debug!(%error, "QEMU is not started ahead"));
    let events = Events::of(signals)?;
    let cancel = Cancel::default();
    let mut taking = Cancellable::new(destination, cancel.clone());
    let options = Options {
        verify: args.verify,
        // QEMU's balloon gives pages back; the descriptor that it opens says so.
        removals: true,
    };
    take_over(ticket, options, events.sender(), move |offer| {
        let result = offer.and_then(|offer| lazyvm_pager::resume(offer, &mut taking));
        (result, taking.exit())
    })?;
    let filling = wait_for_start(&events, &cancel)?;
    tracing::info!(
        pid = running.pid(),
        "the VM runs in QEMU here; its memory arrives"
    );
    let report = fill(args, filling, &events, page, || how_it_ended(&running))?;
    let verified = conclude(args, &report);
    if args.stay {
        stay(&running, &events).and(verified)
    } else {
        verified
    }
}

fn how_it_ended(running: &Running) -> Option<String> {
    Some(match running.ended()? {
        Some(status) => format!("QEMU ended ({status})"),
        None => "QEMU ended".to_owned(),
    })
}

/// Waits until QEMU ends. A signal ends this command alone.
fn stay<T: Send + 'static>(running: &Running, events: &Events<T>) -> anyhow::Result<Exit> {
    loop {
        match running.ended() {
            Some(Some(status)) if !status.success() => {
                return Err(Problem::new(Exit::Failed, format!("QEMU ended ({status})")).into());
            }
            Some(_) => return Ok(Exit::Done),
            None => {}
        }
        if let Some(Event::Signal(signal)) = events.next_within(LOOK_EVERY) {
            tracing::info!(%signal, "this command ends; the VM runs on in QEMU");
            return Ok(Exit::Done);
        }
    }
}
