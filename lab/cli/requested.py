"""Keys that some actions read and the others do not."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from lab.core.errors import UserError

_READ_BY = {
    "records": ("report", "leaderboard", "compare", "status", "export", "workspace"),
    "path": ("audit", "export", "verify"),  # an audit says itself what it takes instead
    "push_to": ("export",),
    "export.base": ("export", "verify"),
    "dry_run": ("run", "search", "audit"),
    "force": ("run", "train", "search", "audit"),
    **{f"export.{name}": ("export",) for name in ("model", "case", "seed", "attack", "task")},
}


def check_read(cfg: DictConfig) -> None:
    """Whether ``cfg.action`` reads what is set.

    Raises:
        UserError: a key that only other actions read.
    """
    for key, actions in _READ_BY.items():
        value = OmegaConf.select(cfg, key)
        if cfg.action not in actions and value not in (None, False) and value != []:
            told = (
                f"is read by action={' | '.join(actions)}, and this is "
                f"action={cfg.action}: leave it out."
            )
            raise UserError(key, value, told)
