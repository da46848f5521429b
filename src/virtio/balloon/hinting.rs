//! Rounds of free page hints (virtio 1.2 §5.5.6.5): whose command is in force and whether hints count.
//!
//! ```text
//! host   start ─ command 2 ─────────────────────────── end ─ DONE
//! driver               └─ "2", hints …, STOP ──▶ done        └─ uses the pages again
//! ```
//! Pure. A command is used once, however the round ends.

/// The driver stops; also what is in force before the first round.
const VIRTIO_BALLOON_CMD_ID_STOP: u32 = 0;
/// The driver stops and uses the hinted pages again.
const VIRTIO_BALLOON_CMD_ID_DONE: u32 = 1;

/// Where a round stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Hinting {
    /// `free_page_hint_cmd_id`.
    pub(super) command: u32,
    /// The last command that began a round.
    pub(super) last_round: u32,
    /// The command that the driver is at.
    pub(super) driver_round: Option<u32>,
}

impl Hinting {
    /// Begins a round.
    pub(super) fn start(&mut self) {
        let reserved = VIRTIO_BALLOON_CMD_ID_DONE;
        self.last_round = self.last_round.wrapping_add(1).max(reserved + 1);
        self.command = self.last_round;
    }

    /// Ends hinting; tells whether there is something to end.
    pub(super) fn end(&mut self) -> bool {
        let running = self.is_running();
        if running {
            self.command = VIRTIO_BALLOON_CMD_ID_DONE;
        }
        running
    }

    /// Whether a round was begun and not ended.
    pub(super) fn is_running(&self) -> bool {
        self.command > VIRTIO_BALLOON_CMD_ID_DONE
    }

    /// The driver is at `command` now; tells whether it has just completed the round.
    pub(super) fn driver_at(&mut self, command: u32) -> bool {
        if command == VIRTIO_BALLOON_CMD_ID_STOP {
            let completed = self.counts();
            self.driver_round = None;
            return completed;
        }
        self.driver_round = Some(command);
        false
    }

    /// Whether what the driver hints at belongs to the round.
    pub(super) fn counts(&self) -> bool {
        self.is_running() && self.driver_round == Some(self.command)
    }

    /// The driver is gone; commands are not used again all the same. Tells whether that ended a round.
    pub(super) fn reset(&mut self) -> bool {
        let running = self.is_running();
        self.command = VIRTIO_BALLOON_CMD_ID_STOP;
        self.driver_round = None;
        running
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hints_count_while_the_driver_is_at_the_command_in_force() {
        let mut hinting = Hinting::default();
        assert!(!hinting.driver_at(2) && !hinting.counts(), "there is no round");
        hinting.start();
        assert_eq!(hinting.command, 2);
        assert!(hinting.counts(), "the driver foresaw it");
        hinting.start();
        assert!(!hinting.counts(), "round 3 has begun");
        assert!(!hinting.driver_at(3) && hinting.counts());
        assert!(hinting.driver_at(0), "the round is complete");
        assert!(!hinting.driver_at(0), "only once");
        assert!(hinting.end() && !hinting.end());
        assert_eq!(hinting.command, 1);
        assert!(!hinting.driver_at(1) && !hinting.counts(), "1 is no command");
    }

    #[test]
    fn commands_are_not_used_again_and_never_reserved_ones() {
        let mut hinting = Hinting {
            last_round: u32::MAX - 1,
            ..Hinting::default()
        };
        let commands = [0; 3].map(|_| {
            hinting.start();
            hinting.command
        });
        assert_eq!(commands, [u32::MAX, 2, 3]);
        assert!(hinting.reset() && !hinting.reset());
        hinting.start();
        assert_eq!(hinting.command, 4);
    }
}
