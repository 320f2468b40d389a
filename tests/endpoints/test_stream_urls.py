from __future__ import annotations

import hmac
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Sequence

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicate_proxy_mw.config import STREAM_HOSTS
from replicate_proxy_mw.endpoints.stream_urls import MAX_URL, PATH, Stream, StreamUrls
from replicate_proxy_mw.errors import ProxyError, StreamExpired, StreamUnknown

KEY = "a-key-that-all-replicas-have-in-common"
URL = "https://stream.replicate.com/v1/files/bcwr-3okdfv3o2wehstv5f2okyftwxy57hhypqsi6osiim5iaq5k7u24a"
LONGEST = "https://stream.replicate.com/" + "a" * (MAX_URL - 29)
ID = "bcwr3okdfv3o2wehstv5f2okyf"


def urls(
    *,
    key: str = KEY,
    lifetime: float = 3600.0,
    hosts: Sequence[str] = STREAM_HOSTS,
    now: Callable[[], float] = lambda: 1_790_000_000.0,
) -> StreamUrls:
    return StreamUrls(key=key, lifetime=lifetime, hosts=hosts, now=now)


def signed(made: StreamUrls, url: str = URL, id: str | None = ID) -> str:
    path = made.path_for(url, id)
    assert path is not None
    return path


def found(made: StreamUrls, path: str) -> Stream:
    stream = made.url_of(path)
    if isinstance(stream, ProxyError):
        raise stream
    return stream


def verified(made: StreamUrls, path: str) -> str:
    return str(found(made, path).url)


def test_the_path_is_compact_and_holds_what_it_needs() -> None:
    path = signed(urls())
    payload, signature = path.removeprefix(PATH).split(".")
    assert path.startswith("/-/streams/")
    content = urlsafe_b64decode(payload + "==")
    assert int.from_bytes(content[:5], "big") == 1_790_003_600
    assert content[5:] == b"\x1a" + ID.encode() + URL.encode()
    assert len(signature) == 43
    assert len(path) < 240
    assert found(urls(), path) == Stream(httpx.URL(URL), ID)


@pytest.mark.parametrize("id", ["a", "A-_z9", "x" * 64])
def test_the_id_comes_back(id: str) -> None:
    for url in (URL, "https://stream.replicate.com/", LONGEST):
        assert found(urls(), signed(urls(), url, id)) == Stream(httpx.URL(url), id)


@pytest.mark.parametrize("id", [None, "", "x" * 65, "a/b", "a%2Fb", "a b", "a\n", "é", "\udcff", "p1https:"])
def test_what_is_no_id_is_left_out(id: str | None) -> None:
    assert found(urls(), signed(urls(), URL, id)) == Stream(httpx.URL(URL), "")


def test_a_stream_does_not_show_its_url() -> None:
    assert repr(found(urls(), signed(urls()))) == f"Stream(id='{ID}')"


def test_a_path_is_no_longer_than_servers_take() -> None:
    path = signed(urls(), LONGEST, "x" * 64)
    assert 2800 < len(path) < 3072
    assert verified(urls(), path) == LONGEST


@pytest.mark.parametrize(
    "url",
    [
        "https://stream.replicate.com/v1/files/x",
        "https://streaming-api.svc.us.c.replicate.net/v1/predictions/x",
        "https://streaming-api.svc.rno2.c.replicate.net/v1/streams/x",
        "https://stream.replicate.com/v1/files/a%2Fb?signature=a%3D&x=y/z?",
        LONGEST,
    ],
)
def test_stream_urls(url: str) -> None:
    assert verified(urls(), signed(urls(), url)) == url


@pytest.mark.parametrize(
    "url",
    [
        "",
        "/v1/files/x",
        "//stream.replicate.com/v1/files/x",
        "https:/stream.replicate.com/v1/files/x",
        "https://stream.replicate.com",
        "http://stream.replicate.com/v1/files/x",
        "ftp://stream.replicate.com/v1/files/x",
        "HTTPS://stream.replicate.com/v1/files/x",
        "https://STREAM.replicate.com/v1/files/x",
        "https://stream.replicate.com:444/v1/files/x",
        "https://stream.replicate.com:443/v1/files/x",
        "https://stream.replicate.com:/v1/files/x",
        "https://stream.replicate.com./v1/files/x",
        "https://a.stream.replicate.com/v1/files/x",
        "https://streamXreplicate.com/v1/files/x",
        "https://stream.replicate.com.evil.test/v1/files/x",
        "https://evil.test/stream.replicate.com/",
        "https://user@stream.replicate.com/v1/files/x",
        "https://user:password@stream.replicate.com/v1/files/x",
        "https://stream.replicate.com@evil.test/v1/files/x",
        "https://stream.replicate.com\\@evil.test/v1/files/x",
        "https://stream.replicate.com/v1/files/x#fragment",
        "https://stream.replicate.com/v1/files/x\n",
        "https://stream.replicate.com/v1/files/x y",
        "https://stream.replicate.com/v1/files/\r\nx: y",
        "https://stream.replicate.com/v1/files/\x00",
        "https://stream.replicate.com/v1/files/é",
        "https://stream.replicate.com/v1/files/%zz",
        "https://stream.replicate.com/v1/../files/x",
        "https://stream.replicate.com/v1/files/\\x",
        "https://127.0.0.1/v1/files/x",
        "https://[::1]/v1/files/x",
        "https://169.254.169.254/latest/meta-data",
        "https://stream.replicate.com/" + "a" * (MAX_URL - 28),
        "https://api.replicate.com/v1/predictions/x",
    ],
)
def test_other_urls_are_left_alone(url: str) -> None:
    assert urls().path_for(url, ID) is None


@pytest.mark.parametrize(
    ("listed", "yes", "no"),
    [
        (
            "*.c.replicate.net",
            ["https://a.c.replicate.net/x", "https://a.b.c.replicate.net/x"],
            [
                "https://c.replicate.net/x",
                "https://.c.replicate.net/x",
                "https://a..c.replicate.net/x",
                "https://ac.replicate.net/x",
                "https://a.c.replicate.net.evil.test/x",
                "https://a.c.replicate.net:444/x",
                "http://a.c.replicate.net/x",
            ],
        ),
        ("*.example.test:8443", ["https://a.example.test:8443/x"], ["https://a.example.test/x"]),
        ("*.0.0.1", ["https://127.0.0.1/x"], ["http://127.0.0.1/x"]),
        ("*.127.0.0.1", [], ["http://127.0.0.1/x", "http://a.127.0.0.1/x"]),
        ("Stream.Example.Test:443", ["https://stream.example.test/x"], ["http://stream.example.test/x"]),
        ("stream.example.test:8443", ["https://stream.example.test:8443/x"], ["https://stream.example.test/x"]),
        ("localhost", ["http://localhost/x", "https://localhost/x"], ["http://localhost:8000/x", "http://127.0.0.1/x"]),
        ("127.0.0.1:8000", ["http://127.0.0.1:8000/x", "https://127.0.0.1:8000/x"], ["http://127.0.0.1/x"]),
        ("127.0.0.1:443", ["https://127.0.0.1/x"], ["http://127.0.0.1/x", "http://127.0.0.1:443/x"]),
        ("[::1]:8000", ["http://[::1]:8000/x"], ["http://[::1]/x", "http://[0:0:0:0:0:0:0:1]:8000/x"]),
        ("999.0.2.1", [], ["https://999.0.2.1/x"]),
        ("192.0.2.1", ["https://192.0.2.1/x"], ["http://192.0.2.1/x"]),
    ],
)
def test_hosts_that_are_listed(listed: str, yes: list[str], no: list[str]) -> None:
    made = urls(hosts=["other.test", listed])
    assert [url for url in yes + no if made.path_for(url, ID)] == yes


@pytest.mark.parametrize("listed", ["*", "*.", "*.test", "a.*.test", "*.*.test", "**.a.test", "*.[::1]"])
def test_domains_that_cannot_be_listed(listed: str) -> None:
    with pytest.raises(ValueError, match=r"^hosts: "):
        urls(hosts=["a.test", listed])


@pytest.mark.parametrize(
    "after", [":", ":0", ":x", ":65536", ":123456", "/", "/x", ".", "..test", "|b", " ", "\n", "é"]
)
@pytest.mark.parametrize("before", ["", "https://", "user@", ".", "^"])
def test_hosts_that_cannot_be_listed(before: str, after: str) -> None:
    for listed in {f"{before}a.test", f"a.test{after}", f"{before}a.test{after}"} - {"a.test"}:
        with pytest.raises(ValueError, match=r"^hosts: "):
            urls(hosts=["b.test", listed])


@pytest.mark.parametrize("hosts", [[], [""], ["a test"]])
def test_no_hosts(hosts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^hosts: "):
        urls(hosts=hosts)


@pytest.mark.parametrize("lifetime", [0, -1, 86401, float("inf"), float("nan")])
def test_lifetimes_that_are_refused(lifetime: float) -> None:
    with pytest.raises(ValueError, match=r"^lifetime: "):
        urls(lifetime=lifetime)


def test_a_day_is_not_too_long() -> None:
    assert verified(urls(now=lambda: 86399.0), signed(urls(lifetime=86400, now=lambda: 0.0))) == URL


def test_a_known_answer() -> None:
    """Replicas of two releases may stand side by side: another format needs another label."""
    assert signed(urls(), "https://stream.replicate.com/x", "p1") == (
        "/-/streams/AGqxSZACcDFodHRwczovL3N0cmVhbS5yZXBsaWNhdGUuY29tL3g.xnCMLIGZ3jcuQBwz-l2Y6gIAOW5mJZKMWTw6mKu_uA8"
    )


def test_any_text_can_be_a_key() -> None:
    key = "ключ-\udcff-" + "x" * 32
    assert verified(urls(key=key), signed(urls(key=key))) == URL


def test_the_endpoint_shows_no_secret() -> None:
    assert KEY not in repr(urls()) + repr(vars(urls()))


def test_replicas_share_a_key_and_nothing_else() -> None:
    assert verified(urls(lifetime=1), signed(urls())) == URL
    with pytest.raises(StreamUnknown):
        verified(urls(key=KEY + "."), signed(urls()))


def test_the_key_itself_signs_nothing() -> None:
    payload = signed(urls()).removeprefix(PATH).split(".")[0]
    digest = hmac.digest(KEY.encode(), payload.encode(), "sha256")
    with pytest.raises(StreamUnknown):
        verified(urls(), f"{PATH}{payload}.{urlsafe_b64encode(digest).rstrip(b'=').decode()}")


@pytest.mark.parametrize("made_at", [1000.0, 1000.25])
def test_it_expires_to_the_second(made_at: float) -> None:
    path = signed(urls(lifetime=60, now=lambda: made_at))
    expires = 1060 if made_at == 1000 else 1061
    assert verified(urls(now=lambda: expires - 0.001), path) == URL
    for now in (expires, expires + 1e6):
        with pytest.raises(StreamExpired) as raised:
            verified(urls(now=lambda now=now: now), path)  # type: ignore[misc]
    assert (raised.value.status, raised.value.outcome) == (410, "denied")
    assert "expired" in raised.value.message
    assert "read the prediction again" in raised.value.message


def test_what_has_expired_and_was_tampered_with_is_unknown() -> None:
    path = signed(urls(now=lambda: 0.0))
    with pytest.raises(StreamUnknown):
        verified(urls(), path[:-2] + "AA")


def test_a_host_that_is_no_longer_listed() -> None:
    with pytest.raises(StreamUnknown) as raised:
        verified(urls(hosts=["stream.example.test"]), signed(urls()))
    assert (raised.value.status, raised.value.outcome) == (404, "denied")


def test_every_single_character_counts() -> None:
    path = signed(urls())
    for i, character in enumerate(path):
        for other in "A_-.=/%é":
            if other != character:
                with pytest.raises(StreamUnknown):
                    verified(urls(), path[:i] + other + path[i + 1 :])


def test_a_signature_has_one_spelling() -> None:
    """The last character of 43 has two bits to spare: four texts would stand for the same digest."""
    path = signed(urls())
    digest = urlsafe_b64decode(path[-43:] + "=")
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    same = [last for last in alphabet if urlsafe_b64decode(path[-43:-1] + last + "=") == digest]
    assert len(same) == 4
    for last in same:
        if last != path[-1]:
            with pytest.raises(StreamUnknown):
                verified(urls(), path[:-1] + last)


def test_neither_truncated_nor_extended() -> None:
    path = signed(urls())
    for odd in [*(path[:i] for i in range(len(path))), *(path + more for more in ("A", "=", "\n", "/", "?x", ".A"))]:
        with pytest.raises(StreamUnknown):
            verified(urls(), odd)


def test_parts_of_two_urls_do_not_fit() -> None:
    one, other = (signed(urls(), URL + end).removeprefix(PATH).split(".") for end in "ab")
    with pytest.raises(StreamUnknown):
        verified(urls(), f"{PATH}{one[0]}.{other[1]}")


def test_too_long_is_unknown_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = urls()
    monkeypatch.setattr(made, "_signature", None)
    with pytest.raises(StreamUnknown):
        verified(made, PATH + "A" * 2_000_000 + "." + "A" * 43)


@given(st.text() | st.from_regex(r"/-/streams/[A-Za-z0-9_-]{8,200}\.[A-Za-z0-9_-]{43}", fullmatch=True))
def test_no_random_text_verifies(text: str) -> None:
    for path in (text, PATH + text):
        with pytest.raises(StreamUnknown):
            verified(urls(), path)


def _near(url: str, at: int, odd: str, cut: int) -> str:
    return url[:at] + odd + url[at + cut :]


_NEAR = st.builds(
    _near,
    st.sampled_from(["https://stream.replicate.com/v1/x?y", "https://a.c.replicate.net/x", "http://127.0.0.1:8000/x"]),
    st.integers(0, 36),
    st.sampled_from(["", "@", "u:p@", "evil.test", "\\", "//", "/../", "#", "%", "%2F", "xn--a.", ":1", "[::1]"])
    | st.text(st.sampled_from("ab./:@?#[]%*~ \t\r\n\x00é\u3002")),
    st.integers(0, 3),
)


@given(_NEAR | st.text().map("https://stream.replicate.com/".__add__))
def test_only_hosts_that_are_listed_ever_come_out(url: str) -> None:
    made = urls(hosts=["stream.replicate.com", "*.c.replicate.net", "127.0.0.1:8000"])
    path = made.path_for(url, ID)
    if path is not None:
        out = httpx.URL(verified(made, path))
        assert str(out) == url
        assert out.raw_path.decode() == url[url.index("/", 8) :]
        assert b"@" not in out.netloc
        assert not out.fragment
        if out.port is None:
            assert out.scheme == "https"
            assert out.raw_host == b"stream.replicate.com" or out.raw_host.endswith(b".c.replicate.net")
        else:
            assert out.netloc == b"127.0.0.1:8000"
