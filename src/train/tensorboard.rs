//! TensorBoard event files, written by hand: scalars need 60 lines and no protobuf crate.
//!
//! A record is `length u64 | masked crc32c(length) | Event | masked crc32c(Event)`, little-endian; Event is a protobuf
//! message {1 wall_time double, 2 step int64, 3 file_version string, 5 Summary {1 Value {1 tag, 2 simple_value float}},
//! 7 SessionLog {1 status}}.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

const SESSION_START: u64 = 1;
const PREFIX: &str = "events.out.tfevents.";

/// One event file of a run.
#[derive(Debug)]
pub struct EventWriter {
    file: File,
}

impl EventWriter {
    /// Starts a new event file in `folder`. With `start_step` above 0, viewers forget what earlier files of the folder
    /// say about that step and later ones: they belong to a run that went on from a checkpoint before them. With 0,
    /// the earlier files are removed.
    pub fn create(folder: &Path, start_step: u64) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        if start_step == 0 {
            remove_event_files(folder).with_context(|| format!("clearing {}", folder.display()))?;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // Viewers read the files of a folder in the order of their names.
        let name = format!("{PREFIX}{:010}.{:09}.{}", now.as_secs(), now.subsec_nanos(), std::process::id());
        let path = folder.join(name);
        let file = File::create_new(&path).with_context(|| format!("creating {}", path.display()))?;
        let mut writer = Self { file };
        writer.record(&event(0, &bytes_field(3, b"brain.Event:2")))?;
        if start_step > 0 {
            writer.record(&event(start_step, &bytes_field(7, &varint_field(1, SESSION_START))))?;
        }
        Ok(writer)
    }

    /// Adds the values of one step.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let summary: Vec<u8> = values
            .iter()
            .flat_map(|(tag, value)| {
                let mut fields = bytes_field(1, tag.as_bytes());
                fields.push(2 << 3 | 5);
                fields.extend((*value as f32).to_le_bytes());
                bytes_field(1, &fields)
            })
            .collect();
        self.record(&event(step, &bytes_field(5, &summary)))
    }

    fn record(&mut self, event: &[u8]) -> Result<()> {
        self.file.write_all(&framed(event)).context("writing a TensorBoard event")
    }
}

fn remove_event_files(folder: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn framed(event: &[u8]) -> Vec<u8> {
    let length = (event.len() as u64).to_le_bytes();
    [&length[..], &masked_crc(&length), event, &masked_crc(event)].concat()
}

/// TensorFlow's rotated crc32c, so that a checksum of data that holds checksums stays meaningful.
fn masked_crc(data: &[u8]) -> [u8; 4] {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

fn event(step: u64, what: &[u8]) -> Vec<u8> {
    let wall_time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let mut event = vec![1 << 3 | 1];
    event.extend(wall_time.to_le_bytes());
    event.extend(varint_field(2, step));
    event.extend(what);
    event
}

fn varint_field(number: u8, value: u64) -> Vec<u8> {
    let mut field = vec![number << 3];
    field.extend(varint(value));
    field
}

fn bytes_field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut field = vec![number << 3 | 2];
    field.extend(varint(bytes.len() as u64));
    field.extend(bytes);
    field
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}
