//! What the engine draws, beside exact probabilities: of the model's logits by the formulas of docs/serving.md, in f64.

use std::collections::HashMap;

use ferrotune::generate::{Engine, EngineOptions, Generation, KvBudget, Request, SamplingParams};
use ferrotune::models::{Config, Decoder};
use ferrotune::nn::LoadOptions;
use ferrotune::ops::proof::Distance;
use tch::{Device, Kind, Tensor};

use crate::golden::{Flat, logits};
use crate::tolerance::{What, assert_allowed};

#[derive(Debug, Clone, Copy, PartialEq)]
enum Stage {
    Penalties,
    Temperature,
    TopK,
    TopP,
    MinP,
}

const STAGES: [Stage; 5] = [Stage::Penalties, Stage::Temperature, Stage::TopK, Stage::TopP, Stage::MinP];
const PROMPT: [i64; 5] = [3, 7, 1, 20, 7];
/// Tokens of each answer, so that penalties count tokens that came twice.
const LENGTH: usize = 3;

fn softmax(scores: &[f64]) -> Vec<f64> {
    let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|score| (score - highest).exp()).sum();
    scores.iter().map(|score| (score - highest).exp() / sum).collect()
}

/// The probabilities of the next token behind `prompt` and `answer`; tokens that a filter drops have the score -inf.
fn probabilities(
    logits: &[f64],
    prompt: &[i64],
    answer: &[i64],
    params: &SamplingParams,
    stages: &[Stage],
) -> Vec<f64> {
    let mut scores = logits.to_vec();
    for stage in stages {
        let before = softmax(&scores);
        match stage {
            Stage::Penalties => {
                for (id, score) in (0..).zip(&mut scores) {
                    let count = answer.iter().filter(|&&token| token == id).count() as f64;
                    if count > 0.0 || prompt.contains(&id) {
                        let penalty = params.repetition_penalty;
                        *score = if *score < 0.0 { *score * penalty } else { *score / penalty };
                    }
                    if count > 0.0 {
                        *score -= params.presence_penalty + params.frequency_penalty * count;
                    }
                }
            }
            Stage::Temperature => scores.iter_mut().for_each(|score| *score /= params.temperature),
            Stage::TopK if params.top_k > 0 => {
                let mut sorted = scores.clone();
                sorted.sort_by(|a, b| b.total_cmp(a));
                let lowest = sorted[params.top_k - 1];
                scores
                    .iter_mut()
                    .filter(|score| **score < lowest)
                    .for_each(|score| *score = f64::NEG_INFINITY);
            }
            Stage::TopP => {
                let mut ids: Vec<usize> = (0..scores.len()).collect();
                ids.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));
                let mut dropped = 0.0;
                for &id in &ids[..ids.len() - 1] {
                    dropped += before[id];
                    if dropped > 1.0 - params.top_p {
                        break;
                    }
                    scores[id] = f64::NEG_INFINITY;
                }
            }
            Stage::MinP => {
                let least = params.min_p * before.iter().copied().fold(0.0, f64::max);
                let dropped = scores.iter_mut().zip(&before).filter(|(_, p)| **p < least);
                dropped.for_each(|(score, _)| *score = f64::NEG_INFINITY);
            }
            Stage::TopK => {}
        }
    }
    softmax(&scores)
}

type Logits = HashMap<Vec<i64>, Vec<f64>>;

/// A model whose next tokens have unlike probabilities, and its logits behind `PROMPT` and every answer that is not whole.
struct Model {
    decoder: Decoder,
    logits: Logits,
}

impl Model {
    fn new(kind: Kind) -> Model {
        let config = Config::from_json(
            r#"{"model_type": "llama", "vocab_size": 24, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.35}"#,
        );
        let options = LoadOptions::new(kind, Device::Cpu);
        let decoder = Decoder::random(config.unwrap(), options, 5).unwrap();
        let mut answers: Vec<Vec<i64>> = vec![Vec::new()];
        let mut first = 0;
        for _ in 1..LENGTH {
            let longer = answers[first..].iter().flat_map(|answer| {
                (0..24).map(move |id| answer.iter().copied().chain([id]).collect::<Vec<i64>>())
            });
            let longer: Vec<_> = longer.collect();
            first = answers.len();
            answers.extend(longer);
        }
        let sequences: Vec<Vec<i64>> = answers.iter().map(|answer| [&PROMPT[..], answer].concat()).collect();
        let flat = Flat::new(sequences.iter().map(Vec::as_slice));
        let last: Vec<i64> = flat.cu_seqlens[1..].iter().map(|&end| i64::from(end) - 1).collect();
        let rows = logits(&decoder, &flat).index_select(0, &Tensor::from_slice(&last)).to_kind(Kind::Double);
        let row = |row: i64| Vec::<f64>::try_from(rows.get(row)).unwrap();
        let logits = answers.into_iter().zip(0..).map(|(answer, at)| (answer, row(at))).collect();
        Model { decoder, logits }
    }

    fn next(&self, answer: &[i64], params: &SamplingParams, stages: &[Stage]) -> Vec<f64> {
        probabilities(&self.logits[answer], &PROMPT, answer, params, stages)
    }

    /// The probability of each answer that has one.
    fn answers(&self, next: impl Fn(&[i64]) -> Vec<f64>) -> HashMap<Vec<i64>, f64> {
        let mut answers = HashMap::from([(Vec::new(), 1.0)]);
        for _ in 0..LENGTH {
            let mut longer = HashMap::new();
            for (answer, p) in answers {
                for (id, next) in (0..).zip(next(&answer)).filter(|(_, next)| *next > 0.0) {
                    longer.insert([&answer[..], &[id]].concat(), p * next);
                }
            }
            answers = longer;
        }
        answers
    }

    /// 16 times 512 samples of one prompt.
    fn draw(&self, params: &SamplingParams) -> Vec<Generation> {
        let options = EngineOptions::new(KvBudget::Tokens(512 * 16), 512);
        let mut engine = Engine::new(&self.decoder, options).unwrap();
        let request = |seed| {
            let own = SamplingParams { seed, max_new_tokens: LENGTH, logprobs: Some(0), ..params.clone() };
            Request::samples(&PROMPT, &own, 512)
        };
        engine.run(&self.decoder, (0..16).map(request), |_, _, _| ()).unwrap().concat()
    }
}

/// Pearson's chi-squared of the counts, in standard deviations above its mean: bins of at least 5 expected answers, the unlikely
/// ones together. Infinite where an answer came that has no probability.
fn surplus(drawn: &HashMap<Vec<i64>, usize>, expected: &HashMap<Vec<i64>, f64>) -> f64 {
    if drawn.keys().any(|answer| !expected.contains_key(answer)) {
        return f64::INFINITY;
    }
    let draws = drawn.values().sum::<usize>() as f64;
    let mut cells: Vec<(f64, f64)> = expected
        .iter()
        .map(|(answer, p)| (p * draws, drawn.get(answer).copied().unwrap_or(0) as f64))
        .collect();
    cells.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut bins: Vec<(f64, f64)> = Vec::new();
    while let Some((mean, count)) = cells.pop() {
        match bins.last_mut().filter(|bin| bin.0 < 5.0) {
            Some(bin) => *bin = (bin.0 + mean, bin.1 + count),
            None => bins.push((mean, count)),
        }
    }
    let chi_squared: f64 = bins.iter().map(|(mean, count)| (count - mean).powi(2) / mean).sum();
    let freedom = bins.len() as f64 - 1.0;
    (chi_squared - freedom) / (2.0 * freedom).sqrt()
}

fn orders(stages: &[Stage]) -> Vec<Vec<Stage>> {
    if stages.is_empty() {
        return vec![Vec::new()];
    }
    let behind = |first: &Stage| {
        let rest: Vec<Stage> = stages.iter().copied().filter(|stage| stage != first).collect();
        orders(&rest).into_iter().map(|rest| [&[*first], &rest[..]].concat()).collect::<Vec<_>>()
    };
    stages.iter().flat_map(behind).collect()
}

/// The stages that change anything.
fn active(params: &SamplingParams) -> Vec<Stage> {
    let changes = |stage: &Stage| match stage {
        Stage::Penalties => {
            params.repetition_penalty != 1.0
                || params.presence_penalty != 0.0
                || params.frequency_penalty != 0.0
        }
        Stage::Temperature => params.temperature != 1.0,
        Stage::TopK => params.top_k > 0,
        Stage::TopP => params.top_p < 1.0,
        Stage::MinP => params.min_p > 0.0,
    };
    STAGES.into_iter().filter(changes).collect()
}

fn cases() -> Vec<(&'static str, SamplingParams)> {
    let neutral = SamplingParams { temperature: 1.0, ..Default::default() };
    let all = SamplingParams {
        temperature: 1.7,
        top_k: 7,
        top_p: 0.85,
        min_p: 0.2,
        repetition_penalty: 1.4,
        presence_penalty: 0.6,
        frequency_penalty: 0.9,
        ..Default::default()
    };
    vec![
        ("plain", neutral.clone()),
        ("temperature", SamplingParams { temperature: 0.6, ..neutral.clone() }),
        ("top-k", SamplingParams { temperature: 1.3, top_k: 5, ..neutral.clone() }),
        ("top-p", SamplingParams { temperature: 1.3, top_p: 0.7, ..neutral.clone() }),
        ("min-p", SamplingParams { temperature: 1.3, min_p: 0.15, ..neutral.clone() }),
        ("repetition", SamplingParams { repetition_penalty: 1.5, ..neutral.clone() }),
        ("presence", SamplingParams { presence_penalty: 1.2, ..neutral.clone() }),
        ("frequency", SamplingParams { frequency_penalty: 1.2, ..neutral }),
        ("all", all),
    ]
}

/// Frequencies of whole answers pass a chi-squared test against the exact probabilities, and fail it by far against those of every
/// other order of the filters, of one token more or less in top-k, and of penalties that do not see the prompt or the answer, wherever
/// these give other probabilities.
#[test]
fn answers_have_their_exact_probabilities() {
    let model = Model::new(Kind::Float);
    let mut rejected = 0;
    for (name, params) in cases() {
        let mut drawn: HashMap<Vec<i64>, usize> = HashMap::new();
        for answer in model.draw(&params) {
            *drawn.entry(answer.token_ids).or_default() += 1;
        }
        let exact = model.answers(|answer| model.next(answer, &params, &STAGES));
        let found = surplus(&drawn, &exact);
        let mut wrong: Vec<(String, HashMap<Vec<i64>, f64>)> = orders(&active(&params))
            .iter()
            .map(|order| (format!("{order:?}"), model.answers(|answer| model.next(answer, &params, order))))
            .collect();
        if params.top_k > 0 {
            for top_k in [params.top_k - 1, params.top_k + 1] {
                let other = SamplingParams { top_k, ..params.clone() };
                wrong.push((
                    format!("top-k of {top_k}"),
                    model.answers(|answer| model.next(answer, &other, &STAGES)),
                ));
            }
        }
        let blind = [("without the prompt", false, true), ("without the answer", true, false)];
        let penalises = active(&params).contains(&Stage::Penalties);
        for (what, sees_prompt, sees_answer) in blind.into_iter().filter(|_| penalises) {
            let next = |answer: &[i64]| {
                let logits = &model.logits[answer];
                let prompt = if sees_prompt { &PROMPT[..] } else { &[] };
                probabilities(logits, prompt, if sees_answer { answer } else { &[] }, &params, &STAGES)
            };
            wrong.push((format!("penalties {what}"), model.answers(next)));
        }
        let differs = |other: &HashMap<Vec<i64>, f64>| {
            let distance = |(answer, p): (&Vec<i64>, &f64)| (p - other.get(answer).unwrap_or(&0.0)).abs();
            exact.len() != other.len() || exact.iter().map(distance).sum::<f64>() > 1e-9
        };
        wrong.retain(|(_, other)| differs(other));
        let nearest = wrong
            .iter()
            .map(|(what, other)| (surplus(&drawn, other), what))
            .min_by(|a, b| a.0.total_cmp(&b.0));
        println!(
            "{name}: {} answers, {found:.1} standard deviations; nearest of {} others {nearest:?}",
            exact.len(),
            wrong.len()
        );
        assert!(found < 4.0, "{name}: {found:.1} standard deviations too far from the exact probabilities");
        if let Some((surplus, what)) = nearest {
            assert!(surplus > 20.0, "{name}: {what} is not told apart, {surplus:.1} standard deviations");
        }
        rejected += wrong.len();
    }
    assert!(rejected > 100, "only {rejected} wrong formulas");
}

/// Each token's log-probability in the distribution that it was drawn from, and in the model's own, beside f64: by the tolerance
/// rule, with the formulas on the logits of the forward pass in f32 for the plain ones.
#[test]
fn log_probabilities_are_exact_before_and_after_the_filters() {
    let [model, exact] = [Kind::Float, Kind::Double].map(Model::new);
    for (name, params) in cases() {
        let mut kept = HashMap::new();
        // [drawn from, the model's own][engine, f32, f64]
        let mut all = [const { [const { Vec::<f64>::new() }; 3] }; 2];
        for answer in model.draw(&params) {
            for (at, &id) in answer.token_ids.iter().enumerate() {
                let before = &answer.token_ids[..at];
                let expected = kept.entry(before.to_vec()).or_insert_with(|| {
                    [&model, &exact]
                        .map(|model| [model.next(before, &params, &STAGES), softmax(&model.logits[before])])
                });
                let found = [answer.sampling_logprobs[at], answer.logprobs[at].logprob].map(f64::from);
                for which in 0..2 {
                    all[which][0].push(found[which]);
                    all[which][1].push(expected[0][which][id as usize].ln());
                    all[which][2].push(expected[1][which][id as usize].ln());
                }
            }
        }
        for (what, values) in ["drawn from", "the model's own"].iter().zip(&all) {
            let [ours, plain, exact] = [0, 1, 2].map(|which| Tensor::from_slice(&values[which]));
            let distance = Distance::new(Kind::Float, What::Value, &ours, &plain, &exact).unwrap();
            println!("{name}, {what}: {:.1e} of {:.1e}", distance.found[0], distance.allowed[0]);
            assert_allowed(&format!("{name}, {what}"), distance);
        }
    }
}
