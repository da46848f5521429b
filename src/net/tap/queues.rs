//! How many queues of a multi-queue tap have a user, as the kernel tells over netlink.
//!
//! Asked before and after a tap is attached by name: the kernel refuses a second user of a tap with one queue, and takes
//! any number for one with several. Queues that their user disabled count. rtnetlink(7), `linux/if_link.h`.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::FromRawFd;

use super::{TapError, checked, host};

/// The information that the driver of an interface gives (`IFLA_INFO_DATA`).
const IFLA_INFO_DATA: u16 = 2;
/// Attached queues, told for multi-queue taps only (`IFLA_TUN_NUM_QUEUES`).
const IFLA_TUN_NUM_QUEUES: u16 = 8;
/// Attached queues that their user disabled (`IFLA_TUN_NUM_DISABLED_QUEUES`).
const IFLA_TUN_NUM_DISABLED_QUEUES: u16 = 9;
/// `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;
/// `struct ifinfomsg`.
const INTERFACE_BYTES: usize = 16;
/// More than what the kernel tells of one interface without virtual functions.
const ANSWER_BYTES_MAX: usize = 32 << 10;

/// Refuses the tap `name`, which is interface `index`, when more than `ours` queues have a user. A tap of one queue
/// passes: the kernel refuses that one itself.
///
/// # Errors
/// [`TapError::Busy`], or [`TapError::Host`] when the kernel does not answer.
pub(super) fn check_users(name: &str, index: u32, ours: u32) -> Result<(), TapError> {
    let count = user_count(index).map_err(host(name, "tell how many queues have a user"))?;
    if count.is_some_and(|count| count > ours) {
        let name = name.to_owned();
        return Err(TapError::Busy { name });
    }
    Ok(())
}

/// The queues of interface `index` that have a user; `None` when it is no multi-queue tap.
fn user_count(index: u32) -> io::Result<Option<u32>> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: socket takes and returns integers only.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) };
    checked(fd)?;
    // SAFETY: the descriptor was just made and belongs to nobody else.
    let mut socket = unsafe { File::from_raw_fd(fd) };
    socket.write_all(&question(index))?;
    let mut answer = vec![0; ANSWER_BYTES_MAX];
    let length = socket.read(&mut answer)?;
    parse(answer.get(..length).unwrap_or_default())
}

/// `RTM_GETLINK` for one interface.
fn question(index: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + INTERFACE_BYTES);
    bytes.extend(((HEADER_BYTES + INTERFACE_BYTES) as u32).to_ne_bytes());
    bytes.extend(libc::RTM_GETLINK.to_ne_bytes());
    bytes.extend((libc::NLM_F_REQUEST as u16).to_ne_bytes());
    // Sequence number and port; family, padding and type of the interface.
    bytes.extend([0; 12]);
    bytes.extend(index.to_ne_bytes());
    // Flags and their mask.
    bytes.extend([0; 8]);
    bytes
}

fn parse(answer: &[u8]) -> io::Result<Option<u32>> {
    let malformed = || io::Error::from(io::ErrorKind::InvalidData);
    let kind = answer.get(4..6).and_then(|kind| kind.try_into().ok());
    let kind = u16::from_ne_bytes(kind.ok_or_else(malformed)?);
    if kind == libc::NLMSG_ERROR as u16 {
        let errno = number(answer.get(HEADER_BYTES..).unwrap_or_default()).ok_or_else(malformed)?;
        return Err(io::Error::from_raw_os_error((errno as i32).wrapping_neg()));
    }
    let attributes = answer
        .get(HEADER_BYTES + INTERFACE_BYTES..)
        .ok_or_else(malformed)?;
    let data = find(attributes, libc::IFLA_LINKINFO).and_then(|link| find(link, IFLA_INFO_DATA));
    let count = |kind| data.and_then(|data| find(data, kind)).and_then(number);
    let disabled = count(IFLA_TUN_NUM_DISABLED_QUEUES).unwrap_or(0);
    Ok(count(IFLA_TUN_NUM_QUEUES).map(|enabled| enabled.saturating_add(disabled)))
}

fn number(bytes: &[u8]) -> Option<u32> {
    let bytes = bytes.first_chunk::<4>()?;
    Some(u32::from_ne_bytes(*bytes))
}

/// What the attribute `wanted` holds. Each is a 16-bit length, header included, a 16-bit kind, and padding to 4 bytes.
fn find(attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    let mut rest = attributes;
    while let Some((&[l0, l1, k0, k1], _)) = rest.split_first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let content = rest.get(4..length)?;
        // The two top bits are flags.
        if u16::from_ne_bytes([k0, k1]) & 0x3FFF == wanted {
            return Some(content);
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_interface_has_no_count_and_a_missing_one_is_an_error() {
        // The loop-back interface is the first of every namespace.
        assert_eq!(user_count(1).expect("the kernel answers"), None);
        let error = user_count(0x7FFF_FFFF).expect_err("there is none");
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
    }

    #[test]
    fn a_cut_answer_is_an_error_or_has_no_count() {
        let attribute = |kind: u16, content: &[u8]| {
            let mut bytes = (content.len() as u16 + 4).to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.extend(content);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        };
        let mut data = attribute(1, b"odd");
        data.extend(attribute(IFLA_TUN_NUM_QUEUES, &2u32.to_ne_bytes()));
        data.extend(attribute(IFLA_TUN_NUM_DISABLED_QUEUES, &1u32.to_ne_bytes()));
        let link = attribute(libc::IFLA_LINKINFO, &attribute(IFLA_INFO_DATA, &data));
        let answer = [question(1), link].concat();
        assert_eq!(parse(&answer).expect("whole"), Some(3));
        for length in 0..answer.len() {
            let count = parse(&answer[..length]).unwrap_or(None);
            assert_eq!(count, None, "{length} bytes");
        }
    }
}
