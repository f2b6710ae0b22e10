//! Tokenised datasets on disk: the same as in memory, found again, and made again when anything changes.

use std::fs;
use std::sync::Arc;

use ferrotune::data::{
    BatchOptions, BatchStream, ChatTemplate, DatasetOptions, DatasetReport, TokenCache, TokenDataset,
    Tokenizer, prepare,
};
use serde_json::json;
use tempfile::TempDir;

use super::{tokenizer, write};

fn rows(n: usize) -> String {
    let row = |n: usize| {
        let question = json!({"role": "user", "content": format!("question {n}")});
        let answer = json!({"role": "assistant", "content": if n % 7 == 3 { String::new() } else { "word ".repeat(n % 50) }});
        format!("{}\n", json!({"messages": [question, answer]}))
    };
    (0..n).map(row).collect()
}

struct Cached {
    folder: TempDir,
    made: usize,
}

impl Cached {
    fn prepare(
        &mut self,
        file: &str,
        tokenizer: &Tokenizer,
        options: &DatasetOptions,
    ) -> (TokenDataset, DatasetReport) {
        let cache = TokenCache::new(&self.folder.path().join("cache"));
        let mut rows = 0;
        let result = cache.prepare(&[file], tokenizer, options, &mut |seen| rows = seen).unwrap();
        self.made += usize::from(rows > 0);
        result
    }

    fn folders(&self) -> usize {
        fs::read_dir(self.folder.path().join("cache")).unwrap().count()
    }
}

#[test]
fn the_cache_holds_what_memory_holds_and_follows_every_change() {
    let mut cached = Cached { folder: TempDir::new().unwrap(), made: 0 };
    let file = write(&cached.folder, "rows.jsonl", rows(3000));
    let chatml = tokenizer("chatml");
    let options = DatasetOptions { assistant_only_loss: true, max_seq_length: 40, ..Default::default() };
    let in_memory = prepare(&[&file], &chatml, &options).unwrap();
    assert!(in_memory.1.truncated > 0 && in_memory.1.findings.iter().count() > 0);
    for _ in 0..2 {
        let mapped = cached.prepare(&file, &chatml, &options);
        assert_eq!(mapped, in_memory);
        assert_eq!(mapped.0.fingerprint(), in_memory.0.fingerprint());
        assert_eq!(mapped.0.split(0.1, 3), in_memory.0.split(0.1, 3));
    }
    assert_eq!((cached.made, cached.folders()), (1, 1));

    // Batches come alike from both.
    let batches = |data: &TokenDataset| {
        let options =
            BatchOptions { batch_size: 8, max_seq_length: 64, packing: true, shuffle: true, seed: 1 };
        let mut stream = BatchStream::new(Arc::new(data.clone()), options).unwrap();
        (0..20).map(|_| stream.next_batch().unwrap().unwrap()).collect::<Vec<_>>()
    };
    let mapped = cached.prepare(&file, &chatml, &options);
    assert_eq!(batches(&mapped.0), batches(&in_memory.0));

    // The same bytes under another name are the same data; other bytes, options or templates are not.
    let copy = write(&cached.folder, "copy.jsonl", rows(3000));
    cached.prepare(&copy, &chatml, &options);
    assert_eq!((cached.made, cached.folders()), (1, 1));
    let longer = DatasetOptions { max_seq_length: 41, ..options.clone() };
    cached.prepare(&file, &chatml, &longer);
    let mut other = tokenizer("chatml");
    let source = format!("{} ", chatml.chat_template().unwrap().source());
    other.set_chat_template(ChatTemplate::new(&source, "other").unwrap());
    cached.prepare(&file, &other, &options);
    write(&cached.folder, "rows.jsonl", rows(2999));
    let (data, _) = cached.prepare(&file, &chatml, &options);
    assert!(data.len() < in_memory.0.len());
    let spm = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data/spm");
    cached.prepare(&file, &Tokenizer::from_dir(&spm).unwrap(), &DatasetOptions::default());
    assert_eq!((cached.made, cached.folders()), (5, 5));
}

#[test]
fn a_failed_preparation_leaves_nothing_and_damage_is_said() {
    let folder = TempDir::new().unwrap();
    let cache = TokenCache::new(&folder.path().join("cache"));
    let chatml = tokenizer("chatml");
    let options = DatasetOptions::default();
    let broken = write(&folder, "broken.jsonl", rows(2000) + "{\n");
    let error = cache.prepare(&[&broken], &chatml, &options, &mut |_| {}).unwrap_err();
    assert!(format!("{error:#}").contains("broken.jsonl, line 2001"), "{error:#}");
    assert_eq!(fs::read_dir(folder.path().join("cache")).unwrap().count(), 0);

    let file = write(&folder, "rows.jsonl", rows(100));
    cache.prepare(&[&file], &chatml, &options, &mut |_| {}).unwrap();
    let made = fs::read_dir(folder.path().join("cache")).unwrap().next().unwrap().unwrap().path();
    let ids = made.join("ids.u32");
    let bytes = fs::read(&ids).unwrap();
    fs::write(&ids, &bytes[..bytes.len() - 4]).unwrap();
    let error = format!("{:#}", cache.prepare(&[&file], &chatml, &options, &mut |_| {}).unwrap_err());
    assert!(error.contains("ids.u32") && error.contains("remove its folder"), "{error}");
}
