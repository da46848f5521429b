//! The lifecycle as one pure table: what each trigger does in each state.
//!
//! The supervisor asks this table before it does anything and moves only as it says; `docs/state-machine.md` is
//! printed from it and a test compares them. The operation in flight is not part of it: that is the supervisor's
//! second axis, decided in [`may_begin`].

use crate::state::State;
use crate::vm::operation::OperationKind;

/// What can move a VM from one state to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Trigger {
    /// The user asks to start.
    Start,
    /// The user asks to pause.
    Pause,
    /// The user asks to resume.
    Resume,
    /// The user asks to save.
    Save,
    /// The user cuts the power, or the last handle is gone.
    PowerOff,
    /// The work of the present state is done.
    Done,
    /// The work of the present state cannot be done.
    Failed,
    /// A disk of the VM cannot be reached.
    StorageLost,
    /// Every disk of the VM can be reached again.
    StorageBack,
    /// The storage did not come back in time.
    GaveUp,
    /// The guest is gone: power-off, triple fault, panic or vCPU error.
    GuestOff,
}

impl Trigger {
    /// Every trigger, in the order of the table's columns.
    pub const ALL: [Self; 11] = [
        Self::Start,
        Self::Pause,
        Self::Resume,
        Self::Save,
        Self::PowerOff,
        Self::Done,
        Self::Failed,
        Self::StorageLost,
        Self::StorageBack,
        Self::GaveUp,
        Self::GuestOff,
    ];

    /// The head of the trigger's column.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Save => "save",
            Self::PowerOff => "power_off",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::StorageLost => "storage lost",
            Self::StorageBack => "storage back",
            Self::GaveUp => "gave up",
            Self::GuestOff => "guest off",
        }
    }
}

/// What a trigger does in a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// The VM moves to this state.
    To(State),
    /// The VM moves back to where it rested before: Running or Paused.
    Rest,
    /// The VM stays, and the trigger is taken note of.
    Stay,
    /// The request is refused; the refusal names the state.
    Refused,
    /// The trigger means nothing here, for example because it came late.
    Ignored,
}

/// What `trigger` does in `state`.
pub const fn next(state: State, trigger: Trigger) -> Next {
    match state {
        State::Off => off(trigger),
        State::Starting => starting(trigger),
        State::Running => running(trigger),
        State::Pausing => pausing(trigger),
        State::Paused => paused(trigger),
        State::PausedCritical => paused_critical(trigger),
        State::Resuming => resuming(trigger),
        State::Saving => saving(trigger),
        State::Saved => saved(trigger),
        State::Stopping => stopping(trigger),
    }
}

const fn off(trigger: Trigger) -> Next {
    match trigger {
        Trigger::Start => Next::To(State::Starting),
        Trigger::Pause | Trigger::Resume | Trigger::Save | Trigger::PowerOff => Next::Refused,
        Trigger::Done
        | Trigger::Failed
        | Trigger::StorageLost
        | Trigger::StorageBack
        | Trigger::GaveUp
        | Trigger::GuestOff => Next::Ignored,
    }
}

const fn starting(trigger: Trigger) -> Next {
    match trigger {
        Trigger::Start | Trigger::Pause | Trigger::Resume | Trigger::Save => Next::Refused,
        Trigger::PowerOff | Trigger::GuestOff => Next::To(State::Stopping),
        Trigger::Done => Next::To(State::Running),
        Trigger::Failed => Next::To(State::Off),
        Trigger::StorageLost => Next::To(State::PausedCritical),
        Trigger::StorageBack | Trigger::GaveUp => Next::Ignored,
    }
}

const fn running(trigger: Trigger) -> Next {
    match trigger {
        Trigger::Start | Trigger::Resume => Next::Refused,
        Trigger::Pause => Next::To(State::Pausing),
        Trigger::Save => Next::To(State::Saving),
        Trigger::PowerOff | Trigger::GuestOff => Next::To(State::Stopping),
        Trigger::StorageLost => Next::To(State::PausedCritical),
        Trigger::Done | Trigger::Failed | Trigger::StorageBack | Trigger::GaveUp => Next::Ignored,
    }
}

const fn pausing(trigger: Trigger) -> Next {
    match trigger {
        Trigger::Start | Trigger::Pause | Trigger::Resume | Trigger::Save => Next::Refused,
        Trigger::PowerOff | Trigger::GuestOff => Next::To(State::Stopping),
        Trigger::Done => Next::To(State::Paused),
        Trigger::Failed => Next::To(State::Resuming),
        Trigger::StorageLost => Next::To(State::PausedCritical),
        Trigger::StorageBack | Trigger::GaveUp => Next::Ignored,
    }
}

const fn paused(trigger: Trigger) -> Next {
    match trigger {
        Trigger::Start | Trigger::Pause => Next::Refused,
        Trigger::Resume => Next::To(State::Resuming),
        Trigger::Save => Next::To(State::Saving),
        Trigger::PowerOff => Next::To(State::Stopping),
        Trigger::StorageLost => Next::To(State::PausedCritical),
        Trigger::Done | Trigger::Failed | Trigger::StorageBack | Trigger::GaveUp | Trigger::GuestOff => {
            Next::Ignored
        }
    }
}

const fn paused_critical(trigger: Trigger) -> Next {
    match trigger {
        Trigger::Start | Trigger::Pause | Trigger::Resume | Trigger::Save => Next::Refused,
        Trigger::PowerOff | Trigger::GaveUp => Next::To(State::Stopping),
        Trigger::StorageLost => Next::Stay,
        Trigger::StorageBack => Next::Rest,
        Trigger::Done | Trigger::Failed | Trigger::GuestOff => Next::Ignored,
    }
}

const fn resuming(trigger: Trigger) -> Next {
    match trigger {
        Trigger::Start | Trigger::Pause | Trigger::Resume | Trigger::Save => Next::Refused,
        Trigger::PowerOff | Trigger::GuestOff => Next::To(State::Stopping),
        Trigger::Done => Next::To(State::Running),
        Trigger::Failed => Next::To(State::Paused),
        Trigger::StorageLost => Next::To(State::PausedCritical),
        Trigger::StorageBack | Trigger::GaveUp => Next::Ignored,
    }
}

const fn saving(trigger: Trigger) -> Next {
    match trigger {
        Trigger::Start | Trigger::Pause | Trigger::Resume | Trigger::Save => Next::Refused,
        Trigger::PowerOff | Trigger::GuestOff => Next::To(State::Stopping),
        Trigger::Done => Next::To(State::Saved),
        Trigger::Failed => Next::Rest,
        Trigger::StorageLost => Next::To(State::PausedCritical),
        Trigger::StorageBack | Trigger::GaveUp => Next::Ignored,
    }
}

const fn saved(trigger: Trigger) -> Next {
    match trigger {
        Trigger::Start => Next::To(State::Starting),
        Trigger::Pause | Trigger::Resume | Trigger::Save => Next::Refused,
        Trigger::PowerOff => Next::To(State::Off),
        Trigger::Done
        | Trigger::Failed
        | Trigger::StorageLost
        | Trigger::StorageBack
        | Trigger::GaveUp
        | Trigger::GuestOff => Next::Ignored,
    }
}

const fn stopping(trigger: Trigger) -> Next {
    match trigger {
        Trigger::Start | Trigger::Pause | Trigger::Resume | Trigger::Save | Trigger::PowerOff => {
            Next::Refused
        }
        Trigger::Done | Trigger::Failed => Next::To(State::Off),
        Trigger::StorageLost | Trigger::StorageBack | Trigger::GuestOff => Next::Stay,
        Trigger::GaveUp => Next::Ignored,
    }
}

/// Whether `kind` may begin in `state` while `in_flight` is not finished.
///
/// Cutting the power overtakes everything. What [goes on beside others](OperationKind::is_beside) waits for a machine that
/// is being made or reset, and for nothing else. Everything else waits its turn: the caller is told what is in the way.
pub const fn may_begin(kind: OperationKind, state: State, in_flight: Option<OperationKind>) -> bool {
    let trigger = match kind {
        OperationKind::Start => Trigger::Start,
        OperationKind::Pause => Trigger::Pause,
        OperationKind::Resume => Trigger::Resume,
        OperationKind::PowerOff => return !matches!(next(state, Trigger::PowerOff), Next::Refused),
        OperationKind::ShutDown => return in_flight.is_none() && matches!(state, State::Running),
        OperationKind::Reset => {
            return in_flight.is_none() && matches!(state, State::Running | State::Paused);
        }
        OperationKind::ResizeMemory
        | OperationKind::AddNic
        | OperationKind::RemoveNic
        | OperationKind::ChangeNic => {
            return may_begin_beside(state, in_flight);
        }
    };
    in_flight.is_none() && !matches!(next(state, trigger), Next::Refused)
}

/// Settings may change while the VM is off, and while a whole machine is there to follow them.
const fn may_begin_beside(state: State, in_flight: Option<OperationKind>) -> bool {
    let whole = match state {
        State::Off | State::Running | State::Pausing | State::Paused | State::Resuming => true,
        State::Starting | State::PausedCritical | State::Saving | State::Saved | State::Stopping => false,
    };
    whole && !matches!(in_flight, Some(OperationKind::Reset))
}

/// The table as Markdown, as `docs/state-machine.md` holds it.
pub fn table() -> String {
    let heads: Vec<_> = Trigger::ALL.iter().map(|trigger| trigger.as_str()).collect();
    let mut text = format!(
        "| state | {} |\n|{}\n",
        heads.join(" | "),
        "---|".repeat(heads.len() + 1)
    );
    for state in State::ALL {
        let cells: Vec<_> = Trigger::ALL
            .iter()
            .map(|trigger| cell(next(state, *trigger)))
            .collect();
        text.push_str(&format!("| {state:?} | {} |\n", cells.join(" | ")));
    }
    text
}

fn cell(next: Next) -> String {
    match next {
        Next::To(state) => format!("{state:?}"),
        Next::Rest => "*rest*".to_owned(),
        Next::Stay => "=".to_owned(),
        Next::Refused => "–".to_owned(),
        Next::Ignored => " ".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_table_is_this_table() {
        let document = include_str!("../../docs/state-machine.md");
        assert!(
            document.contains(&table()),
            "docs/state-machine.md must hold this table:\n{}",
            table()
        );
    }

    #[test]
    fn from_every_state_that_is_not_off_cutting_the_power_ends_in_off() {
        for state in State::ALL {
            let mut at = state;
            if let Next::To(next_state) = next(at, Trigger::PowerOff) {
                at = next_state;
            }
            if let (State::Stopping, Next::To(next_state)) = (at, next(at, Trigger::Done)) {
                at = next_state;
            }
            assert_eq!(at, State::Off, "power_off in {state}");
        }
    }

    #[test]
    fn nothing_but_a_user_or_the_end_leaves_a_pause() {
        for trigger in Trigger::ALL {
            let leaves = matches!(next(State::Paused, trigger), Next::To(_));
            let allowed = [
                Trigger::Resume,
                Trigger::Save,
                Trigger::PowerOff,
                Trigger::StorageLost,
            ];
            assert_eq!(leaves, allowed.contains(&trigger), "{trigger:?}");
        }
    }

    #[test]
    fn only_cutting_the_power_overtakes_an_operation() {
        for state in State::ALL {
            for in_flight in OperationKind::ALL {
                for kind in OperationKind::ALL {
                    let overtakes = may_begin(kind, state, Some(in_flight));
                    assert!(
                        !overtakes || kind == OperationKind::PowerOff || kind.is_beside(),
                        "{kind:?} in {state}"
                    );
                }
            }
        }
    }
}
