//! An adapter exchanged while requests run, on the GPU: what each token comes from, and how long it takes.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::time::Instant;

use ferrotune::device;
use ferrotune::generate::{Engine, EngineOptions, EventKind, KvBudget, Request, RequestId, SamplingParams};
use ferrotune::io::adapter::InitLoraWeights;
use ferrotune::models::{Config, Decoder, FastLanguageModel};
use ferrotune::nn::LoadOptions;
use ferrotune::train::TrainingArguments;
use tch::{Device, Kind, Tensor};

use crate::gpu::gpu;

/// What came of a request.
#[derive(Debug)]
struct Seen {
    prompt: Vec<i64>,
    ids: Vec<i64>,
    logprobs: Vec<f32>,
    weights: Vec<u64>,
}

/// An engine and what it has said.
struct Run<'a> {
    engine: Engine,
    decoder: &'a Decoder,
    seen: HashMap<RequestId, Seen>,
}

impl<'a> Run<'a> {
    fn new(decoder: &'a Decoder, sequences: usize, tokens: usize) -> Run<'a> {
        let kv_budget = KvBudget::Tokens(sequences * tokens);
        let engine = Engine::new(decoder, EngineOptions::new(kv_budget, sequences)).unwrap();
        Run { engine, decoder, seen: HashMap::new() }
    }

    fn submit(&mut self, adapter: &str, at: usize, new: usize) -> RequestId {
        let prompt: Vec<i64> = (0..128).map(|i| (i * i * 31 + 7919 * at as i64 + 5) % 128_000).collect();
        let params = SamplingParams { max_new_tokens: new, logprobs: Some(0), ..Default::default() };
        let request = Request { adapter: Some(adapter.to_string()), ..Request::new(&prompt, &params) };
        let id = self.engine.submit(self.decoder, request).unwrap();
        let (ids, logprobs, weights) = Default::default();
        self.seen.insert(id, Seen { prompt, ids, logprobs, weights });
        id
    }

    /// Milliseconds.
    fn step(&mut self) -> f64 {
        let start = Instant::now();
        let events = self.engine.step(self.decoder).unwrap();
        let ms = ms(start);
        for event in events {
            match event.kind {
                EventKind::Token(token) => {
                    let seen = self.seen.get_mut(&event.request).unwrap();
                    seen.ids.push(token.id);
                    seen.logprobs.push(token.logprobs.unwrap().logprob);
                    seen.weights.push(token.weights);
                }
                EventKind::Finished(_) => (),
                EventKind::Failed(error) => panic!("{error:#}"),
            }
        }
        ms
    }

    /// Steps until each of `ids` has `tokens` tokens: milliseconds of each.
    fn until(&mut self, ids: &[RequestId], tokens: &[usize]) -> Vec<f64> {
        let mut steps = Vec::new();
        while ids.iter().zip(tokens).any(|(id, &tokens)| self.seen[id].ids.len() < tokens) {
            steps.push(self.step());
        }
        steps
    }

    fn lengths(&self, ids: &[RequestId]) -> Vec<usize> {
        ids.iter().map(|id| self.seen[id].ids.len()).collect()
    }
}

fn ms(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e3
}

fn middle(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn named(steps: &[f64]) -> String {
    let first: Vec<String> = steps.iter().take(4).map(|ms| format!("{ms:.2}")).collect();
    format!("{} steps, the first {} ms", steps.len(), first.join(", "))
}

/// How far log-probabilities by the model's own adapter are from those of the tokens that `which` names, on average.
fn apart(decoder: &Decoder, seen: &Seen, which: impl Fn(u64) -> bool) -> f64 {
    let all = decoder.log_probs(&[&seen.prompt[..], &seen.ids].concat()).unwrap();
    let all = Vec::<f32>::try_from(all.to_device(Device::Cpu)).unwrap();
    let differences: Vec<f64> = all[seen.prompt.len() - 1..]
        .iter()
        .zip(&seen.logprobs)
        .zip(&seen.weights)
        .filter(|(_, weights)| which(**weights))
        .map(|((theirs, ours), _)| f64::from((theirs - ours).abs()))
        .collect();
    assert!(!differences.is_empty());
    differences.iter().sum::<f64>() / differences.len() as f64
}

/// `n` requests on an adapter whose matrices are exchanged four times in place: with those of `b`, of `a`, ... What they got,
/// and the numbers of the weights, in order.
fn exchange(model: &FastLanguageModel, [a, b]: [&Path; 2], n: usize) -> (Vec<Seen>, Vec<u64>) {
    let device = model.decoder.device;
    let mut run = Run::new(&model.decoder, n, 256);
    run.engine.load_lora("a", model.read_adapter(a).unwrap());
    let values = |folder: &Path, device: Device| -> Vec<(String, Tensor)> {
        let adapter = model.read_adapter(folder).unwrap();
        let copy = |(name, tensor): &(String, Tensor)| (name.clone(), tensor.copy().to_device(device));
        adapter.tensors().iter().map(copy).collect()
    };
    let requests: Vec<RequestId> = (0..n).map(|at| run.submit("a", at, 96)).collect();
    let mut weights = BTreeSet::new();
    for (turn, (folder, from)) in
        [(b, device), (a, device), (b, Device::Cpu), (a, Device::Cpu)].into_iter().enumerate()
    {
        let values = values(folder, from);
        let bytes: usize = values.iter().map(|(_, tensor)| 4 * tensor.numel()).sum();
        let wanted: Vec<usize> = run.lengths(&requests).iter().map(|&length| length + 12).collect();
        let before = run.until(&requests, &wanted);
        weights.extend(run.seen.values().flat_map(|seen| seen.weights.clone()));
        assert_eq!(weights.len(), turn + 1);
        // The pass that was launched ahead is not the swap's.
        device::synchronize(device).unwrap();
        let start = Instant::now();
        for (name, value) in &values {
            run.engine.set_lora_tensor("a", name, value).unwrap();
        }
        let host = ms(start);
        device::synchronize(device).unwrap();
        let swap = ms(start);
        let wanted: Vec<usize> = run.lengths(&requests).iter().map(|&length| length + 1).collect();
        let after = run.until(&requests, &wanted);
        println!(
            "{n} running, in place from {from:?}: {} matrices, {:.0} MB in {swap:.2} ms ({host:.2} of the host); step before \
             {:.2} ms; until every request has a token of the new weights {:.2} ms: {}",
            values.len(),
            bytes as f64 / 1e6,
            middle(&before),
            after.iter().sum::<f64>(),
            named(&after)
        );
    }
    let rest = run.until(&requests, &vec![96; n]);
    println!("{n} running, after the swaps: a step {:.2} ms in the middle", middle(&rest));
    weights.extend(run.seen.values().flat_map(|seen| seen.weights.clone()));
    let seen = requests.iter().map(|id| run.seen.remove(id).unwrap()).collect();
    (seen, weights.into_iter().collect())
}

/// `n` requests on `a`, beside which `b` is loaded for `n` others, and `a` unloaded while its own still run.
fn load_beside(model: &FastLanguageModel, [a, b]: [&Path; 2], n: usize) -> [Vec<Seen>; 2] {
    let mut run = Run::new(&model.decoder, 2 * n, 256);
    run.engine.load_lora("a", model.read_adapter(a).unwrap());
    let old: Vec<RequestId> = (0..n).map(|at| run.submit("a", at, 64)).collect();
    let before = run.until(&old, &vec![24; n]);
    let device = model.decoder.device;
    device::synchronize(device).unwrap();
    let start = Instant::now();
    let adapter = model.read_adapter(b).unwrap();
    device::synchronize(device).unwrap();
    let read = ms(start);
    let start = Instant::now();
    run.engine.load_lora("b", adapter);
    let load = ms(start);
    let new: Vec<RequestId> = (0..n).map(|at| run.submit("b", n + at, 64)).collect();
    let first = run.until(&new, &vec![1; n]);
    let start = Instant::now();
    assert!(run.engine.unload_lora("a"));
    let unload = ms(start);
    assert!(run.engine.lora("a").is_none());
    let both = run.until(&old, &vec![64; n]);
    let alone = run.until(&new, &vec![64; n]);
    println!(
        "{n} running, another adapter: read from its folder {read:.2} ms, loaded {load:.3} ms, the old one unloaded \
         {unload:.3} ms; step before {:.2} ms; until {n} new requests have a token {:.2} ms: {}; both adapters: {:.2} ms in \
         the middle, {}; the new one alone: {:.2} ms in the middle, {}",
        middle(&before),
        first.iter().sum::<f64>(),
        named(&first),
        middle(&both),
        named(&both),
        middle(&alone),
        named(&alone)
    );
    let mut of = |ids: &[RequestId]| ids.iter().map(|id| run.seen.remove(id).unwrap()).collect();
    [of(&old), of(&new)]
}

/// The 8B shape in NF4 with LoRA r 16 on every projection: while requests run their adapter's matrices are exchanged, and another
/// adapter takes its place. Every token's log-probability is that of the one adapter that it should come from.
#[test]
fn an_adapter_is_swapped_between_two_steps() {
    let Some(device) = gpu("an adapter's swap") else { return };
    let config = Config::from_json(include_str!("../src/cli/shapes/llama-3.1-8b.json")).unwrap();
    let options = LoadOptions { load_in_4bit: true, ..LoadOptions::new(Kind::BFloat16, device) };
    tch::manual_seed(7);
    let mut model = FastLanguageModel::untrained(config, options, 7).unwrap();
    let arguments = TrainingArguments {
        r: 16,
        init_lora_weights: InitLoraWeights::Random,
        ..TrainingArguments::default()
    };
    model.get_peft_model(arguments.adapter_config("x"), 1).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let [a, b] = ["a", "b"].map(|name| folder.path().join(name));
    model.save_trained(&a).unwrap();
    for parameter in model.decoder.trainable() {
        let _no_grad = tch::no_grad_guard();
        let bound = 1.0 / (parameter.tensor.size()[1] as f64).sqrt();
        let _ = parameter.tensor.shallow_clone().uniform_(-bound, bound);
    }
    model.save_trained(&b).unwrap();
    for n in [1, 32] {
        let (exchanged, weights) = exchange(&model, [&a, &b], n);
        let [old, new] = load_beside(&model, [&a, &b], n);
        assert_eq!(weights.len(), 5);
        let of_b = |number: u64| weights.iter().position(|&own| own == number).unwrap() % 2 == 1;
        for seen in &exchanged {
            assert!(seen.weights.is_sorted() && seen.ids.len() == 96);
        }
        for (name, folder, is_b) in [("a", &a, false), ("b", &b, true)] {
            model.load_trained(folder).unwrap();
            let (own, other) = if is_b { (&new, &old) } else { (&old, &new) };
            for at in BTreeSet::from([0, n - 1]) {
                let close = [
                    apart(&model.decoder, &exchanged[at], |number| of_b(number) == is_b),
                    apart(&model.decoder, &own[at], |_| true),
                ];
                let far = [
                    apart(&model.decoder, &exchanged[at], |number| of_b(number) != is_b),
                    apart(&model.decoder, &other[at], |_| true),
                ];
                println!(
                    "{n} running, request {at}: log-probabilities by {name} from those of its own tokens {close:.3?}, from \
                     those of the other's {far:.3?}"
                );
                assert!(close.iter().zip(far).all(|(close, far)| close * 8.0 < far));
            }
        }
    }
}
