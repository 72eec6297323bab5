"""`python -m serve_app.demo [PATH]`: make the demo model under PATH (default: the cache) and print its folder."""

import argparse
from pathlib import Path

from serve_app.demo import ensure_demo_model


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m serve_app.demo", description="Make the built-in model.")
    parser.add_argument("path", nargs="?", type=Path, help="folder to keep it in (default: the user's cache)")
    print(ensure_demo_model(parser.parse_args().path))


if __name__ == "__main__":
    main()
