//! What the tests of storage and of the block device share.

use std::os::fd::RawFd;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// How long a test waits for something that must happen.
const PATIENCE_MS: i32 = 60_000;

/// Guest memory of `length_bytes` from address 0.
pub(crate) fn guest_memory(length_bytes: usize) -> Arc<GuestMemoryMmap> {
    let ranges = [(GuestAddress(0), length_bytes)];
    Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("the host has memory for a test"))
}

/// Waits until `fd` is readable.
pub(crate) fn wait_readable(fd: RawFd) {
    let epoll = Epoll::new().expect("the host has epoll");
    let mut events = [EpollEvent::new(EventSet::IN, 0)];
    epoll
        .ctl(ControlOperation::Add, fd, events[0])
        .expect("the descriptor can be watched");
    loop {
        match epoll.wait(PATIENCE_MS, &mut events) {
            Ok(count) => return assert_eq!(count, 1, "nothing completed within {PATIENCE_MS} ms"),
            // io_uring interrupts a waiting thread to let it complete its requests.
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::Interrupted),
        }
    }
}
