//! Compiles each `cuda/*.cu` into one fat binary that the library embeds.
//!
//! The compiler comes from `CUDA_HOME`, from `PATH`, or from the toolkit that `make cuda-toolkit` installs into `.venv-cuda`.
//! Without one the library is built with no GPU code and keeps the reason, so that `--device cuda` can say what is missing.
//!
//! `CLSA_CUDA_ARCHS` restricts the targets while developing: a list such as `90a` or `80 86 89 90a ptx90`.
//! `CLSA_CUDA_LINEINFO=1` adds the lines of the sources, for profilers (ten times as large). `CLSA_CUDA=off` leaves the GPU code out.
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, thread};

/// Machine code for Ampere, Ada and Hopper, and PTX that the driver compiles for anything later.
const ARCHS: &str = "80 86 89 90a ptx90";

pub fn build(out: &Path) {
    for path in ["cuda", "build", "include"] {
        println!("cargo:rerun-if-changed={path}");
    }
    for name in ["CUDA_HOME", "CLSA_CUDA_ARCHS", "CLSA_CUDA_LINEINFO", "CLSA_CUDA"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let built = nvcc().and_then(|nvcc| compile_all(&nvcc, out));
    let mut code = String::new();
    let (fatbins, missing) = match &built {
        Ok(fatbins) => (fatbins.as_slice(), String::new()),
        Err(reason) => {
            println!("cargo:warning=built without GPU kernels: {reason}");
            (&[][..], reason.clone())
        }
    };
    writeln!(code, "/// Why this build holds no GPU kernels; empty when it does.").unwrap();
    writeln!(code, "pub const MISSING: &str = {missing:?};").unwrap();
    writeln!(code, "/// Name of each CUDA file and its fat binary.").unwrap();
    writeln!(code, "pub static FATBINS: &[(&str, &[u8])] = &[").unwrap();
    for (name, path) in fatbins {
        writeln!(code, "    ({name:?}, include_bytes!({path:?})),").unwrap();
    }
    writeln!(code, "];").unwrap();
    fs::write(out.join("fatbins.rs"), code).expect("write fatbins.rs");
}

fn nvcc() -> Result<PathBuf, String> {
    if env::var("CLSA_CUDA").is_ok_and(|v| v == "off") {
        return Err("CLSA_CUDA=off was set when it was built".into());
    }
    let mut homes: Vec<PathBuf> = env::var_os("CUDA_HOME").map(PathBuf::from).into_iter().collect();
    let paths = env::var_os("PATH").unwrap_or_default();
    homes.extend(env::split_paths(&paths).filter_map(|p| Some(p.parent()?.to_owned())));
    if let Ok(pythons) = fs::read_dir("../.venv-cuda/lib") {
        homes.extend(pythons.flatten().map(|e| e.path().join("site-packages/nvidia/cu13")));
    }
    homes.iter().map(|h| h.join("bin/nvcc")).find(|p| p.is_file()).ok_or_else(|| {
        "no nvcc was found when it was built: install the CUDA toolkit or run `make cuda-toolkit`, then build again".into()
    })
}

fn compile_all(nvcc: &Path, out: &Path) -> Result<Vec<(String, String)>, String> {
    let options = &options();
    let sources = sorted("cuda", "cu");
    let jobs: Vec<(PathBuf, PathBuf)> = sources
        .iter()
        .map(|s| (s.clone(), out.join(s.file_name().expect("file name")).with_extension("fatbin")))
        .collect();
    let stale: Vec<&(PathBuf, PathBuf)> = jobs
        .iter()
        .filter(|(source, fatbin)| {
            modified(fatbin) < newest(source, &mut vec![])
                || fs::read_to_string(fatbin.with_extension("options")).ok() != Some(options.join(" "))
        })
        .collect();
    let workers = thread::available_parallelism().map_or(1, |n| n.get()).min(stale.len().max(1));
    thread::scope(|scope| {
        let handles: Vec<_> = (0..workers)
            .map(|w| {
                let mine = stale.iter().skip(w).step_by(workers);
                scope.spawn(move || {
                    mine.map(|(s, f)| compile(nvcc, options, s, f)).collect::<Result<Vec<()>, String>>()
                })
            })
            .collect();
        handles.into_iter().try_for_each(|h| h.join().expect("compile thread").map(drop))
    })?;
    Ok(jobs
        .iter()
        .map(|(s, f)| (s.file_stem().expect("stem").to_string_lossy().into_owned(), f.display().to_string()))
        .collect())
}

/// What nvcc is called with, besides the files.
fn options() -> Vec<String> {
    let archs = env::var("CLSA_CUDA_ARCHS").unwrap_or_else(|_| ARCHS.into());
    let lines = env::var("CLSA_CUDA_LINEINFO").is_ok_and(|v| v == "1").then_some("-lineinfo");
    let fixed = ["-fatbin", "-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Iinclude", "-Icuda"];
    let targets = archs.split_whitespace().map(|arch| match arch.strip_prefix("ptx") {
        Some(ptx) => format!("-gencode=arch=compute_{ptx},code=compute_{ptx}"),
        None => format!("-gencode=arch=compute_{arch},code=sm_{arch}"),
    });
    let compressed = ["-Xfatbin", "-compress-all"];
    fixed.into_iter().chain(lines).chain(compressed).map(String::from).chain(targets).collect()
}

fn compile(nvcc: &Path, options: &[String], source: &Path, fatbin: &Path) -> Result<(), String> {
    let run = Command::new(nvcc).args(options).arg("-o").arg(fatbin).arg(source).output();
    let run = run.map_err(|e| format!("{}: {e}", nvcc.display()))?;
    if !run.status.success() {
        // A broken kernel must not pass for a missing toolkit.
        panic!("nvcc failed on {}:\n{}", source.display(), String::from_utf8_lossy(&run.stderr));
    }
    fs::write(fatbin.with_extension("options"), options.join(" ")).map_err(|e| e.to_string())
}

fn sorted(dir: &str, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> =
        entries.map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == extension)).collect();
    paths.sort();
    paths
}

/// When `source`, or any of our headers that it includes, was last changed.
fn newest(source: &Path, seen: &mut Vec<PathBuf>) -> std::time::SystemTime {
    let mut time = modified(source);
    let text = fs::read_to_string(source).unwrap_or_default();
    for name in text.lines().filter_map(|l| l.strip_prefix("#include \"")?.split('"').next()) {
        let header =
            ["cuda", "include"].map(|dir| Path::new(dir).join(name)).into_iter().find(|p| p.is_file());
        if let Some(header) = header.filter(|h| !seen.contains(h)) {
            seen.push(header.clone());
            time = time.max(newest(&header, seen));
        }
    }
    time
}

fn modified(path: &Path) -> std::time::SystemTime {
    fs::metadata(path).and_then(|m| m.modified()).unwrap_or(std::time::SystemTime::UNIX_EPOCH)
}
