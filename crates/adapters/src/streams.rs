//! Which random numbers are whose.
//!
//! Every draw of a run has a Philox stream of its own under the run's seed, a pure function of what is drawn:
//!
//! ```text
//! dropout of layer i in micro-batch d    d · 2²⁰ + i     below 2⁶³
//! first values of layer i                2⁶³ + i
//! first values of learned tokens         2⁶³ + 2²⁰
//! free for others                        above 2⁶³ + 2²⁰
//! ```
//!
//! So a forward pass that is computed again draws what it drew before, and a resumed run what it would have drawn.

/// Layers that a model may number: indices below it have streams that no other layer has.
pub const LAYERS: u64 = 1 << 20;

/// The lowest stream that is not dropout's.
pub const RESERVED: u64 = 1 << 63;

/// The stream of learned tokens' first values.
pub const VIRTUAL_TOKENS: u64 = RESERVED + LAYERS;

/// The stream of a layer's dropout in the run's micro-batch of number `draw`, below 2⁴³.
pub fn dropout(draw: u64, layer: u64) -> u64 {
    (draw.wrapping_mul(LAYERS) | layer) & !RESERVED
}

/// The stream of a layer's first values.
pub fn initialisation(layer: u64) -> u64 {
    RESERVED | layer
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_two_draws_share_a_stream(
            draws in [0..1u64 << 43, 0..1u64 << 43],
            layers in [0..LAYERS, 0..LAYERS],
            same_draw: bool,
        ) {
            let draws = if same_draw { [draws[0]; 2] } else { draws };
            let [a, b] = [0, 1].map(|i| dropout(draws[i], layers[i]));
            prop_assert_eq!(a == b, (draws[0], layers[0]) == (draws[1], layers[1]));
            prop_assert_eq!(initialisation(layers[0]) == initialisation(layers[1]), layers[0] == layers[1]);
            prop_assert!(a < RESERVED && initialisation(layers[0]) >= RESERVED);
        }
    }
}
