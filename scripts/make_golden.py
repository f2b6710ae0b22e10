#!/usr/bin/env python3
"""Writes tests/golden: tiny random checkpoints and adapters with what transformers and peft compute from them.

Needs torch 2.11, transformers 5 and peft (nothing of this is needed to build, test or use Ferrotune). All in
float32 on the CPU with eager attention; every value is checked against the same model in float64 before it is
written, and every configured feature against the model without it, so that a golden cannot pass by not caring.

<checkpoint>/config.json, model.safetensors   as transformers 5 writes them
             config_v4.json                   the same model in the words of transformers 4
             golden[_long].safetensors        input_ids [T], logits [T, V]
             gradients.safetensors            loss (mean cross-entropy), grad.<weight> for every weight
adapters/<name>/adapter_config.json, adapter_model.safetensors   as peft writes them
             golden.safetensors               input_ids [T], logits [T, V] with the adapter
             train.safetensors                30 padded batches and the AdamW steps that peft takes on them
reward_models/<name>                          scripts/golden_reward_model.py
preference, grpo.safetensors                  scripts/golden_dpo.py, scripts/golden_grpo.py (trl)
The metadata of each .safetensors file made here names the versions, the seed and the distance to float64.

usage: scripts/make_golden.py [--only NAME ...]
"""
import argparse
import copy
import json
import pathlib
import re
import shutil
import zlib

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden"
VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
# Every golden stays in the repository for ever: small is a feature.
LIMIT = 100_000

BASE = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=64, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
WIDE_HEADS = BASE | dict(num_attention_heads=2, num_key_value_heads=1)  # head_dim 16: 8 rotary frequencies
PHI = WIDE_HEADS | dict(original_max_position_embeddings=32)
GEMMA = WIDE_HEADS | dict(num_hidden_layers=3, intermediate_size=24, head_dim=16, query_pre_attn_scalar=24,
                    sliding_window=8, rms_norm_eps=1e-6)
LONGROPE = dict(rope_type="longrope", rope_theta=10000.0,
                short_factor=[1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0], long_factor=[1.0, 1.3, 1.9, 2.8, 4.0, 5.5, 7.0, 8.0])
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)


def rope(rope_type, **keys):
    return dict(rope_parameters=dict(rope_type=rope_type, rope_theta=10000.0, **keys))


# name -> (model_type, config, what must matter: config entries that change the logits when replaced,
#          options: length (T), long (a second T), gradients, dtype, shards)
CHECKPOINTS = {
    "llama": ("llama", BASE | dict(num_key_value_heads=4), [], dict(gradients=True)),
    "llama_gqa_llama3": ("llama", WIDE_HEADS | dict(rope_parameters=LLAMA3, tie_word_embeddings=True, rms_norm_eps=1e-5),
                         [rope("default") | dict(rope_parameters=dict(rope_type="default", rope_theta=500000.0))],
                         dict(gradients=True)),
    "llama_bias": ("llama", BASE | dict(attention_bias=True, mlp_bias=True, head_dim=12), [], {}),
    "llama_rope_linear": ("llama", WIDE_HEADS | rope("linear", factor=4.0), [rope("default")], {}),
    "llama_rope_dynamic": ("llama", WIDE_HEADS | dict(max_position_embeddings=24) | rope("dynamic", factor=2.0), [],
                           dict(length=20, long=40)),
    "llama_rope_yarn": ("llama", WIDE_HEADS | rope("yarn", factor=4.0, original_max_position_embeddings=16),
                        [rope("default"), rope("yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=1.0)], {}),
    "llama_rope_yarn_mscale": ("llama", WIDE_HEADS | rope("yarn", factor=8.0, original_max_position_embeddings=32,
                               beta_fast=16.0, beta_slow=2.0, mscale=1.0, mscale_all_dim=0.5, truncate=False),
                               [rope("yarn", factor=8.0, original_max_position_embeddings=32)], {}),
    "llama_sharded": ("llama", BASE, [], dict(shards="36KB")),
    "llama_f16": ("llama", BASE, [], dict(dtype=torch.float16)),
    "llama_bf16": ("llama", BASE, [], dict(dtype=torch.bfloat16)),
    "mistral": ("mistral", BASE | dict(sliding_window=8, head_dim=12), [dict(sliding_window=None)], dict(gradients=True)),
    "mistral_full": ("mistral", BASE | dict(sliding_window=None, rope_parameters=dict(rope_type="default", rope_theta=1e6)), [], {}),
    "qwen2": ("qwen2", BASE | dict(use_sliding_window=False), [], dict(gradients=True)),
    "qwen2_sliding": ("qwen2", BASE | dict(num_hidden_layers=3, intermediate_size=24, use_sliding_window=True,
                      sliding_window=8, max_window_layers=1, tie_word_embeddings=True), [dict(layer_types=["full_attention"] * 3)], {}),
    "qwen3": ("qwen3", BASE | dict(head_dim=12, rope_parameters=dict(rope_type="default", rope_theta=1e6)), [], dict(gradients=True)),
    "phi3": ("phi3", BASE | dict(num_key_value_heads=4, sliding_window=8), [dict(sliding_window=None)], dict(gradients=True)),
    "phi3_longrope": ("phi3", PHI | dict(max_position_embeddings=128, rope_parameters=LONGROPE),
                      [rope("default")], dict(length=24, long=40)),
    "phi4": ("phi3", BASE | dict(rope_parameters=dict(rope_type="default", rope_theta=250000.0)), [], {}),
    "phi4_mini": ("phi3", PHI | dict(max_position_embeddings=128, tie_word_embeddings=True, rope_parameters=LONGROPE
                  | dict(partial_rotary_factor=0.75, short_factor=[1.0] * 6, long_factor=[1.0, 1.1, 1.6, 3.0, 5.0, 8.0])),
                  [dict(rope_parameters=LONGROPE | dict(partial_rotary_factor=1.0))], dict(length=24, long=40, gradients=True)),
    "gemma2": ("gemma2", GEMMA | dict(attn_logit_softcapping=5.0, final_logit_softcapping=20.0), [dict(attn_logit_softcapping=None), dict(final_logit_softcapping=None),
               dict(sliding_window=64), dict(query_pre_attn_scalar=16)], dict(gradients=True)),
    "gemma3": ("gemma3_text", GEMMA | dict(num_hidden_layers=4, intermediate_size=16, sliding_window_pattern=3, rope_parameters={
               "sliding_attention": dict(rope_type="default", rope_theta=10000.0),
               "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6)}),
               [dict(sliding_window=64), dict(query_pre_attn_scalar=16), dict(rope_parameters={
                "sliding_attention": dict(rope_type="default", rope_theta=1e6),
                "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6)}), dict(rope_parameters={
                "sliding_attention": dict(rope_type="default", rope_theta=10000.0),
                "full_attention": dict(rope_type="default", rope_theta=1e6)})], dict(gradients=True)),
}

# name -> (base checkpoint, LoraConfig arguments, options: train)
ADAPTERS = {
    "llama_all_linear": ("llama", dict(target_modules="all-linear"), dict(train=True)),
    "llama_rslora": ("llama", dict(target_modules=["q_proj", "v_proj"], use_rslora=True), {}),
    "llama_patterns": ("llama", dict(target_modules=["q_proj", "k_proj", "down_proj"], rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 3},
                       alpha_pattern={"k_proj": 3, "layers.0.self_attn.q_proj": 16}), {}),
    "llama_modules_to_save": ("llama", dict(target_modules=["q_proj", "up_proj"], modules_to_save=["embed_tokens", "lm_head"]), {}),
    "tied_modules_to_save": ("llama_gqa_llama3", dict(target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens", "lm_head"]), {}),
    "tied_embed_tokens": ("llama_gqa_llama3", dict(target_modules=["o_proj"], modules_to_save=["embed_tokens"]), {}),
    "llama_layers": ("llama", dict(target_modules=["o_proj", "gate_proj"], layers_to_transform=[1]), {}),
    "llama_regex": ("llama", dict(target_modules=r".*layers\.0\.(self_attn\.v_proj|mlp\.(up|down)_proj)"), {}),
    "llama_bias": ("llama_bias", dict(target_modules="all-linear"), {}),
    "phi3_all_linear": ("phi3", dict(target_modules="all-linear"), dict(train=True)),
    "gemma3_multimodal": ("gemma3_multimodal_old", dict(target_modules=r".*language_model.*\.(q_proj|down_proj)"), {}),
    "gemma2_all_linear": ("gemma2", dict(target_modules="all-linear"), dict(train=True)),
}


def rel(a, b):
    """||a-b|| / ||b||, the larger of the 2-norm's and the max-norm's."""
    a, b = a.double(), b.double()
    return max(((a - b).norm() / b.norm()).item(), ((a - b).abs().max() / b.abs().max()).item())


def seed_of(name):
    return zlib.crc32(name.encode()) % 2**31


def generator(name):
    return torch.Generator().manual_seed(seed_of(name))


def token_ids(name, length, vocab_size):
    return torch.randint(3, vocab_size, (length,), generator=generator(name))


def randomise(model, name):
    """Weights of unit gain, and norms, biases and embeddings far from the 1 and 0 that hide mistakes."""
    draw = generator(name)
    for key, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=draw)
        if key.endswith("bias"):
            weight.data = 0.5 * noise
        elif weight.dim() == 1:  # a norm; Gemma's are stored as w - 1
            weight.data = 0.3 * noise + (0.0 if "gemma" in model.config.model_type else 1.0)
        elif "embed_tokens" in key:
            weight.data = noise
        else:
            gain = 1.5 if re.search(r"q_proj|k_proj|qkv_proj", key) else 1.0  # attention that is not flat
            weight.data = gain * noise / weight.shape[-1] ** 0.5


def save(path, tensors, name, **about):
    metadata = {"format": "pt", "seed": str(seed_of(name))} | VERSIONS | {k: str(v) for k, v in about.items()}
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, path, metadata)
    # safetensors writes the metadata in the order of a hash map: sorted, the same run gives the same bytes.
    file = path.read_bytes()
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    header = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(len(header).to_bytes(8, "little") + header + file[8 + length :])


def logits_of(model, input_ids):
    with torch.no_grad():
        return model(input_ids[None]).logits[0]


def load(folder, dtype=torch.float32, config=None):
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, attn_implementation="eager").eval()


def write_logits(path, model, input_ids, name):
    logits = logits_of(model, input_ids)
    exact = logits_of(copy.deepcopy(model).double(), input_ids)
    assert (distance := rel(logits, exact)) < 3e-6, (name, distance)
    save(path, {"input_ids": input_ids, "logits": logits}, name, distance_to_float64=distance)
    return logits


def gradients(model, input_ids):
    model = copy.deepcopy(model)
    loss = model(input_ids[None], labels=input_ids[None]).loss
    loss.backward()
    return {"loss": loss} | {f"grad.{key}": weight.grad for key, weight in model.named_parameters()}


def write_gradients(path, model, input_ids, name):
    ours, exact = gradients(model, input_ids), gradients(copy.deepcopy(model).double(), input_ids)
    distance = max(rel(ours[key], exact[key]) for key in ours)
    assert distance < 5e-6, (name, distance)
    save(path, ours | {"input_ids": input_ids}, name, distance_to_float64=distance)


def in_words_of_transformers_4(config):
    """config.json as the hub has it from before transformers 5: rope_theta and rope_scaling at the top, and, as in
    Gemma 3's, nothing that equals the default."""
    defaults = AutoConfig.for_model(config["model_type"]).to_dict() | {"rope_scaling": None, "partial_rotary_factor": 1.0}
    defaults["rope_theta"] = 1e6 if config["model_type"] == "gemma3_text" else 1e4
    defaults["rope_local_base_freq"] = 1e4
    config = copy.deepcopy(config)
    dtype = config.pop("dtype", "float32")
    for key in ("transformers_version", "_sliding_window_pattern"):
        config.pop(key, None)
    if config["model_type"] in ("llama", "mistral"):  # derived when absent; a default of their own elsewhere
        defaults["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    if config["model_type"] in ("llama", "phi3"):
        defaults["num_key_value_heads"] = config["num_attention_heads"]
    layer_types = config.pop("layer_types", None)
    scaling = config.pop("rope_parameters")
    if config["model_type"] == "gemma3_text":
        config["rope_local_base_freq"] = scaling["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = layer_types.index("full_attention") + 1
        scaling = scaling["full_attention"]
    if config["model_type"] == "qwen2" and not config["use_sliding_window"]:
        config["sliding_window"] = 8  # stated by every Qwen2 on the hub, and switched off by use_sliding_window
    config["rope_theta"] = scaling.pop("rope_theta")
    rope_type = scaling.pop("rope_type")
    if config["model_type"] == "phi3":
        config["partial_rotary_factor"] = scaling.pop("partial_rotary_factor", 1.0)
        scaling.pop("original_max_position_embeddings", None)  # stands at the top already
    # "rope_type" came with Llama 3.1; older files say "type".
    word = "rope_type" if rope_type in ("llama3", "linear") else "type"
    config["rope_scaling"] = {word: rope_type} | scaling if rope_type != "default" else None
    absent = object()
    config = {key: value for key, value in config.items() if key == "model_type" or defaults.get(key, absent) != value}
    return config | {"torch_dtype": dtype, "transformers_version": "4.51.3"}


def make_checkpoint(name):
    model_type, keys, ablations, options = CHECKPOINTS[name]
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    config = AutoConfig.for_model(model_type, **copy.deepcopy(keys))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    randomise(model, name)
    dtype = options.get("dtype", torch.float32)
    model.to(dtype).save_pretrained(folder, max_shard_size=options.get("shards", "1GB"))
    (folder / "generation_config.json").unlink(missing_ok=True)

    model = load(folder)
    input_ids = token_ids(name, options.get("length", 32), config.vocab_size)
    logits = write_logits(folder / "golden.safetensors", model, input_ids, name)
    for change in ablations:
        other = AutoConfig.for_model(model_type, **copy.deepcopy(keys | change))
        assert rel(logits_of(load(folder, config=other), input_ids), logits) > 1e-3, (name, change)
    if long := options.get("long"):
        write_logits(folder / "golden_long.safetensors", load(folder), token_ids(name, long, config.vocab_size), name)
    if options.get("gradients"):
        write_gradients(folder / "gradients.safetensors", model, input_ids, name)

    v4 = in_words_of_transformers_4(json.loads((folder / "config.json").read_text()))
    (folder / "config_v4.json").write_text(json.dumps(v4, indent=2) + "\n")
    same = load(folder, config=AutoConfig.from_pretrained(folder / "config_v4.json"))
    assert torch.equal(logits_of(same, input_ids), logits), name


def make_gemma3_multimodal(name):
    """The text part of a Gemma 3 with a vision tower: `text_config`, and a prefix on each tensor's name."""
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    text = GEMMA | dict(intermediate_size=16, sliding_window_pattern=2)
    vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=63,
                                       boi_token_index=62, eoi_token_index=61)
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").float().eval()
    randomise(model, "gemma3_multimodal")  # the same weights under both layouts of names
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    weights = {key: weight.detach() for key, weight in model.named_parameters() if key != "lm_head.weight"}
    if name == "gemma3_multimodal_old":
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["text_config"] = in_words_of_transformers_4(config["text_config"])
        config |= {"torch_dtype": config.pop("dtype"), "transformers_version": "4.51.3"}
        path.write_text(json.dumps(config, indent=2) + "\n")
        weights = {re.sub(r"^model\.language_model\.", "language_model.model.",
                          re.sub(r"^model\.(?!language_model)", "", key)): weight for key, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model = transformers.Gemma3ForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    write_logits(folder / "golden.safetensors", model, token_ids(name, 32, 60), name)


def make_adapter(name):
    base, keys, options = ADAPTERS[name]
    folder = GOLDEN / "adapters" / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(seed_of(name))
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, bias="none", **keys)
    model = peft.get_peft_model(load(GOLDEN / base), config)
    trainable = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    for key, weight in trainable.items():
        if "lora_B" in key:  # zero in peft, which would hide the adapter and the gradients of A
            weight.data.normal_(0, 0.1)
        elif "modules_to_save" in key:
            weight.data += 0.1 * torch.randn_like(weight)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()
    path = folder / "adapter_config.json"
    written = json.loads(path.read_text())
    if isinstance(written["target_modules"], list):
        written["target_modules"].sort()  # a Python set: another order in every run
    path.write_text(json.dumps(written, indent=2) + "\n")
    # A multimodal config has no vocab_size at its top; its ids from 60 on stand for images.
    input_ids = token_ids(name, 32, getattr(model.config, "vocab_size", 60))
    logits = write_logits(folder / "golden.safetensors", model, input_ids, name)
    again = peft.PeftModel.from_pretrained(load(GOLDEN / base), folder)
    assert torch.equal(logits_of(again, input_ids), logits), name
    assert rel(logits_of(load(GOLDEN / base), input_ids), logits) > 1e-2, name
    if options.get("train"):
        write_training(folder / "train.safetensors", model, name)


def batches(name, steps, rows, vocab_size, longest=16):
    """[steps, rows, longest] of counting sequences, a prompt of -100 labels in each, padded with id 0 and label -100."""
    draw = generator(name)
    number = lambda low, high: int(torch.randint(low, high, (1,), generator=draw))
    input_ids = torch.zeros(steps, rows, longest, dtype=torch.int64)
    labels = torch.full_like(input_ids, -100)
    lengths = torch.zeros(steps, rows, dtype=torch.int64)
    for step in range(steps):
        for row in range(rows):
            length, start, stride = number(6, longest + 1), number(0, vocab_size), number(1, 4)
            ids = 3 + (start + stride * torch.arange(length)) % (vocab_size - 3)
            prompt = number(0, 4)
            input_ids[step, row, :length] = ids
            labels[step, row, prompt:length] = ids[prompt:]
            lengths[step, row] = length
    return input_ids, labels, lengths


def train(model, input_ids, labels, adamw):
    """AdamW steps. No attention mask: padding stands on the right, where causal attention never sees it, and with a
    mask transformers gives NaN for a sliding window that holds nothing but padding."""
    weights = {key.replace("base_model.model.", "").replace(".default", ""): weight
               for key, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), **adamw)
    losses, out = [], {}
    for step in range(len(input_ids)):
        optimizer.zero_grad()
        loss = model(input_ids[step], labels=labels[step]).loss
        loss.backward()
        if step == 0:
            out |= {f"grad.{key}": weight.grad.clone() for key, weight in weights.items()}
        optimizer.step()
        losses.append(loss.detach().double())
    return out | {f"final.{key}": weight.detach().clone() for key, weight in weights.items()}, torch.stack(losses)


def write_training(path, model, name):
    input_ids, labels, lengths = batches(name, 30, 4, model.config.vocab_size)
    adamw = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    exact_model = copy.deepcopy(model).double()
    ours, losses = train(model, input_ids, labels, adamw)
    exact, exact_losses = train(exact_model, input_ids, labels, adamw)
    loss_distance = ((losses - exact_losses).abs() / exact_losses).max().item()
    gradient_distance = max(rel(ours[key], exact[key]) for key in ours if key.startswith("grad."))
    assert loss_distance < 1e-5 and gradient_distance < 3e-6, (name, loss_distance, gradient_distance)
    assert losses[-5:].mean() < losses[:5].mean(), (name, losses)
    save(path, ours | {"losses": losses, "input_ids": input_ids, "labels": labels, "lengths": lengths}, name,
         adamw=json.dumps(adamw), loss_distance_to_float64=loss_distance, gradient_distance_to_float64=gradient_distance)


def main():
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--only", nargs="+", default=[], metavar="NAME", help="a checkpoint, or adapters/NAME")
    only = arguments.parse_args().only
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    jobs = {name: make_checkpoint for name in CHECKPOINTS}
    jobs |= {name: make_gemma3_multimodal for name in ("gemma3_multimodal", "gemma3_multimodal_old")}
    import golden_reward_model  # it uses this module
    jobs |= {f"reward_models/{name}": golden_reward_model.make for name in golden_reward_model.CLASSIFIERS}
    jobs |= {f"adapters/{name}": lambda path: make_adapter(path.removeprefix("adapters/")) for name in ADAPTERS}
    if not only or {"preference", "grpo"} & set(only):  # trl takes seconds to load
        import golden_dpo
        import golden_grpo
        jobs |= {"preference": golden_dpo.make, "grpo": golden_grpo.make}
    for name, make in jobs.items():
        if not only or name in only:
            make(name)
            files = sorted((GOLDEN / name).iterdir()) if (GOLDEN / name).is_dir() else [GOLDEN / f"{name}.safetensors"]
            sizes = {file.name: file.stat().st_size for file in files}
            assert max(sizes.values()) < LIMIT, (name, sizes)
            print(f"{name:32} {sum(sizes.values()) / 1000:6.1f} kB", flush=True)


if __name__ == "__main__":
    main()
