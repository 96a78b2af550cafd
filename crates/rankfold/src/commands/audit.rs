//! `rankfold audit`: what each 4-bit format would do to a model's weights.

use crate::device::check_threads;
use crate::error::{Error, Result};
use crate::open::{BUILTIN, Folder};
use crate::show::{count, say};
use clap::Args;
use indicatif::ProgressBar;
use rankfold_audit::{BLOCKS, Options, Report, Selection};
use rankfold_backend::{Backend, Format};
use rankfold_cpu::CpuBackend;
use rankfold_files::{Checkpoint, write_atomically};
use rankfold_trainer::model::ModelConfig;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Measure what 4 bits do to every weight of a model: a table, audit.json and audit.html.
///
/// Of a model's folder the weights that `rankfold quantize` quantises are audited; of a single safetensors file every
/// f32, bf16 or f16 matrix that is not named as an embedding or an output head.
#[derive(Debug, Args)]
pub struct Audit {
    /// `builtin`, the folder of a Hugging Face model, or a safetensors file.
    #[arg(long, value_name = "DIR|FILE", default_value = BUILTIN)]
    model: String,
    /// The folder to write: new or empty.
    #[arg(long)]
    out: PathBuf,
    /// Formats to audit.
    #[arg(long, value_delimiter = ',', default_value = "nf4,fp4,int4")]
    formats: Vec<Format>,
    /// Blocks to audit: powers of two from 32 to 4096; all of them if not given.
    #[arg(long, value_name = "N", value_delimiter = ',')]
    blocks: Vec<usize>,
    /// Threads; all cores if not given. Never changes a figure.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
}

impl Audit {
    pub fn run(self) -> Result<()> {
        check_threads(self.threads)?;
        let backend = CpuBackend::new(self.threads);
        let is_file = self.model != BUILTIN && Path::new(&self.model).is_file();
        let (file, folder);
        let (checkpoint, selection) = if is_file {
            file = Checkpoint::open(Path::new(&self.model))?;
            (&file, Selection::Matrices)
        } else {
            folder = Folder::open(&self.model)?;
            let names = folder.config.tensors().into_iter().map(|(name, _)| name);
            (&folder.checkpoint, Selection::Linear(names.filter(|name| ModelConfig::is_linear(name)).collect()))
        };
        let blocks = if self.blocks.is_empty() { &BLOCKS[..] } else { &self.blocks };
        let options = Options::new(&self.formats, blocks, backend.threads(), selection)?;
        let backend: Arc<dyn Backend> = Arc::new(backend);
        // Before the work: a folder that cannot be written should not be found out after it.
        let staged = super::stage(&self.out)?;
        let report = self.audit(&backend, checkpoint, &options)?;
        let json = report.to_json().map_err(|e| Error::Path { path: self.out.clone(), why: e.to_string() })?;
        write_atomically(&staged.path().join("audit.json"), json.as_bytes())?;
        write_atomically(&staged.path().join("audit.html"), rankfold_audit::html(&report).as_bytes())?;
        staged.commit()?;
        let table = rankfold_audit::table(&report);
        let (weights, tensors) = (count(report.totals.parameters as usize), report.totals.tensors);
        let out = self.out.display();
        say!("{table}{weights} weights in {tensors} tensors audited: audit.json and audit.html in {out}")?;
        Ok(())
    }

    fn audit(&self, backend: &Arc<dyn Backend>, checkpoint: &Checkpoint, options: &Options) -> Result<Report> {
        let bar = ProgressBar::new(0);
        let report = rankfold_audit::audit(backend, checkpoint, &self.model, options, &mut |done, all, name| {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
            bar.set_message(name.to_owned());
        });
        bar.finish_and_clear();
        Ok(report?)
    }
}
