//! One integration binary, so that it can be carried to a GPU machine. One module a subject.

mod data;
mod adapter_config;
mod checkpoint_io;
mod cli_config;
mod run_log;
mod schedule;
mod golden;
mod parity;
