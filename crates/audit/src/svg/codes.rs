//! How often each of a format's codes is used, against all being used alike.

use super::{Frame, percent, ticks};
use crate::Figures;

/// The plot of one format's codes in ascending order of their values.
pub(crate) fn plot(figures: &Figures) -> String {
    let format = figures.format;
    let order = format.thresholds().codes;
    let total = figures.code_counts.iter().sum::<u64>() as f64;
    let share = |code: u8| 100.0 * figures.code_counts[usize::from(code)] as f64 / total;
    let uniform = 100.0 / order.len() as f64;
    let (y_ticks, top) = ticks(order.iter().map(|code| share(*code)).fold(uniform, f64::max));
    let title = format!("Codes of {format} in use at block {}", figures.block);
    let description = format!(
        "A bar for each of {} codes in ascending order of value: the percentage of weights that have it. A dashed line \
         marks {uniform:.2} %, where all codes are used alike. Entropy {:.3} bits of {:.3}.",
        order.len(),
        figures.code_entropy,
        (order.len() as f64).log2()
    );
    let id = format!("codes-{format}");
    let mut frame = Frame::new(&id, &title, &description, (-0.7, order.len() as f64 - 0.3), (0.0, top));
    frame.y_axis("weights with the code", &y_ticks.iter().map(|y| (*y, percent(*y))).collect::<Vec<_>>());
    let label = |code: u8| {
        let value = format.values()[usize::from(code)];
        if value == 0.0 { "0".into() } else { format!("{value:.2}") }
    };
    let labelled: Vec<_> = order.iter().enumerate().filter(|(i, _)| i % 3 == 0 || *i + 1 == order.len()).collect();
    frame.x_axis("value of the code", &labelled.iter().map(|(i, code)| (*i as f64, label(**code))).collect::<Vec<_>>());
    for (i, code) in order.iter().enumerate() {
        let hint = format!("code {code}, value {}: {}", format.values()[usize::from(*code)], percent(share(*code)));
        frame.bar(&format!("fill {format}"), (i as f64 - 0.4, i as f64 + 0.4), share(*code), &hint);
    }
    frame.level("even", uniform);
    frame.finish()
}
