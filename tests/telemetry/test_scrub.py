from __future__ import annotations

import json
from base64 import b64encode
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicate_proxy_mw.telemetry.scrub import BARE, Scrubber, is_secret_name

SECRET = "canary/0123+456=789"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ1MSJ9.c2lnbmF0dXJl"


def _of(*headers: tuple[str, str]) -> Scrubber:
    return Scrubber.of([(name.encode(), value.encode()) for name, value in headers])


@pytest.mark.parametrize(
    "name",
    [
        "x-portkey-api-key",
        "x-portkey-virtual-key",
        "x-portkey-config",
        "x-portkey-aws-secret-access-key",
        "x-portkey-aws-session-token",
        "x-portkey-vertex-service-account-json",
        "authorization",
        "proxy-authorization",
        "cookie",
        "api-key",
        "x-api-key",
        "x-auth-token",
        "x-goog-api-key",
        "x-openai-apikey",
        "x-client-secret",
        "x-password",
        "x-credential",
        "x-auth",
        "x-" + "y" * 64 + "-token",
    ],
)
def test_the_value_of_a_secret_header_is_replaced(name: str) -> None:
    assert _of((name, SECRET))(f"<{SECRET}>") == "<REDACTED>"


@pytest.mark.parametrize(
    "name",
    [
        "x-portkey-trace-id",
        "x-portkey-metadata",
        "x-portkey-provider",
        "user-agent",
        "webhook-signature",
        "idempotency-key",
        "x-max-tokens",
        "x-token-count",
        "x-author",
        "x-auth-request-user",
        "www-authenticate",
        "x-" + "y" * 64,
    ],
)
def test_the_value_of_another_header_is_not(name: str) -> None:
    assert _of((name, SECRET))(f"<{SECRET}>") == f"<{SECRET}>"


@pytest.mark.parametrize("scheme", ["Bearer", "Token", "bearer", "Digest"])
def test_a_credential_is_replaced_without_its_scheme_too(scheme: str) -> None:
    scrub = _of(("authorization", f"{scheme}  {SECRET} "))
    assert scrub(f"key {SECRET}!") == "key REDACTED!"
    assert SECRET not in scrub(f"{scheme} {SECRET}")


def test_a_secret_of_several_words_is_replaced_with_the_first_of_them() -> None:
    assert _of(("x-password", "correct horse battery"))("correct horse battery") == "REDACTED"
    assert _of(("x-password", "tr0ub4dor 3"))("is tr0ub4dor 3") == "is REDACTED"


@pytest.mark.parametrize(
    ("pair", "secret"), [(f"user:{SECRET}", SECRET), (f"{SECRET}:", SECRET), ("user:pässword", "pässword")]
)
def test_the_password_in_basic_authentication_is_replaced(pair: str, secret: str) -> None:
    encoded = b64encode(pair.encode("latin-1")).decode().rstrip("=")
    scrub = _of(("authorization", f"Basic {encoded}"))
    assert scrub(f"<{secret}> <{encoded}>") == "<REDACTED> <REDACTED>"


def test_basic_authentication_that_is_none() -> None:
    scrub = _of(("authorization", "Basic abcde"))
    assert scrub("abcde") == "REDACTED"


def test_the_cookie_header_and_each_long_value_are_replaced() -> None:
    cookies = f'theme=dark; session="{SECRET}"; lang=en'
    scrub = _of(("cookie", cookies))
    assert scrub(f"dark {SECRET} en") == "dark REDACTED en"
    assert scrub(f"<{cookies}>") == "<REDACTED>"


def test_secrets_in_a_config_are_replaced_at_any_depth() -> None:
    config = {
        "retry": {"attempts": 3},
        "targets": [{"provider": "replicate", "api_key": "canary-one"}, {"virtualKey": "canary-two", "weight": 1}],
        "credentials": {"list": ["canary-three", 4]},
        "name": "open-name",
    }
    scrub = _of(("x-portkey-config", json.dumps(config)))
    text = "canary-one canary-two canary-three replicate open-name"
    assert scrub(text) == "REDACTED REDACTED REDACTED replicate open-name"
    assert scrub(f"<{json.dumps(config)}>") == "<REDACTED>"
    assert scrub(f"<{json.dumps(json.dumps(config))[1:-1]}>") == "<REDACTED>"


@pytest.mark.parametrize("config", ["pc-slug-1234", "{not json", '{"a":' * 100_000])
def test_a_config_that_is_no_json_is_replaced_whole(config: str) -> None:
    assert _of(("x-portkey-config", config))(f"<{config}>") == "<REDACTED>"


def test_short_values_are_ordinary_words() -> None:
    scrub = _of(("x-api-key", "get"), ("authorization", "Bearer abc"), ("cookie", "a=b"))
    assert scrub("get abc a=b") == "get abc a=b"


@pytest.mark.parametrize(
    "encoded",
    [
        quote(SECRET, safe=""),
        quote(SECRET),
        quote_plus(SECRET).lower(),
        "".join(f"%{ord(character):02x}" for character in SECRET),
    ],
)
def test_percent_encoded_values_are_replaced_too(encoded: str) -> None:
    scrub = Scrubber([SECRET])
    assert scrub(f"/v1/a%20b/{encoded}/%zz/{encoded}%") == "/v1/a%20b/REDACTED/%zz/REDACTED%"
    assert scrub("/v1/a%20b") == "/v1/a%20b"


@pytest.mark.parametrize("shown", ["clé-sécrète", "clÃ©-sÃ©crÃ¨te", "cl\\u00e9-s\\u00e9cr\\u00e8te"])
def test_a_value_beyond_ascii_is_replaced_however_it_is_read(shown: str) -> None:
    assert _of(("x-api-key", "clé-sécrète"))(f"<{shown}>") == "<REDACTED>"


def test_the_beginning_of_a_secret_is_replaced_where_a_text_was_cut() -> None:
    scrub = Scrubber([SECRET])
    assert scrub("id " + SECRET[:-1]) == scrub("id " + SECRET[:8]) == "id REDACTED"
    assert scrub("id " + SECRET[:7]) == "id " + SECRET[:7]
    assert scrub(SECRET[:9] + " id") == SECRET[:9] + " id"
    assert scrub("id/" + quote(SECRET, safe="")[:-3]) == "id/REDACTED"
    assert scrub("id/" + quote(SECRET, safe="")[:-4]) == "id/REDACTED%3"


def test_secrets_within_and_across_each_other_are_one() -> None:
    scrub = Scrubber(["secret-one", "secret-one-and-two", "and-two-three", "one-"])
    assert scrub("a secret-one-and-two-three b one-c") == "a REDACTED b REDACTEDc"
    assert scrub("secret-one secret-one") == "REDACTED REDACTED"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("token r8_0123456789abcdef, see", "token REDACTED, see"),
        ("r8_short", "r8_short"),
        ("Authorization: Bearer abcdefgh", "Authorization: Bearer REDACTED"),
        ("BEARER  abc.def-ghi~/+=", "BEARER  REDACTED"),
        ("Bearer%20abcdefgh", "Bearer%20REDACTED"),
        ("Token 0123456789", "Token REDACTED"),
        ("Basic dXNlcjpwYXNz", "Basic REDACTED"),
        ("a bearer of news", "a bearer of news"),
        ("token embeddings and basic instructions", "token embeddings and basic instructions"),
        ("a plain text", "a plain text"),
        ("whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD", "REDACTED"),
        ("sk-0123456789abcdefgh", "REDACTED"),
        ("task-0123456789abcdefgh", "task-0123456789abcdefgh"),
        ("pk-0123456789abcdefgh", "pk-0123456789abcdefgh"),
        ("https://user:p@ss@host/a@b?c@d", "https://REDACTED:REDACTED@host/a@b?c@d"),
        ("see https://r8@host:80/ or http://other:81/", "see https://REDACTED:REDACTED@host:80/ or http://other:81/"),
        ("https://user:passw", "https://REDACTED"),
        ("https://user:0123x", "https://REDACTED"),
        ("https://host:8080", "https://host:8080"),
        ("https://[::1]:8080", "https://[::1]:8080"),
        (f"jwt={JWT};", "jwt=REDACTED;"),
        (JWT[: JWT.rindex(".") - 4], "REDACTED"),
        ("eyJhbGciOiJkaXIifQ..aXY.Y2lwaGVy.dGFn", "REDACTED"),
        ("eyJhbGci.json eyJ", "eyJhbGci.json eyJ"),
        ("/f?X-Amz-Credential=AK%2FIA&X-Amz-Date=1&X-Amz-Signature=0a", None),
        ("/f?expiry=1&sig=a%2Bb&x=y", "/f?expiry=1&sig=REDACTED&x=y"),
        ("/f?api_key=abc#access_token=def", "/f?api_key=REDACTED#access_token=REDACTED"),
        ("AWS4 Credential=AKIA/x, Signature=0a", "AWS4 Credential=REDACTED, Signature=REDACTED"),
        ("/f?design=flat&sigma=3&max_tokens=5&top_k=1", "/f?design=flat&sigma=3&max_tokens=5&top_k=1"),
    ],
)
def test_what_looks_like_a_secret_is_replaced_whoever_sent_it(text: str, shown: str | None) -> None:
    shown = shown or "/f?X-Amz-Credential=REDACTED&X-Amz-Date=1&X-Amz-Signature=REDACTED"
    assert BARE(text) == shown
    assert BARE(shown) == shown


def test_one_more_secret() -> None:
    scrub = Scrubber([SECRET]).with_secret("hunter2-hunter2").with_secret("")
    assert scrub(f"{SECRET} hunter2-hunter2 hunter2-hun") == "REDACTED REDACTED REDACTED"
    assert Scrubber([SECRET])("hunter2-hunter2") == "hunter2-hunter2"


def test_lone_surrogates_are_replaced() -> None:
    assert BARE("ü\ud800ü") == "ü?ü"


def test_it_does_not_show_its_secrets() -> None:
    scrub = Scrubber([SECRET, SECRET, "short", "abc"])
    assert f"{scrub} {scrub!r}" == "Scrubber(2 secrets) Scrubber(2 secrets)"
    assert not hasattr(scrub, "__dict__")


@pytest.mark.parametrize(
    "name",
    [
        "token",
        "key",
        "apiKey",
        "API_KEY",
        "hf_token",
        "HF_TOKEN",
        "APIKey",
        "DBPassword",
        "JWTSecret",
        "x.password",
        "Cookies",
        "authToken",
        "key_2",
    ],
)
def test_a_name_of_a_secret(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["max_tokens", "maxTokens", "token_count", "keyframes", "top_k", "author", "monkey", "tokenizer", "secretary"],
)
def test_a_name_of_something_else(name: str) -> None:
    assert not is_secret_name(name)


SECRETS = st.lists(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=12, max_size=40), max_size=4)


@settings(deadline=None)
@given(SECRETS, st.lists(st.text(max_size=20), min_size=5, max_size=5), st.integers(0, 120))
def test_no_secret_is_left_whatever_is_around_it(secrets: list[str], around: list[str], limit: int) -> None:
    text = around[0] + "".join(secret + between for secret, between in zip(secrets, around[1:], strict=False))
    scrub = Scrubber(secrets)
    for shown in (scrub(text), scrub(text[:limit]), scrub(quote(text.encode("utf-8", "replace")))):
        shown.encode()
        assert not any(secret in shown for secret in secrets)


@settings(deadline=None)
@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=9, max_size=40), st.integers(8, 40))
def test_no_beginning_of_a_secret_is_left_at_the_end(secret: str, size: int) -> None:
    assert secret[:size] not in Scrubber([secret])("a " + secret[:size])


@pytest.mark.parametrize(
    "texts",
    [
        ["/v1/predictions/abc", "portkey-python/2.3 (linux; x64)", "192.0.2.1", ""],
        ["https://api.replicate.com/v1/predictions", "http://127.0.0.1:8000/x"],
    ],
)
def test_what_is_clean_at_a_glance(texts: list[str]) -> None:
    assert Scrubber([SECRET]).is_clean(texts)


@pytest.mark.parametrize(
    "text",
    [
        f"a {SECRET} b",
        SECRET[:8],
        "%41",
        "a=b",
        "r8_0123456789",
        "whsec_0123456789",
        JWT,
        "sk-0123456789abcdef",
        "Bearer 0123456789",
        "http://user:password",
        "http://user:pw@host/",
        "ü",
    ],
)
def test_what_takes_a_second_look(text: str) -> None:
    scrub = Scrubber([SECRET])
    assert not scrub.is_clean(["a", text, "b"])
    assert not scrub.is_clean([text])


@settings(deadline=None)
@given(SECRETS, st.lists(st.text(max_size=40) | st.sampled_from(["r8_", "://a:", "@", "bearer ", "sk-", "eyJa"])))
def test_what_is_clean_stays_as_it_is(secrets: list[str], parts: list[str]) -> None:
    scrub = Scrubber(secrets)
    texts = [*parts, "".join(parts), "".join((*parts, *secrets))]
    assert not scrub.is_clean(texts) or [scrub(text) for text in texts] == texts
