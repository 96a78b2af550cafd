//! `rankfold grads`: the loss's gradient by each adapter tensor, to compare with another program's.

use crate::error::Result;
use crate::open::ModelArgs;
use crate::show::say;
use clap::Args;
use rankfold_adapters::Forward;
use rankfold_autograd::{Gradients, Tape};
use rankfold_backend::DType;
use rankfold_files::{Spec, Writer};
use rankfold_trainer::data::tokens;
use rankfold_trainer::objective::Terms;
use std::path::PathBuf;

/// Write the gradient of the loss by each of an adapter's tensors, under its PEFT name, and the loss: what training
/// descends, AdaLoRA's orthogonality term with it.
#[derive(Debug, Args)]
pub struct Grads {
    #[command(flatten)]
    model: ModelArgs,
    /// safetensors with `ids` and `labels`, i64 [N, T], −100 ignored.
    #[arg(long, value_name = "FILE")]
    tokens: PathBuf,
    /// The safetensors file to write.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

impl Grads {
    pub fn run(self) -> Result<()> {
        super::parent_exists("--out", &self.out)?;
        self.model.needs_one_adapter()?;
        let folder = self.model.folder()?;
        let batch = tokens::read(&self.tokens, folder.config.vocab)?;
        let (model, config) = self.model.load(&folder)?;
        let backend = model.backend().clone();
        let tape = Tape::new(backend.clone());
        let device = model.batch(&batch)?;
        // No dropout: a gradient to compare is that of a function.
        let mode = Forward::evaluation(self.model.device.exact());
        let (root, mut loss) = model.loss(&tape, &device, device.kept as f64, &mode, false)?;
        let mut gradients = Gradients::new(backend.clone());
        tape.backward_from_loss(&root, &mut gradients)?;
        if let Some(config) = &config {
            loss += Terms::of(config).add_to(&backend, model.linears(), &mut gradients)?.value;
        }

        let named = model.parameters();
        let mut specs = vec![Spec::new("loss", DType::F32, [1])];
        specs.extend(named.iter().map(|n| Spec::new(&*n.name, DType::F32, n.parameter.shape().dims())));
        let mut writer = Writer::create(&self.out, specs)?;
        writer.write("loss", &(loss as f32).to_le_bytes())?;
        for n in &named {
            match gradients.of(&n.parameter) {
                Some(grad) => writer.write_view(&n.name, backend.as_ref(), grad.view())?,
                // No loss reached it: a gradient of zeros.
                None => writer.write(&n.name, &vec![0; 4 * n.parameter.shape().elements()])?,
            }
        }
        writer.finish()?;
        say!("loss {loss:.6}; {} gradients are in {}", named.len(), self.out.display())?;
        Ok(())
    }
}
