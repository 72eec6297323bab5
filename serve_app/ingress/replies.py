"""Errors that an ingress answers by itself, in the shape of the API whose route was asked."""

from fastapi.responses import JSONResponse
from starlette.types import Scope
from vllm.entrypoints.anthropic.api_router import translate_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse


def error_response(status: int, message: str, kind: str = "BadRequestError") -> JSONResponse:
    """OpenAI's error body."""
    return JSONResponse(
        {"error": {"message": message, "type": kind, "param": None, "code": status}}, status_code=status
    )


def refusal(scope: Scope, status: int, message: str, kind: str = "BadRequestError") -> JSONResponse:
    """The error body that the API of this route has."""
    return of_route(route_of(scope), error_response(status, message, kind))


def route_of(scope: Scope) -> str:
    """The path within the application: Serve's has its ``route_prefix`` before it, and names that as ``root_path``."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def of_route(path: str, response: JSONResponse) -> JSONResponse:
    """OpenAI's error, in Anthropic's shape on Anthropic's routes."""
    if not path.startswith("/v1/messages"):
        return response
    translated: JSONResponse = translate_error_response(ErrorResponse.model_validate_json(response.body))
    return translated
