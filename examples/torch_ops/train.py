"""LoRA steps of a random transformers Llama on the CPU, plain or on ferrotune's ops: loss, time, memory. See README.md."""
import argparse
import resource
import time

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama as llama

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("fused", choices=["nothing", "loss", "all"], help="what ferrotune computes")
parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
arguments = parser.parse_args()
torch.ops.load_library("target/ops/libferrotune_ops.so")
ops, fused = torch.ops.ferrotune, arguments.fused


class LoraLinear(torch.nn.Module):
    def __init__(self, base, rank=16, scale=2.0):
        super().__init__()
        self.base, self.scale = base, scale
        self.lora_A = torch.nn.Parameter(torch.randn(rank, base.in_features) * base.in_features**-0.5)
        self.lora_B = torch.nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        if fused == "all":
            return ops.lora_linear(x, self.base.weight, self.base.bias, self.lora_A, self.lora_B, self.scale)
        return self.base(x) + self.scale * F.linear(F.linear(x.float(), self.lora_A), self.lora_B).to(x.dtype)


def rotate(q, k, cos, sin, unsqueeze_dim=1):  # q and k are [B, H, T, D]; the op turns [N, H, D] and takes each angle once
    cos, sin = (a.expand(q.shape[0], -1, -1)[..., :a.shape[-1] // 2].flatten(0, 1).float() for a in (cos, sin))
    turned = lambda x: ops.rope(x.transpose(1, 2).flatten(0, 1), cos, sin).unflatten(0, (x.shape[0], -1)).transpose(1, 2)
    return turned(q), turned(k)


if fused == "all":
    llama.apply_rotary_pos_emb = rotate
    llama.LlamaRMSNorm.forward = lambda self, x: ops.rms_norm(x, self.weight, self.variance_epsilon)
    llama.LlamaMLP.forward = lambda self, x: self.down_proj(ops.swiglu(torch.cat([self.gate_proj(x), self.up_proj(x)], -1)))
torch.manual_seed(0)
config = LlamaConfig(vocab_size=32000, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)
model = LlamaForCausalLM(config).to(getattr(torch, arguments.dtype)).requires_grad_(False)
for owner in [part for layer in model.model.layers for part in (layer.self_attn, layer.mlp)]:
    for name in [name for name, child in owner.named_children() if isinstance(child, torch.nn.Linear)]:
        setattr(owner, name, LoraLinear(getattr(owner, name)))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
ids, times, before = torch.randint(0, 32000, (2, 1024)), [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(3):
    begun = time.process_time()
    if fused == "nothing":
        loss = model(input_ids=ids, labels=ids).loss
    else:
        hidden, labels = model.model(input_ids=ids).last_hidden_state[:, :-1], ids[:, 1:].flatten()
        loss = ops.linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, labels) / (labels != -100).sum()
    loss.backward()
    optimizer.step(), optimizer.zero_grad()
    times.append(time.process_time() - begun)
peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print(f"{arguments.dtype}, ferrotune computes {fused}: loss {loss.item():.4f}, {min(times):.2f} s of CPU a step, {peak:.0f} MiB beside the model")
