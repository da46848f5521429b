//! What the reader sees: numbered steps, and under each what was expected, what was seen, and whether that is right.

use std::fmt::Display;
use std::time::Instant;

use libtest_mimic::Failed;

/// Prints the tour and counts its checks.
pub struct Report {
    began: Instant,
    step_count: usize,
    ok_count: usize,
    failed: Vec<String>,
}

impl Report {
    /// A report without steps.
    pub fn new() -> Self {
        Self {
            began: Instant::now(),
            step_count: 0,
            ok_count: 0,
            failed: Vec::new(),
        }
    }

    /// Begins the next step.
    pub fn begin(&mut self, title: &str) {
        self.step_count += 1;
        println!("\n{:2}. {title}", self.step_count);
    }

    /// Says what happens, in as many lines as `text` has.
    pub fn say(&self, text: impl Display) {
        for line in text.to_string().lines() {
            println!("    {line}");
        }
    }

    /// Checks that what was seen is what was expected.
    pub fn equal<T: PartialEq + Display>(&mut self, what: &str, expected: T, seen: T) {
        let holds = expected == seen;
        self.check(what, expected, seen, holds);
    }

    /// Notes a check that the caller has made.
    pub fn check(&mut self, what: &str, expected: impl Display, seen: impl Display, holds: bool) {
        let verdict = if holds { "ok    " } else { "FAILED" };
        println!("      {verdict}  {what}: expected {expected}; saw {seen}");
        if holds {
            self.ok_count += 1;
        } else {
            self.failed.push(format!("step {}: {what}", self.step_count));
        }
    }

    /// Notes that a step could not go on.
    pub fn broke_off(&mut self, error: &Failed) {
        let why = error.message().unwrap_or("it does not say why");
        println!("      FAILED  the step cannot go on: {why}");
        let step = self.step_count;
        self.failed.push(format!(
            "step {step} broke off, and what follows it was not shown"
        ));
    }

    /// Prints the summary and tells whether every check of every step held.
    pub fn finish(self, step_count: usize) -> bool {
        println!(
            "\nThe tour is over after {:.0} s: {} of {step_count} steps, {} checks ok, {} failed.",
            self.began.elapsed().as_secs_f64(),
            self.step_count,
            self.ok_count,
            self.failed.len()
        );
        for failed in &self.failed {
            println!("  FAILED  {failed}");
        }
        self.failed.is_empty() && self.step_count == step_count
    }
}
