//! What is pushed first: all that the server does, or all but a part of it.

use lazyvm_server::port::Hints;
use lazyvm_server::scheduler::Neighbours;
use lazyvm_wire::PageRange;

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
    early: true,
};

const LINEAR: Policy = Policy {
    name: "linear",
    neighbours: NONE,
    resume_set: false,
    code: false,
    hot: false,
    early: false,
};

impl Policy {
    /// All of them: the whole, nothing of it, windows alone, and the whole with each part off in turn.
    pub const ALL: [Self; 10] = [
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
            name: "no-early",
            early: false,
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

    /// What goes ahead of the rest.
    pub(super) fn lead(&self, hints: &Hints) -> Vec<PageRange> {
        let parts = [
            (self.resume_set, &hints.tables),
            (self.resume_set, &hints.processor),
            (self.code, &hints.code),
            (self.hot, &hints.hot),
        ];
        let on = parts.into_iter().filter(|(on, _)| *on);
        on.flat_map(|(_, ranges)| ranges.iter().copied()).collect()
    }
}
