#!/usr/bin/env python3
"""GRPO steps beside TRL's GRPOTrainer on transformers: same machine, shape, LoRA and lengths; prints a markdown table.

    scripts/compare_grpo.py --ferrotune target/release/ferrotune --shape llama-3.1-8b --load-in-4bit --prompt 512 --completion 512 [--steps 3]

Needs a Python with torch, transformers, peft, trl (and bitsandbytes for --load-in-4bit), and an otherwise idle machine. Each side is a
process of its own with random weights of the shape (src/cli/shapes/, or a folder with a config.json), r 16 on every linear layer, beta 0,
gradient checkpointing as each does by default for this, and completions that never end early. TRL generates with transformers, as it
does without vLLM: both sides then hold one copy of the weights. A step is the rollout, its reward and the update; medians of the steps
after the first.
"""
import argparse
import json
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

RANK = 16


def word_tokenizer(vocab_size):
    """A word for each token id, so that a prompt's text says its ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = {f"t{token}": token for token in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", pad_token="t1", eos_token="t2")


def peer(options):
    """TRL's steps; prints one line of JSON."""
    import peft
    import torch
    from datasets import Dataset
    from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(options.shape, pathlib.Path(folder) / "config.json")
        config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(1)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    with torch.device("cuda" if on_gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if options.load_in_4bit:
        from compare_peers import quantize_nf4
        quantize_nf4(model)
    model.generation_config.eos_token_id = None
    numbers = random.Random(1)
    words = lambda: " ".join(f"t{numbers.randrange(3, config.vocab_size)}" for _ in range(options.prompt))
    steps, times, peaks = options.steps + 1, [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            if on_gpu:
                torch.cuda.synchronize()
                peaks.append(torch.cuda.max_memory_allocated())
            times.append(time.perf_counter() - self.start)

    def even_ids(completion_ids, **_):
        return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]

    lora = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as output:
        arguments = GRPOConfig(
            output_dir=output, num_generations=options.generations, per_device_train_batch_size=options.generations,
            max_completion_length=options.completion, max_steps=steps, temperature=1.0, top_k=0, beta=0.0, learning_rate=1e-5, logging_steps=1,
            report_to=[], save_strategy="no", bf16=on_gpu, use_cpu=not on_gpu, gradient_checkpointing=True,
            generation_kwargs={"min_new_tokens": options.completion, "eos_token_id": None})
        trainer = GRPOTrainer(model=model, reward_funcs=even_ids, args=arguments, peft_config=lora,
                              train_dataset=Dataset.from_list([{"prompt": words()} for _ in range(steps)]),
                              processing_class=word_tokenizer(config.vocab_size), callbacks=[Clock()])
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        logged = [row for row in trainer.state.log_history if "completions/mean_length" in row]
    lengths = {row["completions/mean_length"] for row in logged}
    if lengths != {float(options.completion)}:
        sys.exit(f"completions of {sorted(lengths)} tokens, expected {options.completion}")
    print(json.dumps({"seconds": statistics.median(times[1:]), "first": times[0], "peak": max(peaks, default=0)}), flush=True)


def line_of(command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\nfailed with {done.returncode}: {done.stderr[-3000:]}")
    return done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ferrotune", type=pathlib.Path, help="a release build; without it, TRL alone")
    parser.add_argument("--shape", required=True, help="a name of src/cli/shapes, or a folder with a config.json")
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--completion", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        return peer(options)
    known = pathlib.Path(__file__).resolve().parent.parent / "src/cli/shapes" / f"{options.shape}.json"
    shape = known if known.exists() else pathlib.Path(options.shape) / "config.json"
    lengths = ["--prompt", options.prompt, "--completion", options.completion, "--steps", options.steps]
    four_bit = ["--load-in-4bit"] if options.load_in_4bit else []
    rows = []
    if options.ferrotune:
        named = ["--shape", options.shape] if known.exists() else ["--model", shape.parent]
        found = json.loads(line_of([options.ferrotune.resolve(), "bench", "grpo", *named, "--num-generations", options.generations, *lengths,
                                    *four_bit, "--json"]))
        rows.append(("ferrotune", found["seconds_per_step"], found["first_step_seconds"], found["peak_allocated"]))
    found = json.loads(line_of([sys.executable, __file__, "--peer", "--shape", shape, "--generations", options.generations, *lengths,
                                *four_bit]).splitlines()[-1])
    rows.append(("transformers + peft + TRL", found["seconds"], found["first"], found["peak"]))
    print(f"{options.shape}, {options.generations} x ({options.prompt} + {options.completion}) tokens, "
          f"{'NF4' if options.load_in_4bit else 'dense'}\n")
    print("| | s a step | first step, s | peak allocated, GiB |\n|---|---|---|---|")
    for name, seconds, first, peak in rows:
        print(f"| {name} | {seconds:.2f} | {first:.2f} | {f'{peak / 2**30:.2f}' if peak else '-'} |")


main()
