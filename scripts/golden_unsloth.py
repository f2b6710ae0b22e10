#!/usr/bin/env python3
"""Writes tests/golden/data/unsloth.json: what the published package unsloth makes of tables, roles, examples and labels.

The package is run as a black box; its code is under a copyleft licence and is not read while ours is written. It needs no GPU for
these functions: UNSLOTH_ZOO_DISABLE_GPU_INIT=1, and where torch's CUDA libraries are absent, empty ones of their names.

to_sharegpt   rows, arguments -> rows, or the error's type
standardize   rows, arguments -> rows, or the error's type
example       example, conversations -> texts, or the error's type (eos_token </s>)
parts         tokenizer (golden/data/bpe with a template of cases.json, or a folder of the shared tokenizers) -> markers
labels        tokenizer, text, arguments -> ids, labels

usage: scripts/golden_unsloth.py [folder of the shared tokenizers]
"""
import json
import os
import pathlib
import sys

# Unused CUDA functions need not be there.
sys.setdlopenflags(os.RTLD_LAZY)
os.environ |= {"UNSLOTH_IS_PRESENT": "1", "UNSLOTH_ZOO_DISABLE_GPU_INIT": "1", "HF_HUB_OFFLINE": "1"}

from importlib.metadata import version

import unsloth.chat_templates as unsloth
import unsloth_zoo.dataset_utils as zoo
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer

DATA = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden" / "data"
SHARED = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else None
VERSIONS = {name: version(name) for name in ("unsloth", "unsloth_zoo", "datasets", "transformers", "numpy")}
CASES = json.loads((DATA / "cases.json").read_text(encoding="utf-8"))

TABLE = [{"a": f"A{i}", "b": None if i % 2 else f"B{i}", "c": i, "f": i / 4, "t": i == 2, "e": "" if i < 3 else "é{a}", "output": f"out {i}"} for i in range(9)]
SHAREGPT = [
    dict(merged_prompt="X {a}[[ and {b}]] {c} {f} {t}."), dict(merged_prompt="[[{b}-{a}]]|{a}"), dict(merged_prompt="[[{a}-{b}]]|{b}|"),
    dict(merged_prompt="{zz}"), dict(merged_prompt="[[hello]] {a}"), dict(), dict(merged_column_name="a"), dict(merged_prompt="{a}", merged_column_name="a"),
    dict(merged_prompt="{a}", remove_unused_columns=False), dict(merged_prompt="{a}", output_column_name="c"), dict(merged_prompt="{a}", output_column_name="nope"),
    dict(merged_prompt="{a}", output_column_name="b"), dict(merged_prompt="{a}", conversation_extension=3), dict(merged_prompt="{a}", conversation_extension=0),
    dict(merged_prompt="{a}[[ {b}]]", conversation_extension=2, random_state=7, remove_unused_columns=False), dict(merged_prompt="{{a}} {a} {{{a}}}"),
    dict(merged_prompt="[[1{a}]][[2{b}]]\n[[3\n{c}]]"), dict(merged_prompt="[[q{e}]][[w{c}]]"), dict(merged_prompt="[[x [[{a}]] y]]"), dict(merged_prompt="{a:03d}"),
    dict(merged_prompt="hello"), dict(merged_prompt="[[ {a}"), dict(merged_prompt="{a} }"), dict(merged_prompt="'{a}' \"z\" \\ \n end"), dict(merged_prompt="[[]]{a}"),
]


def turns(*pairs, keys=("from", "value")):
    return {"conversations": [dict(zip(keys, pair)) for pair in pairs]}


TWO = turns(("human", "a"), ("gpt", "b"))
STANDARDIZE = [
    ([TWO | {"id": 3}] * 3, {}), ([turns(("system", "s"), ("human", "a"), ("gpt", "b")), turns(("user", "a"), ("assistant", "b"))], {}),
    ([turns(("input", "a"), ("output", "b"))], {}), ([turns(("human", "a"), ("bot", "b"))] * 3, {}),
    ([turns(("human", f"a{i}"), ("gpt" if i < 12 else "bot", f"b{i}")) for i in range(14)], {}),
    ([turns(("human", "a", 1), ("gpt", "b", 2), keys=("from", "value", "weight"))], {}), ([turns(("user", "a"), ("assistant", "b"), keys=("role", "content"))], {}),
    ([turns(("a", "human"), ("b", "gpt"), keys=("x", "y")), turns(("c", "human"), ("d", "gpt"), keys=("x", "y"))], {}), ([turns(("a", "human"), ("b", "gpt"), keys=("value", "from"))], {}),
    ([{"text": "x"}], {}), ([{"messages": TWO["conversations"]}], {}), ([turns(("human", "a"), ("gpt", None))] * 2, {}),
    ([turns(("bob", "a"), ("amy", "b"))] * 2, dict(aliases_for_user=["bob"], aliases_for_assistant=["amy"])),
]

EXAMPLES = {
    "system": "{SYSTEM}\nUSER: {INPUT}\nASSISTANT: {OUTPUT}</s>\nUSER: {INPUT}\nASSISTANT: {OUTPUT}</s>",
    "system, no eos": "{SYSTEM}\nUSER: {INPUT}\nASSISTANT: {OUTPUT}\nUSER: {INPUT}\nASSISTANT: {OUTPUT}",
    "system, one turn": "{SYSTEM}\nUSER: {INPUT}\nASSISTANT: {OUTPUT}",
    "alpaca": "Below are instructions.\n\n### Instruction:\n{INPUT}\n\n### Response:\n{OUTPUT}</s>\n\n### Instruction:\n{INPUT}\n\n### Response:\n{OUTPUT}</s>",
    "alpaca, no eos": "Below are instructions.\n\n### Instruction:\n{INPUT}\n\n### Response:\n{OUTPUT}\n\n### Instruction:\n{INPUT}\n\n### Response:\n{OUTPUT}",
    "alpaca, one turn": "Below are instructions.\n\n### Instruction:\n{INPUT}\n\n### Response:\n{OUTPUT}",
    "tail": "P {INPUT}|{OUTPUT}!{INPUT}|{OUTPUT}!", "bos": "<s>{SYSTEM}>{INPUT}|{OUTPUT}</s>>{INPUT}|{OUTPUT}</s>",
    "quotes": "{SYSTEM}'\"{{x}}\\{INPUT}|{OUTPUT}</s>'\"{{x}}\\{INPUT}|{OUTPUT}</s>",
    "chatml": "<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{INPUT}<|im_end|>\n<|im_start|>assistant\n{OUTPUT}<|im_end|>\n<|im_start|>user\n{INPUT}<|im_end|>\n<|im_start|>assistant\n{OUTPUT}<|im_end|>\n",
    "no input": "{SYSTEM}\nASSISTANT: {OUTPUT}", "no output": "{SYSTEM}\nUSER: {INPUT}", "order": "{OUTPUT} {INPUT}{OUTPUT} {INPUT}",
    "three": "A{INPUT}B{OUTPUT}CA{INPUT}B{OUTPUT}CA{INPUT}B{OUTPUT}C", "differs": "P {INPUT}|{OUTPUT}! Q {INPUT}/{OUTPUT}?",
}


def message(role, content):
    return {"role": role, "content": content}


TALKS = [
    [message("user", "q1"), message("assistant", "a1")],
    [message("user", "q1"), message("assistant", "a1"), message("user", " q2\n"), message("assistant", "\na2 ")],
    [message("system", "sys"), message("user", "q1"), message("assistant", "a1"), message("user", "q2"), message("assistant", "a2")],
]


def outcome(make):
    try:
        return {"result": make()}
    except Exception as error:
        return {"error": type(error).__name__}


def tokenizers():
    for name, template in CASES["templates"].items():
        if name not in ("python", "undefined"):
            tokenizer = AutoTokenizer.from_pretrained(DATA / "bpe")
            tokenizer.chat_template = template
            yield f"bpe {name}", tokenizer
    for folder in sorted(SHARED.iterdir()) if SHARED else []:
        yield folder.name, AutoTokenizer.from_pretrained(folder)


def labels(name, tokenizer, parts):
    for talk in TALKS:
        try:
            text = tokenizer.apply_chat_template(talk, tokenize=False)
        except Exception:
            continue
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for last_response_only in (False, True):
            mask = zoo.train_on_responses_only(None, *parts, tokenizer=tokenizer, return_function=True, last_response_only=last_response_only)
            yield {"tokenizer": name, "text": text, "last_response_only": last_response_only, "ids": ids,
                   "trained": [int(label != -100) for label in mask({"input_ids": [ids]})["labels"][0]]}


def main():
    disable_progress_bars()
    cases = {"versions": VERSIONS, "table": TABLE, "talks": TALKS, "to_sharegpt": [], "standardize": [], "example": [], "parts": [], "labels": []}
    for arguments in SHAREGPT:
        result = outcome(lambda: unsloth.to_sharegpt(Dataset.from_list(TABLE), **arguments).to_list())
        cases["to_sharegpt"].append({"arguments": arguments} | result)
    for rows, arguments in STANDARDIZE:
        result = outcome(lambda: unsloth.standardize_sharegpt(Dataset.from_list(rows), **arguments).to_list())
        cases["standardize"].append({"rows": rows, "arguments": arguments} | result)
    for name, example in EXAMPLES.items():
        for talk in TALKS:
            def render():
                tokenizer = AutoTokenizer.from_pretrained(DATA / "bpe")
                rows = Dataset.from_list([{"conversations": talk}])
                return unsloth.apply_chat_template(rows, tokenizer=tokenizer, chat_template=example, default_system_message="Be terse.")[0]["text"]
            cases["example"].append({"name": name, "example": example, "conversation": talk} | outcome(render))
    for name, tokenizer in tokenizers():
        found = outcome(lambda: zoo.get_chat_template_parts(tokenizer))
        cases["parts"].append({"tokenizer": name} | found)
        if "result" in found:
            cases["labels"] += labels(name, tokenizer, found["result"])
    text = json.dumps(cases, ensure_ascii=False)
    for key in ('{"arguments"', '{"rows"', '{"name"', '{"tokenizer"'):
        text = text.replace(key, "\n" + key)
    path = DATA / "unsloth.json"
    path.write_text(text + "\n", encoding="utf-8")
    size = path.stat().st_size
    assert size < 100_000, f"{path} has {size} bytes"
    print(f"{size:7} {path.name}")


if __name__ == "__main__":
    main()
