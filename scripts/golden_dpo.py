"""tests/golden/preference/trl.safetensors: loss and LoRA gradients of TRL's DPO, CPO, ORPO and KTO trainers on fixed tokens.

The trainers are made as a user makes them (base model and peft_config), get the weights of the golden adapter that BASE names, and
compute the loss of one batch that is given to them as tokens. Each value is checked against float64.

`<case>.loss`, `<case>.grad.<module>.lora_[AB]`, and of all cases `prompts`, `chosen`, `rejected` (padded with 0) with their lengths,
`labels` of KTO's examples, which are `prompts` with `chosen`. KTO's mismatched completion of a prompt is that of the row before.
cases.json: our words for each.
"""
import json
import tempfile

import datasets
import peft
import tokenizers
import torch
import transformers
import trl
from safetensors.torch import load_file
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import make_golden as golden

BASE = "llama_rslora"
PAIRS = 4
# our name -> (trainer, what it is told, our words where they are others)
CASES = {
    "sigmoid": ("dpo", dict(loss_type="sigmoid", beta=0.4), {}),
    "hinge": ("dpo", dict(loss_type="hinge", beta=0.2), {}),
    "ipo": ("dpo", dict(loss_type="ipo", beta=0.4), {}),
    "robust": ("dpo", dict(loss_type="robust", beta=0.4, label_smoothing=0.15), {}),
    "several": ("dpo", dict(loss_type=["sigmoid", "ipo"], loss_weights=[0.7, 0.2], beta=0.4), {}),
    "cpo": ("cpo", dict(loss_type="sigmoid", beta=0.3), dict(loss_type="cpo")),
    "cpo_smoothed": ("cpo", dict(loss_type="sigmoid", beta=0.3, label_smoothing=0.2, cpo_alpha=0.4), dict(loss_type="cpo")),
    "simpo": ("cpo", dict(loss_type="simpo", beta=2.0, simpo_gamma=0.7, cpo_alpha=0.0), {}),
    "simpo_nll": ("cpo", dict(loss_type="simpo", beta=2.0, cpo_alpha=0.5), {}),
    "orpo": ("orpo", dict(beta=0.3), dict(loss_type="orpo")),
    "kto": ("kto", dict(beta=0.4), dict(loss_type="kto")),
    "kto_weighted": ("kto", dict(beta=0.4, desirable_weight=1.5, undesirable_weight=0.7), dict(loss_type="kto")),
}
TRAINERS = {"dpo": (trl.DPOTrainer, trl.DPOConfig), "cpo": (CPOTrainer, CPOConfig), "orpo": (ORPOTrainer, ORPOConfig),
            "kto": (trl.KTOTrainer, trl.KTOConfig)}


def tokens():
    draw = golden.generator("preference")
    number = lambda low, high: int(torch.randint(low, high, (1,), generator=draw))
    ids = lambda length: torch.randint(3, 64, (length,), generator=draw)
    rows = [dict(prompt=ids(number(2, 8)), chosen=ids(number(1, 9)), rejected=ids(number(1, 9))) for _ in range(PAIRS)]
    return rows, torch.tensor([True, False, False, True])


def padded(rows, value):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def joined(prompts, completions):
    """input_ids, attention_mask, completion_mask of prompts with completions."""
    both = [torch.cat(pair) for pair in zip(prompts, completions)]
    masks = [torch.cat([torch.zeros_like(prompt), torch.ones_like(completion)]) for prompt, completion in zip(prompts, completions)]
    return padded(both, 0), padded([torch.ones_like(row) for row in both], 0), padded(masks, 0)


def batch_for(kind, rows, labels):
    prompts, chosen, rejected = ([row[name] for row in rows] for name in ("prompt", "chosen", "rejected"))
    if kind == "dpo":
        input_ids, attention_mask, completion_mask = joined(prompts * 2, chosen + rejected)
        return dict(input_ids=input_ids, attention_mask=attention_mask, completion_mask=completion_mask)
    if kind == "kto":
        input_ids, attention_mask, completion_mask = joined(prompts, chosen)
        other_ids, other_attention, other_mask = joined(prompts, chosen[-1:] + chosen[:-1])
        return dict(input_ids=input_ids, attention_mask=attention_mask, completion_mask=completion_mask, label=labels,
                    KL_input_ids=other_ids, KL_attention_mask=other_attention, KL_completion_mask=other_mask)
    batch = {}
    for name, completions in (("chosen", chosen), ("rejected", rejected)):
        input_ids, attention_mask, completion_mask = joined(prompts, completions)
        batch |= {f"{name}_input_ids": input_ids, f"{name}_attention_mask": attention_mask,
                  f"{name}_labels": input_ids.masked_fill(completion_mask == 0, -100)}
    return batch


def tokenizer():
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 64)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<unk>")


def trainer_of(kind, told, folder):
    make, config = TRAINERS[kind]
    columns = dict(completion="w5", label=True) if kind == "kto" else dict(chosen="w5", rejected="w6")
    dataset = datasets.Dataset.from_list([dict(prompt="w3 w4 ", **columns)] * PAIRS)
    args = config(output_dir=folder, report_to="none", use_cpu=True, bf16=False, per_device_train_batch_size=PAIRS, **told)
    lora = peft.LoraConfig.from_pretrained(golden.GOLDEN / "adapters" / BASE)
    lora.inference_mode = False
    model = golden.load(golden.GOLDEN / lora.base_model_name_or_path)
    trainer = make(model=model, args=args, train_dataset=dataset, processing_class=tokenizer(), peft_config=lora)
    weights = load_file(golden.GOLDEN / "adapters" / BASE / "adapter_model.safetensors")
    peft.set_peft_model_state_dict(trainer.model, weights)
    return trainer


def loss_and_gradients(kind, told, rows, labels, dtype):
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(kind, told, folder)
        trainer.model.to(dtype).train()
        batch = batch_for(kind, rows, labels)
        if kind in ("dpo", "kto"):
            loss = trainer._compute_loss(trainer.model, batch, False)
        else:
            loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
        loss.backward()
    named = {key.replace("base_model.model.", "").replace(".default", ""): weight
             for key, weight in trainer.model.named_parameters() if weight.requires_grad}
    return {"loss": loss.detach()} | {f"grad.{key}": weight.grad for key, weight in named.items()}


def make(name):
    rows, labels = tokens()
    out, cases, furthest = {}, {}, 0.0
    for case, (kind, told, ours) in CASES.items():
        found = loss_and_gradients(kind, told, rows, labels, torch.float32)
        exact = loss_and_gradients(kind, told, rows, labels, torch.float64)
        for key in found:
            distance = golden.rel(found[key], exact[key])
            assert distance < 5e-6 and exact[key].abs().max() > 1e-5, (case, key, distance)
            furthest = max(furthest, distance)
        out |= {f"{case}.{key}": value.float() for key, value in found.items()}
        cases[case] = told | ours
    for column in ("prompt", "chosen", "rejected"):
        out[f"{column}s"] = padded([row[column] for row in rows], 0)
        out[f"{column}_lengths"] = torch.tensor([len(row[column]) for row in rows])
    out["labels"] = labels.long()
    golden.VERSIONS["trl"] = trl.__version__
    (golden.GOLDEN / name).mkdir(exist_ok=True)
    golden.save(golden.GOLDEN / name / "trl.safetensors", out, name, adapter=BASE, distance_to_float64=furthest)
    (golden.GOLDEN / name / "cases.json").write_text(json.dumps(cases, indent=1) + "\n")
