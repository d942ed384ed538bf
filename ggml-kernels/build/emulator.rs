//! Compiles the CUDA files that are written against cuda/primitives.cuh as plain C++, for the tests that run them without a GPU.
use std::fmt::Write as _;
use std::{fs, path::Path};

/// These files, each in a namespace of its own in one translation unit.
const FILES: &[&str] = &["attention", "gather_attention", "rope_append", "route", "sample"];

pub fn build(out: &Path) {
    println!("cargo:rerun-if-changed=tests/emulator");
    let here = std::env::current_dir().expect("current directory").display().to_string();
    let mut all = String::from("#define CLSA_EMULATE 1\n");
    for header in [
        "include/clsa.h",
        "tests/emulator/emulator.cpp",
        "cuda/cache_rows.cuh",
        "cuda/rope_append.cuh",
        "cuda/decode_attention.cuh",
        "cuda/prefill_attention.cuh",
        "cuda/select.cuh",
    ] {
        writeln!(all, "#include \"{here}/{header}\"").unwrap();
    }
    // Outside the namespaces: what the files share.
    for header in ["rope_append.h", "route_cuda.h", "sample_cuda.h"] {
        writeln!(all, "#include \"{here}/include/{header}\"").unwrap();
    }
    all.push_str("#include <float.h>\n");
    for file in FILES {
        writeln!(all, "namespace emulated_{file} {{\n#include \"{here}/cuda/{file}.cu\"\n}}").unwrap();
    }
    let unit = out.join("emulated.cpp");
    fs::write(&unit, all).expect("write emulated.cpp");
    cc::Build::new()
        .cpp(true)
        .opt_level(2)
        .std("c++17")
        .includes(["include", "cuda", "tests/emulator"])
        .flag("-ffp-contract=off")
        .flag("-Wno-unknown-pragmas")
        .flag("-Wno-unused-function")
        .flag("-fno-strict-aliasing")
        .file(unit)
        .compile("clsa_emulated");
}
