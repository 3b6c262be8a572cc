import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from turbopi import ModelConfig, load_policy, preset
from turbopi.checkpoint import open_checkpoint, save_checkpoint
from turbopi.checkpoint.load import load_opened
from turbopi.train.augment import augment_images
from turbopi.train.dataset import DemonstrationSet, NoiseConfig, dataset_stats, load_episodes
from turbopi.train.episodes import Episode, episode_files, load_episode, save_episode
from turbopi.train.session import TrainRequest, TrainSession
from turbopi.train.trainer import CURVE_FILE, TrainConfig, Trainer
from turbopi.transforms import shipped_tokenizer

CONFIG = preset("pi05-tiny")
QUICK = TrainConfig(steps=6, batch_size=4, warmup=2, save_every=3, bf16=False)
CPU = torch.device("cpu")


def episode(seed: int, ticks: int = 13, size: int = CONFIG.vision.image_size) -> Episode:
    rng = np.random.default_rng(seed)
    return Episode(
        frames=rng.integers(0, 256, (ticks, 2, size, size, 3), dtype=np.uint8),
        state=rng.standard_normal((ticks, 8)).astype(np.float32),
        actions=rng.uniform(-1, 1, (ticks, 7)).astype(np.float32),
        meta={"prompt": "pick up the black bowl", "seed": seed},
    )


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    return [episode(seed) for seed in range(3)]


def dataset(episodes: list[Episode], config: ModelConfig = CONFIG, **noise: float) -> DemonstrationSet:
    return DemonstrationSet(
        episodes, config, dataset_stats(episodes), shipped_tokenizer(), CPU, NoiseConfig(**noise), seed=0
    )


def test_episodes_survive_the_disk(tmp_path: Path, episodes: list[Episode]) -> None:
    for index, saved in enumerate(episodes):
        save_episode(tmp_path / "demos" / f"{index}.npz", saved)
    for workers in (1, 2):
        for saved, found in zip(episodes, load_episodes(episode_files([tmp_path / "demos"]), workers), strict=True):
            assert found.meta == saved.meta
            for field in ("frames", "state", "actions"):
                assert np.array_equal(getattr(found, field), getattr(saved, field))
    assert not list(tmp_path.rglob("*.partial"))


def test_bad_episodes_are_named(tmp_path: Path, episodes: list[Episode]) -> None:
    with pytest.raises(FileNotFoundError, match="no episodes in"):
        episode_files([tmp_path])
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"bad\.npz is not an episode file"):
        load_episode(tmp_path / "bad.npz")
    with pytest.raises(ValueError, match="an episode of 13 frames, 13 states, 12 actions"):
        dataclasses.replace(episodes[0], actions=episodes[0].actions[:-1])
    with pytest.raises(ValueError, match=r"expected .* uint8"):
        dataclasses.replace(episodes[0], frames=episodes[0].frames.astype(np.float32))
    with pytest.raises(ValueError, match="no prompt"):
        dataclasses.replace(episodes[0], meta={})


def test_batches_are_what_the_policy_will_see(episodes: list[Episode], tmp_path: Path) -> None:
    """Without disturbance, a batch holds the arrays that the policy's transforms make of the same observation."""
    data = dataset(episodes, shift=0.0, colour=0.0, state=0.0)
    trainer = Trainer(CONFIG, QUICK, tmp_path / "run", CPU)
    path = save_checkpoint(tmp_path / "ck", trainer.average, dataset_stats(episodes), "libero", shipped_tokenizer())
    policy = load_policy(path, device="cpu")
    inputs, actions = data.batch(40, torch.Generator().manual_seed(0))
    inputs.check(dataclasses.replace(CONFIG, cameras=2))
    for row in range(40):
        image = ((inputs.images[row, :2].permute(0, 2, 3, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
        source, tick = next((e, t) for e in episodes for t in range(len(e.state)) if np.array_equal(e.frames[t], image))
        observation = {
            "observation/image": source.frames[tick, 0],
            "observation/wrist_image": source.frames[tick, 1],
            "observation/state": source.state[tick].astype(np.float64),
            "prompt": source.meta["prompt"],
        }
        arrays, context = policy.transforms.inputs(observation)
        for field in ("tokens", "token_mask"):
            assert np.array_equal(getattr(inputs, field)[row].numpy(), getattr(arrays, field)), field
        assert np.array_equal(inputs.images[row].numpy(), arrays.images[:2])
        assert arrays.image_mask.tolist() == [True, True, False]
        assert np.allclose(inputs.state[row].numpy(), arrays.state, atol=1e-6)
        ahead = np.minimum(tick + np.arange(CONFIG.horizon), len(source.state) - 1)
        executed = policy.transforms.outputs(actions[row].numpy(), context)["actions"]
        assert np.allclose(executed, source.actions[ahead], atol=1e-5)


@pytest.mark.parametrize("sizes", [(28,), (28, 56)])
def test_frames_of_another_size_are_refused(sizes: tuple[int, ...]) -> None:
    others = [episode(seed, size=size) for seed, size in enumerate(sizes)]
    with pytest.raises(ValueError, match=r"2 cameras of 28 x 28 px.*demos --image-size 56"):
        dataset(others)


def test_augmentation_keeps_the_range_and_is_seeded() -> None:
    images = torch.rand(3, 2, 3, 28, 28) * 2 - 1
    first, second = (augment_images(images, 0.1, 0.2, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == images.shape
    assert float(first.abs().max()) <= 1
    assert not torch.equal(first, images)
    assert torch.equal(augment_images(images, 0.0, 0.0, torch.Generator()), images)
    constant = torch.full((2, 2, 3, 28, 28), 0.25)
    assert torch.equal(augment_images(constant, 0.2, 0.0, torch.Generator().manual_seed(0)), constant)


@pytest.mark.parametrize("name", ["pi05-tiny", "pi0-tiny"])
def test_a_killed_run_continues_bit_for_bit(tmp_path: Path, episodes: list[Episode], name: str) -> None:
    config = preset(name)
    whole = Trainer(config, QUICK, tmp_path / "whole", CPU)
    whole.run(dataset(episodes, config))
    first = Trainer(config, QUICK, tmp_path / "parts", CPU)
    for _ in range(QUICK.save_every):
        first._one_step(dataset(episodes, config))
    first.save_state()
    second = Trainer(config, QUICK, tmp_path / "parts", CPU)
    assert second.step == QUICK.save_every
    reports: list[int] = []
    second.run(dataset(episodes, config), lambda step, loss: reports.append(step))
    assert reports == [QUICK.steps]
    for a, b in zip(whole.average.parameters(), second.average.parameters(), strict=True):
        assert torch.equal(a, b)
    lines = (tmp_path / "parts" / CURVE_FILE).read_text().splitlines()
    assert json.loads(lines[-1])["step"] == QUICK.steps
    with pytest.raises(ValueError, match="was made with another batch_size"):
        Trainer(config, dataclasses.replace(QUICK, batch_size=5), tmp_path / "parts", CPU)


def test_it_learns_and_stops_in_time(tmp_path: Path, episodes: list[Episode]) -> None:
    config = TrainConfig(steps=120, batch_size=16, warmup=10, learning_rate=2e-3, bf16=False, seed=1)
    losses: list[float] = []
    Trainer(CONFIG, config, tmp_path / "run", CPU).run(dataset(episodes), lambda step, loss: losses.append(loss))
    assert losses[-1] < 0.7 * losses[0]
    limited = Trainer(CONFIG, dataclasses.replace(config, steps=10_000, max_seconds=0.0), tmp_path / "limited", CPU)
    limited.run(dataset(episodes))
    assert limited.step == 100


@pytest.mark.parametrize("change", [{"steps": 0}, {"batch_size": 0}, {"ema": 1.0}])
def test_train_config_checks_itself(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="TrainConfig"):
        TrainConfig(**change)


def test_the_schedule_warms_up_and_falls() -> None:
    config = TrainConfig(steps=1000, warmup=100, learning_rate=1.0)
    assert config.rate(0) == pytest.approx(0.01)
    assert config.rate(100) == pytest.approx(1.0)
    assert config.rate(1000) == pytest.approx(0.01)


def test_a_blend_lies_between_the_start_and_what_was_trained(tmp_path: Path, episodes: list[Episode]) -> None:
    for number, one in enumerate(episodes):
        save_episode(tmp_path / f"{number}.npz", one)
    start = Trainer(CONFIG, QUICK, tmp_path / "start", CPU).average
    save_checkpoint(tmp_path / "ck", start, dataset_stats(episodes), "libero", shipped_tokenizer())

    def trained(blend: float) -> dict[str, torch.Tensor]:
        request = TrainRequest(
            data=(tmp_path,), out=tmp_path / f"run{blend}", start_from=tmp_path / "ck", blend=blend, steps=4,
            batch_size=2, device="cpu", workers=1, dtype="float32",
        )  # fmt: skip
        saved = open_checkpoint(TrainSession(request).run(lambda step, loss: None))
        return load_opened(saved, CPU, torch.float32).state_dict()

    begin, whole, mixed = start.state_dict(), trained(1.0), trained(0.25)
    assert any(not torch.equal(begin[name], whole[name]) for name in begin)
    for name in begin:
        torch.testing.assert_close(mixed[name], 0.75 * begin[name] + 0.25 * whole[name])
    with pytest.raises(ValueError, match="name it with start_from"):
        TrainRequest(data=(tmp_path,), out=tmp_path / "run", blend=0.5)
    with pytest.raises(ValueError, match=r"blend must be in \(0, 1\], got 0"):
        TrainRequest(data=(tmp_path,), out=tmp_path / "run", blend=0.0)
