#!/usr/bin/env python3
"""Trains adapters with ferrotune, loads them with peft and compares the log-probabilities of both (at most 1e-5 apart).

    scripts/check_adapter.py --ferrotune target/debug/ferrotune

Needs a Python with torch, transformers, peft and tokenizers. The models are those of tests/golden, with a tokenizer
of one word per id beside them.
"""
import argparse
import json
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile

import peft
import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden"
CASES = {
    "llama": [["--target-modules", "all-linear"], ["--target-modules", "q_proj,v_proj", "--use-rslora"],
              ["--target-modules", "up_proj,down_proj", "--modules-to-save", "embed_tokens,lm_head"],
              ["--target-modules", r".*\.self_attn\.[qk]_proj"],
              ["--target-modules", "q_proj,up_proj", "--layers-to-transform", "1"]],
    "phi3": [["--target-modules", "all-linear"]],
    "qwen3": [["--target-modules", "all-linear"]],
    "gemma2": [["--target-modules", "all-linear"]],
    "gemma3_multimodal": [["--target-modules", "all-linear"]],
    "gemma3_multimodal_old": [["--target-modules", "all-linear"]],
}


def add_tokenizer(folder, vocab_size):
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def distance(ferrotune, model, adapter, input_ids):
    """The largest difference of a log-probability, relative to the largest one; and how much the adapter changes it."""
    score = json.loads(run(ferrotune, "score", "--model", model, "--adapter", adapter, "--input-ids", json.dumps(input_ids)))
    ours = torch.tensor(score["logprobs"], dtype=torch.float64)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    with_adapter = peft.PeftModel.from_pretrained(base, adapter)
    ids = torch.tensor([input_ids])

    def logprobs():
        with torch.no_grad():
            return with_adapter(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]

    theirs = logprobs()
    with with_adapter.disable_adapter():
        plain = logprobs()
    size = theirs.abs().max()
    return ((ours - theirs).abs().max() / size).item(), ((plain - theirs).abs().max() / size).item()


def main():
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--ferrotune", required=True, type=pathlib.Path)
    ferrotune = arguments.parse_args().ferrotune.resolve()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    draw, failed = random.Random(0), False
    with tempfile.TemporaryDirectory() as scratch:
        for name, cases in CASES.items():
            model = pathlib.Path(scratch) / name
            shutil.copytree(GOLDEN / name, model)
            config = json.loads((model / "config.json").read_text())
            add_tokenizer(model, config.get("text_config", config)["vocab_size"])
            dataset = model / "rows.jsonl"
            texts = [" ".join(f"w{draw.randrange(3, 60)}" for _ in range(12)) for _ in range(8)]
            dataset.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            for flags in cases:
                output = model / "output"
                shutil.rmtree(output, ignore_errors=True)
                run(ferrotune, "train", "--model", model, "--dataset", dataset, "--output-dir", output, "--max-steps", 5,
                    "--learning-rate", 1e-2, "--r", 4, "--lora-alpha", 8, "--device", "cpu", "--dtype", "float32", *flags)
                apart, effect = distance(ferrotune, model, output, [draw.randrange(3, 60) for _ in range(24)])
                passed = apart <= 1e-5 and effect > 1e-3
                failed |= not passed
                print(f"{'ok  ' if passed else 'FAIL'} {name} {' '.join(flags)}: {apart:.1e} apart, the adapter changes {effect:.1e}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
