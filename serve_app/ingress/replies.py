"""Errors that the ingress itself answers, in the error format of the route's API."""

from fastapi.responses import JSONResponse
from starlette.types import Scope


def error_response(status: int, message: str, kind: str = "BadRequestError") -> JSONResponse:
    """An error in OpenAI's format."""
    return JSONResponse(
        {"error": {"message": message, "type": kind, "param": None, "code": status}}, status_code=status
    )


def refusal(scope: Scope, status: int, message: str, kind: str = "BadRequestError") -> JSONResponse:
    """An error in the format of the request's route."""
    return of_route(route_of(scope), error_response(status, message, kind))


def route_of(scope: Scope) -> str:
    """The path within the application. Serve puts its ``route_prefix`` before it and into ``root_path``."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def of_route(path: str, response: JSONResponse) -> JSONResponse:
    """Translate an error in OpenAI's format into Anthropic's on Anthropic's routes."""
    if not path.startswith("/v1/messages"):
        return response
    # The deployment imports the front, and this with it, before it sets the environment that vLLM reads when imported.
    from vllm.entrypoints.anthropic.api_router import translate_error_response
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    translated: JSONResponse = translate_error_response(ErrorResponse.model_validate_json(response.body))
    return translated
