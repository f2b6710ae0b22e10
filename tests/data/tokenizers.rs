//! A checkpoint's tokenizer files: what is read from which, and what is said when they are broken.

use std::fs;
use std::path::{Path, PathBuf};

use ferrotune::data::{ChatTemplate, RenderOptions, Tokenizer};
use serde_json::{Value, json};
use tempfile::TempDir;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data/bpe")
}

/// A folder with the golden tokenizer.json and this configuration.
fn folder(config: Value) -> TempDir {
    let folder = TempDir::new().unwrap();
    fs::copy(golden().join("tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    folder
}

fn failure(folder: &Path) -> String {
    let error = Tokenizer::from_dir(folder).err().expect("an error");
    format!("{error:#}")
}

fn render(tokenizer: &Tokenizer, tools: Option<&Value>) -> String {
    let options = RenderOptions { tools, ..Default::default() };
    tokenizer.chat_template().unwrap().render(&[json!({"role": "user", "content": "q"})], &options).unwrap()
}

#[test]
fn special_tokens_as_strings_objects_or_not_at_all() {
    let tokenizer = Tokenizer::from_dir(&golden()).unwrap();
    assert_eq!(tokenizer.bos_token_id(), Some(1), "a string");
    assert_eq!(tokenizer.eos_token().unwrap().content, "</s>", "an object");
    assert_eq!(tokenizer.pad_token(), None, "null");
    assert!(tokenizer.is_special(4) && !tokenizer.is_special(100));
    assert_eq!(tokenizer.max_id() as usize, tokenizer.vocab_size() - 1);

    let bare = TempDir::new().unwrap();
    fs::copy(golden().join("tokenizer.json"), bare.path().join("tokenizer.json")).unwrap();
    let tokenizer = Tokenizer::from_dir(bare.path()).unwrap();
    assert!(tokenizer.eos_token_id().is_none() && tokenizer.chat_template().is_none());
    fs::write(bare.path().join("special_tokens_map.json"), r#"{"eos_token": "</s>"}"#).unwrap();
    assert_eq!(
        Tokenizer::from_dir(bare.path()).unwrap().eos_token_id(),
        Some(2),
        "from special_tokens_map.json"
    );
}

/// As `update_post_processor` of transformers: a switch that is given decides, and absence leaves tokenizer.json alone.
#[test]
fn bos_and_eos_are_added_as_the_configuration_says() {
    let ids = |tokenizer: Tokenizer, special: bool| tokenizer.encode("a b", special).unwrap();
    let plain = ids(Tokenizer::from_dir(&golden()).unwrap(), true);
    let encode = |bos: Value, eos: Value| {
        let config =
            json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": bos, "add_eos_token": eos});
        let tokenizer = Tokenizer::from_dir(folder(config).path()).unwrap();
        assert_eq!(ids(tokenizer.clone(), false), plain);
        ids(tokenizer, true)
    };
    let with = |before: &[u32], after: &[u32]| [before, &plain, after].concat();
    assert_eq!(encode(Value::Null, Value::Null), plain);
    assert_eq!(encode(json!(true), Value::Null), with(&[1], &[]));
    assert_eq!(encode(json!(true), json!(true)), with(&[1], &[2]));
    assert_eq!(encode(Value::Null, json!(true)), with(&[], &[2]));
    let spm = golden().with_file_name("spm");
    let without = TempDir::new().unwrap();
    fs::copy(spm.join("tokenizer.json"), without.path().join("tokenizer.json")).unwrap();
    let config = json!({"bos_token": "<s>", "add_bos_token": false});
    fs::write(without.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    let whole = ids(Tokenizer::from_dir(&spm).unwrap(), true);
    assert_eq!(whole[0], 1);
    assert_eq!(ids(Tokenizer::from_dir(without.path()).unwrap(), true), whole[1..]);
}

#[test]
fn tokens_that_only_the_configuration_lists_are_added() {
    let token = |content: &str| {
        json!({"content": content, "lstrip": false, "rstrip": false, "normalized": false,
                                       "single_word": false, "special": true})
    };
    let size = Tokenizer::from_dir(&golden()).unwrap().vocab_size();
    let later = (size + 1).to_string();
    let config = json!({"eos_token": "<|b|>",
                        "added_tokens_decoder": {later: token("<|b|>"), size.to_string(): token("<|a|>"), "2": token("</s>")}});
    let tokenizer = Tokenizer::from_dir(folder(config).path()).unwrap();
    assert_eq!(tokenizer.eos_token_id(), Some(size as u32 + 1));
    assert_eq!(tokenizer.encode("<|a|><|b|>", false).unwrap(), [size as u32, size as u32 + 1]);
}

#[test]
fn chat_templates_by_name_and_by_file() {
    // The golden configuration has two named ones; transformers takes `tool_use` when there are tools.
    let tokenizer = Tokenizer::from_dir(&golden()).unwrap();
    assert_eq!(render(&tokenizer, None), "<|im_start|>user\nq<|im_end|>\n");
    assert_eq!(
        render(&tokenizer, Some(&json!([1]))),
        "<s>[AVAILABLE_TOOLS][1][/AVAILABLE_TOOLS][INST] q [/INST]"
    );

    let folder = folder(json!({"eos_token": "</s>", "chat_template": "json{{ eos_token }}{{ bos_token }}"}));
    assert_eq!(render(&Tokenizer::from_dir(folder.path()).unwrap(), None), "json</s>");
    fs::write(folder.path().join("chat_template.jinja"), "file{{ messages[0].content }}\n").unwrap();
    let tokenizer = Tokenizer::from_dir(folder.path()).unwrap();
    assert_eq!(render(&tokenizer, None), "fileq", "the file wins");
    assert!(tokenizer.chat_template().unwrap().origin().ends_with("chat_template.jinja"));

    let out = TempDir::new().unwrap();
    tokenizer.save(out.path()).unwrap();
    assert_eq!(render(&Tokenizer::from_dir(out.path()).unwrap(), None), "fileq");

    // Saved with another template, that one is the checkpoint's from then on; else all of its own are kept.
    let (mut named, out) = (Tokenizer::from_dir(&golden()).unwrap(), TempDir::new().unwrap());
    named.save(out.path()).unwrap();
    let saved = Tokenizer::from_dir(out.path()).unwrap();
    assert!(render(&saved, Some(&json!([1]))).contains("[AVAILABLE_TOOLS]"));
    named.set_chat_template(ChatTemplate::new("own", "own").unwrap());
    named.save(out.path()).unwrap();
    assert_eq!(render(&Tokenizer::from_dir(out.path()).unwrap(), Some(&json!([1]))), "own");
}

#[test]
fn a_message_left_open() {
    let mut tokenizer = Tokenizer::from_dir(&golden()).unwrap();
    let messages =
        [json!({"role": "user", "content": "q"}), json!({"role": "assistant", "content": "The answer is "})];
    let options = RenderOptions { continue_final_message: true, ..Default::default() };
    let open = |tokenizer: &Tokenizer, messages: &[Value], options: &RenderOptions| {
        tokenizer.chat_template().unwrap().render(messages, options)
    };
    let text = open(&tokenizer, &messages, &options).unwrap();
    assert!(text.ends_with("<|im_start|>assistant\nThe answer is "), "{text:?}");
    let parts = [json!({"role": "user", "content": [{"type": "text", "text": "q"}]})];
    let trims = "{% for m in messages %}{{ m.content | trim if m.content is string else m.content[0].text | trim }}|{% endfor %}";
    tokenizer.set_chat_template(ChatTemplate::new(trims, "trims").unwrap());
    assert_eq!(open(&tokenizer, &messages, &options).unwrap(), "q|The answer is", "a template that trims");
    assert_eq!(open(&tokenizer, &parts, &options).unwrap(), "q");
    let both = RenderOptions { add_generation_prompt: true, ..options };
    assert!(open(&tokenizer, &messages, &both).is_err());
    assert!(open(&tokenizer, &[], &options).is_err());
    assert!(open(&tokenizer, &[json!({"role": "assistant"})], &options).is_err());
    tokenizer.set_chat_template(ChatTemplate::new("nothing", "blind").unwrap());
    let error = open(&tokenizer, &messages, &options).unwrap_err().to_string();
    assert!(error.contains("does not show the last message"), "{error}");
}

#[test]
fn broken_files_are_named() {
    let empty = TempDir::new().unwrap();
    let error = failure(empty.path());
    assert!(error.contains("has no tokenizer.json"), "{error}");
    fs::write(empty.path().join("tokenizer.model"), "sentencepiece").unwrap();
    let error = failure(empty.path());
    assert!(
        error.contains("tokenizer.model but no tokenizer.json") && error.contains("save_pretrained"),
        "{error}"
    );
    assert!(failure(&empty.path().join("absent")).contains("is not a folder"));

    let torn = folder(json!({}));
    let whole = fs::read(golden().join("tokenizer.json")).unwrap();
    fs::write(torn.path().join("tokenizer.json"), &whole[..whole.len() / 2]).unwrap();
    let error = failure(torn.path());
    assert!(error.contains("tokenizer.json is not a tokenizer") && error.contains("EOF"), "{error}");

    let config = |config: Value| failure(folder(config).path());
    let error = config(json!({"eos_token": "<|nope|>"}));
    assert!(error.contains("tokenizer_config.json: eos_token is \"<|nope|>\""), "{error}");
    assert!(config(json!([1])).contains("tokenizer_config.json: expected a JSON object"));
    assert!(
        config(json!({"added_tokens_decoder": {"x": {"content": "y"}}})).contains("added_tokens_decoder")
    );
    let error = config(json!({"chat_template": "{% if %}"}));
    assert!(error.contains("tokenizer_config.json (chat_template), line 1"), "{error}");
    let error = config(json!({"chat_template": [{"name": "rag", "template": "x"}]}));
    assert!(error.contains("\"default\"") && error.contains("rag"), "{error}");
    assert!(config(json!({"chat_template": 3})).contains("expected a string or a list"));
    let torn = folder(json!({}));
    fs::write(torn.path().join("tokenizer_config.json"), "{\"eos_token\": ").unwrap();
    let error = failure(torn.path());
    assert!(error.contains("tokenizer_config.json is not JSON"), "{error}");
}

/// Where the tokenizers library panics instead of returning an error: a decoder whose JSON is broken, and a template of
/// special tokens that it does not define.
#[test]
fn a_tokenizer_on_which_the_library_panics_is_named() {
    let text = fs::read_to_string(golden().join("tokenizer.json")).unwrap();
    let folder = TempDir::new().unwrap();
    let decoder = text.find("\"decoder\"").unwrap();
    let template = r#""post_processor": {"type": "TemplateProcessing", "pair": [], "special_tokens": {},
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}"#;
    let undefined = text.replace("\"post_processor\": null", template);
    for broken in [
        undefined,
        text[..decoder + 20].to_owned(),
        text.replace("\"decoder\": {", "\"decoder\": {\"a\u{1}\": 1, "),
    ] {
        assert_ne!(broken, text);
        fs::write(folder.path().join("tokenizer.json"), broken).unwrap();
        let error = failure(folder.path());
        assert!(error.contains("tokenizer.json is not a tokenizer that this program can read"), "{error}");
    }
}
