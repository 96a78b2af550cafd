//! A page that needs nothing else: style and drawings are inline, there is no script. For reports of any kind.
//!
//! Its drawings are [`crate::svg`]'s, whose classes the style sheet knows. They may also be files of their own
//! ([`drawings`]).

mod style;

use crate::svg;
use std::fmt::Write;

/// A page in the making.
#[derive(Debug)]
pub struct Page(String);

impl Page {
    /// A page with its title, as text, as its first heading.
    pub fn new(title: &str) -> Self {
        let (title, sheet) = (escape(title), style::sheet());
        Self(format!(
            "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
             <title>{title}</title><style>{sheet}</style></head><body><main><h1>{title}</h1>"
        ))
    }

    /// What has been written of its body, to go on with.
    pub fn body(&mut self) -> &mut String {
        &mut self.0
    }

    /// The whole page.
    pub fn finish(self) -> String {
        self.0 + "</main></body></html>\n"
    }
}

/// A fact of a list of facts (`<dl class="facts">`): its name and its value, as text.
pub fn fact(page: &mut String, name: &str, value: &str) {
    let _ = write!(page, "<div><dt>{}</dt><dd>{}</dd></div>", escape(name), escape(value));
}

/// A drawing with its heading and, where there is one, its caption, as text.
pub fn figure(page: &mut String, title: &str, svg: &str, caption: &str) {
    let _ = write!(page, "<figure><h3>{}</h3>{svg}", escape(title));
    if !caption.is_empty() {
        let _ = write!(page, "<figcaption>{}</figcaption>", escape(caption));
    }
    page.push_str("</figure>");
}

/// A drawing of a file of its own.
#[derive(Debug)]
pub struct Drawing {
    /// What stands above it, as text.
    pub title: String,
    /// Classes of its lines, each with what it is, as text.
    pub legend: Vec<(&'static str, String)>,
    /// What [`svg::Frame::finish`] gave.
    pub svg: String,
}

/// Drawings one below the other, as an SVG file.
pub fn drawings(drawings: &[Drawing]) -> String {
    let (width, height) = (svg::WIDTH, svg::HEIGHT);
    let (mut body, mut top) = (String::new(), 0.0);
    for Drawing { title, legend, svg } in drawings {
        let (middle, base, title) = (width / 2.0, top + 24.0, escape(title));
        let _ = write!(body, "<text class=\"title\" x=\"{middle}\" y=\"{base}\" text-anchor=\"middle\">{title}</text>");
        top += 34.0;
        for (class, name) in legend {
            let (key, base, name) = (svg::line_key(class), top + 12.0, escape(name));
            let _ = write!(
                body,
                "<svg x=\"84\" y=\"{top}\" width=\"36\" height=\"14\">{key}</svg>\
                 <text x=\"128\" y=\"{base}\">{name}</text>"
            );
            top += 19.0;
        }
        let _ = write!(body, "<svg x=\"0\" y=\"{top}\" width=\"{width}\" height=\"{height}\">{svg}</svg>");
        top += height + 12.0;
    }
    // Wider than what the style sheet takes for a phone.
    let (sheet, wide, high) = (style::sheet(), 1.25 * width, 1.25 * top);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {top}\" width=\"{wide}\" height=\"{high}\">\
         <style>{sheet}</style><rect class=\"ground\" width=\"100%\" height=\"100%\"/>{body}</svg>\n"
    )
}

/// Text as HTML shows it, within elements and within quoted attributes.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            _ => escaped.push(c),
        }
    }
    escaped
}
