"""Looks at the built site in a browser, as readers do: wide and narrow, light and dark.

    make docs-look

Every page is opened at 1280 and 390 pixels, light and dark. An error in the console, a request that
fails or leaves the site, a link to nothing, and a page that scrolls sideways are named, and the
status is then 1. Screenshots are written to build/look.

A browser that is installed is taken (chromium, google-chrome), else Playwright's own, which
`playwright install chromium` brings.
"""

import functools
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import urldefrag, urlsplit

from playwright.sync_api import Page, sync_playwright

SITE = Path(__file__).resolve().parents[2] / "build" / "site"
SHOTS = SITE.parent / "look"
WIDTHS = (1280, 390)
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files and writes no log."""

    def log_message(self, *_: object) -> None:
        """Nothing."""


def serve() -> str:
    """The address at which a thread now serves the site, on this machine alone."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/"


def listen(page: Page, home: str) -> list[str]:
    """A list to which errors of a page's scripts and requests are added as they come."""
    found: list[str] = []

    def failed(url: str, why: str) -> None:
        if "ERR_ABORTED" not in why:  # what a slow machine still loads when the next page is opened
            found.append(f"request failed, {why}: {url}")

    page.on("console", lambda said: found.append(f"console: {said.text}") if said.type == "error" else None)
    page.on("pageerror", lambda error: found.append(f"script: {error}"))
    page.on("requestfailed", lambda request: failed(request.url, request.failure or ""))
    page.on("response", lambda answer: found.append(f"{answer.status}: {answer.url}") if answer.status >= 400 else None)
    page.on("request", lambda r: None if r.url.startswith((home, "data:")) else found.append(f"leaves: {r.url}"))
    return found


def broken_links(page: Page, home: str, anchors: dict[str, set[str]]) -> Iterator[str]:
    """Links within the site whose page or anchor is not there."""
    for link in page.eval_on_selector_all("a[href]", "links => links.map(a => a.href)"):
        target, anchor = urldefrag(link)
        if target.startswith(home) and target not in anchors:
            yield f"link to nothing: {link}"
        elif target.startswith(home) and anchor and anchor not in anchors[target]:
            yield f"link to no anchor: {link}"


def main() -> int:
    """Looks at all pages; 1 if anything is wrong."""
    if not SITE.is_dir():
        print(f"{SITE} is not there; make docs builds it", file=sys.stderr)
        return 2
    home, faults = serve(), dict[str, None]()
    folders = [file.parent.relative_to(SITE).parts for file in sorted(SITE.rglob("index.html"))]
    addresses = [home + "".join(f"{part}/" for part in parts) for parts in folders]
    SHOTS.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        installed = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        page, anchors = browser.new_page(), {}
        for address in addresses:
            page.goto(address)
            anchors[address] = set(page.eval_on_selector_all("[id]", "all => all.map(one => one.id)"))
        for address in addresses:
            page.goto(address)
            faults |= {f"{urlsplit(address).path}: {fault}": None for fault in broken_links(page, home, anchors)}
        for width in WIDTHS:
            for scheme in SCHEMES:
                page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                found = listen(page, home)
                for address, parts in zip(addresses, folders, strict=True):
                    found.clear()
                    page.goto(address)
                    beyond = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
                    if beyond > 0:
                        found.append(f"scrolls sideways, by {beyond} pixels")
                    faults |= {f"/{'/'.join(parts)} at {width}, {scheme}: {fault}": None for fault in found}
                    name = "-".join((*parts, str(width), scheme))
                    page.screenshot(path=SHOTS / f"{name}.png", full_page=True)
        browser.close()
    for fault in faults:
        print(fault)
    print(f"{len(addresses)} pages at {WIDTHS} pixels, {' and '.join(SCHEMES)}: {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
