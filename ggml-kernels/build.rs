//! Compiles the C kernels (each file for its own instruction set) and generates bindings to the op contracts in include/.
use std::{
    env, fs,
    path::{Path, PathBuf},
};

#[path = "build/cuda.rs"]
mod cuda;
#[path = "build/emulator.rs"]
mod emulator;

fn main() {
    println!("cargo:rerun-if-changed=include");
    println!("cargo:rerun-if-changed=cpu");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    headers(&out);
    kernels(amx());
    cuda::build(&out);
    if env::var_os("CARGO_FEATURE_CUDA_EMULATOR").is_some() {
        emulator::build(&out);
    }
}

fn headers(out: &Path) {
    let mut names: Vec<String> = fs::read_dir("include")
        .expect("include/")
        .map(|e| e.expect("include/ entry").file_name().into_string().expect("header name"))
        .filter(|n| n.ends_with(".h"))
        .collect();
    names.sort();
    let all: String = names.iter().map(|n| format!("#include \"{n}\"\n")).collect();
    bindgen::Builder::default()
        .header_contents("all.h", &all)
        .clang_arg("-Iinclude")
        .allowlist_item("(clsa|CLSA)_.*")
        .prepend_enum_name(false)
        .derive_default(true)
        .generate()
        .expect("bindgen over include/*.h")
        .write_to_file(out.join("contracts.rs"))
        .expect("write contracts.rs");
}

/// Whether the compiler found is one whose AMX code can be used; warns where not (tools/cc then leaves AMX out of ggml too).
fn amx() -> bool {
    println!("cargo:rustc-check-cfg=cfg(clsa_amx)");
    if env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|arch| arch != "x86_64") {
        return false;
    }
    let tool = cc::Build::new().get_compiler();
    let version = tool.to_command().arg("-dumpversion").output().ok();
    let version = version.map_or_else(String::new, |o| String::from_utf8_lossy(&o.stdout).trim().to_owned());
    let major: u32 = version.split('.').next().and_then(|v| v.parse().ok()).unwrap_or(0);
    if !tool.is_like_clang() || major < 16 {
        println!(
            "cargo:warning=built without AMX: found {} {version}, AMX needs clang 16 or newer (on Debian or Ubuntu `make` \
             installs it)",
            if tool.is_like_clang() { "clang" } else { "GCC" },
        );
        return false;
    }
    println!("cargo:rustc-cfg=clsa_amx");
    true
}

/// Flags of a kernel file, by the ending of its name: `<op>_<isa>.c`. Which one runs is chosen at run time (src/simd.rs).
const ISA_FLAGS: &[(&str, &[&str])] = &[
    ("avx2", &["-march=x86-64-v3"]),
    (
        "avx512vnni",
        &["-march=x86-64-v4", "-mavx512vnni", "-mavx512vbmi", "-mavx512vbmi2", "-mprefer-vector-width=512"],
    ),
    ("avx512", &["-march=x86-64-v4", "-mprefer-vector-width=512"]),
    (
        "amx",
        &[
            "-march=x86-64-v4",
            "-mavx512vnni",
            "-mavx512vbmi",
            "-mavx512vbmi2",
            "-mavx512bf16",
            "-mamx-tile",
            "-mamx-bf16",
            "-mamx-int8",
            "-mprefer-vector-width=512",
        ],
    ),
    // Plain C for any machine: references, sizes.
    ("", &[]),
];

fn kernels(amx: bool) {
    let x86 = env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|a| a == "x86_64");
    let mut files: Vec<PathBuf> = fs::read_dir("cpu")
        .expect("cpu/")
        .map(|e| e.expect("cpu/ entry").path())
        .filter(|p| p.extension().is_some_and(|e| e == "c"))
        .collect();
    files.sort();
    let isa_of = |file: &Path| {
        let stem = file.file_stem().and_then(|s| s.to_str()).expect("kernel name");
        ISA_FLAGS.iter().find(|(isa, _)| isa.is_empty() || stem.ends_with(&format!("_{isa}"))).expect("isa")
    };
    for (isa, flags) in ISA_FLAGS {
        let mine: Vec<&PathBuf> = files.iter().filter(|f| isa_of(f).0 == *isa).collect();
        if mine.is_empty() || (!x86 && !isa.is_empty()) || (*isa == "amx" && !amx) {
            continue;
        }
        let mut build = cc::Build::new();
        // Results must not depend on the profile, nor on whether a compiler fuses a * b + c.
        build.opt_level(3).std("c11").include("include").include("cpu").flag("-ffp-contract=off");
        build
            .flag("-fno-math-errno")
            .warnings(true)
            .extra_warnings(true)
            .flag_if_supported("-Wno-unused-function");
        for flag in *flags {
            build.flag(flag);
        }
        if *isa == "amx" && env::var_os("CARGO_FEATURE_AMX_EMULATOR").is_some() {
            build.define("CLSA_AMX_EMULATED", None);
        }
        build.files(mine).compile(&format!("clsa_{}", if isa.is_empty() { "generic" } else { isa }));
    }
}
