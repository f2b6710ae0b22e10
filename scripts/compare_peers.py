#!/usr/bin/env python3
"""Ferrotune beside transformers + peft: same machine, models, token ids, LoRA and threads; prints a markdown table.

    scripts/compare_peers.py --ferrotune target/release/ferrotune [--data ../shared/data] [--threads 2]
    scripts/compare_peers.py --ferrotune target/release/ferrotune --gpu llama-3.1-8b [--batch 2] [--seq 2048] [--load-in-4bit]
    scripts/compare_peers.py --ferrotune target/release/ferrotune --loss-curve MODEL_DIR --text FILE [--steps 60]

Needs a Python with torch, transformers and peft, and an otherwise idle machine. Both sides are separate processes
that print one line a step; the times are those at which the lines arrive here, so that both are measured by one clock
in the same way. With --gpu each side measures itself: `ferrotune bench train`, and the peers' steps on random weights of
the same shape (src/cli/shapes/), with those of TRL's and Liger's kernels that are installed. Each step trains the same 4 rows (r 16, alpha 16, every linear layer, float32, AdamW): the first losses
must agree, or nothing is printed. The peer is a bare loop over the model, without a Trainer: its fastest form.
"""
import argparse
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROWS, RANK, LEARNING_RATE, PROMPT, NEW_TOKENS = 4, 16, 2e-4, "Once upon a time", 200
# measure -> (target, whether a larger ratio is the better one)
TARGETS = {"LoRA step, tiny": (0.35, False), "LoRA step, 60M": (0.95, False), "generation": (8.0, True),
           "first step": (1.0, False), "peak memory": (0.5, False)}


def peer_train_gpu(peer, shape, batch, seq, steps, checkpointing, four_bit):
    """LoRA steps on random weights and tokens under bf16 autocast; prints one line of JSON."""
    import peft
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if peer == "liger":
        from liger_kernel.transformers import _apply_liger_kernel
        _apply_liger_kernel(json.loads(shape.read_text())["model_type"])
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(shape, pathlib.Path(folder) / "config.json")
        config = AutoConfig.from_pretrained(folder)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if four_bit:
        quantize_nf4(model)
    if peer == "trl":
        from trl.trainer.utils import add_fused_lm_head
        add_fused_lm_head(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    lora = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(model, lora)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.001, fused=True)
    model.train()
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for step in range(5 + steps):
        input_ids = torch.randint(config.vocab_size, (batch, seq), device=device)
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            if peer == "trl":
                outputs = model(input_ids=input_ids, labels=input_ids, fused_lm_head=True)
                loss = -outputs.log_probs.sum() / outputs.label_mask.sum()
            else:
                loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.item()  # waits for the step, as a log line does
        times.append(1000 * (time.perf_counter() - start))
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    print(json.dumps({"ms": statistics.median(times[5:]), "peak": peak, "loss": loss}), flush=True)


def peer_steps(model, rows, steps, learning_rate):
    """Trains on the same rows again and again; prints a loss a step."""
    import torch
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.001, fused=True)
    input_ids = torch.tensor(json.loads(pathlib.Path(rows).read_text()), device=model.device)
    model.train()
    for step in range(steps):
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} loss {loss.item():.6f}", flush=True)


def peer_curve(model_dir, adapter, rows, steps, device, learning_rate):
    """LoRA steps from a given adapter."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).to(device)
    model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)  # LoRA itself in f32
    peer_steps(model, rows, steps, learning_rate)


def compare_curves(options):
    """Losses of ferrotune and transformers + peft, on the CPU in f32 and on a GPU in bf16, from one LoRA A and on the same rows."""
    model_dir, learning_rate, length = options.loss_curve, 5e-4, 128
    ours = [options.ferrotune.resolve(), "train", "--model", model_dir, "--logging-steps", 1, "--max-seq-length", length,
            "--per-device-train-batch-size", ROWS, "--gradient-accumulation-steps", 1, "--r", RANK, "--lora-alpha", RANK,
            "--weight-decay", 0.001, "--lr-scheduler-type", "constant", "--warmup-ratio", 0]
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        write_rows(model_dir, options.text.read_text(), length, scratch)

        def ferrotune(name, device, dtype, steps, learning_rate):
            command = [*ours, "--dataset", scratch / "rows.jsonl", "--output-dir", scratch / name, "--device", device, "--dtype", dtype,
                       "--max-steps", steps, "--learning-rate", learning_rate]
            return losses(run(list(map(str, command)), options.threads)[0])

        def peer(device):
            return losses(run([sys.executable, __file__, "--peer-curve", str(model_dir), str(scratch / "start"),
                               str(scratch / "rows.json"), str(options.steps), device, str(learning_rate)], options.threads)[0])

        def losses(lines):
            found = [float(match[1]) for _, line in lines if (match := re.search(r"\bloss[ =:]+([0-9.]+)", line))]
            return found[: options.steps]  # a summary follows

        ferrotune("start", "cpu", "float32", 1, 1e-30)  # leaves A as it is drawn
        curves = {"ferrotune, CPU, f32": ferrotune("cpu", "cpu", "float32", options.steps, learning_rate),
                  "transformers + peft, CPU, f32": peer("cpu"),
                  "ferrotune, GPU, bf16": ferrotune("gpu", "cuda", "bfloat16", options.steps, learning_rate),
                  "transformers + peft, GPU, bf16": peer("cuda")}
    steps = [step for step in (1, 5, 10, 20, 30, 45, 60) if step <= options.steps]
    print(f"| {model_dir.name} | " + " | ".join(f"step {step}" for step in steps) + " | largest difference to the first row |")
    print("|---|" + "---|" * (len(steps) + 1))
    first = next(iter(curves.values()))
    for name, curve in curves.items():
        apart = max(abs(a - b) / b for a, b in zip(curve, first, strict=True))
        print(f"| {name} | " + " | ".join(f"{curve[step - 1]:.4f}" for step in steps) + f" | {apart:.1e} |")


def quantize_nf4(model):
    """Every linear layer of the decoder as bitsandbytes' NF4 with double quantisation, one after another."""
    import bitsandbytes as bnb
    import torch
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16,
                                    compress_statistics=True, quant_type="nf4", device="meta")
            weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
            new.weight = weight.to(layer.weight.device)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
    model.is_loaded_in_4bit = True  # what peft asks


def compare_gpu(options):
    """The table of one work: ferrotune, then each peer that is installed, each in a process of its own."""
    import importlib.util
    shape = pathlib.Path(__file__).resolve().parent.parent / "src/cli/shapes" / f"{options.gpu}.json"
    common = ["--batch", options.batch, "--seq", options.seq, "--steps", options.steps]
    flags = [flag for flag, given in ((f"--use-gradient-checkpointing={options.use_gradient_checkpointing}", options.use_gradient_checkpointing),
                                      ("--load-in-4bit", options.load_in_4bit)) if given]
    command = [options.ferrotune.resolve(), "bench", "train", "--shape", options.gpu, *common, *flags, "--device", "cuda", "--json"]
    ours = json.loads("".join(line for _, line in run([str(part) for part in command], options.threads)[0]))
    rows = [("ferrotune", ours["ms_per_step"], ours["peak_allocated"])]
    print(f"{options.gpu}, {options.batch} x {options.seq} tokens, {' '.join(flags) or '16-bit'}, {ours['device']}; "
          f"floor of this run {ours['floor']['ms']:.1f} ms\n")
    print("| | ms/step | tokens/s | peak allocated, GiB | x ferrotune |\n|---|---|---|---|---|")
    for peer, package in (("hf", "peft"), ("trl", "trl"), ("liger", "liger_kernel")):
        if importlib.util.find_spec(package) is None or (options.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None):
            print(f"not installed, not run: {peer}", file=sys.stderr)
            continue
        arguments = ["--peer-train-gpu", peer, shape, options.batch, options.seq, options.steps,
                     int(options.use_gradient_checkpointing is not None), int(options.load_in_4bit)]
        try:
            lines, _ = run([sys.executable, __file__, *map(str, arguments)], options.threads)
        except SystemExit as failure:
            print(failure, file=sys.stderr)
            continue
        found = json.loads(lines[-1][1])
        names = {"hf": "transformers + peft", "trl": "the same with TRL's fused head", "liger": "the same with Liger's kernels"}
        rows.append((names[peer], found["ms"], found["peak"]))
    for name, ms, peak in rows:
        tokens = options.batch * options.seq / ms * 1000
        print(f"| {name} | {ms:.1f} | {tokens:,.0f} | {peak / 2**30:.2f} | {ms / rows[0][1]:.2f} |")


def peer_train(model_dir, rows, steps):
    import peft
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    peer_steps(model, rows, steps, LEARNING_RATE)


def peer_generate(model_dir, prompt_ids, repeats):
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    input_ids = torch.tensor([json.loads(prompt_ids)])
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        model.generate(input_ids, attention_mask=torch.ones_like(input_ids), do_sample=False, pad_token_id=0,
                       min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)
        print(NEW_TOKENS / (time.perf_counter() - start), flush=True)


def thread_variables(threads):
    return {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")}


def run(command, threads):
    """(seconds after the start at which each line of stdout came, the line), peak resident set in MB."""
    environment = os.environ | thread_variables(threads)
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        lines = [(time.perf_counter() - start, line) for line in process.stdout]
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            errors.seek(0)
            sys.exit(f"{' '.join(map(str, command))}\nfailed with {process.returncode}: {errors.read()[-2000:]}")
    return lines, usage.ru_maxrss / 1024


def training(command, threads):
    """Median step in ms, seconds to the end of the first step, peak MB, first loss."""
    lines, peak = run(command, threads)
    steps = [(at, float(match[1])) for at, line in lines if (match := re.search(r"\bloss[ =:]+([0-9.]+)", line))]
    times = [at for at, _ in steps]
    # The first steps also pay for page faults and thread pools, on both sides.
    gaps = [after - before for before, after in zip(times[3:], times[4:])]
    return dict(step=1000 * statistics.median(gaps), first=times[0], peak=peak, loss=steps[0][1])


def generation(ferrotune, model_dir, threads, repeats):
    """Tokens a second of ferrotune as it counts them itself, from the prompt's logits to the last token: loading is not in it, on
    the other side neither. The best of several runs, as there: what else the machine does only adds time."""
    command = [ferrotune, "generate", "--model", model_dir, "--prompt", PROMPT, "--temperature", "0", "--device", "cpu",
               "--ignore-eos", "--max-new-tokens", str(NEW_TOKENS)]
    environment = os.environ | thread_variables(threads)
    runs = [subprocess.run(command, capture_output=True, text=True, env=environment, check=True) for _ in range(3 * repeats)]
    return max(float(re.search(r"([0-9,]+) tokens/s", done.stderr)[1].replace(",", "")) for done in runs)


def make_llama_60m(folder, tokenizer_dir):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    folder, tokenizer_dir = pathlib.Path(folder), pathlib.Path(tokenizer_dir)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32000, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
                         num_key_value_heads=8, max_position_embeddings=1024)
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_dir / file, folder / file)


def write_rows(model_dir, text, length, folder):
    """The same 4 rows of `length` tokens for both: as text for ferrotune, which truncates, and as ids."""
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    part = len(text) // ROWS
    texts = [text[row * part : row * part + 16 * length] for row in range(ROWS)]
    ids = [tokenizer.encode(row).ids[:length] for row in texts]
    assert all(len(row) == length for row in ids)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in texts))
    (folder / "rows.json").write_text(json.dumps(ids))


def main():
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--ferrotune", required=True, type=pathlib.Path, help="a release build")
    arguments.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"))
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--steps", type=int, default=40, help="steps of a tiny model; the 60M model takes a quarter")
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--gpu", metavar="SHAPE", help="compare LoRA steps of this shape on the GPU instead")
    arguments.add_argument("--loss-curve", metavar="MODEL_DIR", type=pathlib.Path, help="compare losses on the CPU and on the GPU instead")
    arguments.add_argument("--text", type=pathlib.Path, help="what --loss-curve trains on: a long text")
    arguments.add_argument("--batch", type=int, default=2)
    arguments.add_argument("--seq", type=int, default=2048)
    arguments.add_argument("--use-gradient-checkpointing", nargs="?", const="on", choices=["on", "unsloth"])
    arguments.add_argument("--load-in-4bit", action="store_true")
    options = arguments.parse_args()
    if options.gpu:
        return compare_gpu(options)
    if options.loss_curve:
        return compare_curves(options)
    ferrotune, this = options.ferrotune.resolve(), [sys.executable, __file__]
    text = (options.data / "datasets/tinyshakespeare/input.txt").read_text()

    print("| measure | ferrotune | transformers + peft | ratio | target |\n|---|---|---|---|---|")

    def row(what, measure, ours, theirs, unit, absolute=False):
        target, more = TARGETS[measure]
        ratio = ours / theirs
        met = (ratio >= target) if more else ((ours if absolute else ratio) <= target)
        limit = f"{'at least' if more else 'at most'} {target:g}{' s' if absolute else 'x'}"
        print(f"| {what} | {ours:.4g} {unit} | {theirs:.4g} {unit} | {ratio:.3g}x | {limit}: {'met' if met else 'MISSED'} |", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        big = scratch / "llama-60M"
        # In a process of its own: a child's peak memory counts what its parent held when it was forked.
        run([*this, "--make-llama-60m", str(big), str(options.data / "tokenizers/mistral-v1")], options.threads)
        # model, tokens a row, steps, which step target
        for model_dir, length, steps, kind in [(options.data / "models/stories260K", 128, options.steps, "LoRA step, tiny"),
                                               (options.data / "models/tinystories-656k", 128, options.steps, "LoRA step, tiny"),
                                               (big, 128, max(8, options.steps // 4), "LoRA step, 60M")]:
            write_rows(model_dir, text, length, scratch)
            ours = [ferrotune, "train", "--model", model_dir, "--dataset", scratch / "rows.jsonl", "--output-dir", scratch / "output",
                    "--device", "cpu", "--dtype", "float32", "--max-seq-length", length, "--max-steps", steps, "--logging-steps", 1,
                    "--per-device-train-batch-size", ROWS, "--gradient-accumulation-steps", 1, "--r", RANK, "--lora-alpha", RANK,
                    "--learning-rate", LEARNING_RATE, "--weight-decay", 0.001, "--lr-scheduler-type", "constant",
                    "--warmup-ratio", 0]
            a = training([str(part) for part in ours], options.threads)
            b = training([*this, "--peer-train", str(model_dir), str(scratch / "rows.json"), str(steps)], options.threads)
            shutil.rmtree(scratch / "output")
            if abs(a["loss"] - b["loss"]) > 1e-3 * b["loss"]:
                sys.exit(f"{model_dir.name}: the first losses differ: {a['loss']} and {b['loss']}")
            name = f"{model_dir.name}, {ROWS} x {length} tokens"
            row(f"LoRA step, {name}", kind, a["step"], b["step"], "ms")
            row(f"process start to first step, {name}", "first step", a["first"], b["first"], "s", absolute=True)
            row(f"peak memory of training, {name}", "peak memory", a["peak"], b["peak"], "MB")
        for name in ("stories260K", "tinystories-656k"):
            model_dir = options.data / "models" / name
            score = json.loads(run([ferrotune, "score", "--model", model_dir, "--text", PROMPT], options.threads)[0][-1][1])
            ours = generation(ferrotune, str(model_dir), options.threads, options.repeats)
            lines, _ = run([*this, "--peer-generate", str(model_dir), json.dumps(score["input_ids"]), str(options.repeats)], options.threads)
            theirs = max(float(line) for _, line in lines[1:])
            row(f"generation, {name}, batch 1, greedy, {NEW_TOKENS} tokens", "generation", ours, theirs, "tokens/s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer-train"]:
        peer_train(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    elif sys.argv[1:2] == ["--peer-train-gpu"]:
        numbers = [int(number) for number in sys.argv[4:]]
        peer_train_gpu(sys.argv[2], pathlib.Path(sys.argv[3]), *numbers)
    elif sys.argv[1:2] == ["--peer-curve"]:
        peer_curve(*sys.argv[2:5], int(sys.argv[5]), sys.argv[6], float(sys.argv[7]))
    elif sys.argv[1:2] == ["--make-llama-60m"]:
        make_llama_60m(sys.argv[2], sys.argv[3])
    elif sys.argv[1:2] == ["--peer-generate"]:
        peer_generate(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
