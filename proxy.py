# /// script
# requires-python = ">=3.10"
# dependencies = ["replicate==2.0.0b4"]
# ///
"""An OpenAI-compatible server in front of Replicate, in one file.

    python proxy.py --demo               see it work, with no account anywhere
    python proxy.py                      serve, as .env and the environment say
    proxy.make_server(settings)          the same, inside another program

A request passes six stations: parse, validate, build the input; and, for a stream
when its writer is ready, create the prediction, follow its events, write. To see
them in order, read `create_chat_completion` and `Generation`.

    client                                                     Replicate
      |  request       input                                       ^
      +---> Serving ---> Requests ---> Inputs ---> Predictions ----+
      |                                                 |
      |  bytes           objects            text        | events
      +<--- Serving <--- Objects <--------- Text <------+

Each section uses only names from those above it.

    1. Ground
        Errors              OpenAI's error objects, as one exception
        Values              JSON values of any shape, and numbers
        Settings            what the operator chooses, read once from the environment
        Models              which models there are, read from models.json
        Metrics             what is counted for Prometheus: one row per family
    2. Requests
        Validation          what a client may send: one row per parameter
        Messages            the parts of a message, and what is attached to it
        Tools               which tools a model may call
        Output formats      which JSON an answer has to be
        Response items      a request for a response in the terms of chat
        Forms               bodies of multipart/form-data in the terms of JSON
        Tasks               what models do besides text: one row per endpoint
    3. Inputs
        Chat templates      how a conversation becomes what a model reads
        Families            the inputs of each kind of model: one row per family
        Input schemas       a family read from what a model says of itself
        Prediction inputs   a request in the terms of its model
        Masks               where an image is to be edited
        Task inputs         the same for images and all else that is not text
    4. Predictions
        Events              what is seen of a prediction, and the log of a request
        Cancellation        how a request in progress is made to stop
        HTTP messages       heads and bodies, read strictly, a client's or Replicate's
        HTTP client         connections to Replicate's hosts, and event streams
        Replicate           its API, what it refuses, and the records it keeps
        Uploads             large data put into Replicate's files
        Predictions         each followed to its end or cancelled
    5. Text
        Stop and reasoning  stop strings, limits, reasoning and usage
        JSON Schema         whether a value fits a schema
        JSON                broken JSON repaired, and JSON taken out of prose
        Tool calls          how models write calls: one row per format
    6. Objects
        Chat                events as a chat completion, whole or in chunks
        Completions         events as a text completion
        Responses           events as a response, whole or as its own events
        Response store      responses that were stored, found by their key and id
        Images              files that models made as OpenAI's images
        Embeddings          vectors
        Audio               what models heard: as JSON, as text, as subtitles
        Model objects       rows of models.json as OpenAI's models
    7. Serving
        Generation          n choices, retries, and the response made of them
        Endpoints           one row per method and path, one function per operation
        Server              connections, hang-ups, silences and the end
        Workers             several servers on one port, each a process
        Command line        the program
"""

from __future__ import annotations

import _thread
import argparse
import errno
import gc
import http.client
import json
import logging
import mmap
import os
import re
import secrets
import select
import selectors
import shlex
import signal
import socket
import sqlite3
import ssl
import string
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zlib
from base64 import b64decode, b64encode
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import (
    Callable,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import (
    AbstractContextManager,
    closing,
    contextmanager,
    nullcontext,
    suppress,
)
from contextvars import ContextVar, copy_context
from copy import copy
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache, partial
from hashlib import sha256
from hmac import compare_digest
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate, chain, groupby, islice, pairwise, repeat, takewhile
from math import ceil, floor, inf, isfinite, log2, sqrt
from mimetypes import guess_type
from operator import ge, gt, itemgetter, le, lt
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Generic, NamedTuple, NoReturn, TypeGuard, TypeVar, cast
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

if __name__ == "__main__":  # so that Ctrl-C is quiet while it starts
    signal.signal(signal.SIGINT, signal.SIG_DFL)

try:
    import httpx
    from replicate import (
        APIConnectionError,
        APIStatusError,
        Omit,
        Replicate,
        ReplicateError,
    )
except ModuleNotFoundError as missing:
    if __name__ != "__main__":
        raise
    raise SystemExit(
        f"{missing}. Install what the proxy needs:  pip install -r requirements.txt"
    ) from None

__version__ = "1.0.0"

HERE = Path(__file__).resolve().parent
log = logging.getLogger("proxy")

Json = dict[str, Any]


# ==== 1. GROUND ===============================================================


# -- Errors --------------------------------------------------------------------
#
# Any code that finds something wrong raises an APIError, with the remedy in its
# message. Codes and wordings are those that api.openai.com was seen to send.


RETRY = {"x-should-retry": "true"}

NO_RETRY = {"x-should-retry": "false"}  # OpenAI's SDKs obey it, at any status

ERROR_TYPES: dict[str | int | None, str] = {
    "insufficient_quota": "insufficient_quota",
    "rate_limit_exceeded": "requests",
    "invalid_value": "invalid_request_error",
    413: "server_error",
}


class APIError(Exception):
    """An OpenAI error object that can be raised; `headers` go with its status.

    The operator is told its `detail` too, and the client is not.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        detail: str = "",
    ) -> None:
        super().__init__(message if len(message) < 2000 else f"{message[:2000]}…")
        self.detail = detail
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> Json:
        by_range = "invalid_request_error" if self.status < 500 else "server_error"
        by_status = ERROR_TYPES.get(self.status, by_range)
        error = {"message": str(self), "type": ERROR_TYPES.get(self.code, by_status)}
        return {"error": {**error, "param": self.param, "code": self.code}}


def require(
    condition: object,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
) -> None:
    if not condition:
        raise APIError(400, message, code=code, param=param)


def overloaded(why: str) -> APIError:
    message = f"The proxy {why}. Try again in a moment."
    return APIError(503, message, code="overloaded", headers={"retry-after": "1"})


NO_DESCRIPTORS = "has as many files and connections open as the system allows"


def is_exhausted(error: BaseException | None) -> bool:
    """Whether no descriptor was left, of the process's or of the system's."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def as_api_error(error: Exception) -> APIError:
    """Convert any exception; an internal one is logged, and its details are hidden."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return overloaded("has as many threads as the system allows")
    if is_exhausted(error):
        return overloaded(NO_DESCRIPTORS)
    log.error("internal error", exc_info=error)
    return APIError(
        500,
        "The proxy failed to handle this call; its log says more.",
        code="internal_error",
        headers=NO_RETRY,
    )


# From the first quote to the last, or to the end of a message that was cut; and
# the path of a value in JSON.
QUOTATION = re.compile(
    r"""(?s)(?<!\w)(['"])(?:(?!.*…\Z).*\1(?!\w)|.*)|(?<=\$)[.\[]\S*"""
)


def loggable(message: str, prompts: Iterable[str] = ()) -> str:
    """A message without what it quotes of a request, a schema or a prompt.

    Gone are quotations, paths in JSON, and three words in a row of a prompt's.
    """
    words = QUOTATION.sub("...", message).split()[:50]
    kept = [*words]
    for at in range(len(words) - 2):
        if any(" ".join(words[at : at + 3]) in prompt for prompt in prompts):
            kept[at : at + 3] = ["..."] * 3
    return " ".join(word for word, _ in groupby(kept))


ONE_WORD = re.compile(r"[!#-<>-~]+")


def quoted(value: Any) -> str:
    """Format a value for a key=value log line, in quotes if it is not one word."""
    text = str(value)[:200]
    return text if ONE_WORD.fullmatch(text) else json.dumps(text)


class LogRow(dict[str, Any]):
    """The fields of a log line that have a value; as text, key=value."""

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            if value not in (None, ""):
                is_number = isinstance(value, (int, float))
                self[name] = value if is_number else str(value)[:200]

    def __str__(self) -> str:
        return " ".join([f"{name}={quoted(value)}" for name, value in self.items()])


# -- Values --------------------------------------------------------------------
#
# JSON values of any shape, and numbers.


KINDS: dict[type, str] = {
    str: "a string",
    int: "an integer",
    float: "a decimal",
    bool: "a boolean",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def as_object(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def without(object: Json, names: Collection[str]) -> Json:
    return {name: value for name, value in object.items() if name not in names}


def without_nulls(message: Json) -> Json:
    return {name: value for name, value in message.items() if value is not None}


def wrap(value: Any, low: float | None, high: float | None) -> Any:
    """Bring a seed into bounds, so that different seeds stay different."""
    if low is None or high is None:
        return clamp(value, low, high)
    return low + (value - low) % (high - low + 1)


def clamp(value: Any, low: float | None, high: float | None) -> Any:
    raised = value if low is None else max(value, low)
    return raised if high is None else min(raised, high)


def reject_constant(name: str) -> NoReturn:
    raise ValueError(name)


def finite_float(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise ValueError(text)
    return number


# One decoder and one encoder for all: json's functions make new ones for each value.
parse_strict = json.JSONDecoder(
    parse_constant=reject_constant, parse_float=finite_float
).decode

compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def parsed(text: str) -> Any:
    """The value of a JSON text, None if it is not one."""
    try:
        return parse_strict(text)
    except (ValueError, RecursionError):
        return None


# -- Settings ------------------------------------------------------------------
#
# Nothing else reads the environment, except for HTTPS_PROXY. To add a setting: a
# field here, with its range if it is a number, and a line in .env.example.


BOOLEANS = {"true": True, "false": False}

LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

TOKENS_URL = "https://replicate.com/account/api-tokens"

PLACEHOLDER = re.compile(r"(r8_)?(your|changeme|change-me|xxx)|<.*>", re.IGNORECASE)

ENV_LINE = re.compile(
    r"""\s*(?:export\s+)?(?P<name>[A-Za-z_][A-Za-z0-9_]*)\s*=
        (?:\s*'(?P<literal>[^']*)'\s*(?:\#.*)?
         | \s*"(?P<quoted>(?:[^"\\]|\\.)*)"\s*(?:\#.*)?
         | (?P<plain>.*?)(?:\s+\#.*)?\s*)""",
    re.VERBOSE,
)

ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}


class ConfigError(ValueError):
    """The program can't start: one clear sentence per problem."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class Settings:
    replicate_api_token: str = field(default="", repr=False)
    proxy_api_key: str = field(default="", repr=False)
    host: str = "127.0.0.1"
    port: int = field(default=3000, metadata={"range": (0, 65535)})
    workers: int = field(default=1, metadata={"range": (1, 256)})
    models_path: str = str(HERE / "models.json")
    replicate_base_url: str = "https://api.replicate.com/v1"
    # Cancel-After takes 5 s to 24 h (Replicate's docs, "Create a prediction").
    prediction_timeout: int = field(default=600, metadata={"range": (5, 86400)})
    max_body_bytes: int = field(default=25 * 2**20, metadata={"range": (1, 2**31)})
    max_body_bytes_in_flight: int = field(
        default=100 * 2**20, metadata={"range": (1, 2**40)}
    )
    max_concurrent_calls: int = field(default=1000, metadata={"range": (1, 10**6)})
    max_connections: int = field(default=2000, metadata={"range": (1, 10**6)})
    write_timeout: int = field(default=30, metadata={"range": (1, 3600)})
    shutdown_grace: int = field(default=25, metadata={"range": (0, 3600)})
    responses_db: str = ""  # a file; in memory without one
    responses_db_bytes: int = field(default=64 * 2**20, metadata={"range": (0, 2**36)})
    responses_db_days: int = field(default=30, metadata={"range": (1, 3650)})
    log_level: str = "INFO"
    log_format: str = "text"
    list_replicate_models: str = ""  # collections, with commas
    client_tokens: bool = False  # a client's key may be its own Replicate token
    metrics_open: bool = False  # to anyone, without a key

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Settings:
        """Read what is set; what is not of its type, stays as it is for `check`."""
        given: Json = {}
        for row in fields(cls):
            if text := environ.get(row.name.upper(), "").strip():
                is_number = row.metadata and re.fullmatch(r"\d{1,12}", text)
                given[row.name] = int(text) if is_number else text
                if isinstance(row.default, bool):
                    given[row.name] = BOOLEANS.get(text.lower(), text)
        return cls(**given)

    @property
    def api_keys(self) -> list[str]:
        return [key.strip() for key in self.proxy_api_key.split(",") if key.strip()]

    @property
    def collections(self) -> list[str]:
        return list(filter(None, map(str.strip, self.list_replicate_models.split(","))))

    def check(self) -> None:
        """Raise ConfigError, with all problems at once, if there are any."""
        problems = []
        token, keys = self.replicate_api_token.strip(), self.api_keys or [""]
        for name, values, remedy in (
            ("REPLICATE_API_TOKEN", [token], f"Get one at {TOKENS_URL}"),
            ("PROXY_API_KEY", keys, "Make one with: openssl rand -hex 32"),
        ):
            fault = next(filter(None, map(secret_fault, values)), "")
            if fault and not (self.client_tokens and values == [""]):
                problems.append(f"{name} {fault}. {remedy} and put it into .env.")
        for row in (row for row in fields(self) if row.metadata):
            name, value = row.name.upper(), getattr(self, row.name)
            low, high = row.metadata["range"]
            if isinstance(value, str):
                problems.append(f"{name} must be a number, not {value!r}.")
            elif not low <= value <= high:
                problems.append(f"{name} must be a number from {low} to {high}.")
        for row in (row for row in fields(self) if isinstance(row.default, bool)):
            if not isinstance(getattr(self, row.name), bool):
                problems.append(f"{row.name.upper()} must be true or false.")
        if self.log_level.upper() not in LOG_LEVELS:
            problems.append(f"LOG_LEVEL must be one of {', '.join(LOG_LEVELS)}.")
        if self.log_format not in LOG_FORMATS:
            problems.append(f"LOG_FORMAT must be one of {', '.join(LOG_FORMATS)}.")
        if not all(re.fullmatch(r"[\w-]{1,100}", slug) for slug in self.collections):
            problems.append(
                "LIST_REPLICATE_MODELS must be names of Replicate's collections, as in "
                "https://replicate.com/collections/language-models, with commas."
            )
        if not re.fullmatch(r"https?://[\w.-]+(:\d+)?(/.*)?", self.replicate_base_url):
            problems.append("REPLICATE_BASE_URL must be of the form https://host/v1.")
        if problems:
            raise ConfigError(*problems)


class Timeouts(NamedTuple):
    """Limits in seconds, for programs that embed or test a server."""

    connect: float = 5
    schema: float = 5  # for Replicate to tell what inputs a model has …
    menu: float = 2  # … and, of a client, which models a collection has
    create: float = 30  # for Replicate to answer a create …
    get: float = 5  # … and a GET or a cancel, which can be repeated
    wait: int = 5  # for a whole answer to come with the create (Prefer: wait)
    stream: float = 60  # without a byte on an event stream
    file: float = 120  # for all of a file that a model made to arrive
    look: float = 3  # for the first of it, if nothing but its type is wanted
    poll: float = 1  # between GETs of a prediction that does not stream …
    poll_most: float = 5  # … and at the most
    after_done: float = 0.05  # between GETs of one whose stream has said `done`
    lost_after: float = 30  # of GETs that fail: a prediction counts as lost
    grace: float = 10  # beyond the deadline, for Replicate to end it by itself
    idle: float = 75  # for the next request on a connection
    head: float = 20  # for all of a request's head to arrive …
    body: float = 120  # … and for all of its body
    silent_start: float = 3  # before a stream's status line goes out, whatever comes
    keep_alive: float = 15  # of silence before a stream sends a comment
    watch_interval: float = 0.2  # between checks of which streams are silent
    abort: float = 8  # for cancelled requests to send their errors, when we stop
    drain: float = 1  # for requests under way on idle connections, when we stop
    drain_input: float = 2  # for a client to read our last bytes before we close
    store: float = 2  # for others to let go of the stored responses


def secret_fault(value: str) -> str:
    if not value:
        return "is missing"
    if PLACEHOLDER.match(value):
        return "is still the placeholder"
    is_sendable = re.fullmatch(r"[!-~]+", value)
    return "" if is_sendable else "has a character no header can carry"


def parse_env_file(text: str) -> dict[str, str]:
    """Parse KEY=value lines as shells and Docker do: export, quotes and comments."""
    values = {}
    for number, line in enumerate(text.removeprefix("\ufeff").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not (match := ENV_LINE.fullmatch(line)):
            raise ConfigError(
                f"Line {number} of the env file is not of the form KEY=value."
            )
        literal, quoted, plain = match.group("literal", "quoted", "plain")
        if quoted is not None:
            plain = re.sub(r"\\(.)", lambda m: ESCAPES.get(m[1], m[1]), quoted)
        values[match["name"]] = literal if literal is not None else plain.strip()
    return values


# -- Models --------------------------------------------------------------------
#
# models.json says which model a name stands for. It is read again when it has
# changed. To add a model: a row in models.json. To add a key: a field of
# ModelConfig, and a row in `parse_models`.


NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"

REF = re.compile(
    rf"deployments/{NAME}/{NAME}|(?!deployments/){NAME}/{NAME}(:{NAME})?|[0-9a-f]{{64}}"
)

OWNED = re.compile(rf"({NAME})/({NAME})(?::({NAME}))?")


class ModelConfig(NamedTuple):
    max_tokens: int | None = None
    temperature_range: tuple[float, float] | None = None
    supports_streaming: bool = True
    family: str | None = None
    input: Json = {}
    price: Mapping[str, float] = {}  # in USD, by the keys of PRICES


@dataclass(frozen=True)
class Model:
    id: str  # what the client calls it
    ref: str  # what Replicate calls it: owner/name, owner/name:version …
    config: ModelConfig = ModelConfig()
    is_default: bool = False

    @property
    def owner_and_name(self) -> str:
        """The ref without its version. A deployment's says nothing of its model."""
        return without_version(self.ref)


@dataclass(frozen=True)
class Models:
    mappings: Mapping[str, str]
    default_model: str | None
    configs: Mapping[str, ModelConfig]
    created: int = 0  # when the file was last written: Unix seconds

    @cached_property
    def by_name(self) -> dict[str, str]:
        """The refs by their names, in lower case."""
        return {name.casefold(): ref for name, ref in self.mappings.items()}

    @cached_property
    def spellings(self) -> dict[str, str]:
        """The refs of the file by themselves, in lower case."""
        refs = (*self.mappings.values(), *self.configs)
        return {ref.casefold(): ref for ref in refs}


def without_version(ref: str) -> str:
    return ref.partition(":")[0]


def is_ref(value: Any) -> bool:
    return isinstance(value, str) and bool(REF.fullmatch(value))


def is_range(value: Any) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2
    return is_pair and all(map(is_number, value)) and bool(value[0] <= value[1])


def expect(is_valid: object, path: str, expected: str) -> None:
    if not is_valid:
        raise ConfigError(f"{path}: expected {expected}.")


Rule = tuple[Callable[[Any], bool], str]  # whether a value is valid, what is expected

A_REF: Rule = (is_ref, "owner/name")
AN_OBJECT: Rule = (lambda v: isinstance(v, dict), "an object")
DOLLARS: Rule = (lambda v: is_number(v) and 0 <= v < 1e6, "US dollars, from 0")

# For a million tokens, an image, a second for which the model ran, and a character of
# what is to be spoken.
PRICES = dict.fromkeys(("input", "output", "image", "second", "character"), DOLLARS)


def check_object(value: Any, rules: Mapping[str, Rule], path: str) -> Json:
    """Return an object without comments and nulls; raise ConfigError if it is wrong."""
    expect(isinstance(value, dict), path, "an object")
    row = {k: v for k, v in value.items() if not (k.startswith("_") or v is None)}
    for key, item in row.items():
        unknown = (lambda _: False, f"one of {', '.join(rules)}")
        is_valid, expected = rules.get(key, unknown)
        expect(is_valid(item), f"{path}.{key}", expected)
    return row


def parse_models(text: str, families: Sequence[str], created: int = 0) -> Models:
    """Raise ConfigError with the JSON path of what is wrong and what was expected."""
    keys = {"default_model": A_REF, "mappings": AN_OBJECT, "model_configs": AN_OBJECT}
    config_keys: dict[str, Rule] = {
        "max_tokens": (lambda v: type(v) is int and v >= 1, "a whole number from 1"),
        "temperature_range": (is_range, "two numbers, the lower one first"),
        "supports_streaming": (lambda v: isinstance(v, bool), "true or false"),
        "family": (lambda v: v in families, f"one of {', '.join(families)}"),
        "input": AN_OBJECT,
        "price": AN_OBJECT,
    }
    try:
        value = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"it is not JSON: {error}") from None
    root = check_object(value, keys, "$")
    mappings = root.get("mappings", {})
    for name, ref in mappings.items():
        expect(is_ref(ref), f'$.mappings["{name}"]', "owner/name")
    configs = {}
    for ref, given in root.get("model_configs", {}).items():
        path = f'$.model_configs["{ref}"]'
        row = check_object(given, config_keys, path)
        if "price" in row:
            row["price"] = check_object(row["price"], PRICES, f"{path}.price")
        configs[ref] = ModelConfig(**row)
    return Models(mappings, root.get("default_model"), configs, created)


class ModelsFile:
    """models.json, read again after an edit; a wrong edit changes nothing."""

    def __init__(self, path: str, families: Iterable[str]) -> None:
        self.path = Path(path)
        self.families = list(families)
        self.lock = threading.Lock()
        self.stamp = self.read_stamp()
        self.models = self.read()

    def read_stamp(self) -> tuple[int, ...]:
        """What changes with an edit; () if the file is not there."""
        try:
            stat = self.path.stat()
        except OSError:
            return ()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def read(self) -> Models:
        try:
            text = self.path.read_text(encoding="utf-8")
            return parse_models(text, self.families, int(self.path.stat().st_mtime))
        except (OSError, UnicodeDecodeError, ConfigError) as error:
            raise ConfigError(f"{self.path} can't be used: {error}") from None

    def current(self) -> Models:
        stamp = self.read_stamp()
        with self.lock:
            if stamp != self.stamp:
                self.stamp = stamp
                try:
                    self.models = self.read()
                    count = len(self.models.mappings)
                    log.info(LogRow(models_path=self.path, models=count))
                except ConfigError as error:
                    log.error("%s The models read before it stay.", error)
            return self.models


DATE = re.compile(r"-(\d{4}|\d{8}|\d{4}-\d{2}-\d{2}|latest)$")


def find_ref(models: Models, id: str) -> str | None:
    """What Replicate calls a model: by its name in the file, or by the form of a ref.

    Clients write names in other case, with a date (gpt-4o-2024-08-06, gpt-4-0613),
    with what Ollama (name:latest) or LiteLLM (replicate/owner/name) put to them."""
    full = id.strip(" ")
    name = re.sub("(?i):latest$", "", full)
    if REF.fullmatch(rest := re.sub("(?i)^replicate/", "", name)):
        name = rest
    lower, names = name.casefold(), models.by_name
    listed = names.get(full.casefold()) or names.get(lower)
    undated = names.get(DATE.sub("", lower))
    ref = models.spellings.get(lower, name) if REF.fullmatch(name) else undated
    return listed or ref


def find_model(models: Models, id: str) -> Model:
    """Find by name or ref, else the default, which the log says once; raise 404."""
    known = models.mappings.get(id) or find_ref(models, id)
    ref = known or models.default_model
    if not ref:
        raise APIError(
            404,
            f"The model `{id}` does not exist or you do not have access to it. Use a "
            "name that GET /v1/models lists, or a model of Replicate as owner/name.",
            code="model_not_found",
        )
    if not known:
        warn_of_default(id, ref)
    config = models.configs.get(ref) or models.configs.get(without_version(ref))
    return Model(id, ref, config or ModelConfig(), is_default=not known)


@lru_cache(1000)  # once for each name
def warn_of_default(id: str, ref: str) -> None:
    log.warning(LogRow(event="default_model", model=id, ref=ref))


# -- Metrics -------------------------------------------------------------------
#
# What is counted for Prometheus. Each process counts in a part of memory that all
# workers share: whichever of them is scraped adds the parts up, what a worker has
# counted outlives it, and the one that takes its place counts on from there. A part is
# a row of series: what is counted, and its numbers. To add a family: a row in METRICS,
# and a call of `add` or `observe`.


class Metric(NamedTuple):
    help: str
    labels: str = ""  # their names
    buckets: tuple[float, ...] = ()  # of a histogram: their upper bounds


# The longest are those of models that have to be started, which takes minutes.
DURATIONS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600, 1200)
FIRST_TOKENS = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)
TOKEN_PACES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)

# What ends in _total is a counter, what has buckets a histogram, and all else a gauge.
METRICS = {
    "requests_total": Metric(
        "Requests, by what became of them: 499 if the client left before a status.",
        "endpoint model status code",
    ),
    "request_duration_seconds": Metric(
        "From the first byte of a request to the last of its response.",
        "endpoint model stream",
        DURATIONS,
    ),
    "time_to_first_token_seconds": Metric(
        "From the first byte of a request to the first text of its stream.",
        "model",
        FIRST_TOKENS,
    ),
    "time_per_output_token_seconds": Metric(
        "Between two tokens of a stream, as the mean of all of them.",
        "model",
        TOKEN_PACES,
    ),
    "tokens_total": Metric(
        "Tokens, by Replicate's count or an estimate.", "model type estimated"
    ),
    "cost_usd_total": Metric("What predictions cost, of models with a price.", "model"),
    "in_flight": Metric("Requests that are being worked on."),
    "predictions_total": Metric("Predictions, by how they ended.", "model status"),
    "predict_seconds_total": Metric(
        "How long models ran, as Replicate tells it.", "model"
    ),
    "upstream_requests_total": Metric(
        "Requests to Replicate, by its status: none if it did not answer.",
        "kind status token",
    ),
    "retries_total": Metric(
        "Second predictions, for answers without the JSON or tool call asked for."
    ),
    "client_disconnects_total": Metric("Requests whose clients left before their end."),
}

# Series that are there, at 0, from the start: an alert sees the first of them.
KNOWN_SERIES = [
    *((name,) for name, metric in METRICS.items() if not metric.labels),
    *(
        ("upstream_requests_total", kind, status, "proxy")
        for kind, statuses in {
            "create": ("201", "401", "402", "403", "429", "none"),
            "account": ("401", "403"),
        }.items()
        for status in statuses
    ),
]

METRICS_PREFIX = "replicate_proxy_"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_MODEL_LABELS = 200  # models that have numbers of their own in a process
MAX_SERIES = 10_000  # of a process: 5 MB, which is taken as it is used

SERIES_BYTES = 512  # the numbers of a series, and its key as JSON
# Of these numbers the first is the value. A histogram has one for each bucket and for
# what is above, then, the last but one, the sum. The last is the length of the key: as
# soon as that is there, others read the series.
NUMBERS_BYTES = 8 * (max(len(metric.buckets) for metric in METRICS.values()) + 3)

ABOUT_THE_PROCESS = """\
# HELP replicate_proxy_build_info The proxy's version.
# TYPE replicate_proxy_build_info gauge
replicate_proxy_build_info{{version="{version}"}} 1
# HELP process_start_time_seconds In Unix seconds.
# TYPE process_start_time_seconds gauge
process_start_time_seconds {started}"""

MetricKey = tuple[str, ...]  # the family, and the values of its labels


class Metrics:
    """What this process counts, and with `render` the sum of all."""

    def __init__(self, processes: int = 1) -> None:
        self.started = time.time()
        size = MAX_SERIES * SERIES_BYTES
        memory = memoryview(mmap.mmap(-1, processes * size))
        self.parts = [memory[at : at + size] for at in range(0, len(memory), size)]
        self.lock = threading.Lock()
        self.models: set[str] = set()  # that have numbers of their own
        self.use_part(0)

    def use_part(self, number: int) -> None:
        """Count on in a part where a process before this one may have stopped."""
        self.part = self.parts[number]
        self.series = dict(read_series(self.part))
        for key in KNOWN_SERIES:
            self.add(0, *key)
        self.series["in_flight",][0] = 0

    def begin_series(self, key: MetricKey) -> memoryview[float]:
        """The numbers of a new series; the lock is held."""
        text, at = json.dumps(key).encode(), len(self.series) * SERIES_BYTES
        row = self.part[at : at + SERIES_BYTES]
        if len(text) > len(row) - NUMBERS_BYTES:  # no room: nobody reads these
            return memoryview(bytearray(NUMBERS_BYTES)).cast("d")
        row[NUMBERS_BYTES : NUMBERS_BYTES + len(text)] = text
        self.series[key] = numbers = row[:NUMBERS_BYTES].cast("d")
        numbers[-1] = len(text)
        return numbers

    def add(self, amount: float, *key: str) -> None:
        with self.lock:
            numbers = self.series.get(key) or self.begin_series(key)
            numbers[0] += amount

    def observe(self, value: float, *key: str) -> None:
        bucket = bisect_left(METRICS[key[0]].buckets, value)
        with self.lock:
            numbers = self.series.get(key) or self.begin_series(key)
            numbers[bucket] += 1
            numbers[-2] += value

    def model_label(self, ref: str, is_known: bool) -> str:
        """A model's name if Replicate or models.json knows it, and there is room."""
        if ref in self.models:
            return ref
        name = without_version(ref)
        if is_known and len(self.models) < MAX_MODEL_LABELS:
            self.models.add(name)
        return name if name in self.models else "other"

    def render(self) -> bytes:
        """The sum of all processes, in Prometheus' text format."""
        found: dict[MetricKey, list[memoryview[float]]] = defaultdict(list)
        for key, numbers in chain.from_iterable(map(read_series, self.parts)):
            found[key].append(numbers)
        lines = [ABOUT_THE_PROCESS.format(version=__version__, started=self.started)]
        for name, metric in METRICS.items():
            full = METRICS_PREFIX + name
            kind = "counter" if name.endswith("_total") else "gauge"
            kind = "histogram" if metric.buckets else kind
            lines += [f"# HELP {full} {metric.help}", f"# TYPE {full} {kind}"]
            for key in sorted(key for key in found if key[0] == name):
                values = zip(metric.labels.split(), key[1:], strict=True)
                labels = [f"{label}={json.dumps(value)}" for label, value in values]
                *totals, sum_, _ = map(sum, zip(*found[key], strict=True))
                if not metric.buckets:
                    lines.append(sample(full, labels, totals[0]))
                    continue
                counts, bounds = [*accumulate(totals)], (*metric.buckets, "+Inf")
                for bound, count in zip(bounds, counts, strict=False):
                    bucket = [*labels, f'le="{bound}"']
                    lines.append(sample(f"{full}_bucket", bucket, count))
                lines.append(sample(f"{full}_sum", labels, sum_))
                lines.append(sample(f"{full}_count", labels, counts[-1]))
        return "\n".join([*lines, ""]).encode()


def read_series(part: memoryview) -> Iterator[tuple[MetricKey, memoryview[float]]]:
    """What is counted in a part of the memory, and its numbers."""
    for at in range(0, len(part), SERIES_BYTES):
        row = part[at : at + SERIES_BYTES]
        numbers = row[:NUMBERS_BYTES].cast("d")
        if not (length := int(numbers[-1])):
            return
        key = bytes(row[NUMBERS_BYTES : NUMBERS_BYTES + length])
        yield tuple(json.loads(key)), numbers


def sample(name: str, labels: Sequence[str], value: float) -> str:
    return f"{name}{{{','.join(labels)}}} {value!r}" if labels else f"{name} {value!r}"


# ==== 2. REQUESTS =============================================================


# -- Validation ----------------------------------------------------------------
#
# A body is a JSON object that every reader reads alike: NaN, or a key that is
# there twice, is refused. Every parameter that OpenAI documents is in exactly one
# place: a row here (honoured, or refused with the reason), or IGNORED (harmless to
# drop). What OpenAI does not document goes to the model if its family names it.
# null is the same as absent. To add a parameter: a row here, in SAMPLING or
# EXTENSIONS if models have an input for it, and its name in the families.


NOT_JSON = (
    "We could not parse the JSON body of your request. The OpenAI API expects a JSON "
    "object, but what was sent is not one: "
)


MAX_JSON_SIGNS = 500_000  # more, and parsing takes too much memory, and Python's lock
MAX_JSON_DEPTH = 400  # more, and the SDK's encoder meets Python's recursion limit


def json_depth(value: Any) -> int:
    """How deep arrays and objects go; or raise RecursionError."""
    inside = value.values() if isinstance(value, dict) else value
    return 1 + max(
        (json_depth(v) for v in inside if isinstance(v, (dict, list))), default=0
    )


NO_SIGNS = bytes(set(range(256)) - set(b'"[]{},'))


def check_json_signs(data: bytes) -> None:
    """Raise 413 for too many brackets, braces and commas outside strings.

    They are counted before JSON is parsed, in time and memory for few bytes.
    """
    if len(data) <= MAX_JSON_SIGNS:
        return
    unescaped = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    signs = unescaped.translate(None, NO_SIGNS)
    count, is_inside = 0, False  # a string
    for at in range(0, len(signs), 65536):
        parts = signs[at : at + 65536].split(b'"')
        count += sum(map(len, parts[is_inside::2]))
        is_inside ^= len(parts) % 2 == 0
        if count > MAX_JSON_SIGNS:
            message = f"The JSON has more than {MAX_JSON_SIGNS} brackets and commas."
            raise APIError(413, f"{message} Send less at once.")


def parse_json_body(data: bytes, content_type: str) -> Json:
    """Parse a JSON object; raise 400 with the reason if it is none, or is ambiguous."""
    check_json_signs(data)
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode()
        body = json.loads(
            text,
            parse_constant=reject_constant,
            parse_float=finite_float,
            object_pairs_hook=reject_duplicate_keys,
        )
        if "\\ud" in text or "\\uD" in text:
            json.dumps(body, ensure_ascii=False).encode()
        if not isinstance(body, dict):
            why = f"it is {KINDS[type(body)]}"
        elif text.count("{") + text.count("[") > MAX_JSON_DEPTH < json_depth(body):
            why = "it is nested too deeply"
        else:
            return body
    except json.JSONDecodeError as error:
        why = f"{error.msg} at line {error.lineno}, column {error.colno}"
    except UnicodeDecodeError as error:
        why = f"its byte {error.start} is not UTF-8"
    except UnicodeEncodeError:
        why = "half of a surrogate pair is no character"
    except RecursionError:
        why = "it is nested too deeply"
    except ValueError as error:
        why = f"it holds {error}"
    if "json" not in content_type:
        raise APIError(
            400,
            f"Unsupported content type: '{content_type}'. This API method only accepts "
            "'application/json' requests. Please send one with the header "
            "'Content-Type: application/json'.",
            code="unsupported_content_type",
        )
    raise APIError(400, f"{NOT_JSON}{why}.")


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> Json:
    """Raise ValueError, as two readers might take different ones of the values."""
    object: Json = dict(pairs)
    if len(object) < len(pairs):
        names = sorted(name for name, _ in pairs)
        twice = next(name for name, after in pairwise(names) if name == after)
        raise ValueError(f"the key {json.dumps(twice)} twice")
    return object


class Param(NamedTuple):
    kinds: tuple[type, ...] = ()
    low: float | None = None  # of a number; of a string or an array, its length
    high: float | None = None
    default: Any = None
    choices: tuple[Any, ...] = ()  # of a string
    pattern: str = ""  # of a string
    items: tuple[type, ...] = ()  # what an array is of
    each: Mapping[str, Param] | None = None  # what an object holds, or those in it
    required: bool = False
    by_type: bool = False  # required if the `type` beside it has its name
    unset: tuple[Any, ...] = ()  # values that mean the same as null
    refused: str = ""  # why any value but null and the choices is refused
    names: str = ""  # what models call their input for it, the best first


STRING, INTEGER, BOOLEAN, ARRAY, OBJECT = (str,), (int,), (bool,), (list,), (dict,)
NUMBER = (int, float)

INT64 = (-(2**63), 2**63 - 1)
MAX_PREDICTIONS = 128  # of one call; OpenAI's most choices
MAX_MESSAGES = 10_000
MAX_PARTS = 10_000  # of all messages
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
VERBOSITIES = ("low", "medium", "high")
NO_LIMIT = (-1,)  # as LM Studio's examples and llama.cpp have it
NO_LOGPROBS = "Replicate's models give no log probabilities."
NO_GRAMMAR = "Only a JSON Schema can be asked for, as response_format."
GRAMMARS = ("guided_regex", "guided_grammar", "guided_choice", "regex", "grammar")


def refuse(reason: str, *harmless: Any) -> Param:
    """Of a parameter that asks for what can't be had, unless it has such a value."""
    return Param(refused=reason, choices=harmless)


# OpenAI's parameters that models have an input for. Choices stand in order, the
# least first. OpenAI's limit of stop strings is 4, but SillyTavern and Continue
# send more to servers like this.
SAMPLING = {
    "temperature": Param(NUMBER, 0, 2, names="temperature temp"),
    "top_p": Param(NUMBER, 0, 1, names="top_p"),
    "presence_penalty": Param(NUMBER, -2, 2, names="presence_penalty"),
    "frequency_penalty": Param(NUMBER, -2, 2, names="frequency_penalty"),
    "max_tokens": Param(
        INTEGER,
        1,
        INT64[1],
        unset=NO_LIMIT,
        names="max_completion_tokens max_output_tokens max_tokens max_new_tokens "
        "max_tokens_to_generate num_predict max_length",
    ),
    "stop": Param(
        (str, list),
        0,
        64,
        default=[],
        items=STRING,
        names="stop stop_sequences stop_strings stop_words",
    ),
    "seed": Param(INTEGER, *INT64, names="seed random_seed"),
    "reasoning_effort": Param(
        STRING,
        choices=EFFORTS,
        unset=("auto", "default"),
        names="reasoning_effort thinking_level effort reasoning thinking "
        "thinking_budget",
    ),
    "verbosity": Param(STRING, choices=VERBOSITIES, names="verbosity"),
}

# Not OpenAI's, but sent by many clients to models that have them.
EXTENSIONS = {
    "top_k": Param(INTEGER, *INT64, names="top_k"),
    "min_tokens": Param(INTEGER, *INT64, names="min_tokens min_new_tokens min_length"),
    "repetition_penalty": Param(NUMBER, 0, names="repetition_penalty repeat_penalty"),
}

MODEL_PARAMS = {**SAMPLING, **EXTENSIONS}

STREAM_OPTIONS = {
    "include_usage": Param(BOOLEAN, default=False),
    "include_obfuscation": Param(BOOLEAN),
    "continuous_usage_stats": Param(BOOLEAN, default=False),  # vLLM's
}

SHARED = {  # by chat and text completions
    **MODEL_PARAMS,
    "model": Param(STRING, 1, 256),
    "stream": Param(BOOLEAN, default=False),
    "stream_options": Param(OBJECT, default={}, each=STREAM_OPTIONS),
    "max_completion_tokens": Param(INTEGER, 1, INT64[1], unset=NO_LIMIT),
    "n": Param(INTEGER, 1, 8, default=1),
    "logit_bias": refuse("Token ids mean nothing to Replicate's models.", {}),
    "replicate": Param(OBJECT, default={}),  # into the input, over all else
}


def one_of(*others: str, **rows: Param) -> dict[str, Param]:
    """What an object holds whose `type` names the parameter that it needs, or none."""
    type = Param(STRING, required=True, choices=(*others, *rows))
    needed = {name: row._replace(by_type=True) for name, row in rows.items()}
    return {"type": type, **needed}


IMAGE_URL = {"url": Param(STRING, 1, required=True), "detail": Param(STRING)}

INPUT_AUDIO = {
    "data": Param(STRING, 1, required=True),
    "format": Param(STRING, required=True, choices=("wav", "mp3")),
}

FILE = {
    "file_id": refuse("No files are kept here. Send it as file_data."),
    "file_data": Param(STRING, 1, required=True),
    "filename": Param(STRING),
}

PART = one_of(
    text=Param(STRING),
    refusal=Param(STRING),
    image_url=Param(OBJECT, each=IMAGE_URL),
    video_url=Param(OBJECT, each={"url": Param(STRING, 1, required=True)}),
    input_audio=Param(OBJECT, each=INPUT_AUDIO),
    file=Param(OBJECT, each=FILE),
)

TOOL_NAME = re.compile("[A-Za-z0-9_-]{1,64}")

FUNCTION = {
    "name": Param(STRING, 1, required=True, pattern=TOOL_NAME.pattern),
    "description": Param(STRING, default=""),
    "parameters": Param(OBJECT, default={}),
    "strict": Param(BOOLEAN),
}

TOOL = one_of(
    function=Param(OBJECT, each=FUNCTION),
    custom=refuse(
        "Replicate's models can't be given custom tools. Use one of type 'function'."
    ),
)

NAME_ONLY = {"name": Param(STRING, 1, required=True)}

NAMED_TOOL = {
    "type": Param(STRING, default="function", choices=("function",)),
    "function": Param(OBJECT, required=True, each=NAME_ONLY),
}

ALLOWED_TOOLS = {
    "mode": Param(STRING, required=True, choices=("auto", "required")),
    "tools": Param(ARRAY, 1, required=True, items=OBJECT, each=NAMED_TOOL),
}

TOOL_CHOICE = one_of(
    function=Param(OBJECT, each=NAME_ONLY),
    allowed_tools=Param(OBJECT, each=ALLOWED_TOOLS),
)

FUNCTION_CALL = {**NAME_ONLY, "arguments": Param(STRING, required=True)}

MESSAGE_CALL = {
    "id": Param(STRING, 1, required=True),
    "type": Param(STRING, default="function", choices=("function",)),
    "function": Param(OBJECT, required=True, each=FUNCTION_CALL),
}

ROLES = ("developer", "system", "user", "assistant", "tool", "function")

MESSAGE = {  # parse_messages checks what depends on the role
    "role": Param(STRING, required=True, choices=ROLES),
    "content": Param((str, list), items=OBJECT, each=PART),
    "refusal": Param(STRING),
    "name": Param(STRING, 0, 64),
    "tool_calls": Param(ARRAY, items=OBJECT, each=MESSAGE_CALL),
    "tool_call_id": Param(STRING),
    "function_call": Param(OBJECT, each=FUNCTION_CALL),
}

JSON_SCHEMA = {
    "name": Param(STRING, 1, 64, default="answer", pattern="[a-zA-Z0-9_-]+"),
    "description": Param(STRING, default=""),
    "schema": Param(OBJECT, required=True),
    "strict": Param(BOOLEAN, default=False),
}

RESPONSE_FORMAT = one_of(
    "text", "json_object", json_schema=Param(OBJECT, each=JSON_SCHEMA)
)

CHAT = {
    **SHARED,
    "messages": Param(
        ARRAY, 1, MAX_MESSAGES, required=True, items=OBJECT, each=MESSAGE
    ),
    "tools": Param(ARRAY, 0, 128, default=[], items=OBJECT, each=TOOL),
    "tool_choice": Param(
        (str, dict), choices=("none", "auto", "required"), each=TOOL_CHOICE
    ),
    "parallel_tool_calls": Param(BOOLEAN, default=True),
    "functions": Param(ARRAY, 0, 128, default=[], items=OBJECT, each=FUNCTION),
    "function_call": Param((str, dict), choices=("none", "auto"), each=NAME_ONLY),
    "logprobs": refuse(NO_LOGPROBS, False),
    "top_logprobs": refuse(NO_LOGPROBS, 0),
    "response_format": Param(OBJECT, each=RESPONSE_FORMAT),
    "modalities": refuse("Replicate's language models answer in text.", ["text"]),
    "audio": refuse("Replicate's language models answer in text."),
    **dict.fromkeys(GRAMMARS, refuse(NO_GRAMMAR, "", [])),
    "web_search_options": refuse("Replicate's language models don't search."),
}

COMPLETION = {
    **SHARED,
    "prompt": Param((str, list), 1, 128, default=["<|endoftext|>"], items=STRING),
    "max_tokens": SAMPLING["max_tokens"]._replace(low=0, default=16),
    "echo": Param(BOOLEAN, default=False),
    "suffix": refuse("Replicate's models don't fill in the middle.", ""),
    "logprobs": refuse(NO_LOGPROBS),
    "best_of": refuse("All choices are returned, with n.", 1),
    **dict.fromkeys(GRAMMARS, refuse(NO_GRAMMAR, "", [])),
    "response_format": refuse(
        "A prompt goes to the model as it is. Ask for JSON by /v1/chat/completions.",
        {"type": "text"},
    ),
}

IGNORED_NAMES = (
    "user safety_identifier store metadata service_tier prediction moderation "
    "prompt_cache_key prompt_cache_options prompt_cache_retention"
)
IGNORED = {*IGNORED_NAMES.split()}

DOCUMENTED = {*CHAT, *COMPLETION, *IGNORED} - EXTENSIONS.keys()  # by OpenAI


PART_TYPES = {"input_text": "text", "output_text": "text"}  # of the Responses API
PASSED_OVER = ("reasoning", "thinking", "redacted_thinking")  # parts of an answer


def in_openais_words(body: Json) -> Json:
    """Translate what clients of other servers send for the same wish.

    A schema of the answer: llama.cpp and Together have it in `response_format`, or
    as `json_schema`, vLLM as `guided_json` or in `structured_outputs`, Ollama as
    `format`. Parts of messages: clients send back what another API gave them."""
    asked = as_object(body.get("response_format"))
    outputs = as_object(body.get("structured_outputs"))
    for name in GRAMMARS:  # which are refused
        if (short := name.removeprefix("guided_")) in outputs:
            body = {**body, name: outputs[short]}
    body = with_effort(body)
    schemas = {
        "response_format": asked.get("schema"),
        "structured_outputs": outputs.get("json"),
        **{key: body.get(key) for key in ("json_schema", "guided_json", "format")},
    }
    if asked.get("type") == "text":
        del schemas["response_format"]
    elif asked.get("json_schema") is not None:
        schemas = {}
    for key, schema in schemas.items():
        value = parsed(schema) if isinstance(schema, str) else schema
        inner = as_object(value).get("schema")
        if key == "json_schema" and isinstance(inner, dict):
            value = inner  # OpenAI's own form of it
        if isinstance(value, dict) and not isinstance(value.get("format"), dict):
            asked = {"type": "json_schema", "json_schema": {"schema": value}}
            body = {**without(body, [key]), "response_format": asked}
        elif schema == "json":
            body = {**without(body, [key]), "response_format": {"type": "json_object"}}
    messages = [as_chat_message(message) for message in as_list(body.get("messages"))]
    return {**body, "messages": messages} if messages else body


def with_effort(body: Json) -> Json:
    """Anthropic's `thinking` and OpenRouter's `reasoning` as reasoning_effort."""
    efforts = {"disabled": "none", "enabled": "medium", "adaptive": "medium"}
    for name in ("thinking", "reasoning"):
        if isinstance(given := body.get(name), dict):
            effort = given.get("effort") or efforts.get(str(given.get("type")))
            named = {"reasoning_effort": body.get("reasoning_effort") or effort}
            body = {**without(body, [name]), **named}
    return body


def as_chat_message(message: Any) -> Any:
    if not isinstance(content := as_object(message).get("content"), list):
        return message
    kept = (p for p in content if as_object(p).get("type") not in PASSED_OVER)
    return {**message, "content": [as_chat_part(part) for part in kept]}


def as_chat_part(part: Any) -> Any:
    """A part of a message under the name that chat has for it."""
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return part
    is_image = part["type"] in ("image_url", "input_image")
    if is_image and isinstance(part.get("image_url"), str):
        return {**part, "type": "image_url", "image_url": {"url": part["image_url"]}}
    return {**part, "type": PART_TYPES.get(part["type"], part["type"])}


def check(body: Json, params: Mapping[str, Param], path: str = "") -> Json:
    """Return the body with every parameter of the table; raise 400 if one is wrong."""
    given = {
        k: v
        for k, v in body.items()
        if v is not None and (k in params or k not in IGNORED)
    }
    checked: Json = {}
    for name, param in params.items():
        value = given.get(name)
        if param.by_type:  # what is left over from another type does no harm
            is_checked = given.get("type") == name
        else:
            is_checked = param.required or name in given
        if value in param.unset:
            checked[name] = None
        elif is_checked:
            checked[name] = check_param(path + name, value, param)
        else:
            checked[name] = param.default
    # A model may have parameters of its own, but it refuses more in a message.
    return checked if path else {**given, **checked}


def missing_parameter(path: str) -> APIError:
    message = f"Missing required parameter: '{path}'."
    return APIError(400, message, code="missing_required_parameter", param=path)


def check_param(path: str, value: Any, param: Param) -> Any:
    """Return a value in the form that code below reads; raise 400 if it is wrong."""
    if value is None:
        raise missing_parameter(path)
    if param.refused:
        message = (
            f"Unsupported parameter: '{path}' is not supported here. {param.refused}"
        )
        harmless = any(type(value) is type(c) and value == c for c in param.choices)
        require(harmless, message, code="unsupported_parameter", param=path)
        return param.default
    if param.kinds == INTEGER and isinstance(value, float) and value.is_integer():
        value = int(value)  # 2.0 is whole in JSON; either side of 2.5 is a guess
    check_kind(path, value, param.kinds)
    if isinstance(value, str) and param.items == STRING:
        value = [value]  # one string stands for an array of one
    if is_number(value):
        check_number(path, value, param)
    if isinstance(value, (str, list)):
        check_length(path, value, param)
    if param.choices and not isinstance(value, dict):
        *some, last = [f"'{choice}'" for choice in param.choices]
        listed = f"{', '.join(some)}, and {last}" if some else last
        message = f"Invalid value: '{value}'. Supported values are: {listed}."
        require(value in param.choices, message, code="invalid_value", param=path)
    if param.pattern and isinstance(value, str):
        message = (
            f"Invalid '{path}': string does not match pattern. Expected a string that "
            f"matches the pattern '^{param.pattern}$'."
        )
        matches = re.fullmatch(param.pattern, value)
        require(matches, message, code="invalid_value", param=path)
    if isinstance(value, list):
        for index, item in enumerate(value):
            check_kind(f"{path}[{index}]", item, param.items)
        if each := param.each:
            return [check(v, each, f"{path}[{i}].") for i, v in enumerate(value)]
    if isinstance(value, dict) and param.each:
        return check(value, param.each, f"{path}.")
    return value


def check_kind(path: str, value: Any, kinds: tuple[type, ...]) -> None:
    if type(value) in kinds:
        return
    names = [KINDS[kind] for kind in kinds if (kind, kinds) != (int, NUMBER)]
    expected = f"one of {' or '.join(names)}" if len(names) > 1 else names[0]
    got = f"expected {expected}, but got {KINDS[type(value)]} instead."
    message = f"Invalid type for '{path}': {got}"
    raise APIError(400, message, code="invalid_type", param=path)


def check_number(path: str, value: float, param: Param) -> None:
    noun = "integer" if param.kinds == INTEGER else "decimal"
    for side, short, sign, bound, beyond in (
        ("below minimum", "below_min", ">=", param.low, lt),
        ("above maximum", "above_max", "<=", param.high, gt),
    ):
        if bound is not None and beyond(value, bound):
            expected = f"Expected a value {sign} {bound}, but got {value} instead."
            message = f"Invalid '{path}': {noun} {side} value. {expected}"
            raise APIError(400, message, code=f"{noun}_{short}_value", param=path)


def check_length(path: str, value: str | list[Any], param: Param) -> None:
    """Raise 400 for a string or an array that is shorter or longer than allowed."""
    noun = "array" if isinstance(value, list) else "string"
    a, size = KINDS[type(value)], len(value)
    if param.low and size < param.low:
        expected = f"{a} with minimum length {param.low}, but got an empty {noun}"
        message = f"Invalid '{path}': empty {noun}. Expected {expected} instead."
        raise APIError(400, message, code=f"empty_{noun}", param=path)
    if param.high and size > param.high:
        expected = f"{a} with maximum length {param.high}, but got {a} with length"
        message = (
            f"Invalid '{path}': {noun} too long. Expected {expected} {size} instead."
        )
        raise APIError(400, message, code=f"{noun}_above_max_length", param=path)


# -- Messages ------------------------------------------------------------------
#
# Checks of messages that tables can't express, and the form that all code below
# reads: no field is null, content is a string unless something is attached, an
# attachment has a `url` that is a link or a plain data: URL, calls are tool_calls,
# and results have the role `tool`. To add a type of part: a row in PART, and one in
# ATTACHABLE.


Messages = list[Json]

TEXT_PARTS = ("text", "refusal")  # the parts of a message that are text


def text_of(content: str | list[Json]) -> str:
    """The text of a message, its parts joined without a gap."""
    if isinstance(content, str):
        return content
    return "".join(part[part["type"]] for part in content if part["type"] in TEXT_PARTS)


def join_texts(parts: list[Json]) -> str | list[Json]:
    """A string where nothing is attached, as every model knows one."""
    return (
        text_of(parts) if all(part["type"] in TEXT_PARTS for part in parts) else parts
    )


LINK = re.compile(r"https?://[^\s\x00-\x1f\x7f/][^\s\x00-\x1f\x7f]*", re.IGNORECASE)

DATA_URL = re.compile(r"data:[^,;]+;[^,]*base64,", re.IGNORECASE)

MEDIA_TYPE = re.compile(r"[a-z0-9.+-]+/[a-z0-9.+-]+")
FILE_TYPE = "application/octet-stream"  # of any file

SIGNATURE_SIZE = 256  # bytes of a file that tell its type

# How files begin, by their media types. Of the first bits of a frame of MPEG audio, two
# tell MP3 from AAC.
SIGNATURES = {
    name: re.compile(pattern, re.DOTALL)
    for name, pattern in {
        "image/png": rb"\x89PNG\r\n\x1a\n",
        "image/jpeg": rb"\xff\xd8\xff",
        "image/gif": rb"GIF8[79]a",
        "image/webp": rb"RIFF....WEBP",
        "image/avif": rb"....ftypavi[fs]",
        "image/bmp": rb"BM....\0\0\0\0",
        "image/tiff": rb"II\*\0|MM\0\*",
        "image/x-icon": rb"\0\0\x01\0",
        "image/svg+xml": rb"\s*(<[?!][^>]*>\s*)*<svg\b",
        "audio/wav": rb"RIFF....WAVE",
        "audio/mpeg": rb"ID3|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]",
        "audio/aac": rb"\xff[\xf0\xf1\xf8\xf9]",
        "audio/flac": rb"fLaC",
        "audio/ogg": rb"OggS",
        "audio/mp4": rb"....ftypM4A",
        "video/mp4": rb"....ftyp",
        "video/webm": rb"\x1aE\xdf\xa3",
    }.items()
}


def media_type(content: bytes) -> str:
    """Tell a file by its first bytes, as many programs name a fixed type; or ""."""
    start = content[:SIGNATURE_SIZE]
    return next((type for type, row in SIGNATURES.items() if row.match(start)), "")


BASE64 = re.compile(r"[A-Za-z0-9+/]*")

IMAGES_TAKEN = ("image/png", "image/jpeg", "image/gif", "image/webp")

WRONG_IMAGE = (
    "You uploaded an unsupported image. Please make sure your image is valid and has "
    "one of the following formats: ['png', 'jpeg', 'gif', 'webp']."
)


class File(NamedTuple):
    """What a data: URL holds, or a part of a form."""

    kind: str  # its media type
    content: bytes

    @property
    def url(self) -> str:
        return f"data:{self.kind};base64,{b64encode(self.content).decode()}"


KINDS[File] = "a file"

ATTACHABLE = {  # the field with its URL or data, and what to send in it
    "image_url": ("url", "https://… or data:image/png;base64,…"),
    "video_url": ("url", "https://… or data:video/mp4;base64,…"),
    "input_audio": ("data", "base64"),
    "file": ("file_data", "https://… or data:application/pdf;base64,…"),
}


def parse_part(part: Json, path: str) -> Json:
    """Bring the URL of an attachment to a form that any model reads; or raise 400."""
    kind = part["type"]
    if kind in TEXT_PARTS:
        return without_nulls(part)
    key, expected = ATTACHABLE[kind]
    path, url = f"{path}.{kind}.{key}", part[kind][key].strip()
    if kind == "input_audio":
        url = f"data:audio/{part[kind]['format']};base64,{url}"
    found = parse_url(url, path, expected, is_image=kind == "image_url")
    url = found.url if isinstance(found, File) else found
    return {"type": kind, kind: without_nulls({**part[kind], "url": url})}


def parse_url(url: str, path: str, expected: str, *, is_image: bool) -> str | File:
    """Return a link, or the file that a data: URL holds; or raise 400."""
    if LINK.fullmatch(url):
        return url
    file = read_data_url(url)
    if file is None:
        message = f"Invalid '{path}': it has to be {expected}, with the right data."
        code = "invalid_image_url" if is_image else "invalid_value"
        raise APIError(400, message, code=code, param=path)
    return parse_image(file, path) if is_image else file


def parse_image(file: File, path: str) -> File:
    """Return an image with its true type; raise 400 if it is none."""
    type = media_type(file.content)
    is_taken = type in IMAGES_TAKEN
    require(is_taken, WRONG_IMAGE, code="invalid_image_format", param=path)
    return File(type, file.content)


def read_data_url(url: str) -> File | None:
    """Parse as browsers do: upper case, parameters and line breaks are allowed."""
    head, comma, data = url.partition(",")
    scheme, _, rest = head.partition(":")
    kind, *parameters = [word.strip().lower() for word in rest.split(";")]
    in_base64 = scheme.lower() == "data" and parameters[-1:] == ["base64"]
    kind = kind or FILE_TYPE  # an image's own bytes tell its type
    if not (comma and in_base64 and MEDIA_TYPE.fullmatch(kind)):
        return None
    line = "".join(unquote(data).split()).replace("-", "+").replace("_", "/")
    line = line.rstrip("=")
    if len(line) % 4 == 1 or not BASE64.fullmatch(line):
        return None
    return File(kind, b64decode(line + "=" * (-len(line) % 4)))


def attachments(messages: Messages) -> list[tuple[str, str]]:
    """The types and URLs of all parts that are not text, in order."""
    return [
        (part["type"], part[part["type"]]["url"])
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] not in TEXT_PARTS
    ]


def map_parts(messages: Messages, change: Callable[[Json], Json | None]) -> Messages:
    """The messages with each part changed; it goes where the change is None."""
    return [
        {**m, "content": join_texts([p for p in map(change, m["content"]) if p])}
        if isinstance(m["content"], list)
        else m
        for m in messages
    ]


NO_NAME = re.compile(r"[\s<|\\/>]+")  # what OpenAI's models refuse in one


def parse_messages(messages: list[Json]) -> Messages:
    """Bring messages, which have passed the tables, to the form described above.

    Raise 400 for missing content, unreadable attachments, and tool calls and results
    that don't pair."""
    parsed = []
    total = sum(len(as_list(message["content"])) for message in messages)
    require(
        total <= MAX_PARTS,
        f"Invalid 'messages': array too long. They have {total} parts in all, and may "
        f"have {MAX_PARTS}.",
        code="array_above_max_length",
        param="messages",
    )
    for index, message in enumerate(messages):
        path = f"messages[{index}].content"
        content = message["content"]
        if content is None:  # openai-python dumps a refusal like this
            content = message["refusal"]
        if content is None:
            has_call = message["tool_calls"] or message["function_call"]
            may_lack = {"function": True, "assistant": has_call}
            if not may_lack.get(message["role"]):
                raise missing_parameter(path)
        if isinstance(content, list):
            parts = [parse_part(part, f"{path}[{n}]") for n, part in enumerate(content)]
            content = join_texts(parts)
        name = NO_NAME.sub("_", message["name"] or "") or None
        named = {"content": content or "", "name": name}
        parsed.append(without_nulls({**message, "refusal": None, **named}))
    check_pairing(parsed)
    return functions_as_tools(parsed)


def check_pairing(messages: Messages) -> None:
    """Raise 400 unless each call has one result, right after the message it is in."""
    results: dict[str, int] = {}  # by the ids of the last calls; -1: none yet
    ids: list[str] = []  # of the last calls
    caller = 0  # where they are
    for index, message in enumerate([*messages, {"role": "the end"}]):
        where = f"messages.[{min(index, len(messages) - 1)}]"
        if message["role"] != "tool":
            unanswered = ", ".join(id for id, result in results.items() if result < 0)
            require(
                not unanswered,
                "An assistant message with 'tool_calls' must be followed by tool "
                "messages responding to each 'tool_call_id'. The following "
                f"tool_call_ids did not have response messages: {unanswered}",
                param=f"{where}.role",
            )
            require(
                len(ids) == len(results),
                "Invalid parameter: Duplicate value for 'tool_call_id' in the "
                f"'tool_calls' of messages[{caller}].",
                param=f"messages.[{caller}].tool_calls",
            )
            ids = [call["id"] for call in message.get("tool_calls", [])]
            results, caller = dict.fromkeys(ids, -1), index
            continue
        id = message.get("tool_call_id")
        if not id:
            raise missing_parameter(f"messages[{index}].tool_call_id")
        require(
            results,
            "Invalid parameter: messages with role 'tool' must be a response to a "
            "preceeding message with 'tool_calls'.",
            param=f"{where}.role",
        )
        unknown = (
            f"Invalid parameter: 'tool_call_id' of '{id}' not found in 'tool_calls' of "
            "previous message."
        )
        require(id in results, unknown, param=f"{where}.tool_call_id")
        duplicate = (
            f"Invalid parameter: Duplicate value for 'tool_call_id' of '{id}', in "
            f"messages[{results[id]}] and messages[{index}]."
        )
        require(results[id] < 0, duplicate, param=f"{where}.tool_call_id")
        results[id] = index


def functions_as_tools(messages: Messages) -> Messages:
    """Translate the older function_call and role `function` into tool_calls and `tool`.

    A result without a call before it gets one, as models need the pair."""
    translated: Messages = []
    open_call = ""  # the id of a call that has no result yet
    for index, message in enumerate(messages):
        call: Json = {"id": f"call_{index}", "type": "function"}
        function = message.pop("function_call", None)
        if message["role"] == "function":
            name = message.pop("name", "")
            if not open_call:
                open_call = call["id"]
                call["function"] = {"name": name, "arguments": "{}"}
                asking = {"role": "assistant", "content": "", "tool_calls": [call]}
                translated.append(asking)
            message |= {"role": "tool", "tool_call_id": open_call}
            open_call = ""
        elif function:
            open_call = call["id"]
            calls = message.get("tool_calls", [])
            message["tool_calls"] = [*calls, {**call, "function": function}]
        translated.append(message)
    return translated


# -- Tools ---------------------------------------------------------------------
#
# Which tools a model may call. "Chat templates" describes them to the model, and
# "Tool calls" reads its calls.


class Tool(NamedTuple):
    name: str
    description: str
    parameters: Json


class Toolbox(NamedTuple):
    """What a model may call now; only the named tool if the client names one."""

    tools: tuple[Tool, ...]
    must_call: bool = False
    parallel: bool = True
    legacy: bool = False  # asked for with `functions`, and answered in kind

    @property
    def called(self) -> str:
        """The finish_reason of an answer that calls."""
        return "function_call" if self.legacy else "tool_calls"

    @property
    def only(self) -> Tool | None:
        """The tool that has to be called, if it is the only one."""
        return self.tools[0] if self.must_call and len(self.tools) == 1 else None

    def find(self, written: str) -> Tool | None:
        """The tool of that name, or the only one that differs in case and marks."""
        for form in (str, plain_name):
            name = form(written)
            found = [tool for tool in self.tools if form(tool.name) == name]
            if len(found) == 1:
                return found[0]
        return None

    def knows(self, written: str, is_whole: bool) -> bool:
        """Whether a tool has that name, or may have when more of it is written."""
        if is_whole:
            return self.find(written) is not None
        name = plain_name(written)
        is_half = any(prefix.startswith(written) for prefix in NAME_PREFIXES)
        return is_half or any(plain_name(t.name).startswith(name) for t in self.tools)


NAME_PREFIXES = ("functions.", "default_api.")  # OpenAI's, and Gemini's


def plain_name(written: str) -> str:
    """What models keep of a name: of functions.Get-Weather, get_weather."""
    for prefix in NAME_PREFIXES:
        written = written.removeprefix(prefix)
    return written.lower().replace("-", "_")


def parse_toolbox(body: Json) -> Toolbox | None:
    """Return what may be called, None for nothing; `body` has passed the tables.

    The older `functions` are tools too: code below sees only the flag `legacy`, by
    which the answer has the older form."""
    pairs = ("tool_choice", "tools"), ("function_call", "functions")
    for param, among in pairs:
        message = (
            f"Invalid value for '{param}': "
            f"'{param}' is only allowed when '{among}' are specified."
        )
        harmless = body[among] or body[param] in (None, "none", "auto")
        require(harmless, message, param=param)
    legacy = bool(body["functions"])
    both = "Only one of 'tools' and 'functions' can be given."
    require(not (legacy and body["tools"]), both, param="functions")
    param, among = pairs[legacy]
    functions = body["functions"] or [tool["function"] for tool in body["tools"]]
    known = [function["name"] for function in functions]
    for name in known:
        message = (
            f"Invalid '{among}': '{name}' is there twice; each needs its own name."
        )
        require(known.count(name) == 1, message, code="invalid_value", param=among)
    choice = body[param]
    allowed, must_call = known, choice == "required"
    match choice:  # a SyntaxError here means that Python is older than 3.10
        case {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": rows}}:
            allowed = [row["function"]["name"] for row in rows]
            must_call = mode == "required"
        case {"function": {"name": name}} | {"name": name}:
            allowed, must_call = [name], True
    for name in allowed:
        message = f"Tool choice '{name}' not found in '{among}' parameter."
        require(name in known, message, code="invalid_value", param=param)
    if not functions or choice == "none":
        return None
    called = tuple(
        Tool(function["name"], function["description"], function["parameters"])
        for function in functions
        if function["name"] in allowed
    )
    parallel = body["parallel_tool_calls"] and not legacy
    return Toolbox(called, must_call, parallel, legacy)


def properties_of(tool: Tool | None) -> Json:
    return as_object(as_object(tool and tool.parameters).get("properties"))


# -- Output formats ------------------------------------------------------------
#
# Which JSON a client wants. Any schema is accepted: the model sees all of it, and
# an answer is checked as far as the schema can be.


class ResponseFormat(NamedTuple):
    """The JSON that an answer is to be."""

    schema: Json
    name: str = ""  # "": any object will do
    description: str = ""
    strict: bool = False


ANY_OBJECT = ResponseFormat({"type": "object"})

MAX_SCHEMA_NODES = 20_000  # objects, arrays and values in the schemas of a request


def check_schema_sizes(toolbox: Toolbox | None, format: ResponseFormat | None) -> None:
    """Raise 400 if all schemas together are larger than can be read in good time."""
    tools = toolbox.tools if toolbox else ()
    nodes: list[Any] = [tool.parameters for tool in tools]
    nodes += [format.schema] if format else []
    for node in nodes:  # which grows as it is gone through
        nodes += node.values() if isinstance(node, dict) else as_list(node)
        require(
            len(nodes) <= MAX_SCHEMA_NODES,
            "The schemas of the tools and of 'response_format' have more than "
            f"{MAX_SCHEMA_NODES} objects, arrays and values in all. Send smaller ones.",
            code="invalid_value",
            param="tools" if tools else "response_format",
        )


def parse_response_format(body: Json) -> ResponseFormat | None:
    """Return the format, None for text; `body` has passed the tables."""
    asked = body["response_format"]
    if asked is None or asked["type"] == "text":
        return None
    if asked["type"] == "json_object":
        return ANY_OBJECT
    return ResponseFormat(**{key: asked["json_schema"][key] for key in JSON_SCHEMA})


# -- Response items ------------------------------------------------------------
#
# A request for a response in the terms of chat: its items become messages, and its
# tools functions, which chat's tables then check. What can't run here is left out:
# hosted tools, and the items of a history that are about them. To add a type of item:
# a row in ITEMS, and a case in `build_messages`.


RESPONSE = {
    "model": Param(STRING, 1, 256),
    "stream": Param(BOOLEAN, default=False),
    "previous_response_id": Param(STRING),
    "input": Param((str, list), required=True, items=(dict,)),
    "instructions": Param(STRING, default=""),
    "max_output_tokens": SHARED["max_completion_tokens"],
    "text": Param(
        OBJECT,
        default={},
        each={
            "format": Param(OBJECT),
            "verbosity": Param(STRING, choices=VERBOSITIES),
        },
    ),
    "reasoning": Param(
        OBJECT, default={}, each={"effort": SAMPLING["reasoning_effort"]}
    ),
    "tools": Param(ARRAY, default=[], items=OBJECT),
    "tool_choice": Param((str, dict), choices=("none", "auto", "required")),
    "parallel_tool_calls": Param(BOOLEAN, default=True),
    "include": Param(ARRAY, default=[], items=STRING),
    "top_logprobs": refuse(NO_LOGPROBS, 0),
    "background": refuse("A response is made while you wait. Use 'stream'.", False),
    "prompt": refuse("No prompts are stored here. Send its text as 'input'."),
    "conversation": refuse(
        "No conversations are stored here. Send what was said in 'input'."
    ),
}

RESPONSE_IGNORED = {
    "access_programs",
    "background_options",
    "client_metadata",  # Codex sends it
    "context_management",
    "image",
    "max_tool_calls",  # of hosted tools
    "truncation",
}

# These mean nothing here: a stream always tells its usage.
CHAT_ONLY = {"functions", "function_call", "n", "stream_options"}

RESPONSE_PARTS: dict[str, dict[str, Param]] = {
    **dict.fromkeys(
        ("input_text", "output_text", "text", "summary_text", "reasoning_text"),
        {"text": Param(STRING, required=True)},
    ),
    "refusal": {"refusal": Param(STRING, required=True)},
    "input_image": {
        "file_id": refuse("No files are kept here. Send it as image_url."),
        "image_url": Param(STRING, 1, required=True),
    },
    "input_file": {
        "file_id": FILE["file_id"],
        "file_data": Param(STRING, 1),
        "file_url": Param(STRING, 1),
        "filename": Param(STRING, default=""),
    },
    "input_audio": {"input_audio": Param(OBJECT, required=True)},
}

CALL_ITEM = {
    "call_id": Param(STRING, 1, required=True),
    "name": Param(STRING, 1, required=True),
    "namespace": Param(STRING, default=""),
}

OUTPUT = {"output": Param((str, list), required=True, items=OBJECT)}

OUTPUT_ITEM = {"call_id": Param(STRING, 1, required=True), **OUTPUT}

NAMESPACE = {**NAME_ONLY, "tools": Param(ARRAY, required=True, items=OBJECT)}

TOOL_TYPES = ("function", "custom")  # that can be called here

ALLOWED_HERE = {
    "mode": Param(STRING, required=True, choices=("auto", "required")),
    "tools": Param(ARRAY, 1, required=True, items=OBJECT),
}

ITEMS: dict[str, dict[str, Param]] = {
    "message": {
        "role": Param(
            STRING, required=True, choices=("user", "assistant", "system", "developer")
        ),
        "content": Param((str, list), required=True, items=OBJECT),
    },
    "function_call": {**CALL_ITEM, "arguments": Param(STRING, required=True)},
    "function_call_output": OUTPUT_ITEM,
    "custom_tool_call": {**CALL_ITEM, "input": Param(STRING, required=True)},
    "custom_tool_call_output": OUTPUT_ITEM,
    "additional_tools": {"tools": Param(ARRAY, required=True, items=OBJECT)},
    # Tools of OpenAI's that a client runs: the model sees what was called and came.
    "local_shell_call": {"action": Param(OBJECT, required=True)},
    "local_shell_call_output": OUTPUT,
    "shell_call": {"action": Param(OBJECT, required=True)},
    "shell_call_output": OUTPUT,
    "apply_patch_call": {"operation": Param(OBJECT, required=True)},
    "apply_patch_call_output": {"output": Param(STRING, default="")},
}

OPENAIS_OWN = ("local_shell", "shell", "apply_patch")

LEFT_OUT = re.compile(
    r"reasoning|(web_search|file_search|code_interpreter|image_generation)_call"
    r"|computer_call(_output)?|mcp_\w+|tool_search_\w+|program(_output)?"
    r"|\w*compaction\w*|configuration_update"
)

CUSTOM_ARGUMENT = "input"  # of the function that a model gets for a custom tool


class ToolName(NamedTuple):
    """A client's name for a tool that the model may know by another."""

    name: str
    namespace: str = ""
    is_custom: bool = False  # called with a text, not with JSON

    @property
    def flat(self) -> str:
        """The name that the model knows. Models take all tools to be in `functions`."""
        is_bare = self.namespace in ("", "functions")
        namespace = re.sub(r"[^\w-]", "_", self.namespace, flags=re.ASCII)
        return self.name if is_bare else f"{namespace}__{self.name}"[-64:]


class ChatRequest(NamedTuple):
    """A request for a response in the terms of chat, and the way back."""

    body: Json  # to be checked against CHAT
    tool_names: Mapping[str, ToolName]  # by the name that the model knows
    messages: Sequence[str]  # the path of the item that each message is of …
    tools: Sequence[str]  # … and of each tool

    def param(self, chats: str) -> str:
        """Return the Responses' name of a parameter of chat's, for an error."""
        if match := re.match(r"messages\.?\[(\d+)\]", chats):
            index, rest = int(match[1]), chats[match.end() :]
            if self.body["messages"][index]["role"] == "tool":
                rest = rest.replace(".content", ".output", 1)
            rest = rest.replace(".image_url.url", ".image_url").replace(".file.", ".")
            return self.messages[index] + rest
        if match := re.match(r"tools\[(\d+)\](?:\.function)?", chats):
            return self.tools[int(match[1])] + chats[match.end() :]
        name, dot, rest = chats.replace("_format.json_schema", "_format").partition(".")
        return RESPONSE_NAMES.get(name, name) + dot + rest


RESPONSE_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
    "response_format": "text.format",
}


def build_chat_request(
    body: Json, history: list[Json], items: list[Json]
) -> ChatRequest:
    """Translate a request that has passed RESPONSE, with the items before its own.

    Raise 400 for items and tools that are wrong; chat's tables find the rest."""
    require(
        "message.output_text.logprobs" not in body["include"],
        f"Unsupported value: 'message.output_text.logprobs'. {NO_LOGPROBS}",
        code="unsupported_value",
        param="include",
    )
    paths = ["previous_response_id"] * len(history)
    paths += [f"input[{index}]" for index in range(len(items))]
    items = check_items([*history, *items], paths)
    tools = ResponseTools()
    tools.add(body["tools"], "tools")
    for item, path in zip(items, paths, strict=True):
        if item["type"] == "additional_tools":
            tools.add(item["tools"], f"{path}.tools", is_newer=True)
    if tools.dropped:
        log.info(LogRow(event="tools_dropped", types=", ".join(tools.dropped)))
    messages = build_messages(items, paths)
    if body["instructions"]:
        system = {"role": "system", "content": body["instructions"]}
        messages.insert(0, ("instructions", system))
    format = body["text"].get("format")
    if format and format.get("type") == "json_schema":
        schema = without(format, ("type",))
        format = {"type": "json_schema", "json_schema": schema}
    not_chats = {*RESPONSE, *RESPONSE_IGNORED} - CHAT.keys()
    chat = {
        **without(body, {*not_chats, *CHAT_ONLY}),
        "messages": [message for _, message in messages],
        "tools": [tool for _, tool in tools.rows.values()],
        "tool_choice": tools.choice(body["tool_choice"]),
        "response_format": format,
        "verbosity": body["text"].get("verbosity"),
        "reasoning_effort": body["reasoning"].get("effort"),
    }
    if body["max_output_tokens"]:
        chat["max_completion_tokens"] = body["max_output_tokens"]
    return ChatRequest(
        chat,
        tools.names,
        [path for path, _ in messages],
        [path for path, _ in tools.rows.values()],
    )


def input_items(body: Json) -> list[Json]:
    given = body["input"]
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def check_items(items: list[Json], paths: list[str]) -> list[Json]:
    """Check each item by the table of its type. Raise 400."""
    checked = []
    for item, path in zip(items, paths, strict=True):
        kind = item.get("type") or "message"
        is_text = isinstance(kind, str)
        if is_text and LEFT_OUT.fullmatch(kind):
            checked.append({"type": "left_out"})
            continue
        if is_text and kind not in ITEMS and {"role", "content"} <= item.keys():
            kind = "message"
        if not is_text or kind not in ITEMS:
            raise APIError(
                400,
                f"Invalid value: '{kind}'. Supported values are: {', '.join(ITEMS)}.",
                code="invalid_value",
                param=f"{path}.type",
            )
        known: Json = {"type": kind, **check(item, ITEMS[kind], f"{path}.")}
        ids = {name: item[name] for name in ("id", "call_id") if item.get(name)}
        checked.append({**ids, **known})
    return checked


@dataclass
class Turn:
    """A message that is built of items, and the results of its calls."""

    path: str
    message: Json
    results: list[tuple[str, Json]] = field(default_factory=list)

    @property
    def takes_calls(self) -> bool:
        return self.message["role"] == "assistant" and not self.results


def build_messages(items: list[Json], paths: list[str]) -> list[tuple[str, Json]]:
    """Build messages, each with the path of the first item that it is made of.

    Calls in a row are one message, and their results follow it, wherever they are."""
    turns: list[Turn] = []
    callers: dict[str, tuple[Turn, str]] = {}  # and the id of the call, by both ids
    unanswered: dict[str, str] = {}  # the path of each call, by its id
    for item, path in zip(items, paths, strict=True):
        kind = item["type"]
        if kind == "message":
            content = chat_content(item["content"], f"{path}.content")
            turns.append(Turn(path, {"role": item["role"], "content": content}))
        elif kind.endswith("_call"):
            if not (turns and turns[-1].takes_calls):
                turns.append(Turn(path, {"role": "assistant", "content": ""}))
            call = chat_call(item)
            twice = f"There are two tool calls with call_id {call['id']}."
            require(call["id"] not in unanswered, twice, param=path)
            turns[-1].message.setdefault("tool_calls", []).append(call)
            unanswered[call["id"]] = path
            for id in (str(item.get("id", call["id"])), call["id"]):
                callers[id] = turns[-1], call["id"]
        elif kind.endswith("_output"):
            id = str(item.get("call_id") or item.get("id"))
            unknown = f"No tool call found for function call output with call_id {id}."
            require(id in callers, unknown, param=path)
            turn, id = callers[id]
            duplicate = f"There is a second output for tool call with call_id {id}."
            require(unanswered.pop(id, None), duplicate, param=path)
            output = item["output"]
            if kind.startswith(OPENAIS_OWN) and not isinstance(output, str):
                output = compact(output)
            result = {"content": chat_content(output, f"{path}.output")}
            turn.results.append((path, {"role": "tool", "tool_call_id": id, **result}))
    for id, path in unanswered.items():
        message = f"No tool output found for function call {id}."
        raise APIError(400, message, param=path)
    if not turns:  # as programs send it that try whether we are there
        turns.append(Turn("input", {"role": "user", "content": ""}))
    return [row for turn in turns for row in [(turn.path, turn.message), *turn.results]]


def chat_call(item: Json) -> Json:
    """A call as one of a message's `tool_calls`."""
    kind, name = item["type"], item.get("name", item["type"].removesuffix("_call"))
    if kind == "function_call":
        arguments = item["arguments"]
    elif kind == "custom_tool_call":
        arguments = compact({CUSTOM_ARGUMENT: item["input"]})
    else:
        arguments = compact(item.get("action", item.get("operation")))
    return {
        "id": str(item.get("call_id") or item.get("id")),
        "type": "function",
        "function": {
            "name": ToolName(name, item.get("namespace", "")).flat,
            "arguments": arguments,
        },
    }


def chat_content(content: str | list[Json], path: str) -> str | list[Json]:
    if isinstance(content, str):
        return content
    return [chat_part(part, f"{path}[{n}]") for n, part in enumerate(content)]


def chat_part(part: Json, path: str) -> Json:
    """A part that chat takes, an image in the form that `as_chat_part` knows."""
    kinds = Param(STRING, choices=(*RESPONSE_PARTS,))
    kind = check_param(f"{path}.type", part.get("type"), kinds)
    part = check(part, RESPONSE_PARTS[kind], f"{path}.")
    if kind == "input_file":
        data = part["file_url"] or part["file_data"]
        if not data:
            raise missing_parameter(f"{path}.file_data")
        if not re.match("(?i)data:|https?:", data):
            media_type = guess_type(part["filename"])[0] or "application/pdf"
            data = f"data:{media_type};base64,{data}"
        return {"type": "file", "file": {"file_data": data}}
    return {"type": "text" if "text" in part else kind, **part}


def each_tool(
    tools: list[Json], path: str, namespace: str = ""
) -> Iterator[tuple[str, str, Json]]:
    """Yield tools, those in namespaces one by one, with their paths and namespaces."""
    for index, tool in enumerate(tools):
        where = f"{path}[{index}]"
        if tool.get("type") is None:
            raise missing_parameter(f"{where}.type")
        if tool["type"] == "namespace":
            tool = check(tool, NAMESPACE, f"{where}.")
            yield from each_tool(tool["tools"], f"{where}.tools", tool["name"])
        else:
            yield where, namespace, tool


class ResponseTools:
    """The tools of a request as chat's functions."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[str, Json]] = {}  # with its path in the request
        self.names: dict[str, ToolName] = {}  # by the name that the model knows
        self.dropped: set[str] = set()  # types

    def add(self, tools: list[Json], path: str, *, is_newer: bool = False) -> None:
        """Add tools. Newer ones take the place of those that have their names."""
        for where, namespace, tool in each_tool(tools, path):
            if tool["type"] not in TOOL_TYPES:
                self.dropped.add(str(tool["type"]))
                continue
            check(tool, NAME_ONLY, f"{where}.")
            name = ToolName(tool["name"], namespace, tool["type"] == "custom")
            function = without(tool, ["type"])
            if name.is_custom:
                function = custom_function(tool)
            function["name"] = name.flat
            is_second = name.flat in self.rows and not is_newer  # which chat refuses
            key = where if is_second else name.flat
            self.rows[key] = where, {"type": "function", "function": function}
            self.names[name.flat] = name

    def choice(self, asked: Any) -> Any:
        """Build chat's `tool_choice`. Raise 400 if what is chosen can't run here."""
        kind = asked.get("type") if isinstance(asked, dict) else asked
        if kind in ("function", "custom"):
            check(asked, NAME_ONLY, "tool_choice.")
            name = ToolName(asked["name"], str(asked.get("namespace") or ""))
            return {"type": "function", "function": {"name": name.flat}}
        if kind == "allowed_tools":
            among = check(asked, ALLOWED_HERE, "tool_choice.")
            known = [t for t in among["tools"] if t.get("type") in TOOL_TYPES]
            choices = [self.choice(tool) for tool in known]
            allowed = {"mode": among["mode"], "tools": choices}
            named = {"type": "allowed_tools", "allowed_tools": allowed}
            choice: Any = named if choices else "none"
            can_run = choices or among["mode"] == "auto"
        else:
            choice = kind if kind in (None, "none", "auto", "required") else "auto"
            wants_dropped = kind != choice or (kind == "required" and self.dropped)
            can_run = self.rows or not wants_dropped
        why = "The tools that have to be called are OpenAI's own: none runs here."
        require(can_run, why, code="unsupported_value", param="tool_choice")
        return choice


def custom_function(tool: Json) -> Json:
    """Describe a tool that is called with a text as a function of one argument."""
    format = as_object(tool.get("format"))
    grammar = format.get("definition")
    rules = f" It has to fit this {format.get('syntax')} grammar:\n{grammar}"
    text = f"The whole text.{rules if grammar else ''}"
    return {
        "description": tool.get("description"),
        "parameters": {
            "type": "object",
            "properties": {CUSTOM_ARGUMENT: {"type": "string", "description": text}},
            "required": [CUSTOM_ARGUMENT],
        },
    }


# -- Forms ---------------------------------------------------------------------
#
# Bodies of multipart/form-data in the terms of JSON: a field has the type that its row
# wants, and a file is kept as it came until it is uploaded.


MAX_FORM_PARTS = 1000
MAX_PART_HEAD = 16 * 1024  # bytes
MAX_FORM_NUMBER = 100  # characters

HEADER_PARAM = re.compile(r';\s*([\w*-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;"]*))')


def header_params(value: str) -> dict[str, str]:
    """The parameters in a header's value, by their names in lower case."""
    return {
        name.lower(): plain or re.sub(r"\\(.)", r"\1", quoted)
        for name, quoted, plain in HEADER_PARAM.findall(value)
    }


def parse_form(data: bytes, content_type: str, params: Mapping[str, Param]) -> Json:
    """Parse a form (RFC 7578); raise 400 if it is not one, or not whole.

    `image[]` and `image[0]` are two ways to write an array.
    """
    values: dict[str, list[str | File]] = defaultdict(list)
    for headers, content in split_form(data, content_type):
        given = header_params(headers.get("content-disposition", ""))
        name = re.sub(r"\[\d*\]$", "", given.get("name", ""))
        if not name:
            raise bad_form("a part of it has no name")
        filename = given.get("filename", given.get("filename*"))
        if filename is not None:
            named = guess_type(filename)[0] or headers.get("content-type", "")
            is_type = MEDIA_TYPE.fullmatch(named)
            type = media_type(content) or (named if is_type else FILE_TYPE)
            values[name].append(File(type, content))
        elif content:  # or it is a field that nobody has filled in
            try:
                values[name].append(content.decode())
            except UnicodeDecodeError:
                raise bad_form(f"its field '{name}' is not UTF-8") from None
    return {name: form_value(name, given, params) for name, given in values.items()}


def split_form(
    data: bytes, content_type: str
) -> Iterator[tuple[dict[str, str], bytes]]:
    """Yield the headers and the content of each part."""
    boundary = header_params(content_type).get("boundary", "")
    if not 0 < len(boundary) <= 70:  # RFC 2046, 5.1.1
        raise bad_form("its Content-Type has no boundary")
    mark = b"\r\n--" + boundary.encode("utf-8", "replace")
    first, *parts = data.split(mark, MAX_FORM_PARTS + 1)
    if first.startswith(mark[2:]):  # no line comes before it
        parts.insert(0, first[len(mark) - 2 :])
    if len(parts) > MAX_FORM_PARTS:
        raise bad_form(f"it has more than {MAX_FORM_PARTS} parts")
    if not parts or not parts.pop().startswith(b"--"):
        raise bad_form("it has no end")
    for part in parts:
        head, gap, content = part.partition(b"\r\n\r\n")
        start = head[: MAX_PART_HEAD + 1]
        padding, *lines = start.decode("utf-8", "replace").split("\r\n")
        if not gap or padding.strip() or len(head) > MAX_PART_HEAD:
            raise bad_form("the head of a part can't be read")
        pairs = (line.partition(":") for line in lines)
        yield {name.strip().lower(): value.strip() for name, _, value in pairs}, content


def form_value(name: str, given: list[str | File], params: Mapping[str, Param]) -> Any:
    """A field with the type of its row; `check` refuses what has another."""
    kinds = params[name].kinds if name in params else ()
    if kinds == ARRAY:
        return given
    urls = [each.url if isinstance(each, File) else each for each in given]
    if not kinds:  # the model's own, or of no use
        return urls if len(urls) > 1 else urls[0]
    if len(given) > 1:
        raise bad_form(f"its field '{name}' is there more than once")
    text = urls[0]
    if isinstance(given[0], File):  # curl -F prompt=@prompt.txt
        try:
            text = given[0].content.decode()
        except UnicodeDecodeError:
            raise bad_form(f"its field '{name}' is not UTF-8") from None
    if kinds == OBJECT:
        return parse_json_body(text.encode(), "json")
    is_read = kinds != STRING and len(text) <= MAX_FORM_NUMBER
    value = parsed(text.lower()) if is_read else None
    return text if value is None else value


def bad_form(why: str) -> APIError:
    return APIError(400, f"We could not parse the form in your request: {why}.")


# -- Tasks ---------------------------------------------------------------------
#
# What models do besides text. A task is what an endpoint wants of a model: OpenAI's
# parameters, with what models call their inputs for them, and the types of output that
# will do. To add one: a row in TASKS. To add a name for an input: a word in its row.


class Task(NamedTuple):
    path: str
    example: str  # a name in models.json that does it
    params: Mapping[str, Param]
    needs: tuple[str, ...]  # the parameters that a model must have inputs for
    outputs: tuple[str, ...]  # as `input_type` names the types of outputs
    prepare: Callable[[Json], Json] = lambda body: body  # as the table takes it
    foreign: str = ""  # inputs of models that make files of another kind


PROMPT_NAMES = (
    "prompt text_prompt positive_prompt caption instruction input_prompt user_prompt "
    "text description"
)

FILES = Param(ARRAY, 1, 16, required=True, items=(str, File))  # or links, or data: URLs

IMAGE_VARIATION = {
    "model": SHARED["model"],
    "image": FILES._replace(
        names="image images image_input input_images image_urls reference_images "
        "init_images input_image image_url init_image image_path img source_image "
        "image_prompt image_reference_url redux_image subject_reference control_image "
        "face_image main_face_image reference_face_1 character_reference_image "
        "first_frame_image start_image img_cond_path in_path input_file input media"
    ),
    "n": Param(
        INTEGER,
        1,
        10,
        default=1,
        names="num_outputs number_of_images num_images num_images_per_prompt "
        "num_samples num_sample",
    ),
    "size": Param(STRING, default="auto", pattern=r"(auto|[1-9]\d{1,4}x[1-9]\d{1,4})"),
    "response_format": Param(STRING, choices=("url", "b64_json")),
    "output_format": Param(
        STRING,
        choices=("png", "jpeg", "jpg", "webp", "gif", "svg"),
        names="output_format format image_format",
    ),
    "output_compression": Param(
        INTEGER, 0, 100, names="output_compression output_quality quality"
    ),
    "stream": refuse("Variations are sent whole.", False),
    "seed": SAMPLING["seed"],
    "steps": Param(INTEGER, 1, names="num_inference_steps steps num_steps"),
    "guidance_scale": Param(NUMBER, names="guidance_scale guidance cfg_scale cfg"),
    "negative_prompt": Param(STRING, names="negative_prompt n_prompt"),
    "replicate": SHARED["replicate"],
}

IMAGE_GENERATION = {
    **without(IMAGE_VARIATION, ["image"]),
    "prompt": Param(STRING, 1, 32000, required=True, names=PROMPT_NAMES),
    "quality": Param(
        STRING,
        choices=("low", "medium", "high", "xhigh", "max", "standard", "hd"),
        unset=("auto",),
        names="quality",
    ),
    "background": Param(
        STRING, choices=("transparent", "opaque"), unset=("auto",), names="background"
    ),
    "moderation": Param(STRING, choices=("low",), unset=("auto",), names="moderation"),
    "style": Param(STRING, names="style"),
    "stream": Param(BOOLEAN, default=False),
    "partial_images": Param(INTEGER, 0, 3),
    "markup": refuse("Replicate's models draw no markup."),
}

IMAGE_EDIT = {
    **IMAGE_GENERATION,
    "image": IMAGE_VARIATION["image"],
    "mask": FILES._replace(high=1, required=False, names="mask mask_image"),
    "input_fidelity": Param(STRING, choices=("low", "high"), names="input_fidelity"),
}

EMBEDDING = {
    "model": SHARED["model"],
    "input": Param(
        (str, list),
        1,
        2048,
        required=True,
        items=STRING,
        names="texts text_batch sentences prompts query_texts documents inputs text "
        "prompt input query document text_input",
    ),
    "encoding_format": Param(STRING, choices=("float", "base64"), default="float"),
    "dimensions": Param(
        INTEGER, 1, names="dimensions embedding_dim output_dim output_dimension"
    ),
    "normalize": Param(
        BOOLEAN, default=True, names="normalize_embeddings normalize"
    ),  # OpenAI's vectors have the length 1
    "replicate": SHARED["replicate"],
}

SPEECH = {
    "model": SHARED["model"],
    "input": Param(
        STRING, 1, required=True, names="text prompt input gen_text input_text"
    ),
    "voice": Param(
        STRING, 1, names="voice voice_id speaker speaker_id voice_a history_prompt"
    ),
    "instructions": Param(
        STRING, names="instructions style_instruction style_prompt style_instructions"
    ),
    "response_format": Param(
        STRING,
        choices=("mp3", "opus", "aac", "flac", "wav", "pcm"),
        names="audio_format output_format format",
    ),
    "speed": Param(NUMBER, 0.25, 4, names="speed speed_factor speaking_rate"),
    "stream_format": Param(STRING, choices=("audio", "sse"), default="audio"),
    "replicate": SHARED["replicate"],
}

TRANSCRIPTION = {
    "model": SHARED["model"],
    "file": FILES._replace(
        high=1,
        names="audio audio_file file input_audio audio_input audio_path file_path "
        "audio_url file_url",
    ),
    "language": Param(STRING, names="language language_code"),
    "prompt": Param(STRING, names="initial_prompt prompt"),
    "temperature": Param(NUMBER, 0, 1, names="temperature"),
    "response_format": Param(
        STRING,
        choices=("json", "text", "srt", "verbose_json", "vtt"),
        default="json",
    ),
    "timestamp_granularities": Param(ARRAY, items=STRING, default=[]),
    "words": Param(BOOLEAN, names="word_timestamps align_output timestamp timestamps"),
    "stream": Param(BOOLEAN, default=False),
    "replicate": SHARED["replicate"],
}

TRANSLATION = {
    **without(TRANSCRIPTION, ["timestamp_granularities", "words"]),
    "translate": Param(BOOLEAN, default=True, names="translate task"),
}

FILE_IN_JSON = {
    "file_id": refuse("No files are kept here. Send it as image_url."),
    "image_url": Param((str, dict), required=True),
}


def parse_files(value: Any, name: str) -> list[str | File]:
    """Files of a form, or their URLs; in JSON they may be in objects."""
    files: list[str | File] = []
    is_image = name != "file"
    for index, file in enumerate(value if isinstance(value, list) else [value]):
        path = f"{name}[{index}]"
        if isinstance(file, File):
            message = f"Invalid '{path}': the file is empty."
            require(file.content, message, code="invalid_value", param=path)
            files.append(parse_image(file, path) if is_image else file)
            continue
        if isinstance(file, dict):
            inside = check(file, FILE_IN_JSON, f"{path}.")["image_url"]
            file = inside if isinstance(inside, str) else inside.get("url")
        check_kind(path, file, STRING)
        kind = "image/png" if is_image else "audio/wav"
        expected = f"a file, https://… or data:{kind};base64,…"
        files.append(parse_url(file.strip(), path, expected, is_image=is_image))
    return files


def prepare_files(body: Json) -> Json:
    files = {
        name.removesuffix("s"): parse_files(body[name], name)
        for name in ("image", "images", "mask", "file")  # images: as JSON has them
        if body.get(name) is not None
    }
    return {**without(body, ["images"]), **files}


def prepare_texts(body: Json) -> Json:
    texts = body.get("input")
    for index, text in enumerate(texts if isinstance(texts, list) else [texts]):
        is_token = isinstance(text, (int, list)) and not isinstance(text, bool)
        require(
            not is_token,
            "Invalid 'input': token ids can't be turned back into text here. Send "
            "strings (in LangChain: check_embedding_ctx_length=False).",
            code="invalid_value",
            param="input",
        )
        require(
            text != "",
            f"Invalid 'input[{index}]': input cannot be an empty string.",
            code="invalid_value",
            param="input",
        )
    return body


def prepare_speech(body: Json) -> Json:
    voice = body.get("voice")
    return {**body, "voice": voice.get("id") if isinstance(voice, dict) else voice}


PCM_RATE = 24000  # samples a second of OpenAI's pcm, of 16 bits, in one channel


def prepare_sound(body: Json) -> Json:
    is_verbose = body.get("response_format") == "verbose_json"
    by_word = is_verbose and "word" in as_list(body.get("timestamp_granularities"))
    return {**prepare_files(body), "words": by_word or None}


# Inputs of models that make pictures, films, or sounds, and nothing else.
OF_PICTURES = (
    "aspect_ratio width height num_outputs num_inference_steps megapixels image_size "
    "output_quality output_megapixels scheduler guidance_scale negative_prompt "
)
OF_FILMS = "duration num_frames frames_per_second generate_audio camera_fixed "
OF_SOUNDS = "voice voice_id voice_a speaker audio_format sample_rate bitrate lyrics bpm"

FILE_OUTPUTS = ("file", "files", "object", "objects", "array")
VECTOR_OUTPUTS = ("numbers", "arrays", "object", "objects", "array")
TEXT_OUTPUTS = ("string", "strings", "object", "objects", "array")

image_task = partial(Task, outputs=FILE_OUTPUTS, foreign=OF_FILMS + OF_SOUNDS)
text_task = partial(Task, outputs=TEXT_OUTPUTS, prepare=prepare_sound)

TASKS = {
    "generation": image_task(
        "/images/generations", "flux-schnell", IMAGE_GENERATION, ("prompt",)
    ),
    "edit": image_task(
        "/images/edits",
        "flux-kontext-pro",
        IMAGE_EDIT,
        ("prompt", "image"),
        prepare=prepare_files,
    ),
    "variation": image_task(
        "/images/variations",
        "flux-redux-schnell",
        IMAGE_VARIATION,
        ("image",),
        prepare=prepare_files,
    ),
    "embedding": Task(
        "/embeddings",
        "text-embedding-3-small",
        EMBEDDING,
        ("input",),
        VECTOR_OUTPUTS,
        prepare_texts,
    ),
    "speech": Task(
        "/audio/speech",
        "tts-1",
        SPEECH,
        ("input",),
        FILE_OUTPUTS,
        prepare_speech,
        OF_PICTURES + OF_FILMS,
    ),
    "transcription": text_task(
        "/audio/transcriptions", "whisper-1", TRANSCRIPTION, ("file",)
    ),
    "translation": text_task(
        "/audio/translations", "whisper-1", TRANSLATION, ("file", "translate")
    ),
}


# ==== 3. INPUTS ===============================================================


# -- Chat templates ------------------------------------------------------------
#
# What a model reads: messages, descriptions of tools and formats, and the
# calls and results of its conversation. To add a template: a function from
# messages, the input (or role) for system text and the input for the prompt.
#
# Text reaches the model as it was written. Only what would end a turn of the
# very template that is written here is escaped: a control token of Llama's gets
# a backslash, and a line of a transcript that begins with a label gets a space.


TOOL_INSTRUCTIONS = """\
You can call tools. Each line in <tools> describes one, with its parameters as a \
JSON Schema:
<tools>
{tools}
</tools>
To call a tool, write its name and its arguments as JSON between these tags:
<tool_call>{{"name": <tool-name>, "arguments": <arguments-object>}}</tool_call>
{when} {how_many} After a call, stop: its result comes in the next message, in \
<tool_response>. Never make up a result."""

ONE_CALL = "Make one call, not more."
MANY_CALLS = "To make several calls, write these tags once for each."


def tool_instructions(toolbox: Toolbox) -> str:
    # with a description, even if empty: a tool that is recited looks unlike a call
    lines = [
        compact({"name": tool.name, "description": "", **without_empty(tool)})
        for tool in toolbox.tools
    ]
    return TOOL_INSTRUCTIONS.format(
        tools="\n".join(lines),
        when=when_to_call(toolbox),
        how_many=MANY_CALLS if toolbox.parallel else ONE_CALL,
    )


def when_to_call(toolbox: Toolbox) -> str:
    if not toolbox.must_call:
        return (
            "Call a tool only if you need it; if not, answer in plain words, "
            "without these tags."
        )
    *others, tool = toolbox.tools
    which = "one of these tools" if others else f"the tool {tool.name}"
    return f"You must call {which} now: write the call and nothing else."


def retry_call_instructions(toolbox: Toolbox, why: str) -> str:
    return (
        f"That was not a call that works: {why} {when_to_call(toolbox)} Write "
        '<tool_call>{"name": <tool-name>, "arguments": <arguments-object>}</tool_call>.'
    )


def json_instructions(format: ResponseFormat) -> str:
    kind = format.schema.get("type")
    noun = kind if kind in ("object", "array") else "value"
    only = "only: no explanation, no comments, no code fences."
    about = f" It is: {format.description}" if format.description else ""
    schema = (
        "\nIt must fit this JSON Schema; do not repeat the schema itself:\n"
        f"{compact(format.schema)}"
    )
    return f"Answer with one JSON {noun} {only}{about}{schema if format.name else ''}"


def retry_json_instructions(format: ResponseFormat, why: str) -> str:
    return (
        f"This answer is wrong: {why}\n\n"
        f"Give the answer again, corrected and whole. {json_instructions(format)}"
    )


def without_empty(row: Tool | ResponseFormat) -> Json:
    return {key: v for key, v in row._asdict().items() if v not in ("", {})}


def native_inputs(
    api: str, toolbox: Toolbox | None, format: ResponseFormat | None
) -> Json:
    """Tools and format as `chat` completions have them, or the API of `responses`."""
    inputs: Json = {}
    if toolbox:
        functions = [without_empty(tool) for tool in toolbox.tools]
        if api == "chat":
            functions = [{"function": function} for function in functions]
        inputs["tools"] = [{"type": "function", **function} for function in functions]
    if format:
        schema = without_empty(format) if format.name else {}
        type = {"type": "json_schema" if schema else "json_object"}
        if api == "responses":  # openai/gpt-5-structured has its own name for it
            inputs["json_schema"] = {"format": {**type, **schema}}
        else:
            named = {"json_schema": schema} if schema else {}
            inputs["response_format"] = {**type, **named}
    return inputs


def plain_history(messages: Messages) -> Messages:
    """Calls and their results as text, in the form that `tool_instructions` teaches."""
    plain: Messages = []
    names: dict[str, str] = {}  # of the functions, by the id of a call
    by_kind = groupby(messages, key=lambda message: message["role"] == "tool")
    for are_results, group in by_kind:
        parts: list[Json] = []  # of one message with all results in a row
        for message in group:
            if are_results:
                text = render_result(message, names)
                parts += with_attachments("\n" + text if parts else text, message)
            else:
                calls = message.get("tool_calls", [])
                names |= {call["id"]: call["function"]["name"] for call in calls}
                plain.append(render_calls(message))
        if parts:
            plain.append({"role": "user", "content": join_texts(parts)})
    return plain


def render_calls(message: Json) -> Json:
    """The message with its calls as text in its content."""
    if not message.get("tool_calls"):
        return message
    lines = [render_call(call["function"]) for call in message["tool_calls"]]
    if text := text_of(message["content"]):
        lines.insert(0, text)
    parts = with_attachments("\n".join(lines), message)
    return {"role": message["role"], "content": join_texts(parts)}


def render_call(function: Json) -> str:
    name, text = compact(function["name"]), function["arguments"].strip() or "{}"
    arguments = text if parsed(text) is not None else compact(text)
    arguments = arguments.replace("</tool_call", r"<\/tool_call")  # the same in JSON
    return f'<tool_call>{{"name": {name}, "arguments": {arguments}}}</tool_call>'


def render_result(message: Json, names: Mapping[str, str]) -> str:
    id = message["tool_call_id"]
    text = text_of(message["content"]).replace("</tool_response", r"<\/tool_response")
    of = f'name="{escape(names[id])}" id="{escape(id)}"'
    return f"<tool_response {of}>\n{text}\n</tool_response>"


def with_attachments(text: str, message: Json) -> list[Json]:
    """A text in place of the message's own, and what is attached to the message."""
    content = message["content"]
    parts = [] if isinstance(content, str) else content
    attached = [part for part in parts if part["type"] not in TEXT_PARTS]
    return [{"type": "text", "text": text}, *attached]


Turns = list[tuple[str, str]]  # each a role and a text

LABELS = {"user": "User", "assistant": "Assistant", "system": "System"}
LABEL_LINE = re.compile(rf"\n(?=(?:{'|'.join(LABELS.values())}):)")
LLAMA_2_TOKENS = re.compile(r"<(?=/?s>|</?SYS>>)|\[(?=/?INST\])")
LLAMA_TOKENS = re.compile(  # of Llama 3 and of Llama 4
    r"<(?=\|(?:begin_of_text|end_of_text|start_header_id|end_header_id|eot_id|eom_id"
    r"|header_start|header_end|eot|eom|python_tag|python_start|python_end)\|>)"
)


def split_system(messages: Messages) -> tuple[str, Turns]:
    """Part the system's first words from the turns; later ones are turns too."""
    turns = merge_turns(
        ("system" if m["role"] == "developer" else m["role"], text_of(m["content"]))
        for m in messages
    )
    if turns[0][0] != "system":
        return "", turns
    (_, instructions), *rest = turns
    return (instructions, rest) if rest else ("", [("user", instructions)])


def merge_turns(turns: Iterable[tuple[str, str]]) -> Turns:
    """Make one turn of those in a row that have the same role."""
    roles = groupby(turns, key=itemgetter(0))
    return [(role, "\n\n".join(text for _, text in group)) for role, group in roles]


def is_question(turns: Turns) -> bool:
    """Whether the user says all there is: that needs no template."""
    return len(turns) == 1 and turns[0][0] == "user"


def with_system(instructions: str, text: str, system: str, prompt: str) -> Json:
    """Inputs with the system text in its own, or on top of the prompt."""
    if instructions and system:
        return {system: instructions, prompt: text}
    return {prompt: f"{instructions}\n\n{text}" if instructions else text}


def render_transcript(messages: Messages, system: str, prompt: str) -> Json:
    """Turns with labels before them; a lone question stays as it is."""
    instructions, turns = split_system(messages)
    if is_question(turns):
        return with_system(instructions, turns[0][1], system, prompt)
    if not system:
        instructions = LABEL_LINE.sub("\n ", f"\n{instructions}")[1:]
    lines = [f"{LABELS[role]}: " + LABEL_LINE.sub("\n ", text) for role, text in turns]
    if turns[-1][0] != "assistant":
        lines.append("Assistant:")
    return with_system(instructions, "\n\n".join(lines), system, prompt)


def render_llama_2(messages: Messages, system: str, prompt: str) -> Json:
    """Turns as Replicate's page for llama-2-70b-chat gives them: it wraps the rest."""
    instructions, turns = split_system(messages)
    instructions = LLAMA_2_TOKENS.sub(r"\g<0>\\", instructions)
    turns = merge_turns(
        ("user" if role == "system" else role, LLAMA_2_TOKENS.sub(r"\g<0>\\", text))
        for role, text in turns
    )
    lines = [
        f"[INST] {text} [/INST]" if role == "user" else text for role, text in turns
    ]
    text = turns[0][1] if is_question(turns) else "\n".join(lines)
    return with_system(instructions, text, system, prompt)


def render_headers(
    start: str, end: str, stop: str, messages: Messages, _: str, prompt: str
) -> Json:
    """Meta's template, written out, with the answer begun at its end."""
    instructions, turns = split_system(messages)
    if instructions:
        turns.insert(0, ("system", instructions))
    parts = [
        f"{start}{role}{end}\n\n" + LLAMA_TOKENS.sub(r"\g<0>\\", text) + stop
        for role, text in turns
    ]
    if turns[-1][0] == "assistant":
        parts[-1] = parts[-1].removesuffix(stop)
    else:
        parts.append(f"{start}assistant{end}\n\n")
    return {prompt: "<|begin_of_text|>" + "".join(parts)}


render_llama_3 = partial(
    render_headers, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
)

render_llama_4 = partial(
    render_headers, "<|header_start|>", "<|header_end|>", "<|eot|>"
)


def render_messages(messages: Messages, system: str, _: str) -> Json:
    """The model takes messages: they are only brought to the roles that all know."""
    roles = {"developer": system, "system": system}
    return {
        "messages": [{**m, "role": roles.get(m["role"], m["role"])} for m in messages]
    }


def render_response_items(messages: Messages, system: str, _: str) -> Json:
    """Items of OpenAI's Responses API: calls and their results are some too."""
    first = list(takewhile(lambda m: m["role"] in ("system", "developer"), messages))
    instructions = "\n\n".join(text_of(message["content"]) for message in first)
    items: list[Json] = []
    for message in messages[len(first) :]:
        text = text_of(message["content"])
        if message["role"] == "tool":
            result = {"type": "function_call_output", "output": text}
            items.append({**result, "call_id": message["tool_call_id"]})
            continue
        calls = message.get("tool_calls", [])
        if text or not calls:
            items.append({"role": message["role"], "content": text})
        items += [
            {"type": "function_call", "call_id": call["id"], **call["function"]}
            for call in calls
        ]
    if not items:
        return {"input_item_list": [{"role": "user", "content": instructions}]}
    return {"input_item_list": items} | ({system: instructions} if instructions else {})


# -- Families ------------------------------------------------------------------
#
# A family is how a kind of model is asked: its chat template, and its inputs for
# OpenAI's parameters, by its page on Replicate. It is an allow-list: what it leaves
# out is not sent. To add a family: a row; the first row whose pattern matches
# owner/name counts. A pattern names language models that are known to be so and
# no others of their makers, whose own schemas know better. Fields are in the
# notation of `parse_field`, with bounds only where those of OpenAI's do not do.


PARAMETER_OF = {
    name: parameter
    for parameter, param in MODEL_PARAMS.items()
    for name in param.names.split()
}

# An effort as tokens to think with, as Google counts them behind an API like OpenAI's.
BUDGETS = {
    **dict.fromkeys(("none", "minimal"), 0),
    "low": 1024,
    "medium": 8192,
    **dict.fromkeys(("high", "xhigh", "max"), 24576),
}


class Field(NamedTuple):
    """One input of a model: its name, and what it may be."""

    name: str  # of one for attachments, "": they stay in the messages
    low: float | None = None
    high: float | None = None  # of an array, how many items
    default: Any = None  # sent when nobody named a value
    choices: tuple[Any, ...] = ()
    kinds: tuple[type, ...] = ()  # (): those of the parameter
    # What the model's schema says besides:
    type: str = ""  # as `input_type` gives it
    own_default: Any = None  # which the model takes when nothing is sent
    description: str = ""


class Family(NamedTuple):
    pattern: str = ""
    fields: Mapping[str, Field] = {}  # by OpenAI's parameter, or their own names
    # From messages, `system` and `prompt` to inputs.
    render: Callable[[Messages, str, str], Json] = render_transcript
    system: str = ""  # the input, or role, for system text; "": on top of the prompt
    prompt: str = "prompt"  # the input for a prompt; "": it takes messages alone
    attachments: Mapping[str, Field] = {}  # by the type of part
    always: Json = {}  # inputs that go with every prompt
    native: str = ""  # "chat", "responses": how it takes tools and formats as inputs
    required: tuple[str, ...] = ()  # inputs without which it does not run
    omits_think: bool = False  # an answer may begin with what it thinks, but no tag


# Where a model's own default is short (128 to 2,048 tokens), an answer would
# break off in the middle for programs that name no limit: ask for more.
DEFAULT_MAX_TOKENS = 4096

JSON_TYPES = {
    "string": STRING,
    "integer": INTEGER,
    "number": NUMBER,
    "boolean": BOOLEAN,
    "array": ARRAY,
    "object": OBJECT,
}

NOTATION = re.compile(r"(\w+)(?::(\w+))?(?:=(\d+))?(?:\[(.*)\.\.(.*)\])?(?:\((.*)\))?")


def parse_field(text: str) -> Field:
    """Read `name:type=default[low..high](choice,…)`, all but its name optional."""
    match = NOTATION.fullmatch(text)
    assert match, text
    name, type, *numbers, words = match.groups("")
    default, low, high = map(parsed, numbers)
    choices = tuple(words.split(",")) if words else ()
    return Field(name, low, high, default, choices, JSON_TYPES.get(type, ()))


def family(pattern: str, fields: str, **others: Any) -> Family:
    """A row; of two fields for one parameter the last counts."""
    rows = map(parse_field, fields.split())
    return Family(pattern, {PARAMETER_OF[row.name]: row for row in rows}, **others)


IN_PLACE = {"image_url": Field("", kinds=ARRAY)}
ONE_IMAGE = {"image_url": Field("image")}
IMAGES = {
    "image_url": Field("images", high=10, kinds=ARRAY),
    "video_url": Field("videos", high=10, kinds=ARRAY),
}
IMAGES_AND_SOUND = {**IMAGES, "input_audio": Field("audio")}

LIMIT = f"max_tokens={DEFAULT_MAX_TOKENS}"
SAMPLED = "temperature top_p presence_penalty frequency_penalty"
OPEN = f"{SAMPLED} {LIMIT}"
LLAMA = f"{OPEN} top_k min_tokens stop_sequences:string"
MISTRAL = (
    "temperature[0.01..] top_p top_k seed min_new_tokens[-1..] stop_sequences:string "
    f"max_new_tokens={DEFAULT_MAX_TOKENS}"
)
GPT = "max_completion_tokens"
GPT_5 = f"{GPT} verbosity reasoning_effort"
GEMINI = "temperature top_p max_output_tokens[..65535]"
GEMINI_3 = f"{GEMINI} thinking_level"

AS_IT_IS = {"prompt_template": "{prompt}"}  # the model's own template would come around

llama_2 = partial(family, render=render_llama_2, system="system_prompt")
llama = partial(family, fields=LLAMA, always=AS_IT_IS)
gpt = partial(family, render=render_messages, system="system", attachments=IN_PLACE)
claude = partial(family, system="system_prompt")
gemini = partial(family, system="system_instruction", attachments=IMAGES_AND_SOUND)

FAMILIES = {
    "llama-2-7b": llama_2(
        r"meta/llama-2-7b-chat", f"{MISTRAL} top_k[-1..] repetition_penalty"
    ),
    "llama-2": llama_2(r"meta/llama-2-.*-chat", f"{MISTRAL} top_k[0..]"),
    "llama-3": llama(r"meta/meta-llama-3.*-instruct", render=render_llama_3),
    "llama-4": llama(r"meta/llama-4-.*-instruct", render=render_llama_4),
    "gpt-5-structured": family(
        r"openai/gpt-5-structured",
        "max_output_tokens verbosity reasoning_effort(minimal,low,medium,high)",
        render=render_response_items,
        system="instructions",
        attachments={"image_url": Field("image_input", kinds=ARRAY)},
        native="responses",
    ),
    "o1-mini": gpt(r"openai/o1-mini", GPT, system="user", attachments={}),
    "o-series": gpt(
        r"openai/o(1|3|3-mini|4-mini)", f"{GPT} reasoning_effort(low,medium,high)"
    ),
    "gpt-5-pro": gpt(r"openai/gpt-5-pro", "max_completion_tokens verbosity"),
    "gpt-5.1": gpt(r"openai/gpt-5\.1", f"{GPT_5}(none,low,medium,high)"),
    "gpt-5.2": gpt(r"openai/gpt-5\.\d", f"{GPT_5}(none,low,medium,high,xhigh)"),
    "gpt-5": gpt(r"openai/gpt-5(-mini|-nano)?", f"{GPT_5}(minimal,low,medium,high)"),
    "kimi-k2.5": family(
        r"moonshotai/kimi-k2\.5", f"{SAMPLED} {LIMIT}[..131072]", attachments=ONE_IMAGE
    ),
    "deepseek-v3.1": family(
        r"deepseek-ai/deepseek-v3\.1", f"{OPEN} thinking(None,medium)"
    ),
    "deepseek-r1": family(
        r"deepseek-ai/deepseek-r1|moonshotai/kimi-k2-thinking", OPEN, omits_think=True
    ),
    "open": family(
        r"deepseek-ai/deepseek-v3|openai/gpt-oss-(20b|120b)|xai/grok-4|"
        r"qwen/qwen3-235b-a22b-instruct-2507|moonshotai/kimi-k2-instruct",
        OPEN,
    ),
    "gpt-4": gpt(r"openai/gpt-4(o|o-mini|\.1|\.1-mini|\.1-nano)", f"{GPT} {SAMPLED}"),
    "claude-3.5": claude(
        r"anthropic/claude-(3\.5-|4\.5-haiku).*", "max_tokens[..8192]"
    ),
    "claude": claude(
        r"anthropic/claude-.*", "max_tokens[1024..64000]", attachments=ONE_IMAGE
    ),
    "gemini-3.1": gemini(
        r"google/gemini-3\.1-(pro|flash)", f"{GEMINI_3}(low,medium,high)"
    ),
    "gemini-3": gemini(r"google/gemini-3-(pro|flash)", f"{GEMINI_3}(low,high)"),
    "gemini": gemini(
        r"google/gemini-2\.5-flash",
        f"{GEMINI} thinking_budget:integer[0..24576]",
        attachments=IMAGES,
    ),
    "granite": family(
        r"ibm-granite/granite-3\.[012]-.*-instruct", LLAMA, system="system_prompt"
    ),
    "granite-messages": family(
        r"ibm-granite/granite-(3\.3-8b-instruct|4\.0-h-small)",
        f"{SAMPLED} top_k min_tokens seed stop "
        f"max_completion_tokens={DEFAULT_MAX_TOKENS}",
        render=render_messages,
        system="system",
        native="chat",
    ),
    "mistral": family(r"mistralai/mistral-7b-v0\.1", MISTRAL),
}


@lru_cache(1000)  # every request looks for one
def find_family(name: str) -> Family | None:
    rows = FAMILIES.values()
    return next((f for f in rows if re.fullmatch(f.pattern, name, re.I)), None)


# -- Input schemas -------------------------------------------------------------
#
# A family read from the model's own input schema, for the models that have no
# row and for what a row does not name. Nothing in a schema is sure to be there
# or to be of its type.


# What carries the conversation, by the names that models have for it …
PROMPTS = (
    "prompt user_prompt input_prompt text input_text text_input input inputs query "
    "question instruction message user_message"
)
SYSTEMS = (
    "system_prompt system_instruction system_instructions system_message instructions "
    "system pre_prompt"
)
SYSTEM_NAMES = SYSTEMS.split()

# … and what is attached to it, by the type of part.
ATTACHMENT_NAMES = {
    "image_url": (
        "images image_input input_images image_urls image input_image image_url media"
    ),
    "video_url": "videos video_input video_urls video input_video video_url",
    "input_audio": "audio audio_file audio_input input_audio audio_url",
    "file": "file files pdf document documents input_file",
}

FILE_TYPES = ("file", "files", "string", "strings", "array")  # take a file, or its URL

# The types of inputs, as `input_type` gives them, that take values of a parameter.
ACCEPTED: dict[tuple[type, ...], tuple[str, ...]] = {
    INTEGER: ("integer", "number"),
    NUMBER: ("number",),
    STRING: ("string", "enum"),
    BOOLEAN: ("boolean", "enum"),
    ARRAY: FILE_TYPES,
    (str, list): ("string", "strings", "array"),
}

TEXT_IN_OBJECT = {"text", "output", "content"}  # one is the text of the output
MAX_HOPS = 8  # from a schema to what it refers to


def resolve(schema: Any, schemas: Json) -> Json:
    """Fold what a schema refers to into it; its own keywords count before those."""
    flat: Json = {}
    for _ in range(MAX_HOPS):
        schema = as_object(schema)
        flat = {**schema, **flat}
        if isinstance(ref := schema.get("$ref"), str):
            schema = schemas.get(ref.rpartition("/")[2])
        else:  # of several alternatives it may be any
            parts = as_list(schema.get("allOf"))[:1] or alternatives(schema)
            schema = parts[0] if len(parts) == 1 else None
    return flat


def alternatives(schema: Json) -> list[Json]:
    lists = (as_list(schema.get(key)) for key in ("anyOf", "oneOf"))
    parts = (as_object(part) for parts in lists for part in parts)
    return [part for part in parts if part.get("type") != "null"]


def json_type(schema: Json) -> str:
    """The type that is not null; "" if the schema names none."""
    named = [schema.get("type"), *as_list(schema.get("type"))]
    return next((type for type in JSON_TYPES if type in named), "")


def input_type(schema: Json, schemas: Json) -> str:
    """A JSON type, or closer: file or enum, and files, strings or numbers …"""
    type = json_type(schema)
    if type == "string" and schema.get("format") == "uri":
        return "file"
    if type == "string" and as_list(schema.get("enum")):
        return "enum"
    if type == "array":
        item = resolve(schema.get("items"), schemas)
        listed = "file" if item.get("format") == "uri" else json_type(item)
        return f"{listed}s" if listed else type
    return type


def is_text(output: Json, schemas: Json) -> bool:
    """Whether what a model makes can be text, for all that its schema says."""
    if isinstance(output.get("x-cog-array-display"), str):
        return bool(output["x-cog-array-display"] == "concatenate")
    if inside := as_object(output.get("properties")):
        return not TEXT_IN_OBJECT.isdisjoint(inside)
    type = input_type(output, schemas)
    if type == "array":  # of what has no type, or of numbers and the like
        return not resolve(output.get("items"), schemas)
    return type in ("", "string", "enum", "strings", "object")


class ModelSchema(NamedTuple):
    """What a model says of itself."""

    inputs: dict[str, Field] = {}
    required: tuple[str, ...] = ()  # those of them that have no default
    outputs: tuple[str, ...] = ()  # types of what it makes, as `input_type` gives them
    is_language: bool = True  # what it makes can be text
    family: Family | None = None  # how it is asked for text, if an input takes any

    def find(self, names: str, *types: str) -> str:
        """The best input of these names, one that the model needs before others."""
        fitting = [
            name
            for name in names.split()
            if name in self.inputs and self.inputs[name].type in ("", *types)
        ]
        return min(fitting, key=lambda name: name not in self.required, default="")


def read_schema(document: Any) -> ModelSchema:
    """Read a model's OpenAPI document."""
    schemas = as_object(as_object(as_object(document).get("components")).get("schemas"))
    output = resolve(schemas.get("Output"), schemas)
    parts = alternatives(output)  # a single one is folded into it
    outputs = [resolve(p, schemas) for p in parts] if len(parts) > 1 else [output]
    inputs = resolve(schemas.get("Input"), schemas)
    rows = as_object(inputs.get("properties")).items()
    known = {name: resolve(row, schemas) for name, row in rows if as_object(row)}
    listed = as_list(inputs.get("required"))
    schema = ModelSchema(
        {name: read_field(name, row, schemas) for name, row in known.items()},
        tuple(n for n in known if n in listed and "default" not in known[n]),
        tuple(filter(None, (input_type(each, schemas) for each in outputs))),
        any(is_text(each, schemas) for each in outputs),
    )
    return schema._replace(family=read_family(schema))


def read_family(schema: ModelSchema) -> Family | None:
    """How a language model is asked; None if none of its inputs takes the text."""
    find, needed = schema.find, schema.required
    messages = find("messages", "objects", "array")
    prompt, system = find(PROMPTS, "string"), find(SYSTEMS, "string")
    if not schema.is_language or not (messages or prompt):
        return None
    family = Family(system=system, prompt=prompt)
    if messages and prompt not in needed:
        family = family._replace(render=render_messages, system="system")
    fields: dict[str, Field] = {}
    for parameter, param in MODEL_PARAMS.items():
        if name := find_input(schema, param):
            field = schema.inputs[name]
            if levels_in(field, param) or not (field.choices and param.choices):
                fields[parameter] = field
    if limit := fields.get("max_tokens"):
        short = limit.own_default
        if is_bound(short) and 0 < short < DEFAULT_MAX_TOKENS:
            fields["max_tokens"] = limit._replace(default=DEFAULT_MAX_TOKENS)
    attachments = {
        part: schema.inputs[name]
        for part, names in ATTACHMENT_NAMES.items()
        if (name := find(names, *FILE_TYPES))
    }
    if "image_url" in attachments and family.render is render_messages:
        attachments |= IN_PLACE
    named = {*DOCUMENTED, *(field.name for field in fields.values()), messages, prompt}
    fields = {**without(schema.inputs, named), **fields}
    return family._replace(fields=fields, attachments=attachments, required=needed)


def levels_in(field: Field, param: Param) -> list[Any]:
    """The choices of an input that are levels of OpenAI's, in any case."""
    return [c for c in field.choices if str(c).lower() in param.choices]


def read_field(name: str, schema: Json, schemas: Json) -> Field:
    """What an input takes: of integers, between whole bounds."""
    type = json_type(schema)
    step = 1 if type == "integer" else 0.01  # inwards from a bound that is left out

    def bounds(keyword: str, step: float = 0) -> list[float]:
        bound = schema.get(keyword)
        return [bound + step] if is_bound(bound) else []

    lows = bounds("minimum") + bounds("exclusiveMinimum", step)
    highs = bounds("maximum") + bounds("exclusiveMaximum", -step)
    if type == "array":
        highs = [most for most in bounds("maxItems") if most >= 1]
    low, high = max(lows, default=None), min(highs, default=None)
    if type == "integer":
        low, high = low and ceil(low), high and floor(high)
    choices = [v for v in as_list(schema.get("enum")) if isinstance(v, (str, *NUMBER))]
    return Field(
        name,
        low,
        high,
        choices=tuple(choices),
        kinds=JSON_TYPES.get(type, ()),
        type=input_type(schema, schemas),
        own_default=schema.get("default"),
        description=str(schema.get("description") or ""),
    )


def is_bound(value: Any) -> TypeGuard[float]:
    return is_number(value) and abs(value) < 2**64


def merge(row: Family, read: Family | None) -> Family:
    """The row, and from the schema what the row does not name."""
    if read is None:
        return row
    taken = {field.name for field in row.fields.values()}
    fields = {key: f for key, f in read.fields.items() if f.name not in taken}
    in_place = row.render is render_messages and not row.native
    more = {part: f for part, f in read.attachments.items() if f.name or in_place}
    return row._replace(
        fields={**fields, **row.fields}, attachments={**more, **row.attachments}
    )


LASTS = 3600  # seconds, for what was read …
RETRY_AFTER = 60  # … and for what could not be

Value = TypeVar("Value")


@dataclass
class CacheEntry(Generic[Value]):
    """A value as it was last read, if it ever was."""

    value: Value | None = None
    error: APIError | None = None  # why it could not be read the last time
    expires: float = 0
    deadline: float = 0  # until when a request waits for it: time.monotonic()
    is_read: threading.Event = field(default_factory=threading.Event)


@dataclass
class BackgroundCache(Generic[Value]):
    """What Replicate tells, each read once an hour; an old value serves until then."""

    kind: str  # of what is read, for the log
    read: Callable[[str], Value | None]
    clock: Callable[[], float] = time.monotonic
    limit: float = 5  # seconds that a request waits for one
    max_entries: int = 1000
    lock: threading.Lock = field(default_factory=threading.Lock)
    # The last used one is the last.
    entries: dict[str, CacheEntry[Value]] = field(default_factory=dict)

    def find(self, ref: str) -> Value | None:
        """The value as last read, or None: there is none, or not in time."""
        entry = self.begin(ref)
        if entry.value is None:
            entry.is_read.wait(max(0, entry.deadline - time.monotonic()))
        return entry.value

    def begin(self, ref: str) -> CacheEntry[Value]:
        """Have a value read in the background if it is time for that."""
        with self.lock:
            self.entries[ref] = entry = self.entries.pop(ref, None) or CacheEntry()
            if len(self.entries) > self.max_entries:
                del self.entries[next(iter(self.entries))]
            if self.clock() >= entry.expires:
                entry.expires = self.clock() + RETRY_AFTER
                entry.deadline = time.monotonic() + self.limit
                entry.is_read.clear()
                try:
                    fill = partial(self.fill, ref, entry)
                    threading.Thread(target=fill, daemon=True).start()
                except RuntimeError:  # none to be had: the next request tries again
                    entry.expires = 0
                    entry.is_read.set()
        return entry

    def fill(self, ref: str, entry: CacheEntry[Value]) -> None:
        try:
            entry.value, entry.error = self.read(ref), None
            entry.expires = self.clock() + LASTS
        except Exception as error:
            event, entry.error = f"{self.kind}_unreadable", as_api_error(error)
            log.warning(LogRow(event=event, ref=ref, why=entry.error))
        finally:
            entry.is_read.set()


class SchemaCache(BackgroundCache[ModelSchema]):
    """Schemas by ref."""

    def __init__(
        self,
        look_up: Callable[[str, str, str], Json],  # owner, name, version or ""
        release_of: Callable[[str, str], str],  # a deployment's owner, name -> ref
        clock: Callable[[], float] = time.monotonic,
        limit: float = 5,
    ) -> None:
        super().__init__("schema", self.read_ref, clock, limit)
        self.look_up = look_up
        self.release_of = release_of

    def read_ref(self, ref: str) -> ModelSchema | None:
        """Of a deployment: that of the model it runs, whose row counts first."""
        owner, _, name = ref.partition("/")
        if not name:
            return None  # Replicate tells nothing of a version without its model
        if owner == "deployments":
            ref = self.release_of(*name.split("/"))
            row = find_family(without_version(ref))
            if not row:
                return self.read_ref(ref)
            schema = self.find(ref) or ModelSchema()
            return schema._replace(family=merge(row, schema.family))
        name, _, version = name.partition(":")
        return read_schema(self.look_up(owner, name, version))


MADE = {
    **dict.fromkeys(("string", "strings", "enum"), "text"),
    **dict.fromkeys(("number", "numbers", "integers", "arrays"), "numbers"),
    **dict.fromkeys(("file", "files"), "files"),
}


def find_input(schema: ModelSchema, param: Param) -> str:
    return schema.find(param.names, *ACCEPTED.get(param.kinds, ()))


def misfit(task: Task, schema: ModelSchema) -> str:
    """Why a model can't do a task; "" if it can, for all that its schema tells."""
    if schema.outputs and {*task.outputs}.isdisjoint(schema.outputs):
        made = sorted({MADE.get(type, "data") for type in schema.outputs})
        return f"makes {' or '.join(made)}"
    for name in task.foreign.split():
        if name in schema.inputs:
            return f"is for something else, as it has '{name}'"
    lacking = (n for n in task.needs if not find_input(schema, task.params[n]))
    return next((f"has no input for '{name}'" for name in lacking), "")


def fits(task: Task, schema: ModelSchema) -> bool:
    """Whether a model can do a task with what it needs, and nothing else."""
    inputs = {find_input(schema, task.params[name]) for name in task.needs}
    return not misfit(task, schema) and inputs >= {*schema.required}


def uses(schema: ModelSchema) -> str:
    """A sentence on the endpoints that a model can be used by; "" if none is known."""
    paths = [f"/v1{task.path}" for task in TASKS.values() if fits(task, schema)]
    family = schema.family if schema.is_language else None
    if family and {*schema.required} <= {family.prompt, "messages"}:
        paths.append("/v1/chat/completions")
    return f" Use it by POST {' or '.join(paths)}." if paths else ""


def family_for(
    model: Model, body: Json, attached: set[str], schemas: SchemaCache
) -> Family:
    """Its row if that says all that is needed, so that a known model costs no GET."""
    named = model.config.family
    row = FAMILIES[named] if named else find_family(model.owner_and_name)
    if row:
        known = {*DOCUMENTED, *row.fields, *(f.name for f in row.fields.values())}
        known |= {*SYSTEM_NAMES} if "messages" in body else set()
        if without_nulls(body).keys() <= known and attached <= row.attachments.keys():
            return row
    schema = schemas.find(model.ref) or ModelSchema()
    if row:
        return merge(row, schema.family)
    if not schema.is_language:
        what = f"The model `{model.id}` is not a language model"
        remedy = uses(schema) or " Use one that is."
        message = f"{what}: what it makes is not text.{remedy}"
        raise APIError(400, message, param="model")
    return schema.family or Family()


# -- Prediction inputs ---------------------------------------------------------
#
# A request in the terms of its model: what Replicate is given, and what must be
# known of it to write the answer. It is built once, for all its n choices.


MAX_INPUT_SIZE = 6 * 2**20  # users report that Replicate interrupts what is larger

ANYTHING = tuple(KINDS)


class PredictionInput(NamedTuple):
    """What Replicate is to run."""

    model: Model
    input: Json
    names: Mapping[str, str]  # Replicate's name of an input -> OpenAI's
    prompt: str  # the text in it, to estimate tokens by
    limit: int | None = None  # of tokens, as it was sent
    cut: int | None = None  # where the client's limit is below the model's least
    seed: Field | None = None  # the input that choices differ in: the client named it
    omits_think: bool = False
    expected: int = 1  # how many images or vectors it is to make


def with_tools_and_format(
    body: Json, family: Family, toolbox: Toolbox | None, format: ResponseFormat | None
) -> Json:
    """The body with tools, format, calls and results as the family takes them."""
    if family.native:  # what is left to say to a model that takes them as inputs
        inputs = native_inputs(family.native, toolbox, format)
        messages = body["messages"]
        when = when_to_call(toolbox) if toolbox and toolbox.must_call else ""
        how_many = ONE_CALL if toolbox and not toolbox.parallel else ""
        texts = [f"{when} {how_many}".strip()]
    else:
        inputs, messages = {}, plain_history(body["messages"])
        texts = [tool_instructions(toolbox)] if toolbox else []
        texts += [json_instructions(format)] if format else []
    first = [{"role": "system", "content": text} for text in texts if text]
    return {
        **body,
        "messages": [*first, *messages],
        "replicate": {**inputs, **body["replicate"]},
    }


def build_chat_input(body: Json, model: Model, family: Family) -> PredictionInput:
    body = with_system_texts(body, model.config)
    prompt = "\n".join(text_of(message["content"]) for message in body["messages"])
    messages, placed = place_attachments(body["messages"], family)
    rendered = family.render(messages, family.system, family.prompt)
    return build_input(body, model, family, {**rendered, **placed}, prompt)


def build_retry_input(
    body: Json, model: Model, family: Family, answer: str, instruction: str
) -> PredictionInput:
    """The same request, with a first answer to it and what is to be done about that."""
    messages = [
        *body["messages"],
        {"role": "assistant", "content": answer},
        {"role": "user", "content": instruction},
    ]
    return build_chat_input({**body, "messages": messages}, model, family)


def build_completion_input(
    body: Json, model: Model, family: Family, prompt: str
) -> PredictionInput:
    """With the bare prompt as it is, or as a message if the model takes no other."""
    rendered = {family.prompt: prompt}
    if not family.prompt:
        message = {"role": "user", "content": prompt}
        rendered = family.render([message], family.system, "")
    return build_input(body, model, family, rendered, prompt)


def with_seed(built: PredictionInput, offset: int) -> PredictionInput:
    """The input of choice number `offset`: with one seed all would be the same."""
    if not (built.seed and offset):
        return built
    name, low, high, *_ = built.seed
    if low is None:
        low = INT64[0] if high is None else 0
    seed = wrap(built.input[name] + offset, low, INT64[1] if high is None else high)
    return built._replace(input={**built.input, name: seed})


def with_system_texts(body: Json, config: ModelConfig) -> Json:
    """System text beside the messages as one of them: an input would hide theirs."""
    first = [
        {"role": "system", "content": check_param(name, source[name], Param(STRING))}
        for source in (config.input, body)
        for name in SYSTEM_NAMES
        if source.get(name)
    ]
    messages = [*first, *body["messages"]]
    return {**without(body, SYSTEM_NAMES), "messages": messages}


MODELS_WITH_ATTACHMENTS = {
    "image_url": "openai/gpt-4o and google/gemini-2.5-flash take several images, "
    "anthropic/claude-4.5-sonnet takes one.",
    "video_url": "google/gemini-2.5-flash takes several.",
    "input_audio": "google/gemini-3-flash takes one.",
}


def fit_attachments(messages: Messages, model: Model, family: Family) -> Messages:
    """Put words in place of what is more than the model takes, the earliest first.

    Raise 400 if that comes with the user's last message, or after it.
    """
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=0)
    while last and messages[last - 1]["role"] == "user":  # an image, then the question
        last -= 1
    now = Counter(kind for kind, _ in attachments(messages[last:]))
    excess = Counter(kind for kind, _ in attachments(messages))
    for kind, count in excess.items():
        field = family.attachments.get(kind, Field("", high=0, kinds=ARRAY))
        most = field.high if field.kinds == ARRAY else 1
        require(
            most is None or now[kind] <= most,
            f"The model `{model.id}` ({model.ref}) takes {most or 'no'} parts of type "
            f"'{kind}', but got {now[kind]}. "
            f"{MODELS_WITH_ATTACHMENTS.get(kind, 'No model known here does.')}",
            code="invalid_value",
            param="messages",
        )
        excess[kind] = 0 if most is None else max(0, count - int(most))
        if excess[kind]:
            log.warning(LogRow(event="left_out", parts=excess[kind], type=kind))

    def fit(part: Json) -> Json:
        kind = part["type"]
        if not excess[kind]:
            return part
        excess[kind] -= 1
        noun = re.sub("input_|_url", "", kind)
        return {"type": "text", "text": f"[{noun}]"}

    return map_parts(messages, fit)


def place_attachments(messages: Messages, family: Family) -> tuple[Messages, Json]:
    """Move what has an input of its own out of the messages."""
    moved = {kind: row for kind, row in family.attachments.items() if row.name}
    placed: Json = {}
    for kind, row in moved.items():
        if urls := [url for other, url in attachments(messages) if other == kind]:
            placed[row.name] = urls if row.kinds == ARRAY else urls[0]
    rest = map_parts(messages, lambda part: None if part["type"] in moved else part)
    return rest, placed


def build_input(
    body: Json, model: Model, family: Family, rendered: Json, prompt: str
) -> PredictionInput:
    """Raise 400 for values that the model's inputs can't take, and for missing ones."""
    fields, config = family.fields, model.config
    limit = body["max_completion_tokens"] or body["max_tokens"]  # the newer name first
    stop = [text for text in body["stop"] if text]
    body = {**body, "max_tokens": limit, "stop": stop or None}
    asked: Json = {}  # by parameter, after the operator's word on it
    inputs: Json = {}
    for parameter, row in fields.items():
        names = [name for name in (row.name, parameter) if body.get(name) is not None]
        value = fit(names[0], body[names[0]], parameter, row) if names else None
        if parameter == "max_tokens" and config.max_tokens:
            value = min(value or config.max_tokens, config.max_tokens)
        if parameter == "temperature" and value is not None:
            value = clamp(value, *(config.temperature_range or (None, None)))
        if value is None:
            value = row.default
        else:
            asked[parameter] = value
        if is_number(value):
            bring = wrap if parameter == "seed" else clamp
            value = bring(value, row.low, row.high)
        if value is not None:
            inputs[row.name] = value
    is_chat = "messages" in body  # then the system's words are in them
    input = {  # what comes later counts
        **inputs,
        **rendered,
        **family.always,
        **without(config.input, SYSTEM_NAMES if is_chat else ()),
        **body["replicate"],
    }
    attachments = family.attachments.items()
    remedies = {row.name: f"a part of type '{part}'" for part, row in attachments}
    remedies[family.system] = "a system message"
    require_inputs(model, family.required, input, remedies)
    sent = input.get(fields["max_tokens"].name) if "max_tokens" in fields else None
    limit = sent if type(sent) is int else None  # `replicate` may hold anything
    wanted = asked.get("max_tokens")
    seed = fields["seed"] if "seed" in asked else None
    is_ours = seed and input[seed.name] == inputs[seed.name]
    return PredictionInput(
        model,
        input,
        names={field.name: parameter for parameter, field in fields.items()},
        prompt=prompt,
        limit=limit,
        cut=wanted if wanted and limit and wanted < limit else None,
        seed=seed if is_ours else None,
        omits_think=family.omits_think,
    )


def fit(name: str, value: Any, parameter: str, field: Field) -> Any:
    """Bring a value to the type, and the words, of an input.

    None if nothing of it is left to send; raise 400 if it can't be brought."""
    param = MODEL_PARAMS.get(parameter, Param(ANYTHING))
    kinds = field.kinds or param.kinds
    if parameter == "stop" and kinds == STRING and isinstance(value, list):
        # a separator that is known; a stop string that holds it can't be sent
        return ",".join(s for s in map(str, value) if "," not in s) or None
    if parameter == "reasoning_effort" and kinds == INTEGER and value in [*BUDGETS]:
        value = BUDGETS[value]
    if kinds == ARRAY and isinstance(value, str):
        value = [value]  # as in OpenAI's API
    scale, levels = param.choices, levels_in(field, param)
    if levels and value in scale and value not in field.choices:
        rank = scale.index(value)
        value = min(levels, key=lambda c: abs(scale.index(c.lower()) - rank))
    return check_param(name, value, Param(kinds, choices=field.choices, items=ANYTHING))


def require_inputs(
    model: Model, required: Iterable[str], input: Json, remedies: Mapping[str, str]
) -> None:
    """Raise 400 for what the schema says the model can't run without."""
    for name in required:
        otherwise = f'"replicate": {{"{name}": …}} in the body'
        require(
            name in input,
            f"The model `{model.id}` needs the input '{name}', which nothing in this "
            f"call gives. Send {remedies.get(name, otherwise)}.",
            code="missing_required_parameter",
            param=name,
        )


# -- Masks ---------------------------------------------------------------------
#
# OpenAI edits where a mask is transparent, and models where it is white, or black.


MAX_MASK_PIXELS = 4 * 2**20
MAX_MASK_HEIGHT = 2**16  # each row costs memory


def bad_mask(why: str) -> APIError:
    return APIError(
        400,
        f"Invalid 'mask': {why}. Send a PNG with 8 bits a channel that is transparent "
        "where the image is to be edited, or an image without transparency that is "
        "white there.",
        code="invalid_value",
        param="mask",
    )


# The byte of a WebP image that tells whether it has transparency, by its first chunk.
WEBP_FLAGS = {b"VP8L": 24, b"VP8X": 20}


def convert_mask(mask: str | File, *, is_black: bool) -> str | File:
    """Make a mask of the transparency of a PNG; without any, it is one already."""
    if isinstance(mask, str):  # a link
        return mask
    kind, data = mask
    try:
        at = WEBP_FLAGS.get(data[12:16])
        is_opaque_webp = kind == "image/webp" and not (at and data[at] & 16)
        if kind == "image/jpeg" or is_opaque_webp:
            return mask
        if kind != "image/png":
            raise bad_mask("it is no PNG")
        alpha = read_alpha(data)
    except (struct.error, zlib.error, IndexError):
        raise bad_mask("it can't be read") from None
    if all(row.count(255) == len(row) for row in alpha):
        return mask
    opposite = bytes(range(255, -1, -1))
    rows = alpha if is_black else [row.translate(opposite) for row in alpha]
    return File("image/png", write_gray_png(rows))


def read_alpha(png: bytes) -> list[bytes]:
    """The rows of the alpha channel (PNG specification, 9), [] if there is none."""
    chunks: dict[bytes, bytearray] = defaultdict(bytearray)
    at = 8
    while at < len(png) and b"IEND" not in chunks:
        (size,) = struct.unpack_from(">I", png, at)
        chunks[png[at + 4 : at + 8]] += png[at + 8 : at + 8 + size]
        at += 12 + size
    width, height, depth, color, *_, interlace = struct.unpack(
        ">IIBBBBB", chunks[b"IHDR"]
    )
    if color not in (4, 6) and b"tRNS" not in chunks:
        return []
    if (depth, color, interlace) != (8, 6, 0):
        raise bad_mask("its pixels are not 8-bit RGBA, one row after another")
    if not (0 < width * height <= MAX_MASK_PIXELS and height <= MAX_MASK_HEIGHT):
        raise bad_mask("it has more than 4 megapixels")
    size = height * (1 + 4 * width)
    data = zlib.decompressobj().decompress(chunks[b"IDAT"], size)
    if len(data) < size:
        raise bad_mask("it is cut off")
    rows, above = [], bytes(width)
    for at in range(0, size, 1 + 4 * width):
        above = unfilter(data[at], data[at + 4 : at + 1 + 4 * width : 4], above)
        rows.append(above)
    return rows


def unfilter(kind: int, row: bytes, above: bytes) -> bytes:
    """Undo a filter, of one channel."""
    if kind > 4:
        raise IndexError
    if kind == 0:
        return row
    if kind == 1:
        return bytes(total & 255 for total in accumulate(row))
    if kind == 2:
        return bytes((a + b) & 255 for a, b in zip(row, above, strict=True))
    out = bytearray()
    left = corner = 0
    for byte, up in zip(row, above, strict=True):
        if kind == 3:
            near = (left + up) // 2
        else:  # Paeth's: the neighbour that is nearest to left + up - corner
            a, b, c = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
            near = left if a <= b and a <= c else up if b <= c else corner
        left, corner = (byte + near) & 255, up
        out.append(left)
    return bytes(out)


def write_gray_png(rows: list[bytes]) -> bytes:
    head = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 0, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    png = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", head), (b"IDAT", data), (b"IEND", b"")):
        crc = zlib.crc32(kind + content)
        png += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)
    return png


# -- Task inputs ---------------------------------------------------------------
#
# A request for what is no text in the terms of its model, which its schema alone
# tells. What a model has no input for is left out, unless the result would be a lie.
# To add a model that is odd: a row in QUIRKS.


class Quirk(NamedTuple):
    """What no schema tells of a model."""

    mask_is_black: bool = False  # where it edits; others edit what is white
    takes_lines: bool = False  # its texts are lines of one string
    outputs: tuple[str, ...] = ()  # instead of those that its schema names
    input: Json = {}  # what always goes with the rest


QUIRKS = {
    r"ideogram-ai/.*": Quirk(mask_is_black=True),
    r"nateraw/bge-.*": Quirk(outputs=("arrays",)),
    r"lucataco/nomic-embed-text-.*": Quirk(takes_lines=True),
    r"andreasjansson/clip-features": Quirk(takes_lines=True),
    r"daanelson/imagebind": Quirk(input={"modality": "text"}),
    r"zsxkib/jina-clip-.*": Quirk(input={"output_format": "array"}),
}

# What a model may call a choice for which OpenAI has another word.
SPELLINGS = {
    "jpeg": "jpg",
    "jpg": "jpeg",
    "opus": "ogg",
    "hd": "high",
    "standard": "medium",
    "xhigh": "high",
    "max": "high",
}

# Parameters that may not be left out for want of an input.
NEVER_DROPPED = ("mask", "dimensions")

# Choices that a model may lack, as they only say how well something is done.
OPTIONAL = {"quality", "moderation", "input_fidelity", "opaque", "vivid", "natural"}

# What a client that names none expects, and what stands for true among choices.
DEFAULT_CHOICES = {"output_format": "png", "response_format": "mp3"}
TRUE_CHOICES = {"translate": "translate", "words": "word"}


def parse_pairs(text: str) -> dict[str, str]:
    return dict(pair.split(":") for pair in text.split())


# OpenAI's voices, and which of Kokoro's are like them; other models have their own.
VOICES = parse_pairs(
    "alloy:alloy ash:michael ballad:george cedar:adam coral:sarah echo:echo "
    "fable:fable marin:bella nova:nova onyx:onyx sage:kore shimmer:sky verse:puck"
)

# By ISO 639-1, those of Whisper, as it and OpenAI's verbose_json name them.
LANGUAGES = parse_pairs(
    "af:afrikaans am:amharic ar:arabic as:assamese az:azerbaijani ba:bashkir "
    "be:belarusian bg:bulgarian bn:bengali bo:tibetan br:breton bs:bosnian ca:catalan "
    "cs:czech cy:welsh da:danish de:german el:greek en:english es:spanish et:estonian "
    "eu:basque fa:persian fi:finnish fo:faroese fr:french gl:galician gu:gujarati "
    "ha:hausa haw:hawaiian he:hebrew hi:hindi hr:croatian ht:haitian "
    "hu:hungarian hy:armenian id:indonesian is:icelandic it:italian ja:japanese "
    "jw:javanese ka:georgian kk:kazakh km:khmer kn:kannada ko:korean la:latin "
    "lb:luxembourgish ln:lingala lo:lao lt:lithuanian lv:latvian mg:malagasy mi:maori "
    "mk:macedonian ml:malayalam mn:mongolian mr:marathi ms:malay mt:maltese my:myanmar "
    "ne:nepali nl:dutch nn:nynorsk no:norwegian oc:occitan pa:punjabi pl:polish "
    "ps:pashto pt:portuguese ro:romanian ru:russian sa:sanskrit sd:sindhi si:sinhala "
    "sk:slovak sl:slovenian sn:shona so:somali sq:albanian sr:serbian su:sundanese "
    "sv:swedish sw:swahili ta:tamil te:telugu tg:tajik th:thai tk:turkmen tl:tagalog "
    "tr:turkish tt:tatar uk:ukrainian ur:urdu uz:uzbek vi:vietnamese yi:yiddish "
    "yo:yoruba yue:cantonese zh:chinese"
)


def task_schema(task: Task, model: Model, schemas: SchemaCache) -> ModelSchema:
    """What is known of a model.

    The commonest inputs stand for those of one that tells nothing of itself. Raise
    APIError if it can't be asked: with a guess, it might make something else for money.
    """
    schema = schemas.find(model.ref)
    is_guess = schema is None and ("/" not in model.ref or task is TASKS["generation"])
    if is_guess or (schema and not schema.inputs):
        log.warning(LogRow(event="schema_guessed", ref=model.ref))
        names = [task.params[name].names.split()[0] for name in task.needs]
        return ModelSchema({name: Field(name) for name in names})
    if schema is None:
        message = f"Replicate does not tell now what `{model.id}` takes. Try again."
        headers = {**RETRY, "retry-after": str(RETRY_AFTER)}
        raise schemas.entries[model.ref].error or APIError(
            503, message, code="upstream_unavailable", headers=headers
        )
    outputs = quirk_of(model).outputs
    return schema._replace(outputs=outputs) if outputs else schema


def unfit(task: Task, model: Model, schema: ModelSchema, why: str) -> APIError:
    """For a model that can't do a task: it says what the model is for."""
    return APIError(
        400,
        f"The model `{model.id}` ({model.ref}) can't be used by POST /v1{task.path}: "
        f"it {why}.{uses(schema)}",
        code="invalid_value",
        param="model",
    )


def build_task_inputs(
    task: Task, body: Json, model: Model, schema: ModelSchema
) -> list[PredictionInput]:
    """What Replicate is to run: one prediction, or several for `n`. Raise 400."""
    if why := misfit(task, schema):
        raise unfit(task, model, schema, why)
    shares = share_inputs(task, body, model, schema)
    shared = {name for share, _ in shares for name in share}
    inputs = size_inputs(body.get("size") or "auto", schema)
    parameters = dict.fromkeys(inputs, "size")  # Replicate's name -> OpenAI's
    for parameter, param in task.params.items():
        name, value = find_input(schema, param), body.get(parameter)
        if isinstance(value, list) and len(value) > 1:
            name = schema.find(param.names, "files", "strings", "array") or name
        if not param.names or name in shared:
            continue
        if not name:
            require(
                value is None
                or (parameter not in NEVER_DROPPED and value != "transparent"),
                f"The model `{model.id}` ({model.ref}) has no input for '{parameter}'.",
                code="unsupported_parameter",
                param=parameter,
            )
            continue
        if parameter == "mask" and value:
            is_black = quirk_of(model).mask_is_black
            value = [convert_mask(value[0], is_black=is_black)]
        value = task_value(parameter, value, schema.inputs[name])
        if value is not None:
            inputs[name], parameters[name] = value, parameter
        elif parameter in task.needs:  # it has an input of this name for another use
            raise unfit(task, model, schema, f"has no input for '{parameter}'")
    for name, row in schema.inputs.items():  # the model's own, by their own names
        if name in body and name not in task.params:
            value = body[name]
            if isinstance(value, str):  # as all values of a form are
                value = form_value(name, [value], {name: Param(row.kinds)})
            inputs[name] = fit(name, value, name, row)
    rate = schema.find("sample_rate", "integer", "enum")
    if rate and body.get("response_format") == "pcm" in inputs.values():
        inputs.setdefault(rate, task_value(rate, PCM_RATE, schema.inputs[rate]))
    inputs |= {**quirk_of(model).input, **model.config.input, **body["replicate"]}
    for name, value in inputs.items():
        if name in schema.inputs and schema.inputs[name].type in ("file", "files"):
            inputs[name] = with_files(value)
    seed = find_input(schema, SAMPLING["seed"])
    prompt = body.get("prompt") or body.get("input")
    built = PredictionInput(
        model,
        inputs,
        parameters,
        prompt=prompt if isinstance(prompt, str) else "",
        seed=schema.inputs[seed] if type(inputs.get(seed)) is int else None,
    )
    all_inputs = []
    for offset, (share, count) in enumerate(shares):
        each = with_seed(built, offset)
        all_inputs.append(each._replace(input={**share, **each.input}, expected=count))
    remedies = {
        find_input(schema, other.params[need]): f"'{need}' by POST /v1{other.path}"
        for other in TASKS.values()
        if fits(other, schema)
        for need in other.needs
    }
    require_inputs(model, schema.required, all_inputs[0].input, remedies)
    return all_inputs


def with_files(value: Any) -> Any:
    """What an input for files is given, with files in place of data: URLs."""
    if isinstance(value, list):
        return [with_files(each) for each in value]
    return (isinstance(value, str) and read_data_url(value)) or value


def quirk_of(model: Model) -> Quirk:
    rows = (q for p, q in QUIRKS.items() if re.fullmatch(p, model.owner_and_name))
    return next(rows, Quirk())


def task_value(parameter: str, value: Any, field: Field) -> Any:
    """Bring a value to the type and the words of an input; None if it is left out."""
    choices = {str(choice).casefold(): choice for choice in field.choices}
    if value is None:
        return choices.get(DEFAULT_CHOICES.get(parameter, ""))
    if isinstance(value, bool) and choices:
        return choices.get(TRUE_CHOICES.get(parameter, "")) if value else None
    if isinstance(value, list):
        is_one = field.type in ("file", "string") or (not field.type and len(value) < 2)
        most = 1 if is_one else field.high
        require(
            most is None or len(value) <= most,
            f"Invalid '{parameter}': the model takes {most}, but got {len(value)}.",
            code="array_above_max_length",
            param=parameter,
        )
        return value[0] if is_one else value
    if parameter == "voice":
        return find_voice(value, choices)
    if parameter == "language":
        value = find_language(value, choices)
        if choices and value not in choices:  # it is a hint
            return None
    if isinstance(value, str) and choices:
        found = choices.get(value.casefold(), choices.get(SPELLINGS.get(value, "")))
        if found is not None or not OPTIONAL.isdisjoint((parameter, value)):
            return found
        if parameter == "response_format" and value in ("mp3", "pcm"):
            return choices.get("wav")  # which pcm can be taken from
    value = fit(parameter, value, parameter, field)
    if parameter == "dimensions":  # vectors of another size are of no use
        check_number(parameter, value, Param(INTEGER, field.low, field.high))
    bring = wrap if parameter == "seed" else clamp
    return bring(value, field.low, field.high) if is_number(value) else value


def find_voice(voice: str, choices: Mapping[str, Any]) -> Any:
    """A voice by its name, or one like OpenAI's; None for the model's own default."""
    name = voice.casefold()
    if not choices:
        return None if name in VOICES else voice
    for wanted in (name, VOICES.get(name, name)):
        for choice in choices:
            if f"_{choice}".endswith(f"_{wanted}"):  # Kokoro's: af_nova
                return choices[choice]
    known = ", ".join(map(str, choices.values()))
    message = f"Invalid 'voice': the model has no '{voice}'. It has: {known}."
    require(name in VOICES, message, code="invalid_value", param="voice")
    return None


def find_language(language: str, choices: Mapping[str, Any]) -> str:
    """A language as a model writes it: its code, or its English name."""
    name = language.strip().casefold()
    code = re.split("[-_]", name)[0]
    code = next((code for code, known in LANGUAGES.items() if known == name), code)
    named = LANGUAGES.get(code, name)
    return named if named in choices and code not in choices else code


def share_inputs(
    task: Task, body: Json, model: Model, schema: ModelSchema
) -> list[tuple[Json, int]]:
    """What differs between predictions, and how many images or texts it is for."""
    if "n" in task.params:
        name = find_input(schema, task.params["n"])
        if not name:
            return [({}, 1)] * int(body["n"])
        counts = split_count(body["n"], schema.inputs[name])
        return [({name: count}, int(count)) for count in counts]
    if not isinstance(texts := body.get("input"), list):
        return [({}, 1)]
    name = find_input(schema, task.params["input"])
    row = schema.inputs[name]
    write: Callable[[list[str]], Any]
    if quirk_of(model).takes_lines:
        size, write = len(texts), join_lines
    elif row.type in ("strings", "array"):
        size, write = int(min(row.high or inf, MAX_TEXTS)), list
    elif name in JSON_LISTS or str(row.own_default or "").startswith("["):
        size, write = MAX_TEXTS, partial(json.dumps, ensure_ascii=False)
    else:
        size, write = 1, itemgetter(0)
    batches = [texts[at : at + size] for at in range(0, len(texts), size)]
    require(
        len(batches) <= MAX_PREDICTIONS,
        f"Invalid 'input': the model takes {size} at a time, so {len(texts)} texts "
        f"make {len(batches)} predictions, and a call may make {MAX_PREDICTIONS}.",
        code="array_above_max_length",
        param="input",
    )
    return [({name: write(batch)}, len(batch)) for batch in batches]


def join_lines(texts: list[str]) -> str:
    return "\n".join(" ".join(text.splitlines()) for text in texts)


MAX_TEXTS = 512  # of a prediction: vectors of 4,096 numbers are 43 MB of JSON
JSON_LISTS = ("texts", "text_batch", "prompts", "query_texts")  # if they are strings


def split_count(count: int, field: Field) -> list[Any]:
    """How many each prediction has to make: as many as its input takes."""
    shares: list[Any] = []
    while count > 0:
        share: Any = int(clamp(count, max(1, field.low or 1), field.high))
        if choices := field.choices:
            fitting = [choice for choice in choices if int(choice) <= count]
            share = max(fitting, key=int, default=min(choices, key=int))
        shares.append(share)
        count -= int(share)
    return shares


SIZE = re.compile(r"(\d{2,5}) ?[x*\u00d7] ?(\d{2,5})(?: \(.*\))?")
RATIO = re.compile(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)")
GRADE = re.compile(r"(\d+(?:\.\d+)?) ?(MP|K|)", re.IGNORECASE)
STEP = re.compile(r"(?:multiple of|divisible by) (\d+)")

Size = tuple[float, float]  # width and height, or only their ratio


def parse_size(text: str, name: str) -> Size | None:
    match = SIZE.fullmatch(text) or RATIO.fullmatch(text)
    return (float(match[1]), float(match[2])) if match else None


def parse_grade(text: str, name: str, wanted: Size) -> Size | None:
    """The size, of the shape that is wanted, which a grade stands for.

    2K tells the longer side, 0.5 MP (or 0.5, of an input in megapixels) the area.
    """
    if not (match := GRADE.fullmatch(text)):
        return None
    width, height = wanted
    unit = match[2].upper() or ("MP" if "megapixels" in name else "")
    scale = {
        "K": 1024 * float(match[1]) / max(wanted),
        "MP": sqrt(1e6 * float(match[1]) / (width * height)),
    }.get(unit)
    return (width * scale, height * scale) if scale else None


def size_inputs(size: str, schema: ModelSchema) -> Json:
    """What makes images of a size, or of the nearest that a model has; {} for auto.

    A model has sizes to choose from, or takes width and height, in some only if
    another input is `custom`; or the ratio of the two, and a grade of resolution.
    """
    if not (match := SIZE.fullmatch(size)):
        return {}
    width, height = float(match[1]), float(match[2])
    choices = {name: field.choices for name, field in schema.inputs.items()}

    def distance(other: Size) -> tuple[float, float]:
        ratio = abs(log2(width / height) - log2(other[0] / other[1]))
        return round(ratio, 6), abs(log2(width * height) - log2(other[0] * other[1]))

    def nearest(names: str, parse: Callable[[str, str], Size | None]) -> Json:
        for name in names.split():
            found = [(c, parse(str(c), name)) for c in choices.get(name, ())]
            if sizes := {c: size for c, size in found if size and all(size)}:
                return {name: min(sizes, key=lambda choice: distance(sizes[choice]))}
        return {}

    if exact := nearest("size resolution image_size", parse_size):
        return exact
    ratio = nearest("aspect_ratio", parse_size)
    custom: Json = {
        name: choice
        for name in ("aspect_ratio", "size", "resolution")
        for choice in choices.get(name, ())
        if str(choice).lower() == "custom"
    }
    across, down = schema.inputs.get("width"), schema.inputs.get("height")
    if across and down and (custom or not ratio):
        sides = ((width, across), (height, down))
        least = max((field.low or 0) / side for side, field in sides)
        most = min((field.high or inf) / side for side, field in sides)
        scale = clamp(1, least, most)  # so that its shape stays
        return {
            **custom,
            "width": side_input(width * scale, across),
            "height": side_input(height * scale, down),
        }
    grades = "megapixels output_megapixels resolution image_size size"
    return {**ratio, **nearest(grades, partial(parse_grade, wanted=(width, height)))}


def side_input(wanted: float, field: Field) -> Any:
    """The width or height that is nearest to what is wanted."""
    if choices := field.choices:
        return min(choices, key=lambda choice: abs(float(choice) - wanted))
    match = STEP.search(field.description)
    step = int(match[1]) if match else 8
    return int(clamp(round(wanted / step) * step, field.low, field.high))


# ==== 4. PREDICTIONS ==========================================================


# -- Events --------------------------------------------------------------------
#
# What a prediction says, as events: Reasoning, Texts and ToolCalls (each followed
# by its Arguments), then one Done; an APIError cuts them short. A function that
# shapes an answer takes events and yields events. It may end before those it reads
# do: whoever has created the prediction cancels it.


class Usage(NamedTuple):
    """Tokens, None where Replicate did not count them."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    reasoning_tokens: int = 0
    is_estimate: bool = False
    cost: float | None = None  # in USD, if the model has a price


CHARACTERS_PER_TOKEN = 4  # a guess: English as most tokenizers cut it


def estimate_tokens(characters: int) -> int:
    return -(-characters // CHARACTERS_PER_TOKEN)


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Reasoning:
    text: str


@dataclass(frozen=True)
class ToolCall:
    """A call begins."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    index: int  # of the call
    text: str  # a piece of their JSON text


@dataclass(frozen=True)
class Done:
    finish_reason: str
    usage: Usage = Usage()


Event = Reasoning | Text | ToolCall | Arguments | Done

Events = Generator[Event, None, None]
Waiting = Generator[Event, None, bool]


@dataclass
class RequestLog:
    """What the log line tells of a request; each step fills in what it knows."""

    endpoint: str = "other"  # the path of its row
    model: str = ""  # as the client names it
    ref: str = ""  # what Replicate ran
    stream: bool = False
    n: int = 1
    prompts: list[str] = field(default_factory=list)  # which the log never shows
    predictions: list[str] = field(default_factory=list)
    usages: list[Usage] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)  # of predictions, in USD
    first_text_at: float | None = None  # time.monotonic()
    error: str | int = ""
    failure: APIError | None = None


# Of the request that a thread works for, for the log.
CURRENT_ID = ContextVar[str]("id", default="")

ALPHABET = string.ascii_letters + string.digits


def random_id(prefix: str, length: int) -> str:
    picks = secrets.token_bytes(length)
    return prefix + "".join([ALPHABET[pick % len(ALPHABET)] for pick in picks])


# -- Cancellation --------------------------------------------------------------
#
# Whoever works for a request may simply block: a hang-up, or the end of the server,
# wakes it from another thread and raises in it.


class ClientDisconnected(Exception):
    """The client has hung up: nobody reads the response."""


class Cancellation:
    """Lets another thread stop a request that is blocked."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.cause: Exception | None = None
        self.callbacks: list[Callable[[], None]] = []

    def cancel(self, cause: Exception) -> None:
        """Stop the request; of several causes the first counts.

        Callbacks run with the lock held: they may not wait, nor use this again.
        """
        with self.lock:
            if self.cause:
                return
            self.cause = cause
            for callback in self.callbacks:
                with suppress(Exception):  # the callbacks after it count too
                    callback()

    def check(self) -> None:
        """Raise the cause if the request has to stop."""
        if self.cause:
            raise self.cause

    def sleep(self, seconds: float) -> None:
        cancelled = threading.Event()
        with self.on_cancel(cancelled.set):
            cancelled.wait(seconds)
        self.check()

    @contextmanager
    def on_cancel(self, callback: Callable[[], None]) -> Iterator[None]:
        """Have `callback` called if the request has to stop within this block."""
        with self.lock:
            self.check()
            self.callbacks.append(callback)
        try:
            yield
        finally:
            with self.lock:
                self.callbacks.remove(callback)


# -- HTTP messages -------------------------------------------------------------
#
# How both sides read HTTP/1.1. http.server and http.client take bare line feeds,
# folded lines and two lengths, behind which one message could hide another: here,
# what can be read in two ways is refused. They also take four times the CPU, and
# give each chunk alone, where here tokens that came together stay together.


MAX_HEAD = 65536  # bytes

EMPTY_LINE = re.compile(rb"\r?\n\r?\n")
HEADERS = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n)*")
SINGLE_HEADERS = ("content-length", "transfer-encoding", "host", "authorization")

# A line end before a chunk ends the chunk before it; the first chunk is given one.
CHUNK_HEAD = re.compile(rb"\r\n0*([1-9A-Fa-f][0-9A-Fa-f]{0,7})[ \t]*(?:;[ -~]*)?\r\n")
LAST_CHUNK = re.compile(rb"\r\n0+[ \t]*(?:;[ -~]*)?(?=\r\n)")

CHUNKED = -1  # as the length of a body


class BadMessage(http.client.HTTPException):
    """What is wrong with a message, as the end of a sentence, and a status for it."""

    def __init__(self, why: str, status: int = 400) -> None:
        super().__init__(why)
        self.status = status


def parse_headers(lines: bytes) -> dict[str, str]:
    """Names in lower case; the values of a repeated name are joined."""
    if not HEADERS.fullmatch(lines):
        raise BadMessage("a header is not of the form Name: value")
    headers: dict[str, str] = {}
    for line in lines.decode("latin-1").split("\r\n")[:-1]:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if name in headers and name in SINGLE_HEADERS:
            raise BadMessage(f"it has two headers {name}")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def parse_body_length(headers: Mapping[str, str]) -> int | None:
    """In bytes, or CHUNKED; None if it is not given."""
    length, coding = headers.get("content-length"), headers.get("transfer-encoding")
    if length is not None and not re.fullmatch(r"[0-9]{1,18}", length):
        raise BadMessage("its Content-Length is not a number")
    if coding is None:
        return None if length is None else int(length)
    if length is not None:
        raise BadMessage("its length is given in two ways")
    if coding.lower() != "chunked":
        raise BadMessage("its Transfer-Encoding is not just chunked", 501)
    return CHUNKED


def body_too_large(size: int, limit: float) -> APIError:
    message = f"Maximum content size limit ({limit}) exceeded ({size} bytes)."
    return APIError(413, f"{message} The proxy's limit is MAX_BODY_BYTES.")


class MessageReader:
    """Reads messages, one after another. Raise BadMessage, or what `receive` raises."""

    def __init__(self, receive: Callable[[], bytes]) -> None:
        self.receive = receive  # gives b"" at the end
        self.data = b""  # received, and not read yet
        self.is_done = False  # the message has been read to its end

    def fill(self) -> None:
        if not (piece := self.receive()):
            raise BadMessage("it stops early")
        self.data += piece

    def read_head(self) -> tuple[bytes, dict[str, str]]:
        """Read the first line and the headers."""
        self.is_done, searched = False, 0
        while not (end := EMPTY_LINE.search(self.data, searched, MAX_HEAD)):
            if len(self.data) >= MAX_HEAD:
                raise BadMessage(f"its head is larger than {MAX_HEAD} bytes", 431)
            searched = max(len(self.data) - 3, 0)
            self.fill()
        if end[0] != b"\r\n\r\n":
            raise BadMessage("one of its lines does not end in CR LF")
        head, self.data = self.data[: end.start() + 2], self.data[end.end() :]
        first, _, lines = head.partition(b"\r\n")
        return first, parse_headers(lines)

    def read_body(self, length: int | None, limit: float = inf) -> Iterator[bytes]:
        """Yield what comes; without a length, that is all until the connection ends."""
        self.is_done = length == 0
        if length == CHUNKED:
            return self.read_chunks(limit)
        return self.read_all() if length is None else self.read_bytes(length)

    def read_all(self) -> Iterator[bytes]:
        yield self.data
        while piece := self.receive():
            yield piece

    def read_bytes(self, length: int) -> Iterator[bytes]:
        while length:
            if not self.data:
                self.fill()
            piece, self.data = self.data[:length], self.data[length:]
            length -= len(piece)
            self.is_done = length == 0
            yield piece

    def read_chunks(self, limit: float) -> Iterator[bytes]:
        """Yield what is in the chunks, together what was received together.

        Raise 413 for a chunk that would go beyond the limit.
        """
        data, left, total = b"\r\n" + self.data, 0, 0  # `left` to come of a chunk
        while True:
            at, content = 0, []
            while at < len(data):
                if not left:
                    if not (head := CHUNK_HEAD.match(data, at)):
                        break
                    at, left = head.end(), int(head[1], 16)
                    total += left
                    if total > limit:
                        raise body_too_large(total, limit)
                content.append(data[at : at + left])
                at += len(content[-1])
                left -= len(content[-1])
            if content:
                yield b"".join(content)
                data = data[at:]
            if last := LAST_CHUNK.match(data):
                break
            if data.count(b"\n") > 1 or len(data) > MAX_HEAD:
                raise BadMessage("the size of a chunk is missing or wrong")
            if not (piece := self.receive()):
                raise BadMessage("it stops early")
            data += piece
        self.data = data[last.end() :]
        self.read_head()  # the trailers, behind a first line that is empty
        self.is_done = True


# -- HTTP client ---------------------------------------------------------------
#
# Connections to Replicate's hosts, kept for the next request, and event streams. The
# SDK's requests go over them too: httpx's own pool is quadratic in its connections.


MAX_RECORD = 64 * 2**20  # bytes of a prediction's record, or of other JSON
MAX_EVENT_LINE = 16 * 2**20  # bytes, and of all lines of an event
MAX_FILE = 64 * 2**20  # bytes of a file that a model made
READ_SIZE = 8192  # bytes
MAX_IDLE = 100  # connections to one host

STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9]\d\d)(?: .*)?")

Origin = tuple[str, str]  # scheme, and host with port


class HTTPResponse:
    """A response of Replicate's: its head was read, and `body` yields the rest."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = memoryview(bytearray(READ_SIZE))  # new ones would leave holes
        self.reader = MessageReader(self.receive)
        self.status = 100
        while self.status < 200:  # an interim response
            first, self.headers = self.reader.read_head()
            if not (match := STATUS_LINE.fullmatch(first)):
                raise BadMessage(f"its first line is {first[:80]!r}")
            version, self.status = match[1], int(match[2])
        closes = "close" in self.headers.get("connection", "").lower()
        self.keeps_alive = version == b"1" and not closes
        length = 0 if self.status in (204, 304) else parse_body_length(self.headers)
        self.body = self.reader.read_body(length)

    def receive(self) -> bytes:
        try:
            return bytes(self.buffer[: self.sock.recv_into(self.buffer)])
        except BlockingIOError:  # see set_timeout
            raise TimeoutError("nothing came in time") from None


class NotConnected(OSError):
    """There was no way to the host, so nothing was sent."""


class ConnectionPool:
    """Connections that are kept open, the last used first."""

    def __init__(self, timeouts: Timeouts, tls: ssl.SSLContext) -> None:
        self.timeouts = timeouts
        self.tls = tls
        self.keep = 60.0  # seconds that a connection may be idle
        self.idle: dict[Origin, deque[tuple[float, socket.socket]]] = defaultdict(deque)

    @contextmanager
    def request(
        self,
        origin: Origin,
        method: str,
        message: bytes,
        timeout: float,
        cancellation: Cancellation,
    ) -> Iterator[HTTPResponse]:
        """Send a message; inside, its response can be read.

        Raise NotConnected if nothing was sent, else OSError or HTTPException, or the
        cancellation's cause. A GET whose kept connection turns out to have ended is
        sent again; a POST never is.
        """

        def send(sock: socket.socket) -> HTTPResponse:
            try:
                with cancellation.on_cancel(partial(shut, sock)):
                    set_timeout(sock, socket.SO_RCVTIMEO, timeout)
                    sock.sendall(message)
                    return HTTPResponse(sock)
            except BaseException:
                sock.close()
                cancellation.check()
                raise

        kept = self.take(origin)
        try:
            response = send(kept or self.connect(origin))
        except (OSError, http.client.HTTPException) as error:
            if not kept or method != "GET" or isinstance(error, TimeoutError):
                raise
            response = send(self.connect(origin))
        try:
            with cancellation.on_cancel(partial(shut, response.sock)):
                yield response
        except (OSError, http.client.HTTPException):
            cancellation.check()
            raise
        finally:
            self.release(origin, response)

    def take(self, origin: Origin) -> socket.socket | None:
        idle = self.idle[origin]
        self.trim(idle)
        with suppress(IndexError):  # there are no more
            while sock := idle.pop()[1]:
                if sock.gettimeout() or not DONT_WAIT:
                    sock.settimeout(0)
                if peek(sock) is None:
                    return sock
                sock.close()  # something came that was not asked for: mostly its end
        return None

    def connect(self, origin: Origin) -> socket.socket:
        """Connect, through HTTPS_PROXY where the environment names one."""
        url, timeout = urlsplit("://".join(origin)), self.timeouts.connect
        host, port, is_tls = url.hostname or "", url.port, url.scheme == "https"
        proxy = find_proxy(host) if is_tls else urlsplit("")
        address = (proxy.hostname, proxy.port or 80) if proxy.hostname else (host, port)
        connection = http.client.HTTPConnection(*address, timeout=timeout)
        if is_tls:
            connection = http.client.HTTPSConnection(
                *address, timeout=timeout, context=self.tls
            )
        if proxy.hostname:
            user = f"{unquote(proxy.username or '')}:{unquote(proxy.password or '')}"
            basic = f"Basic {b64encode(user.encode()).decode()}"
            headers = {"Proxy-Authorization": basic} if proxy.username else {}
            connection.set_tunnel(host, port, headers)
        try:
            connection.connect()  # with TCP_NODELAY
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise NotConnected(repr(error)) from error
        set_timeout(connection.sock, socket.SO_SNDTIMEO, self.timeouts.create)
        return cast(socket.socket, connection.sock)

    def release(self, origin: Origin, response: HTTPResponse) -> None:
        """Keep the connection if the last bytes of its response are here already."""
        sock, reader = response.sock, response.reader
        with suppress(OSError, http.client.HTTPException):
            if not reader.is_done:
                sock.settimeout(0.001)
                for _ in islice(response.body, 2):  # a little, and then its end
                    pass
            if reader.is_done and not reader.data and response.keeps_alive:
                idle = self.idle[origin]
                idle.append((time.monotonic(), sock))
                self.trim(idle)
                return
        sock.close()

    def trim(self, idle: deque[tuple[float, socket.socket]]) -> None:
        """Close what is too old, or too many."""
        oldest = time.monotonic() - self.keep
        with suppress(IndexError):
            while idle[0][0] <= oldest or len(idle) > MAX_IDLE:
                idle.popleft()[1].close()

    def close(self) -> None:
        """Keep none from now on, and none of those that are idle."""
        self.keep = 0
        for idle in list(self.idle.values()):
            self.trim(idle)


def render_head(
    method: str, target: bytes, headers: Iterable[tuple[bytes, bytes]]
) -> bytes:
    lines = [b"%b %b HTTP/1.1" % (method.encode(), target)]
    lines += [name + b": " + value for name, value in headers]
    if re.search(rb"[\r\n\0]", b"".join(lines)):
        raise http.client.InvalidURL("a line of the request has another in it")
    return b"\r\n".join([*lines, b"", b""])


def peek(sock: socket.socket) -> bytes | None:
    """What can be read, as it is on the wire: b"" is the end, None nothing yet."""
    try:
        return socket.socket.recv(sock, 1, socket.MSG_PEEK | DONT_WAIT)
    except BlockingIOError:
        return None
    except OSError:
        return b""


DONT_WAIT = getattr(socket, "MSG_DONTWAIT", 0)  # Windows has none


def shut(sock: socket.socket) -> None:
    """End a read in another thread: plainly, as TLS would take its state apart."""
    with suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def set_timeout(sock: socket.socket, option: int, seconds: float) -> None:
    """Limit a read (SO_RCVTIMEO) or a write (SO_SNDTIMEO) by the kernel's clock.

    With Python's own time-out each piece is two system calls, and two turns at the
    lock that all threads want. TLS knows no other, and Windows counts in other units.
    """
    limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    pythons: float | None = seconds
    if not isinstance(sock, ssl.SSLSocket) and os.name != "nt":
        with suppress(OSError):  # where a time has another size
            sock.setsockopt(socket.SOL_SOCKET, option, limit)
            pythons = None
    if sock.gettimeout() != pythons:  # to set one is a system call too
        sock.settimeout(pythons)


def find_proxy(host: str) -> SplitResult:
    """The URL of the proxy for a host, empty if there is none: http is assumed."""
    proxies = urllib.request.getproxies()
    url = proxies.get("https") or proxies.get("all") or ""
    if urllib.request.proxy_bypass(host):
        url = ""
    return urlsplit(url if "://" in url else f"//{url}")


# Each header takes httpx some time. So a response keeps those that the SDK or we look
# at, and a request says nothing of the SDK or its host.
SDK_HEADERS = ("content-type", "content-encoding", "retry-after", "ratelimit-reset")
NO_TELEMETRY = {
    f"X-Stainless-{name}": Omit()
    for name in (
        *("Lang", "Package-Version", "OS", "Arch", "Runtime", "Runtime-Version"),
        *("Async", "Retry-Count", "Read-Timeout"),
    )
}

# What may break off the request that a thread sends; None for a create.
REQUEST_CANCELLATION = ContextVar[Cancellation | None]("cancellation", default=None)


class ReplicateTransport(httpx.BaseTransport):
    """Sends the SDK's requests over the pool, each with its own headers and timeout.

    Its lock is held by the thread that is in the SDK, and by none while Replicate is
    waited for. So of many calls that start at once, fewer compete with those that
    stream for Python's own lock.
    """

    def __init__(self, pool: ConnectionPool) -> None:
        self.pool = pool
        self.lock = threading.RLock()  # a log handler may call the SDK in the SDK

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.lock.release()
        try:
            return self.send(request)
        finally:
            self.lock.acquire()

    def send(self, request: httpx.Request) -> httpx.Response:
        """Raise what `ConnectionPool.request` raises: a connection error to the SDK."""
        url, method = request.url, request.method
        head = render_head(method, url.raw_path, request.headers.raw)
        with self.pool.request(
            (url.scheme, url.netloc.decode()),
            method,
            head + request.read(),
            request.extensions["timeout"]["read"],
            REQUEST_CANCELLATION.get() or Cancellation(),
        ) as response:
            content = bytearray()
            for piece in response.body:
                content += piece
                if len(content) > MAX_RECORD:
                    raise http.client.HTTPException("the response is too large")
        kept = {n: v for n, v in response.headers.items() if n in SDK_HEADERS}
        body = httpx.ByteStream(bytes(content))
        return httpx.Response(response.status, headers=kept, stream=body)


ServerSentEvent = tuple[str, str]  # its name and its data

# The lines that count: fields, the comment with which Replicate ends a stream early,
# and the empty one that ends an event.
EVENT_LINE = re.compile(rb"(?m)^(?:(data|event)(?::[ ]?(.*))?|(:408).*|)$")


def decode_events(pieces: Iterable[bytes]) -> Iterator[list[ServerSentEvent]]:
    """Decode an event stream (Replicate's docs, "Streaming"), however it is cut up.

    Yield together what was received together. LF, CRLF and CR end a line, and nothing
    else does. End at a 408 comment. Raise HTTPException for an event without an end.
    """
    data, after_cr = bytearray(), False
    for piece in pieces:
        fresh = piece[1:] if after_cr and piece.startswith(b"\n") else piece
        after_cr = piece.endswith(b"\r")
        if b"\r" in fresh:
            fresh = fresh.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        searched = max(len(data) - 1, 0)
        data += fresh
        last = data.rfind(b"\n\n", searched)
        end = last + 2 if last >= 0 else 0  # of the events that are whole
        if not end and len(data) > MAX_EVENT_LINE:
            raise http.client.HTTPException("an event has no end")
        events: list[ServerSentEvent] = []
        name, lines = "", []
        for key, value, is_timed_out in EVENT_LINE.findall(data, 0, end):
            if key == b"data":
                lines.append(value)
            elif key:
                name = value.decode("utf-8", "replace")
            elif is_timed_out:
                yield events
                return
            elif name or lines:
                text = b"\n".join(lines).decode("utf-8", "replace")
                events.append((name, text))
                name, lines = "", []
        del data[:end]
        yield events


# -- Replicate -----------------------------------------------------------------
#
# Replicate's API through its SDK, which no other section calls; what Replicate
# refuses, in the client's terms; and what the record of a prediction says. To add a
# refusal: a row in REFUSALS. To add a way for a prediction to fail: a row in FAILURES.


API_HOST = re.compile(r"(.+\.)?replicate\.(com|net)")
FILE_HOST = re.compile(r"(.+\.)?replicate\.delivery")
LINK_HOST = re.compile(r"(?s)\w+:(?://(?:[^/?#]*@)?([^/?#]*))?.*")
PORTS = {"http": 80, "https": 443}


class Refusal(NamedTuple):
    """What a client is told of a failure that is not its own."""

    status: int
    code: str
    message: str
    headers: Mapping[str, str] = {}

    def error(
        self, why: str = "", param: str | None = None, detail: str = ""
    ) -> APIError:
        return APIError(
            self.status,
            f"{self.message} {why}".strip(),
            code=self.code,
            param=param,
            headers=self.headers,
            detail=detail,
        )


OUR_TOKEN = Refusal(
    502,
    "upstream_authentication",
    "Replicate did not accept the proxy's token. Put a valid REPLICATE_API_TOKEN from "
    "https://replicate.com/account/api-tokens into .env and start the proxy again.",
    NO_RETRY,
)

UNAVAILABLE = Refusal(502, "upstream_unavailable", "Replicate could not run this.")

ELSEWHERE = Refusal(
    502,
    "upstream_unavailable",
    "Replicate's API is not where the proxy looks for it. Check REPLICATE_BASE_URL.",
    NO_RETRY,
)

UNREACHABLE = Refusal(
    502,
    "upstream_unavailable",
    "Replicate can't be reached from the proxy. Try again later.",
)

NOT_UPLOADED = Refusal(
    502,
    "upstream_unavailable",
    "A file of this call could not be handed to Replicate. Nothing was run: try again.",
)

LOST = Refusal(
    502,
    "upstream_unavailable",
    "What Replicate made of this can't be had.",
    NO_RETRY,
)

NO_ANSWER = Refusal(
    504,
    "upstream_unavailable",
    "Replicate gave no answer that can be understood. It may be running this all the "
    "same, so trying again may cost twice.",
    NO_RETRY,
)

REFUSALS = {
    **dict.fromkeys((301, 302, 303, 307, 308), ELSEWHERE),  # the token follows none
    401: OUR_TOKEN,
    403: OUR_TOKEN,
    **dict.fromkeys((504, 524), NO_ANSWER),
    402: Refusal(
        429,
        "insufficient_quota",
        "The proxy's Replicate account is out of credit. Its owner can add some at "
        "https://replicate.com/account/billing.",
        NO_RETRY,
    ),
    404: Refusal(404, "model_not_found", "Replicate does not know this model."),
    413: Refusal(413, "invalid_value", "This is larger than Replicate takes."),
    422: Refusal(400, "invalid_value", "The model refused an input."),
    429: Refusal(429, "rate_limit_exceeded", "Replicate's rate limit is reached."),
}

# Of a token that is the client's own.
THEIR_TOKEN = Refusal(
    401,
    "invalid_api_key",
    "Replicate did not accept the token that was sent as the key. Get one at "
    "https://replicate.com/account/api-tokens.",
    NO_RETRY,
)

THEIR_REFUSALS = {
    **REFUSALS,
    401: THEIR_TOKEN,
    403: THEIR_TOKEN,
    402: REFUSALS[402]._replace(
        message="Your Replicate account is out of credit. You can add some at "
        "https://replicate.com/account/billing."
    ),
}

RETRY_DELAYS = (r"resets in ~?(\d+)\s*s", r"available in (\d+) second")

# Exceptions that say something of the connection, and are no fault of ours.
CONNECTION_ERRORS = (OSError, http.client.HTTPException, httpx.HTTPError)

RECORD_TYPES = {
    **dict.fromkeys(("status", "error", "logs"), str),
    **dict.fromkeys(("urls", "metrics"), dict),
}


class Unusable(http.client.HTTPException):
    """A response that came, and would be the same if it came again."""


def is_broken_off(error: APIError) -> bool:
    """Whether another try may do better."""
    cause = error.__cause__
    return isinstance(cause, CONNECTION_ERRORS) and not isinstance(cause, Unusable)


def where_kept(url: str) -> str:
    return f"Replicate keeps it for an hour, at '{url}'."


def take_start(pieces: Iterator[bytes]) -> bytes:
    """The first pieces of a file: enough to tell its type."""
    start = b""
    while len(start) < SIGNATURE_SIZE and (piece := next(pieces, b"")):
        start += piece
    return start


class BadResponse(ValueError):
    """A 2xx response that is not the JSON object it has to be: Replicate's failure."""


class ReplicateAPI:
    """The calls of Replicate's API that are made here. They raise APIError."""

    def __init__(
        self, settings: Settings, timeouts: Timeouts, metrics: Metrics | None = None
    ) -> None:
        self.metrics = metrics or Metrics()
        self.token = settings.replicate_api_token.strip()
        self.refusals = REFUSALS
        self.base = urlsplit(settings.replicate_base_url.rstrip("/"))
        self.time_limit = settings.prediction_timeout
        self.timeouts = timeouts
        tls = httpx.create_ssl_context()  # takes 20 ms: one for all
        self.pool = ConnectionPool(timeouts, tls)
        self.transport = ReplicateTransport(self.pool)
        http_client = httpx.Client(transport=self.transport)
        http_client.headers.clear()  # the SDK gives its own
        # Nothing but `send` calls it, as that holds the lock of its transport.
        self.client = Replicate(
            bearer_token=self.token,
            base_url=self.base._replace(path=self.base.path or "/v1").geturl(),
            max_retries=0,  # a second create would be a second bill
            timeout=timeouts.create,
            http_client=http_client,
        )
        self.versions: dict[str, str] = {}  # of community models: owner/name -> id

    def with_token(self, token: str) -> ReplicateAPI:
        """The same API as a client sees it with its own token."""
        other = copy(self)
        other.token, other.refusals, other.versions = token, THEIR_REFUSALS, {}
        other.client = self.client.with_options(bearer_token=token)
        return other

    def close(self) -> None:
        """Keep no connection; what is created late can be cancelled all the same."""
        self.pool.close()

    def create(self, prediction_input: PredictionInput, wait: bool) -> Json:
        """Create a prediction, of a community model by its newest version."""
        ref = prediction_input.model.ref
        known = self.versions.get(ref, ref)
        try:
            return self.create_as(known, prediction_input, wait)
        except APIError as error:  # was refused, so there is no prediction
            owned = OWNED.fullmatch(ref)
            if error.code != "model_not_found" or not owned or owned[3]:
                raise
            newest = None
            with suppress(APIError):
                newest = self.latest_version(owned[1], owned[2]).get("id")
            if newest in (None, known):
                raise
        self.versions[ref] = newest
        return self.create_as(newest, prediction_input, wait)

    def create_as(
        self, ref: str, prediction_input: PredictionInput, wait: bool
    ) -> Json:
        given: Json = {
            "input": prediction_input.input,
            "cancel_after": f"{self.time_limit}s",
        }
        if wait:
            given["prefer"] = f"wait={self.timeouts.wait}"
        send: Callable[..., Any]
        if ref.startswith("deployments/"):
            send = self.client.deployments.predictions.with_raw_response.create
            _, given["deployment_owner"], given["deployment_name"] = ref.split("/", 2)
        else:
            send = self.client.predictions.with_raw_response.create
            given["version"] = ref
        record = self.send("create", send, "id", prediction_input, **given)
        return parse_prediction(record)

    def send(
        self,
        kind: str,  # for the log and metrics
        method: Callable[..., Any],
        needs: str = "",
        prediction_input: PredictionInput | None = None,
        cancellation: Cancellation | None = None,
        **given: Any,
    ) -> Json:
        """Send a request by a method of the SDK; parse the JSON object in its response.

        Raise APIError, in the client's terms, for all that Replicate may do.
        """
        REQUEST_CANCELLATION.set(cancellation)
        status, began, record = "none", time.monotonic(), {}
        try:
            with self.transport.lock:
                response = method(**given, extra_headers=NO_TELEMETRY)
            status = str(response.status_code)
            record = parse_object(response, needs)
            return record
        except APIStatusError as error:
            status = str(error.status_code)
            row = self.refusals.get(error.status_code, UNAVAILABLE)
            raise refusal(error, row, prediction_input, self.token) from None
        except (ReplicateError, BadResponse) as error:
            cause = error.__cause__
            failed = isinstance(error, APIConnectionError)
            if failed and not isinstance(cause, CONNECTION_ERRORS):
                raise cause or error from None  # a cancellation, or a fault of ours
            if isinstance(cause, NotConnected):
                if is_exhausted(cause.__cause__):
                    raise overloaded(NO_DESCRIPTORS) from None
                raise UNREACHABLE.error(detail=str(cause)) from None
            raise NO_ANSWER.error(detail=repr(cause or error)) from error
        finally:
            known = {**given, **record}
            self.log_request(kind, status, began, prediction_input, known)

    def log_request(
        self,
        kind: str,
        status: str,
        began: float,
        sent: PredictionInput | None = None,
        known: Json | None = None,  # what was sent and what came
    ) -> None:
        """Count a request to Replicate. At DEBUG, log it without what anybody said."""
        whose = "client" if self.refusals is THEIR_REFUSALS else "proxy"
        self.metrics.add(1, "upstream_requests_total", kind, status, whose)
        if log.isEnabledFor(logging.DEBUG):
            known = known or {}
            is_record = "status" in known
            model = known.get("model_owner"), known.get("model_name")
            came = {name: known.get(name) for name in ("output", "logs", "error")}
            row = LogRow(
                upstream=kind,
                status=int(status) if status.isdigit() else status,
                ms=round((time.monotonic() - began) * 1000),
                prediction=known.get("id" if is_record else "prediction_id"),
                ref=sent.model.ref if sent else "/".join(filter(None, model)),
                inputs=sent and sizes(sent.input),
                state=known.get("status"),
                came=sizes(came),
                predict_time=as_object(known.get("metrics")).get("predict_time"),
                request_id=CURRENT_ID.get(),
            )
            log.debug(row)

    def latest_version(self, owner: str, name: str) -> Json:
        get, timeout = self.client.models.with_raw_response.get, self.timeouts.schema
        model = self.send(
            "model", get, model_owner=owner, model_name=name, timeout=timeout
        )
        return as_object(model.get("latest_version"))

    def find_schema(self, owner: str, name: str, version: str) -> Json:
        """What a version says of itself, or the newest one; {} if it says nothing."""
        if version:
            with suppress(APIError):  # official models list none
                found = self.send(
                    "version",
                    self.client.models.versions.with_raw_response.get,
                    model_owner=owner,
                    model_name=name,
                    version_id=version,
                    timeout=self.timeouts.schema,
                )
                return as_object(found.get("openapi_schema"))
        return as_object(self.latest_version(owner, name).get("openapi_schema"))

    def find_release(self, owner: str, name: str) -> str:
        """The ref of what a deployment runs."""
        found = self.send(
            "deployment",
            self.client.deployments.with_raw_response.get,
            deployment_owner=owner,
            deployment_name=name,
            timeout=self.timeouts.schema,
        )
        release = as_object(found.get("current_release"))
        parts = filter(None, (release.get("model"), release.get("version")))
        ref = ":".join(map(str, parts))
        require(OWNED.fullmatch(ref), "The deployment has no release.")
        return ref

    def fetch_prediction(self, id: str, cancellation: Cancellation) -> Json:
        record = self.send(
            "get",
            self.client.predictions.with_raw_response.get,
            "id",
            cancellation=cancellation,
            prediction_id=quote(id, safe=""),
            timeout=self.timeouts.get,
        )
        return parse_prediction(record)

    def cancel(self, id: str) -> None:
        cancel = self.client.predictions.with_raw_response.cancel
        name = quote(id, safe="")
        self.send("cancel", cancel, prediction_id=name, timeout=self.timeouts.get)

    def upload(self, file: File, cancellation: Cancellation) -> str:
        """Put a file into Replicate's files; return its link."""
        content = ("attachment", file.content, file.kind)
        create = self.client.files.with_raw_response.create
        why: object = "no link to a file"
        try:
            made = self.send(
                "upload", create, cancellation=cancellation, content=content
            )
            link = as_object(made.get("urls")).get("get")
            if isinstance(link, str) and LINK.fullmatch(link):
                return link
        except APIError as error:
            if error.status in (401, 413, 429) or error.code == OUR_TOKEN.code:
                raise  # means the same as for a prediction
            why = error
        log.warning(LogRow(event="upload-failed", why=why))
        raise NOT_UPLOADED.error()

    def find_collection(self, slug: str) -> list[str]:
        """The refs of the models in one of Replicate's collections."""
        found = self.send(
            "collection",
            self.client.collections.with_raw_response.get,
            collection_slug=slug,
            timeout=self.timeouts.schema,
        )
        rows = map(as_object, as_list(found.get("models")))
        refs = (f"{m.get('owner') or ''}/{m.get('name') or ''}" for m in rows)
        return [*filter(is_ref, refs)]

    def account(self) -> Json:
        return self.send("account", self.client.account.with_raw_response.get)

    @contextmanager
    def get(
        self,
        kind: str,
        url: str,
        cancellation: Cancellation,
        *headers: tuple[bytes, bytes],
        timeout: float | None = None,
    ) -> Iterator[HTTPResponse]:
        """GET what is not of the API: a stream, a file. Raise what the pool raises."""
        parts = urlsplit(url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        host = b"Host", parts.netloc.encode()
        head = render_head("GET", target.encode(), (host, *headers))
        origin, timeout = parts[:2], timeout or self.timeouts.stream
        send = self.pool.request
        status, began = "none", time.monotonic()
        try:
            with send(origin, "GET", head, timeout, cancellation) as response:
                status = str(response.status)
                if response.status >= 500:
                    raise http.client.HTTPException(f"status {status}")
                if response.status != 200:
                    raise Unusable(f"status {status}")
                yield response
        finally:
            self.log_request(kind, status, began)

    @contextmanager
    def open_stream(
        self, url: str, cancellation: Cancellation
    ) -> Iterator[Iterator[bytes]]:
        """Open an event stream. Raise what `ConnectionPool.request` raises."""
        headers = (
            (b"Authorization", f"Bearer {self.token}".encode()),
            (b"Accept", b"text/event-stream"),
            (b"Cache-Control", b"no-store"),
        )
        with self.get("stream", url, cancellation, *headers) as response:
            kind = response.headers.get("content-type", "").lower()
            if not kind.startswith("text/event-stream"):
                raise http.client.HTTPException(f"type {kind!r}")
            yield response.body

    @contextmanager
    def open_file(
        self, url: str, cancellation: Cancellation, timeout: float | None = None
    ) -> Iterator[Iterator[bytes]]:
        """Open a file that a model made: what is in it, as it comes. Raise APIError.

        Replicate keeps it for an hour (its docs, "Output files").
        """
        if file := read_data_url(url):  # of a create that was waited for
            yield iter([file.content])
            return
        self.check_file_host(url)
        too_late = time.monotonic() + self.timeouts.file

        def bounded(pieces: Iterator[bytes]) -> Iterator[bytes]:
            total = 0
            for piece in pieces:
                total += len(piece)
                if total > MAX_FILE or time.monotonic() > too_late:
                    raise Unusable("it is too large, or too slow")
                yield piece

        try:
            with self.get("file", url, cancellation, timeout=timeout) as response:
                yield bounded(response.body)
        except CONNECTION_ERRORS as error:
            raise LOST.error(where_kept(url), detail=repr(error)) from error

    def fetch_file(self, url: str, cancellation: Cancellation) -> bytes:
        """Fetch a file that a model made. Raise APIError."""
        try:
            with self.open_file(url, cancellation) as pieces:
                return b"".join(pieces)
        except APIError as error:
            cancellation.check()
            if not is_broken_off(error):
                raise
        with self.open_file(url, cancellation) as pieces:
            return b"".join(pieces)

    def fetch_start(self, url: str, cancellation: Cancellation) -> bytes:
        """Fetch what tells the type of a file; b"" if it can't be had, or not soon."""
        start, timeout = b"", self.timeouts.look
        with suppress(APIError), self.open_file(url, cancellation, timeout) as pieces:
            start = take_start(pieces)
        cancellation.check()
        return start

    def check_file_host(self, url: str) -> None:
        """Raise 502 for a link to anywhere but Replicate's files."""
        if not self.has_file(url):
            host = quoted(LINK_HOST.sub(r"\1", url))
            raise LOST.error(f"The model says that it is at {host}, not at Replicate.")

    def has_file(self, url: str) -> bool:
        """Whether a file is in its URL, or where the files of models are."""
        if DATA_URL.match(url):
            return read_data_url(url) is not None
        is_link = url.isascii() and LINK.fullmatch(url)
        return bool(is_link) and self.is_trusted(url, FILE_HOST)

    def is_trusted(self, url: str, hosts: re.Pattern[str]) -> bool:
        """Whether a URL is at our API's origin, or by https at one of these hosts."""
        with suppress(ValueError):
            scheme, host, port = origin_of(urlsplit(url))
            is_https = (scheme, port) == ("https", 443)
            is_theirs = is_https and bool(hosts.fullmatch(host))
            is_ours = (scheme, host, port) == origin_of(self.base)
            return (is_ours or is_theirs) and "@" not in urlsplit(url).netloc
        return False


def origin_of(url: SplitResult) -> tuple[str, str, int | None]:
    """Scheme, host and port. Raise ValueError for a port that is none."""
    return url.scheme, url.hostname or "", url.port or PORTS.get(url.scheme)


def sizes(values: Json) -> str:
    """The names of values, each with the length of its JSON, for the log."""
    rows = (row for row in values.items() if row[1] not in (None, ""))
    pairs = ((re.sub(r"\W", "?", name)[:40], compact(each)) for name, each in rows)
    return ",".join(f"{name}:{len(text)}" for name, text in pairs)


def parse_object(response: Any, needs: str = "") -> Json:
    try:
        body = response.json()
    except (ValueError, RecursionError) as error:
        raise BadResponse(repr(error)) from error
    if not isinstance(body, dict) or (needs and not body.get(needs)):
        raise BadResponse(f"no object with {needs!r} in it")
    return body


def parse_prediction(record: Json) -> Json:
    """A prediction's record whose fields have their types, whatever was in them."""
    for name, kind in RECORD_TYPES.items():
        if not isinstance(record.get(name), kind):
            record[name] = kind()
    return record


def refusal(
    error: APIStatusError,
    row: Refusal,
    prediction_input: PredictionInput | None,
    secret: str,
) -> APIError:
    status, body = error.status_code, as_object(error.body)
    detail = str(body.get("detail") or body.get("title") or "").strip()
    invalid = body.get("invalid_fields")
    if status == 422 and not invalid and "version" in f"{body.get('title')} {detail}":
        status, row = 404, REFUSALS[404]
    if status == 429 and (seconds := retry_after(error, body, detail)):
        row = row._replace(headers={"retry-after": seconds})
    why = f"Replicate says: {detail}" if detail else f"Replicate's status was {status}."
    param = invalid_param(invalid, prediction_input) if status == 422 else None
    return row.error(why.replace(secret, "…"), param)


def invalid_param(invalid: Any, prediction_input: PredictionInput | None) -> str | None:
    """OpenAI's name of the first input that Replicate refused."""
    with suppress(LookupError, TypeError, AttributeError):
        name = str(invalid[0]["field"]).removeprefix("input.")
        return prediction_input.names.get(name, name) if prediction_input else name
    return None


def retry_after(error: APIStatusError, body: Json, detail: str) -> str | None:
    """Seconds to wait, wherever they are given: Replicate has used all four places."""
    headers = error.response.headers
    matches = (re.search(pattern, detail) for pattern in RETRY_DELAYS)
    places = (
        headers.get("retry-after"),
        body.get("retry_after"),
        next((match[1] for match in matches if match), None),
        headers.get("ratelimit-reset"),
    )
    return next((str(p) for p in places if re.fullmatch(r"\d{1,6}", str(p))), None)


# By the text of a failed prediction's error (Replicate's docs, "Error codes"); the
# first that matches counts.
FAILURES = {
    r"\(E003\)|\(E004\)|\(code: PA\)|\(E98\d\d\)": Refusal(
        503, "upstream_unavailable", "Replicate could not run this now.", RETRY
    ),
    r"\(E005\)|(?i:nsfw)": Refusal(
        400, "content_policy_violation", "The model refused this content."
    ),
    r"(?i)context (length|window|size)|\btoo long\b|too many tokens": Refusal(
        400, "context_length_exceeded", "This is too long for the model."
    ),
    r"": Refusal(502, "prediction_failed", "The prediction failed.", NO_RETRY),
}


def failure(text: str, secret: str) -> APIError:
    row = next(row for pattern, row in FAILURES.items() if re.search(pattern, text))
    return row.error(f"The model says: {text}".replace(secret, "…") if text else "")


# How models name a count in their metrics, and in a line of their logs.
COUNTS = {
    "prompt_tokens": ("input_token_count", r"Input token count: (\d{1,12})\b"),
    "completion_tokens": ("output_token_count", r"Output token count: (\d{1,12})\b"),
    "reasoning_tokens": ("", r"Reasoning tokens: (\d{1,12})\b"),
}


def read_usage(record: Json) -> Usage:
    """From the metrics, else from the lines that some models log."""
    counts: dict[str, int] = {}
    for name, (metric, line) in COUNTS.items():
        count = record["metrics"].get(metric)
        if isinstance(count, (int, float)) and 0 <= count < 1e12:
            counts[name] = int(count)
        elif logged := re.findall(line, record["logs"]):
            counts[name] = int(logged[-1])
    prompt, completion, reasoning = map(counts.get, COUNTS)
    return Usage(prompt, completion, reasoning or 0)


def predict_seconds(record: Json) -> float:
    """How long the model ran, 0 if Replicate does not tell."""
    seconds = record["metrics"].get("predict_time")
    return seconds if is_number(seconds) and 0 <= seconds < 1e9 else 0


def image_count(record: Json) -> float:
    count, output = record["metrics"].get("image_count"), record.get("output")
    if is_number(count) and 0 <= count < 1e6:
        return float(count)
    return len(output) if isinstance(output, list) else bool(output)


def finish_reason(usage: Usage, limit: int | None) -> str:
    """By a true count: nothing else tells whether a limit was reached."""
    count = usage.completion_tokens
    return "length" if limit and count is not None and count >= limit else "stop"


def output_text(output: Any) -> str:
    """The text in an output: a list of strings, a string, an object with text in it."""
    if output is None or isinstance(output, str):
        return output or ""
    if isinstance(output, list):
        texts = [
            each if isinstance(each, str) else output_text(each) for each in output
        ]
        return "".join(texts)
    if isinstance(output, dict):
        return object_text(output)
    return json.dumps(output, ensure_ascii=False)


def object_text(output: Json) -> str:
    """Its text or its JSON, and its tool calls as text; else all of it."""
    named = sorted(output.keys() & TEXT_IN_OBJECT)
    text = output_text(output[named[0]]) if named else ""
    texts = [text or output_text(output.get("json_output")), *calls_as_text(output)]
    if named or any(texts):
        return "\n".join(filter(None, texts))
    return json.dumps(output, ensure_ascii=False)


def calls_as_text(output: Json) -> Iterator[str]:
    """The calls that an object has, or the one that it is (OpenAI's Responses API)."""
    is_call = output.get("type") == "function_call"
    for item in [output] if is_call else as_list(output.get("tool_calls")):
        call = as_object(as_object(item).get("function", item))
        if isinstance(name := call.get("name"), str):
            arguments = call.get("arguments") or {}
            if isinstance(arguments, str):
                with suppress(ValueError, RecursionError):
                    arguments = json.loads(arguments)
            text = json.dumps({"name": name, "arguments": arguments})
            text = text.replace("</", r"<\/")  # the same in JSON
            yield f"<tool_call>{text}</tool_call>"


def remainder(output: str, delivered: str) -> str | None:
    """What follows in the output after what was delivered; None if they differ.

    A carriage return can't travel in an event stream: there it is a line's end,
    or is lost with what is left of its line.
    """
    if not output:
        return ""
    for text in (output, output.replace("\r\n", "\n").replace("\r", "\n")):
        if text.startswith(delivered):
            return text[len(delivered) :]
    at = 0
    for character in delivered.replace("\n", ""):
        while output[at : at + 1] in ("\r", "\n"):
            at += 1
        if output[at : at + 1] != character:
            return None
        at += 1
    return output[at:]


# -- Uploads -------------------------------------------------------------------
#
# Replicate takes little data in an input: what is large in it goes into Replicate's
# files first, and a link takes its place.


INLINE_DATA = 256 * 1024  # bytes of data: URLs in an input, as Replicate advises
UPLOADS_AT_ONCE = 8  # of one request


class UploadCache:
    """The links of contents that are in Replicate's files."""

    def __init__(self, upload: Callable[[File, Cancellation], str]) -> None:
        self.upload = upload
        self.keep = 1800.0  # seconds; Replicate keeps a file for an hour at least
        self.lock = threading.Lock()
        self.links: dict[bytes, tuple[str, float]] = {}  # by SHA-256: and until when

    def link_all(
        self, files: Collection[str | File], cancellation: Cancellation
    ) -> dict[str | File, str]:
        """Upload files, and data: URLs, side by side. The first error is raised."""
        threads = ThreadPoolExecutor(UPLOADS_AT_ONCE)
        try:
            links = threads.map(partial(self.link, cancellation), files)
            return dict(zip(files, links, strict=True))
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def link(self, cancellation: Cancellation, given: str | File) -> str:
        content = given.encode() if isinstance(given, str) else given.content
        key, now = sha256(content).digest(), time.monotonic()
        with self.lock:
            for old in [k for k, (_, expires) in self.links.items() if expires < now]:
                del self.links[old]
            if key in self.links:
                return self.links[key][0]
        file = read_data_url(given) if isinstance(given, str) else given
        if file is None:
            message = f"The data: URL that begins {quoted(given[:40])} can't be read."
            raise APIError(400, message, code="invalid_value")
        cancellation.check()
        link = self.upload(file, cancellation)
        with self.lock:
            self.links[key] = link, now + self.keep
        return link


def upload_large_files(
    prediction_input: PredictionInput,
    cache: UploadCache,
    cancellation: Cancellation,
    *,
    has_urls: bool = True,
) -> PredictionInput:
    """Replace the largest files of an input by links, so that the rest is small.

    Files that stay become data: URLs. With `has_urls`, any such URL but one in the
    prompt's text counts as a file too. Raise APIError.
    """
    input, prompt = prediction_input.input, prediction_input.prompt

    def size(given: str | File) -> int:
        return len(given) if isinstance(given, str) else len(given.content) * 4 // 3

    by_size = sorted(
        (
            leaf
            for leaf in leaves(input)
            if isinstance(leaf, (str, File))
            if isinstance(leaf, File)
            or (has_urls and DATA_URL.match(leaf) and leaf not in prompt)
        ),
        key=size,
    )
    sizes = zip(by_size, accumulate(map(size, by_size)), strict=True)
    large = {given for given, total in sizes if total > INLINE_DATA}
    small = {f: f.url for f in by_size if isinstance(f, File) and f not in large}
    rest = replace_leaves(input, small)
    check_size(replace_leaves(rest, dict.fromkeys(large, "")))
    if not (large or small):
        return prediction_input
    links = cache.link_all(large, cancellation) if large else {}
    return prediction_input._replace(input=replace_leaves(rest, links))


def leaves(value: Any) -> list[Any]:
    """All that is in an input, wherever it stands, and its names too."""
    found, values = [], [value]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values += [*value, *value.values()]
        elif isinstance(value, list):
            values += value
        else:
            found.append(value)
    return found


def replace_leaves(value: Any, others: Mapping[Any, str]) -> Any:
    if not others:
        return value
    if isinstance(value, dict):
        return {name: replace_leaves(each, others) for name, each in value.items()}
    if isinstance(value, list):
        return [replace_leaves(each, others) for each in value]
    return others.get(value, value) if isinstance(value, (str, File)) else value


def check_size(input: Json) -> None:
    """Encode it only if it can be too large: that takes 0.2 ms for 20 kB of text."""
    values = leaves(input)
    size = sum(len(v) for v in values if isinstance(v, str))  # at least
    if size <= MAX_INPUT_SIZE < 6 * size + 24 * len(values):
        size = len(json.dumps(input, ensure_ascii=False).encode())
    too_long = "This is more than Replicate takes (6 MiB). Send less of it."
    require(size <= MAX_INPUT_SIZE, too_long, code="context_length_exceeded")


# -- Predictions ---------------------------------------------------------------
#
# Each prediction is followed to its end, or cancelled.


TERMINAL = frozenset(("succeeded", "failed", "canceled", "aborted"))


MAX_TOKENS = 500  # of clients, for which something is kept …
MAX_TOKEN_ENTRIES = 20  # … and how many schemas for each


class Upstream:
    """Replicate as a source of predictions."""

    def __init__(
        self, api: ReplicateAPI, timeouts: Timeouts, root: Upstream | None = None
    ) -> None:
        self.api = api
        self.timeouts = timeouts
        self.root = root or self  # of one for a client's own token: that for ours
        self.for_token = lru_cache(MAX_TOKENS)(self.with_token)
        self.upload_cache = UploadCache(api.upload)
        self.schemas = SchemaCache(
            api.find_schema, api.find_release, limit=timeouts.schema
        )
        self.collections = BackgroundCache(
            "collection", api.find_collection, limit=timeouts.menu
        )
        if root:
            self.schemas.max_entries = MAX_TOKEN_ENTRIES
        self.changed = threading.Condition()
        self.running = 0  # requests with a prediction to create, follow or cancel

    def with_token(self, token: str) -> Upstream:
        """The same for a client's own token: they share connections, and no cache."""
        return Upstream(self.api.with_token(token), self.timeouts, root=self)

    def create(
        self,
        prediction_input: PredictionInput,
        cancellation: Cancellation,
        request_log: RequestLog,
        *,
        wait: bool,
    ) -> Prediction:
        """Return when Replicate has created it; `wait` for its whole output a little.

        A create is never broken off, as its prediction could not be cancelled. Raise
        APIError, or the cancellation's cause.
        """
        cancellation.check()
        record = self.api.create(prediction_input, wait)
        prediction = Prediction(
            self, prediction_input, cancellation, request_log, record, wait
        )
        request_log.predictions.append(prediction.id)
        if cancellation.cause:
            prediction.cancel()
        cancellation.check()
        return prediction

    @contextmanager
    def start(
        self,
        prediction_input: PredictionInput,
        cancellation: Cancellation,
        request_log: RequestLog,
        *,
        wait: bool,
    ) -> Iterator[Prediction]:
        """Create a prediction as `create` does; after, it is over or cancelled."""
        with self.counted():
            prediction = self.create(
                prediction_input, cancellation, request_log, wait=wait
            )
            try:
                yield prediction
            finally:
                prediction.cancel()

    def count(self, more: int) -> None:
        with self.root.changed:
            self.root.running += more
            self.root.changed.notify_all()

    @contextmanager
    def counted(self) -> Iterator[None]:
        self.count(1)
        try:
            yield
        finally:
            self.count(-1)

    def in_background(self, work: Callable[[], None]) -> None:
        """Work that nobody waits for but the end of the server, in `await_runs`."""

        def run() -> None:
            try:
                work()
            finally:
                self.count(-1)

        self.count(1)
        try:
            threading.Thread(target=run, daemon=True).start()
        except RuntimeError:  # there are too many threads
            run()

    def await_runs(self, seconds: float) -> None:
        """Wait for what nobody else waits for any more: cancels on their way."""
        with self.changed:
            self.changed.wait_for(lambda: not self.running, seconds)


@dataclass(eq=False)
class Prediction:
    """A prediction: its record as last fetched, and what was delivered of it."""

    upstream: Upstream
    prediction_input: PredictionInput
    cancellation: Cancellation
    request_log: RequestLog
    record: Json
    is_late: bool  # to its stream, which may have begun without us
    delivered: list[str] = field(default_factory=list)
    unseen_since: float | None = None  # since when its record can't be fetched
    stream_done: bool = False
    is_ended: bool = False  # nobody follows it any more
    cost: float | None = None  # in USD, once it is known

    def __post_init__(self) -> None:
        self.api, self.timeouts = self.upstream.api, self.upstream.timeouts
        self.id = str(self.record["id"])
        self.deadline = time.monotonic() + self.api.time_limit + self.timeouts.grace

    @property
    def is_over(self) -> bool:
        return self.record["status"] in TERMINAL

    @property
    def length(self) -> int:
        """How many characters were delivered."""
        return sum(map(len, self.delivered))

    @property
    def has_time(self) -> bool:
        return time.monotonic() < self.deadline

    @property
    def output(self) -> str:
        text = output_text(self.record.get("output"))
        return text.encode("utf-8", "replace").decode()  # half surrogate pairs are `?`

    @property
    def stream_url(self) -> str:
        """Where it streams text; "" if it does not, or not where the token may go."""
        url = str(self.record["urls"].get("stream") or "")
        is_text = "/v1/files/" not in url  # which is a file's bytes
        streams = self.prediction_input.model.config.supports_streaming
        return url if streams and is_text and self.api.is_trusted(url, API_HOST) else ""

    def events(self) -> Events:
        """Yield its Texts as they come, then Done. Raise APIError."""
        while not self.is_over and self.stream_url and self.has_time:
            if not (yield from self.follow_stream()):
                break
            self.is_late = True
            self.cancellation.sleep(self.timeouts.poll)
        streams = self.prediction_input.model.config.supports_streaming
        if streams:
            yield from self.rest()
        for _ in self.polls():
            if streams:
                yield from self.rest()
        yield from self.rest(at_end=True)
        yield self.end()

    def wait_until_done(self) -> Any:
        """Its output, when it has succeeded. Raise APIError."""
        for _ in self.polls():
            pass
        if (usage := self.end().usage) != Usage():
            self.request_log.usages.append(usage)
        return self.record.get("output")

    def polls(self) -> Iterator[None]:
        """Fetch its record until it is over or its time is up; yield each time."""
        pause = self.timeouts.after_done if self.stream_done else self.timeouts.poll
        while not self.is_over and self.has_time:
            self.cancellation.sleep(pause)
            pause = min(pause * 1.5, self.timeouts.poll_most)
            self.refresh()
            yield

    def follow_stream(self) -> Generator[Text, None, bool]:
        """Yield its stream's texts, those of one read as one; return whether to reopen.

        A stream that is opened again seems to begin at its start, but Replicate's docs
        do not say so. So it is opened again only while there is no text at all, neither
        delivered nor in the record; else the record alone says what is to come.
        """
        is_open = False
        try:
            with self.api.open_stream(self.stream_url, self.cancellation) as pieces:
                is_open = True
                for events in decode_events(pieces):
                    text, done = "", None
                    for kind, data in events:
                        if kind == "output":
                            text += data
                        elif kind == "done":
                            done = data
                            break
                    if text:
                        if self.is_late and not self.continues_with(text):
                            return False
                        yield self.deliver(text)
                    if done is not None:
                        if "reason" not in done:  # its record may lag, not for long
                            self.stream_done = True
                            self.deadline = time.monotonic() + self.timeouts.grace
                        self.refresh()  # while the stream's last bytes arrive
                        return False
                    if time.monotonic() > self.deadline:
                        break
        except (OSError, http.client.HTTPException) as error:
            if not is_open and not isinstance(error, TimeoutError):
                self.log_event("polled", repr(error))
                return False
            self.log_event("broken", repr(error))
        self.refresh()
        return not self.delivered and not self.output

    def continues_with(self, text: str) -> bool:
        """Whether a stream opened late says what the output has at this place.

        It may begin anywhere: what does not fit is dropped, and the record polled.
        """
        if not self.delivered and not self.find_output():
            return False
        known = self.output[self.length :][: len(text)]
        self.is_late = bool(known)
        return text.startswith(known)

    def find_output(self) -> bool:
        """Fetch its record, which may lag behind its stream, until it has output."""
        pause = self.timeouts.after_done
        while not self.output and pause < self.timeouts.poll:
            self.refresh()
            if not self.output:
                self.cancellation.sleep(pause)
            pause *= 2
        return bool(self.output)

    def refresh(self) -> None:
        """Fetch its record. A failure does no harm unless all fail, for long."""
        try:
            self.record = self.api.fetch_prediction(self.id, self.cancellation)
            self.unseen_since = None
        except APIError as error:
            self.cancellation.check()
            self.log_event("unseen", error.detail or error.code)
            now = time.monotonic()
            self.unseen_since = self.unseen_since or now
            if (
                now - self.unseen_since > self.timeouts.lost_after
                and not self.stream_done
            ):
                raise LOST.error(
                    f"It says no more of the prediction: {error}"
                ) from None

    def rest(self, *, at_end: bool = False) -> Iterator[Text]:
        """Yield what of its output was not delivered yet."""
        if isinstance(self.record.get("output"), dict) and not at_end:
            return  # while it runs, an object may become another
        text = remainder(self.output, "".join(self.delivered))
        if text is None and at_end:
            self.log_event("differs", "from its stream", logging.WARNING)
            if not self.stream_done:
                raise LOST.error(
                    "Its stream broke, and what it said is not the output."
                )
        if text:
            yield self.deliver(text)

    def deliver(self, text: str) -> Text:
        self.delivered.append(text)
        if self.request_log.first_text_at is None:
            self.request_log.first_text_at = time.monotonic()
        return Text(text)

    def end(self) -> Done:
        """How it ended. Raise APIError unless it succeeded."""
        status = self.record["status"]
        if status == "failed":
            raise failure(self.record["error"], self.api.token)
        if self.record.get("data_removed") and not self.delivered:
            raise failure("Its output was removed before it was seen.", self.api.token)
        if status != "succeeded" and not self.stream_done:
            raise APIError(
                504,
                "Replicate ended the prediction before it had finished. It may take "
                f"{self.api.time_limit} s at the most (PREDICTION_TIMEOUT).",
                code="prediction_timeout",
                headers=NO_RETRY,
            )
        usage = read_usage(self.record)
        return Done(finish_reason(usage, self.prediction_input.limit), usage)

    def charge(self, usage: Usage) -> float | None:
        """Tell its cost in USD, if its model has a price.

        What Replicate did not count is estimated. One that failed costs its time alone.
        """
        price = self.prediction_input.model.config.price
        if not price:
            return None
        seconds, began = predict_seconds(self.record), self.request_log.first_text_at
        if not self.is_over and began:  # it was cut short
            seconds = time.monotonic() - began
        values = self.prediction_input.input.values()
        texts = chain(values, *map(as_list, values))  # alone, or in lists
        strings = (text for text in texts if isinstance(text, str))
        characters = len(self.prediction_input.prompt) or sum(map(len, strings))
        asked, answered = usage.prompt_tokens, usage.completion_tokens
        if asked is None:
            asked = estimate_tokens(characters)
        if answered is None:
            answered = estimate_tokens(self.length)
        amounts = {
            "input": asked / 1e6,
            "output": answered / 1e6,
            "image": image_count(self.record),
            "character": characters,
        }
        if self.record["status"] in ("failed", "aborted"):
            amounts = {}
        amounts["second"] = seconds
        self.cost = sum(price[unit] * amounts.get(unit, 0) for unit in price)
        return self.cost

    def cancel(self) -> None:
        """Stop the bill unless it is over, in a thread of its own: nobody waits."""
        if self.is_ended:
            return
        self.is_ended = True
        if self.cost is None and self.prediction_input.model.config.price:
            self.charge(read_usage(self.record))
        if self.cost is not None:
            self.request_log.costs.append(self.cost)
        status = "succeeded" if self.stream_done else "canceled"
        if self.is_over:
            status = self.record["status"]
        elif not self.stream_done:
            self.upstream.in_background(self.send_cancel)
        metrics = self.api.metrics
        model = metrics.model_label(self.prediction_input.model.ref, True)
        metrics.add(1, "predictions_total", model, status)
        metrics.add(predict_seconds(self.record), "predict_seconds_total", model)
        if log.isEnabledFor(logging.DEBUG):
            texts = {"texts": len(self.delivered), "characters": self.length}
            log.debug(LogRow(prediction=self.id, event="ended", state=status, **texts))

    def send_cancel(self) -> None:
        """A cancel that fails is tried once more."""
        for pause in (0.5, 0):
            try:
                self.api.cancel(self.id)
                break
            except APIError as error:
                self.log_event(
                    "uncancelled", error.detail or error.code, logging.WARNING
                )
                time.sleep(pause)

    def log_event(self, event: str, why: object, level: int = logging.INFO) -> None:
        log.log(level, LogRow(prediction=self.id, event=event, why=why))


# ==== 5. TEXT =================================================================


# -- Stop and reasoning --------------------------------------------------------
#
# Each filter is a generator from events to events. Reasoning models write what they
# think between two tags, before the answer; the chat templates of some have written
# the first tag themselves. It becomes Reasoning events, for the field
# reasoning_content. To add a pair of tags: a row in REASONING_TAGS.


LONGEST_SPACE = 200  # characters that wait for what may follow them


def stop_at(events: Events, stops: Sequence[str], called: str = "stop") -> Events:
    """End before the stop string that is complete first, however the text is cut."""
    held, reason = "", "stop"
    for event in events:
        if isinstance(event, Text):
            held += event.text
            found = [(held.find(s) + len(s), held.find(s)) for s in stops if s in held]
            if found:
                _, start = min(found)
                if start:
                    yield Text(held[:start])
                yield Done(reason)
                return
            safe = len(held) - overhang(held, stops)
            if safe:
                yield Text(held[:safe])
            held = held[safe:]
            continue
        if held and isinstance(event, (ToolCall, Done)):
            yield Text(held)
            held = ""
        reason = called if isinstance(event, ToolCall) else reason
        yield event


def overhang(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end may be the beginning of a stop string."""
    lengths = range(min(max(map(len, stops), default=0) - 1, len(text)), 0, -1)
    return next((n for n in lengths if any(s.startswith(text[-n:]) for s in stops)), 0)


def any_of(texts: Iterable[str]) -> str:
    """A pattern for one of some texts that are not empty."""
    return f"(?:{'|'.join(map(re.escape, filter(None, texts))) or '(?!)'})"


END_TOKENS = (
    "<|im_end|>",  # Qwen
    "<|eot_id|>",  # Llama 3
    "<|eom_id|>",
    "<|eot|>",  # Llama 4
    "<end_of_turn>",  # Gemma 3
    "<turn|>",  # Gemma 4
    "<eos>",
    "</s>",  # Mistral
    "<|end_of_text|>",  # Granite
    "<|endoftext|>",
    "<｜end▁of▁sentence｜>",  # DeepSeek
)


def drop_end_token(events: Events) -> Events:
    """Leave out the token that ends a turn; in the middle of a text it is text."""
    held = ""
    for event in events:
        if isinstance(event, Text) and (held or "<" in event.text):
            text = held + event.text
            last = text[text.rfind("<") :]
            is_begun = any(token.startswith(last) for token in END_TOKENS)
            is_ended = len(last) < LONGEST_SPACE and last.rstrip() in END_TOKENS
            held = last if is_begun or is_ended else ""
            event = Text(text.removesuffix(held))
            if not event.text:
                continue
        elif held:
            if not isinstance(event, Done) or held.rstrip() not in END_TOKENS:
                yield Text(held)
            held = ""
        yield event


def cut_after(events: Events, tokens: int) -> Events:
    """End after so many tokens, by estimate: for models that refuse so low a limit."""
    room = tokens * CHARACTERS_PER_TOKEN
    for event in events:
        if isinstance(event, Text):
            if len(event.text) > room:
                yield Text(event.text[:room])
                yield Done("length")
                return
            room -= len(event.text)
        yield event


def echo(events: Events, prompt: str) -> Events:
    """Put the prompt before the answer, once there is one."""
    for event in events:
        if prompt:
            yield Text(prompt)
            prompt = ""
        yield event


def with_usage(events: Events, prediction: Prediction) -> Events:
    """Estimate the tokens that Replicate did not count; add all to the log."""
    length = reasoning = 0
    for event in events:
        if isinstance(event, (Text, Arguments)):
            length += len(event.text)
        elif isinstance(event, Reasoning):
            reasoning += len(event.text)
        elif isinstance(event, Done):
            asked, answered, reasoned, *_ = event.usage
            is_estimate = asked is None or answered is None
            if asked is None:
                asked = estimate_tokens(len(prediction.prediction_input.prompt))
            if answered is None:
                answered = estimate_tokens(length + reasoning)
            reasoned = reasoned or min(estimate_tokens(reasoning), answered)
            usage = Usage(asked, answered, reasoned, is_estimate)
            usage = usage._replace(cost=prediction.charge(usage))
            prediction.request_log.usages.append(usage)
            event = Done(event.finish_reason, usage)
        yield event


THINK_END = "</think>"
REASONING_TAGS = {
    "<think>": THINK_END,
    THINK_END: "",  # the first tag was lost, and nothing was thought
    "[THINK]": "[/THINK]",  # Magistral
    "<|channel>thought": "<channel|>",  # Gemma 4 …
    "<thought>": "</thought>",  # … behind Gemini's API
    "<thinking>": "</thinking>",
    "<reasoning>": "</reasoning>",
    "<mm:think>": "</mm:think>",  # MiniMax M3
    "<|inner_prefix|>": "<|inner_suffix|>",  # Apertus
}
CALLS_BEGIN = (  # some models forget to end their reasoning before a call
    "\n<tool_call>\n",  # Qwen
    "<|tool_calls_section_begin|>",  # Kimi
    "<｜tool▁calls▁begin｜>",  # DeepSeek
)

# gpt-oss writes in channels: OpenAI's harmony format.
HARMONY = ("<|start|>assistant", "<|channel|>")
HARMONY_MARKS = (*HARMONY, "<|end|>", "<|return|>", "<|call|>")
HARMONY_MARK = re.compile(any_of(HARMONY_MARKS))
HARMONY_HEADER = re.compile(
    r"\s{0,20}(?:<\|start\|>assistant[^<]{0,100})?<\|channel\|>(?P<channel>\w{1,20})"
    r"[^<]{0,100}(?:<\|constrain\|>\w{0,20})?<\|message\|>"
)
LONGEST_HEADER = 400  # characters


def split_reasoning(
    events: Events, starts_inside: bool, holds: bool = False, may_call: bool = False
) -> Events:
    """Tell reasoning from the answer. If the model `may_call`, a call ends it too.

    `starts_inside`: an answer without the first tag begins with reasoning. Where no
    tag ends that, it was the answer after all, and is given as text: `holds` waits to
    see that, without it the text has been given as reasoning before."""
    state, held, end_tag = "before", "", THINK_END
    pieces: list[str] = []
    for event in events:
        if isinstance(event, Text):
            held += event.text
            if state == "before":
                begun = held.lstrip()
                is_far = len(held) - len(begun) > LONGEST_SPACE
                tags = () if is_far else (*REASONING_TAGS, *HARMONY)
                tag = next(filter(begun.startswith, tags), "")
                if tag in HARMONY:
                    return (yield from split_harmony(begun, events))
                if tag:
                    held, end_tag = begun[len(tag) :], REASONING_TAGS[tag]
                    state = "inside" if end_tag else "between"
                    starts_inside = holds = False
                elif any(tag.startswith(begun) for tag in tags):
                    continue
                else:
                    state = "inside" if starts_inside else "after"
            if state == "inside":
                ends = (end_tag, *CALLS_BEGIN) if may_call else (end_tag,)
                found = [(held.find(end), end) for end in ends if end in held]
                at, tag = min(found, default=(len(held) - overhang(held, ends), ""))
                piece, rest = held[:at], held[at:]
                if tag == end_tag:
                    rest = rest.removeprefix(tag)
                if pieces or piece.strip() or len(piece) > LONGEST_SPACE:
                    pieces.append(piece)
                    if holds and tag:
                        yield Reasoning("".join(pieces))
                    elif piece and not holds:
                        yield Reasoning(piece)
                elif not tag:
                    continue  # space alone is no reasoning
                held, state = rest, "between" if tag else state
            if state == "between":  # the lines there belong to neither
                held = held.lstrip()
                state = "after" if held else state
            if state == "after":
                yield Text(held)
                break
            continue
        if isinstance(event, Done):
            is_answer = starts_inside and event.finish_reason != "length"
            piece = "".join(pieces) + held if holds else held
            if state == "inside" and not (holds and is_answer) and piece.strip():
                yield Reasoning(piece)
            if state == "inside" and is_answer:
                yield Text("".join(pieces) + held)
            elif state != "inside" and held:
                yield Text(held)
        yield event
    yield from events


def split_harmony(held: str, events: Events) -> Events:
    """Tell the channels apart: reasoning is in `analysis`, the answer in the others.

    A message to a tool is left as it is, for `extract_tool_calls`."""
    channel = ""
    for event in chain((Text(""),), events):
        if isinstance(event, Text):
            held, at = held + event.text, 0
            while True:
                if not channel:
                    header = HARMONY_HEADER.match(held, at)
                    if not header:
                        break
                    channel = "tool" if " to=" in header[0] else header["channel"]
                    at = header.start() if channel == "tool" else header.end()
                    start = header.end()
                else:
                    start = at
                mark = HARMONY_MARK.search(held, start)
                if not mark:
                    end = max(start, len(held) - overhang(held[start:], HARMONY_MARKS))
                else:
                    keeps_mark = channel == "tool" and mark[0] == "<|call|>"
                    end = mark.end() if keeps_mark else mark.start()
                if text := held[at:end]:
                    yield Reasoning(text) if channel == "analysis" else Text(text)
                at = end
                if not mark:
                    break
                at = mark.start() if mark[0] in HARMONY else mark.end()
                channel = ""
            held = held[at:]
            if not channel and len(held) > LONGEST_HEADER:  # it is another format
                yield Text(held)
                yield from events
                return
        else:
            if isinstance(event, Done) and held.strip():
                yield Text(held)
            yield event


# -- JSON Schema ---------------------------------------------------------------
#
# As much of JSON Schema as says what programs want of an answer. What a keyword says
# is checked if the keyword and the form of it are known here; all else is shown to
# the model and not checked: nothing that OpenAI accepts is refused for its schema.
# A schema is a stranger's program, so checking a value takes so many steps at most.


MOST_STEPS = 100_000  # in checking a value: at most about a second
LONGEST_MESSAGE = 500  # characters
TYPES: dict[str, Callable[[Any], bool]] = {
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: is_number(value) and value == value // 1,
    "number": is_number,
    "boolean": lambda value: isinstance(value, bool),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
    "null": lambda value: value is None,
}
ARTICLES = {"integer": "an", "array": "an", "object": "an"}
BOUNDS: dict[str, tuple[tuple[type, ...], Callable[[Any, Any], bool], str]] = {
    "minimum": (NUMBER, ge, "be at least {}"),
    "maximum": (NUMBER, le, "be at most {}"),
    "exclusiveMinimum": (NUMBER, gt, "be above {}"),
    "exclusiveMaximum": (NUMBER, lt, "be below {}"),
    "minLength": (STRING, ge, "have at least {} characters"),
    "maxLength": (STRING, le, "have at most {} characters"),
    "minItems": (ARRAY, ge, "have at least {} items"),
    "maxItems": (ARRAY, le, "have at most {} items"),
    "minProperties": (OBJECT, ge, "have at least {} properties"),
    "maxProperties": (OBJECT, le, "have at most {} properties"),
}


class TooManySteps(Exception):
    pass


def validate(value: Any, schema: Any, path: str = "$") -> str:
    """Say in a sentence where a value breaks a schema.

    "" if it does not, or if that would take too long to find out."""
    try:
        message = Validation(schema).error(value, schema, path)
    except (TooManySteps, RecursionError):
        return ""
    cut = message[:LONGEST_MESSAGE]
    return message if message == cut else f"{cut}…"


class Validation:
    """One value against one schema, in a bounded number of steps."""

    def __init__(self, root: Any) -> None:
        self.root = root  # what references refer to
        self.steps = 0

    def spend(self, steps: int = 1) -> None:
        self.steps += steps
        if self.steps > MOST_STEPS:
            raise TooManySteps

    def error(self, value: Any, schema: Any, path: str) -> str:
        """The first error, or "". Schemas that are no schemas allow anything."""
        self.spend()
        if schema is False:
            return f"{path} is not allowed."
        if not isinstance(schema, dict):
            return ""
        if value is None and schema.get("nullable") is True:  # as OpenAPI has it
            return ""
        self.spend(len(schema) // 10)
        for keyword in schema:
            if message := self.keyword_error(keyword, value, schema, path):
                self.spend(len(message) // 100)
                return message
        return ""

    def keyword_error(self, keyword: str, value: Any, schema: Json, path: str) -> str:
        given = schema[keyword]
        if keyword in BOUNDS:
            kinds, holds, must = BOUNDS[keyword]
            if type(value) in kinds and is_number(given):
                size = value if kinds is NUMBER else len(value)
                if not holds(size, given):
                    return f"{path} must {must.format(given)}."
        elif keyword == "type":
            names = [given] if isinstance(given, str) else as_list(given)
            self.spend(len(names) // 10)
            are_known = all(isinstance(name, str) and name in TYPES for name in names)
            fits = not are_known or any(TYPES[name](value) for name in names)
            if names and not fits:
                wanted = " or ".join(map(with_article, names))
                return f"{path} must be {wanted}, not {KINDS[type(value)]}."
        elif keyword == "enum" and isinstance(given, list):
            if not any(self.are_equal(value, choice) for choice in given):
                return f"{path} must be one of {compact(given)}."
        elif keyword == "const":
            if not self.are_equal(value, given):
                return f"{path} must be {compact(given)}."
        elif keyword == "$ref":
            return self.error(value, self.target(given), path)
        elif keyword == "allOf":
            return self.first_error((value, one, path) for one in as_list(given))
        elif keyword in ("anyOf", "oneOf") and as_list(given):
            messages: dict[str, None] = {}
            for one in given:
                if not (message := self.error(value, one, path)):
                    return ""
                messages[message] = None
            return " Or: ".join(messages)
        elif isinstance(value, dict):
            return self.object_error(keyword, value, schema, path)
        elif isinstance(value, list) and keyword in ("items", "prefixItems"):
            first = as_list(schema.get("prefixItems"))
            is_first = keyword == "prefixItems"
            return self.first_error(
                (item, first[at] if is_first else given, inside(path, at))
                for at, item in enumerate(value)
                if (at < len(first)) == is_first
            )
        return ""

    def object_error(self, keyword: str, value: Json, schema: Json, path: str) -> str:
        given, known = schema[keyword], as_object(schema.get("properties"))
        self.spend(len(value) // 10)
        if keyword == "required":
            for name in as_list(given):
                self.spend()
                if isinstance(name, str) and name not in value:
                    return f"{path} lacks the property {compact(name)}."
        is_known = keyword == "properties"
        is_other = (
            keyword == "additionalProperties" and "patternProperties" not in schema
        )
        if not is_known and not is_other:
            return ""
        return self.first_error(
            (value[name], known.get(name, given), inside(path, name))
            for name in value
            if (name in known) == is_known
        )

    def first_error(self, checks: Iterable[tuple[Any, Any, str]]) -> str:
        return next(filter(None, (self.error(*check) for check in checks)), "")

    def are_equal(self, a: Any, b: Any) -> bool:
        """As JSON has it: 1 is 1.0, but true is not 1."""
        self.spend()
        if isinstance(a, list) and isinstance(b, list):
            return len(a) == len(b) and all(map(self.are_equal, a, b))
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(self.are_equal(a[k], b[k]) for k in a)
        return a == b and isinstance(a, bool) == isinstance(b, bool)

    def target(self, reference: Any) -> Any:
        """The schema that a JSON pointer in a URL leads to (RFC 6901, 6), else {}."""
        if not isinstance(reference, str) or not re.match("#(/|$)", reference):
            return {}
        self.spend(len(reference) // 10)
        target = self.root
        for key in unquote(reference).split("/")[1:]:
            key = key.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and re.fullmatch("[0-9]{1,6}", key):
                target = target[int(key)] if int(key) < len(target) else {}
            else:
                target = as_object(target).get(key, {})
        return target


def possible_types(schema: Any, root: Any) -> list[str]:
    """The types that values of a schema may have, as far as it says so."""
    within = Validation(root)
    try:
        return [type for type in TYPES if may_be(type, schema, within)]
    except (TooManySteps, RecursionError):
        return [*TYPES]


def may_be(type: str, schema: Any, within: Validation) -> bool:
    within.spend()
    schema = as_object(schema)
    given = schema.get("type", "object" if "properties" in schema else None)
    names = [name for name in [given, *as_list(given)] if name in [*TYPES]]
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    choices = [as_list(schema[k]) for k in ("anyOf", "oneOf") if as_list(schema.get(k))]
    all_of = as_list(schema.get("allOf"))
    if "$ref" in schema:
        all_of = [*all_of, within.target(schema["$ref"])]
    return (
        (not names or type in names)
        and (not isinstance(values, list) or any(map(TYPES[type], values)))
        and all(may_be(type, one, within) for one in all_of)
        and all(any(may_be(type, one, within) for one in each) for each in choices)
    )


def with_article(name: str) -> str:
    return name if name == "null" else f"{ARTICLES.get(name, 'a')} {name}"


def inside(path: str, key: str | int) -> str:
    """The path one level down; a long one is not made longer."""
    if len(path) > LONGEST_MESSAGE:
        return path
    is_plain = isinstance(key, str) and key.isidentifier()
    return f"{path}.{key}" if is_plain else f"{path}[{json.dumps(key)}]"


# -- JSON ----------------------------------------------------------------------
#
# JSON as models write it, for tool calls and for answers. What is JSON is copied as
# it stands. What can mean only one thing is repaired: other quotes, Python's words,
# comments, a comma too many, a bracket missing. Where quotes don't balance, it is no
# JSON: after a string comes a comma, a colon, a bracket or the end.
# An answer that is to be JSON is asked for in the model's own way if it has one, else
# in the system text; then the value is taken out of what surrounds it.


CLOSERS = {"{": "}", "[": "]", "(": ")"}
QUOTES = {  # by their first character
    '"': '"',
    "'": "'",
    "`": "`",
    "\\": '\\"',  # JSON that is escaped once more
    "<": '<|"|>',  # Gemma 4
}
DEEPEST_JSON = 200  # brackets
LONGEST_WORD = 1000  # characters, or what may have to wait for its end
SPACE_OR_COMMENT = re.compile(
    r"[ \t\r\n]+|//[^\n]{0,900}(?=\n)|/\*.{0,900}?\*/", re.DOTALL
)
SPACE_OR_SLASH = ("", " ", "\n", "\r", "\t", "/")
HALF_COMMENT = re.compile(r"/(?:/[^\n]*|\*.*)?\Z", re.DOTALL)
LITERAL = re.compile(
    r"true|false|null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?", re.ASCII
)
WORD = re.compile(rf"""(?:(?!//|/\*)[^,:{{}}\[\]"'`<\n]){{0,{LONGEST_WORD}}}""")
NO_NUMBER = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)
PYTHON_LITERALS = {"True": "true", "False": "false", "None": "null"}
PYTHON_WORD = re.compile(rf"[\w.+-]{{0,{LONGEST_WORD}}}")
PYTHON_QUOTES = re.compile(r"\"{1,3}|'{1,3}|`")
KEYWORD = re.compile(r"(?:\w{1,100}\s{0,100}(?:=\s{0,100})?)?")
ESCAPE = r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})'
UNQUOTED = {q: re.compile(rf'(?:[^\\\x00-\x1f"{q}]+|{ESCAPE})+') for q in "\"'`<"}
UNQUOTED["\\"] = re.compile(
    r'(?:[^\\\x00-\x1f"]+|\\\\(?:[/bfnrt]|u[0-9a-fA-F]{4}|\\["\\]))+'
)
HALF_ESCAPE = re.compile(r"\\{1,3}(?:u[0-9a-fA-F]{0,3})?\Z")
END = re.compile(r"`|<[|｜]|</(?:tool_call|function|invoke|json)")
HALF_END = re.compile(r"</?[a-z_]{0,8}\Z")

Reading = Generator[None, str, None]  # waits for text


class JSONReader:
    """Reads one object or array that comes in pieces, whatever is wrong with it.

    What is JSON as it stands is given at once; from the first repair on, nothing is
    until the value ends. It may be the arguments of a `tool`, and in Python."""

    def __init__(
        self,
        keeps_space: bool = False,
        tool: Tool | None = None,
        is_python: bool = False,
    ) -> None:
        self.keeps_space = keeps_space  # between tokens
        self.tool = tool
        self.is_python = is_python
        self.names = iter(properties_of(tool))
        self.raw: list[str] = []  # all that came
        self.text, self.at = "", 0  # what is looked at, and how far it was read
        self.passed = 0  # characters before `text`
        self.ready: list[str] = []  # JSON as it was written
        self.repaired: list[str] = []  # what follows from the first repair on
        self.sound = 0  # characters before the end of `ready`
        self.closers: list[str] = []  # of what is open
        self.is_strict = True  # nothing had to be repaired
        self.is_over = False  # nothing more comes
        self.is_done = self.is_broken = False
        self.rest = ""  # what follows the value; what was not given if it is broken
        self.reading = self.container("(") if self.is_python else self.first()
        next(self.reading)

    def feed(self, text: str, is_over: bool = False) -> str:
        """Take more text; give what is ready."""
        self.raw.append(text)
        self.is_over = is_over
        try:
            self.reading.send(text)
        except StopIteration:
            self.is_done = True
            self.ready += self.repaired
            self.sound = self.passed + self.at
        except ValueError:
            self.is_broken = True
        if self.is_done or self.is_broken:
            self.rest = "".join(self.raw)[self.sound :]
        ready = "".join(self.ready)
        self.ready.clear()
        return ready

    def finish(self, done: Done) -> str:
        """Give the rest: nothing more comes, and only brackets may be missing."""
        if done.finish_reason == "length":
            self.is_broken, self.rest = True, "".join(self.raw)[self.sound :]
            return ""
        return self.feed("", is_over=True)

    def more(self) -> Reading:
        if self.is_over or len(self.text) - self.at > LONGEST_WORD:
            raise ValueError("no end")
        self.passed += self.at
        self.text, self.at = self.text[self.at :] + (yield), 0

    def write(self, text: str) -> None:
        if self.is_strict:
            self.ready.append(text)
            self.sound = self.passed + self.at
        else:
            self.repaired.append(text)

    def next(self) -> str:
        return self.text[self.at : self.at + 1]

    def token(self, pattern: re.Pattern[str]) -> Generator[None, str, str]:
        """What matches here, once it is sure where that ends."""
        while True:
            found = pattern.match(self.text, self.at)
            if found and found.end() < len(self.text):
                self.at = found.end()
                return found[0]
            yield from self.more()

    def space(self) -> Generator[None, str, str]:
        """The space that comes next, without the comments in it."""
        space = ""
        while (c := self.next()) in SPACE_OR_SLASH:
            if found := SPACE_OR_COMMENT.match(self.text, self.at):
                self.at = found.end()
                self.is_strict &= c != "/"
                space += found[0] if self.keeps_space and c != "/" else ""
            elif HALF_COMMENT.match(self.text, self.at) if c else not self.is_over:
                yield from self.more()
            else:
                break
        return space

    def first(self) -> Reading:
        while not self.text:
            yield from self.more()
        yield from self.value()

    def value(self, key: str = "") -> Generator[None, str, object]:
        """Read what begins here; `key` is JSON."""
        c = self.next()
        if c in QUOTES:
            is_argument = self.tool and len(self.closers) == 1
            name = parsed(key) if is_argument and key else None
            if name is not None and "string" not in types_of(self.tool, name):
                return self.typed_string(name)
            return self.string()
        if c not in ("{", "["):
            return self.word()
        self.at += 1
        return self.container(c)

    def typed_string(self, name: str) -> Reading:
        """Read a string that stands for a value of another type."""
        self.is_strict = False
        start = len(self.repaired)
        text = parsed((yield from self.string()))
        self.repaired[start:] = [compact(typed(text, self.tool, name))]

    def container(self, opener: str) -> Reading:
        """Read what follows an opening bracket."""
        self.closers.append(CLOSERS[opener])
        if len(self.closers) > DEEPEST_JSON:
            raise ValueError("too deep")
        self.write("[" if opener == "[" else "{")
        comma = ""  # with the space after it: it waits for an item
        last = ""  # the end of the last item
        doubled = 0  # braces: {{ for {
        while True:
            space = yield from self.space()
            if comma:
                comma += space
            elif space:
                self.write(space)
            while (c := self.next()) == "<" and HALF_END.match(self.text, self.at):
                yield from self.more()
            is_after_item = last and not comma
            if c in self.closers and not (doubled and c == "}"):
                break  # it closes what is open in it as well
            if is_after_item and (not c or END.match(self.text, self.at)):
                break
            if is_after_item and c == ",":
                comma = c
                self.at += 1
            elif c in (",", "}", "]") or (c == opener == "{" and not last):
                doubled = max(0, doubled + (c == "{") - (c == "}"))
                self.is_strict = False
                self.at += 1
            else:
                if is_after_item:
                    if last == '"' or c not in (*QUOTES, "{", "["):
                        raise ValueError("no comma")
                    self.is_strict = False
                    comma = ","
                if comma:
                    self.write(comma if self.keeps_space else comma[:1])
                    comma = ""
                if opener == "[":
                    yield from self.value()
                elif key := (yield from self.key(opener)):
                    yield from self.value(key)
                last = (self.repaired or self.ready)[-1][-1:]
        self.is_strict &= not comma and c == self.closers[-1]
        self.at += c == self.closers.pop()
        self.write(comma[1:] if self.keeps_space else "")
        self.write("]" if opener == "[" else "}")

    def key(self, opener: str) -> Generator[None, str, str]:
        """Read a key, and give it as JSON; "" if no value follows."""
        if opener == "(":
            keyword = yield from self.token(KEYWORD)
            if "=" not in keyword:
                self.at -= len(keyword)
                keyword = next(self.names, "")
            if not keyword:
                raise ValueError("too many values")
            key = compact(keyword.rstrip("= \t\r\n"))
            self.write(f"{key}:")
            return key
        lacks = ":null" if self.next() in QUOTES else ""
        key = yield from (self.string() if lacks else self.word(is_key=True))
        self.write((yield from self.space()))
        if has_colon := self.next() == ":":
            self.at += 1
            self.write(":")
            self.write((yield from self.space()))
            lacks = "null"
        if lacks and self.next() in (",", "}", "]"):
            self.is_strict = False
            self.write(lacks)
            return ""
        if not has_colon:
            raise ValueError("no colon")
        return key

    def word(self, is_key: bool = False) -> Generator[None, str, str]:
        word = yield from self.token(PYTHON_WORD if self.is_python else WORD)
        token = word.rstrip()
        self.at -= len(word) - len(token)
        if not token or NO_NUMBER.fullmatch(token):
            raise ValueError("no value")
        if LITERAL.fullmatch(token) and not is_key:
            if token[-1].isdigit():
                finite_float(token)
        elif self.is_python and token not in PYTHON_LITERALS:
            raise ValueError("no literal")
        else:
            self.is_strict = False
            token = (not is_key and PYTHON_LITERALS.get(token)) or compact(token)
        self.write(token)
        return token

    def string(self) -> Generator[None, str, str]:
        """Read a string, and give it as JSON."""
        quote = QUOTES[self.next()]
        if self.is_python and quote[0] in "\"'`":
            quote = yield from self.token(PYTHON_QUOTES)
        else:
            while not self.text.startswith(quote, self.at):
                if not quote.startswith(self.text[self.at :]):
                    raise ValueError("no quote")
                yield from self.more()
            self.at += len(quote)
        self.is_strict &= quote == '"'
        self.write('"')
        pieces = ['"']
        while quote not in ('""', "''"):
            if plain := UNQUOTED[quote[0]].match(self.text, self.at):
                self.at = plain.end()
                escaped = plain[0] if quote != '\\"' else json.loads(f'"{plain[0]}"')
                self.write(escaped)
                pieces.append(escaped)
                if self.at == len(self.text):
                    yield from self.more()
                    continue
            rest = self.text[self.at : self.at + 5]
            if rest.startswith(quote):
                self.at += len(quote)
                break
            if quote.startswith(rest) or HALF_ESCAPE.match(self.text, self.at):
                yield from self.more()
            else:  # an unknown escape stands for its backslash
                self.is_strict = False
                self.at += rest[:2] in ("\\'", "\\`")
                pieces.append(json.dumps(self.next())[1:-1])
                self.write(pieces[-1])
                self.at += 1
        self.write('"')
        return "".join((*pieces, '"'))


def types_of(tool: Tool | None, parameter: Any) -> list[str]:
    """The types that a parameter of a tool may have."""
    if not tool or not isinstance(parameter, str):
        return [*TYPES]
    return possible_types(properties_of(tool).get(parameter), tool.parameters)


def typed(text: str, tool: Tool | None, parameter: str) -> Any:
    """A value that is written as text, of a type that the tool asks for.

    It stays text if that may be one, or if it is no value of any other type."""
    types, word = types_of(tool, parameter), text.strip()
    if len(types) < len(TYPES):
        if "string" in types:
            return text
        word = PYTHON_LITERALS.get(word, word)
        if word[:1] in ("{", "["):
            reader = JSONReader()
            repaired = reader.feed(f"{word}\n", is_over=True)
            word = word if reader.rest.strip() else repaired
    value = parsed(word)
    is_json = value is not None or word == "null"
    return value if is_json and any(TYPES[type](value) for type in types) else text


def repair_json(text: str) -> str:
    """The object in a text as JSON; "" if there is none that could be repaired."""
    reader, (_, brace, rest) = JSONReader(), text.partition("{")
    value = reader.feed(f"{brace}{rest}\n", is_over=True)
    return value if reader.is_done else ""


def parsed_or_why(text: str, format: ResponseFormat) -> tuple[Any, str]:
    """Give the value, and in a sentence why it won't do; "" if it will."""
    try:
        value = parse_strict(text)
    except (ValueError, RecursionError) as error:
        return None, f"It is not JSON: {error}."
    return value, validate(value, format.schema)


# A brace in prose begins no JSON unless a key and a colon follow it, nor does a
# bracket without an item. What has nothing in its brackets, or keys without quotes,
# can't be distinguished from prose before the end.
GAPS = r"\s{0,20}"
QUOTED = r"""(?:"(?:[^"\\]|\\.){0,100}"|'(?:[^'\\]|\\.){0,100}')"""
SCALAR = r"(?:-?[0-9]{1,20}(?:\.[0-9]{1,20})?(?:[eE][+-]?[0-9]{1,3})?|true|false|null)"
EMPTY = rf"\{{{GAPS}\}}|\[{GAPS}\]"
BEGINS = re.compile(
    rf"""(?:\[{GAPS}){{0,8}}\{{{GAPS}{QUOTED}{GAPS}:
    |(?:\[{GAPS}){{1,8}}(?:"|(?:{SCALAR}|{EMPTY}){GAPS}[,\]])""",
    re.DOTALL | re.VERBOSE,
)
BEGINNING_ENDS = re.compile(r'[:",\]]')
LONGEST_BEGINNING = 420  # characters
LONE_VALUE = re.compile(
    rf'[{{\[]|(?<!\\)"(?:[^"\\]|\\.)*"|(?<![\w.-]){SCALAR}(?!\w)', re.DOTALL
)
MOST_LONE_VALUES = 20
LONGEST_EPILOGUE = 200  # characters that a model may go on after the value


def extract_json(events: Events, format: ResponseFormat) -> Events:
    """Tell of the text only the value in it, or all of it if there is none."""
    types = possible_types(format.schema, format.schema)
    brackets = "{" * ("object" in types) + "[" * ("array" in types)
    bracket = re.compile(any_of(brackets))
    text, looked = "", 0
    with closing(events):
        for event in events:
            if isinstance(event, Text):
                text += event.text
                places = []
                if BEGINNING_ENDS.search(event.text):  # nothing else completes one
                    places = [b.start() for b in bracket.finditer(text, looked)]
                matches = (BEGINS.match(text, place) for place in places)
                found = [(match.end(), match.start()) for match in matches if match]
                if found:  # of several, that which could be told first
                    break
                looked = max(0, len(text) - LONGEST_BEGINNING)
                continue
            if isinstance(event, (ToolCall, Done)):
                if isinstance(event, Done):
                    text = lone_value(text, format, brackets)
                if text:
                    yield Text(text)
                text, looked = "", 0
            yield event
        else:
            return
        reader, epilogue = JSONReader(keeps_space=True), 0
        for event in chain((Text(text[min(found)[1] :]),), events):
            if reader.is_done or reader.is_broken:
                ready, rest = "", event.text if isinstance(event, Text) else ""
            elif isinstance(event, Text):
                ready, rest = reader.feed(event.text), reader.rest
            elif isinstance(event, Done):
                ready, rest = reader.finish(event), reader.rest
            else:
                ready = rest = ""
            if reader.is_broken:
                ready += rest
            if ready:
                yield Text(ready)
            if reader.is_done:
                epilogue += len(rest)
                if epilogue > LONGEST_EPILOGUE:
                    yield Done("stop")
                    return
                if isinstance(event, Done):  # what was cut off was no part of it
                    event = Done("stop", event.usage)
            if not isinstance(event, Text):
                yield event


def lone_value(text: str, format: ResponseFormat, brackets: str) -> str:
    """A value that does not look like one, if it fits the schema, else the text."""
    for found in islice(LONE_VALUE.finditer(text), MOST_LONE_VALUES):
        value = found[0]
        if value in ("{", "["):
            reader = JSONReader(keeps_space=True)
            value = reader.feed(text[found.start() :])
            value = value if reader.is_done else ""
        elif brackets == "{[":
            continue  # the schema says nothing
        if value and not parsed_or_why(value, format)[1]:
            return value
    return text


# -- Tool calls ----------------------------------------------------------------
#
# Calls as models write them in their text: whatever the prompt says, each writes what
# it was trained on. A call is one opening or several, then an object that names a
# tool, or arguments if an opening holds the name, and what closes the openings. To
# add a format: a row in FORMAT_ROWS. A call is held until its end and parsed
# once; only arguments that are JSON as it stands are streamed while they are written.
# Cut into single characters, a text gives the same.


def tool_call_error(name: str, arguments: str, toolbox: Toolbox) -> str:
    """Why a call fits no tool; "" if it does."""
    tool = toolbox.find(name)
    if not tool:
        return f"there is no tool {name}."
    schema = {"type": "object", **tool.parameters}
    return validate(parsed(arguments), schema, "arguments")


NAME_KEYS = ("name", "function", "tool", "tool_name", "recipient_name")
ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")
CALL_KEYS = {*NAME_KEYS, *ARGUMENT_KEYS, "type", "id"}
SCHEMA_KEYS = ("type", "properties", "$schema")  # a tool's own schema begins so
SEVERAL_CALLS = "multi_tool_use.parallel"  # as OpenAI's models name them
AFTER_NAME = re.compile(r"[^\w.-]", re.ASCII)
LONGEST_NAME = 80  # characters, with what models write before it
LONGEST_HEAD = 400  # characters, up to where arguments begin
OPENAI_HEAD = '{"tool_calls":['
HEAD = re.compile(  # without its space
    rf"""\{{(?:"(?:id|type)":"[\w-]{{0,64}}",|"function":\{{)*
    (?:"(?:{"|".join(NAME_KEYS)})":"(?P<name>[\w.-]{{0,{LONGEST_NAME}}})(?:(?P<end>")|\Z)
    (?P<given>,"(?:{"|".join(ARGUMENT_KEYS)})":\{{(?P<first>"(?P<key>[^"]*)"|\}})?)?)?""",
    re.ASCII | re.VERBOSE,
)
HALF_HEADS = (OPENAI_HEAD[1:], *(f'"{key}":"' for key in (*NAME_KEYS, "type", "id")))
HALF_PAIR = re.compile(r'"(?:id|type)":"[\w-]{0,64}"?', re.ASCII)


def parse_head(
    text: str, toolbox: Toolbox, is_sure: bool
) -> tuple[str, int | None] | None:
    """Which tool an object calls, if it says so yet, and where its arguments begin.

    That is 0 if they can't be streamed, None if it is yet to be seen; all is None if
    no call begins so, or if it is a tool that is described, not called."""
    head = "".join(text.split()).replace("'", '"').replace('\\"', '"').rstrip("\\")
    found = HEAD.match(head)
    assert found
    name, key, rest = found["name"], found["key"], head[found.end() :]
    if name is None:
        is_half = any(begin.startswith(rest) for begin in HALF_HEADS)
        if is_half or HALF_PAIR.fullmatch(rest):
            return "", None
        return ("", 0) if head.startswith(OPENAI_HEAD) else None
    is_described = key in SCHEMA_KEYS and key not in properties_of(toolbox.find(name))
    is_whole = bool(found["end"])
    if name == SEVERAL_CALLS or (not is_whole and SEVERAL_CALLS.startswith(name)):
        return "", 0 if is_whole else None
    if not toolbox.knows(name, is_whole) or (is_described and not is_sure):
        return None
    if not is_whole:
        return "", None
    if not found["given"]:
        is_half = any(f',"{key}":{{'.startswith(rest) for key in ARGUMENT_KEYS)
        return name, None if is_half else 0
    if not (is_sure or found["first"]):
        return name, None if rest[:1] in ("", '"') else 0
    braces = [brace.start() for brace in re.finditer("{", text)]
    at = braces[head[: found.start("given")].count("{")]
    return name, 0 if {"'", "\\"} & {*text[:at]} else at


def calls_in(value: Any, toolbox: Toolbox, is_sure: bool) -> list[tuple[str, str]]:
    """The names and arguments in a JSON value of any shape; none if it is no call.

    After a sure opening, arguments may also stand beside their name, or the name be
    the key of them."""
    if isinstance(value, list):
        return [call for item in value for call in calls_in(item, toolbox, is_sure)]
    if not isinstance(value, dict):
        return []
    inner = value.get("tool_calls", value.get("function"))
    name = next((value[key] for key in NAME_KEYS if key in value), "")
    given = next((value[key] for key in ARGUMENT_KEYS if key in value), None)
    if name == SEVERAL_CALLS:
        inner = as_object(given).get("tool_uses")
    if isinstance(inner, (dict, list)):
        return calls_in(inner, toolbox, is_sure)
    rest = {key: value[key] for key in value if key not in CALL_KEYS}
    if is_sure and len(value) == 1 and rest:
        [(key, given)] = rest.items()
        name, rest = (key, {}) if toolbox.find(key) else ("", rest)
    if not isinstance(name, str):
        return []
    tool = toolbox.find(name)
    name = tool.name if tool else name.removeprefix("functions.")
    if is_sure and given is None and rest.keys() <= properties_of(tool).keys():
        given, rest = rest, {}
    if rest or not TOOL_NAME.fullmatch(name) or not (tool or is_sure):
        return []
    arguments = arguments_text(given, tool, is_sure)
    is_whole = given is not None or not properties_of(tool)
    return [(name, arguments)] if is_sure or is_whole and arguments[0] == "{" else []


def arguments_alone(given: Any, toolbox: Toolbox) -> list[tuple[str, str]]:
    """What fits the only tool that may be called, and has to be, is its arguments."""
    if (tool := toolbox.only) and isinstance(given, dict):
        arguments = arguments_text(given, tool, is_sure=False)
        is_known = given.keys() <= properties_of(tool).keys()
        if is_known and not tool_call_error(tool.name, arguments, toolbox):
            return [(tool.name, arguments)]
    return []


def arguments_text(given: Any, tool: Tool | None, is_sure: bool) -> str:
    """Arguments as JSON: a text may hold them, or be the only one a tool needs."""
    if isinstance(given, str) and given.lstrip().startswith("{"):
        return repair_json(given) or given
    if isinstance(given, str) and given and tool and is_sure:
        needed = as_list(tool.parameters.get("required"))
        if len(needed) == 1 and types_of(tool, needed[0]) == ["string"]:
            given = {needed[0]: given}
    if isinstance(given, dict):
        given = {
            name: typed(value, tool, name)
            if isinstance(value, str) and "string" not in types_of(tool, name)
            else value
            for name, value in given.items()
        }
    return compact({} if given in (None, "") else given)


ANYWHERE, LINE = "anywhere", "at the beginning of a line"
INSIDE, CALLED = "after an opening", "after one that is surely a call"


class ToolCallFormat(NamedTuple):
    """How a call opens, and what follows.

    "call" is surely one, even of a tool that is not there; "object" is one if it reads
    as one. Both go on with other openings or with an object. All else says how the
    arguments are written of the tool that the opening names, but for "result"."""

    holds: str
    opening: str  # with * for the name of a tool
    closing: str = ""
    where: str = ANYWHERE


FORMAT_ROWS = (
    ("call", "<tool_call>", "</tool_call>"),  # Qwen, Hermes, granite, GLM
    ("call", "<tool_calls>", "</tool_calls>"),
    ("call", "<|tool_call|>", "<|/tool_call|>"),  # granite 3, phi-4
    ("call", "<|tool_call>call:", "<tool_call|>"),  # Gemma 4
    ("call", "<|tool_call_start|>", "<|tool_call_end|>"),  # LFM 2
    ("call", "<function_call>", "</function_call>"),
    ("call", "<function-call>", "</function-call>"),
    ("call", "<functioncall>", "</functioncall>"),  # glaive
    ("call", "<|tools_prefix|>", "<|tools_suffix|>"),  # Apertus
    ("call", "<|python_tag|>", "<|eom_id|>"),  # Llama 3
    ("call", "<|python_start|>", "<|python_end|>"),  # Llama 4
    ("call", "[TOOL_CALLS]"),  # Mistral
    ("call", "<seed:tool_call>", "</seed:tool_call>"),
    ("named", "*", "", CALLED),  # GLM, Kimi, Mistral since its tokenizer 11
    ("named", "<function=*>", "</function>"),  # Llama 3, Qwen3 Coder
    ("named", '<function name="*">', "</function>"),  # MiniCPM 5
    ("python", "<function=*(", "</function>"),
    ("call", "<function_calls>", "</function_calls>"),  # Claude
    ("named", '<invoke name="*">', "</invoke>"),
    ("call", "<minimax:tool_call>", "</minimax:tool_call>"),
    ("call", "<｜DSML｜function_calls>", "</｜DSML｜function_calls>"),  # DeepSeek V3.2
    ("call", "<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"),  # DeepSeek V4
    ("named", '<｜DSML｜invoke name="*">', "</｜DSML｜invoke>"),
    ("call", "<|DSML|tool_calls>", "</|DSML|tool_calls>"),
    ("named", '<|DSML|invoke name="*">', "</|DSML|invoke>"),
    ("call", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),  # DeepSeek V3, V3.1
    ("named", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>*", "<｜tool▁call▁end｜>"),
    ("named", "<｜tool▁call▁begin｜>*<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    ("call", "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),  # Kimi K2
    ("call", "<|tool_call_section_begin|>", "<|tool_call_section_end|>"),
    ("call", "<|tool_call_begin|>", "<|tool_call_end|>"),
    ("object", "<|start|>assistant"),  # gpt-oss: the tool is named in its role …
    ("object", "<|channel|>commentary"),  # … or channel
    ("object", "<|channel|>comment"),
    ("object", "<|channel|>analysis"),
    ("named", "to=*", "<|call|>", INSIDE),
    ("object", "<tools>", "</tools>"),  # Qwen2.5 Coder
    ("object", "<function>", "</function>"),
    ("object", "<tool_code>", "</tool_code>"),
    ("object", "```json", "```"),
    ("object", "```xml", "```"),
    ("object", "```tool_call", "```"),
    ("object", "```tool_code", "```"),  # Gemma, Gemini
    ("object", "```", "```"),
    ("object", "[", "]", LINE),
    ("object", "print(", ")", INSIDE),
    ("python", "*(", "", INSIDE),  # Llama 4: [get_time(zone="UTC")]
    ("result", "<tool_response"),  # made up, after a call
)
TOOL_CALL_FORMATS = [ToolCallFormat(*row) for row in FORMAT_ROWS]
CLOSING_TAGS = [f.closing for f in TOOL_CALL_FORMATS if f.closing.startswith("<")]


@lru_cache(maxsize=1000)
def formats_by_beginning(text: str) -> list[ToolCallFormat]:
    """The formats with an opening that may begin as one or two characters do."""
    formats = [(format, format.opening[: len(text)]) for format in TOOL_CALL_FORMATS]
    return [f for f, begin in formats if begin[0] == "*" or text.startswith(begin)]


def unwrapped(arguments: str, tool: Tool | None) -> str:
    """For f(x={"x": 1}), as f({"x": 1}) reads, {"x": 1}, unless x may be an object."""
    given = as_object(parsed(arguments))
    for name, inner in given.items():
        is_all = isinstance(inner, dict) and inner.keys() <= properties_of(tool).keys()
        if len(given) == 1 and is_all and "object" not in types_of(tool, name):
            return compact(inner)
    return arguments


def opening_at(
    opening: str, text: str, at: int, toolbox: Toolbox
) -> tuple[str, int] | None:
    """The name in an opening that stands there, and where it ends; -1 if `text` ends.

    None if it does not stand there, or if no tool has that name."""
    before, star, after = opening.partition("*")
    if not text.startswith(before, at):
        return ("", -1) if before.startswith(text[at : at + len(before)]) else None
    at += len(before)
    if not star:
        return "", at
    name = AFTER_NAME.split(text[at : at + LONGEST_NAME], 1)[0]
    at += len(name)
    rest = text[at : at + len(after)]
    is_whole = rest == after and at < len(text)
    if not after.startswith(rest) or not toolbox.knows(name, is_whole):
        return None
    return name, at + len(after) if is_whole else -1


START = re.compile(r"[<\[{`]")  # what any call begins with
START_OR_SPACE = re.compile(r"[<\[{`]|\s\Z")
GAP = re.compile(rf"[\s,;]{{0,{LONGEST_SPACE + 1}}}")
MAX_ENDLESS_CALLS = 20  # of one answer, in tags that nothing closes
MOST_OPENINGS = 6  # of one call
LONGEST_CALL = 200_000  # characters that are held
LONGEST_PIECE = 1000  # characters that are looked at together
LONGEST_LEAD = 80  # characters
LEAD = re.compile(  # what may stand between a name and its arguments
    r"\s*(?:(?:\[CALL_ID\]\w{1,40})?\[ARGS\]\s*)?(?::?\d{1,3}\s*)?"
    r"(?:(?:<\|\w{1,30}\|>|</function>|comment(?:ary)?|analysis|```|json|code)\s*){0,9}"
)
PARAMETER = "param(?:eter)?"
PREFIX = "(?:[｜|]DSML[｜|]|antml:)?"
TAG_BEGINS = re.compile(f"<(?:{PREFIX}{PARAMETER}|arg_key>)")
TAGGED_END = re.compile(rf"</(?:{PREFIX}{PARAMETER}[^<>]{{0,20}}|arg_value)>")
TAGGED = re.compile(  # Qwen3 Coder has the first form, Claude the next, GLM the last
    rf"(?P<closed>{TAGGED_END.pattern}\s{{0,20}})?(?:"
    rf"<{PARAMETER}=(?P<name>[^<>]{{1,64}})>"
    rf'|<{PREFIX}{PARAMETER} name="(?P<quoted>[^<>"]{{1,64}})"(?P<type>[^<>]{{0,40}})>'
    r"|<arg_key>(?P<key>[^<>]{1,64})</arg_key>\s*<arg_value>)"
)


def tagged_arguments(text: str, tool: Tool | None) -> Json:
    """Arguments between tags: of the types that the tool asks for, else as they parse.

    A value ends with the last of what closes it before the next tag. Where nothing
    does, only the tag of a parameter that is still missing is the next."""
    tags: list[tuple[str, re.Match[str]]] = []
    missing = {*properties_of(tool)}
    for tag in TAGGED.finditer(text):
        name = (tag["name"] or tag["quoted"] or tag["key"]).strip()
        if not tags or tag["closed"] or name in missing:
            missing.discard(name)
            tags.append((name, tag))
    arguments: Json = {}
    for place, (name, tag) in enumerate(tags, 1):
        after = tags[place][1] if place < len(tags) else None
        value = text[tag.end() : after.start() if after else len(text)]
        if not (after and after["closed"]):
            ends = [end.start() for end in TAGGED_END.finditer(value)]
            unclosed = value.rstrip().removesuffix(f"</{name}>").rstrip()
            value = value[: ends[-1]] if ends else unclosed
        value = value.removeprefix("\n").removesuffix("\n")
        is_text = 'string="true"' in (tag["type"] or "")
        arguments[name] = value if is_text else typed(value, tool, name)
    return arguments


def extract_tool_calls(
    events: Events, toolbox: Toolbox, strict: bool = False
) -> Events:
    """Tell calls from text, and end with `tool_calls` if there were any.

    `strict`: a call of a tool that is not there is text."""
    with closing(events):
        yield from ToolCallParser(events, toolbox, strict).parse()


class ToolCallParser:
    """Reads one answer; its methods wait for text by `yield from self.more()`."""

    def __init__(self, source: Events, toolbox: Toolbox, strict: bool) -> None:
        self.source = source
        self.toolbox = toolbox
        self.strict = strict
        self.done: Done | None = None
        self.coming = ""  # what came and was not looked at
        self.held = ""  # what was looked at, and may be a call or what closes it
        self.texts: list[str] = []  # that nobody has taken yet …
        self.events: list[Event] = []  # … and what was told before them
        self.calls = 0
        self.openings: list[ToolCallFormat] = []  # that are not closed
        self.endless = 0  # calls in tags that nothing closed
        self.is_fresh = True  # nothing was said yet, or nothing since a call

    def parse(self) -> Events:
        while self.held or (yield from self.more(skims=not self.openings)):
            before, calls = self.openings, self.calls
            if not before:
                start = START.search(self.held)
                end = start.start() if start else len(self.held)
                self.emit_text(max(len(self.held[:end].rstrip()), end - LONGEST_SPACE))
            openings, holds, name, at = self.read_openings()
            self.openings = [*dict.fromkeys(openings)]
            if holds == "result" and calls:
                break  # what a tool gives is not the model's to say
            if holds is None and (yield from self.more()):
                self.openings = before
            elif holds is None:
                self.give_up(self.is_sure())
            elif holds == "named":
                yield from self.read_named(name, at)
            elif holds in ("object", "python"):
                yield from self.read_object(name, at)
            else:
                self.refuse(at)
            if self.calls > calls:
                yield from self.read_closings()
        yield from self.take()
        done = self.done or Done("stop")
        is_called = self.calls and done.finish_reason == "stop"
        yield Done(self.toolbox.called, done.usage) if is_called else done

    def more(self, skims: bool = False) -> Waiting:
        """Tell what is clear by now, and hold more text; False if there is none.

        A long text comes in pieces, as what is held is copied again and again. If it
        `skims`, what no call can begin in is told at once."""
        while not self.coming:
            if self.done:
                return False
            if self.texts or self.events:
                yield from self.take()
            event = next(self.source, Done("stop"))
            if isinstance(event, Done):
                self.done = event
            elif not isinstance(event, Text):
                yield event
            elif skims and not START_OR_SPACE.search(event.text):
                self.is_fresh &= not event.text
                yield event
            else:
                self.coming = event.text
        self.held += self.coming[:LONGEST_PIECE]
        self.coming = self.coming[LONGEST_PIECE:]
        return True

    def take(self) -> Events:
        """Give the events so far, with texts that follow each other as one."""
        self.join_texts()
        yield from self.events
        self.events.clear()

    def join_texts(self) -> None:
        if self.texts:
            self.events.append(Text("".join(self.texts)))
            self.texts.clear()

    def emit_text(self, length: int) -> None:
        if text := self.held[:length]:
            self.is_fresh = False
            self.texts.append(text)
            self.held = self.held[length:]

    def emit_call(self, name: str, arguments: str = "") -> None:
        self.join_texts()
        if not self.calls or self.toolbox.parallel:
            tool = self.toolbox.find(name)
            name = tool.name if tool else name
            self.events.append(ToolCall(self.calls, random_id("call_", 24), name))
        self.calls += 1
        self.is_fresh = True
        self.emit_arguments(arguments)

    def emit_arguments(self, text: str) -> None:
        if text and (self.calls == 1 or self.toolbox.parallel):
            self.events.append(Arguments(self.calls - 1, text))

    def refuse(self, length: int = 0) -> None:
        """It was no call: its first character is text, and the rest may be one yet.

        After a long look, `length` characters are text: none is read often."""
        self.openings = []
        first = len(self.held) - len(self.held.lstrip()) + 1
        self.emit_text(length if length > LONGEST_HEAD else first)

    def give_up(self, is_call: bool) -> None:
        """It ended in what may be a call: that is text, unless it was cut off."""
        if is_call and self.done and self.done.finish_reason == "length":
            self.held = ""
        else:
            self.refuse()

    def is_sure(self) -> bool:
        return any(opening.holds == "call" for opening in self.openings)

    def read_openings(self) -> tuple[list[ToolCallFormat], str | None, str, int]:
        """The openings, what they hold, the name in them, and where they end.

        They hold "" if it is no call, None if that is yet to be seen."""
        at, openings = 0, [*self.openings]
        while len(openings) <= len(self.openings) + MOST_OPENINGS:
            gap = GAP.match(self.held, at)
            start, at = at, gap.end() if gap else at
            if at == len(self.held):
                return openings, None, "", at
            is_line = self.is_fresh or "\n" in self.held[start:at]
            places = {ANYWHERE: True, INSIDE: bool(openings)}
            places[LINE] = is_line or bool(openings)
            places[CALLED] = any(opening.holds == "call" for opening in openings)
            found = []
            for format in formats_by_beginning(self.held[at : at + 2]):
                if not places[format.where]:
                    continue
                opening = opening_at(format.opening, self.held, at, self.toolbox)
                if opening:
                    found.append((*opening, format))
            if any(end < 0 for _, end, _ in found):
                return openings, None, "", at
            if not found:
                is_object = self.held[at] == "{" and (is_line or openings)
                return openings, "object" if is_object else "", "", at
            name, at, format = max(found, key=itemgetter(1))
            if format in openings[len(self.openings) :]:
                break
            openings.append(format)
            if format.holds not in ("call", "object"):
                return openings, format.holds, name, at
        return openings, "", "", at

    def read_value(
        self, reader: JSONReader, text: str, is_told: bool = False
    ) -> Generator[Event, None, str]:
        """Read JSON to its end, which is told as arguments while it comes, or held."""
        values = [reader.feed(text)]
        while True:
            if is_told:
                self.emit_arguments(values[-1])
            if reader.is_done or reader.is_broken:
                break
            self.held = ""
            if (yield from self.more()):
                values.append(reader.feed(self.held))
            elif is_told:
                values.append(reader.finish(self.done or Done("stop")))
            else:
                break
            reader.is_broken |= not is_told and reader.passed > LONGEST_CALL
        self.held = reader.rest
        return "".join(values)

    def read_object(self, name: str, at: int) -> Events:
        """Read an object; its arguments at once if they begin as a call's.

        Or, after the name of a tool, the arguments of a call in Python."""
        python, is_sure, begin = name, self.is_sure(), 0 if name else None
        while begin is None:
            head = self.held[at : at + LONGEST_HEAD]
            is_sure = is_sure or "".join(head.split()).startswith(OPENAI_HEAD)
            found = parse_head(head, self.toolbox, is_sure)
            if not (found or is_sure or self.toolbox.only):
                return self.refuse()
            name, begin = found or ("", 0)
            if begin is None and len(head) == LONGEST_HEAD:
                begin = 0
            elif begin is None and not (yield from self.more()):
                return self.give_up(is_sure or bool(name))
        text, before = self.held[at:], self.held[:at]
        if begin:
            return (yield from self.read_arguments(name, text[begin:], text[:begin]))
        tool = self.toolbox.find(python) if python else None
        reader = JSONReader(tool=tool, is_python=tool is not None)
        value = yield from self.read_value(reader, text)
        calls = [(python, unwrapped(value, tool))]
        if not python:
            given = parsed(value)
            calls = calls_in(given, self.toolbox, is_sure)
            calls = calls or arguments_alone(given, self.toolbox)
        is_known = all(self.toolbox.find(name) for name, _ in calls)
        if reader.is_done and calls and (is_known or (is_sure and not self.strict)):
            for call in calls:
                self.emit_call(*call)
            del self.openings[len(self.openings) - bool(python) :]
            return
        self.held = before + "".join(reader.raw)
        if reader.is_done or reader.is_broken:
            self.refuse(min(len(before) + reader.passed + reader.at, LONGEST_CALL))
        else:
            self.give_up(is_sure or bool(name))

    def read_arguments(self, name: str, text: str, around: str = "") -> Events:
        """Tell arguments as they are written, and pass over what is around them."""
        self.emit_call(name)
        reader = JSONReader(tool=self.toolbox.find(name))
        yield from self.read_value(reader, text, is_told=True)
        if reader.is_broken:
            sound = "".join(reader.raw)[: reader.sound]
            yield from self.read_broken_arguments(sound.count("{") - sound.count("}"))
        if around:
            reader = JSONReader()
            reader.feed(around)
            yield from self.read_value(reader, "{}" + self.held)

    def read_broken_arguments(self, depth: int) -> Events:
        """Tell the rest as it is, to its last bracket or what closes the call."""
        closings = [o.closing for o in self.openings if len(o.closing) > 1]
        marks = re.compile(any_of(["{", "}", *closings]))
        is_more = True
        while is_more:
            end = len(self.held) - overhang(self.held, closings)
            for mark in marks.finditer(self.held):
                depth += (mark[0] == "{") - (mark[0] == "}")
                if mark[0] in closings or not depth:
                    end = mark.start() if mark[0] in closings else mark.end()
                    is_more = False
                    break
            self.emit_arguments(self.held[:end])
            self.held = self.held[end:]
            if is_more and not (yield from self.more()):
                self.emit_arguments(self.held)
                self.held, is_more = "", False

    def read_named(self, name: str, at: int) -> Events:
        """Read the arguments after an opening that holds the name."""
        openings = [o for o in self.openings if o.closing and o.holds != "object"]
        closings = tuple(opening.closing for opening in openings)
        while True:
            lead, brace, _ = self.held[at:].partition("{")
            begun = lead.lstrip()
            if TAG_BEGINS.match(begun):
                return (yield from self.read_tagged(name, at))
            if begun.startswith(closings):
                self.emit_call(name, "{}")
                self.held = self.held[at:]
                return
            if brace or len(lead) >= LONGEST_LEAD:
                break
            if not (yield from self.more()):
                return self.give_up(is_call=True)
        if not brace or len(lead) > LONGEST_LEAD or not LEAD.fullmatch(lead):
            return self.refuse()
        if "```" in lead:
            self.openings.append(ToolCallFormat("object", "```", "```"))
        yield from self.read_arguments(name, self.held[at + len(lead) :])

    def read_tagged(self, name: str, at: int) -> Events:
        """Read tags up to what closes the call.

        That follows the end of a value, or the next call does. If it may be part of a
        value, what closes or opens another call has to follow it, or nothing at all."""
        openings = [o for o in self.openings if o.holds != "object"]
        closing = any_of({o.closing for o in openings})
        opening = any_of({o.opening.partition("*")[0] for o in openings})
        ends = re.compile(
            rf"{TAGGED_END.pattern}\s{{0,20}}(?={closing}|{opening})"
            rf"|(?={closing}\s{{0,20}}(?:{closing}|{opening}))"
        )
        looked, is_more = at, True
        while is_more and not (found := ends.search(self.held, looked)):
            looked = max(at, len(self.held) - LONGEST_SPACE)
            is_more = len(self.held) <= LONGEST_CALL and (yield from self.more())
        end = found.end() if found else len(self.held)
        if end > LONGEST_CALL:
            return self.refuse(LONGEST_CALL)
        if not found and TAGGED.search(TAGGED_END.split(self.held)[-1]):
            last = [at, *(end.start() for end in re.finditer(closing, self.held))][-1]
            is_cut = self.done and self.done.finish_reason == "length"
            if last <= at or is_cut:
                self.endless += 1
                if self.endless > MAX_ENDLESS_CALLS:  # each was looked at to the end
                    return self.refuse(len(self.held))
                return self.give_up(is_call=True)
            end = last
        arguments = tagged_arguments(self.held[at:end], self.toolbox.find(name))
        self.emit_call(name, compact(arguments))
        self.held = self.held[end:]

    def read_closings(self) -> Events:
        """Drop what closes a call, open or not, and a bracket too many."""
        while True:
            gap = GAP.match(self.held)
            rest = self.held[gap.end() :] if gap else ""
            closings = [opening.closing for opening in self.openings]
            tags = [tag for tag in (*closings, *CLOSING_TAGS) if tag]
            if closed := [tag for tag in tags if rest.startswith(tag)]:
                self.held = rest.removeprefix(closed[0])
                if closed[0] in closings:
                    del self.openings[closings.index(closed[0]) :]
            elif rest[:1] in ("}", "]") and self.is_sure():
                self.held = rest[1:]
            elif rest and not any(tag.startswith(rest) for tag in tags):
                return
            elif not (yield from self.more()):
                self.held = ""
                return


# ==== 6. OBJECTS ==============================================================


# -- Chat ----------------------------------------------------------------------
#
# Events as OpenAI's objects: whole, or as the chunks of a stream; both say the
# same. Keys stand in the order of recorded answers of api.openai.com, with their
# nulls. A kind of object has a function for the whole and one for its stream.

DONE_FRAME = b"data: [DONE]\n\n"
IndexedEvents = Iterable[tuple[int, Event]]  # each with the index of its choice


def sse_frame(data: Json) -> bytes:
    return b"data: " + encode_json(data) + b"\n\n"


def encode_json(value: Any) -> bytes:
    """Half a surrogate pair, which a model may write, becomes `?`."""
    text = compact(value)
    if not text.isascii():  # some clients end lines there
        for end in "\u0085\u2028\u2029":
            text = text.replace(end, f"\\u{ord(end):04x}")
    return text.encode("utf-8", "replace")


class CompletionInfo(NamedTuple):
    """What the whole object and every chunk of an answer share."""

    id: str
    created: int  # Unix seconds
    model: str  # as the client named it
    include_usage: bool = False  # then every chunk has a place for it …
    continuous_usage: bool = False  # … and an estimate there
    prompt_tokens: int = 0  # an estimate
    legacy: bool = False  # a call is a `function_call`, as before there were tools


class Choice(NamedTuple):
    text: str
    finish_reason: str
    reasoning: str = ""
    calls: tuple[Json, ...] = ()  # as `tool_calls` of a message hold them


def fold(events: Iterable[Event]) -> tuple[Choice, Usage]:
    """Fold the events of one choice into the whole, with what it took."""
    texts: dict[type, list[str]] = {Text: [], Reasoning: []}
    calls: dict[int, Json] = {}
    end = Done("stop")
    for event in events:
        match event:
            case Text(text) | Reasoning(text):
                texts[type(event)].append(text)
            case ToolCall(index, id, name):
                function = {"name": name, "arguments": ""}
                calls[index] = {"id": id, "type": "function", "function": function}
            case Arguments(index, text):
                calls[index]["function"]["arguments"] += text
            case Done():
                end = event
    text, reasoning = ("".join(pieces) for pieces in texts.values())
    choice = Choice(text, end.finish_reason, reasoning, tuple(calls.values()))
    return choice, end.usage


def fold_choices(events: IndexedEvents) -> tuple[list[Choice], Usage]:
    by_choice: dict[int, list[Event]] = defaultdict(list)
    for index, event in events:
        by_choice[index].append(event)
    choices, usages = zip(*(fold(by_choice[i]) for i in sorted(by_choice)), strict=True)
    return list(choices), sum_usage(usages)


def sum_usage(usages: Iterable[Usage]) -> Usage:
    *counts, costs = zip(*usages, strict=True)
    totals = [sum(filter(None, each)) for each in counts]
    prompt, completion, reasoning, estimates = totals
    known = [cost for cost in costs if cost is not None]
    cost = sum(known) if known else None
    return Usage(prompt, completion, reasoning, bool(estimates), cost)


def cost_field(usage: Usage) -> Json:
    """As OpenRouter tells it."""
    return {} if usage.cost is None else {"cost": round(usage.cost, 9)}


def usage_object(usage: Usage) -> Json:
    prompt, completion = usage.prompt_tokens or 0, usage.completion_tokens or 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
        **cost_field(usage),
    }


def reasoning_fields(text: str) -> Json:
    """DeepSeek's name for it, and that of OpenRouter and vLLM: clients read either."""
    return {"reasoning_content": text, "reasoning": text}


def chat_message(choice: Choice, info: CompletionInfo) -> Json:
    message: Json = {"role": "assistant", "content": choice.text}
    if choice.calls:
        message["content"] = choice.text or None
        if info.legacy:
            message["function_call"] = choice.calls[0]["function"]
        else:
            message["tool_calls"] = list(choice.calls)
    message |= {"refusal": None, "annotations": []}
    if choice.reasoning:
        message |= reasoning_fields(choice.reasoning)
    return message


def chat_completion(choices: list[Choice], usage: Usage, info: CompletionInfo) -> Json:
    return {
        "id": info.id,
        "object": "chat.completion",
        "created": info.created,
        "model": info.model,
        "choices": [
            {
                "index": index,
                "message": chat_message(choice, info),
                "logprobs": None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ],
        "usage": usage_object(usage),
        "service_tier": "default",
        "system_fingerprint": None,
    }


def chat_delta(event: Event, legacy: bool) -> Json:
    match event:
        case Text(text):
            return {"content": text}
        case Reasoning(text):
            return reasoning_fields(text)
        case ToolCall(index, id, name):
            function = {"name": name, "arguments": ""}
            call = {"index": index, "id": id, "type": "function", "function": function}
        case Arguments(index, text):
            function = {"arguments": text}
            call = {"index": index, "function": function}
        case _:
            return {}
    return {"function_call": function} if legacy else {"tool_calls": [call]}


def chat_stream(
    events: IndexedEvents, info: CompletionInfo, choices: int
) -> Iterator[bytes]:
    """Yield the frames of a chat's chunks, with [DONE] as the last.

    The first chunks, of the role, wait for an event: what fails before it can still
    have an HTTP status of its own.
    """
    chunk = {
        "id": info.id,
        "object": "chat.completion.chunk",
        "created": info.created,
        "model": info.model,
        "service_tier": "default",
        "system_fingerprint": None,
        "choices": [],
    }

    def choice(index: int, delta: Json, finish_reason: str | None = None) -> Json:
        row = {"index": index, "delta": delta, "logprobs": None}
        return {**row, "finish_reason": finish_reason}

    def choice_of(index: int, event: Event) -> Json:
        reason = event.finish_reason if isinstance(event, Done) else None
        return choice(index, chat_delta(event, info.legacy), reason)

    role = {"role": "assistant", "content": "", "refusal": None}
    roles = [[choice(index, role)] for index in range(choices)]
    return completion_stream(events, chunk, choice_of, info, roles)


def completion_stream(
    events: IndexedEvents,
    chunk: Json,
    choice_of: Callable[[int, Event], Json],
    info: CompletionInfo,
    first: Sequence[list[Json]] = (),  # the choices of chunks before all others
) -> Iterator[bytes]:
    """Yield a frame per event, one of the usage if that is wanted, and [DONE].

    What is constant around the text of a chunk is encoded once: a token costs the
    encoding of its own text (0.95 us instead of 4.5)."""
    is_constant = not (info.include_usage and info.continuous_usage)
    length = 0
    usages: list[Usage] = []
    around: dict[int, tuple[bytes, bytes]] = {}  # the text of each choice
    mark = random_id("", 20)

    def frame(choices: list[Json]) -> bytes:
        usage = None
        if not is_constant:
            counts = Usage(info.prompt_tokens, estimate_tokens(length))
            usage = usage_object(counts)
        usages_place = {"usage": usage} if info.include_usage else {}
        return sse_frame({**chunk, "choices": choices, **usages_place})

    start = b"".join(map(frame, first))
    for index, event in events:
        if isinstance(event, Text) and index in around:
            before, after = around[index]
            yield before + encode_json(event.text) + after
            continue
        if isinstance(event, Text) and is_constant:
            marked = frame([choice_of(index, Text(mark))])
            before, _, after = marked.partition(encode_json(mark))
            around[index] = before, after
        if isinstance(event, Done):
            usages.append(event.usage)
        elif not isinstance(event, ToolCall):
            length += len(event.text)
        yield start + frame([choice_of(index, event)])
        start = b""
    if info.include_usage:
        usage = usage_object(sum_usage(usages))
        yield sse_frame({**chunk, "choices": [], "usage": usage})
    yield DONE_FRAME


def completion_error(error: APIError) -> bytes:
    """How a stream of chunks ends that fails in the middle."""
    return sse_frame(error.body) + DONE_FRAME


# -- Completions ---------------------------------------------------------------


def text_choice(index: int, text: str, finish_reason: str | None = None) -> Json:
    return {
        "text": text,
        "index": index,
        "logprobs": None,
        "finish_reason": finish_reason,
    }


def text_completion(choices: list[Choice], usage: Usage, info: CompletionInfo) -> Json:
    return {
        "id": info.id,
        "object": "text_completion",
        "created": info.created,
        "model": info.model,
        "choices": [
            text_choice(index, choice.text, choice.finish_reason)
            for index, choice in enumerate(choices)
        ],
        "usage": usage_object(usage),
    }


def text_stream(
    events: IndexedEvents, info: CompletionInfo, choices: int
) -> Iterator[bytes]:
    """Yield the frames of a completion's chunks, with [DONE] as the last."""
    chunk = {
        "id": info.id,
        "object": "text_completion",
        "created": info.created,
        "choices": [],
        "model": info.model,
    }

    def choice_of(index: int, event: Event) -> Json:
        if isinstance(event, Text):
            return text_choice(index, event.text)
        return text_choice(index, "", cast(Done, event).finish_reason)

    return completion_stream(events, chunk, choice_of, info)


# -- Responses -----------------------------------------------------------------
#
# Events as a response of the Responses API, whole or as a stream of that API's own
# events. One builder makes both, so they agree. Clients depend on the order: an item
# ends before the next begins, and no id ever changes. To add a type of item: a row in
# ITEM_TYPES, and a case in `ModelResponse.add`.


class ItemType(NamedTuple):
    """How an item of the output is streamed."""

    prefix: str  # of its id
    event: str  # the name of the events with its text, without .delta and .done
    key: str  # of the whole text in the event that ends it
    place: Json = {}  # where in the item the text is
    more: Json = {}  # what stands beside the text in its events
    part: str = ""  # the type of the part that holds the text, if any …
    part_event: str = ""  # … and the name of its events, without .added and .done


ITEM_TYPES = {
    "reasoning": ItemType(
        "rs_",
        "response.reasoning_summary_text",
        "text",
        place={"summary_index": 0},
        part="summary_text",
        part_event="response.reasoning_summary_part",
    ),
    "message": ItemType(
        "msg_",
        "response.output_text",
        "text",
        place={"content_index": 0},
        more={"logprobs": []},
        part="output_text",
        part_event="response.content_part",
    ),
    "function_call": ItemType("fc_", "response.function_call_arguments", "arguments"),
    "custom_tool_call": ItemType("ctc_", "response.custom_tool_call_input", "input"),
}

ResponseEvents = list[tuple[str, Json]]  # the type of each, and its other fields


def response_object(asked: Json) -> Json:
    """Build the object of a response that has just begun; `asked` is the body.

    Every field has the type that OpenAI's schema says, whatever was asked for."""

    def echo(name: str, kinds: tuple[type, ...], default: Any) -> Any:
        return asked[name] if type(asked.get(name)) in kinds else default

    text, reasoning = (echo(name, OBJECT, {}) for name in ("text", "reasoning"))
    format = text.get("format") or {"type": "text"}
    if format["type"] == "json_schema":
        format = {"description": None, "strict": False, **without_nulls(format)}
    unset = dict.fromkeys(("description", "parameters", "strict"))
    tools = [
        {"type": "function", **unset, **tool} if tool["type"] == "function" else tool
        for tool in echo("tools", ARRAY, [])
    ]
    return {
        "id": random_id("resp_", 48),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "frequency_penalty": echo("frequency_penalty", NUMBER, 0.0),
        "incomplete_details": None,
        "instructions": echo("instructions", STRING, None),
        "max_output_tokens": echo("max_output_tokens", INTEGER, None),
        "max_tool_calls": echo("max_tool_calls", INTEGER, None),
        "model": asked["model"],
        "output": [],
        "parallel_tool_calls": echo("parallel_tool_calls", BOOLEAN, True),
        "presence_penalty": echo("presence_penalty", NUMBER, 0.0),
        "previous_response_id": echo("previous_response_id", STRING, None) or None,
        "prompt_cache_key": echo("prompt_cache_key", STRING, None),
        "reasoning": {
            "effort": reasoning.get("effort"),
            "summary": reasoning.get("summary"),
        },
        "safety_identifier": echo("safety_identifier", STRING, None),
        "service_tier": "default",
        "store": echo("store", BOOLEAN, True),
        "temperature": echo("temperature", NUMBER, 1.0),
        "text": {"format": format, "verbosity": text.get("verbosity") or "medium"},
        "tool_choice": echo("tool_choice", (str, dict), "auto"),
        "tools": tools,
        "top_logprobs": 0,
        "top_p": echo("top_p", NUMBER, 1.0),
        "truncation": echo("truncation", STRING, "disabled"),
        "usage": None,
        "user": echo("user", STRING, None),
        "metadata": echo("metadata", OBJECT, {}),
    }


def response_usage(usage: Usage) -> Json:
    asked, answered = usage.prompt_tokens or 0, usage.completion_tokens or 0
    return {
        "input_tokens": asked,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": answered,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": asked + answered,
        **cost_field(usage),
    }


CUSTOM_BEGIN = re.compile(rf'\s*\{{\s*"{CUSTOM_ARGUMENT}"\s*:\s*"')

JSON_CHARACTERS = re.compile(  # the two halves of a surrogate pair as one
    r"""(?: [^"\\\x00-\x1f] | \\["\\/bfnrt] | \\u(?![dD][89abAB])[0-9a-fA-F]{4}
    | \\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2} )*""",
    re.VERBOSE,
)


class CustomInput:
    """Decodes what a custom tool is called with from the arguments of a function."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.held = ""
        self.is_begun = False
        self.decoded: list[str] = []

    def decode(self, piece: str) -> str:
        """Add a piece of the arguments; return what is certain of the text by now."""
        self.pieces.append(piece)
        self.held += piece
        if not self.is_begun:
            if not (begin := CUSTOM_BEGIN.match(self.held)):
                return ""
            self.held, self.is_begun = self.held[begin.end() :], True
        sure = JSON_CHARACTERS.match(self.held)
        assert sure
        self.held = self.held[sure.end() :]
        text: str = json.loads(f'"{sure[0]}"')
        self.decoded.append(text)
        return text

    def is_cut(self) -> bool:
        """Whether the arguments end in the middle."""
        return self.is_begun and parsed("".join(self.pieces)) is None

    def rest(self) -> str:
        """Return what is left of the text at the end.

        Arguments in another form are the text themselves."""
        text, decoded = "".join(self.pieces), "".join(self.decoded)
        value = parsed(text)
        strings = [v for v in as_object(value).values() if isinstance(v, str)]
        if isinstance(as_object(value).get(CUSTOM_ARGUMENT), str):
            text = value[CUSTOM_ARGUMENT]
        elif len(strings) == 1:
            text = strings[0]
        elif self.is_cut():
            return ""
        return text[len(decoded) :] if text.startswith(decoded) else ""


# Codex 0.171 does not try again after these codes, nor after `invalid_prompt`, with
# which it shows the message.
FINAL_CODES = ("context_length_exceeded", "insufficient_quota")


class ModelResponse:
    """A response, as far as the events of its prediction have come."""

    def __init__(
        self,
        object: Json,
        tool_names: Mapping[str, ToolName],
        store: Callable[[Json], bool] = lambda object: False,  # and return whether
    ) -> None:
        self.object = object
        self.output: list[Json] = object["output"]
        self.tool_names = tool_names
        self.store = store
        self.item: Json = {}  # the one being written, the last of the output
        self.type = ITEM_TYPES["message"]  # of it
        self.place: Json = {}  # of its text
        self.texts: list[str] = []  # of it
        self.custom: CustomInput | None = None

    def add(self, event: Event) -> ResponseEvents:
        """Add an event; return the events of the stream that follow from it."""
        match event:
            case Text(text) | Reasoning(text):
                type = "message" if isinstance(event, Text) else "reasoning"
                if not text:
                    return []
                if self.item.get("type") == type:
                    return [self.write(text)]
                return [*self.open(type), self.write(text)]
            case ToolCall(_, call_id, known):
                name = self.tool_names.get(known) or ToolName(known)
                call = {"call_id": call_id, "name": name.name}
                if name.namespace:
                    call["namespace"] = name.namespace
                type = "custom_tool_call" if name.is_custom else "function_call"
                changes = self.open(type, call)
                self.custom = CustomInput() if name.is_custom else None
                return changes
            case Arguments(_, text):
                text = self.custom.decode(text) if self.custom else text
                return [self.write(text)] if text else []
            case Done(reason, usage):
                return self.finish(reason, usage)

    def open(self, type: str, call: Json | None = None) -> ResponseEvents:
        changes = self.close()
        self.type = row = ITEM_TYPES[type]
        self.item = {
            "id": random_id(row.prefix, 48),
            "type": type,
            "status": "in_progress",
        }
        if call:
            self.item |= {row.key: "", **call}
        elif type == "message":
            self.item |= {"role": "assistant", "content": []}
        else:
            self.item |= {"summary": []}
        index = len(self.output)
        self.output.append(self.item)
        self.texts = []
        self.place = {"item_id": self.item["id"], "output_index": index, **row.place}
        added = {"output_index": index, "item": self.item.copy()}
        changes.append(("response.output_item.added", added))
        if row.part:
            part = {**self.place, "part": self.part("")}
            changes.append((f"{row.part_event}.added", part))
        return changes

    def write(self, text: str) -> tuple[str, Json]:
        self.texts.append(text)
        return f"{self.type.event}.delta", {
            **self.place,
            "delta": text,
            **self.type.more,
        }

    def part(self, text: str) -> Json:
        """The part of an item that holds its text."""
        if self.type.part == "output_text":
            return {
                "type": "output_text",
                "annotations": [],
                "logprobs": [],
                "text": text,
            }
        return {"type": self.type.part, "text": text}

    def close(self, status: str = "completed") -> ResponseEvents:
        """End the item that is being written, if there is one."""
        if not self.item:
            return []
        changes, row = [], self.type
        if self.custom and (rest := self.custom.rest()):
            changes.append(self.write(rest))
        if self.custom and self.custom.is_cut():
            status = "incomplete"  # a client might run half of it
        if not (self.texts or row.part):  # clients want arguments in a delta
            changes.append(self.write("" if self.custom else "{}"))
        text = "".join(self.texts)
        done = {**self.place, row.key: text, **row.more}
        if row.part:
            part = self.part(text)
            key = "content" if "content" in self.item else "summary"
            self.item |= {"status": status, key: [part]}
            part_done = {**self.place, "part": part}
            changes += [
                (f"{row.event}.done", done),
                (f"{row.part_event}.done", part_done),
            ]
        else:
            self.item |= {"status": status, row.key: text}
            if not self.custom:
                done["name"] = self.item["name"]
            changes.append((f"{row.event}.done", done))
        item_done = {"output_index": self.place["output_index"], "item": self.item}
        changes.append(("response.output_item.done", item_done))
        self.item, self.custom = {}, None
        return changes

    def finish(self, reason: str, usage: Usage) -> ResponseEvents:
        status = "incomplete" if reason == "length" else "completed"
        changes = [] if self.output else self.open("message")
        changes += self.close(status)
        details = {"reason": "max_output_tokens"} if reason == "length" else None
        self.object |= {
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": details,
            "usage": response_usage(usage),
        }
        # Before its end is sent: the next request may name it.
        self.object["store"] = self.object["store"] and self.store(self.object)
        return [*changes, (f"response.{status}", {"response": self.object})]

    def keep(self) -> None:
        """Store what came of a response that ends early: its items may be named."""
        self.close("incomplete")
        is_kept = self.object["store"] and self.output and self.store(self.object)
        self.object["store"] = bool(is_kept)

    def fail(self, error: APIError) -> ResponseEvents:
        """End it in a way that every client notices; return the last two events.

        OpenAI's clients read the first of them only, and Codex the second. Codex tries
        again unless it knows the code: what was paid for gets one that it knows."""
        details = error.body["error"]
        code = error.code
        if error.status >= 500:
            code = "server_error"
        elif code not in ("rate_limit_exceeded", *FINAL_CODES):
            code = "invalid_prompt"
        message = str(error)
        if code == "rate_limit_exceeded" and "retry-after" in error.headers:
            message += f" Try again in {error.headers['retry-after']}s."
        failure = {"code": code, "message": message}
        self.object |= {"status": "failed", "error": failure}
        self.keep()
        flat = {name: details[name] for name in ("code", "message", "param")}
        return [
            ("error", {**flat, "error": details}),
            ("response.failed", {"response": self.object}),
        ]


class ModelResponseStream:
    """A response as a stream of events, each with its number."""

    def __init__(self, response: ModelResponse) -> None:
        self.response = response
        self.number = 0
        # Held from an event's number until it is written: the watcher writes, too.
        self.lock = threading.Lock()
        # Around the text of a delta, and of which item that is constant.
        self.before, self.after, self.item_id = b"", b"", ""

    def frames(self, events: IndexedEvents) -> Iterator[bytes]:
        """Yield the frames of each event; the first of all wait for an event.

        A text that goes on costs no more than its encoding."""
        response = self.response
        last: type[Event] = Done
        item: Json = {}  # that the text of the last event is of
        for _, event in events:
            with self.lock:
                if isinstance(event, (Text, Reasoning)) and (
                    response.item is item and type(event) is last
                ):
                    response.texts.append(event.text)
                    yield self.delta(event.text)
                    continue
                begin, changes = self.start(), response.add(event)
                yield begin + b"".join([self.frame(*change) for change in changes])
                last = type(event)
                item = response.item if changes else {}

    def start(self) -> bytes:
        """The first two events, once."""
        if self.number:
            return b""
        return self.frame("response.created", {"response": self.response.object}) + (
            self.in_progress()
        )

    def in_progress(self) -> bytes:
        # without the output so far, which clients have from other events
        object = {**self.response.object, "output": []}
        return self.frame("response.in_progress", {"response": object})

    def keep_alive(self) -> bytes:
        """Return what to send in silence: an event, as Codex counts no comments."""
        if not self.lock.acquire(blocking=False):  # its request is about to write
            return b""
        try:
            is_over = self.response.object["status"] != "in_progress"
            return b"" if is_over else self.start() or self.in_progress()
        finally:
            self.lock.release()

    def fail(self, error: APIError) -> bytes:
        begin = self.start()
        changes = self.response.fail(error)
        return begin + b"".join([self.frame(*change) for change in changes])

    def frame(self, type: str, data: Json) -> bytes:
        """Encode an event with its number; what is constant in deltas only once."""
        if "delta" in data:
            if self.item_id != data["item_id"]:
                mark = random_id("", 20)
                marked = self.encode(type, {**data, "delta": mark})
                self.before, _, self.after = marked.partition(encode_json(mark))
                self.item_id = data["item_id"]
            return self.delta(data["delta"])
        self.number += 1
        return self.encode(type, data) + b"%d}\n\n" % (self.number - 1)

    def delta(self, text: str) -> bytes:
        self.number += 1
        end = b"%d}\n\n" % (self.number - 1)
        return self.before + encode_json(text) + self.after + end

    def encode(self, type: str, data: Json) -> bytes:
        """Encode an event up to its number."""
        named = encode_json({"type": type, **data})
        return b'event: %b\ndata: %b,"sequence_number":' % (type.encode(), named[:-1])


# -- Response store ------------------------------------------------------------
#
# Responses that clients want to come back to, in SQLite: in memory, or in a file that
# several processes and later starts share. They are rows under a hash of the key and
# the id, so that nobody finds one without the key that made it, and no key is kept.
# A store that fails costs the storing and a line in the log, not the response.


STORE_SCHEMA = """
PRAGMA foreign_keys = ON;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
PRAGMA journal_size_limit = 1048576;
CREATE TABLE IF NOT EXISTS responses (
    start INTEGER PRIMARY KEY, -- the bytes of all that were stored before
    size INTEGER NOT NULL, -- in bytes, with its items
    created REAL NOT NULL,
    name BLOB NOT NULL UNIQUE,
    body BLOB NOT NULL -- without its output
);
CREATE INDEX IF NOT EXISTS responses_created ON responses (created);
CREATE TABLE IF NOT EXISTS items (
    response INTEGER NOT NULL REFERENCES responses ON DELETE CASCADE,
    is_output INTEGER NOT NULL,
    name BLOB NOT NULL,
    body BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS items_response ON items (response);
CREATE INDEX IF NOT EXISTS items_name ON items (name);
"""

REPORT_INTERVAL = 60.0  # seconds between two lines in the log about a failing store

ITEM_NOT_FOUND = (
    "Item with id '{id}' not found. Items are not persisted when `store` is set to "
    "false, and the oldest make room for new ones. Send the item itself."
)

ITEM_PREFIXES = {"message": "msg_", "function_call": "fc_", "reasoning": "rs_"}


class ResponseStore:
    """Stored responses and their items. The oldest make room for new ones."""

    def __init__(
        self,
        settings: Settings,
        timeouts: Timeouts,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = settings.responses_db
        self.max_bytes = settings.responses_db_bytes
        self.max_age = settings.responses_db_days * 86400.0
        self.max_history = settings.max_body_bytes  # bytes: a client could send no more
        self.timeout = timeouts.store
        self.clock = clock
        self.lock = threading.Lock()
        self.connection: sqlite3.Connection | None = None
        self.is_closed = False
        self.next_report = 0.0
        with suppress(APIError), self.connected():  # a broken file is logged at once
            pass

    def save(self, key: str, response: Json, input_items: Iterable[Json]) -> bool:
        """Store a response under its id; False if it can't be, which is logged.

        An input item without an id gets one; a reference has to be resolved by now.
        """
        if not self.max_bytes:
            return False
        items = [(False, with_id(item)) for item in input_items]
        items += [(True, with_id(item)) for item in response["output"]]
        name = store_name(key, response["id"])
        try:
            body = encode_json({**response, "output": []})
            rows = [
                (is_output, store_name(key, item["id"]), encode_json(item))
                for is_output, item in items
            ]
            size = len(body) + sum(len(item) for *_, item in rows)
            if size > self.max_bytes:
                raise self.failure(f"{size} bytes are more than RESPONSES_DB_BYTES")
            with self.connected() as connection:
                execute = connection.execute
                execute("BEGIN IMMEDIATE")
                now = self.clock()
                execute("DELETE FROM responses WHERE created < ?", [now - self.max_age])
                execute("DELETE FROM responses WHERE name = ?", [name])
                last = "SELECT start + size FROM responses ORDER BY start DESC LIMIT 1"
                [start] = execute(last).fetchone() or [0]
                too_old = start + size - self.max_bytes
                execute("DELETE FROM responses WHERE start < ?", [too_old])
                given = start, size, now, name, body
                execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?)", given)
                add = "INSERT INTO items VALUES (?, ?, ?, ?)"
                connection.executemany(add, ((start, *row) for row in rows))
        except (APIError, RecursionError):  # of items that are as deep as can be read
            return False
        return True

    def find(self, key: str, id: str) -> Json | None:
        """A whole response. Raise APIError (503) if the store can't be read."""
        with self.connected() as connection:
            if not (row := self.select(connection, key, id)):
                return None
            start, _, response = row
            items = select_items(connection, start, True)
        return {**response, "output": self.decode(items)}

    def find_item(self, key: str, id: str) -> bytes | None:
        """The JSON of an item of any response that was stored with the key."""
        newest = (
            "SELECT items.body FROM items JOIN responses ON start = response"
            " WHERE items.name = ? AND created >= ? ORDER BY start DESC LIMIT 1"
        )
        given = store_name(key, id), self.clock() - self.max_age
        with self.connected() as connection:
            row = connection.execute(newest, given).fetchone()
        return bytes(row[0]) if row else None

    def resolve(self, key: str, items: Iterable[Json]) -> list[Json]:
        """Put what is stored in the place of references. Raise APIError: 404, or 400
        for more of it than a conversation may have."""
        resolved, total = [], 0
        found: dict[str, tuple[int, Json]] = {}  # the size of each, and the item
        for index, item in enumerate(items):
            if is_reference(item):
                id, path = str(item.get("id") or ""), f"input[{index}].id"
                if not id:
                    raise missing_parameter(path)
                if id not in found:
                    if not (body := self.find_item(key, id)):
                        raise APIError(404, ITEM_NOT_FOUND.format(id=id), param=path)
                    found[id] = len(body), self.decode([body])[0]
                size, item = found[id]
                total += size
                self.check_size(total, path)
            resolved.append(item)
        return resolved

    def input_items(self, key: str, id: str) -> list[Json] | None:
        """The items that a response was an answer to, without those before them."""
        with self.connected() as connection:
            row = self.select(connection, key, id)
            items = select_items(connection, row[0], False) if row else None
        return None if items is None else self.decode(items)

    def history(self, key: str, id: str) -> list[Json]:
        """The items of a response and of all before it, input and output, in order.

        Raise APIError if a part of them is gone, since the model would not know of it.
        """
        turns: list[list[bytes]] = []
        previous: str | None = id
        total = 0
        with self.connected() as connection:
            while previous:
                if not (row := self.select(connection, key, previous)):
                    raise APIError(
                        400,
                        f"Previous response with id '{previous}' not found. The oldest "
                        "make room for new ones: send the conversation in 'input'.",
                        code="previous_response_not_found",
                        param="previous_response_id",
                    )
                start, size, response = row
                total += size
                self.check_size(total, "previous_response_id")
                turns.append(select_items(connection, start))
                previous = response.get("previous_response_id")
        return self.decode(chain.from_iterable(reversed(turns)))

    def decode(self, bodies: Iterable[bytes]) -> list[Json]:
        """Decode items, when others may use the store again."""
        try:
            return list(map(json.loads, bodies))
        except ValueError as error:
            raise self.failure(error) from error

    def check_size(self, size: int, param: str) -> None:
        require(
            size <= self.max_history,
            f"The conversation has more than {self.max_history} bytes. Send what "
            "matters of it in 'input'.",
            code="context_length_exceeded",
            param=param,
        )

    def delete(self, key: str, id: str) -> bool:
        """Delete a response and its items; False if there is none."""
        is_there = "DELETE FROM responses WHERE name = ? AND created >= ?"
        given = store_name(key, id), self.clock() - self.max_age
        with self.connected() as connection:
            return connection.execute(is_there, given).rowcount > 0

    def close(self) -> None:
        with self.lock:
            self.is_closed = True
            self.disconnect()

    def select(
        self, connection: sqlite3.Connection, key: str, id: str
    ) -> tuple[int, int, Json] | None:
        """Where a response is, its size, and all of it but its output."""
        one = "SELECT start, size, body FROM responses WHERE name = ? AND created >= ?"
        given = store_name(key, id), self.clock() - self.max_age
        row = connection.execute(one, given).fetchone()
        return (row[0], row[1], json.loads(row[2])) if row else None

    @contextmanager
    def connected(self) -> Iterator[sqlite3.Connection]:
        """Inside, a thread has the connection for itself, in a transaction if it begins
        one. A failure is logged and raised as an APIError; a file is then opened anew,
        as someone may have put it right.
        """
        if not self.lock.acquire(timeout=self.timeout):
            raise self.failure("other threads use it for too long")
        try:
            if self.is_closed:
                raise overloaded("is being stopped")
            if self.connection and self.path and not Path(self.path).exists():
                self.disconnect()  # what is put into a file that was removed is lost
            self.connection = self.connection or self.connect()
            with self.connection:
                yield self.connection
        except (sqlite3.Error, OSError, ValueError) as error:
            if self.path:
                self.disconnect()
            raise self.failure(error) from error
        finally:
            self.lock.release()

    def connect(self) -> sqlite3.Connection:
        if self.path:
            Path(self.path).touch(0o600)  # what was said is for nobody else to read
        connection = sqlite3.connect(
            self.path or ":memory:",
            timeout=self.timeout,
            isolation_level=None,  # no BEGIN but our own
            check_same_thread=False,
        )
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                connection.executescript(STORE_SCHEMA)
                return connection
            except sqlite3.Error as error:
                # SQLite itself does not wait where two turn to a WAL at once
                if "locked" not in str(error) or time.monotonic() > deadline:
                    connection.close()
                    raise
                time.sleep(0.01)

    def disconnect(self) -> None:
        if self.connection:
            self.connection.close()
        self.connection = None

    def failure(self, problem: object) -> APIError:
        """What to raise. It is logged too, but not for each request in a storm."""
        if time.monotonic() >= self.next_report:
            self.next_report = time.monotonic() + REPORT_INTERVAL
            log.error(LogRow(event="response_store_failed", error=problem))
        return overloaded("can't use the responses that it stores")


def store_name(key: str, id: str) -> bytes:
    """What a response or an item is found by."""
    return sha256(encode_json([key, id])).digest()


def select_items(
    connection: sqlite3.Connection, response: int, is_output: bool | None = None
) -> list[bytes]:
    """The items of a response, as JSON: its input, its output, or both."""
    rows = connection.execute(
        "SELECT body FROM items WHERE response = ? AND is_output = ifnull(?, is_output)"
        " ORDER BY rowid",
        [response, is_output],
    )
    return [body for (body,) in rows]


def is_reference(item: Json) -> bool:
    """Whether it names an item: by its type, or by being nothing but an id."""
    kind = item.get("type")
    is_bare = "id" in item and item.keys() <= {"type", "id"}
    return kind == "item_reference" or (kind is None and is_bare)


def with_id(item: Json) -> Json:
    """An item as OpenAI lists it: with an id, and a message with parts of content."""
    kind, id, content = item.get("type") or "message", item.get("id"), {}
    if not isinstance(id, str) or not id:
        id = random_id(ITEM_PREFIXES.get(kind, "item_"), 48)
    if isinstance(text := item.get("content"), str):
        part: Json = {"type": "input_text"}
        if item.get("role") == "assistant":
            part = {"type": "output_text", "annotations": []}
        content = {"content": [{**part, "text": text}]}
    return {"id": id, "type": kind, **without(item, ("id", "type")), **content}


# -- Images --------------------------------------------------------------------


class Image(NamedTuple):
    url: str  # at Replicate, or a data: URL
    base64: str  # "" if the client fetches it
    type: str  # its media type


def find_files(output: Any, kind: str, is_trusted: Callable[[str], bool]) -> list[str]:
    """The links and data: URLs of files in an output, in their order.

    Left out, where something stays, is what has the name of a file that is no `kind`
    (image or audio), and what is not at Replicate, such as a link of the client's own.
    """
    urls = list_urls(output)
    named = [url for url in urls if (guess_type(url)[0] or kind).startswith(kind)]
    theirs = [url for url in named or urls if is_trusted(url)]
    return theirs or named or urls


def list_urls(output: Any, depth: int = 10) -> list[str]:
    if isinstance(output, str):
        is_url = LINK.fullmatch(output) or output[:5].lower() == "data:"
        return [output] if is_url else []
    inside = output.values() if isinstance(output, dict) else as_list(output)
    return [url for each in inside if depth for url in list_urls(each, depth - 1)]


def image_list(images: Sequence[Image], created: int) -> Json:
    rows = [
        {"b64_json": image.base64} if image.base64 else {"url": image.url}
        for image in images
    ]
    formats = {image.type.removeprefix("image/") for image in images if image.base64}
    known = {"output_format": formats.pop()} if len(formats) == 1 else {}
    return {"created": created, "data": rows, **known}


# Replicate counts no tokens of images; OpenAI's clients want the keys.
NO_IMAGE_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


def image_event(
    kind: str, image: Image, body: Json, created: int, given: Collection[str]
) -> bytes:
    """The event that ends an image: `kind` is image_generation or image_edit.

    It says again what was `given` to the model, and "auto" for the rest."""
    type = f"{kind}.completed"
    data = {
        "type": type,
        "b64_json": image.base64,
        "created_at": created,
        "size": "auto",  # which was asked for need not be what came
        **{
            name: body[name] if name in given else "auto"
            for name in ("quality", "background")
        },
        "output_format": image.type.removeprefix("image/"),
        "usage": NO_IMAGE_USAGE,
    }
    return f"event: {type}\n".encode() + sse_frame(data)


# -- Embeddings ----------------------------------------------------------------


Vector = list[float]


def read_vectors(output: Any, depth: int = 10) -> list[Vector]:
    """The vectors in an output: a list of numbers is one. Raise ValueError."""
    if isinstance(output, dict):
        named = [output[n] for n in VECTOR_NAMES if isinstance(output.get(n), list)]
        return read_vectors(named[0] if named else None, depth)
    if not isinstance(output, list) or not output:
        raise ValueError("no list")
    if depth == 0:
        raise ValueError("too deep")
    if {*map(type, output)} <= {int, float}:
        if not sum(map(abs, output)) <= MAX_FLOAT:  # so that NaN is none either
            raise ValueError("no floats")
        return [output]
    return [vector for each in output for vector in read_vectors(each, depth - 1)]


MAX_FLOAT = 3.4e38  # of 32 bits
VECTOR_NAMES = ("embedding", "embeddings", "vector", "vectors", "output")


def embedding_list(
    vectors: Sequence[Vector], encoding: str, model: str, usage: Usage
) -> Json:
    """Base64 is that of 32-bit floats, the least byte first."""

    def encode(vector: Vector) -> Vector | str:
        if encoding == "float":
            return vector
        return b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()

    rows = [
        {"object": "embedding", "index": index, "embedding": encode(vector)}
        for index, vector in enumerate(vectors)
    ]
    tokens = usage.prompt_tokens
    counts = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": rows, "model": model, "usage": counts}


# -- Audio ---------------------------------------------------------------------


class Transcript(NamedTuple):
    text: str
    segments: list[Json] = []  # with start, end and text at least
    words: list[Json] = []
    language: str = ""  # its English name
    duration: float = 0  # in seconds, up to the last word


TEXT_NAMES = ("transcription", "text", "transcript", "output")  # in objects


def read_transcript(output: Any, is_translation: bool, by_word: bool) -> Transcript:
    """What a model heard, in any of the forms that models give it. Raise ValueError."""
    found = as_object(output)
    listed = found.get("segments", found.get("chunks", output))
    rows = [as_object(row) for row in as_list(listed)]
    texts = [found[name] for name in TEXT_NAMES if isinstance(found.get(name), str)]
    if isinstance(output, str):
        texts = [output]
    elif isinstance(output, list) and not any(rows):
        texts = [output_text(output)]
    elif not texts and isinstance(listed, list):
        texts = [" ".join(str(row.get("text") or "").strip() for row in rows).strip()]
    if not texts:
        raise ValueError("no text")
    text = texts[0].strip()
    segments = [segment for row in rows if (segment := read_segment(row))]
    words = [
        {"word": str(word["word"]).strip(), "start": word["start"], "end": word["end"]}
        for row in rows
        for word in map(as_object, as_list(row.get("words")))
        if "word" in word and all(is_number(word.get(n)) for n in ("start", "end"))
    ]
    by_chunk = by_word and "chunks" in found  # each of which is one word
    if by_chunk:
        words = [
            {"word": row["text"].strip(), "start": row["start"], "end": row["end"]}
            for row in segments
        ]
    is_extra = is_translation and isinstance(found.get("translation"), str)
    if is_extra:  # it stands beside segments that are not translated
        text, words = found["translation"].strip(), []
    end = max((segment["end"] for segment in segments), default=0)
    if segments and (by_chunk or is_extra):
        segments = [{"start": segments[0]["start"], "end": end, "text": text}]
    named = str(found.get("detected_language") or found.get("language") or "")
    return Transcript(text, segments, words, language_name(named), end)


def language_name(language: str) -> str:
    """Its English name as in OpenAI's verbose_json; "" stays so."""
    return LANGUAGES.get(find_language(language, {}), language.lower())


def read_segment(row: Json) -> Json | None:
    """A segment with its times as numbers; None for what is none."""
    times = as_list(row.get("timestamp")) or [row.get("start"), row.get("end")]
    start, end = [*times, None, None][:2]
    if not is_number(start) or not isinstance(row.get("text"), str):
        return None
    return {**row, "start": start, "end": end if is_number(end) else start}


def segment_object(index: int, segment: Json) -> Json:
    """With all keys, as the AI SDK demands them (openai-transcription-api.ts)."""
    zeros = dict.fromkeys(
        ("temperature", "avg_logprob", "compression_ratio", "no_speech_prob"), 0.0
    )
    known = {"id": index, "seek": 0, "start": 0.0, "end": 0.0, "text": "", "tokens": []}
    known |= zeros
    return known | {name: segment[name] for name in known if segment.get(name)}


def verbose_transcription(transcript: Transcript, task: str, language: str) -> Json:
    rows = [segment_object(*pair) for pair in enumerate(transcript.segments)]
    words = {"words": transcript.words} if transcript.words else {}
    return {
        "task": task,
        "language": language,
        "duration": transcript.duration,
        "text": transcript.text,
        "segments": rows,
        **words,
        "usage": {"type": "duration", "seconds": ceil(transcript.duration)},
    }


def subtitles(transcript: Transcript, format: str) -> str:
    """The text of an SRT or WebVTT file."""
    mark = "," if format == "srt" else "."
    cues = []
    for number, segment in enumerate(transcript.segments, 1):
        first = f"{number}\n" if format == "srt" else ""
        start, end = (subtitle_time(segment[name], mark) for name in ("start", "end"))
        text = re.sub(r"\s*\n\s*", "\n", segment["text"].strip().replace("-->", "->"))
        cues.append(f"{first}{start} --> {end}\n{text}\n\n")
    return ("" if format == "srt" else "WEBVTT\n\n") + "".join(cues)


def subtitle_time(seconds: float, mark: str) -> str:
    milliseconds = max(0, round(seconds * 1000))
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}{mark}{rest % 1000:03}"


# OpenAI's formats of speech by their media types.
SOUNDS = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}


def pcm_of(wav: bytes) -> bytes | None:
    """What follows the head of a WAV file if that is OpenAI's pcm, else None."""
    is_pcm = wav[20:36] == struct.pack("<HHIIHH", 1, 1, PCM_RATE, 2 * PCM_RATE, 2, 16)
    at = wav.find(b"data", 36)
    return wav[at + 8 :] if is_pcm and at >= 0 else None


# -- Model objects -------------------------------------------------------------


def model_object(id: str, ref: str, created: int) -> Json:
    owner = ref.removeprefix("deployments/").partition("/")[0]
    return {"id": id, "object": "model", "created": created, "owned_by": owner}


# ==== 7. SERVING ==============================================================


# -- Generation ----------------------------------------------------------------
#
# The predictions of one request, and the response made of their events. Several
# choices run side by side, up to eight threads at a time. An answer that is not what
# the client asked for (a tool call, JSON) is asked for once more, as long as nothing
# of it was sent.

MAX_PARALLEL_PREDICTIONS = 8  # of one request

KEEP_ALIVE = b": keep-alive\n\n"  # that very word: `: ping` breaks a client


class Proxy(NamedTuple):
    """What lasts as long as the server."""

    settings: Settings
    models: ModelsFile
    upstream: Upstream
    response_store: ResponseStore
    metrics: Metrics


@dataclass(eq=False)
class Request:
    """What a client asks for, and what is known of it while it is served."""

    method: str
    path: str  # without the query
    headers: Mapping[str, str]  # names in lower case
    body: bytes = b""
    query: str = ""
    held: int = 0  # bytes of its body that count as in flight
    cancellation: Cancellation = field(default_factory=Cancellation)
    log: RequestLog = field(default_factory=RequestLog)


STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # or nginx would hold the tokens back
}


class EventStream(NamedTuple):
    """A body that is written while it comes into being: nothing is, before `run`."""

    run: Callable[[Callable[[bytes], None]], None]  # with the writer's `write`
    error: Callable[[APIError], bytes]  # the last frames of one that fails; b"": none
    keep_alive: Callable[[], bytes] = lambda: KEEP_ALIVE  # what is sent in silence
    headers: Mapping[str, str] = STREAM_HEADERS  # as they are when the first is written


class Response(NamedTuple):
    body: Json | bytes | EventStream | None
    status: int = 200
    headers: Mapping[str, str] = {}


Item = TypeVar("Item")

# Starts some work; inside, what it yields, and after, nothing of it runs on.
Job = Callable[[Cancellation], AbstractContextManager[Iterable[Item]]]


@contextmanager
def start_side_by_side(
    jobs: Sequence[Job[Item]], cancellation: Cancellation
) -> Iterator[Iterable[tuple[int, Item]]]:
    """Run jobs; inside, what they yield as it comes, each with the index of its job.

    The first error, or a cancellation, ends all of them at once. Nobody waits for
    their threads: each cancels its prediction as soon as it knows of one, and the end
    of the server waits for that.
    """
    if len(jobs) == 1:
        with jobs[0](cancellation) as items:
            yield zip(repeat(0), items)  # noqa: B905
        return
    waiting = iter([*enumerate(jobs)])  # of which each thread takes the next
    threads = min(len(jobs), MAX_PARALLEL_PREDICTIONS)
    arrivals: SimpleQueue[tuple[int, Item] | Exception | None] = SimpleQueue()
    branch = Cancellation()

    def run() -> None:
        try:
            for index, job in waiting:
                with job(branch) as items:
                    for item in items:
                        arrivals.put((index, item))
            arrivals.put(None)
        except Exception as error:
            arrivals.put(error)

    def stop() -> None:
        cause = cancellation.cause or ClientDisconnected()
        branch.cancel(cause)
        arrivals.put(cause)

    def arrived() -> Iterator[tuple[int, Item]]:
        running = threads
        while running:
            item = arrivals.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item

    try:
        with cancellation.on_cancel(stop):
            for _ in range(threads):
                work = partial(copy_context().run, run)
                threading.Thread(target=work, name="predictions", daemon=True).start()
            yield arrived()
    finally:
        branch.cancel(ClientDisconnected())


@contextmanager
def start_predictions(
    proxy: Proxy,
    request: Request,
    inputs: Sequence[PredictionInput],
    read: Callable[[Prediction, Cancellation], Generator[Item, None, None]],
    *,
    wait: bool = True,
) -> Iterator[Iterable[tuple[int, Item]]]:
    """Create predictions; inside, what is read of each; after, none runs on."""
    upstream, cancellation = proxy.upstream, request.cancellation

    @contextmanager
    def start(
        prediction_input: PredictionInput, cancellation: Cancellation
    ) -> Iterator[Iterator[Item]]:
        with (
            upstream.start(
                prediction_input, cancellation, request.log, wait=wait
            ) as prediction,
            closing(read(prediction, cancellation)) as items,
        ):
            yield items

    cache = upstream.upload_cache
    uploaded = [
        upload_large_files(each, cache, cancellation, has_urls=False) for each in inputs
    ]
    jobs = [partial(start, each) for each in uploaded]
    with start_side_by_side(jobs, cancellation) as items:
        yield items


class Generation(NamedTuple):
    """The choices of a request for text: `n` of each input."""

    proxy: Proxy
    request: Request
    body: Json  # checked
    inputs: list[PredictionInput]
    toolbox: Toolbox | None = None
    format: ResponseFormat | None = None
    # From an answer and what to do about it to the input of another try.
    build_retry: Callable[[str, str], PredictionInput] | None = None
    echo: bool = False  # the prompt comes before the answer

    def respond(
        self,
        id_prefix: str,
        build_object: Callable[[list[Choice], Usage, CompletionInfo], Json],
        build_stream: Callable[[IndexedEvents, CompletionInfo, int], Iterator[bytes]],
    ) -> Response:
        """Respond with the whole, or with a stream that makes it when it is run.

        By then its writer is watched, and sends a sign of life while nothing comes.
        """
        options = self.body["stream_options"]
        info = CompletionInfo(
            id=random_id(id_prefix, 29),
            created=int(time.time()),
            model=self.body["model"],
            include_usage=bool(options.get("include_usage")),
            continuous_usage=bool(options.get("continuous_usage_stats")),
            prompt_tokens=self.body["n"]
            * sum(estimate_tokens(len(i.prompt)) for i in self.inputs),
            legacy=bool(self.toolbox and self.toolbox.legacy),
        )

        def run(write: Callable[[bytes], None]) -> None:
            with self.start() as events:
                for frames in build_stream(events, info, self.choices):
                    write(frames)

        if self.body["stream"]:
            return Response(EventStream(run, completion_error))
        with self.start() as events:
            return Response(build_object(*fold_choices(events), info))

    @property
    def choices(self) -> int:
        return len(self.inputs) * int(self.body["n"])

    @contextmanager
    def start(self) -> Iterator[IndexedEvents]:
        """Create the predictions; inside, their events come; after, none runs on."""
        cancellation, model = self.request.cancellation, self.inputs[0].model
        self.request.log.ref = (
            f"{model.ref}; default" if model.is_default else model.ref
        )
        self.request.log.prompts = [each.prompt for each in self.inputs]
        uploaded = [self.upload(each, cancellation) for each in self.inputs]
        jobs = [
            partial(self.start_choice, each, offset)
            for each in uploaded
            for offset in range(self.body["n"])
        ]
        with start_side_by_side(jobs, cancellation) as events:
            yield events

    def upload(
        self, prediction_input: PredictionInput, cancellation: Cancellation
    ) -> PredictionInput:
        cache = self.proxy.upstream.upload_cache
        return upload_large_files(prediction_input, cache, cancellation)

    @contextmanager
    def start_choice(
        self,
        prediction_input: PredictionInput,
        offset: int,  # among the choices of the same input
        cancellation: Cancellation,
    ) -> Iterator[Events]:
        seeded = with_seed(prediction_input, offset)
        with self.start_prediction(seeded, cancellation) as (events, cancel):
            if self.toolbox or self.format:
                events = self.with_retry(events, cancel, offset, cancellation)
            if self.echo:
                events = echo(events, prediction_input.prompt)
            yield events

    @contextmanager
    def start_prediction(
        self, prediction_input: PredictionInput, cancellation: Cancellation
    ) -> Iterator[tuple[Events, Callable[[], None]]]:
        """Create a prediction; inside, its events, and what ends it early.

        After, it is over or cancelled."""
        upstream, log = self.proxy.upstream, self.request.log
        limit = self.body["max_completion_tokens"] or self.body["max_tokens"]
        if limit == 0:  # no text is wanted, so no model has to run
            asked = estimate_tokens(len(prediction_input.prompt))
            usage = Usage(asked, 0, is_estimate=True)
            log.usages.append(usage)
            end = (done for done in [Done("length", usage)])
            yield end, end.close
            return
        wait = not self.body["stream"]
        with (
            upstream.start(
                prediction_input, cancellation, log, wait=wait
            ) as prediction,
            closing(prediction.events()) as events,
        ):
            yield self.shape(events, prediction), prediction.cancel

    def shape(self, events: Events, prediction: Prediction) -> Events:
        """What the client asked for and the model can't do, step by step.

        Reasoning comes before all else, and the token that ends a turn is no text; a
        model's own limit is a length of its text; stop strings are looked for in what
        the client reads, not in tags, fences or calls; and what was sent in the end is
        counted."""
        prediction_input = prediction.prediction_input
        if "messages" in self.body:
            omits, stream = prediction_input.omits_think, self.body["stream"]
            holds, may_call = omits and not stream, bool(self.toolbox)
            events = split_reasoning(events, omits, holds, may_call)
        events = drop_end_token(events)
        if prediction_input.cut:
            events = cut_after(events, prediction_input.cut)
        if self.toolbox:
            events = extract_tool_calls(events, self.toolbox, self.body["stream"])
        if self.format:
            events = extract_json(events, self.format)
        if stops := list(filter(None, self.body["stop"])):
            called = self.toolbox.called if self.toolbox else "stop"
            events = stop_at(events, stops, called)
        return with_usage(events, prediction)

    def with_retry(
        self,
        events: Events,
        cancel: Callable[[], None],
        offset: int,
        cancellation: Cancellation,
    ) -> Events:
        """Hold an answer for as long as another may have to take its place.

        Not held is what is streamed: text where no call has to be made, and what
        follows the first call. A second try that fails leaves the first answer,
        which is paid for.
        """
        must_call = bool(self.toolbox and self.toolbox.must_call)
        is_sent = self.body["stream"] and not must_call
        seen: list[Event] = []
        sent = 0
        for event in events:
            seen.append(event)
            is_sent = is_sent or (self.body["stream"] and isinstance(event, ToolCall))
            if is_sent:
                yield from seen[sent:]
                sent = len(seen)
        answer, usage = fold(seen)
        why = self.complaint(answer)
        if why and not sent and self.build_retry and answer.finish_reason != "length":
            cancel()  # it may go on behind what was wanted of it
            log.warning(LogRow(event="retry", why=loggable(why)))
            self.proxy.metrics.add(1, "retries_total")
            try:
                again = self.build_retry(self.render(answer), self.instruction(why))
                again = self.upload(with_seed(again, offset), cancellation)
                with self.start_prediction(again, cancellation) as (others, _):
                    second = list(others)
            except Exception as error:
                cancellation.check()
                reason = loggable(str(as_api_error(error)))
                log.warning(LogRow(event="retry_failed", why=reason))
            else:
                better, more = fold(second)
                if better.calls or all(self.call_errors(answer)):
                    seen, answer, why = second, better, self.complaint(better)
                seen[-1] = Done(answer.finish_reason, sum_usage([usage, more]))
        if why:
            log.warning(LogRow(event="misfit", why=loggable(why)))
        yield from seen[sent:]

    def render(self, answer: Choice) -> str:
        """An answer as the model could have written it."""
        message = {"role": "assistant", "content": answer.text}
        rendered = render_calls({**message, "tool_calls": [*answer.calls]})
        return text_of(rendered["content"])

    def instruction(self, why: str) -> str:
        if self.toolbox:
            return retry_call_instructions(self.toolbox, why)
        assert self.format
        return retry_json_instructions(self.format, why)

    def complaint(self, answer: Choice) -> str:
        """What is wrong with an answer, in a sentence; "" if it is as asked for."""
        if self.toolbox and self.toolbox.must_call and not answer.calls:
            return "no tool was called."
        if self.format and not answer.calls:
            return parsed_or_why(answer.text, self.format)[1]
        return next(filter(None, self.call_errors(answer)), "")

    def call_errors(self, answer: Choice) -> list[str]:
        """What is wrong with each call; "" if nothing is."""
        functions = [call["function"] for call in answer.calls]
        return [
            tool_call_error(function["name"], function["arguments"], self.toolbox)
            for function in functions
            if self.toolbox
        ]


# -- Endpoints -----------------------------------------------------------------
#
# One function per OpenAI operation, under OpenAI's name for it, and one row per
# method and path. To add one: a row in ENDPOINTS, and its function. No socket is in it.


DEMO_TOKEN, DEMO_KEY = "r8_demo", "demo"  # with --demo; nobody's at Replicate

PAGE_FILE = HERE / "playground.html"
KEYS_OF_PAGE = "one of those in PROXY_API_KEY"  # what the file says are taken
HTML_TYPES = re.compile(r"text/(html|\*)|\*/\*")

# The page runs its own script and no other, talks to this server alone, and shows
# Replicate's files. Its script can make no HTML of a text, whatever a model says.
PAGE_POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; "
    "img-src data: blob: https://replicate.delivery https://*.replicate.delivery; "
    "media-src data: blob: https://replicate.delivery https://*.replicate.delivery; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)


def show_page(proxy: Proxy, request: Request) -> Response:
    accept, settings = request.headers.get("accept", ""), proxy.settings
    wants_json = "application/json" in accept and not HTML_TYPES.search(accept)
    # Whoever embeds the proxy need not have copied the page.
    if wants_json or not PAGE_FILE.exists():
        raise unknown_url(request.method, request.path)
    if settings.replicate_api_token == DEMO_TOKEN:
        return read_page(f"“{DEMO_KEY}”, the demo’s own", DEMO_KEY)
    kinds = [KEYS_OF_PAGE] if settings.api_keys and proxy.upstream.api.token else []
    if settings.client_tokens:
        kinds.append(OWN_TOKEN)
    return read_page(", or ".join(kinds))


@lru_cache(2)
def read_page(keys: str, demo_key: str = "") -> Response:
    """The page and its headers; it says which keys are taken, and holds the demo's."""
    html = PAGE_FILE.read_text(encoding="utf-8")
    inline = {}
    for tag in ("script", "style"):
        [text] = re.findall(f"<{tag}>(.*)</{tag}>", html, re.DOTALL)
        inline[tag] = f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
    html = html.replace(KEYS_OF_PAGE, keys)
    if demo_key:
        html = html.replace('id="key"', f'id="key" value="{demo_key}"')
    headers = {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": PAGE_POLICY.format(**inline),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-store",
        **dict.fromkeys(CORS, ""),
    }
    return Response(html.encode(), headers=headers)


def check_health(proxy: Proxy, request: Request) -> Response:
    return Response({"status": "ok", "version": __version__})


def list_models(proxy: Proxy, request: Request) -> Response:
    models = proxy.models.current()
    rows = dict(models.mappings)
    slugs = proxy.settings.collections if proxy.upstream.api.token else []
    for slug in slugs:  # all are read at once
        proxy.upstream.collections.begin(slug)
    for slug in slugs:
        for ref in proxy.upstream.collections.find(slug) or []:
            rows.setdefault(ref, ref)
    data = [model_object(*row, models.created) for row in rows.items()]
    return Response({"object": "list", "data": data})


def retrieve_model(proxy: Proxy, request: Request, id: str) -> Response:
    models = proxy.models.current()
    try:
        model = find_model(replace(models, default_model=None), id)
    except APIError as error:
        error.param = "model"
        raise
    return Response(model_object(id, model.ref, models.created))


def create_chat_completion(proxy: Proxy, request: Request, model: str = "") -> Response:
    body = parse_body(request, CHAT, model)
    generation = generate_chat(proxy, request, body)
    return generation.respond("chatcmpl-", chat_completion, chat_stream)


def generate_chat(proxy: Proxy, request: Request, body: Json) -> Generation:
    """What is to be run for a body that has passed chat's table."""
    body["messages"] = parse_messages(body["messages"])
    toolbox, format = parse_toolbox(body), parse_response_format(body)
    check_schema_sizes(toolbox, format)
    chosen = find_model(proxy.models.current(), body["model"])
    kinds = {kind for kind, _ in attachments(body["messages"])}
    family = family_for(chosen, body, kinds, proxy.upstream.schemas)
    body["messages"] = fit_attachments(body["messages"], chosen, family)
    body = with_tools_and_format(body, family, toolbox, format)
    return Generation(
        proxy,
        request,
        body,
        [build_chat_input(body, chosen, family)],
        toolbox,
        format,
        partial(build_retry_input, body, chosen, family),
    )


def create_completion(proxy: Proxy, request: Request, model: str = "") -> Response:
    body = without(parse_body(request, COMPLETION, model), ("messages",))
    predictions = len(body["prompt"]) * body["n"]  # each of which is paid for
    require(
        predictions <= MAX_PREDICTIONS,
        f"Invalid 'prompt': it makes {predictions} predictions with its 'n', and a "
        f"call may make {MAX_PREDICTIONS}. Send fewer prompts at once.",
        code="array_above_max_length",
        param="prompt",
    )
    chosen = find_model(proxy.models.current(), body["model"])
    family = family_for(chosen, body, set(), proxy.upstream.schemas)
    inputs = [
        build_completion_input(body, chosen, family, prompt)
        for prompt in body["prompt"]
    ]
    generation = Generation(proxy, request, body, inputs, echo=body["echo"])
    return generation.respond("cmpl-", text_completion, text_stream)


def create_response(proxy: Proxy, request: Request, model: str = "") -> Response:
    asked, items, chat = parse_response_request(proxy, request, model)
    failing = partial(response_errors, request, chat)
    with failing():
        generation = generate_chat(proxy, request, check_body(chat.body, CHAT))

    def store(object: Json) -> bool:
        return proxy.response_store.save(key_of(request), object, items)

    response = ModelResponse(response_object(asked), chat.tool_names, store)
    stream = ModelResponseStream(response)

    def run(write: Callable[[bytes], None]) -> None:
        try:
            with failing(), generation.start() as events:
                for frames in stream.frames(events):
                    write(frames)
        except ClientDisconnected:  # who goes on from what was seen of it
            if response.object["status"] == "in_progress":
                response.object["status"] = "cancelled"
                response.keep()
            raise

    if generation.body["stream"]:
        return Response(EventStream(run, stream.fail, stream.keep_alive))
    with failing(), generation.start() as events:
        for _, event in events:
            response.add(event)
    return Response(response.object)


def count_input_tokens(proxy: Proxy, request: Request, model: str = "") -> Response:
    """An estimate: Replicate counts no tokens before it runs a model."""
    _, _, chat = parse_response_request(proxy, request, model)
    with response_errors(request, chat):
        generation = generate_chat(proxy, request, check_body(chat.body, CHAT))
    count = ceil(len(generation.inputs[0].prompt) / CHARACTERS_PER_TOKEN)
    return Response({"object": "response.input_tokens", "input_tokens": count})


def parse_response_request(
    proxy: Proxy, request: Request, model: str
) -> tuple[Json, list[Json], ChatRequest]:
    """Return the body as it came, its items, and all of it in the terms of chat."""
    asked = read_body(request, model)
    body = check(asked, RESPONSE)
    store, key = proxy.response_store, key_of(request)
    items = store.resolve(key, input_items(body))
    previous = body["previous_response_id"]
    history = store.history(key, previous) if previous else []
    return asked, items, build_chat_request(body, history, items)


@contextmanager
def response_errors(request: Request, chat: ChatRequest) -> Iterator[None]:
    """Raise errors in the terms of a request for a response.

    Codex sends a request 30 times that is answered with any 5xx, and does not know
    x-should-retry: what may have cost money, or won't get better, is a 400 (0.171).
    """
    try:
        yield
    except ClientDisconnected:
        raise
    except Exception as caught:
        error = as_api_error(caught)
        message, status = str(error), error.status
        param = chat.param(error.param) if error.param else None
        if param:
            message = message.replace(f"'{error.param}", f"'{param}")
        headers = error.headers
        if request.log.predictions:
            headers = {**headers, **NO_RETRY}
        if status >= 500 and headers.get("x-should-retry") == "false":
            status = 400
        raise APIError(
            status,
            message,
            code=error.code,
            param=param,
            headers=headers,
            detail=error.detail,
        ) from None


def create_image(proxy: Proxy, request: Request, model: str = "") -> Response:
    return respond_with_images(proxy, request, TASKS["generation"], model)


def create_image_edit(proxy: Proxy, request: Request, model: str = "") -> Response:
    return respond_with_images(proxy, request, TASKS["edit"], model)


def create_image_variation(proxy: Proxy, request: Request, model: str = "") -> Response:
    return respond_with_images(proxy, request, TASKS["variation"], model)


BASE64_MODELS = re.compile("(openai/)?(chat)?gpt-image", re.IGNORECASE)


def respond_with_images(
    proxy: Proxy, request: Request, task: Task, model: str
) -> Response:
    body, inputs, _ = parse_task_request(proxy, request, task, model)
    is_streamed, created = body["stream"], int(time.time())
    default = "b64_json" if BASE64_MODELS.match(body["model"]) else "url"
    wants_url = not is_streamed and (body["response_format"] or default) == "url"
    api = proxy.upstream.api

    def read(
        prediction: Prediction, cancellation: Cancellation
    ) -> Generator[Image, None, None]:
        urls = find_files(prediction.wait_until_done(), "image", api.has_file)
        if wants_url and not all(map(LINK.fullmatch, urls)):
            prediction.refresh()  # only the response to a create has data: URLs
            output = prediction.record.get("output")
            urls = find_files(output, "image", api.has_file)
        if not urls:
            raise no_output("an image", prediction)
        if len(urls) != prediction.prediction_input.expected:
            prediction.log_event("unexpected", f"{len(urls)} images", logging.WARNING)
        for index, url in enumerate(urls):
            api.check_file_host(url)
            if not wants_url:
                content = api.fetch_file(url, cancellation)
            elif index == 0:  # a look at the first tells what the model makes
                content = api.fetch_start(url, cancellation)
            else:
                content = b""
            type = media_type(content)
            if (content or not wants_url) and not type.startswith("image/"):
                raise no_output("an image", prediction, type, url)
            base64 = "" if wants_url else b64encode(content).decode()
            yield Image(url, base64, type)

    def run(write: Callable[[bytes], None]) -> None:
        kind = "image_edit" if "image" in task.params else "image_generation"
        given = inputs[0].names.values()
        with start_predictions(proxy, request, inputs, read) as images:
            for _, image in images:
                write(image_event(kind, image, body, created, given))

    if is_streamed:
        return Response(EventStream(run, lambda error: sse_frame(error.body)))
    with start_predictions(proxy, request, inputs, read) as images:
        return Response(image_list(in_order(images), created))


def in_order(items: Iterable[tuple[int, Item]]) -> list[Item]:
    return [item for _, item in sorted(items, key=itemgetter(0))]


def create_embedding(proxy: Proxy, request: Request, model: str = "") -> Response:
    task = TASKS["embedding"]
    body, inputs, _ = parse_task_request(proxy, request, task, model)
    sizes = set(filter(None, [body["dimensions"]]))

    def read(
        prediction: Prediction, cancellation: Cancellation
    ) -> Generator[Vector, None, None]:
        output = prediction.wait_until_done()
        count = prediction.prediction_input.expected
        vectors: list[Vector] = []
        with suppress(ValueError):
            vectors = read_vectors(output)
        sizes.update(map(len, vectors))
        if len(vectors) != count or len(sizes) > 1:
            wanted = "one vector for each text, all of one size"
            raise no_output(wanted, prediction)
        yield from vectors

    with start_predictions(proxy, request, inputs, read) as found:
        vectors = in_order(found)
    tokens = sum(estimate_tokens(len(text)) for text in body["input"])
    usage = Usage(tokens, 0, is_estimate=True)
    request.log.usages = [usage]
    encoding = body["encoding_format"]
    return Response(embedding_list(vectors, encoding, body["model"], usage))


def create_speech(proxy: Proxy, request: Request, model: str = "") -> Response:
    body, inputs, _ = parse_task_request(proxy, request, TASKS["speech"], model)
    api, format = proxy.upstream.api, body["response_format"]
    names = inputs[0].names.items()
    asked = [inputs[0].input[name] for name, own in names if own == "response_format"]
    is_raw = asked == ["pcm"]
    headers: dict[str, str] = {}

    def read(
        prediction: Prediction, cancellation: Cancellation
    ) -> Generator[bytes, None, None]:
        """Yield a file as it is fetched, its type in the headers by then."""
        urls = find_files(prediction.wait_until_done(), "audio", api.has_file)
        if not urls:
            raise no_output("a sound", prediction)
        for is_last in (False, True):  # it is paid for
            try:
                with api.open_file(urls[0], cancellation) as pieces:
                    yield begin(pieces, prediction, urls[0])
                    yield from pieces
                    return
            except APIError as error:
                cancellation.check()
                if headers or is_last or not is_broken_off(error):
                    raise

    def begin(pieces: Iterator[bytes], prediction: Prediction, url: str) -> bytes:
        """Return what a file begins with, when it is known to be a sound."""
        start = take_start(pieces)
        type = media_type(start) or ("audio/pcm" if is_raw and start else "")
        if not type.startswith("audio/"):
            raise no_output("a sound", prediction, type, url)
        if format == "pcm" and (samples := pcm_of(start)) is not None:
            start, type = samples, "audio/pcm"
        check_sound(format, type, url)
        headers["content-type"] = type
        return start

    def run(write: Callable[[bytes], None]) -> None:
        with start_predictions(proxy, request, inputs, read) as pieces:
            for _, piece in pieces:
                write(piece)

    def run_events(write: Callable[[bytes], None]) -> None:
        with start_predictions(proxy, request, inputs, read) as pieces:
            for _, piece in pieces:
                audio = b64encode(piece).decode()
                write(sse_frame({"type": "speech.audio.delta", "audio": audio}))
        usage = dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), 0)
        write(sse_frame({"type": "speech.audio.done", "usage": usage}))

    if body["stream_format"] == "sse":
        return Response(EventStream(run_events, lambda error: sse_frame(error.body)))
    return Response(EventStream(run, lambda error: b"", lambda: b"", headers))


def check_sound(format: str | None, type: str, url: str) -> None:
    """Raise 400 for a format that a model can't be told, and does not make.

    Clients send `mp3` without thinking, so it stands for any.
    """
    made = next((name for name in SOUNDS if SOUNDS[name] == type), type)
    require(
        format in (None, "mp3", made),
        f"Invalid 'response_format': the model does not make '{format}', but '{made}'. "
        f"{where_kept(url) if LINK.fullmatch(url) else ''}",
        code="invalid_value",
        param="response_format",
    )


def create_transcription(proxy: Proxy, request: Request, model: str = "") -> Response:
    return respond_with_transcript(proxy, request, TASKS["transcription"], model)


def create_translation(proxy: Proxy, request: Request, model: str = "") -> Response:
    return respond_with_transcript(proxy, request, TASKS["translation"], model)


def respond_with_transcript(
    proxy: Proxy, request: Request, task: Task, model: str
) -> Response:
    body, inputs, schema = parse_task_request(proxy, request, task, model)
    format, by_word = body["response_format"], bool(body.get("words"))
    is_plain = {*schema.outputs} <= {"string", "strings"} and bool(schema.outputs)
    has_times = format in ("verbose_json", "srt", "vtt")
    is_translation = task is TASKS["translation"]

    def check_times(are_known: bool) -> None:
        require(
            are_known or not has_times,
            f"The model `{body['model']}` tells no times, so it can't be used with "
            f"response_format '{format}'. Use 'json' or 'text'.",
            code="unsupported_value",
            param="response_format",
        )

    check_times(not is_plain)

    def read(
        prediction: Prediction, cancellation: Cancellation
    ) -> Generator[Transcript, None, None]:
        output = prediction.wait_until_done()
        try:
            transcript = read_transcript(output, is_translation, by_word)
        except ValueError:
            raise no_output("a transcript", prediction) from None
        check_times(bool(transcript.segments) or not transcript.text)
        yield transcript

    def read_texts(
        prediction: Prediction, cancellation: Cancellation
    ) -> Generator[str, None, None]:
        if not is_plain:
            yield from (found.text for found in read(prediction, cancellation))
            return
        with closing(prediction.events()) as events:
            for event in events:
                if isinstance(event, Text):
                    yield event.text
                elif isinstance(event, Done):
                    request.log.usages.append(event.usage)

    def run(write: Callable[[bytes], None]) -> None:
        texts = []
        with start_predictions(proxy, request, inputs, read_texts, wait=False) as found:
            for _, text in found:
                texts.append(text)
                write(sse_frame({"type": "transcript.text.delta", "delta": text}))
        done = {"type": "transcript.text.done", "text": "".join(texts).strip()}
        write(sse_frame({**done, **transcript_usage(request.log)}))

    if body["stream"] and not has_times:  # with times it is ignored, as OpenAI does
        return Response(EventStream(run, lambda error: sse_frame(error.body)))
    with start_predictions(proxy, request, inputs, read) as found:
        [transcript] = in_order(found)
    if format == "json":
        return Response({"text": transcript.text, **transcript_usage(request.log)})
    if format == "verbose_json":
        asked = language_name(body.get("language") or "")
        kind, language = "transcribe", transcript.language or asked
        if is_translation:
            kind, language = "translate", "english"
        return Response(verbose_transcription(transcript, kind, language))
    text = f"{transcript.text}\n"
    if format != "text":
        text = subtitles(transcript, format)
    return Response(
        text.encode(), headers={"content-type": "text/plain; charset=utf-8"}
    )


def transcript_usage(log: RequestLog) -> Json:
    """The tokens of a transcription where Replicate counted them."""
    asked, answered, *_ = log.usages[-1] if log.usages else Usage()
    if asked is None or answered is None:
        return {}
    counts = {"input_tokens": asked, "output_tokens": answered}
    return {"usage": {"type": "tokens", **counts, "total_tokens": asked + answered}}


def no_output(
    wanted: str, prediction: Prediction, type: str = "", url: str = ""
) -> APIError:
    model = prediction.prediction_input.model
    message = f"The model `{model.id}` ({model.ref}) did not make {wanted}"
    message += f", but {type}." if type else "."
    message += f" {where_kept(url)}" if LINK.fullmatch(url) else ""
    return APIError(502, message, code="prediction_failed", headers=NO_RETRY)


def parse_task_request(
    proxy: Proxy, request: Request, task: Task, model: str
) -> tuple[Json, list[PredictionInput], ModelSchema]:
    """Return the body, checked, what Replicate is to run for it, and its schema."""
    body = check(task.prepare(read_body(request, model, task.params)), task.params)
    models = replace(proxy.models.current(), default_model=None)
    try:
        chosen = find_model(models, body["model"])
    except APIError as error:
        message = f"{error} One that can do this is `{task.example}`."
        raise APIError(404, message, code=error.code, param="model") from None
    request.log.ref = chosen.ref
    schema = task_schema(task, chosen, proxy.upstream.schemas)
    texts = body.get("input") or body.get("prompt") or ""
    request.log.prompts = texts if isinstance(texts, list) else [texts]
    return body, build_task_inputs(task, body, chosen, schema), schema


def read_body(
    request: Request, model: str = "", form: Mapping[str, Param] | None = None
) -> Json:
    """Parse a body of JSON, or a form if there is a table for its fields."""
    content_type = request.headers.get("content-type", "application/json")
    is_form = content_type.lower().startswith("multipart/form-data")
    if is_form and form is not None:
        body = parse_form(request.body, content_type, form)
    else:
        body = parse_json_body(request.body, content_type)
    request.body = b""  # it may be large
    if model:
        body["model"] = model
    require(body.get("model"), "you must provide a model parameter")
    request.log.model = str(body["model"])
    request.log.stream, n = body.get("stream") is True, body.get("n")
    request.log.n = n if isinstance(n, int) and n <= MAX_PREDICTIONS else 1
    return body


def check_body(body: Json, params: Mapping[str, Param]) -> Json:
    """Check a body of whatever server's client by OpenAI's table."""
    return check(in_openais_words(body), params)


def parse_body(request: Request, params: Mapping[str, Param], model: str) -> Json:
    body = read_body(request, model)
    if body.get("best_of") == (body.get("n") or 1):  # all choices are wanted
        del body["best_of"]
    checked = check_body(body, params)
    require(
        checked["stream"] or body.get("stream_options") is None,
        "The 'stream_options' parameter is only allowed when 'stream' is enabled.",
        param="stream_options",
    )
    return checked


def retrieve_response(proxy: Proxy, request: Request, id: str) -> Response:
    if not (response := proxy.response_store.find(key_of(request), id)):
        raise response_not_found(id)
    is_streamed = dict(parse_qsl(request.query)).get("stream") == "true"
    message = "Unsupported parameter: 'stream'. A stored response is sent whole."
    require(not is_streamed, message, code="unsupported_parameter", param="stream")
    return Response(response)


def delete_response(proxy: Proxy, request: Request, id: str) -> Response:
    if not proxy.response_store.delete(key_of(request), id):
        raise response_not_found(id)
    return Response({"id": id, "object": "response.deleted", "deleted": True})


def cancel_response(proxy: Proxy, request: Request, id: str) -> Response:
    if not proxy.response_store.find(key_of(request), id):
        raise response_not_found(id)
    raise APIError(400, "Cannot cancel a synchronous response.")


PAGE = {
    "after": Param(STRING),
    "limit": Param(INTEGER, 1, 100, default=20),
    "order": Param(STRING, choices=("asc", "desc"), default="desc"),
}


def list_input_items(proxy: Proxy, request: Request, id: str) -> Response:
    query: Json = dict(parse_qsl(request.query))
    if re.fullmatch(r"-?\d{1,9}", query.get("limit", "")):
        query["limit"] = int(query["limit"])
    page = check(query, PAGE)
    if (items := proxy.response_store.input_items(key_of(request), id)) is None:
        raise response_not_found(id)
    if page["order"] == "desc":
        items.reverse()
    if after := page["after"]:
        ids = [item["id"] for item in items]
        message = f"Item with id '{after}' not found."
        require(after in ids, message, code="invalid_value", param="after")
        items = items[ids.index(after) + 1 :]
    rows = items[: page["limit"]]
    ids = [row["id"] for row in rows] or [None]
    return Response(
        {
            "object": "list",
            "data": rows,
            "first_id": ids[0],
            "last_id": ids[-1],
            "has_more": len(items) > len(rows),
        }
    )


def response_not_found(id: str) -> APIError:
    return APIError(404, f"Response with id '{id}' not found.", param="id")


def get_metrics(proxy: Proxy, request: Request) -> Response:
    return Response(proxy.metrics.render(), headers={"content-type": METRICS_TYPE})


class Endpoint(NamedTuple):
    method: str
    path: str  # without the /v1 that all of them may have; * is an id
    operation: Callable[..., Response]
    # "optional": though a wrong one is refused; "metrics": METRICS_OPEN; or "none"
    key: str = "required"


ENDPOINTS = [
    Endpoint("GET", "/", show_page, key="none"),
    Endpoint("GET", "/health", check_health, key="none"),
    Endpoint("GET", "/metrics", get_metrics, key="metrics"),
    Endpoint("GET", "/models", list_models, key="optional"),
    Endpoint("GET", "/models/*", retrieve_model),
    Endpoint("POST", "/chat/completions", create_chat_completion),
    Endpoint("POST", "/completions", create_completion),
    Endpoint("POST", "/embeddings", create_embedding),
    Endpoint("POST", "/audio/speech", create_speech),
    Endpoint("POST", "/audio/transcriptions", create_transcription),
    Endpoint("POST", "/audio/translations", create_translation),
    Endpoint("POST", "/images/generations", create_image),
    Endpoint("POST", "/images/edits", create_image_edit),
    Endpoint("POST", "/images/variations", create_image_variation),
    Endpoint("POST", "/responses", create_response),
    Endpoint("POST", "/responses/input_tokens", count_input_tokens),
    # These two before the others, since an id may have a slash.
    Endpoint("GET", "/responses/*/input_items", list_input_items),
    Endpoint("POST", "/responses/*/cancel", cancel_response),
    Endpoint("GET", "/responses/*", retrieve_response),
    Endpoint("DELETE", "/responses/*", delete_response),
]

# A base URL may end in /v1, or be Azure's; there, and in old clients, it has the model.
BASE_PATH = r"(?:/openai|/v1)*(?:/(?:engines|deployments)/(?P<model>.{1,256}))?"


def find_operation(proxy: Proxy, request: Request) -> Callable[[Request], Response]:
    """Find who answers a request. Raise APIError: 404, 405, or 401 for its key."""
    if request.method == "OPTIONS":
        return answer_preflight
    endpoint, ids = find_endpoint(request.method, request.path)
    request.log.endpoint = endpoint.path
    key = given_key(request.headers)
    if token := authorize(key, endpoint.key, proxy.settings):
        proxy = proxy._replace(upstream=proxy.upstream.for_token(token))
    return lambda request: endpoint.operation(proxy, request, *ids)


@lru_cache(16)  # programs use few, and anyone may send long ones
def find_endpoint(method: str, path: str) -> tuple[Endpoint, tuple[str, ...]]:
    """Find by path, with all that clients do to it: //, a last /, no /v1, %2F."""
    wanted = re.sub("/+", "/", unquote(path)).rstrip("/") or "/"
    allowed = set()
    for endpoint in ENDPOINTS:
        pattern = BASE_PATH + endpoint.path.replace("*", "(.+)")
        match = re.fullmatch(pattern, wanted)
        if not match or (match["model"] and endpoint.method != "POST"):
            continue
        if endpoint.method == ("GET" if method == "HEAD" else method):
            return endpoint, tuple(filter(None, match.groups()))
        allowed.add(endpoint.method)
    if not allowed:
        raise unknown_url(method, path)
    methods = ", ".join(sorted(allowed))
    raise APIError(
        405,
        f"Not allowed to {method} on {path}. Only {methods} requests are accepted.",
        code="method_not_supported",
        headers={"allow": methods},
    )


def unknown_url(method: str, path: str) -> APIError:
    message = f"Unknown request URL: {method} {path}. Please check the URL for typos."
    if path.strip("/") in ("", "v1"):
        message = "The proxy is running. The API is under /v1: try "
        message += "GET /v1/models or POST /v1/chat/completions."
    return APIError(404, message, code="unknown_url")


def given_key(headers: Mapping[str, str]) -> str | None:
    scheme, _, key = headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    other = headers.get("api-key") or headers.get("x-api-key")
    return other or ("" if scheme else None)


WHOSE_KEY = (
    "those in PROXY_API_KEY where the proxy was started: not OpenAI's, nor Replicate's."
)
CLIENT_TOKEN = re.compile(r"r8_[!-~]{1,200}")
OWN_TOKEN = f"your own Replicate token (r8_…), from {TOKENS_URL}"


def authorize(given: str | None, access: str, settings: Settings) -> str:
    """Return the client's own Replicate token if that is its key; raise 401."""
    key = given or ""
    is_ours = any([compare_digest(key.encode(), k.encode()) for k in settings.api_keys])
    takes_tokens = settings.client_tokens and access in ("required", "optional")
    if takes_tokens and not is_ours and CLIENT_TOKEN.fullmatch(key):
        return key
    is_open = {
        "required": False,
        "optional": given is None,
        "metrics": settings.metrics_open,
        "none": True,
    }
    if is_open[access]:
        return ""
    whose = f"{WHOSE_KEY} Or send {OWN_TOKEN}." if settings.client_tokens else WHOSE_KEY
    if given is None:
        raise APIError(
            401,
            "You didn't provide an API key. You need to provide it in an Authorization "
            "header using Bearer auth (Authorization: Bearer YOUR_KEY). The keys are "
            f"{whose}",
        )
    why = ""
    if not is_ours:
        why = "Incorrect API key provided. It has to be one of the proxy's own keys, "
        why += whose
    elif access == "required" and not settings.replicate_api_token.strip():
        why = f"This key has no Replicate token behind it. Send {OWN_TOKEN}."
    if why:
        raise APIError(401, why, code="invalid_api_key")
    return ""


def key_of(request: Request) -> str:
    """The key of a request that has one, as all stored responses do."""
    return given_key(request.headers) or ""


CORS = {
    "access-control-allow-origin": "*",
    "access-control-expose-headers": "x-request-id, retry-after, openai-processing-ms,"
    " x-should-retry, x-replicate-prediction-id, x-replicate-model, x-replicate-cost",
}


def answer_preflight(request: Request) -> Response:
    """Let pages of any origin in: a key is needed all the same."""
    asked = request.headers.get("access-control-request-headers", "")
    allow = {
        "access-control-allow-methods": "GET, POST, DELETE, OPTIONS",
        "access-control-allow-headers": asked or "authorization, content-type",
        "access-control-max-age": "86400",
        "vary": "access-control-request-headers",
    }
    if "access-control-request-private-network" in request.headers:
        allow["access-control-allow-private-network"] = "true"
    return Response(None, 204, allow)


# -- Server --------------------------------------------------------------------
#
# A thread per connection, as http.server has them, and one more that watches all
# clients: threads that follow predictions may simply block, since a client that
# hangs up has its request cancelled, and a stream that is silent is kept alive.


SMALL_BODY = 65536  # bytes; a larger body that nobody has read closes the connection

REQUEST_LINE = re.compile(rb"([A-Za-z]{1,32}) ([!-~\x80-\xff]+) (HTTP/1\.[01])")

ORIGIN = re.compile(r"\A\w+://[^/?]*")  # of a target that is a whole URL

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")  # one that may stand in our log


MAX_CODINGS = 2  # of a body, and …
MAX_GZIP_MEMBERS = 16  # … parts of one in gzip: each costs a copy of all that follows


def check_codings(headers: Mapping[str, str]) -> list[str]:
    """In which codings a body is, the last one first. Raise 415 for another."""
    given = headers.get("content-encoding", "").lower().split(",")
    codings = [coding for each in given if (coding := each.strip()) != "identity"]
    for coding in filter(None, codings):
        if coding not in ("gzip", "x-gzip", "deflate"):
            message = (
                f"Unsupported content encoding: '{coding}'. Send the body as it is, or "
                "in gzip or deflate."
            )
            raise APIError(415, message, code="unsupported_content_encoding")
    too_many = f"Unsupported content encoding: a body may be in {MAX_CODINGS} at most."
    require(len(codings) <= MAX_CODINGS, too_many)
    return [*filter(None, reversed(codings))]


def decompress(data: bytes, limit: int) -> bytes:
    """What is in gzip or deflate, also in one without zlib's head."""
    for window in (47, -15):  # 32 + 15: gzip or zlib, by its head; no head
        decoded, rest = b"", data
        with suppress(zlib.error):
            for _ in range(MAX_GZIP_MEMBERS):  # gzip may be of several
                decoder = zlib.decompressobj(window)
                decoded += decoder.decompress(rest, limit + 1)
                if len(decoded) > limit:
                    raise body_too_large(len(decoded), limit)
                if not decoder.eof:
                    raise zlib.error
                if not (rest := decoder.unused_data):
                    return decoded
    raise BadMessage("its body is not what its Content-Encoding says")


def send_all(sock: socket.socket, data: bytes) -> None:
    """Raise ClientDisconnected, also for one who does not read."""
    try:
        sock.sendall(data)
    except OSError as error:
        raise ClientDisconnected from error


spaced_json = json.JSONEncoder(ensure_ascii=False).encode


def encode_readable_json(body: Json) -> bytes:
    """Put each key, and each item of a list, on a line of its own.

    json's `indent` would do more of it, by an encoder that is not in C.
    """
    lines = []
    for name, value in body.items():
        if isinstance(value, list) and value:
            text = "[\n    " + ",\n    ".join(map(spaced_json, value)) + "\n  ]"
        else:
            text = spaced_json(value)
        lines.append(f'  "{name}": {text}')
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode("utf-8", "replace")


class EventStreamWriter:
    """Writes a stream to a client: by its request, and in silence by the watcher.

    The status line waits for the first frame, so that a failure before it can have a
    status of its own, but no longer than `Timeouts.silent_start`.
    """

    def __init__(
        self,
        sock: socket.socket,
        head: Callable[[], bytes],
        is_chunked: bool,
        keep_alive_frame: Callable[[], bytes] = lambda: KEEP_ALIVE,
    ) -> None:
        self.sock = sock
        self.head = head
        self.is_chunked = is_chunked
        self.keep_alive_frame = keep_alive_frame
        self.lock = threading.Lock()
        self.unsent = b""  # the rest of what the watcher has begun to send
        self.is_open = False  # the status line is sent
        self.last_write = time.monotonic()

    def write(self, data: bytes) -> None:
        """Send a batch at once. Raise ClientDisconnected."""
        if data:  # an empty chunk would be the last
            with self.lock:
                send_all(self.sock, self.take(data))

    def take(self, data: bytes) -> bytes:
        """What is due on the wire up to and with this."""
        if self.is_chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        due = self.unsent + data if self.is_open else self.head() + data
        self.is_open, self.unsent, self.last_write = True, b"", time.monotonic()
        return due

    def end(self) -> None:
        """End the response. Whoever has left by now has read all of it."""
        if self.is_chunked:
            with suppress(ClientDisconnected):
                send_all(self.sock, self.unsent + b"0\r\n\r\n")

    def is_silent(self, timeouts: Timeouts) -> bool:
        limit = timeouts.keep_alive if self.is_open else timeouts.silent_start
        return time.monotonic() - self.last_write >= limit

    def send_keep_alive(self) -> None:
        """Send no more of it than goes at once; the lock is held."""
        if self.unsent:  # it is not read: no more of it
            self.last_write = time.monotonic()
        elif frame := self.keep_alive_frame():
            self.unsent = self.take(frame)
        else:
            return
        with suppress(OSError):  # its buffer is full, or it is gone
            sent = self.sock.send(self.unsent, DONT_WAIT)
            self.unsent = self.unsent[sent:]


# To register with poll is no system call, unlike epoll; Windows has only select.
Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)


def has_hung_up(sock: socket.socket) -> bool:
    """Whether its end has come, behind bytes that nobody has read: Linux can tell."""
    if not (hung_up := getattr(select, "POLLRDHUP", 0)):
        return False
    with suppress(OSError, ValueError):  # it was closed just now
        poll = select.poll()
        poll.register(sock, hung_up)
        return bool(poll.poll(0))
    return False


class Watcher(threading.Thread):
    """Cancels the requests of clients that hang up, and keeps silent streams alive."""

    def __init__(self, timeouts: Timeouts) -> None:
        super().__init__(name="watcher", daemon=True)
        self.timeouts = timeouts
        self.clients: dict[Cancellation, socket.socket] = {}
        self.ahead: dict[Cancellation, socket.socket] = {}  # who have sent more
        self.writers: set[EventStreamWriter] = set()
        self.is_stopped = False

    @contextmanager
    def watching(
        self, client: socket.socket, cancellation: Cancellation
    ) -> Iterator[None]:
        self.clients[cancellation] = client
        try:
            yield
        finally:
            self.clients.pop(cancellation, None)
            self.ahead.pop(cancellation, None)

    @contextmanager
    def keeping_alive(self, writer: EventStreamWriter) -> Iterator[None]:
        self.writers.add(writer)
        try:
            yield
        finally:
            with writer.lock:  # the watcher may be about to write to it
                self.writers.discard(writer)

    def run(self) -> None:
        while not self.is_stopped:
            try:
                self.wait_for_hang_ups()
                for writer in self.writers.copy():
                    self.keep_alive(writer)
            except Exception:  # all requests depend on this thread
                log.exception("the watcher failed")
                time.sleep(self.timeouts.watch_interval)

    def keep_alive(self, writer: EventStreamWriter) -> None:
        if writer.is_silent(self.timeouts) and writer.lock.acquire(blocking=False):
            try:
                if writer in self.writers:
                    writer.send_keep_alive()
            finally:
                writer.lock.release()

    def wait_for_hang_ups(self) -> None:
        """Wait until a client sends something or its connection ends, or a while."""
        with Selector() as selector:
            for cancellation, client in self.clients.copy().items():
                with suppress(OSError, ValueError, KeyError):  # it was closed just now
                    selector.register(client, selectors.EVENT_READ, cancellation)
            ready: list[tuple[selectors.SelectorKey, int]] = []
            if selector.get_map():
                ready = selector.select(self.timeouts.watch_interval)
            else:  # which Windows can't wait for
                time.sleep(self.timeouts.watch_interval)
            for key, _ in ready:
                client = cast(socket.socket, key.fileobj)
                if (sent := peek(client)) is not None:
                    self.clients.pop(key.data, None)
                if sent == b"":
                    key.data.cancel(ClientDisconnected())
                elif sent:  # its next request, behind which a read sees no end
                    self.ahead[key.data] = client
        for cancellation, client in self.ahead.copy().items():
            if has_hung_up(client):
                self.ahead.pop(cancellation, None)
                cancellation.cancel(ClientDisconnected())

    def stop(self) -> None:
        self.is_stopped = True
        self.join()


BACKLOG = 1024  # of 200 clients at once, 5 left 100 without an answer


class Handler(BaseHTTPRequestHandler):
    """A connection: its requests, one after another."""

    disable_nagle_algorithm = True  # or a request on a kept connection takes 44 ms
    server: Server

    def setup(self) -> None:
        super().setup()
        self.connection.setblocking(True)  # a Mac's is as the one that listens
        limit = self.server.proxy.settings.write_timeout
        set_timeout(self.connection, socket.SO_SNDTIMEO, limit)
        self.reader = MessageReader(self.receive)
        self.body = self.reader.read_body(0)
        self.api_request = Request("-", "-", {})

    def set_deadline(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds

    def receive(self) -> bytes:
        """Raise 408 after the deadline, which is one for many pieces."""
        left = max(self.deadline - time.monotonic(), 0.001)
        try:
            set_timeout(self.connection, socket.SO_RCVTIMEO, left)
            return bytes(self.connection.recv(self.read_size))
        except (TimeoutError, BlockingIOError):
            raise BadMessage("it came too slowly", 408) from None
        except OSError as error:
            raise ClientDisconnected from error

    def handle_one_request(self) -> None:
        """Serve a request, from its first byte to its line in the log."""
        self.close_connection = True
        if not self.await_request():
            return
        self.began = time.monotonic()
        self.id = f"req_{secrets.token_hex(16)}"
        self.status = 0  # once it is sent
        try:
            try:
                self.respond()
            except ClientDisconnected:
                raise
            except Exception as error:
                failure = self.failure(error)
                self.send(Response(failure.body, failure.status, failure.headers))
        except ClientDisconnected:
            self.close_connection = True
            self.api_request.log.error = "client_gone"
        finally:
            self.server.release(self.api_request)
            self.count()
            self.log_line()
            self.api_request = Request("-", "-", {})  # this one may be large
        if self.close_connection and not self.reader.is_done:
            self.drain()

    def await_request(self) -> bool:
        """Wait for its first byte; from then on, the client has to hurry."""
        server, timeouts, reader = self.server, self.server.timeouts, self.reader
        self.set_deadline(timeouts.drain if server.is_stopping else timeouts.idle)
        self.read_size = READ_SIZE  # little memory while it waits
        server.connections[self.connection] = time.monotonic()
        with suppress(BadMessage, ClientDisconnected):
            for _ in self.body:  # of the request before, if nobody has read it
                pass
            while not reader.data.removeprefix(b"\r\n"):  # an empty line may come first
                reader.fill()
        server.connections[self.connection] = 0
        reader.data = reader.data.removeprefix(b"\r\n")
        self.set_deadline(timeouts.head)
        return bool(reader.data)

    def respond(self) -> None:
        """Run the operation of a request, while its client is watched."""
        try:
            operation = self.read_request()
        except BadMessage as error:
            message = f"This is not HTTP as the proxy reads it: {error}."
            raise APIError(error.status, message) from None
        server, request = self.server, self.api_request
        with server.watcher.watching(self.connection, request.cancellation):
            self.send(operation(request))

    def read_request(self) -> Callable[[Request], Response]:
        """Read the head, and the body of one who may ask, if there is room for it."""
        server, limit = self.server, self.server.proxy.settings.max_body_bytes
        first, headers = self.reader.read_head()
        if not (match := REQUEST_LINE.fullmatch(first)):
            raise BadMessage("the request line is not METHOD target HTTP/1.1")
        method, target, version = (part.decode("latin-1") for part in match.groups())
        path, _, query = ORIGIN.sub("", target, count=1).partition("?")
        length = parse_body_length(headers)
        self.request_version = version
        self.api_request = request = Request(method, path, headers, query=query)
        given_id = headers.get("x-request-id", "")
        self.id = given_id if REQUEST_ID.fullmatch(given_id) else self.id
        CURRENT_ID.set(self.id)
        self.body = self.reader.read_body(length or 0, limit)
        is_last = "close" in headers.get("connection", "").lower()
        is_last = is_last or version == "HTTP/1.0"
        awaits_continue = headers.get("expect", "").lower() == "100-continue"
        is_small = 0 <= (length or 0) <= SMALL_BODY and not awaits_continue
        self.close_connection = is_last or not is_small  # if nobody reads its body
        operation = find_operation(server.proxy, request)
        if method == "POST":
            if length is None:
                raise BadMessage("a body needs a Content-Length", 411)
            if length > limit:
                raise body_too_large(length, limit)
            codings = check_codings(headers)
            server.admit(request, max(length, 0))
            self.set_deadline(server.timeouts.body)
            if awaits_continue:
                send_all(self.connection, b"HTTP/1.1 100 Continue\r\n\r\n")
            self.close_connection = True
            self.read_size = 16 * READ_SIZE
            pieces = []
            for piece in self.body:
                if length == CHUNKED:
                    server.hold(request, request.held + len(piece))
                pieces.append(piece)
            request.body = b"".join(pieces)
            self.close_connection = is_last
            for _ in codings:  # which make a body 1,032 times smaller at the most
                server.hold(request, min(limit, 1032 * len(request.body)))
                request.body = decompress(request.body, limit)
                server.hold(request, len(request.body))
        return operation

    def drain(self) -> None:
        """Read what the client still sends; closing now would lose our response."""
        with suppress(OSError, BadMessage, ClientDisconnected):
            self.connection.shutdown(socket.SHUT_WR)
            self.set_deadline(self.server.timeouts.drain_input)
            while self.receive():
                pass

    def send(self, response: Response) -> None:
        body, headers = response.body or b"", dict(response.headers)
        if isinstance(body, EventStream):
            self.send_stream(body, headers)
            return
        if isinstance(body, dict):
            body = encode_readable_json(body)
            headers["content-type"] = "application/json"
        if response.status != 204:
            headers["content-length"] = str(len(body))
        head = self.head(response.status, headers)
        if self.api_request.method == "HEAD":
            body = b""
        if len(body) > SMALL_BODY:  # a copy of it would be large too
            send_all(self.connection, head)
            send_all(self.connection, body)
        else:
            send_all(self.connection, head + body)

    def send_stream(self, stream: EventStream, headers: Mapping[str, str]) -> None:
        """Send frames as they come; a failure after the first is the last of them."""
        is_chunked = self.request_version == "HTTP/1.1"
        coding = {"transfer-encoding": "chunked"} if is_chunked else {}

        def head() -> bytes:
            return self.head(200, {**stream.headers, **coding, **headers})

        writer = EventStreamWriter(self.connection, head, is_chunked, stream.keep_alive)
        try:
            with self.server.watcher.keeping_alive(writer):
                stream.run(writer.write)
        except Exception as error:
            if isinstance(error, ClientDisconnected) or not writer.is_open:
                raise
            last = stream.error(self.failure(error))
            if not last:  # only a connection that breaks tells that a file is not whole
                self.close_connection = True
                linger = struct.pack("ii", 1, 0)  # with a reset, which HTTP/1.0 needs
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
                return
            writer.write(last)
        writer.end()

    def failure(self, error: Exception) -> APIError:
        """An exception as the client gets it; the log line names it."""
        failure = as_api_error(error)
        self.api_request.log.error = failure.code or failure.status
        self.api_request.log.failure = failure
        return failure

    def head(self, status: int, headers: Mapping[str, str]) -> bytes:
        """The head of a response, as it is sent now."""
        self.status = status
        self.close_connection = self.close_connection or self.server.is_stopping
        request_log = self.api_request.log
        known = round(sum(request_log.costs), 9)  # in USD, of what is over by now
        cost = f"{known:.9f}".rstrip("0") if known else ""
        all_headers = {
            "date": self.date_time_string(),
            **CORS,
            **headers,
            "x-request-id": self.id,
            "openai-version": "2020-10-01",
            "openai-processing-ms": str(self.elapsed_ms()),
            "x-replicate-model": request_log.ref,
            "x-replicate-prediction-id": ", ".join(request_log.predictions),
            "x-replicate-cost": cost,
            "connection": "close" if self.close_connection else "",
        }
        lines = [f"{name}: {value}" for name, value in all_headers.items() if value]
        text = "".join(lines)
        if not (text.isascii() and text.isprintable()):  # no header can carry it
            lines = [re.sub("[^ -~]", "?", line) for line in lines]
        first = f"HTTP/1.1 {status} {http.client.responses.get(status, '')}"
        return "\r\n".join([first, *lines, "", ""]).encode()

    def elapsed_ms(self) -> int:
        return round((time.monotonic() - self.began) * 1000)

    def count(self) -> None:
        """Count a request in the metrics, but for those that only watch the proxy."""
        request_log, metrics = self.api_request.log, self.server.proxy.metrics
        endpoint, model, usages = request_log.endpoint, "", request_log.usages
        if endpoint in ("/health", "/metrics"):
            return
        seconds, add = time.monotonic() - self.began, metrics.add
        if ref := request_log.ref.partition(";")[0]:
            listed = self.server.proxy.models.models.spellings
            is_known = bool(request_log.predictions) or ref.casefold() in listed
            model = metrics.model_label(ref, is_known)
        status, code = str(self.status or 499), str(request_log.error)
        add(1, "requests_total", endpoint, model, status, code)
        stream = "true" if request_log.stream else "false"
        key = "request_duration_seconds", endpoint, model, stream
        metrics.observe(seconds, *key)
        for usage in usages:
            asked, answered, _, is_estimate, _ = usage
            estimated = "true" if is_estimate else "false"
            add(asked or 0, "tokens_total", model, "input", estimated)
            add(answered or 0, "tokens_total", model, "output", estimated)
        if request_log.costs:
            add(sum(request_log.costs), "cost_usd_total", model)
        if request_log.stream and request_log.first_text_at:
            first = request_log.first_text_at - self.began
            metrics.observe(first, "time_to_first_token_seconds", model)
            if len(usages) == 1 and (tokens := usages[0].completion_tokens or 0) > 1:
                pace = (seconds - first) / (tokens - 1)
                metrics.observe(pace, "time_per_output_token_seconds", model)
        if code == "client_gone":
            add(1, "client_disconnects_total")

    def log_line(self) -> None:
        """One line per request: nothing of a key, a token or what was said."""
        request, request_log = self.api_request, self.api_request.log
        failure, level = request_log.failure, logging.INFO
        if request_log.endpoint in ("/health", "/metrics") and self.status == 200:
            level = logging.DEBUG
        elif failure and (
            failure.status >= 500
            or failure.status == 429
            or "x-should-retry" in failure.headers
        ):
            level = logging.WARNING  # not the client's fault
        if not log.isEnabledFor(level):
            return
        why = failure and loggable(str(failure), request_log.prompts)
        usage = sum_usage(request_log.usages) if request_log.usages else None
        first = request_log.first_text_at
        row = LogRow(
            method=request.method,
            path=request.path,
            status=self.status or 499,
            client=self.client_address[0],
            model=request_log.model,
            ref=request_log.ref,
            stream="yes" if request_log.stream else None,
            n=request_log.n if request_log.n > 1 else None,
            prediction=",".join(request_log.predictions),
            tokens_in=usage and usage.prompt_tokens,
            tokens_out=usage and usage.completion_tokens,
            estimated="yes" if usage and usage.is_estimate else None,
            cost=round(sum(request_log.costs), 9) if request_log.costs else None,
            first_token_ms=first and round((first - self.began) * 1000),
            ms=self.elapsed_ms(),
            error=request_log.error,
            param=failure and failure.param,
            why=failure and f"{why} {failure.detail}".strip(),
            request_id=self.id,
        )
        log.log(level, row)


class Server(ThreadingHTTPServer):
    """`serve_forever`, `shutdown`, `server_close`, and `url` once it is made."""

    def __init__(
        self,
        settings: Settings,
        timeouts: Timeouts,
        listener: socket.socket | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        settings.check()
        models = ModelsFile(settings.models_path, FAMILIES)
        super().__init__((settings.host, settings.port), Handler, False)
        self.socket.close()
        self.socket = listener or listen(settings)
        self.socket.setblocking(False)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = settings.host, self.server_address[1]
        self.url = base_url(self.socket, settings)
        self.timeouts = timeouts
        metrics = metrics or Metrics()
        self.api = ReplicateAPI(settings, timeouts, metrics)
        upstream = Upstream(self.api, timeouts)
        store = ResponseStore(settings, timeouts)
        self.proxy = Proxy(settings, models, upstream, store, metrics)
        # From when they are accepted; since when they wait for a request, or 0.
        self.connections: dict[socket.socket, float] = {}
        self.disconnected = threading.Condition()
        self.requests: set[Request] = set()  # in flight
        self.held = 0  # bytes of their bodies
        self.admission = threading.RLock()
        self.is_stopping = False  # no connection is kept …
        self.has_no_grace = False  # … none is waited for …
        self.is_over = False  # … and no request begun
        self.watcher = Watcher(timeouts)
        self.watcher.start()

    def service_actions(self) -> None:
        """Accept all who have come: one turn of `serve_forever` is enough for them."""
        try:
            for _ in range(BACKLOG):  # it holds no more at once
                self.process_request(*self.get_request())
        except BlockingIOError:  # that was all
            pass
        except OSError:  # no descriptor is left: another try at once would fail too
            self.close_longest_idle()
            time.sleep(self.timeouts.watch_interval)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Have a thread serve it; `Thread.start` would wait until that has begun.

        Where many come at once, each would wait for all threads before it.
        """
        work = (self.process_request_thread, (request, client_address))
        is_full = len(self.connections) >= self.proxy.settings.max_connections
        has_room = not is_full or self.close_longest_idle()
        self.connections[request] = 0
        try:
            if has_room:
                _thread.start_new_thread(*work)
                return
            failure = overloaded("has as many connections as it may (MAX_CONNECTIONS)")
        except RuntimeError as error:  # there are as many as the system allows
            self.close_longest_idle()
            failure = as_api_error(error)
        self.refuse(request, failure)

    def close_longest_idle(self) -> bool:
        """Make room; or return False if no connection is idle."""
        connections = self.connections.copy().items()
        idle = {since: connection for connection, since in connections if since}
        if idle:
            longest = idle[min(idle)]
            self.connections[longest] = 0
            shut(longest)
        return bool(idle)

    def refuse(self, connection: socket.socket, failure: APIError) -> None:
        """Send an error, with no thread and no time for it, and close."""
        log.warning(LogRow(event="connection_refused", why=failure))
        self.proxy.metrics.add(1, "requests_total", "other", "", "503", "overloaded")
        body = encode_readable_json(failure.body)
        headers = {
            "content-type": "application/json",
            "content-length": len(body),
            "connection": "close",
            **failure.headers,
            **CORS,
        }
        lines = [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join(["HTTP/1.1 503 Service Unavailable", *lines, "", ""])
        with suppress(OSError):
            connection.setblocking(False)
            connection.send(head.encode() + body)
            connection.recv(READ_SIZE)  # or closing would lose what was sent
        self.shutdown_request(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.exception("a connection failed")

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        with self.disconnected:
            self.connections.pop(request, None)
            self.disconnected.notify_all()

    def check_token(self) -> None:
        """Log a warning if Replicate does not accept the token."""
        if not self.api.token:
            return
        try:
            self.api.account()
        except Exception as error:
            if isinstance(error, APIError) and error.code == OUR_TOKEN.code:
                log.warning(LogRow(event="token_refused", why=error))
            else:
                log.debug(LogRow(event="token_not_checked", why=error))

    def admit(self, request: Request, size: int) -> None:
        """Raise 503 if there is no room for it, or for a body of that many bytes."""
        with self.admission:
            if self.is_over:
                raise overloaded("is being stopped")
            if len(self.requests) >= self.proxy.settings.max_concurrent_calls:
                raise overloaded(
                    "has as many calls in flight as it may (MAX_CONCURRENT_CALLS)"
                )
            self.hold(request, size)
            self.requests.add(request)
            self.proxy.metrics.add(1, "in_flight")

    def hold(self, request: Request, size: int) -> None:
        """Count bytes of its body; raise 503 if there are too many beside others'."""
        with self.admission:
            others = self.held - request.held
            if others and others + size > self.proxy.settings.max_body_bytes_in_flight:
                raise overloaded(
                    "has as much to read as it may (MAX_BODY_BYTES_IN_FLIGHT)"
                )
            request.held, self.held = size, others + size

    def release(self, request: Request) -> None:
        with self.admission:
            if request in self.requests:
                self.requests.remove(request)
                self.proxy.metrics.add(-1, "in_flight")
            self.held -= request.held

    def await_disconnects(self, seconds: float) -> None:
        with self.disconnected:
            self.disconnected.wait_for(lambda: not self.connections, seconds)

    def await_requests(self, seconds: float) -> None:
        """Wait until all who were connected have left, or for `end_grace`."""
        with self.disconnected:
            self.disconnected.wait_for(
                lambda: not self.connections or self.has_no_grace, seconds
            )

    def end_grace(self) -> None:
        """Have `server_close` cancel at once what still runs."""
        with self.disconnected:
            self.has_no_grace = True
            self.disconnected.notify_all()

    def server_close(self) -> None:
        """Stop listening, let the requests finish that have come, cancel the rest.

        Whoever holds an idle connection may have a request under way on it, which a
        close would lose: it is closed when none has come for a moment. A prediction
        that Replicate takes longer than `Timeouts.abort` to create is cancelled when it
        is there, if the process still is; else its Cancel-After ends it.
        """
        if self.is_stopping:
            return
        self.is_stopping = True
        self.service_actions()  # or the close would reset them
        super().server_close()
        grace = self.proxy.settings.shutdown_grace
        drain = min(self.timeouts.drain, grace)
        self.await_requests(drain)
        for connection, idle_since in self.connections.copy().items():
            if idle_since:
                shut(connection)
        self.await_requests(grace - drain)
        with self.admission:
            self.is_over = True
        for request in self.requests.copy():
            request.cancellation.cancel(overloaded("is being stopped"))
        until = time.monotonic() + self.timeouts.abort
        self.await_disconnects(self.timeouts.abort)
        self.proxy.upstream.await_runs(max(1, until - time.monotonic()))
        self.watcher.stop()
        self.api.close()
        self.proxy.response_store.close()


def listen(settings: Settings) -> socket.socket:
    """Raise OSError for an address that is in use, or not ours."""
    is_ipv6 = ":" in settings.host
    return socket.create_server(
        (settings.host, settings.port),
        family=socket.AF_INET6 if is_ipv6 else socket.AF_INET,
        backlog=BACKLOG,
        dualstack_ipv6=is_ipv6 and socket.has_dualstack_ipv6(),
    )


def base_url(listener: socket.socket, settings: Settings) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    port = listener.getsockname()[1]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def make_server(settings: Settings, timeouts: Timeouts | None = None) -> Server:
    """Raise ConfigError for settings that can't be, OSError for an address in use."""
    return Server(settings, timeouts or Timeouts())


# -- Workers -------------------------------------------------------------------
#
# Several servers on one port, for more than one core: processes that are forked from
# a parent, which holds the port, serves nobody, and replaces one that dies. A pipe
# stops them: its end comes when the parent is told to stop, and also if it is killed.
# A second signal puts a byte per worker into another pipe, to have them hurry.
# Signals, which a terminal or systemd sends to all processes at once, are collected
# in each, but only the parent looks at them.


PAUSE = 1.0  # seconds before a worker takes the place of one that died
HURRY = 1.0  # seconds after a second signal, for cancels that are tried once


def handle_signals(handler: Callable[[int, Any], object]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def run_workers(
    count: int,
    work: Callable[[int, int], int],
    listener: socket.socket,
    metrics: Metrics,
    signals: Sequence[int],
) -> int:
    """Keep processes at work until a signal, and wait for their end until another.

    Each gives its exit code, and is given the ends of the pipes that tell it to stop
    and to hurry. One that takes the place of another counts on in its metrics.
    """
    stop, hurry = os.pipe(), os.pipe()

    def run(place: int) -> None:
        os.close(stop[1])
        os.close(hurry[1])
        metrics.use_part(place)
        os._exit(work(stop[0], hurry[0]))

    import multiprocessing  # 5 ms, for those alone who have workers

    workers: dict[int, multiprocessing.process.BaseProcess] = {}
    due = 0.0
    while not signals:
        try:
            while time.monotonic() >= due and len(workers) < count:
                # The parent has no threads, which a fork would break.
                place = min(set(range(count)) - workers.keys())
                context = multiprocessing.get_context("fork")
                process = context.Process(target=run, args=[place])
                process.start()
                workers[place] = process
        except OSError as error:  # no memory, or too many processes
            log.error(LogRow(event="worker_not_started", error=error))
            due = time.monotonic() + PAUSE
        time.sleep(0.1)
        ended = [place for place, worker in workers.items() if not worker.is_alive()]
        for worker in map(workers.pop, ended):
            pid, code = worker.pid, worker.exitcode
            log.error(LogRow(event="worker_died", pid=pid, code=code))
            due = time.monotonic() + PAUSE
    listener.close()
    os.close(stop[1])
    while any([worker.is_alive() for worker in workers.values()]):
        if len(signals) > 1:
            os.write(hurry[1], bytes([signals[1]]) * len(workers))
            for worker in workers.values():
                worker.join(2 * HURRY)
                worker.kill()
            return 128 + signals[1]
        time.sleep(0.1)
    return int(any(worker.exitcode for worker in workers.values()))


# -- Command line --------------------------------------------------------------
#
# What the program says goes to stdout, what it logs to stderr, and what keeps it
# from starting is a sentence there and exit code 2.


DESCRIPTION = """\
An OpenAI-compatible server in front of Replicate's models. Point any OpenAI
client at it with base_url=http://127.0.0.1:3000/v1 and one of its own keys."""

EPILOG = """\
first steps:
  python proxy.py --demo       see it work: no account, no token, no model
  cp .env.example .env         then put your Replicate token and a key into it
  python proxy.py --check      see whether they are right
  python proxy.py              serve

Settings come from the environment, then from .env beside this file; the flags
above override both. .env.example lists all of them, models.json the models."""


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,  # --reload is taken out of what its child is given
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--demo", action="store_true", help="serve a stand-in for Replicate's models")
    add("--host", help="address to serve on (HOST, 127.0.0.1)")
    add("--port", help="port to serve on (PORT, 3000; 0: any free one)")
    add("--models", metavar="FILE", help="which models there are (MODELS_PATH)")
    add("--env-file", metavar="FILE", help="settings to read instead of .env")
    add("--check", action="store_true", help="say whether the settings work, and exit")
    add("--key", action="store_true", help="print the first key of clients, and exit")
    add("--reload", action="store_true", help="start again when a file changes")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    return parser.parse_args(arguments)


def read_settings(options: argparse.Namespace) -> Settings:
    """Read the env file, which the environment overrides, and flags both."""
    file = Path(options.env_file or HERE / ".env")
    values: dict[str, str] = {}
    if options.env_file or file.exists():
        try:
            values = parse_env_file(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ConfigError) as error:
            raise ConfigError(f"{file} can't be used: {error}") from None
    values |= {name: value for name, value in os.environ.items() if value}
    flags = {"HOST": options.host, "PORT": options.port, "MODELS_PATH": options.models}
    values |= {name: value for name, value in flags.items() if value is not None}
    if options.demo:
        if not (HERE / "fake_replicate.py").exists():
            raise ConfigError("--demo needs fake_replicate.py beside proxy.py.")
        values |= {
            "REPLICATE_API_TOKEN": DEMO_TOKEN,
            "REPLICATE_BASE_URL": "http://127.0.0.1/v1",  # until it is started
            "PROXY_API_KEY": DEMO_KEY,
            "WORKERS": "1",
        }
    return Settings.from_environ(values)


@contextmanager
def play_replicate(settings: Settings) -> Iterator[Settings]:
    """Play Replicate in this process; give the settings for it."""
    from fake_replicate import FakeReplicate

    with FakeReplicate(token=settings.replicate_api_token, default="demo") as fake:
        yield replace(settings, replicate_base_url=fake.base_url)


@contextmanager
def with_shared_store(settings: Settings) -> Iterator[Settings]:
    """Give workers one file for the responses they store, for as long as they live.

    Only they open it, since no connection of SQLite's may live through a fork.
    """
    is_needed = settings.workers > 1 and settings.responses_db_bytes
    if settings.responses_db or not is_needed:
        yield settings
        return
    try:
        folder = tempfile.TemporaryDirectory("", "proxy-", ignore_cleanup_errors=True)
    except OSError as error:
        why = "a worker knows the responses that it made, and no others. With "
        why += "RESPONSES_DB, a file, each knows all of them."
        log.warning(LogRow(event="responses_not_shared", error=error, why=why))
        yield settings
        return
    with folder as path:
        yield replace(settings, responses_db=str(Path(path) / "responses.db"))


def serve(settings: Settings, models: Models, options: argparse.Namespace) -> int:
    """Serve until a signal, in this process or in several that it forks."""
    if settings.workers > 1 and not hasattr(os, "fork"):
        raise ConfigError("WORKERS must be 1 on Windows.")
    try:
        listener = listen(settings)
    except OSError as error:
        why = str(error).partition(" (while")[0]
        raise ConfigError(
            f"Can't listen on {settings.host}:{settings.port}: {why}. "
            "Choose another address with --host and --port, or HOST and PORT."
        ) from None
    with suppress(ImportError, ValueError, OSError):  # Windows has no limit
        import resource  # a request has two sockets, and the usual limit is 1024

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    metrics = Metrics(settings.workers)
    work = partial(serve_until, settings, listener, metrics, options.demo)
    if settings.workers > 1:
        signals: list[int] = []
        handle_signals(lambda number, _: signals.append(number))
        run = partial(run_workers, settings.workers, work, listener, metrics, signals)
    else:
        run = partial(work, *stop_on_signals())
    url = base_url(listener, settings)
    page = (
        f"Open {url}/ in a browser, or try this" if PAGE_FILE.exists() else "Try this"
    )
    print(f"Serving {len(models.mappings)} models on {url}/v1. {page}:\n")
    line = curl_line(url, options, models, bool(settings.api_keys))
    print(f"  {line}\n", flush=True)
    if settings.client_tokens:
        print(f"Keys of clients: {describe_keys(settings)}.\n", flush=True)
    return run()


def stop_on_signals() -> tuple[int, int]:
    """Pipes: the first signal ends one, and those after it go into the other."""
    (stop, stop_end), (hurry, hurry_end) = os.pipe(), os.pipe()

    def end(*_: Any) -> None:
        handle_signals(lambda number, _: os.write(hurry_end, bytes([number])))
        os.close(stop_end)

    handle_signals(end)
    return stop, hurry


def serve_until(
    settings: Settings,
    listener: socket.socket,
    metrics: Metrics,
    is_demo: bool,
    stop: int,
    hurry: int,
) -> int:
    """Serve until `stop` ends, then until all requests are answered; return a code.

    A byte in `hurry`, the number of a signal, ends that within `HURRY`.
    """
    server = Server(settings, Timeouts(), listener, metrics)
    codes = [0]

    def await_stop() -> None:
        os.read(stop, 1)
        server.shutdown()

    def await_hurry() -> None:
        if number := os.read(hurry, 1):  # it ends when the parent is killed
            codes[0] = 128 + number[0]
            server.end_grace()
            time.sleep(HURRY)
            os._exit(codes[0])

    background = [await_stop, await_hurry, *([] if is_demo else [server.check_token])]
    for work in background:
        threading.Thread(target=work, daemon=True).start()
    gc.freeze()  # what stays: to look at all of it would take 50 ms, each time
    server.serve_forever(0.1)
    log.info(LogRow(event="stopping", calls=len(server.requests)))
    server.server_close()
    return codes[0]


def curl_line(
    url: str, options: argparse.Namespace, models: Models, has_key: bool
) -> str:
    """It finds the key by a shell's own means, and does not hold it."""
    if options.demo:
        key = DEMO_KEY
    elif not has_key:
        key = "$REPLICATE_API_TOKEN"  # the client's own
    elif os.environ.get("PROXY_API_KEY"):
        key = "${PROXY_API_KEY%%,*}"
    else:
        command = [sys.executable, str(HERE / "proxy.py"), "--key"]
        if options.env_file:
            command += ["--env-file", str(Path(options.env_file).resolve())]
        key = f"$({shlex.join(command)})"
    model = next(iter(models.mappings), models.default_model or "owner/name")
    if "gpt-4o" in models.mappings:  # a better answer than the first one's
        model = "gpt-4o"
    hello = [{"role": "user", "content": "Hello!"}]
    body = json.dumps({"model": model, "stream": True, "messages": hello})
    return (
        f"curl -N {url}/v1/chat/completions"
        f' -H "Authorization: Bearer {key}"'
        f" -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )


def describe_keys(settings: Settings) -> str:
    """Whose keys open what."""
    count, token = len(settings.api_keys), settings.replicate_api_token.strip()
    ours = f"{count} in PROXY_API_KEY" if count else "none of PROXY_API_KEY"
    if count and not token:
        ours += ", for /metrics alone as there is no REPLICATE_API_TOKEN"
    own = ", and any Replicate token for its owner" if settings.client_tokens else ""
    return f"{ours}{own}"


def check_token(settings: Settings, models: Models) -> int:
    """Say what was read, and whether Replicate knows the token."""
    names = [row.name for row in fields(settings) if row.repr]
    given = [n for n in names if getattr(settings, n) != getattr(Settings, n)]
    lines = [f"\n          {n.upper()}={getattr(settings, n)}" for n in given]
    print(f"settings  OK; changed:{''.join(lines) or ' none'}")
    print(f"models    {len(models.mappings)} in {settings.models_path},")
    print(f"          and {models.default_model or 'none'} for any other name")
    print(f"keys      {describe_keys(settings)}")
    if not settings.replicate_api_token.strip():
        print("token     none: clients send their own (CLIENT_TOKENS)")
        return 0
    with closing(ReplicateAPI(settings, Timeouts())) as api:
        try:
            account = api.account()
        except APIError as error:
            where = f"REPLICATE_BASE_URL is {settings.replicate_base_url}."
            why = f" {where} {error.detail}" if error.detail else ""
            raise ConfigError(f"{error}{why}") from None
    owner = f"{account.get('type')} {account.get('username')}"
    print(f"token     OK: {owner} of Replicate")
    return 0


def run_and_reload(arguments: Sequence[str], options: argparse.Namespace) -> int:
    """Run the program as a child, and anew whenever a file has changed."""
    rest = [argument for argument in arguments if argument != "--reload"]
    command = [sys.executable, str(HERE / "proxy.py"), *rest]
    signals: list[int] = []
    handle_signals(lambda number, _: signals.append(number))
    while True:
        before = modification_times(options)
        with subprocess.Popen(command) as child:
            while not signals and modification_times(options) == before:
                time.sleep(0.1)
            if signals[:1] != [signal.SIGINT]:  # which the child has got too
                child.terminate()
            code = child.wait()
        if signals:
            return code if code >= 0 else 128 - code
        print("A file has changed: starting again.", file=sys.stderr)


def modification_times(options: argparse.Namespace) -> list[float]:
    """Those of the program, its settings and its models."""
    files = [HERE / "proxy.py", PAGE_FILE, Path(options.env_file or HERE / ".env")]
    with suppress(ConfigError):  # the child reports it
        files.append(Path(read_settings(options).models_path))
    return [file.stat().st_mtime if file.exists() else 0.0 for file in files]


class JSONFormatter(logging.Formatter):
    """Writes a line as an object: its fields, or the text that it is as `message`."""

    def format(self, record: logging.LogRecord) -> str:
        moment = self.formatTime(record, self.datefmt)
        row: Json = {"time": moment, "level": record.levelname}
        message: Any = record.msg
        is_row = isinstance(message, LogRow)
        row |= message if is_row else {"message": record.getMessage()}
        if record.exc_info:
            row["exception"] = self.formatException(record.exc_info)
        return json.dumps(row)


def log_to_stderr(settings: Settings) -> None:
    handler = logging.StreamHandler()
    line = "time=%(asctime)s level=%(levelname)s %(message)s"
    make = JSONFormatter if settings.log_format == "json" else logging.Formatter
    handler.setFormatter(make(line, "%Y-%m-%dT%H:%M:%S%z"))
    log.addHandler(handler)
    log.setLevel(settings.log_level.upper())


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    if options.reload:
        return run_and_reload(arguments, options)
    try:
        settings = read_settings(options)
        settings.check()
        if options.key:
            if not settings.api_keys:
                raise ConfigError("PROXY_API_KEY has no key: clients send their own.")
            print(settings.api_keys[0])
            return 0
        models = ModelsFile(settings.models_path, FAMILIES).current()
        play = play_replicate if options.demo else nullcontext
        with play(settings) as settings:
            if options.check:
                return check_token(settings, models)
            log_to_stderr(settings)
            with with_shared_store(settings) as settings:
                return serve(settings, models, options)
    except ConfigError as error:
        for problem in error.problems:
            print(f"proxy.py: {problem}", file=sys.stderr)
        return 1 if options.check else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
