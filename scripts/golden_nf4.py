#!/usr/bin/env python3
"""Writes tests/golden/nf4 and tests/golden/adapters/llama_nf4: what bitsandbytes makes of matrices and models.

Needs what make_golden.py needs, and bitsandbytes (the version stands in the metadata). All on the CPU, on one thread.

nf4/matrices.safetensors     <case>.weight before, and quant_state's tensors after: <case>.packed, .absmax, ..
   dequantized.safetensors   <case>.<dtype>: what bitsandbytes reads back
   source/                   a random llama in bf16. Its rows are multiples of 64: bitsandbytes 0.50.2 on a processor with
                             AVX-512 reads rows of 16, 32, 96, .. elements wrongly
   <model>/                  source as transformers + bitsandbytes save it, with logits computed in f32
adapters/llama_nf4           a LoRA adapter on nf4/nested, its logits and 30 steps of AdamW, as adapters/ has them

usage: scripts/golden_nf4.py
"""
import json
import pathlib
import shutil

import bitsandbytes
import peft
import torch
import transformers
from bitsandbytes import functional as F
from transformers import BitsAndBytesConfig

import make_golden as golden

golden.VERSIONS["bitsandbytes"] = bitsandbytes.__version__
NF4 = golden.GOLDEN / "nf4"
# In eval mode bitsandbytes computes in bf16 on processors that have AVX512-BF16, whatever compute_dtype says.
bitsandbytes.nn.modules.has_avx512bf16 = lambda: False

SOURCE = golden.BASE | dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
                           num_key_value_heads=1)
# name -> BitsAndBytesConfig beside the defaults
MODELS = {
    "nested": dict(bnb_4bit_use_double_quant=True),
    "plain_bf16_storage": dict(bnb_4bit_use_double_quant=False, bnb_4bit_quant_storage=torch.bfloat16),
    "mixed": dict(bnb_4bit_use_double_quant=True,
                  llm_int8_skip_modules=["lm_head", "model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj"]),
}


def matrices():
    draw = golden.generator("nf4")
    normal = lambda *shape: torch.randn(shape, generator=draw)
    spread = normal(40, 64)
    spread[7] = 0  # a whole block of zeros
    spread[8:12] *= 1e-30
    spread[12:16] *= 1e30
    ties = torch.tensor([-1.0, -0.8480964, -0.6106329, 0.0, 0.03979015, 0.5016634, 0.8614784, 1.0]).repeat(8, 8)
    return {
        "f32_odd": normal(5, 13),
        "f32_one_block": normal(3, 7),
        "f32_zeros": torch.zeros(4, 33),
        "f32_equal": torch.full((8, 32), 0.25),
        "f32_zero_tail": torch.cat([normal(2, 50), torch.zeros(1, 50)]),
        "f32_spread": spread,
        "f32_ties": ties,
        "f32_tiny": normal(6, 64) * 1e-40,
        "bf16_many_blocks": normal(270, 64).bfloat16(),
        "bf16_rows_of_20": normal(33, 20).bfloat16(),
        "f16": normal(40, 24).half(),
    }


def write_matrices():
    out, back = {}, {}
    for name, weight in matrices().items():
        packed, state = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        out |= {f"{name}.weight": weight, f"{name}.packed": packed, f"{name}.absmax": state.absmax,
                f"{name}.nested_absmax": state.state2.absmax, f"{name}.nested_offset": state.offset,
                "quant_map": state.code, "nested_quant_map": state.state2.code}
        if weight.numel() < 3000:
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                state.dtype = dtype
                # Its own loops for odd widths and the rest differ in nothing but speed.
                back[f"{name}.{str(dtype)[6:]}"] = F.dequantize_4bit(packed, state).reshape(weight.shape)
    golden.save(NF4 / "matrices.safetensors", out, "nf4")
    golden.save(NF4 / "dequantized.safetensors", back, "nf4")


def load(folder, dtype=torch.float32, **keys):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager", **keys)
    for weight in model.parameters():
        if isinstance(weight, bitsandbytes.nn.Params4bit):
            weight.quant_state.dtype = dtype  # the backward rounds to this one, the forward to that of its input
        else:
            weight.data = weight.data.to(dtype)  # beside quantised weights the rest stays as the checkpoint has it
    return model.eval()


def write_source():
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SOURCE)).float()
    golden.randomise(model, "nf4/source")
    model.bfloat16().save_pretrained(NF4 / "source")
    (NF4 / "source/generation_config.json").unlink(missing_ok=True)


def exact(model):
    """The same model with its dequantised weights, in f64."""
    dense = load(NF4 / "source")
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = F.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert golden.rel(weight, dense.get_submodule(name).weight) < 0.2, name
            dense.get_submodule(name).weight.data = weight
    return dense.double()


def write_logits(path, model, exact_model, input_ids, name):
    logits, reference = golden.logits_of(model, input_ids), golden.logits_of(exact_model, input_ids)
    assert (distance := golden.rel(logits, reference)) < 3e-6, (name, distance)
    golden.save(path, {"input_ids": input_ids, "logits": logits}, name, distance_to_float64=distance)
    return logits


def write_model(name, keys):
    folder = NF4 / name
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, **keys)
    load(NF4 / "source", torch.bfloat16, quantization_config=config).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    model = load(folder)
    input_ids = golden.token_ids("nf4", 32, model.config.vocab_size)
    logits = write_logits(folder / "golden.safetensors", model, exact(model), input_ids, "nf4")
    assert golden.rel(golden.logits_of(load(NF4 / "source"), input_ids), logits) > 1e-2, name


def write_adapter():
    name, base = "llama_nf4", "nf4/nested"
    folder = golden.GOLDEN / "adapters" / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(golden.seed_of(name))
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, bias="none", target_modules="all-linear")
    model = peft.get_peft_model(load(golden.GOLDEN / base), config)
    for key, weight in model.named_parameters():
        if "lora_B" in key:
            weight.data.normal_(0, 0.1)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()
    path = folder / "adapter_config.json"
    written = json.loads(path.read_text())
    written["target_modules"].sort()
    path.write_text(json.dumps(written, indent=2) + "\n")
    reference = lambda: peft.PeftModel.from_pretrained(exact(load(golden.GOLDEN / base)), folder, is_trainable=True).double()
    input_ids = golden.token_ids(name, 32, model.config.vocab_size)
    write_logits(folder / "golden.safetensors", model, reference(), input_ids, name)

    input_ids, labels, lengths = golden.batches(name, 30, 4, model.config.vocab_size)
    adamw = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    ours, losses = golden.train(model, input_ids, labels, adamw)
    truth, exact_losses = golden.train(reference(), input_ids, labels, adamw)
    loss_distance = ((losses - exact_losses).abs() / exact_losses).max().item()
    gradient_distance = max(golden.rel(ours[key], truth[key]) for key in ours if key.startswith("grad."))
    assert loss_distance < 1e-5 and gradient_distance < 3e-6, (loss_distance, gradient_distance)
    golden.save(folder / "train.safetensors", ours | {"losses": losses, "input_ids": input_ids, "labels": labels, "lengths": lengths},
                name, adamw=json.dumps(adamw), loss_distance_to_float64=loss_distance, gradient_distance_to_float64=gradient_distance)


def main():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    shutil.rmtree(NF4, ignore_errors=True)
    NF4.mkdir(parents=True)
    write_matrices()
    write_source()
    for name, keys in MODELS.items():
        write_model(name, keys)
    write_adapter()
    for file in sorted([*NF4.rglob("*"), *(golden.GOLDEN / "adapters/llama_nf4").iterdir()]):
        if file.is_file():
            assert file.stat().st_size < golden.LIMIT, file
            print(f"{file.relative_to(golden.GOLDEN)!s:48} {file.stat().st_size / 1000:6.1f} kB")


if __name__ == "__main__":
    main()
