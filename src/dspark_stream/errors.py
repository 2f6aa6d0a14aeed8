"""Every error that leaves a public function, in one tree.

An error knows how the wire shows it: an HTTP status and the four fields of the OpenAI error object
(``type``, ``code``, ``message``, ``param``). The server turns any `DsparkError` into a typed error event or
body without knowing which one it is; anything else is an `InternalError`.
"""

from __future__ import annotations

import random

LONGEST_MESSAGE = 480
"""Characters of a message that quotes a file."""


class DsparkError(Exception):
    """Root of the tree. ``str(error)`` is the message a person reads."""

    status: int = 500
    type: str = "server_error"
    code: str = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InternalError(DsparkError):
    """Something failed on our side; the request is lost, the service is not."""


class NoTokenError(InternalError):
    """The model has no next token for one stream: everything is ruled out, or a score is no finite number."""

    code = "no_token"


# --- what a client did -------------------------------------------------------------------------------------


class InvalidRequestError(DsparkError):
    """The request cannot be served as it is; ``param`` names the field and the message names the limit."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class ContextLengthError(InvalidRequestError):
    """Prompt, or prompt and ``max_output_tokens`` together, exceed what the model or the server holds."""

    code = "context_length_exceeded"


class AuthenticationError(DsparkError):
    """No key, or a wrong one."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class PermissionDeniedError(DsparkError):
    """A Host or an Origin that is not on the allow-list."""

    status = 403
    type = "permission_error"
    code = "forbidden"


class NotFoundError(DsparkError):
    """An id that this server does not know: a model, a response, a path."""

    status = 404
    type = "invalid_request_error"
    code = "not_found"


# --- what the server cannot do now -------------------------------------------------------------------------


class BusyError(DsparkError):
    """Refused for now. ``retry_after_s`` seconds is a fair time to wait.

    Each error says something from what it is made with to about twice that: those who were refused together must
    not come back together.
    """

    status = 503
    type = "overloaded_error"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: int = 1, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = random.randint(retry_after_s, 2 * retry_after_s + 1)


class RateLimitError(BusyError):
    """One client's own limit (429); the server itself has room."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class OverloadedError(BusyError):
    """The queue is full (503)."""


class DrainingError(BusyError):
    """The server is shutting down (503): nothing new is taken."""

    code = "draining"


class ShutdownError(BusyError):
    """The server shut down before the answer was whole (503)."""

    type = "server_error"
    code = "server_shutdown"


class EngineFailedError(BusyError):
    """The engine has failed and does no more work (503); whoever supervises the process starts another."""

    type = "server_error"
    code = "engine_failed"


# --- what the person at the command line did -----------------------------------------------------------------


class ConfigError(DsparkError):
    """A setting that is unknown, of the wrong type or out of range."""

    status = 400
    type = "config_error"
    code = "invalid_config"


class ModelLoadError(DsparkError):
    """A checkpoint that is missing, broken, of an unknown kind, or not made for this target.

    Its message may quote the file, and is a line all the same.
    """

    code = "model_load_failed"
    _longest = LONGEST_MESSAGE

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(_one_line(message, self._longest), param=param, code=code)


def _one_line(text: str, longest: int) -> str:
    """What fits a line: of a text that is too long its ends, and blanks for what cannot be shown."""
    if len(text) > longest:
        text = f"{text[: longest // 2]} … {text[-longest // 3 :]}"
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


class DownloadError(ModelLoadError):
    """A named model could not be fetched, or what came does not have the pinned checksum."""

    code = "download_failed"
    _longest = 4000  # what each source said, and what mends it
