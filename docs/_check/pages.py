"""Is the built site whole? Links and anchors resolve, nothing is fetched from elsewhere, no page scrolls sideways.

    python docs/_check/pages.py site

The last needs Chromium, and is skipped with a word where there is none. `CHROMIUM` names it if it is not on the path.
"""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlparse

WIDTHS = (1400, 390)
"""Of a screen on a desk, and of a telephone."""

SECONDS = 240
"""For all pages at all widths together."""

FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
NOT_LOADED = {"canonical", "alternate", "prev", "next", "edit"}
"""Links of the head that a browser does not follow by itself."""


class Page(HTMLParser):
    """What a page refers to, its anchors, and its text outside of code."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.text: list[str] = []
        self._verbatim = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Anchors, links and what is loaded."""
        found = {name: value or "" for name, value in attrs}
        self.anchors.update(found[key] for key in ("id", "name") if found.get(key))
        self._verbatim += tag in ("code", "pre", "script", "style")
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag in FETCHED and found.get(FETCHED[tag]) and not NOT_LOADED & set(found.get("rel", "").split()):
            self.loads.append(found[FETCHED[tag]])

    def handle_endtag(self, tag: str) -> None:
        """The end of verbatim text."""
        self._verbatim -= tag in ("code", "pre", "script", "style")

    def handle_data(self, data: str) -> None:
        """Text that is not verbatim."""
        if not self._verbatim:
            self.text.append(data)


def broken(site: Path) -> list[str]:
    """What is wrong with the files themselves."""
    pages = {path: Page(path.read_text("utf-8")) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    found = []
    for path, page in pages.items():
        here = path.relative_to(site).as_posix()
        for link in [*page.links, *page.loads]:
            if problem := _unresolved(site, path, link, pages):
                found.append(f"{here}: {link} {problem}")
        found += [f"{here}: fetches {load}" for load in page.loads if urlparse(load).netloc]
        text = " ".join(page.text)
        found += [f"{here}: {mark} is left in the text" for mark in ("```", "$$", "\\(", "\\[") if mark in text]
    for sheet in site.rglob("*.css"):
        away = re.findall(r"url\(['\"]?(https?:[^)'\"]+)", sheet.read_text("utf-8"))
        found += [f"{sheet.relative_to(site)}: fetches {address}" for address in away]
    return found


def _unresolved(site: Path, path: Path, link: str, pages: dict[Path, Page]) -> str:
    """Why a link leads nowhere, or nothing; other sites are not asked."""
    if urlparse(link).scheme or link.startswith("//") or not link:
        return ""
    base = "/" + path.relative_to(site).as_posix()
    address, anchor = urldefrag(urljoin(base, link))
    target = site / unquote(urlparse(address).path).lstrip("/")
    if target.is_dir():
        target /= "index.html"
    if not target.is_file():
        return "leads nowhere"
    if anchor and target in pages and unquote(anchor) not in pages[target].anchors:
        return "has no such anchor"
    return ""


# ------------------------------------------------------------------------------------------------------ in a browser

MEASURE = """<!doctype html><body><script>
const pages = %s, widths = %s, found = [];
async function measure(page, width) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width: ${width}px; height: 900px; border: 0`;
  frame.src = page;
  const loaded = new Promise(done => frame.onload = done);
  document.body.append(frame);
  await loaded;
  await new Promise(done => setTimeout(done, 150));
  const root = frame.contentDocument.documentElement;
  if (root.scrollWidth > root.clientWidth) {
    const wide = [...frame.contentDocument.querySelectorAll("main *")]
      .filter(part => part.getBoundingClientRect().right > root.clientWidth + 1)
      .map(part => part.tagName.toLowerCase() + " " + part.textContent.trim().slice(0, 60));
    found.push(`${page}: ${root.scrollWidth} pixels wide on a screen of ${width}; ${wide.slice(-1)}`);
  }
  frame.remove();
}
(async () => {
  for (const width of widths) for (const page of pages) await measure(page, width);
  await fetch("/measured", {method: "POST", body: JSON.stringify(found)});
})();
</script>"""


class _Server(http.server.SimpleHTTPRequestHandler):
    """The site, the page that measures the others, and the place that it reports to."""

    measure = b""
    measured: list[str] | None = None
    done = threading.Event()

    def do_GET(self) -> None:
        if self.path != "/measure":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(self.measure)
        return None

    def do_POST(self) -> None:
        type(self).measured = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.done.set()

    def log_message(self, *_: object) -> None:
        pass


def browser() -> str | None:
    """Chromium, under one of its names."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def too_wide(site: Path, program: str) -> list[str]:
    """Pages that scroll sideways, at each of the widths."""
    pages = [f"/{path.relative_to(site).as_posix()}" for path in sorted(site.rglob("*.html"))]
    _Server.measured = None
    _Server.done.clear()
    _Server.measure = (MEASURE % (json.dumps(pages), json.dumps(WIDTHS))).encode()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Server, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--window-size=1500,1000"]
        address = f"http://127.0.0.1:{server.server_port}/measure"
        running = subprocess.Popen([program, *options, address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _Server.done.wait(SECONDS)
        running.terminate()
        running.wait()
    server.shutdown()
    server.server_close()
    return [f"the browser gave no answer in {SECONDS} seconds"] if _Server.measured is None else _Server.measured


def main() -> int:
    """Print what is wrong; 1 if anything is."""
    site = Path(sys.argv[1] if len(sys.argv) > 1 else "site").resolve()
    if not (site / "index.html").is_file():
        print(f"there is no site in {site}: run mkdocs build first")
        return 1
    found = broken(site)
    if program := browser():
        found += too_wide(site, program)
    else:
        print("skipped: whether pages scroll sideways, since there is no Chromium here (apt-get install chromium)")
    for line in found:
        print(line)
    print(f"{len(list(site.rglob('*.html')))} pages: " + (f"{len(found)} faults" if found else "whole"))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
