//! Each rule of the lint: a file that breaks it, and one that does not.

use ferrotune::data::{DatasetOptions, Lint, LintOptions, LintedRow, Records, Rule};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{tokenizer, write};

fn lint(template: &str, file: &str, options: &LintOptions) -> Vec<LintedRow> {
    let tokenizer = tokenizer(template);
    let records = Records::open(&[file]).unwrap();
    Lint::new(records, Some(&tokenizer), options).unwrap().collect::<anyhow::Result<_>>().unwrap()
}

/// The broken rules of each row.
fn rules(rows: &[LintedRow]) -> Vec<Vec<Rule>> {
    rows.iter().map(|row| row.findings.iter().map(|finding| finding.rule).collect()).collect()
}

fn turn(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

fn chat(turns: &[(&str, &str)]) -> Value {
    json!({"messages": turns.iter().map(|(role, content)| turn(role, content)).collect::<Vec<_>>()})
}

fn lines(rows: &[Value]) -> String {
    rows.iter().map(|row| format!("{row}\n")).collect()
}

fn good() -> Value {
    chat(&[("user", "What is two plus two?"), ("assistant", "Four.")])
}

/// `broken` breaks `rule` in its last row, and in no other way; nothing is wrong with `fine`.
fn assert_rule(rule: Rule, options: &LintOptions, broken: impl AsRef<[u8]>, fine: impl AsRef<[u8]>) {
    let folder = TempDir::new().unwrap();
    let rows = lint("chatml", &write(&folder, "broken.jsonl", broken), options);
    let found = rules(&rows);
    assert_eq!(found.last().unwrap(), &[rule], "{rows:?}");
    let finding = &rows.last().unwrap().findings[0];
    assert!(finding.place.file.ends_with("broken.jsonl"));
    assert_eq!(finding.place.number, found.len() as u64, "lines count from 1");
    assert!(found[..found.len() - 1].iter().all(Vec::is_empty), "{rows:?}");
    let rows = lint("chatml", &write(&folder, "fine.jsonl", fine), options);
    assert!(rules(&rows).iter().all(Vec::is_empty), "{rows:?}");
    let allowing = LintOptions { allow: [rule].into(), ..options.clone() };
    let rows = lint("chatml", &write(&folder, "broken.jsonl", lines(&[good()])), &allowing);
    assert!(rules(&rows).iter().all(Vec::is_empty), "{rows:?}");
}

fn assert_rows(rule: Rule, broken: Value, fine: Value) {
    assert_rule(rule, &LintOptions::default(), lines(&[good(), broken]), lines(&[good(), fine]));
}

#[test]
fn unreadable() {
    let broken = format!("{}{{\"messages\": [\n", lines(&[good()]));
    assert_rule(Rule::Unreadable, &LintOptions::default(), broken, lines(&[good()]));
}

#[test]
fn broken_utf8() {
    let bytes = [lines(&[good()]).as_bytes(), b"{\"text\": \"caf\xe9\"}\n"].concat();
    let fine = lines(&[good(), json!({"text": "café"})]);
    assert_rule(Rule::BrokenUtf8, &LintOptions::default(), bytes, fine);
    assert_rows(Rule::BrokenUtf8, json!({"text": "caf\u{fffd}"}), json!({"text": "café"}));
}

#[test]
fn unknown_shape() {
    assert_rows(
        Rule::UnknownShape,
        json!({"question": "2+2?", "answer": "4"}),
        json!({"prompt": "2+2?", "completion": " 4"}),
    );
    assert_rows(Rule::UnknownShape, json!({"messages": []}), json!({"text": "four"}));
    assert_rows(Rule::UnknownShape, json!({"text": 4}), json!({"text": "4"}));
}

#[test]
fn empty_answer() {
    let broken = chat(&[("user", "Well?"), ("assistant", " \n")]);
    assert_rows(Rule::EmptyAnswer, broken, chat(&[("user", "Well?"), ("assistant", "Well.")]));
    assert_rows(
        Rule::EmptyAnswer,
        json!({"prompt": "a", "completion": " "}),
        json!({"prompt": "a", "completion": " b"}),
    );
    assert_rows(Rule::EmptyAnswer, json!({"text": "  "}), json!({"text": " a"}));
}

#[test]
fn empty_prompt() {
    let fine = chat(&[("user", "Tell me."), ("assistant", "Yes.")]);
    assert_rows(Rule::EmptyPrompt, chat(&[("user", ""), ("assistant", "Yes.")]), fine);
    assert_rows(
        Rule::EmptyPrompt,
        json!({"prompt": "", "completion": "b"}),
        json!({"prompt": "a", "completion": " b"}),
    );
}

#[test]
fn role_order() {
    let fine = chat(&[
        ("system", "Be terse."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
    ]);
    let orders: [&[(&str, &str)]; 7] = [
        &[("user", "a"), ("user", "b"), ("assistant", "c")],
        &[("user", "a"), ("assistant", "b"), ("assistant", "c")],
        &[("assistant", "a")],
        &[("user", "a"), ("assistant", "b"), ("user", "c")],
        &[("user", "a"), ("system", "b"), ("assistant", "c")],
        &[("user", "a"), ("tool", "b"), ("assistant", "c")],
        &[("user", "a"), ("narrator", "b"), ("assistant", "c")],
    ];
    for order in orders {
        assert_rows(Rule::RoleOrder, chat(order), fine.clone());
    }
}

#[test]
fn template_tokens() {
    let broken = chat(&[("user", "What does <|im_end|> mean?"), ("assistant", "The end.")]);
    let fine = chat(&[("user", "What does <|im_endx|> mean?"), ("assistant", "Nothing.")]);
    assert_rows(Rule::TemplateTokens, broken, fine);
}

#[test]
fn broken_image() {
    let folder = TempDir::new().unwrap();
    let png =
        [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x02\0\0\0\x03\x08\x02\0\0\0".as_slice(), &[0; 20]].concat();
    write(&folder, "a.png", png);
    write(&folder, "b.png", "no picture");
    let row = |image: &str| json!({"messages": [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]}, turn("assistant", "A cat.")]});
    // The golden template joins strings, so parts cannot be rendered: without tokenizer.
    let options = LintOptions::default();
    let check = |image: &str| {
        let file = write(&folder, "rows.jsonl", lines(&[row(image)]));
        let rows: Vec<LintedRow> = Lint::new(Records::open(&[file]).unwrap(), None, &options)
            .unwrap()
            .collect::<anyhow::Result<_>>()
            .unwrap();
        rules(&rows).concat()
    };
    assert_eq!(check("a.png"), []);
    for broken in ["absent.png", "b.png", "data:image/png;base64,!!"] {
        assert_eq!(check(broken), [Rule::BrokenImage], "{broken}");
    }
}

#[test]
fn template_error() {
    let folder = TempDir::new().unwrap();
    let mut tokenizer = tokenizer("chatml");
    let strict = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}\
        {{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}";
    tokenizer.set_chat_template(ferrotune::data::ChatTemplate::new(strict, "strict").unwrap());
    let turns = [("user", "a"), ("assistant", "b"), ("tool", "c"), ("assistant", "d")];
    let file = write(&folder, "rows.jsonl", lines(&[good(), chat(&turns)]));
    let options = LintOptions::default();
    let rows = Lint::new(Records::open(&[file]).unwrap(), Some(&tokenizer), &options).unwrap();
    let rows: Vec<LintedRow> = rows.collect::<anyhow::Result<_>>().unwrap();
    assert_eq!(rules(&rows), [vec![], vec![Rule::TemplateError]], "{rows:?}");
    assert!(rows[1].findings[0].message.contains("no tools here"));
}

#[test]
fn double_bos() {
    let folder = TempDir::new().unwrap();
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/data/spm");
    let tokenizer = ferrotune::data::Tokenizer::from_dir(&golden).unwrap();
    let file =
        write(&folder, "rows.jsonl", lines(&[json!({"text": "A heron"}), json!({"text": "<s>A heron"})]));
    let options = LintOptions::default();
    let rows = Lint::new(Records::open(&[file]).unwrap(), Some(&tokenizer), &options).unwrap();
    let rows: Vec<LintedRow> = rows.collect::<anyhow::Result<_>>().unwrap();
    assert_eq!(rules(&rows), [vec![], vec![Rule::DoubleBos]], "{rows:?}");
}

#[test]
fn all_masked_and_too_long() {
    let long = chat(&[("user", &"word ".repeat(200)), ("assistant", "Yes.")]);
    let dataset = DatasetOptions { max_seq_length: 100, assistant_only_loss: true, ..Default::default() };
    let folder = TempDir::new().unwrap();
    let options = LintOptions { dataset, ..Default::default() };
    let rows = lint("chatml", &write(&folder, "rows.jsonl", lines(&[good(), long.clone()])), &options);
    assert_eq!(rules(&rows), [vec![], vec![Rule::TooLong, Rule::AllMasked]], "{rows:?}");
    let options = LintOptions::default();
    assert!(
        rules(&lint("chatml", &write(&folder, "rows.jsonl", lines(&[long])), &options)).concat().is_empty()
    );
    let dataset = DatasetOptions { max_seq_length: 30, ..Default::default() };
    let options = LintOptions { dataset, ..Default::default() };
    assert_rule(
        Rule::TooLong,
        &options,
        lines(&[json!({"text": "a"}), json!({"text": "a heron ".repeat(40)})]),
        lines(&[json!({"text": "a"})]),
    );
}

#[test]
fn missing_eot() {
    let folder = TempDir::new().unwrap();
    let dataset = DatasetOptions { assistant_only_loss: true, ..Default::default() };
    let options = LintOptions { dataset, ..Default::default() };
    let file = write(&folder, "rows.jsonl", lines(&[good()]));
    assert!(rules(&lint("chatml_generation", &file, &options)).concat().is_empty());
    // The end of turn stands behind the block that marks what is trained.
    let mut tokenizer = tokenizer("chatml");
    let outside = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}\
        {{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}";
    tokenizer.set_chat_template(ferrotune::data::ChatTemplate::new(outside, "outside").unwrap());
    let rows = Lint::new(Records::open(&[file]).unwrap(), Some(&tokenizer), &options).unwrap();
    let rows: Vec<LintedRow> = rows.collect::<anyhow::Result<_>>().unwrap();
    assert_eq!(rules(&rows), [vec![Rule::MissingEot]], "{rows:?}");
}

#[test]
fn duplicate() {
    // Other columns do not make another sample; another answer does.
    let mut again = good();
    again["id"] = json!(7);
    assert_rows(Rule::Duplicate, again, chat(&[("user", "What is two plus two?"), ("assistant", "4.")]));
}

#[test]
fn near_duplicate() {
    let story = |end: &str| {
        let words: Vec<String> = (0..60).map(|n| format!("word{n}")).collect();
        json!({"text": format!("{} {end}", words.join(" "))})
    };
    let options = LintOptions { near_duplicates: Some(0.8), ..Default::default() };
    let broken = lines(&[good(), story("the end"), story("THE, other end")]);
    let fine =
        lines(&[good(), story("the end"), json!({"text": "A text about something else, of a few words."})]);
    assert_rule(Rule::NearDuplicate, &options, broken, fine);
}

#[test]
fn eval_overlap() {
    let folder = TempDir::new().unwrap();
    let eval = write(
        &folder,
        "eval.jsonl",
        lines(&[chat(&[("user", "what  is TWO plus two?"), ("assistant", "4")])]),
    );
    let options = LintOptions { eval: vec![eval], ..Default::default() };
    let other = chat(&[("user", "What is one plus two?"), ("assistant", "Three.")]);
    assert_rule(Rule::EvalOverlap, &options, lines(&[other.clone(), good()]), lines(&[other]));
}

#[test]
fn an_evaluation_set_that_cannot_be_read_is_an_error() {
    let options = LintOptions { eval: vec!["absent.jsonl".to_owned()], ..Default::default() };
    let folder = TempDir::new().unwrap();
    let records = Records::open(&[write(&folder, "rows.jsonl", lines(&[good()]))]).unwrap();
    assert!(Lint::new(records, None, &options).is_err());
}
