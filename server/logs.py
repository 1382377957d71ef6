"""The log: a line for each call and whatever else is worth saying, as text or as JSON, with the request it
belongs to.

    2026-01-31 12:00:00,000 atelier INFO Render OK 0.412 s request=9f2c… client=ann base=pocket steps=20
    {"time": "2026-01-31T12:00:00.000Z", "level": "INFO", "message": "Render OK", "request_id": "9f2c…", …}
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from server.calls import Call, current

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")


def told(record: logging.LogRecord) -> dict[str, Any]:
    """What a record says besides its message: the call it belongs to, and the call's end."""
    call: Call = getattr(record, "call", None) or current()
    named = {"request_id": call.request_id, "client": call.client, "rpc": call.rpc}
    return {name: value for name, value in named.items() if value} | getattr(record, "told", {})


class Text(logging.Formatter):
    """A line for people."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(name)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # logging's name
        """The message, then what is told, as NAME=VALUE."""
        said = told(record)
        if "outcome" in said:  # the message names rpc and outcome
            seconds = f" {said.pop('seconds'):.3f} s"
            said = {name: value for name, value in said.items() if name not in {"rpc", "outcome"}}
        else:
            seconds = ""
        said = {"request": said.pop("request_id"), **said} if "request_id" in said else said
        words = [f"{name}={_word(value)}" for name, value in said.items()]
        return " ".join((super().formatMessage(record) + seconds, *words))


class Json(logging.Formatter):
    """An object a line; a fault's traceback is in it."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": when.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **told(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def worth_saying(record: logging.LogRecord) -> bool:
    """Whether a record says more than that somebody hung up while something was sent to them, which gRPC
    takes for a fault of the servicer's; the call has a line of its own.
    """
    return not (record.name == "grpc._cython.cygrpc" and "ExecuteBatchError" in record.getMessage())


def configure(kind: str, level: str) -> None:
    """Sends the process's log to stderr, in that form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json() if kind == "json" else Text())
    handler.addFilter(worth_saying)
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for talkative in ("httpx", "httpx2"):  # they log links, which may be signed
        logging.getLogger(talkative).setLevel(logging.WARNING)


def _word(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or any(c in text for c in ' "=\n\t') else text
