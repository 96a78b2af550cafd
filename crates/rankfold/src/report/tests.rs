use super::*;
use proptest::prelude::*;

/// A run's lines: held out before the first step and after the last.
fn lines(steps: u64, paged: bool) -> Lines {
    let mut text = String::from("{\"step\":0,\"eval_loss\":3.5,\"eval_tokens\":9}\n");
    for step in 1..=steps {
        let loss = 2.0 + 1.5 / step as f64;
        text += &format!("{{\"step\":{step},\"loss\":{loss},\"tokens\":512,\"tokens_per_second\":1024.0");
        text += &format!(",\"peak_rss\":{}", (90 << 20) + step * 4096);
        if paged {
            text += &format!(",\"paged_in\":{},\"paged_out\":{step},\"stall_seconds\":0.125", step << 20);
        }
        text += "}\n";
    }
    text += &format!("{{\"step\":{steps},\"eval_loss\":2.25,\"eval_tokens\":9}}\n");
    Lines::parse(&text, paged.then_some(100 << 20)).unwrap()
}

/// Each value of an attribute in the page.
fn values<'a>(page: &'a str, attribute: &str) -> Vec<&'a str> {
    page.split(&format!(" {attribute}=\"")).skip(1).map(|rest| rest.split('"').next().unwrap()).collect()
}

/// The points of every line drawn over the steps.
fn paths(page: &str) -> Vec<Vec<(f64, f64)>> {
    let point = |text: &str| {
        let (x, y) = text.split_once(' ').unwrap();
        (x.parse().unwrap(), y.parse().unwrap())
    };
    let drawn = values(page, "d").into_iter().filter(|path| *path != "M1 7L35 7");
    drawn.map(|path| path[1..].split('L').map(point).collect()).collect()
}

#[test]
fn a_run_of_adalora_shows_its_budget_and_its_map() {
    let line = |step: u64, q: u64| {
        let ranks = format!("{{\"model.layers.0.q_proj\":{q},\"model.layers.1.q_proj\":4}}");
        format!("{{\"step\":{step},\"loss\":2.0,\"budget\":{},\"ranks\":{ranks}}}\n", 9 - step)
    };
    let page = html("a", &Lines::parse(&(line(1, 4) + &line(2, 3)), None).unwrap());
    assert!(
        page.contains("<tr><th>0</th><td style=\"background:color-mix(in srgb,var(--first) 33%,var(--card))\">3</td>")
    );
    assert!(page.contains("var(--first) 45%,var(--card))\">4</td>"));
    let paths = paths(&page);
    assert_eq!(paths.len(), 3, "the loss, the budget, and what is kept");
    assert!(!html("a", &lines(3, false)).contains("Triplets"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The drawing is 480 × 320, its plot from 84 to 462 and from 14 to 266.
    #[test]
    fn every_line_goes_through_every_step_within_its_plot(steps in 1u64..400, paged: bool) {
        let page = html("runs/001", &lines(steps, paged));
        let paths = paths(&page);
        prop_assert_eq!(paths.len(), if paged { 6 } else { 3 });
        let (training, held_out) = (&paths[0], &paths[1]);
        prop_assert_eq!((training.len() as u64, held_out.len()), (steps, 2));
        for (x, y) in paths.iter().flatten() {
            prop_assert!((84.0..=462.0).contains(x) && (14.0..=266.0).contains(y), "{x}, {y}");
        }
        for path in &paths {
            prop_assert!(path.is_sorted_by(|a, b| a.0 <= b.0));
        }
        // From the first evaluation to the last, the whole width; a loss that falls, falls.
        prop_assert_eq!((held_out[0].0, held_out[1].0), (84.0, 462.0));
        prop_assert!(held_out[0].1 < held_out[1].1 && training.is_sorted_by(|a, b| a.1 <= b.1));
        // A quarter of each step was waited.
        let stall = paths.last().unwrap();
        prop_assert!(!paged || stall.iter().all(|(_, y)| *y == stall[0].1));
    }
}

#[test]
fn the_page_is_balanced_and_needs_nothing_else() {
    for paged in [false, true] {
        let page = html("<run> & \"co\"", &lines(7, paged));
        assert!(page.contains("&lt;run&gt; &amp; &quot;co&quot;"));
        for tag in ["svg", "figure", "dl", "ul", "text", "title", "desc", "circle", "main", "body"] {
            let opened = page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
            assert_eq!(opened, page.matches(&format!("</{tag}>")).count(), "{tag}");
        }
        for outside in ["http", "//", "url(", "@import", "<script", "NaN", ">inf"] {
            assert!(!page.contains(outside), "{outside}");
        }
        let mut ids = values(&page, "id");
        ids.sort_unstable();
        assert!(ids.windows(2).all(|pair| pair[0] != pair[1]), "{ids:?}");
        assert_eq!(page.contains("Waiting for pages"), paged);
    }
}

#[test]
fn a_panel_is_left_out_where_the_lines_do_not_have_it_and_a_long_run_is_thinned() {
    let none = html("runs/001", &Lines::parse("", None).unwrap());
    assert!(!none.contains("<figure>") && none.contains("<dd>0</dd>"));
    let long = lines(123_456, true);
    let page = html("runs/001", &long);
    assert!(page.len() < 200_000, "{} bytes", page.len());
    assert!(paths(&page).iter().all(|path| path.last().unwrap().0 == 462.0));
    assert!(Lines::parse("{\"step\":1}\n{\"loss\":1}", None).unwrap_err().contains("line 2"));
}
