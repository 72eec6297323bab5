"""Errors of ours as those of vLLM's, which its app answers with the right status and body."""

from http import HTTPStatus

from vllm.exceptions import GracefulHTTPError, VLLMValidationError

from serve_app.handoff.errors import BadRequest, EPDError, Overloaded, StageError


def to_vllm_error(error: Exception) -> Exception:
    """The exception of vLLM's whose HTTP status and body the app knows already."""
    mapped: Exception = error
    match error:
        case StageError():
            mapped = GracefulHTTPError(str(error), HTTPStatus(error.status))
        case BadRequest():
            mapped = VLLMValidationError(str(error))
        case Overloaded():
            mapped = GracefulHTTPError(str(error), HTTPStatus.SERVICE_UNAVAILABLE)
        case EPDError():
            mapped = GracefulHTTPError(str(error), HTTPStatus.INTERNAL_SERVER_ERROR)
    return mapped
