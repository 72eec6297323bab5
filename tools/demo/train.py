"""`python -m tools.demo.train`: train the demo model's weights. Seeded, resumable, less than an hour on two cores.

Three parts. `see`: the vision tower learns to say, at each place of a picture, the code of the figure whose middle is
there, which teaches far more per picture than an answer would. `answer`, beside it on the other core: the language
model learns to answer from those codes, without pictures. `both`: the two together. Pictures are always seen as 4 x 4
tokens, whatever their size, and all of one batch are one tensor: no padding, no loop over pictures.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from serve_app.demo.build import write_demo_files
from serve_app.demo.drawing import COLOURS, SHAPES, Figure
from tools.demo.examples import KINDS, Example, Kind, random_example

SIDE = 112
PLACES = 4  # tokens along a side
SAVE_EVERY = 100
START = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"


class Trainee(torch.nn.Module):
    """The model, and the heads that its vision tower is taught with and that are thrown away."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.model = Qwen2_5_VLForConditionalGeneration(config)
        self.register_buffer("colours", torch.randn(len(COLOURS) + 1, config.text_config.hidden_size) / 2)
        self.register_buffer("shapes", torch.randn(len(SHAPES) + 1, config.text_config.hidden_size) / 2)
        self.corner = torch.nn.Linear(config.vision_config.hidden_size, len(SHAPES) + 1)
        self.which = torch.nn.Linear(config.text_config.hidden_size, 2)
        self.so_far = torch.nn.Linear(config.text_config.hidden_size, 5)
        layers = config.text_config.num_hidden_layers
        for name, module in self.model.named_modules():
            if isinstance(module, torch.nn.Linear):
                last = name.endswith(("o_proj", "down_proj", "attn.proj"))
                torch.nn.init.normal_(module.weight, std=module.in_features**-0.5 / (math.sqrt(layers) if last else 1))
        torch.nn.init.normal_(self.model.lm_head.weight, std=0.02)
        torch.nn.init.normal_(self.model.model.language_model.embed_tokens.weight, std=0.5)
        with torch.no_grad():
            self.model.model.visual.patch_embed.proj.weight.copy_(cosines(config.vision_config))

    def see(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures [n, 64, 588], patches in the processor's order, to tokens [n, 16, hidden], and what is known of the
        patches after two blocks: `visual.forward` for pictures of one size that fit into one window."""
        visual = self.model.model.visual
        pictures, patches, _ = pixels.shape
        weight = visual.patch_embed.proj.weight.sum(2).flatten(1)  # a still picture is the same frame twice
        hidden = functional.linear(pixels, weight)
        block, inner = torch.arange(PLACES), torch.arange(2)
        rows, columns, down, right = torch.meshgrid(block, block, inner, inner, indexing="ij")
        positions = torch.stack([(rows * 2 + down).flatten(), (columns * 2 + right).flatten()], 1)
        cos, sin = visual.rotary_pos_emb(hidden, positions)
        halfway = hidden
        for index, layer in enumerate(visual.blocks):
            attention = layer.attn
            query, key, value = (
                attention.qkv(layer.norm1(hidden))
                .reshape(pictures, patches, 3, attention.num_heads, -1)
                .permute(2, 0, 3, 1, 4)
            )
            mixed = functional.scaled_dot_product_attention(rotate(query, cos, sin), rotate(key, cos, sin), value)
            hidden = hidden + attention.proj(mixed.transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.norm2(hidden))
            if index == 1:
                halfway = hidden
        return visual.merger(hidden).reshape(pictures, PLACES * PLACES, -1), halfway

    def losses(self, part: str, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        """What a part of the training makes smaller, and figures to watch."""
        if part == "answer":  # without a vision tower: the codes it is to learn, and noise
            code = self.code(batch["places"])
            loss, right = self.answer_loss(code + 0.3 * torch.randn_like(code), batch)
            return loss, {"answer loss": loss.item(), "right": right.item()}
        seen, halfway = self.see(batch["pixels"])
        seen = seen.float()
        loss, right = self.see_loss(seen, batch["places"])
        corners = torch.tensor([0.3] + [1.0] * len(SHAPES))
        corner_loss = functional.cross_entropy(self.corner(halfway).float().flatten(0, 1), batch["corners"], corners)
        loss = loss + corner_loss
        now = {"see loss": loss.item(), "corners": corner_loss.item(), "seen": right.item()}
        if part == "both":
            answer_loss, right = self.answer_loss(seen, batch)
            loss = 0.3 * loss + answer_loss
            now |= {"answer loss": answer_loss.item(), "right": right.item()}
        return loss, now

    def code(self, places: torch.Tensor) -> torch.Tensor:
        """What the vision tower is to say about places with these labels."""
        return self.colours[places[..., 0]] + self.shapes[places[..., 1]]

    def see_loss(self, seen: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How far the seen tokens are from their codes, and the share of figures seen right."""
        some = places[..., 0] > 0
        loss = functional.mse_loss(seen[some], self.code(places)[some]) + functional.mse_loss(
            seen[~some], self.code(places)[~some]
        )
        right = torch.ones(some.sum(), dtype=torch.bool)
        for codes, labels in zip((self.colours, self.shapes), places.unbind(-1), strict=True):
            logits = (seen @ codes.T).float() / 8
            weight = torch.ones(len(codes))
            weight[0] = 0.15  # most places have none
            loss = loss + functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight)
            right &= logits[some].argmax(-1) == labels[some]
        return loss, right.float().mean()

    def answer_loss(self, seen: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """How wrong the answers' tokens are, and the share of tokens that are right. On the way, every token of a picture
        is asked of which picture it is, and how many figures there have been in it so far."""
        language = self.model.model.language_model
        embeds = language.embed_tokens(batch["ids"])
        if seen.numel():
            embeds = embeds.masked_scatter(batch["is_picture"].unsqueeze(-1), seen.flatten(0, 1))
        states = language(
            inputs_embeds=embeds, position_ids=batch["positions"], use_cache=False, output_hidden_states=True
        )
        hidden, pictures = states.last_hidden_state, batch["is_picture"]
        which = self.which(states.hidden_states[1][pictures]).float()
        so_far = self.so_far(states.hidden_states[2][pictures]).float()
        along = functional.cross_entropy(which, batch["which"]) + functional.cross_entropy(so_far, batch["so far"])
        before = batch["labels"].roll(-1, 1)
        before[:, -1] = -100
        asked = before != -100
        logits = self.model.lm_head(hidden[asked]).float()
        right = (logits.argmax(-1) == before[asked]).float().mean()
        return functional.cross_entropy(logits, before[asked]) + 0.3 * along, right


def cosines(vision: Any) -> torch.Tensor:
    """Where the patches' projection starts: the lowest cosines over a patch, per channel, as in JPEG. The mean is kept
    small, or the light ground would drown the edges, and figures would be learnt several times slower."""
    size = vision.patch_size
    steps = torch.arange(size)
    waves = torch.cos(math.pi * (steps + 0.5) * steps[:, None] / size) * (2 / size) ** 0.5
    pairs = sorted(((down, right) for down in range(size) for right in range(size)), key=lambda pair: (sum(pair), pair))
    weight = torch.zeros(vision.hidden_size, 3, vision.temporal_patch_size, size, size)
    for index in range(vision.hidden_size):
        down, right = pairs[index // 3]
        gain = 0.2 if index >= 3 else 0.03
        weight[index, index % 3] = gain * torch.outer(waves[down], waves[right]) / vision.temporal_patch_size
    return weight


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat((-second, first), -1) * sin


def patches(pictures: Sequence[Any], mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Pictures of SIDE pixels as the processor cuts them, [n, 64, 588]."""
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).float() / 255
    pixels = (pixels - torch.tensor(mean)) / torch.tensor(std)
    cut = pixels.reshape(-1, PLACES, 2, 14, PLACES, 2, 14, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    return cut.reshape(len(pictures), PLACES * PLACES * 4, -1)


def places(figures: Sequence[Figure]) -> np.ndarray[Any, Any]:
    """For each token of a picture, the colour and shape of the figure whose middle it has; 0 is none."""
    labels = np.zeros((PLACES, PLACES, 2), np.int64)
    for figure in figures:
        colour, shape = list(COLOURS).index(figure.colour), SHAPES.index(figure.shape)
        labels[int(figure.y * PLACES), int(figure.x * PLACES)] = colour + 1, shape + 1
    return labels.reshape(-1, 2)


def corners(figures: Sequence[Figure]) -> np.ndarray[Any, Any]:
    """For each patch, in the processor's order, the shape of the figure with a corner there, or a circle's line; 0 is
    none. Angles and arcs are what tells shapes apart, and there are many in a picture."""
    side = 2 * PLACES
    labels = np.zeros((side, side), np.int64)
    for figure in figures:
        around = np.linspace(0, 2 * math.pi, 24)
        circle = [
            (figure.x + figure.radius * math.cos(turn), figure.y + figure.radius * math.sin(turn)) for turn in around
        ]
        for x, y in circle if figure.shape == "circle" else figure.outline(1):
            labels[int(y * side), int(x * side)] = SHAPES.index(figure.shape) + 1
    return labels.reshape(PLACES, 2, PLACES, 2).transpose(0, 2, 1, 3).flatten()


def encode(tokenizer: Tokenizer, example: Example, picture_first: bool) -> tuple[list[int], list[Any], list[int]]:
    """Token ids, positions (time, row, column) and labels of one conversation."""
    ids: list[int] = []
    labels: list[int] = []
    positions: list[Any] = []
    now = 0

    def text(string: str, learnt: bool = False) -> None:
        nonlocal now
        tokens = tokenizer.encode(string).ids
        ids.extend(tokens)
        labels.extend(tokens if learnt else [-100] * len(tokens))
        positions.extend((now + step,) * 3 for step in range(len(tokens)))
        now += len(tokens)

    def pictures() -> None:
        nonlocal now
        for _ in example.figures:
            text("<|vision_start|>")
            ids.extend(tokenizer.encode("<|image_pad|>").ids * PLACES**2)
            labels.extend([-100] * PLACES**2)
            positions.extend((now, now + row, now + column) for row in range(PLACES) for column in range(PLACES))
            now += PLACES
            text("<|vision_end|>")

    for index, (question, answer) in enumerate(example.turns):
        text(START if index == 0 else "\n<|im_start|>user\n")
        if index == 0 and picture_first:
            pictures()
        text(question)
        if index == 0 and not picture_first:
            pictures()
        text("<|im_end|>\n<|im_start|>assistant\n")
        text(answer + "<|im_end|>", learnt=True)
    return ids, positions, labels


def make_batch(
    tokenizer: Tokenizer, kinds: Sequence[Kind], random: np.random.Generator, vision: dict[str, Any], draw: bool
) -> dict[str, torch.Tensor]:
    """Conversations of these kinds as tensors, padded at the end."""
    examples = [random_example(random, kind, SIDE if draw else 0, most_turns=2) for kind in kinds]
    rows = [encode(tokenizer, example, random.random() < 0.9) for example in examples]
    width = max(len(ids) for ids, _, _ in rows)
    ids = np.zeros((len(rows), width), np.int64)
    labels = np.full((len(rows), width), -100, np.int64)
    positions = np.zeros((3, len(rows), width), np.int64)
    for index, (tokens, where, learnt) in enumerate(rows):
        ids[index, : len(tokens)] = tokens
        labels[index, : len(tokens)] = learnt
        positions[:, index, : len(tokens)] = np.array(where).T
    pictures = [picture for example in examples for picture in example.pictures]
    drawn = [places(figures) for example in examples for figures in example.figures]
    order = [index for example in examples for index in range(len(example.figures))]
    ids_tensor, where = torch.from_numpy(ids), torch.from_numpy(np.stack(drawn))
    batch = {
        "ids": ids_tensor,
        "labels": torch.from_numpy(labels),
        "positions": torch.from_numpy(positions),
        "is_picture": ids_tensor == tokenizer.token_to_id("<|image_pad|>"),
        "places": where,
        "which": torch.tensor(order).repeat_interleave(PLACES**2),
        "so far": (where[..., 0] > 0).cumsum(1).flatten(),
    }
    if draw:
        batch["pixels"] = patches(pictures, vision["image_mean"], vision["image_std"])
        batch["corners"] = torch.from_numpy(
            np.concatenate([corners(figures) for example in examples for figures in example.figures])
        )
    return batch


PARTS = {
    # steps, batch, rate, shares of the kinds
    "see": (4000, 48, 2e-3, (0.4, 0.6, 0.0, 0.0)),
    "answer": (4000, 32, 2e-3, (0.1, 0.2, 0.68, 0.02)),
    "both": (2500, 32, 7e-4, (0.2, 0.25, 0.53, 0.02)),
}


def train(folder: Path, part: str, seed: int, threads: int) -> None:
    """Train one part to its end; its checkpoint is `<part>.pt`, from which it goes on when it was cut off."""
    steps, size, rate, share = PARTS[part]
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    files = folder / f"model-{part}"
    files.mkdir(parents=True, exist_ok=True)
    write_demo_files(files)
    tokenizer = Tokenizer.from_file(str(files / "tokenizer.json"))
    vision = json.loads((files / "preprocessor_config.json").read_text())
    trainee = Trainee(AutoConfig.from_pretrained(files))
    optimizer = torch.optim.AdamW(trainee.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.02)
    checkpoint, step = folder / f"{part}.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        trainee.load_state_dict(saved["trainee"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    elif part == "both":
        see, answer = (torch.load(folder / f"{other}.pt")["trainee"] for other in ("see", "answer"))
        trainee.load_state_dict(see | {name: value for name, value in answer.items() if ".visual." not in name})

    def save_all() -> None:
        content = {"trainee": trainee.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(content, checkpoint.with_suffix(".new"))
        os.replace(checkpoint.with_suffix(".new"), checkpoint)
        export(trainee.model, files / "model.safetensors")

    columns = (
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task(part, total=steps, completed=step, state="")
        averages: dict[str, float] = {}
        while step < steps:
            random = np.random.default_rng((seed, list(PARTS).index(part), step))
            kinds: list[Kind] = [KINDS[index] for index in random.choice(len(KINDS), size, p=share)]
            if part == "see" and step < steps / 5:
                kinds = ["one"] * size  # any look at a picture with one figure helps to tell its shape
            batch = make_batch(tokenizer, kinds, random, vision, draw=part != "answer")
            warm, cool = min(1, (step + 1) / 100), min(1, 2 * (1 - step / steps))
            for group in optimizer.param_groups:
                group["lr"] = rate * warm * (0.02 + 0.98 * cool)
            torch.manual_seed(int(random.integers(2**31)))  # so that a run that was cut off goes on the same
            with torch.autocast("cpu", torch.bfloat16):  # a third of the time where the CPU multiplies such numbers
                loss, now = trainee.losses(part, batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
            optimizer.step()
            step += 1
            averages = {name: 0.95 * averages.get(name, value) + 0.05 * value for name, value in now.items()}
            state = " ".join(f"{name} {value:.4f}" for name, value in averages.items())
            progress.update(bar, completed=step, state=state)
            if step % 25 == 0:
                progress.console.print(step, state)
            if step % SAVE_EVERY == 0 or step == steps:
                save_all()


def export(model: torch.nn.Module, path: Path) -> None:
    """The weights in bfloat16, by the names of Qwen's checkpoints."""

    def name(key: str) -> str:
        return key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")

    weights = {name(key): value.to(torch.bfloat16).contiguous() for key, value in model.state_dict().items()}
    save_file(weights, path, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.demo.train", description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="where checkpoints and models go; an unfinished run goes on from there"
    )
    parser.add_argument("--part", choices=PARTS, help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="of the last part; the first two have one each")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.part:
        train(options.folder, options.part, options.seed, options.threads)
        return
    command = [sys.executable, "-m", "tools.demo.train", str(options.folder), "--seed", str(options.seed)]
    with (options.folder / "answer.log").open("ab") as log:
        beside = subprocess.Popen([*command, "--part", "answer", "--threads", "1"], stdout=log)
    train(options.folder, "see", options.seed, 1)
    if beside.wait():
        raise SystemExit(f"the part `answer` failed, see {options.folder / 'answer.log'}")
    train(options.folder, "both", options.seed, options.threads)
    print(f"{options.folder / 'model-both'} is the model; `python -m tools.demo.measure` it")


if __name__ == "__main__":
    main()
