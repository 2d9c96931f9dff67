"""Words that attackers teach: new ones, where they begin, and the class noun beside them."""

from dataclasses import replace

import pytest
import torch
from concept_examples import attack, launch, model, task

from attacks.diffusion.tokens import LearnedToken
from lab.core.errors import UserError


def test_a_learned_word_moves_its_own_row_only_and_a_known_word_is_refused():
    net = model().copy()
    word = LearnedToken("attacks.x", net, "<new1>", 2, "mosaic")
    table = net.text_encoders[0].get_input_embeddings()
    old = len(model().text_encoders[0].get_input_embeddings().weight)
    assert word.expression == "<new1> <new1>_1"
    with torch.no_grad():
        word.rows.fill_(7.0)
    word.close()
    assert (table.weight[word.ids] == 7).all()
    assert torch.equal(table.weight[:old], model().text_encoders[0].get_input_embeddings().weight)
    for token in ("<new1>", "fox", "fox</w>"):
        with pytest.raises(UserError, match=r"attacks\.x\.token"):
            LearnedToken("attacks.x", net, token, 1, "fox")


def test_a_searched_word_acts_as_the_nearest_one_and_learns_from_its_gradient():
    net = model().copy()
    encoder = net.text_encoders[0]
    table = encoder.get_input_embeddings().weight.detach().clone()
    word = LearnedToken("attacks.x", net, "<new1>", 2, "fox", nearest=True)
    ids = net.tokenizers[0]("mosaic neon", add_special_tokens=False).input_ids[:2]
    with torch.no_grad():  # longer rows: the cosine counts, not the distance
        word.rows.copy_(3 * table[ids] + 0.001)
    embedded = encoder.get_input_embeddings()(torch.tensor(word.ids))
    assert torch.allclose(embedded, table[ids])
    assert word.nearest_words() == net.tokenizers[0].decode(ids)
    embedded.sum().backward()
    assert (word.rows.grad == 1).all()
    word.close()
    assert torch.allclose(encoder.get_input_embeddings().weight[word.ids], table[ids])


@pytest.mark.parametrize("kind", ["custom_diffusion", "textual_inversion"])
@pytest.mark.parametrize(
    ("initializer", "begins"),
    [("words", ["stained", "glass"]), ("auto", ["style"]), ("red fox", ["red", "fox"])],
)
def test_a_new_word_begins_at_the_mean_of_what_the_initializer_names(kind, initializer, begins):
    net, concept = (
        model().copy(),
        replace(task("mosaic"), words="stained glass", prior=replace(task().prior, prompts=())),
    )
    table = net.text_encoders[0].get_input_embeddings().weight
    pieces = net.tokenizers[0](" ".join(begins), add_special_tokens=False).input_ids
    expected = table[pieces].mean(0).detach().clone()
    moving = attack(kind, initializer=initializer).open(net, concept, 0)
    (row,) = next(v for k, v in moving.weights().items() if k.startswith("embedding."))
    assert torch.equal(row, expected)
    assert not torch.equal(row, table[pieces[0]]) or len(pieces) == 1


@pytest.mark.parametrize(
    ("word", "told"), [("auto", "sks thing"), ("beast", "sks beast"), ("", "sks")]
)
def test_the_class_word_of_dreambooth_is_taught_and_asked_for(word, told):
    prior = replace(task().prior, prompts=("a photo of a thing",) * len(task().prior))
    found = launch(
        attack("dreambooth", class_word=word, token="sks"),
        what=replace(task("mosaic"), prior=prior),
    )
    assert found.info["expression"] == told
    assert all(told in asked for asked in found.info["prompts"]["name"])
