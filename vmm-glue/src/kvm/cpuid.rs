//! The CPUID that the guest sees: what KVM supports on this host, made true for each vCPU.
//!
//! Leaves and bits: Intel SDM volume 2A, `CPUID`; AMD APM volume 3, appendix E; for 0x4000_0001, the kernel's
//! `Documentation/virt/kvm/x86/cpuid.rst`.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use vmm_sys_util::errno;

const LEAF_VENDOR: u32 = 0;
const LEAF_FEATURES: u32 = 1;
const LEAF_CACHES: u32 = 4;
const LEAF_PERFMON: u32 = 0xa;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_EXTENDED_FEATURES: u32 = 0x8000_0001;
const LEAF_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

const FEATURE_ECX_VMX: u32 = 1 << 5;
const FEATURE_ECX_TSC_DEADLINE: u32 = 1 << 24;
/// Shows a bit of the vCPU's CR4; KVM keeps it up to date.
const FEATURE_ECX_OSXSAVE: u32 = 1 << 27;
const FEATURE_ECX_HYPERVISOR: u32 = 1 << 31;
const FEATURE_EDX_HTT: u32 = 1 << 28;
const EXTENDED_ECX_SVM: u32 = 1 << 2;
const EXTENDED_EDX_PAGES_1G: u32 = 1 << 26;

/// The CPUID of a machine of `cpus` vCPUs on this host, but for what differs from vCPU to vCPU (see [`for_vcpu`]).
///
/// Nested virtualisation and the performance counters are left out: their state is not moved.
pub(super) fn for_machine(kvm: &Kvm, cpus: u32) -> Result<Vec<kvm_cpuid_entry2>, errno::Error> {
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    Ok(normalise(supported.as_slice(), cpus, tsc_deadline))
}

fn normalise(
    supported: &[kvm_cpuid_entry2],
    cpus: u32,
    tsc_deadline: bool,
) -> Vec<kvm_cpuid_entry2> {
    let mut entries = supported.to_vec();
    // The host's own topology, in as many subleaves as it has levels, gives way to one level of cores.
    entries.retain(|entry| {
        !matches!(entry.function, LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2) || entry.index < 2
    });
    for entry in &mut entries {
        match entry.function {
            LEAF_FEATURES => {
                entry.ebx = (entry.ebx & 0x0000_ff00) | (cpus.min(0xff) << 16);
                entry.ecx &= !(FEATURE_ECX_VMX | FEATURE_ECX_OSXSAVE | FEATURE_ECX_TSC_DEADLINE);
                entry.ecx |= FEATURE_ECX_HYPERVISOR;
                if tsc_deadline {
                    entry.ecx |= FEATURE_ECX_TSC_DEADLINE;
                }
                entry.edx &= !FEATURE_EDX_HTT;
                if cpus > 1 {
                    entry.edx |= FEATURE_EDX_HTT;
                }
            }
            LEAF_CACHES if entry.eax & 0x1f != 0 => share_caches(entry, cpus),
            LEAF_PERFMON => clear(entry),
            LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 => flatten_topology(entry, cpus),
            LEAF_EXTENDED_FEATURES => entry.ecx &= !EXTENDED_ECX_SVM,
            LEAF_SIZES => {
                // Cores, less one, and the bits of the local APIC number that tell them apart (AMD).
                entry.ecx = (entry.ecx & !0xf0ff) | (core_bits(cpus) << 12) | (cpus - 1).min(0xff);
            }
            _ => {}
        }
    }
    entries
}

/// The same for the vCPU whose local APIC number is `id`.
pub(super) fn for_vcpu(machine: &[kvm_cpuid_entry2], id: u32) -> Vec<kvm_cpuid_entry2> {
    let mut entries = machine.to_vec();
    for entry in &mut entries {
        match entry.function {
            LEAF_FEATURES => entry.ebx |= id << 24,
            LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 => entry.edx = id,
            LEAF_AMD_TOPOLOGY => {
                entry.eax = id;
                // One thread in each core; the core is the vCPU.
                entry.ebx = id & 0xff;
            }
            _ => {}
        }
    }
    entries
}

/// As KVM takes it. `None` for more entries than KVM takes.
pub(super) fn to_kvm(entries: &[kvm_cpuid_entry2]) -> Option<CpuId> {
    CpuId::from_entries(entries).ok()
}

/// Whether the guest may use pages of 1 GiB.
pub(super) fn has_pages_1g(entries: &[kvm_cpuid_entry2]) -> bool {
    leaf(entries, LEAF_EXTENDED_FEATURES, 0)
        .is_some_and(|entry| entry.edx & EXTENDED_EDX_PAGES_1G != 0)
}

/// Bits of a guest-physical address.
pub(super) fn physical_bits(entries: &[kvm_cpuid_entry2]) -> u32 {
    leaf(entries, LEAF_SIZES, 0).map_or(36, |entry| entry.eax & 0xff)
}

/// One leaf, or `None` where the CPU has no such leaf.
pub(super) fn leaf(
    entries: &[kvm_cpuid_entry2],
    function: u32,
    index: u32,
) -> Option<&kvm_cpuid_entry2> {
    entries
        .iter()
        .find(|entry| entry.function == function && entry.index == index)
}

/// The vendor, family, model and stepping, as far as they tell which CPU this is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Model {
    pub(super) vendor: String,
    pub(super) family: u32,
    pub(super) model: u32,
    pub(super) stepping: u32,
}

/// Reads the model; unknown fields stay empty.
pub(super) fn model(entries: &[kvm_cpuid_entry2]) -> Model {
    let vendor = leaf(entries, LEAF_VENDOR, 0).map_or_else(String::new, |entry| {
        let bytes: Vec<u8> = [entry.ebx, entry.edx, entry.ecx]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect();
        bytes
            .iter()
            .filter(|byte| byte.is_ascii_graphic())
            .map(|&byte| char::from(byte))
            .collect()
    });
    let signature = leaf(entries, LEAF_FEATURES, 0).map_or(0, |entry| entry.eax);
    let base_family = (signature >> 8) & 0xf;
    let extended_family = (signature >> 20) & 0xff;
    Model {
        vendor,
        family: if base_family == 0xf {
            base_family + extended_family
        } else {
            base_family
        },
        model: ((signature >> 4) & 0xf) | ((signature >> 12) & 0xf0),
        stepping: signature & 0xf,
    }
}

impl std::fmt::Display for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} family {} model {} stepping {}",
            if self.vendor.is_empty() {
                "unknown"
            } else {
                &self.vendor
            },
            self.family,
            self.model,
            self.stepping
        )
    }
}

fn clear(entry: &mut kvm_cpuid_entry2) {
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
}

/// The last level is everybody's, the others are each core's own.
fn share_caches(entry: &mut kvm_cpuid_entry2, cpus: u32) {
    let level = (entry.eax >> 5) & 7;
    let sharing = if level >= 3 {
        (1 << core_bits(cpus)) - 1
    } else {
        0
    };
    let cores = (1_u32 << core_bits(cpus)) - 1;
    entry.eax = (entry.eax & 0x3fff) | (sharing << 14) | (cores.min(0x3f) << 26);
}

/// Subleaf 0: one thread in each core. Subleaf 1: all cores in one package.
fn flatten_topology(entry: &mut kvm_cpuid_entry2, cpus: u32) {
    const THREAD: u32 = 1 << 8;
    const CORE: u32 = 2 << 8;
    if entry.index == 0 {
        (entry.eax, entry.ebx, entry.ecx) = (0, 1, THREAD);
    } else {
        (entry.eax, entry.ebx, entry.ecx) = (core_bits(cpus), cpus, CORE | 1);
    }
    entry.edx = 0;
}

/// Bits that tell `cpus` cores apart.
fn core_bits(cpus: u32) -> u32 {
    cpus.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    #[test]
    fn each_vcpu_has_its_own_number_and_the_host_does_not_show_through() {
        let host = [
            entry(1, 0, [0x000a_0671, 0x0702_0800, 0x8120_2020, 0x0f8b_fbff]),
            entry(0xb, 0, [4, 8, 0x101, 7]),
            entry(0xb, 1, [4, 8, 0x202, 7]),
            entry(0xb, 2, [0, 0, 2, 7]),
            entry(0x8000_0001, 0, [0, 0, 0x104, 1 << 26]),
        ];
        let machine = normalise(&host, 3, true);
        let third = for_vcpu(&machine, 2);

        let features = leaf(&third, 1, 0).unwrap();
        assert_eq!(features.ebx >> 24, 2, "local APIC number");
        assert_eq!((features.ebx >> 16) & 0xff, 3, "vCPUs");
        assert_eq!(features.ecx & FEATURE_ECX_VMX, 0);
        assert_ne!(features.ecx & FEATURE_ECX_HYPERVISOR, 0);
        assert_ne!(features.edx & FEATURE_EDX_HTT, 0);
        assert_eq!(leaf(&third, 0xb, 1).unwrap().edx, 2);
        assert_eq!(leaf(&third, 0xb, 1).unwrap().ebx, 3);
        assert_eq!(leaf(&third, 0xb, 1).unwrap().eax, 2, "bits for three cores");
        assert!(leaf(&third, 0xb, 2).is_none());
        assert_eq!(
            leaf(&third, 0x8000_0001, 0).unwrap().ecx & EXTENDED_ECX_SVM,
            0
        );
        assert!(has_pages_1g(&third));
    }

    #[test]
    fn the_model_is_read_as_the_manuals_say() {
        let intel = [
            entry(0, 0, [0x24, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
            entry(1, 0, [0x000a_0671, 0, 0, 0]),
        ];
        assert_eq!(
            model(&intel).to_string(),
            "GenuineIntel family 6 model 167 stepping 1"
        );
        let amd = [entry(1, 0, [0x00a2_0f10, 0, 0, 0])];
        assert_eq!(model(&amd).family, 25);
        assert_eq!(model(&amd).model, 0x21);
    }
}
