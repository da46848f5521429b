//! The steps of the tour, each in a file of its own. A step prints and checks; it returns an error only when it cannot
//! go on.

pub mod clean_up;
pub mod disk;
pub mod ends;
pub mod look;
pub mod make;
pub mod memory;
pub mod network;
pub mod new_card;
pub mod pause;
pub mod power_button;
pub mod reset;
pub mod start;
