"""What the ingress leans on inside vLLM on the way of a medium: parser, connector, loaders, renderer."""

import inspect
from typing import Any

from tests.contracts.looking import fields, find, parameters


def test_placeholder_range_takes_what_an_item_keeps() -> None:
    from vllm.multimodal.inputs import PlaceholderRange

    names = list(parameters(PlaceholderRange))
    assert names == ["offset", "length", "is_embed"], "serve_app/handoff/engine_input.py: PlaceholderRange"


def test_item_fields_say_whether_they_stay_on_the_cpu() -> None:
    from vllm.multimodal.inputs import BaseMultiModalField, MultiModalFieldElem, MultiModalKwargsItem

    assert "keep_on_cpu" in fields(BaseMultiModalField), (
        "serve_app/handoff/shaping.py _metadata; ec_connector.py _can_encode"
    )
    assert {"data", "field"} <= fields(MultiModalFieldElem), "serve_app/handoff/shaping.py _metadata"
    assert dict(MultiModalKwargsItem({})) == {}, "serve_app/handoff/shaping.py _metadata makes one from a dict"


def test_engine_inputs_have_the_keys_that_we_read() -> None:
    from vllm.inputs import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalKwargsItem, MultiModalKwargsItems, PlaceholderRange

    from serve_app.handoff.engine_input import from_engine_input
    from serve_app.handoff.types import Item, Prompt

    item = MultiModalKwargsItem.dummy()
    made = mm_input(
        [7, 8, 8],
        MultiModalKwargsItems({"image": [item]}),
        {"image": ["h"]},
        {"image": [PlaceholderRange(1, 2)]},
        cache_salt="s",
    )
    wanted = Prompt([7, 8, 8], (Item("image", "h", 1, 2, None, item),), "s")
    assert from_engine_input(made) == wanted, "serve_app/handoff/engine_input.py from_engine_input: mm_input"
    tokens = tokens_input([1, 2], cache_salt="s")
    assert from_engine_input(tokens) == Prompt([1, 2], (), "s"), "serve_app/handoff/engine_input.py: tokens_input"


def test_items_are_prepared_on_a_card_by_the_two_arguments_that_are_refused() -> None:
    """`auto` is the card in an encode-only engine with this transport, and nowhere else (``config._encoder_can_do``)."""
    text = inspect.getsource(find("vllm.config:VllmConfig._resolve_mm_processor_device"))
    assert 'mm_tensor_ipc != "torch_shm"' in text and "is_encode_only" in text
    assert {"mm_tensor_ipc", "mm_processor_device"} <= fields(find("vllm.engine.arg_utils:AsyncEngineArgs"))
    assert find("vllm.config.multimodal:MultiModalConfig").mm_tensor_ipc == "direct_rpc"


def test_model_declares_the_fields_of_its_placeholders(make_client: Any) -> None:
    from serve_app.media.items import declared_fields

    renderer = make_client({}).renderer
    declared = declared_fields(renderer)
    assert declared("image") == {"image_grid_thw"}, "serve_app/media/items.py: placeholder_metadata_fields"
    assert declared("audio") == frozenset()
    assert hasattr(renderer, "_mm_executor"), "serve_app/media/items.py in_turn: vLLM's thread for its processors"


def test_metadata_alone_is_taken_where_the_ingress_says_so_and_not_from_clients(demo_vllm_config: Any) -> None:
    multimodal = demo_vllm_config.model_config.multimodal_config
    assert multimodal.allow_missing_mm_embeddings, "serve_app/ingress/server.py ingress_vllm_config"
    assert not multimodal.enable_mm_embeds, "clients could send metadata of items that nobody has encoded"


def test_media_connectors_are_made_by_name_with_these_arguments() -> None:
    from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY, MediaConnector
    from vllm.renderers import chat_utils

    assert "MEDIA_CONNECTOR_REGISTRY.load(" in inspect.getsource(chat_utils), "serve_app/ingress/seams.py install_media"
    taken = {name for name in parameters(MediaConnector.__init__) if name not in ("self", "connection")}
    assert taken == {"media_io_kwargs", "allowed_local_media_path", "allowed_media_domains"}, (
        "serve_app/ingress/media.py"
    )
    assert hasattr(MEDIA_CONNECTOR_REGISTRY, "name2class"), "tests/unit/ingress/test_media.py"


def test_video_loaders_ask_one_method_which_frames_to_take() -> None:
    """``media/check.py _limited`` overrides it to count them."""
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    without = [
        name
        for name, loader in VIDEO_LOADER_REGISTRY.name2class.items()
        if not hasattr(loader, "compute_frames_index_to_sample")
    ]
    assert not without, "serve_app/media/check.py _limited"


def test_renderer_processes_media_through_the_hooks_that_are_guarded() -> None:
    from vllm.renderers.base import BaseRenderer
    from vllm.renderers.chat_utils import AsyncMultiModalContentParser

    assert "await self._process_multimodal_async(" in inspect.getsource(BaseRenderer._process_tokens_async), (
        "serve_app/ingress/seams.py install_renderer_guard"
    )
    assert list(parameters(BaseRenderer._process_mm_uuids)) == [
        "self",
        "mm_data",
        "mm_data_items",
        "mm_uuid_items",
        "mm_req_id",
    ], "serve_app/ingress/seams.py install_renderer_guard"
    assert list(parameters(AsyncMultiModalContentParser.parse_image_pil)) in (
        ["self", "image_pil", "uuid"],
        ["parser", "image_pil", "uuid"],  # ours, where another test has installed it
    ), "serve_app/ingress/seams.py install_media"


def test_every_part_with_a_url_and_its_name_pass_three_methods_of_the_parser() -> None:
    from vllm.renderers.chat_utils import AsyncMultiModalContentParser

    from serve_app.ingress.seams import PARSE  # vLLM's own, where another test has installed ours

    assert {name: list(parameters(parse)) for name, parse in PARSE.items()} == {
        "parse_image": ["self", "image_url", "uuid"],
        "parse_video": ["self", "video_url", "uuid"],
        "parse_audio": ["self", "audio_url", "uuid"],
    }, "serve_app/ingress/seams.py naming"
    assert "return self.parse_audio(audio_url, uuid)" in inspect.getsource(
        AsyncMultiModalContentParser.parse_input_audio
    ), "serve_app/ingress/seams.py PARSE"


def test_renderer_of_a_chat_is_told_its_cache_salt() -> None:
    from vllm.renderers.base import BaseRenderer
    from vllm.renderers.online_renderer import OnlineRenderer

    assert "prompt_extras" in parameters(BaseRenderer.render_chat_async), (
        "serve_app/ingress/seams.py install_renderer_guard"
    )
    rendered = inspect.getsource(OnlineRenderer.preprocess_chat)
    assert "renderer.render_chat_async(" in rendered and '"cache_salt"' in rendered, (
        "serve_app/ingress/seams.py install_renderer_guard"
    )


def test_video_loaders_read_frames_by_a_method_of_theirs() -> None:
    from vllm.multimodal.video_decoders.opencv import decode_opencv

    source = inspect.getsource(decode_opencv)
    for method in ("_prepare_source", "compute_frames_index_to_sample", "read_frames"):
        assert f"loader_cls.{method}(" in source, "serve_app/media/check.py _limited"
