//! Reads how the weights of a checkpoint are quantized: the `quantization_config` of `config.json`.

use super::json::Json;
use crate::weights::{Packing, PackingMethod, Tile};

/// The largest number of rows or columns that share a scale.
const LARGEST: usize = 1 << 28;

/// Keys of GPTQ for quantizing and for the programs that run the model. The shapes of the tensors
/// show which matrices are quantized, and `g_idx` has the order of the groups.
const GPTQ: &[&str] = &[
    "act_group_aware",
    "activation",
    "backend",
    "batch_size",
    "block_name_to_quantize",
    "cache_block_outputs",
    "damp_auto_increment",
    "damp_percent",
    "dataset",
    "disable_exllama",
    "exllama_config",
    "lm_head",
    "max_input_length",
    "method",
    "model_file_base_name",
    "model_name_or_path",
    "model_seqlen",
    "module_name_preceding_first_block",
    "modules_in_block_to_quantize",
    "mse",
    "pad_token_id",
    "quantizer",
    "static_groups",
    "sym",
    "tokenizer",
    "true_sequential",
    "use_cuda_fp16",
    "use_exllama",
];

/// Keys of AWQ for quantizing and for the programs that run the model.
const AWQ: &[&str] =
    &["do_fuse", "exllama_config", "fuse_max_seq_len", "modules_to_fuse", "modules_to_not_convert"];

/// Keys of compressed-tensors that describe how the checkpoint was made, or which modules were
/// quantized, which the tensors show.
const COMPRESSED: &[&str] = &["global_compression_ratio", "ignore", "version"];

/// Keys of a group of compressed-tensors. Activations are not quantized as it says: see
/// [`crate::weights::Packed`].
const GROUP: &[&str] = &["input_activations", "targets"];

/// Keys of the weights of compressed-tensors for quantizing.
const WEIGHTS: &[&str] = &["observer", "observer_kwargs", "scale_dtype", "zp_dtype"];

/// Keys of FP8 that name the modules that are not quantized, which the tensors show, or describe
/// activations.
const FP8: &[&str] =
    &["activation_scheme", "ignored_layers", "modules_to_convert", "modules_to_not_convert", "scale_fmt"];

/// Reads a `quantization_config`.
pub(super) fn read(json: &Json<'_>) -> Result<Packing, String> {
    let packing = match json.text("quant_method")?.unwrap_or("a method without a name") {
        "gptq" => gptq(json)?,
        "awq" => awq(json)?,
        "compressed-tensors" => compressed(json)?,
        "fp8" => fp8(json)?,
        other => {
            return Err(format!(
                "`quantization_config`: weights quantized by `{}` are not known; known are awq, compressed-tensors, \
                 fp8 and gptq",
                other.escape_debug()
            ));
        }
    };
    let mut tiles: Vec<Tile> = Vec::new();
    packing.tiles.into_iter().for_each(|tile| {
        if !tiles.contains(&tile) {
            tiles.push(tile);
        }
    });
    Ok(Packing { tiles, ..packing })
}

/// Reads the columns of a group, where -1 means all.
fn group(json: &Json<'_>, key: &str) -> Result<Option<usize>, String> {
    if json.raw(key).and_then(serde_json::Value::as_i64) == Some(-1) {
        return Ok(None);
    }
    json.size(key, LARGEST).map(Some)
}

fn bits(json: &Json<'_>, key: &str, known: &[u32]) -> Result<u32, String> {
    let bits = json.size(key, 64)? as u32;
    if known.contains(&bits) {
        return Ok(bits);
    }
    Err(format!("`quantization_config.{key}`: weights of {bits} bits are not known, only of {known:?}"))
}

/// Whether GPTQModel wrote the checkpoint, as its `meta.quantizer` says: a text such as
/// "gptqmodel:1.9.0", or a list of such texts.
fn by_gptqmodel(json: &Json<'_>) -> Result<bool, String> {
    let quantizer = json.object("meta")?.and_then(|meta| meta.raw("quantizer").cloned());
    let names = match quantizer {
        Some(serde_json::Value::Array(names)) => names,
        name => name.into_iter().collect(),
    };
    Ok(names
        .iter()
        .filter_map(serde_json::Value::as_str)
        .any(|name| name.to_ascii_lowercase().starts_with("gptqmodel")))
}

fn gptq(json: &Json<'_>) -> Result<Packing, String> {
    let by_gptqmodel = by_gptqmodel(json)?;
    let method = match json.text("checkpoint_format")?.or(json.text("format")?).unwrap_or("gptq") {
        "gptq" if by_gptqmodel => PackingMethod::GptqModel,
        "gptq" => PackingMethod::Gptq,
        "gptq_v2" => PackingMethod::GptqV2,
        other => {
            let other = other.escape_debug();
            return Err(format!(
                "`quantization_config.checkpoint_format`: `{other}` is not known, only gptq and gptq_v2"
            ));
        }
    };
    json.only("is_marlin_format", false)?;
    json.only("pack_dtype", "int32")?;
    let of = |json: &Json<'_>, usual: Option<Tile>| {
        let bits = match usual {
            Some(tile) if json.raw("bits").is_none() => tile.bits,
            _ => bits(json, "bits", &[4, 8])?,
        };
        let columns = match usual {
            Some(tile) if json.raw("group_size").is_none() => tile.columns,
            _ => group(json, "group_size")?,
        };
        let any_order = json.flag("desc_act")?.unwrap_or(usual.is_some_and(|tile| tile.any_order));
        let tile = Tile { any_order, ..Tile::new(bits, Some(1), columns) };
        Ok::<_, String>(tile)
    };
    let tile = of(json, None)?;
    let mut tiles = vec![tile];
    // Other precisions of some modules. The tensors' shapes show which of them a module has.
    if let Some(modules) = json.object("dynamic")? {
        for module in modules.objects()? {
            tiles.push(of(&module, Some(tile))?);
            module.finish(&[GPTQ])?;
        }
    }
    json.finish(&[GPTQ])?;
    Ok(Packing { method, tiles })
}

fn awq(json: &Json<'_>) -> Result<Packing, String> {
    let version =
        |value: &serde_json::Value| value.as_str().is_some_and(|text| text.eq_ignore_ascii_case("gemm"));
    json.each("version", version)?;
    json.only("zero_point", true)?;
    json.only("backend", "autoawq")?;
    let (bits, columns) = (bits(json, "bits", &[4])?, group(json, "group_size")?);
    json.finish(&[AWQ])?;
    Ok(Packing { method: PackingMethod::Awq, tiles: vec![Tile::new(bits, Some(1), columns)] })
}

fn compressed(json: &Json<'_>) -> Result<Packing, String> {
    let known = ["pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "mixed-precision"];
    let is_known = |value: &serde_json::Value| known.iter().any(|known| value == known);
    json.each("format", is_known)?;
    json.only("quantization_status", "compressed")?;
    // A cache that is not quantized is more precise than the configuration says, so a user has to
    // ask for it.
    json.each("kv_cache_scheme", |_| false)?;
    let is_empty = |value: &serde_json::Value| value.as_object().is_some_and(serde_json::Map::is_empty);
    json.each("transform_config", is_empty)?;
    let is_dense = |value: &serde_json::Value| {
        is_empty(value) || value.get("format").is_some_and(|format| format == "dense")
    };
    json.each("sparsity_config", is_dense)?;
    let mut tiles = Vec::new();
    if let Some(groups) = json.object("config_groups")? {
        for group in groups.objects()? {
            group.each("format", is_known)?;
            group.each("output_activations", |_| false)?;
            if let Some(weights) = group.object("weights")? {
                tiles.push(weights_of_group(&weights)?);
                weights.finish(&[WEIGHTS])?;
            }
            group.finish(&[GROUP])?;
        }
    }
    json.finish(&[COMPRESSED])?;
    Ok(Packing { method: PackingMethod::CompressedTensors, tiles })
}

fn weights_of_group(json: &Json<'_>) -> Result<Tile, String> {
    json.only("dynamic", false)?;
    let (bits, float) = match json.text("type")?.unwrap_or("int") {
        "float" => (bits(json, "num_bits", &[8])?, true),
        "int" => (bits(json, "num_bits", &[4, 8])?, false),
        other => return Err(format!("`weights.type`: `{}` is not known", other.escape_debug())),
    };
    let has_size = json.raw("group_size").is_some_and(|size| !size.is_null());
    let size = if has_size { group(json, "group_size")? } else { None };
    let usual = match size {
        Some(_) => "group",
        None if has_size => "channel",
        None => "tensor",
    };
    let (rows, columns) = match json.text("strategy")?.unwrap_or(usual) {
        "tensor" => (None, None),
        "channel" => (Some(1), None),
        "group" => (Some(1), Some(size.ok_or("`weights.group_size` is missing")?)),
        "block" => block(json, "block_structure").map(|[rows, columns]| (Some(rows), Some(columns)))?,
        other => return Err(format!("`weights.strategy`: `{}` is not known", other.escape_debug())),
    };
    json.raw("block_structure");
    let asymmetric = !json.flag("symmetric")?.unwrap_or(true);
    // With the other orders, groups are consecutive columns of the file. Old files have a flag.
    let any_order = match json.raw("actorder") {
        Some(serde_json::Value::Bool(any)) => *any,
        Some(serde_json::Value::String(order)) => ["group", "dynamic"].contains(&order.as_str()),
        _ => false,
    };
    Ok(Tile { float, asymmetric, any_order, ..Tile::new(bits, rows, columns) })
}

/// Reads the rows and columns of a tile, which is a list or, in old files, a text such as
/// "128x128".
fn block(json: &Json<'_>, key: &str) -> Result<[usize; 2], String> {
    let size = |size: Option<usize>| size.filter(|size| (1..=LARGEST).contains(size));
    let number = |value: &serde_json::Value| value.as_u64().and_then(|value| usize::try_from(value).ok());
    let sizes: Vec<_> = match json.raw(key) {
        Some(serde_json::Value::Array(sizes)) => sizes.iter().map(|value| size(number(value))).collect(),
        Some(serde_json::Value::String(text)) => {
            text.split('x').map(|text| size(text.parse().ok())).collect()
        }
        _ => Vec::new(),
    };
    match sizes[..] {
        [Some(rows), Some(columns)] => Ok([rows, columns]),
        _ => Err(format!("`{key}` is not two sizes from 1 to {LARGEST}")),
    }
}

fn fp8(json: &Json<'_>) -> Result<Packing, String> {
    json.only("fmt", "e4m3")?;
    json.only("dequantize", false)?;
    let tiles = if json.raw("weight_block_size").is_some_and(|value| !value.is_null()) {
        let [rows, columns] = block(json, "weight_block_size")?;
        vec![Tile::fp8(Some(rows), Some(columns))]
    } else {
        [None, Some(1)].map(|rows| Tile::fp8(rows, None)).into()
    };
    json.finish(&[FP8])?;
    Ok(Packing { method: PackingMethod::Fp8, tiles })
}
