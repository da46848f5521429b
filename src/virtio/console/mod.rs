//! virtio-console with several ports (virtio 1.2 §5.3).
//!
//! A port carries a stream of bytes between a program in the guest and a Unix stream socket on the host. The embedder
//! connects host ends through [`ConsolePorts`], at any time and again after one was closed; the guest sees its port
//! open and close with them. Nothing is buffered here: bytes wait in the socket or in the guest's buffers, so either
//! side slows the other down, with one exception (see `port.rs`: consoles lose output instead).
//!
//! | file | |
//! |---|---|
//! | `device` | queues, activation, events: who is called when |
//! | `port` | one port: both directions of its data path |
//! | `events` | host ends: what is watched, how they come and go |
//! | `control`, `control_queues` | the messages that announce, name, open and close ports |
//! | `host` | connecting host ends, from any thread |
//! | `saved` | the frozen saved form |

mod control;
mod control_queues;
mod device;
mod events;
mod host;
mod port;
mod saved;

pub use device::{Console, ConsoleError, PORTS_MAX, PortConfig};
pub use host::{ConnectError, ConsolePorts};

#[cfg(test)]
mod tests;
