//! Gives this program the run path to libtorch: cargo does not pass a dependency's link arguments on.

fn main() {
    let torch_lib = std::env::var("DEP_FERROTUNE_TORCH_LIB").expect("ferrotune is a direct dependency");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{torch_lib}");
}
