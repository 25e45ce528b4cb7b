//! Plans how a model is divided over the ranks of a machine.

mod chart;
mod html;
mod table;
mod trial;
mod units;

use clap::{ArgGroup, Args, ValueEnum};
use serde::Serialize;
use shardwise::{
    Result,
    comm::Group,
    device::{DType, Device, Meta},
    models::{Decoder, DecoderConfig, ModelConfig},
    plan::{Goal, Job, Limits, Machine, Plan, Plans, Refusal, Strategy, plan_within},
    shard::Replicated,
    tensor::Random,
};
use std::{
    fs,
    io::{self, Write},
    num::NonZeroUsize,
    path::{Path, PathBuf},
};
use trial::Trial;

/// The exit code if no plan fits.
const NOTHING_FITS: u8 = 3;

/// What to plan, and what to write.
#[derive(Args)]
#[command(group(ArgGroup::new("goal").required(true).args(["train", "serve"])))]
pub(crate) struct Request {
    /// The folder of a model, or its config.json.
    #[arg(long)]
    model: PathBuf,
    /// The name of a machine, or a JSON file that describes one.
    #[arg(long)]
    machine: String,
    /// The number of ranks, if not all of the machine's.
    #[arg(long)]
    ranks: Option<NonZeroUsize>,
    /// Plan training steps with AdamW.
    #[arg(long)]
    train: bool,
    /// Plan the generation of texts.
    #[arg(long)]
    serve: bool,
    /// The number of sequences, over all replicas.
    #[arg(long)]
    batch: NonZeroUsize,
    /// The number of tokens of each sequence. With --serve, the largest number, prompt and
    /// generated text together.
    #[arg(long)]
    tokens: NonZeroUsize,
    /// The element type of weights and activations.
    #[arg(long, value_enum, default_value_t = Type::Bf16)]
    dtype: Type,
    /// Consider only this number of replicas.
    #[arg(long, value_name = "N")]
    dp: Option<usize>,
    /// Consider only this number of tensor-parallel ranks.
    #[arg(long, value_name = "N")]
    tp: Option<usize>,
    /// Consider only this number of pipeline ranks.
    #[arg(long, value_name = "N")]
    pp: Option<usize>,
    /// Consider only microbatches of this number of sequences.
    #[arg(long, value_name = "N")]
    microbatch: Option<usize>,
    /// Consider only plans with sequence parallelism (true), or without it (false).
    #[arg(long, value_name = "BOOL")]
    sequence_parallel: Option<bool>,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// Write a page with memory, timeline and table to this file.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write the best plan as JSON to this file, for programs that run it. With --try, the plan
    /// that took the least time.
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
    /// The largest number of plans to show.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u8).range(1..=10))]
    top: u8,
    /// Run steps of the best N plans on this machine, and add their times to the machine's file,
    /// which calibrates later predictions. Needs a file that `shardwise measure` wrote.
    #[arg(long = "try", value_name = "N", value_parser = clap::value_parser!(u8).range(1..=10))]
    tried: Option<u8>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Type {
    F32,
    Bf16,
    F16,
}

/// The sizes of a model.
#[derive(Serialize)]
#[cfg_attr(test, derive(Clone))]
struct Model {
    name: String,
    parameters: u64,
    layers: usize,
    hidden: usize,
    ffn: usize,
    heads: usize,
    kv_heads: usize,
    vocabulary: usize,
}

/// What is shown of the plans of a job.
struct Report {
    model: Model,
    dtype: DType,
    goal: Goal,
    machine: Machine,
    considered: usize,
    best: Vec<Plan>,
    refused: Vec<Refusal>,
}

impl Request {
    /// Plans and writes the results. Returns the exit code.
    pub(crate) fn run(&self) -> io::Result<u8> {
        let (job, report) = self.report().map_err(io::Error::other)?;
        let print = |text: &str| io::stdout().write_all(text.as_bytes());
        if !self.json {
            print(&table::text(&report))?;
        }
        let write = |path: &Path, text: String| {
            fs::write(path, text)
                .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
        };
        if let Some(path) = &self.html {
            write(path, html::page(&report))?;
        }
        let trials = match self.tried {
            Some(count) => {
                let show = |line: &str| if self.json { Ok(()) } else { print(&format!("{line}\n")) };
                Some(trial::run(&job, &report, Path::new(&self.machine), count.into(), show)?)
            }
            None => None,
        };
        if self.json {
            print(&report.json(trials.as_deref())?)?;
        }
        if report.best.is_empty() {
            return Ok(NOTHING_FITS);
        }
        if let Some(path) = &self.save {
            let won = trials.iter().flatten().position(|trial| trial.won);
            let best = &report.best[won.unwrap_or_default()];
            write(path, format!("{}\n", serde_json::to_string_pretty(best)?))?;
        }
        Ok(0)
    }

    fn report(&self) -> Result<(Job, Report)> {
        let config = match ModelConfig::read(&self.model)? {
            ModelConfig::Decoder(config) => config,
            _ => {
                let reason = format!(
                    "{}: only decoders can be planned, and this model is an encoder",
                    self.model.display()
                );
                return Err(shardwise::Error::invalid("plan", reason));
            }
        };
        let machine = machine(&self.machine)?;
        let machine = match self.ranks {
            Some(ranks) => machine.with_ranks(ranks.get()),
            None => machine,
        };
        if self.tried.is_some() {
            trial::check(&self.machine, &machine)?;
        }
        let model = Model::new(&self.model, &config)?;
        let dtype = match self.dtype {
            Type::F32 => DType::F32,
            Type::Bf16 => DType::BF16,
            Type::F16 => DType::F16,
        };
        let (batch, tokens) = (self.batch.get(), self.tokens.get());
        let job = match self.train {
            true => Job::train(config, dtype, batch, tokens),
            false => Job::serve(config, dtype, batch, tokens),
        };
        let mut limits = Limits::default();
        (limits.data, limits.tensor, limits.pipeline) = (self.dp, self.tp, self.pp);
        (limits.sequences, limits.sequence_parallel) = (self.microbatch, self.sequence_parallel);
        let plans = plan_within(&job, &machine, &limits)?;
        let Plans { job, machine, mut best, considered, refused, .. } = plans;
        best.truncate(self.top.into());
        let report = Report { model, dtype, goal: job.goal, machine, considered, best, refused };
        Ok((job, report))
    }
}

/// Returns the preset of this name, or reads the file. A path with a folder or an extension is a
/// file.
fn machine(name: &str) -> Result<Machine> {
    let path = Path::new(name);
    if path.components().count() > 1 || path.extension().is_some() {
        Machine::read(path)
    } else {
        Machine::preset(name)
    }
}

impl Model {
    fn new(path: &Path, config: &DecoderConfig) -> Result<Self> {
        let device = Meta::new();
        let (group, _) = Group::planned(&device, 0, 1)?;
        // Held until its elements are counted.
        let _decoder = Decoder::<Replicated, f32, _>::load(&group, &Random::normal(0, 1.0), config)?;
        let attention = &config.block.attention;
        Ok(Self {
            name: name(path),
            parameters: (device.memory().live / size_of::<f32>()) as u64,
            layers: config.layers.len(),
            hidden: attention.hidden,
            ffn: config.block.ffn,
            heads: attention.heads,
            kv_heads: attention.kv_heads,
            vocabulary: config.vocabulary,
        })
    }
}

/// Returns the name of a model's folder, or the name of its file without the extension.
fn name(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.into());
    let named = match path.parent() {
        Some(folder) if path.ends_with("config.json") => folder.file_name(),
        _ if path.is_dir() => path.file_name(),
        _ => path.file_stem(),
    };
    named.map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}

impl Report {
    fn json(&self, trials: Option<&[Trial]>) -> io::Result<String> {
        #[derive(Serialize)]
        struct Json<'a> {
            model: &'a Model,
            machine: &'a str,
            considered: usize,
            best: &'a [Plan],
            refused: &'a [Refusal],
            #[serde(skip_serializing_if = "Option::is_none")]
            trials: Option<&'a [Trial]>,
        }
        let Self { model, machine, considered, best, refused, .. } = self;
        let json = Json { model, machine: &machine.name, considered: *considered, best, refused, trials };
        Ok(format!("{}\n", serde_json::to_string_pretty(&json)?))
    }

    fn is_training(&self) -> bool {
        matches!(self.goal, Goal::Train { .. })
    }

    fn goal(&self) -> String {
        match self.goal {
            Goal::Train { batch, tokens } => format!("training, {batch} x {tokens} tokens a step"),
            Goal::Serve { batch, context } => {
                format!("serving, {batch} sequences of at most {context} tokens")
            }
            _ => "another goal".into(),
        }
    }

    /// The job and a strategy, as a machine's file names a run.
    fn what(&self, strategy: &Strategy) -> String {
        format!("{}, {}, {}, {strategy}", self.model.name, self.dtype, self.goal())
    }

    /// The line above the plans.
    fn title(&self) -> String {
        let Self { model, dtype, machine, .. } = self;
        let goal = self.goal();
        let ranks = units::counted(machine.ranks, "rank");
        let parameters = units::short(model.parameters as f64);
        format!("{ranks} · {}, {parameters} parameters, {dtype} · {goal} · {}", model.name, machine.name)
    }

    /// What is remarkable about the best plan: ranks that it does not use, or that nothing fits.
    fn notes(&self) -> Vec<String> {
        let Some(best) = self.best.first() else {
            return vec!["No plan fits into the memory. The reasons are below.".into()];
        };
        let (used, all, node) = (best.strategy.ranks(), self.machine.ranks, self.machine.ranks_per_node);
        let mut notes = Vec::new();
        if used < all {
            let place = match (used, used <= node && node < all) {
                (1, _) => " a single rank:".into(),
                (_, true) => format!(" one node, {used} of {all} ranks:"),
                _ => format!(" {used} of {all} ranks:"),
            };
            notes.push(format!(
                "The best plan uses{place} plans with more ranks were considered, and take longer or do not fit."
            ));
        }
        notes
    }

    /// Why the best plan is before the second.
    fn why(&self) -> Option<String> {
        let [first, second, ..] = &self.best[..] else { return None };
        Some(first.why_over(second))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The plans of `tests/data/plan/two.json` for a model of this name.
    pub(super) fn report(name: &str) -> Report {
        let read = |text| serde_json::from_str(text).unwrap();
        let machine: Machine =
            serde_json::from_str(include_str!("../../../../tests/data/plan/machine.json")).unwrap();
        let mut machine = machine.with_ranks(32);
        (machine.ranks_per_node, machine.memory) = (16, 80 << 30);
        Report {
            model: Model {
                name: name.into(),
                parameters: 6_738_415_616,
                layers: 32,
                hidden: 4096,
                ffn: 11008,
                heads: 32,
                kv_heads: 32,
                vocabulary: 32000,
            },
            dtype: DType::BF16,
            goal: Goal::Train { batch: 8, tokens: 4096 },
            machine,
            considered: 40,
            best: serde_json::from_str(include_str!("../../../../tests/data/plan/two.json")).unwrap(),
            refused: read(r#"[{"count": 30, "reason": "<memory> & more"}, {"count": 8, "reason": "none"}]"#),
        }
    }

    #[test]
    fn unused_ranks_are_noted() {
        let mut report = report("model");
        let note = report.notes().concat();
        assert!(note.starts_with("The best plan uses one node, 16 of 32 ranks: "), "{note}");
        report.machine.ranks_per_node = 8;
        assert!(report.notes().concat().starts_with("The best plan uses 16 of 32 ranks: "));
        report.machine.ranks = 16;
        assert!(report.notes().is_empty());
        report.best.clear();
        assert!(report.notes().concat().contains("No plan fits"));
        assert!(report.why().is_none());
    }

    #[test]
    fn a_model_is_named_after_its_folder_or_file() {
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
        assert_eq!(name(&data.join("llama")), "llama");
        assert_eq!(name(&data.join("llama/config.json")), "llama");
        assert_eq!(name(&data.join("configs/llama-2-70b.json")), "llama-2-70b");
    }
}
