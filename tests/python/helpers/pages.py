"""Pages as a parser sees them, and as a real browser does."""

import base64
import functools
import hashlib
import html.parser
import itertools
import re
import shutil
import subprocess

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(html.parser.HTMLParser):
    """The elements of a page in order, with their attributes and the text below each."""

    def __init__(self, text):
        super().__init__()
        self.text, self.elements, self._open, self.errors = text, [], [], []
        self.feed(text)
        self.close()
        self.errors += [f"<{name}> is not closed" for name, _ in self._open]
        for element in self.elements:
            element["text"] = "".join(element["text"])

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "text": [], **{f"@{name}": value for name, value in attributes}}
        element["inside"] = [name for name, _ in self._open]
        self.elements.append(element)
        if tag not in VOID:
            self._open.append((tag, element))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        if not self._open or self._open[-1][0] != tag:
            self.errors.append(f"</{tag}> closes {self._open[-1][0] if self._open else 'nothing'}")
            return
        self._open.pop()

    def handle_data(self, data):
        for _, element in self._open:
            element["text"].append(data)

    def all(self, tag):
        return [element for element in self.elements if element["tag"] == tag]

    def ids(self):
        return [element["@id"] for element in self.elements if "@id" in element]


def check(text):
    """What holds of every page."""
    page = Page(text)
    assert page.errors == []
    assert [len(page.all(tag)) for tag in ("main", "h1", "script")] == [1, 1, 1]
    assert [each["inside"] for each in page.all("title") if "svg" not in each["inside"]] == [["html", "head"]]
    levels = [int(element["tag"][1]) for element in page.elements if re.fullmatch("h[1-6]", element["tag"])]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = page.ids()
    assert len(ids) == len(set(ids))
    named = [element["@href"] for element in page.all("a")]
    assert all(name[0] == "#" and name[1:] in ids for name in named) and named
    # Nothing is fetched, and what runs is ours.
    (policy,) = [each["@content"] for each in page.all("meta") if each.get("@http-equiv") == "Content-Security-Policy"]
    (script,) = page.all("script")
    digest = base64.b64encode(hashlib.sha256(script["text"].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not [element["tag"] for element in page.elements if "@src" in element or element["tag"] in ("link", "img")]
    assert not [name for element in page.elements for name in element if name.startswith("@on")]
    assert not re.search(
        r"(?:https?:)?//(?!www\.w3\.org/|purl\.org/|creativecommons\.org/|matplotlib\.org)\w",
        text.replace(script["text"], ""),
    )
    # What is drawn is said, too.
    for picture in page.all("svg"):
        said = {"@aria-label", "@aria-labelledby"} & set(picture)
        assert picture.get("@aria-hidden") == "true" or said or "figure" in picture["inside"]
    assert all(cell.get("@scope") for cell in page.all("th") if "thead" in cell["inside"])
    return page


def dots(page):
    """The places of the kept pairs in the scatter plot of a page."""
    (path,) = [element["@d"] for element in page.all("path") if element.get("@class") == "dots"]
    steps = re.findall(r"m(-?\d+) (-?\d+)h0", path)
    assert path == "".join(f"m{across} {down}h0" for across, down in steps)
    places, x, y = [], 0, 0
    for across, down in steps:
        x, y = x + int(across), y + int(down)
        places.append((x, y))
    return places


@functools.cache
def browser():
    """Path of a Chromium, None where there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def browse(page, *options, profile):
    """What a headless browser prints of a page, within a minute."""
    command = [
        browser(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={profile}",
    ]
    done = subprocess.run([*command, *options, page.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout
