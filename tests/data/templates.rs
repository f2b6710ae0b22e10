use std::collections::HashMap;
use std::fs;
use std::path::Path;

use ferrotune::data::{ChatTemplate, RenderOptions, Tokenizer};
use serde_json::Value;

use super::test_data;

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn load(dir: &Path, name: &str) -> ChatTemplate {
    let path = dir.join(name);
    let mut template = if name.ends_with(".jinja") {
        ChatTemplate::from_file(&path).unwrap()
    } else {
        ChatTemplate::new(json(&path)["chat_template"].as_str().unwrap(), name).unwrap()
    };
    template.set_now("2025-01-01T00:00:00".parse().unwrap());
    template
}

/// Every conversation through every template: the text, or the template's own exception, as transformers gives it.
#[test]
fn golden_chats() {
    let Some(dir) = test_data("golden/chat.json") else { return };
    let golden = json(&dir.join("golden/chat.json"));
    let mut templates = HashMap::new();
    let mut tokenizers = HashMap::new();
    let mut wrong = Vec::new();
    let cases = golden["cases"].as_array().unwrap();
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let template = templates.entry(name).or_insert_with(|| load(&dir, name));
        for variable in ["bos_token", "eos_token"] {
            template.set_variable(variable, case[variable].as_str().unwrap().to_owned());
        }
        let conversation = case["conversation"].as_str().unwrap();
        let messages = golden["conversations"][conversation].as_array().unwrap();
        let options = RenderOptions {
            tools: (case["tools"] == true).then_some(&golden["tools"]),
            add_generation_prompt: case["add_generation_prompt"] == true,
            ..Default::default()
        };
        let found = template.render(messages, &options);
        let same = match (&found, case["text"].as_str()) {
            (Ok(found), Some(text)) => found == text,
            // A template's own words must be there; Python's TypeErrors have other words here.
            (Err(found), None) => match case["error"].as_str().unwrap().strip_prefix("TemplateError: ") {
                Some(message) => found.to_string().ends_with(message),
                None => true,
            },
            _ => false,
        };
        if !same {
            let expected = case["text"].as_str().or(case["error"].as_str()).unwrap();
            wrong.push(format!("{name} {conversation}\nexpected {expected:?}\nfound    {found:?}"));
        }
        if let (Some(ids), Ok(text)) = (case["ids"].as_array(), &found) {
            let folder = dir.join(Path::new(name).parent().unwrap());
            let tokenizer =
                tokenizers.entry(folder.clone()).or_insert_with(|| Tokenizer::from_dir(&folder).unwrap());
            let ids: Vec<u32> = ids.iter().map(|id| id.as_u64().unwrap() as u32).collect();
            assert_eq!(tokenizer.encode(text, false).unwrap(), ids, "{name} {conversation}");
        }
    }
    assert!(wrong.is_empty(), "{} of {} differ:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[test]
fn golden_token_ids() {
    let Some(dir) = test_data("golden/tokenize.json") else { return };
    let golden = json(&dir.join("golden/tokenize.json"));
    for (name, expected) in golden["tokenizers"].as_object().unwrap() {
        let tokenizer = Tokenizer::from_dir(&dir.join(name)).unwrap();
        assert_eq!(tokenizer.vocab_size() as u64, expected["vocab_size"].as_u64().unwrap(), "{name}");
        for case in expected["cases"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let ids = |key: &str| -> Vec<u32> {
                case[key].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
            };
            assert_eq!(tokenizer.encode(text, false).unwrap(), ids("ids"), "{name}: {text:?}");
            assert_eq!(tokenizer.encode(text, true).unwrap(), ids("ids_with_special"), "{name}: {text:?}");
            assert_eq!(
                tokenizer.decode(&ids("ids"), false).unwrap(),
                case["decoded"].as_str().unwrap(),
                "{name}"
            );
        }
    }
}

/// U+FDD0 brackets what `safe` marked: elsewhere it is text like any other, and there it is refused.
#[test]
fn noncharacters_stay_text() {
    let talk = [serde_json::json!({"role": "user", "content": "1 < 2 \u{fdd0}x\u{fdd1}"})];
    let render =
        |source: &str| ChatTemplate::new(source, "t").unwrap().render(&talk, &RenderOptions::default());
    assert_eq!(render("{{ messages[0].content }}").unwrap(), "1 < 2 \u{fdd0}x\u{fdd1}");
    let error = render("{{ messages[0].content + ('<' | safe) }}").unwrap_err().to_string();
    assert!(error.contains("U+FDD0"), "{error}");
}
