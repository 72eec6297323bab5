"""The built-in model: a Qwen2.5-VL of 850 thousand random weights, made on the spot, never downloaded.

It exists so that `serve run` and the tests work on a machine without a GPU and without a network. It answers in
real words that mean nothing, but its greedy answers depend on every token and every pixel of the prompt, so a lost
embedding or a wrong KV block shows as different text.
"""

from pathlib import Path

from serve_app.demo.cache import build_once, default_root, version_of

__all__ = ["ensure_demo_model"]


def ensure_demo_model(root: Path | None = None) -> Path:
    """Return the folder of the demo model, `<root>/demo-<version>`, building it first if it is not there.

    `root` defaults to `$XDG_CACHE_HOME/epd-serve` or `~/.cache/epd-serve`. Building takes 0.1 s and 3.5 MB;
    any number of processes may call this at once. The version is a hash of the recipe's sources, so a changed recipe
    gets a folder of its own.
    """

    def build(folder: Path) -> None:
        from serve_app.demo.build import build_demo_model  # numpy and tokenizers: only when there is work to do

        build_demo_model(folder)

    return build_once((root or default_root()) / f"demo-{version_of()}", build)
