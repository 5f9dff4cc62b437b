"""A strict reader of the pages: every tag closed in order, every id once, nothing loaded from elsewhere."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input"}
LOADING = {"script", "iframe", "object", "embed", "video", "audio", "base", "form"}


class StrictPage(HTMLParser):
    """Reads a page and keeps what tests ask for: `texts` by tag, `svgs` as elements, `tags` as counts."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.tags: dict[str, int] = {}
        assert page.startswith("<!doctype html>\n")
        self.feed(page)
        self.close()
        assert self.open == [], f"never closed: {self.open}"
        pieces = page.split("<svg ")[1:]
        self.svgs = [ElementTree.fromstring(f"<svg {piece.split('</svg>')[0]}</svg>") for piece in pieces]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in LOADING, tag
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name, value in attributes:
            assert not name.startswith("on"), f"{tag} runs {name}"
            if name in ("src", "href"):
                assert value is not None
                assert value.startswith(("data:", "#")), f"{tag} loads {value}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data)
        if self.open and self.open[-1] == "style":
            assert "url(" not in data
            assert "@import" not in data
