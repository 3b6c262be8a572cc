"""Statistics and the two ports' normalisations."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file
from transforms_support import DATA, make_stats

from turbopi.transforms import (
    DatasetStats,
    Normalizer,
    NormStats,
    load_norm_stats,
    save_norm_stats,
    stats_from_lerobot,
)

EVERY = [(mode, convention) for mode in ("mean_std", "quantile") for convention in ("openpi", "lerobot")]
numbers = st.floats(-1e3, 1e3)
rows = hnp.arrays(np.float64, st.tuples(st.integers(1, 3), st.integers(1, 12)), elements=numbers)


@pytest.mark.parametrize(("mode", "convention"), EVERY)
@given(values=rows, seed=st.integers(0, 100), dims=st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_unnormalize_undoes_normalize(mode, convention, values, seed, dims):
    normalizer = Normalizer(make_stats(dims, dims, seed).state, mode, convention, "state")
    back = normalizer.unnormalize(normalizer.normalize(values))
    # lerobot's inverse of mean_std leaves its 1e-8 out; openpi's scales dims beyond the statistics by 1 + 1e-6.
    exact = mode == "quantile" or (convention == "openpi" and dims >= values.shape[1])
    np.testing.assert_allclose(back, values, rtol=1e-9 if exact else 2e-6, atol=1e-9 if exact else 1e-5)


@pytest.mark.parametrize(("mode", "convention"), EVERY)
def test_formulas(mode, convention):
    stats = NormStats(mean=[1.0], std=[0.5], q01=[-2.0], q99=[3.0])
    normalizer = Normalizer(stats, mode, convention, "state")
    x = np.array([2.0])
    expected = {
        ("mean_std", "openpi"): 1.0 / (0.5 + 1e-6),
        ("mean_std", "lerobot"): 1.0 / (0.5 + 1e-8),
        ("quantile", "openpi"): 4.0 / (5.0 + 1e-6) * 2 - 1,
        ("quantile", "lerobot"): 2 * 4.0 / 5.0 - 1,
    }
    inverse = {
        ("mean_std", "openpi"): 2.0 * (0.5 + 1e-6) + 1.0,
        ("mean_std", "lerobot"): 2.0,
        ("quantile", "openpi"): 1.5 * (5.0 + 1e-6) - 2.0,
        ("quantile", "lerobot"): 3.0 * 5.0 / 2 - 2.0,
    }
    np.testing.assert_allclose(normalizer.normalize(x), expected[mode, convention], rtol=1e-15)
    np.testing.assert_allclose(normalizer.unnormalize(x), inverse[mode, convention], rtol=1e-15)


@pytest.mark.parametrize(("mode", "convention"), EVERY)
def test_dtypes(mode, convention):
    normalizer = Normalizer(make_stats(3, 3).state, mode, convention, "state")
    for given_dtype, lerobots in ((np.float32, np.float32), (np.float64, np.float64), (np.int64, np.float32)):
        values = np.arange(4).astype(given_dtype)
        expected = np.float64 if convention == "openpi" else lerobots
        assert normalizer.normalize(values).dtype == expected
        assert normalizer.unnormalize(values).dtype == expected


@pytest.mark.parametrize(("mode", "convention"), EVERY)
def test_short_data_and_short_statistics(mode, convention):
    normalizer = Normalizer(make_stats(4, 4).state, mode, convention, "state")
    values = np.linspace(-1, 1, 6)
    for way in (normalizer.normalize, normalizer.unnormalize):
        np.testing.assert_array_equal(way(values[:2]), way(values)[:2])
        assert way(np.stack([values] * 5)).shape == (5, 6)
    np.testing.assert_array_equal(normalizer.normalize(values)[4:], values[4:])
    beyond = normalizer.unnormalize(values)[4:]
    scaled = values[4:] * (1 + 1e-6) if (mode, convention) == ("mean_std", "openpi") else values[4:]
    np.testing.assert_array_equal(beyond, scaled)


def test_a_constant_dimension_does_not_divide_by_zero():
    stats = NormStats([1.0], [0.0], [1.0], [1.0])
    for mode, convention in EVERY:
        normalizer = Normalizer(stats, mode, convention, "state")
        assert np.isfinite(normalizer.normalize(np.array([1.0, 5.0]))).all()
    assert Normalizer(stats, "quantile", "lerobot", "state").normalize(np.array([1.0])) == -1.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            (NormStats([0.0], [1.0]), "quantile", "openpi", "actions"),
            "of the actions have no q01, which mode 'quantile'",
        ),
        ((NormStats(None, None, [0.0], [1.0]), "mean_std", "openpi", "state"), "of the state have no mean"),
        ((NormStats([0.0], [np.nan]), "mean_std", "openpi", "state"), "NaN or infinite values in std"),
        (
            (NormStats([0.0], [1.0]), "min_max", "openpi", "state"),
            "mode must be one of mean_std, quantile, got 'min_max'",
        ),
        ((NormStats([0.0], [1.0]), "mean_std", "gr00t", "state"), "convention must be one of openpi, lerobot"),
    ],
)
def test_a_normalizer_that_cannot_work_is_not_made(arguments, said):
    with pytest.raises(ValueError, match=said):
        Normalizer(*arguments)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"mean": ["a"], "std": [1]}, "mean is not a list of numbers"),
        ({"mean": [[1.0]], "std": [1]}, r"mean has shape \(1, 1\)"),
        ({"mean": [], "std": []}, r"shape \(0,\)"),
        ({"mean": [1.0], "std": [1.0, 2.0]}, "disagree on their length: {'mean': 1, 'std': 2}"),
        ({"mean": None, "std": None}, "neither mean and std nor q01 and q99"),
    ],
)
def test_malformed_statistics(values, said):
    with pytest.raises(ValueError, match=said):
        NormStats(**values)


def test_statistics_cannot_be_changed_behind_ones_back():
    mean = np.zeros(3)
    stats = NormStats(mean, np.ones(3))
    mean[0] = 9
    assert stats.mean.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="read-only"):
        stats.mean[0] = 1
    assert stats.dims == 3


@given(seed=st.integers(0, 1000), quantiles=st.booleans())
@settings(max_examples=20, deadline=None)
def test_the_file_keeps_every_bit(tmp_path_factory, seed, quantiles):
    stats = make_stats(8, 7, seed)
    if not quantiles:
        stats = DatasetStats(
            NormStats(stats.state.mean, stats.state.std), NormStats(stats.actions.mean, stats.actions.std)
        )
    path = tmp_path_factory.mktemp("stats") / "assets" / "robot" / "norm_stats.json"
    save_norm_stats(path, stats)
    again = load_norm_stats(path)
    for before, after in ((stats.state, again.state), (stats.actions, again.actions)):
        assert before.to_dict() == after.to_dict()
    assert (json.loads(path.read_text())["norm_stats"]["state"]["q01"] is None) is not quantiles


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "norm_stats.json is not JSON"),
        ("[]", "has no norm_stats object"),
        ('{"state": {}}', "has no norm_stats object"),
        ('{"norm_stats": {"state": {"mean": [0], "std": [1]}}}', "has no statistics of the actions"),
        ('{"norm_stats": {"state": {"mean": null, "std": [1]}}}', "state.mean is missing"),
        ('{"norm_stats": {"state": {"mean": [0, 1], "std": [1]}}}', "norm_stats.json, state: .*disagree"),
    ],
)
def test_malformed_files(tmp_path, text, said):
    path = tmp_path / "norm_stats.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        load_norm_stats(path)


def test_an_absent_file_names_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing.json does not exist; .* copy them from the training run"):
        load_norm_stats(tmp_path / "nothing.json")


def test_statistics_without_mean_are_not_written(tmp_path):
    stats = DatasetStats(NormStats(None, None, [0.0], [1.0]), make_stats(1, 1).actions)
    with pytest.raises(ValueError, match="the state statistics have no mean and std"):
        save_norm_stats(tmp_path / "norm_stats.json", stats)


def test_lerobots_statistics():
    arrays = load_file(
        DATA / "io" / "ckpt_lerobot_pi05_tiny" / "policy_preprocessor_step_3_normalizer_processor.safetensors"
    )
    stats = stats_from_lerobot(arrays)
    assert (stats.state.dims, stats.actions.dims) == (8, 7)
    np.testing.assert_array_equal(stats.state.q01, arrays["observation.state.q01"].astype(np.float64))
    np.testing.assert_array_equal(stats.actions.std, arrays["action.std"].astype(np.float64))
    only_quantiles = {k: v for k, v in arrays.items() if k.endswith(("q01", "q99"))}
    assert stats_from_lerobot(only_quantiles).state.mean is None
    with pytest.raises(ValueError, match=r"have no action.mean, .*found: observation.state.max"):
        stats_from_lerobot({k: v for k, v in arrays.items() if k.startswith("observation")})
