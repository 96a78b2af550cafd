//! Compiles `kernels/*.cu` for the host, plain and watched, and writes the table of kernels.
//!
//! A kernel is registered by being there: its entry points are found by `__global__ … NAME(`. Each file becomes two
//! translation units, the second compiled with the compiler's thread sanitiser, whose hooks are this crate's checker.
//! Both go into one binary: what a unit defines lies in an unnamed namespace, but for its entry points, which the
//! second has under other names. Where no C++20 compiler is found the crate builds all the same, without its host
//! driver.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{env, fs};

/// A `.cu` file and its entry points.
struct Source {
    stem: String,
    path: PathBuf,
    kernels: Vec<String>,
}

fn main() {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets it"));
    let (kernels, host) = (root.join("../../kernels"), root.join("host"));
    println!("cargo:rerun-if-changed={}", kernels.display());
    println!("cargo:rerun-if-changed={}", host.display());
    println!("cargo:rustc-check-cfg=cfg(host_kernels)");

    let mut sources = sources(&kernels);
    let own = sources.len();
    // Kernels that are wrong on purpose, for this crate's own tests.
    let faults = root.join("tests/faults");
    println!("cargo:rerun-if-changed={}", faults.display());
    if env::var_os("CARGO_FEATURE_FAULTS").is_some() {
        sources.extend(self::sources(&faults));
    }
    let compiled = compile(&sources, &kernels, &host, &out);
    if compiled {
        println!("cargo:rustc-cfg=host_kernels");
    }
    fs::write(out.join("kernels.rs"), table(&sources, own, &kernels, compiled)).expect("OUT_DIR can be written");
}

/// The files of `kernels/` in order, with what they define.
fn sources(kernels: &Path) -> Vec<Source> {
    let mut paths: Vec<PathBuf> = files(kernels, "cu");
    paths.sort();
    let source = |path: PathBuf| {
        let text = fs::read_to_string(&path).expect("a kernel file can be read");
        let stem = path.file_stem().expect("it ends in .cu").to_string_lossy().into_owned();
        Source { stem, path, kernels: entry_points(&text) }
    };
    paths.into_iter().map(source).collect()
}

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("the folder is part of the project");
    let paths = entries.map(|entry| entry.expect("the folder can be read").path());
    paths.filter(|path| path.extension().is_some_and(|found| found == extension)).collect()
}

/// The names in `__global__ void NAME(`, launch bounds between them or not.
fn entry_points(text: &str) -> Vec<String> {
    let code: Vec<&str> = text.lines().map(|line| line.split("//").next().unwrap_or(line)).collect();
    let code = code.join("\n");
    let name = |part: &str| {
        let mut after = part.split_once("void")?.1.trim_start();
        if after.starts_with("__launch_bounds__") {
            after = after.split_once(')')?.1.trim_start();
        }
        let end = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_')?;
        Some(after[..end].to_owned())
    };
    code.split("__global__").skip(1).filter_map(name).collect()
}

/// Whether the host's compiler made both flavours.
fn compile(sources: &[Source], kernels: &Path, host: &Path, out: &Path) -> bool {
    let mut plain = compiler(kernels, host);
    if plain.try_get_compiler().is_err()
        || !["-std=c++20", "-fsanitize=thread"].iter().all(|flag| plain.is_flag_supported(flag).unwrap_or(false))
    {
        println!(
            "cargo:warning=no C++20 compiler with a thread sanitiser was found: built without the host driver of the CUDA kernels"
        );
        return false;
    }
    let mut watched = compiler(kernels, host);
    watched.flag("-fsanitize=thread");
    for flag in ["--param=tsan-instrument-func-entry-exit=0", "-Wno-tsan"] {
        watched.flag_if_supported(flag);
    }
    for source in sources {
        for (flavour, build) in [("plain", &mut plain), ("watched", &mut watched)] {
            let unit = out.join(format!("{}_{flavour}.cpp", source.stem));
            fs::write(&unit, translation_unit(source, flavour)).expect("OUT_DIR can be written");
            build.file(unit);
        }
    }
    plain.file(host.join("runtime.cpp"));
    plain.compile("rankfold_kernels_plain");
    watched.compile("rankfold_kernels_watched");
    true
}

fn compiler(kernels: &Path, host: &Path) -> cc::Build {
    let mut build = cc::Build::new();
    build.cpp(true).opt_level(2).debug(true).include(kernels).include(host).warnings(true).extra_warnings(true);
    for flag in [
        "-std=c++20",
        "-ffp-contract=off",
        "-fno-strict-aliasing",
        "-fno-exceptions",
        "-fno-rtti",
        "-fno-threadsafe-statics",
        "-Wno-unused-parameter",
        "-Wno-unknown-pragmas",
    ] {
        build.flag(flag);
    }
    // Without fused multiply-add in the instruction set `fmaf` is a library call.
    #[cfg(target_arch = "x86_64")]
    if env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|target| target == "x86_64")
        && std::arch::is_x86_feature_detected!("fma")
        && std::arch::is_x86_feature_detected!("avx2")
    {
        build.flag("-mavx2").flag("-mfma");
        println!("cargo:rustc-cfg=host_kernels_use_avx2");
    }
    println!("cargo:rustc-check-cfg=cfg(host_kernels_use_avx2)");
    build
}

fn translation_unit(source: &Source, flavour: &str) -> String {
    let mut unit = String::from("#include <utility>\n#include \"shim.h\"\n");
    for kernel in &source.kernels {
        writeln!(unit, "#define {kernel} {kernel}_{flavour}").expect("a string takes all");
    }
    writeln!(unit, "namespace {{\n#include \"{}\"\n}}\n#include \"thunk.h\"", source.path.display()).expect("as above");
    writeln!(unit, "extern \"C\" const RfKernel rf_{flavour}_{}[] = {{", source.stem).expect("as above");
    for kernel in &source.kernels {
        writeln!(unit, "    RF_KERNEL({kernel}),").expect("as above");
    }
    unit + "};\n"
}

/// Rust's side: the sources for NVRTC, the kernels by file, and where compiled, the tables.
///
/// The first `own` are those of `kernels/`; the rest are known on the host alone.
fn table(sources: &[Source], own: usize, kernels: &Path, compiled: bool) -> String {
    let mut rust =
        String::from("/// Every header of `kernels/`: name and text.\npub const HEADERS: &[(&str, &str)] = &[\n");
    let mut headers = files(kernels, "cuh");
    headers.sort();
    for header in headers {
        let name = header.file_name().expect("a file").to_string_lossy();
        writeln!(rust, "    ({name:?}, include_str!({:?})),", header.display().to_string())
            .expect("a string takes all");
    }
    rust += "];\n/// Every source of `kernels/`.\npub const SOURCES: &[Source] = &[\n";
    for Source { stem, path, kernels } in &sources[..own] {
        let text = path.display().to_string();
        writeln!(rust, "    Source {{ file: {stem:?}, text: include_str!({text:?}), kernels: &{kernels:?} }},")
            .expect("as above");
    }
    rust += "];\n";
    if compiled {
        rust += "#[cfg(host_kernels)]\nmod entries {\n    use super::Entry;\n    unsafe extern \"C\" {\n";
        for Source { stem, kernels, .. } in sources {
            for flavour in ["plain", "watched"] {
                writeln!(rust, "        pub static rf_{flavour}_{stem}: [Entry; {}];", kernels.len())
                    .expect("as above");
            }
        }
        rust += "    }\n}\n";
        for flavour in ["plain", "watched"] {
            writeln!(rust, "/// The {flavour} entry points of every source.\n#[cfg(host_kernels)]").expect("as above");
            writeln!(rust, "pub fn {flavour}() -> Vec<&'static Entry> {{\n    let mut all = Vec::new();")
                .expect("as above");
            for Source { stem, .. } in sources {
                writeln!(rust, "    // SAFETY: a constant table of the generated unit, of this length.")
                    .expect("as above");
                writeln!(rust, "    all.extend(unsafe {{ &entries::rf_{flavour}_{stem} }});").expect("as above");
            }
            rust += "    all\n}\n";
        }
    }
    rust
}
