"""Foreign bytes: parsed by the right rules, bounded, and refused in one line."""

import os

import pytest

from ugrl import foreign
from ugrl.command import FAULT, folder_for, guarded
from ugrl.errors import CheckpointError, ConfigError, DataError
from ugrl.secrets import masked, public
from ugrl.text import brief, csv_cell, html, line


def refused(call, *words, error=DataError):
    with pytest.raises(error) as found:
        call()
    text = str(found.value)
    assert text.isprintable() and len(text) < 400, text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: off", "off"),
        ("a: yes", "yes"),
        ("a: 1e-3", 0.001),
        ("a: 010", 10),
        ("a: 0x1F", 31),
        ("a: 0o17", 15),
        ("a: 1:30", "1:30"),
        ("a: 2026-01-02", "2026-01-02"),
        ("a: true", True),
        ("a: ~", None),
        ("a:", None),
        ("a: .5", 0.5),
        ("a: '1'", "1"),
        ("a: 1_000", "1_000"),
        ("x: &n [1, 2]\na: *n", [1, 2]),
    ],
)
def test_yaml_is_read_by_the_rules_of_1_2(text, value):
    got = foreign.parse_yaml(text, "c.yaml")["a"]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: 1\na: 2", "'a' occurs twice"),
        ("seed: \x7f3", "c.yaml"),
        ("[" * 3000, "nested"),
        ("a: &b [*b]", "alias"),
        ("a: 1e999", "out of range"),
        ("a: " + "9" * 5000, "digits"),
        ("a: !!python/object:os.system x", "not valid YAML"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: !!int x", "not valid YAML"),
        ("? [a]\n: 1", "a key that is a list"),
        ("a: [1", "line 1"),
        ("a: *nowhere", "not valid YAML"),
    ],
)
def test_yaml_that_cannot_be_used_is_one_line(text, word):
    refused(lambda: foreign.parse_yaml(text, "c.yaml"), "c.yaml", word, error=ConfigError)


def test_aliases_that_stand_for_millions_are_refused_and_never_written_out():
    bomb = "name: [&a0 lol, " + ",".join(f"&a{d} [{','.join([f'*a{d - 1}'] * 10)}]" for d in range(1, 9)) + "]"
    refused(lambda: foreign.parse_yaml(bomb, "c.yaml"), "aliases", error=ConfigError)
    tree = [0]
    for _ in range(60):
        tree = [tree] * 10
    assert len(brief(tree)) <= 80
    assert "digits" in brief(10**5000)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"[" * 3000, "nested"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b"{", "line 1, column 2"),
        (b'{"a": "\xe9"}', "UTF-8"),
        (b"", "broken JSON"),
        (b'{"a": "\x00"}', "zero byte"),
    ],
)
def test_json_that_cannot_be_used_is_one_line(data, word):
    refused(lambda: foreign.parse_json(data, "m.json", error=CheckpointError), "m.json", word, error=CheckpointError)


def test_text_is_read_with_a_byte_order_mark():
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert foreign.parse_json('{"käfer": 1}'.encode(encoding), "m.json") == {"käfer": 1}


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"<a>" * 100, "nested"),
        (b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "document type"),
        (b'<?xml version="1.0" encoding="no-such"?><a/>', "broken XML"),
        (b"<a>", "broken XML"),
        (b"", "broken XML"),
    ],
)
def test_xml_that_cannot_be_used_is_one_line(data, word):
    refused(lambda: foreign.parse_xml(data, "a.xml"), "a.xml", word)


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path):
    (tmp_path / "f").write_bytes(b"12345")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "to").symlink_to("f")
    assert foreign.read_bytes(tmp_path / "f", most=5) == foreign.read_bytes(tmp_path / "to") == b"12345"
    refused(lambda: foreign.read_bytes(tmp_path / "f", "table", most=4), "at most", "table")
    refused(lambda: foreign.read_bytes(tmp_path / "pipe"), "a pipe")
    refused(lambda: foreign.read_bytes(tmp_path / "link"), "link to nowhere")
    refused(lambda: foreign.read_bytes(tmp_path / "no\nsuch"), "missing file")
    refused(lambda: foreign.read_bytes(tmp_path), "a folder")
    refused(lambda: foreign.read_bytes("/dev/zero"), "a device")
    refused(lambda: foreign.read_bytes("a\0b"), "no usable name")


@pytest.mark.parametrize("name", ["../x.jpg", "a/../../x", "/etc/passwd", "", "  ", "a\0", "C:\\x.jpg", "..\\x"])
def test_names_in_data_stay_below_their_folder(tmp_path, name):
    refused(lambda: foreign.under(tmp_path, name, "tags.csv: line 2"), "tags.csv: line 2")


def test_names_below_a_folder_are_taken(tmp_path):
    assert foreign.under(tmp_path, "a/b c.jpg", "x") == tmp_path / "a" / "b c.jpg"
    assert foreign.under(tmp_path, "a\\b..jpg", "x") == tmp_path / "a" / "b..jpg"


def test_values_are_typed_and_bounded():
    assert foreign.as_int("7", "id", text=True) == foreign.as_int(7.0, "id") == 7
    for value in (True, "7", 7.5, 1e300, None, [], float("nan")):
        refused(lambda v=value: foreign.as_int(v, "f: id"), "f: id", "whole number")
    for value in (True, "7", 10**400, None, float("inf"), float("nan")):
        refused(lambda v=value: foreign.as_number(v, "f: x"), "finite number")
    refused(lambda: foreign.as_int(9, "f: x", least=1, most=8), "from 1 to 8")
    refused(lambda: foreign.as_dict([], "state.json"), "state.json: []")
    refused(lambda: foreign.field({"a": 1}, "b", "state.json"), "no key 'b' among 'a'")
    refused(lambda: foreign.field([], "b", "state.json"), "keys and values")


def test_text_from_outside_is_escaped_for_its_medium():
    assert line("a\nb\x1b[2J\u202e") == "a b\\x1b[2J\\u202e"
    assert html("<b>\x00") == "&lt;b&gt;\\x00"
    assert [csv_cell(v) for v in ("=1+1", "@x", "-cmd", "-1.5", "+2e3", "a", 1.5)] == [
        "'=1+1",
        "'@x",
        "'-cmd",
        "-1.5",
        "+2e3",
        "a",
        1.5,
    ]


@pytest.mark.parametrize(
    ("uri", "shown", "kept"),
    [
        ("s3://k:s@b/x?secret_key=abc&region=eu", "s3://***@b/x?secret_key=***&region=eu", "s3://b/x?region=eu"),
        ("postgresql://u:p@ss@h:5/db", "postgresql://***@h:5/db", "postgresql://h:5/db"),
        ("s3://b/x?access_key=a", "s3://b/x?access_key=***", "s3://b/x"),
        ("https://h/x?token=a&sig=b#c", "https://h/x?token=***&sig=***#c", "https://h/x#c"),
        ("runs/a@b?x=1", "runs/a@b?x=1", "runs/a@b?x=1"),
        ("s3://b/x?endpoint_override=127.0.0.1:5", "s3://b/x?endpoint_override=127.0.0.1:5", None),
    ],
)
def test_credentials_are_hidden(uri, shown, kept):
    assert masked(uri) == shown
    assert public(uri) == (kept or uri)


def test_whatever_escapes_a_command_is_one_line_and_a_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def broken() -> int:
        raise LookupError("first\nsecond mlflow://u:geheim@h")

    assert guarded(broken) == FAULT
    said = capsys.readouterr().err
    (log,) = tmp_path.glob("ugrl-*.log")
    assert said.count("\n") == 1 and str(log) in said and "Traceback" not in said and "geheim" not in said
    assert "LookupError" in log.read_text() and "geheim" not in log.read_text()


def test_an_out_that_cannot_be_a_folder_is_refused_before_work(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("/nonexistent/disk")
    for where, word in [
        ("", "is ''"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "below", "expected a folder"),
        (tmp_path / "link", "link to nowhere"),
        (tmp_path / "link" / "x", "link to nowhere"),
        (tmp_path / ("n" * 250), "characters"),
        ("/proc/nobody", "--out"),
        ("a\0b", "--out"),
    ]:
        refused(lambda w=where: folder_for(w), "--out", word, error=ConfigError)
    for name in ("new", "a/b/c", "x [/b] #?%"):
        assert folder_for(tmp_path / name) == tmp_path / name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]
