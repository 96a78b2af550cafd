//! The page's colours and its style sheet.
//!
//! Two palettes of the same names, light and dark, chosen by the reader's system. Text and marks stand out from
//! their background by a ratio of at least 4.5 (WCAG 2.2, success criterion 1.4.3), which a test computes.

use std::fmt::Write;

/// A palette: names of CSS variables and colours.
type Palette = [(&'static str, u32); 10];

const LIGHT: Palette = [
    ("page", 0xf6f7f9),
    ("card", 0xffffff),
    ("text", 0x1a1f27),
    ("quiet", 0x545d6b),
    ("edge", 0xd5dae1),
    ("hist", 0x747d8b),
    ("first", 0x0b57a4),
    ("second", 0xa33a0c),
    ("third", 0x176b3a),
    ("best", 0xe6f0fb),
];

const DARK: Palette = [
    ("page", 0x0f1216),
    ("card", 0x181c22),
    ("text", 0xe7eaee),
    ("quiet", 0xa7b0bd),
    ("edge", 0x363d47),
    ("hist", 0x808a99),
    ("first", 0x7db8ff),
    ("second", 0xffac78),
    ("third", 0x7fd8a0),
    ("best", 0x1d3047),
];

const RULES: &str = "\
*{box-sizing:border-box}\
body{margin:0;background:var(--page);color:var(--text);font:16px/1.5 system-ui,sans-serif}\
main{max-width:1120px;margin:0 auto;padding:16px 12px 48px}\
h1{font-size:1.5rem;line-height:1.25;margin:8px 0;overflow-wrap:anywhere}\
h2{font-size:1.15rem;margin:36px 0 8px}\
h3{font-size:1rem;margin:0 0 4px}\
p{margin:6px 0;max-width:75ch}\
.quiet,figcaption{color:var(--quiet);font-size:.9rem}\
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:16px 0;padding:0}\
.facts div,figure,.box{background:var(--card);border:1px solid var(--edge);border-radius:8px}\
.facts div{padding:10px 12px}\
.facts dt{color:var(--quiet);font-size:.85rem}\
.facts dd{margin:0;font-size:1.2rem;font-weight:600;overflow-wrap:anywhere}\
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:12px}\
.three{grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr))}\
figure{margin:0;padding:12px}\
figure svg{display:block;width:100%;height:auto}\
svg text{font:15px system-ui,sans-serif;fill:var(--quiet)}\
svg text.title{font-weight:600;fill:var(--text)}\
.ground{fill:var(--card)}\
.interval{fill:none;stroke-width:1.4}\
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;padding:0;margin:8px 0;list-style:none}\
.legend li{display:flex;align-items:center;gap:6px}\
.key{width:36px;height:14px}\
.box{overflow:auto;max-height:70vh}\
.box:focus-visible{outline:2px solid var(--first)}\
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums;width:100%}\
th,td{padding:5px 8px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--edge)}\
thead th{position:sticky;top:0;background:var(--card);vertical-align:bottom;z-index:1}\
.l{text-align:left}\
td.say{white-space:normal;min-width:300px;text-align:left}\
tr.best td,tr.best th{background:var(--best);font-weight:600}\
dl.words dt{font-weight:600;margin-top:10px}\
dl.words dd{margin:0;max-width:75ch}\
.grid{stroke:var(--edge);stroke-width:1}\
.tick{stroke:var(--quiet);stroke-width:1}\
.line{fill:none;stroke-width:1.8}\
.line.fp4,.line.second{stroke-dasharray:7 4}\
.line.int4,.line.third{stroke-dasharray:2 3}\
.mark{stroke-width:1.8}\
.mark.hollow{fill:var(--card)}\
.hist{fill:var(--hist);shape-rendering:crispEdges}\
.even{stroke:var(--text);stroke-width:1.5;stroke-dasharray:6 4}\
.level{stroke-width:1.4}\
@media (max-width:500px){svg text{font-size:17px}}\
";

/// The style sheet.
pub(crate) fn sheet() -> String {
    let mut css = String::from(":root{color-scheme:light dark;");
    variables(&mut css, &LIGHT);
    css.push_str("}@media (prefers-color-scheme:dark){:root{");
    variables(&mut css, &DARK);
    css.push_str("}}");
    css.push_str(RULES);
    for (format, colour) in [("nf4", "first"), ("fp4", "second"), ("int4", "third")] {
        let _ = write!(
            css,
            ".line.{colour},.interval.{colour}{{stroke:var(--{colour})}}.dot.{colour}{{fill:var(--{colour})}}\
             .line.{format},.mark.{format},.level.{format}{{stroke:var(--{colour})}}\
             .mark.{format}:not(.hollow),.fill.{format}{{fill:var(--{colour})}}"
        );
    }
    css
}

fn variables(css: &mut String, palette: &Palette) {
    for (name, colour) in palette {
        let _ = write!(css, "--{name}:#{colour:06x};");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// WCAG 2.2, "relative luminance".
    fn luminance(colour: u32) -> f64 {
        let linear = |shift: u32| {
            let c = f64::from((colour >> shift) & 255) / 255.0;
            if c <= 0.04045 { c / 12.92 } else { ((c + 0.055) / 1.055).powf(2.4) }
        };
        0.2126 * linear(16) + 0.7152 * linear(8) + 0.0722 * linear(0)
    }

    fn contrast(a: u32, b: u32) -> f64 {
        let (a, b) = (luminance(a), luminance(b));
        (a.max(b) + 0.05) / (a.min(b) + 0.05)
    }

    #[test]
    fn black_on_white_has_the_largest_contrast_there_is() {
        assert!((contrast(0, 0xffffff) - 21.0).abs() < 1e-12);
    }

    #[test]
    fn text_stands_out_from_every_ground_and_marks_from_their_card() {
        for palette in [LIGHT, DARK] {
            let colour = |name: &str| palette.iter().find(|(known, _)| *known == name).unwrap().1;
            for (ink, grounds) in [("text", &["page", "card", "best"][..]), ("quiet", &["page", "card"])] {
                for ground in grounds {
                    assert!(contrast(colour(ink), colour(ground)) >= 4.5, "{ink} on {ground}");
                }
            }
            for ink in ["first", "second", "third"] {
                assert!(contrast(colour(ink), colour("card")) >= 4.5, "{ink}");
            }
            // A graphic needs 3 (success criterion 1.4.11).
            assert!(contrast(colour("hist"), colour("card")) >= 3.0);
        }
    }
}
