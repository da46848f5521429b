//! The words of a command line, quoted as in a shell.
//!
//! Words are separated by white space. `'…'` takes everything as it is; `"…"` does too, except that a backslash takes
//! the next character as it is, as it does outside quotes. Quoted and bare parts that touch are one word.

/// Splits `line` into its words.
///
/// # Errors
/// A quote or a backslash at the end of the line that nothing follows.
pub fn split(line: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        if character.is_whitespace() {
            words.extend(word.take());
            continue;
        }
        let word = word.get_or_insert_default();
        match character {
            '\'' | '"' => quoted(character, &mut characters, word)?,
            '\\' => word.push(escaped(&mut characters)?),
            _ => word.push(character),
        }
    }
    words.extend(word);
    Ok(words)
}

fn quoted(quote: char, characters: &mut std::str::Chars<'_>, word: &mut String) -> Result<(), String> {
    loop {
        match characters.next() {
            None => return Err(format!("the quote {quote} is not closed")),
            Some(character) if character == quote => return Ok(()),
            Some('\\') if quote == '"' => word.push(escaped(characters)?),
            Some(character) => word.push(character),
        }
    }
}

fn escaped(characters: &mut std::str::Chars<'_>) -> Result<char, String> {
    characters
        .next()
        .ok_or_else(|| "nothing follows the backslash at the end".to_owned())
}
