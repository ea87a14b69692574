//! vmm-glue
