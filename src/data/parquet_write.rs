use std::io::Write;
use std::sync::Arc;

use anyhow::{Context, Result};
use arrow_json::ReaderBuilder;
use arrow_schema::Schema;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

use super::records::Row;

/// Rows that become columns at a time.
const BATCH: usize = 1024;
/// Bytes of a row group: what a reader holds at a time.
const ROW_GROUP_BYTES: usize = 16 << 20;

/// Writes `rows` as a Parquet file of Zstandard-compressed row groups of about 16 MiB.
pub(super) fn write_parquet(
    out: &mut (impl Write + Send),
    schema: Arc<Schema>,
    mut rows: impl Iterator<Item = Result<Row>>,
) -> Result<()> {
    let properties = WriterProperties::builder().set_compression(Compression::ZSTD(ZstdLevel::default()));
    let mut writer = ArrowWriter::try_new(out, schema.clone(), Some(properties.build()))?;
    let mut decoder = ReaderBuilder::new(schema).with_batch_size(BATCH).build_decoder()?;
    loop {
        let batch: Vec<Row> = rows.by_ref().take(BATCH).collect::<Result<_>>()?;
        if batch.is_empty() {
            break;
        }
        decoder.serialize(&batch)?;
        writer.write(&decoder.flush()?.context("rows without columns")?)?;
        if writer.in_progress_size() > ROW_GROUP_BYTES {
            writer.flush()?;
        }
    }
    writer.close()?;
    Ok(())
}
