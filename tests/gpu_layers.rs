//! Layers that decode on a GPU: what their launches add up to, and how many they are.

use ferrotune::device;
use ferrotune::models::{Config, Decoder, DeviceRows, FastLanguageModel, NewRows};
use ferrotune::nn::LoadOptions;
use ferrotune::ops::LoraRun;
use tch::{Device, Kind, Tensor};

use crate::generate::mixed_pass;
use crate::golden::{Flat, logits};
use crate::gpu::gpu;
use crate::gpu_decode::{shape, shapes};
use crate::less_memory::check_kept_inputs;
use crate::tolerance::{What, assert_close, rel};

/// Without zeros in biases and, where r is not 0, in LoRA on all projections; on every device the same.
fn with_lora(config: &Config, options: LoadOptions, r: u32) -> Decoder {
    let mut model = FastLanguageModel::untrained(config.clone(), options, 7).unwrap();
    if r > 0 {
        let arguments = ferrotune::train::TrainingArguments { r, ..Default::default() };
        model.get_peft_model(arguments.adapter_config("x"), 1).unwrap();
    }
    let lora = model.decoder.trainable().into_iter().map(|parameter| parameter.tensor);
    let weights = model.decoder.state_dict(options.kind).unwrap();
    let biases = weights.into_iter().filter(|(name, _)| name.ends_with(".bias")).map(|(_, tensor)| tensor);
    let _no_grad = tch::no_grad_guard();
    for mut tensor in lora.chain(biases) {
        let numbers = Tensor::arange(tensor.numel() as i64, (Kind::Int64, Device::Cpu)).square();
        tensor.copy_(&((numbers.remainder(197) / 197.0 - 0.5) * 0.2).view(&tensor.size()[..]));
    }
    model.for_inference().unwrap();
    model.decoder
}

/// Of more than 64 rows o and down add themselves, with the model's LoRA or without any, to the residual; adapters of single rows, biases and
/// norms behind them have launches of their own. Sequences with one new row, and prompts beside them: by the tolerance rule, and in 4 bits
/// beside the forward pass.
#[test]
fn projections_of_many_rows_add_to_the_residual() {
    let Some(device) = gpu("products that add to the residual") else { return };
    check_kept_inputs(Kind::BFloat16, device, 2e-2);
    let heads = r#""model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 2"#;
    let biases = ("biases", shape(&format!(r#"{heads}, "attention_bias": true, "mlp_bias": true"#)));
    let taken = ["D 64, groups of 4", "norms of heads", "D 256, softcap, a window"];
    let singles = |count: usize| -> Vec<(usize, usize)> { (0..count).map(|at| (at % 19, 1)).collect() };
    let plans = [singles(65), singles(256), [singles(70), vec![(0, 30), (9, 20), (0, 2)]].concat()];
    for (name, config) in shapes().into_iter().filter(|(name, _)| taken.contains(name)).chain([biases]) {
        for r in [0, 16] {
            let exact = with_lora(&config, LoadOptions::new(Kind::Double, Device::Cpu), r);
            let references = plans.each_ref().map(|plan| mixed_pass(&exact, plan, &[])[0].shallow_clone());
            for load_in_4bit in [false, true] {
                let options = LoadOptions { load_in_4bit, ..LoadOptions::new(Kind::BFloat16, device) };
                let decoder = with_lora(&config, options, r);
                for (plan, reference) in plans.iter().zip(&references) {
                    let rows: usize = plan.iter().map(|(_, new)| new).sum();
                    let own = [0..rows / 2, rows / 2..rows].map(|rows| LoraRun { rows, adapter: None });
                    for runs in [&[], &own[..]] {
                        let [ours, plain] =
                            mixed_pass(&decoder, plan, runs).map(|logits| logits.to_kind(Kind::BFloat16));
                        let label =
                            format!("{name}, r {r}, 4-bit {load_in_4bit}, {rows} rows, {} runs", runs.len());
                        if load_in_4bit {
                            let apart = rel(&ours, &plain)[0];
                            assert!(apart < 3e-2, "{label}: {apart:.2e}");
                        } else {
                            assert_close(&label, What::Value, &ours, &plain, reference);
                        }
                    }
                }
                let tables: Vec<[i32; 1]> = (0..65).map(|page| [page]).collect();
                let rows = tables.iter().map(|pages| NewRows { input_ids: &[3], past: 0, length: 1, pages });
                let (rows, pages) = (rows.collect::<Vec<_>>(), decoder.kv_pages(65).unwrap());
                let mut ropes = ferrotune::nn::RopeTables::default();
                let mut decode = || decoder.decode(&rows, &pages, &mut ropes, &[]).map(drop);
                decode().unwrap();
                let kernels = device::profile(device, decode).unwrap();
                let adds = |name: &str| name.contains("add_kernel") || name.contains("CUDAFunctor_add");
                let sums = kernels.iter().filter(|kernel| adds(&kernel.name)).count();
                let apart = ["biases", "D 256, softcap, a window"].contains(&name);
                assert_eq!(sums > 0, apart, "{name}, r {r}, 4-bit {load_in_4bit}: {sums} launches that add");
            }
        }
    }
}

/// Up to eight rows go through all layers in one launch and up to 64 in five a layer (seven with norms of heads), with LoRA, on both kinds of weights: what
/// the layers give one by one.
#[test]
fn layers_are_few_launches() {
    let Some(device) = gpu("all layers in a few launches") else { return };
    let taken = ["D 64, groups of 4", "norms of heads", "a window"];
    for (name, config) in shapes().into_iter().filter(|(name, _)| taken.contains(name)) {
        for (load_in_4bit, for_inference, r) in
            [(false, false, 16), (false, true, 24), (true, false, 40), (true, true, 16), (true, true, 64)]
        {
            tch::manual_seed(7);
            let options = LoadOptions { load_in_4bit, ..LoadOptions::new(Kind::BFloat16, device) };
            let mut model = FastLanguageModel::untrained(config.clone(), options, 7).unwrap();
            let arguments = ferrotune::train::TrainingArguments { r, ..Default::default() };
            model.get_peft_model(arguments.adapter_config("x"), 1).unwrap();
            let _no_grad = tch::no_grad_guard();
            for mut parameter in model.decoder.trainable() {
                let _ = parameter.tensor.normal_(0.0, 0.05);
            }
            if for_inference {
                model.for_inference().unwrap();
            }
            let decoder = &model.decoder;
            let pages = decoder.kv_pages(64 * 64).unwrap();
            for m in [1, 2, 3, 5, 8, 9, 16, 19, 32, 64] {
                let mut ropes = ferrotune::nn::RopeTables::default();
                let sequences: Vec<(Vec<i64>, Vec<i32>)> = (0..m)
                    .map(|at| {
                        let length = [300, 1, 17, 700, 256, 16, 513, 64][at % 8] + at as i64 / 8;
                        let ids = (0..length).map(|i| (i * i + at as i64) % 512);
                        (ids.collect(), (0..64).map(|page| (page * 64 + at) as i32).collect())
                    })
                    .collect();
                let prompts = sequences.iter().filter(|(ids, _)| ids.len() > 1).map(|(ids, table)| {
                    let past = ids.len() - 1;
                    let pages = &table[..past.div_ceil(16)];
                    NewRows { input_ids: &ids[..past], past: 0, length: ids.len(), pages }
                });
                let prompts: Vec<NewRows> = prompts.collect();
                let _ = decoder.decode(&prompts, &pages, &mut ropes, &[]).unwrap();
                let words = |of: fn(&[i64]) -> i64| {
                    Tensor::from_slice(&sequences.iter().map(|(ids, _)| of(ids)).collect::<Vec<_>>())
                        .to_device(device)
                };
                let tables: Vec<i64> =
                    sequences.iter().flat_map(|(_, table)| table).map(|&page| page.into()).collect();
                let rows = DeviceRows {
                    input_ids: words(|ids| ids[ids.len() - 1]),
                    positions: words(|ids| ids.len() as i64 - 1),
                    lengths: words(|ids| ids.len() as i64),
                    tables: Tensor::from_slice(&tables).view([m as i64, 64]).to_device(device),
                    longest: 1024,
                };
                let angles = config
                    .ropes
                    .iter()
                    .enumerate()
                    .map(|(index, rope)| ropes.table(index, rope, device, 1024, 1024).unwrap());
                let (angles, mut hidden): (Vec<_>, _) = (angles.collect(), None);
                let kernels = device::profile(device, || {
                    hidden = Some(decoder.decode_on_device(&rows, &pages, &angles, &[])?);
                    Ok(())
                })
                .unwrap();
                let launches = |of: &str| kernels.iter().filter(|kernel| kernel.name.contains(of)).count();
                let label =
                    format!("{name}, 4-bit {load_in_4bit}, for inference {for_inference}, r {r}, {m} rows");
                let layers = decoder.config.layers.len();
                let expected = if m <= 8 { (1, 0, 0) } else { (0, 4 * layers, 0) };
                let found =
                    (launches("decode_kernel"), launches("groups_kernel"), launches("swiglu_forward"));
                assert_eq!(found, expected, "{label}");
                let ours = decoder.logits(&hidden.unwrap()).unwrap();
                let expected: Vec<Tensor> = sequences
                    .iter()
                    .map(|(ids, _)| {
                        logits(decoder, &Flat::new([&ids[..]])).narrow(0, ids.len() as i64 - 1, 1)
                    })
                    .collect();
                let apart = rel(&ours, &Tensor::cat(&expected, 0))[0];
                println!("{label}: {apart:.2e}");
                assert!(apart < 3e-2, "{label}: {apart:.2e}");
            }
        }
    }
}
