"""One line a request at INFO, when it has ended: a JSON object and nothing else, never text of a prompt."""

from __future__ import annotations

import logging
from datetime import datetime, timezone

import msgspec

from trtforge.runtime.observability.request_record import RequestRecord

logger = logging.getLogger(__name__)


def install_request_log() -> None:
    """Give this module's logger a handler of its own, without the prefix that other lines have."""
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


def log_request(record: RequestRecord) -> None:
    """Log a request that has ended."""
    if logger.isEnabledFor(logging.INFO) and record.end_s is not None:
        logger.info("%s", request_line(record, record.end_s))


def request_line(record: RequestRecord, end_s: float) -> str:
    """The line. What is not known, of a request that was refused say, is left out."""
    e2e_s = end_s - record.arrival_s
    ended_unix_s = record.arrival_unix_ns / 1e9 + e2e_s
    fields = {
        "time": datetime.fromtimestamp(ended_unix_s, timezone.utc).isoformat(timespec="milliseconds"),
        "event": "request",
        "request_id": record.request_id,
        "client_id": record.client_id or None,
        "finish_reason": record.finish_reason,
        "error_kind": record.error_kind,
        "prompt_tokens": record.num_prompt_tokens or None,
        "cached_tokens": record.num_cached_tokens if record.queue_s is not None else None,
        "generated_tokens": record.num_generated_tokens,
        "queue_ms": _ms(record.queue_s),
        "ttft_ms": None if record.first_token_s is None else _ms(record.first_token_s - record.arrival_s),
        "e2e_ms": _ms(e2e_s),
    }
    known = {name: value for name, value in fields.items() if value is not None}
    return msgspec.json.encode(known).decode()


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)
