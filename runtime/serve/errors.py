"""A refusal, as OpenAI's clients read it."""

from __future__ import annotations

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
