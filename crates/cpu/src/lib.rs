//! The fast CPU backend: SIMD, threads, a buffer pool.
#![allow(dead_code)]
pub mod simd;
mod threads;
