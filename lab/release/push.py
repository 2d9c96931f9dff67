"""Upload of an exported folder to a hub repository: off by default, private by default, token from
the environment.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.core.errors import UserError
from lab.release.export import FACTS

KEY, TOKEN = "push_to", "HF_TOKEN"
_NAME = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}")


def _client(token: str) -> Any:
    from huggingface_hub import HfApi

    return HfApi(token=token)


@dataclass(frozen=True)
class Push:
    """A repository that may be pushed to; ``repr`` shows no token."""

    name: str
    api: Any

    def __repr__(self) -> str:
        return f"Push({self.name!r})"

    def upload(self, folder: Path) -> str:
        """Create the repository, private, where it does not exist, and upload ``folder``; returns
        its address.

        An earlier export in it is replaced: files that the new one lacks go.

        Raises:
            UserError: the hub refuses, is not reachable, or the repository is public or holds
                something else.
        """
        try:
            made = self.api.create_repo(self.name, private=True, exist_ok=True)
            if self.api.repo_info(self.name).private is not True:
                told = (
                    "exists and is public; upload the folder yourself if that is what you "
                    "want, or name another."
                )
                raise UserError(KEY, self.name, told)
            there = set(self.api.list_repo_files(self.name)) - {".gitattributes"}
            if there and FACTS not in there:
                told = (
                    f"holds {len(there)} file(s) and no {FACTS}: it is no earlier export, "
                    "which a push replaces."
                )
                raise UserError(KEY, self.name, f"{told} Name another repository.")
            self.api.upload_folder(
                folder_path=str(folder),
                repo_id=self.name,
                delete_patterns="*",  # of an earlier push: `action=verify` would find it surplus
                commit_message="Immunized model with card, record and hashes",
            )
        except UserError:
            raise
        except Exception as error:  # the client raises its own, httpx's and OS errors
            raise UserError(
                KEY, self.name, f"the hub did not take it: {_said(error)}"
            ) from None  # a chain may hold it
        return str(getattr(made, "url", None) or made)


def ready(name: str) -> Push:
    """A checked target of a push; nothing is sent yet.

    Raises:
        UserError: no OWNER/NAME, or no token in the environment.
    """
    if not _NAME.fullmatch(name):
        raise UserError(KEY, name, "must be OWNER/NAME of a repository on the hub.")
    token = os.environ.get(TOKEN, "").strip()
    if not token:
        told = (
            f"needs a token with write access in the environment variable {TOKEN}; stored "
            "logins are not used."
        )
        raise UserError(KEY, name, told)
    return Push(name, _client(token))


def _said(error: Exception) -> str:
    """The first line of an error, without the token."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    token = os.environ.get(TOKEN, "").strip()
    return f"{type(error).__name__}: {text.replace(token, '***') if token else text}"
