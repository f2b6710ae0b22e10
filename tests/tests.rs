//! One integration binary, so that it can be carried to a GPU machine. One module a subject.

mod adapter_config;
mod checkpoint_io;
mod cli_config;
mod data;
mod golden;
mod parity;
mod run_log;
mod schedule;
