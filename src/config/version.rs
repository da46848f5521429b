//! Configuration versions: what pins a VM's machine, its document and its saved state, and gates features.
//!
//! A VM keeps its version until its owner raises it, and writes in its own version, so that an older library can take
//! it back. Every version listed in [`ConfigVersion::SUPPORTED`] is built, read and written.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A configuration version. Written `major.minor`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ConfigVersion {
    V1_0,
    V2_0,
}

impl ConfigVersion {
    /// Every version this library knows, oldest first.
    pub const SUPPORTED: [Self; 2] = [Self::V1_0, Self::V2_0];

    /// The version that a new VM gets when its owner asks for no other.
    pub const fn newest() -> Self {
        Self::V2_0
    }

    /// The version as text.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V1_0 => "1.0",
            Self::V2_0 => "2.0",
        }
    }

    /// Checks that a VM of this version has `feature`.
    ///
    /// # Errors
    /// [`NeedsVersion`] with the first version that has it.
    pub fn require(self, feature: Feature) -> Result<(), NeedsVersion> {
        let need = feature.since();
        if self < need {
            return Err(NeedsVersion {
                have: self,
                need,
                feature,
            });
        }
        Ok(())
    }
}

impl fmt::Display for ConfigVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a text is not a configuration version that this library knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseVersionError {
    /// It is a version, of a newer library.
    #[error("configuration version {version} is newer than {newest}, the newest that this library knows")]
    Newer { version: String, newest: ConfigVersion },
    /// It is no version that any library ever wrote.
    #[error("{text:?} is not a configuration version, those known here are {}", known())]
    Unknown { text: String },
}

fn known() -> String {
    ConfigVersion::SUPPORTED.map(ConfigVersion::as_str).join(", ")
}

impl FromStr for ConfigVersion {
    type Err = ParseVersionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(version) = Self::SUPPORTED
            .into_iter()
            .find(|version| version.as_str() == text)
        {
            return Ok(version);
        }
        if numbers(text) > numbers(Self::newest().as_str()) {
            return Err(ParseVersionError::Newer {
                version: text.to_owned(),
                newest: Self::newest(),
            });
        }
        Err(ParseVersionError::Unknown {
            text: text.chars().take(32).collect(),
        })
    }
}

/// The two numbers of a version, when `text` has exactly the form that this library writes.
fn numbers(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once('.')?;
    let numbers = (major.parse().ok()?, minor.parse().ok()?);
    let canonical = format!("{}.{}", numbers.0, numbers.1);
    (canonical == text).then_some(numbers)
}

impl TryFrom<String> for ConfigVersion {
    type Error = ParseVersionError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<ConfigVersion> for String {
    fn from(version: ConfigVersion) -> Self {
        version.as_str().to_owned()
    }
}

/// What a VM can do depending on its version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Feature {
    /// Memory below the start-up size can be taken away from the running guest (balloon).
    RuntimeMemoryBelowStartup,
    /// Memory above the start-up size can be added to the running guest (virtio-mem).
    RuntimeMemoryAboveStartup,
    /// Network cards come and go while the guest runs.
    NicHotPlug,
    /// The guest sees the names of its network cards.
    NicLabel,
    /// The guest's agent has a channel, which production checkpoints need.
    GuestAgent,
    /// The guest learns that it was copied or put back in time.
    VmGenerationId,
}

impl Feature {
    /// Every feature.
    pub const ALL: [Self; 6] = [
        Self::RuntimeMemoryBelowStartup,
        Self::RuntimeMemoryAboveStartup,
        Self::NicHotPlug,
        Self::NicLabel,
        Self::GuestAgent,
        Self::VmGenerationId,
    ];

    /// The first version that has the feature; every later one has it too.
    pub const fn since(self) -> ConfigVersion {
        match self {
            Self::RuntimeMemoryBelowStartup | Self::NicHotPlug => ConfigVersion::V1_0,
            Self::RuntimeMemoryAboveStartup | Self::NicLabel | Self::GuestAgent | Self::VmGenerationId => {
                ConfigVersion::V2_0
            }
        }
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RuntimeMemoryBelowStartup => "runtime memory below the start-up size",
            Self::RuntimeMemoryAboveStartup => "runtime memory above the start-up size",
            Self::NicHotPlug => "network card hot-plug",
            Self::NicLabel => "the network card's name in the guest",
            Self::GuestAgent => "the guest agent channel",
            Self::VmGenerationId => "the vm generation id",
        })
    }
}

/// A feature was asked of a VM whose version does not have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{feature} needs configuration version {need}, the vm has {have}")]
pub struct NeedsVersion {
    /// The VM's version.
    pub have: ConfigVersion,
    /// The first version with the feature.
    pub need: ConfigVersion,
    /// The feature.
    pub feature: Feature,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_versions_and_features() {
        let table = Feature::ALL.map(|feature| {
            let has = ConfigVersion::SUPPORTED.map(|version| version.require(feature).is_ok());
            (feature, has)
        });
        assert_eq!(
            table,
            [
                (Feature::RuntimeMemoryBelowStartup, [true, true]),
                (Feature::RuntimeMemoryAboveStartup, [false, true]),
                (Feature::NicHotPlug, [true, true]),
                (Feature::NicLabel, [false, true]),
                (Feature::GuestAgent, [false, true]),
                (Feature::VmGenerationId, [false, true]),
            ]
        );
        let refused = ConfigVersion::V1_0.require(Feature::GuestAgent).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "the guest agent channel needs configuration version 2.0, the vm has 1.0"
        );
    }

    #[test]
    fn versions_are_in_order_and_the_last_is_the_newest() {
        assert!(ConfigVersion::SUPPORTED.is_sorted());
        assert_eq!(ConfigVersion::SUPPORTED.last(), Some(&ConfigVersion::newest()));
        for version in ConfigVersion::SUPPORTED {
            assert_eq!(version.to_string().parse(), Ok(version));
        }
    }

    #[test]
    fn newer_versions_are_refused_by_name_and_nonsense_as_nonsense() {
        for newer in ["2.1", "3.0", "10.0"] {
            assert_eq!(
                newer.parse::<ConfigVersion>().unwrap_err().to_string(),
                format!(
                    "configuration version {newer} is newer than 2.0, the newest that this library knows"
                )
            );
        }
        for text in [
            "",
            "2",
            "0.9",
            "1.5",
            "3.0 ",
            "+3.0",
            "03.0",
            "3.00",
            "4294967296.0",
            "a.b",
            "2.0.0",
        ] {
            assert_eq!(
                text.parse::<ConfigVersion>().unwrap_err().to_string(),
                format!("{text:?} is not a configuration version, those known here are 1.0, 2.0")
            );
        }
    }
}
