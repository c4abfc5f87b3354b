import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from etpo.config import tiny_checkpoint
from etpo.models.token_text import token_texts


@pytest.fixture
def bytes_tokenizer(checkpoint):
    """A token is a byte."""
    return AutoTokenizer.from_pretrained(checkpoint("llama"))


@pytest.fixture
def words_tokenizer():
    """Words begin with ▁, as in SentencePiece; what is no word are bytes."""
    vocabulary = {"<unk>": 0, "</s>": 1, "▁x": 2, "▁=": 3, "▁": 4}
    vocabulary |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def texts_of(tokenizer, ids):
    return token_texts(tokenizer, ids, [[]] * len(ids), [tokenizer.eos_token_id])[0]


def test_a_character_of_several_tokens_is_the_last_ones(bytes_tokenizer):
    ids = bytes_tokenizer.encode("aé\n😀", add_special_tokens=False)
    assert len(ids) == 1 + 2 + 1 + 4
    assert texts_of(bytes_tokenizer, ids) == ["a", "", "é", "\n", "", "", "", "😀"]


def test_an_action_that_ends_inside_a_character_shows_it_broken(bytes_tokenizer):
    ids = bytes_tokenizer.encode("aé", add_special_tokens=False)[:-1]
    assert texts_of(bytes_tokenizer, ids) == ["a", "\ufffd"]


def test_other_tokens_have_the_text_that_they_would_add(bytes_tokenizer):
    ids = bytes_tokenizer.encode("é", add_special_tokens=False)
    (_, of_e_grave) = bytes_tokenizer.encode("è", add_special_tokens=False)
    (letter,) = bytes_tokenizer.encode("b", add_special_tokens=False)
    _, labels = token_texts(bytes_tokenizer, ids, [[letter, ids[1]], [of_e_grave]], [])
    assert labels == [["b", "\ufffd"], ["è"]]  # a byte that alone is no character


def test_the_stop_token_adds_nothing_and_other_special_tokens_their_name(bytes_tokenizer):
    (letter,) = bytes_tokenizer.encode("b", add_special_tokens=False)
    bos, eos = bytes_tokenizer.bos_token_id, bytes_tokenizer.eos_token_id
    others = [[eos], [], [letter]]
    texts, labels = token_texts(bytes_tokenizer, [letter, bos, eos], others, [eos])
    assert texts == ["b", "<s>", ""]
    assert labels == [["</s>"], [], ["b"]]


def test_a_character_that_the_stop_token_breaks_off_is_shown_broken(bytes_tokenizer):
    eos = bytes_tokenizer.eos_token_id
    ids = [*bytes_tokenizer.encode("aé", add_special_tokens=False)[:-1], eos]
    assert texts_of(bytes_tokenizer, ids) == ["a", "", "\ufffd"]


@pytest.mark.parametrize("seed", range(20))
def test_texts_of_any_bytes_join_to_the_text_of_the_action(bytes_tokenizer, seed):
    drawn = random.Random(seed)
    pieces = [bytes([drawn.randrange(256)]), "é".encode(), "日".encode(), b" ", b"\n"]
    data = b"".join(drawn.choice(pieces) for _ in range(40))
    alphabet = {byte: letter for letter, byte in byte_letters().items()}
    ids = [bytes_tokenizer.convert_tokens_to_ids(alphabet[byte]) for byte in data]
    texts = texts_of(bytes_tokenizer, ids)
    assert "".join(texts) == bytes_tokenizer.decode(ids) == data.decode(errors="replace")


def byte_letters() -> dict[str, int]:
    """The letters that stand for bytes in byte-level vocabularies (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def test_blanks_of_words_stay_between_them(words_tokenizer):
    e_acute = [5 + byte for byte in "é".encode()]
    ids = [2, 3, 2, *e_acute, 1]
    texts, labels = token_texts(words_tokenizer, ids, [[3], [2], [], [], [], [3]], [1])
    assert texts == [" x", " =", " x", "", "é", ""]
    assert labels == [[" ="], [" x"], [], [], [], [" ="]]


def test_a_program_of_the_embedded_model(words_tokenizer):
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint())
    program = "    from sklearn.svm import SVC\n    return SVC(C=1.0).fit(x_train, y_train)\n"
    ids = tokenizer.encode(program, add_special_tokens=False)
    texts = texts_of(tokenizer, ids)
    assert "".join(texts) == program
    assert texts == [tokenizer.decode([i]) for i in ids]
