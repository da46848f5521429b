//! The words for a VM's state, used by events, configuration and the lifecycle table alike.

use serde::Serialize;

/// The state of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    Off,
    Starting,
    Running,
    Pausing,
    Paused,
    PausedCritical,
    Resuming,
    Saving,
    Saved,
    Stopping,
}
