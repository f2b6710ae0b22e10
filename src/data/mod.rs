//! Records -> chat template -> label mask -> tokens -> packed batches. No tensors, no model knowledge.
