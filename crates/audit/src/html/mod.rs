//! The report as one page that needs nothing else: style and drawings are inline, there is no script.
//!
//! It opens with what was audited and the outcome, then plots, totals, tensors, worst weights, and the meaning of
//! every term. Tables scroll in boxes of their own, so that the page itself fits a phone.

mod tables;
mod words;

use crate::number::{count, short};
use crate::page::{Page, escape, fact, figure};
use crate::report::{Figures, Report, find};
use crate::svg;
use std::fmt::Write;

/// `audit.html`.
pub fn html(report: &Report) -> String {
    let mut page = Page::new(&format!("Quantisation audit of {}", report.model));
    audited(page.body(), report);
    page.finish()
}

fn audited(page: &mut String, report: &Report) {
    opening(page, report);
    plots(page, report);
    page.push_str(
        "<h2>All tensors together</h2><p class=\"quiet\">The lowest mean error at equal bits is marked with \
        a star.</p>",
    );
    tables::totals(page, report);
    page.push_str("<h2>By tensor</h2>");
    let block = report.shown_block;
    let _ =
        write!(page, "<p class=\"quiet\">Errors at block {block} with single scales; audit.json has all others.</p>");
    tables::tensors(page, report);
    page.push_str("<h2>Worst weights and their certificates</h2>");
    page.push_str(
        "<p class=\"quiet\">The weight with the largest error of all, and the bound that it cannot pass.</p>",
    );
    tables::worst(page, report);
    page.push_str("<h2>What the terms mean</h2><dl class=\"words\">");
    for (term, meaning) in words::WORDS {
        let _ = write!(page, "<dt>{}</dt><dd>{}</dd>", escape(term), escape(meaning));
    }
    page.push_str("</dl>");
    left_out(page, report);
}

/// What was audited, and the outcome.
fn opening(page: &mut String, report: &Report) {
    let totals = &report.totals;
    let _ = write!(
        page,
        "<p>What storing these weights in 4 bits would do to each of them: {}, quantised and dequantised by the \
         kernels of the {} backend and compared one by one.</p><dl class=\"facts\">",
        escape(&report.selection),
        escape(&report.backend)
    );
    let best = totals.results.iter().min_by(|a, b| a.mean_error.total_cmp(&b.mean_error));
    let usual = totals.results.iter().filter(|f| f.block == report.shown_block && f.double);
    let usual = usual.min_by(|a, b| a.mean_error.total_cmp(&b.mean_error));
    let outcome = if report.certified() { "every weight keeps it" } else { "BROKEN: see the tables" };
    let name = |figures: Option<&Figures>| {
        figures.map_or_else(String::new, |f| format!("{}, block {}, {}", f.format, f.block, f.scales()))
    };
    fact(page, "Weights", &count(totals.parameters));
    fact(page, "Tensors", &totals.tensors.to_string());
    fact(page, "Bound of the error", outcome);
    fact(page, "Lowest mean error", &name(best));
    fact(page, &format!("Best at block {}, double", report.shown_block), &name(usual));
    if let Some(figures) = usual {
        fact(page, "Its bits a parameter", &format!("{:.4}", figures.size.bits_per_parameter));
        fact(page, "Its mean error", &short(figures.mean_error));
        fact(page, "Its error, share of the weights", &format!("{:.2} %", 100.0 * figures.noise()));
    }
    page.push_str("</dl>");
    let shapes = totals.fits.iter().map(|(fit, n)| format!("{n} {}", fit.name())).collect::<Vec<_>>().join(", ");
    let _ = write!(
        page,
        "<p>The shape of the weights, tensor by tensor: {}. NF4 is made for normally distributed weights (QLoRA, \
         arXiv:2305.14314, section 3 and appendix F); how well it fits also depends on the block (arXiv:2306.06965).\
         </p>",
        escape(&shapes)
    );
}

fn plots(page: &mut String, report: &Report) {
    let block = report.shown_block;
    page.push_str("<h2>Errors</h2><ul class=\"legend\">");
    for format in report.formats() {
        let _ = write!(page, "<li>{}{format}</li>", svg::key(format));
    }
    page.push_str("</ul><div class=\"plots\">");
    let caption = format!(
        "Each tensor's error as a share of its weights (root mean squares), at block {block} with single scales. \
         Lower is better."
    );
    figure(page, "By layer", &svg::layers::plot(report), &caption);
    let caption = "Filled marks: single scales; hollow: double. Each line runs through the block sizes, the smallest \
                   at the right. The axis counts what is beyond 4 bits by doublings. Lower and further left is better.";
    figure(page, "Against bits a parameter", &svg::bits::plot(report), caption);
    page.push_str("</div>");

    let _ = write!(
        page,
        "<h2>Weights and the values of each format</h2><p class=\"quiet\">All weights, each divided by \
        the largest magnitude in its block of {block}, in grey; a line at each value that the format has. The bars at \
        the two ends are those largest weights themselves.</p><div class=\"plots three\">"
    );
    for format in report.formats() {
        figure(page, &format.to_string(), &svg::levels::plot(report, format), "");
    }
    let _ = write!(
        page,
        "</div><h2>Codes in use</h2><p class=\"quiet\">How many weights have each code at block {block}. \
        The dashed line is all codes used alike: the nearer the bars, the more the four bits tell.</p>\
        <div class=\"plots three\">"
    );
    for format in report.formats() {
        if let Some(figures) = find(&report.totals.results, format, block, false) {
            let caption = format!("Entropy {:.3} bits of 4.", figures.code_entropy);
            figure(page, &format.to_string(), &svg::codes::plot(figures), &caption);
        }
    }
    page.push_str("</div>");
}

fn left_out(page: &mut String, report: &Report) {
    if report.left_out.is_empty() {
        return;
    }
    let names = report.left_out.iter().map(|name| format!("<code>{}</code>", escape(name))).collect::<Vec<_>>();
    let _ = write!(page, "<h2>Matrices left out</h2><p style=\"overflow-wrap:anywhere\">{}</p>", names.join(", "));
}
