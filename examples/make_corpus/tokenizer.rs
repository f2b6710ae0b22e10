//! A byte-level BPE tokenizer with single digits, and the files that make a folder a checkpoint without weights.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use ferrotune::io::write_atomically;
use serde_json::{Value, json};
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, TokenizerBuilder};

const VOCAB_SIZE: usize = 512;
const TAGS: [&str; 4] = ["<think>", "</think>", "<answer>", "</answer>"];

/// ChatML; `{% generation %}` marks what the model says, its end-of-turn token included.
const CHAT_TEMPLATE: &str = "\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
{{- '\\n' }}
{%- else %}
{{- message['content'] + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}";

pub fn train(texts: impl Iterator<Item = String>, folder: &Path) -> Result<()> {
    let texts: Vec<String> = texts.collect();
    let mut trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(VOCAB_SIZE - TAGS.len())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(
            ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
                .map(|token| AddedToken::from(token, true))
                .to_vec(),
        )
        .build();
    // Digits before ByteLevel, as SmolLM has it: a number is one token a digit, so that columns can be learned.
    let bytes = ByteLevel::default().add_prefix_space(false);
    let mut tokenizer = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None::<NormalizerWrapper>)
        .with_pre_tokenizer(Some(Sequence::new(vec![Digits::new(true).into(), bytes.into()])))
        .with_post_processor(Some(bytes.trim_offsets(false)))
        .with_decoder(Some(bytes))
        .build()
        .map_err(|error| anyhow!(error))?;
    tokenizer
        .train(&mut trainer, texts.into_iter())
        .map_err(|error| anyhow!(error))
        .context("training the tokenizer")?;
    // Tokens, but not special ones: they stay visible when special tokens are skipped.
    tokenizer.add_tokens(TAGS.map(|tag| AddedToken::from(tag, false))).map_err(|error| anyhow!(error))?;
    let json = tokenizer.to_string(true).map_err(|error| anyhow!(error)).context("tokenizer.json")?;
    write_atomically(&folder.join("tokenizer.json"), json.as_bytes())?;
    let write =
        |name: &str, value: Value| write_atomically(&folder.join(name), format!("{value:#}\n").as_bytes());
    write("tokenizer_config.json", tokenizer_config())?;
    write("config.json", model_config())?;
    write("generation_config.json", json!({"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}))
}

fn tokenizer_config() -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": null,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": false,
        "clean_up_tokenization_spaces": false,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    })
}

/// A Llama of 2.5 million parameters: every width a multiple of 256, as the K-quants of GGUF want it.
fn model_config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "attention_bias": false,
        "mlp_bias": false,
        "tie_word_embeddings": true,
        "initializer_range": 0.04,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    })
}
