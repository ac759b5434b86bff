"""A hub on this machine that holds nothing."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """What was asked of it; `refuses` maps a part of a path to the status that it is answered with."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.refuses = [], {}

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self):
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        status = next((status for part, status in self.server.refuses.items() if part in path), 404)
        body = json.dumps({"error": "not today"}).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


for method in ("GET", "HEAD"):
    setattr(Handler, f"do_{method}", Handler.answer)
