//! The command line.

use std::num::{IntErrorKind, ParseIntError};
use std::path::PathBuf;

use vm_lifecycle::config::{DiskSpec, NicSpec, VmConfig, VmConfigBuilder};

/// What the command line asks for.
pub struct Arguments {
    /// Where the VM is kept.
    pub state_dir: PathBuf,
    /// The file that takes the guest's serial console.
    pub console: Option<PathBuf>,
    /// The new VM to make; without it the VM in `state_dir` is opened.
    pub new_vm: Option<VmConfigBuilder>,
}

impl Arguments {
    /// Reads the words after the program's name.
    pub fn parse(mut words: impl Iterator<Item = String>) -> Result<Self, String> {
        let (mut state_dir, mut console, mut options) = (None, None, Vec::new());
        while let Some(option) = words.next() {
            let value = words.next().ok_or_else(|| format!("{option} needs a value"))?;
            match option.as_str() {
                "--state-dir" => state_dir = Some(PathBuf::from(value)),
                "--console" => console = Some(PathBuf::from(value)),
                _ => options.push((option, value)),
            }
        }
        let state_dir = state_dir.ok_or("--state-dir is missing")?;
        let new_vm = if options.is_empty() {
            None
        } else {
            Some(new_vm(options)?)
        };
        Ok(Self {
            state_dir,
            console,
            new_vm,
        })
    }
}

fn new_vm(options: Vec<(String, String)>) -> Result<VmConfigBuilder, String> {
    let required = |wanted: &str| {
        let found = options.iter().rev().find(|(option, _)| option == wanted);
        found
            .map(|(_, value)| value.clone())
            .ok_or_else(|| format!("a new vm needs {wanted}"))
    };
    let kernel = absolute(&required("--kernel")?).map_err(|error| format!("--kernel: {error}"))?;
    let mut builder = VmConfig::builder(required("--name")?, kernel);
    for (option, value) in options {
        let failed = |error: &dyn std::fmt::Display| format!("{option} {value:?}: {error}");
        builder = match option.as_str() {
            "--name" | "--kernel" => builder,
            "--initrd" => builder.initrd(absolute(&value).map_err(|error| failed(&error))?),
            "--cmdline" => builder.cmdline(&value),
            "--cpus" => builder.cpus(value.parse().map_err(|error| failed(&error))?),
            "--memory" => builder.startup_bytes(size(&value).map_err(|error| failed(&error))?),
            "--memory-max" => builder.maximum_bytes(size(&value).map_err(|error| failed(&error))?),
            "--memory-min" => builder.minimum_bytes(size(&value).map_err(|error| failed(&error))?),
            "--overcommit" => builder.overcommit(value.parse().map_err(|error| failed(&error))?),
            "--deflate-on-oom" => builder.deflate_on_oom(value.parse().map_err(|error| failed(&error))?),
            "--disk" => builder.disk(disk(&value).map_err(|error| failed(&error))?),
            "--nic" => builder.nic(nic(&value).map_err(|error| failed(&error))?),
            "--config-version" => builder.version(value.parse().map_err(|error| failed(&error))?),
            _ => return Err(format!("unknown option {option}")),
        };
    }
    Ok(builder)
}

/// A VM's paths are absolute, so that it can be opened from anywhere.
fn absolute(path: &str) -> Result<PathBuf, String> {
    std::path::absolute(path).map_err(|error| format!("path {path:?}: {error}"))
}

/// Reads a size like `512M` or `2G`; without a letter it is bytes.
pub fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        Some(b'T' | b't') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let too_much = || "2^64 bytes or more".to_owned();
    let number: u64 = digits
        .parse()
        .map_err(|error: ParseIntError| match error.kind() {
            IntErrorKind::PosOverflow => too_much(),
            _ => "expected a number of bytes, or one with K, M, G or T behind it".to_owned(),
        })?;
    number.checked_mul(1 << shift).ok_or_else(too_much)
}

/// The `key=value` pairs and bare words of a device option, each given once. A comma in a value is written twice.
fn fields(text: &str) -> Result<Vec<(String, Option<String>)>, String> {
    let mut parts = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        match parts.last_mut() {
            Some(_) if character == ',' && characters.next_if_eq(&',').is_none() => {
                parts.push(String::new());
            }
            Some(part) => part.push(character),
            None => {}
        }
    }
    let mut fields: Vec<(String, Option<String>)> = Vec::new();
    for part in parts {
        let (key, value) = match part.split_once('=') {
            Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
            None => (part, None),
        };
        if fields.iter().any(|(other, _)| *other == key) {
            return Err(format!("{key:?} is given twice"));
        }
        fields.push((key, value));
    }
    Ok(fields)
}

fn disk(text: &str) -> Result<DiskSpec, String> {
    let (mut name, mut path, mut read_only) = (None, None, false);
    for field in fields(text)? {
        match (field.0.as_str(), field.1) {
            ("name", Some(value)) => name = Some(value),
            ("path", Some(value)) => path = Some(value),
            ("readonly", None) => read_only = true,
            (key, _) => {
                return Err(format!(
                    "{key:?} is no field, has no value or wants none; expected name=N,path=P[,readonly]"
                ));
            }
        }
    }
    let spec = DiskSpec::new(
        name.ok_or("name= is missing")?,
        absolute(&path.ok_or("path= is missing")?)?,
    );
    Ok(spec.read_only(read_only))
}

/// A network card.
pub fn nic(text: &str) -> Result<NicSpec, String> {
    let (mut name, mut tap, mut mac) = (None, None, None);
    for field in fields(text)? {
        match (field.0.as_str(), field.1) {
            ("name", Some(value)) => name = Some(value),
            ("tap", Some(value)) => tap = Some(value),
            ("mac", Some(value)) => mac = Some(value),
            (key, _) => {
                return Err(format!(
                    "{key:?} is no field or has no value; expected name=N,tap=T[,mac=M]"
                ));
            }
        }
    }
    let spec = NicSpec::new(name.ok_or("name= is missing")?, tap.ok_or("tap= is missing")?);
    Ok(match mac {
        Some(mac) => spec.mac(
            mac.parse()
                .map_err(|error: vm_lifecycle::ids::IdError| error.to_string())?,
        ),
        None => spec,
    })
}
