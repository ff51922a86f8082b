"""What a sample emits: whole tokens with their text, the same however tokens arrive and wherever it resumes."""

from __future__ import annotations

import itertools

from hypothesis import example, given, settings
from hypothesis import strategies as st

from support.text_checkpoint import END, train_tokenizer
from tpmodel.v1 import inference_pb2, worker_pb2
from tpmodel_worker.api.sample_stream import SampleStream
from tpmodel_worker.api.stop_strings import StopMatcher, StopStrings
from tpmodel_worker.api.tokenizer import Tokenizer

LENGTH = inference_pb2.FINISH_REASON_LENGTH
STOP = inference_pb2.FINISH_REASON_STOP
TOKENIZER = Tokenizer(train_tokenizer(), {})
END_ID = TOKENIZER.encode(END, add_special_tokens=False)[0]
STOPS = [["x"], ["the"], ["你好"], ["\ufffd", "e q"], ["ab", "bab"], ["User:", "\n\n"]]

token_lists = st.lists(st.integers(2, 425), max_size=40)
texts = st.text(alphabet="abUser: \n你好öx🙂the q", max_size=40)
id_lists = token_lists | texts.map(lambda text: TOKENIZER.encode(text, add_special_tokens=False))


def sample(stops: list[str] | None = None, *, min_tokens: int = 0, include_stop: bool = False) -> SampleStream:
    return SampleStream(
        detokenizer=TOKENIZER.detokenizer(skip_special_tokens=True),
        matcher=StopMatcher(StopStrings(stops)) if stops else None,
        stop_token_ids={END_ID},
        min_tokens=min_tokens,
        include_stop=include_stop,
    )


def run(stream: SampleStream, ids: list[int], cuts: list[int]) -> list[tuple[list[int], str]]:
    """Feeds the ids in batches that end at the cuts; returns the chunks."""
    chunks = []
    borders = sorted({0, *(cut for cut in cuts if cut < len(ids)), len(ids)})
    for start, end in itertools.pairwise(borders):
        if end < len(ids):
            stream.push(ids[start:end])
        else:
            stream.finish(ids[start:end], [], LENGTH)
        emission = stream.take()
        if emission is not None:
            chunks.append((emission.token_ids, emission.text))
    return chunks


def joined(chunks: list[tuple[list[int], str]]) -> tuple[list[int], str]:
    return [token_id for ids, _ in chunks for token_id in ids], "".join(text for _, text in chunks)


@given(ids=id_lists, cuts=st.lists(st.integers(1, 40)))
@settings(max_examples=300, deadline=None)
def test_text_of_all_chunks_is_the_decoding_of_all_ids(ids: list[int], cuts: list[int]) -> None:
    assert joined(run(sample(), ids, cuts)) == (ids, TOKENIZER.decode(ids, skip_special_tokens=True))


@given(ids=id_lists, cuts=st.lists(st.integers(1, 40)), stops=st.sampled_from(STOPS), include=st.booleans())
@settings(max_examples=500, deadline=None)
def test_batches_change_nothing_with_stop_strings(
    ids: list[int], cuts: list[int], stops: list[str], include: bool
) -> None:
    one_by_one, batched = sample(stops, include_stop=include), sample(stops, include_stop=include)
    assert joined(run(one_by_one, ids, list(range(40)))) == joined(run(batched, ids, cuts))
    assert (one_by_one.finish_reason, one_by_one.stop) == (batched.finish_reason, batched.stop)
    assert one_by_one.token_count == batched.token_count


@given(ids=id_lists, stops=st.sampled_from(STOPS))
@example(ids=[128, 385, 2, 2], stops=["\ufffd", "e q"])
@settings(max_examples=300, deadline=None)
def test_text_ends_before_the_first_stop_string(ids: list[int], stops: list[str]) -> None:
    stream = sample(stops)
    emitted, text = joined(run(stream, ids, list(range(40))))
    whole = TOKENIZER.decode(ids, skip_special_tokens=True)
    positions = [whole.find(stop) for stop in stops if stop in whole]
    if not positions:
        assert (text, emitted, stream.finish_reason) == (whole, ids, LENGTH if ids else None)
        return
    assert stream.finish_reason == STOP
    assert whole.startswith(text + stream.stop)
    assert not any(stop in text for stop in stops)
    # All ids up to the one that made the stop string certain, and no id more.
    assert emitted == ids[: len(emitted)]
    assert len(emitted) == stream.token_count
    assert stream.stop in TOKENIZER.decode(emitted, skip_special_tokens=True)
    detokenizer = TOKENIZER.detokenizer(skip_special_tokens=True)
    certain = "".join(detokenizer.push(token_id) or "" for token_id in emitted[:-1])
    assert stream.stop not in certain


@given(ids=id_lists, cuts=st.lists(st.integers(1, 40)), stops=st.sampled_from([None, *STOPS]), data=st.data())
@settings(max_examples=500, deadline=None)
def test_resuming_behind_any_chunk_gives_the_same_rest(
    ids: list[int], cuts: list[int], stops: list[str] | None, data: st.DataObject
) -> None:
    original = sample(stops)
    chunks = run(original, ids, cuts)
    if not chunks:
        return
    broken_after = data.draw(st.integers(0, len(chunks) - 1))
    received, _ = joined(chunks[:broken_after])
    resumed = sample(stops)
    resumed.prime(received)
    assert resumed.finish_reason is None
    rest = run(resumed, ids[len(received) :], cuts)
    assert joined(rest) == joined(chunks[broken_after:])
    assert (resumed.token_count, resumed.finish_reason) == (original.token_count, original.finish_reason)


@given(ids=id_lists, position=st.integers(0, 40))
@settings(max_examples=300, deadline=None)
def test_resuming_inside_a_character_repeats_no_text(ids: list[int], position: int) -> None:
    known, rest = ids[:position], ids[position:]
    if not rest:
        return
    resumed = sample()
    resumed.prime(known)
    emitted, text = joined(run(resumed, rest, []))
    detokenizer = TOKENIZER.detokenizer(skip_special_tokens=True)
    certain = "".join(detokenizer.push(token_id) or "" for token_id in known)
    assert (emitted, certain + text) == (rest, TOKENIZER.decode(ids, skip_special_tokens=True))


def test_a_possible_beginning_of_a_stop_string_is_held_back_with_its_ids() -> None:
    stream = sample(["\n\nUser"])
    ids = TOKENIZER.encode("fox\n\nUs", add_special_tokens=False)
    stream.push(ids)
    emission = stream.take()
    assert emission is not None
    assert emission.text == "fox"
    stream.push(TOKENIZER.encode("ual", add_special_tokens=False))
    emission = stream.take()
    assert emission is not None
    assert emission.text == "\n\nUsual"


def test_the_ids_of_a_stop_string_are_emitted_and_counted_and_later_ones_dropped() -> None:
    stream = sample(["jumps"])
    ids = TOKENIZER.encode("fox jumps", add_special_tokens=False)
    stream.push([*ids, *TOKENIZER.encode(" over", add_special_tokens=False)])
    emission = stream.take()
    assert emission is not None
    assert (emission.token_ids, emission.text) == (ids, "fox ")
    assert (stream.token_count, stream.finish_reason, stream.stop) == (len(ids), STOP, "jumps")


def test_a_stop_string_that_began_before_the_resumption_takes_back_nothing() -> None:
    stream = sample(["k fo"])
    stream.prime(TOKENIZER.encode("quick", add_special_tokens=False))
    (fox,) = TOKENIZER.encode(" fox", add_special_tokens=False)
    stream.push([fox])
    emission = stream.take()
    assert emission is not None
    assert (emission.token_ids, emission.text, stream.stop) == ([fox], "", "k fo")


def test_include_stop_keeps_the_stop_string_and_nothing_behind_it() -> None:
    stream = sample(["jum"], include_stop=True)
    stream.push(TOKENIZER.encode("fox jumps over", add_special_tokens=False))
    emission = stream.take()
    assert emission is not None
    assert emission.text == "fox jum"


def test_stop_strings_are_not_looked_for_before_min_tokens() -> None:
    ids = TOKENIZER.encode("fox fox", add_special_tokens=False)
    stream = sample(["fox"], min_tokens=len(ids) - 1)
    stream.push(ids)
    emission = stream.take()
    assert emission is not None
    assert (emission.text, stream.finish_reason) == ("fox ", STOP)


def test_the_id_that_ends_a_sample_is_emitted_without_its_text() -> None:
    (full_stop,) = TOKENIZER.encode(".", add_special_tokens=False)
    for include, text in ((False, "dog"), (True, "dog.")):
        stream = SampleStream(
            detokenizer=TOKENIZER.detokenizer(skip_special_tokens=True),
            stop_token_ids={full_stop},
            include_stop=include,
        )
        ids = [*TOKENIZER.encode("dog", add_special_tokens=False), full_stop]
        stream.finish(ids, [], STOP)
        emission = stream.take()
        assert emission is not None
        assert (emission.token_ids, emission.text) == (ids, text)


def test_half_a_character_before_the_end_of_sequence_is_flushed() -> None:
    first, _ = TOKENIZER.encode("Ω", add_special_tokens=False)
    stream = sample()
    stream.finish([first, END_ID], [], STOP)
    emission = stream.take()
    assert emission is not None
    assert (emission.token_ids, emission.text) == ([first, END_ID], "\ufffd")


def test_log_probabilities_stay_with_their_ids() -> None:
    stream = sample(["\n\nUser"])
    ids = TOKENIZER.encode("fox\n\nUs", add_special_tokens=False)
    stream.push(ids, [worker_pb2.TokenLogprobs(logprob=-float(index)) for index in range(len(ids))])
    first = stream.take()
    stream.finish([END_ID], [worker_pb2.TokenLogprobs(logprob=-99)], STOP)
    second = stream.take()
    assert first is not None
    assert second is not None
    assert len(first.logprobs) == len(first.token_ids)
    assert [entry.logprob for entry in first.logprobs + second.logprobs] == [*(-float(i) for i in range(len(ids))), -99]


def test_ids_only_are_emitted_at_once() -> None:
    first, _ = TOKENIZER.encode("Ω", add_special_tokens=False)
    stream = SampleStream(detokenizer=None)
    stream.push([first])
    emission = stream.take()
    assert emission is not None
    assert (emission.token_ids, emission.text) == ([first], "")


def test_a_resumed_sample_that_had_ended_is_recognised() -> None:
    fox = TOKENIZER.encode("fox jumps", add_special_tokens=False)
    by_string, by_id, by_length = sample(["jumps"]), sample(), SampleStream(detokenizer=None, max_tokens=len(fox))
    by_string.prime(fox)
    by_id.prime([*fox, END_ID])
    by_length.prime(fox)
    reasons = [stream.finish_reason for stream in (by_string, by_id, by_length)]
    assert reasons == [STOP, STOP, LENGTH]
    assert all(stream.take() is None for stream in (by_string, by_id, by_length))


@given(ids=id_lists.filter(bool), cut=st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_text_goes_on_where_another_gang_continues(ids: list[int], cut: int) -> None:
    """Also in the middle of a character, whose text comes with the ids that complete it."""
    cut = min(cut, len(ids))
    first, second = sample(), sample()
    first.finish(ids[:cut], [], inference_pb2.FINISH_REASON_KEPT)
    before = first.take()
    assert before is not None
    assert before.token_ids == ids[:cut], "all ids go out"
    assert first.finish_reason == inference_pb2.FINISH_REASON_KEPT
    second.prime(ids[:cut])
    rest, text = joined(run(second, ids[cut:], []))
    assert rest == ids[cut:]
    if rest:
        assert before.text + text == TOKENIZER.decode(ids, skip_special_tokens=True)
