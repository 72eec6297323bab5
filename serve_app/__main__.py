"""``python -m serve_app``: the commands of ``cli.main``."""

import sys

from serve_app.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
