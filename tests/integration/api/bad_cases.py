"""Requests that must be refused, as a table: mistakes and attacks of clients. No engine may die of one."""

import base64
import gzip
import json
import struct
import zlib
from typing import Any, NamedTuple

from PIL import Image

from tools.harness.cases import LONG, WEATHER, chat, completion, image, text, video
from tools.harness.media import data_url, picture, png, video_url, wav
from tools.harness.servers import REPOSITORY

STREAMS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")


class Bad(NamedTuple):
    path: str
    body: Any
    """What is sent as JSON; bytes are sent as they are."""
    mentions: str
    """What the message must say."""
    status: int = 400
    headers: dict[str, str] = {"content-type": "application/json"}  # noqa: RUF012


def asked(mentions: str, status: int = 400, **options: Any) -> Bad:
    """A good chat request with options that are not."""
    return Bad(*chat(text("Hi"), **options), mentions, status)


def completed(mentions: str, prompt: Any = "Hi", **options: Any) -> Bad:
    return Bad(*completion(prompt, **options), mentions)


def said(mentions: str, *messages: Any) -> Bad:
    return Bad(*chat(messages=list(messages)), mentions)


def shown(mentions: str, *parts: Any, status: int = 400) -> Bad:
    return Bad(*chat(text("Hi"), *parts), mentions, status)


def image_at(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def video_at(url: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def raw(body: bytes, mentions: str = "JSON", path: str = "/v1/chat/completions", kind: str = "application/json") -> Bad:
    return Bad(path, body, mentions, headers={"content-type": kind})


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, pixels: bytes) -> bytes:
    """A PNG that declares a size, whatever its pixels are."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def gif(frames: int) -> bytes:
    """An animation of frames that are one pixel each."""
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    frame = b"\x21\xf9\x04\0\0\0\0\0" + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02D\x01\0"
    return head + frame * frames + b"\x3b"


PIXEL = zlib.compress(b"\0\xff\0\0")
BROKEN = "in no known format, or broken"
FORBIDDEN = "no address that is open to this server"
EXAMPLES = REPOSITORY / "examples"


def schema(of: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": of}}}


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        value = {"type": "object", "properties": {"x": value}}
    return value


GOOD_CHAT = json.dumps(chat(text("Hi"))[1]).encode()

BODIES: dict[str, Bad] = {
    "JSON cut short": raw(b'{"model": '),
    "nothing": raw(b"", "required"),
    "no object": raw(b"[1, 2]", "dictionary"),
    "null": raw(b"null", "required"),
    "a string": raw(b'"Hi"', "dictionary"),
    "text, not JSON": raw(b"Hello"),
    "two objects": raw(GOOD_CHAT + GOOD_CHAT),
    "a trailing comma": raw(GOOD_CHAT[:-1] + b",}"),
    "bytes that are not UTF-8": raw(GOOD_CHAT.replace(b"Hi", b"\xff\xfe\xfd"), "parsing the body"),
    "half of a surrogate pair": raw(GOOD_CHAT.replace(b"Hi", rb"\ud800"), "TextEncodeInput"),
    "a body in gzip": raw(gzip.compress(GOOD_CHAT), "parsing the body"),
    "brackets nested 100,000 deep": raw(b"[" * 100_000 + b"]" * 100_000, "parsing the body"),
    "objects nested 100,000 deep": raw(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "parsing the body"),
    "NaN": raw(GOOD_CHAT.replace(b'"temperature": 0', b'"temperature": NaN'), "temperature"),
    "Infinity": raw(GOOD_CHAT.replace(b'"temperature": 0', b'"temperature": Infinity'), "temperature"),
    "a number beyond floats": raw(GOOD_CHAT.replace(b'"temperature": 0', b'"temperature": 1e999'), "temperature"),
    "a number of 5,000 digits": raw(
        GOOD_CHAT.replace(b'"max_tokens": 16', b'"max_tokens": ' + b"9" * 5000), "parsing the body"
    ),
    "an integer beyond 64 bits": raw(
        GOOD_CHAT.replace(b'"max_tokens": 16', b'"max_tokens": ' + b"9" * 30), "max_tokens"
    ),
    "form data": raw(b"model=demo&messages=Hi", "application/json", kind="application/x-www-form-urlencoded"),
    "XML": raw(b"<chat/>", "application/json", kind="text/xml"),
    "no completions object": raw(b"[]", "dictionary", "/v1/completions"),
    "no responses object": raw(b"3", "dictionary", "/v1/responses"),
    "no messages object": raw(b'{"model": ', "JSON", "/v1/messages"),
    "no tokenize object": raw(b"{", "JSON", "/tokenize"),
    "no detokenize object": raw(b"{", "JSON", "/detokenize"),
    "too large a body": Bad("/v1/chat/completions", b" " * (5 << 20), "larger than", 413),
}

PARAMETERS: dict[str, Bad] = {
    "unknown model": asked("nope", 404, model="nope"),
    "a LoRA adapter as model": asked("adapter", 404, model="demo/adapter"),
    "a model of a wrong type": asked("model", model=7),
    "n=0": asked("n", n=0),
    "a negative n": asked("n", n=-1),
    "n of a billion": asked("n", n=10**9),
    "n more than a server runs": asked("n", n=16384),
    "max_tokens=0": asked("max_tokens", max_tokens=0),
    "negative max_tokens": asked("max_tokens", max_tokens=-1),
    "max_tokens that are a fraction": asked("max_tokens", max_tokens=1.5),
    "max_tokens that are a text": asked("max_tokens", max_tokens="many"),
    "too many tokens asked for": asked("max", max_tokens=100_000),
    "min_tokens above max_tokens": asked("min_tokens", min_tokens=17),
    "temperature too high": asked("temperature", temperature=9),
    "negative temperature": asked("temperature", temperature=-0.1),
    "top_p=0": asked("top_p", top_p=0),
    "top_p above 1": asked("top_p", top_p=1.1),
    "top_k below -1": asked("top_k", top_k=-2),
    "top_k that is a fraction": asked("top_k", top_k=1.5),
    "min_p above 1": asked("min_p", min_p=2),
    "presence_penalty too high": asked("presence_penalty", presence_penalty=3),
    "frequency_penalty too low": asked("frequency_penalty", frequency_penalty=-3),
    "repetition_penalty=0": asked("repetition_penalty", repetition_penalty=0),
    "more top_logprobs than the server takes": asked("logprobs", logprobs=True, top_logprobs=1000),
    "negative top_logprobs": asked("top_logprobs", logprobs=True, top_logprobs=-5),
    "top_logprobs without logprobs": asked("logprobs", logprobs=False, top_logprobs=2),
    "more prompt_logprobs than the server takes": asked("logprobs", prompt_logprobs=1000),
    "prompt_logprobs of a stream": asked("prompt_logprobs", prompt_logprobs=-7),
    "logprobs of tokens outside of the vocabulary": asked("vocab", logprobs=True, logprob_token_ids=[10**7]),
    "seed beyond 64 bits": asked("seed", seed=2**63),
    "seed of a wrong type": asked("seed", seed="lucky"),
    "logit_bias of a token outside of the vocabulary": asked("vocab", logit_bias={"10000000": 1}),
    "logit_bias of a negative token": asked("vocab", logit_bias={"-1": 1}),
    "logit_bias of a word": asked("logit_bias", logit_bias={"the": 1}),
    "logit_bias of a token beyond 64 bits": asked("64 bits", logit_bias={"9" * 30: 1}),
    "stop_token_ids outside of the vocabulary": asked("vocab", stop_token_ids=[10**7]),
    "negative stop_token_ids": asked("vocab", stop_token_ids=[-1]),
    "allowed_token_ids outside of the vocabulary": asked("vocab", allowed_token_ids=[10**7]),
    "negative allowed_token_ids": asked("vocab", allowed_token_ids=[-3]),
    "no allowed_token_ids": asked("allowed_token_ids", allowed_token_ids=[]),
    "too many bad_words": asked("bad words", bad_words=[f"word {i}" for i in range(1000)]),
    "bad_words with an empty one": asked("bad_words", bad_words=[""]),
    "an empty stop string": asked("stop", stop=[""]),
    "stop of a wrong type": asked("stop", stop=7),
    "more stop strings than a server takes": asked("stop", stop=[f"stop {i}" for i in range(100_000)]),
    "priority beyond 64 bits": asked("priority", priority=10**30),
    "a chat template of the client's": asked("chat template", chat_template="{{ messages }}"),
    "processor options": asked("mm_processor_kwargs", mm_processor_kwargs={"min_pixels": 10**12}),
    "media options": asked("media_io_kwargs", media_io_kwargs={"video": {"num_frames": 10**9}}),
    "a thinking budget without a reasoning parser": asked("thinking_token_budget", thinking_token_budget=5),
    "repetition detection out of range": asked("pattern", repetition_detection={"max_pattern_size": -1}),
    "an empty cache_salt": asked("cache_salt", cache_salt=""),
    "stream_options without a stream": Bad(*chat(text("Hi"), stream_options={"include_usage": 7}), "stream_options"),
    "a prompt truncated within its image": Bad(
        *chat(image(1), text("Hi"), truncate_prompt_tokens=3), "cannot be processed"
    ),
    "top_k beyond 64 bits": asked("64 bits", top_k=2**70, temperature=1),
    "a length penalty beyond floats": asked("length_penalty", use_beam_search=True, n=2, length_penalty=-1e300),
    "truncated to a negative length": asked("truncate_prompt_tokens", truncate_prompt_tokens=-5),
    "too many beams": asked("logprobs", use_beam_search=True, n=1000),
    "too long a prompt": Bad(*chat(text(LONG * 40)), "4096"),
    "vllm_xargs that are no object": asked("vllm_xargs", vllm_xargs=[1]),
}

MESSAGES: dict[str, Bad] = {
    "no messages": said("at least one message"),
    "messages of a wrong type": asked("messages", messages="Hi"),
    "a message that is a text": said("messages", "Hi"),
    "a message without a role": said("role", {"content": "Hi"}),
    "a role of a wrong type": said("role", {"role": 7, "content": "Hi"}),
    "content of a wrong type": said("content", {"role": "user", "content": 7}),
    "a part that is a number": said("dictionary", {"role": "user", "content": [7]}),
    "a part of an unknown type": shown("smell_url", {"type": "smell_url", "smell_url": {"url": "x"}}),
    "a part without a type": shown("type", {"smell": "x"}),
    "tools that are no list": asked("tools", tools="weather"),
    "a tool without a name": asked("name", tools=[{"type": "function", "function": {}}]),
    "a tool choice without tools": asked("tool", tool_choice="required"),
    "a tool that is not there": asked(
        "tool_choice", tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "nope"}}
    ),
    "a tool choice that is none": asked("tool_choice", tools=[WEATHER], tool_choice="perhaps"),
    "an answer to be gone on with and a new one": asked("continue", continue_final_message=True),
}

OUTPUTS: dict[str, Bad] = {
    "a JSON schema of a wrong type": asked("type must be", **schema({"type": 7})),
    "no JSON schema": asked("schema", response_format={"type": "json_schema"}),
    "a response format that is none": asked("response_format", response_format={"type": "poem"}),
    "a JSON schema nested 200 deep": asked("deep", **schema(nested(200))),
    "a JSON schema that refers to nothing": asked("/$defs/nope", **schema({"$ref": "#/$defs/nope"})),
    "a JSON schema with a broken pattern": asked("regex", **schema({"type": "string", "pattern": "("})),
    "a broken regex": asked("regex", structured_outputs={"regex": "("}),
    "a regex with a null byte": asked("NUL", structured_outputs={"regex": "a\0"}),
    "a broken grammar": asked("grammar", structured_outputs={"grammar": "root ::= ("}),
    "an empty grammar": asked("grammar", structured_outputs={"grammar": " "}),
    "a grammar without a root": asked("grammar", structured_outputs={"grammar": "other ::= 'x'"}),
    "no choices": asked("hoice", structured_outputs={"choice": []}),
    "a regex and a choice": asked("one kind", structured_outputs={"regex": "a", "choice": ["a"]}),
    "a structure that is a text": asked("wrong type", structured_outputs="regex"),
    "a structure in a list": asked("wrong type", structured_outputs=[{"regex": "a"}]),
    "no kind of structure": asked("one kind", structured_outputs={}),
    "a broken structural tag": asked("structural_tag", structured_outputs={"structural_tag": "{"}),
    "a grammar that never ends": asked("grammar", structured_outputs={"grammar": "root ::= root"}),
    "a grammar that never ends, with an image": Bad(
        *chat(text("Hi"), image(901), structured_outputs={"grammar": "root ::= root"}), "grammar"
    ),
    "a JSON schema that is itself": asked("grammar", **schema({"$ref": "#"})),
    "JSON schemas that are each other": asked(
        "grammar",
        **schema({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
    ),
    "a choice that is not allowed": asked("grammar", structured_outputs={"choice": ["a"]}, allowed_token_ids=[900]),
    "a choice of bad words": asked("grammar", structured_outputs={"choice": ["a"]}, bad_words=["a"]),
    "a JSON schema of numbers beyond 64 bits": asked("64 bits", **schema({"type": "integer", "maximum": 2**70})),
}

URLS: dict[str, Bad] = {
    name: shown(mentions, image_at(url), status=status)
    for name, mentions, status, url in (
        ("URL of an unknown scheme", "must begin with", 400, "gopher://example.com/x"),
        ("URL without a scheme", "must begin with", 400, "example.com/x.png"),
        ("JavaScript URL", "must begin with", 400, "javascript:alert(1)"),
        ("an empty URL", "is empty", 400, ""),
        ("FTP", "must begin with", 400, "ftp://8.8.8.8/x.png"),
        ("loopback", FORBIDDEN, 400, "http://127.0.0.1:1/x.png"),
        ("loopback as a name", FORBIDDEN, 400, "http://localhost:8000/health"),
        ("loopback in decimal", "no valid URL", 400, "http://2130706433/"),
        ("loopback in hexadecimal", FORBIDDEN, 400, "http://0x7f000001/"),
        ("loopback in octal", "no valid URL", 400, "http://0177.0.0.1/"),
        ("loopback cut short", "no valid URL", 400, "http://127.1/"),
        ("loopback of IPv6", FORBIDDEN, 400, "http://[::1]/"),
        ("loopback mapped into IPv6", FORBIDDEN, 400, "http://[::ffff:127.0.0.1]/"),
        ("loopback behind NAT64", FORBIDDEN, 400, "http://[64:ff9b::7f00:1]/"),
        ("loopback in full-width digits", FORBIDDEN, 400, "http://\uff11\uff12\uff17.\uff10.\uff10.\uff11/"),
        ("any address", FORBIDDEN, 400, "http://0.0.0.0/"),
        ("a private network", FORBIDDEN, 400, "http://10.0.0.1/x.png"),
        ("another private network", FORBIDDEN, 400, "http://192.168.1.1/x.png"),
        ("carrier-grade NAT", FORBIDDEN, 400, "http://100.64.0.1/x.png"),
        ("the metadata service", FORBIDDEN, 400, "http://169.254.169.254/latest/meta-data/"),
        ("the metadata service in decimal", "no valid URL", 400, "http://2852039166/latest/meta-data/"),
        ("the metadata service mapped into IPv6", FORBIDDEN, 400, "http://[::ffff:169.254.169.254]/"),
        ("the metadata service of IPv6", FORBIDDEN, 400, "http://[fd00:ec2::254]/"),
        ("link-local of IPv6", FORBIDDEN, 400, "http://[fe80::1]/"),
        ("multicast", FORBIDDEN, 400, "http://224.0.0.1/"),
        ("a host that does not exist", FORBIDDEN, 400, "http://nowhere.invalid/x.png"),
        ("a host of an empty label", FORBIDDEN, 400, "http://a..b/x.png"),
        ("no host", "names no host", 400, "http:///x.png"),
        ("a user name and a password", "user name or password", 400, "http://user:secret@8.8.8.8/x.png"),
        ("a host hidden behind a user name", "user name or password", 400, "http://8.8.8.8@127.0.0.1/x.png"),
        ("a port that is none", "no valid URL", 400, "http://example.com:99999/x.png"),
        ("a port that is a word", "no valid URL", 400, "http://example.com:http/x.png"),
        ("a bracket too few", "no valid URL", 400, "http://[::1/x.png"),
        ("a line break in the host", "no valid URL", 400, "http://127.0.0.1\r\nHost: x/"),
        ("a URL of a million characters", FORBIDDEN, 400, "http://127.0.0.1/" + "a" * 1_000_000),
        ("a host of a thousand characters", FORBIDDEN, 400, "http://" + "a" * 1000 + ".com/"),
        ("a file outside the allowed folder", "not in the folder", 400, "file:///etc/passwd"),
        ("a file of the process", "not in the folder", 400, "file:///proc/self/environ"),
        ("a device", "not in the folder", 400, "file:///dev/zero"),
        ("a file reached through ..", "not in the folder", 400, f"file://{EXAMPLES}/../README.md"),
        ("a file reached through .. in percents", "not in the folder", 400, f"file://{EXAMPLES}/%2e%2e/README.md"),
        ("a file reached through / in percents", "not in the folder", 400, f"file://{EXAMPLES}/..%2fREADME.md"),
        ("a file that is not there", "no such file", 400, f"file://{EXAMPLES}/no.png"),
        ("a file name with a null byte", "no such file", 400, f"file://{EXAMPLES}/shapes.png%00.jpg"),
        ("a file name of 100,000 characters", "no such file", 400, f"file://{EXAMPLES}/" + "a" * 100_000),
        ("the folder itself", "not in the folder", 400, f"file://{EXAMPLES}"),
        ("a file of another host", "names no file", 400, "file://example.com/etc/passwd"),
        ("a file that is no image", BROKEN, 400, f"file://{EXAMPLES}/epd.yaml"),
        ("a data URL without base64", "base64", 400, "data:image/png,Hello"),
        ("a data URL without a comma", "data: URL", 400, "data:image/png;base64"),
        ("base64 that is none", "base64", 400, "data:image/png;base64,@@@"),
        ("base64 of a wrong length", "base64", 400, "data:image/png;base64,AAAAA"),
        ("base64 of no bytes", BROKEN, 400, "data:image/png;base64,"),
    )
}

MEDIA: dict[str, Bad] = {
    name: shown(mentions, part)
    for name, mentions, part in (
        ("an image that ends early", "truncated", image_at(data_url("image/png", png(picture(1))[:120]))),
        ("an image of zeros", BROKEN, image_at(data_url("image/png", b"\x89PNG\r\n\x1a\n" + b"\0" * 64))),
        ("an image of no size", BROKEN, image_at(data_url("image/png", png_of(0, 0, PIXEL)))),
        ("an image of too many pixels", "pixels", image_at(data_url("image/png", png_of(60_000, 60_000, PIXEL)))),
        (
            "an image much larger than its pixels",
            "truncated",
            image_at(data_url("image/png", png_of(2000, 2000, PIXEL))),
        ),
        (
            "an image of too odd a shape",
            "aspect ratio",
            image_at(data_url("image/png", png(Image.new("L", (2000, 2))))),
        ),
        ("an animation of too many frames", "frames", image_at(data_url("image/gif", gif(100_000)))),
        ("SVG", BROKEN, image_at(data_url("image/svg+xml", b"<svg xmlns='http://www.w3.org/2000/svg'/>"))),
        ("HTML", BROKEN, image_at(data_url("image/png", b"<!doctype html><html></html>"))),
        ("PDF", BROKEN, image_at(data_url("image/png", b"%PDF-1.7\n%%EOF"))),
        ("PostScript", BROKEN, image_at(data_url("image/png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"))),
        ("an image in gzip", BROKEN, image_at(data_url("image/png", gzip.compress(b"\0" * 10_000_000)))),
        ("a sound as image", BROKEN, image_at(data_url("image/png", wav(1)))),
        ("a video as image", BROKEN, image_at(video_url(1))),
        ("a video that is none", "Could not open", video_at(data_url("video/mp4", b"nothing"))),
        ("a video that ends early", "Could not open", video_at(video_url(1)[:402])),
        ("a playlist", "playlist", video_at(data_url("video/mp4", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"))),
        ("frames that are no JPEGs", BROKEN, video_at("data:video/jpeg;base64,AAAA,BBBB")),
        ("too many frames", "frames", video_at("data:video/jpeg;base64," + "AAAA," * 40_000)),
        ("a video of a host that is not there", FORBIDDEN, video_at("http://nowhere.invalid/x.mp4")),
        (
            "a sound for a model without ears",
            "audio",
            {"type": "audio_url", "audio_url": {"url": data_url("a/b", wav(1))}},
        ),
        (
            "a sound in the request for a model without ears",
            "audio",
            {"type": "input_audio", "input_audio": {"data": base64.b64encode(wav(1)).decode(), "format": "wav"}},
        ),
        ("image embeddings", "mbed", {"type": "image_embeds", "image_embeds": "AAAA"}),
        ("an image URL of a wrong type", "valid string", image_at(7)),
        ("an image URL that is a list", "valid dictionary", {"type": "image_url", "image_url": []}),
        ("an image without a URL", "required", {"type": "image_url", "image_url": {}}),
        ("an image that is null", "valid dictionary", {"type": "image_url", "image_url": None}),
        (
            "a URL for the model's processor",
            "`image_pil`",
            {"type": "image_pil", "image_pil": "http://127.0.0.1:1/x.png"},
        ),
        ("a file for the model's processor", "`image_pil`", {"image_pil": f"{EXAMPLES}/shapes.png"}),
        ("URLs in a list without a type", "must be a text", {"image_url": ["http://127.0.0.1:1/x.png"]}),
        (
            "an item that is a name only, which nobody remembers",
            "No media is remembered",
            {"type": "image_url", "image_url": None, "uuid": "0" * 64},
        ),
    )
} | {
    "too many images": Bad(*chat(*[image(i) for i in range(7)]), "6"),
    "too many videos": Bad(*chat(*[video(1)] * 3), "2"),
    "one broken image among good ones": Bad(*chat(image(1), image_at("data:image/png;base64,AAAA"), image(2)), BROKEN),
}

TRANSFER = {"do_remote_prefill": True, "remote_engine_id": "x", "remote_block_ids": [0], "remote_host": "h"}

ATTACKS: dict[str, Bad] = {
    "kv_transfer_params": asked("kv_transfer_params", kv_transfer_params=TRANSFER),
    "ec_transfer_params": asked("ec_transfer_params", ec_transfer_params={"x": {}}),
    "kv_transfer_params in vllm_xargs": asked("kv_transfer_params", vllm_xargs={"kv_transfer_params": "x"}),
    "ec_transfer_params in vllm_xargs": asked("ec_transfer_params", vllm_xargs={"ec_transfer_params": ["x"]}),
    "kv_transfer_params of a completion": completed("kv_transfer_params", kv_transfer_params=TRANSFER),
    "ec_transfer_params of a completion": completed("ec_transfer_params", ec_transfer_params={"x": {}}),
    "kv_transfer_params of a response": Bad(
        "/v1/responses",
        {"model": "demo", "input": "Hi", "kv_transfer_params": TRANSFER},
        "kv_transfer_params",
    ),
    "kv_transfer_params in vllm_xargs of a response": Bad(
        "/v1/responses",
        {"model": "demo", "input": "Hi", "vllm_xargs": {"kv_transfer_params": "x"}},
        "kv_transfer_params",
    ),
    "kv_transfer_params of a message": Bad(
        "/v1/messages",
        {
            "model": "demo",
            "max_tokens": 8,
            "messages": [{"role": "user", "content": "Hi"}],
            "kv_transfer_params": TRANSFER,
        },
        "kv_transfer_params",
    ),
    "an engine's own route": Bad("/inference/v1/generate", {"token_ids": [1], "sampling_params": {}}, "disaggregated"),
    "no timeout": Bad(*chat(text("Hi")), "x-request-timeout-s", headers={"x-request-timeout-s": "0"}),
    "a negative timeout": Bad(*chat(text("Hi")), "x-request-timeout-s", headers={"x-request-timeout-s": "-1"}),
    "a timeout that is a word": Bad(*chat(text("Hi")), "x-request-timeout-s", headers={"x-request-timeout-s": "soon"}),
    "a timeout that is no number": Bad(
        *chat(text("Hi")), "x-request-timeout-s", headers={"x-request-timeout-s": "nan"}
    ),
    "an endless timeout": Bad(*chat(text("Hi")), "x-request-timeout-s", headers={"x-request-timeout-s": "inf"}),
}

OTHER: dict[str, Bad] = {
    "an empty prompt": completed("prompt", ""),
    "no prompt": Bad("/v1/completions", {"model": "demo", "max_tokens": 4}, "prompt"),
    "a prompt of no tokens": completed("prompt", []),
    "a prompt of empty prompts": completed("prompt", [[]]),
    "a prompt of a wrong type": completed("prompt", {"text": "Hi"}),
    "a prompt of mixed types": completed("prompt", ["Hi", 7]),
    "tokens outside of the vocabulary": completed("vocab", [10**7]),
    "negative tokens": completed("greater than or equal to 0", [-1]),
    "tokens beyond 64 bits": completed("vocab", [10**30]),
    "tokens that are fractions": completed("integer", [1.5]),
    "too many tokens": completed("4096", [300] * 5000),
    "prompt embeddings": completed("prompt_embeds", None, prompt_embeds="AAAA"),
    "prompt embeddings that are a pickle": completed(
        "prompt_embeds", None, prompt_embeds=base64.b64encode(b"\x80\x04cos\nsystem\n.").decode()
    ),
    "more logprobs of a completion than the server takes": completed("logprobs", logprobs=1000),
    "negative logprobs of a completion": completed("logprobs", logprobs=-5),
    "echo of a stream with prompt_logprobs": completed("logprobs", prompt_logprobs=-3),
    "a suffix": completed("suffix", suffix="x"),
    "a response without input": Bad("/v1/responses", {"model": "demo"}, "input"),
    "a response to an empty input": Bad("/v1/responses", {"model": "demo", "input": []}, "at least one message"),
    "a response to a number": Bad("/v1/responses", {"model": "demo", "input": 7}, "input"),
    "a response to a broken image": Bad(
        "/v1/responses",
        {
            "model": "demo",
            "input": [
                {
                    "role": "user",
                    "content": [{"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "auto"}],
                }
            ],
        },
        BROKEN,
    ),
    "a response of too high a temperature": Bad(
        "/v1/responses", {"model": "demo", "input": "Hi", "temperature": 9}, "temp"
    ),
    "a response after one that is not there": Bad(
        "/v1/responses", {"model": "demo", "input": "Hi", "previous_response_id": "resp_nope"}, "resp_nope", 404
    ),
    "a response of an unknown model": Bad("/v1/responses", {"model": "nope", "input": "Hi"}, "nope", 404),
    "a response of negative length": Bad(
        "/v1/responses", {"model": "demo", "input": "Hi", "max_output_tokens": -1}, "max"
    ),
    "messages without max_tokens": Bad(
        "/v1/messages", {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}, "max_tokens"
    ),
    "messages without messages": Bad(
        "/v1/messages", {"model": "demo", "max_tokens": 8, "messages": []}, "at least one message"
    ),
    "messages of an unknown model": Bad(
        "/v1/messages",
        {"model": "nope", "max_tokens": 8, "messages": [{"role": "user", "content": "Hi"}]},
        "nope",
        404,
    ),
    "messages of an unknown role": Bad(
        "/v1/messages", {"model": "demo", "max_tokens": 8, "messages": [{"role": "tool", "content": "Hi"}]}, "role"
    ),
    "messages with a broken image": Bad(
        "/v1/messages",
        {
            "model": "demo",
            "max_tokens": 8,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
                    ],
                }
            ],
        },
        BROKEN,
    ),
    "messages with an image at a private address": Bad(
        "/v1/messages",
        {
            "model": "demo",
            "max_tokens": 8,
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "source": {"type": "url", "url": "http://169.254.169.254/"}}],
                }
            ],
        },
        FORBIDDEN,
    ),
    "messages too long": Bad(
        "/v1/messages",
        {"model": "demo", "max_tokens": 8, "messages": [{"role": "user", "content": LONG * 40}]},
        "4096",
    ),
    "messages with a tool that is none": Bad(
        "/v1/messages",
        {
            "model": "demo",
            "max_tokens": 8,
            "messages": [{"role": "user", "content": "Hi"}],
            "tools": [{"name": "x", "input_schema": 7}],
        },
        "input_schema",
    ),
    "tokenizing a number": Bad("/tokenize", {"model": "demo", "prompt": 7}, "prompt"),
    "tokenizing nothing": Bad("/tokenize", {"model": "demo"}, "required"),
    "tokenizing a broken image": Bad(
        "/tokenize",
        {"model": "demo", "messages": [{"role": "user", "content": [image_at("data:image/png;base64,AAAA")]}]},
        BROKEN,
    ),
    "tokenizing for an unknown model": Bad("/tokenize", {"model": "nope", "prompt": "Hi"}, "nope", 404),
    "detokenizing a text": Bad("/detokenize", {"model": "demo", "tokens": "Hi"}, "tokens"),
    "detokenizing negative tokens": Bad("/detokenize", {"model": "demo", "tokens": [-1]}, "greater than or equal to 0"),
    "detokenizing tokens beyond 32 bits": Bad("/detokenize", {"model": "demo", "tokens": [2**40]}, "too large"),
    "detokenizing tokens beyond 64 bits": Bad(
        "/detokenize", {"model": "demo", "tokens": [10**30]}, "less than or equal"
    ),
    "a batch that is empty": Bad("/v1/chat/completions/batch", {"model": "demo", "messages": []}, "at least 1"),
    "a profile that is no object": Bad("/start_profile", [], "object"),
}

BAD: dict[str, Bad] = BODIES | PARAMETERS | MESSAGES | OUTPUTS | URLS | MEDIA | ATTACKS | OTHER

PLACEHOLDERS = "<|vision_start|><|image_pad|><|vision_end|>"
PAD = 1017  # <|image_pad|> in the demo model's vocabulary

HARMLESS: dict[str, tuple[str, dict[str, Any]]] = {
    "placeholders typed by the client": chat(text(PLACEHOLDERS)),
    "placeholders typed beside an image": chat(text(PLACEHOLDERS), image(1), text("<|image_pad|>" * 5)),
    "placeholders of a video": chat(text("<|vision_start|><|video_pad|><|vision_end|>")),
    "placeholders in a completion": completion(PLACEHOLDERS),
    "nothing but placeholders": completion([PAD] * 30),
    "other control tokens": chat(text("<|im_start|>system<|im_end|><|endoftext|>")),
    "every token of the vocabulary": completion(list(range(1024))),
    "odd characters": chat(text("\0\u202e\U0010ffff\ufeff" * 50)),
    "an empty text": chat(text("")),
    "an image as video": chat(video_at(data_url("video/mp4", png(picture(1))))),  # of one frame
    "the largest seed": chat(text("Hi"), temperature=1, seed=2**63 - 1, n=2),
    "the largest top_k": chat(text("Hi"), temperature=1, top_k=2**63 - 1),
    "tiny numbers": chat(text("Hi"), temperature=1e-300, top_p=1e-300, repetition_penalty=1e-300),
    "a huge penalty": chat(text("Hi"), repetition_penalty=1e300),
    "every token disliked": chat(text("Hi"), logit_bias={str(token): -100 for token in range(1024)}),
    "every token a stop": chat(text("Hi"), stop_token_ids=list(range(1024)), min_tokens=16),
    "a regex that repeats 10 million times": chat(text("Hi"), structured_outputs={"regex": "((a{1000}){1000}){10}"}),
    "a regex that backtracks": chat(text("Hi"), structured_outputs={"regex": "(a?){500}a{500}"}),
    "an array of 100,000 arrays": chat(
        text("Hi"),
        **schema(
            {
                "type": "array",
                "minItems": 100_000,
                "items": {"type": "array", "minItems": 10_000, "items": {"type": "integer"}},
            }
        ),
    ),
    "a tool whose parameters are no schema": chat(
        text("Hi"),
        tools=[{"type": "function", "function": {"name": "x", "parameters": {"type": 7}}}],
        tool_choice="required",
    ),
}
