"""What llama.cpp computes from a GGUF file, as a reference for the examples, and how fast. Needs the Python packages xllamacpp and gguf.

python3 scripts/peers/llama_cpp.py tokens target/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf > examples/text/data/gguf_tokens.json
python3 scripts/peers/llama_cpp.py speed target/gguf/Q8_0.gguf --threads 2 --rounds 3 --json target/llama_cpp.json

`tokens` prints the tokens of texts, with the file's own pre-tokenizer and with others, and those of a small SentencePiece vocabulary.
`speed` measures what `cargo bench --bench gguf` measures: a prompt in one step, and decoding after 64 tokens. Prints the medians over the
rounds, and appends them to a file as a JSON line. The times are those that llama.cpp's server reports. They contain sampling, as ours do.
"""

import argparse
import json
import pathlib
import statistics
import struct
import tempfile
import urllib.request

import gguf
import numpy
import xllamacpp

PRE_TOKENIZERS = ["smollm", "default", "gpt-2", "llama-bpe", "qwen2"]
TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    "  two spaces, a\ttab\t\tand two; trailing   ",
    "line\nline\r\n\n\n  indented\n \n",
    "I'm sure they'll say it's what we've done, you'd agree; I'M SURE THEY'LL, o'clock 'tis",
    "0 7 42 123 4567 1234567890 3.14159 1e-5 x86_64 ½ ² ٣٤٥ Ⅷ",
    "déjà vu, naïve Ærøskøbing, cafe\u0301, Straße, İstanbul, ſ's",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם مرحبا بالعالم",
    "今日は世界、你好，世界。안녕하세요 नमस्ते ไทย",
    "👍🏽 👩‍👩‍👧 🇩🇪 🤷‍♂️ ∑∫√ €£¥ “quoted” ‘single’ — dash…",
    "fn main() { println!(\"{:?}\", a[0] += b->c && !d || e ^ f); } // <=> $x ~y `z` #!/bin/sh\\n",
    "a\u00a0b\u2003c\u3000d\u200be \u2028 f",
    "control \u0004\u0007\u001b[0m and \u007f and \ufeff",
    "<|im_start|>user\nWho was Ada Lovelace?<|im_end|>\n<|im_start|>assistant\n",
    "text<|im_end|> <|im_end|><|endoftext|>text <|im_en d|> <repo_name>a/b<file_sep>",
    "",
]
# Pieces of a SentencePiece vocabulary in the order of their scores, behind unknown, begin, end, the bytes and a user-defined token.
PIECES = "▁t he in re ▁a on en ▁the ▁▁ at er ▁s or ▁and and ▁in ing ▁th ▁▁▁▁ ana an na ban ▁ban anana ▁is é ▁caf café ab bc abc".split()
PIECE_TEXTS = [
    "the and in the thing",
    " the  and    in",
    "banana ananana abcbc abcabc",
    "café naïve",
    "日本 👍",
    "a\nb\tc",
    "<s>the</s> and<|turn|>the <|turn|> and<unk>",
    "",
]


# The cached tokens when decoding begins.
CACHED = 64


def parameters(path, context):
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.verbosity = str(path), context, False, -1
    return params


def serve(path):
    return xllamacpp.Server(parameters(path, 256))


def tokens(path, texts):
    server = serve(path)

    def one(text):
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        request = urllib.request.Request(server.listening_address + "/tokenize", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["tokens"]

    return [{"text": text, "tokens": one(text)} for text in texts]


def with_pre_tokenizer(path, pre, to):
    """Copies a GGUF file with another value of tokenizer.ggml.pre."""
    data, name = path.read_bytes(), b"tokenizer.ggml.pre"
    string = lambda text: struct.pack("<Q", len(text)) + text
    at = data.index(string(name) + struct.pack("<I", gguf.GGUFValueType.STRING)) + 8 + len(name) + 4
    behind = at + 8 + struct.unpack_from("<Q", data, at)[0]
    reader = gguf.GGUFReader(path)
    # Where the last record of the header ends; zeros fill the rest up to the tensors.
    end = max(tensor.field.offset + sum(part.nbytes for part in tensor.field.parts) for tensor in reader.tensors)
    header = data[:at] + string(pre.encode()) + data[behind:end]
    to.write_bytes(header + b"\0" * (-len(header) % 32) + data[reader.data_offset:])


def pieces():
    """Returns the names, scores and types (as GGUF counts them) of a small SentencePiece vocabulary."""
    kind = gguf.TokenType
    special = [("<unk>", 0.0, kind.UNKNOWN), ("<s>", 0.0, kind.CONTROL), ("</s>", 0.0, kind.CONTROL)]
    special += [(f"<0x{byte:02X}>", 0.0, kind.BYTE) for byte in range(256)] + [("<|turn|>", 0.0, kind.USER_DEFINED)]
    characters = sorted(set("".join(PIECES)) - set(PIECES))
    normal = [(piece, -float(at), kind.NORMAL) for at, piece in enumerate(PIECES + characters)]
    return [list(column) for column in zip(*[(name, score, int(kind)) for name, score, kind in special + normal])]


def write_pieces(path, space):
    """Writes a random Llama of one block with the SentencePiece vocabulary."""
    names, scores, types = pieces()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1), writer.add_context_length(256), writer.add_embedding_length(32), writer.add_feed_forward_length(32)
    writer.add_head_count(1), writer.add_layer_norm_rms_eps(1e-5), writer.add_rope_dimension_count(32)
    writer.add_tokenizer_model("llama"), writer.add_token_list(names), writer.add_token_scores(scores), writer.add_token_types(types)
    writer.add_bos_token_id(1), writer.add_eos_token_id(2), writer.add_add_space_prefix(space)
    for name in ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]:
        writer.add_tensor(f"blk.0.{name}.weight", numpy.zeros((32, 32), numpy.float32))
    for name in ["blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"]:
        writer.add_tensor(f"{name}.weight", numpy.ones(32, numpy.float32))
    writer.add_tensor("token_embd.weight", numpy.zeros((len(names), 32), numpy.float32))
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()


def print_tokens(path):
    names, scores, types = pieces()
    byte_level, by_score = [], []
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "copy.gguf"
        for pre in PRE_TOKENIZERS:
            with_pre_tokenizer(path, pre, copy)
            byte_level += [{"pre": pre, **case} for case in tokens(copy, TEXTS)]
        for space in (True, False):
            write_pieces(copy, space)
            by_score += [{"space": space, **case} for case in tokens(copy, PIECE_TEXTS)]
    lines = {
        "made_by": json.dumps(f"xllamacpp {xllamacpp.__version__}, {path.name}"),
        "vocabulary": json.dumps({"tokens": names, "scores": scores, "types": types}, ensure_ascii=False),
    }
    for name, cases in (("byte_level", byte_level), ("pieces", by_score)):
        lines[name] = "[\n" + ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases) + "]"
    print("{" + ",\n".join(f"{json.dumps(name)}: {value}" for name, value in lines.items()) + "}")


def words(path):
    return len(gguf.GGUFReader(path).fields[gguf.Keys.Tokenizer.LIST].data)


def complete(server, ids, tokens):
    """Returns the seconds of the prompt, and of each token after the first, which belongs to the prompt."""
    request = {"prompt": ids, "n_predict": tokens + 1, "cache_prompt": False, "ignore_eos": True}
    answer = server.handle_completions(request | {"temperature": 0, "samplers": ["top_k"], "top_k": 1})
    times = answer["timings"]
    computed = (times["cache_n"], times["prompt_n"], times["predicted_n"])
    if computed != (0, len(ids), tokens + 1):
        raise SystemExit(f"llama.cpp: (cached, prompt, predicted) tokens are {computed}, not (0, {len(ids)}, {tokens + 1})")
    return times["prompt_ms"] / 1e3, times["predicted_ms"] / 1e3 / max(tokens, 1)


def speed(path, threads, prompt, tokens, rounds, json_path):
    params = parameters(path, max(prompt, CACHED + tokens) + 8)
    params.n_parallel, params.cache_ram_mib = 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server, vocabulary = xllamacpp.Server(params), words(path)
    ids = [(at * 37 + 11) % vocabulary for at in range(max(prompt, CACHED))]
    measured = []
    # The first round is not counted.
    for _ in range(rounds + 1):
        measured.append((complete(server, ids[:prompt], 0)[0], complete(server, ids[:CACHED], tokens)[1]))
    prompts, decodes = zip(*measured[1:])
    line = {
        "model": path.stem,
        "threads": threads,
        "prompt_per_s": prompt / statistics.median(prompts),
        "token_ms": statistics.median(decodes) * 1e3,
        "version": xllamacpp.__version__,
        "system": xllamacpp.get_system_info().strip(" |\n"),
    }
    print(f"llama.cpp, {path}, {threads} threads: prompt {line['prompt_per_s']:.1f} tok/s, {line['token_ms']:.3f} ms a token")
    if json_path:
        with open(json_path, "a") as file:
            print(json.dumps(line), file=file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("tokens", "speed"):
        commands.add_parser(command).add_argument("model", type=pathlib.Path)
    measure = commands.choices["speed"]
    measure.add_argument("--threads", type=int, default=1)
    measure.add_argument("--prompt", type=int, default=512)
    measure.add_argument("--tokens", type=int, default=32)
    measure.add_argument("--rounds", type=int, default=5)
    measure.add_argument("--json")
    options = parser.parse_args()
    if options.command == "tokens":
        print_tokens(options.model)
    else:
        speed(options.model, options.threads, options.prompt, options.tokens, options.rounds, options.json)
