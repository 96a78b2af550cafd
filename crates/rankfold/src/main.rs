//! The command line. `rankfold --help` is its documentation; each command is a file of `commands/`.
//!
//! The last line on standard output says what was written where; progress goes to standard error. Exit codes: 0;
//! 2 where the user can mend it (one line on standard error says what, where, and what was expected); 1 for a fault
//! of the program's own.
#![forbid(unsafe_code)]

mod adapter;
mod builtin;
mod check;
mod choices;
mod commands;
mod device;
mod error;
mod folder;
mod memory;
mod messages;
mod open;
mod options;
mod paging;
mod profile;
mod ranks;
mod report;
mod sample;
mod show;
mod size;
mod study;

use clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
use clap::{Parser, Subcommand};
use std::process::ExitCode;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// Parameter-efficient finetuning: LoRA and QLoRA, exact and deterministic.
///
/// `rankfold train` with nothing else finetunes the built-in model on the built-in text.
#[derive(Debug, Parser)]
#[command(name = "rankfold", version, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Train(Box<commands::train::Train>),
    Eval(commands::eval::Eval),
    Generate(commands::generate::Generate),
    Logits(commands::logits::Logits),
    Grads(commands::grads::Grads),
    Quantize(commands::quantize::Quantize),
    Dequantize(commands::dequantize::Dequantize),
    Audit(commands::audit::Audit),
    Merge(commands::merge::Merge),
    Export(commands::export::Export),
    New(commands::new::New),
    Plan(Box<commands::plan::PlanArgs>),
    Study(commands::study::Study),
    Inspect(commands::inspect::Inspect),
    Doctor(commands::doctor::Doctor),
}

fn main() -> ExitCode {
    rankfold_pager::give_back_what_is_freed();
    tracing_subscriber::registry().with(messages::layer()).init();
    let outcome = std::panic::catch_unwind(|| {
        let cli = match Cli::try_parse() {
            Ok(cli) => cli,
            Err(asked) if !asked.use_stderr() || asked.kind() == DisplayHelpOnMissingArgumentOrSubcommand => {
                asked.exit()
            }
            Err(usage) => return Err(error::Error::usage(&usage)),
        };
        run(cli.command)
    });
    match outcome {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(error)) => {
            eprintln!("rankfold: {}", error.one_line());
            ExitCode::from(2)
        }
        // The panic's own message is on standard error already.
        Err(_) => ExitCode::from(1),
    }
}

fn run(command: Command) -> error::Result<()> {
    match command {
        Command::Train(command) => command.run(),
        Command::Eval(command) => command.run(),
        Command::Generate(command) => command.run(),
        Command::Logits(command) => command.run(),
        Command::Grads(command) => command.run(),
        Command::Quantize(command) => command.run(),
        Command::Dequantize(command) => command.run(),
        Command::Audit(command) => command.run(),
        Command::Merge(command) => command.run(),
        Command::Export(command) => command.run(),
        Command::New(command) => command.run(),
        Command::Plan(command) => command.run(),
        Command::Study(command) => command.run(),
        Command::Inspect(command) => command.run(),
        Command::Doctor(command) => command.run(),
    }
}
