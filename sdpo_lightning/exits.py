"""Rank 1: which error ends the command with which exit code, in one line."""

from __future__ import annotations

import pickle
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from sdpo_lightning.redaction import hide_in_text
from sdpo_lightning.types import ConfigurationError, ResumeError, SelfCheckError


@contextmanager
def exit_codes(debug: bool, configuration_errors: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn errors for the user into a line on stderr and an exit code.

    Args:
        debug: print the traceback too.
        configuration_errors: other libraries' errors that mean what `ConfigurationError` does.

    Raises:
        SystemExit: 2 for configuration and data, 3 for a refused resume, 1 for a fault at run time.
    """
    wrong: tuple[type[Exception], ...] = (ConfigurationError, *configuration_errors)
    try:
        yield
    except wrong as error:
        _stop(error, 2, debug)
    except ResumeError as error:
        _stop(error, 3, debug)
    except pickle.UnpicklingError as error:
        refused = "`ckpt_path` holds more than tensors and plain values, which might be code, and none of it was run"
        _stop(ResumeError(f"{refused}; give a checkpoint of a run of this package ({type(error).__name__})"), 3, debug)
    except (SelfCheckError, FloatingPointError, OSError) as error:
        _stop(error, 1, debug)


def _stop(error: Exception, code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exception(error)
    print(f"error: {hide_in_text(' '.join(str(error).split()))}", file=sys.stderr)
    raise SystemExit(code)
