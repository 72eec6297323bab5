"""Our errors as vLLM's, which its app answers with the right status and body."""

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

from vllm.exceptions import GracefulHTTPError, VLLMValidationError

from serve_app.handoff.errors import BadRequest, EPDError
from serve_app.ingress.request import Request


def to_vllm_error(error: Exception) -> Exception:
    """Return an error of ours as vLLM's, and any other as it is."""
    mapped: Exception = error
    if isinstance(error, BadRequest):
        mapped = VLLMValidationError(str(error))
    elif isinstance(error, EPDError):
        mapped = GracefulHTTPError(str(error), HTTPStatus(error.status))
    return mapped


@contextmanager
def fails_as_vllm(request: Request) -> Iterator[None]:
    """Fail the request with whatever is raised inside, and raise it as vLLM's error."""
    try:
        yield
    except Exception as error:
        mapped = to_vllm_error(error)
        request.fail(mapped)
        raise mapped from error
