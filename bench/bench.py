"""Measure proxy.py beside two controls, and print one table.

    python bench/bench.py                          everything: under ten minutes
    python bench/bench.py --quick                  one start in short: under one
    python bench/bench.py whole streams-200        these workloads only
    python bench/bench.py --proxy old=../old/proxy.py --against other=http://...

Every side gets the same load in turns, in front of the same stand-in:

    load generator      sides, a process each          stand-in for Replicate
      |                                                          |
      +----- raw, sdk: the two controls (controls.py) ---------->+
      +----- proxy, and each --proxy: a proxy.py --------------->+
      +----- each --against: any server that is running -------->+

A start is one new process of each side, and of the stand-in. A figure is the median
over the starts, a ratio the median of the ratios within each start. It needs Linux;
bench/README.md says how to read the table.

    Processes       what is started, and what the kernel knows of it
    Load generator  many connections in one thread
    Sides           what is measured
    Measurements    what is done to a side in a turn
    Workloads       the rows of the table, and what is promised of them
    Starts          each workload and side in turns
    Table           medians, ratios and verdicts
    Main            the program
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import json
import operator
import os
import platform
import random
import re
import resource
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple
from urllib.parse import urlsplit

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
TOKEN, KEY = "r8_fake", "sk-bench"
TIMEOUT = 60  # seconds for one load
STARTS = 3  # fewer prove nothing: two starts of one program differ by up to a half


class SideFailed(Exception):
    """A side ended, or did not respond as it should."""


# == Processes =================================================================
# Everything is read from outside: no side is changed, or asked about itself.


@contextlib.contextmanager
def bytecode_kept() -> Iterator[None]:
    """Have modules compiled once, as in an image, and leave nothing beside them."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PYTHONPYCACHEPREFIX"] = folder
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        yield


class Server(NamedTuple):
    process: subprocess.Popen[bytes]
    url: str
    seconds: float  # from its start to its first response


@contextlib.contextmanager
def running(
    arguments: Sequence[str], cwd: Path = ROOT, port: int = 0, **environ: str
) -> Iterator[Server]:
    """Run a Python program that serves on `--port` until the end of the block."""
    port = port or free_port()
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, *arguments, "--port", str(port)],
        cwd=cwd,
        env={**os.environ, "NO_PROXY": "*", **environ},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            wait_for_health(process, port)
            seconds = time.monotonic() - began
            yield Server(process, f"http://127.0.0.1:{port}/v1", seconds)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def free_port() -> int:
    """A port below those that the kernel gives away (ip_local_port_range): a client
    that connects to one of these before a server listens may be given it, and is
    then connected to itself."""
    while True:
        with contextlib.suppress(OSError):
            port = random.randrange(10_000, 32_000)
            socket.create_server(("127.0.0.1", port)).close()
            return port


def wait_for_health(process: subprocess.Popen[bytes], port: int) -> None:
    """Any response will do: the stand-in has no such path."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), connect(f"127.0.0.1:{port}") as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: bench\r\n\r\n")
            if sock.recv(65536).startswith(b"HTTP/1.1 "):
                return
        time.sleep(0.002)
    raise SideFailed(f"does not start: {process.args!r}")


def connect(host: str) -> socket.socket:
    name, _, port = host.rpartition(":")
    sock = socket.create_connection((name, int(port)), TIMEOUT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def process_tree(pid: int) -> list[int]:
    pids = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # threads end at any time
            for child in children.read_text().split():
                pids += process_tree(int(child))
    return pids


def cpu_ns(pid: int) -> int:
    """CPU time of a process and its children, with ended threads, to the nanosecond."""
    # The clock of a process: man 3 clock_getcpuclockid. That of 0 would be ours.
    return pid and sum(
        time.clock_gettime_ns(~each << 3 | 2) for each in process_tree(pid)
    )


def memory_mb(pid: int, name: str) -> float:
    """VmRSS, or its peak, VmHWM."""
    texts = [Path(f"/proc/{each}/status").read_text() for each in process_tree(pid)]
    found = [re.search(rf"(?m)^{name}:\s+(\d+)", text) for text in texts]
    return sum(int(match[1]) for match in found if match) / 1024


# == Load generator ============================================================
# One thread reads all connections over epoll, with no HTTP library, so that a
# thousand of them cost it little. A task is a generator: it yields the socket that
# it waits for and is sent what came, or yields a time in ns and is sent nothing.

Task = Generator["socket.socket | int", bytes, None]

STAMP = re.compile(rb"(\d{12,}) ")
LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)\r\n")
LAST_CHUNK = b"0\r\n\r\n"


class Load(NamedTuple):
    """So many calls on each of so many connections."""

    connections: int = 1
    calls: int = 1
    tokens: int = 10
    stream: bool = False
    paced: bool = False  # Replicate sends a token every 20 ms
    interval: float = 0  # seconds between calls, of all connections; 0: no pause
    delay: float = 0  # seconds before the first
    path: str = "chat/completions"

    def scaled(self, by: float) -> Load:
        """With fewer calls; where there is one only, with fewer tokens."""
        if self.calls > 1:
            return self._replace(calls=max(1, round(self.calls * by)))
        return self._replace(tokens=round(self.tokens * by))

    @property
    def model(self) -> str:
        return "fake/stamped" if self.paced else "fake/stamped-at-once"

    @property
    def body(self) -> Mapping[str, Any]:
        asked = {"model": self.model, "stream": self.stream}
        match self.path:
            case "responses":
                limit = {"max_output_tokens": self.tokens}
                return {**asked, "input": "Say when.", **limit}
            case "images/generations":
                form = {"response_format": "b64_json"}
                return {"model": "acme/poster", "prompt": "A poster.", **form}
            case "embeddings":
                texts = [f"The text of number {n}." for n in range(100)]
                form = {"encoding_format": "base64"}
                return {"model": "acme/embedder", "input": texts, **form}
        messages = [{"role": "user", "content": "Say when."}]
        return {**asked, "messages": messages, "max_tokens": self.tokens}


@dataclass
class Sample:
    """One call, in ns of CLOCK_MONOTONIC, which all processes share."""

    began: int
    stamps: list[int] = field(default_factory=list)  # when each token was sent …
    arrivals: list[int] = field(default_factory=list)  # … and when it was read
    ended: int = 0  # 0: it failed
    error: str = ""

    def record(self, data: bytes, now: int) -> bytes:
        """Keep the stamps in it; give what may be the beginning of the next."""
        end = 0
        for match in STAMP.finditer(data):
            self.stamps.append(int(match[1]))
            self.arrivals.append(now)
            end = match.end()
        return data[end:][-64:]


def run_loads(host: str, loads: Mapping[Load, bytes]) -> list[list[Sample]]:
    """Run loads side by side, each with its request; give the calls of each."""
    began = time.monotonic_ns()
    with contextlib.ExitStack() as stack:

        def send_calls(
            load: Load, request: bytes, number: int, samples: list[Sample]
        ) -> Task:
            sock = None
            for call in range(load.calls):
                if load.interval or load.delay:
                    turn = call * load.connections + number
                    yield began + int((load.delay + turn * load.interval) * 1e9)
                samples.append(sample := Sample(time.monotonic_ns()))
                try:
                    sock = sock or stack.enter_context(connect(host))
                    sock.sendall(request)
                    yield from read_response(sock, sample)
                except OSError as error:
                    sample.error = str(error)
                    return
                # A gateway may strip the last token of a whole response.
                missing = load.tokens - len(sample.stamps)
                if missing <= (0 if load.stream else 1):
                    sample.ended = time.monotonic_ns()
                else:
                    sample.error = f"{missing} of {load.tokens} tokens are missing"

        samples: list[list[Sample]] = [[] for _ in loads]
        EventLoop().run(
            [
                send_calls(load, request, number, found)
                for (load, request), found in zip(loads.items(), samples, strict=True)
                for number in range(load.connections)
            ]
        )
    return samples


def read_response(sock: socket.socket, sample: Sample) -> Task:
    """Read a response to its end; ConnectionError if it is none, or no success."""
    head = b""
    while b"\r\n\r\n" not in head:
        head += yield from read_some(sock)
    head, _, rest = head.partition(b"\r\n\r\n")
    length = LENGTH.search(head + b"\r\n")
    left = int(length[1]) - len(rest) if length else 0
    if not re.match(rb"HTTP/1.1 20\d ", head):
        line = head.partition(b"\r\n")[0]
        raise ConnectionError((line + b" " + rest).decode(errors="replace"))
    while True:
        rest = sample.record(rest, time.monotonic_ns())
        if left <= 0 if length else rest.endswith(LAST_CHUNK):
            return
        piece = yield from read_some(sock)
        left -= len(piece)
        rest += piece


def read_some(sock: socket.socket) -> Generator[socket.socket, bytes, bytes]:
    if piece := (yield sock):
        return piece
    raise ConnectionError("the connection was closed in the middle of a call")


class EventLoop:
    """Resumes each task whenever its socket has data, or its time has come."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.waiting: dict[int, tuple[socket.socket, Task]] = {}
        self.sleeping: list[tuple[int, int, Task]] = []  # a heap: until when, number

    def run(self, tasks: Sequence[Task]) -> None:
        self.sleeping = [(0, number, task) for number, task in enumerate(tasks)]
        deadline = time.monotonic_ns() + int(TIMEOUT * 1e9)
        while self.waiting or self.sleeping:
            # One at a time: what came meanwhile must not wait for all that begin.
            if self.sleeping and self.sleeping[0][0] <= time.monotonic_ns():
                self.resume(heapq.heappop(self.sleeping)[2], None, None)
            due = min(deadline, self.sleeping[0][0] if self.sleeping else deadline)
            seconds = (due - time.monotonic_ns()) / 1e9
            for number, _ in self.epoll.poll(max(0, seconds)):
                sock, task = self.waiting[number]
                data = b""
                with contextlib.suppress(OSError):
                    data = sock.recv(65536)
                self.resume(task, sock, data)
            if time.monotonic_ns() > deadline:
                break
        self.epoll.close()

    def resume(
        self, task: Task, sock: socket.socket | None, data: bytes | None
    ) -> None:
        try:
            awaited = next(task) if data is None else task.send(data)
        except StopIteration:
            awaited = None
        if awaited is sock:
            return
        if sock:
            self.epoll.unregister(sock)
            del self.waiting[sock.fileno()]
        if isinstance(awaited, int):
            heapq.heappush(self.sleeping, (awaited, id(task), task))
        elif awaited:
            self.epoll.register(awaited, select.EPOLLIN)
            self.waiting[awaited.fileno()] = awaited, task


def build_request(url: str, body: Mapping[str, Any], key: str, more: str = "") -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST {urlsplit(url).path} HTTP/1.1\r\nHost: {host_of(url)}\r\n"
        f"Authorization: Bearer {key}\r\n{more}"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def host_of(url: str) -> str:
    return urlsplit(url).netloc.rpartition("@")[2]


# == Sides =====================================================================


class Side(NamedTuple):
    """A proxy.py, a control, or a server that runs already and has a URL only."""

    name: str
    proxy: Path | None = None
    url: str = ""

    def start(
        self, replicate_url: str, *, script: bool = False
    ) -> contextlib.AbstractContextManager[Server]:
        """A proxy.py as the image runs it, `python -m proxy`; or as a script."""
        if not self.proxy:
            control = [str(BENCH / "controls.py"), self.name]
            return running([*control, "--replicate", replicate_url])
        how = [str(self.proxy)] if script else ["-m", self.proxy.stem]
        return running(
            [*how, "--models", str(ROOT / "models.json"), "--env-file", os.devnull],
            cwd=self.proxy.parent,
            REPLICATE_API_TOKEN=TOKEN,
            REPLICATE_BASE_URL=replicate_url,
            PROXY_API_KEY=KEY,
        )


class Turn(NamedTuple):
    """A side that runs, and the stand-in that it runs in front of."""

    side: Side
    url: str
    server: Server | None  # None: not ours
    replicate_url: str
    scale: float  # of the loads
    failures: list[str]

    def run(self, *loads: Load) -> list[list[Sample]]:
        key = urlsplit(self.url).username or KEY
        requests = {
            load: build_request(f"{self.url}/{load.path}", load.body, key)
            for load in loads
        }
        return run_loads(host_of(self.url), requests)

    def run_directly(self, load: Load) -> list[Sample]:
        """The one request that a whole call makes of Replicate, from here."""
        input = {"prompt": "Say when.", "max_tokens": load.tokens}
        body = {"version": load.model, "input": input}
        url = f"{self.replicate_url}/predictions"
        request = build_request(url, body, TOKEN, "Prefer: wait=5\r\n")
        return run_loads(host_of(url), {load: request})[0]

    def note_failed(self, samples: Sequence[Sample]) -> None:
        if failed := [sample for sample in samples if not sample.ended]:
            reason = failed[0].error[:200] or f"no end within {TIMEOUT} s"
            failure = f"{len(failed)} of {len(samples)} calls failed: {reason}"
            self.failures.append(failure)

    def check(self) -> None:
        for load in (Load(), Load(stream=True)):
            for _ in range(20):  # a gateway may hold connections to the last stand-in
                sample = self.run(load)[0][0]
                if sample.ended:
                    break
            else:
                raise SideFailed(f"{self.url} does not serve: {sample.error[:300]}")


# == Measurements ==============================================================
# What is done to a side in a turn, and the figures that come of it. What can't be
# known of a side, such as the memory of one that is not ours, is left out.

Values = dict[str, float]
Measure = Callable[[Turn], Values]


def measure_load(load: Load) -> Measure:
    def measure(turn: Turn) -> Values:
        values = summarize(*run_measured(turn, load.scaled(turn.scale)))
        if turn.server:
            values["peak"] = memory_mb(turn.server.process.pid, "VmHWM")
        return values

    return measure


def run_measured(turn: Turn, load: Load) -> tuple[list[Sample], float, int]:
    """The calls, the seconds that they took, and the CPU of the side in ns."""
    turn.check()
    pid = turn.server.process.pid if turn.server else 0
    cpu, began = cpu_ns(pid), time.monotonic()
    (samples,) = turn.run(load)
    seconds = time.monotonic() - began
    time.sleep(0.05)  # a side may have something to do after its last byte
    turn.note_failed(samples)
    return samples, seconds, cpu_ns(pid) - cpu


def summarize(samples: Sequence[Sample], seconds: float, cpu_ns: int) -> Values:
    ended = [sample for sample in samples if sample.ended]
    tokens = sum(len(sample.stamps) for sample in samples)
    values: Values = {"complete": len(ended)}
    if ended:
        values["latency"] = median((each.ended - each.began) / 1e6 for each in ended)
        values["calls/s"] = len(ended) / seconds
    if ended and tokens:
        first = [(each.arrivals[0] - each.began) / 1e6 for each in ended]
        pairs = [zip(each.arrivals, each.stamps, strict=True) for each in ended]
        late = [(arrival - stamp) / 1e6 for pair in pairs for arrival, stamp in pair]
        values |= {
            "first p50": median(first),
            "first p95": percentile(first, 95),
            "late p50": median(late),
            "late p99": percentile(late, 99),
            "tokens/s": tokens / seconds,
        }
    if ended and cpu_ns:
        values["CPU call"] = cpu_ns / 1e6 / len(ended)
        values["CPU token"] = cpu_ns / 1e3 / tokens if tokens else 0
    return values


def percentile(values: Sequence[float], percent: int) -> float:
    return quantiles([*values, values[-1]], n=100, method="inclusive")[percent - 1]


def measure_whole(turn: Turn) -> Values:
    """Calls of the side and of the stand-in itself, in short turns."""
    direct: list[Sample] = []
    whole, cpu = list[Sample](), 0
    for _ in range(round(4 * turn.scale)):
        direct += turn.run_directly(Load(calls=50))
        samples, _, cpu_ns = run_measured(turn, Load(calls=50))
        whole += samples
        cpu += cpu_ns
    values = summarize(whole, 1, cpu)
    values["direct"] = summarize(direct, 1, 0)["latency"]
    return values | {"added": values["latency"] - values["direct"]}


def measure_starters(turn: Turn) -> Values:
    """How late the tokens of streams are before, and for a second after, many start."""
    turn.check()
    streams = Load(20, tokens=150, stream=True, paced=True)
    starters = Load(200, tokens=15, paced=True, delay=1.5)  # 15 tokens take 0.3 s
    under_way, started = turn.run(streams, starters)
    turn.note_failed(under_way + started)
    begin = min(call.began for call in started)
    late: dict[str, list[float]] = {"before": [], "then": []}
    for call in under_way:
        for stamp, arrival in zip(call.stamps, call.arrivals, strict=True):
            if stamp < begin + 1_000_000_000:
                part = "before" if stamp < begin else "then"
                late[part].append((arrival - stamp) / 1e6)
    latencies = [(each.ended - each.began) / 1e6 for each in started if each.ended]
    if not (all(late.values()) and latencies):
        return {}
    return {
        "late before": median(late["before"]),
        "late p50": median(late["then"]),
        "late p99": percentile(late["then"], 99),
        "latency": median(latencies),
    }


def measure_start(turn: Turn) -> Values:
    if not turn.server:
        return {}
    library, start = [], []
    for _ in range(round(4 * turn.scale)):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", "import replicate"], check=True)
        library.append(time.monotonic() - began)
        with turn.side.start(turn.replicate_url, script=True) as server:
            start.append(server.seconds)
    return {"start": median(start), "imports": median(start) / median(library)}


def measure_idle(turn: Turn) -> Values:
    if not turn.server:
        return {}
    with turn.side.start(turn.replicate_url) as server:
        time.sleep(0.5)
        return {"idle": memory_mb(server.process.pid, "VmRSS")}


def measure_responses(turn: Turn) -> Values:
    """Streams of responses and of chats in turns; a response repeats its text."""
    if not turn.side.proxy:
        return {}
    chats = Load(20, tokens=200, stream=True, paced=True).scaled(turn.scale)
    cpu = {False: 0, True: 0}
    for responses in (False, True) * 2:
        load = chats._replace(path="responses") if responses else chats
        samples, _, cpu_ns = run_measured(turn, load)
        if not all(sample.ended for sample in samples):
            return {}
        cpu[responses] += cpu_ns
    tokens = 2 * chats.connections * chats.tokens
    return {"CPU token": cpu[True] / 1e3 / tokens, "x chat": cpu[True] / cpu[False]}


def measure_made(path: str, calls: int) -> Measure:
    """Whole calls, one after another, of an endpoint that the controls have not."""

    def measure(turn: Turn) -> Values:
        if not turn.side.proxy:
            return {}
        load = Load(calls=calls, tokens=0, path=path)
        return summarize(*run_measured(turn, load.scaled(turn.scale)))

    return measure


def measure_counts(turn: Turn) -> Values:
    if not turn.side.proxy:
        return {}
    command = [sys.executable, str(BENCH / "count_calls.py"), str(turn.side.proxy)]
    command += ["--replicate", turn.replicate_url]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=TIMEOUT, check=True)
    counts: Values = json.loads(done.stdout)
    return counts


# == Workloads =================================================================
# What is measured, and the rows of the table. A promise with an x is one about the
# ratio to `sdk`, another is about the figure itself.


class Workload(NamedTuple):
    title: str
    measure: Measure
    quick: bool = True  # whether it is part of a quick run


CROWD = Load(200, tokens=200, stream=True, paced=True)

WORKLOADS = {
    "start": Workload("a new process, run as a script", measure_start),
    "idle": Workload("a new process before its first call", measure_idle),
    "whole": Workload("one whole call after another", measure_whole),
    "stream": Workload(
        "one stream after another, 25 tokens 20 ms apart",
        measure_load(Load(calls=10, tokens=25, stream=True, paced=True)),
    ),
    "streams-200": Workload(
        "200 streams at once, 200 tokens 20 ms apart", measure_load(CROWD)
    ),
    "streams-500": Workload(
        "500 streams at once, 50 tokens 20 ms apart",
        measure_load(CROWD._replace(connections=500, tokens=50)),
        quick=False,
    ),
    "starters": Workload(
        "20 streams; then 200 calls at once, which Replicate takes 0.3 s to create",
        measure_starters,
    ),
    "steady": Workload(
        "40 whole calls a second, Replicate takes 0.3 s",
        measure_load(Load(40, calls=5, tokens=15, paced=True, interval=1 / 40)),
    ),
    "calls": Workload(
        "whole calls on 16 connections, as fast as can be",
        measure_load(Load(16, calls=100)),
    ),
    "tokens": Workload(
        "streams of 2,000 tokens on 16 connections, as fast as can be",
        measure_load(Load(16, calls=2, tokens=2000, stream=True)),
    ),
    "responses": Workload(
        "20 streams of responses, 200 tokens 20 ms apart", measure_responses
    ),
    "image": Workload(
        "one image after another, of 1 MB and in base64",
        measure_made("images/generations", 20),
    ),
    "embeddings": Workload(
        "100 texts after another, 768 numbers each, in one prediction",
        measure_made("embeddings", 20),
    ),
    "counts": Workload("calls into functions of proxy.py", measure_counts),
}


class Figure(NamedTuple):
    workload: str
    name: str
    key: str  # of what the workload measures
    promise: str = ""
    has_ratio: bool = True


FIGURES = [
    Figure("start", "to the response of /health, s", "start"),
    Figure("start", "x `import replicate` alone", "imports", "<= 1.3", False),
    Figure("idle", "memory, MB", "idle", "<= 42"),
    Figure("whole", "the stand-in alone, p50, ms", "direct", "", False),
    Figure("whole", "added latency, p50, ms", "added", "<= 0.8 x"),
    Figure("whole", "CPU per call, ms", "CPU call", "<= 0.8 x"),
    Figure("stream", "first token, p50, ms", "first p50", "<= 0.6 x"),
    Figure("stream", "a token is late, p50, ms", "late p50"),
    Figure("stream", "CPU per token, us", "CPU token", "<= 0.5 x"),
    Figure("streams-200", "first token, p50, ms", "first p50", "<= 0.2 x"),
    Figure("streams-200", "first token, p95, ms", "first p95", "<= 0.4 x"),
    Figure("streams-200", "a token is late, p50, ms", "late p50", "<= 0.25 x"),
    Figure("streams-200", "a token is late, p99, ms", "late p99", "<= 0.7 x"),
    Figure("streams-200", "CPU per token, us", "CPU token", "<= 0.5 x"),
    Figure("streams-200", "most memory, MB", "peak", "<= 1.15 x"),
    Figure("streams-200", "complete", "complete", ">= 200", False),
    Figure("streams-500", "first token, p50, ms", "first p50"),
    Figure("streams-500", "first token, p95, ms", "first p95"),
    Figure("streams-500", "complete", "complete", ">= 500", False),
    Figure("starters", "a token is late before, p50, ms", "late before"),
    Figure("starters", "a token is late then, p50, ms", "late p50"),
    Figure("starters", "a token is late then, p99, ms", "late p99"),
    Figure("starters", "latency of the 200, p50, ms", "latency"),
    Figure("steady", "latency, p50, ms", "latency"),
    Figure("steady", "CPU per call, ms", "CPU call", "<= 0.9 x"),
    Figure("calls", "calls/s", "calls/s", ">= 1.3 x"),
    Figure("calls", "CPU per call, ms", "CPU call"),
    Figure("tokens", "tokens/s", "tokens/s", ">= 6 x"),
    Figure("tokens", "CPU per token, us", "CPU token"),
    Figure("responses", "CPU per token, us", "CPU token"),
    Figure("responses", "x a stream of a chat", "x chat", "<= 1.3", False),
    Figure("image", "latency, p50, ms", "latency"),
    Figure("image", "CPU per call, ms", "CPU call"),
    Figure("embeddings", "latency, p50, ms", "latency"),
    Figure("embeddings", "CPU per call, ms", "CPU call"),
    Figure("counts", "a whole call", "whole"),
    Figure("counts", "a streamed call of 8 texts", "stream", "<= 250"),
    Figure("counts", "a token more", "token", "<= 10"),
]

# == Starts ====================================================================

Row = dict[str, list[float | None]]  # a figure in each start, by side


class Bench:
    def __init__(self, sides: Sequence[Side], workloads: Sequence[str], scale: float):
        self.sides = sides
        self.workloads = workloads
        self.scale = scale
        self.notes: list[str] = []  # what failed
        self.rows: list[tuple[Figure, Row]] = [
            (figure, {side.name: [] for side in sides})
            for figure in FIGURES
            if figure.workload in workloads
        ]

    def run_start(self, number: int, port: int) -> None:
        """Measure everything once, with new processes."""
        with contextlib.ExitStack() as stack:
            fake = running([str(ROOT / "fake_replicate.py")], port=port)
            url = stack.enter_context(fake).url
            turns = [self.start_side(side, url, stack) for side in self.sides]
            for key in self.workloads:
                # Another side begins each time: the first may fare better, or worse.
                turns = turns[1:] + turns[:1]
                for turn in turns:
                    log(f"start {number}: {key}, {turn.side.name}")
                    self.take_turn(number, key, turn)

    def start_side(
        self, side: Side, replicate_url: str, stack: contextlib.ExitStack
    ) -> Turn:
        try:
            server = None
            if not side.url:
                server = stack.enter_context(side.start(replicate_url))
            url = server.url if server else side.url
            turn = Turn(side, url, server, replicate_url, self.scale, [])
            turn.check()
        except SideFailed as failure:
            raise SystemExit(f"{side.name}: {failure}") from None
        return turn

    def take_turn(self, number: int, key: str, turn: Turn) -> None:
        """A side that fails has no figures in this turn, and a note says why."""
        values: Values = {}
        try:
            values = WORKLOADS[key].measure(turn)
        except (SideFailed, OSError, subprocess.SubprocessError) as error:
            code = turn.server and turn.server.process.poll()
            ended = "" if code is None else f"its process ended with {code}; "
            turn.failures.append(f"{ended}{error}")
        for figure, row in self.rows:
            if figure.workload == key:
                row[turn.side.name].append(values.get(figure.key))
        where = f"start {number}, {key}, {turn.side.name}"
        self.notes += [f"{where}: {failure}" for failure in turn.failures]
        turn.failures.clear()


def log(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


# == Table =====================================================================


def middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def ratios(row: Row, side: str, other: str) -> list[float]:
    """In each start, as what disturbs one disturbs all of its sides."""
    pairs = zip(row[side], row[other], strict=True)
    return [one / two for one, two in pairs if one is not None and two]


def render_row(figure: Figure, row: Row, starts: int) -> str:
    cells = ""
    for side, values in row.items():
        value = middle(values)
        beside = ratios(row, side, "sdk") if figure.has_ratio and side != "sdk" else []
        ratio = f"{render_ratio(median(beside)):>7} x" if beside else ""
        cells += f"{'-' if value is None else render_number(value):>9}{ratio:9}"
    others = ["sdk", *list(row)[3:]] if figure.has_ratio else []
    spreads = "  ".join(render_spread(row, other) for other in others)
    verdict = render_verdict(figure.promise, row, starts)
    return f"  {figure.name:30}{cells}  {verdict:16} {spreads}".rstrip()


def render_number(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def render_ratio(ratio: float) -> str:
    if ratio >= 100:
        return f"{ratio:,.0f}"
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def render_verdict(promise: str, row: Row, starts: int) -> str:
    relation, bound, *relative = promise.split() or ("", "")
    values = ratios(row, "proxy", "sdk") if relative else row["proxy"]
    value = middle(values)
    if not promise or value is None:
        return promise
    kept = {"<=": operator.le, ">=": operator.ge}[relation](value, float(bound))
    doubt = "" if starts >= STARTS else "?"
    return f"{promise} {'kept' if kept else 'BROKEN'}{doubt}"


def render_spread(row: Row, other: str) -> str:
    """The ratio of the proxy to another side: the least and the most of a start."""
    found = ratios(row, "proxy", other)
    if not found or (other == "sdk" and len(found) < 2):
        return ""
    middle = "" if other == "sdk" else f"{render_ratio(median(found))} "
    spread = f"({render_ratio(min(found))} to {render_ratio(max(found))})"
    return f"{middle}{spread if len(found) > 1 else '(one start)'} x {other}"


def render_table(bench: Bench, starts: int) -> Iterator[str]:
    names = [side.name for side in bench.sides]
    yield f"{'':32}" + "".join(f"{name:>9}{'':9}" for name in names) + "  promise"
    for key in bench.workloads:
        yield f"{key}: {WORKLOADS[key].title}"
        for figure, row in bench.rows:
            if figure.workload == key:
                yield render_row(figure, row, starts)


def describe_machine() -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return (
        f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, Linux"
        f" {platform.release()}, {os.cpu_count()} x {cpu[1] if cpu else 'CPU'}"
    )


# == Main ======================================================================


def name_and_value(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not value:
        raise argparse.ArgumentTypeError("must be of the form NAME=...")
    return name, value


def read_options() -> argparse.Namespace:
    rows = "\n".join(f"  {key:12} {row.title}" for key, row in WORKLOADS.items())
    parser = argparse.ArgumentParser(
        description="Measure proxy.py beside two controls.",
        epilog=f"workloads:\n{rows}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("only", nargs="*", metavar="WORKLOAD", help="what to measure; else all")
    add("--quick", action="store_true", help="one start, a quarter of the calls")
    add("--starts", type=int, help=f"how many processes of each side ({STARTS})")
    add("--json", metavar="FILE", help="write every figure of every start there")
    more: Any = {"type": name_and_value, "action": "append", "default": []}
    add("--proxy", metavar="NAME=PATH", help="another proxy.py to start", **more)
    add("--against", metavar="NAME=URL", help="a server that is running", **more)
    add("--port", type=int, default=0, help="of the stand-in, for such a server")
    options = parser.parse_args()
    if unknown := set(options.only) - WORKLOADS.keys():
        parser.error(f"no such workload: {', '.join(sorted(unknown))}")
    for _, path in options.proxy:
        if not Path(path).is_file():
            parser.error(f"no such file: {path}")
    names = [
        "raw",
        "sdk",
        "proxy",
        *(name for name, _ in options.proxy + options.against),
    ]
    if len(set(names)) < len(names):
        parser.error("two sides have one name")
    options.starts = options.starts or (1 if options.quick else STARTS)
    return options


def build_sides(options: argparse.Namespace) -> list[Side]:
    proxies = [("proxy", ROOT / "proxy.py"), *options.proxy]
    return [
        Side("raw"),
        Side("sdk"),
        *(Side(name, proxy=Path(path).resolve()) for name, path in proxies),
        *(Side(name, url=url.rstrip("/")) for name, url in options.against),
    ]


def compile_modules(sides: Sequence[Side]) -> None:
    """So that none is compiled in a process that is measured."""
    paths = [side.proxy for side in sides if side.proxy]
    for path in [ROOT / "replicate", *paths]:
        command = [sys.executable, "-c", f"__import__({path.stem!r})"]
        if subprocess.run(command, cwd=path.parent).returncode:
            raise SystemExit(f"{path.name} can't be imported")


def main() -> None:
    options = read_options()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    usual = [key for key, row in WORKLOADS.items() if row.quick or not options.quick]
    keys = options.only or usual
    bench = Bench(build_sides(options), keys, 0.25 if options.quick else 1)
    began, done = time.monotonic(), 0
    with bytecode_kept(), contextlib.suppress(KeyboardInterrupt):
        compile_modules(bench.sides)
        for done in range(1, options.starts + 1):
            bench.run_start(done, options.port)
    log("")
    minutes = (time.monotonic() - began) / 60
    part = f", {bench.scale:g} of each load" if bench.scale != 1 else ""
    starts = f"{done} start{'s' * (done != 1)}"
    print(f"{describe_machine()}; {starts}{part}, {minutes:.1f} minutes\n")
    print("\n".join(render_table(bench, done)))
    for note in bench.notes:
        print(f"! {note}")
    if options.json:
        rows = [(each.workload, each.name, row) for each, row in bench.rows]
        document = {"on": describe_machine(), "rows": rows}
        Path(options.json).write_text(json.dumps(document, indent=1))
    sys.exit(bool(bench.notes))


if __name__ == "__main__":
    main()
