"""`gemma-wgpu batch` answers all that is asked, and each answer is there once however often it is killed."""

import errno
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gemma_wgpu import Gemma, load
from gemma_wgpu.apps.batch_file import Line, ResultFile, answers
from gemma_wgpu.apps.cli import main
from gemma_wgpu.engine.request import Request
from gemma_wgpu.errors import DeviceError, RequestError
from gemma_wgpu.models.gemma3 import Gemma3Config
from tests.broken_pictures import encoded, picture
from tests.tiny import HF, random_weights, write_folder
from tests.tiny_vision import NOISE, RED, data_uri, write_sighted

pytestmark = pytest.mark.slow

SECONDS = 60  # until something that hangs is given up
KILLS = 5
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "so", "it", "went", "home", "again"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    weights = random_weights(Gemma3Config.from_hf(HF))
    return str(write_folder(tmp_path_factory.mktemp("batch") / "tiny", HF, weights))


@pytest.fixture(scope="module")
def gemma(folder: str) -> Iterator[Gemma]:
    with load(folder, precision="f32") as gemma:
        yield gemma


def written(path: Path, requests: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    return str(path)


def results(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def run(source: str, out: Path, folder: str, *options: str) -> Result:
    return CliRunner().invoke(main, ["batch", source, str(out), "--model", folder, "--precision", "f32", *options])


def refused(source: str, out: Path, folder: str, *named: str, options: Sequence[str] = ()) -> None:
    result = run(source, out, folder, *options)
    assert result.exit_code == 1
    assert result.output.count("\n") == 1
    for name in named:
        assert name in result.output


def asked(number: int) -> dict[str, object]:
    word = WORDS[number % len(WORDS)]
    content = {"prompt": word} if number % 3 else {"messages": [{"role": "user", "content": word}]}
    return {"custom_id": f"r{number}", "max_new_tokens": 20 + number % 30, **content}


MANY = [asked(number) for number in range(60)]


def test_answers(tmp_path: Path, folder: str, gemma: Gemma) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": {"enum": [1, 22]}}}
    chat = [{"role": "system", "content": "so"}, {"role": "user", "content": "it"}]
    source = written(
        tmp_path / "in",
        [
            {"custom_id": "a", "prompt": "the cat"},
            {"custom_id": "€😀", "messages": chat, "temperature": 0.5, "max_new_tokens": 3},
            {"custom_id": "c", "prompt": [2, 300], "seed": 7, "stop": ["a", "e"]},
            {"custom_id": "d", "prompt": "x" * 500},
            {"custom_id": "e", "prompt": "the cat"},
            {"custom_id": "f", "prompt": "the", "response_format": form},
        ],
    )
    out = tmp_path / "out"
    result = run(source, out, folder, "--max-new-tokens", "12", "--seed", "40", "--top-k", "0")
    assert result.exit_code == 1
    assert f"6 results in {out}, 6 of them new, 1 of them errors\n" in result.output
    there = {result["custom_id"]: result for result in results(out)}
    assert sorted(there) == ["a", "c", "d", "e", "f", "€😀"]
    for custom_id, generation in {
        "a": gemma.generate("the cat", max_new_tokens=12, seed=40, top_k=0),
        "€😀": gemma.chat(chat, max_new_tokens=3, seed=41, top_k=0, temperature=0.5),
        "c": gemma.generate([2, 300], max_new_tokens=12, seed=7, top_k=0, stop=["a", "e"]),
        "e": gemma.generate("the cat", max_new_tokens=12, seed=44, top_k=0),
    }.items():
        text = "".join(map(str, generation))
        stats = generation.stats
        assert there[custom_id] == {
            "id": there[custom_id]["id"],
            "custom_id": custom_id,
            "text": text,
            "seed": generation.seed,
            "prompt_tokens": stats.prompt_tokens,
            "new_tokens": stats.new_tokens,
            "finish_reason": stats.finish_reason,
        }
    assert set(there["d"]) == {"id", "custom_id", "error"}
    assert "context_length" in there["d"]["error"]
    assert json.loads(there["f"]["text"]) in (1, 22)
    assert len({result["id"] for result in there.values()}) == 6


def test_killed_again_and_again(tmp_path: Path, folder: str) -> None:
    source = written(tmp_path / "in", MANY)
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    assert run(source, undisturbed, folder).exit_code == 0
    rng = random.Random(0)
    line = [sys.executable, "-c", "from gemma_wgpu.apps.cli import main; main()", "batch", source, str(out)]
    line += ["--model", folder, "--precision", "f32"]
    for _ in range(KILLS):
        before = out.stat().st_size if out.exists() else 0
        with subprocess.Popen(line, stderr=subprocess.PIPE) as process:
            started = time.monotonic()
            while not out.exists() or out.stat().st_size == before:
                assert process.poll() is None and time.monotonic() - started < SECONDS
                time.sleep(0.001)
            time.sleep(rng.random() * 0.1)
            process.send_signal(signal.SIGKILL)
            assert process.wait(SECONDS) == -signal.SIGKILL
        with out.open("ab") as file:  # it may be killed in the middle of a write
            file.write(undisturbed.read_bytes()[: rng.randrange(50)])
    assert 0 < len(out.read_bytes().splitlines()) < len(MANY)
    assert run(source, out, folder).exit_code == 0
    lines = out.read_bytes().splitlines()
    assert len(lines) == len(MANY)
    assert sorted(lines) == sorted(undisturbed.read_bytes().splitlines())


def test_one_that_is_done_is_done(tmp_path: Path, folder: str) -> None:
    source, out = written(tmp_path / "in", MANY[:2]), tmp_path / "out"
    assert run(source, out, folder).exit_code == 0
    before = out.read_bytes()
    result = run(source, out, folder)
    assert (result.exit_code, out.read_bytes()) == (0, before)
    assert "0 of them new" in result.output
    written(tmp_path / "in", MANY[:3])  # some more
    assert run(source, out, folder).exit_code == 0
    assert out.read_bytes().startswith(before)
    assert len(results(out)) == 3


def test_a_run_that_is_not_the_one_that_was_begun(tmp_path: Path, folder: str) -> None:
    source, out = written(tmp_path / "in", MANY[:2]), tmp_path / "out"
    assert run(source, out, folder).exit_code == 0
    before = out.read_bytes()
    other = written(tmp_path / "other", [MANY[0], MANY[1] | {"prompt": "so"}])
    refused(other, out, folder, str(out), "line 2", "another input")
    refused(source, out, folder, "line 1", "options", options=["--top-k", "3"])
    refused(source, out, folder, "line 1", "model", options=["--context-length", "100"])
    notes = tmp_path / "notes"
    for content in (b"some notes\n", b'"some"\n', b"{}\n", b"\xff\n"):
        notes.write_bytes(content)
        refused(source, notes, folder, str(notes), "line 1", "no result")
        assert notes.read_bytes() == content
    assert out.read_bytes() == before


def test_two_at_once(tmp_path: Path, folder: str) -> None:
    source, out = written(tmp_path / "in", MANY[:2]), tmp_path / "out"
    with ResultFile(out):
        refused(source, out, folder, str(out), "another process")
    refused(source, tmp_path / "no" / "out", folder, "no/out", "cannot be written")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b"{", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b"5", "custom_id"),
        (b'{"prompt": "a"}', "custom_id"),
        (b'{"custom_id": 5, "prompt": "a"}', "custom_id"),
        (b'{"custom_id": "b"}', "neither"),
        (b'{"custom_id": "b", "prompt": "a", "messages": []}', "prompt and messages"),
        (b'{"custom_id": "b", "prompt": "a", "max_tokens": 5}', "'max_tokens'"),
        (b'{"custom_id": "a", "prompt": "a"}', "of line 1"),
    ],
)
def test_lines_that_are_no_requests(tmp_path: Path, line: bytes, named: str) -> None:
    """They are found before the model is loaded."""
    source = tmp_path / "in"
    source.write_bytes(b'{"custom_id": "a", "prompt": "a"}\n\n' + line + b"\n")
    refused(str(source), tmp_path / "out", "no such model", str(source), "line 3", named)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.write_bytes(b"\xff\xfe")
    refused(str(source), tmp_path / "out", "no such model", str(source), "cannot be read")


@pytest.mark.parametrize(
    "request_",
    [
        {"prompt": []},
        {"prompt": None},
        {"prompt": {"a": 1}},
        {"prompt": ["a"]},
        {"prompt": "a", "temperature": "hot"},
        {"prompt": "a", "max_new_tokens": 0},
        {"prompt": "a", "stop": [""]},
        {"prompt": "a", "response_format": {"type": "xml"}},
        {"messages": [{"role": "tool", "content": "a"}]},
        {"messages": 5},
        {"messages": [5]},
    ],
)
def test_requests_that_are_refused(tmp_path: Path, folder: str, request_: dict[str, object]) -> None:
    """The others are answered."""
    source = written(tmp_path / "in", [{"custom_id": "b"} | request_, {"custom_id": "a", "prompt": "a"}])
    out = tmp_path / "out"
    assert run(source, out, folder, "--max-new-tokens", "2").exit_code == 1
    bad, good = results(out)
    assert bad["error"] and "\n" not in bad["error"]
    assert good["new_tokens"] == 2


def test_half_a_character(tmp_path: Path, folder: str) -> None:
    """JSON can write what UTF-8 cannot."""
    source, out = tmp_path / "in", tmp_path / "out"
    source.write_text('{"custom_id": "\\ud83d", "prompt": "\\ud83d"}\n')
    for _ in range(2):
        assert run(str(source), out, folder, "--max-new-tokens", "2").exit_code == 0
        assert [result["custom_id"] for result in results(out)] == ["\ud83d"]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with (
        ResultFile(tmp_path / "out") as file,
        pytest.raises(RequestError, match="out: cannot be written: the disk is full"),
    ):
        file.append({"id": "a"})


@pytest.mark.parametrize(
    "content",
    [
        b"some notes",
        b'{"notes": 5}',
        b'{"id": "chatcmpl-7", "object": "chat.completion"}',
        b'{"id": "' + b"0" * 32,
        b'{"id": "' + b"0" * 32 + b'", "custom_id": "r0", "text": "',
    ],
)
@pytest.mark.parametrize("before", [0, 1])
def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path, folder: str, content: bytes, before: int) -> None:
    """Its last line has no end, as that of a run that was killed."""
    source, out = written(tmp_path / "in", MANY[:2]), tmp_path / "out"
    if before:
        assert run(source, out, folder).exit_code == 0
    content = out.read_bytes() + content if before else content
    out.write_bytes(content)
    refused(source, out, folder, str(out), f"line {3 if before else 1} is no result")
    assert out.read_bytes() == content


def test_a_file_of_another_run_is_left_alone(tmp_path: Path, folder: str) -> None:
    source, out = written(tmp_path / "in", MANY[:2]), tmp_path / "out"
    assert run(source, out, folder).exit_code == 0
    content = out.read_bytes()[:-5]
    for torn in (content, content[:20]):
        out.write_bytes(torn)
        refused(source, out, folder, str(out), options=["--top-k", "3"])
        assert out.read_bytes() == torn


@pytest.mark.parametrize("kept", [0, 1, 8, 30, 45, 60, -1])
def test_a_result_that_was_not_written_to_its_end(tmp_path: Path, folder: str, kept: int) -> None:
    source, out = written(tmp_path / "in", MANY[:2]), tmp_path / "out"
    assert run(source, out, folder).exit_code == 0
    first, second = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(first + second[:kept])
    result = run(source, out, folder)
    assert (result.exit_code, out.read_bytes()) == (0, first + second)
    assert "1 of them new" in result.output


def test_standard_input_and_output(tmp_path: Path, folder: str) -> None:
    source, out = written(tmp_path / "in", MANY[:3]), tmp_path / "out"
    assert run(source, out, folder).exit_code == 0
    expected = sorted(out.read_bytes().splitlines())
    line = [sys.executable, "-c", "from gemma_wgpu.apps.cli import main; main()", "batch"]
    options = ["--model", folder, "--precision", "f32"]
    for arguments in ([source, "-"], ["-", "-"], ["-", str(tmp_path / "again")]):
        content = Path(source).read_bytes()
        found = subprocess.run(
            [*line, *arguments, *options],
            input=content,
            capture_output=True,
            timeout=SECONDS,
            check=True,
            cwd=tmp_path,
        )
        printed = found.stdout if arguments[1] == "-" else (tmp_path / "again").read_bytes()
        assert sorted(printed.splitlines()) == expected
        place = "the standard output" if arguments[1] == "-" else arguments[1]
        assert found.stderr.decode() == f"3 results in {place}, 3 of them new\n"
    assert not (tmp_path / "-").exists()


def test_a_reader_that_goes_away(tmp_path: Path, folder: str) -> None:
    source = written(tmp_path / "in", MANY)
    line = [sys.executable, "-c", "from gemma_wgpu.apps.cli import main; main()", "batch", source, "-"]
    with subprocess.Popen(
        [*line, "--model", folder, "--precision", "f32"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        assert json.loads(process.stdout.readline())["text"]
        process.stdout.close()
        assert process.wait(SECONDS) == 1
        assert process.stderr.read() == b""


def test_standard_input_that_is_wrong(tmp_path: Path) -> None:
    for content, named in (
        (b"{\n", "standard input: line 1 is not JSON"),
        (b"\xff", "standard input: cannot be read"),
    ):
        result = CliRunner().invoke(main, ["batch", "-", str(tmp_path / "out"), "--model", "none"], input=content)
        assert result.exit_code == 1
        assert named in result.output
        assert result.output.count("\n") == 1


def test_errors_of_an_earlier_run_count(tmp_path: Path, folder: str) -> None:
    source, out = written(tmp_path / "in", [{"custom_id": "a", "prompt": []}, MANY[1]]), tmp_path / "out"
    for new in (2, 0):
        result = run(source, out, folder)
        assert result.exit_code == 1
        assert f"2 results in {out}, {new} of them new, 1 of them errors\n" in result.output


def test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their paths begin in the working directory. Lines whose images cannot be read get an error."""
    monkeypatch.chdir(tmp_path)
    folder = str(write_sighted(tmp_path / "sighted"))
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "long.png").write_bytes(encoded(picture(width=600, height=300), "PNG"))
    (tmp_path / "broken.png").write_bytes(RED[:40])

    def seen(**image: object) -> list[Any]:
        return [{"role": "user", "content": [{"type": "image", **image}, {"type": "text", "text": "so"}]}]

    uri = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_uri(NOISE)}}]}]
    long = seen(path="long.png")
    source = written(
        tmp_path / "in",
        [
            {"custom_id": "red", "messages": seen(path="red.png")},
            {"custom_id": "uri", "messages": uri},
            {"custom_id": "broken", "messages": seen(path="broken.png")},
            {"custom_id": "none", "messages": seen(path="none.png")},
            {"custom_id": "long", "messages": long},
            {"custom_id": "cut", "messages": long, "pan_and_scan": True},
            {"custom_id": "wrong", "messages": long, "pan_and_scan": 1},
        ],
    )
    assert run(source, tmp_path / "out", folder, "--max-new-tokens", "6", "--temperature", "0").exit_code == 1
    found = {result["custom_id"]: result for result in results(tmp_path / "out")}
    with load(folder, precision="f32") as gemma:
        for custom_id, messages, cut in (
            ("red", seen(image=RED), False),
            ("uri", uri, False),
            ("long", long, False),
            ("cut", long, True),
        ):
            generation = gemma.chat(messages, pan_and_scan=cut, temperature=0, max_new_tokens=6)
            assert found[custom_id]["text"] == generation.result()
            assert found[custom_id]["prompt_tokens"] == generation.stats.prompt_tokens
    for custom_id, named in (("broken", "broken.png"), ("none", "none.png"), ("wrong", "pan_and_scan")):
        assert named in found[custom_id]["error"]
    out = tmp_path / "cut"
    assert run(source, out, folder, "--max-new-tokens", "6", "--temperature", "0", "--pan-and-scan").exit_code == 1
    assert {result["custom_id"]: result.get("text") for result in results(out)}["long"] == found["cut"]["text"]
    refused(source, tmp_path / "out", folder, "options", options=["--pan-and-scan"])


def test_a_text_that_fails_in_a_step(gemma: Gemma, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go on; but the GPU's failures are no line's fault."""
    push = Request.push
    failing = gemma.tokenizer.encode("it")

    def push_or_fail(request: Request, *arguments: Any) -> None:
        if request.prompt == failing and len(request.ids) == 3:
            raise error
        push(request, *arguments)

    monkeypatch.setattr(Request, "push", push_or_fail)
    lines = [
        Line(word, "prompt", word, {"max_new_tokens": 6, "temperature": 0}) for word in ("the cat", "it", "a mat")
    ]
    error: Exception = ZeroDivisionError("a mistake")
    found = {result["custom_id"]: result for result in answers(gemma, lines, 3)}
    assert found["it"]["error"] == "ZeroDivisionError: a mistake"
    for word in ("the cat", "a mat"):
        assert found[word]["text"] == gemma.generate(word, max_new_tokens=6, temperature=0).result()
    error = DeviceError("the GPU is gone")
    with pytest.raises(DeviceError, match="the GPU is gone"):
        list(answers(gemma, lines, 3))
    assert not gemma.scheduler.running
