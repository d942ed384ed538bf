//! Values per second that one core quantizes to each type, with and without an importance matrix, beside the memory's limit.
use std::time::Instant;

use ggml_kernels::quant::{self, Type};

fn main() {
    let (rows, row) = (64, 2560);
    let values: Vec<f32> =
        (0..rows * row).map(|i| ((i as f32 * 0.731).sin() + (i as f32 * 0.0137).cos()) * 0.02).collect();
    let weights: Vec<f32> = (0..row).map(|i| 1.0 + (i % 7) as f32).collect();
    println!("{:<8} {:>14} {:>14}  million values per second", "type", "plain", "with imatrix");
    for &ty in Type::ALL {
        let mut out = vec![0; rows * ty.row_bytes(row).expect("whole blocks")];
        let mut rate = |weights| {
            let start = Instant::now();
            let mut n = 0;
            while start.elapsed().as_millis() < 300 {
                quant::quantize(ty, &values, row, weights, &mut out);
                n += values.len();
            }
            n as f64 / start.elapsed().as_secs_f64() / 1e6
        };
        println!("{:<8} {:>14.1} {:>14.1}", ty.name(), rate(None), rate(Some(&weights)));
    }
}
