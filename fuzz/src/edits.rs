//! Changes to a JSON value at places that the input chooses, so that most of a saved state stays plausible.

use arbitrary::Arbitrary;
use serde_json::{Map, Value, json};

/// One change at one place.
#[derive(Debug, Arbitrary)]
pub struct Edit {
    /// Which member to go to, level by level, modulo the number of members.
    path: Vec<u8>,
    change: Change,
}

#[derive(Debug, Arbitrary)]
enum Change {
    Null,
    Flag(bool),
    Byte(u8),
    Word(u32),
    Long(u64),
    Negative(i64),
    Fraction(f64),
    Text(String),
    List(Vec<u8>),
    Empty,
    Remove,
    /// The value becomes a list of this many of it.
    Repeat(u8),
}

/// Does all `edits` to `value`, but only one repetition, or the value could fill all memory.
pub fn damage(value: &mut Value, edits: &[Edit]) {
    let mut repeated = false;
    for edit in edits {
        let repeats = matches!(edit.change, Change::Repeat(_));
        if !(repeats && repeated) {
            edit.apply(value);
        }
        repeated |= repeats;
    }
}

impl Edit {
    fn apply(&self, value: &mut Value) {
        let mut place = value;
        for (depth, step) in self.path.iter().enumerate() {
            let last = depth + 1 == self.path.len();
            if last && matches!(self.change, Change::Remove) {
                return remove(place, *step);
            }
            let count = place.as_array().map_or(0, Vec::len) + place.as_object().map_or(0, Map::len);
            if count == 0 {
                break;
            }
            let index = usize::from(*step) % count;
            let next = match place {
                Value::Array(members) => members.get_mut(index),
                Value::Object(members) => members.values_mut().nth(index),
                _ => None,
            };
            place = next.expect("the index is below the count");
        }
        self.replace(place);
    }

    fn replace(&self, place: &mut Value) {
        *place = match &self.change {
            Change::Null | Change::Remove => Value::Null,
            Change::Flag(flag) => json!(flag),
            Change::Byte(number) => json!(number),
            Change::Word(number) => json!(number),
            Change::Long(number) => json!(number),
            Change::Negative(number) => json!(number),
            Change::Fraction(number) => json!(number),
            Change::Text(text) => json!(text),
            Change::List(numbers) => json!(numbers),
            Change::Empty => json!({}),
            Change::Repeat(count) => Value::Array(vec![place.take(); usize::from(*count)]),
        };
    }
}

fn remove(place: &mut Value, step: u8) {
    let index = usize::from(step);
    match place {
        Value::Array(members) if !members.is_empty() => {
            members.remove(index % members.len());
        }
        Value::Object(members) if !members.is_empty() => {
            let name = members.keys().nth(index % members.len()).cloned();
            members.remove(&name.expect("the index is below the count"));
        }
        _ => {}
    }
}
