//! Commands and their replies, in order.
//!
//! A `memory` command waits for the guest, perhaps for minutes, and nobody must have to wait with it who wants to cut
//! the power or has another size in mind: until it is answered, `power-off`, `quit` and another `memory` take effect as
//! soon as they are read, and the others when everything before them is answered. Every reply keeps its place.

use std::collections::VecDeque;
use std::io::BufRead;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use serde_json::{Value, json};
use vm_lifecycle::vm::Vm;

use crate::memory::{self, Resize};
use crate::{commands, print, words};

/// What the session is woken by.
pub enum Input {
    Line(String),
    /// The end of the commands.
    End,
    /// A resize may have ended.
    Settled,
}

type Answer = Result<Value, String>;

/// A command that is not answered yet.
enum Waiting {
    Line(String),
    Resize { command: String, resize: Resize },
    Done { command: String, answer: Answer },
}

/// One VM and the commands for it.
pub struct Session {
    vm: Vm,
    sender: Sender<Input>,
    inputs: Receiver<Input>,
    /// In command order.
    waiting: VecDeque<Waiting>,
    input_ended: bool,
    quits: bool,
}

impl Session {
    pub fn new(vm: Vm) -> Self {
        let (sender, inputs) = channel();
        Self {
            vm,
            sender,
            inputs,
            waiting: VecDeque::new(),
            input_ended: false,
            quits: false,
        }
    }

    /// Serves the lines of `input` until `quit` or their end. The thread that reads them ends with the process.
    pub fn run(mut self, input: impl BufRead + Send + 'static) {
        let sender = self.sender.clone();
        thread::spawn(move || {
            // What is not UTF-8 is no command's name: the reply says so.
            let text = |line: Vec<u8>| Input::Line(String::from_utf8_lossy(&line).into_owned());
            let lines = input.split(b'\n').map_while(Result::ok).map(text);
            let _ = lines.chain([Input::End]).try_for_each(|input| sender.send(input));
        });
        while !(self.waiting.is_empty() && (self.quits || self.input_ended)) {
            match self.inputs.recv() {
                Ok(Input::Line(line)) if !self.quits => self.take(line),
                Ok(Input::Line(_) | Input::Settled) => {}
                Ok(Input::End) | Err(_) => self.input_ended = true,
            }
            self.answer_those_that_can_be();
        }
    }

    /// Takes effect now, or waits for its turn.
    fn take(&mut self, line: String) {
        let first = line.split_whitespace().next().unwrap_or_default();
        if self.waiting.is_empty() || matches!(first, "memory" | "power-off" | "quit") {
            let done = self.execute(&line);
            self.waiting.extend(done);
        } else {
            self.waiting.push_back(Waiting::Line(line));
        }
    }

    fn answer_those_that_can_be(&mut self) {
        while let Some(first) = self.waiting.pop_front() {
            match first {
                Waiting::Line(line) => {
                    if let Some(done) = self.execute(&line) {
                        self.waiting.push_front(done);
                    }
                }
                Waiting::Resize { command, resize } => match resize.answer() {
                    Some(answer) => reply(&command, answer),
                    None => return self.waiting.push_front(Waiting::Resize { command, resize }),
                },
                Waiting::Done { command, answer } => reply(&command, answer),
            }
        }
    }

    /// Runs the command in `line`, if there is one; of a resize, its beginning.
    fn execute(&mut self, line: &str) -> Option<Waiting> {
        let words = match words::split(line) {
            Ok(words) => words,
            Err(error) => {
                let command = line.split_whitespace().next().unwrap_or_default().to_owned();
                let answer = Err(error);
                return Some(Waiting::Done { command, answer });
            }
        };
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        let (&command, rest) = words.split_first()?;
        let name = command.to_owned();
        let answer = match (command, rest) {
            ("memory", [target]) => memory::begin(&self.vm, target, None),
            ("memory", [target, seconds]) => memory::begin(&self.vm, target, Some(seconds)),
            ("quit", []) => {
                self.quits = true;
                if !self.waiting.is_empty() {
                    // Ends what is waited for. A VM that is off refuses it, and nothing goes on there.
                    let _ = self.vm.power_off();
                }
                Err(Ok(json!({})))
            }
            _ => Err(commands::run(&self.vm, command, rest)),
        };
        Some(match answer {
            Ok(resize) => {
                resize.watch(self.sender.clone());
                Waiting::Resize {
                    command: name,
                    resize,
                }
            }
            Err(answer) => Waiting::Done {
                command: name,
                answer,
            },
        })
    }
}

fn reply(command: &str, answer: Answer) {
    print(&match answer {
        Ok(Value::Object(fields)) => {
            let mut reply = json!({ "reply": command, "ok": true });
            reply.as_object_mut().expect("made as an object").extend(fields);
            reply
        }
        Ok(_) => json!({ "reply": command, "ok": true }),
        Err(error) => json!({ "reply": command, "ok": false, "error": error }),
    });
}
