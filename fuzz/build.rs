//! The run path to libtorch, as in examples/downstream.

fn main() {
    let torch_lib = std::env::var("DEP_FERROTUNE_TORCH_LIB").expect("ferrotune is a direct dependency");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{torch_lib}");
}
