"""The built-in models, made on the spot, never downloaded, so that `serve run` and the tests work without a GPU and
without a network: tiny Qwen2.5-VLs with the same tokenizer and chat template.

`demo` has 1.7 million weights that came with the package and answers questions about drawn figures (see CARD.md).
`demo-random` has 850 thousand random ones. It answers in real words that mean nothing, but its greedy answers depend on
every token and every pixel of the prompt, and end only where they are cut: what tests compare and benchmarks count.
"""

from pathlib import Path

from serve_app.demo.cache import build_once, default_root, version_of

__all__ = ["ensure_demo_model"]


def ensure_demo_model(root: Path | None = None, name: str = "demo") -> Path:
    """Return the folder of a built-in model, `<root>/<name>-<version>`, building it first if it is not there.

    `root` defaults to `$XDG_CACHE_HOME/epd-serve` or `~/.cache/epd-serve`. Building takes 0.1 s and 4 MB;
    any number of processes may call this at once. The version is a hash of the recipe's sources and of the trained
    weights, so a changed recipe gets a folder of its own.
    """

    def build(folder: Path) -> None:
        from serve_app.demo import build as recipes  # numpy and tokenizers: only when there is work to do

        {"demo": recipes.build_demo_model, "demo-random": recipes.build_random_model}[name](folder)

    version = version_of(Path(__file__).with_name("weights.safetensors"))
    return build_once((root or default_root()) / f"{name}-{version}", build)
