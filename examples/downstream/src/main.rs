//! A program that uses ferrotune as a library.

use std::path::Path;

fn main() -> anyhow::Result<()> {
    let path = std::env::args().nth(1).unwrap_or_else(|| "downstream.txt".into());
    ferrotune::io::write_atomically(Path::new(&path), b"written by a dependent of ferrotune\n")?;
    println!("wrote {path}");
    Ok(())
}
