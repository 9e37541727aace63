//! Text to ids and back: exactness, determinism, and what is never lost.

use std::time::Instant;

use isobath::data::tokenizer::Tokenizer;

const AUSTEN: &str = include_str!("../../assets/austen.txt");

#[test]
fn a_trained_tokenizer_gives_back_every_byte() {
    for vocab in [1024, 2048, 4096] {
        let start = Instant::now();
        let tokenizer = Tokenizer::train([AUSTEN], vocab).unwrap();
        let trained = start.elapsed();
        let start = Instant::now();
        let ids = tokenizer.encode_long(AUSTEN).unwrap();
        let encoded = start.elapsed();
        let start = Instant::now();
        let plain_crate: tokenizers::Tokenizer = tokenizer.json().parse().unwrap();
        let one_call = plain_crate.encode_fast(AUSTEN, false).unwrap().get_ids().to_vec();
        let plain = start.elapsed();
        assert_eq!(ids, one_call);
        assert_eq!(tokenizer.vocab(), vocab);
        assert_eq!(tokenizer.end_of_text(), Some(0));
        assert_eq!(tokenizer.decode(&ids).unwrap(), AUSTEN);
        assert_eq!(tokenizer.text_bytes(&ids).unwrap(), AUSTEN.len() as u64);
        assert_eq!(
            tokenizer.encode(&AUSTEN[..500_000]).unwrap(),
            plain_crate.encode_fast(&AUSTEN[..500_000], false).unwrap().get_ids()
        );
        println!(
            "vocabulary {vocab}: {:.3} bytes per token, trained in {trained:?}, encoded in {encoded:?}, plain {plain:?}",
            AUSTEN.len() as f64 / ids.len() as f64
        );
    }
}
