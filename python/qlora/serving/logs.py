"""Structured logs: one JSON object on a line of stderr for each event. Prompts and answers are never logged."""

import json
import logging
import time
from typing import Any

_logger = logging.getLogger("qlora.serving")


def configure_logs() -> None:
    """Sends this package's events to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    _logger.handlers = [handler]
    _logger.setLevel(logging.INFO)
    _logger.propagate = False


def log_event(event: str, **fields: Any) -> None:
    """Logs an event with its fields; times are seconds."""
    rounded = {name: round(value, 4) if isinstance(value, float) else value for name, value in fields.items()}
    _logger.info(json.dumps({"time": round(time.time(), 3), "event": event, **rounded}))
