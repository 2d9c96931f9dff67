"""From an exception to the line that the user reads and the exit code of the process."""

from __future__ import annotations

import difflib
import os
import re
import sys

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from lab.cli.actions import ACTIONS
from lab.core.errors import explain, nearest
from lab.core.sources import ROOT

EXIT_DEFECT, EXIT_USER = 1, 2


def report_error(error: Exception) -> int:
    """Print one line for what a user can fix, a traceback for a defect; return the exit code."""
    if isinstance(error, BrokenPipeError):
        try:
            print(flush=True)  # raises only where the pipe is the output's
        except BrokenPipeError:  # `| head` reads no more; Python flushes once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_DEFECT
    message = explain(error) or explain_config(error) or explain_launcher(error)
    if message is not None:
        print(f"error: {message}", file=sys.stderr)
        return EXIT_USER
    from lab.runner.experiment import describe  # torch's import takes seconds

    failure = describe(error)
    print(failure.traceback, file=sys.stderr)
    print(f"error: {': '.join(filter(None, [failure.key, str(failure)]))}", file=sys.stderr)
    return EXIT_DEFECT


def explain_config(error: Exception) -> str | None:
    """Return the message of an error in the words of the command line or in a YAML file."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        files = (ROOT / "conf" / group).glob("*.yaml")  # Hydra names none for an item of a list
        hint = nearest(name, error.options or [path.stem for path in files])
        return f"{group or 'config'}={name}: there is no such choice; {hint}"
    if isinstance(error, OverrideParseException):
        word = str(error.override)
        key, equals, _ = word.partition("=")
        if not equals:
            close = difflib.get_close_matches(word, ACTIONS, n=1) or ["list"]
            return f"{word}: must be KEY=VALUE; did you mean action={close[0]}?"
        return (
            f"{word}: cannot be read; a value with ~, <, >, brackets or letters beyond "
            f"a-z needs quotes inside of quotes, e.g. '{key}=\"VALUE\"'."
        )
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    if ambiguous := re.search(r"Ambiguous value for argument '(.+)'", str(error)):
        return (
            f"{ambiguous[1]}: several values; add -m to run each: python run.py -m {ambiguous[1]}"
        )
    if unnamed := re.search(r"Interpolation key '(\w+)\.name' not found", str(error)):
        choice = next((word for word in sys.argv if word.startswith(f"{unnamed[1]}=")), unnamed[1])
        return f"{choice.replace('=', '/')}.yaml: needs a line `name: …`"
    cause = error.__cause__ if isinstance(error, HydraException) else error
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.full_key:
        parent = cause.parent_node
        known = [str(key) for key in parent] if OmegaConf.is_dict(parent) else []
        start = cause.full_key.rpartition(".")[0]
        known = [f"{start}.{key}" if start else key for key in known if key != "_target_"]
        return f"{cause.full_key}: there is no such key; {nearest(cause.full_key, known)}"
    return " ".join(str(error).split())[:400]


def explain_launcher(error: Exception) -> str | None:
    """Return the message of an error of Hydra's launchers: not installed, or a job was killed."""
    if "hydra_plugins" in str(error):
        return 'hydra/launcher: needs `pip install "immunization-bench[slurm]"`.'
    if type(error).__module__.partition(".")[0] in ("submitit", "joblib"):
        return (
            "hydra/launcher: a job of the sweep ended without a result; `python run.py "
            f"action=status` shows all, the same command continues. {error}"
        )
    return None
