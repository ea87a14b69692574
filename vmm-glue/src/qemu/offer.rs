//! What a destination compares before the source is paused: what has to be the same in both QEMUs' commands.

use lazyvm_wire::MachineOffer;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::qmp::{Qmp, QmpError, text};

/// The kind in the [`MachineOffer`].
pub const KIND: &str = "qemu";

/// Version of the state: QEMU's migration stream with `x-ignore-shared`, whose own version is in it.
const STATE_VERSION: u32 = 1;

/// A QEMU that can't take the VM.
#[derive(Debug, thiserror::Error)]
pub enum OfferError {
    /// The conversation.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// Another hypervisor's.
    #[error("the VM is one of {0}, not of QEMU; take it with that kind's own flag")]
    Kind(String),
    /// From another lazyvm.
    #[error(
        "the VM's state is of version {0}, which this lazyvm does not know; use the same release on both sides"
    )]
    Version(u32),
    /// What can't be read.
    #[error("what the source says about its QEMU can't be read")]
    Malformed(#[source] serde_json::Error),
    /// A difference.
    #[error(
        "{what} is {there} at the source and {here} in this QEMU; start it with the source's arguments"
    )]
    Differs {
        /// Of what.
        what: &'static str,
        /// The source's.
        there: String,
        /// This side's.
        here: String,
    },
}

/// What both QEMUs have in common.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The version, for people: what makes states differ is the machine type.
    pub version: String,
    /// Emulated architecture.
    pub target: String,
    /// Machine type with its version.
    pub machine: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// vCPUs.
    pub cpus: usize,
    /// CPU model.
    pub cpu: String,
    /// The features that the guest was told of, where QEMU tells.
    pub features: String,
}

impl Offer {
    /// Of a running QEMU.
    pub(super) fn of(qmp: &mut Qmp) -> Result<Self, QmpError> {
        let target = qmp.run("query-target", json!({}))?;
        let kvm = qmp.run("query-kvm", json!({}))?;
        let kvm = kvm.get("enabled").and_then(Value::as_bool) == Some(true);
        let cpus = qmp.run("query-cpus-fast", json!({}))?;
        let cpus = cpus.as_array().map(Vec::as_slice).unwrap_or_default();
        let first = cpus.first().and_then(|cpu| cpu.get("qom-path"));
        let first = first.and_then(Value::as_str).unwrap_or("/machine");
        let mut property = |path: &str, property: &str| {
            qmp.run("qom-get", json!({ "path": path, "property": property }))
        };
        let machine = property("/machine", "type")?;
        let cpu = property(first, "type")?;
        // x86 alone has them.
        let features = property(first, "feature-words").ok();
        Ok(Self {
            target: text(&target, "query-target", "arch")?,
            machine: machine.as_str().unwrap_or_default().to_owned(),
            accelerator: if kvm { "kvm" } else { "tcg" }.to_owned(),
            cpus: cpus.len(),
            cpu: cpu.as_str().unwrap_or_default().to_owned(),
            features: features.map(|words| words.to_string()).unwrap_or_default(),
            version: qmp.version().to_owned(),
        })
    }

    /// For the wire.
    pub fn encode(&self) -> MachineOffer {
        MachineOffer {
            kind: KIND.to_owned(),
            state_version: STATE_VERSION,
            // A struct of texts and numbers always can.
            compatibility: serde_json::to_vec(self).unwrap_or_default(),
        }
    }

    /// From the wire.
    ///
    /// # Errors
    /// It is another hypervisor's, or can't be read.
    pub fn decode(offer: &MachineOffer) -> Result<Self, OfferError> {
        if offer.kind != KIND {
            return Err(OfferError::Kind(offer.kind.clone()));
        }
        if offer.state_version != STATE_VERSION {
            return Err(OfferError::Version(offer.state_version));
        }
        serde_json::from_slice(&offer.compatibility).map_err(OfferError::Malformed)
    }

    /// Whether a QEMU like `here` can take the VM of one like this.
    ///
    /// # Errors
    /// [`OfferError::Differs`] names the first difference.
    pub fn check(&self, here: &Self) -> Result<(), OfferError> {
        let rows = [
            ("the architecture", &self.target, &here.target),
            ("the machine type (-machine)", &self.machine, &here.machine),
            (
                "the accelerator (-accel)",
                &self.accelerator,
                &here.accelerator,
            ),
            ("the CPU model (-cpu)", &self.cpu, &here.cpu),
            (
                "the number of vCPUs (-smp)",
                &self.cpus.to_string(),
                &here.cpus.to_string(),
            ),
            (
                "what the CPUs can do (-cpu, or another host)",
                &self.features,
                &here.features,
            ),
        ];
        for (what, there, here) in rows {
            if there != here {
                return Err(OfferError::Differs {
                    what,
                    there: there.clone(),
                    here: here.clone(),
                });
            }
        }
        if self.version != here.version {
            tracing::info!(
                source = self.version,
                here = here.version,
                "the QEMUs are of different versions"
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer() -> Offer {
        Offer {
            version: "7.2.0".to_owned(),
            target: "x86_64".to_owned(),
            machine: "pc-i440fx-7.2-machine".to_owned(),
            accelerator: "tcg".to_owned(),
            cpus: 4,
            cpu: "qemu64-x86_64-cpu".to_owned(),
            features: String::new(),
        }
    }

    #[test]
    fn differences_are_named_and_other_versions_are_none() {
        let there = Offer::decode(&offer().encode()).unwrap();
        assert_eq!(there, offer());
        let mut here = offer();
        here.version = "9.0.0".to_owned();
        there.check(&here).unwrap();
        here.cpus = 2;
        let error = there.check(&here).unwrap_err().to_string();
        assert!(
            error.contains("-smp") && error.contains("is 4 at the source and 2"),
            "{error}"
        );
    }

    #[test]
    fn what_is_not_qemus_is_refused() {
        let mut foreign = offer().encode();
        foreign.kind = "kvm".to_owned();
        assert!(matches!(Offer::decode(&foreign), Err(OfferError::Kind(_))));
        let mut newer = offer().encode();
        newer.state_version = 2;
        assert!(matches!(Offer::decode(&newer), Err(OfferError::Version(2))));
        let mut broken = offer().encode();
        broken.compatibility.truncate(9);
        assert!(matches!(
            Offer::decode(&broken),
            Err(OfferError::Malformed(_))
        ));
    }
}
