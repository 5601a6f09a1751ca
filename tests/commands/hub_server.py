"""A Hub on this machine: the calls that huggingface_hub makes to upload files and to download them again."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

TOKEN = "hf_of_a_test"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories by id: {"private": bool, "files": {path: bytes}}; `stored` has large files by SHA-256."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.stored, self.is_full = {}, {}, False
        self.address = f"http://127.0.0.1:{self.server_port}"
        Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        """Print nothing."""

    def do_POST(self):
        body = self._body()
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid username or password."}, 401)
        if self.path == "/api/validate-yaml":
            return self._json({"warnings": [], "errors": []})
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in files}
            return self._json(
                {"files": [{"path": path, "uploadMode": modes[path], "shouldIgnore": False} for path in files]}
            )
        if self.path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if found := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            return self._commit(found[1], [json.loads(line) for line in body.decode().splitlines()])
        return self._json({"error": "no such call"}, 404)

    def do_PUT(self):
        content = self._body()
        digest = self.path.removeprefix("/objects/")
        if self.server.is_full or hashlib.sha256(content).hexdigest() != digest:
            return self._json({"error": "out of space"}, 403)
        self.server.stored[digest] = content
        return self._json({})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path):
            files = self.server.repositories.get(found[1], {"files": {}})["files"]
            if found[2] not in files:
                return self._send(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            content = files[found[2]]
            tag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            return self._send(content, 200, tag)
        if found := re.match(r"/api/models/([^/]+/[^/]+)(/tree/.*|/revision/.*|$|\?)", self.path):
            if found[1] not in self.server.repositories:
                return self._send(b"", 404, {"X-Error-Code": "RepoNotFound"})
            files = self.server.repositories[found[1]]["files"]
            if found[2].startswith("/tree"):
                return self._json(
                    [{"type": "file", "path": path, "size": len(c), "oid": "0" * 40} for path, c in files.items()]
                )
            siblings = [{"rfilename": path} for path in files]
            return self._json({"id": found[1], "sha": COMMIT, "private": True, "siblings": siblings, "tags": []})
        return self._json({"error": "no such call"}, 404)

    def _create(self, wanted):
        if wanted["organization"] == "others":
            return self._json({"error": "You don't have the rights to create a model under others"}, 403)
        name = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        reply = {"url": f"{self.server.address}/{name}", "name": name}
        if name in self.server.repositories:
            return self._json(reply | {"error": "You already created this model repo"}, 409)
        self.server.repositories[name] = {"private": wanted.get("visibility") == "private", "files": {}}
        return self._json(reply)

    def _batch(self, wanted):
        objects = [
            one
            if one["oid"] in self.server.stored
            else one | {"actions": {"upload": {"href": f"{self.server.address}/objects/{one['oid']}"}}}
            for one in wanted["objects"]
        ]
        return self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name, lines):
        files = self.server.repositories[name]["files"]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
        return self._json({"commitUrl": f"{self.server.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

    def _body(self):
        if self.headers.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _json(self, value, status=200):
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _send(self, content, status, headers):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
