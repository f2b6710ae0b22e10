//! Reading, rendering, masking and tokenising conversations into a cache, beside `encode_batch` alone on the rendered texts,
//! in turns on the same cores: what docs/data.md claims. `scripts/compare_data.py` makes the files.
//!
//!     cargo run --release --example measure_data -- TOKENIZER-DIR chats.jsonl texts.jsonl TURNS

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use ferrotune::data::{DatasetOptions, Records, TokenCache, Tokenizer};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, chats, texts, turns] = args.as_slice() else {
        bail!("expected TOKENIZER-DIR, the conversations, the same rendered, and how many turns")
    };
    let tokenizer = Tokenizer::from_dir(Path::new(model))?;
    let options = DatasetOptions { assistant_only_loss: true, max_seq_length: 1 << 20, ..Default::default() };
    let texts: Vec<String> = Records::open(&[texts])?
        .map(|record| Ok(record?.row["text"].as_str().context("text is no string")?.to_owned()))
        .collect::<Result<_>>()?;
    for turn in 1..=turns.parse().context("TURNS")? {
        let folder = tempfile::tempdir()?;
        let begun = Instant::now();
        let cache = TokenCache::new(folder.path());
        let (data, report) = cache.prepare(&[chats], &tokenizer, &options, &mut |_| {})?;
        let prepared = begun.elapsed().as_secs_f64();

        let begun = Instant::now();
        let mut tokens = 0;
        for chunk in texts.chunks(1024) {
            let inputs: Vec<&str> = chunk.iter().map(String::as_str).collect();
            let encodings =
                tokenizer.inner().encode_batch(inputs, false).map_err(|error| anyhow!("{error}"))?;
            tokens += encodings.iter().map(|encoding| encoding.len() as u64).sum::<u64>();
        }
        let alone = begun.elapsed().as_secs_f64();
        if tokens != data.num_tokens() {
            bail!("{tokens} tokens alone, {} prepared", data.num_tokens());
        }
        println!(
            "turn {turn}: {} rows, {:.0} tokens each; prepared in {prepared:.2} s, encode_batch alone {alone:.2} s: {:.3} of it",
            report.rows,
            tokens as f64 / report.rows as f64,
            alone / prepared
        );
    }
    Ok(())
}
