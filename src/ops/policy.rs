//! What a layer keeps between forward and backward.

use super::{BlockPolicy, Place};

/// Where each tensor of a layer's forward that its backward reads waits in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    pub attention: BlockPolicy,
    pub mlp: BlockPolicy,
}

impl Policy {
    /// Everything on the device.
    pub const KEEP: Policy = Policy::both(BlockPolicy::KEEP);
    /// Only the blocks' inputs; the rest is computed again.
    pub const RECOMPUTE: Policy = Policy::both(BlockPolicy::RECOMPUTE);
    /// The same, and on a GPU the inputs wait in the host's memory, with attention's output where that is quicker than to
    /// compute it again.
    pub const HOST: Policy = Policy {
        attention: BlockPolicy { input: Place::Host, inner: Place::Host, ..BlockPolicy::RECOMPUTE },
        mlp: BlockPolicy { input: Place::Host, ..BlockPolicy::RECOMPUTE },
    };

    /// Whether every layer keeps so little that LoRA in 16 bits, too, is made at each product and not once a step: no measurable
    /// time at 8B with r 16 for 78 MiB.
    pub fn spare_memory(policies: &[Policy]) -> bool {
        let spares = |block: &BlockPolicy| block.input == Place::Host && block.projected == Place::Recompute;
        policies.iter().all(|policy| spares(&policy.attention) && spares(&policy.mlp))
    }

    const fn both(block: BlockPolicy) -> Policy {
        Policy { attention: block, mlp: block }
    }
}

impl BlockPolicy {
    pub const KEEP: BlockPolicy = BlockPolicy {
        input: Place::Device,
        normed: Place::Device,
        projected: Place::Device,
        inner: Place::Device,
        output: Place::Device,
    };
    pub const RECOMPUTE: BlockPolicy = BlockPolicy {
        input: Place::Device,
        normed: Place::Recompute,
        projected: Place::Recompute,
        inner: Place::Recompute,
        output: Place::Recompute,
    };
}
