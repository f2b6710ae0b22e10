//! The bridge to csrc/. The only unsafe code of the crate beside io/mmap.rs: a tch tensor is a pointer to an at::Tensor,
//! and [`borrow`] and [`take`] say so.

use cxx::UniquePtr;

#[allow(clippy::needless_lifetimes, clippy::missing_safety_doc, clippy::too_many_arguments)]
#[cxx::bridge(namespace = "ferrotune")]
pub(crate) mod bridge {
    /// A weight in the NF4 format; the shapes are in csrc/nf4.h. Undefined tensors where there is none, and for the nested
    /// ones where absmax is not nested.
    struct Nf4View<'a> {
        rows: i64,
        in_features: i64,
        packed: &'a Tensor,
        quant_map: &'a Tensor,
        absmax: &'a Tensor,
        blocksize: i64,
        nested_absmax: &'a Tensor,
        nested_quant_map: &'a Tensor,
        nested_offset: f64,
        nested_blocksize: i64,
    }

    /// A matrix of bf16 in 12 bits; the shapes are in csrc/bf12.h. No rows where there is none.
    struct Bf12View<'a> {
        rows: i64,
        in_features: i64,
        units: &'a Tensor,
        scales: &'a Tensor,
        starts: &'a Tensor,
        rest: &'a Tensor,
    }

    /// The matrix of a head: `weight` where it is defined, `bf12` where that has rows, else `nf4`.
    struct HeadView<'a> {
        weight: &'a Tensor,
        nf4: Nf4View<'a>,
        bf12: Bf12View<'a>,
    }

    /// One row part of a Linear: its own weight (where the Linear has no joined one) and its LoRA, undefined tensors where
    /// it has none.
    struct PartView<'a> {
        rows: i64,
        /// `[rows, in]`, or undefined where `nf4` is the weight.
        dense: &'a Tensor,
        nf4: Nf4View<'a>,
        lora_a: &'a Tensor,
        lora_b: &'a Tensor,
        /// lora_b in the dtype of the products, or undefined.
        b_cast: &'a Tensor,
        scale: f64,
        dropout: f64,
        dropout_key: u64,
    }

    /// A weight in e4m3; the shapes are in csrc/fp8.h. Undefined tensors where there is none.
    struct Fp8View<'a> {
        by_rows: &'a Tensor,
        by_columns: &'a Tensor,
        scale: &'a Tensor,
    }

    struct LinearView<'a> {
        /// Of all parts, or undefined where each part has its own, and where it is in `fp8`.
        weight: &'a Tensor,
        fp8: Fp8View<'a>,
        bias: &'a Tensor,
        /// All lora_a below each other in the dtype of the products, or undefined.
        a_cast: &'a Tensor,
        parts: &'a [PartView<'a>],
        lora_rows: &'a [LoraRowsView<'a>],
    }

    /// LoRA that rows `first..first + rows` of a batch have on part `part`.
    struct LoraRowsView<'a> {
        first: i64,
        rows: i64,
        part: i64,
        lora_a: &'a Tensor,
        lora_b: &'a Tensor,
        scale: f64,
    }

    struct NormView<'a> {
        weight: &'a Tensor,
        eps: f64,
        offset: f64,
    }

    struct AttentionView<'a> {
        num_heads: i64,
        num_kv_heads: i64,
        head_dim: i64,
        scale: f64,
        softcap: f64,
        window: i64,
        q_norm: NormView<'a>,
        k_norm: NormView<'a>,
        cos: &'a Tensor,
        sin: &'a Tensor,
        /// Null where there are pages.
        segments: SharedPtr<Segments>,
        /// Null where there are none.
        pages: SharedPtr<PagedBatch>,
        pages_k: &'a Tensor,
        pages_v: &'a Tensor,
    }

    /// Device scalars where they change from step to step, so that a recorded step reads the new ones.
    struct AdamWStep<'a> {
        step: &'a Tensor,
        learning_rate: &'a Tensor,
        grad_scale: &'a Tensor,
        skip: &'a Tensor,
        beta1: f64,
        beta2: f64,
        epsilon: f64,
        weight_decay: f64,
    }

    #[derive(Debug)]
    enum Activation {
        Silu,
        GeluTanh,
        Gelu,
    }

    /// Where a tensor of a block's forward waits for the backward.
    #[derive(Debug)]
    enum Place {
        /// Where it is.
        Device,
        /// In pinned memory of the host. On the CPU the same as `Device` for a block's input, as `Recompute` for the rest.
        Host,
        /// Nowhere: the backward computes it again.
        Recompute,
    }

    /// What one block keeps of its forward, `x -> norm -> projection -> attention or activation -> projection -> norm`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    struct BlockPolicy {
        /// x; never `Recompute`.
        input: Place,
        /// The first projection's input; worth nothing without `projected`.
        normed: Place,
        /// The first projection's output: q, k and v turned, or gate and up.
        projected: Place,
        /// The last projection's input: attention's output with its log-sum-exp, or the activation's. `Host` is for
        /// attention and is taken where that is quicker than to compute it again.
        inner: Place,
        /// The last projection's output, where a norm follows (Gemma).
        output: Place,
    }

    /// One GPU, as the driver describes it.
    #[derive(Debug, Clone)]
    struct CudaDevice {
        name: String,
        /// Compute capability `major.minor`.
        major: i32,
        minor: i32,
        multiprocessors: i32,
        /// Bytes.
        total_memory: u64,
    }

    /// What the NVIDIA driver says about itself and its GPUs, without libtorch.
    #[derive(Debug, Clone)]
    struct CudaProbe {
        /// The newest CUDA that the driver supports, as `1000 major + 10 minor`; 0 without a driver.
        driver_version: i32,
        devices: Vec<CudaDevice>,
        /// Why `devices` is empty.
        problem: String,
    }

    /// libtorch's use of one GPU's memory, in bytes.
    #[derive(Debug, Clone, Copy)]
    struct MemoryStats {
        /// Held by tensors, now and at the most since the start or the last reset.
        allocated: u64,
        peak_allocated: u64,
        /// Held by libtorch's allocator, its cache included.
        reserved: u64,
        peak_reserved: u64,
        /// Of the whole card, for all processes.
        free: u64,
        total: u64,
    }

    /// One kernel, copy or memset that a GPU ran.
    #[derive(Debug, Clone)]
    struct DeviceActivity {
        name: String,
        /// Else a copy or a memset.
        kernel: bool,
        /// By one clock for all.
        start_ns: u64,
        duration_ns: u64,
    }

    unsafe extern "C++" {
        include!("ferrotune/csrc/ops.h");
        include!("ferrotune/csrc/device.h");
        include!("ferrotune/csrc/kernels.h");
        include!("ferrotune/csrc/segments.h");
        include!("ferrotune/csrc/pages.h");
        include!("ferrotune/csrc/decode.h");
        include!("ferrotune/csrc/cuda_library.h");
        include!("ferrotune/csrc/profile.h");
        include!("ferrotune/csrc/random.h");
        include!("ferrotune/csrc/script.h");

        fn probe_cuda() -> CudaProbe;
        fn torch_lib_dir() -> Result<String>;
        fn load_library(path: &str) -> Result<()>;
        fn load_kernels(path: &str) -> Result<()>;
        fn has_cpu_kernels() -> bool;
        fn load_cuda_library(path: &str) -> Result<()>;
        fn start_cuda() -> Result<bool>;
        fn use_stream(index: i32) -> Result<()>;
        fn memory_stats(index: i32) -> Result<MemoryStats>;
        fn allocated_memory(index: i32) -> Result<u64>;
        fn process_memory(index: i32) -> u64;
        fn reset_peak_memory(index: i32) -> Result<()>;
        fn empty_cache() -> Result<()>;
        fn synchronize(index: i32) -> Result<()>;
        fn use_deterministic_algorithms();
        fn serial_ops();
        fn keep_freed_memory();
        fn pinned(bytes: i64) -> Result<UniquePtr<Tensor>>;
        fn upload(values: &[i64], index: i32) -> Result<UniquePtr<Tensor>>;
        fn upload_rows(table: &Tensor, rows: &[i64], index: i32) -> Result<UniquePtr<Tensor>>;
        type Event;
        fn record_event(index: i32) -> Result<UniquePtr<Event>>;
        fn elapsed_ms(start: &Event, end: &Event) -> Result<f64>;
        fn wait_for(event: &Event) -> Result<()>;
        fn start_profile(index: i32) -> Result<()>;
        fn stop_profile(index: i32) -> Result<Vec<DeviceActivity>>;
        type Generator;
        fn generator(index: i32, seed: u64) -> Result<UniquePtr<Generator>>;
        fn fill_normal(generator: &Generator, x: &Tensor, std: f64) -> Result<()>;
        fn fill_uniform(generator: &Generator, x: &Tensor, low: f64, high: f64) -> Result<()>;

        fn has_cuda_library() -> bool;
        fn limit_memory(index: i32, device_bytes: u64, host_bytes: u64, rows: i64) -> Result<()>;
        type CudaGraph;
        fn cuda_graph() -> Result<UniquePtr<CudaGraph>>;
        fn begin(self: Pin<&mut CudaGraph>) -> Result<()>;
        fn end(self: Pin<&mut CudaGraph>) -> Result<()>;
        fn replay(self: Pin<&mut CudaGraph>) -> Result<()>;

        type Tensor;
        type TensorList;
        type Segments;
        fn segments(
            cu_seqlens: &[i32],
            starts: &Tensor,
            places: &Tensor,
            firsts: &Tensor,
        ) -> Result<SharedPtr<Segments>>;

        type PagedBatch;
        fn paged_batch(
            rows: &[i64],
            past: &[i64],
            pages: &[i32],
            page_size: i64,
        ) -> Result<SharedPtr<PagedBatch>>;

        fn paged_rows(
            tables: &Tensor,
            lengths: &Tensor,
            longest: i64,
            pool: i64,
            page_size: i64,
        ) -> Result<SharedPtr<PagedBatch>>;
        fn sample(logits: &Tensor, params: &[f64], tokens: &Tensor) -> Result<UniquePtr<Tensor>>;
        fn put_words(to: &Tensor, words: &[i32], ids: &Tensor) -> Result<()>;

        fn tensor_list() -> UniquePtr<TensorList>;
        fn push(list: Pin<&mut TensorList>, tensor: &Tensor);

        fn attention_block(
            x: &Tensor,
            norm: &NormView,
            qkv: &LinearView,
            o: &LinearView,
            post_norm: &NormView,
            attention: &AttentionView,
            policy: BlockPolicy,
            overwrites: bool,
        ) -> Result<UniquePtr<Tensor>>;
        fn mlp_block(
            x: &Tensor,
            norm: &NormView,
            gate_up: &LinearView,
            down: &LinearView,
            post_norm: &NormView,
            activation: Activation,
            policy: BlockPolicy,
            overwrites: bool,
        ) -> Result<UniquePtr<Tensor>>;

        type DecodeStack;
        fn decode_stack(x: &Tensor, ids: &Tensor) -> Result<UniquePtr<DecodeStack>>;
        fn push(
            self: Pin<&mut DecodeStack>,
            norm: &NormView,
            qkv: &LinearView,
            o: &LinearView,
            post_norm: &NormView,
            attention: &AttentionView,
            mlp_norm: &NormView,
            gate_up: &LinearView,
            down: &LinearView,
            mlp_post_norm: &NormView,
            activation: Activation,
        ) -> Result<bool>;
        fn run(self: Pin<&mut DecodeStack>, norm: &NormView) -> Result<UniquePtr<Tensor>>;

        fn op_rms_norm(x: &Tensor, weight: &Tensor, eps: f64, offset: f64) -> Result<UniquePtr<Tensor>>;
        fn op_rope(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<UniquePtr<Tensor>>;
        fn op_swiglu(gate_up: &Tensor, activation: Activation) -> Result<UniquePtr<Tensor>>;
        fn op_linear(x: &Tensor, linear: &LinearView) -> Result<UniquePtr<Tensor>>;
        fn op_attention(
            q: &Tensor,
            k: &Tensor,
            v: &Tensor,
            segments: SharedPtr<Segments>,
            scale: f64,
            softcap: f64,
            window: i64,
        ) -> Result<UniquePtr<Tensor>>;
        fn linear_cross_entropy(
            hidden: &Tensor,
            head: &HeadView,
            rows: &Tensor,
            labels: &Tensor,
            softcap: f64,
        ) -> Result<UniquePtr<Tensor>>;
        fn token_log_probs(
            hidden: &Tensor,
            head: &HeadView,
            rows: &Tensor,
            labels: &Tensor,
            temperature: f64,
            softcap: f64,
            entropy: &Tensor,
        ) -> Result<UniquePtr<Tensor>>;
        fn head_scores(hidden: &Tensor, head: &HeadView) -> Result<UniquePtr<Tensor>>;

        fn backward(y: &Tensor, dy: &Tensor, inputs: &TensorList) -> Result<()>;
        fn grad_norm(params: &TensorList) -> Result<UniquePtr<Tensor>>;
        fn zero_grads(params: &TensorList) -> Result<()>;
        fn copy_all(to: &TensorList, from: &TensorList) -> Result<()>;
        fn drop_grads(params: &TensorList) -> Result<()>;
        fn bf12_pack(
            weight: &Tensor,
            units: &Tensor,
            scales: &Tensor,
            counts: &Tensor,
        ) -> Result<UniquePtr<Tensor>>;
        fn bf12_unpack(weight: &Bf12View, destination: &Tensor) -> Result<()>;
        fn nf4_quant_map() -> Result<UniquePtr<Tensor>>;
        fn nf4_nested_quant_map() -> Result<UniquePtr<Tensor>>;
        fn nf4_quantize(x: &Tensor, packed: &Tensor, absmax: &Tensor) -> Result<()>;
        fn nf4_nest(absmax: &Tensor, index: &Tensor, nested_absmax: &Tensor) -> Result<f64>;
        fn nf4_dequantize(weight: &Nf4View, destination: &Tensor) -> Result<()>;

        fn fp8_quantize(weight: &Tensor, to: &Fp8View) -> Result<()>;
        fn fp8_dequantize(weight: &Fp8View, destination: &Tensor) -> Result<()>;

        fn script_save(path: &str, source: &str, names: &Vec<String>, tensors: &TensorList) -> Result<()>;

        fn adamw_step(
            params: &TensorList,
            exp_avg: &TensorList,
            exp_avg_sq: &TensorList,
            step: &AdamWStep,
        ) -> Result<()>;
        fn adamw_8bit_maps() -> Result<UniquePtr<Tensor>>;
        fn adamw_8bit_step(
            params: &TensorList,
            state1: &TensorList,
            state2: &TensorList,
            absmax1: &TensorList,
            absmax2: &TensorList,
            maps: &Tensor,
            step: &AdamWStep,
        ) -> Result<()>;
    }
}

/// A tch tensor as csrc sees it.
pub(crate) fn borrow(tensor: &tch::Tensor) -> &bridge::Tensor {
    // SAFETY: tch's C_tensor is an opaque name for at::Tensor; the pointer lives as long as the tch tensor.
    unsafe { &*tensor.as_ptr().cast::<bridge::Tensor>() }
}

/// A tensor from csrc as a tch tensor, which then owns it.
pub(crate) fn take(tensor: UniquePtr<bridge::Tensor>) -> tch::Tensor {
    // SAFETY: csrc allocates with make_unique<at::Tensor>, and tch frees with delete on the same type.
    unsafe { tch::Tensor::from_ptr(tensor.into_raw().cast()) }
}

/// A list of tensors for the multi-tensor functions; it shares their storage.
pub(crate) fn list<'a>(tensors: impl IntoIterator<Item = &'a tch::Tensor>) -> UniquePtr<bridge::TensorList> {
    let mut list = bridge::tensor_list();
    for tensor in tensors {
        bridge::push(list.pin_mut(), borrow(tensor));
    }
    list
}

// SAFETY: a recorded graph belongs to a device, not to a thread; it is used by one thread at a time.
unsafe impl Send for bridge::CudaGraph {}

// SAFETY: at::Generator counts its references atomically, and every draw holds its mutex.
unsafe impl Send for bridge::Generator {}
unsafe impl Sync for bridge::Generator {}
