//! How tokens are chosen and when to stop: what a caller asks for, and what a checkpoint suggests.

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::models::config::Json;

/// The words, meanings and order of transformers' logits processors: the penalties, temperature, top-k, top-p,
/// min-p. A filter's neutral value turns it off.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Logits are divided by it. 0 takes the likeliest token, and the filters below do not matter.
    pub temperature: f64,
    /// Keeps the `top_k` likeliest tokens and those tied with the last of them; 0 keeps all.
    pub top_k: usize,
    /// Keeps the likeliest tokens that together reach this probability; 1 keeps all. arXiv:1904.09751
    pub top_p: f64,
    /// Keeps tokens at least this fraction as likely as the likeliest; 0 keeps all. arXiv:2407.01082
    pub min_p: f64,
    /// Divides positive and multiplies negative logits of tokens that the prompt or the answer contains; 1 is off.
    /// arXiv:1909.05858
    pub repetition_penalty: f64,
    /// Subtracted from the logit of every token that the answer contains; 0 is off.
    pub presence_penalty: f64,
    /// Subtracted from a token's logit for each time that the answer contains it; 0 is off.
    pub frequency_penalty: f64,
    /// Most tokens to generate; the model's context may end it earlier.
    pub max_new_tokens: usize,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// Tokens that end the answer; they are in its ids but not in its text.
    pub stop_token_ids: Vec<i64>,
    /// Seed of this request's own generator.
    pub seed: u64,
    /// Also the log-probability of each token and of this many of the likeliest, before temperature, penalties and filters.
    pub logprobs: Option<usize>,
}

impl Default for SamplingParams {
    /// Greedy, 256 tokens.
    fn default() -> SamplingParams {
        SamplingParams {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            max_new_tokens: 256,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            seed: 3407,
            logprobs: None,
        }
    }
}

impl SamplingParams {
    /// # Errors
    /// Names the first value that has no meaning.
    pub fn check(&self) -> Result<()> {
        let within = |name: &str, value: f64, ok: bool, expected: &str| {
            if ok { Ok(()) } else { bail!("{name} is {value}, expected {expected}") }
        };
        // Divided by less, scores would leave f32.
        let fits = self.temperature == 0.0 || (1e-4..=1e4).contains(&self.temperature);
        within("temperature", self.temperature, fits, "0 (greedy), or from 0.0001 to 10000")?;
        within("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "more than 0 and at most 1")?;
        within("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "a number from 0 to 1")?;
        let penalty = self.repetition_penalty;
        within(
            "repetition_penalty",
            penalty,
            (1e-3..=1e3).contains(&penalty),
            "a number from 0.001 to 1000",
        )?;
        for (name, penalty) in
            [("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)]
        {
            within(name, penalty, (-1e3..=1e3).contains(&penalty), "a number from -1000 to 1000")?;
        }
        if self.stop.iter().any(String::is_empty) {
            bail!("stop has an empty text");
        }
        if self.max_new_tokens == 0 {
            bail!("max_new_tokens is 0, expected at least 1");
        }
        Ok(())
    }
}

/// The parts of a checkpoint's `generation_config.json` that matter here; absent keys are `None`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// transformers samples only where this is true.
    pub do_sample: bool,
    pub temperature: Option<f64>,
    pub top_k: Option<usize>,
    pub top_p: Option<f64>,
    pub min_p: Option<f64>,
    pub repetition_penalty: Option<f64>,
    pub max_new_tokens: Option<usize>,
    /// `eos_token_id`, one or several.
    pub eos_token_ids: Vec<i64>,
}

impl GenerationConfig {
    /// Reads the file of the checkpoint folder `dir`; all absent where there is none.
    pub fn from_dir(dir: &Path) -> Result<GenerationConfig> {
        let path = dir.join("generation_config.json");
        if !path.is_file() {
            return Ok(GenerationConfig::default());
        }
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        GenerationConfig::from_json(&text).with_context(|| format!("in {}", path.display()))
    }

    /// Parses the text of a generation_config.json.
    pub fn from_json(text: &str) -> Result<GenerationConfig> {
        let json = Json(serde_json::from_str(text).context("not a JSON object")?);
        let count = |key: &str| -> Result<Option<usize>> {
            let Some(value) = json.int(key)? else { return Ok(None) };
            usize::try_from(value).map(Some).with_context(|| format!("{key} is {value}, expected 0 or more"))
        };
        Ok(GenerationConfig {
            do_sample: json.flag("do_sample", false)?,
            temperature: json.number("temperature")?,
            top_k: count("top_k")?,
            top_p: json.number("top_p")?,
            min_p: json.number("min_p")?,
            repetition_penalty: json.number("repetition_penalty")?,
            max_new_tokens: count("max_new_tokens")?,
            eos_token_ids: json.ints("eos_token_id")?,
        })
    }

    /// The parameters that the checkpoint suggests: greedy unless `do_sample` is true, as transformers reads it.
    pub fn params(&self) -> SamplingParams {
        let neutral = SamplingParams::default();
        SamplingParams {
            temperature: if self.do_sample { self.temperature.unwrap_or(1.0) } else { 0.0 },
            top_k: self.top_k.unwrap_or(neutral.top_k),
            top_p: self.top_p.unwrap_or(neutral.top_p),
            min_p: self.min_p.unwrap_or(neutral.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(neutral.repetition_penalty),
            max_new_tokens: self.max_new_tokens.unwrap_or(neutral.max_new_tokens),
            stop_token_ids: self.eos_token_ids.clone(),
            ..neutral
        }
    }
}
