//! A model that an example runs: its configuration, weights and tokenizer.

use super::{GgufTokenizer, Precision};
use shardwise::{
    Error, Result,
    models::{DecoderConfig, ModelConfig},
    tensor::WeightSource,
    weights::{Checkpoint, Gguf, Packed, Transposed},
};
use std::{
    fs::{self, File},
    io::Read,
    path::Path,
};
use tokenizers::Tokenizer;

enum Source {
    Folder(Checkpoint),
    Packed(Packed),
    Gguf(Gguf),
}

impl Source {
    fn weights(&self) -> &(dyn WeightSource + Sync) {
        match self {
            Self::Folder(checkpoint) => checkpoint,
            Self::Packed(packed) => packed,
            Self::Gguf(gguf) => gguf,
        }
    }
}

/// A decoder in a folder in Hugging Face's format, quantized or not, or in a GGUF file.
pub struct Model {
    /// The configuration.
    pub config: DecoderConfig,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// Whether the ranks hold quantized weights.
    pub quantized: bool,
    source: Source,
    /// Whether the matrices of blocks have to be transposed before they are quantized.
    transposed: bool,
    precision: Precision,
}

impl Model {
    /// Opens a folder, or a GGUF file. Errors name `op`.
    ///
    /// # Errors
    /// When the model is no decoder, when it or its tokenizer cannot be read or is not known, or
    /// when the options do not fit it.
    pub fn open(op: &'static str, path: &Path, precision: Precision) -> Result<Self> {
        let fail = |reason: String| Error::Invalid { op, reason };
        if let Some(file) = only_gguf(path) {
            return Err(fail(format!(
                "{} has no config.json, but {file}: pass the path of that file",
                path.display()
            )));
        }
        let (config, tokenizer, source) = if is_gguf(path) {
            let gguf = Gguf::open(path)?;
            let config = ModelConfig::of_gguf(&gguf)?;
            let tokenizer = GgufTokenizer::read(&gguf).and_then(|tokenizer| tokenizer.build());
            let named = |reason| fail(format!("{}: {reason}", path.display()));
            (config, tokenizer.map_err(named)?, Source::Gguf(gguf))
        } else {
            let config = ModelConfig::read(path)?;
            let checkpoint = Checkpoint::open(path)?;
            let source = match &config {
                ModelConfig::Decoder(DecoderConfig { packing: Some(packing), .. }) => {
                    Source::Packed(Packed::new(checkpoint, packing)?)
                }
                _ => Source::Folder(checkpoint),
            };
            (config, super::tokenizer(path).map_err(fail)?, source)
        };
        let ModelConfig::Decoder(mut config) = config else {
            return Err(fail("the model is not a decoder, so it does not predict tokens".into()));
        };
        let has_format = |name: &String| source.weights().format(name).is_some();
        let quantized = source.weights().names().is_some_and(|names| names.iter().any(has_format));
        precision.check(quantized).map_err(|reason| fail(format!("{}: {reason}", path.display())))?;
        let source = match source {
            Source::Gguf(gguf) => Source::Gguf(precision.of_gguf(gguf)),
            Source::Packed(packed) => Source::Packed(precision.of_packed(packed)),
            folder => folder,
        };
        let quantized = precision.leaves_quantized(quantized);
        let transposed = config.transposed && quantized;
        config.transposed &= !quantized;
        Ok(Self { config, tokenizer, quantized, source, transposed, precision })
    }

    /// Runs `run` with the weights as the options ask for them.
    ///
    /// # Errors
    /// When the weights cannot be quantized as the options ask; the error of `run`.
    pub fn with_weights<R>(&self, run: impl FnOnce(&(dyn WeightSource + Sync)) -> Result<R>) -> Result<R> {
        let in_block = format!(".{}.", self.config.names.blocks);
        let is_in_block = |name: &str| name.contains(&in_block) || name.starts_with(&in_block[1..]);
        let source = self.source.weights();
        let source = Transposed::new(source, |name| self.transposed && is_in_block(name));
        self.precision.with_weights(&source, run)
    }
}

/// Whether a path is that of a GGUF file, by its name or its first bytes.
fn is_gguf(path: &Path) -> bool {
    let mut magic = [0; 4];
    path.extension().is_some_and(|end| end == "gguf")
        || path.is_file()
            && File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok()
            && magic == *b"GGUF"
}

/// Returns the name of a GGUF file in a folder without a `config.json`.
fn only_gguf(folder: &Path) -> Option<String> {
    let entries = fs::read_dir(folder).ok().filter(|_| !folder.join("config.json").exists())?;
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    names.into_iter().find(|name| name.ends_with(".gguf"))
}
