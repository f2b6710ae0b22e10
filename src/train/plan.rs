//! What a training step on a GPU will hold in memory and how long it will take, from its shape alone: no GPU, no weights; what the
//! rollouts of a GRPO run hold between two steps; and what each layer should keep for its backward, so that it is fastest within a budget.
//!
//! [`Work`] describes a step, [`Work::memory`] and [`Work::milliseconds`] predict it for given policies, and [`Work::fastest`]
//! chooses them. Dimensions are those of docs/architecture.md.

mod attention;
mod blocks;
mod card;
mod choose;
mod memory;
mod rollout;
mod time;

pub use card::{Card, Rates};
pub use choose::{Budget, Plan};
pub use memory::{Memory, Moment};
pub use rollout::{Rollout, RolloutMemory};

use anyhow::{Result, ensure};

use super::Optim;
use crate::error::Error;
use crate::models::{Config, SavedModule, check_embeddings, check_trains_all, projections};

/// An optimizer step of `gradient_accumulation_steps` forward passes.
#[derive(Debug, Clone)]
pub struct Work {
    pub shape: Shape,
    pub layers: Vec<Layer>,
    /// Tokens of a forward pass at most, and of a sample in it.
    pub tokens: u64,
    pub sample: u64,
    pub gradient_accumulation_steps: u64,
    pub optim: Optim,
    /// Bytes of an element of activations and of frozen weights that are not in 4 bits: 2, or 4 in f32.
    pub element: u64,
    /// Projections are in e4m3 (csrc/fp8.h).
    pub fp8: bool,
    /// Bytes of the embedding on the device, and of the head where it is another matrix.
    pub embedding: u64,
    pub head: u64,
    pub nf4_head: bool,
    pub trained: Trained,
    /// All weights start at random, so that LoRA cannot stand in for them.
    pub from_scratch: bool,
    /// LoRA drops inputs: no product has LoRA inside it, no MLP is worked on in runs or tiles, and no step is recorded.
    pub dropout: bool,
    /// With `--deterministic`, how many multiprocessors the GPU has.
    pub deterministic: Option<u64>,
    /// The loss is made of log-probabilities of tokens, not of their cross-entropy.
    pub log_probs: bool,
    /// Bytes that lie on the device already, such as a reward model's.
    pub beside: u64,
    /// Where samples share rows: those of all samples, which attention copies them to; else 0.
    pub copied: u64,
    /// Ropes turn the beginning of a sample alike whatever its length, so that samples can share it.
    pub alike: bool,
    /// What is written between two steps, in GRPO.
    pub rollout: Option<Rollout>,
}

/// What trains itself and not through LoRA, as f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Trained {
    /// Projections and norms.
    pub layers: bool,
    pub embedding: bool,
    pub head: bool,
}

/// What all layers share.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub c: u64,
    pub f: u64,
    pub v: u64,
    /// Norms on heads, and norms behind both blocks.
    pub qk_norm: bool,
    pub post_norms: bool,
    pub ropes: u64,
}

/// One decoder layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Layer {
    pub qkv: Linear,
    pub o: Linear,
    pub gate_up: Linear,
    pub down: Linear,
    pub h: u64,
    pub k: u64,
    pub d: u64,
    /// A query sees so many keys at most.
    pub window: Option<u64>,
    /// Scores are capped.
    pub softcap: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Linear {
    pub columns: u64,
    pub parts: Vec<Part>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Part {
    pub rows: u64,
    pub module: Module,
}

/// What a run makes of one projection of the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Module {
    /// LoRA's rank, 0 without.
    pub r: u64,
    pub nf4: bool,
    /// The weight itself trains, as f32.
    pub trained: bool,
}

impl Linear {
    pub fn rows(&self) -> u64 {
        self.parts.iter().map(|part| part.rows).sum()
    }

    /// LoRA's ranks side by side.
    pub fn rank(&self) -> u64 {
        self.parts.iter().map(|part| part.module.r).sum()
    }

    /// Elements of all A and B.
    fn lora(&self) -> u64 {
        self.parts.iter().map(|part| part.module.r * (part.rows + self.columns)).sum()
    }

    fn elements(&self) -> u64 {
        self.rows() * self.columns
    }

    fn in_4bit(&self) -> bool {
        self.parts.iter().any(|part| part.module.nf4)
    }

    fn trained(&self) -> bool {
        self.parts.iter().any(|part| part.module.trained)
    }
}

impl Layer {
    fn query(&self) -> u64 {
        self.h * self.d
    }

    /// Query and key heads side by side.
    fn turned(&self) -> u64 {
        (self.h + self.k) * self.d
    }

    fn linears(&self) -> [&Linear; 4] {
        [&self.qkv, &self.o, &self.gate_up, &self.down]
    }

    fn modules_mut(&mut self) -> impl Iterator<Item = &mut Module> {
        let linears = [&mut self.qkv, &mut self.o, &mut self.gate_up, &mut self.down];
        linears.into_iter().flat_map(|linear| &mut linear.parts).map(|part| &mut part.module)
    }
}

impl Work {
    /// A step of `rows` samples of `length` tokens a pass. `module` says of each projection, by its name in a checkpoint whose
    /// prefix is `prefix`, what the run makes of it.
    pub fn new(
        config: &Config,
        (rows, length): (usize, usize),
        optim: Optim,
        prefix: &str,
        module: impl Fn(&str) -> Module,
    ) -> Work {
        let layer = |index: usize| {
            let [qkv, o, gate_up, down] = projections(config, index, prefix).map(|(parts, columns)| Linear {
                columns: columns as u64,
                parts: (parts.iter())
                    .map(|(name, rows)| Part { rows: *rows as u64, module: module(name) })
                    .collect(),
            });
            let spec = &config.layers[index].attention;
            let [h, k, d] = [spec.num_heads, spec.num_kv_heads, spec.head_dim].map(|n| n as u64);
            let window = spec.sliding_window.map(|window| window as u64);
            Layer { qkv, o, gate_up, down, h, k, d, window, softcap: spec.softcap.is_some() }
        };
        let [c, f, v] = [config.hidden_size, config.intermediate_size, config.vocab_size].map(|n| n as u64);
        Work {
            shape: Shape {
                c,
                f,
                v,
                qk_norm: config.qk_norm,
                post_norms: config.post_norms,
                ropes: config.ropes.len() as u64,
            },
            layers: (0..config.num_hidden_layers()).map(layer).collect(),
            tokens: (rows * length) as u64,
            sample: length as u64,
            gradient_accumulation_steps: 1,
            optim,
            element: 2,
            fp8: false,
            embedding: 2 * v * c,
            head: if config.tie_word_embeddings { 0 } else { 2 * v * c },
            nf4_head: false,
            trained: Trained::default(),
            from_scratch: false,
            dropout: false,
            deterministic: None,
            log_probs: false,
            copied: 0,
            alike: config.ropes.iter().all(|rope| rope.regime(1) == rope.regime(length as i64)),
            beside: 0,
            rollout: None,
        }
    }

    /// A step with LoRA of rank `r` on every projection, all of them in NF4 or none.
    pub fn uniform(
        config: &Config,
        (rows, length): (usize, usize),
        r: u32,
        load_in_4bit: bool,
        optim: Option<Optim>,
    ) -> Work {
        let optim = optim.unwrap_or(if load_in_4bit { Optim::Adamw8bit } else { Optim::AdamwTorch });
        let module = Module { r: u64::from(r), nf4: load_in_4bit, trained: false };
        Work::new(config, (rows, length), optim, "model.", |_| module)
    }

    /// The same with the embedding at the host, the head in NF4 (where it is the embedding, as another matrix), or both, if they
    /// were not before.
    ///
    /// # Errors
    /// Loading would refuse it.
    pub fn with_embeddings(mut self, offload_embedding: bool, nf4_head: bool) -> Result<Work> {
        check_embeddings(self.head == 0, offload_embedding, nf4_head)?;
        if nf4_head {
            self.head = memory::in_nf4(self.shape.v * self.shape.c);
            self.nf4_head = true;
        }
        if offload_embedding {
            self.embedding = 0;
        }
        Ok(self)
    }

    /// The same in f32, what is in 4 bits apart.
    #[must_use]
    pub fn in_f32(mut self) -> Work {
        self.embedding = self.embedding / self.element * 4;
        if !self.nf4_head {
            self.head = self.head / self.element * 4;
        }
        self.element = 4;
        self
    }

    /// The same with projections in e4m3.
    ///
    /// # Errors
    /// Loading would refuse it.
    pub fn in_fp8(mut self) -> Result<Work> {
        let refuse = |refused: bool, what: &str| {
            ensure!(!refused, Error::Usage(format!("--base-dtype fp8 and {what}: leave one of them out")));
            Ok(())
        };
        let linears = || self.layers.iter().flat_map(Layer::linears);
        refuse(linears().any(Linear::in_4bit), "--load-in-4bit")?;
        refuse(self.trained.layers, "--full-finetuning")?;
        refuse(self.element == 4, "--dtype f32")?;
        refuse(self.rollout.is_some(), "the rollouts of GRPO")?;
        self.fp8 = true;
        Ok(self)
    }

    /// The same with f32 copies of `modules` in training, as peft's `modules_to_save` makes them.
    ///
    /// # Errors
    /// Loading would refuse it.
    pub fn saving(mut self, modules: &[String]) -> Result<Work> {
        let in_f32 = 4 * self.shape.v * self.shape.c;
        for module in modules {
            match SavedModule::named(module, self.embedding == 0, self.nf4_head)? {
                SavedModule::Embedding => {
                    if self.head == 0 {
                        // A tied head stays what the embedding was.
                        self.head = self.embedding;
                    }
                    (self.embedding, self.trained.embedding) = (in_f32, true);
                }
                SavedModule::Head => (self.head, self.trained.head) = (in_f32, true),
            }
        }
        Ok(self)
    }

    /// The same with every weight in training, without LoRA.
    ///
    /// # Errors
    /// Weights in 4 bits or an embedding at the host, which do not train.
    pub fn training_all(mut self) -> Result<Work> {
        let in_4bit = self.nf4_head || self.layers.iter().flat_map(Layer::linears).any(Linear::in_4bit);
        check_trains_all(in_4bit, self.embedding == 0)?;
        for module in self.layers.iter_mut().flat_map(Layer::modules_mut) {
            *module = Module { r: 0, nf4: false, trained: true };
        }
        let in_f32 = 4 * self.shape.v * self.shape.c;
        self.embedding = in_f32;
        self.head = if self.head > 0 { in_f32 } else { 0 };
        self.trained = Trained { layers: true, embedding: true, head: true };
        self.dropout = false;
        Ok(self)
    }

    /// The same with LoRA of rank `r` in place of training every weight; none if that is not what it does.
    pub fn with_lora_instead(&self, r: u64) -> Option<Work> {
        if !self.trained.layers || self.from_scratch {
            return None;
        }
        let mut work = Work { trained: Trained::default(), ..self.clone() };
        for module in work.layers.iter_mut().flat_map(Layer::modules_mut) {
            *module = Module { r, nf4: false, trained: false };
        }
        let frozen = self.element * self.shape.v * self.shape.c;
        work.embedding = frozen;
        work.head = if self.head > 0 { frozen } else { 0 };
        Some(work)
    }

    /// The same on projections in 4 bits; none if they are, or if they train.
    pub fn in_4bit(&self) -> Option<Work> {
        let mut work = self.clone();
        for module in work.layers.iter_mut().flat_map(Layer::modules_mut) {
            module.nf4 = true;
        }
        work.fp8 = false;
        work.optim = Optim::Adamw8bit;
        (work.layers != self.layers && !self.trained.layers).then_some(work)
    }

    /// The same with samples of another length, as many of them.
    pub fn with_length(&self, length: u64) -> Work {
        let rows = self.tokens / self.sample.max(1);
        Work { tokens: rows * length, sample: length, ..self.clone() }
    }

    /// The most keys that a query of the longest sample sees.
    fn keys(&self, layer: &Layer) -> u64 {
        layer.window.map_or(self.sample, |window| self.sample.min(window))
    }
}
