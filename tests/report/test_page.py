"""The page of a run: texts shown as written, one file without network, of bounded size."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from src.report.page import write_page
from src.report.settings import compared, flat
from tests.report.runs import answers, metrics, sample, write_run

HOSTILE = "</script><script>alert(1)</script><img src=http://x.example/a onerror=alert(2)>"
MOST_BYTES = 2_000_000


class Tags(HTMLParser):
    """All tags with their attributes, and the texts of the scripts and of what has an id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.data: dict[str, str] = {}
        self._id: str | None = None
        self._runs = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._id = dict(attrs).get("id")
        self._runs = tag == "script" and "type" not in dict(attrs)
        if self._runs:
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._id, self._runs = None, False

    def handle_data(self, data):
        if self._id:
            self.data[self._id] = self.data.get(self._id, "") + data
        elif self._runs:
            self.scripts[-1] += data


def page_of(folder: Path) -> str:
    return write_page(folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A page all of whose texts come from an enemy."""
    folder = tmp_path_factory.mktemp("hostile") / HOSTILE.replace("/", "_")
    rows = answers(3, before=HOSTILE, after="\x1b[31mred\x1b[0m \u202egnol")
    rows[0]["prompt"] = HOSTILE
    kept = [sample(1, 0, [" a", HOSTILE, "\u202eb\x1b[2J"], prompt=HOSTILE)]
    changed = {step: row | {"mine/<script>alert(3)</script>": 1.0} for step, row in metrics(5).items()}
    write_run(folder, iterations=5, comparison=rows, samples=kept, metrics=changed)
    with (folder / "config.yaml").open("a") as file:
        file.write(f'mine: "{HOSTILE}"\n')
    return page_of(folder)


def test_texts_are_shown_as_written_and_never_run(hostile):
    tags = Tags(hostile)
    assert len(tags.scripts) == 1
    assert "alert" not in tags.scripts[0]
    assert not any(tag == "img" or any(name.startswith("on") for name in names) for tag, names in tags.tags)
    assert hostile.count("&lt;img src=http://x.example/a onerror=alert(2)&gt;") >= 5


def test_escapes_and_marks_of_direction_are_visible_and_isolated(hostile):
    assert "\x1b" not in hostile
    assert "\u202e" not in hostile
    assert '<bdi class="text">\u241b[31mred\u241b[0m \\u202egnol</bdi>' in hostile
    (table,) = json.loads(Tags(hostile).data["data"])["tokens"]["tables"]
    assert table["rows"][0]["tokens"]["text"][2] == "\\u202eb\u241b[2J"


def test_nothing_is_asked_of_a_network(hostile):
    for tag, attributes in Tags(hostile).tags:
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    style = re.search(r"<style>(.*?)</style>", hostile, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style


def test_only_the_two_scripts_of_the_page_may_run(hostile):
    """Their hashes, computed here, are those of the policy."""
    tags = Tags(hostile)
    library = gzip.decompress(base64.b64decode(tags.data["library"]))
    hashes = [base64.b64encode(hashlib.sha256(x).digest()).decode() for x in (tags.scripts[0].encode(), library)]
    (policy,) = [a["content"] for _, a in tags.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert f"script-src '{'sha256-' + hashes[0]}' '{'sha256-' + hashes[1]}'" == policy.split("; ")[-1]
    assert policy.startswith("default-src 'none'; ")
    assert b"Bokeh" in library


@pytest.mark.slow
def test_the_largest_page_is_below_two_megabytes(tmp_path):
    """5000 iterations of 45 noisy numbers, long responses with all their numbers, and long answers."""
    noise = {step: {f"mine/{i}": (step * 7919 + i) % 1009 / 1009 for i in range(45)} for step in range(1, 5001)}
    kept = [sample(i, row, [" word"] * 512) for i in range(1, 40) for row in range(16)]
    rows = answers(512, before="before " * 100, after="after, " * 100)
    folder = write_run(tmp_path / "run", iterations=5000, metrics=noise, samples=kept, comparison=rows)
    text = page_of(folder)
    assert len(text.encode()) < MOST_BYTES
    assert "more samples are in samples/" in text
    assert "of 512; comparison.jsonl has all" in text


def test_every_chart_of_the_page_has_its_data_and_a_name_for_those_who_do_not_see_it(tmp_path):
    write_run(tmp_path / "all" / "sft", stage="sft")
    tags = Tags(page_of(write_run(tmp_path / "all" / "ppo")))
    drawn = [attributes for _, attributes in tags.tags if "data-chart" in attributes]
    charts = json.loads(tags.data["data"])["charts"]
    assert len({a["data-chart"] for a in drawn}) == len(drawn) == len(charts) > 10
    assert all(a["data-chart"] in charts and a["role"] == "img" and a["aria-label"] for a in drawn)


def test_what_differs_from_the_defaults_is_listed(tmp_path):
    text = page_of(write_run(tmp_path / "run", "ppo.clip=0.1", "seed=4"))
    rows = dict(re.findall(r'<th scope="row"><code>([\w.]+)</code></th><td>([^<]*)</td>', text))
    follow = ("ppo.policy_loss.clip_low", "ppo.policy_loss.clip_high", "ppo.clip_low", "ppo.clip_high")
    assert rows == {"seed": "4", "ppo.clip": "0.1"} | dict.fromkeys(follow, "0.1")
    assert compared({"here": {"a": {"b": 1}, "c": 2}, "default": {"a": {"b": 1}, "d": 3}})[0].key == "c"
    config = {"a": {"b": 1, "_target_": "x"}, "choices": {"kl": "loss"}, "run_dir": "/x"}
    assert flat(config) == {"kl": "loss", "a.b": "1"}


def test_a_page_that_cannot_be_written_whole_leaves_the_old_one(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    before = page_of(folder)

    def full(path, *_, **__):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_page(folder)
    monkeypatch.undo()
    assert (folder / "report.html").read_text(encoding="utf-8") == before


def test_names_that_differ_in_a_sign_have_their_own_curves(tmp_path):
    """A reward over HTTP names its numbers itself."""
    rows = {step: {"rollout/score_a.b": 1.0 * step, "rollout/score_a_b": -1.0 * step} for step in range(1, 5)}
    tags = Tags(page_of(write_run(tmp_path / "run", metrics=rows)))
    drawn = [attributes["data-chart"] for _, attributes in tags.tags if "data-chart" in attributes]
    assert len(set(drawn)) == len(drawn) == len(json.loads(tags.data["data"])["charts"])
    assert len([name for name in drawn if "score_a" in name]) == 2
