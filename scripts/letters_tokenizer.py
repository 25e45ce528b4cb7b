#!/usr/bin/env python3
"""Prints a tokenizer.json whose tokens are characters: enough to run the examples with the random models of tests/data.

    scripts/letters_tokenizer.py 591 > folder/tokenizer.json
"""
import json, sys

words = int(sys.argv[1])
characters = [chr(code) for code in range(32, 127)] + ["\n"]
names = ["<unk>", "<s>", "</s>"] + characters
vocabulary = {name: at for at, name in enumerate(names + [f"<{at}>" for at in range(len(names), words)])}
json.dump({
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(?s)."}, "behavior": "Isolated", "invert": False},
    "post_processor": None, "decoder": {"type": "Fuse"},
    "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
}, sys.stdout)
