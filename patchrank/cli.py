"""What every command shares: a typed dataclass becomes its flags; user mistakes become one line and exit code 2.

The dataclass is the only home of a command's defaults and help texts (the docstring under each field).
"""

import errno
import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

from patchrank.errors import UserError

Config = TypeVar("Config")

_SPACE = "free some space, then run the same command again: finished work is kept"
_SYSTEM_ERRORS = {
    errno.ENOSPC: f"the disk is full; {_SPACE}",
    errno.EDQUOT: f"the disk quota is used up; {_SPACE}",
    errno.EFBIG: f"the file would exceed the size limit here; {_SPACE}",
    errno.EACCES: "no permission there; choose another folder with --out, or change its permissions",
    errno.EPERM: "not permitted there; choose another folder with --out, or change its permissions",
    errno.EROFS: "that file system is read-only; choose another folder with --out",
    errno.ENOTDIR: "a part of this path is a file, not a folder; choose another folder with --out",
    errno.EEXIST: "a file stands where a folder should be; choose another folder with --out",
    errno.ENOENT: "is not there, and cannot be made there; choose another folder with --out, or check the path",
    errno.EISDIR: "a folder stands where a file should be; choose another folder with --out",
    errno.ENAMETOOLONG: "the path is too long; choose a shorter folder with --out",
}


def fail(message: str) -> None:
    """Print `error: message` as one line on standard error and leave with exit code 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def run(main: Callable[[Config], None], config: type[Config], *, prog: str, args: list[str] | None = None) -> None:
    """Parse `args` (default: the command line) into `config` and call `main` with it.

    A `UserError` and the system errors that a user can mend (full disk, no permission) end in `fail`.
    """
    try:
        main(tyro.cli(config, prog=prog, args=args, config=(tyro.conf.OmitArgPrefixes,)))
    except UserError as error:
        fail(str(error))
    except OSError as error:
        if error.errno not in _SYSTEM_ERRORS:
            raise
        fail(f"{error.filename or 'the output folder'}: {_SYSTEM_ERRORS[error.errno]}")
    except KeyboardInterrupt:
        print("interrupted; finished work is kept, run the same command again to go on", file=sys.stderr)
        raise SystemExit(130) from None
