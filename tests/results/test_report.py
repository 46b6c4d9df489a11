"""results/report.html: one page that needs nothing else, says what the records say, and runs nothing they hold."""

import base64
import json
import shutil
import statistics
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from flora.files import ROOT
from flora.launch.entry import main
from flora.results import Store, cells
from flora.results.cells import load
from scripts.make_tables import make_tables
from tests.results import browser
from tests.results.records import settings_of, write

EVIL = "</pre></script><script>window.planted = 1</script><img src=x onerror='window.planted = 2'>"
VALUES = {"flora": (0.90, 0.91, 0.92), "lora": (0.90, 0.90, 0.945), "full": (0.80, 0.81, 0.83)}


@pytest.fixture
def render(tmp_path, script):
    """Run make_tables.py in this process: (exit code, stderr, the page)."""

    def call(*arguments):
        places = ["--results", str(tmp_path / "records"), "--output", str(tmp_path / "out")]
        run = partial(main, make_tables, trace=lambda: False)
        code, _, err = script(run, "make_tables.py", *arguments, *places)
        page = tmp_path / "out" / "report.html"
        return code, err, page.read_text() if page.exists() else None

    return call


@pytest.fixture
def one_table(monkeypatch):
    """No table but eurosat: composing the cells of all takes long."""
    monkeypatch.setattr("flora.results.render.names", lambda: ["eurosat"])


@pytest.fixture
def store(tmp_path, one_table):
    """Records of eurosat's convnext cells, the linear probe missing."""
    store = Store(tmp_path / "records")
    for cell in load("eurosat").cells:
        if cell.model == "convnext" and cell.method in VALUES:
            write(store, cell, VALUES[cell.method][cell.seed], config=settings_of(cell) | {"note": EVIL})
    return store


class Elements(HTMLParser):
    """Tags with their attributes, and texts by the tag that they stand in."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts, self.inside = [], {}, []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside.append(tag)

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def handle_data(self, data):
        if self.inside:
            self.texts.setdefault(self.inside[-1], []).append(data)


def stale(err):
    return {line.rpartition("/")[2] for line in err.splitlines() if line.startswith("stale: ")}


def test_the_page_is_the_same_each_time_and_stale_when_a_record_a_figure_or_itself_changes(store, render, tmp_path):
    code, _, first = render()
    assert code == 0
    assert render("--check")[0] == 0
    assert render()[2] == first
    page, figure = tmp_path / "out" / "report.html", next(tmp_path.rglob("*.png"))

    page.write_text(first.replace("0.9100", "0.9900"))
    code, err, _ = render("--check")
    assert (code, stale(err)) == (1, {"report.html"})
    figure.unlink()
    assert stale(render("--check")[1]) == {"report.html", figure.name}
    assert render()[2] == first

    touched = sorted(store.folder.glob("*.json"))[0]
    touched.write_text(json.dumps(json.loads(touched.read_text()) | {"device": "another"}))
    code, err, _ = render("--check")
    assert code == 1
    assert "report.html" in stale(err)


def test_the_page_asks_the_network_for_nothing(store, render):
    elements = Elements(render()[2])
    links = [a.get("href") or a.get("src") or "" for _, a in elements.tags if a.keys() & {"href", "src"}]
    assert len([link for link in links if link.startswith("data:image/png")]) == 1
    assert {link.partition("/")[0] for link in links if not link.startswith(("data:", "#"))} == {".."}
    (policy,) = [a["content"] for tag, a in elements.tags if tag == "meta" and "Policy" in a.get("http-equiv", "")]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "@import" not in render()[2]
    assert "url(" not in render()[2]


def test_whatever_a_record_holds_is_text_on_the_page(tmp_path, monkeypatch, render, one_table):
    for name in ("configs", "results/reported"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "experiments").mkdir()
    monkeypatch.setattr(cells, "ROOT", tmp_path)
    model = f"model.timm_name='{EVIL.replace(chr(39), '')}'"
    scale = {"common": ["task=digits", "model=timm", model, "adapter=flora"], "grid": {"seed": [0]}}
    (tmp_path / "experiments" / "eurosat.yaml").write_text(yaml.safe_dump({"title": EVIL, "scales": {"mini": scale}}))
    (cell,) = load("eurosat").cells
    named = settings_of(cell)["model"]["timm_name"]
    planted = {"model": named, "metric": EVIL, "device": EVIL, "commit": EVIL, "metrics": {EVIL: 0.5}}
    planted["config"] = settings_of(cell) | {EVIL: EVIL}
    monkeypatch.setattr("flora.results.render.plots", lambda *_: [])  # no such file name
    write(Store(tmp_path / "records"), cell, 0.5, **planted)
    _, err, page = render()
    assert page, err
    elements = Elements(page)
    assert page.count("window.planted = 1") > 5
    assert [tag for tag, _ in elements.tags].count("script") == 1
    assert "planted" not in "".join(elements.texts["script"])
    assert not [a for tag, a in elements.tags if tag == "img" or any(name.startswith("on") for name in a)]
    assert any("window.planted" in text for text in elements.texts["pre"])


LINES = """
const lines = [...document.querySelectorAll("tbody")].filter((b) => b.querySelector(".line").offsetParent !== null);
const cells = (body) => [...body.querySelectorAll(".line td")].map((td) => [td.dataset.column, td.innerText.trim()]);
return lines.map((body) => Object.fromEntries(cells(body)));
"""


@pytest.mark.skipif(bool(browser.missing()), reason=f"not installed: {', '.join(browser.missing())}")
def test_a_browser_shows_what_the_records_say(store, render, tmp_path):
    render()
    page = tmp_path / "out" / "report.html"
    records = [json.loads(path.read_text()) for path in store.folder.glob("*.json")]
    with browser.chromium(tmp_path / "profile") as shown:
        shown.open(page.as_uri())
        lines = shown.run(LINES)
        assert len(lines) == 8
        assert shown.run("return document.getElementById('shown').value") == "8 of 8 lines"

        shown.click("select[name=method] option:nth-child(2)")
        (method,) = {line["method"] for line in shown.run(LINES)}
        assert method == sorted({"flora", "lora", "full", "linear_probe"})[0] == "flora"
        shown.click("select[name=model] option:nth-child(2)")
        (line,) = shown.run(LINES)
        values = [r["value"] for r in records if (r["adapter"], r["model"]) == ("flora", "convnext")]
        mean, std = statistics.fmean(values), statistics.stdev(values)
        assert (line["model"], line["ours"]) == ("convnext", f"{mean:.4f} ± {std:.4f} (n = 3)*")
        assert line["adapter params"] == "50"
        assert shown.run("return location.hash") == "#model=convnext&method=flora"

        visible = "return document.querySelector('tbody:not([hidden]) .more').offsetParent !== null"
        assert not shown.run(visible)
        shown.click("tbody:not([hidden]) button.open")
        assert shown.run(visible)
        assert (
            EVIL in json.loads(shown.run("return document.querySelector('tbody:not([hidden]) pre').innerText"))["note"]
        )
        links = shown.run("return [...document.querySelectorAll('tbody:not([hidden]) .more a')].map(a => a.href)")
        linked = [json.loads(Path(link.removeprefix("file://")).read_text()) for link in links]
        assert [record["value"] for record in linked] == list(VALUES["flora"])

        shown.click("#all")
        assert shown.run(LINES) == lines
        shown.open(page.as_uri() + "#method=linear_probe")
        probes = shown.run(LINES)
        assert {line["method"] for line in probes} == {"linear_probe"}
        assert {line["ours"] for line in probes} == {"-"}
        for width in (1280, 390):
            shown.width(width)
            shown.open(page.as_uri())
            assert shown.run("return document.documentElement.scrollWidth") <= width
            assert len(shown.run(LINES)) == 8
        assert shown.run("return window.planted === undefined && document.images.length === 1")
        assert shown.run("return document.images[0].naturalWidth") > 500


def test_the_page_of_what_was_measured_holds_the_tables_and_figures_that_are_in_git(tmp_path, monkeypatch, script):
    monkeypatch.setattr("flora.results.render.names", lambda: ["classification", "eurosat"])
    out, results = tmp_path / "out", ROOT / "results"
    shutil.copytree(results / "figures", out / "figures")
    run = partial(main, make_tables, trace=lambda: False)
    assert script(run, "make_tables.py", "--results", results / "measured", "--output", out)[0] == 0
    page = (out / "report.html").read_text()
    for table in ("classification", "eurosat"):
        assert (out / "tables" / f"{table}.md").read_text() == (results / "tables" / f"{table}.md").read_text()
        for figure in (results / "figures" / table).iterdir():
            assert base64.b64encode(figure.read_bytes()).decode() in page
    finished = [cell.cell_id for cell in load("eurosat").cells]
    assert all(f"{run_id}.json" in page for run_id in finished)
