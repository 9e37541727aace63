//! Text to ids and back: exactness, determinism, and what is never lost.

use isobath::data::tokenizer::{BYTE_VOCAB, Tokenizer};
use isobath::random::Philox;
use serde_json::Value;

use super::{AUSTEN, assert_message};

/// White space of all kinds, contractions, digits, letters and symbols in and outside ASCII.
const NASTY: [&str; 32] = [
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "\u{b}",
    "\u{a0}",
    "\u{2003}",
    "\u{85}",
    "\u{1c}",
    "\0",
    "'s",
    "'ll",
    "'",
    "''",
    "x",
    "Q",
    "abc",
    "7",
    "42",
    "\u{663}",
    "\u{2167}",
    "!",
    "...",
    "_",
    "é",
    "\u{301}",
    "中文",
    "。",
    "🙂",
    "<|endoftext|>",
];

fn nasty_text(seed: u64, parts: u64) -> String {
    let random = Philox::new(seed, 0);
    (0..parts).map(|i| NASTY[random.at(i)[0] as usize % NASTY.len()]).collect()
}

fn austen(vocab: usize) -> Tokenizer {
    Tokenizer::train([AUSTEN], vocab).unwrap()
}

/// The same tokenizer with other settings.
fn changed(tokenizer: &Tokenizer, change: impl FnOnce(&mut Value)) -> Tokenizer {
    let mut layout: Value = serde_json::from_str(tokenizer.json()).unwrap();
    change(&mut layout);
    Tokenizer::from_json(layout.to_string().as_bytes(), "changed".as_ref()).unwrap()
}

fn plain_crate(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    let mut plain: tokenizers::Tokenizer = tokenizer.json().parse().unwrap();
    plain.set_encode_special_tokens(true);
    plain.encode(text, false).unwrap().get_ids().to_vec()
}

#[test]
fn austen_comes_back_byte_for_byte() {
    for (vocab, bytes_per_token) in [(1024, 2.75), (2048, 3.30), (4096, 3.75)] {
        let tokenizer = austen(vocab);
        let ids = tokenizer.encode_long(AUSTEN).unwrap();
        assert_eq!((tokenizer.vocab(), tokenizer.end_of_text()), (vocab, Some(0)));
        assert!(tokenizer.decode(&ids).unwrap() == AUSTEN, "vocabulary {vocab}");
        assert_eq!(tokenizer.text_bytes(&ids).unwrap(), AUSTEN.len() as u64);
        assert!(AUSTEN.len() as f64 / ids.len() as f64 >= bytes_per_token - 0.01);
    }
}

#[test]
fn pieces_and_known_words_give_the_ids_of_the_crates_own_call() {
    let tokenizer = austen(1024);
    assert!(tokenizer.encode_long(AUSTEN).unwrap() == plain_crate(&tokenizer, AUSTEN));
    for seed in 0..200 {
        let text = nasty_text(seed, 1 + seed * 7 % 300);
        assert_eq!(tokenizer.encode(&text).unwrap(), plain_crate(&tokenizer, &text), "{text:?}");
        assert_eq!(tokenizer.decode(&tokenizer.encode(&text).unwrap()).unwrap(), text);
    }
    let long = nasty_text(1000, 200_000);
    assert!(tokenizer.encode_long(&long).unwrap() == plain_crate(&tokenizer, &long));
}

#[test]
fn pieces_of_tokenizers_that_look_back_give_the_ids_of_one_call() {
    let trained = austen(1024);
    let text = &AUSTEN[..1_000_000];
    let prefix = changed(&trained, |layout| {
        layout["pre_tokenizer"]["add_prefix_space"] = true.into();
    });
    // Llama 3's pattern: punctuation takes the newlines after it along.
    let pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let llama3 = changed(&trained, |layout| {
        layout["pre_tokenizer"] = serde_json::json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        ]});
    });
    for tokenizer in [prefix, llama3] {
        assert!(tokenizer.encode_long(text).unwrap() == plain_crate(&tokenizer, text));
    }
}

#[test]
fn training_twice_gives_the_same_tokenizer() {
    let (first, second) = (austen(700), austen(700));
    assert_eq!(first.json(), second.json());
    assert_eq!(first.fingerprint(), second.fingerprint());
    assert_ne!(first.fingerprint(), austen(701).fingerprint());
}

#[test]
fn a_vocabulary_below_the_alphabet_or_no_text_is_refused() {
    assert_message(Tokenizer::train(["text"], 256), &["256 entries", "at least 257"]);
    assert_message(Tokenizer::train([""], 300), &["no text"]);
    let small = Tokenizer::train(["ab ab"], 1000).unwrap();
    assert_eq!(small.vocab(), 258, "the bytes, the end, `ab`, and no pair occurs twice after it");
}

#[test]
fn bytes_are_their_own_ids_also_for_other_programs() {
    let bytes = Tokenizer::bytes().unwrap();
    assert_eq!((bytes.vocab(), bytes.end_of_text()), (BYTE_VOCAB, Some(256)));
    for text in ["", "a\0é🙂<|endoftext|>", &nasty_text(1, 500)] {
        let ids = bytes.encode(text).unwrap();
        assert_eq!(ids, text.bytes().map(u32::from).collect::<Vec<_>>());
        assert_eq!(ids, plain_crate(&bytes, text));
        assert_eq!(bytes.decode(&ids).unwrap(), text);
    }
    assert_eq!(bytes.decode(&[104, 105, 256]).unwrap(), "hi<|endoftext|>");
    assert_eq!(bytes.text_bytes(&[104, 105, 256]).unwrap(), 2);
    let again = Tokenizer::from_json(bytes.json().as_bytes(), "again".as_ref()).unwrap();
    assert_eq!(again.fingerprint(), bytes.fingerprint());
}

#[test]
fn settings_that_lose_text_are_ignored() {
    let truncating = changed(&austen(300), |layout| {
        layout["truncation"] = serde_json::json!({
            "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
        });
        layout["padding"] = serde_json::json!({
            "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"
        });
    });
    let ids = truncating.encode("a text that is longer than four tokens").unwrap();
    assert_eq!(truncating.decode(&ids).unwrap(), "a text that is longer than four tokens");
}

#[test]
fn the_end_of_text_is_found_by_name_or_not_at_all() {
    let trained = austen(300);
    for (name, expected) in [("</s>", Some(0)), ("[EOS]", Some(0)), ("<|stop|>", None)] {
        let renamed: String = trained.json().replace("<|endoftext|>", name);
        let tokenizer = Tokenizer::from_json(renamed.as_bytes(), name.as_ref()).unwrap();
        assert_eq!(tokenizer.end_of_text(), expected, "{name}");
    }
}

#[test]
fn a_stream_gives_only_whole_characters_and_all_of_them() {
    let text = format!("plain é 中文 🙂🙂 {}", nasty_text(4, 200));
    for tokenizer in [Tokenizer::bytes().unwrap(), austen(400)] {
        let mut stream = tokenizer.stream();
        let mut shown = String::new();
        for id in tokenizer.encode(&text).unwrap() {
            let fresh = stream.push(id).unwrap();
            assert!(!fresh.contains(char::REPLACEMENT_CHARACTER), "{fresh:?} after {shown:?}");
            shown += &fresh;
        }
        shown += &stream.finish().unwrap();
        assert_eq!(shown, text);
    }
}

#[test]
fn a_stream_of_broken_characters_goes_on() {
    let bytes = Tokenizer::bytes().unwrap();
    let mut stream = bytes.stream();
    let ids = [b'a', 0xF0, 0x9F, b'b', 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, b'c', 0xC3].map(u32::from);
    let mut shown: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    shown += &stream.finish().unwrap();
    assert_eq!(shown, bytes.decode(&ids).unwrap());
}

#[test]
fn unknown_ids_and_broken_files_are_named() {
    assert_message(Tokenizer::bytes().unwrap().decode(&[257]), &["no token 257", "257 ids"]);
    assert_message(austen(300).decode(&[5, 300]), &["no token 300"]);
    assert_message(Tokenizer::open("/nowhere/tokenizer.json"), &["/nowhere/tokenizer.json"]);
    let broken = Tokenizer::from_json(b"{\"model\": 3}", "some.json".as_ref());
    assert_message(broken, &["some.json", "cannot be used as a tokenizer"]);
}
