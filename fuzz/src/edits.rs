//! Changes to a JSON value at places that the input chooses, so that most of a saved state stays plausible.

use arbitrary::Arbitrary;
use serde_json::{Map, Value, json};

/// So few that what one edit makes grow, the others do not make grow too far.
const EDITS_MAX: usize = 12;

/// One change at one place.
#[derive(Debug, Arbitrary)]
pub struct Edit {
    /// Which member to go to, level by level, modulo the number of members.
    path: Vec<u8>,
    change: Change,
}

#[derive(Debug, Arbitrary)]
enum Change {
    /// Another value of the same type: what most checks look at.
    Small(u8),
    Large(u64),
    Text(String),
    /// A value of another type.
    Other(u8),
    Remove,
    /// The value becomes a list of this many of it.
    Repeat(u8),
}

/// Does the first of `edits` to `value`, but only one repetition, or the value could fill all memory.
pub fn damage(value: &mut Value, edits: &[Edit]) {
    let mut repeated = false;
    for edit in edits.iter().take(EDITS_MAX) {
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
            Change::Small(number) => return adapt(place, (*number).into()),
            Change::Large(number) => return adapt(place, *number),
            Change::Text(text) => json!(text),
            Change::Other(number) => match number % 8 {
                0 => json!(-1),
                1 => json!(0.5),
                2 => json!([]),
                3 => json!({}),
                4 => json!("0"),
                5 => json!(true),
                6 => json!(7),
                _ => Value::Null,
            },
            Change::Remove => Value::Null,
            Change::Repeat(count) => Value::Array(vec![place.take(); usize::from(*count)]),
        };
    }
}

/// Makes `number` of a number, a flag of a flag, and another length of a list or a text.
fn adapt(place: &mut Value, number: u64) {
    let length = (number % 8192) as usize;
    match place {
        Value::Null => *place = json!(number),
        Value::Bool(flag) => *flag = number % 2 == 1,
        Value::Number(value) if value.is_i64() && number > u64::MAX / 2 => *place = json!(number as i64),
        Value::Number(_) => *place = json!(number),
        Value::String(text) => *text = text.chars().cycle().take(length).collect(),
        Value::Array(members) => {
            let member = members.last().cloned().unwrap_or(Value::Null);
            // Lists of lists grow by one, or a few edits would fill all memory.
            let length_max = if member.is_array() || member.is_object() {
                members.len() + 1
            } else {
                length
            };
            members.resize(length.min(length_max), member);
        }
        Value::Object(_) => remove(place, number as u8),
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
