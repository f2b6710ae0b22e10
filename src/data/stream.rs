//! Rows of files that may be larger than memory: shuffled, from any place on, one share of them for each rank.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::{Deserialize, Serialize};

use super::json::parse_line;
use super::order::shuffle;
use super::parquet;
use super::records::{Place, Record, data_files, ending};

/// How rows are streamed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamOptions {
    /// A new order in each epoch, from this seed; otherwise the order of the files.
    pub seed: Option<u64>,
    /// Rows in memory, about: those of as many blocks, drawn from all over the files, are shuffled with each other.
    pub buffer_rows: usize,
    /// This process's number, from 0 on.
    pub rank: u64,
    /// The number of processes. Each gets as many rows, every one another; what does not divide is left out.
    pub world_size: u64,
}

impl Default for StreamOptions {
    fn default() -> StreamOptions {
        StreamOptions { seed: None, buffer_rows: 65_536, rank: 0, world_size: 1 }
    }
}

/// A place in the endless sequence of rows, the same for all ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowCursor {
    /// Epochs done.
    pub epoch: u64,
    /// Rows of the epoch that were given out, to all ranks together.
    pub row: u64,
}

/// Lines of a block of a JSONL file.
const BLOCK_ROWS: u64 = 1024;

/// Rows that are read together: lines from a byte on, or a row group.
#[derive(Clone, Debug)]
struct Block {
    file: Arc<Path>,
    /// Where it begins: a byte and the lines before it, or a row group and the rows before it.
    at: u64,
    before: u64,
    /// Bytes; 0 for a row group.
    bytes: u64,
    rows: u64,
}

/// A row as it was read: lines are understood only when they are given out.
enum Raw {
    Line(Vec<u8>, Place),
    Record(Record),
}

/// Rows of `.jsonl` and `.parquet` files, epoch after epoch, from any [`RowCursor`] on. In memory are 40 bytes for each 1024
/// lines or each row group, and the buffer.
pub struct RowStream {
    blocks: Vec<Block>,
    rows: u64,
    options: StreamOptions,
    cursor: RowCursor,
    /// The epoch's blocks in their order, and where each buffer of them ends: in blocks and in rows.
    order: Vec<u32>,
    buffers: Vec<(usize, u64)>,
    planned: Option<u64>,
    /// The rest of the buffer at hand; its first row is that of the cursor.
    buffer: VecDeque<Raw>,
    next_buffer: usize,
}

impl RowStream {
    /// Opens `sources`, files, folders and globs: JSONL files are read once to find their lines, of Parquet files only the
    /// ends.
    ///
    /// # Errors
    /// A file that cannot be entered in the middle (JSON, CSV, compressed); no rows; a rank that is not below `world_size`.
    pub fn open<S: AsRef<str>>(sources: &[S], options: StreamOptions) -> Result<RowStream> {
        if options.rank >= options.world_size || options.buffer_rows == 0 {
            bail!(
                "rank {} of {} with a buffer of {} rows: expected a rank below the world size and a buffer above 0",
                options.rank,
                options.world_size,
                options.buffer_rows
            );
        }
        let mut blocks = Vec::new();
        for file in data_files(sources)? {
            blocks.extend(blocks_of(file)?);
        }
        let all: u64 = blocks.iter().map(|block| block.rows).sum();
        let rows = all - all % options.world_size;
        if rows == 0 {
            bail!("{all} rows for {} ranks", options.world_size);
        }
        Ok(RowStream {
            blocks,
            rows,
            options,
            cursor: RowCursor::default(),
            order: Vec::new(),
            buffers: Vec::new(),
            planned: None,
            buffer: VecDeque::new(),
            next_buffer: 0,
        })
    }

    /// The rows of one epoch of this rank.
    pub fn rows_per_epoch(&self) -> u64 {
        self.rows / self.options.world_size
    }

    /// Where the stream stands.
    pub fn cursor(&self) -> RowCursor {
        self.cursor
    }

    /// Goes to `cursor`: the rows from there on are those that followed where it was taken, with the same files and options.
    ///
    /// # Errors
    /// A place behind the last row.
    pub fn seek(&mut self, cursor: RowCursor) -> Result<()> {
        if cursor.row > self.rows {
            bail!(
                "row {} of an epoch of {}: are these the files that the cursor was taken on?",
                cursor.row,
                self.rows
            );
        }
        self.cursor = cursor;
        self.planned = None;
        Ok(())
    }

    /// The next row, or `None` at the end of an epoch; the call after that begins the next epoch.
    ///
    /// # Errors
    /// Names the line or row that cannot be read; the next call goes on behind it.
    pub fn next_row(&mut self) -> Result<Option<Record>> {
        loop {
            if self.cursor.row >= self.rows {
                self.cursor = RowCursor { epoch: self.cursor.epoch + 1, row: 0 };
                return Ok(None);
            }
            if self.planned != Some(self.cursor.epoch) {
                self.plan();
            }
            let Some(raw) = self.buffer.pop_front() else {
                self.fill()?;
                continue;
            };
            let is_ours = self.cursor.row % self.options.world_size == self.options.rank;
            self.cursor.row += 1;
            if is_ours {
                return Ok(Some(match raw {
                    Raw::Line(text, place) => parse_line(&text, place)?,
                    Raw::Record(record) => record,
                }));
            }
        }
    }

    fn rng(&self, part: u64) -> Option<ChaCha8Rng> {
        self.options.seed.map(|seed| {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(self.cursor.epoch << 32 | part);
            rng
        })
    }

    /// Orders the epoch's blocks, and finds the buffer in which the cursor stands.
    fn plan(&mut self) {
        self.order = (0..self.blocks.len() as u32).collect();
        if let Some(mut rng) = self.rng(0) {
            shuffle(&mut self.order, &mut rng);
        }
        self.buffers.clear();
        let (mut rows, mut in_buffer) = (0, 0);
        for (at, block) in self.order.iter().enumerate() {
            let count = self.blocks[*block as usize].rows;
            rows += count;
            in_buffer += count;
            if in_buffer >= self.options.buffer_rows as u64 || at + 1 == self.order.len() {
                self.buffers.push((at + 1, rows));
                in_buffer = 0;
            }
        }
        self.buffer.clear();
        self.next_buffer = self.buffers.partition_point(|(_, rows)| *rows <= self.cursor.row);
        self.planned = Some(self.cursor.epoch);
    }

    /// Reads the next buffer, and goes to the cursor in it.
    fn fill(&mut self) -> Result<()> {
        let (first_block, first_row) = match self.next_buffer {
            0 => (0, 0),
            next => self.buffers[next - 1],
        };
        let (end, _) = *self.buffers.get(self.next_buffer).context("the rows end before their number")?;
        let mut rows = Vec::new();
        for block in &self.order[first_block..end] {
            self.blocks[*block as usize].read(&mut rows)?;
        }
        if let Some(mut rng) = self.rng(self.next_buffer as u64 + 1) {
            shuffle(&mut rows, &mut rng);
        }
        self.buffer = rows.into();
        self.buffer.drain(..((self.cursor.row - first_row) as usize).min(self.buffer.len()));
        self.next_buffer += 1;
        Ok(())
    }
}

impl Block {
    fn read(&self, rows: &mut Vec<Raw>) -> Result<()> {
        let before = rows.len();
        let shown = || self.file.display().to_string();
        if self.bytes == 0 {
            let group = parquet::group(&self.file, self.at as usize, self.before)?;
            rows.extend(group.into_iter().map(Raw::Record));
        } else {
            let mut file = File::open(&self.file).with_context(shown)?;
            file.seek(SeekFrom::Start(self.at)).with_context(shown)?;
            let mut text = Vec::with_capacity(self.bytes as usize);
            file.take(self.bytes).read_to_end(&mut text).with_context(shown)?;
            for (line, number) in text.split(|byte| *byte == b'\n').zip(self.before + 1..) {
                if !line.trim_ascii().is_empty() {
                    let place = Place { file: self.file.clone(), unit: "line", number };
                    rows.push(Raw::Line(line.to_vec(), place));
                }
            }
        }
        if (rows.len() - before) as u64 != self.rows {
            bail!("{}: the file changed while it was read", shown());
        }
        Ok(())
    }
}

fn blocks_of(file: PathBuf) -> Result<Vec<Block>> {
    let shown = || format!("reading {}", file.display());
    match ending(&file) {
        Some(("jsonl", None)) => line_blocks(&file).with_context(shown),
        Some(("parquet", None)) => {
            let mut before = 0;
            let path: Arc<Path> = file.as_path().into();
            let groups = parquet::group_rows(&file).with_context(shown)?;
            Ok(groups
                .into_iter()
                .enumerate()
                .map(|(group, rows)| {
                    let block = Block { file: path.clone(), at: group as u64, before, bytes: 0, rows };
                    before += rows;
                    block
                })
                .filter(|block| block.rows > 0)
                .collect())
        }
        _ => bail!(
            "{}: only .jsonl and .parquet can be entered in the middle: make one of it with ferrotune data convert",
            file.display()
        ),
    }
}

fn line_blocks(path: &Path) -> Result<Vec<Block>> {
    let file: Arc<Path> = path.into();
    let mut bytes = BufReader::with_capacity(1 << 20, File::open(path)?);
    let mut blocks: Vec<Block> = Vec::new();
    let (mut at, mut line) = (0, 0);
    let mut text = Vec::new();
    loop {
        text.clear();
        let length = bytes.read_until(b'\n', &mut text)? as u64;
        if length == 0 {
            return Ok(blocks);
        }
        if !text.trim_ascii().is_empty() {
            let block = match blocks.last_mut().filter(|block| block.rows < BLOCK_ROWS) {
                Some(block) => block,
                None => {
                    blocks.push(Block { file: file.clone(), at, before: line, bytes: 0, rows: 0 });
                    blocks.last_mut().context("one was pushed")?
                }
            };
            block.bytes = at + length - block.at;
            block.rows += 1;
        }
        at += length;
        line += 1;
    }
}
