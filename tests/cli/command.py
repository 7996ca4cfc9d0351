"""The command line, called in this process."""

import contextlib
import io
import subprocess
import sys

import pytest

from ragstone.cli import main


def ragstone(*arguments, stdin=""):
    """One call of the command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
