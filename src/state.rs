//! The words for a VM's state, used by events, configuration and the lifecycle table alike.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

/// The state of a VM. What is being done to it is the operation in flight, which is told separately.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It does not run and has no saved state.
    Off,
    /// Its machine is being built or its saved state restored.
    Starting,
    /// The guest runs.
    Running,
    /// vCPUs are being parked and devices drained.
    Pausing,
    /// The guest stands still because its user wants it to.
    Paused,
    /// The guest stands still because storage is gone; its I/O is kept.
    PausedCritical,
    /// Devices and vCPUs are being set going again.
    Resuming,
    /// Its state is being written to disk.
    Saving,
    /// It does not run; its state is on disk.
    Saved,
    /// Its machine is being taken down.
    Stopping,
}

impl State {
    /// Every state, in the order of the lifecycle table.
    pub const ALL: [Self; 10] = [
        Self::Off,
        Self::Starting,
        Self::Running,
        Self::Pausing,
        Self::Paused,
        Self::PausedCritical,
        Self::Resuming,
        Self::Saving,
        Self::Saved,
        Self::Stopping,
    ];

    /// The state in lower case with dashes.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::PausedCritical => "paused-critical",
            Self::Resuming => "resuming",
            Self::Saving => "saving",
            Self::Saved => "saved",
            Self::Stopping => "stopping",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A text is not the name of a state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a state; states are off, starting, running, pausing, paused, paused-critical, resuming, saving, saved, stopping"
)]
pub struct UnknownState(pub String);

impl FromStr for State {
    type Err = UnknownState;

    fn from_str(text: &str) -> Result<Self, UnknownState> {
        let found = Self::ALL.into_iter().find(|state| state.as_str() == text);
        found.ok_or_else(|| UnknownState(text.chars().take(40).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_reads_back_from_its_name() {
        for state in State::ALL {
            assert_eq!(state.as_str().parse(), Ok(state));
            assert_eq!(
                serde_json::to_value(state).expect("a name encodes"),
                state.as_str()
            );
        }
        assert!("Running".parse::<State>().is_err());
    }
}
