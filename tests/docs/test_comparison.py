"""docs/comparison.md: our own column has its tests, and the nginx that it recommends does what it says."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from replicate_proxy_mw.testing import FakeReplicate
from tests.clients.drivers import require
from tests.docs.programs import free_port, running, shell
from tests.documents import ROOT, Page

COMPARISON, PERFORMANCE = Page("docs/comparison.md"), Page("docs/performance.md")
TOKENS = {"r8_the_token_of_team_a": "team-a", "r8_the_token_of_team_b": "team-b"}
VERSION = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"


def table(section: str) -> list[list[str]]:
    """The cells of the section's table, row by row, without the line below its head."""
    text = COMPARISON.text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in rows if set(row) != {"---"}]


def test_each_claim_of_ours_has_a_test_and_no_other() -> None:
    head, *features = table("Feature by feature")
    assert head[1] == "this package"
    claimed = [name for name, ours, *_ in features if not ours.startswith(("no", "free"))]
    assert [name for name, _ in table("What stands behind our column")[1:]] == claimed


@pytest.mark.parametrize("row", table("What stands behind our column")[1:], ids=lambda row: row[0])
def test_the_tests_are_there(row: list[str]) -> None:
    named = re.findall(r"\[([\w.]+)\]\(\.\./([\w./]+)\)", row[1])
    assert named
    for name, path in named:
        source = ROOT.joinpath(path).read_text(encoding="utf-8")
        assert path.endswith(f"/{name}") or f"def {name}(" in source


def test_each_row_has_a_cell_for_each_product_and_each_product_its_sources() -> None:
    head, *features = table("Feature by feature")
    assert {len(row) for row in features} == {len(head)}
    assert all(all(row) for row in features)
    sources = COMPARISON.text.partition("\n## Sources\n")[2]
    named = re.findall(r"^- \*\*(.*?)\*\*", sources, re.MULTILINE)
    assert [name.split()[0].strip(",") for name in named] == [name.split()[0].strip(",") for name in head[2:]]
    assert all("](https://" in bullet for bullet in re.split(r"^- \*\*", sources, flags=re.MULTILINE)[1:])
    assert COMPARISON.text.count("2026-11-2") >= 4


def test_our_own_speed_is_what_was_measured() -> None:
    told = {name: float(times) for name, times in table("Speed")[1:]}
    for name, row in (("this package", "replicate_proxy_mw"), ("this package, `fast`", "replicate_proxy_mw, fast")):
        cells = re.findall(rf"^\| {row} \| \d+ \| [^|]+ \| ([\d.]+) \|", PERFORMANCE.text, re.MULTILINE)
        assert told[name] == pytest.approx(float(cells[0]), rel=0.3)


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeReplicate]:
    with FakeReplicate(tokens=TOKENS).serve() as fake:
        yield fake


@pytest.fixture(scope="module")
def nginx(fake: FakeReplicate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    require("nginx")
    folder, port = tmp_path_factory.mktemp("nginx"), free_port()
    server = COMPARISON.block("nginx", "proxy_pass").replace("127.0.0.1:8080", f"127.0.0.1:{port}")
    server = server.replace("https://api.replicate.com/v1/", f"{fake.url}/")
    paths = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main = f"daemon off; pid {folder}/pid; error_log stderr; events {{}} http {{ access_log off; {paths} {server} }}"
    folder.joinpath("nginx.conf").write_text(main)
    binary = shutil.which("nginx")
    with running(f"{binary} -p {folder} -c {folder}/nginx.conf -e stderr", folder, port):
        yield f"http://127.0.0.1:{port}"


def test_the_nginx_swaps_the_key_and_keeps_cookies(nginx: str, fake: FakeReplicate, tmp_path: Path) -> None:
    require("curl")
    command = COMPARISON.block("sh", "curl").replace("http://127.0.0.1:8080", nginx)
    told = shell(command.replace("curl ", "curl -s ", 1), tmp_path)
    assert '"username":"team-a"' in told.replace(" ", "")
    headers = {"x-portkey-api-key": "pk-team-b", "cookie": "session=1"}
    answer = httpx.post(f"{nginx}/v1/predictions", headers=headers, json={"version": VERSION, "input": {"text": "A"}})
    assert answer.status_code == 201
    came = fake.requests[-1]
    assert came.header("authorization") == "Bearer r8_the_token_of_team_b"
    assert (came.header("cookie"), came.header("x-portkey-api-key")) == (None, None)


def test_what_the_nginx_does_not_do(nginx: str, fake: FakeReplicate) -> None:
    headers = {"x-portkey-api-key": "pk-team-b"}
    body = {"version": VERSION, "input": {"text": "Alice"}}
    answer = httpx.post(f"{nginx}/v1/predictions", headers=headers, json=body)
    link = answer.json()["urls"]["get"]
    assert link.startswith(fake.url)
    assert httpx.get(link, headers={"authorization": "Bearer pk-team-b"}).status_code == 401
    assert httpx.post(f"{nginx}/v1/predictions", headers=headers, json={"data": body}).status_code == 422
    assert httpx.get(f"{nginx}/v1/account", headers={"x-portkey-api-key": "PK-Team-B"}).status_code == 200
    # The fake refuses what should not reach Replicate, and says what it is.
    told = httpx.get(f"{nginx}/v1/account", headers=headers | {"x-portkey-trace-id": "order-42"}).json()["detail"]
    assert told.endswith(": x-portkey-trace-id")


def test_the_nginx_lets_nobody_else_in(nginx: str, fake: FakeReplicate) -> None:
    sent = len(fake.requests)
    answers = [httpx.get(f"{nginx}/v1/account", headers=headers) for headers in ({}, {"x-portkey-api-key": "pk-other"})]
    assert [answer.status_code for answer in answers] == [401, 401]
    assert len(fake.requests) == sent


def test_every_block_is_run_and_every_link_leads_somewhere() -> None:
    assert COMPARISON.count("nginx") == COMPARISON.count("sh") == 1
    assert len(COMPARISON.code) == 2
    assert COMPARISON.missing_links() == []
