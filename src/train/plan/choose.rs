//! What each layer keeps, within a budget.
//!
//! From the plan that needs least memory (block inputs, and the attention outputs of long samples, at the host; the rest computed
//! again) one tensor of one layer after the other is kept on the device, the one first whose bytes save most time. Within a
//! kind the last layer comes first: its memory is free again when the backward of earlier layers, which need room to compute
//! theirs, begins. The plan is the fastest of that row that fits, so a larger budget never gives a slower plan, and the same
//! work, card and budget always give the same one.

use serde::Serialize;

use super::time::BlockMs;
use super::{Card, Layer, Memory, Work};
use crate::ops::{BlockPolicy, Place, Policy};
use crate::train::{GradientCheckpointing, Predicted, Recording, RunPlan};

/// Bytes that a run may take: of the device, as nvidia-smi counts, and of the host in pinned buffers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Budget {
    pub device: u64,
    pub host: u64,
}

/// What each layer keeps, and what that is predicted to cost.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    pub policies: Vec<Policy>,
    pub memory: Memory,
    /// Of an optimizer step.
    pub milliseconds: f64,
}

/// A tensor that can be kept: which place of which policy.
type Field = fn(&mut Policy) -> &mut Place;

/// (its name, its place, what it saves of the backward)
type Kind = (&'static str, Field, fn(&[BlockMs; 2]) -> f64);

/// After what they are made from, as they are worth nothing without.
const KINDS: [Kind; 10] = [
    ("gate and up", |p| &mut p.mlp.projected, |ms| ms[1].projected),
    ("q, k and v", |p| &mut p.attention.projected, |ms| ms[0].projected),
    ("attention's output", |p| &mut p.attention.inner, |ms| ms[0].inner),
    ("the attention block's output before its norm", |p| &mut p.attention.output, |ms| ms[0].output),
    ("the MLP's output before its norm", |p| &mut p.mlp.output, |ms| ms[1].output),
    ("the activation's output", |p| &mut p.mlp.inner, |ms| ms[1].inner),
    ("the attention block's norm output", |p| &mut p.attention.normed, |ms| ms[0].normed),
    ("the MLP's norm output", |p| &mut p.mlp.normed, |ms| ms[1].normed),
    ("the attention block's input", |p| &mut p.attention.input, |_| 0.0),
    ("the MLP's input", |p| &mut p.mlp.input, |_| 0.0),
];
/// Of KINDS, what kind (by its index) is worth nothing without another.
const WITHOUT: [(usize, usize); 3] = [(5, 0), (6, 1), (7, 0)];

impl Work {
    /// The work under the policies given.
    pub fn plan(&self, policies: Vec<Policy>, card: &Card) -> Plan {
        let (memory, milliseconds) = (self.memory(&policies), self.milliseconds(&policies, card));
        Plan { policies, memory, milliseconds }
    }

    /// The same policy for all layers, as the words of `--use-gradient-checkpointing` have it.
    pub fn uniform_plan(&self, policy: Policy, card: &Card) -> Plan {
        self.plan(self.layers.iter().map(|layer| self.possible(layer, policy)).collect(), card)
    }

    /// The plan that a word of `--use-gradient-checkpointing` means; none if it does not fit `budget`.
    pub fn chosen(&self, checkpointing: GradientCheckpointing, card: &Card, budget: Budget) -> Option<Plan> {
        match checkpointing {
            GradientCheckpointing::Auto => self.fastest(card, budget),
            other => self.uniform_within(other.policy(), card, budget),
        }
    }

    /// The one of those that needs least of the device, with `host` bytes of the host where they are chosen freely.
    pub fn least(&self, checkpointing: GradientCheckpointing, card: &Card, host: u64) -> Plan {
        match checkpointing {
            GradientCheckpointing::Auto => self.smallest(card, host),
            other => self.least_uniform_plan(other.policy(), card),
        }
    }

    /// The same of what fits `budget`; none if that does not.
    fn uniform_within(&self, policy: Policy, card: &Card, budget: Budget) -> Option<Plan> {
        self.within(budget).iter().map(|work| work.uniform_plan(policy, card)).find(|plan| plan.fits(budget))
    }

    /// The same with the least that rollouts can work with.
    pub fn least_uniform_plan(&self, policy: Policy, card: &Card) -> Plan {
        self.with_least_rollout().uniform_plan(policy, card)
    }

    /// The fastest plan within `budget`; none if none fits. Rollouts whose pages and recorded steps stay come before steps that keep
    /// more.
    pub fn fastest(&self, card: &Card, budget: Budget) -> Option<Plan> {
        self.within(budget).iter().find_map(|work| work.fastest_step(card, budget))
    }

    fn fastest_step(&self, card: &Card, budget: Budget) -> Option<Plan> {
        // Time first; then what leaves the host and its bus alone.
        let better = |a: &Plan, b: &Plan| {
            (a.milliseconds.total_cmp(&b.milliseconds))
                .then(a.memory.host.cmp(&b.memory.host))
                .then(a.memory.device().cmp(&b.memory.device()))
        };
        self.rows(card, budget.host).into_iter().flatten().filter(|plan| plan.fits(budget)).min_by(better)
    }

    /// The plan that needs least of the device with `host` bytes of the host.
    pub fn smallest(&self, card: &Card, host: u64) -> Plan {
        let work = self.with_least_rollout();
        let all = work.rows(card, host).into_iter().flatten().filter(|plan| plan.memory.host <= host);
        let smallest = all.min_by_key(|plan| plan.memory.device());
        smallest.unwrap_or_else(|| work.uniform_plan(Policy::RECOMPUTE, card))
    }

    /// The longest samples, in steps of 256 tokens, that fit `budget` in as many samples a pass; 0 if none does. In GRPO completions
    /// are as much longer.
    pub fn longest(&self, checkpointing: GradientCheckpointing, budget: Budget, card: &Card) -> u64 {
        let prompt = self.rollout.map_or(0, |rollout| rollout.prompt);
        let fits = |steps: u64| {
            let work = self.with_length((256 * steps).max(prompt + 1));
            work.least(checkpointing, card, budget.host).fits(budget)
        };
        let (mut fitting, mut above) = (0, 1);
        while above < 1 << 16 && fits(above) {
            (fitting, above) = (above, 2 * above);
        }
        while above - fitting > 1 {
            let middle = fitting.midpoint(above);
            if fits(middle) { fitting = middle } else { above = middle }
        }
        if 256 * fitting > prompt { 256 * fitting } else { 0 }
    }

    /// Both rows of plans, each from least memory to everything kept: with inputs at the host as far as `host` bytes go, and
    /// with all of them on the device.
    fn rows(&self, card: &Card, host: u64) -> [Vec<Plan>; 2] {
        let mut left = host;
        let at_host: Vec<Policy> = (self.layers.iter())
            .map(|layer| {
                // The first layers wait longest. Attention's output after the inputs, which save more for their bytes.
                let whole = self.possible(layer, Policy::HOST);
                let mut inputs = whole;
                if inputs.attention.inner == Place::Host {
                    inputs.attention.inner = Place::Recompute;
                }
                for policy in [whole, inputs] {
                    let needed = self.host_of(layer, policy);
                    if needed <= left {
                        left -= needed;
                        return policy;
                    }
                }
                Policy::RECOMPUTE
            })
            .collect();
        let on_device = vec![Policy::RECOMPUTE; self.layers.len()];
        [self.row(at_host, card), self.row(on_device, card)]
    }

    fn host_of(&self, layer: &Layer, policy: Policy) -> u64 {
        Work { layers: vec![layer.clone()], ..self.clone() }.memory(&[policy]).host
    }

    /// `policy` as far as it makes sense for `layer`: attention's output goes to the host only where that is quicker.
    fn possible(&self, layer: &Layer, mut policy: Policy) -> Policy {
        if policy.attention.inner == Place::Host && !self.inner_to_host(layer) {
            policy.attention.inner = Place::Recompute;
        }
        policy
    }

    fn row(&self, start: Vec<Policy>, card: &Card) -> Vec<Plan> {
        let mut steps = self.steps(card);
        steps.retain(|step| step.bytes > 0);
        let mut policies = start;
        let mut plans = vec![self.plan(policies.clone(), card)];
        for step in steps {
            let (_, field, _) = KINDS[step.kind];
            let place = field(&mut policies[step.layer]);
            if *place != Place::Device {
                *place = Place::Device;
                plans.push(self.plan(policies.clone(), card));
            }
        }
        plans.push(self.plan(vec![Policy::KEEP; self.layers.len()], card));
        plans
    }

    /// Every tensor of every layer in the order in which they are kept.
    fn steps(&self, card: &Card) -> Vec<Step> {
        let mut steps = Vec::new();
        let mut known: Vec<(&Layer, [Worth; KINDS.len()])> = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            let found = known.iter().position(|(other, _)| *other == layer).unwrap_or_else(|| {
                known.push((layer, self.worths(layer, card)));
                known.len() - 1
            });
            let worths = &known[found].1;
            steps.extend((0..KINDS.len()).map(|kind| Step {
                layer: index,
                kind,
                ..Step::from(worths[kind])
            }));
        }
        steps.sort_by(|a, b| {
            b.ratio.total_cmp(&a.ratio).then(a.kind.cmp(&b.kind)).then(b.layer.cmp(&a.layer))
        });
        steps
    }

    /// What keeping each kind of tensor of `layer` takes and saves.
    fn worths(&self, layer: &Layer, card: &Card) -> [Worth; KINDS.len()] {
        let blocks = self.blocks(layer, card);
        let one = Work { layers: vec![layer.clone()], ..self.clone() };
        let mut worths: [Worth; KINDS.len()] = std::array::from_fn(|kind| {
            let (_, field, ms) = KINDS[kind];
            let mut kept = Policy::RECOMPUTE;
            kept.attention.input = Place::Host;
            kept.mlp.input = Place::Host;
            if let Some((_, base)) = WITHOUT.iter().find(|(dependent, _)| *dependent == kind) {
                *KINDS[*base].1(&mut kept) = Place::Device;
            }
            let without = one.kept(&kept);
            *field(&mut kept) = Place::Device;
            let bytes = one.kept(&kept).saturating_sub(without);
            Worth { bytes, ratio: ms(&blocks) / bytes.max(1) as f64 }
        });
        for (kind, base) in WITHOUT {
            worths[kind].ratio = worths[kind].ratio.min(worths[base].ratio);
        }
        worths
    }
}

#[derive(Debug, Clone, Copy)]
struct Worth {
    bytes: u64,
    /// Milliseconds that a byte saves.
    ratio: f64,
}

#[derive(Debug, Clone, Copy)]
struct Step {
    layer: usize,
    kind: usize,
    bytes: u64,
    ratio: f64,
}

impl From<Worth> for Step {
    fn from(Worth { bytes, ratio }: Worth) -> Step {
        Step { layer: 0, kind: 0, bytes, ratio }
    }
}

impl Plan {
    pub fn fits(&self, budget: Budget) -> bool {
        self.memory.device() <= budget.device && self.memory.host <= budget.host
    }

    /// What a step needs to know of it. Gaps between the tensors of a recorded step took up to 0.7 GiB where its blocks needed
    /// 1.1, and 1 GiB where it kept 11 (QLoRA 8B on an H200). What a recorded step holds is not there for rollouts, so none is
    /// recorded where they need it.
    pub fn run(&self, budget: Budget) -> RunPlan {
        let Memory { kept, workspace, .. } = self.memory;
        let needed = self.memory.device();
        let gives_way = self.memory.rollout.is_some_and(|rollout| !rollout.stays);
        // Steps of several shapes write to the same gradients, which then stay.
        let recording = match budget.device.saturating_sub(needed + self.memory.other_gradients) {
            _ if gives_way => Recording::No,
            left if left >= kept + workspace => Recording::Yes,
            left if left >= workspace + kept / 8 => Recording::OneShape,
            _ => Recording::No,
        };
        let predicted = Predicted { allocated: self.memory.allocated(), device: needed };
        RunPlan { policies: self.policies.clone(), recording, predicted }
    }

    /// What of how many layers is kept where, a line each: `gate and up: on the device in 5 of 32 layers`.
    pub fn lines(&self) -> Vec<(&'static str, String)> {
        let layers = self.policies.len();
        let line = |&(name, field, _): &Kind| {
            let places: Vec<Place> = self.policies.iter().map(|policy| *field(&mut { *policy })).collect();
            let count = |wanted: Place| places.iter().filter(|place| **place == wanted).count();
            let mut words = Vec::new();
            for (place, word) in [(Place::Device, "on the device"), (Place::Host, "at the host")] {
                match count(place) {
                    0 => {}
                    all if all == layers => words.push(word.to_string()),
                    some => words.push(format!("{word} in {some} of {layers} layers")),
                }
            }
            (!words.is_empty()).then(|| (name, words.join(", ")))
        };
        KINDS.iter().filter_map(line).collect()
    }
}

/// Of each layer, `attention` and `mlp`: a letter a tensor (input, normed, projected, inner, output), `d` on the device, `h` at
/// the host, `-` computed again.
impl Serialize for Plan {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let letters = |policy: &BlockPolicy| -> String {
            [policy.input, policy.normed, policy.projected, policy.inner, policy.output]
                .map(|place| match place {
                    Place::Device => 'd',
                    Place::Host => 'h',
                    _ => '-',
                })
                .iter()
                .collect()
        };
        let layers: Vec<[String; 2]> =
            self.policies.iter().map(|policy| [letters(&policy.attention), letters(&policy.mlp)]).collect();
        let mut plan = serializer.serialize_struct("Plan", 6)?;
        plan.serialize_field("memory", &self.memory)?;
        plan.serialize_field("peak_allocated", &self.memory.allocated())?;
        plan.serialize_field("peak_device", &self.memory.device())?;
        plan.serialize_field("host", &self.memory.host)?;
        plan.serialize_field("ms_per_step", &self.milliseconds)?;
        plan.serialize_field("layers", &layers)?;
        plan.end()
    }
}
