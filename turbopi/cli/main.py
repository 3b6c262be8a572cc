"""The `turbo-pi` command."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import tyro
from rich.console import Console
from rich.markup import escape

from .audit import audit
from .bench import bench
from .calibrate import calibrate
from .compare import compare
from .convert import convert
from .demos import demos
from .doctor import doctor
from .eval import eval_
from .export import export_
from .infer import infer
from .info import info
from .init import init
from .report import report
from .serve import serve
from .sweep import sweep
from .train import train

COMMANDS: dict[str, Callable[..., int]] = {
    "infer": infer,
    "serve": serve,
    "eval": eval_,
    "compare": compare,
    "sweep": sweep,
    "report": report,
    "bench": bench,
    "audit": audit,
    "calibrate": calibrate,
    "demos": demos,
    "train": train,
    "doctor": doctor,
    "convert": convert,
    "export": export_,
    "init": init,
    "info": info,
}
# What a user can cause and mend: one line says it. Anything else is our fault and shows its traceback.
USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, PermissionError, ImportError, OSError)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its status; 1 after an error of the user's, 2 after a wrong command line."""
    try:
        status: int = tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="turbo-pi", description="Run pi0 and pi0.5 robot policies.", args=arguments
        )
    except USER_ERRORS as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]error:[/] {escape(str(error))}")
        sys.exit(1)
    sys.exit(status)
