"""What the ingress leans on where a request comes in: uvicorn, FastAPI, and what vLLM does when a client leaves."""

import asyncio
import importlib
import importlib.metadata
import inspect
from types import SimpleNamespace
from typing import Any


def test_bodies_are_read_where_the_ingress_looks_for_it() -> None:
    from fastapi.dependencies import utils

    assert "await request_body_to_args(" in inspect.getsource(utils.solve_dependencies), (
        "serve_app/ingress/server.py _unreadable"
    )


def test_uvicorn_has_what_the_front_bounds() -> None:
    from uvicorn import Server
    from uvicorn.protocols.http.flow_control import FlowControl
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

    where = "serve_app/ingress/front.py"
    for name in ("on_message_begin", "on_headers_complete", "data_received", "pause_writing", "connection_lost"):
        assert name in vars(HttpToolsProtocol), f"{where} Connection.{name}"
    assert "self.response_complete" in inspect.getsource(RequestResponseCycle.__init__), f"{where} data_received"
    assert "scope=self.scope" in inspect.getsource(HttpToolsProtocol.on_headers_complete), f"{where} on_message_begin"
    assert hasattr(FlowControl, "resume_reading"), f"{where} Front._in_time"
    for name in ("startup", "main_loop", "shutdown"):
        assert inspect.iscoroutinefunction(getattr(Server, name)), f"{where} Front.listen, _serve"
    source = inspect.getsource(Server.shutdown)
    assert source.index("server.close()") < source.index("connection.shutdown()"), f"{where} Front.drain"
    state = inspect.getsource(importlib.import_module("uvicorn.server").ServerState)
    assert "self.connections" in state and "self.tasks" in state, f"{where} Front._cut"


def test_vllm_cancels_a_handler_whose_client_has_left_and_not_one_whose_request_is_cancelled() -> None:
    """Why ``Connection`` waits before it cancels. Where this changes, it need not."""

    from vllm.entrypoints.serve.utils.api_utils import with_cancellation

    async def main() -> None:
        begun, never = asyncio.Event(), asyncio.Event()
        request = SimpleNamespace(receive=never.wait, app=SimpleNamespace(state=SimpleNamespace()))
        handlers: list[Any] = []

        async def handler(_: Any, raw_request: Any) -> None:
            handlers.append(asyncio.current_task())
            begun.set()
            await never.wait()

        asking = asyncio.create_task(with_cancellation(handler)({}, request))
        await begun.wait()
        asking.cancel()
        await asyncio.wait([asking])
        assert not handlers[0].done(), "serve_app/ingress/front.py LEFT_S"
        handlers[0].cancel()

    asyncio.run(main())
