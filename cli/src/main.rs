//! The program `anabranch`; see the library beside it.

fn main() -> std::process::ExitCode {
    anabranch_cli::main()
}
