"""A refusal, as OpenAI's clients read it; and the line that the log gets of an error that is none."""

from __future__ import annotations

import logging
from typing import Any


class ApiError(Exception):
    """A request that is not answered. status: of HTTP; code: a word for programs; param: the field that is to blame;
    retry: after how many seconds it may be tried again."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry = status, code, param, retry

    @property
    def headers(self) -> dict[str, str]:
        """Of the response."""
        more = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return more if self.retry is None else {**more, "Retry-After": str(self.retry)}

    def json(self) -> dict[str, Any]:
        """The response's body."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def internal(error: Exception) -> ApiError:
    """What a client is told of an error in the server. The log gets the error's type and place, and not its text, which
    may hold what was asked."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else "an unknown place"
    logging.getLogger("dgq.serve").error("%s at %s", type(error).__name__, where)
    return ApiError(500, "an error of the server; its log has the place", "internal")
