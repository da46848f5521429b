//! How many tests passed, failed and were ignored, read from what the test programs themselves report.

use std::fmt;
use std::fs;
use std::ops::AddAssign;
use std::path::Path;

use crate::failure::{Context, Failure};

/// The beginning of the line in which libtest, and what imitates it, sums a program up.
const SUMMARY: &str = "test result: ";

/// Counts of tests.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Tally {
    /// Those that passed.
    pub passed: u64,
    /// Those that failed.
    pub failed: u64,
    /// Those that were not run although they were asked for.
    pub ignored: u64,
}

impl Tally {
    /// The counts in a summary line; `None` for any other line.
    pub fn of_line(line: &str) -> Option<Self> {
        let (_, counts) = line.trim().strip_prefix(SUMMARY)?.split_once(". ")?;
        let count = |name: &str| {
            let field = counts.split("; ").find_map(|field| field.strip_suffix(name));
            field.and_then(|number| number.trim().parse().ok())
        };
        Some(Tally {
            passed: count(" passed")?,
            failed: count(" failed")?,
            ignored: count(" ignored")?,
        })
    }

    /// The counts of a program that ended with `status`. One that fails without a failed test has failed as a whole.
    pub fn of_program(reported: Option<Self>, status: i32) -> Self {
        let mut tally = reported.unwrap_or_default();
        if status != 0 && tally.failed == 0 {
            tally.failed = 1;
        }
        tally
    }

    /// Leaves the counts for another process.
    pub fn write(self, path: &Path) -> Result<(), Failure> {
        let text = format!("{} {} {}", self.passed, self.failed, self.ignored);
        fs::write(path, text).context(|| format!("write {}", path.display()))
    }

    /// Reads what another process left.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let text = fs::read_to_string(path).context(|| format!("read {}", path.display()))?;
        let counts: Vec<u64> = text
            .split_whitespace()
            .filter_map(|word| word.parse().ok())
            .collect();
        match counts[..] {
            [passed, failed, ignored] => Ok(Tally {
                passed,
                failed,
                ignored,
            }),
            _ => Err(Failure::new(format!("{} holds no counts", path.display()))),
        }
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.ignored += other.ignored;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(passed: u64, failed: u64, ignored: u64) -> Tally {
        Tally {
            passed,
            failed,
            ignored,
        }
    }

    #[test]
    fn both_kinds_of_summary_are_read() {
        let libtest = "test result: ok. 300 passed; 0 failed; 22 ignored; 0 measured; 0 filtered out; finished in 12.66s";
        assert_eq!(Tally::of_line(libtest), Some(tally(300, 0, 22)));
        let mimic = "test result: FAILED. 3 passed; 2 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.01s\n";
        assert_eq!(Tally::of_line(mimic), Some(tally(3, 2, 1)));
        for other in [
            "test result: ",
            "test result: ok. many passed",
            "test a ... ok",
            "",
        ] {
            assert_eq!(Tally::of_line(other), None, "{other:?}");
        }
    }

    #[test]
    fn a_failed_program_is_never_counted_as_passed() {
        assert_eq!(Tally::of_program(Some(tally(3, 0, 1)), 0), tally(3, 0, 1));
        assert_eq!(Tally::of_program(Some(tally(3, 0, 1)), 134), tally(3, 1, 1));
        assert_eq!(Tally::of_program(Some(tally(3, 2, 0)), 101), tally(3, 2, 0));
        assert_eq!(Tally::of_program(None, 0), tally(0, 0, 0));
        assert_eq!(Tally::of_program(None, 1), tally(0, 1, 0));
    }

    #[test]
    fn counts_survive_the_way_through_a_file() {
        let path = std::env::temp_dir().join(format!("xtask-tally-{}", std::process::id()));
        tally(1, 2, 3).write(&path).unwrap();
        let read = Tally::read(&path);
        fs::write(&path, "1 2").unwrap();
        let torn = Tally::read(&path);
        fs::remove_file(&path).unwrap();
        assert_eq!(read.unwrap(), tally(1, 2, 3));
        assert!(torn.unwrap_err().to_string().ends_with("holds no counts"));
    }
}
