"""The HTML report says what the records and the folder of a run say, and nothing in them becomes a part of its page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

from megakexue.run.folder import record_start
from megakexue.run.records import AttentionStatistics, Record, SamplesRecord, SourceLoss, ValidationRecord
from megakexue.run.report import page
from tests.helpers import make_record, make_statistics

EVIL = '<script>alert("x")</script>&\'"'


class Tags(HTMLParser):
    """The names of all tags, and the text that a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data + "|"


def test_it_says_all_and_escapes_all(tmp_path: Path) -> None:
    record_start(tmp_path, {"step": 0, "ranks": 2, "origin": EVIL, "versions": {"torch": "2.9"}, "parameters": 1234567})
    record_start(tmp_path, {"step": 3, "ranks": 4, "device": EVIL, "versions": {EVIL: "1"}, "parameters": 1234567})
    with open(tmp_path / "starts.jsonl", "a") as file:
        file.write('[]\n{"time": "20')  # what a kill leaves
    (tmp_path / "config.yaml").write_text(f"train: {EVIL}\n")
    times = {"forward": 0.5, "backward": 1.5}
    sources = {EVIL: SourceLoss(loss=1.25, n_tokens=700, bits_per_byte=0.5)}
    layers = [AttentionStatistics(entropy=2.5, relative_entropy=0.75, largest_logit=12.5)]
    records: list[Record] = [
        make_record(1, times=times), make_record(2, status="skipped", loss=float("nan"), times=times),
        ValidationRecord(step=2, loss=1.25, n_tokens=700, bits_per_byte=0.5, sources=sources),
        make_statistics(2, attention=layers, largest_logit=33.25),
        SamplesRecord(step=2, prompts=[EVIL], texts=[f"{EVIL}\n  two"]),
    ]  # fmt: skip
    html = page(EVIL, [(EVIL, b"\x89PNG")], [(EVIL, tmp_path, records)])
    shown = Tags(html)
    assert "script" not in shown.tags and "http" not in html
    for text in (
        "1,234,567", "|25.0%|0.5 s|", "|75.0%|1.5 s|", f"|validation|{EVIL}|1.2500|0.5000|700|", "|2|skipped|nan|",
        "|0|2.5000|0.7500|12.5000|", "the largest logit of the output is 33.25", f"{EVIL} 1", f"train: {EVIL}", "  two",
    ):  # fmt: skip
        assert text in shown.text, text
    assert re.search(r"\|0\|2\|.*\|3\|4\|", shown.text)  # from which step and on how many ranks it was started
    assert html.count("<td") == html.count("</td>") and html.count("<table") == html.count("</table>")


def test_a_run_of_an_older_version_has_less(tmp_path: Path) -> None:
    shown = Tags(page("old", [], [("old", tmp_path, [make_record(1)])]))
    assert "Steps that were not applied|none" in re.sub(r"[|\n]+", "|", shown.text)
    for heading in ("Where the time goes", "Starts", "Attention", "Samples", "Config"):
        assert heading not in shown.text


def test_a_start_is_a_line(tmp_path: Path) -> None:
    record_start(tmp_path, {"step": 0})
    with open(tmp_path / "starts.jsonl", "a") as file:
        file.write('{"time": "a kill has torn th')
    record_start(tmp_path, {"step": 7})
    starts = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()[::2]]
    assert [start.keys() for start in starts] == [{"time", "command", "step"}] * 2
    assert [start["step"] for start in starts] == [0, 7]
