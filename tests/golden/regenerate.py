"""Store values anew: `python tests/golden/regenerate.py immunize/mima attacks/lora`, or `all`.

A word stands for every key that it equals or begins: `immunize/mima` is all kinds of that preset.
"""

import json
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(path) for path in (TESTS / "golden", TESTS, TESTS.parent)]

import conftest  # noqa: E402, F401 - one thread and the kernels of the tests, before torch

import golden_cases as cases  # noqa: E402 # isort: skip


def chosen(words: list[str], keys: list[str]) -> list[str]:
    """Return the keys that the words stand for; a word without any ends the program."""
    found: set[str] = set()
    for word in words:
        hits = {k for k in keys if word in ("all", k) or k.startswith(f"{word}/")}
        if not hits:
            sys.exit(f"{word}: no such key; keys are, e.g., {', '.join(keys[:3])}")
        found |= hits
    return sorted(found)


def main(words: list[str]) -> None:
    """Compute the named values, print what changes, and write the file."""
    if not words:
        sys.exit(__doc__)
    made, values = cases.computations(), cases.stored()
    for key in chosen(words, sorted({*made, *values})):
        if key not in made:
            print(f"{key}: no such preset any more; taken out")
            del values[key]
            continue
        old, new = values.get(key), made[key]()
        same = old == new
        print(f"{key}: {'unchanged' if same else 'new'}")
        if not same and old is not None:
            print(f"  old {json.dumps(old)}\n  new {json.dumps(new)}")
            within = not cases.differences(key, old, new)
            print(f"  {'within' if within else 'beyond'} the tolerance of the test")
        values[key] = new
    cases.VALUES.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
