"""What looks like credentials is hidden in whatever is said, and nothing else is touched."""

import re
import string
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipelines.addresses import hide_credentials, may_carry_credentials, quote_address

ROOT = Path(__file__).resolve().parents[2]

# What a person may type as a password; a mark of its own says whether any of it is left.
SECRETS = st.text(string.ascii_letters + string.digits + "@:!$%^*()+,;=.~'\"{}[]|<>_-", max_size=12)
SECRETS = SECRETS.map(lambda text: f"hUn{text}t3R")
USERS = st.text(string.ascii_letters + string.digits + "._+-", min_size=1, max_size=12)
USERS = USERS.filter(lambda text: text not in ("run", "mailto") and text[-1].isalnum())
SCHEMES = st.sampled_from(["s3", "S3", "http", "HTTPS", "file", "postgresql", "git+ssh", "x-y.z1"])
NAMES = st.sampled_from([
    "token", "access_token", "X-Amz-Signature", "X-Amz-Security-Token", "X-Amz-Credential", "sig",
    "key", "API-KEY", "AWSAccessKeyId", "client_secret", "password", "passwd", "auth[x]", "pw",
])  # fmt: skip
FRAMES = st.sampled_from([
    "{}", "'{}'", '"{}".', "({})", "store.uri={}", "[{{prefix:{}}}]", "see {}, then", "error: {}",
    "cannot read {}: no such file", "run:a@{}", "a,{},b", "[Errno 2] No such file: '{}'",
])  # fmt: skip


def assert_hidden(secret: str, text: str) -> None:
    told = hide_credentials(text)
    assert "hUn" not in told
    assert "t3R" not in told
    assert "***" in told
    assert hide_credentials(told) == told


@given(SECRETS, USERS, SCHEMES, st.sampled_from(["://", ":/", ":", ":///"]), FRAMES)
def test_users_and_passwords_of_urls_are_hidden(secret, user, scheme, slashes, frame):
    if (scheme, slashes) == ("file", ":///"):
        return  # a path
    url = f"{scheme}{slashes}{user}:{secret}@host:9000/a/b"
    assert_hidden(secret, frame.format(url))
    assert "hUn" not in quote_address(url)
    assert may_carry_credentials(url)


@given(SECRETS, SCHEMES, st.sampled_from(["://", ":/"]), FRAMES)
def test_tokens_in_the_place_of_users_are_hidden(secret, scheme, slashes, frame):
    assert_hidden(secret, frame.format(f"{scheme}{slashes}{secret}@host/a"))


@given(SECRETS, SECRETS, FRAMES)
def test_secret_keys_with_slashes_are_hidden(one, other, frame):
    assert_hidden(one, frame.format(f"s3://AKIAXX:{one}/{other}@bucket/a"))


@given(SECRETS, FRAMES)
def test_what_stands_behind_a_bucket_is_hidden(secret, frame):
    secret = secret.replace("@", "")
    assert_hidden(secret, frame.format(f"s3://bucket:{secret}/a"))


@given(SECRETS, USERS, FRAMES)
def test_users_and_passwords_without_a_scheme_are_hidden(secret, user, frame):
    place = f"{user}:{secret}@host/a/b"
    assert_hidden(secret, frame.replace("run:a@", "").format(place))
    assert "hUn" not in quote_address(place)


@given(
    SECRETS,
    NAMES,
    st.sampled_from(["s3://b/a", "http://h", "org/name", "https:/h:1/x"]),
    FRAMES,
    st.sampled_from(["?", "#", "?a=1&", "?a=b#", "&amp;"]),
)
def test_the_values_of_parameters_are_hidden(secret, name, place, frame, mark):
    assert_hidden(secret, frame.format(f"{place}{mark}{name}={secret}&b=2"))


@given(SECRETS, st.lists(st.sampled_from(["@", ":", "/", "?token=", "s3://", "a", " ", "&", "'"])))
def test_whatever_stands_around_an_address_its_password_is_hidden(secret, parts):
    text = f"{''.join(parts)}s3://u:{secret}@b{''.join(reversed(parts))}"
    told = hide_credentials(text)
    for once_more in (told, hide_credentials(told)):
        assert "hUn" not in once_more
        assert "t3R" not in once_more


WORDS = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=10)


@given(st.text())
def test_text_without_an_at_sign_or_a_scheme_stays(text):
    text = re.sub(r"[@?&#;]|:/", "", text)
    assert hide_credentials(text) == text


@given(st.text())
def test_at_signs_without_a_colon_stay(text):
    text = re.sub(r"[:?&#;]", "", text)
    assert hide_credentials(text) == text


@given(WORDS, WORDS, WORDS, st.integers(0, 65535))
def test_ordinary_words_stay(one, two, three, number):
    for text in (
        f"{one}@{two}.org", f"From: {one} <{two}@{three}.org>", f"mailto:{one}@{two}",
        f"data.{one}={two}", f"+{one}.{two}={three}", f"[{{prefix: {one}, weight: {number}}}]",
        f"run:{one}@http://{two}:{number}/{three}", f"run:{one}@sqlite:////{two}/{three}.db",
        f"C:\\{one}\\{two}@{three}", f"c:/{one}@{two}/{three}", f"/{one}/{two}@{three}/a:b",
        f"http://{one}:{number}/{two}@{three}", f"https://{one}/{two}?q={three}&page=1#top",
        f"http://[::1]:{number}/@{one}", f"http://{one}:{number}/#/experiments/1/runs/{two}",
        f"s3://{one}/{two}@{three}/#{number}", f"s3://{one}: {two}@{three}",
        f"'s3://{one}', {two}@{three}",
        f"file:///{one}@{two}/{three}", f"sqlite:////{one}@{two}/{three}.db",
        f"{{'{one}': '{two}@{three}'}}", f'{{"{one}":"{two}@{three}"}}',
        f"git@{one}:{two}/{three}", f"git+https://{one}/{two}@{three}",
        f"{one}/{two}:{three}: {number} samples", f"params/{one}@{number}",
    ):  # fmt: skip
        assert hide_credentials(text) == text


@given(st.datetimes(min_value=datetime(1900, 1, 1)), WORDS)
def test_times_stay(moment, host):
    for time in (
        moment.isoformat(), f"{moment}", f"[{moment:%H:%M:%S}]", f"{moment:%H:%M}",
        f"{moment:%H:%M:%S},5",
        f"{moment:%Y-%m-%dT%H:%M:%S}Z", f"{moment:%Y-%m-%dT%H:%M:%S}+02:00",
    ):  # fmt: skip
        assert hide_credentials(f"{time}@{host} {time} {host}@{time}") == (
            f"{time}@{host} {time} {host}@{time}"
        )


@given(st.integers(0, 100), st.integers(0, 59), st.floats(0, 99), WORDS)
@example(45, 12, 1.05, "a")
def test_lines_of_progress_stay(percent, seconds, rate, name):
    bar = "█" * (percent // 10) + "▌"
    for line in (
        f"{name}: {percent:3}%|{bar:10}| {percent}/100 [00:{seconds:02}<01:59, {rate:5.2f}it/s]",
        f"[{seconds}s] {name}@2x.png, {percent} of 100, {rate:.1f}/s",
        f"{percent}% {rate}s/it loss/total={rate} grad_norm={rate}",
    ):
        assert hide_credentials(line) == line


def test_the_pages_and_all_source_outside_of_tests_stay():
    """What they say with a password in it is told by the word before it, and by nothing else."""
    given = re.compile(r"user:password@|USER:PASSWORD@|hide_credentials|_TIME|\\d\{1,2\}:")
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "Makefile"]
    files += [*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("tests/golden/**/*.yaml")]
    for room in ("trainer", "pipelines", "cluster", "models", "benchmarks", "install"):
        files += (ROOT / room).rglob("*.py")
    lines = [line for file in files for line in file.read_text().splitlines()]
    assert len(lines) > 30_000
    assert [
        line for line in lines if hide_credentials(line) != line and not given.search(line)
    ] == []


@pytest.mark.parametrize(
    "part",
    [
        "a:",
        "@",
        "a",
        "http://",
        "?token=",
        "a-",
        "run:",
        ":",
        "?a=",
        "token",
        "[:",
        "(",
        "s3:/",
        "x:'",
    ],
)
@pytest.mark.parametrize("end", ["", "@b", ":/", ":x@h", "="])
def test_the_time_grows_with_the_length_alone(part, end):
    """What takes the square of it would be at this for minutes, until the timeout ends it."""
    for begin in ("", "http://", "s3://[", "?"):
        hide_credentials(f"{begin}{part * (200_000 // len(part))}{end}")
