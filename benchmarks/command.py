"""What the programs here share: errors told in one line, exit codes, a bar while something lasts."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

progress = partial(tqdm, leave=False, disable=None)  # a bar on stderr while it lasts, none if that is a file


class UserError(Exception):
    """Something that the user can put right, told in one line."""


class WrongResultError(Exception):
    """Something that was to be timed computes something else."""


class Parser(argparse.ArgumentParser):
    """Raises its errors, for them to be told like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise the message that argparse would print below the usage."""
        raise UserError(message)


def check_folder(output: Path | None) -> None:
    """Raise unless a file can be written there; before the work, not after it."""
    if output is not None and not output.parent.is_dir():
        raise UserError(f"--output: there is no folder {output.parent}")


def exit_code(program: str, work: Callable[[], None]) -> int:
    """Do the work. Exit codes: 0 all right, 1 wrong results, 2 an error of the user."""
    try:
        work()
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except WrongResultError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
