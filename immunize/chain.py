"""Immunizers one after the other."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, InstanceOf, model_validator
from torch import Tensor
from typing_extensions import Self

from lab.core.config import Text, config
from lab.core.data import Kind
from lab.core.hashing import stage_key
from lab.core.training import part_of
from lab.core.types import AnyCase, Checkpoint, Immunizer, Log, Model

Row = tuple[int, dict[str, float]]


class _PartCheckpoint:
    """The checkpoint of one immunizer of a chain.

    Args:
        number: of the immunizer, from 0.
        start: the weights that it starts from; the first one's are those that the chain is given.
        rows: what the immunizers before it have logged.
    """

    def __init__(
        self, checkpoint: Checkpoint, number: int, start: dict[str, Tensor], rows: list[Row]
    ) -> None:
        self.checkpoint, self.number, self.start, self.rows = checkpoint, number, start, rows

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        saved = self.checkpoint.load()
        if saved is None or saved[1]["part"] != self.number:
            return None
        return part_of(saved[0], "own/"), saved[1]["values"]

    def save(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        whole = {f"own/{name}": t for name, t in tensors.items()}
        whole |= {f"start/{name}": t for name, t in self.start.items()}
        facts = {"step": values["step"], "part": self.number, "rows": self.rows}
        self.checkpoint.save(whole, facts | {"values": values})


@config
class Chain(Immunizer):
    """Every immunizer starts from the weights that the one before left.

    Steps of the log go on from one to the next.

    Args:
        methods: name → immunizer, in order.
    """

    accepts: ClassVar[frozenset[Kind]] = frozenset({"linear", "deep", "diffusion"})

    methods: Annotated[dict[str, InstanceOf[Immunizer]], Field(min_length=1)]
    name: Text = "chain"

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        for name, method in self.methods.items():
            if method.before_erasure:
                fix = "takes the model before erasure; run it alone, write its U-Net with "
                fix += "action=export path=FILE.safetensors, and put immunize/stored here"
                raise ValueError(f"methods.{name}: {fix}")
        self.accepts = frozenset.intersection(*(m.accepts for m in self.methods.values()))  # type: ignore[misc]
        if not self.accepts:
            raise ValueError("methods take different kinds of models")
        return self

    def check(self, cases: tuple[AnyCase, ...]) -> None:
        for method in self.methods.values():
            method.check(cases)

    def may_change(self, parameter: str) -> bool:
        return any(method.may_change(parameter) for method in self.methods.values())

    def texts(self) -> dict[str, str]:
        return {key: text for m in self.methods.values() for key, text in m.texts().items()}

    def fingerprint(self) -> str:
        return stage_key(**{name: m.fingerprint() for name, m in self.methods.items()})

    def __call__(
        self, model: Model, case: AnyCase, *, seed: int, checkpoint: Checkpoint | None, log: Log
    ) -> Model:
        rows: list[Row] = []
        first, saved = 0, None if checkpoint is None else checkpoint.load()
        if saved is not None and saved[1]["part"]:
            first, rows = saved[1]["part"], [tuple(row) for row in saved[1]["rows"]]
            model = model.copy()
            model.load_state_dict(part_of(saved[0], "start/"))
            for step, values in rows:
                log(step, **values)
        for i, method in list(enumerate(self.methods.values()))[first:]:
            start = model.state_dict() if i else {}
            part = None if checkpoint is None else _PartCheckpoint(checkpoint, i, start, list(rows))
            model = method(model, case, seed=seed, checkpoint=part, log=_continued(log, rows))
        return model


def _continued(log: Log, rows: list[Row]) -> Log:
    """Return a log whose steps go on from those of ``rows``, to which it adds."""
    offset = rows[-1][0] + 1 if rows else 0

    def continued(step: int, **values: float) -> None:
        rows.append((offset + step, values))
        log(offset + step, **values)

    return continued
