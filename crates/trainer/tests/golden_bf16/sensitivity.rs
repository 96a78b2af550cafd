//! How much a loss depends on the rounding of every input of every product: a backend that is `reference` and notes it.
//!
//! Where a product takes x_i·(1 + δ_i) in place of x_i, the loss changes by Σ_i x_i·(∂L/∂x_i)·δ_i to first order, the
//! derivative being that through the products that take x rounded. So for y = x Wᵀ with dy = ∂L/∂y
//!
//! ```text
//! dL = Σ (x ∘ dy W)·δx + Σ (W ∘ dyᵀ x)·δW
//! ```
//!
//! and for a low-rank update the same of u = x (e∘A)ᵀ, with ∂L/∂u = s·(g∘dy) B, and of u Bᵀ. Attention rounds q, k and v,
//! whose derivatives are its own, and P, by which the loss has the derivative dP = dout vᵀ.
//!
//! x is kept from `linear` to `linear_grad_input`, which come in reverse: so every x must have a gradient, and the
//! embedding therefore be trained.

use rankfold_backend::params::*;
use rankfold_backend::*;
use rankfold_reference::ReferenceBackend;
use std::collections::HashMap;
use std::sync::Mutex;

const REFERENCE: &dyn Backend = &ReferenceBackend;

/// The backend.
#[derive(Debug, Default)]
pub struct Noting(Mutex<Noted>);

#[derive(Debug, Default)]
struct Noted {
    /// x of the forward products whose gradients are still to come.
    inputs: Vec<Vec<f64>>,
    /// x_i·∂L/∂x_i by the elements' bits: a tensor that several products take is rounded alike by each.
    tensors: HashMap<Vec<u64>, Vec<f64>>,
    /// P_ij·∂L/∂P_ij
    probabilities: Vec<f64>,
}

impl Noting {
    /// Σ|a| and √Σa² over the sensitivities a to every relative rounding error.
    pub fn sums(&self) -> (f64, f64) {
        let noted = self.0.lock().unwrap();
        assert!(noted.inputs.is_empty());
        let all = || noted.tensors.values().flatten().chain(&noted.probabilities);
        (all().map(|a| a.abs()).sum(), all().map(|a| a * a).sum::<f64>().sqrt())
    }
}

impl Noted {
    fn add(&mut self, x: &[f64], gradient: &[f64]) {
        assert_eq!(x.len(), gradient.len());
        let key = x.iter().map(|x| x.to_bits()).collect();
        let sums = self.tensors.entry(key).or_insert_with(|| vec![0.0; x.len()]);
        sums.iter_mut().zip(x.iter().zip(gradient)).for_each(|(sum, (x, d))| *sum += x * d);
    }

    /// Note y = x wᵀ of x [.., k] and w [n, k]; returns ∂L/∂x.
    fn product(&mut self, x: &[f64], w: &[f64], dy: &[f64], k: usize) -> Vec<f64> {
        let (mut dx, mut dw) = (vec![0.0; x.len()], vec![0.0; w.len()]);
        let n = w.len() / k;
        for ((x, dx), dy) in x.chunks(k).zip(dx.chunks_mut(k)).zip(dy.chunks(n)) {
            for ((w, dw), dy) in w.chunks(k).zip(dw.chunks_mut(k)).zip(dy) {
                for i in 0..k {
                    dx[i] += dy * w[i];
                    dw[i] += dy * x[i];
                }
            }
        }
        self.add(x, &dx);
        self.add(w, &dw);
        dx
    }
}

fn values(x: View) -> Result<Vec<f64>> {
    let mut wide = REFERENCE.alloc(DType::F64, x.len())?;
    REFERENCE.cast(x, wide.view_mut())?;
    REFERENCE.download(wide.view())
}

fn weights(w: &Weight) -> Result<Vec<f64>> {
    match w {
        Weight::Dense(w) => values(*w),
        Weight::Quantized(q) => {
            let mut dense = REFERENCE.alloc(DType::F64, q.elements())?;
            REFERENCE.dequantize_4bit(q, dense.view_mut())?;
            REFERENCE.download(dense.view())
        }
    }
}

/// x_ij · factors_j
fn scaled(x: &[f64], factors: &[f64]) -> Vec<f64> {
    x.iter().zip(factors.iter().cycle()).map(|(x, factor)| x * factor).collect()
}

impl Backend for Noting {
    fn linear(
        &self,
        p: &Linear,
        x: View,
        w: &Weight,
        low_rank: Option<&LowRank>,
        bias: Option<View>,
        y: ViewMut,
    ) -> Result<()> {
        self.0.lock().unwrap().inputs.push(values(x)?);
        ReferenceBackend.linear(p, x, w, low_rank, bias, y)
    }

    fn linear_grad_input(
        &self,
        p: &Linear,
        dy: View,
        w: &Weight,
        low_rank: Option<&LowRank>,
        accumulate: bool,
        dx: ViewMut,
    ) -> Result<()> {
        let noted = &mut *self.0.lock().unwrap();
        let (x, mut dz) = (noted.inputs.pop().unwrap(), values(dy)?);
        if let Some(l) = low_rank {
            assert!(l.dropout.is_none());
            if let Some(g) = l.row_scale {
                dz = scaled(&dz, &values(g)?);
            }
            let (mut a, b) = (values(l.a)?, values(l.b)?);
            if let Some(e) = l.per_rank {
                let e = values(e)?;
                a.chunks_mut(p.inputs).zip(e).for_each(|(a, e)| a.iter_mut().for_each(|a| *a *= e));
            }
            let dot = |x: &[f64], a: &[f64]| x.iter().zip(a).map(|(x, a)| x * a).sum::<f64>();
            let rows = x.chunks(p.inputs);
            let u: Vec<f64> = rows.flat_map(|x| a.chunks(p.inputs).map(move |a| dot(x, a))).collect();
            let du = noted.product(&u, &b, &scaled(&dz, &[f64::from(l.scale)]), l.rank);
            noted.product(&x, &a, &du, p.inputs);
        }
        noted.product(&x, &weights(w)?, &dz, p.inputs);
        ReferenceBackend.linear_grad_input(p, dy, w, low_rank, accumulate, dx)
    }

    fn attention_grad(&self, p: &Attention, saved: AttentionSaved, dout: View, grads: AttentionGrads) -> Result<()> {
        let AttentionSaved { q, k, v, lse, .. } = saved;
        assert!(saved.starts.is_none() && p.window.is_none() && p.query_offset == 0);
        let gradient = |x: View| REFERENCE.alloc(DType::F64, x.len());
        let (mut dq, mut dk, mut dv) = (gradient(q)?, gradient(k)?, gradient(v)?);
        let own = AttentionGrads { dq: Some(dq.view_mut()), dk: Some(dk.view_mut()), dv: Some(dv.view_mut()) };
        ReferenceBackend.attention_grad(p, saved, dout, own)?;
        let (noted, of_out) = (&mut *self.0.lock().unwrap(), values(dout)?);
        let [q, k, v, lse] = [values(q)?, values(k)?, values(v)?, values(lse)?];
        for (x, dx) in [(&q, &dq), (&k, &dk), (&v, &dv)] {
            noted.add(x, &values(dx.view())?);
        }
        // Of the heads numbered i and j.
        let dot = |x: &[f64], i: usize, y: &[f64], j: usize| -> f64 {
            (0..p.head_dim).map(|d| x[i * p.head_dim + d] * y[j * p.head_dim + d]).sum()
        };
        for at in 0..p.batch * p.queries * p.heads {
            let (row, head) = (at / p.heads, at % p.heads);
            let (sequence, query) = (row / p.queries, row % p.queries);
            let lse = lse[(sequence * p.heads + head) * p.queries + query];
            for j in p.visible(query, 0) {
                let key = (sequence * p.keys + j) * p.kv_heads + head / (p.heads / p.kv_heads);
                let probability = (f64::from(p.scale) * dot(&q, at, &k, key) - lse).exp();
                noted.probabilities.push(probability * dot(&of_out, at, &v, key));
            }
        }
        ReferenceBackend.attention_grad(p, saved, dout, grads)
    }

    as_reference!(memory);
    as_reference!(rest);
}
