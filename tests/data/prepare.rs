use std::fs;

use ferrotune::data::{DatasetOptions, Tokenizer, prepare, preview};

use super::test_data;

#[test]
fn smoke() {
    let Some(dir) = test_data("tokenizers/minimind") else { return };
    let tokenizer = Tokenizer::from_dir(&dir.join("tokenizers/minimind")).unwrap();
    for name in [
        "llama-factory/glaive_toolcall_en_demo.json",
        "fastchat/dummy_conversation.json",
        "llama-factory/reason_tool_use_demo_50.jsonl",
        "rasbt/instruction-data.json",
        "llama-factory/c4_demo.jsonl",
        "llama-factory/kto_en_demo.json",
        "llama-factory/dpo_en_demo.json",
        "gsm8k/test.jsonl",
        "titanic/titanic.csv",
    ] {
        for assistant_only_loss in [false, true] {
            let t = std::time::Instant::now();
            let r = prepare(
                &[dir.join("datasets").join(name).to_str().unwrap()],
                &tokenizer,
                &DatasetOptions { assistant_only_loss, ..Default::default() },
            );
            match r {
                Ok((data, report)) => {
                    println!("{name}: {report} {:?}", t.elapsed());
                    let mut s = String::new();
                    for span in preview(&tokenizer, &data, 0).unwrap() {
                        if span.trained { s += &format!("[[{}]]", span.text) } else { s += &span.text }
                    }
                    println!("{}", s.chars().take(1500).collect::<String>());
                }
                Err(e) => println!("{name}: ERR {e:#}"),
            }
        }
    }
    let _ = fs::metadata(".");
}
