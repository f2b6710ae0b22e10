use std::process::ExitCode;

fn main() -> ExitCode {
    ferrotune::cli::run()
}
