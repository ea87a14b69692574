//! What is pushed first: all that there is, or all but a part of it, for comparisons.

use lazyvm_wire::PageRange;

use super::Neighbours;
use crate::port::Hints;

/// A policy. Its parts are on or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// As it is called on the command line.
    pub name: &'static str,
    /// Windows around faults.
    pub neighbours: Neighbours,
    /// Page tables, and what registers point to, ahead of the rest.
    pub resume_set: bool,
    /// Code that was accessed, likewise.
    pub code: bool,
    /// The sampled working set, likewise.
    pub hot: bool,
    /// That in the order in which it showed, not in the order of addresses.
    pub recency: bool,
    /// What went before the pause and still holds is there.
    pub early: bool,
}

const BOTH: Neighbours = Neighbours {
    physical: true,
    virtual_: true,
};
const NONE: Neighbours = Neighbours {
    physical: false,
    virtual_: false,
};
const PHYSICAL: Neighbours = Neighbours {
    physical: true,
    virtual_: false,
};
const VIRTUAL: Neighbours = Neighbours {
    physical: false,
    virtual_: true,
};

const FULL: Policy = Policy {
    name: "full",
    neighbours: BOTH,
    resume_set: true,
    code: true,
    hot: true,
    recency: true,
    early: true,
};

const LINEAR: Policy = Policy {
    name: "linear",
    neighbours: NONE,
    resume_set: false,
    code: false,
    hot: false,
    recency: false,
    early: false,
};

impl Policy {
    /// All of them: the whole, nothing of it, windows alone, and the whole with each part off in turn.
    pub const ALL: [Self; 12] = [
        FULL,
        Self {
            name: "no-windows",
            neighbours: NONE,
            ..FULL
        },
        Self {
            name: "physical-only",
            neighbours: PHYSICAL,
            ..FULL
        },
        Self {
            name: "virtual-only",
            neighbours: VIRTUAL,
            ..FULL
        },
        Self {
            name: "no-resume-set",
            resume_set: false,
            ..FULL
        },
        Self {
            name: "no-code",
            code: false,
            ..FULL
        },
        Self {
            name: "no-hot",
            hot: false,
            ..FULL
        },
        Self {
            name: "no-recency",
            recency: false,
            ..FULL
        },
        Self {
            name: "no-early",
            early: false,
            ..FULL
        },
        Self {
            name: "no-early-no-recency",
            early: false,
            recency: false,
            ..FULL
        },
        Self {
            name: "windows-alone",
            neighbours: BOTH,
            ..LINEAR
        },
        LINEAR,
    ];

    /// By its name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.name == name)
    }

    /// What it takes of these.
    pub fn keep(&self, mut hints: Hints) -> Hints {
        if !self.resume_set {
            hints.tables.clear();
            hints.processor.clear();
        }
        if !self.code {
            hints.code.clear();
        }
        if !self.hot {
            hints.hot.clear();
        }
        if !self.recency {
            hints.hot.sort_unstable_by_key(|range| range.first);
        }
        hints
    }

    /// What goes ahead of the rest, of hints that were kept: what was written since it went (`residual`) is behind what is
    /// small and certain.
    pub fn lead(hints: &Hints, residual: &[PageRange]) -> Vec<PageRange> {
        [
            &hints.tables,
            &hints.processor,
            residual,
            &hints.code,
            &hints.hot,
        ]
        .map(|part: &[PageRange]| part)
        .concat()
    }
}

impl Default for Policy {
    fn default() -> Self {
        FULL
    }
}

#[cfg(test)]
mod tests {
    use lazyvm_wire::PageIndex;

    use super::*;

    #[test]
    fn each_name_leaves_out_what_it_says() {
        let run = |first| vec![PageRange::one(PageIndex(first))];
        let hints = Hints {
            tables: run(1),
            processor: run(2),
            code: run(3),
            hot: [run(9), run(4)].concat(),
            virtual_order: Vec::new(),
        };
        let lead = |name| {
            let policy = Policy::named(name).unwrap();
            let lead = Policy::lead(&policy.keep(hints.clone()), &run(7));
            lead.iter().map(|run| run.first.0).collect::<Vec<_>>()
        };
        assert_eq!(lead("full"), [1, 2, 7, 3, 9, 4]);
        assert_eq!(lead("no-resume-set"), [7, 3, 9, 4]);
        assert_eq!(lead("no-code"), [1, 2, 7, 9, 4]);
        assert_eq!(lead("no-hot"), [1, 2, 7, 3]);
        assert_eq!(lead("no-recency"), [1, 2, 7, 3, 4, 9]);
        assert_eq!(lead("linear"), [7]);
        assert_eq!(Policy::default(), Policy::named("full").unwrap());
        assert!(Policy::named("fast").is_none());
    }
}
