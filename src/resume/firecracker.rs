//! `lazyvm resume --firecracker`: the VM runs in a Firecracker that is the user's, and goes on there when this command
//! has ended.

use std::path::Path;

use anyhow::Context;
use lazyvm_pager::Options;
use lazyvm_vmm_glue::firecracker::api::Api;
use lazyvm_vmm_glue::firecracker::destination::Destination;

use super::machine::{Cancel, Cancellable};
use super::{ResumeArgs, conclude, fill, take_over, wait_for_start};
use crate::events::Events;
use crate::exit::Exit;
use crate::metrics::StatusPage;
use crate::signals::Signals;
use crate::ticket;

/// Takes the VM over into the Firecracker at `api`.
pub fn resume(args: &ResumeArgs, api: &Path) -> anyhow::Result<Exit> {
    let signals = Signals::hold().context("can't handle signals")?;
    let ticket = ticket::read(&args.ticket)?;
    let page = args.status_addr.map(StatusPage::serve).transpose()?;
    let destination = Destination::new(Api::at(api));
    let life = destination.life();
    let events = Events::of(signals)?;
    let cancel = Cancel::default();
    let mut taking = Cancellable::new(destination, cancel.clone());
    let options = Options {
        verify: args.verify,
        removals: true,
    };
    take_over(ticket, options, events.sender(), move |offer| {
        let result = offer.and_then(|offer| lazyvm_pager::resume_late(offer, &mut taking));
        (result, taking.exit())
    })?;
    let filling = wait_for_start(&events, &cancel)?;
    tracing::info!(api = %api.display(), "the VM runs in Firecracker; its memory arrives");
    let report = fill(args, filling, &events, page.as_ref(), || {
        life.has_ended().then(|| "Firecracker ended".to_owned())
    })?;
    conclude(args, &report)
}
