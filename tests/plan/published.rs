//! Plans of Megatron-LM's runs, compared with published memory and times.
//!
//! The rows of vTrain are its file `ground_truth_multi.csv` (MIT, tests/data/vtrain/LICENSE).

use shardwise::plan::{
    Machine, TypeRates,
    megatron::{Family, Model, Recompute, Run},
};
use std::fs;

const GIB: f64 = (1u64 << 30) as f64;

/// A run whose step was measured.
struct Row {
    name: String,
    model: Model,
    run: Run,
    seconds: f64,
}

impl Row {
    /// The relative error of the predicted seconds.
    fn error(&self, machine: &Machine) -> f64 {
        self.run.step(&self.model, machine).unwrap().seconds / self.seconds - 1.0
    }

    /// Prints the row and returns its absolute error.
    fn print(&self, machine: &Machine) -> f64 {
        let error = self.error(machine);
        let Run { tensor: t, pipeline: p, data: d, sequences: b, .. } = self.run;
        println!("{:>8} t{t} p{p} d{d} b{b}: {:.3} s, {:+.1} %", self.name, self.seconds, 100.0 * error);
        error.abs()
    }
}

/// The mean absolute error of the predicted seconds.
fn mean_error(rows: &[&Row], machine: &Machine) -> f64 {
    rows.iter().map(|row| row.error(machine).abs()).sum::<f64>() / rows.len() as f64
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn largest(values: &[f64]) -> f64 {
    // In the total order NaN is the largest.
    values.iter().copied().max_by(f64::total_cmp).unwrap()
}

fn a100() -> Machine {
    Machine::preset("a100-80g").unwrap()
}

/// Megatron-LM's own test of `theoretical_memory_usage.py`. Context-parallel ranks share the
/// optimizer's state like data-parallel ranks.
#[test]
fn weights_of_llama_3_1_8b_are_those_of_megatron() {
    let model = Model {
        family: Family::Llama,
        hidden: 4096,
        heads: 32,
        kv_heads: 8,
        ffn: 14336,
        layers: 32,
        vocabulary: 128_256,
        sequence: 4096,
        tied: false,
    };
    assert_eq!(model.parameters(), 8_030_261_248.0);
    for (tensor, pipeline, data, want) in
        [(2, 1, 2, 44.8726), (1, 1, 4, 67.3089), (2, 2, 32, 11.9193), (2, 1, 64, 23.1374)]
    {
        let run = Run { tensor, pipeline, data, batch: data, distributed_optimizer: true, ..Run::default() };
        let memory = run.memory(&model).unwrap();
        let got = (memory.weights + memory.gradients + memory.optimizer) as f64 / GIB;
        assert!((got - want).abs() < 5e-5, "t{tensor} p{pipeline} d{data}: {got} instead of {want} GiB");
    }
}

/// The models of Korthikanti et al., 2022 (arXiv 2205.05198), on t = 8: full recomputation, and
/// selective recomputation with sequence parallelism, with the measured seconds of both.
fn korthikanti() -> [[Row; 2]; 4] {
    [
        ("22B", (6144, 64, 48), (1, 1, 4, 4), (1.42, 1.10)),
        ("175B", (12288, 96, 96), (8, 3, 64, 1), (18.13, 13.75)),
        ("530B", (20480, 128, 105), (35, 3, 280, 1), (49.05, 37.83)),
        ("1T", (25600, 160, 128), (64, 1, 512, 1), (94.42, 71.49)),
    ]
    .map(|(name, (hidden, heads, layers), (pipeline, chunks, batch, sequences), seconds)| {
        let model = Model::gpt(hidden, heads, layers, 51200, 2048);
        let full = Run {
            tensor: 8,
            pipeline,
            chunks,
            batch,
            sequences,
            recompute: Recompute::Full,
            ..Run::default()
        };
        let selective = Run { recompute: Recompute::Selective, sequence_parallel: true, ..full };
        let row = |run, seconds| Row { name: name.into(), model, run, seconds };
        [row(full, seconds.0), row(selective, seconds.1)]
    })
}

/// Figure 1 of arXiv 2205.05198, in GiB. Its values have no embeddings, so ours are larger.
#[test]
fn memory_is_within_10_percent_of_korthikanti() {
    let published = [
        [45.5625, 59.25, 9.5625],
        [45.5625, 66.84375, 12.3515625],
        [31.640625, 114.0234, 23.076],
        [32.958984, 131.25, 26.5625],
    ];
    for ([full, selective], [state, none_saved, selective_saved]) in korthikanti().iter().zip(published) {
        let model = &full.model;
        let none = Run { recompute: Recompute::None, ..full.run };
        let memory = none.memory(model).unwrap();
        let got = (memory.weights + memory.gradients + memory.optimizer) as f64 / GIB;
        println!("{}: state {got:.2} of {state:.2} GiB", full.name);
        assert!((0.0..0.1).contains(&(got / state - 1.0)), "{}: {got} of {state} GiB", full.name);
        for (run, saved) in [(none, none_saved), (selective.run, selective_saved)] {
            let got = run.memory(model).unwrap().activations as f64 / GIB;
            println!("{}: activations {got:.2} of {saved:.2} GiB", full.name);
            assert!((0.0..0.1).contains(&(got / saved - 1.0)), "{}: {got} of {saved} GiB", full.name);
            // Without the embedding and the head, all published digits are reproduced.
            let [p, v] = [run.pipeline, run.chunks].map(|size| size as f64);
            let chunks = if run.chunks > 1 { 1.0 + (p - 1.0) / (p * v) } else { 1.0 };
            let layers = run.layer_activations(model).unwrap() * model.layers as f64 * chunks / GIB;
            assert!((layers / saved - 1.0).abs() < 1e-5, "{}: {layers} of {saved} GiB", full.name);
        }
    }
}

/// Figure 7 of arXiv 2205.05198: percent of the activations of tensor parallelism alone.
#[test]
fn relative_activations_are_those_of_korthikanti() {
    let published = [
        [66.84, 49.42, 16.18, 7.64],
        [62.04, 56.53, 18.49, 8.71],
        [58.31, 62.04, 20.27, 9.42],
        [58.31, 62.04, 20.27, 9.42],
    ];
    for ([row, _], want) in korthikanti().iter().zip(published) {
        let saved = |recompute, sequence_parallel| {
            Run { recompute, sequence_parallel, ..row.run }.layer_activations(&row.model).unwrap()
        };
        let all = saved(Recompute::None, false);
        let got = [
            saved(Recompute::None, true),
            saved(Recompute::Selective, false),
            saved(Recompute::Selective, true),
            saved(Recompute::Full, false),
        ]
        .map(|bytes| 100.0 * bytes / all);
        for (got, want) in got.into_iter().zip(want) {
            assert!((got - want).abs() < 0.15, "{}: {got:.2} instead of {want} %", row.name);
        }
    }
}

/// The rows with which Calculon was validated (its mean error is 3.65 %, its largest 8.87 %).
#[test]
fn steps_are_within_10_percent_of_korthikanti() {
    for at in [0, 1] {
        let errors: Vec<_> = korthikanti().iter().map(|rows| rows[at].print(&a100())).collect();
        println!("mean {:.1} %", 100.0 * mean(&errors));
        assert!(largest(&errors) <= 0.1 && mean(&errors) <= 0.06, "{errors:?}");
    }
}

/// Table 1 of Narayanan et al., 2021 (arXiv 2104.04473), with the microbatches and chunks of
/// Megatron-LM's `examples/sc21/run_table_1.sh`. A time follows from the published FLOP/s.
///
/// All predictions are too short, because the constants are from later versions of Megatron-LM.
/// The two smallest models miss the 10 % that hold for the others: the rate of a product depends on
/// its FLOPs alone here, but theirs are narrow.
#[test]
fn steps_are_within_10_percent_of_table_1_from_7_billion_parameters_on() {
    let rows = [
        ("1.7B", (2304, 24, 24), (1, 1, 32), (512, 16, 1), 137.0),
        ("3.6B", (3072, 32, 30), (2, 1, 64), (512, 16, 1), 138.0),
        ("7.5B", (4096, 32, 36), (4, 1, 128), (512, 16, 1), 142.0),
        ("18.4B", (6144, 48, 40), (8, 1, 256), (1024, 8, 1), 135.0),
        ("39.1B", (8192, 64, 48), (8, 2, 512), (1536, 4, 1), 138.0),
        ("76.1B", (10240, 80, 60), (8, 4, 1024), (1792, 2, 3), 140.0),
        ("145.6B", (12288, 96, 80), (8, 8, 1536), (2304, 2, 2), 148.0),
        ("310.1B", (16384, 128, 96), (8, 16, 1920), (2160, 1, 2), 155.0),
        ("529.6B", (20480, 128, 105), (8, 35, 2520), (2520, 1, 3), 163.0),
        ("1008B", (25600, 160, 128), (8, 64, 3072), (3072, 1, 1), 163.0),
    ];
    let mut errors = Vec::new();
    for (name, (hidden, heads, layers), (tensor, pipeline, gpus), (batch, sequences, chunks), teraflops) in
        rows
    {
        let model = Model::gpt(hidden, heads, layers, 51200, 2048);
        let run = Run {
            tensor,
            pipeline,
            data: gpus / tensor / pipeline,
            chunks,
            batch,
            sequences,
            recompute: Recompute::Full,
            ..Run::default()
        };
        assert_eq!(run.ranks(), gpus);
        let [b, s, l, h, v] = [batch, 2048, layers, hidden, 51200].map(|size| size as f64);
        let flops = 96.0 * b * s * l * h * h * (1.0 + s / (6.0 * h) + v / (16.0 * l * h));
        assert!((run.flops(&model).unwrap() / flops - 1.0).abs() < 1e-12);
        let row = Row { name: name.into(), model, run, seconds: flops / gpus as f64 / (teraflops * 1e12) };
        errors.push(row.print(&a100()));
        let predicted = teraflops / (1.0 + row.error(&a100()));
        println!("{:>8} {predicted:.0} of {teraflops} TFLOP/s for each GPU", "");
    }
    println!("mean {:.1} %", 100.0 * mean(&errors));
    assert!(mean(&errors) <= 0.09 && largest(&errors) <= 0.18, "{errors:?}");
    assert!(largest(&errors[2..]) <= 0.1, "{errors:?}");
}

/// The measured runs of vTrain (Bang et al., MICRO 2024): GPTs on 64 to 512 A100, trained by
/// Megatron-DeepSpeed with full recomputation.
fn vtrain() -> Vec<Row> {
    let path =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/vtrain/ground_truth_multi.csv");
    let text = fs::read_to_string(path).unwrap();
    let rows: Vec<_> = text.lines().skip(1).map(vtrain_row).collect();
    assert_eq!(rows.len(), 109);
    rows
}

/// Parses `parameters,GPUs,batch,microbatch,hidden,heads,layers,sequence,t,d,p,milliseconds`.
fn vtrain_row(line: &str) -> Row {
    let fields: Vec<f64> = line.split(',').map(|field| field.trim().parse().unwrap()).collect();
    let size = |at: usize| fields[at] as usize;
    let run = Run {
        tensor: size(8),
        pipeline: size(10),
        data: size(9),
        sequences: size(3),
        batch: size(2),
        recompute: Recompute::Full,
        ..Run::default()
    };
    assert_eq!(run.ranks(), size(1));
    Row {
        name: format!("{}B", fields[0]),
        model: Model::gpt(size(4), size(5), size(6), 51200, size(7)),
        run,
        seconds: fields[11] / 1e3,
    }
}

/// A number of a machine that is calibrated, with its physical bounds.
type Constant = (f64, f64, fn(&mut Machine) -> &mut f64);

/// The efficiency of products, the rate of memory, and what a kernel and the links cost. No rate
/// may exceed that of the hardware, and products reach at most .85 of their peak.
const CONSTANTS: [Constant; 7] = [
    (0.3, 0.85, |machine| &mut bf16(machine).products.efficiency[0].1),
    (0.5e12, 2039e9, |machine| &mut bf16(machine).copies.peak),
    (1e-6, 50e-6, |machine| &mut machine.rates[0].launch),
    (50e9, 300e9, |machine| &mut machine.node.bandwidth),
    (1e-6, 100e-6, |machine| &mut machine.node.latency),
    (1e9, 25e9, |machine| &mut machine.network.as_mut().unwrap().bandwidth),
    (1e-6, 100e-6, |machine| &mut machine.network.as_mut().unwrap().latency),
];

fn bf16(machine: &mut Machine) -> &mut TypeRates {
    machine.rates[0].types.get_mut("bf16").unwrap()
}

/// Calibrates a machine by coordinate descent on the mean absolute error: multiplies and divides
/// each constant by a factor, keeps what is better, and reduces the factor when nothing is.
fn calibrate(rows: &[&Row]) -> Machine {
    let mut machine = a100();
    bf16(&mut machine).products.efficiency = vec![(0.0, 0.7)];
    let mut error = mean_error(rows, &machine);
    let mut factor: f64 = 1.5;
    while factor > 1.005 {
        let before = error;
        for (least, most, constant) in CONSTANTS {
            for factor in [factor, 1.0 / factor] {
                let mut changed = machine.clone();
                let value = constant(&mut changed);
                *value = (*value * factor).clamp(least, most);
                let changed_error = mean_error(rows, &changed);
                if changed_error < error {
                    (machine, error) = (changed, changed_error);
                }
            }
        }
        if before - error < 1e-5 {
            factor = factor.sqrt();
        }
    }
    machine
}

/// Calibrated on three sizes, tested on the fourth. vTrain's own error is 14.7 %.
///
/// Outliers: 3.6B on t = 8 with b = 64 took twice the time of b = 32, but is predicted at half of
/// its time; b = 2 on t = 4 or 8 is predicted 29 % too short, and t = 16, a group on two nodes, up
/// to 23 % too long. 39.1B on t = 2 is predicted 17 to 38 % too short, although the measured 175B
/// on t = 2 and 39.1B on t = 1 are not slow.
#[test]
fn steps_of_a_size_of_vtrain_follow_from_the_other_sizes() {
    let rows = vtrain();
    let mut errors = Vec::new();
    for size in ["3.6B", "18.4B", "39.1B", "175B"] {
        let (tested, fitted): (Vec<&Row>, Vec<&Row>) = rows.iter().partition(|row| row.name == size);
        let mut machine = calibrate(&fitted);
        machine.check().unwrap();
        tested.iter().for_each(|row| _ = row.print(&machine));
        let error = mean_error(&tested, &machine);
        let constants = CONSTANTS.map(|(_, _, constant)| format!("{:.3e}", constant(&mut machine)));
        println!("{size}: {:.1} % on {} rows, with {constants:?}", 100.0 * error, tested.len());
        errors.push(error);
    }
    println!("mean {:.1} %", 100.0 * mean(&errors));
    assert!(mean(&errors) <= 0.1 && largest(&errors) <= 0.16, "{errors:?}");
}

/// The preset, whose efficiency of products is a mean of the calibrations above.
#[test]
fn steps_of_vtrain_are_within_12_percent_on_average_without_calibration() {
    let rows = vtrain();
    let error = mean_error(&rows.iter().collect::<Vec<_>>(), &a100());
    println!("{:.1} %", 100.0 * error);
    assert!(error <= 0.12, "{error}");
}
