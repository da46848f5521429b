//! Asking cargo to build things and to say where they are.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::failure::{Context, Failure};
use crate::paths::Paths;
use crate::process;
use crate::progress::step;

/// An executable that cargo built.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Executable {
    /// The target's name.
    pub name: String,
    /// The target's kind: `test`, `example`, `bench`, `bin`, `lib`.
    pub kind: String,
    /// Where it is.
    pub path: PathBuf,
}

/// A cargo command that works on the workspace.
pub fn command(paths: &Paths) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(&paths.root);
    command
}

/// Makes sure that `cargo SUBCOMMAND` exists; a minimal toolchain comes without `component`.
pub fn ensure_component(paths: &Paths, subcommand: &str, component: &str) -> Result<(), Failure> {
    if process::capture(command(paths).args([subcommand, "--version"])).is_ok() {
        return Ok(());
    }
    step(&format!("install {component}"), || {
        process::run(Command::new("rustup").args(["component", "add", component]))
    })
}

/// Runs cargo with `arguments` and lists the executables among what it built.
pub fn executables(paths: &Paths, arguments: &[&str]) -> Result<Vec<Executable>, Failure> {
    let shown = format!("cargo {}", arguments.join(" "));
    let mut command = command(paths);
    command
        .args(arguments)
        .arg("--message-format=json-render-diagnostics");
    let output = command
        .stderr(Stdio::inherit())
        .output()
        .context(|| format!("start `{shown}`"))?;
    if !output.status.success() {
        return Err(Failure::new(format!("`{shown}` failed: {}", output.status)));
    }
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(executable)
        .collect())
}

/// The executable that a line of cargo's messages reports, if it reports one.
fn executable(line: &str) -> Option<Executable> {
    let message: Value = serde_json::from_str(line).ok()?;
    let target = &message["target"];
    Some(Executable {
        path: message["executable"].as_str()?.into(),
        name: target["name"].as_str()?.to_string(),
        kind: target["kind"][0].as_str()?.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_executables_are_listed() {
        let built = r#"{"reason":"compiler-artifact","target":{"kind":["test"],"name":"kvm"},"executable":"/t/kvm-1"}"#;
        let expected = Executable {
            name: "kvm".into(),
            kind: "test".into(),
            path: "/t/kvm-1".into(),
        };
        assert_eq!(executable(built), Some(expected));
        let library =
            r#"{"reason":"compiler-artifact","target":{"kind":["lib"],"name":"x"},"executable":null}"#;
        assert_eq!(executable(library), None);
        assert_eq!(executable(r#"{"reason":"build-finished","success":true}"#), None);
        assert_eq!(executable("not JSON"), None);
    }
}
