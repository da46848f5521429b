//! What the outside asks of the agent in the test host, and how its answer comes back: files in the control share.
//!
//! ```text
//! agent     path of this program, the same inside and outside     order.json  the command
//! out       path of the folder for results                        status      the exit status, written last
//! keep-tmp  present when /tmp must stay the outer one
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::failure::{Context, Failure};

/// A command to run in the test host, as it would be run outside.
#[derive(Clone, Debug)]
pub struct Order {
    /// Program and arguments.
    pub words: Vec<String>,
    /// Its whole environment.
    pub environment: BTreeMap<String, String>,
    /// Where it starts.
    pub folder: PathBuf,
    /// The test host's kernel modules, shown to the command as `/lib/modules/<release>`.
    pub modules: PathBuf,
}

impl Order {
    /// Writes the order into the control share.
    pub fn write(&self, control: &Path) -> Result<(), Failure> {
        let order = json!({
            "words": self.words,
            "environment": self.environment,
            "folder": self.folder.to_string_lossy(),
            "modules": self.modules.to_string_lossy(),
        });
        let path = control.join("order.json");
        fs::write(&path, order.to_string()).context(|| format!("write {}", path.display()))
    }

    /// Reads the order out of the control share.
    pub fn read(control: &Path) -> Result<Self, Failure> {
        let path = control.join("order.json");
        let text = fs::read_to_string(&path).context(|| format!("read {}", path.display()))?;
        let order: Value = serde_json::from_str(&text).context(|| format!("read {}", path.display()))?;
        let strings = |value: &Value| -> Option<Vec<String>> {
            value
                .as_array()?
                .iter()
                .map(|word| Some(word.as_str()?.to_string()))
                .collect()
        };
        let parse = || {
            let environment = order["environment"].as_object()?.iter();
            Some(Order {
                words: strings(&order["words"])?,
                environment: environment
                    .map(|(name, value)| Some((name.clone(), value.as_str()?.to_string())))
                    .collect::<Option<_>>()?,
                folder: order["folder"].as_str()?.into(),
                modules: order["modules"].as_str()?.into(),
            })
        };
        parse().ok_or_else(|| Failure::new(format!("{} is not an order", path.display())))
    }

    /// The command itself.
    pub fn command(&self) -> Result<Command, Failure> {
        let (program, arguments) = self
            .words
            .split_first()
            .ok_or_else(|| Failure::new("there is no command to run"))?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .envs(&self.environment)
            .current_dir(&self.folder);
        Ok(command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_survives_the_share() {
        let folder = std::env::temp_dir().join(format!("xtask-order-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let order = Order {
            words: vec!["sh".into(), "-c".into(), "echo \"a b\"\n'".into()],
            environment: BTreeMap::from([("PATH".into(), "/bin".into())]),
            folder: "/srv/crate".into(),
            modules: "/m".into(),
        };
        order.write(&folder).unwrap();
        let read = Order::read(&folder).unwrap();
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(read.words, order.words);
        assert_eq!(read.environment, order.environment);
        assert_eq!(read.folder, order.folder);
    }
}
