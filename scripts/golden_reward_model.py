"""tests/golden/reward_models: tiny classifiers of one label and the scores that transformers gives texts of several lengths.

Padded on the right in one batch; the last text ends with the padding token, which transformers leaves out of account.
"""
import shutil

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

import make_golden as golden

CLASSIFIERS = {"llama_classifier": "llama", "qwen2_classifier": "qwen2"}


def make(name):
    folder = golden.GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    keys = golden.BASE | dict(intermediate_size=24, num_labels=1)
    config = AutoConfig.for_model(CLASSIFIERS[name.split("/")[1]], **keys)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").float().eval()
    golden.randomise(model, name)
    model.save_pretrained(folder)
    lengths = torch.tensor([1, 7, 20, 13])
    input_ids = torch.full((4, 20), config.pad_token_id)
    for row, length in enumerate(lengths):
        input_ids[row, :length] = golden.token_ids(f"{name} {row}", int(length), config.vocab_size)
    input_ids[3, 12] = config.pad_token_id
    # The mask hides padding alone, not the token that is like it.
    mask = (torch.arange(20) < lengths[:, None]).long()
    with torch.no_grad():
        scores = model(input_ids, attention_mask=mask).logits[:, 0]
        exact = model.double()(input_ids, attention_mask=mask).logits[:, 0]
    assert golden.rel(scores, exact) < 1e-5 and scores.std() > 0.01, (scores, exact)
    golden.save(folder / "golden.safetensors", dict(input_ids=input_ids, lengths=lengths, scores=scores), name)
