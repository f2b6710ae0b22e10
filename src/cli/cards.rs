//! How fast this machine's GPU is, measured once and remembered; and cards that were measured elsewhere.

use std::env::var_os;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tch::Device;

use crate::device;
use crate::error::Error;
use crate::io::write_atomically;
use crate::train::plan::{Card, Rates};

/// What `Card::measure` gave on one.
type Measure = fn() -> Card;

/// With its name in `--card`.
const CARDS: [(&str, Measure); 2] = [("h200", h200), ("h100", h100)];

/// One run on an NVIDIA H200, driver 580, torch 2.11.0+cu130; the rate in fp8 of a later one.
fn h200() -> Card {
    Card {
        name: "NVIDIA H200".into(),
        processors: 132,
        product_tflops: 720.1,
        product_f32_tflops: 50.4,
        product_fp8_tflops: Some(1484.3),
        attention_tflops: Rates { forward: 540.1, backward: 436.8 },
        flash_tflops: Rates { forward: 228.2, backward: 243.2 },
        attention_f32_tflops: Rates { forward: 41.1, backward: 34.1 },
        memory_gb_per_s: 4225.0,
        bus_gb_per_s: 54.3,
        gap_us: 0.6,
    }
}

/// One run on an NVIDIA H100 80GB HBM3, driver 580, torch 2.11.0+cu130.
fn h100() -> Card {
    Card {
        name: "NVIDIA H100".into(),
        processors: 132,
        product_tflops: 744.9,
        product_f32_tflops: 50.1,
        product_fp8_tflops: None,
        attention_tflops: Rates { forward: 533.3, backward: 407.3 },
        flash_tflops: Rates { forward: 223.1, backward: 236.4 },
        attention_f32_tflops: Rates { forward: 40.8, backward: 33.6 },
        memory_gb_per_s: 2971.0,
        bus_gb_per_s: 42.8,
        gap_us: 0.6,
    }
}

pub fn names() -> Vec<&'static str> {
    CARDS.iter().map(|(name, _)| *name).collect()
}

/// Measurements of this user's machine, the newest last.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Measured {
    cards: Vec<Record>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// The newest CUDA that the driver supports, and the version of ferrotune that measured.
    driver: i32,
    ferrotune: String,
    card: Card,
}

/// The GPU `device`, measured now if it has not been with this driver and this version.
pub fn of_gpu(device: Device) -> Result<Card> {
    let probe = device::probe();
    let index = if let Device::Cuda(index) = device { index } else { 0 };
    let found = probe.devices.get(index).context("the driver does not know this GPU")?;
    let (name, processors) = (found.name.clone(), found.multiprocessors as u64);
    let ours = env!("CARGO_PKG_VERSION");
    let mut measured = read();
    let found = measured.cards.iter().find(|record| {
        let whole = record.card.product_fp8_tflops.is_some() || !device::supports_fp8(device);
        record.card.name == name && record.driver == probe.driver_version && record.ferrotune == ours && whole
    });
    if let Some(record) = found {
        return Ok(record.card.clone());
    }
    let card = Card::measure(name.clone(), processors, device).context("measuring the GPU")?;
    device::empty_cache(device)?;
    // It is no part of the run.
    device::reset_peak_memory(device)?;
    measured.cards.retain(|record| record.card.name != name);
    measured.cards.push(Record { driver: probe.driver_version, ferrotune: ours.into(), card: card.clone() });
    if let Some(file) = file() {
        let text = serde_json::to_string_pretty(&measured)?;
        let written = fs::create_dir_all(file.parent().unwrap_or(&file))
            .map_err(anyhow::Error::from)
            .and_then(|()| write_atomically(&file, text.as_bytes()));
        if let Err(error) = written {
            tracing::warn!("{}: the measurement of the GPU is not kept: {error:#}", file.display());
        }
    }
    Ok(card)
}

/// The card of `--card`; else the one that was last measured on this machine, else the first of [`CARDS`].
pub fn named(name: Option<&str>) -> Result<Card> {
    match name {
        Some(name) => {
            let found = CARDS.iter().find(|(known, _)| *known == name);
            let (_, card) =
                found.ok_or_else(|| Error::Usage(format!("--card {name}: one of {}", names().join(", "))))?;
            Ok(card())
        }
        None => Ok(read().cards.pop().map_or_else(CARDS[0].1, |record| record.card)),
    }
}

/// Refuses a plan in fp8 by the rates of a card whose rate in it is not known.
pub fn check_fp8(card: &Card) -> Result<()> {
    let Card { name, product_fp8_tflops, .. } = card;
    if product_fp8_tflops.is_none() {
        let what = format!(
            "--base-dtype fp8: the rate of {name} in fp8 is not known: name another --card, or plan on that card"
        );
        return Err(Error::Usage(what).into());
    }
    Ok(())
}

/// What is unreadable was never measured.
fn read() -> Measured {
    let text = file().and_then(|file| fs::read(file).ok());
    text.and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
}

fn file() -> Option<PathBuf> {
    let set = |name| var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
    Some(cache.join("ferrotune/cards.json"))
}
