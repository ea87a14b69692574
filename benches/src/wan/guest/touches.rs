//! Which pages the Linux guest touches: its program draws them from a generator that begins alike each time, so what it
//! touched between two ticks is known by their counts.

use bitvec::prelude::BitVec;

use super::{MIB, Workload};

/// Where the generator begins.
const SEED: u64 = 88_172_645_463_325_252;

const PAGES_PER_MIB: u64 = 256;

/// Which touches count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touches {
    /// All of them.
    All,
    /// Those that write.
    Writes,
}

/// How many pages of its filled memory it touched from one count of touches to another, each counted once.
pub fn distinct_pages(workload: &Workload, touches: Touches, from: u64, to: u64) -> u64 {
    let pages = workload.fill_bytes / MIB * PAGES_PER_MIB;
    let hot = workload.hot_bytes / MIB * PAGES_PER_MIB;
    if pages == 0 || hot == 0 || hot > pages {
        return 0;
    }
    let first_hot = (pages - hot) / 2;
    let mut seen = BitVec::<u64>::repeat(false, pages as usize);
    let mut random = SEED;
    for touch in 0..to {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        if touch >= from {
            let draw = mixed(random);
            if touches == Touches::Writes && !(draw >> 20).is_multiple_of(5) {
                continue;
            }
            let is_cold = draw % 1_000_000 < u64::from(workload.cold_per_million);
            let page = if is_cold {
                random % pages
            } else {
                first_hot + random % hot
            };
            seen.set(page as usize, true);
        }
    }
    seen.count_ones() as u64
}

fn mixed(mut x: u64) -> u64 {
    x ^= x >> 33;
    x = x.wrapping_mul(0xff51_afd7_ed55_8ccd);
    x ^= x >> 33;
    x = x.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ x >> 33
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// The guest's own lines, in a program that counts.
    fn counted_by_the_guest(workload: &Workload, touches: Touches, from: u64, to: u64) -> u64 {
        let source = include_str!("init.c");
        let cut = |from: &str, to: &str| {
            let start = source.find(from).unwrap();
            let end = start + source[start..].find(to).unwrap();
            source[start..end].to_owned()
        };
        let counts = match touches {
            Touches::All => "1",
            Touches::Writes => "writes",
        };
        let program = format!(
            "#include <stdio.h>\n#include <stdlib.h>\ntypedef unsigned long u64;\n{}\nint main(void) {{\n\
             u64 count = {}, hot = {}, cold_per_million = {}, distinct = 0; char *seen = calloc(count, 1);\n\
             u64 first_hot = (count - hot) / 2;\n{}\n\
             for (u64 i = 0; i < {to}UL; i++) {{\n{}\nint writes = {};\n\
             if ({counts} && i >= {from}UL && !seen[page]) {{ seen[page] = 1; distinct++; }} }}\n\
             (void)touches; (void)errors; printf(\"%lu\", distinct); }}\n",
            cut("static u64 mixed", "#define WORDS"),
            workload.fill_bytes / MIB * PAGES_PER_MIB,
            workload.hot_bytes / MIB * PAGES_PER_MIB,
            workload.cold_per_million,
            cut("u64 random = ", "long next"),
            cut("random ^= random << 13", "errors += is_wrong"),
            cut("(draw >> 20)", ") {\n                versions"),
        );
        let folder = tempfile::tempdir().unwrap();
        let (file, binary) = (folder.path().join("count.c"), folder.path().join("count"));
        std::fs::write(&file, program).unwrap();
        let compiled = Command::new("gcc")
            .arg("-o")
            .args([&binary, &file])
            .output();
        let compiled = compiled.unwrap();
        assert!(compiled.status.success(), "{compiled:?}");
        let output = Command::new(&binary).output().unwrap();
        String::from_utf8(output.stdout).unwrap().parse().unwrap()
    }

    #[test]
    fn pages_are_counted_as_the_guest_draws_them() {
        let workload = Workload {
            fill_bytes: 64 * MIB,
            hot_bytes: 4 * MIB,
            cold_per_million: 20_000,
        };
        for touches in [Touches::All, Touches::Writes] {
            for (from, to) in [(0, 1), (0, 3000), (5000, 20_000)] {
                let expected = counted_by_the_guest(&workload, touches, from, to);
                assert_eq!(distinct_pages(&workload, touches, from, to), expected);
            }
            assert_eq!(distinct_pages(&workload, touches, 7, 7), 0);
        }
    }
}
