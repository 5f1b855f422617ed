"""Replicate's HTTP API, played over loopback by one file.

    python fake_replicate.py --port 4000    serve, and list what can be played
    with FakeReplicate() as fake: ...       the same, inside another program

Point any client of Replicate at `fake.base_url`. No model runs: what happens is
a scenario, a row of SCENARIOS, and a model whose owner is `fake` chooses it by
name. `version: "fake/out-of-credit"` is refused for want of credit; every
other model plays `fake.default`, or what `fake.plays` says of it. Models of MAKERS
make images, vectors, sounds and transcripts of their input, by `fake.makes`.

    client                                  a scenario, an input
      |           call                               |
      +--> Server ----> Stand-in ---> Predictions <--+
      |           reply                 |
      +<-- Server <---- Stand-in <------+
      |           frames                |
      +<-- Server <---- Wires <---------+

A prediction is a function of its age: creating, waiting, looking it up and
following its stream all read the same timeline, and none of them drives it.

Each section uses only names from those above it. The facts about Replicate are
those of its OpenAPI document, its docs and recorded exchanges; what nobody could
look up is said to be a guess where it stands.

    Replies      what a request is answered
    Wires        what may become of a stream between its events and its bytes
    Texts        what the models say
    Scenarios    what can happen: one row per case
    Files        what image and speech models give, and how it is served
    Makers       what such models, and others than language models, make of an input
    Models       what a model says of itself: one row per model
    Predictions  a scenario, an input and a moment of birth
    Server       sockets and HTTP
    Stand-in     all that exists at this Replicate, all it has been asked, its API
    Main         the program
"""

from __future__ import annotations

import argparse
import base64
import codecs
import contextlib
import dataclasses
import functools
import hashlib
import heapq
import io
import itertools
import json
import logging
import math
import os
import random
import re
import socket
import socketserver
import struct
import sys
import threading
import time
import wave
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import responses
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, filterfalse, islice
from operator import ge, le
from time import perf_counter as clock
from typing import Any, NamedTuple, TypeVar

Json = dict[str, Any]
Found = TypeVar("Found")

FOREVER = 1e6  # seconds; a lock cannot wait much longer on every system
ALWAYS = sys.maxsize

# == Replies ===================================================================
# The bodies are those that were recorded or quoted; those of 403 and 409 are not
# known, and have the form of the others.


class Reply(NamedTuple):
    """An answer; an iterator of frames as its body is sent as it comes."""

    status: int
    body: Any = None
    type: str = "application/json; charset=UTF-8"
    headers: Mapping[str, str] = {}
    length: int | None = None  # what is said of an iterator's; None: it is chunked


class Refusal(Exception):
    """A reply that can be raised."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.body)
        self.reply = reply


def problem(status: int, detail: str, title: str = "", **more: Any) -> Reply:
    body = {"title": title, "detail": detail, "status": status, **more}
    present = {name: value for name, value in body.items() if value != ""}
    return Reply(status, present, "application/problem+json")


def throttled(words: str = "", header: str = "", **more: Any) -> Reply:
    reply = problem(429, f"Request was throttled.{words}", **more)
    return reply._replace(headers={"Retry-After": header} if header else {})


def page(status: int, title: str) -> Reply:
    html = f"<html><head><title>{title}</title></head><body>{title}</body></html>"
    return Reply(status, html.encode(), "text/html; charset=UTF-8")


def invalid_input(problems: Sequence[tuple[str, str, str]]) -> Reply:
    """Rows of type, field, description: what `invalid_fields` holds."""
    detail = "".join(f"- {name or '(root)'}: {text}\n" for _, name, text in problems)
    keys = ("type", "field", "description")
    fields = [dict(zip(keys, row, strict=True)) for row in problems]
    return problem(422, detail, "Input validation failed", invalid_fields=fields)


RESET = Reply(0)  # no answer at all: the connection is reset
NOT_FOUND = problem(404, "The requested resource could not be found.")
NO_TOKEN = problem(401, "You did not pass an authentication token", "Unauthenticated")
BAD_TOKEN = problem(
    401, "You did not pass a valid authentication token", "Unauthenticated"
)
NO_VERSION = problem(
    422,
    "The specified version does not exist (or perhaps you don't have permission to"
    " use it?)",
    "Invalid version or not permitted",
)
NO_CREDIT = problem(
    402,
    "You have insufficient credit to run this model. Go to"
    " https://replicate.com/account/billing#billing to purchase credit. Once you"
    " purchase credit, please wait a few minutes before trying again.",
    "Insufficient credit",
)
LOW_CREDIT = (
    " Your rate limit for creating predictions is reduced to 6 requests per minute"
    " with a burst of 1 requests while you have less than $5.0 in credit. Your rate"
    " limit resets in ~7s."
)
TOO_HOT = ("number_lte", "input.temperature", "Must be less than or equal to 5")
BUSY = problem(503, "Service unavailable", "Service Unavailable")
BAD_GATEWAY = page(502, "502 Bad Gateway")
BROKEN = problem(500, "Internal server error", "Internal Server Error")


class Fault(NamedTuple):
    """What befalls a request: a silence, then another reply than its own."""

    reply: Reply | None = None  # None: its own
    wait: float = 0
    done: bool = False  # whether what was asked for is done first
    times: int = ALWAYS


NO_FAULT = Fault(times=0)

# == Wires =====================================================================
# A frame is the bytes of one event. A wire takes the frames of a stream
# and gives what is sent, one write each: most say the same in another form, some
# break off. To add one: a function from frames to bytes.

Frames = Iterator[bytes]
Script = Iterator["float | bytes"]  # an age to wait for, or a frame
Wire = Callable[[Frames], Frames]

TIME_OUT = b":408: 408 Request Timeout\n\n"


class Cut(Exception):
    """The connection ends in the middle of what it was saying."""


class Reset(Cut):
    """So it does, and with a TCP reset."""


class Silence(Cut):
    """Nothing more is said, and the connection stays."""


def frame(event: str, data: str, id: str = "") -> bytes:
    named = f"event: {event}\nid: {id}" if id else f"event: {event}"
    lines = data.replace("\n", "\ndata: ")
    return f"{named}\ndata: {lines}\n\n".encode()


def is_done(frame: bytes) -> bool:
    return frame.startswith(b"event: done")


def replacing(old: bytes, new: bytes) -> Wire:
    return lambda frames: (re.sub(old, new, sent) for sent in frames)


def before_each(other: bytes) -> Wire:
    return lambda frames: (other + sent for sent in frames)


def in_groups(size: int) -> Wire:
    def wire(frames: Frames) -> Frames:
        while sent := b"".join(islice(frames, size)):
            yield sent

    return wire


def byte_by_byte(frames: Frames) -> Frames:
    return (sent[i : i + 1] for sent in frames for i in range(len(sent)))


def unsteady(frames: Frames) -> Frames:
    for sent in frames:
        time.sleep(random.uniform(0, 0.03))
        yield sent


def ends_after(
    count: int, last: bytes = b"", how: type[Exception] | None = None
) -> Wire:
    """So many events, a last word, and an end: a clean one if not told how."""

    def wire(frames: Frames) -> Frames:
        yield from islice(frames, count)
        yield last
        if how:
            raise how

    return wire


def cut_in_utf8(frames: Frames) -> Frames:
    for sent in frames:
        if wide := re.search(rb"[\x80-\xff]", sent):
            yield sent[: wide.end()]
            raise Cut
        yield sent


# == Texts =====================================================================
# What models say, token by token: the same always, or a function of the input.
# An empty token comes first and last, as it often does. At the end, what
# stands in the record of a prediction: failures, counts, odd outputs.

Text = Sequence[str]


def cut_up(text: str) -> Text:
    return tuple(text.split("|"))


HELLO = cut_up("|Hello|!| How| can| I| help| you|?|")
SIX = cut_up("One| two| three| four| five| six.")
WIDE = cut_up("Gr|\u00fc\u00dfe| aus| \U0001f3d4\ufe0f| Z\u00fcrich|.")
THINKING = cut_up("<think>|They| greet| me.|\n|</think>|\n\n|Hello|.")
ODD = cut_up(
    "| leads| and trails |\n|\n\n|line\u2028separator|next\u0085line|form\x0cfeed|"
    "https://example.com/a| |data:text/plain,b|\n|: a colon|\ndata: c\n|event: done\n|"
    "\U0001f600|e\u0301|\t| "
)
ENDLESS = ("on ",) * 180_000


def counting(count: int) -> Text:
    return tuple(f"{n} " for n in range(1, count + 1))


def echo(input: Json) -> Text:
    return re.findall(r".{1,16}", json.dumps(input))


LIMIT = re.compile(r"max_(new_|completion_|output_)?tokens|max_length")


def limit(input: Json, default: int) -> int:
    limits = (value for name, value in input.items() if LIMIT.fullmatch(name))
    return next(limits, default)


def to_the_limit(input: Json) -> Text:
    return ("word ",) * limit(input, 16)


class Stamps(list[str]):
    """Tokens that say when, in ns of a clock that all processes share, each was
    first looked at: that is, sent."""

    def __getitem__(self, index: Any) -> Any:
        if not super().__getitem__(index):
            self[index] = f"{time.monotonic_ns()} "
        return super().__getitem__(index)


def stamps(input: Json) -> Text:
    return Stamps([""] * limit(input, 50))


DEMONSTRATION = (
    'You wrote: "{}". No model ran to answer that: this is the demo of the proxy, and'
    " nothing left this machine. With your Replicate token in .env, you would be"
    " reading what a model says."
)
# What a user says in the prompts that the proxy writes, and where that ends.
LAST_WORDS = (
    r"<\|start_header_id\|>user<\|end_header_id\|>(.*?)<\|eot_id\|>",
    r"(?:\[INST\]|<</SYS>>)((?:(?!<<SYS>>).)*?)\[/INST\]",
    r"(?m:^User:)(.*?)(?:\n\n\w+:|\Z)",
    r"(.+)",
)


def demonstrate(input: Json) -> Text:
    """Answer as a model might; what came with the question goes into the log."""
    logging.getLogger("proxy.demo").info("event=demo input=%.2000s", json.dumps(input))
    text = DEMONSTRATION.format(shorten(question(input)))
    return re.findall(r"\s*\S+", text)[: limit(input, ALWAYS)]


def question(input: Json) -> str:
    """What a user said last."""
    for message in reversed(input.get("messages") or []):
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"text": content}]
        if message.get("role") == "user":
            return " ".join(str(part.get("text", "[...]")) for part in parts)
    prompt = str(input.get("prompt", ""))
    found = (re.findall(pattern, prompt, re.DOTALL) for pattern in LAST_WORDS)
    return next(filter(None, found), [""])[-1]


def call_a_tool(input: Json) -> Text:
    """Call the first tool that the prompt describes, then say what came of it."""
    prompt = f"{input.get('system_prompt', '')}\n{input.get('prompt', '')}"
    if result := re.search(r".*<tool_response .*?>\n(.*)\n</tool", prompt, re.DOTALL):
        return (f"It said: {result[1]}",)
    if not (described := re.search(r"<tools>\n(\{.*)", prompt)):
        return ("Give me a tool, and I call it.",)
    tool = json.loads(described[1])
    arguments = dict.fromkeys(tool["parameters"].get("properties", {}), "Oslo")
    call = json.dumps({"name": tool["name"], "arguments": arguments})
    return re.findall(r"\s*\S+", f"<tool_call>{call}</tool_call>")


def shorten(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 200 else words[:200] + " ..."


INTERRUPTED = "Prediction interrupted; please retry (code: PA)"
DIRECTOR = "Director: unexpected error handling prediction (E9828)"
NO_ACCOUNT = "The account's billing hard limit has been reached. (E001)"
OVERLOADED = (
    "Service is currently unavailable due to high demand. Please try again later."
    " (E003)"
)
UNAVAILABLE = "Service is temporarily unavailable. Please try again later. (E004)"
FLAGGED = (
    "The input or output was flagged as sensitive. Please try again with different"
    " inputs. (E005) (uIJ6l3ruRD)"
)
TOO_LONG = (
    "Your prompt is too long: 9001 tokens, but this model's maximum context length is"
    " 8192 tokens."
)
COUNTS = (
    "Input token count: {input_token_count}\nOutput token count: {output_token_count}\n"
)
MORE_COUNTS = f"Model variant: gpt-5.1\n{COUNTS}- Reasoning tokens: 5\nTTFT: 0.22s\n"


def with_text(tokens: list[str]) -> Json:
    return {"text": "".join(tokens)}


def strings(value: Any) -> Iterator[str]:
    """All text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


# == Scenarios =================================================================
# What can happen, one row per case; the row's name is what stands after
# `fake/`. To add one: a row; where no column tells the difference, a column.


@dataclass(frozen=True)
class Scenario:
    """One case. Every default is what usually happens; times are in seconds."""

    why: str
    # the output, and its form
    text: Text | Callable[[Json], Text] = HELLO
    form: Callable[[list[str]], Any] = list  # what its output is made of tokens
    counts: bool = True  # whether metrics count the tokens
    logs: str | None = ""
    removed: bool = False  # whether input and output are gone at the end
    inline: bool = False  # whether a create that waits has files as data: URLs
    # the timeline
    boot: float = 0
    pace: float = 0
    late: float = 0  # how much longer than the stream the record says it runs
    hold: float = 60  # how long `Prefer: wait` is honoured at most
    deadline: float = FOREVER  # as `Cancel-After` would set it
    # the end
    after: int | None = None  # so many tokens; None: all
    running: str = "processing"
    end: str | None = "succeeded"  # None: it never comes
    error: str | None = None
    # the transport
    on_create: Fault = NO_FAULT
    on_look: Fault = NO_FAULT
    on_cancel: Fault = NO_FAULT
    on_stream: Fault = NO_FAULT
    stream_url: str = "{streams}/v1/streams/{key}"  # "": the model cannot stream
    wire: Wire = iter
    spoils: int = ALWAYS  # how many readings of the stream go over the wire
    replays: bool = True  # whether a later reading starts from the first token
    paced: bool = False  # whether one thread sends it with all others like it


def whole(why: str, form: Callable[[list[str]], Any]) -> Scenario:
    """An output that is no list comes at the end, and without a stream."""
    return Scenario(why, form=form, stream_url="")


def lengthy(why: str, **columns: Any) -> Scenario:
    return Scenario(f"{why}; 500 tokens in 10 s", counting(500), pace=0.02, **columns)


def failed(why: str, error: str) -> Scenario:
    return Scenario(f"fails: {why}", end="failed", error=error, after=0)


def refused(reply: Reply, how: str = "", times: int = ALWAYS) -> Scenario:
    why = f"the create is answered {reply.status}{how}"
    return Scenario(why, on_create=Fault(reply, times=times))


def once(reply: Reply) -> Fault:
    return Fault(reply, times=1)


def three(end: str, error: str | None = None) -> Scenario:
    why = f"{end} after 3 tokens"
    return Scenario(why, SIX, pace=0.02, after=3, end=end, error=error)


def wired(why: str, wire: Wire) -> Scenario:
    return Scenario(f"odd text, {why}", ODD, wire=wire, pace=0.002)


def ruined(why: str, wire: Wire) -> Scenario:
    """The stream goes wrong; the prediction goes on, and succeeds."""
    return Scenario(f"the stream {why}", SIX, wire=wire, pace=0.02)


def broken(why: str, wire: Wire, text: Text = SIX) -> Scenario:
    """The same, but the stream is well when it is read again."""
    return dataclasses.replace(ruined(why, wire), text=text, spoils=1)


def cut(count: int, why: str, replays: bool) -> Scenario:
    row = broken(f"is cut after {count} tokens, {why}", ends_after(count, how=Cut))
    return dataclasses.replace(row, replays=replays)


SCENARIOS = {
    # it succeeds
    "hello": Scenario("greets at once"),
    "demo": Scenario("says what it was asked", demonstrate, boot=0.3, pace=1 / 30),
    "echo": Scenario("says the JSON of its input", echo),
    "slow": Scenario("20 tokens, 50 ms apart", counting(20), pace=0.05),
    "story": Scenario("50 tokens, 20 ms apart", counting(50), pace=0.02),
    "stamped": Scenario("says when, 20 ms apart", stamps, pace=0.02, paced=True),
    "stamped-at-once": Scenario("the same, as fast as can be", stamps),
    "firehose": Scenario("2,000 tokens as fast as can be", counting(2000)),
    "endless": Scenario("a token every 20 ms, for an hour", ENDLESS, pace=0.02),
    "cold": Scenario("boots for 2 s", boot=2),
    "very-cold": Scenario("boots for an hour", boot=3600),
    "silence": Scenario("succeeds without a word", ()),
    "length": Scenario("as many tokens as the input allows, or 16", to_the_limit),
    "thinking": Scenario("thinks aloud between <think> and </think>", THINKING),
    "calling": Scenario("calls a tool, and says what it said", call_a_tool),
    "odd-text": Scenario("all that a decoder may stumble over", ODD),
    # how its record tells that
    "string-output": whole("the output is a string; no stream", "".join),
    "object-output": whole("the output is an object with text", with_text),
    "nested-output": whole("the output is a list of objects", lambda t: [with_text(t)]),
    "null-output": whole("the output is null", lambda t: None),
    "number-output": whole("the output is 42", lambda t: 42),
    "no-stream": Scenario("the output is a list, but no stream", stream_url=""),
    "counts-in-logs": Scenario("tokens counted in logs", counts=False, logs=COUNTS),
    "reasoning-in-logs": Scenario("reasoning in logs", counts=False, logs=MORE_COUNTS),
    "no-counts": Scenario("no token counts at all", counts=False),
    "null-logs": Scenario("the logs are null", logs=None),
    "empty-error": Scenario('the error of a success is ""', error=""),
    "data-urls": Scenario("files are data: URLs after Prefer: wait", inline=True),
    "data-removed": Scenario("at the end, input and output are gone", removed=True),
    "wait-processing": Scenario("`processing` for 0.3 s, with all its text", late=0.3),
    "wait-ran-out": Scenario("Prefer: wait runs out at once", boot=0.2, hold=0),
    "late-end": Scenario("`processing` for 0.5 s after the end", late=0.5),
    "unknown-status": Scenario("is `pondering`", running="pondering", late=FOREVER),
    # it does not succeed
    "stuck": Scenario("`processing` for ever, without a word", after=0, end=None),
    "interrupted": failed("infrastructure", INTERRUPTED),
    "director": failed("infrastructure", DIRECTOR),
    "e001": failed("the vendor's account", NO_ACCOUNT),
    "e003": failed("the vendor is overloaded", OVERLOADED),
    "e004": failed("the vendor is down", UNAVAILABLE),
    "flagged": failed("moderation", FLAGGED),
    "nsfw": failed("safety checker", "NSFW content detected. Try another prompt."),
    "oom": failed("out of memory", "CUDA out of memory. Tried to allocate 2.00 GiB"),
    "too-long": failed("the prompt is too long", TOO_LONG),
    "failed": failed("in the model's own words", "list index out of range"),
    "failed-late": three("failed", "it broke"),
    "canceled": three("canceled"),
    "aborted": Scenario("aborted before it ran", boot=0.05, after=0, end="aborted"),
    "deadline": lengthy("canceled after 0.3 s", deadline=0.3),
    "deadline-cold": lengthy("aborted after 0.3 s", deadline=0.3, boot=9),
    # it is not created, or not only
    "unauthenticated": refused(BAD_TOKEN),
    "out-of-credit": refused(NO_CREDIT),
    "forbidden": refused(problem(403, "You may not run this model.")),
    "not-found": refused(NOT_FOUND),
    "conflict": refused(problem(409, "Conflict")),
    "no-version": refused(NO_VERSION, ": no such version"),
    "bad-input": refused(invalid_input([TOO_HOT]), ": the temperature"),
    "throttled-header": refused(throttled(header="7"), ", Retry-After: 7"),
    "throttled-body": refused(throttled(retry_after=7), ", retry_after: 7"),
    "throttled-text": refused(throttled(LOW_CREDIT), ", 7s in words"),
    "throttled-bare": refused(throttled(), ", ratelimit-reset alone"),
    "throttled-once": refused(throttled(header="1"), " the first time", times=1),
    "busy-503": refused(BUSY),
    "busy-once": refused(BUSY, " the first time", times=1),
    "broken-500": refused(BROKEN),
    "html-502": refused(BAD_GATEWAY, ", in HTML"),
    "html-504": refused(page(504, "Gateway time-out"), ", in HTML"),
    "not-json": refused(page(201, "Welcome"), ", in HTML"),
    "json-list": refused(Reply(201, ["surprise"]), ", with a list"),
    "reset-before": Scenario("the create is reset", on_create=Fault(RESET)),
    "reset-after": Scenario("created, then reset", on_create=Fault(RESET, done=True)),
    "hang-before": Scenario("the create hangs", on_create=Fault(wait=FOREVER)),
    "hang": Scenario("created, then hangs", on_create=Fault(wait=FOREVER, done=True)),
    "slow-create": lengthy("told 1 s later", on_create=Fault(wait=1, done=True)),
    # other requests go wrong
    "get-500-once": Scenario("the first look is 500", on_look=once(BROKEN)),
    "get-502-once": Scenario("the first look is 502", on_look=once(BAD_GATEWAY)),
    "get-reset-once": Scenario("the first look is reset", on_look=once(RESET)),
    "get-404": Scenario("every look is 404, as if expired", on_look=Fault(NOT_FOUND)),
    "cancel-500": lengthy("cannot be cancelled", on_cancel=Fault(BROKEN)),
    "cancel-slow": lengthy("a cancel takes 2 s", on_cancel=Fault(wait=2)),
    "stream-404": Scenario("the stream is 404", on_stream=Fault(NOT_FOUND)),
    "stream-500": Scenario("the stream is 500", on_stream=Fault(BROKEN)),
    "stream-html": Scenario("the stream is HTML", on_stream=Fault(page(200, "Hi"))),
    "stream-reset-once": Scenario("the first reading is reset", on_stream=once(RESET)),
    "stream-elsewhere": Scenario("on another host", stream_url="https://evil.example"),
    # the same events on other wires
    "crlf": wired("lines end in CR LF", replacing(b"\n", b"\r\n")),
    "cr": wired("lines end in CR", replacing(b"\n", b"\r")),
    "comments": wired("comments between events", before_each(b": hi\n\n:\n")),
    "unknown-events": wired("events unheard of", before_each(frame("ping", "{}"))),
    "logs-events": wired("events of logs", before_each(frame("logs", "one\ntwo"))),
    "no-ids": wired("no ids", replacing(rb"\nid: [^\n]*", b"")),
    "no-space": wired("no space after :", replacing(rb"(?m)^(\w+): (?! )", rb"\1:")),
    "bom": wired("a byte order mark", lambda frames: chain([codecs.BOM_UTF8], frames)),
    "byte-by-byte": wired("every byte by itself", byte_by_byte),
    "in-threes": wired("three events a write", in_groups(3)),
    "one-segment": wired("all in one write", in_groups(ALWAYS)),
    "unsteady": wired("with 30 ms of jitter", unsteady),
    # the stream breaks, the prediction does not
    **{f"cut-{n}": cut(n, "then replays", True) for n in range(6)},
    **{f"cut-live-{n}": cut(n, "then does not replay", False) for n in range(6)},
    "cut-in-event": broken("is cut within event 3", ends_after(2, b"event: o", Cut)),
    "cut-in-utf8": broken("is cut within a character", cut_in_utf8, WIDE),
    "reset-midway": broken("is reset after 2 tokens", ends_after(2, how=Reset)),
    "timeout-408": broken("times out after 2 tokens", ends_after(2, TIME_OUT)),
    "timeout-408-cold": broken("times out before the first", ends_after(0, TIME_OUT)),
    "silent-stream": ruined("falls silent after 2 tokens", ends_after(2, how=Silence)),
    "no-done": ruined("ends without done", lambda all: filterfalse(is_done, all)),
    "never-said": ruined(
        "says done, and nothing else", lambda all: filter(is_done, all)
    ),
}

# == Files =====================================================================
# What image and speech models give: real ones, and tiny. A maker has them wherever
# its output is to have links.


@dataclass(frozen=True)
class FakeFile:
    """A file that was uploaded, or that a model made, and what befalls its GETs."""

    content: bytes
    content_type: str
    fault: Fault = NO_FAULT
    length: int | None = None  # what Content-Length says; None: the truth
    held: threading.Event | None = None  # half of it is sent before this is set

    def frames(self, pause: Callable[[float], None]) -> Frames:
        middle = len(self.content) // 2
        yield self.content[:middle]
        while self.held and not self.held.wait(0.01):
            pause(0.001)
        yield self.content[middle:]
        if self.length and self.length > len(self.content):
            raise Cut

    def data_url(self) -> str:
        encoded = base64.b64encode(self.content).decode()
        return f"data:{self.content_type};base64,{encoded}"


# What all images show, a letter for each pixel.
WORDS = [
    "............................................................",
    "............................................................",
    "..#..#..##.....#...#..##..###..####.#.......###...##..#..#..",
    "..##.#.#..#....##.##.#..#.#..#.#....#.......#..#.#..#.##.#..",
    "..#.##.#..#....#.#.#.#..#.#..#.###..#.......###..####.#.##..",
    "..#..#.#..#....#...#.#..#.#..#.#....#.......#.#..#..#.#..#..",
    "..#..#..##.....#...#..##..###..####.####....#..#.#..#.#..#..",
    "............................................................",
    "............................................................",
]


def make_png(rows: Sequence[bytes]) -> bytes:
    """An image in shades of grey, a byte for each pixel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        end = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + end

    head = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 0, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = chunk(b"IHDR", head), chunk(b"IDAT", data), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def make_wav(samples: bytes, rate: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(rate)
        written.writeframes(samples)
    return file.getvalue()


SHADES = {".": b"\x3c" * 4, "#": b"\xfa" * 4}
PNG = make_png(
    [b"".join(SHADES[pixel] for pixel in row) for row in WORDS for _ in range(4)]
)
PCM = struct.pack(
    "<4800h", *[int(9000 * math.sin(n / 24000 * 660 * math.tau)) for n in range(4800)]
)
WAV = make_wav(PCM, 24000)
# What the standard library can't make: the same words, and the same tone.
WEBP = base64.b64decode(
    """
    UklGRl4AAABXRUJQVlA4TFIAAAAv78AIAA9wIf0L6V9If/7jAW4aSZKkYpD8WSaDvGfO291zI/o/Af3f
    0opoTabVbMm1DTIcKdSXkLs4d4DTDpPpLo5DPzooKVfX+mpN5lZyA383
    """
)
JPEG = base64.b64decode(
    """
    /9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAFA3PEY8MlBGQUZaVVBfeMiCeG5uePWvuZHI////////////
    ////////////////////////////////////////wAALCAAkAPABAREA/8QAFgABAQEAAAAAAAAAAAAA
    AAAAAAME/8QAIxAAAQIEBwEBAAAAAAAAAAAAAAMREhMiYQQUQmKBocHhNP/aAAgBAQAAPwCAAAAAAAAA
    AAAAAABuWRmw1M1ieC18ekkUZsVTNYrm9nfwksjKhqd7EjVgtfHpJZGVDU72NKKMqKp3sZkUZsVTNYrm
    9nfwksjKhqd7GlZaVDS73J/q2Q8u4wWvj0ZvZ38JLLTYaWa5XG6OfDKAbllpUNLvcn+rZDy7kkUZsVTN
    Yrm9nfwksjKhqd7GlZGbDUzWJ4LXx6ZQasbo58KIrTYqWa5PBa+PTKasbo58MpqwWvj0kitKipd7lcFr
    49GC18emU1Y3Rz4Mbo58GC18ejBa+PRm9nfwymrG6OfDKAbllpUNLvcnjdHPgwWvj0ZvZ38GN0c+DG6O
    fCiK02KlmuYQVWWmw0s1witKipd7kjVm9nfwygqitKipd7kiqK0qKl3uSNWb2d/DKas3s7+EllpsNLNc
    IrSoqXe5XN7O/hJZabDSzXK5vZ38Gb2d/DKCqy02GlmuEVpUVLvcIrSoqXe5IqstNhpZrhZabDSzXCK0
    qKl3uSAAAAAAAAAAAAAAAP/Z
    """
)
MP3 = base64.b64decode(
    """
    //MUxAACGEbAAUIAAf/IRpw4sMABCv0+//MUxAICyE7kAYoIAEIXhQL04Nzc1VUA//MUxAECsErRQdAA
    Ad//dEho0A+xeBUA//MUxAECkEq94ALwRVg4mERSIGNtvFUA//MUxAECoEq54ABwQUYz1XgAZgszMMUA
    //MUxAECoFbB4ABeQFo3qdYQQdm8yYUA//MUxAECUEbJ4ABeQGoyzCRIS88bFQDL//MUxAICIEq9QAJw
    YVAXIGtvgjUADh9Q//MUxAQCYFLF4AMeYB+dI19eVQB8MNoK//MUxAUCSEbN4ABeQChIEFaqA8+YTFhD
    //MUxAYCWEq5QALwRUdTNJUADhw/Cgtw//MUxAcCcFLF4AMeYNTfkQv/6Y7wKcKR//MUxAgCUErIoU0A
    AQoVzx/uXDypMg8E//MUxAkEaGLEAZEwABhNuLzpKtukyoRw//MUxAICMAHsAcMAASkhgViKhCpMQU1F
    """
)
FLAC = base64.b64decode(
    """
    ZkxhQ4AAACICQAJAAAB7AAB7AfQA8AAAAKBzTzzeDdWonA+ZvqGLta/i//hkCACfN04AAAYfC1AOxw//
    DscLUAYf5jI3gTyd441oXW9LgVu+tQBc/1MgRhmiPRef6mQIwzRHovP9TIEYZoj0Xn+pkCMM0R6Lz/Uy
    BGGaI9F5/qZAjDNEei8/1MgRhmiPRef6mQIwzRHovP9TIEYZoj0Xn+pkCLuY
    """
)
# By extension, which is what models call a format too.
FORMATS = {
    "png": FakeFile(PNG, "image/png"),
    "webp": FakeFile(WEBP, "image/webp"),
    "jpg": FakeFile(JPEG, "image/jpeg"),
    "wav": FakeFile(WAV, "audio/x-wav"),
    "mp3": FakeFile(MP3, "audio/mpeg"),
    "flac": FakeFile(FLAC, "audio/flac"),
    "pcm": FakeFile(PCM, "application/octet-stream"),
}
EXTENSIONS = {file.content_type: name for name, file in FORMATS.items()}
# The URL of an image, by which `metrics` count them.
IMAGE_URL = re.compile(r"data:image/|https?:.*\.(png|webp|jpg|gif|svg\+xml)$")

TOKENS: Any = object()  # stands for an output that is the tokens of a scenario


def replace_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same JSON, with all that is no list and no object changed."""
    if isinstance(value, list):
        return [replace_leaves(item, change) for item in value]
    if isinstance(value, dict):
        return {key: replace_leaves(item, change) for key, item in value.items()}
    return change(value)


# == Makers ====================================================================
# What models make that are no language models: functions of an input. KeyError and
# ValueError make the prediction fail, in their words.

Make = Callable[[Json], Any]


def file_in(format: str, asked: str) -> Make:
    """One file, of the format that an input of that name asks for."""

    def make(input: Json) -> FakeFile:
        chosen = input.get(asked, format)
        return FORMATS["jpg" if chosen == "jpeg" else chosen]

    return make


def image(format: str) -> Make:
    return file_in(format, "output_format")


def images(format: str, count: str = "") -> Make:
    """A list of as many as an input of that name asks for."""
    one = image(format)
    return lambda input: [one(input)] * input.get(count, 1)


@functools.cache
def megabyte() -> FakeFile:
    noise = random.Random(0)
    rows = [noise.randbytes(1000) for _ in range(1000)]
    return FakeFile(make_png(rows), "image/png")


def vector(text: str, size: int = 8) -> list[float]:
    """The same for the same text; every number is a float of 32 bits too."""
    digest = itertools.cycle(hashlib.sha256(text.encode()).digest())
    return [(byte - 128) / 128 for byte in islice(digest, size)]


@functools.lru_cache(1000)
def long_vector(text: str) -> tuple[float, ...]:
    """As long as real ones, with as many digits."""
    numbers = random.Random(text)
    return tuple(numbers.uniform(-1, 1) for _ in range(768))


def vectors(texts: Sequence[str]) -> list[list[float]]:
    return [vector(text) for text in texts]


def mpnet(input: Json) -> Any:
    texts = json.loads(input.get("text_batch", "[]")) or [input["text"]]
    return [{"embedding": vector(text)} for text in texts]


def bge(input: Json) -> Any:
    made = vectors(json.loads(input["texts"]))
    numpy = FakeFile(b"\x93NUMPY" + json.dumps(made).encode(), "application/x-npy")
    return numpy if input.get("convert_to_numpy") else made


def flat_if_one(input: Json) -> Any:
    made = vectors(input["text"])
    return made[0] if len(made) == 1 else made


def clip(input: Json) -> Any:
    return {"embedding": vector(input.get("text") or input["image"])}


def jina(input: Json) -> Any:
    given = [input[name] for name in ("text", "image") if name in input]
    made = [vector(each, input.get("embedding_dim", 64)) for each in given]
    if input.get("output_format") == "array":
        return made
    packed = [struct.pack(f"<{len(row)}f", *row) for row in made]
    return [base64.b64encode(row).decode() for row in packed]


class Segment(NamedTuple):
    start: float
    end: float
    text: str

    def words(self) -> list[Segment]:
        """Each takes as long as the others."""
        words = self.text.split()
        step = (self.end - self.start) / len(words)
        starts = [round(self.start + step * n, 3) for n in range(len(words) + 1)]
        return [Segment(*row) for row in zip(starts, starts[1:], words, strict=False)]


HEARD = [
    Segment(0.0, 1.5, "No model ran to hear that."),
    Segment(1.5, 4.25, "This is what the stand-in says of any sound."),
]
TRANSCRIPT = " ".join(segment.text for segment in HEARD)


def clock_time(seconds: float, point: str) -> str:
    return f"00:00:{int(seconds):02}{point}{int(seconds % 1 * 1000):03}"


def cue(row: Segment, point: str) -> str:
    times = clock_time(row.start, point), clock_time(row.end, point)
    return f"{' --> '.join(times)}\n{row.text}\n"


SUBTITLES = {
    "srt": "\n".join(f"{n}\n{cue(row, ',')}" for n, row in enumerate(HEARD, 1)),
    "vtt": "WEBVTT\n\n" + "\n".join(cue(row, ".") for row in HEARD),
}


def whisper(input: Json) -> Any:
    form = input.get("transcription", "plain text")
    segments = [
        {
            "id": id,
            "seek": 0,
            "start": row.start,
            "end": row.end,
            "text": f" {row.text}",
            "tokens": [50364 + id],
            "temperature": 0.0,
            "avg_logprob": -0.25,
            "compression_ratio": 1.1,
            "no_speech_prob": 0.01,
        }
        for id, row in enumerate(HEARD)
    ]
    return {
        "segments": segments,
        "srt_file": None,
        "txt_file": None,
        "translation": TRANSCRIPT if input.get("translate") else None,
        "transcription": SUBTITLES.get(form, f" {TRANSCRIPT}"),
        "detected_language": "english",
    }


def fast_whisper(input: Json) -> Any:
    by_word = input.get("timestamp") == "word"
    rows = [word for row in HEARD for word in row.words()] if by_word else HEARD
    chunks = [{"timestamp": list(row[:2]), "text": f" {row.text}"} for row in rows]
    return {"text": f" {TRANSCRIPT}", "chunks": chunks}


def whisperx(input: Json) -> Any:
    segments: list[Json] = [row._asdict() for row in HEARD]
    if input.get("align_output"):
        for made, row in zip(segments, HEARD, strict=True):
            made["words"] = [
                {"word": word.text, "start": word.start, "end": word.end, "score": 0.9}
                for word in row.words()
            ]
    return {"segments": segments, "detected_language": input.get("language", "en")}


def transcript(input: Json) -> str:
    return TRANSCRIPT


def transcript_tokens(input: Json) -> Text:
    return re.findall(r"\s*\S+", TRANSCRIPT)


# == Models ====================================================================
# What GET /v1/models says. A row's fields are written as short as can be:
# name* type a, b =default [minimum..maximum] # description
# where * is for a required one, and `a, b` are the values of an enum. An output is
# a type, or {fields}; "" is text, made token by token.

FIELD = re.compile(
    r"(?P<name>\w+)(?P<required>\*?) (?P<type>[\w\[\]]+)(?P<enum> [\w:./, -]+?)?"
    r"(?: ?=(?P<default>.+?))?(?: \[(?P<minimum>\S*?)\.\.(?P<maximum>\S*)\])?"
    r"(?: # (?P<description>.+))?"
)
TYPES: dict[str, Json] = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "obj": {"type": "object"},
    "uri": {"type": "string", "format": "uri"},
    "any": {},
    "enum": {"type": "string"},
}
OUTPUT = {
    "type": "array",
    "items": {"type": "string"},
    "title": "Output",
    "x-cog-array-type": "iterator",
    "x-cog-array-display": "concatenate",
}


def make_type(text: str) -> Json:
    if "|" in text:
        return {"anyOf": [make_type(each) for each in text.split("|")]}
    if text.startswith("["):
        return {"type": "array", "items": make_type(text[1:-1])}
    return dict(TYPES[text])


def make_model(
    ref: str, fields: str | None = None, official: bool = True, output: str = ""
) -> Json:
    owner, _, name = ref.partition("/")
    return {
        "url": f"https://replicate.com/{ref}",
        "owner": owner,
        "name": name,
        "description": "A stand-in: no model runs.",
        "visibility": "public",
        "run_count": 1,
        "is_official": official,
        "latest_version": fields and make_version(ref, fields, output),
    }


def make_version(ref: str, fields: str, output: str = "") -> Json:
    return {
        "id": hashlib.sha256(ref.encode()).hexdigest(),
        "created_at": "2025-01-01T00:00:00.000000Z",
        "openapi_schema": {
            "openapi": "3.0.2",
            "info": {"title": "Cog", "version": "0.1.0"},
            "paths": {},
            "components": {"schemas": make_schemas(fields, output)},
        },
    }


def version_id(model: Json) -> str | None:
    version = model.get("latest_version") or {}
    return version.get("id")


def input_schemas(model: Json) -> dict[str, Json]:
    version = model.get("latest_version") or {}
    schema = version.get("openapi_schema") or {}
    schemas: dict[str, Json] = schema.get("components", {}).get("schemas", {})
    return schemas


def ref_of(model: Json) -> str:
    return f"{model['owner']}/{model['name']}"


def make_schemas(fields: str, output: str = "") -> dict[str, Json]:
    schemas: dict[str, Json] = {"Output": OUTPUT}
    schemas["Input"] = make_object("Input", fields, schemas)
    if output.startswith("{"):
        made = make_object("ModelOutput", output[1:-1], schemas)
        schemas["ModelOutput"] = made
        ref = "#/components/schemas/ModelOutput"
        schemas["Output"] = {"$ref": ref, "title": "Output"}
    elif output:
        schemas["Output"] = {**make_type(output), "title": "Output"}
    return schemas


def make_object(title: str, fields: str, schemas: dict[str, Json]) -> Json:
    """The schema of an object; each of its enums is one of the schemas."""
    properties: Json = {}
    required: list[str] = []
    for order, text in enumerate(" ".join(fields.split()).split("; ")):
        match = FIELD.fullmatch(text)
        assert match, f"not in the notation of MODELS: {text}"
        row = match.groupdict("")
        name = row["name"]
        made = make_type(row["type"])
        if row["enum"]:
            values: list[Any] = row["enum"].strip().split(", ")
            values = [int(v) for v in values] if row["type"] == "int" else values
            schemas[name] = {**made, "title": name, "enum": values}
            made = {"allOf": [{"$ref": f"#/components/schemas/{name}"}]}
        numbers = [key for key in ("default", "minimum", "maximum") if row[key]]
        made |= {key: json.loads(row[key]) for key in numbers}
        made |= {"description": row["description"]} if row["description"] else {}
        properties[name] = {**made, "title": name.capitalize(), "x-order": order}
        required += [name] if row["required"] else []
    known = {"type": "object", "title": title, "properties": properties}
    return {**known, "required": required}


KINDS: dict[str, Any] = {"string": str, "integer": int, "number": (int, float)}
KINDS |= {"boolean": bool, "array": list, "object": dict}


def is_kind(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, KINDS[kind])


def is_format(value: Any, format: str) -> bool:
    return bool(re.match(r"(?i)[a-z][a-z0-9+.-]*:", value))


# Keywords of JSON Schema, and what is said of a value that breaks them. The one
# recorded wording ("prompt is required", 3.1) is gojsonschema's, so the others are
# taken from there too.
RULES: dict[str, tuple[str, Callable[[Any, Any], bool], str]] = {
    "type": ("invalid_type", is_kind, "Invalid type. Expected: {}"),
    "enum": ("enum", lambda value, e: value in e, "Must be one of the following: {}"),
    "minimum": ("number_gte", ge, "Must be greater than or equal to {}"),
    "maximum": ("number_lte", le, "Must be less than or equal to {}"),
    "format": ("format", is_format, "Does not match format '{}'"),
}


def check_input(input: Json, schemas: dict[str, Json]) -> None:
    """Refuse what Replicate refuses; fields of unknown names pass."""
    known = schemas.get("Input", {})
    problems = [
        ("required", "input", f"{name} is required")
        for name in known.get("required", [])
        if name not in input
    ]
    fields = known.get("properties", {})
    for name, schema in [(name, fields[name]) for name in fields if name in input]:
        if "allOf" in schema:
            schema = schemas[schema["allOf"][0]["$ref"].rpartition("/")[2]]
        broken = [
            (type, f"input.{name}", text.format(schema[keyword]))
            for keyword, (type, holds, text) in RULES.items()
            if keyword in schema and not holds(input[name], schema[keyword])
        ]
        problems += broken[:1]
    if problems:
        raise Refusal(invalid_input(problems))


def check_body(body: Any, required: set[str]) -> None:
    """Refuse unknown keys (1.2; the status of that is not known)."""
    if not isinstance(body, dict):
        raise Refusal(problem(400, "The request body is not a JSON object."))
    problems = [
        ("required", "", f"{key} is required") for key in sorted(required - body.keys())
    ]
    for key in sorted(body.keys() - required - {"stream"}):
        text = f"Additional property {key} is not allowed"
        problems.append(("additional_property_not_allowed", "", text))
    if not isinstance(body.get("input", {}), dict):
        problems.append(("invalid_type", "input", "Invalid type. Expected: object"))
    if problems:
        raise Refusal(invalid_input(problems))


PLAIN = """
    prompt str; system_prompt str; max_tokens int =512; temperature float =0.7;
    top_p float =0.9; stop_sequences str; seed int; image uri
"""
MODEL_FIELDS = {
    "meta/llama-2-7b-chat": """
        prompt* str; system_prompt str ="You are a helpful, respectful and honest
        assistant."; max_new_tokens int =128 [1..]; min_new_tokens int =-1 [-1..];
        temperature float =0.7 [0.01..5]; top_p float =0.95 [0..1];
        top_k int =-1 [-1..]; repetition_penalty float =1.15 [0..];
        stop_sequences str; seed int; debug bool =false
    """,
    "meta/meta-llama-3-8b-instruct": """
        prompt str =""; min_tokens int =0; max_tokens int =512;
        temperature float =0.6; top_p float =0.9; top_k int =50;
        presence_penalty float =1.15; frequency_penalty float =0.2;
        prompt_template str ="{prompt}"
    """,
    "openai/gpt-4o": """
        prompt str; system_prompt str; messages [obj] =[]; image_input [uri] =[];
        temperature float =1 [0..2]; max_completion_tokens int =4096;
        top_p float =1 [0..1]; frequency_penalty float =0 [-2..2];
        presence_penalty float =0 [-2..2]
    """,
    "anthropic/claude-4-sonnet": """
        prompt* str; image uri; system_prompt str =""; max_tokens int =8192
        [1024..64000]; max_image_resolution float =0.5 [0.001..2];
        extended_thinking bool =false; thinking_budget_tokens int =1024 [1024..64000]
    """,
    "google/gemini-2.5-flash": """
        prompt* str; images [uri] =[]; videos [uri] =[]; system_instruction str;
        temperature float =1 [0..2]; top_p float =0.95 [0..1];
        max_output_tokens int =65535 [1..65535]; thinking_budget int [0..24576];
        dynamic_thinking bool =false
    """,
    "ibm-granite/granite-3.3-8b-instruct": """
        prompt str; messages [obj] =[]; documents [obj] =[]; tools [obj] =[];
        tool_choice str; response_format obj; system_prompt str; chat_template str;
        add_generation_prompt bool =true; chat_template_kwargs obj ={};
        min_tokens int =0; max_tokens int; max_completion_tokens int;
        temperature float =0.6; top_p float =0.9; top_k int =50;
        presence_penalty float =0; frequency_penalty float =0; stop [str] =[];
        seed int; stream bool =false
    """,
    # nobody's: a model that no client has heard of, with rarer names for its fields
    "acme/parrot": """
        prompt* str; system_instruction str; max_length int =256 [1..1024];
        temperature float =0.5 [0..1]; temp float; stop [str] =[]; images [uri] =[];
        tone enum kind, gruff ="kind"; random_seed int
    """,
    "someone/llama-tuned": """
        prompt* str; system_prompt str =""; max_new_tokens int =256 [1..4096];
        temperature float =0.8 [0.01..5]; stop_sequences str
    """,
}


class Maker(NamedTuple):
    """A model that is no language model."""

    output: str
    make: Make
    fields: str
    official: bool = True


RATIOS = "1:1, 16:9, 21:9, 3:2, 2:3, 4:5, 5:4, 3:4, 4:3, 9:16, 9:21"
FORMAT = 'output_format enum webp, jpg, png ="webp"; output_quality int =80 [0..100]'
LANGUAGES = """
    en english, zh chinese, de german, es spanish, ru russian, ko korean, fr french,
    ja japanese, pt portuguese, tr turkish, pl polish, ca catalan, nl dutch, ar arabic,
    sv swedish, it italian, id indonesian, hi hindi, fi finnish, vi vietnamese,
    he hebrew, uk ukrainian, el greek, ms malay, cs czech, ro romanian, da danish,
    hu hungarian, ta tamil, no norwegian, th thai, ur urdu, hr croatian, bg bulgarian,
    lt lithuanian, la latin, mi maori, ml malayalam, cy welsh, sk slovak, te telugu,
    fa persian, lv latvian, bn bengali, sr serbian, az azerbaijani, sl slovenian,
    kn kannada, et estonian, mk macedonian, br breton, eu basque, is icelandic,
    hy armenian, ne nepali, mn mongolian, bs bosnian, kk kazakh, sq albanian,
    sw swahili, gl galician, mr marathi, pa punjabi, si sinhala, km khmer, sn shona,
    yo yoruba, so somali, af afrikaans, oc occitan, ka georgian, be belarusian,
    tg tajik, sd sindhi, gu gujarati, am amharic, yi yiddish, lo lao, uz uzbek,
    fo faroese, ht haitian creole, ps pashto, tk turkmen, nn nynorsk, mt maltese,
    sa sanskrit, lb luxembourgish, my myanmar, bo tibetan, tl tagalog, mg malagasy,
    as assamese, tt tatar, haw hawaiian, ln lingala, ha hausa, ba bashkir, jw javanese,
    su sundanese, yue cantonese
"""
NAMES = dict(row.split(maxsplit=1) for row in LANGUAGES.split(","))
JSON_LIST = (
    'text to embed, formatted as JSON list of strings (e.g. ["a fish", "a book"])'
)
# Names, order, types and defaults are the real ones, and so are bounds and enums
# where they are known; of the longest enums there are some values.
MAKERS = {
    # images
    "black-forest-labs/flux-schnell": Maker(
        "[uri]",
        images("webp", "num_outputs"),
        f"""
        prompt* str; aspect_ratio enum {RATIOS} ="1:1"; num_outputs int =1 [1..4];
        num_inference_steps int =4 [1..4]; seed int; {FORMAT};
        disable_safety_checker bool =false; go_fast bool =true;
        megapixels enum 1, 0.25 ="1"
        """,
    ),
    "black-forest-labs/flux-dev": Maker(
        "[uri]",
        images("webp", "num_outputs"),
        f"""
        prompt* str; aspect_ratio enum {RATIOS} ="1:1"; image uri;
        prompt_strength float =0.8 [0..1]; num_outputs int =1 [1..4];
        num_inference_steps int =28 [1..50]; guidance float =3 [0..10]; seed int;
        {FORMAT}; disable_safety_checker bool =false; go_fast bool =true;
        megapixels enum 1, 0.25 ="1"
        """,
    ),
    "black-forest-labs/flux-1.1-pro": Maker(
        "uri",
        image("webp"),
        """
        aspect_ratio enum custom, 1:1, 16:9, 3:2, 2:3, 4:5, 5:4, 9:16, 3:4, 4:3 ="1:1";
        output_format enum webp, jpg, png ="webp"; seed int;
        width int [256..1440] # Width of the generated image. Only used when
        aspect_ratio=custom. Must be a multiple of 32;
        height int [256..1440] # Height of the generated image. Only used when
        aspect_ratio=custom. Must be a multiple of 32;
        prompt* str; image_prompt uri; output_quality int =80 [0..100];
        safety_tolerance int =2 [1..6]; prompt_upsampling bool =false
        """,
    ),
    "black-forest-labs/flux-1.1-pro-ultra": Maker(
        "uri",
        image("jpg"),
        f"""
        aspect_ratio enum {RATIOS} ="1:1"; output_format enum jpg, png ="jpg";
        raw bool =false; seed int; prompt* str; image_prompt uri;
        safety_tolerance int =2 [1..6]; image_prompt_strength float =0.1 [0..1]
        """,
    ),
    "black-forest-labs/flux-kontext-pro": Maker(
        "uri",
        image("png"),
        f"""
        aspect_ratio enum match_input_image, {RATIOS}, 2:1, 1:2 ="match_input_image";
        output_format enum jpg, png ="png"; seed int; prompt* str; input_image uri;
        safety_tolerance int =2 [0..6]; prompt_upsampling bool =false
        """,
    ),
    "black-forest-labs/flux-fill-pro": Maker(
        "uri",
        image("jpg"),
        """
        outpaint enum None, Zoom out 1.5x, Zoom out 2x, Make square, Left outpaint,
        Right outpaint, Top outpaint, Bottom outpaint ="None";
        output_format enum jpg, png ="jpg"; mask uri # A black-and-white image that
        describes the part of the image to inpaint. Black areas will be preserved while
        white areas will be inpainted.; seed int; image* uri; steps int =50 [15..50];
        prompt* str; guidance float =60 [2..100]; safety_tolerance int =2 [1..6];
        prompt_upsampling bool =false
        """,
    ),
    "black-forest-labs/flux-2-pro": Maker(
        "uri",
        image("webp"),
        f"""
        prompt* str; input_images [uri] =[]; aspect_ratio enum match_input_image,
        custom, 1:1, 16:9, 3:2, 2:3, 4:5, 5:4, 9:16, 3:4, 4:3 ="1:1";
        resolution enum match_input_image, 0.5 MP, 1 MP, 2 MP, 4 MP ="1 MP";
        width int [256..2048]; height int [256..2048]; safety_tolerance int =2 [1..5];
        seed int; {FORMAT}
        """,
    ),
    "black-forest-labs/flux-2-klein-4b": Maker(
        "[uri]",
        images("jpg"),
        f"""
        prompt* str; images [uri] =[]; aspect_ratio enum match_input_image, {RATIOS}
        ="1:1"; output_megapixels enum 0.25, 0.5, 1, 2, 4 ="1"; seed int;
        go_fast bool =false; output_format enum webp, jpg, png ="jpg";
        output_quality int =95 [0..100]; disable_safety_checker bool =false
        """,
    ),
    "black-forest-labs/flux-redux-schnell": Maker(
        "[uri]",
        images("webp", "num_outputs"),
        f"""
        redux_image* uri; aspect_ratio enum {RATIOS} ="1:1"; num_outputs int =1 [1..4];
        num_inference_steps int =4 [1..4]; seed int; {FORMAT};
        disable_safety_checker bool =false; megapixels enum 1, 0.25 ="1"
        """,
    ),
    "openai/gpt-image-1.5": Maker(
        "[uri]",
        images("webp", "number_of_images"),
        """
        prompt* str; openai_api_key str; aspect_ratio enum 1:1, 3:2, 2:3 ="1:1";
        input_fidelity enum low, high ="low"; input_images [uri];
        number_of_images int =1 [1..10]; quality enum low, medium, high, auto ="auto";
        background enum auto, transparent, opaque ="auto";
        output_compression int =90 [0..100];
        output_format enum png, jpeg, webp ="webp"; moderation enum auto, low ="auto";
        user_id str
        """,
    ),
    "openai/gpt-image-2": Maker(
        "[uri]",
        images("webp", "number_of_images"),
        """
        prompt* str; openai_api_key str; aspect_ratio enum 1:1, 3:2, 2:3 ="1:1";
        input_images [uri]; number_of_images int =1 [1..1];
        quality enum low, medium, high, auto ="auto";
        background enum auto, opaque ="auto"; output_compression int =90 [0..100];
        output_format enum png, jpeg, webp ="webp"; moderation enum auto, low ="auto";
        user_id str
        """,
    ),
    "google/imagen-4": Maker(
        "uri",
        image("jpg"),
        """
        prompt* str; aspect_ratio enum 1:1, 9:16, 16:9, 3:4, 4:3 ="1:1";
        image_size enum 1K, 2K ="1K"; safety_filter_level enum block_low_and_above,
        block_medium_and_above, block_only_high ="block_only_high";
        output_format enum jpg, png ="jpg"
        """,
    ),
    "google/imagen-4-fast": Maker(
        "uri",
        image("jpg"),
        """
        prompt* str; aspect_ratio enum 1:1, 9:16, 16:9, 3:4, 4:3 ="1:1";
        safety_filter_level enum block_low_and_above, block_medium_and_above,
        block_only_high ="block_only_high"; output_format enum jpg, png ="jpg"
        """,
    ),
    "google/nano-banana": Maker(
        "uri",
        image("jpg"),
        """
        prompt* str; image_input [uri] =[]; aspect_ratio enum match_input_image, 1:1,
        2:3, 3:2, 3:4, 4:3, 4:5, 5:4, 9:16, 16:9, 21:9 ="match_input_image";
        output_format enum jpg, png ="jpg"
        """,
    ),
    "google/nano-banana-pro": Maker(
        "uri",
        image("jpg"),
        """
        prompt* str; image_input [uri] =[]; aspect_ratio enum match_input_image, 1:1,
        2:3, 3:2, 3:4, 4:3, 4:5, 5:4, 9:16, 16:9, 21:9 ="match_input_image";
        resolution enum 1K, 2K, 4K ="2K"; output_format enum jpg, png ="jpg";
        safety_filter_level enum block_low_and_above, block_medium_and_above,
        block_only_high ="block_only_high"; allow_fallback_model bool =false
        """,
    ),
    "bytedance/seedream-4": Maker(
        "[uri]",
        images("jpg"),  # more than one only where the prompt asks for a series
        """
        prompt* str; image_input [uri] =[]; size enum 1K, 2K, 4K, custom ="2K";
        aspect_ratio enum match_input_image, 1:1, 4:3, 3:4, 16:9, 9:16, 3:2, 2:3, 21:9
        ="match_input_image"; width int =2048 [1024..4096];
        height int =2048 [1024..4096]; sequential_image_generation enum disabled, auto
        ="disabled"; max_images int =1 [1..15]; enhance_prompt bool =true
        """,
    ),
    "bytedance/seedream-4.5": Maker(
        "[uri]",
        images("jpg"),
        """
        prompt* str; image_input [uri] =[]; size enum 2K, 4K, custom ="2K";
        aspect_ratio enum match_input_image, 1:1, 4:3, 3:4, 16:9, 9:16, 3:2, 2:3, 21:9
        ="match_input_image"; width int =2048 [1024..4096];
        height int =2048 [1024..4096]; sequential_image_generation enum disabled, auto
        ="disabled"; max_images int =1 [1..15]
        """,
    ),
    "stability-ai/sdxl": Maker(
        "[uri]",
        images("png", "num_outputs"),
        """
        prompt str ="An astronaut riding a rainbow unicorn"; negative_prompt str ="";
        image uri; mask uri # Input mask for inpaint mode. Black areas will be
        preserved, white areas will be inpainted.; width int =1024; height int =1024;
        num_outputs int =1 [1..4]; scheduler enum DDIM, DPMSolverMultistep,
        HeunDiscrete, KarrasDPM, K_EULER_ANCESTRAL, K_EULER, PNDM ="K_EULER";
        num_inference_steps int =50 [1..500]; guidance_scale float =7.5 [1..50];
        prompt_strength float =0.8 [0..1]; seed int; refine enum no_refiner,
        expert_ensemble_refiner, base_image_refiner ="no_refiner";
        high_noise_frac float =0.8 [0..1]; refine_steps int; apply_watermark bool =true;
        lora_scale float =0.6 [0..1]; disable_safety_checker bool =false
        """,
        official=False,
    ),
    "ideogram-ai/ideogram-v3-turbo": Maker(
        "uri",
        image("png"),
        """
        aspect_ratio enum 1:3, 3:1, 1:2, 2:1, 9:16, 16:9, 10:16, 16:10, 2:3, 3:2, 3:4,
        4:3, 4:5, 5:4, 1:1 ="1:1"; resolution enum None, 512x1536, 576x1408, 640x1536,
        704x1408, 768x1344, 832x1216, 896x1152, 960x1088, 1024x1024, 1088x960, 1152x896,
        1216x832, 1344x768, 1408x704, 1536x512, 1536x640 ="None"; magic_prompt_option
        enum Auto, On, Off ="Auto"; style_type enum None, Auto, General, Realistic,
        Design ="None"; style_preset enum None, 80s Illustration, Watercolor ="None";
        mask uri # A black and white image. Black pixels are inpainted, white pixels
        are preserved. The mask will be resized to match the image size.;
        seed int [..2147483647]; image uri; prompt* str; style_reference_images [uri]
        """,
    ),
    "recraft-ai/recraft-v3": Maker(
        "uri",
        image("webp"),
        """
        aspect_ratio enum Not set, 1:1, 4:3, 3:4, 3:2, 2:3, 16:9, 9:16, 1:2, 2:1, 7:5,
        5:7, 4:5, 5:4, 3:5, 5:3 ="Not set"; size enum 1024x1024, 1365x1024, 1024x1365,
        1536x1024, 1024x1536, 1820x1024, 1024x1820, 1024x2048, 2048x1024, 1434x1024,
        1024x1434, 1024x1280, 1280x1024, 1024x1707, 1707x1024 ="1024x1024";
        style enum any, realistic_image, digital_illustration,
        digital_illustration/pixel_art, digital_illustration/hand_drawn,
        digital_illustration/grain, digital_illustration/infantile_sketch,
        digital_illustration/2d_art_poster, digital_illustration/handmade_3d,
        digital_illustration/hand_drawn_outline, digital_illustration/engraving_color,
        digital_illustration/2d_art_poster_2, realistic_image/b_and_w,
        realistic_image/hard_flash, realistic_image/hdr, realistic_image/natural_light,
        realistic_image/studio_portrait, realistic_image/enterprise,
        realistic_image/motion_blur ="any"; prompt* str
        """,
    ),
    "qwen/qwen-image": Maker(
        "[uri]",
        images("webp"),
        f"""
        prompt* str; enhance_prompt bool =false; lora_weights str; lora_scale float =1;
        extra_lora_weights [str]; extra_lora_scale [float]; image uri;
        strength float =0.9 [0..1]; negative_prompt str =" "; aspect_ratio enum 1:1,
        16:9, 9:16, 4:3, 3:4, 3:2, 2:3 ="16:9"; image_size enum optimize_for_quality,
        optimize_for_speed ="optimize_for_quality"; go_fast bool =true;
        num_inference_steps int =30 [1..50]; guidance float =3 [0..10]; seed int;
        {FORMAT}; disable_safety_checker bool =false
        """,
    ),
    "qwen/qwen-image-edit-plus": Maker(
        "[uri]",
        images("webp"),
        """
        prompt* str; image* [uri]; aspect_ratio enum 1:1, 16:9, 9:16, 4:3, 3:4,
        match_input_image ="match_input_image"; go_fast bool =true; seed int;
        output_format enum webp, jpg, png ="webp"; output_quality int =95 [0..100];
        disable_safety_checker bool =false
        """,
    ),
    "prunaai/z-image-turbo": Maker(
        "uri",
        image("jpg"),
        """
        prompt* str; height int =1024 [64..2048]; width int =1024 [64..2048];
        num_inference_steps int =8 [1..50]; guidance_scale float =0 [0..20]; seed int;
        go_fast bool =false; output_format enum png, jpg, webp ="jpg";
        output_quality int =80 [0..100]
        """,
    ),
    "minimax/image-01": Maker(
        "[uri]",
        images("jpg", "number_of_images"),
        """
        aspect_ratio enum 1:1, 16:9, 4:3, 3:2, 2:3, 3:4, 9:16, 21:9 ="1:1"; prompt* str;
        number_of_images int =1 [1..9]; prompt_optimizer bool =true;
        subject_reference uri
        """,
    ),
    "acme/poster": Maker("uri", lambda input: megabyte(), "prompt* str; seed int"),
    # embeddings
    "replicate/all-mpnet-base-v2": Maker(
        "[obj]",
        mpnet,
        """
        text str # A single string to encode.;
        text_batch str # A JSON-formatted list of strings to encode.
        """,
        official=False,
    ),
    "nateraw/bge-large-en-v1.5": Maker(
        "[any]|uri",
        bge,
        f"""
        path uri # Path to file containing text as JSONL with 'text' field or valid
        JSON string list.; texts str ="" # {JSON_LIST}; batch_size int =32;
        normalize_embeddings bool =true; convert_to_numpy bool =false
        """,
        official=False,
    ),
    "beautyyuyanli/multilingual-e5-large": Maker(
        "[[float]]",
        bge,
        rf"""
        texts str ="[\"In the water, fish are swimming.\", \"A book lies open.\"]"
        # {JSON_LIST}; batch_size int =32; normalize_embeddings bool =true
        """,
        official=False,
    ),
    "ibm-granite/granite-embedding-278m-multilingual": Maker(
        "[[float]]",
        lambda input: vectors(input.get("texts", [])),
        "texts [str] =[]",
        official=False,
    ),
    "lucataco/nomic-embed-text-v1": Maker(
        "[[float]]",
        lambda input: vectors(input["sentences"].strip().splitlines()),
        """
        sentences* str # Input Sentence list - Each sentence should be split by a
        newline
        """,
        official=False,
    ),
    "lucataco/snowflake-arctic-embed-l": Maker(
        "[float]",
        lambda input: vector(input.get("prompt", "")),
        'prompt str ="Snowflake is the Data Cloud!"',
        official=False,
    ),
    "mark3labs/embeddings-gte-base": Maker(
        "{text* str; vectors* [float]}",
        lambda input: {"text": input["text"], "vectors": vector(input["text"])},
        "text* str",
        official=False,
    ),
    "cuuupid/gte-qwen2-7b-instruct": Maker(
        "[float]", flat_if_one, "text* [str]", official=False
    ),
    "openai/clip": Maker(
        "{embedding* [float]}", clip, "text str; image uri", official=False
    ),
    "zsxkib/jina-clip-v2": Maker(
        "[str]|[[float]]",
        jina,
        """
        text str # Text content to embed (up to 8192 tokens). If both text and image
        provided, text embedding will be first in returned list.; image uri;
        embedding_dim int =64 [64..1024] # Output dimension - Matryoshka dimension;
        output_format enum base64, array ="base64"
        """,
        official=False,
    ),
    "acme/embedder": Maker(
        "[[float]]",
        lambda input: [long_vector(text) for text in input["texts"]],
        "texts* [str]",
    ),
    # speech
    "jaaari/kokoro-82m": Maker(
        "uri",
        file_in("wav", ""),
        """
        text* str; voice enum af_alloy, af_aoede, af_bella, af_jessica, af_kore,
        af_nicole, af_nova, af_river, af_sarah, af_sky, am_adam, am_echo, am_eric,
        am_fenrir, am_liam, am_michael, am_onyx, am_puck, bf_alice, bf_emma,
        bf_isabella, bf_lily, bm_daniel, bm_fable, bm_george, bm_lewis, ff_siwis,
        hf_alpha, hf_beta, hm_omega, hm_psi, if_sara, im_nicola, jf_alpha,
        jf_gongitsune, jf_nezumi, jf_tebukuro, jm_kumo, zf_xiaobei, zf_xiaoni,
        zf_xiaoxiao, zf_xiaoyi, zm_yunjian, zm_yunxi, zm_yunxia, zm_yunyang
        ="af_bella"; speed float =1 [0.1..5]
        """,
        official=False,
    ),
    "minimax/speech-02-turbo": Maker(
        "uri",
        file_in("mp3", "audio_format"),
        """
        emotion enum auto, happy, sad, angry, fearful, disgusted, surprised, calm,
        fluent, neutral ="auto"; sample_rate int 8000, 16000, 22050, 24000, 32000, 44100
        =32000; bitrate int 32000, 64000, 128000, 256000 =128000;
        audio_format enum mp3, wav, flac, pcm ="mp3"; channel enum mono, stereo ="mono";
        language_boost enum None, Automatic, Chinese, English, German ="None";
        text* str; pitch int =0 [-12..12]; speed float =1 [0.5..2];
        volume float =1 [0..10]; voice_id str ="Wise_Woman";
        subtitle_enable bool =false; english_normalization bool =false
        """,
    ),
    "resemble-ai/chatterbox": Maker(
        "uri",
        file_in("wav", ""),
        """
        prompt* str; audio_prompt uri; exaggeration float =0.5; cfg_weight float =0.5;
        temperature float =0.8; seed int =0
        """,
    ),
    "elevenlabs/flash-v2.5": Maker(
        "uri",
        file_in("mp3", ""),
        """
        voice enum Rachel, Drew, Clyde, Paul, Aria, Domi, Dave, Roger, Fin, Sarah,
        James, Jane, Juniper, Arabella, Hope, Bradford, Reginald, Gaming, Austin, Kuon,
        Blondie, Priyanka, Alexandra, Monika, Mark, Grimblewood ="Rachel";
        speed float =1 [0.7..1.2]; style float =0 [0..1]; prompt* str; next_text str
        =""; stability float =0.5 [0..1]; language_code str ="en";
        previous_text str =""; similarity_boost float =0.75 [0..1]
        """,
    ),
    "qwen/qwen3-tts": Maker(
        "uri",
        file_in("wav", ""),
        """
        text* str; mode enum custom_voice, voice_clone, voice_design ="custom_voice";
        language enum auto, Chinese, English, Japanese, Korean, French, German, Spanish,
        Portuguese, Russian ="auto"; speaker enum Aiden, Dylan, Eric, Ono_anna, Ryan,
        Serena, Sohee, Uncle_fu, Vivian ="Serena"; voice_description str;
        reference_audio uri; reference_text str; style_instruction str
        """,
    ),
    # transcription
    "openai/whisper": Maker(
        """{segments any; srt_file uri; txt_file uri; translation str;
        transcription* str; detected_language* str}""",
        whisper,
        f"""
        audio* uri; transcription enum plain text, srt, vtt ="plain text";
        translate bool =false; language enum auto, {", ".join(NAMES)},
        {", ".join(NAMES.values()).title()} ="auto"; temperature float =0;
        patience float; suppress_tokens str ="-1"; initial_prompt str;
        condition_on_previous_text bool =true;
        temperature_increment_on_fallback float =0.2;
        compression_ratio_threshold float =2.4; logprob_threshold float =-1;
        no_speech_threshold float =0.6
        """,
        official=False,
    ),
    "vaibhavs10/incredibly-fast-whisper": Maker(
        "any",
        fast_whisper,
        f"""
        audio* uri; task enum transcribe, translate ="transcribe";
        language enum None, {", ".join(NAMES.values())} ="None"; batch_size int =24;
        timestamp enum chunk, word ="chunk"; diarise_audio bool =false; hf_token str
        """,
        official=False,
    ),
    "victor-upmeet/whisperx": Maker(
        "{segments any; detected_language* str}",
        whisperx,
        """
        audio_file* uri; language str # ISO code of the language spoken in the audio;
        language_detection_min_prob float =0; language_detection_max_tries int =5;
        initial_prompt str; batch_size int =64; temperature float =0;
        vad_onset float =0.5; vad_offset float =0.363; align_output bool =false;
        diarization bool =false; huggingface_access_token str; min_speakers int;
        max_speakers int; debug bool =false
        """,
        official=False,
    ),
    "openai/gpt-4o-transcribe": Maker(
        "",
        transcript_tokens,
        "prompt str; language str; audio_file* uri; temperature float =0 [0..1]",
    ),
    "nvidia/parakeet-rnnt-1.1b": Maker(
        "str", transcript, "audio_file* uri", official=False
    ),
}
# Models with all that another has.
MAKERS |= {
    "black-forest-labs/flux-kontext-max": MAKERS["black-forest-labs/flux-kontext-pro"],
    "google/imagen-4-ultra": MAKERS["google/imagen-4"],
    "minimax/speech-02-hd": MAKERS["minimax/speech-02-turbo"],
    "openai/gpt-4o-mini-transcribe": MAKERS["openai/gpt-4o-transcribe"],
}
COMMUNITY = {"someone/llama-tuned"}
DEPLOYMENTS = {"acme/mine": "acme/parrot", "acme/tuned": "someone/llama-tuned"}
MODELS = {
    ref: make_model(ref, fields, official=ref not in COMMUNITY)
    for ref, fields in MODEL_FIELDS.items()
} | {
    ref: make_model(ref, row.fields, row.official, row.output)
    for ref, row in MAKERS.items()
}

LANGUAGE_MODELS = ["openai/gpt-4o", "meta/llama-2-7b-chat", "google/gemini-2.5-flash"]

# == Predictions ===============================================================
# Nothing happens in a prediction: what is seen of it follows from its age.
# Only a cancel changes it, by saying when it stopped.

REASONS = {"failed": "error", "canceled": "canceled", "aborted": "canceled"}  # 2.3


def random_name(length: int) -> str:
    return base64.b32encode(os.urandom(length))[:length].decode().lower()


def iso(moment: float) -> str:
    to_seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment))
    return f"{to_seconds}.{int(moment % 1 * 10**6):06}Z"


@dataclass(eq=False)
class Prediction:
    """A scenario played to an input."""

    scenario: Scenario
    model: Json
    input: Json
    deadline: float
    made: Any = TOKENS  # its output, if that is of the model's own making
    id: str = field(default_factory=lambda: random_name(26))
    key: str = field(default_factory=lambda: random_name(52))
    urls: Json = field(default_factory=dict)
    created: float = field(default_factory=time.time)
    born: float = field(default_factory=clock)
    readings: int = 0
    halted: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        scenario, text = self.scenario, self.scenario.text
        self.tokens: Text = text(self.input) if callable(text) else text
        if self.writes_text and self.made is not TOKENS:
            self.tokens = self.made
        self.count = len(self.tokens) if scenario.after is None else scenario.after
        finish = scenario.boot + self.count * scenario.pace
        self.finish = FOREVER if scenario.end is None else finish
        self.stopped_at = self.deadline
        self.stopped_as = "canceled" if self.deadline > scenario.boot else "aborted"

    @property
    def writes_text(self) -> bool:
        """Whether its output comes token by token, as that of language models."""
        output = input_schemas(self.model).get("Output")
        return output == OUTPUT if output else self.made is TOKENS

    @property
    def age(self) -> float:
        return clock() - self.born

    @property
    def status(self) -> str:
        return self.status_at(self.age)

    def ending(self, late: float = 0) -> tuple[float, str]:
        """At which age it ends, and how; the record may be late."""
        if self.stopped_at < self.finish + late:
            return self.stopped_at, self.stopped_as
        return self.finish + late, self.scenario.end or ""

    def is_over(self, age: float) -> bool:
        return age >= self.ending(self.scenario.late)[0] and age > 0

    def status_at(self, age: float) -> str:
        if self.is_over(age):
            return self.ending(self.scenario.late)[1]
        return self.scenario.running if age > self.scenario.boot else "starting"

    def tokens_at(self, age: float) -> list[str]:
        boot, pace = self.scenario.boot, self.scenario.pace
        ran = min(age, self.ending()[0]) - boot
        if age <= boot or ran < 0:
            return []
        count = min(self.count, int(ran / pace) + 1) if pace else self.count
        return [self.tokens[index] for index in range(count)]

    def cancel(self) -> None:
        """Stop now, if it has not ended (not known of an ended one: 1.4)."""
        age = self.age
        if age < self.ending(self.scenario.late)[0]:
            self.stopped_at, self.stopped_as = age, "canceled"
            self.halted.set()

    def wait_until(self, age: float, pause: Callable[[float], None]) -> None:
        """Wait for that age, or for a sooner end. `pause` watches the client."""
        while (left := min(age, self.ending()[0]) - self.age) > 0:
            if not self.halted.wait(min(left, 1)) and left > 1:
                pause(0.001)

    def output(self, age: float) -> Any:
        """A list of tokens grows; anything else comes at the end."""
        tokens, succeeded = self.tokens_at(age), self.status_at(age) == "succeeded"
        if self.scenario.form is not list:
            return self.scenario.form(tokens) if succeeded else None
        if self.made is not TOKENS and not self.writes_text:
            ended, how = self.ending()
            return self.made if 0 < age >= ended and how == "succeeded" else None
        return tokens if tokens or succeeded else None

    def record(self, age: float) -> Json:
        """The prediction object, as it is at that age."""
        official, over = self.model["is_official"], self.is_over(age)
        gone = over and self.scenario.removed
        record = {
            "id": self.id,
            "model": ref_of(self.model),
            "version": "hidden" if official else version_id(self.model),
            "input": {} if gone else self.input,
            "output": None if gone else self.output(age),
            "logs": "",
            "error": None,
            "status": self.status_at(age),
            "data_removed": gone,
            "created_at": iso(self.created),
            "urls": self.urls,
        }
        return record | self.closing(age) if over else record

    def closing(self, age: float) -> Json:
        """What only the record of an ended prediction has."""
        scenario, (ended, status) = self.scenario, self.ending(self.scenario.late)
        metrics: Json = {"predict_time": max(ended - scenario.boot, 0.0)}
        closing: Json = {"completed_at": iso(self.created + ended), "metrics": metrics}
        if status == scenario.end:
            closing["error"] = scenario.error
        if status == "succeeded":
            counts = {
                "input_token_count": len(" ".join(strings(self.input)).split()),
                "output_token_count": sum(map(bool, self.tokens_at(age))),
            }
            images = sum(map(bool, map(IMAGE_URL.match, strings(self.output(age)))))
            metrics |= counts if scenario.counts and self.writes_text else {}
            metrics |= {"image_count": images} if images else {}
            closing["logs"] = scenario.logs and scenario.logs.format(**counts)
        return closing

    def reading(self, pause: Callable[[float], None]) -> Frames:
        """The stream, as the scenario's wire carries this reading of it."""
        self.readings += 1
        live = self.readings > 1 and not self.scenario.replays
        frames = self.frames(len(self.tokens_at(self.age)) if live else 0, pause)
        spoiled = self.readings <= self.scenario.spoils
        return self.scenario.wire(frames) if spoiled else frames

    def frames(self, first: int, pause: Callable[[float], None]) -> Frames:
        for step in self.script(first):
            if isinstance(step, bytes):
                yield step
            else:
                self.wait_until(step, pause)

    def script(self, first: int = 0) -> Script:
        for index in range(first, self.count):
            age = self.scenario.boot + index * self.scenario.pace
            yield age
            if age > self.ending()[0]:
                break
            yield frame("output", self.tokens[index], f"{int(self.created)}:{index}")
        yield self.ending()[0]
        status = self.ending()[1]
        if status == "failed":  # the last two frames have no id
            yield frame("error", json.dumps({"detail": self.scenario.error}))
        reason = {"reason": REASONS[status]} if status in REASONS else {}
        yield frame("done", json.dumps(reason))


# == Server ====================================================================
# A thread per connection, which blocks wherever the timeline, or a fault, makes its
# client wait.


class Call(NamedTuple):
    """A request; names of headers are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any  # JSON if it says so, else bytes, or None
    at: float  # time.monotonic()
    pause: Callable[[float], None]  # ends when the client leaves


class Pacer:
    """Sends what is due on many streams in one thread, and lives while there are any.
    A thread for each costs more, and a benchmark would blame the proxy for it."""

    def __init__(self) -> None:
        self.due: list[tuple[float, int, Iterator[float]]] = []  # when, number, what
        self.playing = 0
        self.numbers = itertools.count()
        self.changed = threading.Condition()

    def play(self, prediction: Prediction, send: Callable[[bytes], None]) -> None:
        """Send all of it, then return."""
        over = threading.Event()
        sender = self.send(prediction, send, over)
        with self.changed:
            heapq.heappush(self.due, (0, next(self.numbers), sender))
            self.playing += 1
            if self.playing == 1:
                threading.Thread(target=self.run, daemon=True).start()
            self.changed.notify()
        over.wait()

    def send(
        self,
        prediction: Prediction,
        send: Callable[[bytes], None],
        over: threading.Event,
    ) -> Iterator[float]:
        """Send what is due; yield when the next is, if that is yet to come."""
        with contextlib.suppress(OSError):  # the client may leave
            for step in prediction.script():
                if isinstance(step, bytes):
                    send(step)
                elif (due := prediction.born + step) > clock():
                    yield due
        over.set()

    def run(self) -> None:
        while waited := self.wait():
            number, sender = waited
            due = next(sender, None)
            with self.changed:
                if due is None:
                    self.playing -= 1
                else:
                    heapq.heappush(self.due, (due, number, sender))

    def wait(self) -> tuple[int, Iterator[float]] | None:
        """Wait for what is due next; None if nothing is played any more."""
        with self.changed:
            while self.playing:
                left = self.due[0][0] - clock()
                if left <= 0:
                    return heapq.heappop(self.due)[1:]
                self.changed.wait(left)
        return None


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024  # 5 leave most of 200 clients at once without answer
    allow_reuse_port = False  # two on one port would share its clients

    def __init__(self, address: tuple[str, int], answer: Callable[[Call], Reply]):
        self.answer = answer
        self.connections: set[socket.socket] = set()
        self.pacer = Pacer()
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        """Bind, and ask no DNS for our name, as HTTPServer's own does."""
        socketserver.TCPServer.server_bind(self)
        self.server_port = self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Close at once: a shutdown before it would spoil a reset."""
        self.connections.discard(request)
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may leave at any time."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Lives as long as a connection, and keeps nothing between its calls."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # it holds a kept-alive reply for 44 ms

    def respond(self) -> None:
        try:
            self.send(self.server.answer(self.read_call()))
        except Cut as cut:
            self.close_connection = True
            if isinstance(cut, Silence):
                self.pause(FOREVER)
            if isinstance(cut, Reset):  # lingering for 0 s, the close sends RST
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    do_GET = do_POST = respond

    def read_call(self) -> Call:
        headers = {name.lower(): value for name, value in self.headers.items()}
        body: Any = self.rfile.read(int(headers.get("content-length") or 0)) or None
        if body and "json" in headers.get("content-type", ""):
            with contextlib.suppress(ValueError):
                body = json.loads(body)
        path = self.path.partition("?")[0]
        return Call(self.command, path, headers, body, time.monotonic(), self.pause)

    def pause(self, seconds: float) -> None:
        """Sleep; if the client leaves, ConnectionError."""
        self.connection.settimeout(seconds)
        try:
            if not self.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionAbortedError
        except TimeoutError:
            pass
        finally:
            self.connection.settimeout(None)

    def send(self, reply: Reply) -> None:
        body = reply.body
        if not reply.status:
            raise Reset
        if reply.length is not None:
            self.wfile.write(self.head(reply, f"Content-Length: {reply.length}"))
            for sent in body:
                self.connection.sendall(sent)
        elif isinstance(body, (Iterator, Prediction)):
            self.wfile.write(self.head(reply, "Transfer-Encoding: chunked"))
            if isinstance(body, Prediction):
                self.server.pacer.play(body, self.send_frame)
            else:  # one write each, and an empty one would end the body
                for sent in filter(None, body):
                    self.send_frame(sent)
            self.connection.sendall(b"0\r\n\r\n")
        else:
            sent = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.wfile.write(self.head(reply, f"Content-Length: {len(sent)}") + sent)

    def head(self, reply: Reply, framing: str) -> bytes:
        """By hand, as the head then goes out in one write with its body."""
        headers = {"Content-Type": reply.type, "ratelimit-reset": "1", **reply.headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        phrase = responses.get(reply.status, "")  # Cloudflare has codes of its own
        return f"HTTP/1.1 {reply.status} {phrase}\r\n{framing}\r\n{lines}\r\n".encode()

    def send_frame(self, sent: bytes) -> None:
        self.connection.sendall(b"%x\r\n%b\r\n" % (len(sent), sent))

    def log_message(self, format: str, *args: object) -> None:
        pass


# == Stand-in ==================================================================
# All that exists here, and a method per operation; to add one, a case in `dispatch`
# too. Tests look at what there is, and may add to it, at any time.


def deployed(owner: str, name: str) -> str:
    """The model that a deployment runs; any other name is of the model's own."""
    return DEPLOYMENTS.get(f"{owner}/{name}", f"{owner}/{name}")


def find(rows: Mapping[str, Found], key: str) -> Found:
    if key not in rows:
        raise Refusal(NOT_FOUND)
    return rows[key]


def read_upload(content_type: str, body: Any) -> FakeFile:
    """The part `content` of a multipart body."""
    boundary = re.search(r'boundary="?([^";]+)', content_type)
    parts = body.split(f"--{boundary[1]}".encode()) if boundary and body else []
    for part in parts:
        lines, _, content = part.partition(b"\r\n\r\n")
        if b'name="content"' in lines:
            kind = re.search(r"(?i)content-type: *([^\r]+)", lines.decode())
            return FakeFile(content[:-2], kind[1] if kind else "")
    raise Refusal(invalid_input([("required", "", "content is required")]))


class FakeReplicate:
    """Replicate, between start and stop."""

    def __init__(
        self,
        token: str = "r8_fake",
        default: str = "hello",
        record: bool = True,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.address = (host, port)
        self.token = token
        self.other_tokens: set[str] = set()  # which are as good
        self.default = default  # what models play whose owner is not `fake`
        self.record = record
        self.servers: list[Server] = []
        self.scenarios = dict(SCENARIOS)
        self.plays: dict[str, str] = {}  # by model, the scenario it plays
        self.models = dict(MODELS)
        self.makes = {ref: row.make for ref, row in MAKERS.items()}
        self.seen: list[Call] = []
        self.predictions: dict[str, Prediction] = {}
        self.streams: dict[str, Prediction] = {}
        self.cancels: list[str] = []
        self.files: dict[str, FakeFile] = {}  # by id: those of the Files API
        self.output_files: dict[str, FakeFile] = {}  # by URL: what models made
        self.on_upload = NO_FAULT
        self.collections = {"language-models": LANGUAGE_MODELS}
        self.on_collection = NO_FAULT
        self.faults: Counter[str] = Counter()

    def __enter__(self) -> FakeReplicate:
        server = Server(self.address, self.answer)
        self.origin = f"http://{self.address[0]}:{server.server_port}"
        self.base_url = f"{self.origin}/v1"
        self.servers = [server]
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        """End all connections, then what their threads wait for, then wait for them."""
        [server] = self.servers
        server.shutdown()
        server.server_close()
        for connection in list(server.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for prediction in list(self.predictions.values()):
            prediction.cancel()
        deadline = time.monotonic() + 2
        while server.connections and time.monotonic() < deadline:
            time.sleep(0.001)

    def creates(self) -> list[Call]:
        """The requests that tried to create a prediction, whatever came of them."""
        tried = [seen for seen in self.seen if seen.method == "POST"]
        return [seen for seen in tried if seen.path.endswith("/predictions")]

    def wait_for(self, condition: Callable[[], object], timeout: float = 5.0) -> None:
        end = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > end:
                raise AssertionError(f"still not so after {timeout} s")
            time.sleep(0.002)

    def answer(self, call: Call) -> Reply:
        if self.record:
            self.seen.append(call)
        try:
            if file := self.output_files.get(f"{self.origin}{call.path}"):
                return self.deliver(call, file)
            given = call.headers.get("authorization") or ""
            scheme, _, token = given.partition(" ")
            known = token in (self.token, *self.other_tokens)
            if not known or scheme not in ("Bearer", "Token"):  # the older one
                raise Refusal(BAD_TOKEN if given else NO_TOKEN)
            return self.dispatch(call)
        except Refusal as refusal:
            return refusal.reply

    def dispatch(self, call: Call) -> Reply:
        match [call.method, *call.path.removeprefix("/v1/").split("/")]:
            case ["POST", "predictions"]:
                check_body(call.body, {"version", "input"})
                return self.create(call, self.find_version(str(call.body["version"])))
            case ["POST", "models", owner, name, "predictions"]:
                check_body(call.body, {"input"})
                model = self.find_model(f"{owner}/{name}")
                if not model["is_official"]:
                    raise Refusal(NOT_FOUND)
                return self.create(call, model)
            case ["POST", "deployments", owner, name, "predictions"]:
                check_body(call.body, {"input"})
                return self.create(call, self.find_model(deployed(owner, name)))
            case ["GET", "predictions", id]:
                return self.look_up(call, find(self.predictions, id))
            case ["POST", "predictions", id, "cancel"]:
                return self.cancel(call, find(self.predictions, id))
            case ["GET", "streams", key]:
                return self.follow(call, find(self.streams, key))
            case ["GET", "models", owner, name]:
                return Reply(200, self.find_model(f"{owner}/{name}"))
            case ["GET", "models", owner, name, "versions", id]:
                model = self.find_model(f"{owner}/{name}")
                if model["is_official"] or version_id(model) != id:
                    raise Refusal(NOT_FOUND)  # official models list no versions
                return Reply(200, model["latest_version"])
            case ["GET", "deployments", owner, name]:
                ref = deployed(owner, name)
                version = version_id(self.find_model(ref))
                release = {"number": 1, "model": ref, "version": version}
                return Reply(200, {"name": name, "current_release": release})
            case ["GET", "collections", slug]:
                return self.play_fault(
                    self.on_collection, "collection", call, lambda: self.collect(slug)
                )
            case ["GET", "account"]:
                return Reply(200, {"type": "user", "username": "fake"})
            case ["POST", "files"]:
                return self.create_file(call)
        raise Refusal(NOT_FOUND)

    def play_fault(
        self, fault: Fault, name: str, call: Call, work: Callable[[], Reply]
    ) -> Reply:
        """Do the work, so far as the fault of that name lets it."""
        if self.faults[name] >= fault.times:
            return work()
        self.faults[name] += 1
        own = work() if fault.done else None
        if fault.wait:
            call.pause(fault.wait)
        return fault.reply or own or work()

    def find_model(self, name: str) -> Json:
        """A model of any name there is, but of the owner `missing`."""
        owner, _, scenario = name.partition("/")
        if name in self.models:
            return self.models[name]
        if owner == "missing" or (owner == "fake" and scenario not in self.scenarios):
            raise Refusal(NOT_FOUND)
        return make_model(name, PLAIN if owner == "fake" else None)

    def find_version(self, ref: str) -> Json:
        """The model that POST /predictions runs for a ref, or the id of a version."""
        versions = {version_id(model): model for model in self.models.values()}
        name, _, version = ref.partition(":")
        if ref in versions:
            return versions[ref]
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise Refusal(NO_VERSION)
        self.choose(name)
        model = self.find_model(name)
        if not version and not model["is_official"]:
            raise Refusal(NOT_FOUND)
        if version and name in self.models and version != version_id(model):
            raise Refusal(NO_VERSION)
        return model

    def choose(self, ref: str) -> str:
        """The name of the scenario that a model plays."""
        owner, _, name = ref.partition("/")
        chosen = self.plays.get(ref, name if owner == "fake" else self.default)
        if chosen not in self.scenarios:
            raise Refusal(NO_VERSION)
        return chosen

    def create(self, call: Call, model: Json) -> Reply:
        input, ref = call.body["input"], ref_of(model)
        check_input(input, input_schemas(model))
        name = self.choose(ref)
        scenario = self.scenarios[name]
        given = re.fullmatch(r"(\d+)s", call.headers.get("cancel-after", ""))
        deadline = min(scenario.deadline, float(given[1]) if given else FOREVER)

        def begin() -> Reply:
            """A prediction that is waited for has the record of that moment."""
            played, made = scenario, TOKENS
            try:
                if ref in self.makes:
                    made = replace_leaves(self.makes[ref](input), self.publish)
            except (KeyError, ValueError) as error:
                played = dataclasses.replace(
                    scenario, end="failed", error=str(error), after=0
                )
            prediction = self.add(Prediction(played, model, input, deadline, made))
            preference = call.headers.get("prefer", "")
            if not (match := re.fullmatch(r"wait(?:=(\d+))?", preference)):
                return Reply(201, prediction.record(0))
            held = min(int(match[1] or 60), scenario.hold)
            prediction.wait_until(min(held, prediction.finish), call.pause)
            age = prediction.age
            status = 201 if age >= prediction.ending()[0] else 202
            record = prediction.record(age)
            if scenario.inline:
                record["output"] = replace_leaves(record["output"], self.inline)
            headers = {"Preference-Applied": preference}
            return Reply(status, record, headers=headers)

        return self.play_fault(scenario.on_create, name, call, begin)

    def add(self, prediction: Prediction) -> Prediction:
        get = f"{self.base_url}/predictions/{prediction.id}"
        prediction.urls = {"get": get, "cancel": f"{get}/cancel"}
        if (url := prediction.scenario.stream_url) and prediction.writes_text:
            url = url.format(streams=self.origin, key=prediction.key)
            prediction.urls["stream"] = url
        self.predictions[prediction.id] = self.streams[prediction.key] = prediction
        if not self.record and len(self.predictions) > 1000:  # forget one
            oldest = next(iter(self.predictions.values()))
            if oldest.is_over(oldest.age):
                self.predictions.pop(oldest.id, None)
                self.streams.pop(oldest.key, None)
        return prediction

    def add_file(self, content: bytes, content_type: str, **faults: Any) -> str:
        """Serve a file, to anyone who knows its URL; the faults are FakeFile's."""
        kind = content_type.rpartition("/")[2]
        name = f"output.{EXTENSIONS.get(content_type, kind)}"
        url = f"{self.origin}/delivery/{random_name(44)}/{name}"
        self.output_files[url] = FakeFile(content, content_type, **faults)
        if not self.record and len(self.output_files) > 1000:
            self.output_files.pop(next(iter(self.output_files)), None)
        return url

    def publish(self, value: Any) -> Any:
        """The URL of a file that a model has made; another value itself."""
        return self.add_file(**vars(value)) if isinstance(value, FakeFile) else value

    def inline(self, value: Any) -> Any:
        file = self.output_files.get(value) if isinstance(value, str) else None
        return file.data_url() if file else value

    def deliver(self, call: Call, file: FakeFile) -> Reply:
        def send() -> Reply:
            length = len(file.content) if file.length is None else file.length
            frames = file.frames(call.pause)
            return Reply(200, frames, file.content_type, length=length)

        return self.play_fault(file.fault, f"file {call.path}", call, send)

    def look_up(self, call: Call, prediction: Prediction) -> Reply:
        def look() -> Reply:
            return Reply(200, prediction.record(prediction.age))

        fault = prediction.scenario.on_look
        return self.play_fault(fault, f"look {prediction.id}", call, look)

    def cancel(self, call: Call, prediction: Prediction) -> Reply:
        def stop() -> Reply:
            prediction.cancel()
            return Reply(200, prediction.record(prediction.age))

        self.cancels.append(prediction.id)
        fault = prediction.scenario.on_cancel
        return self.play_fault(fault, f"cancel {prediction.id}", call, stop)

    def follow(self, call: Call, prediction: Prediction) -> Reply:
        scenario = prediction.scenario

        def read() -> Reply:
            body = prediction if scenario.paced else prediction.reading(call.pause)
            return Reply(200, body, "text/event-stream", {"Cache-Control": "no-store"})

        fault = scenario.on_stream
        return self.play_fault(fault, f"stream {prediction.id}", call, read)

    def collect(self, slug: str) -> Reply:
        models = [self.find_model(ref) for ref in find(self.collections, slug)]
        return Reply(200, {"name": slug, "slug": slug, "models": models})

    def create_file(self, call: Call) -> Reply:
        file = read_upload(call.headers.get("content-type", ""), call.body)

        def keep() -> Reply:
            id = random_name(26)
            self.files[id] = file
            made: Json = {"id": id, "content_type": file.content_type}
            made |= {"size": len(file.content), "created_at": iso(time.time())}
            return Reply(201, {**made, "urls": {"get": f"{self.base_url}/files/{id}"}})

        return self.play_fault(self.on_upload, "upload", call, keep)


# == Main ======================================================================


def main() -> None:
    rows = [f"  fake/{name:18}  {row.why}" for name, row in SCENARIOS.items()]
    listed = "\n".join(rows)
    parser = argparse.ArgumentParser(
        description="Play Replicate's HTTP API over loopback: no model runs.",
        epilog=f"models, each a scenario:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=4000, help="4000; 0: any free one")
    parser.add_argument("--token", default="r8_fake", help="what clients must show")
    parser.add_argument("--default", default="hello", help="what all other models play")
    fake = FakeReplicate(record=False, **vars(parser.parse_args()))
    with fake, contextlib.suppress(KeyboardInterrupt):
        print(f"Models, and what each of them plays:\n\n{listed}")
        print(f"\nREPLICATE_BASE_URL={fake.base_url}")
        print(f"REPLICATE_API_TOKEN={fake.token}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
