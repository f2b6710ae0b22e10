//! Which modules get LoRA, and with which rank and scale: PEFT's matching rules.

use anyhow::{Context, Result};
use fancy_regex::Regex;

use crate::io::adapter::{AdapterConfig, TargetModules};

/// The LoRA of one module.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ModuleLora {
    /// Rank R.
    pub r: u32,
    /// `lora_alpha` of this module.
    pub lora_alpha: f64,
    /// What B·A is multiplied by: alpha / R, or alpha / sqrt(R) with `use_rslora`.
    pub scale: f64,
    /// Share of the inputs that is dropped in training.
    pub lora_dropout: f64,
}

/// An [`AdapterConfig`], ready to be asked about modules.
#[derive(Debug)]
pub struct LoraSpec {
    config: AdapterConfig,
    target: Matcher,
    exclude: Option<Matcher>,
    modules_to_save: Vec<Regex>,
    layer_index: Vec<Regex>,
    rank_pattern: Vec<(Regex, u32)>,
    alpha_pattern: Vec<(Regex, f64)>,
}

#[derive(Debug)]
enum Matcher {
    AllLinear,
    Suffixes(Vec<String>),
    Regex(Regex),
}

impl Matcher {
    fn new(modules: &TargetModules, key: &str) -> Result<Self> {
        Ok(match modules {
            TargetModules::AllLinear => Self::AllLinear,
            TargetModules::Suffixes(names) => Self::Suffixes(names.clone()),
            TargetModules::Regex(text) => Self::Regex(regex(key, text, &format!(r"\A(?:{text})\z"))?),
        })
    }

    fn matches(&self, module: &str) -> Result<bool> {
        Ok(match self {
            Self::AllLinear => !is_named(module, "lm_head"),
            Self::Suffixes(names) => names.iter().any(|name| is_named(module, name)),
            Self::Regex(regex) => regex.is_match(module)?,
        })
    }
}

impl LoraSpec {
    /// # Errors
    /// A pattern that is no regular expression, with its key.
    pub fn new(config: &AdapterConfig) -> Result<Self> {
        // PEFT: re.match(rf"(.*\.)?({key})$", name); the first pattern that matches counts.
        let by_pattern =
            |key: &str, pattern: &str| regex(key, pattern, &format!(r"\A(?:.*\.)?(?:{pattern})\z"));
        Ok(Self {
            target: Matcher::new(&config.target_modules, "target_modules")?,
            exclude: (config.exclude_modules.as_ref())
                .map(|modules| Matcher::new(modules, "exclude_modules"))
                .transpose()?,
            modules_to_save: (config.modules_to_save.iter().flatten())
                .map(|name| regex("modules_to_save", name, &format!(r"\A(?:.*\.)?{name}(?:\z|\.)")))
                .collect::<Result<_>>()?,
            layer_index: match config.layers_pattern.as_deref() {
                None | Some([]) => vec![regex("layers_pattern", "", r"\A.*?\.[^.]*\.(?P<idx>\d+)\.")?],
                Some(patterns) => (patterns.iter())
                    .map(|pattern| {
                        regex(
                            "layers_pattern",
                            pattern,
                            &format!(r"\A(?:.*?\.)?(?:{pattern})\.(?P<idx>\d+)\."),
                        )
                    })
                    .collect::<Result<_>>()?,
            },
            rank_pattern: (config.rank_pattern.0.iter())
                .map(|(pattern, rank)| Ok((by_pattern("rank_pattern", pattern)?, *rank)))
                .collect::<Result<_>>()?,
            alpha_pattern: (config.alpha_pattern.0.iter())
                .map(|(pattern, alpha)| Ok((by_pattern("alpha_pattern", pattern)?, *alpha)))
                .collect::<Result<_>>()?,
            config: config.clone(),
        })
    }

    /// The configuration this was made from.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// The LoRA of the linear layer `module` (`model.layers.0.self_attn.q_proj`), None if it gets none.
    pub fn for_module(&self, module: &str) -> Result<Option<ModuleLora>> {
        if !self.is_target(module)? {
            return Ok(None);
        }
        let r = first_match(&self.rank_pattern, module)?.unwrap_or(self.config.r);
        let lora_alpha = first_match(&self.alpha_pattern, module)?.unwrap_or(self.config.lora_alpha);
        let divisor = if self.config.use_rslora { f64::from(r).sqrt() } else { f64::from(r) };
        Ok(Some(ModuleLora {
            r,
            lora_alpha,
            scale: lora_alpha / divisor,
            lora_dropout: self.config.lora_dropout,
        }))
    }

    /// Whether `module` is trained in full and saved with the adapter.
    pub fn is_saved_whole(&self, module: &str) -> Result<bool> {
        any(&self.modules_to_save, module)
    }

    fn is_target(&self, module: &str) -> Result<bool> {
        if self.is_saved_whole(module)? {
            return Ok(false);
        }
        if let Some(exclude) = &self.exclude
            && exclude.matches(module)?
        {
            return Ok(false);
        }
        if !self.target.matches(module)? {
            return Ok(false);
        }
        let Some(layers) = self.config.layers_to_transform.as_deref().filter(|layers| !layers.is_empty())
        else {
            return Ok(true);
        };
        // As in PEFT, a module that is named in full is meant whatever its layer.
        if let Matcher::Suffixes(names) = &self.target
            && names.iter().any(|name| name == module)
        {
            return Ok(true);
        }
        for pattern in &self.layer_index {
            if let Some(found) = pattern.captures(module)? {
                let layer = found.name("idx").and_then(|digits| digits.as_str().parse().ok());
                return Ok(layer.is_some_and(|layer| layers.contains(&layer)));
            }
        }
        Ok(false)
    }
}

fn is_named(module: &str, name: &str) -> bool {
    module.strip_suffix(name).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

fn any(patterns: &[Regex], module: &str) -> Result<bool> {
    for pattern in patterns {
        if pattern.is_match(module)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn first_match<T: Copy>(patterns: &[(Regex, T)], module: &str) -> Result<Option<T>> {
    for (pattern, value) in patterns {
        if pattern.is_match(module)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

fn regex(key: &str, given: &str, pattern: &str) -> Result<Regex> {
    Regex::new(pattern).with_context(|| format!("{key}: {given:?} is not a regular expression"))
}
