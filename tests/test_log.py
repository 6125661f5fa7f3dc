"""Lines of ranks have the time and the rank; -v and -q say how much the command line tells."""

import logging
import re

import pytest

from sparse_train import log
from sparse_train.launch import cli


@pytest.fixture(autouse=True)
def _restored():
    yield
    log.set_up_command_line()


def test_a_rank_log_has_the_time_and_the_rank_in_each_line(capsys):
    log.set_up_rank(3)
    logging.getLogger("sparse_train.tracking").info("%d/%d %s", 129, 1000, "loss 0.394 [red]:smile: " + "x" * 200)
    logging.getLogger("somebody.else").warning("theirs")
    out, err = capsys.readouterr()
    first, *rest = err.splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d rank 3 129/1000 loss 0\.394 \[red\]:smile: x{200}", first)
    assert out == "" and not [line for line in rest if "rank 3" in line]


@pytest.mark.parametrize("arguments, lines", [
    (["runs"], ["a warning", "an error"]), (["runs", "-v"], ["what is done", "a warning", "an error"]),
    (["-v", "runs"], ["what is done", "a warning", "an error"]), (["-q", "runs"], ["an error"]),
    (["runs", "--quiet"], ["an error"]), (["bench", "layers", "-q"], ["an error"]),
])
def test_how_much_the_command_line_tells(arguments, lines, monkeypatch, capsys):
    def report(options, console):
        logger = logging.getLogger("sparse_train.launch.monitor.status")
        logger.info("what is done")
        logger.warning("a warning")
        logger.error("an error")

    parse = cli._parse

    def with_report(arguments):
        options = parse(arguments)
        options.command = report
        return options

    monkeypatch.setattr(cli, "_parse", with_report)
    assert cli.main(arguments) == 0
    assert capsys.readouterr().err.splitlines() == lines


def test_more_and_less_at_once_is_a_mistake(capsys):
    with pytest.raises(SystemExit):
        cli.main(["-v", "-q", "runs"])
    assert "not allowed with" in capsys.readouterr().err
