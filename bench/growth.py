"""Show that work grows in line with the length of what comes in, and memory is bounded.

    python bench/growth.py             CPU for n and for 4 n of many shapes
    python bench/growth.py --memory    memory while large bodies come in
    python bench/growth.py --soak      memory and threads after thousands of calls,
                                       and after --idle seconds: two minutes

A shape is what a model says, or what a client sends. It goes through a proxy.py of its
own process, in front of a stand-in in this one; CPU is the kernel's count for the
process. Four times the length may take six times the CPU: the rest is noise. It needs
Linux, as bench.py does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from bench import KEY, ROOT, cpu_ns, memory_mb, running

sys.path.insert(0, str(ROOT))

from fake_replicate import FakeReplicate, Scenario

Json = dict[str, Any]

LENGTH = 40_000  # characters that a model says
CUTS = {"whole": 1 << 30, "in tokens": 16}  # characters that come together
TIMES = 3  # the least of some tries has the least noise
MOST_GROWTH = 6
MEGABYTE = 2**20

TOOL: Json = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
TOOLS = {"tools": [TOOL]}
AN_OBJECT = {"response_format": {"type": "json_object"}}


class Shape(NamedTuple):
    name: str
    begin: str
    piece: str  # repeated up to the length
    body: Mapping[str, Any] = {}


SHAPES = [
    Shape("words", "", "word "),
    Shape("one long line", "", "word"),
    Shape("white space", "", " "),
    Shape("line ends", "", "\n"),
    Shape("white space, tools", "", "\n", TOOLS),
    Shape("white space, JSON", "", "\n", AN_OBJECT),
    Shape("reasoning", "<think>", "a\n"),
    Shape("<, tools", "", "<", TOOLS),
    Shape("{, tools", "", "{", TOOLS),
    Shape("{, JSON", "", "{", AN_OBJECT),
    Shape("brackets, JSON", "", "[", AN_OBJECT),
    Shape("brackets, tools", "", "[", TOOLS),
    Shape("signs of calls", "", "<tool_call>", TOOLS),
    Shape("half calls", "", '<tool_call>{"arguments":', TOOLS),
    Shape(
        "harmony's calls",
        "",
        "<|channel|>commentary to=functions.get_weather<|message|>{",
        TOOLS,
    ),
    Shape("fences", "", "```json\n", TOOLS),
    Shape("Python's calls", "", "[get_weather(", TOOLS),
    Shape(
        "arguments",
        '<tool_call>{"name":"get_weather","arguments":{"city":"',
        "a ",
        TOOLS,
    ),
    Shape("a JSON answer", '{"a": [', '{"b": "c"}, ', AN_OBJECT),
    Shape("JSON to repair", "{'a': [", "{'b': 'c'}, ", AN_OBJECT),
    Shape("stop strings", "", "aab", {"stop": ["aaab", "aabb", "ba"]}),
]


def history(size: int) -> Json:
    turn = [{"role": role, "content": "word " * 100} for role in ("user", "assistant")]
    return {"messages": [*turn * (size // 1000), *GO_ON["messages"]]}


def tools(count: int) -> Json:
    function: Json = TOOL["function"]
    rows = [{**function, "name": f"get_weather_{number}"} for number in range(count)]
    return {**GO_ON, "tools": [{"type": "function", "function": row} for row in rows]}


def schema(count: int) -> Json:
    properties = {f"property_{number}": {"type": "string"} for number in range(count)}
    wanted = {"name": "wide", "schema": {"type": "object", "properties": properties}}
    return {**GO_ON, "response_format": {"type": "json_schema", "json_schema": wanted}}


def images(size: int) -> Json:
    data = b64encode(b"\x89PNG\r\n\x1a\n" + os.urandom(size // 4)).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    ] * 3
    text = {"type": "text", "text": "Go on."}
    return {"messages": [{"role": "user", "content": [*parts, text]}]}


GO_ON: Json = {"messages": [{"role": "user", "content": "Go on."}]}

# What a client sends: its size, from which the body is made.
REQUESTS = {
    "a history, characters": (1_000_000, history),
    "tools": (128, tools),
    "properties of a schema": (5_000, schema),
    "images, bytes": (20_000_000, images),
}


class Proxy(NamedTuple):
    pid: int
    url: str

    def post(self, body: bytes) -> tuple[int, bytes]:
        url = urlsplit(self.url)
        with closing(HTTPConnection(url.hostname or "", url.port, timeout=120)) as link:
            headers = {"Authorization": f"Bearer {KEY}"}
            link.request("POST", "/v1/chat/completions", body, headers)
            response = link.getresponse()
            return response.status, response.read()


@contextmanager
def serving(path: Path) -> Iterator[tuple[FakeReplicate, Proxy]]:
    with (
        FakeReplicate(record=False) as fake,
        running(
            [str(path)],
            REPLICATE_API_TOKEN=fake.token,
            REPLICATE_BASE_URL=fake.base_url,
            PROXY_API_KEY=KEY,
            LOG_LEVEL="ERROR",
        ) as server,
    ):
        yield fake, Proxy(server.process.pid, server.url)


def cut(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def measure_shape(
    fake: FakeReplicate, proxy: Proxy, shape: Shape, size: int, least: int = LENGTH
) -> float:
    """By how much CPU grows from a text to four times the text."""
    seconds = []
    for length in (least, 4 * least):
        text = (shape.begin + shape.piece * length)[:length]
        fake.scenarios["shape"] = Scenario("", cut(text, size))
        message = {"role": "user", "content": "Go on."}
        body = {"model": "fake/shape", "messages": [message], "stream": True}
        data = json.dumps({**body, **shape.body}).encode()
        seconds.append(min(spent(proxy, data) for _ in range(TIMES)))
    print(f"{shape.name:24}", f"{seconds[0]:8.3f} s {seconds[1]:8.3f} s", end="")
    return seconds[1] / max(seconds[0], 0.01)  # less is the call itself


def spent(proxy: Proxy, body: bytes) -> float:
    """CPU seconds of the proxy for a call."""
    before = cpu_ns(proxy.pid)
    proxy.post(body)
    return (cpu_ns(proxy.pid) - before) / 1e9


def measure_requests(fake: FakeReplicate, proxy: Proxy) -> bool:
    """By how much CPU grows from a quarter of a request to the whole."""
    print("\nA quarter of a request, and the whole\n")
    fake.scenarios["shape"] = Scenario("", ["{}"])
    is_kept = True
    for name, (size, make) in REQUESTS.items():
        seconds = []
        for part in (size // 4, size):
            body = {"model": "openai/gpt-4o", "stream": True, **make(part)}
            data = json.dumps(body).encode()
            fake.plays["openai/gpt-4o"] = "shape"
            seconds.append(min(spent(proxy, data) for _ in range(TIMES)))
        growth = seconds[1] / max(seconds[0], 0.01)
        is_kept &= growth <= MOST_GROWTH
        verdict = "" if growth <= MOST_GROWTH else "  BROKEN"
        print(f"{size:>11,} {name:24}", end="")
        print(f"{seconds[0]:8.3f} s {seconds[1]:8.3f} s x {growth:4.1f} {verdict}")
    return is_kept


def measure_growth(path: Path) -> bool:
    is_kept = True
    with serving(path) as (fake, proxy):
        is_kept &= measure_requests(fake, proxy)
        print("\n250,000 characters, and four times that, each by itself\n")
        letters = Shape("letters", "", "a")
        growth = measure_shape(fake, proxy, letters, 1, 250_000)
        is_kept &= growth <= MOST_GROWTH
        print(f" x {growth:4.1f}")
        for name, size in CUTS.items():
            print(f"\n{LENGTH:,} characters, and four times that, {name}\n")
            for shape in SHAPES:
                growth = measure_shape(fake, proxy, shape, size)
                is_kept &= growth <= MOST_GROWTH
                print(f" x {growth:4.1f}", "" if growth <= MOST_GROWTH else "  BROKEN")
    return is_kept


def bodies() -> Iterator[tuple[str, bytes, int]]:
    """A name, a body, and how many of it come at once."""
    text = b'{"model":"fake/hello","messages":[{"role":"user","content":"%b"}]}'
    yield "25 MiB of one string", text % (b"a" * (25 * MEGABYTE - 100)), 20
    message = b'{"role":"user","content":"a"}'
    many = b",".join([message] * 560_000)
    yield "560,000 messages", b'{"model":"fake/hello","messages":[%b]}' % many, 20
    nested = b"[" + b"[]," * (8 * MEGABYTE) + b"[]]"
    yield "25 MB of [[],[],…]", nested, 20


def measure_memory(path: Path) -> bool:
    is_kept = True
    for name, body, count in bodies():
        with serving(path) as (_, proxy), ThreadPoolExecutor(count) as pool:
            waits: list[float] = []
            is_over = threading.Event()
            watch = threading.Thread(
                target=ask_for_health, args=(proxy, is_over, waits)
            )
            watch.start()
            statuses = sorted(
                status for status, _ in pool.map(proxy.post, [body] * count)
            )
            is_over.set()
            watch.join()
            peak, longest = memory_mb(proxy.pid, "VmHWM"), max(waits)
            is_kept &= peak < 450 and longest < 0.5
            print(
                f"{count} x {name:22} {peak:5.0f} MB, /health {longest:5.2f} s at the"
                f" longest, statuses {sorted(set(statuses))}"
            )
    return is_kept


SOAK = {"whole calls": (10_000, False), "streams": (2_000, True)}
SOAK_CONNECTIONS = 16
MOST_MORE = 8  # MB


def measure_soak(path: Path, idle: float) -> bool:
    """Memory and threads after many calls on kept connections, and after a while."""
    is_kept = True
    with serving(path) as (_, proxy):
        call_many(proxy, 500, False)  # what is made once
        call_many(proxy, 500, True)
        time.sleep(2)
        first, begun = memory_mb(proxy.pid, "VmRSS"), threads(proxy)
        print(f"after the first 1,000 calls: {first:.1f} MB, {begun} threads")
        for name, (count, is_streamed) in SOAK.items():
            call_many(proxy, count, is_streamed)
            time.sleep(2)
            memory, left = memory_mb(proxy.pid, "VmRSS"), threads(proxy)
            is_kept &= memory < first + MOST_MORE
            print(f"after {count:,} {name}: {memory:.1f} MB, {left} threads")
        time.sleep(idle)
        memory, left = memory_mb(proxy.pid, "VmRSS"), threads(proxy)
        is_kept &= memory < first + MOST_MORE and left <= begun
        print(f"after {idle:.0f} idle seconds: {memory:.1f} MB, {left} threads")
    return is_kept


def threads(proxy: Proxy) -> int:
    return len(os.listdir(f"/proc/{proxy.pid}/task"))


def call_many(proxy: Proxy, count: int, is_streamed: bool) -> None:
    url = urlsplit(proxy.url)
    body = json.dumps({**GO_ON, "model": "fake/hello", "stream": is_streamed})
    headers = {"Authorization": f"Bearer {KEY}"}

    def call(part: int) -> None:
        with closing(HTTPConnection(url.hostname or "", url.port, timeout=60)) as link:
            for _ in range(part):
                link.request("POST", "/v1/chat/completions", body, headers)
                response = link.getresponse()
                response.read()
                assert response.status == 200, response.status

    with ThreadPoolExecutor(SOAK_CONNECTIONS) as pool:
        list(pool.map(call, [count // SOAK_CONNECTIONS] * SOAK_CONNECTIONS))


def ask_for_health(proxy: Proxy, is_over: threading.Event, waits: list[float]) -> None:
    url = urlsplit(proxy.url)
    while not is_over.is_set():
        began = time.monotonic()
        with closing(HTTPConnection(url.hostname or "", url.port, timeout=60)) as link:
            link.request("GET", "/health")
            link.getresponse().read()
        waits.append(time.monotonic() - began)
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description="Show how work and memory grow.")
    parser.add_argument("--proxy", type=Path, default=ROOT / "proxy.py")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--soak", action="store_true")
    parser.add_argument("--idle", type=float, default=120, help="seconds of a soak")
    options = parser.parse_args()
    measure = measure_memory if options.memory else measure_growth
    if options.soak:
        measure = partial(measure_soak, idle=options.idle)
    sys.exit(0 if measure(options.proxy.resolve()) else 1)


if __name__ == "__main__":
    main()
