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
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", torch_lib.display());
    println!("cargo:rustc-env=FERROTUNE_TORCH_LIB={}", torch_lib.display());
    println!("cargo:rerun-if-changed=build.rs");
}
