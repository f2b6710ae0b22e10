//! One integration binary, so that it can be carried to a GPU machine. One module a subject.

mod golden;
mod parity;
