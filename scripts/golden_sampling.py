#!/usr/bin/env python3
"""Writes tests/golden/sampling.json: what transformers' logits processors leave of a row of logits.

Needs torch and transformers (the versions are written into the file). Run: scripts/golden_sampling.py
"""

import json
from pathlib import Path

import torch
import transformers
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCAB = 48
OUT = Path(__file__).resolve().parent.parent / "tests" / "golden" / "sampling.json"

PARAMS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.9},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.05},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 0.999},
    {"min_p": 0.02},
    {"min_p": 0.3},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.5, "top_k": 40, "min_p": 0.1},
    {"temperature": 0.8, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1},
    {"temperature": 2.5, "top_k": 30, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.5},
]


def processors(params):
    """As GenerationMixin builds them: the same order, and only those that are asked for."""
    found = LogitsProcessorList()
    if "repetition_penalty" in params:
        found.append(RepetitionPenaltyLogitsProcessor(params["repetition_penalty"]))
    if "temperature" in params:
        found.append(TemperatureLogitsWarper(params["temperature"]))
    if "top_k" in params:
        found.append(TopKLogitsWarper(params["top_k"]))
    if "top_p" in params:
        found.append(TopPLogitsWarper(params["top_p"]))
    if "min_p" in params:
        found.append(MinPLogitsWarper(params["min_p"]))
    return found


def rows(generator):
    normal = torch.randn(VOCAB, generator=generator)
    masked = normal * 2
    masked[::5] = float("-inf")
    return {
        "flat": normal * 0.3,
        "sharp": normal * 4,
        "ties": (normal * 2).round() / 2,
        "masked": masked,
    }


def main():
    generator = torch.Generator().manual_seed(3407)
    table = rows(generator)
    cases = []
    for name, row in table.items():
        prompt = torch.randint(VOCAB, (9,), generator=generator)
        for params in PARAMS:
            if name == "ties" and "top_p" in params:
                # Which of equal tokens top-p keeps depends on the sort, which is not stable.
                continue
            scores = processors(params)(prompt.unsqueeze(0), row.unsqueeze(0).clone())
            cases.append({
                "name": name,
                "params": params,
                "prompt": prompt.tolist(),
                "probabilities": [float(f"{p:.7g}") for p in scores.softmax(-1)[0].tolist()],
            })
    made_with = {"torch": torch.__version__, "transformers": transformers.__version__}
    logits = {
        name: [None if value == float("-inf") else value for value in row.tolist()]
        for name, row in table.items()
    }
    OUT.write_text(json.dumps({"made_with": made_with, "logits": logits, "cases": cases}) + "\n")
    print(f"{OUT}: {len(cases)} cases, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
