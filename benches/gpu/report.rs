//! Times calls, and reports a line for each call.

use crate::{
    check::{BF16, dot, positions},
    data::{Data, to_host},
};
use half::bf16;
use serde_json::{Value, json};
use shardwise::{
    Error, Result, Tensor,
    device::{Cuda, Device},
    kernels::{Gemm, Pointwise},
};
use std::{
    fs::{File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    rc::Rc,
    time::{Duration, Instant},
};

/// The work of a call: bytes to read and write, and floating-point operations.
#[derive(Clone, Copy, Default)]
pub(crate) struct Cost {
    pub(crate) bytes: f64,
    pub(crate) flops: f64,
}

impl Cost {
    pub(crate) fn bytes(bytes: f64) -> Self {
        Self { bytes, flops: 0.0 }
    }
}

/// Seconds per call.
pub(crate) struct Times {
    median: f64,
    min: f64,
    max: f64,
}

impl Times {
    pub(crate) fn of(mut seconds: Vec<f64>) -> Self {
        seconds.sort_by(f64::total_cmp);
        Self { median: seconds[seconds.len() / 2], min: seconds[0], max: seconds[seconds.len() - 1] }
    }
}

/// Times `call`, which receives the number of the call. A round has enough calls to take 2 ms, and
/// ends when the device is done.
pub(crate) fn timed(cuda: &Cuda, quick: bool, mut call: impl FnMut(usize) -> Result<()>) -> Result<Times> {
    let mut number = 0;
    let mut round = |calls: usize| -> Result<f64> {
        let begin = Instant::now();
        for _ in 0..calls {
            call(number)?;
            number += 1;
        }
        cuda.synchronize()?;
        Ok(begin.elapsed().as_secs_f64())
    };
    // The first call loads kernels and chooses plans.
    round(1)?;
    let (mut calls, mut took) = (1, round(1)?);
    if quick {
        return Ok(Times::of(vec![took]));
    }
    while took < 2e-3 {
        calls *= 2;
        took = round(calls)?;
    }
    let rounds = (0.06 / took).clamp(5.0, 21.0) as usize;
    let times = (0..rounds).map(|_| Ok(round(calls)? / calls as f64)).collect::<Result<_>>()?;
    Ok(Times::of(times))
}

/// The measured limits of the device, per second: bf16 operations and bytes.
struct Limits {
    flops: f64,
    bytes: f64,
}

pub(crate) struct Bench {
    pub(crate) cuda: Cuda,
    pub(crate) data: Rc<Data>,
    pub(crate) quick: bool,
    limits: Option<Limits>,
    end: Option<Instant>,
    json: Option<(PathBuf, File)>,
    failures: usize,
}

impl Bench {
    pub(crate) fn new(cuda: Cuda, quick: bool, json: Option<&Path>, seconds: Option<f64>) -> Result<Self> {
        let end = seconds.map(|seconds| {
            let wait = Duration::try_from_secs_f64(seconds);
            wait.map(|wait| Instant::now() + wait)
                .map_err(|error| Error::invalid("--seconds", error.to_string()))
        });
        let open = |path: &Path| match OpenOptions::new().create(true).append(true).open(path) {
            Ok(file) => Ok((path.to_owned(), file)),
            Err(error) => Err(Error::io(path, &error)),
        };
        let data = Rc::new(Data::new(&cuda, quick)?);
        let (end, json) = (end.transpose()?, json.map(open).transpose()?);
        let mut bench = Self { cuda, data, quick, limits: None, end, json, failures: 0 };
        println!("{:?}", bench.cuda);
        bench.emit(json!({ "name": "device", "gpu": bench.cuda.name(), "quick": quick }))?;
        Ok(bench)
    }

    /// Whether every line was computed and every result was right.
    pub(crate) fn is_sound(&self) -> bool {
        self.failures == 0
    }

    /// Returns `small` in a quick run, else `usual`.
    pub(crate) fn pick<T>(&self, small: T, usual: T) -> T {
        if self.quick { small } else { usual }
    }

    /// Returns how many tensors of `bytes` bytes the calls should use in turn. With this number no
    /// tensor is still in a cache when its turn comes again.
    pub(crate) fn copies(&self, bytes: usize) -> usize {
        if self.quick { 2 } else { (240_usize << 20).div_ceil(bytes) }
    }

    /// Runs a case, which reports some lines. Reports an error as a line and continues with the
    /// next case.
    pub(crate) fn case(&mut self, name: &str, run: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        if self.end.is_some_and(|end| Instant::now() > end) {
            println!("skipped: {name}");
            return self.emit(json!({ "name": name, "skipped": true }));
        }
        let Err(error) = run(self) else { return Ok(()) };
        self.failures += 1;
        println!("{name}: {error}");
        self.emit(json!({ "name": name, "error": error.to_string() }))
    }

    /// Times `call` as [`timed`], and reports the line.
    pub(crate) fn time(
        &mut self,
        name: &str,
        cost: Cost,
        call: impl FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        let times = timed(&self.cuda, self.quick, call)?;
        self.line(name, &times, cost)
    }

    /// Reports a line.
    pub(crate) fn line(&mut self, name: &str, times: &Times, cost: Cost) -> Result<()> {
        let Times { median, min, max } = times;
        let floor = |limits: &Limits| (cost.bytes / limits.bytes).max(cost.flops / limits.flops);
        let part = self.limits.as_ref().map(floor).filter(|&floor| floor > 0.0).map(|floor| floor / median);
        let percent = part.map_or(String::new(), |part| format!("{:>6.1} % of the limit", 100.0 * part));
        println!("{name:<56} {:>11.2} us {percent}", median * 1e6);
        self.emit(json!({
            "name": name,
            "us": median * 1e6,
            "min_us": min * 1e6,
            "spread": (max - min) / median,
            "bytes": cost.bytes,
            "flops": cost.flops,
            "part_of_limit": part,
        }))
    }

    /// Checks a few numbers of a result. `want` has the expected values and their tolerances.
    pub(crate) fn expect(&mut self, name: &str, got: &[f64], want: &[(f64, f64)]) -> Result<()> {
        let near = |(got, (want, off)): (&f64, &(f64, f64))| (got - want).abs() <= *off;
        let wrong = got.iter().zip(want).filter(|pair| !near(*pair)).count();
        if wrong == 0 && got.len() == want.len() && !got.is_empty() {
            return Ok(());
        }
        self.failures += 1;
        let first = got.iter().zip(want).find(|pair| !near(*pair));
        let text = format!("{wrong} of {} (of {}) are wrong, first: {first:?}", got.len(), want.len());
        println!("wrong: {name}: {text}");
        self.emit(json!({ "name": name, "wrong": text }))
    }

    /// Measures the limits with a copy between buffers far larger than the caches, and with a large
    /// product.
    pub(crate) fn measure_limits(&mut self, write: bool) -> Result<()> {
        self.case("limits", |bench| {
            let (cuda, data) = (bench.cuda.clone(), Rc::clone(&bench.data));
            let rows = bench.pick(64, 1 << 16);
            let x = data.fill::<bf16>([rows, 8192], 1.0)?;
            let mut y = Tensor::<bf16, _>::zeros(&cuda, [rows, 8192])?;
            let copy = timed(&cuda, bench.quick, |_| cuda.copy(x.mat(), y.mat_mut()?))?;
            let bytes = (4 * rows * 8192) as f64;
            let last = rows - 1..rows;
            let want = to_host(x.mat().block(last.clone(), 0..8192), &cuda)?;
            let got = to_host(y.mat().block(last, 0..8192), &cuda)?;
            bench.expect("limit copy", &got, &want.iter().map(|&want| (want, 0.0)).collect::<Vec<_>>())?;

            let n = bench.pick(64, 8192);
            let (a, b) = (data.fill::<bf16>([n, n], 1.0)?, data.fill::<bf16>([n, n], 1.0)?);
            let mut c = Tensor::<bf16, _>::zeros(&cuda, [n, n])?;
            let product =
                timed(&cuda, bench.quick, |_| cuda.gemm(1.0, a.mat(), b.mat().t(), 0.0, c.mat_mut()?))?;
            let flops = 2.0 * (n as f64).powi(3);
            let (mut got, mut want) = (Vec::new(), Vec::new());
            for (row, col) in positions(n, n) {
                got.extend(to_host(c.mat().block(row..row + 1, col..col + 1), &cuda)?);
                let row = to_host(a.mat().block(row..row + 1, 0..n), &cuda)?;
                want.push(dot(&row, &to_host(b.mat().block(col..col + 1, 0..n), &cuda)?, BF16));
            }
            bench.expect("limit product", &got, &want)?;
            bench.limits = Some(Limits { flops: flops / product.median, bytes: bytes / copy.median });
            if write {
                bench.line(&format!("limit copy 2 x {} MiB", rows >> 6), &copy, Cost::bytes(bytes))?;
                let cost = Cost { bytes: 6.0 * (n * n) as f64, flops };
                bench.line(&format!("limit product bf16 {n} x {n} x {n}"), &product, cost)?;
            }
            Ok(())
        })
    }

    /// Appends a line to the JSON file, if there is one. Flushes the file, so that an early exit
    /// loses no line.
    fn emit(&mut self, line: Value) -> Result<()> {
        let Some((path, file)) = &mut self.json else { return Ok(()) };
        let written = writeln!(file, "{line}").and_then(|()| file.flush());
        written.map_err(|error| Error::io(&*path, &error))
    }
}
