//! Kernels from files: ELF, bzImage, flat.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress};

use super::super::memory::{GuestRam, MMIO_GAP_START};
use super::long_mode::{STACK_TOP, ZERO_PAGE};
use super::{Entry, LoadError, write, zero_page};

/// Where conventional memory ends and a bzImage or flat payload goes.
const HIGH_MEMORY: u64 = 1 << 20;

const COMMAND_LINE: u64 = 0x2_0000;
/// The kernel's own limit on x86 (`COMMAND_LINE_SIZE`), with the zero at its end.
const COMMAND_LINE_MAX: usize = 2048;

/// Where an ELF kernel takes its initial RAM disk at most; a bzImage says so itself.
const INITRD_END_MAX: u64 = 0x3800_0000;

/// The 64-bit entry of a bzImage, behind where it is loaded (kernel, `Documentation/arch/x86/boot.rst`).
const BZIMAGE_ENTRY_64: u64 = 0x200;

enum Format {
    Elf,
    BzImage,
}

/// Loads an ELF file or bzImage, its RAM disk and command line.
pub(super) fn load(
    ram: &GuestRam,
    path: &Path,
    initrd: Option<&Path>,
    cmdline: &str,
) -> Result<Entry, LoadError> {
    let mut file = open("the kernel", path)?;
    let (loaded, entry) = match recognise(&mut file, path)? {
        Format::Elf => {
            let loaded = load_with::<Elf>(ram, None, &mut file, path)?;
            (loaded, loaded.kernel_load.0)
        }
        Format::BzImage => {
            let loaded =
                load_with::<BzImage>(ram, Some(GuestAddress(HIGH_MEMORY)), &mut file, path)?;
            (loaded, loaded.kernel_load.0 + BZIMAGE_ENTRY_64)
        }
    };
    let header = loaded.setup_header.unwrap_or_else(zero_page::header_of_elf);
    check_room(ram, &loaded, &header)?;
    let initrd = initrd
        .map(|path| load_initrd(ram, path, &loaded, &header))
        .transpose()?;
    write_command_line(ram, cmdline)?;
    zero_page::write_params(ram, ZERO_PAGE, header, COMMAND_LINE as u32, initrd)?;
    Ok(Entry {
        rip: entry,
        rsp: STACK_TOP,
        rsi: ZERO_PAGE,
        ..Default::default()
    })
}

/// Loads bytes as they are.
pub(super) fn load_flat(ram: &GuestRam, path: &Path) -> Result<Entry, LoadError> {
    let mut file = open("the flat payload", path)?;
    let length = length(&mut file, "the flat payload", path)?;
    let low = low_memory(ram);
    if length > low - HIGH_MEMORY {
        return Err(too_small(ram, "the flat payload", HIGH_MEMORY + length));
    }
    ram.mapping()
        .read_exact_volatile_from(GuestAddress(HIGH_MEMORY), &mut file, length as usize)
        .map_err(|error| LoadError::Write {
            what: "the flat payload",
            source: Box::new(error),
        })?;
    Ok(Entry {
        rip: HIGH_MEMORY,
        rsp: STACK_TOP,
        ..Default::default()
    })
}

fn open(what: &'static str, path: &Path) -> Result<File, LoadError> {
    File::open(path).map_err(|source| LoadError::Read {
        what,
        path: path.to_owned(),
        source,
    })
}

fn length(file: &mut File, what: &'static str, path: &Path) -> Result<u64, LoadError> {
    let failed = |source| LoadError::Read {
        what,
        path: path.to_owned(),
        source,
    };
    let length = file.seek(SeekFrom::End(0)).map_err(failed)?;
    file.rewind().map_err(failed)?;
    Ok(length)
}

/// Tells the formats apart by their magic numbers, so that the answer to a wrong file names what is wrong.
fn recognise(file: &mut File, path: &Path) -> Result<Format, LoadError> {
    const MACHINE_X86_64: [u8; 2] = [62, 0];
    const XLOADFLAGS: usize = 0x236;
    const LOADABLE_64: u8 = 1;
    let failed = |source| LoadError::Read {
        what: "the kernel",
        path: path.to_owned(),
        source,
    };
    let mut head = Vec::new();
    file.by_ref()
        .take(0x300)
        .read_to_end(&mut head)
        .map_err(failed)?;
    file.rewind().map_err(failed)?;
    let not = |hint| {
        Err(LoadError::NotAKernel {
            path: path.to_owned(),
            hint,
        })
    };
    if head.starts_with(b"\x7fELF") {
        if head.get(4) != Some(&2) || head.get(18..20) != Some(&MACHINE_X86_64) {
            return not(" (it is an ELF file for another CPU)");
        }
        return Ok(Format::Elf);
    }
    if head.get(0x202..0x206) == Some(b"HdrS") {
        if head
            .get(XLOADFLAGS)
            .is_none_or(|flags| flags & LOADABLE_64 == 0)
        {
            return not(" (it is a bzImage for 32-bit CPUs)");
        }
        return Ok(Format::BzImage);
    }
    not("")
}

fn load_with<L: KernelLoader>(
    ram: &GuestRam,
    at: Option<GuestAddress>,
    file: &mut File,
    path: &Path,
) -> Result<KernelLoaderResult, LoadError> {
    let needed = HIGH_MEMORY + length(file, "the kernel", path)?;
    L::load(ram.mapping(), at, file, Some(GuestAddress(HIGH_MEMORY))).map_err(|source| {
        if needed > low_memory(ram) {
            return too_small(ram, "the kernel", needed);
        }
        LoadError::Kernel {
            path: path.to_owned(),
            source,
        }
    })
}

/// A kernel that unpacks itself needs more than its file's length, and says how much.
fn check_room(
    ram: &GuestRam,
    loaded: &KernelLoaderResult,
    header: &setup_header,
) -> Result<(), LoadError> {
    let needed = kernel_end(loaded, header);
    if needed > low_memory(ram) {
        return Err(too_small(ram, "the kernel", needed));
    }
    Ok(())
}

fn kernel_end(loaded: &KernelLoaderResult, header: &setup_header) -> u64 {
    let unpacked = header
        .pref_address
        .max(loaded.kernel_load.0)
        .saturating_add(header.init_size.into());
    loaded.kernel_end.max(unpacked)
}

/// As high as the kernel takes it, above what the kernel unpacks itself to.
fn load_initrd(
    ram: &GuestRam,
    path: &Path,
    loaded: &KernelLoaderResult,
    header: &setup_header,
) -> Result<(u32, u32), LoadError> {
    let mut file = open("the initial RAM disk", path)?;
    let length = length(&mut file, "the initial RAM disk", path)?;
    let end = match header.initrd_addr_max {
        0 => INITRD_END_MAX,
        max => u64::from(max) + 1,
    };
    let end = end.min(low_memory(ram));
    let floor = kernel_end(loaded, header);
    let start = end
        .checked_sub(length)
        .map(|start| start & !0xfff)
        .filter(|&start| start >= floor)
        .ok_or_else(|| too_small(ram, "the kernel and its RAM disk", floor + length + 0x1000))?;
    ram.mapping()
        .read_exact_volatile_from(GuestAddress(start), &mut file, length as usize)
        .map_err(|error| LoadError::Write {
            what: "the initial RAM disk",
            source: Box::new(error),
        })?;
    // Both below 4 GiB: low memory ends at 3.
    Ok((start as u32, length as u32))
}

fn write_command_line(ram: &GuestRam, cmdline: &str) -> Result<(), LoadError> {
    let max = COMMAND_LINE_MAX - 1;
    let printable = cmdline
        .bytes()
        .all(|byte| byte.is_ascii_graphic() || byte == b' ');
    if cmdline.len() > max || !printable {
        return Err(LoadError::CommandLine { max });
    }
    let mut line = cmdline.as_bytes().to_vec();
    line.push(0);
    write(ram, "the command line", COMMAND_LINE, &line)
}

fn low_memory(ram: &GuestRam) -> u64 {
    ram.layout().bytes().min(MMIO_GAP_START)
}

fn too_small(ram: &GuestRam, what: &'static str, needed: u64) -> LoadError {
    LoadError::MemoryTooSmall {
        memory: ram.layout().bytes(),
        what,
        needed,
    }
}

#[cfg(test)]
mod tests {
    use lazyvm_wire::Backing;

    use super::*;

    fn loading(bytes: &[u8]) -> Result<Entry, LoadError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kernel");
        std::fs::write(&path, bytes).unwrap();
        let ram = GuestRam::new(8 << 20, Backing::Small).unwrap();
        load(&ram, &path, None, "")
    }

    #[test]
    fn what_is_no_kernel_is_refused_in_words() {
        let words = |bytes: &[u8]| loading(bytes).unwrap_err().to_string();
        assert!(words(b"#!/bin/sh\n").contains("neither an x86-64 ELF file nor a bzImage"));
        assert!(words(b"").contains("is no kernel"));
        let mut arm = b"\x7fELF\x02\x01\x01".to_vec();
        arm.resize(64, 0);
        arm[18] = 183;
        assert!(words(&arm).contains("another CPU"));
        let mut old = vec![0; 0x400];
        old[0x202..0x206].copy_from_slice(b"HdrS");
        assert!(words(&old).contains("32-bit"));
    }

    #[test]
    fn a_damaged_elf_file_is_an_error() {
        let mut cut = b"\x7fELF\x02\x01\x01".to_vec();
        cut.resize(64, 0);
        cut[18] = 62;
        assert!(matches!(loading(&cut), Err(LoadError::Kernel { .. })));
    }

    #[test]
    fn a_missing_file_is_named() {
        let ram = GuestRam::new(8 << 20, Backing::Small).unwrap();
        let error = load(&ram, Path::new("/nonexistent/vmlinux"), None, "").unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot read the kernel /nonexistent/vmlinux"
        );
    }

    #[test]
    fn a_flat_payload_larger_than_memory_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("flat");
        File::create(&path).unwrap().set_len(16 << 20).unwrap();
        let ram = GuestRam::new(8 << 20, Backing::Small).unwrap();
        assert!(matches!(
            load_flat(&ram, &path),
            Err(LoadError::MemoryTooSmall { .. })
        ));
    }

    #[test]
    fn a_command_line_has_a_bound() {
        let ram = GuestRam::new(8 << 20, Backing::Small).unwrap();
        assert!(write_command_line(&ram, &"a".repeat(2047)).is_ok());
        assert!(write_command_line(&ram, &"a".repeat(2048)).is_err());
        assert!(write_command_line(&ram, "a\nb").is_err());
    }
}
