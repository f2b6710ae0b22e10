//! A model that is read piece by piece to score a few prompts: the memory is that of its largest matrix, or of some layers, not
//! of all.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::Config;
use super::adapter::{fill, no_module, open_adapter};
use super::decoder::{Decoder, Extent, Input, projections};
use super::fast_language_model::{load_tokenizer, take_template};
use super::gguf::{gguf_config, gguf_decoder};
use crate::data::Tokenizer;
use crate::io::Weights;
use crate::io::adapter::AdapterConfig;
use crate::io::gguf::Gguf;
use crate::nn::LoadOptions;
use crate::ops::{self, BlockInput, Keys, Pass};

/// A model on disk, with an adapter or without. Each call of [`StreamedModel::logits`] reads it once from end to end.
pub struct StreamedModel {
    config: Config,
    tokenizer: Option<Tokenizer>,
    file: File,
    adapter: Option<(AdapterConfig, Weights)>,
    options: LoadOptions,
    /// Bytes of layers that are read at once, unless one is larger: 2 GiB where nobody sets it.
    pub layer_bytes: i64,
}

const LAYER_BYTES: i64 = 2 << 30;

enum File {
    Checkpoint(Weights),
    Gguf(Gguf),
}

impl StreamedModel {
    /// A Hugging Face model folder and a LoRA adapter folder, as [`FastLanguageModel::from_pretrained_with`](super::FastLanguageModel::from_pretrained_with) and
    /// [`load_adapter`](super::FastLanguageModel::load_adapter) take them.
    pub fn from_pretrained(
        dir: &Path,
        adapter: Option<&Path>,
        options: LoadOptions,
    ) -> Result<StreamedModel> {
        let config = Config::from_dir(dir)?;
        let mut tokenizer = load_tokenizer(&config, dir)?;
        let file = File::Checkpoint(Weights::open(dir)?);
        let adapter = match adapter {
            Some(folder) => {
                take_template(tokenizer.as_mut(), folder)?;
                let config = AdapterConfig::load(folder)?;
                config.check()?;
                Some((config, open_adapter(folder)?))
            }
            None => None,
        };
        Ok(StreamedModel { config, tokenizer, file, adapter, options, layer_bytes: LAYER_BYTES })
    }

    /// A GGUF file, as [`FastLanguageModel::from_gguf`](super::FastLanguageModel::from_gguf) takes it.
    pub fn from_gguf(path: &Path, options: LoadOptions) -> Result<StreamedModel> {
        let gguf = Gguf::open(path)?;
        let (config, tokenizer) = (gguf_config(&gguf)?, Tokenizer::from_gguf(&gguf)?);
        let file = File::Gguf(gguf);
        Ok(StreamedModel { config, tokenizer, file, adapter: None, options, layer_bytes: LAYER_BYTES })
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// Logits `[T, V]` of each of the `prompts` alone, f32 on the CPU.
    pub fn logits(&self, prompts: &[Vec<i64>]) -> Result<Vec<Tensor>> {
        let _no_grad = tch::no_grad_guard();
        let input_ids = prompts.concat();
        let position_ids: Vec<i64> = prompts.iter().flat_map(|ids| 0..ids.len() as i64).collect();
        let ends = prompts.iter().scan(0, |end, ids| {
            *end += ids.len() as i32;
            Some(*end)
        });
        let cu_seqlens: Vec<i32> = std::iter::once(0).chain(ends).collect();
        let input = Input {
            input_ids: &input_ids,
            position_ids: &position_ids,
            cu_seqlens: &cu_seqlens,
            prefixes: &[],
        };
        // Tensors of the adapter that no piece had a place for.
        let mut unread: BTreeSet<String> =
            self.adapter.iter().flat_map(|(_, weights)| weights.names()).map(str::to_string).collect();
        let embedding = self.piece(&Extent::Embedding, &mut unread)?;
        let input = embedding.upload_input(input)?;
        let mut x = embedding.embed(&input.input_ids, input.embedded.as_ref(), embedding.kind)?;
        drop(embedding);
        for layers in self.runs() {
            let piece = self.piece(&Extent::Layers(layers), &mut unread)?;
            for index in 0..piece.layers.len() {
                let keys = Keys::Segments(&input.segments);
                x = piece.layer_output(index, BlockInput::Kept(&x), &input.angles, keys, Pass::INFERENCE)?;
            }
        }
        let head = self.piece(&Extent::Head, &mut unread)?;
        if let (Some((_, weights)), Some(name)) = (&self.adapter, unread.first()) {
            return Err(no_module(weights, name));
        }
        let hidden = ops::rms_norm(&x, &head.norm)?;
        let logits = |segment: &[i32]| -> Result<Tensor> {
            let rows = hidden.f_narrow(0, segment[0].into(), (segment[1] - segment[0]).into())?;
            Ok(head.logits(&rows)?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?)
        };
        cu_seqlens.windows(2).map(logits).collect()
    }

    /// Layers that are read together.
    fn runs(&self) -> impl Iterator<Item = Range<usize>> {
        let elements = |index| -> i64 {
            let matrices = projections(&self.config, index, "").into_iter();
            let sizes =
                matrices.flat_map(|(parts, width)| parts.into_iter().map(move |(_, rows)| rows * width));
            sizes.sum()
        };
        let layers = self.config.layers.len();
        let bytes =
            (0..layers).map(elements).max().unwrap_or(0) * self.options.kind.elt_size_in_bytes() as i64;
        let at_once = (self.layer_bytes / bytes.max(1)).max(1) as usize;
        (0..layers).step_by(at_once).map(move |first| first..(first + at_once).min(layers))
    }

    /// A part of the model with what of the adapter belongs to it.
    fn piece(&self, extent: &Extent, unread: &mut BTreeSet<String>) -> Result<Decoder> {
        let config = self.config.clone();
        let mut piece = match &self.file {
            File::Checkpoint(weights) => {
                Decoder::load_extent(config, weights, self.options, &BTreeSet::new(), extent)?
            }
            File::Gguf(gguf) => gguf_decoder(gguf, &config, self.options, extent)?,
        };
        if let Some((config, weights)) = &self.adapter {
            let chosen = piece.lora_modules(config)?;
            piece.add_lora(|module| chosen.get(module).copied(), config.init_lora_weights, 0)?;
            for module in config.modules_to_save.iter().flatten() {
                let is_here = match extent {
                    Extent::Embedding => module.ends_with("embed_tokens"),
                    Extent::Head => !module.ends_with("embed_tokens"),
                    Extent::Whole | Extent::Layers(_) => false,
                };
                if is_here {
                    piece.train_module(module)?;
                }
            }
            let others = fill(weights, piece.adapter_state())?;
            unread.retain(|name| others.contains(name));
        }
        Ok(piece)
    }
}
