"""The commands of `ovl` on images, as they are typed."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from overlayfs_py.cli.ovl import main
from overlayfs_py.images import Store
from tests.images.rig import Item, archive, folder, load_one, write_layout
from tests.support.mounts import REPOSITORY

LAYERS = [
    archive([folder("./"), Item("a", b"a"), Item("b", b"b")]),
    archive([Item(".wh.b"), Item("a", b"A"), Item("c")]),
]

Ovl = Callable[..., Result]


@pytest.fixture
def ovl(store: Store, base: Path) -> Ovl:
    """Runs a command on the store, and wants the exit status `status` (keyword, 0)."""

    def run(*words: object, status: int = 0, data: bytes | None = None) -> Result:
        arguments = ["--root", str(store.root), *map(str, words)]
        result = CliRunner().invoke(main, arguments, input=data, catch_exceptions=False)
        assert result.exit_code == status, result.output
        if status == 1:
            assert re.fullmatch(r"ovl: [^\n]+\n", result.stderr), result.stderr
        return result

    write_layout(base / "named", LAYERS, Cmd=["/bin/sh"])
    return run


def test_an_image_is_loaded_listed_tagged_and_removed(ovl: Ovl, base: Path) -> None:
    assert ovl("load", "-i", base / "named").stdout == "Loaded named:latest\n"
    ovl("tag", "named", "localhost:5000/other:2")
    listed = json.loads(ovl("images", "--format", "json").stdout)
    assert [(image["Names"], image["Layers"]) for image in listed] == [(["named:latest", "localhost:5000/other:2"], 2)]
    rows = [line.split() for line in ovl("images").stdout.splitlines()]
    assert [row[:2] for row in rows] == [["REPOSITORY", "TAG"], ["named", "latest"], ["localhost:5000/other", "2"]]
    assert ovl("images", "-q", "named").stdout.strip() == listed[0]["Id"]
    assert ovl("images", "-q", "absent").stdout == ""
    assert "has the names" in ovl("rmi", listed[0]["Id"][7:19], status=1).stderr
    assert ovl("rmi", "named").stdout == "Untagged named:latest\n"
    assert ovl("rmi", "localhost:5000/other:2").stdout.endswith(f"Deleted {listed[0]['Id']}\n")
    assert json.loads(ovl("images", "--format", "json").stdout) == []


def test_an_image_goes_through_pipes(ovl: Ovl, base: Path) -> None:
    ovl("load", "-i", base / "named")
    for form in ("docker-archive", "oci"):
        saved = ovl("save", "--format", form, "named").stdout_bytes
        assert ovl("load", "--name", f"again:{form}", data=saved).stdout == f"Loaded again:{form}\n"
    assert len(json.loads(ovl("images", "--format", "json").stdout)) == 1


def test_what_is_told_of_an_image(ovl: Ovl, base: Path) -> None:
    ovl("load", "-i", base / "named")
    (told,) = json.loads(ovl("inspect", "named").stdout)
    assert told["Config"] == {"Cmd": ["/bin/sh"]} and len(told["Layers"]) == 2
    layers = json.loads(ovl("layers", "named", "--format", "json").stdout)
    counted = [[layer[key] for key in ("Added", "Changed", "Deleted")] for layer in layers]
    assert counted == [[1, 1, 1], [2, 0, 0]]
    assert len(ovl("layers", "named").stdout.splitlines()) == 3
    history = json.loads(ovl("history", "named", "--format", "json").stdout)
    assert [step["Layer"] for step in history] == [layer["Digest"] for layer in layers]


def test_a_history_tells_which_steps_made_no_layer(ovl: Ovl, base: Path) -> None:
    ovl("import", "-", "imported", "-c", "CMD sh", "-m", "a comment", data=LAYERS[0])
    (step,) = json.loads(ovl("history", "imported", "--format", "json").stdout)
    assert (step["CreatedBy"], step["Comment"]) == ("ovl import", "a comment")


def test_a_container_keeps_its_image(ovl: Ovl, store: Store, base: Path) -> None:
    image = load_one(store, base / "named")
    state = store.root / "containers" / "1234" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"id": "1234", "name": "web", "image": image.id}))
    assert "used by web" in ovl("rmi", "named", status=1).stderr
    assert ovl("rmi", "-f", "named").stdout == "Untagged named:latest\n"
    assert store.image(image.id).names == ()
    (state.parent / "state.json").write_text("half writ")
    ovl("rmi", image.id)
    assert store.images() == []


@pytest.mark.parametrize(
    "words",
    [
        ("load", "-i", "/nowhere"),
        ("save", "absent"),
        ("rmi", "absent"),
        ("tag", "absent", "x"),
        ("history", "absent"),
        ("inspect", "absent"),
        ("layers", "BAD NAME"),
        ("push", "absent"),
        ("pull", "BAD NAME"),
        ("import", "/nowhere"),
        ("check", "absent"),
        ("convert", "--to", "aufs", "/nowhere"),
    ],
)
def test_what_can_not_be_done_is_one_line(ovl: Ovl, words: tuple[str, ...]) -> None:
    assert ovl(*words, status=1).stdout == ""


def test_marks_are_checked_and_converted(ovl: Ovl, base: Path) -> None:
    layers = [base / "upper", base / "lower"]
    for path in layers:
        path.mkdir()
    os.mknod(layers[0] / "orphan", 0o020000)
    (layers[0] / ".wh.b").touch()
    (layers[1] / "b").touch()
    found = CliRunner().invoke(main, ["check", *map(str, layers), "--format", "json"])
    assert found.exit_code == 1
    assert [(row["Path"], row["Problem"]) for row in json.loads(found.stdout)] == [("orphan", "whiteout of nothing")]
    assert "yes" in ovl("check", "--repair", *layers).stdout
    assert ovl("check", *layers).stdout == ""
    assert ovl("convert", "--to", "kernel", layers[0]).stdout == f"{layers[0]}: 1 marks converted\n"
    assert os.listdir(layers[0]) == ["b"]


def test_a_layer_is_found_on_disk_by_what_is_told_of_it(ovl: Ovl, base: Path, store: Store) -> None:
    ovl("load", "-i", base / "named")
    head, *rows = [re.split(r" {2,}", line) for line in ovl("layers", "named").stdout.splitlines()]
    assert head[:2] == ["DIRECTORY", "DIFF ID"]
    told = json.loads(ovl("layers", "named", "--format", "json").stdout)
    for row, layer in zip(rows, told, strict=True):
        (directory,) = [path for path in store.layout.layers.iterdir() if path.name.startswith(row[0])]
        assert (str(directory), directory.name) == (layer["Path"], layer["ChainId"].removeprefix("sha256:"))
        assert layer["DiffId"].startswith(f"sha256:{row[1]}")


def test_every_command_is_listed_with_a_whole_sentence(ovl: Ovl) -> None:
    for group in ((), ("volume",), ("system",)):
        listed = ovl(*group, "--help").stdout.partition("Commands:")[2].partition("Examples:")[0]
        assert listed.strip()
        assert [line for line in listed.splitlines() if line.strip() and not line.endswith(".")] == []


def test_every_command_explains_itself_with_an_example(ovl: Ovl) -> None:
    for name in main.list_commands(main.make_context("ovl", [], resilient_parsing=True)):
        assert "Example" in ovl(name, "--help").stdout, name


def test_the_program_itself_runs_and_completes(store: Store, base: Path) -> None:
    def run(*words: str, **more: str) -> str:
        environment = {**os.environ, "OVL_ROOT": str(store.root), **more}
        command = [sys.executable, "-m", "overlayfs_py.cli.ovl", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment).stdout

    write_layout(base / "named", LAYERS)
    assert run("load", "-i", str(base / "named")) == "Loaded named:latest\n"
    assert "plain,history" in run(_OVL_COMPLETE="bash_complete", COMP_WORDS="ovl hist", COMP_CWORD="1")
    for command in ("run", "rmi", "save"):
        assert run(_OVL_COMPLETE="bash_complete", COMP_WORDS=f"ovl {command} na", COMP_CWORD="2") == "plain,named\n"
    nowhere = run(_OVL_COMPLETE="bash_complete", COMP_WORDS="ovl rmi ", COMP_CWORD="2", OVL_ROOT=str(base / "nowhere"))
    assert nowhere == "\n" and not (base / "nowhere").exists()
