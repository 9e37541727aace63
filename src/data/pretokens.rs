//! GPT-2's pre-tokenization by hand, for the ASCII parts of a text.
//!
//! The pattern is `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`.
//! No token of it goes from a character that is not white space to one that is, so a text falls
//! into stretches "white space, then none" that are independent. An ASCII stretch is split here at
//! memory speed; the others are handed over whole, for the regex to split.

/// What a text falls into.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part<'a> {
    /// One pre-token.
    Word(&'a str),
    /// Text with other characters than ASCII: any number of pre-tokens.
    Unsplit(&'a str),
}

/// Calls `each` with the parts of `text`, in order and without a gap; stops at the first error.
pub fn for_each_part<'a, E>(
    text: &'a str,
    mut each: impl FnMut(Part<'a>) -> Result<(), E>,
) -> Result<(), E> {
    let bytes = text.as_bytes();
    let mut start = 0;
    while start < bytes.len() {
        let word = run(bytes, start, is_space);
        let mut end = run(bytes, word, |byte| !is_space(byte));
        if bytes[word..end].is_ascii() {
            split_ascii(text, start, word, end, &mut each)?;
        } else {
            // U+00A0 and its kind are white space too: what follows them belongs to their run.
            while end < bytes.len() && text[..end].ends_with(char::is_whitespace) {
                end = run(bytes, run(bytes, end, is_space), |byte| !is_space(byte));
            }
            each(Part::Unsplit(&text[start..end]))?;
        }
        start = end;
    }
    Ok(())
}

/// `text[start..word]` is white space, `text[word..end]` has none, all is ASCII.
fn split_ascii<'a, E>(
    text: &'a str,
    start: usize,
    word: usize,
    end: usize,
    each: &mut impl FnMut(Part<'a>) -> Result<(), E>,
) -> Result<(), E> {
    let bytes = text.as_bytes();
    if word == end {
        return each(Part::Word(&text[start..end])); // white space at the end of the text
    }
    let mut at = start;
    if word - at > 1 {
        each(Part::Word(&text[at..word - 1]))?;
        at = word - 1;
    }
    if at < word && bytes[at] != b' ' {
        each(Part::Word(&text[at..word]))?;
        at = word;
    }
    while at < end {
        let contraction = match &bytes[at..end] {
            [b'\'', b's' | b't' | b'm' | b'd', ..] => 2,
            [b'\'', b'r', b'e', ..] | [b'\'', b'v', b'e', ..] | [b'\'', b'l', b'l', ..] => 3,
            _ => 0,
        };
        let next = if contraction > 0 {
            at + contraction
        } else {
            let first = at + usize::from(bytes[at] == b' ');
            match bytes[first] {
                byte if byte.is_ascii_alphabetic() => {
                    run(bytes, first, |byte| byte.is_ascii_alphabetic())
                }
                byte if byte.is_ascii_digit() => run(bytes, first, |byte| byte.is_ascii_digit()),
                _ => run(bytes, first, |byte| !is_space(byte) && !byte.is_ascii_alphanumeric()),
            }
            .min(end)
        };
        each(Part::Word(&text[at..next]))?;
        at = next;
    }
    Ok(())
}

/// ASCII's share of Unicode's White_Space.
fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t'..=b'\r')
}

fn run(bytes: &[u8], from: usize, belongs: impl Fn(u8) -> bool) -> usize {
    from + bytes[from..].iter().take_while(|&&byte| belongs(byte)).count()
}
