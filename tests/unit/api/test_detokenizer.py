"""Incremental detokenisation: never half a character, and together exactly the tokenizer's decoding."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from support.text_checkpoint import END, SENTENCES, train_tokenizer
from tpmodel_worker.api.tokenizer import Tokenizer as ServedTokenizer

PLAIN = ["a", "b", "▁", "▁a", "▁▁", "hello", "▁world", "é", "ab", "▁the", "c", "▁c"]


def byte_level() -> ServedTokenizer:
    tokenizer = train_tokenizer()
    # Added tokens are written as their text, also where a character of it stands for a byte elsewhere.
    tokenizer.add_tokens(["<think>", AddedToken(" spaced out ", normalized=False), "é€"])
    return ServedTokenizer(tokenizer, {})


def sentencepiece_like() -> ServedTokenizer:
    """A vocabulary with byte fallback whose decoder strips one space at the very beginning."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PLAIN]
    tokenizer = Tokenizer(
        models.BPE({piece: number for number, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return ServedTokenizer(tokenizer, {})


def metaspace() -> ServedTokenizer:
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(["<s>", *PLAIN])}, []))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.decoder = decoders.Metaspace()
    return ServedTokenizer(tokenizer, {})


def wordpiece() -> ServedTokenizer:
    pieces = ["[UNK]", "hello", "world", "##ing", "##s", "'", "s", ".", ","]
    tokenizer = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return ServedTokenizer(tokenizer, {})


def end_of_word_bpe() -> ServedTokenizer:
    pieces = ["a", "b</w>", "</w>", "c</w>", "dd", "e</w>"]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, []))
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return ServedTokenizer(tokenizer, {})


TOKENIZERS = {
    "byte_level": (byte_level(), 430),
    "byte_fallback": (sentencepiece_like(), 275),
    "metaspace": (metaspace(), 14),
    "wordpiece": (wordpiece(), 9),
    "end_of_word_bpe": (end_of_word_bpe(), 6),
}


def stream(tokenizer: ServedTokenizer, ids: list[int], *, skip: bool) -> list[str | None]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data(), skip=st.booleans())
@settings(max_examples=300, deadline=None)
def test_texts_of_any_ids_join_to_the_decoding_of_all(name: str, data: st.DataObject, skip: bool) -> None:
    tokenizer, size = TOKENIZERS[name]
    # Half of them from the end of the vocabulary, where those with a byte fallback have their words.
    ids = data.draw(st.lists(st.integers(0, size) | st.integers(max(0, size - 14), size), max_size=60))
    texts = stream(tokenizer, ids, skip=skip)
    assert "".join(text or "" for text in texts) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_released_text_never_changes_whatever_follows(name: str, data: st.DataObject) -> None:
    tokenizer, size = TOKENIZERS[name]
    known = data.draw(st.lists(st.integers(3, size), max_size=20))
    following = data.draw(st.lists(st.integers(3, size), max_size=20))
    detokenizer = tokenizer.detokenizer(skip_special_tokens=True)
    released = "".join(detokenizer.push(token_id) or "" for token_id in known)
    assert tokenizer.decode(known + following, skip_special_tokens=True).startswith(released)


@given(text=st.text(max_size=40))
@settings(max_examples=300, deadline=None)
def test_encoded_text_never_shows_a_replacement_character(text: str) -> None:
    tokenizer, _ = TOKENIZERS["byte_level"]
    text = text.replace("\ufffd", "")
    pieces = stream(tokenizer, tokenizer.encode(text, add_special_tokens=False), skip=False)
    assert not any("\ufffd" in (piece or "") for piece in pieces)
    assert pieces[-1] == ""


def test_an_id_is_held_back_while_its_character_is_unfinished() -> None:
    tokenizer, _ = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("Ω", add_special_tokens=False)
    assert len(ids) == 2
    assert stream(tokenizer, ids, skip=True) == [None, "Ω", ""]


def test_half_a_character_at_the_end_comes_out_as_the_tokenizer_decodes_it() -> None:
    tokenizer, _ = TOKENIZERS["byte_level"]
    (first, _) = tokenizer.encode("Ω", add_special_tokens=False)
    assert stream(tokenizer, [first], skip=True) == [None, "\ufffd"]


def test_a_run_of_byte_tokens_is_held_back_until_it_ends() -> None:
    """One wrong byte would change the text of the whole run."""
    tokenizer, _ = TOKENIZERS["byte_fallback"]
    omega = [3 + byte for byte in "Ω".encode()]
    a = tokenizer.encode("a", add_special_tokens=False)[-1]
    assert stream(tokenizer, [*omega, a], skip=True) == [None, None, "Ωa", ""]
    assert stream(tokenizer, [*omega, 3 + 0xFF, a], skip=True)[-2] == "\ufffd\ufffd\ufffda"


def test_only_the_first_space_of_all_is_stripped() -> None:
    tokenizer, size = TOKENIZERS["byte_fallback"]
    world = next(number for number in range(size) if tokenizer.token_text(number) == "world")
    assert "".join(text or "" for text in stream(tokenizer, [world] * 100, skip=True)) == " ".join(["world"] * 100)


def test_special_tokens_are_skipped_or_kept_as_asked() -> None:
    tokenizer = ServedTokenizer(train_tokenizer(), {})
    ids = tokenizer.encode(f"fox{END}", add_special_tokens=False)
    assert "".join(text or "" for text in stream(tokenizer, ids, skip=True)) == "fox"
    assert "".join(text or "" for text in stream(tokenizer, ids, skip=False)) == f"fox{END}"


def test_a_token_that_only_the_configuration_calls_special_is_skipped() -> None:
    plain = train_tokenizer()
    plain.add_tokens(["<turn>"])
    tokenizer = ServedTokenizer(plain, {"additional_special_tokens": [{"content": "<turn>"}, "<absent>"]})
    ids = tokenizer.encode("fox<turn>", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "fox"
    assert plain.token_to_id("<absent>") is None


def test_ids_beyond_the_tokenizer_have_no_text() -> None:
    tokenizer, _ = TOKENIZERS["byte_level"]
    assert stream(tokenizer, [100_000], skip=True) == ["", ""]
    assert tokenizer.token_bytes(100_000) == b""


def test_token_bytes_are_exact_for_parts_of_characters() -> None:
    tokenizer, _ = TOKENIZERS["byte_level"]
    ids = tokenizer.encode(SENTENCES[3], add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == SENTENCES[3].encode()


def test_pre_tokenizer_without_decoder_is_served_too() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    served = ServedTokenizer(tokenizer, {})
    ids = served.encode("a b", add_special_tokens=False)
    assert "".join(text or "" for text in stream(served, ids, skip=True)) == "a b"
