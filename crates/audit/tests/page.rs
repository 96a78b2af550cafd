//! The page is well formed, needs nothing but itself, and shows names as text.

mod common;

use common::{run, small};
use rankfold_audit::{BLOCKS, Report, html, table};
use rankfold_backend::Format;
use std::collections::BTreeSet;

fn report(formats: &[Format], blocks: &[usize]) -> Report {
    let folder = tempfile::tempdir().unwrap();
    let mut report = run(&small(folder.path()), formats, blocks, 2).unwrap();
    report.model = "<script>alert('x')</script>&\"".into();
    report
}

/// A tag's name, its attributes, and whether it closes itself.
type Tag = (String, Vec<(String, String)>, bool);

/// The tags of a page in order, each checked: attributes are quoted and none is given twice.
fn tags(page: &str) -> Vec<Tag> {
    let mut tags = Vec::new();
    let mut rest = page;
    while let Some(start) = rest.find('<') {
        let end = start + rest[start..].find('>').expect("a tag that ends");
        let tag = &rest[start + 1..end];
        assert!(!tag.contains('<'), "a tag within a tag: {tag}");
        rest = &rest[end + 1..];
        if tag.starts_with('!') {
            continue;
        }
        let is_closed = tag.ends_with('/');
        let tag = tag.trim_end_matches('/');
        let (name, mut text) = tag.split_once(' ').unwrap_or((tag, ""));
        let mut attributes: Vec<(String, String)> = Vec::new();
        while !text.trim().is_empty() {
            let (key, after) = text.trim_start().split_once("=\"").expect("a quoted attribute");
            let (value, after) = after.split_once('"').expect("a closing quote");
            assert!(attributes.iter().all(|(known, _)| known != key), "{tag}: {key} twice");
            attributes.push((key.into(), value.into()));
            text = after;
        }
        tags.push((name.to_owned(), attributes, is_closed));
    }
    tags
}

fn assert_page(page: &str) {
    assert!(page.starts_with("<!doctype html><html lang=\"en\">"));
    let mut open: Vec<String> = Vec::new();
    let mut ids = BTreeSet::new();
    for (name, attributes, is_closed) in tags(page) {
        if let Some(name) = name.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(name), "in {open:?}");
        } else if !is_closed && name != "meta" {
            open.push(name.clone());
        }
        assert!(!["script", "link", "img", "iframe", "object", "base", "form", "a", "use", "image"].contains(&&*name));
        for (key, value) in attributes {
            assert!(!key.starts_with("on") && !["src", "href", "srcset", "action"].contains(&&*key), "{key}");
            if key == "id" {
                assert!(ids.insert(value.clone()), "id {value} twice");
            }
            if key == "aria-labelledby" {
                assert_eq!(value.split(' ').count(), 2, "a title and a description");
            }
        }
    }
    assert!(open.is_empty(), "{open:?}");
    for label in page.split("aria-labelledby=\"").skip(1).flat_map(|rest| rest.split('"').next().unwrap().split(' ')) {
        assert!(ids.contains(label), "no id {label}");
    }
    for outside in ["http:", "https:", "//", "url(", "@import"] {
        assert!(!page.contains(outside), "'{outside}'");
    }
    assert!(!page.contains("NaN") && !page.contains(">inf"), "a number that is none");
}

#[test]
fn the_page_is_well_formed_and_self_contained() {
    assert_page(&html(&report(&Format::ALL, &BLOCKS)));
    for format in Format::ALL {
        assert_page(&html(&report(&[format], &[128])));
    }
}

#[test]
fn names_are_shown_as_text() {
    let page = html(&report(&Format::ALL, &[64]));
    assert!(page.contains("layers.0.&lt;up &amp; &quot;down&quot;&gt;.weight"));
    assert!(page.contains("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;&quot;"));
}

#[test]
fn every_plot_has_a_title_and_a_description() {
    let page = html(&report(&Format::ALL, &[64]));
    let plots = page.matches("role=\"img\"").count();
    // By layer, by bits, and for each format its values and its codes.
    assert_eq!((plots, page.matches("<desc ").count()), (2 + 3 + 3, 2 + 3 + 3));
}

#[test]
fn the_table_has_a_line_for_everything_and_marks_the_best_of_each_size() {
    let report = report(&Format::ALL, &BLOCKS);
    let text = table(&report);
    let rows: Vec<&str> = text.lines().filter(|line| line.contains("single") || line.contains("double")).collect();
    assert_eq!(rows.len(), 3 * 8 * 2);
    let best: Vec<&&str> = rows.iter().filter(|row| row.starts_with('*')).collect();
    assert!(best.len() >= 8 * 2, "one at least for each block and kind of scales");
    for figures in &report.totals.results {
        let rivals = report.totals.results.iter().filter(|r| (r.block, r.double) == (figures.block, figures.double));
        let is_best = rivals.into_iter().all(|rival| rival.mean_error >= figures.mean_error);
        let word = format!("{} {:>5} {}", figures.format, figures.block, figures.scales());
        let row =
            rows.iter().find(|row| row.split_whitespace().collect::<Vec<_>>().join(" ").contains(&squeeze(&word)));
        assert_eq!(row.unwrap().starts_with('*'), is_best, "{word}");
    }
    assert!(text.ends_with("every weight keeps the bound of its error\n"));
}

fn squeeze(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn a_broken_bound_is_told_in_words() {
    let mut report = report(&[Format::Nf4], &[64]);
    report.totals.results[0].certified = false;
    assert!(table(&report).contains("THE BOUND IS BROKEN in 1 lines"));
    assert!(html(&report).contains("BROKEN"));
}
