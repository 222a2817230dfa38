"""The report in a real browser: it shows its parts, runs nothing and loads nothing, at two widths."""

import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from cluster.site import Site
from pipeline.report.write import write_report
from pipeline.results.runs import Runs
from tests.reported_runs import reported_run

INSTALLED = ("chromium", "chromium-browser", "google-chrome")
HEADINGS = [
    "Summary",
    "Quality against visual tokens",
    "Routed pictures and answers",
    "Loss ratios by content",
    "Router",
    "Training",
    "Lineage",
    "Machines, packages and times",
    "Settings",
]


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, INSTALLED)), None)
        if path is None and not Path(playwright.chromium.executable_path).is_file():
            pytest.skip("no browser: install Chromium, or call `playwright install chromium`")
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def trap():
    """A server that notes every request, and its address."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Access-Control-Allow-Origin", "*")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def written(tmp_path_factory, trap):
    """The report of a run with markup planted in every text that comes from records, names and machines."""
    folder, (address, _) = tmp_path_factory.mktemp("report"), trap
    planted = (
        f'"><script>fetch("{address}/fetched"); window.ran = true</script>'
        f'<img src={address}/image.png onerror="window.ran = true">'
        f"<style>body {{ background: url({address}/style.png) }}</style>"
        f'<link rel="stylesheet" href="{address}/sheet.css"><iframe src="{address}/frame"></iframe>'
    )
    run = reported_run(folder / "runs", planted=planted, experiment=planted)
    run.error = planted
    Runs(folder / "runs").save(run)
    return write_report(Site(storage=folder / "runs"), run.run, folder / "report.html").path


def opened(browser, path, **options):
    """Return the page in a new browser context, with its requests and console messages."""
    page = browser.new_context(**options).new_page()
    requests, messages = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.goto(path.as_uri(), wait_until="load")
    return page, requests, messages


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_shows_its_parts_and_loads_nothing(browser, written, trap, width, scheme):
    page, requests, messages = opened(
        browser, written, viewport={"width": width, "height": 900}, color_scheme=scheme
    )
    for details in page.locator("details").all():
        details.evaluate("element => element.open = true")
    page.wait_for_timeout(300)
    outside = [url for url in requests if not url.startswith("data:") and url != written.as_uri()]
    assert outside == [] and trap[1] == [], "no request leaves the page"
    assert messages == [], "neither errors nor blocked loads"
    assert page.evaluate("window.ran") is None, "no planted text ran"
    assert page.get_by_role("heading", level=2).all_inner_texts() == HEADINGS
    assert "<script>" in page.get_by_role("heading", level=1).inner_text(), "the text is shown"
    widths = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert widths[0] <= widths[1], "nothing makes the page wider than the window"
    sizes = page.locator("img").evaluate_all("images => images.map(i => [i.complete, i.naturalWidth])")
    assert len(sizes) >= 11 and all(complete and pixels > 0 for complete, pixels in sizes)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light"), "the style sheet is allowed"
    page.context.close()


def test_a_loader_that_gets_into_the_page_is_blocked(browser, written, trap, tmp_path):
    """Without escaping there would still be the policy."""
    address, asked = trap
    path = tmp_path / "worse.html"
    planted = f'<main><script>window.ran = true</script><img src="{address}/x.png"><style>p {{}}</style>'
    path.write_text(written.read_text().replace("<main>", planted, 1))
    page, _, messages = opened(browser, path)
    page.wait_for_timeout(300)
    assert page.evaluate("window.ran") is None and asked == []
    assert sum("Content Security Policy" in message for message in messages) == 3
    page.context.close()


def test_the_page_prints_in_ink_on_white(browser, written, tmp_path):
    width_of_a4 = 182 * 96 // 25  # pixels between the margins
    page, _, _ = opened(browser, written, color_scheme="dark", viewport={"width": width_of_a4, "height": 900})
    page.emulate_media(media="print")
    wide = page.locator("img").evaluate_all("all => all.filter(i => i.clientWidth > innerWidth).length")
    assert wide == 0, "pictures fit on the paper"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.get_by_role("navigation").is_visible()
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    page.context.close()
