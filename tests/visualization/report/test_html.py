"""The report as a page: one file that loads nothing, escapes everything, and works by mouse, keyboard and reader."""

import base64
import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from ssl_vit.evaluation.segmentation.iou import iou, pool_mask_to_patches
from ssl_vit.models.attention_maps import attention_mass_mask, upsample_mask
from ssl_vit.visualization.image_grid import TitledFigure
from ssl_vit.visualization.report.encode import encode_maps, outline_path
from ssl_vit.visualization.report.html import render
from ssl_vit.visualization.report.report_data import (
    Curve,
    EmbeddingMap,
    GalleryImage,
    HealthRow,
    MaskImage,
    MetricRow,
    NeighborImage,
    ReportData,
)
from ssl_vit.visualization.report.svg_charts import interval_chart, line_chart

ODD = "</script><img src=x onerror=alert(1)>\"'&`<!--\udcff.jpg"
SHOWN = ODD.replace("\udcff", "\\udcff")  # what UTF-8 cannot say stands as JSON writes it
EMPTY = ReportData("nothing")


def pixels(seed: int, size: tuple[int, int]) -> Image.Image:
    """Smooth colors (width, height), as photographs have them."""
    coarse = np.random.default_rng(seed).integers(0, 255, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def maps_of(seed: int, heads: int, rows: int, columns: int) -> torch.Tensor:
    """Attention maps (heads, rows, columns) with a few strong patches among many weak ones; each sums to 1."""
    logits = 2 * torch.randn(heads, rows * columns, generator=torch.Generator().manual_seed(seed))
    return logits.softmax(-1).view(heads, rows, columns)


def disc(height: int, width: int) -> torch.Tensor:
    """A mask (height, width) of an ellipse beside the middle."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return (rows - 0.1) ** 2 + 2 * (columns + 0.2) ** 2 < 0.4


def seen(seed: int, name: str, heads: int = 3, rows: int = 24, columns: int = 32) -> GalleryImage:
    truth, valid = disc(90, 121), torch.ones(90, 121, dtype=torch.bool)
    if name == "0.jpg":
        valid[:20, :60] = False  # void
    truth &= valid
    maps = maps_of(seed, heads, rows, columns) / 2 + 0.5 / (rows * columns)
    with_mean = torch.cat([maps, maps.mean(0, keepdim=True)])
    ious = iou(attention_mass_mask(with_mean, 0.6), pool_mask_to_patches(truth, (rows, columns), valid)).tolist()
    return GalleryImage(name, pixels(seed, (121, 90)), maps, truth, valid, ious)


@pytest.fixture(scope="module")
def content() -> ReportData:
    row = MetricRow(
        task="knn",
        task_title="Nearest neighbors (kNN)",
        metric="top-1, k=20",
        title=f"top-1 {ODD}",
        data=ODD,
        value=0.61,
        low=0.60,
        high=0.62,
        interval="Wilson",
        n=10_000,
        baselines={"random init": 0.29, ODD: 0.34},
        remark=ODD,
        result="k.json",
        level="main",
    )
    curves = [
        Curve("Loss", "nats", {"loss": [(step, 6 / (1 + step / 100)) for step in range(300)], ODD: [(0, 1.0)]}, 2.0),
        Curve(ODD, ODD, {"rank": [(0, 1.0), (1, math.nan), (2, 3.0)]}, None),
    ]
    predicted = torch.stack([disc(24, 32), torch.ones(24, 32, dtype=torch.bool)])
    masks = [
        MaskImage(f"{n}.jpg", pixels(n, (121, 90)), disc(90, 121), predicted, {"attention": score, ODD: 1 - score})
        for n, score in enumerate([0.5, 0.9, 0.1])
    ]
    query = NeighborImage(pixels(7, (32, 32)), ODD, "cat", None, None)
    right = query._replace(similarity=0.9, same_class=True)
    wrong = query._replace(label=ODD, similarity=0.5, same_class=False)
    points = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    features = EmbeddingMap(
        points,
        torch.arange(30) % 4 - 1,
        ["cat", "dog", ODD],
        [f"{place}{ODD}" for place in range(30)],
        [pixels(place, (48, 32)) for place in range(30)],
        "The first two principal components.",
    )
    figures = [
        TitledFigure(ODD, pixels(3, (900, 300)), "How to read `it`."),
        TitledFigure("small", pixels(4, (300, 300)), ODD),
    ]
    return ReportData(
        title=ODD,
        metadata={"command": f"`ssl-vit report` {ODD}", "seed": "0"},
        metrics=[
            row,
            row._replace(task="linear", baselines={}, remark=""),
            row._replace(task="fewshot", title="with few labels", level="further"),
            row._replace(task="attention", title="with the object's size", level="ground truth"),
        ],
        caption={"method": "DINO", "images": ODD},
        curves=curves,
        health_warnings=[HealthRow("collapse", 120, ODD, "Lower `method.teacher_temperature`.")],
        attention_mass=0.6,
        gallery=[seen(0, "0.jpg"), seen(1, ODD), seen(2, "]]>\u2028&lt;")._replace(ground_truth=None, ious=None)],
        masks=masks,
        neighbors=[[query, right, wrong], [query, wrong, wrong]],
        embedding_map=features,
        figures=figures,
        config={"data": {"root": ODD}},
        protocol={"masks": ODD},
        missing={"transfer": f"Not measured: `ssl-vit transfer` {ODD}"},
    )


@pytest.fixture(scope="module")
def html(content) -> str:
    return render(content)


class Structure(HTMLParser):
    """What a browser would read of the page: elements with their attributes, texts, and the data of its scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements, self.texts, self.scripts, self.open = [], [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open = tag

    def handle_data(self, data):
        (self.scripts if self.open == "script" else self.texts).append(data)


def test_render_loads_nothing(html):
    structure = Structure(html)
    links = [
        value
        for _, attributes in structure.elements
        for key, value in attributes.items()
        if key in ("src", "href", "xlink:href")
    ]
    assert len(links) > 50
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not re.search(r"https?://(?!www\.w3\.org)|@import|//cdn|\bfetch\(|XMLHttpRequest", html)
    assert set(re.findall(r"url\((.)", html)) <= {"#", "$"}  # of charts, and of the script that shows thumbnails
    ids = [attributes["id"] for _, attributes in structure.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_render_escapes_names_of_any_characters(html):
    structure = Structure(html)
    assert [tag for tag, _ in structure.elements].count("script") == html.count("</script") == 2
    assert not any("onerror" in attributes for _, attributes in structure.elements)
    told = "".join(structure.texts)
    assert f"<title>{SHOWN}" not in html
    assert told.count(SHOWN) >= 15
    data = json.loads(structure.scripts[0])
    assert data["embeddingMap"]["classes"] == ["cat", "dog", ODD]
    assert data["gallery"][1]["name"] == ODD
    assert data["gallery"][2]["name"] == "]]>\u2028&lt;"
    assert not set(structure.scripts[0]) & set("<>&")
    html.encode("utf-8")


def test_render_is_reproducible_whatever_the_users_style(content, html):
    with matplotlib.rc_context({"font.size": 20, "svg.fonttype": "path", "axes.grid": True, "svg.hashsalt": "other"}):
        assert render(content) == html


def test_render_of_nothing_says_what_is_missing():
    html = render(replace(EMPTY, missing={"curves": "No metrics.csv: `ssl-vit pretrain` writes it."}))
    structure = Structure(html)
    assert "nothing was found wrong" in html
    assert "No metrics.csv: <code>ssl-vit pretrain</code> writes it." in html
    headings = [attributes["href"] for tag, attributes in structure.elements if tag == "a"]
    assert headings == ["#content", "#health", "#missing"]


def test_render_of_a_full_report_stays_small(content):
    """A quarter of one: 10 images with 12 heads, 250 thumbnails, 6 masks, 5 rows of neighbors."""
    attended = [seen(place, str(place), heads=12, rows=30, columns=40) for place in range(10)]
    attended = [each._replace(image=pixels(place, (480, 360))) for place, each in enumerate(attended)]
    photos = [pixels(place, (96, 96)) for place in range(45)]
    features = EmbeddingMap(
        torch.randn(250, 2),
        torch.arange(250) % 10,
        [f"class {number}" for number in range(10)],
        [f"class/{place:05}.jpg" for place in range(250)],
        [photos[place % 45] for place in range(250)],
        "",
    )
    full = replace(
        content,
        gallery=attended,
        masks=[content.masks[0]._replace(image=each.image) for each in attended[:6]],
        neighbors=[
            [NeighborImage(photo, "a", "b", 0.5, None) for photo in photos[row * 9 : row * 9 + 9]] for row in range(5)
        ],
        embedding_map=features,
        curves=[],
    )
    assert len(render(full).encode()) < 1e6


@pytest.mark.parametrize(("sharpness", "outlier"), [(0.01, 0), (0.3, 0), (0.3, 4), (3, 0), (8, 0)])
def test_encode_maps_keeps_the_masks(sharpness, outlier):
    """From nearly uniform maps, also under one patch that towers above them, to such of a few patches."""
    truth = pool_mask_to_patches(disc(300, 400), (29, 41))
    logits = sharpness * torch.randn(11, 29, 41, generator=torch.Generator().manual_seed(0))
    logits[:, 3, 5] += outlier
    maps = logits.flatten(1).softmax(-1).view(11, 29, 41)
    encoded, tops = encode_maps(maps)
    levels = np.frombuffer(base64.b64decode(encoded), "<u2")
    read = torch.from_numpy(levels / 65535).view(maps.shape) ** 2 * torch.tensor(tops)[:, None, None]
    for mass in (0.4, 0.6, 0.9):
        before, after = attention_mass_mask(maps, mass), attention_mass_mask(read, mass)
        torch.testing.assert_close(iou(after, truth), iou(before, truth), atol=0.01, rtol=0)
        assert ((before ^ after).sum((-2, -1)) <= 0.015 * maps[0].numel()).all()


@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (30, 20), (100, 40)])
def test_outline_path_encloses_the_mask_and_nothing_else(shape):
    for share in (0.0, 0.3, 0.7, 1.0):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < share
        assert torch.equal(filled(outline_path(mask), shape), mask)


def filled(path: str, shape: tuple[int, int]) -> torch.Tensor:
    """The cells from whose center a ray to the right meets the path an odd number of times."""
    inside = torch.zeros(shape, dtype=torch.bool)
    rows, columns = ((torch.arange(side).double() + 0.5) * 1000 / side for side in shape)
    for loop in path.split("Z"):
        corners = [tuple(map(float, corner.split())) for corner in loop.strip().removeprefix("M").split("L") if corner]
        for (x, y), (next_x, next_y) in zip(corners, [*corners[1:], *corners[:1]], strict=True):
            if y != next_y:
                across = (rows >= min(y, next_y)) & (rows < max(y, next_y))
                meets = x + (rows - y) / (next_y - y) * (next_x - x)
                inside ^= across[:, None] & (columns < meets[:, None])
    return inside


def test_outline_path_of_a_large_mask_has_fewer_cells():
    mask = disc(1500, 2000)
    path = outline_path(mask)
    assert len(path) < 4000
    assert torch.equal(filled(path, (192, 256)), upsample_mask(mask, (192, 256)))


def test_line_chart_is_text_in_the_colors_of_the_page(content):
    loss, chart = content.curves[0], line_chart(content.curves[0])
    assert chart == line_chart(loss)
    assert ">step</text>" in chart and ">nats</text>" in chart
    assert set(re.findall(r": (#\w+)", chart)) <= {"#ffffff", "#000000"}
    assert {"var(--line-0)", "var(--line-1)", "var(--muted)"} <= set(re.findall(r"var\(--[\w-]+\)", chart))
    assert "loss goes from 6 at step 0 to 1.504 at step 299" in chart
    assert len(chart) < 20_000
    numbers = interval_chart(content.metrics)
    assert "knn, top-1, k=20: 61.0%, 60.0% to 62.0%" in numbers
    assert not set(re.findall(r'id="([^"]+)"', numbers)) & set(re.findall(r'id="([^"]+)"', chart))


def test_line_chart_of_nothing_finite_is_empty():
    assert "no points" in line_chart(Curve("Loss", "nats", {"loss": [(0, math.inf)], "none": []}, None))


def test_render_shows_the_main_metrics_and_folds_the_others(content, html):
    section = html[html.index('<section id="metrics">') : html.index('<section id="gallery">')]
    sight, *folded = section.split("<details>")
    assert "with few labels" not in sight and "with the object" not in sight
    assert ["with few labels" in text for text in folded] == [True, False]
    assert ["with the object" in text for text in folded] == [False, True]
    assert "Further numbers (1)" in folded[0]
    assert "knowledge of the given mask (1)" in folded[1]
    assert "Nearest neighbors (kNN)" in sight and "n = 10,000; interval: Wilson" in sight
    chart = sight[sight.index("<svg role") : sight.index("<table")]
    assert "knn, top-1" in chart and "linear, top-1" in chart
    assert "fewshot" not in chart and "attention, top-1" not in chart
    only = render(replace(EMPTY, metrics=content.metrics[2:3]))
    assert 'id="metrics"' in only and "<svg role" not in only


def test_render_shows_the_caption_before_all_metadata(html):
    header = html[html.index("<header>") : html.index("<nav")]
    few, everything = header.split("<details")
    assert "<dd>DINO</dd>" in few and "found wrong" in few
    assert "ssl-vit report</code>" in everything


# In a browser.


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs Chromium")
    quiet = ["--disable-background-modeling", "--disable-component-update", "--disable-sync", "--no-first-run"]
    with playwright.sync_playwright() as tool:
        running = tool.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu", *quiet])
        yield running
        running.close()


@pytest.fixture(scope="module")
def address(html, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(html, encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def visit(browser, address):
    """A function: the page in a window of so many pixels and a color scheme. Nothing may go wrong meanwhile."""
    troubles, contexts = [], []

    def visit(width=1280, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: troubles.append("a name of an image was run"))
        page.on("requestfailed", lambda request: troubles.append(f"failed: {request.url[:80]}"))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or troubles.append(request.url))
        page.goto(address)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert troubles == []


def text(page, selector: str) -> str:
    return page.locator(selector).text_content()


def test_page_shows_all_images(visit):
    page = visit()
    widths = page.evaluate(
        """() => Promise.all([...document.images].map((image) =>
             image.decode().then(() => image.naturalWidth, () => 0)))"""
    )
    assert len(widths) > 20
    assert min(widths) > 0
    assert text(page, "h1") == SHOWN


def test_gallery_masks_and_ious_follow_the_threshold(visit, content):
    page, first = visit(), content.gallery[0]
    maps = torch.cat([first.maps, first.maps.mean(0, keepdim=True)])
    truth = pool_mask_to_patches(first.ground_truth, (24, 32), first.valid)
    covered, outlines = [], []
    for mass in (20, 40, 60, 80, 100):
        page.locator("#mass").fill(str(mass))
        expected = iou(attention_mass_mask(maps, mass / 100), truth).roll(1).tolist()  # the mean's tile comes first
        shown = [float(label.removeprefix("IoU ")) for label in page.locator("#head-tiles .iou").all_text_contents()]
        assert shown == pytest.approx(expected, abs=0.02)
        now = text(page, "#attention-now")
        assert f"0.jpg, mean: {mass} % of the attention" in now
        assert f"IoU {shown[0]:.2f}" in now
        covered.append(float(re.search(r"lies on ([\d.]+) %", now)[1]))
        outlines.append(page.locator("#large path.mask").get_attribute("d"))
        assert filled(outlines[-1], (24, 32)).float().mean().item() * 100 == pytest.approx(covered[-1], abs=0.1)
    assert covered == sorted(set(covered))
    assert covered[-1] == 100
    assert len(set(outlines)) == 5


def test_gallery_ious_equal_those_of_python(visit, content):
    page = visit()
    for place, each in enumerate(content.gallery):
        page.locator('input[name="image"]').nth(place).check(force=True)
        labels = page.locator("#head-tiles .iou").all_text_contents()
        if each.ious is None:
            assert labels == [""] * 4
        else:
            shown = [float(label.removeprefix("IoU ")) for label in labels]
            assert [*shown[1:], shown[0]] == pytest.approx(each.ious, abs=0.02)
    assert "IoU" not in text(page, "#attention-now")  # the last one has no given mask
    mean = np.mean([each.ious[-1] for each in content.gallery if each.ious])
    assert float(text(page, "#attention-mean").split()[-1]) == pytest.approx(mean, abs=0.02)


def test_gallery_begins_with_the_highest_iou(content, browser, tmp_path):
    unknown, *known = content.gallery[::-1]
    known.sort(key=lambda each: each.ious[-1])
    assert known[0].ious[-1] < known[-1].ious[-1]
    path = tmp_path / "report.html"
    path.write_text(render(replace(content, gallery=[unknown, *known])), encoding="utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    shown = page.locator(".images .iou").all_text_contents()
    assert shown == [f"IoU {known[1].ious[-1]:.2f}", f"IoU {known[0].ious[-1]:.2f}", ""]
    page.close()


def test_hero_shows_images_over_their_attention(visit):
    page = visit()
    assert page.locator("#hero").is_visible()
    assert page.locator("#hero .pairs img").count() == 6  # three images, plain and under the map
    assert "the 3 of 3 images with the highest IoU" in text(page, "#hero figcaption")
    drawn = "place => document.querySelectorAll(place)[0].toDataURL()"
    page.locator('input[name="scale"][value="own"]').check(force=True)
    assert page.evaluate(drawn, "#hero canvas") == page.evaluate(drawn, ".images canvas")  # of the mean
    bottom = page.locator("#hero").bounding_box()
    assert bottom["y"] + bottom["height"] < 900


def test_mask_tiles_are_equally_wide(visit):
    widths = visit(390).evaluate(
        "[...document.querySelectorAll('#mask-tiles .tile')].map((tile) => tile.getBoundingClientRect().width)"
    )
    assert max(widths) - min(widths) < 1


def test_gallery_controls_change_what_is_drawn(visit):
    page = visit()
    drawn = lambda: page.evaluate("document.querySelector('#large canvas').toDataURL()")  # noqa: E731
    mean = drawn()
    page.locator('input[name="head"][value="1"]').check(force=True)
    head = drawn()
    assert head != mean
    assert "head 1" in text(page, "#attention-now")
    assert "× uniform attention" in text(page, "#ramp-text")
    page.locator('input[name="scale"][value="own"]').check(force=True)
    assert drawn() != head
    assert "strongest patch" in text(page, "#ramp-text")
    page.locator("#strength").fill("0")
    assert page.locator("#large canvas").evaluate("canvas => getComputedStyle(canvas).opacity") == "0"
    assert page.locator("#large path.ground-truth").is_visible()
    page.locator("#show-ground-truth").uncheck()
    assert not page.locator("#large path.ground-truth").is_visible()


def test_page_can_be_used_by_keyboard(visit):
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    reached, kept = set(), set()
    for _ in range(60):
        page.keyboard.press("Tab")
        focus, outlined = page.evaluate(
            """() => { const it = document.activeElement;
                 const box = it.parentElement.querySelector(":scope > span") || it;
                 const seen = [it, box].some((e) => getComputedStyle(e).outlineStyle !== "none");
                 return [it.name || it.id || it.tagName, seen]; }"""
        )
        reached.add(focus)
        if not outlined:
            kept.add(focus)
    assert {"scheme", "mass", "strength", "scale", "show-ground-truth", "head", "image", "method", "order"} <= reached
    assert {"map", "classes-all", "classes-none", "SUMMARY"} <= reached
    assert kept <= {"BODY"}
    page.locator("#mass").focus()
    page.keyboard.press("ArrowRight")
    assert "61 % of the attention" in text(page, "#attention-now")
    page.locator('input[name="head"]').first.focus()
    page.keyboard.press("ArrowRight")
    assert "head 0" in text(page, "#attention-now")


def test_embedding_map_shows_images_to_mouse_and_keyboard(visit, content):
    page = visit()
    canvas, tip = page.locator("#map"), page.locator("#tip")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert not tip.is_visible()
    page.evaluate("scrollBy(0, 1)")
    canvas.focus()
    page.keyboard.press("ArrowRight")
    walked = [text(page, "#map-now")]
    for key in ("ArrowLeft", "ArrowUp", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
        walked.append(text(page, "#map-now"))
    assert len(set(walked)) > 3
    assert all(
        any(said.startswith(name.replace("\udcff", "")[:4]) for name in content.embedding_map.names) for said in walked
    )
    assert tip.is_visible()
    assert "data:image/webp" in page.locator("#thumb").evaluate("thumb => thumb.style.backgroundImage")
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    canvas.evaluate("canvas => canvas.blur()")
    points = content.embedding_map.points
    middle = (points.amin(0) + points.amax(0)) / 2
    scale = min((box["width"] - 32) / np.ptp(points[:, 0].numpy()), (box["height"] - 32) / np.ptp(points[:, 1].numpy()))
    x, y = ((points[5] - middle) * scale * torch.tensor([1, -1])).tolist()
    canvas.hover(position={"x": box["width"] / 2 + x, "y": box["height"] / 2 + y})
    assert text(page, "#map-now").startswith("5<")
    assert tip.is_visible()
    page.locator("#classes-none").click()
    canvas.hover(position={"x": box["width"] / 2 + x, "y": box["height"] / 2 + y})
    assert not tip.is_visible()


def test_masks_are_sorted_by_the_iou_of_the_method(visit):
    page = visit()
    names = lambda: page.locator("#mask-tiles .name").all_text_contents()  # noqa: E731
    assert names() == ["2.jpg", "0.jpg", "1.jpg"]
    page.locator('input[name="order"][value="best"]').check(force=True)
    assert names() == ["1.jpg", "0.jpg", "2.jpg"]
    page.locator('input[name="method"]').nth(1).check(force=True)
    assert names() == ["2.jpg", "0.jpg", "1.jpg"]
    assert page.locator("#mask-tiles .iou").all_text_contents() == ["IoU 0.90", "IoU 0.50", "IoU 0.10"]
    assert "mean IoU 0.50 of the 3 images" in text(page, "#masks-now")


def test_neighbors_are_marked_right_or_wrong_without_color(visit):
    page = visit()
    labels = page.locator("#neighbors .row").first.locator(".label").all_text_contents()
    assert labels == ["cat", "✓ right: cat", f"✗ wrong: {SHOWN}"]
    assert "1 of the 4 neighbors" in text(page, "#neighbors .lead")


def test_page_colors_follow_the_scheme_and_the_switch(visit):
    look = """() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
        getComputedStyle(document.querySelector(".chart text")).fill, document.getElementById("map").toDataURL()]"""
    page = visit()
    light = page.evaluate(look)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("document.getElementById('scheme').textContent === 'Light colors'")
    dark = page.evaluate(look)
    assert all(before != after for before, after in zip(light, dark, strict=True))
    page.locator("#scheme").click()
    assert page.evaluate(look) == light
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator("nav").is_visible()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_page_passes_axe_and_nothing_is_cut_off(visit, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    page = visit(width, scheme)
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = axe.Axe().run(page)
    assert [(each["id"], [node["html"][:120] for node in each["nodes"]]) for each in found.response["violations"]] == []
