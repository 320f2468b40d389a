"""Links of the documentation that leave docs/: to the repository, where mkdocs.yml names one, else plain text."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit
from xml.etree.ElementTree import Element, SubElement

from markdown import Extension, Markdown  # type: ignore[import-untyped] # it has none
from markdown.treeprocessors import Treeprocessor  # type: ignore[import-untyped]


class Leaving:
    """What becomes of links from one page to the next.

    Args:
        root: the project's folder.
        docs: the folder of the pages.
        repository: its URL, as `mkdocs.yml` has it; None without one.
    """

    def __init__(self, root: Path, docs: Path, repository: str | None) -> None:
        self._root, self._docs = root, docs
        self._repository = repository.rstrip("/") if repository else None
        self.page = ""

    def change(self, link: Element) -> None:
        path, lines = self._path_of(link.get("href", ""))
        if path is None or not (self._root / path).exists():
            return  # of what is not there MkDocs warns
        if self._repository is not None:
            link.set("href", f"{self._repository}/blob/HEAD/{quote(path)}{lines}")
        else:
            _make_plain(link, path)

    def _path_of(self, href: str) -> tuple[str | None, str]:
        """The path below the project's folder where a link leaves docs/ for a file, and its fragment."""
        url = urlsplit(href)
        if url.scheme or url.netloc or not url.path or url.path.startswith("/"):
            return None, ""
        target = os.path.normpath(self._docs / Path(self.page).parent / unquote(url.path))
        if Path(target).is_relative_to(self._docs):
            return None, ""
        return os.path.relpath(target, self._root), f"#{url.fragment}" if url.fragment else ""


def _make_plain(link: Element, path: str) -> None:
    """The text alone, and the path behind it where the text does not name it."""
    text = "".join(link.itertext())
    only_code = not (link.text or "").strip() and [child.tag for child in link] == ["code"] and not link[0].tail
    link.tag = "span"
    link.attrib.clear()
    if path == text:
        link.text = None
        SubElement(link, "code").text = text
    elif not only_code and text not in path:
        if len(link):
            link[-1].tail = (link[-1].tail or "") + " ("
        else:
            link.text = f"{text} ("
        added = SubElement(link, "code")
        added.text, added.tail = path, ")"


class _Links(Extension):  # type: ignore[misc]
    """Goes through the links of a page before MkDocs looks for what they lead to."""

    def __init__(self, change: Callable[[Element], None]) -> None:
        super().__init__()
        self._change = change

    def extendMarkdown(self, md: Markdown) -> None:
        md.treeprocessors.register(_Walk(md, self._change), "leaving", 5)  # MkDocs's own has 0


class _Walk(Treeprocessor):  # type: ignore[misc]
    def __init__(self, md: Markdown, change: Callable[[Element], None]) -> None:
        super().__init__(md)
        self._change = change

    def run(self, root: Element) -> None:
        for link in list(root.iter("a")):
            self._change(link)


_current: Leaving


def on_config(config: Any) -> Any:
    global _current
    root = Path(config["config_file_path"]).resolve().parent
    _current = Leaving(root, Path(config["docs_dir"]).resolve(), config["repo_url"])
    config["markdown_extensions"].append(_Links(lambda link: _current.change(link)))
    # Of a repository that it knows the theme would ask GitHub for stars and forks.
    config["repo_url"] = config["repo_name"] = config["edit_uri"] = None
    return config


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    _current.page = page.file.src_uri
    return markdown
