"""What of a text is certain while it is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models

from t2runtime.decoding import _Watch
from t2runtime.generation import decode

WORDS = ["<pad>", "</s>", " do", "x"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@pytest.fixture
def falling_back() -> Any:
    """A tokenizer as of Llama: what is no word is bytes."""
    made = Tokenizer(
        models.BPE({word: i for i, word in enumerate(WORDS + BYTES)}, [], byte_fallback=True)
    )
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>"
    )


def streamed(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[str, list[str]]:
    """(the text, its pieces) of a row of these new tokens."""
    pieces: list[str] = []
    watch = _Watch(tokenizer, 0, [len(ids)], [1], stop, lambda row, piece: pieces.append(piece))
    for count in range(1, len(ids) + 1):
        if bool(watch(torch.tensor([ids[:count]]), None)):
            break
    return watch.texts(torch.tensor([ids[:count]]))[0], pieces


def test_bytes_are_held_back_until_their_run_ends(falling_back: Any) -> None:
    """One byte that does not belong makes the letters before it unreadable, too."""
    first = len(WORDS)
    spoilt = [2, first + ord("m"), first + ord("k"), first + 0xC3, 2, 3, 3, 1]
    assert decode(falling_back, spoilt[:3]) == " domk"
    text, pieces = streamed(falling_back, spoilt)
    assert text == " do\ufffd\ufffd\ufffd doxx"
    assert pieces == [" do", "\ufffd\ufffd\ufffd do", "x", "x"]

    whole = [2, first + ord("a"), first + 0xC3, first + 0xA9, first + ord("\n"), 2, 3]
    text, pieces = streamed(falling_back, whole)
    assert (text, pieces) == (" doaé\n dox", [" do", "aé\n do", "x"])
    beyond = [3, 9999, 3]  # a row of the embedding that the tokenizer has no token for
    assert "".join(streamed(falling_back, beyond)[1]) == "xx"
    ended = [3, first + ord("a"), first + 0xC3]
    assert streamed(falling_back, ended) == ("x\ufffd\ufffd", ["x", "\ufffd\ufffd"])


def test_a_stop_string_of_bytes_ends_the_row_at_once(falling_back: Any) -> None:
    ids = [2, len(WORDS) + ord("\n"), 3, 3]
    assert streamed(falling_back, ids, ("\n",)) == (" do", [" do"])
