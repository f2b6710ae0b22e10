//! A chat template from an example of two turns: Unsloth's `{SYSTEM}`, `{INPUT}`, `{OUTPUT}`.

use anyhow::{Context, Result, bail};

use super::ChatTemplate;

const SYSTEM: &str = "{SYSTEM}";
const INPUT: &str = "{INPUT}";
const OUTPUT: &str = "{OUTPUT}";

/// What stands around the texts of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExampleTemplate {
    /// Before the first turn, with `{SYSTEM}` where the example has it.
    pub system: String,
    /// Before a question.
    pub user: String,
    /// Between question and answer.
    pub assistant: String,
    /// Behind an answer, `eos_token` included.
    pub end: String,
}

impl ExampleTemplate {
    /// Understands an example such as `{SYSTEM}\nUser: {INPUT}\nAssistant: {OUTPUT}</s>\nUser: {INPUT}\nAssistant:
    /// {OUTPUT}</s>`: two turns alike, or one. `eos_token` is put behind answers that end in none.
    ///
    /// With one turn, what stands before the question begins where the text repeats the start of what stands before the
    /// answer (a line break, as a rule).
    ///
    /// # Errors
    /// No `{INPUT}` or `{OUTPUT}`, more than two turns, or two that differ.
    pub fn new(example: &str, eos_token: &str) -> Result<ExampleTemplate> {
        for (part, most) in [(INPUT, 2), (OUTPUT, 2), (SYSTEM, 1)] {
            let found = example.matches(part).count();
            if found > most || (found == 0 && part != SYSTEM) {
                bail!("the example has {part} {found} times: expected two turns alike, or one");
            }
        }
        let (head, rest) = example.split_once(INPUT).context("the example has no {INPUT}")?;
        let (assistant, rest) = split(rest, OUTPUT)?;
        let (system, user, mut end) = match rest.split_once(INPUT) {
            Some((between, rest)) => {
                let (again, end) = split(rest, OUTPUT)?;
                let user = between.strip_prefix(end).with_context(|| {
                    format!("behind the first answer stands {between:?}, behind the second {end:?}: they must be alike")
                })?;
                if assistant != again {
                    bail!("before the first answer stands {assistant:?}, before the second {again:?}");
                }
                let system = head.strip_suffix(user).with_context(|| {
                    format!("before the second question stands {user:?}, but not before the first")
                })?;
                (system, user, end.to_owned())
            }
            None => {
                let at = header_start(head, assistant)?;
                (&head[..at], &head[at..], rest.to_owned())
            }
        };
        if [assistant, user, &end].iter().any(|part| part.contains(SYSTEM)) {
            bail!("{SYSTEM} stands inside the turns: it belongs before the first");
        }
        if !end.contains(eos_token) {
            end.push_str(eos_token);
        }
        let [system, user, assistant] = [system, user, assistant].map(str::to_owned);
        Ok(ExampleTemplate { system, user, assistant, end })
    }

    /// The same as a Jinja chat template; a conversation without system message gets `default_system_message`.
    pub fn jinja(&self, default_system_message: &str) -> String {
        let (set, turns) = match self.system.split_once(SYSTEM) {
            Some((before, after)) => {
                let [before, after, default] = [before, after, default_system_message].map(quoted);
                let set = format!(
                    "{{% if messages[0]['role'] == 'system' %}}{{{{ {before} + messages[0]['content'] + {after} }}}}\
                     {{% set turns = messages[1:] %}}{{% else %}}{{{{ {before} + {default} + {after} }}}}\
                     {{% set turns = messages %}}{{% endif %}}"
                );
                (set, "turns")
            }
            None => (format!("{{{{ {} }}}}", quoted(&self.system)), "messages"),
        };
        let [user, assistant, end] = [&self.user, &self.assistant, &self.end].map(|part| quoted(part));
        format!(
            "{set}{{% for message in {turns} %}}{{% if message['role'] == 'user' %}}{{{{ {user} + message['content'] }}}}\
             {{% elif message['role'] == 'assistant' %}}{{{{ {assistant} + message['content'] + {end} }}}}\
             {{% else %}}{{{{ raise_exception('only user and assistant may speak, after a system message if the \
             template has one') }}}}{{% endif %}}{{% endfor %}}\
             {{% if add_generation_prompt %}}{{{{ {assistant} }}}}{{% endif %}}"
        )
    }

    /// [`jinja`](Self::jinja), compiled.
    pub fn chat_template(&self, default_system_message: &str) -> Result<ChatTemplate> {
        ChatTemplate::new(&self.jinja(default_system_message), "made from the example")
    }
}

fn split<'a>(text: &'a str, part: &str) -> Result<(&'a str, &'a str)> {
    let (before, after) =
        text.split_once(part).with_context(|| format!("an {INPUT} without {part} behind it"))?;
    match before.contains(INPUT) {
        true => bail!("an {INPUT} without {part} behind it"),
        false => Ok((before, after)),
    }
}

/// Where the header of the one question begins in `head`.
fn header_start(head: &str, assistant: &str) -> Result<usize> {
    if let Some(at) = head.find(SYSTEM) {
        return Ok(at + SYSTEM.len());
    }
    (1..=assistant.len())
        .rev()
        .filter(|length| assistant.is_char_boundary(*length))
        .find_map(|length| head.rfind(&assistant[..length]))
        .context(
            "the example has one turn and no {SYSTEM}, so it does not show where the question's header begins: \
             write two turns",
        )
}

/// A Jinja string.
fn quoted(text: &str) -> String {
    let escaped = text.replace('\\', "\\\\").replace('\'', "\\'").replace('\n', "\\n");
    format!("'{escaped}'")
}
