#!/usr/bin/env python3
"""Writes tests/golden/data: what transformers and TRL make of texts, conversations and label masks.

Needs transformers 5, TRL 1.16 and tokenizers. The two tokenizers, the templates and the texts are this file's own.

bpe/, spm/   byte-level BPE without BOS; pieces with a leading space mark, byte fallback and a BOS post-processor
cases.json   versions
             conversations, tools
             chats: tokenizer, template, conversation, tools, add_generation_prompt -> text, ids, and where the template
                    marks generation the assistant's mask (apply_chat_template's)
             sft:   tokenizer, template, rows, assistant_only_loss -> input_ids and labels of each row (SFTTrainer's)
             packs: lengths, max_seq_length -> the packs' lengths (TRL's pack_dataset, bfd)

rows.parquet the conversations as rows, with a column of each kind; two row groups

usage: scripts/golden_data.py
"""
import datetime
import json
import os
import pathlib
import random
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers
import transformers
import trl
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden" / "data"
VERSIONS = {"transformers": transformers.__version__, "trl": trl.__version__, "tokenizers": tokenizers.__version__}
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]",
           "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<start_of_turn>", "<end_of_turn>"]
CORPUS = """A heron stood in the shallow water and waited. The weather was mild, the wind came from the west.
What is the capital of the country? How many apples are left when three of seven are eaten? Four are left.
user assistant system tool think function name arguments content role model weather city answer question
Let me think step by step: two plus two is four, and four plus three is seven. You are a helpful, terse assistant.
{"name": "weather", "arguments": {"city": "Graz"}} <think> </think> ### Instruction: ### Response:
Grüße aus der Stadt, schöne Tage. Les élèves étudient. 12 34 56 78 90.
""".splitlines()

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
TEMPLATES = {
    "chatml": CHATML,
    # The end of turn stands inside the block, the line break after it does not.
    "chatml_generation": """{% for message in messages %}
{% if message['role'] == 'assistant' %}
{{ '<|im_start|>assistant\\n' }}{% generation %}{{ message['content'] }}{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{% else %}
{{ '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    # Tools in front of the last question, the system message inside the first one: no prompt is a prefix of the whole.
    "inst": """{{- bos_token }}
{%- set system = messages[0].content if messages[0].role == 'system' else none %}
{%- set turns = messages[1:] if system is not none else messages %}
{%- set users = turns | selectattr('role', 'equalto', 'user') | list %}
{%- if users | length == 0 %}{{ raise_exception('A conversation needs a question.') }}{% endif %}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {%- if tools is not none and message == users[-1] %}
            {{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + (system + '\\n\\n' if loop.first and system is not none else '') + message.content + ' [/INST]' }}
    {%- elif message.tool_calls is defined and message.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {{- ', ' if not loop.first else '' }}{{ call.function | tojson }}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS] ' + {'content': message.content} | tojson + '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('Unexpected role: ' + message.role) }}
    {%- endif %}
{%- endfor %}""",
    # eos_token does not end a turn here; roles have other names; system is not known.
    "turns": """{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' + message.content.strip() + '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}""",
    # Thoughts of earlier turns are dropped, the last turn has a block of them even when there are none.
    "think": """{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set thought = message.reasoning_content | default('', true) %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
        {{- content + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "undefined": """{{ missing }}{{ messages[99] }}{{ messages[0].nothing }}{% for x in missing %}{% endfor %}{{ 'a' if missing else 'b' }}
{%- if messages | length > 2 %}{{ missing.attribute }}{% elif messages[0].role == 'system' %}{{ missing + 'x' }}{% endif %}""",
    # Python shows through: values as str() prints them, methods, slices, tests, json.dumps's options.
    "python": """{%- for message in messages | reverse | list -%}
{{ loop.index0 }} {{ message.role.upper() }} {{ message['content'][:5] | tojson }} {{ message['content'][::-1][:3] }}|
{%- endfor %}
{% set x = {'a': none, 'b': [true, 1.0, 1e16, 1e-5, 'it\\'s'], 'c': {'d': (1, 'é')}} %}
{{ x }} {{ x.a }} {{ x.nothing }} {{ x.b[-1] }} {{ x.b | length }} {{ 7 // 2 }} {{ -7 // 2 }} {{ 7 / 2 }} {{ 2 ** 3 }} {{ 1e22 }} {{ 0.1 + 0.2 }}
{{ x.b | tojson }} {{ x | tojson(indent=2) }} {{ '<é & "q">' | tojson(ensure_ascii=true) }} {{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}
{{ 'a,b,,c'.split(',') }} {{ ' a  b '.split() }} {{ 'a-b-c'.split('-', 1) }} {{ 'a-b-c'.rsplit('-', 1) }} {{ 'xxhixx'.strip('x') }} {{ 'hello world'.title() }}
{{ 'abc'.startswith('ab') }} {{ 'abc'.endswith(('x', 'c')) }} {{ 'aXbX'.replace('X', '-', 1) }} {{ 'abc'.find('c') }} {{ 'prefix-body'.removeprefix('prefix-') }} {{ 'a'.join(['1', '2']) }}
{% for k, v in {'one': 1, 'two': [2]}.items() %}{{ k }}={{ v }};{% endfor %} {{ {'k': 1}.get('k') }} {{ {'k': 1}.get('z') }} {{ {'k': 1}.get('z', 'd') }} {{ {'k': 1}.keys() | list }}
{{ 'x' is string }} {{ 'x' is sequence }} {{ none is iterable }} {{ x is mapping }} {{ x.nothing is defined }} {{ x.a is none }} {{ 1 is number }} {{ true is boolean }}
{{ 'ünï' | upper }} {{ 'a b' | capitalize }} {{ [3, 1, 2] | sort | join('-') }} {{ [1, 2, 3] | map('string') | join }} {{ '42' | int + 1 }} {{ 'no' | int }} {{ '1.5' | float }} {{ [['a', 1]] | first | last }} {{ 'abc' | list }}
{% macro twice(s, n=2) %}{{ s * n }}{% endmacro %}{{ twice('ab') }} {{ twice('x', n=3) }} {{ 'a' if false }}{{ 'yes' if 'b' in 'abc' else 'no' }} {{ range(2, 8, 3) | list }} {{ bos_token }}{{ eos_token }}
{%- for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 4 %}{% break %}{% endif %} {{ i }}{{ loop.first }}{{ loop.last }}{% endfor %}""",
}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather of a <city> & its \"surroundings\"",
          "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "number", "default": 1.0}}}}}]


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


CONVERSATIONS = {
    "one": [turn("user", "What is two plus two?"), turn("assistant", "Four.")],
    "system": [turn("system", "You are terse."), turn("user", "How is the weather?"), turn("assistant", " Schön, 😀 mild. "),
               turn("user", "And tomorrow?\n"), turn("assistant", "The same")],
    "thought": [turn("user", "two plus two"), turn("assistant", "<think>\nadd them\n</think>\n\nfour"), turn("user", "plus three"),
                turn("assistant", "seven", reasoning_content="four and three")],
    "tool": [turn("user", "How is the weather in Graz?"),
             turn("assistant", "", tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": {"city": "Graz", "days": 1.0}}}]),
             turn("tool", "mild & 12 °C"), turn("assistant", "It is mild."), turn("user", "Thanks"), turn("assistant", "You are welcome.")],
    "open": [turn("system", "You are terse."), turn("user", "What is left?")],
}
TEXT_ROWS = [{"text": "A heron stood in the shallow water."}, {"text": "ends here</s>"}, {"text": " Grüße  "}]
PROMPT_ROWS = [{"prompt": "What is two plus two?", "completion": " Four."}, {"prompt": "The answer is ", "completion": "seven"},
               {"prompt": "### Question: élèves\n", "completion": "Les élèves étudient."}]


def tokenizer_bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def tokenizer_spm():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = SPECIAL + [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, limit_alphabet=80, show_progress=False)
    tokenizer.train_from_iterator([line.replace(" ", "▁") for line in CORPUS], trainer)
    # The trainer made the byte tokens special; they are plain pieces.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return tokenizer


def save_tokenizer(name, tokenizer):
    folder = GOLDEN / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"},
              "unk_token": "<unk>", "pad_token": None, "clean_up_tokenization_spaces": False,
              "chat_template": [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": TEMPLATES["inst"]}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


def chats(name, tokenizer):
    cases = []
    for template_name, template in TEMPLATES.items():
        for conversation, messages in CONVERSATIONS.items():
            case = {"tokenizer": name, "template": template_name, "conversation": conversation, "tools": conversation == "tool",
                    "add_generation_prompt": conversation == "open"}
            marks = "generation %" in template
            try:
                rendered = dict(conversation=messages, chat_template=template, tools=TOOLS if case["tools"] else None,
                                add_generation_prompt=case["add_generation_prompt"])
                case["text"] = tokenizer.apply_chat_template(**rendered, tokenize=False)
                if template_name not in ("python", "undefined"):
                    out = tokenizer.apply_chat_template(**rendered, return_dict=True, return_assistant_tokens_mask=marks)
                    case["ids"] = out["input_ids"]
                    if marks:
                        case["mask"] = out["assistant_masks"]
            except Exception as error:
                case["error"] = f"{type(error).__name__}: {error}"
            cases.append(case)
    return cases


def sft(name, tokenizer):
    model = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=len(tokenizer)))
    conversational = [{"prompt": CONVERSATIONS[c][:-1], "completion": CONVERSATIONS[c][-1:]} for c in ("one", "system")]
    messages = [{"messages": CONVERSATIONS[c]} for c in ("one", "system")]
    cases = []
    for rows, template, assistant_only in [
        (TEXT_ROWS, None, False), (PROMPT_ROWS, None, False), (conversational, "chatml", False), (messages, "chatml", False),
        (conversational, "chatml_generation", True), (messages, "chatml_generation", True),
    ]:
        tokenizer.chat_template = TEMPLATES[template] if template else None
        with tempfile.TemporaryDirectory() as folder:
            config = trl.SFTConfig(output_dir=folder, assistant_only_loss=assistant_only, max_length=24, report_to="none", use_cpu=True, bf16=False)
            trainer = trl.SFTTrainer(model=model, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
        out = trainer.train_dataset
        samples = []
        for row in out:
            samples.append({"input_ids": row["input_ids"], "labels": row["labels"] if "labels" in row else row["input_ids"]})
        cases.append({"tokenizer": name, "template": template, "assistant_only_loss": assistant_only, "max_length": 24, "rows": rows, "samples": samples})
    return cases


def packs():
    cases = []
    rng = random.Random(3407)
    for max_seq_length, count in [(16, 40), (64, 200), (7, 30)]:
        lengths = [rng.randint(1, max_seq_length) for _ in range(count)]
        rows = datasets.Dataset.from_dict({"input_ids": [[0] * n for n in lengths]})
        packed = trl.pack_dataset(rows, max_seq_length, "bfd")
        cases.append({"max_seq_length": max_seq_length, "lengths": lengths, "packs": sorted(sorted(pack) for pack in packed["seq_lengths"])})
    return cases


def parquet():
    rows = [{"messages": messages, "name": name, "label": i % 2 == 0, "weight": i / 4, "count": i, "when": datetime.date(2025, 1, 1 + i)}
            for i, (name, messages) in enumerate(CONVERSATIONS.items())]
    # Structs share their fields over all rows, as in published files: what a message lacks is null.
    pq.write_table(pa.Table.from_pylist(rows), GOLDEN / "rows.parquet", row_group_size=3, compression="zstd")


def main():
    GOLDEN.mkdir(parents=True, exist_ok=True)
    parquet()
    datasets.disable_progress_bars()
    cases = {"versions": VERSIONS, "templates": TEMPLATES, "conversations": CONVERSATIONS, "tools": TOOLS, "chats": [], "sft": [], "packs": packs()}
    for name, make in [("bpe", tokenizer_bpe), ("spm", tokenizer_spm)]:
        tokenizer = save_tokenizer(name, make())
        cases["chats"] += chats(name, tokenizer)
        tokenizer.pad_token = "</s>"
        cases["sft"] += sft(name, tokenizer)
    lines = json.dumps(cases, ensure_ascii=False, indent=None).replace('{"tokenizer"', '\n{"tokenizer"')
    (GOLDEN / "cases.json").write_text(lines + "\n", encoding="utf-8")
    for file in sorted(path for path in GOLDEN.rglob("*") if path.is_file()):
        size = file.stat().st_size
        assert size < 100_000, f"{file} has {size} bytes"
        print(f"{size:7} {file.relative_to(GOLDEN)}")


if __name__ == "__main__":
    main()
