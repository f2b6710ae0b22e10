//! What the fuzz targets do with their bytes. What a parser says of them does not matter, only that it returns.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use ferrotune::data::{
    ChatTemplate, ChunkOptions, ExampleTemplate, ImageSource, Lint, LintOptions, MergedPrompt, Records,
    RenderOptions, RowStream, StreamOptions, Tokenizer, chunks, read_document,
};
use ferrotune::device;
use ferrotune::io::Weights;
use ferrotune::io::adapter::AdapterConfig;
use ferrotune::io::gguf::Gguf;
use ferrotune::io::lora_spec::LoraSpec;
use ferrotune::models::{Config, FastLanguageModel};
use ferrotune::nn::LoadOptions;
use serde_json::{Value, json};
use tempfile::TempDir;

/// The repository, for the golden files.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// A folder of this process. It stays when libFuzzer ends the process: scripts/fuzz gives it a TMPDIR to remove.
static FOLDER: LazyLock<TempDir> = LazyLock::new(|| TempDir::new().unwrap());

static TOKENIZER: LazyLock<Tokenizer> =
    LazyLock::new(|| Tokenizer::from_dir(&Path::new(ROOT).join("tests/golden/data/bpe")).unwrap());

fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = FOLDER.path().join(name);
    fs::write(&path, bytes).unwrap();
    path
}

fn talk() -> [Value; 2] {
    [json!({"role": "user", "content": "q"}), json!({"role": "assistant", "content": "a"})]
}

/// Reads a data file, lints its rows (shapes, pictures, templates, tokens) and streams it shuffled.
pub fn rows(name: &str, bytes: &[u8]) {
    let path = file(name, bytes);
    let source = path.to_str().unwrap();
    let options = LintOptions { near_duplicates: Some(0.8), ..Default::default() };
    if let Ok(records) = Records::open(&[source]) {
        let lint = Lint::new(records, Some(&TOKENIZER), &options).unwrap();
        lint.take_while(Result::is_ok).for_each(drop);
    }
    if let Ok(mut stream) = RowStream::open(&[source], StreamOptions { seed: Some(1), ..Default::default() })
    {
        for _ in 0..100 {
            let _ = stream.next_row();
        }
    }
}

/// The first line is a prompt of the columns a and b, the rest a row's JSON.
pub fn to_sharegpt(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let (prompt, row) = text.split_once('\n').unwrap_or((&text, "{\"a\": \"x {b}\"}"));
    if let (Ok(prompt), Ok(Value::Object(row))) =
        (MergedPrompt::new(prompt, &["a".to_owned(), "b".to_owned()].into()), serde_json::from_str(row))
    {
        prompt.render(&row);
    }
}

/// An example of {SYSTEM}, {INPUT} and {OUTPUT}: whatever it holds, its Jinja text compiles and shows what it says.
pub fn example_template(bytes: &[u8]) {
    if let Ok(example) = ExampleTemplate::new(&String::from_utf8_lossy(bytes), "</s>") {
        let template = example.chat_template("s'\\").unwrap();
        let text = template.render(&talk(), &RenderOptions::default()).unwrap();
        let shown = format!("{}q{}a{}", example.user, example.assistant, example.end);
        let system = |text: &str| text.replace("s'\\", "{SYSTEM}");
        assert!(system(&text).ends_with(&system(&shown)), "{text:?} {example:?}");
    }
}

pub fn jinja(bytes: &[u8]) {
    if let Ok(template) = ChatTemplate::new(&String::from_utf8_lossy(bytes), "fuzz") {
        let _ = template.render_spans(&talk(), &RenderOptions::default());
    }
}

/// Reads a document and cuts its text into chunks.
pub fn document(name: &str, bytes: &[u8]) {
    if let Ok(text) = read_document(&file(name, bytes)) {
        let found = chunks(&TOKENIZER, &text, &ChunkOptions { chunk_size: 16, overlap: 5 }).unwrap();
        let mut covered = 0;
        for chunk in found {
            assert!(chunk.start <= covered && text.get(chunk.clone()).is_some());
            covered = chunk.end;
        }
        assert!(covered == text.len() || text.is_empty());
    }
}

/// A picture's bytes; the same as the JSON or text that names a picture.
pub fn picture(bytes: &[u8]) {
    let _ = ImageSource::Bytes(bytes.to_vec()).info();
    let _ = ImageSource::Path(file("picture", bytes)).info();
    let text = String::from_utf8_lossy(bytes);
    let value = serde_json::from_str(&text).unwrap_or_else(|_| Value::from(&*text));
    if let Ok(image) = ImageSource::new(&value, None)
        && !matches!(image, ImageSource::Path(_))
    {
        let _ = image.info();
    }
}

pub fn safetensors(bytes: &[u8]) {
    let path = file("model.safetensors", bytes);
    if let Ok(weights) = Weights::open_files(&[path]) {
        for name in weights.names() {
            let _ = weights.get(name);
        }
    }
}

/// Opens a GGUF file, dequantises its tensors and loads it as a model with its tokenizer.
pub fn gguf(bytes: &[u8]) {
    let path = file("model.gguf", bytes);
    if let Ok(gguf) = Gguf::open(&path) {
        for tensor in gguf.tensors() {
            let _ = gguf.dequantize(&tensor.name);
        }
        if let Ok(Some(tokenizer)) = Tokenizer::from_gguf(&gguf) {
            use_tokenizer(&tokenizer);
        }
        let device = device::init(device::Choice::Cpu, None).unwrap();
        let _ = FastLanguageModel::from_gguf(&path, LoadOptions::new(tch::Kind::Float, device));
    }
}

pub fn config(bytes: &[u8]) {
    let _ = Config::from_json(&String::from_utf8_lossy(bytes));
}

pub fn adapter_config(bytes: &[u8]) {
    file("adapter_config.json", bytes);
    if let Ok(config) = AdapterConfig::load(FOLDER.path())
        && let Ok(spec) = LoraSpec::new(&config)
    {
        for module in ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "lm_head"] {
            let _ = (spec.for_module(module), spec.is_saved_whole(module));
        }
    }
}

/// A whole tokenizer.json.
pub fn tokenizer(bytes: &[u8]) {
    file("tokenizer.json", bytes);
    if let Ok(tokenizer) = Tokenizer::from_dir(FOLDER.path()) {
        use_tokenizer(&tokenizer);
    }
}

/// A tokenizer_config.json, its chat template included, beside a good tokenizer.json.
pub fn tokenizer_config(bytes: &[u8]) {
    static GOOD: LazyLock<Vec<u8>> =
        LazyLock::new(|| fs::read(Path::new(ROOT).join("tests/golden/data/bpe/tokenizer.json")).unwrap());
    file("tokenizer_config.json", bytes);
    file("tokenizer.json", &GOOD);
    if let Ok(tokenizer) = Tokenizer::from_dir(FOLDER.path()) {
        use_tokenizer(&tokenizer);
        if let Some(template) = tokenizer.chat_template() {
            let _ = template.render_spans(&talk(), &RenderOptions::default());
        }
    }
}

fn use_tokenizer(tokenizer: &Tokenizer) {
    if let Ok((ids, _)) = tokenizer.encode_with_offsets("A heron\n\u{e9}\u{1f600} <s>stood.", true) {
        let _ = tokenizer.decode(&ids, true);
    }
}
