#!/usr/bin/env python3
"""4-bit checkpoints both ways: those of `ferrotune quantize` in transformers + bitsandbytes, and theirs in ferrotune.

    scripts/check_nf4.py --ferrotune target/release/ferrotune

Of random models in several architectures and dtypes: the bytes of every weight and its quant_state against what
bitsandbytes makes of it on this CPU, and log-probabilities (computed in f32; at most 1e-5 apart). And the embedded model in dynamic 4-bit: the modules that its plan keeps are the
ones that transformers loads as plain layers. Needs a Python with
torch, transformers and bitsandbytes.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import bitsandbytes
import torch
import transformers
from bitsandbytes import functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

# In eval mode bitsandbytes computes in bf16 on processors that have AVX512-BF16, whatever compute_dtype says.
bitsandbytes.nn.modules.has_avx512bf16 = lambda: False
# Widths are multiples of 64: bitsandbytes 0.50.2 with AVX-512 reads rows of 16, 32, 96, .. elements wrongly.
BASE = dict(hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
            vocab_size=96, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
CASES = [("llama", {}, torch.bfloat16, "1GB"), ("llama", dict(tie_word_embeddings=True), torch.float16, "150KB"),
         ("qwen2", {}, torch.float32, "1GB"), ("qwen3", {}, torch.bfloat16, "200KB"), ("phi3", {}, torch.bfloat16, "1GB"),
         ("mistral", dict(sliding_window=8), torch.float32, "1GB"), ("gemma2", dict(sliding_window=8), torch.bfloat16, "1GB")]


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def load(folder, dtype=torch.float32, **keys):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager", **keys)
    for weight in model.parameters():
        if not isinstance(weight, bitsandbytes.nn.Params4bit):
            weight.data = weight.data.to(dtype)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
    return model.eval()


def distance(ferrotune, folder, input_ids, *flags):
    """The largest difference of a log-probability between ferrotune and transformers, relative to the largest one."""
    score = json.loads(run(ferrotune, "score", "--device", "cpu", "--dtype", "f32", "--model", folder, *flags, "--input-ids",
                           json.dumps(input_ids)))
    with torch.no_grad():
        logits = load(folder)(torch.tensor([input_ids])).logits[0, :-1]
    theirs = torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(input_ids[1:])[:, None])[:, 0]
    return ((torch.tensor(score["logprobs"], dtype=torch.float64) - theirs).abs().max() / theirs.abs().max()).item()


def tensors(folder):
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def compare_bytes(source, quantized):
    """Number of weights whose bytes are those of bitsandbytes; exits at the first that are not."""
    before, after = tensors(source), tensors(quantized)
    count = 0
    for key in after:
        name, found, kind = key.partition(".quant_state.")
        if not found:
            continue
        packed, state = F.quantize_4bit(before[name], quant_type="nf4", compress_statistics=True)
        wanted = state.as_dict(packed=True) | {"": packed}
        ours = json.loads(bytes(after[key].tolist()))
        theirs = json.loads(bytes(wanted.pop("quant_state." + kind).tolist()))
        if ours != theirs or any(not torch.equal(after[f"{name}.{part}".rstrip(".")], tensor) for part, tensor in wanted.items()):
            sys.exit(f"{quantized}: {name} differs from bitsandbytes' bytes: {ours} {theirs}")
        count += 1
    return count


def check_dynamic(ferrotune, model, place):
    """The distance of the embedded model in dynamic 4-bit; exits where transformers quantises other modules than the plan."""
    run(ferrotune, "quantize", "--device", "cpu", "--model", model, "--quant", "dynamic-nf4", "--output-dir", place)
    modules = json.loads((place / "dynamic_nf4.json").read_text())["modules"]
    kept = {module["loaded_as"] for module in modules if module["kept"]}
    loaded = {name for name, module in load(place).named_modules() if isinstance(module, torch.nn.Linear)
              and not isinstance(module, bitsandbytes.nn.Linear4bit)} - {"lm_head"}
    if not kept or kept != loaded:
        sys.exit(f"{place}: the plan keeps {sorted(kept)}, transformers loads {sorted(loaded)} unquantised")
    compare_bytes(model, place)
    found = distance(ferrotune, place, [1, 57, 300, 8, 44, 260, 99, 17, 5])
    print(f"dynamic 4-bit of {model}: {', '.join(sorted(kept))} kept; log-probabilities {found:.1e}", flush=True)
    return found


def main():
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--ferrotune", default="target/release/ferrotune")
    ferrotune = arguments.parse_args().ferrotune
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    worst = 0
    for model_type, keys, dtype, shards in CASES:
        with tempfile.TemporaryDirectory() as place:
            source, ours, theirs = (pathlib.Path(place) / name for name in ("source", "ours", "theirs"))
            torch.manual_seed(7)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **BASE | keys, initializer_range=0.3))
            model.to(dtype).save_pretrained(source, max_shard_size=shards)
            input_ids = torch.randint(3, 96, (40,)).tolist()
            run(ferrotune, "quantize", "--device", "cpu", "--model", source, "--output-dir", ours)
            config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                        bnb_4bit_compute_dtype=torch.float32)
            load(source, dtype, quantization_config=config).save_pretrained(theirs)
            weights = compare_bytes(source, ours)
            found = {"ours": distance(ferrotune, ours, input_ids), "theirs": distance(ferrotune, theirs, input_ids)}
            print(f"{model_type:8} {str(dtype)[6:]:9} {weights:3} weights, same bytes; log-probabilities of ours {found['ours']:.1e}, "
                  f"of theirs {found['theirs']:.1e}", flush=True)
            worst = max(worst, *found.values())
    model = pathlib.Path(__file__).resolve().parent.parent / "examples/tiny/model"
    with tempfile.TemporaryDirectory() as place:
        worst = max(worst, check_dynamic(ferrotune, model, pathlib.Path(place) / "dynamic"))
    if not worst <= 1e-5:
        sys.exit(f"{worst:.1e} apart, allowed 1e-5")


if __name__ == "__main__":
    main()
