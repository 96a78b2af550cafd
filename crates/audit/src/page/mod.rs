//! A page that needs nothing else: style and drawings are inline, there is no script. For reports of any kind.
//!
//! Its drawings are [`crate::svg`]'s, whose classes the style sheet knows.

mod style;

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
