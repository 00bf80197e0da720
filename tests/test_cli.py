"""cli.py: flags from a dataclass; what a user can mend ends in one line and exit code 2, anything else as it is."""

import errno
from dataclasses import dataclass, field

import pytest

from patchrank import cli
from patchrank.errors import UserError


@dataclass(frozen=True)
class Inner:
    step: int = 1
    """Steps."""


@dataclass(frozen=True)
class Config:
    """A command."""

    keep: float = 0.5
    """Share that stays."""
    inner: Inner = field(default_factory=Inner)
    """More."""


def run(action, *args: str):
    cli.run(action, Config, prog="python -m something", args=list(args))


def raising(error: BaseException):
    def main(config: Config) -> None:
        raise error

    return main


def test_flags_reach_the_config_nested_ones_without_prefix() -> None:
    seen = []
    run(seen.append, "--keep", "0.25", "--step", "7")
    assert seen == [Config(keep=0.25, inner=Inner(step=7))]


def test_a_user_error_is_one_line_with_code_2(capsys) -> None:
    with pytest.raises(SystemExit) as left:
        run(raising(UserError("--keep 2: must lie\n   in (0, 1]; give 0.6")))
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: --keep 2: must lie in (0, 1]; give 0.6\n"


@pytest.mark.parametrize(
    "number, word",
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "no permission"),
        (errno.ENOENT, "cannot be made there"),
        (errno.EPERM, "not permitted"),
        (errno.EROFS, "read-only"),
        (errno.ENOTDIR, "is a file, not a folder"),
        (errno.EEXIST, "a file stands"),
        (errno.EISDIR, "a folder stands"),
        (errno.ENAMETOOLONG, "too long"),
        (errno.EFBIG, "size limit"),
    ],
)
@pytest.mark.parametrize("place", ["/some/where", None])
def test_system_errors_name_place_and_remedy(capsys, number: int, word: str, place: str | None) -> None:
    with pytest.raises(SystemExit) as left:
        run(raising(OSError(number, "what the system says", place)))
    printed = capsys.readouterr().err
    assert left.value.code == 2
    assert printed.startswith(f"error: {place or 'the output folder'}: ") and word in printed
    assert ";" in printed and printed.count("\n") == 1


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), ValueError("a bug"), KeyError("a bug")])
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run(raising(error))


def test_an_interrupt_says_how_to_go_on(capsys) -> None:
    with pytest.raises(SystemExit) as left:
        run(raising(KeyboardInterrupt()))
    assert left.value.code == 130
    assert "run the same command again" in capsys.readouterr().err


def test_an_unknown_flag_leaves_with_code_2() -> None:
    with pytest.raises(SystemExit) as left:
        run(print, "--keeep", "0.25")
    assert left.value.code == 2
