# /// script
# requires-python = ">=3.10"
# dependencies = ["replicate==2.0.0b4"]
# ///
"""An OpenAI-compatible server in front of Replicate, in one file.

    python proxy.py --demo               see it work, with no account anywhere
    python proxy.py                      serve, as .env and the environment say
    proxy.make_server(settings)          the same, inside another program

Data flows down the page and calls go up it: a call is checked, put into the
terms of its model, run, and told again in OpenAI's terms.

    client                                                     Replicate
      |  request       input                                       ^
      +---> Serving ---> Requests ---> Inputs ---> Predictions ----+
      |                                                 |
      |  bytes           objects            text        | events
      +<--- Serving <--- Objects <--------- Text <------+

Each section uses only names from those above it.

    1. Ground
        Errors              what a client is told went wrong
        Settings            what the operator chooses, read once from the environment
        Models              which models there are, read from models.json
    2. Requests
        Validation          what a client may send: one row per parameter
        Messages            the parts of a message, and what is attached to it
        Tools               which tools a model may call
        Output formats      which JSON an answer has to be
    3. Inputs
        Tool prompts        tools and formats described in words
        Chat templates      how a conversation becomes what a model reads
        Families            how each kind of model is asked: one row per family
        Native              what some models know of tools and JSON by themselves
        Input schemas       a family read from what a model says of itself
        Prediction inputs   a request in the terms of its model
    4. Predictions
        Events              what a prediction is seen to do
        Cancellation        how a request in progress is made to stop
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
        Objects             events as OpenAI's objects, whole or in chunks
    7. Serving
        Generation          n choices, retries, and the response made of them
        Endpoints           one row per path, one function per OpenAI operation
        HTTP                requests as they come over a socket, read strictly
        Server              connections, hang-ups, silences and the end
        Workers             several servers on one port, each a process
        Command line        the program
"""

from __future__ import annotations

import _thread
import argparse
import ast
import gc
import http.client
import io
import json
import logging
import os
import re
import secrets
import select
import selectors
import shlex
import signal
import socket
import ssl
import string
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from base64 import b64decode, b64encode
from collections import defaultdict, deque
from collections.abc import (
    Callable,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import (
    AbstractContextManager,
    closing,
    contextmanager,
    suppress,
)
from dataclasses import asdict, dataclass, field, fields, replace
from email.utils import formatdate
from functools import lru_cache, partial
from hashlib import sha256
from hmac import compare_digest
from html import escape
from http.server import ThreadingHTTPServer
from itertools import accumulate, chain, groupby, islice, takewhile
from math import ceil, floor, isfinite
from operator import ge, gt, itemgetter, le, lt
from pathlib import Path
from queue import SimpleQueue
from socketserver import BaseRequestHandler, StreamRequestHandler, TCPServer
from typing import Any, NamedTuple, NoReturn, cast
from urllib.parse import SplitResult, quote, unquote, urlsplit

try:
    import httpx
    from replicate import (
        APIConnectionError,
        APIStatusError,
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
# Whoever finds something wrong raises an APIError, with the remedy in its
# message. Codes and words are those that api.openai.com was seen to answer.


RETRY = {"x-should-retry": "true"}

NO_RETRY = {"x-should-retry": "false"}  # OpenAI's SDKs obey it, at any status

ERROR_TYPES: dict[str | int | None, str] = {
    "insufficient_quota": "insufficient_quota",
    "rate_limit_exceeded": "requests",
    "invalid_value": "invalid_request_error",
    413: "server_error",
}


class APIError(Exception):
    """An OpenAI error object that can be raised; `headers` go with its status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message if len(message) < 2000 else f"{message[:2000]}…")
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


def as_api_error(error: Exception) -> APIError:
    """Make any exception tellable; one of ours is logged and described no further."""
    if isinstance(error, APIError):
        return error
    log.error("internal error", exc_info=error)
    return APIError(
        500,
        "The proxy failed to handle this call; its log says more.",
        code="internal_error",
        headers=NO_RETRY,
    )


ONE_WORD = re.compile(r"[!#-<>-~]+")


def quoted(value: Any) -> str:
    """A value of a key=value line, in quotes where it would not stay one word."""
    text = str(value)[:200]
    return text if ONE_WORD.fullmatch(text) else json.dumps(text)


# -- Settings ------------------------------------------------------------------
#
# Nothing else reads the environment, but for its HTTPS_PROXY. To add one: a
# field here, with its range if it is a number, and its line in .env.example.


LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

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
    """Why the program can't start: one clear sentence per problem."""

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
    max_concurrent_calls: int = field(default=1000, metadata={"range": (1, 10**6)})
    write_timeout: int = field(default=30, metadata={"range": (1, 3600)})
    shutdown_grace: int = field(default=25, metadata={"range": (0, 3600)})
    log_level: str = "INFO"

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Settings:
        """Raise ConfigError for numbers that are none; `check` finds the rest."""
        given: Json = {}
        problems = []
        for row in fields(cls):
            text = environ.get(row.name.upper(), "").strip()
            if text and row.metadata and not re.fullmatch(r"\d{1,12}", text):
                problems.append(f"{row.name.upper()} must be a number, not {text!r}.")
            elif text:
                given[row.name] = int(text) if row.metadata else text
        if problems:
            raise ConfigError(*problems)
        return cls(**given)

    @property
    def api_keys(self) -> list[str]:
        return [key.strip() for key in self.proxy_api_key.split(",") if key.strip()]

    def check(self) -> None:
        """Raise ConfigError if a server can't be made of these."""
        problems = [*self.secret_problems(), *self.range_problems()]
        if self.log_level.upper() not in LOG_LEVELS:
            problems.append(f"LOG_LEVEL must be one of {', '.join(LOG_LEVELS)}.")
        if not re.fullmatch(r"https?://[\w.-]+(:\d+)?(/.*)?", self.replicate_base_url):
            problems.append("REPLICATE_BASE_URL must be of the form https://host/v1.")
        if problems:
            raise ConfigError(*problems)

    def secret_problems(self) -> Iterator[str]:
        remedies = {
            "REPLICATE_API_TOKEN": "Get one at https://replicate.com/account/api-tokens",
            "PROXY_API_KEY": "Make one with: openssl rand -hex 32",
        }
        values = {
            "REPLICATE_API_TOKEN": [self.replicate_api_token.strip()],
            "PROXY_API_KEY": self.api_keys or [""],
        }
        for name, remedy in remedies.items():
            if fault := next(filter(None, map(secret_fault, values[name])), None):
                yield f"{name} {fault}. {remedy} and put it into .env."

    def range_problems(self) -> Iterator[str]:
        for row in fields(self):
            low, high = row.metadata.get("range", (0, 0))
            if row.metadata and not low <= getattr(self, row.name) <= high:
                yield f"{row.name.upper()} must be a number from {low} to {high}."


class Timeouts(NamedTuple):
    """How long we wait for what, in seconds: for those who embed or test a server."""

    connect: float = 5
    schema: float = 5  # for Replicate to tell what inputs a model has
    create: float = 30  # for Replicate to answer a create …
    look: float = 5  # … and a GET or a cancel, which can be asked again
    wait: int = 5  # for a whole answer to come with the create (Prefer: wait)
    stream: float = 60  # without a byte on an event stream
    poll: float = 1  # between looks at a prediction that does not stream …
    poll_most: float = 5  # … and at the most
    settle: float = 0.05  # between looks at one whose stream has said `done`
    blind: float = 30  # of looks that fail, before a prediction counts as lost
    grace: float = 10  # beyond the deadline, for Replicate to end it by itself
    idle: float = 75  # for the next call on a connection
    head: float = 20  # for all of a request's head to arrive …
    body: float = 120  # … and for all of its body
    hold: float = 3  # before a stream's status line goes out, whatever comes after
    keep_alive: float = 15  # of silence before a stream says that it lives
    tick: float = 0.2  # between looks at which streams are silent
    farewell: float = 8  # for calls that are broken off to say so, after a create
    drain: float = 1  # for calls that are under way on idle connections when we stop
    linger: float = 2  # for a client to hear our last word before we close


def secret_fault(value: str) -> str:
    if not value:
        return "is missing"
    if PLACEHOLDER.match(value):
        return "is still the placeholder"
    return (
        "" if re.fullmatch(r"[!-~]+", value) else "has a character no header can carry"
    )


def parse_env_file(text: str) -> dict[str, str]:
    """Read KEY=value lines as shells and Docker do: export, quotes and comments."""
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
# changed. To add a model: a row in models.json. To add a key: a row in CONFIG.


NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"

REF = re.compile(
    rf"deployments/{NAME}/{NAME}|(?!deployments/){NAME}/{NAME}(:{NAME})?|[0-9a-f]{{64}}"
)


class ModelConfig(NamedTuple):
    max_tokens: int | None = None
    temperature_range: tuple[float, float] | None = None
    supports_streaming: bool = True
    family: str | None = None
    input: Json = {}


@dataclass(frozen=True)
class Model:
    id: str  # what the client calls it
    ref: str  # what Replicate calls it: owner/name, owner/name:version …
    config: ModelConfig = ModelConfig()
    is_default: bool = False

    @property
    def owner_and_name(self) -> str:
        """Of a deployment, whose owner may run anybody's model, it is neither."""
        return without_version(self.ref)


@dataclass(frozen=True)
class Models:
    mappings: Mapping[str, str]
    default_model: str | None
    configs: Mapping[str, ModelConfig]
    created: int = 0  # when the file was last written: Unix seconds

    def model(self, id: str, ref: str, *, is_default: bool = False) -> Model:
        config = self.configs.get(ref) or self.configs.get(without_version(ref))
        return Model(id, ref, config or ModelConfig(), is_default)


def without_version(ref: str) -> str:
    return ref.partition(":")[0]


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_ref(value: Any) -> bool:
    return isinstance(value, str) and bool(REF.fullmatch(value))


def is_range(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(map(is_number, value))
        and value[0] <= value[1]
    )


CONFIG: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_tokens": (lambda v: type(v) is int and v >= 1, "a whole number from 1"),
    "temperature_range": (is_range, "two numbers, the lower one first"),
    "supports_streaming": (lambda v: isinstance(v, bool), "true or false"),
    "family": (lambda v: isinstance(v, str), "the name of a family"),
    "input": (lambda v: isinstance(v, dict), "an object"),
}


def parse_models(text: str, families: Iterable[str], created: int = 0) -> Models:
    """Raise ConfigError with the JSON path of what is wrong and what was expected."""
    try:
        root = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"it is not JSON: {error}") from None
    expect(isinstance(root, dict), "$", "an object")
    known = {"mappings", "default_model", "model_configs"}
    for key in root.keys() - known:
        expect(key.startswith("_"), f"$.{key}", f"one of {', '.join(sorted(known))}")
    default = root.get("default_model")
    mappings = read_object(root, "mappings")
    for name, ref in mappings.items():
        expect(is_ref(ref), f'$.mappings["{name}"]', "owner/name")
    expect(default is None or is_ref(default), "$.default_model", "owner/name")
    configs = read_object(root, "model_configs")
    names = list(families)
    read = {ref: read_config(ref, row, names) for ref, row in configs.items()}
    return Models(mappings, default, read, created)


def read_object(root: Json, key: str) -> Json:
    value = root.get(key, {})
    expect(isinstance(value, dict), f"$.{key}", "an object")
    return dict(value)


def read_config(ref: str, row: Any, families: Sequence[str]) -> ModelConfig:
    where = f'$.model_configs["{ref}"]'
    expect(isinstance(row, dict), where, "an object")
    row = {key: value for key, value in row.items() if not key.startswith("_")}
    for key, value in row.items():
        expect(key in CONFIG, f"{where}.{key}", f"one of {', '.join(CONFIG)}")
        is_legal, expected = CONFIG[key]
        expect(is_legal(value), f"{where}.{key}", expected)
    family = row.get("family")
    if family:
        expect(family in families, f"{where}.family", f"one of {', '.join(families)}")
    return ModelConfig(**row)


def expect(condition: object, path: str, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{path}: expected {expected}.")


class ModelsFile:
    """models.json as it stands: an edit takes effect at once, unless it is wrong."""

    def __init__(self, path: str, families: Iterable[str]) -> None:
        self.path = Path(path)
        self.families = list(families)
        self.lock = threading.Lock()
        self.stamp = self.look()
        self.catalogue = self.read()

    def look(self) -> tuple[int, ...]:
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
        stamp = self.look()
        with self.lock:
            if stamp != self.stamp:
                self.stamp = stamp
                try:
                    self.catalogue = self.read()
                    log.info(
                        "models_path=%s models=%d",
                        self.path,
                        len(self.catalogue.mappings),
                    )
                except ConfigError as error:
                    log.error("%s The models read before it stay.", error)
            return self.catalogue


def find_model(catalogue: Models, id: str) -> Model:
    """Find by mapping, else by the form of a ref, else the default; else raise 404."""
    if id in catalogue.mappings:
        return catalogue.model(id, catalogue.mappings[id])
    if REF.fullmatch(id):
        return catalogue.model(id, id)
    if catalogue.default_model:
        return catalogue.model(id, catalogue.default_model, is_default=True)
    raise unknown_model(id)


def unknown_model(id: str, why: str = "") -> APIError:
    remedy = (
        "Use a name that GET /v1/models lists, or a model of Replicate as owner/name."
    )
    message = f"The model `{id}` does not exist or you do not have access to it."
    return APIError(
        404, " ".join(filter(None, [message, why, remedy])), code="model_not_found"
    )


# ==== 2. REQUESTS =============================================================


# -- Validation ----------------------------------------------------------------
#
# A body is a JSON object that every reader would read alike: what JSON has no
# word for, or two of, is refused.
# Every parameter that OpenAI documents is in exactly one place: a row here
# (honoured, or refused with the reason), or IGNORED (harmless to drop). What
# OpenAI does not document goes to the model if its family names it. null is
# the same as absent. To add one: a row here, and its name in the families.


def parse_json_body(data: bytes, kind: str) -> Json:
    """What JSON has no word for is refused, though Python would read it."""
    try:
        text = data.decode("utf-8-sig")
        body = json.loads(
            text,
            parse_constant=refuse,
            parse_float=finite_float,
            object_pairs_hook=reject_duplicate_keys,
        )
        if "\\ud" in text.lower():  # "\ud800" alone is half a character
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        if "json" not in kind:
            raise unsupported_content_type(kind) from None
        raise APIError(400, NOT_JSON) from None
    require(isinstance(body, dict), NOT_JSON)
    return dict(body)


NOT_JSON = (
    "We could not parse the JSON body of your request. The OpenAI API expects a JSON "
    "object, but what was sent was not valid JSON or no object."
)


def unsupported_content_type(kind: str) -> APIError:
    return APIError(
        400,
        f"Unsupported content type: '{kind}'. This API method only accepts "
        "'application/json' requests. Please send one with the header "
        "'Content-Type: application/json'.",
        code="unsupported_content_type",
    )


def refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> Json:
    """Of two keys of a name, another reader might take the other."""
    return dict(pairs) if len(dict(pairs)) == len(pairs) else refuse("a key")


def finite_float(text: str) -> float:
    number = float(text)
    return number if isfinite(number) else refuse(text)


class Param(NamedTuple):
    kinds: tuple[type, ...] = ()
    low: float | None = None  # of a number; of a string or an array, its length
    high: float | None = None
    default: Any = None
    choices: tuple[Any, ...] = ()
    items: tuple[type, ...] = ()  # what an array is of
    each: Mapping[str, Param] | None = None  # what the objects in it hold
    required: bool = False
    refused: str = ""  # why any value but null and the choices is refused


STRING, INTEGER, BOOLEAN, ARRAY, OBJECT = (str,), (int,), (bool,), (list,), (dict,)

NUMBER = (int, float)

KINDS: dict[type, str] = {
    str: "a string",
    int: "an integer",
    float: "a decimal",
    bool: "a boolean",
    list: "an array",
    dict: "an object",
    type(None): "null",
}

MOST_PREDICTIONS = 128  # of one call; OpenAI's most choices

INT64 = (-(2**63), 2**63 - 1)

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")

VERBOSITIES = ("low", "medium", "high")

NEWER = {"max_tokens": "max_completion_tokens"}  # OpenAI's second name for one

NO_LOGPROBS = "Replicate's models tell no log probabilities."

ALL_CHOICES = "All choices are returned, with n."

STREAM_OPTIONS = {
    "include_usage": Param(BOOLEAN, default=False),
    "include_obfuscation": Param(BOOLEAN),
}

# Shared by chat and text completions. OpenAI's limit of stop strings is 4, but
# SillyTavern and Continue send more to servers like this.
SAMPLING = {
    "model": Param(STRING, 1, 256),
    "stream": Param(BOOLEAN, default=False),
    "stream_options": Param(OBJECT, default={}, each=STREAM_OPTIONS),
    "temperature": Param(NUMBER, 0, 2),
    "top_p": Param(NUMBER, 0, 1),
    "presence_penalty": Param(NUMBER, -2, 2),
    "frequency_penalty": Param(NUMBER, -2, 2),
    "max_tokens": Param(INTEGER, 1, INT64[1]),
    "max_completion_tokens": Param(INTEGER, 1, INT64[1]),
    "stop": Param((str, list), 0, 64, default=[], items=STRING),
    "seed": Param(INTEGER, *INT64),
    "reasoning_effort": Param(STRING, choices=EFFORTS),
    "verbosity": Param(STRING, choices=VERBOSITIES),
    "n": Param(INTEGER, 1, 8, default=1),
    "logit_bias": Param(
        refused="Token ids mean nothing to Replicate's models.", choices=({},)
    ),
    # Not OpenAI's, but sent by many clients to models that have them.
    "top_k": Param(INTEGER, *INT64),
    "min_tokens": Param(INTEGER, *INT64),
    "repetition_penalty": Param(NUMBER, 0),
    "replicate": Param(OBJECT, default={}),  # into the input, over all else
}

# A part's type names the field that it must have.
PART = {
    "type": Param(
        STRING,
        required=True,
        choices=("text", "refusal", "image_url", "input_audio", "file"),
    ),
    "text": Param(STRING),
    "refusal": Param(STRING),
    "image_url": Param(OBJECT, each={"url": Param(STRING, 1, required=True)}),
    "input_audio": Param(
        OBJECT,
        each={
            "data": Param(STRING, 1, required=True),
            "format": Param(STRING, required=True, choices=("wav", "mp3")),
        },
    ),
    "file": Param(
        OBJECT,
        each={
            "file_id": Param(refused="No files are kept here. Send it as file_data."),
            "file_data": Param(STRING, 1, required=True),
        },
    ),
}

FUNCTION = {
    "name": Param(STRING, 1, required=True),
    "description": Param(STRING),
    "parameters": Param(OBJECT),
    "strict": Param(BOOLEAN),
}

TOOL = {
    "type": Param(STRING, required=True, choices=("function", "custom")),
    "function": Param(OBJECT, each=FUNCTION),
}

FUNCTION_CALL = {
    "name": Param(STRING, 1, required=True),
    "arguments": Param(STRING, required=True),
}

MESSAGE_CALL = {
    "id": Param(STRING, 1, required=True),
    "type": Param(STRING, default="function", choices=("function",)),
    "function": Param(OBJECT, required=True, each=FUNCTION_CALL),
}

ROLES = ("developer", "system", "user", "assistant", "tool", "function")

MESSAGE = {  # check_history sees to what depends on the role
    "role": Param(STRING, required=True, choices=ROLES),
    "content": Param((str, list), items=OBJECT, each=PART),
    "refusal": Param(STRING),
    "name": Param(STRING, 0, 64),
    "tool_calls": Param(ARRAY, items=OBJECT, each=MESSAGE_CALL),
    "tool_call_id": Param(STRING),
    "function_call": Param(OBJECT, each=FUNCTION_CALL),
}

JSON_SCHEMA = {
    "name": Param(STRING, 1, 64, required=True),
    "description": Param(STRING, default=""),
    "schema": Param(OBJECT, required=True),
    "strict": Param(BOOLEAN, default=False),
}

RESPONSE_FORMAT = {
    "type": Param(
        STRING, required=True, choices=("text", "json_object", "json_schema")
    ),
    "json_schema": Param(OBJECT, each=JSON_SCHEMA),
}

CHAT = {
    **SAMPLING,
    "messages": Param(ARRAY, 1, required=True, items=OBJECT, each=MESSAGE),
    "tools": Param(ARRAY, 0, 128, default=[], items=OBJECT, each=TOOL),
    "tool_choice": Param((str, dict)),
    "parallel_tool_calls": Param(BOOLEAN, default=True),
    "functions": Param(ARRAY, 0, 128, default=[], items=OBJECT, each=FUNCTION),
    "function_call": Param((str, dict)),
    "logprobs": Param(refused=NO_LOGPROBS, choices=(False,)),
    "top_logprobs": Param(refused=NO_LOGPROBS, choices=(0,)),
    "response_format": Param(OBJECT, each=RESPONSE_FORMAT),
    "modalities": Param(
        refused="Replicate's language models answer in text.", choices=(["text"],)
    ),
    "audio": Param(refused="Replicate's language models answer in text."),
    "web_search_options": Param(refused="Replicate's language models don't search."),
}

COMPLETION = {
    **SAMPLING,
    "prompt": Param((str, list), 1, 128, default=["<|endoftext|>"], items=STRING),
    "max_tokens": Param(INTEGER, 1, INT64[1], default=16),
    "echo": Param(BOOLEAN, default=False),
    "suffix": Param(
        refused="Replicate's models don't fill in the middle.", choices=("",)
    ),
    "logprobs": Param(refused=NO_LOGPROBS),
    "best_of": Param(refused=ALL_CHOICES, choices=(1,)),
}

IGNORED = frozenset(
    (
        "user",
        "safety_identifier",
        "store",
        "metadata",
        "service_tier",
        "prediction",
        "moderation",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
    )
)


def check(body: Json, params: Mapping[str, Param], path: str = "") -> Json:
    """Fill in every parameter of the table; raise 400 for the first wrong one."""
    given = {k: v for k, v in body.items() if v is not None and k not in IGNORED}
    checked = {
        name: check_param(path + name, given.get(name), param)
        if param.required or name in given
        else param.default
        for name, param in params.items()
    }
    return {**given, **checked}


def check_param(path: str, value: Any, param: Param) -> Any:
    if value is None:
        missing = f"Missing required parameter: '{path}'."
        raise APIError(400, missing, code="missing_required_parameter", param=path)
    if param.refused:
        check_refused(path, value, param)
        return param.default
    check_kind(path, value, param.kinds)
    if isinstance(value, str) and param.items == STRING:
        value = [value]  # one string stands for an array of one
    if param.choices:
        check_choice(path, value, param.choices)
    if isinstance(value, NUMBER):
        check_number(path, value, param)
    if isinstance(value, (str, list)):
        check_length(path, value, param)
    return check_inside(path, value, param)


def check_inside(path: str, value: Any, param: Param) -> Any:
    if isinstance(value, list):
        for index, item in enumerate(value):
            check_kind(f"{path}[{index}]", item, param.items)
        if each := param.each:
            return [check(v, each, f"{path}[{i}].") for i, v in enumerate(value)]
    if isinstance(value, dict) and param.each:
        return check(value, param.each, f"{path}.")
    return value


def check_refused(path: str, value: Any, param: Param) -> None:
    message = f"Unsupported parameter: '{path}' is not supported here. {param.refused}"
    asks_for_nothing = any(type(value) is type(c) and value == c for c in param.choices)
    require(asks_for_nothing, message, code="unsupported_parameter", param=path)


def check_kind(path: str, value: Any, kinds: tuple[type, ...]) -> None:
    if type(value) in kinds:
        return
    names = [KINDS[kind] for kind in kinds if (kind, kinds) != (int, NUMBER)]
    expected = f"one of {' or '.join(names)}" if len(names) > 1 else names[0]
    got = f"expected {expected}, but got {KINDS[type(value)]} instead."
    message = f"Invalid type for '{path}': {got}"
    raise APIError(400, message, code="invalid_type", param=path)


def check_choice(path: str, value: str, choices: Sequence[str]) -> None:
    if value in choices:
        return
    *some, last = [f"'{choice}'" for choice in choices]
    listed = f"{', '.join(some)}, and {last}" if some else last
    message = f"Invalid value: '{value}'. Supported values are: {listed}."
    raise APIError(400, message, code="invalid_value", param=path)


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
    """Hold a string or an array to the row's bounds, as far as it has any."""
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


def as_object(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def without(object: Json, names: Collection[str]) -> Json:
    return {name: value for name, value in object.items() if name not in names}


def wrap(value: Any, low: float | None, high: float | None) -> Any:
    """Seeds that differ still do, within bounds."""
    if low is None or high is None:
        return clamp(value, low, high)
    return low + (value - low) % (high - low + 1)


def clamp(value: Any, low: float | None, high: float | None) -> Any:
    raised = value if low is None else max(value, low)
    return raised if high is None else min(raised, high)


# One encoder for all: json.dumps would make another for each value.
compact = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


# -- Messages ------------------------------------------------------------------
#
# Images and other files that come inside a message, as links or in base64. They
# are checked before anything is done with them. To add a type of part: a row in
# ATTACHABLE, and one in PART.


def given_back(message: Json) -> Json:
    """A message as `openai` dumps it may be a refusal, and may have an empty name."""
    refusal, content = message.pop("refusal"), message["content"]
    return {
        **message,
        "content": refusal if content is None else content,
        "name": message["name"] or None,
    }


Messages = list[Json]

WORDS = ("text", "refusal")  # the parts of a message that are text


def text_of(content: str | list[Json]) -> str:
    """The text of a message; its parts follow one another without a gap."""
    if isinstance(content, str):
        return content
    said = (part for part in content if part["type"] in WORDS)
    return "".join(part.get(part["type"]) or "" for part in said)


LINK = re.compile(r"https?://[^\s\x00-\x1f\x7f/][^\s\x00-\x1f\x7f]*", re.IGNORECASE)

MEDIA_TYPE = re.compile(r"[a-z0-9.+-]+/[a-z0-9.+-]+")

SIGNATURES = {
    "png": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "jpeg": re.compile(rb"\xff\xd8\xff"),
    "gif": re.compile(rb"GIF8[79]a"),
    "webp": re.compile(rb"RIFF....WEBP", re.DOTALL),
}

WRONG_IMAGE = (
    "You uploaded an unsupported image. Please make sure your image is valid and has "
    "one of the following formats: ['png', 'jpeg', 'gif', 'webp']."
)


class Attachment(NamedTuple):
    """What a data: URL holds."""

    kind: str  # its media type
    content: bytes

    @property
    def url(self) -> str:
        return f"data:{self.kind};base64,{b64encode(self.content).decode()}"


class Attachable(NamedTuple):
    """A type of part that is no text."""

    key: str  # what holds its URL, or the end of one …
    begin: str  # … that begins like this
    wanted: str  # what a client has to send
    code: str = "invalid_value"  # if it sends something else
    is_image: bool = False


ATTACHABLE = {
    "image_url": Attachable(
        "url",
        "",
        "https://… or data:image/png;base64,…",
        code="invalid_image_url",
        is_image=True,
    ),
    "input_audio": Attachable("data", "data:audio/{format};base64,", "base64"),
    "file": Attachable("file_data", "", "https://… or data:application/pdf;base64,…"),
}


def url_of(part: Json) -> str:
    """The URL that a part has, or what it holds as one."""
    row, held = ATTACHABLE[part["type"]], part[part["type"]]
    return row.begin.format_map(held) + str(held[row.key])


def check_parts(messages: list[Json]) -> list[Json]:
    """Messages whose parts hold what they say, written as any model can read it."""
    return [
        {**message, "content": check_content_parts(message["content"], index)}
        for index, message in enumerate(messages)
    ]


def check_content_parts(content: Any, index: int) -> Any:
    if not isinstance(content, list):
        return content
    path = f"messages[{index}].content"
    return [check_part(part, f"{path}[{n}]") for n, part in enumerate(content)]


def check_part(part: Json, path: str) -> Json:
    kind = part["type"]
    path = f"{path}.{kind}"
    held = check_param(path, part[kind], PART[kind]._replace(required=True))
    if kind in WORDS:
        return part
    row = ATTACHABLE[kind]
    url = check_url(url_of(part), row, f"{path}.{row.key}")
    return {**part, kind: {**held, row.key: url[len(row.begin.format_map(held)) :]}}


def check_url(url: str, row: Attachable, path: str) -> str:
    if LINK.fullmatch(url.strip()):
        return url.strip()
    attached = read_data_url(url)
    message = f"Invalid '{path}': it has to be {row.wanted}, with the right data."
    if attached is None:
        raise APIError(400, message, code=row.code, param=path)
    if row.is_image:
        is_one = is_image(attached)
        require(is_one, WRONG_IMAGE, code="invalid_image_format", param=path)
    return attached.url


def read_data_url(url: str) -> Attachment | None:
    """Read what browsers read: in any case, with parameters, broken into lines."""
    head, comma, data = url.partition(",")
    scheme, _, rest = head.partition(":")
    kind, *parameters = [word.strip().lower() for word in rest.split(";")]
    in_base64 = scheme.lower() == "data" and parameters[-1:] == ["base64"]
    if comma and in_base64 and MEDIA_TYPE.fullmatch(kind):
        with suppress(ValueError):
            return Attachment(kind, b64decode(plain_base64(data), validate=True))
    return None


def plain_base64(data: str) -> str:
    """On one line, in the alphabet that is not for URLs, and padded."""
    line = "".join(unquote(data).split()).replace("-", "+").replace("_", "/")
    line = line.rstrip("=")
    return line + "=" * (-len(line) % 4)


def is_image(attached: Attachment) -> bool:
    """Whether it is the image that it says."""
    kind = attached.kind.removeprefix("image/").replace("jpg", "jpeg")
    signature = SIGNATURES.get(kind)
    return bool(signature and signature.match(attached.content))


def attachments(messages: Messages) -> list[tuple[str, str]]:
    """What messages hold besides text, in order: the type of a part, and its URL."""
    return [
        (part["type"], url_of(part))
        for message in messages
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] not in WORDS
    ]


NO_CALL_BEFORE = (
    "Invalid parameter: messages with role 'tool' must be a response to a preceeding "
    "message with 'tool_calls'."
)

NO_ANSWERS = (
    "An assistant message with 'tool_calls' must be followed by tool messages "
    "responding to each 'tool_call_id'. The following tool_call_ids did not have "
    "response messages: "
)


def check_history(messages: Messages) -> None:
    """Raise 400 for missing content, and for calls and results that don't pair."""
    calls: dict[str, bool] = {}  # of the last assistant: whether it has its result
    for index, message in enumerate(messages):
        check_content(message, index)
        if message["role"] == "tool":
            check_result(message.get("tool_call_id"), calls, index)
            calls[message["tool_call_id"]] = True
        else:
            check_answered(calls, index)
            calls = {call["id"]: False for call in message.get("tool_calls") or []}
    check_answered(calls, len(messages) - 1)


def check_content(message: Json, index: int) -> None:
    is_call = message.get("tool_calls") or message.get("function_call")
    may_lack = message["role"] == "function" or message["role"] == "assistant"
    there = message.get("content") is not None
    path = f"messages[{index}].content"
    missing = f"Missing required parameter: '{path}'."
    there = there or (may_lack and (is_call or message["role"] == "function"))
    require(there, missing, code="missing_required_parameter", param=path)


def check_result(id: str | None, calls: Mapping[str, bool], index: int) -> None:
    path = f"messages[{index}].tool_call_id"
    missing = f"Missing required parameter: '{path}'."
    require(id, missing, code="missing_required_parameter", param=path)
    require(calls, NO_CALL_BEFORE, param=f"messages.[{index}].role")
    unknown = (
        f"Invalid parameter: 'tool_call_id' of '{id}' not found in 'tool_calls' of "
        "previous message."
    )
    require(id in calls, unknown, param=f"messages.[{index}].tool_call_id")


def check_answered(calls: Mapping[str, bool], index: int) -> None:
    open_ones = [id for id, is_answered in calls.items() if not is_answered]
    message = NO_ANSWERS + ", ".join(open_ones)
    require(not open_ones, message, param=f"messages.[{index}].role")


# -- Tools ---------------------------------------------------------------------
#
# What a model may call, for models that know nothing of tools: they are told
# in the system's text, and what was called and came back stands in the history
# in the form they were taught. `Dialects` hears what they make of it.


TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

CHOICES = ("none", "auto", "required")


class Tool(NamedTuple):
    name: str
    description: str
    parameters: Json


class Toolbox(NamedTuple):
    """What a model may call now; with a tool named by the client, that one only."""

    tools: tuple[Tool, ...]
    must_call: bool = False
    parallel: bool = True
    legacy: bool = False  # asked for with `functions`, and answered in kind

    @property
    def called(self) -> str:
        """The finish_reason of an answer that calls."""
        return "function_call" if self.legacy else "tool_calls"

    def find(self, name: str) -> Tool | None:
        return next((tool for tool in self.tools if tool.name == name), None)

    def knows(self, name: str, is_whole: bool) -> bool:
        """Whether a tool has that name, or one that begins so."""
        names = (tool.name for tool in self.tools)
        return any(n == name if is_whole else n.startswith(name) for n in names)


def parse_toolbox(body: Json) -> Toolbox | None:
    """Give what may be called, if anything; `body` has passed the tables."""
    both = "Only one of 'tools' and 'functions' can be given."
    require(not (body["tools"] and body["functions"]), both, param="functions")
    legacy = bool(body["functions"])
    param = "function_call" if legacy else "tool_choice"
    tools = read_tools(body)
    check_no_choice(body)
    names, must_call = read_choice(body[param], param)
    check_names(names, tools, param)
    if not tools or names == []:
        return None
    chosen = tuple(tool for tool in tools if names is None or tool.name in names)
    parallel = body["parallel_tool_calls"] and not legacy
    return Toolbox(chosen, must_call, parallel, legacy)


def check_no_choice(body: Json) -> None:
    """Without tools, a choice that asks for none of them does no harm."""
    for param, among in (("tool_choice", "tools"), ("function_call", "functions")):
        message = (
            f"Invalid value for '{param}': "
            f"'{param}' is only allowed when '{among}' are specified."
        )
        harmless = body[among] or body[param] in (None, "none", "auto")
        require(harmless, message, param=param)


def read_tools(body: Json) -> list[Tool]:
    tools = []
    for index, given in enumerate(body["functions"]):
        tools.append(read_tool(given, f"functions[{index}]"))
    for index, given in enumerate(body["tools"]):
        path = f"tools[{index}]"
        require_function(given, path)
        tools.append(read_tool(given["function"], f"{path}.function"))
    names = [tool.name for tool in tools]
    for name in names:
        message = f"Invalid 'tools': '{name}' is there twice; each needs its own name."
        param = "functions" if body["functions"] else "tools"
        require(names.count(name) == 1, message, code="invalid_value", param=param)
    return tools


def require_function(given: Json, path: str) -> None:
    custom = (
        f"Unsupported value: '{path}' is a custom tool, which Replicate's models "
        "can't be given. Use one of type 'function'."
    )
    param = f"{path}.type"
    require(given["type"] == "function", custom, code="unsupported_value", param=param)
    missing = f"Missing required parameter: '{path}.function'."
    code, param = "missing_required_parameter", f"{path}.function"
    require(given["function"] is not None, missing, code=code, param=param)


def read_tool(given: Json, path: str) -> Tool:
    name = given["name"]
    message = (
        f"Invalid '{path}.name': string does not match pattern. Expected a string "
        f"that matches the pattern '^{TOOL_NAME.pattern}$'."
    )
    fits = TOOL_NAME.fullmatch(name)
    require(fits, message, code="invalid_value", param=f"{path}.name")
    return Tool(name, given["description"] or "", given["parameters"] or {})


def read_choice(choice: Any, param: str) -> tuple[list[str] | None, bool]:
    """Give the names of what may be called, None for all, and whether one must be."""
    if isinstance(choice, dict):
        return read_named(choice, param)
    if choice is not None:
        choices = CHOICES if param == "tool_choice" else CHOICES[:2]
        check_choice(param, choice, choices)
    return ([] if choice == "none" else None), choice == "required"


def read_named(choice: Json, param: str) -> tuple[list[str] | None, bool]:
    if param == "function_call":
        return [read_name(choice, param)], True
    kind = choice.get("type")
    if kind == "allowed_tools":
        return read_allowed(choice.get("allowed_tools"))
    check_choice(f"{param}.type", str(kind), ("function", "allowed_tools"))
    return [read_name(choice.get("function"), f"{param}.function")], True


def read_allowed(allowed: Any) -> tuple[list[str] | None, bool]:
    path = "tool_choice.allowed_tools"
    has_tools = isinstance(allowed, dict) and isinstance(allowed.get("tools"), list)
    missing = f"Missing required parameter: '{path}.tools'."
    code = "missing_required_parameter"
    require(has_tools and allowed["tools"], missing, code=code, param=f"{path}.tools")
    mode = allowed.get("mode")
    check_choice(f"{path}.mode", str(mode), ("auto", "required"))
    names = [
        read_name(tool.get("function") if isinstance(tool, dict) else None, path)
        for tool in allowed["tools"]
    ]
    return names, mode == "required"


def read_name(function: Any, path: str) -> str:
    name = function.get("name") if isinstance(function, dict) else None
    missing = f"Missing required parameter: '{path}.name'."
    code, param = "missing_required_parameter", f"{path}.name"
    require(isinstance(name, str), missing, code=code, param=param)
    return str(name)


def check_names(names: list[str] | None, tools: list[Tool], param: str) -> None:
    among = "tools" if param == "tool_choice" else "functions"
    for name in names or []:
        there = any(tool.name == name for tool in tools)
        message = f"Tool choice '{name}' not found in '{among}' parameter."
        require(there, message, code="invalid_value", param=param)


def properties_of(tool: Tool | None) -> Json:
    return as_object(as_object(tool and tool.parameters).get("properties"))


# -- Output formats ------------------------------------------------------------
#


class ResponseFormat(NamedTuple):
    """The JSON that an answer is to be."""

    schema: Json
    name: str = ""  # "": any object will do
    description: str = ""
    strict: bool = False


ANY_OBJECT = ResponseFormat({"type": "object"})

IS_NAME = re.compile("[A-Za-z0-9_-]+")


def parse_response_format(body: Json) -> ResponseFormat | None:
    """Read what Parameters have checked; None where text is wanted."""
    asked = body["response_format"]
    if asked is None or asked["type"] == "text":
        return None
    return ANY_OBJECT if asked["type"] == "json_object" else read_schema(asked)


def read_schema(asked: Json) -> ResponseFormat:
    where = "response_format.json_schema"
    named = check_param(
        where, asked["json_schema"], Param(OBJECT, required=True, each=JSON_SCHEMA)
    )
    check_name(f"{where}.name", named["name"])
    rest = {key: named[key] for key in ("name", "description", "strict")}
    return ResponseFormat(named["schema"], **rest)


def check_name(path: str, name: str) -> None:
    expected = "Expected a string that matches the pattern '^[a-zA-Z0-9_-]+$'."
    message = f"Invalid '{path}': string does not match pattern. {expected}"
    require(IS_NAME.fullmatch(name), message, code="invalid_value", param=path)


class Wanted(NamedTuple):
    """What an answer has to be besides text."""

    toolbox: Toolbox | None = None
    format: ResponseFormat | None = None


# ==== 3. INPUTS ===============================================================


# -- Tool prompts --------------------------------------------------------------
#


INSTRUCTIONS = """\
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
    """The text above the system's own."""
    lines = [compact(taught_tool(tool)) for tool in toolbox.tools]
    how_many = MANY_CALLS if toolbox.parallel else ONE_CALL
    when = told_when(toolbox)
    return INSTRUCTIONS.format(tools="\n".join(lines), when=when, how_many=how_many)


def taught_tool(tool: Tool) -> Json:
    """With a description, if empty: a tool that is recited looks unlike a call."""
    told = {"name": tool.name, "description": tool.description}
    return {**told, **without_empty({"parameters": tool.parameters})}


def told_when(toolbox: Toolbox) -> str:
    if not toolbox.must_call:
        return (
            "Call a tool only if you need it; if not, answer in plain words, "
            "without these tags."
        )
    *others, tool = toolbox.tools
    which = "one of these tools" if others else f"the tool {tool.name}"
    return f"You must call {which} now: write the call and nothing else."


def tool_demands(toolbox: Toolbox) -> str:
    """What is still to be said to a model that was given the tools themselves."""
    demands = [told_when(toolbox)] if toolbox.must_call else []
    return " ".join([*demands, *([] if toolbox.parallel else [ONE_CALL])])


def repair_instructions(toolbox: Toolbox, why: str) -> str:
    """What the user's side says after an answer that was not what it had to be."""
    return (
        f"That was not a call that works: {why} {told_when(toolbox)} Write "
        '<tool_call>{"name": <tool-name>, "arguments": <arguments-object>}</tool_call>.'
    )


def without_empty(fields: Json) -> Json:
    return {name: value for name, value in fields.items() if value not in ("", {})}


def parsed(text: str) -> Any:
    """The value of a JSON text, None if it is not one."""
    try:
        return json.loads(text, parse_constant=refuse, parse_float=finite_float)
    except (ValueError, RecursionError):
        return None


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


def json_repair(format: ResponseFormat, why: str) -> str:
    return (
        f"This answer is wrong: {why}\n\n"
        f"Give the answer again, corrected and whole. {json_instructions(format)}"
    )


# -- Chat templates ------------------------------------------------------------
#
# How a conversation becomes what a kind of model reads. To add a layout: a
# function from messages and the input (or role) for system text to inputs.
#
# No text closes its turn or opens another, whoever wrote it: what would be a
# sign gets a zero-width space after its first character. TOKENS, the control
# tokens of the templates we know, are signs everywhere, in names and calls too.
# LABEL_SIGNS are signs in what shares a prompt with others: in a transcript, and
# in a system text on top of a prompt and what is below it. A lone question that
# fills its prompt, and a system text in a field of its own, keep their labels.
# Not covered are look-alikes: a label within a line, in letters that only look
# like it, without a colon or by another name ("Me:", "### Response"). Nothing
# is done to the prompt of a completion, unless it has to go as a message.
# Calls and their results in a conversation, checked for belonging together, and
# told in the form that a model was taught to call in. What is attached to them
# stays beside their text. Results stand in the turn of the user, so what looks
# like one in any text gets a zero-width space.


Turns = list[tuple[str, str]]  # each a role and a text

LABELS = {"user": "User", "assistant": "Assistant", "system": "System"}

BREAKS = r"\n\r\v\f\x1c-\x1e\x85\u2028\u2029"  # what may end a line: see splitlines

LABEL_SIGNS = re.compile(  # spaces and Markdown may be around it, but no JSON
    rf"(?i)(?:\A|(?<=[{BREAKS}]))[^\w{BREAKS}{{]*_*"
    rf"(?=(?:user|human|assistant|system)_*[^\w{BREAKS}\"']*[:：])."
)

TOKENS = re.compile(
    r"<(?=[|｜][^|｜\s<>]*[|｜]>"  # ChatML, Llama 3 and 4, DeepSeek, Kimi, gpt-oss …
    r"|/?s>|</?SYS>>"  # Llama 2, Mistral
    r"|(?:start|end)_of_turn>|[be]os>)"  # Gemma
    r"|\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]"
    r"|(?:BOS|EOS|EOT|PAD)\])"  # Kimi
)

PLACEHOLDERS = re.compile(r"\{(?=(?:system_)?prompt\})")

AS_IT_IS = {"prompt_template": "{prompt}"}  # the model's own template would come around


def escape_control_tokens(text: str, *signs: re.Pattern[str]) -> str:
    """Each sign matches up to its first character, and looks ahead at the rest."""
    for sign in signs:
        text = sign.sub("\\g<0>\u200b", text)
    return text


def escape_content(
    content: str | list[Json], *signs: re.Pattern[str]
) -> str | list[Json]:
    """The text of a message escape_control_tokens, and nothing else of its parts."""
    if isinstance(content, str):
        return escape_control_tokens(content, *signs)
    parts = [
        {
            name: escape_control_tokens(said, *signs)
            if name in WORDS and said
            else said
            for name, said in part.items()
        }
        for part in content
    ]
    if escape_control_tokens(text_of(parts), *signs) == text_of(parts):
        return parts
    gap = {"type": "text", "text": "\u200b"}  # they make a sign together
    return [each for part in parts for each in (part, gap)]


def split_system(messages: Messages) -> tuple[str, Turns]:
    """Part the system's first words from the turns; later ones are turns too."""
    turns = joined(
        (
            "system" if message["role"] == "developer" else message["role"],
            text_of(message["content"]),
        )
        for message in messages
    )
    if turns[0][0] != "system":
        return "", turns
    (_, told), *said = turns
    return (told, said) if said else ("", [("user", told)])  # then it is the question


def joined(turns: Iterable[tuple[str, str]]) -> Turns:
    """Let those who speak twice in a row speak once."""
    spoken = groupby(turns, key=itemgetter(0))
    return [(role, "\n\n".join(text for _, text in said)) for role, said in spoken]


def is_lone(turns: Turns) -> bool:
    return len(turns) == 1 and turns[0][0] == "user"


def with_system(told: str, prompt: str, system: str) -> Json:
    if told and system:
        return {system: told, "prompt": prompt}
    return {"prompt": f"{told}\n\n{prompt}" if told else prompt}


def render_transcript(messages: Messages, system: str) -> Json:
    """A conversation as a play is written; one lone question stays as it is."""
    told, turns = split_system(messages)
    shared = (LABEL_SIGNS, TOKENS)
    told = escape_control_tokens(told, *((TOKENS,) if system else shared))
    if is_lone(turns):
        signs = shared if told and not system else (TOKENS,)
        return with_system(told, escape_control_tokens(turns[0][1], *signs), system)
    lines = [
        f"{LABELS[role]}: {escape_control_tokens(text, *shared)}"
        for role, text in turns
    ]
    if turns[-1][0] != "assistant":
        lines.append("Assistant:")
    return with_system(told, "\n\n".join(lines), system)


def render_llama_2(messages: Messages, system: str) -> Json:
    """Turns as Replicate's page for llama-2-70b-chat gives them: it wraps the rest."""
    told, turns = split_system(messages)
    told = escape_control_tokens(told, TOKENS)
    turns = joined(
        ("user" if role == "system" else role, escape_control_tokens(text, TOKENS))
        for role, text in turns
    )
    if is_lone(turns):
        return with_system(told, turns[0][1], system)
    said = [
        f"[INST] {text} [/INST]" if role == "user" else text for role, text in turns
    ]
    return with_system(told, "\n".join(said), system)


def render_header_template(
    start: str, end: str, stop: str, messages: Messages, _: str
) -> Json:
    """Meta's template, written out, with the answer begun at its end."""
    told, turns = split_system(messages)
    if told:
        turns.insert(0, ("system", told))
    parts = [
        f"{start}{role}{end}\n\n"
        f"{escape_control_tokens(text, TOKENS, PLACEHOLDERS)}{stop}"
        for role, text in turns
    ]
    if turns[-1][0] == "assistant":
        parts[-1] = parts[-1].removesuffix(stop)
    else:
        parts.append(f"{start}assistant{end}\n\n")
    return {"prompt": "<|begin_of_text|>" + "".join(parts), **AS_IT_IS}


render_llama_3 = partial(
    render_header_template, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
)

render_llama_4 = partial(
    render_header_template, "<|header_start|>", "<|header_end|>", "<|eot|>"
)


def render_messages(messages: Messages, system: str) -> Json:
    """The model takes messages: they are only brought to the roles that all know."""
    names = {"developer": system, "system": system}
    told = [
        {
            **escape_all({**message, "content": None}),
            "role": names.get(message["role"], message["role"]),
            "content": content_of(message),
        }
        for message in messages
    ]
    return {"messages": [without_nulls(message) for message in told]}


def content_of(message: Json) -> str | list[Json]:
    """Parts only where there is more than text: every model knows a string."""
    content = message["content"]
    if isinstance(content, str) or all(part["type"] in WORDS for part in content):
        return escape_control_tokens(text_of(content), TOKENS)
    return escape_content([without_nulls(part) for part in content], TOKENS)


def escape_all(value: Any) -> Any:
    """All the text in a value escape_control_tokens: names, ids and arguments."""
    if isinstance(value, dict):
        return {name: escape_all(inside) for name, inside in value.items()}
    if isinstance(value, list):
        return [escape_all(inside) for inside in value]
    return escape_control_tokens(value, TOKENS) if isinstance(value, str) else value


def render_text_messages(messages: Messages, system: str) -> Json:
    """Messages whose content is text alone."""
    plain = [
        {**message, "content": text_of(message["content"])} for message in messages
    ]
    return render_messages(plain, system)


def without_nulls(message: Json) -> Json:
    return {name: value for name, value in message.items() if value is not None}


def render_response_items(messages: Messages, system: str) -> Json:
    """Items of OpenAI's Responses API: calls and their results are some too."""
    first = list(takewhile(lambda m: m["role"] in ("system", "developer"), messages))
    told = escape_control_tokens(
        "\n\n".join(text_of(m["content"]) for m in first), TOKENS
    )
    said = [item for message in messages[len(first) :] for item in items_of(message)]
    said = escape_all(said)
    if not said:
        return {"input_item_list": [{"role": "user", "content": told}]}
    return {"input_item_list": said, **({system: told} if told else {})}


def items_of(message: Json) -> list[Json]:
    text = text_of(message["content"])
    if message["role"] == "tool":
        id = message["tool_call_id"]
        return [{"type": "function_call_output", "call_id": id, "output": text}]
    calls = [
        {"type": "function_call", "call_id": call["id"], **call["function"]}
        for call in message.get("tool_calls") or []
    ]
    said = {"role": message["role"], "content": text}
    return [said, *calls] if text or not calls else calls


RESULTS = re.compile(r"(?i)<(?=[\s/]*tool_response)")


def plain_history(messages: Messages) -> Messages:
    """Calls and their results as texts, in the form that a model was taught."""
    plain: Messages = []
    names: dict[str, str] = {}
    results: list[Json] = []
    for message in messages:
        if message["role"] in ("tool", "function"):
            text = told_result(message, names)
            results += beside("\n" + text if results else text, message)
            continue
        if results:
            plain.append({"role": "user", "content": simplest(results)})
            results = []
        calls = message.get("tool_calls") or []
        names.update((call["id"], call["function"]["name"]) for call in calls)
        plain.append(told_message(message))
    if results:
        plain.append({"role": "user", "content": simplest(results)})
    return plain


def tools_history(messages: Messages) -> Messages:
    """Calls and their results as they are; the older ones in the newer form."""
    told: Messages = []
    last = ""  # the id that stands for the last call of the older form
    for index, message in enumerate(messages):
        newer = {**message, "content": message["content"] or "", "function_call": None}
        if function := message.get("function_call"):
            last = f"call_{index}"
            call = {"id": last, "type": "function", "function": function}
            newer["tool_calls"] = [call]
        if message["role"] == "function" and last:
            newer |= {"role": "tool", "tool_call_id": last, "name": None}
        elif message["role"] == "function":
            parts = beside(told_result(message, {}), message)
            newer = {"role": "user", "content": simplest(parts)}
        told.append(newer)
    return told


def told_message(message: Json) -> Json:
    functions = [call["function"] for call in message.get("tool_calls") or []]
    if message.get("function_call"):
        functions.append(message["function_call"])
    content = message.get("content") or ""
    if not functions:
        return {**message, "content": escape_content(content, RESULTS)}
    lines = filter(None, [text_of(content), *map(told_call, functions)])
    parts = beside(escape_control_tokens("\n".join(lines), RESULTS), message)
    return {"role": message["role"], "content": simplest(parts)}


def beside(text: str, message: Json) -> list[Json]:
    """A text in place of that of a message, and what is attached to the message."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    attached = [part for part in parts if part["type"] not in WORDS]
    return [{"type": "text", "text": text}, *attached]


def simplest(parts: list[Json]) -> str | list[Json]:
    """A string where nothing is attached."""
    is_text = all(part["type"] in WORDS for part in parts)
    return text_of(parts) if is_text else parts


def told_call(function: Json) -> str:
    name, text = json.dumps(function["name"]), function["arguments"].strip() or "{}"
    arguments = text if parsed(text) is not None else json.dumps(text)
    arguments = arguments.replace("</tool_call", r"<\/tool_call")  # the same in JSON
    return f'<tool_call>{{"name": {name}, "arguments": {arguments}}}</tool_call>'


def told_result(message: Json, names: Mapping[str, str]) -> str:
    id = message.get("tool_call_id")
    name = names[id] if id else message.get("name") or ""
    of = f' name="{escape(name)}"' + (f' id="{escape(id)}"' if id else "")
    text = escape_control_tokens(text_of(message.get("content") or ""), RESULTS)
    return f"<tool_response{of}>\n{text}\n</tool_response>"


# -- Families ------------------------------------------------------------------
#
# A family is how a kind of model is asked: its layout, and what it calls each
# parameter, by its page on Replicate. The map is an allow-list: what it leaves
# out is not sent. To add a family: a row; the first row whose pattern matches
# owner/name counts. A pattern names language models that are known to be so and
# no others of their makers, whose own schemas know better.


class Field(NamedTuple):
    """One input of a model: its name, and what it may be."""

    name: str
    low: float | None = None
    high: float | None = None
    default: Any = None  # sent when nobody named a value
    choices: tuple[Any, ...] = ()
    joined: str = ""  # a list goes as one string, with this between
    kind: str = ""  # its JSON type; "": that of the parameter
    words: Mapping[str, Any] = {}  # what a word of OpenAI's stands for


class Slot(NamedTuple):
    """Where a model takes what is attached to messages, and how many of it."""

    name: str  # "": in the messages themselves
    most: int = 1
    as_list: bool = False


class Family(NamedTuple):
    pattern: str
    render: Callable[[Messages, str], Json]  # messages, system field -> input
    system: str  # the input, or role, for system text; "": on top of the prompt
    fields: Mapping[str, Field]
    raw: Json = {}  # what makes the model take a prompt as it is
    slots: Mapping[str, Slot] = {}  # by the type of part
    prompt: str = "prompt"  # the input for a prompt; "": it takes messages alone
    others: Mapping[str, Field] = {}  # inputs that OpenAI has no name for
    required: tuple[str, ...] = ()  # inputs without which it does not run
    is_language: bool = True


# Where a model's own default is short (128 to 2,048 tokens), an answer would
# break off in the middle for programs that name no limit: ask for more.
LONG = 4096


def same(*names: str) -> dict[str, Field]:
    """Parameters that a family calls what OpenAI calls them."""
    return {name: Field(name) for name in names}


def limit(
    name: str, low: int = 1, high: int | None = None, default: Any = LONG
) -> dict[str, Field]:
    return {"max_tokens": Field(name, low, high, default)}


COMMA_STOP = {"stop": Field("stop_sequences", joined=",", kind="string")}

PENALTIES = same("presence_penalty", "frequency_penalty")

LLAMA = {
    **same("temperature", "top_p", "top_k", "min_tokens"),
    **PENALTIES,
    **limit("max_tokens"),
    **COMMA_STOP,
}

MISTRAL = {
    "temperature": Field("temperature", 0.01, 5),
    **same("top_p", "top_k", "seed"),
    "min_tokens": Field("min_new_tokens", -1),
    **limit("max_new_tokens"),
    **COMMA_STOP,
}

LLAMA_2 = {**MISTRAL, "top_k": Field("top_k", 0)}

LLAMA_2_7B = {**MISTRAL, "top_k": Field("top_k", -1), **same("repetition_penalty")}

GRANITE = {
    **same("temperature", "top_p", "top_k", "min_tokens", "seed", "stop"),
    **PENALTIES,
    **limit("max_completion_tokens"),
}

OPEN = {**same("temperature", "top_p"), **PENALTIES, **limit("max_tokens")}

GPT_LIMIT = limit("max_completion_tokens", default=None)

GPT_4 = {**same("temperature", "top_p"), **PENALTIES, **GPT_LIMIT}


def effort(*choices: str, name: str = "reasoning_effort") -> dict[str, Field]:
    return {"reasoning_effort": Field(name, choices=choices)}


# Tokens to think with, as Google counts them behind an API like OpenAI's.
BUDGETS = {
    **dict.fromkeys(("none", "minimal"), 0),
    "low": 1024,
    "medium": 8192,
    **dict.fromkeys(("high", "xhigh", "max"), 24576),
}

BUDGET = Field("thinking_budget", 0, 24576, kind="integer", words=BUDGETS)

O_SERIES = {**GPT_LIMIT, **effort("low", "medium", "high")}

GPT_5 = {**GPT_LIMIT, **same("verbosity"), **effort("minimal", "low", "medium", "high")}

GPT_51 = {**GPT_5, **effort("none", "low", "medium", "high")}

GPT_52 = {**GPT_5, **effort("none", "low", "medium", "high", "xhigh")}

GPT_5_PRO = {**GPT_LIMIT, **same("verbosity")}

GEMINI = {
    "temperature": Field("temperature", 0, 2),
    **same("top_p"),
    **limit("max_output_tokens", 1, 65535, default=None),
}

GEMINI_25 = {**GEMINI, "reasoning_effort": BUDGET}

GEMINI_3 = {**GEMINI, **effort("low", "high", name="thinking_level")}

GEMINI_31 = {**GEMINI, **effort("low", "medium", "high", name="thinking_level")}

STRUCTURED = {**GPT_5, **limit("max_output_tokens", default=None)}

IN_PLACE = {"image_url": Slot("", 100)}

ONE_IMAGE = {"image_url": Slot("image")}

IMAGES = {"image_url": Slot("images", 10, as_list=True)}

IMAGES_AND_SOUND = {**IMAGES, "input_audio": Slot("audio")}

FAMILIES = {
    "llama-2-7b": Family(
        r"meta/llama-2-7b-chat", render_llama_2, "system_prompt", LLAMA_2_7B
    ),
    "llama-2": Family(
        r"meta/llama-2-.*-chat", render_llama_2, "system_prompt", LLAMA_2
    ),
    "llama-3": Family(
        r"meta/meta-llama-3.*-instruct", render_llama_3, "", LLAMA, AS_IT_IS
    ),
    "llama-4": Family(r"meta/llama-4-.*-instruct", render_llama_4, "", LLAMA, AS_IT_IS),
    "gpt-5-structured": Family(
        r"openai/gpt-5-structured",
        render_response_items,
        "instructions",
        STRUCTURED,
        slots={"image_url": Slot("image_input", 100, as_list=True)},
    ),
    "o1-mini": Family(r"openai/o1-mini", render_messages, "user", GPT_LIMIT),
    "o-series": Family(
        r"openai/o(1|3|3-mini|4-mini)",
        render_messages,
        "system",
        O_SERIES,
        slots=IN_PLACE,
    ),
    "gpt-5-pro": Family(
        r"openai/gpt-5-pro", render_messages, "system", GPT_5_PRO, slots=IN_PLACE
    ),
    "gpt-5.1": Family(
        r"openai/gpt-5\.1", render_messages, "system", GPT_51, slots=IN_PLACE
    ),
    "gpt-5.2": Family(
        r"openai/gpt-5\.\d", render_messages, "system", GPT_52, slots=IN_PLACE
    ),
    "gpt-5": Family(
        r"openai/gpt-5(-mini|-nano)?", render_messages, "system", GPT_5, slots=IN_PLACE
    ),
    "kimi-k2.5": Family(
        r"moonshotai/kimi-k2\.5",
        render_transcript,
        "",
        {**OPEN, **limit("max_tokens", 1, 131072)},
        slots=ONE_IMAGE,
    ),
    "deepseek-v3.1": Family(
        r"deepseek-ai/deepseek-v3\.1",
        render_transcript,
        "",
        {**OPEN, **effort("None", "medium", name="thinking")},
    ),
    "open": Family(
        r"deepseek-ai/deepseek-(r1|v3)|openai/gpt-oss-(20b|120b)|xai/grok-4|"
        r"qwen/qwen3-235b-a22b-instruct-2507|moonshotai/kimi-k2-(thinking|instruct)",
        render_transcript,
        "",
        OPEN,
    ),
    "gpt-4": Family(
        r"openai/gpt-4(o|o-mini|\.1|\.1-mini|\.1-nano)",
        render_messages,
        "system",
        GPT_4,
        slots=IN_PLACE,
    ),
    "claude-3.5": Family(
        r"anthropic/claude-(3\.5-|4\.5-haiku).*",
        render_transcript,
        "system_prompt",
        limit("max_tokens", 1, 8192, default=None),
    ),
    "claude": Family(
        r"anthropic/claude-.*",
        render_transcript,
        "system_prompt",
        limit("max_tokens", 1024, 64000, default=None),
        slots=ONE_IMAGE,
    ),
    "gemini-3.1": Family(
        r"google/gemini-3\.1-(pro|flash)",
        render_transcript,
        "system_instruction",
        GEMINI_31,
        slots=IMAGES_AND_SOUND,
    ),
    "gemini-3": Family(
        r"google/gemini-3-(pro|flash)",
        render_transcript,
        "system_instruction",
        GEMINI_3,
        slots=IMAGES_AND_SOUND,
    ),
    "gemini": Family(
        r"google/gemini-2\.5-flash",
        render_transcript,
        "system_instruction",
        GEMINI_25,
        slots=IMAGES,
    ),
    "granite": Family(
        r"ibm-granite/granite-3\.[012]-.*-instruct",
        render_transcript,
        "system_prompt",
        LLAMA,
    ),
    "granite-messages": Family(
        r"ibm-granite/granite-(3\.3-8b-instruct|4\.0-h-small)",
        render_text_messages,
        "system",
        GRANITE,
    ),
    "mistral": Family(r"mistralai/mistral-7b-v0\.1", render_transcript, "", MISTRAL),
}

PLAIN = Family("", render_transcript, "", {})


def find_family(model: Model) -> Family:
    if model.config.family:
        return FAMILIES[model.config.family]
    return row_of(model.owner_and_name)


@lru_cache(1000)  # a call looks for one
def row_of(name: str) -> Family:
    matching = (
        family
        for family in FAMILIES.values()
        if re.fullmatch(family.pattern, name, re.IGNORECASE)
    )
    return next(matching, PLAIN)


# -- Native --------------------------------------------------------------------
#
# Some models take tools, calls in the history and formats as inputs: they are
# given them so. All else is the same, as what they answer is text that has to
# be heard: in which form Replicate tells a call of theirs is not documented.
# To add a kind of model: a row in NATIVE, by its layout.


class Native(NamedTuple):
    """The inputs in which a model takes what others are told in words."""

    tool: Callable[[Tool], Json]  # one of the input `tools`
    format_name: str
    format: Callable[[ResponseFormat], Json]


def chat_tool(tool: Tool) -> Json:
    """OpenAI's own object, of chat completions …"""
    return {"type": "function", "function": without_empty(tool._asdict())}


def response_tool(tool: Tool) -> Json:
    """… and of responses."""
    return {"type": "function", **without_empty(tool._asdict())}


def granite_format(format: ResponseFormat) -> Json:
    """OpenAI's own object: ibm-granite/granite-3.3 and later take it so."""
    if not format.name:
        return {"type": "json_object"}
    return {"type": "json_schema", "json_schema": named_schema(format)}


def structured_schema(format: ResponseFormat) -> Json:
    """What openai/gpt-5-structured calls json_schema: as the Responses API has it."""
    if not format.name:
        return {"format": {"type": "json_object"}}
    return {"format": {"type": "json_schema", **named_schema(format)}}


def named_schema(format: ResponseFormat) -> Json:
    described = {"description": format.description} if format.description else {}
    return {
        "name": format.name,
        **described,
        "schema": format.schema,
        "strict": format.strict,
    }


NATIVE: dict[Any, Native] = {
    render_text_messages: Native(chat_tool, "response_format", granite_format),
    render_response_items: Native(response_tool, "json_schema", structured_schema),
}


def asked_for(body: Json, family: Family, wanted: Wanted) -> Json:
    """A call as this family has to be told of what is wanted."""
    native = NATIVE.get(family.render)
    history = tools_history if native else plain_history
    inputs = native_inputs(native, wanted) if native else {}
    return {
        **body,
        "messages": [*taught(wanted, bool(native)), *history(body["messages"])],
        "replicate": {**inputs, **body["replicate"]},
    }


def native_inputs(native: Native, wanted: Wanted) -> Json:
    inputs: Json = {}
    if wanted.toolbox:
        inputs["tools"] = [native.tool(tool) for tool in wanted.toolbox.tools]
    if wanted.format:
        inputs[native.format_name] = native.format(wanted.format)
    return inputs


def taught(wanted: Wanted, is_native: bool) -> Messages:
    """What a model has to be told in words."""
    toolbox, format = wanted
    told = []
    if toolbox:
        told += [tool_demands(toolbox) if is_native else tool_instructions(toolbox)]
    if format and not is_native:
        told += [json_instructions(format)]
    return [{"role": "system", "content": text} for text in told if text]


# -- Input schemas -------------------------------------------------------------
#
# A family read from the model's own input schema, for the models that have no
# row and for what a row does not name. Nothing in a schema is sure to be there
# or to be of its type. To add a name that models use for a parameter: a word in
# SYNONYMS.
# Which family a call gets: its model's row, or what the model says of itself,
# which is looked up no oftener than it must be, once for all who ask together.


class Synonyms(NamedTuple):
    kinds: frozenset[str]  # what it may be, by kind_of; "" is always accepted
    names: str  # what models call it, the best first


def kinds(words: str) -> frozenset[str]:
    return frozenset(["", *words.split()])


TEXT, WORD = kinds("string"), kinds("string word")

WHOLE, REAL = kinds("integer number"), kinds("number")

FILES = kinds("file files string strings array")

# What carries the conversation …
CONVERSATION = {
    "messages": Synonyms(kinds("objects array"), "messages"),
    "prompt": Synonyms(
        TEXT,
        "prompt user_prompt input_prompt text input_text text_input input inputs "
        "query question instruction message user_message",
    ),
    "system": Synonyms(
        TEXT,
        "system_prompt system_instruction system_instructions system_message "
        "instructions system pre_prompt",
    ),
}

SYSTEM_NAMES = CONVERSATION["system"].names.split()

# … what is attached to it, by the type of part …
ATTACHED = {
    "image_url": Synonyms(
        FILES,
        "images image_input input_images image_urls image input_image image_url media",
    ),
    "input_audio": Synonyms(
        FILES, "audio audio_file audio_input input_audio audio_url"
    ),
    "file": Synonyms(FILES, "file files pdf document documents input_file"),
}

# … and what OpenAI has a parameter for.
SYNONYMS = {
    "max_tokens": Synonyms(
        WHOLE,
        "max_completion_tokens max_output_tokens max_tokens max_new_tokens "
        "max_tokens_to_generate num_predict max_length",
    ),
    "min_tokens": Synonyms(WHOLE, "min_tokens min_new_tokens min_length"),
    "temperature": Synonyms(REAL, "temperature temp"),
    "top_p": Synonyms(REAL, "top_p"),
    "top_k": Synonyms(WHOLE, "top_k"),
    "presence_penalty": Synonyms(REAL, "presence_penalty"),
    "frequency_penalty": Synonyms(REAL, "frequency_penalty"),
    "repetition_penalty": Synonyms(REAL, "repetition_penalty repeat_penalty"),
    "stop": Synonyms(
        kinds("string strings array"), "stop stop_sequences stop_strings stop_words"
    ),
    "seed": Synonyms(WHOLE, "seed random_seed"),
    "reasoning_effort": Synonyms(
        WORD, "reasoning_effort thinking_level effort reasoning thinking"
    ),
    "verbosity": Synonyms(WORD, "verbosity"),
}

GRADED = {"reasoning_effort": EFFORTS, "verbosity": VERBOSITIES}

NOT_OPENAI = {"top_k", "min_tokens", "repetition_penalty"}  # though they have rows

DOCUMENTED = frozenset({*CHAT, *COMPLETION, *IGNORED} - NOT_OPENAI)

MANY = 100  # attachments, where the schema sets no bound

MAX_HOPS = 8  # from a schema to what it refers to

ALTERNATIVES = ("anyOf", "oneOf")

JSON_TYPES = ("string", "integer", "number", "boolean", "array", "object")

TEXT_IN_OBJECT = {"text", "output", "content"}  # one is the text of the output


def resolve(schema: Any, schemas: Json) -> Json:
    """Fold what a schema refers to into it; its own words count before those."""
    flat: Json = {}
    for _ in range(MAX_HOPS):
        flat = {**as_object(schema), **flat}
        schema = referred(as_object(schema), schemas)
    return flat


def referred(schema: Json, schemas: Json) -> Any:
    """What stands behind a $ref, or the only alternative that is not null."""
    if isinstance(ref := schema.get("$ref"), str):
        return schemas.get(ref.rpartition("/")[2])
    if whole := as_list(schema.get("allOf")):
        return whole[0]
    parts = alternatives(schema)
    return parts[0] if len(parts) == 1 else None  # of several, it may be any


def alternatives(schema: Json) -> list[Json]:
    lists = (as_list(schema.get(key)) for key in ALTERNATIVES)
    parts = (as_object(part) for parts in lists for part in parts)
    return [part for part in parts if part.get("type") != "null"]


def json_type(schema: Json) -> str:
    """The type that is not null; "" if the schema names none."""
    told = schema.get("type")
    named = [told, *as_list(told)]
    return next((kind for kind in JSON_TYPES if kind in named), "")


def kind_of(schema: Json, schemas: Json) -> str:
    """A JSON type, or closer: file or word, and files, strings or objects."""
    kind = json_type(schema)
    if kind == "string" and schema.get("format") == "uri":
        return "file"
    if kind == "string" and as_list(schema.get("enum")):
        return "word"
    if kind == "array":
        item = resolve(schema.get("items"), schemas)
        listed = "file" if item.get("format") == "uri" else json_type(item)
        return f"{listed}s" if listed in ("file", "string", "object") else kind
    return kind


def read_family(document: Any) -> Family | None:
    """Read a model's OpenAPI document; None if none of its inputs takes the text."""
    schemas = as_object(as_object(as_object(document).get("components")).get("schemas"))
    if not is_text(resolve(schemas.get("Output"), schemas), schemas):
        return PLAIN._replace(is_language=False)
    return read_inputs(resolve(schemas.get("Input"), schemas), schemas)


def read_inputs(inputs: Json, schemas: Json) -> Family | None:
    rows = as_object(inputs.get("properties")).items()
    known = {name: resolve(row, schemas) for name, row in rows if as_object(row)}
    offered = {name: kind_of(row, schemas) for name, row in known.items()}
    needed = tuple(name for name in known if is_needed(name, known[name], inputs))
    talk = find_inputs(CONVERSATION, offered, needed)
    if not talk.keys() & {"messages", "prompt"}:
        return None
    family = family_of_schema(talk, needed)
    parameters = {
        parameter: own
        for parameter, own in find_inputs(SYNONYMS, offered, needed).items()
        if is_graded(parameter, known[own])
    }
    spoken = {*parameters.values(), talk.get("messages"), talk.get("prompt")}
    return family._replace(
        fields={p: read_field(p, own, known[own]) for p, own in parameters.items()},
        slots=read_slots(family, find_inputs(ATTACHED, offered, needed), known),
        others=read_others(known, spoken),
        required=needed,
    )


def is_text(output: Json, schemas: Json) -> bool:
    """Whether what the model makes can be told as text, for all that is known."""
    if len(parts := alternatives(output)) > 1:
        folded = (resolve(part, schemas) for part in parts)
        return any(is_text(without(part, ALTERNATIVES), schemas) for part in folded)
    if isinstance(output.get("x-cog-array-display"), str):
        return bool(output["x-cog-array-display"] == "concatenate")
    inside = as_object(output.get("properties"))
    if inside:
        return any(name in inside for name in TEXT_IN_OBJECT)
    kind = kind_of(output, schemas)
    if kind == "array":  # of what has no type, or of numbers and the like
        return not resolve(output.get("items"), schemas)
    return kind in ("", "string", "word", "strings", "object")


def find_inputs(
    table: Mapping[str, Synonyms], offered: Mapping[str, str], needed: Sequence[str]
) -> dict[str, str]:
    """The model's name for each row of which it has an input; needed ones first."""
    found = {}
    for name, (legal, names) in table.items():
        fitting = [own for own in names.split() if offered.get(own, "-") in legal]
        if fitting:
            found[name] = min(fitting, key=lambda own: own not in needed)
    return found


def is_graded(parameter: str, schema: Json) -> bool:
    """Whether the model's words for it, if it says which, are grades of OpenAI's."""
    words, scale = as_list(schema.get("enum")), GRADED.get(parameter, ())
    return not (words and scale) or any(str(word).lower() in scale for word in words)


def is_needed(name: str, schema: Json, inputs: Json) -> bool:
    return name in as_list(inputs.get("required")) and "default" not in schema


def family_of_schema(talk: Mapping[str, str], needed: Sequence[str]) -> Family:
    """Messages as they are, where they alone will do; else a transcript."""
    prompt = talk.get("prompt", "")
    if "messages" in talk and prompt not in needed:
        return Family("", render_messages, "system", {}, prompt=prompt)
    render = (
        partial(render_transcript_as, prompt) if prompt != "prompt" else PLAIN.render
    )
    return Family("", render, talk.get("system", ""), {}, prompt=prompt)


def render_transcript_as(prompt: str, messages: Messages, system: str) -> Json:
    """A transcript for a model with its own name for the prompt."""
    rendered = render_transcript(messages, system)
    return {prompt if name == "prompt" else name: v for name, v in rendered.items()}


def read_field(parameter: str, name: str, schema: Json) -> Field:
    kind = json_type(schema)
    low, high = read_bounds(kind, schema)
    choices = [v for v in as_list(schema.get("enum")) if isinstance(v, (str, *NUMBER))]
    is_short = is_bound(schema.get("default")) and 0 < schema["default"] < LONG
    return Field(
        name,
        low,
        high,
        default=LONG if parameter == "max_tokens" and is_short else None,
        choices=tuple(choices),
        joined="," if parameter == "stop" and kind == "string" else "",
        kind=kind,
    )


def is_bound(value: Any) -> bool:
    return is_number(value) and abs(value) < 2**64


def read_bounds(kind: str, schema: Json) -> tuple[float | None, float | None]:
    """The least and the most that a field takes: of an integer, whole ones."""
    if kind == "array":
        return read_bound(schema.get("minItems")), read_bound(schema.get("maxItems"))
    step = 1 if kind == "integer" else 0.01  # inwards from a bound that is left out
    lows = (schema.get("minimum"), stepped(schema.get("exclusiveMinimum"), step))
    highs = (schema.get("maximum"), stepped(schema.get("exclusiveMaximum"), -step))
    low = max(filter(is_bound, lows), default=None)
    high = min(filter(is_bound, highs), default=None)
    if kind == "integer":
        return low and ceil(low), high and floor(high)
    return low, high


def stepped(bound: Any, step: float) -> Any:
    return bound + step if is_bound(bound) else None


def read_bound(value: Any) -> float | None:
    return value if is_bound(value) else None


def read_slots(
    family: Family, found: Mapping[str, str], known: Mapping[str, Json]
) -> dict[str, Slot]:
    """Where attachments go: for images among messages, in their place there."""
    slots = {kind: read_slot(name, known[name]) for kind, name in found.items()}
    in_place = family.render is render_messages and "image_url" in slots
    return {**slots, **IN_PLACE} if in_place else slots


def read_slot(name: str, schema: Json) -> Slot:
    if json_type(schema) != "array":
        return Slot(name)
    most = read_bound(schema.get("maxItems")) or 0
    return Slot(name, int(most) if most >= 1 else MANY, as_list=True)


def read_others(
    known: Mapping[str, Json], spoken: Collection[str | None]
) -> dict[str, Field]:
    """Each other input under its own name, but where OpenAI has a meaning for that."""
    return {
        name: read_field("", name, schema)
        for name, schema in known.items()
        if name not in DOCUMENTED and name not in spoken
    }


SCHEMA_LASTS = 3600  # seconds, for one that was read …

RETRY_AFTER = 60  # … and for one that could not be

MOST_SCHEMAS = 1000

OWNED = re.compile(rf"({NAME})/({NAME})(?::({NAME}))?")

DEPLOYED = re.compile(rf"deployments/({NAME})/({NAME})")


def merge(row: Family, read: Family | None) -> Family:
    """The row, and from the schema what the row does not name."""
    if read is None:
        return row
    taken = {field.name for field in row.fields.values()}
    others = {name: f for name, f in read.others.items() if name not in taken}
    in_place = row.render is render_messages
    slots = {kind: s for kind, s in read.slots.items() if s.name or in_place}
    return row._replace(
        fields={**read.fields, **row.fields},
        slots={**slots, **row.slots},
        others={**others, **row.others},
    )


class Inquiry:
    """One look at a schema, for all the calls that wait for it."""

    def __init__(self, last: Family | None, expires: float) -> None:
        self.family = last
        self.expires = expires
        self.done = threading.Event()


class SchemaCache:
    """Families by ref, each read once and kept for an hour."""

    def __init__(
        self,
        look_up: Callable[[str, str, str], Json],  # owner, name, version or ""
        release_of: Callable[[str, str], str],  # a deployment's owner, name -> ref
        clock: Callable[[], float] = time.monotonic,
        limit: float = 5,  # seconds that a call waits for one
    ) -> None:
        self.look_up = look_up
        self.release_of = release_of
        self.clock = clock
        self.limit = limit
        self.lock = threading.Lock()
        self.inquiries: dict[str, Inquiry] = {}

    def find(self, ref: str) -> Family | None:
        """The last family that was read, or None: no schema, or not in time."""
        if not (OWNED.fullmatch(ref) or DEPLOYED.fullmatch(ref)):
            return None  # Replicate tells nothing of a version without its model
        inquiry = self.inquire(ref)
        if inquiry.family is None:  # an old one serves while it is read again
            inquiry.done.wait(self.limit)
        return inquiry.family

    def inquire(self, ref: str) -> Inquiry:
        with self.lock:
            last = self.inquiries.get(ref)
            if last and self.clock() < last.expires:
                return last
            fresh = Inquiry(last.family if last else None, self.clock() + RETRY_AFTER)
            self.inquiries.pop(ref, None)
            self.inquiries[ref] = fresh
            for oldest in list(self.inquiries)[:-MOST_SCHEMAS]:
                del self.inquiries[oldest]
        threading.Thread(target=self.answer, args=(ref, fresh), daemon=True).start()
        return fresh

    def answer(self, ref: str, inquiry: Inquiry) -> None:
        try:
            inquiry.family = self.read(ref)
            inquiry.expires = self.clock() + SCHEMA_LASTS
        except Exception as error:
            told = as_api_error(error)
            log.warning("the schema of %s can't be read: %s", ref, told)
        finally:
            inquiry.done.set()

    def read(self, ref: str) -> Family | None:
        """Of a deployment: the row of the model that it runs, or that one's schema."""
        if deployed := DEPLOYED.fullmatch(ref):
            ref = self.release_of(deployed[1], deployed[2])
            row = row_of(without_version(ref))
            if row is not PLAIN:
                return merge(row, self.find(ref))
        owned = OWNED.fullmatch(ref)
        return read_family(self.look_up(*owned.groups(""))) if owned else None


def family_for(
    model: Model, body: Json, attached: set[str], schemas: SchemaCache
) -> Family:
    """Its row if that says all the call needs, so that a known model costs no GET."""
    row = find_family(model)
    if row is PLAIN:
        family = schemas.find(model.ref) or PLAIN
    elif says_all(row, body, attached):
        family = row
    else:
        family = merge(row, schemas.find(model.ref))
    no_text = "is not a language model: what it makes is not text. Use one that is."
    is_language = family.is_language
    require(is_language, f"The model `{model.id}` {no_text}", param="model")
    return family


def says_all(row: Family, body: Json, attached: set[str]) -> bool:
    sent = {name for name, value in body.items() if value is not None}
    own = {field.name for field in row.fields.values()}
    own |= {*SYSTEM_NAMES} if "messages" in body else set()
    unknown = sent - DOCUMENTED - row.fields.keys() - own
    return not unknown and attached <= row.slots.keys()


# -- Prediction inputs ---------------------------------------------------------
#
# A call in the terms of its model: what Replicate is given, and what must be
# known of it to tell its answer.


LONGEST = 6 * 2**20  # users report that Replicate interrupts what is larger


class PredictionInput(NamedTuple):
    """What Replicate is to run."""

    model: Model
    input: Json
    names: Mapping[str, str]  # Replicate's name of an input -> OpenAI's
    prompt: str  # the text in it, to estimate tokens by
    limit: int | None  # of tokens, as it was sent
    cut: int | None  # of tokens, where the client's limit is below the model's least
    echo: bool = False  # say the prompt before the answer
    again: Callable[[str, str], PredictionInput] | None = (
        None  # by what was said, and what to do
    )


def build_chat_input(body: Json, model: Model, family: Family) -> PredictionInput:
    body, model = with_system_texts(body, model)
    prompt = "\n".join(text_of(message["content"]) for message in body["messages"])
    rendered = {
        **family.render(unplaced(body["messages"], family.slots), family.system),
        **place(attachments(body["messages"]), family.slots),
    }
    asked = order(body, model, family, rendered, prompt)
    return asked._replace(again=partial(chat_again, body, model, family))


def with_system_texts(body: Json, model: Model) -> tuple[Json, Model]:
    """System text beside the messages as one of them: an input would hide theirs."""
    sources = (model.config.input, body)
    if all(source.keys().isdisjoint(SYSTEM_NAMES) for source in sources):
        return body, model
    named = [(src, name) for src in sources for name in SYSTEM_NAMES if src.get(name)]
    for source, name in named:
        if not isinstance(source[name], str):
            raise misfit(name, source[name], "string")
    told = [{"role": "system", "content": source[name]} for source, name in named]
    given, body = (without(source, SYSTEM_NAMES) for source in sources)
    config = model.config._replace(input=given)
    messages = [*told, *body["messages"]]
    return {**body, "messages": messages}, replace(model, config=config)


def chat_again(
    body: Json, model: Model, family: Family, said: str, what: str
) -> PredictionInput:
    """The same order, with a first answer to it and what is to be done about that."""
    answer = {"role": "assistant", "content": said}
    messages = [*body["messages"], answer, {"role": "user", "content": what}]
    return build_chat_input({**body, "messages": messages}, model, family)


def build_completion_input(
    body: Json, model: Model, family: Family, prompt: str
) -> PredictionInput:
    rendered = render_prompt(family, prompt)
    asked = order(body, model, family, rendered, prompt)
    return asked._replace(echo=body["echo"])


def order(
    body: Json, model: Model, family: Family, rendered: Json, prompt: str
) -> PredictionInput:
    too_long = "This is more text than Replicate takes (6 MiB). Send less of it."
    short_enough = len(prompt.encode()) <= LONGEST
    param = "messages" if "messages" in body else "prompt"
    require(short_enough, too_long, code="context_length_exceeded", param=param)
    fields = {**family.others, **family.fields}
    asked = apply_model_config(asked_of(body, fields), model.config)
    input = {  # what comes later counts
        **bounded(asked, fields),
        **rendered,
        **model.config.input,
        **body["replicate"],
    }
    require_inputs(model, family, input)
    names = {field.name: name for name, field in fields.items()}
    limit = input.get(fields["max_tokens"].name) if "max_tokens" in fields else None
    limit = limit if type(limit) is int else None  # `replicate` may hold anything
    short = asked["max_tokens"] and limit and asked["max_tokens"] < limit
    return PredictionInput(
        model, input, names, prompt, limit, asked["max_tokens"] if short else None
    )


def check_places(attached: list[tuple[str, str]], model: Model, family: Family) -> None:
    """Raise 400 for what the model does not take, or not so much of."""
    slots = family.slots
    for kind in {kind for kind, _ in attached}:
        count = sum(each == kind for each, _ in attached)
        most = slots[kind].most if kind in slots else 0
        require(
            count <= most,
            f"The model `{model.id}` ({model.ref}) takes {most or 'no'} parts of type "
            f"'{kind}', but got {count}. {ABLE.get(kind, 'No model known here does.')}",
            code="invalid_value",
            param="messages",
        )


def place(attached: list[tuple[str, str]], slots: Mapping[str, Slot]) -> Json:
    placed: Json = {}
    for kind, slot in slots.items():
        urls = [url for each, url in attached if each == kind]
        if urls and slot.name:
            placed[slot.name] = urls if slot.as_list else urls[0]
    return placed


def unplaced(messages: Messages, slots: Mapping[str, Slot]) -> Messages:
    """Messages without what has an input of its own: it would be sent twice."""
    placed = {kind for kind, slot in slots.items() if slot.name}

    def rest(content: str | list[Json]) -> str | list[Json]:
        if isinstance(content, str):
            return content
        return [part for part in content if part["type"] not in placed]

    return [{**message, "content": rest(message["content"])} for message in messages]


ABLE = {
    "image_url": "openai/gpt-4o and google/gemini-2.5-flash take several images, "
    "anthropic/claude-4.5-sonnet takes one.",
    "input_audio": "google/gemini-3-flash takes one.",
}


def asked_of(body: Json, wanted: Mapping[str, Field]) -> Json:
    """What the client asks for; the model's own name counts before OpenAI's."""
    body = {**body, "stop": list(filter(None, body["stop"])) or None}
    asked = {}
    for parameter, row in wanted.items():
        own = [row.name] if row.name not in DOCUMENTED else []
        names = [*own, NEWER.get(parameter, parameter), parameter]
        given = [name for name in names if body.get(name) is not None]
        if given:
            asked[parameter] = fit(given[0], body[given[0]], parameter, row)
    return asked


def apply_model_config(asked: Json, config: ModelConfig) -> Json:
    """The parameters after the operator's word on them in models.json."""
    limits = (asked.get("max_tokens"), config.max_tokens)
    temperature = asked.get("temperature")
    if config.temperature_range and temperature is not None:
        temperature = clamp(temperature, *config.temperature_range)
    limit = min(filter(None, limits), default=None)
    return {**asked, "max_tokens": limit, "temperature": temperature}


def bounded(asked: Json, wanted: Mapping[str, Field]) -> Json:
    """Inputs within the model's bounds; where nothing was asked for, the default."""
    inputs = {}
    for parameter, row in wanted.items():
        value = row.default if asked.get(parameter) is None else asked[parameter]
        if value is not None:
            bring = wrap if parameter == "seed" else clamp
            is_real = is_number(value)
            inputs[row.name] = bring(value, row.low, row.high) if is_real else value
    return inputs


def fit(name: str, value: Any, parameter: str, field: Field) -> Any:
    """Bring a value to what the model takes: its type, and its words."""
    if isinstance(value, str):
        value = field.words.get(value, value)
    if field.joined and isinstance(value, list):
        return join(value, field.joined)
    kind = field.kind or KIND_OF.get(parameter, "")
    fitted = CASTS[kind](value) if kind else value
    if fitted is None:
        raise misfit(name, value, kind)
    scale = GRADED.get(parameter, ())
    return choose(name, fitted, field.choices, scale) if field.choices else fitted


def join(items: list[Any], between: str) -> str | None:
    """An item that holds the separator can't be sent."""
    return between.join(str(item) for item in items if between not in str(item)) or None


def whole(value: Any) -> int | None:
    """2.0 is whole in JSON; 2.5 is refused, as either side of it would be a guess."""
    return int(value) if is_number(value) and value % 1 == 0 else None


def listed(value: Any) -> list[Any] | None:
    """One string stands for an array of one, as it does in OpenAI's API."""
    return [value] if isinstance(value, str) else value if type(value) is list else None


# By JSON type: the value as that, or None. A list for a string has no separator that
# could be known, but where `joined` tells it.
CASTS: dict[str, Callable[[Any], Any]] = {
    "string": lambda value: value if isinstance(value, str) else None,
    "integer": whole,
    "number": lambda value: value if is_number(value) else None,
    "boolean": lambda value: value if isinstance(value, bool) else None,
    "array": listed,
    "object": lambda value: value if isinstance(value, dict) else None,
}

# … and the type of what a checked parameter holds: stop strings are a list by then.
JSON_KINDS = {STRING: "string", INTEGER: "integer", NUMBER: "number"}

KIND_OF = {
    **{name: JSON_KINDS.get(param.kinds, "") for name, param in SAMPLING.items()},
    "stop": "array",
}

ARTICLES = {"integer": "an", "array": "an", "object": "an"}


def misfit(name: str, value: Any, kind: str) -> APIError:
    wanted = f"{ARTICLES.get(kind, 'a')} {kind}"
    message = (
        f"Invalid type for '{name}': this model takes {wanted}, "
        f"but got {KINDS[type(value)]} instead."
    )
    return APIError(400, message, code="invalid_type", param=name)


def choose(name: str, value: Any, choices: Sequence[Any], scale: Sequence[str]) -> Any:
    """A grade that the model does not know becomes its nearest."""
    graded = [word for word in choices if str(word).lower() in scale]
    if value in choices or value not in scale or not graded:
        check_choice(name, value, choices)
        return value
    rank = scale.index(value)
    return min(graded, key=lambda word: abs(scale.index(word.lower()) - rank))


def render_prompt(family: Family, prompt: str) -> Json:
    """A bare prompt as it is, or as the one message of a model that takes no other."""
    if family.prompt:
        return {family.prompt: prompt, **family.raw}
    return family.render([{"role": "user", "content": prompt}], family.system)


def require_inputs(model: Model, family: Family, input: Json) -> None:
    """Raise 400 for what the schema says the model can't run without."""
    missing = [name for name in family.required if name not in input]
    named = " and ".join(f"'{name}'" for name in missing)
    first = next(iter(missing), "")
    parts = {
        slot.name: f"a part of type '{kind}'" for kind, slot in family.slots.items()
    }
    remedies = {**parts, family.system: "a system message"}
    elsewise = f'"replicate": {{"{first}": …}} in the body'
    require(
        not missing,
        f"The model `{model.id}` needs the input {named}, which nothing in this call "
        f"gives. Send {remedies.get(first, elsewise)}.",
        code="missing_required_parameter",
        param=first,
    )


# ==== 4. PREDICTIONS ==========================================================


# -- Events --------------------------------------------------------------------
#
# The narrow waist: one Started, then Thoughts, Texts and ToolCalls (each with its
# Arguments), then one Done; or it is cut short by an APIError. Upstream makes them
# and Replies tells them. What shapes an answer in between is a function from
# events to events; it closes those it reads when it is closed: that cancels.


class Usage(NamedTuple):
    """Tokens, None where Replicate did not count them."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    reasoning_tokens: int = 0
    is_estimate: bool = False


@dataclass(frozen=True)
class Started:
    prediction: str  # its id
    ref: str  # what it runs on


@dataclass(frozen=True)
class Text:
    text: str
    # The next one came together with it, so that they can leave together. Who makes
    # a text of texts leaves it out, and so nothing waits for what may not come.
    more: bool = field(default=False, compare=False, repr=False)


@dataclass(frozen=True)
class Reasoning:
    text: str  # of its reasoning


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


Event = Started | Reasoning | Text | ToolCall | Arguments | Done

Events = Generator[Event, None, None]

ALPHABET = string.ascii_letters + string.digits


def random_id(prefix: str, length: int) -> str:
    picks = secrets.token_bytes(length)
    return prefix + "".join([ALPHABET[pick % len(ALPHABET)] for pick in picks])


# -- Cancellation --------------------------------------------------------------
#
# A call in the air: whoever works for it may simply block, as a hang-up or the
# end of the server wakes it and raises in it. That is what cancels predictions.


class ClientDisconnected(Exception):
    """The client has left: nobody is there to be told anything."""


class Cancellation:
    """Why a call has to stop, once it has, and how to wake those who work for it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.cause: Exception | None = None
        self.wakers: list[Callable[[], None]] = []

    def cancel(self, cause: Exception) -> None:
        with self.lock:
            if self.cause:
                return
            self.cause = cause
            for wake in self.wakers:
                with suppress(Exception):  # those after it must wake too
                    wake()

    def check(self) -> None:
        """Raise the cause if the call has to stop."""
        if self.cause:
            raise self.cause

    def sleep(self, seconds: float) -> None:
        woken = threading.Event()
        with self.on_cancel(woken.set):
            woken.wait(seconds)
        self.check()

    @contextmanager
    def on_cancel(self, wake: Callable[[], None]) -> Iterator[None]:
        """Have `wake` called, in the meantime, if the call has to stop."""
        with self.lock:
            self.check()
            self.wakers.append(wake)
        try:
            yield
        finally:
            with self.lock:
                self.wakers.remove(wake)


# -- HTTP client ---------------------------------------------------------------
#
# The head of an HTTP message, of a client's or of Replicate's, read strictly: what
# can be read in two ways lets one message hide in another. email.parser, by which
# http.server and http.client read one, is not strict, and takes ten times as long.
# What a host of Replicate's answers on a connection, in pieces as they come. For
# http.client each chunk is a piece: here tokens that came together stay together.
# ConnectionPool to Replicate's hosts, kept for the next request. httpx's own pool is
# quadratic in its connections, and takes more than twice the CPU for a request.
# A GET is safe to repeat; a POST is not.
# Replicate's event streams: this is where a proxy spends its time, token by token.
# A stream read to its end leaves its connection for the next one.


MAX_HEAD = 65536

HEADERS = re.compile(rb"(?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*\r\n)*")

ONCE = frozenset(("content-length", "transfer-encoding", "host", "authorization"))


class BadHead(http.client.HTTPException):
    """What is wrong with a head, as the end of a sentence."""


def read_headers(lines: Iterable[bytes]) -> dict[str, str]:
    """Names in lower case; what several by one name say is joined."""
    text = b"".join(line + b"\r\n" for line in lines)
    if not HEADERS.fullmatch(text):
        raise BadHead("a header is not of the form Name: value")
    headers: dict[str, str] = {}
    for line in text.decode("latin-1").split("\r\n")[:-1]:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if name in headers and name in ONCE:
            raise BadHead(f"it has two headers {name}")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def read_length(headers: Mapping[str, str]) -> int | None:
    """How long the body is, if there is a word of it."""
    length = headers.get("content-length")
    if length is None:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", length):
        raise BadHead("its Content-Length is not a number")
    return int(length)


STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-9]\d\d)(?: .*)?")

# What stands before a chunk ends the one before it; the first has none.
CHUNK_HEAD = re.compile(rb"\r\n0*([1-9A-Fa-f][0-9A-Fa-f]{0,7})[ \t]*(?:;.*)?\r\n")

LAST_CHUNK = re.compile(rb"\r\n0+[ \t]*(?:;.*)?\r\n(?:[^\r\n]+\r\n)*\r\n")

UNDECIDED = re.compile(  # as it is cut off in the middle
    rb"\r?\Z|\r\n[0-9A-Fa-f]*[ \t]*(?:;.*)?\r?\Z|\r\n0+[ \t]*(?:;.*)?\r\n"
)

BODILESS = (204, 304)

READ_MOST = 8192  # bytes, at the most, of one read

Pieces = Generator[bytes, None, bytes]  # and, at the end, what came beyond


def unchunked(pieces: Iterable[bytes]) -> Pieces:
    """What is in the chunks, with no regard to where they begin and end."""
    data, left = b"\r\n", 0  # to come of a chunk
    for piece in pieces:
        data, at, told = data + piece, 0, []
        while at < len(data):
            if not left:
                if not (head := CHUNK_HEAD.match(data, at)):
                    break
                at, left = head.end(), int(head[1], 16)
            told.append(data[at : at + left])
            at += len(told[-1])
            left -= len(told[-1])
        if told:
            yield b"".join(told)
        data = data[at:]
        if not left and (beyond := beyond_last(data)) is not None:
            return beyond
    raise http.client.IncompleteRead(data)


def beyond_last(data: bytes) -> bytes | None:
    """What follows the last chunk, if that is here. Raise BadHead if it is no chunk."""
    if last := LAST_CHUNK.match(data):
        return data[last.end() :]
    if not UNDECIDED.match(data) or len(data) > MAX_HEAD:
        raise BadHead("a chunk has no size")
    return None


def cut_off(pieces: Iterable[bytes], length: int) -> Pieces:
    """The first so many bytes, of which there is one at least."""
    for piece in pieces:
        yield piece[:length]
        length -= len(piece)
        if length <= 0:
            return piece[len(piece) + length :]
    raise http.client.IncompleteRead(b"", length)


class Answer:
    """An answer whose head was read. All here raises OSError or HTTPException."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = memoryview(bytearray(READ_MOST))  # new ones would leave holes
        self.unread = b""
        first, *lines = self.read_head()
        while first.startswith((b"HTTP/1.1 1", b"HTTP/1.0 1")):  # there is more to come
            first, *lines = self.read_head()
        self.status = read_status(first)
        self.headers = read_headers(lines)
        self.keeps = first[:8] == b"HTTP/1.1" and "close" not in self.says("connection")
        self.is_over = False
        self.body = self.read_body()

    def says(self, header: str) -> str:
        return self.headers.get(header, "").lower()

    def receive(self) -> bytes:
        """A time-out is one, by whomever: see `block`."""
        try:
            return bytes(self.buffer[: self.sock.recv_into(self.buffer)])
        except BlockingIOError:
            raise TimeoutError("nothing came in time") from None

    def read_head(self) -> list[bytes]:
        while b"\r\n\r\n" not in self.unread:
            piece = self.receive()
            if not piece and not self.unread:
                raise http.client.RemoteDisconnected("it ended without an answer")
            if not piece or len(self.unread) > MAX_HEAD:
                raise http.client.BadStatusLine(repr(self.unread[:80]))
            self.unread += piece
        head, _, self.unread = self.unread.partition(b"\r\n\r\n")
        return head.split(b"\r\n")

    def read_body(self) -> Iterator[bytes]:
        """`is_over` tells those who read it to its end that it was."""
        pieces, coding = self.pieces(), self.says("transfer-encoding")
        length = 0 if self.status in BODILESS else read_length(self.headers)
        if coding and (coding != "chunked" or length is not None):
            raise BadHead("its length is told in two ways, or in one that is not known")
        if coding:
            beyond = yield from unchunked(pieces)
        elif length == 0:
            beyond = self.unread
        elif length is not None:
            beyond = yield from cut_off(pieces, length)
        else:
            yield from pieces
            beyond = b"its end is that of the connection"
        self.is_over = True
        self.keeps = self.keeps and not beyond

    def pieces(self) -> Iterator[bytes]:
        piece = self.unread or self.receive()
        while piece:
            yield piece
            piece = self.receive()


def read_status(line: bytes) -> int:
    if not (match := STATUS_LINE.fullmatch(line)):
        raise http.client.BadStatusLine(repr(line[:80]))
    return int(match[1])


MOST_IDLE = 100  # connections to one host

Origin = tuple[str, str]  # scheme, and host with port

Headers = Iterable[tuple[bytes, bytes]]


class NotConnected(OSError):
    """Nothing was sent, as there was no way there."""


class ConnectionPool:
    """Idle connections, of which the last used is taken first."""

    def __init__(
        self, timeouts: Timeouts, tls: ssl.SSLContext, keep: float = 60
    ) -> None:
        self.timeouts = timeouts
        self.tls = tls
        self.keep = keep  # seconds that a connection may be idle
        self.idle: dict[Origin, deque[tuple[float, socket.socket]]] = defaultdict(deque)

    def ways(self, origin: Origin) -> Iterator[socket.socket]:
        """An idle connection if there is one, then a new one. Raise NotConnected."""
        if idle := self.take(origin):
            yield idle
        connection = prepare(origin, self.timeouts.connect, self.tls)
        try:
            connection.connect()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise NotConnected(repr(error)) from error
        block(connection.sock, socket.SO_SNDTIMEO, self.timeouts.create)
        yield connection.sock

    def take(self, origin: Origin) -> socket.socket | None:
        idle = self.idle[origin]
        self.trim(idle)
        with suppress(IndexError):  # another thread was faster
            while sock := idle.pop()[1]:
                if not has_input(sock):
                    return sock
                sock.close()  # as the other side has done
        return None

    def ask(
        self,
        origin: Origin,
        method: str,
        request: bytes,
        timeout: float,
        cancellation: Cancellation,
    ) -> Answer:
        """Raise OSError or HTTPException: NotConnected if nothing was sent."""
        failure: Exception = NotConnected("no way there")
        for sock in self.ways(origin):
            try:
                with cancellation.on_cancel(partial(shut, sock)):
                    return exchange(sock, request, timeout)
            except (OSError, http.client.HTTPException) as error:
                failure = error
                cancellation.check()
                if method != "GET" or isinstance(error, TimeoutError):
                    break
            except Exception:  # the call has stopped
                sock.close()
                raise
        raise failure

    def put_back(self, origin: Origin, answer: Answer) -> None:
        """Keep the connection if the answer's last bytes are here already."""
        sock = answer.sock
        with suppress(OSError, http.client.HTTPException):
            if not answer.is_over:
                sock.settimeout(0.001)
                for _ in islice(answer.body, 2):  # a little, and then its end
                    pass
            if answer.is_over and answer.keeps:
                idle = self.idle[origin]
                idle.append((time.monotonic(), sock))
                self.trim(idle)
                return
        sock.close()

    def trim(self, idle: deque[tuple[float, socket.socket]]) -> None:
        """Close what is too old, or too much."""
        oldest = time.monotonic() - self.keep
        with suppress(IndexError):
            while idle[0][0] <= oldest or len(idle) > MOST_IDLE:
                idle.popleft()[1].close()

    def close(self) -> None:
        for idle in list(self.idle.values()):
            while idle:
                with suppress(IndexError):
                    idle.pop()[1].close()


# The headers of an answer that the library or we look at.
KEPT = ("content-type", "content-encoding", "retry-after", "ratelimit-reset")


class ReplicateTransport(httpx.Client):
    """What the library sends by: httpx, without what Replicate's API has no use for."""

    def __init__(self, connections: ConnectionPool) -> None:
        super().__init__(transport=httpx.BaseTransport())  # which is never used
        self.connections = connections

    def build_request(
        self, method: str, url: httpx.URL | str, *, timeout: Any = None, **given: Any
    ) -> httpx.Request:
        given["extensions"] = {"timeout": timeout}  # to read
        return httpx.Request(method, url, **given)

    def send(self, request: httpx.Request, **_: Any) -> httpx.Response:
        """Raise what `ask` raises, which the library calls a connection error."""
        url, headers = request.url, request.headers.raw
        origin = url.scheme, url.netloc.decode()
        asked = request_head(request.method, url.raw_path, headers) + request.read()
        timeout = request.extensions["timeout"]
        answer = self.connections.ask(
            origin, request.method, asked, timeout, Cancellation()
        )
        try:
            content = b"".join(answer.body)
        finally:
            self.connections.put_back(origin, answer)
        kept = {name: answer.says(name) for name in KEPT if name in answer.headers}
        return httpx.Response(
            answer.status, headers=kept, content=content, request=request
        )


def request_head(method: str, target: bytes, headers: Headers) -> bytes:
    """Raise HTTPException for what would end a line before its end."""
    lines = [b"%b %b HTTP/1.1" % (method.encode(), target)]
    lines += [name + b": " + value for name, value in headers]
    if re.search(rb"[\r\n\0]", b"".join(lines)):
        raise http.client.InvalidURL("a line of the request has another in it")
    return b"\r\n".join([*lines, b"", b""])


def exchange(sock: socket.socket, request: bytes, timeout: float) -> Answer:
    """Send a request and read the head of its answer; the body is read by others."""
    try:
        block(sock, socket.SO_RCVTIMEO, timeout)
        sock.sendall(request)
        return Answer(sock)
    except BaseException:
        sock.close()
        raise


def has_input(sock: socket.socket) -> bool:
    """Whether something came that nobody asked for: most often, the end."""
    if sock.gettimeout() or not DONT_WAIT:
        sock.settimeout(0)
    return peek(sock) is not None


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


def block(sock: socket.socket, option: int, seconds: float) -> None:
    """Have the kernel end what takes too long: SO_RCVTIMEO a read, SO_SNDTIMEO a write.

    With a time-out of Python's own, each piece is two system calls, and two turns at
    the lock that all threads want. TLS knows no other, and Windows counts in
    other units.
    """
    limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    ours: float | None = seconds
    if not isinstance(sock, ssl.SSLSocket) and os.name != "nt":
        with suppress(OSError):  # where a time has another size
            sock.setsockopt(socket.SOL_SOCKET, option, limit)
            ours = None
    if sock.gettimeout() != ours:  # to set one is a system call too
        sock.settimeout(ours)


def prepare(
    origin: Origin, timeout: float, tls: ssl.SSLContext
) -> http.client.HTTPConnection:
    """Through HTTPS_PROXY where the environment names one, as the SDK does."""
    url = urlsplit("://".join(origin))
    host, port = url.hostname or "", url.port
    if url.scheme == "http":
        return http.client.HTTPConnection(host, port, timeout=timeout)
    proxy = find_proxy(host)
    if not proxy.hostname:
        return http.client.HTTPSConnection(host, port, timeout=timeout, context=tls)
    tunnel = http.client.HTTPSConnection(
        proxy.hostname, proxy.port or 80, timeout=timeout, context=tls
    )
    tunnel.set_tunnel(host, port, headers=proxy_authorization(proxy))
    return tunnel


def find_proxy(host: str) -> SplitResult:
    """Find the proxy on the way to a host, if there is one: http unless it says so."""
    told = urllib.request.getproxies()
    url = told.get("https") or told.get("all") or ""
    if urllib.request.proxy_bypass(host):
        url = ""
    return urlsplit(url if "://" in url else f"//{url}")


def proxy_authorization(proxy: SplitResult) -> dict[str, str]:
    if not proxy.username:
        return {}
    user = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {b64encode(user.encode()).decode()}"}


# The fields that count, and the comment that ends a stream without an end.
FIELD = re.compile(rb"(?m)^(?:(data|event)(?::[ ]?(.*))?|(:408).*)$")


class ServerSentEvent(NamedTuple):
    event: str
    data: str

    @property
    def is_output(self) -> bool:
        return self.event == "output" and self.data != ""


TIMED_OUT = ServerSentEvent(":408", "")


def decode_events(pieces: Iterable[bytes]) -> Iterator[list[ServerSentEvent]]:
    """Decode an event stream (Replicate's docs, "Streaming"), however it is cut up.

    What came together is told together.
    """
    for blocks in split_blocks(pieces):
        said = [event for event in map(read_block, blocks) if event]
        if TIMED_OUT in said:
            yield said[: said.index(TIMED_OUT)]
            return
        yield said


def split_blocks(pieces: Iterable[bytes]) -> Iterator[list[bytes]]:
    """What ends in an empty line. LF, CRLF and CR end a line, and nothing else does."""
    rest, after_cr = b"", False
    for piece in pieces:
        fresh = piece[1:] if after_cr and piece.startswith(b"\n") else piece
        after_cr = piece.endswith(b"\r")
        if b"\r" in fresh:
            fresh = fresh.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *blocks, rest = (rest + fresh).split(b"\n\n")
        yield blocks


def read_block(block: bytes) -> ServerSentEvent | None:
    event, data = b"", []
    for name, value, timed_out in FIELD.findall(block):
        if timed_out:
            return TIMED_OUT
        if name == b"data":
            data.append(value)
        else:
            event = value
    if not data and not event:
        return None
    text = b"\n".join(data).decode("utf-8", "replace")
    return ServerSentEvent(event.decode("utf-8", "replace"), text)


class StreamBroken(Exception):
    """A stream ended before its end."""


class StreamRefused(Exception):
    """A stream could not be had at all."""


@contextmanager
def open_stream(
    connections: ConnectionPool, url: str, headers: Headers, cancellation: Cancellation
) -> Iterator[Iterator[bytes]]:
    """Read a stream in pieces. Raise StreamRefused now or StreamBroken later."""
    origin = urlsplit(url)[:2]
    answer = ask_for_stream(connections, url, headers, cancellation)
    try:
        kind = answer.says("content-type")
        if answer.status != 200 or not kind.startswith("text/event-stream"):
            raise StreamRefused(f"status {answer.status}, type {kind!r}")
        with cancellation.on_cancel(partial(shut, answer.sock)):
            yield answer.body
    except (OSError, http.client.HTTPException) as error:
        raise StreamBroken(repr(error)) from error
    finally:
        connections.put_back(origin, answer)


def ask_for_stream(
    connections: ConnectionPool, url: str, headers: Headers, cancellation: Cancellation
) -> Answer:
    asked, timeout = urlsplit(url), connections.timeouts.stream
    target = asked._replace(scheme="", netloc="", fragment="").geturl() or "/"
    host = b"Host", asked.netloc.encode()
    try:
        head = request_head("GET", target.encode(), [host, *headers])
        return connections.ask(asked[:2], "GET", head, timeout, cancellation)
    except TimeoutError as error:
        raise StreamBroken(repr(error)) from error
    except (OSError, http.client.HTTPException) as error:
        raise StreamRefused(repr(error)) from error


# -- Replicate -----------------------------------------------------------------
#
# Replicate's API through its library, of which nothing else here knows, with
# what it refuses in the client's terms. To add a refusal: a row in REFUSALS.
# What the record of a prediction tells: its text, its tokens and its failure.
# To add a way for one to fail: a row in FAILURES.


TRUSTED_HOST = re.compile(r"(.+\.)?replicate\.(com|net|delivery)")


class Refusal(NamedTuple):
    status: int
    code: str
    message: str
    headers: Mapping[str, str] = {}


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

REFUSALS = {
    **dict.fromkeys((301, 302, 303, 307, 308), ELSEWHERE),  # the token follows none
    401: OUR_TOKEN,
    403: OUR_TOKEN,
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

REFUSED_FILES = {401, 402, 403, 413, 429}  # mean the same as for a prediction

NOT_UPLOADED = (
    "A file of this call could not be handed to Replicate. Nothing was run: try again."
)

AWAY = (OSError, http.client.HTTPException, httpx.HTTPError)  # no fault of ours

WAITS = (r"resets in ~?(\d+)\s*s", r"available in (\d+) second")


class ReplicateAPI:
    """The SDK to create, look and cancel, over the connections that it streams from."""

    def __init__(self, settings: Settings, timeouts: Timeouts) -> None:
        self.token = settings.replicate_api_token.strip()
        self.base = urlsplit(settings.replicate_base_url.rstrip("/"))
        self.time_limit = settings.prediction_timeout
        self.timeouts = timeouts
        tls = httpx.create_ssl_context()  # takes 20 ms: one for all
        self.connections = ConnectionPool(timeouts, tls)
        self.url = self.base._replace(path=self.base.path or "/v1").geturl()
        self.client = Replicate(
            bearer_token=self.token,
            base_url=self.url,
            max_retries=0,  # a create would be a second bill
            timeout=timeouts.create,
            http_client=ReplicateTransport(self.connections),
        )
        self.versions: dict[str, str] = {}  # of community models: owner/name -> id

    def close(self) -> None:
        self.client.close()
        self.connections.close()

    def create(self, order: PredictionInput, wait: bool) -> Json:
        """A create that was refused is sent again, with a community model's version."""
        ref = order.model.ref
        known = self.versions.get(ref, ref)
        try:
            return self.post(order, known, wait)
        except APIError as error:
            if error.code != "model_not_found":
                raise
            newest = self.find_version(ref)
            if newest in (None, known):
                raise
        self.versions[ref] = newest
        return self.post(order, newest, wait)

    def post(self, order: PredictionInput, ref: str, wait: bool) -> Json:
        is_deployed = ref.startswith("deployments/")
        path = f"/{ref}/predictions" if is_deployed else "/predictions"
        body = {"input": order.input, **({} if is_deployed else {"version": ref})}
        headers = {"Cancel-After": f"{self.time_limit}s"}
        if wait:
            headers["Prefer"] = f"wait={self.timeouts.wait}"
        with self.failures_told(order):
            answer = self.submit(path, body=body, options={"headers": headers})
            return read_prediction(read_object_of(answer, needs="id"))

    def submit(self, path: str, **options: Any) -> Any:
        """Not by the library's own objects, which would take half as long again."""
        return self.client.post(f"{self.url}{path}", cast_to=httpx.Response, **options)

    def fetch(self, path: str, timeout: float, needs: str = "") -> Json:
        url, options = f"{self.url}{path}", cast(Any, {"timeout": timeout})
        with self.failures_told():
            answer = self.client.get(url, cast_to=httpx.Response, options=options)
            return read_object_of(answer, needs)

    def find_version(self, ref: str) -> str | None:
        """The newest version of a community model, or None if it is none."""
        if ":" not in ref and OWNED.fullmatch(ref):
            with suppress(APIError):
                found = self.fetch(f"/models/{ref}", self.timeouts.create)
                return as_object(found.get("latest_version")).get("id")
        return None

    def find_schema(self, owner: str, name: str, version: str) -> Json:
        """What a version says of itself, or the newest one; {} if it says nothing."""
        path, timeout = f"/models/{owner}/{name}", self.timeouts.schema
        if version:
            with suppress(APIError):  # official ones list none
                found = self.fetch(f"{path}/versions/{version}", timeout)
                return as_object(found.get("openapi_schema"))
        newest = as_object(self.fetch(path, timeout).get("latest_version"))
        return as_object(newest.get("openapi_schema"))

    def find_release(self, owner: str, name: str) -> str:
        """The ref of what a deployment runs."""
        found = self.fetch(f"/deployments/{owner}/{name}", self.timeouts.schema)
        release = as_object(found.get("current_release"))
        parts = filter(None, (release.get("model"), release.get("version")))
        with self.failures_told():
            if not OWNED.fullmatch(ref := ":".join(map(str, parts))):
                raise NoObject("a deployment without a release")
        return ref

    def look(self, id: str) -> Json:
        path = f"/predictions/{quote(id, safe='')}"
        return read_prediction(self.fetch(path, self.timeouts.look, needs="id"))

    def cancel(self, id: str) -> None:
        path = f"/predictions/{quote(id, safe='')}/cancel"
        with self.failures_told():
            self.submit(path, options={"timeout": self.timeouts.look})

    def upload(self, attached: Attachment) -> str:
        """Give the link of a file of Replicate's."""
        content = ("attachment", attached.content, attached.kind)
        try:
            made = self.client.files.with_raw_response.create(content=content)
            return read_link(made)
        except (ReplicateError, NoObject) as error:
            raise not_uploaded(error, self.token) from None

    def account(self) -> Json:
        return self.fetch("/account", self.timeouts.create)

    def open_stream(
        self, url: str, cancellation: Cancellation
    ) -> AbstractContextManager[Iterator[bytes]]:
        headers = [
            (b"Authorization", f"Bearer {self.token}".encode()),
            (b"Accept", b"text/event-stream"),
            (b"Cache-Control", b"no-store"),
        ]
        return open_stream(self.connections, url, headers, cancellation)

    def may_stream_from(self, url: str) -> bool:
        """The token goes to Replicate's hosts alone, whatever an answer says."""
        with suppress(ValueError):
            asked = urlsplit(url)
            if asked.hostname == self.base.hostname:
                return asked.scheme in (self.base.scheme, "https")
            trusted = TRUSTED_HOST.fullmatch(asked.hostname or "")
            return bool(
                trusted and asked.scheme == "https" and asked.port in (None, 443)
            )
        return False

    @contextmanager
    def failures_told(self, order: PredictionInput | None = None) -> Iterator[None]:
        """Turn what the SDK raises into the client's terms."""
        try:
            yield
        except APIStatusError as error:
            raise refusal(error, order, self.token) from None
        except (ReplicateError, NoObject) as error:
            cause = error.__cause__
            if isinstance(error, APIConnectionError) and not isinstance(cause, AWAY):
                raise cause or error from None
            if isinstance(cause, NotConnected):
                log.warning("event=unreachable why=%s", quoted(cause))
                message = "Replicate can't be reached from the proxy. Try again later."
                raise APIError(502, message, code="upstream_unavailable") from None
            raise APIError(
                504,
                "Replicate gave no answer that can be understood. It may be running "
                "this all the same, so trying again may cost twice.",
                code="upstream_unavailable",
                headers=NO_RETRY,
            ) from error


class NoObject(ValueError):
    """A 2xx answer that is not a JSON object: a failure of Replicate's."""


def read_object_of(answer: Any, needs: str = "") -> Json:
    try:
        body = answer.json()
    except ValueError as error:
        raise NoObject(str(error)) from error
    if not isinstance(body, dict) or (needs and not body.get(needs)):
        raise NoObject(f"no object with {needs!r} in it")
    return body


def read_link(answer: Any) -> str:
    """Where a file is."""
    link = as_object(read_object_of(answer).get("urls")).get("get")
    if not isinstance(link, str) or not LINK.fullmatch(link):
        raise NoObject("no link to a file")
    return link


def read_prediction(seen: Json) -> Json:
    """A prediction whose fields have their types, whatever was in them."""
    for name, kind in PREDICTION.items():
        if not isinstance(seen.get(name), kind):
            seen[name] = kind()
    return seen


PREDICTION: dict[str, type] = {
    "status": str,
    "error": str,
    "logs": str,
    "urls": dict,
    "metrics": dict,
}


def refusal(
    error: APIStatusError, order: PredictionInput | None, secret: str
) -> APIError:
    status, body = error.status_code, error.body if isinstance(error.body, dict) else {}
    detail = str(body.get("detail") or body.get("title") or "").strip()
    invalid = body.get("invalid_fields")
    if status == 422 and not invalid and "version" in f"{body.get('title')} {detail}":
        status = 404
    row = REFUSALS.get(status, UNAVAILABLE)
    headers = dict(row.headers)
    if status == 429 and (seconds := retry_after(error, body, detail)):
        headers["retry-after"] = seconds
    said = (
        f" Replicate says: {detail}" if detail else f" Replicate's status was {status}."
    )
    return APIError(
        row.status,
        row.message + said.replace(secret, "…"),
        code=row.code,
        param=invalid_param(invalid, order) if status == 422 else None,
        headers=headers,
    )


def not_uploaded(error: Exception, secret: str) -> APIError:
    """Nothing runs before its files are there, so it costs nothing to try again."""
    if isinstance(error, APIStatusError) and error.status_code in REFUSED_FILES:
        return refusal(error, None, secret)
    why = quoted(str(error).replace(secret, "…"))
    log.warning("event=upload-failed why=%s", why)
    return APIError(502, NOT_UPLOADED, code="upstream_unavailable")


def invalid_param(invalid: Any, order: PredictionInput | None) -> str | None:
    """OpenAI's name of the first input that Replicate refused."""
    with suppress(LookupError, TypeError, AttributeError):
        name = str(invalid[0]["field"]).removeprefix("input.")
        return order.names.get(name, name) if order else name
    return None


def retry_after(error: APIStatusError, body: Json, detail: str) -> str | None:
    """Seconds to wait, wherever they are told: Replicate has used all four places."""
    headers = error.response.headers
    words = next((m[1] for m in (re.search(w, detail) for w in WAITS) if m), None)
    told = (
        headers.get("retry-after"),
        body.get("retry_after"),
        words,
        headers.get("ratelimit-reset"),
    )
    return next((str(t) for t in told if re.fullmatch(r"\d{1,6}", str(t))), None)


# By the text of a failed prediction's error (Replicate's docs, "Error codes"); the
# first that matches counts.
FAILURES = (
    (
        r"\(E003\)|\(E004\)|\(code: PA\)|\(E98\d\d\)",
        Refusal(
            503, "upstream_unavailable", "Replicate could not run this now.", RETRY
        ),
    ),
    (
        r"\(E005\)|(?i:nsfw)",
        Refusal(400, "content_policy_violation", "The model refused this content."),
    ),
    (
        r"(?i)context (length|window|size)|\btoo long\b|too many tokens",
        Refusal(400, "context_length_exceeded", "This is too long for the model."),
    ),
    (r"", Refusal(502, "prediction_failed", "The prediction failed.", NO_RETRY)),
)

COUNTS = {
    "prompt_tokens": r"Input token count: (\d+)",
    "completion_tokens": r"Output token count: (\d+)",
    "reasoning_tokens": r"Reasoning tokens: (\d+)",
}

METRICS = {
    "prompt_tokens": "input_token_count",
    "completion_tokens": "output_token_count",
}


def remainder(output: str, told: str) -> str | None:
    """What follows in the output after what was told of it; None if they differ.

    A carriage return can't travel in an event stream: there it is a line's end,
    or is lost with what is left of its line.
    """
    if not output:
        return ""
    for text in (output, output.replace("\r\n", "\n").replace("\r", "\n")):
        if text.startswith(told):
            return text[len(told) :]
    return rest_without_lines(output, told.replace("\n", ""))


def rest_without_lines(output: str, told: str) -> str | None:
    at = matched = 0
    while matched < len(told) and at < len(output):
        if output[at] == told[matched]:
            matched += 1
        elif output[at] not in "\r\n":
            return None
        at += 1
    return output[at:] if matched == len(told) else None


def output_text(output: Any) -> str:
    """The text in an output: a list of strings, a string, an object with text in it."""
    if output is None or isinstance(output, str):
        return output or ""
    if isinstance(output, list):
        return "".join(map(output_text, output))
    if isinstance(output, dict):
        return object_text(output)
    return json.dumps(output, ensure_ascii=False)


def object_text(output: Json) -> str:
    """Its text or its JSON, and its calls in the form that is heard; else all of it."""
    named = sorted(output.keys() & TEXT_IN_OBJECT)
    text = output_text(output[named[0]]) if named else ""
    said = [text or output_text(output.get("json_output")), *calls_beside(output)]
    if named or any(said):
        return "\n".join(filter(None, said))
    return json.dumps(output, ensure_ascii=False)


def calls_beside(output: Json) -> list[str]:
    """The calls that an object has, or the one that it is (OpenAI's Responses API)."""
    is_one = output.get("type") == "function_call"
    items = [output] if is_one else as_list(output.get("tool_calls"))
    plain = [{k: v for k, v in as_object(i).items() if k in CALL_KEYS} for i in items]
    return [
        told_call({"name": n, "arguments": a})
        for n, a in calls_in(plain, Toolbox(()), True)
    ]


def read_usage(seen: Json) -> Usage:
    """From the metrics, else from the lines that some models log."""
    metrics, logs = seen["metrics"], seen["logs"]
    logged = {name: re.findall(row, logs) for name, row in COUNTS.items()}
    counts = {name: int(found[-1]) for name, found in logged.items() if found}
    for name, key in METRICS.items():
        if isinstance(metrics.get(key), (int, float)) and isfinite(metrics[key]):
            counts[name] = int(metrics[key])
    return Usage(
        counts.get("prompt_tokens"),
        counts.get("completion_tokens"),
        counts.get("reasoning_tokens", 0),
    )


def finish_reason(usage: Usage, limit: int | None) -> str:
    """By a true count: nothing else tells whether a limit was reached."""
    told = usage.completion_tokens
    return "length" if limit and told is not None and told >= limit else "stop"


def failure(text: str, secret: str) -> APIError:
    row = next(row for pattern, row in FAILURES if re.search(pattern, text))
    said = f" The model says: {text}" if text else ""
    message = row.message + said.replace(secret, "…")
    return APIError(row.status, message, code=row.code, headers=row.headers)


# -- Uploads -------------------------------------------------------------------
#
# Replicate takes little in an input: what is large in it goes to its files first,
# and a link takes its place. A call waits for that where a hang-up wakes it, and
# each content goes there once, for all the calls that have it.


INLINE = 256 * 1024  # bytes of data: URLs in an input, as Replicate advises

UPLOADS_AT_ONCE = 8  # of one call

DATA_URL = re.compile(r"data:[^,;]+;[^,]*base64,", re.IGNORECASE)


class Upload:
    """One upload, for all the calls that wait for it."""

    def __init__(self, expires: float) -> None:
        self.expires = expires
        self.waiting = 0  # calls
        self.link = ""
        self.error: Exception | None = None


class UploadCache:
    """Which contents Replicate's files hold for us."""

    def __init__(self, upload: Callable[[Attachment], str], keep: float = 1800) -> None:
        self.upload = upload
        self.keep = keep  # seconds; Replicate keeps a file for an hour at least
        self.changed = threading.Condition()
        self.uploads: dict[bytes, Upload] = {}

    def links(self, urls: Iterable[str], cancellation: Cancellation) -> dict[str, str]:
        """Host what data: URLs hold, all of it side by side; the first error counts."""
        turns = threading.Semaphore(UPLOADS_AT_ONCE)
        uploads = {url: self.begin(url, turns) for url in urls}
        try:
            with cancellation.on_cancel(self.wake), self.changed:
                self.changed.wait_for(
                    lambda: cancellation.cause or is_over(uploads.values())
                )
            cancellation.check()
        finally:
            with self.changed:
                for upload in uploads.values():
                    upload.waiting -= 1
        if error := next((u.error for u in uploads.values() if u.error), None):
            raise error
        return {url: upload.link for url, upload in uploads.items()}

    def wake(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def begin(self, url: str, turns: threading.Semaphore) -> Upload:
        name, now = sha256(url.encode()).digest(), time.monotonic()
        with self.changed:
            for old in [n for n, up in self.uploads.items() if now > up.expires]:
                del self.uploads[old]
            upload = self.uploads.get(name)
            if upload is None:
                upload = Upload(now + self.keep)
                work = partial(self.send, name, url, upload, turns)
                threading.Thread(target=work, daemon=True).start()
                self.uploads[name] = upload
            upload.waiting += 1
        return upload

    def send(
        self, name: bytes, url: str, upload: Upload, turns: threading.Semaphore
    ) -> None:
        """Upload when it is its turn, if somebody still waits for it."""
        try:
            with turns:
                if self.is_wanted(name, upload):
                    upload.link = self.upload(read_attachment(url))
        except Exception as error:
            upload.error = error
        finally:
            with self.changed:
                if not upload.link:
                    self.uploads.pop(name, None)
                self.changed.notify_all()

    def is_wanted(self, name: bytes, upload: Upload) -> bool:
        """Nobody can begin to wait for one that is not."""
        with self.changed:
            if not upload.waiting:
                self.uploads.pop(name, None)
            return upload.waiting > 0


def is_over(uploads: Collection[Upload]) -> bool:
    return any(up.error for up in uploads) or all(up.link for up in uploads)


def read_attachment(url: str) -> Attachment:
    """What a data: URL holds that came by the model's own name for an input."""
    attached = read_data_url(url)
    if attached is None:
        message = f"The data: URL that begins {quoted(url[:40])} can't be read."
        raise APIError(400, message, code="invalid_value")
    return attached


def leaves(input: Json) -> list[Any]:
    """All that is in an input, wherever it stands, and its names too."""
    found: list[Any] = []
    values: list[Any] = [input]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values += [*value, *value.values()]
        elif isinstance(value, list):
            values += value
        else:
            found.append(value)
    return found


def is_data_url(value: Any) -> bool:
    return isinstance(value, str) and DATA_URL.match(value) is not None


def too_large(urls: Iterable[str]) -> set[str]:
    """The largest of them, as many as have to go for the rest to stay."""
    by_size = sorted(urls, key=len)
    totals = accumulate(map(len, by_size))
    return {url for url, total in zip(by_size, totals, strict=True) if total > INLINE}


def with_links(
    order: PredictionInput, upload_cache: UploadCache, cancellation: Cancellation
) -> PredictionInput:
    """The order with its large files upload_cache; what was said as text stays text."""
    urls = filter(is_data_url, leaves(order.input))
    large = too_large(url for url in urls if url not in order.prompt)
    if not large:
        check_size(order.input)
        return order
    check_size(linked(order.input, dict.fromkeys(large, "")))
    return order._replace(
        input=linked(order.input, upload_cache.links(large, cancellation))
    )


def check_size(input: Json) -> None:
    """Measure it, if it can be too large: that costs 0.2 ms for 20 kB of text."""
    at_most = sum(6 * len(v) if isinstance(v, str) else 24 for v in leaves(input))
    if at_most > LONGEST:
        size = len(json.dumps(input, ensure_ascii=False).encode())
        too_long = "This is more than Replicate takes (6 MiB). Send less of it."
        require(size <= LONGEST, too_long, code="context_length_exceeded")


def linked(value: Any, links: Mapping[str, str]) -> Any:
    """An input with links in the place of data: URLs."""
    if isinstance(value, dict):
        return {name: linked(each, links) for name, each in value.items()}
    if isinstance(value, list):
        return [linked(each, links) for each in value]
    return links.get(value, value) if isinstance(value, str) else value


# -- Predictions ---------------------------------------------------------------
#
# Predictions, each followed to its end or cancelled.


TERMINAL = frozenset(("succeeded", "failed", "canceled", "aborted"))


class Upstream:
    """Replicate as a source of events."""

    def __init__(self, api: ReplicateAPI, timeouts: Timeouts) -> None:
        self.api = api
        self.timeouts = timeouts
        self.upload_cache = UploadCache(api.upload)
        self.schemas = SchemaCache(
            api.find_schema, api.find_release, limit=timeouts.schema
        )
        self.changed = threading.Condition()
        self.running = 0  # orders, from before their uploads until after a cancel

    def run(
        self, order: PredictionInput, cancellation: Cancellation, *, wait: bool
    ) -> Events:
        """Create a prediction and tell what it does; `wait` if all of it is wanted."""
        with self.counted():
            cancellation.check()
            order = with_links(order, self.upload_cache, cancellation)
            seen = self.api.create(order, wait)
            prediction = Prediction(self, order, cancellation, seen, waited=wait)
            try:
                cancellation.check()
                yield Started(prediction.id, order.model.ref)
                yield from prediction.texts()
                yield prediction.end()
            finally:
                prediction.cancel()

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self.changed:
            self.running += 1
        try:
            yield
        finally:
            with self.changed:
                self.running -= 1
                self.changed.notify_all()

    def await_runs(self, seconds: float) -> None:
        """Wait for those too that nobody listens to any more, but have to cancel."""
        with self.changed:
            self.changed.wait_for(lambda: not self.running, seconds)


class Prediction:
    """A prediction that is followed: how it was last seen, and what was told of it."""

    def __init__(
        self,
        upstream: Upstream,
        order: PredictionInput,
        cancellation: Cancellation,
        seen: Json,
        *,
        waited: bool,
    ) -> None:
        self.api = upstream.api
        self.timeouts = upstream.timeouts
        self.order = order
        self.cancellation = cancellation
        self.id = str(seen["id"])
        self.seen = seen
        self.blind_since: float | None = None
        self.deadline = time.monotonic() + upstream.api.time_limit + self.timeouts.grace
        self.told: list[str] = []
        self.is_late = waited  # to its stream, which may have begun without us
        self.said_done = False

    @property
    def is_over(self) -> bool:
        return self.seen.get("status") in TERMINAL

    @property
    def has_time(self) -> bool:
        return time.monotonic() < self.deadline

    @property
    def output(self) -> str:
        return output_text(self.seen.get("output"))

    @property
    def stream_url(self) -> str:
        """Where it streams text; "" if it does not, or not where the token may go."""
        url = str(self.seen["urls"].get("stream") or "")
        is_text = "/v1/files/" not in url  # which is a file's bytes
        streams = self.order.model.config.supports_streaming
        return url if streams and is_text and self.api.may_stream_from(url) else ""

    def texts(self) -> Iterator[Text]:
        """Tell its output as it comes, by its stream or by looks, until it is over."""
        timeouts = self.timeouts
        while not self.is_over and self.stream_url and self.has_time:
            if not (yield from self.listen()):
                break
            self.is_late = True
            self.cancellation.sleep(timeouts.poll)
        pause = timeouts.settle if self.said_done else timeouts.poll
        while not self.is_over and self.has_time:
            yield from self.rest()
            self.cancellation.sleep(pause)
            pause = min(pause * 1.5, timeouts.poll_most)
            self.look()
        yield from self.rest(at_end=True)

    def listen(self) -> Generator[Text, None, bool]:
        """Tell what its stream says, then look; True if it is worth opening again."""
        try:
            with self.api.open_stream(self.stream_url, self.cancellation) as pieces:
                if not (yield from self.hear(pieces)):
                    return False
        except StreamRefused as error:
            log.info("prediction=%s event=polled why=%s", self.id, quoted(error))
            return False
        except StreamBroken as error:
            self.cancellation.check()
            log.info("prediction=%s event=broken why=%s", self.id, quoted(error))
        self.look()
        return not self.output

    def hear(self, pieces: Iterable[bytes]) -> Generator[Text, None, bool]:
        """Tell its words; False if they came to their end, or are not its words."""
        for said in decode_events(pieces):
            for at, sent in enumerate(said, 1):
                if sent.event == "done":
                    self.hear_done(sent.data)
                    self.look()  # while the stream's last bytes arrive
                    return False
                if sent.is_output:
                    if not self.fits(sent.data):
                        return False
                    self.told.append(sent.data)
                    more = at < len(said) and said[at].is_output and not self.is_late
                    yield Text(sent.data, more=more)
            if not self.has_time:
                break
        return True

    def hear_done(self, data: str) -> None:
        """Its record may lag behind its stream, but not for long."""
        if "reason" not in data:
            self.said_done = True
            self.deadline = time.monotonic() + self.timeouts.grace

    def fits(self, data: str) -> bool:
        """Whether a stream opened late says what the output has at this place.

        Replicate seems to replay a stream from its start, but does not say so
        in its docs: what does not fit is dropped, and looks go on.
        """
        if not self.is_late:
            return True
        if not self.told and not self.find_output():
            return False
        at = sum(map(len, self.told))
        known = self.output[at : at + len(data)]
        self.is_late = bool(known)
        return data.startswith(known)

    def find_output(self) -> bool:
        """Look until there is output: its record may lag behind a stream."""
        pause = self.timeouts.settle
        while not self.output and pause < self.timeouts.poll:
            self.look()
            if not self.output:
                self.cancellation.sleep(pause)
            pause *= 2
        return bool(self.output)

    def look(self) -> None:
        """See how it stands. A look that fails does no harm unless all do, for long."""
        try:
            self.seen = self.api.look(self.id)
            self.blind_since = None
        except APIError as error:
            log.info("prediction=%s event=unseen code=%s", self.id, error.code)
            now = time.monotonic()
            self.blind_since = self.blind_since or now
            if now - self.blind_since > self.timeouts.blind and not self.said_done:
                message = f"Replicate tells nothing of the prediction any more: {error}"
                raise APIError(
                    502, message, code="upstream_unavailable", headers=NO_RETRY
                ) from None

    def rest(self, *, at_end: bool = False) -> Iterator[Text]:
        """Tell what of its output was not told yet."""
        if not at_end and not self.order.model.config.supports_streaming:
            return
        new = remainder(self.output, "".join(self.told))
        if new is None and at_end:
            log.warning("prediction=%s event=differs", self.id)
            if not self.said_done:
                message = (
                    "Replicate's stream broke, and what it said is not the output."
                )
                raise APIError(
                    502, message, code="upstream_unavailable", headers=NO_RETRY
                )
        if new:
            self.told.append(new)
            yield Text(new)

    def end(self) -> Done:
        """Tell the end. Raise APIError if it is not a good one."""
        status = self.seen.get("status")
        if status == "failed":
            raise failure(self.seen["error"], self.api.token)
        if self.seen.get("data_removed") and not self.told:
            raise failure("Its output was removed before it was seen.", self.api.token)
        if status != "succeeded" and not self.said_done:
            raise APIError(
                504,
                "Replicate ended the prediction before it had finished. It may take "
                f"{self.api.time_limit} s at the most (PREDICTION_TIMEOUT).",
                code="prediction_timeout",
                headers=NO_RETRY,
            )
        usage = read_usage(self.seen)
        return Done(finish_reason(usage, self.order.limit), usage)

    def cancel(self) -> None:
        """Stop the bill, if it is not over. A cancel that failed is tried once more."""
        if self.is_over or self.said_done:
            return
        for pause in (0.5, 0):
            try:
                self.api.cancel(self.id)
                return
            except APIError as error:
                log.warning(
                    "prediction=%s event=uncancelled code=%s", self.id, error.code
                )
                time.sleep(pause)


# ==== 5. TEXT =================================================================


# -- Stop and reasoning --------------------------------------------------------
#
# Each filter is a generator from events to events, and closes the events that it
# reads when it ends. Reasoning models write what they think between <think> and
# </think>, before the answer; the chat templates of some have written the first tag
# themselves. It becomes Reasoning events, for the field reasoning_content.


CHARACTERS_PER_TOKEN = 4  # a guess: English as most tokenizers cut it


def stop_at(events: Events, stops: Sequence[str], called: str = "stop") -> Events:
    """End before the stop string that is complete first, however the text is cut."""
    held, reason = "", "stop"
    with closing(events):
        for event in events:
            if isinstance(event, Text):
                held += event.text
                ends = [(held.find(s) + len(s), -len(s)) for s in stops if s in held]
                if ends:
                    end = min(ends)[0]
                    starts = [at + size for at, size in ends if at == end]
                    if text := held[: min(starts)]:
                        yield Text(text)
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


def cut_after(events: Events, tokens: int) -> Events:
    """End after so many tokens, by estimate: for models that refuse so low a limit."""
    room = tokens * CHARACTERS_PER_TOKEN
    with closing(events):
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
    with closing(events):
        for event in events:
            if prompt and not isinstance(event, Started):
                yield Text(prompt)
                prompt = ""
            yield event


def with_usage(events: Events, prompt: str) -> Events:
    """Estimate the tokens that Replicate did not count."""
    length = 0
    with closing(events):
        for event in events:
            if isinstance(event, (Reasoning, Text, Arguments)):
                length += len(event.text)
            elif isinstance(event, Done):
                asked, answered, reasoned, _ = event.usage
                usage = Usage(
                    -(-len(prompt) // CHARACTERS_PER_TOKEN) if asked is None else asked,
                    -(-length // CHARACTERS_PER_TOKEN)
                    if answered is None
                    else answered,
                    reasoned,
                    is_estimate=asked is None or answered is None,
                )
                event = Done(event.finish_reason, usage)
            yield event


THINKERS = re.compile(r"(?i).*(deepseek-r1|thinking|reasoner|qwq|magistral).*")

THINK, THINK_END = "<think>", "</think>"

# gpt-oss writes in channels: OpenAI's harmony format.
HARMONY = ("<|start|>assistant", "<|channel|>")

HARMONY_MARKS = (*HARMONY, "<|end|>", "<|return|>", "<|call|>")

HARMONY_MARK = re.compile("|".join(map(re.escape, HARMONY_MARKS)))

HARMONY_HEADER = re.compile(
    r"\s{0,20}(?:<\|start\|>assistant[^<]{0,100})?<\|channel\|>(?P<channel>\w{1,20})"
    r"[^<]{0,100}(?:<\|constrain\|>\w{0,20})?<\|message\|>"
)

LONGEST_HEADER = 400  # characters

LONGEST_SPACE = 200  # characters that wait for what may follow them


def split_reasoning(events: Events, starts_inside: bool) -> Events:
    """Tell reasoning from the answer.

    `starts_inside`: an answer without the first tag begins with reasoning. Where no
    tag ends that, it was the answer after all, and is given as text, too."""
    state, held = "before", ""
    thoughts: list[str] = []
    with closing(events):
        for event in events:
            if isinstance(event, Text):
                held += event.text
                if state == "before":
                    begun = held.lstrip()
                    is_far = len(held) - len(begun) > LONGEST_SPACE
                    tags = () if is_far else (THINK, *HARMONY)
                    if begun.startswith(tags) and not begun.startswith(THINK):
                        yield from split_harmony(begun, events)
                        return
                    if begun.startswith(tags):
                        held, state, starts_inside = (
                            begun[len(THINK) :],
                            "inside",
                            False,
                        )
                    elif any(tag.startswith(begun) for tag in tags):
                        continue
                    else:
                        state = "inside" if starts_inside else "after"
                if state == "inside":
                    thought, tag, rest = held.partition(THINK_END)
                    if not tag:
                        end = len(held) - overhang(held, [THINK_END])
                        thought, rest = held[:end], held[end:]
                    if thoughts or thought.strip() or len(thought) > LONGEST_SPACE:
                        yield Reasoning(thought)
                        thoughts.append(thought)
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
                if held:
                    yield Reasoning(held) if state == "inside" else Text(held)
                if (
                    state == "inside"
                    and starts_inside
                    and event.finish_reason != "length"
                ):
                    yield Text("".join(thoughts) + held)
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
# is checked if the keyword and the form of it are known here; all else is told to
# the model, and not checked: nothing that OpenAI accepts is refused for its schema.
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
        elif isinstance(value, list):
            first = as_list(schema.get("prefixItems"))
            if keyword == "prefixItems":
                pairs = list(enumerate(zip(value, first, strict=False)))
            elif keyword == "items":
                pairs = [
                    (at, (value[at], given)) for at in range(len(first), len(value))
                ]
            else:
                pairs = []
            return self.first_error(
                (item, one, inside(path, index)) for index, (item, one) in pairs
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
        if keyword == "properties":
            return self.first_error(
                (value[name], known[name], inside(path, name))
                for name in value
                if name in known
            )
        if keyword == "additionalProperties" and "patternProperties" not in schema:
            return self.first_error(
                (value[name], given, inside(path, name))
                for name in value
                if name not in known
            )
        return ""

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
# One reader of JSON as models write it, for tool calls and for answers. What is JSON
# it copies as it stands. What can mean only one thing it mends: other quotes, Python's
# words, comments, a comma too many, a bracket missing. Where quotes don't balance, it
# is no JSON: after a string comes a comma, a colon, a bracket or the end.
# An answer that is to be JSON is asked for in the model's own way if it has one, else
# in the system text; then the value is taken out of what surrounds it.


KEY, COLON, VALUE, NEXT = "key", "colon", "value", "next"  # what is to come

CLOSERS = {"{": "}", "[": "]"}

BRACKETS = {"{": "object", "[": "array"}

DEEPEST_JSON = 200  # brackets

LONGEST_WORD = 1000  # characters, also of a comment

JSON_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+)
    | (?P<mark>[{}\[\],:])
    | (?P<quote>["'`])
    | (?P<comment>//[^\n]*(?=\n)|/\*.*?\*/)
    | (?P<literal>(?:true|false|null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?)
        (?=[\s,:{}\[\]"'`<]|//|/\*))
    | (?P<word>(?:(?!//|/\*)[^\s,:{}\[\]"'`<])+
        (?:[ \t]+(?:(?!//|/\*)[^\s,:{}\[\]"'`<])+)*
        (?=[ \t\r]*(?:[\n,:{}\[\]"'`<]|//|/\*)))
    | (?P<end><\||<｜|</(?:tool_call|function|invoke|json))
    | (?P<bad><[^|｜/]|</[^tfij]|[^\S \t\r\n])""",
    re.ASCII | re.DOTALL | re.VERBOSE,
)

JSON_WORDS = {"True": "true", "False": "false", "None": "null"}

NO_NUMBER = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE)

UNQUOTED = {q: re.compile(rf'[^\\\x00-\x1f"{q}]+') for q in "\"'`"}

ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')

HALF_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?\Z")


class JSONReader:
    """Reads one object or array that comes in pieces.

    `take` gives it as it was written for as long as nothing has to be mended; then
    nothing until it `is_done`, and the rest, mended. If it `is_broken` beyond that,
    it gives the rest as it comes."""

    def __init__(self, keeps_space: bool = False) -> None:
        self.keeps_space = keeps_space  # between tokens
        self.closers: list[str] = []  # of what is open; "" for a bracket left out
        self.place = VALUE
        self.is_first = True  # in its bracket
        self.quote = ""  # of the string it is in
        self.key = ""  # "string" or "word" if a key came last
        self.after_string = False
        self.comma = ""  # with the space after it: it waits for what follows
        self.held = ""  # a token that may go on
        self.json: list[str] = []
        self.raw: list[str] = []  # all that came
        self.seen = 0  # characters of it that were read
        self.sound = 0, 0  # how far `json` and `raw` are good as they were written
        self.is_strict = True  # nothing had to be mended
        self.is_done = self.is_broken = False

    def take(self) -> str:
        """What can be told of what was not taken yet."""
        if self.is_broken:
            pieces, at = self.sound
            text = "".join([*self.json[:pieces], "".join(self.raw)[at:]])
            self.json, self.raw, self.sound = [], [], (0, 0)
        elif self.is_strict or self.is_done:
            text, self.json = "".join(self.json), []
            self.sound = 0, self.sound[1]
        else:
            text = ""
        return text

    def is_cut(self) -> bool:
        """Whether more is missing than brackets."""
        is_token = bool(self.held) and not self.held.startswith("<")
        return bool(self.quote) or is_token or self.place != NEXT

    def feed(self, text: str, depth: int = 0) -> str | None:
        """Read until no more than `depth` brackets are open; give what follows then."""
        self.raw.append(text)
        text, self.held, at = self.held + text, "", 0
        while at < len(text) and not self.is_broken:
            if self.is_strict:
                self.sound = len(self.json), self.seen + at - len(self.comma)
            if self.quote:
                start, at = at, self.read_string(text, at)
                if at == start:
                    break
                continue
            token = JSON_TOKEN.match(text, at)
            if not token:
                self.is_broken = len(text) - at > LONGEST_WORD
                break
            kind = token.lastgroup
            if kind == "end" or (token[0] == "`" and self.place not in (KEY, VALUE)):
                self.finish(depth)
                return text[at:]
            at = token.end()
            self.read_token(str(kind), token[0])
            if kind == "mark" and len(self.closers) <= depth and not self.is_broken:
                self.is_done = True
                return text[at:]
        self.seen += at
        self.held = text[at:]
        if self.is_strict and not self.is_broken:
            self.sound = len(self.json), self.seen - len(self.comma)
        return self.held if self.is_broken else None

    def read_string(self, text: str, at: int) -> int:
        """Read a part of a string, and say where it ends."""
        if plain := UNQUOTED[self.quote].match(text, at) or ESCAPE.match(text, at):
            self.json.append(plain[0])
            return plain.end()
        c = text[at]
        if c == self.quote:
            self.json.append('"')
            self.quote, self.after_string = "", True
        elif HALF_ESCAPE.match(text, at):
            return at
        elif c == "\\" and text[at + 1] in "'`":
            self.mend(text[at + 1])
            return at + 2
        else:  # an unknown escape stands for its backslash
            self.mend(json.dumps(c)[1:-1])
        return at + 1

    def mend(self, instead: str = "") -> None:
        self.is_strict = False
        self.json.append(instead)

    def read_token(self, kind: str, token: str) -> None:
        if kind == "space" and self.comma:
            self.comma += token
            if len(self.comma) > LONGEST_SPACE:
                self.release_comma()
        elif kind == "space":
            self.json.append(token if self.keeps_space else "")
        elif kind == "comment":
            self.mend()
        elif kind == "quote":
            self.begin_item("string")
            self.quote = token
            self.json.append('"')
            self.is_strict = self.is_strict and token == '"'
        elif kind in ("literal", "word"):
            self.read_word(token, is_literal=kind == "literal")
        elif token in CLOSERS:
            self.open(token)
        elif token in ("}", "]"):
            self.read_closer(token)
        elif token == ",":
            self.read_comma()
        elif token == ":" and self.place == COLON:
            self.json.append(token)
            self.place = VALUE
        else:
            self.is_broken = True

    def is_in_object(self) -> bool:
        return bool(self.closers) and self.closers[-1] != "]"

    def begin_item(self, kind: str) -> None:
        """Begin a key or a value, after the comma that it needs."""
        is_late = self.place == NEXT and not self.after_string
        if is_late:
            self.mend(",")
            self.place = KEY if self.is_in_object() else VALUE
        is_key = self.place == KEY
        self.is_broken |= self.place not in (KEY, VALUE) or (is_key and kind == "")
        self.release_comma()
        self.key = kind if is_key else ""
        self.place = COLON if is_key else NEXT
        self.after_string = self.is_first = False

    def release_comma(self) -> None:
        self.json.append(self.comma if self.keeps_space else self.comma[:1])
        self.comma = ""

    def read_word(self, word: str, is_literal: bool) -> None:
        is_copied = is_literal and self.place == VALUE
        is_infinite = is_literal and word[-1].isdigit() and not isfinite(float(word))
        self.is_broken |= self.place == NEXT or is_infinite
        self.is_broken |= bool(NO_NUMBER.fullmatch(word))
        mended = (
            compact(word) if self.place == KEY else JSON_WORDS.get(word, compact(word))
        )
        self.begin_item("word")
        if is_copied:
            self.json.append(word)
        else:
            self.mend(mended)

    def open(self, bracket: str) -> None:
        if bracket == "{" and self.place == KEY and self.is_first:  # {{ for {
            self.mend()
            self.closers.append("")
        else:
            self.begin_item("")
            self.json.append(bracket)
            self.closers.append(CLOSERS[bracket])
            self.place = KEY if bracket == "{" else VALUE
            self.is_first = True
        self.is_broken |= len(self.closers) > DEEPEST_JSON

    def read_comma(self) -> None:
        is_item = self.place == NEXT or (self.is_in_object() and self.place != KEY)
        if not is_item:  # nothing stands before it
            self.mend()
            return
        self.fill()
        self.comma = ","
        self.place = KEY if self.is_in_object() else VALUE

    def read_closer(self, bracket: str) -> None:
        """Close what is open in it as well; leave out a bracket that closes nothing."""
        closers = ("}", "") if bracket == "}" else ("]",)
        depth = len(self.closers) - 1
        while depth >= 0 and self.closers[depth] not in closers:
            depth -= 1
        if depth < 0:
            self.mend()
        else:
            self.close(depth)

    def close(self, depth: int = 0) -> None:
        """Close what is open, down to so many brackets."""
        self.is_strict = self.is_strict and len(self.closers) == depth + 1
        while len(self.closers) > depth:
            self.fill()
            self.json.append(self.closers.pop())
            self.place, self.after_string = NEXT, False
        self.is_first = False

    def finish(self, depth: int = 0) -> None:
        """End where nothing more comes: only brackets may be missing."""
        self.is_broken |= self.is_cut()
        self.close(depth)
        self.is_done = not self.is_broken

    def fill(self) -> None:
        """Put what is missing where a key or a value ends."""
        self.is_broken |= self.place == COLON and self.key == "word"
        if self.place == COLON:
            self.mend(":null")
        elif self.place == VALUE and self.is_in_object():
            self.mend("null")
        elif self.comma:
            self.mend(self.comma[1:] if self.keeps_space else "")
            self.comma = ""
        elif self.place != NEXT:  # a comma was told, if it does not end at once
            self.is_broken |= not self.is_first


def repair_json(text: str) -> str:
    """The object in a text as JSON; "" if there is none that could be mended."""
    reader = JSONReader()
    if "{" in text:
        reader.feed(text[text.index("{") :] + "\n")
        if not reader.is_done:
            reader.finish()
    return reader.take() if reader.is_done else ""


def parsed_or_why(text: str, format: ResponseFormat) -> tuple[Any, str]:
    """Give the value, and in a sentence why it won't do; "" if it will."""
    try:
        value = json.loads(text, parse_constant=refuse, parse_float=finite_float)
    except (ValueError, RecursionError) as error:
        return None, f"It is not JSON: {error}."
    return value, validate(value, format.schema)


# A brace in prose begins no JSON unless a key and a colon follow it, nor does a
# bracket without an item. Until that is clear, text is held. What has nothing in its
# brackets, or keys without quotes, can't be told from prose before the end.
GAPS = r"\s{0,20}"

QUOTED = r"""(?:"(?:[^"\\]|\\.){0,100}"|'(?:[^'\\]|\\.){0,100}')"""

SCALAR = r"(?:-?[0-9]{1,20}(?:\.[0-9]{1,20})?(?:[eE][+-]?[0-9]{1,3})?|true|false|null)"

EMPTY = rf"\{{{GAPS}\}}|\[{GAPS}\]"

BEGINS = re.compile(
    rf"""(?:\[{GAPS}){{0,8}}\{{{GAPS}{QUOTED}{GAPS}:
    |(?:\[{GAPS}){{1,8}}(?:"|(?:{SCALAR}|{EMPTY}){GAPS}[,\]])""",
    re.DOTALL | re.VERBOSE,
)

MAY_BEGIN = re.compile(
    rf"""(?:\[{GAPS}){{0,8}}
    (?:\]{GAPS} | (?:[a-z]{{1,5}}|[0-9.eE+-]{{1,47}}){GAPS}
    | \{{{GAPS}(?:"(?:[^"\\]|\\.){{0,100}}\\?|'(?:[^'\\]|\\.){{0,100}}\\?
        |{QUOTED}{GAPS}|\}}{GAPS})?)?""",
    re.DOTALL | re.VERBOSE,
)

LONE_VALUE = re.compile(
    rf'[{{\[]|(?<!\\)"(?:[^"\\]|\\.)*"|(?<![\w.-]){SCALAR}(?!\w)', re.DOTALL
)

MOST_LONE_VALUES = 20

LONGEST_EPILOGUE = 200  # characters that a model may go on after the value


def extract_json(events: Events, format: ResponseFormat) -> Events:
    """Tell of the text only the value in it, or all of it if there is none."""
    types = root_types(format.schema)
    openings = re.compile(
        "|".join(re.escape(c) for c, name in BRACKETS.items() if name in types)
        or "(?!)"
    )
    passed: list[str] = []  # text that no value begins in
    held = ""  # text that one may begin with
    reader: JSONReader | None = None
    epilogue = 0
    with closing(events):
        for event in events:
            if isinstance(event, Text):
                text: str | None = event.text
                if reader is None:
                    held += event.text
                    at, begins = find_value(held, openings)
                    passed.append(held[:at])
                    held = text = held[at:]
                    if not begins:
                        continue
                    reader = JSONReader(keeps_space=True)
                if not reader.is_done:
                    text = reader.feed(text or "")
                    if told := reader.take():
                        yield Text(told)
                epilogue += len(text or "") if reader.is_done else 0
                if epilogue > LONGEST_EPILOGUE:
                    yield Done("stop")
                    return
                continue
            if reader is None and isinstance(event, (ToolCall, Done)):
                text = "".join(passed) + held
                if isinstance(event, Done):
                    text = lone_value(text, format, types)
                if text:
                    yield Text(text)
                passed, held = [], ""
            elif reader and isinstance(event, Done):
                if not (reader.is_done or reader.is_broken):
                    reader.is_broken = event.finish_reason == "length"
                    reader.finish()
                if told := reader.take():
                    yield Text(told)
                if reader.is_done:  # what was cut off after it was no part of it
                    event = Done("stop", event.usage)
            yield event


def root_types(schema: Json) -> set[str]:
    """The types of a schema's values, as far as it says them; else all."""
    try:
        return types_of(schema, Validation(schema))
    except (TooManySteps, RecursionError):
        return set(TYPES)


def types_of(schema: Any, within: Validation) -> set[str]:
    within.spend()
    types, schema = set(TYPES), as_object(schema)
    given = schema.get("type")
    names = {name for name in [given, *as_list(given)] if isinstance(name, str)}
    if names & types:
        types = names
    elif "properties" in schema:
        types = {"object"}
    if "$ref" in schema:
        types &= types_of(within.target(schema["$ref"]), within)
    for one in as_list(schema.get("allOf")):
        types &= types_of(one, within)
    for keyword in ("anyOf", "oneOf"):
        if choices := as_list(schema.get(keyword)):
            types &= set().union(*(types_of(one, within) for one in choices))
    for values in (
        schema.get("enum"),
        [schema["const"]] if "const" in schema else None,
    ):
        if isinstance(values, list):
            types &= {name for name in TYPES for value in values if TYPES[name](value)}
    return types


def find_value(text: str, openings: re.Pattern[str]) -> tuple[int, bool]:
    """Where a value begins, or may begin if that is yet to be seen."""
    for opening in openings.finditer(text):
        at = opening.start()
        if begins := BEGINS.match(text, at) or MAY_BEGIN.fullmatch(text, at):
            return at, begins.re is BEGINS
    return len(text), False


def lone_value(text: str, format: ResponseFormat, types: set[str]) -> str:
    """A value that does not look like one, if it fits the schema, else the text."""
    for found in islice(LONE_VALUE.finditer(text), MOST_LONE_VALUES):
        value = found[0]
        if value in BRACKETS:
            reader = JSONReader(keeps_space=True)
            reader.feed(text[found.start() :])
            value = reader.take() if reader.is_done else ""
        elif types == set(TYPES):
            continue
        if value and not parsed_or_why(value, format)[1]:
            return value
    return text


# -- Tool calls ----------------------------------------------------------------
#
# Calls as models write them in their text: whatever they were told, each writes what
# it was trained on. A call is one opening or several, then an object that names a
# tool, or arguments if an opening holds the name, and what closes the openings. To
# add a format: a row in TOOL_CALL_FORMATS. A call is held until its end and parsed
# once; only arguments that are JSON as it stands are told while they are written.
# Cut into single characters, a text gives the same.


def tool_call_error(name: str, arguments: str, toolbox: Toolbox) -> str:
    """Why a call fits no tool; "" if it does."""
    tool = toolbox.find(name)
    if not tool:
        return f"there is no tool {name}."
    schema = {"type": "object", **tool.parameters}
    return validate(parsed(arguments), schema, "arguments")


OBJECTS = (  # how a call begins as an object; * is its name, or an id and then the name
    '{ "name" : "*"',
    '{ "function" : "*"',
    '{ "tool" : "*"',
    '{ "tool_name" : "*"',
    '{ "type" : "function" , "name" : "*"',
    '{ "function" : { "name" : "*"',
    '{ "type" : "function" , "function" : { "name" : "*"',
    '{ "id" : "*" , "type" : "function" , "function" : { "name" : "*"',
)

NAME_KEYS = ("name", "function", "tool", "tool_name")

ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")

CALL_KEYS = {*NAME_KEYS, *ARGUMENT_KEYS, "type", "id"}

SCHEMA_KEYS = ("type", "properties", "$schema")  # a tool's own schema begins so

NAME_CHARACTERS = ALPHABET + "_-"

LONGEST_HEAD = 400  # characters, of OBJECTS with arguments that begin


def matched(form: str, text: str, at: int = 0) -> tuple[str, int] | None:
    """The last name in a form, and where the form ends; -1 if the text ends before.

    A space in a form is any space, or none."""
    start = form.partition("*")[0].partition(" ")[0]
    if not text.startswith(start, at):
        is_begun = start.startswith(text[at : at + len(start)])
        return ("", -1) if is_begun else None
    at, form, name = at + len(start), form[len(start) :], ""
    for index, c in enumerate(form):
        if c == " ":
            while text[at : at + 1].isspace():
                at += 1
        if at == len(text):
            return name, -1
        if c == "*":
            name = "".join(takewhile(NAME_CHARACTERS.__contains__, text[at : at + 64]))
            at += len(name)
            name = "" if "*" in form[index + 1 :] else name
            if at == len(text):
                return name, -1
        elif c != " ":
            if text[at] != c:
                return None
            at += 1
    return name, at


def object_head(head: str, toolbox: Toolbox, is_sure: bool) -> tuple[str, int] | None:
    """Which tool an object calls, "" while it may name one, and where arguments begin.

    None if no call begins so, or if it is a tool that is described, not called."""
    head = head.replace("'", '"')
    found = None
    for form in OBJECTS:
        name, end = matched(form, head) or ("-", 0)
        if not end or not toolbox.knows(name, end > 0):
            continue
        if end < 0:
            found = found or ("", 0)
            continue
        known = properties_of(toolbox.find(name))
        recited = [f'{{ "{key}" :' for key in SCHEMA_KEYS if key not in known]
        for key in ARGUMENT_KEYS:
            _, at = matched(f' , "{key}" : ', head, end) or ("", 0)
            if not at:
                continue
            found = name, 0
            if at > 0 and head[at] == "{":
                ends = [m[1] for form in recited if (m := matched(form, head, at))]
                if is_sure or not ends:
                    return name, at
                if max(ends) > 0:
                    return None
        if matched(" }", head, end) or matched(' , "id" :', head, end):
            found = name, 0
    return found


def calls_in(value: Any, toolbox: Toolbox, is_sure: bool) -> list[tuple[str, str]]:
    """The names and arguments in a JSON value of any shape; none if it is no call."""
    if isinstance(value, list):
        return [call for item in value for call in calls_in(item, toolbox, is_sure)]
    if not isinstance(value, dict):
        return []
    inner = value.get("tool_calls", value.get("function"))
    if isinstance(inner, (dict, list)):
        return calls_in(inner, toolbox, is_sure)
    name, given = loosely_named(value, toolbox) if is_sure else named(value)
    tool = toolbox.find(name)
    if not TOOL_NAME.fullmatch(name) or not (tool or is_sure):
        return []
    arguments = arguments_text(given, tool if is_sure else None)
    is_whole = given is not None or not properties_of(tool)
    return [(name, arguments)] if is_sure or is_whole and arguments[0] == "{" else []


def named(value: Json) -> tuple[str, Any]:
    """The name and the arguments in an object that has nothing else."""
    name = next((value[key] for key in NAME_KEYS if key in value), "")
    given = next((value[key] for key in ARGUMENT_KEYS if key in value), None)
    is_call = isinstance(name, str) and not value.keys() - CALL_KEYS
    return (name, given) if is_call else ("", None)


def loosely_named(value: Json, toolbox: Toolbox) -> tuple[str, Any]:
    """The same after a sure opening, where arguments may stand beside their name."""
    rest = {key: value[key] for key in value if key not in CALL_KEYS}
    name, given = named({key: value[key] for key in value if key not in rest})
    if not name and len(value) == len(rest) == 1:
        [(name, given)] = rest.items()
        return (name, given) if toolbox.find(name) else ("", None)
    name = name.removeprefix("functions.")
    if not rest:
        return name, given
    is_flat = given is None and rest.keys() <= properties_of(toolbox.find(name)).keys()
    return (name, rest) if is_flat else ("", None)


def arguments_text(given: Any, tool: Tool | None) -> str:
    """Arguments as JSON: a text may hold them, or be the only one a tool needs."""
    if isinstance(given, str) and given.lstrip().startswith("{"):
        return repair_json(given) or given
    if isinstance(given, str) and given:
        needed = as_list(tool and tool.parameters.get("required"))
        if len(needed) == 1 and is_string(tool, needed[0]):
            given = {needed[0]: given}
    return compact({} if given in (None, "") else given)


def is_string(tool: Tool | None, parameter: Any) -> bool:
    known = properties_of(tool)
    is_known = isinstance(parameter, str) and parameter in known
    return is_known and json_type(as_object(known[parameter])) == "string"


ANYWHERE, LINE, INSIDE = "anywhere", "at the beginning of a line", "after an opening"


class ToolCallFormat(NamedTuple):
    opening: str  # with * for the name of a tool
    closing: str = ""
    is_sure: bool = False  # it means a call, even of a tool that is not there
    where: str = ANYWHERE
    holds: str = "object"  # … or other openings; else the method that reads it


TOOL_CALL_FORMATS = (
    ToolCallFormat("<tool_call>", "</tool_call>", True),  # Qwen, Hermes, granite
    ToolCallFormat("<tool_calls>", "</tool_calls>", True),
    ToolCallFormat("<|tool_call|>", "<|/tool_call|>", True),  # granite 3, phi-4
    ToolCallFormat("<function_call>", "</function_call>", True),
    ToolCallFormat("<functioncall>", "</functioncall>", True),  # glaive
    ToolCallFormat("<|python_tag|>", "<|eom_id|>", True),  # Llama 3
    ToolCallFormat('{ "tool_calls" : [', "", True, LINE),  # OpenAI's own objects
    ToolCallFormat("[TOOL_CALLS]", "", True),  # Mistral …
    ToolCallFormat("*[ARGS]", "", False, INSIDE, "named"),  # … since its tokenizer 11
    ToolCallFormat(
        "<function=*>", "</function>", holds="named"
    ),  # Llama 3, Qwen3 Coder
    ToolCallFormat("*\n<arg_key>", "</tool_call>", False, INSIDE, "tagged"),  # GLM
    ToolCallFormat("*<arg_key>", "</tool_call>", False, INSIDE, "tagged"),
    ToolCallFormat("*\n", "", False, INSIDE, "named"),
    ToolCallFormat("<function_calls>", "</function_calls>", True),  # Claude
    ToolCallFormat('<invoke name="*">', "</invoke>", holds="named"),
    ToolCallFormat("<minimax:tool_call>", "</minimax:tool_call>", True),
    ToolCallFormat("<｜DSML｜function_calls>", "</｜DSML｜function_calls>", True),
    ToolCallFormat('<｜DSML｜invoke name="*">', "</｜DSML｜invoke>", holds="named"),
    ToolCallFormat("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", True),  # DeepSeek
    ToolCallFormat(
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>*",
        "<｜tool▁call▁end｜>",
        holds="named",
    ),
    ToolCallFormat(
        "<｜tool▁call▁begin｜>*<｜tool▁sep｜>", "<｜tool▁call▁end｜>", holds="named"
    ),
    ToolCallFormat(  # Kimi K2
        "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", True
    ),
    ToolCallFormat(
        "<|tool_call_begin|>functions.*:", "<|tool_call_end|>", holds="named"
    ),
    ToolCallFormat("<|tool_call_begin|>*:", "<|tool_call_end|>", holds="named"),
    ToolCallFormat("<|start|>assistant"),  # gpt-oss: the tool is named in its role …
    ToolCallFormat("to=functions.*", "<|call|>", False, INSIDE, "named"),
    ToolCallFormat("<|channel|>commentary to=functions.*", "<|call|>", holds="named"),
    ToolCallFormat("<|channel|>analysis to=functions.*", "<|call|>", holds="named"),
    ToolCallFormat("```json", "```"),
    ToolCallFormat("```xml", "```"),
    ToolCallFormat("```tool_call", "```"),
    ToolCallFormat("```tool_code", "```"),  # Gemma, Gemini
    ToolCallFormat("```", "```"),
    ToolCallFormat("[", "]", False, LINE),
    ToolCallFormat("print(", ")", False, INSIDE),
    ToolCallFormat("default_api.", "", False, INSIDE),
    ToolCallFormat(
        "*(", "", False, INSIDE, "python"
    ),  # Llama 4: [get_time(zone="UTC")]
    ToolCallFormat("<tool_response", holds="result"),  # made up, after a call
)

BY_BEGINNING = {
    c: [format for format in TOOL_CALL_FORMATS if format.opening[0] == c]
    for c in {format.opening[0] for format in TOOL_CALL_FORMATS}
}

START = re.compile(r"[<\[{`]")  # what any call begins with

LEADING_SPACE = re.compile(rf"\s{{0,{LONGEST_SPACE + 1}}}")

GAP = re.compile(rf"[\s,;]{{0,{LONGEST_SPACE + 1}}}")

MOST_OPENINGS = 6  # of one call

LONGEST_CALL = 200_000  # characters that are held

LONGEST_PIECE = 1000  # characters that are looked at together

LONGEST_LEAD = 80  # characters

LEAD = re.compile(  # what may stand between a name and its arguments
    r"\s*(\d{1,3}\s*)?((<\|\w{1,30}\|>\s*((commentary|analysis)\s*)?|```)?(json|code)?\s*){0,4}"
)

TAG_BEGINS = r"<(?:｜DSML｜|antml:)?parameter"

TAGGED = re.compile(  # Qwen3 Coder has the first form, Claude the next, GLM the last
    rf"<parameter=(?P<name>[^<>]{{1,64}})>"
    rf'|{TAG_BEGINS} name="(?P<quoted>[^<>"]{{1,64}})"[^<>]{{0,40}}>'
    r"|<arg_key>(?P<key>[^<>]{1,64})</arg_key>\s*<arg_value>"
)

TAGGED_END = re.compile(r"</(?:｜DSML｜|antml:)?parameter>|</arg_value>")


def tagged_arguments(text: str, tool: Tool | None) -> Json:
    """Arguments between tags: strings where the tool says so, else as they parse."""
    arguments: Json = {}
    for piece in TAGGED_END.split(text)[:-1]:
        if tag := TAGGED.search(piece):
            name = (tag["name"] or tag["quoted"] or tag["key"]).strip()
            text = piece[tag.end() :].removeprefix("\n").removesuffix("\n")
            value = None if is_string(tool, name) else parsed(text)
            is_null = value is None and text.strip() == "null"
            is_text = is_string(tool, name) or (value is None and not is_null)
            arguments[name] = text if is_text else value
    return arguments


LONGEST_PYTHON = 4000  # characters

DEEPEST_PYTHON = 20  # brackets

PYTHON_WORDS = {"true": "True", "false": "False", "null": "None"}

PYTHON_STRING = r"""(?P<text>\"""(?:[^\\]|\\.)*?\"""|\'\'\'(?:[^\\]|\\.)*?\'\'\'
    |"(?!"")(?:[^"\\\n]|\\.)*"|'(?!'')(?:[^'\\\n]|\\.)*')"""

PYTHON_PART = re.compile(
    rf"""{PYTHON_STRING}|(?P<open>[(\[{{])|(?P<close>[)\]}}])|[^"'()\[\]{{}}]+""",
    re.DOTALL | re.VERBOSE,
)

PYTHON_TOKEN = re.compile(
    rf"""{PYTHON_STRING}
    |(?P<name>[A-Za-z_]\w*)(?=\s*=)
    |(?P<word>\b(?:True|False|None|true|false|null)\b)
    |-?\b\d[\d_]*(?:\.\d*)?(?:[eE][+-]?\d+)?\b""",
    re.DOTALL | re.VERBOSE,
)

PYTHON_NOISE = re.compile(r"[^0=\s,:()\[\]{}]|[0)\]}]\s*[0(\[{=]")

PYTHON_ESCAPE = re.compile(r"\\(?=[^\n\\'\"abfnrtvxuU0])(.)|\\.", re.DOTALL)


def python_arguments(text: str, tool: Tool | None) -> Json | None:
    """The arguments of a call in their brackets; None if they are not literals."""
    try:
        call = ast.parse(f"f{as_literals(text)}", mode="eval").body
        if not isinstance(call, ast.Call):
            return None
        values = [ast.literal_eval(argument) for argument in call.args]
        given = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        named = zip(islice(properties_of(tool), len(values)), values, strict=True)
        arguments = {**dict(named), **given}
        json.dumps(arguments, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    return arguments


def as_literals(text: str) -> str:
    """The text as Python may have it; ValueError if there is more in it than literals.

    Python's parser is given nothing else, as it recurses without an end of its own."""
    bare = PYTHON_TOKEN.sub(lambda token: "" if token["name"] else "0", text)
    depth = 0
    for c in bare:
        depth += (c in "([{") - (c in ")]}")
        if depth > DEEPEST_PYTHON:
            refuse("too deep")
    if PYTHON_NOISE.search(bare):
        refuse("more than literals")
    return PYTHON_TOKEN.sub(as_literal, text)


def as_literal(token: re.Match[str]) -> str:
    if token["text"]:
        return PYTHON_ESCAPE.sub(lambda e: f"\\{e[0]}" if e[1] else e[0], token[0])
    return PYTHON_WORDS.get(token[0], token[0])


def extract_tool_calls(
    events: Events, toolbox: Toolbox, strict: bool = False
) -> Events:
    """Tell calls from text, and end with `tool_calls` if there were any.

    `strict`: a call of a tool that is not there is text."""
    parser = ToolCallParser(toolbox, strict)
    with closing(events):
        for event in events:
            if isinstance(event, Text):
                yield from parser.feed(event.text)
            elif isinstance(event, Done):
                yield from parser.finish(event.finish_reason)
                yield Done(parser.finish_reason(event.finish_reason), event.usage)
            else:
                yield event
            if parser.is_over:
                yield Done(parser.finish_reason("stop"))
                return


class ToolCallParser:
    """How far one answer has been read: `step` gets on, or waits for more."""

    def __init__(self, toolbox: Toolbox, strict: bool) -> None:
        self.toolbox = toolbox
        self.strict = strict
        self.texts: list[str] = []  # that nobody has taken yet …
        self.events: list[Event] = []  # … and what came before them
        self.calls = 0
        self.is_fresh = True  # nothing was said yet, or nothing since a call
        self.is_over = False  # what comes now is no answer
        self.was_cut = False
        self.openings: list[ToolCallFormat] = []  # that are not closed
        self.sought = self.openings  # the same, with what may begin a call
        self.held = ""
        self.before = ""  # openings that were taken from what is held
        self.body: list[str] = []  # what was taken after them
        self.length = 0  # of both
        self.head = ""  # how the body begins
        self.tail = ""  # how it ends: of tags
        self.at = 0  # how much of what is held was read: of Python
        self.name = ""  # of the tool, if an opening has it
        self.reader = JSONReader()
        self.depth = 0  # of the arguments in what it reads
        self.step: Callable[[], bool] = self.seek

    def feed(self, text: str) -> list[Event]:
        """Read a long text in pieces, as what is held is copied again and again."""
        for start in range(0, len(text), LONGEST_PIECE):
            self.held += text[start : start + LONGEST_PIECE]
            while self.held and self.step():
                pass
        return self.take()

    def finish(self, finish_reason: str) -> list[Event]:
        """Decide on what is held: nothing more will come."""
        self.was_cut = finish_reason == "length"
        while self.step != self.arguments and (self.held or self.before or self.body):
            if not (self.held and self.step()):
                self.decide()
        if self.step == self.arguments:
            self.was_cut = self.was_cut or self.reader.is_cut()
            if not self.was_cut:
                self.reader.finish(self.depth)
                self.tell_arguments(self.reader.take())
        return self.take()

    def decide(self) -> None:
        if self.step == self.broken_arguments:
            self.tell_arguments(self.held)
            self.held = ""
        elif self.step == self.after or self.is_half():
            self.was_cut = self.was_cut or self.step != self.after
            self.held, self.before, self.body = "", "", []
        elif self.step == self.object:
            self.reader.finish()
            self.judge("")
        elif self.step == self.tagged:
            self.tell_tagged("".join(self.body), self.length)
        else:
            self.refuse()

    def is_half(self) -> bool:
        """Whether it was cut off in what would have been a call."""
        is_sure = self.is_sure()
        if self.was_cut and (is_sure or any(o.is_sure for o in self.sought)):
            return True
        if self.step == self.object:
            name, at = object_head(self.head, self.toolbox, is_sure) or ("", 0)
            is_cut = self.was_cut or self.reader.is_cut() or (bool(name) and not at)
            return is_cut and (is_sure or bool(name))
        if self.step == self.tagged:
            last = TAGGED_END.split("".join(self.body))[-1]
            return self.was_cut or bool(TAGGED.search(last))
        is_lead = self.step == self.named and LEAD.fullmatch(self.held)
        return bool(is_lead) or self.step == self.python

    def finish_reason(self, given: str) -> str:
        if self.was_cut:
            return "length"
        return self.toolbox.called if self.calls and given == "stop" else given

    def take(self) -> list[Event]:
        self.end_text()
        events, self.events = self.events, []
        return events

    def end_text(self) -> None:
        if self.texts:
            self.events.append(Text("".join(self.texts)))
            self.texts = []

    def tell_text(self, length: int) -> None:
        if length:
            self.is_fresh = False
            self.texts.append(self.held[:length])
            self.held = self.held[length:]

    def tell_call(self, name: str, arguments: str = "") -> None:
        if not self.calls or self.toolbox.parallel:
            self.end_text()
            self.events.append(ToolCall(self.calls, random_id("call_", 24), name))
        self.calls += 1
        self.tell_arguments(arguments)

    def tell_arguments(self, text: str) -> None:
        if text and (self.calls == 1 or self.toolbox.parallel):
            self.events.append(Arguments(self.calls - 1, text))

    def is_sure(self) -> bool:
        return any(opening.is_sure for opening in self.openings)

    def seek(self) -> bool:
        """Tell text up to where a call may begin, and read its openings."""
        if not self.openings:
            start = START.search(self.held)
            end = start.start() if start else len(self.held)
            self.tell_text(max(len(self.held[:end].rstrip()), end - LONGEST_SPACE))
        self.sought = openings = [*self.openings]
        at = 0
        most = len(openings) + MOST_OPENINGS
        while len(openings) <= most:
            space = (GAP if openings else LEADING_SPACE).match(self.held, at)
            start_at = space.end() if space else at
            if start_at == len(self.held):
                return False
            is_line = self.is_fresh or "\n" in self.held[at:start_at]
            places = {ANYWHERE, LINE, INSIDE} if openings else {ANYWHERE, LINE}
            found = self.formats_at(
                start_at, places if is_line or openings else {ANYWHERE}
            )
            if any(end < 0 for _, _, end in found):
                return False
            at = start_at
            if not found:
                break
            format, name, at = max(found, key=itemgetter(2))
            if format in openings[len(self.openings) :]:
                return self.refuse(at)
            openings.append(format)
            if format.holds != "object":
                return self.begin(openings, at, name, getattr(self, format.holds))
        else:
            return self.refuse(at)
        if self.held[at] == "{" and (is_line or openings):
            return self.begin(openings, at, "", self.object)
        return self.refuse(at)

    def formats_at(
        self, at: int, places: set[str]
    ) -> list[tuple[ToolCallFormat, str, int]]:
        """The formats that open there, the name in the opening, and where that ends."""
        found = []
        c = self.held[at]
        starred = BY_BEGINNING["*"] if c in NAME_CHARACTERS and INSIDE in places else []
        for format in [*BY_BEGINNING.get(c, ()), *starred]:
            if format.where in places:
                name, end = matched(format.opening, self.held, at) or ("", 0)
                if "*" in format.opening and not self.toolbox.knows(name, end > 0):
                    continue
                found += [(format, name, end)] if end else []
        return found

    def begin(
        self,
        openings: list[ToolCallFormat],
        at: int,
        name: str,
        step: Callable[[], bool],
    ) -> bool:
        self.openings, self.name, self.step = openings, name, step
        self.before, self.held = self.held[:at], self.held[at:]
        self.body, self.length = [], at
        self.head, self.tail, self.at, self.depth = "", "", 0, 1
        self.reader = JSONReader()
        return True

    def refuse(self, length: int = 0) -> bool:
        """It was no call: its first character is text, and the rest may be one yet.

        After a long look, `length` characters are text: none is read often."""
        self.held = "".join([self.before, *self.body, self.held])
        self.before, self.body, self.openings = "", [], []
        self.step = self.seek
        space = LEADING_SPACE.match(self.held)
        first = (space.end() if space else 0) + 1
        self.tell_text(length if length > LONGEST_HEAD else first)
        return True

    def close(self, rest: str) -> bool:
        """A call has ended."""
        self.held, self.before, self.body = rest, "", []
        self.is_fresh = True
        self.step = self.after
        return True

    def object(self) -> bool:
        """Read an object; its arguments at once if they begin as a call's."""
        was_short = len(self.head) < LONGEST_HEAD
        self.head += self.held[: LONGEST_HEAD - len(self.head)]
        self.body.append(self.held)
        if was_short:
            head = object_head(self.head, self.toolbox, self.is_sure())
            if head is None and not self.is_sure():
                self.held = ""
                return self.refuse()
            if head and head[1] and self.begin_arguments(*head):
                return True
        rest = self.reader.feed(self.held)
        self.length += len(self.held) - len(rest or "")
        self.held = ""
        if self.length > LONGEST_CALL or self.reader.is_broken:
            return self.refuse(min(self.length, LONGEST_CALL))
        return rest is not None and self.judge(rest)

    def begin_arguments(self, name: str, at: int) -> bool:
        reader = JSONReader()
        reader.feed(self.head[:at])
        if not reader.is_strict:
            return False
        self.depth = len(reader.closers)
        reader.take()
        self.tell_call(name)
        self.held, self.before, self.body = "".join(self.body)[at:], "", []
        self.reader, self.step = reader, self.arguments
        return True

    def judge(self, rest: str) -> bool:
        """Tell the calls in an object that has ended, or take it for text."""
        is_sure = self.is_sure()
        calls = calls_in(parsed(self.reader.take()), self.toolbox, is_sure)
        known = all(self.toolbox.find(name) for name, _ in calls)
        if not calls or not (known or is_sure and not self.strict):
            return self.refuse(self.length)
        for name, arguments in calls:
            self.tell_call(name, arguments)
        return self.close(rest)

    def named(self) -> bool:
        """Begin the arguments after an opening that holds the name."""
        lead, brace, _ = self.held.partition("{")
        closing = self.openings[-1].closing
        begun = lead.lstrip()
        if re.match(TAG_BEGINS, begun) or (closing and begun.startswith(closing)):
            self.step = self.tagged
            return True
        if not brace and len(lead) < LONGEST_LEAD:
            return False
        if not brace or not LEAD.fullmatch(lead):
            return self.refuse()
        if "```" in lead:
            self.openings.append(ToolCallFormat("```", "```"))
        self.tell_call(self.name)
        self.held, self.before, self.depth = self.held[len(lead) :], "", 0
        self.step = self.arguments
        return True

    def arguments(self) -> bool:
        """Tell arguments as they are written."""
        rest = self.reader.feed(self.held, self.depth)
        told = self.reader.take()
        self.held = ""
        if self.reader.is_broken:
            self.held, self.step = told, self.broken_arguments
            return True
        self.tell_arguments(told)
        if rest is None:
            return False
        self.held = rest
        self.step = self.remainder
        return bool(self.depth) or self.close(rest)

    def broken_arguments(self) -> bool:
        """Tell the rest as it is, up to what closes the call."""
        closings = [o.closing for o in self.openings if o.closing]
        ends = [self.held.find(c) for c in closings if c in self.held]
        end = min(ends) if ends else len(self.held) - overhang(self.held, closings)
        self.tell_arguments(self.held[:end])
        self.held = self.held[end:]
        return bool(ends) and self.close(self.held)

    def remainder(self) -> bool:
        """Pass over what an object holds after its arguments."""
        rest = self.reader.feed(self.held)
        self.held = ""
        return rest is not None and self.close(rest)

    def tagged(self) -> bool:
        """Read tags up to what closes them."""
        closing = self.openings[-1].closing
        text = self.tail + self.held
        end = text.find(closing)
        length = self.length - len(self.tail) + (len(text) if end < 0 else end)
        self.body.append(self.held)
        self.held = ""
        if length > LONGEST_CALL:
            return self.refuse(LONGEST_CALL)
        if end >= 0:
            return self.tell_tagged("".join(self.body), length - len(self.before))
        self.length, self.tail = length, text[1 - len(closing) :]
        return False

    def tell_tagged(self, text: str, end: int) -> bool:
        tool = self.toolbox.find(self.name)
        arguments = tagged_arguments(self.before + text[:end], tool)
        self.tell_call(self.name, compact(arguments))
        return self.close(text[end:])

    def python(self) -> bool:
        """Read a call in Python to its last bracket."""
        text = self.held[:LONGEST_PYTHON]
        while self.depth and (part := PYTHON_PART.match(text, self.at)):
            if part["text"] and part.end() == len(text):
                break  # two quotes may become three
            self.at = part.end()
            self.depth += bool(part["open"]) - bool(part["close"])
        if self.depth:
            is_open = text[self.at : self.at + 3] in ('"""', "'''")
            if len(text) < LONGEST_PYTHON and (is_open or "\n" not in text[self.at :]):
                return False
            return self.refuse(len(self.before) + len(text))
        tool = self.toolbox.find(self.name)
        arguments = python_arguments(f"({text[: self.at]}", tool)
        if arguments is None:
            return self.refuse(len(self.before) + self.at)
        self.tell_call(self.name, compact(arguments))
        self.openings.pop()
        return self.close(self.held[self.at :])

    def result(self) -> bool:
        """What a tool gives is not the model's to say: after a call, all is said."""
        self.is_over = self.calls > 0
        self.held = "" if self.is_over else self.held
        return not self.is_over and self.refuse()

    def after(self) -> bool:
        """Drop what closes the openings of a call, and a bracket too many."""
        space = GAP.match(self.held)
        rest = self.held[space.end() :] if space else ""
        for depth, opening in reversed(list(enumerate(self.openings))):
            if opening.closing and rest.startswith(opening.closing):
                self.held = rest.removeprefix(opening.closing)
                del self.openings[depth:]
                return True
        if rest[:1] in ("}", "]") and self.is_sure():
            self.held = rest[1:]
            return True
        if not rest or any(o.closing.startswith(rest) for o in self.openings):
            return False
        self.step = self.seek
        return True


# ==== 6. OBJECTS ==============================================================


# -- Objects -------------------------------------------------------------------
#
# An OpenAI object is told by two pure functions: an event's chunks, and the
# whole. They say the same. Keys stand in the order of the real API's answers
# as they were recorded, with its nulls.


Told = Generator[tuple[int, Event], None, None]  # with the index of its choice

Frames = Generator[bytes, None, None]  # server-sent events


class Head(NamedTuple):
    """What all chunks of a reply share."""

    id: str
    created: int
    model: str
    with_usage: bool  # every chunk then has a place for it
    legacy: bool = False  # calls of functions, as they were before tools


class Choice(NamedTuple):
    text: str
    finish_reason: str
    thought: str = ""
    calls: tuple[Json, ...] = ()


class Form(NamedTuple):
    """How an operation tells events."""

    prefix: str
    chunks: Callable[[Event, int, Head], list[Json]]
    usage_chunk: Callable[[Usage, Head], Json]
    whole: Callable[[Sequence[Choice], Usage, Head], Json]


def usage_object(usage: Usage) -> Json:
    asked, answered = usage.prompt_tokens or 0, usage.completion_tokens or 0
    return {
        "prompt_tokens": asked,
        "completion_tokens": answered,
        "total_tokens": asked + answered,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def add(usages: Iterable[Usage]) -> Usage:
    asked, answered, reasoning, estimates = map(sum, zip(*usages, strict=True))
    return Usage(asked, answered, reasoning, bool(estimates))


def chat_chunk(head: Head, choices: list[Json], usage: Json | None = None) -> Json:
    chunk = {
        "id": head.id,
        "object": "chat.completion.chunk",
        "created": head.created,
        "model": head.model,
        "service_tier": "default",
        "system_fingerprint": None,
        "choices": choices,
    }
    return {**chunk, "usage": usage} if head.with_usage else chunk


def chat_choice(index: int, delta: Json, finish_reason: str | None = None) -> Json:
    return {
        "index": index,
        "delta": delta,
        "logprobs": None,
        "finish_reason": finish_reason,
    }


def chat_chunks(event: Event, index: int, head: Head) -> list[Json]:
    match event:
        case Started():
            first = {"role": "assistant", "content": "", "refusal": None}
            return [chat_chunk(head, [chat_choice(index, first)])]
        case Reasoning(text):
            return [chat_chunk(head, [chat_choice(index, {"reasoning_content": text})])]
        case Text(text):
            return [chat_chunk(head, [chat_choice(index, {"content": text})])]
        case ToolCall() | Arguments():
            delta = call_delta(event, head.legacy)
            return [chat_chunk(head, [chat_choice(index, delta)])]
        case Done(finish_reason):
            return [chat_chunk(head, [chat_choice(index, {}, finish_reason)])]


def chat_usage_chunk(usage: Usage, head: Head) -> Json:
    return chat_chunk(head, [], usage_object(usage))


def call_delta(event: ToolCall | Arguments, legacy: bool = False) -> Json:
    """What a call is told by; nothing of it is said twice."""
    match event:
        case ToolCall(index, id, name):
            function = {"name": name, "arguments": ""}
            told = {"index": index, "id": id, "type": "function", "function": function}
        case Arguments(index, text):
            function = {"arguments": text}
            told = {"index": index, "function": function}
    return {"function_call": function} if legacy else {"tool_calls": [told]}


def calls_of(events: Iterable[Event]) -> list[Json]:
    """The calls of an answer as the whole message holds them."""
    calls: dict[int, Json] = {}
    for event in events:
        if isinstance(event, ToolCall):
            function = {"name": event.name, "arguments": ""}
            call = {"id": event.id, "type": "function", "function": function}
            calls[event.index] = call
        elif isinstance(event, Arguments):
            calls[event.index]["function"]["arguments"] += event.text
    return list(calls.values())


def with_calls(message: Json, calls: Sequence[Json], legacy: bool = False) -> Json:
    """Put calls behind the content of a message, which is null if it has no text."""
    if not calls:
        return message
    told: Json = {"tool_calls": list(calls)}
    if legacy:
        told = {"function_call": calls[0]["function"]}
    first = {"role": message["role"], "content": message["content"] or None}
    return {**first, **told, **{k: v for k, v in message.items() if k not in first}}


def chat_message(choice: Choice, legacy: bool) -> Json:
    message: Json = {
        "role": "assistant",
        "content": choice.text,
        "refusal": None,
        "annotations": [],
    }
    if choice.thought:
        message["reasoning_content"] = choice.thought
    return with_calls(message, choice.calls, legacy)


def chat_completion(choices: Sequence[Choice], usage: Usage, head: Head) -> Json:
    return {
        "id": head.id,
        "object": "chat.completion",
        "created": head.created,
        "model": head.model,
        "choices": [
            {
                "index": index,
                "message": chat_message(choice, head.legacy),
                "logprobs": None,
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ],
        "usage": usage_object(usage),
        "service_tier": "default",
        "system_fingerprint": None,
    }


def text_chunk(head: Head, choices: list[Json], usage: Json | None = None) -> Json:
    chunk = {
        "id": head.id,
        "object": "text_completion",
        "created": head.created,
        "choices": choices,
        "model": head.model,
    }
    return {**chunk, "usage": usage} if head.with_usage else chunk


def text_choice(index: int, text: str, finish_reason: str | None = None) -> Json:
    return {
        "text": text,
        "index": index,
        "logprobs": None,
        "finish_reason": finish_reason,
    }


def text_chunks(event: Event, index: int, head: Head) -> list[Json]:
    match event:
        case Started() | Reasoning() | ToolCall() | Arguments():
            return []
        case Text(text):
            return [text_chunk(head, [text_choice(index, text)])]
        case Done(finish_reason):
            return [text_chunk(head, [text_choice(index, "", finish_reason)])]


def text_usage_chunk(usage: Usage, head: Head) -> Json:
    return text_chunk(head, [], usage_object(usage))


def text_completion(choices: Sequence[Choice], usage: Usage, head: Head) -> Json:
    return {
        "id": head.id,
        "object": "text_completion",
        "created": head.created,
        "model": head.model,
        "choices": [
            text_choice(index, choice.text, choice.finish_reason)
            for index, choice in enumerate(choices)
        ],
        "usage": usage_object(usage),
    }


CHAT_FORM = Form("chatcmpl-", chat_chunks, chat_usage_chunk, chat_completion)

TEXT_FORM = Form("cmpl-", text_chunks, text_usage_chunk, text_completion)

spaced = json.JSONEncoder(ensure_ascii=False).encode


def encode(value: Any) -> bytes:
    return compact(value).encode("utf-8", "replace")


def encode_for_people(value: Json) -> bytes:
    """A line for each key, and each item of a list: the encoder in C can't indent."""
    lines = [f'"{name}": {in_lines(each)}' for name, each in value.items()]
    text = "{\n  " + ",\n  ".join(lines) + "\n}\n"
    return text.encode("utf-8", "replace")


def in_lines(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return spaced(value)
    return "[\n    " + ",\n    ".join(map(spaced, value)) + "\n  ]"


def frame(chunk: Json) -> bytes:
    return b"data: " + encode(chunk) + b"\n\n"


def tell_in_frames(told: Told, form: Form, head: Head) -> Frames:
    """Tell events as they come; what the frames of texts share is made once."""
    around: dict[int, tuple[bytes, bytes]] = {}
    usages = []
    due = b""
    for index, event in told:
        if isinstance(event, Text):
            if index not in around:
                around[index] = around_text(form, index, head)
            before, after = around[index]
            due += before + encode(event.text) + after
            if event.more:
                continue
        else:
            if isinstance(event, Done):
                usages.append(event.usage)
            due += b"".join(map(frame, form.chunks(event, index, head)))
        yield due
        due = b""
    if head.with_usage:
        yield frame(form.usage_chunk(add(usages), head))


def around_text(form: Form, index: int, head: Head) -> tuple[bytes, bytes]:
    mark = random_id("", 20)
    [chunk] = form.chunks(Text(mark), index, head)
    before, _, after = frame(chunk).partition(encode(mark))
    return before, after


def tell_at_once(told: Told, form: Form, head: Head) -> Json:
    """Tell events when the last has come."""
    by_choice: dict[int, list[Event]] = defaultdict(list)
    for index, event in told:
        by_choice[index].append(event)
    choices = [fold(by_choice[index]) for index in sorted(by_choice)]
    ends = (event for events in by_choice.values() for event in events)
    usage = add(event.usage for event in ends if isinstance(event, Done))
    return form.whole(choices, usage, head)


def fold(events: Sequence[Event]) -> Choice:
    text = "".join(event.text for event in events if isinstance(event, Text))
    thought = "".join(event.text for event in events if isinstance(event, Reasoning))
    ends = [event.finish_reason for event in events if isinstance(event, Done)]
    return Choice(text, ends[-1], thought, tuple(calls_of(events)))


def model_object(id: str, ref: str, created: int) -> Json:
    owner = ref.removeprefix("deployments/").partition("/")[0]
    return {"id": id, "object": "model", "created": created, "owned_by": owner}


# ==== 7. SERVING ==============================================================


# -- Generation ----------------------------------------------------------------
#
# An answer is held to what the client asked for. What it lacks is asked for once
# more, by a second prediction that is told what was wrong, as long as nothing of
# the first was told; then what comes is taken, and the log says what it lacks.
# The predictions of one call, side by side: those of n choices, or of several
# prompts. Each runs in a thread of its own, on a cancellation that stops with the
# call's, or when one of them fails. Nobody waits for a thread that has to stop:
# it cancels its prediction as soon as it knows of one, within the time limits of
# a create and a cancel. The end of the server waits for it: see Upstream.
# An order run, its answer made what the client asked for, and told.


Again = Callable[[str, str], Events]  # what was said, and what to do now


class Demand(NamedTuple):
    """What an answer has to be, and from which event on it is told as it comes."""

    complaint: Callable[[Choice], str]  # a sentence, or "" if there is none
    remedy: Callable[[str], str]  # what to do now, by what was wrong
    lets_go: Callable[[Event], bool]
    is_partly_good: Callable[[Choice], bool]  # and better than one without calls


def demand_of(wanted: Wanted, stream: bool) -> Demand | None:
    """Hold calls to their tools, and text to its format; if streamed, for the log."""
    toolbox, format = wanted
    if toolbox:
        must_call = toolbox.must_call
        return Demand(
            lambda answer: misuses(answer.calls, toolbox) or misfits(answer, format),
            lambda why: repair_instructions(toolbox, why),
            lambda event: stream and (not must_call or isinstance(event, ToolCall)),
            lambda answer: any(not misuses([call], toolbox) for call in answer.calls),
        )
    if format:
        return Demand(
            lambda answer: misfits(answer, format),
            lambda why: json_repair(format, why),
            lambda _: stream,
            lambda _: False,
        )
    return None


def misuses(calls: Sequence[Json], toolbox: Toolbox) -> str:
    if not calls:
        return "no tool was called." if toolbox.must_call else ""
    functions = [call["function"] for call in calls]
    faults = (tool_call_error(f["name"], f["arguments"], toolbox) for f in functions)
    return next(filter(None, faults), "")


def misfits(answer: Choice, format: ResponseFormat | None) -> str:
    if format is None or answer.calls:
        return ""
    return parsed_or_why(answer.text, format)[1]


def held_to(demand: Demand, events: Events, again: Again | None = None) -> Events:
    """Tell an answer if it is what it has to be, else the one that is asked for."""
    seen: list[Event] = []
    told, goes = 0, False
    with closing(events):
        for event in events:
            seen.append(event)
            goes = goes or demand.lets_go(event)
            if goes or isinstance(event, Started):
                yield from seen[told:]
                told = len(seen)
    answer = fold(seen)
    why = demand.complaint(answer)
    repairs = why and again and not goes and answer.finish_reason != "length"
    if why:
        log.warning("event=%s why=%s", "repair" if repairs else "misfit", quoted(why))
    if repairs and again:
        said = told_message(chat_message(answer, legacy=False))["content"]
        better = held_to(demand, again(said, demand.remedy(why)))
        better = after_all(better, usage_of(seen))
        yield from instead(better, seen) if demand.is_partly_good(answer) else better
    else:
        yield from seen[told:]


def usage_of(events: Sequence[Event]) -> Usage:
    return add(event.usage for event in events if isinstance(event, Done))


def after_all(events: Events, spent: Usage) -> Events:
    """The answer of a second prediction, with what the first one took."""
    with closing(events):
        for event in events:
            if isinstance(event, Done):
                yield Done(event.finish_reason, add([spent, event.usage]))
            elif not isinstance(event, Started):
                yield event


def instead(events: Events, first: Sequence[Event]) -> Events:
    """The answer of a second prediction if it calls, else the first one's."""
    with closing(events):
        second = list(events)
    if any(isinstance(event, ToolCall) for event in second):
        yield from second
        return
    yield from (e for e in first if not isinstance(e, (Started, Done)))
    yield Done(fold(first).finish_reason, usage_of(second))


AT_ONCE = 8  # predictions of one call

Run = Callable[[Cancellation], Events]


def side_by_side(runs: Sequence[Run], cancellation: Cancellation) -> Told:
    """Tell each event with the index of its run; choice 0 begins."""
    if len(runs) == 1:
        with closing(runs[0](cancellation)) as events:
            yield from ((0, event) for event in events)
        return
    branch = Cancellation()
    with cancellation.on_cancel(
        lambda: branch.cancel(cancellation.cause or ClientDisconnected())
    ):
        yield from led_by_the_first(gathered(runs, branch))


def gathered(runs: Sequence[Run], branch: Cancellation) -> Told:
    """Gather events as they come; the first error, or a stop, ends all at once."""
    heard: SimpleQueue[tuple[int, Event] | Exception | None] = SimpleQueue()
    jobs = iter(enumerate(runs))
    work = partial(drive, jobs, branch, heard.put, threading.Lock())
    threads = [threading.Thread(target=work) for _ in runs[:AT_ONCE]]
    try:
        with branch.on_cancel(lambda: heard.put(branch.cause or ClientDisconnected())):
            for thread in threads:
                thread.start()
            at_work = len(threads)
            while at_work:
                item = heard.get()
                if isinstance(item, Exception):
                    raise item
                at_work -= item is None
                if item is not None:
                    yield item
    finally:
        branch.cancel(ClientDisconnected())


def alone(event: Event) -> Event:
    """A text that waits for no other, as another choice may fail in between."""
    return Text(event.text) if isinstance(event, Text) else event


def drive(
    jobs: Iterator[tuple[int, Run]],
    branch: Cancellation,
    tell: Callable[[tuple[int, Event] | Exception | None], None],
    lock: threading.Lock,
) -> None:
    """Run one after another, until there are none left."""
    try:
        while True:
            with lock:
                index, run = next(jobs, (-1, None))
            if run is None:
                return tell(None)
            with closing(run(branch)) as events:
                for event in events:
                    tell((index, alone(event)))
    except Exception as error:
        tell(error)


def led_by_the_first(told: Told) -> Told:
    """Hold what comes before choice 0 has begun: some clients count on its lead."""
    early: list[tuple[int, Event]] = []
    with closing(told):
        for index, event in told:
            early.append((index, event))
            if index == 0:
                break
        yield from sorted(early, key=lambda item: item[0] != 0)
        yield from told


class Proxy(NamedTuple):
    """What lasts as long as the server."""

    settings: Settings
    models: ModelsFile
    upstream: Upstream


class Call(NamedTuple):
    """What lasts as long as one call. All but the notes stays as it is."""

    method: str
    path: str
    headers: Mapping[str, str]  # names in lower case
    read: Callable[[], bytes]  # the body, when somebody with a key wants it
    cancellation: Cancellation
    notes: Json  # what the log will say of this call


class Reply(NamedTuple):
    body: Json | Frames | None
    status: int = 200
    headers: Mapping[str, str] = {}


def tell(
    proxy: Proxy,
    call: Call,
    body: Json,
    orders: list[PredictionInput],
    form: Form,
    wanted: Wanted | None = None,
) -> Reply:
    """Tell events as they come if the client asked to stream, else all at once."""
    head = Head(
        id=random_id(form.prefix, 29),
        created=int(time.time()),
        model=body["model"],
        with_usage=bool(body["stream_options"].get("include_usage")),
        legacy=bool(body.get("functions")),
    )
    model = orders[0].model
    call.notes["ref"] = f"{model.ref}; default" if model.is_default else model.ref
    shaped = partial(shape, proxy, call.notes, body, wanted or Wanted())
    runs = [partial(shaped, order) for order in orders]
    told = noted(side_by_side(runs, call.cancellation), call.notes)
    if body["stream"]:
        return Reply(tell_in_frames(told, form, head))
    with closing(told):
        return Reply(tell_at_once(told, form, head))


def shape(
    proxy: Proxy,
    notes: Json,
    body: Json,
    wanted: Wanted,
    order: PredictionInput,
    cancellation: Cancellation,
) -> Events:
    """Run an order, and do to its answer what the model can't."""

    def run(order: PredictionInput) -> Events:
        wait = not body["stream"]
        events = started(proxy.upstream.run(order, cancellation, wait=wait), notes)
        return heard(events, body, wanted, order)

    def ask(said: str, what: str) -> Events:
        return run(order.again(said, what) if order.again else order)

    events = run(order)
    if demand := demand_of(wanted, body["stream"]):
        return held_to(demand, events, ask)
    return echo(events, order.prompt) if order.echo else events


def heard(events: Events, body: Json, wanted: Wanted, order: PredictionInput) -> Events:
    """The answer to an order, in steps that each read what the one before tells.

    Thoughts come before all else; a model's own limit is a length of its text; stop
    strings are looked for in what the client reads, not in tags, fences or calls; and
    what was told in the end is counted."""
    if "messages" in body:
        thinks = THINKERS.fullmatch(order.model.owner_and_name)
        events = split_reasoning(events, bool(thinks))
    if order.cut:
        events = cut_after(events, order.cut)
    if wanted.toolbox:
        events = extract_tool_calls(events, wanted.toolbox, strict=body["stream"])
    if wanted.format:
        events = extract_json(events, wanted.format)
    if stops := list(filter(None, body["stop"])):
        called = wanted.toolbox.called if wanted.toolbox else "stop"
        events = stop_at(events, stops, called)
    return with_usage(events, order.prompt)


def started(events: Events, notes: Json) -> Events:
    """Note down each prediction, as one that repairs another is paid for as well."""
    with closing(events):
        first = next(events)
        assert isinstance(first, Started)
        notes["predictions"].append(first.prediction)
        yield first
        yield from events


def noted(told: Told, notes: Json) -> Told:
    """Note down for the log what passes by."""
    with closing(told):
        for item in told:
            _, event = item
            if isinstance(event, Done):
                notes["usages"].append(event.usage)
            elif "first_text_at" not in notes and not isinstance(event, Started):
                notes["first_text_at"] = time.monotonic()
            yield item


# -- Endpoints -----------------------------------------------------------------
#
# One function per OpenAI operation, under OpenAI's name for it, and one row per
# path. To add one: a row in ENDPOINTS, and its function. `answer` has no socket
# in it.


def check_health(proxy: Proxy, call: Call) -> Reply:
    return Reply({"status": "ok", "version": __version__})


def list_models(proxy: Proxy, call: Call) -> Reply:
    catalogue = proxy.models.current()
    rows = [model_object(*row, catalogue.created) for row in catalogue.mappings.items()]
    return Reply({"object": "list", "data": rows})


def retrieve_model(proxy: Proxy, call: Call, id: str) -> Reply:
    catalogue = proxy.models.current()
    try:
        model = find_model(replace(catalogue, default_model=None), id)
    except APIError as error:
        error.param = "model"
        raise
    return Reply(model_object(id, model.ref, catalogue.created))


def create_chat_completion(proxy: Proxy, call: Call, model_id: str = "") -> Reply:
    body = check_body(call, CHAT, model_id)
    messages = [given_back(message) for message in body["messages"]]
    body["messages"] = check_parts(messages)
    check_history(body["messages"])
    model = find_model(proxy.models.current(), body["model"])
    attached = attachments(body["messages"])
    kinds_sent = {kind for kind, _ in attached}
    family = family_for(model, body, kinds_sent, proxy.upstream.schemas)
    check_places(attached, model, family)
    wanted = Wanted(parse_toolbox(body), parse_response_format(body))
    body = asked_for(body, family, wanted)
    orders = [build_chat_input(variant, model, family) for variant in variants(body)]
    return tell(proxy, call, body, orders, CHAT_FORM, wanted)


def create_completion(proxy: Proxy, call: Call, model_id: str = "") -> Reply:
    body = check_body(call, COMPLETION, model_id)
    check_count(len(body["prompt"]) * body["n"])
    model = find_model(proxy.models.current(), body["model"])
    family = family_for(model, body, set(), proxy.upstream.schemas)
    orders = [
        build_completion_input(variant, model, family, prompt)
        for prompt in body["prompt"]
        for variant in variants(body)
    ]
    return tell(proxy, call, body, orders, TEXT_FORM)


def check_count(predictions: int) -> None:
    """Each prompt and each choice of it is a prediction, and they are paid for."""
    message = (
        f"Invalid 'prompt': it makes {predictions} predictions with its 'n', and a "
        f"call may make {MOST_PREDICTIONS}. Send fewer prompts at once."
    )
    few = predictions <= MOST_PREDICTIONS
    require(few, message, code="array_above_max_length", param="prompt")


def variants(body: Json) -> list[Json]:
    """The body of each of n choices, which must not all have the same seed."""
    if body["seed"] is None:
        return [body] * body["n"]
    seeds = (wrap(body["seed"] + i, *INT64) for i in range(body["n"]))
    return [{**body, "seed": seed} for seed in seeds]


def check_body(call: Call, params: Mapping[str, Param], model_id: str) -> Json:
    kind = call.headers.get("content-type", "application/json")
    body = parse_json_body(call.read(), kind)
    if model_id:
        body["model"] = model_id
    require(body.get("model"), "you must provide a model parameter")
    call.notes["model"] = str(body["model"])
    checked = check(body, params)
    only_streamed = (
        "The 'stream_options' parameter is only allowed when 'stream' is enabled."
    )
    allowed = checked["stream"] or body.get("stream_options") is None
    require(allowed, only_streamed, param="stream_options")
    return checked


class Endpoint(NamedTuple):
    method: str
    path: str  # without the /v1 that all of them may have; * is an id
    operation: Callable[..., Reply]
    is_open: Callable[[Call], bool] = lambda call: False


def always(call: Call) -> bool:
    return True


def without_key(call: Call) -> bool:
    """Without any key, but not with a wrong one: programs check theirs like this."""
    return given_key(call) is None


ENDPOINTS = [
    Endpoint("GET", "/health", check_health, is_open=always),
    Endpoint("GET", "/models", list_models, is_open=without_key),
    Endpoint("GET", "/models/*", retrieve_model),
    Endpoint("POST", "/chat/completions", create_chat_completion),
    Endpoint("POST", "/completions", create_completion),
    Endpoint("POST", "/engines/*/chat/completions", create_chat_completion),
    Endpoint("POST", "/engines/*/completions", create_completion),
]


def answer(proxy: Proxy, call: Call) -> Reply:
    """Raise APIError where the client is at fault, or Replicate, or time."""
    if call.method == "OPTIONS":
        return Reply(None, 204, preflight(call))
    endpoint, ids = find_endpoint(call.method, call.path)
    if not endpoint.is_open(call):
        authorize(call, proxy.settings.api_keys)
    return endpoint.operation(proxy, call, *ids)


@lru_cache(16)  # programs use few, and anyone may send long ones
def find_endpoint(method: str, path: str) -> tuple[Endpoint, tuple[str, ...]]:
    """Find by path, with all that clients do to it: //, a last /, no /v1, %2F."""
    wanted = re.sub("/+", "/", unquote(path)).removeprefix("/v1").rstrip("/")
    found = [
        (endpoint, match.groups())
        for endpoint in ENDPOINTS
        if (match := re.fullmatch(endpoint.path.replace("*", "(.+)"), wanted))
    ]
    if not found:
        message = (
            f"Unknown request URL: {method} {path}. Please check the URL for typos."
        )
        raise APIError(404, message, code="unknown_url")
    for endpoint, ids in found:
        if endpoint.method == ("GET" if method == "HEAD" else method):
            return endpoint, ids
    allowed = ", ".join(sorted({endpoint.method for endpoint, _ in found}))
    raise APIError(
        405,
        f"Not allowed to {method} on {path}. Only {allowed} requests are accepted.",
        code="method_not_supported",
        headers={"allow": allowed},
    )


def authorize(call: Call, keys: Iterable[str]) -> None:
    given = given_key(call)
    if given is None:
        raise APIError(401, NO_KEY)
    right = [compare_digest(given.encode(), key.encode()) for key in keys]
    if not any(right):
        message = (
            "Incorrect API key provided. It has to be one of the proxy's own keys, "
        )
        raise APIError(401, message + WHOSE_KEY, code="invalid_api_key")


WHOSE_KEY = (
    "those in PROXY_API_KEY where it was started: not OpenAI's, nor Replicate's."
)

NO_KEY = (
    "You didn't provide an API key. You need to provide it in an Authorization header "
    f"using Bearer auth (Authorization: Bearer YOUR_KEY). The keys are {WHOSE_KEY}"
)


def given_key(call: Call) -> str | None:
    scheme, _, key = call.headers.get("authorization", "").strip().partition(" ")
    if scheme:
        return key.strip() if scheme.lower() == "bearer" else ""
    return call.headers.get("api-key")


CORS = {
    "access-control-allow-origin": "*",
    "access-control-expose-headers": "x-request-id, retry-after, openai-processing-ms,"
    " x-should-retry, x-replicate-prediction-id, x-replicate-model",
}


def preflight(call: Call) -> dict[str, str]:
    asked = call.headers.get("access-control-request-headers", "")
    return {
        "access-control-allow-methods": "GET, POST, DELETE, OPTIONS",
        "access-control-allow-headers": asked or "authorization, content-type",
        "access-control-max-age": "86400",
        "vary": "access-control-request-headers",
    }


# -- HTTP ----------------------------------------------------------------------
#
# Requests as they come over a socket: no bare line feeds, no folded lines and no
# two lengths, which http.server takes, and behind which one could hide another.


SMALL = 65536  # a body that is rather read and forgotten than the connection closed

REQUEST_LINE = re.compile(rb"([A-Za-z]{1,32}) ([!-~\x80-\xff]+) HTTP/1\.([01])")


class DeadlineReader(io.RawIOBase):
    """What a client sends, with a deadline for all of it and not for each byte."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.deadline = 0.0
        self.is_idle = True  # between two calls

    def within(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Raise ClientDisconnected, or 408 after the deadline."""
        left = max(self.deadline - time.monotonic(), 0.001)
        try:
            block(self.sock, socket.SO_RCVTIMEO, left)
            return self.sock.recv_into(buffer)
        except (TimeoutError, BlockingIOError):
            raise bad_request("it came too slowly", 408) from None
        except OSError as error:
            raise ClientDisconnected from error


ORIGIN = re.compile(r"\A\w+://[^/?]*")


class Request(NamedTuple):
    method: str
    target: str
    minor: int  # of HTTP/1.x
    headers: dict[str, str]
    length: int | None = None  # of the body

    @property
    def keeps_alive(self) -> bool:
        asked = self.headers.get("connection", "").lower()
        return self.minor == 1 and "close" not in asked

    @property
    def path(self) -> str:
        """Of a target in any of its forms, without the query."""
        return ORIGIN.sub("", self.target, 1).partition("?")[0]


def bad_request(message: str, status: int = 400) -> APIError:
    return APIError(status, f"This is not HTTP as the proxy reads it: {message}.")


def read_head(stream: io.BufferedReader[DeadlineReader]) -> list[bytes]:
    """Read the lines up to the empty one."""
    lines: list[bytes] = []
    left = MAX_HEAD
    while line := stream.readline(left + 1):
        left -= len(line)
        if left < 0:
            raise bad_request(f"its head is larger than {MAX_HEAD} bytes", 431)
        if not line.endswith(b"\r\n"):
            raise bad_request("a line of its head does not end in CR LF")
        if line != b"\r\n":
            lines.append(line[:-2])
        elif lines:
            return lines
    raise bad_request("its head has no end")


def parse_head(lines: Sequence[bytes]) -> Request:
    first = REQUEST_LINE.fullmatch(lines[0])
    if not first:
        raise bad_request("the request line is not METHOD target HTTP/1.1")
    method, target = first[1].decode("ascii"), first[2].decode("latin-1")
    try:
        headers = read_headers(lines[1:])
        return Request(method, target, int(first[3]), headers, read_length(headers))
    except BadHead as error:
        raise bad_request(str(error)) from None


class Body:
    """The body of a request, which is read when somebody wants it."""

    def __init__(
        self, request: Request, stream: io.BufferedReader[DeadlineReader], limit: int
    ) -> None:
        self.stream = stream
        self.limit = limit
        self.is_chunked = is_chunked(request)
        self.length = request.length
        self.is_read = not self.is_chunked and not self.length
        self.is_begun = False
        self.is_awaited = request.headers.get("expect", "").lower() == "100-continue"

    def check(self) -> None:
        """Refuse it by the length it is said to have, before it is asked for."""
        if self.length is None and not self.is_chunked:
            raise bad_request("a body needs a Content-Length", 411)
        if self.length and self.length > self.limit:
            raise self.too_large(self.length)

    def read(self) -> bytes:
        self.is_begun = True
        if self.is_chunked:
            body = b"".join(self.read_chunks())
        else:
            body = self.read_exactly(self.length or 0)
        self.is_read = True
        return body

    def read_exactly(self, length: int) -> bytes:
        data = self.stream.read(length)
        if len(data) < length:
            raise bad_request("its body stops early")
        return data

    def read_chunks(self) -> Iterator[bytes]:
        total = 0
        while size := self.read_size():
            total += size
            if total > self.limit:
                raise self.too_large(total)
            yield self.read_exactly(size)
            if self.read_exactly(2) != b"\r\n":
                raise bad_request("a chunk is longer than it says")
        read_trailers(self.stream)

    def read_size(self) -> int:
        match = re.fullmatch(
            rb"([0-9A-Fa-f]{1,8})(;[ -~]*)?\r\n", self.stream.readline(1024)
        )
        if not match:
            raise bad_request("a chunk has no size")
        return int(match[1], 16)

    def too_large(self, size: int) -> APIError:
        message = f"Maximum content size limit ({self.limit}) exceeded ({size} bytes)."
        return APIError(413, f"{message} The proxy's limit is MAX_BODY_BYTES.")

    @property
    def is_passable(self) -> bool:
        """Whether another call can follow: nothing is unread, or little."""
        is_little = self.length is not None and self.length <= SMALL
        return self.is_read or (is_little and not self.is_awaited and not self.is_begun)

    def forget(self) -> bool:
        """Read what nobody wanted if it is little; else the connection must close."""
        if self.is_passable and not self.is_read:
            with suppress(APIError, ClientDisconnected):
                self.read()
        return self.is_read


def linger(reading: DeadlineReader, seconds: float) -> None:
    """Take in for a moment what is still being sent: a reset would undo our reply."""
    with suppress(OSError, APIError, ClientDisconnected):
        reading.sock.shutdown(socket.SHUT_WR)
        reading.within(seconds)
        while reading.readinto(bytearray(SMALL)):
            pass


def read_trailers(stream: io.BufferedReader[DeadlineReader]) -> None:
    left = MAX_HEAD
    while (line := stream.readline(left)) != b"\r\n":
        left -= len(line)
        if not line.endswith(b"\r\n") or left <= 0:
            raise bad_request("its trailers have no end")


def is_chunked(request: Request) -> bool:
    """Of two ways to tell a body's length, which could differ, neither is taken."""
    coding = request.headers.get("transfer-encoding")
    if coding is None:
        return False
    if request.length is not None or request.minor == 0:
        raise bad_request("its length is told in two ways, or in one it may not use")
    if coding.lower() != "chunked":
        raise bad_request("its Transfer-Encoding is not just chunked", 501)
    return True


def reply_head(status: int, headers: Mapping[str, str]) -> bytes:
    """A header can't carry all that a client may call a model: the rest becomes ?."""
    first = f"HTTP/1.1 {status} {http.client.responses.get(status, '')}"
    lines = [f"{name}: {value}" for name, value in headers.items() if value]
    text = "".join(lines)
    if not (text.isascii() and text.isprintable()):
        lines = [re.sub("[^ -~]", "?", line) for line in lines]
    return "\r\n".join([first, *lines, "", ""]).encode()


@lru_cache(1)  # thousands of replies share a second
def http_date(now: int) -> str:
    return formatdate(now, usegmt=True)


STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # or nginx would hold the tokens back
}

STREAM_CHUNKED = {**STREAM_HEADERS, "transfer-encoding": "chunked"}


# -- Server --------------------------------------------------------------------
#
# One thread looks after the calls in cancellation, so that the threads which follow
# predictions may simply block: it notices who hangs up, and breaks silences.
# ConnectionPool as http.server has them, a thread each; but they begin without waiting
# for one another, and are counted from when they are accepted, so that a server that
# closes knows when it has served all.
# What http.server says by itself is HTML, its head and body sent apart: not used.


DONE_FRAME = b"data: [DONE]\n\n"

KEEP_ALIVE = b": keep-alive\n\n"  # that very word: `: ping` breaks a client


class EventStreamWriter:
    """A streamed reply on the wire: its call writes it, the watcher keeps it alive.

    Its status line waits until there is something to tell, but not for ever.
    """

    def __init__(
        self, sock: socket.socket, head: Callable[[], bytes], chunked: bool
    ) -> None:
        self.sock = sock
        self.head = head
        self.chunked = chunked
        self.lock = threading.Lock()
        self.held = b""  # what is to go before anything else
        self.is_open = False
        self.is_over = False
        self.last = time.monotonic()

    def tell(self, frames: Frames) -> APIError | None:
        """Write frames as they come; give the failure that broke them off.

        As long as there is no status line, it is raised: it has its own.
        """
        try:
            self.hold(next(frames))
            for data in frames:
                if data:
                    self.write(data)
        except ClientDisconnected:
            raise
        except Exception as error:
            if self.close():
                raise
            return as_api_error(error)
        return None

    def hold(self, data: bytes) -> None:
        """Say this with what comes next."""
        with self.lock:
            self.held += self.piece(data)

    def write(self, data: bytes, end: bytes = b"") -> None:
        """Raise ClientDisconnected if the client has left, or does not read."""
        with self.lock:
            self.is_over = bool(end)
            try:
                self.sock.sendall(self.take(data) + end)
            except OSError as error:
                raise ClientDisconnected from error

    def end(self, data: bytes) -> None:
        self.write(data, b"0\r\n\r\n" if self.chunked else b"")

    def take(self, data: bytes) -> bytes:
        """What is due on the wire now, up to this."""
        head = b"" if self.is_open else self.head()
        due = head + self.held + self.piece(data)
        self.is_open, self.held, self.last = True, b"", time.monotonic()
        return due

    def piece(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self.chunked and data else data

    def close(self) -> bool:
        """Leave the socket alone from now on; True if no status line went out."""
        with self.lock:
            self.is_over = True
            return not self.is_open

    def break_silence(self, timeouts: Timeouts) -> None:
        """Send a sign of life if it is time, and no more of it than goes at once."""
        limit = timeouts.keep_alive if self.is_open else timeouts.hold
        if time.monotonic() - self.last < limit:
            return
        if self.lock.acquire(blocking=False):  # else its call is writing
            try:
                if not self.is_over:
                    due = self.take(KEEP_ALIVE)
                    self.held = due[send_at_once(self.sock, due) :]
            finally:
                self.lock.release()


def send_at_once(sock: socket.socket, data: bytes) -> int:
    limit = sock.gettimeout()
    sock.settimeout(0)
    try:
        return sock.send(data)
    except OSError:  # its buffer is full; or it is gone, which is noticed elsewhere
        return 0
    finally:
        sock.settimeout(limit)


class Watch:
    """One client, for as long as its call lasts.

    Each has a lock of its own. What is done under it are system calls, after which a
    thread waits for its turn again: if all shared one lock, all would wait for that.
    """

    def __init__(self, sock: socket.socket, cancellation: Cancellation) -> None:
        self.sock = sock
        self.cancellation = cancellation
        self.lock = threading.Lock()
        self.is_registered = True  # with the selector, until something comes


class Watcher(threading.Thread):
    """Stops the flights of clients that hang up, and breaks the silence of others."""

    def __init__(self, timeouts: Timeouts) -> None:
        super().__init__(name="watcher", daemon=True)
        self.timeouts = timeouts
        self.selector = selectors.DefaultSelector()
        self.writers: set[EventStreamWriter] = set()
        self.early: set[Watch] = set()  # what came is the next call
        self.is_stopped = False
        self.bell, self.ear = socket.socketpair()  # ends a wait; and some need one
        self.selector.register(self.ear, selectors.EVENT_READ)

    @contextmanager
    def kept_alive(self, writer: EventStreamWriter) -> Iterator[None]:
        self.writers.add(writer)
        try:
            yield
        finally:
            self.writers.discard(writer)
            writer.close()

    def run(self) -> None:
        while not self.is_stopped:
            try:
                self.go_round()
            except Exception:  # all calls depend on this thread
                log.exception("the watcher failed")
                time.sleep(self.timeouts.tick)

    def go_round(self) -> None:
        for key, _ in self.selector.select(self.timeouts.tick):
            if key.data:
                self.look(key.data)
        for watch in list(self.early):
            self.look_behind(watch)
        for writer in list(self.writers):
            writer.break_silence(self.timeouts)

    def watch(self, sock: socket.socket, cancellation: Cancellation) -> Watch:
        watch = Watch(sock, cancellation)
        with suppress(OSError, ValueError):
            self.selector.register(sock, selectors.EVENT_READ, watch)
        return watch

    def forget(self, watch: Watch) -> None:
        """Best before the last word to a client, whose next call would wake us."""
        with watch.lock:
            self.drop(watch)
            self.early.discard(watch)

    def drop(self, watch: Watch) -> None:
        if watch.is_registered:
            watch.is_registered = False
            with suppress(OSError, ValueError, KeyError):
                self.selector.unregister(watch.sock)

    def look(self, watch: Watch) -> None:
        """See why it can be read, if it still can: its end, or a call too early."""
        with watch.lock:
            came = peek(watch.sock) if watch.is_registered else None
            if came is None:
                return
            self.drop(watch)
            if came:
                self.early.add(watch)
            else:
                watch.cancellation.cancel(ClientDisconnected())

    def look_behind(self, watch: Watch) -> None:
        with watch.lock:
            if watch in self.early and has_left(watch.sock):
                self.early.discard(watch)
                watch.cancellation.cancel(ClientDisconnected())

    def stop(self) -> None:
        self.is_stopped = True
        self.bell.send(b"!")
        self.join()
        for end in (self.bell, self.ear, self.selector):
            end.close()


def has_left(sock: socket.socket) -> bool:
    """Whether the other side has closed, though there is more to read: Linux tells."""
    closed = getattr(select, "POLLRDHUP", 0)
    if not closed:
        return False
    poll = select.poll()
    poll.register(sock, closed)
    return bool(poll.poll(0))


class CountingServer(ThreadingHTTPServer):
    request_queue_size = 1024  # of 200 callers at once, 5 left 100 without an answer
    allow_reuse_port = False  # some Pythons would share a port that is in use

    def __init__(
        self, address: tuple[str, int], handler: Callable[..., BaseRequestHandler]
    ) -> None:
        self.changed = threading.Condition()
        self.connections: set[socket.socket] = set()
        super().__init__(address, handler)

    def server_activate(self) -> None:
        super().server_activate()
        self.socket.setblocking(False)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Have a thread serve it; `Thread.start` would wait until that has begun.

        Where many come at once, each would wait for all threads before it.
        """
        self.connections.add(request)
        work = (self.process_request_thread, (request, client_address))
        try:
            _thread.start_new_thread(*work)
        except RuntimeError:  # there are as many as the system allows
            self.handle_error(request, client_address)
            self.shutdown_request(request)

    def let_in(self) -> None:
        """Take over all whom the system has let in."""
        with suppress(OSError):
            for _ in range(self.request_queue_size):  # it holds no more at once
                self.process_request(*self.get_request())

    def service_actions(self) -> None:
        """One look for who has come is enough for all of them."""
        self.let_in()

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        with self.changed:
            self.connections.discard(request)
            self.changed.notify_all()

    def await_end_of(self, those: Collection[object], seconds: float) -> None:
        with self.changed:
            self.changed.wait_for(lambda: not those, seconds)


def origin(host: str, port: int) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


TOO_MANY = "has as many calls in cancellation as it may (MAX_CONCURRENT_CALLS)"

STOPPING = "is being stopped"


def overloaded(why: str) -> APIError:
    message = f"The proxy {why}. Try again in a moment."
    return APIError(503, message, code="overloaded", headers={"retry-after": "1"})


class Exchange:
    """One call on a connection, from its first line to its line in the log."""

    def __init__(
        self,
        server: Server,
        reading: DeadlineReader,
        stream: io.BufferedReader[DeadlineReader],
    ) -> None:
        self.server = server
        self.reading = reading
        self.stream = stream
        self.cancellation = Cancellation()
        self.id = f"req_{secrets.token_hex(16)}"
        self.write_timeout = server.proxy.settings.write_timeout
        self.began = time.monotonic()
        self.request = Request("-", "-", 0, {})
        self.body: Body | None = None
        self.watch: Watch | None = None
        self.notes: Json = {"predictions": [], "usages": []}
        self.status = 0  # once it is sent
        self.keep = False  # the connection, for another call

    def run(self) -> bool:
        """Serve one call; say whether the connection can carry another."""
        if not self.is_asked():
            return False
        try:
            self.serve(parse_head(read_head(self.stream)))
        except ClientDisconnected:
            self.keep = False
            self.notes["error"] = "client_gone"
        except Exception as error:
            with suppress(ClientDisconnected):
                self.send_error(as_api_error(error))
        finally:
            self.log()
            self.server.dismiss(self)
        return self.can_go_on()

    def is_asked(self) -> bool:
        """Wait for a call; from its first byte on, the client has to hurry."""
        timeouts = self.server.timeouts
        stopping = self.server.is_stopping
        self.reading.within(timeouts.drain if stopping else timeouts.idle)
        self.reading.is_idle = True
        with suppress(APIError, ClientDisconnected):
            if self.stream.peek(1):
                self.began = time.monotonic()
                self.reading.within(timeouts.head)
                self.reading.is_idle = False
                return True
        return False

    def serve(self, request: Request) -> None:
        settings = self.server.proxy.settings
        self.request = request
        self.body = Body(request, self.stream, settings.max_body_bytes)
        self.keep = request.keeps_alive
        call = Call(
            method=request.method,
            path=request.path,
            headers=request.headers,
            read=self.read_body,
            cancellation=self.cancellation,
            notes=self.notes,
        )
        reply = answer(self.server.proxy, call)
        if isinstance(reply.body, Generator):
            self.send_frames(reply.body)
        else:
            self.send_object(reply.status, reply.body, reply.headers)

    def read_body(self) -> bytes:
        """Read it from one who may ask, if there is room; from then on, be watchful."""
        assert self.body
        self.body.check()
        self.server.admit(self)
        self.reading.within(self.server.timeouts.body)
        if self.body.is_awaited:
            self.body.is_awaited = False
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self.body.read()
        self.watch = self.server.watcher.watch(self.reading.sock, self.cancellation)
        return body

    def unwatch(self) -> None:
        if self.watch:
            self.server.watcher.forget(self.watch)

    def send_object(
        self, status: int, body: Json | None, headers: Mapping[str, str]
    ) -> None:
        self.keep = self.keep and self.body is not None and self.body.is_passable
        data = b"" if body is None else encode_for_people(body)
        kind = {"content-type": "application/json"} if data else {}
        length = {"content-length": str(len(data))} if status != 204 else {}
        head = self.head(status, {**kind, **length, **headers})
        self.unwatch()
        self.write(head if self.request.method == "HEAD" else head + data)

    def send_error(self, error: APIError) -> None:
        self.notes["error"] = error.code or error.status
        if self.body is None or not self.body.is_passable:
            self.keep = False
        self.send_object(error.status, error.body, error.headers)

    def send_frames(self, frames: Frames) -> None:
        """Send server-sent events as they come, and a failure as the last of them."""
        chunked = self.request.minor > 0
        head = partial(self.head, 200, STREAM_CHUNKED if chunked else STREAM_HEADERS)
        block(self.reading.sock, socket.SO_SNDTIMEO, self.write_timeout)
        writer = EventStreamWriter(self.reading.sock, head, chunked)
        with closing(frames), self.server.watcher.kept_alive(writer):
            failure = writer.tell(frames)
            if failure:
                self.notes["error"] = failure.code or failure.status
            last = frame(failure.body) if failure else b""
            self.unwatch()
            writer.end(last + DONE_FRAME)

    def head(self, status: int, headers: Mapping[str, str]) -> bytes:
        self.status = status
        self.keep = self.keep and not self.server.is_stopping
        told = {
            "date": http_date(int(time.time())),
            **headers,
            "x-request-id": self.id,
            "openai-version": "2020-10-01",
            "openai-processing-ms": str(self.elapsed_ms()),
            "x-replicate-model": self.notes.get("ref", ""),
            "x-replicate-prediction-id": ", ".join(self.notes["predictions"]),
            **CORS,
            "connection": "" if self.keep else "close",
        }
        return reply_head(status, told)

    def write(self, data: bytes) -> None:
        try:
            block(self.reading.sock, socket.SO_SNDTIMEO, self.write_timeout)
            self.reading.sock.sendall(data)
        except OSError as error:
            raise ClientDisconnected from error

    def can_go_on(self) -> bool:
        """Whether the connection stands at the beginning of another call."""
        if self.body and self.keep:
            return self.body.forget()
        if not self.body or not self.body.is_read:
            linger(self.reading, self.server.timeouts.linger)
        return False

    def elapsed_ms(self) -> int:
        return round((time.monotonic() - self.began) * 1000)

    def log(self) -> None:
        """One line per call: nothing of a key, a token or what was said."""
        if not log.isEnabledFor(logging.INFO):
            return
        notes = self.notes
        usage = add(notes["usages"]) if notes["usages"] else None
        first = notes.get("first_text_at")
        row = {
            "method": self.request.method,
            "path": self.request.path,
            "status": self.status or 499,
            "model": notes.get("model"),
            "ref": notes.get("ref"),
            "prediction": ",".join(notes["predictions"]),
            "tokens_in": usage and usage.prompt_tokens,
            "tokens_out": usage and usage.completion_tokens,
            "estimated": "yes" if usage and usage.is_estimate else None,
            "first_token_ms": first and round((first - self.began) * 1000),
            "ms": self.elapsed_ms(),
            "error": notes.get("error"),
            "request_id": self.id,
        }
        pairs = [f"{k}={quoted(v)}" for k, v in row.items() if v not in (None, "")]
        log.info("%s", " ".join(pairs))


class Handler(StreamRequestHandler):
    """A connection: its calls, one after another. It keeps nothing of any."""

    disable_nagle_algorithm = True  # or a kept-alive call takes 44 ms
    server: Server

    def handle(self) -> None:
        self.connection.setblocking(True)  # a Mac's is as the one that listens
        reading = DeadlineReader(self.connection)
        stream = io.BufferedReader(reading)
        self.server.readings.add(reading)
        try:
            while Exchange(self.server, reading, stream).run():
                pass
        finally:
            self.server.readings.discard(reading)


class Server(CountingServer):
    """`serve_forever`, `shutdown`, `server_close`, and `url` once it is made."""

    def __init__(self, settings: Settings, timeouts: Timeouts) -> None:
        settings.check()
        models = ModelsFile(settings.models_path, FAMILIES)
        self.timeouts = timeouts
        self.api = ReplicateAPI(settings, timeouts)
        self.proxy = Proxy(settings, models, Upstream(self.api, timeouts))
        if ":" in settings.host:
            self.address_family = socket.AF_INET6
        self.watcher = Watcher(timeouts)
        self.calls: set[Exchange] = set()  # in cancellation
        self.readings: set[DeadlineReader] = set()  # of all connections
        self.is_stopping = False  # no connection is kept …
        self.is_over = False  # … and no call begun
        self.watcher.start()
        super().__init__((settings.host, settings.port), Handler)

    def server_bind(self) -> None:
        """As http.server does, but ask no DNS for our own name: that can take 30 s."""
        TCPServer.server_bind(self)
        self.server_name = self.proxy.settings.host
        self.server_port = int(self.server_address[1])

    @property
    def url(self) -> str:
        return origin(self.server_name, self.server_port)

    def admit(self, exchange: Exchange) -> None:
        with self.changed:
            if self.is_over:
                raise overloaded(STOPPING)
            if len(self.calls) >= self.proxy.settings.max_concurrent_calls:
                raise overloaded(TOO_MANY)
            self.calls.add(exchange)

    def dismiss(self, exchange: Exchange) -> None:
        exchange.unwatch()
        with self.changed:
            self.calls.discard(exchange)
            self.changed.notify_all()

    def serve_forever(self, poll_interval: float = 0.1) -> None:
        super().serve_forever(poll_interval)

    def server_close(self) -> None:
        """Stop listening, let the calls finish that have come, and break off the rest.

        Whoever holds an idle connection may have a call under way on it, which a
        close would lose: it is closed when none has come for a moment.
        """
        with self.changed:
            if self.is_stopping:
                return
            self.is_stopping = True
        self.let_in()  # or the close would reset them
        super().server_close()
        grace = self.proxy.settings.shutdown_grace
        drain = min(self.timeouts.drain, grace)
        self.await_end_of(self.connections, drain)
        for reading in list(self.readings):
            if reading.is_idle:
                shut(reading.sock)
        self.await_end_of(self.connections, grace - drain)
        self.break_off()
        self.watcher.stop()
        self.api.close()

    def break_off(self) -> None:
        with self.changed:
            self.is_over = True
            last = list(self.calls)
        for exchange in last:
            exchange.cancellation.cancel(overloaded(STOPPING))
        until = time.monotonic() + self.timeouts.farewell
        self.await_end_of(self.calls, self.timeouts.farewell)
        self.proxy.upstream.await_runs(until - time.monotonic())

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.exception("a connection failed")


def make_server(settings: Settings, timeouts: Timeouts | None = None) -> Server:
    """Raise ConfigError for settings that can't be, OSError for an address in use."""
    return Server(settings, timeouts or Timeouts())


# -- Workers -------------------------------------------------------------------
#
# Several servers on one port, for more than one core: each is a process of its
# own. Their parent serves nobody. It holds the port, and puts another in the
# place of one that dies. By a line, which is its stdin, a worker hears its
# settings and says that it listens. The end of the line means stop, and comes
# even if the parent is killed.


BALANCED = sys.platform == "linux"  # elsewhere one of many sockets may get all calls

LOOK = 0.1  # seconds between looks at who has died

# Python keeps the syntax tree of a script in memory, 10 MB, but not of a module.
WORK = (
    f"import sys; sys.path[0] = {str(HERE)!r}; import proxy; "
    "sys.exit(proxy.main(sys.argv[1:]))"
)

SETTLED = 10  # seconds a worker lives if it was not its start that failed

LONGEST_PAUSE = 30.0  # seconds before one that dies at its start is started again


class BoundServer(Server):
    """A server on a socket that is bound already, and maybe others'."""

    def __init__(self, settings: Settings, bound: socket.socket) -> None:
        self.bound = bound
        super().__init__(settings, Timeouts())

    def server_bind(self) -> None:
        self.socket.close()
        self.socket = self.bound
        self.server_address = self.socket.getsockname()
        self.server_name = self.proxy.settings.host
        self.server_port = int(self.server_address[1])


class Worker:
    """A process that serves, and the next in its place when it has died."""

    def __init__(
        self, settings: Settings, open_socket: Callable[[], socket.socket]
    ) -> None:
        self.settings = settings
        self.open_socket = open_socket
        self.pause = 0.0
        self.start()

    def start(self) -> None:
        self.began = time.monotonic()
        with self.open_socket() as sock:
            fd = sock.fileno()
            self.line, end = socket.socketpair()
            with end:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", WORK, "--worker", str(fd)],
                    stdin=end.fileno(),
                    pass_fds=[fd],
                )
        self.due = 0.0  # when the next one starts, if this one has died
        with suppress(OSError):  # as it may have by now
            self.line.sendall(json.dumps(asdict(self.settings)).encode() + b"\n")

    def await_start(self) -> None:
        with suppress(OSError):
            self.line.recv(1)

    def look(self) -> None:
        """Start another if it has died, but not at once again and again."""
        if self.is_running:
            return
        if not self.due:
            self.line.close()
            pid, code = self.process.pid, self.process.returncode
            self.postpone(f"event=worker_died pid={pid} code={code}")
        if time.monotonic() >= self.due:
            try:
                self.start()
            except OSError as error:  # no memory, or too many processes
                self.postpone(f"event=worker_not_started error={quoted(str(error))}")

    def postpone(self, event: str) -> None:
        now = time.monotonic()
        is_quick = now - self.began < SETTLED
        self.pause = min(2 * self.pause or 0.5, LONGEST_PAUSE) if is_quick else 0.0
        self.due = now + self.pause
        log.error("%s pause=%g", event, self.pause)

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None


class Workers:
    """As many servers as the settings say, on one port: `url` tells which."""

    def __init__(self, settings: Settings) -> None:
        settings.check()
        if os.name == "nt":
            raise ConfigError("WORKERS must be 1 on Windows.")
        self.models = ModelsFile(settings.models_path, FAMILIES).current()
        self.settings = settings
        self.signals: list[int] = []
        self.workers: list[Worker] = []
        self.socket = bind(settings.host, settings.port)
        self.port = int(self.socket.getsockname()[1])
        self.url = origin(settings.host, self.port)
        if BALANCED:  # from now on: a port that others share would not have been free
            share(self.socket)
        else:
            self.socket.listen(Server.request_queue_size)

    def open_socket(self) -> socket.socket:
        """What one worker listens on."""
        if BALANCED:
            return bind(self.settings.host, self.port, share)
        return self.socket.dup()

    def start(self) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda number, _: self.signals.append(number))
        for _ in range(self.settings.workers):
            self.workers.append(Worker(self.settings, self.open_socket))
        for worker in self.workers:
            worker.await_start()

    def run(self) -> int:
        """Keep them running until a signal, and wait for their end until another."""
        while not self.signals:
            time.sleep(LOOK)
            for worker in self.workers:
                worker.look()
        for worker in self.workers:
            worker.line.close()
        while any(worker.is_running for worker in self.workers):
            if self.signals[1:]:
                return self.kill()
            time.sleep(LOOK)
        return int(any(worker.process.returncode for worker in self.workers))

    def kill(self) -> int:
        for worker in self.workers:
            worker.process.kill()
            worker.process.wait()
        return 128 + self.signals[1]


def bind(
    host: str, port: int, prepare: Callable[[socket.socket], None] = lambda _: None
) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        prepare(sock)
        sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    return sock


def share(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


# -- Command line --------------------------------------------------------------
#
# The command line: what it says goes to stdout, what is logged to stderr, and
# what keeps it from starting is a sentence there and exit code 2.


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


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
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
    add("--reload", action="store_true", help="start again when a file changes")
    add("--worker", metavar="FD", type=int, help=argparse.SUPPRESS)
    add("--version", action="version", version=f"%(prog)s {__version__}")
    return parser.parse_args(arguments)


def read_settings(
    options: argparse.Namespace,
    environ: Mapping[str, str],
    override: Mapping[str, str],
) -> Settings:
    flags = {"HOST": options.host, "PORT": options.port, "MODELS_PATH": options.models}
    return Settings.from_environ(
        {
            **read_env(options.env_file),
            **{name: value for name, value in environ.items() if value},
            **{name: value for name, value in flags.items() if value is not None},
            **override,
        }
    )


def read_env(path: str | None) -> dict[str, str]:
    """Read the file that was named, or .env beside this one if there is one."""
    file = Path(path) if path else HERE / ".env"
    if not path and not file.exists():
        return {}
    try:
        return parse_env_file(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise ConfigError(f"{file} can't be used: {error}") from None


@contextmanager
def stand_in(demo: bool) -> Iterator[dict[str, str]]:
    """Play Replicate inside this process; give the settings that lead there."""
    if not demo:
        yield {}
        return
    try:
        from fake_replicate import FakeReplicate
    except ModuleNotFoundError:
        raise ConfigError("--demo needs fake_replicate.py beside proxy.py.") from None
    with FakeReplicate(default="demo") as fake:
        yield {
            "REPLICATE_API_TOKEN": fake.token,
            "REPLICATE_BASE_URL": fake.base_url,
            "PROXY_API_KEY": "demo",
        }


@contextmanager
def address_told(settings: Settings) -> Iterator[None]:
    try:
        yield
    except (OSError, OverflowError) as error:
        where = f"{settings.host}:{settings.port}"
        remedy = "Choose another address with --host and --port, or HOST and PORT."
        raise ConfigError(
            f"Nothing can be served on {where}: {error}. {remedy}"
        ) from None


def serve(settings: Settings, key: str) -> int:
    with address_told(settings):
        server = make_server(settings)
    stop_on_signals(server)
    tell_url(server.url, key, server.proxy.models.current())
    return serve_to_the_end(server)


def serve_with_workers(settings: Settings, key: str) -> int:
    with address_told(settings):
        workers = Workers(settings)
    workers.start()
    tell_url(workers.url, key, workers.models)
    return workers.run()


def work(fd: int) -> int:
    """Serve on the socket that the parent has bound, until its line ends."""
    line = socket.fromfd(sys.stdin.fileno(), socket.AF_UNIX, socket.SOCK_STREAM)
    settings = Settings(**json.loads(line.makefile().readline()))
    log_to_stderr(settings.log_level)
    server = BoundServer(settings, socket.socket(fileno=fd))
    stop_on_signals(server)
    line.send(b"!")

    def stop() -> None:
        with suppress(OSError):  # its end may come as an error
            line.recv(1)
        server.shutdown()

    threading.Thread(target=stop, daemon=True).start()
    return serve_to_the_end(server)


def allow_many_sockets() -> None:
    """A call has two of them, and the usual limit is 1024."""
    with suppress(ImportError, ValueError, OSError):  # Windows has none
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def serve_to_the_end(server: Server) -> int:
    allow_many_sockets()
    gc.freeze()  # what stays: to look at all of it would take 50 ms, again and again
    server.serve_forever()
    log.info("stopping calls=%d", len(server.calls))
    server.server_close()
    return 0


def stop_on_signals(server: Server) -> None:
    """The first stops the server gently, another one at once."""

    def stop(number: int, _: Any) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda number, _: os._exit(128 + number))
        threading.Thread(target=server.shutdown, daemon=True).start()

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)


def tell_url(url: str, key: str, models: Models) -> None:
    print(f"Serving {len(models.mappings)} models on {url}/v1. Try this:\n")
    print(f"  {curl_line(url, key, models)}\n", flush=True)


def curl_line(url: str, key: str, models: Models) -> str:
    model = next(iter(models.mappings), models.default_model or "owner/name")
    hello = [{"role": "user", "content": "Hello!"}]
    body = json.dumps({"model": model, "stream": True, "messages": hello})
    return (
        f"curl -N {url}/v1/chat/completions"
        f' -H "Authorization: Bearer {key}"'
        f" -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )


def key_source(options: argparse.Namespace, environ: Mapping[str, str]) -> str:
    """A shell's way to the key, so that what is printed works and does not hold it."""
    if options.demo:
        return "demo"
    if environ.get("PROXY_API_KEY"):
        return "${PROXY_API_KEY%%,*}"
    file = shlex.quote(str(Path(options.env_file or HERE / ".env").resolve()))
    return f"$(. {file}; echo ${{PROXY_API_KEY%%,*}})"


def check_all(settings: Settings) -> int:
    """Say what was found of the settings, the models and the token."""
    settings.check()
    catalogue = ModelsFile(settings.models_path, FAMILIES).current()
    print(f"settings  are right: {settings}")
    print(f"models    {len(catalogue.mappings)} in {settings.models_path}, ", end="")
    print(f"and {catalogue.default_model or 'none'} for any other name")
    with closing(ReplicateAPI(settings, Timeouts())) as api:
        try:
            account = api.account()
        except APIError as error:
            raise ConfigError(str(error)) from None
    print(
        f"token     works: {account.get('type')} {account.get('username')} of Replicate"
    )
    return 0


def reload_on_change(arguments: Sequence[str], watched: Iterable[Path]) -> int:
    """Run the program as a child, and anew whenever a file has changed."""
    command = [sys.executable, str(HERE / "proxy.py"), *arguments]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    while True:
        before = stamps(watched)
        with subprocess.Popen(command) as child:
            try:
                while stamps(watched) == before:
                    time.sleep(0.3)
            except KeyboardInterrupt:  # which the child has heard too
                return child.wait()
            except SystemExit:
                child.terminate()
                return child.wait()
            print("A file has changed: starting again.", file=sys.stderr)
            child.terminate()


def stamps(files: Iterable[Path]) -> list[float]:
    return [file.stat().st_mtime if file.exists() else 0.0 for file in files]


def log_to_stderr(level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(
        logging.Formatter(
            "time=%(asctime)s level=%(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"
        )
    )
    log.addHandler(handler)
    log.setLevel(level.upper())


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    if options.reload:
        models = Path(
            options.models or os.environ.get("MODELS_PATH") or HERE / "models.json"
        )
        watched = [HERE / "proxy.py", Path(options.env_file or HERE / ".env"), models]
        rest = [argument for argument in arguments if argument != "--reload"]
        return reload_on_change(rest, watched)
    try:
        if options.worker is not None:
            return work(options.worker)
        with stand_in(options.demo) as override:
            settings = read_settings(options, os.environ, override)
            if options.check:
                return check_all(settings)
            settings.check()
            log_to_stderr(settings.log_level)
            run = serve if settings.workers == 1 else serve_with_workers
            return run(settings, key_source(options, os.environ))
    except ConfigError as error:
        for problem in error.problems:
            print(f"proxy.py: {problem}", file=sys.stderr)
        return 1 if options.check else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
