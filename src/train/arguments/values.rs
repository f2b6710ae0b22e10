//! What single arguments can be, and how run.yaml says it.

use std::fmt;
use std::str::FromStr;

use clap::ValueEnum;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::io::adapter::TargetModules;
use crate::ops::Policy;

/// Weights' and activations' type during training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    /// bf16 on a GPU (f16 on one that cannot, Gemma f32), f32 on the CPU
    Auto,
    #[value(alias = "float32")]
    #[serde(alias = "float32")]
    F32,
    #[value(alias = "bfloat16")]
    #[serde(alias = "bfloat16")]
    Bf16,
    /// For GPUs without bf16: the loss is scaled so that gradients keep inside f16; not for Gemma, which overflows
    #[value(alias = "float16", alias = "fp16")]
    #[serde(alias = "float16", alias = "fp16")]
    F16,
}

/// What frozen projections are kept and multiplied in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum BaseDtype {
    /// The type of the activations, or 4 bits with --load-in-4bit
    Auto,
    /// e4m3, activations and gradients too where they meet a frozen weight; LoRA, embedding, head and norms in 16 bits
    Fp8,
}

/// How layers become 4 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Quant {
    /// Every projection in NF4
    Nf4,
    /// NF4, but for the projections where it costs the loss most a byte
    DynamicNf4,
}

/// What of a layer is kept between forward and backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum GradientCheckpointing {
    /// Everything
    #[value(alias = "false")]
    Off,
    /// The inputs of attention and MLP; the rest is computed again
    #[value(alias = "true")]
    On,
    /// The same, and on a GPU these inputs wait in the host's memory
    Unsloth,
    /// On a GPU what is fastest within max_memory and max_host_memory, layer by layer; on the CPU everything
    Auto,
}

impl GradientCheckpointing {
    /// Of every layer. `Auto` leaves it to a plan (`train::plan`); without one everything is kept.
    pub fn policy(self) -> Policy {
        match self {
            GradientCheckpointing::Off | GradientCheckpointing::Auto => Policy::KEEP,
            GradientCheckpointing::On => Policy::RECOMPUTE,
            GradientCheckpointing::Unsloth => Policy::HOST,
        }
    }
}

/// A word of the flag, or true or false.
impl<'de> Deserialize<'de> for GradientCheckpointing {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<GradientCheckpointing, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Given {
            Bool(bool),
            Word(String),
        }
        let word = match Given::deserialize(deserializer)? {
            Given::Bool(given) => given.to_string(),
            Given::Word(word) => word,
        };
        GradientCheckpointing::from_str(&word, false).map_err(|_| {
            serde::de::Error::custom(format!("{word:?}: expected off, on, unsloth, auto, true or false"))
        })
    }
}

/// Bytes, as `8GiB`, `24GB`, `500 MiB` or `1.5gib`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Size, String> {
        let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let unit: u64 = match unit.to_ascii_lowercase().as_str() {
            "gib" | "g" => 1 << 30,
            "mib" | "m" => 1 << 20,
            "gb" => 1_000_000_000,
            "mb" => 1_000_000,
            "b" => 1,
            _ => return Err("expected a size such as 8GiB, 24GB or 500MiB".to_string()),
        };
        match number.trim().parse::<f64>() {
            Ok(number) if number > 0.0 && number.is_finite() => Ok(Size((number * unit as f64) as u64)),
            _ => Err("expected a positive number before the unit".to_string()),
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes if bytes % (1 << 30) == 0 => write!(f, "{}GiB", bytes >> 30),
            bytes if bytes % (1 << 20) == 0 => write!(f, "{}MiB", bytes >> 20),
            bytes => write!(f, "{bytes}B"),
        }
    }
}

impl Serialize for Size {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Size, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What updates the weights, in transformers' words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
pub enum Optim {
    /// AdamW
    #[value(name = "adamw_torch", alias = "adamw_torch_fused")]
    #[serde(rename = "adamw_torch", alias = "adamw_torch_fused")]
    AdamwTorch,
    /// AdamW with moments in 8 bits, a quarter of the memory
    #[value(name = "adamw_8bit", alias = "adamw_bnb_8bit")]
    #[serde(rename = "adamw_8bit", alias = "adamw_bnb_8bit")]
    Adamw8bit,
}

impl fmt::Display for Optim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Optim::AdamwTorch => "adamw_torch",
            Optim::Adamw8bit => "adamw_8bit",
        })
    }
}

/// When the evaluation set is scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum EvalStrategy {
    No,
    /// Every `eval_steps` optimizer steps, and at the end
    Steps,
    /// At the end of every epoch
    Epoch,
}

/// A list, one value, or one string of values between commas as on the command line.
pub(in crate::train) fn list<'de, D: Deserializer<'de>, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    T: Deserialize<'de> + std::str::FromStr<Err: std::fmt::Display>,
{
    let split = |text: &str| {
        text.split(',').map(|part| part.trim().parse().map_err(serde::de::Error::custom)).collect()
    };
    let one = |value: Value| T::deserialize(value).map_err(serde::de::Error::custom);
    match Value::deserialize(deserializer)? {
        Value::Null => Ok(Vec::new()),
        Value::Array(list) => list.into_iter().map(one).collect(),
        // One value may hold a comma itself.
        Value::String(text) => match T::deserialize(Value::String(text.clone())) {
            Ok(value) => Ok(vec![value]),
            Err(_) if text.contains(',') => split(&text),
            Err(error) => Err(serde::de::Error::custom(error)),
        },
        value => one(value).map(|value| vec![value]),
    }
}

/// As the flag reads it, unlike adapter_config.json, where a string is always a regular expression.
pub(super) fn target_modules<'de, D: Deserializer<'de>>(deserializer: D) -> Result<TargetModules, D::Error> {
    match TargetModules::deserialize(deserializer)? {
        TargetModules::Regex(text) => text.parse().map_err(serde::de::Error::custom),
        other => Ok(other),
    }
}

/// As [`TrainingArguments::differences`](super::TrainingArguments::differences), of any run's arguments.
pub(in crate::train) fn differences(ours: &impl Serialize, theirs: &impl Serialize) -> Vec<String> {
    let places =
        ["output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dry_run", "config", "serve"];
    let theirs = fields(theirs);
    fields(ours)
        .into_iter()
        .filter(|(key, ours)| !places.contains(&key.as_str()) && theirs.get(key) != Some(ours))
        .map(|(key, ours)| {
            format!("{key}: {ours} -> {}", theirs.get(&key).unwrap_or(&serde_json::Value::Null))
        })
        .collect()
}

/// The arguments by key.
pub(in crate::train) fn fields(arguments: &impl Serialize) -> serde_json::Map<String, serde_json::Value> {
    match serde_json::to_value(arguments) {
        Ok(serde_json::Value::Object(fields)) => fields,
        _ => serde_json::Map::new(),
    }
}
