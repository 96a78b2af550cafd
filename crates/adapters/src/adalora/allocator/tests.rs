//! The choice by itself: what a mask hits, when a triplet goes, and what is cut with it.

use super::*;
use crate::{Form, Init, LoraSpec, Weight};
use proptest::prelude::*;
use rankfold_autograd::{Base, Tensor};
use rankfold_reference::ReferenceBackend;

const B: &dyn Backend = &ReferenceBackend;

fn layer(index: u64, rank: usize) -> Linear {
    let w = Tensor::constant(B.upload(&[0.5f32; 12]).unwrap(), [3, 4]).unwrap();
    let mut layer = Linear::new(format!("m{index}"), index, Weight::Frozen(Base::Dense(w)), None).unwrap();
    let spec = LoraSpec { form: Form::AdaLora, ..LoraSpec::new(rank, 3.0) };
    layer.set_adapter(Lora::init(B, &layer, spec, Init::Kaiming, 1).unwrap()).unwrap();
    layer
}

fn allocator(layers: &[Linear]) -> Allocator {
    Allocator::new(B, &AdaLora { target_rank: 1, ..AdaLora::default() }, Prune::Shrink, 40, layers).unwrap()
}

/// Scores by layer, few enough that some are equal.
fn scores() -> impl Strategy<Value = Vec<Vec<u8>>> {
    prop::collection::vec(prop::collection::vec(0..12u8, 1..6), 1..4)
}

proptest! {
    /// Those that are hit are the (n − b)-th smallest and all that are no larger: with no two equal, n − b.
    #[test]
    fn a_mask_hits_the_least_and_leaves_no_more_than_the_budget(scores in scores(), budget in 0..20usize) {
        let layers: Vec<Linear> = scores.iter().zip(0..).map(|(of, index)| layer(index, of.len())).collect();
        let mut allocator = allocator(&layers);
        let mut sorted: Vec<u8> = scores.concat();
        let all = allocator.modules.iter_mut().flat_map(|module| &mut module.triplets);
        all.zip(&sorted).for_each(|(triplet, score)| triplet.score = f64::from(*score));
        allocator.choose(7, budget);
        let hit = |triplet: &&Triplet| triplet.masks > 0;
        let (masked, kept): (Vec<&Triplet>, Vec<&Triplet>) = allocator.all().partition(hit);
        prop_assert!(masked.iter().all(|m| m.since == 7 && kept.iter().all(|k| m.score < k.score)));
        sorted.sort_unstable();
        let over = sorted.len().saturating_sub(budget);
        let ties = if over == 0 { 0 } else { sorted.iter().filter(|score| **score <= sorted[over - 1]).count() };
        prop_assert_eq!(masked.len(), ties);
        prop_assert!(kept.len() <= budget && (kept.len() == budget.min(sorted.len()) || ties > over));
    }

    /// Of the masks of every step that is a multiple of ΔT, only those since the last that missed count.
    #[test]
    fn a_triplet_goes_once_every_mask_of_its_patience_has_hit_it_and_one_that_recovers_stays(
        delta_t in 1..9usize, hits in prop::collection::vec(prop::bool::weighted(0.9), 1..60)
    ) {
        let (patience, mut triplet) = (patience(0.85), Triplet::default());
        prop_assert_eq!(patience, 19);
        for (n, hit) in hits.iter().enumerate() {
            let t = (n + 1) * delta_t;
            triplet.mask(t, *hit);
            let run = hits[..=n].iter().rev().take_while(|hit| **hit).count();
            let is_long = run >= 3 && (run - 1) * delta_t >= patience;
            prop_assert_eq!(triplet.is_forgotten(t, patience), is_long, "after {} masks in a row", run);
        }
    }

    /// Of every factor, its sensitivity and the list the same triplets stay, their values as they were.
    #[test]
    fn what_is_cut_is_cut_of_everything(rank in 1..6usize, drawn in prop::collection::vec(any::<bool>(), 6)) {
        let keep = &drawn[..rank];
        let mut layer = layer(0, rank);
        let mut allocator = allocator(std::slice::from_ref(&layer));
        for ((_, parameter), sensitivity) in
            layer.adapter().unwrap().parameters().iter().zip(&mut allocator.modules[0].sensitivities)
        {
            let values: Vec<f32> = (0..parameter.shape().elements()).map(|i| i as f32).collect();
            for buffer in [&mut sensitivity.mean, &mut sensitivity.deviation] {
                *buffer = B.upload(&values).unwrap();
            }
            parameter.update(|buffer| {
                *buffer = B.upload(&values)?;
                Ok(())
            }).unwrap();
        }
        let goes = |triplet: &Triplet| !keep[triplet.index];
        let cuts = allocator.cut(B, &mut [&mut layer], goes).unwrap();
        let kept: Vec<usize> = (0..rank).filter(|i| keep[*i]).collect();
        prop_assert_eq!(cuts.len(), if kept.len() == rank { 0 } else { 3 });
        let triplets = &allocator.modules[0].triplets;
        prop_assert_eq!(triplets.iter().map(|triplet| triplet.index).collect::<Vec<_>>(), kept.clone());
        let lora = layer.adapter().unwrap();
        prop_assert_eq!((lora.rank(), triplets_of(&layer).unwrap().2), (kept.len(), keep));
        // Rows of A [rank, 4], columns of B [3, rank], entries of E: elements that were their own places.
        let expected: [Vec<usize>; 3] = [
            kept.iter().flat_map(|k| 4 * k..4 * k + 4).collect(),
            (0..3).flat_map(|row| kept.iter().map(move |k| row * rank + k)).collect(),
            kept.clone(),
        ];
        for (((_, parameter), sensitivity), expected) in
            lora.parameters().iter().zip(&allocator.modules[0].sensitivities).zip(expected)
        {
            let tensor = parameter.tensor();
            for buffer in [tensor.buffer(), &sensitivity.mean, &sensitivity.deviation] {
                let found: Vec<usize> =
                    B.download::<f32>(buffer.view()).unwrap().into_iter().map(|x| x as usize).collect();
                prop_assert_eq!(&found, &expected);
            }
        }
    }
}

/// Nothing is scored before the only mask: it would hit all.
#[test]
fn a_choice_without_a_score_is_refused() {
    let config = AdaLora { target_rank: 1, ..AdaLora::default() };
    let why = Allocator::new(B, &config, Prune::Mask, 1, [&layer(0, 3)]).unwrap_err().to_string();
    assert!(why.starts_with("'total_step' is 1 with tinit 0 and tfinal 0, expected "), "{why}");
}
