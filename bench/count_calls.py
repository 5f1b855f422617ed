"""Count the calls into functions of a proxy.py: figures that do not vary.

    python bench/count_calls.py proxy.py --replicate http://127.0.0.1:4000/v1

Serves with it in this process, with `sys.setprofile` in each of its threads, sends
it some calls and prints the counts as JSON. A generator that is resumed counts as a
call. Texts come 20 ms apart, so that each is written by itself.
"""

from __future__ import annotations

import _thread
import argparse
import importlib.util
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from statistics import median_low
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-bench"
SHORT, LONG = 8, 28  # texts in a stream
SETTLED = 0.1  # seconds after which a server has nothing left to do


def profile_threads(path: str) -> list[None]:
    """Give a list that grows by one with each call in a thread started from now on."""
    calls: list[None] = []

    def profile(frame: Any, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename == path:
            calls.append(None)  # atomic, unlike += 1

    def start(function: Callable[..., object], *arguments: Any) -> int:
        def run(*arguments: Any, **keywords: Any) -> None:
            sys.setprofile(profile)
            function(*arguments, **keywords)

        return start_new_thread(run, *arguments)

    start_new_thread = _thread.start_new_thread
    _thread.start_new_thread = start  # it knows nothing of threading.setprofile
    threading.setprofile(profile)
    return calls


def start_server(path: Path, replicate_url: str) -> str:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    settings = module.Settings(
        replicate_api_token="r8_fake",
        proxy_api_key=KEY,
        port=0,
        models_path=str(ROOT / "models.json"),
        replicate_base_url=replicate_url,
    )
    server = module.make_server(settings)
    threading.Thread(target=accept_connections, args=[server], daemon=True).start()
    return str(server.url)


def accept_connections(server: Any) -> None:
    sys.setprofile(None)  # it looks for signals all the time, whether there are calls
    server.serve_forever()


def send_call(connection: HTTPConnection, stream: bool, tokens: int) -> None:
    messages = [{"role": "user", "content": "Say when."}]
    body = {"model": "fake/stamped", "messages": messages, "max_tokens": tokens}
    connection.request(
        "POST",
        "/v1/chat/completions",
        json.dumps({**body, "stream": stream}),
        {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
    )
    response = connection.getresponse()
    if (data := response.read()) and response.status != 200:
        sys.exit(f"The proxy responds {response.status}: {data.decode()}")


def count_calls(path: Path, replicate_url: str, times: int) -> dict[str, float]:
    calls = profile_threads(str(path))
    url = urlsplit(start_server(path, replicate_url))
    connection = HTTPConnection(url.hostname or "", url.port, timeout=30)

    def count(stream: bool, tokens: int) -> int:
        count_one(stream, tokens)  # the first may fill a cache
        return median_low(count_one(stream, tokens) for _ in range(times))

    def count_one(stream: bool, tokens: int) -> int:
        before = len(calls)
        send_call(connection, stream, tokens)
        time.sleep(SETTLED)
        return len(calls) - before

    short = count(True, SHORT)
    per_token = (count(True, LONG) - short) / (LONG - SHORT)
    return {"whole": count(False, SHORT), "stream": short, "token": per_token}


def main() -> None:
    parser = argparse.ArgumentParser(description="Count calls into a proxy.py.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--replicate", metavar="URL", required=True)
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    logging.root.setLevel("INFO")  # it logs each call, as where it serves, to nowhere
    logging.root.addHandler(logging.FileHandler(os.devnull))
    counts = count_calls(options.path.resolve(), options.replicate, options.times)
    print(json.dumps(counts), flush=True)
    os._exit(0)  # its threads may wait for connections


if __name__ == "__main__":
    main()
