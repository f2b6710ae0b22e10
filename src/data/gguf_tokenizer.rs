//! Tokenizers of GGUF files, both ways: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`).
//!
//! A GGUF file names the splitting of texts into words (`tokenizer.ggml.pre`) where tokenizer.json spells it out; the table here
//! says which name means what. SentencePiece merges the pair whose token has the highest score first, so the scores written here
//! are the ranks of the merges, and the merges read are all splits of a token in the order of scores.

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value as Json, json};

use super::tokenizer::set_post_processor;
use super::{ChatTemplate, SpecialToken, Tokenizer, end_of_turn};
use crate::error::Error;
use crate::io::gguf::{Gguf, Value};

const SPACE: &str = "\u{2581}";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const O200K: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How a text is split before BPE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Words {
    Regex(&'static str),
    /// GPT-2's expression, which is the byte-level one's own.
    Gpt2,
    /// Single digits first, then GPT-2's.
    DigitsThenGpt2,
}

/// llama.cpp's name, the splitting, and whether a word that is a token is taken whole (`ignore_merges`).
const PRE: [(&str, Words, bool); 7] = [
    ("llama-bpe", Words::Regex(LLAMA3), true),
    ("dbrx", Words::Regex(LLAMA3), false),
    ("qwen2", Words::Regex(QWEN2), false),
    ("tekken", Words::Regex(TEKKEN), true),
    ("gpt-4o", Words::Regex(O200K), false),
    ("gpt-2", Words::Gpt2, false),
    ("smollm", Words::DigitsThenGpt2, false),
];
/// More names of the same.
const ALIASES: [(&str, &str); 3] =
    [("llama3", "llama-bpe"), ("llama-v3", "llama-bpe"), ("deepseek-r1-qwen", "qwen2")];

/// `tokenizer.ggml.token_type`.
mod token_type {
    pub const NORMAL: i32 = 1;
    pub const UNKNOWN: i32 = 2;
    pub const CONTROL: i32 = 3;
    pub const USER_DEFINED: i32 = 4;
    pub const UNUSED: i32 = 5;
    pub const BYTE: i32 = 6;
}

impl Tokenizer {
    /// The metadata of this tokenizer for a model whose embedding has `vocab_size` rows.
    ///
    /// # Errors
    /// Another kind than byte-level or SentencePiece BPE; a splitting that llama.cpp has no name for.
    pub fn gguf_metadata(&self, vocab_size: usize) -> Result<Vec<(String, Value)>> {
        let json: Json =
            serde_json::from_str(&self.inner().to_string(false).map_err(|error| anyhow!("{error}"))?)?;
        let model = &json["model"];
        let unsupported = |what: String| -> anyhow::Error {
            let what = format!("{}: {what} in a GGUF file", self.dir().display());
            let known = PRE.map(|(name, ..)| name).join(", ");
            Error::Unsupported { what, supported: format!("SentencePiece BPE and {known}") }.into()
        };
        if model["type"] != "BPE" {
            return Err(unsupported(format!("a tokenizer of type {}", model["type"])));
        }
        let sentencepiece = model["byte_fallback"] == true;
        let (tokens, types) = self.gguf_tokens(&json, vocab_size, sentencepiece)?;
        let mut pairs: Vec<(String, Value)> = Vec::new();
        let mut add = |key: &str, value: Value| pairs.push((format!("tokenizer.ggml.{key}"), value));
        let merges = merges(model)?;
        if sentencepiece {
            add("model", Value::String("llama".to_string()));
            add("pre", Value::String("default".to_string()));
            add("scores", Value::f32s(scores(&tokens, &types, &merges)));
            add("add_space_prefix", Value::Bool(prepends_space(&json)));
        } else {
            let ignore_merges = model["ignore_merges"] == true;
            let words = words_of(&json["pre_tokenizer"]);
            let row = PRE.iter().find(|row| Some(row.1) == words && row.2 == ignore_merges);
            let (name, ..) =
                row.ok_or_else(|| unsupported(format!("the pre_tokenizer {}", json["pre_tokenizer"])))?;
            add("model", Value::String("gpt2".to_string()));
            add("pre", Value::String(name.to_string()));
            add("merges", Value::strings(merges.iter().map(|(left, right)| format!("{left} {right}"))));
        }
        add("tokens", Value::strings(tokens));
        add("token_type", Value::i32s(types));
        for (key, id) in self.gguf_special_ids() {
            add(key, Value::U32(id));
        }
        let (bare, whole) = (self.encode("a", false)?, self.encode("a", true)?);
        add(
            "add_bos_token",
            Value::Bool(
                self.bos_token_id()
                    .is_some_and(|bos| whole.first() == Some(&bos) && bare.first() != Some(&bos)),
            ),
        );
        add(
            "add_eos_token",
            Value::Bool(
                self.eos_token_id()
                    .is_some_and(|eos| whole.last() == Some(&eos) && bare.last() != Some(&eos)),
            ),
        );
        if let Some(template) = self.chat_template() {
            pairs.push(("tokenizer.chat_template".to_string(), Value::String(template.source().to_string())));
        }
        Ok(pairs)
    }

    fn gguf_special_ids(&self) -> Vec<(&'static str, u32)> {
        let id = |token: Option<&SpecialToken>| token.map(|token| token.id);
        let turn = self.chat_template().and_then(|template| end_of_turn(self, template));
        let eot = turn.map(|token| token.id).filter(|id| Some(*id) != self.eos_token_id());
        let ids = [
            ("bos_token_id", self.bos_token_id()),
            ("eos_token_id", self.eos_token_id()),
            ("eot_token_id", eot),
            ("unknown_token_id", id(self.unk_token())),
            ("padding_token_id", id(self.pad_token())),
        ];
        ids.into_iter().filter_map(|(key, id)| Some((key, id?))).collect()
    }

    /// Text and type of every row of the embedding.
    fn gguf_tokens(
        &self,
        json: &Json,
        vocab_size: usize,
        sentencepiece: bool,
    ) -> Result<(Vec<String>, Vec<i32>)> {
        let mut tokens: Vec<String> = (0..vocab_size).map(|id| format!("[PAD{id}]")).collect();
        let mut types = vec![token_type::UNUSED; vocab_size];
        let mut set = |id: u32, text: String, kind: i32| -> Result<()> {
            let place = tokens.get_mut(id as usize).with_context(|| {
                format!("{}: token {text:?} has id {id}, the model {vocab_size} rows", self.dir().display())
            })?;
            *place = text;
            types[id as usize] = kind;
            Ok(())
        };
        let unknown = json["model"]["unk_token"].as_str();
        for (text, id) in self.inner().get_vocab(false) {
            let kind = match sentencepiece {
                true if unknown == Some(&text) => token_type::UNKNOWN,
                true if byte_of(&text).is_some() => token_type::BYTE,
                _ => token_type::NORMAL,
            };
            set(id, text, kind)?;
        }
        let added: BTreeMap<u32, _> = self.inner().get_added_tokens_decoder().into_iter().collect();
        for (id, token) in added {
            let kind = match (unknown == Some(&token.content), token.special) {
                (true, _) if sentencepiece => token_type::UNKNOWN,
                (_, true) => token_type::CONTROL,
                (_, false) => token_type::USER_DEFINED,
            };
            set(id, token.content, kind)?;
        }
        Ok((tokens, types))
    }

    /// The tokenizer that a GGUF file holds, None where it holds none.
    ///
    /// # Errors
    /// A kind of tokenizer or of splitting that ferrotune does not know; a key that is missing. Both name the file.
    pub fn from_gguf(gguf: &Gguf) -> Result<Option<Tokenizer>> {
        let text = |key: &str| gguf.metadata.get(&format!("tokenizer.ggml.{key}")).and_then(Value::as_str);
        let Some(kind) = text("model").filter(|kind| *kind != "none") else { return Ok(None) };
        let file = gguf.path().display().to_string();
        let vocabulary = Vocabulary::read(gguf)?;
        let json = match kind {
            "gpt2" => {
                let pre = text("pre").unwrap_or("default");
                let name = ALIASES.iter().find(|(alias, _)| *alias == pre).map_or(pre, |(_, name)| name);
                let row = PRE.iter().find(|row| row.0 == name).ok_or_else(|| Error::Unsupported {
                    what: format!("{file}: tokenizer.ggml.pre {pre:?}"),
                    supported: PRE.map(|(name, ..)| name).join(", "),
                })?;
                vocabulary.byte_level(gguf, row.1, row.2)?
            }
            "llama" => vocabulary.sentencepiece(gguf)?,
            other => {
                let what = format!("{file}: tokenizer.ggml.model {other:?}");
                return Err(Error::Unsupported { what, supported: "gpt2, llama".to_string() }.into());
            }
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(json.to_string().as_bytes())
            .map_err(|error| anyhow!("{file}: its tokenizer cannot be built: {error}"))?;
        let special = |key: &str| -> Option<SpecialToken> {
            let id = gguf.metadata.get(&format!("tokenizer.ggml.{key}_token_id"))?.as_i64()?;
            let content = vocabulary.tokens.get(usize::try_from(id).ok()?)?.clone();
            Some(SpecialToken { content, id: id as u32 })
        };
        let flag = |key: &str| gguf.metadata.get(&format!("tokenizer.ggml.{key}")).and_then(Value::as_bool);
        let (bos, eos) = (special("bos"), special("eos"));
        // llama.cpp's defaults where the file is silent.
        let adds = json!({
            "add_bos_token": flag("add_bos_token").unwrap_or(kind == "llama"),
            "add_eos_token": flag("add_eos_token").unwrap_or(false),
        });
        set_post_processor(&mut inner, &adds, bos.as_ref(), eos.as_ref())?;
        let dir = gguf.path().to_path_buf();
        let mut tokenizer =
            Tokenizer::from_parts(inner, dir, [bos, eos, special("padding"), special("unknown")]);
        if let Some(source) = gguf.metadata.get("tokenizer.chat_template").and_then(Value::as_str) {
            tokenizer
                .set_chat_template(ChatTemplate::new(source, &format!("{file} (tokenizer.chat_template)"))?);
        }
        Ok(Some(tokenizer))
    }
}

/// The lists of a file.
struct Vocabulary {
    tokens: Vec<String>,
    types: Vec<i32>,
}

impl Vocabulary {
    fn read(gguf: &Gguf) -> Result<Vocabulary> {
        let list = |key: &str| -> Result<&[Value]> {
            let key = format!("tokenizer.ggml.{key}");
            gguf.value(&key)?
                .as_array()
                .with_context(|| format!("{}: {key} is no list", gguf.path().display()))
        };
        let tokens: Vec<String> =
            list("tokens")?.iter().map(|token| token.as_str().unwrap_or_default().to_string()).collect();
        let types: Vec<i32> = match list("token_type") {
            Ok(types) => types.iter().map(|kind| kind.as_i64().unwrap_or(1) as i32).collect(),
            Err(_) => vec![token_type::NORMAL; tokens.len()],
        };
        if types.len() != tokens.len() {
            bail!("{}: {} tokens and {} token types", gguf.path().display(), tokens.len(), types.len());
        }
        Ok(Vocabulary { tokens, types })
    }

    fn added(&self) -> Vec<Json> {
        let rows = self.tokens.iter().zip(&self.types).enumerate();
        rows.filter(|(_, (_, kind))| {
            matches!(**kind, token_type::CONTROL | token_type::USER_DEFINED | token_type::UNKNOWN)
        })
        .map(|(id, (text, kind))| {
            json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": *kind != token_type::USER_DEFINED})
        })
        .collect()
    }

    fn vocab(&self) -> Json {
        let used = self.tokens.iter().zip(&self.types).enumerate();
        let used = used.filter(|(_, (_, kind))| **kind != token_type::UNUSED);
        Json::Object(used.map(|(id, (text, _))| (text.clone(), id.into())).collect())
    }

    fn byte_level(&self, gguf: &Gguf, words: Words, ignore_merges: bool) -> Result<Json> {
        let merges = gguf.value("tokenizer.ggml.merges")?.as_array().unwrap_or_default();
        let merges: Vec<Json> = merges
            .iter()
            .filter_map(|merge| merge.as_str()?.split_once(' '))
            .map(|(left, right)| json!([left, right]))
            .collect();
        let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        let pre_tokenizer = match words {
            Words::Regex(regex) => json!({"type": "Sequence", "pretokenizers": [split(regex), bytes(false)]}),
            Words::Gpt2 => bytes(true),
            Words::DigitsThenGpt2 => {
                let digits = json!({"type": "Digits", "individual_digits": true});
                json!({"type": "Sequence", "pretokenizers": [digits, bytes(true)]})
            }
        };
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": self.added(), "normalizer": null,
            "pre_tokenizer": pre_tokenizer, "post_processor": null, "decoder": bytes(true),
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                      "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                      "ignore_merges": ignore_merges, "vocab": self.vocab(), "merges": merges},
        }))
    }

    fn sentencepiece(&self, gguf: &Gguf) -> Result<Json> {
        let scores = gguf.value("tokenizer.ggml.scores")?.as_array().unwrap_or_default();
        let scores: Vec<f64> = scores.iter().map(|score| score.as_f64().unwrap_or(0.0)).collect();
        if scores.len() != self.tokens.len() {
            bail!("{}: {} tokens and {} scores", gguf.path().display(), self.tokens.len(), scores.len());
        }
        let prefix =
            gguf.metadata.get("tokenizer.ggml.add_space_prefix").and_then(Value::as_bool).unwrap_or(true);
        let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
        let prepend = json!({"type": "Prepend", "prepend": SPACE});
        let normalizers = if prefix { vec![prepend, replace] } else { vec![replace] };
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if prefix {
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let unknown = self.types.iter().position(|kind| *kind == token_type::UNKNOWN);
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": self.added(),
            "normalizer": {"type": "Sequence", "normalizers": normalizers}, "pre_tokenizer": null,
            "post_processor": null, "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {"type": "BPE", "dropout": null, "unk_token": unknown.map(|id| &self.tokens[id]),
                      "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
                      "byte_fallback": true, "ignore_merges": false, "vocab": self.vocab(),
                      "merges": self.merges_by_score(&scores)},
        }))
    }

    /// Every split of a token into two tokens, those of the highest score first.
    fn merges_by_score(&self, scores: &[f64]) -> Vec<[&str; 2]> {
        let normal = self.types.iter().map(|kind| *kind == token_type::NORMAL);
        let ids: HashMap<&str, usize> = (self.tokens.iter().enumerate().zip(normal))
            .filter(|(_, normal)| *normal)
            .map(|((id, token), _)| (token.as_str(), id))
            .collect();
        let mut merges = Vec::new();
        for (&token, &id) in &ids {
            for (at, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(at);
                if let (Some(&a), Some(&b)) = (ids.get(left), ids.get(right)) {
                    merges.push((scores[id], id, a, b));
                }
            }
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
        merges.into_iter().map(|(_, _, a, b)| [self.tokens[a].as_str(), self.tokens[b].as_str()]).collect()
    }
}

/// `<0x0A>`.
fn byte_of(token: &str) -> Option<u8> {
    u8::from_str_radix(token.strip_prefix("<0x")?.strip_suffix('>')?, 16).ok()
}

/// Merges as pairs, written either as `"a b"` or as `["a", "b"]`.
fn merges(model: &Json) -> Result<Vec<(String, String)>> {
    let list = model["merges"].as_array().context("the tokenizer has no merges")?;
    list.iter()
        .map(|merge| match merge {
            Json::String(text) => text.split_once(' ').map(|(a, b)| (a.to_string(), b.to_string())),
            Json::Array(pair) => {
                Some((pair.first()?.as_str()?.to_string(), pair.get(1)?.as_str()?.to_string()))
            }
            _ => None,
        })
        .map(|pair| pair.context("a merge that is no pair"))
        .collect()
}

/// The rank of the first merge that makes a token, negative; what no merge makes comes last.
fn scores(tokens: &[String], types: &[i32], merges: &[(String, String)]) -> Vec<f32> {
    let mut ranks: HashMap<String, usize> = HashMap::new();
    let mut made = HashSet::new();
    for (left, right) in merges {
        let token = format!("{left}{right}");
        if made.insert(token.clone()) {
            ranks.insert(token, made.len());
        }
    }
    let last = merges.len() + 1;
    let score = |(token, kind): (&String, &i32)| match *kind {
        token_type::NORMAL => -(ranks.get(token).copied().unwrap_or(last) as f32),
        _ => 0.0,
    };
    tokens.iter().zip(types).map(score).collect()
}

/// Whether a text gets a space in front.
fn prepends_space(json: &Json) -> bool {
    let parts = |part: &Json, list: &str| match part[list].as_array() {
        Some(parts) => parts.clone(),
        None => vec![part.clone()],
    };
    parts(&json["normalizer"], "normalizers").iter().any(|part| part["type"] == "Prepend")
        || parts(&json["pre_tokenizer"], "pretokenizers")
            .iter()
            .any(|part| part["type"] == "Metaspace" && part["prepend_scheme"] != "never")
}

fn words_of(pre_tokenizer: &Json) -> Option<Words> {
    let parts = match pre_tokenizer["pretokenizers"].as_array() {
        Some(parts) => parts.iter().collect(),
        None => vec![pre_tokenizer],
    };
    let is_bytes = |part: &Json, use_regex: bool| {
        part["type"] == "ByteLevel" && part["add_prefix_space"] == false && part["use_regex"] == use_regex
    };
    match parts[..] {
        [bytes] if is_bytes(bytes, true) => Some(Words::Gpt2),
        [digits, bytes]
            if digits["type"] == "Digits" && digits["individual_digits"] == true && is_bytes(bytes, true) =>
        {
            Some(Words::DigitsThenGpt2)
        }
        [split, bytes]
            if split["type"] == "Split" && split["behavior"] == "Isolated" && is_bytes(bytes, false) =>
        {
            let regex = split["pattern"]["Regex"].as_str()?;
            PRE.iter().map(|row| row.1).find(|words| matches!(words, Words::Regex(known) if *known == regex))
        }
        _ => None,
    }
}
