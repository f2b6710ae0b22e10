//! PEFT's adapter folder: `adapter_config.json`, which modules it names, and the names in `adapter_model.safetensors`.

use std::convert::Infallible;
use std::fmt;
use std::fs;
use std::marker::PhantomData;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::error::Error;
use crate::io::write_atomically;

/// Name of the configuration in an adapter folder.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// Name of the weights in an adapter folder.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

const ALL_LINEAR: &str = "all-linear";

/// Which modules are meant, as PEFT's `target_modules` and `exclude_modules`.
///
/// In JSON a list is a list of names and a string (other than `all-linear`) a regular expression. On the command line
/// ([`FromStr`]) one or more plain names between commas are a list, anything else is a regular expression.
#[derive(Debug, Clone, PartialEq)]
pub enum TargetModules {
    /// Every linear layer but the output head.
    AllLinear,
    /// Modules whose name is one of these or ends in `.` and one of these.
    Suffixes(Vec<String>),
    /// Modules whose whole name matches.
    Regex(String),
}

impl FromStr for TargetModules {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        let is_name = |name: &str| {
            !name.is_empty()
                && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
        };
        let names: Vec<String> = text.split(',').map(|name| name.trim().to_owned()).collect();
        Ok(match text {
            _ if text.eq_ignore_ascii_case(ALL_LINEAR) => Self::AllLinear,
            _ if names.iter().all(|name| is_name(name)) => Self::Suffixes(names),
            _ => Self::Regex(text.to_owned()),
        })
    }
}

impl Serialize for TargetModules {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::AllLinear => serializer.serialize_str(ALL_LINEAR),
            Self::Suffixes(names) => names.serialize(serializer),
            Self::Regex(text) => serializer.serialize_str(text),
        }
    }
}

impl<'de> Deserialize<'de> for TargetModules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum ListOrText {
            List(Vec<String>),
            Text(String),
        }
        Ok(match ListOrText::deserialize(deserializer)? {
            ListOrText::List(names) => Self::Suffixes(names),
            ListOrText::Text(text) if text.eq_ignore_ascii_case(ALL_LINEAR) => Self::AllLinear,
            ListOrText::Text(text) => Self::Regex(text),
        })
    }
}

/// How A and B start; R is the rank, `in` the width of the layer's input.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum InitLoraWeights {
    /// `true`: A uniform in ±1/sqrt(in), B zero.
    #[default]
    KaimingUniform,
    /// `"gaussian"`: A normal with deviation 1/R, B zero.
    Gaussian,
    /// `false`: A uniform in ±1/sqrt(in), B uniform in ±1/sqrt(R).
    Random,
}

impl InitLoraWeights {
    fn as_value(self) -> Value {
        match self {
            Self::KaimingUniform => true.into(),
            Self::Gaussian => "gaussian".into(),
            Self::Random => false.into(),
        }
    }
}

impl FromStr for InitLoraWeights {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "true" => Ok(Self::KaimingUniform),
            "gaussian" => Ok(Self::Gaussian),
            "false" => Ok(Self::Random),
            other => Err(Error::Unsupported {
                what: format!("init_lora_weights {other:?}"),
                supported: "true, false, gaussian".to_owned(),
            }),
        }
    }
}

impl Serialize for InitLoraWeights {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.as_value().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for InitLoraWeights {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match Value::deserialize(deserializer)? {
            // The weights are in the file; these two only chose where A and B started and left the base model alone.
            Value::String(text) if matches!(text.as_str(), "eva" | "orthogonal") => Ok(Self::KaimingUniform),
            Value::String(text) => text.parse(),
            Value::Null => Ok(Self::KaimingUniform),
            other => other.to_string().parse(),
        }
        .map_err(serde::de::Error::custom)
    }
}

/// `adapter_config.json` of a LoRA adapter: PEFT's keys, PEFT's defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdapterConfig {
    pub task_type: Option<String>,
    pub peft_type: String,
    pub base_model_name_or_path: Option<String>,
    pub revision: Option<String>,
    pub inference_mode: bool,
    pub r: u32,
    pub target_modules: TargetModules,
    pub exclude_modules: Option<TargetModules>,
    #[serde(serialize_with = "as_number")]
    pub lora_alpha: f64,
    pub lora_dropout: f64,
    pub fan_in_fan_out: bool,
    pub bias: String,
    pub use_rslora: bool,
    pub modules_to_save: Option<Vec<String>>,
    pub init_lora_weights: InitLoraWeights,
    #[serde(deserialize_with = "one_or_many")]
    pub layers_to_transform: Option<Vec<usize>>,
    #[serde(deserialize_with = "one_or_many")]
    pub layers_pattern: Option<Vec<String>>,
    pub rank_pattern: Patterns<u32>,
    pub alpha_pattern: Patterns<f64>,
    /// Everything else that the file says.
    #[serde(flatten)]
    pub other: serde_json::Map<String, Value>,
}

impl Default for AdapterConfig {
    fn default() -> Self {
        Self {
            task_type: Some("CAUSAL_LM".to_owned()),
            peft_type: "LORA".to_owned(),
            base_model_name_or_path: None,
            revision: None,
            inference_mode: true,
            r: 8,
            target_modules: TargetModules::AllLinear,
            exclude_modules: None,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            fan_in_fan_out: false,
            bias: "none".to_owned(),
            use_rslora: false,
            modules_to_save: None,
            init_lora_weights: InitLoraWeights::default(),
            layers_to_transform: None,
            layers_pattern: None,
            rank_pattern: Patterns::default(),
            alpha_pattern: Patterns::default(),
            other: serde_json::Map::new(),
        }
    }
}

/// Keys of PEFT that change what the weights mean and that nothing here implements: only their neutral values
/// (null, false, empty) are accepted.
const UNSUPPORTED: [&str; 14] = [
    "use_dora",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "lora_ga_config",
    "corda_config",
    "loftq_config",
];

/// Keys of PEFT that say how the adapter was made or stored and do not change what its weights mean.
const WITHOUT_EFFECT: [&str; 8] = [
    "auto_mapping",
    "peft_version",
    "megatron_config",
    "megatron_core",
    "eva_config",
    "velora_config",
    "qalora_group_size",
    "ensure_weight_tying",
];

impl AdapterConfig {
    /// Reads `adapter_config.json` of the folder. Unknown keys are ignored with a warning.
    ///
    /// # Errors
    /// A file that is missing or no JSON; a key that asks for what is not implemented (named).
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join(ADAPTER_CONFIG);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let config: Self = serde_json::from_str(&text)
            .with_context(|| format!("{}: not an adapter config", path.display()))?;
        config.check().with_context(|| path.display().to_string())?;
        let unknown: Vec<&str> = (config.other.iter())
            .filter(|(key, value)| {
                !UNSUPPORTED.contains(&key.as_str())
                    && !WITHOUT_EFFECT.contains(&key.as_str())
                    && !is_neutral(value)
            })
            .map(|(key, _)| key.as_str())
            .collect();
        if !unknown.is_empty() {
            tracing::warn!("{}: unknown keys ignored: {}", path.display(), unknown.join(", "));
        }
        Ok(config)
    }

    /// Writes `adapter_config.json` into the folder.
    pub fn save(&self, folder: &Path) -> Result<()> {
        write_atomically(&folder.join(ADAPTER_CONFIG), &serde_json::to_vec_pretty(self)?)
    }

    /// Refuses what is not implemented, naming the key, and values that make no sense.
    pub fn check(&self) -> Result<()> {
        let unsupported = |what: String, supported: &str| {
            Err(Error::Unsupported { what, supported: supported.to_owned() }.into())
        };
        if !self.peft_type.eq_ignore_ascii_case("lora") {
            return unsupported(format!("peft_type {:?}", self.peft_type), "LORA");
        }
        if self.bias != "none" {
            return unsupported(format!("bias {:?}", self.bias), "none");
        }
        if self.fan_in_fan_out {
            return unsupported("fan_in_fan_out true".to_owned(), "false");
        }
        for key in UNSUPPORTED {
            if let Some(value) = self.other.get(key).filter(|value| !is_neutral(value)) {
                return unsupported(format!("{key} {value}"), "an adapter without it");
            }
        }
        if let Some((name, rank)) = std::iter::once(("r", &self.r))
            .chain(self.rank_pattern.0.iter().map(|(pattern, rank)| (pattern.as_str(), rank)))
            .find(|(_, rank)| **rank < 1)
        {
            bail!(Error::Usage(format!("LoRA rank {rank} ({name}): must be at least 1")));
        }
        for alpha in
            std::iter::once(&self.lora_alpha).chain(self.alpha_pattern.0.iter().map(|(_, alpha)| alpha))
        {
            if !(alpha.is_finite() && *alpha > 0.0) {
                bail!(Error::Usage(format!("lora_alpha {alpha}: must be a finite number above 0")));
            }
        }
        Ok(())
    }

    /// The same adapter with `all-linear` spelled out as the last parts of the names of the `modules` that have LoRA.
    /// PEFT writes it so too, and it refuses `layers_to_transform` beside `all-linear`.
    pub fn spelled_out<'a>(mut self, modules: impl IntoIterator<Item = &'a str>) -> Self {
        if self.target_modules == TargetModules::AllLinear {
            let mut names: Vec<String> =
                modules.into_iter().map(|name| name.rsplit('.').next().unwrap_or(name).to_owned()).collect();
            names.sort();
            names.dedup();
            self.target_modules = TargetModules::Suffixes(names);
        }
        self
    }
}

fn is_neutral(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(values) => values.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

/// What a tensor of `adapter_model.safetensors` is to its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AdapterTensor {
    /// A, [R, in].
    LoraA,
    /// B, [out, R].
    LoraB,
    /// The whole weight of a module of `modules_to_save`.
    Weight,
    /// The bias of a module of `modules_to_save`.
    Bias,
}

impl AdapterTensor {
    const SUFFIXES: [(Self, &'static str); 4] = [
        (Self::LoraA, ".lora_A.weight"),
        (Self::LoraB, ".lora_B.weight"),
        (Self::Weight, ".weight"),
        (Self::Bias, ".bias"),
    ];

    /// The key of this tensor of `module` (as in the base checkpoint: `model.layers.0.self_attn.q_proj`).
    pub fn key(self, module: &str) -> String {
        let suffix =
            Self::SUFFIXES.iter().find(|(tensor, _)| *tensor == self).map_or("", |(_, suffix)| suffix);
        format!("base_model.model.{module}{suffix}")
    }

    /// The module and the tensor that a key means, with the text model's names: the prefixes of vision-language
    /// models, `model.language_model.` (transformers 4.52 and later) and `language_model.model.` (before), become
    /// `model.`. None for a key that belongs to no known kind of tensor.
    pub fn parse(key: &str) -> Option<(String, Self)> {
        let name = key.strip_prefix("base_model.model.").unwrap_or(key);
        let (tensor, module) =
            Self::SUFFIXES.iter().find_map(|(tensor, suffix)| Some((*tensor, name.strip_suffix(suffix)?)))?;
        // Written by tools that keep PEFT's names in memory.
        let module = module.strip_suffix(".modules_to_save.default").unwrap_or(module);
        (!module.contains(".lora_")).then(|| (text_module(module), tensor))
    }
}

/// The name of a text model's module without a vision-language model's prefix.
pub fn text_module(name: &str) -> String {
    match (name.strip_prefix("model.language_model."), name.strip_prefix("language_model.")) {
        (Some(rest), _) => format!("model.{rest}"),
        (None, Some(rest)) => rest.to_owned(),
        (None, None) => name.to_owned(),
    }
}

/// PEFT's `rank_pattern` and `alpha_pattern`: regular expressions for the ends of module names, each with its value, in
/// the order of the file, because the first that matches counts. On the command line ([`FromStr`]) a JSON object.
#[derive(Debug, Clone, PartialEq)]
pub struct Patterns<T>(pub Vec<(String, T)>);

impl<T> Default for Patterns<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: DeserializeOwned> FromStr for Patterns<T> {
    type Err = serde_json::Error;

    fn from_str(text: &str) -> serde_json::Result<Self> {
        serde_json::from_str(text)
    }
}

impl<T: Copy + Into<f64>> Serialize for Patterns<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(pattern, value)| (pattern, number((*value).into()))))
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Patterns<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for InOrder<T> {
            type Value = Patterns<T>;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a map from patterns to numbers")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut patterns = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    patterns.push(entry);
                }
                Ok(Patterns(patterns))
            }
        }
        deserializer.deserialize_map(InOrder(PhantomData))
    }
}

/// PEFT accepts one value where a list is meant.
fn one_or_many<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Option<Vec<T>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum OneOrMany<T> {
        Many(Vec<T>),
        One(T),
    }
    Ok(Option::<OneOrMany<T>>::deserialize(deserializer)?.map(|values| match values {
        OneOrMany::Many(values) => values,
        OneOrMany::One(value) => vec![value],
    }))
}

/// 16 rather than 16.0: readers other than PEFT expect an integer.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { (value as i64).into() } else { value.into() }
}

fn as_number<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    number(*value).serialize(serializer)
}
