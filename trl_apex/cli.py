"""The command line `trl-apex`. Nothing heavy is imported before the command is known."""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

# Command -> what it does. Each lives in `trl_apex.commands`, as a module with `run(arguments)`.
COMMANDS = {
    "demo": "train the tiny pipeline that comes with the package, and show what came of it",
    "train": "train a text-to-image model on several rewards",
    "evaluate": "compare a tuned model with its base on held-out prompts",
    "benchmark": "run a benchmark of this repository",
    "report": "write the HTML report of one run, or of several side by side",
    "serve-rewards": "serve reward functions to trainers over HTTP",
    "push": "upload a run to the Hugging Face Hub",
    "plan": "memory and compute of a training configuration, before it runs",
    "env": "versions and devices, for bug reports",
}
USER_MISTAKE, FAILURE, INTERRUPTED = 2, 1, 130


class CommandError(Exception):
    """A failure that is explained in full by its message.

    Args:
        message (`str`): what happened, and what to do.
        exit_code (`int`): of the command.
    """

    def __init__(self, message: str, exit_code: int = FAILURE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments (`Sequence[str]`, *optional*): the command line without the program's name.

    Returns:
        `int`: exit code: 0, 2 for a mistake of the user, 1 for another failure, 130 if interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if not given or given[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if given else USER_MISTAKE
    if given[0] in ("-V", "--version"):
        from . import __version__

        print(f"trl_apex {__version__}")
        return 0
    command = given[0]
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Use one of: {', '.join(COMMANDS)}."
        return _fail("trl-apex", f"no command {command!r}. {hint}", USER_MISTAKE)
    try:
        module = importlib.import_module(f"trl_apex.commands.{command.replace('-', '_')}")
        module.run(given[1:])
        return 0
    except Exception as error:
        if debug:
            raise
        return _fail(f"trl-apex {command}", *explain(error))
    except KeyboardInterrupt:
        return _fail(f"trl-apex {command}", "interrupted.", INTERRUPTED)
    except SystemExit as stop:  # argparse, after --help or a wrong flag
        return stop.code if isinstance(stop.code, int) else USER_MISTAKE


def help_text() -> str:
    """What `trl-apex --help` prints."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return (
        "usage: trl-apex COMMAND [arguments]\n\nMulti-reward fine-tuning of text-to-image models.\n\ncommands:\n"
        f"{rows}\n\n`trl-apex COMMAND --help` tells the arguments of a command. `--debug` shows the traceback of an error."
    )


def explain(error: Exception) -> tuple[str, int]:
    """One line about an error, and the exit code.

    Example:
        >>> explain(ValueError("`max_steps` must be positive.\\nFound -3."))
        ('`max_steps` must be positive. Found -3.', 2)
        >>> explain(KeyError("x"))
        ("KeyError: 'x'. Run it again with --debug to see where.", 1)
    """
    text = " ".join(str(error).split())
    code = getattr(error, "exit_code", None)  # its message says it all
    if isinstance(code, int):
        return text, code
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError):
        return text if not error.filename else f"{error.strerror}: {error.filename}", USER_MISTAKE
    if isinstance(error, ModuleNotFoundError) and str(error.name).startswith("trl_apex"):
        return f"this command is not part of trl_apex yet ({text}).", FAILURE
    if isinstance(error, ValueError | ImportError):
        return text, USER_MISTAKE
    if type(error) is RuntimeError and text.startswith("Training was stopped"):
        return text, FAILURE
    return f"{type(error).__name__}: {text}. Run it again with --debug to see where.".replace("..", "."), FAILURE


def _fail(program: str, message: str, code: int) -> int:
    if os.environ.get("RANK", "0") == "0" or code == FAILURE:
        print(f"{program}: {'' if code == INTERRUPTED else 'error: '}{message}", file=sys.stderr)
    return code
