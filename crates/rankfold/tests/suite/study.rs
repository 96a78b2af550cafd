//! `rankfold study` as a user meets it, each study small.

use crate::common::{Place, refuse, succeed};
use serde_json::Value;

const STUDIES: [&str; 5] =
    ["lora-vs-full", "where-to-adapt", "adalora-finds-ranks", "four-bit-formats", "paging-changes-nothing"];

/// Run a study; what it said, what it wrote for programs, and its drawing.
fn study(place: &Place, name: &str, folder: &str, threads: &str) -> (String, Value, String) {
    let said = succeed(&["study", name, "--quick", "--threads", threads, "--out", &place.text(folder)]);
    let read = |end: &str| std::fs::read_to_string(place.path(folder).join(format!("{name}.{end}"))).unwrap();
    (said, serde_json::from_str(&read("json")).unwrap(), read("svg"))
}

/// The names of a drawing's elements, each of which must be closed where XML says, with text escaped.
fn elements(svg: &str) -> Vec<&str> {
    let (mut open, mut all) = (Vec::new(), Vec::new());
    for part in svg.trim().split('<').skip(1) {
        let (tag, text) = part.split_once('>').expect("a tag's end");
        assert!(!text.contains('>'), "{text}");
        assert!(text.split('&').skip(1).all(|entity| entity.contains(';')), "{text}");
        match tag.strip_prefix('/') {
            Some(name) => assert_eq!(open.pop(), Some(name), "{part}"),
            None => {
                let name = tag.split([' ', '/']).next().unwrap();
                assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
                all.push(name);
                if !tag.ends_with('/') {
                    open.push(name);
                }
            }
        }
    }
    assert!(open.is_empty(), "{open:?}");
    all
}

#[test]
fn every_study_gives_a_table_figures_and_a_drawing_alike_on_any_number_of_threads() {
    let place = Place::new();
    for name in STUDIES {
        let (said, json, svg) = study(&place, name, &format!("{name}-1"), "1");
        let (again, mut other, drawn) = study(&place, name, &format!("{name}-2"), "2");
        // What is measured stands between its own line and the conclusion, which is the last but one.
        let table = |said: &str| said.split("\nmeasured on this machine").next().unwrap().to_owned();
        let conclusion = |said: &str| said.lines().rev().nth(1).unwrap().to_owned();
        if json["measured"] == Value::Array(Vec::new()) {
            assert_eq!((table(&said).lines().count() > 5, svg), (true, drawn.clone()), "{said}");
            let kept =
                |said: &str| said.rsplit_once('\n').unwrap().0.rsplit_once('\n').map(|(kept, _)| kept.to_owned());
            assert_eq!(kept(&said), kept(&again), "{name}");
        } else {
            assert_eq!(table(&said), table(&again), "{name}");
            other["measured"] = json["measured"].clone();
        }
        assert_eq!(json, other, "{name}");
        assert_eq!(conclusion(&said), json["conclusion"], "{name}");
        assert!(said.lines().last().unwrap().starts_with(&format!("{name}.json and {name}.svg in ")), "{said}");
        assert!(!said.contains("NaN") && !said.contains("inf"), "{said}");
        let verdict = json["verdict"].as_str().unwrap();
        assert!(["reproduces", "does-not-reproduce", "undecided"].contains(&verdict), "{verdict}");
        assert_eq!((&json["study"], &json["setting"]["seeds"]), (&name.into(), &2.into()));
        assert!(json["claim"].is_string() && json["results"].is_object());
        // What holds of any run holds of a small one.
        assert!(name != "paging-changes-nothing" || verdict == "reproduces", "{said}");

        let elements = elements(&drawn);
        let count = |of: &str| elements.iter().filter(|name| **name == of).count();
        assert!(count("circle") >= 3 && count("text") >= 8 && count("style") == 1, "{name}: {elements:?}");
        for class in ["title", "axis", "interval first"] {
            assert!(drawn.contains(&format!("class=\"{class}\"")), "{name}: {class}");
        }
    }
}

#[test]
fn what_is_no_study_is_refused_and_a_taken_folder_too() {
    let place = Place::new();
    refuse(&["study", "lora-vs-fool"], &["lora-vs-fool", "lora-vs-full"]);
    refuse(&["study", "lora-vs-full", "--seeds", "0"], &["--seeds 0"]);
    place.base();
    refuse(&["study", "lora-vs-full", "--out", &place.text("base")], &["base", "expected a new or empty folder"]);
}
