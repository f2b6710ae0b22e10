#!/usr/bin/env python3
"""Writes tests/golden/optim.safetensors: five steps of bitsandbytes' AdamW8bit, states as bytes.

Needs what make_golden.py needs, and bitsandbytes (the version stands in the metadata). All on the CPU, on one thread.

bitsandbytes runs without its C library here. That library quantises f32 by a table of 65,536 equal steps of [-1, 1], in
which a moment of 0 becomes 2.1e-5 of its block's largest and loses its sign; its portable code, its CUDA kernels and ours
take the nearest value.

Of each tensor: .param and .grad before (bf16), after the last step .updated, .state1, .state2, .absmax1 and .absmax2. The
gradient of step t, from 1 on, is 0.5^t times `.grad` rolled by 37 t.

usage: scripts/golden_optim.py
"""
import ctypes
import json
import os

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # op by op, each rounded
load = ctypes.cdll.LoadLibrary


def without_bitsandbytes(path):
    if "bitsandbytes" in path:
        raise OSError("left out")
    return load(path)


ctypes.cdll.LoadLibrary = without_bitsandbytes
import bitsandbytes
from bitsandbytes import cextension

ctypes.cdll.LoadLibrary = load
assert isinstance(cextension.lib, cextension.ErrorHandlerMockBNBNativeLibrary)

import make_golden as golden
import torch

golden.VERSIONS["bitsandbytes"] = bitsandbytes.__version__

STEPS = 5
ADAMW = dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)


def gradients(name, n):
    draw = golden.generator(name)
    # From 1e-9 to 1 in every block, so that all parts of the maps are used.
    grad = torch.randn(n, generator=draw) * 10.0 ** (-9 * torch.rand(n, generator=draw))
    if name == "with_zeros":
        grad[512:1024] = 0
        grad[::7] = 0
    return grad.bfloat16()


def main():
    torch.set_num_threads(1)
    out = {}
    # A short block at the end; a whole number of blocks with some that are all zeros.
    for name, n in {"short_end": 4196, "with_zeros": 4352}.items():
        start = torch.randn(n, generator=golden.generator(name + "/param")).bfloat16()
        grad = gradients(name, n)
        param = torch.nn.Parameter(start.float())
        optimizer = bitsandbytes.optim.AdamW8bit([param], **ADAMW)
        for step in range(1, STEPS + 1):
            param.grad = torch.roll(grad.float(), 37 * step) * 0.5**step
            optimizer.step()
        state = optimizer.state[param]
        out |= {f"{name}.param": start, f"{name}.grad": grad, f"{name}.updated": param.detach()}
        out |= {f"{name}.{key}": state[key] for key in ("state1", "state2", "absmax1", "absmax2")}
    out |= {"qmap1": state["qmap1"], "qmap2": state["qmap2"]}
    path = golden.GOLDEN / "optim.safetensors"
    golden.save(path, out, "optim", adamw=json.dumps(ADAMW), steps=STEPS)
    assert path.stat().st_size < golden.LIMIT, path
    print(f"{path.name} {path.stat().st_size / 1000:.1f} kB")


if __name__ == "__main__":
    main()
