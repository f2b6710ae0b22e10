//! The engine: what a request gets does not depend on what runs beside it, nor on how its memory was found.

use std::collections::BTreeMap;
use std::path::Path;

use ferrotune::generate::{
    Engine, EngineOptions, EventKind, Generation, KvBudget, Request, Sampler, SamplingParams, generate,
};
use ferrotune::models::{Config, Decoder, FastLanguageModel};
use tch::{Device, Kind, Tensor};

use crate::golden::{Flat, checkpoints, load, logits, root};

pub fn engine(decoder: &Decoder, tokens: usize, max_num_seqs: usize) -> Engine {
    Engine::new(decoder, EngineOptions::new(KvBudget::Tokens(tokens), max_num_seqs)).unwrap()
}

/// Prompts of many lengths, some with a common start.
pub fn prompts(decoder: &Decoder, count: usize) -> Vec<Vec<i64>> {
    let vocab = decoder.config.vocab_size;
    let context = decoder.config.max_position_embeddings as usize;
    let prompt = |p: usize| {
        let length = (1 + (7 * p) % 41).min(context - 14);
        let shared = if p.is_multiple_of(3) { length } else { 18 };
        (0..length).map(|i| (i * i + 3 + if i < shared { 0 } else { p }) as i64 % vocab).collect()
    };
    (0..count).map(prompt).collect()
}

fn params(p: usize) -> SamplingParams {
    let sampled = p % 2 == 1;
    SamplingParams {
        temperature: if sampled { 1.2 } else { 0.0 },
        repetition_penalty: if p % 4 == 3 { 1.3 } else { 1.0 },
        seed: p as u64,
        max_new_tokens: 3 + p % 10,
        logprobs: Some(2),
        ..Default::default()
    }
}

fn assert_same(found: &Generation, expected: &Generation, what: &str) {
    assert_eq!(found.token_ids, expected.token_ids, "{what}");
    // To the bit.
    assert_eq!(found.logprobs, expected.logprobs, "{what}");
    assert_eq!(found.finish_reason, expected.finish_reason, "{what}");
}

/// Every architecture in f32, and in 16 bits, whose weights, keys and values go into products of f32.
#[test]
fn a_request_does_not_see_its_neighbours() {
    let kinds = [Kind::Float, Kind::BFloat16, Kind::Half];
    for (name, kind) in checkpoints().into_iter().flat_map(|name| kinds.map(|kind| (name.clone(), kind))) {
        let dir = root().join(&name);
        if kind == Kind::Half && Config::from_dir(&dir).unwrap().overflows_f16() {
            continue;
        }
        let decoder = load(&dir, kind);
        assert_eq!(decoder.decode_kind(), Kind::Float, "{name}, {kind:?}");
        let prompts = prompts(&decoder, 20);
        let request = |p: usize| Request::new(&prompts[p], &params(p));
        let alone: Vec<Generation> =
            (0..prompts.len()).map(|p| generate(&decoder, &prompts[p], &params(p)).unwrap()).collect();
        // Room for all; a narrow batch; so few pages that sequences lose theirs; short passes.
        for (tokens, max_num_seqs, most) in
            [(4096, 64, 2048), (4096, 3, 2048), (112, 8, 2048), (4096, 8, 1), (4096, 16, 5)]
        {
            let budget = EngineOptions::new(KvBudget::Tokens(tokens), max_num_seqs);
            let options = EngineOptions { max_num_batched_tokens: most, ..budget };
            let mut engine = Engine::new(&decoder, options).unwrap();
            let all = engine.run(&decoder, (0..prompts.len()).map(request), |_, _, _| ()).unwrap();
            for (p, expected) in alone.iter().enumerate() {
                assert_same(
                    &all[p][0],
                    expected,
                    &format!("{name}, {kind:?}, {tokens} tokens, {most} a pass, request {p}"),
                );
            }
            let stats = engine.stats();
            assert_eq!((stats.running, stats.waiting, stats.pages_held), (0, 0, 0), "{name}");
            assert_eq!(stats.preemptions > 0, tokens == 112, "{name}: {stats:?}");
        }
        // In another order, one joining at each step, on pages that others left.
        let mut engine = engine(&decoder, 1024, 8);
        let mut found: BTreeMap<_, Vec<i64>> = BTreeMap::new();
        let mut of = BTreeMap::new();
        for p in (0..prompts.len()).rev() {
            of.insert(engine.submit(&decoder, request(p)).unwrap(), p);
            for event in engine.step(&decoder).unwrap() {
                if let EventKind::Token(token) = event.kind {
                    found.entry(of[&event.request]).or_default().push(token.id);
                }
            }
        }
        while !engine.is_idle() {
            for event in engine.step(&decoder).unwrap() {
                if let EventKind::Token(token) = event.kind {
                    found.entry(of[&event.request]).or_default().push(token.id);
                }
            }
        }
        for (p, expected) in alone.iter().enumerate() {
            assert_eq!(found[&p], expected.token_ids, "{name}, request {p}");
        }
    }
}

#[test]
fn greedy_tokens_are_those_of_the_uncached_reference() {
    for name in checkpoints() {
        let decoder = load(&root().join(&name), Kind::Float);
        let prompts = prompts(&decoder, 6);
        let greedy = SamplingParams { max_new_tokens: 10, ..Default::default() };
        let mut engine = engine(&decoder, 2048, 6);
        let requests = prompts.iter().map(|prompt| Request::new(prompt, &greedy));
        let answers = engine.run(&decoder, requests, |_, _, _| ()).unwrap();
        for (prompt, answer) in prompts.iter().zip(&answers) {
            let mut ids = prompt.clone();
            for &id in &answer[0].token_ids {
                let row = logits(&decoder, &Flat::new([&ids[..]])).get(ids.len() as i64 - 1);
                assert_eq!(row.argmax(-1, false).int64_value(&[]), id, "{name} behind {} tokens", ids.len());
                ids.push(id);
            }
        }
    }
}

#[test]
fn samples_share_the_prompt_and_nothing_else() {
    let decoder = load(&root().join("llama"), Kind::Float);
    let params =
        SamplingParams { temperature: 1.5, max_new_tokens: 20, logprobs: Some(0), ..Default::default() };
    let prompt: Vec<i64> = (0..21).map(|i| i * 3 % 60).collect();
    let mut engine = engine(&decoder, 1024, 8);
    let mut several = |n| {
        let before = engine.stats();
        let mut answers =
            engine.run(&decoder, [Request::samples(&prompt, &params, n)], |_, _, _| ()).unwrap();
        let after = engine.stats();
        let read = after.prompt_tokens - before.prompt_tokens + after.found_tokens - before.found_tokens;
        assert_eq!(read, prompt.len() as u64, "the prompt is read once");
        assert_eq!(after.pages_held, 0);
        answers.pop().unwrap()
    };
    let (three, five) = (several(3), several(5));
    for (sample, expected) in three.iter().enumerate() {
        assert_same(&five[sample], expected, &format!("sample {sample}"));
    }
    assert_same(&three[0], &generate(&decoder, &prompt, &params).unwrap(), "the first");
    assert_ne!(three[0].token_ids, three[1].token_ids);
    let error = engine.submit(&decoder, Request::samples(&prompt, &params, 9)).unwrap_err();
    assert!(format!("{error:#}").contains("n is 9, expected 1 to 8"), "{error:#}");
}

#[test]
fn logprobs_are_those_of_the_decoder() {
    let decoder = load(&root().join("qwen3"), Kind::Float);
    let prompt = [3, 9, 27, 17];
    let params =
        SamplingParams { temperature: 0.7, max_new_tokens: 12, logprobs: Some(5), ..Default::default() };
    let answer = generate(&decoder, &prompt, &params).unwrap();
    let ids = [&prompt[..], &answer.token_ids].concat();
    let expected = Vec::<f32>::try_from(decoder.log_probs(&ids).unwrap()).unwrap();
    for (at, found) in answer.logprobs.iter().enumerate() {
        assert!((found.logprob - expected[prompt.len() - 1 + at]).abs() < 1e-5, "token {at}");
        assert_eq!(found.top.len(), 5);
        assert!(found.top.windows(2).all(|pair| pair[0].1 >= pair[1].1));
        assert!(found.logprob <= found.top[0].1);
        if let Some(own) = found.top.iter().find(|(id, _)| *id == answer.token_ids[at]) {
            assert_eq!(own.1, found.logprob);
        }
    }
}

/// Penalties as OpenAI and vLLM define them, over what the answer contains.
#[test]
fn penalties_count_the_answer() {
    let row = [1.0f32, 0.5, -0.5, 2.0];
    let params = SamplingParams { presence_penalty: 0.25, frequency_penalty: 0.5, ..Default::default() };
    let mut sampler = Sampler::new(&params, 0, &[3, 3], 4);
    let mut drawn = Vec::new();
    for _ in 0..6 {
        drawn.push(sampler.sample(&mut row.clone()).unwrap());
    }
    // 3: 2 -> 1.25 -> 0.75; 0: 1 -> 0.25; 1: 0.5 -> -0.25; the prompt counts nothing.
    assert_eq!(drawn, [3, 3, 0, 3, 1, 0]);
}

#[test]
fn what_does_not_fit_is_refused_and_what_waits_is_served() {
    let decoder = load(&root().join("llama"), Kind::Float);
    let mut engine = engine(&decoder, 48, 4);
    let long = SamplingParams { max_new_tokens: 60, ..Default::default() };
    let error = engine.submit(&decoder, Request::new(&[1; 10], &long)).unwrap_err();
    assert!(format!("{error:#}").contains("may need 64 tokens, the engine has room for 48"), "{error:#}");
    let error = engine
        .submit(&decoder, Request { adapter: Some("none".into()), ..Request::new(&[1], &params(0)) })
        .unwrap_err();
    assert!(format!("{error:#}").contains("no adapter named none"), "{error:#}");
    let too_little = EngineOptions::new(KvBudget::Bytes(100), 1);
    assert!(Engine::new(&decoder, too_little).is_err());
    let no_rows = EngineOptions { max_num_batched_tokens: 0, ..EngineOptions::new(KvBudget::Tokens(48), 4) };
    let error = Engine::new(&decoder, no_rows).err().unwrap();
    assert!(format!("{error:#}").contains("max_num_batched_tokens is 0"), "{error:#}");
    assert!(engine.is_idle());

    let ids: Vec<_> =
        (0..9).map(|p| engine.submit(&decoder, Request::new(&[p + 1; 30], &params(0))).unwrap()).collect();
    engine.step(&decoder).unwrap();
    let stats = engine.stats();
    assert!(stats.waiting > 0 && stats.running > 0 && stats.pages_held <= stats.pages, "{stats:?}");
    assert!(engine.cancel(ids[0]) && !engine.cancel(ids[0]) && engine.cancel(ids[8]));
    let mut finished = 0;
    while !engine.is_idle() {
        for event in engine.step(&decoder).unwrap() {
            assert!(event.request != ids[0] && event.request != ids[8]);
            finished += usize::from(matches!(event.kind, EventKind::Finished(_)));
        }
    }
    assert_eq!((finished, engine.stats().pages_held), (7, 0));
}

/// A model, and adapters on it with random weights, by folder.
fn adapters(folder: &Path) -> (FastLanguageModel, Vec<std::path::PathBuf>) {
    let base = root().join("llama");
    let load = || FastLanguageModel::from_pretrained(&base, Kind::Float, Device::Cpu).unwrap();
    let folders = (0..2).map(|number| {
        let mut model = load();
        let config = ferrotune::io::adapter::AdapterConfig {
            r: 4 + 4 * number,
            lora_alpha: 32.0,
            init_lora_weights: ferrotune::io::adapter::InitLoraWeights::Random,
            ..Default::default()
        };
        model.get_peft_model(config, u64::from(number)).unwrap();
        let folder = folder.join(number.to_string());
        model.save_trained(&folder).unwrap();
        folder
    });
    let folders = folders.collect();
    (load(), folders)
}

#[test]
fn adapters_stand_side_by_side_in_a_batch() {
    let folder = tempfile::tempdir().unwrap();
    let (model, folders) = adapters(folder.path());
    let decoder = &model.decoder;
    let mut engine = engine(decoder, 2048, 16);
    for (name, folder) in ["a", "b"].iter().zip(&folders) {
        engine.load_lora(name, model.read_adapter(folder).unwrap());
    }
    assert_eq!(engine.loras().collect::<Vec<_>>(), ["a", "b"]);
    let prompts = prompts(decoder, 12);
    let names = [None, Some("a"), Some("b")];
    let request = |p: usize| Request {
        adapter: names[p % 3].map(str::to_string),
        ..Request::new(&prompts[p], &params(p))
    };
    let all = engine.run(decoder, (0..12).map(request), |_, _, _| ()).unwrap();
    for (number, folder) in folders.iter().enumerate() {
        // The same as the model's own adapter.
        let mut own = FastLanguageModel::from_pretrained(&model.dir, Kind::Float, Device::Cpu).unwrap();
        own.load_adapter(folder).unwrap();
        for p in (number + 1..12).step_by(3) {
            let expected = generate(&own.decoder, &prompts[p], &params(p)).unwrap();
            assert_same(&all[p][0], &expected, &format!("adapter {number}, request {p}"));
        }
    }
    for p in (0..12).step_by(3) {
        let expected = generate(decoder, &prompts[p], &params(p)).unwrap();
        assert_same(&all[p][0], &expected, &format!("no adapter, request {p}"));
    }
    assert_ne!(all[1][0].token_ids, generate(decoder, &prompts[1], &params(1)).unwrap().token_ids);
    assert!(engine.unload_lora("a") && !engine.unload_lora("a"));
    assert!(engine.submit(decoder, request(1)).is_err());
}

/// An adapter's tensors are replaced between two steps: every token comes from one set of weights alone.
#[test]
fn adapters_are_replaced_in_place_between_two_steps() {
    let folder = tempfile::tempdir().unwrap();
    let (model, folders) = adapters(folder.path());
    let decoder = &model.decoder;
    let mut engine = engine(decoder, 1024, 4);
    engine.load_lora("a", model.read_adapter(&folders[0]).unwrap());
    let prompt: Vec<i64> = (0..37).map(|i| i * 5 % 60).collect();
    let params = SamplingParams { max_new_tokens: 9, ..Default::default() };
    let request = || Request { adapter: Some("a".into()), ..Request::new(&prompt, &params) };
    engine.submit(decoder, request()).unwrap();
    let mut ids = prompt.clone();
    let doubled: Vec<(String, Tensor)> = engine
        .lora("a")
        .unwrap()
        .tensors()
        .iter()
        .map(|(name, tensor)| (name.clone(), tensor * 2.0))
        .collect();
    let mut weights = Vec::new();
    while !engine.is_idle() {
        if weights.len() == 4 {
            for (name, tensor) in &doubled {
                engine.set_lora_tensor("a", name, tensor).unwrap();
            }
        }
        for event in engine.step(decoder).unwrap() {
            if let EventKind::Token(token) = event.kind {
                ids.push(token.id);
                weights.push(token.weights);
            }
        }
    }
    assert!(weights[3] != weights[4] && weights[0] == weights[3] && weights[4] == weights[8]);
    // The tokens after the change are those of the new weights on all that was there.
    let rest = SamplingParams { max_new_tokens: 5, ..params.clone() };
    let again = Request { adapter: Some("a".into()), ..Request::new(&ids[..prompt.len() + 4], &rest) };
    let expected = engine.run(decoder, [again], |_, _, _| ()).unwrap();
    assert_eq!(expected[0][0].token_ids, ids[prompt.len() + 4..]);
    let name = &doubled[0].0;
    let error =
        engine.set_lora_tensor("a", name, &Tensor::zeros([1], (Kind::Float, Device::Cpu))).unwrap_err();
    assert!(format!("{error:#}").contains("has shape"), "{error:#}");
    assert!(engine.set_lora_tensor("a", "nothing", &doubled[0].1).is_err());
}

#[test]
fn a_prompt_is_found_in_the_pages() {
    let decoder = load(&root().join("llama"), Kind::Float);
    let mut engine = engine(&decoder, 1024, 4);
    let params = SamplingParams { max_new_tokens: 20, ..Default::default() };
    let prompt: Vec<i64> = (0..40).map(|i| i * 7 % 60).collect();
    let first = engine.run(&decoder, [Request::new(&prompt, &params)], |_, _, _| ()).unwrap();
    let turn = [&prompt[..], &first[0][0].token_ids, &[5, 6, 7]].concat();
    let before = engine.stats();
    let second = engine.run(&decoder, [Request::new(&turn, &params)], |_, _, _| ()).unwrap();
    let after = engine.stats();
    // All full pages of the first turn: 59 of its tokens have been fed.
    assert_eq!(after.found_tokens - before.found_tokens, 48);
    assert_eq!(after.prompt_tokens - before.prompt_tokens, turn.len() as u64 - 48);
    assert_eq!(second[0][0].token_ids, generate(&decoder, &turn, &params).unwrap().token_ids);
    // Not after the weights have changed.
    engine.weights_changed();
    engine.run(&decoder, [Request::new(&turn, &params)], |_, _, _| ()).unwrap();
    assert_eq!(engine.stats().found_tokens, after.found_tokens);
}

/// Steps an engine between the steps of a training run, and keeps the weights that each token must come from.
struct Serving {
    engine: Engine,
    weights: Vec<(u64, Vec<(String, Tensor)>)>,
    tokens: std::rc::Rc<std::cell::RefCell<Seen>>,
}

#[derive(Default)]
struct Seen {
    ids: Vec<i64>,
    logprobs: Vec<(u64, f32)>,
    weights: Vec<(u64, Vec<(String, Tensor)>)>,
}

impl ferrotune::train::observer::TrainObserver for Serving {
    fn between_steps(&mut self, model: &FastLanguageModel, last: bool) -> anyhow::Result<()> {
        let number = self.engine.weights_changed();
        let copies =
            model.decoder.adapter_state().into_iter().map(|(name, tensor)| (name, tensor.detach().copy()));
        self.weights.push((number, copies.collect()));
        let mut seen = self.tokens.borrow_mut();
        for _ in 0..2 {
            for event in self.engine.step(model)? {
                match event.kind {
                    EventKind::Token(token) => {
                        seen.ids.push(token.id);
                        seen.logprobs.push((token.weights, token.logprobs.unwrap().logprob));
                    }
                    EventKind::Finished(_) => {}
                    EventKind::Failed(error) => return Err(error),
                }
            }
        }
        if last {
            seen.weights = std::mem::take(&mut self.weights);
        }
        Ok(())
    }
}

#[test]
fn no_token_comes_from_torn_weights() {
    use ferrotune::data::{BatchOptions, BatchStream, DatasetOptions, prepare};
    use ferrotune::train::{Sft, Trainer, TrainingArguments};

    let folder = tempfile::tempdir().unwrap();
    let example = root().join("../../examples/tiny");
    let mut model =
        FastLanguageModel::from_pretrained(&example.join("model"), Kind::Float, Device::Cpu).unwrap();
    let arguments = TrainingArguments {
        model: example.join("model").display().to_string(),
        dataset: vec![example.join("train.jsonl").display().to_string()],
        max_steps: Some(6),
        learning_rate: Some(2e-2),
        output_dir: folder.path().to_path_buf(),
        ..TrainingArguments::default()
    }
    .resolved()
    .unwrap();
    model.get_peft_model(arguments.adapter_config("tiny"), 1).unwrap();
    let (data, _) =
        prepare(&arguments.dataset, model.tokenizer().unwrap(), &DatasetOptions::default()).unwrap();
    let options = BatchOptions { batch_size: 2, max_seq_length: 128, packing: false, shuffle: true, seed: 1 };
    let prompt: Vec<i64> =
        model.prompt_ids("The opposite of hot is cold and the opposite of big is").unwrap();
    let params =
        SamplingParams { max_new_tokens: 30, logprobs: Some(0), temperature: 1.0, ..Default::default() };
    let mut engine = engine(&model.decoder, 1024, 2);
    engine.submit(&model, Request::new(&prompt, &params)).unwrap();
    let tokens = std::rc::Rc::new(std::cell::RefCell::new(Seen::default()));
    let mut observer = Serving { engine, weights: Vec::new(), tokens: tokens.clone() };
    Trainer {
        model: &mut model,
        objective: &Sft,
        arguments: &arguments,
        train: Box::new(BatchStream::new(std::sync::Arc::new(data), options).unwrap()),
        eval: None,
        observer: &mut observer,
        plan: None,
        stop: &std::sync::atomic::AtomicBool::new(false),
    }
    .run(None)
    .unwrap();
    let seen = tokens.borrow();
    assert_eq!((seen.ids.len(), seen.weights.len()), (12, 6), "two tokens after each step");
    let mut all = Vec::new();
    for (at, (number, found)) in seen.logprobs.iter().enumerate() {
        let (_, weights) = seen.weights.iter().find(|(known, _)| known == number).unwrap();
        assert_eq!(*number, seen.weights[at / 2].0, "a token of the step before it");
        let _no_grad = tch::no_grad_guard();
        for ((_, mut own), (_, kept)) in model.decoder.adapter_state().into_iter().zip(weights) {
            own.copy_(kept);
        }
        let ids = [&prompt[..], &seen.ids[..=at]].concat();
        let expected = Vec::<f32>::try_from(model.decoder.log_probs(&ids).unwrap()).unwrap();
        assert!((found - expected[ids.len() - 2]).abs() < 1e-4, "token {at}");
        all.push(expected[ids.len() - 2]);
    }
    // The weights did change what is likely.
    let first = &seen.weights[0].1;
    let _no_grad = tch::no_grad_guard();
    for ((_, mut own), (_, kept)) in model.decoder.adapter_state().into_iter().zip(first) {
        own.copy_(kept);
    }
    let ids = [&prompt[..], &seen.ids].concat();
    let of_first = Vec::<f32>::try_from(model.decoder.log_probs(&ids).unwrap()).unwrap();
    assert!((of_first[ids.len() - 2] - all[11]).abs() > 1e-3);
}
