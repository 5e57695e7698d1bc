"""The hub's paths against a real server on this machine: push, load, refuse."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests import helpers

SHA = "0123456789abcdef0123456789abcdef01234567"
SCRIPT = """
import smidgen as sm
from smidgen.common.errors import DeltaError
import helpers

model = helpers.bert()
sm.attach(model, "LN()")
delta = sm.detach(model)
print(delta.push_to_hub("someone/delta", private=True))
loaded = sm.Delta.load("someone/delta")
helpers.same(delta, loaded)
with sm.attached(model, loaded):
    pass
try:
    sm.Delta.load("someone/nothing")
except DeltaError as error:
    print("refused:", error)
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a push and a download need."""

    files: dict[str, bytes] = {}
    seen: list[str] = []

    def log_message(self, *args):
        self.seen.append(f"{self.command} {self.path}")

    def answer(self, content, status=200, **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self):
        self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound", X_Error_Message="not found")

    def do_GET(self):
        path = self.path.partition("?")[0]
        if "/nothing" in path:
            self.missing()
        elif "/resolve/" in path:
            name = path.rpartition("/")[2]
            if name in self.files:
                tag = {"ETag": f'"{name}-{len(self.files[name])}"', "X_Repo_Commit": SHA}
                self.answer(self.files[name], **tag)
            else:
                self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=SHA)
        elif "/tree/" in path:
            self.answer([{"type": "file", "path": n, "size": len(d), "oid": SHA} for n, d in self.files.items()])
        else:
            siblings = [{"rfilename": name} for name in self.files]
            self.answer({"id": "someone/delta", "modelId": "someone/delta", "sha": SHA, "siblings": siblings})

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/repos/create"):
            self.answer({"url": f"http://{self.headers['Host']}/someone/delta"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self.answer({"files": modes})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"http://{self.headers['Host']}/someone/delta/commit/{SHA}", "commitOid": SHA})
        else:
            self.answer({"warnings": [], "errors": []})


@pytest.fixture
def hub():
    Hub.files, Hub.seen = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_delta_goes_to_the_hub_and_comes_back(hub, tmp_path):
    env = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": "hf_test"}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    process = helpers.script(tmp_path / "push.py", SCRIPT, **env)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said + "\n".join(Hub.seen)
    assert f"{hub}/someone/delta" in said
    assert "refused: someone/nothing is neither a folder nor a delta on the hub (RepositoryNotFoundError)" in said
    assert set(Hub.files) >= {"delta.safetensors", "delta.json", "README.md"}
    assert any("/commit/main" in line for line in Hub.seen)
    assert any("/resolve/" in line for line in Hub.seen)
