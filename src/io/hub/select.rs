//! Which files of a repository are wanted. Names in, names out.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

const INDEX: &str = "model.safetensors.index.json";
const WEIGHTS: [&str; 2] = ["model.safetensors", "adapter_model.safetensors"];

/// What lies beside the weights and is read by us, or by those who load what we write.
const COMPANIONS: [&str; 13] = [
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
];

/// The index of the shards, if the weights are sharded.
pub fn weights_index<'a>(files: &BTreeSet<&'a str>) -> Option<&'a str> {
    files.get(INDEX).copied()
}

/// What a model's tokenizer needs, with the configuration, which names special tokens.
pub fn tokenizer_files(files: &BTreeSet<&str>) -> Result<Vec<String>> {
    if !files.contains("tokenizer.json") {
        bail!("no tokenizer.json");
    }
    Ok(COMPANIONS.iter().filter(|name| files.contains(*name)).map(|name| (*name).to_owned()).collect())
}

/// What a model needs, the shards behind an index excepted.
pub fn model_files(files: &BTreeSet<&str>) -> Result<Vec<String>> {
    let mut wanted: Vec<String> =
        COMPANIONS.iter().filter(|name| files.contains(*name)).map(|name| (*name).to_owned()).collect();
    if !files.contains("config.json") && !files.contains("adapter_config.json") {
        bail!("no config.json: not a transformers model");
    }
    if files.contains(INDEX) {
        wanted.push(INDEX.to_owned());
        return Ok(wanted);
    }
    match WEIGHTS.iter().find(|name| files.contains(*name)) {
        Some(weights) => wanted.push((*weights).to_owned()),
        None => bail!("{}", without_safetensors(files)),
    }
    Ok(wanted)
}

fn without_safetensors(files: &BTreeSet<&str>) -> String {
    let others =
        |endings: &[&str]| files.iter().find(|file| endings.iter().any(|ending| file.ends_with(ending)));
    if let Some(pickle) = others(&[".bin", ".pt", ".pth", ".ckpt"]) {
        return format!(
            "no safetensors weights, only pickled ones ({pickle}), which can run code when they are read: \
             convert them (transformers: save_pretrained), or take a revision that has safetensors (often refs/pr/N)"
        );
    }
    match others(&[".gguf"]) {
        Some(gguf) => {
            format!("no safetensors weights, only GGUF ({gguf}): take the repository it was made from")
        }
        None => "no model.safetensors and no model.safetensors.index.json".to_owned(),
    }
}

/// The shards that the index file `path` names.
pub fn shards(path: &Path) -> Result<BTreeSet<String>> {
    let read = || -> Result<BTreeSet<String>> {
        let index: Value = serde_json::from_slice(&fs::read(path)?)?;
        let map = index.get("weight_map").and_then(Value::as_object).context("no weight_map")?;
        map.values()
            .map(|file| Ok(file.as_str().context("weight_map: not a file name")?.to_owned()))
            .collect()
    };
    read().with_context(|| path.display().to_string())
}

/// The formats of datasets, the preferred one first: a repository may hold the same rows in several.
const FORMATS: [&str; 4] = ["parquet", "jsonl", "json", "csv"];
/// JSON files that describe a dataset.
const NOT_DATA: [&str; 5] =
    ["dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "config.json"];
const SPLITS: [&str; 8] = ["train", "test", "validation", "valid", "val", "dev", "eval", "evaluation"];

/// The files of a split, below the path `inside`.
pub fn dataset_files(files: &BTreeSet<&str>, inside: &str, split: &str) -> Result<Vec<String>> {
    if files.contains(inside) {
        return Ok(vec![inside.to_owned()]);
    }
    let prefix = if inside.is_empty() { String::new() } else { format!("{inside}/") };
    let data: Vec<&str> = files
        .iter()
        .copied()
        .filter(|file| file.starts_with(&prefix) && format(file).is_some())
        .filter(|file| !NOT_DATA.iter().any(|name| file.rsplit('/').next() == Some(name)))
        .collect();
    if data.is_empty() {
        let place = if inside.is_empty() { "here".to_owned() } else { format!("below {inside}") };
        bail!("no .parquet, .jsonl, .json or .csv file {place}");
    }
    let of_split = |wanted: &str| -> Vec<&str> {
        data.iter().copied().filter(|file| split_of(&file[prefix.len()..]) == Some(wanted)).collect()
    };
    let mut chosen = of_split(split);
    if chosen.is_empty() && split == "train" {
        chosen = data.iter().copied().filter(|file| split_of(&file[prefix.len()..]).is_none()).collect();
    }
    if chosen.is_empty() {
        let splits: BTreeSet<&str> = data.iter().filter_map(|file| split_of(&file[prefix.len()..])).collect();
        bail!("no split {split}; there is {}", splits.into_iter().collect::<Vec<_>>().join(", "));
    }
    let best = FORMATS.iter().find(|wanted| chosen.iter().any(|file| format(file) == Some(*wanted)));
    chosen.retain(|file| format(file) == best.copied());
    let folders: BTreeSet<&str> =
        chosen.iter().map(|file| file.rsplit_once('/').map_or("", |(folder, _)| folder)).collect();
    if folders.len() > 1 {
        let folders: Vec<&str> = folders.into_iter().collect();
        bail!(
            "files of the split {split} lie in several folders: add one of them to the name ({})",
            folders.join(", ")
        );
    }
    Ok(chosen.into_iter().map(str::to_owned).collect())
}

/// The format that a file's name tells, compressed or not.
fn format(file: &str) -> Option<&'static str> {
    let name = file.strip_suffix(".gz").or_else(|| file.strip_suffix(".zst")).unwrap_or(file);
    let ending = name.rsplit_once('.')?.1;
    FORMATS.into_iter().find(|format| *format == ending)
}

/// The split whose word stands in the path, the file's name before its folders.
fn split_of(file: &str) -> Option<&'static str> {
    file.rsplit('/').find_map(|part| {
        part.split(|c: char| !c.is_ascii_alphabetic())
            .find_map(|word| SPLITS.into_iter().find(|split| *split == word))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set<'a>(files: &[&'a str]) -> BTreeSet<&'a str> {
        files.iter().copied().collect()
    }

    #[test]
    fn a_model_is_its_companions_and_one_form_of_its_weights() {
        let files =
            set(&["config.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin", "README.md"]);
        assert_eq!(model_files(&files).unwrap(), ["config.json", "tokenizer.json", "model.safetensors"]);
        let pickled = model_files(&set(&["config.json", "pytorch_model.bin"])).unwrap_err().to_string();
        assert!(pickled.contains("pytorch_model.bin"), "{pickled}");
        assert!(model_files(&set(&["model.gguf", "config.json"])).unwrap_err().to_string().contains("GGUF"));
        assert!(model_files(&set(&["weights.safetensors"])).unwrap_err().to_string().contains("config.json"));
    }

    #[test]
    fn a_split_is_a_word_of_the_path() {
        let files = set(&[
            "README.md",
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
            "data/test-00000-of-00001.parquet",
            "data/constrained.parquet",
            "dataset_infos.json",
        ]);
        assert_eq!(dataset_files(&files, "", "train").unwrap().len(), 2);
        assert_eq!(dataset_files(&files, "data", "test").unwrap(), ["data/test-00000-of-00001.parquet"]);
        let error = dataset_files(&files, "", "dev").unwrap_err().to_string();
        assert_eq!(error, "no split dev; there is test, train");
        assert_eq!(dataset_files(&set(&["alpaca.json", "eval.json"]), "", "train").unwrap(), ["alpaca.json"]);
        assert_eq!(dataset_files(&set(&["a.csv.gz", "a.jsonl.zst"]), "", "train").unwrap(), ["a.jsonl.zst"]);
    }

    #[test]
    fn several_configurations_are_asked_about() {
        let files = set(&["main/train-0.parquet", "socratic/train-0.parquet"]);
        let error = dataset_files(&files, "", "train").unwrap_err().to_string();
        assert!(error.ends_with("(main, socratic)"), "{error}");
        assert_eq!(dataset_files(&files, "main", "train").unwrap(), ["main/train-0.parquet"]);
        assert_eq!(dataset_files(&files, "main/train-0.parquet", "x").unwrap(), ["main/train-0.parquet"]);
    }
}
