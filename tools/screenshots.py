"""Take the pictures of docs/monitoring.md: a run's token page, index, report and TensorBoard.

    python tools/screenshots.py RUN [--compare RUN2] [-o docs/images]

Needs Chromium (Debian's package of that name) and playwright, which the extra `dev` brings. RUN is
one with recordings of tokens and at least two evaluations, such as runs/quickstart.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from tensorboard import program

from megatron_eopd import report, view
from megatron_eopd.cli import tell
from megatron_eopd.errors import ConfigError
from megatron_eopd.viewing.recordings import recordings_of

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SIZE = {"width": 1200, "height": 720}
COLOURS = 96
"""Of a picture's palette: a few dozen kB each."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--compare", type=Path, metavar="RUN2", help="beside it in the report")
    parser.add_argument(*("-o", "--output"), type=Path, default=Path("docs/images"), metavar="DIR")
    parser.add_argument(
        "--prefix", default="", metavar="NAME", help="of the files, and the token page alone"
    )
    args = parser.parse_args(arguments)
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        print("error: no Chromium here: apt-get install chromium", file=sys.stderr)
        return 1
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory() as folder, opened(found) as browser:
            for name, page in pictures(browser, args, Path(folder)):
                take(page, args.output / f"{args.prefix}{name}.png")
    except ConfigError as error:
        return tell(error)
    return 0


@contextmanager
def opened(executable: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Chromium's own sandbox does not start as root, which containers are.
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


def pictures(
    browser: Browser, args: argparse.Namespace, folder: Path
) -> Iterator[tuple[str, Page]]:
    """(name, the page as it is to be seen), one after the other."""
    evaluations = [each for each in recordings_of(args.run) if each.kind == "evaluation"]
    if not evaluations:
        raise ConfigError(f"{args.run}: no tokens of an evaluation were recorded.")
    last = evaluations[-1]
    asked = [str(args.run), "--evaluation", str(last.iteration), "--output", str(folder)]
    assert view.main(asked) == 0
    page = open_page(browser, folder / f"{last.name}.html")
    page.keyboard.press("3")
    point_at_the_darkest(page)
    yield "token_page", page
    if args.prefix:
        return
    before = f"{args.run}@{evaluations[0].iteration}"
    assert view.main([*asked, "--compare", before]) == 0
    page = open_page(browser, next(folder.glob(f"{last.name}-with-*.html")))
    page.keyboard.press("4")
    point_at_the_darkest(page)
    yield "token_page_compare", page
    assert view.main([str(args.run), "--output", str(folder)]) == 0
    yield "token_index", open_page(browser, folder / "index.html")
    runs = [str(run) for run in (args.run, args.compare) if run is not None]
    assert report.main([*runs, "--output", str(folder / "report")]) == 0
    page = open_page(browser, folder / "report/report.html")
    page.locator("figure, svg").first.scroll_into_view_if_needed()
    yield "report", page
    yield "tensorboard", open_tensorboard(browser, args.run)


def open_page(browser: Browser, path: Path) -> Page:
    page = browser.new_page(viewport=SIZE)
    page.goto(path.resolve().as_uri())
    page.wait_for_timeout(1000)
    return page


def point_at_the_darkest(page: Page) -> None:
    """The token whose colour stands for the largest value in sight."""
    tokens = page.locator(".response .t").all()[:200]
    boxes = [(token, token.bounding_box()) for token in tokens]
    seen = [(token, box) for token, box in boxes if box and 0 < box["y"] < SIZE["height"]]

    def lightness(pair: tuple) -> float:
        colour = pair[0].evaluate("element => getComputedStyle(element).backgroundColor")
        channels = [float(x) for x in colour.strip("rgba()").split(",")]
        return sum(channels[:3]) if len(channels) == 3 or channels[3] else 999.0

    if seen:
        min(seen, key=lightness)[0].hover()
    page.wait_for_timeout(300)


def open_tensorboard(browser: Browser, run: Path) -> Page:
    server = program.TensorBoard()
    server.configure(argv=["", "--logdir", str(run / "tensorboard"), "--port", "0"])
    page = browser.new_page(viewport=SIZE)
    page.goto(f"{server.launch()}#custom_scalars")
    page.wait_for_timeout(6000)
    return page


def take(page: Page, path: Path) -> None:
    page.screenshot(path=path)
    with Image.open(path) as image:
        image.convert("RGB").quantize(COLOURS).save(path, optimize=True)
    print(f"{path} ({path.stat().st_size / 1e3:.0f} kB)")
    page.close()


if __name__ == "__main__":
    sys.exit(main())
