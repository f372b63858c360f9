"""The data card and what is published: read back by datasets, and sent by huggingface_hub to a server that keeps it."""

import base64
import http.server
import json
import threading
import urllib.parse

import datasets
import huggingface_hub
import pytest

import bpo
from tiny import scored_rows


@pytest.fixture
def selection(tmp_path):
    path = tmp_path / "private" / "rows.jsonl"
    path.parent.mkdir()
    rows = [{**row, "id": index} for index, row in enumerate(scored_rows(4, 3, conversational=True))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return bpo.select(None, path, budget=8, strategy="margin", config={"max_depth": 2}, progress=False)


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as an upload of small files takes."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub, path = self.server, urllib.parse.urlsplit(self.path).path
        hub.asked.append((path, self.headers.get("Authorization")))
        if path == "/api/repos/create":
            hub.made.append(json.loads(body))
            return self.answer({"url": f"{hub.url}/datasets/me/pairs", "name": "me/pairs"}, hub.status)
        if path.startswith("/api/datasets/me/pairs/preupload/"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if path.startswith("/api/datasets/me/pairs/commit/"):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                else:
                    hub.commits.append((path.rpartition("/")[2], entry["value"]["summary"]))
            return self.answer({"commitUrl": f"{hub.url}/datasets/me/pairs/commit/{'c' * 40}", "commitOid": "c" * 40})
        if path.startswith("/api/datasets/me/pairs/branch/") or path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        return self.answer({"error": f"no {path}"}, 404)

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        self.answer({"error": f"no {self.path}"}, 404)

    def answer(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.asked, server.made, server.commits, server.files, server.status = [], [], [], {}, 200
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def read_back(folder, tmp_path, *arguments):
    return datasets.load_dataset(str(folder), *arguments, split="train", cache_dir=str(tmp_path / "cache"))


def test_the_card_makes_a_saved_selection_a_data_set(selection, tmp_path):
    selection.save(tmp_path / "saved")
    (tmp_path / "saved" / "README.md").write_text(selection.card("odc-by"))
    assert read_back(tmp_path / "saved", tmp_path).to_list() == selection.dataset.to_list()
    assert read_back(tmp_path / "saved", tmp_path, "candidates").num_rows == selection.pairs.num_rows == 12
    assert bpo.Selection.load(tmp_path / "saved").pairs.equals(selection.pairs)
    card = huggingface_hub.DatasetCard.load(tmp_path / "saved" / "README.md")
    assert card.data.license == "odc-by" and "bpo" in card.data.tags
    for said in (
        "| strategy | `margin` |",
        "| budget | `8 pairs` |",
        "| seed | `42` |",
        "| licence of the data | `odc-by` |",
        "- `max_depth=2`",
        selection.summary(),
        "doi       = {10.18653/v1/2025.naacl-long.443}",
        "`bpo_score_gap`",
        f"bpo {bpo.__version__}",
    ):
        assert said in card.text
    assert "not known here" in selection.card() and "license" not in selection.card().split("---")[1]


def test_the_license_of_the_data_goes_along():
    rows = datasets.Dataset.from_list(scored_rows(3, 3))
    rows.info.license = "cc-by-4.0"
    card = bpo.select(None, rows, budget=3, strategy="random", progress=False).card()
    assert 'license: "cc-by-4.0"' in card and "| licence of the data | `cc-by-4.0` |" in card


def test_what_is_published_is_the_selection_with_its_card(selection, hub, tmp_path):
    selection.provenance["command"] = "bpo select secret"
    address = selection.push_to_hub("me/pairs", license="mit", private=True, revision="v2", token="hf_mine")
    assert address == f"{hub.url}/datasets/me/pairs/commit/{'c' * 40}"
    [made] = hub.made
    assert (made["type"], made["name"], made["organization"]) == ("dataset", "pairs", "me")
    assert made.get("visibility") == "private" or made.get("private") is True
    assert hub.commits == [("v2", "Selection of 8 pairs by margin")]
    assert {by for path, by in hub.asked if "/pairs/" in path} == {"Bearer hf_mine"}
    assert any(path.endswith("/branch/v2") for path, _ in hub.asked)
    assert set(hub.files) == {"README.md", "dataset/train.parquet", "pairs.parquet", "selection.json"}
    for name, data in hub.files.items():
        (tmp_path / "there" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "there" / name).write_bytes(data)
    loaded = bpo.Selection.load(tmp_path / "there")
    assert loaded.dataset.to_list() == selection.dataset.to_list() and loaded.pairs.equals(selection.pairs)
    assert read_back(tmp_path / "there", tmp_path).to_list() == selection.dataset.to_list()
    # Texts of responses that were not chosen stay here.
    assert selection.evidence["texts"] and loaded.evidence.keys() == selection.evidence.keys() - {"texts"}
    assert loaded.provenance["data"] == "rows.jsonl" and "command" not in loaded.provenance
    assert b"private" not in hub.files["README.md"] and b"private" not in hub.files["selection.json"]
    assert selection.provenance["command"] == "bpo select secret"


def test_a_hub_that_refuses_is_told(selection, hub):
    hub.status = 403
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="403"):
        selection.push_to_hub("me/pairs", token="hf_mine")
    assert not hub.files
