//! Rows to samples: shapes, what is trained, what is dropped, and what is refused.

use std::fs;
use std::path::Path;

use ferrotune::data::{
    ChatTemplate, DatasetFormat, DatasetOptions, DatasetReport, RowOptions, TokenDataset, Tokenizer, prepare,
    preview,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{test_data, tokenizer};

fn golden() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data/cases.json");
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

/// The same tokenizer in a folder without chat template.
fn plain(folder: &TempDir) -> Tokenizer {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data/bpe");
    fs::copy(golden.join("tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    let config = r#"{"bos_token": "<s>", "eos_token": "</s>"}"#;
    fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
    Tokenizer::from_dir(folder.path()).unwrap()
}

fn run(
    tokenizer: &Tokenizer,
    rows: &Value,
    options: &DatasetOptions,
) -> anyhow::Result<(TokenDataset, DatasetReport)> {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("rows.json");
    fs::write(&file, rows.to_string()).unwrap();
    prepare(&[file.to_str().unwrap()], tokenizer, options)
}

/// The first sample's text with its targets in brackets.
fn shown(tokenizer: &Tokenizer, rows: Value, options: &DatasetOptions) -> String {
    let (data, _) = run(tokenizer, &rows, options).unwrap();
    let spans = preview(tokenizer, &data, 0).unwrap();
    spans
        .iter()
        .map(|span| if span.trained { format!("⟦{}⟧", span.text) } else { span.text.clone() })
        .collect()
}

fn failure(tokenizer: &Tokenizer, rows: Value, options: &DatasetOptions) -> String {
    format!("{:#}", run(tokenizer, &rows, options).unwrap_err())
}

fn assistant_only() -> DatasetOptions {
    DatasetOptions { assistant_only_loss: true, ..Default::default() }
}

fn user(content: &str) -> Value {
    json!({"role": "user", "content": content})
}

fn assistant(content: &str) -> Value {
    json!({"role": "assistant", "content": content})
}

#[test]
fn shapes_are_recognised_by_their_columns() {
    let chatml = tokenizer("chatml");
    let options = DatasetOptions::default();
    let expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yo<|im_end|>\n⟧";
    let rows = [
        json!([{"prompt": [user("hi")], "completion": [assistant("yo")]}]),
        json!([{"instruction": "hi", "input": "", "output": "yo"}]),
        json!([{"instruction": "hi", "output": "yo", "input": null}]),
    ];
    for rows in rows {
        assert_eq!(shown(&chatml, rows, &options), expected);
    }
    let expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yo<|im_end|>⟧\n";
    let rows = [
        json!([{"messages": [user("hi"), assistant("yo")], "text": "not this"}]),
        json!([{"messages": json!([user("hi"), assistant("yo")]).to_string()}]),
        json!([{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}]),
        json!([{"conversations": [user("hi"), assistant("yo")], "system": ""}]),
    ];
    for rows in rows {
        assert_eq!(shown(&chatml, rows, &assistant_only()), expected);
    }
    assert_eq!(shown(&chatml, json!([{"text": "a b"}]), &options), "⟦a b</s>⟧");
    assert_eq!(shown(&chatml, json!([{"prompt": "a", "completion": " b"}]), &options), "a⟦ b</s>⟧");
    let rows =
        json!([{"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["h", "j"]]}]);
    let text = shown(&chatml, rows, &options);
    let before = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nh<|im_end|>\n<|im_start|>assistant\nj<|im_end|>\n";
    assert_eq!(
        text,
        format!("{before}<|im_start|>user\nq\ni<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>\n⟧")
    );
}

#[test]
fn alpaca_without_a_chat_template_is_the_original_prompt() {
    let folder = TempDir::new().unwrap();
    let tokenizer = plain(&folder);
    let row = json!([{"instruction": "Add.", "input": "1 2", "output": "3"}]);
    let text = shown(&tokenizer, row, &DatasetOptions::default());
    assert!(
        text.starts_with("Below is an instruction that describes a task, paired with an input"),
        "{text}"
    );
    assert!(
        text.ends_with("\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n⟦3</s>⟧"),
        "{text}"
    );
    let text = shown(&tokenizer, json!([{"instruction": "Add.", "output": "3"}]), &DatasetOptions::default());
    assert!(text.ends_with("request.\n\n### Instruction:\nAdd.\n\n### Response:\n⟦3</s>⟧"), "{text}");
    let error = failure(&tokenizer, json!([{"messages": [user("hi"), assistant("yo")]}]), &assistant_only());
    assert!(error.contains("no chat template") && error.contains("--chat-template FILE"), "{error}");
    assert!(error.contains("rows.json, row 1"), "{error}");
}

#[test]
fn a_flag_forces_the_shape() {
    let chatml = tokenizer("chatml");
    let with = |rows: RowOptions| DatasetOptions { rows, ..Default::default() };
    let row = json!([{"messages": [user("hi"), assistant("yo")], "text": "this", "n": 3, "none": null}]);
    let format =
        |name: &str| RowOptions { dataset_format: Some(name.parse().unwrap()), ..Default::default() };
    assert_eq!(shown(&chatml, row.clone(), &with(format("text"))), "⟦this</s>⟧");
    let column = RowOptions { text_column: Some("text".to_owned()), ..Default::default() };
    assert_eq!(shown(&chatml, row.clone(), &with(column)), "⟦this</s>⟧");
    let template = |text: &str| with(RowOptions { template: Some(text.to_owned()), ..Default::default() });
    assert_eq!(shown(&chatml, row.clone(), &template("{{{text}}} {n}{none}!")), "⟦{this} 3!</s>⟧");

    let error = failure(&chatml, row.clone(), &template("{text} {nope}"));
    assert!(error.contains("{nope}") && error.contains("[messages, text, n, none]"), "{error}");
    assert!(failure(&chatml, row.clone(), &template("{text")).contains("single {"));
    let error = failure(&chatml, row.clone(), &with(format("alpaca")));
    assert!(error.contains("no column instruction"), "{error}");
    let column = RowOptions { text_column: Some("n".to_owned()), ..Default::default() };
    assert!(failure(&chatml, row, &with(column)).contains("column n: expected a string, found a number"));

    let error = "parquet".parse::<DatasetFormat>().unwrap_err().to_string();
    assert!(error.contains("tokens, messages, sharegpt, prompt_completion, alpaca, text"), "{error}");
    for (format, name, _) in DatasetFormat::ALL {
        assert_eq!((name.parse::<DatasetFormat>().unwrap(), format.to_string()), (format, name.to_owned()));
    }
}

#[test]
fn tokens_stay_as_they_are() {
    let chatml = tokenizer("chatml");
    let options = DatasetOptions { max_seq_length: 3, ..Default::default() };
    let rows = json!([
        {"input_ids": [3, 289, 272, 4], "labels": [-100, 289, -100, 4], "text": "not this"},
        {"input_ids": [5, 6]},
        {"input_ids": "[7, 8]", "labels": null},
    ]);
    let (data, report) = run(&chatml, &rows, &options).unwrap();
    assert_eq!((data.ids(0), data.ids(1), data.ids(2)), (&[3, 289, 272][..], &[5, 6][..], &[7, 8][..]));
    assert_eq!(data.trained(0).collect::<Vec<_>>(), [false, true, false]);
    assert_eq!((report.truncated, report.target_tokens), (1, 3));
    for (row, part) in [
        (json!({"input_ids": [1, 2], "labels": [2, 3]}), "not shifted"),
        (json!({"input_ids": [1, 2], "labels": [1]}), "labels has 1 numbers, input_ids 2"),
        (json!({"input_ids": [1, -2]}), "-2 is no token id"),
        (json!({"input_ids": [1, "x"]}), "found a string"),
        (json!({"input_ids": [1, 99999]}), "no token 99999"),
    ] {
        let error = failure(&chatml, json!([row]), &options);
        assert!(error.contains(part) && error.contains("row 1"), "{error}");
    }
}

#[test]
fn rows_that_make_no_sense_are_named() {
    let chatml = tokenizer("chatml");
    let options = DatasetOptions::default();
    let good = json!({"messages": [user("hi"), assistant("yo")]});
    let cases = [
        (json!({"question": "q", "answer": "a"}), "[question, answer] are of no known shape"),
        (json!({"text": 7}), "column text: expected a string, found a number"),
        (json!({"messages": "hi"}), "column messages: expected a list"),
        (json!({"messages": []}), "the conversation is empty"),
        (json!({"messages": ["hi"]}), "message 1: expected an object with role and content, found a string"),
        (json!({"messages": [{"content": "hi"}]}), "message 1: there is no role"),
        (json!({"messages": [user("hi"), {"role": "assistant", "content": 1}]}), "message 2: content"),
        (json!({"messages": [user("hi")], "tools": 3}), "column tools: expected a list"),
        (json!({"prompt": "a", "completion": [assistant("b")]}), "two strings or two lists"),
        (
            json!({"conversations": [{"from": "alien", "value": "x"}]}),
            "turn 1: unknown role \"alien\": expected human",
        ),
        (json!({"conversations": [{"value": "x"}]}), "turn 1: expected {from, value}"),
        (json!({"conversations": [{"from": "function_call", "value": "x"}]}), "not JSON"),
        (json!({"instruction": "a", "output": null}), "column output: expected a string, found null"),
    ];
    for (row, expected) in cases {
        let error = failure(&chatml, json!([good, row]), &options);
        assert!(
            error.contains(expected) && error.contains("rows.json, row 2"),
            "expected {expected:?} in: {error}"
        );
    }
    let error = failure(&tokenizer("inst"), json!([good, {"messages": [assistant("yo")]}]), &options);
    assert!(error.contains("row 2") && error.contains("line 5: A conversation needs a question."), "{error}");
    let bad = json!({"messages": [user("hi"), {"role": "robot", "content": "x"}]});
    let error = failure(&tokenizer("inst"), json!([good, bad]), &options);
    assert!(error.contains("row 2") && error.contains("Unexpected role: robot"), "{error}");
}

/// Templates without generation marks: what the assistant says and the token that ends its turn, and nothing else.
#[test]
fn assistant_turns_are_found_in_any_template() {
    let golden = golden();
    let text = |template: &str, conversation: &str| {
        let tools = if conversation == "tool" { &golden["tools"] } else { &Value::Null };
        let row = json!([{"messages": golden["conversations"][conversation], "tools": tools}]);
        shown(&tokenizer(template), row, &assistant_only())
    };
    let system =
        "<|im_start|>system\nYou are terse.<|im_end|>\n<|im_start|>user\nHow is the weather?<|im_end|>\n";
    let chatml = format!(
        "{system}<|im_start|>assistant\n⟦ Schön, 😀 mild. <|im_end|>⟧\n<|im_start|>user\nAnd tomorrow?\n<|im_end|>\n\
         <|im_start|>assistant\n⟦The same<|im_end|>⟧\n"
    );
    assert_eq!(text("chatml", "system"), chatml);
    // This one marks the same, and breaks lines twice.
    assert_eq!(text("chatml_generation", "system").replace("\n\n", "\n"), chatml);
    assert_eq!(
        text("think", "thought"),
        "<|im_start|>user\ntwo plus two<|im_end|>\n<|im_start|>assistant\n⟦four<|im_end|>⟧\n<|im_start|>user\nplus three\
         <|im_end|>\n<|im_start|>assistant\n⟦<think>\nfour and three\n</think>\n\nseven<|im_end|>⟧\n"
    );
    // The end-of-turn token is not eos_token.
    assert_eq!(
        text("turns", "one"),
        "<s><start_of_turn>user\nWhat is two plus two?<end_of_turn>\n<start_of_turn>model\n⟦Four.<end_of_turn>⟧\n"
    );
    // A tool call and a system message that move with the number of turns.
    let tools = text("inst", "tool");
    let tool_call =
        "⟦[TOOL_CALLS] [{\"name\": \"weather\", \"arguments\": {\"city\": \"Graz\", \"days\": 1.0}}]</s>⟧";
    assert!(tools.contains(tool_call), "{tools}");
    assert!(tools.contains("[/TOOL_RESULTS]⟦ It is mild.</s>⟧"), "{tools}");
    assert!(tools.ends_with("[INST] Thanks [/INST]⟦ You are welcome.</s>⟧"), "{tools}");
    assert_eq!(tools.matches('⟦').count(), 3);
    let system = text("inst", "system");
    assert_eq!(
        system,
        "<s>[INST] You are terse.\n\nHow is the weather? [/INST]⟦ Schön, 😀 mild.</s>⟧[INST] And tomorrow?\n [/INST]⟦ The \
         same</s>⟧"
    );
}

/// Where tools move in front of the last question, the prompt alone is no prefix of the whole.
#[test]
fn completions_behind_prompts_that_render_differently() {
    let golden = golden();
    let messages = golden["conversations"]["tool"].as_array().unwrap();
    let row = json!([{"prompt": messages[..3], "completion": messages[3..], "tools": golden["tools"]}]);
    let text = shown(&tokenizer("inst"), row, &DatasetOptions::default());
    assert!(text.contains("[/TOOL_RESULTS]⟦ It is mild.</s>"), "{text}");
    assert!(text.ends_with("You are welcome.</s>⟧"), "{text}");
}

#[test]
fn function_calls_and_tools_of_sharegpt() {
    let row = json!([{
        "system": "Terse.",
        "tools": "[{\"name\": \"f\", \"parameters\": {}}]",
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"x\": 1}}"},
            {"from": "observation", "value": "r"},
            {"from": "gpt", "value": "a"},
        ],
    }]);
    assert_eq!(
        shown(&tokenizer("inst"), row, &assistant_only()),
        "<s>[AVAILABLE_TOOLS][{\"type\": \"function\", \"function\": {\"name\": \"f\", \"parameters\": {}}}]\
         [/AVAILABLE_TOOLS][INST] Terse.\n\nq [/INST]⟦[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"x\": 1}}]</s>⟧\
         [TOOL_RESULTS] {\"content\": \"r\"}[/TOOL_RESULTS]⟦ a</s>⟧"
    );
}

#[test]
fn losses_can_be_on_everything_or_on_the_intersection() {
    let all = DatasetOptions { completion_only_loss: false, ..Default::default() };
    let chatml = tokenizer("chatml");
    assert_eq!(shown(&chatml, json!([{"prompt": "a", "completion": " b"}]), &all), "⟦a b</s>⟧");
    let row = json!([{"prompt": [user("q"), assistant("x"), user("r")], "completion": [assistant("y")]}]);
    let head =
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nx<|im_end|>\n<|im_start|>user\nr<|im_end|>\n";
    assert_eq!(
        shown(&chatml, row.clone(), &assistant_only()),
        format!("{head}<|im_start|>assistant\n⟦y<|im_end|>⟧\n")
    );
    assert!(shown(&chatml, row, &all).starts_with("⟦<|im_start|>user"));
}

#[test]
fn truncated_and_dropped_rows_are_counted() {
    let options = DatasetOptions { max_seq_length: 20, ..assistant_only() };
    let rows = json!([
        {"messages": [user("q"), assistant("a")]},
        {"messages": [user("q"), assistant("a long answer that goes on and on")]},
        {"messages": [user("a long question, which leaves no room for any answer"), assistant("a")]},
        {"messages": [user("a question alone")]},
        {"text": ""},
    ]);
    let (data, report) = run(&tokenizer("chatml"), &rows, &options).unwrap();
    assert_eq!((report.rows, report.samples, report.truncated), (5, 2, 1));
    let dropped: Vec<(&str, u64)> = report.dropped.iter().map(|(reason, n)| (reason.as_str(), *n)).collect();
    assert_eq!(dropped, [("max_seq_length cuts off all that is trained", 1), ("no token is trained", 2)]);
    assert_eq!((report.tokens, report.target_tokens), (data.num_tokens(), data.num_targets()));
    assert_eq!(data.max_len(), 20);
    assert_eq!(report.end_of_turn.as_deref(), Some("<|im_end|>"));
    let text = report.to_string();
    assert!(text.contains("5 rows, 2 samples") && text.contains("1 truncated"), "{text}");
}

#[test]
fn a_dataset_without_targets_is_refused() {
    let chatml = tokenizer("chatml");
    let error = failure(&chatml, json!([{"messages": [user("q")]}]), &assistant_only());
    for part in ["rows.json", "every label is masked", "no token is trained (1 rows)", "assistant turns"] {
        assert!(error.contains(part), "{part} in {error}");
    }
    let short = DatasetOptions { max_seq_length: 3, ..assistant_only() };
    let error = failure(&chatml, json!([{"messages": [user("q"), assistant("a")]}]), &short);
    assert!(error.contains("raise --max-seq-length (now 3)"), "{error}");
    assert!(failure(&chatml, json!([]), &short).contains("no rows"));
}

/// axolotl #3754: a model that is never shown the end of its turn never stops.
#[test]
fn an_end_of_turn_that_is_never_trained_is_refused() {
    let mut chatml = tokenizer("chatml");
    let source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}\
                  {{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}";
    chatml.set_chat_template(ChatTemplate::new(source, "tiny.jinja").unwrap());
    let rows = json!([{"messages": [user("q"), assistant("a")]}]);
    let error = failure(&chatml, rows.clone(), &assistant_only());
    for part in [
        "rows.json",
        "\"<|im_end|>\"",
        "tiny.jinja",
        "never a label",
        "{% generation %}",
        "--allow-missing-eot",
    ] {
        assert!(error.contains(part), "{part} in {error}");
    }
    let allowed = DatasetOptions { allow_missing_eot: true, ..assistant_only() };
    assert_eq!(run(&chatml, &rows, &allowed).unwrap().1.samples, 1);
    // Training on all tokens has it among the labels.
    assert_eq!(run(&chatml, &rows, &DatasetOptions::default()).unwrap().1.samples, 1);

    let cut = DatasetOptions { max_seq_length: 20, ..assistant_only() };
    let rows = json!([{"messages": [user("q"), assistant("an answer longer than that")]}]);
    let error = failure(&tokenizer("chatml"), rows, &cut);
    assert!(error.contains("Every sample is cut before its end: raise --max-seq-length"), "{error}");

    chatml.set_chat_template(
        ChatTemplate::new("{% for m in messages %}{{ m.content }}{% endfor %}", "t").unwrap(),
    );
    let error =
        failure(&chatml, json!([{"messages": [user("q"), assistant("a")]}]), &DatasetOptions::default());
    assert!(error.contains("\"</s>\"") && error.contains("behind assistant messages"), "{error}");
}

#[test]
fn rows_keep_their_order() {
    let rows: Vec<Value> = (0..3000).map(|n| json!({"text": format!("row {n}")})).collect();
    let chatml = tokenizer("chatml");
    let (data, _) = run(&chatml, &Value::Array(rows), &DatasetOptions::default()).unwrap();
    for n in 0..3000 {
        assert_eq!(chatml.decode(data.ids(n), true).unwrap(), format!("row {n}"));
    }
}

/// Every dataset of the shared test data that has a known shape.
#[test]
fn published_datasets() {
    let Some(dir) = test_data("datasets/llama-factory") else { return };
    let tokenizer = Tokenizer::from_dir(&dir.join("tokenizers/minimind")).unwrap();
    let cases = [
        ("fastchat/dummy_conversation.json", true),
        ("llama-factory/glaive_toolcall_en_demo.json", true),
        ("llama-factory/reason_tool_use_demo_50.jsonl", true),
        ("llama-factory/kto_en_demo.json", true),
        ("rasbt/instruction-data.json", false),
        ("llama-factory/alpaca_en_demo.json", false),
        ("llama-factory/identity.json", false),
        ("llama-factory/c4_demo.jsonl", false),
    ];
    for (name, assistant_only_loss) in cases {
        let options = DatasetOptions { assistant_only_loss, ..Default::default() };
        let source = dir.join("datasets").join(name);
        let (data, report) = prepare(&[source.to_str().unwrap()], &tokenizer, &options).unwrap();
        assert!(report.samples >= report.rows - 1, "{name}: {report}");
        assert_eq!(data.len() as u64, report.samples);
        assert!(report.target_tokens > report.tokens / 10, "{name}: {report}");
        if assistant_only_loss {
            assert!(report.target_tokens < report.tokens * 9 / 10, "{name}: {report}");
        }
    }
}
