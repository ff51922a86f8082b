"""kubectl's complaints become one line with a remedy. The texts are kubectl's own."""

from __future__ import annotations

import pytest

from tpmodel.kubectl.problems import explain, last_words

LOG_LINES = (
    'E1121 12:46:36.772836    4636 memcache.go:265] "Unhandled Error" err="couldn\'t get current server API group '
    'list: Get \\"http://localhost:8080/api\\": dial tcp 127.0.0.1:8080: connect: connection refused"\n'
)
REFUSED = "The connection to the server {} was refused - did you specify the right host or port?\n"

TAKEN = (
    "Unable to listen on port 9000: Listeners failed to create with the following errors: [unable to create listener: "
    "Error listen tcp4 127.0.0.1:9000: bind: address already in use]\n"
    "error: unable to listen on any of the requested ports: [{9000 9000}]\n"
)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (LOG_LINES + REFUSED.format("localhost:8080"), "kubectl config use-context NAME"),
        (REFUSED.format("10.0.0.1:6443"), "the API server does not answer: The connection to the server 10.0.0.1:6443"),
        (
            "Error in configuration: context was not found for specified context: nope\n",
            "there is no context nope: kubectl config get-contexts",
        ),
        ('error: context "nope" does not exist\n', "there is no context nope: kubectl config get-contexts"),
        ('error: the server doesn\'t have a resource type "tpmodels"\n', "install the operator"),
        (
            'Error from server (Forbidden): pods is forbidden: User "bob" cannot list resource "pods"\n',
            'User "bob" cannot list resource "pods"; ask for a role',
        ),
        ("error: You must be logged in to the server (Unauthorized)\n", "log in again"),
        ("Unable to connect to the server: dial tcp: lookup gone: no such host\n", "the API server does not answer"),
        (
            TAKEN,
            "port 9000 of this machine is taken: give another one with --port",
        ),
        ("error: stat /nowhere: no such file or directory\n", "kubectl: stat /nowhere: no such file or directory"),
        ("", "kubectl: it ended without a word"),
    ],
)
def test_each_complaint_comes_with_what_to_do(output: str, expected: str) -> None:
    message = explain(output).message
    assert expected in message
    assert "\n" not in message


def test_an_object_that_is_not_there_is_told_from_other_failures() -> None:
    assert explain('Error from server (NotFound): tpmodels.tpmodel.dev "x" not found\n').not_found
    assert not explain("error: something else\n").not_found


def test_log_lines_are_not_for_people() -> None:
    assert last_words(f"error: the point\n{LOG_LINES}") == "the point"
