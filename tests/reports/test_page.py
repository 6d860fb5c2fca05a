"""The page of ``chai report``: what it takes, what it says, and how it behaves in a browser."""

import base64
import json
import re
import shutil

import pytest

from chai_attention.cli.tables import render
from chai_attention.evaluation.points import load_points
from chai_attention.profile import ClusterProfile
from chai_attention.reports.frontier import frontier_plot, frontier_table
from chai_attention.reports.page import write_page
from chai_attention.reports.result_files import load_sections
from chai_attention.reports.sections import ReportError
from result_files import EVERY, attention, evaluation, frontier

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a result of every kind."""
    folder = tmp_path_factory.mktemp("runs")
    for name, make in EVERY.items():
        make(folder / name)
    return folder


@pytest.fixture(scope="module")
def page_file(runs, tmp_path_factory):
    return write_page([runs], tmp_path_factory.mktemp("page") / "report.html", "A title <&>")


def test_every_kind_is_told_apart_by_its_contents(runs, tmp_path):
    for index, name in enumerate(EVERY):
        shutil.copy(runs / name, tmp_path / f"{index}.json")
    kinds = [section.kind for section in load_sections([tmp_path])]
    assert kinds == ["redundancy", "quality frontier", "attention speed", "model speed", "tasks"]
    # a file that is given twice is shown once
    assert len(load_sections([tmp_path, tmp_path / "0.json"])) == 5


def test_what_was_run_on_what_with_baselines_errors_and_ideals(page_file):
    text = re.sub(r"\s+", " ", page_file.read_text())
    for said in (
        "<title>A title &lt;&amp;&gt;</title>",
        "tiny-redundant (llama): 3 layers, 6 heads of 8, 6 K/V heads, float32",
        "some.txt:1: 3 requests of 20 tokens, seed 0",
        "Some GPU",
        "torch 2.99.0",
        "16 sequences of 256 tokens of t.txt (perplexity without clusters 28.70)",
        "+1.23% ±1.10%",
        "(ideal 10 ms)",
        "SDPA cuDNN",
        "out of memory",
        "piqa (80)",
        "58.00 ±1.00 (-2.00 ±0.50)",
        "source of chai",
        "3,000 GB/s",
    ):
        assert said in text, said
    assert "Do not trust" not in text


def test_the_page_opens_with_what_was_saved_what_it_costs_and_gains(runs, tmp_path):
    profile = tmp_path / "profile.json"
    measured = {"rise": 0.004, "standard_error": 0.001, "windows": 64, "length": 1024}
    ClusterProfile(
        (2,), membership="static", representatives=((0, 0, 2, 2),), provenance={"text": "c.txt"},
        promise={**measured, "saved": 0.132, "longer": {**measured, "saved": 0.233, "length": 4096},
                 "recall": {"fall": 0.01, "standard_error": 0.008}},
    ).save(profile)  # fmt: skip
    page = write_page([profile, runs], tmp_path / "page.html").read_text()
    short = re.sub(r"\s+", " ", page.split("<nav")[0].split("In short")[1])
    saves, costs, gains = (part.split("</div>")[0] for part in short.split("<dt>")[1:])
    assert "13.2% of the K,V cache at 1,024 tokens" in saves
    assert "23.3% of the K,V cache at 4,096 tokens" in saves
    assert (
        "perplexity +0.40% ±0.10%, 64 sequences of 1,024 tokens of held-out text of c.txt" in costs
    )
    assert "1.0 ±0.8 points fewer facts recalled" in costs
    assert "-2.00 ±0.50 points in average of piqa (chai; 10.0% of K,V saved" in costs
    assert "perplexity rises by more than 1% on 256 tokens of t.txt" in costs
    assert "1.75x (decode 16 x 8,192, 4 clusters, bfloat16; ideal 1.78x), Some GPU" in gains
    assert '<a href="#run-1">' in saves
    bare = write_page([runs / "redundancy.json"], tmp_path / "bare.html").read_text()
    assert bare.count("not in these results; it comes from") == 3


def test_long_tables_are_folded_below_their_figure(page_file):
    text = page_file.read_text()
    assert "<summary>All points: 8 rows</summary>" in text
    assert text.index("<summary>All points") > text.index("Perplexity rise against")
    assert "<figcaption>Clustered attention</figcaption>" in text  # two rows stand open
    for tag in ("figure", "details"):
        assert text.count(f"<{tag} ") + text.count(f"<{tag}>") == text.count(f"</{tag}>") > 0


@pytest.mark.parametrize("name", ["f.svg", "f.png"])
def test_a_picture_of_frontiers_has_a_panel_per_model(tmp_path, name):
    pytest.importorskip("matplotlib")
    runs = [frontier(tmp_path / f"{i}.json") for i in range(2)]
    runs[1].write_text(runs[1].read_text().replace("tiny-frontier", "other-model"))
    picture = write_page(runs, tmp_path / name, "A title").read_bytes()
    if name == "f.png":
        assert picture.startswith(b"\x89PNG")
        return
    for said in ("tiny-frontier, 256 tokens", "other-model, 1024 tokens", "A title", "gradient"):
        assert said in picture.decode()
    assert write_page(runs, tmp_path / name, "A title").read_bytes() == picture


def test_calibrations_of_one_model_are_not_one_curve(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [frontier(tmp_path / str(i) / "f.json") for i in range(2)]
    together = write_page(runs, tmp_path / "f.svg").read_text()
    assert "1/f.json" not in together
    runs[1].write_text(runs[1].read_text().replace('"seed": 7', '"seed": 8'))
    apart = write_page(runs, tmp_path / "f.svg").read_text()
    for said in ("tiny-frontier (0/f.json), 256 tokens", "tiny-frontier (1/f.json), 256 tokens"):
        assert said in apart


def test_what_a_task_costs_stands_beside_the_bytes_of_its_own_length(tmp_path):
    path = evaluation(tmp_path / "results.json")
    table = json.loads(path.read_text())
    table["tasks"], table["average_of"] = ["piqa", "recall-1-4096"], []
    for row, kept in zip(table["rows"], (1.0, 0.6), strict=True):
        row["average"] = None
        cell = {**row["tasks"]["piqa"], "kind": "recall", "kv_length": 4096, "kv_share": kept}
        row["tasks"]["recall-1-4096"] = cell
    path.write_text(json.dumps(table))
    (section,) = load_sections([path])
    said = [text for _, text in section.answer]
    assert any("in piqa (chai; 10.0% of K,V saved at 66 tokens)" in text for text in said)
    wanted = "in recall-1-4096 (chai; 40.0% of K,V saved at 4096 tokens)"
    assert any(wanted in text for text in said)


def test_a_picture_needs_frontiers(runs, tmp_path):
    with pytest.raises(ReportError, match="a picture is of frontiers"):
        write_page([runs / "model.json"], tmp_path / "f.svg")


def test_the_page_needs_nothing_else(page_file):
    text = page_file.read_text()
    for tag in re.findall(r"<(?:link|script|img|iframe|source)\b[^>]*>", text):
        assert "src=" not in tag, tag
        assert "href=" not in tag or 'href="data:,"' in tag, tag
    assert not re.search(r"@import|url\((?!#)|\bfetch\(|XMLHttpRequest|https?://", text)


def test_names_cannot_break_the_page(tmp_path):
    page = write_page([frontier(tmp_path / "f.json", "<script>alert(1)</script>")],
                      tmp_path / "page.html")  # fmt: skip
    assert "<script>alert" not in page.read_text()
    assert "&lt;script&gt;alert(1)" in page.read_text()


def test_an_unsteady_machine_is_said(tmp_path):
    page = write_page([attention(tmp_path / "a.json", drift=1.6)], tmp_path / "page.html")
    assert "the machine was 1.6 times faster" in page.read_text()


@pytest.mark.parametrize("name", EVERY)
def test_damaged_files_are_named(runs, tmp_path, name):
    whole = (runs / name).read_text()
    path = tmp_path / name
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(ReportError, match=re.escape(f"{path} is damaged, not JSON")):
        load_sections([tmp_path])
    data = json.loads(whole)
    for key in ("about", "benchmark", "run", "kind"):
        if key in data:
            path.write_text(json.dumps({**data, "schema_version": 99}))
            with pytest.raises(ReportError, match=re.escape(str(path))):
                load_sections([path])
    rows = next(key for key in ("layers", "points", "results", "rows") if key in data)
    broken = json.loads(whole)
    for key in list(broken[rows][-1])[1:]:
        broken[rows][-1].pop(key)
    path.write_text(json.dumps(broken))
    with pytest.raises(ReportError, match=re.escape(str(path))):
        load_sections([path])


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        ("[]", "none of what"),
        ('{"clusters": [1, 2]}', "none of what"),
        ('{"benchmark": "other", "schema_version": 1}', "none of what"),
        ('{"checksum": "", "settings": {}, "items": []}', "give the folder of chai eval"),
        ('{"results": NaN', "not JSON"),
    ],
)
def test_files_of_others_are_named(tmp_path, contents, reason):
    path = tmp_path / "x.json"
    path.write_text(contents)
    with pytest.raises(ReportError, match=reason) as caught:
        load_sections([path])
    assert str(path) in str(caught.value)


def test_files_of_others_in_a_folder_are_left_out(runs, tmp_path):
    folder = tmp_path / "results"
    shutil.copytree(runs, folder)
    for name in ("a.json", "z.json"):
        (folder / name).write_text('{"clusters": [1, 2]}')
    left_out = []
    assert len(load_sections([folder], left_out.append)) == len(EVERY)
    assert left_out == [folder / "a.json", folder / "z.json"]
    with pytest.raises(ReportError, match="none of what"):
        load_sections([folder, folder / "z.json"])
    for name in EVERY:
        (folder / name).unlink()
    with pytest.raises(ReportError, match=re.escape(f"{folder / 'a.json'} is none of what")):
        load_sections([folder])


def test_a_page_is_not_written_over_its_inputs(runs, tmp_path):
    path = tmp_path / "results.json"
    shutil.copy(runs / "results.json", path)
    (tmp_path / "link").symlink_to(path)
    before = path.read_bytes()
    for given in ([path], [tmp_path]):
        for out in (path, tmp_path / "link", tmp_path / "." / "results.json"):
            with pytest.raises(ReportError, match="write to another file"):
                write_page(given, out)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "where", "value"),
    [
        ("results.json", ("run", "seed"), "NaN"),
        ("results.json", ("rows", 0, "comparator"), "3"),
        ("model.json", ("results", 1, "run"), "[]"),
        ("model.json", ("benchmark",), "[]"),
        ("attention.json", ("baselines", 0, "baseline"), "{}"),
        ("attention.json", ("shape", "heads"), "NaN"),
        ("frontier.json", ("points", 0, "saved"), "1e308"),
        ("redundancy.json", ("prompts", 0, "block"), "0"),
    ],
)
def test_a_value_of_another_kind_is_one_line_that_names_the_file(
    runs, tmp_path, name, where, value
):
    data = json.loads((runs / name).read_text())
    place = data
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = "@"
    path = tmp_path / name
    path.write_text(json.dumps(data).replace('"@"', value))
    with pytest.raises(ReportError, match=re.escape(name)) as caught:
        write_page([path], tmp_path / "page.html")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "page.html").exists()


def test_names_with_dollars_and_brackets_are_text(tmp_path):
    pytest.importorskip("matplotlib")
    points = load_points(frontier(tmp_path / "f.json", "gradient$^{[/red]\\frac"))
    assert frontier_plot({"m": points}, tmp_path / "f.png").stat().st_size > 0
    assert "gradient$^{[/red]" in render(frontier_table(points), width=300)


def test_nothing_to_report(tmp_path):
    for runs, reason in (([tmp_path], "holds no results"), ([], "nothing to report"),
                         ([tmp_path / "no.json"], "cannot read")):  # fmt: skip
        with pytest.raises(ReportError, match=reason):
            write_page(runs, tmp_path / "page.html")


def test_places_that_cannot_be_written(runs, tmp_path):
    for out in (tmp_path, tmp_path / "no" / "page.html"):
        with pytest.raises(ReportError, match="cannot write"):
            write_page([runs], out)


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    with api.sync_playwright() as play:
        try:
            started = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"needs a Chromium that starts: {str(error).splitlines()[0]}")
        yield started
        started.close()


@pytest.fixture
def visit(browser, page_file):
    """Open the page; afterwards the console must be empty and nothing fetched."""
    said, pages = [], []

    def open_page(**options):
        page = browser.new_page(**options)
        page.set_default_timeout(5000)
        pages.append(page)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url)
                if not request.url.startswith(("file:", "data:")) else None)  # fmt: skip
        page.goto(page_file.as_uri())
        return page

    yield open_page
    for page in pages:
        page.close()
    assert said == []


def pictures(page):
    return page.eval_on_selector_all(".map canvas", "all => all.map(c => c.toDataURL())")


def test_it_renders(visit):
    page = visit(viewport={"width": 1200, "height": 900})
    assert page.locator("main > section").count() == 5
    assert page.locator("svg.chart").count() >= 8
    # K,V and two latencies of two runs
    assert page.locator("svg.chart text", has_text="(ideal 10 ms)").count() == 4
    for held in ("fused: 1.00 GB", "CHAI: 800.00 MB"):
        assert page.locator("svg.chart text", has_text=held).count() == 1
    # the names of all controls, as a screen reader would have them
    for name in ("Layer", "Text", "Clusters from"):
        assert page.get_by_label(name, exact=True).count() == 1
    assert page.eval_on_selector_all("svg.chart", "all => all.every(s => s.ariaLabel)")


def test_layer_and_prompt_change_the_maps(visit):
    page = visit()
    assert page.locator(".map").count() == 6
    seen = [pictures(page)]
    assert len(set(seen[0])) == 6
    for name, option in (("Layer", "2"), ("Text", "</script><b>short"), ("Layer", "0")):
        page.get_by_label(name, exact=True).select_option(label=option)
        assert pictures(page) not in seen
        seen.append(pictures(page))
    assert "7 tokens" in page.locator("[data-role=summary]").inner_text()


def test_maps_are_those_of_the_file(visit, runs):
    page = visit()
    prompt = json.loads((runs / "redundancy.json").read_text())["prompts"][0]
    cells = 10  # 20 tokens, 2 per cell
    shown = page.eval_on_selector_all(
        ".map",
        "all => all.map(b => { const c = b.querySelector('canvas'); return [Number(b.dataset.head),"
        " c.width, [...c.getContext('2d').getImageData(0, c.height - 1, c.width, 1).data]"
        ".filter((_, i) => i % 4 === 0)]; })",
    )
    raw = base64.b64decode(prompt["maps"][0])
    for head, width, reds in shown:
        assert width == cells
        own = raw[head * cells * (cells + 1) // 2 :][: cells * (cells + 1) // 2]
        last = own[-cells:]
        # light: the stronger the darker
        order = sorted(range(cells), key=lambda i: last[i])
        assert [reds[i] for i in order] == sorted(reds, reverse=True)


def test_clusters_and_representatives_are_those_of_the_file(visit, runs):
    page = visit()
    data = json.loads((runs / "redundancy.json").read_text())
    stages = page.get_by_label("Clusters from", exact=True)
    options = stages.locator("option").all_inner_texts()
    assert options == ["its first 3 tokens", "its first 8 tokens", "the whole text (20 tokens)",
                       "all requests (static)"]  # fmt: skip
    wanted = [*data["prompts"][0]["representatives"][1], data["layers"][1]["representatives"]]
    page.get_by_label("Layer", exact=True).select_option(label="1")
    for option, representatives in zip(options, wanted, strict=True):
        stages.select_option(label=option)
        shown = page.eval_on_selector_all(
            ".cluster",
            "all => all.map(c => [...c.querySelectorAll('.map')].map(b => [Number(b.dataset.head),"
            " b.querySelector('.rep') !== null]))",
        )
        found = {}
        for cluster in shown:
            (rep,) = [head for head, marked in cluster if marked]
            found |= {head: rep for head, _ in cluster}
        assert [found[head] for head in range(6)] == representatives


def test_a_map_is_read_by_pointer_and_keyboard(visit):
    page = visit()
    other = page.locator(".map:not(:has(.rep))").first
    other.click()
    assert other.get_attribute("aria-pressed") == "true"
    big = page.locator(".pair canvas")
    assert big.count() == 2  # beside its representative
    cell = page.locator("[data-role=cell]")
    assert '"token 18 token 19 " to "token 0 token 1 "' in cell.inner_text()
    big.first.focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    assert '"token 16 token 17 " to "token 2 token 3 "' in cell.inner_text()
    assert re.search(r"head \d: \d+\.\d%, head \d: \d+\.\d%", cell.inner_text())
    big.first.click(position={"x": 3, "y": 3})
    assert '"token 0 token 1 " to "token 0 token 1 "' in cell.inner_text()
    other.click()
    assert not page.locator("[data-role=reading]").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_never_scrolls_sideways(visit, scheme):
    page = visit(viewport=PHONE, color_scheme=scheme)
    page.locator(".map").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert page.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, svg')"
        " && e.getBoundingClientRect().right > innerWidth + 0.5).length"
    ) == 0  # fmt: skip


CONTRAST = """() => {
  const parse = c => c.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = c => parse(c).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92
    : ((v + 0.055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05); };
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e)
    .backgroundColor; if (c !== 'rgba(0, 0, 0, 0)') return c; } return 'rgb(255, 255, 255)'; };
  const all = document.querySelectorAll('h1, p, dt, dd, th, td, a, small, .chart text, button');
  return Math.min(...[...all]
    .filter(e => e.checkVisibility() && e.className !== 'skip').map(e => { const s =
      getComputedStyle(e); return ratio(e.ownerSVGElement ? s.fill : s.color, behind(e)); }));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(visit, scheme):
    page = visit(color_scheme=scheme)
    assert page.evaluate(CONTRAST) >= 4.5  # WCAG 2.2, 1.4.3


def test_theme(visit):
    page = visit(color_scheme="dark")
    background = "getComputedStyle(document.body).backgroundColor"
    dark, maps = page.evaluate(background), pictures(page)
    button = page.locator("#theme")
    button.click()
    assert "light" in button.inner_text()
    assert page.evaluate(background) == "rgb(255, 255, 255)" != dark
    assert pictures(page) != maps  # drawn anew
    button.click()
    assert "dark" in button.inner_text()
    assert page.evaluate(background) == dark
    page.reload()
    assert "dark" in button.inner_text()  # remembered
    page.emulate_media(media="print")
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    assert not button.is_visible()
