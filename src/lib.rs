//! Fine-tune and run Hugging Face language models from one native program, on libtorch.
//!
//! The layers, each using only what stands to its left:
//! `kernels <- csrc <- ffi <- ops <- nn <- models <- generate <- train <- cli`.
//! [`error`], [`io`] and [`data`] know nothing of models.

pub mod cli;
pub mod data;
pub mod device;
pub mod error;
mod ffi;
pub mod generate;
pub mod io;
pub mod models;
pub mod nn;
pub mod ops;
pub mod train;
