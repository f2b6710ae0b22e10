#!/usr/bin/env python3
"""Measures ferrotune's data tools beside Hugging Face datasets, in turns on one machine: what docs/data.md claims.

chats     rows of 2 to 6 turns, put together from real questions and answers (GSM8K, Alpaca, GPTeacher of the shared data)
tokenise  ferrotune: template, mask and tokens of all rows into a cache, beside bare encode_batch (examples/measure_data.rs)
          datasets: map(batched=True, num_proc=2) of apply_chat_template(tokenize=True) with a fast tokenizer, no mask
lint      ferrotune data lint of short rows, all rules but near-duplicates

Needs datasets and transformers, a release build, and the shared data.
usage: scripts/compare_data.py DATA-FOLDER WORK-FOLDER [--rows 100000] [--lint-rows 1000000] [--turns 3] [--only PART]
"""
import argparse
import json
import pathlib
import random
import resource
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
RELEASE = ROOT / "target" / "release"


def pairs(data):
    """Questions and answers."""
    found = []
    for line in (data / "datasets/gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.append((row["question"], row["answer"]))
    for name in ("alpaca/alpaca_small.json", "gpteacher/roleplay-simple-deduped-roleplay-dataset.json"):
        for row in json.loads((data / "datasets" / name).read_text(encoding="utf-8")):
            question = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
            found.append((question, row.get("output") or row["response"]))
    return [(question, answer) for question, answer in found if question.strip() and answer.strip()]


def write_chats(path, pairs, rows):
    rng = random.Random(3407)
    with path.open("w", encoding="utf-8") as file:
        for n in range(rows):
            turns = []
            for question, answer in rng.sample(pairs, rng.randint(1, 3)):
                turns += [{"from": "human", "value": f"{n}. {question}"}, {"from": "gpt", "value": answer}]
            file.write(json.dumps({"conversations": turns}, ensure_ascii=False) + "\n")


def write_short(path, rows):
    """Rows of about 50 tokens, none like another."""
    rng = random.Random(1)
    words = "time water light number people place story answer question letter house garden winter summer river mountain".split()
    with path.open("w", encoding="utf-8") as file:
        for n in range(rows):
            question, answer = (" ".join(rng.choice(words) for _ in range(count)) for count in (14, 14))
            turns = [{"role": "user", "content": f"{n} {question}?"}, {"role": "assistant", "content": f"{answer} {n}."}]
            file.write(json.dumps({"messages": turns}) + "\n")


def timed(command):
    """Seconds, and the most memory of any command so far in MiB."""
    begun = time.perf_counter()
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    seconds = time.perf_counter() - begun
    print(done.stdout[-2000:], done.stderr[-2000:], end="")
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def hugging_face(tokenizer, chats, work):
    """datasets' own cache is off: each turn tokenises."""
    script = f"""
import time, datasets, transformers
datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()
tokenizer = transformers.AutoTokenizer.from_pretrained({str(tokenizer)!r})
rows = datasets.load_dataset("json", data_files={str(chats)!r}, split="train", cache_dir={str(work / 'hf')!r})
roles = {{"human": "user", "gpt": "assistant"}}
def encode(batch):
    chats = [[{{"role": roles[turn["from"]], "content": turn["value"]}} for turn in turns] for turns in batch["conversations"]]
    ids = tokenizer.apply_chat_template(chats, tokenize=True)
    return {{"input_ids": ids if isinstance(ids, list) else ids["input_ids"]}}
begun = time.perf_counter()
out = rows.map(encode, batched=True, num_proc=2, remove_columns=rows.column_names, load_from_cache_file=False)
print(f"datasets {{datasets.__version__}}, transformers {{transformers.__version__}}: {{time.perf_counter() - begun:.2f}} s, {{sum(map(len, out[:1000]['input_ids']))}} tokens in the first 1000 rows")
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--lint-rows", type=int, default=1_000_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", choices=["tokenise", "lint"])
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = args.data / "tokenizers/qwen2.5"
    ferrotune = RELEASE / "ferrotune"
    if args.only != "lint":
        chats, texts = args.work / "chats.jsonl", args.work / "texts.jsonl"
        write_chats(chats, pairs(args.data), args.rows)
        timed([ferrotune, "data", "apply-chat-template", "--dataset", chats, "--model", tokenizer, "--output", texts])
        for _ in range(args.turns):
            timed([RELEASE / "examples/measure_data", tokenizer, chats, texts, 1])
            hugging_face(tokenizer, chats, args.work)
        shutil.rmtree(args.work / "hf", ignore_errors=True)
    if args.only != "tokenise":
        short = args.work / "short.jsonl"
        write_short(short, args.lint_rows)
        for _ in range(args.turns):
            seconds, memory = timed([ferrotune, "data", "lint", "--dataset", short, "--model", tokenizer, "--assistant-only-loss"])
            print(f"lint of {args.lint_rows} rows: {seconds:.1f} s; at most {memory:.0f} MiB")


if __name__ == "__main__":
    main()
