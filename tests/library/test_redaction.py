"""What is left of a URL where it is printed, saved or sent."""

from __future__ import annotations

import pytest

from btu.redaction import has_secret, shown, shown_url

PASSWORDS = [
    "pw",
    "p@w",
    "p/w",
    "p:w",
    "p#w",
    "x/12",
    "a@b/c:d#e?f",
    "p?x=y",
    "é%40",
    "p://w",
    "a::b",
]


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize(
    "around",
    [
        "sftp://user:{}@host/a",
        "simplecache::sftp://user:{}@host/a",
        "zip://x.zip::http://u:{}@host:80/a",
    ],
)
def test_a_password_is_left_out_whatever_it_contains(password: str, around: str) -> None:
    url = around.format(password)
    kept = around.split("{}")[1].removeprefix("@")
    assert shown_url(url).endswith(f"://{kept}")
    assert password not in shown_url(url)
    assert password not in shown(f"cannot open {url}: refused")
    assert has_secret(url)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h/a?token=abc&x=1", "http://h/a?token=***&x=***"),
        ("s3://b/a?X-Amz-Signature=1f;sig=2#end", "s3://b/a?X-Amz-Signature=***;sig=***#end"),
        ("http://u:p@h/a?sig=abc", "http://h/a?sig=***"),
        ("postgresql+psycopg2://u:p@h:5432/db?password=x", "postgresql+psycopg2://h:5432/db?password=***"),
        ("http://token@h/a", "http://h/a"),
        # A space does not end what is known to be one URL.
        ("sftp://u:p w@h/my folder", "sftp://h/my folder"),
    ],
)  # fmt: skip
def test_queries_and_user_names_are_left_out(url: str, expected: str) -> None:
    assert shown_url(url) == expected


@pytest.mark.parametrize("kind", ["Bearer", "Basic"])
def test_credentials_of_a_header_are_left_out(kind: str) -> None:
    # As requests refuses a token that ends with a line break.
    error = f"return character(s) in header value: '{kind} s3cr3t+/=\\n'"
    assert shown(error) == f"return character(s) in header value: '{kind} ***'"


@pytest.mark.parametrize(
    "plain",
    [
        "runs",
        "/home/me/a@b?c=d",
        "s3://bucket/a@b",
        "http://host:5000/path",
        "http://host:5000/a@b",
        "http://[::1]:5000/a@b",
        "http://[::1]/a@b",
        "http://[::1]:5000/path",
        "memory://runs",
        "sqlite:////tmp/runs/mlflow.db",
        "simplecache::s3://bucket/x",
        "http://h/page?plain",
    ],
)
def test_what_has_no_secret_stays(plain: str) -> None:
    assert shown_url(plain) == plain
    assert shown(plain) == plain
    assert not has_secret(plain)


def test_every_url_of_a_text_is_cleaned() -> None:
    text = "tried http://a:b@h1/x and 'sftp://c:d@h2/y', then \"s3://b/k?token=e\" (/x?token=f)"
    assert shown(text) == (
        "tried http://h1/x and 'sftp://h2/y', then \"s3://b/k?token=***\" (/x?token=***"
    )


def test_a_text_without_urls_stays() -> None:
    text = "user@example.org wrote a key = value; is it 3? yes=no"
    assert shown(text) == text
