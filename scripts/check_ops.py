#!/usr/bin/env python3
"""The ops of libferrotune_ops.so in PyTorch: torch.library.opcheck, values and gradients, torch.compile.

    scripts/build_ops && scripts/check_ops.py [--library target/ops/libferrotune_ops.so] [--kernels FILE]

Of each op, in f32 and bf16 and for three shapes (an odd one, a power of two, one row): opcheck's tests (schema, registration of autograd, fake tensors, tracing with
unknown sizes), the value and the gradients against the plain formula's under the rule of docs/numerics.md, and the same bits
from torch.compile. NF4: the bytes and values of bitsandbytes where it is installed. With --kernels FILE
(libferrotune_kernels.so) all of it on a GPU. Needs a Python with torch 2.11: the files that scripts/setup keeps for
a CPU have no Python part.
"""
import argparse
import pathlib
import sys
import time

import torch
from torch.nn import functional as F

FLOORS = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (8e-3, 1.6e-2)}
FAILED = []


def rms_norm(x, weight, eps=1e-6, offset=0.0):
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (weight.to(wide.dtype) + offset)).to(x.dtype)


def rope(x, cos, sin, inverse=False):
    half, sign = cos.shape[1], -1 if inverse else 1
    c, s = cos[:, None].to(x.dtype), sign * sin[:, None].to(x.dtype)
    first, second, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return torch.cat([first * c - second * s, second * c + first * s, rest], -1)


def swiglu(gate_up, activation="silu"):
    gate, up = gate_up.chunk(2, -1)
    act = dict(silu=F.silu, gelu=F.gelu, gelu_tanh=lambda g: F.gelu(g, approximate="tanh"))[activation]
    return act(gate) * up


def lora_linear(x, weight, bias, lora_A, lora_B, scale):
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(x, lora_A), lora_B)


def linear_cross_entropy(hidden, weight, labels, softcap=0.0):
    scores = F.linear(hidden, weight)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    scores = softcap * torch.tanh(scores / softcap) if softcap > 0 else scores
    return F.cross_entropy(scores, labels, reduction="sum")


def cases():
    """op, the plain formula, arguments in f64, and the places of those that train."""
    generator = torch.Generator().manual_seed(3)
    normal = lambda *shape, gain=1.0: torch.randn(*shape, generator=generator, dtype=torch.float64) * gain
    for n, c in ((37, 96), (64, 128), (1, 64)):
        angles = torch.rand(n, 12, generator=generator, dtype=torch.float64) * 6
        labels = torch.randint(0, 51, (n,), generator=generator)
        labels[::5] = -100  # the only one of one row
        yield "rms_norm", rms_norm, [normal(n, c), normal(c), 1e-6, 0.0], {0, 1}
        yield "rms_norm", rms_norm, [normal(2, n, c), normal(c), 1e-6, 1.0], {0, 1}
        yield "rope", rope, [normal(n, 3, 32), angles.cos(), angles.sin()], {0}
        yield "rope", rope, [normal(n, 3, 24), angles.cos(), angles.sin(), True], {0}
        for activation in ("silu", "gelu", "gelu_tanh"):
            yield "swiglu", swiglu, [normal(n, 2 * c), activation], {0}
        weight, a, b = normal(c, 2 * c, gain=0.1), normal(8, 2 * c, gain=0.1), normal(c, 8)
        yield "lora_linear", lora_linear, [normal(n, 2 * c), weight, None, a, b, 0.5], {0, 3, 4}
        yield "lora_linear", lora_linear, [normal(2, n, 2 * c), weight, normal(c), a, b, 2.0], {0, 1, 2, 3, 4}
        head = normal(51, c, gain=0.3)
        yield "linear_cross_entropy", linear_cross_entropy, [normal(n, c), head, labels], {0}
        yield "linear_cross_entropy", linear_cross_entropy, [normal(n, c), head, labels, 5.0], {0, 1}


def to(arguments, trains, dtype, device):
    """Floats in `dtype`, leaves of the graph where `trains` says so."""
    found = []
    for at, value in enumerate(arguments):
        if torch.is_tensor(value):
            value = value.to(device)
            if value.is_floating_point():
                value = value.to(dtype).detach().requires_grad_(at in trains)
        found.append(value)
    return found


def value_and_gradients(function, arguments, dy=None):
    y = function(*arguments)
    leaves = [a for a in arguments if torch.is_tensor(a) and a.requires_grad]
    dy = torch.ones_like(y) if dy is None else dy.to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def rel(found, wanted):
    apart, wanted = found.double() - wanted.double(), wanted.double()
    # Nothing has a target: zeros must be zeros.
    if not wanted.any():
        return apart.abs().max().item()
    return max((apart.norm() / wanted.norm()).item(), (apart.abs().max() / wanted.abs().max()).item())


def check_nf4(device):
    ops = torch.ops.ferrotune
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for dtype in (torch.float32, torch.bfloat16):
        # Rows of 64 for bitsandbytes, and blocks that end in the middle.
        for rows, width in ((48, 320), (7, 33)):
            weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
            packed, absmax = ops.nf4_quantize(weight)
            index, nested, offset = ops.nf4_nest(absmax)
            keys = dict(nested_absmax=nested, nested_offset=offset.item())
            dense = ops.nf4_dequantize(packed, index, rows, width, dtype, **keys)
            error = rel(dense, weight)
            if not 0.05 < error < 0.12:
                FAILED.append(f"nf4 {dtype}: {error} from the weight")
            for op, arguments, kwargs in ((ops.nf4_quantize, (weight,), {}), (ops.nf4_nest, (absmax,), {}),
                                          (ops.nf4_dequantize, (packed, index, rows, width, dtype), keys),
                                          (ops.nf4_dequantize, (packed, absmax, rows, width, dtype), {})):
                torch.library.opcheck(op, arguments, kwargs, test_utils=tests)
            try:
                from bitsandbytes import functional as bnb
            except ImportError:
                print("nf4: skipped against bitsandbytes, which is not installed")
                continue
            if width % 64 == 0 and device == "cpu":
                theirs, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
                same = torch.equal(theirs.flatten(), packed) and torch.equal(state.absmax, index)
                same &= torch.equal(state.state2.absmax, nested) and torch.equal(bnb.dequantize_4bit(theirs, state), dense)
                if not same:
                    FAILED.append(f"nf4 {dtype}: not bitsandbytes' bytes")
    print("ok nf4_quantize, nf4_nest, nf4_dequantize")


def speed():
    """CPU time of forward and backward, the op's beside the plain formula's."""
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    n, c, vocab = 2048, 512, 32000
    angles = torch.rand(n, 32, dtype=torch.float64) * 6
    rows = [("rms_norm", rms_norm, [normal(n, c), normal(c)], {0, 1}), ("rope", rope, [normal(n, 8, 64), angles.cos(), angles.sin()], {0}),
            ("swiglu", swiglu, [normal(n, 2 * 1408)], {0}),
            ("lora_linear", lora_linear, [normal(n, c), normal(1408, c), None, normal(16, c), normal(1408, 16), 2.0], {0, 3, 4}),
            ("linear_cross_entropy", linear_cross_entropy, [normal(n, c), normal(vocab, c) * 0.05, torch.randint(0, vocab, (n,))], {0})]
    for name, plain, given, trains in rows:
        for dtype in FLOORS:
            arguments, times = to(given, trains, dtype, "cpu"), {}
            for function in (plain, getattr(torch.ops.ferrotune, name)) * 5:
                begun = time.process_time()
                value_and_gradients(function, arguments)
                times[function] = min(times.get(function, 1e9), time.process_time() - begun)
            theirs, ours = times.values()
            print(f"{name} {str(dtype)[6:]}: {ours * 1e3:.1f} ms, plain {theirs * 1e3:.1f} ms, {theirs / ours:.2f} times as fast", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = pathlib.Path(__file__).resolve().parent.parent
    parser.add_argument("--library", default=root / "target/ops/libferrotune_ops.so")
    parser.add_argument("--kernels")
    parser.add_argument("--backend", default="aot_eager", help="of torch.compile")
    parser.add_argument("--speed", action="store_true", help="only measure, on the CPU (OMP_NUM_THREADS=1)")
    arguments = parser.parse_args()
    torch.ops.load_library(arguments.library)
    if arguments.speed:
        return speed()
    device = "cpu"
    if arguments.kernels:
        torch.ops.ferrotune.load_kernels(arguments.kernels)
        device = "cuda"
    for name, plain, given, trains in cases():
        op = getattr(torch.ops.ferrotune, name)
        # The graph of one dtype says all: fewer traces.
        torch.library.opcheck(op.default, to(given, trains, torch.float32, device))
        y = plain(*to(given, trains, torch.float64, device))
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(device)
        worst = {}
        for dtype, floors in FLOORS.items():
            stored = to(given, trains, dtype, device)
            exact = [a.detach().double().requires_grad_(a.requires_grad) if torch.is_tensor(a) and a.is_floating_point() else a for a in stored]
            wanted = value_and_gradients(plain, exact, dy.to(dtype))
            torchs = value_and_gradients(plain, stored, dy.to(dtype))
            ours = value_and_gradients(op, stored, dy.to(dtype))
            for at, (found, other, exactly) in enumerate(zip(ours, torchs, wanted)):
                apart, allowed = rel(found, exactly), max(2 * rel(other, exactly), floors[at > 0])
                worst[dtype] = max(worst.get(dtype, 0), apart / allowed)
                if not apart <= allowed or found.dtype != other.dtype:
                    FAILED.append(f"{name} {dtype} output {at}: {apart:.1e} apart, allowed {allowed:.1e}")
        stored = to(given, trains, torch.float32, device)
        torch.compiler.reset()
        compiled = value_and_gradients(torch.compile(lambda *a: op(*a), backend=arguments.backend, fullgraph=True), stored, dy)
        if not all(torch.equal(a, b) for a, b in zip(compiled, value_and_gradients(op, stored, dy))):
            FAILED.append(f"{name}: other bits under torch.compile")
        shapes = ", ".join(str(list(a.shape)) if torch.is_tensor(a) else str(a) for a in given)
        print(f"ok {name}({shapes}): " + ", ".join(f"{str(d)[6:]} {w:.2f}" for d, w in worst.items()) + " of the budget", flush=True)
    check_nf4(device)
    if device == "cpu":  # a GPU fails later, with all that runs on it
        try:
            torch.ops.ferrotune.linear_cross_entropy(torch.ones(1, 4), torch.ones(8, 4), torch.tensor([8]))
            FAILED.append("linear_cross_entropy took a label that is no word")
        except RuntimeError:
            pass
    sys.exit("\n".join(FAILED) or 0)


if __name__ == "__main__":
    main()
