//! A Modelfile: how Ollama runs a GGUF file.

use std::fmt::Write;

use anyhow::{Result, bail};

use crate::data::{ChatTemplate, NamedTemplate};
use crate::error::Error;

/// The Modelfile of `gguf`, a file beside it, whose model has this chat template and context length. `system` is the system
/// message of conversations that bring none.
///
/// # Errors
/// A template that is none of the known formats; a system message with three quotes in a row, or one at its end.
pub fn modelfile(
    gguf: &str,
    template: &ChatTemplate,
    context_length: i64,
    system: Option<&str>,
) -> Result<String> {
    let named = NamedTemplate::recognize(template)?;
    let mut text = format!("FROM ./{gguf}\nTEMPLATE \"\"\"{}\"\"\"\n", named.ollama);
    for stop in named.stop {
        writeln!(text, "PARAMETER stop \"{stop}\"")?;
    }
    writeln!(text, "PARAMETER num_ctx {context_length}")?;
    if let Some(system) = system.or(named.default_system) {
        // A quote at its end would be taken for the first of the three that close it.
        if system.contains("\"\"\"") || system.ends_with('"') {
            let what = "--system: three quotes in a row, or one at the end, cannot stand in a Modelfile";
            bail!(Error::Usage(what.to_string()));
        }
        writeln!(text, "SYSTEM \"\"\"{system}\"\"\"")?;
    }
    Ok(text)
}
