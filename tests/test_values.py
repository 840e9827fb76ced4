"""Numbers, intervals and paths as users type them."""

from pathlib import Path

import pytest

from sra_jax import values
from sra_jax.errors import UserError

TWO = {
    "0,0.7": (0.0, 0.7), "0, 0.7": (0.0, 0.7), "(0,0.7)": (0.0, 0.7), "[0, 0.7]": (0.0, 0.7), "0,0.7,": (0.0, 0.7),
    "1e-1,.5": (0.1, 0.5), "0,1": (0.0, 1.0), "0.3,0.3": (0.3, 0.3),
}  # fmt: skip
ONE = {"0.2": 0.2, "0": 0.0, "(0.2,)": 0.2, "1": 1.0}
NEITHER = (
    "", " ", ",", "a", "a,b", "None", "nan", "nan,nan", "inf", "0,inf", "-0.1", "-0.1,0.2", "0.7,0", "0,1.5",
    "0,0.3,0.7", "0 0.7", "0.2s", "0%,70%", "0..0.7", "0:0.7", "0,,0.7", "((0,0.7))", "0,0.7)", "{0,0.7}", "0x0,1",
    "٠,١", "1_0,1", "True,1", "1e999,1",
)  # fmt: skip


@pytest.mark.parametrize("fixed", [True, False])
def test_intervals(fixed):
    """Two numbers are an interval, one is a fixed value where that is allowed; nothing else passes, or is guessed."""

    def read(given):
        return values.interval("x.interval", given, fixed=fixed, advice="use 0,0.2")

    for text, pair in TWO.items():
        assert read(text) == read(pair) == read(list(pair)) == pair
    for text, k in ONE.items():
        for given in (text, k, (k,)):
            if fixed:
                assert read(given) == (k, k)
            else:
                with pytest.raises(UserError, match=r"x\.interval=.* must be two numbers low,high .*; use 0,0\.2$"):
                    read(given)
    for given in (*NEITHER, None, (None,), ("a,b",), ("",), (True, 1), (0, (0, 1)), (0, 0.3, 0.7), float("nan")):
        with pytest.raises(UserError, match=r"x\.interval=") as caught:
            read(given)
        assert "\n" not in str(caught.value)


def test_whole_numbers():
    for text, number in {"0": 0, "-3": -3, "+7": 7, " 12 ": 12, "4294967295": values.SEED_LIMIT}.items():
        assert values.whole("--n", text) == values.whole("--n", number) == number
    for given in ("", "--5", "5.0", "1e3", "1_000", "٣", "²", "three", "0x10", "nan", True, None, 2.0, float("inf")):
        with pytest.raises(UserError, match=r"--n=.* must be a whole number"):
            values.whole("--n", given)
    for given in ("0", 0, "11", 11, "9" * 5000, 10**12):
        with pytest.raises(UserError, match=r"--n=.* must be at least 1 and at most 10$"):
            values.whole("--n", given, 1, 10)


def test_numbers_are_finite():
    for text, number in {"0.5": 0.5, "1e-4": 1e-4, "-2": -2.0, ".5": 0.5, "3.": 3.0}.items():
        assert values.number("--x", text) == values.number("--x", number) == number
    for given in ("", "nan", "inf", "-inf", "1e400", 10**400, float("nan"), "1,5", "٠٫٥", "half", None, True):
        with pytest.raises(UserError, match=r"--x=.* must be a finite number"):
            values.number("--x", given)
    assert values.number("--x", "0", 0, 1) == 0
    with pytest.raises(UserError, match=r"--x=0 must be above 0 and at most 1$"):
        values.number("--x", "0", 0, 1, open_low=True)
    with pytest.raises(UserError, match=r"--x=1 must be at least 0 and below 1$"):
        values.number("--x", 1, 0, 1, open_high=True)


def test_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert values.path("--workdir", "~/runs/x") == "/home/me/runs/x"
    assert values.path("--workdir", "~") == "/home/me"
    assert values.path("--workdir", Path("runs/x")) == values.path("--workdir", "runs/x") == "runs/x"
    assert values.path("--workdir", "a~b/~c") == "a~b/~c"
    for address in ("file:///data", "https://a.b/c", "GS://b/run"):
        with pytest.raises(UserError, match=r"--workdir=.*://.* is an address \(.*://\) that nothing here reads: use gs://"):
            values.path("--workdir", address)
    for address in ("gs://b/run", "hf://owner/name"):
        with pytest.raises(UserError, match=r"--cache=.*://.* is an address .*; this path is local"):
            values.path("--cache", address, local=True)
    for nothing in ("", "  "):
        with pytest.raises(UserError, match="--workdir= is empty"):
            values.path("--workdir", nothing)
    with pytest.raises(UserError, match="home of a user who is not known"):
        values.path("--workdir", "~no-such-user-here/x")


def test_paths_with_what_lies_there_in_front(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert values.source("--source", "imagefolder:~/cats") == "imagefolder:/home/me/cats"
    assert values.source("--source", "~/cats") == "/home/me/cats"
    for name in ("tfds:imagenet2012", "dataset", "stabilityai/sd-vae-ft-ema", "./x"):
        assert values.source("--source", name) == name
    for given in ("imagefolder:gs://b/cats", "ftp://b/cats"):
        with pytest.raises(UserError, match="is an address"):
            values.source("--source", given)
