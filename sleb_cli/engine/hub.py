"""The Hugging Face Hub, which may be out of reach."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sleb_plugins.errors import without_secrets

_UNREACHABLE = {"ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol"}


@contextmanager
def offline_if_unreachable() -> Iterator[str | None]:
    """Let the Hub's client use only its cache if the Hub cannot be reached; yield why, or None.

    By itself, the client repeats each request for half a minute or more, with two warnings each time.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        yield "HF_HUB_OFFLINE is set"
        return
    reason = _why_unreachable(constants.ENDPOINT, constants.HF_HUB_ETAG_TIMEOUT)
    constants.HF_HUB_OFFLINE = reason is not None
    try:
        yield without_secrets(f"{constants.ENDPOINT} cannot be reached ({reason})") if reason else None
    finally:
        constants.HF_HUB_OFFLINE = False


def _why_unreachable(endpoint: str, timeout: float) -> str | None:
    """Return why no connection can be made; a connection counts even if the answer is an error or slow."""
    from huggingface_hub import get_session
    from huggingface_hub.errors import HfHubHTTPError

    # The HTTP library and its errors depend on the client's version.
    failures: tuple[type[BaseException], ...] = HfHubHTTPError.__bases__
    reason = None
    # A name server may fail once, so ask again, but not after a timeout.
    for wait in (0, 1):
        time.sleep(wait)
        try:
            # The client's own session has the user's proxies and certificates.
            get_session().head(endpoint, timeout=timeout)
        except failures as error:
            kinds = {kind.__name__ for kind in type(error).__mro__}
            if not kinds & _UNREACHABLE:
                return None
            reason = re.sub(r"^\[Errno -?\d+\] ", "", str(error)).strip().rstrip(".") or type(error).__name__
            if "ConnectTimeout" in kinds:
                break
        else:
            return None
    return reason
