#!/usr/bin/env python3
"""Writes tests/golden/grpo.safetensors: what TRL's GRPOTrainer makes of fixed completions and rewards.

Needs what make_golden.py needs, and trl (the version stands in the metadata). All on the CPU, in f32, on the checkpoint `llama` with the
adapter `llama_layers`. The trainer's own code runs from rewards to loss: _generate_and_score_completions with fixed completions and
rewards in place of generation and reward functions, then _compute_loss. Log-probabilities are plain: log_softmax of logits /
temperature. Where a case has two iterations, the adapter moves to `moved` between the two, so that ratios leave the clip range.

prompt_ids.I, completion_ids.I, sampler.I of completion I; rewards [N, K] with NaN for None; moved.<weight>; of each case loss.CASE,
gradient.CASE (of the adapter, in the order of its names, flattened), of some advantages.CASE. The metadata `cases` has their arguments,
those of `defaults` left out.

usage: scripts/make_golden.py --only grpo
"""
import collections
import contextlib
import json
import types

import make_golden as golden
import peft
import torch
import trl
from accelerate import Accelerator
from trl import GRPOTrainer

EOS, PAD = 2, 0
GENERATIONS = 4
WEIGHTS = [1.0, 0.5]
DEFAULTS = dict(loss_type="dapo", scale_rewards="group", importance_sampling_level="token", beta=0.0, epsilon=0.2, epsilon_high=None,
                delta=None, mask_truncated_completions=False, top_entropy_quantile=1.0, temperature=1.0, num_iterations=2,
                steps_per_generation=1,
                use_bias_correction_kl=True, importance_sampling_correction=False, importance_sampling_mode="sequence_mask",
                importance_sampling_clip_min=None, importance_sampling_clip_max=3.0,
                off_policy_mask_threshold=None)
LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"]
CISPO = dict(loss_type="cispo", epsilon_high=1.1)
CASES = {name: dict(loss_type=name) for name in LOSS_TYPES}
CASES |= {f"{name}_sequence": dict(loss_type=name, importance_sampling_level="sequence") for name in ("grpo", "dapo", "luspo", "sapo")}
CASES |= {f"{name}_masked": dict(loss_type=name, mask_truncated_completions=True) for name in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")}
CASES |= {f"is_{mode}": dict(importance_sampling_correction=True, importance_sampling_mode=mode, importance_sampling_clip_min=0.8,
                             importance_sampling_clip_max=1.25)
          for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")}
CASES |= {
    "cispo": CISPO,
    "on_policy": dict(num_iterations=1),
    "grpo_on_policy_kl": dict(loss_type="grpo", num_iterations=1, beta=0.2),
    "batch": dict(scale_rewards="batch"),
    "none": dict(scale_rewards="none"),
    "kl": dict(beta=0.2),
    "kl_plain": dict(beta=0.2, use_bias_correction_kl=False, loss_type="bnpo"),
    "kl_cispo": CISPO | dict(beta=0.2),
    "epsilon_high": dict(epsilon=0.05, epsilon_high=0.1),
    "delta": dict(delta=1.1, epsilon=0.05),
    "delta_sequence": dict(delta=1.02, epsilon=0.01, importance_sampling_level="sequence"),
    "top_entropy": dict(top_entropy_quantile=0.4),
    "top_entropy_masked_kl": dict(top_entropy_quantile=0.7, mask_truncated_completions=True, beta=0.2, loss_type="grpo"),
    "temperature": dict(temperature=0.7, beta=0.2),
    # TRL knows the sampler's log-probabilities only where it corrects for them.
    "off_policy_mask": dict(off_policy_mask_threshold=0.05, beta=0.2, importance_sampling_correction=True,
                            importance_sampling_mode="token_truncate"),
    # The first of two steps on one generation batch.
    "dapo_half": dict(steps_per_generation=2),
    "bnpo_half": dict(steps_per_generation=2, loss_type="bnpo"),
}


def number(draw, low, high):
    return int(torch.randint(low, high, (1,), generator=draw))


def completions(draw):
    """Two groups; every third completion is cut off."""
    rows = []
    for group in range(2):
        prompt = [number(draw, 3, 64) for _ in range(number(draw, 2, 6))]
        for sample in range(GENERATIONS):
            ids = [number(draw, 3, 64) for _ in range(number(draw, 3, 11))]
            rows.append((prompt, ids if len(rows) % 3 == 2 else ids + [EOS]))
    return rows


class Trainer(GRPOTrainer):
    """The trainer's code on what it is given; nothing is generated and no reward function called."""

    def __init__(self, model, rows, rewards, sampler, **case):
        arguments = DEFAULTS | case
        self.model, self.rows, self.fixed_rewards, self.sampler = model, rows, rewards, sampler
        self.accelerator = Accelerator(cpu=True)
        high = arguments["epsilon_high"]
        self.args = types.SimpleNamespace(
            steps_per_generation=arguments["steps_per_generation"], gradient_accumulation_steps=1, report_to=[],
            per_device_train_batch_size=len(rows) // arguments["steps_per_generation"],
            gradient_checkpointing_kwargs=None, delta=arguments["delta"], use_bias_correction_kl=arguments["use_bias_correction_kl"],
            sapo_temperature_pos=1.0, sapo_temperature_neg=1.05)
        self.environment_factories = self.environments = self.tools = self.pad_to_multiple_of = self.ref_model = None
        self._entropy_bonus_enabled = self.aux_loss_enabled = self.log_multimodal = False
        self._tokenizer = types.SimpleNamespace(pad_token_id=PAD)
        self.eos_token_ids, self.num_generations, self.current_gradient_accumulation_steps = [EOS], GENERATIONS, 1
        self.max_completion_length, self.multi_objective_aggregation = 12, "sum_then_normalize"
        self.reward_weights, self.reward_func_names, self.reward_funcs = torch.tensor(WEIGHTS), ["a", "b"], [None, None]
        self.epsilon_low, self.epsilon_high = arguments["epsilon"], arguments["epsilon"] if high is None else high
        self.use_vllm = self.vllm_importance_sampling_correction = arguments["importance_sampling_correction"]
        for name in ("mode", "clip_min", "clip_max"):
            setattr(self, f"vllm_importance_sampling_{name}", arguments[f"importance_sampling_{name}"])
        for name in ("loss_type", "scale_rewards", "importance_sampling_level", "beta", "mask_truncated_completions",
                     "top_entropy_quantile", "temperature", "num_iterations", "off_policy_mask_threshold"):
            setattr(self, name, arguments[name])
        self._metrics = collections.defaultdict(lambda: collections.defaultdict(list))
        self._logs = collections.defaultdict(lambda: collections.defaultdict(list))
        for name in ("prompt", "completion", "advantages", "images"):
            self._logs[name] = []
        self._pending_extra_logs, self._pending_metrics = collections.defaultdict(list), collections.defaultdict(list)

    def _generate(self, prompts):
        prompt_ids, completion_ids = zip(*self.rows)
        return (list(prompt_ids), list(completion_ids), None, [""] * len(self.rows), self.sampler, {}, None, None)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        return self.fixed_rewards.clone()

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, batch_size=None,
                                           compute_entropy=False, compute_aux_loss=False, **nothing):
        # Row by row, without padding; tokens of a masked completion have none, and count nothing.
        logps, entropies = [], []
        for ids, mask in zip(input_ids, attention_mask):
            completion = int(mask[-logits_to_keep:].sum())
            log_p = (model(input_ids=ids[mask.bool()][None]).logits[0, -completion - 1:-1] / self.temperature).log_softmax(-1)
            chosen = log_p.gather(1, ids[-logits_to_keep:][:completion, None]).squeeze(1)
            fill = lambda values: torch.nn.functional.pad(values if completion else values[:0], (0, logits_to_keep - completion))
            logps.append(fill(chosen))
            entropies.append(fill(-(log_p.exp() * log_p).sum(-1).detach()))
        return torch.stack(logps), torch.stack(entropies), None


@contextlib.contextmanager
def weights_of(model, values):
    """The adapter with other values for as long as it lasts."""
    before = {name: weight.detach().clone() for name, weight in adapter(model).items()}
    with torch.no_grad():
        for name, weight in adapter(model).items():
            weight.copy_(values[name])
    yield
    with torch.no_grad():
        for name, weight in adapter(model).items():
            weight.copy_(before[name])


def adapter(model):
    found = {name.replace(".default", ""): weight for name, weight in model.named_parameters() if "lora_" in name}
    return dict(sorted(found.items()))


def run(model, moved, trainer):
    model.train()
    model.zero_grad()
    inputs = trainer._generate_and_score_completions([dict(prompt="") for _ in trainer.rows])
    advantages = inputs["advantages"]
    inputs = trl.trainer.utils.split_tensor_dict(inputs, trainer.args.steps_per_generation)[0]
    start = {name: weight.detach().clone() for name, weight in adapter(model).items()}
    with weights_of(model, moved if trainer.num_iterations > 1 else start):
        loss = trainer._compute_loss(model, inputs)
        loss.backward()
    gradient = torch.cat([weight.grad.flatten() for weight in adapter(model).values()])
    return loss.detach().clone(), gradient.clone(), advantages, trainer._metrics["train"]


def make(_name):
    golden.VERSIONS["trl"] = trl.__version__
    draw = golden.generator("grpo/completions")
    rows = completions(draw)
    rewards = torch.rand(len(rows), len(WEIGHTS), generator=draw).round(decimals=2)
    rewards[1, 0] = rewards[5, 1] = rewards[6, 0] = rewards[6, 1] = torch.nan
    base = golden.load(golden.GOLDEN / "llama")
    model = peft.PeftModel.from_pretrained(base, golden.GOLDEN / "adapters" / "llama_layers", is_trainable=True)
    moved = {name: weight.detach() + 0.15 * torch.randn(weight.shape, generator=draw) for name, weight in adapter(model).items()}
    # As if by an engine that rounds otherwise: the policy's own with noise.
    plain = Trainer(model, rows, rewards, None)
    out = {"rewards": rewards, "reward_weights": torch.tensor(WEIGHTS)} | {f"moved.{name}": weight for name, weight in moved.items()}
    sampler = []
    with torch.no_grad():
        for i, (prompt, ids) in enumerate(rows):
            all_ids = torch.tensor([prompt + ids])
            own = plain._get_per_token_logps_and_entropies(model, all_ids, torch.ones_like(all_ids), len(ids))[0][0]
            sampler.append((own + 0.2 * torch.randn(len(ids), generator=draw)).tolist())
            out |= {f"prompt_ids.{i}": torch.tensor(prompt), f"completion_ids.{i}": torch.tensor(ids), f"sampler.{i}": torch.tensor(sampler[-1])}
    losses, farthest = {}, 0.0
    exact = peft.PeftModel.from_pretrained(golden.load(golden.GOLDEN / "llama", torch.float64),
                                           golden.GOLDEN / "adapters" / "llama_layers", is_trainable=True).double()
    moved64 = {name: weight.double() for name, weight in moved.items()}
    for name, case in CASES.items():
        loss, gradient, advantages, metrics = run(model, moved, Trainer(model, rows, rewards, sampler, **case))
        loss64, gradient64, *_ = run(exact, moved64, Trainer(exact, rows, rewards, sampler, **case))
        distance = golden.rel(gradient, gradient64)
        farthest = max(farthest, distance)
        assert distance < 3e-6 and abs(loss - loss64) < 1e-6, (name, distance, loss, loss64)
        losses[name] = gradient
        out |= {f"loss.{name}": loss.reshape(1), f"gradient.{name}": gradient}
        if name in ("dapo", "batch", "none"):
            out[f"advantages.{name}"] = advantages
        shown = {key.split("/")[-1]: round(value[0], 3) for key, value in metrics.items() if key.startswith(("clip", "cispo", "kl"))}
        print(f"{name:24} {loss.item():+.6f}  {distance:.1e}  {shown}")
    # Every case differs from every other: none passes by not caring. In one step of a generation batch dapo is bnpo.
    names = list(losses)
    for i, a in enumerate(names):
        for b in names[:i]:
            assert a.replace("dapo", "bnpo") == b or golden.rel(losses[a], losses[b]) > 1e-3, (a, b)
    path = golden.GOLDEN / "grpo.safetensors"
    golden.save(path, out, "grpo", defaults=json.dumps(DEFAULTS), cases=json.dumps(CASES), gradient_distance_to_float64=farthest)
