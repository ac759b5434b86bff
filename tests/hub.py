"""A hub of a few routes on this machine, for `sleb apply --push`."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

JANE = {
    "type": "user",
    "name": "jane",
    "orgs": [{"name": "acme", "roleInOrg": "write"}, {"name": "far", "roleInOrg": "read"}],
    "auth": {"type": "access_token", "accessToken": {"role": "write", "displayName": "t"}},
}


class Hub(ThreadingHTTPServer):
    """What was asked of it, and what it holds."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.user, self.created, self.files, self.objects = JANE, [], {}, {}
        self.token, self.meanwhile = "good", lambda: None
        self.repos, self.asked, self.refuses, self.commits = {"acme/old": "private"}, [], {}, 0

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def reply(self, data, status=200, **headers):
        body = json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def answer(self):
        hub, path = self.server, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append(f"{self.command} {path}")
        routes = {
            "/api/whoami-v2": self.whoami, "/api/repos/create": self.create, "/preupload/": self.modes,
            "/info/lfs/objects/batch": self.batch, "/store/": self.store, "/commit/": self.commit, "/tree/": self.tree,
            "/api/validate-yaml": self.validate,
            "": self.repo,
        }  # fmt: skip
        refused = [status for part, status in hub.refuses.items() if part in path]
        if refused:
            self.reply({"error": "not today"}, refused[0])
        else:
            next(route for part, route in routes.items() if part in path)(hub, path, body)

    def whoami(self, hub, path, body):
        # An address with a name and a token in it has the client send them instead.
        basic = base64.b64encode(f"jane:{hub.token}".encode()).decode()
        known = self.headers.get("Authorization") in (f"Bearer {hub.token}", f"Basic {basic}")
        self.reply(hub.user) if known else self.reply({"error": "Invalid token"}, 401)

    def create(self, hub, path, body):
        asked = json.loads(body)
        hub.created.append(asked)
        hub.meanwhile()
        visibility = asked.get("visibility") or {True: "private", False: "public"}[asked["private"]]
        hub.repos.setdefault(f"{asked['organization']}/{asked['name']}", visibility)
        self.reply({"url": f"{hub.address}/{asked['organization']}/{asked['name']}"})

    def modes(self, hub, path, body):
        paths = [file["path"] for file in json.loads(body)["files"]]
        large = {True: "lfs", False: "regular"}
        modes = [(path, large[path.endswith(".safetensors")]) for path in paths]
        self.reply({"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]})

    def batch(self, hub, path, body):
        objects = [
            thing | {"actions": {"upload": {"href": f"{hub.address}/store/{thing['oid']}"}}}
            for thing in json.loads(body)["objects"]
        ]
        self.reply({"transfer": "basic", "objects": objects})

    def store(self, hub, path, body):
        hub.objects[path.removeprefix("/store/")] = body
        self.reply({})

    def validate(self, hub, path, body):
        self.reply({"errors": [], "warnings": []})

    def tree(self, hub, path, body):
        files = [(name, len(content)) for name, content in hub.files.items()]
        self.reply([{"type": "file", "path": name, "oid": "c" * 40, "size": size} for name, size in files])

    def commit(self, hub, path, body):
        hub.commits += 1
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[value["path"]] = hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del hub.files[value["path"]]
        url = f"{hub.address}/acme/small/commit/{'a' * 40}"
        self.reply({"success": True, "commitOid": "a" * 40, "commitUrl": url})

    def repo(self, hub, path, body):
        name = path.removeprefix("/api/models/").partition("/revision/")[0]
        if name in hub.repos:
            self.reply({"id": name, "sha": "b" * 40, "siblings": [], "private": hub.repos[name] == "private"})
        else:
            self.reply({"error": "Repository not found"}, 404, **{"X-Error-Code": "RepoNotFound"})


for method in ("GET", "POST", "PUT", "HEAD"):
    setattr(Handler, f"do_{method}", Handler.answer)
