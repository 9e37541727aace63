//! What the user probably meant: the nearest of the names that exist.

use strsim::damerau_levenshtein;

fn distance(given: &str, name: &str) -> usize {
    damerau_levenshtein(&given.to_lowercase(), &name.to_lowercase())
}

/// Distance between dotted keys: of the whole keys, or of their last parts if the table is wrong.
fn key_distance(given: &str, key: &str) -> usize {
    let last = |key: &str| key.rsplit('.').next().map(str::to_string).unwrap_or_default();
    distance(given, key).min(1 + distance(&last(given), &last(key)))
}

/// The nearest of `keys`, the first one on a tie.
pub fn nearest_key<'a>(given: &str, keys: &[&'a str]) -> Option<&'a str> {
    keys.iter().copied().min_by_key(|key| key_distance(given, key))
}

/// "use `lns` or `pre`", the nearest one first.
pub fn one_of(given: &str, names: &[&str]) -> String {
    some_of(given, names, names.len())
}

/// As [`one_of`], but no more than `count` of them.
pub fn some_of(given: &str, names: &[&str], count: usize) -> String {
    let mut names = names.to_vec();
    names.sort_by_key(|name| distance(given, name));
    names.truncate(count);
    let quoted: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    match quoted.split_last() {
        None => "there is none to use".to_string(),
        Some((last, [])) => format!("use {last}"),
        Some((last, others)) => format!("use {} or {last}", others.join(", ")),
    }
}
