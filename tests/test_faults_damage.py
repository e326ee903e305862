"""Damaged checkpoints and exports: a warning and the next older one, or a refusal; never wrong weights."""

from __future__ import annotations

import json
import random
import struct
from functools import partial
from pathlib import Path

import faults
import pytest


def structure(path: Path) -> tuple[list[int], dict[str, tuple[int, int]]]:
    """Every structural edge of a safetensors file, and its regions as (start, end) by name."""
    data = path.read_bytes()
    (header_size,) = struct.unpack("<Q", data[:8])
    start = 8 + header_size
    header = data[8:start]
    regions = {"header size": (0, 8)}
    for word in (
        b'"__metadata__"',
        b'"alg1"',
        b"sha256",
        b'"dtype"',
        b'"shape"',
        b'"data_offsets"',
        b"progress",
    ):
        if word in header:
            at = 8 + header.index(word)
            regions[word.decode()] = (at, at + len(word) + 20)
    for name, about in json.loads(header).items():
        if name != "__metadata__":
            begin, end = about["data_offsets"]
            regions[name] = (start + begin, start + end)
    edges = {0, 1, 7, 8, 9, 8 + header_size // 2, start - 1, start, start + 1, len(data) - 1}
    edges |= {place for region in regions.values() for place in region}
    return sorted(edge for edge in edges if edge < len(data)), regions


def truncate(size: int, data: bytes) -> bytes:
    return data[: min(size, len(data) - 1)]


def flip(place: int, bit: int, data: bytes) -> bytes:
    place = min(place, len(data) - 1)  # checkpoints differ in size by a few bytes
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def damages(path: Path, n_random: int = 256) -> dict[str, partial]:
    """Ways to damage a file: cut at each edge, a bit flipped in each region and at random places."""
    edges, regions = structure(path)
    size = path.stat().st_size
    draw = random.Random(1337)
    found = {f"cut to {edge} of {size} bytes": partial(truncate, edge) for edge in edges}
    places = [(name, draw.randrange(start, min(end, size))) for name, (start, end) in regions.items()]
    places += [(f"place {i}", draw.randrange(size)) for i in range(n_random)]
    for name, place in places:
        bit = draw.randrange(8)
        found[f"{name}: bit {bit} of byte {place} flipped"] = partial(flip, place, bit)
    return found


def resume_with_damage(reference: faults.Reference, damage: partial, folder: Path) -> None:
    run_dir = faults.copy_of(reference, folder)
    newest = faults.checkpoints(folder)[-1]
    newest.write_bytes(damage(newest.read_bytes()))
    assert faults.train_in_child(["--resume", "latest"]) == 0
    output = (folder / "output.txt").read_text()
    assert f"warning: {newest.relative_to(folder)}: " in output
    assert "; trying an older one" in output
    assert "Traceback" not in output
    reference.check(folder)
    assert (newest.parent / f"{newest.name}.aside").exists()
    assert run_dir == faults.only_run(folder)


def test_a_damaged_newest_checkpoint_costs_a_warning(reference, tmp_path, campaign):
    newest = faults.checkpoints(reference.folder)[-1]
    cases = {
        name: partial(resume_with_damage, reference, damage) for name, damage in damages(newest, 32).items()
    }
    chosen = faults.sample(cases, campaign.whole, 8)
    faults.run_cases(tmp_path, chosen)
    campaign.count("newest checkpoint cut at an edge or with a flipped bit, then resumed", len(chosen))


def test_where_every_checkpoint_is_damaged_the_resume_is_refused(reference, tmp_path, campaign):
    def refuse(damage: partial, folder: Path) -> None:
        faults.copy_of(reference, folder)
        before = {}
        for path in faults.checkpoints(folder):
            path.write_bytes(damage(path.read_bytes()))
            before[path] = path.read_bytes()
        assert faults.train_in_child(["--resume", "latest"]) == 2
        output = (folder / "output.txt").read_text()
        error, hint = output.splitlines()[-2:]
        assert error.startswith("error: runs/") and hint.startswith("hint: put a copy of one there")
        assert "none of its" in output and "Traceback" not in output
        assert {path: path.read_bytes() for path in faults.checkpoints(folder)} == before

    newest = faults.checkpoints(reference.folder)[-1]
    cases = {name: partial(refuse, damage) for name, damage in damages(newest, 0).items()}
    chosen = faults.sample(cases, campaign.whole, 4)
    faults.run_cases(tmp_path, chosen)
    campaign.count("all checkpoints damaged, then refused", len(chosen))


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_damaged_weights_are_refused_or_unharmed(kind, reference, tmp_path, campaign):
    from utils_alg1.base.errors import Alg1Error
    from utils_alg1.training.resume import load_model_file

    path = faults.checkpoints(reference.folder)[-1]
    if kind == "export":
        path = faults.only_run(reference.folder) / "artifacts" / "export" / "model.safetensors"
    whole = load_model_file(path, print)
    state = whole.state_dict()
    refused = 0
    cases = damages(path)
    for name, damage in cases.items():
        damaged = tmp_path / "model.safetensors"
        damaged.write_bytes(damage(path.read_bytes()))
        try:
            model = load_model_file(damaged, print)
        except Alg1Error as error:
            assert error.exit_code == 2, name
            refused += 1
            continue
        # Only a flip in the name of the metadata gets through, which loses the vocabulary but no weights; or
        # one that makes the capital letter of a hexadecimal digit, which changes nothing.
        assert "cut" not in name
        assert model.vocabulary in (None, whole.vocabulary), name
        assert all(state[key].equal(value) for key, value in model.state_dict().items()), name
    assert refused >= len(cases) - 5
    campaign.count(f"{kind} cut at an edge or with a flipped bit, then read", len(cases))


def test_a_run_goes_on_from_each_of_its_checkpoints_whatever_the_intervals(reference, tmp_path, campaign):
    # Every checkpoint of a run, by ending it at each step: the last one is then of that step.
    others = [
        ("--eval-interval", "5", "--checkpoint-interval", "2"),
        ("--eval-interval", "1", "--checkpoint-interval", "0"),
        ("--eval-interval", "12", "--eval-iters", "3", "--keep-checkpoints", "1"),
        ("--histogram-interval", "1", "--patience", "0"),
    ]

    def resume_from(step: int, flags: tuple[str, ...], folder: Path) -> None:
        arguments = [*faults.ARGUMENTS, "--max-iters", str(step)]
        assert faults.train_in_child(arguments) == 0
        resume = ["--resume", "latest", "--max-iters", str(faults.LAST_STEP), *flags]
        assert faults.train_in_child(resume) == 0
        assert faults.tensors(faults.checkpoints(folder)[-1]) == reference.last
        steps = [row["step"] for row in faults.metrics(faults.only_run(folder)) if "loss/train_step" in row]
        assert steps == list(range(faults.LAST_STEP))

    cases = {
        f"from step {step} with {' '.join(flags)}": partial(resume_from, step, flags)
        for step in range(1, faults.LAST_STEP)
        for flags in others
    }
    chosen = faults.sample(cases, campaign.whole, 5)
    faults.run_cases(tmp_path, chosen)
    campaign.count("resumed from a step with other intervals", len(chosen))
