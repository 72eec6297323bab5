"""``python -m serve_app``: ``ask`` a running server or have it answer a ``batch``, see its ``status``; ``serve
[serve_config.yaml]`` is `make serve`; ``ready [serve_config.yaml]`` waits beside a `serve run` until the application can
serve, and says what to try."""

import argparse
import signal
import sys
import time
from pathlib import Path

from serve_app.cli.ready import DEFAULT_URL, says_ready


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serve_app", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="`serve run`, until Ctrl-C, SIGTERM, or until a stage cannot start")
    ready = commands.add_parser("ready", help="wait until every stage can serve, and say what to try")
    for command in (serve, ready):
        command.add_argument("config", nargs="?", default="serve_config.yaml", type=Path)
    ask = commands.add_parser("ask", help="stream the answer to a question about pictures, audio or video")
    ask.add_argument("question")
    ask.add_argument("files", nargs="*", type=Path, help="what it is about")
    ask.add_argument("--max-tokens", type=int, default=256)
    ask.add_argument("--timing", action="store_true", help="print the steps of the request and how long each took")
    batch = commands.add_parser("batch", help="answer a file of requests (OpenAI's batch format) beside other traffic")
    batch.add_argument("requests", type=Path)
    batch.add_argument("answers", type=Path, help="what it has already is not asked again")
    batch.add_argument("--at-a-time", type=int, default=8)
    status = commands.add_parser("status", help="stages, replicas, queues and health")
    for command in (ask, batch, status):
        command.add_argument("--url", default=DEFAULT_URL, help="where the server listens; %(default)s")
    return parser


def main() -> int:
    """Run the command of ``sys.argv``. Returns its exit status."""
    parser = command_line()
    arguments = parser.parse_args()
    if arguments.command == "batch":
        from serve_app.cli import batch

        return batch.run(arguments)
    if arguments.command in ("ask", "status"):
        from serve_app.cli import client

        return client.run(arguments)
    if not arguments.config.is_file():
        parser.error(f"there is no {arguments.config}")
    began = time.time()
    if arguments.command == "ready":
        while not says_ready(arguments.config, began):
            time.sleep(0.5)
        return 0
    # Importing Ray takes seconds, and process 1 of a container gets only the signals that it handles.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    from serve_app.launch import fork_server  # it loads vLLM while Ray starts

    forks = fork_server.start(arguments.config)
    try:
        from serve_app.cli import run

        return run.run(arguments.config, lambda: says_ready(arguments.config, began))
    finally:
        if forks is not None:
            forks.end()
