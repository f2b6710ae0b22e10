#!/usr/bin/env python3
"""Greedy generation beside transformers: same machine, models, prompts and threads; prints a markdown table.

    scripts/compare_generation.py --ferrotune target/release/ferrotune [--data ../shared/data] [--threads 2] [--rounds 3]

Needs a Python with torch and transformers, and an otherwise idle machine: what else runs takes from both sides, turn by turn.
Each side generates NEW tokens behind prompts of one length, alone and 16 at once, in f32; the best of the rounds counts.
Transformers' time is that of the whole call; ours what `ferrotune generate` prints, of the steps after the prompt.
"""
import argparse
import json
import pathlib
import re
import subprocess
import tempfile
import time

PROMPT, NEW = "Once upon a time", 200
MODELS = ["stories260K", "tinystories-656k"]


def peer(folder, threads, batch):
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode(PROMPT)] * batch)
    config = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
    model.generate(ids, **{**config, "max_new_tokens": 8, "min_new_tokens": 8})

    def run():
        start = time.perf_counter()
        out = model.generate(ids, **config)
        return batch * NEW / (time.perf_counter() - start), tokenizer.decode(out[0, ids.shape[1]:])
    return run


def ours(binary, folder, threads, batch):
    def run():
        with tempfile.TemporaryDirectory() as place:
            prompts, answers = pathlib.Path(place, "prompts.jsonl"), pathlib.Path(place, "answers.jsonl")
            prompts.write_text((json.dumps({"prompt": PROMPT}) + "\n") * batch)
            done = subprocess.run(
                [binary, "generate", "--model", folder, "--raw", "--prompt-file", prompts, "--output", answers, "--ignore-eos",
                 "--temperature", "0", "--max-new-tokens", str(NEW), "--threads", str(threads), "--device", "cpu"],
                capture_output=True, text=True, check=True)
            rows = [json.loads(line) for line in answers.read_text().splitlines()]
        assert len({row["completion"] for row in rows}) == 1 and rows[0]["completion_tokens"] == NEW
        rate = re.search(r": ([\d,.]+) (?:new )?tokens/s", done.stderr)[1]
        return float(rate.replace(",", "")), rows[0]["completion"]
    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ferrotune", required=True, type=pathlib.Path)
    parser.add_argument("--data", default="../shared/data", type=pathlib.Path)
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--rounds", default=3, type=int)
    args = parser.parse_args()
    print(f"| model | at once | transformers tok/s | ferrotune tok/s | ratio |\n|---|---|---|---|---|")
    for name in MODELS:
        folder = args.data / "models" / name
        for batch in (1, 16):
            sides = [peer(folder, args.threads, batch), ours(args.ferrotune, folder, args.threads, batch)]
            best = [0.0, 0.0]
            for _ in range(args.rounds):
                for side, run in enumerate(sides):
                    rate, text = run()
                    best[side] = max(best[side], rate)
            print(f"| {name} | {batch} | {best[0]:,.0f} | {best[1]:,.0f} | {best[1] / best[0]:.1f} x |", flush=True)


main()
