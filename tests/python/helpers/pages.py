"""Pages as a parser sees them, and as a real browser does."""

import functools
import html.parser
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
