"""What the Hub says of an error is shown, but for a token that it repeats."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError

from dgq.convert.source.transfer.session import refuse
from dgq.quant.errors import InputError


def test_a_token_is_not_shown() -> None:
    request = SimpleNamespace(url=SimpleNamespace(path="/api/models/somebody/model"), headers={})
    response: Any = SimpleNamespace(status_code=403, headers={}, history=[], request=request)
    error = HfHubHTTPError("403", response=response, server_message="the token hf_abcDEF123 may not read this")
    with pytest.raises(InputError, match="may not read this; check the rights of your token") as refusal:
        refuse("somebody/model", error)
    assert "abcDEF123" not in str(refusal.value)
