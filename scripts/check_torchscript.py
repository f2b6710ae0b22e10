#!/usr/bin/env python3
"""TorchScript archives of `ferrotune export` in Python, which knows nothing of ferrotune.

    scripts/check_torchscript.py --ferrotune target/release/ferrotune

The embedded model and the checkpoints of tests/golden: torch.jit.load, a batch of two at two lengths, and the log-probabilities beside those of
`ferrotune score`. Needs a Python with torch alone.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--ferrotune", type=pathlib.Path, default=ROOT / "target/release/ferrotune")
args = parser.parse_args()
worst = 0.0
with tempfile.TemporaryDirectory() as place:
    golden = [path.parent for path in sorted((ROOT / "tests/golden").glob("*/config.json"))]
    for model in [ROOT / "examples/tiny/model", *golden]:
        out = pathlib.Path(place) / model.name
        run(args.ferrotune, "export", "--device", "cpu", "--dtype", "f32", "--model", model, "--format", "torchscript", "--output-dir", out)
        module = torch.jit.load(out / "model.pt").eval()
        for length in (5, 23):
            ids = torch.tensor([[(7 * i + 3 * row) % 30 for i in range(length)] for row in range(2)])
            with torch.no_grad():
                found = torch.log_softmax(module(ids).double(), -1)
            for row in range(2):
                score = run(args.ferrotune, "score", "--device", "cpu", "--dtype", "f32", "--model", model, "--input-ids", json.dumps(ids[row].tolist()))
                wanted = torch.tensor(json.loads(score)["logprobs"], dtype=torch.float64)
                theirs = found[row, :-1].gather(1, ids[row, 1:, None])[:, 0]
                apart = ((theirs - wanted).abs().max() / wanted.abs().max()).item()
                worst = max(worst, apart)
                if not apart < 1e-5:
                    sys.exit(f"{model.name}, {length} tokens, row {row}: log-probabilities are {apart:.1e} apart")
        print(f"{model.name}: ok")
print(f"torch {torch.__version__}: largest distance of a log-probability {worst:.1e}")
