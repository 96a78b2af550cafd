//! Rotary position embedding (Su et al. 2021, RoFormer, eq. 34): its frequencies and tables.
//!
//! Pair i of a head turns by position · θ_i with θ_i = base^(−2i/head_dim). Angles are formed in f64 and their
//! cosines rounded once to f32, so a table is as exact at position 100,000 as at position 1.

/// How a model stretches its context beyond what it was trained on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scaling {
    /// Frequencies as they are.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3: wavelengths longer than `original / low` are divided by `factor`, those shorter than
    /// `original / high` stay, and between the two the divisor is blended.
    Llama3 {
        /// The divisor of the long wavelengths.
        factor: f64,
        /// `low_freq_factor`.
        low: f64,
        /// `high_freq_factor`.
        high: f64,
        /// `original_max_position_embeddings`.
        original: f64,
    },
}

/// θ_i for i in 0 … head_dim/2, in radians a position.
pub fn frequencies(base: f64, head_dim: usize, scaling: Scaling) -> Vec<f64> {
    (0..head_dim / 2)
        .map(|i| {
            let theta = base.powf(-2.0 * i as f64 / head_dim as f64);
            match scaling {
                Scaling::None => theta,
                Scaling::Linear { factor } => theta / factor,
                Scaling::Llama3 { factor, low, high, original } => {
                    let turns = original * theta / std::f64::consts::TAU;
                    let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    keep * theta + (1.0 - keep) * theta / factor
                }
            }
        })
        .collect()
}

/// `(cos, sin)`, each [positions, frequencies.len()], of position · θ_i.
pub fn tables(frequencies: &[f64], positions: usize) -> (Vec<f32>, Vec<f32>) {
    let angles = || (0..positions).flat_map(|position| frequencies.iter().map(move |theta| position as f64 * theta));
    (angles().map(|a| a.cos() as f32).collect(), angles().map(|a| a.sin() as f32).collect())
}
