"""What the proxy costs, beside what the same costs without it.

    python bench/bench.py                          all of it: five minutes
    python bench/bench.py --quick whole crowd-200  two workloads, in short
    python bench/bench.py --proxy old=../old/proxy.py --against other=http://...

Each side is given the same load in turns (A B A B), as processes of their own:

    this one                     a side                    the stand-in
      |                                                          |
      +--> raw ------- create, stream, look up: sockets -------->+
      +--> sdk ------- the same through Replicate's library ---->+
      +--> proxy ----- chat completions ------> a proxy.py ----->+
      +--> another --- chat completions ------> any server ----->+

The stand-in is fake_replicate.py, whose tokens say when they were sent. It
needs Linux; bench/README.md says how to read what is printed.

    Processes  what is started, and what the kernel knows of it
    Talks      calls over raw sockets: all at once, in one thread
    SDK        the same calls as a program makes them with Replicate's library
    Sides      who is measured
    Takes      what each side is put to, and what is kept of that
    Figures    what is read from that: one row per figure
    Workloads  what is measured: one row per workload
    Report     medians, ratios and verdicts
    Main       the program
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import operator
import os
import platform
import re
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
TOKEN, KEY = "r8_fake", "sk-bench"
PATIENCE = 60  # seconds for a load

# == Processes =================================================================
# All is read from outside: no side is asked about itself, or changed.


class Started(NamedTuple):
    pid: int  # 0: not one of ours
    url: str
    began: int = 0


Starting = contextlib.AbstractContextManager[Started]


@contextlib.contextmanager
def bytecode_kept() -> Iterator[None]:
    """Have modules compiled once, as in an image, and nothing left beside them."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PYTHONPYCACHEPREFIX"] = folder
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        yield


@contextlib.contextmanager
def running(
    command: Sequence[str], says: str, cwd: Path = ROOT, **environ: str
) -> Iterator[Started]:
    """Run a server until the end; `says` is a pattern of the line with its address."""
    began = time.monotonic_ns()
    with subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as child:
        try:
            said = (re.search(says, line) for line in child.stdout or ())
            match = next(filter(None, said), None)
            if not match:
                raise SystemExit(f"{' '.join(command)} does not start")
            yield Started(child.pid, match[1], began)
        finally:
            child.terminate()


def stand_in(port: int = 0) -> Starting:
    command = [sys.executable, str(ROOT / "fake_replicate.py"), "--port", str(port)]
    return running(command, "REPLICATE_BASE_URL=(.*)")


def proxy(path: Path, upstream: str, *, script: bool = False) -> Starting:
    """As the image runs it, `python -m proxy`; or as a script."""
    files = ["--models", str(ROOT / "models.json"), "--env-file", os.devnull]
    how = [str(path)] if script else ["-m", path.stem]
    return running(
        [sys.executable, *how, "--port", "0", *files],
        r"on (http\S+/v1)",
        cwd=path.parent,
        REPLICATE_API_TOKEN=TOKEN,
        REPLICATE_BASE_URL=upstream,
        PROXY_API_KEY=KEY,
    )


def family(pid: int) -> list[int]:
    """A process and all that come from it."""
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # threads end at any time
            for child in children.read_text().split():
                found += family(int(child))
    return found


def cpu_ns(pid: int) -> int:
    """The CPU time of a process, its ended threads too: man 3 clock_getcpuclockid."""
    if not pid:
        return 0
    return sum(time.clock_gettime_ns(~each << 3 | 2) for each in family(pid))


def memory_mb(pid: int, what: str) -> float:
    """VmRSS or VmHWM, its peak, from `status`; Pss from `smaps_rollup`."""
    file = "smaps_rollup" if what == "Pss" else "status"
    texts = (Path(f"/proc/{each}/{file}").read_text() for each in family(pid))
    found = (re.findall(rf"(?m)^{what}:\s+(\d+)", text) for text in texts)
    return sum(int(kb) for numbers in found for kb in numbers) / 1024


# == Talks =====================================================================
# A talk is a generator that yields the socket on which it waits and is sent what
# came. One thread drives all of them, so that a thousand cost it little.

Talk = Generator[socket.socket, Any, Any]

STAMP = re.compile(rb"(\d{12,}) ")
LENGTH = re.compile(rb"(?i)content-length: *(\d+)")
LINK = re.compile(rb'"(get|stream)": ?"http://([^/"]+)([^"]+)"')
LAST_CHUNK = b"0\r\n\r\n"


@dataclass
class Sample:
    """One call, in ns of CLOCK_MONOTONIC, which all processes share."""

    began: int = 0
    stamps: list[int] = field(default_factory=list)  # when each token was sent …
    arrivals: list[int] = field(default_factory=list)  # … and when it was here
    ended: int = 0  # 0: it never did

    def hear(self, text: bytes, now: int) -> bytes:
        """Note the stamps in a text; give what may be the beginning of the next."""
        end = 0
        for match in STAMP.finditer(text):
            self.stamps.append(int(match[1]))
            self.arrivals.append(now)
            end = match.end()
        return text[end:][-64:]


class Lines(dict[str, socket.socket]):
    """A connection to each host that is talked to, opened when it is needed."""

    def __missing__(self, host: str) -> socket.socket:
        name, _, port = host.rpartition(":")
        self[host] = sock = socket.create_connection((name, int(port)), PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock


def drive(talks: Sequence[Talk]) -> None:
    """Take each talk a step further whenever its socket has something to say."""
    epoll = select.epoll()
    waiting: dict[int, tuple[socket.socket, Talk]] = {}

    def resume(talk: Talk, sock: socket.socket | None, piece: bytes | None) -> None:
        following = next_socket(talk, piece)
        if following is sock:
            return
        if sock:
            epoll.unregister(sock)
            del waiting[sock.fileno()]
        if following:
            epoll.register(following, select.EPOLLIN)
            waiting[following.fileno()] = following, talk

    for talk in talks:
        resume(talk, None, None)
    deadline = time.monotonic() + PATIENCE
    while waiting and time.monotonic() < deadline:
        for number, _ in epoll.poll(1):
            sock, talk = waiting[number]
            resume(talk, sock, receive(sock))
    epoll.close()


def receive(sock: socket.socket) -> bytes:
    try:
        return sock.recv(65536)
    except OSError:
        return b""


def next_socket(talk: Talk, piece: bytes | None) -> socket.socket | None:
    """A talk whose server refuses or hangs up is over; its sample has no end."""
    try:
        if piece == b"":
            raise ConnectionError
        return talk.send(piece)
    except (StopIteration, ConnectionError):
        return None


def request(to: str, host: str, key: str, body: Any = None, more: str = "") -> bytes:
    text = json.dumps(body).encode() if body else b""
    head = (
        f"{to} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n{more}"
        f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    )
    return head.encode() + text


def read_reply(sock: socket.socket) -> Talk:
    heard = yield sock
    while not is_whole(heard):
        heard += yield sock
    require_success(heard)
    return heard


def is_whole(heard: bytes) -> bool:
    head, _, body = heard.partition(b"\r\n\r\n")
    length = LENGTH.search(head)
    return len(body) >= int(length[1]) if length else heard.endswith(LAST_CHUNK)


def read_stream(sock: socket.socket, sample: Sample) -> Talk:
    rest = yield sock
    require_success(rest)
    while not rest.endswith(LAST_CHUNK):
        rest = sample.hear(rest, time.monotonic_ns())
        rest += yield sock
    sample.hear(rest, time.monotonic_ns())


def require_success(heard: bytes) -> None:
    if not re.match(rb"HTTP/1.1 20\d ", heard):
        raise ConnectionError(heard)


class Load(NamedTuple):
    """So many calls on each of so many lines at once."""

    lines: int = 1
    calls: int = 1
    tokens: int = 10
    stream: bool = False
    paced: bool = False

    def scaled(self, by: float) -> Load:
        return self._replace(calls=max(1, round(self.calls * by)))

    @property
    def model(self) -> str:
        return "fake/stamped" if self.paced else "fake/stamped-at-once"


def ask_openai(url: str, load: Load, lines: Lines, sample: Sample) -> Talk:
    host, path, key = address(url)
    messages = [{"role": "user", "content": "Say when."}]
    body = {"model": load.model, "messages": messages, "max_tokens": load.tokens}
    sock = lines[host]
    to = f"POST {path}/chat/completions"
    sock.sendall(request(to, host, key, {**body, "stream": load.stream}))
    yield from read_stream(sock, sample) if load.stream else read_reply(sock)


def ask_replicate(url: str, load: Load, lines: Lines, sample: Sample) -> Talk:
    """What the proxy asks: a stream is created, followed and looked up."""
    host, path, _ = address(url)
    input = {"prompt": "Say when.", "max_tokens": load.tokens}
    body = {"version": load.model, "input": input}
    more = "" if load.stream else "Prefer: wait=5\r\n"
    sock = lines[host]
    sock.sendall(request(f"POST {path}/predictions", host, TOKEN, body, more))
    links = {name: rest for name, *rest in LINK.findall((yield from read_reply(sock)))}
    for name in (b"stream", b"get") if load.stream else ():
        host, path = (part.decode() for part in links[name])
        lines[host].sendall(request(f"GET {path}", host, TOKEN))
        read = read_stream(lines[host], sample) if name == b"stream" else None
        yield from read or read_reply(lines[host])


def address(url: str) -> tuple[str, str, str]:
    """Host, path and key of http://key@host/path."""
    parts = urlsplit(url)
    return parts.netloc.rpartition("@")[2], parts.path, parts.username or KEY


Ask = Callable[[str, Load, Lines, Sample], Talk]


def talk(ask: Ask, url: str, load: Load, lines: Lines, samples: list[Sample]) -> Talk:
    for _ in range(load.calls):
        sample = Sample(time.monotonic_ns())
        samples.append(sample)
        yield from ask(url, load, lines, sample)
        if not load.stream or len(sample.stamps) == load.tokens:
            sample.ended = time.monotonic_ns()


def talk_all(ask: Ask, url: str, load: Load) -> list[Sample]:
    samples: list[Sample] = []
    with contextlib.ExitStack() as stack:
        lines = [Lines() for _ in range(load.lines)]
        drive([talk(ask, url, load, each, samples) for each in lines])
        for sock in (sock for each in lines for sock in each.values()):
            stack.enter_context(sock)
    return samples


# == SDK =======================================================================
# What a program does that calls Replicate itself, as the library's README says;
# the library has no way to read a stream, so that httpx, which it brings, does.


@functools.lru_cache
def sdk_clients() -> tuple[Any, Any]:
    import httpx
    import replicate

    return replicate.Replicate(bearer_token=TOKEN), httpx.Client()


def sdk_call(url: str, load: Load) -> Sample:
    client, web = sdk_clients()
    client.base_url = url
    sample = Sample(time.monotonic_ns())
    input = {"prompt": "Say when.", "max_tokens": load.tokens}
    create = functools.partial(client.predictions.create, version=load.model)
    if load.stream:
        prediction = create(input=input)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with web.stream("GET", prediction.urls.stream, headers=headers) as response:
            for piece in response.iter_raw():
                sample.hear(piece, time.monotonic_ns())
        client.predictions.get(prediction_id=prediction.id)
    else:
        create(input=input, prefer="wait=5")
    sample.ended = time.monotonic_ns()
    return sample


def sdk_calls(url: str, load: Load) -> list[Sample]:
    return [sdk_call(url, load) for _ in range(load.calls)]


IDLE_SDK = f"""
import replicate, time
client = replicate.Replicate(bearer_token="{TOKEN}")
print("client of", client.base_url, flush=True)
time.sleep(1e6)
"""

# == Sides =====================================================================


@dataclass(frozen=True)
class Side:
    """One way to the same answers."""

    name: str
    at: Started
    play: Callable[[str, Load], list[Sample]]
    fresh: Callable[[], Starting] | None = None  # the same anew, idle …
    script: Callable[[], Starting] | None = None  # … as one types it
    module: Path | None = None


@contextlib.contextmanager
def sides(options: argparse.Namespace) -> Iterator[list[Side]]:
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        api = enter(stand_in(options.port))
        found = [raw_side(api), enter(sdk_side(api.url))]
        for name, path in {"proxy": ROOT / "proxy.py", **dict(options.proxy)}.items():
            fresh = functools.partial(proxy, Path(path).resolve(), api.url)
            typed = functools.partial(fresh, script=True)
            found.append(openai_side(name, enter(fresh()), fresh, typed, Path(path)))
        for name, url in options.against:
            found.append(openai_side(name, Started(0, url)))
        yield found


def raw_side(api: Started) -> Side:
    play = functools.partial(talk_all, ask_replicate)
    path = ROOT / "fake_replicate.py"
    return Side("raw", api, play, stand_in, stand_in, path)


def openai_side(name: str, at: Started, *more: Any) -> Side:
    return Side(name, at, functools.partial(talk_all, ask_openai), *more)


@contextlib.contextmanager
def sdk_side(url: str) -> Iterator[Side]:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pid = pool.submit(os.getpid).result()

        def play(url: str, load: Load) -> list[Sample]:
            return pool.submit(sdk_calls, url, load).result()

        idle = functools.partial(
            running, [sys.executable, "-c", IDLE_SDK], "client of (.*)"
        )
        yield Side("sdk", Started(pid, url), play, idle, None, Path("replicate"))


# == Takes =====================================================================
# What a side is put to, and what is kept of that.


@dataclass
class Taken:
    samples: Sequence[Sample] = ()
    seconds: float = 0
    cpu: int = 0  # ns; 0: not known
    more: Mapping[str, float] = field(default_factory=dict)

    @property
    def calls(self) -> int:
        return sum(bool(sample.ended) for sample in self.samples)

    @property
    def tokens(self) -> int:
        return sum(len(sample.stamps) for sample in self.samples)


def take_load(load: Load, side: Side, scale: float) -> Taken:
    if not side.play(side.at.url, WARM)[0].ended:
        raise SystemExit(f"{side.name} does not answer {WARM.model}")
    cpu, began = cpu_ns(side.at.pid), time.monotonic()
    samples = side.play(side.at.url, load.scaled(scale))
    seconds = time.monotonic() - began
    return Taken(samples, seconds, cpu_ns(side.at.pid) - cpu)


def take_start(side: Side, scale: float) -> Taken:
    took = {}
    if side.module:
        command = [sys.executable, "-c", f"__import__('{side.module.stem}')"]
        began = time.monotonic()
        subprocess.run(command, cwd=side.module.parent, check=True)
        took["import"] = time.monotonic() - began
    if side.script:
        with side.script() as at:
            await_health(at.url)
            took["start"] = (time.monotonic_ns() - at.began) / 1e9
    return Taken(more=took)


def await_health(url: str) -> None:
    """Any answer will do: the stand-in has no such path."""
    host, _, _ = address(url)
    with Lines()[host] as sock:
        sock.sendall(request("GET /health", host, KEY))
        sock.recv(1)


def take_memory(side: Side, scale: float) -> Taken:
    if not side.fresh:
        return Taken()
    with side.fresh() as at:
        time.sleep(0.5)
        took = {"idle": memory_mb(at.pid, "VmRSS"), "pss": memory_mb(at.pid, "Pss")}
        if side.name != "sdk":
            side.play(at.url, CROWD)
            took["crowd"] = memory_mb(at.pid, "VmHWM")
            took["stream"] = (took["crowd"] - took["idle"]) * 1024 / CROWD.lines
            if scale == 1:  # else there are not so many
                side.play(at.url, MANY)
                took["after"] = memory_mb(at.pid, "VmRSS")
    return Taken(more=took)


# == Figures ===================================================================
# What is read from what was taken: one row per figure; None where it is not known.

Value = float | None
Percentile = Callable[[int], Callable[[Taken], Value]]


def percentile(values: Sequence[float], percent: int) -> Value:
    if len(values) < 2:
        return next(iter(values), None)
    return quantiles(values, n=100, method="inclusive")[percent - 1]


def each_call(ns: Callable[[Sample], int]) -> Percentile:
    """Percentiles of something of each call that was answered, in ms."""

    def taken(took: Taken, percent: int) -> Value:
        ended = [ns(sample) / 1e6 for sample in took.samples if sample.ended]
        return percentile(ended, percent)

    return lambda percent: lambda took: taken(took, percent)


def late(percent: int) -> Callable[[Taken], Value]:
    def taken(took: Taken) -> Value:
        calls = (zip(each.arrivals, each.stamps, strict=True) for each in took.samples)
        return percentile([(a - s) / 1e6 for call in calls for a, s in call], percent)

    return taken


def more(name: str) -> Callable[[Taken], Value]:
    return lambda took: took.more.get(name)


def per(count: int, cpu: float) -> Value:
    return cpu / count if cpu and count else None


latency = each_call(lambda sample: sample.ended - sample.began)
first = each_call(lambda sample: sample.arrivals[0] - sample.began)
first_late = each_call(lambda sample: sample.arrivals[0] - sample.stamps[0])
end_lag = each_call(lambda sample: sample.ended - sample.stamps[-1])

FIGURES: dict[str, Callable[[Taken], Value]] = {
    "latency, p50, ms": latency(50),
    "latency, p95, ms": latency(95),
    "first token, p50, ms": first(50),
    "first token, p95, ms": first(95),
    "the first token is late, p50, ms": first_late(50),
    "a token is late, p50, ms": late(50),
    "a token is late, p99, ms": late(99),
    "from `done` to [DONE], p50, ms": end_lag(50),
    "answered in full": lambda took: took.calls,
    "calls/s": lambda took: took.calls / took.seconds,
    "tokens/s": lambda took: took.tokens / took.seconds,
    "CPU per call, ms": lambda took: per(took.calls, took.cpu / 1e6),
    "CPU per token, us": lambda took: per(took.tokens, took.cpu / 1e3),
    "import, s": more("import"),
    "to the first answer on /health, s": more("start"),
    "idle, RSS, MB": more("idle"),
    "idle, PSS, MB": more("pss"),
    "200 streams, most RSS, MB": more("crowd"),
    "  that is, per stream, KB": more("stream"),
    "after 10,000 whole calls, RSS, MB": more("after"),
}

# == Workloads =================================================================
# One row per workload: its figures, each with what is promised of it, if it is;
# "x" is a promise about the ratio to the control.

WARM = Load()
CROWD = Load(lines=200, tokens=200, stream=True, paced=True)
MANY = Load(lines=16, calls=625)


class Workload(NamedTuple):
    why: str
    take: Callable[[Side, float], Taken]
    figures: Mapping[str, str]
    sdk: bool = False
    once: bool = False


def load(
    why: str, figures: Mapping[str, str], given: Load, sdk: bool = False
) -> Workload:
    return Workload(why, functools.partial(take_load, given), figures, sdk)


def crowd(lines: int, *promises: str) -> Workload:
    names = ("first token, p50, ms", "first token, p95, ms", "a token is late, p50, ms")
    more = ("a token is late, p99, ms", "CPU per token, us", "answered in full")
    why = f"{lines} streams at once, 200 tokens each, 50 a second"
    figures = dict(zip(names + more, [*promises, f">= {lines}"], strict=True))
    return load(why, figures, CROWD._replace(lines=lines))


NOTHING = ("",) * 5

WORKLOADS = {
    "whole": load(
        "one whole answer after another",
        {
            "latency, p50, ms": "<= 1 x",
            "latency, p95, ms": "",
            "CPU per call, ms": "<= 1 x",
        },
        Load(calls=200),
        sdk=True,
    ),
    "stream": load(
        "one stream after another, 25 tokens 20 ms apart",
        {
            "first token, p50, ms": "",
            "the first token is late, p50, ms": "<= 3",
            "a token is late, p50, ms": "",
            "a token is late, p99, ms": "",
        },
        Load(calls=4, tokens=25, stream=True, paced=True),
        sdk=True,
    ),
    "end": load(
        "one stream of one token after another, without a pause",
        {
            "first token, p50, ms": "",
            "from `done` to [DONE], p50, ms": "",
            "CPU per call, ms": "",
        },
        Load(calls=100, tokens=1, stream=True),
        sdk=True,
    ),
    "crowd-100": crowd(100, *NOTHING),
    "crowd-200": crowd(200, "<= 250", "<= 500", "<= 1", "<= 25", "<= 100"),
    "crowd-500": crowd(500, *NOTHING),
    "calls": load(
        "whole answers on 16 lines, as fast as can be",
        {"calls/s": ">= 900", "CPU per call, ms": ""},
        Load(lines=16, calls=100),
    ),
    "tokens": load(
        "streams of 2,000 tokens on 16 lines, as fast as can be",
        {"tokens/s": ">= 60000", "CPU per token, us": ""},
        Load(lines=16, calls=3, tokens=2000, stream=True),
    ),
    "start": Workload(
        "a new process",
        take_start,
        {"import, s": "", "to the first answer on /health, s": "<= 0.5"},
        sdk=True,
    ),
    "memory": Workload(
        "memory of a new process",
        take_memory,
        {
            "idle, RSS, MB": "<= 50",
            "idle, PSS, MB": "",
            "200 streams, most RSS, MB": "<= 70",
            "  that is, per stream, KB": "",
            "after 10,000 whole calls, RSS, MB": "",
        },
        sdk=True,
        once=True,
    ),
}

# == Report ====================================================================
# A side's figure is the median of its rounds; a ratio is the median of the ratios
# of each round, as what disturbs a round disturbs all of its sides.

Rounds = Mapping[str, Sequence[Value]]  # by side


def measure(
    workload: Workload, all: Sequence[Side], rounds: int, scale: float
) -> Mapping[str, Rounds]:
    """All rounds, in turns: by figure, then by side."""
    taking = [side for side in all if workload.sdk or side.name != "sdk"]
    names = [side.name for side in taking]
    found: dict[str, dict[str, list[Value]]] = {
        row: {name: [] for name in names} for row in workload.figures
    }
    for _ in range(1 if workload.once else rounds):
        for side in taking:
            taken = workload.take(side, scale)
            for name in workload.figures:
                found[name][side.name].append(FIGURES[name](taken))
    return found


def middle(values: Sequence[Value]) -> Value:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def ratios(these: Sequence[Value], those: Sequence[Value]) -> list[float]:
    pairs = zip(these, those, strict=True)
    return [one / other for one, other in pairs if one is not None and other]


def control_of(rounds: Rounds) -> str:
    """What the SDK does, if it can; else the raw sockets."""
    return "raw" if middle(rounds.get("sdk", ())) is None else "sdk"


def cell(name: str, rounds: Rounds) -> str:
    value, control = middle(rounds.get(name, ())), control_of(rounds)
    if value is None:
        return f"{'-':>9}{'':10}"
    ratio = middle(ratios(rounds[name], rounds[control]))
    told = f"{ratio:8.2f} x" if ratio and name != control else ""
    return f"{short(value):>9}{told:10}"


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def verdict(promise: str, rounds: Rounds) -> str:
    relation, bound, *relative = promise.split() or ("", "")
    these = rounds["proxy"]
    value = middle(ratios(these, rounds[control_of(rounds)]) if relative else these)
    if not promise or value is None:
        return ""
    kept = {"<=": operator.le, ">=": operator.ge}[relation](value, float(bound))
    return f"{promise} {'kept' if kept else 'BROKEN'}"


def versus(name: str, rounds: Rounds) -> str:
    """The proxy beside another: the ratio, and its least and most in a round."""
    found = ratios(rounds["proxy"], rounds[name])
    spread = found and f" ({min(found):.2f} to {max(found):.2f})"
    return f"   {median(found):.2f} x {name}{spread}" if found else ""


def tell_figure(name: str, promise: str, rounds: Rounds, names: Sequence[str]) -> str:
    cells = "".join(cell(side, rounds) for side in names)
    others = "".join(versus(side, rounds) for side in names[3:])
    return f"  {name:35}{cells} {verdict(promise, rounds):16}{others}".rstrip()


def describe_machine() -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return (
        f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, Linux"
        f" {platform.release()}, {os.cpu_count()} x {cpu[1] if cpu else 'CPU'}"
    )


# == Main ======================================================================


def named(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not value:
        raise argparse.ArgumentTypeError("must be of the form NAME=...")
    return name, value


def read_options() -> argparse.Namespace:
    rows = "\n".join(f"  {name:10} {row.why}" for name, row in WORKLOADS.items())
    parser = argparse.ArgumentParser(
        description="What the proxy costs, beside what the same costs without it.",
        epilog=f"workloads:\n{rows}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("only", nargs="*", metavar="WORKLOAD", help="what to measure; else all")
    add("--quick", action="store_true", help="2 rounds of a quarter of the calls")
    add("--rounds", type=int, help="how often each side has its turn (5)")
    add("--json", metavar="FILE", help="keep every round's figures there")
    more: Any = {"type": named, "action": "append", "default": []}
    add("--proxy", metavar="NAME=PATH", help="another proxy.py to start", **more)
    add("--against", metavar="NAME=URL", help="any server like it, running", **more)
    add("--port", type=int, default=0, help="of the stand-in, for such a server")
    options = parser.parse_args()
    if unknown := set(options.only) - WORKLOADS.keys():
        parser.error(f"no such workload: {', '.join(unknown)}")
    options.rounds = options.rounds or (2 if options.quick else 5)
    return options


def main() -> None:
    options = read_options()
    found = {}
    with bytecode_kept(), sides(options) as all:
        names = [side.name for side in all]
        print(f"{describe_machine()}; {options.rounds} rounds\n")
        heads = "".join(f"{name:>9}{'':10}" for name in names)
        print(f"{'':37}{heads} promise")
        for key in options.only or WORKLOADS:
            row = WORKLOADS[key]
            print(f"{key}: {row.why}", flush=True)
            scale = 0.25 if options.quick else 1
            found[key] = measure(row, all, options.rounds, scale)
            for name, promise in row.figures.items():
                print(tell_figure(name, promise, found[key][name], names), flush=True)
    if options.json:
        document = {"on": describe_machine(), "workloads": found}
        Path(options.json).write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
