"""Compare two versions of proxy.py by what they send, knowing none of their names.

    python bench/compare.py                   a34e558 against proxy.py above this folder
    python bench/compare.py --new PATH        against another
    python bench/compare.py --only calls      rows of tables with this in their name
    python bench/compare.py --list            how many requests each table gives
    python bench/compare.py --mutants         whether faults put into a34e558 are found

Each row of the tables in `test_proxy.py` becomes a request. It is sent to the old
module and to the new one, each in front of its own stand-in for Replicate. What
reached Replicate and the bytes that came back are compared; ids and times are masked.
Of a stream, `frames` are its exact events, and `folded` is what a client makes of
them: the same text may be divided into other events on purpose.

The old module, the stand-in and the tables are taken from git, as of BASE, so that
nothing here changes while they do. A module is used by `Settings` and `make_server`
alone, with its own time limits. What is meant to differ stands in INTENDED.

The exit code is 1 if anything else differs, or if a table has no adapter.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import itertools
import json
import logging
import multiprocessing
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

BASE = "a34e558"
ROOT = Path(__file__).resolve().parent.parent
FILES = ("proxy.py", "test_proxy.py", "fake_replicate.py", "models.json")
THREADS = 4  # of each side …
SLOW_THREADS = 20  # … and more for cases that mostly wait
DEADLINE = 30.0  # seconds for a request
SLOW_DEADLINE = 100.0  # for one that waits for a time limit of the module
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
KEY = "sk-of-the-proxy"  # that of the tables' raw requests, which also use `key`
PROXY_KEYS = f"{KEY},sk-of-another,key"

Json = dict[str, Any]


class Intended(NamedTuple):
    """A difference that is meant: where it is, and why."""

    where: str  # a pattern for the whole of table/row/part
    reason: str
    # what else has to hold of the old and the new value
    holds: Callable[[Any, Any], bool] = lambda old, new: True


# Frames that are divided otherwise, wherever it is: Intended(r".*/frames", "...").
INTENDED: tuple[Intended, ...] = (
    Intended(
        "(a_pattern_.*|a_schema_that_.*|a_schema_is_refused.*|a_value_fits.*)/.*",
        "any schema is accepted, and what is not checked costs no second prediction",
    ),
    Intended(
        "(read_toolbox_refuses|a_format_is_refused)/.*",
        "tools, choices and formats are held to tables, in OpenAI's words",
    ),
    Intended(
        "(broken_json_is_mended|only_the_json_is_told.*)/.*",
        "broken JSON is repaired, or else left as it was",
    ),
    Intended(
        "(what_is_no_json_object.*|hostile_json.*|EXTRA/a form).*",
        "an error in JSON says where and what it is",
    ),
    Intended(
        "(what_is_no_image.*|an_image_is_kept.*)/.*",
        "the first bytes of an image say what it is",
    ),
    Intended(
        "history_becomes_plain/the old functions.*",
        "calls of functions have ids from the door on",
    ),
    Intended(
        "an_output_has_its_text.*/items of the Responses API.*",
        "calls beside the text are written with spaces",
    ),
    Intended(
        "a_prediction_has_its_types.*",
        "the words of an error, which comes before any chunk",
    ),
    Intended(
        "(signs_are_defused.*/parts that make|large_texts.*/tokens).*",
        "text reaches a model as it was written",
    ),
    Intended(
        "a_wrong_config.*/several families/start", "the sentence lists the families"
    ),
    Intended(
        "(text_does_not_wait.*|twice_the_text.*)/.*",
        "a call without a sure sign is held until it is one",
    ),
    Intended(r"(?s).*/frames", "texts that came together are one delta"),
    Intended(
        r"(each_sign_of_each_family_is_defused.*|signs_are_defused.*|history_.*"
        r"|tools_are_given.*)/.*/upstream",
        "text reaches a model as it was written, but for what would end a turn",
        lambda old, new: without_escapes(old) == without_escapes(new),
    ),
    Intended(
        r"(what_does_not_fit|a_row_holds_the_models_own|a_field_is_read).*/(body|headers)",
        "a wrong type of a model's own input is told in OpenAI's words",
        lambda old, new: in_openais_words(old) == in_openais_words(new),
    ),
)


def in_openais_words(value: Any) -> str:
    """What came back, where a model's own input is refused as OpenAI's are."""
    text = str(value).replace("this model takes", "expected")
    return re.sub(r"content-length: \d+", "", text.replace("a number,", "a decimal,"))


def without_escapes(value: Any) -> str:
    """What was sent, without what makes a sign of a chat template harmless."""
    return re.sub(r"\\u200b|\u200b|\\+| ", "", str(value))


class Mutant(NamedTuple):
    """A fault to put into the old module. `old` stands in it exactly once."""

    name: str
    tables: str  # the beginning of the names of those that are to find it
    old: str
    new: str


MUTANTS = (
    Mutant(
        "a bound of a parameter",
        "each_refusal",
        '"presence_penalty": Param(NUMBER, -2, 2)',
        '"presence_penalty": Param(NUMBER, -3, 2)',
    ),
    Mutant(
        "the role of a family's system prompt",
        "each_family",
        'Family(r"openai/o1-mini", lay_out_messages, "user", GPT_LIMIT)',
        'Family(r"openai/o1-mini", lay_out_messages, "system", GPT_LIMIT)',
    ),
    Mutant(
        "a format of tool calls",
        "a_call_is_heard",
        'Dialect("<functioncall>", "</functioncall>", is_sure=True)',
        'Dialect("<functionscall>", "</functionscall>", is_sure=True)',
    ),
    Mutant("a reason to finish", "only_a_true", "told >= limit", "told > limit"),
    Mutant("the usage", "EXTRA", "asked + answered,", "answered,"),
    Mutant(
        "the status of a head that is too large",
        "what_is_not_http",
        '{MAX_HEAD} bytes", 431)',
        '{MAX_HEAD} bytes", 400)',
    ),
    Mutant(
        "a tool's result in a prompt",
        "history_becomes",
        "<tool_response{of}>\\n{text}",
        "<tool_response{of}>{text}",
    ),
    Mutant(
        "when to try again",
        "what_replicate_refuses",
        'headers["retry-after"] = seconds',
        'headers["retry-after"] = "1"',
    ),
    Mutant(
        "what is said of a value that breaks a schema",
        "a_value_fits",
        "must be one of {compact(said)}",
        "has to be one of {compact(said)}",
    ),
    Mutant(
        "what is kept of a stream that breaks",
        "SCENARIOS",
        "return text[len(told) :]",
        "return text",
    ),
)

# -- Cases ---------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A request, and what the stand-in does about it."""

    sent: bytes
    variant: str = ""
    table: str = ""
    why: str = ""
    scenario: Any = None  # of any model whose owner is not `fake`, and of `fake/case`
    schemas: Mapping[str, Any] = field(default_factory=dict)  # OpenAPI, by model
    models: Any = None  # the content of models.json; None: that of the tests
    settings: Mapping[str, Any] = field(default_factory=dict)
    stream: bytes | None = None  # what a raw server says instead of an event stream
    api: bytes | None = None  # what a raw server says instead of Replicate
    upload: Any = None  # a fault of uploads
    leave: bytes | None = None  # hang up after these bytes, b"": once it is created
    reset: bool = False  # hang up with a TCP reset
    slow: bool = False
    concurrent: bool = False  # several predictions or uploads, in any order
    polled: bool = False  # how its text is divided is a matter of moments

    @property
    def name(self) -> str:
        return f"{self.table}/{self.why}{f' [{self.variant}]' * bool(self.variant)}"


Cases = Iterator[Case]
tests: Any = None  # test_proxy and fake_replicate, as of BASE
stand_in: Any = None


def http(method: str, path: str, body: Any = None, **headers: str) -> bytes:
    """A request whose connection is closed after it. `_` stands for - in a header."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    if body is None:
        data = b""
    given = {"host": "x", "connection": "close", "authorization": f"Bearer {KEY}"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    if data or method == "POST":
        given |= {"content-type": "application/json", "content-length": str(len(data))}
    lines = [f"{method} {path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in given.items() if value]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + data


def chat(body: Json, model: str = "fake/case", variant: str = "", **case: Any) -> Case:
    asked = {"model": model, "messages": tests.HI, **body}
    several = (asked.get("n") or 1) != 1
    given = {"concurrent": several, **case}
    return Case(http("POST", CHAT, asked), variant, **given)


def complete(body: Json, model: str = "fake/case", **case: Any) -> Case:
    asked = {"model": model, "prompt": "Hi", **body}
    several = (asked.get("n") or 1) != 1 or isinstance(asked["prompt"], list)
    return Case(http("POST", COMPLETIONS, asked), concurrent=several, **case)


def streamed(body: Json) -> Json:
    return {**body, "stream": True, "stream_options": {"include_usage": True}}


def play(pieces: Any, **columns: Any) -> Any:
    text = pieces if callable(pieces) else tuple(pieces)
    return stand_in.Scenario("", text, **columns)


def says(text: str, body: Json, model: str = "fake/case", **columns: Any) -> Cases:
    """A model says this: whole, and streamed in one piece, in two and in many."""
    half = len(text) // 2
    halves = [text[:half], text[half:]]
    yield chat(body, model, "whole", scenario=play([text], **columns))
    for cut, pieces in {"one": [text], "two": halves, "characters": text}.items():
        played = play(pieces, **columns)
        yield chat(streamed(body), model, f"streamed, {cut}", scenario=played)


def both(body: Json, model: str = "fake/case", **case: Any) -> Cases:
    yield chat(body, model, "whole", **case)
    yield chat(streamed(body), model, "streamed", **case)


def with_schema(
    schema: Any, body: Json, model: str = "some/one", variant: str = ""
) -> Case:
    asked = {**tests.ANY_CHAT, **body}
    return chat(asked, model, variant, schemas={model: schema})


def first_model(family: str) -> str:
    return str(tests.MODELS_OF[family].split()[0])


def tools_for(toolbox: Any) -> Json:
    """The parameters that ask for a toolbox of the old module."""
    if toolbox is None:
        return {}
    functions = [
        {"name": t.name, "description": t.description, "parameters": t.parameters}
        for t in toolbox.tools
    ]
    if toolbox.legacy:
        return {"functions": functions}
    named = {"type": "function", "function": {"name": functions[0]["name"]}}
    choice = named if len(functions) == 1 else "required"
    return {
        "tools": [{"type": "function", "function": one} for one in functions],
        "tool_choice": choice if toolbox.must_call else "auto",
        "parallel_tool_calls": toolbox.parallel,
    }


def format_for(wanted: Any) -> Json:
    """The parameter that asks for a format of the old module."""
    if wanted is None:
        return {}
    if not wanted.name and wanted.schema == {"type": "object"}:
        return {"response_format": {"type": "json_object"}}
    return as_schema(wanted.schema, wanted.strict)


def as_schema(schema: Any, strict: bool = False) -> Json:
    named = {"name": "x", "schema": schema, "strict": strict}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def as_call(name: str, arguments: str) -> str:
    return f'<tool_call>{{"name":"{name}","arguments":{arguments}}}</tool_call>'


def raw_host(wire: bytes) -> Cases:
    """What a connection to Replicate says, instead of a stream and of all else."""
    yield chat(streamed({}), variant="as a stream", stream=wire)
    yield chat({}, variant="as an answer", api=wire)


# -- Adapters ------------------------------------------------------------------
# From a row of a table to the requests that it stands for. A row has the names that
# the test's `parametrize` gives its values, and `why`, its id.

Row = Any
GPT, CLAUDE = "openai/gpt-4o", "anthropic/claude-4-sonnet"
GRANITE, ITEMS = "ibm-granite/granite-4.0-h-small", "openai/gpt-5-structured"
R1 = "deepseek-ai/deepseek-r1"
HISTORY_MODELS = (  # a transcript, three templates, messages, items
    "me/mine",
    "meta/llama-2-70b-chat",
    "meta/meta-llama-3-8b-instruct",
    "ibm-granite/granite-3.0-8b-instruct",
    GPT,
    ITEMS,
)


def tool(body: Json | None = None) -> Json:
    return {"tools": tests.TOOLS, **(body or {})}


def to(row: Row, **body: Any) -> Case:
    """A chat with the first model of the row's family."""
    return chat({**tests.ANY_CHAT, **body}, first_model(row.family))


def part(part: Any, model: str = GPT, **case: Any) -> Case:
    parts = [{"type": "text", "text": "Hm?"}, part]
    return chat({"messages": [{"role": "user", "content": parts}]}, model, **case)


def seeing(urls: Sequence[str], model: str, **case: Any) -> Case:
    return chat({"messages": tests.seeing(*urls)}, model, **case)


def all_models(row: Row, body: Json) -> Cases:
    for model in tests.MODELS_OF[row.family].split():
        yield chat(body, model, model)


def all_families(row: Row) -> Cases:
    for family in tests.MODELS_OF:
        body = {"messages": [tests.says("user", row.said)]}
        yield chat(body, first_model(family), family)


def signs(row: Row) -> Cases:
    labels = [m.format(label) for m in tests.MARKED for label in tests.LABELS_IN_USE]
    lines = {
        "tokens": tests.tokens_of(row.family),
        "labels": [f"Hm\n{label} Yes" for label in labels],
        "line ends": [f"Hm{end}{labels[0]} Yes" for end in tests.LINE_BREAKS],
    }
    for kind, written in lines.items():
        messages = tests.in_all_places("\n".join(written))
        messages[3]["content"].pop(1)  # an image, which most of them do not take
        messages[1]["name"] = written[0][:64]  # the longest that is taken
        yield chat({"messages": messages}, first_model(row.family), variant=kind)


def attachments(properties: Any, required: Sequence[str] = ()) -> Cases:
    """Every kind of them, for a model with these inputs."""
    schema = tests.document({"prompt": tests.STRING, **properties}, required)
    attached = {
        "an image": tests.image_part(tests.A),
        "a sound": tests.sound_part("UklGRg=="),
        "a file": tests.file_part(file_data="data:text/plain;base64,UklGRg=="),
        "a film": tests.FILM,
    }
    for kind, one in attached.items():
        yield part(one, "some/one", variant=kind, schemas={"some/one": schema})


def sound_or_file(row: Row) -> Case:
    names = ("prompt", "audio", "file", "video")
    schema = tests.document({n: tests.IMAGE_OUTPUT for n in names})
    schema["components"]["schemas"]["Input"]["properties"]["prompt"] = tests.STRING
    return part(row.part, "some/one", schemas={"some/one": schema})


def field_of_schema(row: Row) -> Cases:
    schema = tests.document(
        {"prompt": tests.STRING, "tone": row.properties},
        tone={"type": "string", "enum": ["kind", "gruff", None, []]},
        a={"allOf": [{"$ref": "#/components/schemas/boolean"}]},
        boolean={"type": "boolean"},
        b={"$ref": "#/components/schemas/b"},
    )
    for value in ("kind", 7, 0.5, True, ["a"], -1):
        yield with_schema(schema, {"tone": value}, variant=repr(value))


def needed(row: Row) -> Cases:
    (name,) = row.properties
    properties = {"prompt": tests.STRING, **row.properties}
    schema = tests.document(properties, ["prompt", name, "unknown"])
    yield with_schema(schema, {})
    yield with_schema(schema, {"replicate": {name: "x"}})


def output_schema(row: Row) -> Case:
    loop = {"anyOf": [{"$ref": "#/components/schemas/Loop"}, tests.STRING]}
    more = {"Made": tests.IMAGE_OUTPUT, "Loop": loop}
    made = tests.document({"prompt": tests.STRING}, (), row.output, **more)
    return with_schema(made, {})


def asked_schema(row: Row) -> Case:
    parts = [tests.TEXT, *([tests.image_part(tests.A)] if row.attached else [])]
    body = {"messages": [{"role": "user", "content": parts}], **row.given}
    return with_schema(tests.SAID_READ, body, row.ref)


def seeds(row: Row) -> Case:
    seed = {"type": "integer", "maximum": row.high}
    seed |= {} if row.high is None else {"minimum": 0}
    schema = tests.document({"prompt": tests.STRING, "seed": seed})
    return with_schema(schema, {"seed": row.seed, "n": 3})


def system_prompts(row: Row) -> Cases:
    body = {"messages": [tests.SYSTEM, *tests.HI]}
    for name, text in itertools.product([row.name], ("", "OWN")):
        yield chat({**body, name: text}, row.ref, f"{name}={text}")
        models = {"model_configs": {row.ref: {"input": {name: text or "OPERATOR"}}}}
        yield chat(body, row.ref, f"{name}={text} of the operator", models=models)


def with_config(row: Row) -> Case:
    model = "deepseek-ai/deepseek-v3.1"
    models = {"model_configs": {model: row.config}}
    return chat({**tests.ANY_CHAT, **row.given}, model, models=models)


def start(models: Any = None, **settings: Any) -> Case:
    return Case(http("GET", "/v1/models"), models=models, settings=settings)


def counted(row: Row) -> Cases:
    names = ("Input token count", "Output token count", "Reasoning tokens")
    pairs = zip(names, row.counted, strict=False)
    logs = "".join(f"{name}: {count}\n" for name, count in pairs if count is not None)
    yield from both({}, scenario=play(["abcdef", "ghi"], counts=False, logs=logs))


def shaped(row: Row) -> Cases:
    body = {"model": "fake/case", **row.more}
    played = play([event.text for event in row.texts])
    yield from both(body, body["model"], scenario=played)


def of_wanted(row: Row, said: str, body: Json) -> Cases:
    kept = {name: value for name, value in body.items() if name != "stream"}
    asked = {**kept, **tools_for(row.wanted.toolbox), **format_for(row.wanted.format)}
    yield from says(said, asked)


def of_schema(schema: Any, value: Any) -> Cases:
    """A schema as it is and as that of a property, and an answer for each."""
    inside = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    if isinstance(schema, dict) and "$defs" in schema:
        inside["$defs"] = schema["$defs"]
    for way, asked, given in [("", schema, value), ("inside", inside, {"x": value})]:
        played = play([json.dumps(given)])
        yield chat(as_schema(asked), variant=way, scenario=played)
    strict = as_schema(inside, strict=True)
    yield chat(streamed(strict), variant="strict", scenario=played)


def of_pattern(row: Row, text: str) -> Cases:
    yield from of_schema({"type": "string", "pattern": row.pattern}, text)


def long_to_check(row: Row) -> Case:
    played = play([json.dumps(row.value)])
    return chat(as_schema(row.schema), scenario=played, slow=True)


def of_format(asked: Any) -> Cases:
    yield from says('So: {"a": 1}', {"response_format": asked})


def of_native_formats(row: Row) -> Cases:
    for model in (GRANITE, ITEMS, GPT):
        yield chat(format_for(row.format), model, model, scenario=play(['{"a": 1}']))


def of_toolbox(row: Row) -> Cases:
    calls = "".join(itertools.starmap(as_call, getattr(row, "calls", [])))
    body = tools_for(row.toolbox)
    yield from says(calls or "Hello.", body)
    yield chat(body, GRANITE, "natively")


def history(row: Row) -> Cases:
    for model in HISTORY_MODELS:
        body = {"messages": row.messages}
        yield chat(body, model, model)
        yield chat(tool(body), model, f"{model}, tools")


def image_in_result(row: Row) -> Case:
    result = tests.gives("c1", [tests.text_part("a"), tests.SHOT])
    messages = [tests.HI_OF_TOOLS, tests.ASKED_OF_TOOLS, result]
    return chat(tool({"messages": messages}), row.ref)


def misused(row: Row) -> Cases:
    for choice in ("auto", "required"):
        body = tool({"tool_choice": choice})
        for case in says(as_call(row.name, row.arguments or '""'), body):
            yield dataclasses.replace(case, variant=f"{choice}, {case.variant}")


def odd_tool(row: Row) -> Case:
    schema = {"properties": {"a": row.odd}, "required": row.odd, "items": row.odd}
    function = {"type": "function", "function": {"name": "f", "parameters": schema}}
    body = {"tools": [function], "tool_choice": "required"}
    return chat(body, scenario=play([as_call("f", '{"a":{"b":[1]}}')]))


def mended(row: Row) -> Cases:
    for case in says(as_call("get_weather", row.text), tool()):
        yield dataclasses.replace(case, variant=f"call, {case.variant}")
    yield from says(row.text, {"response_format": {"type": "json_object"}})


def calls(row: Row) -> Cases:
    bodies = {
        "": tool(),
        "one, ": tool({"parallel_tool_calls": False}),
        "function, ": {"functions": [tests.WEATHER, tests.TIME]},
    }
    for how, body in bodies.items():
        for case in says(row.said, body):
            yield dataclasses.replace(case, variant=how + case.variant)


def opening_of(dialect: Any) -> str:
    """A call in a format of the old module."""
    holds = {
        "opening": as_call("get_weather", '{"city":"Paris"}')[11:-12],
        "named": '{"city":"Paris"}',
        "python": 'city="Paris")',
        "tagged": "city</arg_key><arg_value>Paris</arg_value>",
    }[dialect.holds]
    opening = dialect.opening.replace("*", "get_weather")
    around = "[TOOL_CALLS]" if dialect.where == tests.proxy.INSIDE else ""
    return str(around + opening + holds + dialect.closing)


def cut_off(row: Row) -> Cases:
    for limit in (None, len(row.said)):
        for case in says(row.said, tool({"max_tokens": limit})):
            yield dataclasses.replace(case, variant=f"{limit}, {case.variant}")


def stream_events(row: Row) -> Cases:
    """Bytes instead of those of a stream; the record agrees with them."""
    texts = [data for event, data in row.expected if event == "output"]
    ways = {"whole": [row.wire], "bytes": [bytes([byte]) for byte in row.wire]}
    for way, pieces in ways.items():
        wire = functools.partial(lambda pieces, frames: iter(pieces), pieces)
        yield chat(streamed({}), variant=way, scenario=play(texts, wire=wire))


def outputs(row: Row) -> Cases:
    told = getattr(row, "told", "")
    form = functools.partial(lambda output, tokens: output, row.output)
    for url in (stand_in.Scenario.stream_url, ""):
        yield from both({}, scenario=play([told], form=form, stream_url=url))


def broken_record(row: Row) -> Cases:
    names = ("status", "error", "logs", "urls", "metrics")
    record = {"id": "p", **dict.fromkeys(names, row.value)}
    fault = stand_in.Fault(stand_in.Reply(201, record))
    yield from both({}, scenario=play(["a"], on_create=fault), slow=True)


def refused_wait(row: Row) -> Case:
    reply = stand_in.Reply(429, row.body, headers=row.headers)
    return chat({}, scenario=play(["a"], on_create=stand_in.Fault(reply)))


def redirected(row: Row) -> Case:
    location = b"location: http://127.0.0.1:9/v1\r\n"
    return chat({}, api=tests.answering(b"{}", row.status, location))


def elsewhere(row: Row) -> Cases:
    """Where it may not go: where it may, it would leave this machine."""
    if not row.expected:
        yield chat(streamed({}), scenario=play("abc", stream_url=row.url))


def sized(row: Row) -> Case:
    urls = [tests.data_url(tests.PNG + b"-" * (size * 3 // 4)) for size in row.sizes]
    return seeing(urls or [tests.A], "google/gemini-2.5-flash")


def hang_ups(row: Row) -> Cases:
    for name, stream, mark in tests.LEAVES:
        case = chat({"stream": stream}, variant=f"{name}, {stream}")
        is_reset = row.leave is tests.reset
        played = stand_in.SCENARIOS[name]
        yield dataclasses.replace(
            case, scenario=played, leave=mark or b"", reset=is_reset, slow=True
        )


def paths(row: Row) -> Case:
    body = {**tests.ASKED, "prompt": "Hi"} if row.method == "POST" else None
    return Case(http(row.method, row.path, body))


def keys(row: Row) -> Case:
    headers = {"authorization": "", **row.headers}
    return Case(http(row.method, row.path, tests.ASKED, **headers))


def too_large(row: Row) -> Case:
    headers = {"authorization": "", **row.headers}
    sent = http("POST", CHAT, b" " * 3_000_000, **headers)
    return Case(sent, settings={"max_body_bytes": 1000})


def blanks(row: Row) -> Case:
    head = b"GET /health HTTP/1.1\r\nConnection: close\r\nA: x"
    return Case(head + b" " * 64_000 + row.end)


def unsafe(row: Row) -> Case:
    return Case(tests.POST + row.headers + b"\r\n" + row.body + tests.SMUGGLED)


def posted(body: bytes) -> Case:
    return Case(http("POST", CHAT, body, content_length=str(len(body))))


# The beginnings of the names of tests, and what their rows become.
ADAPTERS: dict[str, Callable[[Row], Case | Cases]] = {
    # settings and models.json: whether a server is made of them
    "check_says_one": lambda r: start(**{r.name: r.value}),
    "a_server_is_not_made": lambda r: start(**r.given),
    "a_wrong_file_is": lambda r: start(r.models),
    "a_wrong_config": lambda r: start({"model_configs": {"a/b": {r.key: r.value}}}),
    "a_file_that_is_no_json": lambda r: start(r.text),
    "a_name_is_found_by": lambda r: chat({}, r.id, models=tests.LISTED),
    "a_hostile_name": lambda r: chat({}, r.id, models={}),
    "a_name_can_not": lambda r: chat({}, r.name, models={}),
    "models_json_has": with_config,
    # parameters
    "check_refuses_for|what_asks_for_nothing_special_is_accepted_for|completions_ref": (
        lambda r: complete({**getattr(r, "given", {}), **getattr(r, "more", {})}, GPT)
    ),
    "check_refuses$|what_asks_for_nothing_special_is_accepted$": (
        lambda r: both({**tests.ANY_CHAT, **r.given}, GPT)
    ),
    "each_refusal": lambda r: chat({**tests.ANY_CHAT, **tests.REFUSED[r.code][0]}, GPT),
    "one_string_stands": lambda r: chat({"stop": r.given}, GPT),
    # families and messages
    "each_model_is": lambda r: all_models(r, tests.ANY_CHAT),
    "each_family": lambda r: all_models(r, tests.EVERYTHING),
    "a_family_is_found": lambda r: chat(tests.EVERYTHING, r.ref),
    "other_models|what_nobody|a_schema_is_looked": (
        lambda r: chat(tests.ANY_CHAT, r.ref)
    ),
    "messages_are_laid|signs_are": lambda r: to(r, messages=r.messages),
    "each_sign": signs,
    "a_text_without": all_families,
    "large_texts": lambda r: chat(
        {"messages": [tests.says("user", r.text)]}, "me/mine", slow=True
    ),
    "a_message_may_come": lambda r: chat({"messages": [r.message, *tests.HI]}, GPT),
    "a_system_prompt_hides": system_prompts,
    # images, sounds, files
    "what_is_no_image|an_image_is_(kept|read)": lambda r: part(tests.image_part(r.url)),
    "sounds_and|what_is_no_sound": sound_or_file,
    "a_part_has": lambda r: part(r.part),
    "images_go|more_images": lambda r: seeing(r.urls, r.ref),
    "an_image_in_a_result": image_in_result,
    # schemas of models
    "a_schema_alone": lambda r: with_schema(
        tests.short(r.fields), tests.less(tests.EVERYTHING, "min_p")
    ),
    "of_a_schemas": lambda r: with_schema(tests.short(r.fields), {}),
    "a_field_is_read": field_of_schema,
    "the_text_goes": lambda r: with_schema(tests.document(r.properties), {}),
    "a_bare_prompt": lambda r: complete(
        {}, "some/one", schemas={"some/one": tests.document(r.properties)}
    ),
    "attachments_have": lambda r: attachments(r.properties),
    "what_has_an_input": lambda r: attachments(
        {"messages": {"type": "array"}, **r.properties}
    ),
    "an_image_goes": lambda r: attachments(
        tests.short(r.fields)["components"]["schemas"]["Input"]["properties"], r.needed
    ),
    "a_value_is_held": lambda r: with_schema(
        tests.document({"prompt": tests.STRING, "pace": r.schema}), {"pace": r.given}
    ),
    "a_model_is_one": output_schema,
    "a_dummy": lambda r: with_schema(r.garbage, {}),
    "what_openai_has|what_does_not_fit": lambda r: with_schema(
        tests.short(tests.ANY_INPUT), r.given
    ),
    "an_effort": lambda r: with_schema(
        tests.short(tests.GRADES.format(r.choices)), {"reasoning_effort": r.given}
    ),
    "an_input_that": needed,
    "deployments_and": lambda r: chat({"max_tokens": 10, "temperature": 0.5}, r.model),
    "a_schema_is_asked": asked_schema,
    "a_row_keeps": lambda r: with_schema(
        tests.short(r.fields), {"messages": tests.seeing(tests.A), "min_p": 1}, r.ref
    ),
    # inputs
    "a_value_is_brought|a_row_(holds|knows)": lambda r: to(r, **r.given),
    "what_is_for": lambda r: chat({"max_tokens": 5, "replicate": r.replicate}, r.ref),
    "an_order_knows": lambda r: both(r.given, r.ref, scenario=play("abcdefgh" * 20)),
    "a_prompt_is_sent": lambda r: complete({"prompt": "Once upon"}, r.ref),
    "no_two": seeds,
    # text
    "overhang": lambda r: says(r.text, {"stop": r.stops}),
    "an_answer_is_cut_after": lambda r: both(
        {"max_tokens": 2}, CLAUDE, scenario=play(r.texts)
    ),
    "usage_is_comp": counted,
    "thoughts": lambda r: says(r.said, {}, R1 if r.thinks else "fake/case"),
    "models_that_think": lambda r: says("Hm.</think>Hi", {}, r.ref),
    "an_answer_is_cut$": shaped,
    "stop_strings": lambda r: of_wanted(r, r.said, {"stop": [r.stop]}),
    "no_text": lambda r: of_wanted(r, r.text, r.body),
    "a_stop": lambda r: chat({"stop": ["on on"], "stream": r.stream}, "fake/endless"),
    "only_a_true": lambda r: both(
        {"max_tokens": r.limit},
        scenario=play("a" * (r.told or 7), counts=r.told is not None),
    ),
    # JSON answers
    "a_format_is": lambda r: of_format(r.given or None),
    "a_schema_is_refused": lambda r: of_format(
        {"type": "json_schema", "json_schema": {**tests.NAMED, **r.given}}
    ),
    "only_the_json": lambda r: says(r.text, format_for(r.format)),
    "what_may": lambda r: says(r.piece * 20, format_for(tests.OBJECT)),
    "a_limit": lambda r: says(
        r.text, {**format_for(tests.OBJECT), "max_tokens": len(r.text)}
    ),
    "an_answer_is_parsed": lambda r: says(r.text, as_schema(tests.PERSON)),
    "an_answer_that_python": lambda r: says(r.text, format_for(tests.OBJECT)),
    "models_that_know": of_native_formats,
    "json_is": lambda r: both(
        {"response_format": tests.ASKED_FORMAT}, r.ref, scenario=play(['{"a": 1}'])
    ),
    "a_value_fits": lambda r: of_schema(r.schema, r.value),
    "a_schema_that_is": long_to_check,
    "a_schema_that_can": lambda r: of_schema(r.schema, {"a": 1}),
    "a_pattern_is": lambda r: of_pattern(r, r.text),
    "a_pattern_that": lambda r: of_pattern(r, "a" * 500),
    # tools
    "a_toolbox|read_toolbox": lambda r: both(r.body, scenario=play([tests.IN_PARIS])),
    "instructions|an_answer_is_complained|of_tools": of_toolbox,
    "history_becomes": history,
    "history_is": lambda r: chat({"messages": r.messages}, GPT),
    "misuse_says": misused,
    "misuse_bears": odd_tool,
    "broken_json": mended,
    "calls_are_heard": calls,
    "what_is_no_call|text_does_not_wait": lambda r: says(r.said, tool()),
    "a_call_is_heard": lambda r: says(opening_of(r.dialect), tool()),
    "text_that_is": lambda r: both(tool(), scenario=play(r.pieces)),
    "a_call_that_is_cut": cut_off,
    "twice": lambda r: says((r.piece * 600)[:600], tool()),
    "a_call_that_lacks": lambda r: says(r.said, tool({"tool_choice": "required"})),
    "what_was_told": lambda r: of_wanted(r, r.said, {}),
    "tools_are_given": lambda r: both(
        {"messages": tests.CALLED, "tools": tests.TOOLS[:1]},
        r.ref,
        scenario=play([tests.IN_PARIS]),
    ),
    # Replicate
    "chunks|what_is_not_chunked": lambda r: raw_host(tests.stream_of(end=r.wire)),
    "an_answer_is_read|a_connection_with": lambda r: raw_host(b"HTTP/1.1 " + r.wire),
    "what_is_no_answer": lambda r: raw_host(r.wire),
    "what_is_no_stream": lambda r: raw_host(r.says),
    "a_stream_that_ends": lambda r: raw_host(
        tests.stream_of(b"data: a\n\n", end=b"ff\r\nda")
    ),
    "a_stream_is_dec": stream_events,
    "what_replicate": lambda r: both({}, f"fake/{r.scenario}"),
    "the_token_follows": redirected,
    "a_wait": refused_wait,
    "every_create": lambda r: chat({"stream": r.stream}, r.model),
    "the_token_goes": elsewhere,
    "the_rest|an_output": outputs,
    "a_prediction_has": broken_record,
    "the_largest": sized,
    "what_is_large|an_input_too_large": lambda r: chat(
        {"replicate": r.input}, "me/mine", slow=True, concurrent=True
    ),
    "an_upload": lambda r: seeing(
        [tests.large("a")], CLAUDE, upload=stand_in.Fault(r.reply)
    ),
    "a_client_that_hangs": hang_ups,
    # HTTP
    "a_path": paths,
    "a_key": keys,
    "a_call_makes": lambda r: complete({"prompt": ["Hi"] * r.prompts, "n": r.n}, GPT),
    "upstream_is": lambda r: chat({"stream": r.stream}),
    "what_is_not_http|what_is_http": lambda r: Case(r.raw),
    "one_who": too_large,
    "a_request_that": unsafe,
    "a_header": blanks,
    "what_is_no_json|hostile": lambda r: posted(r.body),
    "a_call_is_a_line": lambda r: chat(r.more, "fake/echo"),
}
# Tests whose rows are not sent, and why.
NOT_SENT = {
    "an_error_has|an_event_is_told|the_frame_of|texts_that_leave|usage_is_in_a_last"
    "|a_call_is_told_in_deltas|events_that_are_left|an_answer_that_is_cut_short"
    "|a_failure_passes_through": "objects inside; every stream here is made of them",
    "an_env_file|check_says_whether|settings_come_from|what_keeps_it_from|a_signal_lets"
    "|workers_share|a_worker_that_dies|a_server_tells_its_url": "the command line",
    "the_readme|every_documented": "about documents",
    "where_an_answer_is_cut|one_at_a_time_is": "the rows of `calls_are_heard`",
    "an_answer_ends_where|where_calls_are_told|a_sign_cut_off": "in EXTRA",
    "an_answer_is_what|a_failure_before|a_failure_after": "in SCENARIOS",
    "what_anybody_writes": "random; `each_sign_of_each_family` has the same signs",
    "a_failure_is_tried|a_stream_opened_late|only_texts_that_came|events_closed_early"
    "|the_error_of_a_choice|a_hang_up|a_create_without": "the order of moments",
    "a_schema_as_deep": "deeper than JSON can be sent",
    "a_deployment_is_asked": "`deployments_and_versions` has it",
    "no_line_of_a_request": "paths that no request leads to",
    "streams_go_through_the_proxy": "the environment of a process",
    "openai_tries_again|langchain|instructor|pydantic_ai": "client libraries; their"
    " requests are those of LLAMAS",
    "who_hangs_up_on_nginx": "nginx",
    "what_does_not_come_in_time": "limits of 20 s and 120 s",
}

# Scenarios that end only by a time limit of minutes, or not in the same way twice.
NOT_PLAYED = {"very-cold", "stuck", "unknown-status", "endless", "cancel-500"}
NOT_PLAYED |= {"cancel-slow", "stamped", "stamped-at-once"}
WAIT_LONG = {"hang", "hang-before", "silent-stream", "get-404"}


def scenarios() -> Cases:
    """All that the stand-in can play, whole and streamed."""
    for name in stand_in.SCENARIOS.keys() - NOT_PLAYED:
        breaks = stand_in.SCENARIOS[name].spoils < stand_in.ALWAYS
        for case in both({}, f"fake/{name}", slow=name in WAIT_LONG, polled=breaks):
            yield dataclasses.replace(case, why=name)


def clients() -> Cases:
    """A model that does what is asked of it, in each of three ways."""
    tools = {"tools": tests.TOOLS[:1]}
    result = [tests.ASKED_OF_TOOLS, tests.gives("c1", "It is sunny.")]
    bodies = {
        "a tool": tools,
        "a function": {"functions": [tests.WEATHER]},
        "no tool now": {**tools, "tool_choice": "none"},
        "a result": {**tools, "messages": [*tests.HI, *result]},
        "JSON": {"response_format": {"type": "json_object"}},
        "a schema": as_schema(tests.PERSON, strict=True),
        "both": {**tools, **as_schema(tests.PERSON)},
    }
    for (name, call), (asked, body) in itertools.product(
        tests.LLAMAS.items(), bodies.items()
    ):
        scenario = play(functools.partial(tests.play_llama, call))
        for case in both(body, scenario=scenario):
            yield dataclasses.replace(case, why=f"{name}, {asked}")


def endpoints() -> Cases:
    """Requests that no table has."""
    texts = {"stream": True, "stream_options": {"include_usage": True}}
    asked = {"model": "fake/case", "messages": tests.HI}
    preflight = {
        "origin": "https://x.example",
        "access_control_request_method": "POST",
        "access_control_request_headers": "authorization, x-stainless-os",
    }
    by_name = {
        "health": Case(http("GET", "/health", authorization="")),
        "a head of health": Case(http("HEAD", "/health")),
        "a preflight": Case(http("OPTIONS", CHAT, authorization="", **preflight)),
        "models without a key": Case(http("GET", "/v1/models", authorization="")),
        "models as the file has them": Case(http("GET", "/v1/models")),
        "a model": Case(http("GET", "/v1/models/fake/hello")),
        "no such model": Case(http("GET", "/v1/models/nothing")),
        "another method": Case(http("PATCH", CHAT, asked)),
        "an id of the client's": Case(http("POST", CHAT, asked, x_request_id="me")),
        "a form": Case(http("POST", CHAT, b"a=b", content_type="text/plain")),
        "the default model": chat({"model": "gpt-4"}),
        "no model": chat({"model": None}),
        "an unknown model": chat({}, "nothing", models={}),
        "a stream without counts": chat({"stream": True}),
        "three choices": chat({"n": 3}),
        "three choices, streamed": chat({"n": 3, **texts}),
        "three choices of a seed": chat({"n": 3, "seed": 5}, GPT),
        "metadata": chat({"metadata": {"a": "b"}, "store": False, "user": "me"}),
        "a text": complete({}),
        "a text, streamed": complete(texts),
        "texts": complete({"prompt": ["Hi", "Ho"], "n": 2}),
        "texts, streamed": complete({"prompt": ["Hi", "Ho"], "n": 2, **texts}),
        "an echo": complete({"echo": True}),
        "an echo, streamed": complete({"echo": True, **texts}),
        "a text with a stop": complete({"stop": ["can"], **texts}),
    }
    for why, case in by_name.items():
        yield dataclasses.replace(case, why=why)
    texts_of_tools = {
        "a made-up result": tests.IN_TAGS + "\n<tool_response>\n5\n</tool_response>\n5",
        "an unknown tool": as_call("f", '{"x": 1}'),
        "a sign cut off": "Well. <tool_call>",
    }
    for why, said in texts_of_tools.items():
        for case in says(said, {"tools": tests.TOOLS}):
            yield dataclasses.replace(case, why=why)


def rows_of(test: Any) -> Iterator[Row]:
    """What a test is run with: the product of its `parametrize` marks."""
    marks = [mark for mark in test.pytestmark if mark.name == "parametrize"]
    for values in itertools.product(*(mark.args[1] for mark in marks)):
        row: Json = {}
        whys = []
        for mark, value in zip(marks, values, strict=True):
            names = mark.args[0]
            names = re.split(", *", names) if isinstance(names, str) else names
            given = getattr(value, "values", value) if is_set(value) else value
            given = (given,) if len(names) == 1 and not is_set(value) else given
            row |= zip(names, given, strict=True)
            first = row.get("why", given[0])
            first = getattr(first, "__name__", first)
            whys.append(str(getattr(value, "id", None) or first))
        yield SimpleNamespace(**{**row, "why": ", ".join(whys)[:80]})


def is_set(value: Any) -> bool:
    return type(value).__name__ == "ParameterSet"


def load_corpus(folder: Path) -> None:
    """Take the old files out of git, and import the tables."""
    global tests, stand_in
    for name in FILES:
        command = ["git", "show", f"{BASE}:{name}"]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        (folder / name).write_bytes(done.stdout)
    sys.path.insert(0, str(folder))
    tests = importlib.import_module("test_proxy")
    stand_in = importlib.import_module("fake_replicate")
    check, read = stand_in.check_input, stand_in.input_schemas

    def check_what_can_be(input: Json, model: Any) -> None:
        """Odd schemas are more than the stand-in can check."""
        with contextlib.suppress(KeyError, TypeError, AttributeError, IndexError):
            check(input, read(model))

    stand_in.check_input, stand_in.input_schemas = (
        check_what_can_be,
        lambda model: model,
    )


def corpus() -> tuple[list[Case], list[str]]:
    """All cases, and the tests with rows that have neither adapter nor reason."""
    cases = [dataclasses.replace(case, table="SCENARIOS") for case in scenarios()]
    cases += [dataclasses.replace(case, table="LLAMAS") for case in clients()]
    cases += [dataclasses.replace(case, table="EXTRA") for case in endpoints()]
    unknown = []
    for name, test in vars(tests).items():
        marks = getattr(test, "pytestmark", ())
        if not any(mark.name == "parametrize" for mark in marks):
            continue
        name = name.removeprefix("test_")
        if (made := adapted(name, test)) is None:
            unknown.append(name)
        cases += made or []
    return cases, unknown


def adapted(name: str, test: Any) -> list[Case] | None:
    """Rows that differ only in what their requests have not are sent once."""
    adapters = [make for names, make in ADAPTERS.items() if re.match(names, name)]
    reasons = [why for names, why in NOT_SENT.items() if re.match(names, name)]
    if len(adapters) + len(reasons) != 1:
        return None
    made: dict[str, Case] = {}
    for row in rows_of(test) if adapters else ():
        with contextlib.suppress(RecursionError):  # deeper than we can write JSON
            cases = adapters[0](row)
            for case in [cases] if isinstance(cases, Case) else cases:
                named = dataclasses.replace(case, table=name, why=row.why)
                made.setdefault(repr(case), named)
    return list(made.values())


# -- Outcomes ------------------------------------------------------------------
# What can be seen of a case, by part, with all masked that is new each time.

Outcome = dict[str, Any]
MASKS = [
    (re.compile(pattern), mask)
    for pattern, mask in (
        (rb"(?i)(?<=date: )\w{3}, \d\d \w{3} \d{4} [\d:]{8} GMT", b"DATE"),
        (rb"(?i)(?<=openai-processing-ms: )\d+", b"MS"),
        (rb'(?<="created":)( ?)\d{9,}', rb"\g<1>0"),
        (rb"(?<=127\.0\.0\.1:)\d+", b"PORT"),
        (rb"req_[0-9a-f]{32}", b"req_ID"),
    )
]
NEW_ID = re.compile(rb"\b(chatcmpl|cmpl|call|fc|msg|resp)([-_])[A-Za-z0-9]{16,}")
KEPT_HEADERS = ("authorization", "prefer", "cancel-after", "content-type")
STREAM_HEADERS = ("accept", "last-event-id")


def masked(data: bytes, account: Any) -> bytes:
    """Ids are numbered as they come, so that one said twice is seen to be one."""
    for pattern, mask in MASKS:
        data = pattern.sub(mask, data)
    for id in (*account.predictions, *account.streams, *account.files):
        data = data.replace(id.encode(), b"ID")
    numbers: dict[bytes, bytes] = {}

    def number(match: re.Match[bytes]) -> bytes:
        count = str(len(numbers)).encode()
        return numbers.setdefault(match[0], b"".join((match[1], match[2], count)))

    return NEW_ID.sub(number, data)


def short(body: bytes) -> str:
    """A body that is long is kept by its digest."""
    if len(body) <= 100_000:
        return body.decode(errors="backslashreplace")
    return f"{len(body)} bytes, {hashlib.sha256(body).hexdigest()}, {body[:200]!r}"


def seen_of(account: Any, case: Case) -> list[Any]:
    """The requests that reached the stand-in. How often it was looked is of time."""
    told: list[Any] = []
    for seen in list(account.seen):
        names = KEPT_HEADERS + STREAM_HEADERS * ("/streams/" in seen.path)
        headers = {name: seen.headers[name] for name in names if name in seen.headers}
        body = seen.body
        if boundary := re.search(r"boundary=(\S+)", headers.get("content-type", "")):
            headers["content-type"] = "multipart/form-data"
            body = seen.body.replace(boundary[1].encode(), b"BOUNDARY")
        if not isinstance(body, bytes):
            body = json.dumps(body, sort_keys=True, ensure_ascii=False).encode()
        path = masked(seen.path.encode(), account).decode()
        request = (seen.method, path, headers, short(masked(body, account)))
        is_look = seen.method == "GET" and "/predictions/" in seen.path
        if not (is_look and request in told):
            told.append(request)
    return sorted(told, key=repr) if case.concurrent else told


def outcome_of(raw: bytes, case: Case, account: Any) -> Outcome:
    """A response by its parts; what is not one is compared as it is."""
    head, separator, body = raw.partition(b"\r\n\r\n")
    status, *lines = head.split(b"\r\n")
    if not separator or raw.count(b"HTTP/1.1 ") != 1:
        return {"bytes": masked(raw, account)}
    headers = sorted(masked(line, account) for line in lines)
    if case.concurrent:  # how many are known when the head is sent is of time
        headers = [re.sub(rb"(ID)(, ID)+$", rb"\1", line) for line in headers]
    outcome: Outcome = {"status": status, "headers": headers}
    if b"transfer-encoding: chunked" in head.lower():
        body = unchunked(body)
    if b"text/event-stream" not in head:
        return {**outcome, "body": masked(body, account)}
    frames = [one for one in body.split(b"\n\n") if not one.startswith(b":")]
    if case.concurrent:
        frames.sort(key=choice_of)
    frames = masked(b"\n\n".join(frames), account).split(b"\n\n")
    exact = {} if case.polled else {"frames": frames}
    return {**outcome, "folded": folded(frames), **exact}


def unchunked(data: bytes) -> bytes:
    """Whatever the chunks are; what follows the last full one is kept."""
    body = b""
    while match := re.match(rb"([0-9a-fA-F]+)\r\n", data):
        size = int(match[1], 16)
        if not size or len(data) < match.end() + size + 2:
            break
        body += data[match.end() : match.end() + size]
        data = data[match.end() + size + 2 :]
    return body if data == b"0\r\n\r\n" else body + b" ... " + data


def choice_of(frame: bytes) -> int:
    match = re.search(rb'"choices":\[\{"index":(\d+)|"index":(\d+)', frame)
    return int(match[1] or match[2]) if match else 10**6


def folded(frames: Sequence[bytes]) -> Json:
    """What a client makes of a stream: strings that follow one another are one."""
    whole: Json = {}
    for frame in frames:
        try:
            event = json.loads(frame.removeprefix(b"data: "))
        except ValueError:
            event = {"other": [frame.decode("latin-1")]}
        for choice in event.pop("choices", []):
            index = f"choice {choice.pop('index')}"
            fold(whole.setdefault(index, {}), choice)
        for name, value in event.items():
            told = whole.setdefault(name, [])
            if value not in told:
                told.append(value)
    return whole


def fold(whole: Json, delta: Json) -> None:
    """Add a delta: strings and objects grow, lists go by `index`, the last one wins."""
    for name, value in delta.items():
        if isinstance(value, dict):
            fold(whole.setdefault(name, {}), value)
        elif isinstance(value, list) and all(isinstance(one, dict) for one in value):
            for one in value:
                fold(whole.setdefault(f"{name} {one.get('index')}", {}), one)
        elif isinstance(value, str) and isinstance(whole.get(name), str):
            whole[name] += value
        elif value is not None or name not in whole:
            whole[name] = value


# -- Sides ---------------------------------------------------------------------
# Each module runs in a process of its own. A case has a server of its own, so that
# nothing that is remembered of one is seen in another.


def load_module(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is no module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


class RawHost:
    """Says the same bytes to every request, and hangs up."""

    def __init__(self, wire: bytes) -> None:
        self.wire = wire
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                threading.Thread(target=self.answer, args=[sock], daemon=True).start()

    def answer(self, sock: socket.socket) -> None:
        """In one segment with the end: whether more is sent before it is of time."""
        with sock, contextlib.suppress(OSError):
            sock.settimeout(5)
            sock.recv(65536)
            sock.sendall(self.wire, getattr(socket, "MSG_MORE", 0))
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(65536):
                pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


ENDPOINTS_LOCK = threading.Lock()


def start_stand_in() -> Any:
    """Its streams come from the API's own origin: the token goes nowhere else now."""
    with ENDPOINTS_LOCK:
        if stand_in.STREAM_ENDPOINTS[0] not in stand_in.ENDPOINTS:
            stand_in.ENDPOINTS += stand_in.STREAM_ENDPOINTS
    account = stand_in.FakeReplicate(token=tests.TOKEN).start()
    account.stream_origin = account.base_url.removesuffix("/v1")
    return account


class Side:
    """One module, and the cases it has yet to run."""

    def __init__(self, module: Any, cases: Sequence[Case], folder: Path) -> None:
        self.module = module
        self.cases = cases
        self.folder = folder
        self.outcomes: list[Outcome] = [{} for _ in cases]
        self.slow: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.quick: queue.SimpleQueue[int] = queue.SimpleQueue()
        for at, case in enumerate(cases):
            (self.slow if case.slow else self.quick).put(at)

    def run(self) -> list[Outcome]:
        """Slow cases have threads of their own: most of them wait."""
        of_each = [self.slow] * SLOW_THREADS + [self.quick] * THREADS
        threads = [threading.Thread(target=self.work, args=[q]) for q in of_each]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.outcomes

    def work(self, waiting: queue.SimpleQueue[int]) -> None:
        """Run cases until none is left, with one stand-in that forgets."""
        account = start_stand_in()
        with contextlib.suppress(queue.Empty):
            while True:
                at = waiting.get_nowait()
                forget(account)
                outcome = self.outcomes[at] = self.run_case(self.cases[at], account)
                if "hang" in outcome:  # something may still be going on
                    account.stop()
                    account = start_stand_in()
        account.stop()

    def run_case(self, case: Case, account: Any) -> Outcome:
        account.models |= {
            ref: made_model(ref, schema) for ref, schema in case.schemas.items()
        }
        if case.upload:
            account.on_upload = case.upload
        if case.scenario:
            account.scenarios["case"] = case.scenario
            account.default = "case"
        with contextlib.ExitStack() as stack:
            base_url = account.base_url
            if case.api is not None:
                host = stack.enter_context(contextlib.closing(RawHost(case.api)))
                base_url = host.url
            if case.stream is not None:
                host = stack.enter_context(contextlib.closing(RawHost(case.stream)))
                account.scenarios["case"] = dataclasses.replace(
                    account.scenarios["case"], stream_url=f"{host.url}/streams/x"
                )
            return self.serve(case, account, base_url)

    def serve(self, case: Case, account: Any, base_url: str) -> Outcome:
        given = {
            "replicate_api_token": tests.TOKEN,
            "proxy_api_key": PROXY_KEYS,
            "port": 0,
            "models_path": str(self.write_models(case.models)),
            "replicate_base_url": base_url,
            "shutdown_grace": 3,
            **case.settings,
        }
        try:
            server = self.module.make_server(self.module.Settings(**given))
        except Exception as error:
            return {
                "start": f"{type(error).__name__}: {error}".replace(
                    str(self.folder), ""
                )
            }
        serving = threading.Thread(
            target=server.serve_forever, args=[0.01], daemon=True
        )
        serving.start()
        try:
            outcome = ask(server.server_port, case, account)
        finally:
            server.shutdown()
            closing = threading.Thread(target=server.server_close, daemon=True)
            closing.start()
            closing.join(20)
        if closing.is_alive():
            outcome["hang"] = "the server does not close"
        return {**outcome, "upstream": seen_of(account, case)}

    def write_models(self, models: Any) -> Path:
        text = models if isinstance(models, str) else json.dumps(models)
        if models is None:
            text = json.dumps(tests.MODELS)
        path = self.folder / f"models-{hashlib.sha256(text.encode()).hexdigest()}.json"
        if not path.exists():
            path.with_suffix(f".{threading.get_ident()}").write_text(text)
            path.with_suffix(f".{threading.get_ident()}").replace(path)
        return path


def forget(account: Any) -> None:
    for kept in ("seen", "cancels", "faults", "predictions", "streams", "files"):
        getattr(account, kept).clear()
    account.scenarios = {**stand_in.SCENARIOS, "case": stand_in.SCENARIOS["hello"]}
    account.models = dict(stand_in.MODELS)
    account.on_upload = stand_in.NO_FAULT
    account.default = "hello"


def made_model(ref: str, schema: Any) -> Json:
    model: Json = stand_in.make_model(ref, "prompt str")
    model["latest_version"]["openapi_schema"] = schema
    return model


def ask(port: int, case: Case, account: Any) -> Outcome:
    """Send a case, and read what comes until the server hangs up, or as we do."""
    end = time.monotonic() + (SLOW_DEADLINE if case.slow else DEADLINE)
    received = b""
    with socket.create_connection(("127.0.0.1", port), 5) as sock:
        try:
            with contextlib.suppress(ConnectionError):
                sock.sendall(case.sent)
            if case.leave is not None:
                return leave(sock, case, account)
            while (left := end - time.monotonic()) > 0:
                sock.settimeout(left)
                piece = sock.recv(1 << 20)
                if not piece:
                    return outcome_of(received, case, account)
                received += piece
        except ConnectionResetError:
            return {**outcome_of(received, case, account), "reset": True}
        except TimeoutError:
            pass
    return {"hang": f"nothing more after {masked(received, account)[-200:]!r}"}


def leave(sock: socket.socket, case: Case, account: Any) -> Outcome:
    """Hang up once a prediction is there and these bytes have come."""
    received = b""
    sock.settimeout(DEADLINE)
    account.wait_for(lambda: account.predictions, DEADLINE)
    while case.leave and case.leave not in received:
        received += sock.recv(65536)
    if case.reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()
    with contextlib.suppress(AssertionError):
        account.wait_for(lambda: account.cancels, DEADLINE)
    return {"cancels": len(account.cancels)}


class Run:
    """A side in a process of its own, which inherits the cases."""

    def __init__(self, path: Path, cases: Sequence[Case]) -> None:
        fork = multiprocessing.get_context("fork")
        self.receiver, sender = fork.Pipe(duplex=False)
        self.process = fork.Process(target=run_side, args=(path, cases, sender))
        self.process.start()
        sender.close()

    def result(self) -> list[Outcome]:
        outcomes: list[Outcome] = self.receiver.recv()
        self.process.join()
        return outcomes


def run_side(path: Path, cases: Sequence[Case], sender: Connection) -> None:
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SSL_CERT_FILE"] = one_certificate(Path(folder))
        module = load_module(path, f"compared_{os.getpid()}")
        sender.send(Side(module, cases, Path(folder)).run())
    sender.close()
    os._exit(0)  # whatever threads are left


def one_certificate(folder: Path) -> str:
    """A server of one certificate is made in 2 ms, of all of them in 40."""
    text = Path(tests.certifi.where()).read_text(encoding="utf-8")
    match = re.search("-----BEGIN.*?-----END CERTIFICATE-----\n", text, re.S)
    (folder / "one.pem").write_text(match[0] if match else "")
    return str(folder / "one.pem")


# -- Reports -------------------------------------------------------------------


class Difference(NamedTuple):
    case: Case
    part: str
    old: Any
    new: Any

    @property
    def where(self) -> str:
        return f"{self.case.name}/{self.part}"

    @property
    def reason(self) -> str:
        """Why it is meant; "": it is not."""
        for row in INTENDED:
            if re.fullmatch(row.where, self.where) and row.holds(self.old, self.new):
                return row.reason
        return ""


def differences(case: Case, old: Outcome, new: Outcome) -> Iterator[Difference]:
    """By part. Exact frames count only where the folded stream is the same."""
    for part in dict.fromkeys([*old, *new]):
        is_hang = part == "hang"
        if part == "frames" and old.get("folded") != new.get("folded"):
            continue
        if is_hang or old.get(part) != new.get(part):
            yield Difference(case, part, old.get(part), new.get(part))


def excerpt(value: Any, other: Any) -> str:
    """A value from a little before the first place where it is another."""
    text, compared = (v if isinstance(v, str) else repr(v) for v in (value, other))
    start = len(os.path.commonprefix([text, compared]))
    return ("..." if start > 40 else "") + text[max(0, start - 40) : start + 160]


def report(cases: Sequence[Case], old: list[Outcome], new: list[Outcome]) -> int:
    """Print what differs, then the tables. How many cases differ unintendedly."""
    counts: dict[str, Counter[str]] = {}
    parts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for case, *outcomes in zip(cases, old, new, strict=True):
        found = list(differences(case, *outcomes))
        unmeant = [one for one in found if not one.reason]
        reasons.update({one.reason for one in found} - {""})
        verdict = "differs" if unmeant else "as intended" if found else "same"
        counts.setdefault(case.table, Counter())[verdict] += 1
        for one in unmeant:
            parts[one.part] += 1
            print(one.where)
            print(f"    old {excerpt(one.old, one.new)}")
            print(f"    new {excerpt(one.new, one.old)}")
    width = max(map(len, counts), default=0)
    print(f"{'':{width}}    same  as intended  differs")
    total: Counter[str] = sum(counts.values(), Counter())
    for table, row in [*counts.items(), ("all", total)]:
        columns = f"{row['same']:8}{row['as intended']:13}{row['differs']:9}"
        print(f"{table:{width}}{columns}")
    for reason, count in reasons.items():
        print(f"{count:6} as intended: {reason}")
    for part, count in parts.items():
        print(f"{count:6} differ in: {part}")
    return total["differs"]


def run_mutants(folder: Path, cases: Sequence[Case]) -> int:
    """Run each mutant against what the old module does. How many are not found."""
    source = (folder / "proxy.py").read_text(encoding="utf-8")
    missed = 0
    for mutant in MUTANTS:
        some = [case for case in cases if case.table.startswith(mutant.tables)]
        if not some:  # they are not among those of --only
            continue
        if source.count(mutant.old) != 1:
            raise SystemExit(f"not once in {BASE}: {mutant.old}")
        path = folder / "mutant.py"
        path.write_text(source.replace(mutant.old, mutant.new), encoding="utf-8")
        sides = [Run(module, some) for module in (folder / "proxy.py", path)]
        outcomes = [side.result() for side in sides]
        rows = zip(some, *outcomes, strict=True)
        found = [one for row in rows for one in differences(*row)]
        missed += not found
        print(f"{'found' if found else 'NOT FOUND':10}", end="")
        print(
            f"{mutant.name}: {len(found)} differences in {len(some)} cases", flush=True
        )
    return missed


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--new", type=Path, default=ROOT / "proxy.py", metavar="PATH")
    parser.add_argument("--only", metavar="TABLE", default="", help="part of a name")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--mutants", action="store_true")
    return parser.parse_args()


def main() -> int:
    arguments = read_arguments()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        load_corpus(folder)
        cases, unknown = corpus()
        cases = [case for case in cases if arguments.only in case.table]
        for table in unknown:
            print(f"not exactly one adapter, or reason for none: {table}")
        if arguments.list:
            for table, count in Counter(case.table for case in cases).items():
                print(f"{count:6} {table}")
            for pattern, reason in NOT_SENT.items():
                print(f"not sent: {pattern}: {reason}")
            print(f"{len(cases):6} requests")
            return bool(unknown)
        if arguments.mutants:
            quick = [case for case in cases if not case.slow]
            return bool(run_mutants(folder, quick) or unknown)
        sides = [Run(path, cases) for path in (folder / "proxy.py", arguments.new)]
        differ = report(cases, *(side.result() for side in sides))
    print(f"{len(cases)} requests in {time.monotonic() - began:.0f} s")
    return bool(differ or unknown)


if __name__ == "__main__":
    sys.exit(main())
