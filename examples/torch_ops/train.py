"""LoRA steps of a random transformers Llama, plain and on ferrotune's ops: time, peak memory, loss. See README.md."""
import argparse
import resource
import time

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama as llama


class LoraLinear(torch.nn.Module):
    def __init__(self, base, fused, rank=16, alpha=32):
        super().__init__()
        self.base, self.fused, self.scale = base, fused, alpha / rank
        self.lora_A = torch.nn.Parameter(torch.randn(rank, base.in_features) * base.in_features**-0.5)
        self.lora_B = torch.nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        if self.fused:
            return torch.ops.ferrotune.lora_linear(x, self.base.weight, self.base.bias, self.lora_A, self.lora_B, self.scale)
        return self.base(x) + self.scale * F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B).to(x.dtype)


def rotate(q, k, cos, sin, unsqueeze_dim=1):
    """q and k are [B, H, T, D]; the op turns [N, H, D], and takes each angle once."""
    half = cos.shape[-1] // 2
    cos, sin = (a[..., :half].reshape(-1, half).float() for a in (cos.expand(q.shape[0], -1, -1), sin.expand(q.shape[0], -1, -1)))

    def turned(x):
        b, h, t, d = x.shape
        return torch.ops.ferrotune.rope(x.transpose(1, 2).reshape(b * t, h, d), cos, sin).view(b, t, h, d).transpose(1, 2)

    return turned(q), turned(k)


def fuse():
    llama.apply_rotary_pos_emb = rotate
    llama.LlamaRMSNorm.forward = lambda self, x: torch.ops.ferrotune.rms_norm(x, self.weight, self.variance_epsilon)
    llama.LlamaMLP.forward = lambda self, x: self.down_proj(
        torch.ops.ferrotune.swiglu(torch.cat([self.gate_proj(x), self.up_proj(x)], -1)))


def loss_of(model, ids, fused):
    if not fused:
        return model(input_ids=ids, labels=ids).loss
    hidden, labels = model.model(input_ids=ids).last_hidden_state[:, :-1], ids[:, 1:].flatten()
    total = torch.ops.ferrotune.linear_cross_entropy(hidden.reshape(labels.numel(), -1), model.lm_head.weight, labels)
    return total / (labels != -100).sum()


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--ops", metavar="LIBRARY", help="libferrotune_ops.so (scripts/build_ops); without it the plain model runs")
parser.add_argument("--loss-only", action="store_true", help="only the head and the loss by ferrotune")
parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
parser.add_argument("--steps", type=int, default=4)
arguments = parser.parse_args()
layers_fused = bool(arguments.ops) and not arguments.loss_only
if arguments.ops:
    torch.ops.load_library(arguments.ops)
if layers_fused:
    fuse()
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8,
                                     num_key_value_heads=4)).to(getattr(torch, arguments.dtype)).requires_grad_(False)
for layer in model.model.layers:
    for owner, names in ((layer.self_attn, ("q_proj", "k_proj", "v_proj", "o_proj")), (layer.mlp, ("gate_proj", "up_proj", "down_proj"))):
        for name in names:
            setattr(owner, name, LoraLinear(getattr(owner, name), layers_fused))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
ids = torch.randint(0, 32000, (2, 1024))
before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
for _ in range(arguments.steps):
    begun = time.perf_counter()
    loss = loss_of(model, ids, bool(arguments.ops))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    times.append(time.perf_counter() - begun)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"loss {loss.item():.4f}, step {min(times):.2f} s, peak memory of the steps {(peak - before) / 1024:.0f} MiB above the model's")
