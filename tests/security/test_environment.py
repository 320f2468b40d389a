"""Nothing in the environment of the process steers where a token goes, or who is trusted with it."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

import pytest

from replicate_proxy_mw import ProxyConfig
from tests.raw_asgi import TOKEN, call, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream
from tests.security.refusals import told
from tests.security.rows import row

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("either_transport")]


@row("2.31")
async def test_no_proxy_of_the_environment_sees_a_request(
    upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RawUpstream() as elsewhere:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            for spelling in (name, name.lower()):
                monkeypatch.setenv(spelling, f"http://127.0.0.1:{elsewhere.port}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        assert (await call(proxy(upstream.url), http_scope())).status == 200
        assert elsewhere.connections == []
    assert len(upstream.requests) == 1


@row("2.31")
async def test_no_netrc_takes_the_place_of_the_token(
    upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "netrc"
    path.write_text("machine 127.0.0.1 login ada password hunter2\n")
    path.chmod(0o600)
    monkeypatch.setenv("NETRC", str(path))
    await call(proxy(upstream.url), http_scope())
    assert upstream.requests[0].header(b"authorization") == [f"Bearer {TOKEN}".encode()]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for `localhost` that nobody trusts, in one file."""
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(path), "-out", str(path) + ".crt", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    path.write_text(path.read_text() + Path(str(path) + ".crt").read_text())
    return path


@row("2.31")
async def test_no_authority_of_the_environment_is_trusted(
    upstream: RawUpstream, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    shaken: list[bool] = []

    def script(connection: Connection) -> None:
        try:
            connection.socket = context.wrap_socket(connection.socket, server_side=True)
        except OSError:
            return
        shaken.append(True)
        while connection.request():
            connection.answer()

    upstream.script = script
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("SSL_CERT_DIR", str(certificate.parent))
    caller = await call(proxy(f"https://localhost:{upstream.port}/v1"), http_scope())
    assert told(caller) == (502, "upstream_unreachable")
    assert upstream.requests == []


@row("2.31")
@pytest.mark.parametrize(
    "upstream", ["http://api.replicate.com/v1", "http://127.0.0.1.example/v1", "http://10.0.0.1/v1", "ftp://localhost"]
)
async def test_a_token_goes_over_tls_or_to_this_machine(upstream: str) -> None:
    with pytest.raises(ValueError, match="upstream: "):
        ProxyConfig(upstream=upstream)
