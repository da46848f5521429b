//! The card against a driver written for these tests: rings in guest memory, a socket as the network.
//!
//! Every test drives the card through its device contract, as the transport does.

mod control;
mod driver;
mod hostile;
mod link;
mod real_tap;
mod receive;
mod transmit;
