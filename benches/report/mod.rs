//! What the benchmarks with guests share: rounds, medians and a table of ratios.
//!
//! Times on a shared or emulated machine swing by a third and the first of a series is slower. So subjects take turns,
//! the first round is thrown away, medians are compared, and only ratios are told as results.

// Every benchmark uses a part of it.
#![allow(dead_code)]

pub mod kernel_start;

use std::env;
use std::path::{Path, PathBuf};

/// How many rounds count when the command line does not say.
const ROUNDS: usize = 5;

/// The number after `--rounds`, of which the first is thrown away in addition.
pub fn rounds() -> usize {
    let mut words = env::args().skip_while(|word| word != "--rounds").skip(1);
    words
        .next()
        .and_then(|count| count.parse().ok())
        .unwrap_or(ROUNDS)
}

/// The program of an example, which `cargo xtask bench` builds beside the benchmarks.
pub fn example(name: &str) -> Result<PathBuf, String> {
    let this = env::current_exe().map_err(|error| error.to_string())?;
    let folder = this
        .parent()
        .and_then(Path::parent)
        .ok_or("a benchmark lies in target/PROFILE/deps")?;
    let program = folder.join("examples").join(name);
    if program.exists() {
        Ok(program)
    } else {
        Err(format!("{} is not built", program.display()))
    }
}

/// The middle of `values`; 0 when there are none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        count if count % 2 == 1 => sorted[count / 2],
        count => (sorted[count / 2 - 1] + sorted[count / 2]) / 2.0,
    }
}

/// `ours` as a multiple of `theirs`, for a table.
pub fn ratio(ours: f64, theirs: f64) -> String {
    if theirs == 0.0 {
        "-".to_string()
    } else {
        format!("{:.2}x", ours / theirs)
    }
}

/// Prints rows of cells in columns, the first one to the left and the others to the right.
pub fn print(rows: &[Vec<String>]) {
    let column_count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..column_count).map(width).collect();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = widths[column];
            if column == 0 {
                line += &format!("{cell:<width$}");
            } else {
                line += &format!("  {cell:>width$}");
            }
        }
        println!("{}", line.trim_end());
    }
}
