//! Decoding on the GPU: attention over pages, drawing, and the engine beside the trainer's forward.

use std::collections::HashMap;

use ferrotune::generate::{
    Engine, EngineOptions, EventKind, KvBudget, Request, RequestId, Sampler, SamplingParams,
};
use ferrotune::models::{Config, Decoder, FastLanguageModel, NewRows};
use ferrotune::nn::LoadOptions;
use ferrotune::ops::proof::Distance;
use ferrotune::ops::{self, Draw};
use tch::{Device, Kind, Tensor};

use crate::generate::{MIXED, mixed_pass};
use crate::golden::{Flat, logits};
use crate::gpu::gpu;
use crate::tolerance::{What, assert_allowed, assert_close, rel};

pub fn shape(json: &str) -> Config {
    let base = r#""vocab_size": 512, "hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 3,
        "max_position_embeddings": 16384, "initializer_range": 0.05"#;
    Config::from_json(&format!("{{{base}, {json}}}")).unwrap()
}

/// Head sizes, groups, windows, softcaps and norms of the kernel.
pub fn shapes() -> Vec<(&'static str, Config)> {
    vec![
        (
            "D 64, groups of 4",
            shape(r#""model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 2"#),
        ),
        (
            "D 128, groups of 7",
            shape(
                r#""model_type": "qwen2", "hidden_size": 896, "num_attention_heads": 7, "num_key_value_heads": 1"#,
            ),
        ),
        (
            "D 96",
            shape(
                r#""model_type": "phi3", "hidden_size": 384, "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0"#,
            ),
        ),
        (
            "norms of heads",
            shape(
                r#""model_type": "qwen3", "head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 2"#,
            ),
        ),
        (
            "a window",
            shape(
                r#""model_type": "mistral", "head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": 200"#,
            ),
        ),
        (
            "D 256, softcap, a window",
            shape(
                r#""model_type": "gemma2", "head_dim": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 150, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "hidden_activation": "gelu_pytorch_tanh""#,
            ),
        ),
        (
            "D 32, which no kernel takes",
            shape(
                r#""model_type": "llama", "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2"#,
            ),
        ),
    ]
}

/// On the CPU in f64, with the values of `decoder`'s weights.
fn exact(decoder: &Decoder) -> Decoder {
    let exact =
        Decoder::random(decoder.config.clone(), LoadOptions::new(Kind::Double, Device::Cpu), 0).unwrap();
    let state: HashMap<String, Tensor> = decoder.state_dict(Kind::Double).unwrap().into_iter().collect();
    let _no_grad = tch::no_grad_guard();
    exact
        .each_weight(|name, weight| {
            weight.shallow_clone().copy_(&state[name]);
            Ok(())
        })
        .unwrap();
    exact
}

/// Greedy answers of different lengths in one engine; log-probabilities beside those of the trainer's forward on the same
/// tokens, in the same dtype, and of f64: by the tolerance rule, and near each other whatever the trainer's error is.
#[test]
fn log_probabilities_are_the_trainers() {
    let Some(device) = gpu("the engine beside the trainer") else { return };
    for (name, config) in shapes() {
        for (kind, load_in_4bit) in
            [(Kind::BFloat16, false), (Kind::Half, false), (Kind::BFloat16, true), (Kind::Float, false)]
        {
            if kind == Kind::Half && config.overflows_f16() {
                continue;
            }
            let options = LoadOptions { load_in_4bit, ..LoadOptions::new(kind, device) };
            let decoder = Decoder::random(config.clone(), options, 11).unwrap();
            let prompts: Vec<Vec<i64>> = [1_i64, 15, 16, 17, 130, 257, 600, 1000]
                .map(|n| (0..n).map(|i| (i * i + n) % 512).collect())
                .into();
            let params = SamplingParams { max_new_tokens: 40, logprobs: Some(0), ..Default::default() };
            let options = EngineOptions::new(KvBudget::Tokens(4096), 16);
            let mut engine = Engine::new(&decoder, options).unwrap();
            let requests = prompts.iter().map(|prompt| Request::new(prompt, &params));
            let answers = engine.run(&decoder, requests, |_, _, _| ()).unwrap();
            assert_eq!(engine.stats().pages_held, 0, "{name}");
            let exact = exact(&decoder);
            let (mut ours, mut trainer, mut expected) = (Vec::new(), Vec::new(), Vec::new());
            for (prompt, answer) in prompts.iter().zip(&answers) {
                let answer = &answer[0];
                let ids = [&prompt[..], &answer.token_ids].concat();
                let of = |decoder: &Decoder| {
                    let all = decoder.log_probs(&ids).unwrap().to_device(Device::Cpu);
                    all.narrow(0, prompt.len() as i64 - 1, answer.token_ids.len() as i64)
                };
                trainer.push(of(&decoder));
                expected.push(of(&exact).to_kind(Kind::Double));
                let logprobs: Vec<f32> = answer.logprobs.iter().map(|logprobs| logprobs.logprob).collect();
                ours.push(Tensor::from_slice(&logprobs));
            }
            let [ours, trainer, expected] = [ours, trainer, expected].map(|values| Tensor::cat(&values, 0));
            let distance = Distance::new(kind, What::Value, &ours, &trainer, &expected).unwrap();
            let difference = (&ours - &trainer).abs();
            let (most, mean) =
                (difference.max().double_value(&[]), difference.mean(Kind::Float).double_value(&[]));
            println!(
                "{name}, {kind:?}, 4-bit {load_in_4bit}: at most {most:.2e} apart, {mean:.2e} on average; {:.2} of what the rule allows",
                distance.share()
            );
            let label = format!("{name}, {kind:?}, 4-bit {load_in_4bit}");
            assert_allowed(&label, distance);
            let apart = rel(&ours, &trainer)[0];
            let bound = match kind {
                Kind::Float => 1e-5,
                Kind::Half => 5e-3,
                _ => 3e-2,
            };
            assert!(apart < bound, "{label}: {apart:.2e} from the trainer's");
        }
    }
}

/// Token by token over pages, with graphs, beside one forward pass of all: by the tolerance rule.
#[test]
fn decoded_logits_are_the_forwards() {
    let Some(device) = gpu("decoding beside the forward pass") else { return };
    for (name, config) in shapes() {
        let ids: Vec<i64> = (0..700).map(|i| (i * i + 7) % 512).collect();
        let on = |kind, device| {
            let decoder = Decoder::random(config.clone(), LoadOptions::new(kind, device), 5).unwrap();
            let all = logits(&decoder, &Flat::new([&ids[..]]));
            (decoder, all)
        };
        let (_, reference) = on(Kind::Double, Device::Cpu);
        let (decoder, plain) = on(Kind::BFloat16, device);
        let (pages, mut rows) = (decoder.kv_pages(64).unwrap(), Vec::new());
        let table: Vec<i32> = (0..64).rev().collect();
        let mut ropes = ferrotune::nn::RopeTables::default();
        for (fed, &id) in ids.iter().enumerate() {
            let new = NewRows {
                input_ids: &[id],
                past: fed,
                length: ids.len(),
                pages: &table[..(fed + 1).div_ceil(16)],
            };
            let hidden = decoder.decode(&[new], &pages, &mut ropes, &[]).unwrap();
            let _no_grad = tch::no_grad_guard();
            rows.push(decoder.logits(&hidden).unwrap());
        }
        let ours = Tensor::cat(&rows, 0).to_kind(Kind::BFloat16);
        assert_close(name, What::Value, &ours, &plain.to_kind(Kind::BFloat16), &reference);
    }
}

/// Prompts that start and go on beside single tokens, by one call of each kind, beside one forward pass of each: by the tolerance rule.
#[test]
fn a_pass_of_every_kind_of_sequence() {
    let Some(device) = gpu("a pass of every kind of sequence") else { return };
    // As MIXED, past several windows and tiles.
    let long: &[(usize, usize)] = &[(260, 1), (0, 300), (130, 170), (1, 500), (700, 3), (0, 2), (31, 1)];
    for (name, config) in shapes() {
        for plan in MIXED.into_iter().chain([long]) {
            let pass = |kind, device| {
                let options = LoadOptions::new(kind, device);
                mixed_pass(&Decoder::random(config.clone(), options, 5).unwrap(), plan, &[])
            };
            let [reference, _] = pass(Kind::Double, Device::Cpu);
            for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
                if kind == Kind::Half && config.overflows_f16() {
                    continue;
                }
                let [ours, plain] = pass(kind, device).map(|logits| logits.to_kind(kind));
                let label = format!("{name}, {plan:?}, {kind:?}");
                assert_close(&label, What::Value, &ours, &plain, &reference);
            }
        }
    }
}

#[test]
fn the_gpu_draws_as_the_host_does() {
    let Some(device) = gpu("drawing") else { return };
    let neutral = SamplingParams::default();
    let all = [
        neutral.clone(),
        SamplingParams { temperature: 1.0, ..neutral.clone() },
        SamplingParams { temperature: 0.7, top_k: 40, ..neutral.clone() },
        SamplingParams { temperature: 1.3, top_p: 0.9, ..neutral.clone() },
        SamplingParams { temperature: 1.0, top_p: 0.3, min_p: 0.05, ..neutral.clone() },
        SamplingParams { temperature: 0.9, top_k: 7, top_p: 0.8, min_p: 0.1, ..neutral.clone() },
        SamplingParams { temperature: 1.0, top_k: 1, ..neutral.clone() },
        SamplingParams { temperature: 2.0, top_p: 1e-6, ..neutral.clone() },
    ];
    // These need no threshold, and a kernel of their own draws few rows of them.
    let plain: Vec<SamplingParams> = [(0.0, 0.0), (1.0, 0.0), (0.6, 0.0), (1.0, 0.05), (1.7, 0.3)]
        .map(|(temperature, min_p)| SamplingParams { temperature, min_p, ..neutral.clone() })
        .into();
    // A row is the work of 1, 2, 4 or 8 thread blocks.
    for (vocab, ties, rows) in [
        (1_i64, false, 96),
        (1, false, 3),
        (37, true, 96),
        (37, true, 16),
        (36, true, 8),
        (1028, true, 1),
        (5000, true, 96),
        (5000, true, 64),
        (5001, true, 8),
        (5000, false, 32),
        (128_256, false, 96),
        (128_256, false, 16),
        (262_144, false, 40),
        (151_936, true, 2),
        (262_144, true, 8),
    ] {
        let mut random = Tensor::randn([rows, vocab], (Kind::Float, Device::Cpu)) * 4.0;
        if ties {
            // Few different values: what is dropped of equals counts.
            random = (random * 0.5).round();
        }
        let host = random.copy();
        let log_softmax = random.to_kind(Kind::Double).log_softmax(-1, Kind::Double);
        for params in [&all[..], &plain] {
            let mut expected = Vec::new();
            let mut draws = Vec::new();
            for row in 0..rows {
                let params = &params[row as usize % params.len()];
                let uniform = (row as f64 + 0.5) / rows as f64;
                let SamplingParams { temperature, top_k, top_p, min_p, .. } = *params;
                draws.push(Draw { temperature, top_k, top_p, min_p, uniform });
                let mut values = Vec::<f32>::try_from(host.get(row)).unwrap();
                let probabilities =
                    Sampler::new(params, 0, &[], vocab as usize).probabilities(&mut values).unwrap();
                expected.push((probabilities, uniform));
            }
            let drawn = ops::sample(&random.to_device(device), &draws).unwrap().wait().unwrap();
            for (row, (drawn, (probabilities, uniform))) in drawn.iter().zip(&expected).enumerate() {
                let id = drawn.id.unwrap() as usize;
                let before: f64 = probabilities[..id].iter().sum();
                let label = format!("V {vocab}, ties {ties}, row {row}: {:?} gave {id}", draws[row]);
                // f32 weights, 2^-40 steps: the edges of a token's range are known to about 1e-5.
                assert!(probabilities[id] > 0.0, "{label}, which the filters drop");
                assert!(
                    before <= uniform + 1e-5 && *uniform <= before + probabilities[id] + 1e-5,
                    "{label}, from {before}"
                );
                let logprob = log_softmax.double_value(&[row as i64, id as i64]);
                assert!(
                    (logprob - f64::from(drawn.logprob)).abs() < 1e-4,
                    "{label}: {logprob}, {}",
                    drawn.logprob
                );
                let of_filtered = probabilities[id].ln() - f64::from(drawn.sampling_logprob);
                assert!(of_filtered.abs() < 1e-4, "{label}: {} of the filtered", drawn.sampling_logprob);
            }
        }
    }
    let mut broken = Tensor::zeros([3, 100], (Kind::Float, device));
    let _ = broken.get(0).fill_(f64::NAN);
    let _ = broken.get(2).fill_(f64::NEG_INFINITY);
    let greedy = Draw { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, uniform: 0.0 };
    let ids: Vec<Option<i64>> =
        ops::sample(&broken, &[greedy; 3]).unwrap().wait().unwrap().iter().map(|drawn| drawn.id).collect();
    assert_eq!(ids, [None, Some(0), None]);
    broken = broken.get(1).view([1, -1]).copy();
    assert_eq!(ops::sample(&broken, &[greedy]).unwrap().wait().unwrap()[0].id, Some(0));
}

/// Penalties, several samples, an adapter beside the model, requests that come and go: what the CPU gives in f32.
#[test]
fn the_engine_on_the_gpu_gives_the_cpus_answers() {
    let Some(device) = gpu("the engine on the GPU beside the CPU's") else { return };
    let config = shape(r#""model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 2"#);
    let answers = |device| {
        let decoder = Decoder::random(config.clone(), LoadOptions::new(Kind::Float, device), 3).unwrap();
        let options = EngineOptions::new(KvBudget::Tokens(2048), 12);
        let mut engine = Engine::new(&decoder, options).unwrap();
        let requests = (0..12_u64).map(|at| {
            let prompt: Vec<i64> = (0..5 + 3 * at as i64).map(|i| (i * i + at as i64) % 512).collect();
            let params = SamplingParams {
                temperature: if at % 3 == 0 { 0.0 } else { 0.8 },
                repetition_penalty: if at % 4 == 1 { 1.3 } else { 1.0 },
                presence_penalty: if at % 4 == 2 { 0.5 } else { 0.0 },
                frequency_penalty: if at % 4 == 2 { 0.2 } else { 0.0 },
                top_p: 0.95,
                seed: at,
                max_new_tokens: 20,
                ..Default::default()
            };
            Request::samples(&prompt, &params, 1 + at as usize % 3)
        });
        let answers = engine.run(&decoder, requests, |_, _, _| ()).unwrap();
        answers.into_iter().flatten().map(|answer| answer.token_ids).collect::<Vec<_>>()
    };
    let (ours, expected) = (answers(device), answers(Device::Cpu));
    let same = ours.iter().zip(&expected).filter(|(a, b)| a == b).count();
    println!("{same} of {} answers are the CPU's to the token", expected.len());
    // f32 products of other orders; a draw at the edge of a token's range may fall to its neighbour.
    assert!(same + 1 >= expected.len(), "{same} of {}", expected.len());
}

/// A long run of requests that come and go through recorded graphs of many sizes.
#[test]
fn graphs_serve_any_batch() {
    let Some(device) = gpu("graphs of decoding") else { return };
    let config = shape(r#""model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 2"#);
    let options = LoadOptions { load_in_4bit: true, ..LoadOptions::new(Kind::BFloat16, device) };
    let mut model = FastLanguageModel::untrained(config, options, 3).unwrap();
    let arguments = ferrotune::train::TrainingArguments::default();
    model.get_peft_model(arguments.adapter_config("x"), 1).unwrap();
    let decoder = &model.decoder;
    let options = EngineOptions::new(KvBudget::Tokens(96 * 128), 96);
    let mut engine = Engine::new(decoder, options).unwrap();
    let mut answers: HashMap<RequestId, (Vec<i64>, Vec<f32>, bool)> = HashMap::new();
    let take = |engine: &mut Engine, answers: &mut HashMap<_, (Vec<i64>, Vec<f32>, bool)>| {
        for event in engine.step(decoder).unwrap() {
            // A cancelled one may have had its last token.
            let Some((ids, logprobs, finished)) = answers.get_mut(&event.request) else { continue };
            match event.kind {
                EventKind::Token(token) => {
                    ids.push(token.id);
                    logprobs.push(token.sampling_logprob);
                }
                EventKind::Finished(_) => *finished = true,
                EventKind::Failed(error) => panic!("{error:#}"),
            }
        }
    };
    let mut prompts = HashMap::new();
    for wave in 0..40_usize {
        for at in 0..(wave * 7) % 11 {
            let prompt: Vec<i64> = (0..10 + at as i64).map(|i| (i * 3 + wave as i64) % 512).collect();
            let params = SamplingParams {
                temperature: 1.0,
                max_new_tokens: 10 + (wave + at) % 60,
                seed: (wave * 16 + at) as u64,
                // Some end where nobody expects it.
                stop_token_ids: (0..if at % 2 == 0 { 30 } else { 0 }).collect(),
                ..Default::default()
            };
            let id = engine.submit(decoder, Request::new(&prompt, &params)).unwrap();
            prompts.insert(id, prompt);
            answers.insert(id, Default::default());
            if at == 7 {
                engine.cancel(id);
                answers.remove(&id);
            }
        }
        for _ in 0..8 {
            take(&mut engine, &mut answers);
        }
        if wave % 8 == 3 {
            // The same weights, but nobody knows: all is read again.
            engine.weights_changed();
        }
    }
    while !engine.is_idle() {
        take(&mut engine, &mut answers);
    }
    assert_eq!(engine.stats().pages_held, 0);
    let exact = exact(decoder);
    let (mut ours, mut trainers, mut expected) = (Vec::new(), Vec::new(), Vec::new());
    for (id, (ids, logprobs, finished)) in &answers {
        assert!(finished);
        let of = |decoder: &Decoder| {
            let all = decoder.log_probs(&[&prompts[id][..], ids].concat()).unwrap().to_device(Device::Cpu);
            all.narrow(0, prompts[id].len() as i64 - 1, ids.len() as i64)
        };
        trainers.push(of(decoder));
        expected.push(of(&exact).to_kind(Kind::Double));
        ours.push(Tensor::from_slice(logprobs));
    }
    let [ours, trainers, expected] = [ours, trainers, expected].map(|values| Tensor::cat(&values, 0));
    let most = (&ours - &trainers).abs().max().double_value(&[]);
    let distance = Distance::new(decoder.kind, What::Value, &ours, &trainers, &expected).unwrap();
    println!(
        "{} requests, {} tokens in waves, log-probabilities {most:.2e} apart at most, {:.2} of what the rule allows",
        answers.len(),
        ours.numel(),
        distance.share()
    );
    assert_allowed("in waves", distance);
    let apart = rel(&ours, &trainers)[0];
    assert!(apart < 3e-2, "{apart:.2e} from the trainer's");
}
