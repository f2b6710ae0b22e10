//! One optimizer step: forward and backward of its micro-batches, clipping, update.
//!
//! Nothing here waits for the device but the reading of loss and norm at the end. On a GPU, where launching the kernels of
//! a small model takes longer than running them, a micro-batch whose shape was seen twice is recorded as a CUDA graph and
//! launched as a whole from then on; so is the update.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::Result;
use tch::{Kind, Tensor};

use super::TrainingArguments;
use super::objective::Objective;
use super::optim::AdamW;
use crate::data::Batch;
use crate::device::{self, Graph};
use crate::models::{BatchShape, Decoder, DeviceBatch};
use crate::ops::{DropoutKey, LoraCasts, Pass, Policy};

/// Runs the steps of one model, one after another.
pub struct Stepper<'a> {
    objective: &'a dyn Objective,
    arguments: &'a TrainingArguments,
    pub optimizer: AdamW,
    /// On the device, so that a recorded step reads and writes them: the loss of the step so far,
    loss: Tensor,
    /// and what the sums of its micro-batches are divided by.
    targets: Tensor,
    casts: Option<LoraCasts>,
    /// What each layer keeps for the backward.
    policies: Arc<[Policy]>,
    /// Memory has no room for recorded steps beside others.
    one_shape: bool,
    graphs: Graphs,
}

/// What a step keeps to, chosen before it runs (`train::plan`).
#[derive(Debug, Clone)]
pub struct RunPlan {
    /// What each layer keeps for the backward.
    pub policies: Vec<Policy>,
    pub recording: Recording,
    pub predicted: Predicted,
}

/// The highest that memory on the device will be, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Predicted {
    /// Held by tensors.
    pub allocated: u64,
    /// Held by the process.
    pub device: u64,
}

/// Whether steps are recorded as CUDA graphs. A graph's memory is its own: nothing of it is returned while it is recorded, so
/// that gaps between tensors stay, and steps of other shapes cannot use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recording {
    No,
    /// Until the first batch of another shape.
    OneShape,
    Yes,
}

/// What a step gave.
#[derive(Debug, Clone, Copy)]
pub struct StepOutcome {
    /// Mean over all target tokens.
    pub loss: f64,
    /// 2-norm of the gradient, before clipping.
    pub grad_norm: f64,
    /// In f16, the scale of the next step's loss.
    pub loss_scale: Option<f64>,
}

impl StepOutcome {
    /// Whether the weights were updated: a step whose loss or gradient is not finite changes nothing.
    pub fn is_finite(&self) -> bool {
        self.loss.is_finite() && self.grad_norm.is_finite()
    }

    /// Whether only the scaled gradient was not finite: the step was left out, and the next one has half the scale. Not where
    /// the scale is so small that it cannot be the reason.
    pub fn overflowed(&self) -> bool {
        self.loss.is_finite()
            && !self.grad_norm.is_finite()
            && self.loss_scale.is_some_and(|scale| scale >= 1.0)
    }
}

impl<'a> Stepper<'a> {
    /// With `arguments.deterministic` on a GPU, the whole process is deterministic from here on.
    pub fn new(
        objective: &'a dyn Objective,
        arguments: &'a TrainingArguments,
        decoder: &Decoder,
    ) -> Result<Stepper<'a>> {
        if arguments.deterministic && decoder.device.is_cuda() {
            device::use_deterministic_algorithms();
        }
        let mut optimizer = AdamW::new(
            decoder.trainable(),
            arguments.optim_for(decoder.is_quantized()),
            (arguments.adam_beta1, arguments.adam_beta2),
            arguments.adam_epsilon,
            arguments.weight_decay,
        )?;
        if decoder.kind == Kind::Half {
            optimizer = optimizer.with_loss_scale()?;
        }
        let kind = if decoder.kind == Kind::Double { Kind::Double } else { Kind::Float };
        let scalar = || Tensor::f_zeros([0i64; 0], (kind, decoder.device));
        let (loss, targets) = (scalar()?, scalar()?);
        // A mask is a function of the step's number, which a recorded step would repeat.
        let graphs = Graphs::new(Graph::available(decoder.device) && !decoder.has_dropout());
        let policies = Arc::new([arguments.use_gradient_checkpointing.policy()]);
        let casts = if Policy::spare_memory(&*policies) { None } else { decoder.lora_casts()? };
        Ok(Stepper {
            objective,
            arguments,
            optimizer,
            loss,
            targets,
            casts,
            policies,
            one_shape: false,
            graphs,
        })
    }

    /// The same, keeping to a plan.
    pub fn with_plan(mut self, plan: RunPlan) -> Stepper<'a> {
        if Policy::spare_memory(&plan.policies) {
            self.casts = None;
        }
        self.policies = plan.policies.into();
        self.one_shape = plan.recording == Recording::OneShape;
        if plan.recording == Recording::No {
            self.graphs.stop();
        }
        self
    }

    /// Leaves the device to others until the next step: without gradients, unless recorded steps write to them, and with no memory
    /// cached.
    pub fn give_way(&mut self, decoder: &Decoder) -> Result<()> {
        if self.graphs.first.is_none() {
            self.optimizer.drop_grad()?;
        }
        device::empty_cache(decoder.device)
    }

    /// The same, launching every kernel by itself: to compare with.
    pub fn without_graphs(mut self) -> Stepper<'a> {
        self.graphs.enabled = false;
        self
    }

    /// Micro-batch shapes that are recorded.
    pub fn graphs(&self) -> usize {
        usize::from(self.graphs.first.is_some()) + self.graphs.adding.len()
    }

    /// Why steps are no longer recorded.
    pub fn not_recorded(&self) -> Option<&str> {
        self.graphs.problem.as_deref()
    }

    /// Step number `step`, counted from 0, on `batches`: the gradient of the mean loss over all their targets, clipped, and
    /// an update of the weights.
    pub fn run(
        &mut self,
        decoder: &Decoder,
        batches: &[Batch],
        step: u64,
        learning_rate: f64,
    ) -> Result<StepOutcome> {
        let args = self.arguments;
        let targets: usize = batches.iter().map(|batch| self.objective.targets(batch)).sum();
        // All uploads before the first forward pass: none stands between two of them. But rows of an embedding in the host's
        // memory, large and slow to gather, are uploaded while the device is busy with the micro-batch before.
        let mut uploads = batches.iter().map(|batch| self.objective.upload(decoder, batch));
        let ahead: Vec<_> =
            if decoder.offloads_embedding() { Vec::new() } else { uploads.by_ref().collect() };
        self.optimizer.set_learning_rate(learning_rate)?;
        if let Some(casts) = &self.casts {
            casts.refresh()?;
        }
        self.objective.start_step(decoder, batches)?;
        let _ = self.targets.f_fill_(targets.max(1) as f64)?;
        let _ = self.loss.f_zero_()?;
        let policies = Arc::clone(&self.policies);
        for (micro_batch, batch) in ahead.into_iter().chain(uploads).enumerate() {
            let dropout = Some(DropoutKey::new(args.seed, step, micro_batch as u64));
            let pass = Pass { policies: &policies, dropout, ..Pass::INFERENCE };
            self.micro_batch(decoder, batch?, pass, micro_batch == 0)?;
        }
        let grad_norm = self.update()?;
        let scalars: Vec<Tensor> = [&self.loss, &grad_norm]
            .into_iter()
            .chain(self.optimizer.loss_scale())
            .map(|scalar| scalar.f_to_kind(Kind::Double))
            .collect::<Result<_, _>>()?;
        let numbers: Vec<f64> = Tensor::f_stack(&scalars, 0)?.try_into()?;
        Ok(StepOutcome { loss: numbers[0], grad_norm: numbers[1], loss_scale: numbers.get(2).copied() })
    }

    fn micro_batch(&mut self, decoder: &Decoder, batch: DeviceBatch, pass: Pass, first: bool) -> Result<()> {
        let shape = batch.shape();
        if self.one_shape && self.graphs.lacks(&shape) {
            self.graphs.stop();
            device::empty_cache(decoder.device)?;
        }
        if first {
            if let Some(recorded) =
                self.graphs.first.as_mut().filter(|recorded| recorded.batch.shape() == shape)
            {
                return recorded.replay(&batch);
            }
            self.start_gradients()?;
        } else if self.graphs.first.is_none() {
            return self.forward_backward(decoder, &batch, pass);
        }
        if let Some(recorded) = self.graphs.adding.get_mut(&shape) {
            return recorded.replay(&batch);
        }
        if self.graphs.repeats(&shape) {
            // A graph has memory of its own: what eager steps left in the cache is returned first.
            device::empty_cache(decoder.device)?;
            match Graph::record(|| self.forward_backward(decoder, &batch, pass)) {
                Ok((graph, ())) => {
                    let mut recorded = Recorded { graph, batch };
                    recorded.graph.replay()?;
                    match self.graphs.first {
                        None => self.graphs.first = Some(recorded),
                        Some(_) => drop(self.graphs.adding.insert(shape, recorded)),
                    }
                    return Ok(());
                }
                Err(error) => {
                    self.graphs.give_up(&error);
                    if self.graphs.first.is_none() {
                        self.start_gradients()?;
                    }
                }
            }
        }
        self.forward_backward(decoder, &batch, pass)
    }

    /// Gradients of nothing: no tensors at all, or zeros in the tensors that graphs write to.
    fn start_gradients(&mut self) -> Result<()> {
        match self.graphs.first {
            None => self.optimizer.drop_grad(),
            Some(_) => self.optimizer.zero_grad(),
        }
    }

    /// Adds the gradients of the micro-batch's part of the mean loss, and that part to `self.loss`.
    fn forward_backward(&self, decoder: &Decoder, batch: &DeviceBatch, pass: Pass) -> Result<()> {
        let pass = Pass { casts: self.casts.as_ref(), ..pass };
        let loss = self.objective.loss_sum(decoder, batch, pass)?.f_div(&self.targets)?;
        match self.optimizer.loss_scale() {
            Some(scale) => loss.f_mul(scale)?.f_backward()?,
            None => loss.f_backward()?,
        }
        let _ = self.loss.shallow_clone().f_add_(&loss.detach())?;
        Ok(())
    }

    /// Clips and updates; the norm, a scalar.
    fn update(&mut self) -> Result<Tensor> {
        if let Some((graph, norm)) = &mut self.graphs.update {
            graph.replay()?;
            return Ok(norm.shallow_clone());
        }
        // Once a first micro-batch is recorded, every gradient has its place for good.
        if self.graphs.enabled && self.graphs.first.is_some() {
            match Graph::record(|| self.optimizer.update(&self.loss, self.arguments.max_grad_norm)) {
                Ok((mut graph, norm)) => {
                    graph.replay()?;
                    self.graphs.update = Some((graph, norm.shallow_clone()));
                    return Ok(norm);
                }
                Err(error) => self.graphs.give_up(&error),
            }
        }
        self.optimizer.update(&self.loss, self.arguments.max_grad_norm)
    }
}

/// How often a shape must have been seen before it is recorded: a first step also chooses kernels and makes workspaces.
const REPEATS: u32 = 2;
/// Recorded shapes at most: each keeps its kernels' parameters, and all share one pool of memory.
const MOST_GRAPHS: usize = 8;
/// Shapes counted at most, so that a long run over samples of any length does not gather them.
const MOST_SHAPES: usize = 1024;

struct Graphs {
    enabled: bool,
    problem: Option<String>,
    seen: HashMap<BatchShape, u32>,
    /// The first micro-batch of a step, which leaves its gradients in tensors of its own: no zeros are written before it, and
    /// nothing is added. Every other graph belongs to these tensors.
    first: Option<Recorded>,
    /// Micro-batches that add to what is there.
    adding: HashMap<BatchShape, Recorded>,
    /// With the norm that it writes.
    update: Option<(Graph, Tensor)>,
}

/// A micro-batch as a graph, and the batch that it reads.
struct Recorded {
    graph: Graph,
    batch: DeviceBatch,
}

impl Recorded {
    fn replay(&mut self, batch: &DeviceBatch) -> Result<()> {
        self.batch.assign(batch)?;
        self.graph.replay()
    }
}

impl Graphs {
    fn new(enabled: bool) -> Graphs {
        Graphs {
            enabled,
            problem: None,
            seen: HashMap::new(),
            first: None,
            adding: HashMap::new(),
            update: None,
        }
    }

    /// Notes a shape; true where it is worth a graph.
    fn repeats(&mut self, shape: &BatchShape) -> bool {
        if !self.enabled || self.adding.len() >= MOST_GRAPHS {
            return false;
        }
        if self.seen.len() >= MOST_SHAPES {
            self.seen.clear();
        }
        let count = self.seen.entry(shape.clone()).or_insert(0);
        *count += 1;
        *count > REPEATS
    }

    /// Whether other shapes are recorded and this one is not.
    fn lacks(&self, shape: &BatchShape) -> bool {
        let first = self.first.as_ref().map(|recorded| recorded.batch.shape());
        first.is_some_and(|first| first != *shape) && !self.adding.contains_key(shape)
    }

    /// Drops what is recorded and records no more.
    fn stop(&mut self) {
        *self = Graphs::new(false);
        self.problem = Some("the memory that the run may take has no room for recorded steps".into());
    }

    /// Goes on without: what a failed recording enqueued has not run.
    fn give_up(&mut self, error: &anyhow::Error) {
        tracing::warn!(
            "this step cannot be recorded as a CUDA graph and is launched kernel by kernel: {error:#}"
        );
        self.problem = Some(format!("{error:#}"));
        self.enabled = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_repeats_is_recorded() {
        let shape = |tokens: i32| BatchShape::new(&[0, tokens], &[], 1);
        let mut graphs = Graphs::new(true);
        assert_eq!(
            [1, 2, 1, 1, 2].map(|tokens| graphs.repeats(&shape(tokens))),
            [false, false, false, true, false]
        );
        assert!(!Graphs::new(false).repeats(&shape(1)));
    }
}
