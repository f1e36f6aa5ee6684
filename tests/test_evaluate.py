"""Retrieval scores against closed forms, and the program on a model whose samples are its training pictures."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.shards import write_shards
from ldm.evaluate import main
from ldm.evaluation.retrieval import captions_of, choose_captions, features, read_pictures, retrieval
from ldm.pipeline.pipeline import Pipeline, save_pipeline
from ldm.sampling.generation import generate


def grey(levels: np.ndarray, size: int = 8) -> np.ndarray:
    """Pictures (N, size, size, 3) uint8 of one grey level each: their distance is the squared difference of levels."""
    return np.broadcast_to(np.asarray(levels, np.uint8)[:, None, None, None], (len(levels), size, size, 3)).copy()


def test_noisy_copies_are_found_and_permuted_captions_are_not() -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (40, 64, 64, 3)).astype(np.uint8)
    captions = [f"picture {i}" for i in range(40)]
    noisy = (pictures + rng.normal(0, 20, pictures.shape)).clip(0, 255).astype(np.uint8)
    outcome = retrieval(noisy, captions, pictures, captions)
    assert (outcome.top_1, outcome.top_5) == (1.0, 1.0)
    assert outcome.nearest == outcome.true == list(range(40))
    shifted = captions[1:] + captions[:1]
    outcome = retrieval(noisy, shifted, pictures, captions)
    assert outcome.top_1 == 0.0
    assert outcome.true == [*range(1, 40), 0]
    assert outcome.nearest == list(range(40))


def test_ranks_equal_counting_by_hand_in_300_random_trials_with_ties() -> None:
    seed, count = 5, 300
    rng = np.random.default_rng(seed)
    for trial in range(count):
        levels = rng.integers(0, 30, rng.integers(1, 25))  # few levels: equal distances and equal pictures abound
        names = rng.choice(list("abcdef"), len(levels))
        captions = rng.choice(np.unique(names), rng.integers(1, 6))
        samples = rng.integers(0, 30, len(captions))
        outcome = retrieval(grey(samples), list(captions), grey(levels, 16), list(names))
        for i, (sample, caption) in enumerate(zip(samples, captions, strict=True)):
            away = np.abs(levels - sample)
            own = away[names == caption].min()
            where = f"seed {seed}, trial {trial} of {count}, sample {i}"
            assert outcome.ranks[i] == 1 + (away[names != caption] < own).sum(), where
            assert away[outcome.nearest[i]] == away.min(), where
            assert away[outcome.true[i]] == own, where
            assert names[outcome.true[i]] == caption, where
        assert outcome.top_1 == np.mean([rank == 1 for rank in outcome.ranks])
        assert outcome.top_5 == np.mean([rank <= 5 for rank in outcome.ranks])


def test_distances_that_are_equal_stay_equal_whatever_the_order_of_their_sums() -> None:
    rng = np.random.default_rng(3)
    sample = grey(np.array([128]), 64)
    for trial in range(20):
        picture = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
        both = np.stack([picture, picture.transpose(1, 0, 2)])
        for caption in ("a", "b"):
            assert retrieval(sample, [caption], both, ["a", "b"]).ranks == [1], f"trial {trial} of 20"


def test_pictures_that_share_a_caption_all_count_as_the_right_one() -> None:
    pictures, names = grey(np.array([0, 100, 102, 200])), ["apple", "apple", "heart", "heart"]
    outcome = retrieval(grey(np.array([101, 99])), ["heart", "heart"], pictures, names)
    assert outcome.ranks == [1, 2]  # 101 lies between apple 100 and heart 102: a tie is not against it
    assert outcome.true == [2, 2]


def test_one_picture_under_two_names_is_right_for_both() -> None:
    rng = np.random.default_rng(1)
    flag, other = rng.integers(0, 256, (2, 72, 72, 3)).astype(np.uint8)
    outcome = retrieval(
        np.stack([flag, flag]), ["Norway", "Svalbard"], np.stack([flag, other, flag]), ["Norway", "x", "Svalbard"]
    )
    assert outcome.ranks == [1, 1]


def test_captions_are_compared_as_a_whole_and_a_picture_may_have_several() -> None:
    pictures = grey(np.array([0, 50, 100]))
    names: list[str | list[str]] = ["red heart", ["heart", "red"], "red apple"]
    outcome = retrieval(grey(np.array([0])), ["red"], pictures, names)
    assert outcome.ranks == [2]  # "red heart" holds the word, but is another caption
    assert outcome.true == [1]


def test_features_are_averages_blurred_by_1_2_1_as_numpy_computes_them() -> None:
    picture = np.random.default_rng(2).integers(0, 256, (1, 64, 64, 3)).astype(np.uint8)
    small = picture[0].reshape(32, 2, 32, 2, 3).mean((1, 3))
    kernel = np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
    padded = np.pad(small, ((1, 1), (1, 1), (0, 0)), mode="edge")
    expected = sum(kernel[i, j] * padded[i : i + 32, j : j + 32] for i in range(3) for j in range(3))
    found = features(picture)[0].numpy().reshape(3, 32, 32).transpose(1, 2, 0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_what_cannot_be_ranked_is_refused() -> None:
    pictures = grey(np.array([0, 1]))
    with pytest.raises(ValueError, match="no picture has the caption 'c'"):
        retrieval(pictures[:1], ["c"], pictures, ["a", "b"])
    for samples, captions, names in ((0, 0, 2), (1, 2, 2), (1, 1, 1)):
        with pytest.raises(
            ValueError, match=f"found {samples} samples, {captions} captions, 2 pictures, {names} captions"
        ):
            retrieval(pictures[:samples], ["a"] * captions, pictures, ["a"] * names)


def test_chosen_captions_are_different_and_a_function_of_their_set_and_the_seed() -> None:
    captions = [[f"caption {i % 50}", "second"] for i in range(200)]
    chosen = choose_captions(captions, 20, 3)
    assert len(set(chosen)) == 20
    assert choose_captions(captions[::-1], 20, 3) == chosen
    assert choose_captions(captions, 10, 3) == chosen[:10]
    assert choose_captions(captions, 20, 4) != chosen
    assert sorted(choose_captions(captions, 1000, 3)) == sorted(f"caption {i}" for i in range(50))


def test_captions_of_a_sample_are_those_that_training_draws_from() -> None:
    listed = json.dumps({"captions": ["a", "b ", "a", "c"]}).encode()
    assert captions_of({"txt": b" red heart \n"}) == ["red heart"]
    assert captions_of({"txt": b"red", "json": listed}) == ["a", "b", "c"]
    assert captions_of({"txt": b"red", "json": b"{}"}) == ["red"]
    with pytest.raises(ValueError, match="no caption"):
        captions_of({"png": b""})


def png(picture: np.ndarray) -> bytes:
    stored = io.BytesIO()
    Image.fromarray(picture).save(stored, "PNG")
    return stored.getvalue()


CAPTIONS = ["red heart", "blue heart", "green apple", "orange circle", "purple square", "a black cat", "flag of France"]
OPTIONS = ["--steps=3", "--sampler=ddim", "--guidance=3", "--device=cpu", "--seed=5", "--captions=7"]


def write_training_set(folder: Path, pipeline: Pipeline, shift: int) -> None:
    """Raw shards whose pictures are what the pipeline will draw of CAPTIONS, their captions moved on by `shift`."""
    chosen = choose_captions([[caption] for caption in CAPTIONS], 7, 5)
    pictures = generate(pipeline, chosen, seed=5, steps=3, sampler="ddim", guidance=3.0)
    samples = [
        {"__key__": f"{i:03d}", "png": png(picture), "txt": chosen[(i + shift) % 7]}
        for i, picture in enumerate(pictures)
    ]
    broken = {"__key__": "broken", "png": png(pictures[0])[:60], "txt": "cut short"}
    write_shards([*samples, broken], folder, prefix="raw", samples_per_shard=5)


@pytest.mark.parametrize(("shift", "top_1"), [(0, 1.0), (1, 0.0)])
def test_a_model_whose_samples_are_its_training_pictures_scores_one_and_with_captions_moved_zero(
    pipeline, tmp_path, capsys, shift: int, top_1: float
) -> None:
    save_pipeline(tmp_path / "model", pipeline)
    write_training_set(tmp_path / "raw", pipeline, shift)
    words = ["--checkpoint", tmp_path / "model", "--shards", tmp_path / "raw", "--out", tmp_path / "out"]
    assert main([*map(str, words), *OPTIONS]) == 0
    shown = capsys.readouterr()
    report = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    assert report["top_1"] == top_1
    assert f"top-1 {top_1:.3f}" in shown.out
    assert sorted(row["caption"] for row in report["captions"]) == sorted(CAPTIONS)
    if shift == 0:
        assert report["top_5"] == 1.0
        assert all(row["rank"] == 1 and row["nearest"] == row["caption"] for row in report["captions"])
    settings = report["settings"]
    assert settings["pictures"] == 7
    assert settings["passed_over"] == 1
    assert "passed over: raw-000001.tar/broken: the picture does not decode" in shown.err
    names = ("checkpoint", "seed", "sampler", "steps", "guidance", "shards")
    assert [settings[name] for name in names] == ["model", 5, "ddim", 3, 3.0, "raw"]
    with Image.open(tmp_path / "out" / "retrieval.png") as grid:
        assert grid.width == 8 + 12 * (144 + 8)  # four captions of three pictures in a row
        assert grid.text["top_1"] == f"{top_1:.4f}"  # type: ignore[attr-defined]
        cells = [np.asarray(grid.crop((8 + 152 * i, 8, 152 + 152 * i, 152))) for i in range(12)]
    for sample, nearest, true in zip(cells[::3], cells[1::3], cells[2::3], strict=True):
        # What is drawn is the very picture of the training set, and under its caption unless captions were moved.
        assert np.array_equal(sample, nearest)
        assert np.array_equal(sample, true) == (shift == 0)


def test_encoded_shards_and_shards_without_a_usable_picture_are_refused(tmp_path) -> None:
    write_shards(
        [{"__key__": "a", "txt": "red"}], tmp_path / "latents", prefix="x", samples_per_shard=1, encoder={"kind": "vae"}
    )
    with pytest.raises(ValueError, match="latents holds latents, expected the raw shards"):
        read_pictures(tmp_path / "latents", 16)
    write_shards([{"__key__": "a", "txt": "red"}], tmp_path / "bare", prefix="x", samples_per_shard=1)
    with pytest.raises(ValueError, match=r"not one picture with a caption; .*x-000000\.tar/a: no picture"):
        read_pictures(tmp_path / "bare", 16)


def test_a_file_where_the_reports_would_go_is_said_before_anything_is_scored(pipeline, tmp_path, capsys) -> None:
    save_pipeline(tmp_path / "model", pipeline)
    (tmp_path / "file").write_text("")
    words = ["--checkpoint", tmp_path / "model", "--shards", tmp_path, "--out", tmp_path / "file" / "out", *OPTIONS]
    with pytest.raises(SystemExit):
        main([str(word) for word in words])
    assert f"out: {tmp_path / 'file'} is a file, expected a folder" in capsys.readouterr().err


def test_a_missing_manifest_is_said_with_the_command_that_makes_it(pipeline, tmp_path, capsys) -> None:
    save_pipeline(tmp_path / "model", pipeline)
    words = ["--checkpoint", tmp_path / "model", "--shards", tmp_path, "--out", tmp_path / "out", *OPTIONS]
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    assert exit_.value.code == 2
    assert "tools/index_shards.py" in capsys.readouterr().err
