//! The committed seeds of a target as tests, for the crate that the target is about.

/// A module of tests, one a seed of the target, by its name: the target's law on its bytes.
macro_rules! seeds {
    ($module:ident: $target:ident of $($seed:ident)*) => {
        mod $module {
            $(#[test]
            fn $seed() {
                super::$target::check(include_bytes!(concat!(
                    env!("CARGO_MANIFEST_DIR"), "/../../fuzz/seeds/", stringify!($target), "/", stringify!($seed)
                )));
            })*

            #[test]
            fn no_seed_is_left_out() {
                let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/seeds/", stringify!($target));
                let names = std::fs::read_dir(folder).unwrap().map(|seed| seed.unwrap().file_name().into_string());
                let mut names: Vec<String> = names.map(Result::unwrap).collect();
                names.sort();
                assert_eq!(names, [$(stringify!($seed)),*]);
            }
        }
    };
}
