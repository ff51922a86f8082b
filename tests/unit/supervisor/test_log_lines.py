"""Lines of the log, for people and for machines."""

from __future__ import annotations

import json
import logging

from tpmodel_worker.logs import JsonFormatter, TextFormatter, message_of


def record(message: str, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("engine", logging.WARNING, "file", 1, message, None, None)
    made.__dict__.update(fields)
    return made


def test_text_names_process_and_level_once() -> None:
    assert TextFormatter("rank 1").format(record("it is late")) == "[rank 1] warning: it is late"


def test_text_shows_fields_behind_the_message() -> None:
    line = TextFormatter("engine").format(record("aborted", epoch=7, seq=3))
    assert line == "[engine] warning: aborted [epoch=7 seq=3]"


def test_text_does_not_repeat_what_the_message_says() -> None:
    line = TextFormatter("engine").format(record("failed 7 times: no file", epoch=7, cause="no file"))
    assert line == "[engine] warning: failed 7 times: no file [epoch=7]"


def test_json_carries_every_field_apart() -> None:
    entry = json.loads(
        JsonFormatter("engine").format(record("failed: no file", cause="no file", request_id="r", epoch=7))
    )
    assert entry["message"] == "failed: no file"
    assert (entry["level"], entry["process"], entry["cause"]) == ("warning", "engine", "no file")
    assert (entry["request_id"], entry["epoch"]) == ("r", 7)


def test_a_message_is_found_again_in_its_line() -> None:
    for formatter in (TextFormatter("api 0"), JsonFormatter("api 0")):
        assert message_of(formatter.format(record("tokenizer.json: broken"))) == "tokenizer.json: broken"
    assert message_of("Segmentation fault") == "Segmentation fault"
    assert message_of('{"no": "record"') == '{"no": "record"'
