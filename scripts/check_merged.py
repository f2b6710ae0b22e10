#!/usr/bin/env python3
"""Adapters of `ferrotune train` and what `ferrotune export` merges them into, in transformers + peft + bitsandbytes.

    scripts/check_merged.py --ferrotune target/debug/ferrotune [--only llama,gemma3]

Of the embedded model and of a random checkpoint of every architecture; each gets an adapter on all projections. ref64 are
the logits of transformers + peft on checkpoint and adapter in f64; distances are ||a - b|| / ||b||, the 2-norm and the max-norm.

- adapter: log-probabilities of transformers + peft and of ferrotune, both in f32: at most 1e-5 apart;
- merged-16bit: its logits in transformers (f64 on the stored weights) are as near to ref64 as those of peft's own
  merge_and_unload, rounded to the same dtype: within twice its distance or the floor of the dtype (docs/numerics.md);
- merged-4bit: the same beside peft's merge quantised by bitsandbytes, with at most 1e-3 of the packed bytes unlike; and transformers + bitsandbytes give the
  log-probabilities that ferrotune gives for that file, at most 1e-5 apart.

Needs a Python with torch, transformers, peft, bitsandbytes and tokenizers.
"""
import argparse
import copy
import json
import pathlib
import random
import shutil
import sys
import tempfile

import peft
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from check_adapter import GOLDEN, add_tokenizer
from check_nf4 import BASE, load, run, tensors

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16,
              rope_theta=500000.0)
LONGROPE = dict(rope_type="longrope", short_factor=[1.0 + 0.05 * i for i in range(16)], long_factor=[1.0 + 0.5 * i for i in range(16)],
                original_max_position_embeddings=32, rope_theta=10000.0)
FLOORS = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
# Widths are multiples of 64, for bitsandbytes (check_nf4.py).
CASES = {
    "llama": ("llama", {}, torch.bfloat16), "llama-tied-llama3": ("llama", dict(tie_word_embeddings=True, rope_parameters=LLAMA3), torch.float16),
    "llama-bias": ("llama", dict(attention_bias=True, mlp_bias=True), torch.float32), "mistral": ("mistral", dict(sliding_window=8), torch.float32),
    "qwen2": ("qwen2", {}, torch.bfloat16), "qwen3": ("qwen3", {}, torch.bfloat16), "phi3": ("phi3", {}, torch.bfloat16),
    "phi3-longrope": ("phi3", dict(rope_parameters=LONGROPE), torch.float32),
    "gemma2": ("gemma2", dict(sliding_window=8), torch.bfloat16), "gemma3": ("gemma3_text", dict(sliding_window=8), torch.bfloat16),
}
# As the goldens are: too narrow for bitsandbytes.
MULTIMODAL = "gemma3_multimodal"
TINY = GOLDEN.parent.parent / "examples/tiny"


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits.double()


def distance(found, wanted):
    apart = found - wanted
    return max((apart.norm() / wanted.norm()).item(), (apart.abs().max() / wanted.abs().max()).item())


def log_probs(scores, ids):
    return scores[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0].flatten()


def ours(ferrotune, ids, *flags):
    rows = [run(ferrotune, "score", "--device", "cpu", "--dtype", "f32", *flags, "--input-ids", json.dumps(row)) for row in ids.tolist()]
    return torch.tensor([value for row in rows for value in json.loads(row)["logprobs"]], dtype=torch.float64)


class Case:
    """One checkpoint with its adapter; `failed` where something was too far apart."""

    def __init__(self, name, ferrotune, source, dataset, vocab_size, place):
        self.name, self.ferrotune, self.source, self.place, self.failed = name, ferrotune, source, place, False
        self.adapter = place / "adapter"
        run(ferrotune, "train", "--device", "cpu", "--dtype", "float32", "--model", source, "--dataset", dataset, "--output-dir", self.adapter,
            "--target-modules", "all-linear", "--r", 4, "--lora-alpha", 16, "--learning-rate", 2e-2, "--max-steps", 4, "--max-seq-length", 64)
        draw = random.Random(1)
        self.ids = torch.tensor([[draw.randrange(3, vocab_size) for _ in range(40)] for _ in range(2)])

    def check(self, what, found, allowed):
        passed = found <= allowed
        self.failed |= not passed
        return f"{what} {found:.1e} (at most {allowed:.1e}{'' if passed else ', FAIL'})"

    def with_adapter(self, dtype):
        return peft.PeftModel.from_pretrained(load(self.source, dtype), self.adapter).eval()

    def export(self, form):
        out = self.place / form
        run(self.ferrotune, "export", "--device", "cpu", "--dtype", "f32", "--model", self.source, "--adapter", self.adapter, "--format", form,
            "--output-dir", out, "--max-kl", 10)
        return out

    def apart(self, scores, *flags):
        wanted = log_probs(scores, self.ids)
        return ((ours(self.ferrotune, self.ids, *flags) - wanted).abs().max() / wanted.abs().max()).item()

    @staticmethod
    def unlike(ours, theirs):
        """The share of packed bytes that differ. Where they do, the two sums W + s B A were rounded to different sides."""
        ours, theirs = tensors(ours), tensors(theirs)
        pairs = [(ours[name], theirs[name]) for name in theirs if theirs[name].dtype == torch.uint8 and name.endswith(".weight")]
        return sum((a != b).sum().item() for a, b in pairs) / sum(b.numel() for _, b in pairs)

    def run(self, four_bits):
        """The line of the table."""
        model = self.with_adapter(torch.float64)
        ref64 = logits(model, self.ids)
        with model.disable_adapter():
            effect = distance(logits(model, self.ids), ref64)
        apart = self.apart(logits(self.with_adapter(torch.float32), self.ids), "--model", self.source, "--adapter", self.adapter)
        cells = [f"adapter (changes the logits by {effect:.1e})" + self.check(":", apart, 1e-5)]
        self.failed |= effect < 1e-2

        exported = self.export("merged-16bit")
        merged = AutoModelForCausalLM.from_pretrained(exported, dtype="auto", attn_implementation="eager")
        dtype = merged.get_input_embeddings().weight.dtype
        summed = self.with_adapter(torch.float32).merge_and_unload()
        plain = copy.deepcopy(summed).to(dtype)
        allowed = max(2 * distance(logits(plain.double(), self.ids), ref64), FLOORS[dtype])
        found = distance(logits(merged.double().eval(), self.ids), ref64)
        cells.append(self.check(f"merged-16bit ({str(dtype)[6:]})", found, allowed))
        if four_bits:
            exported, dense, theirs = self.export("merged-4bit"), self.place / "dense", self.place / "theirs"
            # NF4 is made from what the checkpoint's own dtype holds, f32 included.
            stored = AutoModelForCausalLM.from_pretrained(self.source, dtype="auto").get_input_embeddings().weight.dtype
            summed.to(stored).save_pretrained(dense)
            config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                        bnb_4bit_compute_dtype=torch.float32)
            load(dense, stored, quantization_config=config).save_pretrained(theirs)
            allowed = max(2 * distance(logits(load(theirs), self.ids), ref64), FLOORS[dtype])
            scores = logits(load(exported), self.ids)
            cells.append(self.check("merged-4bit", distance(scores, ref64), allowed))
            cells.append(self.check("bytes unlike theirs", self.unlike(exported, theirs), 1e-3))
            cells.append(self.check("ferrotune on that file", self.apart(scores, "--model", exported), 1e-5))
        return f"{'FAIL' if self.failed else 'ok'} {self.name}: {'; '.join(cells)}"


def random_checkpoint(folder, model_type, keys, dtype):
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **BASE | keys, initializer_range=0.1))
    model.to(dtype).save_pretrained(folder)


def words(folder, vocab_size):
    """A tokenizer of one word an id, and texts in it."""
    add_tokenizer(folder, vocab_size)
    draw, path = random.Random(0), folder / "rows.jsonl"
    texts = [" ".join(f"w{draw.randrange(3, vocab_size)}" for _ in range(12)) for _ in range(8)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--ferrotune", default="target/release/ferrotune", type=pathlib.Path)
    arguments.add_argument("--only", default="")
    arguments = arguments.parse_args()
    ferrotune = arguments.ferrotune.resolve()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    failed = False
    for name in ["tiny", MULTIMODAL, *CASES]:
        if arguments.only and name not in arguments.only.split(","):
            continue
        with tempfile.TemporaryDirectory() as place:
            place = pathlib.Path(place)
            source = place / "source"
            if name == "tiny":
                shutil.copytree(TINY / "model", source)
                vocab, dataset = 512, TINY / "train.jsonl"
            elif name == MULTIMODAL:
                shutil.copytree(GOLDEN / name, source)
                vocab, dataset = 64, words(source, 64)
            else:
                random_checkpoint(source, *CASES[name])
                vocab, dataset = BASE["vocab_size"], words(source, BASE["vocab_size"])
            case = Case(name, ferrotune, source, dataset, vocab, place)
            print(case.run(four_bits=name != MULTIMODAL), flush=True)
            failed |= case.failed
    sys.exit(failed)


if __name__ == "__main__":
    main()
