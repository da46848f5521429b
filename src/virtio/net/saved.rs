//! The saved form of a network card's own state. Its address and backend belong to the configuration, its features
//! and queues to the transport. A saved state is untrusted: whoever reads one calls its `check`.

use serde::{Deserialize, Serialize};

use crate::unit::RestoreError;

/// Schema 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NetStateV1 {
    /// Whether the user had the link up.
    pub link_up: bool,
    /// How many queue pairs the driver uses (virtio 1.2 §5.1.6.5.5).
    pub active_pair_count: u16,
}

impl NetStateV1 {
    /// Checks the untrusted state against a card with `pair_count` queue pairs.
    ///
    /// # Errors
    /// [`RestoreError::Value`].
    pub(super) fn check(&self, pair_count: u16) -> Result<(), RestoreError> {
        if (1..=pair_count).contains(&self.active_pair_count) {
            return Ok(());
        }
        Err(RestoreError::Value {
            field: "active_pair_count",
            value: self.active_pair_count.to_string(),
            reason: "the card does not have that many queue pairs",
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn schema_1_reads_and_writes_these_bytes() {
        let text = r#"{"link_up":false,"active_pair_count":3}"#;
        let state: NetStateV1 = serde_json::from_str(text).expect("this is schema 1");
        assert_eq!(
            state,
            NetStateV1 {
                link_up: false,
                active_pair_count: 3
            }
        );
        assert_eq!(serde_json::to_string(&state).expect("it encodes"), text);
    }

    #[test]
    fn an_impossible_pair_count_is_refused_by_name() {
        for count in [0, 3] {
            let state = json!({ "link_up": true, "active_pair_count": count });
            let state: NetStateV1 = serde_json::from_value(state).expect("the form is right");
            let error = state.check(2).expect_err("the card has two pairs");
            assert_eq!(
                error.to_string(),
                format!("saved active_pair_count is {count}: the card does not have that many queue pairs")
            );
        }
    }
}
