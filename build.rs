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
        "attention",
        "blocks",
        "cross_entropy",
        "device",
        "kernels",
        "linear",
        "nf4",
        "optim",
        "rms_norm",
        "rope",
        "row",
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
        .warnings(false)
        .compile("ferrotune_csrc");
    println!("cargo:rerun-if-changed=csrc");
    println!("cargo:rerun-if-changed=kernels/kernels.h");
    println!("cargo:rerun-if-changed=src/ffi.rs");

    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", torch_lib.display());
    // A link argument stops at this package: the build script of a package that depends on us reads this instead.
    println!("cargo::metadata=torch_lib={}", torch_lib.display());
    println!("cargo:rustc-env=FERROTUNE_TORCH_LIB={}", torch_lib.display());
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed={}/libtorch_cpu.so", link.display());
}
