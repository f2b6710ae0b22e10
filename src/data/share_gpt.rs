//! Tables into conversations: Unsloth's `to_sharegpt`.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::numpy_rng::permutation;
use super::python::python_text;
use super::records::{Records, Row};

/// How a table's rows become conversations.
#[derive(Clone, Debug)]
pub struct ShareGptOptions {
    /// The question, with `{column}`s and optional blocks `[[..{column}..]]`; empty: the merged column is there already.
    pub merged_prompt: String,
    /// The column that the merged prompt makes.
    pub merged_column_name: String,
    /// The column that holds the answer.
    pub output_column_name: String,
    /// Leaves out all columns but `conversations`.
    pub remove_unused_columns: bool,
    /// Question-answer pairs a conversation: each row is joined by as many less one of shuffled copies of the table.
    pub conversation_extension: usize,
    /// The seed of the first shuffled copy is this plus 1.
    pub random_state: u64,
}

impl Default for ShareGptOptions {
    fn default() -> ShareGptOptions {
        ShareGptOptions {
            merged_prompt: String::new(),
            merged_column_name: "instruction".to_owned(),
            output_column_name: "output".to_owned(),
            remove_unused_columns: true,
            conversation_extension: 1,
            random_state: 3407,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Piece {
    Text(String),
    Column(String),
}

/// A prompt of several columns: text with `{column}` placeholders (`{{` and `}}` are braces), and blocks `[[..]]` that
/// are there if their first column holds something.
#[derive(Clone, Debug, PartialEq)]
pub struct MergedPrompt(Vec<(Vec<Piece>, bool)>);

impl MergedPrompt {
    /// Understands `text`.
    ///
    /// # Errors
    /// A column that is not among `columns`, a block without a column, a single brace.
    pub fn new(text: &str, columns: &BTreeSet<String>) -> Result<MergedPrompt> {
        let mut blocks = Vec::new();
        let mut rest = text;
        // A block ends at the next ]] and holds at least one character, as the pattern \[\[.+?\]\] does.
        while let Some((start, length)) = rest.find("[[").and_then(|start| {
            let inside = &rest[start + 2..];
            let first = inside.chars().next()?.len_utf8();
            Some((start, first + inside[first..].find("]]")?))
        }) {
            if start > 0 {
                blocks.push((pieces(&rest[..start], columns)?, false));
            }
            let block = &rest[start + 2..start + 2 + length];
            let inside = pieces(block, columns)?;
            if !inside.iter().any(|piece| matches!(piece, Piece::Column(_))) {
                bail!("the optional block [[{block}]] holds no {{column}}: it needs at least one");
            }
            blocks.push((inside, true));
            rest = &rest[start + 2 + length + 2..];
        }
        if !rest.is_empty() {
            blocks.push((pieces(rest, columns)?, false));
        }
        Ok(MergedPrompt(blocks))
    }

    /// The prompt of `row`; what is null or absent is nothing.
    pub fn render(&self, row: &Row) -> String {
        let mut text = String::new();
        for (pieces, optional) in &self.0 {
            let first = pieces.iter().find_map(|piece| match piece {
                Piece::Column(name) => Some(cell(row, name)),
                Piece::Text(_) => None,
            });
            if *optional && first.is_none_or(|first| first.is_empty()) {
                continue;
            }
            for piece in pieces {
                match piece {
                    Piece::Text(piece) => text.push_str(piece),
                    Piece::Column(name) => text.push_str(&cell(row, name)),
                }
            }
        }
        text
    }
}

fn pieces(text: &str, columns: &BTreeSet<String>) -> Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    let mut literal = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(['{', '}']) {
        literal.push_str(&rest[..at]);
        let brace = &rest[at..=at];
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix(brace) {
            literal.push_str(brace);
            rest = after;
        } else if let ("{", Some((column, after))) = (brace, rest.split_once('}')) {
            if !columns.contains(column) {
                bail!(
                    "the prompt names {{{column}}}, which is no column; there are [{}]",
                    columns.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
                );
            }
            pieces.push(Piece::Text(std::mem::take(&mut literal)));
            pieces.push(Piece::Column(column.to_owned()));
            rest = after;
        } else {
            bail!(
                "the prompt has a single {brace}: write {{column}}, or {brace}{brace} for the brace itself"
            );
        }
    }
    literal.push_str(rest);
    pieces.push(Piece::Text(literal));
    Ok(pieces)
}

/// A cell as Python's `str` prints it; null is nothing.
fn cell(row: &Row, column: &str) -> String {
    match row.get(column) {
        None | Some(Value::Null) => String::new(),
        Some(value) => python_text(value),
    }
}

/// Gives the rows of `sources` as ShareGPT conversations, as many as there are rows.
///
/// The table is read once for its columns and once for its rows; with a `conversation_extension` above 1 all questions
/// and answers are held in memory.
///
/// # Errors
/// The rows are conversations already; a column that is not there; a prompt that cannot be understood.
pub fn to_sharegpt(
    sources: &[String],
    options: &ShareGptOptions,
) -> Result<Box<dyn Iterator<Item = Result<Row>>>> {
    let mut columns = BTreeSet::new();
    for record in Records::open(sources)? {
        let record = record?;
        if record.row.get("conversations").is_some_and(Value::is_array) {
            bail!(
                "{}: the column conversations is a list: the dataset is in ShareGPT format already",
                record.place
            );
        }
        for (name, _) in record.row {
            columns.insert(name);
        }
    }
    let table = Table::new(options.clone(), &columns)?;
    let mut others: Vec<(String, String)> = Vec::new();
    if options.conversation_extension > 1 {
        for record in Records::open(sources)? {
            others.push(table.pair(&record?.row));
        }
    }
    let rows = u32::try_from(others.len()).context("more rows than can be shuffled")?;
    let orders: Vec<Vec<u32>> = (1..options.conversation_extension)
        .map(|copy| permutation(options.random_state + copy as u64, rows))
        .collect();
    Ok(Box::new(Records::open(sources)?.enumerate().map(move |(at, record)| {
        let row = record?.row;
        let (question, answer) = table.pair(&row);
        let mut turns = turns(&question, &answer).to_vec();
        for order in &orders {
            let (question, answer) = &others[order[at] as usize];
            turns.extend(self::turns(question, answer));
        }
        Ok(table.conversation(row, question, turns))
    })))
}

/// A table whose columns were checked.
struct Table {
    options: ShareGptOptions,
    prompt: Option<MergedPrompt>,
}

impl Table {
    fn new(options: ShareGptOptions, columns: &BTreeSet<String>) -> Result<Table> {
        let known = || columns.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        let prompt = match options.merged_prompt.is_empty() {
            true if !columns.contains(&options.merged_column_name) => bail!(
                "there is no column {}, only [{}]: name it with merged_column_name, or build it with merged_prompt",
                options.merged_column_name,
                known()
            ),
            true => None,
            false => Some(MergedPrompt::new(&options.merged_prompt, columns).context("merged_prompt")?),
        };
        if !columns.contains(&options.output_column_name) {
            bail!("there is no column {} for the answers, only [{}]", options.output_column_name, known());
        }
        Ok(Table { options, prompt })
    }

    /// Question and answer.
    fn pair(&self, row: &Row) -> (String, String) {
        let question = match &self.prompt {
            Some(prompt) => prompt.render(row),
            None => cell(row, &self.options.merged_column_name),
        };
        (question, cell(row, &self.options.output_column_name))
    }

    fn conversation(&self, mut row: Row, question: String, turns: Vec<Value>) -> Row {
        if self.options.remove_unused_columns {
            row.clear();
        } else if self.prompt.is_some() {
            row.insert(self.options.merged_column_name.clone(), Value::from(question));
        }
        row.insert("conversations".to_owned(), Value::Array(turns));
        row
    }
}

fn turns(question: &str, answer: &str) -> [Value; 2] {
    [json!({"from": "human", "value": question}), json!({"from": "gpt", "value": answer})]
}
