"""Pairs as token ids: one BOS, one end token, a shared prompt, nothing lost; over-long pairs; the token cache."""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpo_ray.config import DataConfig, SourceConfig
from dpo_ray.data import encode
from dpo_ray.data.encode import EncodedPart, PairEncoder, encode_to_files
from dpo_ray.errors import InputError
from dpo_ray.pairs import PreferencePair, TokenizedPair
from dpo_ray.storage import Folder

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{{ eos_token if message.role == 'assistant' else '' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Writes the end token, and a newline behind it."""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Its end token is not the tokenizer's EOS."""


def build_tokenizer(template: str | None = TEMPLATE, eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts a BOS before a text, learnt from a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["What is the colour of the sky? It is blue. The sky is grey."], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=eos,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


TINY = build_tokenizer()
BOS, EOS = TINY.bos_token_id, TINY.eos_token_id


@pytest.fixture(params=["tiny", "stories260K", "babyllama-char361", "tokenizer-gpt2"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    """Byte-level with a BOS; two that put a blank before a text, as SentencePiece does; byte-level without a BOS."""
    if request.param == "tiny":
        return TINY
    return AutoTokenizer.from_pretrained(request.getfixturevalue("shared") / "models" / request.param)


def rules(**options: Any) -> DataConfig:
    return DataConfig(sources=(SourceConfig(path="data.jsonl"),), **options)


def encoded(
    pairs: PreferencePair | Sequence[PreferencePair], tokenizer: Any = TINY, end_ids: Sequence[int] = (), **options: Any
) -> EncodedPart:
    pairs = [pairs] if isinstance(pairs, PreferencePair) else pairs
    return PairEncoder(tokenizer, rules(**options), end_ids).encode(pairs)


def only(part: EncodedPart) -> TokenizedPair:
    (pair,) = part.pairs
    return pair


def decoded(ids: Any, tokenizer: Any = TINY) -> str:
    text: str = tokenizer.decode(ids.tolist())
    return text


def turns(*contents: str, first: str = "user") -> tuple[dict[str, str], ...]:
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return tuple({"role": roles[i % 2], "content": content} for i, content in enumerate(contents))


def conversation(**more: Any) -> PreferencePair:
    return PreferencePair(
        turns("What is blue?"),
        turns("The sky.", first="assistant"),
        turns("It is.", first="assistant"),
        source="chat.jsonl",
        row=7,
        **more,
    )


TEXTS = [
    pytest.param("Once", " upon a time", " in May", id="blank before the response"),
    pytest.param("Once ", "upon a time", "in May", id="blank after the prompt"),
    pytest.param("Question: why?\nAnswer:", "\nBecause.", "\n\nNo.", id="newlines"),
    pytest.param(" two  blanks ", "  a  b  ", " a ", id="many blanks"),
    pytest.param("é 🙂 ", "日本", "\t", id="other scripts"),
    pytest.param("", "no prompt", "at all", id="empty prompt"),
    pytest.param("Say nothing.", "", "Nothing", id="empty response"),
]


@pytest.mark.parametrize(("prompt", "chosen", "rejected"), TEXTS)
def test_decoding_prompt_and_response_gives_back_the_text(tokenizer: Any, prompt: str, chosen: str, rejected: str):
    pair = only(encoded(PreferencePair(prompt, chosen, rejected), tokenizer))
    starts = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else []
    if not prompt:
        starts = [tokenizer.bos_token_id]  # something must predict the first token of the response
    for response_ids, text in ((pair.chosen_ids, chosen), (pair.rejected_ids, rejected)):
        whole = [*pair.prompt_ids.tolist(), *response_ids.tolist()]
        body = whole[len(starts) : -1]
        assert whole[: len(starts)] == starts
        assert whole[-1] == tokenizer.eos_token_id
        assert not {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(body), "one BOS and one end token"
        # A SentencePiece decoder takes away the blank that was put before the prompt; without a prompt none was.
        assert tokenizer.decode(body) == (prompt + text if prompt else text)


def test_prompt_ids_are_those_that_generation_starts_from(tokenizer: Any):
    pair = only(encoded(PreferencePair("The sky is", " blue.", " grey."), tokenizer))
    assert pair.prompt_ids.tolist() == tokenizer("The sky is")["input_ids"]


def test_response_ids_are_those_of_the_whole_text_where_a_word_begins(tokenizer: Any):
    pair = only(encoded(PreferencePair("The sky is", " blue.", " grey."), tokenizer))
    whole = tokenizer("The sky is blue.")["input_ids"]
    assert [*pair.prompt_ids.tolist(), *pair.chosen_ids.tolist()] == [*whole, tokenizer.eos_token_id]


def test_ids_are_int32_and_the_pair_keeps_its_name():
    pair = PreferencePair("a", "b", "c")
    result = only(encoded(pair))
    assert {ids.dtype.name for ids in result[1:4]} == {"int32"}
    assert result.pair_id == pair.pair_id


def test_an_end_token_that_the_text_brings_is_not_doubled():
    result = only(encoded(PreferencePair("a", "b</s>", "c")))
    assert result.chosen_ids.tolist() == [*TINY("b", add_special_tokens=False)["input_ids"], EOS]


def test_a_bos_that_the_text_brings_is_not_doubled():
    assert only(encoded(PreferencePair("<s>a", "b", "c"))).prompt_ids.tolist() == TINY("a")["input_ids"]


def test_text_behind_an_end_token_is_not_lost_in_silence():
    assert decoded(only(encoded(PreferencePair("a", "b</s>more", "c"))).chosen_ids) == "b</s>more</s>"


def test_a_tokenizer_without_an_end_token_is_an_input_error():
    with pytest.raises(InputError, match="no end-of-sequence token"):
        PairEncoder(build_tokenizer(eos=None), rules())


def test_a_conversation_goes_through_the_chat_template():
    pair = only(encoded(conversation()))
    assert decoded(pair.prompt_ids) == "<s><|user|>What is blue?\n<|assistant|>"
    assert decoded(pair.chosen_ids) == "The sky.</s>"
    assert decoded(pair.rejected_ids) == "It is.</s>"
    assert pair.prompt_ids.tolist().count(BOS) == 1


def test_what_a_template_writes_behind_the_end_token_is_cut_off_when_the_end_token_is_not_eos():
    tokenizer = build_tokenizer(CHATML)
    im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    pair = only(encoded(conversation(), tokenizer, end_ids=[im_end]))
    assert decoded(pair.prompt_ids) == "<|im_start|>user\nWhat is blue?<|im_end|>\n<|im_start|>assistant\n"
    assert decoded(pair.chosen_ids) == "The sky.<|im_end|>"
    assert pair.chosen_ids.tolist()[-1] == im_end


def test_a_template_without_a_known_end_token_gets_eos():
    pair = only(encoded(conversation(), build_tokenizer(CHATML)))
    assert decoded(pair.chosen_ids) == "The sky.<|im_end|>\n</s>"


def test_a_template_decides_whether_there_is_a_bos():
    pair = only(encoded(conversation(), build_tokenizer(CHATML)))
    assert BOS not in pair.prompt_ids.tolist()


def test_a_bos_of_the_template_before_another_is_one():
    pair = only(encoded(conversation(), build_tokenizer("{{ bos_token }}" + TEMPLATE)))
    assert pair.prompt_ids.tolist()[:2] != [BOS, BOS]
    assert pair.prompt_ids.tolist()[0] == BOS


def test_a_response_of_several_turns_ends_with_its_last_one():
    pair = PreferencePair(
        turns("Hi"), turns("Yes?", "Blue?", "The sky.", first="assistant"), turns("No.", first="assistant")
    )
    assert decoded(only(encoded(pair)).chosen_ids) == "Yes?</s>\n<|user|>Blue?\n<|assistant|>The sky.</s>"


def test_a_template_that_opens_a_tag_only_for_generation_keeps_the_prompt():
    thinking = TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}")
    pair = only(encoded(conversation(), build_tokenizer(thinking)))
    assert decoded(pair.prompt_ids) == "<s><|user|>What is blue?\n"
    assert decoded(pair.chosen_ids) == "<|assistant|>The sky.</s>"


def test_tools_reach_the_template():
    template = "{% if tools %}{{ tools[0].name }}\n{% endif %}" + TEMPLATE
    pair = only(encoded(conversation(tools=({"name": "paint"},)), build_tokenizer(template)))
    assert decoded(pair.prompt_ids).startswith("paint\n")


def test_a_template_that_loses_the_prompt_is_an_input_error():
    template = "{{ messages | length }}{{ messages[-1].content }}"
    with pytest.raises(InputError, match=r"^chat\.jsonl:7: .*does not keep the prompt"):
        encoded(conversation(), build_tokenizer(template))


def test_a_template_that_refuses_a_conversation_is_an_input_error():
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=r"^chat\.jsonl:7: .*roles must alternate"):
        encoded(conversation(), build_tokenizer(template))


def test_a_conversation_without_a_template_is_an_input_error_that_names_the_row():
    with pytest.raises(InputError, match=r"^chat\.jsonl:7: .*no chat template"):
        encoded(conversation(), build_tokenizer(None))
    with pytest.raises(InputError, match=r"^chat\.jsonl:7: .*`data\.chat` is `never`"):
        encoded(conversation(), chat="never")


@pytest.mark.parametrize(("template", "chat"), [(None, "auto"), (TEMPLATE, "never")])
def test_a_transcript_is_plain_text_without_a_template_or_on_request(template: str | None, chat: str):
    transcript = PreferencePair(
        turns("Hi", "Hello.", "What is blue?"),
        turns("The sky.", first="assistant"),
        turns("It is.", "What?", "It.", first="assistant"),
        is_transcript=True,
    )
    pair = only(encoded(transcript, build_tokenizer(template), chat=chat))
    prompt = "<s>\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: What is blue?\n\nAssistant:"
    assert decoded(pair.prompt_ids) == prompt
    assert decoded(pair.chosen_ids) == " The sky.</s>"
    assert decoded(pair.rejected_ids) == " It is.\n\nHuman: What?\n\nAssistant: It.</s>"


def test_a_transcript_goes_through_a_template_that_is_there():
    pair = only(encoded(conversation(is_transcript=True)))
    assert decoded(pair.prompt_ids) == "<s><|user|>What is blue?\n<|assistant|>"


def test_chat_always_makes_a_plain_prompt_a_user_turn():
    text = PreferencePair("What is blue?", "The sky.", "It is.")
    assert decoded(only(encoded(text, chat="always")).prompt_ids) == "<s><|user|>What is blue?\n<|assistant|>"
    assert decoded(only(encoded(text, chat="always")).chosen_ids) == "The sky.</s>"
    assert decoded(only(encoded(text, chat="auto")).prompt_ids) == "<s>What is blue?"
    with pytest.raises(InputError, match="no chat template"):
        encoded(text, build_tokenizer(None), chat="always")


LONG = PreferencePair("abcdefgh", "ijk", "lmnop")
"""One token a letter: 9 with the BOS, 4 and 6 with the end token."""


def letters(ids: Any) -> str:
    return decoded(ids).replace("</s>", ".").replace("<s>", "^")


def test_a_pair_that_just_fits_is_whole():
    for over_long in ("drop", "truncate_prompt_left", "truncate_response"):
        part = encoded(LONG, max_tokens=15, over_long=over_long)
        assert [letters(ids) for ids in only(part)[1:4]] == ["^abcdefgh", "ijk.", "lmnop."]
        assert not part.dropped
        assert not part.truncated


def test_an_over_long_pair_is_dropped_and_counted():
    part = encoded([LONG, PreferencePair("a", "b", "c")], max_tokens=14)
    assert [pair.pair_id for pair in part.pairs] == [PreferencePair("a", "b", "c").pair_id]
    assert part.dropped == {"over_long": 1}
    assert not part.truncated


def test_truncating_the_prompt_takes_its_beginning_and_keeps_the_bos():
    part = encoded(LONG, max_tokens=12, over_long="truncate_prompt_left")
    assert [letters(ids) for ids in only(part)[1:4]] == ["^defgh", "ijk.", "lmnop."]
    assert part.truncated == {"prompt": 1}
    least = encoded(LONG, max_tokens=8, over_long="truncate_prompt_left")
    assert letters(only(least).prompt_ids) == "^h"
    none = encoded(LONG, max_tokens=7, over_long="truncate_prompt_left")
    assert (none.pairs, none.dropped, none.truncated) == ([], {"response_over_long": 1}, {})


def test_truncating_a_prompt_without_a_bos_takes_its_beginning():
    tokenizer = build_tokenizer(CHATML)
    pair = only(encoded(conversation(), tokenizer, max_tokens=20, over_long="truncate_prompt_left"))
    whole = only(encoded(conversation(), tokenizer))
    assert pair.prompt_ids.tolist() == whole.prompt_ids.tolist()[-len(pair.prompt_ids) :]
    assert len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) == 20


def test_a_truncated_response_has_no_end_token_and_a_whole_one_beside_it_keeps_its_own():
    part = encoded(LONG, max_tokens=13, over_long="truncate_response")
    assert [letters(ids) for ids in only(part)[1:4]] == ["^abcdefgh", "ijk.", "lmno"]
    assert part.truncated == {"response": 1}
    both = encoded(LONG, max_tokens=11, over_long="truncate_response")
    assert [letters(ids) for ids in only(both)[1:4]] == ["^abcdefgh", "ij", "lm"]


def test_no_room_for_a_response_behind_its_prompt_is_counted():
    part = encoded(LONG, max_tokens=9, over_long="truncate_response")
    assert (part.pairs, part.dropped) == ([], {"prompt_over_long": 1})


def test_responses_of_the_same_tokens_are_no_pair():
    part = encoded(PreferencePair("a", "b", "b"))
    assert (part.pairs, part.dropped) == ([], {"identical_tokens": 1})
    cut = encoded(PreferencePair("ab", "cdef", "cdgh"), max_tokens=5, over_long="truncate_response")
    assert (cut.pairs, cut.dropped, cut.truncated) == ([], {"identical_tokens": 1}, {})
    assert encoded(PreferencePair("ab", "cdef", "cdgh"), max_tokens=6, over_long="truncate_response").pairs


NUMBERS = [
    PreferencePair(f"{i}", "a" * (1 + i % 3), "b", weight=i / 3, margin=float(i) if i else None) for i in range(11)
]


@pytest.fixture(params=["local", "uri"])
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """On local disk, or on a storage whose files are copied to the machine's temporary folder when they are opened."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return Folder(str(tmp_path / "tokens") if request.param == "local" else (tmp_path / "tokens").as_uri())


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> "CountingEncoder":
    """Files of four pairs."""
    monkeypatch.setattr(encode, "PAIRS_PER_PART", 4)
    return CountingEncoder()


class CountingEncoder(PairEncoder):
    """Records how many pairs it was given at a time."""

    def __init__(self, **options: Any) -> None:
        super().__init__(TINY, rules(**options))
        self.calls: list[int] = []

    def encode(self, pairs: Sequence[PreferencePair]) -> EncodedPart:
        self.calls.append(len(pairs))
        return super().encode(pairs)


def same(table: Sequence[TokenizedPair], pairs: Sequence[TokenizedPair]) -> bool:
    as_lists = [
        [(pair.pair_id, *(ids.tolist() for ids in pair[1:4]), *map(repr, pair[4:])) for pair in side]
        for side in (table, pairs)
    ]
    return as_lists[0] == as_lists[1]


def test_a_table_reads_the_pairs_across_its_files(cache: Folder, encoder: CountingEncoder):
    files, report = encode_to_files(NUMBERS, encoder, cache)
    table = files.open()
    assert len(files.parts) == 3
    assert len(table) == files.num_pairs == 11
    assert same(table, encoded(NUMBERS).pairs)
    assert (table[10].weight, table[10].margin) == (10 / 3, 10.0)
    assert math.isnan(table[0].margin)
    assert same([table[i] for i in (10, 0, 4, 3)], [encoded(NUMBERS).pairs[i] for i in (10, 0, 4, 3)])
    for outside in (-1, 11):
        with pytest.raises(IndexError):
            table[outside]
    assert report == {"from_cache": 0, "dropped": {}, "truncated": {}}


def test_what_is_cached_is_not_encoded_again(cache: Folder, encoder: CountingEncoder):
    first, _ = encode_to_files(NUMBERS, encoder, cache)
    assert encoder.calls == [4, 4, 3]
    second, report = encode_to_files(NUMBERS, encoder, cache)
    assert encoder.calls == [4, 4, 3]
    assert second == first
    assert report["from_cache"] == 11


def test_a_smaller_subset_shares_the_files_of_a_larger_one(cache: Folder, encoder: CountingEncoder):
    whole, _ = encode_to_files(NUMBERS, encoder, cache)
    encoder.calls.clear()
    prefix, report = encode_to_files(NUMBERS[:10], encoder, cache)
    assert prefix.parts[:2] == whole.parts[:2]
    assert encoder.calls == [2]
    assert report["from_cache"] == 8


def test_the_limit_counts_pairs_that_survive(cache: Folder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encode, "PAIRS_PER_PART", 4)
    pairs = [PreferencePair(f"{i}", "a" * (20 if i % 2 else 3), "b") for i in range(20)]
    encoder = CountingEncoder(max_tokens=10)
    files, report = encode_to_files(pairs, encoder, cache, num_pairs=5)
    assert encoder.calls == [4, 4, 4], "no more is encoded than is needed"
    assert (files.num_pairs, report["dropped"]) == (5, {"over_long": 6})
    assert same(files.open(), encoded(pairs, max_tokens=10).pairs[:5])
    everything, report = encode_to_files(pairs, encoder, cache, num_pairs=50)
    assert (everything.num_pairs, report["dropped"], report["from_cache"]) == (10, {"over_long": 10}, 12)


def test_counts_of_dropped_and_truncated_pairs_come_from_the_cache_too(cache: Folder):
    encoder = CountingEncoder(max_tokens=12, over_long="truncate_prompt_left")
    pairs = [LONG, PreferencePair("a", "b", "b"), PreferencePair("a", "b", "c")]
    reports = [encode_to_files(pairs, encoder, cache)[1] for _ in range(2)]
    assert encoder.calls == [3]
    for report in reports:
        assert (report["dropped"], report["truncated"]) == ({"identical_tokens": 1}, {"prompt": 1})


def test_a_part_without_survivors_is_an_empty_one(cache: Folder, encoder: CountingEncoder):
    dropped = [PreferencePair(f"{i}", "a", "a") for i in range(4)]
    files, _ = encode_to_files([*dropped, *NUMBERS[:2]], encoder, cache)
    assert same(files.open(), encoded(NUMBERS[:2]).pairs)
    none, _ = encode_to_files(dropped, encoder, cache)
    assert len(none.open()) == 0
    nothing, _ = encode_to_files([], encoder, cache)
    assert len(nothing.open()) == 0


def test_other_settings_have_another_fingerprint_and_equal_ones_the_same():
    tokenizer = build_tokenizer()
    encoders = [
        PairEncoder(tokenizer, rules()),
        PairEncoder(tokenizer, rules(max_tokens=100)),
        PairEncoder(tokenizer, rules(over_long="truncate_response")),
        PairEncoder(tokenizer, rules(chat="never")),
        PairEncoder(tokenizer, rules(), end_ids=[3]),
        PairEncoder(build_tokenizer(CHATML), rules()),
        PairEncoder(build_tokenizer(eos="<|im_end|>"), rules()),
    ]
    assert len({encoder.fingerprint for encoder in encoders}) == len(encoders)
    # What decides no id decides no key.
    same_ids = PairEncoder(build_tokenizer(), rules(fraction=0.5, num_pairs=3, subset_seed=1), end_ids=[EOS])
    assert same_ids.fingerprint == encoders[0].fingerprint


def test_encoding_leaves_the_fingerprint_as_it_is():
    encoder = PairEncoder(TINY, rules())
    before = encoder.fingerprint
    encoder.encode([LONG, conversation()])
    assert encoder.fingerprint == before


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(PreferencePair("Once", " upon", " in"), id="blanks"),
        pytest.param(PreferencePair("Once\n", "upon", "in"), id="newline"),
    ],
)
def test_texts_that_differ_in_blanks_only_do_not_share_a_file(tmp_path: Path, changed: PreferencePair):
    """They are one pair by its name, which ignores blanks at both ends, but not by its tokens."""
    cache, encoder = Folder(str(tmp_path)), PairEncoder(TINY, rules())
    encode_to_files([PreferencePair("Once", "upon", "in")], encoder, cache)
    files, _ = encode_to_files([changed], encoder, cache)
    assert same(files.open(), encoder.encode([changed]).pairs)


def test_a_conversation_does_not_pass_for_a_transcript_that_was_cached(tmp_path: Path):
    cache, encoder = Folder(str(tmp_path)), PairEncoder(build_tokenizer(None), rules())
    encode_to_files([conversation(is_transcript=True)], encoder, cache)
    with pytest.raises(InputError, match="no chat template"):
        encode_to_files([conversation()], encoder, cache)
