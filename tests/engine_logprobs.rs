//! Log-probabilities of the engine beside those of the trainer's forward pass, on the CPU.

use ferrotune::generate::{Request, SamplingParams};
use ferrotune::io::adapter::{AdapterConfig, InitLoraWeights};
use ferrotune::models::{Config, Decoder, FastLanguageModel};
use ferrotune::ops::proof::Distance;
use tch::{Device, Kind, Tensor};

use crate::engine::{engine, prompts};
use crate::golden::{checkpoints, load, root};
use crate::tolerance::{What, assert_allowed};

/// Rounds the weights to those that a model of `kind` has.
pub fn with_weights_of(decoder: &Decoder, kind: Kind) {
    let _no_grad = tch::no_grad_guard();
    decoder
        .each_weight(|_, weight| {
            weight.shallow_clone().copy_(&weight.to_kind(kind));
            Ok(())
        })
        .unwrap();
}

/// Log-probabilities of the tokens of `ids` from `first` on, by one forward pass where the angles of all are those of the last, and
/// else by one of each length.
fn behind(decoder: &Decoder, ids: &[i64], first: usize) -> Tensor {
    if decoder.rope_regime(first) == decoder.rope_regime(ids.len() - 1) {
        return decoder.log_probs(ids).unwrap().slice(0, first as i64 - 1, None, 1);
    }
    let last = |length| decoder.log_probs(&ids[..length]).unwrap().slice(0, length as i64 - 2, None, 1);
    Tensor::cat(&(first + 1..=ids.len()).map(last).collect::<Vec<_>>(), 0)
}

/// Answers of many lengths side by side, each token's log-probability beside that of the forward pass of training on the
/// same tokens in the same dtype, and of f64: by the tolerance rule, in both norms, each model by itself and all together.
#[test]
fn log_probabilities_are_the_trainers() {
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        let (mut all, mut shares) = ([const { Vec::<Tensor>::new() }; 3], Vec::new());
        for name in checkpoints() {
            let dir = root().join(&name);
            if kind == Kind::Half && Config::from_dir(&dir).unwrap().overflows_f16() {
                continue;
            }
            let decoder = load(&dir, kind);
            let exact = load(&dir, Kind::Double);
            with_weights_of(&exact, kind);
            let prompts = prompts(&decoder, 20);
            let params = |seed: usize| SamplingParams {
                temperature: 1.0,
                seed: seed as u64,
                max_new_tokens: 14,
                logprobs: Some(0),
                ..Default::default()
            };
            let requests =
                prompts.iter().enumerate().map(|(seed, prompt)| Request::new(prompt, &params(seed)));
            let answers = engine(&decoder, 4096, 16).run(&decoder, requests, |_, _, _| ()).unwrap();
            let [mut ours, mut trainer, mut expected] = [const { Vec::new() }; 3];
            for (prompt, answer) in prompts.iter().zip(&answers) {
                let answer = &answer[0];
                let ids = [&prompt[..], &answer.token_ids].concat();
                let of = |decoder: &Decoder| behind(decoder, &ids, prompt.len());
                let found: Vec<f32> = answer.logprobs.iter().map(|logprobs| logprobs.logprob).collect();
                ours.push(Tensor::from_slice(&found));
                trainer.push(of(&decoder));
                expected.push(of(&exact).to_kind(Kind::Double));
            }
            let [ours, trainer, expected] =
                [ours, trainer, expected].map(|values| Tensor::cat(&values, 0).to_kind(Kind::Double));
            let distance = Distance::new(kind, What::Value, &ours, &trainer, &expected).unwrap();
            shares.push(distance.share());
            assert_allowed(&format!("{name}, {kind:?}"), distance);
            for (all, one) in all.iter_mut().zip([ours, trainer, expected]) {
                all.push(one);
            }
        }
        let [ours, trainer, expected] = all.map(|values| Tensor::cat(&values, 0));
        let distance = Distance::new(kind, What::Value, &ours, &trainer, &expected).unwrap();
        let difference = (&ours - &trainer).abs();
        println!(
            "{kind:?}: {} tokens, at most {:.2e} from the trainer's, {:.2e} on average; {:.2} of what the rule allows, at most {:.2} \
             for one model",
            difference.numel(),
            difference.max().double_value(&[]),
            difference.mean(Kind::Double).double_value(&[]),
            distance.share(),
            shares.into_iter().fold(0.0, f64::max)
        );
        assert_allowed(&format!("all models, {kind:?}"), distance);
    }
}

/// LoRA in the dtype of the products, which on the CPU are in f32: the same bits, as the model's own and as an adapter's.
#[test]
fn lora_for_inference_gives_the_same_bits() {
    let tmp = tempfile::tempdir().unwrap();
    for kind in [Kind::BFloat16, Kind::Half, Kind::Float] {
        let load = || FastLanguageModel::from_pretrained(&root().join("llama"), kind, Device::Cpu).unwrap();
        let mut model = load();
        let config =
            AdapterConfig { init_lora_weights: InitLoraWeights::Random, r: 8, ..AdapterConfig::default() };
        model.get_peft_model(config, 7).unwrap();
        model.save_trained(tmp.path()).unwrap();
        let prompts = prompts(&model.decoder, 6);
        let params = SamplingParams { max_new_tokens: 12, logprobs: Some(0), ..Default::default() };
        let answers = |model: &FastLanguageModel, adapter: Option<&str>| {
            let mut engine = engine(&model.decoder, 4096, 16);
            if let Some(name) = adapter {
                let read = model.read_adapter(tmp.path()).unwrap();
                assert!(read.tensors().iter().all(|(_, tensor)| tensor.kind() == Kind::Float));
                engine.load_lora(name, read);
            }
            let requests = prompts.iter().map(|prompt| Request {
                adapter: adapter.map(str::to_string),
                ..Request::new(prompt, &params)
            });
            let answers = engine.run(&model.decoder, requests, |_, _, _| ()).unwrap();
            format!("{answers:?}")
        };
        let expected = answers(&model, None);
        model.for_inference().unwrap();
        assert!(model.decoder.trainable().is_empty(), "{kind:?}");
        assert_eq!(answers(&model, None), expected, "{kind:?}");
        assert_eq!(answers(&load(), Some("x")), expected, "an adapter, {kind:?}");
        assert_ne!(answers(&load(), None), expected, "without LoRA, {kind:?}");
    }
}
