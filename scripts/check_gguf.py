#!/usr/bin/env python3
"""GGUF files of `ferrotune export` in llama.cpp, and beside what its own quantiser makes of the same model.

    scripts/check_gguf.py --ferrotune target/release/ferrotune [--only llama,gemma3] [--table FILE]

Of the embedded model and of random models of every architecture, 256 or 512 wide:

- f32: llama.cpp's log-probabilities and greedy tokens are those of ferrotune on the checkpoint; of the embedded model also in f16, bf16, q8_0;
- Gemma, f32: llama.cpp's CPU takes GELU from a table whose argument and value are f16. Transformers must agree with ferrotune as it is, and with
  llama.cpp once its GELU is rounded like that table;
- every type: the same ggml type for each tensor as llama.cpp's quantiser chooses; F32, F16, BF16 and Q8_0 tensors equal to the byte;
- q4_0 .. q6_k: the error of all weights is at most 1 % above that of llama.cpp's file, and so is the embedded model's perplexity;
- LoRA as a GGUF adapter: llama.cpp's tokens are those of ferrotune with the adapter.

Needs a Python with llama-cpp-python (0.3.36 was used; its llama.cpp builds in minutes), gguf, numpy and safetensors; for Gemma also transformers.
"""
import argparse
import ctypes
import json
import math
import pathlib
import subprocess
import sys
import tempfile
import time

import gguf
import llama_cpp
import numpy as np
from safetensors.numpy import save_file

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = ROOT / "examples/tiny/model"
# llama.cpp's numbers of file types
FTYPES = dict(f16=1, bf16=32, q8_0=7, q4_0=2, q4_1=3, q5_0=8, q5_1=9, q2_k=10, q3_k_s=11, q3_k_m=12, q3_k_l=13, q4_k_s=14,
              q4_k_m=15, q5_k_s=16, q5_k_m=17, q6_k=18)
# Of random models: what their names promise is the same for all.
RANDOM = ["f16", "bf16", "q8_0", "q4_0", "q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k"]
EXACT = {"F32", "F16", "BF16", "Q8_0"}
# llama.cpp rounds contexts up to a multiple of 256.
CONTEXT = 256
BASE = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
            vocab_size=512, max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=10000.0, bos_token_id=0, eos_token_id=2,
            tie_word_embeddings=False, hidden_act="silu")
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=128)
GEMMA = dict(hidden_act="gelu_pytorch_tanh", query_pre_attn_scalar=64, tie_word_embeddings=True, sliding_window=32)
MODELS = {
    "llama": dict(model_type="llama"),
    "llama-3.1": dict(model_type="llama", rope_scaling=LLAMA3, rope_theta=500000.0, num_key_value_heads=1),
    "llama-linear": dict(model_type="llama", rope_scaling=dict(rope_type="linear", factor=4.0), attention_bias=True, mlp_bias=True),
    "llama-yarn": dict(model_type="llama", rope_scaling=YARN),
    "llama-192": dict(model_type="llama", hidden_size=192, num_attention_heads=3, num_key_value_heads=1, intermediate_size=416),
    "mistral": dict(model_type="mistral", sliding_window=None, head_dim=32, hidden_size=512),
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen3": dict(model_type="qwen3", head_dim=32),
    "phi3": dict(model_type="phi3", num_key_value_heads=2, sliding_window=None),
    # Within the original context llama.cpp takes the short factors and ferrotune, too; past it both take the long ones.
    "phi3-longrope": dict(model_type="phi3", original_max_position_embeddings=CONTEXT, rope_scaling=dict(
        type="longrope", short_factor=[1.0 + 0.05 * i for i in range(24)], long_factor=[1.0 + 0.5 * i for i in range(24)]),
        partial_rotary_factor=0.75),
    "gemma2": dict(model_type="gemma2", attn_logit_softcapping=50.0, final_logit_softcapping=30.0, **GEMMA),
    "gemma3": dict(model_type="gemma3_text", rope_local_base_freq=10000.0, **(GEMMA | dict(rope_theta=1000000.0))),
}
FAILURES = []
# Largest difference of a log-probability. Gemma's is larger, by llama.cpp's doing: see `transformers_log_probs`.
LIMIT = 2e-3
PROMPT, NEW_TOKENS = "Once upon a time there were 12 cats", 24


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def random_model(folder, changes):
    """A checkpoint with random weights, peaked enough that its greedy tokens are no ties."""
    config = BASE | changes
    folder.mkdir()
    kind = config["model_type"]
    hidden, ff, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv, vocab = config["num_attention_heads"], config["num_key_value_heads"], config["vocab_size"]
    generator = np.random.default_rng(len(json.dumps(config)))
    gemma, tensors = kind.startswith("gemma"), {}

    def matrix(name, rows, columns, gain=1.0, bias=False):
        tensors[f"{name}.weight"] = (generator.standard_normal((rows, columns)) * gain / math.sqrt(columns)).astype(np.float32)
        if bias:
            tensors[f"{name}.bias"] = (generator.standard_normal(rows) * 0.3).astype(np.float32)

    def norm(name, size):
        tensors[f"{name}.weight"] = (generator.random(size) * 0.4 + (-0.2 if gemma else 0.8)).astype(np.float32)

    matrix("model.embed_tokens", vocab, hidden, math.sqrt(hidden) * (0.3 if gemma else 1.0))
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        attention_bias = config.get("attention_bias", False)
        if kind == "phi3":
            matrix(f"{at}.self_attn.qkv_proj", (heads + 2 * kv) * dim, hidden, 1.5)
            matrix(f"{at}.mlp.gate_up_proj", 2 * ff, hidden)
        else:
            for name, rows in (("q", heads), ("k", kv), ("v", kv)):
                matrix(f"{at}.self_attn.{name}_proj", rows * dim, hidden, 1.5, attention_bias or kind == "qwen2")
            for name in ("gate", "up"):
                matrix(f"{at}.mlp.{name}_proj", ff, hidden, 1.0, config.get("mlp_bias", False))
        matrix(f"{at}.self_attn.o_proj", hidden, heads * dim, 1.0, attention_bias)
        matrix(f"{at}.mlp.down_proj", hidden, ff, 1.0, config.get("mlp_bias", False))
        for name in ["input_layernorm", "post_attention_layernorm"] + (["pre_feedforward_layernorm", "post_feedforward_layernorm"] if gemma else []):
            norm(f"{at}.{name}", hidden)
        if kind in ("qwen3", "gemma3_text"):
            norm(f"{at}.self_attn.q_norm", dim)
            norm(f"{at}.self_attn.k_norm", dim)
    norm("model.norm", hidden)
    if not config["tie_word_embeddings"]:
        matrix("lm_head", vocab, hidden, 3.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TINY / name).read_bytes())


class Model:
    """llama.cpp on a file: all logits of a sequence of ids; keys and values in f32."""

    def __init__(self, path, lora=None, context=CONTEXT):
        self.llama = llama_cpp.Llama(str(path), n_ctx=context, n_batch=context, logits_all=True, verbose=False, n_threads=2, seed=0,
                                     type_k=0, type_v=0, flash_attn=False, lora_path=str(lora) if lora else None)

    def log_probs(self, ids):
        self.llama.reset()
        self.llama.eval(ids)
        logits = np.array(self.llama.scores[:len(ids)], dtype=np.float64)
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def of_text(self, ids):
        """Log-probabilities of `ids[1:]`."""
        return self.log_probs(ids)[np.arange(len(ids) - 1), ids[1:]]

    def ids(self, text):
        return self.llama.tokenize(text.encode(), add_bos=True, special=True)

    def greedy_text(self):
        ids = self.ids(PROMPT)
        start = len(ids)
        self.llama.reset()
        self.llama.eval(ids)
        for _ in range(NEW_TOKENS):
            ids.append(int(self.llama.scores[len(ids) - 1].argmax()))
            self.llama.eval(ids[-1:])
        return self.llama.detokenize(ids[start:], prev_tokens=ids[:start]).decode(errors="replace").rstrip("\n\ufffd")

    def perplexity(self, texts):
        losses = [-self.of_text(ids) for ids in texts]
        return math.exp(np.concatenate(losses).mean())


def score(ferrotune, model, ids, *flags):
    return json.loads(run(ferrotune, "score", "--device", "cpu", "--dtype", "f32", "--model", model, *flags, "--input-ids", json.dumps(ids)))["logprobs"]


def greedy_text(ferrotune, model, *flags):
    return run(ferrotune, "generate", "--device", "cpu", "--dtype", "f32", "--model", model, "--raw", "--ignore-eos", "--temperature", "0",
               "--max-new-tokens", NEW_TOKENS, "--prompt", PROMPT, *flags).rstrip("\n\ufffd")


def tensors(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def rmse(quantized, exact):
    total = 0.0
    for name, tensor in quantized.items():
        if tensor.tensor_type.name not in EXACT:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            total += float(((values - exact[name].data.reshape(values.shape)).astype(np.float64) ** 2).sum())
    return math.sqrt(total)


def distance(ferrotune, model, llama, ids):
    return apart(np.array(score(ferrotune, model, ids)), llama.of_text(ids))


def apart(a, b):
    return float(np.abs(a - b).max())


def transformers_log_probs(model, ids):
    """Log-probabilities of `ids[1:]` in f32 by transformers: as it is, and with GELU's argument and value rounded to f16."""
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()

    @torch.no_grad()
    def log_probs():
        logits = network(torch.tensor([ids])).logits[0].double()
        return logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].numpy()

    plain = log_probs()
    for layer in network.model.layers:
        layer.mlp.act_fn.register_forward_pre_hook(lambda _, args: (args[0].half().float(),))
        layer.mlp.act_fn.register_forward_hook(lambda _, args, value: value.half().float())
    return plain, log_probs()


def check_gelu(name, ferrotune, model, llama, ids):
    """That llama.cpp's table is what keeps it apart from ferrotune; words for the table of results."""
    plain, rounded = transformers_log_probs(model, ids)
    ours, theirs = apart(plain, np.array(score(ferrotune, model, ids))), apart(rounded, llama.of_text(ids))
    for what, found in (("ferrotune", ours), ("llama.cpp, its GELU rounded to f16,", theirs)):
        if not found <= LIMIT:
            FAILURES.append(f"{name}: log-probabilities of transformers and {what} are {found} apart")
    return f"; transformers to ferrotune {ours:.1e}, with GELU through f16 to llama.cpp {theirs:.1e}"


def check(name, ferrotune, model, place):
    """Rows of the table."""
    out = place / f"{name}-gguf"
    methods = ["f32", *(FTYPES if name == "tiny" else RANDOM)]
    run(ferrotune, "export", "--device", "cpu", "--model", model, "--format", "gguf", "--quantization-method", ",".join(methods),
        "--output-dir", out, "--max-kl", "1e3")
    files = {method: next(out.glob(f"*.{method.upper()}.gguf")) for method in methods}
    exact = tensors(files["f32"])
    base = Model(files["f32"])
    # What a text of chats says of a random model is little: few of them are enough.
    texts = [base.ids(text)[:200] for text in held_out()][:40 if name == "tiny" else 6]
    furthest = distance(ferrotune, model, base, texts[0])
    if name == "phi3-longrope":
        long_text = [token for text in held_out() for token in base.ids(text)][:CONTEXT + 44]
        furthest = max(furthest, distance(ferrotune, model, Model(files["f32"], context=2 * CONTEXT), long_text))
    if not furthest <= LIMIT:
        FAILURES.append(f"{name}: log-probabilities of f32 in llama.cpp are {furthest} from ferrotune's")
    cause = check_gelu(name, ferrotune, model, base, texts[0]) if name.startswith("gemma") else ""
    wanted = greedy_text(ferrotune, model)
    if base.greedy_text() != wanted:
        sys.exit(f"{name}: f32: llama.cpp's greedy text {base.greedy_text()!r}, ferrotune's {wanted!r}")
    rows = [f"| {name} | f32 | largest log-prob difference {furthest:.1e}{cause} | | same greedy tokens |"]
    for method in methods[1:]:
        own = place / f"{name}-{method}.gguf"
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.nthread = FTYPES[method], 2
        if llama_cpp.llama_model_quantize(str(files["f32"]).encode(), str(own).encode(), params) != 0:
            sys.exit(f"{name}: llama.cpp cannot quantise to {method}")
        found, reference = tensors(files[method]), tensors(own)
        if found.keys() != reference.keys():
            sys.exit(f"{name} {method}: tensors differ: {found.keys() ^ reference.keys()}")
        equal = 0
        for key, tensor in found.items():
            other = reference[key]
            if tensor.tensor_type != other.tensor_type:
                sys.exit(f"{name} {method}: {key} is {tensor.tensor_type.name}, llama.cpp makes it {other.tensor_type.name}")
            same = np.array_equal(tensor.data.view(np.uint8), other.data.view(np.uint8))
            equal += same
            if tensor.tensor_type.name in EXACT and not same:
                sys.exit(f"{name} {method}: {key} ({tensor.tensor_type.name}) differs from llama.cpp's bytes")
        perplexity, theirs = Model(files[method]).perplexity(texts), Model(own).perplexity(texts)
        # 1 also where all tensors fell back to exact types.
        error = rmse(found, exact) / rmse(reference, exact) if rmse(reference, exact) > 0 else 1.0
        greedy = ""
        if method in ("f16", "bf16", "q8_0"):
            greedy = "same greedy tokens" if Model(files[method]).greedy_text() == wanted else "greedy tokens differ"
        # A random model amplifies every rounding: its perplexity and its greedy tokens say nothing of a quantiser, the error does.
        if error > 1.01:
            FAILURES.append(f"{name} {method}: the error is {error} times that of llama.cpp's file")
        if name == "tiny" and (perplexity > 1.01 * theirs or greedy == "greedy tokens differ"):
            FAILURES.append(f"{name} {method}: perplexity {perplexity}, llama.cpp's file has {theirs}; {greedy}")
        rows.append(f"| {name} | {method} | {perplexity:.4f} / {theirs:.4f} | {error:.4f} | {equal} of {len(found)} tensors equal {greedy} |")
        own.unlink()
    return rows


def check_lora(ferrotune, model, place):
    """A trained adapter on the embedded model: merged, and beside the base as a GGUF adapter."""
    adapter, out = place / "adapter", place / "adapter-gguf"
    run(ferrotune, "train", "--device", "cpu", "--model", model, "--dataset", ROOT / "examples/tiny/train.jsonl", "--output-dir", adapter,
        "--max-steps", 3, "--learning-rate", 1e-2, "--lora-alpha", 32, "--use-rslora")
    run(ferrotune, "export", "--device", "cpu", "--model", model, "--adapter", adapter, "--format", "gguf-lora", "--output-dir", out)
    run(ferrotune, "export", "--device", "cpu", "--model", model, "--format", "gguf", "--quantization-method", "f32", "--output-dir", place / "base-gguf")
    base = next((place / "base-gguf").glob("*.gguf"))
    wanted = greedy_text(ferrotune, model, "--adapter", adapter)
    found = Model(base, out / "adapter.gguf").greedy_text()
    if found != wanted or wanted == greedy_text(ferrotune, model):
        sys.exit(f"GGUF adapter: llama.cpp says {found!r}, ferrotune {wanted!r}")
    print(f"GGUF adapter: the same greedy text, {wanted!r}")


def held_out():
    """Texts of the embedded model's corpus."""
    chats = [json.loads(line)["messages"] for line in (ROOT / "examples/tiny/train.jsonl").read_text().splitlines()[:60]]
    turns = ["".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in chat) for chat in chats]
    return turns


def speed():
    """Elements a second of llama.cpp's quantiser on one thread, and its error: beside `cargo run --release --example measure_gguf`."""
    library = ctypes.CDLL(str(pathlib.Path(llama_cpp.llama_cpp._lib._name).parent / "libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    count, piece = 1 << 22, 1 << 16
    values = ((np.random.default_rng(1).random((count, 12), dtype=np.float32) - 0.5).sum(1) * np.float32(0.02)).astype(np.float32)
    for name in ("Q8_0", "Q4_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):
        kind = gguf.GGMLQuantizationType[name]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        out = np.zeros(count // block * size, np.uint8)
        fastest = math.inf
        for first in [*range(0, count, piece)] * 3:
            begun = time.perf_counter()
            library.ggml_quantize_chunk(int(kind), values.ctypes.data, out.ctypes.data, first, piece // 4096, 4096, None)
            fastest = min(fastest, time.perf_counter() - begun)
        read = gguf.quants.dequantize(out, kind).astype(np.float64).ravel()
        error = math.sqrt(((values - read) ** 2).sum() / (values.astype(np.float64) ** 2).sum())
        print(f"{name:5} {piece / fastest / 1e6:7.1f} M elements/s, relative error {error:.5f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ferrotune", type=pathlib.Path, default=ROOT / "target/release/ferrotune")
    parser.add_argument("--only", default="")
    parser.add_argument("--table", type=pathlib.Path)
    parser.add_argument("--speed", action="store_true", help="only measure llama.cpp's quantiser")
    args = parser.parse_args()
    if args.speed:
        return speed()
    rows = ["| model | type | perplexity / that of llama.cpp's file | error / llama.cpp's | |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as place:
        place = pathlib.Path(place)
        for name in ["tiny", *MODELS]:
            if args.only and name not in args.only.split(","):
                continue
            model = TINY
            if name != "tiny":
                # llama.cpp looks for tokens of Phi-3's own vocabulary where a model's name has "phi3" in it.
                model = place / name.replace("phi3", "p3")
                random_model(model, MODELS[name])
            begun = time.time()
            found = check(name, args.ferrotune, model, place)
            rows += found
            print("\n".join(found), f"\n{name}: ok, {time.time() - begun:.0f} s", flush=True)
        if not args.only or "lora" in args.only.split(","):
            check_lora(args.ferrotune, TINY, place)
    if args.table:
        args.table.write_text("\n".join(rows) + "\n")
    sys.exit("\n".join(FAILURES) or 0)


if __name__ == "__main__":
    main()
