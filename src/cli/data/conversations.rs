//! Tables and other people's conversations into those that chat templates read.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use super::args::{SourceArgs, write};
use crate::data::{RoleAliases, RowOptions, ShareGptOptions, standardize_sharegpt, to_messages, to_sharegpt};

/// Makes conversations of a table: a prompt merged of several columns, and the column of the answer.
///
/// {column} is a column's value; a block [[..{column}..]] is left out where its first column is empty; {{ and }} are braces.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  ferrotune data to-sharegpt --dataset titanic.csv --output titanic.jsonl --output-column-name Survived \\\n    \
    --merged-prompt 'A passenger of class {Pclass}, {Sex}.[[ Age {Age}.]][[ Cabin {Cabin}.]] Did they survive (1) or not (0)?'"
)]
pub struct ToShareGptArgs {
    #[command(flatten)]
    pub source: SourceArgs,
    /// The question, of one or more columns [default: --merged-column-name is there already]
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub merged_prompt: String,
    /// Column of the question
    #[arg(long, value_name = "COLUMN", default_value = "instruction")]
    pub merged_column_name: String,
    /// Column of the answer
    #[arg(long, value_name = "COLUMN", default_value = "output")]
    pub output_column_name: String,
    /// Keep the other columns
    #[arg(long)]
    pub keep_unused_columns: bool,
    /// Questions and answers a conversation: rows are joined with shuffled ones
    #[arg(long, visible_alias = "dialogue-extension", value_name = "N", default_value_t = 1)]
    pub conversation_extension: usize,
    /// Seed of the shuffling
    #[arg(long, visible_alias = "seed", default_value_t = 3407)]
    pub random_state: u64,
    /// File to write
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
}

/// Runs what the flags ask for.
pub fn run_to_sharegpt(args: ToShareGptArgs) -> Result<()> {
    let options = ShareGptOptions {
        merged_prompt: args.merged_prompt,
        merged_column_name: args.merged_column_name,
        output_column_name: args.output_column_name,
        remove_unused_columns: !args.keep_unused_columns,
        conversation_extension: args.conversation_extension,
        random_state: args.random_state,
    };
    let rows = to_sharegpt(&args.source.files()?, &options).context("to-sharegpt")?;
    write(&args.output, "making conversations", rows)
}

/// Names the roles of conversations system, user and assistant, and their keys role and content.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  ferrotune data standardize --dataset sharegpt.json --output chats.jsonl")]
pub struct StandardizeArgs {
    #[command(flatten)]
    pub source: SourceArgs,
    /// Names of the role system
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = "system")]
    pub aliases_for_system: Vec<String>,
    /// Names of the role user
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = "user,human,input")]
    pub aliases_for_user: Vec<String>,
    /// Names of the role assistant
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = "gpt,assistant,output")]
    pub aliases_for_assistant: Vec<String>,
    /// Make a column messages of rows of any known shape (ShareGPT with tools, Alpaca, prompt and completion) instead
    #[arg(long)]
    pub to_messages: bool,
    /// File to write
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
}

/// Runs what the flags ask for.
pub fn run_standardize(args: StandardizeArgs) -> Result<()> {
    let records = args.source.records()?;
    if args.to_messages {
        let rows = records.map(|record| to_messages(&record?, &RowOptions::default()));
        return write(&args.output, "standardising", rows);
    }
    let aliases = RoleAliases {
        system: args.aliases_for_system,
        user: args.aliases_for_user,
        assistant: args.aliases_for_assistant,
    };
    write(&args.output, "standardising", standardize_sharegpt(records, &aliases)?)
}
