//! Control messages (virtio 1.2 §5.3.6): how ports are announced, named, opened and closed.
//!
//! What the guest is still to be told about a port is a handful of flags, not a queue of messages: however often a
//! driver asks, the device owes it each message at most once, and the open state is the latest one.

/// `struct virtio_console_control`: id, event, value, all little-endian.
pub(super) const MESSAGE_BYTES: usize = 8;

const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// A message from the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DriverMessage {
    /// The driver is ready to hear of ports, or failed.
    DeviceReady { ok: bool },
    /// The driver knows port `id` now, or failed to add it.
    PortReady { id: u32, ok: bool },
    /// A program in the guest opened or closed port `id`.
    PortOpen { id: u32, open: bool },
    /// Anything else.
    Unknown { event: u16 },
}

impl DriverMessage {
    /// Reads a message as the driver wrote it.
    pub(super) fn parse(bytes: [u8; MESSAGE_BYTES]) -> Self {
        let [i0, i1, i2, i3, e0, e1, v0, v1] = bytes;
        let id = u32::from_le_bytes([i0, i1, i2, i3]);
        let value = u16::from_le_bytes([v0, v1]) != 0;
        match u16::from_le_bytes([e0, e1]) {
            DEVICE_READY => Self::DeviceReady { ok: value },
            PORT_READY => Self::PortReady { id, ok: value },
            PORT_OPEN => Self::PortOpen { id, open: value },
            event => Self::Unknown { event },
        }
    }
}

/// A message to the driver about one port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DeviceMessage {
    /// The port exists.
    Add,
    /// The port is a console.
    Console,
    /// The port has a name.
    Name,
    /// The host end was connected or closed.
    Open(bool),
}

impl DeviceMessage {
    /// The message as the driver reads it, for port `id` of name `name`.
    pub(super) fn to_bytes(self, id: u32, name: &str) -> Vec<u8> {
        let (event, value) = match self {
            Self::Add => (DEVICE_ADD, 1),
            Self::Console => (CONSOLE_PORT, 1),
            Self::Name => (PORT_NAME, 1),
            Self::Open(open) => (PORT_OPEN, u16::from(open)),
        };
        let mut bytes = Vec::with_capacity(MESSAGE_BYTES + name.len());
        bytes.extend_from_slice(&id.to_le_bytes());
        bytes.extend_from_slice(&event.to_le_bytes());
        bytes.extend_from_slice(&value.to_le_bytes());
        if self == Self::Name {
            bytes.extend_from_slice(name.as_bytes());
        }
        bytes
    }
}

/// What the driver knows of a port and what it is still to be told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Dialogue {
    /// The driver said that it added the port.
    pub(super) ready: bool,
    /// A program in the guest has the port open.
    pub(super) guest_open: bool,
    /// What the driver was last told about the host end.
    pub(super) told_open: bool,
    pub(super) owes_add: bool,
    pub(super) owes_console: bool,
    pub(super) owes_name: bool,
}

impl Dialogue {
    /// The driver added the port; it believes the host end closed until it is told otherwise.
    pub(super) fn port_ready(&mut self, console: bool) {
        *self = Self {
            ready: true,
            guest_open: self.guest_open,
            told_open: false,
            owes_add: false,
            owes_console: console,
            owes_name: true,
        };
    }

    /// The next message that is owed, given whether the host end is connected.
    pub(super) fn next(&self, host_open: bool) -> Option<DeviceMessage> {
        if self.owes_add {
            return Some(DeviceMessage::Add);
        }
        if !self.ready {
            return None;
        }
        if self.owes_console {
            return Some(DeviceMessage::Console);
        }
        if self.owes_name {
            return Some(DeviceMessage::Name);
        }
        (self.told_open != host_open).then_some(DeviceMessage::Open(host_open))
    }

    /// The driver was given `message`.
    pub(super) fn told(&mut self, message: DeviceMessage) {
        match message {
            DeviceMessage::Add => self.owes_add = false,
            DeviceMessage::Console => self.owes_console = false,
            DeviceMessage::Name => self.owes_name = false,
            DeviceMessage::Open(open) => self.told_open = open,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_the_layout_of_the_specification() {
        let bytes = [2, 0, 0, 0, 6, 0, 1, 0];
        let message = DriverMessage::PortOpen { id: 2, open: true };
        assert_eq!(DriverMessage::parse(bytes), message);
        assert_eq!(DeviceMessage::Open(true).to_bytes(2, "agent"), bytes);
        assert_eq!(
            DeviceMessage::Name.to_bytes(0x0102, "ab"),
            [2, 1, 0, 0, 7, 0, 1, 0, b'a', b'b']
        );
        let unknown = DriverMessage::Unknown { event: 0x0205 };
        assert_eq!(DriverMessage::parse([0, 0, 0, 0, 5, 2, 0, 0]), unknown);
    }

    #[test]
    fn each_message_is_owed_once_and_in_order() {
        let mut dialogue = Dialogue {
            owes_add: true,
            ..Dialogue::default()
        };
        let mut told = Vec::new();
        while let Some(message) = dialogue.next(true) {
            dialogue.told(message);
            told.push(message);
        }
        assert_eq!(told, [DeviceMessage::Add]);
        (0..100).for_each(|_| dialogue.port_ready(true));
        while let Some(message) = dialogue.next(true) {
            dialogue.told(message);
            told.push(message);
        }
        let expected = [
            DeviceMessage::Console,
            DeviceMessage::Name,
            DeviceMessage::Open(true),
        ];
        assert_eq!(told[1..], expected);
        assert_eq!(dialogue.next(false), Some(DeviceMessage::Open(false)));
    }
}
