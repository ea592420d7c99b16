"""A server of chat completions and nothing else, as a process of its own: `python chat_process.py PORT NAME`.

Its one model is `inner`, its answer its NAME; to a last message that says "wait" it writes one token and waits until
its client goes.
"""

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NAME = sys.argv[2]


def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
    frame = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "inner"}
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return b"data: " + json.dumps(frame | {"choices": choices}).encode() + b"\n\n"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._whole(200 if self.path == "/v1/models" else 404, {"object": "list", "data": [{"id": "inner"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path != "/v1/chat/completions":
            self._whole(404, {"error": {"message": "no such route"}})
        elif not body.get("stream"):
            message = {"role": "assistant", "content": NAME}
            self._whole(200, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
        else:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.end_headers()
            self.wfile.write(chunk({"role": "assistant", "content": NAME}))
            while body["messages"][-1]["content"] == "wait":
                self.wfile.write(b": still here\n\n")
                time.sleep(0.02)
            self.wfile.write(chunk({}, "stop") + b"data: [DONE]\n\n")

    def _whole(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client has gone."""


if __name__ == "__main__":
    Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
