//! The kernels' parameters: named dimensions, and the checks that every backend runs first.
//!
//! A check looks at lengths only; element types are the backend's own business.

use crate::{Error, Quantized, Result, View, ViewMut};

/// In which precision the inputs of a product are taken. Sums are the backend's accumulators in both cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compute {
    /// Inputs as they are.
    F32,
    /// Both inputs rounded to bf16 (nearest even), as QLoRA's compute type means it.
    Bf16,
}

/// Which inputs of [`MatMul`] are stored transposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// a [m, k] · b [k, n]
    Nn,
    /// a [m, k] · b [n, k]ᵀ
    Nt,
    /// a [k, m]ᵀ · b [k, n]
    Tn,
}

/// c [m, n] = a · b, or c += a · b.
#[derive(Clone, Copy, Debug)]
pub struct MatMul {
    /// Rows of c.
    pub m: usize,
    /// Columns of c.
    pub n: usize,
    /// The length of the sums.
    pub k: usize,
    /// How a and b are stored.
    pub layout: Layout,
    /// Add to c instead of overwriting it.
    pub accumulate: bool,
    /// Precision of the inputs.
    pub compute: Compute,
}

impl MatMul {
    /// Lengths of a, b and c.
    pub fn check(&self, a: &View, b: &View, c: &ViewMut) -> Result<()> {
        expect("matmul", "a", a.len(), self.m * self.k)?;
        expect("matmul", "b", b.len(), self.k * self.n)?;
        expect("matmul", "c", c.len(), self.m * self.n)
    }
}

/// A frozen or trained matrix [outputs, inputs], whatever it is stored as.
#[derive(Clone, Copy, Debug)]
pub enum Weight<'a> {
    /// f32, bf16 or f16 (f64 on `reference`).
    Dense(View<'a>),
    /// 4-bit codes with their scales.
    Quantized(&'a Quantized),
}

/// A low-rank update beside a weight: LoRA, AdaLoRA (`per_rank`), DoRA (`row_scale`).
#[derive(Clone, Copy, Debug)]
pub struct LowRank<'a> {
    /// Rows of `a`, columns of `b`. 0 is legal: a pruned module.
    pub rank: usize,
    /// A [rank, inputs].
    pub a: View<'a>,
    /// B [outputs, rank].
    pub b: View<'a>,
    /// α/r, or whatever the method makes of it.
    pub scale: f32,
    /// AdaLoRA's E [rank]: A's rows are scaled by it.
    pub per_rank: Option<View<'a>>,
    /// DoRA's m/‖W + s·B·A‖ [outputs].
    pub row_scale: Option<View<'a>>,
    /// Dropout on the input of A alone.
    pub dropout: Option<Dropout>,
}

/// A product of `tokens` rows with a weight [outputs, inputs].
#[derive(Clone, Copy, Debug)]
pub struct Linear {
    /// Rows of x and y.
    pub tokens: usize,
    /// Columns of x.
    pub inputs: usize,
    /// Columns of y.
    pub outputs: usize,
    /// Precision of the inputs of every product.
    pub compute: Compute,
}

/// Where `linear_grad_weight` adds its gradients; `None` costs nothing.
#[derive(Debug, Default)]
pub struct LinearGrads<'a> {
    /// [outputs, inputs]; an error for a quantised weight or beside a `row_scale`.
    pub weight: Option<ViewMut<'a>>,
    /// [outputs]
    pub bias: Option<ViewMut<'a>>,
    /// [rank, inputs]
    pub a: Option<ViewMut<'a>>,
    /// [outputs, rank]
    pub b: Option<ViewMut<'a>>,
    /// [rank]
    pub per_rank: Option<ViewMut<'a>>,
    /// [outputs]
    pub row_scale: Option<ViewMut<'a>>,
}

impl Linear {
    fn check_weight(&self, kernel: &'static str, weight: &Weight, low_rank: Option<&LowRank>) -> Result<()> {
        match weight {
            Weight::Dense(w) => expect(kernel, "weight", w.len(), self.outputs * self.inputs)?,
            Weight::Quantized(q) => {
                if q.shape != [self.outputs, self.inputs] {
                    let why =
                        format!("the quantised weight is {:?}, expected [{}, {}]", q.shape, self.outputs, self.inputs);
                    return Err(Error::Invalid { kernel, why });
                }
                q.check()?;
            }
        }
        let Some(l) = low_rank else { return Ok(()) };
        expect(kernel, "a", l.a.len(), l.rank * self.inputs)?;
        expect(kernel, "b", l.b.len(), self.outputs * l.rank)?;
        expect_some(kernel, "per_rank", l.per_rank.as_ref().map(View::len), l.rank)?;
        expect_some(kernel, "row_scale", l.row_scale.as_ref().map(View::len), self.outputs)?;
        l.dropout.as_ref().map_or(Ok(()), |dropout| dropout.check_probability())
    }

    /// Lengths for `linear`.
    pub fn check(
        &self,
        x: &View,
        w: &Weight,
        low_rank: Option<&LowRank>,
        bias: Option<&View>,
        y: &ViewMut,
    ) -> Result<()> {
        self.check_weight("linear", w, low_rank)?;
        expect("linear", "x", x.len(), self.tokens * self.inputs)?;
        expect_some("linear", "bias", bias.map(View::len), self.outputs)?;
        expect("linear", "y", y.len(), self.tokens * self.outputs)
    }

    /// Lengths for `linear_grad_input`.
    pub fn check_grad_input(&self, dy: &View, w: &Weight, low_rank: Option<&LowRank>, dx: &ViewMut) -> Result<()> {
        self.check_weight("linear_grad_input", w, low_rank)?;
        expect("linear_grad_input", "dy", dy.len(), self.tokens * self.outputs)?;
        expect("linear_grad_input", "dx", dx.len(), self.tokens * self.inputs)
    }

    /// Lengths for `linear_grad_weight`, and which gradients exist at all.
    pub fn check_grad_weight(
        &self,
        x: &View,
        dy: &View,
        w: &Weight,
        low_rank: Option<&LowRank>,
        g: &LinearGrads,
    ) -> Result<()> {
        let kernel = "linear_grad_weight";
        self.check_weight(kernel, w, low_rank)?;
        expect(kernel, "x", x.len(), self.tokens * self.inputs)?;
        expect(kernel, "dy", dy.len(), self.tokens * self.outputs)?;
        let rank = low_rank.map_or(0, |l| l.rank);
        expect_some(kernel, "d weight", g.weight.as_ref().map(ViewMut::len), self.outputs * self.inputs)?;
        expect_some(kernel, "d bias", g.bias.as_ref().map(ViewMut::len), self.outputs)?;
        expect_some(kernel, "d a", g.a.as_ref().map(ViewMut::len), rank * self.inputs)?;
        expect_some(kernel, "d b", g.b.as_ref().map(ViewMut::len), self.outputs * rank)?;
        expect_some(kernel, "d per_rank", g.per_rank.as_ref().map(ViewMut::len), rank)?;
        expect_some(kernel, "d row_scale", g.row_scale.as_ref().map(ViewMut::len), self.outputs)?;
        let invalid = |why: &str| Err(Error::Invalid { kernel, why: why.into() });
        match low_rank {
            None if g.a.is_some() || g.b.is_some() || g.per_rank.is_some() || g.row_scale.is_some() => {
                return invalid("a gradient of the low-rank part was asked for where there is none");
            }
            Some(l) if g.per_rank.is_some() && l.per_rank.is_none() => {
                return invalid("'d per_rank' without 'per_rank'");
            }
            Some(l) if g.row_scale.is_some() && l.row_scale.is_none() => {
                return invalid("'d row_scale' without 'row_scale'");
            }
            Some(l) if g.weight.is_some() && l.row_scale.is_some() => return invalid("'d weight' beside 'row_scale'"),
            _ => {}
        }
        match w {
            Weight::Quantized(_) if g.weight.is_some() => invalid("a quantised weight has no gradient"),
            _ => Ok(()),
        }
    }
}

/// Counter-based dropout: element i is kept where the Philox word at position i of `stream` is at least
/// `threshold()`, and then multiplied by `1/(1 − p)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// The probability of dropping an element, in [0, 1).
    pub probability: f32,
    /// The run's seed.
    pub seed: u64,
    /// Which draw of the run: no two may share one.
    pub stream: u64,
}

impl Dropout {
    /// Words below it are dropped.
    pub fn threshold(&self) -> u32 {
        (f64::from(self.probability) * 4_294_967_296.0).round() as u32
    }

    /// What a kept element is multiplied by.
    pub fn keep_scale(&self) -> f32 {
        (1.0 / (1.0 - f64::from(self.probability))) as f32
    }

    fn check_probability(&self) -> Result<()> {
        if (0.0..1.0).contains(&self.probability) {
            return Ok(());
        }
        let why = format!("probability {}: expected at least 0 and below 1", self.probability);
        Err(Error::Invalid { kernel: "dropout", why })
    }

    /// The probability's range and the lengths.
    pub fn check(&self, x: &View, y: &ViewMut) -> Result<()> {
        self.check_probability()?;
        expect("dropout", "y", y.len(), x.len())
    }
}

/// Root-mean-square normalisation of `rows` rows.
#[derive(Clone, Copy, Debug)]
pub struct RmsNorm {
    /// Rows of x and y.
    pub rows: usize,
    /// Elements a row, and of the gain.
    pub width: usize,
    /// ε, added to the mean of squares.
    pub eps: f64,
}

impl RmsNorm {
    /// Lengths of x, gain, y and 1/ρ; for the backward pass, of dy and dx in place of x and y.
    pub fn check(&self, x: usize, gain: &View, y: usize, inv_rms: usize) -> Result<()> {
        expect("rms_norm", "x", x, self.rows * self.width)?;
        expect("rms_norm", "gain", gain.len(), self.width)?;
        expect("rms_norm", "y", y, self.rows * self.width)?;
        expect("rms_norm", "inv_rms", inv_rms, self.rows)
    }
}

/// Rotary position embedding of x [tokens, heads, head_dim].
#[derive(Clone, Copy, Debug)]
pub struct Rope {
    /// Rows of x; positions has one entry each.
    pub tokens: usize,
    /// Heads a row.
    pub heads: usize,
    /// Elements a head: even.
    pub head_dim: usize,
    /// Turn back: the transpose of the rotation, which is its gradient.
    pub inverse: bool,
}

impl Rope {
    /// Lengths; returns the number of positions that the tables hold.
    pub fn check(&self, x: &View, positions: &View, cos: &View, sin: &View, y: &ViewMut) -> Result<usize> {
        let (kernel, half) = ("rope", self.head_dim / 2);
        if !self.head_dim.is_multiple_of(2) || half == 0 {
            return Err(Error::Invalid { kernel, why: format!("head_dim {}: expected an even number", self.head_dim) });
        }
        let elements = self.tokens * self.heads * self.head_dim;
        expect(kernel, "x", x.len(), elements)?;
        expect(kernel, "positions", positions.len(), self.tokens)?;
        expect(kernel, "cos", cos.len(), cos.len() / half * half)?;
        expect(kernel, "sin", sin.len(), cos.len())?;
        expect(kernel, "y", y.len(), elements)?;
        Ok(cos.len() / half)
    }
}

/// Causal grouped-query attention over `batch` sequences.
///
/// q, out [batch, queries, heads, head_dim]; k, v [batch, keys, kv_heads, head_dim]; heads a multiple of kv_heads,
/// query head h reading key head h / (heads / kv_heads).
///
/// Query i has position p = query_offset + i and sees key j where start_i ≤ j ≤ p, and p − j < window if there is
/// one. `starts` [batch, queries] (u32) is the first key of the query's own segment, ≤ p; without it, 0.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Sequences.
    pub batch: usize,
    /// Queries a sequence.
    pub queries: usize,
    /// Keys a sequence: at least query_offset + queries.
    pub keys: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements a head.
    pub head_dim: usize,
    /// What scores are multiplied by: 1/√head_dim.
    pub scale: f32,
    /// Keys before the first query: the length of the KV cache.
    pub query_offset: usize,
    /// Sliding window: the number of last keys that a query sees, itself included.
    pub window: Option<usize>,
}

impl Attention {
    /// Elements of q, out and their gradients.
    pub fn query_elements(&self) -> usize {
        self.batch * self.queries * self.heads * self.head_dim
    }

    /// Elements of k, of v and of their gradients.
    pub fn key_elements(&self) -> usize {
        self.batch * self.keys * self.kv_heads * self.head_dim
    }

    /// Elements of the saved log-sum-exps [batch, heads, queries].
    pub fn lse_elements(&self) -> usize {
        self.batch * self.heads * self.queries
    }

    /// The keys that query `i` sees, given its segment's start.
    pub fn visible(&self, i: usize, start: usize) -> std::ops::RangeInclusive<usize> {
        let position = self.query_offset + i;
        let window = self.window.map_or(0, |w| (position + 1).saturating_sub(w));
        start.max(window)..=position
    }

    /// The dimensions' agreement and the inputs' lengths.
    pub fn check(&self, q: &View, k: &View, v: &View, starts: Option<&View>) -> Result<()> {
        let kernel = "attention";
        let invalid = |why: String| Err(Error::Invalid { kernel, why });
        if self.kv_heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            return invalid(format!("{} heads: expected a multiple of {} kv_heads", self.heads, self.kv_heads));
        }
        if self.query_offset + self.queries > self.keys {
            return invalid(format!("{} keys: expected at least {} + {}", self.keys, self.query_offset, self.queries));
        }
        if self.window == Some(0) {
            return invalid("window 0: expected at least 1".into());
        }
        expect(kernel, "q", q.len(), self.query_elements())?;
        expect(kernel, "k", k.len(), self.key_elements())?;
        expect(kernel, "v", v.len(), self.key_elements())?;
        expect_some(kernel, "starts", starts.map(View::len), self.batch * self.queries)
    }

    /// That a segment's start lies at or before its query. For backends, a query at a time.
    pub fn check_start(&self, i: usize, start: usize) -> Result<()> {
        if start <= self.query_offset + i {
            return Ok(());
        }
        let why = format!("query {i} starts at key {start}, after its own position {}", self.query_offset + i);
        Err(Error::Invalid { kernel: "attention", why })
    }
}

/// Rows of a table [vocab, width], picked by token ids.
#[derive(Clone, Copy, Debug)]
pub struct Embedding {
    /// Ids, and rows of the output.
    pub tokens: usize,
    /// Rows of the table.
    pub vocab: usize,
    /// Columns of the table.
    pub width: usize,
}

impl Embedding {
    /// Lengths of ids, table (or its gradient) and rows (or their gradient).
    pub fn check(&self, ids: &View, table: usize, rows: usize) -> Result<()> {
        expect("embedding", "ids", ids.len(), self.tokens)?;
        expect("embedding", "table", table, self.vocab * self.width)?;
        expect("embedding", "rows", rows, self.tokens * self.width)
    }
}

/// Softmax cross-entropy over rows of logits [rows, vocab]; a label of [`IGNORED`] has no loss and no gradient.
#[derive(Clone, Copy, Debug)]
pub struct CrossEntropy {
    /// Rows of logits; one label each.
    pub rows: usize,
    /// Columns of logits.
    pub vocab: usize,
}

/// The label of a position that does not count.
pub const IGNORED: i64 = -100;

impl CrossEntropy {
    /// Lengths of logits, labels and losses.
    pub fn check(&self, logits: usize, labels: &View, losses: &ViewMut) -> Result<()> {
        expect("cross_entropy", "logits", logits, self.rows * self.vocab)?;
        expect("cross_entropy", "labels", labels.len(), self.rows)?;
        expect("cross_entropy", "losses", losses.len(), self.rows)
    }

    /// The label as a column, `None` where ignored. For backends, a row at a time.
    pub fn column(&self, row: usize, label: i64) -> Result<Option<usize>> {
        match usize::try_from(label) {
            _ if label == IGNORED => Ok(None),
            Ok(column) if column < self.vocab => Ok(Some(column)),
            _ => Err(Error::TokenId { position: row, id: label, vocab: self.vocab }),
        }
    }
}

/// One step of Adam with decoupled weight decay (Loshchilov & Hutter 2019, algorithm 2).
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// The learning rate of this step, schedule included.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// The step's number, from 1: the bias correction's exponent.
    pub step: u64,
    /// What the gradient is multiplied by first: 1, or the clip's factor.
    pub grad_scale: f64,
}

impl AdamW {
    /// Lengths, and a step from 1.
    pub fn check(&self, grad: &View, param: &ViewMut, m: &ViewMut, v: &ViewMut) -> Result<()> {
        if self.step == 0 {
            return Err(Error::Invalid { kernel: "adamw", why: "step 0: expected 1 or more".into() });
        }
        expect("adamw", "param", param.len(), grad.len())?;
        expect("adamw", "m", m.len(), grad.len())?;
        expect("adamw", "v", v.len(), grad.len())
    }
}

/// That a view of `kernel` has the expected number of elements.
pub fn expect(kernel: &'static str, tensor: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected { Ok(()) } else { Err(Error::Length { kernel, tensor, expected, found }) }
}

fn expect_some(kernel: &'static str, tensor: &'static str, found: Option<usize>, expected: usize) -> Result<()> {
    found.map_or(Ok(()), |found| expect(kernel, tensor, found, expected))
}
