//! Sampling beside transformers' processors; the loop, its text and its stops; caches that are rewound.

use std::fs;

use ferrotune::data::Tokenizer;
use ferrotune::generate::{
    Engine, EngineOptions, FinishReason, GenerationConfig, KvBudget, Sampler, SamplingParams, TextStream,
    generate,
};
use ferrotune::models::{Config, Decoder, FastLanguageModel, NewRows};
use ferrotune::nn::{PAGE_SIZE, RopeTables};
use ferrotune::ops::LoraRun;
use ferrotune::ops::proof::Distance;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::engine_logprobs::with_weights_of;
use crate::golden::{Fed, Flat, adapters, assert_close, checkpoints, load, logits, rel, root, shared_data};
use crate::tolerance::{What, assert_allowed};

fn ids(value: &Value) -> Vec<i64> {
    serde_json::from_value(value.clone()).unwrap()
}

/// Logits `[N, V]` of one pass over pages with sequences that start, go on after a few tokens, and have one new token, in the order
/// of `plan` (tokens before, new tokens), with `lora`; and those of one forward pass of each of them with the model's own.
pub fn mixed_pass(decoder: &Decoder, plan: &[(usize, usize)], lora: &[LoraRun]) -> [Tensor; 2] {
    let vocab = decoder.config.vocab_size;
    let ids: Vec<Vec<i64>> = (1..)
        .zip(plan)
        .map(|(salt, &(past, new))| (0..(past + new) as i64).map(|i| (i * i + 5 * salt) % vocab).collect())
        .collect();
    let needed: usize = ids.iter().map(|ids| ids.len().div_ceil(PAGE_SIZE)).sum();
    let pages = decoder.kv_pages(needed).unwrap();
    let mut free: Vec<i32> = (0..needed as i32).collect();
    let tables: Vec<Vec<i32>> = ids
        .iter()
        .map(|ids| free.split_off(free.len() - ids.len().div_ceil(PAGE_SIZE)).into_iter().rev().collect())
        .collect();
    let mut ropes = RopeTables::default();
    let mut pass = |from: &dyn Fn(usize) -> usize, to: &dyn Fn(usize) -> usize, lora: &[LoraRun]| {
        let rows = |at: usize| NewRows {
            input_ids: &ids[at][from(at)..to(at)],
            past: from(at),
            length: ids[at].len(),
            pages: &tables[at][..to(at).div_ceil(PAGE_SIZE)],
        };
        let fed: Vec<NewRows> = (0..plan.len()).filter(|&at| from(at) < to(at)).map(rows).collect();
        decoder.decode(&fed, &pages, &mut ropes, lora).unwrap()
    };
    if plan.iter().any(|&(past, _)| past > 0) {
        let _ = pass(&|_| 0, &|at| plan[at].0, &[]);
    }
    let hidden = pass(&|at| plan[at].0, &|at| ids[at].len(), lora);
    let ours = tch::no_grad(|| decoder.logits(&hidden).unwrap());
    let whole = ids.iter().zip(plan).map(|(ids, &(past, new))| {
        logits(decoder, &Flat::new([&ids[..]])).narrow(0, past as i64, new as i64)
    });
    [ours, Tensor::cat(&whole.collect::<Vec<_>>(), 0)]
}

/// Sequences of every kind side by side and apart, past a page and past a window.
pub const MIXED: [&[(usize, usize)]; 4] = [
    &[(0, 5), (7, 1), (9, 4), (0, 3), (20, 1), (0, 1), (16, 17), (0, 33), (3, 2)],
    &[(12, 1), (40, 1), (9, 23), (0, 18), (0, 40)],
    &[(5, 30)],
    &[(0, 21), (0, 21)],
];

#[test]
fn a_pass_of_every_kind_of_sequence_gives_the_uncached_logits() {
    let mut distances = Vec::new();
    for name in checkpoints() {
        let decoder = load(&root().join(&name), Kind::Double);
        for plan in MIXED {
            let [ours, whole] = mixed_pass(&decoder, plan, &[]);
            distances.push((format!("{name} {plan:?}"), rel(&ours, &whole)));
        }
    }
    assert_close(1e-11, distances);
}

/// Rows of f32 beside weights, keys and values of 16 bits, up to 64 by the kernels and more by ATen's products: nearer to f64 than the rule asks.
#[test]
fn a_pass_in_16_bits_keeps_the_rule() {
    // 83 rows, and 130.
    let long: &[(usize, usize)] = &[(20, 1), (0, 60), (4, 68), (31, 1)];
    for name in checkpoints() {
        let dir = root().join(&name);
        for plan in MIXED.into_iter().chain([long]) {
            for kind in [Kind::BFloat16, Kind::Half] {
                if kind == Kind::Half && Config::from_dir(&dir).unwrap().overflows_f16() {
                    continue;
                }
                let decoder = load(&dir, Kind::Double);
                with_weights_of(&decoder, kind);
                let [reference, _] = mixed_pass(&decoder, plan, &[]);
                let [ours, plain] = mixed_pass(&load(&dir, kind), plan, &[]);
                assert_eq!(ours.kind(), Kind::Float);
                let distance = Distance::new(kind, What::Value, &ours, &plain, &reference).unwrap();
                assert_allowed(&format!("{name}, {plan:?}, {kind:?}"), distance);
            }
        }
    }
}

/// The fields that a golden names, all others off.
fn params(given: &Value) -> SamplingParams {
    let number = |key: &str, neutral: f64| given[key].as_f64().unwrap_or(neutral);
    SamplingParams {
        temperature: number("temperature", 1.0),
        top_k: number("top_k", 0.0) as usize,
        top_p: number("top_p", 1.0),
        min_p: number("min_p", 0.0),
        repetition_penalty: number("repetition_penalty", 1.0),
        ..Default::default()
    }
}

#[test]
fn filtered_probabilities_equal_transformers() {
    let golden: Value =
        serde_json::from_str(&fs::read_to_string(root().join("sampling.json")).unwrap()).unwrap();
    let mut distances = Vec::new();
    for case in golden["cases"].as_array().unwrap() {
        let row = golden["logits"][case["name"].as_str().unwrap()].as_array().unwrap();
        let mut row: Vec<f32> =
            row.iter().map(|logit| logit.as_f64().map_or(f32::NEG_INFINITY, |logit| logit as f32)).collect();
        let mut sampler = Sampler::new(&params(&case["params"]), 0, &ids(&case["prompt"]), row.len());
        let found = sampler.probabilities(&mut row).unwrap();
        let expected: Vec<f64> = serde_json::from_value(case["probabilities"].clone()).unwrap();
        let difference = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        let same_tokens = found.iter().zip(&expected).all(|(a, b)| (*a > 1e-30) == (*b > 1e-30));
        let distance = if same_tokens { difference } else { f64::INFINITY };
        distances.push((format!("{} {}", case["name"], case["params"]), distance));
    }
    assert_close(1e-6, distances);
}

#[test]
fn draws_follow_the_probabilities_and_the_seed() {
    let row: Vec<f32> = (0..12).map(|i| (i as f32 * 1.7).sin() * 2.0).collect();
    let params = SamplingParams { temperature: 0.9, top_k: 9, top_p: 0.97, ..Default::default() };
    let sampler = Sampler::new(&params, 0, &[], row.len());
    let expected = sampler.clone().probabilities(&mut row.clone()).unwrap();
    let draws = 20_000;
    let draw = |mut sampler: Sampler| -> Vec<i64> {
        (0..draws).map(|_| sampler.sample(&mut row.clone()).unwrap()).collect()
    };
    let drawn = draw(sampler.clone());
    for (id, p) in expected.iter().enumerate() {
        let found = drawn.iter().filter(|&&drawn| drawn == id as i64).count() as f64 / f64::from(draws);
        // Five standard deviations.
        assert!((found - p).abs() <= 5.0 * (p * (1.0 - p) / f64::from(draws)).sqrt(), "{id}: {found}, {p}");
    }
    assert_eq!(drawn, draw(Sampler::new(&params, 0, &[], row.len())));
    assert_ne!(drawn, draw(Sampler::new(&params, 1, &[], row.len())), "another stream");
    assert_ne!(drawn, draw(Sampler::new(&SamplingParams { seed: 1, ..params.clone() }, 0, &[], row.len())));

    for bad in [f32::NAN, f32::INFINITY] {
        for at in [0, 5] {
            let mut row = row.clone();
            row[at] = bad;
            assert!(sampler.clone().sample(&mut row).is_err(), "{bad} at {at}");
        }
    }
}

#[test]
fn greedy_text_of_trained_models() {
    let Some(data) = shared_data("greedy text of trained models") else { return };
    for name in ["stories260K", "tinystories-656k"] {
        let dir = data.join("models").join(name);
        let model = FastLanguageModel::from_pretrained(&dir, Kind::Float, Device::Cpu).unwrap();
        let text = fs::read_to_string(data.join("golden").join(name).join("greedy.json")).unwrap();
        let golden: Value = serde_json::from_str(&text).unwrap();
        for case in golden["cases"].as_array().unwrap() {
            let prompt = case["prompt"].as_str().unwrap();
            let prompt_ids = model.prompt_ids(prompt).unwrap();
            assert_eq!(prompt_ids, ids(&case["prompt_ids"]));
            let mut streamed = String::new();
            let params = model.generation_params().unwrap();
            let generation = model.generate(&prompt_ids, &params, |token| streamed += &token.text).unwrap();
            assert_eq!(generation.token_ids, ids(&case["new_ids"]), "{name}: {prompt}");
            let stopped = case["stopped_on_eos"].as_bool().unwrap();
            let reason = if stopped { FinishReason::Stop } else { FinishReason::Length };
            assert_eq!(generation.finish_reason, reason);
            assert_eq!(streamed, generation.text);
            // The golden's text has the start token's and the stop token's names, which are no special tokens to this
            // tokenizer.
            let whole = case["text"].as_str().unwrap().trim_end_matches(" <|end_story|>");
            let whole = whole.trim_start_matches("<|start_story|>").trim_start();
            assert_eq!(format!("{prompt}{streamed}").trim_start(), whole, "{name}: {prompt}");
        }
    }
}

#[test]
fn streamed_text_is_whole() {
    let Some(data) = shared_data("streaming of real tokenizers") else { return };
    let texts = [
        "Größe 👩‍👩‍👧 naïve, 東京 and 한국어: ﷽ done.",
        " leading  spaces\n\n\ttabs and a lone \u{fffd} in it",
        "fn main() { println!(\"{}\", 0.1 + 0.2); }",
    ];
    let mut seen = 0;
    let mut folders: Vec<_> = ["tokenizers", "models"]
        .iter()
        .flat_map(|folder| fs::read_dir(data.join(folder)).unwrap())
        .map(|entry| entry.unwrap().path())
        .filter(|dir| dir.join("tokenizer.json").is_file())
        .collect();
    folders.sort();
    for dir in folders {
        let tokenizer = Tokenizer::from_dir(&dir).unwrap();
        for text in texts {
            let all: Vec<i64> = tokenizer.encode(text, false).unwrap().into_iter().map(i64::from).collect();
            for prompt in [0, 1, all.len() / 2] {
                let mut stream = TextStream::new(&tokenizer, &all[..prompt], &[]).unwrap();
                let mut pieces: Vec<String> =
                    all[prompt..].iter().map(|&id| stream.push(&tokenizer, id).unwrap()).collect();
                // Where the prompt ends inside a character, so does the text before the stream.
                let split = decoded(&tokenizer, &all[..prompt]).ends_with('\u{fffd}');
                assert!(
                    split || pieces.iter().all(|piece| !piece.ends_with('\u{fffd}')),
                    "{}",
                    dir.display()
                );
                pieces.push(stream.finish(&tokenizer).unwrap());
                if !split {
                    let shown = decoded(&tokenizer, &all[..prompt]) + &pieces.concat();
                    assert_eq!(shown, decoded(&tokenizer, &all), "{}, from {prompt}", dir.display());
                }
                seen += 1;
            }
        }
    }
    assert!(seen > 30, "only {seen} texts");
}

fn decoded(tokenizer: &Tokenizer, ids: &[i64]) -> String {
    tokenizer.decode(&ids.iter().map(|&id| id as u32).collect::<Vec<_>>(), true).unwrap()
}

#[test]
fn stop_strings_end_the_text_before_them() {
    let Some(data) = shared_data("stop strings") else { return };
    let dir = data.join("models/stories260K");
    let model = FastLanguageModel::from_pretrained(&dir, Kind::Float, Device::Cpu).unwrap();
    let prompt = model.prompt_ids("").unwrap();
    let run = |stop: &[&str]| {
        let stop = stop.iter().map(|stop| stop.to_string()).collect();
        let params = SamplingParams { stop, ..model.generation_params().unwrap() };
        let mut pieces = Vec::new();
        let generation = model.generate(&prompt, &params, |token| pieces.push(token.text.clone())).unwrap();
        assert_eq!(pieces.concat(), generation.text);
        (generation, pieces)
    };
    let (whole, _) = run(&[]);
    for stop in ["named Lily", ". She loved", "ed red b", "park. One", ", it was too high.\nLily's", "a"] {
        let (generation, pieces) = run(&["never in the text", stop]);
        let Some((before, _)) = whole.text.split_once(stop) else {
            assert_eq!(generation.text, whole.text, "{stop} does not occur");
            continue;
        };
        assert_eq!(generation.text, before, "{stop}");
        assert_eq!(generation.finish_reason, FinishReason::StopString);
        assert!(generation.token_ids.len() < whole.token_ids.len());
        assert!(pieces.iter().all(|piece| !piece.contains(stop)));
    }
    // Of two, the one that comes first in the text.
    assert_eq!(run(&["Lily", "little girl"]).0.text, whole.text.split_once("little girl").unwrap().0);
    // What looks like a stop string up to the last token is text after all.
    let params = SamplingParams {
        stop: vec!["Once upon a time, there was not".into()],
        max_new_tokens: 8,
        ..Default::default()
    };
    let generation = model.generate(&prompt, &params, |_| ()).unwrap();
    assert!(whole.text.starts_with(&generation.text) && generation.text.len() > 10, "{:?}", generation.text);
}

#[test]
fn rewound_and_grown_caches_give_the_uncached_logits() {
    let mut distances = Vec::new();
    // Every architecture: sliding windows, softcaps, ropes that depend on the length.
    for name in checkpoints() {
        let decoder = load(&root().join(&name), Kind::Double);
        let vocab = decoder.config.vocab_size;
        let context = decoder.config.max_position_embeddings.min(72);
        let long: Vec<i64> = (0..context).map(|i| (i * i + 3) % vocab).collect();
        let other: Vec<i64> =
            long.iter().enumerate().map(|(i, &id)| if i < 12 { id } else { (id + 1) % vocab }).collect();
        let mut fed = Fed::new(&decoder, long.len());
        let mut before: &[i64] = &[];
        // Grows, goes back, branches off, feeds the same again, and starts anew.
        for (ids, end) in
            [(&long, 9), (&long, 70), (&other, 14), (&other, 14), (&other, 71), (&long, 40), (&long, 1)]
        {
            let ids = &ids[..end.min(ids.len())];
            let common = before.iter().zip(ids).take_while(|(old, new)| old == new).count();
            let cached = fed.logits(ids, common);
            let uncached = logits(&decoder, &Flat::new([ids])).get(ids.len() as i64 - 1);
            distances.push((format!("{name} to {end}"), rel(&cached, &uncached)));
            before = ids;
        }
        // One by one from nothing.
        for i in 0..long.len() {
            let cached = fed.logits(&long[..=i], i);
            if i % 7 == 6 {
                let uncached = logits(&decoder, &Flat::new([&long[..=i]])).get(i as i64);
                distances.push((format!("{name} token {i}"), rel(&cached, &uncached)));
            }
        }
    }
    assert_close(1e-11, distances);
}

#[test]
fn an_iterator_can_stop_early_and_go_on() {
    let decoder = load(&root().join("qwen2"), Kind::Float);
    let params = SamplingParams { max_new_tokens: 12, ..Default::default() };
    let whole = generate(&decoder, &[3, 4, 5], &params).unwrap().token_ids;
    let options = EngineOptions::new(KvBudget::Tokens(64), 2);
    let mut engine = Engine::new(&decoder, options).unwrap();
    let first: Vec<i64> = engine
        .stream(&decoder, &[3, 4, 5], &params)
        .unwrap()
        .take(5)
        .map(|token| token.unwrap().id)
        .collect();
    assert_eq!(first, whole[..5]);
    assert!(engine.is_idle() && engine.stats().pages_held == 0, "a stream that is dropped leaves nothing");
    let so_far = [&[3, 4, 5], &whole[..5]].concat();
    let params = SamplingParams { max_new_tokens: 7, ..params };
    let rest: Vec<i64> =
        engine.stream(&decoder, &so_far, &params).unwrap().map(|token| token.unwrap().id).collect();
    assert_eq!(rest, whole[5..]);

    // A stop token ends it and is among the tokens.
    let stop = whole[3];
    let params = SamplingParams { stop_token_ids: vec![stop], ..params };
    let stopped = generate(&decoder, &[3, 4, 5], &params).unwrap();
    let end = whole.iter().position(|&id| id == stop).unwrap();
    assert_eq!((stopped.token_ids, stopped.finish_reason), (whole[..=end].to_vec(), FinishReason::Stop));
}

#[test]
fn bad_input_is_named() {
    let decoder = load(&root().join("llama"), Kind::Float);
    let context = decoder.config.max_position_embeddings as usize;
    let error = |prompt: &[i64], params: SamplingParams| {
        format!("{:#}", generate(&decoder, prompt, &params).unwrap_err())
    };
    let ok = SamplingParams::default;
    for (message, needle) in [
        (error(&[], ok()), "the prompt is empty".to_string()),
        (error(&vec![1; context + 3], ok()), format!("{} tokens, the model's context", context + 3)),
        (error(&[1, 64], ok()), "token id 64 is outside".into()),
        (error(&[-1], ok()), "token id -1 is outside".into()),
        (error(&[1], SamplingParams { temperature: -0.5, ..ok() }), "temperature is -0.5".into()),
        (error(&[1], SamplingParams { temperature: f64::NAN, ..ok() }), "temperature is NaN".into()),
        // Divided by so little, no score would be left.
        (
            error(&[1], SamplingParams { temperature: 1e-39, top_p: 0.9, ..ok() }),
            "from 0.0001 to 10000".into(),
        ),
        (error(&[1], SamplingParams { frequency_penalty: -1e300, ..ok() }), "from -1000 to 1000".into()),
        (error(&[1], SamplingParams { top_p: 0.0, ..ok() }), "top_p is 0".into()),
        (error(&[1], SamplingParams { min_p: 2.0, ..ok() }), "min_p is 2".into()),
        (
            error(&[1], SamplingParams { presence_penalty: f64::INFINITY, ..ok() }),
            "presence_penalty is inf".into(),
        ),
        (error(&[1], SamplingParams { repetition_penalty: 0.0, ..ok() }), "repetition_penalty is 0".into()),
        (error(&[1], SamplingParams { stop: vec!["".into()], ..ok() }), "stop has an empty text".into()),
        (error(&[1], SamplingParams { stop: vec!["x".into()], ..ok() }), "need a tokenizer".into()),
        (error(&[1], SamplingParams { max_new_tokens: 0, ..ok() }), "max_new_tokens is 0".into()),
    ] {
        assert!(message.contains(&needle), "{message}, expected {needle}");
    }
    // The context ends an answer before max_new_tokens.
    let full = generate(&decoder, &vec![1; context - 2], &ok()).unwrap();
    assert_eq!((full.token_ids.len(), full.finish_reason), (2, FinishReason::Length));
}

#[test]
fn generation_configs_give_the_defaults() {
    let config = GenerationConfig::from_json(
        r#"{"bos_token_id": 1, "do_sample": true, "eos_token_id": [7, 9], "temperature": 0.6, "top_p": 0.9,
            "top_k": 20, "max_new_tokens": null, "transformers_version": "4.51.0"}"#,
    )
    .unwrap();
    let expected = SamplingParams {
        temperature: 0.6,
        top_p: 0.9,
        top_k: 20,
        stop_token_ids: vec![7, 9],
        ..SamplingParams::default()
    };
    assert_eq!(config.params(), expected);
    let greedy = GenerationConfig::from_json(r#"{"eos_token_id": 2, "temperature": 0.6}"#).unwrap();
    assert_eq!((greedy.params().temperature, greedy.params().stop_token_ids), (0.0, vec![2]));
    assert_eq!(GenerationConfig::from_dir(&root()).unwrap(), GenerationConfig::default());
    for (bad, needle) in [
        ("[]", "not a JSON object"),
        (r#"{"top_k": -3}"#, "top_k is -3"),
        (r#"{"eos_token_id": "x"}"#, "eos_token_id"),
        (r#"{"temperature": "hot"}"#, "temperature"),
    ] {
        let error = format!("{:#}", GenerationConfig::from_json(bad).unwrap_err());
        assert!(error.contains(needle), "{bad}: {error}");
    }
}

#[test]
fn cached_logits_with_an_adapter_equal_uncached() {
    let mut distances = Vec::new();
    for name in adapters() {
        let folder = root().join("adapters").join(&name);
        let config: Value =
            serde_json::from_str(&fs::read_to_string(folder.join("adapter_config.json")).unwrap()).unwrap();
        let base = root().join(config["base_model_name_or_path"].as_str().unwrap());
        // LoRA is f32, so this is not a matter of f64.
        let mut model = FastLanguageModel::from_pretrained(&base, Kind::Float, Device::Cpu).unwrap();
        model.load_adapter(&folder).unwrap();
        let all: Vec<i64> = (0..24).map(|i| (i * i + 5) % model.decoder.config.vocab_size).collect();
        let mut fed = Fed::new(&model.decoder, all.len());
        for i in 0..all.len() {
            let cached = fed.logits(&all[..=i], i);
            let uncached = logits(&model.decoder, &Flat::new([&all[..=i]])).get(i as i64);
            distances.push((format!("{name} token {i}"), rel(&cached, &uncached)));
        }
    }
    assert_close(1e-5, distances);
}
