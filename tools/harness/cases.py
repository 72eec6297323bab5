"""Requests whose answers must be the baseline's, whatever the topology. Each is ``name: (path, body)``."""

from typing import Any

from tools.harness.media import cut, data_url, frames_of, frames_url, image_url, recording, video_url

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
Case = tuple[str, dict[str, Any]]


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def image(seed: int, size: tuple[int, int] = (84, 84)) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": image_url(seed, size)}}


def video(seed: int) -> dict[str, Any]:
    return video_at(video_url(seed))


def video_at(url: str | None) -> dict[str, Any]:
    return {"type": "video_url", "video_url": None if url is None else {"url": url}}


def film(data: bytes) -> Case:
    return chat(video_at(data_url("video/x", data)), text("What happens?"))


def chat(*parts: dict[str, Any] | str, **options: Any) -> Case:
    messages = options.pop("messages", [{"role": "user", "content": list(parts)}])
    body = {"model": "demo", "messages": messages, "max_tokens": 16, "temperature": 0, "return_token_ids": True}
    return CHAT, body | options


def completion(prompt: Any, **options: Any) -> Case:
    body = {"model": "demo", "prompt": prompt, "max_tokens": 16, "temperature": 0, "return_token_ids": True}
    return COMPLETIONS, body | options


def turn(role: str, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


LONG = "The quick brown fox jumps over the lazy dog and tells you about the weather in Paris. " * 12
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "London"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather", "parameters": CITY, "strict": True},
}

TEXT: dict[str, Case] = {
    "text": chat(text("Tell me about the weather.")),
    "text of many blocks": chat(text(LONG)),
    "system and earlier turns": chat(
        messages=[
            turn("system", text("You are brief.")),
            turn("user", text("Hello")),
            turn("assistant", text("Good day")),
            turn("user", text("And now?")),
        ]
    ),
}
MEDIA: dict[str, Case] = {
    "1 image": chat(text("Describe this image."), image(1)),
    "another image": chat(text("Describe this image."), image(2)),
    "2 images": chat(text("Compare."), image(1), image(2)),
    "4 images": chat(image(1), image(2), image(3), image(4), text("Which is best?")),
    "the same image twice": chat(image(5), text("and"), image(5), text("Are they the same?")),
    "two sizes": chat(image(6, (56, 56)), image(7, (280, 140)), text("Which is larger?")),
    "an image between texts": chat(text("Before."), image(8), text("After.")),
    "an image in an earlier turn": chat(
        messages=[
            turn("user", image(9), text("What is it?")),
            turn("assistant", text("A circle.")),
            turn("user", text("Which colour?"), image(10)),
        ]
    ),
    "an image and a long text": chat(text(LONG), image(11), text(LONG)),
    "an image in the system's message": chat(
        messages=[turn("system", text("You saw this:"), image(20)), turn("user", text("What was it?"))]
    ),
    "an image in the system's message, with tools": chat(
        messages=[turn("system", text("You saw this:"), image(20)), turn("user", text("What was it?"))], tools=[WEATHER]
    ),
    "images of the assistant and of a tool": chat(
        messages=[
            turn("user", text("Look.")),
            turn("assistant", text("I saw this:"), image(21)),
            turn("tool", text("And this:"), image(22)) | {"tool_call_id": "call-1"},
        ],
        tools=[WEATHER],
    ),
    "video": chat(video(1), text("What happens?")),
    "video and image": chat(image(12), video(2), text("What happens?")),
}
SAMPLING: dict[str, Case] = {
    "max_tokens=1": chat(text("Describe."), image(13), max_tokens=1),
    "a seed": chat(text("Describe."), image(13), temperature=1.0, seed=7),
    "n=2": chat(text("Describe."), image(13), temperature=1.0, seed=7, n=2),
    "n=3 of a text": chat(text("Tell a story."), temperature=0.8, top_p=0.9, seed=11, n=3),
    "logprobs": chat(text("Describe."), image(14), logprobs=True, top_logprobs=3),
    "logprobs of n=2": chat(text("Describe."), image(14), temperature=1.0, seed=3, n=2, logprobs=True, top_logprobs=2),
    "logprobs of named tokens": chat(text("Describe."), image(14), logprobs=True, logprob_token_ids=[300, 7]),
    "prompt_logprobs": chat(text("Describe."), image(15), prompt_logprobs=2, max_tokens=4),
    "stop strings": chat(text("Tell me about the weather."), stop=["e"], max_tokens=40),
    "stop string included": chat(text("Describe."), image(1), stop=["t"], include_stop_str_in_output=True),
    "min_tokens": chat(text("Hello"), min_tokens=12, max_tokens=20),
    "ignore_eos": chat(text("Hello"), ignore_eos=True, max_tokens=40),
    "penalties": chat(text("Hello"), image(3), presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.2),
    "logit_bias": chat(text("Hello"), logit_bias={"900": 50}),
    "bad_words": chat(text("Describe."), image(3), bad_words=["the", "then"]),
    "JSON schema": chat(
        text("Which city?"),
        image(16),
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}},
    ),
    "a choice": chat(text("Which?"), image(16), structured_outputs={"choice": ["red circle", "blue square"]}),
    "a named tool": chat(
        text("Weather?"),
        image(17),
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        max_tokens=200,
    ),
    "tools, auto": chat(text("Weather?"), tools=[WEATHER], tool_choice="auto"),
    "completion": completion("Once upon a time"),
    "completions of two prompts": completion(["Once upon a time", "The weather"], logprobs=2),
    "completion from token ids": completion([300, 301, 302, 303]),
    "completion with echo": completion("Once upon a time", echo=True, logprobs=1, max_tokens=4),
}
OTHER: dict[str, Case] = {
    "beam search": chat(text("Hello"), use_beam_search=True, n=2, max_tokens=3),
    "responses": (
        "/v1/responses",
        {
            "model": "demo",
            "input": [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "Describe."},
                        {"type": "input_image", "image_url": image_url(18), "detail": "auto"},
                    ],
                }
            ],
            "max_output_tokens": 16,
            "temperature": 0,
        },
    ),
    "anthropic messages": (
        "/v1/messages",
        {
            "model": "demo",
            "max_tokens": 16,
            "temperature": 0,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "image",
                            "source": {
                                "type": "base64",
                                "media_type": "image/png",
                                "data": image_url(19).partition(",")[2],
                            },
                        },
                        {"type": "text", "text": "Describe."},
                    ],
                }
            ],
        },
    ),
    "tokenize": ("/tokenize", {"model": "demo", "prompt": "Once upon a time"}),
    "detokenize": ("/detokenize", {"model": "demo", "tokens": [300, 301, 302]}),
}
ONE_FRAME = recording("mp4", 1)
BROKE_OFF = cut(recording("webm", 24, piped=True))
LIKE: dict[str, tuple[list[Case], Case]] = {
    "a video of one frame": (
        [film(ONE_FRAME)],
        chat(video_at(frames_url(frames_of(ONE_FRAME))), text("What happens?")),
    ),
    "a video without a length": ([film(recording("matroska", 24, piped=True))], film(recording("matroska", 24))),
    "a video that broke off": ([film(BROKE_OFF)], film(recording("webm", len(frames_of(BROKE_OFF))))),
    "an image by its name": (
        [
            chat(text("Describe."), image(30) | {"uuid": "a"}),
            chat(text("Describe."), {"type": "image_url", "image_url": None, "uuid": "a"}),
        ],
        chat(text("Describe."), image(30)),
    ),
    "a video by its name": (
        [chat(video(30) | {"uuid": "a"}), chat(video_at(None) | {"uuid": "a"}, text("What happens?"))],
        chat(video(30), text("What happens?")),
    ),
}
"""What vLLM's own server refuses: requests one after the other, of which the last is answered as the one after them."""


def conversation(seed: int, turns: int) -> Case:
    """So many turns of a conversation, whose first one has two pictures. All conversations have the same system prompt."""
    messages = [turn("system", text(LONG))]
    for number in range(turns):
        pictures = [] if number else [image(seed), image(seed + 1, (140, 84))]
        messages.append(turn("user", *pictures, text(f"{number}. {LONG}")))
        if number + 1 < turns:
            messages.append(turn("assistant", text(f"This is answer {number}.")))
    return chat(messages=messages)


CONVERSATION: dict[str, Case] = {"a conversation about two pictures": conversation(50, 2)}

CASES = TEXT | MEDIA | SAMPLING | OTHER | CONVERSATION
STREAMED = ["text", "1 image", "2 images", "video", "n=2", "logprobs", "stop strings", "a named tool", "completion"]
MANY = 32


def one_of_many(index: int) -> Case:
    return chat(text(f"Describe picture {index}."), image(100 + index))
