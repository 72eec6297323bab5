"""The demo model from the command line: `make` its folder, `draw` a picture that it can answer about."""

import argparse
import sys
from pathlib import Path

from serve_app.demo import ensure_demo_model


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m serve_app.demo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="make the model's folder and print where it is")
    make.add_argument("path", nargs="?", type=Path, help="folder to keep it in (default: the user's cache)")
    draw = commands.add_parser("draw", help='write a PNG to standard output: draw "red circle" > picture.png')
    draw.add_argument("figures", nargs="+", help='up to four, each "COLOUR SHAPE"')
    options = parser.parse_args()
    if options.command == "make":
        print(ensure_demo_model(options.path))
        return
    from serve_app.demo.drawing import draw_named

    try:
        picture = draw_named(options.figures)
    except ValueError as error:
        draw.error(str(error))
    picture.save(sys.stdout.buffer, "PNG")


if __name__ == "__main__":
    main()
