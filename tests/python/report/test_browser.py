"""Pages in a real browser: what runs, what can be read by whom, and that nothing is asked of a network."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from test_pages import HOSTILE, chosen, demo_rows, large

from pages import browse, browser

pytestmark = pytest.mark.skipif(browser() is None, reason="no Chromium is installed")

# What a page is asked once it is there; the answer stands in the document that the browser prints.
ASK = """<script>addEventListener("load", async () => {
  const answer = await (async () => { %s })();
  const place = document.createElement("script");
  place.type = "application/json"; place.id = "answer";
  place.textContent = JSON.stringify(answer).replaceAll("<", "\\\\u003c");
  document.body.append(place);
});</script>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of a selection, with texts that would run if they could."""
    folder = tmp_path_factory.mktemp("pages")
    rows = demo_rows()
    for row in rows[::5]:
        row["kind"] = HOSTILE
    selection = chosen(rows)
    del selection.evidence["texts"][6:]  # what is to be checked is alike in all
    for example in selection.evidence["texts"][:3]:
        example["text"] = f"{HOSTILE} {example['text']}"
        example["responses"] = [f"{HOSTILE} {text}" for text in example["responses"]]
    selection.report(folder / "selection.html")
    large(4000, 25, 20_000).report(folder / "large.html")
    return folder


def ask(path, question, tmp_path, *options, before=""):
    """The answer of a page, without its policy, to a script."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text(encoding="utf-8"))
    asked = tmp_path / "asked.html"
    asked.write_text(text.replace("</head>", f"{before}{ASK % question}</head>"), encoding="utf-8")
    printed = browse(asked, *options, "--virtual-time-budget=20000", "--dump-dom", profile=tmp_path / "profile")
    (answer,) = re.findall(r'<script type="application/json" id="answer">(.*?)</script>', printed, flags=re.DOTALL)
    return json.loads(answer)


def test_our_script_runs_and_that_of_the_data_does_not(pages, tmp_path):
    printed = browse(pages / "selection.html", "--dump-dom", profile=tmp_path / "profile")
    assert 'type="search"' in printed and "<button" in printed
    assert "<title>run</title>" not in printed and "onerror=alert" not in re.sub(r">[^<]*<", "><", printed)
    # By the policy, even a script that found its way in does not run; without the policy this one would.
    smuggled = tmp_path / "smuggled.html"
    text = (pages / "selection.html").read_text(encoding="utf-8")
    smuggled.write_text(text.replace("</main>", "<script>document.title='run'</script></main>"), encoding="utf-8")
    assert "<title>run</title>" not in browse(smuggled, "--dump-dom", profile=tmp_path / "profile")
    smuggled.write_text(re.sub("<meta http-equiv[^>]*>", "", smuggled.read_text(encoding="utf-8")), encoding="utf-8")
    assert "<title>run</title>" in browse(smuggled, "--dump-dom", profile=tmp_path / "profile")


def test_without_scripts_the_page_is_whole(pages, tmp_path):
    text = (pages / "selection.html").read_text(encoding="utf-8")
    still = tmp_path / "still.html"
    still.write_text(re.sub("script-src 'sha256-[^']*'", "script-src 'none'", text), encoding="utf-8")
    printed = browse(still, "--dump-dom", profile=tmp_path / "profile")
    assert 'type="search"' not in printed and "Kept and dropped pairs, to read" in printed


def test_tables_sort_and_prompts_are_found(pages, tmp_path):
    sorted_, found, all_ = ask(
        pages / "selection.html",
        """const head = document.querySelector("table.sortable th button");
        head.click();
        const lines = [...document.querySelectorAll("table.sortable tbody tr")];
        const rows = lines.map((row) => Number(row.cells[0].textContent));
        const input = document.querySelector("input[type=search]");
        const items = [...document.querySelectorAll("article.prompt")];
        input.value = items[4].querySelector("h3").textContent.toUpperCase();
        input.dispatchEvent(new Event("input"));
        return [rows, items.filter((item) => !item.hidden).length, items.length];""",
        tmp_path,
    )
    assert sorted_ == sorted(sorted_, reverse=True) and len(sorted_) > 50
    assert 1 <= found < all_


@pytest.mark.parametrize(("width", "scheme"), [(390, 0), (1200, 1)], ids=["dark phone", "light screen"])
def test_axe_finds_nothing_and_nothing_is_wider_than_the_window(pages, tmp_path, scheme, width):
    spec = next(filter(None, map(importlib.util.find_spec, ("axe_core_python", "axe_playwright_python"))), None)
    if spec is None:
        pytest.skip("axe-core-python is not installed")
    axe = (Path(spec.origin).parent / "axe.min.js").read_text(encoding="utf-8")
    found = ask(
        pages / "selection.html",
        """for (const each of [...document.querySelectorAll("details")].slice(0, 60)) each.open = true;
        const found = await axe.run({runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]});
        return {
          dark: matchMedia("(prefers-color-scheme: dark)").matches,
          wide: document.documentElement.scrollWidth - innerWidth, width: innerWidth,
          passed: found.passes.length,
          violations: found.violations.map((each) => [each.id, each.nodes[0].html.slice(0, 200)]),
        };""",
        tmp_path,
        f"--window-size={width},900",
        f"--blink-settings=preferredColorScheme={scheme}",
        before=f"<script>{axe}</script>",
    )
    assert found["dark"] == (scheme == 0)
    assert found["violations"] == [] and found["passed"] > 25
    assert found["wide"] <= 0 and abs(found["width"] - width) < 130


def test_100000_pairs_are_drawn_at_once(pages, tmp_path):
    found = ask(
        pages / "large.html",
        """const box = document.querySelector("path.dots").getBBox();
        return {width: box.width, elements: document.querySelectorAll("*").length};""",
        tmp_path,
    )
    assert found["width"] > 800 and found["elements"] < 20_000
    paper = tmp_path / "page.pdf"
    browse(pages / "large.html", f"--print-to-pdf={paper}", profile=tmp_path / "profile")
    assert paper.read_bytes().startswith(b"%PDF") and paper.stat().st_size > 50_000
