//! What the supervisor does, one file per noun. Each function is called on the supervisor's thread and never blocks.

pub(super) mod power;
