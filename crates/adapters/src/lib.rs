//! Low-rank adapters and PEFT folders
