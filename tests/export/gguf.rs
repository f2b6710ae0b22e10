//! GGUF files: every architecture there and back, block types against their bounds, tokenizers, and injected faults.

use std::fs;
use std::path::{Path, PathBuf};

use ferrotune::data::Tokenizer;
use ferrotune::export::{GgufFile, Merged, Quantization, Reference, write_gguf};
use ferrotune::io::gguf::{GgmlType, Gguf, GgufWriter, Value, dequantize_row, quantize_row};
use ferrotune::models::{Change, FastLanguageModel, StreamedModel};
use ferrotune::nn::LoadOptions;
use rand::{Rng, SeedableRng};
use tch::{Device, Kind};

use super::{done, export, refused, tiny};
use crate::golden::{Flat, assert_close, checkpoints, logits, rel, root, shared_data};

fn options() -> LoadOptions {
    LoadOptions::new(Kind::Float, Device::Cpu)
}

fn load(dir: &Path) -> FastLanguageModel {
    FastLanguageModel::from_pretrained_with(dir, options()).unwrap_or_else(|e| panic!("{e:#}"))
}

fn write(dir: &Path, quantization: Quantization, to: &Path) -> anyhow::Result<PathBuf> {
    let path = to.join(format!("{}.gguf", quantization.name()));
    let merged = Merged::open(dir, None, false)?;
    write_gguf(&merged, &[GgufFile { path: path.clone(), quantization }], "model", |_, _| ())?;
    Ok(path)
}

/// The checkpoint of tests/golden, Gemma's with the scale of scores that llama.cpp takes: 1 / sqrt(head_dim).
fn checkpoint(name: &str, place: &Path) -> PathBuf {
    let dir = root().join(name);
    let mut config: serde_json::Value =
        serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
    let text = if config["text_config"].is_object() { &mut config["text_config"] } else { &mut config };
    if text.get("query_pre_attn_scalar").is_none() {
        return dir;
    }
    text["query_pre_attn_scalar"] = text["head_dim"].clone();
    let copy = place.join(name);
    fs::create_dir(&copy).unwrap();
    fs::copy(dir.join("model.safetensors"), copy.join("model.safetensors")).unwrap();
    fs::write(copy.join("config.json"), config.to_string()).unwrap();
    copy
}

/// Tiny checkpoints whose config llama.cpp has no words for.
const REFUSED: [(&str, &str); 2] = [
    ("llama_rope_dynamic", "dynamic rope scaling"),
    ("llama_rope_yarn_mscale", "yarn with truncate or attention_factor"),
];

#[test]
fn every_architecture_there_and_back_in_f32() {
    let (place, mut distances) = (tempfile::tempdir().unwrap(), Vec::new());
    for name in checkpoints() {
        let dir = checkpoint(&name, place.path());
        let written = write(&dir, Quantization::F32, place.path());
        if let Some((_, what)) = REFUSED.iter().find(|(refused, _)| *refused == name) {
            let error = format!("{:#}", written.unwrap_err());
            assert!(error.contains(what), "{name}: {error}");
            continue;
        }
        let path = written.unwrap_or_else(|error| panic!("{name}: {error:#}"));
        let read = FastLanguageModel::from_gguf(&path, options()).unwrap_or_else(|e| panic!("{name}: {e:#}"));
        let flat = Flat::new([&[5, 9, 3, 7, 11, 2, 8, 4, 1, 6, 10, 13, 12, 15, 14, 20, 19][..]]);
        distances.push((name, rel(&logits(&read.decoder, &flat), &logits(&load(&dir).decoder, &flat))));
    }
    assert_close(1e-5, distances);
    let gemma = write(&root().join("gemma2"), Quantization::F32, place.path());
    assert!(format!("{:#}", gemma.unwrap_err()).contains("query_pre_attn_scalar 24"));
}

fn random(n: usize) -> Vec<f32> {
    let mut generator = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    // About normal, with runs of different size.
    let mut number = |_| (0..6).map(|_| generator.random::<f32>() - 0.5).sum::<f32>();
    (0..n).map(|i| number(i) * (1.0 + (i / 32 % 7) as f32)).collect()
}

/// The error of each type, relative to the values in the 2-norm, on numbers that are about normal.
#[test]
fn errors_of_blocks() {
    let values = random(256 * 64);
    for (kind, limit) in [
        (GgmlType::F16, 3e-4),
        (GgmlType::Bf16, 2.5e-3),
        (GgmlType::Q8_0, 6e-3),
        (GgmlType::Q6K, 0.02),
        (GgmlType::Q5K, 0.04),
        (GgmlType::Q5_1, 0.05),
        (GgmlType::Q5_0, 0.055),
        (GgmlType::Q4K, 0.075),
        (GgmlType::Q4_1, 0.1),
        (GgmlType::Q4_0, 0.11),
        (GgmlType::Q3K, 0.16),
        (GgmlType::Q2K, 0.32),
    ] {
        let mut bytes = Vec::new();
        quantize_row(kind, &values, &mut bytes);
        assert_eq!(bytes.len(), kind.bytes(values.len()));
        let mut read = vec![0f32; values.len()];
        dequantize_row(kind, &bytes, &mut read);
        let norm =
            |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x * x)).sum::<f64>().sqrt();
        let error =
            norm(&mut values.iter().zip(&read).map(|(a, b)| a - b)) / norm(&mut values.iter().copied());
        println!("{}: {error:.5}", kind.name());
        assert!(error < limit && error > limit / 20.0, "{}: {error}", kind.name());
        // Zeros stay zeros.
        let mut bytes = Vec::new();
        quantize_row(kind, &[0.0; 256], &mut bytes);
        let mut read = vec![1f32; 256];
        dequantize_row(kind, &bytes, &mut read);
        assert!(read.iter().all(|&value| value == 0.0), "{}", kind.name());
    }
}

/// Which type each tensor gets, as llama.cpp's quantiser chose it for the same model (scripts/check_gguf.py compares all files).
#[test]
fn the_embedded_model_in_several_types_at_once() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("out");
    let methods = "f32,f16,bf16,q8_0,q4_0,q5_1,q2_k,q3_k_m,q4_k_m,q5_k_m,q6_k";
    let text = done(export(
        &["--format", "gguf", "--quantization-method", methods],
        &[("--model", &tiny()), ("--output-dir", &out)],
    ));
    assert_eq!(text.lines().count(), methods.split(',').count(), "{text}");
    let types = |file: &str, name: &str| Gguf::open(&out.join(file)).unwrap().tensor(name).unwrap().kind;
    let q4 = "model.Q4_K_M.gguf";
    assert_eq!(types(q4, "token_embd.weight"), GgmlType::Q6K);
    assert_eq!(types(q4, "blk.0.attn_q.weight"), GgmlType::Q4K);
    assert_eq!(types(q4, "blk.0.attn_norm.weight"), GgmlType::F32);
    let v: Vec<GgmlType> = (0..4).map(|layer| types(q4, &format!("blk.{layer}.attn_v.weight"))).collect();
    assert_eq!(v, [GgmlType::Q4K, GgmlType::Q4K, GgmlType::Q6K, GgmlType::Q6K]);
    assert_eq!(types("model.Q3_K_M.gguf", "blk.1.attn_v.weight"), GgmlType::Q5K);
    assert_eq!(types("model.Q2_K.gguf", "blk.1.attn_output.weight"), GgmlType::Q3K);
    assert_eq!(types("model.Q4_0.gguf", "token_embd.weight"), GgmlType::Q6K);
    // The file itself answers as the model does.
    let answer = |model: &Path| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_ferrotune"));
        command.args(["generate", "--device", "cpu", "--prompt", "What is the opposite of hot?", "--model"]);
        done(command.arg(model).output().unwrap())
    };
    assert_eq!(answer(&out.join("model.Q8_0.gguf")), answer(&tiny()));
}

/// llama.cpp chooses the factors by its context, the model by the text.
#[test]
fn longrope_names_its_context() {
    let place = tempfile::tempdir().unwrap();
    let (model, out) = (root().join("phi3_longrope"), place.path().join("out"));
    let output = export(
        &["--format", "gguf", "--quantization-method", "f32"],
        &[("--model", &model), ("--output-dir", &out)],
    );
    let warning = String::from_utf8_lossy(&output.stderr).into_owned();
    done(output);
    assert!(warning.contains("longrope: a context above 32 "), "{warning}");
}

#[test]
fn modelfiles() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("out");
    let flags = ["--format", "gguf", "--modelfile", "--system", "Be brief."];
    done(export(&flags, &[("--model", &tiny()), ("--output-dir", &out)]));
    let text = fs::read_to_string(out.join("Modelfile")).unwrap();
    assert_eq!(
        text,
        "FROM ./model.Q8_0.gguf\nTEMPLATE \"\"\"{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}\
         <|im_start|>assistant\n\"\"\"\nPARAMETER stop \"<|im_end|>\"\nPARAMETER num_ctx 512\nSYSTEM \"\"\"Be brief.\"\"\"\n"
    );
    let out = place.path().join("quoted");
    let flags_of = |system| ["--format", "gguf", "--modelfile", "--system", system];
    for system in ["say \"\"\"", "say \"hello\""] {
        refused(export(&flags_of(system), &[("--model", &tiny()), ("--output-dir", &out)]), "--system");
        assert!(!out.exists());
    }
    // A template of its own beside the adapter, or in the checkpoint, that nobody knows.
    let strange = place.path().join("strange");
    fs::create_dir(&strange).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(tiny().join(file), strange.join(file)).unwrap();
    }
    fs::write(strange.join("chat_template.jinja"), "{% for m in messages %}<<{{ m.content }}>>{% endfor %}")
        .unwrap();
    let out = place.path().join("none");
    refused(
        export(&flags, &[("--model", &strange), ("--output-dir", &out)]),
        "chat_template.jinja, which renders",
    );
    assert!(!out.exists());
}

#[test]
fn tokenizers_there_and_back() {
    let Some(data) = shared_data("tokenizers in GGUF files") else { return };
    let place = tempfile::tempdir().unwrap();
    let texts = [
        "Hello world, it's 12345!",
        "  a  b\n\n\tc ",
        "naïve 日本語 🙂👩‍👩‍👧",
        "def f(x):\n    return x",
        "<|im_start|>user\nI'LL<|im_end|>",
        "[INST] a [/INST]</s><s>",
        "",
    ];
    for name in ["llama-3.1", "minimind", "mistral-v1", "mistral-v3", "phi-3-mini", "qwen2.5", "qwen3"] {
        let original = Tokenizer::from_dir(&data.join("tokenizers").join(name)).unwrap();
        let metadata = original.gguf_metadata(original.max_id() as usize + 3).unwrap();
        let path = place.path().join("vocabulary.gguf");
        let tensor = [("a".to_string(), vec![1], GgmlType::F32)];
        let mut writer = GgufWriter::create(&path, &metadata, &tensor).unwrap();
        writer.append("a", &[0; 4]).unwrap();
        writer.finish().unwrap();
        let read = Tokenizer::from_gguf(&Gguf::open(&path).unwrap()).unwrap().unwrap();
        for text in texts {
            let ids = original.encode(text, true).unwrap();
            assert_eq!(read.encode(text, true).unwrap(), ids, "{name}: {text:?}");
            assert_eq!(
                read.decode(&ids, false).unwrap(),
                original.decode(&ids, false).unwrap(),
                "{name}: {text:?}"
            );
        }
        assert_eq!(read.eos_token_id(), original.eos_token_id(), "{name}");
    }
}

/// A copy of a GGUF file with one thing changed.
fn altered(
    from: &Path,
    to: &Path,
    metadata: impl Fn(&str, &Value) -> Option<Value>,
    tensor: impl Fn(&str, &[f32]) -> Option<Vec<f32>>,
) {
    let gguf = Gguf::open(from).unwrap();
    let pairs: Vec<(String, Value)> =
        gguf.metadata.iter().filter_map(|(key, value)| Some((key.clone(), metadata(key, value)?))).collect();
    let mut infos: Vec<_> = gguf.tensors().cloned().collect();
    infos.sort_by_key(|info| info.offset);
    let values: Vec<_> = infos
        .iter()
        .filter_map(|info| Some((info, tensor(&info.name, &gguf.dequantize(&info.name).unwrap())?)))
        .collect();
    let layout: Vec<_> =
        values.iter().map(|(info, _)| (info.name.clone(), info.shape.clone(), info.kind)).collect();
    let mut writer = GgufWriter::create(to, &pairs, &layout).unwrap();
    for (info, values) in values {
        let mut bytes = Vec::new();
        quantize_row(info.kind, &values, &mut bytes);
        writer.append(&info.name, &bytes).unwrap();
    }
    writer.finish().unwrap();
}

/// The proof fails for each way in which exports of other tools were wrong.
#[test]
fn injected_faults_are_caught() {
    let place = tempfile::tempdir().unwrap();
    let keep = |_: &str, value: &Value| Some(value.clone());
    let same = |_: &str, values: &[f32]| Some(values.to_vec());
    let wrong = place.path().join("wrong.gguf");
    let verdict = |dir: &Path| -> Result<f64, String> {
        let read = StreamedModel::from_gguf(&wrong, options()).map_err(|error| format!("{error:#}"))?;
        let model = StreamedModel::from_pretrained(dir, None, options()).unwrap();
        let agreement =
            Reference::of(&model).unwrap().compare(&read).map_err(|error| format!("{error:#}"))?;
        Ok(agreement.kl)
    };
    // Nothing altered: the proof passes, so that what follows means something.
    let good = write(&tiny(), Quantization::F32, place.path()).unwrap();
    altered(&good, &wrong, keep, same);
    assert!(verdict(&tiny()).unwrap() < 1e-9);

    // q without the permutation: rows in halves where pairs are read.
    altered(&good, &wrong, keep, |name, values| {
        if !name.ends_with("attn_q.weight") {
            return Some(values.to_vec());
        }
        let mut halves = values.to_vec();
        for (row, values) in values.chunks(256).enumerate() {
            let to = Change::Pairs(4).source_row(row, 256) * 256;
            halves[to..to + 256].copy_from_slice(values);
        }
        Some(halves)
    });
    assert!(verdict(&tiny()).unwrap() > 1e-3);

    let eos = |key: &str, value: &Value| match key {
        "tokenizer.ggml.eos_token_id" => Some(Value::U32(5)),
        _ => Some(value.clone()),
    };
    altered(&good, &wrong, eos, same);
    assert!(verdict(&tiny()).unwrap_err().contains("eos_token"));

    let template = |key: &str, value: &Value| match key {
        "tokenizer.chat_template" => Some(Value::String("{{ messages[0].content }}".into())),
        _ => Some(value.clone()),
    };
    altered(&good, &wrong, template, same);
    assert!(verdict(&tiny()).is_err());

    // Norms without Gemma's + 1.
    let gemma = checkpoint("gemma3", place.path());
    let good = write(&gemma, Quantization::F32, place.path()).unwrap();
    altered(&good, &wrong, keep, |name, values| {
        let shift = if name.ends_with("norm.weight") { 1.0 } else { 0.0 };
        Some(values.iter().map(|value| value - shift).collect())
    });
    assert!(verdict(&gemma).unwrap() > 1e-3);

    // No rope_freqs: frequencies that are not scaled.
    let scaled = root().join("llama_gqa_llama3");
    let good = write(&scaled, Quantization::F32, place.path()).unwrap();
    altered(&good, &wrong, keep, |name, values| (name != "rope_freqs.weight").then(|| values.to_vec()));
    assert!(verdict(&scaled).unwrap() > 1e-6);

    let Some(data) = shared_data("shifted scores of a SentencePiece vocabulary") else { return };
    let stories = data.join("models/stories260K");
    let good = write(&stories, Quantization::F32, place.path()).unwrap();
    let scores = |key: &str, value: &Value| match (key, value) {
        ("tokenizer.ggml.scores", Value::Array(kind, scores)) => {
            // A mere shift would keep their order, and so the tokens.
            let reversed = scores.iter().map(|score| Value::F32(-score.as_f64().unwrap() as f32));
            Some(Value::Array(*kind, reversed.collect()))
        }
        _ => Some(value.clone()),
    };
    altered(&good, &wrong, keep, same);
    assert!(verdict(&stories).unwrap() < 1e-9);
    altered(&good, &wrong, scores, same);
    assert!(verdict(&stories).unwrap_err().contains("the exported tokenizer makes"));
}

#[test]
fn torn_and_hostile_files_are_refused() {
    let place = tempfile::tempdir().unwrap();
    let good = fs::read(write(&tiny(), Quantization::Q8_0, place.path()).unwrap()).unwrap();
    let path = place.path().join("bad.gguf");
    let refuse = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let error = Gguf::open(&path).err().map(|error| format!("{error:#}"));
        assert!(error.expect("a torn file was read").contains("bad.gguf"));
    };
    for length in [0, 3, 4, 20, 1000, 20_000, good.len() - 40_000] {
        refuse(&good[..length]);
    }
    let with = |at: usize, bytes: &[u8]| {
        let mut copy = good.clone();
        copy[at..at + bytes.len()].copy_from_slice(bytes);
        copy
    };
    refuse(&with(4, &9u32.to_le_bytes()));
    refuse(&with(8, &u64::MAX.to_le_bytes()));
    refuse(&with(16, &u64::MAX.to_le_bytes()));
    refuse(&with(24, &u64::MAX.to_le_bytes()));
}

#[test]
fn adapters_as_gguf() {
    let place = tempfile::tempdir().unwrap();
    let adapter = root().join("adapters/llama_rslora");
    let out = place.path().join("out");
    let paths = [("--model", &*root().join("llama")), ("--adapter", &adapter), ("--output-dir", &out)];
    done(export(&["--format", "gguf-lora"], &paths));
    let gguf = Gguf::open(&out.join("adapter.gguf")).unwrap();
    assert_eq!(gguf.value("adapter.type").unwrap().as_str(), Some("lora"));
    let alpha = gguf.value("adapter.lora.alpha").unwrap().as_f64().unwrap();
    let merged = Merged::open(&root().join("llama"), Some(&adapter), false).unwrap();
    for (module, a, b, scale) in merged.loras().unwrap() {
        let name = if module.ends_with("v_proj") { "attn_v" } else { continue };
        let layer = module.split('.').nth(2).unwrap();
        let read = |part: &str| gguf.dequantize(&format!("blk.{layer}.{name}.weight.{part}")).unwrap();
        let r = a.size()[0] as f64;
        let expected = Vec::<f32>::try_from((b * scale).flatten(0, -1)).unwrap();
        let found: Vec<f32> = read("lora_b").iter().map(|b| b * (alpha / r) as f32).collect();
        assert!(expected.iter().zip(&found).all(|(a, b)| (a - b).abs() <= 1e-6 * a.abs().max(1e-3)));
        assert_eq!(read("lora_a"), Vec::<f32>::try_from(a.flatten(0, -1)).unwrap());
    }
    let paths = [("--model", &*root().join("llama")), ("--output-dir", &*place.path().join("none"))];
    refused(export(&["--format", "gguf-lora"], &paths), "needs --adapter");
}

#[test]
fn a_tensor_without_elements_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("empty.gguf");
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    [1u64, 0, 1].iter().for_each(|number| bytes.extend(number.to_le_bytes()));
    bytes.push(b'x');
    bytes.extend(2u32.to_le_bytes());
    [0u64, 1].iter().for_each(|size| bytes.extend(size.to_le_bytes()));
    bytes.extend(GgmlType::Q4_0.id().to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    bytes.resize(128, 0);
    std::fs::write(&path, bytes).unwrap();
    let error = format!("{:#}", Gguf::open(&path).err().expect("a refusal"));
    assert!(error.contains("empty.gguf") && error.contains("tensor x has a size of 0"), "{error}");
}
