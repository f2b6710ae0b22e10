//! `ferrotune export`: a tuned model in the formats that other programs read, each file proven against the model.

use std::io::{Write, stdout};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use tch::Kind;

use super::format::{bytes, percent, seconds};
use super::model_args::{MachineArgs, kind_of, overflows_f16};
use super::progress::BARS;
use super::push;
use super::sources;
use crate::export::{
    self, Agreement, EXPORT_REPORT, GgufFile, Layout, Merged, Quantization, Reference, TORCHSCRIPT_FILE,
    TorchScript,
};
use crate::io::{write_atomically, write_folder_atomically};
use crate::models::StreamedModel;
use crate::nn::{LoadOptions, RopeScaling};
use crate::train::Dtype;

const EXAMPLES: &str = "Examples:
  ferrotune export --model DIR --adapter out --format merged-16bit --output-dir merged
  ferrotune export --model DIR --adapter out --format merged-4bit --output-dir merged-nf4
  ferrotune export --model DIR --adapter out --format gguf --quantization-method q4_k_m,q8_0 --output-dir gguf
  ferrotune export --model DIR --format gguf --quantization-method q4_k_m --modelfile --output-dir ollama
  ferrotune export --model DIR --adapter out --format gguf-lora --output-dir gguf-lora
  ferrotune export --model DIR --adapter out --format torchscript --output-dir scripted
  ferrotune export --model DIR --adapter out --format merged-16bit --output-dir merged --push-to-hub me/my-model --hub-private";

/// What is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A Hugging Face checkpoint in 16 bits, the adapter added into the weights
    #[value(name = "merged-16bit")]
    Merged16bit,
    /// The same with every projection in 4 bits (NF4), as bitsandbytes has it
    #[value(name = "merged-4bit")]
    Merged4bit,
    /// GGUF files for llama.cpp, Ollama and others, one for each --quantization-method
    #[value(name = "gguf")]
    Gguf,
    /// The adapter alone as a GGUF file that llama.cpp adds to a model
    #[value(name = "gguf-lora")]
    GgufLora,
    /// A TorchScript archive for torch.jit.load in Python and C++: forward(input_ids [B, T]) -> logits [B, T, V]
    #[value(name = "torchscript")]
    Torchscript,
}

/// Writes a model, with or without an adapter, in a format that other programs read.
///
/// The file is read back, the same prompts are scored with the model and with the file, and the largest difference of logits, the KL and the
/// agreement of greedy tokens are printed and kept in export_report.json. Past --max-kl nothing is left behind, and the command fails. The
/// adapter is never changed.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct ExportArgs {
    /// Checkpoint to export: a directory or a Hugging Face hub id
    #[arg(long, value_name = "DIR|ID")]
    pub model: String,
    /// LoRA adapter to add into it: a directory as peft or `ferrotune train` writes it, or a hub id
    #[arg(long, value_name = "DIR|ID")]
    pub adapter: Option<String>,
    /// Branch, tag or commit of a hub model
    #[arg(long)]
    pub revision: Option<String>,
    /// What to write
    #[arg(long, value_enum)]
    pub format: Format,
    /// Folder for the result; it must be new or empty
    #[arg(long, value_name = "DIR")]
    pub output_dir: PathBuf,
    /// Types of the GGUF files, by llama.cpp's names; all are written in one pass
    #[arg(long, value_enum, value_name = "TYPE,..", value_delimiter = ',', default_value = "q8_0")]
    pub quantization_method: Vec<Quantization>,
    /// Write a Modelfile for Ollama beside each GGUF file; the checkpoint's chat template must be one that ferrotune knows
    #[arg(long)]
    pub modelfile: bool,
    /// System message of the Modelfile, for conversations that bring none
    #[arg(long, value_name = "TEXT", requires = "modelfile")]
    pub system: Option<String>,
    /// Add the adapter onto the weights as 4 bits (NF4) would have them, which is what it was trained on with --load-in-4bit, instead of the
    /// checkpoint's 16 bits
    #[arg(long)]
    pub load_in_4bit: bool,
    /// Largest KL, in nats a token, between the model and the export [default: merged-16bit 1e-3, merged-4bit 0.1;
    /// gguf f32 1e-6, f16 and bf16 1e-3, q8_0 5e-3, q6_k 0.02, q5 0.05, q4_k 0.1, q4_0 and q4_1 0.2, q3 0.3, q2 1; torchscript 1e-6 in f32, else 1e-3]
    #[arg(long, value_name = "KL")]
    pub max_kl: Option<f64>,
    /// Type of weights and activations in the comparison, and of the weights of a TorchScript archive
    #[arg(long, value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    /// Upload the folder to this repository of the Hugging Face hub, created where it is not there (`ferrotune push` does the same later)
    #[arg(long, value_name = "OWNER/NAME")]
    pub push_to_hub: Option<String>,
    /// Create it as a private one; one that is there and public is refused
    #[arg(long, requires = "push_to_hub")]
    pub hub_private: bool,
    /// Branch to commit to, created where it is not there
    #[arg(long, value_name = "BRANCH", requires = "push_to_hub", default_value = "main")]
    pub hub_revision: String,
    #[command(flatten)]
    pub machine: MachineArgs,
}

/// The model's folder, its adapter's, and how both are loaded to be compared.
struct Source {
    model: PathBuf,
    adapter: Option<PathBuf>,
    options: LoadOptions,
}

/// Runs what the flags ask for.
pub fn run(args: ExportArgs) -> Result<()> {
    let device = args.machine.init()?;
    // Before the work: a token that may not write must not cost an export.
    let target = match &args.push_to_hub {
        Some(name) => Some(push::open(name, args.hub_private, &args.hub_revision).context("--push-to-hub")?),
        None => None,
    };
    let model = sources::model_dir(&args.model, args.revision.as_deref()).context("--model")?;
    let adapter = match &args.adapter {
        Some(adapter) => Some(sources::model_dir(adapter, None).context("--adapter")?),
        None => None,
    };
    let kind = kind_of(args.dtype, device, overflows_f16(&model).context("--model")?);
    let options = LoadOptions::new(kind, device);
    let source = Source { model, adapter, options };
    let merged = Merged::open(&source.model, source.adapter.as_deref(), args.load_in_4bit)?;
    if merged.is_dequantized()
        && matches!(args.format, Format::Merged16bit | Format::Gguf | Format::Torchscript)
    {
        warn(
            "the base is in 4 bits: its rounding stays in the export. A 16-bit checkpoint as --model gives a better one, \
             unless the adapter must sit on what it was trained on",
        );
    }
    match args.format {
        Format::Merged16bit => export_checkpoint(&args, &source, &merged, Layout::SixteenBit, 1e-3),
        Format::Merged4bit => export_checkpoint(&args, &source, &merged, Layout::Nf4(device), 0.1),
        Format::Gguf => export_gguf(&args, &source, &merged),
        Format::GgufLora => export_gguf_lora(&args, &merged),
        Format::Torchscript => export_torchscript(&args, &source, &merged),
    }?;
    target.map_or(Ok(()), |target| target.push(&args.output_dir).context("--push-to-hub"))
}

fn export_checkpoint(
    args: &ExportArgs,
    source: &Source,
    merged: &Merged,
    layout: Layout,
    threshold: f64,
) -> Result<()> {
    let reference = source.reference(args.load_in_4bit)?;
    write_folder_atomically(&args.output_dir, |folder| {
        let started = Instant::now();
        let bar = progress_bar("writing")?;
        let sizes = export::write_checkpoint(merged, folder, layout, None, |read, all| {
            bar.set_length(all);
            bar.set_position(read);
        });
        bar.finish_and_clear();
        let sizes = sizes?;
        let written = started.elapsed().as_secs_f64();
        let _busy = Busy::new("reading back and comparing");
        let exported = StreamedModel::from_pretrained(folder, None, source.options)
            .context("reading the export back")?;
        let agreement = reference.compare(&exported)?;
        let threshold = args.max_kl.unwrap_or(threshold);
        let report = report(args, source, &args.output_dir, sizes.after, agreement, threshold);
        write_atomically(&folder.join(EXPORT_REPORT), &serde_json::to_vec_pretty(&report)?)?;
        announce(&args.output_dir, sizes.after, agreement, written)?;
        judge(agreement, threshold)
    })
}

fn export_gguf(args: &ExportArgs, source: &Source, merged: &Merged) -> Result<()> {
    let windowed = merged.config.layers.iter().any(|layer| layer.attention.sliding_window.is_some());
    if windowed && !merged.config.model_type.starts_with("gemma") {
        warn(
            "llama.cpp has no sliding window for this architecture: past the window it attends to more than the model did",
        );
    }
    if let Some(original) = longrope_context(merged) {
        warn(&format!(
            "longrope: a context above {original} makes llama.cpp take the long factors for every text, the model takes them for longer texts only; \
             set its context (-c, n_ctx, num_ctx) above {original} only for those"
        ));
    }
    let name = model_name(&args.model);
    let file_name = |quantization: &Quantization| format!("{name}.{}.gguf", quantization.name());
    let mut methods: Vec<Quantization> = Vec::new();
    for method in &args.quantization_method {
        if !methods.contains(method) {
            methods.push(*method);
        }
    }
    let modelfiles = methods
        .iter()
        .filter(|_| args.modelfile)
        .map(|quantization| Ok((quantization.name(), modelfile(args, merged, &file_name(quantization))?)))
        .collect::<Result<Vec<_>>>()?;
    let reference = source.reference(args.load_in_4bit)?;
    write_folder_atomically(&args.output_dir, |folder| {
        let file = |quantization: &Quantization| GgufFile {
            path: folder.join(file_name(quantization)),
            quantization: *quantization,
        };
        let files: Vec<GgufFile> = methods.iter().map(file).collect();
        let started = Instant::now();
        let bar = progress_bar("quantising")?;
        let sizes = export::write_gguf(merged, &files, &name, |done, all| {
            bar.set_length(all);
            bar.set_position(done);
        });
        bar.finish_and_clear();
        let written = started.elapsed().as_secs_f64();
        let mut reports = Vec::new();
        for (file, size) in files.iter().zip(sizes?) {
            let exported =
                StreamedModel::from_gguf(&file.path, source.options).context("reading the export back")?;
            let agreement = reference.compare(&exported).with_context(|| file_name(&file.quantization))?;
            let threshold = args.max_kl.unwrap_or(file.quantization.max_kl());
            let path = args.output_dir.join(file_name(&file.quantization));
            reports.push(report(args, source, &path, size, agreement, threshold));
            announce(&path, size, agreement, written)?;
            judge(agreement, threshold)?;
        }
        for (name, text) in &modelfiles {
            let file =
                if modelfiles.len() == 1 { "Modelfile".to_string() } else { format!("Modelfile.{name}") };
            write_atomically(&folder.join(file), text.as_bytes())?;
        }
        write_atomically(&folder.join(EXPORT_REPORT), &serde_json::to_vec_pretty(&reports)?)
    })
}

fn modelfile(args: &ExportArgs, merged: &Merged, gguf: &str) -> Result<String> {
    let tokenizer = merged.tokenizer()?.context("--modelfile: the checkpoint has no tokenizer.json")?;
    let template = tokenizer.chat_template().context("--modelfile: the checkpoint has no chat template")?;
    let context_length = longrope_context(merged).unwrap_or(merged.config.max_position_embeddings);
    export::modelfile(gguf, template, context_length, args.system.as_deref()).context("--modelfile")
}

/// The context up to which a longrope model takes its short factors.
fn longrope_context(merged: &Merged) -> Option<i64> {
    merged.config.ropes.iter().find_map(|rope| match &rope.scaling {
        RopeScaling::LongRope { original_max_position_embeddings, short_factor, long_factor }
            if short_factor != long_factor =>
        {
            Some(*original_max_position_embeddings as i64)
        }
        _ => None,
    })
}

fn export_gguf_lora(args: &ExportArgs, merged: &Merged) -> Result<()> {
    let name = "adapter.gguf";
    write_folder_atomically(&args.output_dir, |folder| {
        let size = export::write_gguf_lora(merged, &folder.join(name))?;
        let path = args.output_dir.join(name);
        writeln!(stdout(), "{}: {}, read back equal", path.display(), bytes(size))
            .context("writing to stdout")
    })
}

fn export_torchscript(args: &ExportArgs, source: &Source, merged: &Merged) -> Result<()> {
    let LoadOptions { kind, device, .. } = source.options;
    let reference = source.reference(args.load_in_4bit)?;
    write_folder_atomically(&args.output_dir, |folder| {
        let started = Instant::now();
        let path = folder.join(TORCHSCRIPT_FILE);
        let bar = progress_bar("reading")?;
        let written = export::write_torchscript(merged, &path, kind, |done, all| {
            bar.set_length(all);
            bar.set_position(done);
        });
        bar.finish_and_clear();
        written?;
        merged.copy_companions(folder)?;
        write_atomically(&folder.join("config.json"), &serde_json::to_vec_pretty(&merged.config_json()?)?)?;
        let (size, written) = (path.metadata()?.len(), started.elapsed().as_secs_f64());
        let _busy = Busy::new("reading back and comparing");
        let script = TorchScript::load(&path, device).context("reading the export back")?;
        let agreement = reference.compare_logits(|ids| script.logits(ids, device))?;
        let threshold = args.max_kl.unwrap_or(if kind == Kind::Float { 1e-6 } else { 1e-3 });
        let report = report(args, source, &args.output_dir, size, agreement, threshold);
        write_atomically(&folder.join(EXPORT_REPORT), &serde_json::to_vec_pretty(&report)?)?;
        announce(&args.output_dir.join(TORCHSCRIPT_FILE), size, agreement, written)?;
        judge(agreement, threshold)
    })
}

impl Source {
    /// The scores of the model with its adapter.
    fn reference(&self, load_in_4bit: bool) -> Result<Reference> {
        let _busy = Busy::new("scoring the model");
        let options = LoadOptions { load_in_4bit, ..self.options };
        let adapter = self.adapter.as_deref();
        let model = StreamedModel::from_pretrained(&self.model, adapter, options).context("--model")?;
        Reference::of(&model).context("--model")
    }
}

fn report(
    args: &ExportArgs,
    source: &Source,
    path: &Path,
    size: u64,
    agreement: Agreement,
    threshold: f64,
) -> Value {
    json!({
        "file": path.display().to_string(),
        "format": args.format.to_possible_value().map(|value| value.get_name().to_string()),
        "model": args.model,
        "adapter": args.adapter,
        "bytes": size,
        "compared_in": super::model_args::name_of(source.options.kind),
        "agreement": agreement,
        "max_kl": threshold,
        "ferrotune": env!("CARGO_PKG_VERSION"),
    })
}

fn announce(path: &Path, size: u64, agreement: Agreement, written: f64) -> Result<()> {
    let Agreement { tokens, largest_logit_difference, kl, greedy_agreement } = agreement;
    writeln!(
        stdout(),
        "{}: {} in {}; against the model on {tokens} tokens: largest logit difference {largest_logit_difference:.2e}, KL \
         {kl:.2e}, greedy tokens equal {}",
        path.display(),
        bytes(size),
        seconds(written),
        percent(greedy_agreement)
    )
    .context("writing to stdout")
}

fn judge(agreement: Agreement, threshold: f64) -> Result<()> {
    // Not `>`: a NaN must not pass.
    if agreement.kl <= threshold {
        return Ok(());
    }
    bail!(
        "the export is not the model: KL {:.2e} a token, at most {threshold:.0e} is allowed (--max-kl); nothing was kept",
        agreement.kl
    )
}

/// The model's folder or the last part of its hub id: the snapshot of a hub model lies in a folder named after a commit.
fn model_name(model: &str) -> String {
    let folder = Path::new(model).canonicalize().ok();
    let name = folder.as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    name.unwrap_or_else(|| model.rsplit('/').next().unwrap_or(model).to_string())
}

/// A spinner beside work whose length is not known, gone when it is dropped.
struct Busy(ProgressBar);

impl Busy {
    fn new(what: &'static str) -> Busy {
        let bar = BARS.add(ProgressBar::new_spinner().with_message(what));
        bar.enable_steady_tick(Duration::from_millis(200));
        Busy(bar)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

fn progress_bar(what: &str) -> Result<ProgressBar> {
    let style =
        ProgressStyle::with_template(&format!("{what} {{bar:20.cyan/blue}} {{percent}} % ETA {{eta}}"))?;
    Ok(BARS.add(ProgressBar::new(0).with_style(style)))
}

fn warn(message: &str) {
    BARS.suspend(|| {
        let _ = writeln!(std::io::stderr(), "warning: {message}");
    });
}
