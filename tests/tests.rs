//! One integration binary, so that it can be carried to a GPU machine. One module a subject.

mod adapter;
mod adapter_config;
mod attention;
mod bad_input;
mod bench;
mod checkpoint_io;
mod cli_config;
mod cli_generate;
mod cli_train;
mod cpu;
mod data;
mod generate;
mod golden;
mod gpu;
mod gpu_nf4;
mod gpu_speed;
mod hub;
mod nf4;
mod ops;
mod optim;
mod parity;
mod run_log;
mod schedule;
mod selftest;
mod step;
mod tolerance;
