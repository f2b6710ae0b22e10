use std::ops::Range;

use anyhow::{Context, Result, bail};

use super::format::{Conversation, Example};
use super::turns::{TurnMarkers, assistant_spans, end_of_turn};
use super::{DatasetOptions, Offsets, RenderOptions, SpecialToken, Tokenizer};

/// A tokenised example and its targets.
pub(super) struct Encoded {
    pub ids: Vec<u32>,
    pub trained: Vec<bool>,
}

/// A rendered conversation.
pub(super) struct Shown {
    pub text: String,
    /// The byte ranges that are trained; all of it if not given.
    pub assistant: Option<Vec<Range<usize>>>,
}

/// Turns examples into tokens and label masks.
pub(super) struct Encoder<'a> {
    pub tokenizer: &'a Tokenizer,
    pub options: &'a DatasetOptions,
    pub end_of_turn: Option<SpecialToken>,
    markers: Option<TurnMarkers>,
    max_id: u32,
}

impl<'a> Encoder<'a> {
    pub fn new(tokenizer: &'a Tokenizer, options: &'a DatasetOptions) -> Encoder<'a> {
        let end_of_turn = tokenizer.chat_template().and_then(|template| end_of_turn(tokenizer, template));
        let markers = match (tokenizer.chat_template(), &end_of_turn) {
            (Some(template), Some(token)) if options.assistant_only_loss && !template.marks_generation() => {
                TurnMarkers::detect(template, &token.content)
            }
            _ => None,
        };
        Encoder { tokenizer, options, end_of_turn, markers, max_id: tokenizer.max_id() }
    }

    pub fn encode(&self, example: &Example) -> Result<Encoded> {
        match example {
            Example::Text(text) => {
                let ids = self.tokenizer.encode(text, true)?;
                let trained = vec![true; ids.len()];
                Ok(self.with_eos(ids, trained))
            }
            Example::PromptCompletion { prompt, completion } => {
                let ids = self.tokenizer.encode(&format!("{prompt}{completion}"), true)?;
                let start = match self.options.completion_only_loss {
                    true => common_prefix(&ids, &self.tokenizer.encode(prompt, true)?),
                    false => 0,
                };
                let trained = (0..ids.len()).map(|n| n >= start).collect();
                Ok(self.with_eos(ids, trained))
            }
            Example::Conversation(conversation) => self.conversation(conversation),
            Example::Tokens { input_ids, trained } => {
                if let Some(id) = input_ids.iter().find(|id| **id > self.max_id) {
                    bail!(
                        "column input_ids: the tokenizer has no token {id}, its last one is {}",
                        self.max_id
                    );
                }
                Ok(Encoded { ids: input_ids.clone(), trained: trained.clone() })
            }
        }
    }

    /// Ends a plain text with EOS, as TRL does; a chat template writes its own.
    fn with_eos(&self, mut ids: Vec<u32>, mut trained: Vec<bool>) -> Encoded {
        match (self.tokenizer.eos_token_id(), ids.last()) {
            (Some(eos), Some(last)) if *last == eos => {
                // The text, or the tokenizer's post-processor, has it already.
                if let Some(last) = trained.last_mut() {
                    *last = true;
                }
            }
            (Some(eos), _) => {
                ids.push(eos);
                trained.push(true);
            }
            (None, _) => {}
        }
        Encoded { ids, trained }
    }

    fn conversation(&self, conversation: &Conversation) -> Result<Encoded> {
        let shown = self.show(conversation)?;
        self.tokenise(conversation, &shown)
    }

    /// The conversation's text, and the assistant's part of it where only that is trained.
    pub fn show(&self, conversation: &Conversation) -> Result<Shown> {
        let Some(template) = self.tokenizer.chat_template() else {
            bail!(
                "the row is a conversation, but {} has no chat template: give one with --chat-template FILE",
                self.tokenizer.dir().display()
            )
        };
        let options = RenderOptions {
            tools: conversation.tools.as_ref(),
            variables: Some(&conversation.variables),
            ..Default::default()
        };
        let rendered = template.render_spans(&conversation.messages, &options)?;
        let assistant = match (self.options.assistant_only_loss, template.marks_generation()) {
            (false, _) => None,
            (true, true) => Some(rendered.generation),
            (true, false) => Some(self.assistant_spans(conversation, &rendered.text)?),
        };
        Ok(Shown { text: rendered.text, assistant })
    }

    /// The tokens of what [`show`](Self::show) gave.
    pub fn tokenise(&self, conversation: &Conversation, shown: &Shown) -> Result<Encoded> {
        // The template has written the special tokens, BOS too.
        let (ids, offsets) = self.tokenizer.encode_with_offsets(&shown.text, false)?;
        let start = match conversation.prompt_messages.filter(|_| self.options.completion_only_loss) {
            Some(messages) => self.completion_start(conversation, messages, &shown.text, &ids, &offsets)?,
            None => 0,
        };
        let mut trained: Vec<bool> = (0..ids.len()).map(|n| n >= start).collect();
        if let Some(spans) = &shown.assistant {
            for (trained, assistant) in trained.iter_mut().zip(overlaps(&offsets, spans)) {
                *trained &= assistant;
            }
        }
        Ok(Encoded { ids, trained })
    }

    /// Where the assistant speaks in `text`.
    fn assistant_spans(&self, conversation: &Conversation, text: &str) -> Result<Vec<Range<usize>>> {
        if let Some(spans) = self.markers.as_ref().and_then(|markers| markers.spans(conversation, text)) {
            return Ok(spans);
        }
        let template = self.tokenizer.chat_template().context("a conversation needs a chat template")?;
        let end_of_turn = self.end_of_turn.as_ref().map(|token| token.content.as_str());
        assistant_spans(template, conversation, text, end_of_turn)
    }

    /// The first token of the completion: where the tokens leave those of the prompt alone, as TRL does it. Where the
    /// template renders a prompt alone differently (tools or a thinking block move), not before the assistant's turn.
    fn completion_start(
        &self,
        conversation: &Conversation,
        prompt_messages: usize,
        text: &str,
        ids: &[u32],
        offsets: &[Offsets],
    ) -> Result<usize> {
        let template = self.tokenizer.chat_template().context("a conversation needs a chat template")?;
        let options = RenderOptions {
            tools: conversation.tools.as_ref(),
            variables: Some(&conversation.variables),
            add_generation_prompt: true,
            ..Default::default()
        };
        let prompt = &conversation.messages[..prompt_messages];
        let alone = template.render(prompt, &options).context("rendering the prompt alone")?;
        let start = common_prefix(ids, &self.tokenizer.encode(&alone, false)?);
        if text.starts_with(&alone) {
            return Ok(start);
        }
        let spans = self.assistant_spans(conversation, text)?;
        let earlier = prompt.iter().filter(|message| message["role"] == "assistant").count();
        let span = spans.get(earlier).context("the completion has no assistant message")?;
        Ok(start.max(offsets.iter().take_while(|(_, end)| *end <= span.start).count()))
    }
}

fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Which tokens cover a byte of one of the ordered `spans`. A token across the edge counts, as in transformers'
/// `char_to_token`.
fn overlaps(offsets: &[Offsets], spans: &[Range<usize>]) -> Vec<bool> {
    let mut span = 0;
    offsets
        .iter()
        .map(|&(start, end)| {
            while span < spans.len() && spans[span].end <= start {
                span += 1;
            }
            spans.get(span).is_some_and(|span| start < span.end && end > span.start)
        })
        .collect()
}
