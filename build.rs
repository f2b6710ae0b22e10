//! Finds libtorch the way torch-sys found it, and gives our binaries a run path to it.

use std::path::PathBuf;
use std::{env, fs};

fn main() {
    let link =
        PathBuf::from(env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys must be a direct dependency"));
    let torch_lib = fs::canonicalize(link.join("libtorch_cpu.so"))
        .unwrap_or_else(|error| panic!("{}/libtorch_cpu.so: {error}; run scripts/setup", link.display()))
        .parent()
        .expect("a library lies in a folder")
        .to_path_buf();
    let include = torch_lib.parent().expect("lib lies in torch").join("include");
    // One translation unit: libtorch's headers are nearly all of the compile time, 10 s a file.
    let stems = [
        "adamw_8bit",
        "attention",
        "attention_formula",
        "attention_fused",
        "bf12",
        "blocks",
        "cpu",
        "cross_entropy",
        "cuda_library",
        "decode",
        "decode_rows",
        "device",
        "few_rows",
        "fp8",
        "head",
        "kernels",
        "linear",
        "log_probs",
        "lora",
        "mlp_columns",
        "nf4",
        "optim",
        "pages",
        "profile",
        "random",
        "rms_norm",
        "rope",
        "rows",
        "sample",
        "script",
        "segments",
        "swiglu",
    ];
    let unit = PathBuf::from(env::var("OUT_DIR").expect("cargo sets OUT_DIR")).join("csrc.cpp");
    let text: String = stems.iter().map(|stem| format!("#include \"ferrotune/csrc/{stem}.cpp\"\n")).collect();
    fs::write(&unit, text).unwrap_or_else(|error| panic!("{}: {error}", unit.display()));
    cxx_build::bridge("src/ffi.rs")
        .file(&unit)
        .std("c++17")
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        // at::parallel_for is a template: without OpenMP it is a plain loop here, whatever libtorch does.
        .flag("-fopenmp")
        .warnings(false)
        .compile("ferrotune_csrc");
    // The name is libtorch's own libgomp.so.1 at run time.
    println!("cargo:rustc-link-lib=gomp");
    // The CPU kernels once an instruction set; kernels/cpu/select.cpp picks at run time.
    cc::Build::new().cpp(true).std("c++17").file("kernels/cpu/select.cpp").compile("ferrotune_cpu_select");
    // A line each: the table, what it is called, the compiler's flags.
    for line in include_str!("kernels/cpu/tables.txt").lines() {
        let mut words = line.split_whitespace();
        let (Some(table), Some(name)) = (words.next(), words.next()) else { continue };
        let mut build = cc::Build::new();
        build.cpp(true).std("c++17").opt_level(3).file("kernels/cpu/table.cpp");
        // gcc 12 warns of its own _mm512_undefined_ps (PR 105593).
        build.flag("-Wno-maybe-uninitialized");
        build
            .define("FERROTUNE_CPU_TABLE", table)
            .define("FERROTUNE_CPU_NAME", format!("\"{name}\"").as_str());
        for flag in words {
            build.flag(flag);
        }
        build.compile(&format!("ferrotune_{table}"));
    }
    println!("cargo:rerun-if-changed=csrc");
    println!("cargo:rerun-if-changed=kernels/cpu");
    println!("cargo:rerun-if-changed=kernels/kernels.h");
    println!("cargo:rerun-if-changed=kernels/dynamic_map.h");
    println!("cargo:rerun-if-changed=src/ffi.rs");

    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", torch_lib.display());
    // A link argument stops at this package: the build script of a package that depends on us reads this instead.
    println!("cargo::metadata=torch_lib={}", torch_lib.display());
    println!("cargo:rustc-env=FERROTUNE_TORCH_LIB={}", torch_lib.display());
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed={}/libtorch_cpu.so", link.display());
}
