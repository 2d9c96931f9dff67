"""Texts from outside, wherever they come from: one line of plain text, and no special token of the
tokenizer.
"""

from dataclasses import replace

import pytest
from pydantic import ValidationError
from release_examples import composed, tiny_folder, world
from tiny_diffusion import tiny_case
from tiny_sd import bang_tokenizer

from lab.core.config import OptionalPrompt, Prompt, Prompts, config, user_error
from lab.core.errors import UserError
from lab.core.prompts import check_case, texts
from lab.runner.assemble import assemble, check_cases

END = "<|endoftext|>"
BAD = ("a\x00fox", "a fox\x07", "one\ntwo", "a \u202efox", "  ", 3, None)


@config
class Options:
    line: Prompt = "x"
    maybe: OptionalPrompt = ""
    several: Prompts = ()


@pytest.mark.parametrize("given", BAD, ids=repr)
def test_an_option_that_is_no_prompt_is_refused(given):
    for options in ({"line": given}, {"maybe": given}, {"several": ["a fox", given]}):
        with pytest.raises(ValidationError) as caught:
            Options(**options)
        assert user_error(caught.value, "part").key.startswith(f"part.{next(iter(options))}")
    if isinstance(given, str):
        with pytest.raises(UserError, match=r"key\[1\].*(control character|at least one word)"):
            texts("key", ["a fox", given])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("prompts")
    base = tiny_folder(root / "base")

    def parts(*overrides, metrics=False):
        found = assemble(composed(*world(root, base), *overrides))
        return found if metrics else replace(found, metrics={})

    return parts


@pytest.fixture(scope="module")
def plain(built):
    found = built()
    return found, found.scenario.load(0).cases[0]


def said(captioned):
    return replace(captioned, prompts=(*captioned.prompts[:-1], f"{END} a photo of rex"))


def with_concept(case, role, **changes):
    first, *rest = getattr(case, role)
    return replace(case, **{role: (replace(first, **changes), *rest)})


CASES = (
    lambda c: with_concept(c, "targets", prompts={"name": (f"a fox {END}",)}),
    lambda c: with_concept(
        c, "others", prompts={"name": ("neon",), "reworded": ("<|EndOfText|>",)}
    ),
    lambda c: with_concept(c, "targets", own=said(c.targets[0].own)),
    lambda c: with_concept(c, "others", train=said(c.others[0].train)),
    lambda c: replace(c, rehearsal=(replace(tiny_case().rehearsal[0], prior=said(c.keep)),)),
    lambda c: replace(c, keep=said(c.keep)),
    lambda c: replace(c, unrelated=said(c.unrelated)),
    lambda c: replace(c, regularizers=(*c.regularizers, f"a {END} b")),
    lambda c: replace(c, sampling=replace(c.sampling, negative="a <|startoftext|> b")),
)


def test_no_text_of_a_case_may_hold_a_special_token(plain):
    parts, case = plain
    check_cases(parts, (case,))
    for change in CASES:
        with pytest.raises(UserError, match="a special token of the tokenizer") as caught:
            check_cases(parts, (change(case),))
        assert caught.value.key == "scenario"


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ([f"attacks.lora.token='{END}'", "attacks.lora.template=token"], "attacks.lora.token"),
        ([f"attacks.lora.sampling={{negative: '{END} a'}}"], "attacks.lora.sampling.negative"),
        ([f"erase.anchor='a {END}'"], "erase.anchor"),
    ],
)
def test_no_option_may_hold_a_special_token(built, overrides, key):
    parts = built(*overrides)
    with pytest.raises(UserError, match="special token") as caught:
        check_cases(parts, parts.scenario.load(0).cases)
    assert caught.value.key == key


def test_what_a_folder_wants_erased_needs_an_eraser_unless_it_is_released_already(built):
    with pytest.raises(UserError, match=r"scenario\.concepts\[\d\] has erase: true; set erase=uce"):
        built("erase=none")
    assert built("erase=none", "eval=[audit]", metrics=True).metrics


def test_prompts_that_end_in_what_sd_2_pads_with_are_text():
    check_case(replace(tiny_case(), regularizers=("a fox!",)), [bang_tokenizer()])
