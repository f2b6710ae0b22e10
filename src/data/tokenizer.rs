use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use chrono::NaiveDateTime;
use serde_json::Value;
use tokenizers::AddedToken;
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::processors::template::TemplateProcessing;

use super::ChatTemplate;
use super::byte_bpe::ByteBpe;
use super::panics::without_panic;
use crate::io::write_atomically;

/// The files of a checkpoint that belong to the tokenizer.
const FILES: [&str; 3] = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"];

/// Chat templates beside `tokenizer_config.json`, the default first.
pub(super) const TEMPLATE_FILES: [&str; 2] =
    ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"];

/// The bytes of a text that a token stands for: start and end.
pub type Offsets = (usize, usize);

/// A special token's text and id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecialToken {
    /// The text that the tokenizer maps to `id`.
    pub content: String,
    /// The token id.
    pub id: u32,
}

/// A checkpoint's tokenizer: `tokenizer.json`, the special tokens of `tokenizer_config.json`, and the chat template.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    dir: PathBuf,
    bos: Option<SpecialToken>,
    eos: Option<SpecialToken>,
    pad: Option<SpecialToken>,
    unk: Option<SpecialToken>,
    chat_template: Option<ChatTemplate>,
    template_replaced: bool,
    fast: Option<Arc<ByteBpe>>,
}

impl Tokenizer {
    /// Reads the tokenizer files of the checkpoint folder `dir`. Only `tokenizer.json` must exist.
    ///
    /// A chat template is taken from `chat_template.jinja` (and `additional_chat_templates/`) or else from
    /// `tokenizer_config.json`, as transformers does.
    ///
    /// # Errors
    /// Names the file that is missing or malformed.
    pub fn from_dir(dir: &Path) -> Result<Tokenizer> {
        let path = dir.join("tokenizer.json");
        if !path.is_file() {
            bail!("{}", missing_tokenizer(dir));
        }
        let bytes = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        let read = || -> tokenizers::Result<tokenizers::Tokenizer> {
            let inner = tokenizers::Tokenizer::from_bytes(bytes)?;
            // A template of special tokens that are not there is accepted, and panics when it is used.
            let _ = inner.encode("a", true);
            Ok(inner)
        };
        let mut inner = without_panic(read)
            .unwrap_or_else(|| Err("the tokenizers library gave up".into()))
            .map_err(|e| anyhow!("{e}"))
            .with_context(|| format!("{} is not a tokenizer that this program can read", path.display()))?;
        // tokenizer.json may carry the truncation and padding of its last use; transformers ignores both, too.
        inner.with_truncation(None).map_err(|e| anyhow!("{}: {e}", path.display()))?;
        inner.with_padding(None);

        let config = read_json(&dir.join("tokenizer_config.json"))?;
        let map = read_json(&dir.join("special_tokens_map.json"))?;
        add_missing_tokens(&mut inner, &config, dir)?;
        let special = |key: &str| -> Result<Option<SpecialToken>> {
            let Some(content) = token_text(&config, key).or_else(|| token_text(&map, key)) else {
                return Ok(None);
            };
            match inner.token_to_id(&content) {
                Some(id) => Ok(Some(SpecialToken { content, id })),
                // Nothing here needs these two, and published configurations name some that do not exist.
                None if matches!(key, "pad_token" | "unk_token") => Ok(None),
                None => bail!(
                    "{}: {key} is {content:?}, which {} does not contain",
                    dir.join("tokenizer_config.json").display(),
                    path.display()
                ),
            }
        };
        let (bos, eos, pad, unk) =
            (special("bos_token")?, special("eos_token")?, special("pad_token")?, special("unk_token")?);
        set_post_processor(&mut inner, &config, bos.as_ref(), eos.as_ref())
            .with_context(|| format!("{}: add_bos_token", dir.join("tokenizer_config.json").display()))?;
        let mut tokenizer = Tokenizer {
            bos,
            eos,
            pad,
            unk,
            dir: dir.to_owned(),
            chat_template: None,
            template_replaced: false,
            fast: ByteBpe::new(&inner).map(Arc::new),
            inner,
        };
        if let Some(template) = ChatTemplate::from_checkpoint(dir, &config)? {
            tokenizer.set_chat_template(template);
            tokenizer.template_replaced = false;
        }
        Ok(tokenizer)
    }

    /// A tokenizer that was built rather than read; `special` are BOS, EOS, padding and unknown. `origin` names it in errors.
    pub(super) fn from_parts(
        inner: tokenizers::Tokenizer,
        origin: PathBuf,
        special: [Option<SpecialToken>; 4],
    ) -> Tokenizer {
        let [bos, eos, pad, unk] = special;
        Tokenizer {
            fast: ByteBpe::new(&inner).map(Arc::new),
            inner,
            dir: origin,
            bos,
            eos,
            pad,
            unk,
            chat_template: None,
            template_replaced: false,
        }
    }

    /// Replaces the chat template; it sees this tokenizer's special tokens as `bos_token`, `eos_token`, ...
    pub fn set_chat_template(&mut self, mut template: ChatTemplate) {
        for (name, token) in [
            ("bos_token", &self.bos),
            ("eos_token", &self.eos),
            ("pad_token", &self.pad),
            ("unk_token", &self.unk),
        ] {
            if let Some(token) = token {
                template.set_variable(name, token.content.clone());
            }
        }
        self.chat_template = Some(template);
        self.template_replaced = true;
    }

    /// The ids of `text`; `add_special_tokens` applies the post-processor of `tokenizer.json`, or what
    /// `add_bos_token` and `add_eos_token` say instead.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        Ok(self.encode_with_offsets(text, add_special_tokens)?.0)
    }

    /// As [`encode`](Self::encode), with the byte range of `text` that each token covers: its start and end.
    pub fn encode_with_offsets(
        &self,
        text: &str,
        add_special_tokens: bool,
    ) -> Result<(Vec<u32>, Vec<Offsets>)> {
        let fast = self.fast.as_ref().and_then(|fast| fast.encode(&self.inner, text, add_special_tokens));
        if let Some(found) = fast {
            return Ok(found);
        }
        let encoding = self.inner.encode(text, add_special_tokens).map_err(|e| {
            anyhow!("{}: cannot encode a text of {} bytes: {e}", self.dir.display(), text.len())
        })?;
        Ok((encoding.get_ids().to_vec(), encoding.get_offsets().to_vec()))
    }

    /// The text of `ids`; `skip_special_tokens` leaves special tokens out.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.inner
            .decode(ids, skip_special_tokens)
            .map_err(|e| anyhow!("{}: cannot decode {} ids: {e}", self.dir.display(), ids.len()))
    }

    /// The number of tokens, added ones included. Ids may have gaps: see [`max_id`](Self::max_id).
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The largest id that the tokenizer can give; a model's embedding must have more rows than this.
    pub fn max_id(&self) -> u32 {
        self.inner.get_vocab(true).into_values().max().unwrap_or(0)
    }

    /// The id of one token by its text.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether `id` is a token that decoding with `skip_special_tokens` leaves out.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner
            .id_to_token(id)
            .is_some_and(|token| self.inner.get_added_vocabulary().is_special_token(&token))
    }

    /// No text of `bytes` bytes has more tokens, special ones that are added to it excepted; `None` where the normaliser
    /// may make a text longer by any factor. A token stands for a byte or more of the normalised text.
    pub fn most_tokens(&self, bytes: usize) -> Option<usize> {
        fn growth(normalizer: &NormalizerWrapper) -> Option<usize> {
            match normalizer {
                // https://unicode.org/faq/normalization.html: NFC makes UTF-8 at most three times as long.
                NormalizerWrapper::NFC(_) => Some(3),
                // One mark before the text, and a mark of three bytes for each space.
                NormalizerWrapper::Prepend(_) => Some(1),
                NormalizerWrapper::Replace(_) => Some(3),
                NormalizerWrapper::Sequence(all) => all.as_ref().iter().map(growth).product(),
                _ => None,
            }
        }
        const MARK: usize = 3;
        let factor = self.inner.get_normalizer().map_or(Some(1), growth)?;
        Some((bytes + MARK) * factor)
    }

    /// The texts of all special tokens.
    pub fn special_tokens(&self) -> Vec<String> {
        let added = self.inner.get_added_tokens_decoder().into_values();
        added.filter(|token| token.special).map(|token| token.content).collect()
    }

    /// `bos_token` of `tokenizer_config.json`.
    pub fn bos_token(&self) -> Option<&SpecialToken> {
        self.bos.as_ref()
    }

    /// `eos_token` of `tokenizer_config.json`. A model's stop ids (`generation_config.json`) may hold more.
    pub fn eos_token(&self) -> Option<&SpecialToken> {
        self.eos.as_ref()
    }

    /// `pad_token` of `tokenizer_config.json`. Batches here have no padding; exports name it.
    pub fn pad_token(&self) -> Option<&SpecialToken> {
        self.pad.as_ref()
    }

    /// `unk_token` of `tokenizer_config.json`.
    pub fn unk_token(&self) -> Option<&SpecialToken> {
        self.unk.as_ref()
    }

    /// The id of `bos_token`.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.bos.as_ref().map(|token| token.id)
    }

    /// The id of `eos_token`.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.eos.as_ref().map(|token| token.id)
    }

    /// The chat template, if the checkpoint has one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// The moment that templates show as today, where there is a template: see [`ChatTemplate::now`].
    pub fn template_now(&self) -> Option<NaiveDateTime> {
        self.chat_template.as_ref().map(ChatTemplate::now)
    }

    /// Lets the chat template render what it did at `now`.
    pub fn set_template_now(&mut self, now: NaiveDateTime) {
        if let Some(template) = &mut self.chat_template {
            template.set_now(now);
        }
    }

    /// The folder it was read from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The tokenizers library's object, for streaming decoders and export.
    pub fn inner(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }

    /// Writes the tokenizer files, unchanged, and the chat template in use into `dir`, beside a tuned model or adapter.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let replaced = self.chat_template.as_ref().filter(|_| self.template_replaced);
        let templates = if replaced.is_some() { &[][..] } else { &TEMPLATE_FILES[..] };
        for name in FILES.iter().chain(templates) {
            let (from, to) = (self.dir.join(name), dir.join(name));
            if from.is_file() {
                let bytes = fs::read(&from).with_context(|| format!("reading {}", from.display()))?;
                if let Some(folder) = to.parent() {
                    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
                }
                write_atomically(&to, &bytes)?;
            }
        }
        if let Some(template) = replaced {
            write_atomically(&dir.join(TEMPLATE_FILES[0]), template.source().as_bytes())?;
        }
        Ok(())
    }
}

fn missing_tokenizer(dir: &Path) -> String {
    if !dir.is_dir() {
        return format!("{} is not a folder: expected a checkpoint with tokenizer.json", dir.display());
    }
    let slow = ["tokenizer.model", "vocab.json", "spiece.model", "tekken.json"]
        .into_iter()
        .find(|name| dir.join(name).is_file());
    match slow {
        Some(slow) => format!(
            "{0} has {slow} but no tokenizer.json. Convert it once with transformers: python3 -c \"from transformers \
             import AutoTokenizer; AutoTokenizer.from_pretrained('{0}').save_pretrained('{0}')\"",
            dir.display()
        ),
        None => format!("{} has no tokenizer.json: is it a whole checkpoint folder?", dir.display()),
    }
}

/// The JSON object in `path`, or an empty one if there is no such file.
fn read_json(path: &Path) -> Result<Value> {
    if !path.is_file() {
        return Ok(Value::Object(Default::default()));
    }
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let value: Value =
        serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))?;
    if !value.is_object() {
        bail!("{}: expected a JSON object", path.display());
    }
    Ok(value)
}

/// A token written as a string or as an `AddedToken` object.
fn token_text(config: &Value, key: &str) -> Option<String> {
    match &config[key] {
        Value::String(text) => Some(text.clone()),
        Value::Object(token) => token.get("content")?.as_str().map(str::to_owned),
        _ => None,
    }
    .filter(|text| !text.is_empty())
}

/// Obeys `add_bos_token` and `add_eos_token`, which transformers puts above the post-processor of `tokenizer.json`. Where
/// both agree the latter stays: it may also trim what a token covers.
pub(super) fn set_post_processor(
    inner: &mut tokenizers::Tokenizer,
    config: &Value,
    bos: Option<&SpecialToken>,
    eos: Option<&SpecialToken>,
) -> Result<()> {
    let (add_bos, add_eos) = (config["add_bos_token"].as_bool(), config["add_eos_token"].as_bool());
    if add_bos.is_none() && add_eos.is_none() {
        return Ok(());
    }
    let bos = bos.filter(|_| add_bos == Some(true));
    let eos = eos.filter(|_| add_eos == Some(true));
    let found = inner.encode("", true).map_err(|e| anyhow!("{e}"))?;
    let ids: Vec<u32> = bos.into_iter().chain(eos).map(|token| token.id).collect();
    if found.get_ids() == ids {
        return Ok(());
    }
    let mut pieces = vec!["$A".to_owned()];
    pieces.splice(0..0, bos.map(|token| token.content.clone()));
    pieces.extend(eos.map(|token| token.content.clone()));
    let tokens: Vec<(String, u32)> =
        bos.into_iter().chain(eos).map(|token| (token.content.clone(), token.id)).collect();
    let processor = TemplateProcessing::builder()
        .try_single(pieces)
        .map_err(|e| anyhow!("{e}"))?
        .special_tokens(tokens)
        .build()?;
    inner.with_post_processor(Some(processor));
    Ok(())
}

/// Adds the tokens that only `tokenizer_config.json` lists, in the order of their ids, as transformers does.
fn add_missing_tokens(inner: &mut tokenizers::Tokenizer, config: &Value, dir: &Path) -> Result<()> {
    let mut missing = Vec::new();
    if let Value::Object(tokens) = &config["added_tokens_decoder"] {
        for (id, token) in tokens {
            let path = dir.join("tokenizer_config.json");
            let id: u32 = id
                .parse()
                .with_context(|| format!("{}: added_tokens_decoder has the id {id:?}", path.display()))?;
            let content = token["content"].as_str().unwrap_or_default();
            if inner.token_to_id(content).is_none() {
                let token: AddedToken = serde_json::from_value(token.clone())
                    .with_context(|| format!("{}: added_tokens_decoder.{id}", path.display()))?;
                missing.push((id, token));
            }
        }
    }
    missing.sort_by_key(|(id, _)| *id);
    for (id, token) in missing {
        let content = token.content.clone();
        let added = if token.special { inner.add_special_tokens([token]) } else { inner.add_tokens([token]) };
        added.map_err(|e| anyhow!("{}: cannot add the token {content:?}: {e}", dir.display()))?;
        if inner.token_to_id(&content) != Some(id) {
            tracing::warn!(
                "{}: tokenizer_config.json gives {content:?} the id {id}, tokenizer.json makes it {:?}",
                dir.display(),
                inner.token_to_id(&content)
            );
        }
    }
    Ok(())
}
