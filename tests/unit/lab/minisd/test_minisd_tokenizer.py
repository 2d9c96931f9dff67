"""MiniSD's tokenizer: CLIP's format, the same from the same texts, and what it makes of a
prompt.
"""

from __future__ import annotations

import json

import pytest
from minisd_words import world_prompts

from lab.minisd.train import networks

FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")


def test_same_texts_same_files(tmp_path) -> None:
    """Order and repetitions do not matter, any other text does."""
    texts = world_prompts()[:200]
    lists = texts, [*reversed(texts), texts[0]], [*texts, "zebra zebra", "zebra crossing"]
    written = []
    for number, words in enumerate(lists):
        networks.train_tokenizer(words, tmp_path / str(number), 560)
        written.append([(tmp_path / str(number) / name).read_bytes() for name in FILES])
    assert written[0] == written[1]
    assert written[0][0] != written[2][0]


def test_format_is_clips(tokenizer_folder, tokenizer) -> None:
    """The ids lie as in CLIP: 256 bytes, 256 bytes that end a word, one id per merge, start,
    end.
    """
    vocab = json.loads((tokenizer_folder / "vocab.json").read_text())
    merges = (tokenizer_folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert len(vocab) == len(tokenizer) == 512 + len(merges[1:]) + 2
    by_id = {i: token for token, i in vocab.items()}
    assert all(len(by_id[i]) == 1 and by_id[256 + i] == f"{by_id[i]}</w>" for i in range(256))
    assert [by_id[512 + i] for i in range(len(merges) - 1)] == [
        m.replace(" ", "") for m in merges[1:]
    ]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(vocab) - 2, len(vocab) - 1)


@pytest.mark.parametrize(
    "text",
    [
        "žluťoučký kůň",
        "🦊 and 🦄🏽",
        "x=3.14%!?",
        "\x01 \x7f",
    ],
)
def test_any_text_round_trips(tokenizer, text) -> None:
    """Nothing is unknown: the pieces of any text are bytes that give it back."""
    ids = tokenizer(text).input_ids
    assert tokenizer.eos_token_id not in ids[1:-1]  # the end token doubles as "unknown"
    squeezed = "".join(text.split())
    back = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(back.split()) == squeezed


def test_tokenize_pads_with_the_end_and_cuts_as_stable_diffusion_does(tokenizer) -> None:
    ids = networks.tokenize(tokenizer, ["", "a fox", "fox " * 60])
    sos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    a, fox = tokenizer.convert_tokens_to_ids(["a</w>", "fox</w>"])
    assert ids[0].tolist() == [sos] + [eos] * 31
    assert ids[1].tolist() == [sos, a, fox] + [eos] * 29
    assert ids[2].tolist() == [sos] + [fox] * 30 + [eos]
