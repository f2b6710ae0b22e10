//! adapter_config.json and PEFT's matching rules, against peft 0.21.2.

use std::fs;

use ferrotune::error::Error;
use ferrotune::io::adapter::{
    ADAPTER_CONFIG, AdapterConfig, AdapterTensor, InitLoraWeights, TargetModules, text_module,
};
use ferrotune::io::lora_spec::LoraSpec;

const MODULES: [&str; 9] = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.1.block.2.q_proj",
    "lm_head",
    "model.embed_tokens",
    "q_proj",
    "model.layers.0.self_attn.xq_proj",
];

/// What peft's `check_target_module_exists` says of each of [`MODULES`]: x is a target.
#[rustfmt::skip]
const TARGETS: [(&str, &str); 12] = [
    (r#"{"target_modules": ["q_proj"]}"#, "x..xx..x."),
    (r#"{"target_modules": ["self_attn.q_proj", "lm_head"]}"#, "x..x.x..."),
    (r#"{"target_modules": ".*\\.(q|v)_proj"}"#, "xx.xx...."),
    (r#"{"target_modules": "model\\.layers\\.1\\..*"}"#, ".xx.x...."),
    (r#"{"target_modules": "q_proj"}"#, ".......x."),
    (r#"{"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}"#, ".x..x..x."),
    (r#"{"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}"#, ".x..x..x."),
    (r#"{"target_modules": ["q_proj", "v_proj", "down_proj"], "layers_to_transform": [2, 10], "layers_pattern": ["block", "layers"]}"#, "...xx..x."),
    (r#"{"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"], "layers_to_transform": [5]}"#, "x........"),
    (r#"{"target_modules": ["q_proj", "lm_head", "embed_tokens"], "modules_to_save": ["lm_head", "layers.0"]}"#, "...xx.xx."),
    (r#"{"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}"#, ".x.xx..x."),
    (r#"{"target_modules": ["q_proj", "v_proj"], "exclude_modules": ".*layers\\.1\\..*"}"#, "x..x...x."),
];

/// Ranks by the pattern that peft's `get_pattern_key` picks for each of [`MODULES`]; 0 where none does.
#[rustfmt::skip]
const RANKS: [(&str, [u32; 9]); 4] = [
    (r#"{"q_proj": 1, "layers.1.*": 2}"#, [1, 2, 2, 1, 1, 0, 0, 1, 0]),
    (r#"{"layers.1.*": 2, "q_proj": 1}"#, [1, 2, 2, 2, 2, 0, 0, 1, 0]),
    (r#"{"self_attn.q_proj": 1, "^model.layers.0.*": 2}"#, [1, 0, 0, 1, 0, 0, 0, 0, 2]),
    (r#"{"proj": 1, "down_proj": 2}"#, [0, 0, 2, 0, 0, 0, 0, 0, 0]),
];

/// Everything that peft writes, at its defaults.
const WRITTEN_BY_PEFT: &str = r#"{"task_type": "CAUSAL_LM", "peft_type": "LORA", "auto_mapping": null,
    "peft_version": "0.21.2", "base_model_name_or_path": "x", "revision": null, "inference_mode": true, "r": 16,
    "target_modules": ["v_proj", "q_proj"], "exclude_modules": null, "lora_alpha": 22.6, "lora_dropout": 0.05,
    "fan_in_fan_out": false, "bias": "none", "use_rslora": false, "modules_to_save": null, "init_lora_weights": true,
    "layers_to_transform": null, "layers_pattern": null, "rank_pattern": {}, "alpha_pattern": {},
    "megatron_config": null, "megatron_core": "megatron.core", "trainable_token_indices": null, "loftq_config": {},
    "eva_config": null, "corda_config": null, "lora_ga_config": null, "use_dora": false, "velora_config": null,
    "alora_invocation_tokens": null, "use_qalora": false, "qalora_group_size": 16, "monteclora_config": null,
    "layer_replication": null, "lora_bias": false, "target_parameters": null, "use_bdlora": null,
    "arrow_config": null, "kasa_config": null, "ensure_weight_tying": false, "a_key_of_tomorrow": [1, 2]}"#;

fn load(json: &str) -> Result<AdapterConfig, String> {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(ADAPTER_CONFIG), json).unwrap();
    AdapterConfig::load(folder.path()).map_err(|error| format!("{error:#}"))
}

fn spec(json: &str) -> LoraSpec {
    LoraSpec::new(&load(json).unwrap()).unwrap()
}

#[test]
fn modules_are_matched_as_peft_does() {
    for (json, expected) in TARGETS {
        let spec = spec(json);
        let found: String = (MODULES.iter())
            .map(|module| if spec.for_module(module).unwrap().is_some() { 'x' } else { '.' })
            .collect();
        assert_eq!(found, expected, "{json}");
    }
    for (patterns, expected) in RANKS {
        let spec = spec(&format!(
            r#"{{"target_modules": ".*", "r": 99, "rank_pattern": {patterns}, "alpha_pattern": {patterns}}}"#
        ));
        for (module, expected) in MODULES.iter().zip(expected) {
            let lora = spec.for_module(module).unwrap().unwrap();
            let (r, alpha) = if expected == 0 { (99, 8.0) } else { (expected, f64::from(expected)) };
            assert_eq!((lora.r, lora.lora_alpha), (r, alpha), "{patterns} {module}");
        }
    }
}

#[test]
fn all_linear_leaves_out_the_head() {
    let all = spec("{}");
    let q_proj = all.for_module(MODULES[0]).unwrap().unwrap();
    assert_eq!((q_proj.r, q_proj.scale, q_proj.lora_dropout), (8, 1.0, 0.0));
    assert_eq!(all.for_module("lm_head").unwrap(), None);
    let some = spec(r#"{"layers_to_transform": [1], "use_rslora": true, "lora_alpha": 6, "r": 4}"#);
    assert_eq!(some.for_module(MODULES[0]).unwrap(), None);
    assert_eq!(some.for_module(MODULES[1]).unwrap().unwrap().scale, 3.0);
    let saved = spec(r#"{"modules_to_save": ["embed_tokens", "lm_head"]}"#);
    let whole: Vec<bool> = MODULES.iter().map(|module| saved.is_saved_whole(module).unwrap()).collect();
    assert_eq!(whole, [false, false, false, false, false, true, true, false, false]);
    let spelled_out = all.config().clone().spelled_out(MODULES[..3].iter().copied());
    assert_eq!(
        spelled_out.target_modules,
        TargetModules::Suffixes(vec!["down_proj".into(), "q_proj".into(), "v_proj".into()])
    );
}

#[test]
fn configs_of_peft_are_read_and_written_again() {
    let config = load(WRITTEN_BY_PEFT).unwrap();
    assert_eq!((config.r, config.lora_alpha, config.lora_dropout), (16, 22.6, 0.05));
    assert_eq!(config.target_modules, TargetModules::Suffixes(vec!["v_proj".into(), "q_proj".into()]));
    let folder = tempfile::tempdir().unwrap();
    config.save(folder.path()).unwrap();
    assert_eq!(AdapterConfig::load(folder.path()).unwrap(), config);
    let ours =
        AdapterConfig { r: 4, alpha_pattern: r#"{"b": 2, "a": 0.5}"#.parse().unwrap(), ..Default::default() };
    let text = serde_json::to_string(&ours).unwrap();
    assert!(
        text.contains(r#""lora_alpha":8,"#) && text.contains(r#""alpha_pattern":{"b":2,"a":0.5}"#),
        "{text}"
    );
    let eva = load(r#"{"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}"#).unwrap();
    assert_eq!(eva.init_lora_weights, InitLoraWeights::KaimingUniform);
}

#[test]
fn what_is_not_implemented_is_refused_by_its_key() {
    for (json, key) in [
        (r#"{"use_dora": true}"#, "use_dora true"),
        (r#"{"bias": "lora_only"}"#, "bias"),
        (r#"{"layer_replication": [[0, 2]]}"#, "layer_replication"),
        (r#"{"peft_type": "IA3"}"#, "peft_type"),
        (r#"{"fan_in_fan_out": true}"#, "fan_in_fan_out"),
        (r#"{"trainable_token_indices": {"embed_tokens": [1]}}"#, "trainable_token_indices"),
        (r#"{"init_lora_weights": "pissa"}"#, "pissa"),
        (r#"{"r": 0}"#, "rank 0"),
        (r#"{"rank_pattern": {"q_proj": 0}}"#, "q_proj"),
        (r#"{"lora_alpha": 0}"#, "lora_alpha 0"),
        (r#"{"r": "#, "not an adapter config"),
    ] {
        let error = load(json).unwrap_err();
        assert!(error.contains(key) && error.contains(ADAPTER_CONFIG), "{json}: {error}");
    }
    let dora = AdapterConfig {
        other: [("use_dora".to_owned(), true.into())].into_iter().collect(),
        ..Default::default()
    };
    assert!(matches!(dora.check().unwrap_err().downcast_ref(), Some(Error::Unsupported { .. })));
    let config = AdapterConfig { target_modules: TargetModules::Regex("(".into()), ..Default::default() };
    assert!(LoraSpec::new(&config).unwrap_err().to_string().contains("target_modules"));
}

#[test]
fn tensor_names_are_those_of_peft() {
    let q_proj = "model.layers.3.self_attn.q_proj";
    let key = "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight";
    assert_eq!(AdapterTensor::LoraA.key(q_proj), key);
    for key in [
        key,
        "base_model.model.model.language_model.layers.3.self_attn.q_proj.lora_A.weight",
        "base_model.model.language_model.model.layers.3.self_attn.q_proj.lora_A.weight",
    ] {
        assert_eq!(AdapterTensor::parse(key), Some((q_proj.to_owned(), AdapterTensor::LoraA)), "{key}");
    }
    for key in [
        "base_model.model.lm_head.weight",
        "base_model.model.language_model.lm_head.modules_to_save.default.weight",
    ] {
        assert_eq!(AdapterTensor::parse(key), Some(("lm_head".to_owned(), AdapterTensor::Weight)), "{key}");
    }
    let bias = AdapterTensor::parse(&AdapterTensor::Bias.key("lm_head"));
    assert_eq!(bias, Some(("lm_head".to_owned(), AdapterTensor::Bias)));
    for unknown in [
        "base_model.model.q_proj.lora_magnitude_vector",
        "base_model.model.q_proj.lora_B.bias",
        "x.lora_embedding_A",
    ] {
        assert_eq!(AdapterTensor::parse(unknown), None, "{unknown}");
    }
    assert_eq!(text_module("model.layers.0"), "model.layers.0");
}

#[test]
fn a_flag_of_plain_names_is_a_list() {
    let parsed = |text: &str| text.parse::<TargetModules>().unwrap();
    assert_eq!(parsed("all-linear"), TargetModules::AllLinear);
    assert_eq!(parsed("q_proj"), TargetModules::Suffixes(vec!["q_proj".into()]));
    assert_eq!(
        parsed("q_proj, mlp.up_proj"),
        TargetModules::Suffixes(vec!["q_proj".into(), "mlp.up_proj".into()])
    );
    assert_eq!(parsed(".*q_proj"), TargetModules::Regex(".*q_proj".into()));
}
