"""Two small proxies, the controls that proxy.py is measured against.

    python bench/controls.py sdk --port 4001 --replicate http://127.0.0.1:4000/v1

    sdk  the obvious proxy: http.server, Replicate's library, an httpx stream
    raw  the same on bare sockets with hand-written HTTP: the limit of this design

Both have a thread per connection, serve POST /v1/chat/completions, whole and
streamed, and GET /health, and send Replicate what proxy.py sends: one create for a
whole call; a create, the stream and a look-up of the usage for a streamed one. They
validate nothing and handle no error: they are for the benchmark only.
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

Json = dict[str, Any]
TOKEN = "r8_fake"  # the stand-in's

# == OpenAI's objects ==========================================================


def build_prediction(body: Json) -> Json:
    prompt = "\n".join(message["content"] for message in body["messages"])
    input = {"prompt": prompt, "max_tokens": body["max_tokens"]}
    return {"version": body["model"], "input": input}


def build_usage(metrics: Json) -> Json:
    prompt, output = metrics["input_token_count"], metrics["output_token_count"]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
    }


def build_object(kind: str, id: str, model: str, **fields: Any) -> Json:
    created = int(time.time())
    return {"id": id, "object": kind, "created": created, "model": model, **fields}


def build_completion(model: str, id: str, output: list[str], metrics: Json) -> Json:
    message = {"role": "assistant", "content": "".join(output)}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = build_usage(metrics)
    return build_object("chat.completion", id, model, choices=[choice], usage=usage)


def build_chunk(model: str, id: str, delta: Json, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return build_event(
        build_object("chat.completion.chunk", id, model, choices=[choice])
    )


def build_last_chunks(model: str, id: str, metrics: Json) -> bytes:
    usage = build_usage(metrics)
    last = build_object("chat.completion.chunk", id, model, choices=[], usage=usage)
    end = build_chunk(model, id, {}, "stop")
    return end + build_event(last) + http_chunk(b"data: [DONE]\n\n") + http_chunk(b"")


def build_event(value: Json) -> bytes:
    return http_chunk(b"data: %b\n\n" % json.dumps(value).encode())


def http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


# == The obvious proxy =========================================================


class SDKServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024  # with socketserver's 5, most of 200 clients get nothing

    def __init__(self, port: int, replicate_url: str) -> None:
        import httpx  # here, as `raw` is to do without them
        import replicate

        self.replicate = replicate.Replicate(bearer_token=TOKEN, base_url=replicate_url)
        limits = httpx.Limits(max_connections=None)  # httpx's 100 are less than 200
        headers = {"Authorization": f"Bearer {TOKEN}"}
        self.http = httpx.Client(headers=headers, limits=limits, timeout=60)
        super().__init__(("127.0.0.1", port), SDKHandler)


class SDKHandler(BaseHTTPRequestHandler):
    server: SDKServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # Nagle's algorithm would add 44 ms to a response

    def do_GET(self) -> None:
        self.send_json({"status": "ok"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        create = self.server.replicate.predictions.with_raw_response.create
        if body.get("stream"):
            self.send_stream(body["model"], create(**build_prediction(body)).json())
            return
        made: Any = create(**build_prediction(body), prefer="wait=5").json()
        metrics = made["metrics"]
        self.send_json(
            build_completion(body["model"], made["id"], made["output"], metrics)
        )

    def send_stream(self, model: str, prediction: Any) -> None:
        self.send_head("text/event-stream", "Transfer-Encoding", "chunked")
        with self.server.http.stream("GET", prediction["urls"]["stream"]) as response:
            event = ""
            for line in response.iter_lines():
                name, _, value = line.partition(": ")
                if name == "event":
                    event = value
                elif name == "data" and event == "output":
                    chunk = build_chunk(model, prediction["id"], {"content": value})
                    self.wfile.write(chunk)
        get: Any = self.server.replicate.predictions.with_raw_response.get
        end = get(prediction_id=prediction["id"])
        metrics = end.json()["metrics"]
        self.wfile.write(build_last_chunks(model, prediction["id"], metrics))

    def send_json(self, value: Json) -> None:
        data = json.dumps(value).encode()
        self.send_head("application/json", "Content-Length", str(len(data)))
        self.wfile.write(data)

    def send_head(self, content_type: str, name: str, value: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


# == The same on bare sockets ==================================================

HEAD = "HTTP/1.1 200 OK\r\nContent-Type: {}\r\n{}: {}\r\n\r\n"
LENGTH = re.compile(rb"(?i)content-length: *(\d+)")


class RawServer:
    def __init__(self, port: int, replicate_url: str) -> None:
        self.listener = socket.create_server(("127.0.0.1", port), backlog=1024)
        self.api = urlsplit(replicate_url)
        self.idle: dict[str, list[socket.socket]] = defaultdict(list)  # by host

    def serve_forever(self) -> None:
        while True:
            sock = self.listener.accept()[0]
            threading.Thread(target=self.serve, args=[sock], daemon=True).start()

    def serve(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with sock:
            while message := read_message(sock):
                head, data = message
                if head.startswith(b"GET"):
                    send_json(sock, {"status": "ok"})
                elif (body := json.loads(data)).get("stream"):
                    self.send_stream(sock, body)
                else:
                    made = self.create(body, "Prefer: wait=5\r\n")
                    facts = made["id"], made["output"], made["metrics"]
                    send_json(sock, build_completion(body["model"], *facts))

    def send_stream(self, sock: socket.socket, body: Json) -> None:
        model, made = body["model"], self.create(body)
        head = HEAD.format("text/event-stream", "Transfer-Encoding", "chunked")
        sock.sendall(head.encode())
        for texts in self.follow(made["urls"]["stream"]):
            chunks = (build_chunk(model, made["id"], {"content": t}) for t in texts)
            sock.sendall(b"".join(chunks))
        metrics = self.fetch(made["urls"]["get"])["metrics"]
        sock.sendall(build_last_chunks(model, made["id"], metrics))

    def create(self, body: Json, headers: str = "") -> Json:
        data = json.dumps(build_prediction(body)).encode()
        headers += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        return self.fetch(f"{self.api.geturl()}/predictions", "POST", headers, data)

    def fetch(
        self, url: str, method: str = "GET", headers: str = "", data: bytes = b""
    ) -> Json:
        sock, host = self.send(url, method, headers, data)
        message = read_message(sock)
        self.idle[host].append(sock)
        value: Json = json.loads(message[1] if message else b"{}")
        return value

    def follow(self, url: str) -> Iterator[list[str]]:
        """Yield the texts of a stream, those together that came together."""
        sock, host = self.send(url, "GET")
        buffer = receive_until(sock, b"\r\n\r\n").partition(b"\r\n\r\n")[2]
        is_over = False
        while not is_over:
            texts = []
            while b"\r\n" in buffer:
                size, _, rest = buffer.partition(b"\r\n")
                if len(rest) < (length := int(size, 16)) + 2:
                    break
                event, buffer = rest[:length].decode(), rest[length + 2 :]
                is_over = not length
                if event.startswith("event: output"):  # one event a chunk
                    texts.append(event.partition("\ndata: ")[2][:-2])
            if texts:
                yield texts
            if not is_over:
                buffer += sock.recv(65536)
        self.idle[host].append(sock)

    def send(
        self, url: str, method: str, headers: str = "", data: bytes = b""
    ) -> tuple[socket.socket, str]:
        parts = urlsplit(url)
        head = (
            f"{method} {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
            f"Authorization: Bearer {TOKEN}\r\n{headers}\r\n"
        )
        try:
            sock = self.idle[parts.netloc].pop()
        except IndexError:
            sock = socket.create_connection((parts.hostname, parts.port or 80))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(head.encode() + data)
        return sock, parts.netloc


def read_message(sock: socket.socket) -> tuple[bytes, bytes] | None:
    """Head and body; None where the other side has closed the connection."""
    head, _, body = receive_until(sock, b"\r\n\r\n").partition(b"\r\n\r\n")
    found = LENGTH.search(head)
    while found and len(body) < int(found[1]):
        body += sock.recv(65536)
    return (head, body) if head else None


def receive_until(sock: socket.socket, mark: bytes) -> bytes:
    received = b""
    while mark not in received and (piece := sock.recv(65536)):
        received += piece
    return received


def send_json(sock: socket.socket, value: Json) -> None:
    data = json.dumps(value).encode()
    head = HEAD.format("application/json", "Content-Length", len(data))
    sock.sendall(head.encode() + data)


# == Main ======================================================================


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve one of the two controls.")
    parser.add_argument("control", choices=["sdk", "raw"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--replicate", metavar="URL", required=True)
    options = parser.parse_args()
    server = SDKServer if options.control == "sdk" else RawServer
    server(options.port, options.replicate).serve_forever()


if __name__ == "__main__":
    main()
