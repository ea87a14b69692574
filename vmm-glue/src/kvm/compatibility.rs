//! Whether a machine of that host can run on this one, decided before it is paused there.

use kvm_bindings::kvm_cpuid_entry2;
use lazyvm_wire::{COMPATIBILITY_MAX, MachineOffer};
use serde::{Deserialize, Serialize};

use super::cpuid;
use super::state::STATE_VERSION;

/// [`MachineOffer::kind`] of this monitor's machines.
pub const KIND: &str = "kvm";

/// Clock rates further apart than this, in parts per million, count as different. KVM's own default
/// (`tsc_tolerance_ppm`).
const TSC_TOLERANCE_PPM: u64 = 250;

/// What a machine needs of the host it runs on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Compatibility {
    /// vCPUs.
    pub(super) cpus: u32,
    /// The rate of the guest's TSC, in kHz.
    pub(super) tsc_khz: u32,
    /// The length of the extended state, in bytes.
    pub(super) xsave_bytes: u32,
    /// The guest's CPUID, but for what differs from vCPU to vCPU.
    pub(super) cpuid: Vec<kvm_cpuid_entry2>,
}

/// What the host can do beyond what is compared with [`Compatibility`] directly.
#[derive(Clone, Debug)]
pub(super) struct Host {
    /// What a machine made here would need: what this host has.
    pub(super) has: Compatibility,
    /// Whether KVM can make the guest's TSC run at another rate than the host's.
    pub(super) scales_tsc: bool,
    /// The most vCPUs of a machine.
    pub(super) cpus_max: u32,
}

/// A machine that cannot run here.
#[derive(Debug, thiserror::Error)]
pub enum CompatibilityError {
    /// Of another hypervisor.
    #[error("the machine is one of {found:?}, and this monitor takes {KIND:?} only")]
    Kind {
        /// Whose it is.
        found: String,
    },
    /// Of another version of this monitor's format.
    #[error(
        "the machine's state has format version {found}, and this lazyvm reads version {STATE_VERSION}; \
         use the same lazyvm at both ends"
    )]
    Version {
        /// Its version.
        found: u32,
    },
    /// Not what this monitor writes.
    #[error("the description of the machine's needs is damaged")]
    Damaged(#[source] postcard::Error),
    /// More vCPUs than this host's KVM gives a machine, or none.
    #[error("the machine has {needed} vCPUs, and KVM gives a machine at most {most} here")]
    Cpus {
        /// How many it has.
        needed: u32,
        /// How many it may have here.
        most: u32,
    },
    /// Of another CPU model.
    #[error(
        "the machine runs on a {theirs}, and this host is a {ours}; both must be of the same family and model"
    )]
    Model {
        /// The source's CPU.
        theirs: String,
        /// This host's.
        ours: String,
    },
    /// The guest was shown CPU features that this host lacks.
    #[error("this host's CPU or kernel lacks what the guest was told it may use: {}", missing.join(", "))]
    Features {
        /// What is lacking, in words.
        missing: Vec<String>,
    },
    /// The guest's page tables may use address bits that are reserved here.
    #[error("the machine uses physical addresses of {needed} bits, and this host's CPU has {has}")]
    PhysicalBits {
        /// What the guest was told.
        needed: u32,
        /// What this host has.
        has: u32,
    },
    /// Another length of the extended state.
    #[error("the machine's extended CPU state is {needed} bytes long, and {has} on this host")]
    ExtendedState {
        /// The machine's.
        needed: u32,
        /// This host's.
        has: u32,
    },
    /// The clock would run at another rate.
    #[error(
        "the machine's TSC runs at {needed} kHz, this host's at {has} kHz, and its KVM cannot scale it"
    )]
    TscRate {
        /// The machine's.
        needed: u32,
        /// This host's.
        has: u32,
    },
}

impl Compatibility {
    /// As it goes to the destination before the pause.
    pub(super) fn offer(&self) -> Result<MachineOffer, postcard::Error> {
        let compatibility = postcard::to_allocvec(self)?;
        debug_assert!(
            compatibility.len() <= COMPATIBILITY_MAX,
            "256 CPUID entries take 10 KiB"
        );
        Ok(MachineOffer {
            kind: KIND.to_owned(),
            state_version: STATE_VERSION,
            compatibility,
        })
    }

    /// Reads an offer, whatever it holds.
    pub(super) fn read(offer: &MachineOffer) -> Result<Self, CompatibilityError> {
        if offer.kind != KIND {
            return Err(CompatibilityError::Kind {
                found: offer.kind.clone(),
            });
        }
        if offer.state_version != STATE_VERSION {
            return Err(CompatibilityError::Version {
                found: offer.state_version,
            });
        }
        if offer.compatibility.len() > COMPATIBILITY_MAX {
            return Err(CompatibilityError::Damaged(
                postcard::Error::DeserializeBadEncoding,
            ));
        }
        let (needs, rest) =
            postcard::take_from_bytes(&offer.compatibility).map_err(CompatibilityError::Damaged)?;
        if !rest.is_empty() {
            return Err(CompatibilityError::Damaged(
                postcard::Error::DeserializeBadEncoding,
            ));
        }
        Ok(needs)
    }

    /// Whether a machine with these needs can run on `host`.
    ///
    /// Family and model must be the same, the features at least the machine's. The stepping may differ: it changes
    /// errata, not what the guest may use.
    pub(super) fn check(&self, host: &Host) -> Result<(), CompatibilityError> {
        if self.cpus == 0 || self.cpus > host.cpus_max {
            return Err(CompatibilityError::Cpus {
                needed: self.cpus,
                most: host.cpus_max,
            });
        }
        let (theirs, ours) = (cpuid::model(&self.cpuid), cpuid::model(&host.has.cpuid));
        if (&theirs.vendor, theirs.family, theirs.model) != (&ours.vendor, ours.family, ours.model)
        {
            return Err(CompatibilityError::Model {
                theirs: theirs.to_string(),
                ours: ours.to_string(),
            });
        }
        let missing = missing_features(&self.cpuid, &host.has.cpuid);
        if !missing.is_empty() {
            return Err(CompatibilityError::Features { missing });
        }
        let (needed, has) = (
            cpuid::physical_bits(&self.cpuid),
            cpuid::physical_bits(&host.has.cpuid),
        );
        if needed > has {
            return Err(CompatibilityError::PhysicalBits { needed, has });
        }
        if self.xsave_bytes != host.has.xsave_bytes {
            return Err(CompatibilityError::ExtendedState {
                needed: self.xsave_bytes,
                has: host.has.xsave_bytes,
            });
        }
        let (needed, has) = (self.tsc_khz, host.has.tsc_khz);
        let apart_ppm = u64::from(needed.abs_diff(has)) * 1_000_000 / u64::from(has.max(1));
        if apart_ppm > TSC_TOLERANCE_PPM && !host.scales_tsc {
            return Err(CompatibilityError::TscRate { needed, has });
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Where CPUID holds one feature a bit, each of which the guest may have come to rely on.
const FEATURE_REGISTERS: &[(u32, u32, Register)] = &[
    (0x1, 0, Register::Ecx),
    (0x1, 0, Register::Edx),
    (0x7, 0, Register::Ebx),
    (0x7, 0, Register::Ecx),
    (0x7, 0, Register::Edx),
    (0x7, 1, Register::Eax),
    (0x7, 1, Register::Edx),
    (0xd, 0, Register::Eax),
    (0xd, 0, Register::Edx),
    (0xd, 1, Register::Eax),
    (0x4000_0001, 0, Register::Eax),
    (0x8000_0001, 0, Register::Ecx),
    (0x8000_0001, 0, Register::Edx),
    (0x8000_0008, 0, Register::Ebx),
    (0x8000_0021, 0, Register::Eax),
];

/// The features that are most often missing, by the names of `/proc/cpuinfo`.
const FEATURE_NAMES: &[(u32, u32, Register, u32, &str)] = &[
    (0x1, 0, Register::Ecx, 12, "fma"),
    (0x1, 0, Register::Ecx, 21, "x2apic"),
    (0x1, 0, Register::Ecx, 24, "tsc_deadline_timer"),
    (0x1, 0, Register::Ecx, 25, "aes"),
    (0x1, 0, Register::Ecx, 28, "avx"),
    (0x7, 0, Register::Ebx, 3, "bmi1"),
    (0x7, 0, Register::Ebx, 4, "hle"),
    (0x7, 0, Register::Ebx, 5, "avx2"),
    (0x7, 0, Register::Ebx, 8, "bmi2"),
    (0x7, 0, Register::Ebx, 11, "rtm"),
    (0x7, 0, Register::Ebx, 16, "avx512f"),
    (0x7, 0, Register::Ebx, 29, "sha_ni"),
    (0x7, 0, Register::Ecx, 16, "la57"),
    (0x8000_0001, 0, Register::Edx, 26, "pdpe1gb"),
    (0x8000_0001, 0, Register::Edx, 27, "rdtscp"),
];

fn missing_features(needed: &[kvm_cpuid_entry2], has: &[kvm_cpuid_entry2]) -> Vec<String> {
    let mut missing = Vec::new();
    for &(function, index, register) in FEATURE_REGISTERS {
        let bits = |entries| cpuid::leaf(entries, function, index).map_or(0, |e| get(e, register));
        let lacking = bits(needed) & !bits(has);
        missing.extend(
            (0..32)
                .filter(|bit| lacking & (1 << bit) != 0)
                .map(|bit| feature_name(function, index, register, bit)),
        );
    }
    missing
}

fn feature_name(function: u32, index: u32, register: Register, bit: u32) -> String {
    let named = FEATURE_NAMES
        .iter()
        .find(|(f, i, r, b, _)| (*f, *i, *r as u8, *b) == (function, index, register as u8, bit));
    let register = match register {
        Register::Eax => "eax",
        Register::Ebx => "ebx",
        Register::Ecx => "ecx",
        Register::Edx => "edx",
    };
    match named {
        Some((.., name)) => (*name).to_owned(),
        None => format!("CPUID leaf {function:#x}.{index} {register} bit {bit}"),
    }
}

fn get(entry: &kvm_cpuid_entry2, register: Register) -> u32 {
    match register {
        Register::Eax => entry.eax,
        Register::Ebx => entry.ebx,
        Register::Ecx => entry.ecx,
        Register::Edx => entry.edx,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn host() -> Host {
        Host {
            has: Compatibility {
                cpus: 1,
                tsc_khz: 2_600_000,
                xsave_bytes: 4096,
                cpuid: vec![
                    entry(0, [0x24, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
                    entry(1, [0x000a_0671, 0, 0x8120_2000, 0x0f8b_fbff]),
                    entry(7, [0, 1 << 5, 0, 0]),
                    entry(0x8000_0008, [0x3930, 0, 0, 0]),
                ],
            },
            scales_tsc: false,
            cpus_max: 4,
        }
    }

    #[test]
    fn a_machine_of_the_same_host_is_taken_and_survives_the_wire() {
        let needs = host().has;
        let read = Compatibility::read(&needs.offer().unwrap()).unwrap();
        assert_eq!(read, needs);
        read.check(&host()).unwrap();
    }

    #[test]
    fn each_refusal_says_what_differs() {
        let refusal = |change: fn(&mut Compatibility)| {
            let mut needs = host().has;
            change(&mut needs);
            needs.check(&host()).unwrap_err().to_string()
        };
        let words = refusal(|needs| needs.cpuid[1].eax = 0x000a_0661);
        assert!(
            words.contains("model 166") && words.contains("model 167"),
            "{words}"
        );
        let words = refusal(|needs| needs.cpuid[2].ebx |= (1 << 16) | (1 << 6));
        assert!(
            words.contains("avx512f") && words.contains("leaf 0x7.0 ebx bit 6"),
            "{words}"
        );
        let words = refusal(|needs| needs.cpuid[3].eax = 0x3934);
        assert!(
            words.contains("52 bits") && words.contains("has 48"),
            "{words}"
        );
        let words = refusal(|needs| needs.tsc_khz = 2_500_000);
        assert!(words.contains("2500000 kHz"), "{words}");
        let words = refusal(|needs| needs.xsave_bytes = 11_000);
        assert!(words.contains("11000"), "{words}");
        let words = refusal(|needs| needs.cpus = 5);
        assert!(words.contains("5 vCPUs"), "{words}");
    }

    #[test]
    fn a_clock_within_the_tolerance_or_a_kernel_that_scales_it_is_taken() {
        let mut needs = host().has;
        needs.tsc_khz += 500;
        needs.check(&host()).unwrap();
        needs.tsc_khz = 3_000_000;
        needs
            .check(&Host {
                scales_tsc: true,
                ..host()
            })
            .unwrap();
    }

    #[test]
    fn offers_of_others_and_damaged_ones_are_refused() {
        let offer = host().has.offer().unwrap();
        let of = |change: fn(&mut MachineOffer)| {
            let mut offer = offer.clone();
            change(&mut offer);
            Compatibility::read(&offer).unwrap_err()
        };
        assert!(matches!(
            of(|o| o.kind = "qemu".into()),
            CompatibilityError::Kind { .. }
        ));
        assert!(matches!(
            of(|o| o.state_version += 1),
            CompatibilityError::Version { .. }
        ));
        assert!(matches!(
            of(|o| o.compatibility.push(0)),
            CompatibilityError::Damaged(_)
        ));
        for length in 0..offer.compatibility.len() {
            let mut cut = offer.clone();
            cut.compatibility.truncate(length);
            assert!(matches!(
                Compatibility::read(&cut),
                Err(CompatibilityError::Damaged(_))
            ));
        }
    }
}
