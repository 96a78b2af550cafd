//! Text, token by token: the softmax of the last position's logits, cooled and cut, and a counter-based draw.

use crate::Result;
use crate::model::Model;
use rankfold_backend::{Compute, philox};

/// How the next token is chosen.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// Logits are divided by it; 0 takes the largest.
    pub temperature: f64,
    /// Nucleus (Holtzman et al. 2020): only the likeliest tokens that together have this probability; 1 is all.
    pub top_p: f64,
    /// The same seed draws the same text.
    pub seed: u64,
}

/// Continue `prompt` by at most `limit` tokens, ending early at one of `ends` (which is not returned).
pub fn generate(
    model: &Model,
    prompt: &[u32],
    limit: usize,
    ends: &[u32],
    sampling: Sampling,
    compute: Compute,
) -> Result<Vec<u32>> {
    let mut cache = model.cache(prompt.len().saturating_add(limit))?;
    let mut new = prompt.to_vec();
    let mut made = Vec::new();
    while made.len() < limit {
        let logits = model.next_logits(&new, &mut cache, compute)?;
        let token = choose(&logits, sampling, made.len() as u64);
        if ends.contains(&token) {
            break;
        }
        made.push(token);
        new = vec![token];
    }
    Ok(made)
}

/// The token of draw number `draw`.
pub fn choose(logits: &[f32], sampling: Sampling, draw: u64) -> u32 {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    // Ties in the order of ids, so that the choice is one choice.
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    let Some(&best) = order.first() else { return 0 };
    if sampling.temperature <= 0.0 {
        return best as u32;
    }
    let weight = |&id: &usize| (f64::from(logits[id] - logits[best]) / sampling.temperature).exp();
    let weights: Vec<f64> = order.iter().map(weight).collect();
    let total: f64 = weights.iter().sum();
    let (mut kept, mut mass) = (0, 0.0);
    while kept < weights.len() && (kept == 0 || mass < sampling.top_p * total) {
        mass += weights[kept];
        kept += 1;
    }
    let mut point = f64::from(philox::unit(philox::word(sampling.seed, u64::MAX, draw))) * mass;
    for (id, weight) in order.iter().zip(&weights).take(kept) {
        point -= weight;
        if point < 0.0 {
            return *id as u32;
        }
    }
    order[kept - 1] as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_temperature_takes_the_largest_and_the_first_of_equals() {
        let greedy = Sampling { temperature: 0.0, top_p: 1.0, seed: 0 };
        assert_eq!(choose(&[0.0, 3.0, 1.0, 3.0], greedy, 0), 1);
    }

    #[test]
    fn frequencies_follow_the_softmax_within_the_nucleus() {
        // p = (0.6, 0.3, 0.1): a nucleus of 0.8 keeps the first two, as 2/3 and 1/3.
        let logits = [0.6f32.ln(), 0.3f32.ln(), 0.1f32.ln()];
        let sampling = Sampling { temperature: 1.0, top_p: 0.8, seed: 4 };
        let draws = 9000;
        let mut counts = [0; 3];
        for draw in 0..draws {
            counts[choose(&logits, sampling, draw) as usize] += 1;
        }
        // Five standard deviations of a binomial of 9000 draws: 5·√(9000·2/9) = 224.
        assert!(counts[2] == 0 && (counts[0] - 6000i32).abs() < 224, "{counts:?}");
    }
}
