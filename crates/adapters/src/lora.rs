//! The low-rank update of one layer, in its three forms.
//!
//! ```text
//! LoRA     h = W x + s·B A x                         (Hu et al. 2021, eq. 3)
//! DoRA     h = m/‖W + s·B A‖ ∘ (W + s·B A) x         (Liu et al. 2024, eq. 5; the norm of each row, a constant to
//!                                                     backward: §4.3)
//! AdaLoRA  h = W x + s·B E A x                       (Zhang et al. 2023, eq. 3, there P Λ Q)
//! ```
//!
//! A [rank, inputs], B [outputs, rank], m `[outputs]`, E [rank, 1], the diagonal of a matrix. s = α/r, or α/√r
//! (Kalajdzievski 2023, rsLoRA); for AdaLoRA α/(r + 10⁻⁵), r the rank it began with, whatever is left of it: PEFT's.
//!
//! While training, dropout is the update's: A takes x̃ = dropout(x). DoRA's update is all that it adds to W x, the rescaled
//! base too, as in PEFT: h = W x + (m/‖·‖ − 1)∘W x̃ + m/‖·‖∘s·B A x̃.

use crate::merge::update_norms;
use crate::{Error, Result};
use rankfold_autograd::{Base, LinearAdapter, Parameter, Tape, Tensor};
use rankfold_backend::Shape;
use rankfold_backend::params::Dropout;

/// Which of the three.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Form {
    /// LoRA.
    #[default]
    Plain,
    /// DoRA: a magnitude for each output.
    Dora,
    /// AdaLoRA: triplets, some of which may be cut.
    AdaLora,
}

impl Form {
    /// The ends of its tensors' names in a PEFT folder: A, B, and what else there is, empty where there is nothing.
    pub fn ends(self) -> [&'static str; 3] {
        match self {
            Self::Plain => ["lora_A.weight", "lora_B.weight", ""],
            Self::Dora => ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"],
            Self::AdaLora => ["lora_A", "lora_B", "lora_E"],
        }
    }
}

/// The most of a rank: beyond it, a mistake of the file's is likelier than a matrix that has it.
const MOST_ROWS: usize = 1 << 20;

/// The hyper-parameters of one layer's update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraSpec {
    /// r: rows of A, columns of B; AdaLoRA's is the one that it begins with.
    pub rank: usize,
    /// α.
    pub alpha: f64,
    /// Whether s is α/√r instead of α/r.
    pub rslora: bool,
    /// The probability of dropping an element of A's input while training.
    pub dropout: f64,
    /// Which of the three.
    pub form: Form,
}

impl LoraSpec {
    /// LoRA of rank r with s = α/r and no dropout.
    pub fn new(rank: usize, alpha: f64) -> Self {
        Self { rank, alpha, rslora: false, dropout: 0.0, form: Form::Plain }
    }

    /// A rank from 1 to 2²⁰, a finite alpha, a dropout probability in [0, 1).
    pub fn check(&self) -> Result<()> {
        check_rows(if self.form == Form::AdaLora { "init_r" } else { "r" }, self.rank)?;
        if !self.alpha.is_finite() {
            return Err(Error::field("lora_alpha", self.alpha, "a finite number"));
        }
        // As the kernels take it: just below 1 may round to 1.
        if !(0.0..1.0).contains(&(self.dropout as f32)) {
            return Err(Error::field("lora_dropout", self.dropout, "at least 0 and below 1"));
        }
        if self.rslora && self.form == Form::AdaLora {
            return Err(Error::field("use_rslora", true, "false with AdaLoRA, which has a scale of its own"));
        }
        // PEFT's AdaLoRA takes r for such an alpha.
        if self.alpha <= 0.0 && self.form == Form::AdaLora {
            return Err(Error::field("lora_alpha", self.alpha, "a positive number with AdaLoRA"));
        }
        Ok(())
    }

    /// s.
    pub fn scale(&self) -> f32 {
        let rank = self.rank as f64;
        let divisor = match (self.form, self.rslora) {
            (Form::AdaLora, _) => rank + 1e-5,
            (_, true) => rank.sqrt(),
            (_, false) => rank,
        };
        (self.alpha / divisor) as f32
    }

    /// Whether the rank is above min(outputs, inputs): legal, but a full matrix would be smaller. For a warning.
    pub fn is_wasteful(&self, dims: [usize; 2]) -> bool {
        self.rank > dims[0].min(dims[1])
    }
}

/// That a rank, or what else counts an adapter's rows, is one that memory could hold.
pub(crate) fn check_rows(field: &str, rank: usize) -> Result<()> {
    match rank {
        0 => Err(Error::field(field, rank, "1 or more")),
        _ if rank > MOST_ROWS => Err(Error::field(field, rank, "1048576 or less")),
        _ => Ok(()),
    }
}

/// What a form has beside A and B.
#[derive(Clone, Debug)]
pub enum Part {
    /// Nothing: LoRA.
    None,
    /// DoRA's m `[outputs]`.
    Magnitude(Parameter),
    /// AdaLoRA's E.
    Triplets {
        /// E [rank, 1], of the triplets that are kept.
        lambda: Parameter,
        /// Of the triplets that there were at first, those that are not cut.
        kept: Vec<bool>,
    },
}

/// The update of one layer.
#[derive(Clone, Debug)]
pub struct Lora {
    a: Parameter,
    b: Parameter,
    part: Part,
    spec: LoraSpec,
    pub(crate) start: Option<Box<Self>>,
}

impl Lora {
    /// From A [rank, inputs], B [outputs, rank] and the rest of the spec's form.
    ///
    /// Errors: a hyper-parameter out of range; a part of another form than the spec's; shapes that disagree with the
    /// rank (`module` is for the message).
    pub fn new(module: &str, a: Parameter, b: Parameter, part: Part, spec: LoraSpec) -> Result<Self> {
        spec.check()?;
        let lora = Self { a, b, part, spec, start: None };
        let rank = lora.rank();
        let wrong = |tensor, expected: String, found: &Shape| {
            Err(Error::Shape { module: module.into(), tensor, expected, found: found.clone() })
        };
        if !matches!(lora.a.shape().dims(), &[found, _] if found == rank) {
            return wrong("lora_A", format!("[{rank}, inputs]"), lora.a.shape());
        }
        let &[outputs, found] = lora.b.shape().dims() else {
            return wrong("lora_B", format!("[outputs, {rank}]"), lora.b.shape());
        };
        if found != rank {
            return wrong("lora_B", format!("[outputs, {rank}]"), lora.b.shape());
        }
        match (&lora.part, spec.form) {
            (Part::None, Form::Plain) => {}
            (Part::Magnitude(m), Form::Dora) if m.shape().dims() == [outputs] => {}
            (Part::Magnitude(m), Form::Dora) => {
                return wrong("lora_magnitude_vector", format!("[{outputs}]"), m.shape());
            }
            (Part::Triplets { lambda, kept }, Form::AdaLora) => {
                if kept.len() != spec.rank {
                    return Err(Error::field(format!("rank_pattern: {module}"), kept.len(), "one entry a triplet"));
                }
                if lambda.shape().dims() != [rank, 1] {
                    return wrong("lora_E", format!("[{rank}, 1]"), lambda.shape());
                }
            }
            (_, form) => return Err(Error::field(format!("{module}: form"), format!("{form:?}"), "that of its parts")),
        }
        Ok(lora)
    }

    /// A [rank, inputs].
    pub fn a(&self) -> &Parameter {
        &self.a
    }

    /// B [outputs, rank].
    pub fn b(&self) -> &Parameter {
        &self.b
    }

    /// What else there is.
    pub fn part(&self) -> &Part {
        &self.part
    }

    /// Its hyper-parameters.
    pub fn spec(&self) -> &LoraSpec {
        &self.spec
    }

    /// The same, begun by taking −`start` out of the base.
    pub(crate) fn started(self, start: Self) -> Self {
        Self { start: Some(Box::new(start)), ..self }
    }

    /// −s·B₀·A₀, where it began by taking that out of the base.
    pub fn start(&self) -> Option<&Self> {
        self.start.as_deref()
    }

    /// Rows of A now: the spec's rank, less the triplets that were cut.
    pub fn rank(&self) -> usize {
        match &self.part {
            Part::Triplets { kept, .. } => kept.iter().filter(|kept| **kept).count(),
            _ => self.spec.rank,
        }
    }

    /// [outputs, inputs] of the matrix that B·A is.
    pub fn dims(&self) -> [usize; 2] {
        [self.b.shape().rows(), self.a.shape().width()]
    }

    /// All of it by the ends of its names in a PEFT folder: A, B, and m or E.
    pub fn parameters(&self) -> Vec<(&'static str, &Parameter)> {
        let rest = match &self.part {
            Part::None => None,
            Part::Magnitude(rest) | Part::Triplets { lambda: rest, .. } => Some(rest),
        };
        self.spec.form.ends().into_iter().zip([&self.a, &self.b].into_iter().chain(rest)).collect()
    }

    /// Numbers trained.
    pub fn elements(&self) -> usize {
        self.parameters().iter().map(|(_, parameter)| parameter.shape().elements()).sum()
    }

    /// The update beside `base` as the tape takes it, with dropout from (seed, stream) where one is given.
    pub(crate) fn on_tape(&self, tape: &Tape, base: &Base, dropout: Option<(u64, u64)>) -> Result<LinearAdapter> {
        let probability = self.spec.dropout as f32;
        let (per_rank, row_scale) = match &self.part {
            Part::None => (None, None),
            Part::Magnitude(m) => {
                let norms = update_norms(tape.backend().as_ref(), base, self)?;
                let norms = Tensor::constant(norms, m.shape().clone())?;
                (None, Some(tape.divide(&m.tensor(), &norms)?))
            }
            Part::Triplets { lambda, .. } => (Some(lambda.tensor()), None),
        };
        Ok(LinearAdapter {
            a: self.a.tensor(),
            b: self.b.tensor(),
            scale: self.spec.scale(),
            per_rank,
            row_scale,
            dropout: dropout.filter(|_| probability > 0.0).map(|(seed, stream)| Dropout { probability, seed, stream }),
        })
    }
}
