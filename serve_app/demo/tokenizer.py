"""A byte-level BPE tokenizer like Qwen2's, trained on the text below: 1,024 tokens instead of 151,665."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCAB_SIZE = 1024
"""Every token, the special ones at the end included. The corpus is long enough to fill it."""

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP_TOKENS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
"""One token each, but part of the text: parsers need to see them, so decoding must not skip them."""

# Qwen2's rule for splitting text into words before merges apply (transformers would put the same one in its place).
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_CORPUS = """\
You are a helpful assistant. Describe this image in a few words. What is shown in the picture? What do you see here?
Which animal, which colour, how many people? Read the text on the sign. Is there a difference between the two images?
The picture shows a small red house beside a quiet river, with a wooden bridge and a row of tall green trees behind it.
A black dog runs along the beach while two children fly a yellow kite under a clear blue sky. White clouds drift over
the mountains, and the morning light makes the snow look orange and purple. An old woman sits by the window, reading a
letter from her brother; a grey cat sleeps on the chair near the fire. In the street a man with an umbrella waits for
the night bus, and the shop across the road has bread, apples, flowers and newspapers for sale.
On the left there is a circle, on the right a square, and a bright triangle lies in the middle of the dark background.
The video begins with an empty room; then a door opens, someone walks in, turns on the lamp and starts to play music.
The sound is soft at first, after that the drums become loud, a voice sings, and at last there is nothing but rain.
A good engine takes a request, finds the words and pictures in it, encodes each one, and sends an answer back as soon as
possible. First the encoder looks at every pixel, next the language model reads the whole prompt, finally it writes one
token after another until the reply is complete. If something goes wrong it must say so: an error is better than silence.
Please tell me the weather in Paris, London, Tokyo and New York today. It will be sunny, warm and dry in the north, but
cold and windy with some heavy showers near the coast. The temperature is between three and seventeen degrees.
You may call one or more functions to assist with the user query. You are provided with function signatures within XML
tags. For each function call, return a json object with function name and arguments within XML tags:
{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}
{"type": "object", "properties": {"count": {"type": "integer"}, "title": {"type": "string"}}, "required": ["title"]}
def add(first, second): return first + second  # 0 1 2 3 4 5 6 7 8 9
# A list of things
- gold, silver, copper, iron; water, earth, wind; spring, summer, autumn, winter
- Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday
Once upon a time there lived a king who had twelve horses, each as fast as a storm. "Where have my horses gone?" he
asked. "They went to look for you, my lord," said the youngest farmer, "because nobody else knew the way home." Then
everyone laughed, the kitchen was full of steam, and even the proud soldier danced with the miller's daughter!
"""


def train_tokenizer(media_tokens: Sequence[str]) -> Tokenizer:
    """Return the tokenizer; `media_tokens` are the special tokens a model marks its images, videos or sounds with.

    Training is deterministic: the same corpus and sizes give the same merges in the same order.
    """
    special = [AddedToken(token, special=True, normalized=False) for token in (*CONTROL_TOKENS, *media_tokens)]
    markup = [AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(special) - len(markup),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS.splitlines(keepends=True), trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(markup)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, "the corpus is too short for the vocabulary"
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`. `max_length` is the model's context in tokens."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "bos_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
