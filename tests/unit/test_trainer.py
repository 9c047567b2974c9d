"""Learning a vocabulary: the settings that Llama 2's own file states, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2

from llama2.errors import TokenizerError
from llama2.text import tokenizer, trainer

#: What spec 2.1 read out of Llama 2's tokenizer.model, but for sizes of the corpus.
TRAINER = {
    "model_type": 2,
    "character_coverage": 0.99995,
    "shuffle_input_sentence": True,
    "max_sentence_length": 4192,
    "max_sentencepiece_length": 16,
    "split_by_unicode_script": True,
    "split_by_whitespace": True,
    "split_by_number": True,
    "split_digits": True,
    "treat_whitespace_as_suffix": False,
    "allow_whitespace_only_pieces": True,
    "byte_fallback": True,
    "hard_vocab_limit": True,
    "use_all_vocab": False,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "unk_surface": " ⁇ ",
}


@pytest.fixture(scope="module")
def text() -> str:
    return Path(trainer.__file__).read_text() * 2 + "x" * 5000 + "\n1 22 333\n    indented\n"


@pytest.fixture(scope="module")
def trained(text: str) -> trainer.Trained:
    return trainer.train([text], 400)


def test_settings_are_those_of_llama_2(trained: trainer.Trained) -> None:
    model = sentencepiece_model_pb2.ModelProto.FromString(trained.model)
    assert {name: getattr(model.trainer_spec, name) for name in TRAINER} == pytest.approx(TRAINER)
    assert len(model.pieces) == 400
    assert [piece.piece for piece in model.pieces[:4]] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert (model.normalizer_spec.name, model.normalizer_spec.add_dummy_prefix) == ("identity", True)
    assert not model.normalizer_spec.remove_extra_whitespaces


def test_digits_stand_alone_and_nothing_is_lost(trained: trainer.Trained, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained.model)
    ours = tokenizer.from_sentencepiece(tmp_path / "tokenizer.model")
    ids = ours.encode("1 22 333")
    assert [ours.token_bytes(token) for token in ids if ours.token_bytes(token).strip()] == [*map(str.encode, "122333")]
    for kept in ("  two  spaces ", "tab\tnewline\n", "日本 ﬁ é", "\0"):
        assert ours.decode(ours.encode(kept)) == kept


def test_lines_are_counted(trained: trainer.Trained, text: str) -> None:
    lines = text.split("\n")
    assert trained.too_long == 1
    assert trained.lines == sum(0 < len(line) <= 4192 for line in lines)


def test_the_same_text_gives_the_same_vocabulary(text: str, trained: trainer.Trained) -> None:
    assert trainer.train([text], 400).model == trained.model
    assert trainer.train([text], 400, sample=101).model == trainer.train([text], 400, sample=101).model
    assert trainer.train([text], 400, sample=101).model != trained.model


@pytest.mark.parametrize(("texts", "vocabulary"), [([], 400), (["a few words"], 5000), (["\n\n"], 300)])
def test_too_little_text(texts: list[str], vocabulary: int) -> None:
    with pytest.raises(TokenizerError, match=f"no vocabulary of {vocabulary} tokens") as caught:
        trainer.train(texts, vocabulary)
    assert "\n" not in str(caught.value)
