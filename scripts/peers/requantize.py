"""Writes a GGUF model in other types: requantize.py MODEL.gguf FOLDER TYPE.... Needs the Python package gguf.

python3 scripts/peers/requantize.py target/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf target/gguf F32 Q8_0 Q4_0

Dequantizes all tensors, and writes FOLDER/TYPE.gguf with all metadata and the same order of rows. F32 is exactly what the quantized
model stands for. As llama.cpp's quantizer does, the others have the matrices of the layers in TYPE, the embedding and the head in Q8_0, and
vectors in F32. gguf quantizes with ggml's formulas.
"""

import argparse
import pathlib

import gguf

# llama.cpp never writes these in fewer bits than Q8_0 if the width is not a multiple of 256, nor the table of a tied head.
ENDS = ("token_embd.weight", "output.weight")
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


def type_of(tensor, wanted):
    kind = gguf.GGMLQuantizationType
    if wanted == kind.F32 or len(tensor.shape) < 2:
        return kind.F32
    return kind.Q8_0 if tensor.name in ENDS and gguf.GGML_QUANT_SIZES[wanted][0] > 1 else wanted


def write(reader, wanted, path):
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    temporary = path.with_suffix(".part")
    writer = gguf.GGUFWriter(temporary, architecture)
    for field in reader.fields.values():
        # The writer writes the counts of the header and the architecture itself.
        if field.name.startswith("GGUF.") or field.name == gguf.Keys.General.ARCHITECTURE:
            continue
        if field.name == gguf.Keys.General.FILE_TYPE:
            name = {"F32": "ALL_F32"}.get(wanted.name, f"MOSTLY_{wanted.name}")
            writer.add_file_type(gguf.LlamaFileType[name])
            continue
        of = field.types[0]
        writer.add_key_value(field.name, field.contents(), of, field.types[-1] if of == gguf.GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        of = type_of(tensor, wanted)
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    # Only a complete file gets the name.
    temporary.rename(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("types", nargs="+", choices=TYPES)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    reader = gguf.GGUFReader(options.model)
    for name in options.types:
        path = options.folder / f"{name}.gguf"
        write(reader, gguf.GGMLQuantizationType[name], path)
        print(path)
