"""A question becomes parts of a message; what a server tells becomes a table."""

import io
import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from serve_app.cli import client
from serve_app.cli.main import main
from serve_app.cli.ready import at, says_ready


def shown(table: Table) -> list[str]:
    out = Console(file=io.StringIO(), width=160)
    out.print(table)
    return [line.rstrip() for line in out.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_files_go_before_the_question_as_what_their_names_say(tmp_path: Path) -> None:
    for name in ("a.png", "b.wav", "c.mp4"):
        (tmp_path / name).write_bytes(b"x")
    parts = client.content("what?", [tmp_path / name for name in ("a.png", "b.wav", "c.mp4")])
    assert [part["type"] for part in parts] == ["image_url", "audio_url", "video_url", "text"]
    assert parts[0]["image_url"]["url"] == "data:image/png;base64,eA=="


@pytest.mark.parametrize(("name", "words"), [("notes.txt", "no image, audio or video"), ("gone.png", "cannot be read")])
def test_file_that_cannot_be_sent_is_named(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(client.Unusable, match=words) as caught:
        client.content("what?", [tmp_path / name])
    assert name in str(caught.value)


def test_waterfall_has_the_steps_one_after_the_other_with_their_replicas() -> None:
    headers = {"server-timing": 'render;dur=10.0, encode;dur=30.0;desc="e1 e2", first_token;dur=20.0;desc="d1"'}
    lines = shown(client.waterfall(headers, first_token_s=0.06, stream_s=0.02))
    assert [line.split()[0] for line in lines[1:]] == ["render", "encode", "first", "tokens"]
    assert "30.0" in lines[2] and lines[2].endswith("e1 e2")
    starts = [line.index("█") for line in lines[1:]]
    assert starts == sorted(starts) and len(set(starts)) == 4
    assert lines[2].count("█") == pytest.approx(client.BAR_WIDTH * 30 / 80, abs=1)


def test_waterfall_has_a_row_per_item_and_names_transfers() -> None:
    told = 'encode;dur=30.0;desc="e1 e2", ec_transfer;dur=10.0, kv_transfer;dur=40.0, encode.1;dur=10.0;desc="e1", '
    lines = shown(client.waterfall({"server-timing": told + 'encode.2;dur=30.0;desc="e2"'}, 0.08, 0.0))
    first, second, ec, kv, _ = lines[1:]
    assert [line[1:12].strip() for line in (first, second, ec, kv)] == [
        "encode 1",
        "encode 2",
        "EC transfer",
        "KV transfer",
    ]
    assert first.index("█") == second.index("█") and first.count("█") < second.count("█") < kv.count("█")
    assert ec.index("█") > second.rindex("█")


def test_waterfall_of_another_server_has_what_the_client_saw() -> None:
    lines = shown(client.waterfall({}, first_token_s=0.06, stream_s=0.02))
    assert [line.split()[0] for line in lines[1:]] == ["first", "tokens"]


def test_waterfall_tells_of_the_failure_ladder() -> None:
    assert "decode-again" in "\n".join(shown(client.waterfall({"x-epd-rungs": "decode-again"}, 1, 1)))


def test_status_shows_every_replica_its_wait_and_those_that_come_and_go() -> None:
    p1 = {"replica": "p1", "calls": 3.0, "outstanding": 250.0, "rate": 100.0, "kv_use": 0.5}
    p2 = {"replica": "p2", "calls": 0.0, "outstanding": 0.0, "rate": 0.0, "kv_use": 0.0}
    gone = {"state": "no replica (UPDATING)", "unit": "media tokens", "loads": []}
    lines = shown(
        client.status_table(
            [
                {"stage": "encoder", "replicas": {"STARTING": 1}} | gone,
                {
                    "stage": "prefill",
                    "state": "healthy",
                    "replicas": {"RUNNING": 2, "STOPPING": 1},
                    "unit": "prompt tokens",
                    "loads": [p1, p2],
                },
            ]
        )
    )
    assert "none" in lines[1] and "no replica (UPDATING)" in lines[1] and "1 starting" in lines[2]
    assert "p1" in lines[3] and "250 prompt tokens" in lines[3] and "2.50" in lines[3] and "50%" in lines[3]
    assert "p2" in lines[4] and "?" in lines[4] and "1 stopping" in lines[5]


CHUNK = (
    b'data: {"id": "1", "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": "half"}}]}\n\n'
)
FAILED = b'data: {"error": {"message": "The decode stage lost the replica", "code": 503}}\n\n'


class HalfAnAnswer(BaseHTTPRequestHandler):
    end = b""

    def do_GET(self) -> None:
        body = b'{"object": "list", "data": [{"id": "demo", "object": "model", "created": 1, "owned_by": "x"}]}'
        self.answer("application/json", len(body), body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.answer("text/event-stream", len(CHUNK + FAILED), CHUNK + self.end)

    def answer(self, kind: str, length: int, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.parametrize(
    ("end", "words"), [(FAILED, "ends early: The decode stage lost the replica"), (b"", "The connection broke")]
)
def test_answer_that_ends_early_is_shown_with_the_reason(end: bytes, words: str) -> None:
    out = Console(file=io.StringIO(), width=160)
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HalfAnAnswer,), {"end": end})) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(client.Unusable, match=words):
            client.ask(f"http://127.0.0.1:{server.server_port}", "who?", [], 16, False, out)
        server.shutdown()
    assert out.file.getvalue() == "half"  # type: ignore[attr-defined]


def test_no_server_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for command in (["status"], ["ask", "who?"]):
            patch.setattr("sys.argv", ["serve_app", *command, "--url", "http://127.0.0.1:9"])
            assert main() == 1
            assert "Start a server with `make serve`" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "ready"])
def test_config_that_is_not_there_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setattr("sys.argv", ["serve_app", command, "nowhere.yaml"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.endswith("there is no nowhere.yaml\n")


TYPES = """
import mimetypes, sys
mimetypes.knownfiles.clear()  # as in a container without /etc/mime.types
from pathlib import Path
from serve_app.cli.client import content
for name in sys.argv[1:]:
    Path(name).touch()
    print(content("?", [Path(name)])[0]["type"])
"""


def test_common_media_is_known_where_the_system_has_no_list_of_types(tmp_path: Path) -> None:
    kinds = {
        "webp": "image",
        "png": "image",
        "flac": "audio",
        "ogg": "audio",
        "m4a": "audio",
        "mkv": "video",
        "mp4": "video",
    }
    names = [str(tmp_path / f"file.{extension}") for extension in kinds]
    done = subprocess.run([sys.executable, "-c", TYPES, *names], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [f"{kind}_url" for kind in kinds.values()]


class Guarded(BaseHTTPRequestHandler):
    """A server that is ready, and tells its model to who has the key."""

    prefix = ""

    def do_GET(self) -> None:
        path = self.path.removeprefix(self.prefix)
        known = path == "/health" or self.headers["Authorization"] == "Bearer secret"
        here = self.path.startswith(self.prefix)
        self.send_response((200 if known else 401) if here else 404)
        self.end_headers()
        body = {"ingress": "healthy", "decode": "healthy"} if path == "/health" else {"data": [{"id": "m"}]}
        self.wfile.write(json.dumps(body if known and here else {}).encode())

    def log_message(self, *args: object) -> None: ...


@pytest.mark.parametrize("of_the_config", [True, False])
def test_what_to_try_runs_here_and_has_the_key_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], of_the_config: bool
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if not of_the_config:
        monkeypatch.setenv("VLLM_API_KEY", "secret")
    with HTTPServer(("127.0.0.1", 0), Guarded) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = tmp_path / "serve_config.yaml"
        args = {"api": {"api_key": "secret"}} if of_the_config else {}
        http = {"host": "127.0.0.1", "port": server.server_port}
        config.write_text(json.dumps({"http_options": http, "applications": [{"args": args}]}))
        monkeypatch.chdir(Path(sys.executable).parents[1])
        assert says_ready(config, time.time())
        server.shutdown()
        url = f"http://127.0.0.1:{server.server_port}"
    told = capsys.readouterr().out
    assert "model: m;" in told and '-H "Authorization: Bearer $VLLM_API_KEY"' in told
    assert f"  bin/{Path(sys.executable).name} -m serve_app status --url {url}" in told


@pytest.mark.parametrize("route_prefix", ["/epd", None])
def test_server_below_a_prefix_is_ready_there_and_all_that_is_told_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], route_prefix: str | None
) -> None:
    prefix = route_prefix or ""
    with HTTPServer(("127.0.0.1", 0), type("Below", (Guarded,), {"prefix": prefix})) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = tmp_path / "serve_config.yaml"
        application = {"args": {"api": {"api_key": "secret"}}} | ({"route_prefix": prefix} if prefix else {})
        http = {"host": "127.0.0.1", "port": server.server_port}
        config.write_text(json.dumps({"http_options": http, "applications": [application]}))
        assert says_ready(config, time.time())
        server.shutdown()
    url = f"http://127.0.0.1:{server.server_port}{prefix}"
    told = capsys.readouterr().out
    for line in (f"{url}/v1   (model: m;", f"curl {url}/v1/chat", f"{url}/ ", f"{url}/docs", f"{url}/health"):
        assert line in told
    assert f"status --url {url}\n" in told and f"ask --url {url} --timing" in told


def test_what_to_try_of_a_server_that_pools_is_an_embedding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with HTTPServer(("127.0.0.1", 0), Guarded) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        config = tmp_path / "serve_config.yaml"
        args = {"api": {"api_key": "secret"}, "engine_args": {"runner": "pooling"}}
        http = {"host": "127.0.0.1", "port": server.server_port}
        config.write_text(json.dumps({"http_options": http, "applications": [{"args": args}]}))
        assert says_ready(config, time.time())
        server.shutdown()
    told = capsys.readouterr().out
    assert "/v1/embeddings" in told and "max_tokens" not in told
    assert "serve_app ask" not in told and "draw pictures" not in told, "it has neither chats nor the page"


def test_what_to_try_at_the_usual_address_needs_no_url() -> None:
    assert at("http://127.0.0.1:8000") == ""
    assert at("http://127.0.0.1:8000/epd") == " --url http://127.0.0.1:8000/epd"
